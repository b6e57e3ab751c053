"""Ordered routes that leave the rules while they have a backlog; in virtual time."""

import asyncio
from dataclasses import replace

from gateway.engine.control import Order
from gateway.log.base import Commit, Partition
from gateway.log.records import encode_event, event_key
from gateway.log.topics import ROUTER_GROUP
from gateway.model import Result
from gateway.rules.rules import Route, Rules, Source
from gateway.verify.schemes import build_verifier
from tests.builders import a_policy, a_route, an_event
from tests.engine.test_ordered import GROUP, an_ordered_route, by_key, keyed
from tests.engine.test_worker import EVENTS, TOPICS, a_world, operated, publish, rules_of, running, virtual
from tests.virtual_time import now

OTHER = a_route("audit", match={"type": "none"}, to=("audit",))
FOR_EVER = a_policy(schedule=(5.0,), max_attempts=10**6, max_age=1e9)


def with_gitlab(*routes: Route) -> Rules:
    rules = rules_of(*routes)
    gitlab = Source(name="gitlab", path="/in/gitlab", verifier=build_verifier({"scheme": "none"}))
    return replace(rules, sources={**rules.sources, "gitlab": gitlab})


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
        await world.doze(1800)
        assert world.dead() == []
        await world.doze(2000)
        assert [filed.delivery.event.id for filed in world.dead()] == [f"k.{number}" for number in range(7)]
        assert {(filed.delivery.route, filed.note["reason"]) for filed in world.dead()} == {("build", "route_removed")}
        assert await world.log.groups(TOPICS.group("ordered/")) == {}


@virtual
async def test_what_was_done_of_a_removed_ordered_route_is_not_among_its_backlog() -> None:
    """A key's first event waits for its retry. What came after it, of other keys, is done, and only bits say so."""
    route = an_ordered_route(retry=a_policy(schedule=(600.0,), max_attempts=10, max_age=1e9))
    world = await a_world(OTHER, route, ci=[503, 200])
    async with operated(world) as control, running(world, world.worker(control)) as worker:
        await world.put(an_event(id="k0.0", key="k0", received_at=now()))
        await asyncio.sleep(1)
        await world.put(*[an_event(id=f"k{n}.0", key=f"k{n}", received_at=now()) for n in range(1, 20)])
        await asyncio.sleep(20)
        assert len(world.client.made) == 20
        world.rules = rules_of(OTHER)
        worker.reload()
        await world.doze(4000)
        assert [filed.delivery.event.id for filed in world.dead()] == ["k0.0"]


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
        await world.doze(4000)
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
        await world.doze(4000)
        assert GROUP in await world.log.groups(TOPICS.group("ordered/"))
        assert (await world.log.groups(TOPICS.group("")))[TOPICS.group(ROUTER_GROUP)] == 1
        world.rules = old
        worker.reload()


@virtual
async def test_what_a_process_of_older_rules_passes_over_is_part_of_the_backlog() -> None:
    """A rolling deployment takes `order: key` away, and a process of the old rules goes on for longer than a look."""
    old = await a_world(an_ordered_route(retry=FOR_EVER), ci=[Result.CONNECT])
    new = replace(old, rules=rules_of(a_route(retry=FOR_EVER)))
    async with operated(new):
        async with running(old):
            await old.put(*keyed(1, 2))
            await asyncio.sleep(60)
            await old.put(*[an_event(id=f"late.{number}", key="late", received_at=now()) for number in range(3)])
            await asyncio.sleep(10)
        new.client.scripts["ci"] = [200]
        new.client.made.clear()
        async with running(new):
            await asyncio.sleep(300)
    assert sorted(event for _, event, _ in new.client.made) == ["k0.0", "k0.1", "late.0", "late.1", "late.2"]


@virtual
async def test_the_backlog_of_a_source_that_left_an_ordered_route_is_dead_lettered() -> None:
    """What matched is told by the route as it was: by the one that lives on, nothing of that source does."""
    topic = TOPICS.events("gitlab")
    world = await a_world(ci=[Result.CONNECT])
    await world.log.create(TOPICS.specs([topic]))
    world.rules = with_gitlab(an_ordered_route(sources=("github", "gitlab"), retry=FOR_EVER))
    async with operated(world) as control:
        async with running(world, world.worker(control)) as worker:
            for number in range(4):
                event = an_event(id=f"k.{number}", key="k", source="gitlab", received_at=now())
                await world.log.append(topic, key=event_key(event), value=event.body, headers=encode_event(event))
            await asyncio.sleep(20)
            world.rules = with_gitlab(an_ordered_route(sources=("github",), retry=FOR_EVER))
            worker.reload()
            await asyncio.sleep(20)
        await world.doze(4000)
        assert [filed.delivery.event.id for filed in world.dead()] == [f"k.{number}" for number in range(4)]
        assert list(await world.log.groups(TOPICS.group("ordered/"))) == [GROUP]


@virtual
async def test_a_group_just_seeded_is_not_ended_by_a_process_of_older_rules() -> None:
    """A rolling deployment gives a route its order; the owner of the jobs looks between the seed and the join.

    Without its seed the group would begin at the start of the log.
    """
    old = await a_world(a_route())
    new = replace(old, rules=rules_of(an_ordered_route()))
    async with operated(old), running(old):
        await old.put(*keyed(5, 10))
        await asyncio.sleep(28)
        assert len(old.client.made) == 50
        old.log.delay_joins(3.0)
        async with running(new):
            await asyncio.sleep(1)
            assert await old.log.groups(GROUP) == {GROUP: 0}
            await asyncio.sleep(30)
            assert await old.log.groups(GROUP) == {GROUP: 1}
    assert len(old.client.made) == 50


@virtual
async def test_a_group_that_is_not_named_as_ours_are_is_left_alone_and_the_jobs_go_on() -> None:
    world = await a_world(OTHER)
    foreign = TOPICS.group("ordered/build/ci")
    await world.log.seed(foreign, {Partition(EVENTS, 0): Commit(0)})
    async with operated(world) as control:
        await asyncio.sleep(65)
        await publish(world, Order(kind="kick", name="route/audit", state="asked", at=now()))
        await asyncio.sleep(10)
        assert control.kicked_at("audit", "audit") > 0
    assert await world.log.groups(foreign) == {foreign: 0}
