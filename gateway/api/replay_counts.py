"""What a replay would deliver, and by which routes one event would be: asked before anything is commanded."""

import math
from dataclasses import dataclass, replace

from gateway.access.principal import Principal
from gateway.api.backend import Backend, must_be_available
from gateway.api.command_shapes import ReplayRequest
from gateway.api.events import find_event
from gateway.api.json_shapes import Time, time_of
from gateway.api.problems import ApiError, Code, not_found
from gateway.api.shares import whose_turn
from gateway.api.visibility import sees_delivery, sees_named
from gateway.engine.control.records import Selection
from gateway.model import UsageError
from gateway.ops.output import rfc3339
from gateway.ops.replay_counts import ReplayCount, changed_before, count_replay, routes_of
from gateway.ops.replays import window_of
from gateway.required_topics import event_topics
from gateway.rules.event_view import EventView
from gateway.rules.rules import Route

SECONDS = 15.0
"""For which events are read: a client of the API waits for thirty."""
PATIENCE = 25.0


@dataclass(frozen=True, slots=True, kw_only=True)
class CountedEvents:
    """Events of a source and a type, of which a replay would deliver `count`, in so many deliveries.

    Of all deliveries that match, as far as the log shows: `undelivered` were missed or are dead letters, of `unknown`
    it doesn't say, and the rest were delivered, dropped, or are on their way.
    """

    source: str
    type: str
    count: int
    deliveries: int
    matching: int
    undelivered: int
    unknown: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CountedTo:
    """How many deliveries would go to a destination of the route."""

    name: str
    count: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CountedReplay:
    """What a replay would deliver, of the events that were stored from `since` until before `until`.

    `looked` of `total` records were read; if it isn't all (`is_cut_short`), there may be more. `failing` are events of
    which the route can't be decided: each would become another dead letter; with `is_chosen`, it chooses its
    destinations. `dead_items` are dead letters of items, which no replay of events delivers. `under_way` are replays of
    the route that haven't ended: what they queue may be counted, too. `changed_at` is since when the route has
    delivered events by itself as it does now, null if that isn't known.
    """

    route: str
    destination: str | None
    source: str | None
    since: Time
    until: Time
    undelivered: bool
    items: tuple[CountedEvents, ...]
    destinations: tuple[CountedTo, ...]
    failing: int
    is_chosen: bool
    dead_items: int
    under_way: tuple[str, ...]
    unread_partitions: int
    changed_at: Time | None
    looked: int
    total: int
    is_cut_short: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class EventRoute:
    """A route that takes an event, and the destinations to which it would be delivered. `is_ordered`: by a key."""

    route: str
    destinations: tuple[str, ...]
    is_ordered: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class EventRoutes:
    """By which routes an event would be delivered again. `matched` are all routes that take it."""

    event: str
    position: str
    items: tuple[EventRoute, ...]
    matched: tuple[str, ...]


async def count_events(backend: Backend, principal: Principal, *, given: ReplayRequest) -> CountedReplay:
    """Count what a replay of past events would deliver, as a dry run."""
    selection, _, sources = replay_of(backend, principal, given)
    if given.event is not None:
        raise ApiError(Code.INVALID_REQUEST, "body.event: expected none, since one event is one: `/events/ID/routes`")
    rules, now = backend.rules(), backend.log.now()
    until = math.floor(now * 1000) / 1000 if selection.until is None else selection.until
    selection = replace(selection, until=until)
    of_route = replace(rules, sources={name: rules.sources[name] for name in sources})
    async with backend.turn(principal.identity), must_be_available(PATIENCE):
        control = await backend.control()
        window = await window_of(backend.log, event_topics(of_route, backend.topics), selection.since, until)
        selection = replace(selection, starts=window.starts)
        try:
            found = await count_replay(
                backend.log, backend.topics, selection, window, control=control, rules=rules, seconds=SECONDS
            )
        except UsageError as error:
            raise ApiError(Code.CONFLICT, str(error)) from error
    changed_at = changed_before(control, rules, selection, window)
    return _counted(found, until=until, changed_at=changed_at)


