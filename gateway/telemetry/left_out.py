"""Which events were left out: of each source the types of them, and when the first was received. In bounded memory."""

from collections import Counter
from dataclasses import dataclass, field

MOST_TYPES = 100
"""Of a source that are told apart: a sender may make up as many as it likes."""
LONGEST_TYPE = 60
OTHERS = "(others)"


@dataclass(slots=True, kw_only=True)
class LeftOut:
    """Of one source. `oldest` is infinite as long as there was none."""

    types: Counter[str] = field(default_factory=Counter)
    oldest: float = float("inf")


class LeftOutEvents:
    """Of each source, since the rules have changed by which they are."""

    def __init__(self) -> None:
        self._found: dict[str, LeftOut] = {}

    def add(self, source: str, kind: str, received_at: float) -> None:
        found = self._found.setdefault(source, LeftOut())
        found.oldest = min(found.oldest, received_at)
        kind = kind if len(kind) <= LONGEST_TYPE else kind[:LONGEST_TYPE] + "…"
        found.types[kind if kind in found.types or len(found.types) < MOST_TYPES else OTHERS] += 1

    def of(self, source: str) -> LeftOut:
        return self._found.get(source) or LeftOut()

    def forget(self, source: str) -> None:
        self._found.pop(source, None)
