"""Partitions that can't be read: they stop nothing else, and are reported."""

import asyncio
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import replace

import pytest
import structlog
from typing_extensions import override

from gateway.engine.control.records import ControlRecord
from gateway.engine.jobs.runner import KEEP_COMMANDS_FOR
from gateway.engine.memory_shares import COMMON_MEMORY
from gateway.engine.successor_writer import LONGEST_PAUSE_IF_TOO_LARGE
from gateway.log.base import ALL, Partition, Position, Record, RecordHeaders, TopicSpec, partition_of
from gateway.log.records import encode_event, event_key, order_key
from gateway.log.topics import ORDERED_PARTITIONS, TIERS
from gateway.model import EventId, LogUnavailableError, RecordTooLargeError
from tests.builders import a_policy, a_route, an_event
from tests.engine.test_jobs import FROM, KINDS, a_backlog, a_command, ended, injected, once
from tests.engine.test_ordered import an_ordered_route, keyed
from tests.engine.test_replay import owning
from tests.engine.test_worker import (
    EVENTS,
    TOPICS,
    ScriptedClient,
    World,
    a_world,
    events,
    publish,
    rules_of,
    running,
    virtual,
)
from tests.memory_log import MemoryLog
from tests.virtual_time import now, run


async def a_world_of_partitions(count: int = 3) -> World:
    world = await a_world(a_route(retry=a_policy(schedule=(20.0,))))
    world.log.delete(EVENTS)
    await world.log.create([TopicSpec(name=EVENTS, partitions=count, retention=7 * 86400.0)])
    return world


async def put(world: World, count: int = 30) -> dict[str, int]:
    """Append events; return which partition each is in, but for those of a partition that takes none."""
    places = {}
    for number in range(count):
        event = an_event(id=EventId(f"evt_{number}_{now():.0f}"), received_at=now())
        try:
            position = await world.log.append(
                EVENTS, key=event_key(event), value=event.body, headers=encode_event(event)
            )
        except LogUnavailableError:  # what isn't acknowledged isn't owed
            continue
        places[str(event.id)] = position.partition
    return places


def delivered(world: World) -> set[str]:
    return {event for _, event, _ in world.client.made}


def sample(world: World, partition: str, topic: str = EVENTS) -> float | None:
    series = world.metrics.partition_unread.get((topic, partition))
    return None if series is None else series.value


@virtual
async def test_a_partition_that_takes_no_appends_is_reported_as_one_that_cannot_be_read_where_it_is() -> None:
    world = await a_world_of_partitions()
    lost, refusing = Partition(EVENTS, 1), Partition(EVENTS, 2)
    refused = dict.fromkeys((lost, refusing), "takes no appends: too few replicas")
    async with running(world) as worker:
        worker._refusing = lambda: refused
        await asyncio.sleep(5)
        world.log.lose_leader(lost)
        await asyncio.sleep(5)
        assert {partition: unread.reason for partition, unread in worker.unread.items()} == {
            lost: "no leader",
            refusing: "takes no appends: too few replicas",
        }
        assert sample(world, "2") == pytest.approx(10, abs=2)
        world.log.find_leader(lost)
        refused.clear()
        await asyncio.sleep(3)
        assert worker.unread == {}


