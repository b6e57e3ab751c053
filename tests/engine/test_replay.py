"""Replays of events, on the log in memory and in virtual time: what is injected, how fast, and what a kill costs."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import cycle, pairwise
from typing import Any

import pytest
import structlog
from prometheus_client import CollectorRegistry
from typing_extensions import override

from gateway.engine.control.follower import Follower
from gateway.engine.control.records import ControlRecord, DeadFilter, DeadLetterProperties, Selection
from gateway.engine.control.state import Control
from gateway.engine.jobs.injector import BACKLOG
from gateway.engine.jobs.log_reader import CHECKPOINT_EVERY
from gateway.engine.jobs.runner import KEEP_COMMANDS_FOR, Jobs
from gateway.log.base import Partition, Position, Record, RecordHeaders, partition_of
from gateway.log.records import decode_event
from gateway.model import Event, EventId, LogUnavailableError, RecordMetadata, delivery_id, event_id
from gateway.ops.control_client import ControlClient
from gateway.ops.replays import follow
from gateway.rules.expressions import Expression
from gateway.telemetry.metrics import Metrics
from tests.builders import a_policy, a_route, an_event
from tests.engine.test_worker import EVENTS, QUIET, TOPICS, World, a_world, publish, rules_of, running, virtual
from tests.memory_log import MemoryLog
from tests.virtual_time import now, run

pytestmark = pytest.mark.rotated(share=1 / 5, group="replay")

TIER = TOPICS.retry("5s")


class MortalLog(MemoryLog):
    """A connection whose process dies in one of its appends: before it is stored, or after, unheard of."""

    def __init__(self, log: MemoryLog, *, appends: int, is_stored: bool) -> None:
        super().__init__()
        self.__dict__.update(log.__dict__)
        self.died = asyncio.Event()
        self._left = appends
        self._is_stored = is_stored

    @override
    async def append(
        self, topic: str, *, key: bytes, value: bytes, headers: RecordHeaders, partition: int | None = None
    ) -> Position:
        self._left -= 1
        if self._left < 0 or (self._left == 0 and not self._is_stored):
            await self._die()
        position = await super().append(topic, key=key, value=value, headers=headers, partition=partition)
        if self._left == 0:
            await self._die()
        return position

    async def _die(self) -> None:
        self.died.set()
        await asyncio.Event().wait()


class FlakyLog(MemoryLog):
    """A connection on which a scan of events breaks off once, after a batch."""

    def __init__(self, log: MemoryLog) -> None:
        super().__init__()
        self.__dict__.update(log.__dict__)
        self.has_failed = False

    @override
    async def scan(self, partition: Partition, start: int, end: int) -> AsyncIterator[Sequence[Record]]:
        async for records in super().scan(partition, start, end):
            yield records
            if partition.topic == EVENTS and not self.has_failed:
                self.has_failed = True
                raise LogUnavailableError("the scan was told to fail")


class HastyLog(MemoryLog):
    """A connection whose estimate of the time gains a millisecond on each look, as after a broker's clock was set."""

    def __init__(self, log: MemoryLog) -> None:
        super().__init__()
        self.__dict__.update(log.__dict__)
        self._gained = 0.0
        self._is_looked_at = True

    @override
    def now(self) -> float:
        self._gained += 0.001
        return super().now() + (self._gained if self._is_looked_at else 0.0)

    @override
    async def append(
        self, topic: str, *, key: bytes, value: bytes, headers: RecordHeaders, partition: int | None = None
    ) -> Position:
        self._is_looked_at = False
        try:
            return await super().append(topic, key=key, value=value, headers=headers, partition=partition)
        finally:
            self._is_looked_at = True


class LateLog(MemoryLog):
    """A connection whose acknowledgements of injections come late by turns."""

    def __init__(self, log: MemoryLog) -> None:
        super().__init__()
        self.__dict__.update(log.__dict__)
        self._waits = cycle((0.02, 0.0, 0.0))

    @override
    async def append(
        self, topic: str, *, key: bytes, value: bytes, headers: RecordHeaders, partition: int | None = None
    ) -> Position:
        wait = next(self._waits) if topic == TIER else 0.0
        if wait:
            await asyncio.sleep(wait)
        return await super().append(topic, key=key, value=value, headers=headers, partition=partition)


