"""What is moved when, and what waits for what: on virtual time, without the faults of a whole world."""

import asyncio
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from random import Random
from typing import Any

import pytest
import structlog
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs
from typing_extensions import override

from gateway.log.base import ALL, Commit, NewRecord, Partition, Position, RecordHeaders, TopicSpec, partition_of
from gateway.model import LogUnavailableError, RecordTooLargeError
from gateway.spool import mover as mover_module
from gateway.spool.counting import count
from gateway.spool.fair_turns import FairTurns
from gateway.spool.mover import Mover
from gateway.spool.records import spool_headers
from gateway.spool.spool import Spool
from gateway.spool.waiting import Waiting
from gateway.telemetry.metrics import Metrics
from tests.memory_log import MemoryLog
from tests.spool.memory_store import Disk, MemoryStore
from tests.virtual_time import now, run

TOPIC = "gateway.events.github"
MISSING = "expected a topic of the log, got none of this name"
KEYS = {partition_of(b"%d" % number, 2): b"%d" % number for number in range(20)}


class LimitedLog(MemoryLog):
    """A log that takes no value of more than `limit` bytes, as a broker decides it; counts what it is asked."""

    def __init__(self) -> None:
        super().__init__(now=now)
        self.limit = 1000
        self.fails = False
        self.away = False
        self.appends = self.looks = 0

    @override
    async def append(
        self, topic: str, *, key: bytes, value: bytes, headers: RecordHeaders, partition: int | None = None
    ) -> Position:
        if self.away:
            raise LogUnavailableError("no connection")
        return await super().append(topic, key=key, value=value, headers=headers, partition=partition)

    @override
    async def append_in_order(self, partition: Partition, records: Sequence[NewRecord]) -> Sequence[Position]:
        self.appends += 1
        if self.fails or self.away:
            raise LogUnavailableError("no acknowledgement")
        if any(len(record.value) > self.limit for record in records):
            raise RecordTooLargeError(f"{partition.topic}: MESSAGE_TOO_LARGE")
        return await super().append_in_order(partition, records)

    @override
    async def offsets_at(self, topic: str, at: float, numbers: Collection[int] | None = None) -> Mapping[int, int]:
        self.looks += 1
        return await super().offsets_at(topic, at, numbers)


class Process:
    """A mover with its log and disk. `spool` stores events of a partition, as an ingress would."""

    def __init__(self, log: LimitedLog, disk: Disk) -> None:
        self.log = log
        self.disk = disk
        self.store = MemoryStore(disk, Random(1))
        self.waiting = Waiting()
        self.metrics = Metrics(CollectorRegistry())
        self.mover = Mover(
            log=log, store=self.store, waiting=self.waiting, metrics=self.metrics, logger=structlog.get_logger()
        )

    async def spool(self, value: bytes, *, number: int = 0, tried_at: float | None = None) -> None:
        key = KEYS[number]
        headers = spool_headers([("ce_id", value[:20]), ("gw_at", b"1.0")], tried_at)
        self.waiting.add(TOPIC, key, len(value), at=now())
        await self.store.append(TOPIC, key=key, value=value, headers=headers)

    def fill(self, count: int, *, number: int) -> None:
        for _ in range(count):
            value = b"e%d" % len(self.disk.records[TOPIC])
            self.disk.add(TOPIC, KEYS[number], value, [("ce_id", value), ("gw_at", b"1.0")])

    async def until_left(self, records: int, timeout: float) -> None:
        async with asyncio.timeout(timeout):
            while self.waiting.records > records:  # noqa: ASYNC110 - it is the mover that goes on
                await asyncio.sleep(0.1)


@asynccontextmanager
async def a_process(log: LimitedLog, disk: Disk) -> AsyncIterator[Process]:
    process = Process(log, disk)
    await count(process.store, process.waiting)
    running = asyncio.create_task(process.mover.run())
    try:
        yield process
    finally:
        running.cancel()
        await asyncio.wait({running})


async def a_log() -> LimitedLog:
    log = LimitedLog()
    await log.create([TopicSpec(name=TOPIC, partitions=2, retention=None)])
    return log


