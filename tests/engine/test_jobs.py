"""Operators' commands, on the log in memory and in virtual time: each reported number is checked against the log."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import structlog
from typing_extensions import override

from gateway.engine.control.records import ControlRecord, DeadFilter, DeadLetterProperties, Selection
from gateway.engine.control.state import Control
from gateway.engine.jobs.backlog_counts import OpenDeadLetterIndex
from gateway.engine.jobs.kick_outcomes import MAX_TRACKED
from gateway.engine.jobs.log_reader import CHECKPOINT_EVERY
from gateway.engine.jobs.runner import RESCAN_INTERVAL
from gateway.log.base import Partition, Position, Record, RecordHeaders, partition_of
from gateway.log.records import encode_delivery
from gateway.log.topics import JOBS_GROUP
from gateway.model import NO_METADATA, Disposition, RecordMetadata
from gateway.ops.audit import who
from gateway.ops.control_client import ControlClient, StoredCommand
from gateway.ops.kick_report import dead_in, describe_kick
from gateway.rules.rules import Rules
from tests.builders import a_delivery, a_destination, a_policy, a_route, an_event
from tests.engine.test_clocks import UnsynchronizedLog
from tests.engine.test_replay import MortalLog, Owner, a_replay, events_of, owning
from tests.engine.test_worker import EVENTS, TOPICS, Busy, World, a_world, events, operated, publish, running, virtual
from tests.memory_log import MemoryLog
from tests.virtual_time import now, run

pytestmark = pytest.mark.rotated(share=1 / 5, group="jobs")

TIER = TOPICS.retry("5s")
NAME = "destination/ci"
KINDS = ("resume", "kick", "dead")
FROM = {"resume": TOPICS.parked, "kick": TOPICS.retry("20m"), "dead": TOPICS.dead}


class SlowLog(MemoryLog):
    """A connection whose acknowledgements of what is injected, or of what another topic gets, take a while."""

    def __init__(self, log: MemoryLog, seconds: float = 0.05, *, topic: str = TIER) -> None:
        super().__init__()
        self.__dict__.update(log.__dict__)
        self._seconds = seconds
        self._topic = topic

    @override
    async def append(
        self, topic: str, *, key: bytes, value: bytes, headers: RecordHeaders, partition: int | None = None
    ) -> Position:
        position = await super().append(topic, key=key, value=value, headers=headers, partition=partition)
        if topic == self._topic:
            await asyncio.sleep(self._seconds)
        return position


class HeldLog(MemoryLog):
    """A connection that has one of its injections stored, and acknowledged only once it is released."""

    def __init__(self, log: MemoryLog, injection: int) -> None:
        super().__init__()
        self.__dict__.update(log.__dict__)
        self.is_held, self.is_released = asyncio.Event(), asyncio.Event()
        self._left = injection

    @override
    async def append(
        self, topic: str, *, key: bytes, value: bytes, headers: RecordHeaders, partition: int | None = None
    ) -> Position:
        position = await super().append(topic, key=key, value=value, headers=headers, partition=partition)
        self._left -= topic == TIER
        if topic == TIER and self._left == 0:
            self.is_held.set()
            await self.is_released.wait()
        return position


class CountingLog(MemoryLog):
    """A connection that counts what is read of the dead letters."""

    def __init__(self, log: MemoryLog) -> None:
        super().__init__()
        self.__dict__.update(log.__dict__)
        self.read = 0

    @override
    async def scan(self, partition: Partition, start: int, end: int) -> AsyncIterator[Sequence[Record]]:
        async for records in super().scan(partition, start, end):
            self.read += len(records) if partition.topic == TOPICS.dead else 0
            yield records


async def a_backlog(world: World, kind: str, count: int, *, first: int = 0, **fields: Any) -> None:
    """Let so many deliveries wait where a command of a kind finds them."""
    note = {
        "resume": RecordMetadata(paused_name=NAME),
        "kick": NO_METADATA,
        "dead": RecordMetadata(dead_reason="exhausted"),
    }[kind]
    for number in range(first, first + count):
        event = an_event(id=f"evt_{number}", received_at=now())
        delivery = a_delivery(event=event, successor=1, due=now() + 1200, **fields)
        headers = encode_delivery(delivery, note, at=now())
        await world.log.append(FROM[kind], key=b"%d" % number, value=event.body, headers=headers)


async def a_command(world: World, kind: str, name: str = "x", **fields: Any) -> ControlRecord:
    match kind:
        case "resume":
            command = ControlRecord(kind="pause", name=NAME, state="resuming", at=now())
        case "kick":
            command = ControlRecord(kind="kick", name=NAME, state="requested", at=now())
        case _:
            bounds = await world.log.bounds(TOPICS.dead)
            ends = {f"{TOPICS.dead}/{number}": end for number, (_, end) in bounds.items()}
            command = ControlRecord(kind="dead", name=name, state="requested", at=now(), checkpoint=ends, **fields)
    await publish(world, command)
    return command


async def ended(control: Control, command: ControlRecord, *, within: float = 600.0) -> ControlRecord:
    until = now() + within
    while (present := control.commands.get(command.key)) is None or present.is_pending:
        assert now() < until, "expected the command to be carried out"
        await asyncio.sleep(0.1)
    return present


def injected(world: World) -> Counter[str]:
    return Counter(stored.delivery.event.id for stored in world.stored(TIER))


def once(count: int) -> Counter[str]:
    return Counter({f"evt_{number}": 1 for number in range(count)})


# Another owner


async def _killed_at(kind: str, append: int, *, is_stored: bool, count: int) -> tuple[int, int, int]:
    """Kill the owner at an append, let another go on, and return what was skipped, repeated, and the count told."""
    world = await a_world(a_route())
    await a_backlog(world, kind, count)
    command = await a_command(world, kind)
    mortal = MortalLog(world.log, appends=append, is_stored=is_stored)
    async with owning(world, mortal):
        async with asyncio.timeout(60):
            await mortal.died.wait()
        world.log.fail_commits(1)  # dead, it commits nothing
    world.log.fail_commits(0)
    async with owning(world) as control:
        done = await ended(control, command)
    ledger = injected(world)
    return count - len(ledger), ledger.total() - len(ledger), done.count


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.rotated
def test_an_owner_killed_at_any_append_skips_nothing_and_repeats_at_most_a_batch(kind: str) -> None:
    for append in (1, 2, 99, 101, 102, 399, 400, 401, 402, 403, 500, 700, 801, 802, 803, 1003):
        for is_stored in (False, True):
            skipped, repeated, told = run(_killed_at(kind, append, is_stored=is_stored, count=1001))
            assert skipped == 0, f"killed at append {append}"
            assert repeated <= CHECKPOINT_EVERY, f"killed at append {append}"
            assert told == 1001, f"killed at append {append}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.rotated
def test_jobs_that_move_with_a_graceful_stop_repeat_nothing(kind: str) -> None:
    async def scenario() -> None:
        world = await a_world(a_route())
        await a_backlog(world, kind, 1500)
        command = await a_command(world, kind)
        moved = 0
        for number in range(8):
            before = len(world.log.records(TIER))
            async with owning(world, SlowLog(world.log)):
                await asyncio.sleep(0.3 + 0.013 * number + (2.5 if kind == "kick" else 0.0))
            moved += len(world.log.records(TIER)) > before
        assert moved > 2, "in the middle of it"
        async with owning(world) as control:
            assert (await ended(control, command)).count == 1500
        assert injected(world) == once(1500)

    run(scenario())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.rotated
def test_jobs_that_move_to_another_process_repeat_nothing(kind: str) -> None:
    async def scenario() -> None:
        world = await a_world(a_route())
        await a_backlog(world, kind, 1500)
        command = await a_command(world, kind)
        owner = Owner(world, SlowLog(world.log))
        await owner.start()
        for seconds in (0.41, 0.33, 0.37):
            await asyncio.sleep(seconds + (2.5 if kind == "kick" else 0.0))
            following = Owner(world, SlowLog(world.log))
            await following.start()  # takes everything from the owner and gives it back
            await asyncio.sleep(0.37)
            await owner.stop()
            owner = following
        await ended(owner.control, command)
        await owner.stop()
        assert injected(world) == once(1500)

    run(scenario())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.rotated
def test_a_process_that_has_lost_the_jobs_injects_nothing_more(kind: str) -> None:
    async def scenario() -> None:
        world = await a_world(a_route())
        await a_backlog(world, kind, 1500)
        command = await a_command(world, kind)
        owner = Owner(world, SlowLog(world.log))
        await owner.start()
        await asyncio.sleep(0.6 + (2.5 if kind == "kick" else 0.0))
        await owner.jobs.revoked([Partition(TOPICS.control, 0)])
        before = len(world.log.records(TIER))
        await asyncio.sleep(0.1)
        assert owner.control.injected(command.key) == before
        assert 100 <= before < 1500
        await asyncio.sleep(10)
        assert len(world.log.records(TIER)) == before
        await owner.stop()

    run(scenario())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.rotated
def test_a_process_that_learns_late_that_it_has_lost_the_jobs_takes_no_checkpoint_back(kind: str) -> None:
    """Else the next owner would go on from there, and repeat what the one in between has injected."""

    async def scenario() -> None:
        world = await a_world(a_route())
        await a_backlog(world, kind, 1500)
        command = await a_command(world, kind)
        log = HeldLog(world.log, 250)
        late = Owner(world, log)
        await late.start()
        await log.is_held.wait()
        world.log._state.members[TOPICS.group(JOBS_GROUP)].clear()  # it is evicted
        async with owning(world) as control:
            await ended(control, command)
            told = control.checkpoint(command.key)
            await late.jobs.revoked([Partition(TOPICS.control, 0)])
            log.is_released.set()
            await asyncio.sleep(5)
            assert control.checkpoint(command.key) == told
        async with owning(world) as control:
            await asyncio.sleep(30)
            assert control.checkpoint(command.key) == told
        await late.stop()
        ledger = injected(world)
        assert len(ledger) == 1500
        assert ledger.total() - len(ledger) <= CHECKPOINT_EVERY, "at most what came after its last checkpoint"

    run(scenario())


@virtual
async def test_a_replay_repeats_two_batches_at_most_though_its_first_owner_learns_late_that_it_has_lost_it() -> None:
    """A batch for each of two owners that didn't come to a checkpoint; the late one takes none back."""
    world = await a_world(a_route())
    await events_of(world, 1800)
    log = HeldLog(world.log, 250)
    late = Owner(world, log)
    await late.start()
    command = await a_replay(world)
    await log.is_held.wait()
    world.log._state.members[TOPICS.group(JOBS_GROUP)].clear()  # it is evicted
    mortal = MortalLog(world.log, appends=1400, is_stored=True)
    async with owning(world, mortal) as control:
        await mortal.died.wait()
        reached = control.injected(command.key)
        await late.jobs.revoked([Partition(TOPICS.control, 0)])
        log.is_released.set()
        await asyncio.sleep(2)
        assert control.injected(command.key) == reached >= 1000
    async with owning(world) as control:
        await ended(control, command)
    await late.stop()
    ledger = injected(world)
    assert len(ledger) == 1800
    assert ledger.total() - len(ledger) <= 2 * CHECKPOINT_EVERY


