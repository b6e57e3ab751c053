"""How commands show a list of deliveries: as JSON fields for scripts, as a table for people."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from gateway.index.reading import Currency
from gateway.index.results import IndexedAttempt, IndexedDelivery, IndexedEvent, ListedDelivery
from gateway.ops.index_presentation import delivery_fields
from gateway.ops.output import Output, body_text, rfc3339, when
from gateway.ops.presentation import Row, print_rows
from gateway.ops.responses_in_log import Response


class ListedDeliveries(NamedTuple):
    """Deliveries of a list, since when others may wait without a record (None: never), and how current the index is."""

    found: Sequence[ListedDelivery]
    unrecorded: float | None
    currency: Currency


SHOWN_OF_RESPONSE = 60
"""Characters of a response, or of why there was none, in a table."""


def listed_fields(listed: ListedDelivery, response: Response | None) -> dict[str, object]:
    """Return a delivery as JSON has it, with its event, its last recorded attempt and what was responded."""
    event = listed.event
    return {
        "event": {
            "id": event.id,
            "source": event.source,
            "type": event.type,
            "key": event.key,
            "received_at": rfc3339(event.received_at),
            "position": event.position or None,
        },
        **delivery_fields(listed.delivery),
        "since": rfc3339(listed.since),
        "tried": listed.tried,
        "response": None if response is None else body_text(response.body),
    }


def unrecorded_fields(since: float | None) -> dict[str, object]:
    """Return since when events were stored of which some deliveries may wait without a record, as JSON has it."""
    return {"unrecorded_since": None if since is None else rfc3339(since)}


def print_listed(output: Output, found: Sequence[ListedDelivery], responses: Mapping[object, Response]) -> None:
    """Print deliveries as a table."""
    print_rows(
        output,
        [_row(each, responses.get(each.cursor)) for each in found],
        unbroken=["event, delivery", "route → destination"],
    )


def print_unrecorded(output: Output, since: float) -> None:
    """Say, besides the list, what isn't in it because nothing is recorded of it."""
    output.note(
        f"events stored since {when(since)} aren't all done: what waits for its first attempt to end has no record "
        "yet, and isn't listed"
    )


def _row(listed: ListedDelivery, response: Response | None) -> Row:
    delivery = listed.delivery
    item = "" if delivery.item is None else f", item {delivery.item}"
    last = delivery.attempts[0] if delivery.attempts else None
    return {
        "event, delivery": f"{listed.event.id}\n{delivery.id}{item}",
        "route → destination": f"{delivery.route} → {delivery.destination or 'no destination'}",
        "status": f"{delivery.status}\n{delivery.reason}" if delivery.reason else delivery.status,
        "since": when(listed.since).replace(" ", "\n"),
        "next": _next(listed).replace(" ", "\n"),
        "tried": str(listed.tried) if listed.tried else "",
        "last result": "" if last is None else _result(last, response),
    }


def _next(listed: ListedDelivery) -> str:
    """Return when the next attempt is due, if there is one and that is known."""
    delivery = listed.delivery
    return when(delivery.due) if delivery.due and delivery.status == "retrying" else ""


def _result(last: IndexedAttempt, response: Response | None) -> str:
    result = last.result if last.status is None else str(last.status)
    more = last.detail if response is None or not response.body else " ".join(body_text(response.body).split())
    if not more:
        return result
    return f"{result}\n{more[:SHOWN_OF_RESPONSE]}{'…' if len(more) > SHOWN_OF_RESPONSE else ''}"


def journey_fields(delivery: IndexedDelivery, response: Response | None) -> dict[str, object]:
    """Return a delivery of an event as JSON has it, with what was responded to its last attempt."""
    return delivery_fields(delivery) | {"response": None if response is None else body_text(response.body)}


def print_deliveries(
    output: Output,
    event: IndexedEvent,
    deliveries: Sequence[IndexedDelivery],
    responses: Sequence[Response | None],
) -> None:
    """Print the deliveries of an event, each with its last recorded attempt, and what was responded to that."""
    output.print()
    if not deliveries:
        output.print(("deliveries ", "bold"), f"none is recorded; status {event.status}")
        return
    output.print(("deliveries ", "bold"), f"status {event.status}")
    rows: list[Row] = []
    for each, response in zip(deliveries, responses, strict=True):
        last = each.attempts[-1] if each.attempts else None
        result = "" if last is None else _result(last, response)
        item = "" if each.item is None else f", item {each.item}"
        again = f"\nbegun again {when(each.replayed_at)}" if each.replayed_at else ""
        rows.append(
            {
                "route → destination, delivery": (
                    f"{each.route} → {each.destination or 'no destination'}{item}\n{each.id}{again}"
                ),
                "status": each.status,
                "attempts": "" if last is None else str(last.number),
                "last result": result,
                "due": when(each.due).replace(" ", "\n") if each.due and each.status == "retrying" else "",
                "reason": each.reason,
            }
        )
    print_rows(output, rows, unbroken=["route → destination, delivery"])
