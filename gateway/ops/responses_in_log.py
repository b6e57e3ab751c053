"""What destinations have responded to the attempts that the index knows, read from their records in the log."""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import NamedTuple

from gateway.bodies.redaction import HIDDEN
from gateway.index.results import ListedDelivery
from gateway.log.attempt_records import decode_attempt_record
from gateway.log.base import Log, Partition
from gateway.log.records import decode_event
from gateway.model import Event, LogUnavailableError, ResponseExcerpt, UnreadableRecordError
from gateway.ops.redaction import Redactions

AT_A_TIME = 16
"""Records that are read at a time."""


class Response(NamedTuple):
    """The beginning of a response's body, as it was recorded: without what is known to be a credential."""

    body: bytes


async def responses_of(log: Log, found: Sequence[ListedDelivery], hidden: Redactions) -> Mapping[object, Response]:
    """Return the responses to the last attempts of deliveries, by the cursor of each; without those that aren't there.

    What sources hide of the events isn't in them; if the log no longer has the event of one that hides something,
    nobody knows what that is, and all of the response is hidden. Raises LogUnavailableError if none can be read.
    """
    turns = asyncio.Semaphore(AT_A_TIME)
    problems: list[LogUnavailableError] = []

    async def read(each: ListedDelivery) -> tuple[object, Response | None]:
        attempt = each.delivery.attempts[0]
        assert attempt.partition is not None
        async with turns:
            try:
                response = await _response(log, attempt.partition, attempt.offset, each)
                return each.cursor, await _seen(log, response, each, hidden)
            except LogUnavailableError as error:
                problems.append(error)
                return each.cursor, None

    wanted = [each for each in found if each.delivery.attempts and each.delivery.attempts[0].partition is not None]
    read_of = await asyncio.gather(*[read(each) for each in wanted])
    if problems and len(problems) == len(wanted):
        raise problems[0]
    return {cursor: response for cursor, response in read_of if response is not None}


async def _seen(log: Log, response: ResponseExcerpt | None, of: ListedDelivery, hidden: Redactions) -> Response | None:
    if response is None or hidden.of(of.event.source) is None or not response.body:
        return None if response is None else Response(response.body)
    event = await _event(log, of)
    return Response(HIDDEN.encode() if event is None else hidden.echoes(event).excerpt(response).body)


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
