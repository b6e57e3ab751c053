"""Read a range of the log record by record; and after how many records jobs publish checkpoints or yield."""

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from zlib import crc32

from gateway.log.base import Log, Partition, Record

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
                found[partition_name] = crc32(repr((record.key, record.value, record.headers)).encode())
    return found


async def last_append_time(log: Log, ends: Mapping[str, int]) -> float | None:
    """Return when the last record below these ends ("topic/partition" → offset) was appended, by the log's clock.

    None if there is none. Raises LogUnavailableError.
    """
    times = []
    for partition_name, end in ends.items():
        topic, _, number = partition_name.rpartition("/")
        times.append(await _last_append_time(log, Partition(topic, int(number)), end))
    return max([time for time in times if time is not None], default=None)


async def _last_append_time(log: Log, partition: Partition, end: int) -> float | None:
    piece = 1
    while end > 0:  # there may be a gap before the end
        found: float | None = None
        async with aclosing(records_of(log, partition, max(0, end - piece), end)) as records:
            async for record in records:
                found = record.appended_at
        if found is not None:
            return found
        end, piece = end - piece, 8 * piece
    return None