@virtual
async def test_a_leaderless_partition_stops_no_other_and_resumes_with_a_leader() -> None:
    world = await a_world_of_partitions()
    world.logger = structlog.get_logger()
    places = await put(world)
    lost = Partition(EVENTS, 1)
    world.log.lose_leader(lost)
    with structlog.testing.capture_logs() as lines:
        async with running(world) as worker:
            await asyncio.sleep(20)
            assert delivered(world) == {event for event, partition in places.items() if partition != 1}
            assert worker.unread.keys() == {lost}
            assert sample(world, "1") == pytest.approx(20, abs=2)
            assert math.isnan(world.metrics.log_lag.labels(EVENTS).value)
            assert world.metrics.oldest_pending.labels(EVENTS).value == pytest.approx(20, abs=2)
            assert world.metrics.log_lag.labels(TOPICS.retry("5s")).value == 0
            places |= await put(world)
            world.log.find_leader(lost)
            await asyncio.sleep(3)
            assert delivered(world) == places.keys()
            assert worker.unread == {}
            assert sample(world, "1") is None
            assert world.metrics.log_lag.labels(EVENTS).value == 0
    told = {line["event"]: line for line in lines if line["event"].startswith("partitions_")}
    assert told["partitions_unavailable"]["partitions"] == ["1"]
    assert told["partitions_unavailable"]["reason"] == "no leader"
    assert told["partitions_available"]["seconds"] == pytest.approx(20, abs=3)
    assert len(world.client.made) == len(places)


@virtual
async def test_a_partition_that_loses_its_leader_is_reported_and_read_again_where_it_was() -> None:
    world = await a_world_of_partitions()
    async with running(world) as worker:
        places = await put(world)
        await asyncio.sleep(3)
        assert delivered(world) == places.keys()
        world.log.lose_leader(Partition(EVENTS, 2))
        await world.log.rebalance(TOPICS.group("router"))
        places |= await put(world)
        await asyncio.sleep(10)
        assert delivered(world) == places.keys()
        assert worker.unread.keys() == {Partition(EVENTS, 2)}
        world.log.find_leader(Partition(EVENTS, 2))
        places |= await put(world)
        await asyncio.sleep(3)
    assert delivered(world) == places.keys()
    assert len(world.client.made) == len(places)


@virtual
async def test_nothing_is_repeated_that_was_under_way_when_a_rebalance_did_not_find_its_partition() -> None:
    """It is ours as before, only where it begins can't be found out yet; the others are found one after the other."""
    world = await a_world_of_partitions()
    world.client.scripts["ci"] = [4.0]
    lost, later = Partition(EVENTS, 1), Partition(EVENTS, 2)
    async with running(world):
        places = await put(world, 12)
        await asyncio.sleep(1)
        world.log.lose_leader(lost)
        world.log.lose_leader(later)
        await world.log.rebalance(TOPICS.group("router"))
        await asyncio.sleep(5)
        await world.log.recreate(TOPICS.retry("5s"))
        world.log.find_leader(later)
        await asyncio.sleep(5)
        world.log.find_leader(lost)
        await asyncio.sleep(10)
        assert await world.unfinished() == 0
    assert set(places.values()) == {0, 1, 2}
    assert delivered(world) == places.keys()
    assert len(world.client.made) == len(places)


@virtual
async def test_an_unlocated_partition_that_moves_is_read_anew_by_its_next_owner() -> None:
    world = await a_world_of_partitions()
    world.client.scripts["ci"] = [4.0]
    async with running(world) as worker:
        await put(world, 12)
        await asyncio.sleep(1)
        for number in range(3):
            world.log.lose_leader(Partition(EVENTS, number))
        await world.log.rebalance(TOPICS.group("router"))
        suspended = worker._router._suspended
        assert {partition for partition in suspended if partition.topic == EVENTS} == {
            Partition(EVENTS, number) for number in range(3)
        }
        async with running(world) as another:
            await asyncio.sleep(1)
            kept = {partition for partition in suspended if partition.topic == EVENTS}
            assert kept
            for number in range(3):
                world.log.find_leader(Partition(EVENTS, number))
            assert kept == {partition for partition in worker._router.trackers if partition.topic == EVENTS}
            assert not suspended
            assert another._router.trackers.keys() & {Partition(EVENTS, number) for number in range(3)}
            await asyncio.sleep(10)
            assert await world.unfinished() == 0
    assert len(delivered(world)) == 12


