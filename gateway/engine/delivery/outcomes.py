"""The ends of deliveries, counted and logged, and which of them are late."""

from gateway.engine.delivery.attempts import observe
from gateway.engine.partition_tracker import PendingDelivery
from gateway.engine.services import Services
from gateway.model import DeadLettered, DeadReason, Delivered, Delivery, Outcome, Superseded

LATE = 30.0
"""Seconds after which a delivery is late: from its event's receipt, its replay, or the end of its route's delay."""


def is_late(delivery: Delivery, at: float) -> bool:
    """Return whether a delivery that hasn't ended at that time is late. One of an unknown source never is."""
    return bool(delivery.route) and at - delivery.age_began_at > LATE


class Outcomes:
    """Counts and logs the end of each delivery of a process."""

    def __init__(self, services: Services) -> None:
        self._rules = services.rules
        self._metrics = services.metrics
        self._logger = services.logger

    def ended(self, pending: PendingDelivery, outcome: Outcome, attempts: int, now: float) -> None:
        """Count and log an end."""
        delivery = pending.delivery
        event = delivery.event
        seconds = now - event.received_at
        if seconds > LATE and not isinstance(outcome, Superseded):
            self.record_late(pending, now)
        detail: dict[str, str] = {}
        if isinstance(outcome, Delivered):
            name = "delivered"
            since = max(delivery.delayed_until, event.received_at)
            observe(self._metrics.delivery_duration.labels(delivery.route), max(0.0, now - since), event)
        elif isinstance(outcome, DeadLettered):
            name = "dead_lettered"
            detail = {"reason": outcome.reason}
            if outcome.reason is not DeadReason.EXPRESSION_ERROR:
                detail["detail"] = outcome.detail  # an expression's error may contain a piece of the body
        elif isinstance(outcome, Superseded):
            name = "superseded"
            detail = {"by": outcome.by}
        else:
            name = "dropped"
            detail = {"detail": outcome.detail}
        if delivery.part is not None:
            detail["item"] = str(delivery.part.number)
        if event.trace is not None and (trace_id := event.trace.recorded_id) is not None:
            detail["trace_id"] = trace_id
        self._metrics.deliveries.labels(delivery.route, delivery.destination, name).inc()
        self._logger.info(
            "delivery_finished",
            outcome=name,
            event_id=event.id,
            delivery_id=delivery.id,
            source=event.source,
            route=delivery.route,
            destination=delivery.destination,
            attempts=attempts,
            seconds=round(seconds, 4),
            rules=self._rules().version,
            **detail,
        )

    def record_late(self, pending: PendingDelivery, at: float) -> None:
        """Count a delivery as late, once, given a time at which it hasn't ended or won't have."""
        if not pending.is_late and is_late(pending.delivery, at):
            pending.is_late = True
            self._metrics.deliveries_late.labels(pending.delivery.route).inc()
