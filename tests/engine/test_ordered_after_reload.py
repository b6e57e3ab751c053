"""A route becomes ordered by a reload, or matches more than before, and a crash lets earlier events be read again.

What the new rules deliver of them is in the ordered topic before what came later, or it would be taken for a duplicate.
"""

import asyncio
from contextlib import suppress
from dataclasses import replace

import pytest

from gateway.engine.jobs.undelivered import Fate
from gateway.engine.partition_tracker import ReloadBoundaries
from gateway.log.topics import JOBS_GROUP, ROUTER_GROUP
from tests.builders import a_destination, a_route
from tests.engine.test_topics_of_sources import moved
from tests.engine.test_undelivered import OTHER, Scene, a_scene
from tests.engine.test_worker import EVENTS, TOPICS, World, rules_of, running
from tests.virtual_time import run

SLOW = a_destination("audit", url="http://127.0.0.1:1/audit", timeout=60.0)
PAIR = frozenset({("build", "ci")})


@pytest.mark.parametrize("end", ["kill", "handover"])
def test_events_reread_behind_a_slow_destination_are_delivered(end: str) -> None:
    async def scenario() -> None:
        async with a_scene(OTHER, audit=[30.0]) as scene:
            world, control = scene.world, scene.owner.control
            world.rules = rules_of(OTHER, destinations=[SLOW])
            first = world.worker(control)
            task = asyncio.create_task(first.run())
            await asyncio.sleep(1)
            await scene.events(8)
            await world.log.create(TOPICS.specs([], PAIR))
            world.rules = rules_of(OTHER, a_route(is_ordered=True), destinations=[SLOW])
            first.reload()
            await asyncio.sleep(1)
            await scene.events(8)
            assert sum(scene.delivered()) < 8, "they wait for what was read before in their partition"
            if end == "kill":
                await kill(world, task)
                async with running(world, world.worker(control)):
                    await asyncio.sleep(60)
                assert scene.delivered() == [1] * 16
            else:
                async with running(world, world.worker(control)):
                    await asyncio.sleep(60)
                    assert sum(scene.delivered()) >= 8
                first.stop()
                await task
            async with running(world, world.worker(control)):
                await scene.replay()
            assert scene.delivered() == [1] * 16

    run(scenario())


@pytest.mark.parametrize("before", ["", "body.n > 100", "another takes them"])
def test_events_reread_after_a_failed_commit_are_delivered(before: str) -> None:
    async def scenario() -> None:
        former = {
            "": (OTHER,),
            "body.n > 100": (OTHER, a_route(is_ordered=True, when="body.n > 100")),
            "another takes them": (replace(OTHER, stop=True), a_route(is_ordered=True)),
        }[before]
        async with a_scene(*former) as scene:
            world, control = scene.world, scene.owner.control
            world.log.fail_commits()
            first = world.worker(control)
            task = asyncio.create_task(first.run())
            await asyncio.sleep(1)
            await scene.events(8)
            await world.log.create(TOPICS.specs([], PAIR))
            scene.reload(first, OTHER, a_route(is_ordered=True))
            await asyncio.sleep(1)
            await scene.events(8)
            await kill(world, task)
            world.log.fail_commits(0)
            async with running(world, world.worker(control)):
                await asyncio.sleep(60)
            assert scene.delivered() == [1] * 16

    run(scenario())


def test_events_that_wait_since_a_reload_outwait_the_next() -> None:
    async def scenario() -> None:
        async with a_scene(OTHER, audit=[30.0] * 8) as scene:
            world = scene.world
            await world.log.create(TOPICS.specs([], PAIR))
            first = world.worker(scene.owner.control)
            task = asyncio.create_task(first.run())
            await scene.events(8)
            scene.reload(first, OTHER, a_route(is_ordered=True))
            await scene.events(8)
            scene.reload(first, OTHER, a_route(is_ordered=True, when="body.n >= 0"))
            await asyncio.sleep(1)
            await assert_all_wait_and_survive_a_kill(scene, task)

    run(scenario())


