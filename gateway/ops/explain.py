"""`gateway explain`: what the gateway would make of an event, by the very code that does it."""

import re
from dataclasses import dataclass, replace
from urllib.parse import urlsplit, urlunsplit

from gateway.engine.request import Outbound, compose
from gateway.model import Delivery, Event, ExpressionError, Headers, UsageError, delivery_id
from gateway.rules.expressions import View, did_you_mean
from gateway.rules.identify import Identifier
from gateway.rules.rules import Destination, Route, Rules
from gateway.verify.schemes import Request

MASK = "***"
# A part of a path that long, of letters and digits, is a token: those of Slack, Discord and Telegram stand there.
TOKEN = re.compile(r"(?=.*[0-9])(?=.*[A-Za-z])[A-Za-z0-9_:.=-]{16,}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """The first request of one delivery; `problem` says why there would be none, which dead-letters it."""

    destination: str
    request: Outbound | None
    problem: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExplainedRoute:
    """Whether a route matches, why, and what it would send."""

    name: str
    is_matched: bool
    reason: str
    requests: tuple[Planned, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Explained:
    """An event and what each route would do with it, in file order."""

    event: Event
    routes: tuple[ExplainedRoute, ...]


def explain(
    rules: Rules, *, source: str, headers: Headers, query: str, body: bytes, now: float, is_secret_shown: bool = False
) -> Explained:
    """Tell what would become of a request to this source. Signatures aren't looked at.

    Raises UsageError for a source that the rules don't have, RefusedError (400) where the ingress couldn't tell the
    event's id, type or key. Without `is_secret_shown` the destinations' headers, signatures, and what may be a
    credential in their URLs are masked.
    """
    sender = rules.sources.get(source)
    if sender is None:
        raise UsageError(f"--source: unknown source {source!r}{did_you_mean(source, rules.sources)}")
    request = Request(method="POST", path=sender.path, query=query, headers=headers, body=body)
    event = Identifier(sender).event(request, received_at=now)
    view = View.of(event)
    failed = {route.name for route, error in rules.table.match(view) if error is not None}
    routes = []
    for found in rules.table.explain(view):
        requests: list[Planned] = []
        if found.matched and found.name not in failed:
            route = rules.routes[found.name]
            requests = [_plan(event, route, rules.destinations[name], now) for name in route.destinations]
            if not is_secret_shown:
                requests = [_masked(planned, rules.destinations[planned.destination]) for planned in requests]
        routes.append(
            ExplainedRoute(name=found.name, is_matched=found.matched, reason=found.reason, requests=tuple(requests))
        )
    return Explained(event=event, routes=tuple(routes))


def masked_url(url: str) -> str:
    """Return a URL without what may be a credential: its user, its query's values, tokens in its path."""
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    path = "/".join([MASK if TOKEN.fullmatch(part) else part for part in parts.path.split("/")])
    query = "&".join([f"{part.partition('=')[0]}={MASK}" for part in parts.query.split("&")]) if parts.query else ""
    return urlunsplit(parts._replace(netloc=f"{MASK}@{host}" if at and user else parts.netloc, path=path, query=query))


def _plan(event: Event, route: Route, destination: Destination, now: float) -> Planned:
    delivery = Delivery(
        id=delivery_id(event.id, route.name, destination.name),
        event=event,
        route=route.name,
        destination=destination.name,
    )
    try:
        request = compose(delivery, destination, route.request, now=now)
    except ExpressionError as error:
        return Planned(destination=destination.name, request=None, problem=str(error))
    return Planned(destination=destination.name, request=request)


def _masked(planned: Planned, destination: Destination) -> Planned:
    if planned.request is None:
        return planned
    secret = {name.lower().encode() for name, _ in destination.headers}
    if destination.sign:
        secret.add(b"webhook-signature")
    headers = tuple(
        [(name, MASK.encode() if name.lower() in secret else value) for name, value in planned.request.headers]
    )
    return replace(planned, request=replace(planned.request, url=masked_url(planned.request.url), headers=headers))
