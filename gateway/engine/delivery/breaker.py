"""Whether a destination is worth another attempt now. One breaker per destination and worker.

               5 failures in a row, or half of 20 in 30 s
      CLOSED ────────────────────────────────────────────▶ OPEN ◀──────────────┐
        ▲                                                   │ open time over   │ a probe fails:
        │ 64 successes                                      ▼                  │ twice the open time
    RECOVERING ◀──────────────────────────────────────── HALF_OPEN ────────────┘
        │               3 probes in a row succeed
        └─▶ OPEN, twice the open time, by the same rule as CLOSED

An operator's kick ends the open time, and the next one is the first again.

A failure is no response, a 5xx, or no token to send with the request. Every other status is a success here: a 429
throttles, and a 404 is about the event.
"""

import math
from dataclasses import dataclass
from enum import StrEnum
from typing import assert_never

from gateway.model import Result

FAILURES = frozenset(
    {Result.SERVER_ERROR, Result.TIMEOUT, Result.CONNECT, Result.DNS, Result.TLS, Result.TRANSPORT, Result.AUTH}
)  # Without EGRESS_REFUSED: it costs the destination nothing, so that holding back would protect nobody.

_BUCKETS = 6  # The window slides in steps of a sixth, in constant memory.
MIN_CLOCK_STEP = 1.0
"""Seconds by which the log's time has to go back to count as a step of the clock: below, it is only estimated anew."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BreakerPolicy:
    """When a breaker opens and how it closes. The defaults are the same for every destination."""

    consecutive_failures: int = 5
    """Failures in a row that open it."""
    failure_rate: float = 0.5
    """The share of failures in the window that opens it, if there were `minimum_results`."""
    minimum_results: int = 20
    window: float = 30.0
    """Seconds."""
    open_time: float = 5.0
    """Seconds until the first probe; they double with each probe that fails."""
    max_open_time: float = 300.0
    probes: int = 3
    """Probes in a row that have to succeed, one at a time."""
    slow_start: int = 64
    """The concurrency at which the slow start is over."""


class State(StrEnum):
    """What a breaker allows: everything, nothing, one probe at a time, or gradually more."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"
    RECOVERING = "recovering"


