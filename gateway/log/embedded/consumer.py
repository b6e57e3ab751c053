"""Consumers: they get records from memory at the tail, and from the file behind it."""

import asyncio
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import structlog

from gateway.log.base import FETCH_BYTES, FETCH_RECORDS, Assignment, Batch, Commit, Listener, Partition, Record
from gateway.log.embedded import statements
from gateway.log.embedded.statements import Chunk
from gateway.model import LogUnavailableError

BUFFER_BYTES = 4 << 20  # Maximum bytes per topic that a consumer gets from memory; beyond that it reads the file.
ALL_BUFFER_BYTES = 16 << 20  # The same of all of a consumer's topics.
RETRY_INTERVAL = 0.25  # Seconds between a failed read and the next.

logger = structlog.get_logger(__name__)


class ReadableLog(Protocol):
    """The log that a consumer reads from."""

    def read_soon(self, ranges: "Sequence[Range]", deliver: Callable[[Sequence[Chunk] | None], None]) -> None: ...

    async def commit(self, member: str, rows: Sequence[tuple[str, int, str]]) -> None: ...

    def leave(self, consumer: "EmbeddedConsumer") -> None: ...


class EmbeddedConsumer:
    """The only member of a group, or a reader. Its partitions are assigned once, before `consume` returns."""

    def __init__(self, log: "ReadableLog", group: str | None, topics: Sequence[str], listener: Listener) -> None:
        self.group = group
        self.topics = tuple(topics)
        self._log = log
        self._listener = listener
        self._streams = {Partition(topic, 0): _Stream() for topic in topics}
        self._woken = asyncio.Event()
        self._fetch_bytes = FETCH_BYTES
        self._is_reading = False
        self._is_closed = False

    def start(self, assignments: Sequence[tuple[Assignment, int]]) -> None:
        """Start reading at the assignments' positions, up to each topic's next offset."""
        for (partition, commit, log_start, *_), end in assignments:
            stream = self._streams[partition]
            stream.position = stream.returned = max(commit.base, log_start)
            stream.end = max(stream.end, end)
        self._listener.assigned([assignment for assignment, _ in assignments])

    async def fetch(self, *, timeout: float, max_bytes: int = FETCH_BYTES) -> Sequence[Batch]:
        self._fetch_bytes = min(max_bytes, FETCH_BYTES)
        deadline = asyncio.get_running_loop().time() + timeout
        while True:
            self._fill()
            batches = [
                Batch(partition, records)
                for partition, stream in self._streams.items()
                if not stream.is_paused and (records := stream.take(self._fetch_bytes))
            ]
            if batches:
                self._fill()  # so that the next records are read while these are handled
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
            (partition.topic, *statements.encode_commit(commit))
            for partition, commit in commits.items()
            if partition in self._streams
        ]
        if rows and self.group is not None:
            await self._log.commit(self.group, rows)

    def lag(self) -> Mapping[Partition, int]:
        return {partition: stream.end - stream.returned for partition, stream in self._streams.items()}

    def unreadable(self) -> Mapping[Partition, str]:
        return {}  # the file is there as a whole, or not at all

    async def close(self) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        commits = await self._listener.revoked(tuple(self._streams))
        try:
            await self.commit(commits)
        except LogUnavailableError as error:
            logger.warning(
                "log_commit_lost", group=self.group, error=str(error)
            )  # what was finished since the last commit is repeated
        finally:
            self._streams.clear()
            self._log.leave(self)

    # For the log.

    def offer(self, chunk: Chunk) -> None:
        """Buffer records that were just stored, if they are the next ones and fit; otherwise they are read later."""
        stream = self._streams.get(Partition(chunk.topic, 0))
        if stream is None:
            return
        stream.end = max(stream.end, chunk.end)
        is_next = chunk.records[0].offset == stream.position
        has_room = stream.size + chunk.size <= BUFFER_BYTES and self._size() + chunk.size <= ALL_BUFFER_BYTES
        if is_next and not stream.is_paused and has_room:
            stream.put(replace(chunk))  # others are offered the same one, and each may cut its own
        self._woken.set()

    def records_deleted(self, starts: Mapping[str, int]) -> None:
        """Advance to the topics' new starts after old records were deleted, and report unread ones to the listener."""
        for partition, stream in self._streams.items():
            start = starts.get(partition.topic, 0)
            if self.group is not None and start > stream.position >= 0:
                deleted, stream.position = range(stream.position, start), start
                if not stream.chunks:
                    stream.returned = start
                self._listener.records_deleted(partition, deleted)
                self._woken.set()

    def extend(self, ends: Mapping[str, int]) -> None:
        """Advance the topics' ends."""
        for partition, stream in self._streams.items():
            end = ends.get(partition.topic, 0)
            if end > stream.end:
                stream.end = end
                self._woken.set()

    def _size(self) -> int:
        return sum([stream.size for stream in self._streams.values()])

    def _fill(self) -> None:
        if self._is_reading:
            return
        ranges = [
            Range(partition.topic, stream.position, stream.end, self._fetch_bytes)
            for partition, stream in self._streams.items()
            if not stream.chunks and not stream.is_paused and stream.position < stream.end
        ]
        if ranges:
            self._is_reading = True
            self._log.read_soon(ranges, self._deliver)

    def _deliver(self, chunks: Sequence[Chunk] | None) -> None:
        if chunks is None:
            asyncio.get_running_loop().call_later(RETRY_INTERVAL, self._deliver, ())
            return
        self._is_reading = False
        for chunk in chunks:
            stream = self._streams.get(Partition(chunk.topic, 0))
            self.records_deleted(
                {chunk.topic: min(chunk.first, chunk.records[0].offset if chunk.records else chunk.end)}
            )
            # If the position has moved meanwhile, the same records have been offered from memory.
            if stream is not None and stream.position == chunk.start:
                stream.put(chunk)
        self._woken.set()


class Range(NamedTuple):
    topic: str
    start: int
    end: int
    max_bytes: int = FETCH_BYTES


@dataclass(slots=True)
class _Stream:
    """A consumer's progress in a topic: returned ≤ position (returned or in `chunks`) ≤ end."""

    returned: int = 0
    position: int = -1  # not started: no record is the next one
    end: int = 0
    size: int = 0
    chunks: deque[Chunk] = field(default_factory=deque)
    is_paused: bool = False

    def put(self, chunk: Chunk) -> None:
        self.position = chunk.end
        if chunk.records:
            self.chunks.append(chunk)
            self.size += chunk.size

    def take(self, max_bytes: int) -> list[Record]:
        """Remove and return as many records as a fetch of at most so many bytes may return."""
        taken = Chunk("", 0, 0)
        while self.chunks:
            chunk = self.chunks[0]
            if taken.records and (
                len(taken.records) + len(chunk.records) > FETCH_RECORDS or taken.size + chunk.size > max_bytes
            ):
                break
            if chunk.size > max_bytes and (first := chunk.cut(max_bytes)) is not None:
                chunk = first
            else:
                self.chunks.popleft()
            taken.records += chunk.records
            taken.size += chunk.size
            self.returned = chunk.end
        self.size -= taken.size
        return taken.records
