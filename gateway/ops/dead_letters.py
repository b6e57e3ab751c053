"""Dead letters, and whether each is open or resolved.

A dead letter stays in its topic, whatever is done about it. It is open until a command has replayed or dropped it.
"""

from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Protocol

from gateway.engine.control.records import ControlRecord, DeadFilter, DeadLetterProperties
from gateway.engine.control.state import Control
from gateway.engine.jobs.dead_letters import read_dead_letter
from gateway.log.base import Log, Partition, Record
from gateway.log.records import StoredDelivery, decode_delivery
from gateway.log.topics import Topics
from gateway.model import Attempt, Event, UnreadableRecordError, UsageError, result_label
from gateway.ops.log_search import Found, newest_first


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """A record of the dead-letter topic. `decoded` is None if it can't be decoded; `problem` says why."""

    partition: Partition
    record: Record
    properties: DeadLetterProperties
    decoded: StoredDelivery | None
    problem: str
    resolved_by: ControlRecord | None

    @property
    def position(self) -> str:
        """Return its partition and offset, which even an unreadable one has."""
        return f"{self.partition.number}@{self.record.offset}"

    @property
    def status(self) -> str:
        if self.resolved_by is None:
            return "open"
        return "replayed" if self.resolved_by.action == "replay" else "dropped"

    @property
    def last_result(self) -> str:
        """Return the result of its last attempt, or what else ended the delivery."""
        if self.decoded is None:
            return self.problem
        attempts = self.decoded.delivery.attempts
        if not attempts:
            return self.decoded.metadata.detail
        return result_of(attempts[-1])

    def is_called(self, name: str) -> bool:
        """Return whether that is the id of its delivery or of its event, or its position."""
        return name == self.position or (
            self.decoded is not None and name in (self.decoded.delivery.id, self.decoded.delivery.event.id)
        )


def result_of(attempt: Attempt) -> str:
    """Return the result of an attempt, in a few words: a status once, if the detail begins with it."""
    label, detail = result_label(attempt), attempt.detail
    if detail.startswith(f"{label} "):  # "422 Unprocessable Entity"
        return detail
    return f"{label}: {detail}" if detail else label


async def read_dead_letters(
    log: Log,
    topics: Topics,
    control: Control,
    which: DeadFilter,
    *,
    include_resolved: bool,
    unread: dict[Partition, str] | None = None,
    below: Mapping[Partition, int] | None = None,
) -> AsyncGenerator[DeadLetter, None]:
    """Yield the dead letters that the filter covers, newest first: the open ones, or with `include_resolved` all.

    With `unread`, unreadable partitions are skipped and recorded there, with the reason. `below` is as in
    `newest_first`.
    """
    history = newest_first(log, [topics.dead], since=which.since, unread=unread, below=below)
    async with aclosing(history):
        async for found in history:
            letter = dead_letter_of(found, control)
            if which.covers(letter.properties) and (include_resolved or letter.resolved_by is None):
                yield letter


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedLetter:
    """A dead letter as lists have it. If it can't be read, `delivery_id` is None, and `detail` says why.

    `received_at` is when its event was received, None if that isn't known. `last_result` is as of a DeadLetter.
    """

    partition: Partition
    offset: int
    at: float
    status: str
    reason: str
    detail: str
    delivery_id: str | None
    event_id: str
    received_at: float | None
    source: str
    type: str
    route: str
    destination: str
    item: int | None
    attempts: int
    last_result: str
    owner: str

    @property
    def position(self) -> str:
        """Return its partition and offset, which even an unreadable one has."""
        return f"{self.partition.number}@{self.offset}"


class Hides(Protocol):
    """Hides what people may not see."""

    def letter(self, letter: DeadLetter) -> DeadLetter: ...


def listed(letter: DeadLetter) -> ListedLetter:
    """Return a dead letter as lists have it."""
    decoded, which = letter.decoded, letter.properties
    delivery = None if decoded is None else decoded.delivery
    event = None if delivery is None else delivery.event
    return ListedLetter(
        partition=letter.partition,
        offset=letter.record.offset,
        at=which.at,
        status=letter.status,
        reason=which.reason,
        detail=letter.problem if decoded is None else decoded.metadata.detail,
        delivery_id=None if delivery is None else delivery.id,
        event_id="" if event is None else event.id,
        received_at=None if event is None else event.received_at,
        source="" if event is None else event.source,
        type="" if event is None else event.type,
        route=which.route if delivery is None else delivery.route,
        destination=which.destination if delivery is None else delivery.destination,
        item=None if delivery is None or delivery.part is None else delivery.part.number,
        attempts=delivery.attempts[-1].number if delivery is not None and delivery.attempts else 0,
        last_result=letter.last_result,
        owner="" if decoded is None else decoded.metadata.owner,
    )


def just_after(newest: float) -> float:
    """Return the time before which everything was written that was listed by the API, whose newest is of that time.

    Lists tell when a dead letter was written to the millisecond, so what is of the same one is before it, too.
    """
    return newest + 0.001


class Group:
    """Dead letters with the same reason, last result, route and destination.

    `event` is the id of the newest one's event, and `received` when the earliest of their events was received; "" and
    the oldest letter's time if none can be read. `ids` are those of their deliveries, by which commands cover no
    others; None if they are more than MAX_IDS, or not all known.
    """

    MAX_IDS = 5

    def __init__(self, letter: ListedLetter) -> None:
        self.reason = letter.reason
        self.last_result = letter.last_result
        self.route, self.destination = letter.route, letter.destination
        self.count = 0
        self.oldest = self.newest = self.received = letter.at
        self.event = ""
        self.ids: tuple[str, ...] | None = ()

    def add(self, letter: ListedLetter) -> None:
        self.count += 1
        if letter.delivery_id is None:
            self.ids = None
        elif self.ids is not None and letter.delivery_id not in self.ids:
            self.ids = (*self.ids, letter.delivery_id) if len(self.ids) < self.MAX_IDS else None
        at = letter.at
        if letter.received_at is not None:
            self.received = min(self.received, letter.received_at)
        if letter.event_id and (not self.event or at > self.newest):
            self.event = letter.event_id
        self.oldest, self.newest = min(self.oldest, at), max(self.newest, at)


