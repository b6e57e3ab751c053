"""Records → brokers: an aiokafka producer with a deadline for each append, replaced when it is stuck."""
# ruff: noqa: SLF001 - aiokafka's public method for a single record costs several times as much

import asyncio
import contextlib
import math
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import structlog
from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.errors import (
    KafkaError,
    KafkaTimeoutError,
    MessageSizeTooLargeError,
    RecordListTooLargeError,
    UnknownTopicOrPartitionError,
)
from aiokafka.structs import RecordMetadata as ProducedRecord

from gateway.log.base import ALL, NewRecord, Partition, Position, RecordHeaders, partition_of
from gateway.log.kafka.append_failures import AppendFailures
from gateway.log.kafka.broker_clock import BrokerClock
from gateway.log.kafka.careful_producer import never_repeat
from gateway.log.kafka.cluster import QUERY_TIMEOUT, Cluster
from gateway.log.kafka.connection import CLOSE_GRACE, LOG_APPEND_TIME, Connection, has_died, stop
from gateway.log.kafka.errors import MISCONFIGURED, message_of, translated_errors
from gateway.log.kafka.topic_settings import BROKER_LIMIT
from gateway.model import ForbiddenError, LogUnavailableError, RecordTooLargeError

BATCH_OVERHEAD = 1_024  # A batch's header (61 bytes), a record's lengths, and those of nearly 200 headers.
MAX_RECORD_BYTES = BROKER_LIMIT - BATCH_OVERHEAD
SURELY_FITS = 524_288  # Smaller values aren't measured with their headers: the broker refuses what is too large.
MAX_BATCH_BYTES = 524_288  # With the default of 16 KiB and one request in flight, throughput falls to an eighth.
IN_ORDER_BYTES = 262_144  # Maximum record bytes in one ordered batch; less than a batch holds, so that all fit.
SWEEP_INTERVAL = 0.25  # Seconds between searches for appends that have waited too long.
MISSING_MAX_AGE = 1.0  # Seconds for which a topic that doesn't exist isn't asked for again.

_TOO_LARGE = (MessageSizeTooLargeError, RecordListTooLargeError)

logger = structlog.get_logger(__name__)


