"""Redeliveries of single events: asking for one, finding its event, and following it to its end.

Whoever asks twice under one name gets one redelivery: its record is the same, and so is the answer.
"""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection
from pathlib import Path
from typing import NamedTuple

from gateway.engine.control.records import ControlRecord
from gateway.engine.control.redelivery_records import Redelivery, RedeliveryResult
from gateway.engine.control.state import Control
from gateway.engine.jobs.log_reader import checksum_of
from gateway.engine.jobs.redeliver import KEEP_FOR
from gateway.index.file import IndexUnavailableError
from gateway.index.reading import index_to_read
from gateway.log.base import Log
from gateway.log.json_fields import ID
from gateway.log.records import decode_event
from gateway.log.topics import Topics
from gateway.model import UnreadableRecordError, UsageError, shown
from gateway.ops.audit import Actor, Auditor
from gateway.ops.control_client import CANCEL_GRACE, catch_up, place_command
from gateway.ops.log_search import Found, find_event, is_position
from gateway.ops.output import rfc3339

MAX_PENDING = 1_000
"""Redeliveries that wait at a time, at most: each is a record that every process keeps. A replay takes any number."""
MAX_KNOWN = 10_000
"""Redeliveries of a week, at most: each is remembered for that long."""
MAX_REASON = 500
"""Characters of a reason."""
MAX_NAME = 200
"""Characters of a name: with it, the key of its checkpoint is an id."""
POLL_INTERVAL = 0.1


class Asked(NamedTuple):
    """A redelivery's command; `is_new` is False if it had been asked for before under its name."""

    command: ControlRecord
    is_new: bool


async def find_to_redeliver(log: Log, topics: Collection[str], name: str, index: Path) -> Found | None:
    """Return the event with an id, of several the newest, or at a position (`topic/partition@offset`).

    An id is looked up in the index, if there is one in that file; what isn't in it is searched in the log. Raises
    LogUnavailableError, and UnreadableRecordError if the record at the position can't be read.
    """
    if not is_position(name, topics):
        position = await asyncio.to_thread(_position_by_index, index, name)
        if position and is_position(position, topics):
            try:
                found = await find_event(log, topics, position)
            except UnreadableRecordError:
                found = None
            if found is not None and decode_event(found.record).id == name:  # else it is an index of another log
                return found
    return await find_event(log, topics, name)


def _position_by_index(path: Path, event: str) -> str:
    """Return where an event is, by the index; "" if that doesn't say so."""
    try:
        with index_to_read(path) as index:
            found = index.newest(event)
    except (UsageError, IndexUnavailableError):
        return ""
    return "" if found is None else found.position


async def redeliver(
    log: Log,
    topics: Topics,
    control: Control,
    found: Found,
    *,
    route: str | None = None,
    destination: str | None = None,
    reason: str = "",
    by: str = "",
    actor: Actor | None = None,
    name: str = "",
) -> Asked:
    """Have an event delivered again, by all routes that take it or one, to all their destinations or one.

    With a `name`, that is done once: if it was asked for before, nothing is stored. Without one, it gets one. `actor`
    is who asks, for the audit record, and `by` for the redelivery's own: by default who runs this process. Raises
    UsageError if the name is another redelivery's or can't be one, the reason is too long, or there are too many
    redeliveries already; LogUnavailableError.
    """
    if name and (len(name) > MAX_NAME or not ID.fullmatch(name)):
        raise UsageError(
            f"redelivery: expected a name of at most {MAX_NAME} visible ASCII characters, got {shown(name)}"
        )
    if len(reason) > MAX_REASON:
        raise UsageError(f"redelivery: expected a reason of at most {MAX_REASON} characters, got {len(reason):,}")
    partition = f"{found.partition.topic}/{found.partition.number}"
    asked = Redelivery(
        event=decode_event(found.record).id,
        partition=partition,
        offset=found.record.offset,
        route=route,
        destination=destination,
        reason=reason,
    )
    now, actor = log.now(), actor or Actor.of_command()
    command = ControlRecord(
        kind="redeliver",
        name=name or f"{int(now * 1000):x}-{secrets.token_hex(4)}",
        state="requested",
        at=now,
        by=by or actor.who,
        via=actor.via,
        redelivery=asked,
        last_records={partition: checksum_of(found.record)},
    )
    before = control.commands.get(command.key)
    if command.key in control.newer or (before is not None and before.redelivery != asked):
        raise UsageError(f"redelivery {command.name}: it was of another event or of other targets")
    if before is not None:
        return Asked(before, is_new=False)
    known = redeliveries(control)
    recent = [each for each in known if each.at > now - KEEP_FOR]
    if len(recent) >= MAX_KNOWN or len([each for each in known if each.is_pending]) >= MAX_PENDING:
        limits = f"at most {MAX_PENDING:,} that wait, and {MAX_KNOWN:,} within a week"
        raise UsageError(f"redelivery: {limits}; `gateway replay` delivers many events again")
    await place_command(log, topics, command, Auditor(log, topics, actor, reason))
    return Asked(command, is_new=True)


