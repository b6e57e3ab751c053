"""Records attempts in `gateway.attempts`, as far as there is room. No delivery waits for it or fails with it.

    attempt ─▶ wanted? ─▶ room? ─▶ its partition's queue ─▶ append ─▶ recorded
                            │ no                              │ fails, or the process stops first
                            └─────────▶ dropped ◀─────────────┘

Each is counted as one of the two. After a crash, those in memory are neither.

A partition has one append in flight, and one that takes none keeps no other waiting: its records are dropped, but for
those with which it is tried again. A destination takes at most as much room as it leaves to all others.
"""

import asyncio
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple, assert_never

from gateway.client.masking import Mask, Masks
from gateway.client.observation import Observation
from gateway.client.request import Outbound
from gateway.client.response_excerpt import excerpt_of
from gateway.engine.delivery.retry_decision import Retry, Verdict
from gateway.engine.services import Services
from gateway.log.attempt_records import AttemptRecord, Decision, encode_attempt_record
from gateway.log.base import NO_TOPIC, NewRecord, Partition, partition_of
from gateway.model import (
    BODY_EXCERPT,
    HEADERS_EXCERPT,
    Attempt,
    DeadLettered,
    Delivered,
    Delivery,
    Dropped,
    LogUnavailableError,
    RecordTooLargeError,
    ResponseExcerpt,
    Result,
)
from gateway.rules.rules import Destination, Route, Rules
from gateway.settings import RecordedAttempts
from gateway.telemetry.log_throttle import LogThrottle
from gateway.telemetry.logs import traceback_of

MAX_BYTES = 8 << 20
"""Bytes of all records in memory."""
RECORD_OVERHEAD = 1024
"""Bytes of memory that a record takes besides its own, so that there are at most 8,192 of them."""
INTERVAL = 0.25
"""Seconds for which records are gathered: an append of many costs little more than one of a few."""
BATCH_RECORDS, BATCH_BYTES = 256, 256 << 10
"""Records in one append, and about how many bytes: few enough that a turn of the event loop stays short."""
RETRY_DELAY = 5.0
"""Seconds from a failed append to the next one to the same partition."""
PARTITIONS_AGE = 60.0
"""Seconds after which the log is asked again how many partitions there are."""
FLUSH_TIMEOUT = 0.5
"""Seconds, at the end of a drain, for what is in memory."""
WARNING_INTERVAL = 60.0


class CompletedAttempt(NamedTuple):
    """An attempt, when it began by the log's clock (a client may have another), its request, and the rules for that."""

    attempt: Attempt
    at: float
    rules: Rules
    route: Route
    destination: Destination
    outbound: Outbound


class _Waiting(NamedTuple):
    """A record in memory, where it takes so many bytes."""

    record: NewRecord
    destination: str
    size: int


@dataclass(slots=True, eq=False)
class _Queue:
    """What is to be appended to a partition. `failure` is why the last append failed; "" if it didn't."""

    partition: Partition
    waiting: list[_Waiting] = field(default_factory=list)
    is_busy: bool = False
    failure: str = ""
    retry_at: float = 0.0

    def take(self) -> list[_Waiting]:
        """Return the first records, as many as one append has."""
        size = count = 0
        while count < min(len(self.waiting), BATCH_RECORDS) and size < BATCH_BYTES:
            size += self.waiting[count].size
            count += 1
        taken, self.waiting = self.waiting[:count], self.waiting[count:]
        return taken


