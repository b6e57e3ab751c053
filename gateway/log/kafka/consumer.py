"""A member of a consumer group, or a reader of everything, over a consumer of aiokafka that may die."""
# ruff: noqa: SLF001 - nothing public sets the timeout of a single connection

import asyncio
import contextlib
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import Any

import structlog
from aiokafka import AIOKafkaConsumer, ConsumerRebalanceListener, ConsumerRecord, TopicPartition
from aiokafka.client import AIOKafkaClient, ConnectionGroup
from aiokafka.errors import KafkaError

from gateway.log.base import ALL, Assignment, Batch, Commit, Listener, Partition, Record, RecordHeaders
from gateway.log.kafka.broker_clock import BrokerClock
from gateway.log.kafka.cluster import EARLIEST, LATEST, QUESTION_TIMEOUT, Cluster, encode_metadata
from gateway.log.kafka.connection import CLOSE_GRACE, LOG_APPEND_TIME, RETRY_BACKOFF, Connection, has_died, stop
from gateway.log.kafka.errors import FORBIDDEN, say, translated
from gateway.model import LogUnavailableError, UsageError

COMMIT_TIMEOUT = 5.0
CLOSE_COMMIT_TIMEOUT = 3.0

FETCH_RECORDS = 500
PULL_RECORDS = 100  # Taken at a time by a member of a group: they cost the loop some 0.7 ms.
FETCH_BYTES = 1 << 20
PULL_BYTES = 128 << 10
"""Of each partition in one answer: what a tier doesn't take of it at once, it drops and fetches again."""
END_AGE = 1.0  # How old the ends may be by which the lag of paused partitions is told.
POLL_INTERVAL = 10.0  # Between looks whether the log's start has passed our positions.
FETCH_WAIT = 0.1  # A partition that is resumed waits for the fetch under way: at most this long.
START_AGAIN = 1.0  # From one try to take over what can't be read to the next.
JOIN_GRACE = 10.0  # A rebalance is over by then.
METADATA_PAUSE = 0.1
PULL_TIMEOUT = 1.0  # How long one wait for records lasts before the consumer's health is looked at.
SESSION = 45.0  # A blocked event loop sends no heartbeats; this much of it costs no rebalance.
HEARTBEAT = 1.0  # By which members learn that the group shares out anew: everyone waits for the last of them.
REBALANCE = 60.0
POLL = 10 * 365 * 86400.0  # A member that waits for an operator fetches nothing; heartbeats tell that it lives.
FETCH_TIMEOUT = 10.0  # A broker that hangs holds what it led for so long, although there is a new leader in seconds.
GROUP_REQUEST_TIMEOUT = 30.0  # But a coordinator answers a member that joins when all have joined.
VALUE_OF = itemgetter(1)

log = structlog.get_logger(__name__)


