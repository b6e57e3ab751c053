"""Estimates the brokers' time."""

import math
import time
from collections.abc import Callable

from gateway.log.monotonic import MonotonicClock


class BrokerClock:
    """The brokers' clock: this machine's monotonic clock plus the lead over it that their timestamps show.

    A timestamp that arrives now was taken a moment ago, so each is a lower bound of the lead; the largest of the last
    half to whole minute is the estimate, so a step of their clock is forgotten after that. Until the first
    acknowledgement (`is_known` is false) it is this machine's clock, which may be wrong by any amount.
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

    def on_acknowledgement(self, at: float) -> None:
        """Learn from the timestamp of an acknowledgement that has just arrived."""
        if not self.is_known:
            self.is_known = True
            self._monotonic_clock.reset()  # earlier times were this machine's, not the brokers'
        self._learn(at)

    def on_record(self, at: float) -> None:
        """Learn from the timestamp of a record, which may be old."""
        if at - self._monotonic() > self._lead:
            if self.is_known:
                self._learn(at)
            else:
                self._lead = at - self._monotonic()

    def now(self) -> float:
        """Return the time. It never goes back, except at the first acknowledgement; see `MonotonicClock`."""
        ticks = self._monotonic()
        return self._monotonic_clock.advance(ticks + self._lead, ticks)

    def _learn(self, at: float) -> None:
        ticks = self._monotonic()
        lead = at - ticks
        if ticks > self._window_end:
            is_next = ticks <= self._window_end + self.WINDOW
            self._previous, self._best = self._best if is_next else -math.inf, lead
            self._window_end = self.WINDOW + (self._window_end if is_next else ticks)
        elif lead > self._best:
            self._best = lead
        self._lead = max(self._best, self._previous)
