"""What has come of commands, and replays with their progress."""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from gateway.access.principal import Principal, identity_of
from gateway.api import command_shapes
from gateway.api.backend import Backend, must_be_available
from gateway.api.cursors import decode_cursor, encode_cursor, whole
from gateway.api.problems import ApiError, Code, not_found
from gateway.api.visibility import may_operate, sees_named
from gateway.engine.control.records import ControlRecord
from gateway.engine.control.state import Control
from gateway.log.base import Commit
from gateway.log.json_fields import LATEST
from gateway.log.topics import CONTROL_PARTITION, JOBS_GROUP
from gateway.ops.control_client import is_begun
from gateway.ops.ordered_backlog import OrderedKick, ordered_kick_of
from gateway.ops.output import rfc3339
from gateway.ops.replays import ReplayStatus, progress_of
from gateway.rules.rules import Rules

KINDS = ("pause", "kick", "dead", "replay", "redeliver")
ORDERED_WITHIN = 3.0
"""Seconds for which is looked what became of a kick on ordered routes: their topics are read one after the other."""


async def get_command(backend: Backend, principal: Principal, *, command: str) -> command_shapes.CommandState:
    """Return what has come of a command."""
    async with must_be_available():
        control = await backend.control()
        found, offset = control.commands.get(command), control.offset_of(command)
        if found is None or found.kind not in KINDS or not knows_command(backend, principal, found):
            raise not_found("a command")
        group, topic = backend.topics.group(JOBS_GROUP), backend.topics.control
        commit = (await backend.log.committed(group, topic)).get(CONTROL_PARTITION)
        ordered = await _ordered_kick(backend, control, found) if found.kind == "kick" else None
    progress = progress_of(control, found.name) if found.kind == "replay" else None
    return command_shapes.CommandState(
        id=found.key,
        at=rfc3339(found.at),
        by=found.by or None,
        state=found.state,
        is_read=offset is not None and _is_read(control, found, offset, commit),
        count=max(found.count, control.injected(found.key)),
        tried=found.tried,
        delivered=found.delivered,
        waiting=dict(found.untried_by_reason),
        failed_by_result=dict(found.failed_by_result),
        dead=found.dead,
        ordered=ordered,
        scanned=None if progress is None else progress.scanned,
        total=None if progress is None else progress.total,
        unread_partitions=found.unread if progress is None else progress.unread,
        detail=found.detail or None,
    )


def _is_read(control: Control, command: ControlRecord, offset: int, commit: Commit | None) -> bool:
    """Return whether a gateway has read a command: what takes long is committed only once it is carried out."""
    if commit is not None and commit.covers(offset):
        return True
    return command.state in ("done", "active") or (command.is_pending and is_begun(control, command, offset))


async def _ordered_kick(
    backend: Backend, control: Control, command: ControlRecord
) -> command_shapes.OrderedKick | None:
    """Return what a kick came to on ordered routes; None if what was kicked has none. Raises LogUnavailableError."""
    try:
        async with asyncio.timeout(ORDERED_WITHIN):
            found = await ordered_kick_of(backend.log, backend.topics, control, command)
    except TimeoutError:
        found = OrderedKick()
    if found is None:
        return None
    kick = found.outcome
    return command_shapes.OrderedKick(
        is_known=kick is not None,
        count=None if kick is None else kick.count,
        tried=None if kick is None else kick.tried,
        delivered=None if kick is None else kick.delivered,
        waiting={} if kick is None else dict(kick.untried_by_reason),
        failed_by_result={} if kick is None else dict(kick.failed_by_result),
        repeated_failures={} if kick is None else dict(kick.repeated_failures),
        dead=None if kick is None else kick.dead,
        unfinished=None if kick is None else found.unfinished,
    )


async def list_replays(
    backend: Backend, principal: Principal, *, limit: int = 50, cursor: str | None = None
) -> command_shapes.ReplayPage:
    """List replays, the last that was asked for first."""
    after = None if cursor is None else place_after(decode_cursor(cursor, listing=("replays",)))
    async with must_be_available():
        control = await backend.control()
    found = [each for each in control.commands.values() if each.kind == "replay" and each.selection is not None]
    found.sort(key=place_of, reverse=True)
    items: list[command_shapes.Replay] = []
    last = (0, "")
    for command in found:
        if (after is not None and place_of(command) >= after) or not knows_command(backend, principal, command):
            continue
        if len(items) == limit:
            return command_shapes.ReplayPage(
                items=tuple(items), next_cursor=encode_cursor({"at": last[0], "name": last[1]}, listing=("replays",))
            )
        items.append(_replay(control, command))
        last = place_of(command)
    return command_shapes.ReplayPage(items=tuple(items), next_cursor=None)


async def get_replay(backend: Backend, principal: Principal, *, replay: str) -> command_shapes.Replay:
    """Return a replay with its progress."""
    async with must_be_available():
        control = await backend.control()
    command = control.commands.get(f"replay/{replay}")
    if command is None or command.selection is None or not knows_command(backend, principal, command):
        raise not_found("a replay")
    return _replay(control, command)


def place_of(command: ControlRecord) -> tuple[int, str]:
    """Return what commands are listed by: when they were given."""
    return round(command.at * 1e6), command.name


def place_after(at: Mapping[str, Any]) -> tuple[int, str]:
    """Return the place that a cursor has. Raises ApiError."""
    name = at.get("name")
    if not isinstance(name, str):
        raise ApiError(Code.INVALID_CURSOR, "cursor: expected the next_cursor of the same list")
    return whole(at, "at"), name


def _replay(control: Control, command: ControlRecord) -> command_shapes.Replay:
    progress, asked = progress_of(control, command.name), command.selection
    assert asked is not None, command
    progress = progress or ReplayStatus(command, 0, 0, 0)
    return command_shapes.Replay(
        id=command.name,
        at=rfc3339(command.at),
        state=command.state,
        route=asked.route,
        destination=asked.destination,
        source=asked.source,
        since=_time(asked.since),
        until=None if asked.until is None else _time(asked.until),
        rate=asked.rate,
        undelivered=asked.undelivered,
        scanned=progress.scanned,
        total=progress.total,
        queued=progress.injected,
        unread_partitions=progress.unread,
        is_final=progress.has_ended and command not in control.unacknowledged_cancellations(),
        detail=command.detail or None,
    )


def sees_command(backend: Backend, principal: Principal, command: ControlRecord) -> bool:
    """Return whether a principal sees that there is a command: who has no limits, or sees what it is about."""
    return _is_within(backend, principal, command, sees_named)


def knows_command(backend: Backend, principal: Principal, command: ControlRecord) -> bool:
    """Return whether a principal is told of a command and what has come of it: who may give one like it.

    What it counts may else be others': of a route of several sources, say.
    """
    return _is_within(backend, principal, command, may_operate)


def _is_within(
    backend: Backend,
    principal: Principal,
    command: ControlRecord,
    allows: Callable[[Principal, Rules, str, str, Iterable[str]], bool],
) -> bool:
    """Return whether somebody has no limits, or these allow what a command is about.

    What may be about single events is whose asked for it: its record doesn't say of which sources these are.
    """
    if not principal.is_limited:
        return True
    if command.kind in ("redeliver", "dead") and identity_of(command.by, command.via) == principal.identity:
        return True
    rules = backend.rules()
    kind, _, name = command.name.partition("/")
    about, only = [(kind, name)], None
    if command.kind == "replay":
        selection = command.selection
        about, only = ([], None) if selection is None else ([("route", selection.route)], selection.source)
    elif command.kind == "dead":
        about = [("route", command.filter.route or ""), ("destination", command.filter.destination or "")]
    for each, its_name in about:
        if each == "route" and its_name in rules.routes:
            sources: Iterable[str] = rules.routes[its_name].sources if only is None else (only,)
        elif each == "destination" and its_name in rules.destinations:
            sources = {
                source for route in rules.routes.values() if its_name in route.destinations for source in route.sources
            }
        else:
            continue
        if allows(principal, rules, each, its_name, sources):
            return True
    return False


def _time(at: float) -> str | None:
    return rfc3339(min(at, LATEST - 1)) if at > 0 else None
