"""The brokers' time, as far as it can be told from here."""

import math
import time
from collections.abc import Callable

from gateway.log.monotonic import MonotonicClock


class BrokerClock:
    """The brokers' clock: this machine's monotonic clock and the lead over it that their timestamps show.

    A timestamp that arrives now was taken a moment ago, so each shows at least how far their clock is; the largest of
    the last half to whole minute is the estimate, and a step of their clock is forgotten after that. Until the first
    acknowledgement it is this machine's clock, which may be wrong by any amount: `is_known` tells.
    """

    WINDOW = 30.0

    def __init__(
        self, *, local: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self.is_known = False
        self._monotonic = monotonic
        ticks = monotonic()
        self._lead = local() - ticks
        self._best = self._previous = -math.inf
        self._window_end = ticks + self.WINDOW
        self._monotonic_clock = MonotonicClock()

    def heard(self, at: float) -> None:
        """Take in the time of an acknowledgement that has just arrived."""
        if not self.is_known:
            self.is_known = True
            self._monotonic_clock.reset()  # what this machine's clock has told says nothing of theirs
        self._learn(at)

    def seen(self, at: float) -> None:
        """Take in the time of a record, which may be old."""
        if at - self._monotonic() > self._lead:
            if self.is_known:
                self._learn(at)
            else:
                self._lead = at - self._monotonic()

    def now(self) -> float:
        """Never goes back, but with the first acknowledgement; see `MonotonicClock`."""
        ticks = self._monotonic()
        return self._monotonic_clock.advance(ticks + self._lead, ticks)

    def _learn(self, at: float) -> None:
        ticks = self._monotonic()
        lead = at - ticks
        if ticks > self._window_end:
            self._window_end = ticks + self.WINDOW
            self._previous, self._best = self._best, lead
        elif lead > self._best:
            self._best = lead
        self._lead = max(self._best, self._previous)
