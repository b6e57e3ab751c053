"""An ordered delivery whose route's condition couldn't be evaluated is matched again, when it is its turn."""

from collections.abc import Iterable

from gateway.engine.partition_tracker import PendingDelivery
from gateway.model import DeadLettered, DeadReason, Dropped, Event
from gateway.rules.event_view import EventView
from gateway.rules.route_table import RouteTable
from gateway.rules.rules import Route, Rules

UNMATCHED = Dropped(detail="its route's condition had failed for it, and by the current rules it doesn't match")
"""How a delivery ends whose route is matched again, and isn't for it any more."""


def condition_failed(pending: PendingDelivery) -> bool:
    """Return whether the route's condition couldn't be evaluated for its event."""
    return pending.outcome is not None and pending.outcome.reason is DeadReason.EXPRESSION_ERROR


def can_match_again(pending: PendingDelivery, rules: Rules) -> bool:
    """Return whether rules have a delivery's route, destination and source; those that lack one may be outdated."""
    delivery = pending.delivery
    is_known = delivery.route in rules.routes and delivery.destination in rules.destinations
    return is_known and delivery.event.source in rules.sources


class AbsentSources:
    """Since when the rules lack sources of events whose condition has failed: nothing can match those again."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}

    def __bool__(self) -> bool:
        return bool(self._since)

    def update(self, heads: Iterable[PendingDelivery], rules: Rules, now: float) -> None:
        """Note which of the sources of these deliveries the rules lack, and forget all others."""
        sources = {head.delivery.event.source for head in heads if condition_failed(head)}
        self._since = {source: self._since.get(source, now) for source in sources - rules.sources.keys()}

    def since(self, head: PendingDelivery) -> float | None:
        """Return since when a delivery can't be matched again for that reason; None if it can."""
        return self._since.get(head.delivery.event.source) if condition_failed(head) else None


def match_again(route: Route | None, event: Event) -> tuple[bool, DeadLettered | None]:
    """Return whether a route, by itself, matches an event; if that can't be evaluated, how its delivery ends."""
    for _, error in () if route is None else RouteTable((route,)).match(EventView.of(event)):
        outcome = None if error is None else DeadLettered(reason=DeadReason.EXPRESSION_ERROR, detail=str(error))
        return True, outcome
    return False, None
