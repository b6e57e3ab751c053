"""A route that splits its events: each item is delivered by itself, and none twice or never, whatever happens."""

import asyncio
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import pytest
from typing_extensions import override

from gateway.client.request import Outbound
from gateway.engine.control.records import ControlRecord, DeadFilter
from gateway.engine.delivery.destination_lanes import Lane
from gateway.engine.jobs.undelivered import Fate
from gateway.engine.partition_tracker import PendingDelivery
from gateway.log.topics import TIERS
from gateway.model import Attempt, DeadReason, SpillReason
from gateway.rules.event_view import MAX_COST, EventView
from gateway.rules.expressions import Expression
from gateway.rules.rules import Route, Rules
from gateway.rules.splits import Split
from tests.builders import a_policy, a_route, an_event
from tests.engine.test_jobs import a_command, ended
from tests.engine.test_ordered import an_ordered_route
from tests.engine.test_undelivered import a_scene
from tests.engine.test_worker import (
    TOPICS,
    Answer,
    Busy,
    ScriptedClient,
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

ROWS = Split(Expression("body.rows"))


def a_split(to: tuple[str, ...] = ("ci",), **policy: object) -> Route:
    return replace(a_route(to=to, retry=a_policy(**policy)), split=ROWS)


async def put(world: World, count: int, rows: int = 3) -> None:
    events = [
        an_event(id=f"evt_{number}", body={"rows": list(range(rows))}, received_at=now()) for number in range(count)
    ]
    await world.put(*events)


@virtual
async def test_each_item_is_delivered_once_and_the_event_is_done() -> None:
    world = await a_world(a_split(("ci", "audit")), a_route("plain", to=("audit",)))
    await put(world, 10)
    async with running(world):
        await asyncio.sleep(3)
    count = Counter((name, event) for name, event, _ in world.client.made)
    assert count == Counter({("ci", f"evt_{n}"): 3 for n in range(10)} | {("audit", f"evt_{n}"): 4 for n in range(10)})
    assert await world.unfinished() == 0


@virtual
async def test_an_item_that_fails_is_retried_alone() -> None:
    world = await a_world(a_split(schedule=(30.0,)), ci=[200, 503, 200])
    await put(world, 1)
    async with running(world):
        await asyncio.sleep(3)
        assert await world.unfinished() == 0
        (waiting,) = world.stored(TOPICS.retry("20s"))
        assert waiting.delivery.part is not None
        assert waiting.delivery.part.number == 1
        await asyncio.sleep(60)
    assert Counter(number for _, _, number in world.client.made) == {1: 3, 2: 1}


@virtual
async def test_a_kick_of_deliveries_that_are_split_says_what_came_of_their_items() -> None:
    """The whole ones end without a successor of their own: that isn't how a delivery ends that has a 2xx."""
    route = replace(a_split(schedule=(3000.0,), max_age=86400.0), delay=300.0)
    world = await a_world(route, ci=[503, 503, 200, 503, *[200] * 20])
    await put(world, 4, rows=2)
    async with operated(world) as control, running(world, world.worker(control)):
        await asyncio.sleep(3)
        command = ControlRecord(kind="kick", name="route/build", state="requested", at=now())
        await publish(world, command)
        done = await ended(control, command)
        assert (done.count, done.tried, done.delivered, done.failed_by_result) == (4, 4, 2, {"503": 2})
        assert len(world.client.made) == 8, "each item was tried"
        again = replace(command, name="destination/ci", at=now())
        await publish(world, again)
        done = await ended(control, again)
        assert (done.count, done.tried, done.delivered, done.repeated_failures) == (3, 3, 3, {}), (
            "the items that failed"
        )


@virtual
async def test_an_event_without_items_is_done_without_a_delivery() -> None:
    world = await a_world(a_split())
    await put(world, 3, rows=0)
    async with running(world):
        await asyncio.sleep(3)
    assert world.client.made == []
    assert await world.unfinished() == 0


def costly_splits(count: int) -> list[Route]:
    """Of which an event's budget suffices for some alone."""
    lists = [Split(Expression(f"body.rows.filter(i, i != {number})")) for number in range(count)]
    return [replace(a_route(f"r{number}", to=("ci", "audit")), split=split) for number, split in enumerate(lists)]


COSTLY = an_event(id="evt_0", body={"rows": [[{"id": n, "row": row} for n in range(50)] for row in range(60)]})


@virtual
async def test_lists_that_are_too_much_for_one_turn_are_split_one_after_the_other() -> None:
    """None of them is a dead letter because of others, and nobody else waits for all of them."""
    world = await a_world(*costly_splits(30))
    world.client = client = Bodies({})
    await world.put(COSTLY)
    with units_by_turn() as turns:
        world.log._now = lambda: now() + sum(turns) / UNITS_PER_SECOND  # as if that was computed
        async with running(world):
            await asyncio.sleep(20)
    assert world.dead() == []
    assert Counter(name for name, _, _ in client.made) == {"ci": 30 * 60, "audit": 30 * 60}
    assert set(Counter(client.bodies).values()) == {30 * 2}
    assert await world.unfinished() == 0
    of_one = sum(turns) // 30
    assert turns[0] <= MAX_COST < 2 * of_one, "when it is planned"
    assert sum(turns) < 31 * turns[0], "each list is computed once, for both destinations"
    assert max(turns[1:]) < 1.5 * of_one


@virtual
async def test_of_a_destinations_rate_what_waits_to_be_split_takes_nothing() -> None:
    lists = [Split(Expression(f"[body.rows.filter(i, i != {number}).size()]")) for number in range(30)]
    world = await a_world(*[replace(a_route(f"r{n}", to=("ci",)), split=split) for n, split in enumerate(lists)])
    await world.put(COSTLY)
    with taken_by_lanes() as taken:
        async with running(world):
            await asyncio.sleep(20)
    assert len(world.client.made) == 30
    assert sum(taken) == 30


@contextmanager
def taken_by_lanes() -> Iterator[list[bool]]:
    """Note whether a lane had something to start, each time that it was asked."""
    taken: list[bool] = []
    take = Lane.take

    def noted(lane: Lane, now: float, ticks: float) -> PendingDelivery | None:
        pending = take(lane, now, ticks)
        taken.append(pending is not None)
        return pending

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Lane, "take", noted)
        yield taken


