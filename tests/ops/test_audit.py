"""Who has done what: written before it is done, and with what came of it."""

from typing import Any

import pytest
from typing_extensions import override

from gateway.access.principal import AccessRole, Principal
from gateway.engine.control.records import ControlRecord, DeadFilter, Selection, decode
from gateway.log.audit_records import ActOutcome
from gateway.log.base import Partition, Position
from gateway.log.topics import AUDIT_RETENTION, DAY, Topics
from gateway.model import LogUnavailableError
from gateway.ops.audit import Act, Actor, Auditor, UnreadableAct, read_acts, who
from gateway.ops.command_texts import dead_words, rejected_words, replay_words
from gateway.ops.control_client import ControlClient, current_outcome
from gateway.ops.rejected import RejectedFilter
from tests.builders import NOW
from tests.memory_log import MemoryLog

TOPICS = Topics()
ADA = Actor(who="ada", via="token", origin="192.0.2.7", is_proven=True)


async def a_log() -> MemoryLog:
    log = MemoryLog()
    await log.create(TOPICS.specs([]))
    return log


async def acts(log: MemoryLog) -> list[Act | UnreadableAct]:
    return [act async for act in read_acts(log, TOPICS)]


async def told(log: MemoryLog) -> list[tuple[str, str, str, str]]:
    """Return what was done, oldest first: what, on what, what came of it, and what is told of that."""
    found = [each for each in await acts(log) if isinstance(each, Act)]
    return [(act.record.what, act.record.on, act.outcome, act.detail) for act in reversed(found)]


async def control_records(log: MemoryLog) -> list[ControlRecord]:
    _, end = (await log.bounds(TOPICS.control))[0]
    scan = log.scan(Partition(TOPICS.control, 0), 0, end)
    return [decode(record.key, record.value) async for records in scan for record in records]


def test_it_is_kept_for_a_year_and_no_delivery_depends_on_it() -> None:
    (spec,) = [each for each in TOPICS.specs([]) if each.name == "gateway.audit"]
    assert (spec.retention, spec.is_best_effort, spec.compacted) == (AUDIT_RETENTION, True, False)
    assert AUDIT_RETENTION == 365 * DAY


async def test_each_command_is_recorded_with_who_from_where_and_why() -> None:
    log = await a_log()
    client = ControlClient(log, TOPICS, actor=ADA, why="the vendor is down")
    await client.pause("destination/ci")
    await client.resume("destination/ci")
    await client.kick("route/build")
    await client.resolve("replay", DeadFilter(route="build", reason="exhausted"))
    await client.resolve("drop", DeadFilter(ids=("dlv_1",)))
    await client.replay(Selection(route="build", since=NOW), {})
    (replay,) = [each.name for each in await control_records(log) if each.kind == "replay"]
    await client.cancel(replay)
    assert [each[:3] for each in await told(log)] == [
        ("pause", "destination/ci", ActOutcome.ACCEPTED),
        ("resume", "destination/ci", ActOutcome.ACCEPTED),
        ("kick", "route/build", ActOutcome.ACCEPTED),
        ("dead replay", "--route build --reason exhausted", ActOutcome.ACCEPTED),
        ("dead drop", "dlv_1", ActOutcome.ACCEPTED),
        ("replay", "--route build --from 2023-11-14T22:13:20.000Z", ActOutcome.ACCEPTED),
        ("replay --cancel", replay, ActOutcome.ACCEPTED),
    ]
    for act in await acts(log):
        assert isinstance(act, Act)
        record = act.record
        assert (record.who, record.via, record.origin, record.why, record.is_proven) == (
            *("ada", "token", "192.0.2.7", "the vendor is down"),
            True,
        )


async def test_nothing_is_done_that_cant_be_recorded() -> None:
    log = await a_log()
    client = ControlClient(log, TOPICS, actor=ADA)
    log.fail_appends(1)
    with pytest.raises(LogUnavailableError):
        await client.pause("destination/ci")
    assert await control_records(log) == []


async def test_without_the_topic_nothing_is_done() -> None:
    log = MemoryLog()
    await log.create([spec for spec in TOPICS.specs([]) if spec.name != TOPICS.audit])
    with pytest.raises(LogUnavailableError, match=r"gateway\.audit"):
        await ControlClient(log, TOPICS).kick("route/build")
    assert await control_records(log) == []
    assert await acts(log) == []


class FailingSecond(MemoryLog):
    """Refuses appends to the control topic, or to the audit topic after the first."""

    refused = ""

    @override
    async def append(self, topic: str, **record: Any) -> Position:
        if topic == self.refused and (topic == TOPICS.control or (await self.bounds(topic))[0][1]):
            raise LogUnavailableError(f"{topic}: no leader")
        return await super().append(topic, **record)


async def test_a_command_that_isnt_stored_has_failed_for_all_that_is_known() -> None:
    log = FailingSecond()
    await log.create(TOPICS.specs([]))
    log.refused = TOPICS.control
    with pytest.raises(LogUnavailableError):
        await ControlClient(log, TOPICS).kick("route/build")
    assert await told(log) == [("kick", "route/build", ActOutcome.FAILED, "gateway.control: no leader")]


async def test_what_came_of_an_act_may_be_unknown_and_is_not_claimed() -> None:
    log = FailingSecond()
    await log.create(TOPICS.specs([]))
    log.refused = TOPICS.audit
    await ControlClient(log, TOPICS).kick("route/build")
    assert len(await control_records(log)) == 1  # it is done all the same
    (act,) = await acts(log)
    assert isinstance(act, Act)
    assert (act.outcome, act.ended_at) == (ActOutcome.BEGUN, None)


