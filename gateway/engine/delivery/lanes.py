"""The lane of a destination: what waits for it, what is under way, and what it can't take now. Pure: time is handed in.

offer ──▶ waiting (≤ 64 and ≤ 1 MiB, but one always) ──take──▶ in flight (≤ concurrency) ──▶ finished
  │           │ older than 1 s
  ▼           ▼
Spill     Spill        both with a due time at which the lane can take it
"""

import heapq
import math
from collections import deque
from collections.abc import Container
from dataclasses import dataclass

from typing_extensions import override

from gateway.engine.delivery.breaker import FAILURES, LEEWAY, Breaker
from gateway.engine.partition_tracker import Item, Stage
from gateway.model import Attempt, SpillReason, result_label

MAX_WAITING = 64
MAX_WAITING_BYTES = 1 << 20
MAX_WAIT = 1.0
"""Seconds in the queue; what waits longer is spilled, so that its offset doesn't hold the partition back."""
MAX_ATTEMPTS = 4096
"""Attempts under way in a worker: as many sockets, and some 40 MB."""
MAX_BYTES = 256 << 20
"""Records in memory; above it, nothing more is read."""
FAIR_SHARE = 32
"""A lane may have a 32nd of the attempts and bytes that are free: 124 attempts and 7 MiB where nothing else is."""
START_SHARE = 512
"""A lane that hasn't shown how many attempts it answers at once begins with a 512th of what is free, 8 to 2."""
DOUBTFUL_SHARE = 4
"""Destinations that have stopped answering have a quarter of all attempts between them."""
DOUBT = 1.0
"""Seconds without the end of an attempt after which it is doubtful whether a destination still answers."""
SHOWN_FOR = 10.0
"""Seconds without an attempt after which what a destination has shown is forgotten."""
BURST = 0.1
"""Seconds of a rate that may be used at once; at least one request."""
FAST = 64 / 0.05
"""Deliveries a second from which a full queue is worth waiting for: empty in 50 ms, long before a spill is back."""
FASTER, SLOWER = 0.3, 0.1
"""How much one answer counts for what a lane believes of the time that the next takes."""
STALL = 0.1
"""Seconds without the end of an attempt after which a lane's past pace isn't believed any more."""
LONGEST_STALL = 30.0
"""Seconds that a spill is put off at most since nothing ends; what hangs opens the breaker, or is learned as slow."""
LONGEST_GUESS, RETURNS = 300.0, 500
"""Seconds that a spill is put off at most by what is believed of a pace; of more than so many a second, longer."""
PLACES_AT_ONCE = 5.0
"""Seconds of which the promised places are counted together: as many as the shortest tier keeps a delivery."""
MIN_THROUGHPUT = 1.0
"""Deliveries a second a lane is believed to manage, however slow it looks: bounds how far off a spill is due."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Spill:
    """A delivery that the lane can't take now, and when it can."""

    item: Item
    reason: SpillReason
    due: float


class Budget:
    """What all lanes of a worker share: attempts, and the bytes that are under way in them.

    Retries never take the half that is kept for first attempts, destinations that don't answer have a quarter between
    them, and no lane takes more than a part of what is still free: the more hang, the less the next one gets, and
    something is left for those that don't.
    """

    def __init__(self, *, attempts: int = MAX_ATTEMPTS, size: int = MAX_BYTES) -> None:
        self._attempts = attempts
        self._size = size
        self._under_way = 0
        self._retries = 0
        self._doubtful = 0
        self._bytes_under_way = 0

    @property
    def start(self) -> int:
        """How many attempts at once a destination may have that hasn't shown what it can take."""
        return max(2, math.ceil((self._attempts - self._under_way) / START_SHARE))

    def has_room(self, item: Item, *, attempts: int, size: int, is_doubtful: bool) -> bool:
        """Return whether a lane with so many attempts and bytes under way may start this one, too."""
        if item.is_retry and self._retries >= self._attempts // 2:
            return False
        if is_doubtful and self._doubtful >= self._attempts // DOUBTFUL_SHARE:
            return False
        if attempts == 0:
            return self._under_way < self._attempts
        free = self._attempts - self._under_way
        free_bytes = self._size - self._bytes_under_way
        return attempts < free // FAIR_SHARE and size + item.size <= max(MAX_WAITING_BYTES, free_bytes // FAIR_SHARE)

    def take(self, item: Item, *, is_doubtful: bool) -> None:
        item.is_doubtful = is_doubtful
        self._under_way += 1
        self._retries += item.is_retry
        self._doubtful += is_doubtful
        self._bytes_under_way += item.size

    def give_back(self, item: Item) -> None:
        self._under_way -= 1
        self._retries -= item.is_retry
        self._doubtful -= item.is_doubtful
        self._bytes_under_way -= item.size


