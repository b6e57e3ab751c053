"""Read a range of the log record by record; and after how many records jobs publish checkpoints or yield."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from zlib import crc32

from gateway.log.base import Log, Partition, Record

FIRST_PIECE = 50  # offsets
LARGEST_PIECE = 5_000
PIECE_BYTES = 1024 * 1024
CHECKPOINT_EVERY = 500
"""Deliveries after which a checkpoint is due: the most that are repeated after a kill. Those of one event stay
together, so it may be a few more."""


CHECKPOINT_INTERVAL = 1.0
"""Seconds after which a checkpoint is due in any case; also the maximum age of an operator's view of a job."""


BATCH_BYTES = 4 << 20
"""Bytes of bodies above which a batch is full."""


RECORDS_PER_STEP = 32
"""Records matched before other tasks run: about a millisecond."""


TURN = 0.003
"""Seconds of matching after which other tasks run anyway: a rule's condition may take tens of milliseconds."""


async def records_of(log: Log, partition: Partition, start: int, end: int) -> AsyncGenerator[Record, None]:
    """Yield the records of a range one by one. Closing it closes the scan, whose reader would otherwise leak."""
    batches = log.scan(partition, start, end)
    try:
        async for batch in batches:
            for record in batch:
                yield record
    finally:
        if isinstance(batches, AsyncGenerator):
            await batches.aclose()


async def records_in_turns(
    log: Log,
    topic: str,
    ranges: Mapping[int, tuple[int, int]],
    *,
    sleep: Callable[[float], Awaitable[object]],
    is_wanted: Callable[[], bool],
) -> AsyncGenerator[tuple[Partition, Record], None]:
    """Yield the records of a topic's partitions, each from a start to an end, as long as they are wanted.

    Other tasks run now and then.
    """
    count = 0
    for number, (start, end) in ranges.items():
        partition = Partition(topic, number)
        async with aclosing(records_of(log, partition, start, end)) as records:
            async for record in records:
                count += 1
                if count % RECORDS_PER_STEP == 0:
                    await sleep(0)
                    if not is_wanted():
                        return
                yield partition, record


async def records_backwards(
    log: Log, partition: Partition, first: int, end: int, *, piece: int = FIRST_PIECE
) -> AsyncGenerator[Record, None]:
    """Yield the records of a range, the last one first. `piece` offsets are read at first, then more and more."""
    while end > first:
        start = max(first, end - piece)
        records = [record async for batch in log.scan(partition, start, end) for record in batch]
        for record in reversed(records):
            yield record
        size = sum([len(record.value) for record in records])
        piece = max(1, min(LARGEST_PIECE, 4 * piece, piece * PIECE_BYTES // (size or 1)))
        end = start


async def last_records(log: Log, starts: Mapping[str, int], ends: Mapping[str, int]) -> dict[str, int]:
    """Return a checksum of the last record of each range ("topic/partition" → offset); without those that have none.

    If there is another record, or none, the topic has been recreated since: offsets and clocks don't show it. Raises
    LogUnavailableError.
    """
    found: dict[str, int] = {}
    for partition_name, end in ends.items():
        topic, _, number = partition_name.rpartition("/")
        start = max(end - 1, starts.get(partition_name, 0))
        async with aclosing(records_of(log, Partition(topic, int(number)), start, end)) as records:
            async for record in records:
                found[partition_name] = checksum_of(record)
    return found


def checksum_of(record: Record) -> int:
    """Return a checksum by which a record is told from another one at its offset."""
    return crc32(repr((record.key, record.value, record.headers)).encode())


async def last_append_time(log: Log, ends: Mapping[str, int]) -> float | None:
    """Return when the last record below these ends ("topic/partition" → offset) was appended, by the log's clock.

    None if there is none. Raises LogUnavailableError.
    """
    times = []
    for partition_name, end in ends.items():
        topic, _, number = partition_name.rpartition("/")
        reader = records_backwards(log, Partition(topic, int(number)), 0, end, piece=1)
        async with aclosing(reader) as records:  # there may be a gap before the end
            async for record in records:
                times.append(record.appended_at)
                break
    return max(times, default=None)