@virtual
async def test_a_control_topic_that_grows_under_a_job_repeats_nothing_and_takes_the_next_commands() -> None:
    world = await a_world(a_route())
    await a_backlog(world, "resume", 1200)
    commands = ControlClient(world.log, TOPICS)
    await commands.pause(NAME)
    slow = SlowLog(world.log)
    async with owning(world, slow) as control:
        placed = await commands.resume(NAME)
        assert placed is not None
        await asyncio.sleep(0.5)
        spec = next(spec for spec in TOPICS.specs([]) if spec.name == TOPICS.control)
        world.log.grow(replace(spec, partitions=3))
        await world.log.rebalance(TOPICS.group(JOBS_GROUP))
        done = await commands.finished(placed, timeout=60)
        assert done is not None
        assert (done.state, done.count) == ("active", 1200)
        for name in ("route/build", "destination/other", "destination/third"):
            await commands.pause(name)
            await asyncio.sleep(0.1)
            assert control.commands[f"pause/{name}"].state == "paused"
    stray = ControlRecord(kind="pause", name="destination/fourth", state="paused", at=now())
    for _ in range(100):  # as an older version would
        await world.log.append(TOPICS.control, key=stray.encode()[0], value=stray.encode()[1], headers=[], partition=1)
    async with owning(world) as control:  # and a process that begins now
        assert control.commands["pause/destination/third"].state == "paused"
        assert stray.key not in control.commands
        kicked = await commands.kick("destination/third")
        assert await commands.finished(kicked, timeout=20) is not None
    assert injected(world) == once(1200)


@virtual
async def test_a_resume_does_not_wait_for_a_new_owners_rescan_which_continues_later() -> None:
    world = await a_world(a_route())
    commands = ControlClient(world.log, TOPICS)
    others = RecordMetadata(paused_name="route/other")
    await publish(world, ControlRecord(kind="pause", name=others.paused_name, state="active", at=now()))
    await publish(world, ControlRecord(kind="pause", name=NAME, state="paused", at=now()))
    await a_backlog(world, "resume", 50)
    for number in range(50, 2050):  # parked late
        delivery = a_delivery(event=an_event(id=f"evt_{number}", received_at=now()), successor=1)
        headers = encode_delivery(delivery, others, at=now())
        await world.log.append(TOPICS.parked, key=b"%d" % number, value=delivery.event.body, headers=headers)
    async with owning(world, SlowLog(world.log, seconds=1.5)):  # 30 s of a hundred each
        await asyncio.sleep(5)
        assert 0 < injected(world).total() < 2000
        placed = await commands.resume(NAME)
        assert placed is not None
        done = await commands.finished(placed, timeout=10)
        assert done is not None
        assert (done.state, done.count) == ("active", 50)
        assert injected(world).total() < 2000
        await asyncio.sleep(120)
    assert injected(world) == once(2050)


