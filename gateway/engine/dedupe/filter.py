"""Recognise duplicate events, and keep the entries that this takes in the log: `gateway.dedupe`.

    assigned ──▶ acquire ──▶ rebuilt from gateway.dedupe ──▶ ready ──▶ is_duplicate, for each event that is read
                                       ▲                                    │ entries
                                       └──────────── flush ◀────────────────┘ ... then the commit that covers them

`index.py` decides. This module ensures the sequence that makes it work: an entry (identity, content, offset, time) is
stored before the commit after which nobody reads its event again. So the next owner of the partition finds the entry,
or reads the event itself. Entries are facts: it does no harm if they are stored twice, late or by a previous owner.

While the earlier entries aren't known, every event is let through, and counted: a repeated delivery beats a lost one.
"""

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import assert_never

from structlog.typing import FilteringBoundLogger

from gateway.engine.dedupe.index import DedupeVerdict
from gateway.engine.dedupe.store import MICRO, NEVER, Shared, Store, WindowsByTopic
from gateway.engine.undecodable_records import UndecodableRecords
from gateway.log.base import LEADER_CLOCK_SKEW, Assignment, Log, Partition, Record, partition_of
from gateway.log.records import DEDUPE_ENTRY, decode_dedupe_entries, fingerprint
from gateway.log.topics import Topics
from gateway.model import Event, LogUnavailableError, NewerRecordError, UndecodableRecordError, identity_of
from gateway.rules.rules import Rules
from gateway.telemetry.log_throttle import LogThrottle
from gateway.telemetry.metrics import Family, Gauge, Metrics

RESTORE_TIMEOUT = 2.0
"""Seconds after an assignment for which a partition waits for its earlier entries."""
RESTORED_AT_ONCE = 1_000
"""Entries restored before other tasks run: a millisecond or two."""
SWEEP_EVERY = 1.0
SWEPT_AT_ONCE = 200
"""Partitions, and sources in them, that are swept before other tasks run: a millisecond or two."""
REPEAT_AFTER = 1.0


