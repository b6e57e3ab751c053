"""One member of a consumer group: its partitions, which of their records are done, and the commits.

                 assigned                revoked: nothing more is read, attempts end
    (another's) ─────────▶ OURS ───────────────────▶ LEAVING ──▶ SUSPENDED ──assigned again──▶ OURS, of a new tracker
                             ▲                                       │
                             └── each record: read, tracked, done    └──assigned to another──▶ REASSIGNED

Its two subclasses process the records: `Router` and `OrderedRoute`.
"""

import asyncio
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping, Sequence

from gateway.engine.committer import Committer
from gateway.engine.dedupe.filter import DuplicateFilter, PartitionDedupe
from gateway.engine.delivery.dispatcher import Dispatcher
from gateway.engine.delivery.queues import IDLE_TICK
from gateway.engine.memory_shares import MemoryShares
from gateway.engine.partition_tracker import Ownership, PendingDelivery, PendingRecord, Stage, Tracker, to_be_moved
from gateway.engine.services import Services
from gateway.engine.unavailable_partitions import Unread, deleted_topics, still_unread
from gateway.log.base import Assignment, Batch, Commit, Consumer, Partition, Record
from gateway.log.records import footprint
from gateway.model import DeadLettered, Event, LogUnavailableError, NewerRecordError

FULL_POLL_INTERVAL = 0.02
"""Seconds between checks for free memory, while a partition waits for it."""
REVOKE_GRACE = 2.0
"""Seconds that attempts have to end when partitions are revoked. The whole group waits meanwhile."""

Loop = Callable[[], Coroutine[None, None, None]]


