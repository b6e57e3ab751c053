"""The log of a simulation: Kafka as its clients see it, with every failure that the log's contract allows for.

    SimulatedLog     one process's connection. Dies with its process: whatever is called after that never returns
    Broker           what all of them share: records, commits, groups, the nodes' clocks, and the failures in force
    Group            Kafka's eager protocol: JOIN ──all here──▶ generation + 1 ──▶ assignments; an evicted member
                     finds out later, and its commits are refused meanwhile

What is stored, acknowledged and committed is told to the `Ledger`, at the moment at which it happens.
"""

import asyncio
import math
from bisect import bisect_left
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count, islice
from operator import attrgetter
from random import Random
from typing import Protocol
from zlib import crc32

from gateway.log.base import (
    ALL,
    CLOCK,
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
from gateway.log.kafka.broker_clock import BrokerClock
from gateway.log.kafka.scanner import DAMAGED_FOR
from gateway.log.topics import Topics
from gateway.model import LogUnavailableError, RecordTooLargeError
from tests.simulation.loop import EPOCH

APPEND_TIMEOUT = 5.0
REBALANCE_TIMEOUT = 60.0
LOOK_EVERY = 10.0
"""Seconds between looks of a member whether the log's start has passed it, as of the real one."""
START_WAIT, START_INTERVAL = 0.1, 1.0
"""Seconds until a member asks again where to begin with what it can't read, at first and at most, as the real one."""
TICK = 1e-6  # Between what follows each other: timers of the same time have no order.
ATTEMPTS = Topics().attempts

_offset = attrgetter("offset")


class Client(Protocol):
    """A process, as far as its log goes."""

    name: str
    slot: str
    """What comes again with the process that follows it: its host and port."""
    is_dead: bool
    is_newer: bool
    """Whether it is of a newer version, and writes in its format."""

    @property
    def machine(self) -> "Machine": ...


class Machine:
    """The clocks of a process's own machine: the wall's is wrong and is set, the other one drifts."""

    def __init__(self, loop: asyncio.AbstractEventLoop, *, skew: float = 0.0, drift: float = 0.0) -> None:
        self.step = 0.0
        self._loop = loop
        self._skew = skew
        self._drift = drift

    def ticks(self) -> float:
        return self._loop.time() * (1 + self._drift)

    def now(self) -> float:
        return EPOCH + self.ticks() + self._skew + self.step


class Witness(Protocol):
    """Who is told what happens to the log."""

    def stored(self, client: Client, partition: Partition, record: Record, *, by_evicted: bool) -> None: ...
    def is_zombie(self, name: str) -> bool: ...
    def acknowledged(self, partition: Partition, record: Record) -> None: ...
    def unacknowledged(self, partition: Partition, record: Record) -> None: ...
    def committed(
        self, client: Client, group: str, partition: Partition, commit: Commit, *, is_stale: bool
    ) -> None: ...
    def seeded(self, group: str, partition: Partition, commit: Commit) -> None: ...
    def gave_up(self, client: Client, group: str, partitions: Collection[Partition]) -> None: ...
    def evicted(self, client: Client, group: str, partitions: Collection[Partition]) -> None: ...
    def deleted(self, partition: Partition, start: int) -> None: ...
    def recreated(self, partition: Partition) -> None: ...
    def restarted(self, group: str, partitions: Collection[Partition]) -> None: ...
    def took_over(self, group: str, assignment: Assignment, *, is_first: bool) -> None: ...
    def records_deleted(self, group: str, partition: Partition, deleted: range, *, is_told: bool) -> None: ...


@dataclass(slots=True)
class Failure:
    """A way to fail that is in force until a time, for a share of the calls."""

    what: str
    kind: str
    until: float
    share: float


@dataclass(slots=True)
class Segment:
    """The records of a partition, and which node leads it. `start` is the first offset that isn't deleted.

    `life` tells topics of one name apart, each made after the one before was deleted, as a topic's id does.
    """

    leader: int
    life: int = 0
    records: list[Record] = field(default_factory=list)
    start: int = 0
    end: int = 0
    busy_until: float = 0.0

    def has_from(self, offset: int) -> bool:
        """Return whether there is a record from an offset on: at the end, offsets may be left out."""
        return bool(self.records) and self.records[-1].offset >= offset


class Broker:
    """The cluster."""

    def __init__(
        self,
        *,
        random: Random,
        seed: int,
        witness: Witness,
        skews: Sequence[float],
        session: float,
        partitions: Callable[[TopicSpec], int],
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.random = random
        self.seed = seed
        self.random_of_attempts = Random(f"{seed}/broker of attempts")
        self.witness = witness
        self.skews = list(skews)
        self.session = session
        self.specs: dict[str, TopicSpec] = {}
        self.segments: dict[Partition, Segment] = {}
        self.groups: dict[str, Group] = {}
        self.readers: list[SimulatedConsumer] = []
        self.failures: list[Failure] = []
        self.leaderless: dict[Partition, float] = {}
        """Until when they have none."""
        self.damaged: dict[Partition, tuple[int, float]] = {}
        """The offset of a record whose checksum is wrong, and until when it is."""
        self.refusing: dict[Partition, float] = {}
        """Until when they take no appends, though they can be read: too few replicas are in sync."""
        self.gone: set[str] = set()
        """The topics that were deleted and aren't recreated yet."""
        self.deleted: set[str] = set()
        """Those of them that nobody recreates but who creates them."""
        self.has_deleted = False
        self._partitions = partitions

    def of(self, topic: str) -> list[Partition]:
        spec = None if topic in self.gone else self.specs.get(topic)
        return [Partition(topic, number) for number in range(spec.partitions)] if spec else []

    def create(self, specs: Iterable[TopicSpec]) -> list[str]:
        missing = [spec for spec in specs if spec.name not in self.specs or spec.name in self.deleted]
        for spec in missing:
            if spec.name in self.deleted:
                self._create_again(spec.name)
                continue
            self.specs[spec.name] = replace(spec, partitions=self._partitions(spec))
            for partition in self.of(spec.name):
                self.segments[partition] = Segment(leader=crc32(repr(partition).encode()) % len(self.skews))
        return [spec.name for spec in missing]

    def grow(self, topic: str, by: int) -> None:
        """Give a topic that is there more partitions, of which its groups hear soon."""
        if topic in self.gone:
            return
        self.specs[topic] = replace(self.specs[topic], partitions=self.specs[topic].partitions + by)
        for partition in self.of(topic):
            if partition not in self.segments:
                self.segments[partition] = Segment(leader=crc32(repr(partition).encode()) % len(self.skews))
        self._tell_readers(topic)

    def recreate(self, topic: str, seconds: float) -> None:
        """Delete a topic, and make it again after some seconds; at once, if 0: before a member sees that it was away.

        With it goes what groups have committed. What waits for an answer isn't stored while it is away.
        """
        self._empty(topic)
        if not seconds:
            self._see_range(topic)
            return
        for partition in self.of(topic):
            self.lose_leader(partition, seconds)
        self.gone.add(topic)
        self._tell_readers(topic)
        self.loop.call_later(seconds, self._bring_back, topic)

    def delete(self, topic: str) -> None:
        """Delete a topic, until somebody creates one of its name."""
        self._empty(topic)
        self.leaderless |= dict.fromkeys(self.of(topic), math.inf)
        self.gone.add(topic)
        self.deleted.add(topic)
        self._tell_readers(topic)

    def _create_again(self, topic: str) -> None:
        self.deleted.discard(topic)
        self.leaderless = {each: until for each, until in self.leaderless.items() if each.topic != topic}
        self._bring_back(topic)

    def _empty(self, topic: str) -> None:
        """Let a topic be another of its name, without records or commits."""
        for partition in self.of(topic):
            old = self.segments[partition]
            self.segments[partition] = Segment(leader=old.leader, life=old.life + 1)
            self.damaged.pop(partition, None)
            for group in self.groups.values():
                group.commits.pop(partition, None)
            self.witness.recreated(partition)
        self.has_deleted = True

    def _bring_back(self, topic: str) -> None:
        if topic in self.gone:
            self.gone.discard(topic)
            self.see_leaders()
            self._see_range(topic)
            self._tell_readers(topic)

    def _see_range(self, topic: str) -> None:
        for reader in self.readers:
            for partition in self.of(topic):
                reader.start_over(partition)
        for group in self.groups.values():
            for member in group.members:
                for partition in self.of(topic):
                    member.see_range(partition)

    def _tell_readers(self, topic: str) -> None:
        """Let the groups that read a topic hear soon that its partitions aren't those that they know."""
        for group in self.groups.values():
            if any(topic in member.topics for member in group.members):
                self.loop.call_later(self.random.uniform(0.0, 5.0), group.change)

    def lose_leader(self, partition: Partition, seconds: float) -> None:
        """Let nobody read or write a partition for so long."""
        self.leaderless[partition] = max(self.leaderless.get(partition, 0.0), self.loop.time() + seconds)
        self.loop.call_at(self.leaderless[partition], self.see_leaders)

    def damage(self, partition: Partition, share: float, seconds: float) -> None:
        """Let nobody read a partition on from a record for so long: one of those that there are, or the next one."""
        segment, until = self.segments[partition], self.loop.time() + seconds
        index = int(share * len(segment.records))
        offset = segment.records[index].offset if index < len(segment.records) else segment.end
        self.damaged[partition] = offset, until
        self.loop.call_at(until, self.see_leaders)

    def damage_from(self, partition: Partition, start: int) -> int | None:
        """Return the offset of a partition's damaged record, if it has one from an offset on."""
        if partition not in self.damaged:
            return None
        segment, (offset, _) = self.segments[partition], self.damaged[partition]
        return offset if max(start, segment.start) <= offset < segment.end else None

    def refuse_appends(self, partition: Partition, seconds: float) -> None:
        """Let nobody write a partition for so long."""
        self.refusing[partition] = max(self.refusing.get(partition, 0.0), self.loop.time() + seconds)

    def find_leaders(self) -> None:
        """Give each partition a leader and enough replicas, and recreate the topics that are to be."""
        self.leaderless = {each: until for each, until in self.leaderless.items() if each.topic in self.deleted}
        self.refusing.clear()
        self.damaged.clear()
        for topic in self.gone - self.deleted:
            self._bring_back(topic)
        self.see_leaders()

    def see_leaders(self) -> None:
        """Let readers go on with the partitions that have leaders by now."""
        now = self.loop.time()
        self.leaderless = {partition: until for partition, until in self.leaderless.items() if until > now}
        self.damaged = {partition: each for partition, each in self.damaged.items() if each[1] > now}
        for reader in [*self.readers, *[member for group in self.groups.values() for member in group.members]]:
            reader.wake()

    def group(self, name: str) -> "Group":
        if name not in self.groups:
            self.groups[name] = Group(self, name)
        return self.groups[name]

    def failing(self, what: str, topic: str = "") -> str | None:
        """Return the way in which a call about a topic fails now, if it does."""
        now = self.loop.time()
        random = self.random_of_attempts if topic == ATTEMPTS else self.random
        for failure in self.failures:
            if failure.what == what and now < failure.until and random.random() < failure.share:
                return failure.kind
        return None

    def is_failing(self) -> bool:
        return any(self.loop.time() < failure.until for failure in self.failures)

    def move_leaders(self, by: int) -> None:
        for segment in self.segments.values():
            segment.leader = (segment.leader + by) % len(self.skews)

    def set_clock(self, node: int, skew: float) -> None:
        """Let a node's clock step, to so many seconds from the true time."""
        self.skews[node] = skew

    def clock(self, segment: Segment) -> float:
        return EPOCH + self.loop.time() + self.skews[segment.leader]

    def store(
        self,
        client: Client,
        partition: Partition,
        key: bytes,
        value: bytes,
        headers: RecordHeaders,
        *,
        by_evicted: bool = False,
    ) -> Record:
        """Store a record; `by_evicted` says whether its client was evicted when it sent it."""
        segment = self.segments[partition]
        at = int(self.clock(segment) * 1000) / 1000  # Kafka's timestamps are of milliseconds
        if client.is_newer:
            value, headers = _changed(value, headers, OLD, NEW)
        record = Record(segment.end, at, key, value, tuple(headers))
        segment.end += 1
        if self.specs[partition.topic].compacted:
            segment.records = [older for older in segment.records if older.key != key]
        segment.records.append(record)
        self.witness.stored(client, partition, record, by_evicted=by_evicted)
        for group in self.groups.values():
            if (owner := group.owners.get(partition)) is not None:
                owner.wake()
        for reader in self.readers:
            if partition in reader.positions:
                reader.wake()
        return record

    def unacknowledged(self, partition: Partition, records: Iterable[Record]) -> None:
        for record in records:
            self.witness.unacknowledged(partition, record)

    def skip(self, partition: Partition, length: int) -> None:
        """Leave offsets out after the last record, as the markers of a transaction do."""
        self.segments[partition].end += length

    def delete_below(self, partition: Partition, offset: int) -> None:
        """Delete records as retention does, whether they are done or not: the partition's start moves."""
        segment = self.segments[partition]
        if offset > segment.start:
            segment.start = offset
            segment.records = [record for record in segment.records if record.offset >= offset]
            self.has_deleted = True
            self.witness.deleted(partition, offset)

    def died(self, client: Client) -> None:
        """Hear nothing of a process any more: its members are missed once their sessions are over."""
        self.readers = [reader for reader in self.readers if reader.client is not client]
        for group in self.groups.values():
            group.owners = {p: owner for p, owner in group.owners.items() if owner.client is not client}
            for member in [member for member in group.members if member.client is client]:
                self.loop.call_later(self.session, group.remove, member)


class Group:
    """A consumer group: its members, whose the partitions are, and what has been committed."""

    def __init__(self, broker: Broker, name: str) -> None:
        self.name = name
        self.commits: dict[Partition, Commit] = {}
        self.lives: dict[Partition, int] = {}
        """Of which topic each commit speaks: it may be one that is deleted, and be stored for the one after it."""
        self.members: list[SimulatedConsumer] = []
        self.owners: dict[Partition, SimulatedConsumer] = {}
        self.generation = 0
        self._broker = broker
        self._is_stable = True
        self._here: list[SimulatedConsumer] = []
        self._patience: asyncio.TimerHandle | None = None

    def change(self) -> None:
        """Ask every member to give up what it has and to join anew."""
        if not self._is_stable:
            return
        self._is_stable = False
        self._here = []
        self._patience = self._broker.loop.call_later(REBALANCE_TIMEOUT, self._go_on_without)
        for member in self.members:
            self._broker.loop.call_later(self._broker.random.uniform(0.01, 1.0), self._tell, member)

    def _tell(self, member: "SimulatedConsumer") -> None:
        """Let a member hear with a heartbeat that it has to join anew, unless it has."""
        if member in self.members and member not in self._here and not self._is_stable:
            member.heard.set()

    def join(self, member: "SimulatedConsumer") -> None:
        if member not in self.members:
            self.members.append(member)
        self.change()
        if member not in self._here:
            self._here.append(member)  # before it is told
        self._see_who_is_here()

    def remove(self, member: "SimulatedConsumer") -> None:
        if member not in self.members:
            return
        self.members.remove(member)
        if member in self._here:
            self._here.remove(member)
        self.owners = {partition: owner for partition, owner in self.owners.items() if owner is not member}
        self.change()
        self._see_who_is_here()

    def throw_out(self, member: "SimulatedConsumer", learns: float) -> None:
        """Let a member's session end, of which it hears so many seconds later."""
        if member in self.members:
            self._broker.witness.evicted(member.client, self.name, member.owned)
            self.remove(member)
            self._broker.loop.call_later(learns, member.learn)

    def accepts(self, member: "SimulatedConsumer", generation: int) -> bool:
        """Return whether a commit may be stored that a member sent when it was of a generation."""
        return member in self.members and generation == self.generation and member not in self._here

    def evict(self, slot: str) -> None:
        """Remove the dead predecessor of a process, as one that starts does."""
        for member in [each for each in self.members if each.client.slot == slot and each.client.is_dead]:
            self.remove(member)

    def _go_on_without(self) -> None:
        for member in [member for member in self.members if member not in self._here]:
            self.throw_out(member, 0.5)

    def _see_who_is_here(self) -> None:
        if self._is_stable or len(self._here) < len(self.members):
            return
        self._is_stable = True
        if self._patience is not None:
            self._patience.cancel()
        self.generation += 1
        self.owners = {}
        self._here = []
        shares: list[list[Partition]] = [[] for _ in self.members]
        topics = sorted({topic for member in self.members for topic in member.topics})
        for turn, partition in enumerate([each for topic in topics for each in self._broker.of(topic)]):
            takers = [index for index, member in enumerate(self.members) if partition.topic in member.topics]
            taker = takers[turn % len(takers)]
            shares[taker].append(partition)
            self.owners[partition] = self.members[taker]
        for member, share in zip(self.members, shares, strict=True):
            member.assign(self.generation, share)


OLD, NEW = (b"1", b'{"v":1,'), (b"2", b'{"v":2,')
"""How records of two versions tell which they are: by `gw_v`, and at the beginning of an order."""


REDELIVERY, UNKNOWN_KIND = b'{"v":2,"state":', b'{"v":3,"state":'
"""How a command to redeliver begins, and how it does where some processes are to know of none: in their place, it is a
version further."""


def _changed(
    value: bytes, headers: RecordHeaders, old: tuple[bytes, bytes], new: tuple[bytes, bytes]
) -> tuple[bytes, RecordHeaders]:
    if value.startswith(old[1]):
        value = new[1] + value.removeprefix(old[1])
    return value, [(name, new[0] if name == "gw_v" and text == old[0] else text) for name, text in headers]


def as_newer(record: Record) -> Record:
    """Return a record as a process of the newer version understands it."""
    value, headers = _changed(record.value, record.headers, NEW, OLD)
    if value.startswith(UNKNOWN_KIND):
        value = REDELIVERY + value.removeprefix(UNKNOWN_KIND)
    return record._replace(value=value, headers=tuple(headers))


class SimulatedLog:
    """A process's connection to the cluster: the `Log` contract."""

    max_record_bytes = 1_047_564

    def __init__(self, broker: Broker, client: Client, random: Random, min_poll_interval: Callable[[], float]) -> None:
        self.consumers: list[SimulatedConsumer] = []
        self.min_poll_interval = min_poll_interval
        self._broker = broker
        self._client = client
        self._random = random
        self._random_of_attempts = Random(f"{broker.seed}/attempts of {client.name}")
        """Of its own, as are those of `Broker`: what is recorded of attempts changes nothing of the rest."""
        self._known: set[str] = set()
        self.clock = BrokerClock(local=client.machine.now, monotonic=client.machine.ticks)
        self._met: dict[Partition, tuple[int, float]] = {}
        """Where a scan has met a damaged record, and until when none tries again."""
        self.is_timeless = False
        """Whether the log has been asked for its time; until `clock.is_known`, it has given none."""

    async def append(
        self, topic: str, *, key: bytes, value: bytes, headers: RecordHeaders, partition: int | None = None
    ) -> Position:
        self._check()
        new = NewRecord(key, value, headers)
        self._measure(topic, new)
        partitions = self._broker.of(topic)
        if topic in self._broker.gone:
            await asyncio.sleep(self._random.uniform(0.001, APPEND_TIMEOUT))
        if not partitions:
            raise LogUnavailableError(f"{topic}: expected a topic, got a name that is not there")
        number = crc32(key) % len(partitions) if partition is None else partition
        [position] = await self._append(partitions[number], [new])
        return position

    async def append_in_order(self, partition: Partition, records: Sequence[NewRecord]) -> Sequence[Position]:
        """Append batch by batch, each acknowledged before the next is sent."""
        self._check()
        for new in records:
            self._measure(partition.topic, new)
        if partition not in self._broker.segments:
            raise LogUnavailableError(f"{partition.topic}: expected a partition, got one that is not there")
        positions: list[Position] = []
        while len(positions) < len(records):
            batch = records[len(positions) : len(positions) + self._random_for(partition.topic).randint(1, 8)]
            positions += await self._append(partition, batch)
        return positions

    def _measure(self, topic: str, new: NewRecord) -> None:
        size = len(new.key) + len(new.value) + sum([len(name) + len(text) for name, text in new.headers])
        if size > self.max_record_bytes:
            raise RecordTooLargeError(f"{topic}: expected at most {self.max_record_bytes} bytes, got {size}")

    async def _append(self, partition: Partition, batch: Sequence[NewRecord]) -> list[Position]:
        """Append a batch, which is stored as a whole or not."""
        broker, loop, topic = self._broker, self._broker.loop, partition.topic
        random = self._random_for(topic)
        segment = broker.segments[partition]
        is_refused = partition in broker.leaderless or loop.time() < broker.refusing.get(partition, 0.0)
        failure = "refused" if is_refused else broker.failing("append", topic)
        if failure == "refused":
            await asyncio.sleep(random.uniform(0.001, APPEND_TIMEOUT))
            raise LogUnavailableError(f"{topic}: expected an answer, got none")
        stored: asyncio.Future[list[Record]] = loop.create_future()
        is_late = failure in ("late", "ghost")
        delay = random.uniform(0.3, 0.9 * APPEND_TIMEOUT) if is_late else random.uniform(0.0005, 0.003)
        # One after the other in a partition, whoever waits for the answer: cancelling doesn't undo it.
        segment.busy_until = max(segment.busy_until + TICK, loop.time() + delay)

        by_evicted = broker.witness.is_zombie(self._client.name)
        loop.call_at(segment.busy_until, partial(self._store, partition, batch, stored, by_evicted=by_evicted))
        if failure == "ghost":  # given up before it is stored
            wait = random.uniform(0, segment.busy_until - loop.time())
            done, _ = await asyncio.wait((stored,), timeout=wait)
            if not done:
                stored.set_exception(LogUnavailableError("given up"))
                stored.exception()
                raise LogUnavailableError(f"{topic}: expected an answer in time, got none")
        records = await stored
        await asyncio.sleep(random.uniform(0.0005, 0.003))
        if failure == "lost":
            broker.unacknowledged(partition, records)
            raise LogUnavailableError(f"{topic}: expected an answer, got a connection that broke")
        self._check()
        for record in records:
            broker.witness.acknowledged(partition, record)
        self.clock.on_acknowledgement(records[-1].appended_at)
        return [Position(partition.number, record.offset, record.appended_at) for record in records]

    def _store(
        self,
        partition: Partition,
        batch: Sequence[NewRecord],
        stored: asyncio.Future[list[Record]],
        *,
        by_evicted: bool,
    ) -> None:
        """Store a batch, unless its topic is away by now."""
        if partition.topic in self._broker.gone:
            if not stored.done():
                stored.set_exception(LogUnavailableError(f"{partition.topic}: expected a topic, got none"))
                stored.exception()  # asked for, or nobody may have: who sent it may be dead
            return
        records = [self._broker.store(self._client, partition, *new, by_evicted=by_evicted) for new in batch]
        if not stored.done():
            stored.set_result(records)
        elif not stored.cancelled():
            self._broker.unacknowledged(partition, records)

    async def consume(
        self, *, group: str | None, topics: Sequence[str], listener: Listener, since: float | None = None
    ) -> "SimulatedConsumer":
        assert since is None, "the engine reads all of what it follows"
        await self._ask()
        if group is None:
            self._see_leaders([each for topic in topics for each in self._broker.of(topic)])
        consumer = SimulatedConsumer(self._broker, self, self._client, topics=topics, listener=listener)
        self.consumers.append(consumer)
        if group is None:
            self._broker.readers.append(consumer)
            partitions = [partition for topic in topics for partition in self._broker.of(topic)]
            starts = {partition: self._broker.segments[partition].start for partition in partitions}
            consumer.take_over([Assignment(partition, Commit(start), start) for partition, start in starts.items()])
        else:
            if group not in self._known:
                self._known.add(group)
                self._broker.group(group).evict(self._client.slot)
            consumer.start(self._broker.group(group))
        return consumer

    async def scan(self, partition: Partition, start: int, end: int) -> AsyncIterator[Sequence[Record]]:
        while start < end and partition in self._broker.segments:
            await self._ask()
            if partition.topic in self._broker.gone:
                return
            if partition in self._broker.leaderless:
                raise LogUnavailableError(f"{partition.topic}/{partition.number}: expected a leader, got none")
            damage = self._broker.damage_from(partition, start)
            batch = _head(self._broker.segments[partition], start, end if damage is None else min(end, damage))
            if not batch and damage is not None and damage < end:
                self._met[partition] = damage, self._broker.loop.time() + DAMAGED_FOR
                raise LogUnavailableError(
                    f"{partition.topic}/{partition.number}: expected a record, got a wrong checksum"
                )
            if not batch:
                return
            yield [as_newer(record) for record in batch] if self._client.is_newer else batch
            start = batch[-1].offset + 1

    async def partitions(self, topics: Collection[str]) -> Mapping[str, int]:
        await self._ask(*topics)
        return {topic: len(self._broker.of(topic)) for topic in topics if self._broker.of(topic)}

    async def bounds(self, topic: str) -> Mapping[int, tuple[int, int]]:
        await self._ask()
        self._see_leaders(self._broker.of(topic))
        return {each.number: self._bounds(each) for each in self._broker.of(topic)}

    async def readable(self, topic: str) -> tuple[Mapping[int, tuple[int, int]], Mapping[int, str]]:
        await self._ask()
        now, partitions = self._broker.loop.time(), self._broker.of(topic)
        unreadable = {each: "no leader" for each in partitions if each in self._broker.leaderless}
        for each in partitions:
            offset, until = self._met.get(each, (0, 0.0))
            if now < until and offset >= self._broker.segments[each].start:
                unreadable.setdefault(each, f"its records from {offset} on")
        bounds = {each.number: self._bounds(each) for each in partitions if each not in unreadable}
        return bounds, {each.number: reason for each, reason in unreadable.items()}

    async def settled(
        self, topic: str, numbers: Collection[int]
    ) -> tuple[Mapping[int, tuple[int, int]], Mapping[int, str]]:
        await self._ask()
        partitions, leaderless = self._broker.of(topic), self._broker.leaderless
        led = {each.number: self._bounds(each) for each in partitions if each not in leaderless}
        unled = {each.number: "no leader" for each in partitions if each in leaderless}
        return {number: bounds for number, bounds in led.items() if number in numbers}, unled

    def topic_id(self, topic: str) -> str:
        return f"{self._broker.segments[Partition(topic, 0)].life:032x}" if self._broker.of(topic) else ""

    def _bounds(self, partition: Partition) -> tuple[int, int]:
        segment = self._broker.segments[partition]
        return segment.start, segment.end

    async def offsets_at(self, topic: str, at: float, numbers: Collection[int] | None = None) -> Mapping[int, int]:
        await self._ask()
        asked = [each for each in self._broker.of(topic) if numbers is None or each.number in numbers]
        self._see_leaders(asked)
        found = {}
        for partition in asked:
            segment = self._broker.segments[partition]
            later = (record.offset for record in segment.records if record.appended_at >= at)
            found[partition.number] = next(later, segment.end)
        return found

    async def topics(self) -> Collection[str]:
        await self._ask()
        return [topic for topic in self._broker.specs if topic not in self._broker.gone]

    async def topics_of(self, group: str) -> Collection[str]:
        await self._ask()
        return {partition.topic for partition in self._broker.group(group).commits}

    async def committed(self, group: str, topic: str) -> Mapping[int, Commit]:
        await self._ask()
        known, segments = self._broker.group(group), self._broker.segments
        return {
            partition.number: commit
            for partition, commit in known.commits.items()
            if partition.topic == topic and known.lives[partition] == segments[partition].life
        }

    async def seed(self, group: str, commits: Mapping[Partition, Commit]) -> None:
        """Store where a group begins that has no members yet."""
        await self._ask()
        known = self._broker.group(group)
        for partition, commit in commits.items() if not known.members else ():
            if partition not in known.commits:
                known.commits[partition] = commit
                known.lives[partition] = self._broker.segments[partition].life
                self._broker.witness.seeded(group, partition, commit)

    async def groups(self, prefix: str) -> Mapping[str, int]:
        await self._ask()
        groups = [group for group in self._broker.groups.values() if group.commits and group.name.startswith(prefix)]
        return {group.name: len(group.members) for group in groups}

    async def members(self, group: str) -> int:
        await self._ask()
        return len(self._broker.groups[group].members) if group in self._broker.groups else 0

    async def create(self, specs: Sequence[TopicSpec]) -> Sequence[str]:
        await self._ask()
        return self._broker.create(specs)

    async def check(self, specs: Sequence[TopicSpec]) -> Sequence[TopicProblem]:
        await self._ask()
        return [missing_problem(spec) for spec in specs if spec.name not in self._broker.specs]

    async def retentions(self, topics: Collection[str]) -> Mapping[str, float]:
        await self._ask()
        specs = self._broker.specs
        kept = {name: specs[name].retention for name in topics if name in specs and name not in self._broker.gone}
        return {name: math.inf if seconds is None else seconds for name, seconds in kept.items()}

    def now(self) -> float:
        return self.clock.now()

    async def synchronize(self, topic: str) -> None:
        if not self.clock.is_known:
            self.is_timeless = True
            await self.append(topic, key=CLOCK + b"%d" % self._random.randrange(1000), value=b"", headers=[])

    async def ping(self) -> None:
        await self._ask()

    async def refusing(self) -> Mapping[Partition, str]:
        return {}

    async def close(self) -> None:
        pass

    def _check(self) -> None:
        """Let nothing of a dead process go on."""
        if self._client.is_dead:
            raise asyncio.CancelledError

    def _see_leaders(self, partitions: Collection[Partition]) -> None:
        for partition in self._broker.leaderless:
            if partition in partitions:
                raise LogUnavailableError(f"{partition.topic}/{partition.number}: expected a leader, got none")

    async def _ask(self, *about: str) -> None:
        """Wait for an answer of the brokers, which may not come."""
        self._check()
        topic = about[0] if len(about) == 1 else ""
        if self._broker.failing("slow", topic) == "question":
            await asyncio.sleep(self._random_for(topic).uniform(0.1, APPEND_TIMEOUT))
            self._check()
            raise LogUnavailableError("expected an answer, got none")
        await asyncio.sleep(self._random_for(topic).uniform(0.0005, 0.002))
        self._check()

    def _random_for(self, topic: str) -> Random:
        return self._random_of_attempts if topic == ATTEMPTS else self._random


class SimulatedConsumer:
    """A consumer of the cluster: what `gateway/log/kafka/` makes of aiokafka's."""

    _serials = count()

    def __init__(
        self,
        broker: Broker,
        log: SimulatedLog,
        client: Client,
        *,
        topics: Sequence[str],
        listener: Listener,
    ) -> None:
        self.client = client
        self.topics = topics
        self.positions: dict[Partition, int] = {}
        self.owned: list[Partition] = []
        """What is ours until the revocation is over, as `positions` are until it begins."""
        self.group: Group | None = None
        self.generation = -1
        self.heard = asyncio.Event()
        """That the group is changing, or has evicted us."""
        self._broker = broker
        self._log = log
        self._listener = listener
        self._lives: dict[Partition, int] = {}
        """Of which topic of its name our position is."""
        self._out_of_range: set[Partition] = set()
        """Which were asked for a position beyond their end, so that fetches go on at their start."""
        self._paused: set[Partition] = set()
        self._leaving: list[Partition] = []
        self._waiting: list[Partition] = []
        self._shares = 0
        self._waiter: asyncio.Future[None] | None = None
        self._share: asyncio.Future[tuple[int, list[Partition]]] | None = None
        self._giving_up = asyncio.Lock()
        self._committing = asyncio.Lock()
        self._assignments = 0
        self._is_closed = False
        self._sending_until = 0.0
        self._coordination: asyncio.Task[None] | None = None
        self._looking: asyncio.Task[None] | None = None
        self._looked_at = broker.loop.time()

    def start(self, group: Group) -> None:
        """Join in the background, as aiokafka does."""
        self.group = group
        self._coordination = asyncio.create_task(self._coordinate(group), name=f"sim-coordinate-{group.name}")

    async def fetch(self, *, timeout: float, max_bytes: int = FETCH_BYTES) -> Sequence[Batch]:
        self._check()
        loop = self._broker.loop
        deadline = loop.time() + max(timeout, self._log.min_poll_interval())
        self._look_now_and_then()
        assignments = self._assignments
        await asyncio.sleep(0)
        while True:
            if self._is_closed or assignments != self._assignments:
                return ()
            if self._has_records():
                delay = 0.002
                if self._broker.failing("slow") == "fetch":
                    delay = self._broker.random.uniform(0.01, 2.0)
                await asyncio.sleep(delay)
                self._check()
                if assignments == self._assignments:
                    await self._handle_gaps()
                if assignments != self._assignments:
                    return ()
                if batches := self._take(max_bytes):
                    return batches
            if loop.time() >= deadline:
                return ()
            self._waiter = loop.create_future()
            timer = loop.call_at(deadline, self.wake)
            try:
                await self._waiter
            finally:
                timer.cancel()

    def pause(self, partition: Partition) -> None:
        if partition in self.positions:
            self._paused.add(partition)

    def resume(self, partition: Partition) -> None:
        self._paused.discard(partition)
        self.see_range(partition)
        self.wake()

    async def commit(self, commits: Mapping[Partition, Commit]) -> None:
        mine = self.positions.keys() | self._leaving
        await self._commit({partition: each for partition, each in commits.items() if partition in mine})

    def lag(self) -> Mapping[Partition, int]:
        segments, unread = self._broker.segments, {*self._broker.leaderless, *self._damaged()}
        return {each: max(0, segments[each].end - at) for each, at in self.positions.items() if each not in unread}

    def _damaged(self) -> dict[Partition, str]:
        """Return the partitions whose next record is damaged."""
        found = {}
        for partition in self._broker.damaged.keys() & self.positions.keys():
            damage = self._broker.damage_from(partition, self.positions[partition])
            if damage is not None and not _head(self._broker.segments[partition], self.positions[partition], damage, 1):
                found[partition] = f"its records from {damage} on"
        return found

    def unreadable(self) -> Mapping[Partition, str]:
        leaderless, gone = self._broker.leaderless, self._broker.gone
        damaged = self._damaged()
        if not self._waiting and not leaderless:
            return damaged
        unled = {*self._waiting, *leaderless.keys() & self.positions.keys()}
        missing = {Partition(topic, ALL): NO_TOPIC for topic in self.topics if topic in gone}
        return damaged | dict.fromkeys([each for each in unled if each.topic not in gone], "no leader") | missing

    async def close(self) -> None:
        self._check()
        if self._is_closed:
            return
        self._is_closed = True
        self.wake()
        if self.group is None:
            self._broker.readers.remove(self)
            return
        await self._give_up()
        assert self._coordination is not None
        self._coordination.cancel()
        with suppress(asyncio.CancelledError):
            await self._coordination
        self._check()  # or it was we who were cancelled
        self.group.remove(self)

    # What the group has to say.

    def learn(self) -> None:
        """Hear that we are evicted, whatever we are waiting for."""
        self.heard.set()
        if self._share is not None and not self._share.done():
            self._share.set_result((-1, []))

    def assign(self, generation: int, share: list[Partition]) -> None:
        if self._share is not None and not self._share.done():
            self._share.set_result((generation, share))

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def take_over(self, assignments: Sequence[Assignment]) -> None:
        for assignment in assignments:
            partition = assignment.partition
            self.positions[partition] = max(assignment.commit.base, assignment.log_start)
            self._lives[partition] = self._broker.segments[partition].life
            self._out_of_range.discard(partition)
        self.owned = list(self.positions)
        self._assignments += 1
        self._listener.assigned(assignments, list(self._waiting))
        self.wake()

    async def _coordinate(self, group: Group) -> None:
        while not self._is_closed:
            self.heard.clear()
            self._share = self._broker.loop.create_future()
            group.join(self)
            self.generation, share = await self._share
            if self.generation < 0:
                continue
            is_slow = self._broker.failing("slow") == "join"
            await asyncio.sleep(self._broker.random.uniform(0.1, 4.0) if is_slow else 0.003)
            self._begin(group, share)
            await self.heard.wait()
            await self._give_up()

    def _begin(self, group: Group, share: Sequence[Partition]) -> None:
        """Take over what is ours now, from where the group has got to; too late if we are closed meanwhile."""
        if not self._is_closed:
            self._waiting = list(share)
            self._shares += 1
            self._begin_those_led(group, self._shares, START_WAIT)

    def _begin_those_led(self, group: Group, share: int, wait: float) -> None:
        """Begin with what is ours and has a leader by now, if the brokers answer; the listener hears of none, too.

        Asked again and again until all of the share has begun, or is ours no more.
        """
        if share != self._shares or self._is_closed or self.client.is_dead:
            return
        is_known = self._broker.failing("offsets") is None
        led = [partition for partition in self._waiting if is_known and partition not in self._broker.leaderless]
        self._waiting = [partition for partition in self._waiting if partition not in led]
        self.take_over([self._assignment(group, each) for each in led])
        if self._waiting:
            self._broker.loop.call_later(wait, self._begin_those_led, group, share, min(START_INTERVAL, 2 * wait))

    def _assignment(self, group: Group, partition: Partition) -> Assignment:
        """Tell where to go on: where nothing was committed, at the log's start, wherever that has got to."""
        segment = self._broker.segments[partition]
        start, commit = segment.start, group.commits.get(partition)
        is_stale = commit is not None and (commit.base > segment.end or group.lives[partition] != segment.life)
        if is_stale:
            commit = None
        identity = f"{segment.life:032x}"
        assignment = Assignment(partition, commit or Commit(start), start, commit is not None, is_stale, identity)
        self._broker.witness.took_over(group.name, assignment, is_first=commit is None)
        return assignment

    async def _give_up(self) -> None:
        async with self._giving_up:
            owned = list(self.positions)
            self.positions.clear()
            self._paused.clear()
            self._waiting.clear()
            self._shares += 1
            if not owned or self.group is None:
                return
            self._leaving = owned
            commits = await self._listener.revoked(owned)
            self._leaving = []
            self._check()
            with suppress(LogUnavailableError):  # the next owner repeats what was finished since the last commit
                await self._commit({partition: each for partition, each in commits.items() if partition in owned})
            self.owned = []
            self._broker.witness.gave_up(self.client, self.group.name, owned)

    async def _commit(self, commits: Mapping[Partition, Commit]) -> None:
        self._check()
        group = self.group
        if group is None:
            return
        lives = dict(self._lives)  # of whose records these speak, whenever they arrive
        async with self._committing:
            if commits:
                await self._send(group, commits, lives)

    async def _send(self, group: Group, commits: Mapping[Partition, Commit], lives: Mapping[Partition, int]) -> None:
        self._check()
        broker, loop = self._broker, self._broker.loop
        failure = broker.failing("commit")
        if failure == "refused":
            await asyncio.sleep(0.5)
            self._check()
            raise LogUnavailableError(f"{group.name}: expected an answer, got none")
        if (
            failure == "again"
        ):  # aiokafka sends it once more, in the generation there is then, without holding others back
            await asyncio.sleep(broker.random.uniform(0.1, 1.0))
            self._check()
        # One after the other over one connection, whoever waits for the answer: what is sent arrives.
        delay = broker.random.uniform(0.1, 4.0) if failure == "late" else 0.002
        self._sending_until = max(self._sending_until + TICK, loop.time() + delay)
        answer: asyncio.Future[bool] = loop.create_future()
        generation = self.generation

        def arrive() -> None:
            is_accepted = group.accepts(self, generation)
            there = {each: commit for each, commit in commits.items() if each.topic not in broker.gone}
            for partition, commit in there.items() if is_accepted else ():
                group.commits[partition], group.lives[partition] = commit, lives[partition]
                is_stale = lives[partition] != broker.segments[partition].life
                broker.witness.committed(self.client, group.name, partition, commit, is_stale=is_stale)
            if not answer.done():
                answer.set_result(is_accepted and len(there) == len(commits))

        loop.call_at(self._sending_until, arrive)
        is_accepted = await answer
        self._check()
        if not is_accepted:
            text = "expected a member of this generation and topics that are there, got something else"
            raise LogUnavailableError(f"{group.name}: {text}")
        if failure == "lost":
            raise LogUnavailableError(f"{group.name}: expected an answer, got a connection that broke")

    def _check(self) -> None:
        if self.client.is_dead:
            raise asyncio.CancelledError

    def _has_records(self) -> bool:
        segments, paused, leaderless = self._broker.segments, self._paused, self._broker.leaderless
        for partition, at in self.positions.items():
            is_fetched = partition not in paused and partition not in leaderless
            if is_fetched and segments[partition].has_from(first := self._first(partition, at)):
                damage = self._broker.damage_from(partition, first)
                if damage is None or _head(segments[partition], first, damage, 1):
                    return True
        return False

    def see_range(self, partition: Partition) -> None:
        """Let fetches go on at a partition's start if our position is beyond its end: its topic was recreated."""
        at = self.positions.get(partition)
        is_asked = partition not in self._paused and partition not in self._broker.leaderless
        if at is not None and is_asked and at > self._broker.segments[partition].end:
            self._out_of_range.add(partition)

    def start_over(self, partition: Partition) -> None:
        """Read on at the start, without a group, if our position is beyond the end; nobody is told."""
        if self.positions.get(partition, 0) > self._broker.segments[partition].end:
            self.positions[partition] = self._broker.segments[partition].start
            self.wake()

    def _first(self, partition: Partition, at: int) -> int:
        """Return the offset from which fetches go on."""
        return self._broker.segments[partition].start if partition in self._out_of_range else at

    # What has become of the log meanwhile.

    def _look_now_and_then(self) -> None:
        """Look whether the log's start has passed us, which no fetch tells of what is paused, or has nothing left."""
        now = self._broker.loop.time()
        is_under_way = self._looking is not None and not self._looking.done()
        if is_under_way or not self.positions or now < self._looked_at + LOOK_EVERY:
            return
        self._looked_at = now
        if self._broker.has_deleted and self.group is not None:
            self._looking = asyncio.create_task(self._look(self.group), name=f"sim-look-{self.group.name}")

    async def _look(self, group: Group) -> None:
        with suppress(LogUnavailableError):  # the next time, then
            await self._log._ask()
            positions = dict(self.positions)
            starts = self._starts(positions)
            await self._log._ask()
            segments = self._broker.segments
            ends = {partition: segments[partition].end for partition in self._starts(starts)}
            lives = {partition: segments[partition].life for partition in ends}
            await self._begin_anew(
                [
                    partition
                    for partition, end in ends.items()
                    if end < positions[partition] or lives[partition] != self._lives[partition]
                ]
            )
            for partition, start in starts.items():
                self._report_deleted(group, partition, start)

    async def _handle_gaps(self) -> None:
        """See what was deleted before it was fetched: a gap, where the log's start can't be asked for.

        Also of what gets its first record meanwhile: the real one holds each answer against its position.
        """
        assignments = self._assignments
        while self.group is not None and assignments == self._assignments and (jumped := self._jumped()):
            try:
                await asyncio.sleep(0.003)  # The consumer finds the first record by itself.
                await self._log._ask()
                starts = self._starts(jumped)
            except LogUnavailableError:
                starts = {}
            if assignments == self._assignments and (anew := self._out_of_range.intersection(jumped)):
                await self._begin_anew([partition for partition in jumped if partition in anew])
                continue
            for partition in jumped if assignments == self._assignments else ():
                start = self._broker.segments[partition].start
                self._report_deleted(self.group, partition, start, is_told=partition in starts)

    def _jumped(self) -> list[Partition]:
        """Return the partitions whose next record isn't at our position, since the log's start has passed that."""
        segments, leaderless = self._broker.segments, self._broker.leaderless
        return [
            partition
            for partition, at in self.positions.items()
            if (at < segments[partition].start or partition in self._out_of_range)
            and segments[partition].start < segments[partition].end
            and partition not in self._paused
            and partition not in leaderless
        ]

    async def _begin_anew(self, partitions: Iterable[Partition]) -> None:
        """Go on from the first record of partitions whose records aren't those that we have read."""
        assignments = self._assignments
        if self._giving_up.locked() or self.group is None:
            return
        async with self._giving_up:
            mine = [partition for partition in partitions if partition in self.positions]
            if not mine or assignments != self._assignments:
                return
            positions = {partition: self.positions.pop(partition) for partition in mine}
            lives = {partition: self._broker.segments[partition].life for partition in mine}
            try:
                await self._log._ask()
                starts = self._starts(mine)
            except LogUnavailableError:
                starts = {}
            self.positions |= {each: at for each, at in positions.items() if each not in starts}  # the next time, then
            self._lives |= {partition: lives[partition] for partition in starts}
            is_stale = True
            with suppress(LogUnavailableError):
                await self._commit({partition: Commit(start) for partition, start in starts.items()})
                is_stale = False
            self._out_of_range.difference_update(starts)
            self._paused.difference_update(starts)
            self._broker.witness.restarted(self.group.name, starts)
            for partition, start in starts.items():
                self.positions[partition] = start
                identity = f"{lives[partition]:032x}"
                self._listener.restarted(
                    Assignment(partition, Commit(start), start, is_stale=is_stale, topic_id=identity)
                )

    def _starts(self, partitions: Iterable[Partition]) -> dict[Partition, int]:
        leaderless, segments = self._broker.leaderless, self._broker.segments
        return {partition: segments[partition].start for partition in partitions if partition not in leaderless}

    def _report_deleted(self, group: Group, partition: Partition, start: int, *, is_told: bool = True) -> None:
        """Go on at the log's start, and tell the owner what is deleted before it."""
        position = self.positions.get(partition)
        if position is None or position >= start:
            return
        self.positions[partition] = start
        self._broker.witness.records_deleted(group.name, partition, range(position, start), is_told=is_told)
        if is_told:
            self._listener.records_deleted(partition, range(position, start))

    def _take(self, max_bytes: int) -> list[Batch]:
        batches = []
        for partition, position in self.positions.items():
            if partition in self._paused or partition in self._broker.leaderless:
                continue
            segment = self._broker.segments[partition]
            if partition in self._out_of_range or not segment.has_from(position):
                continue  # The real one's position doesn't pass over what is left out at the end, either.
            damage = self._broker.damage_from(partition, position)
            records = _head(segment, position, segment.end if damage is None else damage, max_bytes)
            if not records:
                continue
            self.positions[partition] = records[-1].offset + 1
            self._log.clock.on_record(records[-1].appended_at)
            understood = [as_newer(record) for record in records] if self.client.is_newer else records
            batches.append(Batch(partition, understood))
        return batches


def _head(segment: Segment, start: int, end: int, max_bytes: int = FETCH_BYTES) -> list[Record]:
    """Return the records from `start` on, up to 500 or (but for a single larger one) so many bytes."""
    head: list[Record] = []
    size = 0
    for record in islice(segment.records, bisect_left(segment.records, start, key=_offset), None):
        if record.offset >= end:
            break
        size += len(record.value) + sum([len(text) for _, text in record.headers])
        if head and (size > max_bytes or len(head) == FETCH_RECORDS):
            break
        head.append(record)
    return head
