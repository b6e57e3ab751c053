"""An ordered delivery whose route's condition couldn't be evaluated is matched again, when it is its turn."""

from gateway.engine.partition_tracker import PendingDelivery
from gateway.model import DeadLettered, DeadReason, Event
from gateway.rules.event_view import EventView
from gateway.rules.route_table import RouteTable
from gateway.rules.rules import Route, Rules


def condition_failed(item: PendingDelivery) -> bool:
    """Return whether the route's condition couldn't be evaluated for its event."""
    return item.outcome is not None and item.outcome.reason is DeadReason.EXPRESSION_ERROR


def can_match_again(item: PendingDelivery, rules: Rules) -> bool:
    """Return whether rules have a delivery's route, and its event's source: else they may be others' former ones."""
    return item.delivery.route in rules.routes and item.delivery.event.source in rules.sources


def match_again(route: Route | None, event: Event) -> tuple[bool, DeadLettered | None]:
    """Return whether a route, by itself, matches an event; if that can't be evaluated, how its delivery ends."""
    for _, error in () if route is None else RouteTable((route,)).match(EventView.of(event)):
        outcome = None if error is None else DeadLettered(reason=DeadReason.EXPRESSION_ERROR, detail=str(error))
        return True, outcome
    return False, None
