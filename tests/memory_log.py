"""The log in memory: the contract of `gateway/log/base.py`, deterministic, with a clock and failures handed in.

Rebalances are eager, as Kafka's: whenever the members of a group change, all of them are revoked, then assigned.
"""

import asyncio
import math
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from itertools import islice
from operator import attrgetter
from time import time
from zlib import crc32

from gateway.log.base import (
    ALL,
    FETCH_BYTES,
    FETCH_RECORDS,
    NO_TOPIC,
    Assignment,
    Batch,
    Commit,
    Listener,
    NewRecord,
    Partition,
    Position,
    Record,
    RecordHeaders,
    TopicProblem,
    TopicSpec,
    missing_problem,
)
from gateway.model import ForbiddenError, LogUnavailableError, RecordTooLargeError

FOREVER = math.inf
REFUSED_AFTER = 4.0
"""Seconds for which the real log tries to append to a partition with too few replicas in sync."""

_offset = attrgetter("offset")
_appended_at = attrgetter("appended_at")


@dataclass(slots=True)
class _Segment:
    """A partition's records; offsets below `start` were deleted."""

    records: list[Record] = field(default_factory=list)
    start: int = 0
    end: int = 0


@dataclass(slots=True)
class _State:
    """What every connection to the log shares."""

    specs: dict[str, TopicSpec] = field(default_factory=dict)
    segments: dict[Partition, _Segment] = field(default_factory=dict)
    commits: dict[str, dict[Partition, Commit]] = field(default_factory=dict)
    members: dict[str, list["MemoryConsumer"]] = field(default_factory=dict)
    readers: list["MemoryConsumer"] = field(default_factory=list)
    rebalancing: defaultdict[str, asyncio.Lock] = field(default_factory=lambda: defaultdict(asyncio.Lock))
    failing_appends: float = 0
    failing_commits: float = 0
    commit_delay: float = 0.0
    join_delay: float = 0.0
    stalled: set[str | None] = field(default_factory=set)
    leaderless: set[Partition] = field(default_factory=set)
    refusing: set[Partition] = field(default_factory=set)
    forbidden: set[str] = field(default_factory=set)
    lives: Counter[str] = field(default_factory=Counter)
    patience: float = 0.0

    def of(self, topic: str) -> list[Partition]:
        spec = self.specs.get(topic)
        return [Partition(topic, number) for number in range(spec.partitions)] if spec else []


