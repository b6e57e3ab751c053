"""How many events each secret of a source has verified within the last hour, if it has several, or one that expires."""

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

HOUR = 3600.0
MINUTE = 60.0


@dataclass(slots=True)
class _Uses:
    """The events of each minute of the last hour in which there were any: at most 61 pairs."""

    minutes: deque[list[int]] = field(default_factory=lambda: deque(maxlen=int(HOUR / MINUTE) + 1))

    def add(self, minute: int) -> None:
        if self.minutes and self.minutes[-1][0] >= minute:  # also after a clock was set back
            self.minutes[-1][1] += 1
        else:
            self.minutes.append([minute, 1])


class SecretUses:
    """Counts of each source and secret, known by its index among those of its source. Times are Unix seconds."""

    def __init__(self) -> None:
        self._uses: dict[str, dict[int, _Uses]] = {}

    def add(self, source: str, secret: int, *, at: float) -> None:
        uses = self._uses.setdefault(source, {})
        if secret not in uses:
            uses[secret] = _Uses()
        uses[secret].add(int(at // MINUTE))

    def of(self, source: str, secret: int, now: float) -> int:
        """Return how many events it verified in the last hour, to the minute."""
        uses = self._uses.get(source, {}).get(secret)
        first = (now - HOUR) // MINUTE
        return 0 if uses is None else sum(count for minute, count in uses.minutes if minute > first)

    def forget(self, source: str) -> None:
        """Forget a source whose rules have changed: an index may be that of another secret."""
        self._uses.pop(source, None)

    def keep(self, sources: Collection[str]) -> None:
        """Forget the other sources: one that comes back may have other secrets."""
        for name in self._uses.keys() - sources:
            del self._uses[name]
