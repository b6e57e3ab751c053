"""What can be said of an event or of one of its deliveries: a closed set, in queries and in answers."""

from enum import StrEnum


class Status(StrEnum):
    """How far a delivery is, or an event of which no delivery is known. The worst come first."""

    DEAD = "dead"
    """It has an open dead letter."""
    PARKED = "parked"
    """It is stored until what is paused is resumed."""
    RETRYING = "retrying"
    """It waits for a retry, or is in the middle of one."""
    PENDING = "pending"
    """It isn't done: it waits for its turn, or for its first attempt to end."""
    UNKNOWN = "unknown"
    """Its record was deleted by the log before anybody was known to be done with it, or hasn't been looked at yet."""
    DROPPED = "dropped"
    """It ended with a failure that the rules drop, or an operator has dropped its dead letter."""
    DONE = "done"
    """It has ended, without a dead letter. Whether it was delivered, dropped, or no route took it, isn't recorded."""
    DUPLICATE = "duplicate"
    """An earlier event has its identity and content, and is the one that was let through."""
    DELIVERED = "delivered"
    """A 2xx is recorded."""


WORST_FIRST = tuple(Status)
OPEN = (Status.DEAD, Status.PARKED, Status.RETRYING, Status.PENDING)
"""Something is still to be done, by the gateway or by an operator."""
OF_EVENTS = (Status.PENDING, Status.UNKNOWN, Status.DONE, Status.DUPLICATE)
"""What an event may be of which no delivery is recorded."""
OF_DELIVERIES = tuple([status for status in WORST_FIRST if status is not Status.DUPLICATE])
"""What a delivery may be: a duplicate is an event of which there is none."""
