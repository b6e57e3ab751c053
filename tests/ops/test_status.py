"""What keeps deliveries back, counted against what is in the log."""

import asyncio

from gateway.engine.control import Control, Order
from gateway.ops.orders import Orders
from gateway.ops.status import (
    HELD,
    PAUSED,
    WAITING,
    Backlog,
    backlogs_of,
    findings_in,
    findings_of,
    paused_in,
    ranked,
    waiting,
)
from tests.builders import a_route
from tests.engine.test_jobs import NAME, a_backlog, answers
from tests.engine.test_worker import TOPICS, World, a_world, events, operated, running, virtual


async def _counts(world: World) -> dict[tuple[str, str], int]:
    control = await Orders(world.log, TOPICS).control()
    waits = [filed async for filed in waiting(world.log, TOPICS, control)]
    return {(each.route, each.destination): each.count for each in backlogs_of(waits)}


@virtual
async def test_what_a_kick_has_copied_counts_once_and_what_it_has_delivered_not_at_all() -> None:
    world = await a_world(a_route())
    await a_backlog(world, "kick", 7)
    assert await _counts(world) == {("build", "ci"): 7}
    orders = Orders(world.log, TOPICS)
    async with operated(world):
        await answers(world, [await orders.kick(NAME)])
        assert await _counts(world) == {("build", "ci"): 7}, "nobody reads it yet"
    async with operated(world) as control, running(world, world.worker(control)):
        await asyncio.sleep(20)
    assert len(world.client.made) == 7
    assert await _counts(world) == {}


@virtual
async def test_what_was_parked_waits_until_it_is_resumed() -> None:
    world = await a_world(a_route())
    orders = Orders(world.log, TOPICS)
    async with operated(world) as control, running(world, world.worker(control)):
        await orders.pause("route/build")
        await asyncio.sleep(2)
        await world.put(*events(5))
        await asyncio.sleep(5)
        assert await _counts(world) == {("build", "ci"): 5}
        assert await orders.resume("route/build") is not None
        await asyncio.sleep(20)
        assert await _counts(world) == {}
    assert len(world.client.made) == 5


def test_a_pause_says_since_when_by_whom_and_how_it_ends() -> None:
    control = Control([Order(kind="pause", name="route/build", state="paused", at=5.0, by="ada@bastion")])
    (found,) = paused_in(control)
    assert (found.rank, found.what, found.since, found.who) == (PAUSED, "route build", 5.0, "ada@bastion")
    assert found.next == "gateway route resume build"
    control.apply(Order(kind="pause", name="route/build", state="active", at=6.0))
    assert paused_in(control) == []


def test_what_waits_for_a_moment_is_nothing_wrong_and_what_is_held_is() -> None:
    fresh = Backlog(route="build", destination="ci", count=1, oldest=990.0, due=1005.0)
    fresh.reasons["500"] = 1
    held = Backlog(route="build", destination="erp", count=2, oldest=990.0, due=8000.0)
    held.reasons["Retry-After"] = 2
    late = Backlog(route="mirror", destination="ci", count=3, oldest=900.0, due=1005.0)
    late.reasons["500"] = 3
    found = ranked(findings_of([fresh, late, held], 1000.0))
    assert [(each.what, each.rank, each.is_wrong) for each in found] == [
        ("build → erp", HELD, True),
        ("mirror → ci", WAITING, True),
        ("build → ci", WAITING, False),
    ]
    assert (found[0].why, found[0].until, found[0].count) == ("2 Retry-After", 8000.0, 2)


def test_an_answer_of_a_process_becomes_findings_the_worst_first() -> None:
    answer = {
        "rules": {"refused": True, "loaded_at": 1.0},
        "unread": [{"topic": "gateway.events.a", "partition": 3, "since": 2.0, "reason": "no leader"}],
        "holds": [{"destination": "ci", "why": "breaker_open", "since": 3.0, "until": 9.0}],
        "ordered": [{"route": "mirror", "destination": "ci", "halted": 2.0, "blocked": 0.0}],
        "sources": [
            {"source": "shop", "events": 10.0, "duplicates": 2.0, "unrouted": 1.0, "refused": {"bad_signature": 5.0}},
            {"source": "quiet", "events": 0.0, "duplicates": 0.0, "unrouted": 0.0},
        ],
    }
    found = ranked(findings_in(answer, "http://a:9090"))
    assert [each.what for each in found] == [
        "gateway.events.a/3",
        "rules",
        "destination ci",
        "mirror → ci",
        "source shop",
        "source shop",
    ]
    assert [each.why for each in found[-2:]] == [
        "copies that dedupe let go, of 10 since the process began",
        "refused: bad_signature, of 15 since the process began",
    ]
    assert all(each.who == "http://a:9090" for each in found)
