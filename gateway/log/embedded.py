"""The embedded log: one SQLite file (WAL, `synchronous=FULL`), for a laptop or a single machine. No Kafka needed.

    append ─▶ what one turn of the loop appends ─▶ queue ─▶ writer thread: all that waits, one statement, one fsync
                                                               │ one callback: futures resolved, records handed on
    fetch ◀─ buffer ◀─── at the tail: from memory ─────────────┘
                    ◀─── behind it: from the file, by the reader thread

Python's sqlite3 gives up the interpreter lock for every row and must win it back from the event loop. While the loop is
busy that takes up to a switch interval (5 ms) each time: `executemany` was seen to store 28 rows/s. So a group of
appends is one statement with two parameters, the lengths as JSON and all the bytes joined, and a read is one row alike.

Each topic has one partition, since more would serve only more processes, and the file is one process's. For the same
reason a group has a single member. Other processes (the command line) may append and read beside the owner.
"""

import asyncio
import errno
import fcntl
import math
import os
import sqlite3
import tempfile
import time
from bisect import bisect_left
from collections import deque
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, NamedTuple, Self, TypeVar

import orjson
import structlog

from gateway.log.base import (
    Assignment,
    Batch,
    Commit,
    Listener,
    Partition,
    Position,
    Record,
    RecordHeaders,
    TopicProblem,
    TopicSpec,
)
from gateway.model import LogUnavailableError, RecordTooLargeError, UsageError

MAX_RECORD_BYTES = 1_047_564  # What a Kafka broker takes by default (1,048,588), less 1 KiB for its framing.
MAX_WAITING_BYTES = 64 << 20  # Of appends that aren't stored yet; more are refused.
COMMIT_BYTES = 4 << 20  # Enough for one fsync; what still waits is the next one's.
FETCH_RECORDS = 500
FETCH_BYTES = 1 << 20
BUFFER_BYTES = 4 << 20  # Of a topic, handed to a consumer from memory; beyond that it reads the file.
POLL_INTERVAL = 0.2  # Seconds until an append of another process is seen.
RETRY_INTERVAL = 0.25  # Seconds from a failed read to the next.
SWEEP_RECORDS = 1000  # Deleted at a time; appends come in between.
SWEEP_PAGES = 256  # Given back to the file system at a time.
PAGE_BYTES = 8192  # Several records of the usual 2 kB; at SQLite's 4,096 the second one wastes most of a page.
BACKUP_PATIENCE = 30.0  # Seconds to wait for a lock that recovery or the owner's start holds.
UNFINISHED = ".part"  # The end of the name of a copy that isn't whole.
LEFT_OVER = 3600.0  # Seconds for which nobody has written to it.
INSERT_TRIES = 10  # Each lost one means that another process has appended meanwhile.

APPLICATION_ID = 0x67776C67  # "gwlg" tells our files from other SQLite databases.
SCHEMA_VERSION = 1
# A record's id is its topic's id (the upper 15 bits) and its offset: the records of a topic lie side by side.
# Invariant: `next` is above every offset ever used, so none is used twice. The trigger holds it against two processes
# that append at once: the offsets of the second one aren't the next ones any more.
# `start` moves by retention only: what compaction deletes isn't lost to a consumer that comes later.
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
CREATE TRIGGER superseded AFTER INSERT ON records
WHEN (SELECT compacted FROM topics WHERE id = NEW.id >> 48) BEGIN
    DELETE FROM records WHERE id >= NEW.id >> 48 << 48 AND id < NEW.id AND key = NEW.key;
END;
"""
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
# group_concat takes the blobs for text, which changes no byte of them in a UTF-8 database.
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
        AND id <= (SELECT coalesce(max(id) FILTER (WHERE total <= {FETCH_BYTES}), min(id)) FROM sums)
    ORDER BY id LIMIT {FETCH_RECORDS}
)
"""  # noqa: S608 - our own numbers
COMMIT = """
INSERT OR REPLACE INTO commits (member, topic, base, done)
SELECT ?1, value ->> 0, value ->> 1, value ->> 2 FROM json_each(?2)
"""
SEED = COMMIT.replace("REPLACE", "IGNORE")
OLDEST_SQLITE = (3, 38, 0)  # The first with `->>`.

log = structlog.get_logger(__name__)
T = TypeVar("T")