class DuplicateFilter:
    """The dedupe entries of all partitions of events that this process reads. Call `run` until cancelled.

    Call `reload` once new rules are active.
    """

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
        self._windows = WindowsByTopic(topics, rules)
        self._shared = Shared(
            log=log, topics=topics, rules=rules, windows=self._windows, metrics=metrics, logger=logger
        )
        self._log = log
        self._topic = topics.dedupe
        self._rules = rules
        self._metrics = metrics
        self._logger = logger
        self._sleep = sleep
        self._stores: dict[Partition, Store] = {}
        self._is_wanted = asyncio.Event()
        self._is_stuck = asyncio.Event()
        self._repeated = LogThrottle()
        self._unread: Mapping[int, str] = {}
        self._undecodable = UndecodableRecords(topics=topics, metrics=metrics, logger=logger, now=log.now)
        self._counted_to: dict[int, int] = {}

    def acquire(self, assignment: Assignment) -> "PartitionDedupe":
        """Acquire a partition of events; release the reader when the partition is lost.

        If the partition comes straight back, acquire it again before releasing the previous reader: the new one then
        has its entries.
        """
        partition, commit, log_start, *_ = assignment
        window = self._windows.of(partition.topic).longest
        # The first record will be older than this moment, but seldom by much.
        since = round((self._log.now() - LEADER_CLOCK_SKEW) * MICRO) - window
        store = self._stores.get(partition)
        if store is None:
            store = self._stores[partition] = Store(partition, self._is_wanted, self._is_stuck)
            if commit.base == log_start and not any(commit.done):
                # Everything will be read, and entries that claim to be older belong to another log.
                store.begin_at_next()
            elif window:
                store.request_rebuild(since)
        elif window:
            # Others may have read further, and stored entries.
            store.request_rebuild(store.high_at or since)
        handle = PartitionDedupe(self._shared, self._stores, store)
        store.readers.add(handle)
        return handle

    def reload(self) -> None:
        """Apply new rules, and let go of the former."""
        self._windows.compute()
        now = round((self._log.now() - LEADER_CLOCK_SKEW) * MICRO)
        for store in self._stores.values():
            windows = self._windows.of(store.partition.topic)
            store.include_all(windows, now)
            store.lengthen(windows, now)

    def count_undecided(self, event: Event) -> None:
        """Count an event that is delivered whatever came before it: where it was read, its source wasn't known."""
        source = self._rules().sources.get(event.source)
        if source is not None and source.dedupe is not None and identity_of(event.id) is not None:
            self._metrics.dedupe_undecided.labels(event.source).inc()

    async def run(self) -> None:
        """Rebuild acquired partitions, and expire entries beyond all windows. Bugs propagate."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._keep_rebuilding(), name="dedupe-rebuild")
            tasks.create_task(self._keep_flushing(), name="dedupe-flush")
            tasks.create_task(self._keep_sweeping(), name="dedupe-sweep")

    def unreadable(self) -> Mapping[Partition, str]:
        """Return the needed partitions of `gateway.dedupe` that can't be read, and why: duplicates pass meanwhile."""
        return {Partition(self._topic, number): reason for number, reason in self._unread.items()}

    # Rebuilding.

    async def _keep_rebuilding(self) -> None:
        while True:
            await self._is_wanted.wait()
            self._is_wanted.clear()
            stores = [store for store in self._stores.values() if store.wanted < NEVER or store.unread]
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

    async def _rebuild(self, stores: Collection["Store"]) -> None:
        """Read the entries of these partitions, all in one scan, as far as they can be read.

        Unreadable partitions are left to the next scan; only those stores wait for it whose entries go there now.
        """
        began = self._log.now()
        for store in stores:
            # By the active windows: entries forgotten before one was made longer are needed now.
            store.forget(round(began * MICRO), self._windows.of(store.partition.topic))
        bounds, unread = await self._log.readable(self._topic)
        partitions = len(bounds) + len(unread)
        asked = {store: store.request() for store in stores}
        wanted = {number for number in bounds if any(each.has(number) for each in asked.values())}
        first_at = max(0.0, min([each.since for each in asked.values()]) / MICRO - LEADER_CLOCK_SKEW)
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
            store.mark_read(each, left, is_known=partition_of(store.key, partitions or 1) not in left)
        self._unread = {
            number: reason for number, reason in missed.items() if any(each.has(number) for each in asked.values())
        }
        if wanted:
            seconds = round(self._log.now() - began, 3)
            known = sum([store.wanted == NEVER for store in asked])
            self._logger.info("dedupe_rebuilt", partitions=known, identities=count, seconds=seconds)

    async def _read(self, by_key: Mapping[bytes, "Store"], number: int, start: int, end: int) -> int:
        count = 0
        async for records in self._log.scan(Partition(self._topic, number), start, end):
            for record in records:
                found = by_key.get(record.key)
                if found is not None and found.readers:
                    count += await self._restore(found, record, number)
            await self._sleep(0)
        return count

    async def _restore(self, store: "Store", record: Record, number: int) -> int:
        try:
            entries = decode_dedupe_entries(record)
        except UndecodableRecordError as error:
            if record.offset > self._counted_to.get(number, -1):  # it is read in each rebuild
                self._counted_to[number] = record.offset
                self._undecodable.count_undecodable(self._topic, record.offset, error)
            return 0
        except NewerRecordError as error:
            self._undecodable.report_newer(Partition(self._topic, number), record.offset, error)
            store.leave_out_newer(record.appended_at)
            return 0
        source = self._rules().sources.get(entries.source)
        if source is None or source.dedupe is None:
            store.leave_out(entries.source, round(self._log.now() * MICRO))
            return 0
        store.set_origin(entries.origin)
        step = DEDUPE_ENTRY.size * RESTORED_AT_ONCE
        for start in range(0, len(entries.rows), step):
            store.index_of(entries.source).restore(entries.rows[start : start + step])
            await self._sleep(0)
        return len(entries.rows) // DEDUPE_ENTRY.size

    # Retrying failed flushes.

    async def _keep_flushing(self) -> None:
        """Retry failed flushes in the background, so that no commit has to wait for them."""
        while True:
            await self._is_stuck.wait()
            self._is_stuck.clear()
            next_at = asyncio.get_running_loop().time() + REPEAT_AFTER
            stuck = [store for store in self._stores.values() if store.is_stuck]
            for failed in await asyncio.gather(*[store.flush(self._shared) for store in stuck], return_exceptions=True):
                if isinstance(failed, LogUnavailableError):
                    self._log_retry(failed)
                elif failed is not None:
                    raise failed
            await self._sleep(max(0.0, next_at - asyncio.get_running_loop().time()))

    def _log_retry(self, error: LogUnavailableError) -> None:
        if count := self._repeated.count(self._topic, self._log.now()):
            self._logger.warning("append_retried", topic=self._topic, count=count, error=str(error))

    # Forgetting.

    async def _keep_sweeping(self) -> None:
        while True:
            await self._sleep(SWEEP_EVERY)
            await self._sweep()

    async def _sweep(self) -> None:
        now = round(self._log.now() * MICRO)
        identities: dict[str, int] = {}
        rebuilding: dict[str, int] = {}
        swept = 0
        for store in list(self._stores.values()):
            topic = store.partition.topic
            store.forget(now, self._windows.of(topic))
            for index in store.sources.values():
                index.sweep()
            identities[topic] = identities.get(topic, 0) + sum([each.count for each in store.sources.values()])
            rebuilding[topic] = rebuilding.get(topic, 0) + (store.wanted < NEVER)
            swept += 1 + len(store.sources)
            if swept >= SWEPT_AT_ONCE:
                swept = 0
                await self._sleep(0)
        await self._set_gauges(self._metrics.dedupe_identities, identities)
        await self._set_gauges(self._metrics.dedupe_rebuilding, rebuilding)

    async def _set_gauges(self, family: Family[Gauge], counts: Mapping[str, int]) -> None:
        """Set a gauge of each topic, those that this process doesn't read any more to 0."""
        for number, topic in enumerate({*counts, *[topic for (topic,) in family]}, 1):
            family.labels(topic).set(counts.get(topic, 0))
            if number % SWEPT_AT_ONCE == 0:
                await self._sleep(0)