class Owner:
    """A process that may own the jobs: its follower and its jobs."""

    def __init__(self, world: World, log: MemoryLog | None = None) -> None:
        log = world.log.another() if log is None else log
        self.follower = Follower(log, TOPICS, Metrics(CollectorRegistry()), QUIET)
        self.jobs = Jobs(
            log=log,
            topics=TOPICS,
            rules=lambda: world.rules,
            follower=self.follower,
            metrics=world.metrics,
            logger=world.logger,
        )
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def control(self) -> Control:
        return self.follower.control

    async def start(self) -> None:
        caught_up = asyncio.Event()
        self._tasks = [
            asyncio.create_task(self.follower.follow(caught_up)),
            asyncio.create_task(self.jobs.run()),
        ]
        await caught_up.wait()

    async def stop_jobs(self) -> None:
        """Release the jobs, and go on following what operators command."""
        self._tasks[1].cancel()
        await asyncio.wait({self._tasks[1]})

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        results = await asyncio.gather(*self._tasks, return_exceptions=True)
        assert [type(result) for result in results] == [asyncio.CancelledError] * 2


@asynccontextmanager
async def owning(world: World, log: MemoryLog | None = None) -> AsyncIterator[Control]:
    """Be the process that owns the jobs."""
    owner = Owner(world, log)
    await owner.start()
    yield owner.control
    await owner.stop()


async def events_of(world: World, count: int, **fields: Any) -> list[Event]:
    made = [an_event(id=f"evt_{number}", received_at=now(), **fields) for number in range(count)]
    await world.put(*made)
    return made


async def a_replay(
    world: World, name: str = "x", *, ends: int | None = None, places: Mapping[str, int] | None = None, **fields: Any
) -> ControlRecord:
    """Ask for a replay of all that there is, or below an offset of each partition, or below those of some.

    It begins where its time begins, or at the offset `starts`.
    """
    values: dict[str, Any] = {"route": "build", "since": 0.0} | fields
    bounds, _ = await world.log.readable(EVENTS)
    first = values.pop("starts", None)
    starts = await world.log.offsets_at(EVENTS, values["since"], bounds.keys())
    starts = starts if first is None else dict.fromkeys(starts, first)
    all_of_them = {f"{EVENTS}/{number}": end if ends is None else ends for number, (_, end) in bounds.items()}
    command = ControlRecord(
        kind="replay",
        name=name,
        state="requested",
        at=now(),
        checkpoint=all_of_them if places is None else places,
        selection=Selection(**values, starts={f"{EVENTS}/{number}": start for number, start in starts.items()}),
    )
    await publish(world, command)
    return command


async def ended(control: Control, name: str = "x", *, within: float = 600.0) -> ControlRecord:
    until = now() + within
    while (command := control.commands.get(f"replay/{name}")) is None or command.state == "requested":
        assert now() < until, "expected the replay to end"
        await asyncio.sleep(0.1)
    return command


def injected(world: World) -> Counter[str]:
    return Counter(stored.delivery.event.id for stored in world.stored(TIER))


@virtual
async def test_events_that_match_the_current_rules_go_to_every_destination() -> None:
    world = await a_world(a_route(match={"type": "push"}, when="body.n != 3", to=("ci", "audit")), a_route("other"))
    for number in range(5):
        await world.put(an_event(id=f"evt_{number}", body={"n": number}))
    await world.put(an_event(id="evt_issue", type="issues", body={"n": 1}))
    await asyncio.sleep(100)
    async with owning(world) as control:
        command = await a_replay(world)
        done = await ended(control)
    assert (done.state, done.count) == ("done", 8)
    stored = world.stored(TIER)
    assert sorted((one.delivery.destination, one.delivery.event.id) for one in stored) == sorted(
        (name, f"evt_{number}") for number in (0, 1, 2, 4) for name in ("ci", "audit")
    )
    for one in stored:
        assert one.delivery.route == "build"
        assert one.delivery.attempts == ()
        assert one.metadata == RecordMetadata(replay="x")
        assert command.at <= one.delivery.replayed_at == one.delivery.due <= now()


@virtual
async def test_a_replayed_delivery_keeps_its_id_and_restarts_its_attempts_and_age() -> None:
    policy = a_policy(schedule=(1.0,), max_attempts=2, max_age=60.0)
    world = await a_world(a_route(retry=policy), ci=[503, 503, 503, 200])
    async with owning(world) as control, running(world, world.worker(control)):
        await events_of(world, 1)
        await asyncio.sleep(600)
        (dead,) = world.dead()
        await a_replay(world)
        await asyncio.sleep(60)
    assert [number for _, _, number in world.client.made] == [1, 2, 1, 2]
    assert {one.delivery.id for one in world.stored(TIER)} == {dead.delivery.id}
    assert len(world.dead()) == 1


