"""The deliveries that an event becomes: one for each route that takes it and each of the route's destinations."""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple

from gateway.model import DeadLettered, DeadReason, Delivery, Event, ExpressionError, delivery_id, part_id
from gateway.rules.event_view import EventView
from gateway.rules.rules import Route, Rules, Target
from gateway.rules.splits import SplitEvent


class Planned(NamedTuple):
    """A delivery; with an `end`, it is over without an attempt."""

    delivery: Delivery
    end: DeadLettered | None
    is_ordered: bool
    is_unsplit: bool = False
    """Whether it is of a whole event whose list is too much to compute in this turn: it is split in one of its own."""


def is_to_be_planned(delivery: Delivery, rules: Rules, now: float) -> bool:
    """Return whether a delivery is one of which others have to be made now, by the rules."""
    if not delivery.route:
        return True
    route = rules.routes.get(delivery.route)
    is_whole = route is not None and route.split is not None and delivery.part is None and delivery.due <= now
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
    return list(_planned(event, view, _targets(view, matches), before))


def plan_as_attempted(
    event: Event, view: EventView, matches: Iterable[tuple[Route, ExpressionError | None]]
) -> Iterator[Planned]:
    """Yield the deliveries of an event as they are attempted, to explain them: all of them at once may be many.

    `plan` leaves one whole that its route delays and splits: it is split when it is due; and one whose list is too much
    to compute after others: it is split in a turn of its own.
    """
    taken = list(matches)
    splitting = {route.name: route for route, _ in taken if route.split is not None}
    for each in _planned(event, view, _targets(view, taken), None):
        route = splitting.get(each.delivery.route)
        is_whole = each.end is None and each.delivery.part is None
        if route is not None and is_whole:
            yield from _parts(route, each, SplitEvent.of(event))
        else:
            yield each


def plan_rest(event: Event, route: Route, before: Delivery) -> list[Planned]:
    """Return the deliveries of an event by one route that continue `before`.

    That had no destination, or is for a whole event which its route splits.
    """
    if before.destination:
        return list(_parts(route, Planned(before, None, is_ordered=False), SplitEvent.of(event)))
    view = EventView.of(event)
    targets = [(route, target) for target in route.chosen(view)]
    return list(_planned(event, view, targets, before))


def _targets(view: EventView, matches: Iterable[tuple[Route, ExpressionError | None]]) -> list[tuple[Route, Target]]:
    return [(route, target) for route, error in matches for target in route.targets(view, error)]


def _planned(
    event: Event, view: EventView, targets: Collection[tuple[Route, Target]], before: Delivery | None
) -> Iterable[Planned]:
    replayed_at, successor = (0.0, 0) if before is None else (before.replayed_at, before.successor)
    # Once for all destinations, and in one view: it lets expressions over large events take only so much time.
    debounced = {route.name: route.debounce for route, _ in targets if route.debounce is not None}
    bursts = {name: debounce.key_of(view) for name, debounce in debounced.items()}
    split_event: SplitEvent | None = None
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
            burst=bursts.get(route.name),
        )
        planned = Planned(delivery, end, route.order is not None)
        # One that is delayed stays whole until then: its items would all be written from tier to tier.
        if route.split is None or end is not None or until:
            yield planned
        else:
            split_event = split_event or SplitEvent(event, view)
            yield from _parts(route, planned, split_event)
    if split_event is not None:
        split_event.keep()


def _parts(route: Route, whole: Planned, event: SplitEvent) -> Iterable[Planned]:
    """Yield the deliveries of the items of an event instead of the one of the whole event."""
    assert route.split is not None
    try:
        parts = route.split.parts(event)
    except ExpressionError as error:
        yield whole._replace(end=DeadLettered(reason=DeadReason.EXPRESSION_ERROR, detail=str(error)))
        return
    if parts is None:
        yield whole._replace(is_unsplit=True)
        return
    for part in parts:
        id_ = part_id(whole.delivery.id, part)
        yield whole._replace(delivery=replace(whole.delivery, id=id_, part=part, attempts=()))
