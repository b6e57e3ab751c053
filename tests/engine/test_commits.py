"""When completed records are committed: within a second, and under load within moments; in virtual time."""

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, cast

import pytest
from typing_extensions import override

from gateway.engine.commit_progress import CommitProgress
from gateway.engine.committer import COMMIT_AFTER, COMMIT_EVERY, COMMIT_GAP, Committer
from gateway.engine.partition_tracker import Tracker
from gateway.log.base import Assignment, Commit, Listener, Partition
from gateway.log.topics import ROUTER_GROUP
from gateway.model import event_id
from tests.builders import a_route, an_event
from tests.engine.test_worker import (
    EVENTS,
    TOPICS,
    ScriptedClient,
    World,
    a_world,
    events,
    reload,
    rules_of,
    running,
    virtual,
)
from tests.memory_log import MemoryConsumer, MemoryLog
from tests.virtual_time import now

if TYPE_CHECKING:
    from gateway.engine.dedupe.filter import PartitionDedupe
    from gateway.engine.partition_tracker import MemberCallbacks
    from gateway.log.base import Consumer


class WatchedLog(MemoryLog):
    """Notes when its members commit, and how many commits were under way at once."""

    def __init__(self) -> None:
        super().__init__(now=now)
        self.committed_at: list[float] = []
        self.most: list[int] = [0]
        self.under_way: list[int] = [0]

    @override
    async def consume(
        self, *, group: str | None, topics: Sequence[str], listener: Listener, since: float | None = None
    ) -> MemoryConsumer:
        consumer = await super().consume(group=group, topics=topics, listener=listener, since=since)
        commit = consumer.commit

        async def watched(commits: Mapping[Partition, Commit]) -> None:
            self.committed_at.append(now())
            self.under_way[0] += 1
            self.most[0] = max(self.most[0], self.under_way[0])
            try:
                await commit(commits)
            finally:
                self.under_way[0] -= 1

        consumer.commit = watched  # type: ignore[method-assign] # of this one instance
        return consumer


async def a_watched_world() -> tuple[World, WatchedLog]:
    log = WatchedLog()
    await log.create(TOPICS.specs([EVENTS]))
    return World(log=log, rules=rules_of(a_route()), client=ScriptedClient({})), log


async def load(world: World, rate: float, seconds: float) -> None:
    """Put in events at a steady rate."""
    for number in range(round(rate * seconds)):
        await world.put(an_event(id=f"evt_{number}", received_at=now()))
        await asyncio.sleep(1 / rate)


@virtual
async def test_under_load_done_records_are_committed_soon() -> None:
    world, _ = await a_watched_world()
    rate, most = 2000.0, 0
    async with running(world):
        await world.put(*events(1))
        await asyncio.sleep(2)
        loading = asyncio.create_task(load(world, rate, 1.0))
        while not loading.done():
            await asyncio.sleep(0.01)
            most = max(most, await world.unfinished())
    assert most <= COMMIT_AFTER + rate * COMMIT_GAP + 10


@virtual
async def test_a_commit_of_nothing_delays_none() -> None:
    """Rules with a new order ask for a commit, though there may be nothing to commit."""
    world, _ = await a_watched_world()
    rate, most = 2000.0, 0
    async with running(world) as worker:
        await world.put(*events(1))
        await asyncio.sleep(1.95)
        assert await world.unfinished() == 0
        elsewhere = a_route("build", is_ordered=True, match={"type": "elsewhere"})
        await reload(world, worker, rules_of(a_route(), elsewhere))
        loading = asyncio.create_task(load(world, rate, 0.8))
        while not loading.done():
            await asyncio.sleep(0.01)
            most = max(most, await world.unfinished())
    assert most <= COMMIT_AFTER + rate * COMMIT_GAP + 10


@virtual
async def test_commits_that_wait_for_dedupe_entries_repeat_each_second() -> None:
    """What is done isn't committed before its entries are stored, and each attempt to store them costs something."""
    world, log = await a_watched_world()
    world.rules = replace(
        world.rules, sources={name: replace(each, dedupe=3600.0) for name, each in world.rules.sources.items()}
    )
    async with running(world) as worker:
        await asyncio.sleep(0.5)
        entries = [Partition(TOPICS.dedupe, number) for number in await log.bounds(TOPICS.dedupe)]
        asked: list[float] = []
        covered = worker._router._committer._covered

        async def watched(wanted: Mapping[Tracker, Commit]) -> dict[Tracker, Commit]:
            asked.append(now())
            return await covered(wanted)

        worker._router._committer._covered = watched  # type: ignore[method-assign] # of this one instance
        for partition in entries:
            log.lose_leader(partition)
        for number in range(4000):
            await world.put(an_event(id=event_id("github", str(number)), received_at=now()))
            await asyncio.sleep(0.001)
        assert len(asked) <= 12
        for partition in entries:
            log.find_leader(partition)
        await asyncio.sleep(3)
        assert await world.unfinished() == 0


