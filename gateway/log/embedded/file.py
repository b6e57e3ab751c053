"""The file: its two connections, the log's clock, and the checks when it is opened."""

import errno
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from gateway.log.embedded.file_check import FileCheck, refuse_shortened_wal
from gateway.log.embedded.lock import Lock, prevent_checkpoint, refuse_other_name, wal_of
from gateway.log.embedded.retention_clock import RetentionClock
from gateway.log.embedded.statements import APPLICATION_ID, MIN_SQLITE_VERSION, SCHEMA, SCHEMA_VERSION
from gateway.log.embedded.sweep import note_clock, noted_clock
from gateway.log.monotonic import MonotonicClock
from gateway.model import LogLostError, LogUnavailableError, UsageError

DAMAGED = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
RESTORE = "run `gateway restore` with a backup"
"""What an operator may do with a damaged log."""
PAGE_BYTES = 8192  # Several records of the usual 2 kB; at SQLite's 4,096 the second one wastes most of a page.


def elapsed() -> float:
    """Return the time of a monotonic clock that, where the system has one, runs on while the machine is suspended."""
    return time.clock_gettime(getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC))


class File:
    """The two connections, the owner's lock, and the log's clock."""

    def __init__(
        self,
        path: Path,
        *,
        is_owner: bool,
        busy_timeout: float,
        clock: Callable[[], float],
        monotonic: Callable[[], float] = elapsed,
        advice: str = RESTORE,
    ) -> None:
        self.path = path
        self._advice = advice
        self.is_owner = is_owner
        self._busy_timeout = busy_timeout
        self._clock = clock
        self._monotonic = monotonic
        self._monotonic_clock = MonotonicClock()
        self._clock_lock = threading.Lock()
        self._lock: Lock | None = None
        self._file_check: FileCheck | None = None
        self._kept_open: int | None = None
        self.lost_reason: str | None = None
        if sqlite3.sqlite_version_info < MIN_SQLITE_VERSION:
            raise UsageError(f"sqlite: expected at least 3.38, got {sqlite3.sqlite_version}")
        try:
            if is_owner:
                self._lock = Lock(path)
            else:
                path.stat()  # otherwise SQLite would create it
                refuse_other_name(path)
            refuse_shortened_wal(path, is_owner=is_owner)
            self.writer = self._connect()
            try:
                _prepare(self.writer, path, may_create=is_owner)
                self.reader = self._connect()
            except BaseException:
                self.writer.close()
                raise
            self._file_check = self._open_file_check()
            stepped_at, self._noted_step = noted_clock(self.reader)
            self._retention_clock = RetentionClock(
                clock(), monotonic(), stepped_at=stepped_at, stepped_by=self._noted_step
            )
            self._refuse_truncated(self._file_check)
        except (sqlite3.Error, OSError) as error:
            self._unlock()
            reason = error.strerror.lower() if isinstance(error, OSError) and error.strerror else error
            kind = LogUnavailableError if _is_temporary(error) else UsageError
            raise kind(f"{path}: expected an embedded log, got: {reason}") from error
        except BaseException:
            self._unlock()
            raise

    def now(self) -> float:
        """Return the clock's time, made monotonic: after a step back it runs at half speed until it is overtaken."""
        with self._clock_lock:  # called from the event loop and both threads
            return self._monotonic_clock.advance(self._clock(), time.monotonic())

    def retention_cutoff(self, retention: float) -> float:
        """Return the time before which a topic with this retention keeps no records. For the writer thread.

        If the clock was set forward, that is stored in the file first: the next process couldn't notice it.
        """
        clock = self._retention_clock
        cutoff = clock.retention_cutoff(retention, self.now(), self._monotonic())
        if clock.stepped_by != self._noted_step:
            note_clock(self.writer, clock.stepped_at, clock.stepped_by)
            self._noted_step = clock.stepped_by
        return cutoff

    @property
    def clock_stepped_by(self) -> float:
        """Seconds by which the clock was set forward in all, as far as `retention_cutoff` has noticed."""
        return self._retention_clock.stepped_by

    def check_file(self) -> None:
        """Raise LogLostError, now and at every later call, if the file was moved, replaced, truncated or damaged.

        If it doesn't raise, what was stored before is in the file that the next owner will open. A process that isn't
        the owner only checks that the path is still that of the opened file: the owner may change the WAL.
        """
        if self.lost_reason is None and self._file_check is not None:
            check = self._file_check
            if problem := check.problem() if self.is_owner else check.moved():
                self.lost_reason = f"{self.path} can no longer be used, and nothing more is written to it: {problem}"
        if self.lost_reason is not None:
            raise LogLostError(self.lost_reason)

    def note_error(self, error: Exception) -> None:
        """If an error means that the file is damaged, refuse everything from now on."""
        if self.lost_reason is None and getattr(error, "sqlite_errorcode", 0) & 0xFF in DAMAGED:
            self.lost_reason = (
                f"{self.path} is damaged: {error_text(error)}; nothing more is written to it; {self._advice}"
            )

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Raise SQLite's errors as the log's own."""
        try:
            yield
        except sqlite3.Error as error:
            self.note_error(error)
            kind = LogUnavailableError if self.lost_reason is None else LogLostError
            raise kind(self.lost_reason or f"{self.path}: {error_text(error)}") from error

    def close(self) -> None:
        if self.lost_reason is not None:
            self._prevent_checkpoint()
        elif self.is_owner:
            with suppress(sqlite3.Error):  # the last sweep has stored the clock's steps, and nothing was deleted since
                self.retention_cutoff(0.0)
        self.reader.close()
        self.writer.close()
        self._unlock()

    def _prevent_checkpoint(self) -> None:
        """Leave the file and its WAL as they are: SQLite's last connection would run a checkpoint when it closes."""
        if self._lock is not None:
            prevent_checkpoint(self._lock.descriptor)
            return
        with suppress(OSError):
            self._kept_open = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            prevent_checkpoint(self._kept_open)

    def _open_file_check(self) -> FileCheck:
        try:
            self.writer.execute(
                "SELECT count(*) FROM topics"
            ).fetchall()  # SQLite creates its files at the first statement.
            return FileCheck(self.path, None if self._lock is None else self._lock.descriptor)
        except BaseException:
            self.reader.close()
            self.writer.close()
            raise

    def _refuse_truncated(self, check: FileCheck) -> None:
        if problem := check.problem():
            self._prevent_checkpoint()
            self.reader.close()
            self.writer.close()
            raise UsageError(
                f"{self.path}: expected a complete file, got: {problem}; restore the original file, or run `gateway "
                "restore` with a backup, which moves the old files away"
            )

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(
            self.path, timeout=self._busy_timeout, isolation_level=None, check_same_thread=False
        )
        try:
            connection.execute("PRAGMA synchronous = FULL")
        except BaseException:
            connection.close()
            raise
        return connection

    def _unlock(self) -> None:
        if self._file_check is not None:
            self._file_check.close()
            self._file_check = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None
        if self._kept_open is not None:
            os.close(self._kept_open)
            self._kept_open = None


def sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _is_temporary(error: sqlite3.Error | OSError) -> bool:
    """Return whether opening the same file may succeed later without a repair."""
    if isinstance(error, OSError):
        return error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EIO}
    code = getattr(error, "sqlite_errorcode", None)  # the low byte is the primary result code
    return code is not None and code & 0xFF in {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_BUSY}


def _prepare(connection: sqlite3.Connection, path: Path, *, may_create: bool) -> None:
    """Create the tables in a new file, and refuse one that isn't ours."""
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if application != APPLICATION_ID:
        if connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
            raise UsageError(f"{path}: expected an embedded log, got another program's database")
        if not may_create:
            raise UsageError(
                f"{path}: expected an embedded log, got an empty database: until its first checkpoint, all of "
                f"a new one is in {wal_of(path).name}; if that was moved or deleted, put it back next to it"
            )
        connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
    elif version != SCHEMA_VERSION:
        raise UsageError(f"{path}: expected an embedded log of version {SCHEMA_VERSION}, got {version}")
    connection.execute("PRAGMA journal_mode = WAL")
    if application != APPLICATION_ID:
        # One transaction: an interrupted creation starts again.
        marks = f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {SCHEMA_VERSION};"
        connection.executescript(f"BEGIN IMMEDIATE; {SCHEMA} {marks} COMMIT;")


def error_text(error: Exception) -> str:
    """Return SQLite's message and its name for the error: "disk I/O error" alone may be anything."""
    name = getattr(error, "sqlite_errorname", None)
    return f"{error} ({name})" if name else str(error)