class EmbeddedLog:
    """A durable log in one SQLite file. It belongs to the loop that opened it; close its consumers before it.

    A topic must have been created before its first append. Retention is what `sweep` does, by itself in the owner.
    """

    max_record_bytes = MAX_RECORD_BYTES

    def __init__(self, file: "_File", *, append_timeout: float, sweep_interval: float | None) -> None:
        self._file = file
        self._append_timeout = append_timeout
        self._loop = asyncio.get_running_loop()
        self._writer = _Writer(file, self._loop, self._appended)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="log-reader")
        self._group = _Group()
        self._waiting_bytes = 0
        self._consumers: list[EmbeddedConsumer] = []
        self._polling: asyncio.TimerHandle | None = None
        self._sweep_interval = sweep_interval
        self._sweeping: asyncio.TimerHandle | None = None
        self._is_closed = False
        if file.is_owner:
            self._sweep_later()

    @classmethod
    async def open(
        cls,
        path: Path,
        *,
        owner: bool,
        append_timeout: float = 5.0,
        sweep_interval: float | None = 3600.0,
        clock: Callable[[], float] = time.time,
    ) -> Self:
        """Open the file. There is one owner: it makes the file where it is missing, and alone may join groups.

        With a `sweep_interval` of None it deletes nothing by itself.
        Raises UsageError where the file is missing, or isn't a log of this version; LogUnavailableError where it has an
        owner already, or the disk has no room: what may pass.
        """
        file = await asyncio.to_thread(_File, path, is_owner=owner, busy_timeout=append_timeout * 0.8, clock=clock)
        return cls(file, append_timeout=append_timeout, sweep_interval=sweep_interval)

    async def append(self, topic: str, *, key: bytes, value: bytes, headers: RecordHeaders) -> Position:
        """Store a record in the next commit, together with all that wait."""
        encoded = _encode_headers(headers)
        size = len(key) + len(value) + len(encoded)
        if size > MAX_RECORD_BYTES:
            # Looked at again without the quotes and commas, which aren't the caller's.
            exact = len(key) + len(value) + sum([len(name.encode()) + len(text) for name, text in headers])
            if exact > MAX_RECORD_BYTES:
                raise RecordTooLargeError(f"{topic}: expected a record of {MAX_RECORD_BYTES} bytes, got {exact}")
        self._check_open()
        if self._waiting_bytes + size > MAX_WAITING_BYTES:
            raise LogUnavailableError(f"{self._file.path}: expected room for {size} bytes, got a full queue")
        group = self._group
        if not group.appends:
            self._loop.call_soon(self._hand_over)
        future: asyncio.Future[Position] = self._loop.create_future()
        group.appends.append(_Append(topic, key, value, tuple(headers), encoded, size, future))
        group.size += size
        self._waiting_bytes += size
        return await future

    async def consume(self, *, group: str | None, topics: Sequence[str], listener: Listener) -> "EmbeddedConsumer":
        """Join a group as its only member. Raises UsageError where it has one, or where this isn't the file's owner."""
        self._check_open()
        if group is not None and not self._file.is_owner:
            raise UsageError(f"{self._file.path}: expected its owner to join {group}, got another process")
        if group is not None and any(consumer.group == group for consumer in self._consumers):
            raise UsageError(f"{self._file.path}: expected one member of {group}, got a second one")
        consumer = EmbeddedConsumer(self, group, topics, listener)
        # Registered before its start is read, so that nothing that is appended meanwhile escapes it.
        self._register([*self._consumers, consumer])
        try:
            consumer.start(await self.read(_assignments, group, topics))
        except BaseException:
            self.leave(consumer)
            raise
        if self._polling is None:
            self._polling = self._loop.call_later(POLL_INTERVAL, self._poll)
        return consumer

    async def scan(self, partition: Partition, start: int, end: int) -> AsyncIterator[Sequence[Record]]:
        while start < end and partition.number == 0:
            chunk = await self.read(_select, partition.topic, start, end, self.now())
            if not chunk.records:
                return
            yield chunk.records
            start = chunk.end

    async def bounds(self, topic: str) -> Mapping[int, tuple[int, int]]:
        row = await self.read(_row, "SELECT start, next FROM topics WHERE name = ?", topic)
        return {0: (row[0], row[1])} if row else {}

    async def offsets_at(self, topic: str, at: float) -> Mapping[int, int]:
        return await self.read(_offset_at, topic, at, self.now())

    async def topics(self) -> Collection[str]:
        return await self.read(_rows, "SELECT json_group_array(name) FROM topics")

    async def topics_of(self, group: str) -> Collection[str]:
        return await self.read(_rows, "SELECT json_group_array(topic) FROM commits WHERE member = ?", group)

    async def committed(self, group: str, topic: str) -> Mapping[int, Commit]:
        row = await self.read(_row, "SELECT base, done FROM commits WHERE member = ? AND topic = ?", group, topic)
        return {0: Commit(row[0], bytes.fromhex(row[1]))} if row else {}

    async def seed(self, group: str, commits: Mapping[Partition, Commit]) -> None:
        rows = [(partition.topic, base, done.hex()) for partition, (base, done) in commits.items()]
        await self.write(_commit, group, rows, SEED)

    async def groups(self, prefix: str) -> Mapping[str, int]:
        statement = "SELECT json_group_array(DISTINCT member) FROM commits WHERE substr(member, 1, length(?1)) = ?1"
        names = await self.read(_rows, statement, prefix)
        members = [consumer.group for consumer in self._consumers]
        return {name: members.count(name) for name in names}

    async def forget(self, group: str) -> None:
        if any(consumer.group == group for consumer in self._consumers):
            raise LogUnavailableError(f"{group}: expected no members, got one")
        await self.write(_forget, group)

    async def create(self, specs: Sequence[TopicSpec]) -> Sequence[str]:
        return await self.write(_create, specs)

    async def check(self, specs: Sequence[TopicSpec]) -> Sequence[TopicProblem]:
        """Compare the topics, and whether the file is such that an acknowledged append is on the disk."""
        return await self.write(_check, specs)

    def now(self) -> float:
        return self._file.now()

    async def ping(self) -> None:
        """Return when the writer has had its turn and could lock the file."""
        await self.write(_lock)

    async def sweep(self) -> None:
        """Delete what is older than its topic's retention; give much free space back to the file system."""
        await self._start_sweep()

    async def close(self) -> None:
        if self._is_closed:
            return
        self._hand_over()
        self._is_closed = True
        for timer in (self._polling, self._sweeping):
            if timer is not None:
                timer.cancel()
        await asyncio.to_thread(self._stop)

    # For consumers.

    def leave(self, consumer: "EmbeddedConsumer") -> None:
        """Forget a consumer."""
        self._register([other for other in self._consumers if other is not consumer])

    async def read(self, work: Callable[..., T], *args: object) -> T:
        """Do `work(connection, *args)` in the reader thread."""
        self._check_open()
        return await self._loop.run_in_executor(self._reader, self._reading, work, *args)

    def read_soon(self, ranges: "Sequence[_Range]", deliver: "Callable[[Sequence[_Chunk] | None], None]") -> None:
        """Read ranges in the reader thread, then call `deliver` on the loop, with None where that failed."""
        if not self._is_closed:
            self._reader.submit(self._read_ranges, ranges, deliver)

    async def write(self, work: Callable[..., T], *args: object) -> T:
        """Do `work(connection, *args)` in the writer thread."""
        self._check_open()
        future: asyncio.Future[T] = self._loop.create_future()
        self._writer.put(_Work(partial(work, self._file.writer, *args), future))
        try:
            async with asyncio.timeout(self._append_timeout):
                return await future
        except TimeoutError:
            raise LogUnavailableError(
                f"{self._file.path}: expected an answer within {self._append_timeout} s, got none"
            ) from None

    def _check_open(self) -> None:
        if self._is_closed:
            raise LogUnavailableError(f"{self._file.path}: expected an open log, got a closed one")

    def _hand_over(self) -> None:
        group = self._group
        if group.appends:
            self._group = _Group()
            group.timer = self._loop.call_later(self._append_timeout, self._expire, group)
            self._writer.put(group)

    def _expire(self, group: "_Group") -> None:
        group.is_expired = True
        for append in group.appends:
            if not append.future.done():
                append.future.set_exception(
                    LogUnavailableError(
                        f"{self._file.path}: expected the append to end within {self._append_timeout} s, got no answer"
                    )
                )

    def _appended(self, groups: "Sequence[_Group]", results: "Sequence[_Stored]", tails: "Sequence[_Chunk]") -> None:
        for group in groups:
            self._waiting_bytes -= group.size
            if group.timer is not None:
                group.timer.cancel()
        for future, result in results:
            if future.done():  # Cancelled or expired: nobody waits for it.
                continue
            if isinstance(result, str):
                future.set_exception(LogUnavailableError(f"{self._file.path}: {result}"))
            else:
                future.set_result(result)
        for chunk in tails:
            for consumer in self._consumers:
                consumer.offer(chunk)

    def _register(self, consumers: "list[EmbeddedConsumer]") -> None:
        self._consumers = consumers
        self._writer.consumed = frozenset(topic for consumer in consumers for topic in consumer.topics)

    def _reading(self, work: Callable[..., T], *args: object) -> T:
        with _errors_of(self._file.path):
            return work(self._file.reader, *args)

    def _read_ranges(self, ranges: "Sequence[_Range]", deliver: "Callable[[Sequence[_Chunk] | None], None]") -> None:
        try:
            now = self._file.now()
            chunks = [_select(self._file.reader, asked.topic, asked.start, asked.end, now) for asked in ranges]
        except (sqlite3.Error, ValueError) as error:  # ValueError: the file is damaged.
            log.warning("log_read_failed", path=str(self._file.path), error=str(error))
            _post(self._loop, deliver, None)
        else:
            _post(self._loop, deliver, chunks)

    def _poll(self) -> None:
        self._reader.submit(self._look)

    def _look(self) -> None:
        ends: dict[str, int] = {}
        with suppress(sqlite3.Error):  # A read or an append will say it better.
            ends = dict(_rows(self._file.reader, "SELECT json_group_array(json_array(name, next)) FROM topics"))
        _post(self._loop, self._looked, ends)

    def _looked(self, ends: Mapping[str, int]) -> None:
        for consumer in self._consumers:
            consumer.extend(ends)
        again = self._consumers and not self._is_closed
        self._polling = self._loop.call_later(POLL_INTERVAL, self._poll) if again else None

    def _start_sweep(self) -> asyncio.Future[None]:
        self._check_open()
        steps = _sweep(self._file.writer, self._file.now)
        future: asyncio.Future[None] = self._loop.create_future()
        self._writer.put(_Work(partial(next, steps, None), future))
        return future

    def _sweep_later(self) -> None:
        if self._sweep_interval is not None:
            self._sweeping = self._loop.call_later(self._sweep_interval, self._sweep_by_itself)

    def _sweep_by_itself(self) -> None:
        self._start_sweep().add_done_callback(self._swept)

    def _swept(self, future: asyncio.Future[None]) -> None:
        if not future.cancelled() and (error := future.exception()) is not None:
            log.warning("sweep_failed", path=str(self._file.path), error=str(error))
        if not self._is_closed:
            self._sweep_later()

    def _stop(self) -> None:
        has_ended = self._writer.stop(self._append_timeout)
        self._reader.shutdown()
        if has_ended:  # Else the disk hangs, and the file stays ours while the process lives.
            self._file.close()


