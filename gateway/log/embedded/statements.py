"""The file's schema and SQL. Functions that take a connection are blocking; call them only on the log's two threads."""

import math
import sqlite3
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import orjson

from gateway.log.base import (
    FETCH_BYTES,
    FETCH_RECORDS,
    Assignment,
    Commit,
    Partition,
    Record,
    RecordHeaders,
    TopicProblem,
    TopicSpec,
    content_size,
    missing_problem,
)
from gateway.model import UsageError

APPLICATION_ID = 0x67776C67  # "gwlg" distinguishes our files from other SQLite databases.
SCHEMA_VERSION = 1
# A record's id is its topic's id (the upper 15 bits) and its offset: the records of a topic are adjacent.
# `start` and `next` of a topic are the log start and the log end offset.
# Invariant: `next` is above every offset ever used, so none is used twice. The trigger enforces it when two processes
# append at once: the second one's offsets aren't the next ones any more.
# Only a sweep moves `start`, so that records removed by compaction aren't reported as lost.
# The `member` of a commit is always the group: it has one.
SCHEMA = """
CREATE TABLE topics (
    id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, retention REAL, compacted INTEGER NOT NULL,
    start INTEGER NOT NULL DEFAULT 0, next INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE TABLE records (
    id INTEGER PRIMARY KEY, at INTEGER NOT NULL, key BLOB NOT NULL, headers BLOB NOT NULL, value BLOB NOT NULL
) STRICT;
CREATE TABLE commits (
    member TEXT NOT NULL, topic TEXT NOT NULL, base INTEGER NOT NULL, done TEXT NOT NULL, PRIMARY KEY (member, topic)
) STRICT, WITHOUT ROWID;
CREATE TRIGGER appended AFTER INSERT ON records BEGIN
    SELECT RAISE(ABORT, 'offset taken') FROM topics WHERE id = NEW.id >> 48 AND next <> NEW.id & 0xffffffffffff;
    UPDATE topics SET next = next + 1 WHERE id = NEW.id >> 48;
END;
CREATE TRIGGER compaction AFTER INSERT ON records
WHEN (SELECT compacted FROM topics WHERE id = NEW.id >> 48) BEGIN
    DELETE FROM records WHERE id >= NEW.id >> 48 << 48 AND id < NEW.id AND key = NEW.key;
END;
"""
# Bookkeeping about the file. Created when needed: a file of an older version may be on a full disk.
NOTES = "CREATE TABLE IF NOT EXISTS notes (name TEXT PRIMARY KEY, value ANY) STRICT, WITHOUT ROWID"
LAST_OFFSET = (1 << 48) - 1
# ?1: [[id, where the record begins in ?2, counted from 1, bytes of key, of headers, of value], …]; ?3: microseconds
INSERT = """
INSERT INTO records (id, at, key, headers, value)
SELECT value ->> 0, ?3,
    substr(?2, value ->> 1, value ->> 2),
    substr(?2, (value ->> 1) + (value ->> 2), value ->> 3),
    substr(?2, (value ->> 1) + (value ->> 2) + (value ->> 3), value ->> 4)
FROM json_each(?1)
"""
# group_concat treats the blobs as text, which changes none of their bytes in a UTF-8 database.
SELECT = f"""
WITH head AS (
    SELECT id, length(key) + length(headers) + length(value) AS size FROM records
    WHERE id >= (SELECT id FROM topics WHERE name = ?1) << 48 | ?2
        AND id < (SELECT id FROM topics WHERE name = ?1) << 48 | ?3
    ORDER BY id LIMIT {FETCH_RECORDS}
), sums AS (
    SELECT id, sum(size) OVER (ORDER BY id) AS total FROM head
)
SELECT
    json_group_array(json_array(id & 0xffffffffffff, at, length(key), length(headers), length(value))),
    CAST(group_concat(key || headers || value, '') AS BLOB)
FROM (
    SELECT * FROM records
    WHERE id >= (SELECT min(id) FROM sums)
        AND id <= (SELECT coalesce(max(id) FILTER (WHERE total <= ?4), min(id)) FROM sums)
    ORDER BY id LIMIT {FETCH_RECORDS}
)
"""  # noqa: S608 - our own numbers
COMMIT = """
INSERT OR REPLACE INTO commits (member, topic, base, done)
SELECT ?1, value ->> 0, value ->> 1, value ->> 2 FROM json_each(?2)
"""
SEED = COMMIT.replace("REPLACE", "IGNORE")
LAST_TOPIC = (1 << 15) - 1
DAMAGED_HEADERS = "gw_damaged_headers"
MIN_SQLITE_VERSION = (3, 38, 0)  # The first with `->>`.


