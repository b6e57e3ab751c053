"""The index: a file that follows the log, and is asked for events and for what became of them.

Its work on SQLite is done in threads of its own: one writes, one reads, and one reads counts. What holds it up, a log
that isn't available or a disk that is full, is told in `statistics`, and it goes on by itself; a file that is deleted
or damaged meanwhile is made anew from the log.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from enum import StrEnum
from pathlib import Path
from time import monotonic
from typing import Generic, NamedTuple, TypeVar

import structlog

from gateway.index.delivery_query import DeliveryCursor, DeliveryQuery
from gateway.index.file import (
    IndexBehindError,
    IndexFile,
    IndexLostError,
    IndexOutdatedError,
    IndexUnavailableError,
)
from gateway.index.hidden import Redactions
from gateway.index.lookups import LAST_RECEIVED
from gateway.index.query import Query, QueryError, parse_query
from gateway.index.reader import Reader, ReadProgress, Round
from gateway.index.reading import MOST
from gateway.index.results import (
    FIRST_PLACE,
    DeliveryPage,
    DeliveryPlace,
    IndexedDelivery,
    IndexedEvent,
    Page,
    place_of,
)
from gateway.index.search import MANY, Searcher
from gateway.index.tallies import Traffic
from gateway.index.traffic import Lane, TrafficQuery, TrafficReader
from gateway.index.writer import LeftOut, Writer
from gateway.log.base import Log, Partition, Record
from gateway.log.records import decode_event
from gateway.log.topics import Topics
from gateway.model import Event, LogUnavailableError, UnreadableRecordError, UsageError, immutable
from gateway.turns import taking_turns

T = TypeVar("T")
POLL = 1.0
"""Seconds between rounds. Each asks the log some 40 questions, and a process that delivers would notice ten times as
many: with 0.1 s between rounds, acknowledgements on Kafka took 0.25 s at p99 instead of 0.03."""
RETRY, LONGEST_RETRY = 5.0, 30.0
"""Seconds until what has failed is tried again: twice as many after each further failure, up to the latter."""
PAGE = 50
"""Events of a page by default."""
DAYS = 7.0
BYTES = 8 << 30

logger = structlog.get_logger(__name__)


class Interruption(StrEnum):
    """What holds up the index."""

    LOG = "log_unavailable"
    FILE = "file_unavailable"
    """It can't be written or read: the disk is full."""
    LOST = "file_lost"
    """It was deleted, replaced or damaged, or has what is hidden by now, and is made anew."""


@immutable
class Statistics:
    """How the index is doing. `settled_at` is as of when statuses are, by the log's clock; None before the first round.

    `topics` are how far each is read. `unreadable` are the partitions that can't be, and why: while one of these may
    have deliveries, statuses stay as they are. `unsettled` are topics whose commits can't be asked for, and why: those
    of their records stay as they are. `left_out` are the records that aren't in the index, since the start, and
    `interruptions` how often it was held up. `problem` is what does so at the moment, "" if nothing does.
    """

    events: int
    bytes: int
    oldest: float | None
    topics: Mapping[str, ReadProgress]
    settled_at: float | None
    unreadable: Mapping[Partition, str]
    unsettled: Mapping[str, str]
    left_out: Mapping[LeftOut, int]
    interruptions: Mapping[Interruption, int]
    problem: str

    @property
    def lag(self) -> int:
        """The records of all topics that aren't read yet."""
        return sum([each.records for each in self.topics.values()])


class Timed(NamedTuple, Generic[T]):
    """What a thread has read, in how many seconds, and when it was done, by the monotonic clock."""

    value: T
    seconds: float
    ended: float


