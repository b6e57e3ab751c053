"""Sources, destinations and routes of the active rules, with their state; and who asks."""

import asyncio
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import replace
from math import isinf
from typing import NamedTuple, TypeVar
from urllib.parse import urlsplit

import orjson

from gateway.access.principal import Principal
from gateway.api import shapes
from gateway.api.backend import Backend, must_be_available
from gateway.api.cursors import decode_cursor, encode_cursor
from gateway.api.overview import Overview
from gateway.api.problems import ApiError, Code, not_found
from gateway.api.traffic import traffic_of
from gateway.api.visibility import sees_named, sees_source, sources_seen
from gateway.engine.control.state import Control
from gateway.ops.output import count, rfc3339
from gateway.rules.routing_revision import routing_revision
from gateway.rules.rules import NOBODY, Contact, Destination, Route, Rules, Source

N = TypeVar("N")
S = TypeVar("S", shapes.Source, shapes.Destination)
SHORTEST_SECRET = 4
"""Characters of the shortest value of a reference that is looked for in a host."""
MOST_SECRETS = 100
"""Secrets of a source that are told."""
NAMES_PER_STEP = 200
"""Names that are looked at before other tasks run: less than a millisecond."""


async def me(backend: Backend, principal: Principal) -> shapes.Me:  # noqa: ARG001 - each function takes both
    """Return the caller."""
    return shapes.Me(
        name=principal.name,
        role=principal.role,
        owners=None if principal.owners is None else tuple(sorted(principal.owners)),
        sources=None if principal.sources is None else tuple(sorted(principal.sources)),
        via=principal.via,
    )


async def list_sources(
    backend: Backend,
    principal: Principal,
    *,
    name: str = "",
    traffic: bool = False,
    limit: int = 50,
    cursor: str | None = None,
) -> shapes.SourcePage:
    """List the sources of the active rules."""
    rules = backend.rules()
    overview = await backend.overview(rules)
    items, following = await _page(
        _List(overview.sources, ("sources", name), limit, cursor),
        lambda each: name in each and sees_source(principal, rules, each),
        lambda each: _without_others(principal, _source(backend, rules, overview, each)),
    )
    if traffic:
        found = await traffic_of(backend, principal, "source", [each.name for each in items])
        items = tuple([replace(each, traffic=found.get(each.name)) for each in items])
    return shapes.SourcePage(items=items, next_cursor=following)


async def get_source(backend: Backend, principal: Principal, *, name: str) -> shapes.Source:
    """Return a source."""
    rules = backend.rules()
    if name not in rules.sources or not sees_source(principal, rules, name):
        raise not_found("a source")
    return _without_others(principal, _source(backend, rules, await backend.overview(rules), name))


async def list_destinations(
    backend: Backend,
    principal: Principal,
    *,
    name: str = "",
    stopped: bool = False,
    traffic: bool = False,
    limit: int = 50,
    cursor: str | None = None,
) -> shapes.DestinationPage:
    """List the destinations of the active rules, with what pauses or holds them."""
    rules = backend.rules()
    overview = await backend.overview(rules)
    async with must_be_available():
        control = await backend.control()
    holds = backend.holds()

    def is_asked(each: str) -> bool:
        return (
            name in each
            and (not stopped or each in holds or _pause(control, f"destination/{each}") is not None)
            and sees_named(principal, rules, "destination", each, overview.sources_of[each])
        )

    items, following = await _page(
        _List(overview.destinations, ("destinations", name, stopped), limit, cursor),
        is_asked,
        lambda each: _without_others(principal, _destination(backend, rules, overview, control, each)),
    )
    if traffic:
        found = await traffic_of(backend, principal, "destination", [each.name for each in items])
        items = tuple([replace(each, traffic=found.get(each.name)) for each in items])
    return shapes.DestinationPage(items=items, next_cursor=following)


async def get_destination(backend: Backend, principal: Principal, *, name: str) -> shapes.Destination:
    """Return a destination, with what pauses or holds it."""
    rules = backend.rules()
    overview = await backend.overview(rules)
    if name not in rules.destinations or not sees_named(
        principal, rules, "destination", name, overview.sources_of[name]
    ):
        raise not_found("a destination")
    async with must_be_available():
        return _without_others(principal, _destination(backend, rules, overview, await backend.control(), name))