class SlowToReadLog(MemoryLog):
    """A connection on which each batch of parked deliveries takes half a second."""

    def __init__(self, log: MemoryLog) -> None:
        super().__init__()
        self.__dict__.update(log.__dict__)

    @override
    async def scan(self, partition: Partition, start: int, end: int) -> AsyncIterator[Sequence[Record]]:
        async for records in super().scan(partition, start, end):
            if partition.topic == TOPICS.parked:
                await asyncio.sleep(0.5)
            yield records


@virtual
async def test_rescans_interrupted_by_one_resume_after_another_complete() -> None:
    world = await a_world(a_route())
    commands = ControlClient(world.log, TOPICS)
    await publish(world, ControlRecord(kind="pause", name="route/other", state="active", at=now()))
    await publish(world, ControlRecord(kind="pause", name=NAME, state="resuming", at=now()))
    async with owning(world, SlowToReadLog(world.log)):
        await asyncio.sleep(10)
        for number in range(6001):
            delivery = a_delivery(event=an_event(id=f"evt_{number}", received_at=now()), successor=1)
            note = RecordMetadata(paused_name="route/other" if number == 6000 else "route/paused")
            headers = encode_delivery(delivery, note, at=now())
            await world.log.append(TOPICS.parked, key=b"x", value=delivery.event.body, headers=headers)
        for _ in range(30):
            await publish(world, ControlRecord(kind="pause", name=NAME, state="paused", at=now()))
            placed = await commands.resume(NAME)
            assert placed is not None
            assert await commands.finished(placed, timeout=60) is not None
            await asyncio.sleep(4)
        assert injected(world) == Counter(["evt_6000"])


@virtual
async def test_a_kick_beside_an_earlier_one_keeps_its_scan() -> None:
    world = await a_world(a_route(to=("ci", "other")))
    for first in range(0, 1200, 40):
        await a_backlog(world, "kick", 20, first=first)
        await a_backlog(world, "kick", 20, first=first + 20, destination="other")
    async with owning(world) as control:
        await ended(control, await a_command(world, "kick"))
        scanned = control.checkpoint(f"kick/{NAME}")
    assert injected(world).total() == 600
    async with owning(world, SlowLog(world.log, seconds=0.5)):
        for name in (NAME, "destination/other"):
            await publish(world, ControlRecord(kind="kick", name=name, state="requested", at=now()))
        await asyncio.sleep(3.3)
    assert 600 < injected(world).total() < 1200, "in the middle of it"
    control = await ControlClient(world.log, TOPICS).control()
    assert all(control.checkpoint(f"kick/{NAME}")[place] >= end for place, end in scanned.items())


@virtual
async def test_a_jobs_end_does_not_cancel_a_simultaneous_command() -> None:
    class Racing(MemoryLog):
        @override
        async def append(
            self, topic: str, *, key: bytes, value: bytes, headers: RecordHeaders, partition: int | None = None
        ) -> Position:
            if key == b"checkpoint/pause/destination/ci" and now() < began + 2:
                await publish(world, ControlRecord(kind="pause", name=NAME, state="paused", at=now()))
            return await super().append(topic, key=key, value=value, headers=headers, partition=partition)

    world = await a_world(a_route())
    racing = Racing()
    racing.__dict__.update(world.log.__dict__)
    began = now()
    await a_command(world, "resume")
    async with owning(world, racing) as control:
        await asyncio.sleep(5)
        assert control.paused_by("build", "ci") == NAME
    async with owning(world) as control:
        assert control.paused_by("build", "ci") == NAME
        await a_command(world, "resume")
        await asyncio.sleep(2)
        assert control.commands["pause/destination/ci"].state == "active"


# Beside each other


@virtual
async def test_a_long_replay_of_dead_letters_delays_no_resume_or_kick() -> None:
    world = await a_world(a_route())
    await a_backlog(world, "dead", 2000, destination="audit")
    await a_backlog(world, "resume", 10, first=3000)
    await a_backlog(world, "kick", 10, first=4000)
    async with owning(world, SlowLog(world.log, 1.0)) as control:
        dead = await a_command(world, "dead")
        await asyncio.sleep(1)
        commands = [await a_command(world, kind) for kind in ("resume", "kick")]
        for command in commands:
            assert (await ended(control, command, within=6)).count == 10
        assert control.commands[dead.key].is_pending
        assert (await ended(control, dead)).count == 2000


@virtual
async def test_a_dead_letter_that_two_commands_cover_is_replayed_by_the_first() -> None:
    world = await a_world(a_route())
    await a_backlog(world, "dead", 300)
    await a_backlog(world, "dead", 300, first=300, route="other")
    async with owning(world, SlowLog(world.log)) as control:
        asked = [
            await a_command(world, "dead", "a", filter=DeadFilter(route="build")),
            await a_command(world, "dead", "b", filter=DeadFilter(route="other")),
            await a_command(world, "dead", "c", filter=DeadFilter(destination="ci")),
        ]
        counts = [(await ended(control, command)).count for command in asked]
    assert counts == [300, 300, 0]
    assert injected(world) == once(600)


# Answers


async def answers(
    world: World, placed: Sequence[StoredCommand], *, timeout: float = 10.0
) -> list[ControlRecord | None]:
    commands = ControlClient(world.log, TOPICS)
    return await asyncio.gather(*[commands.finished(each, timeout=timeout) for each in placed])


@virtual
async def test_each_of_six_kicks_given_at_once_is_answered_truly() -> None:
    world = await a_world(a_route())
    await a_backlog(world, "kick", 40)
    commands = ControlClient(world.log, TOPICS)
    async with owning(world):
        began = now()
        placed = await asyncio.gather(*[commands.kick(NAME) for _ in range(5)], commands.kick("route/build"))
        done = await answers(world, placed)
        assert now() - began < 7
    counts = [command.count for command in done if command is not None]
    assert counts == [40] * 6, "each of them stands for all that it was given for"
    assert injected(world) == once(40)


@virtual
async def test_hundreds_of_kicks_given_at_once_are_carried_out_though_the_log_is_slow() -> None:
    """One after the other, they would announce themselves for longer than an announcement counts, for ever."""
    world = await a_world(a_route())
    await a_backlog(world, "kick", 40)
    for number in range(420):
        await publish(world, ControlRecord(kind="kick", name=f"destination/d{number}", state="requested", at=now()))
    last = await a_command(world, "kick")
    async with owning(world, SlowLog(world.log, 0.15, topic=TOPICS.control)) as control:
        done = await ended(control, last, within=60)
        assert not control.pending("kick")
    assert done.count == 40
    assert injected(world) == once(40)