async def test_what_wasnt_done_isnt_recorded() -> None:
    log = await a_log()
    client = ControlClient(log, TOPICS)
    assert await client.resume("route/build") is None
    await client.pause("route/build")
    await client.pause("route/build")  # it is paused already
    assert await client.cancel("1-2") is None
    assert [each[0] for each in await told(log)] == ["pause"]


async def test_the_end_of_a_command_is_recorded_by_who_waits_for_it() -> None:
    log = await a_log()
    client = ControlClient(log, TOPICS)
    placed = await client.resolve("drop", DeadFilter(route="build"))
    key, value = placed.command.with_state("done", count=3).encode()
    await log.append(TOPICS.control, key=key, value=value, headers=[])
    assert await client.finished(placed, timeout=0.0) is not None
    ((what, _, outcome, detail),) = await told(log)
    assert (what, outcome, detail) == ("dead drop", ActOutcome.DONE, f"{placed.command.key}: 3 deliveries")


async def test_the_end_of_one_that_nobody_waited_for_is_known_by_its_own_record() -> None:
    log = await a_log()
    client = ControlClient(log, TOPICS)
    dropped = await client.resolve("drop", DeadFilter(route="build"))
    await client.kick("route/build")
    key, value = dropped.command.with_state("done", count=1).encode()
    await log.append(TOPICS.control, key=key, value=value, headers=[])
    control = await client.control()
    kick, drop = [current_outcome(act, control) for act in await acts(log) if isinstance(act, Act)]
    assert (kick.outcome, kick.detail) == (ActOutcome.ACCEPTED, "kick/route/build")  # a later one has the same name
    assert (drop.outcome, drop.detail) == (ActOutcome.DONE, f"{dropped.command.key}: 1 delivery")


async def test_acts_are_read_newest_first_and_from_a_time_on_with_what_cant_be_read() -> None:
    at = NOW
    log = MemoryLog(now=lambda: at)
    await log.create(TOPICS.specs([]))
    auditor = Auditor(log, TOPICS, ADA)
    await auditor.begin("pause", "route/a")
    at = NOW + 60
    await log.append(TOPICS.audit, key=b"foreign", value=b"x", headers=[])
    at = NOW + 120
    await auditor.record_outcome(await auditor.begin("pause", "route/b"), ActOutcome.NOTHING)
    shown = [each.record.on if isinstance(each, Act) else each.position for each in await acts(log)]
    assert shown == ["route/b", "gateway.audit/0@1", "route/a"]
    recent = [each async for each in read_acts(log, TOPICS, since=NOW + 90)]
    assert len(recent) == 1


def test_who_runs_a_command_is_claimed_and_a_principal_is_who_has_proved_it() -> None:
    actor = Actor.of_command()
    assert (actor.who, actor.via, actor.is_proven) == (who(), "command", False)
    assert actor.who.endswith(f"@{actor.origin}")
    for via, is_proven in (("token", True), ("loopback", False)):
        principal = Principal(name="ci", role=AccessRole.OPERATOR, via=via)
        assert Actor.of(principal, "192.0.2.7") == Actor(who="ci", via=via, origin="192.0.2.7", is_proven=is_proven)


def test_what_a_command_is_about_is_told_in_the_words_of_the_cli_command() -> None:
    assert dead_words(DeadFilter()) == "--all"
    many = DeadFilter(ids=tuple([f"dlv_{number}" for number in range(12)]), since=NOW)
    assert dead_words(many).endswith("dlv_9 and 2 more since 2023-11-14T22:13:20.000Z")
    assert rejected_words(RejectedFilter(source="github", reason="bad_signature", positions=("0@1",))) == (
        "0@1 --source github --reason bad_signature"
    )
    selection = Selection(route="build", destination="ci", source="github", since=NOW, until=NOW + 1, undelivered=True)
    assert replay_words(selection) == (
        "--route build --destination ci --source github --from 2023-11-14T22:13:20.000Z"
        " --to 2023-11-14T22:13:21.000Z --undelivered"
    )


async def test_a_kick_that_has_ended_isnt_said_to_have_done_nothing_on_ordered_routes() -> None:
    log = MemoryLog()
    await log.create(TOPICS.specs([], [("mirror", "hub")]))
    client = ControlClient(log, TOPICS, actor=ADA)
    for name, unknown in (
        ("route/mirror", "nothing waited for a retry; what came of it on ordered routes isn't known yet"),
        ("destination/hub", "nothing waited for a retry; what came of it on ordered routes isn't known yet"),
        ("route/build", "0 deliveries"),
    ):
        placed = await client.kick(name)
        assert placed.command.by == "ada"
        key, value = placed.command.with_state("done").encode()
        await log.append(TOPICS.control, key=key, value=value, headers=[])
        done = await client.finished(placed, timeout=0.0)
        assert done is not None
        assert (await told(log))[-1] == ("kick", name, ActOutcome.DONE, f"kick/{name}: {unknown}")
        await client.record_ordered_outcome(placed, done, "; on ordered routes 3 tried now, all delivered")
        came = f"kick/{name}: nothing waited for a retry; on ordered routes 3 tried now, all delivered"
        assert (await told(log))[-1] == ("kick", name, ActOutcome.DONE, came)
