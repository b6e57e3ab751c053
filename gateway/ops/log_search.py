"""Search the log, newest records first: read backwards in bounded pieces, outside of any group."""

import asyncio
import heapq
import re
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import AsyncExitStack, aclosing
from typing import NamedTuple

from gateway.engine.jobs.log_reader import records_backwards
from gateway.log.base import Log, Partition, Record
from gateway.log.records import decode_event, fingerprint
from gateway.model import Event, UnreadableRecordError, identity_of

_POSITION = re.compile(r"(?P<topic>.+)/(?P<number>\d+)@(?P<offset>\d+)")
"""Approximate bytes read ahead per partition: the size of the last piece determines the length of the next."""


class Found(NamedTuple):
    """A record and where it is."""

    partition: Partition
    record: Record

    @property
    def position(self) -> str:
        return f"{self.partition.topic}/{self.partition.number}@{self.record.offset}"


async def bounds_of(log: Log, topic: str, unread: dict[Partition, str] | None) -> Mapping[int, tuple[int, int]]:
    """Return the bounds of a topic's partitions; with `unread`, unreadable ones are recorded there instead.

    Raises LogUnavailableError.
    """
    if unread is None:
        return await log.bounds(topic)
    bounds, others = await log.readable(topic)
    unread.update({Partition(topic, number): reason for number, reason in others.items()})
    return bounds


async def newest_first(
    log: Log,
    topics: Iterable[str],
    *,
    since: float | None = None,
    unread: dict[Partition, str] | None = None,
    below: Mapping[Partition, int] | None = None,
) -> AsyncGenerator[Found, None]:
    """Yield the records of these topics, newest first; with `since` (Unix seconds) only those appended from then on.

    Records appended after the start aren't yielded. A missing topic has no records. `unread` is as in `bounds_of`.
    With `below`, only records at smaller offsets are, and nothing of partitions that it doesn't have.
    """
    async with AsyncExitStack() as stack:
        readers = []
        for topic in topics:
            for number, (first, last) in sorted((await bounds_of(log, topic, unread)).items()):
                partition = Partition(topic, number)
                end = last if below is None else min(last, below.get(partition, 0))
                reader = _backwards(log, partition, first, end)
                readers.append(await stack.enter_async_context(aclosing(reader)))
        # Concurrently: the first read of a Kafka partition takes tens of milliseconds.
        firsts = await asyncio.gather(*[anext(reader, None) for reader in readers])
        heads = [(-found.record.appended_at, index, found) for index, found in enumerate(firsts) if found is not None]
        heapq.heapify(heads)
        while heads:
            _, index, found = heapq.heappop(heads)
            if since is not None and found.record.appended_at < since:
                continue  # The rest of this partition is older.
            yield found
            if (following := await anext(readers[index], None)) is not None:
                heapq.heappush(heads, (-following.record.appended_at, index, following))


def is_position(name: str, topics: Iterable[str]) -> bool:
    """Return whether a name is a position in one of these topics, in the form of `Found.position`."""
    position = _POSITION.fullmatch(name)
    return position is not None and position["topic"] in topics


async def find_event(log: Log, topics: Iterable[str], name: str) -> Found | None:
    """Return the event at a position (in the form of `Found.position`) or with an id: of several the newest.

    Raises UnreadableRecordError if the record at the position can't be read.
    """
    names = sorted(topics)
    if (position := _POSITION.fullmatch(name)) is not None and position["topic"] in names:
        partition, offset = Partition(position["topic"], int(position["number"])), int(position["offset"])
        async for records in log.scan(partition, offset, offset + 1):
            for record in records:
                decode_event(record)
                return Found(partition, record)
        return None
    async with aclosing(newest_first(log, names)) as history:
        async for found in history:
            if _id_of(found.record) == name:
                return found
    return None


def _id_of(record: Record) -> str:
    """Return an event's id; "" if it can't be read."""
    try:
        return decode_event(record).id
    except UnreadableRecordError:
        return ""


async def original_of(log: Log, found: Found, event: Event, window: float) -> Found | None:
    """Return the event that this one duplicates, if dedupe suppressed it with this window (seconds).

    This assumes that its source had this window when it was read, and that the events before it were known by then. A
    duplicate has the identity and content of an event at a smaller offset that was delivered at most a window earlier.
    """
    identity = identity_of(event.id)
    if identity is None:
        return None
    alike = [found]  # newest first, each at most a window after the next
    first = (await log.bounds(found.partition.topic))[found.partition.number][0]
    content = fingerprint(event)
    async with aclosing(_backwards(log, found.partition, first, found.record.offset)) as history:
        async for earlier in history:
            if earlier.record.appended_at < alike[-1].record.appended_at - window:
                break
            try:
                other = decode_event(earlier.record)
            except UnreadableRecordError:
                continue
            if other.id == event.id and fingerprint(other) == content:
                alike.append(earlier)
    delivered = alike.pop()  # nothing within a window before it
    for each in reversed(alike):
        if each.record.appended_at - delivered.record.appended_at <= window:
            if each is found:
                return delivered
        else:
            delivered = each
    return None


async def _backwards(log: Log, partition: Partition, first: int, end: int) -> AsyncGenerator[Found, None]:
    async with aclosing(records_backwards(log, partition, first, end)) as records:
        async for record in records:
            yield Found(partition, record)
