"""Answers searches from the file: newest events first, page by page, for so long and no longer. One thread's.

Each segment is asked in the cheapest way that there is (`candidates.py`), for some candidates at a time; what terms and
indexes can't decide is decided for each candidate by `settlement.py`.
"""

import math
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from time import perf_counter
from typing import Any, NamedTuple

from gateway.engine.control.records import partition_key
from gateway.index.candidates import candidates_of, count_up_to, rows_that_are
from gateway.index.conditions import Asked, asked_of
from gateway.index.deliveries import COLUMNS, row_of
from gateway.index.delivery_query import FIRST as BEGINNING
from gateway.index.delivery_query import DeliveryCursor, DeliveryQuery, statement_of
from gateway.index.duplicates import LetThrough, Suspect
from gateway.index.event_numbers import END, SLOTS
from gateway.index.file import as_json, one, rows, snapshot
from gateway.index.lookups import LAST_RECEIVED, Lookup, at_place, of_id, of_request
from gateway.index.query import Query, QueryError, is_unicode
from gateway.index.results import (
    FIRST_PLACE,
    DeliveryPage,
    DeliveryPlace,
    IndexedAttempt,
    IndexedDelivery,
    IndexedEvent,
    ListedDelivery,
    Page,
)
from gateway.index.settlement import (
    CommitCoverage,
    DeliveryKey,
    DeliveryRow,
    DeliverySummary,
    decode_coverage,
    summaries,
    worst,
)
from gateway.index.statuses import WORST_FIRST, Status
from gateway.log.base import Partition, are_of_different_topics
from gateway.turns import give_way

SECONDS = 0.15
"""For which a search looks; what it has found by then is its answer, with where to go on."""
FIRST_CANDIDATES, MOST_CANDIDATES = 128, 512
"""Looked at in one statement, where deliveries decide; four times as many in each following one."""
FEW = 500
"""Deliveries that are looked at one by one instead of going through all events with the terms."""
MOST_SUMMARIES = 100
"""Of an event that are told: what comes first is worst."""
DELIVERIES_AT_ONCE = 2_000
"""Of the events that are described before the time is looked at: some milliseconds; a single event may have more."""

_RANK = " ".join(["CASE status", *[f"WHEN '{each}' THEN {rank}" for rank, each in enumerate(WORST_FIRST)], "END"])
_SUMMARIES = (
    "(SELECT json_group_array(json_array(route, destination, status, its, total)) FROM (SELECT route, destination,"  # noqa: S608 - our own names
    " status, count(*) AS its, sum(count(*)) OVER () AS total FROM deliveries WHERE deliveries.event = events.event"
    f" GROUP BY route, destination, status ORDER BY {_RANK}, route, destination LIMIT {MOST_SUMMARIES}))"
)
_ATTEMPT_COLUMNS = ("number", "at", "took", "result", "status", "decision", "detail", "partition", "offset")

MANY = 1 << 40
"""As many as there are."""
Partitions = Mapping[int, tuple[Partition, CommitCoverage | None]]


class _Segment(NamedTuple):
    id: int
    start: int
    end: int


class _Limits(NamedTuple):
    """Numbers of the events that are looked at: from `lower` on to before `upper`."""

    lower: int
    upper: int


class _View(NamedTuple):
    """What a search has to know beside the events: the partitions, and from which number on events may be open."""

    partitions: Partitions
    floor: int


