"""The file: its schema, its connections, and what it does when it is somebody else's, deleted or damaged.

It has nothing that the log doesn't have: a file of another version, or a damaged one, is deleted and made anew. What it
does have are words of bodies, so nobody else may read it. It belongs to one process, which locks `NAME.lock` beside it.
"""

import fcntl
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import orjson

from gateway.index.terms import TOKEN_CHARACTERS
from gateway.index.traffic_schema import SCHEMA as TRAFFIC_SCHEMA
from gateway.log.attempt_records import FORMAT as ATTEMPT_FORMAT
from gateway.log.records import FORMAT as RECORD_FORMAT
from gateway.model import GatewayError, UsageError

APPLICATION_ID = 0x67776978  # "gwix"
SCHEMA_VERSION = 7
VERSION = SCHEMA_VERSION * 10_000 + RECORD_FORMAT * 100 + ATTEMPT_FORMAT
"""With the formats that are understood: records in a newer one were left out, and are to be read by who knows it."""
MIN_SQLITE_VERSION = (3, 38, 0)  # The first with `->>`.
CACHE_KIB = 48 << 10
"""Of each connection."""
STATEMENTS_KEPT = 1024
"""Prepared statements of each: a segment has some of its own."""
WAL_PAGES = 8192
"""Pages of 4 KiB after which the WAL is copied into the file."""
HASH_BYTES = 16 << 20
"""Of terms of a transaction that are sorted in memory, before they become a part of their table."""
MERGED_AT = 8
"""Parts of about one size that a table of terms has before they are merged."""

# An event's number is when it was appended (ms) times 256, plus its place among those of that millisecond: so numbers
# ascend with time, whatever is read first. `id_key` is the beginning of its id, as an integer.
# A segment has the events of `start <= ms < end`. Its tables are `events_N` and `terms_N`. Any number of its events may
# have one id, and be copies of each other: the indexes have by what one is told from the others. `id_key - content` is
# one number for both, by which those with one id and content are found: two would take 10 bytes more.
# `partitions.position` is the next offset to read, `last` when the one before it was appended (µs). `is_gone`: its
# topic was deleted since. `unsettled`: since when (ms) it has records above its base; NULL if it has none.
# `let_through` are the events that have a dedupe entry, a bit each, in chunks of 4,096 offsets, in hexadecimal.
# `deliveries.is_open`: whether its record, or a command, may still settle it.
# `letter`: why it became a dead letter, "" if it didn't. `began`: when its event was received, or replayed (µs).
# `stand_ins` are events of which only a delivery's record was read: they have the partition 0.
SCHEMA = """
CREATE TABLE segments (
    id INTEGER PRIMARY KEY, start INTEGER NOT NULL, end INTEGER NOT NULL, events INTEGER NOT NULL,
    characters INTEGER NOT NULL, is_merged INTEGER NOT NULL DEFAULT 0
) STRICT;
CREATE TABLE partitions (
    id INTEGER PRIMARY KEY, topic TEXT NOT NULL, number INTEGER NOT NULL, topic_id TEXT NOT NULL,
    position INTEGER NOT NULL, last INTEGER NOT NULL DEFAULT 0, is_gone INTEGER NOT NULL DEFAULT 0, progress TEXT,
    unsettled INTEGER
) STRICT;
CREATE TABLE let_through (
    partition TEXT NOT NULL, chunk INTEGER NOT NULL, bits TEXT NOT NULL, PRIMARY KEY (partition, chunk)
) STRICT, WITHOUT ROWID;
CREATE TABLE sources (name TEXT PRIMARY KEY) STRICT, WITHOUT ROWID;
CREATE TABLE notes (name TEXT PRIMARY KEY, value ANY) STRICT, WITHOUT ROWID;
CREATE TABLE deliveries (
    event INTEGER NOT NULL, delivery TEXT NOT NULL, replayed INTEGER NOT NULL, route TEXT NOT NULL,
    destination TEXT NOT NULL, item INTEGER NOT NULL, status TEXT NOT NULL, decided INTEGER NOT NULL,
    partition INTEGER NOT NULL, offset INTEGER NOT NULL, successor INTEGER NOT NULL, attempts INTEGER NOT NULL,
    result TEXT NOT NULL, reason TEXT NOT NULL, detail TEXT NOT NULL, due INTEGER NOT NULL, letter TEXT NOT NULL,
    lane INTEGER NOT NULL, began INTEGER NOT NULL, is_open INTEGER NOT NULL,
    PRIMARY KEY (event, delivery, replayed)
) STRICT, WITHOUT ROWID;
CREATE INDEX deliveries_by_status ON deliveries (status, event);
CREATE INDEX deliveries_by_route ON deliveries (route, event);
CREATE INDEX deliveries_by_destination ON deliveries (destination, event);
CREATE INDEX open_by_route ON deliveries (route, status, event) WHERE is_open = 1;
CREATE INDEX open_by_destination ON deliveries (destination, status, event) WHERE is_open = 1;
CREATE INDEX open_deliveries ON deliveries (partition, offset) WHERE is_open = 1;
CREATE TABLE attempts (
    event INTEGER NOT NULL, delivery TEXT NOT NULL, replayed INTEGER NOT NULL, number INTEGER NOT NULL,
    at INTEGER NOT NULL, took INTEGER NOT NULL, result TEXT NOT NULL, status INTEGER NOT NULL, decision TEXT NOT NULL,
    detail TEXT NOT NULL, partition INTEGER NOT NULL, offset INTEGER NOT NULL, lane INTEGER NOT NULL,
    PRIMARY KEY (event, delivery, replayed, number)
) STRICT, WITHOUT ROWID;
CREATE TABLE stand_ins (
    id_key INTEGER NOT NULL, received INTEGER NOT NULL, event INTEGER NOT NULL, PRIMARY KEY (id_key, received, event)
) STRICT, WITHOUT ROWID;
"""
_TOKENIZE = ("ascii tokenchars '" + TOKEN_CHARACTERS.replace("'", "''") + "'").replace('"', '""')


