"""Limits the log lines of refusals, which anyone on the internet, or a full disk, can cause: the rest is counted."""

from collections import Counter
from collections.abc import Sequence

PER_KIND = 10  # lines of one kind in a window: enough to see what it is about
IN_ALL = 200  # lines of all kinds
MAX_KINDS = 50  # kinds whose suppressed lines are counted separately


class LogQuota:
    """Counts the lines of one window, whose length is up to its owner. A kind is a source and a reason."""

    def __init__(self) -> None:
        self._logged: Counter[tuple[str, str]] = Counter()
        self._suppressed: Counter[tuple[str, str]] = Counter()
        self._count = 0

    def take(self, source: str, reason: str) -> bool:
        """Return whether to write a line; if not, count it as suppressed."""
        kind = source, reason
        if self._logged[kind] >= PER_KIND or self._count >= IN_ALL:
            self._suppressed[kind] += 1
            return False
        self._logged[kind] += 1
        self._count += 1
        return True

    def next_window(self) -> Sequence[tuple[str, str, int]]:
        """Begin the next window; return the lines suppressed in this one: source, reason, count, the most first.

        Those beyond 50 kinds are counted together, with an empty source and reason.
        """
        found = [(source, reason, count) for (source, reason), count in self._suppressed.most_common()]
        rest = sum(count for _, _, count in found[MAX_KINDS:])
        self._logged.clear()
        self._suppressed.clear()
        self._count = 0
        return [*found[:MAX_KINDS], *([("", "", rest)] if rest else [])]
