"""How many events each route has matched since its condition changed, and before."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import exp, lgamma
from typing import Any

from gateway.ops.source_counts import InForce
from gateway.rules.rules import Route, Rules
from gateway.rules.watch import Changes
from gateway.telemetry.route_matches import RouteMatches


@dataclass(frozen=True, slots=True, kw_only=True)
class _Start:
    """When a route's condition became what it is, what had changed, and the totals of that moment."""

    events: int
    matched: int
    in_force: InForce
    changed: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Past:
    """What a route matched under the last condition under which it matched something; `event` is the last."""

    events: int
    matched: int
    event: str

    def chance_of_none(self, events: int) -> float:
        """Return how probable it is to match none of that many more events, if nothing has changed.

        Of all ways to distribute the matches over both periods it is the share that has them all in the first: the
        hypergeometric distribution.
        """
        before, matched = self.events, min(self.matched, self.events)
        return exp(_log_ways(before, matched) - _log_ways(before + events, matched))


def _log_ways(events: int, matched: int) -> float:
    return lgamma(events + 1) - lgamma(matched + 1) - lgamma(events - matched + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Missed:
    """Events none of which a route matched, under conditions that have been changed since.

    `ended` is when, by the monotonic clock: after an hour they are forgotten.
    """

    events: int
    since: float
    until: float
    before: Past
    ended: float


class RouteCounts:
    """Counts of each route since its condition changed, or since the process started.

    A condition is also changed by the source's `id`, `type` or `key`, which it may refer to. What a route matched
    before says nothing about other sources: if `from` changes, it is a new route.
    """

    def __init__(self, totals: RouteMatches, *, remembered: float) -> None:
        self._totals = totals
        self._remembered = remembered
        self._starts: dict[str, _Start] = {}
        self._before: dict[str, Past] = {}
        self._missed: dict[str, _Missed] = {}

    def change(self, changes: Changes, old: Rules, new: Rules, in_force: InForce, *, now: float, at: float) -> None:
        """Restart the counts of the routes whose conditions changed. `now` is the log's time, `at` is monotonic."""
        self._totals.keep(new.sources.keys(), new.routes.keys())
        for name in old.routes.keys() - new.routes.keys():
            self._forget(name)
        keys = dict(text.split(": ", 1) for text in changes.changed)
        for name in changes.conditions:
            route, before = new.routes[name], old.routes.get(name)
            if before is None or set(before.sources) != set(route.sources):
                self._forget(name)
            else:
                self._end(name, route, now=now, at=at)
            about = [f"route {name}", *[f"source {source}" for source in route.sources]]
            self._starts[name] = _Start(
                events=self._events(route.sources),
                matched=self._totals.matched.get(name, 0),
                in_force=in_force,
                changed=tuple([f"{each}: {keys[each]}" for each in about if each in keys]),
            )

    def status(self, rules: Rules, *, now: float, at: float) -> Mapping[str, Any]:
        """Return the routes that have matched nothing since their conditions changed, as JSON for `/status`.

        One that is disabled, has expired, takes a sample or catches what others leave isn't among them: it may well
        match nothing.

        `new` has those that matched nothing before either, grouped, as they may be thousands; `changed` those that did,
        and `missed` what such routes didn't match for a while, within the last hour.
        """
        groups: dict[tuple[float | None, int, tuple[str, ...]], list[str]] = {}
        changed: list[Mapping[str, Any]] = []
        for name, route in rules.routes.items():
            if route.catch_all or (route.eligibility is not None and not route.eligibility.takes_all(now)):
                continue
            start, matched = self._starts.get(name), self._totals.matched.get(name, 0)
            if matched > (0 if start is None else start.matched):
                continue
            before = self._before.get(name)
            if start is not None and before is not None:
                changed.append(self._changed_status(route, start, before))
                continue
            since, base = (None, 0) if start is None else (start.in_force.since, start.events)
            groups.setdefault((since, base, route.sources), []).append(name)
        return {
            "new": [
                {
                    "since": since,
                    "sources": sources,
                    "events": self._events(sources) - base,
                    "event": self._last_event(sources),
                    "routes": names,
                }
                for (since, base, sources), names in groups.items()
            ],
            "changed": changed,
            "missed": [
                {
                    "route": name,
                    "sources": rules.routes[name].sources,
                    "events": missed.events,
                    "since": missed.since,
                    "until": missed.until,
                    "before": asdict(missed.before),
                }
                for name, missed in self._missed.items()
                if at <= missed.ended + self._remembered
            ],
        }

    def _changed_status(self, route: Route, start: _Start, before: Past) -> Mapping[str, Any]:
        return {
            "route": route.name,
            "sources": route.sources,
            "events": self._events(route.sources) - start.events,
            "since": start.in_force.since,
            "loaded_at": start.in_force.loaded_at,
            "changed": start.changed,
            "before": asdict(before),
        }

    def _end(self, name: str, route: Route, *, now: float, at: float) -> None:
        """Keep what a route has matched under the condition that is replaced, or that it has matched nothing."""
        start, total = self._starts.get(name), self._totals.matched.get(name, 0)
        events = self._events(route.sources) - (0 if start is None else start.events)
        matched = total - (0 if start is None else start.matched)
        before = self._before.get(name)
        if matched:
            self._before[name] = Past(events=events, matched=matched, event=self._totals.last_match[name])
        elif before is not None and start is not None and events:
            missed = _Missed(events=events, since=start.in_force.since, until=now, before=before, ended=at)
            earlier = self._missed.get(name)
            if earlier is not None and at <= earlier.ended + self._remembered:
                # One replay is to recover all of it, so a fix in two steps forgets nothing.
                missed = replace(missed, events=events + earlier.events, since=earlier.since, before=earlier.before)
            self._missed[name] = missed

    def _forget(self, name: str) -> None:
        for kept in (self._starts, self._before, self._missed):
            kept.pop(name, None)

    def _events(self, sources: Iterable[str]) -> int:
        return sum([self._totals.events.get(source, 0) for source in sources])

    def _last_event(self, sources: Sequence[str]) -> str | None:
        return next((self._totals.last_event[name] for name in sources if name in self._totals.last_event), None)
