"""When records are old: not by a clock that was set forward a moment ago."""

import math

MAX_GAIN = 3600.0
"""Seconds that a machine's clock may gain on the time that passes: more is no correction of it, but another time."""


class RetentionClock:
    """A machine's clock, and beside it the same clock as if it had never been set forward.

    A machine without a battery begins years ago, and then gets the time. What it stored before is as old as the time
    that has passed since. So as long as a topic's retention reaches back to before its clock was set, records are old
    by the clock as it was; later, by the clock as it is. Both are arguments: `at` is the clock's time, and `ticks` are
    seconds that have passed since whenever. `gained` is by how many seconds it was set forward in all, `set_at` when
    it last was, by itself: with both, one goes on that was in another process, unless it was set back meanwhile.
    """

    def __init__(self, at: float, ticks: float, *, set_at: float = -math.inf, gained: float = 0.0) -> None:
        is_set_back = at < set_at - MAX_GAIN
        self.gained = 0.0 if is_set_back else gained
        self.set_at = -math.inf if is_set_back else set_at
        self._lead = at - ticks - self.gained

    def kept_since(self, retention: float, at: float, ticks: float) -> float:
        """Return when the oldest records were stored that are kept now, for so many seconds."""
        gained = at - ticks - self._lead - self.gained
        if gained > MAX_GAIN:
            self.gained += gained
            self.set_at = at
        as_it_was = min(at, ticks + self._lead)
        return (as_it_was if at - self.set_at < retention else at) - retention