async def list_routes(
    backend: Backend,
    principal: Principal,
    *,
    name: str = "",
    source: str | None = None,
    destination: str | None = None,
    stopped: bool = False,
    traffic: bool = False,
    limit: int = 50,
    cursor: str | None = None,
) -> shapes.RoutePage:
    """List the routes of the active rules: all, or those from a source or to a destination."""
    rules = backend.rules()
    overview = await backend.overview(rules)
    async with must_be_available():
        control = await backend.control()

    def is_asked(each: str) -> bool:
        route = rules.routes[each]
        return (
            name in each
            and (source is None or source in sources_seen(principal, rules, route))
            and destination in (None, *route.destinations)
            and (not stopped or _pause(control, f"route/{each}") is not None)
            and sees_named(principal, rules, "route", each, route.sources)
        )

    items, following = await _page(
        _List(overview.routes, ("routes", name, source, destination, stopped), limit, cursor),
        is_asked,
        lambda each: _route(principal, rules, control, rules.routes[each]),
    )
    if traffic:
        found = await traffic_of(backend, principal, "route", [each.name for each in items])
        items = tuple([replace(each, traffic=found.get(each.name)) for each in items])
    return shapes.RoutePage(items=items, next_cursor=following)


async def get_route(backend: Backend, principal: Principal, *, name: str) -> shapes.Route:
    """Return a route, with its condition and what pauses it."""
    rules = backend.rules()
    route = rules.routes.get(name)
    if route is None or not sees_named(principal, rules, "route", name, route.sources):
        raise not_found("a route")
    async with must_be_available():
        return _route(principal, rules, await backend.control(), route)


async def get_rules(backend: Backend, principal: Principal) -> shapes.RulesInForce:
    """Return which rules are in force in this process, and whether newer ones are refused."""
    rules, status = backend.rules(), backend.rules_status()
    refusal = status["refusal"]
    if refusal is not None and not status["refused"]:
        refusal = None
    found = shapes.RulesInForce(
        version=rules.version,
        file=status["file"],
        loaded_at=rfc3339(status["loaded_at"]),
        sources=len(rules.sources),
        destinations=len(rules.destinations),
        routes=len(rules.routes),
        changed=tuple(status["changed"]),
        refusal=None
        if refusal is None
        else shapes.Refusal(since=rfc3339(refusal["since"]), file=refusal["file"], problems=tuple(refusal["problems"])),
    )
    return await _seen_of(found, principal, rules, await backend.overview(rules)) if principal.is_limited else found


async def _seen_of(
    found: shapes.RulesInForce, principal: Principal, rules: Rules, overview: Overview
) -> shapes.RulesInForce:
    """Return what somebody with limits sees of the rules: what else has changed, and what is wrong, is counted."""
    seen: dict[str, set[str]] = {"source": set(), "destination": set(), "route": set()}
    known = [("source", each) for each in overview.sources]
    known += [("destination", each) for each in overview.destinations]
    known += [("route", each) for each in overview.routes]
    for number, (kind, name) in enumerate(known):
        if number % NAMES_PER_STEP == 0:
            await asyncio.sleep(0)
        if _sees(principal, rules, overview, kind, name):
            seen[kind].add(name)
    changed, others = list[str](), 0
    for each in found.changed:
        kind, _, name = each.partition(":")[0].removesuffix(" added").partition(" ")
        if name in seen.get(kind, ()):
            changed.append(each)
        else:
            others += int(name.partition(" ")[0]) if kind == "and" else 1  # "and 20 more"
    problems = () if found.refusal is None else found.refusal.problems
    return replace(
        found,
        sources=len(seen["source"]),
        destinations=len(seen["destination"]),
        routes=len(seen["route"]),
        changed=(*changed, *([count(others, "other change")] if others else [])),
        refusal=None
        if found.refusal is None
        else replace(
            found.refusal,
            file=found.file,
            problems=(f"{count(len(problems), 'problem')}: shown to principals without limits",),
        ),
    )


def _sees(principal: Principal, rules: Rules, overview: Overview, kind: str, name: str) -> bool:
    """Return whether somebody sees a name of the active rules."""
    if kind == "source":
        return sees_source(principal, rules, name)
    sources = overview.sources_of[name] if kind == "destination" else rules.routes[name].sources
    return sees_named(principal, rules, kind, name, sources)


class _List(NamedTuple):
    """Names in order, what of them is asked for, how many at a time, and after which cursor."""

    names: Sequence[str]
    listing: tuple[object, ...]
    limit: int
    cursor: str | None


