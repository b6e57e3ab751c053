"""Rights to topics that are missing, or taken away from processes that run: no process ends, and nothing else waits."""

import asyncio
import math
from dataclasses import replace
from unittest.mock import AsyncMock

import pytest

from gateway.engine.control.records import ControlRecord
from gateway.engine.jobs.runner import FORGET_RULES_INTERVAL
from gateway.log.base import ALL, Partition, TopicSpec
from gateway.log.records import encode_event, event_key
from gateway.log.topics import ROUTER_GROUP
from gateway.model import LogUnavailableError
from gateway.required_topics import missing_topics, specs_of
from tests.builders import a_route, an_event
from tests.engine.test_jobs import a_backlog
from tests.engine.test_replay import Owner, a_replay, ended, events_of, owning
from tests.engine.test_worker import EVENTS, TOPICS, World, a_world, publish, running, virtual
from tests.memory_log import MemoryLog
from tests.virtual_time import now

OTHER = "orders"


async def a_world_of_two() -> World:
    """Return a world with a second source, whose topic has a name of its own."""
    world = await a_world(a_route(sources=("github", "shop")))
    shop = replace(world.rules.sources["github"], name="shop", path="/in/shop", topic=OTHER)
    world.rules = replace(world.rules, sources={**world.rules.sources, "shop": shop})
    await world.log.create([TopicSpec(name=OTHER, partitions=2, retention=7 * 86400.0)])
    return world


async def put(world: World, topic: str, name: str) -> None:
    event = an_event(id=name, source="shop" if topic == OTHER else "github", received_at=now())
    await world.log.append(topic, key=event_key(event), value=event.body, headers=encode_event(event))


async def history(world: World, *places: str) -> None:
    await publish(
        world,
        ControlRecord(
            kind="routed", name="1-ab", state="done", at=now(), checkpoint=dict.fromkeys(places, 0), revision="r"
        ),
    )


@virtual
async def test_the_history_of_a_removed_source_with_a_forbidden_topic_is_forgotten() -> None:
    world = await a_world(a_route())
    await history(world, f"{OTHER}/0", f"{OTHER}/1")
    world.log.forbid(OTHER)
    owner = Owner(world)
    await owner.start()
    await asyncio.sleep(FORGET_RULES_INTERVAL + 5)
    assert not owner.control.history.partitions()
    await owner.stop()  # which sees that it hadn't ended


@virtual
async def test_the_history_of_a_source_in_the_rules_is_kept_while_its_topic_is_forbidden() -> None:
    world = await a_world_of_two()
    await history(world, f"{OTHER}/0", f"{OTHER}/1")
    world.log.forbid(OTHER)
    async with owning(world) as control:
        await asyncio.sleep(FORGET_RULES_INTERVAL + 5)
        assert control.history.partitions().keys() == {OTHER}


@virtual
async def test_a_replay_waits_for_the_rights_to_its_topic_and_others_do_not() -> None:
    world = await a_world_of_two()
    await events_of(world, 3)
    for number in range(4):
        await put(world, OTHER, f"evt_shop_{number}")
    both = {f"{OTHER}/0": 4, f"{OTHER}/1": 4, f"{EVENTS}/0": 3}
    world.log.forbid(OTHER)
    async with owning(world) as control:
        await a_replay(world, "both", places=both, undelivered=True)
        await asyncio.sleep(20)
        await a_replay(world, "one")
        assert (await ended(control, "one", within=30)).count == 3
        assert control.commands["replay/both"].state == "requested"
        world.log.allow(OTHER)
        assert (await ended(control, "both", within=30)).unread == 0


@virtual
async def test_a_backlog_is_counted_though_the_topic_of_another_is_forbidden() -> None:
    world = await a_world(a_route())
    await publish(world, ControlRecord(kind="pause", name="destination/ci", state="paused", at=now()))
    await a_backlog(world, "resume", 12)
    await a_backlog(world, "dead", 5)
    world.log.forbid(TOPICS.dead)
    owner = Owner(world)
    await owner.start()
    await asyncio.sleep(60)
    assert world.metrics.parked_backlog.value == 12
    assert math.isnan(world.metrics.dead_letter_backlog.value), "nothing is known of it"
    assert owner.jobs.unreadable().keys() == {Partition(TOPICS.dead, ALL)}
    world.log.allow(TOPICS.dead)
    world.log.forbid(TOPICS.parked)
    await asyncio.sleep(60)
    assert world.metrics.dead_letter_backlog.value == 5
    assert world.metrics.parked_backlog.value == 12, "as it was last known"
    assert owner.jobs.unreadable().keys() == {Partition(TOPICS.parked, ALL)}
    await owner.stop()
    assert not owner.jobs.unreadable()


@virtual
async def test_a_backlog_is_unknown_until_the_log_can_be_read() -> None:
    world = await a_world(a_route())
    await a_backlog(world, "dead", 5)
    owner = Owner(world)
    await owner.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MemoryLog, "readable", AsyncMock(side_effect=LogUnavailableError("no answer")))  # a log away
        await asyncio.sleep(20)
        assert math.isnan(world.metrics.dead_letter_backlog.value)
        assert math.isnan(world.metrics.parked_backlog.value)
    await asyncio.sleep(10)
    assert (world.metrics.dead_letter_backlog.value, world.metrics.parked_backlog.value) == (5, 0)
    await owner.stop()


@virtual
async def test_a_worker_continues_without_a_topic_that_it_may_no_longer_read() -> None:
    world = await a_world_of_two()
    group = TOPICS.group(ROUTER_GROUP)

    def delivered() -> set[str]:
        return {event for _, event, _ in world.client.made}

    async with running(world) as worker:
        await put(world, OTHER, "before")
        await asyncio.sleep(2)
        await put(world, OTHER, "under-way")
        world.log.forbid(OTHER)
        for number in range(30):  # whatever is looked at every ten seconds comes round
            await put(world, EVENTS, f"evt_{number}")
            await asyncio.sleep(1)
        assert delivered() >= {"before", *(f"evt_{number}" for number in range(30))}
        assert {partition.topic for partition in worker.unread} == {OTHER}
        assert world.metrics.retention_left.labels(EVENTS).value > 0
        commits = await world.log.committed(group, EVENTS)
        assert sum(commit.base for commit in commits.values()) >= 29, "others are committed"
        worker.reload()
        await asyncio.sleep(2)
        world.log.allow(OTHER)
        await put(world, OTHER, "after")
        await asyncio.sleep(10)
        assert delivered() >= {"under-way", "after"}
        assert not worker.unread
    assert await world.unfinished(OTHER) == 0


@virtual
async def test_a_commit_refused_for_one_topic_is_stored_for_the_others() -> None:
    """Or an order would wait for it: what has one is appended once its event's commit was accepted."""
    world = await a_world_of_two()
    async with running(world) as worker:
        await put(world, OTHER, "shop")
        await put(world, EVENTS, "github")
        await asyncio.sleep(0.05)
        world.log.forbid(OTHER)
        await asyncio.sleep(5)
        trackers = worker._router.trackers
        assert {tracker.partition.topic for tracker in trackers.values() if tracker.progress.committable()} <= {OTHER}
        world.log.allow(OTHER)


@virtual
async def test_a_forbidden_topic_of_the_rules_is_reported_with_the_reason() -> None:
    world = await a_world_of_two()
    specs = specs_of(world.rules, TOPICS)
    assert not await missing_topics(world.log, specs)
    world.log.forbid(OTHER)
    missing = await missing_topics(world.log, specs)
    assert missing.keys() == {Partition(OTHER, ALL)}
    assert "right" in missing[Partition(OTHER, ALL)]