@virtual
async def test_a_partition_that_is_not_found_for_long_leaves_the_memory_to_the_others() -> None:
    """What it holds was under way: once that is most of what may be held, it is read again instead."""
    world = await a_world_of_partitions()
    world.client.scripts["ci"] = [9.0]
    lost = Partition(EVENTS, 1)
    async with running(world) as worker:
        places = await put(world, 12)
        await asyncio.sleep(1)
        world.log.lose_leader(lost)
        await world.log.rebalance(TOPICS.group("router"))
        await asyncio.sleep(15)
        assert lost in worker._router._suspended
        worker._router.set_memory_limit(int(worker._router._memory_bytes / COMMON_MEMORY))
        places |= await put(world, 12)
        await asyncio.sleep(15)
        assert {event for event, partition in places.items() if partition != 1} <= delivered(world)
        world.log.find_leader(lost)
        await asyncio.sleep(15)
        assert await world.unfinished() == 0
    assert delivered(world) == places.keys()


@virtual
async def test_a_blip_makes_no_line() -> None:
    world = await a_world_of_partitions()
    world.logger = structlog.get_logger()
    with structlog.testing.capture_logs() as lines:
        async with running(world):
            await asyncio.sleep(2)
            world.log.lose_leader(Partition(EVENTS, 0))
            await asyncio.sleep(3)
            world.log.find_leader(Partition(EVENTS, 0))
            await asyncio.sleep(10)
    assert not [line for line in lines if line["event"].startswith("partitions_")]


@virtual
async def test_a_missing_tier_is_reported_as_missing_not_as_empty() -> None:
    world = await a_world_of_partitions()
    tier = TOPICS.retry("20h")
    async with running(world) as worker:
        await asyncio.sleep(2)
        assert world.metrics.retry_backlog.labels("20h").value == 0
        world.log.delete(tier)
        await world.log.rebalance(TOPICS.group("router"))
        await put(world)
        await asyncio.sleep(10)
        assert len(world.client.made) == 30
        assert worker.unread.keys() == {Partition(tier, ALL)}
        assert sample(world, "all", tier) == pytest.approx(10, abs=2)
        assert math.isnan(world.metrics.retry_backlog.labels("20h").value)
        await world.log.create(TOPICS.specs([EVENTS]))
        await world.log.rebalance(TOPICS.group("router"))
        await asyncio.sleep(3)
        assert worker.unread == {}
        assert world.metrics.retry_backlog.labels("20h").value == 0


@virtual
async def test_a_share_of_a_rate_is_that_of_the_partitions_that_there_are_now() -> None:
    world = await a_world_of_partitions(6)
    first, second = world.worker(), world.worker()
    async with running(world, first), running(world, second):
        await asyncio.sleep(3)
        spec = world.log._state.specs[EVENTS]
        world.log.grow(replace(spec, partitions=30))
        await world.log.rebalance(TOPICS.group("router"))
        await asyncio.sleep(3)
        shares = [worker._router.share for worker in (first, second)]
    assert sum(shares) == pytest.approx(1)


# Jobs: a partition of their topic that can't be read is left out, or follows; the others are served.


async def held_by(world: World, partition: Partition) -> int:
    """Return how many records a partition has."""
    start, end = (await world.log.bounds(partition.topic))[partition.number]
    return end - start


async def a_job_beside_a_lost_partition(
    kind: str, *, takes: float = 30.0
) -> tuple[World, ControlRecord, int, Partition]:
    """Carry a command out while a partition of its topic has no leader; return how many wait elsewhere, too."""
    world = await a_world(a_route())
    await a_backlog(world, kind, 40)
    lost = Partition(FROM[kind], 1)
    elsewhere = 40 - await held_by(world, lost)
    assert 0 < elsewhere < 40
    command = await a_command(world, kind)
    world.log.lose_leader(lost)
    async with owning(world) as control:
        done = await ended(control, command, within=takes)
    return world, done, elsewhere, lost


@virtual
async def test_a_kick_takes_the_readable_partitions_and_names_the_others() -> None:
    await _goes_without("kick")


@virtual
async def test_a_dead_letter_replay_takes_readable_partitions_and_names_the_others() -> None:
    await _goes_without("dead")


