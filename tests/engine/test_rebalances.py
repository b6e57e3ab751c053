"""A worker whose partitions are taken away and come back while it is busy with what it fetched."""

import asyncio
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from gateway.engine.group_member import REVOKE_GRACE
from gateway.log.base import Assignment, Commit, Partition
from gateway.log.records import encode_delivery
from gateway.log.topics import ROUTER_GROUP
from gateway.model import NO_METADATA, Event, EventId, event_id
from gateway.rules.rules import Source
from gateway.verify.schemes import build_verifier
from tests.builders import a_delivery, a_destination, a_route, an_event
from tests.engine.test_dedupe_filter import TestLog
from tests.engine.test_worker import EVENTS, TOPICS, World, a_world, events, running, virtual
from tests.virtual_time import now


class Visitor:
    """A member of the group that does nothing."""

    def assigned(self, assignments: Sequence[Assignment], without_position: Collection[Partition] = ()) -> None:
        """Take nothing over."""

    def records_deleted(self, partition: Partition, deleted: range) -> None:
        pass

    def restarted(self, assignment: Assignment) -> None:
        pass

    async def revoked(self, partitions: Sequence[Partition]) -> Mapping[Partition, Commit]:  # noqa: ARG002 - the listener's signature
        return {}


@virtual
async def test_records_fetched_before_a_rebalance_are_not_taken() -> None:
    """A tracker takes an offset that it isn't given for a gap: a batch out of its time would hide what is before it."""
    world = await a_world(a_route(), ci=[0.05])
    await world.put(*events(6000))
    async with running(world):
        for turns in range(100, 200, 10):
            await _visit(world, after=turns)
        await asyncio.sleep(60)
    assert len({event for _, event, _ in world.client.made}) == 6000
    assert await world.unfinished() == 0


async def _visit(world: World, *, after: int) -> None:
    """Join and leave at once, while the worker is in the middle of its batches."""
    for _ in range(after):
        await asyncio.sleep(0)
    topics = [EVENTS]
    consumer = await world.log.another().consume(group=TOPICS.group(ROUTER_GROUP), topics=topics, listener=Visitor())
    await consumer.close()


@virtual
async def test_a_member_that_joins_or_leaves_repeats_nothing_that_was_under_way() -> None:
    """What is under way ends before another may own it; what was begun and waits is carried on by a tier."""
    slow = a_destination("slow", url="http://127.0.0.1:1/slow", concurrency=3)
    world = await a_world(a_route(), a_route("slowly", to=("slow",)), destinations=[slow], ci=[0.8], slow=[1.0])
    await world.put(*events(100))
    async with running(world):
        await asyncio.sleep(1.3)  # by now what is under way is of several partitions
        async with running(world):
            await world.put(*[replace(event, id=EventId(f"{event.id}b")) for event in events(100)])
            await asyncio.sleep(1.5)
        await asyncio.sleep(600)
    made = Counter((name, event) for name, event, _ in world.client.made)
    assert len(made) == 400
    assert set(made.values()) == {1}
    assert await world.unfinished() == 0
    assert world.dead() == []


@virtual
async def test_a_commit_that_comes_too_late_for_a_rebalance_is_not_taken_for_stored() -> None:
    """It waits until what was seen is stored, and its partitions are given up meanwhile."""
    slow = a_destination("slow", url="http://127.0.0.1:1/slow")
    at_once, slowly = a_route(match={"type": "push"}), a_route("slowly", to=("slow",), match={"type": "slow"})
    world = await a_world(at_once, slowly, destinations=[slow], slow=[3.0])
    world.log = log = TestLog()
    await log.create(TOPICS.specs([EVENTS]))
    world.rules = replace(
        world.rules, sources={name: replace(each, dedupe=3600.0) for name, each in world.rules.sources.items()}
    )
    async with running(world):
        await asyncio.sleep(0.5)
        log.gate.clear()
        given = [event_id("github", f"given {number}") for number in range(51)]
        await world.put(*[an_event(id=each, received_at=now()) for each in given[1:]])
        await world.put(an_event(id=given[0], type="slow", received_at=now()))
        asyncio.get_running_loop().call_later(1.5, log.gate.set)
        await asyncio.sleep(1)
        async with running(world):
            await asyncio.sleep(30)
    made = Counter(event for _, event, _ in world.client.made)
    assert len(made) == 51
    assert set(made.values()) == {1}


@virtual
async def test_a_destination_that_hangs_does_not_hold_a_rebalance_up_for_long() -> None:
    patient = a_destination("stuck", url="http://127.0.0.1:1/stuck", timeout=300.0)
    world = await a_world(a_route(to=("stuck",)), destinations=[patient], stuck=[1e9])
    await world.put(*events(8))
    async with running(world):
        await asyncio.sleep(1)
        began = now()
        await world.log.rebalance(TOPICS.group(ROUTER_GROUP))
        assert now() - began < REVOKE_GRACE + 0.1
        assert world.client.under_way == 8, "they go on, and are adopted"
    assert len(world.client.made) == 8