def back_up(path: Path, copy: Path) -> int:
    """Write a copy of a log as it is at this moment, beside its owner, and return its bytes; blocks until it is synced.

    What was acknowledged before the call is in it. `copy` is replaced once it is whole, however many make one at once.
    Appends go on meanwhile; the WAL grows by them until the copy is made. Raises UsageError where there is no log, no
    room for the copy, or where it would take the place of the log's own files or of a log in use.
    """
    file = _File(path, is_owner=False, busy_timeout=BACKUP_PATIENCE, clock=time.time)
    unfinished: Path | None = None
    try:
        if own := _own_file(path, copy):
            raise UsageError(f"{copy}: expected a file of its own for the copy, got the log's {own}; name another one")
        if _is_owned(copy):
            raise UsageError(f"{copy}: expected a file of its own for the copy, got a log in use; name another one")
        _delete_left_over(copy)
        # A database that is opened anew would be made for everybody to read.
        descriptor, name = tempfile.mkstemp(prefix=f"{copy.name}.", suffix=UNFINISHED, dir=copy.parent)
        os.close(descriptor)
        unfinished = Path(name)
        file.reader.execute("VACUUM INTO ?", (name,))  # Of one snapshot, and without a WAL beside it.
        _sync(unfinished)  # SQLite leaves that to whoever wants it.
        size = unfinished.stat().st_size
        unfinished.replace(copy)
        _sync(copy.parent)
    except (sqlite3.Error, OSError) as error:
        reason = error.strerror.lower() if isinstance(error, OSError) and error.strerror else error
        raise UsageError(f"{copy}: expected room for a copy of {path}, got: {reason}") from error
    else:
        return size
    finally:
        if unfinished is not None:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)
        file.close()