def replay_of(backend: Backend, principal: Principal, given: ReplayRequest) -> tuple[Selection, Route, tuple[str, ...]]:
    """Return what is asked to be replayed, its route, and the sources whose events that are. Raises ApiError."""
    rules, now = backend.rules(), backend.log.now()
    route = rules.routes.get(given.route)
    if route is None or not sees_named(principal, rules, "route", given.route, route.sources):
        raise not_found("a route")
    for what, name, known in (
        ("source", given.source, route.sources),
        ("destination", given.destination, route.destinations),
    ):
        if name is not None and name not in known:
            raise ApiError(Code.INVALID_REQUEST, f"body.{what}: expected one of route {route.name}, got {name!r}")
    sources = tuple(route.sources) if given.source is None else (given.source,)
    for source in sources:
        if not any(sees_delivery(principal, rules, source, route.name, each) for each in route.destinations):
            raise ApiError(Code.FORBIDDEN, f"route {route.name}: it has events that you may not see")
    others = (given.since, given.until, given.source, given.rate)
    if given.event is not None and (given.undelivered or any(each is not None for each in others)):
        raise ApiError(Code.INVALID_REQUEST, "body.event: only a route and a destination may be given with it")
    since = time_of(given.since) if given.since is not None else None
    if since is None and given.event is None:
        raise ApiError(Code.INVALID_REQUEST, "body.since: expected a value, got none, and no body.event")
    until = None if given.until is None else time_of(given.until)
    if since is not None and since >= (now if until is None else until):
        raise ApiError(Code.INVALID_REQUEST, "body.since: expected a time before until, or before now")
    selection = Selection(
        route=route.name,
        destination=given.destination,
        source=given.source,
        since=since or 0.0,
        until=until,
        rate=given.rate,
        undelivered=given.undelivered,
    )
    return selection, route, sources


async def get_event_routes(
    backend: Backend,
    principal: Principal,
    *,
    event: str,
    route: str | None = None,
    destination: str | None = None,
) -> EventRoutes:
    """Return by which routes an event would be delivered again, and where to."""
    rules = backend.rules()
    overview = await backend.overview(rules)

    def is_seen(name: str) -> bool:
        return sees_named(principal, rules, "route", name, rules.routes[name].sources)

    if route is not None and (route not in rules.routes or not is_seen(route)):
        raise ApiError(Code.INVALID_REQUEST, f"route: expected a route of the rules, got {route!r}")
    sources = overview.sources_of.get(destination or "")
    if destination is not None and (
        sources is None or not sees_named(principal, rules, "destination", destination, sources)
    ):
        raise ApiError(Code.INVALID_REQUEST, f"destination: expected a destination of the rules, got {destination!r}")
    index = backend.open_index()
    async with must_be_available():
        found = await find_event(backend, principal, event)
        content = await index.content(found)
    if content is None or found.partition is None:
        raise ApiError(Code.CONFLICT, f"expected the record of {found.id} in the log, got none: deleted by age")
    stored = content

    def work() -> EventRoutes:
        view = EventView.of(stored)
        matched, asked = routes_of(rules, stored, route=route, destination=destination)
        items = [
            EventRoute(
                route=each.name,
                destinations=tuple(
                    [name for name, end in each.targets(view, None) if end is None and destination in (None, name)]
                ),
                is_ordered=each.order is not None,
            )
            for each in asked
            if is_seen(each.name)
        ]
        names = tuple([each.name for each in matched if is_seen(each.name)])
        return EventRoutes(event=stored.id, position=found.position, items=tuple(items), matched=names)

    return await backend.aside(whose_turn(principal), work)


def _counted(found: ReplayCount, *, until: float, changed_at: float | None) -> CountedReplay:
    asked = found.selection
    return CountedReplay(
        route=asked.route,
        destination=asked.destination,
        source=asked.source,
        since=rfc3339(asked.since),
        until=rfc3339(until),
        undelivered=asked.undelivered,
        items=tuple(
            [
                CountedEvents(
                    source=source,
                    type=type_,
                    count=each.count,
                    deliveries=each.deliveries,
                    matching=each.matching,
                    undelivered=each.undelivered,
                    unknown=each.unknown,
                )
                for (source, type_), each in sorted(found.by.items())
            ]
        ),
        destinations=tuple([CountedTo(name=name, count=number) for name, number in found.destinations.items()]),
        failing=found.failing,
        is_chosen=found.is_chosen,
        dead_items=found.dead_items,
        under_way=found.under_way,
        unread_partitions=found.unread,
        changed_at=None if changed_at is None else rfc3339(changed_at),
        looked=found.looked,
        total=found.total,
        is_cut_short=found.looked < found.total,
    )
