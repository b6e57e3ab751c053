"""Counts the index's traffic by time, and forgets it: the writing thread's. What is counted: `traffic_schema.py`."""

import sqlite3
from collections import Counter
from collections.abc import Iterable

from gateway.index.file import as_json, one, rows
from gateway.index.traffic_schema import ALL, DAY, KEPT, MINUTES, STEPS, added_up

ROW_BYTES = 64
"""About what a count takes in the file."""
SHARE = 8
"""The part of the file's bytes that counts may take."""

Received = tuple[str, int, int, int]
"""A source, when some of its events were received (Unix seconds), how many, and the bytes of their bodies."""


class TrafficCounts:
    """The counts of a file. `days` and `max_bytes` are the file's own bounds."""

    def __init__(self, connection: sqlite3.Connection, *, days: float, max_bytes: int) -> None:
        self._connection = connection
        self._days = days
        self._max_rows = max_bytes // SHARE // ROW_BYTES
        self._lanes: dict[tuple[str, str, str], int] = {}
        self._floors: dict[int, int] = {}
        self.load()

    def load(self) -> None:
        """Read what the file has, as after a transaction that was rolled back."""
        found = rows(self._connection, "SELECT json_group_array(json_array(source, route, destination, id)) FROM lanes")
        self._lanes = {(source, route, destination): number for source, route, destination, number in found}
        self._floors = dict(rows(self._connection, "SELECT json_group_array(json_array(step, floor)) FROM steps"))

    def lane(self, source: str, route: str = "", destination: str = "") -> int:
        """Return the number of a lane; without a route and a destination it's that of the source's events."""
        key = (source, route, destination)
        if (number := self._lanes.get(key)) is None:
            whole = self.lane("", "", destination) if route else None
            insert = "INSERT INTO lanes (source, route, destination, whole) VALUES (?, ?, ?, ?)"
            cursor = self._connection.execute(insert, (*key, whole))
            assert cursor.lastrowid is not None
            number = self._lanes[key] = cursor.lastrowid
        return number

    def add_events(self, received: Iterable[Received]) -> None:
        """Count events; those with negative numbers are taken back."""
        counts, sizes = Counter[tuple[int, int]](), Counter[tuple[int, int]]()
        for source, at, count, size in received:
            key = (at // MINUTES * MINUTES, self.lane(source))
            counts[key] += count
            sizes[key] += size
        insert = "INSERT INTO event_changes VALUES (?, ?, ?, ?, 0)"
        self._connection.executemany(insert, [(*key, count, sizes[key]) for key, count in counts.items()])

    def add_duplicates(self, events: Iterable[tuple[int, str, int]]) -> None:
        """Count events, by their numbers in the index, sources, and when they were received (µs), as duplicates."""
        found = [(number, self.lane(source), at) for number, source, at in events]
        if not found:
            return
        insert = "INSERT INTO duplicates SELECT value ->> 0, value ->> 1, value ->> 2 FROM json_each(?) WHERE true"
        self._connection.execute(f"{insert} ON CONFLICT DO NOTHING", (as_json(found),))

    def add_up(self) -> None:
        """Count what has changed: at the end of each transaction."""
        for what in ALL:
            for statement in added_up(what):
                self._connection.execute(statement)

    def forget_before(self, now: float) -> None:
        """Forget what is older than what is kept of each step at this time (Unix seconds), and what is too much."""
        floors = {step: int(now - KEPT.get(step, self._days * DAY)) // step * step for step in STEPS}
        if floors[MINUTES] <= self._floors[MINUTES]:
            return
        self.add_up()
        for step, floor in floors.items():
            self._raise_floor(step, floor)
        for step in STEPS:
            while self._count() > self._max_rows and self._floors[step] + step <= now:
                self._raise_floor(step, self._middle(step, int(now)))

    def _middle(self, step: int, now: int) -> int:
        """Return the start of a step in the middle of those that are kept, at least the one after the first."""
        floor = self._floors[step]
        return floor + max(step, (now - floor) // 2 // step * step)

    def _raise_floor(self, step: int, floor: int) -> None:
        if floor <= self._floors[step]:
            return
        self._floors[step] = floor
        self._connection.execute("UPDATE steps SET floor = ? WHERE step = ?", (floor, step))
        for what in ALL:
            self._connection.execute(f"DELETE FROM {what.counts} WHERE step = ? AND start < ?", (step, floor))  # noqa: S608 - our own names
        if step == DAY:
            self._forget_lanes()

    def _count(self) -> int:
        return sum([one(self._connection, f"SELECT count(*) FROM {what.counts}") for what in ALL])  # noqa: S608 - our own names

    def _forget_lanes(self) -> None:
        """Forget lanes of which nothing is counted any more, and no delivery is left."""
        counted = " UNION ALL ".join([f"SELECT lane FROM {what.counts} WHERE step = {DAY}" for what in ALL])  # noqa: S608 - our own names and numbers
        has_rows = "SELECT 1 FROM deliveries WHERE deliveries.route = lanes.route AND deliveries.lane = lanes.id"
        unused = f"DELETE FROM lanes WHERE id NOT IN ({counted})"  # noqa: S608 - our own names and numbers
        self._connection.execute(f"{unused} AND route <> '' AND NOT EXISTS ({has_rows})")
        wholes = "SELECT whole FROM lanes WHERE whole IS NOT NULL"
        self._connection.execute(f"{unused} AND route = '' AND id NOT IN ({wholes})")
        self.load()
