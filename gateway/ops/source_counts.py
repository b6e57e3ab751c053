"""What has become of each source's events by the rules for it, and what was left out before these were changed."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gateway.rules.watch import Changes
from gateway.telemetry.skipped_events import SkippedEvents

MOST_TOLD = 3
"""Types that are told of events that were left out, the most frequent first."""
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
    """Events left out while the rules for their source were others; `routes` are those that may take them since."""

    count: int
    events: int
    since: float
    until: float
    routes: frozenset[str]
    types: Counter[str]
    ended: float
    """By the clock of who has counted, for it to be forgotten."""


class SourceCounts:
    """What was counted of each source since the rules have changed by which it was, or since the process began.

    Which events no route takes is a matter of the source and its routes. Which are let go as copies is one of its
    identity and `dedupe` alone, and goes on while other rules change.
    """

    def __init__(self, unrouted: SkippedEvents, let_go: SkippedEvents, *, remembered: float) -> None:
        self._unrouted = _Account(("unrouted",), unrouted, remembered)
        self._let_go = _Account(("duplicates", "conflicts"), let_go, remembered)

    def change(
        self, changes: Changes, counts: Mapping[str, Counts], in_force: InForce, *, now: float, at: float
    ) -> None:
        """Begin anew with the sources that a change is about, and keep what was left out of theirs before.

        `now` is by the log's clock, `at` by one that isn't set.
        """
        for name, routes in changes.touched.items():
            if name not in counts:  # it is gone
                self._unrouted.drop(name)
                self._let_go.drop(name)
                continue
            self._unrouted.change(name, routes, counts[name], in_force, now=now, at=at)
            if name in changes.identified:
                self._let_go.change(name, routes, counts[name], in_force, now=now, at=at)

    def of(self, name: str, counts: Counts, *, at: float) -> Mapping[str, Any]:
        """Tell what was counted of a source, and for an hour what was left out before."""
        identity = self._let_go.of(name, counts, at=at)
        return {"source": name, **self._unrouted.of(name, counts, at=at), "identity": identity}


class _Account:
    """Counts of each source since some rules for it have changed; `what[0]` counts the events that they leave out."""

    def __init__(self, what: Sequence[str], left_out: SkippedEvents, remembered: float) -> None:
        self._what = what
        self._left_out = left_out
        self._remembered = remembered
        self._before: dict[str, Counts] = {}
        self._in_force: dict[str, InForce] = {}
        self._missed: dict[str, Missed] = {}

    def drop(self, name: str) -> None:
        self._missed.pop(name, None)

    def change(
        self, name: str, routes: frozenset[str], counts: Counts, in_force: InForce, *, now: float, at: float
    ) -> None:
        self._keep(name, routes, self._since(name, counts), now=now, at=at)
        self._left_out.forget(name)
        self._before[name] = counts
        self._in_force[name] = in_force

    def of(self, name: str, counts: Counts, *, at: float) -> Mapping[str, Any]:
        in_force, left_out = self._in_force.get(name), self._left_out.of(name)
        since = left_out.oldest - MARGIN if left_out.types else None
        if in_force is not None:
            since = min(in_force.since, since or in_force.since)
        return {
            **self._since(name, counts),
            "since": None if in_force is None else in_force.since,
            "loaded_at": None if in_force is None else in_force.loaded_at,
            "changed": () if in_force is None else in_force.changed,
            "missed_since": since,
            "types": _told(left_out.types),
            "newest": next((left_out.newest[kind] for kind, _ in left_out.types.most_common(1)), None),
            "missed": self._told_missed(name, at),
        }

    def _since(self, name: str, counts: Counts) -> dict[str, float]:
        before = self._before.get(name, {})
        return {what: counts[what] - before.get(what, 0.0) for what in ("events", *self._what)}

    def _keep(self, name: str, routes: frozenset[str], told: Counts, *, now: float, at: float) -> None:
        number, left_out = int(told[self._what[0]]), self._left_out.of(name)
        if not number:
            return
        in_force = self._in_force.get(name)
        since = left_out.oldest - MARGIN
        kept = Missed(
            count=number,
            events=int(told["events"]),
            since=since if in_force is None else min(since, in_force.since),
            until=now,
            routes=routes,
            types=left_out.types,
            ended=at,
        )
        earlier = self._missed.get(name)
        if earlier is not None and at <= earlier.ended + self._remembered:
            # One replay is to bring back all of it, so that what was fixed by halves isn't half forgotten.
            kept = Missed(
                count=kept.count + earlier.count,
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
            "count": missed.count,
            "events": missed.events,
            "since": missed.since,
            "until": missed.until,
            "routes": sorted(missed.routes)[:MOST_ROUTES] if len(missed.routes) <= MOST_ROUTES else None,
            "types": _told(missed.types),
        }


def _told(types: Counter[str]) -> list[tuple[str, int]]:
    return types.most_common(MOST_TOLD)
