"""Destinations that are down for long, and commands given at a bad moment; in virtual time."""

import asyncio
from collections import Counter
from dataclasses import replace

import pytest
import structlog

from gateway.engine.control.records import ControlRecord, DeadFilter
from gateway.log.base import Commit, Partition
from gateway.log.records import encode_delivery, encode_event
from gateway.model import (
    NO_METADATA,
    EventId,
    Result,
)
from tests.builders import a_delivery, a_destination, a_policy, a_route, an_attempt, an_event
from tests.engine.test_worker import (
    EVENTS,
    TOPICS,
    World,
    a_world,
    events,
    operated,
    publish,
    rules_of,
    running,
    virtual,
)
from tests.virtual_time import now

pytestmark = pytest.mark.rotated(share=1 / 5, group="outages")

PATIENT = a_policy(schedule=(5.0, 30.0, 120.0), max_attempts=20, max_age=3600.0)


@virtual
async def test_the_backlog_of_a_failing_destination_expires_and_is_rarely_rewritten() -> None:
    world = await a_world(a_route(retry=PATIENT), ci=[Result.CONNECT])
    await world.put(*events(300))
    async with running(world):
        await world.doze(4 * 3600)
    tiers = sum(len(world.log.records(TOPICS.retry(tier))) for tier in ("5s", "20s", "80s", "5m", "20m", "80m", "5h"))
    assert tiers < 300 * 60
    tried = {event for _, event, _ in world.client.made}
    assert len(world.dead()) >= len(tried) - 5, "what was tried once ends when its time is over"
    assert {stored.metadata.dead_reason for stored in world.dead()} == {"expired"}


@virtual
async def test_a_destinations_backlog_returns_at_its_healthy_pace() -> None:
    slow = a_destination("ci", url="http://127.0.0.1:1/ci", timeout=30.0)
    world = await a_world(a_route(retry=replace(PATIENT, max_age=86400.0)), destinations=[slow], ci=[1e9])
    began = now()
    async with running(world):
        for index in range(600):
            await world.put(an_event(id=f"evt_{index}", received_at=now()))
            await asyncio.sleep(1.0)
        world.client.scripts["ci"] = [0.01]
        recovered = now()
        await asyncio.sleep(recovered - began + 700)
        done = {event for _, event, _ in world.client.made[-600:]}
        assert len(done) >= 590
        assert world.client.at[-1] - recovered < 2 * (recovered - began)


@virtual
async def test_a_delivery_past_max_age_is_not_dead_lettered_before_the_probe_responds() -> None:
    world = await a_world(a_route(retry=PATIENT), ci=[Result.CONNECT])
    await world.put(*events(20))
    async with running(world):
        await world.doze(3700)  # its time is over
        world.client.scripts["ci"] = [0.3]
        dead = len(world.dead())
        await world.doze(1300)
        assert len(world.dead()) == dead


@virtual
async def test_a_delivery_past_max_age_beside_a_new_probe_is_not_dead_lettered() -> None:
    world = await a_world(a_route(retry=PATIENT), ci=[*[503] * 5, 0.6, 200])
    old = [
        a_delivery(
            event=an_event(id=f"evt_old_{number}", received_at=now() - 7200),
            attempts=(an_attempt(at=now() - 7200),),
            successor=1,
            due=now() + 5.3 + number / 10,
        )
        for number in range(2)
    ]
    for each in old:
        await world.log.append(
            TOPICS.retry("5s"), key=b"ci", value=each.event.body, headers=encode_delivery(each, NO_METADATA, at=now())
        )
    async with running(world):
        await world.put(*[an_event(id=f"evt_later_{number}", received_at=now()) for number in range(5)])
        await asyncio.sleep(60)
    assert world.dead() == []
    assert {(event, number) for _, event, number in world.client.made} >= {("evt_old_0", 2), ("evt_old_1", 2)}


@virtual
async def test_a_delivery_past_max_age_before_a_probe_is_not_dead_lettered() -> None:
    world = await a_world(a_route(retry=PATIENT), ci=[*[503] * 5, 200])
    tried = an_attempt(at=now() - 7200)
    old = a_delivery(event=an_event(received_at=now() - 7200), attempts=(tried,), successor=1, due=now() + 6)
    await world.log.append(
        TOPICS.retry("5s"), key=b"ci", value=old.event.body, headers=encode_delivery(old, NO_METADATA, at=now())
    )
    async with running(world):
        await asyncio.sleep(5)
        await world.put(*[an_event(id=f"evt_later_{number}", received_at=now()) for number in range(5)])
        await asyncio.sleep(0.5)
        assert len(world.client.made) == 5
        await asyncio.sleep(30)
    assert world.dead() == []
    assert ("ci", old.event.id, 2) in world.client.made


