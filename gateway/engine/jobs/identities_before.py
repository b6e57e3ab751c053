"""The identities of the events before one that is delivered again: they decide the ids of its deliveries."""

from collections.abc import Awaitable, Callable
from contextlib import aclosing

from gateway.engine.control.records import partition_key
from gateway.engine.jobs.log_reader import RECORDS_PER_STEP, records_of
from gateway.engine.jobs.shared_identities import Identities
from gateway.log.base import Log, Partition, Record
from gateway.log.records import decode_event
from gateway.model import LogUnavailableError, UnreadableRecordError
from gateway.rules.event_builder import EventBuilder
from gateway.rules.rules import Rules

LOOKBACK = 20_000
"""Records before an event that are searched for its identity: some 0.3 s, once per partition."""


async def identities_before(
    log: Log,
    partition: Partition,
    offset: int,
    rules: Callable[[], Rules],
    *,
    start: int,
    sleep: Callable[[float], Awaitable[object]],
) -> Identities:
    """Collect the identities of the records before an offset, whether they were injected or not.

    What is delivered again begins at `start`. Raises LogUnavailableError.
    """
    bounds, unreadable = await log.readable(partition.topic)
    if partition.number in unreadable:
        raise LogUnavailableError(f"{partition_key(partition)}: {unreadable[partition.number]}")
    first, _ = bounds.get(partition.number, (offset, offset))
    # A previous owner may have injected some of the deleted events, under IDs without an offset.
    is_cut = first > start
    identities, scanned = Identities(first + LOOKBACK if is_cut else 0), 0
    start = max(first, offset - LOOKBACK)
    async with aclosing(records_of(log, partition, start, offset)) as records:
        async for record in records:
            offset_in_id_of(identities, record, rules)
            scanned += 1
            if scanned % RECORDS_PER_STEP == 0:
                await sleep(0)
    return identities


def offset_in_id_of(identities: Identities, record: Record, rules: Callable[[], Rules]) -> int | None:
    """Return the offset for the IDs of an event's deliveries, by the active rules; None if they need none."""
    try:
        event = decode_event(record)
    except UnreadableRecordError:
        return None

    def window() -> float | None:
        source = rules().sources.get(event.source)
        # If the active rules derive another identity, it isn't a duplicate.
        return source.dedupe if source is not None and EventBuilder(source).reproduces_id_of(event) else None

    return identities.offset_in_id(event, record, window)
