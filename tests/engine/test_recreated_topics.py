"""A retry, parked or dead-letter topic that is recreated keeps nothing of what jobs did with the former one."""

import asyncio
from dataclasses import replace
from typing import Literal

import pytest
from typing_extensions import override

from gateway.engine.control.records import ControlRecord, DeadFilter, Selection
from gateway.engine.control.state import Control
from gateway.log.base import Partition
from gateway.log.records import encode_delivery
from gateway.model import NO_METADATA, RecordMetadata
from gateway.ops.control_client import ControlClient
from gateway.ops.replays import window_of
from tests.builders import a_delivery, a_policy, a_route, an_event
from tests.engine.test_jobs import SlowLog, a_backlog, a_command, injected, once
from tests.engine.test_replay import a_replay, events_of, owning
from tests.engine.test_worker import EVENTS, TOPICS, World, a_world, events, operated, publish, running, virtual
from tests.memory_log import MemoryLog
from tests.virtual_time import now, run

pytestmark = pytest.mark.rotated(share=1 / 5, group="recreated topics")

NAME = "destination/ci"
NEW = [f"new_{number}" for number in range(3)]


@virtual
async def test_a_retry_in_a_tier_recreated_after_a_kick_is_delivered() -> None:
    policy = a_policy(schedule=(30.0,), max_attempts=50, max_age=86400.0)
    world = await a_world(a_route(retry=policy), ci=[503] * 20 + [200])
    async with operated(world) as control, running(world, world.worker(control)):
        await world.put(*events(20))
        await asyncio.sleep(5)
        await publish(world, ControlRecord(kind="kick", name=NAME, state="requested", at=now()))
        await world.doze(3600)
        kicked = control.checkpoint(f"kick/{NAME}")
        assert kicked[f"{TOPICS.retry('20s')}/3"] > len(NEW)
        await world.log.recreate(TOPICS.retry("20s"))
        await asyncio.sleep(30)
        world.client.scripts["ci"], made = [*[503] * len(NEW), 200], len(world.client.made)
        await put_new(world)
        await world.doze(3600)
        last = {event: number for _, event, number in world.client.made[made:]}
    assert await world.unfinished() == 0
    assert not world.dead()
    assert sorted(last) == NEW
    assert len(world.client.made) - made == 2 * len(NEW)  # each failed and was delivered once


@virtual
async def test_a_kick_finds_retries_in_a_tier_recreated_after_another() -> None:
    policy = a_policy(schedule=(3600.0,), max_attempts=5, max_age=86400.0)
    world = await a_world(a_route(retry=policy), ci=[503] * 20 + [200])
    async with operated(world) as control, running(world, world.worker(control)):
        await world.put(*events(20))
        await asyncio.sleep(5)
        await publish(world, ControlRecord(kind="kick", name=NAME, state="requested", at=now()))
        await world.doze(3 * 3600)
        await world.log.recreate(TOPICS.retry("20m"))
        await asyncio.sleep(30)
        world.client.scripts["ci"], made = [*[503] * len(NEW), 200], len(world.client.made)
        await put_new(world)
        await world.doze(300)
        await publish(world, ControlRecord(kind="kick", name=NAME, state="requested", at=now()))
        await asyncio.sleep(60)
        assert {event for _, event, number in world.client.made[made:] if number > 1} == set(NEW)


@virtual
async def test_deliveries_in_a_parked_topic_recreated_after_a_resume_are_resumed() -> None:
    world = await a_world(a_route())
    async with operated(world) as control, running(world, world.worker(control)):
        for batch in (events(20), [an_event(id=name, received_at=now() + 1) for name in NEW]):
            await publish(world, ControlRecord(kind="pause", name=NAME, state="paused", at=now()))
            await asyncio.sleep(1)
            await world.put(*batch)
            await asyncio.sleep(6)
            assert world.metrics.parked_backlog.value == len(batch)
            await publish(world, ControlRecord(kind="pause", name=NAME, state="resuming", at=now()))
            await asyncio.sleep(60)
            assert control.commands[f"pause/{NAME}"].count == len(batch)
            assert world.metrics.parked_backlog.value == 0
            await world.log.recreate(TOPICS.parked)
            await asyncio.sleep(30)
    assert len(world.client.made) == 20 + len(NEW)


