"""A route becomes ordered by a reload, or matches more than before, and a crash lets earlier events be read again.

What the new rules deliver of them is in the ordered topic before what came later, or it would be taken for a duplicate.
"""

import asyncio
from contextlib import suppress

import pytest

from gateway.log.topics import JOBS_GROUP
from tests.builders import a_destination, a_route
from tests.engine.test_undelivered import OTHER, a_scene
from tests.engine.test_worker import TOPICS, World, rules_of, running
from tests.virtual_time import run

SLOW = a_destination("audit", url="http://127.0.0.1:1/audit", timeout=60.0)
PAIR = frozenset({("build", "ci")})


@pytest.mark.parametrize("end", ["kill", "handover"])
def test_what_is_read_again_behind_a_slow_destination_is_delivered(end: str) -> None:
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


@pytest.mark.parametrize("before", ["", "body.n > 100"])
def test_what_is_read_again_since_no_commit_was_stored_is_delivered(before: str) -> None:
    async def scenario() -> None:
        former = (OTHER, a_route(is_ordered=True, when=before)) if before else (OTHER,)
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


async def kill(world: World, task: "asyncio.Task[None]") -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    for group in list(world.log._state.members):
        if group != TOPICS.group(JOBS_GROUP):
            del world.log._state.members[group]  # its session is over