@pytest.mark.rotated(share=1 / 4, group="spool")
def test_a_partition_without_a_leader_keeps_no_other_waiting_however_long_its_backlog() -> None:
    async def scenario() -> None:
        log, disk = await a_log(), Disk()
        log.lose_leader(Partition(TOPIC, 0))
        Process(log, disk).fill(40_000, number=0)
        Process(log, disk).fill(20_000, number=1)
        async with a_process(log, disk) as process:
            await process.until_left(40_000, timeout=60.0)
            assert len(log.records(TOPIC)) == 20_000
            assert process.mover.reasons
            log.find_leader(Partition(TOPIC, 0))
            await process.until_left(0, timeout=60.0)
        assert len(log.records(TOPIC)) == 60_000
        assert [each.value for each in log.records(TOPIC)[:2]] == [b"e0", b"e1"]

    run(scenario())


def test_what_the_log_takes_for_too_large_is_told_once_and_keeps_nobody_waiting() -> None:
    async def scenario() -> None:
        log, disk = await a_log(), Disk()
        with capture_logs() as lines:
            async with a_process(log, disk) as process:
                for number in range(100):
                    await process.spool(b"%03d" % number + bytes(2000 if number == 40 else 0))
                await process.until_left(1, timeout=10.0)
                assert process.waiting.large == 1
                assert "MESSAGE_TOO_LARGE" in process.mover.reasons[TOPIC]
                await process.spool(b"later")
                await process.until_left(1, timeout=10.0)
                log.appends = log.looks = 0
                await asyncio.sleep(mover_module.LARGE_INTERVAL * 3)
                assert 2 <= log.appends <= 3, "it has no turns"
                assert log.looks == 0
                log.limit = 5000
                await process.until_left(0, timeout=mover_module.LARGE_INTERVAL + 1)
                assert process.waiting.large == 0
        told = [line for line in lines if line["event"] == "spool_record_too_large"]
        assert [(line["topic"], line["offset"]) for line in told] == [(TOPIC, 40)]
        values = [each.value[:3] for each in log.records(TOPIC)]
        assert len(values) == 101
        assert len(set(values)) == 101

    run(scenario())


def test_what_is_too_large_closes_the_spool_to_nobody_however_old_it_is() -> None:
    async def scenario() -> None:
        log, disk = await a_log(), Disk()
        metrics, logger = Metrics(CollectorRegistry()), structlog.get_logger()
        store = MemoryStore(disk, Random(1))
        spool = Spool(
            store, log=log, topics=lambda: [TOPIC], metrics=metrics, logger=logger, max_bytes=1 << 30, max_age=900.0
        )
        running = asyncio.create_task(spool.run())

        async def put(value: bytes, number: int = 0) -> Position | None:
            return await spool.append(TOPIC, key=KEYS[number], value=value, headers=[("ce_id", value[:9])])

        log.away = True
        assert await put(bytes(2000)) is None
        assert await put(b"1", number=1) is None
        log.away = False
        await asyncio.sleep(1000.0)
        assert (spool.waiting.records, spool.waiting.oldest, spool.takes_events) == (1, None, True)
        assert spool.used < 0.1
        assert metrics.spool_too_large.value == 1
        assert spool.notes() == ["spool: 1 events are too large for their topics"]
        assert await put(b"2") is not None, "nothing follows it"
        log.away = True
        await asyncio.sleep(mover_module.LARGE_INTERVAL * 2)
        for number in (0, 1):
            assert await put(b"3", number=number) is None
            assert spool.takes_events
        log.away = False
        log.limit = 5000
        await asyncio.sleep(mover_module.LARGE_INTERVAL + 60.0)
        assert (spool.waiting.records, spool.waiting.bytes, spool.waiting.has(TOPIC)) == (0, 0, False)
        assert metrics.spool_too_large.value == 0
        assert len(log.records(TOPIC)) == 5
        running.cancel()
        await asyncio.wait({running})

    run(scenario())


def test_an_event_has_its_topic_looked_at_and_not_all_of_them() -> None:
    async def scenario() -> None:
        log, topics = LimitedLog(), [f"gateway.events.s{number}" for number in range(200)]
        log.away = True
        await log.create([TopicSpec(name=topic, partitions=2, retention=None) for topic in topics])
        process = Process(log, Disk())
        for topic in topics:
            process.waiting.add(topic, b"k", 1, at=now())
            process.disk.add(topic, b"k", b"e", [("ce_id", topic.encode())])
        looks = list[str]()
        ask = process.mover._ask_for_turns

        async def counted(topic: str) -> None:
            looks.append(topic)
            await ask(topic)

        process.mover._ask_for_turns = counted  # type: ignore[method-assign]
        running = asyncio.create_task(process.mover.run())
        await asyncio.sleep(5.0)
        looks.clear()
        began = asyncio.get_running_loop().time()
        for _ in range(300):
            process.mover.wake(topics[7])
            await asyncio.sleep(0.001)
        all_looks = int((asyncio.get_running_loop().time() - began) / mover_module.INTERVAL) + 1
        assert looks.count(topics[7]) >= 250
        assert len(looks) <= 300 + (all_looks + 8) * len(topics)
        log.away = False
        await process.until_left(0, timeout=60.0)
        running.cancel()
        await asyncio.wait({running})

    run(scenario())