@pytest.mark.parametrize("waits_before", [12, 3], ids=["it is soon as long", "or longer"])
def test_what_waits_in_a_recreated_topic_is_counted_though(waits_before: int) -> None:
    async def scenario() -> None:
        world = await a_world(a_route())
        async with owning(world) as control:
            await a_backlog(world, "dead", waits_before)
            await a_command(world, "dead", action="drop")
            await asyncio.sleep(12)
            assert control.commands["dead/x"].count == waits_before
            await publish(world, ControlRecord(kind="pause", name=NAME, state="paused", at=now()))
            await a_backlog(world, "resume", waits_before)
            await asyncio.sleep(12)
            assert world.metrics.dead_letter_backlog.value == 0
            assert world.metrics.parked_backlog.value == waits_before
            await world.log.recreate(TOPICS.dead)
            await world.log.recreate(TOPICS.parked)
            await a_backlog(world, "dead", 12, first=100)
            await a_backlog(world, "resume", 12, first=100)
            await asyncio.sleep(60)
            assert world.metrics.dead_letter_backlog.value == 12
            assert world.metrics.parked_backlog.value == 12

    run(scenario())


@virtual
async def test_late_deliveries_in_a_recreated_parked_topic_are_rescanned_though_it_is_soon_as_long() -> None:
    world = await a_world(a_route())
    async with operated(world) as control, running(world, world.worker(control)):
        await publish(world, ControlRecord(kind="pause", name=NAME, state="resuming", at=now()))
        await asyncio.sleep(10)
        assert control.commands[f"pause/{NAME}"].state == "active"
        await park(world, "old")
        await asyncio.sleep(20)
        await world.log.recreate(TOPICS.parked)
        await park(world, *NEW)
        await asyncio.sleep(20)
    assert sorted(event for _, event, _ in world.client.made) == [*NEW, "old"]


@virtual
async def test_late_deliveries_in_a_recreated_parked_topic_are_rescanned_though_others_were_before() -> None:
    world = await a_world(a_route())
    async with operated(world) as control, running(world, world.worker(control)):
        await publish(world, ControlRecord(kind="pause", name=NAME, state="resuming", at=now()))
        await asyncio.sleep(10)
        await park(world, "old_0", "old_1", "old_2", "old_3")
        await asyncio.sleep(20)
        assert len(world.client.made) == 4
        await world.log.recreate(TOPICS.parked)
        await park(world, *NEW)
        (place,) = [number for number, (_, end) in (await world.log.bounds(TOPICS.parked)).items() if end]
        world.log.lose_leader(Partition(TOPICS.parked, place))
        await asyncio.sleep(20)  # the others are rescanned
        world.log.find_leader(Partition(TOPICS.parked, place))
        await asyncio.sleep(20)
    assert sorted(event for _, event, _ in world.client.made)[: len(NEW)] == NEW


@virtual
async def test_late_deliveries_in_a_recreated_parked_partition_are_rescanned_though_unreadable_then() -> None:
    world = await a_world(a_route())
    lost = Partition(TOPICS.parked, 1)
    async with operated(world) as control, running(world, world.worker(control)):
        await publish(world, ControlRecord(kind="pause", name=NAME, state="resuming", at=now()))
        await asyncio.sleep(10)
        await park(world, "old_0", "old_1", "old_2", "old_3", partition=1)
        await asyncio.sleep(20)
        assert len(world.client.made) == 4
        await world.log.recreate(TOPICS.parked)
        await park(world, *NEW, partition=1)
        world.log.lose_leader(lost)
        await asyncio.sleep(2)
        await park(world, "elsewhere", partition=0)  # later: it is rescanned, and covered
        await asyncio.sleep(20)
        world.log.find_leader(lost)
        await asyncio.sleep(20)
    assert sorted(event for _, event, _ in world.client.made)[: 1 + len(NEW)] == ["elsewhere", *NEW]


