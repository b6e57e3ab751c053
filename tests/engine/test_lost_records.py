"""Records that retention deletes before they are done: counted and logged by every kind of member."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

import pytest
import structlog

from gateway.engine.commit_progress import WINDOW, CommitProgress
from gateway.engine.control.records import ControlRecord
from gateway.log.base import Commit, Partition, partition_of
from gateway.log.topics import DAY, ORDERED_PARTITIONS, ROUTER_GROUP
from gateway.ops.control_client import ControlClient
from tests.builders import a_destination, a_policy, a_route, an_event
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
from tests.virtual_time import now, run

ORDERED = TOPICS.ordered("build", "ci")


def lost(world: World, topic: str = EVENTS) -> float:
    return world.metrics.records_lost.labels(topic).value


def keep(world: World, topic: str, seconds: float) -> None:
    world.log.grow(replace(world.log._state.specs[topic], retention=seconds))


async def delete_all(world: World, topic: str = EVENTS) -> None:
    for number, (_, end) in (await world.log.bounds(topic)).items():
        world.log.delete_below(Partition(topic, number), end)


def logged_losses(lines: Sequence[object]) -> list[tuple[str, int]]:
    return [
        (line["group"], line["count"]) for line in lines if isinstance(line, dict) and line["event"] == "records_lost"
    ]


def test_gradual_deletions_behind_buffered_records_are_one_gap() -> None:
    progress = CommitProgress(Commit(0), 0)
    for offset in range(1, 5001):
        progress.records_deleted(range(offset, offset + 1))
    assert len(progress._gone) == 1
    progress.received(0)
    progress.mark_done(0)
    assert progress.base == 5001


def test_records_deleted_unread_are_lost_unless_done() -> None:
    progress = CommitProgress(Commit(0, b"\x04"), 0)
    progress.received(0)
    assert progress.records_deleted(range(1, 5)) == 3
    assert progress.lost == 3
    assert progress.lowest_unfinished() == 0
    progress.mark_done(0)
    assert progress.base == 5


def test_records_buffered_elsewhere_are_not_lost_and_can_be_received() -> None:
    progress = CommitProgress(Commit(0), 0)
    assert progress.records_deleted(range(2, 5)) == 3
    assert progress.received(0)
    assert progress.received(1)
    assert progress.received(7)
    assert not progress.is_done(0)
    assert progress.is_done(4)


def test_records_deleted_behind_buffered_ones_are_done_with_them_even_at_the_end() -> None:
    progress = CommitProgress(Commit(0), 0)
    assert progress.records_deleted(range(2, 5)) == 3
    assert progress.records_deleted(range(6, 8)) == 2
    assert progress.committable() == Commit(0, b"\xdc")
    for offset in (0, 1, 5):
        assert progress.received(offset)
        progress.mark_done(offset)
    assert progress.base == 8


def test_deletions_behind_buffered_records_are_not_counted_by_the_next_owner() -> None:
    progress = CommitProgress(Commit(0), 0)
    progress.records_deleted(range(2, 5))
    commit = progress.committable()
    assert commit is not None
    assert CommitProgress(commit, 5).lost == 2


def test_received_records_are_not_lost() -> None:
    progress = CommitProgress(Commit(0), 0)
    progress.received(9)
    assert progress.records_deleted(range(2, 8)) == 0


@virtual
async def test_a_router_counts_records_deleted_unread() -> None:
    world = await a_world(a_route())
    world.logger = structlog.get_logger()
    with structlog.testing.capture_logs() as lines:
        async with running(world):
            await world.put(*events(10))
            await asyncio.sleep(2)
            world.log.stall(TOPICS.group("router"))
            await world.put(*events(10))
            await delete_all(world)
            world.log.go_on(TOPICS.group("router"))
            await asyncio.sleep(2)
            assert lost(world) == sum(count for _, count in logged_losses(lines)) == 10
        async with running(world):
            await asyncio.sleep(2)
    assert lost(world) == 10  # nothing is counted twice
    assert len(world.client.made) == 10


@virtual
async def test_a_blocked_ordered_member_counts_records_deleted_behind_it() -> None:
    world = await a_world(a_route(is_ordered=True, halts=True, retry=a_policy(max_attempts=1)), ci=[500])
    world.logger = structlog.get_logger()
    group = TOPICS.ordered_group("build", "ci")
    with structlog.testing.capture_logs() as lines:
        async with running(world):
            await world.put(*events(4))
            await asyncio.sleep(3)
            world.log.stall(group)
            await world.put(*events(6))
            await asyncio.sleep(2)
            await delete_all(world, ORDERED)
            await asyncio.sleep(2)
    assert sum(count for name, count in logged_losses(lines) if name == group) == 6


@virtual
async def test_records_deleted_behind_a_full_window_are_counted_though_its_partition_is_paused() -> None:
    world = await a_world(a_route(is_ordered=True, halts=True, retry=a_policy(max_attempts=1)), ci=[500])
    world.logger = structlog.get_logger()
    group = TOPICS.ordered_group("build", "ci")

    async def put(count: int) -> None:
        await world.put(*[an_event(id=f"evt_{now()}.{n}", key="k", received_at=now()) for n in range(count)])
        await asyncio.sleep(3)

    with structlog.testing.capture_logs() as lines:
        async with running(world) as worker:
            await put(1)
            ((partition, end),) = [
                (Partition(ORDERED, number), end)
                for number, (_, end) in (await world.log.bounds(ORDERED)).items()
                if end
            ]
            world.log.skip_offsets(partition, WINDOW - end - 1)
            await put(1)
            ((member, _),) = worker._ordered.values()
            assert member.trackers[partition].is_paused
            await put(6)
            await delete_all(world, ORDERED)
            await asyncio.sleep(2)
            assert lost(world, ORDERED) == 6
    assert logged_losses(lines) == [(group, 6)]


@virtual
async def test_retries_deleted_while_their_tier_is_paused_are_counted() -> None:
    """A tier is paused once some of its records are taken that aren't due."""
    retry = a_policy(schedule=(100.0,), max_attempts=5, max_age=86400.0)
    world = await a_world(a_route(retry=retry), ci=[500, 200] * 20)  # no breaker opens
    world.logger = structlog.get_logger()
    tier = TOPICS.retry("80s")
    with structlog.testing.capture_logs() as lines:
        async with running(world) as worker:
            await world.put(*[an_event(id=f"evt_{number}", received_at=now()) for number in range(20)])
            await asyncio.sleep(5)
            trackers = [tracker for place, tracker in worker._router.trackers.items() if place.topic == tier]
            taken = sum([len(tracker.buffered) for tracker in trackers])
            assert taken == len(world.log.records(tier)) == 10
            assert all(tracker.is_paused for tracker in trackers if tracker.buffered)
            await world.put(*[an_event(id=f"evt_{number}", received_at=now()) for number in range(20, 40)])
            await asyncio.sleep(5)
            unread = len(world.log.records(tier)) - sum([len(tracker.buffered) for tracker in trackers])
            await delete_all(world, tier)
            await asyncio.sleep(5)
            assert lost(world, tier) == unread > 0
    assert logged_losses(lines) == [(TOPICS.group(ROUTER_GROUP), unread)]


