"""Ordered routes while something changes about them: kicks, reloads, rebalances, a stop; in virtual time."""

import asyncio
from dataclasses import replace

import pytest

from gateway.engine.commit_progress import WINDOW
from gateway.engine.control.records import ControlRecord
from gateway.engine.ordered.route import ORDERED_REVOKE_GRACE
from gateway.engine.worker import MAX_ORDERED_MEMORY
from gateway.log.records import encode_event
from gateway.model import Result
from tests.builders import a_destination, a_policy, a_route, an_event
from tests.engine.test_ordered import GROUP, PLACE, an_ordered_route, assert_in_order, by_key, keyed, unfinished
from tests.engine.test_worker import (
    EVENTS,
    TOPICS,
    World,
    a_world,
    operated,
    publish,
    reload,
    rules_of,
    running,
    virtual,
)
from tests.virtual_time import now, run

OTHER = a_route("audit", match={"type": "none"}, to=("audit",))
ONCE = a_policy(schedule=(1.0,), max_attempts=1)
FOR_EVER = a_policy(schedule=(5.0,), max_attempts=10**6, max_age=1e9)


async def kick(world: World) -> None:
    """ControlRecord it; the job rests for some seconds before it has carried it out."""
    await publish(world, ControlRecord(kind="kick", name="route/build", state="requested", at=now()))


async def kick_at_once(world: World) -> None:
    """Announce a kick as its job does, for one that comes at a certain moment."""
    await publish(world, ControlRecord(kind="checkpoint", name="announcement/kick/route/build", state="done", at=now()))


# Kicks.


@virtual
async def test_a_kick_during_a_commit_releases_nothing_twice() -> None:
    """What is ready waits for the commit, and is waiting to a kick's eyes, too."""
    world = await a_world(an_ordered_route(), ci=[0.5])
    await world.put(*keyed(1, 3))
    world.log.delay_commits(1.0)
    async with operated(world) as control, running(world, world.worker(control)):
        for _ in range(12):
            await kick_at_once(world)
            await asyncio.sleep(0.6)
        await asyncio.sleep(20)
    assert by_key(world) == {"k0": [0, 1, 2]}
    assert await unfinished(world) == 0


@virtual
async def test_a_halted_key_ends_once_however_long_the_commit_before_takes() -> None:
    world = await a_world(an_ordered_route(halts=True, retry=ONCE), ci=[503, 200])
    await world.put(*keyed(1, 2))
    async with running(world) as worker:
        await asyncio.sleep(5)
        world.log.delay_commits(2.0)
        world.rules = rules_of(an_ordered_route(retry=ONCE))
        worker.reload()
        await asyncio.sleep(20)
    assert by_key(world) == {"k0": [0, 1]}
    assert [stored.delivery.event.id for stored in world.dead()] == ["k0.0"]


@virtual
async def test_a_kick_during_a_rebalance_is_heard() -> None:
    """Between a revocation and the next assignment there is nothing to kick but what is remembered."""
    world = await a_world(an_ordered_route(halts=True, retry=ONCE), ci=[503])
    async with operated(world) as control, running(world, world.worker(control)):
        await world.put(*keyed(1, 2))
        await asyncio.sleep(5)
        world.client.scripts["ci"] = [200]
        rebalance = asyncio.create_task(world.log.rebalance(GROUP, takes=10.0))
        await asyncio.sleep(1)
        await kick(world)
        await rebalance
        await asyncio.sleep(5)
    assert by_key(world) == {"k0": [0, 0, 1]}


@virtual
async def test_a_kick_is_heard_by_a_halted_key_that_has_just_come_back() -> None:
    """It is known to have halted, and waits for a commit before it is to halt again."""
    world = await a_world(an_ordered_route(halts=True, retry=ONCE), ci=[503])
    async with operated(world) as control, running(world, world.worker(control)):
        await world.put(*keyed(1, 2))
        await asyncio.sleep(5)
        world.client.scripts["ci"] = [200]
        world.log.delay_commits(3.0)
        await world.log.rebalance(GROUP)
        await asyncio.sleep(1)
        await kick_at_once(world)
        await asyncio.sleep(20)
    assert by_key(world) == {"k0": [0, 0, 1]}


