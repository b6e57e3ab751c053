"""Routing revisions: what the routes of one version of the rules match, as text that the log stores.

Two versions with the same routes, conditions, destinations and sources with `dedupe` are one revision: URLs, secrets
and retries don't decide where an event goes. A condition that contains a reference's value isn't written to the log;
only the existence of its route is.
"""

import hashlib
import json
import zlib
from base64 import b64decode, b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeGuard

import orjson

from gateway.rules import eligibility
from gateway.rules.conditions import parse_condition, written
from gateway.rules.destination_choice import read_choice
from gateway.rules.expressions import Expression
from gateway.rules.precedence import deciders
from gateway.rules.retry_policy import RetryPolicy
from gateway.rules.rules import Route, RoutingRevision, Rules
from gateway.turns import give_way

SHORTEST = 4
"""Minimum length of a reference's value to search for. Shorter ones may occur anywhere by chance."""
MAX_BYTES = 8 << 20
"""Maximum bytes of a revision as JSON: 10,000 routes of 800 bytes. A larger one isn't decoded: compressed to 0.4 MB, it
might take 300 MB of memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PastRoute:
    """A route of an earlier revision. `route` is None if its condition isn't known."""

    sources: frozenset[str]
    deduped: frozenset[str]
    """The `sources` with `dedupe`."""
    destinations: frozenset[str]
    route: Route | None
    is_alone: bool = True
    """Whether no other route decides what it takes, by a `stop` above it or because this is a `catch_all`."""


def routing_revision(rules: Rules) -> RoutingRevision:
    """Return the routing revision of rules. Takes 30 ms for a thousand routes, unless it was computed when loading."""
    if rules.routing_revision is not None:
        return rules.routing_revision
    secrets = [secret for secret in rules.secret_values if len(secret) >= SHORTEST]
    deduped = {name for name, source in rules.sources.items() if source.dedupe is not None}
    routes = dict(sorted(_texts(rules, deduped, secrets)))
    digest = hashlib.blake2b(digest_size=8)
    for name, text in routes.items():
        give_way()
        digest.update(f"{name}\0{text}\0".encode("utf-8", "surrogatepass"))
    return RoutingRevision(digest.hexdigest(), routes)


def _texts(rules: Rules, deduped: set[str], secrets: list[str]) -> Iterator[tuple[str, str]]:
    """Yield each route's name and text, with a digest of the routes that decide whether it gets an event."""
    own = {name: _document_of(route, deduped, secrets) for name, route in rules.routes.items()}
    hidden = [name for name, document in own.items() if "hidden" in document]
    others = deciders(rules.routes.values(), hidden)
    for name, document in own.items():
        give_way()
        if (decided := others.get(name)) is not None:
            document["others"] = decided.digest
            if decided.is_hidden:
                document["hidden"] = True
        yield name, json.dumps(document, separators=(",", ":"))


def encode(revision: RoutingRevision, base: RoutingRevision | None) -> str:
    """Encode a revision; with a `base`, only the difference from it."""
    before = {} if base is None else dict(base.routes)
    document = {
        "routes": {name: text for name, text in revision.routes.items() if before.get(name) != text},
        "gone": [name for name in before if name not in revision.routes],
    }
    return b64encode(zlib.compress(_dumps(document), level=1)).decode()


def _dumps(document: object) -> bytes:
    try:
        return orjson.dumps(document)
    except TypeError:  # orjson accepts no surrogates
        return json.dumps(document).encode()


def _loads(text: bytes) -> Any:  # noqa: ANN401 # what JSON has
    """Parse JSON with orjson, five times as fast, unless it has surrogates: this runs on the event loop."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return json.loads(text)


def decode(name: str, text: str, base: RoutingRevision | None) -> RoutingRevision:
    """Parse the output of `encode`. Raises ValueError for anything else."""
    try:
        document = _loads(_decompressed(b64decode(text)))
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
    """Decompress a revision. Raises zlib.error, and ValueError if it is truncated or too large."""
    unpacking = zlib.decompressobj()
    unpacked = unpacking.decompress(packed, MAX_BYTES)
    if not unpacking.eof:
        raise ValueError(f"expected a revision of the rules of at most {MAX_BYTES} B, got more, or only part of one")
    return unpacked


def past_route(name: str, text: str) -> PastRoute | None:
    """Parse a route of a revision; None if no version of the gateway writes that.

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
                **_choice_of(document.get("choice"), destinations),
            )
        except Exception:  # noqa: BLE001 - the parsers expect what YAML can contain; this may be anything
            route = None
    return PastRoute(
        sources=frozenset(sources),
        deduped=frozenset(deduped),
        destinations=frozenset(destinations),
        route=route,
        is_alone="others" not in document,
    )


def _choice_of(written: object, destinations: list[str]) -> dict[str, Any]:
    """Parse the fields of a route for the choice of a destination. Raises ValueError for anything else."""
    if written is None:
        return {}
    if not isinstance(written, dict) or not _are_texts(written.get("fixed")):
        raise ValueError("expected a choice of destinations")
    return {"choice": read_choice(written, destinations), "fixed": tuple(written["fixed"])}


def is_decided_by_others(text: str) -> bool:
    """Return whether a route of a revision takes an event only if certain others don't."""
    return "others" in json.loads(text)


def _are_texts(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, list) and all(isinstance(each, str) for each in value)


def _document_of(route: Route, deduped: set[str], secrets: list[str]) -> dict[str, Any]:
    give_way()
    document: dict[str, Any] = {"from": sorted(set(route.sources)), "to": sorted(set(route.destinations))}
    if not deduped.isdisjoint(route.sources):
        document["dedupe"] = sorted(deduped.intersection(route.sources))
    if route.eligibility is not None:
        document |= route.eligibility.written()
    document |= {key: True for key in ("stop", "catch_all") if getattr(route, key)}
    condition: dict[str, Any] = {}
    if route.choice is not None:
        condition["choice"] = route.choice.written() | {"fixed": route.fixed}
    if route.match is not None:
        condition["match"] = written(route.match)
    if route.when is not None:
        condition["when"] = route.when.text
    plain = json.dumps(condition, ensure_ascii=False)
    if any(secret in plain or json.dumps(secret)[1:-1] in plain for secret in secrets):
        condition = {"hidden": True}
    return document | condition
