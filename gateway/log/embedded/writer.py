"""The only thread that writes: all queued appends and commits become one transaction, with one fsync."""

import asyncio
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from threading import Thread
from time import monotonic
from typing import Any, NamedTuple

import orjson
import structlog

from gateway.log.base import Position, Record
from gateway.log.embedded import statements
from gateway.log.embedded.file import File, error_text
from gateway.log.embedded.statements import Chunk
from gateway.log.embedded.sweep import Requeue
from gateway.model import LogLostError, LogNearlyFullError

MAX_TRANSACTION_BYTES = 4 << 20  # Bytes after which a transaction takes no further groups.
DISK_FULL = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR)
SMALL_BYTES = 4 << 10  # Size of a small append, with its headers: most are smaller.
SMALL_PROBE_INTERVAL = 10.0  # Seconds for which a stored small append shows that others fit: probing takes space.
INSERT_TRIES = 10  # Each failed try means that another process has appended meanwhile.

logger = structlog.get_logger(__name__)


class Append(NamedTuple):
    topic: str
    key: bytes
    value: bytes
    headers: tuple[tuple[str, bytes], ...]
    encoded: bytes
    size: int
    future: asyncio.Future[Position]


class OffsetCommits(NamedTuple):
    """A member's commits: (topic, base, completion bitmap in hexadecimal)."""

    member: str
    rows: Sequence[tuple[str, int, str]]
    future: asyncio.Future[None]


@dataclass(slots=True)
class AppendBatch:
    """The appends and commits of one iteration of the event loop; not stored if it expires in the queue."""

    appends: list[Append] = field(default_factory=list)
    commits: list[OffsetCommits] = field(default_factory=list)
    size: int = 0
    timer: asyncio.TimerHandle | None = None
    is_expired: bool = False

    @property
    def is_empty(self) -> bool:
        return not (self.appends or self.commits)

    @property
    def futures(self) -> list[asyncio.Future[Any]]:
        return [*[append.future for append in self.appends], *[commits.future for commits in self.commits]]


class Stored(NamedTuple):
    """Where an append was stored (None for commits), or why it wasn't."""

    future: asyncio.Future[Any]
    result: Position | str | None


@dataclass(frozen=True, slots=True)
class Work:
    run: Callable[[], Any]
    future: asyncio.Future[Any]