class KafkaConsumer:
    """A member of a consumer group, or a reader of everything. `KafkaLog.consume` makes them.

    Await `fetch` from the task that acts on what it returns: its records belong to the partitions as assigned when it
    returns, and a rebalance may take them away whenever another task runs.
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
        siblings: "set[KafkaConsumer]",
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._cluster = cluster
        self._clock = clock
        self._connection = connection
        self._group = group
        self._topics = topics
        self._listener = listener
        self._siblings = siblings
        self._kafka = new_consumer(connection, group)
        # What is assigned, and the offset after the last record that was taken out of aiokafka.
        self._next: dict[Partition, int] = {}
        # Invariant: what is held was taken under the present assignment; revoking it clears both.
        self._held: dict[Partition, deque[Sequence[Record]]] = {}
        self._paused: set[Partition] = set()
        # What is assigned, and it isn't known yet where to go on; and why.
        self._waiting: dict[Partition, str] = {}
        self._starting: asyncio.Task[None] | None = None
        # Since when we are no member of the group, if there is one.
        self._unjoined_since = None if group is None else self._loop.time()
        # The ends of partitions as they were asked for, beside what fetches tell.
        self._ends: dict[Partition, int] = {}
        self._asking: asyncio.Task[None] | None = None
        self._asked_at = self._looked_at = self._loop.time()
        self._pulling: asyncio.Task[None] | None = None
        self._failure: Exception | None = None
        self._assignments = 0
        self._revoke_lock = asyncio.Lock()
        self._committing = asyncio.Lock()
        self._closing = self._loop.create_future()

    async def start(self) -> None:
        """Connect, and join in the background, or read from the first offsets."""
        with translated("consume"):
            async with asyncio.timeout(QUESTION_TIMEOUT):
                await self._kafka.start()
            if self._group is not None:
                self._kafka.subscribe(self._topics, listener=self)
                return
            described = await self._cluster.describe(self._topics)
            partitions = [Partition(topic, number) for topic in self._topics for number in described.get(topic, {})]
            first = await self._cluster.offsets(partitions, EARLIEST)
            assignments = [
                Assignment(partition, Commit(first[partition]), first[partition]) for partition in partitions
            ]
            self._kafka.assign([TopicPartition(*partition) for partition in partitions])
            async with asyncio.timeout(QUESTION_TIMEOUT):
                await self._kafka._client._maybe_wait_metadata()  # or nothing seems to have a leader
            self._take_over(self._kafka, assignments)

    async def fetch(self, *, timeout: float) -> Sequence[Batch]:
        deadline = self._loop.time() + timeout
        self._ask_for_bounds()
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
            pulling = self._pulling or asyncio.create_task(self._pull(PULL_TIMEOUT), name=f"kafka-pull-{self._group}")
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
        unread = self.unread()
        lags = {}
        for partition, position in self._next.items():
            highwater, end = self._kafka.highwater(TopicPartition(*partition)), self._ends.get(partition)
            if partition not in unread and (highwater is not None or end is not None):
                held = sum([len(records) for records in self._held.get(partition, ())])
                lags[partition] = max(0, max(highwater or 0, end or 0) - position) + held
        return lags

    def unread(self) -> Mapping[Partition, str]:
        known = self._kafka._client.cluster
        unread = dict(self._waiting)
        for partition in self._next:
            leader = known.leader_for_partition(TopicPartition(*partition))
            if leader is None or leader < 0:
                unread[partition] = "no leader"
        for topic in self._topics:
            numbers = known.partitions_for_topic(topic)
            if self._unjoined_since is not None:
                if self._loop.time() > self._unjoined_since + JOIN_GRACE:
                    unread[Partition(topic, ALL)] = "the group can't be joined"
            elif numbers is None:
                unread[Partition(topic, ALL)] = "no such topic"
            elif self._group is None:
                for number in numbers - {partition.number for partition in self._next if partition.topic == topic}:
                    unread[Partition(topic, number)] = "added after the start; not read yet"
        return unread

    async def close(self) -> None:
        """Revoke, commit and leave, within 5 s and what the listener takes. A log that is away takes no commit."""
        if self._closing.done():
            return
        self._closing.set_result(None)
        self._siblings.discard(self)
        started = self._loop.time()
        try:
            await self._revoke(CLOSE_COMMIT_TIMEOUT)
        finally:
            grace = max(0.5, started + CLOSE_GRACE - self._loop.time())
            await stop(self._kafka, grace=grace)
            for task in (self._pulling, self._asking, self._starting):
                if task is not None:
                    task.cancel()
                    await asyncio.wait({task})
            self._pulling = self._asking = self._starting = None

    # What aiokafka calls. It logs and swallows their errors: ours are kept for fetch.

    async def on_partitions_revoked(self, _revoked: Iterable[TopicPartition]) -> None:
        try:
            await self._revoke()
        except Exception as error:  # noqa: BLE001 - raised by fetch, in the task of the consumer's owner
            self._failure = error

    async def on_partitions_assigned(self, assigned: Collection[TopicPartition]) -> None:
        # First of all, and in the same step as the assignment: no record may come before its listener knows.
        self._kafka.pause(*assigned)
        self._unjoined_since = None
        self._waiting = dict.fromkeys(
            sorted(Partition(*partition) for partition in assigned), "offsets not fetched yet"
        )
        begun = self._loop.create_future()
        self._starting = asyncio.create_task(self._start_all(begun), name=f"kafka-start-{self._group}")
        await asyncio.wait({begun, self._closing}, return_when=asyncio.FIRST_COMPLETED)

    async def _start_all(self, begun: asyncio.Future[None]) -> None:
        """Find out where to go on, and take over what can be read, at once; and the rest whenever it can be."""
        kafka, wait = self._kafka, RETRY_BACKOFF
        try:
            while self._waiting or not begun.done():
                assignments = await self._read_assignments(list(self._waiting))
                for each in assignments:
                    del self._waiting[each.partition]
                self._take_over(kafka, assignments)
                if not begun.done():
                    begun.set_result(None)
                await asyncio.sleep(wait)
                wait = min(START_AGAIN, 2 * wait)
        except Exception as error:  # noqa: BLE001 - raised by fetch, in the task of the consumer's owner
            self._failure = error
        finally:
            if not begun.done():
                begun.set_result(None)

    async def _read_assignments(self, partitions: Sequence[Partition]) -> Sequence[Assignment]:
        """Ask where to go on, once; those of which it isn't known are left out, and told why."""
        assert self._group is not None
        try:
            first, missing = await self._cluster.offsets_with_leader(partitions, EARLIEST)
            after_last, gone = await self._cluster.offsets_with_leader(list(first), LATEST)
            commits = await self._cluster.commits(self._group, list(after_last))
        except LogUnavailableError as error:
            log.warning("log_commits_unavailable", group=self._group, error=str(error))
            self._waiting = dict.fromkeys(self._waiting, str(error))
            return []
        self._waiting.update(missing)
        self._waiting.update(gone)
        assignments = []
        for partition, end in after_last.items():
            commit = commits.get(partition)
            if commit is not None and commit.base > end:
                # Only an unclean leader election makes a log shorter. What was written since is below the base.
                log.error("log_truncated", partition=partition, committed=commit.base, end=end)
                commit = None
            start = first[partition]
            assignments.append(Assignment(partition, commit or Commit(start), start, commit is not None))
        return assignments

    def _take_over(self, kafka: AIOKafkaConsumer, assignments: Sequence[Assignment]) -> None:
        for assignment in assignments:
            partition = assignment.partition
            self._next[partition] = max(assignment.commit.base, assignment.log_start)
            kafka.seek(TopicPartition(*partition), self._next[partition])
        self._assignments += 1
        self._listener.assigned(assignments)
        # The listener may have paused some already.
        kafka.resume(*[TopicPartition(*each.partition) for each in assignments if each.partition not in self._paused])

    async def _revoke(self, timeout: float = COMMIT_TIMEOUT) -> None:
        """Tell the listener that nothing is ours any more, and commit what it has finished."""
        async with self._revoke_lock:  # who closes waits for a revocation under way
            if self._starting is not None:
                self._starting.cancel()
            if self._unjoined_since is None:
                self._unjoined_since = self._loop.time()
            self._waiting.clear()
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
        if self._group is None:
            return
        offsets = {
            TopicPartition(*partition): (commit.base, encode_metadata(commit)) for partition, commit in commits.items()
        }
        # One after the other, and none left behind by a revocation that has nothing to commit itself: aiokafka repeats
        # one that failed with the same offsets, after another that was newer, and in the next generation, too.
        with translated(f"commit of {self._group}"):
            async with asyncio.timeout(timeout), self._committing:
                if offsets:
                    await self._kafka.commit(offsets)

    def _ask_for_bounds(self) -> None:
        """Keep the ends of paused partitions fresh, for their lag: only a fetch would tell them.

        And see now and then whether the log has deleted what wasn't read, or isn't the one any more that was.
        """
        is_under_way = self._asking is not None and not self._asking.done()
        now = self._loop.time()
        if is_under_way or not self._next or now < self._asked_at + END_AGE:
            return
        self._asked_at = now
        is_all = now >= self._looked_at + POLL_INTERVAL
        if is_all:
            self._looked_at = now
        if is_all or self._paused:
            asking = self._look() if is_all else self._ask_ends(list(self._paused))
            self._asking = asyncio.create_task(asking, name=f"kafka-bounds-{self._group}")

    async def _ask_ends(self, partitions: Sequence[Partition]) -> None:
        with contextlib.suppress(LogUnavailableError):  # the next time, then
            ends, _ = await self._cluster.offsets_with_leader(partitions, LATEST)
            self._ends = {partition: end for partition, end in ends.items() if partition in self._next}

    async def _look(self) -> None:
        """Compare the bounds of all partitions with where we are."""
        positions = dict(self._next)
        with contextlib.suppress(LogUnavailableError):  # the next time, then
            first, _ = await self._cluster.offsets_with_leader(list(positions), EARLIEST)
            ends, _ = await self._cluster.offsets_with_leader(list(first), LATEST)
            self._ends = {partition: end for partition, end in ends.items() if partition in self._next}
            # An end that was asked for after the position is behind it only where records are gone that we have read.
            await self._reset([each for each, end in ends.items() if end < positions[each]])
            for partition, start in first.items():
                if self._report_deleted(partition, start):
                    self._kafka.seek(TopicPartition(*partition), start)

    def _report_deleted(self, partition: Partition, log_start: int) -> bool:
        """Tell the owner what the log has deleted between our position and its start, if it has."""
        position = self._next.get(partition)
        if position is None or position >= log_start or self._group is None:
            return False
        self._next[partition] = log_start
        self._listener.records_deleted(partition, range(position, log_start))
        return True

    async def _reset(self, partitions: Sequence[Partition]) -> None:
        """Go on from the first record of partitions whose records aren't those that we have read."""
        assignments = self._assignments
        if self._group is None or self._revoke_lock.locked():
            return  # the next owner compares, too
        async with self._revoke_lock:  # which a revocation may have been waiting for
            mine = [partition for partition in partitions if partition in self._next]
            if not mine or assignments != self._assignments:
                return
            positions = {partition: self._next.pop(partition) for partition in mine}
            held = {partition: self._held.pop(partition) for partition in mine if partition in self._held}
            self._kafka.pause(*[TopicPartition(*partition) for partition in mine])
            try:
                first, _ = await self._cluster.offsets_with_leader(mine, EARLIEST)
            except LogUnavailableError:
                first = {}
            for partition in positions.keys() - first.keys():  # the next time, then
                self._next[partition] = positions[partition]
                self._kafka.seek(TopicPartition(*partition), positions[partition])
                if partition in held:
                    self._held[partition] = held[partition]
            try:
                # A commit of before would have the next owner pass over what is new.
                await self._commit({partition: Commit(start) for partition, start in first.items()})
            except LogUnavailableError as error:
                log.warning("log_commit_lost", group=self._group, error=str(error))
            for partition, start in first.items():
                log.error("log_truncated", partition=partition, committed=positions[partition], end=start)
                self._ends.pop(partition, None)
                self._paused.discard(partition)
                self._next[partition] = start
                self._kafka.seek(TopicPartition(*partition), start)
                self._listener.replaced(Assignment(partition, Commit(start), start))
            self._kafka.resume(*[TopicPartition(*each) for each in mine if each not in self._paused])

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
            self._failure = UsageError(f"{self._group or ', '.join(self._topics)}: {say(error)}")
            return
        except KafkaError as error:
            if self._closing.done():
                return
            log.warning("log_fetch_failed", group=self._group, error=say(error))
            # It may have dropped records on its way to the error.
            assigned = self._kafka.assignment()
            for partition, position in self._next.items():
                if partition in assigned:
                    self._kafka.seek(TopicPartition(*partition), position)
            found = {}
            await asyncio.sleep(RETRY_BACKOFF)
        jumped = {}
        for where, records in found.items():
            partition = Partition(*where)
            if records[0].offset == self._next.get(partition):
                self._hold(partition, records)
            else:
                jumped[partition] = records
        if jumped:
            await self._handle_gaps(jumped)
        if wait and not found and not self._closing.done() and has_died(self._kafka):
            await self._replace()

    def _hold(self, partition: Partition, records: Sequence[ConsumerRecord[Any, Any]]) -> None:
        last = records[-1]
        self._next[partition] = last.offset + 1
        # Behind what is held of it already, where it was paused before all of that was returned.
        self._held.setdefault(partition, deque()).extend(slices_of(records_of(records)))
        if last.timestamp_type == LOG_APPEND_TIME:
            self._clock.seen(last.timestamp / 1000)

    async def _handle_gaps(self, jumped: Mapping[Partition, Sequence[ConsumerRecord[Any, Any]]]) -> None:
        """Take records that don't begin at our position: after a gap, or after what the log has deleted meanwhile.

        aiokafka begins at the log's start where that has passed it, or where the log has become another, and says
        nothing.
        """
        assignments, positions = self._assignments, dict(self._next)
        ahead = [partition for partition, records in jumped.items() if records[0].offset > positions.get(partition, 0)]
        try:
            starts, _ = await self._cluster.offsets_with_leader(ahead if self._group is not None else (), EARLIEST)
        except LogUnavailableError:
            starts = {}  # what was deleted passes for a gap
        for partition, records in jumped.items():
            if partition not in self._next:
                continue  # it was taken from us
            if assignments != self._assignments or self._next[partition] != positions.get(partition):
                # It was assigned anew, or a look has gone on, and aiokafka with it: these would come twice.
                self._kafka.seek(TopicPartition(*partition), self._next[partition])
            elif partition in ahead or self._group is None:
                self._report_deleted(partition, min(starts.get(partition, 0), records[0].offset))
                self._hold(partition, records)
            else:
                await self._reset([partition])

    async def _replace(self) -> None:
        """Go on with a new consumer where a task of the old one has ended: it would be silent for ever."""
        log.error("log_consumer_replaced", group=self._group)
        positions = dict(self._next)
        if self._group is not None:
            await self._revoke()
        old, self._kafka = self._kafka, new_consumer(self._connection, self._group)
        await stop(old)
        while True:
            try:
                await self._kafka.start()
                break
            except KafkaError as error:
                log.warning("log_consumer_not_started", group=self._group, error=say(error))
                await asyncio.sleep(1)
                await stop(self._kafka)
                self._kafka = new_consumer(self._connection, self._group)
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