@pytest.mark.parametrize("after", [0.05, 0.2])
def test_a_topic_that_was_not_asked_about_yet_is_not_told_to_be_missing(after: float) -> None:
    """Partitions are asked for every 0.25 s at most, and an event of another source may come a moment after that."""

    async def scenario() -> None:
        log, other = await a_log(), "gateway.events.stripe"
        await log.create([TopicSpec(name=other, partitions=2, retention=None)])
        with capture_logs() as lines:
            async with a_process(log, Disk()) as process:
                await process.spool(b"a")
                process.mover.wake(TOPIC)
                await asyncio.sleep(after)
                process.waiting.add(other, b"k", 1, at=now())
                process.disk.add(other, b"k", b"b", [("ce_id", b"b"), ("gw_at", b"1.0")])
                process.mover.wake(other)
                await process.until_left(0, timeout=1.0)
                assert [each.value for each in log.records(other)] == [b"b"]
        assert not [each for each in lines if each["event"] == "spool_waits"]

    run(scenario())


def test_a_topic_that_is_missing_is_asked_for_every_three_seconds_and_found_once_it_is_there() -> None:
    async def scenario() -> None:
        log, asked = LimitedLog(), list[float]()
        partitions = log.partitions

        async def counted(topics: Collection[str]) -> Mapping[str, int]:
            asked.append(asyncio.get_running_loop().time())
            return await partitions(topics)

        log.partitions = counted  # type: ignore[method-assign]
        async with a_process(log, Disk()) as process:
            await process.spool(b"a")
            await asyncio.sleep(30.0)
            assert process.mover.reasons.keys() == {TOPIC}
            assert 9 <= len(asked) <= 12
            await log.create([TopicSpec(name=TOPIC, partitions=2, retention=None)])
            await process.until_left(0, timeout=2 * mover_module.PARTITIONS_AGE)
            assert process.mover.reasons == {}

    run(scenario())


def test_a_topic_of_which_nothing_can_be_moved_is_not_being_moved() -> None:
    """What was moved once, and can't be deleted from a disk that fails, isn't moved by each later turn."""

    async def scenario() -> None:
        async def fail(*_: Any) -> Collection[int]:
            raise LogUnavailableError("attempt to write a readonly database")

        log = await a_log()
        async with a_process(log, Disk()) as process:
            await process.spool(b"a")
            await process.until_left(0, timeout=1.0)
            delete = process.store.delete
            process.store.delete = fail  # type: ignore[method-assign, assignment]
            await process.spool(b"b")
            await asyncio.sleep(1.0)
            assert len(log.records(TOPIC)) == 2
            assert process.mover.is_moving(TOPIC)
            log.fails = True
            await process.spool(b"c")
            await asyncio.sleep(2.0)
            for _ in range(200):
                assert not process.mover.is_moving(TOPIC)
                await asyncio.sleep(0.1)
            log.fails, process.store.delete = False, delete  # type: ignore[method-assign]
            await process.until_left(0, timeout=10.0)
        assert [each.value for each in log.records(TOPIC)] == [b"a", b"b", b"c"]

    run(scenario())


def test_a_look_at_all_topics_gives_way_to_senders() -> None:
    async def scenario() -> None:
        log, turns = LimitedLog(), 0
        process = Process(log, Disk())
        for number in range(1000):
            process.waiting.add(f"gateway.events.s{number}", b"k", 1, at=now())
            process.disk.add(f"gateway.events.s{number}", b"k", b"e", [])
        await process.mover._look()  # from now on they rest: no topic of theirs is there
        process.mover._looked_at = -mover_module.INTERVAL
        looking = asyncio.create_task(process.mover._look())
        while not looking.done():
            turns += 1
            await asyncio.sleep(0)
        assert turns >= 1000 // mover_module.TOPICS_PER_STEP

    run(scenario())