class Index:
    """An open index. `run` follows the log until it is cancelled; searches may be asked meanwhile."""

    def __init__(
        self,
        path: Path,
        source: Log,
        topics: Topics,
        *,
        days: float,
        max_bytes: int,
        redactions: Callable[[], Redactions],
        event_topics: Callable[[], Collection[str]],
        sleep: Callable[[float], Awaitable[None]],
    ) -> None:
        """Used by `open_index`, which also opens the file."""
        self._path = path
        self._log = source
        self._topics = topics
        self._days, self._max_bytes = days, max_bytes
        self._redactions = redactions
        self._event_topics = event_topics
        self._sleep = sleep
        self._loop = asyncio.get_running_loop()
        self._writing = ThreadPoolExecutor(1, thread_name_prefix="index-writer")
        self._reading = ThreadPoolExecutor(1, thread_name_prefix="index-reader")
        self._counting = ThreadPoolExecutor(1, thread_name_prefix="index-counter")
        self._file: IndexFile
        self._writer: Writer
        self._reader: Reader
        self._searcher: Searcher
        self._traffic: TrafficReader
        self._settled_at: float | None = None
        self._unreadable: Mapping[Partition, str] = {}
        self._problem = ""
        self._interrupted_at = 0.0
        self._interruptions: Counter[Interruption] = Counter()
        self._is_open = False
        self._refreshing = asyncio.Lock()

    async def run(self) -> None:
        """Follow the log until cancelled."""
        wait = RETRY
        while True:
            try:
                await self.refresh()
            except (LogUnavailableError, IndexUnavailableError):
                await self._sleep(wait)
                wait = min(2 * wait, LONGEST_RETRY)
            else:
                wait = RETRY
                await self._sleep(POLL)

    async def refresh(self) -> Round:
        """Read everything that the log has now; rounds that are asked for meanwhile come after it.

        Raises LogUnavailableError and IndexUnavailableError.
        """
        async with self._refreshing:
            return await self._refresh()

    async def _refresh(self) -> Round:
        began = self._log.now()
        try:
            await self._reopen()
            done = await self._reader.round()
        except (LogUnavailableError, IndexUnavailableError) as error:
            self._note_problem(error)
            if self._is_open:
                await self._recover(error)
            raise
        if self._problem:
            seconds = round(self._loop.time() - self._interrupted_at, 1)
            logger.info("index_resumed", path=str(self._path), seconds=seconds)
        self._problem, self._unreadable = "", done.unreadable
        if not done.has_unread_successors:
            self._settled_at = began
        return done

    def _note_problem(self, error: Exception) -> None:
        """Count what holds the index up, and say it once."""
        self._interruptions[_interruption_of(error)] += 1
        if not self._problem:
            self._interrupted_at = self._loop.time()
        if str(error) != self._problem:
            logger.warning("index_interrupted", path=str(self._path), error=str(error))
        self._problem = str(error)

    async def search(self, asked: str | Query, *, limit: int = PAGE, cursor: int | None = None) -> Page:
        """Return the newest events that match a query, those before the cursor of the last page.

        Raises QueryError and IndexUnavailableError.
        """
        query = parse_query(asked, now=self._log.now()) if isinstance(asked, str) else asked
        if not 1 <= limit <= MOST:
            raise QueryError(f"limit: expected a number from 1 to {MOST}, got {limit}")
        return await self._read(lambda: self._searcher.search(query, limit=limit, cursor=cursor))

    async def events(self, id: str, *, limit: int = LAST_RECEIVED) -> list[IndexedEvent]:  # noqa: A002 - what it is
        """Return so many events with an id, newest first: those with the same identity share it.

        Of more than `LAST_RECEIVED` in a segment of the index, they are among those that were received last.
        """
        return await self._read(lambda: self._searcher.events(id, limit=limit))

    async def namesakes(self, id: str, received_at: float, *, limit: int) -> list[IndexedEvent]:  # noqa: A002 - what it is
        """Return so many events with an id that were received at a time: several, if they came in one request."""
        return await self._read(lambda: self._searcher.namesakes(id, received_at, limit))

    async def event(self, name: str) -> IndexedEvent | None:
        """Return the newest event with an id, or the one at a position (`topic/partition@offset`); None for none.

        Of more than `LAST_RECEIVED` with that id in a segment of the index, it is one of those that were received last.
        Raises LogUnavailableError if the log can't be asked what is there, IndexBehindError if the log has an event
        at a position up to which it isn't read yet, and IndexUnavailableError.
        """
        place = place_of(name)
        if place is None:
            return next(iter(await self.events(name, limit=1)), None)
        partition, at = place
        topic_id = self._log.topic_id(partition.topic)
        reached = await self._read(lambda: self._searcher.reached(partition, topic_id))  # what is read since is found
        event = await self._event_at(partition, at)
        if event is None:
            return None
        found = await self._read(lambda: self._searcher.event_at(event.id, partition, at))
        if found is None and at >= reached:
            read = f"{partition.topic}/{partition.number} up to {reached}"
            raise IndexBehindError(f"expected {name} in it, got {read}", source=event.source)
        return found

    async def content(self, event: IndexedEvent) -> Event | None:
        """Return an event with its headers and body, from its record; None if the log no longer has that.

        Raises LogUnavailableError.
        """
        if event.partition is None:
            return None
        found = await self._event_at(event.partition, event.offset)
        return found if found is not None and found.id == event.id else None

    async def deliveries(
        self, event: IndexedEvent, *, after: DeliveryPlace = FIRST_PLACE, limit: int = MANY, attempts: int = MANY
    ) -> list[IndexedDelivery]:
        """Return what is known of so many of an event's deliveries behind a place, each with its last attempts."""
        return await self._read(
            lambda: self._searcher.deliveries(event.number, after=after, limit=limit, attempts=attempts)
        )

    async def list_deliveries(
        self, query: DeliveryQuery, *, limit: int = PAGE, cursor: DeliveryCursor | None = None
    ) -> DeliveryPage:
        """Return the deliveries that a query is for, those of the newest events first, behind the cursor of a page.

        Raises QueryError and IndexUnavailableError.
        """
        if not 1 <= limit <= MOST:
            raise QueryError(f"limit: expected a number from 1 to {MOST}, got {limit}")
        return await self._read(lambda: self._searcher.list_deliveries(query, limit=limit, cursor=cursor))

    async def traffic(self, query: TrafficQuery, sees: Callable[[Lane], bool] | None = None) -> Mapping[str, Traffic]:
        """Return the traffic by name, or of all that is asked for under ""; `sees`: whether a lane may be counted.

        Raises IndexUnavailableError.
        """
        return (await self.start_traffic(query, sees, lambda found: found)).value

    def start_traffic(
        self,
        query: TrafficQuery,
        sees: Callable[[Lane], bool] | None,
        made: Callable[[Mapping[str, Traffic]], T],
    ) -> "asyncio.Future[Timed[T]]":
        """Have the traffic read, and something made of it, by a thread of its own: searches don't wait for it.

        For thousands of lanes it takes seconds. The future has IndexUnavailableError if the file can't be read.
        """

        def read() -> Timed[T]:
            began = monotonic()
            with self._file.errors(), taking_turns(self._loop):
                found = made(self._traffic.traffic(query, sees))
            ended = monotonic()
            return Timed(found, ended - began, ended)

        return self._loop.run_in_executor(self._counting, read)

    async def statistics(self) -> Statistics:
        """Return how the index is doing."""
        events, oldest = await self._read(lambda: (self._searcher.count(), self._searcher.oldest()))
        return Statistics(
            events=events,
            bytes=await self._loop.run_in_executor(self._writing, self._writer.size),
            oldest=oldest,
            topics=self._reader.progress(),
            settled_at=self._settled_at,
            unreadable=self._unreadable,
            unsettled=dict(self._reader.unsettled),
            left_out={why: count for why, count in dict(self._writer.left_out).items() if count},
            interruptions=dict(self._interruptions),
            problem=self._problem,
        )

    @property
    def complete_to(self) -> float:
        """Until when (Unix seconds) all events that were appended have been read; 0 if that isn't known yet."""
        return self._writer.complete_to

    @property
    def settled_at(self) -> float:
        """As of when (Unix seconds) statuses are, at least; 0 before the first round."""
        return self._settled_at or 0.0

    @property
    def problem(self) -> str:
        """What holds it up at the moment, "" if nothing does."""
        return self._problem

    def progress(self) -> Mapping[str, ReadProgress]:
        """Return how far each topic is read, without asking the file."""
        return self._reader.progress()

    async def _event_at(self, partition: Partition, offset: int) -> Event | None:
        record = await _record_at(self._log, partition, offset)
        try:
            return None if record is None else decode_event(record)
        except UnreadableRecordError:
            return None

    async def _read(self, work: Callable[[], T]) -> T:
        """Do something in the reading thread, in turns with the event loop."""

        def read() -> T:
            with self._file.errors(), taking_turns(self._loop):
                return work()

        return await self._loop.run_in_executor(self._reading, read)

    async def open(self) -> None:
        """Open the file, or make it. Raises UsageError and IndexUnavailableError."""
        try:
            await self._open_file()
        except IndexLostError as error:  # its tables are damaged: it is aside now
            logger.warning("index_rebuilt", path=str(self._path), reason=str(error))
            await self._open_file()
        self._searcher = Searcher(self._file.reader)
        self._traffic = TrafficReader(self._file.counter)
        self._reader = Reader(
            self._log,
            self._topics,
            self._writer,
            self._writing,
            days=self._days,
            redactions=self._redactions,
            event_topics=self._event_topics,
        )
        self._is_open = True

    async def _open_file(self) -> None:
        """Open the file, and read what it says of itself. Raises IndexLostError after setting aside a damaged one."""
        self._file = await self._loop.run_in_executor(self._writing, IndexFile, self._path)
        if self._file.replaced:
            logger.warning("index_rebuilt", path=str(self._path), reason=self._file.replaced)
        try:
            self._writer = await self._loop.run_in_executor(self._writing, self._new_writer)
        except BaseException as error:
            is_damaged = isinstance(error, IndexLostError) and error.is_damaged
            await self._loop.run_in_executor(self._writing, self._file.set_aside if is_damaged else self._file.close)
            raise

    def _new_writer(self) -> Writer:
        return Writer(self._file, self._loop, days=self._days, max_bytes=self._max_bytes)

    async def _recover(self, error: Exception) -> None:
        """Go on from what was committed; or with the file anew, if it is lost."""
        if not isinstance(error, IndexLostError):
            try:
                await self._reader.roll_back()
            except IndexUnavailableError as another:
                error = another
        if isinstance(error, IndexLostError):
            logger.warning("index_rebuilt", path=str(self._path), reason=str(error))
            self._settled_at = None
            self._is_open = False
            await self._close_file(error)
            await self._reopen()

    async def _reopen(self) -> None:
        """Open the file if it isn't open. Raises IndexUnavailableError."""
        if not self._is_open:
            try:
                await self.open()
            except UsageError as error:  # somebody has put another file there
                raise IndexUnavailableError(str(error)) from error

    async def _close_file(self, error: IndexLostError | None = None) -> None:
        """Close the file once nothing is read or written any more; set it aside, or delete it, as an error says."""
        end = self._file.close
        if error is not None and error.is_damaged:
            end = self._file.set_aside
        elif isinstance(error, IndexOutdatedError):
            end = self._file.delete
        await self._loop.run_in_executor(self._reading, self._file.reader.close)
        await self._loop.run_in_executor(self._counting, self._file.counter.close)
        await self._loop.run_in_executor(self._writing, end)

    async def close(self) -> None:
        """Close the file; what isn't committed is read again."""
        await self._close_file()

    def shut_down(self) -> None:
        """End the threads, which have nothing left to do."""
        self._reading.shutdown(wait=False)
        self._counting.shutdown(wait=False)
        self._writing.shutdown(wait=False)