@virtual
async def test_hundreds_of_commands_about_dead_letters_are_not_compared_with_each_other_all_the_time() -> None:
    world = await a_world(a_route())
    await a_backlog(world, "dead", 600)
    letters = [stored.delivery.id for stored in world.dead()]
    for number, letter in enumerate(letters):
        await a_command(world, "dead", f"x{number}", filter=DeadFilter(ids=(letter,)), action="drop")
    compared = 0
    may_overlap = DeadFilter.may_overlap

    def counted(self: DeadFilter, other: DeadFilter) -> bool:
        nonlocal compared
        compared += 1
        return may_overlap(self, other)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeadFilter, "may_overlap", counted)
        async with owning(world) as control:
            await asyncio.sleep(10)
            assert len(control.pending("dead")) < 600
    assert compared < 20_000, "600 commands were ready some 40 times"


@virtual
async def test_what_is_parked_late_is_rescanned_though_the_clock_was_ahead() -> None:
    """A rescan that was noted by it would be due an hour later."""
    world = await a_world(a_route())
    world.log = log = UnsynchronizedLog(now=now)
    await log.create(TOPICS.specs([EVENTS]))
    await a_backlog(world, "resume", 3)
    command = await a_command(world, "resume")
    async with owning(world) as control:
        await ended(control, command)
        await asyncio.sleep(2.4 * RESCAN_INTERVAL)
        log.clock.ahead = 0.0
        await a_backlog(world, "resume", 3, first=3)
        await asyncio.sleep(6 * RESCAN_INTERVAL)
    assert injected(world) == once(6)


@virtual
async def test_expedited_deliveries_are_not_counted_again() -> None:
    world = await a_world(a_route())
    await a_backlog(world, "kick", 40)
    commands = ControlClient(world.log, TOPICS)
    async with operated(world) as control, running(world, world.worker(control)):
        counts = []
        for _ in range(2):
            (done,) = await answers(world, [await commands.kick(NAME)])
            assert done is not None
            counts.append(done.count)
            await asyncio.sleep(2)
    assert counts == [40, 0]
    assert len(world.client.made) == 40


@virtual
async def test_a_kick_injects_nothing_from_the_shortest_tier() -> None:
    """Nobody reads it, so all that the first kick has expedited is there still."""
    world = await a_world(a_route())
    await a_backlog(world, "kick", 40)
    commands = ControlClient(world.log, TOPICS)
    async with owning(world):
        for count in (40, 0, 0):
            (done,) = await answers(world, [await commands.kick(NAME)])
            assert done is not None
            assert done.count == count
    assert injected(world) == once(40)


@virtual
async def test_ten_kicks_in_a_row_make_one_attempt_within_three_seconds() -> None:
    world = await a_world(a_route())
    await a_backlog(world, "kick", 1)
    commands = ControlClient(world.log, TOPICS)
    async with operated(world) as control, running(world, world.worker(control)):
        await asyncio.sleep(10)
        began = now()
        for _ in range(10):
            await commands.kick(NAME)
            await asyncio.sleep(0.9)
        await world.doze(1800)
    assert len(world.client.made) == 1
    assert world.client.at[0] - began < 3.2


@virtual
async def test_a_kick_while_more_fails_postpones_nothing() -> None:
    world = await a_world(a_route(retry=a_policy(schedule=(600.0,), max_attempts=50, max_age=1e6)), ci=[503])
    await world.put(*events(1))
    commands = ControlClient(world.log, TOPICS)
    async with operated(world) as control, running(world, world.worker(control)):
        await asyncio.sleep(30)
        for count in range(2, 5):
            (done,) = await answers(world, [await commands.kick(NAME)])
            assert done is not None
            assert done.count == 1
            await asyncio.sleep(1)
            assert len(world.client.made) == count


@virtual
async def test_retries_in_transit_in_the_shortest_tier_are_due_on_leaving_it() -> None:
    world = await a_world(a_route())
    delivery = a_delivery(event=an_event(received_at=now()), successor=1, due=now() + 14)
    await world.log.append(
        TIER, key=b"ci", value=delivery.event.body, headers=encode_delivery(delivery, NO_METADATA, at=now())
    )
    commands = ControlClient(world.log, TOPICS)
    began = now()
    async with operated(world) as control, running(world, world.worker(control)):
        (done,) = await answers(world, [await commands.kick(NAME)])
        assert done is not None
        assert done.count == 1
        await asyncio.sleep(60)
    assert [at - began < 5.5 for at in world.client.at] == [True]


@virtual
async def test_a_pause_during_a_resume_ends_it_and_its_answer_says_so() -> None:
    world = await a_world(a_route())
    await a_backlog(world, "resume", 1000)
    commands = ControlClient(world.log, TOPICS)
    async with owning(world, SlowLog(world.log)):
        await commands.pause(NAME)
        placed = [await commands.resume(NAME)]
        await asyncio.sleep(0.4)
        await commands.pause(NAME)
        (done,) = await answers(world, [each for each in placed if each])
        assert done is not None
        assert (done.state, done.count) == ("cancelled", len(world.log.records(TIER)))
        assert 0 < done.count < 1000
        await asyncio.sleep(20)
        assert len(world.log.records(TIER)) == done.count
        await commands.resume(NAME)
        await asyncio.sleep(20)
    assert injected(world) == once(1000)


@virtual
async def test_a_resume_that_is_cancelled_unseen_is_answered() -> None:
    world = await a_world(a_route())
    commands = ControlClient(world.log, TOPICS)
    await commands.pause(NAME)
    placed = await commands.resume(NAME)
    await commands.pause(NAME)
    assert placed is not None
    async with owning(world):
        (done,) = await answers(world, [placed])
    assert done is not None
    assert (done.state, done.count) == ("cancelled", 0)


@virtual
async def test_a_cancelled_replay_reports_exactly_its_injections() -> None:
    world = await a_world(a_route())
    await events_of(world, 2000)
    commands = ControlClient(world.log, TOPICS)
    async with owning(world, SlowLog(world.log)):
        bounds = await world.log.bounds(EVENTS)
        ends = {f"{EVENTS}/{number}": end for number, (_, end) in bounds.items()}
        selection = Selection(route="build", since=0.0, starts=dict.fromkeys(ends, 0))
        placed = await commands.replay(selection, ends)
        waiting = await commands.replay(selection, ends)
        await asyncio.sleep(0.6)
        for replay in (placed, waiting):
            cancelled = await commands.cancel(replay.command.name)
            assert cancelled is not None
            (done,) = await answers(world, [cancelled])
            assert done is not None
            assert done.state == "cancelled"
            of_it = [each for each in world.stored(TIER) if each.metadata.replay == replay.command.name]
            assert done.count == len(of_it)
        assert 0 < len(world.log.records(TIER)) < 2000