@virtual
async def test_little_that_is_done_is_committed_once_a_second() -> None:
    world, log = await a_watched_world()
    async with running(world):
        await asyncio.sleep(2)
        await load(world, 10.0, 3.0)
        await asyncio.sleep(COMMIT_EVERY + 0.1)
        assert await world.unfinished() == 0
        assert len(log.committed_at) <= 5


@virtual
async def test_one_commit_of_a_group_is_under_way_and_the_next_waits_a_moment() -> None:
    world, log = await a_watched_world()
    log.delay_commits(0.3)
    async with running(world):
        await load(world, 2000.0, 2.0)
        assert log.most == [1]
        assert min(after - before for before, after in pairwise(log.committed_at)) > 0.299
        log.delay_commits(0.0)
        log.committed_at.clear()
        await asyncio.sleep(0.5)
        await load(world, 2000.0, 1.0)
        assert len(log.committed_at) <= 1.6 / COMMIT_GAP
    assert len(world.client.made) == 6000


@virtual
async def test_commits_that_are_not_accepted_are_repeated_each_second() -> None:
    world, log = await a_watched_world()
    log.fail_commits()
    async with running(world):
        await load(world, 1000.0, 5.0)
        assert len(log.committed_at) <= 12
        log.fail_commits(0)
        await asyncio.sleep(COMMIT_EVERY + 0.1)
        assert await world.unfinished() == 0


@virtual
async def test_a_revocation_waits_for_no_commit_that_hangs() -> None:
    world, _ = await a_watched_world()
    async with running(world):
        await world.put(*events(1))
        await asyncio.sleep(2)
        world.log.delay_commits(5.0)
        loading = asyncio.create_task(load(world, 200.0, 4.0))
        await asyncio.sleep(3.5)  # one is in flight, and another waits for it
        began = now()
        await world.log.rebalance(TOPICS.group(ROUTER_GROUP))
        assert now() - began < 1.0
        world.log.delay_commits(0.0)
        await loading
        await asyncio.sleep(2)
    assert await world.unfinished() == 0
    assert len(world.client.made) == 801


@virtual
async def test_no_commit_goes_before_the_last_ones_of_a_revocation_which_would_undo_it() -> None:
    world, here = await a_world(a_route()), Partition(EVENTS, 0)
    tracker = Tracker(Assignment(here, Commit(0), 0), cast("MemberCallbacks", None))
    tracker.progress.received(0)
    tracker.progress.received(1)
    sent: list[Commit] = []
    is_stored = asyncio.Event()

    class SlowReader:
        """Its dedupe entries take a while to be stored."""

        is_flushed = False

        async def flush(self) -> None:
            await is_stored.wait()

    class Sink:
        async def commit(self, commits: Mapping[Partition, Commit]) -> None:
            sent.extend(commits.values())

    committer = Committer(
        world.worker()._services,
        "group",
        trackers={},
        leaving=[tracker],
        dedupe_handles={tracker: cast("PartitionDedupe", SlowReader())},
        consumer=lambda: cast("Consumer", Sink()),
        metadata=lambda _tracker, _commit: b"",
    )
    tracker.progress.mark_done(0)
    last = asyncio.create_task(committer.last_commits([tracker]))
    await asyncio.sleep(0.1)
    tracker.progress.mark_done(1)
    another = asyncio.create_task(committer.commit())
    await asyncio.sleep(0.1)
    is_stored.set()
    assert await last == {tracker: Commit(1)}
    assert await another is None
    assert not sent


@pytest.mark.parametrize("idle", [1, 1000])
def test_a_commit_computes_nothing_of_partitions_in_which_nothing_has_changed(
    idle: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = 0
    done_from = CommitProgress._done_from

    def counted(progress: CommitProgress, start: int) -> int:
        nonlocal computed
        computed += 1
        return done_from(progress, start)

    monkeypatch.setattr(CommitProgress, "_done_from", counted)
    places = [Partition("t", number) for number in range(1 + idle)]
    trackers = {each: Tracker(Assignment(each, Commit(7), 0), cast("MemberCallbacks", None)) for each in places}
    busy, *others = trackers.values()

    def new_commits() -> list[Commit | None]:
        nonlocal computed
        computed = 0
        return [tracker.progress.committable() for tracker in trackers.values()]

    assert new_commits() == [None] * len(trackers)
    busy.progress.received(7)
    assert (new_commits(), computed) == ([None] * len(trackers), 1)
    busy.progress.mark_done(7)
    for _ in range(2):  # it is asked for again after a commit that failed
        assert (new_commits(), computed) == ([Commit(8), *[None] * idle], 1)
    busy.progress.committed(Commit(8))
    assert (new_commits(), computed) == ([None] * len(trackers), 1)
    assert (new_commits(), computed) == ([None] * len(trackers), 0)
    assert [tracker.progress.committable(is_known=True) for tracker in others] == [Commit(7)] * idle
