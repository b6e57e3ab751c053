"""What is told of ordered routes, compared with a ledger: what was put, what arrived, and what failed last."""

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest

from gateway.engine.control.records import ControlRecord
from gateway.engine.control.state import Control
from gateway.engine.delivery.dispatcher import UNKNOWN_MAX_AGE
from gateway.engine.worker import Worker
from gateway.ops.control_client import ControlClient
from gateway.ops.findings import Finding
from gateway.ops.ordered_backlog import ordered_backlog_of, ordered_outcome_of
from gateway.ops.own_status import route_status
from gateway.ops.process_status import process_findings
from gateway.ops.status import waiting_findings
from gateway.ops.unfinished import unfinished_findings
from gateway.ops.waiting_deliveries import Backlogs
from gateway.ops.waiting_records import waiting_deliveries
from gateway.rules.rules import Rules
from tests.builders import a_policy, a_route
from tests.engine.test_ordered import an_ordered_route, keyed
from tests.engine.test_worker import TOPICS, World, a_world, operated, publish, reload, rules_of, running, virtual
from tests.virtual_time import now, run

SLOW_RETRY = a_policy(schedule=(600.0,), max_attempts=20, max_age=7200.0)
OTHER = a_route("other", to=("audit",))
WHAT = "build → ci"


def status_of(worker: Worker) -> Mapping[str, Any]:
    """Return the part of a process's /status that is about ordered routes."""
    ordered = [
        {"route": route, "destination": destination, **route_status(state)}
        for (route, destination), state in sorted(worker.ordered_states.items())
    ]
    return {"ordered": ordered}


async def told(
    world: World, *workers: Worker, rules: Rules | None = None, control: Control | None = None
) -> list[Finding]:
    """Return what `gateway status` tells of the ordered route, asking these processes."""
    statuses = [(status_of(worker), f"127.0.0.1:{9090 + number}") for number, worker in enumerate(workers)]
    found = await unfinished_findings(world.log, TOPICS, {}, statuses=statuses, rules=rules)
    for status, address in statuses:
        found += process_findings(status, address, control or Control())
    return [each for each in found if each.what == WHAT]


def counts(found: list[Finding]) -> dict[str, int | None]:
    assert len({each.why for each in found}) == len(found)
    return {each.why: each.count for each in found}


@virtual
async def test_what_waits_for_its_turn_is_all_but_the_blocked_in_status_and_for_a_kick() -> None:
    world = await a_world(an_ordered_route(retry=SLOW_RETRY), ci=[200, 200, 503])
    await world.put(*keyed(3, 5))
    async with operated(world) as control, running(world, world.worker(control)) as worker:
        await asyncio.sleep(45)
        ledger = 3 * 5 - 2  # as many were taken
        blocked = len({event.split(".")[0] for _, event, _ in world.client.made[2:]})
        assert counts(await told(world, worker)) == {
            "keys blocked after 503": blocked,
            "waiting for their turn": ledger - blocked,
        }
        client = ControlClient(world.log, TOPICS)
        before = await ordered_backlog_of(world.log, TOPICS, "route/build")
        placed = await client.kick("route/build")
        assert await client.finished(placed, timeout=20) is not None
        outcome = await ordered_outcome_of(world.log, TOPICS, before, client, placed)
        assert outcome.kick is not None
        assert outcome.kick.tried == blocked
        assert outcome.kick.untried_by_reason == {"behind": ledger - blocked}
        world.client.scripts["ci"] = [200]
        await client.kick("route/build")
        await asyncio.sleep(20)
        assert await told(world, worker) == []


@virtual
async def test_without_all_its_processes_it_is_not_said_how_many_wait_for_their_turn() -> None:
    world = await a_world(an_ordered_route(retry=SLOW_RETRY), ci=[503])
    await world.put(*keyed(12, 2))
    async with running(world) as one, running(world) as two:
        await asyncio.sleep(45)
        assert counts(await told(world)) == {"waiting for their turn, or blocked": 24}
        (here, *_), (there, *_) = [(await told(world, worker))[1:] for worker in (one, two)]
        assert here.count
        assert there.count
        assert here.count + there.count == 12
        for worker, blocked in ((one, here), (two, there)):
            assert counts(await told(world, worker)) == {
                "waiting for their turn, or blocked": 24,
                "keys blocked after 503": blocked.count,
            }
        found = await told(world, one, two)
        assert (found[0].why, found[0].count) == ("waiting for their turn", 12)