def test_the_backlog_of_a_route_that_lost_its_order_is_counted_or_delivered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.engine.worker.JOINED_AT_ONCE", 0)  # so that its unfinished records alone show it

    async def scenario() -> None:
        world = await a_world(a_route(is_ordered=True, halts=True, retry=a_policy(max_attempts=1)), ci=[500, 200])
        names = [f"evt_{number}" for number in range(100)]
        names = [name for name in names if partition_of(name.encode(), ORDERED_PARTITIONS) == 0]
        made = [an_event(id=name, received_at=now()) for name in names[:8]]
        async with running(world):
            await world.put(*made[:6])
            await asyncio.sleep(3)
            world.log.stall(TOPICS.ordered_group("build", "ci"))
            await world.put(*made[6:])
            await asyncio.sleep(1)
        assert len(world.client.made) == 6
        world.log.delete_below(Partition(ORDERED, 0), 6)
        world.log.go_on(TOPICS.ordered_group("build", "ci"))
        world.rules = rules_of(a_route())
        async with running(world):
            await asyncio.sleep(3)
        assert lost(world, ORDERED) == 1
        assert [event for _, event, _ in world.client.made[6:]] == names[6:8]

    run(scenario())


@virtual
async def test_a_partition_whose_records_are_others_is_read_from_its_start() -> None:
    world = await a_world(a_route())
    async with running(world):
        await world.put(*events(10))
        await asyncio.sleep(3)
        assert len(world.client.made) == 10
        await world.log.recreate(EVENTS)
        await world.put(*events(10))
        await asyncio.sleep(3)
        assert len(world.client.made) == 20
    assert await world.unfinished() == 0


