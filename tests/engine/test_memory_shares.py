"""A member's memory is shared so that the parts of all partitions fit into it, and none is without one."""

import pytest

from gateway.engine.memory_shares import MemoryShares

MIB = 1 << 20


@pytest.mark.parametrize(("partitions", "tiers"), [(1, 0), (6, 0), (11, 8), (38, 32), (192, 32), (992, 32)])
@pytest.mark.parametrize("limit", [4 * MIB, 256 * MIB])
def test_all_parts_together_fit_into_the_memory(limit: int, partitions: int, tiers: int) -> None:
    shares = MemoryShares(limit)
    pending = shares.common + partitions * shares.own(partitions)
    # A tier is fetched once more while what it has of due records is less than that.
    fetched = partitions * shares.fetch(partitions, tiers) + tiers * shares.due(tiers)
    assert pending == shares.pending
    assert pending + fetched <= limit


def test_a_partition_of_few_is_fetched_by_more_than_a_broker_sends_at_a_time() -> None:
    assert MemoryShares(256 * MIB).fetch(50, 32) > 128 << 10


def test_a_member_without_partitions_yet_has_shares() -> None:
    shares = MemoryShares(4 * MIB)
    assert shares.own(0) == shares.own(1)
    assert shares.fetch(0, 0) == shares.fetch(1, 0) == shares.fetch(1, 1) * 2
