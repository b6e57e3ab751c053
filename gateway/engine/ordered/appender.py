"""Append the deliveries of ordered routes to their topics, in the order of each partition of events.

    event ──▶ match ──▶ queue of (its partition, partition of the ordered topic) ──a batch──▶ acknowledged ──▶ done
                              ▲                                                │
                              └───────── again, from the head on ◀─────────────┘ not acknowledged

Invariant: when a record is sent, each earlier record of its partition of events has been acknowledged, or will never
be sent, whatever rules it was read by. `DuplicateAppends` takes a record behind a later one for a duplicate, so one
that was overtaken would be lost.
"""

from collections import deque
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from gateway.engine.delivery.dispatcher import Dispatcher
from gateway.engine.partition_tracker import PendingDelivery
from gateway.engine.services import Services
from gateway.engine.successor_writer import FIRST_PAUSE, LONGEST_PAUSE
from gateway.log.base import NewRecord, Partition, partition_of
from gateway.log.records import Origin, encode_delivery, encode_origin, order_key_of
from gateway.log.topics import ORDERED_PARTITIONS
from gateway.model import DeadLettered, DeadReason, LogUnavailableError, RecordTooLargeError
from gateway.rules.conditions import written
from gateway.rules.precedence import deciders
from gateway.rules.rules import Rules
from gateway.telemetry.log_throttle import LogThrottle

BATCH_RECORDS, BATCH_BYTES = 200, 1 << 20
"""Maximum number of deliveries, and of their bytes, in one append."""
POLL_INTERVAL = 0.05
"""Seconds between checks whether a queue's first delivery may be appended."""


class OrderedRule(NamedTuple):
    """Which events go to the topics of an ordered route, and to which."""

    name: str
    sources: tuple[str, ...]
    destinations: tuple[str, ...]
    conditions: str
    debounce_key: str
    """By which key, if it is debounced."""