class AttemptLog:
    """The attempts of one process: `record` takes them, `run` appends them, `flush` ends that."""

    def __init__(self, services: Services, recorded: RecordedAttempts) -> None:
        self._services = services
        self._recorded = recorded
        self._topic = services.topics.attempts
        self._metrics = services.metrics
        self._new: list[_Waiting] = []
        self._queues: dict[int, _Queue] = {}
        self._partitions = 0
        self._ask_at = -math.inf
        self._failure = ""  # why the number of partitions isn't known
        self._bytes = self._count = 0
        self._of_destination: Counter[str] = Counter()  # bytes
        self._masks = Masks(Mask.of)
        self._throttle = LogThrottle(WARNING_INTERVAL)
        self._has_work, self._is_empty, self._is_flushed = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._is_empty.set()
        self._is_closed = False

    def wants(self, attempt: Attempt) -> bool:
        """Return whether such an attempt is to be recorded."""
        if self._recorded is RecordedAttempts.FAILURES:
            return attempt.result is not Result.SUCCESS
        return self._recorded is RecordedAttempts.ALL

    def observation(self) -> Observation | None:
        """Return what takes down how an attempt goes; None if none is recorded."""
        if self._recorded is RecordedAttempts.OFF:
            return None
        return Observation(asyncio.get_running_loop().time)

    def record(self, delivery: Delivery, completed: CompletedAttempt, decision: Decision | None) -> None:
        """Record the attempt that a delivery has just had, or drop it."""
        if self._is_closed:
            self._drop(1, "stopped")
            return
        is_success = completed.attempt.result is Result.SUCCESS
        most = RECORD_OVERHEAD + len(delivery.event.type)
        most += 0 if is_success else BODY_EXCERPT + HEADERS_EXCERPT
        if self._bytes + self._of_destination[delivery.destination] + most > MAX_BYTES:
            self._drop(1, "no_room")
            return
        try:
            excerpt = None if is_success else self._excerpt(completed)
            record = encode_attempt_record(_record_of(delivery, completed, decision, excerpt))
        except Exception as error:  # noqa: BLE001 - whatever a stranger has responded, the delivery goes on
            self._drop(1, "bug", exception=traceback_of(error))
            return
        size = RECORD_OVERHEAD + len(record.value) + sum([len(value) for _, value in record.headers])
        self._bytes += size
        self._count += 1
        self._of_destination[delivery.destination] += size
        self._new.append(_Waiting(record, delivery.destination, size))
        self._is_empty.clear()
        self._has_work.set()

    async def run(self) -> None:
        """Append what is recorded, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                await self._has_work.wait()
                with suppress(TimeoutError):
                    async with asyncio.timeout(INTERVAL):
                        await self._is_flushed.wait()
                self._has_work.clear()
                await self._ask_for_partitions()
                self._assign()
                for queue in self._queues.values():
                    if queue.waiting and not queue.is_busy:
                        queue.is_busy = True
                        tasks.create_task(self._append(queue), name="attempts-append")

    async def flush(self) -> None:
        """Wait until all is appended, or FLUSH_TIMEOUT; then drop the rest, and whatever comes later.

        `run` has to be cancelled with that.
        """
        self._is_flushed.set()
        if self._count:
            with suppress(TimeoutError):
                async with asyncio.timeout(FLUSH_TIMEOUT):
                    await self._is_empty.wait()
        self._is_closed = True
        if self._count:
            self._drop(self._count, "stopped")

    async def _ask_for_partitions(self) -> None:
        """Find out how many partitions there are, if that isn't known, or wasn't for a while."""
        now = asyncio.get_running_loop().time()
        if now < self._ask_at:
            return
        try:
            found = await self._services.log.partitions([self._topic])
            self._partitions = found.get(self._topic, 0)
            self._failure = "" if self._partitions else f"{self._topic}: {NO_TOPIC}"
        except LogUnavailableError as error:
            self._failure = str(error)
        self._ask_at = now + (RETRY_DELAY if self._failure else PARTITIONS_AGE)

    def _assign(self) -> None:
        """Move new records to the queues of their partitions; drop those for which nothing is tried now."""
        new, self._new = self._new, []
        if self._failure:
            self._give_up(new, self._failure)
            return
        now = asyncio.get_running_loop().time()
        for each in new:
            number = partition_of(each.record.key, self._partitions)
            queue = self._queues.get(number)
            if queue is None:
                queue = self._queues[number] = _Queue(Partition(self._topic, number))
            if queue.failure and (queue.is_busy or now < queue.retry_at):
                self._give_up([each], queue.failure)
            else:
                queue.waiting.append(each)

    async def _append(self, queue: _Queue) -> None:
        """Append what waits for a partition, until that is nothing, or fails."""
        while batch := queue.take():
            try:
                await self._services.log.append_in_order(queue.partition, [each.record for each in batch])
            except (LogUnavailableError, RecordTooLargeError) as error:
                queue.failure = str(error)
                now = asyncio.get_running_loop().time()
                queue.retry_at = now + RETRY_DELAY
                self._ask_at = min(self._ask_at, queue.retry_at)  # perhaps it was recreated, with fewer partitions
                self._give_up([*batch, *queue.waiting], queue.failure)
                queue.waiting = []
            else:
                queue.failure = ""
                self._metrics.attempt_records.inc(len(batch))
                self._release(batch)
        queue.is_busy = False

    def _give_up(self, records: Sequence[_Waiting], error: str) -> None:
        if records:
            self._drop(len(records), "append_failed", error=error)
            self._release(records)

    def _release(self, records: Iterable[_Waiting]) -> None:
        """Give back the memory of records."""
        for _, destination, size in records:
            self._count -= 1
            self._bytes -= size
            self._of_destination[destination] -= size
            if not self._of_destination[destination]:
                del self._of_destination[destination]
        if not self._count:
            self._is_empty.set()

    def _drop(self, count: int, reason: str, **why: str) -> None:
        """Count records that nobody will see, and say so now and then."""
        self._metrics.attempt_records_dropped.labels(reason).inc(count)
        if told := self._throttle.count(reason, self._services.log.now(), count):
            self._services.logger.warning("attempt_records_dropped", reason=reason, count=told, **why)

    def _excerpt(self, completed: CompletedAttempt) -> ResponseExcerpt | None:
        """Return the beginning of the response, without what may be a credential."""
        seen = completed.outbound.observation
        if seen is None or seen.response is None or completed.attempt.status is None:
            return None
        route = completed.route
        mask = self._masks.of(completed.rules, route.name, route.request, completed.destination)
        return excerpt_of(seen.response, mask.with_sent(completed.outbound.headers, seen.authorizations))


def decision_of(verdict: Verdict, *, halts: bool) -> Decision:
    """Return what follows from the verdict on an attempt; `halts` is whether a failure halts the delivery's key."""
    match verdict:
        case Delivered():
            return Decision.DELIVERED
        case Retry():
            return Decision.RETRY
        case DeadLettered():
            return Decision.HALTED if halts else Decision.DEAD_LETTER
        case Dropped():
            return Decision.DROPPED
        case _ as never:
            assert_never(never)


def _record_of(
    delivery: Delivery, completed: CompletedAttempt, decision: Decision | None, response: ResponseExcerpt | None
) -> AttemptRecord:
    event, outbound, attempt = delivery.event, completed.outbound, completed.attempt
    assert outbound.observation is not None
    return AttemptRecord(
        event_id=event.id,
        delivery_id=delivery.id,
        source=event.source,
        type=event.type,
        route=delivery.route,
        destination=delivery.destination,
        received_at=event.received_at,
        replayed_at=delivery.replayed_at,
        item=None if delivery.part is None else delivery.part.number,
        number=attempt.number,
        at=completed.at,
        seconds=attempt.seconds,
        result=attempt.result,
        decision=decision,
        status=attempt.status,
        detail=attempt.detail,
        retry_after=attempt.retry_after,
        phases=outbound.observation.phases,
        method=outbound.method,
        host=outbound.host,
        rules=completed.rules.version,
        response=response,
    )