class Searcher:
    """The reading side of an open file. `clock` is for how long a search takes."""

    def __init__(self, connection: sqlite3.Connection, clock: Callable[[], float] = perf_counter) -> None:
        self._connection = connection
        self._let_through = LetThrough(connection)
        self._clock = clock

    def search(self, query: Query, *, limit: int, cursor: int | None) -> Page:
        """Return the newest events before the cursor that match a query."""
        until = self._clock() + SECONDS
        with snapshot(self._connection):
            asked = asked_of(query, rows(self._connection, "SELECT json_group_array(name) FROM sources"))
            view = _View(self._partitions(), self._floor())
            limits = _limits(query, cursor)
            found: list[IndexedEvent] = []
            segments = self._segments(limits)
            for segment in segments:
                for numbers, matches in self._matches(asked, segment, limits, view, limit):
                    found += matches
                    if len(found) >= limit:
                        return _page(found[:limit], found[limit - 1].number, is_cut_short=False)
                    if self._clock() > until:
                        return _page(found, numbers[-1], is_cut_short=True)
                if segment is not segments[-1] and self._clock() > until:  # however little it had
                    return _page(found, segment.start * SLOTS, is_cut_short=True)
        return Page(events=tuple(found), cursor=None, searched_to=query.since, is_cut_short=False)

    def events(self, id: str, *, limit: int = LAST_RECEIVED) -> list[IndexedEvent]:  # noqa: A002 - what it is
        """Return so many events with an id, newest first, among `LAST_RECEIVED` of each segment."""
        return self._looked_up(of_id(id, limit), limit)

    def namesakes(self, id: str, received_at: float, limit: int) -> list[IndexedEvent]:  # noqa: A002 - what it is
        """Return so many events with an id that were received at a time: several, if they came in one request."""
        return self._looked_up(of_request(id, round(received_at * 1e6), limit), limit)

    def event_at(self, id: str, partition: Partition, offset: int) -> IndexedEvent | None:  # noqa: A002 - what it is
        """Return the event with an id that is stored at a place; None if it lacks it."""
        return next(iter(self._looked_up(at_place(id, partition, offset), 1)), None)

    def _looked_up(self, lookup: Lookup, limit: int) -> list[IndexedEvent]:
        if not all(is_unicode(each) for each in lookup.parameters.values() if isinstance(each, str)):
            return []
        with snapshot(self._connection):
            partitions = self._partitions()
            found: list[IndexedEvent] = []
            for segment in self._segments(_Limits(0, END)):
                numbers = rows(self._connection, lookup.statement(segment.id), lookup.parameters)
                found += self._described(segment, numbers[: limit - len(found)], partitions) if numbers else ()
                if len(found) >= limit:
                    break
            return found

    def deliveries(
        self, number: int, *, after: DeliveryPlace = FIRST_PLACE, limit: int = MANY, attempts: int = MANY
    ) -> list[IndexedDelivery]:
        """Return so many deliveries of an event behind a place, each with its last attempts, in the order of these."""
        order = "route, destination, replayed, item, delivery"
        select = (
            f"SELECT json_group_array(json_array({COLUMNS})) FROM (SELECT * FROM deliveries WHERE event = ?"  # noqa: S608 - our own names
            f" AND ({order}) > (?, ?, ?, ?, ?) ORDER BY {order} LIMIT ?)"
        )
        with snapshot(self._connection):
            partitions = self._partitions()
            found = [row_of(fields) for fields in rows(self._connection, select, number, *after, limit)]
            tried = self._attempts([row.key for row in found], partitions, attempts)
        return [_delivery_of(row, tried.get(row.key, ()), partitions) for row in found]

    def list_deliveries(self, query: DeliveryQuery, *, limit: int, cursor: DeliveryCursor | None) -> DeliveryPage:
        """Return the deliveries behind the cursor that a query is for, those of the newest events first.

        Raises QueryError.
        """
        for name, text in (("route", query.route), ("destination", query.destination)):
            if text is not None and not is_unicode(text):
                raise QueryError(f"{name}: expected text in UTF-8, got other bytes")
        until = self._clock() + SECONDS
        statement, parameters = statement_of(query, COLUMNS)
        at, count = cursor or BEGINNING, limit if query.decides_alone else max(limit, FIRST_CANDIDATES)
        found: list[ListedDelivery] = []
        is_over = False
        with snapshot(self._connection):
            floor, partitions = self._floor(), self._partitions()
            while True:
                behind = {"event": at.event, "delivery": at.delivery, "replayed": at.replayed, "count": count}
                seen = [row_of(fields) for fields in rows(self._connection, statement, {**parameters, **behind})]
                wanted = [row for row in seen if query.holds(row.route, row.destination, row.status)]
                is_over, at = len(seen) < count, DeliveryCursor(*seen[-1].key) if seen else at
                for chunk in self._chunks([row.key.event for row in wanted]):
                    found += self._listed(wanted[chunk], partitions, query)
                    if chunk.stop < len(wanted) and (len(found) >= limit or self._clock() > until):
                        is_over, at = False, DeliveryCursor(*wanted[chunk.stop - 1].key)
                        break
                if is_over or len(found) >= limit or self._clock() > until:
                    break
                count = max(count, min(4 * count, MOST_CANDIDATES))
        is_full = len(found) >= limit
        if is_full and not (is_over and len(found) == limit):
            at = found[limit - 1].cursor
        elif found and found[-1].cursor.event == at.event:
            at = found[-1].cursor  # what isn't listed isn't named, either
        elif (before := DeliveryCursor(at.event + 1, "", 0)) < (cursor or BEGINNING):
            at = before
        return DeliveryPage(
            deliveries=tuple(found[:limit]),
            cursor=None if is_over and len(found) <= limit else at,
            is_cut_short=not (is_over or is_full),
            unrecorded_since=None if floor == END else floor // SLOTS / 1000,
        )

    def _listed(
        self, wanted: Sequence[DeliveryRow], partitions: Partitions, query: DeliveryQuery
    ) -> list[ListedDelivery]:
        """Return deliveries with their events and last attempts, in this order: those that a query is for."""
        numbers = sorted({row.key.event for row in wanted})
        events: dict[int, IndexedEvent] = {}
        for segment in self._segments(_Limits(0, END)):
            among = [each for each in numbers if segment.start * SLOTS <= each < segment.end * SLOTS]
            events |= {each.number: each for each in (self._described(segment, among, partitions) if among else ())}
        listed = [
            row
            for row in wanted
            if (its := events.get(row.key.event)) is not None
            and query.holds_with(its.source, row.route, row.destination)
        ]
        last = self._last_attempts([row.key for row in listed], partitions)
        return [
            ListedDelivery(
                event=(event := events[row.key.event]),
                delivery=_delivery_of(row, last.get(row.key, ()), partitions),
                since=(
                    row.decided / 1e6
                    if row.status not in (Status.RETRYING, Status.PENDING)
                    else row.key.replayed / 1e6 or event.received_at
                ),
                tried=row.attempts,
            )
            for row in listed
        ]

    def _attempts(
        self, keys: Sequence[DeliveryKey], partitions: Partitions, most: int
    ) -> Mapping[DeliveryKey, Sequence[IndexedAttempt]]:
        """Return so many attempts of each delivery, the last ones, in their order.

        What a kick has begun anew has a later life than its attempts before, which have no row of their own.
        """
        before = (
            "SELECT max(replayed) FROM deliveries AS others WHERE others.event = asked.value ->> 0"
            " AND others.delivery = asked.value ->> 1 AND others.replayed < asked.value ->> 2"
        )
        its = (
            "attempts.event = asked.value ->> 0 AND attempts.delivery = asked.value ->> 1"
            f" AND attempts.replayed <= asked.value ->> 2 AND attempts.replayed > coalesce(({before}), -1)"
        )
        numbered = (
            "SELECT asked.key AS asked, attempts.*, row_number() OVER"  # noqa: S608 - our own names
            " (PARTITION BY asked.key ORDER BY attempts.replayed DESC, number DESC) AS place"
            f" FROM json_each(?) AS asked CROSS JOIN attempts ON {its}"
        )
        select = (
            f"SELECT json_group_array(json_array(asked, {', '.join(_ATTEMPT_COLUMNS)}))"  # noqa: S608 - as above
            f" FROM (SELECT * FROM ({numbered}) WHERE place <= ? ORDER BY asked, place DESC)"
        )
        found: dict[DeliveryKey, list[IndexedAttempt]] = {}
        for asked, *fields in rows(self._connection, select, as_json([tuple(key) for key in keys]), most):
            found.setdefault(keys[asked], []).append(_attempt_of(fields, partitions))
        return found

    def _last_attempts(
        self, keys: Sequence[DeliveryKey], partitions: Partitions
    ) -> Mapping[DeliveryKey, tuple[IndexedAttempt, ...]]:
        named = ", ".join([f"attempts.{name}" for name in _ATTEMPT_COLUMNS])
        same = "attempts.event = asked.value ->> 0 AND attempts.delivery = asked.value ->> 1"
        select = (
            f"SELECT json_group_array(json_array(attempts.event, attempts.delivery, attempts.replayed, {named}))"  # noqa: S608 - our own names
            f" FROM json_each(?) AS asked CROSS JOIN attempts ON {same} AND attempts.replayed = asked.value ->> 2"
            " AND attempts.number = (SELECT max(number) FROM attempts AS others WHERE others.event = attempts.event"
            " AND others.delivery = attempts.delivery AND others.replayed = attempts.replayed)"
        )
        found = rows(self._connection, select, as_json([tuple(key) for key in keys]))
        return {
            DeliveryKey(event, delivery, replayed): (_attempt_of(fields, partitions),)
            for event, delivery, replayed, *fields in found
        }

    def count(self) -> int:
        """Return the number of events, those of deleted topics included until they are dropped."""
        count: int = one(self._connection, "SELECT coalesce(sum(events), 0) FROM segments")
        return count

    def oldest(self) -> float | None:
        """Return when the oldest event was appended (Unix seconds), None if there is none."""
        with snapshot(self._connection):
            for segment in reversed(self._segments(_Limits(0, END))):
                first = one(self._connection, f"SELECT min(event) FROM events_{segment.id}")  # noqa: S608 - our own number
                if first is not None:
                    return float(first // SLOTS / 1000)
        return None

    def _segments(self, limits: _Limits) -> list[_Segment]:
        select = "SELECT json_group_array(json_array(id, start, end)) FROM segments"
        found = sorted([_Segment(*row) for row in rows(self._connection, select)], key=lambda each: -each.start)
        return [each for each in found if each.end * SLOTS > limits.lower and each.start * SLOTS < limits.upper]

    def reached(self, partition: Partition, topic_id: str) -> int:
        """Return the offset up to which a partition is read, 0 if it is of another topic than the one with this id."""
        select = (
            "SELECT json_group_array(json_array(topic_id, position)) FROM partitions"
            " WHERE topic = ? AND number = ? AND is_gone = 0"
        )
        for its_id, position in rows(self._connection, select, *partition):
            return 0 if are_of_different_topics(its_id, topic_id) else int(position)
        return 0

    def _partitions(self) -> Partitions:
        select = "SELECT json_group_array(json_array(id, topic, number, progress)) FROM partitions"
        return {
            id_: (Partition(topic, number), decode_coverage(coverage))
            for id_, topic, number, coverage in rows(self._connection, select)
        }

    def _floor(self) -> int:
        at = one(self._connection, "SELECT min(unsettled) FROM partitions WHERE is_gone = 0")
        return END if at is None else at * SLOTS

    def _matches(
        self, asked: Asked, segment: _Segment, limits: _Limits, view: _View, limit: int
    ) -> Iterator[tuple[list[int], list[IndexedEvent]]]:
        """Yield candidates of a segment, newest first, some at a time, with those that match."""
        lower, upper = max(limits.lower, segment.start * SLOTS), min(limits.upper, segment.end * SLOTS)

        def are_few(clause: str) -> bool:
            found = self._connection.execute(count_up_to(clause, FEW), {"lower": lower, "upper": upper}).fetchall()
            return bool(found[0][0] < FEW)

        statement, parameters = candidates_of(asked, segment.id, view.floor, are_few)
        count = max(limit, FIRST_CANDIDATES) if asked.needs_deliveries or asked.not_ids else limit
        while True:
            given = {**parameters, "lower": lower, "upper": upper, "count": count}
            numbers = rows(self._connection, statement, given)
            for chunk in self._chunks(numbers):
                yield numbers[chunk], self._described(segment, numbers[chunk], view.partitions, asked)
            if len(numbers) < count:
                return
            upper = numbers[-1]
            if asked.needs_deliveries:
                count = max(count, min(4 * count, MOST_CANDIDATES))

    def _chunks(self, numbers: Sequence[int]) -> Iterator[slice]:
        """Yield parts of a list of events, the same ones beside each other, that have few deliveries or are one event.

        What has been looked at by the end of a chunk may be the answer.
        """
        counted = f"SELECT count(*) FROM (SELECT 1 FROM deliveries WHERE event = value LIMIT {DELIVERIES_AT_ONCE})"  # noqa: S608 - our own number
        select = f"SELECT json_group_array(({counted})) FROM json_each(?)"  # noqa: S608 - as above
        begin = weight = 0
        for index, count in enumerate(rows(self._connection, select, as_json(numbers))):
            if index and numbers[index] == numbers[index - 1]:
                continue
            if weight and weight + count > DELIVERIES_AT_ONCE:
                yield slice(begin, index)
                begin, weight = index, 0
            weight += count
        if numbers:
            yield slice(begin, len(numbers))

    def _described(
        self, segment: _Segment, numbers: Sequence[int], partitions: Partitions, asked: Asked | None = None
    ) -> list[IndexedEvent]:
        """Return events by their numbers, in this order: those of them that are what is asked for.

        Without those whose topic is gone. Of what is asked for, they have the terms already.
        """
        conditions = () if asked is None else asked.of_deliveries
        found_by = [rows_that_are(each, number) for number, each in enumerate(conditions)]
        has_one = "".join(
            [f", EXISTS (SELECT 1 FROM deliveries WHERE deliveries.event = events.event{each[0]})" for each in found_by]  # noqa: S608 - our own names
        )
        select = (
            "SELECT json_group_array(json_array(events.event, events.id, source, events.type, events.key, received,"  # noqa: S608 - our own number
            f" partition, offset, size, is_cut, content, json({_SUMMARIES}), json_array({has_one[2:]})))"
            f" FROM json_each(:numbers) AS asked CROSS JOIN events_{segment.id} AS events ON events.event = asked.value"
        )
        given = {"numbers": as_json(numbers)}
        for each in found_by:
            given |= each.parameters
        found = []
        for fields in rows(self._connection, select, given):
            give_way()
            found.append(_Found.of(fields, partitions))
        suspects = [each.suspect for each in found if each.suspect is not None]
        duplicates = self._let_through.duplicates(suspects, self._segment_ids() if suspects else ())
        described = [(each.described(is_duplicate=each.suspect in duplicates), each.has_one) for each in found]
        return [event for event, has_one in described if asked is None or _is_match(asked, event, has_one)]

    def _segment_ids(self) -> list[int]:
        return [each.id for each in self._segments(_Limits(0, END))]


class _Found(NamedTuple):
    """An event as its row has it, with what its deliveries are; `own` is what its partition's commit says of it."""

    fields: Sequence[Any]
    partition: Partition | None
    own: Status | None
    deliveries: Mapping[DeliverySummary, int]
    left_out: int
    has_one: Sequence[int]
    """Whether a delivery fulfils each of the conditions."""

    @classmethod
    def of(cls, fields: Sequence[Any], partitions: Partitions) -> "_Found":
        *own_fields, deliveries, has_one = fields
        partition, coverage = partitions.get(own_fields[6], (None, None))
        own = None
        if partition is not None:
            own = Status.UNKNOWN if coverage is None else coverage.status_of(own_fields[7])
        its = {
            DeliverySummary(route, destination, Status(status)): count
            for route, destination, status, count, _ in deliveries
        }
        left_out = deliveries[0][-1] - sum(its.values()) if deliveries else 0
        return cls(own_fields, partition, own, its, left_out, has_one)

    @property
    def suspect(self) -> Suspect | None:
        """Itself as what may be a duplicate, None if it can't be one."""
        _, id_, _, _, _, _, part, offset, _, _, content = self.fields
        if self.partition is None or not content or self.deliveries or self.own is not Status.DONE:
            return None
        return Suspect(partition_key(self.partition), offset, part, id_, content)

    def described(self, *, is_duplicate: bool) -> IndexedEvent:
        number, id_, source, type_, key, received, _, offset, size, is_cut, _ = self.fields
        instead = Status.DUPLICATE if is_duplicate else Status.DONE
        its = summaries(self.own, self.deliveries, instead_of_done=instead)
        return IndexedEvent(
            number=number,
            id=id_,
            source=source,
            type=type_,
            key=key,
            received_at=received / 1e6,
            appended_at=number // SLOTS / 1000,
            partition=self.partition,
            offset=offset,
            size=size,
            is_cut=bool(is_cut),
            status=worst(its),
            summaries=its,
            left_out=self.left_out,
        )


def _delivery_of(row: DeliveryRow, attempts: Sequence[IndexedAttempt], partitions: Partitions) -> IndexedDelivery:
    return IndexedDelivery(
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
        attempts=tuple(attempts),
    )


def _attempt_of(fields: Sequence[Any], partitions: Partitions) -> IndexedAttempt:
    number, at, took, result, status, decision, detail, partition, offset = fields
    return IndexedAttempt(
        number=number,
        at=at / 1e6,
        seconds=took / 1e6,
        result=result,
        status=status or None,
        decision=decision,
        detail=detail,
        partition=partitions[partition][0] if partition in partitions else None,
        offset=offset,
    )


def _is_match(asked: Asked, event: IndexedEvent, has_one: Sequence[int]) -> bool:
    """Return whether an event that has the terms has the deliveries, and isn't one that isn't asked for.

    `has_one`: whether one of its rows of deliveries is as each of `asked.of_deliveries` says.
    """
    if event.id in asked.not_ids:
        return False
    own = [each for each in event.summaries if not each.route and not each.destination]
    fulfilled = [
        bool(has) or any(each.holds(*summary) for summary in own)
        for each, has in zip(asked.of_deliveries, has_one, strict=True)
    ]
    return not any(fulfilled) if asked.wanted is None else fulfilled[0] and not any(fulfilled[1:])


def _limits(query: Query, cursor: int | None) -> _Limits:
    lower = math.ceil(max(0.0, query.since) * 1000) * SLOTS
    upper = END if query.until == math.inf else math.ceil(max(0.0, query.until) * 1000) * SLOTS
    return _Limits(min(lower, END), min(upper, END, END if cursor is None else cursor))


def _page(found: Sequence[IndexedEvent], cursor: int, *, is_cut_short: bool) -> Page:
    return Page(events=tuple(found), cursor=cursor, searched_to=cursor // SLOTS / 1000, is_cut_short=is_cut_short)