class MemoryLog:
    """A log that lasts as long as its Python object. `another()` is what a second process would open."""

    max_record_bytes = 1_047_564

    def __init__(self, *, now: Callable[[], float] = time) -> None:
        self._now = now
        self._last = -math.inf
        self._state = _State()

    def another(self) -> "MemoryLog":
        """Return a second connection to the same records."""
        return copy(self)

    # Hooks for tests.

    def fail_appends(self, times: float = FOREVER) -> None:
        """Let the next appends fail with LogUnavailableError, until `fail_appends(0)` or that many have failed."""
        self._state.failing_appends = times

    def fail_commits(self, times: float = FOREVER) -> None:
        """Let the next commits fail with LogUnavailableError, those of a revocation included."""
        self._state.failing_commits = times

    def delay_commits(self, seconds: float) -> None:
        """Let commits take so long from now on, but for those of a revocation: the coordinator is slow."""
        self._state.commit_delay = seconds

    def be_patient(self, seconds: float) -> None:
        """Let a fetch that finds nothing wait for so long at least, whatever timeout it is given."""
        self._state.patience = seconds

    def delay_joins(self, seconds: float) -> None:
        """Let who joins a group become a member, and be counted as one, only after so long from now on."""
        self._state.join_delay = seconds

    def stall(self, group: str | None) -> None:
        """Give a group's members, or the readers without a group, nothing to read until `go_on`."""
        self._state.stalled.add(group)

    def go_on(self, group: str | None) -> None:
        """End a `stall`."""
        self._state.stalled.discard(group)
        for member in self._state.readers if group is None else self._state.members.get(group, ()):
            member.wake()

    def records(self, topic: str) -> list[Record]:
        """Return what a topic holds, partition by partition."""
        return [record for partition in self._state.of(topic) for record in self._state.segments[partition].records]

    async def recreate(self, topic: str, *, partitions: int | None = None) -> None:
        """Delete a topic and make it anew, perhaps with fewer partitions; before members notice it, they begin anew."""
        self._state.lives[topic] += 1
        if partitions is not None:
            self._state.specs[topic] = replace(self._state.specs[topic], partitions=partitions)
        for partition in self._state.of(topic):
            self._state.segments[partition] = _Segment()
            for commits in self._state.commits.values():
                commits.pop(partition, None)
            for member in [member for group in self._state.members.values() for member in group]:
                member.begin_anew(partition)
            for reader in self._state.readers:
                reader.start_over(partition)

    def forget(self, group: str) -> None:
        """Delete what a group has committed, as an operator may."""
        self._state.commits.pop(group, None)

    def rewrite(self, topic: str, change: Callable[[Record], Record]) -> None:
        """Change the records of a topic where they are, as if another version of the gateway had written them."""
        for partition in self._state.of(topic):
            segment = self._state.segments[partition]
            segment.records[:] = map(change, segment.records)

    def delete_below(self, partition: Partition, offset: int) -> None:
        """Delete records as retention does: the partition's start moves."""
        segment = self._state.segments[partition]
        segment.start = max(segment.start, offset)
        segment.records = [record for record in segment.records if record.offset >= offset]
        for consumer in (*self._state.readers, *(c for group in self._state.members.values() for c in group)):
            consumer.see_deleted(partition)

    def lose_leader(self, partition: Partition) -> None:
        """Let nothing be read from or written to a partition, until `find_leader`."""
        self._state.leaderless.add(partition)

    def find_leader(self, partition: Partition) -> None:
        """Let a partition be read and written again."""
        self._state.leaderless.discard(partition)
        for consumer in (*self._state.readers, *(c for group in self._state.members.values() for c in group)):
            consumer.take_over()

    def refuse_appends(self, *partitions: Partition) -> None:
        """Let partitions that can be read take no appends, until `accept_appends`: too few replicas are in sync."""
        self._state.refusing.update(partitions)

    def accept_appends(self) -> None:
        """Let all partitions take appends again."""
        self._state.refusing.clear()

    def forbid(self, topic: str) -> None:
        """Take the rights to a topic away, whether it exists or not, until `allow`."""
        self._state.forbidden.add(topic)

    def allow(self, topic: str) -> None:
        """Give the rights to a topic back."""
        self._state.forbidden.discard(topic)
        for consumer in (*self._state.readers, *(c for group in self._state.members.values() for c in group)):
            consumer.wake()

    def grow(self, spec: TopicSpec) -> None:
        """Give a topic more partitions; its members hear of it with the next rebalance."""
        self._state.specs[spec.name] = spec
        for partition in self._state.of(spec.name):
            self._state.segments.setdefault(partition, _Segment())

    def delete(self, topic: str) -> None:
        """Delete a topic; its members hear of it with the next rebalance."""
        for partition in self._state.of(topic):
            del self._state.segments[partition]
            for commits in self._state.commits.values():
                commits.pop(partition, None)
        del self._state.specs[topic]

    def skip_offsets(self, partition: Partition, count: int) -> None:
        """Leave a gap after the last record, as transaction markers do."""
        self._state.segments[partition].end += count

    async def rebalance(self, group: str, *, takes: float = 0.0) -> None:
        """Revoke everything from a group's members, and assign it anew after so many seconds: a member is late."""
        await _rebalance(self._state, group, takes=takes)

    # The contract.

    async def append(
        self, topic: str, *, key: bytes, value: bytes, headers: RecordHeaders, partition: int | None = None
    ) -> Position:
        size = len(key) + len(value) + sum([len(name.encode()) + len(text) for name, text in headers])
        if size > self.max_record_bytes:
            raise RecordTooLargeError(f"{topic}: expected at most {self.max_record_bytes} bytes, got {size}")
        self._check_rights(topic)
        partitions = self._state.of(topic)
        if not partitions:
            raise LogUnavailableError(f"{topic}: expected a topic, got a name that is not there")
        if self._state.failing_appends > 0:
            self._state.failing_appends -= 1
            raise LogUnavailableError(f"{topic}: the append was told to fail")
        number = crc32(key) % len(partitions) if partition is None else partition
        if number >= len(partitions):
            raise LogUnavailableError(f"{topic}: expected a partition, got {number}, which is not there")
        self._check_leaders(partitions[number])
        if partitions[number] in self._state.refusing:
            await asyncio.sleep(REFUSED_AFTER)
            raise LogUnavailableError(f"{topic}/{number}: expected enough replicas in sync, got fewer")
        return self._store(partitions[number], NewRecord(key, value, headers))

    async def append_in_order(self, partition: Partition, records: Sequence[NewRecord]) -> Sequence[Position]:
        for key, value, headers in records:
            size = len(key) + len(value) + sum([len(name.encode()) + len(text) for name, text in headers])
            if size > self.max_record_bytes:
                raise RecordTooLargeError(f"{partition.topic}: expected at most {self.max_record_bytes}, got {size}")
        self._check_rights(partition.topic)
        if partition not in self._state.segments:
            raise LogUnavailableError(f"{partition.topic}: expected a partition, got one that is not there")
        self._check_leaders(partition)
        await asyncio.sleep(0)  # as an append to a real log, it lets other tasks run
        positions = []
        for record in records:
            if self._state.failing_appends > 0:
                self._state.failing_appends -= 1
                raise LogUnavailableError(f"{partition.topic}: the append was told to fail")
            positions.append(self._store(partition, record))
        return positions

    def _store(self, partition: Partition, new: NewRecord) -> Position:
        segment = self._state.segments[partition]
        record = Record(segment.end, self.now(), new.key, new.value, tuple(new.headers))
        segment.end += 1
        if self._state.specs[partition.topic].compacted:
            segment.records = [older for older in segment.records if older.key != new.key]
        segment.records.append(record)
        for consumer in (*self._state.readers, *(c for group in self._state.members.values() for c in group)):
            consumer.wake()
        return Position(partition.number, record.offset, record.appended_at)

    async def consume(
        self, *, group: str | None, topics: Sequence[str], listener: Listener, since: float | None = None
    ) -> "MemoryConsumer":
        if group is not None and self._state.join_delay:
            await asyncio.sleep(self._state.join_delay)
        consumer = MemoryConsumer(self._state, group, topics, listener)
        if group is None:
            self._check_rights(*topics)
            self._check_leaders(*[partition for topic in topics for partition in self._state.of(topic)])
            if since is not None:
                for topic in topics:
                    found = await self.offsets_at(topic, since)
                    consumer.starts |= {Partition(topic, number): offset for number, offset in found.items()}
            self._state.readers.append(consumer)
            consumer.assign([partition for topic in topics for partition in self._state.of(topic)])
        else:
            self._state.members.setdefault(group, []).append(consumer)
            await _rebalance(self._state, group)
        return consumer

    def _check_rights(self, *topics: str) -> None:
        for topic in self._state.forbidden.intersection(topics):
            raise ForbiddenError(f"{topic}: expected the right to it, got none")

    def _check_leaders(self, *partitions: Partition) -> None:
        for partition in self._state.leaderless.intersection(partitions):
            raise LogUnavailableError(f"{partition.topic}/{partition.number}: expected a leader, got none")

    async def scan(self, partition: Partition, start: int, end: int) -> AsyncIterator[Sequence[Record]]:
        self._check_rights(partition.topic)
        self._check_leaders(partition)
        while start < end and partition in self._state.segments:
            batch = _head(self._state.segments[partition], start, end)
            if not batch:
                return
            yield batch
            start = batch[-1].offset + 1

    async def partitions(self, topics: Collection[str]) -> Mapping[str, int]:
        return {topic: len(self._state.of(topic)) for topic in topics if topic in await self.topics()}

    async def bounds(self, topic: str) -> Mapping[int, tuple[int, int]]:
        self._check_rights(topic)
        self._check_leaders(*self._state.of(topic))
        segments = self._state.segments
        return {p.number: (segments[p].start, segments[p].end) for p in self._state.of(topic)}

    async def readable(self, topic: str) -> tuple[Mapping[int, tuple[int, int]], Mapping[int, str]]:
        self._check_rights(topic)
        segments, leaderless = self._state.segments, self._state.leaderless
        led = [partition for partition in self._state.of(topic) if partition not in leaderless]
        unread = {partition.number: "no leader" for partition in self._state.of(topic) if partition in leaderless}
        return {p.number: (segments[p].start, segments[p].end) for p in led}, unread

    async def settled(
        self, topic: str, numbers: Collection[int]
    ) -> tuple[Mapping[int, tuple[int, int]], Mapping[int, str]]:
        found, problems = await self.readable(topic)
        return {number: bounds for number, bounds in found.items() if number in numbers}, problems

    def topic_id(self, topic: str) -> str:
        return f"{self._state.lives[topic]:032x}"

    async def offsets_at(self, topic: str, at: float, numbers: Collection[int] | None = None) -> Mapping[int, int]:
        self._check_rights(topic)
        asked = [each for each in self._state.of(topic) if numbers is None or each.number in numbers]
        self._check_leaders(*asked)
        found = {}
        for partition in asked:
            segment = self._state.segments[partition]
            first = bisect_left(segment.records, at, key=_appended_at)
            found[partition.number] = segment.records[first].offset if first < len(segment.records) else segment.end
        return found

    async def topics(self) -> Collection[str]:
        return [topic for topic in self._state.specs if topic not in self._state.forbidden]

    async def topics_of(self, group: str) -> Collection[str]:
        return {partition.topic for partition in self._state.commits.get(group, {})}

    async def committed(self, group: str, topic: str) -> Mapping[int, Commit]:
        self._check_rights(topic)
        commits = self._state.commits.get(group, {})
        return {partition.number: commit for partition, commit in commits.items() if partition.topic == topic}

    async def seed(self, group: str, commits: Mapping[Partition, Commit]) -> None:
        if not self._state.members.get(group):
            known = self._state.commits.setdefault(group, {})
            known.update({partition: commit for partition, commit in commits.items() if partition not in known})

    async def groups(self, prefix: str) -> Mapping[str, int]:
        members = self._state.members
        return {
            group: len(members.get(group, ()))
            for group, commits in self._state.commits.items()
            if commits and group.startswith(prefix)
        }

    async def members(self, group: str) -> int:
        return len(self._state.members.get(group, ()))

    async def create(self, specs: Sequence[TopicSpec]) -> Sequence[str]:
        missing = [spec for spec in specs if spec.name not in self._state.specs]
        for spec in missing:
            self._state.specs[spec.name] = spec
            self._state.segments.update({partition: _Segment() for partition in self._state.of(spec.name)})
        return [spec.name for spec in missing]

    async def check(self, specs: Sequence[TopicSpec]) -> Sequence[TopicProblem]:
        problems: list[TopicProblem] = []
        for spec in specs:
            found = self._state.specs.get(spec.name)
            if found is None:
                problems.append(missing_problem(spec))
                continue
            if found.retention is not None and (spec.retention is None or found.retention < spec.retention):
                message = f"expected a retention of {spec.retention} s, got {found.retention} s"
            else:
                continue
            problems.append(TopicProblem(topic=spec.name, message=message, is_fatal=True))
        return problems

    async def retentions(self, topics: Collection[str]) -> Mapping[str, float]:
        specs = self._state.specs
        kept = {name: specs[name].retention for name in topics if name in await self.topics()}
        return {name: math.inf if seconds is None else seconds for name, seconds in kept.items()}

    def now(self) -> float:
        self._last = max(self._last, self._now())
        return self._last

    async def synchronize(self, topic: str) -> None:
        pass

    async def ping(self) -> None:
        if self._state.failing_appends > 0:
            raise LogUnavailableError("the log was told to fail")

    async def refusing(self) -> Mapping[Partition, str]:
        return {}

    async def close(self) -> None:
        pass