def test_a_clock_that_was_set_back_keeps_nothing_waiting_beyond_the_append() -> None:
    async def scenario() -> None:
        log, disk = await a_log(), Disk()
        await Process(log, disk).spool(b"tried", tried_at=now())
        [record] = disk.records[TOPIC]
        disk.records[TOPIC] = [record._replace(appended_at=now() + 3600.0)]
        async with a_process(log, disk) as process:
            await process.until_left(0, timeout=mover_module.TRIED_FOR + 2.0)
        assert len(log.records(TOPIC)) == 1

    run(scenario())


def test_what_was_looked_for_is_not_looked_for_with_each_turn() -> None:
    async def scenario() -> None:
        log, disk = await a_log(), Disk()
        log.fails = True
        async with a_process(log, disk) as process:
            for number in range(50):
                await process.spool(b"%d" % number, tried_at=now())
            await asyncio.sleep(100.0)
            assert log.appends > 5
            assert log.looks <= 2 * 2 + 1, (
                "each partition for what was tried, as its appends end; once for its own append"
            )
            log.fails = False
            await process.until_left(0, timeout=30.0)
        assert len(log.records(TOPIC)) == 50

    run(scenario())


def test_what_is_in_the_log_is_found_though_its_offsets_went_back() -> None:
    async def scenario() -> None:
        log, disk = await a_log(), Disk()
        async with a_process(log, disk) as process:
            for number in range(30):
                await process.spool(b"%d" % number)
            await process.until_left(0, timeout=10.0)  # its mover knows the next offset
            await log.recreate(TOPIC)
            log.fail_appends(1)
            await process.spool(b"stored, and not acknowledged")
            await asyncio.sleep(1.0)
            stored = disk.records[TOPIC][-1]
            log._store(Partition(TOPIC, 0), NewRecord(stored.key, stored.value, stored.headers))
            await process.until_left(0, timeout=30.0)
        assert [each.value for each in log.records(TOPIC)] == [b"stored, and not acknowledged"]

    run(scenario())


def test_events_of_one_request_with_one_id_are_all_moved() -> None:
    """Two changes of one order have its id, and the time of their receipt in common."""

    async def scenario() -> None:
        log, disk = await a_log(), Disk()
        metrics, logger = Metrics(CollectorRegistry()), structlog.get_logger()
        store = MemoryStore(disk, Random(1))
        spool = Spool(
            store, log=log, topics=lambda: [TOPIC], metrics=metrics, logger=logger, max_bytes=1 << 30, max_age=86400.0
        )
        running = asyncio.create_task(spool.run())
        log.lose_leader(Partition(TOPIC, 1))
        headers = [("ce_id", b"order-1"), ("gw_at", b"1.0")]
        items = {KEYS[0]: b"created", KEYS[1]: b"transferred"}
        appends = [spool.append(TOPIC, key=key, value=value, headers=headers) for key, value in items.items()]
        assert [each is None for each in await asyncio.gather(*appends)] == [False, True]
        log.find_leader(Partition(TOPIC, 1))
        while spool.waiting.records:  # noqa: ASYNC110 - it is the mover that goes on
            await asyncio.sleep(0.1)
        running.cancel()
        await asyncio.wait({running})
        assert [each.value for each in log.records(TOPIC)] == [b"created", b"transferred"]

    run(scenario())


def test_a_stop_leaves_nothing_to_be_looked_for() -> None:
    async def scenario() -> None:
        log, disk = await a_log(), Disk()
        async with a_process(log, disk) as process:
            for number in range(100):
                await process.spool(b"%d" % number)
            await process.until_left(0, timeout=10.0)
        assert len(disk.deleted[TOPIC]) == 100
        assert disk.commits[TOPIC] == Commit(100)

    run(scenario())


def test_a_stop_notes_what_was_moved_of_all_topics_at_once() -> None:
    async def scenario() -> None:
        log, disk, topics = LimitedLog(), Disk(), [f"gateway.events.s{number}" for number in range(500)]
        await log.create([TopicSpec(name=topic, partitions=1, retention=None) for topic in topics])
        for topic in topics:
            disk.add(topic, b"k", b"e", [("ce_id", topic.encode())])
        async with a_process(log, disk) as process:
            await process.until_left(0, timeout=60.0)
            began = asyncio.get_running_loop().time()
        assert asyncio.get_running_loop().time() - began < 0.1
        assert [disk.commits[topic] for topic in topics] == [Commit(1)] * 500

    run(scenario())


