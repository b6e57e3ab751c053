"""Tell which events are copies of others, and keep what that takes in the log: `gateway.dedupe`.

    assigned ──▶ acquire ──▶ rebuilt from gateway.dedupe ──▶ ready ──▶ is_duplicate, for each event that is read
                                       ▲                                    │ sightings
                                       └──────────── flush ◀────────────────┘ ... then the commit that covers them

What is decided of an event stands in `dedupe.py`. Here is the order of things that makes it hold: a sighting is
stored before the commit after which nobody reads its event again. So the next owner of the partition finds it, or reads
the event itself. Sightings are facts: those that are stored twice, late or by an owner of before do no harm.

While it isn't known what had come before, everything is let through, and counted: rather twice than never.
"""

import asyncio
import math
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, assert_never

from structlog.typing import FilteringBoundLogger

from gateway.engine.dedupe import Sightings, Verdict
from gateway.engine.unreadable import Unreadable
from gateway.log.base import Assignment, Log, Partition, Record, partition_of
from gateway.log.records import SIGHTING, decode_sightings, encode_sightings, fingerprint, sightings_key
from gateway.log.topics import Topics
from gateway.model import Event, LogUnavailableError, NewerRecordError, UndecodableRecordError, identity_of
from gateway.rules.rules import Rules
from gateway.telemetry.metrics import Metrics
from gateway.telemetry.seldom import Seldom

PATIENCE = 2.0
"""Seconds after an assignment for which a partition waits to know what had come before."""
SKEW = 60.0
"""Seconds by which the clocks of two partitions' leaders may differ."""
FLUSHED_AT_ONCE = 16_384
"""Sightings in one record, at most."""
RESTORED_AT_ONCE = 1_000
"""Sightings between which other tasks get their turn: a millisecond or two."""
MAX_LAG = 2 * 3600.0
"""Seconds by which one reader of a partition may be behind another (or behind the time) and still find all it needs."""
SWEEP_EVERY = 1.0
REPEAT_AFTER = 1.0

_MICRO = 1_000_000
_NEVER = math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shared:
    """What the readings of all partitions share."""

    log: Log
    topics: Topics
    rules: Callable[[], Rules]
    metrics: Metrics
    logger: FilteringBoundLogger
    seldom: Seldom = field(default_factory=Seldom)

    def windows(self, topic: str) -> dict[str, int]:
        """Return the windows, in microseconds, of the sources that append to a topic and have one."""
        return {
            name: round(source.dedupe * _MICRO)
            for name, source in self.rules().sources.items()
            if source.dedupe is not None and (source.topic or self.topics.events(name)) == topic
        }

    def window(self, topic: str) -> int:
        """Return the longest of a topic's windows, in microseconds; 0 if there is none."""
        return max(self.windows(topic).values(), default=0)


