"""The log on Kafka: the only user of aiokafka, whose habits stop here.

What aiokafka (0.14) does not promise, this module adds: a deadline for every append, fetch, commit and close; listeners
whose errors are heard; commits on revocation and on close; going on where one of its background tasks has died; and
never a topic that a metadata request made, with the broker's defaults.

Of its own log each line passes once a minute: it repeats a failed connection ten times a second, and whatever fails
reaches our callers as an error.
"""
# ruff: noqa: SLF001 - nothing public tells that a task of aiokafka has died, or ends a stop that waits for ever

import asyncio
import contextlib
import logging
import math
import time
from base64 import b64decode, b64encode
from collections import defaultdict, deque
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from typing import Any, TypeVar
from zlib import crc32

import structlog
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRebalanceListener, ConsumerRecord, TopicPartition
from aiokafka.client import AIOKafkaClient, ConnectionGroup, CoordinationType
from aiokafka.errors import (
    ClusterAuthorizationFailedError,
    GroupAuthorizationFailedError,
    GroupIdNotFound,
    InvalidConfigurationError,
    InvalidReplicationFactorError,
    InvalidTopicError,
    KafkaError,
    KafkaTimeoutError,
    LeaderNotAvailableError,
    MessageSizeTooLargeError,
    NodeNotReadyError,
    NoError,
    PolicyViolationError,
    RecordListTooLargeError,
    TopicAlreadyExistsError,
    TopicAuthorizationFailedError,
    UnknownTopicOrPartitionError,
    for_code,
)
from aiokafka.protocol.admin import (
    CreateTopicsRequest,
    DeleteGroupsRequest,
    DescribeConfigsRequest,
    DescribeGroupsRequest,
    ListGroupsRequest,
)
from aiokafka.protocol.api import Request
from aiokafka.protocol.commit import OffsetCommitRequest, OffsetFetchRequest
from aiokafka.protocol.group import LeaveGroupRequest
from aiokafka.protocol.metadata import MetadataRequest
from aiokafka.protocol.offset import OffsetRequest

from gateway.log.base import (
    Assignment,
    Batch,
    Commit,
    Listener,
    Partition,
    Position,
    Record,
    RecordHeaders,
    TopicProblem,
    TopicSpec,
)
from gateway.model import LogUnavailableError, RecordTooLargeError, UsageError

BROKER_LIMIT = 1_048_588  # Kafka's default of max.message.bytes, which bounds a batch.
BATCH_OVERHEAD = 1_024  # A batch's header (61 bytes), a record's lengths, and those of nearly 200 headers.
SURELY_FITS = 524_288  # Below it the headers aren't measured: the producer refuses what is over the limit.
MAX_BATCH_BYTES = 524_288  # With the default of 16 KiB and one request in flight, throughput falls to an eighth.

APPEND_TIMEOUT = 5.0
QUESTION_TIMEOUT = 5.0
REQUEST_TIMEOUT = 1.5  # Of a question, for one broker: if it hangs there is time to ask another.
COMMIT_TIMEOUT = 5.0
PING_TIMEOUT = 3.0
# Together they bound a close by 5 s, whatever has happened to the brokers.
CLOSE_GRACE = 4.0
CLOSE_REST = 0.5
CLOSE_COMMIT_TIMEOUT = 3.0
SWEEP = 0.25  # How often appends are looked at that have waited too long.
RETRY_BACKOFF = 0.1
METADATA_AGE = 60.0
LOG_REPEAT = 60.0

FETCH_RECORDS = 500
PULL_RECORDS = 100  # Taken at a time by a member of a group: they cost the loop some 0.7 ms.
FETCH_BYTES = 1 << 20
PULL_BYTES = 128 << 10
"""Of each partition in one answer: what a tier doesn't take of it at once, it drops and fetches again."""
END_AGE = 1.0  # How old the ends may be by which the lag of paused partitions is told.
FETCH_WAIT = 0.1  # A partition that is resumed waits for the fetch under way: at most this long.
PULL = 1.0  # How long one wait for records lasts before the consumer's health is looked at.
SESSION = 45.0  # A blocked event loop sends no heartbeats; this much of it costs no rebalance.
HEARTBEAT = 3.0
REBALANCE = 60.0
POLL = 10 * 365 * 86400.0  # Whoever waits for an operator fetches nothing meanwhile; heartbeats tell that we live.
FETCH_TIMEOUT = 10.0  # A broker that hangs holds what it led for so long, although there is a new leader in seconds.
GROUP_REQUEST_TIMEOUT = 30.0  # But a coordinator answers a member that joins when all have joined.

CLIENT_ID = "gateway"  # Of whoever has no place of its own: the command line, say.
COMMIT_MARK = "gw1:"  # Offsets that another tool has set carry other metadata, or none: no bits.

EARLIEST, LATEST = -2, -1  # Of ListOffsets.
TOPIC = 2  # A resource type of DescribeConfigs.
REPLICAS = 3
LOG_APPEND_TIME = 1

FORBIDDEN = (ClusterAuthorizationFailedError, GroupAuthorizationFailedError, TopicAuthorizationFailedError)
MISCONFIGURED = (
    *FORBIDDEN,
    InvalidConfigurationError,
    InvalidReplicationFactorError,
    InvalidTopicError,
    PolicyViolationError,
)

T = TypeVar("T")

log = structlog.get_logger(__name__)


