"""Partitions that can't be read: they stop nothing else, and everybody is told."""

import asyncio
import math
from dataclasses import replace

import pytest
import structlog

from gateway.log.base import ALL, Partition, TopicSpec
from gateway.log.records import encode_event, event_key
from gateway.model import EventId, LogUnavailableError
from tests.builders import a_policy, a_route, an_event
from tests.engine.test_worker import EVENTS, TOPICS, World, a_world, running, virtual
from tests.virtual_time import now


async def a_world_of_partitions(count: int = 3) -> World:
    world = await a_world(a_route(retry=a_policy(schedule=(20.0,))))
    world.log.delete(EVENTS)
    await world.log.create([TopicSpec(name=EVENTS, partitions=count, retention=7 * 86400.0)])
    return world


async def put(world: World, count: int = 30) -> dict[str, int]:
    """Append events; return which partition each is in, but for those of a partition that takes none."""
    places = {}
    for number in range(count):
        event = an_event(id=EventId(f"evt_{number}_{now():.0f}"), received_at=now())
        try:
            position = await world.log.append(
                EVENTS, key=event_key(event), value=event.body, headers=encode_event(event)
            )
        except LogUnavailableError:  # what isn't acknowledged isn't owed
            continue
        places[str(event.id)] = position.partition
    return places


def delivered(world: World) -> set[str]:
    return {event for _, event, _ in world.client.made}


def sample(world: World, partition: str, topic: str = EVENTS) -> float | None:
    series = world.metrics.partition_unread.get((topic, partition))
    return None if series is None else series.value


@virtual
async def test_a_partition_without_a_leader_stops_no_other_and_goes_on_when_it_has_one() -> None:
    world = await a_world_of_partitions()
    world.logger = structlog.get_logger()
    places = await put(world)
    lost = Partition(EVENTS, 1)
    world.log.lose_leader(lost)
    with structlog.testing.capture_logs() as lines:
        async with running(world) as worker:
            await asyncio.sleep(20)
            assert delivered(world) == {event for event, partition in places.items() if partition != 1}
            assert worker.unread.keys() == {lost}
            assert sample(world, "1") == pytest.approx(20, abs=2)
            assert math.isnan(world.metrics.log_lag.labels(EVENTS).value)
            assert world.metrics.oldest_undone.labels(EVENTS).value == pytest.approx(20, abs=2)
            assert world.metrics.log_lag.labels(TOPICS.retry("5s")).value == 0
            places |= await put(world)
            world.log.find_leader(lost)
            await asyncio.sleep(3)
            assert delivered(world) == places.keys()
            assert worker.unread == {}
            assert sample(world, "1") is None
            assert world.metrics.log_lag.labels(EVENTS).value == 0
    told = {line["event"]: line for line in lines if line["event"].startswith("partitions_")}
    assert told["partitions_unread"]["partitions"] == ["1"]
    assert told["partitions_unread"]["reason"] == "no leader"
    assert told["partitions_read_again"]["seconds"] == pytest.approx(20, abs=3)
    assert len(world.client.made) == len(places)


@virtual
async def test_a_partition_that_loses_its_leader_under_way_is_told_and_read_again_where_it_was() -> None:
    world = await a_world_of_partitions()
    async with running(world) as worker:
        places = await put(world)
        await asyncio.sleep(3)
        assert delivered(world) == places.keys()
        world.log.lose_leader(Partition(EVENTS, 2))
        await world.log.rebalance(TOPICS.group("router"))
        places |= await put(world)
        await asyncio.sleep(10)
        assert delivered(world) == places.keys()
        assert worker.unread.keys() == {Partition(EVENTS, 2)}
        world.log.find_leader(Partition(EVENTS, 2))
        places |= await put(world)
        await asyncio.sleep(3)
    assert delivered(world) == places.keys()
    assert len(world.client.made) == len(places)


@virtual
async def test_a_blip_makes_no_line() -> None:
    world = await a_world_of_partitions()
    world.logger = structlog.get_logger()
    with structlog.testing.capture_logs() as lines:
        async with running(world):
            await asyncio.sleep(2)
            world.log.lose_leader(Partition(EVENTS, 0))
            await asyncio.sleep(3)
            world.log.find_leader(Partition(EVENTS, 0))
            await asyncio.sleep(10)
    assert not [line for line in lines if line["event"].startswith("partitions_")]


@virtual
async def test_a_tier_that_is_gone_is_told_as_such_and_not_as_empty() -> None:
    world = await a_world_of_partitions()
    tier = TOPICS.retry("20h")
    async with running(world) as worker:
        await asyncio.sleep(2)
        assert world.metrics.retry_backlog.labels("20h").value == 0
        world.log.delete(tier)
        await world.log.rebalance(TOPICS.group("router"))
        await put(world)
        await asyncio.sleep(10)
        assert len(world.client.made) == 30
        assert worker.unread.keys() == {Partition(tier, ALL)}
        assert sample(world, "all", tier) == pytest.approx(10, abs=2)
        assert math.isnan(world.metrics.retry_backlog.labels("20h").value)
        await world.log.create(TOPICS.specs([EVENTS]))
        await world.log.rebalance(TOPICS.group("router"))
        await asyncio.sleep(3)
        assert worker.unread == {}
        assert world.metrics.retry_backlog.labels("20h").value == 0


@virtual
async def test_a_share_of_a_rate_is_that_of_the_partitions_that_there_are_now() -> None:
    world = await a_world_of_partitions(6)
    first, second = world.worker(), world.worker()
    async with running(world, first), running(world, second):
        await asyncio.sleep(3)
        spec = world.log._state.specs[EVENTS]
        world.log.grow(replace(spec, partitions=30))
        await world.log.rebalance(TOPICS.group("router"))
        await asyncio.sleep(3)
        shares = [worker._router.share for worker in (first, second)]
    assert sum(shares) == pytest.approx(1)