@virtual
async def test_an_early_checkpoint_that_is_appended_late_is_overwritten_again() -> None:
    """Else a process that starts once the topic is compacted takes the resume for pending, for ever."""
    world = await a_world(a_route())
    async with operated(world) as control, running(world, world.worker(control)):
        await publish(world, ControlRecord(kind="pause", name=NAME, state="paused", at=now()))
        await asyncio.sleep(1)
        await world.put(*events(4))
        await asyncio.sleep(3)
        command = ControlRecord(kind="pause", name=NAME, state="resuming", at=now())
        await publish(world, command)
        await asyncio.sleep(3)
        assert not control.has_pending(command.key)
        await publish(world, ControlRecord(kind="checkpoint", name=command.key, state="requested", at=command.at))
        await asyncio.sleep(3)
    compacted = {record.key: record for record in world.log.records(TOPICS.control)}
    fresh = Control()
    for record in compacted.values():
        fresh.decode_and_apply(record.key, record.value, record.offset)
    assert fresh.commands[command.key].state == "active"
    assert fresh.commands[command.key].count == 4


@virtual
async def test_an_ordered_routes_backlog_is_reported_as_uncounted() -> None:
    world = await a_world(a_route(is_ordered=True, to=("ci",)), a_route("other", to=("audit",)))
    commands = ControlClient(world.log, TOPICS)
    async with owning(world):
        for name, told in ((NAME, "build"), ("route/build", "build"), ("destination/audit", "")):
            await commands.pause(name)
            resumed = await commands.resume(name)
            kicked = await commands.kick(name)
            assert resumed is not None
            for done in await answers(world, [resumed, kicked]):
                assert done is not None
                assert (done.count, done.detail) == (0, told)


@virtual
async def test_a_rescan_does_not_go_through_the_rules_for_each_resumed_name() -> None:
    """With 10,000 routes and 3,000 such names that blocked the event loop for half a second."""
    world = await a_world(a_route(is_ordered=True, to=("ci",)), a_route("other", to=("audit",)))
    await a_backlog(world, "resume", 1)
    owner, looks = Owner(world), list[object]()

    def rules() -> Rules:
        looks.append(None)
        return world.rules

    owner.jobs._resume_jobs._rules = rules
    for name in ("route/build", "route/other", "destination/ci"):
        owner.control.apply(ControlRecord(kind="pause", name=name, state="active", at=now()))
    ends = {f"{TOPICS.parked}/{number}": end for number, (_, end) in (await world.log.bounds(TOPICS.parked)).items()}
    assert await owner.jobs._resume_jobs.rescan({}, ends, None) == ends
    assert injected(world) == once(1)
    assert not looks


# BacklogCounts


@virtual
async def test_the_count_of_open_dead_letters_is_updated_without_a_rescan() -> None:
    world = await a_world(a_route())
    await a_backlog(world, "dead", 900)
    await a_backlog(world, "dead", 100, first=900, route="other")
    log = CountingLog(world.log)
    gauge = world.metrics.dead_letter_backlog
    async with owning(world, log) as control:
        await asyncio.sleep(6)
        assert (gauge.value, log.read) == (1000, 1000)
        for name, which, left in (
            ("a", DeadFilter(route="other"), 900),
            ("b", DeadFilter(ids=(a_delivery(event=an_event(id="evt_7")).id,)), 899),
            ("c", DeadFilter(until=now() - 1e6), 899),
        ):
            await ended(control, await a_command(world, "dead", name, action="drop", filter=which))
            read = log.read
            await asyncio.sleep(6)
            assert gauge.value == left
            assert log.read == read
        await a_backlog(world, "dead", 5, first=2000)
        await asyncio.sleep(6)
        assert gauge.value == 904


@virtual
async def test_a_dead_letter_replayed_by_a_running_job_is_not_open() -> None:
    world = await a_world(a_route())
    await a_backlog(world, "dead", 1500)
    async with owning(world, SlowLog(world.log, 1.5)) as control:
        command = await a_command(world, "dead")
        for _ in range(3):
            await asyncio.sleep(5.5)
            replayed = len(world.log.records(TIER))
            assert control.commands[command.key].is_pending
            assert replayed - CHECKPOINT_EVERY <= 1500 - world.metrics.dead_letter_backlog.value <= replayed


def test_dead_letters_not_covered_by_a_command_are_open() -> None:
    letters = OpenDeadLetterIndex("d")
    for offset in range(5000):
        name = "" if offset % 10 == 0 else f"dlv_{offset}"
        route = "a" if offset % 2 else "b"
        letters.add(0, offset, DeadLetterProperties(id=name, route=route, destination="c", reason="gone", at=offset))
    replayed = ControlRecord(
        kind="dead",
        name="x",
        state="done",
        at=0.0,
        checkpoint={"d/0": 3000},
        filter=DeadFilter(route="b", until=2000.0),
        latest=3000.0,
    )
    for _ in letters.remove_resolved(replayed, {"d/0": 1000}):
        pass
    covered = [offset for offset in range(1000, 2000) if offset % 2 == 0 and offset % 10]
    assert letters.count == 5000 - len(covered)
    letters.trim(0, 1500)
    assert letters.count == 3500 - len([offset for offset in covered if offset >= 1500])


# What a kick does, and says


async def _asked_to_wait(world: World, count: int, control: Control) -> None:
    """Let a destination ask for two hours of silence, while so many deliveries are on their way to it."""
    await world.put(*events(1))
    await asyncio.sleep(1)
    await world.put(*events(count + 1)[1:])
    await asyncio.sleep(60)
    assert len(world.client.made) == 1
    assert not control.pending("kick")


@pytest.mark.parametrize("kind", ["resume", "dead"])
def test_a_command_that_takes_long_has_begun_as_soon_as_there_is_a_checkpoint(kind: str) -> None:
    async def scenario() -> None:
        world = await a_world(a_route())
        await a_backlog(world, kind, 1000)
        client = ControlClient(world.log, TOPICS)
        placed = StoredCommand(await a_command(world, kind), (await world.log.bounds(TOPICS.control))[0][1] - 1)
        assert not await client.has_begun(placed)
        async with owning(world, SlowLog(world.log, 1.0)) as control:
            await asyncio.sleep(5.0)
            assert control.injected(placed.command.key)
            assert control.commands[placed.command.key].is_pending
            assert await client.has_begun(placed)
            await ended(control, placed.command)
        again = StoredCommand(await a_command(world, kind, "y"), (await world.log.bounds(TOPICS.control))[0][1] - 1)
        assert not await client.has_begun(again), "the checkpoint of the one before isn't its own"

    run(scenario())


