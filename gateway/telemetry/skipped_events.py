"""Events that weren't delivered, by source: their types, and when the oldest was received. In bounded memory."""

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

from gateway.model import Event

MAX_TYPES = 100
"""Types counted separately per source: a sender can invent any number."""
MAX_TYPE_LENGTH = 60
OTHERS = "(others)"


@dataclass(slots=True, kw_only=True)
class Skipped:
    """A source's skipped events. `oldest` is infinite if there are none; `newest` is the last event's id by type."""

    types: Counter[str] = field(default_factory=Counter)
    newest: dict[str, str] = field(default_factory=dict)
    oldest: float = float("inf")


class SkippedEvents:
    """Each source's skipped events, since the last rule change that affects them."""

    def __init__(self) -> None:
        self._found: dict[str, Skipped] = {}

    def add(self, event: Event) -> None:
        found = self._found.setdefault(event.source, Skipped())
        found.oldest = min(found.oldest, event.received_at)
        kind = event.type if len(event.type) <= MAX_TYPE_LENGTH else event.type[:MAX_TYPE_LENGTH] + "…"
        kind = kind if kind in found.types or len(found.types) < MAX_TYPES else OTHERS
        found.types[kind] += 1
        found.newest[kind] = event.id

    def of(self, source: str) -> Skipped:
        return self._found.get(source) or Skipped()

    def forget(self, source: str) -> None:
        self._found.pop(source, None)

    def keep(self, sources: Collection[str]) -> None:
        """Forget the other sources."""
        for name in self._found.keys() - sources:
            del self._found[name]
