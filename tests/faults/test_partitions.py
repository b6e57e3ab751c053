"""Topics of a cluster that lose a leader, are deleted, grow, or have partitions that they must not have."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from uuid import uuid4

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from dev.kafka import Cluster
from gateway.log.base import Assignment, Commit, Consumer, Partition, partition_of
from gateway.log.kafka.log import KafkaLog

PATIENCE = 30.0

pytestmark = [pytest.mark.full, pytest.mark.timeout(240)]


class Owner:
    """A listener that notes what it owns."""

    def __init__(self) -> None:
        self.owned: set[Partition] = set()

    def assigned(self, assignments: Sequence[Assignment]) -> None:
        self.owned.update(each.partition for each in assignments)

    def overtaken(self, partition: Partition, deleted: range) -> None:
        pass

    def replaced(self, assignment: Assignment) -> None:
        pass

    async def revoked(self, partitions: Sequence[Partition]) -> Mapping[Partition, Commit]:
        self.owned.difference_update(partitions)
        return {}


@asynccontextmanager
async def administering(cluster: Cluster) -> AsyncIterator[AIOKafkaAdminClient]:
    admin = AIOKafkaAdminClient(bootstrap_servers=cluster.address, request_timeout_ms=10_000)
    await admin.start()
    try:
        yield admin
    finally:
        await admin.close()


async def make_topic(cluster: Cluster, name: str, nodes: Sequence[int], *, retention: float = 7 * 86400) -> None:
    """Make a topic of a partition for each of these nodes, which alone has it."""
    settings = {
        "message.timestamp.type": "LogAppendTime",
        "min.insync.replicas": "1",
        "retention.ms": str(int(1000 * retention)),
    }
    places = {number: [node] for number, node in enumerate(nodes)}
    async with administering(cluster) as admin:
        await admin.create_topics([NewTopic(name, -1, -1, replica_assignments=places, topic_configs=settings)])
    await cluster.until_whole()


def key_of(partition: int, partitions: int) -> bytes:
    return next(key for key in (b"%d" % number for number in range(1000)) if partition_of(key, partitions) == partition)


async def read_until(consumers: Sequence[Consumer], holds: Callable[[], bool]) -> list[bytes]:
    values: list[bytes] = []
    until = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < until, values
        for consumer in consumers:
            for batch in await consumer.fetch(timeout=0.05):
                values += [record.value for record in batch.records]
    return values


async def test_a_partition_without_a_leader_is_told_and_the_others_are_read(cluster: Cluster) -> None:
    topic, group = f"t{uuid4().hex}", f"g{uuid4().hex}"
    await make_topic(cluster, topic, (1, 2, 3))
    lost = Partition(topic, 2)
    keys = [key_of(number, 3) for number in range(3)]
    log, other = await KafkaLog.open(cluster.address), await KafkaLog.open(cluster.address)
    try:
        first, second = Owner(), Owner()
        consumer = await log.consume(group=group, topics=[topic], listener=first)
        for key in keys:
            await log.append(topic, key=key, value=key, headers=[])
        seen: list[bytes] = []
        while len(seen) < 3:
            seen += await read_until([consumer], lambda: True) or [
                record.value for batch in await consumer.fetch(timeout=0.1) for record in batch.records
            ]
        assert consumer.unread() == {}
        await asyncio.to_thread(cluster.nodes[3].kill)
        await read_until([consumer], lambda: consumer.unread() == {lost: "no leader"})
        assert consumer.lag().keys() == {Partition(topic, 0), Partition(topic, 1)}

        # A member more: everything is shared out anew, and what can be read has an owner that reads it.
        another = await other.consume(group=group, topics=[topic], listener=second)
        both = (consumer, another)
        began = time.monotonic()
        await read_until(both, lambda: first.owned | second.owned == {Partition(topic, 0), Partition(topic, 1)})
        assert first.owned
        assert second.owned or another.unread()
        assert time.monotonic() - began < 10
        assert consumer.unread().keys() | another.unread().keys() == {lost}
        for key in keys[:2]:
            await log.append(topic, key=key, value=b"meanwhile", headers=[])
        got: list[bytes] = []
        while got.count(b"meanwhile") < 2:
            for each in both:
                got += [record.value for batch in await each.fetch(timeout=0.1) for record in batch.records]

        await asyncio.to_thread(cluster.heal)
        began = time.monotonic()
        got = await read_until(both, lambda: lost in first.owned | second.owned)
        await log.append(topic, key=keys[2], value=b"again", headers=[])
        while b"again" not in got:
            assert time.monotonic() - began < PATIENCE
            for each in both:
                got += [record.value for batch in await each.fetch(timeout=0.1) for record in batch.records]
        assert consumer.unread() == another.unread() == {}
        assert keys[2] in got  # what was in it before is read from its start, for nothing was committed
    finally:
        await log.close()
        await other.close()