def _own_file(path: Path, copy: Path) -> Path | None:
    """Return which of a log's files a path is, whatever it is called there."""
    for base in (path, path.resolve()):  # SQLite has its files beside the one that a link is for.
        for suffix in ("", "-wal", "-shm", ".lock"):
            own = base.with_name(base.name + suffix)
            if own.resolve() == copy.resolve() or (own.exists() and copy.exists() and own.samefile(copy)):
                return own
    return None


def _is_owned(path: Path) -> bool:
    try:
        lock = os.open(f"{path}.lock", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(lock)
    return False


def _delete_left_over(copy: Path) -> None:
    """Delete what copies of this name have left behind that were killed. Whoever is still at one only fails."""
    for each in copy.parent.iterdir():
        if each.name.startswith(f"{copy.name}.") and each.name.endswith(UNFINISHED):
            with suppress(FileNotFoundError):  # It was finished meanwhile.
                if time.time() - each.stat().st_mtime > LEFT_OVER:
                    each.unlink()


class EmbeddedConsumer:
    """The member of a group, or a reader. Its partitions are assigned once, before `consume` returns."""

    def __init__(self, log: EmbeddedLog, group: str | None, topics: Sequence[str], listener: Listener) -> None:
        self.group = group
        self.topics = tuple(topics)
        self._log = log
        self._listener = listener
        self._streams = {Partition(topic, 0): _Stream() for topic in topics}
        self._woken = asyncio.Event()
        self._is_reading = False
        self._is_closed = False

    def start(self, assignments: Sequence[tuple[Assignment, int]]) -> None:
        """Begin to read where each assignment says, as far as the topic's next offset."""
        for (partition, commit, log_start), end in assignments:
            stream = self._streams[partition]
            stream.position = stream.returned = max(commit.base, log_start)
            stream.end = max(stream.end, end)
        self._listener.assigned([assignment for assignment, _ in assignments])

    async def fetch(self, *, timeout: float) -> Sequence[Batch]:
        deadline = asyncio.get_running_loop().time() + timeout
        while True:
            self._fill()
            batches = [
                Batch(partition, records)
                for partition, stream in self._streams.items()
                if not stream.is_paused and (records := stream.take())
            ]
            if batches:
                self._fill()  # So that the next ones are read while these are handled.
                return batches
            self._woken.clear()
            try:
                async with asyncio.timeout_at(deadline):
                    await self._woken.wait()
            except TimeoutError:
                return ()

    def pause(self, partition: Partition) -> None:
        if partition in self._streams:
            self._streams[partition].is_paused = True

    def resume(self, partition: Partition) -> None:
        if partition in self._streams:
            self._streams[partition].is_paused = False
            self._woken.set()

    async def commit(self, commits: Mapping[Partition, Commit]) -> None:
        rows = [
            (partition.topic, base, done.hex())
            for partition, (base, done) in commits.items()
            if partition in self._streams
        ]
        if rows and self.group is not None:
            await self._log.write(_commit, self.group, rows)

    def lag(self) -> Mapping[Partition, int]:
        return {partition: stream.end - stream.returned for partition, stream in self._streams.items()}

    async def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        commits = await self._listener.revoked(tuple(self._streams))
        try:
            await self.commit(commits)
        except LogUnavailableError as error:
            log.warning("log_commit_lost", group=self.group, error=str(error))  # what was finished since is repeated
        finally:
            self._streams.clear()
            self._log.leave(self)

    # For the log.

    def offer(self, chunk: "_Chunk") -> None:
        """Take records that were just stored, if they are the next and there is room; else remember to read them."""
        stream = self._streams.get(Partition(chunk.topic, 0))
        if stream is None:
            return
        stream.end = max(stream.end, chunk.end)
        is_next = chunk.records[0].offset == stream.position
        if is_next and not stream.is_paused and stream.size + chunk.size <= BUFFER_BYTES:
            stream.put(chunk)
        self._woken.set()

    def extend(self, ends: Mapping[str, int]) -> None:
        """Hear how far the topics go, whoever appended."""
        for partition, stream in self._streams.items():
            end = ends.get(partition.topic, 0)
            if end > stream.end:
                stream.end = end
                self._woken.set()

    def _fill(self) -> None:
        if self._is_reading:
            return
        ranges = [
            _Range(partition.topic, stream.position, stream.end)
            for partition, stream in self._streams.items()
            if not stream.chunks and not stream.is_paused and stream.position < stream.end
        ]
        if ranges:
            self._is_reading = True
            self._log.read_soon(ranges, self._deliver)

    def _deliver(self, chunks: "Sequence[_Chunk] | None") -> None:
        if chunks is None:
            asyncio.get_running_loop().call_later(RETRY_INTERVAL, self._deliver, ())
            return
        self._is_reading = False
        for chunk in chunks:
            stream = self._streams.get(Partition(chunk.topic, 0))
            # Where the position has moved meanwhile, the same records have been offered.
            if stream is not None and stream.position == chunk.start:
                stream.put(chunk)
        self._woken.set()


class _Range(NamedTuple):
    topic: str
    start: int
    end: int


@dataclass(slots=True)
class _Chunk:
    """A run of a topic's records; its offsets are `start <= offset < end`, with gaps."""

    topic: str
    start: int
    end: int
    size: int = 0
    records: list[Record] = field(default_factory=list)

    def has_room(self, size: int) -> bool:
        """Tell whether a fetch may return another `size` bytes with these records."""
        return not self.records or (len(self.records) < FETCH_RECORDS and self.size + size <= FETCH_BYTES)


@dataclass(slots=True)
class _Stream:
    """How far a consumer is in a topic: returned ≤ position (returned or in `chunks`) ≤ end."""

    returned: int = 0
    position: int = -1  # Not started: nothing is next.
    end: int = 0
    size: int = 0
    chunks: deque[_Chunk] = field(default_factory=deque)
    is_paused: bool = False

    def put(self, chunk: _Chunk) -> None:
        self.position = chunk.end
        if chunk.records:
            self.chunks.append(chunk)
            self.size += chunk.size

    def take(self) -> list[Record]:
        """Return as many records as one fetch may, and forget them."""
        taken = _Chunk("", 0, 0)
        while self.chunks:
            chunk = self.chunks[0]
            if taken.records and (
                len(taken.records) + len(chunk.records) > FETCH_RECORDS or taken.size + chunk.size > FETCH_BYTES
            ):
                break
            self.chunks.popleft()
            taken.records += chunk.records
            taken.size += chunk.size
            self.returned = chunk.end
        self.size -= taken.size
        return taken.records


class _Append(NamedTuple):
    topic: str
    key: bytes
    value: bytes
    headers: tuple[tuple[str, bytes], ...]
    encoded: bytes
    size: int
    future: asyncio.Future[Position]


@dataclass(slots=True)
class _Group:
    """What one turn of the loop appends. What has expired before the writer took it isn't stored any more."""

    appends: list[_Append] = field(default_factory=list)
    size: int = 0
    timer: asyncio.TimerHandle | None = None
    is_expired: bool = False


class _Stored(NamedTuple):
    """Where an append was stored, or why it wasn't."""

    future: asyncio.Future[Position]
    result: Position | str


class _Again:
    """What work returns that wants another turn, after those that wait."""


@dataclass(frozen=True, slots=True)
class _Work:
    run: Callable[[], Any]
    future: asyncio.Future[Any]


class _Writer:
    """The thread that alone writes. It outlives every error: when the disk has room again, it stores again."""

    def __init__(
        self,
        file: "_File",
        loop: asyncio.AbstractEventLoop,
        appended: Callable[[Sequence[_Group], Sequence[_Stored], Sequence[_Chunk]], None],
    ) -> None:
        self.consumed: frozenset[str] = frozenset()
        self._file = file
        self._loop = loop
        self._appended = appended
        self._queue: SimpleQueue[_Group | _Work] = SimpleQueue()
        self._topics: dict[str, tuple[int, int]] = {}  # name → (id, next offset), as last seen
        self._is_stopping = False
        self._thread = Thread(target=self._run, name="log-writer", daemon=True)
        self._thread.start()

    def put(self, item: _Group | _Work) -> None:
        self._queue.put(item)

    def stop(self, timeout: float) -> bool:
        """Finish what was put in before and end the thread; tell whether that took less than `timeout` seconds."""
        self._is_stopping = True
        self._queue.put(_Group())  # Wakes it.
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not (self._is_stopping and self._queue.empty()):
            groups, work = self._take()
            if groups:
                self._store(groups)
            if work is not None:
                self._do(work)

    def _take(self) -> tuple[list[_Group], _Work | None]:
        groups: list[_Group] = []
        size = 0
        item = self._queue.get()
        while isinstance(item, _Group):
            groups.append(item)
            size += item.size
            if size >= COMMIT_BYTES:
                return groups, None
            try:
                item = self._queue.get_nowait()
            except Empty:
                return groups, None
        return groups, item

    def _do(self, work: _Work) -> None:
        try:
            with _errors_of(self._file.path):
                result = work.run()
        except Exception as error:  # noqa: BLE001 - it is raised where the result is awaited
            _post(self._loop, _resolve, work.future, None, error)
        else:
            if isinstance(result, _Again) and not self._is_stopping:
                self._queue.put(work)
            else:
                _post(self._loop, _resolve, work.future, result, None)

    def _store(self, groups: Sequence[_Group]) -> None:
        appends = [append for group in groups if not group.is_expired for append in group.appends]
        tails: list[_Chunk] = []
        try:
            results = self._insert(appends)
            stored = [_Stored(append.future, result) for append, result in zip(appends, results, strict=True)]
            tails = self._tails(appends, results)
        except Exception as error:
            if not isinstance(error, sqlite3.Error):
                log.exception("append_failed", path=str(self._file.path))
            stored = [_Stored(append.future, str(error)) for append in appends]
        _post(self._loop, self._appended, groups, stored, tails)

    def _insert(self, appends: Sequence[_Append]) -> list[Position | str]:
        for _ in range(INSERT_TRIES):
            if any(append.topic not in self._topics for append in appends):
                found = _rows(self._file.writer, "SELECT json_group_array(json_array(name, id, next)) FROM topics")
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
                    self._file.writer.execute(INSERT, (orjson.dumps(rows).decode(), b"".join(parts), at))
            except sqlite3.IntegrityError:  # Another process was first: its offsets aren't ours any more.
                self._topics = {}
                continue
            self._topics = topics
            return results
        raise sqlite3.OperationalError(f"expected the next offsets, lost them {INSERT_TRIES} times to another process")

    def _tails(self, appends: Sequence[_Append], results: Sequence[Position | str]) -> list[_Chunk]:
        """Return what was stored in topics that are consumed here."""
        full: list[_Chunk] = []
        open_: dict[str, _Chunk] = {}
        for (topic, key, value, headers, _, size, _), position in zip(appends, results, strict=True):
            if topic not in self.consumed or isinstance(position, str):
                continue
            chunk = open_.get(topic)
            if chunk is None or not chunk.has_room(size):
                if chunk is not None:
                    full.append(chunk)
                chunk = open_[topic] = _Chunk(topic, position.offset, position.offset)
            chunk.records.append(Record(position.offset, position.appended_at, key, value, headers))
            chunk.end = position.offset + 1
            chunk.size += size
        return [*full, *open_.values()]


class _File:
    """The two connections, the owner's lock beside the file, and the log's clock."""

    def __init__(self, path: Path, *, is_owner: bool, busy_timeout: float, clock: Callable[[], float]) -> None:
        self.path = path
        self.is_owner = is_owner
        self._busy_timeout = busy_timeout
        self._clock = clock
        self._ahead = -time.monotonic()
        self._lock: int | None = None
        if sqlite3.sqlite_version_info < OLDEST_SQLITE:
            raise UsageError(f"sqlite: expected at least 3.38, got {sqlite3.sqlite_version}")
        try:
            if is_owner:
                self._lock = _lock_file(path)
                # Bodies are nobody else's to read; SQLite gives the files beside it the same mode.
                os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            else:
                path.stat()  # SQLite would make a file.
            self.writer = self._connect()
            try:
                _prepare(self.writer, path, may_create=is_owner)
                self.reader = self._connect()
            except BaseException:
                self.writer.close()
                raise
        except (sqlite3.Error, OSError) as error:
            self._unlock()
            reason = error.strerror.lower() if isinstance(error, OSError) and error.strerror else error
            kind = LogUnavailableError if _may_pass(error) else UsageError
            raise kind(f"{path}: expected an embedded log, got: {reason}") from error
        except BaseException:
            self._unlock()
            raise

    def now(self) -> float:
        """Return the time, which goes on with the monotonic clock wherever the handed-in one goes back."""
        # The monotonic clock is read second: a thread that is stopped in between is behind, and never ahead for ever.
        at = self._clock()
        ticks = time.monotonic()
        self._ahead = max(self._ahead, at - ticks)
        return self._ahead + ticks

    def close(self) -> None:
        self.reader.close()
        self.writer.close()
        self._unlock()

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
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock_file(path: Path) -> int:
    lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = os.read(lock, 32).decode(errors="replace").strip()
        os.close(lock)
        raise LogUnavailableError(
            f"{path} is in use by another gateway (pid {pid}); the embedded log is one process's"
        ) from None
    os.truncate(lock, 0)
    os.write(lock, b"%d\n" % os.getpid())
    return lock


def _may_pass(error: sqlite3.Error | OSError) -> bool:
    """Tell whether a file that couldn't be opened may be opened later, as it is."""
    if isinstance(error, OSError):
        return error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EIO}
    code = getattr(error, "sqlite_errorcode", None)  # of SQLite's own errors; the low byte is what they have in common
    return code is not None and code & 0xFF in {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_BUSY}


