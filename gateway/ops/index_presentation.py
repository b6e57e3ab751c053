"""How commands show what the index knows: as JSON fields for scripts, as text for people."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from gateway.index.reading import Currency
from gateway.index.results import IndexedDelivery, IndexedEvent
from gateway.index.settlement import DeliverySummary
from gateway.ops.output import Output, rfc3339, when
from gateway.ops.presentation import Row, print_rows

STALE = 60.0
"""Seconds from which on statuses that are older than the events are told."""


def indexed_fields(event: IndexedEvent) -> dict[str, object]:
    """Return an event as JSON has it, with its deliveries."""
    return {
        "at": rfc3339(event.received_at),
        "stored_at": rfc3339(event.appended_at),
        "id": event.id,
        "source": event.source,
        "type": event.type,
        "key": event.key,
        "size": event.size,
        "position": event.position or None,
        "status": event.status,
        "deliveries": [
            {"route": each.route, "destination": each.destination, "status": each.status}
            for each, count in _named(event)
            for _ in range(count)
        ],
        "deliveries_left_out": event.left_out,
    }


def event_in_log_fields(event: IndexedEvent) -> dict[str, object]:
    """Return an event as JSON has it, as those in the log are listed."""
    at = event.partition
    return {
        "at": rfc3339(event.received_at),
        "id": event.id,
        "source": event.source,
        "type": event.type,
        "key": event.key,
        "size": event.size,
        "topic": None if at is None else at.topic,
        "partition": None if at is None else at.number,
        "offset": None if at is None else event.offset,
    }


def event_in_log_row(event: IndexedEvent) -> Row:
    """Return the row of a table, as those in the log are listed."""
    return {
        "received": when(event.received_at),
        "event": event.id,
        "source": event.source,
        "type": event.type,
        "key": event.key or "",
        "bytes": f"{event.size:,}",
    }


def print_indexed(output: Output, events: Sequence[IndexedEvent]) -> None:
    """Print events as a table of 80 columns, if nothing in it is long."""
    has_keys = any(event.key for event in events)
    print_rows(output, [_row(event, has_keys=has_keys) for event in events], unbroken=["event"])


def _row(event: IndexedEvent, *, has_keys: bool) -> Row:
    return {
        "event": f"{event.id}\n{when(event.appended_at)}",
        "source": event.source,
        "type": event.type,
        **({"key": event.key or ""} if has_keys else {}),
        "status": event.status,
        "deliveries": "\n".join(
            [
                f"{route} → {destination or 'no destination'}: {status}{f' ({count:,})' if count > 1 else ''}"
                for (route, destination, status), count in _named(event)
            ]
            + ([f"and {event.left_out:,} more"] if event.left_out else [])
        ),
    }


def _named(event: IndexedEvent) -> Sequence[tuple[DeliverySummary, int]]:
    """Return an event's deliveries, and how many of each, but for those of which nothing is known."""
    return sorted([(each, count) for each, count in event.summaries.items() if each.route or each.destination])


def currency_fields(where: Path | str, currency: Currency) -> dict[str, object]:
    """Return how current an index is, in a file or at a URL, as JSON has it."""
    return {
        "index": {
            "file": str(where),
            "complete_to": rfc3339(currency.complete_to) if currency.complete_to else None,
            "statuses_as_of": rfc3339(currency.settled_at) if currency.settled_at else None,
        }
    }


def print_currency(output: Output, currency: Currency) -> None:
    """Say, besides the result, how current it is."""
    if not currency.complete_to:
        output.note("the index is being made: it isn't known yet what it lacks", style="yellow")
        return
    output.note(f"the index is complete to {when(currency.complete_to)}")
    if currency.settled_at < currency.complete_to - STALE:
        known = f"those of {when(currency.settled_at)}" if currency.settled_at else "not known yet"
        output.note(f"statuses are {known}, at least", style="yellow")


def in_order(deliveries: Iterable[IndexedDelivery]) -> Sequence[IndexedDelivery]:
    """Return the deliveries of an event in the order in which they are shown, which is the API's."""
    return sorted(
        deliveries, key=lambda each: (each.route, each.destination, each.replayed_at, each.item or 0, each.id)
    )


def delivery_fields(delivery: IndexedDelivery) -> dict[str, object]:
    """Return a delivery as JSON has it, with its attempts."""
    return {
        "delivery_id": delivery.id,
        "route": delivery.route,
        "destination": delivery.destination,
        **({} if delivery.item is None else {"item": delivery.item}),
        "status": delivery.status,
        "replayed_at": rfc3339(delivery.replayed_at) if delivery.replayed_at else None,
        "due": rfc3339(delivery.due) if delivery.due else None,
        "reason": delivery.reason or None,
        "detail": delivery.detail or None,
        "attempts": [
            {
                "attempt": each.number,
                "at": rfc3339(each.at),
                "seconds": each.seconds,
                "result": each.result if each.status is None else str(each.status),
                "detail": each.detail or None,
            }
            for each in delivery.attempts
        ],
    }