class MemoryConsumer:
    """A consumer of a `MemoryLog`."""

    def __init__(self, state: _State, group: str | None, topics: Sequence[str], listener: Listener) -> None:
        self._state = state
        self._group = group
        self.starts: dict[Partition, int] = {}
        self.topics = topics
        self._listener = listener
        self._positions: dict[Partition, int] = {}
        self._leaving: list[Partition] = []
        self._waiting: list[Partition] = []
        self._paused: set[Partition] = set()
        self._woken = asyncio.Event()

    async def fetch(self, *, timeout: float, max_bytes: int = FETCH_BYTES) -> Sequence[Batch]:
        deadline = asyncio.get_running_loop().time() + max(timeout, self._state.patience if timeout else 0.0)
        await asyncio.sleep(0)  # As a fetch from a real log, it lets other tasks run.
        while True:
            batches = self._take(max_bytes)
            if batches:
                return batches
            self._woken.clear()
            try:
                async with asyncio.timeout_at(deadline):
                    await self._woken.wait()
            except TimeoutError:
                return ()

    def pause(self, partition: Partition) -> None:
        if partition in self._positions:
            self._paused.add(partition)

    def resume(self, partition: Partition) -> None:
        self._paused.discard(partition)
        self.wake()

    async def commit(self, commits: Mapping[Partition, Commit]) -> None:
        if self._group is None:
            return
        if self._state.commit_delay:
            await asyncio.sleep(self._state.commit_delay)
        mine = self._positions.keys() | self._leaving
        owned = {partition: commit for partition, commit in commits.items() if partition in mine}
        if owned and self._state.failing_commits > 0:
            self._state.failing_commits -= 1
            raise LogUnavailableError(f"{self._group}: the commit was told to fail")
        forbidden = self._state.forbidden
        owned = {partition: commit for partition, commit in owned.items() if partition.topic not in forbidden}
        self._state.commits.setdefault(self._group, {}).update(owned)
        if len(owned) < len(mine & commits.keys()):
            raise ForbiddenError(f"{self._group}: expected the rights to all topics of a commit, got some")

    def lag(self) -> Mapping[Partition, int]:
        segments, unreadable = self._state.segments, self.unreadable()
        return {p: segments[p].end - at for p, at in self._positions.items() if p in segments and p not in unreadable}

    def unreadable(self) -> Mapping[Partition, str]:
        gone = {Partition(topic, ALL): NO_TOPIC for topic in self.topics if topic not in self._state.specs}
        if not self._state.leaderless and not self._state.forbidden:
            return gone
        mine = self._state.leaderless.intersection([*self._positions, *self._waiting])
        forbidden = [each for each in (*self._positions, *self._waiting) if each.topic in self._state.forbidden]
        return dict.fromkeys(mine, "no leader") | dict.fromkeys(forbidden, "no right to read it") | gone

    async def close(self) -> None:
        if self._group is None:
            if self in self._state.readers:
                self._state.readers.remove(self)
                await self.revoke()
        elif self in self._state.members[self._group]:
            async with self._state.rebalancing[self._group]:
                await self.revoke()
                self._state.members[self._group].remove(self)
            await _rebalance(self._state, self._group)

    def wake(self) -> None:
        self._woken.set()

    def assign(self, partitions: Sequence[Partition]) -> None:
        """Own these partitions, and tell the listener of those that have a leader."""
        self._waiting = list(partitions)
        self.take_over()

    def take_over(self) -> None:
        """Begin to read what is owned and has a leader, if that hasn't begun."""
        partitions = [partition for partition in self._waiting if partition not in self._state.leaderless]
        self._waiting = [partition for partition in self._waiting if partition in self._state.leaderless]
        commits = self._state.commits.get(self._group or "", {})
        assignments = []
        for partition in partitions:
            start = self._state.segments[partition].start
            commit = commits.get(partition, Commit(self.starts.get(partition, start)))
            self._positions[partition] = max(start, commit.base)
            assignments.append(Assignment(partition, commit, start, partition in commits))
        self._listener.assigned(assignments, list(self._waiting))
        self.wake()

    def see_deleted(self, partition: Partition) -> None:
        position, start = self._positions.get(partition), self._state.segments[partition].start
        if position is not None and position < start and self._group is not None:
            self._positions[partition] = start
            self._listener.records_deleted(partition, range(position, start))

    def start_over(self, partition: Partition) -> None:
        """Read a recreated topic from its start: a reader without a group isn't told, as on Kafka."""
        if partition in self._positions:
            self._positions[partition] = 0

    def begin_anew(self, partition: Partition) -> None:
        if partition in self._positions:
            self._positions[partition] = 0
            self._paused.discard(partition)
            self._listener.restarted(Assignment(partition, Commit(0), 0))

    async def revoke(self) -> None:
        """Disown everything and store what the listener has finished; a failing commit is lost, as on a real log."""
        positions = list(self._positions)
        self._positions.clear()
        self._waiting.clear()
        self._paused.clear()
        if not positions:
            return
        self._leaving = positions
        commits = await self._listener.revoked(positions)
        self._leaving = []
        owned = {partition: commit for partition, commit in commits.items() if partition in positions}
        if self._group is None:
            return
        if self._state.failing_commits > 0:
            self._state.failing_commits -= 1
            return
        self._state.commits.setdefault(self._group, {}).update(owned)

    def _take(self, max_bytes: int) -> list[Batch]:
        batches: list[Batch] = []
        if self._group in self._state.stalled:
            return batches
        for partition, position in self._positions.items():
            state = self._state
            if partition in self._paused or partition in state.leaderless or partition not in state.segments:
                continue
            if partition.topic in state.forbidden:
                continue
            segment = self._state.segments[partition]
            records = _head(segment, position, segment.end, max_bytes) if position < segment.end else []
            self._positions[partition] = records[-1].offset + 1 if records else segment.end
            if records:
                batches.append(Batch(partition, records))
        return batches