UNITS_PER_SECOND = 10_000_000


@contextmanager
def units_by_turn() -> Iterator[list[int]]:
    """Note the cost units that are spent in each turn of the event loop."""
    turns: list[int] = []
    is_noted = False
    spend = EventView.spend

    def end() -> None:
        nonlocal is_noted
        is_noted = False

    def counted(view: EventView, cost_units: int) -> bool:
        nonlocal is_noted
        if not is_noted:
            is_noted = True
            turns.append(0)
            asyncio.get_running_loop().call_soon(end)
        is_spent = spend(view, cost_units)
        turns[-1] += cost_units if is_spent else 0
        return is_spent

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EventView, "spend", counted)
        yield turns


@virtual
async def test_a_dead_letter_of_an_item_is_replayed_alone() -> None:
    async with (
        a_scene(a_split(max_attempts=1), ci=[200, 503, 200]) as scene,
        running(scene.world, scene.world.worker(scene.owner.control)),
    ):
        await put(scene.world, 1)
        await asyncio.sleep(3)
        (letter,) = scene.world.dead()
        assert letter.delivery.part is not None
        assert letter.delivery.part.number == 1
        command = await a_command(scene.world, "dead", action="replay", filter=DeadFilter())
        assert (await ended(scene.owner.control, command)).count == 1
        await asyncio.sleep(10)
        assert len(scene.world.client.made) == 4


