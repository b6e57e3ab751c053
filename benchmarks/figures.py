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
    at_least: float | None = None
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
        if self.at_most is None and self.at_least is None:
            return None
        found = self.value if self.ratio is None else self.ratio
        return (self.at_most is None or found <= self.at_most) and (self.at_least is None or found >= self.at_least)

    @property
    def goal(self) -> str:
        bounds = (("≤", self.at_most), ("≥", self.at_least))
        return ", ".join([f"{sign} {bound:,g}" for sign, bound in bounds if bound is not None])
