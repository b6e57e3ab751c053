"""Behaviours that mutants showed to be held by no other test."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry
from typing_extensions import override

from gateway.engine.control.follower import Follower
from gateway.engine.control.records import ControlRecord
from gateway.engine.jobs.runner import Jobs
from gateway.engine.ordered.route import OWNERSHIP_CHECK_AGE
from gateway.log.base import Commit, Listener, Partition, Position, RecordHeaders, TopicSpec
from gateway.log.records import encode_delivery
from gateway.model import (
    LogUnavailableError,
    RecordMetadata,
    Result,
    SpillReason,
    event_id,
)
from gateway.reload import Reloader
from gateway.rules.load import load_rules
from gateway.rules.rules import Rules
from gateway.settings import EmbeddedTarget, Settings
from gateway.telemetry.metrics import Metrics
from tests.builders import NOW, a_delivery, a_destination, a_policy, a_route, an_attempt, an_event
from tests.engine.test_destination_lanes import a_lane, a_pending_delivery, start
from tests.engine.test_worker import (
    QUIET,
    TOPICS,
    World,
    a_world,
    events,
    operated,
    publish,
    running,
    virtual,
)
from tests.memory_log import MemoryConsumer, MemoryLog
from tests.virtual_time import now


class ClosedTopics(MemoryLog):
    """A connection to a log that takes nothing for some topics."""

    def __init__(self, log: MemoryLog, *closed: str) -> None:
        super().__init__(now=now)
        self._state = log._state
        self.closed = closed

    @override
    async def append(
        self, topic: str, *, key: bytes, value: bytes, headers: RecordHeaders, partition: int | None = None
    ) -> Position:
        if topic in self.closed:
            raise LogUnavailableError(f"{topic}: closed")
        return await super().append(topic, key=key, value=value, headers=headers, partition=partition)


class SlowCommits(MemoryLog):
    """A connection to a log whose commits are accepted in the end."""

    def __init__(self, log: MemoryLog, seconds: float) -> None:
        super().__init__(now=now)
        self._state = log._state
        self.seconds = seconds

    @override
    async def consume(
        self, *, group: str | None, topics: Sequence[str], listener: Listener, since: float | None = None
    ) -> MemoryConsumer:
        consumer = await super().consume(group=group, topics=topics, listener=listener, since=since)
        commit = consumer.commit

        async def slowly(commits: Mapping[Partition, Commit]) -> None:
            await asyncio.sleep(self.seconds)
            await commit(commits)

        consumer.commit = slowly  # type: ignore[method-assign] # of this consumer alone
        return consumer


@virtual
async def test_a_late_end_does_not_end_the_next_owners_delivery() -> None:
    """The partitions go to another worker and come back while attempts hang: those are nobody's any more."""
    slow = a_destination("slow", url="http://127.0.0.1:1/slow", timeout=40.0)
    world = await a_world(a_route(to=("slow",)), destinations=[slow], slow=[1e9])
    await world.put(*events(4))  # too few to open its breaker
    async with running(world):
        await asyncio.sleep(1)
        other = world.worker()
        visit = asyncio.create_task(other.run())
        await asyncio.sleep(5)
        other.stop(0.1)
        await visit
        await asyncio.sleep(37)
        assert len(world.client.made) > 4, "something had moved, and came back"
        assert await world.unfinished() == 4


def test_a_lane_has_its_place_again_after_a_cancellation() -> None:
    lane = a_lane(concurrency=1)
    (pending,) = start(lane, 1)
    lane.cancelled(pending, NOW)
    assert lane.in_flight == 0
    assert len(start(lane, 1)) == 1


@pytest.mark.parametrize(("status", "result"), [(429, Result.THROTTLED), (503, Result.SERVER_ERROR)])
def test_a_destination_that_asks_for_silence_gets_it_from_every_delivery(status: int, result: Result) -> None:
    lane = a_lane()
    (pending,) = start(lane, 1)
    waiting = a_pending_delivery()
    lane.offer(waiting, NOW)
    lane.finished(pending, an_attempt(result=result, status=status, retry_after=30.0), NOW)
    assert lane.take(NOW, NOW) is None
    (spill,) = lane.pop_overdue(NOW)
    later = lane.offer(a_pending_delivery(), NOW + 29)
    assert later is not None
    assert spill.pending is waiting
    for each in (spill, later):
        assert each.reason is SpillReason.THROTTLED
        assert each.due >= NOW + 30
    assert len(start(lane, 1, NOW + 30)) == 1


