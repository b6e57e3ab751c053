"""The deliveries that an event becomes: one for each route that takes it and each of the route's destinations."""

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

from gateway.model import DeadLettered, DeadReason, Delivery, Event, ExpressionError, delivery_id, part_id
from gateway.rules.event_view import EventView
from gateway.rules.rules import Route, Rules, Target


class Planned(NamedTuple):
    """A delivery; with an `end`, it is over without an attempt."""

    delivery: Delivery
    end: DeadLettered | None
    is_ordered: bool


def is_to_be_planned(delivery: Delivery, rules: Rules) -> bool:
    """Return whether a delivery is one of which others have to be made by the rules."""
    if not delivery.route:
        return True
    route = rules.routes.get(delivery.route)
    is_whole = route is not None and route.split is not None and delivery.part is None
    return route is not None and (not delivery.destination or is_whole)


def plan(
    event: Event,
    view: EventView,
    matches: Iterable[tuple[Route, ExpressionError | None]],
    before: Delivery | None = None,
) -> list[Planned]:
    """Return the deliveries of an event that matches routes, or for which their condition fails.

    `before` is what carried it while its source was unknown.
    """
    targets = [(route, target) for route, error in matches for target in route.targets(view, error)]
    return list(_planned(view, event, targets, before))


def plan_rest(event: Event, route: Route, before: Delivery) -> list[Planned]:
    """Return the deliveries of an event by one route that continue `before`.

    That had no destination, or is for a whole event which its route splits.
    """
    view = EventView.of(event)
    if before.destination:
        return list(_parts(view, route, Planned(before, None, is_ordered=False)))
    return list(_planned(view, event, [(route, target) for target in route.chosen(view)], before))


def _planned(
    view: EventView, event: Event, targets: Iterable[tuple[Route, Target]], before: Delivery | None
) -> Iterable[Planned]:
    replayed_at, successor = (0.0, 0) if before is None else (before.replayed_at, before.successor)
    for route, (name, end) in targets:
        until = event.received_at + route.delay if route.delay else 0.0
        delivery = Delivery(
            id=delivery_id(event.id, route.name, name),
            event=event,
            route=route.name,
            destination=name,
            successor=successor,
            due=until,
            replayed_at=replayed_at,
            delayed_until=until,
        )
        planned = Planned(delivery, end, route.order is not None)
        if route.split is None or end is not None:
            yield planned
        else:
            yield from _parts(view, route, planned)


def _parts(view: EventView, route: Route, whole: Planned) -> Iterable[Planned]:
    """Yield the deliveries of the items of an event instead of the one of the whole event."""
    assert route.split is not None
    try:
        count = route.split.count(view)
    except ExpressionError as error:
        yield whole._replace(end=DeadLettered(reason=DeadReason.EXPRESSION_ERROR, detail=str(error)))
        return
    for part in range(count):
        identity = part_id(whole.delivery.id, part)
        yield whole._replace(delivery=replace(whole.delivery, id=identity, part=part, attempts=()))
