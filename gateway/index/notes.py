"""What the index says of itself in its file, so that who searches it knows what to expect. Times are Unix seconds."""

import sqlite3
from enum import StrEnum

from gateway.index.file import rows


class Note(StrEnum):
    """A row of the table of notes whose value is a time, in microseconds."""

    COMPLETE_TO = "complete_to"
    """All events that were appended before it have been read."""
    SETTLED_AT = "settled_at"
    """Statuses are at least those of that time."""


def noted(connection: sqlite3.Connection, note: Note) -> float:
    """Return a time that was noted; 0 if none was."""
    select = "SELECT json_group_array(value) FROM notes WHERE name = ?"
    return float(next(iter(rows(connection, select, note)), 0)) / 1e6


def write_note(connection: sqlite3.Connection, note: Note, at: float) -> None:
    """Note a time."""
    connection.execute("INSERT OR REPLACE INTO notes (name, value) VALUES (?, ?)", (note, round(at * 1e6)))