@virtual
async def test_only_the_events_of_the_time_the_source_and_the_destination_are_replayed() -> None:
    world = await a_world(a_route(to=("ci", "audit"), sources=("github", "gitlab")))
    moments = []
    for number in range(6):
        moments.append(now())
        for source in ("github", "gitlab"):
            await world.put(an_event(id=f"evt_{source}_{number}", source=source))
        await asyncio.sleep(10)
    async with owning(world) as control:
        await a_replay(world, since=moments[1], until=moments[4], source="gitlab", destination="audit")
        await ended(control)
    assert sorted((one.delivery.destination, one.delivery.event.id) for one in world.stored(TIER)) == [
        ("audit", f"evt_gitlab_{number}") for number in (1, 2, 3)
    ]


@virtual
async def test_events_after_the_command_are_not_replayed() -> None:
    world = await a_world(a_route())
    await events_of(world, 20)
    await a_replay(world)
    await world.put(*[an_event(id=f"evt_late_{number}") for number in range(20)])
    async with owning(world) as control:
        await ended(control)
    assert injected(world) == Counter({f"evt_{number}": 1 for number in range(20)})


@virtual
async def test_two_replays_of_the_same_events_are_not_duplicates_of_each_other() -> None:
    world = await a_world(a_route())
    await events_of(world, 5)
    async with owning(world) as control, running(world, world.worker(control)):
        await asyncio.sleep(1)
        for name in ("first", "second"):
            await a_replay(world, name)
            await asyncio.sleep(0.01)
        await asyncio.sleep(30)
    assert len(world.client.made) == 15


SHARED = event_id("github", "customer-7")


@pytest.mark.parametrize("bodies", [(b"1", b"2", b"3"), (b"same",) * 3], ids=["of-each-its-own", "the-same"])
def test_events_that_share_an_identity_are_replayed_under_ids_of_their_own(bodies: tuple[bytes, ...]) -> None:
    async def scenario() -> None:
        world = await a_world(a_route(to=("ci", "audit")))
        await world.put(*[an_event(id=SHARED, body=body) for body in bodies], an_event(id="evt_other"))
        async with owning(world) as control:
            await a_replay(world)
            await ended(control)
        ids = [one.delivery.id for one in world.stored(TIER) if one.delivery.event.id == SHARED]
        assert len(ids) == len(set(ids)) == 6
        first = {delivery_id(SHARED, "build", name) for name in ("ci", "audit")}
        assert first < set(ids), "the first of them has the id that it was delivered with"
        assert {one.delivery.event.id for one in world.stored(TIER)} == {SHARED, "evt_other"}

    run(scenario())


@virtual
async def test_an_identity_is_shared_with_events_before_the_replay_too() -> None:
    world = await a_world(a_route())
    await world.put(*[an_event(id=SHARED, body=body) for body in (b"1", b"2")])
    ends = await world.log.bounds(EVENTS)
    moment = now() + 10
    await asyncio.sleep(20)
    await world.put(an_event(id=SHARED, body=b"3"))
    assert await world.log.bounds(EVENTS) != ends
    async with owning(world) as control:
        await a_replay(world, since=moment)
        await ended(control)
    (replayed,) = world.stored(TIER)
    assert replayed.delivery.id != delivery_id(SHARED, "build", "ci")


@virtual
async def test_the_id_of_a_replayed_and_then_deleted_event_is_not_reused() -> None:
    """The next owner can't see it any more, so it tells apart all that may share its identity."""
    world = await a_world(a_route())
    plain, alone = EventId("evt_without_identity"), event_id("github", "alone")
    for name, body in ((SHARED, b"1"), (SHARED, b"2"), (SHARED, b"3"), (alone, b"4"), (plain, b"5")):
        await world.put(an_event(id=name, body=body, key="one partition"))
    await a_replay(world, rate=0.5)
    async with owning(world):
        await asyncio.sleep(1.5)
    ((number, start),) = [(number, at) for number, (at, end) in (await world.log.bounds(EVENTS)).items() if end > at]
    assert [one.delivery.event.body for one in world.stored(TIER)] == [b"1"]
    world.log.delete_below(Partition(EVENTS, number), start + 1)
    async with owning(world) as control:
        await ended(control)
    ids = {one.delivery.event.body: one.delivery.id for one in world.stored(TIER)}
    assert len(set(ids.values())) == len(ids) == 5
    assert ids[b"1"] == delivery_id(SHARED, "build", "ci")
    assert ids[b"4"] != delivery_id(alone, "build", "ci")
    assert ids[b"5"] == delivery_id(plain, "build", "ci")