@virtual
async def test_a_kick_lifts_the_wait_that_a_destination_has_asked_for() -> None:
    world = await a_world(a_route(retry=a_policy(max_age=86400.0)), ci=[Busy(7200.0), 200])
    commands = ControlClient(world.log, TOPICS)
    async with operated(world) as control, running(world, world.worker(control)):
        await _asked_to_wait(world, 4, control)
        (done,) = await answers(world, [await commands.kick(NAME)])
        assert done is not None
        assert describe_kick(done) == "5 tried now, all delivered"
        assert len({event for _, event, _ in world.client.made[1:]}) == 5
        await asyncio.sleep(30)
        assert len(world.client.made) == 6
        assert await world.unfinished() == 0


@virtual
async def test_a_kick_says_that_a_destination_has_asked_for_silence_again() -> None:
    world = await a_world(a_route(retry=a_policy(max_age=86400.0)), ci=[Busy(7200.0)])
    commands = ControlClient(world.log, TOPICS)
    async with operated(world) as control, running(world, world.worker(control)):
        await _asked_to_wait(world, 24, control)
        (done,) = await answers(world, [await commands.kick(NAME)])
        assert done is not None
        tried = len(world.client.made) - 1
        assert 0 < tried < 25
        # Only the first event had been tried before.
        assert (done.failed_by_result, done.repeated_failures) == ({"429": tried}, {"429": 1})
        how = f"{tried} got 429 (1 of them again)"
        assert describe_kick(done) == f"{tried} tried now: {how}; {25 - tried} wait (Retry-After)"


@virtual
async def test_a_kick_reports_its_responses_and_whether_they_are_new() -> None:
    world = await a_world(a_route(retry=a_policy(schedule=(600.0,), max_attempts=50, max_age=1e6)), ci=[401])
    await world.put(*events(3))
    commands = ControlClient(world.log, TOPICS)
    async with operated(world) as control, running(world, world.worker(control)):
        await asyncio.sleep(5)
        assert len(world.client.made) == 3
        (done,) = await answers(world, [await commands.kick(NAME)])
        assert done is not None
        assert len(world.client.made) == 6
        assert describe_kick(done) == "3 tried now: 3 got 401 again"
        world.client.scripts["ci"] = [403, 200]
        (done,) = await answers(world, [await commands.kick(NAME)])
        assert done is not None
        assert describe_kick(done) == "3 tried now: 2 delivered, 1 got 403"
        stored = await ControlClient(world.log, TOPICS).control()
        command = stored.commands["kick/destination/ci"]
        assert (command.tried, command.delivered, command.failed_by_result, command.repeated_failures) == (
            3,
            2,
            {"403": 1},
            {},
        )


@virtual
async def test_a_kick_reports_how_many_attempts_dead_lettered() -> None:
    retry = a_policy(schedule=(600.0,), max_attempts=2, max_age=1e6)
    world = await a_world(a_route(retry=retry), ci=[404])
    await world.put(*events(3))
    commands = ControlClient(world.log, TOPICS)
    async with operated(world) as control, running(world, world.worker(control)):
        await asyncio.sleep(5)
        assert len(world.client.made) == 3
        world.client.scripts["ci"] = [200, 404]
        (done,) = await answers(world, [await commands.kick(NAME)])
        assert done is not None
        assert len(world.client.made) == 6
        assert describe_kick(done) == "3 tried now: 1 delivered, 2 got 404 again; 2 became dead letters"
        assert dead_in(done) == 2


@virtual
async def test_a_kick_does_not_call_droppable_deliveries_delivered() -> None:
    retry = a_policy(schedule=(600.0,), max_attempts=50, max_age=1e6, results=(("404", Disposition.DROP),))
    world = await a_world(a_route(retry=retry), ci=[401])
    await world.put(*events(3))
    commands = ControlClient(world.log, TOPICS)
    async with operated(world) as control, running(world, world.worker(control)):
        await asyncio.sleep(5)
        world.client.scripts["ci"] = [404, 200]
        (done,) = await answers(world, [await commands.kick(NAME)])
        assert done is not None
        assert (done.tried, done.delivered) == (3, None)
        assert describe_kick(done) == "3 tried now"


@virtual
async def test_a_kick_reports_rate_limited_ones() -> None:
    limited = a_destination("ci", url="http://127.0.0.1:1/ci", rate=1.0)
    world = await a_world(
        a_route(retry=a_policy(max_age=86400.0)), destinations=[limited], ci=[Busy(7200.0), *[200] * 50]
    )
    commands = ControlClient(world.log, TOPICS)
    async with operated(world) as control, running(world, world.worker(control)):
        await _asked_to_wait(world, 9, control)
        (done,) = await answers(world, [await commands.kick(NAME)])
        assert done is not None
        assert done.tried is not None
        assert 2 <= done.tried <= len(world.client.made) - 1 <= done.tried + 1, "one may end just now"
        assert done.delivered == done.tried
        assert describe_kick(done) == f"{done.tried} tried now, all delivered; {10 - done.tried} wait (rate 1/s)"
        await asyncio.sleep(60)
        assert {event for _, event, _ in world.client.made} == {f"evt_{number}" for number in range(10)}


@virtual
async def test_a_kick_reports_the_backlog_of_a_reopened_breaker() -> None:
    world = await a_world(a_route(retry=a_policy(schedule=(600.0,), max_attempts=50, max_age=1e6)), ci=[503])
    await world.put(*events(40))
    commands = ControlClient(world.log, TOPICS)
    async with operated(world) as control, running(world, world.worker(control)):
        await asyncio.sleep(60)
        before = len(world.client.made)
        (done,) = await answers(world, [await commands.kick(NAME)])
        assert done is not None
        tried = len(world.client.made) - before
        assert (done.tried, sum(done.untried_by_reason.values())) == (tried, 40 - tried)
        assert done.untried_by_reason.keys() == {"breaker_open"}


@virtual
async def test_a_kick_counts_retries_due_during_its_announcement() -> None:
    world = await a_world(a_route(retry=a_policy(schedule=(600.0,), max_attempts=50, max_age=1e6)), ci=[503])
    await world.put(*events(300))
    commands = ControlClient(world.log, TOPICS)
    async with operated(world) as control, running(world, world.worker(control)):
        for seconds in (3, 13, 57):
            await asyncio.sleep(seconds)
            world.client.scripts["ci"] = [503]
            (failed,) = await answers(world, [await commands.kick(NAME)])
            assert failed is not None
            assert failed.count == 300
        await asyncio.sleep(13)
        world.client.scripts["ci"] = [0.1]
        before = len(world.client.made)
        (done,) = await answers(world, [await commands.kick(NAME)])
        assert done is not None
        assert done.tried is not None
        assert done.count == done.tried + sum(done.untried_by_reason.values()) == 300
        await asyncio.sleep(10)
        assert len(world.client.made) - before == 300