async def _goes_without(kind: str) -> None:
    world, done, elsewhere, lost = await a_job_beside_a_lost_partition(kind)
    assert (done.count, done.unread) == (elsewhere, 1)
    assert len(injected(world)) == elsewhere
    world.log.find_leader(lost)
    async with owning(world) as control:
        await asyncio.sleep(20)
        assert len(injected(world)) == elsewhere
        command = await a_command(world, kind, "y")
        await asyncio.sleep(1)
        again = await ended(control, command)
    assert again.unread == 0
    assert injected(world) == once(40), "the command is given again, and repeats nothing"


@virtual
async def test_a_resume_releases_readable_partitions_and_later_the_rest() -> None:
    for is_moved in (False, True):
        world = await a_world(a_route())
        await publish(world, ControlRecord(kind="pause", name="destination/ci", state="paused", at=now()))
        async with owning(world):
            await a_backlog(world, "resume", 40)
            await asyncio.sleep(12)
            lost = Partition(TOPICS.parked, 1)
            elsewhere = 40 - await held_by(world, lost)
            world.log.lose_leader(lost)
        async with owning(world) as control:
            await asyncio.sleep(12)
            assert math.isnan(world.metrics.parked_backlog.value), "nothing is known of the partition"
            command = await a_command(world, "resume")
            await asyncio.sleep(1)
            done = await ended(control, command, within=30)
            assert (done.count, done.unread) == (elsewhere, 1)
            await asyncio.sleep(20)
            assert len(injected(world)) == elsewhere
            if not is_moved:
                world.log.find_leader(lost)
                await asyncio.sleep(12)
        world.log.find_leader(lost)
        async with owning(world):
            await asyncio.sleep(12)
            assert world.metrics.parked_backlog.value == 0
        assert injected(world) == once(40)


@virtual
async def test_a_resumes_unread_partition_follows_though_rescanned_during_the_pause() -> None:
    """What is rescanned regularly had nothing to resume then, and came to the end of the partition."""
    world = await a_world(a_route())
    await publish(world, ControlRecord(kind="pause", name="destination/ci", state="paused", at=now()))
    lost = Partition(TOPICS.parked, 1)
    async with owning(world) as control:
        await a_backlog(world, "resume", 40)
        elsewhere = 40 - await held_by(world, lost)
        await asyncio.sleep(12)
        world.log.lose_leader(lost)
        command = await a_command(world, "resume")
        await asyncio.sleep(1)
        done = await ended(control, command, within=30)
        assert (done.count, done.unread) == (elsewhere, 1)
        await asyncio.sleep(12)
        assert len(injected(world)) == elsewhere
        world.log.find_leader(lost)
        await asyncio.sleep(12)
    assert injected(world) == once(40)


class FlappingLog(MemoryLog):
    """A partition loses its leader for a moment once it, or its topic, has been looked at so many times."""

    def __init__(self, log: MemoryLog, partition: Partition) -> None:
        super().__init__()
        self.__dict__.update(log.__dict__)
        self._partition = partition
        self.left = 0

    @override
    async def readable(self, topic: str) -> tuple[Mapping[int, tuple[int, int]], Mapping[int, str]]:
        found = await super().readable(topic)
        self._look(topic)
        return found

    @override
    async def scan(self, partition: Partition, start: int, end: int) -> AsyncIterator[Sequence[Record]]:
        try:
            async for records in super().scan(partition, start, end):
                yield records
        finally:
            if partition == self._partition:
                self._look(partition.topic)

    def _look(self, topic: str) -> None:
        self.left -= topic == self._partition.topic
        if self.left == 0 and topic == self._partition.topic:
            self.lose_leader(self._partition)
            asyncio.get_running_loop().call_later(3, self.find_leader, self._partition)


