"""Which events were let through, and which were dropped as duplicates, as far as `gateway.dedupe` shows."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from gateway.engine.control.records import Selection, partition_key
from gateway.engine.unavailable_partitions import Readable
from gateway.log.base import Commit, Log, Partition
from gateway.log.records import DEDUPE_ENTRY, decode_dedupe_entries
from gateway.log.topics import ROUTER_GROUP, Topics
from gateway.model import NewerRecordError, UndecodableRecordError, UsageError

BEFORE = 3600.0
"""Seconds before a selection's time from which on dedupe entries are read. For events older than all of them nothing is
decided."""
ROWS_AT_ONCE = 1_000
"""Dedupe entries processed before other tasks run: a millisecond."""
BLOCK = 32_768
"""Offsets whose bits are allocated together, once one of them has a dedupe entry: 4 KiB."""
MAX_BLOCKS = 32_768
"""Maximum blocks of a replay: 128 MiB of bits, for a thousand million events."""


class LetThrough:
    """Which events of some partitions were let through, by `gateway.dedupe`: duplicates have no entry there."""

    def __init__(
        self,
        starts: Mapping[str, int],
        ends: Mapping[str, int],
        done: Mapping[str, Commit],
        unreadable: frozenset[str] = frozenset(),
    ) -> None:
        self.unreadable = unreadable
        """Partitions of `gateway.dedupe` that couldn't be read, or not all of them: any entry may be there, so nothing
        counts as dropped."""
        self._starts = starts
        self._ends = ends
        self._done = done
        self._lowest: dict[str, int] = {}
        # Not by the length of the range: a control record may say anything about that.
        self._blocks: dict[tuple[str, int], bytearray] = {}

    def add(self, partition_name: str, rows: bytes) -> None:
        """Add rows of a dedupe record. Raises UsageError for a range with too many events."""
        start, end = self._starts.get(partition_name, 0), self._ends[partition_name]
        for _, _, offset, _ in DEDUPE_ENTRY.iter_unpack(rows):
            self._lowest[partition_name] = min(offset, self._lowest.get(partition_name, offset))
            if start <= offset < end:
                number, index = divmod(offset, BLOCK)
                block = self._blocks.get((partition_name, number))
                if block is None:
                    block = self._blocks[partition_name, number] = bytearray(BLOCK // 8)
                    if len(self._blocks) > MAX_BLOCKS:
                        raise UsageError(
                            f"expected a time range with at most {MAX_BLOCKS * BLOCK:,} events of sources with dedupe, "
                            "got more; replay a part of it at a time (--from, --to)"
                        )
                block[index // 8] |= 1 << index % 8

    def was_dropped_as_duplicate(self, partition: Partition, offset: int) -> bool:
        """Return whether an event, whose source had `dedupe` when it was read, was certainly dropped as a duplicate."""
        partition_name = partition_key(partition)
        if (
            self.unreadable
            or not self._starts.get(partition_name, 0) <= offset < self._ends.get(partition_name, 0)
            or partition_name not in self._done
            or not self._done[partition_name].covers(offset)
        ):
            return False  # entries are stored before the commit that covers their events
        number, index = divmod(offset, BLOCK)
        block = self._blocks.get((partition_name, number))
        return self._lowest.get(partition_name, offset) < offset and not (
            block is not None and block[index // 8] >> index % 8 & 1
        )


async def read_let_through(
    log: Log,
    topics: Topics,
    selection: Selection,
    ends: Mapping[str, int],
    *,
    readable: Readable,
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    is_wanted: Callable[[], bool] = lambda: True,
) -> LetThrough:
    """Read the dedupe entries of the events of a selection, from the partitions that are `readable`.

    Stops reading once they aren't wanted. Raises LogUnavailableError, and UsageError for too many events.
    """
    done: dict[str, Commit] = {}
    for topic in {partition_name.rpartition("/")[0] for partition_name in ends}:
        commits = await log.committed(topics.group(ROUTER_GROUP), topic)
        done |= {f"{topic}/{number}": commit for number, commit in commits.items()}
    bounds, unreadable = await readable(topics.dedupe)
    let_through = LetThrough(
        selection.starts, ends, done, frozenset([f"{topics.dedupe}/{number}" for number in unreadable])
    )
    starts = await log.offsets_at(topics.dedupe, max(0.0, selection.since - BEFORE), bounds.keys())
    for number, (first, end) in bounds.items():
        partition = Partition(topics.dedupe, number)
        async for records in log.scan(partition, max(first, starts.get(number, first)), end):
            for record in records:
                partition_name = record.key.decode(errors="replace")
                if partition_name not in ends:
                    continue
                try:
                    rows = decode_dedupe_entries(record).rows
                except UndecodableRecordError:
                    continue
                except NewerRecordError:
                    let_through.unreadable |= {partition_key(partition)}
                    continue
                for begin in range(0, len(rows), ROWS_AT_ONCE * DEDUPE_ENTRY.size):
                    let_through.add(partition_name, rows[begin : begin + ROWS_AT_ONCE * DEDUPE_ENTRY.size])
                    await sleep(0)
                    if not is_wanted():
                        return let_through
    return let_through
