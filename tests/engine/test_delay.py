"""A route with `delay`: nothing before its time, whatever happens in between; and an age that begins then."""

import asyncio
from dataclasses import replace

import pytest

from gateway.engine.control.records import ControlRecord
from gateway.engine.control.state import Control
from gateway.model import SpillReason
from gateway.rules.rules import Route
from tests.builders import a_delivery, a_policy, a_route, an_event
from tests.engine.test_jobs import ended
from tests.engine.test_replay import a_replay
from tests.engine.test_undelivered import a_scene
from tests.engine.test_worker import (
    TOPICS,
    World,
    a_world,
    events,
    operated,
    publish,
    running,
    virtual,
)
from tests.virtual_time import now

DELAY = 300.0


def a_delayed(to: tuple[str, ...] = ("ci",), delay: float = DELAY, **policy: object) -> Route:
    return replace(a_route(to=to, retry=a_policy(**policy)), delay=delay)


def waits(world: World) -> list[float]:
    """Return how long after each event's receipt it was first attempted."""
    first: dict[tuple[str, str], float] = {}
    for (name, event, number), at in zip(world.client.made, world.client.at, strict=True):
        if number == 1:
            first.setdefault((name, event), at)
    return sorted(first.values())


async def kick(world: World, control: Control, name: str) -> int:
    """Kick a name, and return how many deliveries that has brought forward."""
    command = ControlRecord(kind="kick", name=name, state="requested", at=now())
    await publish(world, command)
    return (await ended(control, command)).count


@virtual
async def test_a_delivery_is_made_when_its_delay_is_over_and_once() -> None:
    world = await a_world(a_delayed())
    began = now()
    await world.put(*events(20))
    async with running(world):
        await asyncio.sleep(5)
        assert world.metrics.spills.labels("ci", SpillReason.DELAYED).value == 20
        assert await world.unfinished() == 0, "it waits in a tier: the events are done"
        await world.doze(DELAY + 20)
    times = waits(world)
    assert len(times) == 20
    assert len(world.client.made) == 20
    assert began + DELAY <= min(times)
    assert max(times) < began + DELAY + 2
    assert world.metrics.deliveries_late.labels("build").value == 0, "its delay isn't late"


@virtual
async def test_a_delay_that_is_over_delays_nothing() -> None:
    world = await a_world(a_delayed())
    await world.put(*[replace(each, received_at=now() - DELAY - 1) for each in events(5)])
    async with running(world):
        await asyncio.sleep(1)
        assert len(world.client.made) == 5


@virtual
async def test_the_age_of_a_delivery_begins_after_its_delay() -> None:
    world = await a_world(a_delayed(max_age=60.0, schedule=(10.0,), max_attempts=20), ci=[503, 503, 200])
    await world.put(*events(1))
    async with running(world):
        await world.doze(DELAY + 60)
    assert world.dead() == []
    assert [number for _, _, number in world.client.made] == [1, 2, 3]


@virtual
async def test_a_kick_of_the_destination_leaves_the_delay_alone() -> None:
    world = await a_world(
        a_delayed(), a_route("plain", retry=a_policy(schedule=(3000.0,), max_age=86400.0)), ci=[503] * 4 + [200]
    )
    began = now()
    await world.put(*events(4))
    async with operated(world) as control, running(world, world.worker(control)):
        await asyncio.sleep(10)
        assert len(world.client.made) == 4, "those of the plain route have failed"
        assert await kick(world, control, "destination/ci") == 4
        await asyncio.sleep(10)
        assert len(world.client.made) == 8
        await world.doze(DELAY)
        assert len(world.client.made) == 12
        assert min(world.client.at[8:]) >= began + DELAY
    assert await world.unfinished(TOPICS.retry("3m")) == 0


@virtual
async def test_a_kick_of_the_route_delivers_what_it_delays() -> None:
    world = await a_world(a_delayed())
    await world.put(*events(4))
    async with operated(world) as control, running(world, world.worker(control)):
        await asyncio.sleep(10)
        assert await kick(world, control, "route/build") == 4
        await asyncio.sleep(10)
        assert len(world.client.made) == 4
        await world.doze(DELAY)
    assert len(world.client.made) == 4


@virtual
async def test_the_age_of_what_is_kicked_within_its_delay_begins_with_the_kick() -> None:
    world = await a_world(a_delayed(max_age=60.0, schedule=(10.0,), max_attempts=20), ci=[503, 503, 200])
    await world.put(*events(1))
    async with operated(world) as control, running(world, world.worker(control)):
        await world.doze(DELAY / 2)
        assert await kick(world, control, "route/build") == 1
        await world.doze(60)
    assert world.dead() == []
    assert [number for _, _, number in world.client.made] == [1, 2, 3]


