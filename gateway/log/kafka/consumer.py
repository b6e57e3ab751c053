"""A member of a consumer group, or a standalone reader, on top of an aiokafka consumer that may die."""
# ruff: noqa: SLF001 - nothing public sets the timeout of a single connection

import asyncio
import contextlib
import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any

import structlog
from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, ConsumerRecord, TopicPartition
from aiokafka.client import AIOKafkaClient, ConnectionGroup
from aiokafka.errors import (
    GroupAuthorizationFailedError,
    KafkaError,
    NoError,
    OffsetOutOfRangeError,
    TopicAuthorizationFailedError,
    for_code,
)
from aiokafka.protocol.fetch import FetchRequest

from gateway.log.base import (
    ALL,
    FETCH_BYTES,
    NO_TOPIC,
    Assignment,
    Batch,
    Commit,
    Listener,
    Partition,
    Record,
    RecordHeaders,
    are_of_different_topics,
)
from gateway.log.kafka.broker_clock import BrokerClock
from gateway.log.kafka.cluster import EARLIEST, LATEST, QUERY_TIMEOUT, Cluster
from gateway.log.kafka.commit_metadata import encode_metadata
from gateway.log.kafka.connection import CLOSE_GRACE, LOG_APPEND_TIME, RETRY_BACKOFF, Connection, has_died, stop
from gateway.log.kafka.errors import kafka_errors, message_of, translated_errors
from gateway.model import LogUnavailableError

COMMIT_TIMEOUT = 5.0
CLOSE_COMMIT_TIMEOUT = 3.0

PULL_RECORDS = 100  # Maximum records that are taken from aiokafka at a time: 0.7 ms of the event loop.
BACKLOG_RECORDS = (
    25  # The same of partitions with a backlog while the others receive records, so that these don't wait long.
)
PREFETCH_BACKOFF = 0.005
"""aiokafka's: seconds for which records that it has, and we haven't taken, keep it from fetching from their broker."""
FETCH_MAX_BYTES = 16 * FETCH_BYTES  # Of the response to a fetch, of all its partitions.
MAX_PARTITION_FETCH_BYTES = 128 << 10
"""Fetch size per partition for group members. When a tier is paused, aiokafka discards the rest of a fetch."""
MAX_END_AGE = 1.0  # Maximum age of the end offsets that the lag of paused partitions is computed from.
BOUNDS_INTERVAL = 10.0  # Seconds between checks whether the log's start has passed our positions.
FETCH_MAX_WAIT = 0.1  # A resumed partition waits for the fetch in flight: at most this long.
FAILED_RETRY_INTERVAL = 1.0  # Seconds before a partition is polled again whose records failed (such as a bad checksum).
ISOLATE_FOR = 3.0
"""Seconds after a failed fetch for which each partition is polled on its own. What fails for longer is reported."""
START_INTERVAL = 1.0  # Maximum seconds between attempts to take over unreadable partitions.
JOIN_GRACE = 10.0  # A rebalance normally ends within this time.
METADATA_INTERVAL = 0.1  # Minimum seconds between a client's metadata requests.
PULL_TIMEOUT = 1.0  # Maximum wait for records before checking whether the consumer has died.
SESSION_TIMEOUT = 45.0  # A blocked event loop sends no heartbeats; it may be blocked this long without a rebalance.
HEARTBEAT_INTERVAL = 1.0  # Members learn of a rebalance by heartbeat, and all wait for the slowest.
REBALANCE_TIMEOUT = 60.0
MAX_POLL_INTERVAL = 10 * 365 * 86400.0  # A member that waits for an operator fetches nothing, and is still alive.
REQUEST_TIMEOUT = 10.0
"""A hanging broker blocks the partitions that it led for so many seconds, despite a new leader."""
GROUP_REQUEST_TIMEOUT = 30.0  # A coordinator responds to a joining member only when all have joined.
REJOIN_INTERVAL = 5.0  # Seconds between attempts to join a group that refuses us.
FORBIDDEN_TOPIC = "not authorized to describe this topic"
REPLACED = "reconnecting after its consumer failed"
VALUE_OF = itemgetter(1)

_HANDLED = {NoError.errno, OffsetOutOfRangeError.errno, TopicAuthorizationFailedError.errno}
"""Error codes of a partition in a fetch response that mean success, or that reach us by another path."""

logger = structlog.get_logger(__name__)


