"""The dedupe entries of one event partition: kept in memory, stored for the next owner, rebuilt from the log."""

import asyncio
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from structlog.typing import FilteringBoundLogger

from gateway.engine.dedupe.index import DedupeIndex
from gateway.log.base import LEADER_CLOCK_SKEW, Log, Partition
from gateway.log.records import DEDUPE_ENTRY, dedupe_entries_key, encode_dedupe_entries
from gateway.log.topics import Topics
from gateway.model import LogUnavailableError
from gateway.rules.rules import Rules
from gateway.telemetry.log_throttle import LogThrottle
from gateway.telemetry.metrics import Metrics

FLUSHED_AT_ONCE = 16_384
"""Maximum entries in one record."""


MAX_LAG = 2 * 3600.0
"""Maximum lag, in seconds, of a reader behind another (or behind the time) at which it still finds all it needs."""


MICRO = 1_000_000


NEVER = math.inf


class Position(Protocol):
    """A reader of the partition: `at` is its position (the log's clock, microseconds), None before the first record."""

    at: int | None


class Windows(NamedTuple):
    """The windows, in microseconds, of the sources that append to one topic and have one; `longest` is 0 without."""

    by_source: Mapping[str, int]
    longest: int


NO_WINDOWS = Windows({}, 0)


class WindowsByTopic:
    """The windows of all topics, computed once for each version of the rules: there may be 10,000 sources."""

    def __init__(self, topics: Topics, rules: Callable[[], Rules]) -> None:
        self._topics = topics
        self._rules = rules
        self._computed_for: Rules | None = None
        self._found: Mapping[str, Windows] = {}

    def of(self, topic: str) -> Windows:
        """Return a topic's windows."""
        if self._computed_for is not self._rules():
            self.compute()
        return self._found.get(topic, NO_WINDOWS)

    def compute(self) -> None:
        """Compute the windows of the active rules, and let go of former ones."""
        rules = self._rules()
        found: dict[str, dict[str, int]] = {}
        for name, source in rules.sources.items():
            if source.dedupe is not None:
                found.setdefault(source.topic or self._topics.events(name), {})[name] = round(source.dedupe * MICRO)
        self._found = {topic: Windows(windows, max(windows.values())) for topic, windows in found.items()}
        self._computed_for = rules


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """What the readings of all partitions share."""

    log: Log
    topics: Topics
    rules: Callable[[], Rules]
    windows: WindowsByTopic
    metrics: Metrics
    logger: FilteringBoundLogger
    throttle: LogThrottle = field(default_factory=LogThrottle)


class RebuildRequest(NamedTuple):
    """What a store needs: entries stored since a time, in these partitions of `gateway.dedupe`, or in all."""

    number: int
    since: float
    unread: frozenset[int] | None

    def has(self, number: int) -> bool:
        return self.unread is None or number in self.unread


