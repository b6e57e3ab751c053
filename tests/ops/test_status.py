"""What keeps deliveries from going out, compared with the log's content."""

import asyncio
import json
from collections.abc import Iterable
from dataclasses import replace
from random import Random
from typing import Any

import pytest

from gateway.engine.control.records import ControlRecord, DeadFilter, DeadLetterProperties, Selection
from gateway.engine.control.state import Control
from gateway.engine.ordered.blocked_keys import Blocked
from gateway.log.base import ALL, NO_TOPIC, Partition
from gateway.log.records import StoredDelivery, encode_delivery
from gateway.model import (
    NO_METADATA,
    DeadLettered,
    DeadReason,
    RecordMetadata,
    Result,
    SpillReason,
)
from gateway.ops.control_client import ControlClient
from gateway.ops.dead_letters import read_dead_letters
from gateway.ops.findings import HELD, NOT_READ, PAUSED, REFUSED, WAITING, Finding, ranked
from gateway.ops.kick_report import parked_besides
from gateway.ops.output import Output, rfc3339, when
from gateway.ops.own_status import keys_status
from gateway.ops.presentation import print_status
from gateway.ops.process_status import CONFLICTS, each_process, not_asked_finding, process_findings
from gateway.ops.refusal_advice import refusal_of
from gateway.ops.status import (
    add_dead_letters,
    add_recorded_attempts,
    dead_letter_findings,
    paused_findings,
    unpaused_findings,
    unread_findings,
    waiting_findings,
)
from gateway.ops.unfinished import unfinished_findings
from gateway.ops.waiting_deliveries import MAX_ATTEMPTS_SHOWN, MAX_REASONS, Backlog, Backlogs, LastAttempts
from gateway.ops.waiting_records import parked_counts, waiting_deliveries
from gateway.telemetry.metrics import REJECTIONS
from gateway.text import parse_duration
from gateway.verify.client_certificates import CertificateProblem
from gateway.verify.request import Reason
from tests.builders import NOW, a_delivery, a_destination, a_policy, a_route, an_attempt, an_event
from tests.engine.test_attempt_log import a_recording_world
from tests.engine.test_jobs import NAME, a_backlog, answers
from tests.engine.test_worker import EVENTS, TOPICS, World, a_world, events, operated, rules_of, running, virtual
from tests.memory_log import MemoryLog
from tests.virtual_time import now, run


async def _counts(world: World) -> dict[tuple[str, str], int]:
    control = await ControlClient(world.log, TOPICS).control()
    backlogs = Backlogs()
    async for stored in waiting_deliveries(world.log, TOPICS, control, {}):
        backlogs.add(stored)
    return {(each.route, each.destination): each.count for each in backlogs}


@virtual
async def test_kicked_deliveries_count_once_and_delivered_ones_not_at_all() -> None:
    world = await a_world(a_route())
    await a_backlog(world, "kick", 7)
    assert await _counts(world) == {("build", "ci"): 7}
    commands = ControlClient(world.log, TOPICS)
    async with operated(world):
        await answers(world, [await commands.kick(NAME)])
        assert await _counts(world) == {("build", "ci"): 7}, "nobody reads it yet"
    async with operated(world) as control, running(world, world.worker(control)):
        await asyncio.sleep(20)
    assert len(world.client.made) == 7
    assert await _counts(world) == {}


@virtual
async def test_an_unreadable_partition_is_reported_and_the_rest_counted() -> None:
    world = await a_world(a_route())
    await a_backlog(world, "kick", 7)
    lost = [Partition(topic, 0) for topic in (TOPICS.retry("5s"), TOPICS.parked, TOPICS.dead, EVENTS)]
    for partition in lost:
        world.log.lose_leader(partition)
    control = await ControlClient(world.log, TOPICS).control()
    unread: dict[Partition, str] = {}
    backlogs = Backlogs()
    async for stored in waiting_deliveries(world.log, TOPICS, control, unread):
        backlogs.add(stored)
    await unfinished_findings(world.log, TOPICS, unread)
    await dead_letter_findings(world.log, TOPICS, control, (), unread)
    await add_dead_letters(world.log, TOPICS, control, LastAttempts("ci"), unread)
    assert [each.count for each in backlogs] == [7]
    assert unread == dict.fromkeys(lost, "no leader")
    told = unread_findings(unread)
    assert [(each.what, each.rank, each.needs_attention) for each in told] == [
        (f"{partition.topic}/0", NOT_READ, True) for partition in sorted(lost)
    ]


@virtual
async def test_the_last_attempts_are_also_those_of_what_has_been_delivered() -> None:
    """Each once, though a delivery that waits and a dead letter have theirs, too."""
    slow = a_policy(schedule=(1.0, 3600.0), max_attempts=3, max_age=7200.0)
    once = a_route("once", to=("erp",), retry=a_policy(max_attempts=1))
    world = await a_recording_world(a_route(retry=slow), once, ci=[503, 200, 503, 502], erp=[500])
    async with running(world):
        for event in events(2):
            await world.put(event)
            await asyncio.sleep(30)
    found = {}
    for destination in ("ci", "erp", "nowhere"):
        attempts = LastAttempts(destination)
        await add_dead_letters(world.log, TOPICS, Control(), attempts, {})
        async for stored in waiting_deliveries(world.log, TOPICS, Control(), {}):
            attempts.add(stored)
        assert not await add_recorded_attempts(world.log, TOPICS, attempts, lambda source: source == "github")
        last = [each.attempt for each in attempts.newest_first()]
        found[destination] = [(each.number, each.status) for each in last]
    assert found == {"ci": [(2, 502), (1, 503), (1, 503)], "erp": [(1, 500), (1, 500)], "nowhere": []}


