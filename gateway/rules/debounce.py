"""`debounce: {key: body.site, quiet: 30s}`: of the events that follow one another, the last one alone is delivered."""

from dataclasses import dataclass

from gateway.model import ExpressionError
from gateway.rules.event_view import EventView
from gateway.rules.expressions import Expression

MIN_QUIET, MAX_QUIET = 1.0, 600.0
"""Seconds. Each key's last event is in memory until then, and its partition's commits wait for it."""
LONGEST_BURST = 10
"""How many times as long as `quiet` events may supersede one another: some keys are never quiet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Debounce:
    """Which events of a route supersede one another: of a source and `key`, less than `quiet` seconds apart."""

    key: Expression
    quiet: float

    def key_of(self, view: EventView) -> str | None:
        """Return an event's key; None if it has none, so that it is delivered whatever comes after it."""
        try:
            return self.key.as_text(view)
        except ExpressionError:
            return None

    def ends_at(self, appended_at: float, burst_began_at: float) -> float:
        """Return until when the next event supersedes one that was appended then, the first of its burst before."""
        return min(appended_at + self.quiet, burst_began_at + LONGEST_BURST * self.quiet)
