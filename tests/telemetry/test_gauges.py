"""What the engine counts for alarms: late deliveries, and what is parked. On virtual time."""

import asyncio
from dataclasses import replace

from gateway.engine.control.records import ControlRecord
from gateway.log.topics import Topics
from tests.builders import a_policy, a_route
from tests.engine.test_worker import World, a_world, events, operated, publish, running, virtual
from tests.virtual_time import now

TOPICS = Topics("gateway.")


def late(world: World) -> float:
    return world.metrics.deliveries_late.labels("build").value


@virtual
async def test_a_delivery_in_time_is_not_late() -> None:
    world = await a_world(a_route("build", retry=a_policy(schedule=(20,), jitter=0.0)), ci=[503, 200])
    async with running(world):
        await world.put(*events(1))
        await asyncio.sleep(60)
        assert len(world.client.made) == 2
        assert late(world) == 0


@virtual
async def test_a_delivery_is_late_as_soon_as_it_is_certain_and_only_once() -> None:
    world = await a_world(
        a_route("build", retry=a_policy(schedule=(20, 20, 600), max_attempts=9, max_age=9000.0, jitter=0.0)),
        ci=[503, 503, 503, 200],
    )
    async with running(world):
        await world.put(*events(1))
        await asyncio.sleep(15)
        assert late(world) == 0
        await asyncio.sleep(10)
        assert len(world.client.made) == 2
        assert late(world) == 1, "the next attempt is due after 40 s"
        await asyncio.sleep(900)
        assert len(world.client.made) == 4
        assert late(world) == 1


@virtual
async def test_a_restart_does_not_recount_a_tiers_deliveries() -> None:
    world = await a_world(
        a_route("build", retry=a_policy(schedule=(300,), max_attempts=9, max_age=9000.0, jitter=0.0)), ci=[503, 200]
    )
    async with running(world):
        await world.put(*events(1))
        await asyncio.sleep(5)
    async with running(world):
        await asyncio.sleep(400)
    assert len(world.client.made) == 2
    assert late(world) == 1


@virtual
async def test_deliveries_read_too_late_are_late_at_once() -> None:
    world = await a_world(a_route("build"))
    await world.put(*events(3))
    await asyncio.sleep(31)
    async with running(world):
        await asyncio.sleep(2)
    assert late(world) == 3


@virtual
async def test_parked_deliveries_are_counted_until_resumed() -> None:
    world = await a_world(a_route("build"))
    backlog = world.metrics.parked_backlog
    async with operated(world) as control:
        command = ControlRecord(kind="pause", name="destination/ci", state="paused", at=now())
        await publish(world, command)
        await asyncio.sleep(1)
        async with running(world, world.worker(control)):
            await world.put(*events(20))
            await asyncio.sleep(8)
            assert backlog.value == 20
            assert late(world) == 0
            await publish(world, command.with_state("resuming"))
            await asyncio.sleep(30)
            assert backlog.value == 0
            assert len(world.client.made) == 20
            await publish(world, replace(control.commands["pause/destination/ci"], state="paused"))
            await asyncio.sleep(1)
            await world.put(*events(1))
            await asyncio.sleep(8)
            assert backlog.value == 1
    # Another owner of the jobs counts again, from the marker on.
    backlog.set(0)
    async with operated(world):
        await asyncio.sleep(8)
        assert backlog.value == 1