async def _rebalance(state: _State, group: str, *, takes: float = 0.0) -> None:
    async with state.rebalancing[group]:
        members = list(state.members.get(group, []))
        await asyncio.gather(*[member.revoke() for member in members])
        if takes:
            await asyncio.sleep(takes)
        shares: list[list[Partition]] = [[] for _ in members]
        topics = sorted({topic for member in members for topic in member.topics})
        for turn, partition in enumerate([partition for topic in topics for partition in state.of(topic)]):
            takers = [index for index, member in enumerate(members) if partition.topic in member.topics]
            shares[takers[turn % len(takers)]].append(partition)
        for member, share in zip(members, shares, strict=True):
            member.assign(share)


def _head(segment: _Segment, start: int, end: int, max_bytes: int = FETCH_BYTES) -> list[Record]:
    """Return the records from `start` on, up to 500 or (but for a single larger one) so many bytes."""
    head: list[Record] = []
    size = 0
    first = bisect_left(segment.records, start, key=_offset)
    for record in islice(segment.records, first, None):
        if record.offset >= end:
            break
        size += len(record.key) + len(record.value) + sum([len(name) + len(text) for name, text in record.headers])
        if head and (size > max_bytes or len(head) == FETCH_RECORDS):
            break
        head.append(record)
    return head
