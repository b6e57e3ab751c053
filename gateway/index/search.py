"""Answers searches from the file: newest events first, page by page, for so long and no longer. One thread's.

Each segment is asked in the cheapest way that there is, for some candidates at a time; what terms and indexes can't
decide is decided for each candidate by `settlement.py`.
"""

import math
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import perf_counter
from typing import Any, NamedTuple

from gateway.index.conditions import Asked, DeliveryCondition, asked_of
from gateway.index.deliveries import COLUMNS, row_of
from gateway.index.file import as_json, one, rows
from gateway.index.query import Query
from gateway.index.results import IndexedAttempt, IndexedDelivery, IndexedEvent, Page
from gateway.index.segments import SLOTS, id_key
from gateway.index.settlement import Progress, Settled, decode_progress, settled, worst
from gateway.index.statuses import Status
from gateway.log.base import Partition

SECONDS = 0.15
"""For which a search looks; what it has found by then is its answer, with where to go on."""
FIRST_CANDIDATES, MOST_CANDIDATES = 128, 1024
"""Looked at in one statement, where deliveries decide; four times as many in each following one."""
FEW = 500
"""Deliveries that are looked at one by one instead of going through all events with the terms."""
_OF_ROWS = frozenset({Status.DEAD, Status.PARKED, Status.RETRYING, Status.DROPPED, Status.DELIVERED})
"""Nothing is one of these without a row of its own."""
END = (1 << 62) - 1
"""Above all events' numbers."""


class _Candidates(NamedTuple):
    """How a segment's candidates are found: a statement that yields numbers, and its parameters after the range's."""

    statement: str
    parameters: tuple[object, ...]


class _Segment(NamedTuple):
    id: int
    start: int
    end: int


class _Limits(NamedTuple):
    """Numbers of the events that are looked at: from `lower` on to before `upper`."""

    lower: int
    upper: int


