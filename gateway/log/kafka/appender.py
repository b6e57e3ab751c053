"""Records → brokers: a producer of aiokafka whose appends each end in time, and which is replaced when it is stuck."""
# ruff: noqa: SLF001 - what aiokafka offers for a single record costs several times as much

import asyncio
import contextlib
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
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
from aiokafka.structs import RecordMetadata

from gateway.log.base import NO_APPENDS, NewRecord, Partition, Position, RecordHeaders, partition_of
from gateway.log.kafka.broker_clock import BrokerClock
from gateway.log.kafka.cluster import QUESTION_TIMEOUT, Cluster
from gateway.log.kafka.connection import CLOSE_GRACE, LOG_APPEND_TIME, Connection, has_died, stop
from gateway.log.kafka.errors import say, translated
from gateway.log.kafka.topic_settings import BROKER_LIMIT
from gateway.model import LogUnavailableError, RecordTooLargeError

BATCH_OVERHEAD = 1_024  # A batch's header (61 bytes), a record's lengths, and those of nearly 200 headers.
MAX_RECORD_BYTES = BROKER_LIMIT - BATCH_OVERHEAD
SURELY_FITS = 524_288  # Below it the headers aren't measured: the producer refuses what is over the limit.
MAX_BATCH_BYTES = 524_288  # With the default of 16 KiB and one request in flight, throughput falls to an eighth.
IN_ORDER_BYTES = 262_144  # Of records in one batch; less than what a batch takes, so that it takes each of them.
SWEEP = 0.25  # How often appends are looked at that have waited too long.
REFUSED_AFTER = 0.25  # Seconds without a success beside a refusal. Of one partition in twelve, the others tell sooner.
FORGOTTEN_AFTER = 10.0  # Seconds since the last refusal, where the brokers can't say what it was for.
STILL_REFUSED = 3.0  # The same of one partition, beside others that take appends.

log = structlog.get_logger(__name__)