def test_a_key_that_has_many_events_leaves_the_spool_once_the_log_is_back() -> None:
    async def scenario() -> None:
        log, disk = await a_log(), Disk()
        spool = Spool(
            MemoryStore(disk, Random(1)),
            log=log,
            topics=lambda: [TOPIC],
            metrics=Metrics(CollectorRegistry()),
            logger=structlog.get_logger(),
            max_bytes=1 << 30,
            max_age=86400.0,
        )
        times: dict[int, tuple[float, float]] = {}
        spooled: list[int] = []

        async def send(number: int) -> None:
            began = asyncio.get_running_loop().time()
            headers = [("ce_id", b"%d" % number), ("gw_at", b"1.0")]
            position = await spool.append(TOPIC, key=KEYS[0], value=b"%d" % number, headers=headers)
            assert asyncio.get_running_loop().time() - began < 1.1
            times[number] = began, asyncio.get_running_loop().time()
            spooled.extend([number] if position is None else [])

        async with asyncio.TaskGroup() as tasks:
            running = tasks.create_task(spool.run())
            log.lose_leader(Partition(TOPIC, 0))
            sent = []
            for number in range(6000):
                if number == 1000:
                    log.find_leader(Partition(TOPIC, 0))
                sent.append(tasks.create_task(send(number)))
                await asyncio.sleep(0.005)
            await asyncio.wait(sent)
            running.cancel()
        assert set(range(1, 1000)) <= set(spooled)
        assert max(spooled) < 4000, "twice the time of the outage, or some seconds, after it"
        numbers, earliest = [int(record.value) for record in log.records(TOPIC)], float("inf")
        assert sorted(numbers) == list(range(6000))
        for number in reversed(numbers):
            began, acknowledged_at = times[number]
            assert began <= earliest, "it comes before one that was acknowledged before it was sent"
            earliest = min(earliest, acknowledged_at)

    run(scenario())


def test_a_turn_of_a_topic_that_was_dropped_while_it_waited_is_given_back() -> None:
    async def scenario() -> None:
        async with a_process(LimitedLog(), Disk()) as process:
            turns = FairTurns[Partition](limit=1)
            turns.ask(who := Partition("gateway.events.dropped", ALL))
            assert turns.begin() == who
            await process.mover._turn(who, turns)
            assert not turns.running

    run(scenario())


def test_what_an_operator_has_dropped_is_told_and_waits_no_more() -> None:
    async def scenario() -> None:
        log, disk = LimitedLog(), Disk()
        with capture_logs() as lines:
            async with a_process(log, disk) as process:
                for number in range(3):
                    await process.spool(b"%d" % number)
                await asyncio.sleep(10.0)
                assert process.mover.reasons == {TOPIC: f"{MISSING} (or one that we may not Describe)"}
                disk.drop(TOPIC)
                await process.until_left(0, timeout=10.0)
                assert process.mover.reasons == {}
                assert process.metrics.spool_dropped.value == 3
                await process.spool(b"later")
                await asyncio.sleep(10.0)
                assert process.waiting.records == 1
        assert [(each["topic"], each["events"]) for each in lines if each["event"] == "spool_dropped"] == [(TOPIC, 3)]

    run(scenario())


@pytest.mark.parametrize("change", [1, -1])
def test_what_is_dropped_is_counted_by_itself_while_other_topics_come_and_go(change: int) -> None:
    async def scenario() -> None:
        log, disk = LimitedLog(), Disk()
        process = Process(log, disk)
        for number in range(3):
            await process.spool(b"%d" % number)
        for _ in range(50):
            process.waiting.add("gateway.events.other", b"o", 1, at=now())
        disk.drop(TOPIC)
        has_records = process.store.has_records

        async def meanwhile(topic: str) -> bool:  # the loop serves others while the file is read
            found = await has_records(topic)
            for _ in range(10):
                if change > 0:
                    process.waiting.add("gateway.events.other", b"o", 1, at=now())
                else:
                    process.waiting.remove("gateway.events.other", b"o", 1)
            return found

        process.store.has_records = meanwhile  # type: ignore[method-assign]
        await process.mover._learn_partitions([TOPIC])
        await process.mover._ask_for_turns(TOPIC)
        assert process.metrics.spool_dropped.value == 3
        assert process.waiting.records == 50 + 10 * change

    run(scenario())