class Searcher:
    """The reading side of an open file. `clock` is for how long a search takes."""

    def __init__(self, connection: sqlite3.Connection, clock: Callable[[], float] = perf_counter) -> None:
        self._connection = connection
        self._clock = clock

    def search(self, query: Query, *, limit: int, cursor: int | None) -> Page:
        """Return the newest events before the cursor that match a query."""
        until = self._clock() + SECONDS
        with self._snapshot():
            asked = asked_of(query, rows(self._connection, "SELECT json_group_array(name) FROM sources"))
            partitions = self._partitions()
            lower, upper = _limits(query, cursor)
            floor = self._floor()
            found: list[IndexedEvent] = []
            for segment in self._segments(lower, upper):
                within = _Limits(max(lower, segment.start * SLOTS), min(upper, segment.end * SLOTS))
                for numbers, matches in self._matches(asked, segment, within, floor, partitions, limit):
                    for match in matches:
                        found.append(match)
                        if len(found) == limit:
                            return _page(found, match.number, is_cut_short=False)
                    if numbers and self._clock() > until:
                        return _page(found, numbers[-1], is_cut_short=True)
        return Page(events=tuple(found), cursor=None, searched_to=query.since, is_cut_short=False)

    def events(self, id: str) -> list[IndexedEvent]:  # noqa: A002 - what it is
        """Return the events with an id, newest first."""
        with self._snapshot():
            partitions = self._partitions()
            found: list[IndexedEvent] = []
            for segment in self._segments(0, END):
                select = f"SELECT json_group_array(event) FROM events_{segment.id} WHERE id_key = ? AND id = ?"  # noqa: S608
                numbers = rows(self._connection, select, id_key(id), id)
                found += self._described(segment, sorted(numbers, reverse=True), partitions)
            return found

    def deliveries(self, number: int) -> list[IndexedDelivery]:
        """Return the deliveries of an event, each with its attempts, in the order of these."""
        with self._snapshot():
            partitions = self._partitions()
            select = f"SELECT json_group_array(json_array({COLUMNS})) FROM deliveries WHERE event = ?"  # noqa: S608 - our own names
            found = [row_of(fields) for fields in rows(self._connection, select, number)]
            attempts: dict[tuple[str, int], list[IndexedAttempt]] = {}
            select = (
                "SELECT json_group_array(json_array(delivery, replayed, number, at, took, result, status, sequel, detail,"
                " partition, offset)) FROM (SELECT * FROM attempts WHERE event = ? ORDER BY number)"
            )
            for delivery, replayed, *fields in rows(self._connection, select, number):
                attempts.setdefault((delivery, replayed), []).append(_attempt_of(fields, partitions))
        found.sort(key=lambda row: (row.route, row.destination, row.key.replayed, row.item))
        return [
            IndexedDelivery(
                id=row.key.delivery,
                route=row.route,
                destination=row.destination,
                item=None if row.item < 0 else row.item,
                status=row.status,
                replayed_at=row.key.replayed / 1e6,
                due=row.due / 1e6,
                reason=row.reason,
                detail=row.detail,
                partition=partitions[row.partition][0] if row.partition in partitions else None,
                offset=row.offset,
                attempts=tuple(attempts.get((row.key.delivery, row.key.replayed), ())),
            )
            for row in found
        ]

    def count(self) -> int:
        """Return the number of events, those of deleted topics included until they are dropped."""
        count: int = one(self._connection, "SELECT coalesce(sum(events), 0) FROM segments")
        return count

    def oldest(self) -> float | None:
        """Return when the oldest event was appended (Unix seconds), to the segment; None if there is none."""
        start = one(self._connection, "SELECT min(start) FROM segments")
        return None if start is None else start / 1000

    @contextmanager
    def _snapshot(self) -> Iterator[None]:
        """Let all statements see the same state."""
        self._connection.execute("BEGIN")
        try:
            yield
        finally:
            self._connection.execute("ROLLBACK")

    def _segments(self, lower: int, upper: int) -> list[_Segment]:
        select = "SELECT json_group_array(json_array(id, start, end)) FROM segments"
        found = sorted([_Segment(*row) for row in rows(self._connection, select)], key=lambda each: -each.start)
        return [each for each in found if each.end * SLOTS > lower and each.start * SLOTS < upper]

    def _partitions(self) -> dict[int, tuple[Partition, Progress | None]]:
        select = "SELECT json_group_array(json_array(id, topic, number, progress)) FROM partitions"
        return {
            id_: (Partition(topic, number), decode_progress(progress))
            for id_, topic, number, progress in rows(self._connection, select)
        }

    def _floor(self) -> int:
        """Return the number above which there may be events that aren't done."""
        at = one(self._connection, "SELECT min(unsettled) FROM partitions WHERE is_gone = 0")
        return END if at is None else at * SLOTS

    def _matches(
        self,
        asked: Asked,
        segment: _Segment,
        within: _Limits,
        floor: int,
        partitions: Mapping[int, tuple[Partition, Progress | None]],
        limit: int,
    ) -> Iterator[tuple[list[int], list[IndexedEvent]]]:
        """Yield candidates of a segment, newest first, some at a time, with those that match."""
        candidates = self._candidates(asked, segment, within, floor)
        count = max(limit, FIRST_CANDIDATES) if asked.needs_deliveries or asked.not_ids else limit
        upper = within.upper
        while True:
            parameters = (within.lower, upper, *candidates.parameters, count)
            numbers = rows(self._connection, candidates.statement, *parameters)
            described = self._described(segment, numbers, partitions) if numbers else []
            yield numbers, [event for event in described if _is_match(asked, event)]
            if len(numbers) < count:
                return
            upper, count = numbers[-1], min(4 * count, MOST_CANDIDATES) if asked.needs_deliveries else count

    def _candidates(self, asked: Asked, segment: _Segment, within: _Limits, floor: int) -> _Candidates:
        events, terms = f"events_{segment.id}", f"terms_{segment.id}"
        has_terms = f" AND EXISTS (SELECT 1 FROM {terms} WHERE {terms} MATCH ?3 AND rowid = event)"  # noqa: S608 - our own number
        match = () if asked.expression is None else (asked.expression,)
        matched = has_terms if match else ""
        if asked.ids is not None:
            ids = sorted(asked.ids)
            chosen = f"SELECT event FROM {events} INDEXED BY {events}_by_id WHERE event >= ?1 AND event < ?2{matched} AND id_key IN"  # noqa: S608
            keys = as_json([id_key(each) for each in ids])
            listed = f"(SELECT value FROM json_each(?{4 if match else 3})) AND id IN (SELECT value FROM json_each(?{5 if match else 4}))"
            last = 6 if match else 5
            return _Candidates(_listed(f"{chosen} {listed}", last), (*match, keys, as_json(ids)))
        if (by_rows := _by_rows(asked.wanted, events, floor)) and (not match or self._are_few(by_rows, within)):
            selects = " UNION ".join(
                [
                    f"SELECT event FROM (SELECT DISTINCT event FROM {each} AND event >= ?1 AND event < ?2{matched}"  # noqa: S608
                    f" ORDER BY event DESC LIMIT ?{4 if match else 3})"
                    for each in by_rows
                ]
            )
            return _Candidates(_listed(selects, 4 if match else 3), match)
        if match:
            select = f"SELECT rowid AS event FROM {terms} WHERE {terms} MATCH ?3 AND rowid >= ?1 AND rowid < ?2"  # noqa: S608
            return _Candidates(_listed(select, 4), match)
        return _Candidates(_listed(f"SELECT event FROM {events} WHERE event >= ?1 AND event < ?2", 3), ())  # noqa: S608

    def _are_few(self, by_rows: Sequence[str], within: _Limits) -> bool:
        """Return whether so few deliveries are to be looked at that their terms may be looked up one by one."""
        return all(
            one(
                self._connection,
                f"SELECT count(*) FROM (SELECT 1 FROM {each} AND event >= ? AND event < ? LIMIT {FEW})",  # noqa: S608 - our own
                *within,
            )
            < FEW
            for each in by_rows
        )

    def _described(
        self,
        segment: _Segment,
        numbers: Sequence[int],
        partitions: Mapping[int, tuple[Partition, Progress | None]],
    ) -> list[IndexedEvent]:
        """Return events by their numbers, in this order; without those whose topic is gone."""
        select = (
            "SELECT json_group_array(json_array(events.event, events.id, source, events.type, events.key, received, partition,"
            " offset, size, is_cut, json((SELECT json_group_array(json_array(route, destination, status)) FROM deliveries"
            " WHERE deliveries.event = events.event)))) FROM json_each(?) AS asked"
            f" CROSS JOIN events_{segment.id} AS events ON events.event = asked.value"  # noqa: S608 - our own number
        )
        return [_described(fields, partitions) for fields in rows(self._connection, select, as_json(numbers))]


