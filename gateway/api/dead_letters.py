"""Dead letters, from the log: newest first, so many at a time, and for so long and no longer."""

import asyncio
import time
from collections.abc import Callable, Collection
from contextlib import aclosing

from gateway.access.principal import Principal
from gateway.api import shapes
from gateway.api.backend import Backend, must_be_available
from gateway.api.cursors import decode_cursor, encode_cursor, whole
from gateway.api.events import raw_event
from gateway.api.json_shapes import time_of
from gateway.api.problems import ApiError, Code, not_found
from gateway.api.shares import whose_turn
from gateway.api.visibility import reads_bodies, sees_delivery, sees_source
from gateway.engine.control.records import DeadFilter
from gateway.engine.jobs.dead_letters import read_dead_letter
from gateway.engine.unavailable_partitions import name_of
from gateway.log.base import Partition
from gateway.log.records import encode_record_metadata
from gateway.model import Attempt, Delivery
from gateway.ops.dead_letters import DeadLetter, dead_letter_of
from gateway.ops.log_search import Found, newest_first
from gateway.ops.output import rfc3339
from gateway.ops.redaction import Redactions
from gateway.turns import give_way

SECONDS = 1.0
"""For which a page is looked for; what was found by then is the answer, with where to go on."""
SECONDS_BY_ID = 5.0
"""For which single dead letters are looked for, the newest first."""
RECORDS_PER_STEP = 16
"""Records decoded before other tasks run: less than a millisecond."""
MOST_ATTEMPTS = 100


async def list_dead_letters(
    backend: Backend,
    principal: Principal,
    *,
    id: str | None = None,  # noqa: A002 - what it is
    route: str | None = None,
    destination: str | None = None,
    reason: str | None = None,
    since: str | None = None,
    until: str | None = None,
    include_resolved: bool = False,
    limit: int = 50,
    cursor: str | None = None,
) -> shapes.DeadLetterPage:
    """List dead letters, newest first: the open ones, or all of them."""
    topic = backend.topics.dead
    which = dead_filter(route=route, destination=destination, reason=reason, since=since, until=until)
    listing = ("dead-letters", id, which, include_resolved)
    ends: dict[str, object] = {} if cursor is None else dict(decode_cursor(cursor, listing=listing))
    before = {int(number): whole(ends, number) for number in ends if number.isdecimal() and number.isascii()}
    letters: list[DeadLetter] = []
    stop_at, is_cut_short, is_more = time.monotonic() + SECONDS, False, False
    async with backend.turn(principal.identity), must_be_available():
        control = await backend.control()
        bounds, unread = await backend.log.readable(topic)
        if cursor is None:
            before = {number: end for number, (_, end) in bounds.items()}
        below = {Partition(topic, number): end for number, end in before.items()}
        history = newest_first(backend.log, [topic], since=which.since, unread={}, below=below)
        async with aclosing(history):
            looked = 0
            async for found in history:
                if len(letters) == limit:
                    is_more = True
                    break
                if time.monotonic() > stop_at:
                    is_more = is_cut_short = True
                    break
                looked += 1
                if looked % RECORDS_PER_STEP == 0:
                    await asyncio.sleep(0)
                before[found.partition.number] = found.record.offset
                letter = dead_letter_of(found, control)
                is_asked = which.covers(letter.properties) and (include_resolved or letter.resolved_by is None)
                is_asked &= id is None or letter.is_called(id)
                if is_asked and _is_seen(backend, principal, letter):
                    letters.append(letter)
    return shapes.DeadLetterPage(
        items=tuple([_letter(each) for each in await _seen(backend, principal, letters)]),
        next_cursor=encode_cursor({str(number): end for number, end in before.items()}, listing=listing)
        if is_more
        else None,
        is_cut_short=is_cut_short,
        unread_partitions=tuple([f"{topic}/{number}" for number in sorted(unread)]),
    )


async def get_dead_letter(backend: Backend, principal: Principal, *, position: str) -> shapes.DeadLetterDetail:
    """Return the dead letter at a position, PARTITION@OFFSET, with its attempts."""
    number, _, offset = position.partition("@")
    is_position = all(part.isdecimal() and part.isascii() and len(part) < 19 for part in (number, offset))  # noqa: PLR2004 - 64 bits
    if not is_position:
        raise not_found("the position of a dead letter")
    partition, at = Partition(backend.topics.dead, int(number)), int(offset)
    async with must_be_available():
        bounds, _ = await backend.log.readable(partition.topic)
        first, end = bounds.get(partition.number, (0, 0))
        found = []
        if first <= at < end:
            scan = backend.log.scan(partition, at, at + 1)
            found = [record async for records in scan for record in records]
        control = await backend.control()
    if not found:
        raise not_found("the position of a dead letter")
    letter = dead_letter_of(Found(partition, found[0]), control)
    if not _is_seen(backend, principal, letter):
        raise not_found("the position of a dead letter")
    (letter,) = await _seen(backend, principal, [letter])
    stored = letter.decoded
    source = "" if stored is None else stored.delivery.event.source
    is_read = reads_bodies(principal) and sees_source(principal, backend.rules(), source)
    attempts = () if stored is None else stored.delivery.attempts[-MOST_ATTEMPTS:]
    return shapes.DeadLetterDetail(
        letter=_letter(letter),
        attempts=tuple([_attempt(each) for each in attempts]),
        metadata={} if stored is None else encode_record_metadata(stored.metadata),
        event=raw_event(stored.delivery.event, f"{partition.topic}/{letter.position}", len(found[0].value))
        if is_read and stored is not None
        else None,
    )


