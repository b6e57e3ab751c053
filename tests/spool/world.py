"""A spool in a world of faults, on virtual time: senders, a log that fails in every way, kills; and a ledger.

The log answers late or never, stores what it has not acknowledged, and what nobody can read yet since a replica lags;
it moves to more partitions, loses leaders. A process is killed between any two steps: what it had in memory is gone,
what its store has acknowledged is there.
"""

import asyncio
import math
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random

from prometheus_client import CollectorRegistry
from structlog.typing import FilteringBoundLogger
from typing_extensions import override

from gateway.log.base import Commit, NewRecord, Partition, Position, Record, RecordHeaders, TopicSpec, partition_of
from gateway.log.embedded.unreadable_records import Counted, Unreadable
from gateway.model import LogUnavailableError
from gateway.spool.counting import count
from gateway.spool.spool import Spool
from gateway.telemetry.metrics import Metrics
from tests.memory_log import MemoryLog
from tests.virtual_time import now

APPEND_TIMEOUT = 5.0
SENDER_WAITS = 2.0
"""Seconds within which every sender has its answer while the spool's disk is well."""
TWIN = 10
"""Of so many events, one has the id of the one before it."""


class MemoryStore:
    """A store as the file would be: what was acknowledged survives the process. `disk` is shared by its successors."""

    def __init__(self, disk: "Disk", random: Random) -> None:
        self._disk = disk
        self._random = random
        self.gave_back = 0
        self.is_dead = False
        """Its process was killed: whatever it still does is of no effect."""

    def _check(self) -> None:
        if self.is_dead:
            raise LogUnavailableError("its process was killed")

    async def append(self, topic: str, *, key: bytes, value: bytes, headers: RecordHeaders) -> None:
        await asyncio.sleep(self._random.uniform(0.0, 0.02))
        if self._disk.is_full:
            raise LogUnavailableError("disk full")
        self._check()
        self._disk.add(topic, key, value, headers)
        await asyncio.sleep(0.0)
        if self._disk.is_slow and self._random.random() < 0.1:
            raise LogUnavailableError("no answer of the disk in time")

    async def topics(self) -> Collection[str]:
        return list(self._disk.records)

    async def end(self, topic: str) -> int:
        await asyncio.sleep(0.0)
        return len(self._disk.records[topic])

    async def read(self, topic: str, start: int, end: int) -> tuple[Sequence[Record], int, Sequence[Unreadable]]:
        await asyncio.sleep(self._random.uniform(0.0, 0.005))
        limit, end = end, start + self._random.randint(1, 50)
        deleted = self._disk.deleted[topic]
        found = [each for each in self._disk.records[topic][start:] if each.offset not in deleted][: end - start]
        found = [each for each in found if each.offset < limit]
        end = found[-1].offset + 1 if len(found) == end - start else limit
        lost = [Unreadable(each.offset, each.offset + 1, "") for each in found if each.value in self._disk.damaged]
        return [each for each in found if each.value not in self._disk.damaged], end, lost

    async def counted(self, topic: str, start: int, end: int) -> tuple[Sequence[Counted], int, Sequence[Unreadable]]:
        found, end, lost = await self.read(topic, start, end)
        return [Counted(each.offset, each.key, len(each.value), each.appended_at) for each in found], end, lost

    async def moved(self, topic: str) -> Commit:
        found, dropped = self._disk.commits.get(topic, Commit(0)), await self.dropped(topic)
        return Commit(dropped) if found.base < dropped else found

    async def dropped(self, topic: str) -> int:
        return self._disk.dropped.get(topic, 0)

    async def commit(self, commits: Mapping[str, Commit]) -> None:
        try:
            await self._write()
        except LogUnavailableError:
            self._disk.unnoted.update(() if self.is_dead else commits)
            raise
        self._disk.commits.update(commits)
        self._disk.unnoted.difference_update(commits)
        await asyncio.sleep(0.0)

    async def _write(self) -> None:
        await asyncio.sleep(self._random.uniform(0.0, 0.02))
        self._check()
        if self._disk.is_full and self._random.random() < 0.5:
            raise LogUnavailableError("disk full")

    async def delete(self, topic: str, offsets: Sequence[int]) -> Collection[int]:
        await self._write()
        kept = [each for each in offsets if self._disk.records[topic][each].value in self._disk.damaged]
        self._disk.deleted[topic].update(set(offsets).difference(kept))
        await asyncio.sleep(0.0)
        return kept

    async def delete_below(self, topic: str, offset: int) -> None:
        await self.delete(topic, range(offset))

    async def ends(self) -> Mapping[str, int]:
        await asyncio.sleep(0.0)
        return {topic: len(records) for topic, records in self._disk.records.items()}

    async def left(self) -> Mapping[str, int]:
        deleted = self._disk.deleted
        return {topic: end for topic, end in (await self.ends()).items() if len(deleted[topic]) < end}

    async def check(self) -> None:
        self._check()

    async def has_records(self, topic: str) -> bool:
        return topic in await self.left()

    async def give_back(self) -> None:
        self.gave_back += 1
        await asyncio.sleep(0.0)

    async def ping(self) -> None:
        if self._disk.is_full:
            raise LogUnavailableError("disk full")

    def now(self) -> float:
        return now()

    async def free_bytes(self) -> tuple[int, int]:
        return 1 << 40, 1 << 40

    async def close(self) -> None:
        pass


