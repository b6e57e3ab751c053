"""Traffic as the index counts it: its steps of time, its spans of seconds, and the tables. Pure text of SQL.

    events ──────▶ event_changes ────▶ event_counts       of a source: how many, of how many bytes, how many duplicates
    deliveries ──▶ delivery_changes ─▶ delivery_counts    by a route to a destination: how many have which status
    attempts ────▶ attempt_changes ──▶ attempt_counts     the same: how many had which result, and took how long
          triggers                at its commit

Duplicates, deliveries and attempts are counted by triggers: counts are what the rows are, whoever changes these. What
changes in a transaction is added up at its end, and counted in it. An event is counted where it was received; a
delivery too, or where it was replayed, however late it ends; an attempt where it began. What is dropped with its
segment stays counted as what it was by then.
"""

from collections.abc import Sequence
from typing import NamedTuple

MINUTES, HOUR, DAY = 300, 3600, 86_400
STEPS = (MINUTES, HOUR, DAY)
"""Seconds. Each is a multiple of the one before it."""
KEPT = {MINUTES: 3 * HOUR, HOUR: 50 * HOUR}
"""Seconds for which the shorter steps are kept; days are kept as long as events are."""
SPANS = tuple([digit * 10**power for power in range(3, 9) for digit in (1, 2, 5)])
"""Microseconds up to which an attempt of each span took; those of the last span, and longer."""
TOTAL = 0
"""The lane of all that is counted."""

# `duplicates` are the events that are some, and when they were received (µs).
# A lane is a source's events, or its deliveries by a route to a destination. That has a lane without a source and a
# route, too (`whole`): what it gets may be of thousands of routes. `floor`: since when (s) a step is kept.
# A change is of the shortest step that begins at `start` (s).
_TABLES = """
CREATE TABLE lanes (
    id INTEGER PRIMARY KEY, source TEXT NOT NULL, route TEXT NOT NULL, destination TEXT NOT NULL, whole INTEGER,
    UNIQUE (source, route, destination)
) STRICT;
CREATE INDEX lanes_by_route ON lanes (route);
CREATE INDEX lanes_by_destination ON lanes (destination);
CREATE TABLE steps (step INTEGER PRIMARY KEY, floor INTEGER NOT NULL) STRICT;
CREATE TABLE duplicates (event INTEGER PRIMARY KEY, lane INTEGER NOT NULL, at INTEGER NOT NULL) STRICT;
"""


class Counted(NamedTuple):
    """What is counted: the name of its tables, what tells counts of a lane and a time apart, and what is added up."""

    name: str
    keys: Sequence[str]
    sums: Sequence[str]

    @property
    def counts(self) -> str:
        return f"{self.name}_counts"

    @property
    def changes(self) -> str:
        return f"{self.name}_changes"


EVENTS = Counted("event", (), ("count", "bytes", "duplicates"))
DELIVERIES = Counted("delivery", ("status", "letter"), ("count",))
ATTEMPTS = Counted("attempt", ("result", "is_retry", "span"), ("count",))
ALL = (EVENTS, DELIVERIES, ATTEMPTS)
_TEXTS = {"status", "letter", "result"}
_SPAN = (
    "CASE "
    + " ".join([f"WHEN {{row}}.took <= {most} THEN {number}" for number, most in enumerate(SPANS)])
    + f" ELSE {len(SPANS) - 1} END"
)
_IS_KEPT = "old.event >= 256 * coalesce((SELECT value FROM notes WHERE name = 'horizon'), 0)"
"""What is deleted isn't dropped with its segment, but taken back: 256 are the SLOTS of an event's number."""


def added_up(what: Counted) -> tuple[str, str]:
    """Return the statements that count what has changed: in each step, for its lane, its destination, and all."""
    keys, sums = "".join([f", {each}" for each in what.keys]), [f"sum({each})" for each in what.sums]
    lane = f"CASE of.column1 WHEN 0 THEN {TOTAL} WHEN 1 THEN lane ELSE whole END"
    added = ", ".join([f"{each} = {each} + excluded.{each}" for each in what.sums])
    grouped = ", ".join([str(number + 1) for number in range(3 + len(what.keys))])
    changed = " OR ".join([f"{each} <> 0" for each in sums])
    insert = (
        f"INSERT INTO {what.counts} SELECT step, start / step * step, {lane}{keys}, {', '.join(sums)}"  # noqa: S608 - our own names
        f" FROM {what.changes} CROSS JOIN lanes ON lanes.id = lane CROSS JOIN steps"
        " CROSS JOIN (VALUES (0), (1), (2)) AS of"
        " WHERE start / step * step >= floor AND NOT (of.column1 = 2 AND whole IS NULL)"
        f" GROUP BY {grouped} HAVING {changed} ON CONFLICT DO UPDATE SET {added}"
    )
    return insert, f"DELETE FROM {what.changes}"  # noqa: S608 - as above


def _tables(what: Counted) -> str:
    keys = "".join([f", {each} {'TEXT' if each in _TEXTS else 'INTEGER'} NOT NULL" for each in what.keys])
    columns = f"start INTEGER NOT NULL, lane INTEGER NOT NULL{keys}"
    sums = ", ".join([f"{each} INTEGER NOT NULL" for each in what.sums])
    primary = ", ".join(["step", "start", "lane", *what.keys])
    return (
        f"CREATE TABLE {what.changes} ({columns}, {sums}) STRICT;"
        f"CREATE TABLE {what.counts} (step INTEGER NOT NULL, {columns}, {sums}, PRIMARY KEY ({primary}))"
        " STRICT, WITHOUT ROWID;"
    )


def _triggers(table: str, what: Counted, at: str, values: Sequence[str]) -> str:
    """Return the triggers of a table: `values` are what its rows have for the keys and sums of what is counted."""

    def change(row: str, by: int) -> str:
        told = ", ".join(values).format(row=row, by=by)
        return f"INSERT INTO {what.changes} VALUES ({row}.{at} / {MINUTES}000000 * {MINUTES}, {row}.lane, {told});"  # noqa: S608 - our own names and numbers

    before, after = (f"{row}.{at}, {row}.lane, {', '.join(values).format(row=row, by=1)}" for row in ("old", "new"))
    return (
        f"CREATE TRIGGER {table}_added AFTER INSERT ON {table} BEGIN {change('new', 1)} END;"
        f"CREATE TRIGGER {table}_changed AFTER UPDATE ON {table} WHEN ({before}) <> ({after})"
        f" BEGIN {change('old', -1)} {change('new', 1)} END;"
        f"CREATE TRIGGER {table}_taken AFTER DELETE ON {table} WHEN {_IS_KEPT} BEGIN {change('old', -1)} END;"
    )


# An event that has a delivery is no duplicate.
_TOLD = """
CREATE TRIGGER deliveries_told AFTER INSERT ON deliveries BEGIN DELETE FROM duplicates WHERE event = new.event; END;
"""
SCHEMA = "".join(
    [
        _TABLES,
        *map("INSERT INTO steps (step, floor) VALUES ({}, 0);".format, STEPS),
        *map(_tables, ALL),
        _triggers("duplicates", EVENTS, "at", ("0", "0", "{by}")),
        _triggers("deliveries", DELIVERIES, "began", ("{row}.status", "{row}.letter", "{by}")),
        _triggers("attempts", ATTEMPTS, "at", ("{row}.result", "{row}.number > 1", _SPAN, "{by}")),
        _TOLD,
    ]
)
"""Made after the tables whose rows are counted."""