@pytest.mark.parametrize(
    ("before", "answers"),
    [(3.0, [200]), (0.2, [200]), (3.0, [9.0, *[200] * 10]), (0.2, [9.0, 9.0, 9.0, 200])],
    ids=["all done and committed", "all done", "the first under way", "nothing done"],
)
def test_a_topic_recreated_during_a_rebalance_is_read_from_its_start(
    before: float, answers: Sequence[int | float]
) -> None:
    """The member that gets its partition straight back knows what was done, and is under way, of another one."""

    async def scenario() -> None:
        world = await a_world(a_route(), ci=answers)
        async with running(world):
            await world.put(*events(min(10, len(answers) - 1 or 10)))
            await asyncio.sleep(before)
            rebalance = asyncio.create_task(world.log.rebalance(TOPICS.group(ROUTER_GROUP), takes=4.0))
            await asyncio.sleep(3.0)
            await world.log.recreate(EVENTS)
            await rebalance
            new = [an_event(id=f"new_{number}", received_at=now()) for number in range(10)]
            await world.put(*new)
            await asyncio.sleep(40)
            assert {event for _, event, _ in world.client.made} >= {event.id for event in new}
        assert await world.unfinished() == 0

    run(scenario())


@virtual
async def test_an_ordered_route_restarts_with_a_recreated_topic_though_a_key_has_halted() -> None:
    world = await a_world(a_route(is_ordered=True, halts=True, retry=a_policy(max_attempts=1)), ci=[500, 200])
    async with running(world):
        await world.put(*[an_event(id=f"evt_{number}", key="k", received_at=now()) for number in range(3)])
        await asyncio.sleep(3)
        assert len(world.client.made) == 1
        await world.log.recreate(ORDERED)
        await world.put(*[an_event(id=f"evt_{number}", key="k", received_at=now()) for number in range(5, 8)])
        await asyncio.sleep(3)
    assert [event for _, event, _ in world.client.made] == ["evt_0", "evt_5", "evt_6", "evt_7"]


@virtual
async def test_an_attempt_ends_before_its_key_restarts_with_a_recreated_topic() -> None:
    world = await a_world(a_route(is_ordered=True), ci=[5.0, 200])
    async with running(world):
        await world.put(*[an_event(id=f"evt_{number}", key="k", received_at=now()) for number in range(3)])
        await asyncio.sleep(1)
        assert world.client.under_way == 1
        await world.log.recreate(ORDERED)
        new = [an_event(id=f"evt_{number}", key="k", received_at=now()) for number in (5, 6)]
        await world.put(*new, an_event(id="other", key="other", received_at=now()))
        await asyncio.sleep(3)
        assert [event for _, event, _ in world.client.made] == ["evt_0", "other"]
        await asyncio.sleep(3)
    assert [event for _, event, _ in world.client.made] == ["evt_0", "other", "evt_5", "evt_6"]


@virtual
async def test_an_attempt_of_a_recreated_topic_is_cut_before_its_partition_has_another_owner() -> None:
    patient = a_destination("ci", url="http://127.0.0.1:1/ci", timeout=300.0)
    world = await a_world(a_route(is_ordered=True), destinations=[patient], ci=[200.0, 200])
    async with running(world):
        await world.put(an_event(id="evt_0", key="k", received_at=now()))
        await asyncio.sleep(1)
        await world.log.recreate(ORDERED)
        await world.put(an_event(id="evt_1", key="k", received_at=now()))
        await asyncio.sleep(2)
        assert (len(world.client.made), world.client.under_way) == (1, 1)
        async with running(world):
            await asyncio.sleep(5)
            assert (len(world.client.made), world.client.under_way) == (1, 1)
            await asyncio.sleep(10)
            assert world.client.under_way == 0
    assert [event for _, event, _ in world.client.made] == ["evt_0", "evt_1"]


