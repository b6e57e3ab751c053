"""The lane of a destination: its queue, its attempts in flight, and what it can't take now. Pure: time is passed in.

offer ──▶ waiting (≤ 64 and ≤ 1 MiB, but one always) ──take──▶ in flight (≤ concurrency) ──▶ finished
  │           │ older than 1 s
  ▼           ▼
Spill     Spill        both with a due time when the lane should have capacity
"""

import heapq
import math
from collections import deque
from collections.abc import Container
from dataclasses import dataclass

from typing_extensions import override

from gateway.engine.delivery.breaker import FAILURES, MIN_CLOCK_STEP, Breaker
from gateway.engine.partition_tracker import PendingDelivery, Stage
from gateway.model import Attempt, SpillReason, result_label

MAX_WAITING = 64
MAX_WAITING_BYTES = 1 << 20
MAX_WAIT = 1.0
"""Maximum seconds in the queue; what waits longer is spilled, so that its offset doesn't hold the partition back."""
MAX_ATTEMPTS = 4096
"""Maximum attempts in flight in a worker: as many sockets, and some 40 MB."""
MAX_BYTES = 256 << 20
"""Bytes of records in memory above which nothing more is read."""
FAIR_SHARE = 32
"""A lane may take 1/32 of the free attempts and bytes: 124 attempts and 7 MiB if nothing else is in flight."""
INITIAL_SHARE = 512
"""A lane begins with 1/512 of the free attempts: 8 when idle, never less than 2."""
UNRESPONSIVE_SHARE = 4
"""Unresponsive destinations share a quarter of all attempts."""
UNRESPONSIVE_AFTER = 1.0
"""Seconds without a completed attempt after which a destination counts as unresponsive."""
PROVEN_FOR = 10.0
"""Seconds without an attempt after which a destination's proven concurrency is forgotten."""
BURST = 0.1
"""Seconds worth of a rate that may be sent at once; at least one request."""
FAST = 64 / 0.05
"""Deliveries a second from which waiting for a full queue is better than a spill: it is empty within 50 ms."""
EWMA_FASTER, EWMA_SLOWER = 0.3, 0.1
"""Weights of the smoothed attempt duration, when it falls and when it rises."""
STALL = 0.1
"""Seconds without a completed attempt after which a lane's learned pace isn't relied on any more."""
MAX_STALL_DELAY = 30.0
"""Maximum delay of a spill due to a stall (no attempt in flight is completing). A destination that hangs for longer
opens the breaker or lowers the learned pace."""
MAX_LEARNED_DELAY, MAX_RETURN_RATE = 300.0, 500
"""Maximum delay of a spill that follows from the learned pace alone; longer only if the backlog would otherwise return
faster than 500 a second."""
RETURN_BUCKET = 5.0
"""Width, in seconds, of the buckets in which scheduled returns are counted: the delay of the shortest tier."""
MIN_THROUGHPUT = 1.0
"""Lower bound of the pace that a lane assumes, in deliveries a second: bounds the delay of a spill."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spill:
    """A delivery that the lane can't take now, and when it should be able to."""

    pending: PendingDelivery
    reason: SpillReason
    due: float


class Budget:
    """What all lanes of a worker share: attempts, and the bytes of the deliveries in flight.

    Retries never take the half that is reserved for first attempts, unresponsive destinations share a quarter,
    and no lane takes more than a fraction of what is still free: the more destinations hang, the less the next one
    gets, so some capacity remains for healthy ones.
    """

    def __init__(self, *, attempts: int = MAX_ATTEMPTS, size: int = MAX_BYTES) -> None:
        self._attempts = attempts
        self._size = size
        self._in_flight = 0
        self._retries = 0
        self._unresponsive = 0
        self._in_flight_bytes = 0

    @property
    def initial_concurrency(self) -> int:
        """Maximum concurrent attempts of a destination that hasn't proven its concurrency yet."""
        return max(2, math.ceil((self._attempts - self._in_flight) / INITIAL_SHARE))

    def has_room(self, pending: PendingDelivery, *, attempts: int, size: int, is_unresponsive: bool) -> bool:
        """Return whether a lane with this many attempts and bytes in flight may also start this one."""
        if pending.is_retry and self._retries >= self._attempts // 2:
            return False
        if is_unresponsive and self._unresponsive >= self._attempts // UNRESPONSIVE_SHARE:
            return False
        if attempts == 0:
            return self._in_flight < self._attempts
        free = self._attempts - self._in_flight
        free_bytes = self._size - self._in_flight_bytes
        return attempts < free // FAIR_SHARE and size + pending.size <= max(MAX_WAITING_BYTES, free_bytes // FAIR_SHARE)

    def take(self, pending: PendingDelivery, *, is_unresponsive: bool) -> None:
        pending.is_unresponsive = is_unresponsive
        self._in_flight += 1
        self._retries += pending.is_retry
        self._unresponsive += is_unresponsive
        self._in_flight_bytes += pending.size

    def give_back(self, pending: PendingDelivery) -> None:
        self._in_flight -= 1
        self._retries -= pending.is_retry
        self._unresponsive -= pending.is_unresponsive
        self._in_flight_bytes -= pending.size


