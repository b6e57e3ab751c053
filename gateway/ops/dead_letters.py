"""The dead letters, and what has become of each.

A dead letter stays in its topic whatever is done about it. It is open until an order has replayed or dropped it.
"""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from gateway.engine.control.records import DeadFilter, Letter, Order
from gateway.engine.control.state import Control
from gateway.engine.jobs.dead_letters import read_letter
from gateway.log.base import Log, Partition, Record
from gateway.log.records import StoredDelivery, decode_delivery
from gateway.log.topics import Topics
from gateway.model import Attempt, UnreadableRecordError, UsageError, result_label
from gateway.ops.log_search import Found, newest_first


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """A record of the dead-letter topic. `stored` is None where it can't be read, and `problem` says why."""

    partition: Partition
    record: Record
    letter: Letter
    stored: StoredDelivery | None
    problem: str
    settled_by: Order | None

    @property
    def position(self) -> str:
        """Name it by its partition and offset, which even one that can't be read has."""
        return f"{self.partition.number}@{self.record.offset}"

    @property
    def status(self) -> str:
        if self.settled_by is None:
            return "open"
        return "replayed" if self.settled_by.action == "replay" else "dropped"

    @property
    def answer(self) -> str:
        """What the last attempt got, or what else ended it."""
        if self.stored is None:
            return self.problem
        attempts = self.stored.delivery.attempts
        if not attempts:
            return self.stored.note.detail
        return result_of(attempts[-1])

    def is_called(self, name: str) -> bool:
        """Return whether that is the id of its delivery or of its event, or its position."""
        return name == self.position or (
            self.stored is not None and name in (self.stored.delivery.id, self.stored.delivery.event.id)
        )


def result_of(attempt: Attempt) -> str:
    """Tell in a few words what an attempt got."""
    told = result_label(attempt)
    return f"{told}: {attempt.detail}" if attempt.detail else told


async def read_letters(
    log: Log,
    topics: Topics,
    control: Control,
    which: DeadFilter,
    *,
    is_all: bool,
    unread: dict[Partition, str] | None = None,
) -> AsyncGenerator[DeadLetter, None]:
    """Yield the dead letters that the filter covers, newest first: the open ones, or with `is_all` all of them.

    With `unread` those of partitions that can't be read are left out, and the partitions noted there.
    """
    async with aclosing(newest_first(log, [topics.dead], since=which.since, unread=unread)) as history:
        async for found in history:
            letter = _read(found, control)
            if which.covers(letter.letter) and (is_all or letter.settled_by is None):
                yield letter


class Group:
    """Dead letters alike: one reason, answer, route and destination.

    `event` is the id of the newest one's event, and `received` when the first of their events came; "" and the oldest
    letter's time where none can be read.
    """

    def __init__(self, letter: DeadLetter) -> None:
        self.reason = letter.letter.reason
        self.answer = letter.answer
        self.route, self.destination = letter.letter.route, letter.letter.destination
        self.count = 0
        self.oldest = self.newest = self.received = letter.letter.at
        self.event = ""

    def add(self, letter: DeadLetter) -> None:
        self.count += 1
        at = letter.letter.at
        if letter.stored is not None:
            event = letter.stored.delivery.event
            self.received = min(self.received, event.received_at)
            if not self.event or at > self.newest:
                self.event = event.id
        self.oldest, self.newest = min(self.oldest, at), max(self.newest, at)


class Groups:
    """What dead letters have in common. Beyond `MAX_GROUPS`, results that differ for each (by an id) go together."""

    MAX_GROUPS = 1000

    def __init__(self) -> None:
        self._groups: dict[tuple[str, str, str, str], Group] = {}

    def add(self, letter: DeadLetter) -> None:
        which = letter.letter
        key = which.reason, letter.answer, which.route, which.destination
        if key not in self._groups and len(self._groups) >= self.MAX_GROUPS:
            key = which.reason, "", which.route, which.destination
        if key not in self._groups:
            self._groups[key] = Group(letter)
            self._groups[key].answer = key[1] or "(others)"
        self._groups[key].add(letter)

    def largest_first(self) -> list[Group]:
        return sorted(self._groups.values(), key=lambda group: (-group.count, -group.newest))


async def find_letters(log: Log, topics: Topics, control: Control, name: str) -> Sequence[DeadLetter]:
    """Return the dead letters of a delivery or an event, or the one at a position; newest first, with settled ones."""
    everything = read_letters(log, topics, control, DeadFilter(), is_all=True)
    return [letter async for letter in everything if letter.is_called(name)]


async def deliveries_of(log: Log, topics: Topics, control: Control, names: Sequence[str]) -> tuple[str, ...]:
    """Return the ids of the deliveries that have open dead letters under these names.

    Raises UsageError for a name without one, or for a record that can't be read, which no order can name.
    """
    ids: dict[str, None] = {}
    missing = dict.fromkeys(names)
    async for letter in read_letters(log, topics, control, DeadFilter(), is_all=False):
        for name in names:
            if letter.is_called(name):
                if letter.stored is None:
                    raise UsageError(f"{name}: expected a dead letter that can be read, got: {letter.problem}")
                ids[letter.letter.id] = None
                missing.pop(name, None)
    if missing:
        raise UsageError("\n".join(f"{name}: expected the id of an open dead letter, got none" for name in missing))
    return tuple(ids)


def _read(found: Found, control: Control) -> DeadLetter:
    partition, record = found
    letter, stored = read_letter(record)
    told = dict(record.headers).get("gw_undecodable", b"")
    return DeadLetter(
        partition=partition,
        record=record,
        letter=letter,
        stored=stored,
        problem="" if stored else told.decode(errors="replace") or _problem(record),
        settled_by=control.settled(letter, partition, record.offset),
    )


def _problem(record: Record) -> str:
    try:
        decode_delivery(record)
    except UnreadableRecordError as error:
        return str(error)
    return ""
