"""Operator actions: pause, resume, kick; dead letters, replays, and redeliveries of single events.

A command is a control record, the same as a CLI command writes; the processes that deliver carry it out. With an
idempotency key it is given once: a client that asks again, anywhere and for a day, gets the first answer
(`ops/keyed_requests.py`).
"""

from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import asdict, replace
from typing import Literal, NamedTuple

from gateway.access.principal import Principal
from gateway.api.backend import Backend, must_be_available
from gateway.api.command_shapes import Act, Command, DeadSelection, RedeliveryRequest, ReplayRequest
from gateway.api.command_states import sees_command
from gateway.api.dead_letters import dead_filter, judge_letters
from gateway.api.events import find_event
from gateway.api.json_shapes import ShapeError, read_shape
from gateway.api.problems import ApiError, Code, not_found
from gateway.api.replay_counts import get_event_routes, replay_of
from gateway.api.visibility import may_operate, needs_no_limit, sees_named
from gateway.engine.control.records import ControlRecord, DeadFilter
from gateway.engine.control.state import Control
from gateway.model import Delivery, UsageError
from gateway.ops.audit import Actor
from gateway.ops.control_client import ControlClient
from gateway.ops.keyed_requests import KeyedRequest, place_of
from gateway.ops.log_search import find_event as find_record
from gateway.ops.output import rfc3339
from gateway.ops.redeliveries import redeliver
from gateway.ops.replays import Window, window_of
from gateway.required_topics import event_topics
from gateway.rules.rules import Rules

Kind = Literal["route", "destination"]
Named = tuple[Kind, str]
Give = Callable[[ControlClient, Control, str], Awaitable[Command]]
"""Gives the command, and returns the answer. The text is what its name is derived from, "" without a key.

Checks of what may change (rules, permissions) belong in here, not before it: a repeated request gets its first answer,
even if they would fail now.
"""


class Sent(NamedTuple):
    """How a command came: under which idempotency key, None without one, and from which address."""

    key: str | None = None
    origin: str = ""


SENT = Sent()
LONGEST_KEY = 255
KEY_PATTERN = "^[!-~]+$"
"""An idempotency key is visible ASCII, without spaces."""


async def pause_route(backend: Backend, principal: Principal, *, name: str, given: Act, sent: Sent = SENT) -> Command:
    """Stop the deliveries of a route: they wait until it is resumed."""
    return await _pause(backend, principal, ("route", name), given, sent)


async def pause_destination(
    backend: Backend, principal: Principal, *, name: str, given: Act, sent: Sent = SENT
) -> Command:
    """Stop the deliveries to a destination: they wait until it is resumed."""
    return await _pause(backend, principal, ("destination", name), given, sent)


async def resume_route(backend: Backend, principal: Principal, *, name: str, given: Act, sent: Sent = SENT) -> Command:
    """Resume a paused route, and deliver what was stored meanwhile."""
    return await _resume(backend, principal, ("route", name), given, sent)


async def resume_destination(
    backend: Backend, principal: Principal, *, name: str, given: Act, sent: Sent = SENT
) -> Command:
    """Resume a paused destination, and deliver what was stored meanwhile."""
    return await _resume(backend, principal, ("destination", name), given, sent)


async def kick_route(backend: Backend, principal: Principal, *, name: str, given: Act, sent: Sent = SENT) -> Command:
    """Retry the waiting deliveries of a route now."""
    return await _kick(backend, principal, ("route", name), given, sent)


async def kick_destination(
    backend: Backend, principal: Principal, *, name: str, given: Act, sent: Sent = SENT
) -> Command:
    """Retry the waiting deliveries to a destination now."""
    return await _kick(backend, principal, ("destination", name), given, sent)


async def replay_dead_letters(
    backend: Backend, principal: Principal, *, given: DeadSelection, sent: Sent = SENT
) -> Command:
    """Deliver dead letters again, with a fresh retry schedule."""
    return await _resolve(backend, principal, "replay", given, sent)


async def drop_dead_letters(
    backend: Backend, principal: Principal, *, given: DeadSelection, sent: Sent = SENT
) -> Command:
    """Discard dead letters."""
    return await _resolve(backend, principal, "drop", given, sent)


