"""Events, what has become of them, and what was tried: from the index, with their content from the log."""

import asyncio
import re
from base64 import b64encode
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from gateway.access.principal import Principal
from gateway.api import shapes
from gateway.api.backend import Backend, must_be_available
from gateway.api.cursors import decode_cursor, encode_cursor, whole
from gateway.api.last_responses import last_responses, must_read_responses
from gateway.api.problems import ApiError, Code, not_found
from gateway.api.shares import whose_turn
from gateway.api.visibility import reads_bodies, sees_delivery, sees_source
from gateway.bodies.redaction import HIDDEN
from gateway.engine.event_topics import topics_with_events
from gateway.index.file import IndexBehindError
from gateway.index.index import Index
from gateway.index.query import Condition, Field, Query, QueryError, Value, parse_query
from gateway.index.results import FIRST_PLACE, DeliveryPlace, IndexedAttempt, IndexedDelivery, IndexedEvent
from gateway.log import attempt_records
from gateway.log.base import Partition
from gateway.log.json_fields import LATEST
from gateway.model import Event, Headers, ResponseExcerpt, UnreadableRecordError
from gateway.ops.output import header_text, rfc3339
from gateway.ops.redaction import Redactions
from gateway.ops.responses_in_log import with_last_attempts
from gateway.required_topics import event_topics

MOST_ATTEMPTS = 100
"""Attempts of a delivery that are shown: the last ones."""
ITEMS_PER_STEP = 25
"""Results that are written before other tasks run."""
DELIVERIES_PER_STEP = 500
"""Deliveries of events that are written before other tasks run: a millisecond."""
MOST_NAMESAKES = 100
"""Events of one request with one id whose hidden values are looked for in what was responded to one of them."""
_OF_BODIES = (Field.BODY, Field.TEXT)


async def search_events(
    backend: Backend, principal: Principal, *, query: str = "", limit: int = 50, cursor: str | None = None
) -> shapes.EventPage:
    """Search the index: the newest events that match a query, page by page."""
    index = backend.open_index()
    asked = query_of(backend, principal, query)
    before = None if cursor is None else whole(decode_cursor(cursor, listing=("events", query)), "n")
    currency = currency_of(index)  # before it is asked, so that it promises nothing that the answer lacks
    async with backend.turn(principal.identity), must_be_available():
        page = await index.search(asked, limit=limit, cursor=before)
    items, written = list[shapes.EventSummary](), 0
    for event in page.events:
        if written >= DELIVERIES_PER_STEP:
            await asyncio.sleep(0)
            written = 0
        items.append(summary_of(event))
        written += len(event.summaries)
    return shapes.EventPage(
        items=tuple(items),
        next_cursor=None if page.cursor is None else encode_cursor({"n": page.cursor}, listing=("events", query)),
        searched_to=_time(page.searched_to),
        is_cut_short=page.is_cut_short,
        index=currency,
    )


def query_of(backend: Backend, principal: Principal, text: str) -> Query:
    """Return a query of what a principal sees. Raises ApiError for one that isn't right, or isn't theirs to ask."""
    try:
        asked = parse_query(text, now=backend.log.now())
    except QueryError as error:
        raise ApiError(Code.INVALID_QUERY, str(error)) from error
    if not reads_bodies(principal) and any(each.field in _OF_BODIES for each in asked.conditions):
        raise ApiError(Code.FORBIDDEN, "query: expected the role reader to search by what bodies have, got viewer")
    if not principal.is_limited:
        return asked
    rules = backend.rules()
    seen = {name for name in rules.sources if sees_source(principal, rules, name)}
    if principal.owners is None:
        seen |= principal.sources or set()  # former sources, too
    # A source's name has a letter or digit: none is called "-".
    values = tuple([Value(name) for name in sorted(seen)]) or (Value("-"),)
    return replace(asked, conditions=(*asked.conditions, Condition(field=Field.SOURCE, values=values)))


