"""Ordered routes that leave the rules while they have a backlog; in virtual time."""

import asyncio

from gateway.log.topics import ROUTER_GROUP
from gateway.model import Result
from tests.builders import a_policy, a_route, an_event
from tests.engine.test_ordered import GROUP, an_ordered_route, by_key, keyed
from tests.engine.test_worker import TOPICS, a_world, operated, rules_of, running, virtual
from tests.virtual_time import now

OTHER = a_route("audit", match={"type": "none"}, to=("audit",))


@virtual
async def test_the_backlog_of_a_removed_ordered_route_is_dead_lettered_after_an_hour() -> None:
    match = {"body.wanted": True}
    world = await a_world(OTHER, an_ordered_route(match=match), ci=[Result.CONNECT])
    async with operated(world) as control, running(world, world.worker(control)) as worker:
        for number in range(10):
            event = an_event(id=f"k.{number}", key="k", body={"wanted": number < 7}, received_at=now())
            await world.put(event)
        await asyncio.sleep(20)
        world.rules = rules_of(OTHER)
        worker.reload()
        await asyncio.sleep(1800)
        assert world.dead() == []
        await asyncio.sleep(2000)
        assert [filed.delivery.event.id for filed in world.dead()] == [f"k.{number}" for number in range(7)]
        assert {(filed.delivery.route, filed.note["reason"]) for filed in world.dead()} == {("build", "route_removed")}
        assert await world.log.groups(TOPICS.group("ordered/")) == {}


@virtual
async def test_a_route_that_comes_back_within_the_hour_goes_on_in_order() -> None:
    world = await a_world(OTHER, an_ordered_route(), ci=[Result.CONNECT])
    rules = world.rules
    async with operated(world) as control, running(world, world.worker(control)) as worker:
        await world.put(*keyed(2, 5))
        await asyncio.sleep(20)
        world.rules = rules_of(OTHER)
        worker.reload()
        await asyncio.sleep(600)
        world.client.scripts["ci"] = [200]
        await worker.prepare(rules)
        world.rules = rules
        worker.reload()
        await asyncio.sleep(60)
    assert world.dead() == []
    assert {key: sorted(set(tried)) for key, tried in by_key(world).items()} == {
        "k0": [0, 1, 2, 3, 4],
        "k1": [0, 1, 2, 3, 4],
    }


@virtual
async def test_the_backlog_of_a_route_that_is_ordered_no_more_is_delivered_all_the_same() -> None:
    policy = a_policy(schedule=(5.0,), max_attempts=100, max_age=3600.0)
    world = await a_world(an_ordered_route(retry=policy), ci=[Result.CONNECT])
    async with operated(world) as control, running(world, world.worker(control)) as worker:
        await world.put(*keyed(3, 5))
        await asyncio.sleep(20)
        world.rules = rules_of(a_route(retry=policy))
        worker.reload()
        world.client.scripts["ci"] = [200]
        await world.put(an_event(id="k9.0", key="k9", received_at=now()))
        await asyncio.sleep(120)
        assert {event for _, event, _ in world.client.made} == {f"k{k}.{n}" for k in range(3) for n in range(5)} | {
            "k9.0"
        }
        assert await world.log.groups(TOPICS.group("ordered/")) == {}


@virtual
async def test_after_a_restart_nobody_knows_what_a_removed_route_matched_and_nothing_is_lost() -> None:
    world = await a_world(OTHER, an_ordered_route(match={"body.ref": "x"}), ci=[Result.CONNECT])
    await world.worker().prepare(world.rules)
    await world.put(*keyed(2, 3))
    world.rules = rules_of(OTHER)
    async with operated(world) as control, running(world, world.worker(control)):
        await asyncio.sleep(4000)
        assert sorted(filed.delivery.event.id for filed in world.dead()) == sorted(e.id for e in keyed(2, 3))
        assert "nor is known what it matched" in world.dead()[0].note["detail"]


@virtual
async def test_a_group_that_another_process_still_serves_is_left_alone() -> None:
    world = await a_world(OTHER, an_ordered_route(), ci=[Result.CONNECT])
    old, new = world.rules, rules_of(OTHER)
    async with operated(world) as control, running(world, world.worker(control)) as worker:
        await world.put(*keyed(1, 2))
        await asyncio.sleep(5)
        world.rules = new  # seen by the jobs; the worker isn't told, as a process of the old version
        await asyncio.sleep(4000)
        assert GROUP in await world.log.groups(TOPICS.group("ordered/"))
        assert (await world.log.groups(TOPICS.group("")))[TOPICS.group(ROUTER_GROUP)] == 1
        world.rules = old
        worker.reload()
