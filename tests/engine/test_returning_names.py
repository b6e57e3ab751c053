"""Names that the rules lack for a while: what waits for them goes on as soon as they are back."""

import asyncio

import pytest

from gateway.model import SpillReason
from gateway.rules.rules import Route
from tests.builders import a_policy, a_route
from tests.engine.test_ordered import GROUP, an_ordered_route, by_key, keyed, unfinished
from tests.engine.test_worker import Busy, a_world, events, reload, rules_of, running, virtual
from tests.virtual_time import now, run

OTHER = a_route("other", to=("audit",))


@pytest.mark.parametrize("missing", [OTHER, an_ordered_route(to=("elsewhere",))], ids=["route", "destination"])
def test_an_ordered_delivery_goes_on_within_a_second_after_its_name_is_back(missing: Route) -> None:
    async def scenario() -> None:
        world = await a_world(an_ordered_route(), OTHER, ci=[503, 200])
        async with running(world) as worker:
            await world.put(*keyed(1, 2))
            await asyncio.sleep(1)
            assert by_key(world) == {"k0": [0]}
            await reload(world, worker, rules_of(missing, OTHER))
            await asyncio.sleep(10)
            await reload(world, worker, rules_of(an_ordered_route(), OTHER))
            back_at = now()
            await world.put(*keyed(1, 3)[2:])
            await asyncio.sleep(1)
            assert by_key(world) == {"k0": [0, 0, 1, 2]}, "also what came behind it"
            ordered_at = [at for at, (name, *_) in zip(world.client.at, world.client.made, strict=True) if name == "ci"]
            assert ordered_at[1] < back_at + 0.5
        assert await unfinished(world) == 0

    run(scenario())


@virtual
async def test_a_reload_that_does_not_bring_the_name_back_wakes_nothing() -> None:
    world = await a_world(an_ordered_route(), OTHER, ci=[503, 200])
    async with running(world) as worker:
        await world.put(*keyed(1, 1))
        await asyncio.sleep(1)
        await reload(world, worker, rules_of(OTHER))
        await asyncio.sleep(10)
        for number in range(3):
            await reload(world, worker, rules_of(a_route(f"new-{number}"), OTHER))
            await asyncio.sleep(5)
        assert world.metrics.spills.labels("ci", SpillReason.UNKNOWN_NAME).value == 1
        assert by_key(world) == {"k0": [0]}
    assert await unfinished(world) == 1


@pytest.mark.parametrize("between", [0.0, 1.0])
def test_a_partition_that_moves_meanwhile_goes_on_as_well(between: float) -> None:
    async def scenario() -> None:
        world = await a_world(an_ordered_route(), OTHER, ci=[503, 200])
        async with running(world) as worker:
            await world.put(*keyed(1, 1))
            await asyncio.sleep(1)
            await reload(world, worker, rules_of(OTHER))
            await asyncio.sleep(10)
            await world.log.rebalance(GROUP)
            await asyncio.sleep(between)
            await reload(world, worker, rules_of(an_ordered_route(), OTHER))
            await asyncio.sleep(1)
            assert by_key(world) == {"k0": [0, 0]}
        assert await unfinished(world) == 0

    run(scenario())


@pytest.mark.parametrize("has_moved", [False, True], ids=["stays", "moves"])
def test_a_retry_is_not_hurried_by_a_name_that_left_and_returned_before_it_was_due(*, has_moved: bool) -> None:
    async def scenario() -> None:
        route = an_ordered_route(retry=a_policy(schedule=(60.0,), max_attempts=3, max_age=600.0))
        world = await a_world(route, OTHER, ci=[503, 200])
        began = now()
        async with running(world) as worker:
            await world.put(*keyed(1, 1))
            await asyncio.sleep(1)
            await reload(world, worker, rules_of(OTHER))
            if has_moved:
                await world.log.rebalance(GROUP)
            await asyncio.sleep(10)
            await reload(world, worker, rules_of(route, OTHER))
            await asyncio.sleep(40)
            assert by_key(world) == {"k0": [0]}
            await asyncio.sleep(20)
            assert by_key(world) == {"k0": [0, 0]}
            assert world.client.at[-1] == pytest.approx(began + 60, abs=1)
        assert await unfinished(world) == 0

    run(scenario())


@virtual
async def test_a_name_that_was_back_meanwhile_is_waited_for_anew() -> None:
    """For two hours nothing is attempted, since the destination has asked for silence."""
    patient = a_policy(schedule=(30.0,), max_attempts=9, max_age=86400.0)
    route, other = a_route(retry=patient), a_route("other", to=("ci",), retry=patient)
    world = await a_world(route, ci=[503, Busy(7200.0), 200])
    first, second = events(2)
    async with running(world) as worker:
        await world.put(first)
        await asyncio.sleep(5)
        await reload(world, worker, rules_of(other))
        await asyncio.sleep(30)
        assert world.metrics.spills.labels("ci", SpillReason.UNKNOWN_NAME).value == 1
        await world.put(second)
        await asyncio.sleep(50)
        await reload(world, worker, rules_of(route, other))
        await world.doze(7100)
        assert len(world.client.made) == 2
        await reload(world, worker, rules_of(other))
        await asyncio.sleep(60)
        assert world.metrics.spills.labels("ci", SpillReason.UNKNOWN_NAME).value == 2
        await reload(world, worker, rules_of(route, other))
        await asyncio.sleep(120)
    assert world.dead() == []
    assert [event for _, event, _ in world.client.made].count(first.id) == 2