@virtual
async def test_retries_in_a_recreated_partition_are_delivered_though_a_kick_skipped_it() -> None:
    world = await a_world(a_route(retry=a_policy(schedule=(3600.0,), max_attempts=5, max_age=86400.0)))
    tier = TOPICS.retry("20m")
    lost = Partition(tier, 1)
    async with operated(world) as control, running(world, world.worker(control)):
        await wait_in(world, tier, 1, "old_0", "old_1", "old_2", "old_3")
        await asyncio.sleep(3)
        await publish(world, ControlRecord(kind="kick", name=NAME, state="requested", at=now()))
        await asyncio.sleep(20)
        assert len(world.client.made) == 4
        await world.log.recreate(tier)
        await asyncio.sleep(30)
        await wait_in(world, tier, 1, *NEW)
        await asyncio.sleep(5)
        world.log.lose_leader(lost)
        await wait_in(world, tier, 0, "elsewhere")
        await asyncio.sleep(5)
        await publish(world, ControlRecord(kind="kick", name=NAME, state="requested", at=now()))
        await asyncio.sleep(30)
        assert control.commands[f"kick/{NAME}"].unread == 1
        world.log.find_leader(lost)
        await world.doze(3600)
    assert sorted(event for _, event, _ in world.client.made)[: 1 + len(NEW)] == ["elsewhere", *NEW]


@virtual
async def test_parked_deliveries_are_resumed_after_the_control_topic_is_recreated_without_a_pause() -> None:
    world = await a_world(a_route())
    commands = ControlClient(world.log, TOPICS)
    async with operated(world) as control, running(world, world.worker(control)):
        await commands.pause(NAME)
        await asyncio.sleep(1)
        await world.put(*events(50))
        await asyncio.sleep(6)
    await world.log.recreate(TOPICS.control)
    async with operated(world) as control, running(world, world.worker(control)):
        await asyncio.sleep(30)
        assert not world.client.made  # whether it may go out is the operator's to say
        assert world.metrics.parked_backlog.value == 50
        assert await commands.resume("route/build") is None
        placed = await commands.resume(NAME)
        assert placed is not None
        assert not placed.was_paused
        done = await commands.finished(placed, timeout=60)
        assert done is not None
        assert (done.state, done.count) == ("active", 50)
        await asyncio.sleep(30)
        assert world.metrics.parked_backlog.value == 0
        assert await commands.resume(NAME) is None
    assert len(world.client.made) == 50


@virtual
async def test_dead_letters_in_a_topic_recreated_after_a_drop_are_open() -> None:
    world = await a_world(a_route(retry=a_policy(schedule=(1.0,), max_attempts=1)), ci=[503])
    async with operated(world) as control, running(world, world.worker(control)):
        for name, batch in (("a", events(20)), ("b", [an_event(id=name, received_at=now() + 1) for name in NEW])):
            await world.put(*batch)
            await world.doze(1800)
            assert world.metrics.dead_letter_backlog.value == len(batch)
            bounds = await world.log.bounds(TOPICS.dead)
            ends = {f"{TOPICS.dead}/{number}": end for number, (_, end) in bounds.items()}
            which = DeadFilter(route="build")
            await publish(
                world,
                ControlRecord(
                    kind="dead", name=name, state="requested", at=now(), filter=which, checkpoint=ends, action="drop"
                ),
            )
            await asyncio.sleep(20)
            assert control.commands[f"dead/{name}"].count == len(batch)
            assert world.metrics.dead_letter_backlog.value == 0
            await world.log.recreate(TOPICS.dead)
            await asyncio.sleep(30)