@virtual
async def test_a_paused_blocked_key_has_no_next_attempt() -> None:
    world = await a_world(an_ordered_route(retry=SLOW_RETRY), ci=[503])
    await world.put(*keyed(1, 1))
    async with operated(world) as control, running(world, world.worker(control)) as worker:
        await asyncio.sleep(5)
        (blocked,) = await told(world, worker, control=control)
        assert blocked.until is not None
        await publish(world, ControlRecord(kind="pause", name="destination/ci", state="paused", at=now()))
        await asyncio.sleep(1)
        (blocked,) = await told(world, worker, control=control)
        assert (blocked.until, blocked.next[-1]) == (None, "gateway destination resume ci")


@pytest.mark.parametrize("missing", ["route build", "destination ci"])
def test_deliveries_of_a_name_that_the_rules_lack_say_so_since_when_and_until_when(missing: str) -> None:
    async def scenario() -> None:
        world = await a_world(an_ordered_route(retry=SLOW_RETRY), OTHER, ci=[200, 503])
        await world.put(*keyed(3, 2))
        async with running(world) as worker:
            await asyncio.sleep(5)
            renamed = a_route("renamed") if missing == "route build" else an_ordered_route(to=("elsewhere",))
            await reload(world, worker, rules_of(renamed, OTHER))
            since = now()
            await asyncio.sleep(100)
            (found,) = await told(world, worker, rules=world.rules)
            assert (found.count, found.needs_attention, found.by) == (5, True, "127.0.0.1:9090")
            assert found.why == "not in the rules; if it still isn't by then, they become dead letters (route_removed)"
            assert found.since == pytest.approx(since)
            assert found.until == pytest.approx(since + UNKNOWN_MAX_AGE)
            assert found.next == (
                f"# put {missing} back into the rules, and they are delivered",
                "# what has become a dead letter:",
                "gateway dead list --route build --destination ci --reason route_removed",
            )
            (found,) = await told(world, worker, rules=rules_of(an_ordered_route()))
            assert found.next[0] == "# do all processes have these rules? (rules_reloaded, rules_refused)"
            (found,) = await told(world, rules=world.rules)
            assert (found.count, found.until) == (5, None)
            assert found.why == (
                "not in the local rules: if processes lack it, too, they become dead letters (route_removed) after an "
                "hour"
            )
            await world.doze(UNKNOWN_MAX_AGE - 110)
            assert world.dead() == []
            await world.doze(150)
            assert {stored.metadata.dead_reason for stored in world.dead()} == {"route_removed"}
            await world.doze(100)
            assert len(world.dead()) == 5, "as many as were told"
            assert await told(world, worker, rules=world.rules) == []

    run(scenario())


@virtual
async def test_a_name_that_is_back_is_told_as_before() -> None:
    world = await a_world(an_ordered_route(retry=SLOW_RETRY), OTHER, ci=[503])
    await world.put(*keyed(1, 2))
    async with running(world) as worker:
        tried_at = now()
        await asyncio.sleep(5)
        await reload(world, worker, rules_of(OTHER))
        await asyncio.sleep(40)
        await reload(world, worker, rules_of(an_ordered_route(retry=SLOW_RETRY), OTHER))
        await asyncio.sleep(2)
        waiting, blocked = await told(world, worker)
        assert (waiting.why, waiting.count) == ("waiting for their turn", 1)
        assert (blocked.why, blocked.count) == ("key blocked after 503", 1)
        assert blocked.until == pytest.approx(tried_at + 600, abs=1)


@virtual
async def test_a_plain_route_says_the_same_of_a_name_that_the_rules_lack() -> None:
    world = await a_world(a_route(retry=a_policy(schedule=(10.0,), max_attempts=20, max_age=7200.0)), OTHER, ci=[503])
    await world.put(*keyed(3, 2))
    async with running(world) as worker:
        await asyncio.sleep(5)
        await reload(world, worker, rules_of(OTHER))
        await asyncio.sleep(60)
        backlogs = Backlogs()
        async for stored in waiting_deliveries(world.log, TOPICS, Control(), {}):
            backlogs.add(stored)
        (found,) = waiting_findings(backlogs, now(), world.rules)
        assert (found.what, found.count) == (WHAT, 6)
        assert found.why == (
            "6 wait (not in the rules); if it still isn't by then, they become dead letters (route_removed)"
        )
        assert found.next[0] == "# put route build and destination ci back into the rules, and they are delivered"
        assert found.until is not None
        assert not found.is_due
        await world.doze(found.until - now() - 10)
        assert world.dead() == []
        await world.doze(100)
    assert len(world.dead()) == 6
