"""A result of a benchmark, with its goal."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A result. Its goal is for the ratio to the reference if there is one, else for the value."""

    section: str
    name: str
    value: float
    unit: str
    reference: float | None = None
    at_most: float | None = None

    @property
    def ratio(self) -> float | None:
        return None if self.reference is None else self.value / self.reference

    @property
    def is_met(self) -> bool | None:
        if self.at_most is None:
            return None
        return (self.value if self.ratio is None else self.ratio) <= self.at_most

    @property
    def goal(self) -> str:
        return "" if self.at_most is None else f"≤ {self.at_most:g}"