@virtual
async def test_recorded_attempts_that_were_not_looked_at_are_told() -> None:
    world = await a_recording_world(a_route(to=("ci", "erp"), retry=a_policy(max_attempts=1)), ci=[503], erp=[503])
    await world.put(*events(30))
    async with running(world):
        await asyncio.sleep(30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("gateway.ops.status.MAX_RECORDS", 10)
        attempts = LastAttempts("ci")
        note = await add_recorded_attempts(world.log, TOPICS, attempts, lambda _: False)
        assert len(attempts.newest_first()) <= 10
    assert note == "of recorded attempts, the newest 10 of all destinations were looked through"
    world.log.lose_leader(Partition(TOPICS.attempts, 0))
    note = await add_recorded_attempts(world.log, TOPICS, LastAttempts("ci"), lambda _: False)
    assert note == "some recorded attempts can't be read: no leader"


@virtual
async def test_parked_deliveries_wait_for_a_resume() -> None:
    world = await a_world(a_route())
    commands = ControlClient(world.log, TOPICS)
    async with operated(world) as control, running(world, world.worker(control)):
        await commands.pause("route/build")
        await asyncio.sleep(2)
        await world.put(*events(5))
        await asyncio.sleep(5)
        assert await _counts(world) == {("build", "ci"): 5}
        assert await commands.resume("route/build") is not None
        await asyncio.sleep(20)
        assert await _counts(world) == {}
    assert len(world.client.made) == 5


@pytest.mark.parametrize("after", [0.0, 0.2, 3.8, 4.0, 5.0])
@pytest.mark.parametrize("waits_for_resume", [True, False])
def test_a_kick_beside_a_pause_and_a_resume_counts_each_delivery_once(after: float, *, waits_for_resume: bool) -> None:
    async def scenario() -> None:
        world = await a_world(a_route())
        commands = ControlClient(world.log, TOPICS)
        async with operated(world) as control, running(world, world.worker(control)):
            await commands.pause(NAME)
            await asyncio.sleep(1)
            await world.put(*events(30))
            await asyncio.sleep(5)
            resumed = await commands.resume(NAME)
            assert resumed is not None
            if waits_for_resume:
                await commands.finished(resumed, timeout=10)
            await asyncio.sleep(after)
            await commands.pause(NAME)
            kicked = await commands.finished(await commands.kick(NAME), timeout=30)
            assert kicked is not None
            counts = await parked_counts(world.log, TOPICS, await commands.control(), NAME, {})
            parked = sum(parked_besides(kicked, counts).values())
            assert (kicked.tried or 0) + sum(kicked.untried_by_reason.values()) + parked == 30
            assert kicked.tried == len(world.client.made)

    run(scenario())


def test_a_pause_says_since_when_by_whom_and_how_it_ends() -> None:
    control = Control([ControlRecord(kind="pause", name="route/build", state="paused", at=5.0, by="ada@bastion")])
    (found,) = paused_findings(control)
    assert (found.rank, found.what, found.since, found.by) == (PAUSED, "route build", 5.0, "ada@bastion")
    assert found.next == ("gateway route resume build",)
    assert paused_findings(control, rules_of(a_route()))[0].next == found.next
    control.apply(ControlRecord(kind="pause", name="route/build", state="active", at=6.0))
    assert paused_findings(control) == []


@pytest.mark.parametrize(("kind", "name"), [("route", "gone"), ("destination", "hang")])
def test_a_pause_of_a_removed_route_ends_by_the_reported_step(kind: str, name: str) -> None:
    control = Control([ControlRecord(kind="pause", name=f"{kind}/{name}", state="paused", at=5.0)])
    (found,) = paused_findings(control, rules_of(a_route()))
    told, command = found.next
    assert told.startswith(f"# the local rules have no {kind} {name}: ")
    assert command == f"gateway {kind} resume {name} --force"


def test_what_is_due_at_once_is_due_since_it_was_stored() -> None:
    """As what an ordered route leaves to others once it splits."""
    backlog = Backlog(route="build", destination="ci")
    backlog.add(StoredDelivery(delivery=a_delivery(due=1005.0), metadata=NO_METADATA, at=1000.0))
    backlog.add(StoredDelivery(delivery=a_delivery(due=0.0), metadata=NO_METADATA, at=990.0))
    assert backlog.due == 990.0


def test_a_short_wait_is_fine_and_a_hold_is_wrong() -> None:
    fresh = Backlog(route="build", destination="ci", count=1, oldest=990.0, due=1005.0)
    fresh.reasons["got 500"] = 1
    held = Backlog(route="build", destination="erp", count=2, oldest=990.0, due=8000.0)
    held.reasons["Retry-After"] = 2
    late = Backlog(route="mirror", destination="ci", count=3, oldest=900.0, due=1005.0)
    late.reasons["got 500"] = 3
    found = ranked(waiting_findings([fresh, late, held], 1000.0))
    assert [(each.what, each.rank, each.needs_attention) for each in found] == [
        ("build → erp", HELD, True),
        ("mirror → ci", WAITING, True),
        ("build → ci", WAITING, False),
    ]
    assert (found[0].why, found[0].until, found[0].count) == ("2 wait (Retry-After)", 8000.0, 2)
    assert [each.next for each in found] == [
        ("gateway destination kick erp",),
        ("gateway destination kick ci",),
        (),
    ], "what is nothing wrong needs nothing"


@pytest.mark.parametrize(
    ("status", "result", "after", "owners"),
    [
        (None, Result.TIMEOUT, "timeout", "# ci doesn't respond: ask its owners first"),
        (None, Result.DNS, "dns", "# ci can't be reached (dns): ask its owners first"),
        (503, Result.SERVER_ERROR, "503", "# ci responds with 503: ask its owners first"),
    ],
)
def test_an_open_breakers_backlog_says_why_it_opened(
    status: int | None, result: Result, after: str, owners: str
) -> None:
    backlogs = Backlogs()
    tries = (an_attempt(1, at=5.0, status=500), an_attempt(2, at=9.0, status=status, result=result))
    for number, attempts in enumerate(((), tries, tries[:1])):
        delivery = a_delivery(id=f"dlv_{number}", attempts=attempts)
        backlogs.add(
            StoredDelivery(delivery=delivery, metadata=RecordMetadata(spill_reason=SpillReason.BREAKER_OPEN), at=NOW)
        )
    (found,) = waiting_findings(backlogs, NOW)
    assert found.why == f"3 wait (breaker open after {after})"
    assert found.next == (owners, "gateway destination kick ci")


@pytest.mark.parametrize(
    ("tried", "age", "told"),
    [
        (1, 100.0, ""),
        (6, 100.0, ""),
        (7, 100.0, "; the first becomes a dead letter (exhausted) after 3 more failed attempts"),
        (9, 100.0, "; the first becomes a dead letter (exhausted) after one more failed attempt"),
        (1, 3500.0, "; the first becomes a dead letter (expired) after 2 more failed attempts"),
    ],
)
def test_waiting_deliveries_show_their_remaining_attempts_where_few(tried: int, age: float, told: str) -> None:
    policy = a_policy(schedule=(60.0,), jitter=0.0, max_attempts=10, max_age=3600.0)
    backlogs = Backlogs()
    for number in (1, tried):
        tries = (an_attempt(number, status=500),)
        delivery = a_delivery(event=an_event(received_at=NOW - age), attempts=tries, due=NOW)
        backlogs.add(
            StoredDelivery(delivery=delivery, metadata=RecordMetadata(spill_reason=SpillReason.LANE_FULL), at=NOW)
        )
    (found,) = waiting_findings(backlogs, NOW, rules_of(a_route(retry=policy)))
    assert found.why == f"2 wait (its queue is full){told}"
    (found,) = waiting_findings(backlogs, NOW)
    assert found.why == "2 wait (its queue is full)", "without rules"


def _waiting(why: str = "", *, by: str = "", due: float = NOW + 60.0, **fields: Any) -> StoredDelivery:
    """Return a delivery that was received a while ago, and waits or is parked."""
    event = an_event(received_at=NOW - 100.0)
    return StoredDelivery(
        delivery=a_delivery(event=event, due=due, **fields),
        metadata=RecordMetadata(spill_reason=why, paused_name=by),
        at=NOW,
    )


def _found(*stored: StoredDelivery, control: Control | None = None) -> Finding:
    backlogs = Backlogs()
    for each in stored:
        backlogs.add(each)
    (found,) = waiting_findings(backlogs, NOW, control=control)
    return found


@pytest.mark.parametrize(
    ("why", "attempt", "told"),
    [
        ("", {"status": 503, "detail": "503 Service Unavailable"}, "2 got 503 Service Unavailable, 1 paused"),
        ("", {"status": 503, "detail": "later"}, "2 got 503 (later), 1 paused"),
        ("", {"status": 503}, "2 got 503, 1 paused"),
        (
            "",
            {"status": None, "result": Result.TIMEOUT, "detail": "no response"},
            "2 got timeout (no response), 1 paused",
        ),
        (SpillReason.OVERDUE, {"status": 503}, "2 wait (its queue is slow), 1 paused"),
        (SpillReason.UNKNOWN_NAME, {"status": 503}, "2 wait (not in the rules), 1 paused"),
        ("a_newer_reason", {"status": 503}, "2 wait (a_newer_reason), 1 paused"),
    ],
)
def test_a_count_is_distinct_from_the_status(why: str, attempt: dict[str, Any], told: str) -> None:
    tries = (an_attempt(1, **attempt),)
    parked = _waiting(SpillReason.PAUSED, by="route/build")
    assert _found(*[_waiting(why, attempts=tries)] * 2, parked).why == told


@pytest.mark.parametrize("why", [SpillReason.OVERDUE, SpillReason.LANE_FULL])
def test_what_a_rate_slows_down_says_the_rate(why: str) -> None:
    backlogs = Backlogs()
    for _ in range(8):
        backlogs.add(_waiting(why))
    paced = a_destination("ci", url="http://127.0.0.1:1/ci", rate=1.0)
    (found,) = waiting_findings(backlogs, NOW, rules_of(a_route(), destinations=[paced]))
    queue = {SpillReason.OVERDUE: "its queue is slow", SpillReason.LANE_FULL: "its queue is full"}[SpillReason(why)]
    assert found.why == f"8 wait ({queue}: its rate is 1/s)"
    (found,) = waiting_findings(backlogs, NOW, rules_of(a_route()))
    assert found.why == f"8 wait ({queue})"


def test_a_refused_credential_needs_attention_at_once_and_comes_before_what_is_over() -> None:
    def waiting(status: int) -> Finding:
        fresh = a_delivery(event=an_event(received_at=NOW - 2.0), due=NOW + 60.0, attempts=(an_attempt(status=status),))
        return _found(StoredDelivery(delivery=fresh, metadata=NO_METADATA, at=NOW))

    refused, failed = waiting(401), waiting(503)
    assert (refused.needs_attention, failed.needs_attention) == (True, False)
    assert refused.next == ("# replace our credential for ci first", "gateway destination kick ci")
    over = Finding(rank=REFUSED, what="rules", why="they are active now", needs_attention=False, since=1.0)
    assert ranked([over, failed, refused]) == [refused, failed, over]
    assert ranked([failed, replace(over, needs_attention=True)])[0].what == "rules"


def test_one_waits_and_two_wait() -> None:
    assert _found(_waiting(SpillReason.THROTTLED)).why == "1 waits (Retry-After)"
    assert _found(_waiting()).why == "1 not tried yet"


def test_a_due_attempt_is_reported_with_its_time(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    due, later = _found(_waiting(due=NOW - 40.0)), _found(_waiting(due=NOW + 40.0))
    assert [(each.until, each.is_due) for each in (due, later)] == [(NOW - 40.0, True), (NOW + 40.0, False)]
    print_status(Output(json=False), [due, later], ())
    out = capsys.readouterr().out
    assert f"due since {when(NOW - 40.0)}" in out
    assert f"due since {when(NOW + 40.0)}" not in out
    print_status(Output(json=True), [due, later], ())
    out = capsys.readouterr().out
    assert [json.loads(line)["until"] for line in out.splitlines()] == [rfc3339(NOW - 40.0), rfc3339(NOW + 40.0)]
    unknown = _found(_waiting(due=NOW - 40.0, route="", destination=""))
    assert (unknown.until, unknown.is_due) == (NOW - 40.0, True)


def test_parked_deliveries_have_no_next_attempt() -> None:
    parked = _waiting(SpillReason.PAUSED, by="route/build", due=NOW - 90.0)
    assert (_found(parked).until, _found(parked).is_due) == (None, False)
    mixed = _found(parked, _waiting(due=NOW + 60.0))
    assert (mixed.until, mixed.is_due) == (NOW + 60.0, False), "that of the other one"


@pytest.mark.parametrize(
    ("names", "steps"),
    [
        (("route/build",), ("gateway route resume build",)),
        (("destination/ci",), ("gateway destination resume ci",)),
        (("route/build", "destination/ci"), ("gateway route resume build", "gateway destination resume ci")),
        (("route/other", "destination/audit"), ()),
    ],
)
def test_paused_deliveries_are_resumed_before_kicked(names: tuple[str, ...], steps: tuple[str, ...]) -> None:
    control = Control([ControlRecord(kind="pause", name=name, state="paused", at=5.0) for name in names])
    parked, retried = _waiting(SpillReason.PAUSED, by=names[0]), _waiting(attempts=(an_attempt(1, status=503),))
    mixed = _found(parked, retried, control=control)
    assert mixed.next == (*steps, "gateway destination kick ci")
    assert mixed.until == (None if steps else NOW + 60.0), "what comes due meanwhile is parked"
    assert _found(parked, control=control).next == steps, "a kick has nothing to retry"
    refused = _waiting(attempts=(an_attempt(1, status=401),))
    credential = "# replace our credential for ci first"
    assert _found(refused, control=control).next == (credential, *steps, "gateway destination kick ci")
    for name in names:
        control.apply(ControlRecord(kind="pause", name=name, state="resuming", at=6.0))
    assert _found(retried, control=control).next == ("gateway destination kick ci",)


def test_a_process_hold_of_a_paused_destination_is_resumed_first() -> None:
    control = Control([ControlRecord(kind="pause", name="destination/ci", state="paused", at=5.0)])
    hold = {"destination": "ci", "why": "retry_after", "after": "", "since": NOW, "until": NOW + 9}
    keys = {"route": "build", "destination": "ci", "halted": 1, "blocked": 2}
    found = process_findings({"holds": [hold], "ordered": [keys]}, "a:1", control)
    assert [(each.what, each.next) for each in found if each.next] == [
        ("destination ci", ("gateway destination resume ci", "gateway destination kick ci")),
        ("build → ci", ("gateway destination resume ci", "gateway route kick build")),
        ("build → ci", ("gateway destination resume ci",)),
    ]


async def test_dead_letters_come_with_commands_to_list_and_replay() -> None:
    log = MemoryLog(now=lambda: NOW)
    await log.create(TOPICS.specs([]))
    delivery = a_delivery(attempts=(an_attempt(1, status=500),))
    for _ in range(2):
        headers = encode_delivery(delivery, RecordMetadata(dead_reason="exhausted"), at=NOW)
        await log.append(TOPICS.dead, key=b"ci", value=b"{}", headers=headers)
    await log.append(TOPICS.dead, key=b"", value=b"?", headers=[("gw_v", b"1"), ("gw_reason", b"undecodable")])
    known, unknown = await dead_letter_findings(log, TOPICS, Control(), (), {})
    assert (known.what, known.why, known.count) == ("build → ci", "dead letters: exhausted, 500", 2)
    which = "--route build --destination ci --reason exhausted --since 1d"
    assert known.next == (f"gateway dead list {which}", "# once that has been fixed:", f"gateway dead replay {which}")
    assert (unknown.what, unknown.count) == ("records that can't be read", 1)
    assert unknown.next == ("gateway dead list --reason undecodable --since 1d",)


async def test_dead_letters_of_removed_routes_say_what_a_replay_needs() -> None:
    log = MemoryLog(now=lambda: NOW)
    await log.create(TOPICS.specs([]))
    for route, destination, number in (("rx", "ci", 3), ("build", "gone", 2), ("build", "ci", 1)):
        for _ in range(number):
            event = an_event(received_at=NOW - 5.5)
            delivery = a_delivery(route=route, destination=destination, event=event)
            headers = encode_delivery(delivery, RecordMetadata(dead_reason="route_removed"), at=NOW)
            await log.append(TOPICS.dead, key=b"ci", value=b"{}", headers=headers)
    no_route, no_destination, there = await dead_letter_findings(
        log, TOPICS, Control(), (), {}, rules=rules_of(a_route())
    )
    which = "--route rx --destination ci --reason route_removed --since 1d"
    assert no_route.next == (
        f"gateway dead list {which}",
        "# the local rules have no route rx: restore it first, or they end as route_removed again:",
        f"gateway dead replay {which}",
        "# or have another route deliver their events, and then drop them:",
        f"gateway replay --route OTHER --from {rfc3339(int(NOW - 5.5))} --undelivered",
        f"gateway dead drop {which}",
    )
    assert "no destination gone: restore it first" in no_destination.next[1]
    assert there.next[1] == "# once that has been fixed:"
    failed = encode_delivery(
        a_delivery(route="rx"), RecordMetadata(dead_reason="expression_error", detail="request.body: w"), at=NOW
    )
    await log.append(TOPICS.dead, key=b"ci", value=b"{}", headers=failed)
    found = await dead_letter_findings(log, TOPICS, Control(), (), {}, rules=rules_of(a_route()))
    (expression,) = [each for each in found if "expression_error" in each.why]
    assert expression.next[0] == "# the local rules have no route rx: restore it first"
    assert expression.next[-1].startswith("gateway dead replay --route rx ")
    unknown, *_ = await dead_letter_findings(log, TOPICS, Control(), (), {})
    assert unknown.next[1] == "# once the rules have its route and destination again:"


@pytest.mark.parametrize("detail", ["request: text: body.x isn't there", "request.body: w", "destinations.ci.url: w"])
async def test_dead_letters_of_a_request_that_failed_are_replayed_themselves(detail: str) -> None:
    """Their events have matched already: what fails is made anew from the dead letter."""
    log = MemoryLog(now=lambda: NOW)
    await log.create(TOPICS.specs([]))
    note = RecordMetadata(dead_reason="expression_error", detail=detail)
    await log.append(TOPICS.dead, key=b"ci", value=b"{}", headers=encode_delivery(a_delivery(), note, at=NOW))
    (found,) = await dead_letter_findings(log, TOPICS, Control(), (), {})
    assert found.next[-1] == "gateway dead replay --route build --destination ci --reason expression_error --since 1d"
    assert not [step for step in found.next if "--undelivered" in step]


async def test_dead_letters_of_an_expression_come_with_steps_to_fix_it_and_replay() -> None:
    log = MemoryLog(now=lambda: NOW)
    await log.create(TOPICS.specs([]))
    details = [
        ("build", 3, "request.body: body.who isn't there (check with has(body.who))"),
        ("build", 2, "request.body: body.who isn't there (check with has(body.who))"),
        ("other", 1, "body.n + 1 > 2: unsupported operation: string + int"),
    ]
    for route, number, detail in details:
        event = an_event(id=f"evt_{number}", received_at=NOW - number - 0.5)
        note = RecordMetadata(dead_reason="expression_error", detail=detail)
        headers = encode_delivery(a_delivery(route=route, event=event), note, at=NOW - number)
        await log.append(TOPICS.dead, key=b"ci", value=b"{}", headers=headers)
    changed = ["route build: request", "route builder: to", "source shop: id"]
    told = {"rules": {"changed": changed, "changed_at": 50.0}}
    since = {"rules": {"changed": ["route build: when"], "changed_at": NOW}}
    older = {"rules": {"changed": ["route build: to"]}}
    others: list[dict[str, Any]] = [{"rules": {"changed": None, "changed_at": 1.0}}, {"rules": None}, {"rules": [5]}]
    request, condition = await dead_letter_findings(log, TOPICS, Control(), [told, told, since, older, {}, *others], {})
    assert (
        request.why == "dead letters: expression_error, request.body: body.who isn't there (check with has(body.who))"
    )
    assert request.next == (
        f"# the rules loaded at {when(50.0)} changed route build: request",
        "gateway explain evt_2",
        "# once the rule is fixed (a field that isn't always there: has(body.a) ? body.a : …):",
        "gateway dead replay --route build --destination ci --reason expression_error --since 1d",
    )
    assert condition.next == (
        "gateway explain evt_1",
        "# once the condition is fixed (matches the events again, and resolves the dead letters of matching ones):",
        f"gateway replay --route other --from {rfc3339(int(NOW - 1.5))} --undelivered",
    )


async def test_a_conditions_dead_letters_left_by_a_replay_have_a_step_to_drop_them() -> None:
    log = MemoryLog(now=lambda: NOW)
    await log.create(TOPICS.specs([]))
    delivery = a_delivery(event=an_event(id="evt_1", received_at=NOW - 5.5))
    note = RecordMetadata(dead_reason="expression_error", detail="body.n > 2: no such overload")
    await log.append(TOPICS.dead, key=b"ci", value=b"{}", headers=encode_delivery(delivery, note, at=NOW - 5))

    async def steps(**changed: Any) -> tuple[str, ...]:
        command = replace(_replay("1", "build", 0, at=NOW + 1, since=NOW - 6), **changed)
        (found,) = await dead_letter_findings(log, TOPICS, Control([command]), (), {})
        return found.next

    explain, told, drop, again, replay = await steps()
    assert explain == "gateway explain evt_1"
    assert told == f"# the condition didn't match them in the replay of {when(NOW + 1)}; if that is correct:"
    assert drop == "gateway dead drop --route build --destination ci --reason expression_error --since 1d"
    assert again == "# or once it is fixed:"
    assert replay == f"gateway replay --route build --from {rfc3339(int(NOW - 5.5))} --undelivered"
    for other in (
        {"at": NOW - 1},  # before the letter was written
        {"state": "requested"},
        {"state": "cancelled"},
        {"selection": Selection(route="other", since=NOW - 6, undelivered=True)},
        {"selection": Selection(route="build", since=NOW - 5.4, undelivered=True)},
        {"selection": Selection(route="build", since=NOW - 6, undelivered=False)},  # delivers, and resolves no letter
    ):
        assert not any("dead drop" in step for step in await steps(**other)), other


FAILED_CONDITION = "body.n > 2: no such overload"
FAILED_REQUEST = "request.body: body.who isn't there"


async def _expression_findings(*details: str) -> tuple[list[Finding], list[DeadLetterProperties]]:
    """Return what is found of dead letters with these details, after a replay, and all letters in the log."""
    log = MemoryLog(now=lambda: NOW)
    await log.create(TOPICS.specs([]))
    for number, detail in enumerate(details, 1):
        delivery = a_delivery(id=f"dlv_{number}", event=an_event(id=f"evt_{number}", received_at=NOW - 5.5))
        note = RecordMetadata(dead_reason="expression_error", detail=detail)
        await log.append(TOPICS.dead, key=b"ci", value=b"{}", headers=encode_delivery(delivery, note, at=NOW - 5))
    control = Control([_replay("1", "build", 0, at=NOW + 1, since=NOW - 6)])
    found = await dead_letter_findings(log, TOPICS, control, (), {})
    every = read_dead_letters(log, TOPICS, control, DeadFilter(), include_resolved=True)
    return found, [letter.properties async for letter in every]


def _covered(step: str, letters: Iterable[DeadLetterProperties]) -> int:
    """Return how many of these letters a step would replay or drop."""
    words = step.split()[3:]
    if not words[0].startswith("--"):
        return sum([each.id in words for each in letters])
    asked = dict(zip(words[::2], words[1::2], strict=True))
    since = NOW - parse_duration(asked["--since"])
    which = DeadFilter(
        route=asked["--route"], destination=asked["--destination"], reason=asked["--reason"], since=since
    )
    return sum([which.covers(each) for each in letters])


async def test_a_step_is_about_no_dead_letters_but_those_of_its_finding() -> None:
    found, letters = await _expression_findings(FAILED_CONDITION, FAILED_CONDITION, FAILED_REQUEST)
    steps = {each.why: [step for step in each.next if step.startswith("gateway dead ")] for each in found}
    assert list(steps.values()) == [["gateway dead drop dlv_2 dlv_1"], ["gateway dead replay dlv_3"]]
    assert [_covered(step, letters) for (step,) in steps.values()] == [2, 1]


async def test_of_many_dead_letters_a_step_says_how_many_others_it_includes_and_drops_none_of_them() -> None:
    found, letters = await _expression_findings(*[FAILED_CONDITION] * 7, *[FAILED_REQUEST] * 6)
    condition, request = found
    which = "--route build --destination ci --reason expression_error --since 1d"
    assert condition.next[2:4] == (
        "# 6 others with other results would be included, so drop these by their ids:",
        f"gateway dead list {which}",
    )
    assert request.next[-2:] == ("# includes 7 others, with other results:", f"gateway dead replay {which}")
    assert _covered(request.next[-1], letters) == 13


async def test_a_step_covers_no_older_dead_letters_than_its_finding_counts() -> None:
    times = [NOW - 90_000.0, NOW]
    log = MemoryLog(now=lambda: times[0])
    await log.create(TOPICS.specs([]))
    for _ in range(2):
        headers = encode_delivery(a_delivery(), RecordMetadata(dead_reason="exhausted"), at=times[0])
        await log.append(TOPICS.dead, key=b"ci", value=b"{}", headers=headers)
        times = times[-1:]
    (found,) = await dead_letter_findings(log, TOPICS, Control(), (), {})
    every = read_dead_letters(log, TOPICS, Control(), DeadFilter(), include_resolved=True)
    assert found.count == 1
    assert _covered(found.next[-1], [letter.properties async for letter in every]) == 1


@pytest.mark.parametrize(
    ("reason", "why"),
    [
        ("no leader", "not read: no leader"),
        ("takes no appends: too few replicas", "takes no appends: too few replicas"),
    ],
)
def test_an_unusable_partition_says_why(reason: str, why: str) -> None:
    unread = {"topic": "gateway.events.github", "partition": 3, "since": 100.0, "reason": reason}
    (found,) = process_findings({"unread": [unread]}, "a:9090", Control())
    assert (found.rank, found.what, found.why) == (NOT_READ, "gateway.events.github/3", why)


def test_a_log_that_refuses_events_is_among_the_worst() -> None:
    (found,) = process_findings({"log": {"since": 100.0, "reason": "gateway.db: no room"}}, "a:9090", Control())
    assert (found.rank, found.needs_attention, found.since, found.by) == (NOT_READ, True, 100.0, "a:9090")
    assert (found.what, found.why) == ("the log", "doesn't respond, or rejects events: gateway.db: no room")
    assert found.next[0].startswith("# free space on its disk")
    assert process_findings({"log": None}, "a:9090", Control()) == []


REFUSAL: dict[str, Any] = {
    "since": 100.0,
    "until": None,
    "file": "/etc/gateway/team.yaml",
    "changed_at": 101.0,
    "problems": ["team.yaml:3:1: a"],
    "count": 2,
    "routes": {},
}


def test_refused_rules_say_since_when_which_file_what_runs_and_the_replay() -> None:
    rules = {"file": "/etc/a gateway/routes.yaml", "loaded_at": 50.0, "refusal": REFUSAL}
    (found,) = process_findings({"rules": rules}, "a:9090", Control())
    assert (found.rank, found.needs_attention, found.since, found.until) == (REFUSED, True, 100.0, None)
    assert found.why == (
        f"team.yaml of {when(101.0)} is refused: team.yaml:3:1: a (and 1 more); "
        f"the rules loaded at {when(50.0)} are still active"
    )
    replay = "gateway replay --from 1970-01-01T00:01:40.000Z --undelivered"
    check, told, command = found.next
    assert (check, told[0], command) == ("gateway check '/etc/a gateway/routes.yaml'", "#", replay)
    (found,) = process_findings({"rules": rules | {"refusal": REFUSAL | {"until": 160.0}}}, "a:9090", Control())
    assert (found.needs_attention, found.since, found.until, found.next) == (False, 100.0, 160.0, (told, command))
    assert process_findings({"rules": rules | {"refusal": None}}, "a:9090", Control()) == []


def test_routes_removed_at_once_are_named_with_steps_to_restore_and_replay() -> None:
    loss = {"since": 100.0, "of": 10, "routes": ["build", "mirror"], "count": 5, "missing": 5}
    replay = "gateway replay --from 1970-01-01T00:01:40.000Z --undelivered"

    def found(**told: int) -> Finding:
        (finding,) = process_findings({"rules": {"refusal": None, "loss": loss | told}}, "a:9090", Control())
        return finding

    lost = found()
    assert (lost.rank, lost.needs_attention, lost.since) == (REFUSED, True, 100.0)
    assert lost.why == "5 of 10 routes were removed at once: build, mirror, and 3 more"
    assert (lost.next[0].partition(",")[0], lost.next[-1]) == ("# if this wasn't intended", replay)
    assert found(missing=1).why.endswith("more; still missing: 1")
    back = found(missing=0)
    assert (back.needs_attention, back.next) == (False, lost.next[1:])
    assert back.why.endswith("; they are back")
    assert found(reloads=2).why.startswith("5 of 10 routes were removed in 2 reloads: build, ")


def _replay(name: str, route: str, count: int, at: float = 170.0, **selected: Any) -> ControlRecord:
    selection = replace(Selection(route=route, since=100.0, undelivered=True), **selected)
    return ControlRecord(kind="replay", name=name, state="done", at=at, selection=selection, count=count)


def test_refused_rules_have_no_step_once_missed_events_are_replayed() -> None:
    refusal = REFUSAL | {"until": 160.0, "routes": {"shop": ["build", "mirror"], "crm": ["mirror"]}}
    answer = {"rules": {"file": "r", "loaded_at": 50.0, "refusal": refusal}}
    enough = [_replay("1", "build", 70), _replay("2", "mirror", 50)]
    (found,) = process_findings(answer, "a:9090", Control(enough))
    assert found.why == "new rules were refused; they are active now; replayed since: 120 queued"
    assert (found.next, found.needs_attention) == ((), False)
    under_way = enough[1].with_state("requested", count=0)
    (found,) = process_findings(answer, "a:9090", Control([enough[0], under_way]))
    assert found.why.endswith("being replayed: 70 queued")
    for other in (
        [],
        [_replay("2", "mirror", 50, at=159.0)],  # before the rules were in force
        [_replay("2", "mirror", 50, since=100.5)],
        [_replay("2", "mirror", 50, until=159.0)],
        [_replay("2", "mirror", 50, destination="ci")],
        [_replay("2", "mirror", 50, source="shop")],
        [enough[1].with_state("cancelled")],
        [enough[1].with_state("done", unread=1)],
    ):
        (found,) = process_findings(answer, "a:9090", Control([enough[0], *other]))
        assert "replayed" not in found.why
        assert found.next[-1].startswith("gateway replay"), other
    by_source = [_replay("2", "mirror", 30, source="shop"), _replay("3", "mirror", 20, source="crm", until=160.0)]
    (found,) = process_findings(answer, "a:9090", Control([enough[0], *by_source]))
    assert found.why.endswith("replayed since: 120 queued")


def a_source(**told: Any) -> dict[str, Any]:
    counted: dict[str, Any] = {
        "events": 0.0,
        "since": None,
        "loaded_at": None,
        "changed": (),
        "missed_since": None,
        "types": [],
        "newest": None,
        "missed": None,
    }
    identity = {**counted, "duplicates": 0.0, "conflicts": 0.0, **told.pop("identity", {})}
    return {"source": "shop", **counted, "unrouted": 0.0, "refused": {}, "identity": identity} | told


def test_unrouted_events_are_reported_after_the_rules_are_fixed_until_replayed() -> None:
    missed = {"count": 373, "events": 400, "since": 100.0, "until": 160.0, "routes": ["build"]}
    source = a_source(missed=missed | {"types": [["order", 370], ["ping", 3]]})
    answer: dict[str, Any] = {"rules": {}, "sources": [source]}
    (found,) = process_findings(answer, "a:9090", Control())
    why = f"were unrouted (370 order, 3 ping) under the rules active until {when(160.0)}"
    assert (found.count, found.why, found.needs_attention) == (373, why, True)
    assert (found.since, found.until) == (100.0, 160.0)
    assert found.next[-1] == "gateway replay --source shop --from 1970-01-01T00:01:40.000Z --undelivered"
    (found,) = process_findings(answer, "a:9090", Control([_replay("1", "build", 373, source="shop")]))
    assert (found.why, found.needs_attention, found.next) == (f"{why}; replayed since: 373 queued", False, ())
    answer["sources"] = [a_source(missed=missed | {"types": [], "count": 30})]
    (found,) = process_findings(answer, "a:9090", Control())
    assert (found.needs_attention, found.next[-1]) == (
        False,
        "gateway replay --source shop --from 1970-01-01T00:01:40.000Z --undelivered",
    )
    answer["sources"] = [a_source(missed=missed | {"types": [], "count": 0, "events": 0})]
    assert process_findings(answer, "a:9090", Control()) == []


def _after_replays(*commands: ControlRecord, **missed: Any) -> Finding:
    told = {"count": 373, "events": 400, "since": 100.0, "until": 160.0, "routes": ["build", "mirror"], "types": []}
    answer = {"rules": {}, "sources": [a_source(missed=told | missed)]}
    (found,) = process_findings(answer, "a:9090", Control(commands))
    return found


def test_replays_of_too_few_unrouted_events_leave_the_rest_wrong() -> None:
    nothing = _replay("1", "build", 0)
    found = _after_replays(nothing, _replay("2", "mirror", 0))
    assert found.why.endswith(
        f"under the rules active until {when(160.0)}; replayed since: 0 queued; still undelivered: at least 373"
    )
    assert found.needs_attention
    assert found.next[-1] == "gateway replay --source shop --from 1970-01-01T00:01:40.000Z --undelivered"
    corrected = _replay("3", "build", 300, at=190.0)
    found = _after_replays(nothing, corrected)
    assert (found.why.split("; ")[1:], found.needs_attention) == (
        ["replayed since: 300 queued", "still undelivered: at least 73"],
        True,
    )
    found = _after_replays(nothing, corrected, _replay("4", "mirror", 40, at=191.0))
    assert found.why.endswith("replayed since: 340 queued; still undelivered: at least 33")
    assert not found.needs_attention, "no more than a tenth of what came"
    assert found.next, "and how to have the rest"
    found = _after_replays(corrected, _replay("4", "build", 0, at=191.0, since=110.0), _replay("5", "mirror", 73))
    assert (found.why.split("; ")[1:], found.needs_attention, found.next) == (["replayed since: 373 queued"], False, ())


def test_partial_replays_of_unrouted_events_add_up() -> None:
    parts = [
        _replay("1", "build", 200, at=120.0, until=115.0),  # between a fix and another
        _replay("2", "build", 100, since=115.0),
        _replay("3", "mirror", 73, since=90.0, source="shop"),
    ]
    assert _after_replays(*parts).next == ()
    for other in (
        _replay("3", "other", 73),
        _replay("3", "mirror", 73, source="crm"),
        _replay("3", "mirror", 73, since=160.0),
        _replay("3", "mirror", 73, until=100.0),
        _replay("3", "mirror", 73, at=99.0),
    ):
        found = _after_replays(*parts[:2], other)
        assert found.why.endswith("replayed since: 300 queued; still undelivered: at least 73"), other
    assert _after_replays(*parts[:2], _replay("3", "other", 73), routes=None).next == (), "so many that none is named"
    under_way = _after_replays(parts[0], parts[1].with_state("requested", count=0))
    assert under_way.why.endswith("being replayed: 200 queued; still undelivered: at least 173")
    assert under_way.needs_attention
    two_each = _after_replays(_replay("1", "build", 600), _replay("2", "mirror", 73), fan_out={"build": 2})
    assert (two_each.why.split("; ")[1:], two_each.needs_attention) == (["replayed since: 673 queued"], False)
    assert _after_replays(_replay("1", "build", 373), fan_out={"build": 2}).why.endswith(
        "still undelivered: at least 187"
    )


def test_replays_of_more_than_was_missed_do_not_prove_its_delivery() -> None:
    several = _after_replays(_replay("1", "build", 373), _replay("2", "mirror", 373))
    assert several.why.endswith("replayed since: 746 queued"), "each may be of every event"
    assert several.next == ()
    found = _after_replays(_replay("1", "build", 375))
    assert found.why.endswith(
        "replayed since: 375 queued, by one route more than were missed: "
        "others, too, so some of these may still be undelivered"
    )
    assert not found.needs_attention
    assert found.next[-1].endswith(" --undelivered --dry-run")


def test_a_replay_of_one_event_is_counted_and_covers_no_period() -> None:
    one = _replay("1", "build", 1, since=0.0, undelivered=False)
    assert _after_replays(one).why.endswith("replayed since: 1 queued; still undelivered: at least 372")
    refusal = REFUSAL | {"until": 160.0, "routes": {"shop": ["build"]}}
    (found,) = process_findings(
        {"rules": {"file": "r", "loaded_at": 1.0, "refusal": refusal}}, "a:9090", Control([one])
    )
    assert found.next


def test_what_dedupe_dropped_is_reported_after_the_fix_until_replayed() -> None:
    missed = {"count": 80, "events": 400, "since": 100.0, "until": 160.0, "routes": ["build"]}
    source = a_source(identity={"missed": missed | {"types": [["order", 80]]}})
    answer: dict[str, Any] = {"rules": {}, "sources": [source]}
    (found,) = process_findings(answer, "a:9090", Control())
    why = f"duplicates that dedupe suppressed (80 order) under the rules active until {when(160.0)}"
    assert (found.count, found.why, found.needs_attention) == (80, why, True)
    assert found.next[-1] == "gateway replay --source shop --from 1970-01-01T00:01:40.000Z --undelivered"
    assert "that are no duplicates" in found.next[0]
    (found,) = process_findings(answer, "a:9090", Control([_replay("1", "build", 78, source="shop")]))
    assert (found.why, found.needs_attention, found.next) == (f"{why}; replayed since: 78 queued", False, ())
    answer["sources"] = [a_source(identity={"missed": missed | {"types": [], "count": 40}})]
    assert process_findings(answer, "a:9090", Control()) == []


def test_duplicates_and_conflicts_share_their_steps_and_conflicts_have_no_replay() -> None:
    identity = {"events": 30.0, "duplicates": 15.0, "conflicts": 10.0, "missed_since": 48.0}
    answer: dict[str, Any] = {"rules": {}, "sources": [a_source(identity=identity)]}
    copies, conflicts = process_findings(answer, "a:9090", Control())
    assert copies.next == conflicts.next
    assert copies.next[-1] == "gateway replay --source shop --from 1970-01-01T00:00:48.000Z --undelivered"
    answer["sources"] = [a_source(identity=identity | {"duplicates": 0.0})]
    (conflicts,) = process_findings(answer, "a:9090", Control())
    assert conflicts.next == copies.next[:-2]


def test_unrouted_events_are_reported_with_the_rule_change_and_a_replay() -> None:
    rules = {"since": 49.0, "loaded_at": 50.0, "changed": ["route build: match"], "missed_since": 48.0}
    source = a_source(events=30.0, unrouted=15.0, types=[("push", 15)], newest="evt_15", **rules)
    answer: dict[str, Any] = {"rules": {}, "sources": [source]}
    (found,) = process_findings(answer, "a:9090", Control())
    assert (found.count, found.why, found.since) == (
        15,
        "unrouted (15 push), of 30 that this process read under the current rules",
        49.0,
    )
    assert found.next[0] == f"# the rules loaded at {when(50.0)} changed route build: match"
    assert found.next[3] == "gateway explain evt_15"
    assert found.next[-1] == "gateway replay --source shop --from 1970-01-01T00:00:48.000Z --undelivered"
    assert found.needs_attention
    answer["sources"] = [source | {"unrouted": 3.0, "types": [("push", 3)]}]
    (few,) = process_findings(answer, "a:9090", Control())
    assert (few.why, few.needs_attention, few.next) == (
        "unrouted (3 push), of 30 that this process read under the current rules",
        False,
        found.next,
    )
    answer["sources"] = [source | {"unrouted": 0.0, "types": []}]
    assert process_findings(answer, "a:9090", Control()) == []
    answer["sources"] = [source | {"events": 0.0, "unrouted": 5.0, "types": [("push", 5)]}]
    (found,) = process_findings(answer, "a:9090", Control())
    assert found.why == "unrouted (5 push) under the current rules", "who routes doesn't know how many there were"


@pytest.mark.parametrize("columns", ["160", "80"])
def test_each_next_step_is_one_line(
    columns: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    command = f"gateway replay --source {'shop' * 15} --from 1970-01-01T00:00:49.000Z --undelivered"
    alike = [
        Finding(rank=HELD, what=f"{name} → erp", why="why " * 40, next=("gateway destination kick erp",))
        for name in ("build", "mirror")
    ]
    other = Finding(rank=REFUSED, what="rules", why="w", next=("# then:", command, f"gateway check {'x' * 200}"))
    print_status(Output(json=False), [*alike, other], ())
    told = capsys.readouterr().out.splitlines()
    assert told[-8:] == [
        "",
        "next: build → erp, mirror → erp",
        "  gateway destination kick erp",
        "",
        "next: rules",
        "  # then:",
        f"  {command}",
        f"  gateway check {'x' * 200}",
    ]
    assert all(len(line) <= int(columns) for line in told[:-8])


def test_the_account_of_waiting_deliveries_is_bounded_and_exact() -> None:
    backlogs, attempts, random = Backlogs(), LastAttempts("ci"), Random(5)
    at = random.sample(range(10_000), 2_000)
    for number, moment in enumerate(at):
        tries = (an_attempt(1, at=float(moment), status=500, detail=f"no {number}"),)
        delivery = a_delivery(id=f"dlv_{number}", destination="ci" if number % 4 else "erp", attempts=tries)
        for _ in range(1 + number % 2):  # two records may tell of one attempt
            attempts.add(StoredDelivery(delivery=delivery, metadata=NO_METADATA, at=NOW))
        backlogs.add(StoredDelivery(delivery=delivery, metadata=NO_METADATA, at=NOW))
    assert {each.destination: each.count for each in backlogs} == {"ci": 1_500, "erp": 500}
    reasons = next(each.reasons for each in backlogs if each.destination == "ci")
    assert (len(reasons), reasons.total()) == (MAX_REASONS + 1, 1_500)
    expected = sorted([float(moment) for number, moment in enumerate(at) if number % 4], reverse=True)
    assert [each.attempt.at for each in attempts.newest_first()] == expected[:MAX_ATTEMPTS_SHOWN]


@virtual
async def test_a_waiting_delivery_counts_once_while_it_changes_topics() -> None:
    world = await a_world(a_route(retry=a_policy(schedule=(5.0, 20.0, 40.0), max_attempts=99, max_age=1e6)), ci=[503])
    await world.put(*events(300))
    control = Control()
    async with running(world):
        await asyncio.sleep(2)
        for _ in range(40):
            found = 0
            async for _filed in waiting_deliveries(world.log, TOPICS, control, {}):
                found += 1
                if found % 20 == 0:
                    await asyncio.sleep(0.7)  # and they move
            assert found == 300


async def test_a_replay_that_waits_beside_the_delivery_that_it_repeats_is_counted_too() -> None:
    log = MemoryLog(now=lambda: NOW)
    await log.create(TOPICS.specs([]))
    original = a_delivery(attempts=(an_attempt(1, status=500),), successor=1)
    again = replace(original, replayed_at=NOW, successor=2)
    for delivery in (original, original, again):  # one is in two tiers, as a crash or a moment leaves it
        headers = encode_delivery(delivery, NO_METADATA, at=NOW)
        await log.append(TOPICS.retry("5s"), key=b"ci", value=delivery.event.body, headers=headers)
    found = [stored.delivery.replayed_at async for stored in waiting_deliveries(log, TOPICS, Control(), {})]
    assert found == [0.0, NOW]


KEYS = [
    Blocked(
        delivery=a_delivery(event=an_event(id="evt_1"), attempts=(an_attempt(status=503),)),
        halted=DeadLettered(reason=DeadReason.EXHAUSTED, detail="503 after 1 attempt"),
        since=50.0,
    ),
    Blocked(
        delivery=a_delivery(event=an_event(id="evt_3"), attempts=(an_attempt(),), due=45.0), halted=None, since=41.0
    ),
    Blocked(
        delivery=a_delivery(event=an_event(id="evt_2"), attempts=(an_attempt(status=404),), due=70.0),
        halted=None,
        since=40.0,
    ),
]


def test_an_answer_of_a_process_becomes_findings_the_worst_first() -> None:
    run = {"count": 15, "of": 25.0, "since": 30.0, "last": 90.0}
    answer = {
        "rules": {
            "file": "/etc/gateway/routes.yaml",
            "loaded_at": 1.0,
            "since": None,
            "changed": [],
            "refusal": REFUSAL,
        },
        "unread": [{"topic": "gateway.events.a", "partition": 3, "since": 2.0, "reason": "no leader"}],
        "holds": [{"destination": "ci", "why": "breaker_open", "after": "timeout", "since": 3.0, "until": 9.0}],
        "ordered": [{"route": "mirror", "destination": "ci", **keys_status(KEYS)}],
        "sources": [
            a_source(
                events=10.0,
                unrouted=0.0,
                identity={"events": 10.0, "duplicates": 2.0, "conflicts": 3.0},
                refused={"bad_signature": run},
            ),
            a_source(source="quiet"),
        ],
    }
    found = ranked(process_findings(answer, "http://a:9090", Control()))
    assert [each.what for each in found] == [
        "gateway.events.a/3",
        "rules",
        "destination ci",
        "mirror → ci",
        "mirror → ci",
        "source shop",
        "source shop",
        "source shop",
    ]
    assert [each.why for each in found[-3:]] == [
        f"refused: bad_signature, of 25 to this process since the first; the last at {when(90.0)}",
        "duplicates that dedupe suppressed, of 10 that this process accepted since the process started",
        f"{CONFLICTS}, of 10 that this process accepted since the process started",
    ]
    assert found[2].why == "breaker open after timeout"
    assert (found[3].why, found[3].count) == ("key halted: exhausted after 503", 1)
    assert (found[3].since, found[3].until) == (50.0, None)
    assert found[3].next == ("gateway explain evt_1", "gateway route kick mirror")
    assert (found[4].why, found[4].count) == ("keys blocked: 1 after 5xx, 1 after 404", 2)
    assert (found[4].since, found[4].until, found[4].next) == (40.0, 70.0, ("gateway explain evt_2",))
    assert found[2].next == ("# ci doesn't respond: ask its owners first", "gateway destination kick ci")
    assert (found[-3].count, found[-3].since) == (15, 30.0)
    assert found[-3].next[1:3] == (
        "gateway explain shop",
        "# after a rotation: put the new secret next to the old one in `secrets` of source shop",
    )
    assert all(each.by == "http://a:9090" for each in found)


@pytest.mark.parametrize(
    ("count", "since_the_first", "accepted", "is_listed"),
    [
        (1, 1.0, 31.0, False),
        (4, 4.0, 31.0, True),
        (10, 10.0, 90.0, False),
        (11, 11.0, 1e6, True),
        (11, 110.0, 99.0, False),
    ],
)
def test_a_few_refused_are_listed_from_a_tenth_of_all_on_and_more_from_a_tenth_since_the_first(
    count: int, since_the_first: float, accepted: float, *, is_listed: bool
) -> None:
    run = {"count": count, "of": since_the_first, "since": 30.0, "last": 90.0}
    identity = {"events": accepted, "duplicates": 0.0, "conflicts": 0.0}
    answer = {"sources": [a_source(events=accepted, unrouted=0.0, identity=identity, refused={"bad_signature": run})]}
    found = process_findings(answer, "a:9090", Control())
    assert [each.count for each in found] == ([count] if is_listed else [])


def test_keys_are_compatible_with_the_previous_version_both_ways() -> None:
    before = {"route": "mirror", "destination": "ci", "halted": 2.0, "blocked": 0.0}
    (found,) = process_findings({"ordered": [before]}, "a:9090", Control())
    assert (found.what, found.why, found.count, found.since) == ("mirror → ci", "keys halted", 2, None)
    assert found.next == ("gateway route kick mirror",)
    told = keys_status(KEYS)
    assert (int(told["halted"]), int(told["blocked"])) == (1, 2), "as the version before reads them"
    assert not any(keys_status([]).values())


def test_keys_that_failed_differently_are_told_apart_the_most_frequent_first() -> None:
    keys = [
        Blocked(
            delivery=a_delivery(event=an_event(id=f"evt_{number}"), attempts=(an_attempt(status=status),)),
            halted=DeadLettered(reason=DeadReason.EXHAUSTED),
            since=40.0 + number,
        )
        for number, status in enumerate([404, 500, 500, 501, 502])
    ]
    ordered = [{"route": "mirror", "destination": "ci", **keys_status(keys)}]
    (found,) = process_findings(json.loads(json.dumps({"ordered": ordered})), "a:9090", Control())
    assert found.why == (
        "keys halted: 2 exhausted after 500, 1 exhausted after 404, 1 exhausted after 501, 1 otherwise"
    )
    alike = [{"route": "mirror", "destination": "ci", **keys_status(keys[1:3])}]
    (found,) = process_findings({"ordered": alike}, "a:9090", Control())
    assert (found.why, found.count) == ("keys halted: exhausted after 500", 2)


def test_keys_halted_by_an_expression_are_reported_with_the_failure_and_remedy() -> None:
    halted = DeadLettered(reason=DeadReason.EXPRESSION_ERROR, detail="request.body: body.customer.email isn't there")
    key = Blocked(delivery=a_delivery(event=an_event(id="evt_1")), halted=halted, since=40.0)
    ordered = [{"route": "mirror", "destination": "ci", **keys_status([key])}]
    (found,) = process_findings({"ordered": ordered}, "a:9090", Control())
    assert found.why == "key halted: expression_error: request.body: body.customer.email isn't there"
    assert found.next == (
        "gateway explain evt_1",
        "# correct route mirror in the rules: its keys then continue by themselves",
    )


def test_an_open_breaker_with_nothing_to_probe_it_is_information_and_has_no_step() -> None:
    hold = {**HOLD, "until": None, "untried_since": NOW}
    (found,) = process_findings({"holds": [hold]}, "a:9090", Control())
    assert found.why == (
        f"breaker opened after 503; not tried by this process since {when(NOW)}; the next delivery is the probe"
    )
    assert (found.needs_attention, found.since, found.until, found.next, found.by) == (False, 3.0, None, (), "a:9090")
    (probed,) = process_findings({"holds": [{**HOLD, "until": None, "untried_since": None}]}, "a:9090", Control())
    (before,) = process_findings({"holds": [HOLD]}, "a:9090", Control())
    assert (before.why, before.needs_attention, before.until) == ("breaker open after 503", True, 9.0)
    assert probed == replace(before, until=None)


def test_keys_whose_credential_is_refused_say_so_first_as_other_routes_do() -> None:
    def told(*statuses: int, halted: DeadLettered | None = None) -> tuple[str, ...]:
        keys = [
            Blocked(
                delivery=a_delivery(event=an_event(id=f"evt_{number}"), attempts=(an_attempt(status=status),)),
                halted=halted,
                since=40.0 + number,
            )
            for number, status in enumerate(statuses)
        ]
        ordered = [{"route": "mirror", "destination": "ci", **keys_status(keys)}]
        (found,) = process_findings({"ordered": ordered}, "a:9090", Control())
        return found.next

    steps = ("# replace our credential for ci first", "gateway explain evt_0", "gateway route kick mirror")
    permanent = DeadLettered(reason=DeadReason.EXHAUSTED, detail="403 after 5 attempts")
    assert told(401) == told(404, 403) == told(401, halted=permanent) == steps
    assert told(404) == ("gateway explain evt_0",)
    before = {"since": 1.0, "until": 9.0, "event_id": "evt_0", "reason": "", "after": "401"}
    older = {"route": "mirror", "destination": "ci", "halted": 0, "blocked": 1, "longest_blocked": before}
    (found,) = process_findings({"ordered": [older]}, "a:9090", Control())
    assert found.next == steps


HOLD = {"destination": "ci", "why": "breaker_open", "after": "503", "since": 3.0, "until": 9.0}


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("holds", [{**HOLD, "since": "monday"}]),
        ("holds", [{**HOLD, "until": 1e300}]),
        ("holds", [{**HOLD, "untried_since": 1e300}]),
        ("holds", [{**HOLD, "untried_since": "monday"}]),
        ("holds", [{**HOLD, "why": ["breaker_open"]}]),
        ("holds", [{"destination": "ci"}]),
        ("unread", [{"topic": "t", "partition": 0, "since": 1.0, "reason": None}]),
        ("log", {"reason": "no room"}),
        ("log", "down"),
        ("rules", {"refusal": {"since": 1.0}}),
        ("rules", {"loss": {"count": "many"}}),
        ("rules", {"refusal": REFUSAL | {"changed_at": 1e300}, "file": "r", "loaded_at": 1.0}),
        ("rules", 5),
        ("ordered", [{"route": "mirror", "destination": "ci", "halted": {"count": 1}, "blocked": 0}]),
        ("ordered", [{"route": "mirror", "destination": "ci"}]),
        ("sources", [{"source": "shop", "events": 5.0}]),
        ("sources", {"shop": {"events": 5.0}}),
        ("sources", [None, "shop"]),
    ],
)
def test_an_unreadable_part_of_a_process_is_reported_with_the_rest(name: str, told: Any) -> None:
    answer: dict[str, Any] = {"version": "9.1", "ordered": [{"route": "r", "destination": "d", **keys_status(KEYS)}]}
    rest = process_findings({**answer, name: []}, "a:9090", Control())
    *found, unread = process_findings({**answer, name: told}, "a:9090", Control())
    assert found == rest
    assert (unread.rank, unread.what, unread.needs_attention) == (NOT_READ, "a:9090", True)
    assert unread.why == f"part of its status (version 9.1) can't be read here: {name}"


def test_one_hold_that_cannot_be_read_hides_no_other() -> None:
    found, unread = process_findings({"holds": [{}, HOLD, {}]}, "a:9090", Control())
    assert (found.what, unread.why) == ("destination ci", "part of its status can't be read here: holds")


def _refused(reason: str, count: int, of_all: float) -> list[Finding]:
    run = {"count": count, "of": of_all, "since": 30.0, "last": 90.0}
    return process_findings({"rules": {}, "sources": [a_source(refused={reason: run})]}, "a:9090", Control())


BY_ANYBODY = (
    *("transfer_coding", "method_not_allowed", "malformed_request", "malformed_body", "head_slow", "head_too_large"),
    *("unknown_source", "disconnected", "body_slow", "evicted"),
)


@pytest.mark.parametrize("reason", BY_ANYBODY)
def test_refusals_that_anybody_can_cause_are_reported_but_not_wrong(reason: str) -> None:
    (found,) = _refused(reason, 1000, 1000.0)
    assert (found.needs_attention, found.count) == (False, 1000)
    assert all(step.startswith("# ") for step in found.next)


@pytest.mark.parametrize(
    ("reason", "few", "few_of", "many", "many_of"),
    [
        ("bad_signature", 10, 10.0, 11, 100.0),
        ("stale_timestamp", 10, 10.0, 11, 100.0),
        ("overloaded", 10, 10.0, 11, 100.0),
        ("slow_bodies", 10, 10.0, 11, 100.0),
        ("rate_limited", 10, 10.0, 11, 100.0),
        ("concurrency_limited", 10, 10.0, 11, 100.0),
        ("address_refused", 40, 100.0, 51, 100.0),
        ("client_certificate_missing", 40, 100.0, 51, 100.0),
        ("missing_signature", 40, 100.0, 51, 100.0),
        ("malformed_signature", 10, 10.0, 11, 20.0),
        ("body_too_large", 40, 100.0, 51, 100.0),
    ],
)
def test_unverified_refusals_are_wrong_where_they_exceed_a_strangers_few(
    reason: str, few: int, few_of: float, many: int, many_of: float
) -> None:
    assert [found.needs_attention for found in _refused(reason, few, few_of)] == [False]
    assert [found.needs_attention for found in _refused(reason, many, many_of)] == [True]


@pytest.mark.parametrize("reason", ["log_unavailable", "expression_error", "body_not_json", "content_coding"])
def test_refusals_of_verified_senders_are_wrong_from_a_share_on(reason: str) -> None:
    assert [found.needs_attention for found in _refused(reason, 2, 10.0)] == [True]
    assert _refused(reason, 1, 10.0) == []


def test_each_reason_has_the_steps_of_its_kind_and_those_about_secrets_only_where_they_are_at_fault() -> None:
    steps = {reason: "\n".join(refusal_of(reason).steps) for reason in REJECTIONS}
    assert [reason for reason, told in steps.items() if "secret" in told] == ["bad_credentials", "bad_signature"]
    explained = {reason for reason, told in steps.items() if "gateway explain {name}" in told}
    limited = {"address_refused", "rate_limited", "concurrency_limited", "body_too_large", *CertificateProblem}
    batches = {"malformed_batch", "batch_too_large"}
    unread = {"body_not_json", "content_coding", "content_too_large", "malformed_content"}
    assert explained == {*Reason, *limited, *batches, *unread, "expression_error"}
    assert not [reason for reason in REJECTIONS if refusal_of(reason) is refusal_of("of a newer version")]
    (found,) = _refused("of a newer version", 50, 50.0)
    assert (found.needs_attention, found.next) == (
        False,
        ("# details of each: the log lines request_finished of source shop",),
    )


def test_a_missing_topic_is_named_as_a_process_does() -> None:
    gone = Partition(TOPICS.retry("20h"), ALL)
    (found,) = unread_findings({gone: NO_TOPIC})
    told = {"topic": gone.topic, "partition": gone.number, "since": 100.0, "reason": NO_TOPIC}
    (of_process,) = process_findings({"unread": [told]}, "a:9090", Control())
    assert of_process == replace(found, since=100.0, by="a:9090")
    assert (found.rank, found.what, found.next) == (NOT_READ, gone.topic, ("gateway topics create",))
    consequence = "what belongs there waits, is rejected, or (attempts) isn't recorded, until it exists"
    assert found.why == f"no such topic; {consequence}"
    (other,) = unread_findings({gone: "the group can't be joined"})
    assert (other.what, other.next) == (f"{gone.topic}/all", ("# check the brokers; reading resumes by itself",))


@virtual
async def test_a_pause_known_only_to_processes_is_not_reported_as_lifted() -> None:
    world = await a_world(a_route())
    commands = ControlClient(world.log, TOPICS)
    async with operated(world) as control, running(world, world.worker(control)):
        await commands.pause(NAME)
        await asyncio.sleep(2)
        await world.put(*events(5))
        await asyncio.sleep(60)
        await world.log.recreate(TOPICS.control)
        await asyncio.sleep(60)
        assert control.paused_by("build", "ci") == NAME
        seen = await commands.control()
        backlogs = Backlogs()
        async for stored in waiting_deliveries(world.log, TOPICS, seen, {}):
            backlogs.add(stored)
        (found,) = unpaused_findings(backlogs.parked, seen, now())
    assert found.count == 5
    assert found.why.startswith(
        "no pause is recorded any more: processes still running may keep the old one until they restart; "
    )


def test_several_processes_at_one_address_are_told_apart_and_one_that_does_not_answer_is_a_finding() -> None:
    held = {"destination": "ci", "why": "breaker_open", "after": "timeout", "since": 10.0, "until": 20.0}
    status = {
        "version": "1",
        "rules": {},
        "processes": [
            {"process": 0, "role": "all", "holds": [held]},
            {"process": 1, "role": "all", "problem": {"reason": "not running"}},
        ],
    }
    each = each_process(status, "127.0.0.1:9090")
    found = [finding for one, where in each for finding in process_findings(one, where, Control())]
    assert [(finding.what, finding.by) for finding in found] == [
        ("destination ci", "127.0.0.1:9090 process 0"),
        ("127.0.0.1:9090 process 1", "127.0.0.1:9090 process 1"),
    ]
    assert "its parent has no answer from it: not running" in found[1].why
    assert not_asked_finding([one for one, _ in each]) is None
    alone = {"version": "1", "rules": {}}
    assert each_process(alone, "a:1") == [(alone, "a:1")]