@pytest.mark.parametrize("looks", [1, 2, 3, 4, 5, 6])
def test_a_resumes_unread_partition_follows_though_leaderless_during_the_rescan(looks: int) -> None:
    async def scenario() -> None:
        world = await a_world(a_route())
        await publish(world, ControlRecord(kind="pause", name="destination/ci", state="paused", at=now()))
        lost = Partition(TOPICS.parked, 1)
        log = FlappingLog(world.log, lost)
        async with owning(world, log) as control:
            await a_backlog(world, "resume", 40)
            await asyncio.sleep(12)
            log.lose_leader(lost)
            command = await a_command(world, "resume")
            await asyncio.sleep(1)
            assert (await ended(control, command, within=30)).unread == 1
            await asyncio.sleep(12)
            log.find_leader(lost)
            log.left = looks
            await asyncio.sleep(30)
        assert injected(world) == once(40)

    run(scenario())


@virtual
async def test_a_job_waits_for_the_election_of_a_leader() -> None:
    for kind in KINDS:
        await _waits_for_an_election(kind)


async def _waits_for_an_election(kind: str) -> None:
    world = await a_world(a_route())
    await a_backlog(world, kind, 40)
    command = await a_command(world, kind)
    world.log.lose_leader(Partition(FROM[kind], 1))
    async with owning(world) as control:
        await asyncio.sleep(3)
        world.log.find_leader(Partition(FROM[kind], 1))
        done = await ended(control, command, within=30)
    assert (done.count, done.unread) == (40, 0)
    assert injected(world) == once(40)


@virtual
async def test_a_kick_waits_for_an_election_whatever_one_before_has_met() -> None:
    """That one went on without the partition, which nobody has looked at since."""
    world = await a_world(a_route())
    lost = Partition(FROM["kick"], 1)
    async with owning(world) as control:
        for seconds, unread in ((30.0, 1), (3.0, 0)):
            world.log.lose_leader(lost)
            command = await a_command(world, "kick")
            await asyncio.sleep(seconds)
            world.log.find_leader(lost)
            await ended(control, command, within=30)
            answer = control.last_checkpoint(command.key)
            assert answer is not None
            assert answer.unread == unread
            await asyncio.sleep(3600)


@virtual
async def test_a_command_is_not_forgotten_while_its_dead_letters_cannot_be_read() -> None:
    """They would be open again once they can."""
    world = await a_world(a_route())
    passed = 0.0
    world.log = MemoryLog(now=lambda: now() + passed)
    await world.log.create(TOPICS.specs([EVENTS]))
    await a_backlog(world, "dead", 40)
    async with owning(world) as control:
        await ended(control, await a_command(world, "dead", action="drop"))
        for number, (_, end) in (await world.log.bounds(TOPICS.dead)).items():
            if number != 1:
                world.log.delete_below(Partition(TOPICS.dead, number), end)
        world.log.lose_leader(Partition(TOPICS.dead, 1))
        passed = KEEP_COMMANDS_FOR + 60
        await asyncio.sleep(30)
        assert list(control.commands) == ["dead/x"]
        world.log.find_leader(Partition(TOPICS.dead, 1))
        await asyncio.sleep(12)
        assert world.metrics.dead_letter_backlog.value == 0


@virtual
async def test_dead_letters_are_counted_where_they_can_be_read() -> None:
    world = await a_world(a_route())
    await a_backlog(world, "dead", 40)
    lost = Partition(TOPICS.dead, 1)
    async with owning(world):
        await asyncio.sleep(12)
        assert world.metrics.dead_letter_backlog.value == 40
        world.log.lose_leader(lost)
        await asyncio.sleep(12)
        assert world.metrics.dead_letter_backlog.value == 40, "as it was known last"
    async with owning(world):
        await asyncio.sleep(12)
        assert math.isnan(world.metrics.dead_letter_backlog.value)
        world.log.find_leader(lost)
        await asyncio.sleep(12)
        assert world.metrics.dead_letter_backlog.value == 40


