"""A log that can't be opened yet: a process with a spool starts without it."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence

from gateway.log.base import (
    Commit,
    Consumer,
    Listener,
    Log,
    NewRecord,
    Partition,
    Position,
    Record,
    RecordHeaders,
    TopicProblem,
    TopicSpec,
)
from gateway.model import LogUnavailableError

OPEN_INTERVAL = 2.0
"""Seconds between tries to open the log."""


class LogNotOpenError(LogUnavailableError):
    """The log isn't open yet: nothing was sent to it."""


class DeferredLog:
    """Until `open` has returned, its methods raise LogNotOpenError with the reason; the clock is this machine's.

    `max_record_bytes` is that of the log.
    """

    def __init__(self, opener: Callable[[], Awaitable[Log]], *, max_record_bytes: int) -> None:
        self.max_record_bytes = max_record_bytes
        self._opener = opener
        self._log: Log | None = None
        self._reason = "expected an open log, got one that isn't open yet"

    @property
    def is_open(self) -> bool:
        return self._log is not None

    async def open(self) -> None:
        """Open it. Raises what the opener raises; after LogUnavailableError, it may be called again."""
        try:
            self._log = await self._opener()
        except LogUnavailableError as error:
            self._reason = str(error)
            raise

    def _opened(self) -> Log:
        if self._log is None:
            raise LogNotOpenError(self._reason)
        return self._log

    async def append(
        self, topic: str, *, key: bytes, value: bytes, headers: RecordHeaders, partition: int | None = None
    ) -> Position:
        return await self._opened().append(topic, key=key, value=value, headers=headers, partition=partition)

    async def append_in_order(self, partition: Partition, records: Sequence[NewRecord]) -> Sequence[Position]:
        return await self._opened().append_in_order(partition, records)

    async def consume(
        self, *, group: str | None, topics: Sequence[str], listener: Listener, since: float | None = None
    ) -> Consumer:
        return await self._opened().consume(group=group, topics=topics, listener=listener, since=since)

    def scan(self, partition: Partition, start: int, end: int) -> AsyncIterator[Sequence[Record]]:
        return self._opened().scan(partition, start, end)

    async def partitions(self, topics: Collection[str]) -> Mapping[str, int]:
        return await self._opened().partitions(topics)

    async def bounds(self, topic: str) -> Mapping[int, tuple[int, int]]:
        return await self._opened().bounds(topic)

    async def readable(self, topic: str) -> tuple[Mapping[int, tuple[int, int]], Mapping[int, str]]:
        return await self._opened().readable(topic)

    async def settled(
        self, topic: str, numbers: Collection[int]
    ) -> tuple[Mapping[int, tuple[int, int]], Mapping[int, str]]:
        return await self._opened().settled(topic, numbers)

    def topic_id(self, topic: str) -> str:
        return "" if self._log is None else self._log.topic_id(topic)

    async def offsets_at(self, topic: str, at: float, numbers: Collection[int] | None = None) -> Mapping[int, int]:
        return await self._opened().offsets_at(topic, at, numbers)

    async def topics(self) -> Collection[str]:
        return await self._opened().topics()

    async def topics_of(self, group: str) -> Collection[str]:
        return await self._opened().topics_of(group)

    async def committed(self, group: str, topic: str) -> Mapping[int, Commit]:
        return await self._opened().committed(group, topic)

    async def seed(self, group: str, commits: Mapping[Partition, Commit]) -> None:
        await self._opened().seed(group, commits)

    async def groups(self, prefix: str) -> Mapping[str, int]:
        return await self._opened().groups(prefix)

    async def members(self, group: str) -> int:
        return await self._opened().members(group)

    async def create(self, specs: Sequence[TopicSpec]) -> Sequence[str]:
        return await self._opened().create(specs)

    async def check(self, specs: Sequence[TopicSpec]) -> Sequence[TopicProblem]:
        return await self._opened().check(specs)

    async def retentions(self, topics: Collection[str]) -> Mapping[str, float]:
        return await self._opened().retentions(topics)

    def now(self) -> float:
        return time.time() if self._log is None else self._log.now()

    async def synchronize(self, topic: str) -> None:
        await self._opened().synchronize(topic)

    async def ping(self) -> None:
        await self._opened().ping()

    async def refusing(self) -> Mapping[Partition, str]:
        return await self._opened().refusing()

    async def close(self) -> None:
        if self._log is not None:
            await self._log.close()


async def tried_until_open(open_once: Callable[[], Awaitable[None]], stopping: asyncio.Event) -> None:
    """Open a log, which may take its time: until it is open, or the process stops, which waits for no try."""
    stop = asyncio.create_task(stopping.wait(), name="stop-while-opening")
    opening: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    try:
        while not stopping.is_set():
            opening = asyncio.ensure_future(open_once())
            await asyncio.wait({opening, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not opening.done():
                return
            try:
                opening.result()
            except LogUnavailableError:  # who watches the log tells of it
                await asyncio.wait({stop}, timeout=OPEN_INTERVAL)
            else:
                return
    finally:
        left = {each for each in (stop, opening) if not each.done()}
        for each in left:
            each.cancel()
        if left:
            await asyncio.wait(left)


async def comes(event: asyncio.Event, stopping: asyncio.Event, *, timeout: float | None = None) -> bool:
    """Wait for what a process needs to go on, unless it stops meanwhile; return whether that has come."""
    waiting = {asyncio.create_task(each.wait(), name="start-waits") for each in (event, stopping)}
    try:
        await asyncio.wait(waiting, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in waiting:
            task.cancel()
    return event.is_set()