@virtual
async def test_a_hundred_hanging_destinations_leave_room_for_a_healthy_one() -> None:
    names = [f"stuck{number}" for number in range(100)]
    patient = [a_destination(name, url=f"http://127.0.0.1:1/{name}", timeout=30.0) for name in names]
    world = await a_world(
        a_route("bad", to=tuple(names)),
        a_route(),
        destinations=patient,
        **{name: [1e9] for name in names},
    )
    sent: dict[str, float] = {}
    async with running(world):
        for index in range(400):
            sent[f"evt_{index}"] = now()
            await world.put(an_event(id=f"evt_{index}", received_at=now()))
            await asyncio.sleep(0.05)
        await asyncio.sleep(1)
        made = zip(world.client.made, world.client.at, strict=True)
        late = [at - sent[event] for (name, event, _), at in made if name == "ci"]
    assert len(late) == 400
    assert max(late) < 0.2


@virtual
async def test_large_bodies_for_hanging_destinations_do_not_stop_the_reader() -> None:
    names = [f"stuck{number}" for number in range(30)]
    patient = [a_destination(name, url=f"http://127.0.0.1:1/{name}", timeout=30.0) for name in names]
    world = await a_world(
        a_route("bad", match={"body.big": {"exists": True}}, to=tuple(names)),
        a_route(match={"body.big": {"exists": False}}),
        destinations=patient,
        **{name: [1e9] for name in names},
    )
    large = an_event(body={"big": "x" * 900_000}, received_at=now())
    async with running(world):
        for index in range(60):
            await world.put(
                replace(large, id=EventId(f"evt_large_{index}")), an_event(id=f"evt_{index}", received_at=now())
            )
            await asyncio.sleep(0.05)
        await asyncio.sleep(2)
        assert sum(name == "ci" for name, _, _ in world.client.made) == 60


@virtual
async def test_the_events_of_a_removed_source_are_kept_for_an_hour_and_then_dead_lettered() -> None:
    world = await a_world(a_route())
    await world.log.create(TOPICS.specs([TOPICS.events("gone"), "shared"]))
    for topic, source in ((TOPICS.events("gone"), "gone"), ("shared", "other")):
        event = an_event(source=source, received_at=now())
        await world.log.append(topic, key=b"k", value=event.body, headers=encode_event(event))
    # The second topic has no name of ours, but the group has read it before.
    world.log._state.commits[TOPICS.group("router")] = {Partition("shared", 5): Commit(0)}
    async with running(world):
        await world.doze(3000)
        assert world.dead() == []
        await world.doze(2000)
    assert sorted(stored.delivery.event.source for stored in world.dead()) == ["gone", "other"]
    assert {stored.metadata.dead_reason for stored in world.dead()} == {"route_removed"}


@virtual
async def test_a_source_that_comes_back_within_the_hour_is_served() -> None:
    world = await a_world(a_route())
    known = world.rules
    world.rules = replace(rules_of(a_route()), sources={})
    await world.put(*events(2))
    async with running(world):
        await asyncio.sleep(600)
        world.rules = known
        await asyncio.sleep(300)
    assert len(world.client.made) == 2
    assert world.dead() == []


@virtual
async def test_a_pause_during_a_long_resume_holds() -> None:
    world = await a_world(a_route())
    async with operated(world) as control:
        command = ControlRecord(kind="pause", name="destination/ci", state="paused", at=now())
        await publish(world, command)
        await asyncio.sleep(1)
        async with running(world, world.worker(control)):
            await world.put(*events(300))
            await asyncio.sleep(3)
            await publish(world, command.with_state("resuming"))
            world.log.fail_appends(30)  # so that the job lasts
            await asyncio.sleep(0.15)
            world.log.fail_appends(0)
            await publish(world, command.with_state("paused", at=now()))
            await asyncio.sleep(60)
            assert control.commands["pause/destination/ci"].state == "paused"
            made = len(world.client.made)
            await world.put(an_event(id="evt_late", received_at=now()))
            await asyncio.sleep(5)
            assert len(world.client.made) == made
            await publish(world, control.commands["pause/destination/ci"].with_state("resuming"))
            await asyncio.sleep(30)
    assert {event for _, event, _ in world.client.made} == {f"evt_{n}" for n in range(300)} | {"evt_late"}
    assert len(world.client.made) == 301