def segment_statements(number: int) -> tuple[str, ...]:
    """Return the statements that create a segment's tables."""
    events, terms = f"events_{number}", f"terms_{number}"
    columns = (
        "event INTEGER PRIMARY KEY, id_key INTEGER NOT NULL, id TEXT NOT NULL, source TEXT NOT NULL,"
        " type TEXT NOT NULL, key TEXT, received INTEGER NOT NULL, partition INTEGER NOT NULL,"
        " offset INTEGER NOT NULL, size INTEGER NOT NULL, is_cut INTEGER NOT NULL, content INTEGER NOT NULL"
    )
    options = f"content = '', detail = none, columnsize = 0, tokenize = \"{_TOKENIZE}\""
    return (
        f"CREATE TABLE {events} ({columns}) STRICT",
        f"CREATE INDEX {events}_by_id ON {events} (id_key, received)",
        f"CREATE INDEX {events}_by_content ON {events} (id_key - content, partition, offset) WHERE content <> 0",
        f"CREATE INDEX {events}_by_offset ON {events} (partition, offset)",
        f"CREATE VIRTUAL TABLE {terms} USING fts5 (terms, {options})",
        f"INSERT INTO {terms} ({terms}, rank) VALUES ('hashsize', {HASH_BYTES})",  # noqa: S608 - our own numbers
        f"INSERT INTO {terms} ({terms}, rank) VALUES ('automerge', {MERGED_AT})",  # noqa: S608 - as above
    )


_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}
_MAGIC = b"SQLite format 3\0"


class IndexUnavailableError(GatewayError):
    """The machine is at fault: the index's file can't be written or read at the moment."""


class IndexBehindError(IndexUnavailableError):
    """Nobody is at fault: the log has an event that the index hasn't read yet, which it does every second."""

    def __init__(self, message: str, *, source: str) -> None:
        """`source` is the event's."""
        super().__init__(message)
        self.source = source


class IndexLostError(IndexUnavailableError):
    """The index's file was deleted or replaced, is of another version, or damaged: it has to be made anew."""

    def __init__(self, message: str, *, is_damaged: bool) -> None:
        super().__init__(message)
        self.is_damaged = is_damaged


class IndexOutdatedError(IndexLostError):
    """The index's file has what may not be found any more: it has to be deleted, and made anew."""

    def __init__(self, message: str) -> None:
        super().__init__(message, is_damaged=False)


