"""One event that is delivered again: to whom, how often whatever is killed, and what is told of it."""

import asyncio
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import orjson
import pytest
import structlog
from structlog.testing import capture_logs

from gateway.engine.control import redelivery_records
from gateway.engine.control.records import ControlRecord, decode
from gateway.engine.control.redelivery_records import Redelivery, RedeliveryResult
from gateway.engine.control.state import Control
from gateway.engine.jobs import injector, redeliver, runner
from gateway.engine.jobs.redelivery_plan import MOST
from gateway.engine.jobs.runner import MAX_JOBS_PER_KIND
from gateway.log.base import Partition, Record
from gateway.log.records import decode_event
from gateway.model import NewerRecordError, RecordMetadata, UndecodableRecordError
from gateway.ops.log_search import Found
from gateway.ops.redeliveries import cancel_redelivery, progress_of
from gateway.ops.redeliveries import redeliver as ask
from tests.builders import a_policy, a_route, an_event
from tests.engine.test_replay import TIER, MortalLog, Owner, a_replay, events_of, injected, owning
from tests.engine.test_replay import ended as replayed
from tests.engine.test_worker import EVENTS, TOPICS, World, a_world, publish, rules_of, running, virtual
from tests.virtual_time import now, run


def place_of(world: World, event: str) -> tuple[Partition, Record]:
    for partition, record in _records(world):
        if decode_event(record).id == event:
            return partition, record
    raise AssertionError(event)


def _records(world: World) -> list[tuple[Partition, Record]]:
    segments = world.log._state.segments
    return [(each, record) for each in segments if each.topic == EVENTS for record in segments[each].records]


async def asked(world: World, event: str = "evt_0", *, name: str = "x", **fields: Any) -> ControlRecord:
    """Ask for an event to be delivered again, as a command does that sees nothing of what was asked for before."""
    return (
        await ask(world.log, TOPICS, Control(), Found(*place_of(world, event)), name=name, by="me", **fields)
    ).command


async def ended(control: Control, name: str = "x", *, within: float = 60.0) -> ControlRecord:
    until = now() + within
    while (found := progress_of(control, name)) is None or not found.is_final:
        assert now() < until, "expected the redelivery to end"
        await asyncio.sleep(0.05)
    return replace(found.command, results=found.results)


def targets(world: World) -> Counter[tuple[str, str, str]]:
    stored = [one.delivery for one in world.stored(TIER)]
    return Counter([(each.event.id, each.route, each.destination) for each in stored])


def queued(*targets: tuple[str, str]) -> tuple[RedeliveryResult, ...]:
    return tuple([RedeliveryResult(route=route, destination=to, outcome="queued") for route, to in targets])


@virtual
async def test_an_event_goes_to_all_destinations_that_the_active_rules_give_it() -> None:
    routes = a_route(match={"type": "push"}, to=("ci", "audit")), a_route("all", to=("chat",))
    world = await a_world(*routes, a_route("issues", match={"type": "issues"}))
    await events_of(world, 3, type="push")
    await asyncio.sleep(100)
    async with owning(world) as control:
        command = await asked(world, "evt_1")
        done = await ended(control)
    assert (done.state, done.count, done.detail) == ("done", 3, "")
    assert done.results == queued(("build", "ci"), ("build", "audit"), ("all", "chat"))
    assert set(targets(world)) == {("evt_1", each.route, each.destination) for each in done.results}
    for one in world.stored(TIER):
        assert one.metadata == RecordMetadata(replay="x")
        assert command.at <= one.delivery.replayed_at == one.delivery.due <= now()


@virtual
async def test_a_redelivered_delivery_keeps_its_id_and_restarts_its_attempts() -> None:
    policy = a_policy(schedule=(1.0,), max_attempts=2, max_age=60.0)
    world = await a_world(a_route(retry=policy), ci=[503, 503, 503, 200])
    async with owning(world) as control, running(world, world.worker(control)):
        await events_of(world, 1)
        await asyncio.sleep(600)
        (dead,) = world.dead()
        await asked(world)
        await ended(control)
        await asyncio.sleep(60)
    assert [number for _, _, number in world.client.made] == [1, 2, 1, 2]
    assert {one.delivery.id for one in world.stored(TIER)} == {dead.delivery.id}