@virtual
async def test_a_kick_claims_no_earlier_failures() -> None:
    world = await a_world(a_route(retry=a_policy(schedule=(7.3,))), ci=[*[503] * 4, 410])
    await world.put(*events(4))
    commands = ControlClient(world.log, TOPICS)
    async with operated(world) as control, running(world, world.worker(control)):
        for _ in range(10_000):
            if len(world.dead()) == 4:
                break
            await asyncio.sleep(0.001)
        assert await world.unfinished(TIER) > 0, "not committed yet"
        (done,) = await answers(world, [await commands.kick(NAME)])
        assert done is not None
        assert (done.count, done.tried, done.delivered) == (0, 0, 0)


@virtual
async def test_a_kick_of_a_paused_name_says_so() -> None:
    world = await a_world(a_route())
    await a_backlog(world, "kick", 3)
    commands = ControlClient(world.log, TOPICS)
    async with operated(world) as control, running(world, world.worker(control)):
        await commands.pause("route/build")
        (done,) = await answers(world, [await commands.kick(NAME)])
        assert done is not None
        assert describe_kick(done) == "0 tried now, 3 wait (paused)"
    assert not world.client.made


@virtual
async def test_a_kick_sees_parked_ones_in_a_partition_leaderless_at_its_start() -> None:
    world, commands = await _a_kicked_pause()
    async with operated(world) as control, running(world, world.worker(control)):
        parked = await world.log.bounds(TOPICS.parked)
        _lose_leaders(world, parked)
        command = await commands.kick(NAME)
        await asyncio.sleep(1)
        for number in parked:
            world.log.find_leader(Partition(TOPICS.parked, number))
        (done,) = await answers(world, [command])
        assert done is not None
        assert describe_kick(done) == "0 tried now, 3 wait (paused)"
        assert done.unread == 0
    assert not world.client.made


@virtual
async def test_a_kick_claims_no_attempts_for_a_leaderless_partition() -> None:
    world, commands = await _a_kicked_pause()
    async with operated(world) as control, running(world, world.worker(control)):
        parked = await world.log.bounds(TOPICS.parked)
        command = await commands.kick(NAME)
        while len(world.log.records(TOPICS.parked)) < 3:  # noqa: ASYNC110 - a log sets no event
            await asyncio.sleep(0.001)
        _lose_leaders(world, parked)
        (done,) = await answers(world, [command])
        assert done is not None
        assert describe_kick(done) == "0 tried now, 3 are on the way"
        assert done.unread == 0, "a kick takes nothing from there"
    assert not world.client.made


@virtual
async def test_a_kick_claims_no_attempts_where_a_newer_version_may_have_taken_deliveries() -> None:
    """Its successors of what it found a breaker open for can't be read here: done isn't tried then."""
    world = await a_world(a_route())
    await a_backlog(world, "kick", 3)
    commands = ControlClient(world.log, TOPICS)
    async with operated(world) as control, running(world, world.worker(control)):
        command = await commands.kick(NAME)
        while len(injected(world)) < 3:  # noqa: ASYNC110 - a log sets no event
            await asyncio.sleep(0.001)
        await _newer(world, FROM["kick"])
        (done,) = await answers(world, [command])
        assert done is not None
        assert describe_kick(done) == "0 tried now, 3 are on the way"


@pytest.mark.parametrize("kind", ["kick", "resume"])
def test_an_answer_counts_a_partition_in_which_a_record_of_a_newer_version_ends_the_scan(kind: str) -> None:
    async def scenario() -> None:
        world = await a_world(a_route())
        (number, *_), _ = await world.log.readable(FROM[kind])
        await _newer(world, FROM[kind], partition=number)
        commands = ControlClient(world.log, TOPICS)
        async with operated(world) as control, running(world, world.worker(control)):
            await commands.pause(NAME)
            command = await (commands.kick if kind == "kick" else commands.resume)(NAME)
            assert command is not None
            (done,) = await answers(world, [command])
            assert done is not None
            assert done.unread == 1

    run(scenario())


async def _newer(world: World, topic: str, *, partition: int | None = None) -> None:
    headers = [
        (name, b"9" if name == "gw_v" else value)
        for name, value in encode_delivery(a_delivery(event=an_event()), NO_METADATA, at=now())
    ]
    await world.log.append(topic, key=b"ci", value=b"{}", headers=headers, partition=partition)


async def _a_kicked_pause() -> tuple[World, ControlClient]:
    world = await a_world(a_route())
    await a_backlog(world, "kick", 3)
    commands = ControlClient(world.log, TOPICS)
    await commands.pause("route/build")
    return world, commands


def _lose_leaders(world: World, numbers: Iterable[int]) -> None:
    for number in numbers:
        world.log.lose_leader(Partition(TOPICS.parked, number))


@virtual
async def test_a_kick_whose_owner_ends_after_its_announcement_does_not_say_that_nothing_waited() -> None:
    """What waited in the shortest tier is out by the time at which the next owner looks."""
    world = await a_world(a_route())
    for number in range(3):
        event = an_event(id=f"evt_{number}", received_at=now())
        headers = encode_delivery(a_delivery(event=event, successor=1, due=now() + 1200), NO_METADATA, at=now())
        await world.log.append(TIER, key=b"ci", value=event.body, headers=headers)
    commands = ControlClient(world.log, TOPICS)
    first, second = Owner(world), Owner(world)
    await first.start()
    async with running(world, world.worker(first.control)):
        await asyncio.sleep(4)  # they come out at 5 s
        command = await commands.kick(NAME)
        await asyncio.sleep(2.2)
        await second.start()
        await first.stop_jobs()
        (done,) = await answers(world, [command])
        assert done is not None
        assert describe_kick(done) == "3 deliveries are expedited; it isn't known yet how many were tried"
        assert len(world.client.made) == 3
        await first.stop()
        await second.stop()


@virtual
async def test_a_kick_whose_owner_is_killed_after_its_injections_claims_no_attempt() -> None:
    """The next owner injects them again, and routers drop those copies at once."""
    world = await a_world(a_route(retry=a_policy(max_age=86400.0)), ci=[3600.0])
    for number in range(20):  # with one key, as a router's: where a copy is recognised
        event = an_event(id=f"evt_{number}", received_at=now())
        headers = encode_delivery(a_delivery(event=event, successor=1, due=now() + 1200), NO_METADATA, at=now())
        await world.log.append(FROM["kick"], key=b"ci", value=event.body, headers=headers)
    mortal = MortalLog(world.log, appends=1 + 20 + 1, is_stored=False)  # dies with its checkpoint
    first, second = Owner(world, mortal), Owner(world)
    await first.start()
    commands = ControlClient(world.log, TOPICS)
    async with running(world, world.worker(first.control)):
        kick = await commands.kick(NAME)
        await mortal.died.wait()
        assert injected(world) == once(20)
        await first.stop_jobs()
        await second.start()
        (done,) = await answers(world, [kick])
        assert done is not None
        assert describe_kick(done) == "20 deliveries are expedited; it isn't known yet how many were tried"
        assert min(injected(world).values()) >= 2
        await first.stop()
        await second.stop()


