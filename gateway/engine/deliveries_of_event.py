"""The deliveries that an event becomes: one for each route that takes it and each of the route's destinations."""

from collections.abc import Iterable
from typing import NamedTuple

from gateway.model import DeadLettered, Delivery, Event, delivery_id
from gateway.rules.event_view import EventView
from gateway.rules.rules import Route, Rules, Target


class Planned(NamedTuple):
    """A delivery; with an `end`, it is over without an attempt."""

    delivery: Delivery
    end: DeadLettered | None
    is_ordered: bool


def plan(event: Event, rules: Rules, before: Delivery | None) -> tuple[list[Planned], list[str]]:
    """Return the deliveries of an event, and the routes that take it.

    `before` is what carried it while its source was unknown.
    """
    view = EventView.of(event)
    matches = rules.table.match(view)
    targets = [(route, target) for route, error in matches for target in route.targets(view, error)]
    return list(_planned(event, targets, before)), [route.name for route, _ in matches]


def plan_rest(event: Event, route: Route, before: Delivery) -> list[Planned]:
    """Return the deliveries of an event by one route, to which `before` was one without a destination."""
    targets = [(route, target) for target in route.chosen(EventView.of(event))]
    return list(_planned(event, targets, before))


def _planned(event: Event, targets: Iterable[tuple[Route, Target]], before: Delivery | None) -> Iterable[Planned]:
    replayed_at, successor = (0.0, 0) if before is None else (before.replayed_at, before.successor)
    for route, (name, end) in targets:
        due = event.received_at + route.delay if route.delay and not replayed_at else 0.0
        delivery = Delivery(
            id=delivery_id(event.id, route.name, name),
            event=event,
            route=route.name,
            destination=name,
            successor=successor,
            due=due,
            replayed_at=due or replayed_at,
        )
        yield Planned(delivery, end, route.order is not None)
