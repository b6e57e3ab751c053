"""The brokers' time, as far as it can be told from here."""

import math
import time
from collections.abc import Callable


class BrokerClock:
    """The brokers' clock: this machine's monotonic clock and the lead over it that their timestamps show.

    A timestamp that arrives now was taken a moment ago, so each shows at least how far their clock is; the largest of
    the last half to whole minute is the estimate, and a step of their clock is forgotten after that.
    """

    WINDOW = 30.0

    def __init__(
        self, *, local: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._monotonic = monotonic
        ticks = monotonic()
        self._lead = local() - ticks
        self._best = self._previous = -math.inf
        self._window_end = ticks + self.WINDOW
        self._told, self._told_at = 0.0, ticks

    def heard(self, at: float) -> None:
        """Take in the time of an acknowledgement that has just arrived."""
        ticks = self._monotonic()
        lead = at - ticks
        if ticks > self._window_end:
            self._window_end = ticks + self.WINDOW
            self._previous, self._best = self._best, lead
        elif lead > self._best:
            self._best = lead
        self._lead = max(self._best, self._previous)

    def seen(self, at: float) -> None:
        """Take in the time of a record, which may be old."""
        if at - self._monotonic() > self._lead:
            self.heard(at)

    def now(self) -> float:
        """Never goes back: where it was ahead it goes on at half speed until it isn't, so that waiting still ends."""
        ticks = self._monotonic()
        estimate = ticks + self._lead
        floor = self._told + (ticks - self._told_at) / 2
        self._told, self._told_at = max(estimate, floor), ticks
        return self._told
