"""An ordered route with many keys begins with few of them at a time: everything else has its turns meanwhile."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace

import pytest
from typing_extensions import override

from gateway.engine.control.records import ControlRecord
from gateway.engine.ordered import route as ordered_route
from gateway.engine.ordered.gauges import Gauges
from gateway.engine.ordered.route import KEYS_PER_TICK
from gateway.engine.ordered.turns import AT_ONCE
from gateway.engine.worker import Worker
from tests.builders import a_policy
from tests.engine.test_ordered import PLACE, an_ordered_route, by_key, keyed
from tests.engine.test_worker import EVENTS, TOPICS, ScriptedClient, Turns, World, operated, publish, rules_of, running
from tests.memory_log import MemoryLog
from tests.virtual_time import now, run

KEYS = 2_000
ONCE = a_policy(schedule=(1.0,), max_attempts=1)


Change = Callable[[World, Worker], Coroutine[None, None, None]]


async def a_counting_world(answer: int) -> Turns:
    log, rules = MemoryLog(now=now), rules_of(an_ordered_route(halts=True, retry=ONCE))
    await log.create(TOPICS.specs([EVENTS], rules.ordered))
    return Turns(log=log, rules=rules, client=ScriptedClient({"ci": [answer]}))


async def resumed(world: World, _worker: Worker) -> None:
    await publish(world, ControlRecord(kind="pause", name="route/build", state="resuming", at=now(), by="me"))


async def kicked(world: World, _worker: Worker) -> None:
    await publish(world, ControlRecord(kind="kick", name="route/build", state="requested", at=now()))


async def reloaded(world: World, worker: Worker) -> None:
    world.rules = rules_of(replace(world.rules.routes["build"], on_exhausted="dead_letter"))
    worker.reload()


@pytest.mark.parametrize(
    ("status", "change", "passes"),
    [(200, resumed, 1), (404, kicked, 3), (404, reloaded, 2)],
    ids=["resume", "kick", "reload"],
)
def test_many_keys_that_go_on_at_once_give_way_to_others(status: int, change: Change, passes: int) -> None:
    async def scenario() -> None:
        world = await a_counting_world(status)
        async with operated(world) as control, running(world, world.worker(control)) as worker:
            if change is resumed:
                await publish(world, ControlRecord(kind="pause", name="route/build", state="paused", at=now(), by="me"))
            await asyncio.sleep(1)
            await world.put(*keyed(KEYS, 1))
            await asyncio.sleep(120)
            assert len(worker.ordered_states[PLACE].blocked) == (0 if change is resumed else KEYS)
            world.client.scripts["ci"], world.turns = [200], 0
            await change(world, worker)
            await asyncio.sleep(20)
            assert world.turns >= passes * (KEYS // AT_ONCE)
            if change is not reloaded:
                assert set(by_key(world)) == {f"k{number}" for number in range(KEYS)}
            await asyncio.sleep(60)
            assert not worker.ordered_states[PLACE].blocked
            assert len(world.dead()) == (KEYS if change is reloaded else 0)

    run(scenario())


@pytest.mark.parametrize("factor", [1, 4])
def test_the_more_keys_wait_the_less_often_they_are_looked_at(factor: int, monkeypatch: pytest.MonkeyPatch) -> None:
    looks = 0

    class Counted(Gauges):
        @override
        def set(self, *args: object, **kwargs: object) -> None:
            nonlocal looks
            looks += 1
            super().set(*args, **kwargs)  # type: ignore[arg-type] # as they came

    monkeypatch.setattr(ordered_route, "Gauges", Counted)
    monkeypatch.setattr(ordered_route, "KEYS_PER_TICK", 50)
    assert KEYS_PER_TICK > 50

    async def scenario() -> None:
        nonlocal looks
        world = await a_counting_world(404)
        async with operated(world) as control, running(world, world.worker(control)) as worker:
            await world.put(*keyed(50 * factor, 1))
            await asyncio.sleep(30)
            assert len(worker.ordered_states[PLACE].blocked) == 50 * factor
            looks = 0
            await asyncio.sleep(60)
            assert looks == pytest.approx(240 / factor, abs=2)

    run(scenario())
