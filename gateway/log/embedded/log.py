"""Implements the log's contract (`gateway.log.base`) with a writer thread, a reader thread and consumers."""

import asyncio
import math
import sqlite3
import time
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Self, TypeVar

import structlog

from gateway.log.base import (
    FETCH_BYTES,
    Commit,
    Listener,
    NewRecord,
    Partition,
    Position,
    Record,
    RecordHeaders,
    TopicProblem,
    TopicSpec,
)
from gateway.log.embedded import statements
from gateway.log.embedded.consumer import EmbeddedConsumer, Range
from gateway.log.embedded.file import RESTORE, File, elapsed, error_text
from gateway.log.embedded.sweep import sweep, swept_at
from gateway.log.embedded.writer import Append, AppendBatch, OffsetCommits, Stored, Work, Writer, post
from gateway.model import LogLostError, LogUnavailableError, RecordTooLargeError, UsageError

MAX_RECORD_BYTES = 1_047_564  # A Kafka broker's default limit (1,048,588), less 1 KiB for its framing.
MAX_WAITING_BYTES = 64 << 20  # Maximum bytes of appends that aren't stored yet; more are refused.
SWEEP_INTERVAL = 300.0  # Seconds; also between one process's last sweep and the next one's first.
MIN_SWEEP_DELAY = 5.0  # Seconds after the start before the first sweep, so that pending work comes first.
POLL_INTERVAL = 0.2  # Seconds between checks for appends of other processes.

logger = structlog.get_logger(__name__)
T = TypeVar("T")