class Duplicates:
    """The sightings of all partitions of events that this process reads. `run` until cancelled."""

    def __init__(
        self,
        *,
        log: Log,
        topics: Topics,
        rules: Callable[[], Rules],
        metrics: Metrics,
        logger: FilteringBoundLogger,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._shared = _Shared(log=log, topics=topics, rules=rules, metrics=metrics, logger=logger)
        self._log = log
        self._topic = topics.dedupe
        self._rules = rules
        self._metrics = metrics
        self._logger = logger
        self._sleep = sleep
        self._stores: dict[Partition, _Store] = {}
        self._is_wanted = asyncio.Event()
        self._is_stuck = asyncio.Event()
        self._repeated = Seldom()
        self._unread: Mapping[int, str] = {}
        self._unreadable = Unreadable(topics=topics, metrics=metrics, logger=logger, now=log.now)
        self._told: dict[int, int] = {}

    def acquire(self, assignment: Assignment) -> "Reader":
        """Begin to read a partition of events; the reader is to be released when the partition is lost.

        Where it comes straight back, acquire it again before the reader of before is released: it then knows what that
        one knew.
        """
        partition, commit, log_start, _ = assignment
        window = self._shared.window(partition.topic)
        # The first record will be older than this moment, but seldom by much.
        since = round((self._log.now() - SKEW) * _MICRO) - window
        store = self._stores.get(partition)
        if store is None:
            store = self._stores[partition] = _Store(partition, self._is_wanted, self._is_stuck)
            if commit.base == log_start and not any(commit.done):
                # All that there is will be read, and what is said to be older isn't of this log.
                store.begin_at_next()
            elif window:
                store.need(since)
        elif window:
            # Others may have read on, and stored what they saw.
            store.need(store.high_at or since)
        reader = Reader(self._shared, self._stores, store)
        store.readers.add(reader)
        return reader

    async def run(self) -> None:
        """Rebuild what is acquired, and forget what is out of every window. Raises what a bug makes it raise."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._keep_rebuilding(), name="dedupe-rebuild")
            tasks.create_task(self._keep_flushing(), name="dedupe-flush")
            tasks.create_task(self._keep_sweeping(), name="dedupe-sweep")

    def unread(self) -> Mapping[Partition, str]:
        """Tell what of `gateway.dedupe` is wanted and can't be read, and why: copies are let through meanwhile."""
        return {Partition(self._topic, number): reason for number, reason in self._unread.items()}

    # Rebuilding.

    async def _keep_rebuilding(self) -> None:
        while True:
            await self._is_wanted.wait()
            self._is_wanted.clear()
            stores = [store for store in self._stores.values() if store.wanted < _NEVER or store.left]
            if not stores:
                self._unread = {}
                continue
            try:
                await self._rebuild(stores)
            except LogUnavailableError as error:
                self._logger.warning("dedupe_rebuild_retried", error=str(error))
                self._is_wanted.set()
                await self._sleep(REPEAT_AFTER)
            else:
                if self._unread:
                    self._is_wanted.set()
                    await self._sleep(REPEAT_AFTER)

    async def _rebuild(self, stores: Collection["_Store"]) -> None:
        """Read what `gateway.dedupe` has of these partitions, all of them in one scan, and of it what can be read.

        What can't is left to the next scan, and only those wait for it whose sightings go there now.
        """
        began = self._log.now()
        for store in stores:
            # By the windows in force: what was forgotten before one was made longer is wanted now.
            store.forget(round(began * _MICRO), self._shared.windows(store.partition.topic))
        bounds, unread = await self._log.readable(self._topic)
        partitions = len(bounds) + len(unread)
        asked = {store: store.asking() for store in stores}
        wanted = {number for number in bounds if any(each.has(number) for each in asked.values())}
        first_at = max(0.0, min([each.since for each in asked.values()]) / _MICRO - SKEW)
        starts = await self._log.offsets_at(self._topic, first_at, wanted) if wanted else {}
        count, missed = 0, dict(unread)
        for number in sorted(wanted):
            by_key = {store.key: store for store, each in asked.items() if each.has(number)}
            first, end = bounds[number]
            try:
                count += await self._read(by_key, number, starts.get(number, first), end)
            except LogUnavailableError as error:
                missed[number] = str(error)
        for store, each in asked.items():
            left = {number for number in missed if each.has(number)}
            store.has_read(each, left, is_known=partition_of(store.key, partitions or 1) not in left)
        self._unread = {
            number: reason for number, reason in missed.items() if any(each.has(number) for each in asked.values())
        }
        if wanted:
            seconds = round(self._log.now() - began, 3)
            known = sum([store.wanted == _NEVER for store in asked])
            self._logger.info("dedupe_rebuilt", partitions=known, identities=count, seconds=seconds)

    async def _read(self, by_key: Mapping[bytes, "_Store"], number: int, start: int, end: int) -> int:
        count = 0
        async for records in self._log.scan(Partition(self._topic, number), start, end):
            for record in records:
                found = by_key.get(record.key)
                if found is not None and found.readers:
                    count += await self._restore(found, record, number)
            await self._sleep(0)
        return count

    async def _restore(self, store: "_Store", record: Record, number: int) -> int:
        try:
            sighted = decode_sightings(record)
        except UndecodableRecordError as error:
            if record.offset > self._told.get(number, -1):  # it is read with each rebuilding
                self._told[number] = record.offset
                self._unreadable.set_aside(self._topic, record.offset, error)
            return 0
        except NewerRecordError as error:
            self._unreadable.leave(Partition(self._topic, number), record.offset, error)
            return 0
        source = self._rules().sources.get(sighted.source)
        if source is None or source.dedupe is None:
            return 0
        store.begins_at(sighted.origin)
        step = SIGHTING.size * RESTORED_AT_ONCE
        for start in range(0, len(sighted.rows), step):
            store.of(sighted.source).restore(sighted.rows[start : start + step])
            await self._sleep(0)
        return len(sighted.rows) // SIGHTING.size

    # Storing again what couldn't be stored.

    async def _keep_flushing(self) -> None:
        """Store what was seen of partitions whose sightings weren't taken: no commit has to wait for an answer then."""
        while True:
            await self._is_stuck.wait()
            self._is_stuck.clear()
            next_at = asyncio.get_running_loop().time() + REPEAT_AFTER
            stuck = [store for store in self._stores.values() if store.is_stuck]
            for failed in await asyncio.gather(*[store.flush(self._shared) for store in stuck], return_exceptions=True):
                if isinstance(failed, LogUnavailableError):
                    self._tell_repeated(failed)
                elif failed is not None:
                    raise failed
            await self._sleep(max(0.0, next_at - asyncio.get_running_loop().time()))

    def _tell_repeated(self, error: LogUnavailableError) -> None:
        if count := self._repeated.count(self._topic, self._log.now()):
            self._logger.warning("append_retried", topic=self._topic, count=count, error=str(error))

    # Forgetting.

    async def _keep_sweeping(self) -> None:
        while True:
            await self._sleep(SWEEP_EVERY)
            self._sweep()

    def _sweep(self) -> None:
        now = round(self._log.now() * _MICRO)
        for store in self._stores.values():
            store.forget(now, self._shared.windows(store.partition.topic))
            for sightings in store.sources.values():
                sightings.sweep()
        self._set_gauges()

    def _set_gauges(self) -> None:
        metrics = self._metrics
        for gauge in (*metrics.dedupe_identities.values(), *metrics.dedupe_rebuilding.values()):
            gauge.set(0)
        for store in self._stores.values():
            topic = store.partition.topic
            identities, rebuilding = metrics.dedupe_identities.labels(topic), metrics.dedupe_rebuilding.labels(topic)
            identities.set(identities.value + sum([sightings.count for sightings in store.sources.values()]))
            rebuilding.set(rebuilding.value + (store.wanted < _NEVER))


class Reader:
    """The reading of one partition, from its assignment to its loss. Made by `Duplicates.acquire`."""

    def __init__(self, shared: _Shared, stores: "dict[Partition, _Store]", store: "_Store") -> None:
        self._shared = shared
        self._stores = stores
        self._store = store
        self._patient_until = asyncio.get_running_loop().time() + PATIENCE
        self.at: int | None = None
        """When the record was appended that was looked at last."""

    async def ready(self, first: Record) -> bool:
        """Wait until it is known what had come before the first record of the partition that was read.

        False if that is still unknown `PATIENCE` seconds after the partition was acquired. Nothing is wrong then, but
        that copies are let through.
        """
        store, windows = self._store, self._shared.windows(self._store.partition.topic)
        if not windows:
            return True
        self.at = round(first.appended_at * _MICRO)
        store.forget(round(self._shared.log.now() * _MICRO), windows)  # and nothing that this reader needs
        try:
            async with asyncio.timeout_at(self._patient_until):
                while not store.knows(self.at, max(windows.values())) and not store.is_past(self.at):
                    await store.known.wait()
        except TimeoutError:
            return False
        return not store.is_past(self.at)

    def is_duplicate(self, record: Record, event: Event) -> bool:
        """Return whether an event is a copy of another one in this partition, and so is to be delivered no more.

        To be asked of every event that is read and isn't done, in order, before it is matched. Costs some 5 µs.
        """
        source = self._shared.rules().sources.get(event.source)
        if source is None or source.dedupe is None:
            return False
        identity = identity_of(event.id)
        if identity is None:
            return False
        store = self._store
        window, self.at = round(source.dedupe * _MICRO), round(record.appended_at * _MICRO)
        store.saw(record.offset, self.at)
        is_known = store.knows(self.at, window)
        row = SIGHTING.pack(identity, fingerprint(event), record.offset, self.at)
        verdict = store.of(event.source).judge(row, window)
        self._note(event.source, verdict, row, is_known=is_known)
        if verdict is Verdict.DUPLICATE:
            self._shared.metrics.let_go_events.add(event)
            self._tell(event, row, window)
        return verdict is Verdict.DUPLICATE

    def _tell(self, event: Event, row: bytes, window: int) -> None:
        """Say of which event one is a copy: of each source once a second, and how many there were."""
        count = self._shared.seldom.count(event.source, asyncio.get_running_loop().time())
        if count:
            (topic, number), (_, _, offset, _) = self._store.partition, SIGHTING.unpack(row)
            original = self._store.of(event.source).original(row, window)
            self._shared.logger.info(
                "event_duplicate",
                source=event.source,
                event_id=event.id,
                place=f"{topic}/{number}@{offset}",
                copy_of=None if original is None else f"{topic}/{number}@{original}",
                count=count,
            )

    def _note(self, source: str, verdict: Verdict, row: bytes, *, is_known: bool) -> None:
        metrics = self._shared.metrics
        match verdict:
            case Verdict.DUPLICATE:
                metrics.duplicates.labels(source).inc()
                return
            case Verdict.CONFLICT:
                metrics.dedupe_conflicts.labels(source).inc()
            case Verdict.NEW if not is_known:
                metrics.dedupe_undecided.labels(source).inc()
            case Verdict.NEW:
                pass
            case _:
                assert_never(verdict)
        # Also where the sighting was there: who read the event before may not have stored it.
        self._store.fresh.setdefault(source, bytearray()).extend(row)

    @property
    def is_flushed(self) -> bool:
        """Whether all that was seen is stored."""
        return self._store.is_flushed

    async def flush(self) -> None:
        """Store what was seen up to now.

        A commit must cover nothing that was seen after the last flush that returned: work out what to commit, flush,
        commit. Raises LogUnavailableError; the commit is then to be left, and flushing again is always safe. Where the
        last one failed and the next is under way it raises at once: the commits of others don't wait for that.
        """
        if self._store.is_tried_again:
            raise LogUnavailableError(f"{self._shared.topics.dedupe}: what was seen isn't stored yet")
        await self._store.flush(self._shared)

    def release(self) -> None:
        """Let go of the partition."""
        store = self._store
        store.readers.discard(self)
        if not store.readers:
            store.fresh.clear()  # whom the partition is now reads those events again
        if not store.readers and self._stores.get(store.partition) is store:
            del self._stores[store.partition]


class _Asked(NamedTuple):
    """What a store asks for: what was stored since a time, in these partitions of `gateway.dedupe` or in all."""

    number: int
    since: float
    left: frozenset[int] | None

    def has(self, number: int) -> bool:
        return self.left is None or number in self.left


class _Store:
    """What is known of one partition. Times are microseconds of the log's clock.

    All that came between `covers_from` and now is known, unless something is `wanted`: then sightings that were stored
    since that time have to be read.
    """

    def __init__(self, partition: Partition, is_wanted: asyncio.Event, is_stuck_somewhere: asyncio.Event) -> None:
        self.partition = partition
        self.key = sightings_key(partition)
        self.readers: set[Reader] = set()
        self.sources: dict[str, Sightings] = {}
        self.fresh: dict[str, bytearray] = {}
        self.is_stuck = False
        """Whether the last flush failed."""
        self._flushing = asyncio.Lock()
        self._is_stuck_somewhere = is_stuck_somewhere
        self.covers_from: float = _NEVER
        self.wanted: float = _NEVER
        self.known = asyncio.Event()
        self.asked = 0
        self.left: frozenset[int] | None = None
        """Partitions of `gateway.dedupe` that are left of what was asked for; None for all of them."""
        self.left_since: float = _NEVER
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

    def asking(self) -> _Asked:
        """Return what is asked for now."""
        return _Asked(self.asked, min(self.wanted, self.left_since), self.left)

    def has_read(self, asked: _Asked, left: Collection[int], *, is_known: bool) -> None:
        """Note that what was asked for has been read, but for what is `left` of it.

        It is known where none of that is where the sightings go now: that is where they were but for a topic that grew.
        """
        if self.asked != asked.number:
            self._is_wanted.set()
            return
        self.left, self.left_since = frozenset(left), asked.since if left else _NEVER
        if is_known and self.wanted < _NEVER:
            self.covers_from = min(self.covers_from, self.wanted)
            self.wanted = _NEVER
            self.known.set()

    @property
    def is_tried_again(self) -> bool:
        """Whether a flush is under way after one that failed."""
        return self.is_stuck and self._flushing.locked()

    @property
    def is_flushed(self) -> bool:
        """Whether nothing is left to store, and nothing is being stored."""
        return not (any(self.fresh.values()) or self._flushing.locked())

    async def flush(self, shared: _Shared) -> None:
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
        return self.wanted == _NEVER

    def begin_at_next(self) -> None:
        """Take the next event for the first one that this partition ever had."""
        self.covers_from = -_NEVER
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
        self.lowest = max(min(positions), foremost + now - self._foremost[1] - round(MAX_LAG * _MICRO))
        self.covers_from = max(self.covers_from, self.lowest - max(windows.values(), default=0))
        for name, sightings in list(self.sources.items()):
            if name in windows:
                sightings.forget_before(max(self.origin, self.lowest - windows[name]))
            else:
                del self.sources[name]