class ScheduledReturns:
    """The returns of spilled deliveries that are scheduled, until they are due.

    Nobody reports that one took place (its delivery may come back to another worker, end, or be spilled again), so they
    expire by time only.
    """

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self._ends: list[int] = []  # a heap of the keys of `_counts`, in units of RETURN_BUCKET
        self._count = 0

    def outstanding(self, now: float) -> int:
        """Return how many aren't due yet."""
        while self._ends and self._ends[0] * RETURN_BUCKET <= now:
            self._count -= self._counts.pop(heapq.heappop(self._ends))
        return self._count

    def reserve(self, due: float) -> None:
        end = math.ceil(due / RETURN_BUCKET)
        if end not in self._counts:
            self._counts[end] = 0
            heapq.heappush(self._ends, end)
        self._counts[end] += 1
        self._count += 1


class Lane:
    """One destination in one worker: its queue, its concurrency and its pace."""

    def __init__(self, name: str, budget: Budget, *, concurrency: int, rate: float | None) -> None:
        self.name = name
        self.breaker = Breaker()
        self.in_flight = 0
        self.is_closed = False
        """Whether it starts nothing more, as its attempts hold the end of the process up."""
        self.throttled_until = 0.0
        self._throttled_at = 0.0
        self._budget = budget
        self._waiting: deque[PendingDelivery] = deque()
        self._waiting_bytes = 0
        self._in_flight_bytes = 0
        self._seconds = 0.05  # of an attempt, smoothed; the initial value hardly matters
        self._tried_at = 0.0  # end of the last attempt
        self._last_progress_at = 0.0  # when an attempt last ended, or began with no other in flight
        self._proven_concurrency = 0  # concurrent attempts that it has responded to
        self._peak = 0  # most concurrent attempts since there was none
        self._got_no_response = False  # the last completed attempt got no response
        self.failed_by = ""  # the result of the last attempt that the breaker counted as a failure
        self._returns = ScheduledReturns()
        self._slow_until = 0.0
        self._tokens = 0.0
        self._tokens_at = -math.inf  # in ticks
        self.set_limits(concurrency=concurrency, rate=rate)

    @override
    def __repr__(self) -> str:
        return f"<Lane {self.name}: {len(self._waiting)} waiting, {self.in_flight} in flight, {self.breaker.state}>"

    def set_limits(self, *, concurrency: int, rate: float | None, share: float = 1.0) -> None:
        """Set the limits of the whole fleet; this worker applies its `share` of them (0 < share ≤ 1)."""
        self._concurrency = max(1, math.ceil(concurrency * share))
        self._rate = None if rate is None else rate * share
        self._burst = 1.0 if self._rate is None else max(1.0, self._rate * BURST)

    def reset(self) -> None:
        """Forget the failures and the throttle: the destination's definition has changed."""
        self.breaker = Breaker()
        self.throttled_until = 0.0
        self._got_no_response = False
        self._returns = ScheduledReturns()

    def kick(self) -> None:
        """End the holds that an operator may end: `Retry-After` and the open breaker.

        Rate and concurrency still apply. Spilled deliveries come back with the kick: none is scheduled any more.
        """
        self.breaker.kick()
        self.throttled_until = 0.0
        self._returns = ScheduledReturns()

    def current_hold(self, now: float) -> tuple[str, float] | None:
        """Return why it is sent nothing now ("retry_after" or "breaker_open"), and the earliest end of that hold."""
        if self._is_throttled(now):
            return "retry_after", self.throttled_until
        return ("breaker_open", self.breaker.retry_at(now)) if self.breaker.is_open else None

    def is_probe_due(self, now: float) -> bool:
        """Return whether the breaker is open and its time has elapsed, so that the next attempt is a probe."""
        return self.breaker.is_open and not self.breaker.holds_back(now) and not self._is_throttled(now)

    def untried_since(self, now: float) -> float | None:
        """Return the end of the last attempt if a probe is due, and there is no delivery for it; else None."""
        return self._tried_at if self.is_probe_due(now) and not self._waiting and not self.in_flight else None

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def offer(self, pending: PendingDelivery, now: float) -> Spill | None:
        """Queue a delivery, or return a spill that says when to offer it again."""
        if self._is_breaker_blocking(now):
            return Spill(
                pending=pending, reason=SpillReason.BREAKER_OPEN, due=self._return_time(self.breaker.retry_at(now), now)
            )
        if self._is_throttled(now):
            return Spill(
                pending=pending, reason=SpillReason.THROTTLED, due=self._return_time(self.throttled_until, now)
            )
        is_full = len(self._waiting) >= MAX_WAITING or self._waiting_bytes + pending.size > MAX_WAITING_BYTES
        if is_full and self._waiting and (pending.is_retry or self._pace(now) < FAST or now < self._slow_until):
            return Spill(pending=pending, reason=SpillReason.LANE_FULL, due=self._return_time(now, now))
        pending.stage_began_at = now
        pending.stage = Stage.WAITING
        self._waiting.append(pending)
        self._waiting_bytes += pending.size
        return None

    @property
    def needs_backpressure(self) -> bool:
        """Whether the queue is over its bounds. It accepted more since it drains fast; the reader has to wait briefly.

        This is false for a queue that is merely full: its next delivery is spilled, as nothing waits for a slow
        destination.
        """
        waiting = len(self._waiting)
        return waiting > MAX_WAITING or (waiting > 1 and self._waiting_bytes > MAX_WAITING_BYTES)

    def record_slow_drain(self, now: float) -> None:
        """Spill for a while, as the queue didn't drain as fast as the lane's pace suggested.

        With attempts in flight, that lasts until one of them ends: a hanging destination is waited for only once.
        """
        self._slow_until = math.inf if self.in_flight else now + MAX_WAIT

    def take(self, now: float, ticks: float) -> PendingDelivery | None:
        """Remove and return the delivery to attempt now, if one may start; `finished` or `cancelled` must follow.

        The rate is kept by `ticks`, this machine's monotonic clock. The log's may leap again and again, as a process
        reads records of before it was set back: each leap would count as a wait, after which a burst may be sent.
        """
        if self.is_closed or not self._waiting or self.in_flight >= self._concurrency or self._is_throttled(now):
            return None
        pending = self._waiting[0]
        if not self.in_flight and now - self._last_progress_at > PROVEN_FOR:
            self._proven_concurrency = 0
        is_unresponsive = self._got_no_response or (
            self.in_flight > 0 and now - self._last_progress_at > UNRESPONSIVE_AFTER
        )
        if self.in_flight >= self._proven_concurrency and self.in_flight >= self._budget.initial_concurrency:
            return None
        size = self._in_flight_bytes
        if not self._budget.has_room(pending, attempts=self.in_flight, size=size, is_unresponsive=is_unresponsive):
            return None
        if not self.breaker.allows(now, self.in_flight):
            return None
        if self._rate is not None and not self._take_token(ticks):
            return None
        self._waiting.popleft()
        self._waiting_bytes -= pending.size
        pending.stage = Stage.ATTEMPT
        pending.stage_began_at = now
        self._budget.take(pending, is_unresponsive=is_unresponsive)
        if not self.in_flight:
            self._last_progress_at = now
        self.in_flight += 1
        self._peak = max(self._peak, self.in_flight)
        self._in_flight_bytes += pending.size
        self.breaker.started(now)
        return pending

    def finished(self, pending: PendingDelivery, attempt: Attempt, now: float) -> None:
        """Release the attempt's capacity and learn from the result: breaker, throttle, pace."""
        peak = self._peak
        self._release(pending)
        self.breaker.record(attempt.result, now)
        if attempt.result in FAILURES:
            self.failed_by = result_label(attempt)
        self._tried_at = now
        self._got_no_response = attempt.status is None
        if self._got_no_response:
            self._proven_concurrency //= 2
        else:
            # As TCP's congestion window (RFC 5681, 7661): a response allows one more, if the window is in use.
            if self._proven_concurrency < self._concurrency:
                allowed = max(self._proven_concurrency, self._budget.initial_concurrency)
                if 2 * peak >= allowed:
                    self._proven_concurrency = min(self._concurrency, allowed + 1)
            # Waiting during an outage says nothing about the pace afterwards. A recovery is learned at once.
            change = attempt.seconds - self._seconds
            self._seconds += (EWMA_FASTER if change < 0 else EWMA_SLOWER) * change
        self._last_progress_at = now
        self._slow_until = min(self._slow_until, now + MAX_WAIT)
        if attempt.retry_after and not (self._is_throttled(now) and now + attempt.retry_after < self.throttled_until):
            self.throttled_until, self._throttled_at = now + attempt.retry_after, now

    def cancelled(self, pending: PendingDelivery, now: float) -> None:
        """Release the capacity of an attempt that ended without a result."""
        self._release(pending)
        self._slow_until = min(self._slow_until, now + MAX_WAIT)

    def pop_overdue(self, now: float) -> list[Spill]:
        """Remove and return what has waited too long, or can't start any more (breaker open, throttled).

        What waits in a closed lane is left to the next owner.
        """
        spills: list[Spill] = []
        while self._waiting and not self.is_closed:
            pending = self._waiting[0]
            if self._is_throttled(now):
                reason, earliest = SpillReason.THROTTLED, self.throttled_until
            elif self._is_breaker_blocking(now):
                reason, earliest = SpillReason.BREAKER_OPEN, self.breaker.retry_at(now)
            elif abs(now - pending.stage_began_at) > MAX_WAIT:  # or the clock was set back, and nobody knows how long
                reason, earliest = SpillReason.OVERDUE, now
            else:
                break
            spills.append(Spill(pending=pending, reason=reason, due=self._return_time(earliest, now, is_first=True)))
            self._drop_first()
        return spills

    def remove(self, withdrawn: Container[int]) -> None:
        """Remove deliveries from the queue, by their `id()`; those that aren't queued here are ignored."""
        kept = [pending for pending in self._waiting if id(pending) not in withdrawn]
        if len(kept) < len(self._waiting):
            self._waiting = deque(kept)
            self._waiting_bytes = sum(pending.size for pending in kept)

    def may_have_recovered(self, now: float) -> bool:
        """Return whether the destination may have recovered: an operator has kicked it, or a probe has just begun."""
        is_probed = self.in_flight > 0 and now - self._last_progress_at <= MAX_WAIT and not self.breaker.holds_back(now)
        return is_probed or self.breaker.is_kicked

    def schedule_return(self, now: float) -> float:
        """Schedule the return of a delivery that has to leave the queue now; return when it is due."""
        until = self.throttled_until if self._is_throttled(now) else now
        return self._return_time(max(until, self.breaker.retry_at(now)), now)

    def _is_throttled(self, now: float) -> bool:
        """Return whether a `Retry-After` is in force. If the clock was set back, its duration restarts now."""
        if self.throttled_until <= now:
            return False
        if now < self._throttled_at - MIN_CLOCK_STEP:
            self.throttled_until -= self._throttled_at - now
            self._throttled_at = now
        return True

    def _is_breaker_blocking(self, now: float) -> bool:
        """Return whether queueing is useless: the breaker is open, and its probe isn't due or gets no response."""
        is_probe_slow = self.breaker.is_open and self.in_flight > 0 and now - self._last_progress_at > STALL
        return is_probe_slow or self.breaker.holds_back(now)

    def _return_time(self, earliest: float, now: float, *, is_first: bool = False) -> float:
        # Each spilled delivery has a time of its own, so that a backlog of any size comes back at the destination's
        # pace, instead of all at once, again and again.
        # The number of scheduled returns counts, not their times: a faster destination gets its backlog faster.
        # A new delivery's comes after everything queued; that of the queue's head doesn't.
        ahead = self._returns.outstanding(now) + (0 if is_first else len(self._waiting))
        learned = ahead / self._learned_pace()
        # A learned pace counts for minutes only, or the backlog of a bad hour would take days after the recovery. A
        # configured `rate` is deliberate, so it may exceed the limit. Those past the limit are spread over its second
        # half, so they don't all return at once.
        longest = max(MAX_LEARNED_DELAY, ahead / MAX_RETURN_RATE, ahead / self._rate if self._rate else 0.0)
        if learned > longest:
            learned = longest / 2 + learned % (longest / 2)
        # A stall may end at any moment, so it adds at most MAX_STALL_DELAY.
        due = max(earliest, now) + max(learned, min(ahead / self._pace(now), MAX_STALL_DELAY))
        self._returns.reserve(due)
        return due

    def _pace(self, now: float) -> float:
        """Return the current pace in deliveries a second: lower than the learned one during a stall.

        A hanging probe says nothing about the pace.
        """
        still = now - self._last_progress_at if self.in_flight and not self.breaker.is_open else 0.0
        learned = self._learned_pace()
        return min(learned, max(MIN_THROUGHPUT, self._concurrency / still)) if still > STALL else learned

    def _learned_pace(self) -> float:
        """Return the pace in deliveries a second that follows from past responses and the configured rate."""
        pace = max(MIN_THROUGHPUT, self._concurrency / max(self._seconds, 0.001))
        return pace if self._rate is None else min(pace, self._rate)

    def _take_token(self, ticks: float) -> bool:
        assert self._rate is not None
        self._tokens = min(self._burst, self._tokens + (ticks - self._tokens_at) * self._rate)
        self._tokens_at = ticks
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    def _drop_first(self) -> None:
        pending = self._waiting.popleft()
        self._waiting_bytes -= pending.size

    def _release(self, pending: PendingDelivery) -> None:
        self._budget.give_back(pending)
        self.in_flight -= 1
        self._in_flight_bytes -= pending.size
        if not self.in_flight:
            self._peak = 0
