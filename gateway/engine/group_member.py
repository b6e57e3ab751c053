"""One member of a consumer group: which partitions are ours, which of their records are done, and their commits.

                 assigned                revoked: nothing more is read, what is under way ends
    (another's) ─────────▶ OURS ───────────────────▶ LEAVING ──▶ SUSPENDED ──assigned again──▶ OURS, of a new tracker
                             ▲                                       │
                             └── every record: read, taken, done     └──assigned to another──▶ LOST

What is done with a record is for the two kinds of members to say: the `Router`, and an `Ordered` route.
"""

import asyncio
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Coroutine, Iterable, Mapping, Sequence

from gateway.engine.dedupe.filter import Duplicates, Reader
from gateway.engine.delivery.dispatcher import Dispatcher
from gateway.engine.delivery.schedule import IDLE_TICK
from gateway.engine.partition_tracker import Item, Ownership, Pending, Stage, Tracker
from gateway.engine.services import Services
from gateway.engine.unavailable_partitions import Unread, still_unread
from gateway.log.base import Assignment, Batch, Commit, Consumer, Partition, Record
from gateway.log.records import footprint
from gateway.model import DeadLettered, Event, LogUnavailableError, NewerRecordError
from gateway.telemetry.log_throttle import LogThrottle

COMMIT_EVERY = 1.0
"""Seconds within which what is done is committed, however little it is."""
COMMIT_AFTER = 64
"""Records done, of which the commit doesn't wait for its second: what isn't committed, a crash repeats."""
COMMIT_GAP = 0.05
"""Seconds that commits are apart at least: on Kafka each takes a third of a millisecond of processor time."""
FULL_POLL_INTERVAL = 0.005
"""Seconds after which a member that holds all it may looks whether something has ended."""
HANDOVER = 2.0
"""Seconds for which a member that gives partitions up lets attempts end. The whole group stands still meanwhile."""

Loop = Callable[[], Coroutine[None, None, None]]


