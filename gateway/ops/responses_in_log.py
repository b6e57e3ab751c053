"""What destinations have responded to the attempts that the index knows, read from their records in the log."""

import asyncio
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from gateway.bodies.redaction import HIDDEN
from gateway.index.reading import index_to_read
from gateway.index.results import IndexedDelivery, IndexedEvent, ListedDelivery
from gateway.log.attempt_records import decode_attempt_record
from gateway.log.base import Log, Partition
from gateway.log.records import decode_event
from gateway.model import Event, LogUnavailableError, ResponseExcerpt, UnreadableRecordError
from gateway.ops.redaction import Redactions
from gateway.turns import give_way

AT_A_TIME = 16
"""Records that are read at a time."""


class Response(NamedTuple):
    """The beginning of a response's body, as it was recorded: without what is known to be a credential."""

    body: bytes


class Recorded(NamedTuple):
    """A response as it was recorded, and the event that it may repeat, if its source hides something of it.

    `event` is None if the log no longer has it, if nobody knows which of several it is, or if nothing has to be hidden;
    `source` is the event's.
    """

    response: ResponseExcerpt
    source: str
    event: Event | None


async def responses_of(
    log: Log, path: Path, found: Sequence[ListedDelivery], hidden: Redactions
) -> Mapping[object, Response]:
    """Return the responses to the last attempts of deliveries, by the cursor of each; without those that aren't there.

    What sources hide of the events isn't in them; `path` is that of the index, which knows the events that share an id.
    Raises LogUnavailableError if none can be read, IndexUnavailableError, and UsageError if there is no index.
    """
    hiding = [each.event for each in found if hidden.of(each.event.source) is not None]
    shared = await asyncio.to_thread(_shared, path, hiding) if hiding else frozenset[int]()
    return masked(await recorded_responses(log, found, hidden, shared), hidden)


def _shared(path: Path, events: Sequence[IndexedEvent]) -> frozenset[int]:
    """Return the numbers of those events that came in one request with others of their id."""
    with index_to_read(path) as index:
        each_once = {event.number: event for event in events}.values()
        return frozenset([event.number for event in each_once if index.has_namesake(event)])


async def recorded_responses(
    log: Log, found: Sequence[ListedDelivery], hidden: Redactions, shared: Collection[int]
) -> Mapping[object, Recorded]:
    """Return the same as they were recorded, to be masked.

    `shared` are the numbers of events that came in one request with others of their id: nobody knows to which of them
    something was responded.
    """
    turns = asyncio.Semaphore(AT_A_TIME)
    problems: list[LogUnavailableError] = []

    async def read(each: ListedDelivery) -> tuple[object, Recorded | None]:
        attempt = each.delivery.attempts[0]
        assert attempt.partition is not None
        async with turns:
            try:
                response = await _response(log, attempt.partition, attempt.offset, each)
                if response is None:
                    return each.cursor, None
                is_looked_up = hidden.of(each.event.source) is not None and each.event.number not in shared
                event = await _event(log, each) if is_looked_up and response.body else None
                return each.cursor, Recorded(response, each.event.source, event)
            except LogUnavailableError as error:
                problems.append(error)
                return each.cursor, None

    wanted = [each for each in found if each.delivery.attempts and each.delivery.attempts[0].partition is not None]
    read_of = await asyncio.gather(*[read(each) for each in wanted])
    if problems and len(problems) == len(wanted):
        raise problems[0]
    return {cursor: response for cursor, response in read_of if response is not None}


def masked(recorded: Mapping[object, Recorded], hidden: Redactions) -> Mapping[object, Response]:
    """Return responses without what sources hide of the events. Takes some milliseconds for each that hides something.

    If the log no longer has the event, or nobody knows which it is, all of the response is hidden.
    """
    found: dict[object, Response] = {}
    for cursor, (response, source, event) in recorded.items():
        give_way()
        if hidden.of(source) is None or not response.body:
            found[cursor] = Response(response.body)
        elif event is None:
            found[cursor] = Response(HIDDEN.encode())
        else:
            found[cursor] = Response(hidden.echoes(event).excerpt(response).body)
    return found


def with_last_attempts(event: IndexedEvent, deliveries: Sequence[IndexedDelivery]) -> list[ListedDelivery]:
    """Return deliveries of an event as a list has them, each with the last of its attempts."""
    return [
        ListedDelivery(event=event, delivery=replace(each, attempts=each.attempts[-1:]), since=0.0, tried=0)
        for each in deliveries
    ]


async def _event(log: Log, of: ListedDelivery) -> Event | None:
    if of.event.partition is None:
        return None
    async for records in log.scan(of.event.partition, of.event.offset, of.event.offset + 1):
        for record in records:
            with suppress(UnreadableRecordError):
                event = decode_event(record)
                return event if event.id == of.event.id else None
    return None


async def _response(log: Log, partition: Partition, offset: int, of: ListedDelivery) -> ResponseExcerpt | None:
    async for records in log.scan(partition, offset, offset + 1):
        for record in records:
            try:
                attempt = decode_attempt_record(record)
            except UnreadableRecordError:
                return None
            if attempt.delivery_id != of.delivery.id or attempt.response is None:
                return None  # a recreated topic has another record there
            return attempt.response
    return None
