"""Which keys of an ordered route are blocked or halted, and since when.

`route` decides what halts a key, and what releases it.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from gateway.engine.ordered.key_state import ByPartition, FirstAttempts
from gateway.engine.partition_tracker import PendingDelivery, Stage
from gateway.engine.services import Services
from gateway.log.base import Partition
from gateway.model import DeadLettered, Delivery, Occurrence


class HaltedKeys:
    """Since when head deliveries have halted their keys; logs that they do, and that a key continues."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._times = ByPartition[float]()

    def at(self, head: PendingDelivery) -> float | None:
        """Return when a delivery has halted its key; None if it hasn't."""
        return self._times[head.record.tracker.partition].get(head.delivery.occurrence)

    def halt(self, head: PendingDelivery, outcome: DeadLettered) -> None:
        """Note that a delivery has halted its key; once, if its partition left and came back meanwhile."""
        times, delivery = self._times[head.record.tracker.partition], head.delivery
        if delivery.occurrence in times:
            return
        times[delivery.occurrence] = self._services.log.now()
        self._services.logger.error(
            "key_halted",
            route=delivery.route,
            destination=delivery.destination,
            event_id=delivery.event.id,
            delivery_id=delivery.id,
            reason=outcome.reason,
            detail=outcome.detail,
        )

    def release(self, head: PendingDelivery, why: str) -> None:
        """Note that a key continues, if it was halted."""
        delivery = head.delivery
        halted_at = self._times[head.record.tracker.partition].pop(delivery.occurrence, None)
        if halted_at is not None:
            self._services.logger.info(
                "key_released",
                route=delivery.route,
                destination=delivery.destination,
                event_id=delivery.event.id,
                delivery_id=delivery.id,
                why=why,
                seconds=round(self._services.log.now() - halted_at, 1),
            )

    def forget(self, partition: Partition, occurrence: Occurrence) -> None:
        self._times[partition].pop(occurrence, None)

    def keep_only(self, partitions: Collection[Partition]) -> None:
        """Forget the deliveries of all other partitions."""
        self._times.keep_only(partitions)


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocked:
    """A key whose head delivery has failed, so that its other deliveries wait: for the retry, or for a kick."""

    delivery: Delivery
    halted: DeadLettered | None
    """Why the head isn't attempted any more, if so."""
    since: float
    """When the key halted, or else when its head was first attempted, whatever was kicked since."""

    @classmethod
    def by(cls, head: PendingDelivery, halted: HaltedKeys, first_attempts: FirstAttempts) -> "Blocked":
        """Return a key that its head blocks."""
        return cls(
            delivery=head.delivery,
            halted=head.outcome if head.stage is Stage.WAITING else None,
            since=halted.at(head) or first_attempts.at(head),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteState:
    """What a process knows of an ordered route to a destination."""

    blocked: Sequence[Blocked]
    partitions: int
    """The number of the topic's partitions that are this process's."""
    unknown_since: float | None
    """Since when its rules lack the route or the destination."""
    quiet_keys: int = 0
    """The number of keys that wait for the end of their quiet period, if it is debounced."""
    quiet_until: float | None = None
    """When the last of them is due."""


def has_failed(head: PendingDelivery) -> bool:
    """Return whether a key's first delivery has failed, so that the others wait for its end."""
    return head.outcome is not None or bool(head.delivery.attempts)
