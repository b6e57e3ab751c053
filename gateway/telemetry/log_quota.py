"""How many lines of one kind are told, where anybody on the internet can cause them: the rest is counted."""

from collections import Counter
from collections.abc import Sequence

EACH = 10  # lines of one kind in a window: enough to see what it is about
TOGETHER = 200  # lines of all kinds
KINDS = 50  # counts of what was left out, in lines of their own


class LogQuota:
    """The lines of one window, whose length is its owner's choice. A kind is a source and a reason."""

    def __init__(self) -> None:
        self._told: Counter[tuple[str, str]] = Counter()
        self._left_out: Counter[tuple[str, str]] = Counter()
        self._count = 0

    def takes(self, source: str, reason: str) -> bool:
        """Return whether a line is to be written, or counted in its place."""
        kind = source, reason
        if self._told[kind] >= EACH or self._count >= TOGETHER:
            self._left_out[kind] += 1
            return False
        self._told[kind] += 1
        self._count += 1
        return True

    def end(self) -> Sequence[tuple[str, str, int]]:
        """Begin the next window; return what was left out in this one: source, reason, count, the most first.

        What goes beyond 50 kinds is one more, with neither a source nor a reason.
        """
        found = [(source, reason, count) for (source, reason), count in self._left_out.most_common()]
        rest = sum(count for _, _, count in found[KINDS:])
        self._told.clear()
        self._left_out.clear()
        self._count = 0
        return [*found[:KINDS], *([("", "", rest)] if rest else [])]