async def get_event(backend: Backend, principal: Principal, *, event: str) -> shapes.EventDetail:
    """Return the newest event with an id, or the one at a position."""
    index = backend.open_index()
    currency = currency_of(index)
    async with must_be_available():
        found = await find_event(backend, principal, event)
        content = await _seen(backend, principal, await index.content(found), Redactions.event)
    return shapes.EventDetail(
        event=summary_of(found),
        is_stored=content is not None,
        headers=None if content is None else _headers(content.headers, are_read=reads_bodies(principal)),
        query=content.query if content is not None and reads_bodies(principal) else None,
        index=currency,
    )


async def get_body(backend: Backend, principal: Principal, *, event: str) -> bytes:
    """Return an event's body, byte for byte."""
    return (await _content(backend, principal, event))[1].body


async def get_raw(backend: Backend, principal: Principal, *, event: str) -> shapes.RawEvent:
    """Return an event as it is stored: its headers and its body, byte for byte."""
    found, content = await _content(backend, principal, event)
    return raw_event(content, found.position, found.size)


def raw_event(content: Event, position: str, size: int) -> shapes.RawEvent:
    """Return an event byte for byte, where its record is, and the size of its body there."""
    return shapes.RawEvent(
        id=content.id,
        position=position,
        source=content.source,
        type=content.type,
        key=content.key,
        received_at=rfc3339(content.received_at),
        size=size,
        query=content.query,
        headers=tuple(
            [
                shapes.RawHeader(name_base64=b64encode(name).decode(), value_base64=b64encode(value).decode())
                for name, value in content.headers
            ]
        ),
        body_base64=b64encode(content.body).decode(),
    )


async def list_deliveries(
    backend: Backend,
    principal: Principal,
    *,
    event: str,
    include_responses: bool = False,
    limit: int = 50,
    cursor: str | None = None,
) -> shapes.DeliveryPage:
    """List an event's deliveries, each with its attempts, as far as they are recorded."""
    if include_responses:
        must_read_responses(principal)
    index = backend.open_index()
    currency = currency_of(index)
    async with backend.turn(principal.identity), must_be_available():
        found = await find_event(backend, principal, event)
        listing = ("deliveries", found.number)
        after = FIRST_PLACE if cursor is None else _place_in(decode_cursor(cursor, listing=listing))
        # One more than is told: who sees an event sees all of its deliveries.
        listed = await index.deliveries(found, after=after, limit=limit + 1, attempts=MOST_ATTEMPTS)
    is_more, listed = len(listed) > limit, listed[:limit]
    with_last = with_last_attempts(found, listed) if include_responses else []
    responses = await last_responses(backend, principal, with_last)
    items: list[shapes.Delivery] = []
    for number, each in enumerate(listed):
        if number % ITEMS_PER_STEP == 0:
            await asyncio.sleep(0)
        items.append(delivery_of(each, responses.get(with_last[number].cursor) if with_last else None))
    return shapes.DeliveryPage(
        items=tuple(items),
        next_cursor=encode_cursor({"after": list(listed[-1].place)}, listing=listing) if is_more else None,
        index=currency,
    )


async def get_attempt(backend: Backend, principal: Principal, *, position: str) -> shapes.AttemptRecord:
    """Return an attempt's own record, with the beginning of the response, at the position that its delivery tells."""
    place = _place(position)
    if place is None or place.partition.topic != backend.topics.attempts:
        raise not_found("an attempt")
    async with must_be_available():
        if not await _is_there(backend, place):
            raise not_found("an attempt")
        its = backend.log.scan(place.partition, place.offset, place.offset + 1)
        found = [record async for records in its for record in records]
    try:
        attempt = attempt_records.decode_attempt_record(found[0])
    except (UnreadableRecordError, IndexError):
        raise not_found("an attempt") from None
    if not sees_delivery(principal, backend.rules(), attempt.source, attempt.route, attempt.destination):
        raise not_found("an attempt")
    async with must_be_available():
        response, detail = await _seen_response(backend, principal, attempt)
    return shapes.AttemptRecord(
        event_id=attempt.event_id,
        delivery_id=attempt.delivery_id,
        source=attempt.source,
        route=attempt.route,
        destination=attempt.destination,
        number=attempt.number,
        at=rfc3339(attempt.at),
        seconds=attempt.seconds,
        result=attempt.result,
        status=attempt.status,
        decision=attempt.decision,
        detail=detail or None,
        retry_after_seconds=attempt.retry_after,
        method=attempt.method,
        host=attempt.host,
        rules=attempt.rules or None,
        response_headers=None if response is None else _headers(response.headers, are_read=True),
        response_body=None if response is None else header_text(response.body),
        is_response_cut=response is not None and (response.is_body_cut or response.are_headers_cut),
    )