@virtual
async def test_a_pause_holds_waiting_retries_too() -> None:
    world = await a_world(a_route(retry=a_policy(schedule=(10.0,))), ci=[503, 200])
    async with operated(world) as control, running(world, world.worker(control)):
        await world.put(*events(1))
        await asyncio.sleep(2)
        await publish(world, ControlRecord(kind="pause", name="destination/ci", state="paused", at=now()))
        await asyncio.sleep(30)
        assert len(world.client.made) == 1
        assert len(world.stored(TOPICS.parked)) == 1


@virtual
async def test_a_resume_killed_before_its_injection_is_done_by_the_next_owner() -> None:
    world = await a_world(a_route())
    parked = a_delivery(event=an_event(received_at=now()), successor=1)
    headers = encode_delivery(parked, RecordMetadata(paused_name="destination/ci"), at=now())
    await world.log.append(TOPICS.parked, key=b"ci", value=parked.event.body, headers=headers)
    await publish(world, ControlRecord(kind="pause", name="destination/ci", state="resuming", at=now()))
    async with jobs_on(world, ClosedTopics(world.log, TOPICS.retry("5s"))):
        await asyncio.sleep(10)
    async with operated(world) as control, running(world, world.worker(control)):
        await asyncio.sleep(20)
        assert len(world.client.made) == 1
        assert control.commands["pause/destination/ci"].state == "active"


@asynccontextmanager
async def jobs_on(world: World, log: MemoryLog) -> AsyncIterator[None]:
    """Carry commands out on a log, and be killed."""
    follower = Follower(log, TOPICS, world.metrics, QUIET)
    jobs = Jobs(
        log=log, topics=TOPICS, rules=lambda: world.rules, follower=follower, metrics=world.metrics, logger=QUIET
    )
    tasks = [asyncio.create_task(follower.follow(asyncio.Event())), asyncio.create_task(jobs.run())]
    yield
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@virtual
async def test_nothing_is_committed_before_its_dedupe_entries() -> None:
    world = await a_world(a_route())
    github = replace(world.rules.sources["github"], dedupe=60.0)
    world.rules = replace(world.rules, sources={"github": github})
    log = world.log
    world.log = ClosedTopics(log, TOPICS.dedupe)
    async with running(world):
        await world.put(*[an_event(id=event_id("github", str(n)), received_at=now()) for n in range(10)])
        await asyncio.sleep(10)
        assert len(world.client.made) == 10
        assert await world.unfinished() == 10
    world.log = log


@virtual
async def test_an_event_with_two_deliveries_is_drained_whole() -> None:
    """What waits of an event of which something was delivered is carried on, or a restart would deliver that again."""
    narrow = a_destination("slow", url="http://127.0.0.1:1/slow", concurrency=1)
    world = await a_world(a_route(to=("ci", "slow")), destinations=[narrow], slow=[0.9])
    await world.put(*events(4))
    async with running(world):
        await asyncio.sleep(0.2)
    async with running(world):
        await asyncio.sleep(60)
    assert len(world.client.made) == 8


@virtual
async def test_nothing_of_an_ordered_route_begins_on_an_ownership_check_that_has_grown_old() -> None:
    """An accepted commit proves who owned the partition when it was sent: longer ago than `OWNERSHIP_CHECK_AGE`."""
    world = await a_world(a_route(is_ordered=True))
    world.log = SlowCommits(world.log, OWNERSHIP_CHECK_AGE + 1)
    await world.put(*events(3))
    async with running(world):
        await asyncio.sleep(60)
        assert world.client.made == []


def test_the_topic_of_a_new_ordered_route_is_there_before_its_rules_are_in_force(tmp_path: Path) -> None:
    """From then on the router appends to it."""
    file = tmp_path / "routes.yaml"
    source = "version: 1\nsources:\n  crm: {verify: {scheme: none}, key: body.id}\n"
    file.write_text(source)
    settings = Settings(rules=file, log=EmbeddedTarget(tmp_path / "log.db"))
    reloader = Reloader(settings, Metrics(CollectorRegistry()), QUIET, on_activated=lambda _: None)
    reloader.activate(load_rules(file), {})
    log = Telling(lambda: reloader.rules)
    route = "routes:\n  - {name: new, from: crm, to: [ci], order: key}\n"
    file.write_text(f"{source}destinations:\n  ci: {{url: 'http://127.0.0.1:1/'}}\n{route}")
    asyncio.run(reloader.read(log))
    assert list(reloader.rules.routes) == ["new"]
    assert log.in_force == []
    assert TOPICS.ordered("new", "ci") in log._state.specs


class Telling(MemoryLog):
    """Notes which routes are in force when topics are first made."""

    def __init__(self, rules: Callable[[], Rules]) -> None:
        super().__init__()
        self._rules = rules
        self.in_force: list[str] | None = None

    @override
    async def create(self, specs: Sequence[TopicSpec]) -> Sequence[str]:
        if self.in_force is None:
            self.in_force = list(self._rules().routes)
        return await super().create(specs)
