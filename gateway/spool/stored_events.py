"""Finds out which records a partition of the log has: an append without an answer may have stored them."""

from collections.abc import Collection, Sequence
from collections.abc import Set as AbstractSet

from gateway.log.base import LEADER_CLOCK_SKEW, Log, Partition
from gateway.model import LogUnavailableError
from gateway.spool.records import SpooledRecord, digest_of


class PartitionUnreadableError(LogUnavailableError):
    """A partition can't be read now, or not all of it; others may be."""


async def find_stored(
    log: Log, partition: Partition, digests: AbstractSet[bytes], *, since: float, from_offset: int = -1
) -> tuple[Collection[bytes], int]:
    """Return which records are in a partition, by their digests, and its end.

    It is searched from the offset `from_offset` on or, if that is negative, from the time `since` (by the log's clock,
    in seconds). Raises PartitionUnreadableError, also while some of its records can't be read yet, or another
    LogUnavailableError.
    """
    bounds, problems = await log.settled(partition.topic, [partition.number])
    if partition.number not in bounds:
        raise PartitionUnreadableError(f"{partition.topic}: {problems.get(partition.number, 'not readable now')}")
    first, end = bounds[partition.number]
    start = from_offset
    if start < 0 or start > end:  # it has become shorter, so its offsets may be of other records
        offsets = await log.offsets_at(partition.topic, max(0.0, since - LEADER_CLOCK_SKEW), [partition.number])
        start = offsets.get(partition.number, first)
    stored: set[bytes] = set()
    async for records in log.scan(partition, max(first, start), end):
        found = [digest_of(record.key, record.value, record.headers) for record in records]
        stored.update([each for each in found if each in digests])
    return stored, end


def split_stored(
    records: Sequence[SpooledRecord], stored: Collection[bytes]
) -> tuple[Sequence[SpooledRecord], Sequence[SpooledRecord]]:
    """Return which records are in the log, by the digests that were found there, and which aren't."""
    there, missing = list[SpooledRecord](), list[SpooledRecord]()
    for record in records:
        (there if record.digest in stored else missing).append(record)
    return there, missing