async def get_index(backend: Backend, principal: Principal) -> shapes.IndexState:
    """Return how current the index is, and to who has no limits how much it has."""
    index = backend.open_index()
    async with must_be_available():
        found = None if principal.is_limited else await index.statistics()
    return shapes.IndexState(
        events=None if found is None else found.events,
        bytes=None if found is None else found.bytes,
        oldest_event=None if found is None or found.oldest is None else rfc3339(found.oldest),
        currency=currency_of(index),
    )


async def find_event(backend: Backend, principal: Principal, name: str) -> IndexedEvent:
    """Return the event with an id or at a position. Raises ApiError if there is none that the principal sees.

    May raise LogUnavailableError and IndexUnavailableError, of which IndexBehindError for an event that they will see.
    """
    index, place = backend.open_index(), _place(name)
    # A topic that nobody reads isn't asked for: that could create it.
    is_there = place is None or (await _is_read(backend, place.partition.topic) and await _is_there(backend, place))
    try:
        found = await index.event(name) if is_there else None
    except IndexBehindError as error:
        if sees_source(principal, backend.rules(), error.source):
            raise
        found = None
    if found is None or not sees_source(principal, backend.rules(), found.source):
        raise not_found("the id or the position of an event")
    return found


async def _seen(
    backend: Backend, principal: Principal, event: Event | None, seen: Callable[[Redactions, Event], Event]
) -> Event | None:
    """Return an event as people may see it (`seen`), without what its source's `redact` hides."""
    hidden = Redactions(backend.rules())
    if event is None or hidden.of(event.source) is None:
        return event
    return await backend.aside(whose_turn(principal), lambda: seen(hidden, event))


async def _seen_response(
    backend: Backend, principal: Principal, attempt: attempt_records.AttemptRecord
) -> tuple[ResponseExcerpt | None, str]:
    """Return the response of an attempt, and its detail, without what they repeat of hidden values.

    These are those of its own event, not of others with the same identity: of several that came in one request, all.
    If one of these isn't there any more, or there are more than `MOST_NAMESAKES`, all of the response is hidden.
    """
    hidden, response, detail = Redactions(backend.rules()), attempt.response, attempt.detail
    if hidden.of(attempt.source) is None:
        return response, detail
    index = backend.index()
    its, events = list[IndexedEvent](), list[Event]()
    if index is not None:
        its = await index.namesakes(attempt.event_id, attempt.received_at, limit=MOST_NAMESAKES + 1)
        contents = [await index.content(each) for each in its[:MOST_NAMESAKES]]
        events = [each for each in contents if each is not None]
    if not its or len(events) < len(its):
        none = None if response is None else ResponseExcerpt(body=HIDDEN.encode())
        return none, HIDDEN if detail else ""

    def seen() -> tuple[ResponseExcerpt | None, str]:
        echoes = hidden.echoes(*events)
        return None if response is None else echoes.excerpt(response), echoes.text(detail)

    return await backend.aside(whose_turn(principal), seen)


class _Place(NamedTuple):
    partition: Partition
    offset: int


def _place(position: str) -> _Place | None:
    """Return the place in the log that is written as TOPIC/PARTITION@OFFSET; None if it is something else."""
    found = _POSITION.fullmatch(position)
    return None if found is None else _Place(Partition(found[1], int(found[2])), int(found[3]))


