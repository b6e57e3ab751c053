"""Which command has claimed a partition of `gateway.rejected`, and the outcomes of its requests, by its markers. Pure.

A command claims a partition by appending a marker. The first claim of a free partition wins, as all processes read the
markers in the same order. A claim is a lease: it expires LEASE seconds after the command's last marker, by the log's
clock, or when the command ends it. So the claim of a killed command expires, and two commands never work at once: each
appends no event in its last MARGIN seconds, and checks after every marker that it was stored in time.

Markers are read from LOOK_BACK seconds ago on, since every valid claim has one after that. A losing claim may then look
like the winner, if the winner's own claim is older: the owner's next marker corrects that, and until then no other
command gets the partition.
"""

from gateway.quarantine.records import Kind, Marker, RequestOutcome

LEASE = 60.0
MARGIN = 20.0
"""Last seconds of a lease, in which no event is appended: longer than an append may take (5 s)."""
LOOK_BACK = 2 * LEASE


class Claims:
    """The claims and outcomes of one partition, as far as its markers were read."""

    def __init__(self) -> None:
        self.outcomes: dict[int, RequestOutcome] = {}
        self._holder: str | None = None
        self._by = ""
        self._until = 0.0

    def apply(self, marker: Marker, appended_at: float) -> None:
        """Apply the next marker, in the order of their offsets."""
        self.outcomes.update(marker.outcomes)
        if marker.kind is Kind.END:
            if self._holder == marker.name:
                self._holder = None
        elif marker.kind is not Kind.CLAIM or self.holder(appended_at) is None:  # else the claim is lost
            self._holder, self._by, self._until = marker.name, marker.by, appended_at + LEASE

    def holder(self, now: float) -> tuple[str, str, float] | None:
        """Return the command that has claimed the partition, who ran it, and when its lease expires; None if free."""
        return None if self._holder is None or now >= self._until else (self._holder, self._by, self._until)