@virtual
async def test_a_kick_delivers_no_event_with_an_undecided_condition() -> None:
    world = await a_world(an_ordered_route(when="body.n + 1 > 0", halts=True))
    async with operated(world) as control, running(world, world.worker(control)):
        await world.put(an_event(id="k.0", key="k", body={"n": "x"}, received_at=now()))
        await asyncio.sleep(5)
        await kick(world)
        await asyncio.sleep(10)
    assert world.client.made == []
    assert await unfinished(world) == 1


@pytest.mark.parametrize("is_reloaded_before", [True, False])
def test_a_kick_decides_by_the_current_rules(*, is_reloaded_before: bool) -> None:
    run(_kicked_with_new_rules(is_reloaded_before=is_reloaded_before))


async def _kicked_with_new_rules(*, is_reloaded_before: bool) -> None:
    world = await a_world(an_ordered_route(when="body.n + 1 > 0", halts=True))
    async with operated(world) as control, running(world, world.worker(control)) as worker:
        for key in ("taken", "left"):
            await world.put(an_event(id=f"{key}.0", key=key, body={"n": key}, received_at=now()))
        await asyncio.sleep(5)
        world.rules = rules_of(an_ordered_route(when="body.n == 'taken'", halts=True))
        if is_reloaded_before:
            worker.reload()
        await kick(world)
        await asyncio.sleep(10)
        worker.reload()
        await asyncio.sleep(1)
    assert by_key(world) == {"taken": [0]}
    assert world.metrics.deliveries.labels("build", "ci", "dropped").value == 1
    assert world.dead() == []
    assert await unfinished(world) == 0


@virtual
async def test_a_kick_leaves_what_a_condition_halted_to_rules_that_know_its_source_and_route() -> None:
    route = an_ordered_route(when="body.n + 1 > 0", halts=True)
    world = await a_world(route)
    async with operated(world) as control, running(world, world.worker(control)) as worker:
        await world.put(an_event(id="k.0", key="k", body={"n": "x"}, received_at=now()))
        await asyncio.sleep(5)
        for rules in (replace(rules_of(route), sources={}), rules_of()):
            world.rules = rules
            worker.reload()
            await kick(world)
            await asyncio.sleep(10)
            assert await unfinished(world) == 1
        world.rules = rules_of(an_ordered_route(when="body.n == 'x'", halts=True))
        worker.reload()
        await asyncio.sleep(30)
    assert by_key(world) == {"k": [0]}
    assert world.dead() == []


# Reloads.


@virtual
async def test_a_removed_routes_unread_events_are_not_called_done() -> None:
    """Both routes leave; the first one's attempt hangs, so the second one's member is closed later."""
    world = await a_world(
        OTHER,
        an_ordered_route("a", to=("a",), retry=FOR_EVER),
        an_ordered_route("b", to=("b",), retry=FOR_EVER),
        destinations=[a_destination("a", url="http://127.0.0.1:1/a", timeout=300.0)],
        a=[200.0],
        b=[Result.CONNECT],
    )
    behind = TOPICS.ordered_group("b", "b")
    async with running(world) as worker:
        await world.put(*keyed(1, 2))
        await asyncio.sleep(5)
        world.log.stall(behind)
        await world.put(*[an_event(id=f"late.{n}", key="late", received_at=now()) for n in range(3)])
        await asyncio.sleep(2)
        assert await world.unfinished() == 0, "the router has passed over them: they are for the ordered routes"
        world.rules = rules_of(OTHER)
        worker.reload()
        world.log.go_on(behind)
        await asyncio.sleep(2 * ORDERED_REVOKE_GRACE)
    assert await unfinished(world, ("b", "b")) == 5


@virtual
async def test_a_stop_does_not_wait_for_a_removed_routes_attempt() -> None:
    patient = a_destination("ci", url="http://127.0.0.1:1/ci", timeout=300.0)
    world = await a_world(OTHER, an_ordered_route(), destinations=[patient], ci=[200.0])
    worker = world.worker()
    task = asyncio.create_task(worker.run())
    await world.put(*keyed(1, 1))
    await asyncio.sleep(5)
    world.rules = rules_of(OTHER)
    worker.reload()
    await asyncio.sleep(1)
    worker.stop(drain_timeout=2.0)
    done, _ = await asyncio.wait([task], timeout=60)
    task.cancel()
    await asyncio.wait([task])
    assert done