class GroupMember(ABC):
    """The listener of one consumer, and the owner of its trackers. Call `run` until cancelled, then `close`."""

    keeps_order = False
    """Whether the deliveries of a key are made in order; if so, those that have to wait do so in memory."""

    def __init__(
        self, services: Services, dispatcher: Dispatcher, duplicates: DuplicateFilter | None, group: str, *, memory: int
    ) -> None:
        self._services = services
        self._log = services.log
        self._dispatcher = dispatcher
        self._duplicates = duplicates
        self._dedupe_handles: dict[Tracker, PartitionDedupe] = {}  # of partitions of events
        self._group = group
        self._memory = MemoryShares(memory)
        self._memory_bytes = 0
        self._fetch_bytes = self._memory.fetch(0, 0)  # bytes that a fetch returns of a partition
        self.trackers: dict[Partition, Tracker] = {}
        self._leaving: list[Tracker] = []
        self._suspended: dict[Partition, Tracker] = {}
        self._postponed: dict[Tracker, None] = {}
        self._consumer: Consumer | None = None
        self._membership = asyncio.Lock()
        self.subscribed: frozenset[str] = frozenset()
        self.unread: Mapping[Partition, Unread] = {}
        self._changed = asyncio.Event()
        self._committer = Committer(
            services,
            group,
            trackers=self.trackers,
            leaving=self._leaving,
            dedupe_handles=self._dedupe_handles,
            consumer=lambda: self._consumer,
            metadata=self.commit_metadata,
        )
        self._is_draining = False
        self._abandons_attempts = False

    # What the subclasses define.

    @abstractmethod
    async def wanted(self) -> frozenset[str]:
        """Return the topics to read according to the active rules. Raises LogUnavailableError."""

    @abstractmethod
    async def on_batch(self, tracker: Tracker, batch: Batch) -> None:
        """Process records that were read."""

    @abstractmethod
    def resume(self, pending: PendingDelivery, now: float) -> None:
        """Continue with a delivery that has waited in memory, or whose partition was reassigned to us at once."""

    def is_ownership_fresh(self, pending: PendingDelivery) -> bool:  # noqa: ARG002 - ordered routes use it
        """Return whether an attempt may start now."""
        return True

    def finished(self, pending: PendingDelivery) -> None:
        """Handle a delivery that has ended, has a stored successor, or is continued by another record or owner."""
        if not pending.record.unfinished:
            self.done(pending.record)

    def try_halt(self, pending: PendingDelivery, outcome: DeadLettered) -> bool:  # noqa: ARG002 - ordered routes use it
        """Halt the key of a failed delivery instead of ending it, if its route says so; return whether it does."""
        return False

    @property
    def tiers(self) -> int:
        """How many of the partitions are those of tiers."""
        return 0

    def delay_of(self, topic: str) -> float | None:  # noqa: ARG002 - the router has tiers
        """Return the delay of a topic, if it is a tier."""
        return None

    def commit_metadata(self, tracker: Tracker, commit: Commit) -> bytes:  # noqa: ARG002 - ordered routes use it
        """Return the metadata of a commit, for the next owner of the partition."""
        return b""

    def assignment_changed(self) -> None:  # noqa: B027 - some need not know
        """Handle a change of the set of assigned partitions."""

    def loops(self) -> Iterable[tuple[str, Loop]]:
        """Return the loops that `run` runs, with the names of their tasks."""
        return (
            ("read", self._read),
            ("tick", self._keep_ticking),
            ("commit", self._committer.keep_committing),
            ("commit-when-due", self._committer.keep_committing_when_due),
        )

    # Lifecycle.

    async def run(self) -> None:
        """Read, process and commit, until cancelled. Errors of the log and bugs propagate."""
        async with asyncio.TaskGroup() as tasks:
            for name, loop in self.loops():
                tasks.create_task(loop(), name=f"{self._group}-{name}")

    def set_memory_limit(self, memory: int) -> None:
        """Set the limit, in bytes, of the records in memory."""
        self._memory = MemoryShares(memory)
        self._fetch_bytes = self._memory.fetch(len(self.trackers), self.tiers)

    @property
    def is_stopped(self) -> bool:
        """Whether `stop_reading` was called."""
        return self._is_draining

    def reload(self) -> None:
        """Apply changed rules before the next fetch."""
        self._changed.set()

    def stop_reading(self) -> list[PendingDelivery]:
        """Stop reading, and start no waiting delivery any more; return those that must be written to a tier first."""
        self._is_draining = True
        waiting = [
            pending for tracker in (*self.trackers.values(), *self._suspended.values()) for pending in tracker.waiting
        ]
        self._dispatcher.withdraw(waiting)
        return to_be_moved(waiting)

    async def close(self, *, let_attempts_end: bool = False) -> None:
        """Commit, and leave the group; with `let_attempts_end`, wait for the attempts in flight first."""
        self._abandons_attempts = not let_attempts_end
        async with self._membership:  # another task may be leaving, or joining
            await self._leave()

    async def _leave(self) -> None:
        if self._consumer is not None:
            try:
                await self._consumer.close()  # what ends meanwhile is still committed
            finally:
                self._consumer = None

    def forget_partitions(self, excluding: Collection[Partition] = ()) -> None:
        """Forget the suspended partitions, `excluding` these: they aren't coming back."""
        for partition in self._suspended.keys() - set(excluding):
            self._abandon(self._suspended.pop(partition))

    # The listener of the consumer.

    def assigned(self, assignments: Sequence[Assignment], without_position: Collection[Partition] = ()) -> None:
        """Start or continue with these partitions; those `without_position` keep their suspended state for now."""
        returning: list[PendingDelivery] = []
        for assignment in assignments:
            partition = assignment.partition
            tracker = Tracker(assignment, self, self.delay_of(partition.topic))
            if tracker.delay is None and self._duplicates is not None:
                self._dedupe_handles[tracker] = self._duplicates.acquire(assignment)
            self._count_lost(partition, tracker.progress.lost)
            is_recreated = self.is_of_another_log(assignment)
            old = self._suspended.pop(partition, None)
            if old is not None:
                if not self.keeps_order and not is_recreated:
                    returning += tracker.adopt(old)
                self._abandon(old)
            self.trackers[partition] = tracker
            if assignment.is_stale:
                self._committer.hasten()
        self.forget_partitions(excluding=without_position)
        self.assignment_changed()
        self._fetch_bytes = self._memory.fetch(len(self.trackers), self.tiers)
        now = self._log.now()
        for pending in returning:
            self.resume(pending, now)

    def is_of_another_log(self, assignment: Assignment) -> bool:
        """Return whether a suspended partition that is assigned again belongs to a recreated topic."""
        old = self._suspended.get(assignment.partition)
        return old is not None and old.progress.is_of_another_log(assignment)

    async def revoked(self, partitions: Sequence[Partition]) -> Mapping[Partition, Commit]:
        """Give these partitions up: let attempts in flight end, so that no other owner repeats them.

        Return the commits, for the consumer to store.
        """
        leaving = [self.trackers.pop(partition) for partition in partitions if partition in self.trackers]
        for tracker in leaving:
            tracker.ownership = Ownership.LEAVING
            tracker.buffered.clear()
        self._leaving += leaving
        waiting = [pending for tracker in leaving for pending in tracker.waiting]
        self._dispatcher.withdraw(waiting)
        await self._let_attempts_end(leaving, waiting)
        commits = await self._committer.last_commits(leaving)
        for tracker in leaving:
            tracker.progress.is_committed = tracker.progress.is_committed or tracker in commits
            tracker.ownership = Ownership.SUSPENDED
            self._suspended[tracker.partition] = tracker
        self._leaving.clear()
        return {tracker.partition: commit for tracker, commit in commits.items()}

    def records_deleted(self, partition: Partition, deleted: range) -> None:
        """Count the records that the log deleted before they were read."""
        tracker = self.trackers.get(partition)
        if tracker is not None:
            self._count_lost(partition, tracker.progress.records_deleted(deleted))

    def restarted(self, assignment: Assignment) -> None:
        """Forget what was read of a partition, and start over."""
        tracker = self.trackers.pop(assignment.partition, None)
        if tracker is not None:
            tracker.ownership = Ownership.LEAVING
            tracker.buffered.clear()
            self._dispatcher.withdraw(tracker.waiting)
            self._abandon(tracker)
        self.assigned([assignment], without_position=list(self._suspended))

    def _count_lost(self, partition: Partition, count: int) -> None:
        self._services.metrics.records_lost.labels(partition.topic).inc(count)
        if count:
            self._services.logger.error(
                "records_lost", topic=partition.topic, partition=partition.number, group=self._group, count=count
            )

    async def _let_attempts_end(self, leaving: Collection[Tracker], waiting: Iterable[PendingDelivery]) -> None:
        """Wait for attempts and appends. Waiting deliveries that the next owner mustn't repeat move to a tier."""
        for pending in to_be_moved(waiting):
            self._dispatcher.move_to_tier(pending)
        await self._wait_until_idle(leaving, REVOKE_GRACE)

    async def _wait_until_idle(self, leaving: Iterable[Tracker], timeout: float) -> list[PendingRecord]:
        """Wait up to `timeout` seconds until no record of these partitions is busy; return those that still are."""
        until = asyncio.get_running_loop().time() + timeout
        busy = [record for tracker in leaving for record in tracker.records.values() if record.is_busy]
        while busy and not self._abandons_attempts and asyncio.get_running_loop().time() < until:
            await self._services.sleep(0.01)
            busy = [record for record in busy if record.is_busy]
        return busy

    def _abandon(self, tracker: Tracker) -> None:
        """Drop what another owner reads again; what is in flight ends without effect."""
        tracker.ownership = Ownership.REASSIGNED
        if tracker in self._dedupe_handles:
            self._dedupe_handles.pop(tracker).release()
        for record in tracker.records.values():
            if record.tracker is not tracker:
                continue  # adopted
            for pending in record.deliveries:
                if pending.stage is Stage.WAITING:
                    pending.stage = Stage.FINISHED
                    record.unfinished -= 1
            if record.unfinished == 0:
                self._release_memory(record)
                record.deliveries.clear()  # breaks a cycle, which would stay for an hour if frozen (`garbage.py`)
        self._dispatcher.release_waiting_appends(tracker)

    # Reading.

    async def subscribe(self) -> None:
        """Subscribe to the wanted topics, if they have changed."""
        wanted = await self.wanted()
        if self._consumer is not None and wanted == self.subscribed:
            return
        async with self._membership:
            await self._leave()
            if wanted and not self._is_draining:
                self.subscribed = wanted
                self._consumer = await self._log.consume(group=self._group, topics=sorted(wanted), listener=self)

    async def _read(self) -> None:
        while not self._is_draining:
            if self._changed.is_set():
                self._changed.clear()
                try:
                    await self.subscribe()
                except LogUnavailableError as error:
                    self._services.logger.warning("subscription_retried", group=self._group, error=str(error))
                    self._changed.set()
                    await self._services.sleep(1.0)
                    continue
            if self._consumer is None:
                await self._services.sleep(IDLE_TICK)
                continue
            if not self.has_room:
                await self._services.sleep(FULL_POLL_INTERVAL)
                continue
            for postponed in list(self._postponed):
                await self._take_postponed(postponed)
            timeout = FULL_POLL_INTERVAL if self._postponed else IDLE_TICK
            batches = await self._consumer.fetch(timeout=timeout, max_bytes=self._fetch_bytes)
            # Matched with the trackers right away: a batch that waits for the one before it may outlive its assignment,
            # and a tracker treats skipped offsets as gaps in the log.
            current = [
                (tracker, batch) for batch in batches if (tracker := self.trackers.get(batch.partition)) is not None
            ]
            await self._wait_for_dedupe(current)
            for tracker, batch in current:
                if not tracker.is_live:
                    continue
                first, last = batch.records[0].offset, batch.records[-1].offset
                is_in_reach = tracker.progress.reaches(last, first) and not tracker.buffered
                if is_in_reach or tracker.delay is not None:
                    await self.on_batch(tracker, batch)
                else:
                    self.postpone(tracker, batch.records)
                    await self._take_postponed(tracker)

    def postpone(self, tracker: Tracker, records: Sequence[Record]) -> None:
        """Buffer records that can't be processed yet, and pause their partition."""
        tracker.buffered.extend(records, self._log.now())
        self._postponed[tracker] = None
        self.pause(tracker)

    async def _take_postponed(self, tracker: Tracker) -> None:
        """Process postponed records, as far as the offset window (the log may have a gap) and memory allow."""
        buffered, progress = tracker.buffered, tracker.progress
        while buffered and tracker.is_live and self.has_room_for(tracker) and progress.reaches(buffered.first.offset):
            await self.on_batch(tracker, Batch(tracker.partition, (buffered.pop(),)))
        if not buffered or not tracker.is_live:
            self._postponed.pop(tracker, None)

    async def _wait_for_dedupe(self, current: Iterable[tuple[Tracker, Batch]]) -> None:
        """Wait briefly until the dedupe index of newly assigned partitions is rebuilt."""
        new = [
            handle.ready(batch.records[0])
            for tracker, batch in current
            if tracker.progress.last_received is None and (handle := self._dedupe_handles.get(tracker)) is not None
        ]
        if new:
            await asyncio.gather(*new)

    def is_duplicate(self, tracker: Tracker, record: Record, event: Event) -> bool:
        """Return whether an event duplicates an earlier one, and so isn't delivered."""
        handle = self._dedupe_handles.get(tracker)
        return handle is not None and handle.is_duplicate(record, event)

    @property
    def has_room(self) -> bool:
        """Whether any memory is free for pending records."""
        return self._memory_bytes < self._memory.pending

    def has_room_for(self, tracker: Tracker) -> bool:
        """Return whether there is memory for another record of a partition: in the shared part, or else in its own."""
        if self._memory_bytes < self._memory.common:
            return True
        return self.has_room and tracker.memory_bytes < self._memory.own(len(self.trackers))

    def track(self, tracker: Tracker, record: Record, now: float) -> PendingRecord | None:
        """Start tracking a record. Return None if there is nothing to do: it is done, or already pending here."""
        pending_record = tracker.track(record, footprint(record))
        if pending_record is not None:
            pending_record.taken_at = now
            self.add_memory(pending_record, pending_record.size)
        return pending_record

    def add_memory(self, record: PendingRecord, size: int) -> None:
        """Count bytes of memory for a record, until it is done."""
        record.memory_bytes += size
        record.tracker.memory_bytes += size
        self._memory_bytes += size

    def _release_memory(self, record: PendingRecord) -> None:
        record.tracker.memory_bytes -= record.memory_bytes
        self._memory_bytes -= record.memory_bytes

    def leave_to_newer_version(self, record: PendingRecord, error: NewerRecordError) -> None:
        """Leave a record in a newer format unfinished: no commit passes it until a newer version processes it."""
        tracker = record.tracker
        tracker.newer.add(record.offset)
        self._dispatcher.undecodable.report_newer(tracker.partition, record.offset, error)

    def pause(self, tracker: Tracker) -> None:
        if self._consumer is not None and tracker.is_live and not tracker.is_paused:
            tracker.is_paused = True
            self._consumer.pause(tracker.partition)

    def unpause(self, tracker: Tracker) -> None:
        if self._is_stopped_by_newer_record(tracker):
            return
        if self._consumer is not None and tracker.is_paused and tracker.progress.has_room():
            tracker.is_paused = False
            self._consumer.resume(tracker.partition)

    def _is_stopped_by_newer_record(self, tracker: Tracker) -> bool:
        """Return whether a partition can't continue: what follows a record in a newer format may have the same key."""
        return self.keeps_order and bool(tracker.newer)

    async def _keep_ticking(self) -> None:
        while not self._is_draining:
            self.tick()
            await self._services.sleep(IDLE_TICK)

    def tick(self) -> None:
        """Do the periodic work; called a few times a second."""
        found = self._consumer.unreadable() if self._consumer is not None else {}
        self.unread = still_unread(self.unread, found, self._log.now()) if found else {}
        if self.trackers and self._suspended and self._memory_bytes >= self._memory.common:
            self._make_room()
        for tracker in list(self.trackers.values()):
            self.check_progress(tracker)

    def _make_room(self) -> None:
        """Forget suspended partitions if they hold most of the memory, so that the assigned ones can be read."""
        records = [record for tracker in self._suspended.values() for record in tracker.records.values()]
        if sum([record.memory_bytes for record in records]) > self._memory.limit / 2:
            self.forget_partitions()

    def check_progress(self, tracker: Tracker) -> None:
        """Check one partition; called a few times a second."""
        if not tracker.buffered:
            self.unpause(tracker)

    def deleted_topics(self) -> set[str]:
        """Return the topics that have been missing for a while, and of which nothing is pending here."""
        trackers = (*self.trackers.values(), *self._leaving, *self._suspended.values())
        pending = {each.partition.topic for each in trackers if each.records or each.buffered}
        return deleted_topics(self.unread, self._log.now()) - pending

    def lag(self) -> dict[str, float]:
        """Return the number of records per topic that aren't tracked yet; NaN if any partition's is unknown."""
        lag: dict[str, float] = dict.fromkeys(self.subscribed, 0)
        consumer = self._consumer
        known = consumer.lag() if consumer is not None else {}
        for partition, tracker in self.trackers.items():
            unread = known.get(partition, math.nan)
            lag[partition.topic] = lag.get(partition.topic, 0) + unread + len(tracker.buffered)
        for partition in consumer.unreadable() if consumer is not None else ():
            lag[partition.topic] = math.nan
        return lag

    def oldest_pending(self, now: float) -> dict[str, float]:
        """Return per topic how long the lowest unfinished record of our partitions has waited.

        For a partition that can't be read, it is how long that has been so.
        """
        oldest: dict[str, float] = dict.fromkeys(self.subscribed, 0.0)
        for partition, tracker in self.trackers.items():
            since = tracker.oldest_pending()
            if since is not None:
                oldest[partition.topic] = max(oldest.get(partition.topic, 0.0), now - since)
        for partition, unread in self.unread.items():
            oldest[partition.topic] = max(oldest.get(partition.topic, 0.0), now - unread.since)
        return oldest

    def ages(self, now: float) -> dict[str, float]:
        """Return per topic how long ago its lowest unfinished record was appended.

        It is 0 if all tracked records are done or, of a tier, as long as none is due.
        """
        ages = {}
        for topic, unfinished in self.oldest_pending(now).items():
            ages[topic] = unfinished + (self.delay_of(topic) or 0.0) if unfinished else 0.0
        return ages

    # Progress.

    def done(self, record: PendingRecord) -> None:
        """Mark a record as done."""
        self._release_memory(record)
        record.tracker.mark_done(record)
        self._committer.count_done(is_waited_for=record.offset < record.tracker.reload_boundaries.highest)
        record.deliveries.clear()  # breaks a reference cycle, which would keep the body until a garbage collection