@pytest.mark.parametrize("action", ["drop", "replay"])
@pytest.mark.parametrize("is_begun", [False, True])
def test_a_command_covers_no_dead_letter_of_a_topic_recreated_later(
    action: Literal["drop", "replay"], *, is_begun: bool
) -> None:
    async def scenario() -> None:
        world = await a_world(a_route())
        commands = ControlClient(world.log, TOPICS)
        await a_backlog(world, "dead", 20)
        await asyncio.sleep(5)
        placed = await commands.resolve(action, DeadFilter(route="build"))
        if is_begun:  # by an owner that has come to the third letter of each partition
            ends = {place: min(end, 3) for place, end in placed.command.checkpoint.items()}
            marker = ControlRecord(
                kind="checkpoint",
                name=placed.command.key,
                state="requested",
                at=now(),
                checkpoint=ends,
                count=3,
                latest=now(),
            )
            await publish(world, marker)
        await asyncio.sleep(5)
        await world.log.recreate(TOPICS.dead)
        await a_backlog(world, "dead", 20, first=100)
        async with operated(world) as control:
            done = await commands.finished(placed, timeout=30)
            assert done is not None
            assert done.count == (3 if is_begun else 0)
            await asyncio.sleep(10)
            assert world.metrics.dead_letter_backlog.value == 20
            again = await commands.finished(await commands.resolve(action, DeadFilter(route="build")), timeout=30)
            assert again is not None
            assert again.count == 20
            assert control.commands[again.key].state == "done"
        assert len(world.stored(TOPICS.retry("5s"))) == (20 if action == "replay" else 0)

    run(scenario())


class AheadLog(MemoryLog):
    """Its clock is some seconds ahead, and may be set back."""

    def __init__(self, ahead: float) -> None:
        super().__init__(now=now)
        self.ahead = ahead

    @override
    def now(self) -> float:
        return now() + self.ahead


@pytest.mark.parametrize("gap", [0, 1, 12, 5000])
def test_dead_letters_stamped_by_a_clock_that_was_ahead_are_replayed(gap: int) -> None:
    async def scenario() -> None:
        world = await a_world(a_route())
        world.log = log = AheadLog(20.0)
        await log.create(TOPICS.specs([EVENTS]))
        await a_backlog(world, "dead", 20)
        log.ahead = 0.0
        await a_backlog(world, "dead", 20, first=20)
        for number in await log.bounds(TOPICS.dead):
            log.skip_offsets(Partition(TOPICS.dead, number), gap)
        commands = ControlClient(world.log, TOPICS)
        async with operated(world):
            done = await commands.finished(await commands.resolve("replay", DeadFilter(route="build")), timeout=30)
            assert done is not None
            assert done.count == 40
            await asyncio.sleep(10)
            assert world.metrics.dead_letter_backlog.value == 0

    run(scenario())


def test_a_checkpoint_covers_appends_before_its_last_record() -> None:
    partition, at = Partition("gateway.retry.20s", 1), 1_700_000_000.5
    checkpoint = ControlRecord(
        kind="checkpoint",
        name=f"kick/{NAME}",
        state="done",
        at=at + 3,
        checkpoint={"gateway.retry.20s/1": 7},
        latest=at,
    )
    in_place = replace(checkpoint, latest=at + 9, latest_by_partition={"gateway.retry.20s/1": at})
    for record, last in ((checkpoint, at), (replace(checkpoint, latest=None), at + 3), (in_place, at)):
        control = Control()
        control.decode_and_apply(*record.encode())
        assert control.was_injected_by_kick("build", "ci", partition, 6, last)
        assert not control.was_injected_by_kick("build", "ci", partition, 7, last)
        assert not control.was_injected_by_kick("build", "ci", partition, 6, last + 0.001)


async def put_new(world: World) -> None:
    await world.put(*[an_event(id=name, received_at=now()) for name in NEW])


async def wait_in(world: World, tier: str, partition: int, *names: str) -> None:
    for name in names:
        delivery = a_delivery(event=an_event(id=name, received_at=now()), successor=1, due=now() + 1200)
        headers = encode_delivery(delivery, NO_METADATA, at=now())
        await world.log.append(tier, key=b"ci", value=delivery.event.body, headers=headers, partition=partition)


async def park(world: World, *names: str, partition: int | None = None) -> None:
    """Park deliveries, as a worker does that hasn't read yet that they were resumed."""
    for name in names:
        delivery = a_delivery(event=an_event(id=name, received_at=now()), successor=1)
        headers = encode_delivery(delivery, RecordMetadata(paused_name=NAME), at=now())
        await world.log.append(
            TOPICS.parked, key=b"ci", value=delivery.event.body, headers=headers, partition=partition
        )


