"""`debounce: {key: body.site, quiet: 30s}`: of the events that follow one another, the last one alone is delivered."""

from dataclasses import dataclass
from hashlib import blake2b

from gateway.model import ExpressionError
from gateway.rules.event_view import EventView
from gateway.rules.expressions import Expression

MIN_QUIET, MAX_QUIET = 1.0, 600.0
"""Seconds. Each key's last event is in memory until then, and its partition's commits wait for it."""
MAX_KEY = 1024  # characters
LONGEST_BURST = 10
"""How many times as long as `quiet` events may supersede one another: some keys are never quiet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Debounce:
    """Which events of a route supersede one another: of a source and `key`, less than `quiet` seconds apart."""

    key: Expression
    quiet: float

    def key_of(self, view: EventView) -> str:
        """Return an event's key; "" if it has none, so that it is delivered whatever comes after it.

        A long one is replaced by its digest (BLAKE2b): a record has it twice.
        """
        try:
            key = self.key.as_text(view) or ""
        except ExpressionError:
            return ""
        if len(key) <= MAX_KEY:
            return key
        return "blake2b:" + blake2b(key.encode("utf-8", "surrogatepass"), digest_size=32).hexdigest()

    @property
    def by(self) -> str:
        """A digest (8 hexadecimal digits) of what its key is."""
        return blake2b(self.key.text.encode(), digest_size=4).hexdigest()

    def ends_at(self, appended_at: float, burst_began_at: float) -> float:
        """Return until when the next event supersedes one that was appended then, the first of its burst before."""
        return min(appended_at + self.quiet, burst_began_at + LONGEST_BURST * self.quiet)