_POSITION = re.compile(r"(.{1,249})/([0-9]{1,9})@([0-9]{1,18})", re.ASCII)


async def _is_read(backend: Backend, topic: str) -> bool:
    """Return whether the index reads a topic, or will: one that was created since it looked for topics."""
    if topic in backend.open_index().progress():
        return True
    named = event_topics(backend.rules(), backend.topics)
    return topic in await topics_with_events(backend.log, backend.topics, named)


async def _is_there(backend: Backend, place: _Place) -> bool:
    bounds, _ = await backend.log.readable(place.partition.topic)
    first, end = bounds.get(place.partition.number, (0, 0))
    return first <= place.offset < end


async def _content(backend: Backend, principal: Principal, name: str) -> tuple[IndexedEvent, Event]:
    async with must_be_available():
        found = await find_event(backend, principal, name)
        stored = await backend.open_index().content(found)
        content = await _seen(backend, principal, stored, Redactions.rewritten)
    if content is None:
        raise ApiError(Code.NOT_FOUND, f"expected the record of {found.id} in the log, got none: it was deleted by age")
    return found, content


def currency_of(index: Index) -> shapes.Currency:
    return shapes.Currency(
        complete_to=_time(index.complete_to),
        statuses_as_of=_time(index.settled_at),
        unread_records=sum([each.records for each in index.progress().values()]),
        problem=index.problem or None,
    )


def summary_of(event: IndexedEvent) -> shapes.EventSummary:
    named = [(each, count) for each, count in event.summaries.items() if each.route or each.destination]
    return shapes.EventSummary(
        id=event.id,
        source=event.source,
        type=event.type,
        key=event.key,
        size=event.size,
        received_at=rfc3339(event.received_at),
        stored_at=rfc3339(event.appended_at),
        position=event.position or None,
        status=event.status,
        deliveries=tuple(
            [
                shapes.DeliveryStatus(route=each.route, destination=each.destination, status=each.status, count=count)
                for each, count in sorted(named)
            ]
        ),
        deliveries_left_out=event.left_out,
    )


def delivery_of(delivery: IndexedDelivery, response: str | None = None) -> shapes.Delivery:
    return shapes.Delivery(
        id=delivery.id,
        route=delivery.route,
        destination=delivery.destination,
        item=delivery.item,
        status=delivery.status,
        replayed_at=_time(delivery.replayed_at),
        due=_time(delivery.due),
        reason=delivery.reason or None,
        detail=delivery.detail or None,
        attempts=tuple([_attempt(each) for each in delivery.attempts[-MOST_ATTEMPTS:]]),
        response=response,
    )


def _attempt(attempt: IndexedAttempt) -> shapes.Attempt:
    at = attempt.partition
    return shapes.Attempt(
        number=attempt.number,
        at=rfc3339(attempt.at),
        seconds=attempt.seconds,
        result=attempt.result,
        status=attempt.status,
        decision=attempt.decision or None,
        detail=attempt.detail or None,
        position=None if at is None else f"{at.topic}/{at.number}@{attempt.offset}",
    )


def _place_in(at: Mapping[str, Any]) -> DeliveryPlace:
    """Return the place that a cursor has. Raises ApiError for anything else: anybody can make a cursor."""
    match at.get("after"):
        case [str(route), str(destination), int(replayed), int(item), str(delivery)] if (
            -1 <= item < 1 << 62 and 0 <= replayed < 1 << 62
        ):
            return DeliveryPlace(route, destination, replayed, item, delivery)
        case _:
            raise ApiError(Code.INVALID_CURSOR, "cursor: expected the next_cursor of the same list")


def _headers(headers: Headers, *, are_read: bool) -> tuple[shapes.Header, ...]:
    return tuple(
        [
            shapes.Header(name=header_text(name), value=header_text(value) if are_read else None)
            for name, value in headers
        ]
    )


def _time(at: float) -> str | None:
    return rfc3339(min(at, LATEST - 1)) if at > 0 else None