class Breaker:
    """A circuit breaker (M. Nygard, Release It!). Every `now` is seconds of one clock, which may step back.

    Attempts that were in flight when it opened are waited for before the first probe, so that what is recorded while
    it is half open is the probe's result, and a destination that has recovered isn't condemned by its past.
    """

    __slots__ = (
        "_bucket",
        "_consecutive_failures",
        "_down_since",
        "_failed",
        "_open_time",
        "_opened_at",
        "_ramp",
        "_successful_probes",
        "_total",
        "policy",
        "state",
    )

    def __init__(self, policy: BreakerPolicy = BreakerPolicy()) -> None:
        self.policy = policy
        self.state = State.CLOSED
        self._open_time = policy.open_time
        self._opened_at = 0.0
        self._down_since = 0.0
        self._successful_probes = 0
        self._ramp = 1
        self._consecutive_failures = 0
        self._bucket = 0
        self._total = [0] * _BUCKETS
        self._failed = [0] * _BUCKETS

    @property
    def is_open(self) -> bool:
        """Whether it allows nothing but probes."""
        return self.state in {State.OPEN, State.HALF_OPEN}

    def allows(self, now: float, in_flight: int) -> bool:
        """Return whether another attempt may start, in addition to `in_flight` others of this destination."""
        match self.state:
            case State.CLOSED:
                return True
            case State.OPEN:
                return in_flight == 0 and self._is_open_time_over(now)
            case State.HALF_OPEN:
                return in_flight == 0
            case State.RECOVERING:
                return in_flight < self._ramp
            case _:
                assert_never(self.state)

    def holds_back(self, now: float) -> bool:
        """Return whether not even a probe may start now. Otherwise it is worth waiting for a probe's result."""
        return self.state is State.OPEN and not self._is_open_time_over(now)

    def started(self, now: float) -> None:
        """Note that an attempt started, as `allows` permitted."""
        if self.state is State.OPEN and self._is_open_time_over(now):
            self.state = State.HALF_OPEN
            self._successful_probes = 0

    def record(self, result: Result, now: float) -> None:
        """Note the result of an attempt that was started."""
        is_failure = result in FAILURES
        match self.state:
            case State.OPEN:
                pass  # It started before the breaker opened.
            case State.HALF_OPEN if is_failure:
                self._open(now)
            case State.HALF_OPEN:
                self._successful_probes += 1
                if self._successful_probes >= self.policy.probes:
                    self.state = State.RECOVERING
                    self._ramp = 1
                    self._forget_results()
            case State.CLOSED | State.RECOVERING:
                self._count(now, is_failure=is_failure)
                if is_failure and self._should_open():
                    self._open(now)
                elif not is_failure and self.state is State.RECOVERING:
                    self._recover()
            case _:
                assert_never(self.state)

    def kick(self) -> None:
        """Allow a probe at once, and the next one 5 s after its failure: an operator believes that it is fixed.

        Attempts in flight are still waited for first. The outage so far no longer counts; the next failure begins one.
        """
        if self.state is not State.CLOSED:
            self._open_time = 0.0
            self._down_since = math.inf

    @property
    def is_kicked(self) -> bool:
        """Whether an operator has kicked it, and nothing has failed since."""
        return self.is_open and self._down_since == math.inf

    def retry_at(self, now: float) -> float:
        """Return the earliest time for which a delivery that isn't allowed now can be put off.

        It is the next probe's while open, one open time from now while a probe is in flight, else `now`.
        """
        match self.state:
            case State.OPEN if not self._is_open_time_over(now):
                return self._opened_at + self._open_time
            case State.OPEN | State.HALF_OPEN:
                return now + self.policy.open_time
            case State.CLOSED | State.RECOVERING:
                return now
            case _:
                assert_never(self.state)

    def down_for(self, now: float) -> float:
        """Return for how long it has been open: since the first failure, or the first after a kick."""
        return max(0.0, now - self._down_since) if self.is_open else 0.0

    def _is_open_time_over(self, now: float) -> bool:
        # A clock that stepped back ends the wait, rather than prolonging it by the step. A small step doesn't count:
        # the caller may have read the clock before the failure that opened this, and each extra probe doubles the wait.
        return not self._opened_at - MIN_CLOCK_STEP <= now < self._opened_at + self._open_time

    def _open(self, now: float) -> None:
        if not self.is_open or self.is_kicked:
            self._down_since = now
        if self.state is State.CLOSED:
            self._open_time = self.policy.open_time
        else:
            doubled = max(self.policy.open_time, 2 * self._open_time)  # a kick leaves nothing to double
            self._open_time = min(doubled, self.policy.max_open_time)
        self.state = State.OPEN
        self._opened_at = now

    def _recover(self) -> None:
        # One more per success doubles the concurrency with each round trip, as TCP's slow start does (RFC 5681 §3.1).
        self._ramp += 1
        if self._ramp >= self.policy.slow_start:
            self.state = State.CLOSED

    def _count(self, now: float, *, is_failure: bool) -> None:
        bucket = int(now * _BUCKETS // self.policy.window)
        steps = bucket - self._bucket
        if steps:
            # A step back, or one over the whole window, leaves nothing that is worth keeping.
            stale = range(self._bucket + 1, bucket + 1) if 0 < steps < _BUCKETS else range(_BUCKETS)
            for number in stale:
                self._total[number % _BUCKETS] = self._failed[number % _BUCKETS] = 0
            self._bucket = bucket
        self._total[bucket % _BUCKETS] += 1
        if is_failure:
            self._failed[bucket % _BUCKETS] += 1
            self._consecutive_failures += 1
        else:
            self._consecutive_failures = 0

    def _should_open(self) -> bool:
        if self._consecutive_failures >= self.policy.consecutive_failures:
            return True
        total = sum(self._total)
        return total >= self.policy.minimum_results and sum(self._failed) >= self.policy.failure_rate * total

    def _forget_results(self) -> None:
        self._consecutive_failures = 0
        self._total = [0] * _BUCKETS
        self._failed = [0] * _BUCKETS