@virtual
async def test_the_age_of_what_is_kicked_after_its_delay_began_when_that_was_over() -> None:
    world = await a_world(a_delayed(max_age=100.0, schedule=(30.0,), max_attempts=20), ci=[503] * 3 + [200])
    await world.put(*events(1))
    async with operated(world) as control, running(world, world.worker(control)):
        await world.doze(DELAY + 5)
        assert len(world.client.made) == 1
        assert await kick(world, control, "destination/ci") == 1
        await world.doze(120)
    assert world.dead() == []
    assert [number for _, _, number in world.client.made] == [1, 2, 3, 4]


@virtual
async def test_what_was_kicked_within_its_delay_is_delayed_no_more() -> None:
    world = await a_world(a_delayed())
    await world.put(*events(4))
    async with operated(world) as control, running(world, world.worker(control)):
        await asyncio.sleep(10)
        assert await kick(world, control, "route/build") == 4
    assert [each.delivery.kick_target for each in world.stored(TOPICS.retry("5s"))] == [("build", "ci")] * 4


@virtual
async def test_what_fails_after_its_delay_is_kicked_with_its_destination() -> None:
    """What a kick takes is told by the record alone: in memory, its delivery has failed meanwhile."""
    policy = a_policy(schedule=(2.0, 3000.0), max_age=86400.0, max_attempts=9)
    world = await a_world(replace(a_route(retry=policy), delay=20.0), ci=[503, 503, 200])
    await world.put(*events(1))
    async with operated(world) as control, running(world, world.worker(control)):
        await asyncio.sleep(21.0)
        assert len(world.client.made) == 1, "the retry waits in memory, its record in a tier isn't done"
        for _ in range(3):
            await kick(world, control, "destination/ci")
            await asyncio.sleep(10)
        assert [number for _, _, number in world.client.made] == [1, 2, 3]
        assert await world.unfinished(TOPICS.retry("20s")) == 0


@virtual
async def test_a_pause_within_the_delay_changes_nothing_about_its_end() -> None:
    world = await a_world(a_delayed())
    began = now()
    await world.put(*events(3))
    async with operated(world) as control, running(world, world.worker(control)):
        pause = ControlRecord(kind="pause", name="route/build", state="paused", at=now())
        await publish(world, pause)
        await asyncio.sleep(5)
        await publish(world, replace(pause, state="resuming", at=now()))
        await world.doze(60)
        assert world.client.made == []
        assert await kick(world, control, "destination/ci") == 0
        await world.doze(DELAY)
    times = waits(world)
    assert len(times) == 3
    assert min(times) >= began + DELAY
    assert max(times) < began + DELAY + 5


@virtual
async def test_restarts_change_no_delay() -> None:
    world = await a_world(a_delayed(to=("ci", "audit")))
    began = now()
    await world.put(*events(10))
    for pause in (0.01, 2.0, 60.0, 200.0, 100.0):
        async with running(world):
            await world.doze(pause)
    times = waits(world)
    assert len(times) == len(world.client.made) == 20
    assert began + DELAY <= min(times)
    assert max(times) < began + DELAY + 5


@virtual
async def test_a_replay_is_made_when_the_delay_is_over_and_at_once_after_it() -> None:
    other = a_route("other", to=("audit",))
    async with a_scene(other) as scene, running(scene.world, scene.world.worker(scene.owner.control)) as worker:
        began = now()
        await scene.events(2)
        scene.reload(worker, other, replace(a_route(), delay=60.0))
        await asyncio.sleep(3)
        await scene.replay()
        assert scene.delivered() == [0, 0]
        await scene.world.doze(60)
        assert scene.delivered() == [1, 1]
        assert waits(scene.world)[-1] >= began + 60.0
        await a_replay(scene.world, "y")
        await asyncio.sleep(10)
        assert scene.delivered() == [2, 2]


@pytest.mark.parametrize(
    ("changes", "is_delayed"),
    [
        ({"due": 130.0, "delayed_until": 130.0}, True),
        ({"due": 130.0, "delayed_until": 130.0, "replayed_at": 110.0}, True),
        ({}, False),
        ({"due": 130.0}, False),
        ({"due": 130.0, "replayed_at": 130.0}, False),
        ({"due": 140.0, "delayed_until": 130.0}, False),
    ],
)
def test_what_is_delayed_by_its_route(changes: dict[str, float], is_delayed: bool) -> None:  # noqa: FBT001 - of a table
    delivery = replace(a_delivery(event=an_event(received_at=100.0), route="r", destination="d"), **changes)  # type: ignore[arg-type]
    assert delivery.is_delayed is is_delayed
    assert delivery.kick_target == ("r", "" if is_delayed else "d")
    assert delivery.age_began_at == max(changes.get("replayed_at", 0.0), changes.get("delayed_until", 0.0), 100.0)