class Member(ABC):
    """The listener of one consumer, and the owner of its trackers. `run` until cancelled, then `close`."""

    keeps_order = False
    """Whether the deliveries of a key follow each other; what has to wait then waits in memory."""

    def __init__(
        self, services: Services, dispatch: Dispatcher, duplicates: Duplicates | None, group: str, *, memory: int
    ) -> None:
        self._services = services
        self._log = services.log
        self._dispatch = dispatch
        self._duplicates = duplicates
        self._readers: dict[Tracker, Reader] = {}  # of partitions of events
        self._group = group
        self._memory = memory
        self._held = 0
        self.trackers: dict[Partition, Tracker] = {}
        self._leaving: Sequence[Tracker] = ()
        self._suspended: dict[Partition, Tracker] = {}
        self._aside: dict[Tracker, None] = {}
        self._consumer: Consumer | None = None
        self.subscribed: frozenset[str] = frozenset()
        self.unread: Mapping[Partition, Unread] = {}
        self._changed = asyncio.Event()
        self._done_count = 0  # records, since the last commit
        self._much_is_done = asyncio.Event()
        self._committing = asyncio.Lock()
        self._unflushed = LogThrottle()
        self._is_draining = False
        self._is_closing = False

    # What a kind of member does.

    @abstractmethod
    async def wanted(self) -> frozenset[str]:
        """Return the topics to read by the rules in force. Raises LogUnavailableError."""

    @abstractmethod
    async def take(self, tracker: Tracker, batch: Batch) -> None:
        """Act on records that were read."""

    @abstractmethod
    def resume(self, item: Item, now: float) -> None:
        """Send a delivery on that has waited in memory, or whose partition has come straight back."""

    def is_proof_fresh(self, item: Item) -> bool:  # noqa: ARG002 - ordered routes use it
        """Return whether an attempt may begin this moment."""
        return True

    def finished(self, item: Item) -> None:
        """Note that a delivery has its end, or an acknowledged successor."""
        if not item.pending.left:
            self.done(item.pending)

    def halt_instead(self, item: Item, end: DeadLettered) -> bool:  # noqa: ARG002 - ordered routes use it
        """Return whether a delivery that has ended without success stays where it is, instead of among the dead."""
        return False

    def delay_of(self, topic: str) -> float | None:  # noqa: ARG002 - the router has tiers
        """Return how long a topic's records wait after their append, if it is a tier."""
        return None

    def note(self, tracker: Tracker, commit: Commit) -> bytes:  # noqa: ARG002 - ordered routes use it
        """Return what a commit is to tell the next owner of a partition."""
        return b""

    def prune_lost(self) -> None:  # noqa: B027 - some need not know
        """Hear that other partitions are ours now."""

    def loops(self) -> Iterable[tuple[str, Loop]]:
        """Return what `run` runs, with the names of the tasks."""
        return (
            ("read", self._read),
            ("watch", self._keep_watch),
            ("commit", self._keep_committing),
            ("commit-much", self._keep_committing_much),
        )

    # Life.

    async def run(self) -> None:
        """Read, take and commit, until cancelled. Raises what a bug or a broken log makes it raise."""
        async with asyncio.TaskGroup() as tasks:
            for name, loop in self.loops():
                tasks.create_task(loop(), name=f"{self._group}-{name}")

    def allow(self, memory: int) -> None:
        """Let it hold so many bytes of records."""
        self._memory = memory

    @property
    def is_stopped(self) -> bool:
        """Whether it was told to take nothing in any more."""
        return self._is_draining

    def reload(self) -> None:
        """Look at the rules again before the next fetch."""
        self._changed.set()

    def stop_reading(self) -> list[Item]:
        """Take nothing in any more, and return the deliveries that wait, which nothing starts from here on."""
        self._is_draining = True
        waiting = [item for tracker in (*self.trackers.values(), *self._suspended.values()) for item in tracker.waiting]
        self._dispatch.withdraw(waiting)
        return waiting

    async def close(self, *, patiently: bool = False) -> None:
        """Commit, and leave the group; with `patiently`, let what is under way end first."""
        self._is_closing = not patiently
        if self._consumer is not None:
            consumer, self._consumer = self._consumer, None
            await consumer.close()

    def let_go(self) -> None:
        """Forget what was ours, after `close`: it isn't coming back."""
        for tracker in self._suspended.values():
            self._lose(tracker)
        self._suspended.clear()

    # The listener of the consumer.

    def assigned(self, assignments: Sequence[Assignment]) -> None:
        """Start, or go on, with these partitions."""
        returning: list[Item] = []
        for assignment in assignments:
            partition = assignment.partition
            tracker = Tracker(assignment, self, self.delay_of(partition.topic))
            if tracker.delay is None and self._duplicates is not None:
                self._readers[tracker] = self._duplicates.acquire(assignment)
            self._tell_lost(partition, tracker.progress.lost)
            is_another = self.is_of_another_log(assignment)
            old = self._suspended.pop(partition, None)
            if old is not None:
                if not self.keeps_order and not is_another:
                    returning += tracker.adopt(old)
                self._lose(old)
            self.trackers[partition] = tracker
        self.let_go()
        self.prune_lost()
        now = self._log.now()
        for item in returning:
            self.resume(item, now)

    def is_of_another_log(self, assignment: Assignment) -> bool:
        """Return whether a partition that was given up, and comes back, isn't the one any more that it was."""
        old = self._suspended.get(assignment.partition)
        return old is not None and old.progress.is_of_another_log(assignment)

    async def revoked(self, partitions: Sequence[Partition]) -> Mapping[Partition, Commit]:
        """Give these partitions up: let attempts under way end, so that no other owner repeats them, and commit."""
        leaving = [self.trackers.pop(partition) for partition in partitions if partition in self.trackers]
        for tracker in leaving:
            tracker.ownership = Ownership.LEAVING
            tracker.buffered.clear()
        self._leaving = leaving
        waiting = [item for tracker in leaving for item in tracker.waiting]
        self._dispatch.withdraw(waiting)
        await self._let_end(leaving, waiting)
        commits = await self._committable(leaving)
        for tracker in leaving:
            tracker.progress.is_committed = tracker.progress.is_committed or tracker in commits
            tracker.ownership = Ownership.SUSPENDED
            self._suspended[tracker.partition] = tracker
        self._leaving = ()
        return {tracker.partition: commit for tracker, commit in commits.items()}

    def records_deleted(self, partition: Partition, deleted: range) -> None:
        """Count what the log has deleted before it was read."""
        tracker = self.trackers.get(partition)
        if tracker is not None:
            self._tell_lost(partition, tracker.progress.records_deleted(deleted))

    def replaced(self, assignment: Assignment) -> None:
        """Forget what was read of a partition, and begin anew."""
        tracker = self.trackers.pop(assignment.partition, None)
        if tracker is not None:
            tracker.ownership = Ownership.LEAVING
            tracker.buffered.clear()
            self._dispatch.withdraw(tracker.waiting)
            self._lose(tracker)
        self.assigned([assignment])

    def _tell_lost(self, partition: Partition, count: int) -> None:
        self._services.metrics.records_lost.labels(partition.topic).inc(count)
        if count:
            self._services.logger.error(
                "records_lost", topic=partition.topic, partition=partition.number, group=self._group, count=count
            )

    async def _let_end(self, leaving: Collection[Tracker], waiting: Iterable[Item]) -> None:
        """Wait for what is under way; what was begun and waits again is carried on by a tier, as reading it repeats."""
        for item in waiting:
            if item.pending.has_begun:
                self._dispatch.carry_on(item)
        await self._wait_for_busy(leaving, HANDOVER)

    async def _wait_for_busy(self, leaving: Iterable[Tracker], patience: float) -> list[Pending]:
        """Wait until nothing of these partitions is under way, for some seconds; return the records that still are."""
        until = asyncio.get_running_loop().time() + patience
        busy = [pending for tracker in leaving for pending in tracker.pendings.values() if pending.is_busy]
        while busy and not self._is_closing and asyncio.get_running_loop().time() < until:
            await self._services.sleep(0.01)
            busy = [pending for pending in busy if pending.is_busy]
        return busy

    def _lose(self, tracker: Tracker) -> None:
        """Let go of what another owner reads again; what is under way ends without effect."""
        tracker.ownership = Ownership.LOST
        if tracker in self._readers:
            self._readers.pop(tracker).release()
        for pending in tracker.pendings.values():
            if pending.tracker is not tracker:
                continue  # adopted
            for item in pending.items:
                if item.stage is Stage.WAITING:
                    item.stage = Stage.ENDED
                    pending.left -= 1
            if pending.left == 0:
                self._held -= pending.held

    # Reading.

    async def subscribe(self) -> None:
        """Read what is wanted now, if that has changed."""
        wanted = await self.wanted()
        if self._consumer is not None and wanted == self.subscribed:
            return
        await self.close(patiently=True)
        if wanted:
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
            for beyond in list(self._aside):
                await self._take_in_reach(beyond)
            batches = await self._consumer.fetch(timeout=IDLE_TICK)
            # Held against the trackers of this very moment: a batch that waits for the one before it may outlive its
            # assignment, and a tracker takes what it isn't given in order for gaps in the log.
            held = [
                (tracker, batch) for batch in batches if (tracker := self.trackers.get(batch.partition)) is not None
            ]
            await self._get_ready(held)
            for tracker, batch in held:
                if not tracker.is_live:
                    continue
                first, last = batch.records[0].offset, batch.records[-1].offset
                is_in_reach = tracker.progress.reaches(last, first) and not tracker.buffered
                if is_in_reach or tracker.delay is not None:
                    await self.take(tracker, batch)
                else:
                    self.set_aside(tracker, batch.records)
                    await self._take_in_reach(tracker)

    def set_aside(self, tracker: Tracker, records: Sequence[Record]) -> None:
        """Keep records that were read, and can't be taken yet. What isn't received is read again by another owner."""
        tracker.buffered.extend(records)
        self._aside[tracker] = None
        self.pause(tracker)

    async def _take_in_reach(self, tracker: Tracker) -> None:
        """Take what was set aside, as far as a commit reaches by now (the log may have a gap) and there is room."""
        buffered = tracker.buffered
        while buffered and tracker.is_live and self.has_room and tracker.progress.reaches(buffered[0].offset):
            await self.take(tracker, Batch(tracker.partition, (buffered.popleft(),)))
        if not buffered or not tracker.is_live:
            self._aside.pop(tracker, None)

    async def _get_ready(self, held: Iterable[tuple[Tracker, Batch]]) -> None:
        """Wait, for a moment, until it is known what came before the first records of partitions that are new here."""
        new = [
            reader.ready(batch.records[0])
            for tracker, batch in held
            if tracker.progress.last_received is None and (reader := self._readers.get(tracker)) is not None
        ]
        if new:
            await asyncio.gather(*new)

    def is_duplicate(self, tracker: Tracker, record: Record, event: Event) -> bool:
        """Return whether an event that was read is a copy of one that came before, which is not delivered again."""
        reader = self._readers.get(tracker)
        return reader is not None and reader.is_duplicate(record, event)

    @property
    def has_room(self) -> bool:
        """Whether another record may be taken into memory."""
        return self._held < self._memory

    def begin(self, tracker: Tracker, record: Record, now: float) -> Pending | None:
        """Take a record in. None if there's nothing to do for it: it is done already, or still under way here."""
        pending = tracker.begin(record, footprint(record))
        if pending is not None:
            pending.taken_at = now
            self.hold(pending, pending.size)
        return pending

    def hold(self, pending: Pending, size: int) -> None:
        """Count so many bytes more, or fewer, as held for a record: all of them until it is done."""
        pending.held += size
        self._held += size

    def leave(self, pending: Pending, error: NewerRecordError) -> None:
        """Leave a record to a newer version: it stays unfinished, and no commit passes it."""
        tracker = pending.tracker
        tracker.newer.add(pending.offset)
        self._dispatch.unreadable.leave(tracker.partition, pending.offset, error)

    def pause(self, tracker: Tracker) -> None:
        if self._consumer is not None and tracker.is_live and not tracker.is_paused:
            tracker.is_paused = True
            self._consumer.pause(tracker.partition)

    def unpause(self, tracker: Tracker) -> None:
        if self._is_blocked(tracker):
            return
        if self._consumer is not None and tracker.is_paused and tracker.progress.has_room():
            tracker.is_paused = False
            self._consumer.resume(tracker.partition)

    def _is_blocked(self, tracker: Tracker) -> bool:
        """Return whether nothing more is taken of a partition: what follows a record that is left may be of its key."""
        return self.keeps_order and bool(tracker.newer)

    async def _keep_watch(self) -> None:
        while not self._is_draining:
            self.tick()
            await self._services.sleep(IDLE_TICK)

    def tick(self) -> None:
        """See to what nothing else wakes, a few times a second."""
        found = self._consumer.unread() if self._consumer is not None else {}
        self.unread = still_unread(self.unread, found, self._log.now()) if found else {}
        for tracker in list(self.trackers.values()):
            self.check_progress(tracker)

    def check_progress(self, tracker: Tracker) -> None:
        """See to a partition."""
        if not tracker.buffered:
            self.unpause(tracker)

    def lag(self) -> dict[str, float]:
        """Return how many records of each topic weren't taken in yet; NaN where that isn't known of each partition."""
        lag: dict[str, float] = dict.fromkeys(self.subscribed, 0)
        consumer = self._consumer
        known = consumer.lag() if consumer is not None else {}
        for partition, tracker in self.trackers.items():
            unread = known.get(partition, math.nan)
            lag[partition.topic] = lag.get(partition.topic, 0) + unread + len(tracker.buffered)
        for partition in consumer.unread() if consumer is not None else ():
            lag[partition.topic] = math.nan
        return lag

    def oldest_pending(self, now: float) -> dict[str, float]:
        """Return how long each topic's lowest unfinished record has waited, of all partitions that are ours.

        Of one that can't be read it isn't known; it counts with the time for which that has been so.
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
        """Return of each topic how long ago its lowest unfinished record was appended, or 0 where all is done."""
        ages = {}
        for topic, unfinished in self.oldest_pending(now).items():
            ages[topic] = unfinished + (self.delay_of(topic) or 0.0) if unfinished else 0.0
        return ages

    # Progress.

    def done(self, pending: Pending) -> None:
        """Note that nothing is left to do for a record."""
        self._held -= pending.held
        pending.tracker.finish(pending)
        self._done_count += 1
        if self._done_count >= COMMIT_AFTER:
            self._much_is_done.set()
        pending.items.clear()  # They know it, too: its body would stay in memory until the garbage collector comes.

    async def _keep_committing(self) -> None:
        while True:
            await self._services.sleep(COMMIT_EVERY)
            await self.commit(self.trackers)

    async def _keep_committing_much(self) -> None:
        """Commit before its second is over what has become much."""
        while True:
            await self._much_is_done.wait()
            is_accepted = await self.commit(self.trackers)
            await self._services.sleep(COMMIT_GAP if is_accepted else COMMIT_EVERY)

    async def commit(self, partitions: Iterable[Partition], *, is_proof: bool = False) -> bool:
        """Commit what is new of these partitions; with `is_proof` also what isn't. Return whether it was accepted.

        An accepted commit proves that the group still counts us in. One is under way at a time: what is done meanwhile
        is the next one's.
        """
        async with self._committing:
            self._done_count = 0
            self._much_is_done.clear()
            trackers = [self.trackers[partition] for partition in partitions if partition in self.trackers]
            commits = await self._committable(trackers, is_proof=is_proof)
            # What was revoked meanwhile isn't sent, and must not pass for stored: `revoked` commits it.
            commits = {tracker: commit for tracker, commit in commits.items() if tracker.is_live}
            if not commits or self._consumer is None:
                return False
            try:
                await self._consumer.commit({tracker.partition: commit for tracker, commit in commits.items()})
            except LogUnavailableError as error:
                self._services.logger.warning("commit_retried", group=self._group, error=str(error))
                return False
            for tracker, commit in commits.items():
                tracker.progress.committed(commit)
                tracker.forget_copies()
            return True

    async def _committable(self, trackers: Iterable[Tracker], *, is_proof: bool = False) -> dict[Tracker, Commit]:
        """Return what can be committed of these partitions, once what was seen of it is stored for the next owner."""
        commits = {
            tracker: commit._replace(note=self.note(tracker, commit))
            for tracker in trackers
            if (commit := tracker.progress.committable(is_known=is_proof)) is not None
        }
        readers = {
            tracker: reader
            for tracker in commits
            if (reader := self._readers.get(tracker)) is not None and not reader.is_flushed
        }
        flushes = [reader.flush() for reader in readers.values()]
        for tracker, failed in zip(readers, await asyncio.gather(*flushes, return_exceptions=True), strict=True):
            if isinstance(failed, LogUnavailableError):
                if self._unflushed.count(self._group, self._log.now()):
                    self._services.logger.warning("commit_retried", group=self._group, error=str(failed))
                del commits[tracker]
            elif failed is not None:
                raise failed
        return commits