@virtual
async def test_events_that_share_an_identity_get_the_ids_that_a_replay_gives_them() -> None:
    world = await a_world(a_route())
    shared = "evt_" + "0" * 12 + "8" + "1" * 19
    await world.put(*[an_event(id=shared, body=b"%d" % number, received_at=now()) for number in range(3)])
    async with owning(world) as control:
        await a_replay(world, "all")
        await replayed(control, "all")
        by_replay = {one.delivery.event.body: one.delivery.id for one in world.stored(TIER)}
        for number, (partition, record) in enumerate(_records(world)):
            await ask(world.log, TOPICS, Control(), Found(partition, record), name=f"r{number}")
            await ended(control, f"r{number}")
    by_redelivery = {one.delivery.event.body: one.delivery.id for one in world.stored(TIER)[3:]}
    assert by_redelivery == by_replay
    assert len(set(by_replay.values())) == 3


@virtual
async def test_a_route_and_a_destination_narrow_it() -> None:
    world = await a_world(a_route(to=("ci", "audit")), a_route("all", to=("ci", "chat")))
    await events_of(world, 1)
    async with owning(world) as control:
        await asked(world, name="a", destination="ci")
        assert (await ended(control, "a")).results == queued(("build", "ci"), ("all", "ci"))
        await asked(world, name="b", route="all")
        assert (await ended(control, "b")).results == queued(("all", "ci"), ("all", "chat"))
        await asked(world, name="c", route="build", destination="audit")
        assert (await ended(control, "c")).results == queued(("build", "audit"))


@virtual
async def test_what_cannot_be_delivered_again_is_told_with_its_reason() -> None:
    world = await a_world(a_route(match={"type": "push"}), a_route("none", match={"type": "none"}, to=("chat",)))
    await world.put(an_event(id="evt_0", type="push"), an_event(id="evt_1", type="pull"))
    world.log.skip_offsets(place_of(world, "evt_0")[0], 1)
    command = await asked(world, name="elsewhere")
    assert command.redelivery is not None
    elsewhere: dict[str, dict[str, Any]] = {
        "other": {"event": "evt_5"},
        "gone": {"offset": command.redelivery.offset + 5},
    }
    async with owning(world) as control:
        refused: tuple[tuple[str, dict[str, str], str], ...] = (
            ("route", {"route": "rout"}, "expected a route of the active rules, got rout"),
            ("to", {"destination": "cia"}, "expected a destination of the active rules, got cia"),
            ("unmatched", {"route": "none"}, "expected route none to take evt_0, got build, by the active rules"),
            (
                "beside",
                {"destination": "chat"},
                "expected a route to send evt_0 to chat, got build, by the active rules",
            ),
        )
        for name, fields, told in refused:
            await asked(world, name=name, **fields)
            done = await ended(control, name)
            assert (done.state, done.detail, done.results) == ("cancelled", told, ())
        await asked(world, "evt_1", name="nowhere")
        detail = (await ended(control, "nowhere")).detail
        assert detail == "expected a route to take evt_1, got none, by the active rules"
        for name, changed in elsewhere.items():
            await publish(world, replace(command, name=name, redelivery=replace(command.redelivery, **changed)))
        assert "got another record: its topic has been recreated" in (await ended(control, "other")).detail
        assert "got no record: the log has deleted it" in (await ended(control, "gone")).detail
    assert set(targets(world)) == {("evt_0", "build", "ci")}  # by the first of them


@virtual
async def test_another_event_in_a_recreated_topic_is_not_the_one_that_was_asked_for() -> None:
    """It has the same id: only the checksum tells."""
    world = await a_world(a_route())
    await world.put(an_event(id="evt_0", body=b"1"))
    await asked(world)
    await world.log.recreate(EVENTS)
    await world.put(an_event(id="evt_0", body=b"2"))
    async with owning(world) as control:
        assert "its topic has been recreated" in (await ended(control)).detail
    assert not world.stored(TIER)


@virtual
async def test_an_event_with_too_many_deliveries_is_refused_as_a_whole() -> None:
    world = await a_world(*[a_route(f"r{number}", to=("ci",)) for number in range(MOST + 1)])
    await events_of(world, 1)
    async with owning(world) as control:
        await asked(world)
        done = await ended(control)
        assert (done.state, done.count) == ("cancelled", 0)
        assert f"expected at most {MOST} deliveries, got {MOST + 1}" in done.detail
        await asked(world, name="y", route="r7")
        assert (await ended(control, "y")).count == 1
    assert len(world.stored(TIER)) == 1