async def start_replay(backend: Backend, principal: Principal, *, given: ReplayRequest, sent: Sent = SENT) -> Command:
    """Deliver past events of a route again, or one of them, under the active rules."""

    async def give(client: ControlClient, control: Control, key: str) -> Command:
        name, before = place_of(control, "replay", key, now=backend.log.now())
        if before is not None:
            return command_of(before)
        rules = backend.rules()
        selection, route, sources = replay_of(backend, principal, given)
        _require_may_operate(principal, rules, "route", route.name, sources)
        if given.event is not None:
            window = await _window_of_event(backend, principal, given.event, route.name)
        else:
            of_route = replace(rules, sources={name: rules.sources[name] for name in sources})
            topics = event_topics(of_route, backend.topics)
            window = await window_of(backend.log, topics, selection.since, selection.until)
        if not window.total:
            raise ApiError(Code.NOTHING_TO_DO, "expected events of that time in the log, got none")
        placed = await client.replay(
            replace(selection, starts=window.starts), window.ends, unread=len(window.unread), name=name
        )
        return command_of(placed.command)

    return await once(backend, principal, sent, ("replay", given), give, why=given.reason)


async def _window_of_event(backend: Backend, principal: Principal, event: str, route: str) -> Window:
    """Return the window of one event's record. Raises ApiError unless the route matches it."""
    found = await get_event_routes(backend, principal, event=event, route=route)
    if not found.items:
        raise ApiError(Code.CONFLICT, f"body.route: {route} doesn't match {found.event}")
    partition, _, offset = found.position.rpartition("@")
    return Window({partition: int(offset)}, {partition: int(offset) + 1})


async def cancel_replay(
    backend: Backend, principal: Principal, *, replay: str, given: Act, sent: Sent = SENT
) -> Command:
    """Cancel a replay: what it has already queued is still delivered."""

    async def give(client: ControlClient, control: Control, _: str) -> Command:
        rules, command = backend.rules(), control.commands.get(f"replay/{replay}")
        if command is None or command.selection is None or not sees_command(backend, principal, command):
            raise not_found("a replay")
        route, source = rules.routes.get(command.selection.route), command.selection.source
        if route is None:
            needs_no_limit(principal, "a replay of a former route")
        else:
            _require_may_operate(principal, rules, "route", route.name, route.sources if source is None else (source,))
        placed = await client.cancel(replay)
        return command_of(command, is_new=False) if placed is None else command_of(placed.command)

    return await once(backend, principal, sent, ("cancel", replay, given), give, why=given.reason)


async def redeliver_event(
    backend: Backend, principal: Principal, *, event: str, given: RedeliveryRequest, sent: Sent = SENT
) -> Command:
    """Deliver an event again: by each route that matches it, or one, to each of its destinations, or one."""

    async def give(_: ControlClient, control: Control, key: str) -> Command:
        name, before = place_of(control, "redeliver", key, now=backend.log.now())
        if before is not None:
            return command_of(before)
        rules = backend.rules()
        wanted: Sequence[tuple[Kind, str | None]] = (("route", given.route), ("destination", given.destination))
        for kind, each in wanted:
            if each is not None and not await _is_seen(backend, principal, rules, kind, each):
                raise ApiError(Code.INVALID_REQUEST, f"body.{kind}: expected a {kind} of the rules, got {each!r}")
        found = await find_event(backend, principal, event)
        _require_may_redeliver(principal, rules, found.source, given)
        record = await find_record(backend.log, [found.partition.topic], found.position) if found.partition else None
        if record is None:
            raise ApiError(Code.CONFLICT, f"expected the record of {found.id} in the log, got none: deleted by age")
        asked = await redeliver(
            backend.log,
            backend.topics,
            control,
            record,
            route=given.route,
            destination=given.destination,
            reason=given.reason or "",
            actor=Actor.of(principal, sent.origin),
            name=name,
        )
        return command_of(asked.command, is_new=asked.is_new)

    return await once(backend, principal, sent, ("redeliver", event, given), give, why=given.reason)