async def _page(
    asked: _List, is_asked: Callable[[str], bool], made: Callable[[str], N]
) -> tuple[tuple[N, ...], str | None]:
    """Return what is made of some names, and where the rest begins, None if there is none."""
    names, listing, limit, cursor = asked
    start = 0
    if cursor is not None:
        after = decode_cursor(cursor, listing=listing).get("after")
        if not isinstance(after, str):
            raise ApiError(Code.INVALID_CURSOR, "cursor: expected the next_cursor of the same list")
        start = bisect_right(names, after)
    items: list[N] = []
    last = ""
    for index in range(start, len(names)):
        if index % NAMES_PER_STEP == 0:
            await asyncio.sleep(0)
        name = names[index]
        if not is_asked(name):
            continue
        if len(items) == limit:
            return tuple(items), encode_cursor({"after": last}, listing=listing)
        items.append(made(name))
        last = name
    return tuple(items), None


def _source(backend: Backend, rules: Rules, overview: Overview, name: str) -> shapes.Source:
    source: Source = rules.sources[name]
    contact = rules.contacts.get(("source", name), NOBODY)
    return shapes.Source(
        name=name,
        **_contact(contact),
        path=source.shown_path,
        url=f"{backend.public_url}{source.shown_path}" if backend.public_url else None,
        scheme=source.verifier.scheme,
        topic=source.topic or backend.topics.events(name),
        dedupe_seconds=source.dedupe,
        is_quarantined=source.quarantine,
        routes=overview.routes_from[name],
        traffic=None,
        secrets=_secrets(source),
    )


def _without_others(principal: Principal, found: S) -> S:
    """Return a source or destination as somebody may see it: with limits, not how many routes it has."""
    return replace(found, routes=None) if principal.is_limited else found


def _secrets(source: Source) -> tuple[shapes.SourceSecret, ...]:
    last: dict[str, float] = {}
    for each in source.verifier.lifetimes:
        last[each.key] = max(each.until, last.get(each.key, 0.0))
    return tuple(
        [
            shapes.SourceSecret(
                name=each.shown,
                until=None if isinf(each.until) else rfc3339(each.until),
                is_last=each.until >= last[each.key],
            )
            for each in source.verifier.lifetimes[:MOST_SECRETS]
        ]
    )


def _destination(backend: Backend, rules: Rules, overview: Overview, control: Control, name: str) -> shapes.Destination:
    destination: Destination = rules.destinations[name]
    hold = backend.holds().get(name)
    return shapes.Destination(
        name=name,
        **_contact(rules.contacts.get(("destination", name), NOBODY)),
        host=_host(destination.url, rules),
        timeout_seconds=destination.timeout,
        concurrency=destination.concurrency,
        rate=destination.rate,
        routes=overview.routes_to[name],
        pause=_pause(control, f"destination/{name}"),
        hold=None
        if hold is None
        else shapes.Hold(
            why=hold.reason,
            since=rfc3339(hold.since),
            until=None if hold.is_probe_due else rfc3339(hold.until),
        ),
        traffic=None,
    )


def _route(principal: Principal, rules: Rules, control: Control, route: Route) -> shapes.Route:
    written = orjson.loads(routing_revision(rules).routes[route.name].encode("utf-8", "replace"))
    return shapes.Route(
        name=route.name,
        **_contact(rules.contacts.get(("route", route.name), NOBODY)),
        sources=sources_seen(principal, rules, route),
        destinations=route.destinations,
        condition=None
        if "hidden" in written
        else {key: written[key] for key in ("match", "when", "choice") if key in written},
        order=route.order,
        on_exhausted=route.on_exhausted,
        stop=route.stop,
        catch_all=route.catch_all,
        is_split=route.split is not None,
        delay_seconds=route.delay,
        debounce_seconds=None if route.debounce is None else route.debounce.quiet,
        retry=shapes.Retry(
            schedule_seconds=route.retry.schedule,
            max_attempts=route.retry.max_attempts,
            max_age_seconds=route.retry.max_age,
        ),
        pause=_pause(control, f"route/{route.name}"),
        traffic=None,
    )


def _contact(contact: Contact) -> dict[str, str | None]:
    return {"owner": contact.owner or None, "runbook": contact.runbook or None}


def _pause(control: Control, name: str) -> shapes.Pause | None:
    command = control.commands.get(f"pause/{name}")
    if command is None or command.state not in ("paused", "resuming"):
        return None
    return shapes.Pause(state=command.state, since=rfc3339(command.at), by=command.by or None)


def _host(url: str, rules: Rules) -> str | None:
    """Return a URL's host, None if a secret is in it, or if it is a reference that isn't resolved here."""
    try:
        parts = urlsplit(url)
        host = parts.hostname
    except ValueError:
        return None
    is_secret = any(len(secret) >= SHORTEST_SECRET and secret in parts.netloc for secret in rules.secret_values)
    return None if is_secret else host