def _prepare(connection: sqlite3.Connection, path: Path, *, may_create: bool) -> None:
    """Make the tables in a new file, and refuse one that isn't ours."""
    application = connection.execute("PRAGMA application_id").fetchone()[0]
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if application != APPLICATION_ID:
        if not may_create or connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
            raise UsageError(f"{path}: expected an embedded log, got another program's database")
        connection.execute(f"PRAGMA page_size = {PAGE_BYTES}")
        connection.execute("PRAGMA auto_vacuum = INCREMENTAL")
    elif version != SCHEMA_VERSION:
        raise UsageError(f"{path}: expected an embedded log of version {SCHEMA_VERSION}, got {version}")
    connection.execute("PRAGMA journal_mode = WAL")
    if application != APPLICATION_ID:
        # One transaction: a file that was left half made is made anew.
        marks = f"PRAGMA application_id = {APPLICATION_ID}; PRAGMA user_version = {SCHEMA_VERSION};"
        connection.executescript(f"BEGIN IMMEDIATE; {SCHEMA} {marks} COMMIT;")


@contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise LogUnavailableError(f"{path}: {error}") from error


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _post(loop: asyncio.AbstractEventLoop, callback: Callable[..., None], *args: object) -> None:
    with suppress(RuntimeError):  # The loop is closed: nobody waits.
        loop.call_soon_threadsafe(callback, *args)


