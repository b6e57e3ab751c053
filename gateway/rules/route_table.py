"""Finds the routes that match an event, and explains why the others don't.

Conditions (`match:`) are parsed into a closed tree. `RouteTable` finds candidates through hash indexes, and evaluates
the conditions of only those. Values are compared as in JSON: no coercion, 1 equals 1.0, true isn't 1. A missing field
satisfies only `exists: false` and conditions under `not`.
"""

import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Generic, Protocol, TypeVar

from gateway.model import ExpressionError, MissingFieldError
from gateway.rules.conditions import AllOf, AnyOf, Condition, Field, OneOf, Path, Seen, UndecidedMatchError, key_of
from gateway.rules.eligibility import Eligibility
from gateway.rules.event_view import EventView
from gateway.rules.expressions import Expression
from gateway.turns import give_way

_K = TypeVar("_K")
_R = TypeVar("_R", bound="Matchable")
SELECTIVE = 4  # With at most this many candidates per value of one path, a key of several paths isn't worth it.
MAX_COMBINATIONS = 64  # Maximum keys under which one route is indexed: the product of its lists.


class Matchable(Protocol):
    """The parts of a route that the table needs."""

    @property
    def name(self) -> str: ...

    @property
    def sources(self) -> Sequence[str]: ...

    @property
    def match(self) -> Condition | None: ...

    @property
    def when(self) -> Expression | None: ...

    @property
    def eligibility(self) -> Eligibility | None: ...

    @property
    def stop(self) -> bool: ...

    @property
    def catch_all(self) -> bool: ...


class RouteTable(Generic[_R]):
    """The routes of one version of the rules, in file order.

    The cost of `match` doesn't grow with the number of routes, but with the number of different sets of paths that they
    compare, plus the candidates. A route is indexed by the value of its most selective equality, or of several together
    if none is selective. Globs are indexed by their fixed prefix (`*.x` has none, so it is checked for every string).
    Routes that can't be indexed (other tests, `not`, an `any_of` with such a branch) are checked one by one.
    """

    def __init__(self, routes: Iterable[_R]) -> None:
        self._routes = tuple(routes)
        numbers: dict[str, list[int]] = {}
        catch_alls: dict[str, list[int]] = {}
        for number, route in enumerate(self._routes):
            for source in dict.fromkeys(route.sources):
                (catch_alls if route.catch_all else numbers).setdefault(source, []).append(number)
        self._indexes = {source: _Index(self._routes, of_source) for source, of_source in numbers.items()}
        self._catch_alls = {source: _Index(self._routes, of_source) for source, of_source in catch_alls.items()}

    def match(self, view: EventView) -> list[tuple[_R, ExpressionError | None]]:
        """Return the routes that take an event, in file order.

        If a route's `match` or `when` failed, but not because of a missing field, it is returned with the error. Its
        deliveries are dead-lettered, since it is unknown whether it matches.
        """
        matched = self._matching(self._indexes.get(view.source), view)
        return matched or self._matching(self._catch_alls.get(view.source), view)

    def _matching(self, index: "_Index | None", view: EventView) -> list[tuple[_R, ExpressionError | None]]:
        taken: list[tuple[_R, ExpressionError | None]] = []
        for number in () if index is None else index.candidates(view):
            route = self._routes[number]
            if route.eligibility is not None and not route.eligibility.holds(view):
                continue
            error: ExpressionError | None = None
            try:
                if route.match is not None and not route.match.holds(view):
                    continue
                if route.when is not None and not route.when.is_true(view):
                    continue
            except ExpressionError as failure:
                error = failure
            taken.append((route, error))
            if route.stop:
                break
        return taken

    def explain(
        self, view: EventView, matched: Sequence[tuple[_R, ExpressionError | None]], seen: Seen = str
    ) -> list["Explanation"]:
        """Return for every route whether it takes an event, and the first condition that fails.

        `matched` is the result of `match` for the same event, with a different view: each view has its own budget for
        expressions. `seen` returns what may be shown of a text in the event, of which the beginning is then shown.
        Raises ValueError for the result of another event.
        """
        errors = {route.name: error for route, error in matched}
        last = matched[-1][0] if matched else None
        is_below = False
        explanations: list[Explanation] = []
        for route in self._routes:
            if route.name in errors:
                is_below = is_below or (last is not None and last.name == route.name)
                explanations.append(_taken(route, errors[route.name]))
            else:
                reason = _why_not(route, view, seen, _why_unasked(route, last, is_below=is_below))
                explanations.append(Explanation(name=route.name, matched=False, reason=reason))
        return explanations


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Whether a route matches, and why: `matched`, or the first condition that doesn't hold."""

    name: str
    matched: bool
    reason: str


def _taken(route: Matchable, error: ExpressionError | None) -> Explanation:
    failed = str(error) if isinstance(error, UndecidedMatchError) else f"when: failed: {error}"
    reason = "matched" if error is None else failed
    return Explanation(name=route.name, matched=True, reason=reason)


def _why_unasked(route: Matchable, last: Matchable | None, *, is_below: bool) -> str | None:
    """Return why `match` didn't ask for a route's conditions; None if it did.

    `last` is the last route that takes the event; `is_below` is whether the route is below that.
    """
    if last is None:
        return None
    if route.catch_all and not last.catch_all:
        return f"catch_all: {last.name} takes it"
    # Those without `catch_all` have all been asked before any with it.
    is_stopped = last.stop and is_below and route.catch_all == last.catch_all
    return f"stop: {last.name}, above it, takes it" if is_stopped else None


