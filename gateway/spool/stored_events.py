"""Which of some records a partition of the log has: what was appended without an answer may be there."""

from collections.abc import Collection, Sequence
from collections.abc import Set as AbstractSet

from gateway.log.base import LEADER_CLOCK_SKEW, Log, Partition
from gateway.model import LogUnavailableError
from gateway.spool.records import SpooledRecord, receipt_of


class NoLeaderError(LogUnavailableError):
    """A partition can't be read, while others can."""


async def find_stored(
    log: Log, partition: Partition, receipts: AbstractSet[bytes], *, since: float, from_offset: int = -1
) -> tuple[Collection[bytes], int]:
    """Return which records are in a partition, by their receipts, and its end.

    It is read from an offset or, if that is negative, from a time on (by the log's clock, in seconds). Raises
    NoLeaderError, also while it has what can't be read yet, or another LogUnavailableError.
    """
    bounds, problems = await log.settled(partition.topic, [partition.number])
    if partition.number not in bounds:
        raise NoLeaderError(f"{partition.topic}: {problems.get(partition.number, 'expected it to be readable')}")
    first, end = bounds[partition.number]
    start = from_offset
    if start < 0 or start > end:  # its end went back: what it has since then is anywhere
        offsets = await log.offsets_at(partition.topic, max(0.0, since - LEADER_CLOCK_SKEW), [partition.number])
        start = offsets.get(partition.number, first)
    stored: set[bytes] = set()
    async for records in log.scan(partition, max(first, start), end):
        found = [receipt_of(record.key, record.value, record.headers) for record in records]
        stored.update([each for each in found if each in receipts])
    return stored, end


def divided(
    records: Sequence[SpooledRecord], stored: Collection[bytes]
) -> tuple[Sequence[SpooledRecord], Sequence[SpooledRecord]]:
    """Return which records are in the log, given the receipts that are, and which aren't."""
    has, rest = list[SpooledRecord](), list[SpooledRecord]()
    for record in records:
        (has if record.receipt in stored else rest).append(record)
    return has, rest
