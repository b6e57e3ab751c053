"""Counts of traffic, read once for all who ask for the same, by the index's own thread for that.

Those of someone who is limited to some of ten thousand routes take seconds: all counts of the time are gone through.
"""

import asyncio
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from math import ceil
from time import monotonic

from gateway.access.principal import Principal
from gateway.api.cache import cached_for
from gateway.api.problems import ApiError, Code
from gateway.api.shapes import Currency
from gateway.api.traffic_shapes import Traffic
from gateway.index.index import Index, Timed
from gateway.index.tallies import Traffic as CountedTraffic
from gateway.index.traffic import Lane, TrafficQuery
from gateway.rules.rules import Rules

PATIENCE = 10.0
"""Seconds for which a request waits for counts. Reading them goes on, and the next request finds them."""
MOST_KEPT = 20_000
"""Counts of a name in a step that are kept, at most: some 50 MB."""
Found = Mapping[str, Traffic]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """Counts that are read, or being read: by which query, of an index that was how current then."""

    query: TrafficQuery
    currency: Currency
    found: asyncio.Future[Timed[Found]]

    @property
    def weight(self) -> int:
        """How much it keeps."""
        steps = ceil((self.query.until - self.query.since) / self.query.step) + 1
        return steps * (1 if self.query.names is None else len(self.query.names))

    def is_over(self, now: float) -> bool:
        """Return whether it is of no use any more at a time of the monotonic clock."""
        if not self.found.done():
            return False
        if self.found.cancelled() or self.found.exception() is not None:
            return True
        _, seconds, ended = self.found.result()
        return not (rest := cached_for(seconds)) or now > ended + rest


class TrafficReadings:
    """What is known by what was asked, and by who may see how much of it."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._clock = clock
        self._known: dict[Hashable, Reading] = {}

    async def get(
        self,
        index: Index,
        query: TrafficQuery,
        currency: Currency,
        limits: "Limits",
        made: Callable[[Mapping[str, CountedTraffic]], Found],
    ) -> tuple[Found, Currency]:
        """Return what is made of counts, as they are or were some moments ago, and how current the index was then.

        Raises ApiError and IndexUnavailableError.
        """
        now = self._clock()
        for key in [key for key, reading in self._known.items() if reading.is_over(now)]:
            del self._known[key]
        key = (index, limits.key, _steps_of(query))
        reading = self._known.get(key)
        if reading is None:
            self._make_room()
            found = index.start_traffic(query, limits.sees, made)
            reading = self._known[key] = Reading(query=query, currency=currency, found=found)
        try:
            async with asyncio.timeout(PATIENCE):
                return (await asyncio.shield(reading.found)).value, reading.currency
        except TimeoutError:
            raise ApiError(Code.BUSY, f"no counts within {PATIENCE:g} s: try again") from None

    def _make_room(self) -> None:
        """Forget the oldest counts while there are too many; none that somebody may wait for."""
        weight = sum([reading.weight for reading in self._known.values()])
        for key, reading in [*self._known.items()]:
            if weight <= MOST_KEPT:
                return
            if reading.found.done():
                weight -= reading.weight
                del self._known[key]


@dataclass(frozen=True, slots=True)
class Limits:
    """What of the counts somebody sees: everything if `sees` is None. Callers with the same `key` see the same."""

    key: Hashable
    sees: Callable[[Lane], bool] | None


def limits_of(principal: Principal, rules: Rules, sees: Callable[[Lane], bool]) -> Limits:
    """Return what somebody sees by these rules, and by what says so of a lane."""
    if not principal.is_limited:
        return Limits(None, None)
    return Limits((rules.version, principal.owners, principal.sources), sees)


def _steps_of(query: TrafficQuery) -> Hashable:
    """Return what makes queries one: the same steps, of the same."""
    names = None if query.names is None else tuple(query.names)
    steps = (query.step, query.since // query.step, ceil(query.until / query.step))
    return (*steps, query.by, names, query.source, query.route, query.destination)