def test_adopted_events_were_read_by_former_rules() -> None:
    async def scenario() -> None:
        async with a_scene(OTHER, audit=[30.0] * 8) as scene:
            world, group = scene.world, TOPICS.group(ROUTER_GROUP)
            await world.log.create(TOPICS.specs([], PAIR))
            first = world.worker(scene.owner.control)
            task = asyncio.create_task(first.run())
            await scene.events(8)
            world.log.stall(group)
            await world.log.rebalance(group)
            scene.reload(first, OTHER, a_route(is_ordered=True))
            world.log.go_on(group)
            await scene.events(8)
            await assert_all_wait_and_survive_a_kill(scene, task)

    run(scenario())


def test_events_sent_to_a_sources_former_topic_are_awaited() -> None:
    async def scenario() -> None:
        async with a_scene(OTHER, audit=[30.0] * 8) as scene:
            world = scene.world
            await world.log.create(TOPICS.specs([f"{EVENTS}-2"], PAIR))
            first = world.worker(scene.owner.control)
            task = asyncio.create_task(first.run())
            await scene.events(8)
            world.rules = moved(rules_of(OTHER, a_route(is_ordered=True)), f"{EVENTS}-2")
            first.reload()
            await scene.events(8)  # by an ingress with the former rules
            await assert_all_wait_and_survive_a_kill(scene, task)

    run(scenario())


@pytest.mark.parametrize("is_reload", [False, True], ids=["restart", "reload amid what was read"])
def test_events_possibly_skipped_before_wider_rules_are_unknown(*, is_reload: bool) -> None:
    async def scenario() -> None:
        narrow, wide = a_route(is_ordered=True, when="body.n % 2 == 1"), a_route(is_ordered=True)
        async with a_scene(OTHER, narrow, audit=[30.0] * 16) as scene:
            world, group = scene.world, TOPICS.group(ROUTER_GROUP)
            task = asyncio.create_task(world.worker(scene.owner.control).run())
            await scene.events(32)
            assert scene.delivered() == [0, 1] * 16
            await kill(world, task)
            if not is_reload:
                world.rules = rules_of(OTHER, wide)
            world.log.stall(group)
            async with running(world, world.worker(scene.owner.control)) as worker:
                await asyncio.sleep(1)
                if is_reload:
                    scene.reload(worker, OTHER, wide)
                world.log.go_on(group)
                await asyncio.sleep(60)
                missed = scene.delivered().count(0)
                assert missed > 4, "what came after them in their partition had been appended"
                await asyncio.sleep(60)
                await scene.events(8)
                counts = await scene.counts()
                assert counts[Fate.UNDELIVERED] == 0
                assert missed <= counts[Fate.UNKNOWN] <= 16, "those that both rules match are known"
                assert counts[Fate.ENDED] == 40 - counts[Fate.UNKNOWN]

    run(scenario())


def test_a_delivery_waits_for_the_last_reload_before_it_until_that_is_committed() -> None:
    boundaries = ReloadBoundaries()
    boundaries.add(["build"], 6)
    boundaries.add(["build", "audit"], 10)
    assert [boundaries.before("build", offset) for offset in (5, 6, 9, 10, 11)] == [0, 6, 6, 10, 10]
    assert [boundaries.before("audit", offset) for offset in (9, 10)] == [0, 10]
    assert boundaries.before("other", 12) == 0
    boundaries.forget_below(6)
    assert [boundaries.before("build", offset) for offset in (9, 10)] == [0, 10]
    assert boundaries.highest == 10
    boundaries.forget_below(10)
    assert (boundaries.before("build", 10), boundaries.highest) == (0, 0)


async def assert_all_wait_and_survive_a_kill(scene: Scene, task: "asyncio.Task[None]") -> None:
    """Of sixteen events, the last eight wait for the first, which are read again after a kill and come before them."""
    assert sum(scene.delivered()) < 8, "they wait for what was read before in their partition"
    await kill(scene.world, task)
    async with running(scene.world, scene.world.worker(scene.owner.control)):
        await asyncio.sleep(60)
    assert scene.delivered() == [1] * 16


async def kill(world: World, task: "asyncio.Task[None]") -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    for group in list(world.log._state.members):
        if group != TOPICS.group(JOBS_GROUP):
            del world.log._state.members[group]  # its session is over
