"""What is known of a key's head delivery beside its record, also while its partition is away."""

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TypeVar

from gateway.engine.partition_tracker import PendingDelivery
from gateway.log.base import Partition
from gateway.model import Attempt, DeadLettered, Delivery, Occurrence, SpillReason

T = TypeVar("T")


class ByPartition(defaultdict[Partition, dict[Occurrence, T]]):
    """What is known of deliveries, until their partition has another owner: tens of thousands are forgotten at once."""

    def __init__(self) -> None:
        super().__init__(dict)

    def keep_only(self, partitions: Collection[Partition]) -> None:
        """Forget the deliveries of all other partitions."""
        for partition in self.keys() - set(partitions):
            del self[partition]


@dataclass(frozen=True, slots=True)
class KeyState:
    """State of a key's head delivery that isn't in the log; kept across a rebalance that returns the partition."""

    attempts: tuple[Attempt, ...]
    due: float
    replayed_at: float
    outcome: DeadLettered | None

    @classmethod
    def of(cls, head: PendingDelivery) -> "KeyState":
        """Return the state of a head whose partition leaves. What waits for a name looks again whether that is back."""
        delivery = head.delivery
        due = 0.0 if head.metadata.spill_reason == SpillReason.UNKNOWN_NAME else delivery.due
        return cls(delivery.attempts, due, delivery.replayed_at, head.outcome)

    def restored(self, delivery: Delivery) -> Delivery:
        """Return the delivery as it was when its partition left."""
        return replace(delivery, attempts=self.attempts, due=self.due, replayed_at=self.replayed_at)


class FirstAttempts:
    """When head deliveries were first attempted whose attempts a kick has reset since."""

    def __init__(self) -> None:
        self._times = ByPartition[float]()

    def keep(self, partition: Partition, occurrence: Occurrence, attempts: Collection[Attempt]) -> None:
        """Keep when the first of these attempts was made, before they are reset."""
        for first in list(attempts)[:1]:
            self._times[partition].setdefault(occurrence, first.at)

    def at(self, head: PendingDelivery) -> float:
        """Return when a delivery was first attempted; without an attempt, when its event was received."""
        delivery = head.delivery
        first = delivery.attempts[0].at if delivery.attempts else delivery.event.received_at
        return self._times[head.record.tracker.partition].get(delivery.occurrence, first)

    def forget(self, pending: PendingDelivery) -> None:
        self._times[pending.record.tracker.partition].pop(pending.delivery.occurrence, None)

    def keep_only(self, partitions: Collection[Partition]) -> None:
        """Forget the deliveries of all other partitions."""
        self._times.keep_only(partitions)