@dataclass
class Disk:
    """What survives a process."""

    records: dict[str, list[Record]] = field(default_factory=lambda: defaultdict(list))
    deleted: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    commits: dict[str, Commit] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    unnoted: set[str] = field(default_factory=set)
    """Topics whose progress couldn't be noted."""
    damaged: set[bytes] = field(default_factory=set)
    is_full: bool = False
    is_slow: bool = False
    """Then some of what it stores it says it hasn't."""

    def drop(self, topic: str) -> None:
        """Do what `gateway spool drop` does."""
        self.dropped[topic] = len(self.records[topic])
        self.deleted[topic].update(range(len(self.records[topic])))

    def add(self, topic: str, key: bytes, value: bytes, headers: RecordHeaders) -> None:
        self.records[topic].append(Record(len(self.records[topic]), now(), key, value, tuple(headers)))


class FaultyLog(MemoryLog):
    """A log as a producer sees a cluster in trouble. `mode` is how it is now."""

    def __init__(self, random: Random) -> None:
        super().__init__(now=now)
        self._random = random
        self.mode = "well"
        self.slowness = 3.0
        self.has_slow_queries = True
        self.closed: set[Partition] = set()
        self.visible: dict[Partition, int] = {}
        """Of partitions whose replica lags: the end of what can be read; what was stored since isn't acknowledged."""
        self.waiting: list[asyncio.Event] = []
        self.on_moved: Callable[[], None] | None = None
        """Called after some of what a process moves was stored, before it knows."""

    def by_partition(self, topic: str) -> list[tuple[Partition, list[Record]]]:
        """Return what a topic holds."""
        return [(partition, self._state.segments[partition].records) for partition in self._state.of(topic)]

    def set_mode(self, mode: str) -> None:
        self.mode = mode
        if mode == "lagging":
            for partition, segment in self._state.segments.items():
                self.visible.setdefault(partition, segment.end)
        elif mode != "away":  # as long as nobody hears of them, replicas may lag on
            self.visible.clear()
        if mode != "frozen":
            for each in self.waiting:
                each.set()
            self.waiting.clear()

    @override
    async def append(
        self, topic: str, *, key: bytes, value: bytes, headers: RecordHeaders, partition: int | None = None
    ) -> Position:
        count = (await self.partitions_now([topic])).get(topic, 0)
        if not count:
            raise LogUnavailableError("no such topic")
        where = Partition(topic, partition_of(key, count) if partition is None else partition)
        positions = await self._send(where, [NewRecord(key, value, headers)])
        return positions[0]

    @override
    async def append_in_order(self, partition: Partition, records: Sequence[NewRecord]) -> Sequence[Position]:
        stored: list[Position] = []
        for start in range(0, len(records), 40):  # a batch is stored as a whole or not
            stored += await self._send(partition, records[start : start + 40])
            if self.on_moved is not None and self._random.random() < 0.02:
                self.on_moved()
                await asyncio.sleep(1.0)
        return stored

    async def _send(self, partition: Partition, records: Sequence[NewRecord]) -> Sequence[Position]:
        """Store a batch within the append's timeout, or lose the answer, or the batch."""
        task = asyncio.create_task(self._reach(partition, records))
        done, _ = await asyncio.wait({task}, timeout=APPEND_TIMEOUT * 0.8)
        if not done:
            task.add_done_callback(lambda task: task.cancelled() or task.exception())
            raise LogUnavailableError("no acknowledgement in time")
        return task.result()

    async def _reach(self, partition: Partition, records: Sequence[NewRecord]) -> Sequence[Position]:
        random = self._random
        await asyncio.sleep(random.uniform(0.001, 0.01))
        for _ in range(40):  # a producer waits for a leader, longer than whoever appends
            if partition in self.closed:
                await asyncio.sleep(0.1)
        if self.mode == "away" or partition in self.closed:
            raise LogUnavailableError("no connection")
        if self.mode == "frozen":  # the request is in a buffer: it is handled when the broker goes on
            event = asyncio.Event()
            self.waiting.append(event)
            await event.wait()
            await asyncio.sleep(random.uniform(0.0, 0.3))
        if self.mode == "slow":
            await asyncio.sleep(self.slowness)
        positions = [self._store(partition, record) for record in records]
        if self.mode == "cut" or (self.mode == "flaky" and random.random() < 0.3):
            raise LogUnavailableError("the connection was cut before the answer")
        while positions[-1].offset >= self.visible.get(partition, math.inf):  # noqa: ASYNC110 - it is the world that goes on
            await asyncio.sleep(0.1)
        await asyncio.sleep(random.uniform(0.0, 0.01))
        return positions

    async def partitions_now(self, topics: Collection[str]) -> Mapping[str, int]:
        return await super().partitions(topics)

    @override
    async def partitions(self, topics: Collection[str]) -> Mapping[str, int]:
        await self._query()
        return await super().partitions(topics)

    @override
    async def readable(self, topic: str) -> tuple[Mapping[int, tuple[int, int]], Mapping[int, str]]:
        await self._query()
        found, problems = await super().readable(topic)
        closed = {each.number: "no leader" for each in self.closed if each.topic == topic}
        seen = {number: (start, self._seen(Partition(topic, number), end)) for number, (start, end) in found.items()}
        return {number: each for number, each in seen.items() if number not in closed}, {**problems, **closed}

    def _seen(self, partition: Partition, offset: int) -> int:
        """Return an offset, or the end of what can be read if that is before it."""
        return min(offset, self.visible.get(partition, offset))

    @override
    async def settled(
        self, topic: str, numbers: Collection[int]
    ) -> tuple[Mapping[int, tuple[int, int]], Mapping[int, str]]:
        found, problems = await self.readable(topic)
        asked = {number: (start, self._end(topic, number)) for number, (start, _) in found.items() if number in numbers}
        for _ in range(20):
            if all(self._seen(Partition(topic, number), end) == end for number, (_, end) in asked.items()):
                break
            await asyncio.sleep(0.1)
        else:
            raise LogUnavailableError("a replica lags")
        return asked, problems

    def _end(self, topic: str, number: int) -> int:
        return self._state.segments[Partition(topic, number)].end

    @override
    async def offsets_at(self, topic: str, at: float, numbers: Collection[int] | None = None) -> Mapping[int, int]:
        await self._query()
        found = await super().offsets_at(topic, at, numbers)
        return {number: self._seen(Partition(topic, number), offset) for number, offset in found.items()}

    @override
    async def scan(self, partition: Partition, start: int, end: int) -> AsyncIterator[Sequence[Record]]:
        async for records in super().scan(partition, start, self._seen(partition, end)):
            await self._query()
            yield records

    @override
    async def ping(self) -> None:
        await self._query()

    async def _query(self) -> None:
        await asyncio.sleep(self._random.uniform(0.001, 0.01))
        if self.mode in ("away", "frozen", "cut"):
            raise LogUnavailableError("no connection")
        if self.mode == "slow" and self.has_slow_queries:
            await asyncio.sleep(self.slowness)