@dataclass(slots=True)
class Chunk:
    """Consecutive records of a topic; their offsets are `start <= offset < end`, with gaps.

    `first` is the topic's first offset when they were read: records below it were deleted.
    """

    topic: str
    start: int
    end: int
    size: int = 0
    records: list[Record] = field(default_factory=list)
    first: int = 0

    def has_room(self, size: int) -> bool:
        """Return whether a fetch may return another `size` bytes with these records."""
        return not self.records or (len(self.records) < FETCH_RECORDS and self.size + size <= FETCH_BYTES)

    def cut(self, max_bytes: int) -> "Chunk | None":
        """Remove and return the first records: so many bytes, or a single larger one; None if these would be all."""
        count = size = 0
        for record in self.records:
            more = content_size(record)
            if count and size + more > max_bytes:
                break
            count, size = count + 1, size + more
        if count == len(self.records):
            return None
        start, end = self.start, self.records[count].offset
        first, self.records = self.records[:count], self.records[count:]
        self.start, self.size = end, self.size - size
        return Chunk(self.topic, start, end, size, first, self.first)


def first_row(connection: sqlite3.Connection, statement: str, *parameters: object) -> tuple[Any, ...] | None:
    rows: list[tuple[Any, ...]] = connection.execute(statement, parameters).fetchall()
    return rows[0] if rows else None


def rows(connection: sqlite3.Connection, statement: str, *parameters: object) -> list[Any]:
    """Return the rows of a statement that returns them as one JSON array."""
    rows: list[Any] = orjson.loads(connection.execute(statement, parameters).fetchall()[0][0])
    return rows


# Headers are stored as JSON, so that the file is readable; bytes are written as the characters of the same code.


def encode_headers(headers: RecordHeaders) -> bytes:
    encoded = orjson.dumps([(name, text.decode("latin-1")) for name, text in headers])
    return memoryview(encoded).tobytes()  # orjson's own keeps a buffer of several times its size


def decode_headers(encoded: bytes) -> RecordHeaders:
    """Raises ValueError for bytes that have changed in the file."""
    try:
        return tuple([(name, text.encode("latin-1")) for name, text in orjson.loads(encoded)])
    except (AttributeError, TypeError) as error:
        raise ValueError(f"headers: expected pairs of texts, got {encoded!r}") from error


def decode_damaged_headers(encoded: bytes) -> RecordHeaders:
    """Do the same, but return bytes that have changed as a header of that name, by which nobody can decode the record.

    Its readers set aside what they can't decode, and say so; one that raised would keep them from all others.
    """
    try:
        return decode_headers(encoded)
    except ValueError:
        return ((DAMAGED_HEADERS, encoded),)


def select(
    connection: sqlite3.Connection,
    topic: str,
    start: int,
    end: int,
    now: float,
    *,
    max_bytes: int = FETCH_BYTES,
    decode: Callable[[bytes], RecordHeaders] = decode_headers,
) -> Chunk:
    """Read a range's first records, as many as a fetch of so many bytes may return. Raises what `decode` raises."""
    end = min(end, LAST_OFFSET)
    lengths, content = connection.execute(SELECT, (topic, start, end, max_bytes)).fetchall()[0]
    chunk = Chunk(topic, start, end)
    begin = 0
    for offset, at, key, headers, value in orjson.loads(lengths):
        key_end = begin + key
        headers_end = key_end + headers
        value_end = headers_end + value
        chunk.records.append(
            Record(
                offset,
                # The computer's clock may have been set back while the gateway was down.
                min(at / 1e6, now),
                content[begin:key_end],
                content[headers_end:value_end],
                decode(content[key_end:headers_end]),
            )
        )
        begin = value_end
    if chunk.records:
        chunk.end = chunk.records[-1].offset + 1
        chunk.size = begin
    return chunk


def offset_at(connection: sqlite3.Connection, topic: str, at: float, now: float) -> dict[int, int]:
    """Return the offset of a topic's first record appended at or after a time, by binary search."""
    found = first_row(connection, "SELECT id << 48, start, next FROM topics WHERE name = ?", topic)
    if found is None:
        return {}
    records, start, end = found

    def following(offset: int) -> tuple[int, float]:
        """Return the offset of the first record at or after an offset, and when it was appended."""
        row = first_row(
            connection,
            "SELECT id, at FROM records WHERE id >= ? AND id < ? ORDER BY id LIMIT 1",
            records | offset,
            records | end,
        )
        return (end, math.inf) if row is None else (row[0] & LAST_OFFSET, min(row[1] / 1e6, now))

    first = start + bisect_left(range(start, end), at, key=lambda offset: following(offset)[1])
    return {0: following(first)[0]}


