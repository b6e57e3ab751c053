"""How far partitions go, with what was appended without an acknowledgement: it may become readable later."""

import asyncio
from collections.abc import Collection, Mapping

from gateway.log.base import Partition
from gateway.log.kafka.cluster import LATEST, Cluster
from gateway.model import LogUnavailableError

ANY_REPLICA = (1 << 31) - 1
"""The id of no broker: to one who asks as a replica, the leader says how far its own log goes; nobody else answers."""
TIMEOUT = 2.0
INTERVAL = 0.1


async def settled_ends(
    cluster: Cluster, partitions: Collection[Partition]
) -> tuple[Mapping[Partition, int], Mapping[Partition, str]]:
    """Return the end of each partition, once all that its leader has by now can be read; and which have no leader.

    Raises LogUnavailableError if that takes longer than 2 s.

    A consumer hears how far all replicas in sync have it, or OFFSET_NOT_AVAILABLE just after an election; a replica how
    far the leader has it (Kafka's `ReplicaManager.fetchOffset` and `Partition.fetchOffsetForTimestamp`, KIP-207).
    """
    loop = asyncio.get_running_loop()
    until = loop.time() + TIMEOUT
    stored, problems = await cluster.offsets_with_leader(partitions, LATEST, replica=ANY_REPLICA)
    found: dict[Partition, int] = {}
    while True:
        ends, silent = await cluster.offsets_with_leader([each for each in stored if each not in found], LATEST)
        found |= {partition: end for partition, end in ends.items() if end >= stored[partition]}
        if len(found) == len(stored) or loop.time() >= until:
            break
        await asyncio.sleep(INTERVAL)
    for partition, end in ends.items():
        if partition not in found:
            expected = f"expected its replicas in sync to have all up to {stored[partition]}, got all up to {end}"
            raise LogUnavailableError(f"{partition.topic}/{partition.number}: {expected}")
    return found, {**problems, **silent}
