"""Events in the index: stored in segments of time, each with its own tables, so that old ones are dropped as a whole.

    segment 1           segment 2           segment 3 (written)
    ├───────────────────┼───────────────────┼──────────────▶ time of append
    a day at most, or SEGMENT_EVENTS

An event's number is when it was appended: numbers ascend with time, and are the same whatever is read first. All calls
belong to the writing thread.
"""

import sqlite3
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import NamedTuple

from gateway.index.event_numbers import SLOTS, id_key
from gateway.index.file import as_json, one, rows, segment_statements
from gateway.turns import give_way

DAY = 86_400_000
SEGMENT_EVENTS = 262_144
"""Events of a segment, after which the next one begins."""
SEGMENTS_A_FILE = 16
"""The next one begins as well with this part of the bytes that the file may have."""
ROWS_A_STATEMENT = 128
"""Events that are stored in one statement: they are made its parameter without giving way to the event loop."""
MERGE_PAGES = 256
"""Pages of a closed segment that one step merges."""
CLOCKS = 300_000
"""Milliseconds by which the receipt of an event and its append usually differ at most."""


class NewEvent(NamedTuple):
    """An event to add: `at` is when it was appended (ms), `received` when it was received (µs)."""

    at: int
    partition: int
    offset: int
    id: str
    source: str
    type: str
    key: str | None
    received: int
    size: int
    is_cut: bool
    content: int
    """A digest of its type, query and body; 0 if its sender gave it no identity."""
    terms: str


class Known(NamedTuple):
    """An event in the index: its number, and where its record is; partition 0 if that wasn't read."""

    event: int
    partition: int
    offset: int


@dataclass(slots=True)
class _Segment:
    """A segment as the file has it."""

    id: int
    start: int
    end: int
    events: int
    characters: int
    is_merged: int