@virtual
async def test_memory_is_divided_again_with_each_new_route() -> None:
    world = await a_world(OTHER)
    async with running(world) as worker:
        for count in range(1, 25):
            rules = rules_of(OTHER, *[an_ordered_route(f"ordered-{n}") for n in range(count)])
            await reload(world, worker, rules)
            await asyncio.sleep(0.5)
        allowed = [member._memory.limit for member, _ in worker._ordered.values()]
    assert len(allowed) == 24
    assert MAX_ORDERED_MEMORY * 0.9 < sum(allowed) <= MAX_ORDERED_MEMORY


# Rebalances and restarts.


@virtual
async def test_two_rebalances_in_a_row_forget_nothing_of_a_first_delivery() -> None:
    """Nothing is read between them, so there is nothing in memory but what was remembered at the first."""
    policy = a_policy(schedule=(60.0,), max_attempts=2, max_age=6000.0)
    world = await a_world(an_ordered_route(retry=policy), ci=[503])
    await world.put(*keyed(1, 1))
    async with running(world):
        for _ in range(5):
            await asyncio.sleep(2)
            await world.log.rebalance(GROUP)
            await world.log.rebalance(GROUP)
        await asyncio.sleep(100)
    assert [number for _, _, number in world.client.made] == [1, 2]
    first, second = world.client.at
    assert second - first >= 60


@virtual
async def test_a_rebalance_makes_nothing_old_that_a_kick_began_anew() -> None:
    policy = a_policy(schedule=(20.0,), max_attempts=4, max_age=70.0)
    world = await a_world(an_ordered_route(halts=True, retry=policy), ci=[503])
    await world.put(*keyed(1, 1))
    async with operated(world) as control, running(world, world.worker(control)) as worker:
        await asyncio.sleep(100)
        await kick_at_once(world)
        await asyncio.sleep(10)
        await world.log.rebalance(GROUP)
        await asyncio.sleep(100)
        [key] = worker.ordered_states[PLACE].blocked
    assert [number for _, _, number in world.client.made] == [1, 2, 3, 4] * 2
    assert key.halted is not None
    assert key.halted.reason == "exhausted"


@virtual
async def test_a_partitions_state_is_forgotten_once_another_owned_it() -> None:
    """A key that has halted comes straight back halted; one that another had meanwhile is tried anew."""
    world = await a_world(an_ordered_route(halts=True, retry=ONCE), ci=[503])
    await world.put(*keyed(12, 1))
    async with running(world):
        await asyncio.sleep(5)
        async with running(world):
            await asyncio.sleep(5)
            anothers = {key for key, tried in by_key(world).items() if len(tried) == 2}
            world.client.scripts["ci"] = [200]
        await asyncio.sleep(5)
    assert 0 < len(anothers) < 12
    assert {key for key, tried in by_key(world).items() if len(tried) == 3} == anothers
    assert await unfinished(world) == 12 - len(anothers)


@virtual
async def test_an_event_beyond_a_commits_capacity_waits() -> None:
    """A key that halts fills the window; beyond it, what was delivered would come again after later ones of its key."""
    world = await a_world(an_ordered_route(match={"type": "push"}, halts=True, retry=ONCE), ci=[503, 200])
    halted = an_event(id="halted.0", key="halted", received_at=now())
    passed = [an_event(id=f"evt_{n}", type="other", received_at=now()) for n in range(WINDOW - 1500)]
    for event in (halted, *passed, *keyed(50, 40)):
        await world.log.append(EVENTS, key=b"of one partition", value=event.body, headers=encode_event(event))
    async with running(world):
        await asyncio.sleep(10)
        assert await unfinished(world) > 0
        assert len(world.client.made) > 500, "the window is full of what the key that halts holds back"
    async with running(world):
        await asyncio.sleep(10)
    tried = by_key(world)
    assert tried.pop("halted") == [0, 0]
    assert {key: len(numbers) for key, numbers in tried.items()} == {f"k{key}": 40 for key in range(50)}
    for numbers in tried.values():
        assert_in_order(numbers, 40)
    assert await unfinished(world) == 0
