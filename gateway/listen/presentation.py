"""How events that are heard look: as rows of the live list, as lines, and as JSON."""

from collections.abc import Sequence

from gateway.listen.feed import Missed
from gateway.listen.listening import Shown
from gateway.ops.live_list import Listed
from gateway.ops.output import rfc3339, when

NAMED = 5
"""Destinations that a row names."""


def fields_of(shown: Shown) -> dict[str, object]:
    """Return an event as the API tells it, with what came of its copy, if there is one."""
    sent = shown.sent
    if sent is None:
        return dict(shown.event.fields)
    forward = {
        "is_success": sent.is_success,
        "status": sent.status,
        "seconds": round(sent.seconds, 6),
        "detail": sent.detail or None,
    }
    return {**shown.event.fields, "forward": forward}


def line_of(shown: Shown) -> str:
    event = shown.event
    return f"{when(event.at)}  {event.source}  {event.type}  {event.id}  {what_came_of(shown)}"


def row_of(shown: Shown, host: str | None) -> Listed:
    """Return an event as a row; `host` is where copies go to."""
    event = shown.event
    if shown.waits_for:
        status, detail = "pending", shown.waits_for
    elif shown.sent is None:
        status, detail = event.status, ""
    else:
        status, detail = "delivered" if shown.sent.is_success else "failed", what_came_of(shown)
    return Listed(
        id=event.name,
        at=event.at,
        source=event.source,
        type=event.type,
        destination=_named(event.destinations) if host is None else host,
        status=status,
        detail="  ".join(filter(None, [detail, event.id])),
    )


def what_came_of(shown: Shown) -> str:
    """Return the response to a copy and how long it took, or why there is none; of an event without one, its status."""
    sent = shown.sent
    if sent is None:
        return str(shown.event.status)
    if sent.status is None:
        return f"failed: {sent.detail}"
    return f"{sent.status} in {_duration(sent.seconds)}"


def missed_text(missed: Missed) -> str:
    """Say which events aren't told, and how they are found."""
    since, until = rfc3339(missed.since), rfc3339(missed.until)
    return (
        "events of more than an hour ago aren't told any more: "
        f"`gateway events search 'since:{since} until:{until}'` has them"
    )


def missed_row(missed: Missed) -> Listed:
    name = f"missed since {rfc3339(missed.since)}"
    return Listed(
        id=name, at=missed.since, source="", type="", destination="", status="missed", detail=missed_text(missed)
    )


def _named(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _duration(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