class EmbeddedLog:
    """A durable log in one SQLite file. It belongs to the event loop that opened it; close its consumers first.

    A topic must be created before its first append. `sweep` enforces retention; the owner runs it regularly.
    """

    max_record_bytes = MAX_RECORD_BYTES

    def __init__(self, file: File, *, append_timeout: float, sweep_interval: float | None) -> None:
        self._file = file
        self._append_timeout = append_timeout
        self._loop = asyncio.get_running_loop()
        self._writer = Writer(file, self._loop, self._appended)
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="log-reader")
        self._group = AppendBatch()
        self._waiting_bytes = 0
        self._consumers: list[EmbeddedConsumer] = []
        self._polling: asyncio.TimerHandle | None = None
        self._sweep_interval = sweep_interval
        self._sweeping: asyncio.TimerHandle | None = None
        self._told_step = file.clock_stepped_by
        self._until_done: set[str] = set()
        self._is_closed = False

    @classmethod
    async def open(
        cls,
        path: Path,
        *,
        owner: bool,
        append_timeout: float = 5.0,
        sweep_interval: float | None = SWEEP_INTERVAL,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = elapsed,
        advice: str = RESTORE,
    ) -> Self:
        """Open the file. There is one owner: it creates a missing file, and only it may join groups.

        With a `sweep_interval` of None nothing is deleted unless `sweep` is called. `advice` is what an operator may do
        once the file is damaged. `monotonic` is a clock that nobody sets.
        Raises UsageError if the file is missing, or isn't a log of this version; LogUnavailableError for temporary
        problems: it has an owner already, or the disk is full.
        """
        file = await asyncio.to_thread(
            File,
            path,
            is_owner=owner,
            busy_timeout=append_timeout * 0.8,
            clock=clock,
            monotonic=monotonic,
            advice=advice,
        )
        log = cls(file, append_timeout=append_timeout, sweep_interval=sweep_interval)
        if owner and sweep_interval is not None:
            due = await log.read(swept_at) + sweep_interval - log.now()
            log._sweep_later(min(sweep_interval, max(MIN_SWEEP_DELAY, due)))
        return log

    async def append(
        self, topic: str, *, key: bytes, value: bytes, headers: RecordHeaders, partition: int | None = None
    ) -> Position:
        """Store a record in the next transaction, together with all that are queued."""
        if partition:
            raise LogUnavailableError(f"{topic}: expected its only partition, got {partition}")
        append = self._append_of(topic, key, value, headers)
        self._add([append])
        try:
            return await append.future
        finally:
            del append  # breaks a reference cycle with an error's traceback

    async def append_in_order(self, partition: Partition, records: Sequence[NewRecord]) -> Sequence[Position]:
        """Store records in one transaction, all or none."""
        if partition.number:
            raise LogUnavailableError(f"{partition.topic}: expected its only partition, got {partition.number}")
        appends = [self._append_of(partition.topic, *record) for record in records]
        self._add(appends)  # in one iteration of the event loop, so with one statement
        try:
            if appends:
                await asyncio.wait([appends[-1].future])  # the last to end; to gather all would take 2 µs for each
        except asyncio.CancelledError:
            for append in appends:
                append.future.cancel()
            raise
        errors = [append.future.exception() for append in appends]
        for error in filter(None, errors):
            raise error
        return [append.future.result() for append in appends]

    def _append_of(self, topic: str, key: bytes, value: bytes, headers: RecordHeaders) -> Append:
        encoded = statements.encode_headers(headers)
        size = len(key) + len(value) + len(encoded)
        if size > MAX_RECORD_BYTES:
            # Measured again without the JSON's quotes and commas, which aren't the caller's.
            exact = len(key) + len(value) + sum([len(name.encode()) + len(text) for name, text in headers])
            if exact > MAX_RECORD_BYTES:
                raise RecordTooLargeError(f"{topic}: expected a record of {MAX_RECORD_BYTES} bytes, got {exact}")
        return Append(topic, key, value, tuple(headers), encoded, size, self._loop.create_future())

    def _add(self, appends: Sequence[Append]) -> None:
        self._check_open()
        size = sum([append.size for append in appends])
        if self._waiting_bytes + size > MAX_WAITING_BYTES:
            raise LogUnavailableError(f"{self._file.path}: expected room for {size} bytes, got a full queue")
        group = self._next_group()
        group.appends += appends
        group.size += size
        self._waiting_bytes += size

    async def consume(
        self, *, group: str | None, topics: Sequence[str], listener: Listener, since: float | None = None
    ) -> EmbeddedConsumer:
        """Join a group as its only member. Raises UsageError if it has one, or if this isn't the file's owner."""
        self._check_open()
        if group is not None and not self._file.is_owner:
            raise UsageError(f"{self._file.path}: expected its owner to join {group}, got another process")
        if group is not None and any(consumer.group == group for consumer in self._consumers):
            raise UsageError(f"{self._file.path}: expected one member of {group}, got a second one")
        consumer = EmbeddedConsumer(self, group, topics, listener)
        # Registered before its position is read, so that no record appended meanwhile is missed.
        self._register([*self._consumers, consumer])
        try:
            assignments = await self.read(statements.assignments, group, topics)
            if group is None and since is not None:
                starts = {topic: (await self.offsets_at(topic, since)).get(0, 0) for topic in topics}
                assignments = [
                    (each._replace(commit=Commit(starts[each.partition.topic])), end) for each, end in assignments
                ]
            consumer.start(assignments)
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

    async def partitions(self, topics: Collection[str]) -> Mapping[str, int]:
        return dict.fromkeys(set(topics).intersection(await self.topics()), 1)

    async def bounds(self, topic: str) -> Mapping[int, tuple[int, int]]:
        row = await self.read(statements.first_row, "SELECT start, next FROM topics WHERE name = ?", topic)
        return {0: (row[0], row[1])} if row else {}

    async def readable(self, topic: str) -> tuple[Mapping[int, tuple[int, int]], Mapping[int, str]]:
        return await self.bounds(topic), {}

    async def settled(
        self, topic: str, numbers: Collection[int]
    ) -> tuple[Mapping[int, tuple[int, int]], Mapping[int, str]]:
        found = await self.bounds(topic)
        return {number: bounds for number, bounds in found.items() if number in numbers}, {}

    def topic_id(self, topic: str) -> str:  # noqa: ARG002 - nobody recreates a topic here
        return ""

    async def offsets_at(self, topic: str, at: float, numbers: Collection[int] | None = None) -> Mapping[int, int]:
        if numbers is not None and 0 not in numbers:
            return {}
        return await self.read(statements.offset_at, topic, at, self.now())

    async def topics(self) -> Collection[str]:
        return await self.read(statements.rows, "SELECT json_group_array(name) FROM topics")

    async def topics_of(self, group: str) -> Collection[str]:
        return await self.read(statements.rows, "SELECT json_group_array(topic) FROM commits WHERE member = ?", group)

    async def committed(self, group: str, topic: str) -> Mapping[int, Commit]:
        row = await self.read(
            statements.first_row, "SELECT base, done FROM commits WHERE member = ? AND topic = ?", group, topic
        )
        return {0: statements.decode_commit(*row)} if row else {}

    async def seed(self, group: str, commits: Mapping[Partition, Commit]) -> None:
        rows = [(partition.topic, *statements.encode_commit(commit)) for partition, commit in commits.items()]
        await self.write(statements.commit, group, rows, statements.SEED)

    async def groups(self, prefix: str) -> Mapping[str, int]:
        statement = "SELECT json_group_array(DISTINCT member) FROM commits WHERE substr(member, 1, length(?1)) = ?1"
        names = await self.read(statements.rows, statement, prefix)
        members = [consumer.group for consumer in self._consumers]
        return {name: members.count(name) for name in names}

    async def members(self, group: str) -> int:
        return sum([consumer.group == group for consumer in self._consumers])

    async def create(self, specs: Sequence[TopicSpec]) -> Sequence[str]:
        self._until_done |= {spec.name for spec in specs if spec.until_done}
        return await self.write(statements.create, specs)

    async def check(self, specs: Sequence[TopicSpec]) -> Sequence[TopicProblem]:
        """Compare the topics with their specifications, and check that the file's settings make appends durable."""
        return await self.write(statements.check, specs)

    async def retentions(self, topics: Collection[str]) -> Mapping[str, float]:
        found = dict(
            await self.read(statements.rows, "SELECT json_group_array(json_array(name, retention)) FROM topics")
        )
        return {
            name: math.inf if found[name] is None else found[name] for name in set(topics).intersection(found.keys())
        }

    def now(self) -> float:
        return self._file.now()

    async def synchronize(self, topic: str) -> None:
        """Do nothing: the clock is this machine's."""

    async def ping(self) -> None:
        """Return once the writer could lock the file or, after it refused appends, could write as many bytes."""
        await self.write(self._writer.ping)

    async def check_file(self) -> None:
        """Raise LogLostError if the file was moved, replaced, cut or damaged; LogUnavailableError if nobody knows."""
        try:
            await self.write(lambda _: self._file.check_file())
        except OSError as error:
            raise LogUnavailableError(f"{self._file.path}: {error_text(error)}") from error

    async def refusing(self) -> Mapping[Partition, str]:
        """Return nothing: all topics are in one file, which `ping` checks."""
        return {}

    async def sweep(self) -> None:
        """Delete records older than their topic's retention; return free space to the file system if there is much."""
        await self._start_sweep()

    async def close(self) -> None:
        if self._is_closed:
            return
        self._submit_group()
        self._is_closed = True
        for timer in (self._polling, self._sweeping):
            if timer is not None:
                timer.cancel()
        await asyncio.to_thread(self._stop)
        self._tell_of_clock()

    # For consumers.

    def leave(self, consumer: EmbeddedConsumer) -> None:
        """Remove a consumer."""
        self._register([other for other in self._consumers if other is not consumer])

    async def commit(self, member: str, rows: Sequence[tuple[str, int, str]]) -> None:
        """Store a member's commits together with the next appends, without an extra fsync."""
        self._check_open()
        future: asyncio.Future[None] = self._loop.create_future()
        self._next_group().commits.append(OffsetCommits(member, rows, future))
        await future

    async def read(self, work: Callable[..., T], *args: object) -> T:
        """Run `work(connection, *args)` in the reader thread."""
        self._check_open()
        return await self._loop.run_in_executor(self._reader, self._read_in_thread, work, *args)

    def read_soon(self, ranges: Sequence[Range], deliver: Callable[[Sequence[statements.Chunk] | None], None]) -> None:
        """Read ranges in the reader thread, then call `deliver` on the event loop, with None if that failed."""
        if not self._is_closed:
            self._reader.submit(self._read_ranges, ranges, deliver)

    async def write(self, work: Callable[..., T], *args: object) -> T:
        """Run `work(connection, *args)` in the writer thread."""
        self._check_open()
        future: asyncio.Future[T] = self._loop.create_future()
        self._writer.put(Work(partial(work, self._file.writer, *args), future))
        try:
            async with asyncio.timeout(self._append_timeout):
                return await future
        except TimeoutError:
            raise LogUnavailableError(
                f"{self._file.path}: expected a response within {self._append_timeout} s, got none"
            ) from None

    def _check_open(self) -> None:
        if self._file.lost_reason is not None:
            raise LogLostError(self._file.lost_reason)
        if self._is_closed:
            raise LogUnavailableError(f"{self._file.path}: expected an open log, got a closed one")

    def _next_group(self) -> AppendBatch:
        """Return the group of appends of this iteration of the event loop."""
        group = self._group
        if group.is_empty:
            self._loop.call_soon(self._submit_group)
        return group

    def _submit_group(self) -> None:
        group = self._group
        if not group.is_empty:
            self._group = AppendBatch()
            group.timer = self._loop.call_later(self._append_timeout, self._expire, group)
            self._writer.put(group)

    def _expire(self, group: AppendBatch) -> None:
        group.is_expired = True
        for future in group.futures:
            if not future.done():
                future.set_exception(
                    LogUnavailableError(
                        f"{self._file.path}: expected the append to end within {self._append_timeout} s, "
                        "got no response"
                    )
                )
        # A writer that waits for the file may get to this group much later.
        group.appends.clear()
        group.commits.clear()

    def _appended(
        self, groups: Sequence[AppendBatch], results: Sequence[Stored], tails: Sequence[statements.Chunk]
    ) -> None:
        for group in groups:
            self._waiting_bytes -= group.size
            if group.timer is not None:
                group.timer.cancel()
        for future, result in results:
            if future.done():  # cancelled or expired
                continue
            if not isinstance(result, str):
                future.set_result(result)
            elif self._file.lost_reason is not None:
                future.set_exception(LogLostError(self._file.lost_reason))
            else:
                future.set_exception(LogUnavailableError(f"{self._file.path}: {result}"))
        for chunk in tails:
            for consumer in self._consumers:
                consumer.offer(chunk)

    def _register(self, consumers: list[EmbeddedConsumer]) -> None:
        self._consumers = consumers
        self._writer.consumed = frozenset(topic for consumer in consumers for topic in consumer.topics)

    def _read_in_thread(self, work: Callable[..., T], *args: object) -> T:
        with self._file.errors():
            return work(self._file.reader, *args)

    def _read_ranges(
        self, ranges: Sequence[Range], deliver: Callable[[Sequence[statements.Chunk] | None], None]
    ) -> None:
        try:
            now = self._file.now()
            chunks = [
                _select(self._file.reader, asked.topic, asked.start, asked.end, now, max_bytes=asked.max_bytes)
                for asked in ranges
            ]
            starts = statements.start_offsets(
                self._file.reader
            )  # after the records, so that records deleted since then were read
            for chunk in chunks:
                chunk.first = starts.get(chunk.topic, 0)
        except (sqlite3.Error, ValueError) as error:  # ValueError: the file is damaged
            self._file.note_error(error)
            logger.warning("log_read_failed", path=str(self._file.path), error=str(error))
            post(self._loop, deliver, None)
        else:
            post(self._loop, deliver, chunks)

    def _poll(self) -> None:
        self._reader.submit(self._poll_bounds)

    def _poll_bounds(self) -> None:
        bounds: list[tuple[str, int, int]] = []
        with suppress(LogUnavailableError), self._file.errors():  # a read or an append reports it better
            bounds = statements.rows(
                self._file.reader, "SELECT json_group_array(json_array(name, start, next)) FROM topics"
            )
        post(self._loop, self._apply_bounds, bounds)

    def _apply_bounds(self, bounds: Sequence[tuple[str, int, int]]) -> None:
        starts = {name: start for name, start, _ in bounds}
        ends = {name: end for name, _, end in bounds}
        for consumer in self._consumers:
            consumer.records_deleted(starts)
            consumer.extend(ends)
        is_polling = self._consumers and not self._is_closed
        self._polling = self._loop.call_later(POLL_INTERVAL, self._poll) if is_polling else None

    def _start_sweep(self) -> asyncio.Future[None]:
        self._check_open()
        steps = sweep(self._file.writer, self._file.now, self._file.retention_cutoff, frozenset(self._until_done))
        future: asyncio.Future[None] = self._loop.create_future()
        future.add_done_callback(lambda _: self._tell_of_clock())
        self._writer.put(Work(partial(next, steps, None), future))
        return future

    def _tell_of_clock(self) -> None:
        stepped_by = self._file.clock_stepped_by
        if stepped_by > self._told_step:
            logger.warning("clock_set_forward", path=str(self._file.path), seconds=round(stepped_by - self._told_step))
            self._told_step = stepped_by

    def _sweep_later(self, seconds: float) -> None:
        self._sweeping = self._loop.call_later(seconds, self._sweep_by_itself)

    def _sweep_by_itself(self) -> None:
        if self._file.lost_reason is None:
            self._start_sweep().add_done_callback(self._swept)

    def _swept(self, future: asyncio.Future[None]) -> None:
        if not future.cancelled() and (error := future.exception()) is not None:
            logger.warning("sweep_failed", path=str(self._file.path), error=str(error))
        if not self._is_closed and self._sweep_interval is not None:
            self._sweep_later(self._sweep_interval)

    def _stop(self) -> None:
        has_ended = self._writer.stop(self._append_timeout)
        self._reader.shutdown()
        if has_ended:  # otherwise the disk hangs, and the file stays locked while the process lives
            self._file.close()


def _select(
    connection: sqlite3.Connection, topic: str, start: int, end: int, now: float, *, max_bytes: int = FETCH_BYTES
) -> statements.Chunk:
    decode = statements.decode_damaged_headers
    return statements.select(connection, topic, start, end, now, max_bytes=max_bytes, decode=decode)
