"""Ranges of the log that jobs read record by record, and how often others get their turn meanwhile."""

from collections.abc import AsyncGenerator

from gateway.log.base import Log, Partition, Record

BATCH = 500
"""Deliveries after which a marker is due: at most so many are repeated when a replay is killed. Those of one event stay
together, so it may be a few more."""


MARK_EVERY = 1.0
"""Seconds after which one is due in any case; also how far behind an operator's view of it is."""


PIECE_BYTES = 4 << 20


RECORDS_AT_ONCE = 32
"""Records matched before other tasks get their turn: about a millisecond."""


TURN = 0.003
"""Seconds of matching after which they get it in any case: a rule's condition may take tens of milliseconds."""


async def records_of(log: Log, partition: Partition, start: int, end: int) -> AsyncGenerator[Record, None]:
    """Yield the records of a range one by one; closing it closes the scan, whose reader would else be left behind."""
    batches = log.scan(partition, start, end)
    try:
        async for batch in batches:
            for record in batch:
                yield record
    finally:
        if isinstance(batches, AsyncGenerator):
            await batches.aclose()