@virtual
async def test_an_event_whose_route_cannot_be_decided_is_a_dead_letter_as_a_new_one_is() -> None:
    world = await a_world(a_route(when="body.ref + 1 > 2"), a_route("all", to=("chat",)))
    await events_of(world, 1)
    async with owning(world) as control:
        await asked(world)
        done = await ended(control)
    assert done.count == 1
    assert {(each.route, each.outcome) for each in done.results} == {("build", "dead"), ("all", "queued")}
    assert [stored.metadata.dead_reason for stored in world.dead()] == ["expression_error"]


@virtual
async def test_what_is_paused_is_told_and_parked_until_it_is_resumed() -> None:
    world = await a_world(a_route(to=("ci", "audit")))
    async with owning(world) as control, running(world, world.worker(control)):
        await events_of(world, 1)
        await asyncio.sleep(5)
        await publish(world, ControlRecord(kind="pause", name="destination/ci", state="paused", at=now()))
        await asyncio.sleep(1)
        await asked(world)
        done = await ended(control)
        paused = {each.destination: each.paused_by for each in done.results}
        assert paused == {"ci": "destination/ci", "audit": ""}
        await asyncio.sleep(20)
        assert len(world.stored(TOPICS.parked)) == 1
        assert Counter(to for to, _, _ in world.client.made) == {"ci": 1, "audit": 2}
        await publish(world, ControlRecord(kind="pause", name="destination/ci", state="resuming", at=now()))
        await asyncio.sleep(30)
    assert Counter(to for to, _, _ in world.client.made) == {"ci": 2, "audit": 2}


# How often


@virtual
async def test_what_is_asked_for_again_under_its_name_is_done_once() -> None:
    """Before it is carried out, after it, after it by another owner, and once only its checkpoint is left."""
    world = await a_world(a_route(to=("ci", "audit")))
    await events_of(world, 1)
    await asked(world)
    await asked(world)
    async with owning(world) as control:
        first = await ended(control)
        await asked(world)
        await asyncio.sleep(5)
        assert (await ended(control)).results == first.results
    await asked(world)
    async with owning(world) as control:
        await asyncio.sleep(5)
        again = await ended(control)
    assert (again.state, again.count, again.results) == ("done", 2, first.results)
    assert set(targets(world).values()) == {1}


@virtual
async def test_a_refused_one_stays_refused_under_its_name() -> None:
    """Or the answer that was given to the first who asked would be wrong."""
    world = await a_world(a_route())
    await events_of(world, 1)
    async with owning(world) as control:
        await asked(world, route="late")
        assert (await ended(control)).state == "cancelled"
        world.rules = rules_of(a_route("late"))
        await asked(world, route="late")
        await asyncio.sleep(5)
        assert (await ended(control)).state == "cancelled"
    assert not world.stored(TIER)


@virtual
async def test_it_does_not_wait_for_the_turn_of_a_replay() -> None:
    world = await a_world(a_route())
    await events_of(world, 50)
    async with owning(world) as control:
        await a_replay(world, "slow", rate=0.1)
        await asyncio.sleep(20)
        await asked(world, "evt_40")
        done = await ended(control, within=2.0)
        assert (done.state, done.count) == ("done", 1)
        assert control.commands["replay/slow"].is_pending


