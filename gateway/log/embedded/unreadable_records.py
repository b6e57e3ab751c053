"""Reads the records of a damaged file, but for those in its damaged pages."""

import sqlite3
from typing import NamedTuple

from gateway.log.base import Record
from gateway.log.embedded import statements
from gateway.log.embedded.file import DAMAGED


class Counted(NamedTuple):
    """A record as it is counted: its key, and its bytes."""

    offset: int
    key: bytes
    size: int
    spooled_at: float


class Unreadable(NamedTuple):
    """Offsets, of which none can be read: the file is damaged there."""

    start: int
    end: int
    reason: str


def count_around_damage(
    connection: sqlite3.Connection, topic: str, start: int, end: int, now: float
) -> tuple[list[Counted], int, list[Unreadable]]:
    """Do what `read_around_damage` does, without the values, and for the whole range. Blocking."""
    try:
        found = connection.execute(
            "SELECT id & 0xffffffffffff, key, length(key) + length(headers) + length(value), at FROM records"
            " WHERE id >= (SELECT id FROM topics WHERE name = ?1) << 48 | ?2"
            " AND id < (SELECT id FROM topics WHERE name = ?1) << 48 | ?3 ORDER BY id",
            (topic, start, end),
        ).fetchall()
    except sqlite3.DatabaseError as error:
        if not _is_damage(error):
            raise
        records, end, lost = _one_by_one(connection, topic, start, end, now)
        return [Counted(each.offset, each.key, len(each.value), each.appended_at) for each in records], end, lost
    return [Counted(offset, key, size, at / 1e6) for offset, key, size, at in found], end, []


def read_around_damage(
    connection: sqlite3.Connection, topic: str, start: int, end: int, now: float
) -> tuple[list[Record], int, list[Unreadable]]:
    """Return a range's first records, where to go on, and the offsets that can't be read. Blocking.

    Where the file is damaged, each record is read by itself: those in the damaged pages are left out.
    """
    try:
        chunk = statements.select(connection, topic, start, end, now)
    except (sqlite3.DatabaseError, ValueError) as error:
        if not _is_damage(error):
            raise
        return _one_by_one(connection, topic, start, min(end, start + statements.FETCH_RECORDS), now)
    return chunk.records, chunk.end, []


def _one_by_one(
    connection: sqlite3.Connection, topic: str, start: int, end: int, now: float
) -> tuple[list[Record], int, list[Unreadable]]:
    records: list[Record] = []
    lost: list[Unreadable] = []
    for offset in range(start, end):
        try:
            records += statements.select(connection, topic, offset, offset + 1, now).records
        except (sqlite3.DatabaseError, ValueError) as error:
            if not _is_damage(error):
                raise
            if lost and lost[-1].end == offset:
                lost[-1] = lost[-1]._replace(end=offset + 1)
            else:
                lost.append(Unreadable(offset, offset + 1, str(error)))
    return records, end, lost


def _is_damage(error: Exception) -> bool:
    if isinstance(error, sqlite3.Error):
        return getattr(error, "sqlite_errorcode", 0) & 0xFF in DAMAGED
    return True  # headers that aren't JSON
