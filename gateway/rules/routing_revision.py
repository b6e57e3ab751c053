"""Routing revisions: what the routes of one version of the rules match, as text that the log stores.

Two versions with the same routes, conditions, destinations and sources with `dedupe` are one revision: URLs, secrets
and retries don't decide where an event goes. A condition that contains a reference's value isn't written to the log;
only the existence of its route is.
"""

import hashlib
import json
import zlib
from base64 import b64decode, b64encode
from dataclasses import dataclass
from typing import Any, TypeGuard

from gateway.rules import eligibility
from gateway.rules.conditions import parse_condition, written
from gateway.rules.expressions import Expression
from gateway.rules.retry_policy import RetryPolicy
from gateway.rules.rules import Route, RoutingRevision, Rules

SHORTEST = 4
"""Minimum length of a reference's value to be searched for; a shorter one may occur anywhere by chance."""
MAX_BYTES = 8 << 20
"""Maximum bytes of a revision as JSON: 10,000 routes of 800 bytes. A larger one isn't decoded: compressed to 0.4 MB, it
might take 300 MB of memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PastRoute:
    """A route of an earlier revision. `route` has its condition; None if that isn't known."""

    sources: frozenset[str]
    deduped: frozenset[str]
    """Those of `sources` whose duplicates weren't delivered."""
    destinations: frozenset[str]
    route: Route | None


def routing_revision(rules: Rules) -> RoutingRevision:
    """Return the routing revision of rules: takes 30 ms for a thousand routes, unless it was computed when loading."""
    if rules.routing_revision is not None:
        return rules.routing_revision
    secrets = [secret for secret in rules.secret_values if len(secret) >= SHORTEST]
    deduped = {name for name, source in rules.sources.items() if source.dedupe is not None}
    routes = {name: _text_of(route, deduped, secrets) for name, route in sorted(rules.routes.items())}
    digest = hashlib.blake2b(digest_size=8)
    for name, text in routes.items():
        digest.update(f"{name}\0{text}\0".encode("utf-8", "surrogatepass"))
    return RoutingRevision(digest.hexdigest(), routes)


def encode(revision: RoutingRevision, base: RoutingRevision | None) -> str:
    """Encode a revision, or with a `base` its difference from that."""
    before = {} if base is None else dict(base.routes)
    document = {
        "routes": {name: text for name, text in revision.routes.items() if before.get(name) != text},
        "gone": [name for name in before if name not in revision.routes],
    }
    return b64encode(zlib.compress(json.dumps(document).encode())).decode()


def decode(name: str, text: str, base: RoutingRevision | None) -> RoutingRevision:
    """Read what `encode` wrote. Raises ValueError for anything else."""
    try:
        document = json.loads(_decompressed(b64decode(text)))
        changed, gone = document["routes"], document["gone"]
        routes = {} if base is None else {**base.routes}
        for each in gone:
            routes.pop(each, None)
        routes |= changed
    except (zlib.error, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"expected a revision of the rules, got {error!r}") from error
    if not all(isinstance(each, str) for each in routes.values()):
        raise ValueError("expected a revision of the rules, got routes that aren't text")
    return RoutingRevision(name, routes)


def _decompressed(packed: bytes) -> bytes:
    """Decompress a revision. Raises zlib.error, and ValueError for one that is cut off or too large."""
    unpacking = zlib.decompressobj()
    unpacked = unpacking.decompress(packed, MAX_BYTES)
    if not unpacking.eof:
        raise ValueError(f"expected a revision of the rules of at most {MAX_BYTES} B, got more, or only part of one")
    return unpacked


def past_route(name: str, text: str) -> PastRoute | None:
    """Read a route of a revision; None if it isn't what any version of the gateway writes.

    Another version's route may have a condition that this one can't read.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(document, dict):
        return None
    sources, destinations = document.get("from"), document.get("to")
    deduped = document.get("dedupe", [])
    if not (_are_texts(sources) and _are_texts(destinations) and _are_texts(deduped)):
        return None
    route: Route | None = None
    if "hidden" not in document:
        try:
            route = Route(
                name=name,
                sources=tuple(sources),
                match=parse_condition(document["match"]) if "match" in document else None,
                when=Expression(document["when"]) if "when" in document else None,
                destinations=tuple(destinations),
                request=None,
                retry=RetryPolicy(),
                eligibility=eligibility.read(document),
            )
        except Exception:  # noqa: BLE001 - the parsers expect what YAML can contain; this may be anything
            route = None
    return PastRoute(
        sources=frozenset(sources), deduped=frozenset(deduped), destinations=frozenset(destinations), route=route
    )


def _are_texts(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _text_of(route: Route, deduped: set[str], secrets: list[str]) -> str:
    document: dict[str, Any] = {"from": sorted(set(route.sources)), "to": sorted(set(route.destinations))}
    if not deduped.isdisjoint(route.sources):
        document["dedupe"] = sorted(deduped.intersection(route.sources))
    if route.eligibility is not None:
        document |= route.eligibility.written()
    condition: dict[str, Any] = {}
    if route.match is not None:
        condition["match"] = written(route.match)
    if route.when is not None:
        condition["when"] = route.when.text
    plain = json.dumps(condition, ensure_ascii=False)
    if any(secret in plain or json.dumps(secret)[1:-1] in plain for secret in secrets):
        condition = {"hidden": True}
    return json.dumps(document | condition, separators=(",", ":"))
