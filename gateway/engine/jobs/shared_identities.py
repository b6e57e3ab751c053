"""Which events of a partition share their identity with an earlier, different one. Pure.

A delivery's ID is derived from its event's. If an identity is badly chosen, unrelated events have the same event ID,
and a receiver that deduplicates would treat them as one. So a replay gives their deliveries IDs that depend on where
their records are. Which events were deleted isn't known: once some of a replay's own are, the events that follow them
get such IDs, too.
"""

from collections.abc import Callable

from gateway.log.base import Record
from gateway.log.records import fingerprint
from gateway.model import Event, identity_of

MAX_IDENTITIES = 100_000
"""Maximum identities remembered per partition, the newest: some 30 MiB."""


class Identities:
    """The identities of one partition, in the order of the log."""

    def __init__(self, complete_from: int = 0) -> None:
        """Start with no identity. Events below `complete_from` may share theirs with a deleted event of the replay."""
        self._complete_from = complete_from
        self._seen: dict[bytes, tuple[bytes, float, int | None]] = {}

    def offset_in_id(self, event: Event, record: Record, window: Callable[[], float | None]) -> int | None:
        """Remember an event; return the offset for its deliveries' IDs, None if its identity isn't shared.

        A duplicate has the offset of its original: it has the same content, and was appended at most a window (seconds)
        later; with None there are no duplicates.
        """
        identity = identity_of(event.id)
        if identity is None:
            return None
        content = fingerprint(event)
        original = self._seen.get(identity)
        if original is None:
            if len(self._seen) >= MAX_IDENTITIES:
                del self._seen[next(iter(self._seen))]
            own = record.offset if record.offset < self._complete_from else None
            self._seen[identity] = content, record.appended_at, own
            return own
        content_before, at, offset = original
        within = window() if content == content_before else None
        return record.offset if within is None or record.appended_at - at > within else offset