@virtual
async def test_a_replay_keeps_ids_though_the_log_begins_in_the_middle() -> None:
    """What had been deleted before it was asked for is none of its deliveries."""
    world = await a_world(a_route())
    for body in (b"1", b"2"):
        await world.put(an_event(id=SHARED, body=body))
        await asyncio.sleep(1)
    for number, (_, end) in (await world.log.bounds(EVENTS)).items():
        world.log.delete_below(Partition(EVENTS, number), end - 1)
    async with owning(world) as control:
        await a_replay(world)
        await ended(control)
    (replayed,) = world.stored(TIER)
    assert (replayed.delivery.event.body, replayed.delivery.id) == (b"2", delivery_id(SHARED, "build", "ci"))


@virtual
async def test_a_duplicate_by_the_rules_keeps_its_originals_id() -> None:
    """A receiver that deduplicates drops it then, as the gateway would."""
    world = await a_world(a_route())
    source = replace(world.rules.sources["github"], id=Expression("headers['x-id']"), dedupe=60.0)
    copy = an_event(id=event_id("github", "7"), headers={"X-Id": "7"})
    for seconds in (30, 40, 0):
        await world.put(copy)
        await asyncio.sleep(seconds)
    ids: list[set[str]] = []
    for name, told in (("one", source), ("other", replace(source, id=Expression("headers['x-other']")))):
        world.rules = replace(world.rules, sources={"github": told})
        async with owning(world) as control:
            await a_replay(world, name)
            await ended(control, name)
        ids.append({one.delivery.id for one in world.stored(TIER)[3 * len(ids) :]})
    assert [len(each) for each in ids] == [2, 3], "the third came after the window; by other rules none is a copy"


@virtual
async def test_a_replay_that_is_killed_gives_each_event_the_id_that_it_had() -> None:
    world = await a_world(a_route())
    await world.put(*[an_event(id=SHARED, body=b"%d" % number) for number in range(40)])
    command = await a_replay(world, rate=10.0)
    for appends in (7, 15):
        mortal = MortalLog(world.log, appends=appends, is_stored=True)
        async with owning(world, mortal):
            await mortal.died.wait()
    async with owning(world) as control:
        await ended(control, command.name)
    given = {(one.delivery.event.body, one.delivery.id) for one in world.stored(TIER)}
    assert len({body for body, _ in given}) == len({name for _, name in given}) == len(given) == 40


@virtual
async def test_an_event_that_the_condition_fails_for_is_dead_lettered_as_a_new_one_is() -> None:
    world = await a_world(a_route(when="body.ref + 1 > 2"))
    await events_of(world, 2)
    async with owning(world) as control:
        await a_replay(world)
        done = await ended(control)
    assert done.count == 0
    assert [stored.metadata.dead_reason for stored in world.dead()] == ["expression_error"] * 2
    assert world.stored(TIER) == []


# Kills


async def _killed_at(append: int, *, is_stored: bool, count: int, **fields: Any) -> tuple[int, int, int]:
    """Kill the owner at an append, let another go on, and return what was skipped, repeated, and the count told."""
    world = await a_world(a_route())
    await events_of(world, count)
    command = await a_replay(world, **fields)
    mortal = MortalLog(world.log, appends=append, is_stored=is_stored)
    async with owning(world, mortal):
        async with asyncio.timeout(60):
            await mortal.died.wait()
        # Dead, it appends nothing and commits nothing.
        world.log.fail_commits(1)
    world.log.fail_commits(0)
    async with owning(world) as control:
        await ended(control)
        done = control.commands[command.key]
    ledger = injected(world)
    return count - len(ledger), ledger.total() - len(ledger), done.count


@pytest.mark.parametrize("is_stored", [False, True], ids=["unstored", "stored"])
@pytest.mark.rotated(share=1 / 2)
def test_an_owner_killed_at_any_append_skips_nothing_and_repeats_at_most_a_batch(*, is_stored: bool) -> None:
    """With a rate, a batch is what is injected in a second."""
    for append in range(1, 95):
        skipped, repeated, told = run(_killed_at(append, is_stored=is_stored, count=90, rate=30.0))
        assert skipped == 0, f"killed at append {append}"
        assert repeated <= 30 * 1.04 + 2, f"killed at append {append}"
        assert told == 90, f"killed at append {append}"


