"""Deliveries, by the index: those of a status, for which destination, by which route, since when and why."""

import asyncio
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated

from gateway.access.principal import Principal
from gateway.api import shapes
from gateway.api.backend import Backend, must_be_available
from gateway.api.cursors import decode_cursor, encode_cursor, whole
from gateway.api.events import ITEMS_PER_STEP, currency_of, delivery_of, summary_of
from gateway.api.json_shapes import Limits, Time
from gateway.api.last_responses import last_responses, must_read_responses
from gateway.api.problems import ApiError, Code
from gateway.api.visibility import sees_delivery, sees_source
from gateway.index import results as indexed
from gateway.index.delivery_query import WAITING, DeliveryCursor, DeliveryQuery
from gateway.index.settlement import DeliverySummary
from gateway.index.statuses import OF_DELIVERIES, Status
from gateway.ops.output import rfc3339
from gateway.rules.rules import Rules

_STATUS = "|".join(OF_DELIVERIES)
STATUSES = Annotated[
    str,
    Limits(
        about=f"some of {', '.join(OF_DELIVERIES)}, divided by commas",
        pattern=f"^({_STATUS})(,({_STATUS}))*$",
        longest=200,
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedDelivery:
    """A delivery beside its event: since when it is so, and after how many attempts, of which it has the last.

    Who doesn't see the event's source sees neither its key nor its other deliveries: `status` is this one's, too.
    `since` is when it was paused or became a dead letter, or else when its event was received, or replayed.
    """

    event: shapes.EventSummary
    delivery: shapes.Delivery
    since: Time
    tried: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedPage:
    """Deliveries, those of the newest events first. A page may have fewer items than were asked for.

    `unrecorded_since`: of events that were stored from then on, some deliveries may wait without a record, and aren't
    here; null if there are none.
    """

    items: tuple[ListedDelivery, ...]
    next_cursor: str | None
    is_cut_short: bool
    unrecorded_since: Time | None
    index: shapes.Currency


async def search_deliveries(
    backend: Backend,
    principal: Principal,
    *,
    status: str | None = None,
    route: str | None = None,
    destination: str | None = None,
    source: str | None = None,
    include_responses: bool = False,
    limit: int = 50,
    cursor: str | None = None,
) -> ListedPage:
    """List deliveries of some statuses, or of all, those of the newest events first."""
    if include_responses:
        must_read_responses(principal)
    statuses = None if status is None else frozenset(map(Status, status.split(",")))
    query = DeliveryQuery(route=route, destination=destination, source=source, statuses=statuses)
    asked = None if statuses is None else tuple(sorted(statuses))
    listing = ("by status", asked, route, destination, source)
    return await _listed(backend, principal, query, limit, cursor, listing=listing, has_responses=include_responses)


async def list_waiting(
    backend: Backend,
    principal: Principal,
    *,
    route: str | None = None,
    destination: str | None = None,
    source: str | None = None,
    limit: int = 50,
    cursor: str | None = None,
) -> ListedPage:
    """List deliveries that are paused, wait for a retry, or for their first attempt to end."""
    query = DeliveryQuery(route=route, destination=destination, source=source, statuses=WAITING)
    return await _listed(backend, principal, query, limit, cursor, listing=("waiting", route, destination, source))


async def _listed(
    backend: Backend,
    principal: Principal,
    query: DeliveryQuery,
    limit: int,
    cursor: str | None,
    *,
    listing: tuple[object, ...],
    has_responses: bool = False,
) -> ListedPage:
    index, rules = backend.open_index(), backend.rules()
    currency = currency_of(index)
    if principal.is_limited:  # what they don't see isn't counted, nor a cursor's
        query = replace(query, sees=partial(sees_delivery, principal, rules))
    async with backend.turn(principal.identity), must_be_available():
        page = await index.list_deliveries(query, limit=limit, cursor=_after(cursor, listing))
    seen = page.deliveries
    responses = await last_responses(backend, principal, seen if has_responses else ())
    items: list[ListedDelivery] = []
    for number, each in enumerate(seen):
        if number % ITEMS_PER_STEP == 0:
            await asyncio.sleep(0)
        items.append(
            ListedDelivery(
                event=summary_of(_seen_of(each, principal, rules)),
                delivery=delivery_of(each.delivery, responses.get(each.cursor)),
                since=rfc3339(each.since),
                tried=each.tried,
            )
        )
    following = page.cursor
    return ListedPage(
        items=tuple(items),
        next_cursor=None if following is None else encode_cursor(following._asdict(), listing=listing),
        is_cut_short=page.is_cut_short,
        unrecorded_since=None if page.unrecorded_since is None else rfc3339(page.unrecorded_since),
        index=currency,
    )


def _seen_of(listed: indexed.ListedDelivery, principal: Principal, rules: Rules) -> indexed.IndexedEvent:
    """Return what a principal sees of the event of a delivery that they see: its source's own, who sees that, alone."""
    event, delivery = listed.event, listed.delivery
    if sees_source(principal, rules, event.source):
        return event
    its = DeliverySummary(delivery.route, delivery.destination, delivery.status)
    return replace(event, key=None, status=delivery.status, summaries={its: 1}, left_out=0)


def _after(cursor: str | None, listing: tuple[object, ...]) -> DeliveryCursor | None:
    if cursor is None:
        return None
    at = decode_cursor(cursor, listing=listing)
    delivery = at.get("delivery")
    if not isinstance(delivery, str):
        raise ApiError(Code.INVALID_CURSOR, "cursor: expected the next_cursor of the same list")
    return DeliveryCursor(whole(at, "event"), delivery, whole(at, "replayed"))