async def many_control_records(world: World) -> None:
    """Let the control topic be longer than a recreated one will be."""
    for number in range(300):
        await publish(world, ControlRecord(kind="pause", name=f"route/{number}", state="active", at=now()))


@virtual
async def test_a_kick_ends_once_though_the_control_topic_is_recreated_meanwhile() -> None:
    policy = a_policy(schedule=(600.0,), max_attempts=50, max_age=86400.0)
    world = await a_world(a_route(retry=policy), ci=[503])
    await many_control_records(world)
    await a_backlog(world, "kick", 3)
    commands = ControlClient(world.log, TOPICS)
    async with operated(world) as control, running(world, world.worker(control)):
        await asyncio.sleep(10)
        await commands.kick(NAME)
        await asyncio.sleep(1)  # it is announced, and waits
        await world.log.recreate(TOPICS.control)
        await commands.pause("route/another")
        await asyncio.sleep(500)
        assert not control.has_pending(f"kick/{NAME}")
        assert control.kicks <= 2
        again = await commands.kick(NAME)  # offsets are small again
        done = await commands.finished(again, timeout=60)
        assert done is not None
        assert done.tried == 3
    assert not world.dead()


@virtual
async def test_a_resume_ends_though_the_control_topic_is_recreated_meanwhile() -> None:
    world = await a_world(a_route())
    await many_control_records(world)
    commands = ControlClient(world.log, TOPICS)
    await commands.pause(NAME)
    await a_backlog(world, "resume", 3)
    tier = [Partition(TOPICS.retry("5s"), number) for number in await world.log.bounds(TOPICS.retry("5s"))]
    async with operated(world) as control, running(world, world.worker(control)):
        await asyncio.sleep(10)
        for partition in tier:
            world.log.lose_leader(partition)
        await commands.resume(NAME)
        await asyncio.sleep(2)
        await world.log.recreate(TOPICS.control)
        await commands.pause("route/another")
        for partition in tier:
            world.log.find_leader(partition)
        await asyncio.sleep(120)
        assert control.commands[f"pause/{NAME}"].state == "active"
        assert (await world.log.bounds(TOPICS.control))[0][1] < 100
    assert injected(world).keys() == once(3).keys()


@virtual
async def test_a_replay_continues_though_the_control_topic_is_recreated() -> None:
    world = await a_world(a_route())
    await many_control_records(world)
    await events_of(world, 50)
    async with owning(world) as control:
        await a_replay(world, rate=5.0)
        await asyncio.sleep(4)
        await world.log.recreate(TOPICS.control)
        await ControlClient(world.log, TOPICS).pause("route/another")
        await asyncio.sleep(60)
        assert control.commands["replay/x"].state == "done"
    assert injected(world).keys() == once(50).keys()


@virtual
async def test_pauses_are_confirmed_though_the_control_topic_was_recreated_before_a_process_had_applied_all() -> None:
    world = await a_world(a_route())
    await many_control_records(world)
    commands = ControlClient(world.log, TOPICS)
    async with owning(world) as control:
        await asyncio.sleep(3)
        world.log.stall(None)
        await commands.pause("route/a")
        await asyncio.sleep(0.3)
        await world.log.recreate(TOPICS.control)
        world.log.go_on(None)
        pause = await commands.pause("route/b")
        assert await commands.confirmed(pause, timeout=5) == pause.command
        assert control.commands["pause/route/b"] == pause.command


@virtual
async def test_a_resume_ends_though_the_control_topic_was_recreated_before_a_process_had_applied_all() -> None:
    """The job that waits for the end of the former topic is a rescan, to which a resume gives way."""
    world = await a_world(a_route())
    await many_control_records(world)
    commands = ControlClient(world.log, TOPICS)
    async with owning(world):
        await asyncio.sleep(3)
        world.log.stall(None)
        await commands.pause("route/a")
        await asyncio.sleep(10)
        await world.log.recreate(TOPICS.control)
        world.log.go_on(None)
        await commands.pause(NAME)
        await a_backlog(world, "resume", 3)
        resume = await commands.resume(NAME)
        assert resume is not None
        done = await commands.finished(resume, timeout=10)
        assert done is not None
        assert done.count == 3


