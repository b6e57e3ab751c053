"""Traffic as the index counts it: its steps of time, its spans of seconds, and the tables. Pure text of SQL.

    events ──────▶ event_counts       of a source: how many, how many bytes their bodies had, how many are duplicates
    deliveries ──▶ delivery_counts    of a source by a route to a destination: how many have which status
    attempts ────▶ attempt_counts     of the same: how many had which result, and took how long

Duplicates, deliveries and attempts are counted by triggers: counts are what the rows are, whoever changes these, in the
same transaction. An event is counted where it was received; a delivery too, or where it was replayed, however late it
ends; an attempt where it began. What is dropped with its segment stays counted as what it was by then.
"""

from collections.abc import Sequence
from typing import Literal

MINUTES, HOUR, DAY = 300, 3600, 86_400
STEPS = (MINUTES, HOUR, DAY)
"""Seconds. Each is a multiple of the one before it."""
KEPT = {MINUTES: 3 * HOUR, HOUR: 50 * HOUR}
"""Seconds for which the shorter steps are kept; days are kept as long as events are."""
SPANS = tuple([digit * 10**power for power in range(3, 9) for digit in (1, 2, 5)])
"""Microseconds up to which an attempt of each span took; those of the last span, and longer."""
TOTAL = 0
"""The lane of all that is counted."""
MINUS, PLUS = -1, 1

# `duplicates` are the events that are some, and when they were received (µs).
# A lane is a source's events, or its deliveries by a route to a destination. `floor`: since when (s) a step is kept.
_TABLES = """
CREATE TABLE lanes (
    id INTEGER PRIMARY KEY, source TEXT NOT NULL, route TEXT NOT NULL, destination TEXT NOT NULL,
    UNIQUE (source, route, destination)
) STRICT;
CREATE INDEX lanes_by_route ON lanes (route);
CREATE INDEX lanes_by_destination ON lanes (destination);
CREATE TABLE steps (step INTEGER PRIMARY KEY, floor INTEGER NOT NULL) STRICT;
CREATE TABLE event_counts (
    step INTEGER NOT NULL, start INTEGER NOT NULL, lane INTEGER NOT NULL, count INTEGER NOT NULL,
    bytes INTEGER NOT NULL, duplicates INTEGER NOT NULL, PRIMARY KEY (step, start, lane)
) STRICT, WITHOUT ROWID;
CREATE TABLE duplicates (event INTEGER PRIMARY KEY, lane INTEGER NOT NULL, at INTEGER NOT NULL) STRICT;
CREATE TABLE delivery_counts (
    step INTEGER NOT NULL, start INTEGER NOT NULL, lane INTEGER NOT NULL, status TEXT NOT NULL, letter TEXT NOT NULL,
    count INTEGER NOT NULL, PRIMARY KEY (step, start, lane, status, letter)
) STRICT, WITHOUT ROWID;
CREATE TABLE attempt_counts (
    step INTEGER NOT NULL, start INTEGER NOT NULL, lane INTEGER NOT NULL, result TEXT NOT NULL,
    is_retry INTEGER NOT NULL, span INTEGER NOT NULL, count INTEGER NOT NULL,
    PRIMARY KEY (step, start, lane, result, is_retry, span)
) STRICT, WITHOUT ROWID;
"""
KEYS = {"event_counts": (), "delivery_counts": ("status", "letter"), "attempt_counts": ("result", "is_retry", "span")}
"""By table: what counts are told apart by, beside their step, their start and their lane."""
TABLES = tuple(KEYS)

_SPAN = (
    "CASE "
    + " ".join([f"WHEN {{row}}.took <= {most} THEN {number}" for number, most in enumerate(SPANS)])
    + f" ELSE {len(SPANS) - 1} END"
)
_DUPLICATE = ("event_counts", "at", ("0", "0"))
_DELIVERY = ("delivery_counts", "began", ("{row}.status", "{row}.letter"))
_ATTEMPT = ("attempt_counts", "at", ("{row}.result", "{row}.number > 1", _SPAN))
_IS_KEPT = "old.event >= 256 * coalesce((SELECT value FROM notes WHERE name = 'horizon'), 0)"
"""What is deleted isn't dropped with its segment, but taken back: 256 are the SLOTS of an event's number."""


def _count(counted: tuple[str, str, Sequence[str]], row: Literal["new", "old"], change: int) -> str:
    """Return the statement that counts a row, in each step and for its lane and all lanes; or takes it back."""
    table, at, keys = counted
    column = "duplicates" if table == "event_counts" else "count"
    start = f"{row}.{at} / 1000000 / step * step"
    columns = ", ".join(keys).format(row=row)
    return (
        f"INSERT INTO {table} SELECT step, {start}, {row}.lane * own.column1, {columns}, {change}"  # noqa: S608 - our own names and numbers
        f" FROM steps CROSS JOIN (VALUES (0), (1)) AS own WHERE {start} >= floor"
        f" ON CONFLICT DO UPDATE SET {column} = {column} + excluded.{column};"
    )


def _triggers(table: str, counted: tuple[str, str, Sequence[str]]) -> str:
    _, at, keys = counted
    before, after = ([f"{row}.{at}", *[key.format(row=row) for key in keys]] for row in ("old", "new"))
    differs = " OR ".join([f"{old} <> {new}" for old, new in zip(before, after, strict=True)])
    added, taken = _count(counted, "new", PLUS), _count(counted, "old", MINUS)
    return (
        f"CREATE TRIGGER {table}_added AFTER INSERT ON {table} BEGIN {added} END;"
        f"CREATE TRIGGER {table}_changed AFTER UPDATE ON {table} WHEN {differs} BEGIN {taken} {added} END;"
        f"CREATE TRIGGER {table}_taken AFTER DELETE ON {table} WHEN {_IS_KEPT} BEGIN {taken} END;"
    )


# An event that has a delivery is no duplicate.
_TOLD = """
CREATE TRIGGER deliveries_told AFTER INSERT ON deliveries BEGIN DELETE FROM duplicates WHERE event = new.event; END;
"""
SCHEMA = "".join(
    [
        _TABLES,
        *map("INSERT INTO steps (step, floor) VALUES ({}, 0);".format, STEPS),
        _triggers("duplicates", _DUPLICATE),
        _triggers("deliveries", _DELIVERY),
        _triggers("attempts", _ATTEMPT),
        _TOLD,
    ]
)
"""Made after the tables whose rows are counted."""