class KafkaConsumer:
    """A member of a consumer group, or a standalone reader. Created by `KafkaLog.consume`.

    Await `fetch` from the task that acts on its records: they belong to partitions that are assigned when it returns,
    and a rebalance may revoke those whenever another task runs.
    """

    def __init__(
        self,
        *,
        cluster: Cluster,
        clock: BrokerClock,
        connection: Connection,
        group: str | None,
        topics: Sequence[str],
        listener: Listener,
        starts: Mapping[Partition, int],
        open_consumers: "set[KafkaConsumer]",
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._cluster = cluster
        self._clock = clock
        self._connection = connection
        self._group = group
        self._topics = topics
        self._listener = listener
        self._starts = starts
        self._open_consumers = open_consumers
        self._kafka = self._new_kafka_consumer()
        # Whether it replaces a consumer that has failed, and hasn't been subscribed or assigned yet.
        self._is_replacing = False
        # Assigned partition → offset after the last record that was taken from aiokafka.
        self._positions: dict[Partition, int] = {}
        # Invariant: buffered records were taken under the current assignment; a revocation clears both.
        self._buffered: dict[Partition, deque[Sequence[Record]]] = {}
        self._paused: set[Partition] = set()
        # Partitions with more unread records than we take at a time, and when we last found records in the others.
        self._behind: set[TopicPartition] = set()
        self._found_recent_at = -math.inf
        # When records of a partition last failed, and until when every partition is polled on its own because of that.
        self._failed_at: dict[TopicPartition, float] = {}
        self._isolated_until = -math.inf
        # Partition → when its records first failed (none was taken since), and why.
        self._failing: dict[Partition, tuple[float, str]] = {}
        # Partition → since when its broker has answered with an error, or with nothing though there is some, and why.
        self._unanswered: dict[Partition, tuple[float, str]] = {}
        # Partitions that are being revoked: ours until the listener has released them.
        self._leaving: Collection[Partition] = ()
        # Assigned partitions that restart at their first record: nothing about the records before may be committed.
        self._resetting: Collection[Partition] = ()
        # Topics that we may not read, why, and when that was last refused: tried again at each check of the bounds.
        self._forbidden: dict[str, tuple[str, float]] = {}
        # Assigned partitions whose position isn't known yet, and why.
        self._without_position: dict[Partition, str] = {}
        self._position_task: asyncio.Task[None] | None = None
        # Since when we haven't been a member of the group, if there is one.
        self._unjoined_since = None if group is None else self._loop.time()
        # Partition → id of the topic whose records we read, as of its assignment or last reset.
        self._topic_ids: dict[Partition, str] = {}
        # End offsets that were polled, in addition to those that fetches report.
        self._ends: dict[Partition, int] = {}
        self._bounds_task: asyncio.Task[None] | None = None
        self._ends_polled_at = self._bounds_polled_at = self._loop.time()
        self._pull_task: asyncio.Task[None] | None = None
        self._failure: Exception | None = None
        self._takeovers = 0
        self._revoke_lock = asyncio.Lock()
        self._commit_lock = asyncio.Lock()
        self._closing = self._loop.create_future()

    async def start(self) -> None:
        """Connect, and join the group in the background. Without one, read from `starts`, or the first offsets."""
        with translated_errors("consume"):
            async with asyncio.timeout(QUERY_TIMEOUT):
                await self._start_client()
            if self._group is not None:
                self._kafka.subscribe(self._topics, listener=self)
                return
            described = await self._cluster.describe(self._topics)
            partitions = [Partition(topic, number) for topic in self._topics for number in described.get(topic, {})]
            first = await self._cluster.offsets(partitions, EARLIEST)
            assignments = [
                Assignment(partition, Commit(self._starts.get(partition, first[partition])), first[partition])
                for partition in partitions
            ]
            self._kafka.assign([TopicPartition(*partition) for partition in partitions])
            async with asyncio.timeout(QUERY_TIMEOUT):
                await self._kafka._client._maybe_wait_metadata()  # otherwise no partition would seem to have a leader
            self._take_over(self._kafka, assignments)

    async def _start_client(self) -> None:
        await self._kafka.start()
        fetcher: Any = self._kafka._fetcher
        fetcher._prefetch_backoff = PREFETCH_BACKOFF

    def _new_kafka_consumer(self) -> AIOKafkaConsumer:
        consumer = new_consumer(self._connection, self._group)
        _intercept_fetch_responses(consumer._client, self._on_fetch_response)
        return consumer

    async def fetch(self, *, timeout: float, max_bytes: int = FETCH_BYTES) -> Sequence[Batch]:
        max_bytes = min(max_bytes, FETCH_BYTES)
        deadline = self._loop.time() + timeout
        self._poll_bounds()
        takeovers = self._takeovers
        await asyncio.sleep(0)  # Other tasks run, even if there is always something to return.
        while True:
            if self._failure is not None:
                raise self._failure
            if self._closing.done() or takeovers != self._takeovers:
                # The listener may act on a new assignment (pause some of it) before the first record.
                return ()
            if batches := self._take_buffered(max_bytes):
                return batches
            # A dead consumer is replaced by the pull below alone; it might return records here until a leader changes.
            is_alive = not has_died(self._kafka)
            if self._pull_task is None and self._positions and is_alive:
                # With partitions assigned and a timeout of 0, this doesn't wait for records.
                await self._pull(0)
                if batches := self._take_buffered(max_bytes):
                    return batches
            remaining = deadline - self._loop.time()
            if remaining <= 0:
                return ()
            # getmany ignores its timeout during a rebalance; so it has a task, which may outlive this call.
            pulling = self._pull_task or asyncio.create_task(self._pull(PULL_TIMEOUT), name=f"kafka-pull-{self._group}")
            self._pull_task = pulling
            await asyncio.wait({pulling}, timeout=remaining)
            if pulling.done() and not self._closing.done():
                self._pull_task = None
                pulling.result()

    def pause(self, partition: Partition) -> None:
        if partition in self._positions:
            self._paused.add(partition)
            if partition in self._kafka.assignment():  # otherwise `_replace_consumer` pauses it
                self._kafka.pause(TopicPartition(*partition))

    def resume(self, partition: Partition) -> None:
        if partition in self._paused:
            self._paused.discard(partition)
            if partition in self._kafka.assignment():
                self._kafka.resume(TopicPartition(*partition))

    async def commit(self, commits: Mapping[Partition, Commit]) -> None:
        for partition in self._resetting:
            if partition in commits:
                raise LogUnavailableError(
                    f"commit of {self._group}: {partition.topic}/{partition.number} is being reset"
                )
        mine = self._positions.keys() | self._leaving
        await self._commit({partition: commit for partition, commit in commits.items() if partition in mine})

    def lag(self) -> Mapping[Partition, int]:
        unreadable = self.unreadable()
        assigned = self._kafka.assignment()  # a replacement without a group has none until it has started
        lags = {}
        for partition, position in self._positions.items():
            if partition not in assigned:
                continue
            highwater, end = self._kafka.highwater(TopicPartition(*partition)), self._ends.get(partition)
            is_known = highwater is not None or end is not None
            if is_known and not unreadable.keys() & {partition, Partition(partition.topic, ALL)}:
                buffered = sum([len(records) for records in self._buffered.get(partition, ())])
                lags[partition] = max(0, max(highwater or 0, end or 0) - position) + buffered
        return lags

    def unreadable(self) -> Mapping[Partition, str]:
        if self._is_replacing and self._group is None:
            return dict.fromkeys(self._positions, REPLACED)
        return {**self._unreadable_partitions(), **self._unreadable_topics()}

    def _unreadable_partitions(self) -> dict[Partition, str]:
        known = self._kafka._client.cluster
        unreadable = dict(self._without_position)
        for partition in self._positions:
            leader = known.leader_for_partition(TopicPartition(*partition))
            is_missing = known.partitions_for_topic(partition.topic) is None
            if not is_missing and (leader is None or leader < 0):
                unreadable[partition] = "no leader"
            if partition.topic in self._forbidden:
                unreadable[partition], _ = self._forbidden[partition.topic]
        for partition, (since, reason) in (*self._failing.items(), *self._unanswered.items()):
            if self._loop.time() >= since + ISOLATE_FOR:
                unreadable.setdefault(partition, reason)
        return unreadable

    def _unreadable_topics(self) -> dict[Partition, str]:
        known = self._kafka._client.cluster
        unreadable = {}
        for topic in self._topics:
            numbers = known.partitions_for_topic(topic)
            if self._unjoined_since is not None:
                if self._loop.time() > self._unjoined_since + JOIN_GRACE:
                    unreadable[Partition(topic, ALL)] = "the group can't be joined"
            elif numbers is None:
                is_forbidden = topic in known.unauthorized_topics
                unreadable[Partition(topic, ALL)] = FORBIDDEN_TOPIC if is_forbidden else NO_TOPIC
            elif self._group is None:
                for number in numbers - {partition.number for partition in self._positions if partition.topic == topic}:
                    unreadable[Partition(topic, number)] = "added after the start; not read yet"
        return unreadable

    async def close(self) -> None:
        """Revoke, commit and leave, within 5 s plus the listener's time; commits nothing if Kafka is unreachable."""
        if self._closing.done():
            return
        self._closing.set_result(None)
        self._open_consumers.discard(self)
        started = self._loop.time()
        try:
            await self._revoke(CLOSE_COMMIT_TIMEOUT)
        finally:
            grace = max(0.5, started + CLOSE_GRACE - self._loop.time())
            await stop(self._kafka, grace=grace)
            for task in (self._pull_task, self._bounds_task, self._position_task):
                if task is not None:
                    task.cancel()
                    await asyncio.wait({task})
            self._pull_task = self._bounds_task = self._position_task = None

    # Callbacks of aiokafka. It logs and swallows their errors, so `fetch` raises them.

    async def on_partitions_revoked(self, _revoked: Iterable[TopicPartition]) -> None:
        try:
            await self._revoke()
        except Exception as error:  # noqa: BLE001 - raised by fetch, in the task that calls it
            self._failure = error

    async def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        # First of all, and without awaiting: no record may be fetched before the listener knows of the assignment.
        self._kafka.pause(*assigned)
        self._unjoined_since = None
        self._without_position = dict.fromkeys(
            sorted(Partition(*partition) for partition in assigned), "offsets not fetched yet"
        )
        has_tried_once = self._loop.create_future()
        self._position_task = asyncio.create_task(
            self._find_positions(has_tried_once), name=f"kafka-start-{self._group}"
        )
        await asyncio.wait({has_tried_once, self._closing}, return_when=asyncio.FIRST_COMPLETED)

    async def _find_positions(self, has_tried_once: asyncio.Future[None]) -> None:
        """Find the positions, and take over the partitions that can be read now; the others as soon as they can."""
        kafka, wait = self._kafka, RETRY_BACKOFF
        try:
            while self._without_position or not has_tried_once.done():
                assignments = await self._read_assignments(list(self._without_position))
                for each in assignments:
                    del self._without_position[each.partition]
                self._take_over(kafka, assignments)
                if not has_tried_once.done():
                    has_tried_once.set_result(None)
                await asyncio.sleep(wait)
                wait = min(START_INTERVAL, 2 * wait)
        except Exception as error:  # noqa: BLE001 - raised by fetch, in the task that calls it
            self._failure = error
        finally:
            if not has_tried_once.done():
                has_tried_once.set_result(None)

    async def _read_assignments(self, partitions: Sequence[Partition]) -> Sequence[Assignment]:
        """Query the positions once; partitions whose position can't be found are omitted, and the reason is kept."""
        assert self._group is not None
        try:
            starts, no_start = await self._cluster.offsets_with_leader(partitions, EARLIEST)
            ends, no_end = await self._cluster.offsets_with_leader(list(starts), LATEST)
            commits = await self._cluster.commits(self._group, list(ends))
        except LogUnavailableError as error:
            logger.warning("log_commits_unavailable", group=self._group, error=str(error))
            self._without_position = dict.fromkeys(self._without_position, str(error))
            return []
        self._without_position.update(no_start)
        self._without_position.update(no_end)
        assignments = []
        for partition, end in ends.items():
            commit = commits.get(partition)
            topic_id = self._cluster.topic_ids.get(partition.topic, "")
            is_stale = commit is not None and (commit.base > end or are_of_different_topics(commit.topic_id, topic_id))
            if commit is not None and is_stale:
                # The topic was recreated or truncated: by this commit, its new records below the base would be skipped.
                _log_restart(partition, commit.base, end, commit.topic_id, topic_id)
                commit = None
            start = starts[partition]
            assignments.append(
                Assignment(
                    partition,
                    Commit(start) if commit is None else commit._replace(topic_id=""),
                    start,
                    commit is not None,
                    is_stale,
                    topic_id,
                )
            )
        return assignments

    def _take_over(self, kafka: AIOKafkaConsumer, assignments: Sequence[Assignment]) -> None:
        for assignment in assignments:
            partition = assignment.partition
            self._topic_ids[partition] = assignment.topic_id
            self._positions[partition] = max(assignment.commit.base, assignment.log_start)
            kafka.seek(TopicPartition(*partition), self._positions[partition])
        self._takeovers += 1
        self._listener.assigned(assignments, list(self._without_position))
        # The listener may have paused some already.
        kafka.resume(*[TopicPartition(*each.partition) for each in assignments if each.partition not in self._paused])

    async def _revoke(self, timeout: float = COMMIT_TIMEOUT) -> None:
        """Notify the listener that nothing is assigned any more, and commit what is done."""
        async with self._revoke_lock:  # `close` waits for a revocation in progress
            if self._position_task is not None:
                self._position_task.cancel()
            if self._unjoined_since is None:
                self._unjoined_since = self._loop.time()
            self._without_position.clear()
            owned = list(self._positions)
            self._positions.clear()
            self._buffered.clear()
            self._behind.clear()
            self._failed_at.clear()
            self._failing.clear()
            self._unanswered.clear()
            self._paused.clear()
            self._ends.clear()
            if not owned:
                return
            self._leaving = owned
            try:
                commits = await self._listener.revoked(owned)
            finally:
                self._leaving = ()
            try:
                mine = {partition: commit for partition, commit in commits.items() if partition in owned}
                await self._commit(mine, timeout)
            except LogUnavailableError as error:
                # The next owner repeats what was done since the last commit.
                logger.warning("log_commit_lost", group=self._group, error=str(error))

    async def _commit(self, commits: Mapping[Partition, Commit], timeout: float = COMMIT_TIMEOUT) -> None:
        if self._group is None:
            return
        offsets = {}
        for partition, commit in commits.items():
            metadata = encode_metadata(commit._replace(topic_id=self._topic_ids.get(partition, "")))
            offsets[TopicPartition(*partition)] = commit.base, metadata
        # Commits are serialised, and a revocation with nothing to commit waits for the one in flight: aiokafka retries
        # a failed commit with its old offsets, even after a newer one and in the next generation.
        with translated_errors(f"commit of {self._group}"):
            async with asyncio.timeout(timeout), self._commit_lock:
                if offsets:
                    await self._kafka.commit(offsets)

    def _poll_bounds(self) -> None:
        """Poll the end offsets of paused partitions, for their lag: without a fetch they are unknown.

        And check now and then whether unread records were deleted, or the topic was recreated.
        """
        is_under_way = self._bounds_task is not None and not self._bounds_task.done()
        now = self._loop.time()
        if is_under_way or not self._positions or now < self._ends_polled_at + MAX_END_AGE:
            return
        self._ends_polled_at = now
        checks_bounds = now >= self._bounds_polled_at + BOUNDS_INTERVAL
        if checks_bounds:
            self._bounds_polled_at = now
            self._try_forbidden()
        if checks_bounds or self._paused:
            polling = self._check_bounds() if checks_bounds else self._poll_ends(list(self._paused))
            self._bounds_task = asyncio.create_task(polling, name=f"kafka-bounds-{self._group}")

    async def _poll_ends(self, partitions: Sequence[Partition]) -> None:
        with contextlib.suppress(LogUnavailableError):  # retried at the next poll
            ends, _ = await self._cluster.offsets_with_leader(partitions, LATEST)
            self._ends = {partition: end for partition, end in ends.items() if partition in self._positions}

    async def _check_bounds(self) -> None:
        """Compare the bounds of all partitions with our positions."""
        positions = dict(self._positions)
        with contextlib.suppress(LogUnavailableError):  # retried at the next poll
            first, _ = await self._cluster.offsets_with_leader(list(positions), EARLIEST)
            ends, _ = await self._cluster.offsets_with_leader(list(first), LATEST)
            self._ends = {partition: end for partition, end in ends.items() if partition in self._positions}
            # The position was copied before the end was queried, so an end below it means that records we have read
            # are gone.
            ids = self._cluster.topic_ids
            await self._reset(
                [
                    each
                    for each, end in ends.items()
                    if end < positions[each]
                    or are_of_different_topics(self._topic_ids.get(each, ""), ids.get(each.topic, ""))
                ]
            )
            for partition, start in first.items():
                if self._skip_deleted(partition, start):
                    self._kafka.seek(TopicPartition(*partition), start)

    def _set_aside(self, error: TopicAuthorizationFailedError) -> None:
        """Fetch nothing of a topic that we may not read until the next check: each try would delay the others."""
        topic = next(iter(error.args), None)
        where = [each for each in self._kafka.assignment() if each.topic == topic]
        if where:
            self._forbidden[where[0].topic] = message_of(error), self._loop.time()
            self._kafka.pause(*where)

    def _try_forbidden(self) -> None:
        """Fetch again what we weren't allowed to read at the last check; forget topics that weren't refused again."""
        now = self._loop.time()
        for topic, (_, at) in list(self._forbidden.items()):
            self._kafka.resume(
                *[
                    each
                    for each in self._kafka.assignment()
                    if each.topic == topic and Partition(*each) in self._positions.keys() - self._paused
                ]
            )
            if now > at + 1.5 * BOUNDS_INTERVAL:
                del self._forbidden[topic]

    def _skip_deleted(self, partition: Partition, log_start: int) -> bool:
        """If the log has deleted records after our position: go on at its start, and notify the listener of them."""
        position = self._positions.get(partition)
        if position is None or position >= log_start:
            return False
        self._failing.pop(partition, None)
        self._unanswered.pop(partition, None)
        if self._group is None:
            return False
        self._positions[partition] = log_start
        self._listener.records_deleted(partition, range(position, log_start))
        return True

    async def _reset(self, partitions: Sequence[Partition]) -> None:
        """Restart at the first record of partitions whose records aren't those that we have read."""
        takeovers = self._takeovers
        if self._group is None or self._revoke_lock.locked():
            return  # without a group nothing is committed; after a revocation, the next owner checks, too
        async with self._revoke_lock:  # a revocation may have acquired it first
            mine = [partition for partition in partitions if partition in self._positions]
            if not mine or takeovers != self._takeovers:
                return
            self._resetting = mine
            try:
                await self._restart(mine)
            finally:
                self._resetting = ()

    async def _restart(self, mine: Sequence[Partition]) -> None:
        """Restart these partitions of ours: query their first offsets, commit those, and notify the listener."""
        positions = {partition: self._positions.pop(partition) for partition in mine}
        buffered = {partition: self._buffered.pop(partition) for partition in mine if partition in self._buffered}
        self._kafka.pause(*[TopicPartition(*partition) for partition in mine])
        try:
            first, _ = await self._cluster.offsets_with_leader(mine, EARLIEST)
        except LogUnavailableError:
            first = {}
        for partition in positions.keys() - first.keys():  # retried at the next check
            self._positions[partition] = positions[partition]
            self._kafka.seek(TopicPartition(*partition), positions[partition])
            if partition in buffered:
                self._buffered[partition] = buffered[partition]
        former = {partition: self._topic_ids.get(partition, "") for partition in first}
        self._topic_ids.update({each: self._cluster.topic_ids.get(each.topic, "") for each in first})
        is_stale = True
        try:
            # An older commit would make the next owner skip the new records.
            await self._commit({partition: Commit(start) for partition, start in first.items()})
            is_stale = False
        except LogUnavailableError as error:
            logger.warning("log_commit_lost", group=self._group, error=str(error))
        for partition, start in first.items():
            topic_id = self._topic_ids[partition]
            _log_restart(partition, positions[partition], start, former[partition], topic_id)
            self._ends.pop(partition, None)
            self._failing.pop(partition, None)
            self._unanswered.pop(partition, None)
            self._paused.discard(partition)
            self._positions[partition] = start
            self._kafka.seek(TopicPartition(*partition), start)
            self._listener.restarted(Assignment(partition, Commit(start), start, is_stale=is_stale, topic_id=topic_id))
        self._kafka.resume(*[TopicPartition(*each) for each in mine if each not in self._paused])

    def _take_buffered(self, max_bytes: int) -> list[Batch]:
        batches = []
        for partition in list(self._buffered):
            if partition not in self._paused:
                pulled = self._buffered[partition]
                first = next(slices_of(pulled[0], max_bytes))
                if len(first) < len(pulled[0]):
                    pulled[0] = pulled[0][len(first) :]
                else:
                    pulled.popleft()
                batches.append(Batch(partition, first))
                if not pulled:
                    del self._buffered[partition]
        return batches

    async def _pull(self, wait: float) -> None:
        """Take records from aiokafka and advance our position, except at gaps without awaiting in between.

        As soon as it returns them, aiokafka counts them as consumed. It returns records in the order in which it
        fetched them, so new ones would wait behind a backlog: we ask for partitions without a backlog first.
        """
        found = 0
        max_records = PULL_RECORDS
        now = self._loop.time()
        try:
            if now < self._isolated_until:
                await self._pull_each_partition(wait)
            else:
                if self._behind and (others := self._kafka.assignment() - self._behind):
                    if found := await self._take(others, 0):
                        self._found_recent_at = now
                    max_records = BACKLOG_RECORDS if now < self._found_recent_at + 1.0 else PULL_RECORDS
                await self._take((), 0 if found else wait, max_records)
        except KafkaError as error:
            if self._closing.done():
                return
            if isinstance(error, GroupAuthorizationFailedError) and wait:
                await self._rejoin_later(error)
                return
            logger.warning("log_fetch_failed", group=self._group, error=message_of(error))
            self._handle_fetch_error(error, self._kafka.assignment())
            await asyncio.sleep(RETRY_BACKOFF)
        if wait and not self._closing.done() and has_died(self._kafka):
            await self._recreate_consumer()

    async def _pull_each_partition(self, wait: float) -> None:
        """Poll each partition on its own, and leave those that fail alone for a while.

        If one partition of a joint `getmany` fails, aiokafka discards the records that it had already taken from
        others, doesn't reach those behind it, and doesn't say which one failed. Within the failing partition it also
        discards the good records before the bad one: so a partition that failed lately is polled a record at a time.
        """
        found = 0
        fetcher: Any = self._kafka._fetcher
        # aiokafka removes an empty partition, and adds it at the end once it has fetched more: so backlogs take turns.
        for each in sorted(fetcher._records, key=self._behind.__contains__):
            if found < PULL_RECORDS and self._is_sound(each):
                max_records = 1 if self._has_failed(each, ISOLATE_FOR) else PULL_RECORDS - found
                try:
                    found += await self._take([each], 0, max_records)
                except GroupAuthorizationFailedError:
                    raise
                except KafkaError as error:
                    self._note_failure(each, error)
                    self._handle_fetch_error(error, [each])
        if wait and not found and not any(map(self._is_sound, fetcher._records)):
            # A `getmany` that waits would return records of any partition, of the failing ones, too.
            with kafka_errors(), contextlib.suppress(TimeoutError):
                kafka: Any = self._kafka
                kafka._coordinator.check_errors()
                await asyncio.wait_for(fetcher._create_fetch_waiter(), min(wait, FAILED_RETRY_INTERVAL / 2))

    def _is_sound(self, partition: TopicPartition) -> bool:
        """Return whether a partition is assigned and hasn't failed just now."""
        return partition in self._kafka.assignment() and not self._has_failed(partition, FAILED_RETRY_INTERVAL)

    def _has_failed(self, partition: TopicPartition, seconds: float) -> bool:
        """Return whether records of a partition have failed within the last `seconds`."""
        return self._failed_at.get(partition, -math.inf) >= self._loop.time() - seconds

    async def _take(self, partitions: Collection[TopicPartition], wait: float, max_records: int = PULL_RECORDS) -> int:
        """Take at most `max_records` of these partitions, or of all, from aiokafka; return how many there were."""
        with kafka_errors():
            found = await self._kafka.getmany(*partitions, timeout_ms=int(1000 * wait), max_records=max_records)
        jumped = {}
        for where, records in found.items():
            partition = Partition(*where)
            self._failing.pop(partition, None)
            if (self._kafka.highwater(where) or 0) > records[-1].offset + PULL_RECORDS:
                self._behind.add(where)
            else:
                self._behind.discard(where)
            if records[0].offset == self._positions.get(partition):
                self._buffer(partition, records)
            else:
                jumped[partition] = records
        if jumped:
            await self._handle_gaps(jumped)
        return sum(map(len, found.values()))

    def _note_failure(self, where: TopicPartition, error: KafkaError) -> None:
        """Note that the next records of a partition have failed, and log it unless those before have, too."""
        self._failed_at[where] = now = self._loop.time()
        partition = Partition(*where)
        if partition not in self._failing or isinstance(error, TopicAuthorizationFailedError):
            logger.warning("log_fetch_failed", group=self._group, partition=partition, error=message_of(error))
        if partition in self._positions and not isinstance(error, TopicAuthorizationFailedError):
            since, _ = self._failing.get(partition, (now, ""))
            self._failing[partition] = since, f"its records from {self._positions[partition]} on: {message_of(error)}"

    def _on_fetch_response(self, request: Any, response: Any) -> None:  # noqa: ANN401 - untyped there
        """Note partitions that a broker returns an error for, which aiokafka only logs, or nothing though it has some.

        A broker returns nothing for a record whose size field is damaged. It also returns nothing for the last
        partitions of a response that has reached `fetch.max.bytes`: one that is nearly full isn't judged.
        """
        size, has_empty = 0, bool(self._unanswered)
        for _, partitions in response.topics:
            for *_, records in partitions:
                size += len(records or b"")
                has_empty = has_empty or not records
        if not has_empty or size >= FETCH_MAX_BYTES - FETCH_BYTES:
            return
        offsets = {(topic, each[0]): each[1] for topic, partitions in request.topics for each in partitions}
        for topic, partitions in response.topics:
            for number, code, highwater, *_, records in partitions:
                offset = offsets[topic, number]
                is_silent = code == NoError.errno and not records and highwater > offset
                if is_silent or code not in _HANDLED:
                    reason = f"expected some up to {highwater - 1}, got none" if is_silent else for_code(code).__name__
                    self._note_unanswered(Partition(topic, number), f"its records from {offset} on: {reason}")
                elif self._unanswered:
                    self._unanswered.pop(Partition(topic, number), None)

    def _note_unanswered(self, partition: Partition, reason: str) -> None:
        if partition in self._positions:
            since, _ = self._unanswered.get(partition, (self._loop.time(), ""))
            self._unanswered[partition] = since, reason

    def _handle_fetch_error(self, error: KafkaError, taken: Collection[TopicPartition]) -> None:
        self._isolated_until = self._loop.time() + ISOLATE_FOR
        if isinstance(error, TopicAuthorizationFailedError):
            self._set_aside(error)
        # aiokafka may have dropped records before it raised the error.
        for where in self._kafka.assignment() & set(taken):
            if (position := self._positions.get(Partition(*where))) is not None:
                self._kafka.seek(where, position)

    def _buffer(self, partition: Partition, records: Sequence[ConsumerRecord[Any, Any]]) -> None:
        last = records[-1]
        self._positions[partition] = last.offset + 1
        # Append: records may be buffered already if the partition was paused before all of them were returned.
        self._buffered.setdefault(partition, deque()).append(records_of(records))
        if last.timestamp_type == LOG_APPEND_TIME:
            self._clock.on_record(last.timestamp / 1000)

    async def _handle_gaps(self, jumped: Mapping[Partition, Sequence[ConsumerRecord[Any, Any]]]) -> None:
        """Take records that don't begin at our position: after a gap, or after records that the log has deleted.

        If our position is before the log's start, or the topic was recreated, aiokafka continues at the log's start
        (`auto_offset_reset`) without telling us.
        """
        takeovers, positions = self._takeovers, dict(self._positions)
        ahead = [partition for partition, records in jumped.items() if records[0].offset > positions.get(partition, 0)]
        try:
            starts, _ = await self._cluster.offsets_with_leader(ahead if self._group is not None else (), EARLIEST)
        except LogUnavailableError:
            starts = {}  # deleted records are then treated as a gap
        for partition, records in jumped.items():
            if partition not in self._positions:
                continue  # revoked meanwhile
            if takeovers != self._takeovers or self._positions[partition] != positions.get(partition):
                # It was assigned again, or `_check_bounds` has moved the position and called seek on aiokafka: these
                # records will be fetched again.
                self._kafka.seek(TopicPartition(*partition), self._positions[partition])
            elif partition in ahead or self._group is None:
                self._skip_deleted(partition, min(starts.get(partition, 0), records[0].offset))
                self._buffer(partition, records)
            else:
                await self._reset([partition])

    async def _rejoin_later(self, error: GroupAuthorizationFailedError) -> None:
        """Join the group again after a while: aiokafka doesn't rejoin after an authorization error."""
        logger.warning("log_fetch_failed", group=self._group, error=message_of(error))
        if self._unjoined_since is None:
            self._unjoined_since = self._loop.time()
        await self._revoke()
        await asyncio.wait({self._closing}, timeout=REJOIN_INTERVAL)
        if not self._closing.done():
            await self._recreate_consumer()

    async def _recreate_consumer(self) -> None:
        """Continue with a new consumer, as a task of the old one has died: sooner or later it would return nothing."""
        logger.error("log_consumer_replaced", group=self._group)
        if self._group is not None:
            await self._revoke()
        self._is_replacing = True
        try:
            await self._replace_consumer()
        finally:
            self._is_replacing = False

    async def _replace_consumer(self) -> None:
        positions = dict(self._positions)
        old, self._kafka = self._kafka, self._new_kafka_consumer()
        await stop(old)
        while True:
            try:
                with kafka_errors():
                    await self._start_client()
                break
            except KafkaError as error:
                logger.warning("log_consumer_not_started", group=self._group, error=message_of(error))
                await asyncio.sleep(1)
                await stop(self._kafka)
                self._kafka = self._new_kafka_consumer()
        if self._group is not None:
            self._kafka.subscribe(self._topics, listener=self)
            return
        self._kafka.assign([TopicPartition(*partition) for partition in positions])
        for partition, position in positions.items():
            self._kafka.seek(TopicPartition(*partition), position)
        for partition in self._paused:
            self._kafka.pause(TopicPartition(*partition))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(QUERY_TIMEOUT):
                await self._kafka._client._maybe_wait_metadata()


def _log_restart(partition: Partition, position: int, end: int, former_id: str, topic_id: str) -> None:
    """Log that a partition is read from its start: its topic was recreated, or an unclean election truncated it."""
    if are_of_different_topics(former_id, topic_id):
        logger.error("topic_recreated", partition=partition, position=position, end=end)
    else:
        logger.error("log_truncated", partition=partition, position=position, end=end)


# aiokafka only checks for an instance; its class is untyped.
ConsumerRebalanceListener.register(KafkaConsumer)


def new_consumer(connection: Connection, group: str | None) -> AIOKafkaConsumer:
    """Return a consumer that isn't started; without a group, its partitions have to be assigned."""
    consumer = AIOKafkaConsumer(
        **connection.options,
        group_id=group,
        auto_offset_reset="earliest",
        enable_auto_commit=False,
        fetch_max_wait_ms=int(1000 * FETCH_MAX_WAIT),
        fetch_max_bytes=FETCH_MAX_BYTES,
        max_partition_fetch_bytes=FETCH_BYTES if group is None else MAX_PARTITION_FETCH_BYTES,
        session_timeout_ms=int(1000 * SESSION_TIMEOUT),
        heartbeat_interval_ms=int(1000 * HEARTBEAT_INTERVAL),
        rebalance_timeout_ms=int(1000 * REBALANCE_TIMEOUT),
        max_poll_interval_ms=int(1000 * MAX_POLL_INTERVAL),
        request_timeout_ms=int(1000 * REQUEST_TIMEOUT),
    )
    _lengthen_coordinator_timeout(consumer._client)
    _throttle_metadata_requests(consumer._client)
    return consumer


def records_of(found: Iterable[ConsumerRecord[Any, Any]]) -> list[Record]:
    # A record written by another producer may have no key, no value, or a header without one.
    return [
        Record(one.offset, one.timestamp / 1000, one.key or b"", one.value or b"", headers_of(one.headers))
        for one in found
    ]


def headers_of(found: Sequence[tuple[str, bytes | None]]) -> RecordHeaders:
    if None in map(VALUE_OF, found):
        return tuple([(name, value or b"") for name, value in found])
    return tuple(found)  # type: ignore[arg-type]  # there is no None among them


def slices_of(records: Sequence[Record], max_bytes: int = FETCH_BYTES) -> Iterator[Sequence[Record]]:
    """Split records into slices of at most `max_bytes`; a larger record gets its own."""
    start = size = 0
    for index, (_, _, key, value, headers) in enumerate(records):
        more = len(key) + len(value) + sum([len(name) + len(text) for name, text in headers])
        if size + more > max_bytes and index > start:
            yield records[start:index]
            start, size = index, 0
        size += more
    if records:
        yield records[start:] if start else records


def _lengthen_coordinator_timeout(client: AIOKafkaClient) -> None:
    connect: Any = client._get_conn

    async def get_connection(node: int, *, group: int = ConnectionGroup.DEFAULT, no_hint: bool = False) -> Any:  # noqa: ANN401 - untyped there
        connection = await connect(node, group=group, no_hint=no_hint)
        if connection is not None and group == ConnectionGroup.COORDINATION:
            connection._request_timeout = GROUP_REQUEST_TIMEOUT
        return connection

    client._get_conn = get_connection  # type: ignore[method-assign] # there is no setting for it


def _intercept_fetch_responses(client: AIOKafkaClient, on_response: Callable[[Any, Any], None]) -> None:
    """Have `on_response` called with each fetch request and its response."""
    send: Any = client.send

    async def send_and_report(node: int, request: Any, *, group: int = ConnectionGroup.DEFAULT) -> Any:  # noqa: ANN401 - untyped there
        response = await send(node, request, group=group)
        if isinstance(request, FetchRequest):
            on_response(request, response)
        return response

    client.send = send_and_report  # type: ignore[method-assign] # nothing public has the responses


def _throttle_metadata_requests(client: AIOKafkaClient) -> None:
    """Limit a client's metadata requests: while a partition has no leader, it would send them without a pause."""
    loop = asyncio.get_running_loop()
    requested_at = -METADATA_INTERVAL

    def force_metadata_update() -> asyncio.Future[Any]:
        if client._md_update_fut is None:
            client._md_update_fut = loop.create_future()
            loop.call_at(max(loop.time(), requested_at + METADATA_INTERVAL), request)
        return asyncio.shield(client._md_update_fut)

    def request() -> None:
        nonlocal requested_at
        requested_at = loop.time()
        if not client._md_update_waiter.done():
            client._md_update_waiter.set_result(None)

    client.force_metadata_update = force_metadata_update  # type: ignore[method-assign] # there is no setting for it