@asynccontextmanager
async def open_index(
    path: Path,
    source: Log,
    topics: Topics,
    *,
    days: float = DAYS,
    max_bytes: int = BYTES,
    redactions: Callable[[], Redactions] = dict,
    event_topics: Callable[[], Collection[str]] = frozenset,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> AsyncIterator[Index]:
    """Open the index in a file, of events that were appended within so many days, in about so many bytes at most.

    A missing file is made. `redactions` are asked before each round and each commit for what isn't to be found, by
    source; `event_topics` for those that are read though nothing else tells yet that they have events. Its `run`
    belongs into a task of the caller's. Raises UsageError for a file that isn't an index, or that another process has
    open, and IndexUnavailableError.
    """
    index = Index(
        path,
        source,
        topics,
        days=days,
        max_bytes=max_bytes,
        redactions=redactions,
        event_topics=event_topics,
        sleep=sleep,
    )
    try:
        await index.open()
        try:
            yield index
        finally:
            await index.close()
    finally:
        index.shut_down()


def _interruption_of(error: Exception) -> Interruption:
    if isinstance(error, IndexLostError):
        return Interruption.LOST
    return Interruption.FILE if isinstance(error, IndexUnavailableError) else Interruption.LOG


async def _record_at(source: Log, partition: Partition, offset: int) -> Record | None:
    async for records in source.scan(partition, offset, offset + 1):
        for record in records:
            return record
    return None
