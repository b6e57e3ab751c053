"""What the routes of one version of the rules match, as a string that the log keeps and a later process understands.

Two versions with the same routes, conditions, destinations and sources with `dedupe` are one edition: URLs, secrets and
retries don't decide where an event goes. A condition that holds what a reference was replaced with isn't told to the
log: of its route it is only known that it was there.
"""

import hashlib
import json
import zlib
from base64 import b64decode, b64encode
from dataclasses import dataclass
from typing import Any

from gateway.model import ExpressionError, RetryPolicy, RulesError
from gateway.rules.conditions import parse_condition, written
from gateway.rules.expressions import Expression
from gateway.rules.rules import Edition, Route, Rules

SHORTEST = 4
"""Characters of what a reference was replaced with; what is shorter may stand anywhere by chance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteThen:
    """A route of an edition. `route` has its condition, and is None where that isn't known."""

    sources: frozenset[str]
    deduped: frozenset[str]
    """Those of them of which copies were let go."""
    destinations: frozenset[str]
    route: Route | None


def edition_of(rules: Rules) -> Edition:
    """Return the edition of rules: some 30 ms for a thousand routes, unless they have been read from a file."""
    if rules.edition is not None:
        return rules.edition
    secrets = [secret for secret in rules.resolved if len(secret) >= SHORTEST]
    deduped = {name for name, source in rules.sources.items() if source.dedupe is not None}
    routes = {name: _text_of(route, deduped, secrets) for name, route in sorted(rules.routes.items())}
    digest = hashlib.blake2b(digest_size=8)
    for name, text in routes.items():
        digest.update(f"{name}\0{text}\0".encode("utf-8", "surrogatepass"))
    return Edition(digest.hexdigest(), routes)


def encode(edition: Edition, base: Edition | None) -> str:
    """Write an edition, or what distinguishes it from another one."""
    before = {} if base is None else dict(base.routes)
    told = {
        "routes": {name: text for name, text in edition.routes.items() if before.get(name) != text},
        "gone": [name for name in before if name not in edition.routes],
    }
    return b64encode(zlib.compress(json.dumps(told).encode())).decode()


def decode(name: str, text: str, base: Edition | None) -> Edition:
    """Read what `encode` wrote. Raises ValueError."""
    try:
        told = json.loads(zlib.decompress(b64decode(text)))
        routes = {} if base is None else {**base.routes}
        for each in told["gone"]:
            routes.pop(each, None)
        return Edition(name, routes | told["routes"])
    except (zlib.error, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"expected an edition of the rules, got {error!r}") from error


def route_then(name: str, text: str) -> RouteThen:
    """Read a route of an edition; what another version of the gateway wrote may have a condition that we can't read."""
    told = json.loads(text)
    sources, destinations = told["from"], told["to"]
    route: Route | None = None
    if "hidden" not in told:
        try:
            route = Route(
                name=name,
                sources=tuple(sources),
                match=parse_condition(told["match"]) if "match" in told else None,
                when=Expression(told["when"]) if "when" in told else None,
                destinations=tuple(destinations),
                request=None,
                retry=RetryPolicy(),
            )
        except (ExpressionError, RulesError, TypeError, AttributeError):
            route = None
    return RouteThen(
        sources=frozenset(sources),
        deduped=frozenset(told.get("dedupe", ())),
        destinations=frozenset(destinations),
        route=route,
    )


def _text_of(route: Route, deduped: set[str], secrets: list[str]) -> str:
    told: dict[str, Any] = {"from": sorted(set(route.sources)), "to": sorted(set(route.destinations))}
    if not deduped.isdisjoint(route.sources):
        told["dedupe"] = sorted(deduped.intersection(route.sources))
    condition: dict[str, Any] = {}
    if route.match is not None:
        condition["match"] = written(route.match)
    if route.when is not None:
        condition["when"] = route.when.text
    plain = json.dumps(condition, ensure_ascii=False)
    if any(secret in plain or json.dumps(secret)[1:-1] in plain for secret in secrets):
        condition = {"hidden": True}
    return json.dumps(told | condition, separators=(",", ":"))
