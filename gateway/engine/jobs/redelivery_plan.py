"""Which deliveries a redelivery is of, by the active rules. Pure."""

from collections.abc import Sequence
from typing import NamedTuple

from gateway.engine.control.redelivery_records import Redelivery
from gateway.engine.jobs.log_reader import CHECKPOINT_EVERY
from gateway.model import DeadLettered, Event
from gateway.rules.event_view import EventView
from gateway.rules.rules import Rules

MOST = CHECKPOINT_EVERY
"""Deliveries of a redelivery, at most: all are injected before its checkpoint, so as many are repeated after a kill."""
NAMED = 10
"""Routes that are named where another one was expected."""


class PlannedDelivery(NamedTuple):
    """A delivery that is to be injected; with an `end`, it is a dead letter at once, as for a new event."""

    route: str
    destination: str
    end: DeadLettered | None
    delayed_until: float
    """Until when the route delays it (Unix seconds), or 0."""


def plan(rules: Rules, event: Event, which: Redelivery) -> Sequence[PlannedDelivery] | str:
    """Return the deliveries, those of an event that is received now; or why there are none.

    They aren't told apart by whether the event was delivered before.
    """
    problem = _unknown_name(rules, which)
    if problem:
        return problem
    view = EventView.of(event)
    matched = rules.table.match(view)
    planned = [
        PlannedDelivery(route.name, name, end, event.received_at + route.delay if route.delay else 0.0)
        for route, error in matched
        if which.route in (None, route.name)
        for name, end in route.targets(view, error)
        if which.destination in (None, name)
    ]
    if not planned:
        by = "a route" if which.route is None else f"route {which.route}"
        does = f"take {event.id}" if which.destination is None else f"send {event.id} to {which.destination}"
        names = ", ".join([route.name for route, _ in matched[:NAMED]]) or "none"
        return f"expected {by} to {does}, got {names}{', …' if len(matched) > NAMED else ''}, by the active rules"
    if len(planned) > MOST:
        return f"expected at most {MOST} deliveries, got {len(planned):,}: a route, or a destination, makes it fewer"
    return planned


def _unknown_name(rules: Rules, which: Redelivery) -> str:
    if which.route is not None and which.route not in rules.routes:
        return f"expected a route of the active rules, got {which.route}"
    if which.destination is not None and which.destination not in rules.destinations:
        return f"expected a destination of the active rules, got {which.destination}"
    return ""
