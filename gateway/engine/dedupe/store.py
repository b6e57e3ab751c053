"""What is known of one partition of events, by its sightings: kept in memory, stored for the next owner, read again."""

import asyncio
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from structlog.typing import FilteringBoundLogger

from gateway.engine.dedupe.index import Sightings
from gateway.log.base import Log, Partition
from gateway.log.records import SIGHTING, encode_sightings, sightings_key
from gateway.log.topics import Topics
from gateway.model import LogUnavailableError
from gateway.rules.rules import Rules
from gateway.telemetry.log_throttle import LogThrottle
from gateway.telemetry.metrics import Metrics

FLUSHED_AT_ONCE = 16_384
"""Sightings in one record, at most."""


MAX_LAG = 2 * 3600.0
"""Seconds by which one reader of a partition may be behind another (or behind the time) and still find all it needs."""


MICRO = 1_000_000


NEVER = math.inf


class Reading(Protocol):
    """Who reads the partition: `at` is how far (the log's clock, microseconds), None before the first record."""

    at: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """What the readings of all partitions share."""

    log: Log
    topics: Topics
    rules: Callable[[], Rules]
    metrics: Metrics
    logger: FilteringBoundLogger
    seldom: LogThrottle = field(default_factory=LogThrottle)

    def windows(self, topic: str) -> dict[str, int]:
        """Return the windows, in microseconds, of the sources that append to a topic and have one."""
        return {
            name: round(source.dedupe * MICRO)
            for name, source in self.rules().sources.items()
            if source.dedupe is not None and (source.topic or self.topics.events(name)) == topic
        }

    def window(self, topic: str) -> int:
        """Return the longest of a topic's windows, in microseconds; 0 if there is none."""
        return max(self.windows(topic).values(), default=0)


class Asked(NamedTuple):
    """What a store asks for: what was stored since a time, in these partitions of `gateway.dedupe` or in all."""

    number: int
    since: float
    left: frozenset[int] | None

    def has(self, number: int) -> bool:
        return self.left is None or number in self.left


class Store:
    """What is known of one partition. Times are microseconds of the log's clock.

    All that came between `covers_from` and now is known, unless something is `wanted`: then sightings that were stored
    since that time have to be read.
    """

    def __init__(self, partition: Partition, is_wanted: asyncio.Event, is_stuck_somewhere: asyncio.Event) -> None:
        self.partition = partition
        self.key = sightings_key(partition)
        self.readers: set[Reading] = set()
        self.sources: dict[str, Sightings] = {}
        self.fresh: dict[str, bytearray] = {}
        self.is_stuck = False
        """Whether the last flush failed."""
        self._flushing = asyncio.Lock()
        self._is_stuck_somewhere = is_stuck_somewhere
        self.covers_from: float = NEVER
        self.wanted: float = NEVER
        self.known = asyncio.Event()
        self.asked = 0
        self.left: frozenset[int] | None = None
        """Partitions of `gateway.dedupe` that are left of what was asked for; None for all of them."""
        self.left_since: float = NEVER
        self.origin = 0
        self.high_at = 0
        self.lowest = 0
        self._high_offset = -1
        self._begins_at_next = False
        self._is_wanted = is_wanted
        self._foremost = (0, 0)

    def need(self, since: float) -> None:
        """Have what was stored since a time read from the log, all of it that is there by now."""
        self.asked += 1
        self.wanted = min(self.wanted, since)
        self.left = None
        self.known.clear()
        self._is_wanted.set()

    def asking(self) -> Asked:
        """Return what is asked for now."""
        return Asked(self.asked, min(self.wanted, self.left_since), self.left)

    def has_read(self, asked: Asked, left: Collection[int], *, is_known: bool) -> None:
        """Note that what was asked for has been read, but for what is `left` of it.

        It is known where none of that is where the sightings go now: that is where they were but for a topic that grew.
        """
        if self.asked != asked.number:
            self._is_wanted.set()
            return
        self.left, self.left_since = frozenset(left), asked.since if left else NEVER
        if is_known and self.wanted < NEVER:
            self.covers_from = min(self.covers_from, self.wanted)
            self.wanted = NEVER
            self.known.set()

    @property
    def is_tried_again(self) -> bool:
        """Whether a flush is under way after one that failed."""
        return self.is_stuck and self._flushing.locked()

    @property
    def is_flushed(self) -> bool:
        """Whether nothing is left to store, and nothing is being stored."""
        return not (any(self.fresh.values()) or self._flushing.locked())

    async def flush(self, shared: Shared) -> None:
        """Store what was seen up to now. Raises LogUnavailableError."""
        log = shared.log
        if not any(self.fresh.values()):
            return
        most = SIGHTING.size * min(FLUSHED_AT_ONCE, (log.max_record_bytes - 1024) // SIGHTING.size)
        async with self._flushing:
            try:
                for source, rows in list(self.fresh.items()):
                    left = len(rows)
                    while left > 0:
                        chunk = bytes(rows[: min(left, most)])
                        headers = encode_sightings(source, self.origin)
                        await log.append(shared.topics.dedupe, key=self.key, value=chunk, headers=headers)
                        del rows[: len(chunk)]
                        left -= len(chunk)
            except LogUnavailableError:
                self.is_stuck = True
                self._is_stuck_somewhere.set()
                raise
            self.is_stuck = False

    def is_past(self, at: int) -> bool:
        """Return whether a time is so long before where others read that nothing is kept for it."""
        return at < self.lowest

    def knows(self, at: int, window: int) -> bool:
        """Return whether all that came in a window before a time is known. If not, it will be, if that is possible."""
        if self.is_past(at):
            return False
        if at - window < min(self.covers_from, self.wanted):
            self.need(at - window)
        return self.wanted == NEVER

    def begin_at_next(self) -> None:
        """Take the next event for the first one that this partition ever had."""
        self.covers_from = -NEVER
        self._begins_at_next = True

    def of(self, source: str) -> Sightings:
        sightings = self.sources.get(source)
        if sightings is None:
            sightings = self.sources[source] = Sightings()
            sightings.forget_before(self.origin)
        return sightings

    def saw(self, offset: int, at: int) -> None:
        """Note how far this partition was read.

        A lower offset with a later time than any is another log's: the topic was deleted and made again, and what was
        seen of the one before says nothing of this one.
        """
        if offset <= self._high_offset and at > self.high_at:
            self._high_offset = -1
            self.sources.clear()
            self.fresh.clear()
            self.begin_at_next()
        if self._begins_at_next:
            self._begins_at_next = False
            self.begins_at(at)
        self._high_offset = max(self._high_offset, offset)
        self.high_at = max(self.high_at, at)

    def begins_at(self, origin: int) -> None:
        """Take no account of what is said to have come before a time: it was another log of this name."""
        if origin > self.origin:
            self.origin = origin
            for sightings in self.sources.values():
                sightings.forget_before(max(origin, sightings.horizon))

    def forget(self, now: int, windows: Mapping[str, int]) -> None:
        """Forget what no reader asks for any more, by each source's window. An idle partition's time goes on."""
        positions = [reader.at for reader in self.readers if reader.at is not None]
        if not positions:
            return
        foremost = max(positions)
        if foremost != self._foremost[0]:
            self._foremost = (foremost, now)
        self.lowest = max(min(positions), foremost + now - self._foremost[1] - round(MAX_LAG * MICRO))
        self.covers_from = max(self.covers_from, self.lowest - max(windows.values(), default=0))
        for name, sightings in list(self.sources.items()):
            if name in windows:
                sightings.forget_before(max(self.origin, self.lowest - windows[name]))
            else:
                del self.sources[name]
