"""Events that weren't delivered, by source: their types, and when the oldest was received. In bounded memory."""

from collections import Counter
from collections.abc import Callable, Collection
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
        self.type_of: Callable[[Event], str] = lambda event: event.type
        """Returns the type by which an event is counted: one that people may see."""

    def add(self, event: Event) -> None:
        found = self._found.setdefault(event.source, Skipped())
        found.oldest = min(found.oldest, event.received_at)
        kind = self.type_of(event)
        kind = kind if len(kind) <= MAX_TYPE_LENGTH else kind[:MAX_TYPE_LENGTH] + "…"
        kind = kind if kind in found.types or len(found.types) < MAX_TYPES else OTHERS
        found.types[kind] += 1
        found.newest[kind] = event.id

    def of(self, source: str) -> Skipped:
        return self._found.get(source) or Skipped()

    def rename(self, source: str, kind: str) -> None:
        """Count all of a source's events so far as of one type."""
        found = self._found.get(source)
        if found is not None and found.types:
            newest = found.newest[found.types.most_common(1)[0][0]]
            found.types, found.newest = Counter({kind: found.types.total()}), {kind: newest}

    def forget(self, source: str) -> None:
        self._found.pop(source, None)

    def keep(self, sources: Collection[str]) -> None:
        """Forget the other sources."""
        for name in self._found.keys() - sources:
            del self._found[name]