@virtual
async def test_a_retry_for_a_leaderless_tier_is_stored_once_it_has_a_leader() -> None:
    route = a_route(to=("ci", "chat"), retry=a_policy(schedule=(20.0,)))
    world = await a_world(route, ci=[503, 200])
    world.logger = structlog.get_logger()
    counts = await world.log.partitions([TOPICS.retry(tier) for tier in TIERS])
    lost = [Partition(topic, partition_of(b"ci", count)) for topic, count in counts.items()]
    for partition in lost:
        world.log.lose_leader(partition)
    with structlog.testing.capture_logs() as lines:
        async with running(world):
            await world.put(an_event(received_at=now()))
            await asyncio.sleep(30)
            assert sorted(destination for destination, _, _ in world.client.made) == ["chat", "ci"]
            assert await world.unfinished() == 1
            for partition in lost:
                world.log.find_leader(partition)
            await asyncio.sleep(30)
            assert [destination for destination, _, _ in world.client.made].count("ci") == 2
            assert await world.unfinished() == 0
    assert {line["topic"] for line in lines if line["event"] == "append_retried"} <= counts.keys()
    assert [line for line in lines if line["event"] == "append_retried"]


class SmallTiers(MemoryLog):
    """Its tiers have a lower limit than its other topics."""

    @override
    async def append(
        self, topic: str, *, key: bytes, value: bytes, headers: RecordHeaders, partition: int | None = None
    ) -> Position:
        if len(value) > 5000 and topic in map(TOPICS.retry, TIERS):
            raise RecordTooLargeError(f"{topic}: expected at most 5000 bytes")
        return await super().append(topic, key=key, value=value, headers=headers, partition=partition)


@virtual
async def test_a_retry_that_is_too_large_for_its_tier_stops_no_other_while_its_dead_letter_cannot_be_stored() -> None:
    log = SmallTiers(now=now)
    await log.create(TOPICS.specs([EVENTS]))
    route = a_route(retry=a_policy(schedule=(20.0,)))
    world = World(log=log, rules=rules_of(route), client=ScriptedClient({"ci": [503, 503, 200]}))
    letters = Partition(TOPICS.dead, partition_of(b"ci", len(await log.bounds(TOPICS.dead))))
    log.lose_leader(letters)
    async with running(world):
        await world.put(an_event(id="evt_large", received_at=now(), body=bytes(6000)))
        await asyncio.sleep(3)
        await world.put(an_event(id="evt_small", received_at=now()))
        await asyncio.sleep(30)
        assert [event for _, event, _ in world.client.made].count("evt_small") == 2
        assert await world.unfinished() == 1
        log.find_leader(letters)
        await asyncio.sleep(30)
        assert await world.unfinished() == 0
    (dead,) = world.dead()
    assert (dead.metadata.dead_reason, dead.delivery.successor) == ("too_large", 1)


class SmallLetters(MemoryLog):
    """Its topic of dead letters has a lower limit than its other topics, until that is raised."""

    def __init__(self) -> None:
        super().__init__(now=now)
        self.limits = {TOPICS.dead: 5000}

    @override
    async def append(
        self, topic: str, *, key: bytes, value: bytes, headers: RecordHeaders, partition: int | None = None
    ) -> Position:
        if len(value) > (limit := self.limits.get(topic, self.max_record_bytes)):
            raise RecordTooLargeError(f"{topic}: expected at most {limit} bytes")
        return await super().append(topic, key=key, value=value, headers=headers, partition=partition)