class Slots:
    """The places in the future that spills were promised, until their time is over.

    A spill may come back to another worker, end on its way, or be promised another slot: it tells nobody, so only time
    can count it off.
    """

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self._ends: list[int] = []  # a heap of the keys of `_counts`, in units of PLACES_AT_ONCE
        self._count = 0

    def still_ahead(self, now: float) -> int:
        """Return how many are still to come."""
        while self._ends and self._ends[0] * PLACES_AT_ONCE <= now:
            self._count -= self._counts.pop(heapq.heappop(self._ends))
        return self._count

    def promise(self, due: float) -> None:
        end = math.ceil(due / PLACES_AT_ONCE)
        if end not in self._counts:
            self._counts[end] = 0
            heapq.heappush(self._ends, end)
        self._counts[end] += 1
        self._count += 1


class Lane:
    """One destination in one worker. `share` is this worker's part of the fleet's limits (0 < share ≤ 1)."""

    def __init__(self, name: str, budget: Budget, *, concurrency: int, rate: float | None) -> None:
        self.name = name
        self.breaker = Breaker()
        self.in_flight = 0
        self.throttled_until = 0.0
        self._throttled_at = 0.0
        self._budget = budget
        self._waiting: deque[Item] = deque()
        self._waiting_bytes = 0
        self._in_flight_bytes = 0
        self._seconds = 0.05  # of an attempt, smoothed; the first guess hardly matters
        self._moved_at = 0.0  # when an attempt last ended, or began with no other under way
        self._shown = 0  # attempts at once that it has answered
        self._peak = 0  # attempts at once since there was none
        self._has_failed = False  # the last attempt that ended had no answer
        self.failed_by = ""  # what the last attempt got that the breaker counts as a failure
        self._slots = Slots()
        self._slow_until = 0.0
        self._tokens = 0.0
        self._tokens_at = 0.0
        self.limit(concurrency=concurrency, rate=rate)

    @override
    def __repr__(self) -> str:
        return f"<Lane {self.name}: {len(self._waiting)} waiting, {self.in_flight} in flight, {self.breaker.state}>"

    def limit(self, *, concurrency: int, rate: float | None, share: float = 1.0) -> None:
        """Set the limits, those of the whole fleet, of which this worker has its share."""
        self._concurrency = max(1, math.ceil(concurrency * share))
        self._rate = None if rate is None else rate * share
        self._burst = 1.0 if self._rate is None else max(1.0, self._rate * BURST)

    def start_afresh(self) -> None:
        """Forget the failures and the throttle: the destination isn't what it was."""
        self.breaker = Breaker()
        self.throttled_until = 0.0
        self._has_failed = False
        self._slots = Slots()

    def kick(self) -> None:
        """End what an operator may end: the wait that the destination has asked for, and that of the breaker.

        Its rate and concurrency hold. What was put off comes back with the kick, so that its places are free.
        """
        self.breaker.kick()
        self.throttled_until = 0.0
        self._slots = Slots()

    def held(self, now: float) -> tuple[str, float] | None:
        """Return why it takes nothing now ("retry_after" or "breaker_open"), and until when at least."""
        if self._is_throttled(now):
            return "retry_after", self.throttled_until
        return ("breaker_open", self.breaker.retry_at(now)) if self.breaker.is_open else None

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def offer(self, item: Item, now: float) -> Spill | None:
        """Let a delivery wait, or say when it can come again."""
        if self._is_shut(now):
            return Spill(item=item, reason=SpillReason.BREAKER_OPEN, due=self._slot(self.breaker.retry_at(now), now))
        if self._is_throttled(now):
            return Spill(item=item, reason=SpillReason.THROTTLED, due=self._slot(self.throttled_until, now))
        is_full = len(self._waiting) >= MAX_WAITING or self._waiting_bytes + item.size > MAX_WAITING_BYTES
        if is_full and self._waiting and (item.is_retry or self._pace(now) < FAST or now < self._slow_until):
            return Spill(item=item, reason=SpillReason.LANE_FULL, due=self._slot(now, now))
        item.since = now
        item.stage = Stage.WAITING
        self._waiting.append(item)
        self._waiting_bytes += item.size
        return None

    @property
    def is_pressed(self) -> bool:
        """The queue is over its bounds: deliveries were let in all the same since it empties fast. Wait, briefly.

        One that is merely full isn't: its next delivery is spilled, and nobody waits for a slow destination.
        """
        waiting = len(self._waiting)
        return waiting > MAX_WAITING or (waiting > 1 and self._waiting_bytes > MAX_WAITING_BYTES)

    def was_slow(self, now: float) -> None:
        """Note that the queue did not empty as fast as the lane's pace promised; spill for a while.

        With attempts under way that is until one of them ends: a destination that hangs is waited for once.
        """
        self._slow_until = math.inf if self.in_flight else now + MAX_WAIT

    def take(self, now: float) -> Item | None:
        """Return the delivery whose attempt starts now, if one may; `finished` or `cancelled` has to follow."""
        if not self._waiting or self.in_flight >= self._concurrency or self._is_throttled(now):
            return None
        item = self._waiting[0]
        if not self.in_flight and now - self._moved_at > SHOWN_FOR:
            self._shown = 0
        is_doubtful = self._has_failed or (self.in_flight > 0 and now - self._moved_at > DOUBT)
        if self.in_flight >= self._shown and self.in_flight >= self._budget.start:
            return None
        size = self._in_flight_bytes
        if not self._budget.has_room(item, attempts=self.in_flight, size=size, is_doubtful=is_doubtful):
            return None
        if not self.breaker.allows(now, self.in_flight):
            return None
        if self._rate is not None and not self._take_token(now):
            return None
        self._waiting.popleft()
        self._waiting_bytes -= item.size
        item.stage = Stage.ATTEMPT
        item.since = now
        self._budget.take(item, is_doubtful=is_doubtful)
        if not self.in_flight:
            self._moved_at = now
        self.in_flight += 1
        self._peak = max(self._peak, self.in_flight)
        self._in_flight_bytes += item.size
        self.breaker.started(now)
        return item

    def finished(self, item: Item, attempt: Attempt, now: float) -> None:
        """Give the slot back and learn from the result: breaker, throttle, pace."""
        peak = self._peak
        self._release(item)
        self.breaker.record(attempt.result, now)
        if attempt.result in FAILURES:
            self.failed_by = result_label(attempt)
        self._has_failed = attempt.status is None
        if self._has_failed:
            self._shown //= 2
        else:
            # As TCP's congestion window (RFC 5681, 7661): an answer allows one more, if what is allowed is made use of.
            if self._shown < self._concurrency:
                allowed = max(self._shown, self._budget.start)
                if 2 * peak >= allowed:
                    self._shown = min(self._concurrency, allowed + 1)
            # How long an outage makes us wait says nothing of the pace after it. That it is over is learned at once.
            change = attempt.seconds - self._seconds
            self._seconds += (FASTER if change < 0 else SLOWER) * change
        self._moved_at = now
        self._slow_until = min(self._slow_until, now + MAX_WAIT)
        if attempt.retry_after and not (self._is_throttled(now) and now + attempt.retry_after < self.throttled_until):
            self.throttled_until, self._throttled_at = now + attempt.retry_after, now

    def cancelled(self, item: Item, now: float) -> None:
        """Give the slot back of an attempt that ended without a result."""
        self._release(item)
        self._slow_until = min(self._slow_until, now + MAX_WAIT)

    def overdue(self, now: float) -> list[Spill]:
        """Take out what has waited too long, or what can't start any more (breaker open, throttled)."""
        spills: list[Spill] = []
        while self._waiting:
            item = self._waiting[0]
            if self._is_throttled(now):
                reason, earliest = SpillReason.THROTTLED, self.throttled_until
            elif self._is_shut(now):
                reason, earliest = SpillReason.BREAKER_OPEN, self.breaker.retry_at(now)
            elif now - item.since > MAX_WAIT:
                reason, earliest = SpillReason.OVERDUE, now
            else:
                break
            spills.append(Spill(item=item, reason=reason, due=self._slot(earliest, now, is_first=True)))
            self._drop_first()
        return spills

    def remove(self, gone: Container[int]) -> None:
        """Take deliveries out of the queue without a result, by their `id()`; what isn't waiting here is ignored."""
        kept = [item for item in self._waiting if id(item) not in gone]
        if len(kept) < len(self._waiting):
            self._waiting = deque(kept)
            self._waiting_bytes = sum(item.size for item in kept)

    def may_be_well(self, now: float) -> bool:
        """Return whether its breaker is open and it may be well: an operator says so, or a probe has just begun."""
        is_probed = self.in_flight > 0 and now - self._moved_at <= MAX_WAIT and not self.breaker.holds_back(now)
        return is_probed or self.breaker.is_kicked

    def next_slot(self, now: float) -> float:
        """Return when the lane can take a delivery that has to leave its queue now."""
        until = self.throttled_until if self._is_throttled(now) else now
        return self._slot(max(until, self.breaker.retry_at(now)), now)

    def _is_throttled(self, now: float) -> bool:
        """Return whether the destination has asked for silence. Where the clock has gone back, that counts from now."""
        if self.throttled_until <= now:
            return False
        if now < self._throttled_at - LEEWAY:
            self.throttled_until -= self._throttled_at - now
            self._throttled_at = now
        return True

    def _is_shut(self, now: float) -> bool:
        """Return whether waiting is vain: the breaker is open, and its probe isn't due or isn't answered at once."""
        is_probe_slow = self.breaker.is_open and self.in_flight > 0 and now - self._moved_at > STALL
        return is_probe_slow or self.breaker.holds_back(now)

    def _slot(self, earliest: float, now: float, *, is_first: bool = False) -> float:
        # Each spill is promised its own slot in the future, so that a backlog of any size comes back at the pace of
        # the destination instead of all at once, again and again.
        # The number of those before it counts, not their times: once the destination is faster, its backlog is, too.
        # What waits is before one that comes, and not before the first of the queue.
        ahead = self._slots.still_ahead(now) + (0 if is_first else len(self._waiting))
        learned = ahead / self._learned_pace()
        # A pace is believed for minutes only, or a bad hour's backlog would take days, though all is well again. A rate
        # is meant. Who would come later comes back before that, not all at once.
        longest = max(LONGEST_GUESS, ahead / RETURNS, ahead / self._rate if self._rate else 0.0)
        if learned > longest:
            learned = longest / 2 + learned % (longest / 2)
        # That nothing ends may be over in a moment, whatever it says of the pace.
        due = max(earliest, now) + max(learned, min(ahead / self._pace(now), LONGEST_STALL))
        self._slots.promise(due)
        return due

    def _pace(self, now: float) -> float:
        """Return the deliveries a second that it manages: fewer as long as nothing of what is under way ends.

        A probe that hangs says nothing of it.
        """
        still = now - self._moved_at if self.in_flight and not self.breaker.is_open else 0.0
        learned = self._learned_pace()
        return min(learned, max(MIN_THROUGHPUT, self._concurrency / still)) if still > STALL else learned

    def _learned_pace(self) -> float:
        """Return the deliveries a second that it manages, by its answers and its rate."""
        pace = max(MIN_THROUGHPUT, self._concurrency / max(self._seconds, 0.001))
        return pace if self._rate is None else min(pace, self._rate)

    def _take_token(self, now: float) -> bool:
        assert self._rate is not None
        self._tokens = min(self._burst, self._tokens + max(0.0, now - self._tokens_at) * self._rate)
        self._tokens_at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    def _drop_first(self) -> None:
        item = self._waiting.popleft()
        self._waiting_bytes -= item.size

    def _release(self, item: Item) -> None:
        self._budget.give_back(item)
        self.in_flight -= 1
        self._in_flight_bytes -= item.size
        if not self.in_flight:
            self._peak = 0
