"""Which of some events a partition of the log has: what was appended without an answer may be there."""

from collections.abc import Collection
from collections.abc import Set as AbstractSet

from gateway.log.base import LEADER_CLOCK_SKEW, Log, Partition
from gateway.model import LogUnavailableError
from gateway.spool.records import receipt_of


class NoLeaderError(LogUnavailableError):
    """A partition can't be read, while others can."""


async def find_stored(
    log: Log, partition: Partition, receipts: AbstractSet[bytes], *, since: float, from_offset: int = -1
) -> tuple[Collection[bytes], int]:
    """Return which events are in a partition, and its end.

    It is read from an offset or, if that is negative, from a time on (by the log's clock, in seconds). Raises
    NoLeaderError, also while it has what can't be read yet, or another LogUnavailableError.
    """
    bounds, problems = await log.settled(partition.topic, [partition.number])
    if partition.number not in bounds:
        raise NoLeaderError(f"{partition.topic}: {problems.get(partition.number, 'expected it to be readable')}")
    first, end = bounds[partition.number]
    start = from_offset
    if start < 0 or start > end:  # its end went back: what it has since then is anywhere
        found = await log.offsets_at(partition.topic, max(0.0, since - LEADER_CLOCK_SKEW), [partition.number])
        start = found.get(partition.number, first)
    stored: set[bytes] = set()
    async for records in log.scan(partition, max(first, start), end):
        stored.update(
            [each for each in [receipt_of(record.headers) for record in records] if each and each in receipts]
        )
    return stored, end