@virtual
async def test_a_dead_letter_that_is_too_large_for_its_topic_keeps_no_other_of_its_destination_from_it() -> None:
    log = SmallLetters()
    await log.create(TOPICS.specs([EVENTS]))
    world = World(log=log, rules=rules_of(a_route()), client=ScriptedClient({"ci": [410]}))
    world.logger = structlog.get_logger()
    with structlog.testing.capture_logs() as lines:
        async with running(world):
            await world.put(an_event(id="evt_large", received_at=now(), body=bytes(6000)))
            await asyncio.sleep(3)
            await world.put(*events(50))
            await asyncio.sleep(60)
            assert len(world.dead()) == 50
            assert await world.unfinished() == 1
            log.limits[TOPICS.dead] = 7000
            await asyncio.sleep(LONGEST_PAUSE_IF_TOO_LARGE)
            assert await world.unfinished() == 0
    assert str(world.dead()[-1].delivery.event.id) == "evt_large"
    told = next(line for line in lines if line["event"] == "dead_letter_too_large")
    assert (told["topic"], told["error"]) == (TOPICS.dead, f"{TOPICS.dead}: expected at most 5000 bytes")
    assert 6000 < told["bytes"] < 7000
    assert not [line for line in lines if line["event"] == "append_retried"]


@virtual
async def test_a_truncated_dead_letter_that_is_too_large_as_well_waits_for_a_higher_limit() -> None:
    log = SmallLetters()
    await log.create(TOPICS.specs([EVENTS]))
    world = World(log=log, rules=rules_of(a_route()), client=ScriptedClient({}))
    async with running(world):
        await log.append(EVENTS, key=b"k", value=bytes(6000), headers=[])
        await world.put(*events(5))
        await asyncio.sleep(10)
        assert (len(world.client.made), await world.unfinished()) == (5, 1)
        log.limits[TOPICS.dead] = 7000
        await asyncio.sleep(LONGEST_PAUSE_IF_TOO_LARGE)
        assert (len(log.records(TOPICS.dead)), await world.unfinished()) == (1, 0)


@virtual
async def test_a_partition_of_an_ordered_route_that_cannot_be_written_stops_no_key_of_another() -> None:
    """From the first event on: over how many partitions keys are spread is known without a leader of each."""
    world = await a_world(an_ordered_route())
    topic = TOPICS.ordered("build", "ci")
    count = len(await world.log.bounds(topic))
    world.log.lose_leader(Partition(topic, 1))
    made = keyed(keys=12, each=2)
    await world.put(*made)
    async with running(world):
        await asyncio.sleep(10)
        others = {str(event.id) for event in made if partition_of(order_key(event).encode(), count) != 1}
        assert 0 < len(others) < len(made)
        assert delivered(world) == others
        world.log.find_leader(Partition(topic, 1))
        await asyncio.sleep(10)
        assert delivered(world) == {event.id for event in made}
    assert len(world.client.made) == len(made)


@virtual
async def test_a_key_stays_halted_though_a_rebalance_did_not_find_its_partition() -> None:
    """What was tried before is known for as long as the partition is ours."""
    world = await a_world(an_ordered_route(halts=True, retry=a_policy(max_attempts=1)), ci=[503])
    topic = TOPICS.ordered("build", "ci")
    async with running(world):
        await world.put(*keyed(1, 1))
        await asyncio.sleep(3)
        (lost,) = [Partition(topic, number) for number, (start, end) in (await world.log.bounds(topic)).items() if end]
        world.log.lose_leader(lost)
        await world.log.rebalance(TOPICS.ordered_group("build", "ci"))
        await asyncio.sleep(5)
        world.log.find_leader(lost)
        await asyncio.sleep(5)
    assert len(world.client.made) == 1


@virtual
async def test_one_removed_routes_backlog_continues_though_anothers_is_unreadable() -> None:
    first, second = an_ordered_route("first"), an_ordered_route("second")
    other = a_route("other", match={"type": "never"})
    world = await a_world(other, first, second, ci=[503])
    await world.put(*keyed(keys=6, each=1))
    async with running(world):
        await asyncio.sleep(2)
    topic = TOPICS.ordered("first", "ci")
    for number in await world.log.bounds(topic):
        world.log.lose_leader(Partition(topic, number))
    world.rules = rules_of(other)
    async with running(world) as worker:
        await world.doze(4000)
        assert {each.delivery.route for each in world.dead()} == {"second"}
        assert len(world.dead()) == 6
        assert worker.unread.keys() == {Partition(topic, number) for number in range(ORDERED_PARTITIONS)}
