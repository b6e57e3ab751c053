"""Reads the deliveries that wait in retry topics, or are parked, from the log: each once."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing

from gateway.engine.control.state import Control
from gateway.log.base import Commit, Log, Partition, Record
from gateway.log.records import StoredDelivery, decode_delivery
from gateway.log.topics import ROUTER_GROUP, TIERS, Topics
from gateway.model import UnreadableRecordError
from gateway.ops.log_search import bounds_of

MAX_DEDUPED = 500_000
"""Waiting deliveries remembered to avoid counting one twice: about 40 MB."""
RECORDS_PER_STEP = 32
"""Records decoded before other tasks of the process run: about a millisecond."""


async def waiting_deliveries(
    log: Log, topics: Topics, control: Control, unread: dict[Partition, str]
) -> AsyncIterator[StoredDelivery]:
    """Yield each delivery that waits in a retry topic or is parked; `unread` gets the unreadable partitions, and why.

    Each is yielded once, even if it moves to another topic meanwhile; beyond `MAX_DEDUPED`, at most twice.
    Raises LogUnavailableError.
    """
    names = [*[topics.retry(tier) for tier in TIERS], topics.parked]
    # All commits before all ends: a delivery that moves in between is found in its former topic, or in both.
    commits = {topic: await _commits(log, topics, topic) for topic in names}
    bounds = {topic: await bounds_of(log, topic, unread) for topic in names}
    seen: set[int] = set()
    for topic in names:
        async for partition, record, stored in _deliveries_in_topic(log, bounds[topic], commits[topic], topic):
            delivery = stored.delivery
            is_over = (
                _was_resumed(control, stored, partition, record)
                if topic == topics.parked
                else control.was_injected_by_kick(*delivery.kick_target, partition, record.offset, record.appended_at)
            )
            key = hash(delivery.unique_key)
            if not is_over and key not in seen:
                if len(seen) < MAX_DEDUPED:
                    seen.add(key)
                yield stored


async def _parked(
    log: Log, topics: Topics, control: Control, unread: dict[Partition, str]
) -> AsyncIterator[StoredDelivery]:
    commits, topic = await _commits(log, topics, topics.parked), topics.parked
    async for partition, record, stored in _deliveries_in_topic(
        log, await bounds_of(log, topic, unread), commits, topic
    ):
        if not _was_resumed(control, stored, partition, record):
            yield stored


def _was_resumed(control: Control, stored: StoredDelivery, partition: Partition, record: Record) -> bool:
    return control.has_scanned(f"pause/{stored.metadata.paused_name}", partition, record.offset, record.appended_at)


async def _commits(log: Log, topics: Topics, topic: str) -> Mapping[int, Commit]:
    return await log.committed(topics.group(ROUTER_GROUP), topic)


async def parked_counts(
    log: Log, topics: Topics, control: Control, name: str, unread: dict[Partition, str]
) -> Mapping[str, int]:
    """Return the number parked of a "route/…" or "destination/…", by the paused name that parked them.

    Each is counted once, as in `waiting_deliveries`, and so is `unread`. Raises LogUnavailableError.
    """
    kind, _, called = name.partition("/")
    found = Counter[str]()
    seen: set[int] = set()
    paused = {
        command.name for command in control.commands.values() if command.kind == "pause" and command.state == "paused"
    }
    if paused:
        async for stored in _parked(log, topics, control, unread):
            by, delivery = stored.metadata.paused_name, stored.delivery
            key = hash(delivery.unique_key)
            is_of_name = called == (delivery.route if kind == "route" else delivery.destination)
            if by in paused and is_of_name and key not in seen:
                if len(seen) < MAX_DEDUPED:
                    seen.add(key)
                found[by] += 1
    return found


async def _deliveries_in_topic(
    log: Log, bounds: Mapping[int, tuple[int, int]], commits: Mapping[int, Commit], topic: str
) -> AsyncIterator[tuple[Partition, Record, StoredDelivery]]:
    """Yield each delivery of a topic that the router hasn't completed, with its record."""
    for number, (start, end) in bounds.items():
        partition = Partition(topic, number)
        commit = commits.get(number, Commit(start))
        async with aclosing(_unfinished_deliveries(log, partition, max(start, commit.base), end, commit)) as found:
            async for record, stored in found:
                yield partition, record, stored


async def _unfinished_deliveries(
    log: Log, partition: Partition, start: int, end: int, commit: Commit
) -> AsyncGenerator[tuple[Record, StoredDelivery], None]:
    async for records in log.scan(partition, start, end):
        for number, record in enumerate(records):
            if number % RECORDS_PER_STEP == 0:
                await asyncio.sleep(0)
            if commit.covers(record.offset):
                continue
            try:
                yield record, decode_delivery(record)
            except UnreadableRecordError:
                continue  # the gateway reports it
