"""When records are old: not by a clock that was set forward a moment ago."""

import math

MAX_GAIN = 3600.0
"""Seconds that a machine's clock may gain on the time that passes: more is no correction of it, but another time."""


class RetentionClock:
    """A machine's clock, and beside it the same clock as if it had never been set forward.

    A machine without a battery begins years ago, and then gets the time. What it stored before is as old as the time
    that has passed since. So as long as a topic's retention reaches back to before its clock was set, records are old
    by the clock as it was; later, by the clock as it is. Both are arguments: `at` is the clock's time, and `ticks` are
    seconds that have passed since whenever. `gained` is by how many seconds it was set forward in all.
    """

    def __init__(self, at: float, ticks: float) -> None:
        self.gained = 0.0
        self._lead = at - ticks
        self._set_at = -math.inf

    def kept_since(self, retention: float, at: float, ticks: float) -> float:
        """Return when the oldest records were stored that are kept now, for so many seconds."""
        gained = at - ticks - self._lead - self.gained
        if gained > MAX_GAIN:
            self.gained += gained
            self._set_at = at
        as_it_was = min(at, ticks + self._lead)
        return (as_it_was if at - self._set_at < retention else at) - retention