@virtual
async def test_an_append_that_fails_during_a_job_repeats_itself_and_not_the_job() -> None:
    world = await a_world(a_route())
    async with operated(world) as control:
        command = ControlRecord(kind="pause", name="destination/ci", state="paused", at=now())
        await publish(world, command)
        await asyncio.sleep(1)
        async with running(world, world.worker(control)):
            await world.put(*events(500))
            await asyncio.sleep(5)
            await publish(world, command.with_state("resuming"))
            await asyncio.sleep(0.001)
            world.log.fail_appends(3)
            await asyncio.sleep(60)
    assert len(world.client.made) == 500


@virtual
async def test_the_backlog_of_dead_letters_counts_the_open_ones() -> None:
    world = await a_world(a_route(retry=a_policy(max_attempts=1)), ci=[503])
    async with operated(world) as control, running(world, world.worker(control)):
        await world.put(*events(10))
        await world.doze(3600)
        assert world.metrics.dead_letter_backlog.value == 10
        ends = {f"{TOPICS.dead}/{n}": end for n, (_, end) in (await world.log.bounds(TOPICS.dead)).items()}
        await publish(
            world,
            ControlRecord(
                kind="dead", name="x", state="requested", at=now(), action="drop", filter=DeadFilter(), checkpoint=ends
            ),
        )
        await asyncio.sleep(20)
        assert world.metrics.dead_letter_backlog.value == 0
        for number, (start, end) in (await world.log.bounds(TOPICS.dead)).items():
            world.log.delete_below(Partition(TOPICS.dead, number), max(start, end))
        await world.put(*[an_event(id=f"evt_more_{n}", received_at=now()) for n in range(4)])
        await world.doze(3600)
        assert world.metrics.dead_letter_backlog.value == 4


@virtual
async def test_a_leader_whose_clock_is_behind_makes_no_storm() -> None:
    world = await a_world(a_route(retry=a_policy(schedule=(20.0,), max_age=3600.0)), ci=[503, 200])
    append = world.log.another().append
    delivery = a_delivery(event=an_event(received_at=now()), successor=1, due=now() + 20)
    real_now = world.log._now
    world.log._now = lambda: real_now() - 30.0
    await append(TOPICS.events("github"), key=b"x", value=b"", headers=[])
    behind = world.log.another()
    behind._now = lambda: real_now() - 30.0
    await behind.append(
        TOPICS.retry("20s"),
        key=b"ci",
        value=delivery.event.body,
        headers=encode_delivery(delivery, NO_METADATA, at=real_now()),
    )
    world.log._now = real_now
    world.log._last = real_now()
    async with running(world):
        await asyncio.sleep(60)
    assert len(world.client.made) == 2
    assert sum(len(world.log.records(TOPICS.retry(tier))) for tier in ("5s", "20s")) < 6


@virtual
async def test_an_unreadable_parked_record_is_dead_lettered() -> None:
    world = await a_world(a_route())
    async with operated(world) as control:
        await publish(world, ControlRecord(kind="pause", name="destination/ci", state="resuming", at=now()))
        await asyncio.sleep(2)
        await world.log.append(TOPICS.parked, key=b"ci", value=b"{}", headers=[("gw_v", b"x")])
        async with running(world, world.worker(control)):
            await asyncio.sleep(20)
    (record,) = world.log.records(TOPICS.dead)
    assert dict(record.headers)["gw_undecodable"] == b"gw_v: expected 1, got b'x'"


@virtual
async def test_an_unreadable_record_too_large_for_a_dead_letter_is_cut() -> None:
    world = await a_world(a_route())
    giant = b"x" * (world.log.max_record_bytes - 10)
    await world.log.append(TOPICS.events("github"), key=b"k", value=giant, headers=[])
    async with running(world):
        await asyncio.sleep(3)
        assert await world.unfinished() == 0
    (record,) = world.log.records(TOPICS.dead)
    assert dict(record.headers)["gw_truncated"] == b"%d" % len(giant)
    assert giant.startswith(record.value)