def test_what_is_dropped_of_a_topic_that_is_there_is_told_too() -> None:
    async def scenario() -> None:
        log, disk = await a_log(), Disk()
        for number in (0, 1):
            log.lose_leader(Partition(TOPIC, number))
        async with a_process(log, disk) as process:
            for number in range(3):
                await process.spool(b"%d" % number)
            await asyncio.sleep(10.0)
            disk.drop(TOPIC)
            await process.until_left(0, timeout=30.0)
            assert (process.metrics.spool_dropped.value, process.metrics.spool_lost.value) == (3, 0)

    run(scenario())


def test_what_was_counted_and_is_not_there_is_told_to_be_lost() -> None:
    """A damaged page may have other records than it had, without an error."""

    async def scenario() -> None:
        log, disk = await a_log(), Disk()
        for number in (0, 1):
            log.lose_leader(Partition(TOPIC, number))
        with capture_logs() as lines:
            async with a_process(log, disk) as process:
                for number in range(5):
                    await process.spool(b"%d" % number)
                await asyncio.sleep(10.0)
                disk.deleted[TOPIC].update((2, 3))
                for number in (0, 1):
                    log.find_leader(Partition(TOPIC, number))
                await process.until_left(0, timeout=30.0)
                assert (process.metrics.spool_dropped.value, process.metrics.spool_lost.value) == (0, 2)
        assert [each["count"] for each in lines if each["event"] == "spool_records_lost"] == [2]
        assert len(log.records(TOPIC)) == 3

    run(scenario())


def test_what_is_stored_and_moved_while_it_is_counted_is_not_told_to_be_lost() -> None:
    """An append that failed has stored its event late; the next one of the topic takes it along to the log."""

    async def scenario() -> None:
        log, disk = await a_log(), Disk()
        async with a_process(log, disk) as process:
            counted = process.store.counted

            async def meanwhile(topic: str, start: int, end: int) -> Any:  # it is read before all is moved
                found = await counted(topic, start, end)
                process.store.counted = counted  # type: ignore[method-assign]  # back to what it was
                await process.spool(b"later")
                process.mover.wake(TOPIC)
                await process.until_left(0, timeout=10.0)
                return found

            process.store.counted = meanwhile  # type: ignore[method-assign]  # to act while it reads
            process.fill(1, number=0)
            await asyncio.sleep(mover_module.SWEEP_INTERVAL * 3)
            assert [each.value for each in log.records(TOPIC)] == [b"e0", b"later"]
            assert (process.waiting.records, process.waiting.has(TOPIC)) == (0, False)
            assert (process.metrics.spool_dropped.value, process.metrics.spool_lost.value) == (0, 0)

    run(scenario())


def test_what_is_being_dropped_is_not_counted() -> None:
    """It is deleted step by step, after it is noted that it is dropped."""

    async def scenario() -> None:
        log, disk = await a_log(), Disk()
        async with a_process(log, disk) as process:
            await process.spool(b"first")
            await process.until_left(0, timeout=10.0)
            await asyncio.sleep(1.0)
            process.fill(3, number=0)
            disk.dropped[TOPIC] = 3
            log.away = True
            await asyncio.sleep(mover_module.SWEEP_INTERVAL + 1)
            assert (process.waiting.records, process.waiting.must_spool(TOPIC, KEYS[0])) == (1, True)
            log.away = False
            await process.until_left(0, timeout=10.0)
            assert (process.metrics.spool_dropped.value, process.metrics.spool_lost.value) == (0, 0)

    run(scenario())


def test_what_a_drop_that_was_killed_has_left_is_deleted() -> None:
    async def scenario() -> None:
        log, disk = await a_log(), Disk()
        Process(log, disk).fill(5, number=0)
        disk.dropped[TOPIC], disk.deleted[TOPIC] = 5, {0, 1}
        async with a_process(log, disk) as process:
            await asyncio.sleep(mover_module.SWEEP_INTERVAL + 1)
            assert disk.deleted[TOPIC] == {0, 1, 2, 3, 4}
            assert (process.waiting.records, log.records(TOPIC)) == (0, [])

    run(scenario())


