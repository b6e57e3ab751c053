"""Which command may work on a partition of `gateway.rejected`, and what became of its requests, by its markers. Pure.

A command claims a partition by a marker. The first claim of a free partition counts, wherever it was given: the log has
one order. It lasts for LEASE seconds after the last marker of that command, by the log's clock, unless the command ends
it. So that of a killed command ends by itself, and two never work at once: each looks after every append whether its
claim had lasted until then, and appends no event in the last part of it (`MARGIN`).

Markers are read from `LOOK_BACK` before now on: any claim that still lasts has a marker since then. A claim that is
seen without the one it lost to may be taken for one that counts; then the owner's next marker shows that it has the
partition, and until then nobody else gets it.
"""

from gateway.quarantine.records import Kind, Marker, Outcome

LEASE = 60.0
MARGIN = 20.0
"""Seconds of a lease in which no event is appended: longer than an append may take (5 s)."""
LOOK_BACK = 2 * LEASE


class Claims:
    """The claims and outcomes of one partition, as far as its markers were read."""

    def __init__(self) -> None:
        self.outcomes: dict[int, Outcome] = {}
        self._holder: str | None = None
        self._by = ""
        self._until = 0.0

    def apply(self, marker: Marker, appended_at: float) -> None:
        """Apply the next marker, in the order of their offsets."""
        self.outcomes.update(marker.outcomes)
        match marker.kind:
            case Kind.CLAIM if self._holder is not None and appended_at < self._until:
                pass  # lost to the one that holds it
            case Kind.END:
                if self._holder == marker.name:
                    self._holder = None
            case _:
                self._holder, self._by, self._until = marker.name, marker.by, appended_at + LEASE

    def holder(self, now: float) -> tuple[str, str, float] | None:
        """Return the command that has the partition, who gave it, and until when it has it; None if it is free."""
        return None if self._holder is None or now >= self._until else (self._holder, self._by, self._until)
