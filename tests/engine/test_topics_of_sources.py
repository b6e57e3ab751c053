"""What an ingress appends by rules that a router has for a moment, or never: their topics are found all the same."""

import asyncio
import math
from collections.abc import Collection
from dataclasses import replace

import pytest
import structlog

from gateway.engine.router import TOPIC_CHECK_INTERVAL
from gateway.engine.unavailable_partitions import MISSING_FOR
from gateway.log.base import ALL, Partition, TopicSpec
from gateway.log.records import encode_event, event_key
from gateway.log.topics import SOURCES_GROUP
from gateway.model import LogUnavailableError
from gateway.required_topics import ensure_topics
from gateway.rules.rules import Rules
from gateway.settings import Settings
from tests.builders import a_destination, a_route
from tests.engine.test_worker import EVENTS, TOPICS, World, a_world, events, rules_of, running
from tests.memory_log import MemoryLog
from tests.virtual_time import run

LISTED, NAMED = f"{EVENTS}-2", "acme.hooks"


def moved(rules: Rules, topic: str) -> Rules:
    """Return the rules with their sources on another topic."""
    return replace(rules, sources={name: replace(each, topic=topic) for name, each in rules.sources.items()})


async def activate(world: World, rules: Rules) -> None:
    """Let an ingress activate rules: the topics that they add are there then."""
    log = world.log.another()
    await log.create(TOPICS.specs([source.topic or EVENTS for source in rules.sources.values()]))
    settings, logger = Settings(topic_prefix=TOPICS.prefix), structlog.get_logger()
    await ensure_topics(log, settings, rules, logger, is_start=False)


async def put(world: World, topic: str, count: int) -> None:
    for event in events(count):
        await world.log.append(topic, key=event_key(event), value=event.body, headers=encode_event(event))


@pytest.mark.parametrize("topic", [LISTED, NAMED])
@pytest.mark.parametrize("is_seen", [True, False], ids=["for a moment", "never"])
def test_events_of_rolled_back_rules_are_delivered(topic: str, *, is_seen: bool) -> None:
    async def scenario() -> None:
        world = await a_world(a_route())
        async with running(world) as worker:
            await asyncio.sleep(1)
            before, other = world.rules, moved(rules_of(a_route()), topic)
            await activate(world, other)
            await put(world, topic, 8)
            if is_seen:
                world.rules = other
                worker.reload()
                world.rules = before
                worker.reload()
            await asyncio.sleep(5 if is_seen else TOPIC_CHECK_INTERVAL + 5)
            assert len(world.client.made) == 8

    run(scenario())


OLD = TOPICS.events("old")
CI = "http://127.0.0.1:1/ci"


def test_a_deleted_topic_of_a_removed_source_is_not_missed_and_read_again_once_it_is_back() -> None:
    async def scenario() -> None:
        world = await a_world(a_route())
        spec = TopicSpec(name=OLD, partitions=6, retention=None)
        await world.log.create([spec])
        async with running(world) as worker:
            await asyncio.sleep(5)
            assert OLD in worker._router.subscribed
            world.log.delete(OLD)
            await asyncio.sleep(10)
            assert worker.unread.keys() == {Partition(OLD, ALL)}
            await asyncio.sleep(MISSING_FOR + TOPIC_CHECK_INTERVAL + 5)
            assert not worker.unread
            assert not {(OLD,)} & {*world.metrics.log_lag, *world.metrics.oldest_pending}
            assert not any(math.isnan(gauge.value) for gauge in world.metrics.log_lag.values())
            await world.log.create([spec])
            await put(world, OLD, 8)
            await asyncio.sleep(TOPIC_CHECK_INTERVAL + 5)
            assert len(world.client.made) == 8

    run(scenario())


def test_a_deleted_topic_that_the_rules_name_stays_missing() -> None:
    async def scenario() -> None:
        world = await a_world(a_route())
        async with running(world) as worker:
            await asyncio.sleep(5)
            world.log.delete(EVENTS)
            await asyncio.sleep(600)
            assert worker.unread.keys() == {Partition(EVENTS, ALL)}

    run(scenario())


def test_a_deleted_topic_is_kept_until_what_was_read_of_it_has_ended() -> None:
    async def scenario() -> None:
        world = await a_world(a_route(), ci=[400.0, 200], destinations=[a_destination(url=CI, timeout=1000.0)])
        await world.log.create([TopicSpec(name=OLD, partitions=1, retention=None)])
        async with running(world) as worker:
            await asyncio.sleep(5)
            await put(world, OLD, 1)
            await asyncio.sleep(5)
            world.log.delete(OLD)
            await asyncio.sleep(300)
            assert (OLD in worker._router.subscribed, world.client.under_way) == (True, 1)
            await asyncio.sleep(300)
            assert (OLD in worker._router.subscribed, world.client.under_way) == (False, 0)
            assert len(world.client.made) == 1, "it isn't cut short"

    run(scenario())


def test_rules_that_add_no_topic_are_active_though_topics_cannot_be_listed() -> None:
    async def scenario() -> None:
        world = await a_world(a_route())
        is_away = False

        async def topics() -> Collection[str]:
            if is_away:
                raise LogUnavailableError("no broker answers")
            return await MemoryLog.topics(world.log)

        world.log.topics = topics  # type: ignore[method-assign]
        async with running(world) as worker:
            await asyncio.sleep(1)
            is_away = True
            world.rules = rules_of(a_route(to=("audit",)))
            worker.reload()
            await asyncio.sleep(1)
            await world.put(*events(3))
            await asyncio.sleep(1)
            assert [name for name, *_ in world.client.made] == ["audit"] * 3

    run(scenario())


@pytest.mark.parametrize("is_start", [True, False])
def test_custom_topics_that_cannot_be_asked_for_keep_nobody_from_reading(*, is_start: bool) -> None:
    async def scenario() -> None:
        world = await a_world(a_route())
        is_away = is_start

        async def topics_of(group: str) -> Collection[str]:
            if is_away and group == TOPICS.group(SOURCES_GROUP):
                raise LogUnavailableError("no coordinator")
            return await MemoryLog.topics_of(world.log, group)

        world.log.topics_of = topics_of  # type: ignore[method-assign]
        async with running(world) as worker:
            await asyncio.sleep(1)
            is_away = True
            await activate(world, moved(world.rules, LISTED))
            world.rules = moved(world.rules, LISTED)
            worker.reload()
            await put(world, LISTED, 8)
            await asyncio.sleep(5)
            assert len(world.client.made) == 8

    run(scenario())