class Appender:
    """Stores records. Each append ends within the timeout; what is acknowledged tells the clock the time."""

    def __init__(self, connection: Connection, *, cluster: Cluster, clock: BrokerClock, append_timeout: float) -> None:
        self._loop = asyncio.get_running_loop()
        self._connection = connection
        self._append_timeout = append_timeout
        self._cluster = cluster
        self._clock = clock
        self._producer = self._new_producer()
        self._heard = 0.0
        self._partitions: dict[str, Sequence[TopicPartition]] = {}
        # Invariant: older appends stand first.
        self._pending: deque[tuple[float, asyncio.Future[Any]]] = deque()
        self._under_way = 0
        self._finished: asyncio.Event | None = None  # Set by the last append under way, once the log is being closed.
        self._sweeper: asyncio.TimerHandle | None = None
        self._failing_since: float | None = None
        self._refusal: _Refusal | None = None
        self._refusals: dict[Partition, _Refusal] = {}
        self._appended_to: set[str] = set()
        self._replacing: asyncio.Task[None] | None = None
        self._unknown = asyncio.Lock()
        self._is_closed = False

    async def start(self) -> None:
        """Connect. Raises KafkaError."""
        await self._producer.start()

    async def append(self, topic: str, *, key: bytes, value: bytes, headers: RecordHeaders) -> Position:
        if len(value) > SURELY_FITS:
            self._refuse_if_too_large(topic, key, value, headers)
        if self._is_closed:
            raise LogUnavailableError(f"append to {topic}: expected an open log, got a closed one")
        self._under_way += 1
        started = self._loop.time()
        producer = self._producer
        where: TopicPartition | None = None
        try:
            partitions = self._partitions.get(topic) or await self._known_partitions(topic, producer)
            where = partitions[partition_of(key, len(partitions))]
            # producer.send does no more, for a topic and a partition that are known, but takes 3 µs for it.
            accumulator, patience = producer._message_accumulator, 0.8 * self._append_timeout
            future = await accumulator.add_message(where, key, value, patience, None, headers)
            self._pending.append((started, future))
            if self._sweeper is None:
                self._sweeper = self._loop.call_later(SWEEP, self._sweep)
            stored = await future
        except KafkaError as error:
            raise self._failed_append(topic, error, where and where.partition) from error
        finally:
            self._ended()
        at = self._stored(stored)
        return Position(where.partition, stored.offset, at)

    async def append_in_order(self, partition: Partition, records: Sequence[NewRecord]) -> Sequence[Position]:
        """Store records batch by batch, each acknowledged before the next is sent: a batch is stored whole or not.

        What is sent record by record may be torn into two batches, of which only the second is stored.
        """
        topic, number = partition
        for record in records:
            self._refuse_if_too_large(topic, *record)
        positions: list[Position] = []
        while len(positions) < len(records):
            if self._is_closed:
                raise LogUnavailableError(f"append to {topic}: expected an open log, got a closed one")
            self._under_way += 1
            producer = self._producer
            try:
                async with asyncio.timeout(self._append_timeout):
                    if number >= len(await self._known_partitions(topic, producer)):
                        raise UnknownTopicOrPartitionError(f"{topic}/{number}")
                    batch = producer.create_batch()
                    for record in records[len(positions) :]:
                        if batch.record_count() and batch.size() + _size(record) > IN_ORDER_BYTES:
                            break
                        batch.append(timestamp=None, key=record.key, value=record.value, headers=record.headers)
                    count = batch.record_count()
                    batch.close()  # or appends of others would be put into it
                    stored = await (await producer.send_batch(batch, topic, partition=number))
            except TimeoutError as error:
                raise self._failed_append(topic, KafkaTimeoutError("no acknowledgement in time"), number) from error
            except KafkaError as error:
                raise self._failed_append(topic, error, number) from error
            finally:
                self._ended()
            at = self._stored(stored)
            positions += [Position(number, stored.offset + index, at) for index in range(count)]
        return positions

    def _ended(self) -> None:
        self._under_way -= 1
        if self._finished is not None and not self._under_way:
            self._finished.set()

    def _stored(self, stored: RecordMetadata) -> float:
        """Learn from an acknowledgement; return when the record was appended."""
        self._failing_since = self._refusal = None
        if self._refusals:
            self._refusals.pop(Partition(stored.topic, stored.partition), None)
        assert stored.timestamp is not None  # the broker tells it
        at = stored.timestamp / 1000
        if at != self._heard and stored.timestamp_type == LOG_APPEND_TIME:  # One time for a whole batch.
            self._heard = at
            self._clock.heard(at)
        return at

    async def look(self) -> None:
        """Return unless appends are refused. Raises LogUnavailableError with the reason, or where no broker answers.

        Nobody is there to try an append where a load balancer has turned to others. So the brokers are asked whether
        there are replicas enough by now; of another reason they know nothing, and it is forgotten after a while.
        """
        refusal = self._refusal
        if refusal is None or self._loop.time() < refusal.began + REFUSED_AFTER:
            return
        accepting = await self._cluster.accepting(self._appended_to)
        if self._refusal is not refusal:
            return  # by an append that has succeeded meanwhile
        if not any(accepting.values()):
            refusal.is_explained = True
            raise LogUnavailableError(refusal.reason)
        if not all(accepting.values()):
            return  # what one partition lacks stops no other
        if not refusal.is_explained and self._loop.time() < refusal.last + FORGOTTEN_AFTER:
            raise LogUnavailableError(refusal.reason)
        self._refusal = None

    async def refusing(self) -> Mapping[Partition, str]:
        """Return which partitions refuse appends that others take, and why: what one lacks, none of them hides.

        Where all are refused it is empty, and `look` says why.
        """
        if not self._refusals:
            return {}
        accepting: Mapping[Partition, bool] = {}
        with contextlib.suppress(LogUnavailableError):
            accepting = await self._cluster.accepting(self._appended_to)
        now = self._loop.time()
        has_success = self._refusal is None or now < self._refusal.began + REFUSED_AFTER
        if not has_success and len(set(accepting.values())) <= 1:
            self._refusals.clear()
        for partition, refusal in list(self._refusals.items()):
            if not accepting.get(partition, True):
                refusal.is_explained = True
            elif accepting if refusal.is_explained else now >= refusal.last + STILL_REFUSED:
                del self._refusals[partition]
        return {partition: refusal.reason for partition, refusal in self._refusals.items()}

    async def learn(self, topics: Iterable[str]) -> None:
        """Let the producer know topics that are there, so that the first append to each doesn't wait for metadata."""
        with translated("metadata"):
            async with asyncio.timeout(QUESTION_TIMEOUT):
                await asyncio.gather(*[self._producer.partitions_for(topic) for topic in topics])

    async def close(self) -> None:
        """Finish the appends under way, fail what is left of them, and let go, within 5 s."""
        self._is_closed = True
        if self._replacing is not None:
            self._replacing.cancel()
            await asyncio.wait({self._replacing})
        if self._under_way:
            # Also those that wait for metadata, or for room in a batch: aiokafka's stop would turn them away.
            self._finished = asyncio.Event()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_GRACE - 0.5):
                    await self._finished.wait()
        await stop(self._producer, grace=0.5)
        for _, future in self._pending:
            if not future.done():
                future.set_exception(KafkaTimeoutError("the log was closed"))
        if self._sweeper is not None:
            self._sweeper.cancel()

    def _new_producer(self) -> AIOKafkaProducer:
        return AIOKafkaProducer(
            **self._connection.options,
            acks="all",
            # An idempotent producer can stay stuck on OUT_OF_ORDER_SEQUENCE_NUMBER for ever (aiokafka issue 1017).
            enable_idempotence=False,
            compression_type="zstd",
            max_batch_size=MAX_BATCH_BYTES,
            max_request_size=BROKER_LIMIT,
            # While a request is in flight the next batch fills. Lingering on top cost latency and saved no CPU.
            linger_ms=0,
            # Also the age at which a batch isn't tried again: less than what a caller waits, so that none outlives it.
            request_timeout_ms=int(800 * self._append_timeout),
        )

    def _refuse_if_too_large(self, topic: str, key: bytes, value: bytes, headers: RecordHeaders) -> None:
        size = len(key) + len(value) + sum([len(name.encode()) + len(text) for name, text in headers])
        if size > MAX_RECORD_BYTES:
            raise RecordTooLargeError(f"{topic}: expected a record of at most {MAX_RECORD_BYTES} B, got {size} B")

    async def _known_partitions(self, topic: str, producer: AIOKafkaProducer) -> Sequence[TopicPartition]:
        partitions = self._partitions.get(topic)
        if partitions is None:
            partitions = self._partitions[topic] = await self._partitions_of(topic, producer)
            self._appended_to.add(topic)
        return partitions

    async def _partitions_of(self, topic: str, producer: AIOKafkaProducer) -> Sequence[TopicPartition]:
        """Wait until the producer knows a topic. It isn't told of one that isn't there."""
        known: Collection[int] | None = producer.client.cluster.partitions_for_topic(topic)
        try:
            if known is None:
                # One after the other, and none that is known waits for them.
                async with asyncio.timeout(self._append_timeout), self._unknown:
                    if topic not in await self._cluster.describe([topic]):
                        raise UnknownTopicOrPartitionError(topic)
                    known = await producer.partitions_for(topic)
            return [TopicPartition(topic, number) for number in range(len(known))]
        except TimeoutError as error:
            raise KafkaTimeoutError("no metadata in time") from error

    def _sweep(self) -> None:
        """Fail the appends that have waited too long. One timer for all: a timeout for each costs 6 µs."""
        self._partitions.clear()  # A topic may have got more partitions.
        too_old = self._loop.time() - self._append_timeout + SWEEP
        self._pending = deque([entry for entry in self._pending if not entry[1].done()])
        for started, future in self._pending:
            if started > too_old:
                break
            # aiokafka passes over futures that are done when the batch gets its answer after all.
            future.set_exception(KafkaTimeoutError(f"no acknowledgement in {self._append_timeout:g} s"))
        self._sweeper = self._loop.call_later(SWEEP, self._sweep) if self._pending else None

    def _failed_append(
        self, topic: str, error: KafkaError, number: int | None = None
    ) -> LogUnavailableError | RecordTooLargeError:
        if isinstance(error, (MessageSizeTooLargeError, RecordListTooLargeError)):
            return RecordTooLargeError(f"{topic}: {say(error)}")
        now = self._loop.time()
        if self._failing_since is None:
            self._failing_since = now
        is_stuck = now - self._failing_since > self._append_timeout and not isinstance(
            error, UnknownTopicOrPartitionError
        )
        if self._replacing is None and not self._is_closed and (is_stuck or has_died(self._producer)):
            self._replacing = asyncio.create_task(self._replace_producer(), name="kafka-producer-replaced")
        reason = f"append to {topic}: expected an acknowledgement, got {say(error)}"
        if not isinstance(error, UnknownTopicOrPartitionError):  # which is this topic's, and no other's
            if self._refusal is None:
                self._refusal = _Refusal(began=now)
            self._refusal.last, self._refusal.reason = now, reason
            if number is not None:
                its = self._refusals.setdefault(Partition(topic, number), _Refusal(began=now))
                its.last, its.reason = now, f"{NO_APPENDS}: {say(error)}"
        return LogUnavailableError(reason)

    async def _replace_producer(self) -> None:
        """Put a new producer in the place of one that gets no answer; it starts from the servers as configured.

        aiokafka's sender ends for good on an error that it doesn't expect, and its client never looks beyond the
        brokers that it last knew.
        """
        producer = self._new_producer()
        try:
            await producer.start()
        except KafkaError:
            await stop(producer)
            await asyncio.sleep(1)
        except asyncio.CancelledError:
            await stop(producer)
            raise
        else:
            log.warning("log_producer_replaced")
            old, self._producer = self._producer, producer
            self._partitions.clear()
            self._failing_since = None
            await stop(old)
        finally:
            self._replacing = None


@dataclass(slots=True, kw_only=True)
class _Refusal:
    """Appends that were refused, and none that has succeeded since. `is_explained` where the brokers said why."""

    began: float
    last: float = 0.0
    reason: str = ""
    is_explained: bool = False


def _size(record: NewRecord) -> int:
    """Return how large a record is in a batch, at most."""
    headers = sum([len(name.encode()) + len(text) + 10 for name, text in record.headers])
    return len(record.key) + len(record.value) + headers + 64