@virtual
async def test_a_replay_of_an_event_delivers_all_of_its_items() -> None:
    async with (
        a_scene(a_route("other", to=("audit",))) as scene,
        running(scene.world, scene.world.worker(scene.owner.control)) as worker,
    ):
        await put(scene.world, 2)
        await asyncio.sleep(3)
        scene.reload(worker, a_route("other", to=("audit",)), a_split())
        await asyncio.sleep(3)
        assert await scene.counts() == {Fate.UNDELIVERED: 2}
        await scene.replay()
        assert Counter(event for name, event, _ in scene.world.client.made if name == "ci") == {"evt_0": 3, "evt_1": 3}
        assert await scene.counts() == {Fate.ENDED: 2}


@virtual
async def test_a_replay_of_the_undelivered_leaves_the_items_letters_to_their_own() -> None:
    async with (
        a_scene(a_split(max_attempts=1), ci=[200, 503, 200]) as scene,
        running(scene.world, scene.world.worker(scene.owner.control)),
    ):
        await put(scene.world, 1)
        await asyncio.sleep(3)
        assert len(scene.world.dead()) == 1
        assert await scene.counts() == {Fate.ENDED: 1}, "or all of its items would be delivered again"


@virtual
async def test_what_waits_when_its_route_begins_to_split_becomes_its_items() -> None:
    """One that waits in memory, beside a delivery of the same event that is done; and one in a tier."""
    policy = a_policy(schedule=(2.0, 30.0), max_age=600.0)
    plain = a_route(retry=policy)
    world = await a_world(plain, a_route("plain", to=("audit",)), ci=[503, 200], audit=[8.0])
    async with running(world) as worker:
        await put(world, 1)
        await asyncio.sleep(1)
        world.rules = with_route(world, replace(plain, split=ROWS))
        worker.reload()
        await asyncio.sleep(5)
        assert len(world.client.made) == 5
        assert await world.unfinished() == 1, "the other delivery of its event is still being made"
        await asyncio.sleep(10)
        assert Counter((name, number) for name, _, number in world.client.made) == {
            ("ci", 1): 4,
            ("audit", 1): 1,
        }
        assert await world.unfinished() == 0


@virtual
async def test_an_item_waits_an_hour_for_rules_that_have_it() -> None:
    """Others may still be being rolled out; without any, it is a dead letter, and never the whole event."""
    split = a_split(schedule=(30.0,), max_age=86400.0, max_attempts=9)
    for is_back in (True, False):
        world = await a_world(split, ci=[503, 200])
        async with running(world) as worker:
            await put(world, 1)
            await asyncio.sleep(3)
            world.rules = with_route(world, replace(split, split=None))
            worker.reload()
            await world.doze(600)
            assert len(world.client.made) == 3, "not the whole event instead of the item"
            assert world.dead() == []
            if is_back:
                world.rules = with_route(world, split)
                worker.reload()
            await world.doze(3600)
        assert len(world.client.made) == (4 if is_back else 3)
        assert [stored.metadata.dead_reason for stored in world.dead()] == (
            [] if is_back else [DeadReason.ROUTE_REMOVED]
        )


@pytest.mark.parametrize("delay", [0.0, 60.0], ids=["items", "whole"])
def test_an_item_whose_route_was_back_meanwhile_waits_for_it_anew(delay: float) -> None:
    """For two hours nothing is attempted, since the destination has asked for silence."""

    async def scenario() -> None:
        patient = a_policy(schedule=(30.0,), max_attempts=9, max_age=86400.0)
        split, other = replace(a_split(), retry=patient, delay=delay), a_route("other", to=("ci",), retry=patient)
        world = await a_world(split, ci=[Busy(7200.0), 200] if delay else [503, Busy(7200.0), 200])
        async with running(world) as worker:
            await put(world, 1, rows=1)
            await asyncio.sleep(5)
            await reload(world, worker, rules_of(other))
            await asyncio.sleep(60)
            assert world.metrics.spills.labels("ci", SpillReason.UNKNOWN_NAME).value == 1
            await world.put(an_event(id="of_other", received_at=now()))
            await asyncio.sleep(45)
            assert world.client.made[-1][1] == "of_other"
            await reload(world, worker, rules_of(split, other))
            await world.doze(7100)
            await reload(world, worker, rules_of(other))
            await asyncio.sleep(90)
            assert world.metrics.spills.labels("ci", SpillReason.UNKNOWN_NAME).value >= 2
            await reload(world, worker, rules_of(split, other))
            await asyncio.sleep(120)
        assert world.dead() == []
        assert [event for _, event, _ in world.client.made].count("evt_0") == (1 if delay else 2)

    run(scenario())