@virtual
async def test_a_route_that_is_removed_while_its_breaker_opens_ends_nothing() -> None:
    single = a_destination("ci", url="http://127.0.0.1:1/ci", concurrency=1, timeout=1.0)
    world = await a_world(a_route(retry=PATIENT), destinations=[single], ci=[1e9])
    async with running(world) as worker:
        for index in range(100):
            await world.put(an_event(id=f"evt_{index}", received_at=now()))
            await asyncio.sleep(0.1)
            if index == 44:
                world.rules = replace(rules_of(), sources=world.rules.sources)
                worker.reload()
        await asyncio.sleep(60)
        assert await world.unfinished() == 0


@virtual
async def test_a_kick_releases_a_slow_times_backlog_at_the_current_pace() -> None:
    slow = a_destination("ci", url="http://127.0.0.1:1/ci", concurrency=2)
    world = await a_world(a_route(retry=PATIENT), destinations=[slow], ci=[5.0])
    await world.put(*events(500))
    async with operated(world) as control, running(world, world.worker(control)):
        await asyncio.sleep(30)
        world.client.scripts["ci"] = [0.001]
        await asyncio.sleep(10)
        await publish(world, ControlRecord(kind="kick", name="destination/ci", state="requested", at=now()))
        await asyncio.sleep(40)
        assert len({event for _, event, _ in world.client.made}) == 500


@virtual
async def test_a_kick_of_a_recovered_destination_releases_everything_after_a_long_open_time() -> None:
    await _kicked("destination/ci")


@virtual
async def test_a_kick_of_a_route_does_so_at_each_of_its_destinations() -> None:
    await _kicked("route/build")


@virtual
async def test_a_kick_does_so_where_a_probe_is_not_answered_at_once() -> None:
    await _kicked("destination/ci", answers_in=0.3)


@virtual
async def test_a_kick_beside_a_probe_that_hangs_is_obeyed_as_soon_as_that_has_ended() -> None:
    world = await a_world(a_route(retry=PATIENT), ci=[1e9])
    await world.put(*events(50))
    async with operated(world) as control, running(world, world.worker(control)):
        await world.doze(3540)
        await _probed(world)
        await asyncio.sleep(3)
        world.client.scripts["ci"] = [0.3]
        probes, dead = len(world.client.made), len(world.dead())
        await publish(world, ControlRecord(kind="kick", name="destination/ci", state="requested", at=now()))
        await asyncio.sleep(60)
        assert len({event for _, event, _ in world.client.made[probes:]}) == 50 - dead
        assert len(world.dead()) == dead + 1, "what was tried as the kick came, and has failed"


async def _kicked(name: str, *, answers_in: float = 0.0) -> None:
    """Let a destination be down for an hour and a half, fix it just after a probe, and kick."""
    world = await a_world(a_route(retry=replace(PATIENT, max_age=86400.0)), ci=[Result.CONNECT])
    await world.put(*events(50))
    async with operated(world) as control, running(world, world.worker(control)):
        await world.doze(5400)
        await _probed(world)
        world.client.scripts["ci"] = [answers_in]
        probes = len(world.client.made)
        await publish(world, ControlRecord(kind="kick", name=name, state="requested", at=now()))
        await asyncio.sleep(20)  # the next probe would come after 5 minutes
        assert len({event for _, event, _ in world.client.made[probes:]}) == 50
        assert not world.metrics.breaker_open.labels("ci").value


async def _probed(world: World) -> None:
    """Wait for the next attempt."""
    made = len(world.client.made)
    while len(world.client.made) == made:
        await world.sleep(0.1)


@virtual
async def test_a_kick_of_another_name_leaves_a_breaker_alone() -> None:
    world = await a_world(a_route(retry=PATIENT), destinations=[a_destination("other")], ci=[Result.CONNECT])
    await world.put(*events(50))
    async with operated(world) as control, running(world, world.worker(control)):
        await asyncio.sleep(600)
        await _probed(world)
        probes = len(world.client.made)
        for kicked in ("destination/other", "route/gone"):
            await publish(world, ControlRecord(kind="kick", name=kicked, state="requested", at=now()))
        await asyncio.sleep(60)
        assert len(world.client.made) == probes


@virtual
async def test_a_destination_that_is_removed_while_its_delivery_waits_in_memory_ends_nothing() -> None:
    world = await a_world(a_route(retry=a_policy(schedule=(3.0,))), ci=[503])
    await world.put(*events(1))
    async with running(world):
        await asyncio.sleep(1)
        world.rules = replace(rules_of(), sources=world.rules.sources)
        await world.doze(2 * 3600)
    assert [stored.metadata.dead_reason for stored in world.dead()] == ["route_removed"]


