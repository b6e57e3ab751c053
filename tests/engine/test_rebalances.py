"""A worker whose partitions are taken away and come back while it is busy with what it fetched."""

import asyncio
from collections.abc import Mapping, Sequence

from gateway.log.base import Assignment, Commit, Partition
from gateway.log.topics import ROUTER_GROUP
from tests.builders import a_route
from tests.engine.test_worker import EVENTS, TOPICS, World, a_world, events, running, virtual


class Visitor:
    """A member of the group that does nothing."""

    def assigned(self, assignments: Sequence[Assignment]) -> None:
        """Take nothing over."""

    def revoked(self, partitions: Sequence[Partition]) -> Mapping[Partition, Commit]:  # noqa: ARG002 - the listener's signature
        return {}


@virtual
async def test_what_was_fetched_before_a_rebalance_is_not_taken_after_it() -> None:
    """A tracker takes an offset that it isn't given for a gap: a batch out of its time would hide what is before it."""
    world = await a_world(a_route(), ci=[0.05])
    await world.put(*events(6000))
    async with running(world):
        for turns in range(100, 200, 10):
            await _visit(world, after=turns)
        await asyncio.sleep(60)
    assert len({event for _, event, _ in world.client.made}) == 6000
    assert await world.undone() == 0


async def _visit(world: World, *, after: int) -> None:
    """Join and leave at once, while the worker is in the middle of its batches."""
    for _ in range(after):
        await asyncio.sleep(0)
    topics = [EVENTS]
    consumer = await world.log.another().consume(group=TOPICS.group(ROUTER_GROUP), topics=topics, listener=Visitor())
    await consumer.close()
