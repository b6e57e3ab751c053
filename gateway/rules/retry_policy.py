"""How a route retries, with the defaults."""

from dataclasses import dataclass

from gateway.model import Disposition


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How a route retries."""

    schedule: tuple[float, ...] = (5, 30, 120, 600, 3600, 10800, 21600, 43200, 86400)
    """Seconds from the end of one attempt to the next. The last one repeats."""
    max_attempts: int = 20
    """Attempts in total, including the first. At least 1."""
    max_age: float = 3 * 86400.0
    """Seconds after the event's receipt within which an attempt may still be scheduled."""
    jitter: float = 0.2
    """The fraction by which a delay varies: 0.2 is plus or minus 20 %."""
    results: tuple[tuple[str, Disposition], ...] = ()
    """Overrides, by status (`404`), class (`5xx`) or kind of failure (`timeout`); a status precedes its class."""