@virtual
async def test_no_rescan_answers_a_resume_in_a_recreated_control_topic() -> None:
    """Its own job does, once all that is parked was injected."""
    world = await a_world(a_route())
    await many_control_records(world)
    commands = ControlClient(world.log, TOPICS)
    await commands.pause(NAME)
    await a_backlog(world, "resume", 1)
    async with owning(world, SlowLog(world.log, seconds=1.0)):
        await asyncio.sleep(1)
        first = await commands.resume(NAME)
        assert first is not None
        assert await commands.finished(first, timeout=20)
        await world.log.recreate(TOPICS.control)
        await a_backlog(world, "resume", 1500, first=1)  # parked late: found by a rescan
        await asyncio.sleep(8)
        assert 1 < injected(world).total() < 1501, "the rescan is in the middle of it"
        second = await commands.resume(NAME)
        assert second is not None
        assert await commands.finished(second, timeout=120)
        assert injected(world).total() == 1501


def test_a_checkpoint_answers_no_command_by_offsets_of_a_former_control_topic() -> None:
    control = Control()
    done = ControlRecord(kind="checkpoint", name=f"kick/{NAME}", state="done", at=1.0, covers_commands_below=300)
    control.decode_and_apply(
        *done.encode(), 2
    )  # written by a process that didn't know yet that the topic was recreated
    assert control.commands_covered_below(f"kick/{NAME}") == 0
    control.decode_and_apply(*replace(done, covers_commands_below=3).encode(), 3)
    assert control.commands_covered_below(f"kick/{NAME}") == 3


@pytest.mark.parametrize("count", [10, 2, 0], ids=["as long", "shorter", "empty"])
def test_a_replay_takes_no_event_of_a_topic_recreated_before_it_runs(count: int) -> None:
    async def scenario() -> None:
        world = await a_world(a_route())
        await events_of(world, 10)
        commands = ControlClient(world.log, TOPICS)
        window = await window_of(world.log, [EVENTS], 0.0, None)
        placed = await commands.replay(Selection(route="build", since=0.0, starts=window.starts), window.ends)
        await world.log.recreate(EVENTS)
        await world.put(*[an_event(id=f"new_{number}", received_at=now()) for number in range(count)])
        async with owning(world):
            done = await commands.finished(placed, timeout=20)
            assert done is not None
            assert done.count == 0
        assert not injected(world)

    run(scenario())


@virtual
async def test_a_replay_takes_events_that_a_clock_ahead_has_stamped_before_it_was_set_back() -> None:
    world = await a_world(a_route())
    world.log = log = AheadLog(20.0)
    await log.create(TOPICS.specs([EVENTS]))
    await events_of(world, 20)
    log.ahead = 0.0
    commands = ControlClient(world.log, TOPICS)
    window = await window_of(world.log, [EVENTS], 0.0, None)
    placed = await commands.replay(Selection(route="build", since=0.0, starts=window.starts), window.ends)
    async with owning(world):
        done = await commands.finished(placed, timeout=20)
        assert done is not None
        assert done.count == 20


@virtual
async def test_a_replay_takes_no_event_of_a_topic_recreated_while_it_waits_for_a_partition() -> None:
    world = await a_world(a_route())
    await events_of(world, 40)
    commands = ControlClient(world.log, TOPICS)
    window = await window_of(world.log, [EVENTS], 0.0, None)
    placed = await commands.replay(Selection(route="build", since=0.0, starts=window.starts), window.ends)
    world.log.lose_leader(Partition(EVENTS, 1))
    others = 40 - window.ends[f"{EVENTS}/1"]
    async with owning(world):
        await asyncio.sleep(20)
        assert injected(world).total() == others
        await world.log.recreate(EVENTS)
        world.log.find_leader(Partition(EVENTS, 1))
        await world.put(*[an_event(id=f"new_{number}", received_at=now()) for number in range(40)])
        done = await commands.finished(placed, timeout=60)
        assert done is not None
        assert done.count == injected(world).total() == others