class IndexFile:
    """An open file with connections to write, to read and to read counts, each for one thread at a time.

    Raises UsageError for a file that isn't an index, or if another process has it, and IndexUnavailableError.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.replaced = ""
        """Why there is a new file in the place of another, "" if there isn't."""
        if sqlite3.sqlite_version_info < MIN_SQLITE_VERSION:
            raise UsageError(f"sqlite: expected at least 3.38, got {sqlite3.sqlite_version}")
        try:
            self._lock = _locked(path)
            try:
                self._open()
            except BaseException:
                os.close(self._lock)
                raise
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise IndexUnavailableError(f"{path}: expected an index, got: {reason}") from error

    def _open(self) -> None:
        try:
            _refuse_other_files(self.path)
        except IndexLostError as error:
            raise _damaged_stranger(self.path, error) from error
        try:
            self._connect()
        except IndexLostError as error:
            self.replaced = str(error)
            self._give_up(error)
            self._connect()

    def _give_up(self, error: IndexLostError) -> None:
        """Make room for a new file: keep a damaged one, which may tell of a broken disk, and delete any other."""
        if error.is_damaged:
            self.path.replace(self.path.with_name(f"{self.path.name}.damaged"))
        _delete(self.path)

    def _connect(self) -> None:
        os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        with translated(self.path):
            self.writer = _connection(self.path)
            try:
                _prepare(self.writer)
                self.reader = _reading(self.path)
                try:
                    self.counter = _reading(self.path)
                except BaseException:
                    self.reader.close()
                    raise
            except BaseException:
                self.writer.close()
                raise
        self._identity = _identity(self.path)

    def check(self) -> None:
        """Raise IndexLostError if the file was deleted or replaced since it was opened."""
        if _identity(self.path) != self._identity:
            raise IndexLostError(f"{self.path} was deleted or replaced while it was open", is_damaged=False)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Raise SQLite's errors as IndexUnavailableError, or as IndexLostError if the file is damaged."""
        with translated(self.path):
            yield

    def close(self) -> None:
        for connection in (self.reader, self.counter, self.writer):
            with suppress(sqlite3.Error):
                connection.close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def delete(self) -> None:
        """Close the file, and delete it."""
        self.close()
        with suppress(OSError):
            _delete(self.path)

    def set_aside(self) -> None:
        """Close the file, which is damaged, and rename it."""
        self.close()
        with suppress(OSError):
            self.path.replace(self.path.with_name(f"{self.path.name}.damaged"))
            _delete(self.path)


def open_to_read(path: Path) -> sqlite3.Connection:
    """Return a connection that only reads, of a file that another process may keep.

    Raises UsageError if there is no index of this version, and IndexUnavailableError.
    """
    try:
        with path.open("rb"):
            pass
    except FileNotFoundError:
        keeps = f"`gateway run --role console --index {path}` keeps one"
        raise UsageError(f"{path}: expected an index, got no file; {keeps}") from None
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise IndexUnavailableError(f"{path}: expected an index that can be read, got: {reason}") from error
    try:
        with translated(path):
            connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None)
            try:
                _refuse_to_read(path, connection)
            except BaseException:
                connection.close()
                raise
    except IndexLostError as error:
        raise UsageError(f"{path}: expected an index, got another file, or a damaged one: {error}") from error
    return connection


def _refuse_to_read(path: Path, connection: sqlite3.Connection) -> None:
    """Raise an error for what isn't an index of this version."""
    application, tables = (
        one(connection, "PRAGMA application_id"),
        one(connection, "SELECT count(*) FROM sqlite_schema"),
    )
    if application != APPLICATION_ID:
        if not tables:
            raise IndexUnavailableError(f"{path}: expected an index, got one that is being made")
        raise UsageError(f"{path}: expected an index, got another program's database")
    if (version := one(connection, "PRAGMA user_version")) != VERSION:
        whose = "another version of the gateway keeps it, whose commands can search it"
        raise UsageError(f"{path}: expected an index of version {VERSION}, got {version}: {whose}")


def one(connection: sqlite3.Connection, statement: str, *parameters: object) -> Any:  # noqa: ANN401 - a column's value
    """Return the only column of a statement's only row: another step would give up the interpreter lock again."""
    return connection.execute(statement, parameters).fetchall()[0][0]