@dataclass
class Sent:
    """An event as its sender knows it; its `event_id` may be that of another one of the same request."""

    id: bytes
    topic: str
    key: bytes
    began: float
    event_id: bytes
    acknowledged_at: float | None = None


class World:
    """One seed."""

    def __init__(self, seed: int, logger: FilteringBoundLogger) -> None:
        self.random = random = Random(seed)
        self.log = FaultyLog(random)
        self.disk = Disk()
        self.logger = logger
        self.topics = [f"gateway.events.s{number}" for number in range(random.randint(1, 3))]
        self.sent: list[Sent] = []
        self.metrics = Metrics(CollectorRegistry())
        self.spool: Spool | None = None
        self.kills = 0
        self.left: dict[str, int] = {}
        self.unnoted: set[str] = set()
        """Topics of which a killed process has moved what it couldn't note, since its disk was full."""
        self.was_closed: set[Partition] = set()
        self.grown: set[str] = set()
        self._store: MemoryStore | None = None
        self._run: asyncio.Task[None] | None = None
        self._kills: list[asyncio.Task[None]] = []
        self._requests: dict[asyncio.Task[None], None] = {}
        self.slowest = 0.0
        self.trace: list[str] = []

    def say(self, text: str) -> None:
        self.trace.append(f"{asyncio.get_running_loop().time():8.3f} {text}")

    async def run(self) -> None:
        random = self.random
        specs = [TopicSpec(name=topic, partitions=random.randint(1, 4), retention=None) for topic in self.topics]
        await self.log.create(specs)
        await self.start()
        self.log.on_moved = self._kill_soon
        horizon = random.uniform(20.0, 120.0)
        loop = asyncio.get_running_loop()
        sending = asyncio.create_task(self._send_all(horizon, rate=random.uniform(1.0, 40.0)))
        while loop.time() < horizon:
            await asyncio.sleep(random.uniform(0.5, 12.0))
            await self._fault()
        await sending
        self.log.on_moved = None
        await asyncio.gather(*self._kills)
        self.log.set_mode("well")
        self.log.closed.clear()
        self.disk.is_full = self.disk.is_slow = False
        self.say("HEALED")
        if self.spool is None:
            await self.start()
        await asyncio.gather(*self._requests)
        assert self.spool is not None
        async with asyncio.timeout(400.0):
            while self.spool.waiting.records:  # noqa: ASYNC110 - what it waits for is up to the mover
                await asyncio.sleep(1.0)
        await asyncio.sleep(20.0)
        self.left = {topic: len(self.disk.records[topic]) - len(self.disk.deleted[topic]) for topic in self.topics}
        await self.kill(is_restarted=False)

    async def _fault(self) -> None:
        random = self.random
        what = random.choice(
            ("well", "away", "frozen", "slow", "cut", "flaky", "lagging", "close", "find", "kill", "grow", "disk")
        )
        self.say(f"FAULT {what}")
        match what:
            case "close":
                topic = random.choice(self.topics)
                count = (await self.log.partitions_now([topic]))[topic]
                closed = Partition(topic, random.randrange(count))
                self.log.closed.add(closed)
                self.was_closed.add(closed)
            case "find":
                self.log.closed.clear()
            case "kill":
                await self.kill(is_restarted=True, is_clean=random.random() < 0.3)
            case "grow" if random.random() < 0.6:
                topic = random.choice(self.topics)
                count = (await self.log.partitions_now([topic]))[topic]
                self.log.grow(TopicSpec(name=topic, partitions=count + random.randint(1, 3), retention=None))
                self.grown.add(topic)
            case "disk" if random.random() < 0.3:
                self.disk.is_full = not self.disk.is_full
            case "disk":
                self.disk.is_slow = random.random() < 0.3
            case "grow":
                pass
            case mode:
                self.log.has_slow_queries = random.random() < 0.5
                self.disk.is_full = False
                self.log.set_mode(mode)

    async def start(self) -> None:
        store = self._store = MemoryStore(self.disk, self.random)
        spool = Spool(store, log=self.log, metrics=self.metrics, logger=self.logger, max_bytes=1 << 30, max_age=86400.0)
        await count(store, spool.waiting)
        self.spool = spool
        self._run = asyncio.create_task(spool.run())

    def _kill_soon(self) -> None:
        self.say("KILLED WHILE IT MOVES")
        self._kills.append(asyncio.create_task(self.kill(is_restarted=True)))

    async def kill(self, *, is_restarted: bool, is_clean: bool = False) -> None:
        """End the process between two steps; nothing that it awaits is finished, unless it is a clean stop."""
        if self.spool is None:
            return
        assert self._store is not None
        self._store.is_dead = not is_clean
        self.unnoted |= self.disk.unnoted
        self.kills += 1
        requests, self._requests = self._requests, {}
        tasks = [*requests, *([] if self._run is None else [self._run])]
        self.spool = self._run = None
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if is_restarted:
            await asyncio.sleep(self.random.uniform(0.0, 5.0))
            await self.start()

    async def _send_all(self, horizon: float, *, rate: float) -> None:
        random, loop = self.random, asyncio.get_running_loop()
        number = 0
        while loop.time() < horizon:
            await asyncio.sleep(random.expovariate(rate))
            if self.spool is None:
                continue
            key = b"k%d" % random.randrange(30)
            first = number - (number % TWIN == 1)
            sent = Sent(b"e%d" % number, random.choice(self.topics), key, loop.time(), event_id=b"e%d" % first)
            number += 1
            task = asyncio.create_task(self._request(self.spool, sent))
            self._requests[task] = None
            task.add_done_callback(lambda task: self._requests.pop(task, None))

    async def _request(self, spool: Spool, sent: Sent) -> None:
        loop = asyncio.get_running_loop()
        headers = [("ce_specversion", b"1.0"), ("ce_id", sent.event_id)]
        try:
            stored = await spool.append(sent.topic, key=sent.key, value=sent.id, headers=headers)
        except LogUnavailableError:
            assert self.disk_was_full, "refused with a disk that has room"
            return
        sent.acknowledged_at = loop.time()
        self.slowest = max(self.slowest, loop.time() - sent.began)
        self.say(f"ACK {sent.id.decode()} {sent.topic} {sent.key.decode()} {'spool' if stored is None else stored}")
        self.sent.append(sent)

    @property
    def disk_was_full(self) -> bool:
        return any("FAULT disk" in line for line in self.trace)

    def _may_repeat(self, partitions: Sequence[Partition]) -> bool:
        """Return whether an event may be in these partitions, as docs/spool.md says."""
        topic = partitions[0].topic
        # What was tried may be in a partition that couldn't be read when the topic had more of them already.
        is_unseen = topic in self.grown and len(set(partitions)) > 1 and self.was_closed.intersection(partitions)
        return bool(is_unseen) or topic in self.unnoted

    def verdict(self) -> list[str]:
        """Return what is wrong."""
        problems = []
        places: dict[bytes, list[tuple[Partition, int]]] = defaultdict(list)
        for topic in self.topics:
            for partition, records in self.log.by_partition(topic):
                for record in records:
                    places[record.value].append((partition, record.offset))
        problems += [f"lost: {each}" for each in self.sent if each.id not in places]
        problems += [
            f"{len(found)} times: {id_.decode()}"
            for id_, found in places.items()
            if len(found) > 1 and not self._may_repeat([partition for partition, _ in found])
        ]
        last: dict[tuple[str, bytes], Sent] = {}
        for each in sorted(self.sent, key=lambda sent: sent.began):
            before = last.get((each.topic, each.key))
            assert each.acknowledged_at is not None
            # An order was only promised to who waited for the answer.
            if before is not None and before.acknowledged_at is not None and before.acknowledged_at < each.began:
                ones, others = places.get(before.id, ()), dict(places.get(each.id, ()))
                # With more partitions, a key may be in another one.
                if any(others.get(partition, offset) < offset for partition, offset in ones[:1]):
                    problems.append(f"order: {before} after {each}")
            if before is None or before.acknowledged_at < each.acknowledged_at:  # type: ignore[operator]
                last[each.topic, each.key] = each
        problems += [f"left in the spool: {count} of {topic}" for topic, count in self.left.items() if count]
        told = {"lost": self.metrics.spool_lost.value, "dropped": self.metrics.spool_dropped.value}
        problems += [f"told to be {what}: {number:g}" for what, number in told.items() if number]
        if self.slowest > SENDER_WAITS:
            problems.append(f"a sender waited {self.slowest:.2f} s")
        return problems
