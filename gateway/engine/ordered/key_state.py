"""What is known of a key's head delivery beside its record."""

from dataclasses import dataclass

from gateway.log.base import Partition
from gateway.model import Attempt, DeadLettered, Delivery


@dataclass(frozen=True, slots=True)
class KeyState:
    """State of a key's head delivery that isn't in the log; kept across a rebalance that returns the partition."""

    partition: Partition
    attempts: tuple[Attempt, ...]
    due: float
    outcome: DeadLettered | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocked:
    """A key whose head delivery has failed, so that its other deliveries wait: for the retry, or for a kick."""

    delivery: Delivery
    halted: DeadLettered | None
    """Why the head isn't attempted any more, if so."""
    since: float
    """When the key halted, or else when its head was first attempted."""