def rows(connection: sqlite3.Connection, statement: str, *parameters: object) -> list[Any]:
    """Return the rows of a statement that returns them as one JSON array; its parameters may be one mapping."""
    given = parameters[0] if len(parameters) == 1 and isinstance(parameters[0], Mapping) else parameters
    found: list[Any] = orjson.loads(connection.execute(statement, given).fetchall()[0][0])
    return found


def as_json(value: object) -> str:
    """Return a value as a parameter of a statement."""
    return orjson.dumps(value).decode()


@contextmanager
def snapshot(connection: sqlite3.Connection) -> Iterator[None]:
    """Let all statements see the same state."""
    connection.execute("BEGIN")
    try:
        yield
    finally:
        connection.execute("ROLLBACK")


def _prepare(connection: sqlite3.Connection) -> None:
    """Create the tables in a new file. Raises IndexLostError for one of another version."""
    connection.execute("PRAGMA journal_mode = WAL")
    if connection.execute("PRAGMA application_id").fetchone()[0] == APPLICATION_ID:
        if (version := connection.execute("PRAGMA user_version").fetchone()[0]) != VERSION:
            raise IndexLostError(f"expected an index of version {VERSION}, got {version}", is_damaged=False)
        return
    # One transaction: an interrupted creation starts again.
    marks = f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {VERSION};"
    connection.executescript(f"BEGIN IMMEDIATE; {SCHEMA} {TRAFFIC_SCHEMA} {marks} COMMIT;")


def _connection(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(
        path, timeout=5.0, isolation_level=None, check_same_thread=False, cached_statements=STATEMENTS_KEPT
    )
    try:
        # What a machine loses when it crashes is read from the log again, with the positions that were lost, too.
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        connection.execute(f"PRAGMA wal_autocheckpoint = {WAL_PAGES}")
        connection.execute(f"PRAGMA journal_size_limit = {2 * WAL_PAGES * 4096}")
        connection.execute("PRAGMA temp_store = MEMORY")
    except BaseException:
        connection.close()
        raise
    return connection


def _reading(path: Path) -> sqlite3.Connection:
    """Return a connection that has found its tables."""
    connection = _connection(path)
    try:
        connection.execute("SELECT count(*) FROM segments").fetchall()
    except BaseException:
        connection.close()
        raise
    return connection


def _refuse_other_files(path: Path) -> None:
    """Raise UsageError for a file that isn't an index, of whatever version."""
    try:
        with path.open("rb") as file:
            head = file.read(100)
    except FileNotFoundError:
        return
    if not head:
        return
    application = int.from_bytes(head[68:72], "big")
    if not head.startswith(_MAGIC) or application not in (0, APPLICATION_ID):
        raise UsageError(f"{path}: expected an index, got another file; delete it, or name another one")
    if application == 0 and _has_tables(path):  # of ours, it may still be in the WAL
        raise UsageError(f"{path}: expected an index, got another program's database; name another file")


def _damaged_stranger(path: Path, error: IndexLostError) -> UsageError:
    """Return the error for a damaged file of which nobody knows whose it is."""
    return UsageError(f"{path}: expected an index, got a damaged database ({error}); delete it, or name another one")


def _has_tables(path: Path) -> bool:
    with translated(path):
        connection = _connection(path)
        try:
            if connection.execute("PRAGMA application_id").fetchone()[0] == APPLICATION_ID:
                return False
            return bool(connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0])
        finally:
            connection.close()


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _delete(path: Path) -> None:
    for name in (path, path.with_name(f"{path.name}-wal"), path.with_name(f"{path.name}-shm")):
        name.unlink(missing_ok=True)


def _locked(path: Path) -> int:
    """Lock a file's name and return a descriptor; closing it releases the lock."""
    lock = os.open(path.with_name(f"{path.name}.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise UsageError(f"{path}: expected an index of this process alone, got one that another has open") from None
    except BaseException:
        os.close(lock)
        raise
    return lock


@contextmanager
def translated(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        if "fts5" in str(error) and "no such module" in str(error):
            raise UsageError("sqlite: expected one with FTS5, got one without") from error
        name = getattr(error, "sqlite_errorname", None)
        message = f"{path}: {error}{f' ({name})' if name else ''}"
        if getattr(error, "sqlite_errorcode", 0) & 0xFF in _DAMAGED:
            raise IndexLostError(message, is_damaged=True) from error
        raise IndexUnavailableError(message) from error