@virtual
async def test_a_metric_shows_how_long_unfinished_records_are_kept() -> None:
    world = await a_world(a_route(is_ordered=True, halts=True, retry=a_policy(max_attempts=1)), ci=[500])
    async with running(world):
        await asyncio.sleep(15)
        left = world.metrics.retention_left.labels(ORDERED)
        assert left.value == 7 * DAY
        keep(world, ORDERED, 7200.0)
        await world.put(*events(1))
        await world.doze(5400)
        assert left.value == pytest.approx(1800, abs=20)
        assert world.metrics.retention_left.labels(TOPICS.retry("20h")).value == 7 * DAY + 72000


@virtual
async def test_parked_deliveries_are_reported_before_and_counted_at_deletion() -> None:
    world = await a_world(a_route())
    world.logger = structlog.get_logger()
    parked = TOPICS.parked
    async with operated(world) as control, running(world, world.worker(control)):
        await publish(world, ControlRecord(kind="pause", name="destination/ci", state="paused", at=now()))
        await asyncio.sleep(1)
        await world.put(*events(5))
        await asyncio.sleep(20)
        assert world.metrics.parked_backlog.value == 5
        assert world.metrics.retention_left.labels(parked).value == pytest.approx(30 * DAY, abs=60)
        keep(world, parked, 7200.0)
        await world.doze(5400)
        assert world.metrics.retention_left.labels(parked).value == pytest.approx(1800, abs=40)
        await delete_parked(world)
        await asyncio.sleep(20)
        assert lost(world, parked) == 5
        assert world.metrics.parked_backlog.value == 0
        assert world.metrics.retention_left.labels(parked).value == 7200
    assert (parked,) not in world.metrics.retention_left, "another process tells it now"


@virtual
async def test_deliveries_resumed_before_the_control_topic_was_recreated_are_not_lost() -> None:
    world = await a_world(a_route())
    commands = ControlClient(world.log, TOPICS)
    async with operated(world) as control, running(world, world.worker(control)):
        await commands.pause("destination/ci")
        await asyncio.sleep(1)
        await world.put(*events(20))
        await asyncio.sleep(6)
        placed = await commands.resume("destination/ci")
        assert placed is not None
        await commands.finished(placed, timeout=30)
        await asyncio.sleep(30)
        assert len(world.client.made) == 20
    await world.log.recreate(TOPICS.control)
    async with operated(world) as control, running(world, world.worker(control)):
        await asyncio.sleep(30)
        assert world.metrics.parked_backlog.value == 20  # as it isn't known that they were resumed
        await delete_parked(world)
        await asyncio.sleep(20)
        assert world.metrics.parked_backlog.value == 0
    assert lost(world, TOPICS.parked) == 0


@virtual
async def test_a_parked_record_that_was_dead_lettered_is_neither_parked_nor_lost() -> None:
    world = await a_world(a_route())
    await publish(world, ControlRecord(kind="pause", name="destination/ci", state="active", at=now()))
    async with operated(world):
        await asyncio.sleep(7)
        await world.log.append(TOPICS.parked, key=b"x", value=b"{}", headers=[("gw_v", b"x")])
        await asyncio.sleep(20)
        assert len(world.log.records(TOPICS.dead)) == 1
        assert world.metrics.parked_backlog.value == 0
    async with operated(world):
        await asyncio.sleep(20)
        assert world.metrics.parked_backlog.value == 0
        await delete_parked(world)
        await asyncio.sleep(20)
    assert lost(world, TOPICS.parked) == 0


async def delete_parked(world: World) -> None:
    for number, (_, end) in (await world.log.bounds(TOPICS.parked)).items():
        world.log.delete_below(Partition(TOPICS.parked, number), end)


@virtual
async def test_the_time_left_of_a_topic_without_readers_is_not_reported() -> None:
    """A removed ordered route's, here: it would stay at its last value, and an alert with it."""
    route = a_route(is_ordered=True, retry=a_policy(schedule=(5.0,), max_attempts=9999, max_age=1e9))
    other = a_route("other", to=("audit",))
    world = await a_world(route, other, ci=[503])
    async with running(world) as worker:
        await world.put(*events(1))
        await asyncio.sleep(3000)
        left = world.metrics.retention_left
        assert left.labels(ORDERED).value < 7 * DAY - 2000
        world.client.scripts["ci"] = [200]
        await asyncio.sleep(60)
        assert (ORDERED,) in left
        world.rules = rules_of(other)
        worker.reload()
        await asyncio.sleep(60)
        assert (ORDERED,) not in left
        assert (EVENTS,) in left