class Store:
    """The entries of one partition. Times are microseconds of the log's clock.

    All entries since `covers_from` are known, unless something is `wanted`: then entries that were stored since that
    time have to be read. Those of a source that had no window for a while are left out; once it is back, they are
    wanted again.
    """

    def __init__(self, partition: Partition, is_wanted: asyncio.Event, is_stuck_somewhere: asyncio.Event) -> None:
        self.partition = partition
        self.key = dedupe_entries_key(partition)
        self.readers: set[Position] = set()
        self.sources: dict[str, DedupeIndex] = {}
        self.unstored: dict[str, bytearray] = {}
        self.is_stuck = False
        """Whether the last flush failed."""
        self._flushing = asyncio.Lock()
        self._is_stuck_somewhere = is_stuck_somewhere
        self.covers_from: float = NEVER
        self.wanted: float = NEVER
        self.known = asyncio.Event()
        self.asked = 0
        self.unread: frozenset[int] | None = None
        """Partitions of `gateway.dedupe` that still have to be read for the request; None for all of them."""
        self.unread_since: float = NEVER
        self.newer_until = -NEVER
        """Up to when events were appended of which a newer version may have written entries: those aren't known."""
        self.origin = 0
        self.high_at = 0
        self.lowest = 0
        self._high_offset = -1
        self._begins_at_next = False
        self._is_wanted = is_wanted
        self._foremost = (0, 0)
        self._left_out: dict[str, int] = {}  # source → when entries of it were left out last
        self._windows = NO_WINDOWS  # by which entries were forgotten last

    def request_rebuild(self, since: float) -> None:
        """Request a read of all entries stored since a time."""
        self.asked += 1
        self.wanted = min(self.wanted, since)
        self.unread = None
        self.known.clear()
        self._is_wanted.set()

    def request(self) -> RebuildRequest:
        """Return the current request."""
        return RebuildRequest(self.asked, min(self.wanted, self.unread_since), self.unread)

    def mark_read(self, asked: RebuildRequest, left: Collection[int], *, is_known: bool) -> None:
        """Mark a request as read, except for the partitions `left`.

        The entries count as known if the partition that they go to now isn't left: they are only elsewhere if the topic
        has grown.
        """
        if self.asked != asked.number:
            self._is_wanted.set()
            return
        self.unread, self.unread_since = frozenset(left), asked.since if left else NEVER
        if is_known and self.wanted < NEVER:
            self.covers_from = min(self.covers_from, self.wanted)
            self.wanted = NEVER
            self.known.set()

    @property
    def is_tried_again(self) -> bool:
        """Whether a flush is in flight after a failed one."""
        return self.is_stuck and self._flushing.locked()

    @property
    def is_flushed(self) -> bool:
        """Whether all entries are stored, and no flush is in flight."""
        return not (any(self.unstored.values()) or self._flushing.locked())

    async def flush(self, shared: Shared) -> None:
        """Store all entries up to now. Raises LogUnavailableError."""
        log = shared.log
        if not any(self.unstored.values()):
            return
        most = DEDUPE_ENTRY.size * min(FLUSHED_AT_ONCE, (log.max_record_bytes - 1024) // DEDUPE_ENTRY.size)
        async with self._flushing:
            try:
                for source, rows in list(self.unstored.items()):
                    left = len(rows)
                    while left > 0:
                        chunk = bytes(rows[: min(left, most)])
                        headers = encode_dedupe_entries(source, self.origin)
                        await log.append(shared.topics.dedupe, key=self.key, value=chunk, headers=headers)
                        del rows[: len(chunk)]
                        left -= len(chunk)
            except LogUnavailableError:
                self.is_stuck = True
                self._is_stuck_somewhere.set()
                raise
            self.is_stuck = False

    def is_past(self, at: int) -> bool:
        """Return whether a time is so far behind other readers that no entries are kept for it."""
        return at < self.lowest

    def knows(self, at: int, window: int) -> bool:
        """Return whether all entries of a window before a time are known. If not, they are requested, if possible."""
        if self.is_past(at):
            return False
        if at - window < min(self.covers_from, self.wanted):
            self.request_rebuild(at - window)
        return self.wanted == NEVER

    def leave_out_newer(self, appended_at: float) -> None:
        """Leave out entries of a newer version, stored at a time in seconds: those of events appended by then."""
        self.newer_until = max(self.newer_until, (appended_at + LEADER_CLOCK_SKEW) * MICRO)

    def leave_out(self, source: str, now: int) -> None:
        """Leave out a source's entries: it has no window."""
        self.sources.pop(source, None)
        self._left_out[source] = now

    def is_left_out(self, source: str, windows: Windows) -> bool:
        """Return whether entries of a source were left out that it now has a window for."""
        return source in self._left_out and source in windows.by_source

    def include(self, source: str, since: int) -> None:
        """Request the entries of a source that was left out: those since a time, at least."""
        del self._left_out[source]
        self.index_of(source).restore(bytes(self.unstored.get(source, b"")))
        self.request_rebuild(min(self.covers_from, since))

    def include_all(self, windows: Windows, now: int) -> None:
        """Request the entries of all sources that were left out and have a window again: in one scan."""
        for source in [each for each in self._left_out if each in windows.by_source]:
            self.include(source, now - windows.by_source[source])

    def lengthen(self, windows: Windows, now: int) -> None:
        """Request the entries of all sources that have a longer window than before: in one scan.

        `covers_from` doesn't say what was forgotten of these, if another source of the topic has a longer one still.
        """
        before, self._windows = self._windows, windows
        longer = {
            source: windows.by_source[source]
            for source in self.sources
            if windows.by_source.get(source, 0) > before.by_source.get(source, NEVER)
        }
        lowest = self.lowest or now
        for source, window in longer.items():
            self.sources[source].forget_before(max(self.origin, lowest - window))
            self.sources[source].restore(bytes(self.unstored.get(source, b"")))
        if longer:
            self.request_rebuild(lowest - max(longer.values()))

    def begin_at_next(self) -> None:
        """Treat the next event as the first one that this partition ever had."""
        self.covers_from = -NEVER
        self._begins_at_next = True

    def index_of(self, source: str) -> DedupeIndex:
        index = self.sources.get(source)
        if index is None:
            index = self.sources[source] = DedupeIndex()
            index.forget_before(self.origin)
        return index

    def record_read(self, offset: int, at: int) -> None:
        """Record how far this partition was read.

        A lower offset with a later time than any means that the topic was recreated: the existing entries don't apply.
        """
        if offset <= self._high_offset and at > self.high_at:
            self._high_offset = -1
            self.sources.clear()
            self.unstored.clear()
            self._left_out.clear()
            self.newer_until = -NEVER
            self.begin_at_next()
        if self._begins_at_next:
            self._begins_at_next = False
            self.set_origin(at)
        self._high_offset = max(self._high_offset, offset)
        self.high_at = max(self.high_at, at)

    def set_origin(self, origin: int) -> None:
        """Ignore entries from before a time: they belong to another topic of this name."""
        if origin > self.origin:
            self.origin = origin
            for index in self.sources.values():
                index.forget_before(max(origin, index.horizon))

    def forget(self, now: int, windows: Windows) -> None:
        """Expire entries that no reader needs any more, by each source's window. An idle partition's time advances.

        Of all sources only those with entries are gone through, as this is done for each partition every second.
        """
        positions = [reader.at for reader in self.readers if reader.at is not None]
        if not positions:
            return
        if windows is not self._windows:
            self.lengthen(windows, now)
        foremost = max(positions)
        if foremost != self._foremost[0]:
            self._foremost = (foremost, now)
        self.lowest = max(min(positions), foremost + now - self._foremost[1] - round(MAX_LAG * MICRO))
        self.covers_from = max(self.covers_from, self.lowest - windows.longest)
        by_source = windows.by_source
        for name, index in list(self.sources.items()):
            if name in by_source:
                index.forget_before(max(self.origin, self.lowest - by_source[name]))
            else:
                self.leave_out(name, now)
        if self._left_out:
            # `knows` has older entries read in any case.
            self._left_out = {name: at for name, at in self._left_out.items() if at >= self.covers_from}
