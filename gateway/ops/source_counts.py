"""What happened to each source's events under its current rules, and what its previous rules left undelivered."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from gateway.bodies.redaction import HIDDEN
from gateway.rules.rules import Rules
from gateway.rules.watch import Changes
from gateway.telemetry.skipped_events import SkippedEvents

MAX_TYPES = 3
"""Maximum number of event types reported per source, the most frequent first."""
MAX_ROUTES = 100
"""Maximum number of routes reported by name, and of routes in one `gateway replay`."""
MARGIN = 1.0
"""Seconds by which an event's append may seem to precede its receipt, as two clocks follow the log's."""

Counts = Mapping[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class InForce:
    """Since when a source's current rules apply, when they were loaded, and what they changed."""

    since: float
    loaded_at: float
    changed: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Missed:
    """Events that a source's previous rules left undelivered.

    `routes` are those that may match them now, each with its number of destinations.
    """

    count: int
    events: int
    since: float
    until: float
    routes: Mapping[str, int]
    types: Counter[str]
    ended: float
    """When they were counted, by the monotonic clock: after an hour they are forgotten."""


class SourceCounts:
    """Counts of each source since its rules changed, or since the process started.

    Which events are unrouted depends on the source and its routes. Which are suppressed as duplicates depends on the
    source's identity and `dedupe` alone, so that count continues while other rules change.
    """

    def __init__(self, unrouted: SkippedEvents, suppressed: SkippedEvents, *, remembered: float) -> None:
        self._unrouted = _Account("routed", ("unrouted",), unrouted, remembered)
        self._suppressed = _Account("events", ("duplicates", "conflicts"), suppressed, remembered)

    def change(
        self,
        changes: Changes,
        rules: Rules,
        counts: Mapping[str, Counts],
        in_force: InForce,
        *,
        now: float,
        at: float,
    ) -> None:
        """Restart the counts of the changed sources, and keep what was missed before.

        `rules` are the new ones. `now` is the log's time, `at` that of the monotonic clock.
        """
        for account in (self._unrouted, self._suppressed):
            account.keep(counts.keys())
        for name, names in changes.touched.items():
            routes = {route: rules.routes[route].fan_out for route in names}
            if name not in counts:  # it is gone
                continue
            self._unrouted.change(name, routes, counts[name], in_force, now=now, at=at)
            if name in changes.identified:
                self._suppressed.change(name, routes, counts[name], in_force, now=now, at=at)

    def hide_types(self, sources: Iterable[str]) -> None:
        """Forget the types that were counted before their sources hid more: these may be what is hidden now."""
        for name in sources:
            for account in (self._unrouted, self._suppressed):
                account.hide_types(name)

    def of(self, name: str, counts: Counts, *, at: float) -> Mapping[str, Any]:
        """Return a source's counts and, for an hour, what was missed before, as JSON for `/status`."""
        identity = self._suppressed.of(name, counts, at=at)
        return {"source": name, **self._unrouted.of(name, counts, at=at), "identity": identity}


class _Account:
    """Counts of each source since some of its rules changed; `what[0]` counts the events left undelivered.

    `of` counts all of them: those that came here, or those that were routed here, which may come from other processes.
    """

    def __init__(self, of: str, what: Sequence[str], left_out: SkippedEvents, remembered: float) -> None:
        self._all = of
        self._what = what
        self._left_out = left_out
        self._remembered = remembered
        self._before: dict[str, Counts] = {}
        self._in_force: dict[str, InForce] = {}
        self._missed: dict[str, Missed] = {}

    def keep(self, sources: Collection[str]) -> None:
        """Forget the other sources: if one comes back, its counters begin at 0."""
        self._left_out.keep(sources)
        for known in (self._before, self._in_force, self._missed):
            for name in known.keys() - sources:
                del known[name]

    def hide_types(self, name: str) -> None:
        self._left_out.rename(name, HIDDEN)
        missed = self._missed.get(name)
        if missed is not None and missed.types:
            self._missed[name] = replace(missed, types=Counter({HIDDEN: missed.types.total()}))

    def change(
        self, name: str, routes: Mapping[str, int], counts: Counts, in_force: InForce, *, now: float, at: float
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
            "types": _most_common(left_out.types),
            "newest": next((left_out.newest[kind] for kind, _ in left_out.types.most_common(1)), None),
            "missed": self._missed_json(name, at),
        }

    def _since(self, name: str, counts: Counts) -> dict[str, float]:
        before = self._before.get(name, {})
        counted = {what: counts[what] - before.get(what, 0.0) for what in self._what}
        return {"events": counts[self._all] - before.get(self._all, 0.0), **counted}

    def _keep(self, name: str, routes: Mapping[str, int], counted: Counts, *, now: float, at: float) -> None:
        number, left_out = int(counted[self._what[0]]), self._left_out.of(name)
        earlier = self._missed.get(name)
        if not number:
            if earlier is not None:  # if the fix before was wrong, these routes may match them
                self._missed[name] = replace(earlier, routes={**earlier.routes, **routes})
            return
        in_force = self._in_force.get(name)
        since = left_out.oldest - MARGIN
        kept = Missed(
            count=number,
            events=int(counted["events"]),
            since=since if in_force is None else min(since, in_force.since),
            until=now,
            routes=routes,
            types=left_out.types,
            ended=at,
        )
        if earlier is not None and at <= earlier.ended + self._remembered:
            # One replay is to recover all of it, so a fix in two steps forgets nothing.
            kept = Missed(
                count=kept.count + earlier.count,
                events=kept.events + earlier.events,
                since=min(kept.since, earlier.since),
                until=now,
                routes={**earlier.routes, **kept.routes},
                types=kept.types + earlier.types,
                ended=at,
            )
        self._missed[name] = kept

    def _missed_json(self, name: str, at: float) -> Mapping[str, Any] | None:
        missed = self._missed.get(name)
        if missed is None or at > missed.ended + self._remembered:
            return None
        is_bounded = len(missed.routes) <= MAX_ROUTES
        return {
            "count": missed.count,
            "events": missed.events,
            "since": missed.since,
            "until": missed.until,
            "routes": sorted(missed.routes) if is_bounded else None,
            "fan_out": {name: number for name, number in missed.routes.items() if number > 1} if is_bounded else {},
            "types": _most_common(missed.types),
        }


def _most_common(types: Counter[str]) -> list[tuple[str, int]]:
    return types.most_common(MAX_TYPES)