def assignments(
    connection: sqlite3.Connection, group: str | None, topics: Sequence[str]
) -> list[tuple[Assignment, int]]:
    """Return where a group continues in each topic, and the topic's next offset."""
    assignments = []
    for topic in topics:
        start, end = first_row(connection, "SELECT start, next FROM topics WHERE name = ?", topic) or (0, 0)
        row = first_row(connection, "SELECT base, done FROM commits WHERE member = ? AND topic = ?", group, topic)
        commit = decode_commit(*row) if row else Commit(start)
        assignments.append((Assignment(Partition(topic, 0), commit, start, row is not None), end))
    return assignments


def start_offsets(connection: sqlite3.Connection) -> dict[str, int]:
    """Return the first offset of each topic."""
    return dict(rows(connection, "SELECT json_group_array(json_array(name, start)) FROM topics"))


def encode_commit(commit: Commit) -> tuple[int, str]:
    """Return the base, and in hexadecimal the completion bitmap and, after a colon, the group's metadata."""
    return commit.base, commit.done.hex() + (f":{commit.metadata.hex()}" if commit.metadata else "")


def decode_commit(base: int, text: str) -> Commit:
    done, _, metadata = text.partition(":")
    return Commit(base, bytes.fromhex(done), bytes.fromhex(metadata))


def commit(
    connection: sqlite3.Connection, group: str, rows: Sequence[tuple[str, int, str]], statement: str = COMMIT
) -> None:
    connection.execute(statement, (group, orjson.dumps(rows).decode()))


def create(connection: sqlite3.Connection, specs: Sequence[TopicSpec]) -> list[str]:
    """Create the topics that are missing, all or none. Raises UsageError for one too many for the file."""
    statement = "INSERT OR IGNORE INTO topics (name, retention, compacted) VALUES (?, ?, ?)"
    with transaction(connection):
        created = [
            spec.name
            for spec in specs
            if connection.execute(statement, (spec.name, spec.retention, spec.compacted)).rowcount
        ]
        (last,) = first_row(connection, "SELECT coalesce(max(id), 0) FROM topics") or (0,)
        if created and last > LAST_TOPIC:
            raise UsageError(f"{created[-1]}: expected room for it in the file, got one with {LAST_TOPIC} topics")
        return created


def check(connection: sqlite3.Connection, specs: Sequence[TopicSpec]) -> list[TopicProblem]:
    problems: list[tuple[str, str]] = []
    missing: list[TopicProblem] = []
    for setting, expected in (("journal_mode", "wal"), ("synchronous", 2)):
        got = connection.execute(f"PRAGMA {setting}").fetchone()[0]
        if got != expected:
            problems.extend((spec.name, f"expected {setting} {expected}, got {got}") for spec in specs)
    for spec in specs:
        row = first_row(connection, "SELECT retention, compacted FROM topics WHERE name = ?", spec.name)
        if row is None:
            missing.append(missing_problem(spec))
            continue
        retention, is_compacted = row
        if retention is not None and (spec.retention is None or retention < spec.retention):
            wanted = "unlimited retention" if spec.retention is None else f"a retention of at least {spec.retention} s"
            problems.append((spec.name, f"expected {wanted}, got {retention} s"))
        if is_compacted != spec.compacted:
            problems.append((spec.name, f"expected compacted to be {spec.compacted}, got {bool(is_compacted)}"))
    expendable = {spec.name for spec in specs if spec.is_best_effort}
    return missing + [
        TopicProblem(topic=topic, message=message, is_fatal=topic not in expendable) for topic, message in problems
    ]


def probe_write_lock(connection: sqlite3.Connection) -> None:
    """Check that this connection can get the write lock, without keeping it."""
    with transaction(connection):
        pass


def probe_space(connection: sqlite3.Connection, size: int) -> None:
    """Check that this many bytes fit, by writing and deleting them."""
    with transaction(connection):
        connection.execute(NOTES)
        connection.execute("INSERT OR REPLACE INTO notes (name, value) VALUES ('room', zeroblob(?))", (size,))
    connection.execute("DELETE FROM notes WHERE name = 'room'")


@contextmanager
def transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise
