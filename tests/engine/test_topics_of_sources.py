"""What an ingress appends by rules that a router has for a moment, or never: their topics are found all the same."""

import asyncio
from collections.abc import Collection
from dataclasses import replace

import pytest
import structlog

from gateway.engine.router import TOPIC_CHECK_INTERVAL
from gateway.log.records import encode_event, event_key
from gateway.log.topics import SOURCES_GROUP
from gateway.model import LogUnavailableError
from gateway.required_topics import ensure_topics
from gateway.rules.rules import Rules
from gateway.settings import Settings
from tests.builders import a_route
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
