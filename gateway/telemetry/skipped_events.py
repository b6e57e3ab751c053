"""Which events were left out: of each source the types of them, and when the first was received. In bounded memory."""

from collections import Counter
from dataclasses import dataclass, field

from gateway.model import Event

MOST_TYPES = 100
"""Of a source that are told apart: a sender may make up as many as it likes."""
LONGEST_TYPE = 60
OTHERS = "(others)"


@dataclass(slots=True, kw_only=True)
class Skipped:
    """Of one source. `oldest` is infinite as long as there was none; `newest` has the id of an event of each type."""

    types: Counter[str] = field(default_factory=Counter)
    newest: dict[str, str] = field(default_factory=dict)
    oldest: float = float("inf")


class SkippedEvents:
    """Of each source, since the rules have changed by which they are."""

    def __init__(self) -> None:
        self._found: dict[str, Skipped] = {}

    def add(self, event: Event) -> None:
        found = self._found.setdefault(event.source, Skipped())
        found.oldest = min(found.oldest, event.received_at)
        kind = event.type if len(event.type) <= LONGEST_TYPE else event.type[:LONGEST_TYPE] + "…"
        kind = kind if kind in found.types or len(found.types) < MOST_TYPES else OTHERS
        found.types[kind] += 1
        found.newest[kind] = event.id

    def of(self, source: str) -> Skipped:
        return self._found.get(source) or Skipped()

    def forget(self, source: str) -> None:
        self._found.pop(source, None)
