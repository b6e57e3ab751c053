"""A spool in a world of faults, on virtual time: senders, a log that fails in every way, kills; and a ledger.

The log answers late or never, stores what it has not acknowledged, and what nobody can read yet since a replica lags;
it moves to more partitions, loses leaders. A process is killed between any two steps: what it had in memory is gone,
what its store has acknowledged is there.
"""

import asyncio
import math
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from random import Random

import structlog
from prometheus_client import CollectorRegistry
from structlog.typing import EventDict, FilteringBoundLogger
from typing_extensions import override

from gateway.log.base import NewRecord, Partition, Position, Record, RecordHeaders, TopicSpec, partition_of
from gateway.model import LogUnavailableError, RecordTooLargeError
from gateway.spool.counting import count
from gateway.spool.spool import Spool
from gateway.telemetry.metrics import Metrics
from tests.memory_log import MemoryLog
from tests.spool.memory_store import Disk, MemoryStore
from tests.virtual_time import now

APPEND_TIMEOUT = 5.0
SENDER_WAITS = 2.0
"""Seconds within which every sender has its answer, if only that it is refused."""
RECOVERS_WITHIN = 2.0
"""Seconds for which a spool may refuse what comes after its disk has been full or slow."""
LARGE = b"7"
"""How the values of events end that are larger than others."""
TWIN = 10
"""Of so many events, one has the id of the one before it."""


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
        self.refuses_large = False
        """Whether it takes no record whose value ends like LARGE."""
        self.waiting: list[asyncio.Event] = []
        self.on_moved: Callable[[], None] | None = None
        """Called after some of what a process moves was stored, before it knows."""
        self.processes = 0
        """How many have ended: with each, what its client has yet to send is gone."""

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
        random, process = self._random, self.processes
        await asyncio.sleep(random.uniform(0.001, 0.01))
        for _ in range(40):  # a producer waits for a leader, longer than whoever appends
            if partition in self.closed:
                await asyncio.sleep(0.1)
                if self.processes != process:
                    raise LogUnavailableError("its process has ended")
        if self.mode == "away" or partition in self.closed:
            raise LogUnavailableError("no connection")
        if self.mode == "frozen":  # the request is in a buffer: it is handled when the broker goes on
            event = asyncio.Event()
            self.waiting.append(event)
            await event.wait()
            await asyncio.sleep(random.uniform(0.0, 0.3))
        if self.mode == "slow":
            await asyncio.sleep(self.slowness)
        if self.refuses_large and any(record.value.endswith(LARGE) for record in records):
            raise RecordTooLargeError("MESSAGE_TOO_LARGE")
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
    """One seed. With `more`, also what isn't Kafka's trouble: other limits, damage, a topic that is made anew."""

    def __init__(self, seed: int, *, more: bool = True) -> None:
        self.random = random = Random(seed)
        self._more = Random(f"{seed}/more") if more else None
        self.destroyed: set[bytes] = set()
        """What was in a topic that was deleted and made anew."""
        self.dropped: set[bytes] = set()
        """What an operator has given up of the spool: a process that was about to move it has perhaps done so."""
        self.was_limited = False
        self.log = FaultyLog(random)
        self.disk = Disk()
        self.lines: list[EventDict] = []
        """What it has logged."""
        self.logger: FilteringBoundLogger = structlog.wrap_logger(None, processors=[self._keep])
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
        self._ill_until = -math.inf
        self.trace: list[str] = []

    def _keep(self, _: object, __: str, line: EventDict) -> EventDict:
        self.lines.append(line)
        raise structlog.DropEvent

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
        others = None if self._more is None else asyncio.create_task(self._have_more(self._more))
        while loop.time() < horizon:
            await asyncio.sleep(random.uniform(0.5, 12.0))
            await self._fault()
        await sending
        if others is not None:
            others.cancel()
            await asyncio.wait({others})
        self.log.refuses_large = False
        self.log.on_moved = None
        await asyncio.gather(*self._kills)
        self.log.set_mode("well")
        self.log.closed.clear()
        self._set_disk(is_full=False, is_slow=False)
        self.say("HEALED")
        if self.spool is None:
            await self.start()
        await asyncio.gather(*self._requests)
        assert self.spool is not None
        async with asyncio.timeout(400.0):
            while self.spool.waiting.records:  # noqa: ASYNC110 - what it waits for is up to the mover
                await asyncio.sleep(1.0)
        await asyncio.sleep(20.0)
        for topic in self.topics:
            deleted = self.disk.deleted[topic]
            there = [each.value for each in self.disk.records[topic] if each.offset not in deleted]
            self.left[topic] = len([each for each in there if each not in self.disk.damaged])
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
                self._set_disk(is_full=not self.disk.is_full, is_slow=self.disk.is_slow)
            case "disk":
                self._set_disk(is_full=self.disk.is_full, is_slow=random.random() < 0.3)
            case "grow":
                pass
            case mode:
                self.log.has_slow_queries = random.random() < 0.5
                self._set_disk(is_full=False, is_slow=self.disk.is_slow)
                self.log.set_mode(mode)

    def _set_disk(self, *, is_full: bool, is_slow: bool) -> None:
        if self.disk.is_full or self.disk.is_slow:
            self._ill_until = asyncio.get_running_loop().time()
        self.disk.is_full, self.disk.is_slow = is_full, is_slow

    def _may_refuse(self, now: float) -> bool:
        """Return whether the disk is full or slow, or was a moment ago."""
        return self.disk.is_full or self.disk.is_slow or now < self._ill_until + RECOVERS_WITHIN

    async def _have_more(self, random: Random) -> None:
        """Lower and raise what a topic takes, damage records of the spool, make a topic anew, drop: some, or none."""
        kinds = [each for each in ("limit", "damage", "recreate", "drop") if random.random() < 0.4]
        while kinds:
            await asyncio.sleep(random.uniform(1.0, 15.0))
            topic, what = random.choice(self.topics), random.choice(kinds)
            self.say(f"MORE {what} {topic}")
            match what:
                case "limit":
                    self.log.refuses_large = not self.log.refuses_large
                    self.was_limited = True
                case "damage":
                    there = [each for each in self.disk.records[topic] if each.offset not in self.disk.deleted[topic]]
                    self.disk.damaged.update([each.value for each in random.sample(there, min(2, len(there)))])
                case "drop":
                    await self._drop(topic, random)
                case _:
                    for partition, records in self.log.by_partition(topic):
                        self.destroyed.update([each.value for each in records])
                        self.log.visible.pop(partition, None)
                    await self.log.recreate(topic)

    async def _drop(self, topic: str, random: Random) -> None:
        """Do what `gateway spool drop` does beside a process: note up to where, then delete, while that moves."""
        disk, end = self.disk, len(self.disk.records[topic])
        disk.dropped[topic] = end
        self.dropped.update([each.value for each in disk.records[topic] if each.offset not in disk.deleted[topic]])
        start = 0
        while start < end:
            await asyncio.sleep(random.uniform(0.0, 0.05))
            there = [each for each in disk.records[topic][start:end] if each.offset not in disk.deleted[topic]]
            start = there[19].offset + 1 if len(there) > 19 else end
            gone = [each for each in there if each.offset < start and each.value not in disk.damaged]
            disk.deleted[topic].update([each.offset for each in gone])

    async def start(self) -> None:
        store = self._store = MemoryStore(self.disk, self.random)
        spool = Spool(
            store,
            log=self.log,
            topics=lambda: self.topics,
            metrics=self.metrics,
            logger=self.logger,
            max_bytes=1 << 30,
            max_age=86400.0,
        )
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
        self.log.processes += 1
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
            assert self._may_refuse(loop.time()), "refused with a disk that has room"
            return
        except RecordTooLargeError:
            return
        finally:
            self.slowest = max(self.slowest, loop.time() - sent.began)
        sent.acknowledged_at = loop.time()
        self.say(f"ACK {sent.id.decode()} {sent.topic} {sent.key.decode()} {'spool' if stored is None else stored}")
        self.sent.append(sent)

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
        given_up = self.destroyed | self.dropped
        missing = [each for each in self.sent if each.id not in places and each.id not in given_up]
        problems += [f"lost: {each}" for each in missing if each.id not in self.disk.damaged]
        problems += [
            f"{len(found)} times: {id_.decode()}"
            for id_, found in places.items()
            if len(found) > 1 and not self._may_repeat([partition for partition, _ in found])
        ]
        problems += self._out_of_order(places)
        problems += [f"left in the spool: {count} of {topic}" for topic, count in self.left.items() if count]
        lost, dropped = self.metrics.spool_lost.value, self.metrics.spool_dropped.value
        if lost < len(missing):
            problems.append(f"told to be lost: {lost:g}, of {len(missing)}")
        problems += self._wrongly_told()
        if dropped > len(self.dropped):
            problems.append(f"told to be dropped: {dropped:g}, of {len(self.dropped)}")
        if self.slowest > SENDER_WAITS:
            problems.append(f"a sender waited {self.slowest:.2f} s")
        return problems

    def _wrongly_told(self) -> list[str]:
        """Return what it has logged that isn't what happened."""
        problems = [f"logged: {line}" for line in self.lines if line["event"] == "spool_move_failed"]
        for line in self.lines:
            if line["event"] == "spool_records_lost":
                lost = self.disk.records[line["topic"]][line["offset"] : line["offset"] + line["count"]]
                if not all(each.value in self.disk.damaged for each in lost):
                    problems.append(f"told to be lost, and isn't: {line}")
        return problems

    def _out_of_order(self, places: Mapping[bytes, Sequence[tuple[Partition, int]]]) -> list[str]:
        problems = []
        last: dict[tuple[str, bytes], Sent] = {}
        for each in sorted(self.sent, key=lambda sent: sent.began):
            before = last.get((each.topic, each.key))
            assert each.acknowledged_at is not None
            # An order was only promised to who waited for the answer.
            if self.was_limited and each.id.endswith(LARGE):
                continue  # it keeps no others waiting
            if before is not None and before.acknowledged_at is not None and before.acknowledged_at < each.began:
                ones, others = places.get(before.id, ()), dict(places.get(each.id, ()))
                if before.id in self.destroyed:
                    ones = ()  # it was there before, until somebody deleted the topic
                if before.id in self.dropped or before.id in self.disk.damaged:
                    ones = ()  # it may come late, by its sender's append, which was under way
                # With more partitions, a key may be in another one.
                if any(others.get(partition, offset) < offset for partition, offset in ones[:1]):
                    problems.append(f"order: {before} after {each}")
            if before is None or before.acknowledged_at < each.acknowledged_at:  # type: ignore[operator]
                last[each.topic, each.key] = each
        return problems