@pytest.mark.parametrize("append", [1, 99, 100, 101, 499, 500, 501, 502, 503, 700, 1001, 1002, 1003, 1004, 1005])
@pytest.mark.rotated
def test_an_owner_killed_without_a_rate_repeats_at_most_500(append: int) -> None:
    for is_stored in (False, True):
        skipped, repeated, told = run(_killed_at(append, is_stored=is_stored, count=1001))
        assert (skipped, told) == (0, 1001)
        assert repeated <= CHECKPOINT_EVERY


@pytest.mark.parametrize("kind", [MemoryLog.another, LateLog])
def test_a_replay_that_is_stopped_gracefully_repeats_nothing(kind: Callable[[MemoryLog], MemoryLog]) -> None:
    async def scenario() -> None:
        world = await a_world(a_route())
        await events_of(world, 600)
        await a_replay(world, rate=100.0)
        for number in range(12):  # between appends and in them
            async with owning(world, kind(world.log)):
                await asyncio.sleep(0.5 + 0.003 * number)
        async with owning(world) as control:
            assert (await ended(control)).count == 600
        assert injected(world) == Counter({f"evt_{number}": 1 for number in range(600)})

    run(scenario())


@virtual
async def test_a_replay_that_moves_to_another_process_repeats_nothing() -> None:
    world = await a_world(a_route())
    await events_of(world, 600)
    await a_replay(world, rate=100.0)
    owner = Owner(world)
    await owner.start()
    for seconds in (1.23, 0.5, 1.57, 0.01):
        await asyncio.sleep(seconds)
        following = Owner(world)
        await following.start()  # takes everything from the owner and gives it back
        await asyncio.sleep(0.37)
        await owner.stop()
        owner = following
    await ended(owner.control)
    await owner.stop()
    assert injected(world) == Counter({f"evt_{number}": 1 for number in range(600)})


@virtual
async def test_a_process_that_has_lost_the_jobs_injects_nothing_more() -> None:
    world = await a_world(a_route())
    await events_of(world, 600)
    await a_replay(world, rate=100.0)
    owner = Owner(world)
    await owner.start()
    await asyncio.sleep(1.5)
    await owner.jobs.revoked([Partition(TOPICS.control, 0)])
    before = len(world.log.records(TIER))
    assert owner.control.injected("replay/x") == before > 100
    await asyncio.sleep(10)
    assert len(world.log.records(TIER)) == before
    await owner.stop()


@virtual
async def test_an_interrupted_scan_resumes_where_it_was() -> None:
    world = await a_world(a_route())
    await events_of(world, 700, key="same")
    await a_replay(world, rate=150.0)
    async with owning(world, FlakyLog(world.log)) as control:
        await ended(control)
    assert injected(world) == Counter({f"evt_{number}": 1 for number in range(700)})


@virtual
async def test_a_log_that_is_away_for_a_while_is_waited_for() -> None:
    world = await a_world(a_route())
    await events_of(world, 700)
    async with owning(world) as control:
        await a_replay(world, rate=200.0)
        await asyncio.sleep(1.5)
        world.log.fail_appends()
        await asyncio.sleep(30)
        world.log.fail_appends(0)
        assert (await ended(control)).count == 700
    assert injected(world) == Counter({f"evt_{number}": 1 for number in range(700)})


# Partitions that can't be read


async def _beside_a_lost_partition(world: World, count: int = 60) -> tuple[ControlRecord, Partition, set[str]]:
    """Ask for a replay, and lose a partition; return the command, the partition, and which events it has."""
    await events_of(world, count)
    command = await a_replay(world)
    lost = Partition(EVENTS, 1)
    there = {str(event.id) async for event in events_in(world, lost)}
    assert 0 < len(there) < count
    world.log.lose_leader(lost)
    return command, lost, there


async def events_in(world: World, partition: Partition) -> AsyncIterator[Event]:
    start, end = (await world.log.bounds(partition.topic))[partition.number]
    async for records in world.log.scan(partition, start, end):
        for record in records:
            yield decode_event(record)