class Segments:
    """The segments of a file. `days` and `max_bytes` bound it: beyond them the oldest segments are dropped."""

    def __init__(self, connection: sqlite3.Connection, *, days: float, max_bytes: int) -> None:
        self._connection = connection
        self._days = days
        self._max_bytes = max_bytes
        self._segments: list[_Segment] = []
        self._slots: dict[int, int] = {}
        self._sources: set[str] = set()
        self._stand_ins = 0
        self.horizon = 0
        """Nothing from before it (ms) is taken any more."""
        self.load()

    def load(self) -> None:
        """Read what the file has, as after a transaction that was rolled back."""
        select = "SELECT json_group_array(json_array(id, start, end, events, characters, is_merged)) FROM segments"
        self._segments = sorted([_Segment(*row) for row in rows(self._connection, select)], key=lambda each: each.start)
        self._sources = set(rows(self._connection, "SELECT json_group_array(name) FROM sources"))
        self._stand_ins = one(self._connection, "SELECT count(*) FROM stand_ins")
        self.horizon = one(self._connection, "SELECT coalesce(max(value), 0) FROM notes WHERE name = 'horizon'")
        self._slots.clear()

    def takes(self, event: NewEvent) -> bool:
        """Return whether an event is from after the horizon."""
        return event.at >= self.horizon

    def add(self, events: Sequence[NewEvent]) -> int:
        """Store events; return how many are from before the horizon, and aren't."""
        fresh = [event for event in events if self.takes(event)]
        skipped = len(events) - len(fresh)
        if self._stand_ins:
            fresh = self._without_stand_ins(fresh)
        fresh.sort(key=lambda event: event[:3])
        self._store([(number, event) for number, event in zip(self._numbers(fresh), fresh, strict=True)])
        return skipped

    def add_stand_in(self, event: NewEvent) -> Known | None:
        """Store an event whose record wasn't read, only a delivery's; None if it is from before the horizon."""
        if event.at < self.horizon:
            return None
        [number] = self._numbers([event])
        self._store([(number, event)])
        insert = "INSERT OR IGNORE INTO stand_ins (id_key, received, event) VALUES (?, ?, ?)"
        self._connection.execute(insert, (id_key(event.id), event.received, number))
        self._stand_ins += 1
        return Known(number, 0, 0)

    def find(self, events: Sequence[tuple[str, int]]) -> list[Known | None]:
        """Return the events with these ids and times of receipt (µs); of several the earliest, None for none."""
        found: list[Known | None] = [None] * len(events)
        likely: dict[int, list[int]] = {}
        for index, (_, received) in enumerate(events):
            at = received // 1000
            for segment in self._segments:
                if segment.start <= at + CLOCKS and at - CLOCKS < segment.end:
                    likely.setdefault(segment.id, []).append(index)
        for segment in self._segments:
            self._find_in(segment, [each for each in likely.get(segment.id, ()) if found[each] is None], events, found)
        left = [index for index, known in enumerate(found) if known is None]
        for segment in reversed(self._segments):  # retried by an operator, or moved from another log
            if left:
                self._find_in(segment, left, events, found)
                left = [index for index in left if found[index] is None]
        return found

    def numbers(self) -> list[int]:
        """Return the numbers of all segments."""
        return [segment.id for segment in self._segments]

    def forget_partition(self, partition: int) -> list[tuple[str, int, int, int]]:
        """Delete the events of a partition whose topic is gone.

        Returns what there was: of which source, when it was received (to the minute, in Unix seconds), how many events,
        and the bytes of their bodies.
        """
        deleted: list[tuple[str, int, int, int]] = []
        for segment in self._segments:
            received = "received / 60000000 * 60"
            counted = f"SELECT source, {received} AS at, count(*) AS count, sum(size) AS size FROM events_{segment.id}"  # noqa: S608 - our own names and numbers
            select = (
                "SELECT json_group_array(json_array(source, at, count, size)) FROM"  # noqa: S608 - our own names and numbers
                f" ({counted} WHERE partition = ? GROUP BY source, {received})"
            )
            deleted += [
                (source, at, count, size) for source, at, count, size in rows(self._connection, select, partition)
            ]
            numbers = f"SELECT event FROM events_{segment.id} WHERE partition = ?"  # noqa: S608 - our own names and numbers
            for table in ("deliveries", "attempts", "duplicates"):
                self._connection.execute(f"DELETE FROM {table} WHERE event IN ({numbers})", (partition,))  # noqa: S608 - our own names and numbers
            self._connection.execute(f"DELETE FROM events_{segment.id} WHERE partition = ?", (partition,))  # noqa: S608 - our own names and numbers
        return deleted

    def forget_before(self, now: float) -> None:
        """Take nothing that is older than what is kept, at this time (Unix seconds)."""
        self.horizon = max(self.horizon, round((now - self._days * 86400.0) * 1000))

    def is_beyond_bounds(self, now: float) -> bool:
        """Return whether the oldest segment is to be dropped; never the last one."""
        if not self._segments:
            return False
        if self._segments[0].end <= (now - self._days * 86400.0) * 1000:
            return True
        return len(self._segments) > 1 and self.bytes_used() > self._max_bytes

    def drop_oldest(self) -> int:
        """Drop the oldest segment; return the number of its events."""
        segment = self._segments[0]
        below = segment.end * SLOTS
        self._connection.execute(f"DROP TABLE terms_{segment.id}")
        self._connection.execute(f"DROP TABLE events_{segment.id}")
        # Counts outlive it: what it had stays counted, and what was open in it won't be known any more.
        self._connection.execute("INSERT OR REPLACE INTO notes (name, value) VALUES ('horizon', ?)", (segment.end,))
        unknown = "UPDATE deliveries SET status = 'unknown' WHERE event < ? AND is_open = 1"
        self._connection.execute(unknown, (below,))
        for table in ("deliveries", "attempts", "stand_ins", "duplicates"):
            self._connection.execute(f"DELETE FROM {table} WHERE event < ?", (below,))  # noqa: S608 - our own names and numbers
        self._connection.execute("DELETE FROM segments WHERE id = ?", (segment.id,))
        self._segments.pop(0)
        self._stand_ins = one(self._connection, "SELECT count(*) FROM stand_ins")
        self.horizon = segment.end
        return segment.events

    def bytes_used(self) -> int:
        """Return the size of the file, without the pages that will be used again."""
        pages = one(self._connection, "PRAGMA page_count") - one(self._connection, "PRAGMA freelist_count")
        size: int = pages * one(self._connection, "PRAGMA page_size")
        return size

    def merge_some(self, seconds: float) -> bool:
        """Merge the terms of closed segments for so long; return whether there are more to be merged."""
        until = perf_counter() + seconds
        for segment in self._segments[:-1]:
            while not segment.is_merged:
                before = self._connection.total_changes
                terms = f"terms_{segment.id}"
                self._connection.execute(f"INSERT INTO {terms} ({terms}, rank) VALUES ('merge', -{MERGE_PAGES})")  # noqa: S608 - our own names and numbers
                if self._connection.total_changes - before < 2:  # noqa: PLR2004 - as FTS5's documentation has it
                    segment.is_merged = 1
                    self._connection.execute("UPDATE segments SET is_merged = 1 WHERE id = ?", (segment.id,))
                elif perf_counter() > until:
                    return True
        return False

    def _store(self, numbered: Sequence[tuple[int, NewEvent]]) -> None:
        for begin in range(0, len(numbered), ROWS_A_STATEMENT):
            by_segment: dict[int, tuple[_Segment, list[tuple[int, NewEvent]]]] = {}
            for number, event in numbered[begin : begin + ROWS_A_STATEMENT]:
                segment = self._segment_of(number // SLOTS)
                by_segment.setdefault(segment.id, (segment, []))[1].append((number, event))
            for segment, its in by_segment.values():
                give_way()
                self._insert(segment, its)

    def _insert(self, segment: _Segment, numbered: Sequence[tuple[int, NewEvent]]) -> None:
        described, terms = list[tuple[object, ...]](), list[tuple[int, str]]()
        characters = 0
        for number, (_, partition, offset, id_, source, type_, key, received, size, is_cut, content, text) in numbered:
            fields = (
                number,
                id_key(id_),
                id_,
                source,
                type_,
                key,
                received,
                partition,
                offset,
                size,
                int(is_cut),
                content,
            )
            described.append(fields)
            terms.append((number, text))
            characters += len(text)
            if source not in self._sources:
                self._sources.add(source)
                self._connection.execute("INSERT OR IGNORE INTO sources (name) VALUES (?)", (source,))
        columns = ", ".join([f"value ->> {index}" for index in range(12)])
        self._connection.execute(
            f"INSERT INTO events_{segment.id} SELECT {columns} FROM json_each(?)",  # noqa: S608 - our own names and numbers
            (as_json(described),),
        )
        self._connection.execute(
            f"INSERT INTO terms_{segment.id} (rowid, terms) SELECT value ->> 0, value ->> 1 FROM json_each(?)",  # noqa: S608 - our own names and numbers
            (as_json(terms),),
        )
        segment.events += len(numbered)
        segment.characters += characters
        segment.is_merged = 0
        self._roll_over(segment)
        self._connection.execute(
            "UPDATE segments SET end = ?, events = ?, characters = ?, is_merged = 0 WHERE id = ?",
            (segment.end, segment.events, segment.characters, segment.id),
        )

    def _roll_over(self, segment: _Segment) -> None:
        """End a segment that is full after its last event; what comes later is the next one's."""
        if segment.events < SEGMENT_EVENTS and segment.characters < self._max_bytes // SEGMENTS_A_FILE:
            return
        last = one(self._connection, f"SELECT max(event) FROM events_{segment.id}")  # noqa: S608 - our own names and numbers
        segment.end = min(segment.end, last // SLOTS + 1)

    def _segment_of(self, at: int) -> _Segment:
        index = bisect_right(self._segments, at, key=lambda each: each.start) - 1
        if index >= 0 and at < self._segments[index].end:
            return self._segments[index]
        start = at // DAY * DAY
        end = start + DAY
        if index >= 0:
            start = max(start, self._segments[index].end)
        if index + 1 < len(self._segments):
            end = min(end, self._segments[index + 1].start)
        cursor = self._connection.execute(
            "INSERT INTO segments (start, end, events, characters) VALUES (?, ?, 0, 0)", (start, end)
        )
        assert cursor.lastrowid is not None
        segment = _Segment(cursor.lastrowid, start, end, 0, 0, 0)
        for statement in segment_statements(segment.id):
            self._connection.execute(statement)
        self._segments.insert(index + 1, segment)
        return segment

    def _numbers(self, events: Sequence[NewEvent]) -> list[int]:
        """Return the numbers of events that are in the order of their appends."""
        if len(self._slots) > SEGMENT_EVENTS:
            self._slots.clear()
        self._look_up_slots({event.at for event in events} - self._slots.keys())
        numbers = []
        for event in events:
            at = event.at
            while (slot := self._slot(at)) >= SLOTS:
                at += 1
            self._slots[at] = slot + 1
            numbers.append(at * SLOTS + slot)
        return numbers

    def _slot(self, at: int) -> int:
        if at not in self._slots:
            self._look_up_slots({at})
        return self._slots[at]

    def _look_up_slots(self, times: set[int]) -> None:
        """Find the first free slot of each of these milliseconds."""
        by_segment: dict[int, list[int]] = {}
        for at in times:
            index = bisect_right(self._segments, at, key=lambda each: each.start) - 1
            if index >= 0 and at < self._segments[index].end:
                by_segment.setdefault(self._segments[index].id, []).append(at)
            else:
                self._slots[at] = 0
        for number, its in by_segment.items():
            its_own = f"event >= value * {SLOTS} AND event < (value + 1) * {SLOTS}"
            last = f"SELECT max(event) FROM events_{number} WHERE {its_own}"  # noqa: S608 - our own names and numbers
            select = f"SELECT json_group_array(coalesce(({last}), value * {SLOTS} - 1)) FROM json_each(?)"  # noqa: S608 - our own names and numbers
            for at, taken in zip(its, rows(self._connection, select, as_json(its)), strict=True):
                self._slots[at] = taken - at * SLOTS + 1

    def _find_in(
        self, segment: _Segment, wanted: Sequence[int], events: Sequence[tuple[str, int]], found: list[Known | None]
    ) -> None:
        if not wanted:
            return
        keys = [(index, id_key(events[index][0]), *events[index]) for index in wanted]
        earliest = (
            f"SELECT event FROM events_{segment.id} INDEXED BY events_{segment.id}_by_id"  # noqa: S608 - our own names and numbers
            " WHERE id_key = asked.value ->> 1 AND received = asked.value ->> 3 AND id = asked.value ->> 2"
            " ORDER BY event LIMIT 1"
        )
        select = (
            "SELECT json_group_array(json_array(asked.value ->> 0, event, partition, offset))"  # noqa: S608 - as above
            f" FROM json_each(?) AS asked CROSS JOIN events_{segment.id} AS events ON events.event = ({earliest})"
        )
        for index, *known in rows(self._connection, select, as_json(keys)):
            before = found[index]
            if before is None or known[0] < before.event:
                found[index] = Known(*known)

    def _without_stand_ins(self, events: Sequence[NewEvent]) -> list[NewEvent]:
        """Return the events that aren't in the index; those that are by a delivery alone have a record now."""
        keys = [(index, id_key(event.id), event.received) for index, event in enumerate(events)]
        select = (
            "SELECT json_group_array(json_array(asked.value ->> 0, stand_ins.event)) FROM json_each(?) AS asked"
            " CROSS JOIN stand_ins ON stand_ins.id_key = asked.value ->> 1 AND stand_ins.received = asked.value ->> 2"
        )
        known = set[int]()
        for index, number in rows(self._connection, select, as_json(keys)):
            event = events[index]
            segment = self._segment_of(number // SLOTS)
            cursor = self._connection.execute(
                f"UPDATE events_{segment.id} SET partition = ?, offset = ?"  # noqa: S608 - our own names and numbers
                " WHERE event = ? AND id = ? AND partition = 0",
                (event.partition, event.offset, number, event.id),
            )
            if cursor.rowcount:
                known.add(index)
                self._connection.execute("DELETE FROM stand_ins WHERE event = ?", (number,))
                self._stand_ins -= 1
        return [event for index, event in enumerate(events) if index not in known]