class Appender:
    """Stores records. Each append ends within the timeout, one in order within that for each of its batches.

    Acknowledgements set the clock. If it `repeats`, it sends again what may have been stored, within the timeout.
    """

    def __init__(
        self,
        connection: Connection,
        *,
        cluster: Cluster,
        clock: BrokerClock,
        append_timeout: float,
        repeats: bool,
    ) -> None:
        self._repeats = repeats
        self._loop = asyncio.get_running_loop()
        self._connection = connection
        self._append_timeout = append_timeout
        self._cluster = cluster
        self._clock = clock
        self._producer = self._new_producer()
        self._last_timestamp = 0.0
        self._partitions: dict[str, Sequence[TopicPartition]] = {}
        self._pending: deque[tuple[float, asyncio.Future[Any]]] = deque()
        self._in_order: dict[Partition, deque[_OrderedAppend]] = {}
        self._in_order_tasks: set[asyncio.Task[None]] = set()
        self._in_flight = 0
        self._finished: asyncio.Event | None = None  # Set by the last append in flight, once the log is being closed.
        self._sweeper: asyncio.TimerHandle | None = None
        self._stuck_since: float | None = None
        self._failures = AppendFailures()
        self._appended_to: set[str] = set()
        self._replacing: asyncio.Task[None] | None = None
        self._metadata_lock = asyncio.Lock()
        self._missing: dict[str, float] = {}  # when each of these topics didn't exist
        self._is_closed = False

    async def start(self) -> None:
        """Connect. Raises KafkaError."""
        await self._producer.start()

    async def append(
        self, topic: str, *, key: bytes, value: bytes, headers: RecordHeaders, partition: int | None = None
    ) -> Position:
        if len(value) > SURELY_FITS:
            self._refuse_if_too_large(topic, key, value, headers)
        if self._is_closed:
            raise LogUnavailableError(f"append to {topic}: expected an open log, got a closed one")
        self._in_flight += 1
        started = self._loop.time()
        producer = self._producer
        where: TopicPartition | None = None
        try:
            timeout, partitions = 0.8 * self._append_timeout, self._partitions.get(topic)
            if partitions is None:
                partitions = await self._known_partitions(topic, producer)
                timeout = max(0.0, timeout - (self._loop.time() - started))
            if partition is not None and partition >= len(partitions):
                raise UnknownTopicOrPartitionError(f"{topic}/{partition}")
            where = partitions[partition_of(key, len(partitions)) if partition is None else partition]
            # For a known topic and partition, producer.send does nothing else, but takes 3 µs more.
            future = await producer._message_accumulator.add_message(where, key, value, timeout, None, headers)
            self._pending.append((started, future))
            if self._sweeper is None:
                self._sweeper = self._loop.call_later(SWEEP_INTERVAL, self._sweep)
            stored = await future
        except KafkaError as error:
            if isinstance(error, _TOO_LARGE) and where is not None and len(value) <= SURELY_FITS:
                # Perhaps the batch was too large, and not the record: somebody may have lowered the topic's limit.
                alone = Partition(topic, where.partition), [NewRecord(key, value, headers)]
                [position] = await self._append_in_order(*alone, started + self._append_timeout)
                return position
            raise self._failed_append(topic, error, where and where.partition) from error
        finally:
            self._append_ended()
        at = self._acknowledged(stored)
        return Position(where.partition, stored.offset, at)

    async def append_in_order(self, partition: Partition, records: Sequence[NewRecord]) -> Sequence[Position]:
        """Store records batch by batch, each acknowledged before the next is sent; a batch is stored whole or not.

        (Records sent one by one may end up in two batches, of which only the second is stored.)
        """
        return await self._append_in_order(partition, records, self._loop.time() + self._append_timeout)

    async def _append_in_order(
        self, partition: Partition, records: Sequence[NewRecord], until: float
    ) -> Sequence[Position]:
        """Like `append_in_order`, but the first batch must be stored by `until`, a time of the loop."""
        topic, number = partition
        for record in records:
            self._refuse_if_too_large(topic, *record)
        if not records:
            return []
        if self._is_closed:
            raise LogUnavailableError(f"append to {topic}: expected an open log, got a closed one")
        self._in_flight += 1
        append = _OrderedAppend(records, self._loop.create_future(), asyncio.timeout_at(until))
        waiting = self._in_order.get(partition)
        if waiting is None:
            waiting = self._in_order[partition] = deque()
            task = asyncio.create_task(self._append_waiting(partition, waiting), name="kafka-appends-in-order")
            self._in_order_tasks.add(task)
            task.add_done_callback(self._in_order_tasks.discard)
        waiting.append(append)
        try:
            async with append.deadline:
                await append.stored
        except TimeoutError as error:
            raise self._failed_append(topic, KafkaTimeoutError("no acknowledgement in time"), number) from error
        except KafkaError as error:
            raise self._failed_append(topic, error, number) from error
        finally:
            self._append_ended()
        return append.positions

    async def _append_waiting(self, partition: Partition, waiting: "deque[_OrderedAppend]") -> None:
        """Drain the queue of ordered appends to one partition, a batch at a time.

        A batch for each caller would cost a round trip each. In aiokafka they would wait in no particular order, so
        that some wouldn't be acknowledged in time.
        """
        alone = 0  # how many of the first appends get a batch each
        try:
            while waiting:
                taken: list[tuple[_OrderedAppend, int]] = []
                try:
                    async with asyncio.timeout(self._append_timeout):
                        stored = await self._append_batch(partition, [*waiting][: 1 if alone else None], taken)
                except TimeoutError:
                    _fail([append for append, _ in taken] or waiting, KafkaTimeoutError("no acknowledgement in time"))
                except _TOO_LARGE as error:
                    if len(taken) > 1:
                        alone = len(taken)  # to find out whose records it is
                        continue
                    _fail([append for append, _ in taken], error)
                except Exception as error:  # noqa: BLE001 - the callers get it
                    _fail([append for append, _ in taken] or waiting, error)
                else:
                    if stored is not None:
                        self._note_stored(partition, stored, taken)
                while waiting and waiting[0].stored.done():
                    waiting.popleft()
                    alone = max(0, alone - 1)
        finally:
            del self._in_order[partition]
            _fail(waiting, KafkaTimeoutError("the log was closed"))

    def _note_stored(
        self, partition: Partition, stored: ProducedRecord, taken: "Sequence[tuple[_OrderedAppend, int]]"
    ) -> None:
        """Give the appends in a batch their positions; incomplete ones get the whole timeout for the next."""
        at, offset = self._acknowledged(stored), stored.offset
        for append, count in taken:
            append.positions += [Position(partition.number, offset + index, at) for index in range(count)]
            offset += count
            if append.stored.done():
                continue
            if len(append.positions) == len(append.records):
                append.stored.set_result(None)
            else:
                append.deadline.reschedule(self._loop.time() + self._append_timeout)

    async def _append_batch(
        self, partition: Partition, waiting: "Sequence[_OrderedAppend]", taken: "list[tuple[_OrderedAppend, int]]"
    ) -> ProducedRecord | None:
        """Send one batch of the first records that wait; note in `taken` how many of each append are in it.

        Return None if nobody waits for them any more.
        """
        topic, number = partition
        producer = self._producer
        # As of now, and not as of an earlier append: nothing is awaited until the batch is sent.
        if number >= len(await self._partitions_of(topic, producer)):
            raise UnknownTopicOrPartitionError(f"{topic}/{number}")
        batch = producer.create_batch()
        for append in [each for each in waiting if not each.stored.done()]:
            before = batch.record_count()
            for record in append.records[len(append.positions) :]:
                if batch.record_count() and batch.size() + _size(record) > IN_ORDER_BYTES:
                    break
                batch.append(timestamp=None, key=record.key, value=record.value, headers=record.headers)
            count = batch.record_count() - before
            if count:
                taken.append((append, count))
            if count < len(append.records) - len(append.positions):
                break
        batch.close()  # or appends of others would be put into it
        if not batch.record_count():
            return None
        stored: ProducedRecord = await (await producer.send_batch(batch, topic, partition=number))
        return stored

    def _append_ended(self) -> None:
        self._in_flight -= 1
        if self._finished is not None and not self._in_flight:
            self._finished.set()

    def _acknowledged(self, stored: ProducedRecord) -> float:
        """Handle an acknowledgement; return when the record was appended."""
        self._stuck_since = None
        self._failures.stored(stored.topic, stored.partition)
        assert stored.timestamp is not None  # the broker returns it
        at = stored.timestamp / 1000
        if at != self._last_timestamp and stored.timestamp_type == LOG_APPEND_TIME:  # One time for a whole batch.
            self._last_timestamp = at
            self._clock.on_acknowledgement(at)
        return at

    async def check_appends(self) -> None:
        """Return unless appends fail. Raises LogUnavailableError with the reason, or if no broker responds.

        A process that a load balancer avoids gets no appends to try. So the brokers are asked whether there are enough
        replicas by now.
        """
        failure = self._failures.lasting(self._loop.time())
        if failure is not None:
            accepting, missing = await self._accepting()
            if reason := self._failures.reason(failure, accepting, missing, self._loop.time()):
                raise LogUnavailableError(reason)

    async def refusing(self) -> Mapping[Partition, str]:
        """Return which partitions refuse appends while others accept them, and why.

        If all refuse them, it is empty, and `check_appends` raises the reason.
        """
        if not self._failures.are_of_partitions:
            return {}
        accepting: Mapping[Partition, bool] = {}
        missing: Collection[str] = ()
        with contextlib.suppress(LogUnavailableError):
            accepting, missing = await self._accepting()
        return self._failures.refusing(accepting, missing, self._loop.time())

    async def _accepting(self) -> tuple[Mapping[Partition, bool], Collection[str]]:
        """Return whether each partition that had appends accepts them, and which of their topics are missing."""
        found = await self._cluster.accepting(self._appended_to)
        missing = {partition.topic for partition in found if partition.number == ALL}
        return {partition: accepts for partition, accepts in found.items() if partition.number != ALL}, missing

    async def load_metadata(self, topics: Iterable[str]) -> None:
        """Load existing topics' metadata into the producer, so that the first append to each doesn't wait for it."""
        with translated_errors("metadata"):
            async with asyncio.timeout(QUERY_TIMEOUT):
                await asyncio.gather(*[self._producer.partitions_for(topic) for topic in topics])

    async def close(self) -> None:
        """Finish the appends in flight, fail those that remain, and stop the producer, within 5 s."""
        self._is_closed = True
        if self._replacing is not None:
            self._replacing.cancel()
            await asyncio.wait({self._replacing})
        if self._in_flight:
            # Including those that wait for metadata or for space in a batch: aiokafka's stop would refuse them.
            self._finished = asyncio.Event()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_GRACE - 0.5):
                    await self._finished.wait()
        for task in self._in_order_tasks:
            task.cancel()
        await stop(self._producer, grace=0.5)
        for _, future in self._pending:
            if not future.done():
                future.set_exception(KafkaTimeoutError("the log was closed"))
        if self._sweeper is not None:
            self._sweeper.cancel()

    async def _load_used(self, producer: AIOKafkaProducer) -> None:
        """Load the metadata of topics that had appends into a new producer, as far as it is available in time."""
        with contextlib.suppress(KafkaError, LogUnavailableError, TimeoutError):
            async with asyncio.timeout(QUERY_TIMEOUT):
                topics = await self._cluster.describe(self._appended_to, skip_forbidden=True)
                await asyncio.gather(*[producer.partitions_for(topic) for topic in topics])

    def _new_producer(self) -> AIOKafkaProducer:
        producer = AIOKafkaProducer(
            **self._connection.options,
            acks="all",
            # An idempotent producer can stay stuck on OUT_OF_ORDER_SEQUENCE_NUMBER forever (aiokafka issue 1017).
            enable_idempotence=False,
            compression_type="zstd",
            max_batch_size=MAX_BATCH_BYTES,
            max_request_size=BROKER_LIMIT,
            # While a request is in flight the next batch fills. Lingering in addition cost latency and saved no CPU.
            linger_ms=0,
            # Also the age after which a batch isn't retried: less than the caller's timeout, so that none outlives it.
            request_timeout_ms=int(800 * self._append_timeout),
        )
        if not self._repeats:
            never_repeat(producer)
        return producer

    def _refuse_if_too_large(self, topic: str, key: bytes, value: bytes, headers: RecordHeaders) -> None:
        size = len(key) + len(value) + sum([len(name.encode()) + len(text) for name, text in headers])
        if size > MAX_RECORD_BYTES:
            raise RecordTooLargeError(f"{topic}: expected a record of at most {MAX_RECORD_BYTES} B, got {size} B")

    async def _known_partitions(self, topic: str, producer: AIOKafkaProducer) -> Sequence[TopicPartition]:
        partitions = self._partitions.get(topic)
        if partitions is None:
            partitions = self._partitions[topic] = await self._partitions_of(topic, producer)
        return partitions

    async def _partitions_of(self, topic: str, producer: AIOKafkaProducer) -> Sequence[TopicPartition]:
        """Wait until the producer has a topic's metadata; it isn't asked for a topic that doesn't exist."""
        known: Collection[int] | None = producer.client.cluster.partitions_for_topic(topic)
        try:
            if known is None:
                self._refuse_missing(topic)
                # One at a time; appends to topics that are known don't wait for it.
                async with asyncio.timeout(self._append_timeout), self._metadata_lock:
                    self._refuse_missing(topic)  # another append has asked meanwhile
                    if topic not in await self._cluster.describe([topic]):
                        self._missing[topic] = self._loop.time()
                        raise UnknownTopicOrPartitionError(topic)
                    self._missing.pop(topic, None)
                    known = await producer.partitions_for(topic)
            self._appended_to.add(topic)
            return [TopicPartition(topic, number) for number in range(len(known))]
        except TimeoutError as error:
            raise KafkaTimeoutError("no metadata in time") from error

    def _refuse_missing(self, topic: str) -> None:
        """Raise UnknownTopicOrPartitionError for a topic that didn't exist a moment ago."""
        if self._loop.time() < self._missing.get(topic, -math.inf) + MISSING_MAX_AGE:
            raise UnknownTopicOrPartitionError(topic)

    def _sweep(self) -> None:
        """Fail the appends that have waited too long. One timer for all, since a timeout for each costs 6 µs."""
        self._partitions.clear()  # A topic may have got more partitions.
        too_old = self._loop.time() - self._append_timeout + SWEEP_INTERVAL
        self._pending = deque([entry for entry in self._pending if not entry[1].done()])
        for (
            started,
            future,
        ) in self._pending:  # not sorted by age: some waited for metadata or for space in a batch
            if started <= too_old:
                # aiokafka skips futures that are done when the batch is acknowledged after all.
                future.set_exception(KafkaTimeoutError(f"no acknowledgement in {self._append_timeout:g} s"))
        self._sweeper = self._loop.call_later(SWEEP_INTERVAL, self._sweep) if self._pending else None

    def _failed_append(
        self, topic: str, error: KafkaError, number: int | None = None
    ) -> LogUnavailableError | RecordTooLargeError:
        if isinstance(error, _TOO_LARGE):
            return RecordTooLargeError(f"{topic}: {message_of(error)}")
        now = self._loop.time()
        if self._stuck_since is None:
            self._stuck_since = now
        is_of_topic = isinstance(error, (UnknownTopicOrPartitionError, *MISCONFIGURED))
        is_stuck = now - self._stuck_since > self._append_timeout and not is_of_topic
        if self._replacing is None and not self._is_closed and (is_stuck or has_died(self._producer)):
            self._replacing = asyncio.create_task(self._replace_producer(), name="kafka-producer-replaced")
        reason = f"append to {topic}: expected an acknowledgement, got {message_of(error)}"
        if not is_of_topic:
            self._failures.failed(topic, reason, now)
        if number is not None and not isinstance(error, UnknownTopicOrPartitionError):
            self._failures.refused(Partition(topic, number), message_of(error), now)
        return ForbiddenError(reason) if isinstance(error, MISCONFIGURED) else LogUnavailableError(reason)

    async def _replace_producer(self) -> None:
        """Replace a producer that gets no response by a new one, which connects to the configured servers.

        aiokafka's sender ends for good on an unexpected error, and its client never tries others than the brokers that
        it last knew.
        """
        producer = self._new_producer()
        try:
            await producer.start()
            await self._load_used(producer)
        except KafkaError:
            await stop(producer)
            await asyncio.sleep(1)
        except asyncio.CancelledError:
            await stop(producer)
            raise
        else:
            logger.warning("log_producer_replaced")
            old, self._producer = self._producer, producer
            self._partitions.clear()
            self._stuck_since = None
            await stop(old)
        finally:
            self._replacing = None


@dataclass(slots=True, eq=False)
class _OrderedAppend:
    """An append of several records, one after the other: those that are stored have their positions."""

    records: Sequence[NewRecord]
    stored: "asyncio.Future[None]"
    deadline: asyncio.Timeout
    positions: list[Position] = field(default_factory=list)


def _fail(appends: Iterable[_OrderedAppend], error: Exception) -> None:
    for append in appends:
        if not append.stored.done():
            append.stored.set_exception(error)


def _size(record: NewRecord) -> int:
    """Return the maximum size of a record in a batch."""
    headers = sum([len(name.encode()) + len(text) + 10 for name, text in record.headers])
    return len(record.key) + len(record.value) + headers + 64