def _resolve(future: asyncio.Future[Any], result: object, error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


# Headers are JSON, so that the file can be looked at; bytes are written as the characters of the same numbers.


def _encode_headers(headers: RecordHeaders) -> bytes:
    return orjson.dumps([(name, text.decode("latin-1")) for name, text in headers])


def _decode_headers(encoded: bytes) -> tuple[tuple[str, bytes], ...]:
    return tuple([(name, text.encode("latin-1")) for name, text in orjson.loads(encoded)])


def _row(connection: sqlite3.Connection, statement: str, *parameters: object) -> tuple[Any, ...] | None:
    rows: list[tuple[Any, ...]] = connection.execute(statement, parameters).fetchall()
    return rows[0] if rows else None


def _rows(connection: sqlite3.Connection, statement: str, *parameters: object) -> list[Any]:
    """Return the rows that a statement gives as one JSON array."""
    rows: list[Any] = orjson.loads(connection.execute(statement, parameters).fetchall()[0][0])
    return rows


def _select(connection: sqlite3.Connection, topic: str, start: int, end: int, now: float) -> _Chunk:
    """Read the first records of a range, as many as one fetch may return."""
    end = min(end, LAST_OFFSET)
    lengths, content = connection.execute(SELECT, (topic, start, end)).fetchall()[0]
    chunk = _Chunk(topic, start, end)
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
                _decode_headers(content[key_end:headers_end]),
            )
        )
        begin = value_end
    if chunk.records:
        chunk.end = chunk.records[-1].offset + 1
        chunk.size = begin
    return chunk