@virtual
async def test_a_new_source_is_read_after_a_reload_that_meets_a_rebalance() -> None:
    world = await a_world(a_route())
    async with running(world) as worker:
        await asyncio.sleep(1)
        await world.log.create(TOPICS.specs([TOPICS.events("billing")]))
        source = replace(world.rules.sources["github"], name="billing")
        world.rules = replace(
            rules_of(a_route(sources=("github", "billing"))), sources={**world.rules.sources, "billing": source}
        )
        worker.reload()
        await world.log.rebalance(TOPICS.group("router"))
        await asyncio.sleep(1)
        event = an_event(source="billing", received_at=now())
        await world.log.append(TOPICS.events("billing"), key=b"k", value=event.body, headers=encode_event(event))
        await asyncio.sleep(2)
    assert len(world.client.made) == 1


@virtual
async def test_a_destination_changed_by_the_rules_is_tried_at_once() -> None:
    world = await a_world(a_route(retry=PATIENT), ci=[Result.CONNECT])
    await world.put(*events(10))
    async with running(world) as worker:
        await asyncio.sleep(600)
        assert world.metrics.breaker_open.labels("ci").value
        world.client.scripts["ci"] = [200]
        world.rules = rules_of(a_route(retry=PATIENT), destinations=[a_destination("ci", url="http://127.0.0.2:1/ci")])
        worker.reload()
        event = an_event(id="evt_new", received_at=now())
        await world.put(event)
        await asyncio.sleep(0.5)
        assert world.client.made[-1] == ("ci", "evt_new", 1)


@virtual
async def test_a_record_does_not_stay_unfinished_for_as_long_as_its_delivery_fails() -> None:
    world = await a_world(a_route(retry=a_policy(schedule=(2.0,), max_attempts=60, max_age=3600.0)), ci=[404])
    await world.put(*events(1))
    async with running(world):
        await asyncio.sleep(15)
        assert len(world.client.made) > 3
        assert await world.unfinished() == 0, "a tier carries it"


@virtual
async def test_a_kick_duplicates_no_returning_delivery() -> None:
    slow = a_destination("ci", url="http://127.0.0.1:1/ci", concurrency=2)
    world = await a_world(a_route(), destinations=[slow], ci=[0.05])
    async with operated(world) as control, running(world, world.worker(control)):
        await world.put(*events(1500))
        await asyncio.sleep(9)
        assert world.log.records(TOPICS.retry("5s")), "more than it takes"
        await publish(world, ControlRecord(kind="kick", name="destination/ci", state="requested", at=now()))
        await asyncio.sleep(600)
    made = Counter(event for _, event, _ in world.client.made)
    assert len(made) == 1500
    assert set(made.values()) == {1}
    assert control.commands["kick/destination/ci"].count > 0


@virtual
async def test_a_pause_holds_deliveries_in_the_lane() -> None:
    single = a_destination("ci", url="http://127.0.0.1:1/ci", concurrency=1)
    world = await a_world(a_route(), destinations=[single], ci=[0.8])
    async with operated(world) as control, running(world, world.worker(control)):
        await world.put(*events(3))
        await asyncio.sleep(0.3)
        await publish(world, ControlRecord(kind="pause", name="destination/ci", state="paused", at=now()))
        await asyncio.sleep(10)
        assert len(world.client.made) == 1
        await publish(world, ControlRecord(kind="pause", name="destination/ci", state="resuming", at=now()))
        await asyncio.sleep(30)
        assert len(world.client.made) == 3


@virtual
async def test_a_missing_topics_refusals_are_logged_once_a_second_with_a_count() -> None:
    world = await a_world(a_route(retry=a_policy(schedule=(5.0,))), ci=[500])
    world.log.delete(TOPICS.retry("5s"))
    world.logger = structlog.get_logger()
    await world.put(*events(40))
    with structlog.testing.capture_logs() as lines:
        async with running(world):
            await asyncio.sleep(60)
            told = [line for line in lines if line["event"] == "append_retried"]
            assert len(told) <= 61
            began = 15  # the others wait, as the first ones fail
            assert sum(line["count"] for line in told) > began * 10
            assert {line["topic"] for line in told} == {TOPICS.retry("5s")}
            await world.log.create(TOPICS.specs([EVENTS]))
            await asyncio.sleep(10)
    assert len(world.stored(TOPICS.retry("5s"))) >= 40
