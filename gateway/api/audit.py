"""Who has done what, from the log: newest first, so many acts at a time, and for so long and no longer."""

import asyncio
import time
from contextlib import aclosing
from dataclasses import dataclass

from gateway.access.principal import Principal
from gateway.api.backend import Backend, must_be_available
from gateway.api.cursors import decode_cursor, encode_cursor, whole
from gateway.api.json_shapes import Time, time_of
from gateway.api.visibility import needs_no_limit
from gateway.log.audit_records import ActOutcome
from gateway.log.base import Partition
from gateway.ops.audit import Act, Acts, UnreadableAct, is_by
from gateway.ops.control_client import current_outcome
from gateway.ops.log_search import newest_first
from gateway.ops.output import rfc3339

SECONDS = 1.0
"""For which a page is looked for; what was found by then is the answer, with where to go on."""
RECORDS_PER_STEP = 32
"""Records decoded before other tasks run: less than a millisecond."""
LOOKED_AHEAD = 1000
"""Records above a page in which what came of its acts is looked for: mostly, it is the next one or two."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    """Something that somebody did, or was about to do: who, from where (`origin`), what, on what, and why.

    `via` is how it is known who that was, `is_proven` whether they had to prove it. `outcome` is null if nothing is
    known of what came of it. Of a record that can't be read there are `at`, `position` and the `problem` alone.
    """

    at: Time
    position: str
    problem: str | None
    id: str | None
    who: str | None
    via: str | None
    is_proven: bool
    origin: str | None
    what: str | None
    on: str | None
    why: str | None
    outcome: ActOutcome | None
    detail: str | None
    outcome_at: Time | None


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditPage:
    """Acts, newest first. `is_cut_short`: looking took too long, and the next page goes on from there.

    `unread_partitions` are those of the topic that can't be read now.
    """

    items: tuple[AuditEntry, ...]
    next_cursor: str | None
    is_cut_short: bool
    unread_partitions: tuple[str, ...]


async def list_audit(
    backend: Backend,
    principal: Principal,
    *,
    who: str | None = None,
    since: str | None = None,
    limit: int = 50,
    cursor: str | None = None,
) -> AuditPage:
    """List who paused, kicked, replayed or dropped something, and what came of it, newest first."""
    needs_no_limit(principal, "what others have done")
    topic, listing = backend.topics.audit, ("audit", who, since)
    ends: dict[str, object] = {} if cursor is None else dict(decode_cursor(cursor, listing=listing))
    before = {int(number): whole(ends, number) for number in ends if number.isdecimal() and number.isascii()}
    items: list[AuditEntry] = []
    acts, stop_at, is_cut_short, is_more = Acts(), time.monotonic() + SECONDS, False, False
    async with backend.turn(principal.identity), must_be_available():
        control = await backend.control()
        bounds, unread = await backend.log.readable(topic)
        if cursor is None:
            before = {number: end for number, (_, end) in bounds.items()}
        below = {Partition(topic, number): end + LOOKED_AHEAD for number, end in before.items()}
        since_at = None if since is None else time_of(since)
        async with aclosing(newest_first(backend.log, [topic], since=since_at, unread={}, below=below)) as history:
            looked = 0
            async for found in history:
                looked += 1
                if looked % RECORDS_PER_STEP == 0:
                    await asyncio.sleep(0)
                act = acts.of(found)
                if found.record.offset >= before.get(found.partition.number, 0):
                    continue  # of the page before
                if time.monotonic() > stop_at:
                    is_more = is_cut_short = True
                    break
                if act is not None and (who is None or is_by(act, who)):
                    if len(items) == limit:
                        is_more = True
                        break
                    seen = act if isinstance(act, UnreadableAct) else current_outcome(act, control)
                    items.append(_entry(seen, found.position))
                before[found.partition.number] = found.record.offset
    return AuditPage(
        items=tuple(items),
        next_cursor=encode_cursor({str(number): end for number, end in before.items()}, listing=listing)
        if is_more
        else None,
        is_cut_short=is_cut_short,
        unread_partitions=tuple([f"{topic}/{number}" for number in sorted(unread)]),
    )


def _entry(act: Act | UnreadableAct, position: str) -> AuditEntry:
    if isinstance(act, UnreadableAct):
        return AuditEntry(
            at=rfc3339(act.at),
            position=position,
            problem=act.problem,
            id=None,
            who=None,
            via=None,
            is_proven=False,
            origin=None,
            what=None,
            on=None,
            why=None,
            outcome=None,
            detail=None,
            outcome_at=None,
        )
    record = act.record
    return AuditEntry(
        at=rfc3339(record.at),
        position=position,
        problem=None,
        id=record.id,
        who=record.who,
        via=record.via,
        is_proven=record.is_proven,
        origin=record.origin,
        what=record.what,
        on=record.on,
        why=record.why or None,
        outcome=None if act.outcome is ActOutcome.BEGUN else act.outcome,
        detail=act.detail or None,
        outcome_at=None if act.ended_at is None else rfc3339(act.ended_at),
    )