@virtual
async def test_a_replay_takes_readable_partitions_and_ends_only_with_the_rest() -> None:
    world = await a_world(a_route())
    command, lost, there = await _beside_a_lost_partition(world)
    world.logger = structlog.get_logger()
    with structlog.testing.capture_logs() as lines:
        async with owning(world) as control:
            await asyncio.sleep(30)
            assert injected(world) == Counter({f"evt_{n}": 1 for n in range(60) if f"evt_{n}" not in there})
            assert control.commands[command.key] == command, "it isn't complete"
            assert (control.injected(command.key), control.unread(command.key)) == (60 - len(there), 1)
            follower = follow(world.log, TOPICS, command.name, timeout=5)
            (last,) = [progress async for progress in follower]
            assert (last.command.state, last.injected, last.unread) == ("requested", 60 - len(there), 1)
            world.log.find_leader(lost)
            done = await ended(control, within=10)
    assert (done.state, done.count, done.unread) == ("done", 60, 0)
    assert injected(world) == Counter({f"evt_{number}": 1 for number in range(60)})
    waits = [line["error"] for line in lines if line["event"] == "replay_waits"]
    assert waits == [f"{EVENTS}/1: no leader"]


@virtual
async def test_a_replay_waiting_for_a_partition_does_not_delay_the_next() -> None:
    world = await a_world(a_route())
    _, lost, there = await _beside_a_lost_partition(world)
    async with owning(world) as control:
        await a_replay(world, "next", places={f"{EVENTS}/0": 5})
        assert (await ended(control, "next", within=20)).count == 5
        await publish(world, control.commands["replay/x"].with_state("cancelled", count=control.injected("replay/x")))
        await asyncio.sleep(1)
        assert control.injected("replay/x") == 60 - len(there)
        world.log.find_leader(lost)
        await asyncio.sleep(20)
    assert Counter(stored.metadata.replay for stored in world.stored(TIER)) == {"x": 60 - len(there), "next": 5}


@virtual
async def test_a_replay_waits_for_the_election_of_a_leader() -> None:
    world = await a_world(a_route())
    _, lost, _ = await _beside_a_lost_partition(world)
    async with owning(world) as control:
        await asyncio.sleep(3)
        world.log.find_leader(lost)
        assert (await ended(control, within=5)).count == 60
        assert control.unread("replay/x") == 0
    assert injected(world) == Counter({f"evt_{number}": 1 for number in range(60)})


def test_an_owner_killed_while_a_partition_is_away_skips_nothing_and_repeats_at_most_a_batch() -> None:
    async def scenario(append: int, *, is_stored: bool) -> None:
        world = await a_world(a_route())
        command, lost, there = await _beside_a_lost_partition(world)
        mortal = MortalLog(world.log, appends=append, is_stored=is_stored)
        async with owning(world, mortal):
            await asyncio.sleep(10)
            world.log.find_leader(lost)
            async with asyncio.timeout(60):
                await mortal.died.wait()
            world.log.lose_leader(lost)
            world.log.fail_commits(1)
        world.log.fail_commits(0)
        async with owning(world) as control:
            await asyncio.sleep(10)
            assert control.commands[command.key].is_pending == (control.unread(command.key) == 1)
            world.log.find_leader(lost)
            done = await ended(control)
        ledger = injected(world)
        assert len(ledger) == done.count == 60
        # All the partitions that were read come before the checkpoint that tells of the one that wasn't.
        assert ledger.total() - 60 <= max(len(there), 60 - len(there))

    for append in (1, 30, 41, 42, 43, 44, 50, 61, 62):
        for is_stored in (False, True):
            run(scenario(append, is_stored=is_stored))


# Pace


@pytest.mark.parametrize("kind", [MemoryLog.another, HastyLog, LateLog])
def test_the_rate_is_kept_and_reached(kind: Callable[[MemoryLog], MemoryLog]) -> None:
    async def scenario() -> None:
        world = await a_world(a_route(to=("ci", "audit")))
        await events_of(world, 500)
        async with owning(world, kind(world.log)) as control:
            began = now()
            await a_replay(world, rate=50.0)
            await ended(control)
        at = sorted(record.appended_at for record in world.log.records(TIER))
        assert len(at) == 1000
        for width in (1.0, 5.0):
            busiest = max(sum(start <= other < start + width for other in at) for start in at)
            assert busiest <= 50 * (width + 0.04) + 2
        assert 1000 / 50 - 1 <= at[-1] - began <= 1.05 * 1000 / 50

    run(scenario())


@virtual
async def test_a_rate_of_a_few_an_hour_is_kept() -> None:
    world = await a_world(a_route())
    await events_of(world, 4)
    async with owning(world) as control:
        await a_replay(world, rate=6 / 3600)
        await ended(control, within=3 * 3600)
    at = sorted(record.appended_at for record in world.log.records(TIER))
    assert [round(later - earlier) for earlier, later in pairwise(at)] == [600, 600, 600]


