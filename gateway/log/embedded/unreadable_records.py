"""Reads, counts and deletes the records of a damaged file, but for those in its damaged pages."""

import sqlite3
from collections.abc import Callable, Sequence
from typing import NamedTuple

import orjson

from gateway.log.base import FETCH_RECORDS, Commit, Record
from gateway.log.embedded import statements, sweep
from gateway.log.embedded.file import DAMAGED
from gateway.model import LogUnavailableError


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


class UnreadableCommitsError(LogUnavailableError):
    """The file is damaged where its commits are."""


_WITH_RECORDS = """
SELECT json_group_array(json_array(name, next)) FROM topics WHERE EXISTS (
    SELECT 1 FROM records WHERE records.id >= topics.id << 48 AND records.id < topics.id + 1 << 48
)
"""


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
        counted: list[Counted] = []
        lost = _one_by_one(connection, topic, range(start, end), now, lambda record: counted.append(_counted(record)))
        return counted, end, lost
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
        end, records = min(end, start + FETCH_RECORDS), list[Record]()
        return records, end, _one_by_one(connection, topic, range(start, end), now, records.append)
    return chunk.records, chunk.end, []


def delete_around_damage(connection: sqlite3.Connection, topic: str, offsets: Sequence[int]) -> list[int]:
    """Delete records; return which of them can't be. Blocking."""
    try:
        _delete(connection, topic, offsets)
    except sqlite3.DatabaseError as error:
        if not _is_damage(error):
            raise
        if len(offsets) == 1:
            return [*offsets]
        return [kept for offset in offsets for kept in delete_around_damage(connection, topic, [offset])]
    return []


def offsets_from(connection: sqlite3.Connection, topic: str, start: int, end: int, limit: int) -> list[int] | None:
    """Return the first offsets of records with `start <= offset < end`; None if the file is damaged there. Blocking."""
    try:
        return statements.rows(
            connection,
            "SELECT json_group_array(id & 0xffffffffffff) FROM (SELECT id FROM records"
            " WHERE id >= (SELECT id FROM topics WHERE name = ?1) << 48 | ?2"
            " AND id < (SELECT id FROM topics WHERE name = ?1) << 48 | ?3 ORDER BY id LIMIT ?4)",
            topic,
            start,
            end,
            limit,
        )
    except sqlite3.DatabaseError as error:
        if not _is_damage(error):
            raise
        return None


def behind_damage(connection: sqlite3.Connection, topic: str, start: int, end: int) -> int:
    """Return an offset, at most `end`, from which records can be found again, if the next from `start` can't. Blocking.

    Found by bisection: there may be millions of offsets, of which most have no record. Between several damaged pages
    it may pass over records that can be found.
    """
    while end - start > 1:
        middle = (start + end) // 2
        if offsets_from(connection, topic, middle, end, 1) is None:
            start = middle
        else:
            end = middle
    return end


def topics_with_records(connection: sqlite3.Connection) -> dict[str, int]:
    """Return the log end offset of each topic that has records, or damaged pages where its first would be. Blocking."""
    try:
        return dict(statements.rows(connection, _WITH_RECORDS))
    except sqlite3.DatabaseError as error:
        if not _is_damage(error):
            raise
    found = statements.rows(connection, "SELECT json_group_array(json_array(name, next)) FROM topics")
    return {name: end for name, end in found if may_have_records(connection, name)}


def may_have_records(connection: sqlite3.Connection, topic: str) -> bool:
    """Return whether a topic has records, or damaged pages where its first would be. Blocking."""
    statement = (
        "SELECT 1 FROM topics JOIN records ON records.id >= topics.id << 48 AND records.id < topics.id + 1 << 48"
        " WHERE name = ? LIMIT 1"
    )
    try:
        return statements.first_row(connection, statement, topic) is not None
    except sqlite3.DatabaseError as error:
        if not _is_damage(error):
            raise
        return True


def committed_around_damage(connection: sqlite3.Connection, group: str, topic: str) -> Commit | None:
    """Return a commit, None without one. Raises UnreadableCommitsError if that can't be read. Blocking."""
    statement = "SELECT base, done FROM commits WHERE member = ? AND topic = ?"
    try:
        row = statements.first_row(connection, statement, group, topic)
        return None if row is None else statements.decode_commit(*row)
    except (sqlite3.DatabaseError, ValueError) as error:
        if not _is_damage(error):
            raise
        raise UnreadableCommitsError(str(error)) from error


def vacuum_some(connection: sqlite3.Connection) -> bool:
    """Give some free pages back to the disk, if there are many; return whether there may be more. Blocking.

    A damaged file keeps them, and uses them again.
    """
    try:
        return sweep.vacuum_some(connection)
    except sqlite3.DatabaseError as error:
        if not _is_damage(error):
            raise
        return False


def _delete(connection: sqlite3.Connection, topic: str, offsets: Sequence[int]) -> None:
    with statements.transaction(connection):
        connection.execute(
            "DELETE FROM records WHERE id IN"
            " (SELECT (SELECT id FROM topics WHERE name = ?1) << 48 | value FROM json_each(?2))",
            (topic, orjson.dumps([*offsets]).decode()),
        )


def _one_by_one(
    connection: sqlite3.Connection, topic: str, offsets: range, now: float, take: Callable[[Record], None]
) -> list[Unreadable]:
    """Read each record by itself; return what can't be read."""
    lost: list[Unreadable] = []
    for offset in offsets:
        try:
            records = statements.select(connection, topic, offset, offset + 1, now).records
        except (sqlite3.DatabaseError, ValueError) as error:
            if not _is_damage(error):
                raise
            if lost and lost[-1].end == offset:
                lost[-1] = lost[-1]._replace(end=offset + 1)
            else:
                lost.append(Unreadable(offset, offset + 1, str(error)))
        else:
            for record in records:
                take(record)
    return lost


def _counted(record: Record) -> Counted:
    return Counted(record.offset, record.key, len(record.value), record.appended_at)


def _is_damage(error: Exception) -> bool:
    if isinstance(error, sqlite3.Error):
        return getattr(error, "sqlite_errorcode", 0) & 0xFF in DAMAGED
    return True  # headers that aren't JSON
