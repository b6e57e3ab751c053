"""Partitions that can be read and take no appends, or have no leader: jobs inject elsewhere, or hold nobody up."""

import asyncio
from collections import Counter
from collections.abc import Iterable

import pytest
from typing_extensions import override

from gateway.engine.alternate_partitions import AVOIDED_FOR, AlternatePartitions
from gateway.engine.control.records import ControlRecord
from gateway.engine.control.state import KICK_HEARTBEAT_TIMEOUT
from gateway.engine.jobs.kick import KICK_DELAY, STUCK_BACKOFF
from gateway.engine.jobs.scan import STUCK_AFTER
from gateway.log.base import Partition, Position, RecordHeaders, partition_of
from gateway.log.records import encode_delivery
from gateway.model import NO_METADATA, LogUnavailableError, RecordMetadata
from gateway.ops.control_client import ControlClient
from tests.builders import a_delivery, a_policy, a_route, an_event
from tests.engine.test_jobs import TIER, injected
from tests.engine.test_replay import Owner, a_replay, events_of, owning
from tests.engine.test_worker import TOPICS, World, a_world, operated, publish, running, virtual
from tests.memory_log import REFUSED_AFTER, MemoryLog
from tests.virtual_time import now, run

NAMES = "abcdefghijk"
COUNT = 4
"""The partitions of the shortest tier, and of the dead letters."""
BAD = "a"
LOST = partition_of(BAD.encode(), COUNT)
GOOD = next(name for name in NAMES if partition_of(name.encode(), COUNT) != LOST)
LONGER, WAIT = TOPICS.retry("5m"), 300.0
"""A tier that a kick brings on, and how long that takes otherwise, in seconds."""
DURATION = 2 * REFUSED_AFTER + STUCK_AFTER
"""Seconds within which nothing waits any longer for a partition."""


class Without(MemoryLog):
    """A connection that has no append with some keys stored, wherever it goes, while it `is_refusing`."""

    def __init__(self, log: MemoryLog, topic: str, keys: Iterable[bytes]) -> None:
        super().__init__()
        self.__dict__.update(log.__dict__)
        self.is_refusing = True
        self._topic = topic
        self._keys = set(keys)

    @override
    async def append(
        self, topic: str, *, key: bytes, value: bytes, headers: RecordHeaders, partition: int | None = None
    ) -> Position:
        if self.is_refusing and topic == self._topic and key in self._keys:
            await asyncio.sleep(REFUSED_AFTER)
            raise LogUnavailableError(f"{topic}: told to refuse")
        return await super().append(topic, key=key, value=value, headers=headers, partition=partition)


class Small(MemoryLog):
    """A connection whose limit was lowered for the shortest tier."""

    def __init__(self, log: MemoryLog) -> None:
        super().__init__()
        self.__dict__.update(log.__dict__)

    @override
    async def append(
        self, topic: str, *, key: bytes, value: bytes, headers: RecordHeaders, partition: int | None = None
    ) -> Position:
        self.max_record_bytes = 50 if topic == TIER else 1_000_000
        return await super().append(topic, key=key, value=value, headers=headers, partition=partition)


async def a_world_of_names() -> World:
    world = await a_world(a_route(to=tuple(NAMES), retry=a_policy(max_age=1e6)))
    for topic in (TIER, TOPICS.dead):
        assert len(await world.log.bounds(topic)) == COUNT
    return world


async def parked(world: World, name: str, *, partition: int | None = None) -> None:
    """Have a delivery parked that is of a name, by its pause."""
    delivery = a_delivery(event=an_event(id=f"evt_{name}", received_at=now()), successor=1, destination=name)
    headers = encode_delivery(delivery, RecordMetadata(paused_name=f"destination/{name}"), at=now())
    await world.log.append(
        TOPICS.parked, key=name.encode(), value=delivery.event.body, headers=headers, partition=partition
    )


async def waiting(world: World, name: str, count: int = 1) -> None:
    """Have deliveries wait for a while, all in one partition."""
    for number in range(count):
        event = an_event(id=f"evt_{name}_{number}", received_at=now())
        delivery = a_delivery(event=event, successor=1, due=now() + WAIT, destination=name)
        headers = encode_delivery(delivery, NO_METADATA, at=now())
        await world.log.append(LONGER, key=b"same", value=event.body, headers=headers)


async def paused(world: World, name: str, state: str) -> None:
    await publish(world, ControlRecord(kind="pause", name=f"destination/{name}", state=state, at=now()))  # type: ignore[arg-type]


def made(world: World, name: str) -> Counter[str]:
    return Counter(event for destination, event, _ in world.client.made if destination == name)


def test_a_partition_that_has_refused_an_append_gets_no_other_for_a_while() -> None:
    alternatives = AlternatePartitions()
    key = BAD.encode()
    assert alternatives.choose(TIER, key, 100.0) is None
    alternatives.refused(TIER, key, None, count=COUNT, unreadable=(), now=100.0)
    elsewhere = (LOST + 1) % COUNT
    assert alternatives.choose(TIER, key, 100.0) == elsewhere
    assert alternatives.choose(TIER, GOOD.encode(), 100.0) is None
    assert alternatives.choose(TOPICS.dead, key, 100.0) is None
    alternatives.refused(TIER, key, elsewhere, count=COUNT, unreadable=(), now=101.0)
    others = {alternatives.choose(TIER, each.encode(), 101.0) for each in NAMES}
    assert not others & {LOST, elsewhere}
    for number in range(COUNT):
        alternatives.refused(TIER, key, number, count=COUNT, unreadable=(), now=102.0 + (number == elsewhere))
    assert alternatives.choose(TIER, key, 104.0) == LOST, "the one that has refused none for the longest time"
    alternatives.accepted(TIER, elsewhere)
    assert alternatives.choose(TIER, key, 104.0) == elsewhere
    assert alternatives.choose(TIER, key, 102.0 + AVOIDED_FOR) is None, "it is tried again"
    alternatives.accepted(TIER, LOST)
    assert alternatives.choose(TIER, key, 104.0) is None


def test_a_partition_without_a_leader_gets_none_either() -> None:
    alternatives = AlternatePartitions()
    key = BAD.encode()
    alternatives.refused(TIER, key, None, count=COUNT, unreadable=[(LOST + 1) % COUNT], now=100.0)
    assert alternatives.choose(TIER, key, 100.0) == (LOST + 2) % COUNT


@virtual
async def test_a_late_parked_delivery_whose_partition_refuses_delays_no_resume_of_another() -> None:
    world = await a_world_of_names()
    world.log.refuse_appends(Partition(TIER, LOST))
    await paused(world, BAD, "active")
    await paused(world, GOOD, "paused")
    await parked(world, BAD)
    await parked(world, GOOD)
    commands = ControlClient(world.log, TOPICS)
    async with owning(world):
        await asyncio.sleep(1)
        placed = await commands.resume(f"destination/{GOOD}")
        assert placed is not None
        assert await commands.finished(placed, timeout=DURATION) is not None
        await asyncio.sleep(DURATION)
        assert injected(world) == {f"evt_{BAD}": 1, f"evt_{GOOD}": 1}


@virtual
async def test_a_stuck_rescan_yields_to_a_resume_and_repeats_nothing() -> None:
    world = await a_world_of_names()
    await paused(world, BAD, "active")
    await paused(world, GOOD, "active")
    await parked(world, BAD)
    await parked(world, GOOD)
    log = Without(world.log, TIER, [BAD.encode()])
    commands = ControlClient(world.log, TOPICS)
    async with owning(world, log):
        for _ in range(3):
            await asyncio.sleep(10)
            await paused(world, "x", "paused")
            placed = await commands.resume("destination/x")
            assert placed is not None
            assert await commands.finished(placed, timeout=DURATION) is not None
        assert injected(world) == {f"evt_{GOOD}": 1}
        log.is_refusing = False
        await asyncio.sleep(60)
    assert injected(world) == {f"evt_{BAD}": 1, f"evt_{GOOD}": 1}


@virtual
async def test_a_kick_whose_partition_takes_no_appends_ends_and_so_does_the_next() -> None:
    world = await a_world_of_names()
    await waiting(world, BAD)
    await waiting(world, GOOD)
    world.log.refuse_appends(Partition(TIER, LOST))
    commands = ControlClient(world.log, TOPICS)
    async with owning(world):
        placed = [await commands.kick(f"destination/{name}") for name in (BAD, GOOD)]
        for each in placed:
            assert each is not None
            done = await commands.finished(each, timeout=KICK_DELAY + DURATION + 60)
            assert done is not None
            assert done.count == 1
    assert injected(world) == {f"evt_{BAD}_0": 1, f"evt_{GOOD}_0": 1}


@pytest.mark.parametrize("lost", [[LOST], range(COUNT)])
def test_a_kick_of_a_route_does_not_hold_back_a_healthy_destination(lost: Iterable[int]) -> None:
    """Whether one partition of the tier takes no appends, or none of them does: what comes due is delivered."""

    async def scenario() -> None:
        world = await a_world(a_route(to=(BAD, GOOD), retry=a_policy(max_age=1e6)))
        await waiting(world, BAD)
        await waiting(world, GOOD, 150)
        world.log.refuse_appends(*[Partition(TIER, number) for number in lost])
        commands = ControlClient(world.log, TOPICS)
        async with operated(world) as control, running(world, world.worker(control)):
            await asyncio.sleep(WAIT - 50)
            placed = await commands.kick("route/build")
            assert placed is not None
            await asyncio.sleep(50 + KICK_HEARTBEAT_TIMEOUT)
            assert made(world, GOOD) == {f"evt_{GOOD}_{number}": 1 for number in range(150)}
            world.log.accept_appends()
            done = await commands.finished(placed, timeout=STUCK_BACKOFF + 60)
            assert done is not None
            assert made(world, BAD) == {f"evt_{BAD}_0": 1}
            assert made(world, GOOD).total() == 150

    run(scenario())