@virtual
async def test_without_a_rate_a_replay_never_fills_more_than_half_of_a_window() -> None:
    world = await a_world(a_route())
    await events_of(world, BACKLOG + 3000)
    async with owning(world) as control:
        await a_replay(world)
        await asyncio.sleep(60)
        assert len(world.log.records(TIER)) <= BACKLOG + CHECKPOINT_EVERY
        assert len(world.log.records(TIER)) >= BACKLOG
        async with running(world, world.worker(control)):
            # The events themselves are routed, too; what counts is that the replay goes on as its records end.
            assert (await ended(control)).count == BACKLOG + 3000
            await asyncio.sleep(30)
            assert await world.unfinished(TIER) == 0


@virtual
async def test_a_replay_delays_no_other_command() -> None:
    world = await a_world(a_route())
    await events_of(world, 1000)
    async with owning(world) as control:
        await a_replay(world, rate=10.0)
        await asyncio.sleep(2)
        await publish(world, ControlRecord(kind="kick", name="route/build", state="requested", at=now()))
        await publish(world, ControlRecord(kind="pause", name="destination/ci", state="resuming", at=now()))
        await asyncio.sleep(6.5)  # nobody tries what it brings on, for which it looks
        assert control.commands["kick/route/build"].state == "done"
        assert control.commands["pause/destination/ci"].state == "active"
        assert control.commands["replay/x"].state == "requested"


@virtual
async def test_replays_take_turns_in_the_order_in_which_they_were_asked_for() -> None:
    world = await a_world(a_route(), a_route("other", to=("audit",)))
    await events_of(world, 100)
    for name, route in (("b", "other"), ("a", "build")):
        await a_replay(world, name, route=route, rate=50.0)
    async with owning(world) as control:
        await ended(control, "a")
    at = {name: [r.at for r in world.stored(TIER) if r.delivery.destination == name] for name in ("audit", "ci")}
    assert max(at["audit"]) <= min(at["ci"])
    assert [command.count for command in control.commands.values()] == [100, 100]


# Ends


@virtual
async def test_a_replay_is_cancelled_and_the_next_one_begins() -> None:
    world = await a_world(a_route())
    await events_of(world, 500)
    async with owning(world) as control:
        command = await a_replay(world, rate=20.0)
        await a_replay(world, "next", ends=1)
        await asyncio.sleep(5)
        await publish(world, command.with_state("cancelled"))
        await ended(control, "next", within=5)
        await asyncio.sleep(10)
    assert control.commands["replay/x"].state == "cancelled"
    assert 80 <= control.injected("replay/x") <= 110
    of_both = Counter(stored.metadata.replay for stored in world.stored(TIER))
    assert of_both["x"] == control.injected("replay/x")


@virtual
async def test_a_replay_of_a_route_that_the_rules_lose_ends_and_says_so() -> None:
    world = await a_world(a_route())
    await events_of(world, 500)
    async with owning(world) as control:
        await a_replay(world, rate=50.0)
        await asyncio.sleep(2)
        world.rules = rules_of(a_route("other"))
        done = await ended(control, within=5)
    assert (done.state, done.detail) == ("cancelled", "expected a route of the rules, got build")
    assert 90 <= done.count <= 120
    assert len(world.log.records(TIER)) == done.count


@virtual
async def test_a_checkpoint_is_published_every_second() -> None:
    world = await a_world(a_route())
    await events_of(world, 300)
    async with owning(world) as control:
        command = await a_replay(world, rate=20.0)
        told: list[tuple[int, int]] = []
        await asyncio.sleep(0.5)
        while control.commands[command.key].state == "requested":
            await asyncio.sleep(1.1)
            told.append((sum(control.checkpoint(command.key).values()), control.injected(command.key)))
    assert told == sorted(told)
    assert len(set(told)) == len(told)
    assert told[-1] == (300, 300)
    assert len(told) <= 300 / 20 + 2


# Commands that have ended


@virtual
async def test_a_command_is_forgotten_when_nothing_is_left_that_it_could_be_about() -> None:
    world = await a_world(a_route())
    passed = 0.0
    world.log = MemoryLog(now=lambda: now() + passed)
    await world.log.create(TOPICS.specs([EVENTS]))
    await world.log.append(TOPICS.dead, key=b"ci", value=b"", headers=[])
    ends = {f"{TOPICS.dead}/{number}": end for number, (_, end) in (await world.log.bounds(TOPICS.dead)).items()}
    async with owning(world) as control:
        await publish(
            world, ControlRecord(kind="dead", name="d", state="requested", at=now(), action="drop", checkpoint=ends)
        )
        await a_replay(world)
        await asyncio.sleep(30)
        passed = KEEP_COMMANDS_FOR - 60
        await asyncio.sleep(20)
        assert {command.state for command in control.commands.values()} == {"done"}
        assert control.checkpoint("replay/x")
        await asyncio.sleep(120)
        assert list(control.commands) == ["dead/d"], "the dead letter is still there, and would be open again"
        assert not control.checkpoint("replay/x")
        for key, end in ends.items():
            topic, _, number = key.rpartition("/")
            world.log.delete_below(Partition(topic, int(number)), end)
        await asyncio.sleep(60)
        assert not control.commands
    assert {record.value for record in world.log.records(TOPICS.control)} == {b""}
    async with owning(world) as control:
        assert not control.commands