@virtual
async def test_a_dead_letter_says_that_the_item_was_missing() -> None:
    world = await a_world(a_split(schedule=(30.0,), max_age=86400.0, max_attempts=9), ci=[503, 200])
    async with running(world) as worker:
        await put(world, 1, rows=1)
        await asyncio.sleep(3)
        world.rules = with_route(world, replace(a_split(), split=Split(Expression("body.rows.filter(row, row > 0)"))))
        worker.reload()
        await world.doze(3800)
    (dead,) = world.dead()
    assert dead.metadata.dead_reason == DeadReason.ROUTE_REMOVED
    assert dead.metadata.detail == "split: expected a list with the item of this delivery, got one without it"


@virtual
async def test_the_backlog_of_an_ordered_route_becomes_items_once_that_splits() -> None:
    ordered = an_ordered_route(retry=a_policy(schedule=(5.0,), max_attempts=9, max_age=86400.0))
    world = await a_world(ordered, ci=[503, 200])
    events = [an_event(id=f"k.{n}", key="k", body={"rows": [n, n + 10]}, received_at=now()) for n in range(5)]
    await world.put(*events)
    async with running(world) as worker:
        await asyncio.sleep(2)
        assert len(world.client.made) == 1
        world.rules = with_route(world, replace(a_split(schedule=(5.0,), max_attempts=9), name=ordered.name))
        worker.reload()
        await asyncio.sleep(60)
    assert world.dead() == []
    assert Counter(event for _, event, number in world.client.made if number == 1) - Counter(["k.0"]) == Counter(
        {f"k.{n}": 2 for n in range(5)}
    )
    assert await world.unfinished() == 0


@virtual
async def test_an_item_stays_the_one_it_was_when_the_list_becomes_another() -> None:
    split = a_split(schedule=(30.0,), max_age=86400.0, max_attempts=9)
    client = Bodies({"ci": [200, 503, 200]})
    world = await a_world(split)
    world.client = client
    async with running(world) as worker:
        await put(world, 1, rows=4)
        await asyncio.sleep(3)
        others = Split(Expression("body.rows.filter(row, row != 0 && row != 3)"))
        world.rules = with_route(world, replace(split, split=others))
        worker.reload()
        await asyncio.sleep(60)
    assert client.bodies == [b"0", b"1", b"2", b"3", b"1"]
    assert world.dead() == []


@virtual
async def test_a_delayed_event_is_split_when_its_delay_is_over() -> None:
    world = await a_world(replace(a_split(), delay=60.0))
    await put(world, 2)
    async with running(world):
        await asyncio.sleep(10)
        assert sum(len(world.stored(TOPICS.retry(tier))) for tier in TIERS) == 2, "not one for each item"
        assert world.client.made == []
        await world.doze(60)
    assert len(world.client.made) == 6


class Bodies(ScriptedClient):
    """Notes what is sent."""

    def __init__(self, scripts: Mapping[str, Sequence[Answer]]) -> None:
        super().__init__(scripts)
        self.bodies: list[bytes] = []

    @override
    async def attempt(self, outbound: Outbound, *, timeout: float, number: int) -> Attempt:
        self.bodies.append(outbound.body)
        return await super().attempt(outbound, timeout=timeout, number=number)


def with_route(world: World, route: Route) -> Rules:
    return rules_of(*[route if each.name == route.name else each for each in world.rules.routes.values()])
