"""Retention: deletes what is old, in steps between which appends run, and gives free pages back.

Like those of `statements.py`, these functions are blocking.
"""

import math
import sqlite3
from collections.abc import Callable, Collection, Iterator

from gateway.log.embedded.statements import LAST_OFFSET, NOTES, first_row, rows, transaction

SWEEP_RECORDS = 1000  # Records deleted at a time, so that appends can run in between.
SWEEP_PAGES = 256  # Pages returned to the file system at a time.


class Requeue:
    """Yielded to be requeued behind pending work."""


def swept_at(connection: sqlite3.Connection) -> float:
    """Return when the last sweep ended, by the log's clock; minus infinity if there was none."""
    if not first_row(connection, "SELECT 1 FROM sqlite_schema WHERE name = 'notes'"):
        return -math.inf
    found = first_row(connection, "SELECT value FROM notes WHERE name = 'swept'")
    return float(found[0]) if found else -math.inf


def noted_clock(connection: sqlite3.Connection) -> tuple[float, float]:
    """Return when the clock was last set forward, and by how many seconds in all, as `note_clock` has stored it."""
    if not first_row(connection, "SELECT 1 FROM sqlite_schema WHERE name = 'notes'"):
        return -math.inf, 0.0
    stepped_at = first_row(connection, "SELECT value FROM notes WHERE name = 'clock_set_at'")
    stepped_by = first_row(connection, "SELECT value FROM notes WHERE name = 'clock_gained'")
    return (float(stepped_at[0]), float(stepped_by[0])) if stepped_at and stepped_by else (-math.inf, 0.0)


def note_clock(connection: sqlite3.Connection, stepped_at: float, stepped_by: float) -> None:
    """Store that the clock was set forward, for the next process."""
    with transaction(connection):
        connection.execute(NOTES)
        connection.execute(
            "INSERT OR REPLACE INTO notes (name, value) VALUES ('clock_set_at', ?), ('clock_gained', ?)",
            (stepped_at, stepped_by),
        )


def sweep(
    connection: sqlite3.Connection,
    now: Callable[[], float],
    retention_cutoff: Callable[[float], float],
    until_done: Collection[str] = (),
) -> Iterator[Requeue]:
    """Delete old records in steps, between which queued work runs: those stored before `retention_cutoff(retention)`.

    In topics that are kept `until_done`, also delete records below the smallest committed base.
    """
    topics = rows(
        connection,
        "SELECT json_group_array(json_array(id, name, retention, (SELECT min(base) FROM commits WHERE topic = name)))"
        " FROM topics WHERE retention IS NOT NULL",
    )
    for topic, name, retention, base in topics:
        done_below = base if name in until_done and base is not None else 0
        while _delete_some(connection, topic, int(retention_cutoff(retention) * 1e6), done_below):
            yield Requeue()
    with transaction(connection):
        connection.execute(NOTES)
        connection.execute("INSERT OR REPLACE INTO notes (name, value) VALUES ('swept', ?)", (now(),))
    while vacuum_some(connection):
        yield Requeue()


def vacuum_some(connection: sqlite3.Connection) -> bool:
    """Give some free pages back to the file system; return whether there may be more to give back.

    Free pages are reused; only if there are many is it worth moving others.
    """
    free = connection.execute("PRAGMA freelist_count").fetchone()[0]
    if free * 4 <= connection.execute("PRAGMA page_count").fetchone()[0]:
        return False
    connection.execute(f"PRAGMA incremental_vacuum({SWEEP_PAGES})").fetchall()
    return True


def _delete_some(connection: sqlite3.Connection, topic: int, before: int, done_below: int) -> bool:
    """Delete those of the first records that are older than a time (microseconds) or below an offset.

    Return whether there were any.
    """
    first, last = topic << 48, topic << 48 | LAST_OFFSET
    found = first_row(
        connection,
        "SELECT max(id) FROM (SELECT id, at FROM records WHERE id BETWEEN ? AND ? ORDER BY id LIMIT ?)"
        " WHERE at < ? OR id < ?",
        first,
        last,
        SWEEP_RECORDS,
        before,
        first + done_below,
    )
    if found is None or found[0] is None:
        return False
    with transaction(connection):
        connection.execute(
            "DELETE FROM records WHERE id BETWEEN ? AND ? AND (at < ? OR id < ?)",
            (first, found[0], before, first + done_below),
        )
        connection.execute(
            "UPDATE topics SET start = coalesce((SELECT min(id) & ? FROM records WHERE id BETWEEN ? AND ?), next)"
            " WHERE id = ?",
            (LAST_OFFSET, first, last, topic),
        )
    return True
