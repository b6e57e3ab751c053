"""What ends before a drain or a handover is over, so that the next owner repeats nothing."""

import asyncio
from collections import Counter
from dataclasses import replace

import pytest

from gateway.log.topics import ROUTER_GROUP, TIERS
from gateway.model import Event
from gateway.rules.rules import Rules, Source
from gateway.verify.schemes import build_verifier
from tests.builders import a_destination, a_route, an_event
from tests.engine.test_worker import TOPICS, World, a_world, reload, rules_of, running
from tests.virtual_time import now, run

KEYS = 12
SLOWLY = a_route("slowly", match={"body.is_slow": True}, to=("slow",))


def made(prefix: str, *, is_slow: bool) -> list[Event]:
    """Make events of several partitions."""
    body = {"is_slow": is_slow}
    return [an_event(id=f"{prefix}{key}", key=f"k{key}", body=body, received_at=now()) for key in range(KEYS)]


def rules(*, is_ordered: bool, concurrency: int, is_alone: bool = False) -> Rules:
    slow = a_destination("slow", url="http://127.0.0.1:1/slow", timeout=60.0, concurrency=concurrency)
    ordered = a_route("build", is_ordered=True, to=("audit",))
    others = [] if is_alone else [a_route("plain", match={"body.is_slow": False})]
    return rules_of(SLOWLY, *others, *([ordered] if is_ordered else ()), destinations=[slow])


async def a_world_with_new_order(seconds: float, *, concurrency: int = 100) -> World:
    world = await a_world(slow=[seconds])
    world.rules = rules(is_ordered=False, concurrency=concurrency)
    return world


def repeated(world: World) -> set[tuple[str, str]]:
    counts = Counter((name, event) for name, event, _ in world.client.made)
    return {each for each, count in counts.items() if count > 1}


def attempted(world: World, destination: str) -> int:
    return len({event for name, event, _ in world.client.made if name == destination})


@pytest.mark.parametrize("concurrency", [100, 2])
@pytest.mark.parametrize("end", ["drain", "handover"])
def test_a_delivered_event_is_not_repeated_though_an_earlier_one_waits(end: str, concurrency: int) -> None:
    """By a reload, a route gets an order: its deliveries wait for a commit of what was read by the former rules.

    That ends, is committed, and what waits for it is appended, before the partitions have another owner. What waits for
    its destination is carried on by a tier.
    """

    async def scenario() -> None:
        world = await a_world_with_new_order(1.5, concurrency=concurrency)
        async with running(world) as worker:
            await world.put(*made("slow", is_slow=True))
            await asyncio.sleep(0.5)
            await reload(world, worker, rules(is_ordered=True, concurrency=concurrency))
            await world.put(*made("next", is_slow=False))
            await asyncio.sleep(0.5)
            assert attempted(world, "ci") == KEYS
            assert attempted(world, "audit") == 0, "they wait"
            if end == "handover":
                async with running(world):
                    await asyncio.sleep(60)
        async with running(world):
            await asyncio.sleep(60)
        assert repeated(world) == set()
        assert (attempted(world, "slow"), attempted(world, "audit")) == (KEYS, KEYS)
        assert await world.unfinished() == 0

    run(scenario())


def test_a_drain_waits_for_nothing_that_is_left_to_the_next_owner() -> None:
    """What hasn't begun is read again: it neither moves to a tier nor holds a drain up, nor does what waits for it."""

    async def scenario() -> None:
        world = await a_world_with_new_order(1.5, concurrency=2)
        world.rules = rules(is_ordered=False, concurrency=2, is_alone=True)
        async with running(world) as worker:
            await world.put(*made("slow", is_slow=True))
            await asyncio.sleep(0.5)
            await reload(world, worker, rules(is_ordered=True, concurrency=2, is_alone=True))
            await world.put(*made("next", is_slow=False))
            await asyncio.sleep(0.5)
            stopped_at = now()
        assert now() < stopped_at + 1.5
        assert sum([len(world.stored(TOPICS.retry(tier))) for tier in TIERS]) == 0
        async with running(world):
            await asyncio.sleep(60)
        assert repeated(world) == set()
        assert attempted(world, "slow") == KEYS
        assert attempted(world, "audit") == 2 * KEYS - 2, "all that was read by the new rules"
        assert await world.unfinished() == 0

    run(scenario())


@pytest.mark.parametrize("after", [0.3, 0.399, 0.4, 0.401, 0.5])
def test_a_drain_closes_a_member_that_is_joining_for_other_topics(after: float) -> None:
    """By a reload there is a source more. What ended until then is committed, and nobody is left in the group."""

    async def scenario() -> None:
        world = await a_world(a_route(), ci=[0.5])
        async with running(world) as worker:
            await asyncio.sleep(1)
            await world.put(*made("a", is_slow=False))
            await asyncio.sleep(0.1)
            await world.log.create(TOPICS.specs([TOPICS.events("gitlab")]))
            more = Source(name="gitlab", path="/in/gitlab", verifier=build_verifier({"scheme": "none"}))
            await reload(world, worker, replace(world.rules, sources={**world.rules.sources, "gitlab": more}))
            await asyncio.sleep(after)
        assert await world.log.groups(TOPICS.group(ROUTER_GROUP)) == {TOPICS.group(ROUTER_GROUP): 0}
        async with running(world):
            await asyncio.sleep(60)
        assert repeated(world) == set()
        assert attempted(world, "ci") == KEYS
        assert await world.unfinished() == 0

    run(scenario())


@pytest.mark.parametrize("seconds", [3.0, 12.0])
@pytest.mark.parametrize("is_known", [True, False])
def test_a_destination_that_hangs_delays_no_other_while_a_process_stops(*, is_known: bool, seconds: float) -> None:
    """Events are read until its attempts have ended, and it gets no others; nothing is repeated afterwards."""

    async def scenario() -> None:
        world = await a_world(slow=[seconds])
        world.rules = rules(is_ordered=False, concurrency=2)
        async with running(world) as worker:
            await reload(world, worker, rules(is_ordered=True, concurrency=2))
            await asyncio.sleep(5.0)
            began = now()
            await world.put(*made("slow", is_slow=True), *(made("before", is_slow=False) if is_known else []))
            await asyncio.sleep(0.5)
            started = attempted(world, "slow")
            assert 0 < started < KEYS
            worker.stop()
            await asyncio.sleep(0.6)
            await world.put(*made("next", is_slow=False), *made("late", is_slow=True))
            await asyncio.sleep(1.0)
            assert attempted(world, "ci") == KEYS * (1 + is_known)
            assert attempted(world, "audit") == KEYS * (3 + is_known), "of an ordered route"
            await asyncio.sleep(began + seconds - 0.4 - now())
            await world.put(*made("last", is_slow=True))
        assert began + seconds - 0.1 < now() < began + seconds + 0.5
        assert attempted(world, "slow") == started, "it gets no others"
        async with running(world):
            await asyncio.sleep(40 * seconds)
        assert repeated(world) == set()
        assert attempted(world, "slow") == 3 * KEYS
        assert attempted(world, "audit") == KEYS * (4 + is_known)
        assert await world.unfinished() == 0

    run(scenario())