@virtual
async def test_it_waits_while_the_shortest_tier_is_half_full() -> None:
    world = await a_world(a_route())
    await events_of(world, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(redeliver, "BACKLOG", 1)
        async with owning(world) as control:
            await asked(world, name="first")
            await ended(control, "first")
            await asked(world, name="second")
            await asyncio.sleep(10)
            assert control.commands["redeliver/second"].is_pending
            async with running(world, world.worker(control)):
                assert (await ended(control, "second")).count == 1


async def _killed_at(append: int, *, is_stored: bool) -> tuple[Counter[tuple[str, str, str]], ControlRecord]:
    world = await a_world(*[a_route(f"r{number}", to=("ci", "audit")) for number in range(5)])
    await events_of(world, 1)
    await asked(world)
    mortal = MortalLog(world.log, appends=append, is_stored=is_stored)
    async with owning(world, mortal):
        async with asyncio.timeout(60):
            await mortal.died.wait()
        world.log.fail_commits(1)
    world.log.fail_commits(0)
    async with owning(world) as control:
        done = await ended(control)
    return targets(world), done


@pytest.mark.parametrize("is_stored", [False, True], ids=["unstored", "stored"])
def test_an_owner_killed_at_any_append_skips_nothing_and_repeats_nothing_that_a_checkpoint_has(
    *, is_stored: bool
) -> None:
    """Its appends: one for the clock, ten deliveries, the checkpoint and the end."""
    for append in range(1, 13):
        found, done = run(_killed_at(append, is_stored=is_stored))
        assert len(found) == done.count == len(done.results) == 10, f"killed at append {append}"
        assert max(found.values()) <= 2, f"killed at append {append}"
        if append > 12 or (append == 12 and is_stored):  # its checkpoint was stored
            assert max(found.values()) == 1, f"killed at append {append}"


@virtual
async def test_an_owner_that_releases_the_jobs_repeats_nothing() -> None:
    world = await a_world(*[a_route(f"r{number}", to=("ci",)) for number in range(20)])
    await events_of(world, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(redeliver, "APPENDS_AT_ONCE", 3)
        patch.setattr(redeliver, "BACKLOG", 7)  # so it stops in the middle
        first = Owner(world)
        await first.start()
        await asked(world)
        await asyncio.sleep(5)
        assert 0 < len(world.stored(TIER)) < 20
        await first.stop_jobs()
        reached = progress_of(first.control, "x")
        assert reached is not None
        assert 0 < len(reached.results) == len(world.stored(TIER))
        patch.setattr(redeliver, "BACKLOG", injector.BACKLOG)
        async with owning(world) as control:
            done = await ended(control)
    await first.stop()
    assert (done.count, set(targets(world).values())) == (20, {1})


@virtual
async def test_a_cancelled_one_says_what_it_had_injected() -> None:
    world = await a_world(*[a_route(f"r{number}", to=("ci",)) for number in range(20)])
    await events_of(world, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(redeliver, "APPENDS_AT_ONCE", 3)
        patch.setattr(redeliver, "BACKLOG", 7)
        async with owning(world) as control:
            await asked(world)
            await asyncio.sleep(5)
            stored = len(world.stored(TIER))
            assert await cancel_redelivery(world.log, TOPICS, control, "x") is not None
            done = await ended(control)
            assert (done.state, len(done.results)) == ("cancelled", stored)
            patch.setattr(redeliver, "BACKLOG", injector.BACKLOG)
            await asked(world)  # and stays so
            await asyncio.sleep(5)
            assert (await ended(control)).state == "cancelled"
            assert await cancel_redelivery(world.log, TOPICS, control, "x") is None
    assert 0 < stored == len(world.stored(TIER)) < 20


@virtual
async def test_one_that_is_cancelled_before_anybody_has_begun_is_acknowledged() -> None:
    world = await a_world(a_route())
    await events_of(world, 1)
    command = await asked(world)
    assert await cancel_redelivery(world.log, TOPICS, Control([command]), "x") is not None
    async with owning(world) as control:
        done = await ended(control)
    assert (done.state, done.results, world.stored(TIER)) == ("cancelled", (), [])


# Beside others


@virtual
async def test_events_in_a_partition_without_a_leader_wait_without_the_others() -> None:
    world = await a_world(a_route())
    await events_of(world, 60)
    lost, _ = place_of(world, "evt_0")
    waiting = [decode_event(record).id for each, record in _records(world) if each == lost]
    (other,) = [decode_event(record).id for each, record in _records(world) if each != lost][:1]
    assert len(waiting) > MAX_JOBS_PER_KIND
    world.log.lose_leader(lost)
    async with owning(world) as control:
        for name in waiting:
            await asked(world, name, name=name)
        await asyncio.sleep(1)
        await asked(world, other, name="other")
        assert (await ended(control, "other")).count == 1
        assert all(control.commands[f"redeliver/{name}"].is_pending for name in waiting)
        world.log.find_leader(lost)
        for name in waiting:
            assert (await ended(control, name)).count == 1
    assert set(injected(world).values()) == {1}


@virtual
async def test_a_replay_of_the_undelivered_leaves_out_what_was_redelivered() -> None:
    """To the destinations that got it, alone."""
    world = await a_world(a_route("other", to=("audit",)))
    async with owning(world) as control:
        async with running(world, world.worker(control)):
            await events_of(world, 4)
            await asyncio.sleep(5)
        world.rules = rules_of(a_route("other", to=("audit",)), a_route(to=("ci", "chat")))
        await asked(world, "evt_1", route="build", destination="ci")
        await ended(control)
        await a_replay(world, "rest", undelivered=True)
        await replayed(control, "rest")
    by_build = [one.delivery for one in world.stored(TIER) if one.delivery.route == "build"]
    found = Counter([(each.event.id, each.destination) for each in by_build])
    assert found == Counter([(f"evt_{number}", to) for number in range(4) for to in ("ci", "chat")])


@virtual
async def test_what_was_delivered_again_is_known_for_as_long_as_the_log_has_it() -> None:
    """By a redelivery as by a replay: however long that is, a replay of the undelivered leaves it out."""
    world = await a_world(a_route("other", to=("audit",)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "KEEP_FOR", 60.0)
        patch.setattr(runner, "KEEP_COMMANDS_FOR", 60.0)
        async with owning(world) as control:
            async with running(world, world.worker(control)):
                await events_of(world, 4)
                await asyncio.sleep(5)
            world.rules = rules_of(a_route("other", to=("audit",)), a_route())
            await asked(world, "evt_1")
            await ended(control)
            await asyncio.sleep(100)
            for name, count in (("rest", 3), ("again", 0), ("later", 0)):
                await a_replay(world, name, undelivered=True)
                assert (await replayed(control, name)).count == count
                await asyncio.sleep(100)
            partition, offset = place_of(world, "evt_1")[0], place_of(world, "evt_1")[1].offset
            world.log.delete_below(partition, offset + 1)
            await asyncio.sleep(20)
            assert "redeliver/x" not in control.commands
            for number, (_, end) in (await world.log.bounds(EVENTS)).items():
                world.log.delete_below(Partition(EVENTS, number), end)
            await asyncio.sleep(20)
            assert not control.commands
    assert injected(world).total() == 5


@virtual
async def test_of_what_was_redelivered_long_ago_the_newest_are_remembered() -> None:
    """However long the log has their events: each process keeps them in memory."""
    world = await a_world(a_route())
    await events_of(world, 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "KEEP_FOR", 60.0)
        patch.setattr(runner, "MAX_KEPT", 2)
        async with owning(world) as control:
            for number in range(5):
                await asked(world, f"evt_{number}", name=f"r{number}")
            await asyncio.sleep(50)
            assert len(control.commands) == 5
            await asyncio.sleep(30)
            assert sorted(control.commands) == ["redeliver/r3", "redeliver/r4"]


@virtual
async def test_what_was_redelivered_from_a_topic_that_has_been_recreated_was_another_event() -> None:
    world = await a_world(a_route("other", to=("audit",)))
    async with owning(world) as control:
        async with running(world, world.worker(control)):
            await events_of(world, 1)
            await asyncio.sleep(5)
            world.rules = rules_of(a_route("other", to=("audit",)), a_route())
            await asked(world, route="build")
            await ended(control)
            world.rules = rules_of(a_route("other", to=("audit",)))
            await world.log.recreate(EVENTS)
            await asyncio.sleep(600)
            await events_of(world, 1)
            await asyncio.sleep(5)
        before = len(world.stored(TIER))
        world.rules = rules_of(a_route("other", to=("audit",)), a_route())
        await a_replay(world, "rest", undelivered=True)
        await asyncio.sleep(10)
    assert before == 1
    assert [one.metadata.replay for one in world.stored(TIER)] == ["x", "rest"]


@virtual
async def test_many_that_wait_delay_no_other_and_are_told_once_each() -> None:
    """Their retries alone would take all turns."""
    world = await a_world(a_route())
    await events_of(world, 60)
    lost, _ = place_of(world, "evt_0")
    (other,) = [decode_event(record).id for each, record in _records(world) if each != lost][:1]
    world.log.lose_leader(lost)
    with capture_logs() as lines:
        world.logger = structlog.get_logger()
        async with owning(world) as control:
            for number in range(40):
                await asked(world, "evt_0", name=f"w{number}")
            await asyncio.sleep(60)
            await asked(world, other, name="other")
            assert (await ended(control, "other", within=2.0)).count == 1
            await asyncio.sleep(120)
    retried = Counter([line["command"] for line in lines if line["event"] == "job_retried"])
    assert set(retried.values()) == {1}


@virtual
async def test_a_partition_that_was_waited_for_in_vain_is_read_for_the_next() -> None:
    """Nobody waits for it any more in the meantime, as the redelivery that did has been cancelled."""
    world = await a_world(a_route())
    await events_of(world, 1)
    partition, _ = place_of(world, "evt_0")
    world.log.lose_leader(partition)
    async with owning(world) as control:
        await asked(world, name="first")
        await asyncio.sleep(redeliver.RETRY_INTERVAL / 2)
        await cancel_redelivery(world.log, TOPICS, control, "first")
        world.log.find_leader(partition)
        await asyncio.sleep(redeliver.RETRY_INTERVAL / 2 + 1)
        await asked(world, name="second")
        assert (await ended(control, "second", within=2.0)).count == 1


@virtual
async def test_hundreds_of_events_of_a_newer_version_delay_no_other() -> None:
    world = await a_world(a_route())
    await events_of(world, 1)
    command = await asked(world)
    partition, record = place_of(world, "evt_0")
    headers = [(name, b"9" if name == "gw_v" else value) for name, value in record.headers]
    position = await world.log.append(EVENTS, key=record.key, value=record.value, headers=headers)
    assert position.partition == partition.number
    assert command.redelivery is not None
    newer = replace(command.redelivery, offset=position.offset)
    for number in range(300):
        await publish(world, replace(command, name=f"newer-{number}", redelivery=newer, last_records={}))
    async with owning(world) as control:
        await asyncio.sleep(60)
        await asked(world, name="other")
        assert (await ended(control, "other", within=2.0)).count == 1


@virtual
async def test_events_of_a_newer_version_wait_for_a_process_that_reads_them() -> None:
    world = await a_world(a_route())
    await events_of(world, 1)
    command = await asked(world)
    partition, record = place_of(world, "evt_0")
    headers = [(name, b"9" if name == "gw_v" else value) for name, value in record.headers]
    position = await world.log.append(EVENTS, key=record.key, value=record.value, headers=headers)
    assert position.partition == partition.number
    assert command.redelivery is not None
    newer = replace(command.redelivery, offset=position.offset)
    await publish(world, replace(command, name="newer", redelivery=newer, last_records={}))
    async with owning(world) as control:
        await ended(control)
        await asyncio.sleep(30)
        assert control.commands["redeliver/newer"].is_pending


# Versions


def _decoded(record: ControlRecord) -> ControlRecord:
    return decode(*record.encode())


def test_a_command_and_its_answer_are_read_as_they_were_written() -> None:
    asked = Redelivery(
        event="evt_1", partition="gateway.events.x/3", offset=7, route="r", destination="d", reason="why"
    )
    results = (*queued(("r", "d")), RedeliveryResult(route="r", destination="e", outcome="dead"))
    results = (*results, RedeliveryResult(route="r", destination="f", outcome="queued", paused_by="route/r"))
    command = ControlRecord(kind="redeliver", name="x", state="requested", at=1.0, redelivery=asked)
    for record in (command, command.with_state("done", count=1, results=results)):
        assert _decoded(record) == record
    checkpoint = ControlRecord(kind="checkpoint", name=command.key, state="done", at=1.0, results=results)
    assert _decoded(checkpoint) == checkpoint
    assert orjson.loads(command.encode()[1])["v"] == 2
    assert orjson.loads(checkpoint.encode()[1])["v"] == 1  # an older owner keeps it


@pytest.mark.parametrize(
    "changed",
    [
        {"redelivery": {"event": "e", "partition": "t/x", "offset": 0}},
        {"redelivery": {"event": "e", "partition": "t", "offset": 0}},
        {"redelivery": {"event": "e", "partition": "t/0", "offset": -1}},
        {"redelivery": {"event": "e", "partition": "t/0", "offset": 0, "only": "some"}},
        {"redelivery": {"event": 1, "partition": "t/0", "offset": 0}},
        {"redelivery": None},
        {"results": [{"route": "r", "destination": "d", "outcome": "delivered"}]},
        {"results": {"route": "r"}},
    ],
)
def test_a_record_that_no_gateway_has_written_is_undecodable(changed: dict[str, Any]) -> None:
    asked = Redelivery(event="e", partition="t/0", offset=0)
    key, value = ControlRecord(kind="redeliver", name="x", state="requested", at=1.0, redelivery=asked).encode()
    with pytest.raises(UndecodableRecordError):
        decode(key, orjson.dumps(orjson.loads(value) | changed))


@virtual
async def test_one_of_a_newer_version_is_left_to_an_owner_that_knows_it() -> None:
    """As an owner of an older version leaves any: it neither acts on it nor deletes it."""
    world = await a_world(a_route())
    await events_of(world, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(redelivery_records, "FORMAT", 3)
        command = await asked(world)
    key, value = command.encode()
    newer = orjson.dumps(orjson.loads(value) | {"v": 3})
    with pytest.raises(NewerRecordError):
        decode(key, newer)
    async with owning(world) as control:
        await asyncio.sleep(600)
        assert control.newer.keys() == {"redeliver/x"}
        await a_replay(world, "z")  # others go on
        await asyncio.sleep(10)
        assert control.commands["replay/z"].state == "done"
        assert {record.key for record in world.log.records(TOPICS.control)} >= {b"redeliver/x"}
    assert injected(world) == {"evt_0": 1, "evt_1": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(redelivery_records, "FORMAT", 3)
        async with owning(world) as control:
            await ended(control)
    assert injected(world) == {"evt_0": 2, "evt_1": 1}


def test_an_older_version_takes_it_for_one_of_a_newer() -> None:
    """It knows no such kind, and version 1 alone: so it raises what it raises of all that is newer."""
    asked = Redelivery(event="e", partition="t/0", offset=0)
    _, value = ControlRecord(kind="redeliver", name="x", state="requested", at=1.0, redelivery=asked).encode()
    control = Control()
    with pytest.raises(NewerRecordError):
        control.decode_and_apply(b"unheard-of/x", value)
    assert control.newer.keys() == {"unheard-of/x"}


@virtual
async def test_a_poisoned_one_ends_and_stops_no_other() -> None:
    world = await a_world(a_route())
    await events_of(world, 1)

    def fails(*_: object) -> Sequence[object]:
        raise ZeroDivisionError("a bug")

    with pytest.MonkeyPatch.context() as patch, capture_logs():
        patch.setattr(redeliver, "plan", fails)
        async with owning(world) as control:
            await asked(world)
            done = await ended(control)
    assert (done.state, done.detail.partition(":")[2]) == (
        "cancelled",
        " ZeroDivisionError, a bug; the log has its traceback",
    )
    async with owning(world) as control:
        await asked(world, name="y")
        assert (await ended(control, "y")).count == 1


@virtual
async def test_ended_ones_are_forgotten_in_time_and_waiting_ones_are_not() -> None:
    world = await a_world(a_route())
    await events_of(world, 8)
    partition, record = place_of(world, "evt_0")
    other = next(name for name in [f"evt_{n}" for n in range(1, 8)] if place_of(world, name)[0] != partition)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "KEEP_FOR", 60.0)
        async with owning(world) as control:
            await asked(world)
            await ended(control)
            world.log.lose_leader(place_of(world, other)[0])
            await asked(world, other, name="waits")
            world.log.delete_below(partition, record.offset + 1)
            await asyncio.sleep(50)
            assert control.last_checkpoint("redeliver/x") is not None
            await asyncio.sleep(30)
            assert "redeliver/x" not in control.commands
            assert control.last_checkpoint("redeliver/x") is None
            assert control.commands["redeliver/waits"].is_pending


def test_an_early_checkpoint_that_is_appended_late_takes_nothing_back() -> None:
    asked = Redelivery(event="e", partition="t/0", offset=0)
    command = ControlRecord(kind="redeliver", name="x", state="requested", at=1.0, redelivery=asked)
    checkpoint = ControlRecord(kind="checkpoint", name=command.key, state="requested", at=1.0)
    early = replace(checkpoint, results=queued(("r", "a")))
    last = replace(checkpoint, state="done", results=queued(("r", "a"), ("r", "b")))
    control = Control([command, early, last, early])
    assert control.last_checkpoint(command.key) == last
    assert [*control.overwritten_checkpoints()] == [last]
    control.apply(last)
    assert not control.overwritten_checkpoints()