async def _pause(backend: Backend, principal: Principal, named: Named, given: Act, sent: Sent) -> Command:
    kind, name = named

    async def give(client: ControlClient, _: Control, __: str) -> Command:
        await _require_visible_and_operable(backend, principal, kind, name)
        pause = await client.pause(f"{kind}/{name}")
        return command_of(pause.command, is_new=pause.is_new)

    return await once(backend, principal, sent, ("pause", kind, name, given), give, why=given.reason)


async def _resume(backend: Backend, principal: Principal, named: Named, given: Act, sent: Sent) -> Command:
    kind, name = named

    async def give(client: ControlClient, control: Control, _: str) -> Command:
        await _require_visible_and_operable(backend, principal, kind, name)
        placed = await client.resume(f"{kind}/{name}")
        if placed is not None:
            return command_of(placed.command)
        before = control.commands.get(f"pause/{kind}/{name}")
        now = ControlRecord(kind="pause", name=f"{kind}/{name}", state="active", at=backend.log.now())
        return command_of(before or now, is_new=False)

    return await once(backend, principal, sent, ("resume", kind, name, given), give, why=given.reason)


async def _kick(backend: Backend, principal: Principal, named: Named, given: Act, sent: Sent) -> Command:
    kind, name = named

    async def give(client: ControlClient, _: Control, __: str) -> Command:
        await _require_visible_and_operable(backend, principal, kind, name)
        return command_of((await client.kick(f"{kind}/{name}")).command)

    return await once(backend, principal, sent, ("kick", kind, name, given), give, why=given.reason)


async def _resolve(
    backend: Backend, principal: Principal, action: Literal["replay", "drop"], given: DeadSelection, sent: Sent
) -> Command:
    which = replace(
        dead_filter(
            route=given.route,
            destination=given.destination,
            reason=given.dead_reason,
            since=given.since,
            until=given.until,
        ),
        ids=given.ids,
    )
    if which == DeadFilter() and not given.all:
        raise ApiError(Code.INVALID_REQUEST, "body: say which dead letters, or all: true")
    asked = ("dead", action, given)
    is_answered = await _is_answered(backend, principal, sent, asked)  # whatever has become of the letters since
    if principal.is_limited and not is_answered:
        await _require_may_resolve(backend, principal, given, since=which.since)

    async def give(client: ControlClient, control: Control, key: str) -> Command:
        if is_answered:
            raise ApiError(Code.CONFLICT, "Idempotency-Key: the stored answer has just expired: use a new key")
        name, before = place_of(control, "dead", key, now=backend.log.now())
        if before is not None:
            return command_of(before)
        return command_of((await client.resolve(action, which, name=name)).command)

    return await once(backend, principal, sent, asked, give, why=given.reason)


async def _require_may_resolve(
    backend: Backend, principal: Principal, given: DeadSelection, *, since: float | None
) -> None:
    """Raise ApiError unless the principal may operate the route or destination that is named, or each delivery.

    They may operate a delivery if they may operate its route or its destination, as far as its source is concerned.
    """
    rules = backend.rules()
    route = rules.routes.get(given.route or "")
    if route is not None and may_operate(principal, rules, "route", route.name, route.sources):
        return
    if given.destination is not None and given.destination in rules.destinations:
        sources = (await backend.overview(rules)).sources_of[given.destination]
        if may_operate(principal, rules, "destination", given.destination, sources):
            return
    if not given.ids:
        raise ApiError(Code.FORBIDDEN, "body: name a route or destination that you may operate, or ids")

    def is_theirs(delivery: Delivery) -> bool:
        by, source = (("route", delivery.route), ("destination", delivery.destination)), delivery.event.source
        return any(may_operate(principal, backend.rules(), kind, name, (source,)) for kind, name in by if name)

    if wrong := await judge_letters(backend, principal, given.ids, is_theirs, since=since):
        raise ApiError(Code.FORBIDDEN, f"body.ids: you may not operate {wrong[0]}")