def redeliveries(control: Control) -> list[ControlRecord]:
    """Return the redeliveries that are known, the last that was asked for first."""
    found = [command for command in control.commands.values() if command.kind == "redeliver"]
    return sorted(found, key=lambda command: -command.at)


async def cancel_redelivery(
    log: Log, topics: Topics, control: Control, name: str, *, actor: Actor | None = None, reason: str = ""
) -> ControlRecord | None:
    """Cancel a redelivery; its current batch is still injected. None if there is none of that name that hasn't ended.

    Raises LogUnavailableError.
    """
    command = control.commands.get(f"redeliver/{name}")
    if command is None or not command.is_pending:
        return None
    actor = actor or Actor.of_command()
    cancelled = command.with_state("cancelled", detail=f"by {actor.who}")
    await place_command(log, topics, cancelled, Auditor(log, topics, actor, reason))
    return cancelled


class RedeliveryProgress(NamedTuple):
    """How far a redelivery is; `is_final` once a gateway has said what it has injected in all."""

    command: ControlRecord
    results: tuple[RedeliveryResult, ...]
    is_final: bool


def progress_of(control: Control, name: str) -> RedeliveryProgress | None:
    """Return how far a redelivery is; None if there is none of that name."""
    command = control.commands.get(f"redeliver/{name}")
    if command is None:
        return None
    last = control.last_checkpoint(command.key)
    results = command.results if last is None or len(command.results) > len(last.results) else last.results
    is_final = not command.is_pending and (command.state == "done" or (last is not None and not last.is_pending))
    return RedeliveryProgress(command, results, is_final)


async def followed(
    log: Log,
    topics: Topics,
    name: str,
    *,
    timeout: float,
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
) -> AsyncGenerator[RedeliveryProgress, None]:
    """Yield a redelivery's progress, now and at each change, until it is final; nothing if there is none of that name.

    Ends early if nothing new is in the control topic for `timeout` seconds: no gateway carries it out, or it waits for
    a partition. A cancelled one is waited for no longer than CANCEL_GRACE. Raises LogUnavailableError.
    """
    control, position, waited = Control(), 0, 0.0
    last: RedeliveryProgress | None = None
    while True:
        before = position
        position = await catch_up(log, topics, control, before)
        waited = 0.0 if position > before else waited
        progress = progress_of(control, name)
        if progress is None:
            return
        if progress != last:
            last = progress
            yield progress
        limit = min(timeout, CANCEL_GRACE) if progress.command.state == "cancelled" else timeout
        if progress.is_final or waited >= limit:
            return
        await sleep(POLL_INTERVAL)
        waited += POLL_INTERVAL


def redelivery_fields(progress: RedeliveryProgress) -> dict[str, object]:
    """Return a redelivery as JSON has it."""
    command, asked = progress.command, progress.command.redelivery
    assert asked is not None, command
    return {
        "redelivery": command.name,
        "at": rfc3339(command.at),
        "by": command.by or None,
        "reason": asked.reason or None,
        "event": asked.event,
        "position": asked.position,
        "route": asked.route,
        "destination": asked.destination,
        "state": command.state,
        "is_final": progress.is_final,
        "detail": command.detail or None,
        "deliveries": [each.as_json() for each in progress.results],
    }
