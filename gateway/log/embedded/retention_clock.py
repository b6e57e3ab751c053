"""When records are old: not by a clock that was set forward a moment ago."""

import math

MAX_STEP = 3600.0
"""Seconds by which a machine's clock may be set forward and be taken as corrected: more than that is another time."""


class RetentionClock:
    """A machine's clock, and beside it the same clock as if it had never been set forward.

    A machine without a battery begins years ago, and then gets the time. What it stored before is as old as the time
    that has passed since. So as long as a topic's retention reaches back to before its clock was set, records are old
    by the clock as it was; later, by the clock as it is. Both are arguments: `at` is the clock's time, `monotonic` that
    of a clock that nobody sets. `stepped_by` is by how many seconds the clock was set forward in all, `stepped_at` when
    it last was, by its own time: with both, a process goes on where another one ended, unless the clock was set back.
    """

    def __init__(self, at: float, monotonic: float, *, stepped_at: float = -math.inf, stepped_by: float = 0.0) -> None:
        is_set_back = at < stepped_at - MAX_STEP
        self.stepped_by = 0.0 if is_set_back else stepped_by
        self.stepped_at = -math.inf if is_set_back else stepped_at
        self._lead = at - monotonic - self.stepped_by

    def retention_cutoff(self, retention: float, at: float, monotonic: float) -> float:
        """Return the time before which no records are kept now, if they are kept for `retention` seconds."""
        step = at - monotonic - self._lead - self.stepped_by
        if step > MAX_STEP:
            self.stepped_by += step
            self.stepped_at = at
        as_it_was = min(at, monotonic + self._lead)
        return (as_it_was if at - self.stepped_at < retention else at) - retention