async def judge_letters(
    backend: Backend,
    principal: Principal,
    ids: Collection[str],
    is_right: Callable[[Delivery], bool],
    *,
    since: float | None,
) -> list[str]:
    """Return those of these ids whose delivery isn't right, of deliveries with dead letters written since a time.

    Resolved ones, too. Each is judged as it is read, and nothing of it is kept. Raises ApiError if somebody doesn't see
    one of them, if there is none, and if it isn't found in time.
    """
    missing, unread, wrong = set(ids), dict[Partition, str](), list[str]()
    unseen = ApiError(Code.NOT_FOUND, "body.ids: not all are ids of deliveries with dead letters")
    stop_at, looked = time.monotonic() + SECONDS_BY_ID, 0
    async with backend.turn(principal.identity), must_be_available():
        history = newest_first(backend.log, [backend.topics.dead], since=since, unread=unread)
        async with aclosing(history):
            async for _, record in history:
                if time.monotonic() > stop_at:
                    told = f"body.ids: expected dead letters that are found within {SECONDS_BY_ID:g} s, got older ones"
                    raise ApiError(Code.CONFLICT, f"{told}: name their route or destination, too")
                looked += 1
                if looked % RECORDS_PER_STEP == 0:
                    await asyncio.sleep(0)
                letter, stored = read_dead_letter(record)
                if stored is not None and letter.id in missing:  # of one id, all are of one event, by one route
                    missing.discard(letter.id)
                    if not _sees(backend, principal, stored.delivery):
                        raise unseen
                    if not is_right(stored.delivery):
                        wrong.append(letter.id)
                    if not missing:
                        return wrong
    if unread:
        where = ", ".join(sorted([name_of(partition) for partition in unread]))
        raise ApiError(Code.LOG_UNAVAILABLE, f"expected to find the dead letters, got partitions without any: {where}")
    raise unseen


def dead_filter(
    *, route: str | None, destination: str | None, reason: str | None, since: str | None, until: str | None
) -> DeadFilter:
    """Return a filter; times are as RFC 3339 has them."""
    return DeadFilter(
        route=route,
        destination=destination,
        reason=reason,
        since=None if since is None else time_of(since),
        until=None if until is None else time_of(until),
    )


async def _seen(backend: Backend, principal: Principal, letters: list[DeadLetter]) -> list[DeadLetter]:
    """Return dead letters as people may see them, without what their sources' `redact` hides."""
    rules = backend.rules()
    if all(source.redaction is None for source in rules.sources.values()):
        return letters
    hidden = Redactions(rules)

    def seen() -> list[DeadLetter]:
        found = []
        for letter in letters:
            give_way()
            found.append(hidden.letter(letter))
        return found

    return await backend.aside(whose_turn(principal), seen)


def _is_seen(backend: Backend, principal: Principal, letter: DeadLetter) -> bool:
    """Return whether a principal sees a dead letter; one that can't be read, only who has no limits."""
    if letter.decoded is None:
        return not principal.is_limited
    return _sees(backend, principal, letter.decoded.delivery)


def _sees(backend: Backend, principal: Principal, which: Delivery) -> bool:
    return sees_delivery(principal, backend.rules(), which.event.source, which.route, which.destination)


def _letter(letter: DeadLetter) -> shapes.DeadLetter:
    decoded = letter.decoded
    resolved_at = None if letter.resolved_by is None else rfc3339(letter.resolved_by.at)
    if decoded is None:
        return shapes.DeadLetter(
            position=letter.position,
            topic=letter.partition.topic,
            at=rfc3339(letter.properties.at),
            status=letter.status,
            reason=letter.properties.reason,
            detail=letter.problem or None,
            delivery_id=None,
            event_id=None,
            source=None,
            type=None,
            route=None,
            destination=None,
            item=None,
            attempts=0,
            last_result=None,
            owner=None,
            resolved_at=resolved_at,
        )
    delivery = decoded.delivery
    return shapes.DeadLetter(
        position=letter.position,
        topic=letter.partition.topic,
        at=rfc3339(letter.properties.at),
        status=letter.status,
        reason=letter.properties.reason,
        detail=decoded.metadata.detail or None,
        delivery_id=delivery.id,
        event_id=delivery.event.id,
        source=delivery.event.source,
        type=delivery.event.type,
        route=delivery.route,
        destination=delivery.destination or None,
        item=None if delivery.part is None else delivery.part.number,
        attempts=delivery.attempts[-1].number if delivery.attempts else 0,
        last_result=letter.last_result if delivery.attempts else None,
        owner=decoded.metadata.owner or None,
        resolved_at=resolved_at,
    )


def _attempt(attempt: Attempt) -> shapes.Attempt:
    return shapes.Attempt(
        number=attempt.number,
        at=rfc3339(attempt.at),
        seconds=attempt.seconds,
        result=attempt.result,
        status=attempt.status,
        decision=None,
        detail=attempt.detail or None,
        position=None,
    )