def _attempt_of(fields: Sequence[Any], partitions: Mapping[int, tuple[Partition, Progress | None]]) -> IndexedAttempt:
    number, at, took, result, status, sequel, detail, partition, offset = fields
    return IndexedAttempt(
        number=number,
        at=at / 1e6,
        seconds=took / 1e6,
        result=result,
        status=status or None,
        sequel=sequel,
        detail=detail,
        partition=partitions[partition][0] if partition in partitions else None,
        offset=offset,
    )


def _described(fields: Sequence[Any], partitions: Mapping[int, tuple[Partition, Progress | None]]) -> IndexedEvent:
    number, id_, source, type_, key, received, part, offset, size, is_cut, deliveries = fields
    partition, progress = partitions.get(part, (None, None))
    own = None
    if partition is not None:
        own = Status.UNKNOWN if progress is None else progress.status_of(offset)
    its = settled(own, [Settled(route, destination, Status(status)) for route, destination, status in deliveries])
    return IndexedEvent(
        number=number,
        id=id_,
        source=source,
        type=type_,
        key=key,
        received_at=received / 1e6,
        appended_at=number // SLOTS / 1000,
        partition=partition,
        offset=offset,
        size=size,
        is_cut=bool(is_cut),
        status=worst(its),
        settled=tuple(its),
    )


def _is_match(asked: Asked, event: IndexedEvent) -> bool:
    """Return whether an event that has the terms has the deliveries, and isn't one that isn't asked for."""
    if event.id in asked.not_ids:
        return False
    if asked.wanted is not None and not any(asked.wanted.holds(*each) for each in event.settled):
        return False
    return not any(unwanted.holds(*each) for unwanted in asked.unwanted for each in event.settled)


def _by_rows(wanted: DeliveryCondition | None, events: str, floor: int) -> list[str]:
    """Return where the events with the wanted deliveries are found, as FROM clauses; none if all have to be looked at."""
    if wanted is None:
        return []
    names = {"route": wanted.routes, "destination": wanted.destinations}
    by_names = [(column, values) for column, values in names.items() if values is not None]
    if wanted.statuses is not None and wanted.statuses <= _OF_ROWS | {Status.PENDING}:
        found = [f"deliveries WHERE status = '{status}'" for status in sorted(wanted.statuses)]
        if Status.PENDING in wanted.statuses and not by_names:
            found.append(f"{events} WHERE event >= {floor}")
        return found or [f"{events} WHERE 0"]
    if not by_names:
        return []
    column, values = by_names[0]
    return [f"deliveries WHERE {column} = {_literal(value)}" for value in sorted(values)] or [f"{events} WHERE 0"]


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''").replace("\0", "") + "'"


def _listed(select: str, parameter: int) -> str:
    """Return a statement that yields the first numbers of another, in descending order, as one JSON array."""
    return f"SELECT json_group_array(event) FROM (SELECT event FROM ({select}) ORDER BY event DESC LIMIT ?{parameter})"  # noqa: S608


def _limits(query: Query, cursor: int | None) -> _Limits:
    lower = math.ceil(max(0.0, query.since) * 1000) * SLOTS
    upper = END if query.until == math.inf else math.ceil(max(0.0, query.until) * 1000) * SLOTS
    return _Limits(min(lower, END), min(upper, END, END if cursor is None else cursor))


def _page(found: Sequence[IndexedEvent], cursor: int, *, is_cut_short: bool) -> Page:
    return Page(events=tuple(found), cursor=cursor, searched_to=cursor // SLOTS / 1000, is_cut_short=is_cut_short)