@virtual
async def test_deliveries_ended_between_rebalances_are_known_to_the_owner() -> None:
    """A delivery that waited comes straight back, and is over before its record has been read again."""
    world = await a_world(a_route(), ci=[0.3])
    await world.put(*events(40))
    async with running(world):
        await asyncio.sleep(0.1)
        await world.log.rebalance(TOPICS.group(ROUTER_GROUP))
        # Nothing is fetched for a while: the reader is busy elsewhere, or the broker slow.
        consumers = world.log._state.members[TOPICS.group(ROUTER_GROUP)]
        for consumer in consumers:
            for partition in consumer._positions:
                consumer.pause(partition)
        await asyncio.sleep(1.5)
        async with running(world):
            await asyncio.sleep(30)
    made = Counter(event for _, event, _ in world.client.made)
    assert len(made) == 40
    assert set(made.values()) == {1}


@virtual
async def test_deliveries_that_another_owner_made_are_not_adopted() -> None:
    """A worker that subscribes anew leaves and joins; another serves its partitions for those seconds.

    What hangs holds the base back, so the other's commit tells of what is done by its bits.
    """
    stuck = a_destination("stuck", url="http://127.0.0.1:1/stuck", timeout=300.0)
    slow = a_destination("slow", url="http://127.0.0.1:1/slow", concurrency=1)
    world = await a_world(
        a_route("stuck", match={"body.is_stuck": True}, to=("stuck",)),
        a_route("slow", match={"body.is_stuck": False}, to=("slow",)),
        destinations=[stuck, slow],
        stuck=[1e9],
        slow=[0.9],
    )

    def made(name: str, *, is_stuck: bool) -> list[Event]:
        body = {"is_stuck": is_stuck}
        return [an_event(id=f"{name}{n}", key=f"k{n}", body=body, received_at=now()) for n in range(20)]

    async with running(world), running(world) as worker:
        await asyncio.sleep(3)
        await world.put(*made("stuck", is_stuck=True))
        await asyncio.sleep(3)
        await world.put(*made("slow", is_stuck=False))
        await asyncio.sleep(0.05)
        world.client.scripts["slow"] = [0.01]
        world.log.delay_joins(3.0)
        await world.log.create(TOPICS.specs([TOPICS.events("gitlab")]))
        source = Source(name="gitlab", path="/in/gitlab", verifier=build_verifier({"scheme": "none"}))
        world.rules = replace(world.rules, sources={**world.rules.sources, "gitlab": source})
        worker.reload()
        await asyncio.sleep(40)
    counts = Counter(event for name, event, _ in world.client.made if name == "slow")
    assert len(counts) == 20
    assert set(counts.values()) == {1}


async def _with_a_duplicate(world: World, *, after: float) -> Partition:
    """Store a record of a tier, and the same again after some seconds, as a crash does; return their partition."""
    tier, delivery = TOPICS.retry("5s"), a_delivery(successor=1, due=now() + 5)

    async def store() -> Partition:
        headers = encode_delivery(delivery, NO_METADATA, at=now())
        position = await world.log.append(tier, key=b"ci", value=delivery.event.body, headers=headers)
        return Partition(tier, position.partition)

    await store()
    await asyncio.sleep(after)
    return await store()


@virtual
async def test_a_duplicate_of_a_retry_is_known_though_its_partition_left_and_returned() -> None:
    world = await a_world(a_route())
    async with running(world):
        await _with_a_duplicate(world, after=3.0)
        await asyncio.sleep(3)
        assert len(world.client.made) == 1
        await world.log.rebalance(TOPICS.group(ROUTER_GROUP))
        await asyncio.sleep(30)
        assert await world.unfinished(TOPICS.retry("5s")) == 0
    assert len(world.client.made) == 1


@virtual
async def test_a_retry_is_no_duplicate_of_a_deleted_one() -> None:
    """What is in flight of the first ends without effect, so the second is all there is."""
    world = await a_world(a_route(), ci=[9.0, 0.0])
    async with running(world):
        partition = await _with_a_duplicate(world, after=4.0)
        await asyncio.sleep(2)
        assert len(world.client.made) == 1
        world.log.lose_leader(partition)
        await world.log.rebalance(TOPICS.group(ROUTER_GROUP))
        world.log.delete_below(partition, 1)
        world.log.find_leader(partition)
        await asyncio.sleep(30)
        assert await world.unfinished(TOPICS.retry("5s")) == 0
    assert len(world.client.made) == 2
