"""Deliveries that wait, by the index: for which destination, by which route, until when and why."""

import asyncio
from dataclasses import dataclass

from gateway.access.principal import Principal
from gateway.api import shapes
from gateway.api.backend import Backend, told
from gateway.api.cursors import decode_cursor, encode_cursor, whole
from gateway.api.events import ITEMS_PER_STEP, currency_of, delivery_of, summary_of
from gateway.api.json_shapes import Time
from gateway.api.problems import ApiError, Code
from gateway.api.sight import sees_delivery
from gateway.index.delivery_query import WAITING, DeliveryCursor, DeliveryQuery
from gateway.ops.output import rfc3339


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingDelivery:
    """A delivery that waits, beside its event: since when, and after how many attempts, of which it has the last.

    `since` is when it was paused, or else when its event was received, or replayed.
    """

    event: shapes.EventSummary
    delivery: shapes.Delivery
    since: Time
    tried: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WaitingPage:
    """Deliveries that wait, those of the newest events first. A page may have fewer items than were asked for.

    `unrecorded_since`: of events that were stored from then on, some deliveries may wait without a record, and aren't
    here; null if there are none.
    """

    items: tuple[WaitingDelivery, ...]
    next_cursor: str | None
    is_cut_short: bool
    unrecorded_since: Time | None
    index: shapes.Currency


async def list_waiting(
    backend: Backend,
    principal: Principal,
    *,
    route: str | None = None,
    destination: str | None = None,
    source: str | None = None,
    limit: int = 50,
    cursor: str | None = None,
) -> WaitingPage:
    """List deliveries that are paused, wait for a retry, or for their first attempt to end."""
    index, rules = backend.open_index(), backend.rules()
    of = ("waiting", route, destination, source)
    query = DeliveryQuery(route=route, destination=destination, source=source, statuses=WAITING)
    currency = currency_of(index)
    async with told(), backend.turn():
        page = await index.list_deliveries(query, limit=limit, cursor=_after(cursor, of))
    items: list[WaitingDelivery] = []
    for number, each in enumerate(page.deliveries):
        if number % ITEMS_PER_STEP == 0:
            await asyncio.sleep(0)
        if sees_delivery(principal, rules, each.event.source, each.delivery.route, each.delivery.destination):
            items.append(
                WaitingDelivery(
                    event=summary_of(each.event),
                    delivery=delivery_of(each.delivery),
                    since=rfc3339(each.since),
                    tried=each.tried,
                )
            )
    following = page.cursor
    return WaitingPage(
        items=tuple(items),
        next_cursor=None if following is None else encode_cursor(following._asdict(), of=of),
        is_cut_short=page.is_cut_short,
        unrecorded_since=None if page.unrecorded_since is None else rfc3339(page.unrecorded_since),
        index=currency,
    )


def _after(cursor: str | None, of: tuple[object, ...]) -> DeliveryCursor | None:
    if cursor is None:
        return None
    at = decode_cursor(cursor, of=of)
    delivery = at.get("delivery")
    if not isinstance(delivery, str):
        raise ApiError(Code.INVALID_CURSOR, "cursor: expected the next_cursor of the same list, got another text")
    return DeliveryCursor(whole(at, "event"), delivery, whole(at, "replayed"))