class Groups:
    """Dead letters, grouped. Beyond `MAX_GROUPS`, different results (such as ones with an id) share a group."""

    MAX_GROUPS = 1000

    def __init__(self) -> None:
        self._groups: dict[tuple[str, str, str, str], Group] = {}

    def add(self, letter: DeadLetter | ListedLetter) -> None:
        its = listed(letter) if isinstance(letter, DeadLetter) else letter
        key = its.reason, its.last_result, its.route, its.destination
        if key not in self._groups and len(self._groups) >= self.MAX_GROUPS:
            key = its.reason, "", its.route, its.destination
        if key not in self._groups:
            self._groups[key] = Group(its)
            self._groups[key].last_result = key[1] or "(others)"
        self._groups[key].add(its)

    def largest_first(self) -> list[Group]:
        return sorted(self._groups.values(), key=lambda group: (-group.count, -group.newest))

    def beside(self, group: Group) -> int:
        """Return how many others have a group's route, destination and reason; without a destination, any counts."""
        which = group.route, group.reason
        alike = [each for each in self._groups.values() if (each.route, each.reason) == which and each is not group]
        return sum([each.count for each in alike if group.destination in ("", each.destination)])


class LettersInLog:
    """Dead letters in the log, as the control records have them by now; with `below`, those at smaller offsets."""

    def __init__(
        self, log: Log, topics: Topics, control: Control, *, below: Mapping[Partition, int] | None = None
    ) -> None:
        self._log = log
        self._topics = topics
        self._control = control
        self._below = below

    async def read(
        self, which: DeadFilter, *, include_resolved: bool = False, hidden: Hides | None = None
    ) -> AsyncGenerator[ListedLetter, None]:
        """Yield what a filter covers, newest first, without what is hidden: the open ones, or all."""
        letters = read_dead_letters(
            self._log,
            self._topics,
            self._control,
            which,
            include_resolved=include_resolved,
            below=self._below,
        )
        async with aclosing(letters) as found:
            async for letter in found:
                yield listed(letter if hidden is None else hidden.letter(letter))

    async def deliveries_of(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return the ids of the deliveries that have open dead letters under these names. Raises UsageError."""
        return await deliveries_of(self._log, self._topics, self._control, names)


async def find_dead_letters(log: Log, topics: Topics, control: Control, name: str) -> Sequence[DeadLetter]:
    """Return the dead letters of a delivery or an event, or the one at a position; newest first, with resolved ones."""
    everything = read_dead_letters(log, topics, control, DeadFilter(), include_resolved=True)
    return [letter async for letter in everything if letter.is_called(name)]


async def open_dead_letters_of(
    log: Log, topics: Topics, control: Control, event: Event, unread: dict[Partition, str]
) -> Sequence[DeadLetter]:
    """Return an event's open dead letters, newest first, of those since its receipt.

    `unread` is as in `read_dead_letters`. Raises LogUnavailableError.
    """
    which = DeadFilter(since=event.received_at - RECEIPT_TOLERANCE)
    found = read_dead_letters(log, topics, control, which, include_resolved=False, unread=unread)
    async with aclosing(found) as letters:
        return [letter async for letter in letters if letter.is_called(event.id)]


RECEIPT_TOLERANCE = 7200.0
"""Seconds by which the clocks that an event and its dead letter were dated by may differ."""


async def deliveries_of(log: Log, topics: Topics, control: Control, names: Sequence[str]) -> tuple[str, ...]:
    """Return the ids of the deliveries that have open dead letters under these names.

    Raises UsageError for a name without one, or for an unreadable record, which no command can name.
    """
    ids: dict[str, None] = {}
    missing = dict.fromkeys(names)
    async for letter in read_dead_letters(log, topics, control, DeadFilter(), include_resolved=False):
        for name in names:
            if letter.is_called(name):
                if letter.decoded is None:
                    raise unreadable(name, letter.problem)
                ids[letter.properties.id] = None
                missing.pop(name, None)
    if missing:
        raise not_open(missing)
    return tuple(ids)


def unreadable(name: str, problem: str) -> UsageError:
    """Return the error for a name of a dead letter that no command can act on."""
    return UsageError(f"{name}: expected a dead letter that can be read, got: {problem}")


def not_open(names: Iterable[str]) -> UsageError:
    """Return the error for names without an open dead letter."""
    return UsageError("\n".join([f"{name}: expected the id of an open dead letter, got none" for name in names]))


def dead_letter_of(found: Found, control: Control) -> DeadLetter:
    """Return what a record of the dead-letter topic is, and what the commands so far have done about it."""
    partition, record = found
    properties, decoded = read_dead_letter(record)
    reason = dict(record.headers).get("gw_undecodable", b"")
    return DeadLetter(
        partition=partition,
        record=record,
        properties=properties,
        decoded=decoded,
        problem="" if decoded else reason.decode(errors="replace") or _problem(record),
        resolved_by=control.resolved_by(properties, partition, record.offset),
    )


def _problem(record: Record) -> str:
    try:
        decode_delivery(record)
    except UnreadableRecordError as error:
        return str(error)
    return ""