class Writer:
    """The only thread that writes. It survives every error: once the disk has space again, it stores again."""

    def __init__(
        self,
        file: File,
        loop: asyncio.AbstractEventLoop,
        appended: Callable[[Sequence[AppendBatch], Sequence[Stored], Sequence[Chunk]], None],
    ) -> None:
        self.consumed: frozenset[str] = frozenset()
        self._file = file
        self._loop = loop
        self._appended = appended
        self._queue: SimpleQueue[AppendBatch | Work] = SimpleQueue()
        self._topics: dict[str, tuple[int, int]] = {}  # name → (id, next offset), as last seen
        self._refused_bytes = (
            0  # Largest group of appends, in bytes, that was refused, until one of that size is stored.
        )
        self._small_fits_until = 0.0
        self._is_stopping = False
        self._thread = Thread(target=self._run, name="log-writer", daemon=True)
        self._thread.start()

    def put(self, item: AppendBatch | Work) -> None:
        self._queue.put(item)

    def ping(self, connection: sqlite3.Connection) -> None:
        """Check and lock the file; if appends were refused, write as many bytes.

        Raises LogNearlyFullError if only small appends fit.
        """
        self._file.check_file()
        if not self._refused_bytes:
            statements.probe_write_lock(connection)
            return
        try:
            statements.probe_space(connection, self._refused_bytes)
        except sqlite3.Error as error:
            if not _is_disk_full(error) or self._refused_bytes <= SMALL_BYTES:
                raise
            if monotonic() >= self._small_fits_until:
                statements.probe_space(connection, SMALL_BYTES)
                self._small_fits_until = monotonic() + SMALL_PROBE_INTERVAL
            reason = f"expected room for {self._refused_bytes} bytes, got it for {SMALL_BYTES}: {error_text(error)}"
            raise LogNearlyFullError(f"{self._file.path}: {reason}") from error
        self._refused_bytes = 0

    def stop(self, timeout: float) -> bool:
        """Finish the queued work and end the thread; return whether that took less than `timeout` seconds."""
        self._is_stopping = True
        self._queue.put(AppendBatch())  # wakes the thread
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not (self._is_stopping and self._queue.empty()):
            groups, work = self._next_batch()
            if groups:
                self._store(groups)
            if work is not None:
                self._run_work(work)

    def _next_batch(self) -> tuple[list[AppendBatch], Work | None]:
        groups: list[AppendBatch] = []
        size = 0
        item = self._queue.get()
        while isinstance(item, AppendBatch):
            groups.append(item)
            size += item.size
            if size >= MAX_TRANSACTION_BYTES:
                return groups, None
            try:
                item = self._queue.get_nowait()
            except Empty:
                return groups, None
        return groups, item

    def _run_work(self, work: Work) -> None:
        try:
            with self._file.errors():
                result = work.run()
        except Exception as error:  # noqa: BLE001 - it is raised where the result is awaited
            post(self._loop, _resolve, work.future, None, error)
        else:
            if isinstance(result, Requeue) and not self._is_stopping:
                self._queue.put(work)
            else:
                post(self._loop, _resolve, work.future, result, None)

    def _store(self, groups: Sequence[AppendBatch]) -> None:
        in_time = [group for group in groups if not group.is_expired]
        appends = [append for group in in_time for append in group.appends]
        commits = [commit for group in in_time for commit in group.commits]
        tails: list[Chunk] = []
        try:
            # Before as well: writing beyond the end of a truncated file would make it as long as it was.
            self._file.check_file()
            with statements.transaction(self._file.writer) if commits else nullcontext():
                results = self._insert(appends)
                self._commit(commits)
            self._file.check_file()
            stored = [Stored(append.future, result) for append, result in zip(appends, results, strict=True)]
            stored += [Stored(commit.future, None) for commit in commits]
            tails = self._tails(appends, results)
        except Exception as error:
            if not isinstance(error, sqlite3.Error | OSError | LogLostError):
                logger.exception("append_failed", path=str(self._file.path))
            self._file.note_error(error)
            self._topics = {}  # the assigned offsets weren't used
            self._note_refused(sum([append.size for append in appends]) or 1)  # commits alone take next to nothing
            stored = [Stored(append.future, error_text(error)) for append in appends]
            stored += self._commit_alone(commits, error) if commits else ()
        else:
            if self._refused_bytes:
                self._note_stored(_size_of_stored(appends, results))
        post(self._loop, self._appended, groups, stored, tails)

    def _note_refused(self, size: int) -> None:
        self._refused_bytes = max(self._refused_bytes, size)
        if 0 < size <= SMALL_BYTES:
            self._small_fits_until = 0.0

    def _note_stored(self, size: int) -> None:
        """Note the size of appends that were stored after others were refused; larger ones may still not fit."""
        if size >= self._refused_bytes:
            self._refused_bytes = 0
        elif size:
            self._small_fits_until = monotonic() + SMALL_PROBE_INTERVAL

    def _commit(self, commits: Sequence[OffsetCommits]) -> None:
        for member, rows, _ in commits:
            statements.commit(self._file.writer, member, rows)

    def _commit_alone(self, commits: Sequence[OffsetCommits], error: Exception) -> list[Stored]:
        """Store commits without the appends for which the disk had no space: they need almost none."""
        if _is_disk_full(error):
            try:
                with statements.transaction(self._file.writer):
                    self._commit(commits)
            except sqlite3.Error as again:
                error = again
            else:
                return [Stored(commit.future, None) for commit in commits]
        return [Stored(commit.future, str(error)) for commit in commits]

    def _insert(self, appends: Sequence[Append]) -> list[Position | str]:
        for _ in range(INSERT_TRIES):
            if any(append.topic not in self._topics for append in appends):
                found = statements.rows(
                    self._file.writer, "SELECT json_group_array(json_array(name, id, next)) FROM topics"
                )
                self._topics = {name: (number, following) for name, number, following in found}
            at = int(self._file.now() * 1e6)
            topics = self._topics.copy()
            results: list[Position | str] = []
            rows = []
            parts: list[bytes] = []
            begin = 1
            for topic, key, value, _, encoded, _, _ in appends:
                if topic not in topics:
                    results.append(f"expected a topic, got {topic}, which was never created")
                    continue
                number, offset = topics[topic]
                topics[topic] = number, offset + 1
                rows.append((number << 48 | offset, begin, len(key), len(encoded), len(value)))
                parts += (key, encoded, value)
                begin += len(key) + len(encoded) + len(value)
                results.append(Position(0, offset, at / 1e6))
            try:
                if rows:
                    self._file.writer.execute(statements.INSERT, (orjson.dumps(rows).decode(), b"".join(parts), at))
            except sqlite3.IntegrityError:  # another process has used these offsets
                self._topics = {}
                continue
            self._topics = topics
            return results
        raise sqlite3.OperationalError(f"expected the next offsets, lost them {INSERT_TRIES} times to another process")

    def _tails(self, appends: Sequence[Append], results: Sequence[Position | str]) -> list[Chunk]:
        """Return the stored records of topics that are consumed in this process."""
        full: list[Chunk] = []
        open_: dict[str, Chunk] = {}
        for (topic, key, value, headers, _, size, _), position in zip(appends, results, strict=True):
            if topic not in self.consumed or isinstance(position, str):
                continue
            chunk = open_.get(topic)
            if chunk is None or not chunk.has_room(size):
                if chunk is not None:
                    full.append(chunk)
                chunk = open_[topic] = Chunk(topic, position.offset, position.offset)
            chunk.records.append(Record(position.offset, position.appended_at, key, value, headers))
            chunk.end = position.offset + 1
            chunk.size += size
        return [*full, *open_.values()]


def _is_disk_full(error: Exception) -> bool:
    return isinstance(error, sqlite3.Error) and error.sqlite_errorcode & 0xFF in DISK_FULL


def _size_of_stored(appends: Sequence[Append], results: Sequence[Position | str]) -> int:
    sizes = [0 if isinstance(result, str) else append.size for append, result in zip(appends, results, strict=True)]
    return sum(sizes)


def post(loop: asyncio.AbstractEventLoop, callback: Callable[..., None], *args: object) -> None:
    with suppress(RuntimeError):  # the event loop is closed
        loop.call_soon_threadsafe(callback, *args)


def _resolve(future: asyncio.Future[Any], result: object, error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)
