"""Waiting deliveries by route and destination, and the last attempts at a destination, from the log's records."""

import heapq
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from gateway.log.records import StoredDelivery
from gateway.model import Attempt, Delivery, SpillReason, result_label

MAX_ATTEMPTS_SHOWN = 20


MAX_REASONS = 100
"""Maximum number of distinct reasons counted per backlog; more are counted together, as a response may name an id."""


WAIT_REASONS: Mapping[str, str] = {
    SpillReason.BREAKER_OPEN: "breaker open",
    SpillReason.THROTTLED: "Retry-After",
    SpillReason.LANE_FULL: "its queue is full",
    SpillReason.OVERDUE: "its queue is slow",
    SpillReason.WINDOW_FULL: "its partition was nearly blocked",
    SpillReason.PAUSED: "paused",
    SpillReason.UNKNOWN_NAME: "not in the rules",
    SpillReason.DELAYED: "delayed by its route",
}


GOT = "got "
"""Begins a reason that is the result of the last attempt."""


NOT_TRIED = "not tried yet"


OTHERS = "others"


@dataclass(slots=True, kw_only=True)
class Backlog:
    """The waiting deliveries of a route to a destination; without a route, the events of an unknown source."""

    route: str
    destination: str
    source: str = ""
    count: int = 0
    oldest: float = float("inf")
    due: float = float("inf")
    """When the first of those may be attempted that aren't parked."""
    unknown_since: float = float("inf")
    """Since when the rules have lacked the name of the first of those that wait for one."""
    reasons: Counter[str] = field(default_factory=Counter)
    last: Attempt | None = None
    """The newest attempt in the log."""
    tried: Delivery | None = None
    """The delivery with the most attempts, without its body and headers."""

    def add(self, stored: StoredDelivery) -> None:
        delivery = stored.delivery
        self.count += 1
        self.oldest = min(self.oldest, delivery.age_began_at)
        if stored.metadata.spill_reason != SpillReason.PAUSED:
            self.due = min(self.due, delivery.due or stored.at)  # what is split by others has none
        if stored.metadata.spill_reason == SpillReason.UNKNOWN_NAME and stored.metadata.unknown_since is not None:
            self.unknown_since = min(self.unknown_since, stored.metadata.unknown_since)
        attempt = delivery.attempts[-1] if delivery.attempts else None
        if attempt is not None and (self.tried is None or attempt.number > self.tried.attempts[-1].number):
            self.tried = replace(delivery, event=replace(delivery.event, body=b"", headers=(), query=""))
        if attempt is not None and (self.last is None or attempt.at > self.last.at):
            self.last = attempt
        reason = reason_of_waiting(stored)
        self.reasons[reason if reason in self.reasons or len(self.reasons) < MAX_REASONS else OTHERS] += 1


def reason_of_waiting(stored: StoredDelivery) -> str:
    """Return why a delivery waits: as its record says, else what its last attempt got."""
    if stored.delivery.is_delayed and stored.metadata.spill_reason != SpillReason.PAUSED:
        return WAIT_REASONS[SpillReason.DELAYED]
    if stored.metadata.spill_reason:
        return WAIT_REASONS.get(stored.metadata.spill_reason, stored.metadata.spill_reason)
    if not stored.delivery.attempts:
        return NOT_TRIED
    attempt = stored.delivery.attempts[-1]
    label, detail = result_label(attempt), attempt.detail
    if detail.startswith(f"{label} "):  # "503 Service Unavailable"
        return f"{GOT}{detail}"
    return f"{GOT}{label} ({detail})" if detail else f"{GOT}{label}"


def counted_reason(number: int, reason: str, more: str = "") -> str:
    """Return how many deliveries wait for a reason, as text: "2 got 503", "1 waits (breaker open after 503)"."""
    if reason.startswith(GOT) or reason in (WAIT_REASONS[SpillReason.PAUSED], NOT_TRIED, OTHERS):
        return f"{number:,} {reason}"
    return f"{number:,} {'waits' if number == 1 else 'wait'} ({reason}{more})"


@dataclass(slots=True)
class Parked:
    """How many deliveries one paused name has parked, and when the first of them was written."""

    count: int = 0
    first: float = math.inf


class Backlogs:
    """Waiting deliveries by route and destination, counted as they are read."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str, str], Backlog] = {}
        self.parked: dict[str, Parked] = {}
        """What is parked, by the name that was paused: "route/…" or "destination/…"."""

    def add(self, stored: StoredDelivery) -> None:
        delivery = stored.delivery
        if stored.metadata.paused_name:
            parked = self.parked.setdefault(stored.metadata.paused_name, Parked())
            parked.count += 1
            parked.first = min(parked.first, stored.at)
        key = delivery.route, delivery.destination, "" if delivery.route else delivery.event.source
        if key not in self._found:
            self._found[key] = Backlog(route=key[0], destination=key[1], source=key[2])
        self._found[key].add(stored)

    def __iter__(self) -> Iterator[Backlog]:
        return iter(self._found.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptInfo:
    """An attempt of a delivery."""

    delivery_id: str
    event_id: str
    source: str
    route: str
    attempt: Attempt


class LastAttempts:
    """The last attempts at a destination in the log: of waiting deliveries, of dead letters, and recorded ones."""

    def __init__(self, destination: str) -> None:
        self.destination = destination
        self._heap: list[tuple[float, str, int, AttemptInfo]] = []  # the oldest first
        self._kept: set[tuple[float, str, int]] = set()

    def add(self, stored: StoredDelivery) -> None:
        delivery = stored.delivery
        if delivery.destination != self.destination:
            return
        event = delivery.event
        for attempt in delivery.attempts:
            self.add_attempt(
                AttemptInfo(
                    delivery_id=delivery.id,
                    event_id=event.id,
                    source=event.source,
                    route=delivery.route,
                    attempt=attempt,
                )
            )

    def add_attempt(self, tried: AttemptInfo) -> None:
        """Add an attempt at the destination; several records may contain it."""
        key = round(tried.attempt.at, 3), tried.delivery_id, tried.attempt.number
        if key in self._kept:
            return
        self._kept.add(key)
        heapq.heappush(self._heap, (*key, tried))
        if len(self._heap) > MAX_ATTEMPTS_SHOWN:
            *oldest, _ = heapq.heappop(self._heap)
            self._kept.discard(tuple(oldest))

    def newest_first(self) -> Sequence[AttemptInfo]:
        return [tried for *_, tried in sorted(self._heap, key=lambda each: -each[0])]