async def _require_visible_and_operable(backend: Backend, principal: Principal, kind: Kind, name: str) -> None:
    """Raise ApiError unless the rules have a name, and the principal sees it and may operate it."""
    rules = backend.rules()
    if not await _is_seen(backend, principal, rules, kind, name):
        raise not_found(f"a {kind}")
    _require_may_operate(principal, rules, kind, name, await _sources_of(backend, rules, kind, name))


async def _is_seen(backend: Backend, principal: Principal, rules: Rules, kind: Kind, name: str) -> bool:
    """Return whether rules have a name that the principal sees."""
    if name not in (rules.routes if kind == "route" else rules.destinations):
        return False
    return sees_named(principal, rules, kind, name, await _sources_of(backend, rules, kind, name))


async def _sources_of(backend: Backend, rules: Rules, kind: Kind, name: str) -> Collection[str]:
    """Return the sources of which a route or destination gets events."""
    return rules.routes[name].sources if kind == "route" else (await backend.overview(rules)).sources_of[name]


def _require_may_redeliver(principal: Principal, rules: Rules, source: str, given: RedeliveryRequest) -> None:
    """Raise ApiError unless the principal may operate, for this source, the destination or each route concerned.

    Those are all that may match the event: which do is decided by the rules of the process that delivers it.
    """
    if not principal.is_limited:
        return
    if given.destination is not None and may_operate(principal, rules, "destination", given.destination, (source,)):
        return
    for route in rules.routes.values() if given.route is None else (rules.routes[given.route],):
        is_concerned = source in route.sources and given.destination in (None, *route.destinations)
        if is_concerned and not may_operate(principal, rules, "route", route.name, (source,)):
            detail = "body: others' routes may match the event, too: name a route or destination that you may operate"
            raise ApiError(Code.FORBIDDEN, detail)


def _require_may_operate(principal: Principal, rules: Rules, kind: Kind, name: str, sources: Collection[str]) -> None:
    if not may_operate(principal, rules, kind, name, sources):
        detail = f"{kind} {name}: you may not operate it: it isn't yours, or has events of others, too"
        raise ApiError(Code.FORBIDDEN, detail)


async def once(
    backend: Backend, principal: Principal, sent: Sent, asked: object, give: Give, *, why: str | None
) -> Command:
    """Give a command, or return what was answered when it was asked for under the same key. Raises ApiError."""
    request = None if sent.key is None else KeyedRequest.of(principal.identity, sent.key, asked)
    actor = Actor.of(principal, sent.origin)
    async with must_be_available(), backend.giving:
        answers, now = await backend.answers(), backend.log.now()
        if request is not None and (known := answers.to(request, now=now)) is not None:
            if known.is_of_another:
                raise ApiError(Code.KEY_REUSED, "Idempotency-Key: it was used for another request")
            try:
                return read_shape(Command, known.answer)
            except ShapeError as error:
                raise ApiError(Code.CONFLICT, "Idempotency-Key: a newer version has stored its answer") from error

        def alongside(command: ControlRecord) -> list[ControlRecord]:
            if request is None:
                return []
            return [request.answered(asdict(command_of(command)), now), *answers.forgotten(now=now)]

        client = ControlClient(backend.log, backend.topics, actor=actor, why=why or "", alongside=alongside)
        try:
            answer = await give(client, await backend.control(), "" if request is None else request.command)
        except UsageError as error:
            raise ApiError(Code.CONFLICT, str(error)) from error
        if request is not None and (await backend.answers()).to(request, now=now) is None:
            await client.note(request.answered(asdict(answer), now))
        return answer


async def _is_answered(backend: Backend, principal: Principal, sent: Sent, asked: object) -> bool:
    """Return whether there is an answer to what is asked for, under its key. Raises ApiError."""
    if sent.key is None:
        return False
    request = KeyedRequest.of(principal.identity, sent.key, asked)
    async with must_be_available():
        return (await backend.answers()).to(request, now=backend.log.now()) is not None


def command_of(command: ControlRecord, *, is_new: bool = True) -> Command:
    return Command(id=command.key, at=rfc3339(command.at), by=command.by or None, state=command.state, is_new=is_new)
