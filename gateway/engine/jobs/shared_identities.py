"""Which events of a partition share their identity with one before: pure.

A delivery's id is made of its event's. Where an identity is badly chosen, events that have nothing in common have one
event id, and a receiver that deduplicates would take one of them for all. So a replay tells their deliveries apart by
where their records are.
"""

from collections.abc import Callable

from gateway.model import EventId, identity_of

MAX_IDENTITIES = 100_000
"""Identities that are remembered of a partition, the newest: some 30 MiB."""


class Identities:
    """The identities of one partition, in the order of the log."""

    def __init__(self) -> None:
        self._seen: dict[bytes, tuple[bytes, float]] = {}

    def is_shared(self, event: EventId, content: bytes, at: float, window: Callable[[], float | None]) -> bool:
        """Note an event; return whether it shares its identity with one that was noted, and isn't a copy of that.

        A copy has the same content, and was appended at most a window (seconds) later; with None there are no copies.
        """
        identity = identity_of(event)
        if identity is None:
            return False
        first = self._seen.get(identity)
        if first is None:
            if len(self._seen) >= MAX_IDENTITIES:
                del self._seen[next(iter(self._seen))]
            self._seen[identity] = content, at
            return False
        if first[0] != content:
            return True
        within = window()
        return within is None or at - first[1] > within