@virtual
async def test_a_kick_without_a_router_claims_no_attempt() -> None:
    world = await a_world(a_route())
    await a_backlog(world, "kick", 1)
    commands = ControlClient(world.log, TOPICS)
    async with owning(world):
        (done,) = await answers(world, [await commands.kick(NAME)])
        assert done is not None
        assert describe_kick(done) == "0 tried now, 1 is on the way"


@virtual
async def test_a_kick_of_more_than_is_followed_does_not_guess() -> None:
    world = await a_world(a_route())
    await a_backlog(world, "kick", MAX_TRACKED + 1)
    commands = ControlClient(world.log, TOPICS)
    async with operated(world) as control, running(world, world.worker(control)):
        (done,) = await answers(world, [await commands.kick(NAME)])
        assert done is not None
        assert describe_kick(done) == "10,001 deliveries are expedited; it isn't known yet how many were tried"


@virtual
async def test_a_hold_is_logged_when_it_begins_and_when_a_kick_ends_it() -> None:
    world = await a_world(a_route(retry=a_policy(max_age=86400.0)), ci=[Busy(7200.0), 200])
    commands = ControlClient(world.log, TOPICS)
    with structlog.testing.capture_logs() as lines:
        world.logger = structlog.get_logger()
        async with operated(world) as control, running(world, world.worker(control)):
            await _asked_to_wait(world, 4, control)
            assert world.metrics.destination_held.labels("ci").value == pytest.approx(7200, abs=2)
            await answers(world, [await commands.kick(NAME)])
            await asyncio.sleep(2)
            assert world.metrics.destination_held.labels("ci").value == 0
    told = [line for line in lines if line["event"] in ("destination_held", "destination_released")]
    assert [(line["event"], line["destination"], line["why"]) for line in told] == [
        ("destination_held", "ci", "retry_after"),
        ("destination_released", "ci", "retry_after"),
    ]
    assert 7190 < told[0]["seconds"] <= 7200


@virtual
async def test_a_breaker_with_nothing_left_to_probe_is_reported_as_such_until_the_next_deliveries_close_it() -> None:
    dying = a_policy(results=(("5xx", Disposition.DEAD_LETTER),))
    world = await a_world(a_route(retry=dying), ci=[503])
    commands = ControlClient(world.log, TOPICS)
    async with operated(world) as control, running(world, world.worker(control)) as worker:
        await world.put(*events(5))
        await asyncio.sleep(2)
        assert len(world.dead()) == 5
        assert (worker.holds["ci"].is_probe_due, worker.holds["ci"].untried_since) == (False, None)
        tried_at = now() - 2
        await asyncio.sleep(20)
        before = worker.holds["ci"].untried_since
        assert before == pytest.approx(tried_at, abs=0.1)
        world.client.scripts["ci"] = [200]
        (done,) = await answers(world, [await commands.kick(NAME)])
        assert done is not None
        assert describe_kick(done) == "nothing was waiting; where a breaker is open, the next delivery is the probe"
        await asyncio.sleep(60)
        assert (worker.holds["ci"].untried_since, worker.holds["ci"].last_failure) == (before, "503")
        assert world.metrics.breaker_open.labels("ci").value == 1, "only an attempt can close it"
        for event in events(8)[5:]:
            await world.put(event)
            await asyncio.sleep(2)
        assert len(world.client.made) == 8
        assert not worker.holds
        assert world.metrics.breaker_open.labels("ci").value == 0


@virtual
async def test_ordered_waiting_deliveries_can_probe_a_destination() -> None:
    patient = a_policy(schedule=(600.0,), max_attempts=50, max_age=1e6)
    world = await a_world(a_route(retry=patient, is_ordered=True), ci=[503])
    async with running(world) as worker:
        await world.put(*[an_event(id=f"evt_{number}", key=f"k{number}", received_at=now()) for number in range(5)])
        await asyncio.sleep(30)
        assert len(world.client.made) == 5
        assert (worker.holds["ci"].is_probe_due, worker.holds["ci"].untried_since) == (True, None)


@virtual
async def test_a_moment_of_silence_has_no_line() -> None:
    world = await a_world(a_route(retry=a_policy(max_age=86400.0)), ci=[Busy(3.0), 200])
    with structlog.testing.capture_logs() as lines:
        world.logger = structlog.get_logger()
        async with operated(world) as control, running(world, world.worker(control)):
            await world.put(*events(1))
            await asyncio.sleep(30)
    assert not [line for line in lines if line["event"].startswith("destination_")]


@virtual
async def test_a_pause_of_a_route_has_a_metric_and_a_line_with_its_author() -> None:
    world = await a_world(a_route())
    commands = ControlClient(world.log, TOPICS)
    with structlog.testing.capture_logs() as lines:
        world.logger = structlog.get_logger()
        async with operated(world) as control, running(world, world.worker(control)):
            await commands.pause("route/build")
            await asyncio.sleep(3)
            assert world.metrics.route_paused.labels("build").value == 1
            assert await commands.resume("route/build") is not None
            await asyncio.sleep(3)
            assert world.metrics.route_paused.labels("build").value == 0
    told = [line for line in lines if line["event"].startswith("deliveries_")]
    assert [(line["event"], line["name"], line["by"]) for line in told] == [
        ("deliveries_paused", "route/build", who()),
        ("deliveries_resumed", "route/build", who()),
    ]


@virtual
async def test_kicks_that_the_owner_before_has_answered_leave_nothing_to_do() -> None:
    world = await a_world(a_route())
    owner = Owner(world)
    await owner.start()
    await asyncio.sleep(2)
    began = now()
    await owner.jobs._kicks.kick(owner.jobs._progress)
    assert now() == began
    await owner.stop()


@pytest.mark.parametrize("kind", ["resume", "dead"])
def test_a_job_injects_elsewhere_where_a_partition_has_no_leader(kind: str) -> None:
    """Otherwise it would wait for that one, and others for it."""

    async def scenario() -> None:
        world = await a_world(a_route(to=tuple("abcdefgh")))
        for number, name in enumerate("abcdefgh"):
            await a_backlog(world, kind, 1, first=number, destination=name)
        lost = Partition(TIER, partition_of(b"a", len(await world.log.bounds(TIER))))
        world.log.lose_leader(lost)
        command = await a_command(world, kind)
        async with owning(world) as control:
            await ended(control, command, within=10)
        assert injected(world) == once(8)

    run(scenario())
