"""`debounce: {key: body.site, quiet: 30s}`: only the last event of a burst is delivered."""

from dataclasses import dataclass
from hashlib import blake2b

from gateway.model import ExpressionError
from gateway.rules.event_view import EventView
from gateway.rules.expressions import Expression

MIN_QUIET, MAX_QUIET = 1.0, 600.0
"""Seconds. Each key's last event is in memory until then, and its partition's commits wait for it."""
MAX_KEY = 1024  # characters
LONGEST_BURST = 10
"""The longest burst as a multiple of `quiet`, since some keys are never quiet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Debounce:
    """Which events of a route supersede one another: same source and `key`, less than `quiet` seconds apart."""

    key: Expression
    quiet: float

    def key_of(self, view: EventView) -> str:
        """Return an event's key; "" if it has none, so that no later event supersedes it.

        A long key is replaced by its digest (BLAKE2b), since a record contains it twice.
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
        """A digest (8 hexadecimal digits) of the key's expression."""
        return blake2b(self.key.text.encode(), digest_size=4).hexdigest()

    def ends_at(self, appended_at: float, burst_began_at: float) -> float:
        """Return until when the next event supersedes the last one, which was appended at `appended_at`."""
        return min(appended_at + self.quiet, burst_began_at + LONGEST_BURST * self.quiet)