def ordered_rules(rules: Rules) -> frozenset[OrderedRule]:
    """Return the ordered routes of rules. One that isn't in another version takes something else there."""
    if all(route.order is None for route in rules.routes.values()):
        return frozenset()
    others = deciders(rules.routes.values())
    return frozenset(
        OrderedRule(
            name=route.name,
            sources=route.sources,
            destinations=route.destinations,
            conditions=f"{None if route.match is None else written(route.match)} {route.when and route.when.text} "
            f"{route.eligibility} {others.get(route.name)}",
            debounce_key="" if route.debounce is None else route.debounce.key.text,
        )
        for route in rules.routes.values()
        if route.order is not None
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Entry:
    """A delivery to append, from this position in its partition of events."""

    pending: PendingDelivery
    origin: Origin | None

    @property
    def may_be_appended(self) -> bool:
        """Whether no process can read an earlier record again and only then append it to the same topic.

        One in a newer format can, and so can one that was read by rules by which it went elsewhere, until it is
        committed. While the partition's owner isn't known, another may have delivered this by other rules.
        """
        tracker = self.pending.record.tracker
        if tracker.is_suspended:
            return False
        if self.origin is None:
            return True
        offset = self.origin.offset
        boundary = tracker.reload_boundaries.before(self.pending.delivery.route, offset)
        return tracker.progress.has_committed(boundary) and not any(newer < offset for newer in tracker.newer)

    @property
    def is_worth_waiting_for(self) -> bool:
        """Whether it will be appended, though nothing is started any more: what it waits for is in flight."""
        tracker = self.pending.record.tracker
        if self.origin is None or not tracker.is_writable:
            return False
        offset = self.origin.offset
        is_stopped = any(newer < offset for newer in tracker.newer)
        return not is_stopped and tracker.ends_below(
            tracker.reload_boundaries.before(self.pending.delivery.route, offset)
        )


@dataclass(slots=True, eq=False)
class _Queue:
    """The deliveries to append to one partition, in order."""

    partition: Partition
    entries: deque[_Entry] = field(default_factory=deque)
    is_busy: bool = False


class OrderedAppender:
    """All such queues of a process. An enqueued delivery ends by its append, as too large, or as another owner's."""

    def __init__(self, services: Services, dispatcher: Dispatcher) -> None:
        self._services = services
        self._dispatcher = dispatcher
        self._queues: dict[tuple[Partition | None, Partition], _Queue] = {}
        self._partition_counts: dict[str, int] = {}  # topic → the number of partitions that its keys are spread over
        self._unassigned: dict[str, deque[_Entry]] = {}
        self._log_throttle = LogThrottle()

    def enqueue(self, pending: PendingDelivery, origin: Origin | None) -> None:
        """Enqueue a delivery. Without an `origin` it isn't ordered any more, and waits for nothing."""
        pending.delivery = replace(pending.delivery, successor=pending.delivery.successor + 1)
        route = self._services.rules().routes.get(pending.delivery.route)
        if origin is not None and route is not None and route.debounce is not None:
            origin = origin._replace(debounce_key=route.debounce.by)
        topic = self._services.topics.ordered(pending.delivery.route, pending.delivery.destination)
        entry = _Entry(pending, origin)
        if topic in self._partition_counts:
            self._assign_queue(entry, topic)
            return
        is_asked = topic in self._unassigned
        self._unassigned.setdefault(topic, deque()).append(entry)
        if not is_asked:
            self._dispatcher.spawn(lambda: self._learn_partition_count(topic), "sequence-learn")

    async def _learn_partition_count(self, topic: str) -> None:
        """Find out how many partitions a topic has; then assign the entries that came meanwhile to queues."""
        entries = self._unassigned[topic]
        pause = FIRST_PAUSE
        while any(not entry.pending.record.tracker.is_reassigned for entry in entries):
            try:
                bounds, unreadable = await self._services.log.readable(topic)
                count = len(bounds) + len(unreadable)
                if count:
                    # Without partitions that were added later, or a key's next event could overtake.
                    self._partition_counts[topic] = min(count, ORDERED_PARTITIONS)
                    break
                error = f"expected a topic {topic}, got none"
            except LogUnavailableError as unavailable:
                error = str(unavailable)
            self._log_retry(topic, error)
            await self._services.sleep(pause)
            pause = min(LONGEST_PAUSE, 2 * pause)
        del self._unassigned[topic]
        for entry in entries:
            if topic in self._partition_counts:
                self._assign_queue(entry, topic)
            else:
                self._dispatcher.finish(entry.pending)

    def _assign_queue(self, entry: _Entry, topic: str) -> None:
        key = order_key_of(entry.pending.delivery).encode("utf-8", "surrogateescape")
        partition = Partition(topic, partition_of(key, self._partition_counts[topic]))
        key_of_queue = (None if entry.origin is None else entry.origin.partition, partition)
        queue = self._queues.get(key_of_queue)
        if queue is None:
            queue = self._queues[key_of_queue] = _Queue(partition)
        queue.entries.append(entry)
        if not queue.is_busy:
            queue.is_busy = True
            self._dispatcher.spawn(lambda: self._append(queue), "sequence-append")

    async def _append(self, queue: _Queue) -> None:
        """Append a queue's entries, until it is empty."""
        pause = FIRST_PAUSE
        limit = BATCH_RECORDS
        while True:
            batch = self._next_batch(queue, limit)
            if not batch:
                if not queue.entries or (self._dispatcher.is_draining and not queue.entries[0].is_worth_waiting_for):
                    queue.is_busy = False
                    return
                await self._services.sleep(POLL_INTERVAL)
                continue
            try:
                await self._services.log.append_in_order(queue.partition, [self._encode(entry) for entry in batch])
            except RecordTooLargeError as error:
                if len(batch) > 1:
                    limit = 1  # to find out which of them it is
                    continue
                queue.entries.popleft()
                self._dispatcher.end(batch[0].pending, DeadLettered(reason=DeadReason.TOO_LARGE, detail=str(error)))
            except LogUnavailableError as error:
                self._log_retry(queue.partition.topic, str(error))
                await self._services.sleep(pause)
                pause = min(LONGEST_PAUSE, 2 * pause)
                continue
            else:
                for entry in batch:
                    queue.entries.popleft()
                    self._dispatcher.finish(entry.pending)
            pause, limit = FIRST_PAUSE, BATCH_RECORDS

    def _log_retry(self, topic: str, error: str) -> None:
        if count := self._log_throttle.count(topic, self._services.log.now()):
            self._services.logger.warning("append_retried", topic=topic, count=count, error=error)

    def _next_batch(self, queue: _Queue, limit: int) -> list[_Entry]:
        """Return the first entries that may be appended; forget those that another owner reads again."""
        entries = queue.entries
        while entries and entries[0].pending.record.tracker.is_reassigned:
            self._dispatcher.finish(entries.popleft().pending)
        batch: list[_Entry] = []
        size = 0
        for entry in entries:
            size += entry.pending.size
            is_full = len(batch) == limit or (batch and size > BATCH_BYTES)
            if is_full or entry.pending.record.tracker.is_reassigned or not entry.may_be_appended:
                break
            batch.append(entry)
        return batch

    def _encode(self, entry: _Entry) -> NewRecord:
        delivery, event = entry.pending.delivery, entry.pending.delivery.event
        headers = encode_delivery(delivery, entry.pending.metadata, at=self._services.log.now())
        if entry.origin is not None:
            headers.append(encode_origin(entry.origin))
        return NewRecord(order_key_of(delivery).encode("utf-8", "surrogateescape"), event.body, headers)
