"""What has become of each source's events by the rules for it, and what no route took before these were changed."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gateway.rules.watch import Changes
from gateway.telemetry.unrouted import Unrouted, UnroutedEvents

MOST_TOLD = 3
"""Types that are told of events that no route took, the most frequent first."""
MOST_ROUTES = 100
"""Whose names are told; a replay takes no more at once, either."""
MARGIN = 1.0
"""Seconds by which an event may have been appended before it was received, by two clocks that follow the log's."""

Counts = Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class InForce:
    """Since when the rules for a source are as they are, when they were read, and what that changed."""

    since: float
    loaded_at: float
    changed: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Missed:
    """Events that no route took while the rules for their source were others; `routes` are those that changed since."""

    unrouted: int
    events: int
    since: float
    until: float
    routes: frozenset[str]
    types: Counter[str]
    ended: float
    """By the clock of who has counted, for it to be forgotten."""


class Tally:
    """Counts of each source since the rules for it have changed, or since the process began."""

    def __init__(self, unrouted: UnroutedEvents, *, remembered: float) -> None:
        self._unrouted = unrouted
        self._remembered = remembered
        self._before: dict[str, Counts] = {}
        self._in_force: dict[str, InForce] = {}
        self._missed: dict[str, Missed] = {}

    def change(
        self, changes: Changes, counts: Mapping[str, Counts], in_force: InForce, *, now: float, at: float
    ) -> None:
        """Begin anew with the sources that a change is about, and keep what no route of theirs took before.

        `now` is by the log's clock, `at` by one that isn't set.
        """
        for name, routes in changes.touched.items():
            if name not in counts:
                self._missed.pop(name, None)
                continue  # it is gone
            self._keep(name, routes, self._since(name, counts[name]), self._unrouted.of(name), now=now, at=at)
            self._unrouted.forget(name)
            self._before[name] = counts[name]
            self._in_force[name] = in_force

    def of(self, name: str, counts: Counts, *, at: float) -> Mapping[str, Any]:
        """Tell what was counted of a source, and for an hour what it had missed."""
        in_force, unrouted = self._in_force.get(name), self._unrouted.of(name)
        since = unrouted.oldest - MARGIN if unrouted.types else None
        if in_force is not None:
            since = min(in_force.since, since or in_force.since)
        return {
            "source": name,
            **self._since(name, counts),
            "since": None if in_force is None else in_force.since,
            "loaded_at": None if in_force is None else in_force.loaded_at,
            "changed": () if in_force is None else in_force.changed,
            "missed_since": since,
            "types": _told(unrouted.types),
            "missed": self._told_missed(name, at),
        }

    def _since(self, name: str, counts: Counts) -> dict[str, float]:
        before = self._before.get(name, {})
        return {what: number - before.get(what, 0.0) for what, number in counts.items()}

    def _keep(
        self, name: str, routes: frozenset[str], told: Counts, unrouted: Unrouted, *, now: float, at: float
    ) -> None:
        if not told["unrouted"]:
            return
        in_force = self._in_force.get(name)
        since = unrouted.oldest - MARGIN
        kept = Missed(
            unrouted=int(told["unrouted"]),
            events=int(told["events"]),
            since=since if in_force is None else min(since, in_force.since),
            until=now,
            routes=routes,
            types=unrouted.types,
            ended=at,
        )
        earlier = self._missed.get(name)
        if earlier is not None and at <= earlier.ended + self._remembered:
            # One replay is to bring back all of it, so that what was mended by halves isn't half forgotten.
            kept = Missed(
                unrouted=kept.unrouted + earlier.unrouted,
                events=kept.events + earlier.events,
                since=min(kept.since, earlier.since),
                until=now,
                routes=kept.routes | earlier.routes,
                types=kept.types + earlier.types,
                ended=at,
            )
        self._missed[name] = kept

    def _told_missed(self, name: str, at: float) -> Mapping[str, Any] | None:
        missed = self._missed.get(name)
        if missed is None or at > missed.ended + self._remembered:
            return None
        return {
            "unrouted": missed.unrouted,
            "events": missed.events,
            "since": missed.since,
            "until": missed.until,
            "routes": sorted(missed.routes)[:MOST_ROUTES] if len(missed.routes) <= MOST_ROUTES else None,
            "types": _told(missed.types),
        }


def _told(types: Counter[str]) -> list[tuple[str, int]]:
    return types.most_common(MOST_TOLD)