def test_what_was_stored_although_its_append_failed_is_counted_and_moved() -> None:
    async def scenario() -> None:
        log, disk = await a_log(), Disk()
        async with a_process(log, disk) as process:
            process.fill(3, number=1)
            log.away = True
            await asyncio.sleep(mover_module.SWEEP_INTERVAL + 1)
            assert (process.waiting.records, process.waiting.must_spool(TOPIC, KEYS[1])) == (3, True)
            log.away = False
            await process.until_left(0, timeout=20.0)
            assert len(log.records(TOPIC)) == 3

    run(scenario())


def test_what_is_too_large_is_so_for_the_next_process_also_while_the_log_is_away() -> None:
    async def scenario() -> None:
        log, disk = await a_log(), Disk()
        with capture_logs() as lines:
            async with a_process(log, disk) as process:
                await process.spool(b"first")
                await process.spool(bytes(2000))
                await process.spool(b"later")
                await process.until_left(1, timeout=10.0)
            log.away = True
            for _ in range(2):
                process = Process(log, disk)
                await count(process.store, process.waiting)
                waiting = process.waiting
                assert (waiting.records, waiting.bytes, waiting.large, waiting.oldest) == (1, 2000, 1, None)
                assert (waiting.has(TOPIC), waiting.must_spool(TOPIC, KEYS[0])) == (True, False)
                async with a_process(log, disk) as process:
                    await asyncio.sleep(20.0)
                    assert process.waiting.large == 1
            log.away = False
            async with a_process(log, disk) as process:
                await asyncio.sleep(20.0)
                assert "MESSAGE_TOO_LARGE" in process.mover.reasons[TOPIC]
                log.limit = 5000
                await process.until_left(0, timeout=mover_module.LARGE_INTERVAL + 1)
                assert (process.waiting.large, process.waiting.bytes, process.waiting.has(TOPIC)) == (0, 0, False)
        assert [line["offset"] for line in lines if line["event"] == "spool_record_too_large"] == [1]
        assert [len(each.value) for each in log.records(TOPIC)] == [5, 5, 2000]
        assert disk.commits[TOPIC].metadata == b""

    run(scenario())


@pytest.mark.rotated(share=1 / 4, group="spool")
def test_what_is_too_large_is_looked_for_in_what_was_written_since_the_last_try_alone() -> None:
    """However many processes have held it since: with a week of events to be read, it would keep others waiting."""

    async def scenario() -> None:
        log, disk = await a_log(), Disk()
        since = list[float]()
        offsets_at = log.offsets_at

        async def asked(topic: str, at: float, numbers: Collection[int] | None = None) -> Mapping[int, int]:
            since.append(at)
            return await offsets_at(topic, at, numbers)

        log.offsets_at = asked  # type: ignore[method-assign]  # to see what is asked
        async with a_process(log, disk) as process:
            await process.spool(bytes(2000))
            await asyncio.sleep(10.0)
        starts = list[float]()
        for _ in range(3):
            starts.append(now())
            async with a_process(log, disk) as process:
                await asyncio.sleep(3600.0)
                process.store.is_dead = True  # it is killed
        assert since[-1] > starts[-1] - mover_module.LARGE_INTERVAL - 100.0

    run(scenario())


def test_what_is_too_large_and_cannot_be_read_any_more_is_lost_once() -> None:
    async def scenario() -> None:
        log, disk = await a_log(), Disk()
        with capture_logs() as lines:
            async with a_process(log, disk) as process:
                await process.spool(large := bytes(2000))
                await process.spool(b"small")
                await process.until_left(1, timeout=10.0)
                assert process.waiting.large == 1
                disk.damaged.add(large)
                await process.until_left(0, timeout=mover_module.LARGE_INTERVAL + 10)
                assert (process.waiting.large, process.waiting.has(TOPIC), process.mover.reasons) == (0, False, {})
                await asyncio.sleep(mover_module.LARGE_INTERVAL * 2)
                assert process.metrics.spool_lost.value == 1
        assert [each["count"] for each in lines if each["event"] == "spool_records_lost"] == [1]

    run(scenario())


def test_the_disk_is_given_back_while_more_is_moved() -> None:
    async def scenario() -> None:
        log, disk = await a_log(), Disk()
        log.lose_leader(Partition(TOPIC, 1))
        async with a_process(log, disk) as process:
            await process.spool(b"waits", number=1)
            for number in range(300):
                await process.spool(b"%d" % number)
                await asyncio.sleep(0.1)
            assert process.store.gave_back >= 2
            assert len(disk.deleted[TOPIC]) > 250

    run(scenario())