class KafkaLog:
    """A Kafka cluster as the log. Topics exist before they are used; see `create`."""

    max_record_bytes = BROKER_LIMIT - BATCH_OVERHEAD

    def __init__(self, servers: str, *, client_id: str, append_timeout: float) -> None:
        """For `open`, which also connects."""
        self._loop = asyncio.get_running_loop()
        self._servers = servers
        self._client_id = client_id
        self._append_timeout = append_timeout
        self._cluster = _Cluster(servers, client_id=client_id)
        self._producer = self._new_producer()
        self._clock = _BrokerClock()
        self._heard = 0.0
        self._joined: set[str] = set()
        self._places: dict[str, Sequence[TopicPartition]] = {}
        # Invariant: older appends stand first.
        self._pending: deque[tuple[float, asyncio.Future[Any]]] = deque()
        self._under_way = 0
        self._finished: asyncio.Event | None = None  # Set by the last append under way, once the log is being closed.
        self._sweeper: asyncio.TimerHandle | None = None
        self._failing_since: float | None = None
        self._replacing: asyncio.Task[None] | None = None
        self._topics_lock = asyncio.Lock()
        self._consumers: set[KafkaConsumer] = set()
        self._is_closed = False

    @classmethod
    async def open(
        cls, servers: str, *, client_id: str = CLIENT_ID, append_timeout: float = APPEND_TIMEOUT
    ) -> "KafkaLog":
        """Connect to `host:port,host:port`. Raises LogUnavailableError when none of them answers.

        A `client_id` of its own names the place of this process: whoever is a member of a group under it died there,
        and leaves the group when this one joins.
        """
        for name in [name for name in logging.root.manager.loggerDict if name.partition(".")[0] == "aiokafka"]:
            logging.getLogger(name).addFilter(_passes)
        logging.getLogger("asyncio").addFilter(_is_ours)
        opened = cls(servers, client_id=client_id, append_timeout=append_timeout)
        try:
            async with asyncio.timeout(QUESTION_TIMEOUT):
                await opened._cluster.start()
                await opened._producer.start()
        except (KafkaError, OSError, TimeoutError) as error:
            await opened.close()
            raise LogUnavailableError(
                f"kafka://{servers}: expected a broker that answers, got {_say(error)}"
            ) from error
        except BaseException:
            await opened.close()
            raise
        return opened

    async def append(self, topic: str, *, key: bytes, value: bytes, headers: RecordHeaders) -> Position:
        if len(value) > SURELY_FITS:
            self._refuse_if_too_large(topic, key, value, headers)
        if self._is_closed:
            raise LogUnavailableError(f"append to {topic}: expected an open log, got a closed one")
        self._under_way += 1
        started = self._loop.time()
        producer = self._producer
        try:
            places = self._places.get(topic)
            if places is None:
                places = self._places[topic] = await self._places_of(topic, producer)
            # crc32 instead of Java's murmur2, which costs 7 µs in Python.
            where = places[crc32(key) % len(places)]
            # producer.send does no more, for a topic and a partition that are known, but takes 3 µs for it.
            accumulator, patience = producer._message_accumulator, 0.8 * self._append_timeout
            future = await accumulator.add_message(where, key, value, patience, None, headers)
            self._pending.append((started, future))
            if self._sweeper is None:
                self._sweeper = self._loop.call_later(SWEEP, self._sweep)
            stored = await future
        except KafkaError as error:
            raise self._failed_append(topic, error) from error
        finally:
            self._under_way -= 1
            if self._finished is not None and not self._under_way:
                self._finished.set()
        self._failing_since = None
        at = stored.timestamp / 1000
        if at != self._heard and stored.timestamp_type == LOG_APPEND_TIME:  # One time for a whole batch.
            self._heard = at
            self._clock.heard(at)
        return Position(where.partition, stored.offset, at)

    async def consume(self, *, group: str | None, topics: Sequence[str], listener: Listener) -> "KafkaConsumer":
        """Join a group, or read everything. Raises UsageError for a topic that isn't there."""
        described = await self._cluster.describe(topics)
        for topic in topics:
            if topic not in described:
                raise UsageError(f"{topic}: expected a topic of the cluster, got none of this name")
        if group is not None and self._client_id != CLIENT_ID and group not in self._joined:
            # Once: what has our name after that is ourselves.
            self._joined.add(group)
            await self._cluster.evict(group, self._client_id)
        consumer = KafkaConsumer(
            cluster=self._cluster,
            clock=self._clock,
            new_consumer=lambda: self._new_consumer(group),
            group=group,
            topics=topics,
            listener=listener,
            siblings=self._consumers,
        )
        self._consumers.add(consumer)
        try:
            await consumer.start()
        except BaseException:
            await consumer.close()
            raise
        return consumer

    async def scan(self, partition: Partition, start: int, end: int) -> AsyncIterator[Sequence[Record]]:
        bounds = (await self.bounds(partition.topic)).get(partition.number)
        if bounds is None:
            return
        start, end = max(start, bounds[0]), min(end, bounds[1])
        if start >= end:
            return
        where = TopicPartition(*partition)
        kafka = self._new_consumer(None)
        try:
            with _translated(f"scan {partition.topic}/{partition.number}"):
                await kafka.start()
                kafka.assign([where])
                kafka.seek(where, start)
                moved_at = self._loop.time()
                while start < end:
                    # The position and not the last record tells the end: what follows it may be gaps.
                    async with asyncio.timeout(QUESTION_TIMEOUT):
                        found = await kafka.getmany(timeout_ms=1000 * FETCH_WAIT, max_records=FETCH_RECORDS)
                        position = await kafka.position(where)
                    for records in _slices(_records(found.get(where, ()))):
                        if within := [record for record in records if record.offset < end]:
                            yield within
                    if position > start:
                        start, moved_at = position, self._loop.time()
                    elif self._loop.time() > moved_at + QUESTION_TIMEOUT:
                        raise KafkaTimeoutError(f"no record after offset {start}")
        finally:
            await _stop(kafka)

    async def bounds(self, topic: str) -> Mapping[int, tuple[int, int]]:
        described = await self._cluster.describe([topic])
        partitions = [Partition(topic, number) for number in described.get(topic, {})]
        first = await self._cluster.offsets(partitions, EARLIEST)
        after_last = await self._cluster.offsets(partitions, LATEST)
        return {partition.number: (first[partition], after_last[partition]) for partition in partitions}

    async def offsets_at(self, topic: str, at: float) -> Mapping[int, int]:
        described = await self._cluster.describe([topic])
        partitions = [Partition(topic, number) for number in described.get(topic, {})]
        # The ends first: what is appended after they were asked for comes at or after them.
        after_last = await self._cluster.offsets(partitions, LATEST)
        # To the microsecond, so that the millisecond of a record's own `appended_at` isn't rounded up to the next one.
        found = await self._cluster.offsets(partitions, max(0, math.ceil(round(at * 1000, 3))))
        return {
            partition.number: after_last[partition] if found[partition] < 0 else found[partition]
            for partition in partitions
        }

    async def topics(self) -> Collection[str]:
        return await self._cluster.topics()

    async def topics_of(self, group: str) -> Collection[str]:
        return {partition.topic for partition in await self._cluster.commits(group)}

    async def committed(self, group: str, topic: str) -> Mapping[int, Commit]:
        described = await self._cluster.describe([topic])
        commits = await self._cluster.commits(group, [Partition(topic, number) for number in described.get(topic, {})])
        return {partition.number: commit for partition, commit in commits.items()}

    async def seed(self, group: str, commits: Mapping[Partition, Commit]) -> None:
        await self._cluster.seed(group, commits)

    async def groups(self, prefix: str) -> Mapping[str, int]:
        return await self._cluster.groups(prefix)

    async def forget(self, group: str) -> None:
        await self._cluster.forget(group)

    async def create(self, specs: Sequence[TopicSpec]) -> Sequence[str]:
        """Create what is missing, with three replicas where there are three brokers, and wait until it has leaders.

        Raises UsageError when the cluster forbids it.
        """
        created = await self._cluster.create(specs)
        await self._learn([spec.name for spec in specs])
        return created

    async def check(self, specs: Sequence[TopicSpec]) -> Sequence[TopicProblem]:
        """Compare what is there with what has to be. On a cluster of one broker, missing replicas aren't fatal."""
        await self._learn((await self._cluster.describe([spec.name for spec in specs])).keys())
        return await self._cluster.check(specs)

    def now(self) -> float:
        """Return the brokers' time, estimated from produce acknowledgements and records; this machine's before any."""
        return self._clock.now()

    async def ping(self) -> None:
        """Return when a broker answers. Raises LogUnavailableError within 3 s."""
        await self._cluster.ping()

    async def close(self) -> None:
        """Finish the appends under way, close the consumers that are still open, and let go, within 5 s."""
        self._is_closed = True
        closing = [consumer.close() for consumer in self._consumers]
        results = await asyncio.gather(*closing, self._close_producer(), return_exceptions=True)
        await self._cluster.close()
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _close_producer(self) -> None:
        if self._replacing is not None:
            self._replacing.cancel()
            await asyncio.wait({self._replacing})
        if self._under_way:
            # Also those that wait for metadata, or for room in a batch: aiokafka's stop would turn them away.
            self._finished = asyncio.Event()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_GRACE - 0.5):
                    await self._finished.wait()
        await _stop(self._producer, grace=0.5)
        for _, future in self._pending:
            if not future.done():
                future.set_exception(KafkaTimeoutError("the log was closed"))
        if self._sweeper is not None:
            self._sweeper.cancel()

    def _new_producer(self) -> AIOKafkaProducer:
        return AIOKafkaProducer(
            bootstrap_servers=self._servers,
            client_id=self._client_id,
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
            retry_backoff_ms=int(1000 * RETRY_BACKOFF),
            metadata_max_age_ms=int(1000 * METADATA_AGE),
        )

    def _new_consumer(self, group: str | None) -> AIOKafkaConsumer:
        consumer = AIOKafkaConsumer(
            bootstrap_servers=self._servers,
            client_id=self._client_id,
            group_id=group,
            auto_offset_reset="earliest",
            enable_auto_commit=False,
            fetch_max_wait_ms=int(1000 * FETCH_WAIT),
            fetch_max_bytes=16 * FETCH_BYTES,
            max_partition_fetch_bytes=FETCH_BYTES if group is None else PULL_BYTES,
            session_timeout_ms=int(1000 * SESSION),
            heartbeat_interval_ms=int(1000 * HEARTBEAT),
            rebalance_timeout_ms=int(1000 * REBALANCE),
            max_poll_interval_ms=int(1000 * POLL),
            request_timeout_ms=int(1000 * FETCH_TIMEOUT),
            retry_backoff_ms=int(1000 * RETRY_BACKOFF),
            metadata_max_age_ms=int(1000 * METADATA_AGE),
        )
        _be_patient_with_coordinators(consumer._client)
        return consumer

    def _refuse_if_too_large(self, topic: str, key: bytes, value: bytes, headers: RecordHeaders) -> None:
        size = len(key) + len(value) + sum([len(name.encode()) + len(text) for name, text in headers])
        if size > self.max_record_bytes:
            raise RecordTooLargeError(f"{topic}: expected a record of at most {self.max_record_bytes} B, got {size} B")

    async def _places_of(self, topic: str, producer: AIOKafkaProducer) -> Sequence[TopicPartition]:
        """Wait until the producer knows a topic. It never asks for one that isn't there: that would create it."""
        try:
            async with asyncio.timeout(self._append_timeout), self._topics_lock:
                known: Collection[int] | None = producer.client.cluster.partitions_for_topic(topic)
                if known is None:
                    if topic not in await self._cluster.describe([topic]):
                        raise UnknownTopicOrPartitionError(topic)
                    known = await producer.partitions_for(topic)
                return [TopicPartition(topic, number) for number in range(len(known))]
        except TimeoutError as error:
            raise KafkaTimeoutError("no metadata in time") from error

    async def _learn(self, topics: Iterable[str]) -> None:
        """Let the producer know topics that are there, so that the first append to each doesn't wait for metadata."""
        with _translated("metadata"):
            async with asyncio.timeout(QUESTION_TIMEOUT):
                await asyncio.gather(*[self._producer.partitions_for(topic) for topic in topics])

    def _sweep(self) -> None:
        """Fail the appends that have waited too long. One timer for all: a timeout for each costs 6 µs."""
        self._places.clear()  # A topic may have got more partitions.
        too_old = self._loop.time() - self._append_timeout + SWEEP
        self._pending = deque([entry for entry in self._pending if not entry[1].done()])
        for started, future in self._pending:
            if started > too_old:
                break
            # aiokafka passes over futures that are done when the batch gets its answer after all.
            future.set_exception(KafkaTimeoutError(f"no acknowledgement in {self._append_timeout:g} s"))
        self._sweeper = self._loop.call_later(SWEEP, self._sweep) if self._pending else None

    def _failed_append(self, topic: str, error: KafkaError) -> LogUnavailableError | RecordTooLargeError:
        if isinstance(error, (MessageSizeTooLargeError, RecordListTooLargeError)):
            return RecordTooLargeError(f"{topic}: {_say(error)}")
        now = self._loop.time()
        if self._failing_since is None:
            self._failing_since = now
        is_stuck = now - self._failing_since > self._append_timeout and not isinstance(
            error, UnknownTopicOrPartitionError
        )
        if self._replacing is None and not self._is_closed and (is_stuck or _has_died(self._producer)):
            self._replacing = asyncio.create_task(self._replace_producer(), name="kafka-producer-replaced")
        return LogUnavailableError(f"append to {topic}: expected an acknowledgement, got {_say(error)}")

    async def _replace_producer(self) -> None:
        """Put a new producer in the place of one that gets no answer; it starts from the servers as configured.

        aiokafka's sender ends for good on an error that it doesn't expect, and its client never looks beyond the
        brokers that it last knew.
        """
        producer = self._new_producer()
        try:
            await producer.start()
        except KafkaError:
            await _stop(producer)
            await asyncio.sleep(1)
        except asyncio.CancelledError:
            await _stop(producer)
            raise
        else:
            log.warning("log_producer_replaced")
            old, self._producer = self._producer, producer
            self._places.clear()
            self._failing_since = None
            await _stop(old)
        finally:
            self._replacing = None