@virtual
async def test_a_stuck_kick_lets_others_begin_and_repeats_nothing_once_it_continues() -> None:
    world = await a_world_of_names()
    await waiting(world, GOOD, 20)
    await waiting(world, BAD, 3)
    log = Without(world.log, TIER, [BAD.encode()])
    commands = ControlClient(world.log, TOPICS)
    async with owning(world, log):
        first = await commands.kick("route/build")
        assert first is not None
        await asyncio.sleep(KICK_DELAY + 1)
        for _ in range(3):
            second = await commands.kick("destination/x")
            assert second is not None
            assert await commands.finished(second, timeout=KICK_DELAY + DURATION + 10) is not None
        assert await commands.finished(first, timeout=120) is None
        assert injected(world) == {f"evt_{GOOD}_{number}": 1 for number in range(20)}
        log.is_refusing = False
        done = await commands.finished(first, timeout=STUCK_BACKOFF + 90)
        assert done is not None
        assert done.count == 23
    assert injected(world).total() == len(injected(world)) == 23


@virtual
async def test_a_long_kick_holds_its_announced_retries_to_its_end() -> None:
    """It takes longer than routers wait for a sign of it, and what comes due meanwhile is delivered once."""
    world = await a_world(a_route(to=("ci",), retry=a_policy(max_age=1e6)))
    await waiting(world, "ci", 1000)

    class Slow(MemoryLog):
        def __init__(self) -> None:
            super().__init__()
            self.__dict__.update(world.log.__dict__)

        @override
        async def append(
            self, topic: str, *, key: bytes, value: bytes, headers: RecordHeaders, partition: int | None = None
        ) -> Position:
            await asyncio.sleep(5.0 if topic == TIER else 0.0)
            return await super().append(topic, key=key, value=value, headers=headers, partition=partition)

    owner = Owner(world, Slow())
    await owner.start()
    async with running(world, world.worker(owner.control)):
        await asyncio.sleep(WAIT - 10)
        began = now()
        commands = ControlClient(world.log, TOPICS)
        placed = await commands.kick("destination/ci")
        assert placed is not None
        assert await commands.finished(placed, timeout=300) is not None
        assert now() - began > 2 * KICK_HEARTBEAT_TIMEOUT
        await asyncio.sleep(60)
        assert made(world, "ci") == {f"evt_ci_{number}": 1 for number in range(1000)}
        await owner.stop()


@virtual
async def test_a_failing_condition_stops_no_other_replay_while_its_dead_letter_waits() -> None:
    world = await a_world(a_route("bad", when="body.n + 1 > 0"), a_route("build", to=("audit",)))
    await events_of(world, 3, body=b'{"n": "x"}')
    world.log.lose_leader(Partition(TOPICS.dead, partition_of(b"ci", COUNT)))
    async with owning(world) as control:
        await a_replay(world, "one", route="bad")
        await a_replay(world, "two", route="build")
        await asyncio.sleep(30)
        assert {command.state for command in control.commands.values()} == {"done"}
    assert len(world.dead()) == 3


@virtual
async def test_a_parked_delivery_too_large_for_its_tier_stops_no_resume_while_its_dead_letter_waits() -> None:
    world = await a_world_of_names()
    world.log.lose_leader(Partition(TOPICS.dead, LOST))
    await paused(world, BAD, "active")
    await paused(world, GOOD, "paused")
    await parked(world, BAD)
    await parked(world, GOOD)
    commands = ControlClient(world.log, TOPICS)
    async with owning(world, Small(world.log)):
        await asyncio.sleep(10)
        placed = await commands.resume(f"destination/{GOOD}")
        assert placed is not None
        assert await commands.finished(placed, timeout=30) is not None
    assert len(world.dead()) == 2


@pytest.mark.parametrize("lost", [[partition_of(b"k", COUNT)], range(COUNT)])
def test_an_undecodable_record_without_a_dead_letter_topic_delays_no_late_parked_delivery(
    lost: Iterable[int],
) -> None:
    async def scenario() -> None:
        world = await a_world_of_names()
        for number in lost:
            world.log.lose_leader(Partition(TOPICS.dead, number))
        await paused(world, BAD, "active")
        await world.log.append(TOPICS.parked, key=b"k", value=b"x", headers=[], partition=0)
        async with owning(world):
            await asyncio.sleep(12)
            await parked(world, BAD, partition=1)
            await asyncio.sleep(60)
            assert injected(world) == {f"evt_{BAD}": 1}
            for number in lost:
                world.log.find_leader(Partition(TOPICS.dead, number))
            await parked(world, GOOD, partition=0)
            await paused(world, GOOD, "active")
            await asyncio.sleep(60)
            assert injected(world) == {f"evt_{BAD}": 1, f"evt_{GOOD}": 1}
        assert len(world.log.records(TOPICS.dead)) == 1
        assert world.metrics.records_undecodable.labels("parked").value == 1

    run(scenario())
