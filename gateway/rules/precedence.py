"""Which other routes decide whether a route gets an event: those with `stop` above it; for a `catch_all`, all."""

import hashlib
import json
from collections import defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass

from gateway.rules.conditions import written
from gateway.rules.rules import Route
from gateway.turns import give_way


@dataclass(frozen=True, slots=True)
class Deciders:
    """The routes that decide about a route, as a digest of what they take. `is_hidden`: some contain secrets."""

    digest: str
    is_hidden: bool


def deciders(routes: Iterable[Route], hidden: Collection[str] = ()) -> dict[str, Deciders]:
    """Return the deciders of each route that has some. `hidden` are the routes whose conditions contain secrets."""
    known = list(routes)
    every, above = _Chains(hidden), _Chains(hidden)
    if any(route.catch_all for route in known):
        for route in known:
            if not route.catch_all:
                every.add(route)
    found: dict[str, Deciders] = {}
    for route in known:
        give_way()
        chains = [above.of(route, is_catch_all=route.catch_all)]
        if route.catch_all:
            chains.append(every.of(route, is_catch_all=False))
        digests = [digest for digest, _ in chains if digest]
        if digests:
            is_hidden = any(is_hidden for _, is_hidden in chains)
            found[route.name] = Deciders(_digest("".join(digests)), is_hidden)
        if route.stop:
            above.add(route)
    return found


class _Chains:
    """For each source, a chain of digests of its routes in order."""

    def __init__(self, hidden: Collection[str]) -> None:
        self._hidden = hidden
        self._digests: defaultdict[tuple[str, bool], str] = defaultdict(str)
        self._with_hidden: set[tuple[str, bool]] = set()

    def add(self, route: Route) -> None:
        for source in set(route.sources):
            key = source, route.catch_all
            # Digests are written to the log, where a short secret could be guessed from its digest.
            condition = "hidden" if route.name in self._hidden else _condition(route)
            self._digests[key] = _digest(self._digests[key] + condition)
            if route.name in self._hidden:
                self._with_hidden.add(key)

    def of(self, route: Route, *, is_catch_all: bool) -> tuple[str, bool]:
        """Return a digest of the routes before this one, "" if there are none, and whether any is hidden."""
        keys = [(source, is_catch_all) for source in sorted(set(route.sources))]
        digests = [f"{source} {digest}" for source, _ in keys if (digest := self._digests.get((source, is_catch_all)))]
        return " ".join(digests), not self._with_hidden.isdisjoint(keys)


def _condition(route: Route) -> str:
    return json.dumps(
        (
            None if route.match is None else written(route.match),
            None if route.when is None else route.when.text,
            None if route.eligibility is None else route.eligibility.written(),
        )
    )


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
