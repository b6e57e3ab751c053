"""Which tier carries a delay. A tier waits one fixed time, so a delay is a walk over tiers, the longest first.

    due in 100 s:  80s ──▶ 20s ──▶ attempt          due in 28 s:  20s ──▶ 5s ──▶ 3 s in memory ──▶ attempt

A walk ends within the tolerance after the due time and never before it: where the last tier ends early, or no tier is
short enough, the rest is waited in memory.
"""

from gateway.log.base import Record
from gateway.log.records import record_metadata_of
from gateway.log.topics import TIERS

TOLERANCE = 1.0
TOLERANCE_SHARE = 0.1

SHORTEST = "5s"
"""Where a caller without memory for waiting appends instead; the attempt is then at most 5 s late."""

WAIT_IN_MEMORY = TIERS[SHORTEST] / (1 + TOLERANCE_SHARE)
"""The longest delay (about 4.5 s) that is spent in memory: that is cheap, and a tier would be late by more than the
tolerance."""

_DESCENDING = tuple(reversed(TIERS.items()))


def plan(due: float, now: float) -> str | None:
    """Return the tier to append to next: the largest that isn't late by more than the tolerance.

    None if the rest, less than `WAIT_IN_MEMORY` and perhaps negative, is to be spent in memory. `now` is the log's
    clock. The tolerance is a tenth of the delay, at most one second.
    """
    remaining = due - now
    latest = remaining + min(TOLERANCE, TOLERANCE_SHARE * remaining)
    return next((tier for tier, delay in _DESCENDING if delay <= latest), None)


def due_at(record: Record, since: float, delay: float, now: float) -> float:
    """Return when a record is due that is in a tier since a time: after its delay, or at once if it is expedited."""
    due = since + delay
    is_expedited = due > now and delay == TIERS[SHORTEST] and record_metadata_of(record).is_expedited
    return since if is_expedited else due
