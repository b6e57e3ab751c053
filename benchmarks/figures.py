"""A result of a benchmark, with its goal."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Self


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A result. Its goal is for the ratio to the reference if there is one, else for the value."""

    section: str
    name: str
    value: float
    unit: str
    reference: float | None = None
    at_most: float | None = None
    spread: tuple[float, float] | None = None
    """The least and the most of all rounds: of the ratio if there is a reference, else of the value."""

    @classmethod
    def of_rounds(
        cls,
        *,
        section: str,
        name: str,
        values: Sequence[float],
        references: Sequence[float] | None = None,
        unit: str,
        at_most: float | None = None,
    ) -> Self:
        """Return the medians. A value and a reference are of the same round, one after the other."""
        each = values if references is None else [one / other for one, other in zip(values, references, strict=True)]
        return cls(
            section=section,
            name=name,
            value=median(values),
            unit=unit,
            reference=None if references is None else median(references),
            at_most=at_most,
            spread=(min(each), max(each)),
        )

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