def of_other_sources(expected: Sequence[str], source: str) -> str:
    """Return the reason of a route that takes no events of a source, but of others."""
    return f"from: expected {' or '.join(expected) or 'another source'}, got {source}"


def _why_not(route: Matchable, view: EventView, seen: Seen, why_unasked: str | None) -> str:
    """Return the first condition that fails, or why `match` didn't ask for them.

    Where this view's budget doesn't suffice, a condition that `match` asked for is false: had the budget ended there,
    the route would take the event. Raises ValueError if it should take it.
    """
    give_way()
    if view.source not in route.sources:
        return of_other_sources(route.sources, view.source)
    if route.eligibility is not None and (reason := route.eligibility.why_not(view)):
        return reason
    try:
        if route.match is not None and (reason := route.match.why_not(view, seen)):
            return reason
    except UndecidedMatchError:
        what = "match" if route.when is None else "match or when"
        return why_unasked or f"{what}: false, and too much to compute to say which of its conditions"
    if route.when is not None and (reason := _why_false(route.when, view, was_asked=why_unasked is None)):
        return reason
    if why_unasked is None:
        raise ValueError(f"{route.name}: expected to take the event, as all its conditions hold, got others that do")
    return why_unasked


def _why_false(when: Expression, view: EventView, *, was_asked: bool) -> str | None:
    """Return why a condition is false; None if it holds or, unless `match` asked for it, can't be computed."""
    try:
        if when.evaluate(view) is not False:
            return None
    except MissingFieldError as error:
        return f"when: {error}"
    except ExpressionError:
        if not was_asked:
            return None
    return f"when: false: {when.text}"


class _Index:
    """Finds candidates among the routes of one source: all that match, and few that don't."""

    def __init__(self, routes: Sequence[Matchable], numbers: Iterable[int]) -> None:
        self._unindexed: list[int] = []
        self._exact: dict[tuple[Path, ...], dict[object, list[int]]] = {}
        self._prefixes: dict[Path, dict[str, list[int]]] = {}
        alternatives = [(number, _alternatives(routes[number].match)) for number in numbers]
        bucket_sizes: Counter[tuple[Path, object]] = Counter()
        popularity: Counter[Path] = Counter()
        for _, branches in alternatives:
            give_way()
            for branch in branches:
                popularity.update(branch.keys())
                bucket_sizes.update((path, key) for path, test in branch.items() for key in _keys(test))
        for number, branches in alternatives:
            give_way()
            if not branches:
                self._unindexed.append(number)
            for branch in branches:
                self._add_route(number, branch, bucket_sizes, popularity)
        self._lengths = {path: sorted({len(prefix) for prefix in of_path}) for path, of_path in self._prefixes.items()}

    def candidates(self, view: EventView) -> Sequence[int]:
        """Return the indexes of routes, ascending."""
        found = self._unindexed.copy()
        for paths, buckets in self._exact.items():
            if len(paths) == 1:
                found += buckets.get(key_of(paths[0].of(view)), ())
            else:
                found += buckets.get(tuple([key_of(path.of(view)) for path in paths]), ())
        for path, prefixes in self._prefixes.items():
            value = path.of(view)
            if type(value) is str:
                for length in self._lengths[path]:
                    found += prefixes.get(value[:length], ())
        return found if len(found) < 2 else sorted(set(found))  # noqa: PLR2004 - nothing to sort

    def _add_route(
        self,
        number: int,
        branch: Mapping[Path, OneOf],
        bucket_sizes: Mapping[tuple[Path, object], int],
        popular: Mapping[Path, int],
    ) -> None:
        def largest_bucket(path: Path) -> int:
            return max(bucket_sizes[path, key] for key in _keys(branch[path]))

        # Among equally selective paths, prefer the one that most routes have, so that few paths have to be looked up.
        best = min(branch, key=lambda path: (largest_bucket(path), -popular[path], path.text))
        exact = sorted([path for path in branch if not branch[path].globs], key=lambda path: len(branch[path].keys))
        while prod([len(branch[path].keys) for path in exact]) > MAX_COMBINATIONS:
            exact.pop()
        if largest_bucket(best) > SELECTIVE and len(exact) > 1:
            paths = tuple(sorted(exact, key=lambda path: path.text))
            for keys in itertools.product(*[branch[path].keys for path in paths]):
                _add(self._exact.setdefault(paths, {}), keys, number)
            return
        for key in branch[best].keys:
            _add(self._exact.setdefault((best,), {}), key, number)
        for glob in branch[best].globs:
            _add(self._prefixes.setdefault(best, {}), glob.prefix, number)


def _add(buckets: dict[_K, list[int]], key: _K, number: int) -> None:
    bucket = buckets.setdefault(key, [])
    if bucket[-1:] != [number]:
        bucket.append(number)


def _keys(test: OneOf) -> Iterator[object]:
    yield from test.keys
    yield from [(glob.prefix,) for glob in test.globs]


def _alternatives(condition: Condition | None) -> list[dict[Path, OneOf]]:
    """Return sets of equalities, of which at least one holds if the condition does; empty if there are none."""
    give_way()
    match condition:
        case Field(path, OneOf() as test):
            return [{path: test}]
        case AllOf(conditions):
            several = [_alternatives(part) for part in conditions]
            shared = {path: test for branches in several if len(branches) == 1 for path, test in branches[0].items()}
            branches = min([one for one in several if len(one) > 1], key=len, default=[shared] if shared else [])
            return [shared | branch for branch in branches]
        case AnyOf(conditions):
            several = [_alternatives(part) for part in conditions]
            return [branch for branches in several for branch in branches] if all(several) else []
        case _:
            return []
