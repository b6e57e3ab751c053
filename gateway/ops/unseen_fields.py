"""Finds fields that rules read and recent events never had: most often they are mistyped, or the sender has changed.

An event tells of a field what it would of the whole condition: only those count for which everything else holds.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from gateway.model import Event, ExpressionError, MissingFieldError
from gateway.ops.path_scan import read_paths
from gateway.ops.rule_documents import rule_documents
from gateway.rules.conditions import AllOf, Condition, Exists, Field, UndecidedMatchError, Unless
from gateway.rules.conditions import Path as ConditionPath
from gateway.rules.event_view import ABSENT, EventView
from gateway.rules.expressions import Expression
from gateway.rules.foreach import expand
from gateway.rules.rules import Route, Rules
from gateway.rules.scanner import FieldPath
from gateway.rules.yaml_document import Node, Problem

_Key = tuple[str, str, str]
"""A route, the key of it that reads a field, and the field's path."""

MIN_EVENTS = 10
"""Events that lack a field, of those that have all else, from which it is told."""
MAX_EVENTS = 500
"""Events of a source, the newest, of which it is asked what they lack; all others are asked for what these lack."""


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
    _has: set[_Key] = field(default_factory=set)
    _lacks: Counter[_Key] = field(default_factory=Counter)
    _paths: dict[_Key, ConditionPath | FieldPath] = field(default_factory=dict)

    def add(self, event: Event) -> None:
        """Look at an event; call it for the newest first."""
        self._events[event.source] += 1
        routes = self._routes_of(event.source)
        if self._events[event.source] > MAX_EVENTS:
            self._look_for(self._missed_by(routes), event)
            return
        view = EventView.of(event)
        for route in routes:
            if route.eligibility is None or route.eligibility.holds(view):
                with suppress(UndecidedMatchError):
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

    def _missed_by(self, routes: Sequence[Route]) -> Sequence[tuple[Route, _Key]]:
        """Return what the newest events of a source lack, with the routes that read it."""
        by_name = {route.name: route for route in routes}
        return [(by_name[key[0]], key) for key in self._lacks if key[0] in by_name and key not in self._has]

    def _look_for(self, missed: Sequence[tuple[Route, _Key]], event: Event) -> None:
        if not missed:
            return
        view = EventView.of(event)
        for route, key in missed:
            path = self._paths[key]
            if view.get(path.root, path.segments) is ABSENT:
                continue
            with suppress(UndecidedMatchError):
                if key[1] == "match" or route.match is None or route.match.holds(view):
                    self._has.add(key)

    def _look(self, route: Route, view: EventView) -> None:
        fields = list(_fields(route.match))
        absent = [each for each in fields if each.path.of(view) is ABSENT]
        others_hold = all(each in absent or each.holds(view) for each in fields)
        for each in fields:
            key = route.name, "match", each.path.text
            if each not in absent:
                self._has.add(key)
            elif others_hold and len(absent) == 1:
                self._lack(key, each.path)
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
        """Note what an event has of what expressions read, and what they have no value without.

        Which field that is, evaluating tells: what `&&`, `||`, `?`, `has` and `default` do without isn't missed.
        """
        for expression in expressions:
            reads = read_paths(expression.text)
            absent = [each for each in reads if each.is_absent(view)]
            for each in reads:
                if each not in absent:
                    self._has.add((route, where, each.path.text))
            asked_for = [each for each in absent if not each.is_optional]
            missing = _missing(expression, view) if asked_for else ""
            found = next((each for each in asked_for if each.path.text == missing), None)
            if found is None and len(asked_for) == 1 and any(each.path.text == missing for each in absent):
                [found] = asked_for  # what is named was asked for by `has`, and ends with the same key
            if found is not None and all(each.part == found.part for each in asked_for):
                self._lack((route, where, found.path.text), found.path)

    def _lack(self, key: _Key, path: ConditionPath | FieldPath) -> None:
        self._lacks[key] += 1
        self._paths[key] = path


def _missing(expression: Expression, view: EventView) -> str:
    """Return the path for whose absence an expression has no value over an event; "" if it has one, or fails."""
    try:
        expression.evaluate(view)
    except MissingFieldError as error:
        return str(error).removesuffix(" isn't there")
    except ExpressionError:
        pass
    return ""


def located(rules: Rules, found: Iterable[tuple[Unseen, str]]) -> Iterator[Problem]:
    """Yield a warning for each field, with its message, at the key of the route that reads it.

    Reads the rule files again; a route that isn't there any more has no place.
    """
    nodes: dict[str, Node] = {}
    for _, root in rule_documents(rules.files):
        expand(root, [])
        routes = root.child("routes")
        for each in routes.value if routes is not None and isinstance(routes.value, list) else ():
            name = each.child("name")
            if name is not None:
                nodes.setdefault(str(name.value), each)
    for unseen, message in found:
        route = nodes.get(unseen.route)
        if route is None:
            path = f"routes.{unseen.route}.{unseen.where}"
            yield Problem(file="", line=0, column=0, path=path, message=message, code="unseen", severity="warning")
            continue
        key = route.child(unseen.where) or route
        node = key.child(unseen.path) or key
        yield node.problem("unseen", message, severity="warning", at_key=key is not route)


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