def new_consumer(connection: Connection, group: str | None) -> AIOKafkaConsumer:
    """Return a consumer that isn't started; without a group it is told what to read."""
    consumer = AIOKafkaConsumer(
        **connection.options,
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
    )
    _be_patient_with_coordinators(consumer._client)
    _ask_seldom(consumer._client)
    return consumer


def records_of(found: Iterable[ConsumerRecord[Any, Any]]) -> list[Record]:
    # A record of another client may have no key, no value, or a header without one.
    return [
        Record(one.offset, one.timestamp / 1000, one.key or b"", one.value or b"", headers_of(one.headers))
        for one in found
    ]


def headers_of(found: Sequence[tuple[str, bytes | None]]) -> RecordHeaders:
    if None in map(VALUE_OF, found):
        return tuple([(name, value or b"") for name, value in found])
    return tuple(found)  # type: ignore[arg-type]  # there is no None among them


def slices_of(records: Sequence[Record]) -> Iterator[Sequence[Record]]:
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


def _be_patient_with_coordinators(client: AIOKafkaClient) -> None:
    connect: Any = client._get_conn

    async def patient(node: int, *, group: int = ConnectionGroup.DEFAULT, no_hint: bool = False) -> Any:  # noqa: ANN401 - untyped there
        connection = await connect(node, group=group, no_hint=no_hint)
        if connection is not None and group == ConnectionGroup.COORDINATION:
            connection._request_timeout = GROUP_REQUEST_TIMEOUT
        return connection

    client._get_conn = patient  # type: ignore[method-assign] # there is no setting for it


def _ask_seldom(client: AIOKafkaClient) -> None:
    """Let a client wait a moment between two questions: it asks without a pause while a partition has no leader."""
    loop = asyncio.get_running_loop()
    asked_at = -METADATA_PAUSE

    def force_metadata_update() -> asyncio.Future[Any]:
        if client._md_update_fut is None:
            client._md_update_fut = loop.create_future()
            loop.call_at(max(loop.time(), asked_at + METADATA_PAUSE), ask)
        return asyncio.shield(client._md_update_fut)

    def ask() -> None:
        nonlocal asked_at
        asked_at = loop.time()
        if not client._md_update_waiter.done():
            client._md_update_waiter.set_result(None)

    client.force_metadata_update = force_metadata_update  # type: ignore[method-assign] # there is no setting for it