class PartitionDedupe:
    """Dedupe of one partition for who reads it, from its assignment to its loss: made by `DuplicateFilter.acquire`."""

    def __init__(self, shared: Shared, stores: "dict[Partition, Store]", store: "Store") -> None:
        self._shared = shared
        self._stores = stores
        self._store = store
        self._restore_deadline = asyncio.get_running_loop().time() + RESTORE_TIMEOUT
        self.at: int | None = None
        """When the last checked record was appended."""

    async def ready(self, first: Record) -> bool:
        """Wait until the entries before the first record that was read are known.

        Return False if they are still unknown `RESTORE_TIMEOUT` seconds after the partition was acquired. Then
        duplicates pass, but nothing else is wrong.
        """
        store, windows = self._store, self._shared.windows.of(self._store.partition.topic)
        if not windows.by_source:
            return True
        self.at = round(first.appended_at * MICRO)
        store.forget(round(self._shared.log.now() * MICRO), windows)  # but nothing that this reader needs
        try:
            async with asyncio.timeout_at(self._restore_deadline):
                while not store.knows(self.at, windows.longest) and not store.is_past(self.at):
                    await store.known.wait()
        except TimeoutError:
            return False
        return not store.is_past(self.at)

    def is_duplicate(self, record: Record, event: Event) -> bool:
        """Return whether an event duplicates another one in this partition, and so isn't to be delivered.

        To be called for each event that is read and isn't done, in order, before it is matched. Costs some 5 µs.
        """
        source = self._shared.rules().sources.get(event.source)
        if source is None or source.dedupe is None:
            return False
        identity = identity_of(event.id)
        if identity is None:
            return False
        store = self._store
        window, self.at = round(source.dedupe * MICRO), round(record.appended_at * MICRO)
        store.record_read(record.offset, self.at)
        if store.is_left_out(event.source, self._shared.windows.of(store.partition.topic)):
            store.include(event.source, self.at - window)
        is_known = store.knows(self.at, window) and store.newer_until < self.at - window
        row = DEDUPE_ENTRY.pack(identity, fingerprint(event), record.offset, self.at)
        verdict = store.index_of(event.source).add(row, window)
        self._count(event.source, verdict, row, is_known=is_known)
        if verdict is DedupeVerdict.DUPLICATE:
            self._shared.metrics.duplicate_events.add(event)
            self._log_duplicate(event, row, window)
        return verdict is DedupeVerdict.DUPLICATE

    def _log_duplicate(self, event: Event, row: bytes, window: int) -> None:
        """Log the original of a duplicate: one line a second and source, with the number of duplicates."""
        count = self._shared.throttle.count(event.source, asyncio.get_running_loop().time())
        if count:
            (topic, number), (_, _, offset, _) = self._store.partition, DEDUPE_ENTRY.unpack(row)
            original = self._store.index_of(event.source).original(row, window)
            self._shared.logger.info(
                "event_duplicate",
                source=event.source,
                event_id=event.id,
                position=f"{topic}/{number}@{offset}",
                duplicate_of=None if original is None else f"{topic}/{number}@{original}",
                count=count,
            )

    def _count(self, source: str, verdict: DedupeVerdict, row: bytes, *, is_known: bool) -> None:
        metrics = self._shared.metrics
        match verdict:
            case DedupeVerdict.DUPLICATE:
                metrics.duplicates.labels(source).inc()
                return
            case DedupeVerdict.CONFLICT:
                metrics.dedupe_conflicts.labels(source).inc()
            case DedupeVerdict.NEW if not is_known:
                metrics.dedupe_undecided.labels(source).inc()
            case DedupeVerdict.NEW:
                pass
            case _:
                assert_never(verdict)
        # Even if the entry existed: the process that read the event before may not have stored it.
        self._store.unstored.setdefault(source, bytearray()).extend(row)

    @property
    def is_flushed(self) -> bool:
        """Whether all entries are stored."""
        return self._store.is_flushed

    async def flush(self) -> None:
        """Store all entries up to now.

        A commit must only cover events seen before a successful flush: compute the commit, flush, commit. Raises
        LogUnavailableError; then don't commit. Flushing again is always safe. If the last flush failed and the next one
        is in flight, it raises at once, so that the commits of others don't wait.
        """
        if self._store.is_tried_again:
            raise LogUnavailableError(f"{self._shared.topics.dedupe}: what was seen isn't stored yet")
        await self._store.flush(self._shared)

    def release(self) -> None:
        """Release the partition."""
        store = self._store
        store.readers.discard(self)
        if not store.readers:
            store.unstored.clear()  # the new owner of the partition reads those events again
        if not store.readers and self._stores.get(store.partition) is store:
            del self._stores[store.partition]
