"""What waits in a tier for its source to be known, while its router is killed and a kick is under way.

tier record of no route ──source known──▶ fan-out, attempts ──✗ killed ──▶ successors, in tiers
                                                     │
                  kick: announced ──▶ scanned ──▶ checkpoint: covers the record, from which it has copied nothing
"""

import asyncio
from collections import Counter
from contextlib import suppress
from dataclasses import replace

import pytest
from typing_extensions import override

from gateway.client.request import Outbound
from gateway.engine.control.records import ControlRecord
from gateway.engine.jobs.log_reader import CHECKPOINT_EVERY
from gateway.engine.worker import Worker
from gateway.log.topics import ROUTER_GROUP, TIERS
from gateway.model import Attempt, Result, event_id
from gateway.rules.rules import Rules
from tests.builders import a_policy, a_route, an_event
from tests.engine.test_replay import MortalLog, Owner
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
from tests.virtual_time import now, run

COUNT = 4
WAITS = 20.0
"""Seconds from an event of an unknown source to the next look at it."""


class Process(MortalLog):
    """The one connection of a process."""

    @override
    def another(self) -> "Process":
        return self


class Receipts(ScriptedClient):
    """Notes which deliveries succeeded."""

    def __init__(self) -> None:
        super().__init__({"ci": [503] * 3 * COUNT + [200], "audit": [503, 200]})
        self.got: Counter[tuple[str, str]] = Counter()

    @override
    async def attempt(self, outbound: Outbound, *, timeout: float, number: int) -> Attempt:
        attempt = await super().attempt(outbound, timeout=timeout, number=number)
        if attempt.result is Result.SUCCESS:
            self.got[self.made[-1][:2]] += 1
        return attempt


async def _waiting() -> tuple[World, Receipts]:
    """Return a world whose events wait for their source, which is known by now: the first retry waits in memory."""
    retry = a_policy(schedule=(3.0, 30.0), max_attempts=20, max_age=86400.0)
    world = await a_world(a_route(to=("ci", "audit"), retry=retry))
    receipts = world.client = Receipts()
    rules, world.rules = world.rules, replace(world.rules, sources={})
    async with running(world):
        await world.put(*events(COUNT))
        await asyncio.sleep(2)
    assert [stored.delivery.route for stored in world.stored(TOPICS.retry("20s"))] == [""] * COUNT
    world.rules = rules
    return world, receipts


def _shared(*known: str) -> Rules:
    """Return rules that know some of two sources that share a topic."""
    rules = rules_of(a_route(sources=("github", "gitlab")))
    gitlab = replace(rules.sources["github"], name="gitlab", path="/in/gitlab", topic=EVENTS)
    sources = {**rules.sources, "gitlab": gitlab}
    return replace(rules, sources={name: sources[name] for name in known})


@virtual
async def test_an_unknown_sources_event_on_a_shared_topic_waits_in_a_tier_until_its_source_is_known() -> None:
    world = await a_world(a_route())
    world.rules = _shared("github")
    async with running(world):
        await asyncio.sleep(2)
        await world.put(an_event(id="evt_unknown", source="gitlab", received_at=now()))
        await world.put(an_event(id="evt_known", received_at=now()))
        world.log.fail_appends()  # of its successor: it isn't done before that is stored
        await asyncio.sleep(2)
        assert await world.unfinished() == 1
        world.log.fail_appends(0)
        await asyncio.sleep(5)
        (waiting,) = world.stored(TOPICS.retry("20s"))
        assert (waiting.delivery.event.source, waiting.delivery.route) == ("gitlab", "")
        assert [event for _, event, _ in world.client.made] == ["evt_known"]
        await asyncio.sleep(100)  # it is looked for again and again
        assert [event for _, event, _ in world.client.made] == ["evt_known"]
        world.rules = _shared("github", "gitlab")
        await asyncio.sleep(100)
    assert [event for _, event, _ in world.client.made] == ["evt_known", "evt_unknown"]
    assert await _unfinished(world) == 0
    assert not world.dead()


@virtual
async def test_duplicates_of_a_source_that_was_unknown_are_delivered_and_counted_as_undecided() -> None:
    world = await a_world(a_route())
    name = event_id("github", "one")
    sources = {each.name: replace(each, dedupe=3600.0) for each in world.rules.sources.values()}
    world.rules = replace(world.rules, sources={})
    async with running(world):
        for _ in range(2):
            await world.put(an_event(id=name, received_at=now()))
            await asyncio.sleep(1)
        world.rules = replace(world.rules, sources=sources)
        await asyncio.sleep(100)
        undecided = world.metrics.dedupe_undecided.labels("github")
        assert (len(world.client.made), undecided.value) == (2, 2)
        for _ in range(2):
            await world.put(an_event(id=name, received_at=now()))
            await asyncio.sleep(1)
    assert (len(world.client.made), undecided.value) == (3, 2), "known from its first one on that was read with it"


async def _unfinished(world: World) -> int:
    return sum([await world.unfinished(topic) for topic in (EVENTS, *map(TOPICS.retry, TIERS))])


async def _killed_at(append: int, *, is_stored: bool, kicked: float, does_the_job: bool) -> bool:
    """Kill a router at an append, and let another go on; the kick comes so many seconds before the fan-out.

    Return whether it came to that append.
    """
    world, receipts = await _waiting()
    mortal = Process(world.log, appends=append, is_stored=is_stored)
    owner = Owner(world, mortal if does_the_job else None)
    await owner.start()
    doomed = Worker(
        log=mortal,
        topics=TOPICS,
        rules=lambda: world.rules,
        client=receipts,
        control=owner.control,
        metrics=world.metrics,
        logger=world.logger,
    )
    task = asyncio.create_task(doomed.run())
    await asyncio.sleep(WAITS - 2 - kicked)
    await publish(world, ControlRecord(kind="kick", name="destination/ci", state="requested", at=world.log.now()))
    with suppress(TimeoutError):
        async with asyncio.timeout(kicked + 10):
            await mortal.died.wait()
    world.log.fail_commits()  # dead, it commits nothing
    task.cancel()
    await asyncio.wait([task])
    del world.log._state.members[TOPICS.group(ROUTER_GROUP)]  # its session is over
    world.log.fail_commits(0)
    if does_the_job:
        await owner.stop()
        owner = Owner(world)
        await owner.start()
    async with running(world, world.worker(owner.control)):
        async with asyncio.timeout(1800):
            while await _unfinished(world) or owner.control.pending("kick"):
                await world.doze(20)
    await owner.stop()
    assert world.dead() == []
    assert receipts.got.keys() == {(name, f"evt_{n}") for name in ("ci", "audit") for n in range(COUNT)}
    assert max(receipts.got.values()) <= 2, "a kill leaves one live copy more at most"
    assert receipts.got.total() - 2 * COUNT <= CHECKPOINT_EVERY
    return mortal.died.is_set()


@pytest.mark.rotated(share=1 / 2)
@pytest.mark.parametrize("kicked", [2.0, 0.2])
@pytest.mark.parametrize("does_the_job", [False, True], ids=["router", "router-and-jobs"])
def test_a_router_killed_between_a_fan_out_and_its_successors_loses_nothing_beside_a_kick(
    kicked: float, *, does_the_job: bool
) -> None:
    died = [
        run(_killed_at(append, is_stored=is_stored, kicked=kicked, does_the_job=does_the_job))
        for append in range(1, 11)
        for is_stored in (False, True)
    ]
    assert sum(died) >= 2 * COUNT
