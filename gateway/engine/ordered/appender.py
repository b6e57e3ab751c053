"""Append the deliveries of ordered routes to their topics, each partition of events in its order.

    event ──▶ match ──▶ queue of (its partition, partition of the ordered topic) ──a batch──▶ acknowledged ──▶ done
                              ▲                                                │
                              └───────── again, from the first on ◀────────────┘ not acknowledged

Invariant: when a record is sent, what came before it in its partition of events is acknowledged, or has been decided
otherwise for good, also what was read by other rules. `Seen` takes for a copy whatever comes behind a later one: what
is records_deleted is lost.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from gateway.engine.delivery.dispatcher import Dispatcher
from gateway.engine.partition_tracker import Item, Pending
from gateway.engine.services import Services
from gateway.engine.successor_writer import FIRST_PAUSE, LONGEST_PAUSE
from gateway.log.base import NewRecord, Partition, partition_of
from gateway.log.records import Origin, encode_delivery, encode_origin, order_key
from gateway.log.topics import ORDERED_PARTITIONS
from gateway.model import DeadLettered, DeadReason, LogUnavailableError, RecordTooLargeError
from gateway.telemetry.log_throttle import LogThrottle

BATCH_RECORDS, BATCH_BYTES = 200, 1 << 20
"""Of deliveries that are appended at once."""
POLL_INTERVAL = 0.05
"""Seconds between looks whether what has to be stored before is."""


@dataclass(slots=True, eq=False, kw_only=True)
class _Entry:
    """A delivery on its way. `after` are records of its partition of events that have to be done before."""

    item: Item
    origin: Origin | None
    after: Sequence[Pending]

    @property
    def may_go(self) -> bool:
        return all(pending.is_settled for pending in self.after)

    @property
    def may_come_to_go(self) -> bool:
        """Whether that is only a matter of time: a record that is left to a newer version isn't settled here."""
        return all(pending.is_settled or pending.left for pending in self.after)


@dataclass(slots=True, eq=False)
class _Queue:
    """What waits for its append to one partition, in its order."""

    partition: Partition
    entries: deque[_Entry] = field(default_factory=deque)
    is_busy: bool = False


class Sequences:
    """All such queues of a process. What is put in ends by its append, or as too large, or is another owner's."""

    def __init__(self, services: Services, dispatch: Dispatcher) -> None:
        self._services = services
        self._dispatch = dispatch
        self._queues: dict[tuple[Partition | None, Partition], _Queue] = {}
        self._spread: dict[str, int] = {}  # topic → over how many partitions its keys are spread
        self._unplaced: dict[str, deque[_Entry]] = {}
        self._repeated = LogThrottle()

    def put(self, item: Item, origin: Origin | None, after: Sequence[Pending] = ()) -> None:
        """Have a delivery appended. One without an origin isn't of the order: it waits for nothing."""
        item.delivery = replace(item.delivery, successor=item.delivery.successor + 1)
        topic = self._services.topics.ordered(item.delivery.route, item.delivery.destination)
        entry = _Entry(item=item, origin=origin, after=after)
        if topic in self._spread:
            self._place(entry, topic)
            return
        is_asked = topic in self._unplaced
        self._unplaced.setdefault(topic, deque()).append(entry)
        if not is_asked:
            self._dispatch.spawn(lambda: self._learn(topic), "sequence-learn")

    async def _learn(self, topic: str) -> None:
        """Find out how many partitions a topic has; then what came meanwhile takes its place."""
        entries = self._unplaced[topic]
        pause = FIRST_PAUSE
        while any(not entry.item.pending.tracker.is_lost for entry in entries):
            try:
                bounds, unread = await self._services.log.readable(topic)
                count = len(bounds) + len(unread)
                if count:
                    # Not over those that were added later, or a key's next event could overtake.
                    self._spread[topic] = min(count, ORDERED_PARTITIONS)
                    break
                error = f"expected a topic {topic}, got none"
            except LogUnavailableError as unavailable:
                error = str(unavailable)
            self._tell(topic, error)
            await self._services.sleep(pause)
            pause = min(LONGEST_PAUSE, 2 * pause)
        del self._unplaced[topic]
        for entry in entries:
            if topic in self._spread:
                self._place(entry, topic)
            else:
                self._dispatch.drop(entry.item)

    def _place(self, entry: _Entry, topic: str) -> None:
        key = order_key(entry.item.delivery.event).encode("utf-8", "surrogateescape")
        partition = Partition(topic, partition_of(key, self._spread[topic]))
        place = (None if entry.origin is None else entry.origin.partition, partition)
        queue = self._queues.get(place)
        if queue is None:
            queue = self._queues[place] = _Queue(partition)
        queue.entries.append(entry)
        if not queue.is_busy:
            queue.is_busy = True
            self._dispatch.spawn(lambda: self._append(queue), "sequence-append")

    async def _append(self, queue: _Queue) -> None:
        """Append what is in a queue, until it is empty."""
        pause = FIRST_PAUSE
        most = BATCH_RECORDS
        while True:
            batch = self._next(queue, most)
            if not batch:
                if not queue.entries or (self._dispatch.is_draining and not queue.entries[0].may_come_to_go):
                    queue.is_busy = False
                    return
                await self._services.sleep(POLL_INTERVAL)
                continue
            try:
                await self._services.log.append_in_order(queue.partition, [self._record_of(entry) for entry in batch])
            except RecordTooLargeError as error:
                if len(batch) > 1:
                    most = 1  # which of them it is
                    continue
                queue.entries.popleft()
                self._dispatch.end(batch[0].item, DeadLettered(reason=DeadReason.TOO_LARGE, detail=str(error)))
            except LogUnavailableError as error:
                self._tell(queue.partition.topic, str(error))
                await self._services.sleep(pause)
                pause = min(LONGEST_PAUSE, 2 * pause)
                continue
            else:
                for entry in batch:
                    queue.entries.popleft()
                    self._dispatch.drop(entry.item)
            pause, most = FIRST_PAUSE, BATCH_RECORDS

    def _tell(self, topic: str, error: str) -> None:
        if count := self._repeated.count(topic, self._services.log.now()):
            self._services.logger.warning("append_retried", topic=topic, count=count, error=error)

    def _next(self, queue: _Queue, most: int) -> list[_Entry]:
        """Return the first entries that may go; those that another owner reads again are forgotten."""
        entries = queue.entries
        while entries and entries[0].item.pending.tracker.is_lost:
            self._dispatch.drop(entries.popleft().item)
        batch: list[_Entry] = []
        size = 0
        for entry in entries:
            size += entry.item.size
            is_full = len(batch) == most or (batch and size > BATCH_BYTES)
            if is_full or entry.item.pending.tracker.is_lost or not entry.may_go:
                break
            batch.append(entry)
        return batch

    def _record_of(self, entry: _Entry) -> NewRecord:
        delivery, event = entry.item.delivery, entry.item.delivery.event
        headers = encode_delivery(delivery, entry.item.note, at=self._services.log.now())
        if entry.origin is not None:
            headers.append(encode_origin(entry.origin))
        return NewRecord(order_key(event).encode("utf-8", "surrogateescape"), event.body, headers)
