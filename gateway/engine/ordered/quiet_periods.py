"""The quiet periods of a debounced route: which delivery supersedes the last one of its key, and which keys wait.

    events of a key   1   2 3      4          5
                      ├──────▶|    |          |      1 is superseded by 2, 2 by 3, each before its quiet period is over
                            ├──────▶ 3        |      3 is superseded by 4
                                   ├──────▶ 4 |      4 is delivered, and so is 5

That depends on when the records were appended alone: the next owner of a partition finds the same. It reads what is in
the log late, and so it lets what it is given wait for `CATCH_UP` at least: the next record may follow at once.

Pure: nothing here reads a clock or writes a record.
"""

import heapq
from collections.abc import Collection, Iterator
from dataclasses import replace
from enum import Enum, auto

from gateway.engine.delivery.breaker import MIN_CLOCK_STEP
from gateway.engine.partition_tracker import Burst, PendingDelivery, Stage
from gateway.log.base import Partition
from gateway.log.records import Origin
from gateway.rules.debounce import Debounce

CATCH_UP = 1.0
"""Seconds that a delivery waits at least after its record was read."""
RELEASED = 8
"""The share of the waiting keys, one in this many, that goes out early a few times a second while memory is full."""
FEW = 100
"""Entries that may be left over, whatever waits."""
Key = tuple[Partition, str]


class Relation(Enum):
    """What a delivery does to the last one of its key, in the same burst."""

    SUPERSEDES = auto()
    IS_SUPERSEDED = auto()
    """It came late: the last one is for a newer event."""
    FOLLOWS = auto()
    """Neither: both are delivered."""


def add_to_burst(
    pending: PendingDelivery, origin: Origin | None, last: PendingDelivery | None, debounce: Debounce
) -> Relation:
    """Set until when a delivery waits, that was read from `origin`, and return what it does to the last one of its key.

    `last` is None if there is none that can still be superseded. Nor can one be that was attempted or kicked, or that
    has no key: its queue is one of an identity; or whose key may be by another expression, as of any without an origin.
    What was appended before its route was debounced doesn't wait, since the key of its queue is another one.
    """
    if pending.delivery.burst is None:
        return Relation.FOLLOWS
    appended_at, event_partition = _appended_at(pending), None if origin is None else origin.partition
    burst = Burst(appended_at, event_partition, "" if origin is None else origin.debounce_key)
    relation = Relation.FOLLOWS
    if pending.delivery.burst and last is not None and last.burst is not None and _waits(last):
        before = last.burst
        is_alike = before.debounce_key == burst.debounce_key != ""
        if is_alike and appended_at < debounce.ends_at(_appended_at(last), before.began_at):
            # Between partitions of events, routers may be late by seconds; the ingress's clocks are not.
            is_same = event_partition is not None and event_partition == before.event_partition
            is_newer = is_same or pending.delivery.event.received_at >= last.delivery.event.received_at
            relation = Relation.SUPERSEDES if is_newer else Relation.IS_SUPERSEDED
            burst = burst._replace(began_at=before.began_at)
    pending.burst = burst
    set_due(pending, debounce)
    return relation


def set_due(pending: PendingDelivery, debounce: Debounce) -> None:
    """Set until when a delivery of a burst waits, also if `quiet` has changed since."""
    assert pending.burst is not None
    ends_at = debounce.ends_at(_appended_at(pending), pending.burst.began_at)
    due = max(ends_at, pending.record.taken_at + min(CATCH_UP, debounce.quiet))
    pending.delivery = replace(pending.delivery, due=due, delayed_until=ends_at)


def _waits(last: PendingDelivery) -> bool:
    return last.stage is Stage.WAITING and last.outcome is None and not last.delivery.attempts


def _appended_at(pending: PendingDelivery) -> float:
    """Return when a record was appended; not later than it was read, by whatever clock."""
    return min(pending.record.appended_at, pending.record.taken_at)


class QuietKeys:
    """The keys whose first delivery waits for the end of its quiet period."""

    def __init__(self) -> None:
        self._waiting: dict[Key, PendingDelivery] = {}
        # Invariant: one entry of each waiting key has its time in `_armed`, which isn't after its delivery is due.
        # Others are left over: a burst would else rebuild the heap with each event.
        self._heap: list[tuple[float, int, Key]] = []
        self._armed: dict[Key, float] = {}
        self._count = 0
        self._now = 0.0

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def last_until(self) -> float | None:
        """When the last of them is due; None without any."""
        return max([pending.delivery.due for pending in self._waiting.values()], default=None)

    def add(self, key: Key, pending: PendingDelivery) -> None:
        """Let a key wait until its first delivery is due."""
        self._waiting[key] = pending
        self._arm(key, pending.delivery.due)

    def _arm(self, key: Key, until: float) -> None:
        if key not in self._armed or until < self._armed[key]:
            self._armed[key] = until
            self._count += 1
            heapq.heappush(self._heap, (until, self._count, key))
            if len(self._heap) > 2 * len(self._waiting) + FEW:
                self._rebuild()

    def _rebuild(self) -> None:
        self._armed = {key: pending.delivery.due for key, pending in self._waiting.items()}
        self._heap = [(until, number, key) for number, (key, until) in enumerate(self._armed.items())]
        heapq.heapify(self._heap)

    def has(self, key: Key, pending: PendingDelivery) -> bool:
        """Return whether a key waits, with this as its first delivery."""
        return self._waiting.get(key) is pending

    def remove(self, key: Key, pending: PendingDelivery) -> bool:
        """Let a key wait no longer; return whether it did, with this as its first delivery."""
        is_waiting = self.has(key, pending)
        if is_waiting:
            del self._waiting[key]
        return is_waiting

    def reschedule(self, debounce: Debounce | None) -> list[PendingDelivery]:
        """Let all wait as new rules say; return those that these don't let wait."""
        if debounce is None:
            return list(self._waiting.values())
        for key, pending in self._waiting.items():
            set_due(pending, debounce)
            self._arm(key, pending.delivery.due)
        return []

    def forget(self, partitions: Collection[Partition]) -> None:
        """Forget the keys of partitions that are no longer ours."""
        self._waiting = {key: pending for key, pending in self._waiting.items() if key[0] not in partitions}

    def pop_due(self, now: float) -> Iterator[PendingDelivery]:
        """Remove and yield what is due; if the clock was set back, everything: until when it waits isn't known."""
        back, self._now = self._now - now, now
        if back > MIN_CLOCK_STEP:
            waiting, self._waiting = self._waiting, {}
            yield from waiting.values()
        while self._heap and self._heap[0][0] <= now:
            until, _, key = heapq.heappop(self._heap)
            if self._armed.get(key) != until:
                continue
            del self._armed[key]
            pending = self._waiting.get(key)
            if pending is None:
                continue
            if pending.delivery.due > now:
                self._arm(key, pending.delivery.due)
            else:
                yield self._waiting.pop(key)

    def pop_early(self, partitions: Collection[Partition]) -> list[PendingDelivery]:
        """Remove and return some of those that are due first in these partitions, which are full."""
        keys = [key for key in self._waiting if key[0] in partitions] if partitions else []
        found = heapq.nsmallest(-(-len(keys) // RELEASED), keys, key=lambda key: self._waiting[key].delivery.due)
        return [self._waiting.pop(key) for key in found]