def _offset_at(connection: sqlite3.Connection, topic: str, at: float, now: float) -> dict[int, int]:
    """Find the first record of a topic that was appended at or after a time: some twenty looks, however many it has."""
    found = _row(connection, "SELECT id << 48, start, next FROM topics WHERE name = ?", topic)
    if found is None:
        return {}
    records, start, end = found

    def following(offset: int) -> tuple[int, float]:
        """Return the record at an offset or after it, and when it was appended."""
        row = _row(
            connection,
            "SELECT id, at FROM records WHERE id >= ? AND id < ? ORDER BY id LIMIT 1",
            records | offset,
            records | end,
        )
        return (end, math.inf) if row is None else (row[0] & LAST_OFFSET, min(row[1] / 1e6, now))

    first = start + bisect_left(range(start, end), at, key=lambda offset: following(offset)[1])
    return {0: following(first)[0]}


def _assignments(
    connection: sqlite3.Connection, group: str | None, topics: Sequence[str]
) -> list[tuple[Assignment, int]]:
    """Return where a group goes on in each topic, and the topic's next offset."""
    assignments = []
    for topic in topics:
        start, end = _row(connection, "SELECT start, next FROM topics WHERE name = ?", topic) or (0, 0)
        row = _row(connection, "SELECT base, done FROM commits WHERE member = ? AND topic = ?", group, topic)
        commit = Commit(row[0], bytes.fromhex(row[1])) if row else Commit(start)
        assignments.append((Assignment(Partition(topic, 0), commit, start), end))
    return assignments


