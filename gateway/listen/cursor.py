"""Where a listener is in the events that are told, so that after a cut it hears nothing twice and misses nothing. Pure.

What is told has the number that the index of a process gave it: the millisecond of its append, and its turn in that.
Another process, or an index that was made anew, may give the events of a millisecond other turns, or push some of them
into the next ones. So a listener goes on from some milliseconds earlier, and knows what it has heard since by its
position:

    … ──── floor ──── resume ═══ heard, and remembered ═══▶ last ──▶ not heard yet
"""

from gateway.index.event_numbers import SLOTS

REWIND = 10
"""Milliseconds before the last number from which it goes on: room for 2,560 events of one time, as a batch has."""
MOST = 10_000
"""Positions that are remembered: more than indexes have numbers for in that time, and a bound for what else tells."""


class Cursor:
    """The cursor of one listener. Before anything was told it has none: it begins with what comes then."""

    def __init__(self) -> None:
        self._heard: dict[str, int] = {}
        self._floor = 0
        self.last: int | None = None
        """The highest number that was told."""

    @property
    def resume(self) -> int | None:
        """The number after which to go on; None: from now on."""
        if self.last is None:
            return None
        return max(self._floor, (self.last // SLOTS - REWIND) * SLOTS - 1)

    @property
    def remembered(self) -> int:
        return len(self._heard)

    def reach(self, number: int) -> None:
        """Take down that all is told up to a number."""
        if self.last is None:
            self._floor = self.last = number
        self.last = max(self.last, number)
        oldest = (self.last // SLOTS - 2 * REWIND) * SLOTS
        while self._heard and next(iter(self._heard.values())) < oldest:
            del self._heard[next(iter(self._heard))]

    def hear(self, number: int, *, position: str | None, identity: str) -> bool:
        """Take down an event that is told; return whether it is new.

        Without a position, as only a delivery tells of it, it goes by its `identity`; it may have one later.
        """
        is_new = identity not in self._heard and (position is None or position not in self._heard)
        if is_new:
            self._heard[identity if position is None else position] = number
            while len(self._heard) > MOST:
                self._floor = max(self._floor, self._heard.pop(next(iter(self._heard))))
        self.reach(number)
        return is_new