class KafkaConsumer:
    """A member of a consumer group, or a reader of everything. `KafkaLog.consume` makes them.

    Await `fetch` from the task that acts on what it returns: its records belong to the partitions as assigned when it
    returns, and a rebalance may take them away whenever another task runs.
    """

    def __init__(
        self,
        *,
        cluster: "_Cluster",
        clock: "_BrokerClock",
        new_consumer: Callable[[], AIOKafkaConsumer],
        group: str | None,
        topics: Sequence[str],
        listener: Listener,
        siblings: "set[KafkaConsumer]",
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._cluster = cluster
        self._clock = clock
        self._new_consumer = new_consumer
        self._group = group
        self._topics = topics
        self._listener = listener
        self._siblings = siblings
        self._kafka = new_consumer()
        # What is assigned, and the offset after the last record that was taken out of aiokafka.
        self._next: dict[Partition, int] = {}
        # Invariant: what is held was taken under the present assignment; revoking it clears both.
        self._held: dict[Partition, deque[Sequence[Record]]] = {}
        self._paused: set[Partition] = set()
        # The ends of partitions as they were asked for, beside what fetches tell.
        self._ends: dict[Partition, int] = {}
        self._asking: asyncio.Task[None] | None = None
        self._asked_at = self._loop.time()
        self._pulling: asyncio.Task[None] | None = None
        self._failure: Exception | None = None
        self._assignments = 0
        self._giving_up = asyncio.Lock()
        self._committing = asyncio.Lock()
        self._closing = self._loop.create_future()

    async def start(self) -> None:
        """Connect, and join in the background, or read from the first offsets."""
        with _translated("consume"):
            async with asyncio.timeout(QUESTION_TIMEOUT):
                await self._kafka.start()
            if self._group is not None:
                self._kafka.subscribe(self._topics, listener=self)
                return
            described = await self._cluster.describe(self._topics)
            partitions = [Partition(topic, number) for topic in self._topics for number in described.get(topic, {})]
            assignments = await self._read_assignments(partitions)
            self._kafka.assign([TopicPartition(*partition) for partition in partitions])
            self._take_over(self._kafka, assignments)

    async def fetch(self, *, timeout: float) -> Sequence[Batch]:
        deadline = self._loop.time() + timeout
        self._ask_for_ends()
        assignments = self._assignments
        await asyncio.sleep(0)  # Others run, also when there is always something to return.
        while True:
            if self._failure is not None:
                raise self._failure
            if self._closing.done() or assignments != self._assignments:
                # The owner may act on a new assignment (pause some of it) before the first record.
                return ()
            if batches := self._take():
                return batches
            if self._pulling is None and self._next:
                # With partitions assigned and no timeout this waits for nothing.
                await self._pull(0)
                if batches := self._take():
                    return batches
            remaining = deadline - self._loop.time()
            if remaining <= 0:
                return ()
            # getmany doesn't keep its timeout during a rebalance; so it has a task, which may outlive this call.
            pulling = self._pulling or asyncio.create_task(self._pull(PULL), name=f"kafka-pull-{self._group}")
            self._pulling = pulling
            await asyncio.wait({pulling}, timeout=remaining)
            if pulling.done() and not self._closing.done():
                self._pulling = None
                pulling.result()

    def pause(self, partition: Partition) -> None:
        if partition in self._next:
            self._paused.add(partition)
            self._kafka.pause(TopicPartition(*partition))

    def resume(self, partition: Partition) -> None:
        if partition in self._paused:
            self._paused.discard(partition)
            self._kafka.resume(TopicPartition(*partition))

    async def commit(self, commits: Mapping[Partition, Commit]) -> None:
        await self._commit({partition: commit for partition, commit in commits.items() if partition in self._next})

    def lag(self) -> Mapping[Partition, int]:
        lags = {}
        for partition, position in self._next.items():
            end = max(self._kafka.highwater(TopicPartition(*partition)) or 0, self._ends.get(partition, 0))
            if end:
                held = sum([len(records) for records in self._held.get(partition, ())])
                lags[partition] = max(0, end - position) + held
        return lags

    async def close(self) -> None:
        """Revoke, commit and leave, within 5 s and what the listener takes. A log that is away takes no commit."""
        if self._closing.done():
            return
        self._closing.set_result(None)
        self._siblings.discard(self)
        started = self._loop.time()
        try:
            await self._give_up(CLOSE_COMMIT_TIMEOUT)
        finally:
            grace = max(0.5, started + CLOSE_GRACE - self._loop.time())
            await _stop(self._kafka, grace=grace)
            for task in (self._pulling, self._asking):
                if task is not None:
                    task.cancel()
                    await asyncio.wait({task})
            self._pulling = self._asking = None

    # What aiokafka calls. It logs and swallows their errors: ours are kept for fetch.

    async def on_partitions_revoked(self, _revoked: Iterable[TopicPartition]) -> None:
        try:
            await self._give_up()
        except Exception as error:  # noqa: BLE001 - raised by fetch, in the task of the consumer's owner
            self._failure = error

    async def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        kafka = self._kafka
        # First of all, and in the same step as the assignment: no record may come before its listener knows.
        kafka.pause(*assigned)
        partitions = sorted(Partition(*partition) for partition in assigned)
        reading = asyncio.create_task(self._read_assignments(partitions), name=f"kafka-commits-{self._group}")
        await asyncio.wait({reading, self._closing}, return_when=asyncio.FIRST_COMPLETED)
        if self._closing.done() or kafka is not self._kafka:
            reading.cancel()
            await asyncio.wait({reading})
            return
        try:
            self._take_over(kafka, reading.result())
        except Exception as error:  # noqa: BLE001 - raised by fetch, in the task of the consumer's owner
            self._failure = error

    async def _read_assignments(self, partitions: Sequence[Partition]) -> Sequence[Assignment]:
        """Ask where to go on, for as long as it takes."""
        while True:
            try:
                first = await self._cluster.offsets(partitions, EARLIEST)
                if self._group is None:
                    return [
                        Assignment(partition, Commit(first[partition]), first[partition]) for partition in partitions
                    ]
                after_last = await self._cluster.offsets(partitions, LATEST)
                commits = await self._cluster.commits(self._group, partitions)
            except LogUnavailableError as error:
                log.warning("log_commits_unread", group=self._group, error=str(error))
                continue
            assignments = []
            for partition in partitions:
                commit = commits.get(partition, Commit(first[partition]))
                if commit.base > after_last[partition]:
                    # Only an unclean leader election makes a log shorter. What was written since is below the base.
                    log.error("log_truncated", partition=partition, committed=commit.base, end=after_last[partition])
                    commit = Commit(first[partition])
                assignments.append(Assignment(partition, commit, first[partition]))
            return assignments

    def _take_over(self, kafka: AIOKafkaConsumer, assignments: Sequence[Assignment]) -> None:
        for partition, commit, log_start in assignments:
            self._next[partition] = max(commit.base, log_start)
            kafka.seek(TopicPartition(*partition), self._next[partition])
        self._assignments += 1
        self._listener.assigned(assignments)
        # The listener may have paused some already.
        kafka.resume(*[TopicPartition(*each.partition) for each in assignments if each.partition not in self._paused])

    async def _give_up(self, timeout: float = COMMIT_TIMEOUT) -> None:
        """Tell the listener that nothing is ours any more, and commit what it has finished."""
        async with self._giving_up:  # who closes waits for a revocation under way
            owned = list(self._next)
            self._next.clear()
            self._held.clear()
            self._paused.clear()
            self._ends.clear()
            if not owned:
                return
            commits = await self._listener.revoked(owned)
            try:
                mine = {partition: commit for partition, commit in commits.items() if partition in owned}
                await self._commit(mine, timeout)
            except LogUnavailableError as error:
                # The next owner repeats what was finished since the last commit.
                log.warning("log_commit_lost", group=self._group, error=str(error))

    async def _commit(self, commits: Mapping[Partition, Commit], timeout: float = COMMIT_TIMEOUT) -> None:
        if not commits or self._group is None:
            return
        offsets = {
            TopicPartition(*partition): (commit.base, _encode_done(commit.done))
            for partition, commit in commits.items()
        }
        # One after the other: aiokafka repeats one that failed with the same offsets, after another that was newer.
        with _translated(f"commit of {self._group}"):
            async with asyncio.timeout(timeout), self._committing:
                await self._kafka.commit(offsets)

    def _ask_for_ends(self) -> None:
        """Keep the ends of paused partitions fresh, for their lag: only a fetch would tell them."""
        is_under_way = self._asking is not None and not self._asking.done()
        if self._paused and not is_under_way and self._loop.time() >= self._asked_at + END_AGE:
            self._asked_at = self._loop.time()
            self._asking = asyncio.create_task(self._ask_ends(list(self._paused)), name=f"kafka-ends-{self._group}")

    async def _ask_ends(self, partitions: Sequence[Partition]) -> None:
        with contextlib.suppress(LogUnavailableError):  # the next time, then
            ends = await self._cluster.offsets(partitions, LATEST)
            self._ends = {partition: end for partition, end in ends.items() if partition in self._next}

    def _take(self) -> list[Batch]:
        batches = []
        for partition in list(self._held):
            if partition not in self._paused:
                slices = self._held[partition]
                batches.append(Batch(partition, slices.popleft()))
                if not slices:
                    del self._held[partition]
        return batches

    async def _pull(self, wait: float) -> None:
        """Take records out of aiokafka, where they count as consumed, in the step in which it returns them."""
        try:
            found = await self._kafka.getmany(timeout_ms=int(1000 * wait), max_records=PULL_RECORDS)
        except FORBIDDEN as error:
            self._failure = UsageError(f"{self._group or ', '.join(self._topics)}: {_say(error)}")
            return
        except KafkaError as error:
            if self._closing.done():
                return
            log.warning("log_fetch_failed", group=self._group, error=_say(error))
            # It may have dropped records on its way to the error.
            assigned = self._kafka.assignment()
            for partition, position in self._next.items():
                if partition in assigned:
                    self._kafka.seek(TopicPartition(*partition), position)
            found = {}
            await asyncio.sleep(RETRY_BACKOFF)
        for where, records in found.items():
            taken = _records(records)
            last = records[-1]
            self._next[Partition(*where)] = last.offset + 1
            # Behind what is held of it already, where it was paused before all of that was returned.
            self._held.setdefault(Partition(*where), deque()).extend(_slices(taken))
            if last.timestamp_type == LOG_APPEND_TIME:
                self._clock.seen(last.timestamp / 1000)
        if wait and not found and not self._closing.done() and _has_died(self._kafka):
            await self._replace()

    async def _replace(self) -> None:
        """Go on with a new consumer where a task of the old one has ended: it would be silent for ever."""
        log.error("log_consumer_replaced", group=self._group)
        positions = dict(self._next)
        if self._group is not None:
            await self._give_up()
        old, self._kafka = self._kafka, self._new_consumer()
        await _stop(old)
        while True:
            try:
                await self._kafka.start()
                break
            except KafkaError as error:
                log.warning("log_consumer_not_started", group=self._group, error=_say(error))
                await asyncio.sleep(1)
                await _stop(self._kafka)
                self._kafka = self._new_consumer()
        if self._group is not None:
            self._kafka.subscribe(self._topics, listener=self)
            return
        self._kafka.assign([TopicPartition(*partition) for partition in positions])
        for partition, position in positions.items():
            self._kafka.seek(TopicPartition(*partition), position)
        for partition in self._paused:
            self._kafka.pause(TopicPartition(*partition))


# aiokafka asks for an instance and nothing else; its class is untyped.
ConsumerRebalanceListener.register(KafkaConsumer)


class _Cluster:
    """What can be asked of the brokers, over a connection of its own: appends that wait for replicas don't delay it."""

    def __init__(self, servers: str, *, client_id: str) -> None:
        self._client = AIOKafkaClient(
            bootstrap_servers=servers,
            client_id=client_id,
            request_timeout_ms=int(1000 * REQUEST_TIMEOUT),
            retry_backoff_ms=int(1000 * RETRY_BACKOFF),
            metadata_max_age_ms=int(1000 * METADATA_AGE),
        )

    async def start(self) -> None:
        await self._client.bootstrap()

    async def close(self) -> None:
        await _stop(self._client)

    async def ping(self) -> None:
        with _translated("ping"):
            async with asyncio.timeout(PING_TIMEOUT):
                await self._send(MetadataRequest([], allow_auto_topic_creation=False))

    async def describe(self, topics: Iterable[str]) -> Mapping[str, Mapping[int, Sequence[int]]]:
        """Return the replicas of each partition of the topics that are there, once each has a leader."""
        names = sorted(set(topics))

        async def ask() -> Mapping[str, Mapping[int, Sequence[int]]]:
            response = await self._send(MetadataRequest(names, allow_auto_topic_creation=False))
            described = {}
            for code, topic, _, partitions in response.topics:
                error = for_code(code)
                if error is UnknownTopicOrPartitionError:
                    continue
                if error is not NoError:
                    raise error(topic)
                if any(leader < 0 for _, _, leader, *_ in partitions):
                    raise LeaderNotAvailableError(topic)
                described[topic] = {number: replicas for _, number, _, replicas, *_ in partitions}
            return described

        return await self._ask(f"metadata of {', '.join(names)}", ask) if names else {}

    async def topics(self) -> Collection[str]:
        """Return the names of all topics."""

        async def ask() -> Collection[str]:
            response = await self._send(MetadataRequest(None, allow_auto_topic_creation=False))
            return [topic for _, topic, *_ in response.topics]

        return await self._ask("topics", ask)

    async def offsets(self, partitions: Collection[Partition], at: int) -> Mapping[Partition, int]:
        """Return each partition's first offset (EARLIEST), the one after its last (LATEST), or the first at a time.

        A time is in milliseconds since the epoch; -1 stands for no record at or after it.
        """

        async def ask() -> Mapping[Partition, int]:
            names = sorted({partition.topic for partition in partitions})
            metadata = await self._send(MetadataRequest(names, allow_auto_topic_creation=False))
            leaders = {
                Partition(topic, number): leader
                for _, topic, _, described in metadata.topics
                for _, number, leader, *_ in described
            }
            by_leader: dict[int, dict[str, list[tuple[int, int]]]] = defaultdict(lambda: defaultdict(list))
            for partition in partitions:
                by_leader[leaders.get(partition, -1)][partition.topic].append((partition.number, at))
            found = {}
            for leader, topics in by_leader.items():
                response = await self._send(OffsetRequest(-1, 0, list(topics.items())), leader)
                for topic, answers in response.topics:
                    for number, code, _, offset in answers:
                        _raise_for(code, f"{topic}/{number}")
                        found[Partition(topic, number)] = offset
            return found

        return await self._ask("offsets", ask) if partitions else {}

    async def commits(self, group: str, partitions: Collection[Partition] | None = None) -> Mapping[Partition, Commit]:
        """Return what a group has committed, where it has: of these partitions, or of all."""
        by_topic: dict[str, list[int]] = defaultdict(list)
        for topic, number in partitions or ():
            by_topic[topic].append(number)
        wanted = None if partitions is None else list(by_topic.items())

        async def ask() -> Mapping[Partition, Commit]:
            coordinator = await self._client.coordinator_lookup(CoordinationType.GROUP, group)
            response = await self._send(OffsetFetchRequest(group, wanted), coordinator)
            _raise_for(getattr(response, "error_code", 0), group)
            commits = {}
            for topic, answers in response.topics:
                for number, offset, metadata, code in answers:
                    _raise_for(code, f"{topic}/{number}")
                    if offset >= 0:
                        commits[Partition(topic, number)] = Commit(offset, _decode_done(metadata or ""))
            return commits

        return await self._ask(f"commits of {group}", ask) if wanted != [] else {}

    async def seed(self, group: str, commits: Mapping[Partition, Commit]) -> None:
        """Commit as nobody's member, which Kafka takes as long as there is none."""

        async def ask() -> None:
            known = await self.commits(group, list(commits))
            topics: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
            for partition, (base, done) in commits.items():
                if partition not in known:
                    topics[partition.topic].append((partition.number, base, _encode_done(done)))
            if not topics:
                return
            coordinator = await self._client.coordinator_lookup(CoordinationType.GROUP, group)
            response = await self._send(OffsetCommitRequest(group, -1, "", -1, list(topics.items())), coordinator)
            for topic, answers in response.topics:
                for number, code in answers:
                    _raise_for(code, f"{topic}/{number}")

        await self._ask(f"first commits of {group}", ask)

    async def groups(self, prefix: str) -> Mapping[str, int]:
        async def ask() -> Mapping[str, int]:
            metadata = await self._send(MetadataRequest([], allow_auto_topic_creation=False))
            found: dict[str, int] = {}
            for broker in metadata.brokers:
                node = broker[0]
                listed = await self._send(ListGroupsRequest(), node)
                _raise_for(listed.error_code, "groups")
                names = [name for name, *_ in listed.groups if name.startswith(prefix)]
                if not names:
                    continue
                described = await self._send(DescribeGroupsRequest(names), node)
                for code, name, _, _, _, members, *_ in described.groups:
                    _raise_for(code, name)
                    found[name] = len(members)
            return found

        return await self._ask(f"groups of {prefix}", ask)

    async def forget(self, group: str) -> None:
        async def ask() -> None:
            coordinator = await self._client.coordinator_lookup(CoordinationType.GROUP, group)
            response = await self._send(DeleteGroupsRequest([group]), coordinator)
            for _, code in response.results:
                if for_code(code) is not GroupIdNotFound:
                    _raise_for(code, group)

        await self._ask(f"end of {group}", ask)

    async def evict(self, group: str, client_id: str) -> None:
        """Take a client's members out of a group.

        One that was killed would hold its partitions for a session, and a rebalance that it was joining for longer.
        """

        async def ask() -> None:
            coordinator = await self._client.coordinator_lookup(CoordinationType.GROUP, group)
            response = await self._send(DescribeGroupsRequest([group]), coordinator)
            for code, _, _, _, _, members, *_ in response.groups:
                _raise_for(code, group)
                for member in [identity for identity, client, *_ in members if client == client_id]:
                    await self._send(LeaveGroupRequest(group, member), coordinator)
                    log.info("log_predecessor_evicted", group=group, member=member)

        await self._ask(f"members of {group}", ask)

    async def create(self, specs: Sequence[TopicSpec]) -> Sequence[str]:
        present = await self.describe([spec.name for spec in specs])
        missing = {spec.name: spec for spec in specs if spec.name not in present}
        if not missing:
            return []
        created = []

        async def ask() -> None:
            metadata = await self._send(MetadataRequest([], allow_auto_topic_creation=False))
            replicas = min(REPLICAS, len(metadata.brokers))
            wanted: list[Any] = [
                (spec.name, spec.partitions, replicas, [], list(_topic_settings(spec, replicas).items()))
                for spec in missing.values()
            ]
            request = CreateTopicsRequest(wanted, int(1000 * QUESTION_TIMEOUT), validate_only=False)
            response = await self._send(request, metadata.controller_id)
            for topic, code, *message in response.topic_errors:
                error = for_code(code)
                if error is NoError:
                    created.append(topic)
                elif error is not TopicAlreadyExistsError:
                    raise error(f"{topic}: {message[0] if message else ''}")
                missing.pop(topic, None)

        await self._ask("create topics", ask)

        async def wait_for_leaders() -> None:
            described = await self.describe([spec.name for spec in specs])
            for spec in specs:
                if spec.name not in described:
                    raise UnknownTopicOrPartitionError(spec.name)

        await self._ask("leaders of new topics", wait_for_leaders)
        return created

    async def check(self, specs: Sequence[TopicSpec]) -> Sequence[TopicProblem]:
        described = await self.describe([spec.name for spec in specs])
        names = [spec.name for spec in specs if spec.name in described]
        settings: dict[str, dict[str, str]] = {}
        problems = []

        async def ask() -> int:
            metadata = await self._send(MetadataRequest([], allow_auto_topic_creation=False))
            if names:
                response = await self._send(DescribeConfigsRequest([(TOPIC, name, None) for name in names]))
                for code, _, _, name, entries in response.resources:
                    if for_code(code) not in FORBIDDEN:
                        _raise_for(code, name)
                        settings[name] = {entry[0]: entry[1] for entry in entries}
            return len(metadata.brokers)

        brokers = await self._ask("configuration of topics", ask)
        for spec in specs:
            if spec.name not in described:
                problems.append(TopicProblem(topic=spec.name, message="expected a topic, got none", is_fatal=True))
                continue
            replicas = min([len(nodes) for nodes in described[spec.name].values()], default=0)
            found = settings.get(spec.name)
            wrong = list(_replication_problems(replicas, found or {}, is_single_broker=brokers == 1))
            if found is None:
                wrong.append(
                    (False, "configuration: expected to be allowed to read it (DescribeConfigs), got a refusal")
                )
            else:
                wrong += [*_record_problems(found), *_retention_problems(spec, found)]
            problems += [
                TopicProblem(topic=spec.name, message=message, is_fatal=is_fatal) for is_fatal, message in wrong
            ]
        return problems

    async def _send(self, request: Request[Any], node: int | None = None) -> Any:  # noqa: ANN401 - built by version
        if node is None:
            node = self._client.get_random_node()
        try:
            return await self._client.send(node, request)
        except KeyError as error:
            # client.send, when the connection it waited on is already replaced.
            raise NodeNotReadyError(f"node {node}") from error

    async def _ask(self, what: str, ask: Callable[[], Awaitable[T]]) -> T:
        """Ask until there is an answer, for at most 5 s."""
        last: Exception | None = None
        try:
            async with asyncio.timeout(QUESTION_TIMEOUT):
                while True:
                    try:
                        return await ask()
                    except MISCONFIGURED as error:
                        raise UsageError(f"{what}: {_say(error)}") from error
                    except KafkaError as error:
                        last = error
                    await asyncio.sleep(RETRY_BACKOFF)
                    with contextlib.suppress(KafkaError):
                        # From the configured servers: brokers may have moved meanwhile, all of them.
                        await self._client.bootstrap()
        except TimeoutError as error:
            raise LogUnavailableError(f"{what}: expected an answer, got {_say(last or error)}") from (last or error)


class _BrokerClock:
    """The brokers' clock: this machine's monotonic clock and the lead over it that their timestamps show.

    A timestamp that arrives now was taken a moment ago, so each shows at least how far their clock is; the largest of
    the last half to whole minute is the estimate, and a step of their clock is forgotten after that.
    """

    WINDOW = 30.0

    def __init__(
        self, *, local: Callable[[], float] = time.time, monotonic: Callable[[], float] = time.monotonic
    ) -> None:
        self._monotonic = monotonic
        ticks = monotonic()
        self._lead = local() - ticks
        self._best = self._previous = -math.inf
        self._window_end = ticks + self.WINDOW
        self._told, self._told_at = 0.0, ticks

    def heard(self, at: float) -> None:
        """Take in the time of an acknowledgement that has just arrived."""
        ticks = self._monotonic()
        lead = at - ticks
        if ticks > self._window_end:
            self._window_end = ticks + self.WINDOW
            self._previous, self._best = self._best, lead
        elif lead > self._best:
            self._best = lead
        self._lead = max(self._best, self._previous)

    def seen(self, at: float) -> None:
        """Take in the time of a record, which may be old."""
        if at - self._monotonic() > self._lead:
            self.heard(at)

    def now(self) -> float:
        """Never goes back: where it was ahead it goes on at half speed until it isn't, so that waiting still ends."""
        ticks = self._monotonic()
        estimate = ticks + self._lead
        floor = self._told + (ticks - self._told_at) / 2
        self._told, self._told_at = max(estimate, floor), ticks
        return self._told


def _records(found: Iterable[ConsumerRecord[Any, Any]]) -> list[Record]:
    # A record of another client may have no key, or no value.
    return [Record(one.offset, one.timestamp / 1000, one.key or b"", one.value or b"", one.headers) for one in found]


def _slices(records: Sequence[Record]) -> Iterator[Sequence[Record]]:
    """Cut records at 1 MiB, but for a single larger one."""
    start = size = 0
    for index, (_, _, key, value, headers) in enumerate(records):
        more = len(key) + len(value) + sum([len(name) + len(text) for name, text in headers])
        if size + more > FETCH_BYTES and index > start:
            yield records[start:index]
            start, size = index, 0
        size += more
    if records:
        yield records[start:] if start else records


def _encode_done(done: bytes) -> str:
    return COMMIT_MARK + b64encode(done).decode() if done else ""


def _decode_done(metadata: str) -> bytes:
    if not metadata.startswith(COMMIT_MARK):
        return b""
    try:
        return b64decode(metadata.removeprefix(COMMIT_MARK), validate=True)
    except ValueError:
        return b""


def _topic_settings(spec: TopicSpec, replicas: int) -> Mapping[str, str]:
    settings = {
        "message.timestamp.type": "LogAppendTime",
        "max.message.bytes": str(BROKER_LIMIT),
        "cleanup.policy": "compact" if spec.compacted else "delete",
    }
    if not spec.compacted:
        settings["retention.ms"] = "-1" if spec.retention is None else str(int(1000 * spec.retention))
    if replicas == REPLICAS:
        settings["min.insync.replicas"] = "2"
    return settings


def _replication_problems(
    replicas: int, settings: Mapping[str, str], *, is_single_broker: bool
) -> Iterator[tuple[bool, str]]:
    """Yield (is it fatal, what is wrong)."""
    if replicas < REPLICAS:
        yield not is_single_broker, f"replication factor: expected at least {REPLICAS}, got {replicas}"
    in_sync = int(settings.get("min.insync.replicas", "2"))
    if in_sync < min(2, replicas):
        yield not is_single_broker, f"min.insync.replicas: expected at least 2, got {in_sync}"
    if in_sync > replicas and "min.insync.replicas" in settings:
        yield True, f"min.insync.replicas: expected at most the replication factor {replicas}, got {in_sync}"
    if settings.get("unclean.leader.election.enable") == "true":
        yield False, "unclean.leader.election.enable: expected false, got true, which may lose acknowledged records"


def _retention_problems(spec: TopicSpec, settings: Mapping[str, str]) -> Iterator[tuple[bool, str]]:
    """Yield (is it fatal, what is wrong)."""
    policies = settings.get("cleanup.policy", "delete").split(",")
    if ("compact" in policies) != spec.compacted:
        # Compaction would delete events that share a key; without it, pauses are forgotten.
        yield True, f"cleanup.policy: expected {'compact' if spec.compacted else 'delete'}, got {','.join(policies)}"
    if "delete" not in policies:
        return
    kept = int(settings.get("retention.ms", "-1"))
    if kept >= 0 and (spec.retention is None or kept < 1000 * spec.retention):
        wanted = "-1 (no limit)" if spec.retention is None else f"at least {1000 * spec.retention:.0f}"
        yield True, f"retention.ms: expected {wanted}, got {kept}"
    if (size := int(settings.get("retention.bytes", "-1"))) >= 0:
        yield False, f"retention.bytes: expected -1 (no limit), got {size}, which may delete what isn't delivered yet"


def _record_problems(settings: Mapping[str, str]) -> Iterator[tuple[bool, str]]:
    """Yield (is it fatal, what is wrong)."""
    if (kind := settings.get("message.timestamp.type")) != "LogAppendTime":
        yield True, f"message.timestamp.type: expected LogAppendTime, got {kind}"
    if (limit := int(settings.get("max.message.bytes", BROKER_LIMIT))) < BROKER_LIMIT:
        yield True, f"max.message.bytes: expected at least {BROKER_LIMIT}, got {limit}"


def _raise_for(code: int, what: str) -> None:
    error = for_code(code)
    if error is not NoError:
        raise error(what)


@contextlib.contextmanager
def _translated(what: str) -> Iterator[None]:
    try:
        yield
    except MISCONFIGURED as error:
        raise UsageError(f"{what}: {_say(error)}") from error
    except (KafkaError, KeyError, TimeoutError) as error:
        raise LogUnavailableError(f"{what}: expected an answer, got {_say(error)}") from error


_passed: dict[tuple[str, str], float] = {}


def _passes(line: logging.LogRecord) -> bool:
    """Tell whether a line of aiokafka's log is the first of its kind in a minute."""
    kind = line.name, str(line.msg)  # Before its values are put in: there are as many as calls in aiokafka's source.
    if line.created - _passed.get(kind, -math.inf) < LOG_REPEAT:
        return False
    _passed[kind] = line.created
    return True


def _is_ours(line: logging.LogRecord) -> bool:
    """Tell whether what asyncio complains of isn't what aiokafka leaves behind where we gave up waiting for it."""
    error = line.exc_info[1] if line.exc_info else None
    trace = error.__traceback__ if error is not None else None
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    is_within = trace is not None and "aiokafka" in trace.tb_frame.f_code.co_filename
    return not (isinstance(error, KafkaError) or is_within)


def _say(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _be_patient_with_coordinators(client: AIOKafkaClient) -> None:
    connect: Any = client._get_conn

    async def patient(node: int, *, group: int = ConnectionGroup.DEFAULT, no_hint: bool = False) -> Any:  # noqa: ANN401 - untyped there
        connection = await connect(node, group=group, no_hint=no_hint)
        if connection is not None and group == ConnectionGroup.COORDINATION:
            connection._request_timeout = GROUP_REQUEST_TIMEOUT
        return connection

    client._get_conn = patient  # type: ignore[method-assign] # there is no setting for it


def _has_died(user: AIOKafkaProducer | AIOKafkaConsumer) -> bool:
    """Tell whether a background task has ended, of which aiokafka tells nobody."""
    if isinstance(user, AIOKafkaProducer):
        tasks = [user.client._sync_task, user._sender.sender_task]
    else:
        coordination = getattr(user._coordinator, "_coordination_task", None)
        fetching = getattr(user._fetcher, "_fetch_task", None)
        tasks = [user._client._sync_task, fetching, coordination]
    return any(task is not None and task.done() for task in tasks)


async def _stop(user: AIOKafkaProducer | AIOKafkaConsumer | AIOKafkaClient, *, grace: float = CLOSE_GRACE) -> None:
    """Stop in order; after `grace` seconds, or where that fails, see that no connection and no task is left.

    aiokafka may wait for a broker for ever, and gives up halfway when a fetch of its own is being cancelled.
    """
    if isinstance(user, AIOKafkaClient):
        client, stopping = user, user.close()
    elif isinstance(user, AIOKafkaProducer):
        client, stopping = user.client, user.stop()
    else:
        client, stopping = user._client, user.stop()
    task = asyncio.create_task(stopping, name="kafka-stop")
    try:
        await asyncio.wait({task}, timeout=grace)
    finally:
        if isinstance(user, AIOKafkaProducer):
            user._message_accumulator.fail_all(KafkaTimeoutError("the log was closed"))
        if not task.done() or task.cancelled() or task.exception() is not None:
            for connection in client._conns.values():
                if connection._writer is not None:
                    connection._writer.transport.abort()  # A flush to a broker that hangs never ends.
            rest = {task, asyncio.create_task(client.close(), name="kafka-close")}
            await asyncio.wait(rest, timeout=CLOSE_REST)
            for each in rest:
                each.cancel()
            await asyncio.wait(rest)
