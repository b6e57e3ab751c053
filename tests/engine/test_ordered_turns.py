"""An ordered route with many keys begins with few of them at a time: everything else has its turns meanwhile."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from functools import partial

import pytest
from typing_extensions import override

from gateway.engine.control.records import ControlRecord, decode
from gateway.engine.ordered import route as ordered_route
from gateway.engine.ordered.batching import AT_ONCE
from gateway.engine.ordered.gauges import Gauges
from gateway.engine.ordered.route import KEYS_PER_TICK
from gateway.engine.worker import Worker
from gateway.model import Disposition
from gateway.rules.retry_policy import RetryPolicy
from tests.builders import a_policy
from tests.engine.test_ordered import GROUP, PLACE, an_ordered_route, by_key, keyed
from tests.engine.test_ordered_changes import kick_at_once
from tests.engine.test_worker import (
    EVENTS,
    TOPICS,
    Answer,
    ScriptedClient,
    Turns,
    World,
    operated,
    publish,
    rules_of,
    running,
    virtual,
)
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
    [(200, resumed, 1), (404, kicked, 4), (404, reloaded, 2)],
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


@virtual
async def test_many_keys_that_leave_and_return_give_way_to_others() -> None:
    world = await a_counting_world(404)
    async with operated(world) as control, running(world, world.worker(control)) as worker:
        await world.put(*keyed(KEYS, 1))
        await asyncio.sleep(120)
        before = len(world.client.made)
        world.turns = 0
        await world.log.rebalance(GROUP)
        await asyncio.sleep(20)
        assert world.turns >= 2 * (KEYS // AT_ONCE), "as they leave, and as they are found to have halted"
        assert len(worker.ordered_states[PLACE].blocked) == KEYS
        assert len(world.client.made) == before


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


class Interrupted(World):
    """Has something happen as soon as somebody with many keys gives way to others."""

    interruption: Callable[[], Awaitable[None]] | None = None
    is_interrupted = False

    @override
    async def sleep(self, seconds: float) -> None:
        if seconds == 0 and (interruption := self.interruption) is not None:
            self.interruption, self.is_interrupted = None, True
            await interruption()
        await super().sleep(seconds)


async def an_interrupted_world(retry: RetryPolicy, *answers: Answer) -> Interrupted:
    log, rules = MemoryLog(now=now), rules_of(an_ordered_route(halts=True, retry=retry))
    await log.create(TOPICS.specs([EVENTS], rules.ordered))
    return Interrupted(log=log, rules=rules, client=ScriptedClient({"ci": answers}))


@virtual
async def test_a_kick_is_heard_by_keys_that_leave_and_return_before_their_turn() -> None:
    world = await an_interrupted_world(ONCE, 404)
    async with operated(world) as control, running(world, world.worker(control)) as worker:
        await world.put(*keyed(200, 1))
        await asyncio.sleep(30)
        world.client.scripts["ci"] = [200]
        world.interruption = partial(world.log.rebalance, GROUP)
        await kick_at_once(world)
        await asyncio.sleep(10)
        assert world.is_interrupted
        assert worker.ordered_states[PLACE].blocked == []
    assert by_key(world) == {f"k{number}": [0, 0] for number in range(200)}


@virtual
async def test_keys_that_leave_amid_a_kick_keep_since_when_they_are_blocked_and_how_often_they_were_tried() -> None:
    """The first half has halted by then, the other waits for its second attempt."""
    twice = a_policy(schedule=(3600.0,), max_attempts=2, max_age=1e6, results=(("404", Disposition.RETRY),))
    world = await an_interrupted_world(twice, 404)
    async with operated(world) as control, running(world, world.worker(control)) as worker:
        events = keyed(200, 1)
        for half in (events[:100], events[100:]):
            await world.put(*half)
            await world.doze(2700)
        halting, waiting = ({event.id for event in half} for half in (events[:100], events[100:]))
        first_at = dict(zip([event for _, event, _ in world.client.made], world.client.at, strict=True))
        first_at |= dict(zip([event for _, event, _ in world.client.made[:100]], world.client.at[:100], strict=True))
        assert halted(worker) == halting
        world.interruption = partial(world.log.rebalance, GROUP)
        await kick_at_once(world)
        await asyncio.sleep(30)
        assert world.is_interrupted
        assert halted(worker) == waiting
        since = {each.delivery.event.id: each.since for each in worker.ordered_states[PLACE].blocked}
    assert {name: since[name] for name in halting} == {name: first_at[name] for name in halting}
    assert Counter(number for *_, number in world.client.made) == {1: 300, 2: 200}


def halted(worker: Worker) -> set[str]:
    return {each.delivery.event.id for each in worker.ordered_states[PLACE].blocked if each.halted}


@pytest.mark.parametrize(("seconds", "delivered"), [(5.0, 101), (1e6, 100)], ids=["delivered", "timed-out"])
def test_an_attempt_that_ends_amid_a_kick_counts_as_when_the_kick_arrived(seconds: float, delivered: int) -> None:
    async def scenario() -> None:
        world = await an_interrupted_world(ONCE, 404)
        async with operated(world) as control, running(world, world.worker(control)):
            *halting, last = keyed(101, 1)
            await world.put(*halting)
            await asyncio.sleep(30)
            world.client.scripts["ci"] = [seconds]
            timeout = world.rules.destinations["ci"].timeout
            await world.put(last)
            await asyncio.sleep(min(seconds, timeout) - 1)
            assert world.client.under_way == 1
            world.client.scripts["ci"] = [200]
            world.interruption = partial(asyncio.sleep, 1.5)
            await kick_at_once(world)
            await asyncio.sleep(10)
            assert world.is_interrupted
        outcomes = [
            decode(record.key, record.value)
            for record in world.log.records(TOPICS.control)
            if record.key.startswith(b"checkpoint/tried/")
        ]
        assert sum(each.count for each in outcomes) == sum(each.tried or 0 for each in outcomes) == 101
        assert sum(each.delivered or 0 for each in outcomes) == delivered

    run(scenario())