def _commit(
    connection: sqlite3.Connection, group: str, rows: Sequence[tuple[str, int, str]], statement: str = COMMIT
) -> None:
    connection.execute(statement, (group, orjson.dumps(rows).decode()))


def _forget(connection: sqlite3.Connection, group: str) -> None:
    connection.execute("DELETE FROM commits WHERE member = ?", (group,))


def _create(connection: sqlite3.Connection, specs: Sequence[TopicSpec]) -> list[str]:
    statement = "INSERT OR IGNORE INTO topics (name, retention, compacted) VALUES (?, ?, ?)"
    with _transaction(connection):
        return [
            spec.name
            for spec in specs
            if connection.execute(statement, (spec.name, spec.retention, spec.compacted)).rowcount
        ]


def _check(connection: sqlite3.Connection, specs: Sequence[TopicSpec]) -> list[TopicProblem]:
    problems: list[tuple[str, str]] = []
    for setting, expected in (("journal_mode", "wal"), ("synchronous", 2)):
        got = connection.execute(f"PRAGMA {setting}").fetchone()[0]
        if got != expected:
            problems.extend((spec.name, f"expected {setting} {expected}, got {got}") for spec in specs)
    for spec in specs:
        row = _row(connection, "SELECT retention, compacted FROM topics WHERE name = ?", spec.name)
        if row is None:
            problems.append((spec.name, "expected a topic, got none"))
            continue
        retention, is_compacted = row
        if retention is not None and (spec.retention is None or retention < spec.retention):
            wanted = "no end" if spec.retention is None else f"{spec.retention} s"
            problems.append((spec.name, f"expected a retention of at least {wanted}, got {retention} s"))
        if is_compacted != spec.compacted:
            problems.append((spec.name, f"expected compacted to be {spec.compacted}, got {bool(is_compacted)}"))
    return [TopicProblem(topic=topic, message=message, is_fatal=True) for topic, message in problems]


def _lock(connection: sqlite3.Connection) -> None:
    with _transaction(connection):
        pass


def _sweep(connection: sqlite3.Connection, now: Callable[[], float]) -> Iterator[_Again]:
    """Delete old records, some at a time; each step is followed by a turn of those who wait."""
    topics = _rows(
        connection, "SELECT json_group_array(json_array(id, retention)) FROM topics WHERE retention IS NOT NULL"
    )
    for topic, retention in topics:
        while _delete_some(connection, topic, int((now() - retention) * 1e6)):
            yield _Again()
    # Free pages are used again; only when they are many is it worth the moving of others.
    while True:
        free = connection.execute("PRAGMA freelist_count").fetchone()[0]
        if free * 4 <= connection.execute("PRAGMA page_count").fetchone()[0]:
            return
        connection.execute(f"PRAGMA incremental_vacuum({SWEEP_PAGES})").fetchall()
        yield _Again()


def _delete_some(connection: sqlite3.Connection, topic: int, before: int) -> bool:
    """Delete of the first records those appended before a time (microseconds), and tell whether there were any."""
    first, last = topic << 48, topic << 48 | LAST_OFFSET
    found = _row(
        connection,
        "SELECT max(id) FROM (SELECT id, at FROM records WHERE id BETWEEN ? AND ? ORDER BY id LIMIT ?) WHERE at < ?",
        first,
        last,
        SWEEP_RECORDS,
        before,
    )
    if found is None or found[0] is None:
        return False
    with _transaction(connection):
        connection.execute("DELETE FROM records WHERE id BETWEEN ? AND ? AND at < ?", (first, found[0], before))
        connection.execute(
            "UPDATE topics SET start = coalesce((SELECT min(id) & ? FROM records WHERE id BETWEEN ? AND ?), next)"
            " WHERE id = ?",
            (LAST_OFFSET, first, last, topic),
        )
    return True
