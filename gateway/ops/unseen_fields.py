"""Finds fields that rules read and recent events never had: most often they are mistyped, or the sender has changed.

An event tells of a field what it would of the whole condition: only those count for which everything else holds.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from gateway.model import Event, ExpressionError
from gateway.rules.conditions import AllOf, Condition, Exists, Field, Unless
from gateway.rules.event_view import ABSENT, EventView
from gateway.rules.expressions import Expression
from gateway.rules.rules import Route, Rules

MIN_EVENTS = 10
"""Events that lack a field, of those that have all else, from which it is told."""
MAX_EVENTS = 500
"""Events of a source that are looked at, the newest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Unseen:
    """A field that `lacking` events didn't have, and no event had; `where` is the key of the route that reads it."""

    route: str
    where: str
    path: str
    lacking: int


@dataclass(slots=True)
class UnseenFields:
    """What events have of the fields that the routes of some rules read."""

    rules: Rules
    _by_source: dict[str, Sequence[Route]] = field(default_factory=dict)
    _events: Counter[str] = field(default_factory=Counter)
    _has: set[tuple[str, str, str]] = field(default_factory=set)
    _lacks: Counter[tuple[str, str, str]] = field(default_factory=Counter)

    def add(self, event: Event) -> None:
        """Look at an event; call it for the newest first."""
        self._events[event.source] += 1
        if self._events[event.source] > MAX_EVENTS:
            return
        view = EventView.of(event)
        for route in self._routes_of(event.source):
            if route.eligibility is None or route.eligibility.holds(view):
                self._look(route, view)

    def _routes_of(self, source: str) -> Sequence[Route]:
        if source not in self._by_source:
            self._by_source[source] = [route for route in self.rules.routes.values() if source in route.sources]
        return self._by_source[source]

    def found(self) -> Iterator[Unseen]:
        """Yield the fields that no event had, in the order of the rules."""
        for key, lacking in sorted(self._lacks.items()):
            if key not in self._has and lacking >= MIN_EVENTS:
                route, where, path = key
                yield Unseen(route=route, where=where, path=path, lacking=lacking)

    def _look(self, route: Route, view: EventView) -> None:
        fields = list(_fields(route.match))
        absent = [each for each in fields if each.path.of(view) is ABSENT]
        others_hold = all(each in absent or each.holds(view) for each in fields)
        for each in fields:
            if each not in absent:
                self._has.add((route.name, "match", each.path.text))
            elif others_hold and len(absent) == 1:
                self._lacks[route.name, "match", each.path.text] += 1
        if route.match is not None and not route.match.holds(view):
            return
        if route.when is not None:
            self._look_at(route.name, "when", [route.when], view)
            try:
                if not route.when.is_true(view):
                    return
            except ExpressionError:
                return
        self._look_beyond_the_conditions(route, view)

    def _look_beyond_the_conditions(self, route: Route, view: EventView) -> None:
        if route.choice is not None:
            self._look_at(route.name, "to", route.choice.name.expressions, view)
        if route.debounce is not None:
            self._look_at(route.name, "debounce", [route.debounce.key], view)
        if route.split is not None:  # and its request is about an item
            self._look_at(route.name, "split", [route.split.items], view)
        elif route.request is not None:
            self._look_at(route.name, "request", route.request.expressions, view)

    def _look_at(self, route: str, where: str, expressions: Iterable[Expression], view: EventView) -> None:
        for path in {path.text: path for each in expressions for path in each.required_paths}.values():
            key = route, where, path.text
            if view.get(path.root, path.steps) is ABSENT:
                self._lacks[key] += 1
            else:
                self._has.add(key)


def _fields(condition: Condition | None) -> Iterator[Field]:
    """Yield what an event has to have, whatever else there is."""
    match condition:
        case Field(_, Exists() | Unless()):
            pass
        case Field():
            yield condition
        case AllOf(conditions):
            for each in conditions:
                yield from _fields(each)
        case _:
            pass