def test_the_first_command_covering_a_dead_letter_resolves_it() -> None:
    def an_end(name: str, at: float, end: int, which: DeadFilter, **fields: Any) -> ControlRecord:
        return ControlRecord(
            kind="dead", name=name, state="done", at=at, checkpoint={"d/0": end}, filter=which, latest=100.0, **fields
        )

    control = Control(
        [
            an_end("early", 1.0, 5, DeadFilter(route="a")),
            an_end("late", 2.0, 10, DeadFilter(route="a")),
            an_end("recent", 3.0, 20, DeadFilter(route="a", since=100.0)),
            an_end("ids", 4.0, 30, DeadFilter(ids=("one", "two"))),
            an_end("rest", 5.0, 40, DeadFilter(), action="drop"),
        ]
    )

    def settled(offset: int, **fields: Any) -> str | None:
        values: dict[str, Any] = {"id": "x", "route": "a", "destination": "b", "reason": "gone", "at": 50.0} | fields
        command = control.resolved_by(DeadLetterProperties(**values), Partition("d", 0), offset)
        return None if command is None else command.name

    assert [settled(offset) for offset in (4, 5, 10, 39, 40)] == ["early", "late", "rest", "rest", None]
    assert settled(10, at=100.0) == "recent"
    assert [settled(offset, id="two", route="c") for offset in (29, 30)] == ["ids", "rest"]
    assert settled(3, id="", route="", destination="", reason="undecodable") == "rest"
    control.apply(replace(control.commands["dead/early"], state="deleted"))
    control.apply(replace(control.commands["dead/ids"], state="deleted"))
    assert settled(4) == "late"
    assert settled(29, id="two", route="c") == "rest"
    control.apply(replace(control.commands["dead/rest"], filter=DeadFilter(route="z")))
    assert settled(39) is None
    assert settled(39, route="z") == "rest"


class RefusingLog(MemoryLog):
    """A connection that takes nothing with a certain key."""

    def __init__(self, log: MemoryLog, refuses: bytes | None) -> None:
        super().__init__()
        self.__dict__.update(log.__dict__)
        self.refuses = refuses

    @override
    async def append(
        self, topic: str, *, key: bytes, value: bytes, headers: RecordHeaders, partition: int | None = None
    ) -> Position:
        if key == self.refuses:
            raise LogUnavailableError("told to refuse")
        return await super().append(topic, key=key, value=value, headers=headers, partition=partition)


@virtual
async def test_a_replay_that_waits_for_an_append_ends_when_it_is_cancelled() -> None:
    """And tells how many deliveries it had injected: those of its last piece that were stored, too."""
    world = await a_world(a_route(to=("a", "b", "c", "d")))
    await events_of(world, 5)
    commands = ControlClient(world.log, TOPICS)
    log = RefusingLog(world.log, b"a")
    async with owning(world, log) as control:
        await a_replay(world, "x")
        await asyncio.sleep(30)
        stored = injected(world).total()
        assert 0 < stored < 20
        cancelled = await commands.cancel("x")
        assert cancelled is not None
        done = await commands.finished(cancelled, timeout=10)
        assert done is not None
        assert (done.state, done.count) == ("cancelled", stored)
        log.refuses = None
        await a_replay(world, "y")
        assert (await ended(control, "y")).count == 20


@virtual
async def test_a_replay_injects_elsewhere_where_a_partition_has_no_leader() -> None:
    world = await a_world(a_route(to=("a", "b", "c", "d")))
    await events_of(world, 5)
    tier = TOPICS.retry("5s")
    lost = Partition(tier, partition_of(b"a", len(await world.log.bounds(tier))))
    world.log.lose_leader(lost)
    async with owning(world) as control:
        await a_replay(world, "x")
        assert (await ended(control, "x", within=30)).count == 20
    assert injected(world).total() == 20
