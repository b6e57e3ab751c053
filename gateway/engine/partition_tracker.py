"""The state of one partition in memory: its unfinished records, and their unfinished deliveries.

A tracker lives from the assignment of its partition to the revocation; later completions change nothing. When the
partition comes straight back (an eager rebalance revokes everything), `adopt` moves what is in flight into the new
tracker, so that it is neither repeated nor forgotten.
"""

import asyncio
import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import islice, takewhile
from typing import NamedTuple, Protocol

from typing_extensions import override

from gateway.engine.commit_progress import CommitProgress
from gateway.log.base import Assignment, Commit, Partition, Record
from gateway.log.records import footprint
from gateway.model import NO_METADATA, DeadLettered, Delivery, RecordMetadata, UniqueKey

MAX_WINDOW_BLOCKERS = 1_000
"""Records whose deliveries are cut short in one iteration of the event loop: each may need an append."""
DELIVERY_SIZE = 1024
"""Bytes of memory of a waiting delivery with an attempt or two, without its event."""
DUPLICATES_KEPT = 4096
"""Offsets below the base whose deliveries are remembered: a duplicate may come a little later."""


class MemberCallbacks(Protocol):
    """What trackers and the dispatcher ask of the member that reads a partition, or tell it."""

    keeps_order: bool

    def has_room_for(self, tracker: "Tracker") -> bool:
        """Return whether a partition may take more records into memory."""

    def resume(self, pending: "PendingDelivery", now: float) -> None:
        """Called when a delivery that has waited goes on."""

    def is_ownership_fresh(self, pending: "PendingDelivery") -> bool:
        """Asked right before an attempt: return whether it may start now."""

    def finished(self, pending: "PendingDelivery") -> None:
        """Called once a delivery has ended, has a stored successor, or is continued by another record or owner."""

    def try_halt(self, pending: "PendingDelivery", outcome: DeadLettered) -> bool:
        """Called before a dead letter is stored: halt the key instead, if the route says so; return whether it does."""

    def done(self, record: "PendingRecord") -> None:
        """Called once all deliveries of a record have finished: it may be committed."""

    def add_memory(self, record: "PendingRecord", size: int) -> None:
        """Called when a record takes so many more bytes of memory, or with a negative number fewer."""


class AttemptScope:
    """The attempt that a task makes, which others can cut short: like asyncio.timeout, without its 3 µs per attempt."""

    __slots__ = ("_cancelling", "_is_over", "_task", "_timer")

    def __init__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._cancelling = task.cancelling()
        self._is_over = False
        self._timer: asyncio.TimerHandle | None = None

    def cut_short(self, after: float) -> None:
        """End the attempt after some seconds."""
        self._timer = asyncio.get_running_loop().call_later(after, self._end)

    def was_cut_short(self) -> bool:
        """Return whether the task was cancelled by `cut_short` alone, and clear that cancellation."""
        return self._is_over and self._task.uncancel() <= self._cancelling

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _end(self) -> None:
        self._is_over = True
        self._task.cancel()


class Stage(Enum):
    """Where a delivery is, in this process."""

    NEW = auto()
    """Just made; or of an ordered route, on its way to the route's topic."""
    WAITING = auto()
    """In its lane's queue, until a time, behind another of its key, or until its partition's owner is known."""
    ATTEMPT = auto()
    """The lane has started it: an attempt is in flight, or has just ended."""
    APPEND = auto()
    """Its successor or its dead letter is being written, or waits for memory or for others of its key."""
    FINISHED = auto()
    """It has ended, has a successor, or belongs to another owner."""


@dataclass(slots=True, eq=False, kw_only=True)
class PendingRecord:
    """A record that was read, at `taken_at`, and isn't done: `unfinished` counts its unfinished deliveries.

    `size` is the memory of the record itself, `memory_bytes` includes its deliveries.
    """

    tracker: "Tracker"
    offset: int
    appended_at: float
    taken_at: float = 0.0
    size: int
    memory_bytes: int = 0
    unfinished: int = 0
    kick_target: tuple[str, str] = ("", "")
    """The route and the destination whose kick expedites it, as when it was read."""
    deliveries: "list[PendingDelivery]" = field(default_factory=list)

    def add(
        self, delivery: Delivery, *, is_retry: bool = False, metadata: RecordMetadata = NO_METADATA
    ) -> "PendingDelivery":
        """Add a delivery of this record."""
        pending = PendingDelivery(delivery=delivery, record=self, size=self.size, is_retry=is_retry, metadata=metadata)
        self.deliveries.append(pending)
        self.unfinished += 1
        self.tracker.member.add_memory(self, DELIVERY_SIZE)
        return pending

    @property
    def has_begun(self) -> bool:
        """Whether any of its deliveries was started: reading the record again would repeat it."""
        return any(pending.stage is not Stage.WAITING or pending.is_tried for pending in self.deliveries)

    @property
    def is_closed(self) -> bool:
        """Whether nothing more comes of it in this process: it is done, or its partition was reassigned."""
        return self.tracker.is_reassigned or not (self.unfinished or self.offset in self.tracker.newer)

    @property
    def is_busy(self) -> bool:
        """Whether an attempt or an append for it is in flight."""
        return self.unfinished > sum([pending.stage is Stage.WAITING for pending in self.deliveries])


@dataclass(slots=True, eq=False, kw_only=True)
class PendingDelivery:
    """A delivery in this process, from the record that it was read from to its end or its successor.

    `metadata` goes with it from record to record. `stage_began_at` is when it was queued in its lane, or its attempt
    started. `outcome` is set if it is decided how it ends, but that can't be written yet.
    `ownership_checked_at` is when (by the loop's clock) the commit was sent that proves that the partition is ours.
    `is_tried` is set if it has attempts that aren't in any record yet, `is_unresponsive` if its attempt started while
    its destination was unresponsive, `is_late` once it was counted as late, `is_moved` if it goes on in a tier
    without an attempt. `burst` is set if its route is debounced: the deliveries that it stands for.
    """

    delivery: Delivery
    record: PendingRecord
    size: int
    is_retry: bool
    metadata: RecordMetadata = NO_METADATA
    stage_began_at: float = 0.0
    stage: Stage = Stage.NEW
    is_tried: bool = False
    is_unresponsive: bool = False
    is_late: bool = False
    is_moved: bool = False
    ownership_checked_at: float = -math.inf
    burst: "Burst | None" = None
    scope: AttemptScope | None = None
    outcome: DeadLettered | None = None


class Burst(NamedTuple):
    """Deliveries of which one stands for the others: the first's append time, and the partition of the last's event.

    `debounce_key` is by which key its route was debounced, as a digest: another's may have the same text.
    """

    began_at: float
    event_partition: Partition | None
    debounce_key: str


class Ownership(Enum):
    """Who owns a partition."""

    OURS = auto()
    LEAVING = auto()
    """This member, until its revocation is over."""
    SUSPENDED = auto()
    """It isn't known yet: the partition may come back."""
    REASSIGNED = auto()
    """Another member."""


class ReloadBoundaries:
    """Where a reload has changed what ordered routes match: by route, the offsets that the former rules ended at.

    A delivery that was matched at or above such an offset waits until all below it is committed: read again after a
    crash, and by the new rules, a record below it would come behind that delivery.
    """

    def __init__(self) -> None:
        self._offsets: dict[str, list[int]] = {}  # Invariant: ascending, none is empty.
        self.highest = 0
        """The highest of them: a delivery may wait for the commit of any offset below it."""

    def add(self, routes: Iterable[str], offset: int) -> None:
        """Add a boundary of these routes; it isn't below any other."""
        for route in routes:
            offsets = self._offsets.setdefault(route, [])
            if not offsets or offsets[-1] < offset:
                offsets.append(offset)
            self.highest = offset

    def before(self, route: str, offset: int) -> int:
        """Return the last boundary of a route at or below an offset, 0 if there is none."""
        return max([each for each in self._offsets.get(route, ()) if each <= offset], default=0)

    def forget_below(self, committed: int) -> None:
        """Forget those up to which everything is committed."""
        if self.highest:
            left = {route: [each for each in offsets if each > committed] for route, offsets in self._offsets.items()}
            self._offsets = {route: offsets for route, offsets in left.items() if offsets}
            self.highest = max([offsets[-1] for offsets in self._offsets.values()], default=0)


class Buffer:
    """Records of a partition that were fetched and can't be processed yet, and about how much memory they take."""

    def __init__(self) -> None:
        self._records: deque[Record] = deque()
        self._since: deque[float] = deque()
        self.memory_bytes = 0

    def __len__(self) -> int:
        return len(self._records)

    @property
    def first(self) -> Record:
        return self._records[0]

    @property
    def first_since(self) -> float:
        """Since when the first is in the log: no later than it was read, though its leader's clock was set back."""
        return self._since[0]

    @property
    def last(self) -> Record:
        return self._records[-1]

    @property
    def last_since(self) -> float:
        return self._since[-1]

    def extend(self, records: Iterable[Record], now: float) -> None:
        for record in records:
            self._records.append(record)
            self._since.append(min(record.appended_at, now))
            self.memory_bytes += footprint(record)

    def pop(self) -> Record:
        """Remove and return the first record."""
        record = self._records.popleft()
        self._since.popleft()
        self.memory_bytes -= footprint(record)
        return record

    def clear(self) -> None:
        self._records.clear()
        self._since.clear()
        self.memory_bytes = 0


class Tracker:
    """The records of one partition, from assignment to revocation.

    `delay` is that of a tier, whose records are due that many seconds after their append; None for events.
    """

    def __init__(self, assignment: Assignment, member: MemberCallbacks, delay: float | None = None) -> None:
        self.partition: Partition = assignment.partition
        self.member = member
        self.delay = delay
        self.progress = CommitProgress(
            assignment.commit,
            assignment.log_start,
            is_committed=assignment.is_committed,
            is_stale=assignment.is_stale,
            topic_id=assignment.topic_id,
        )
        self.ownership = Ownership.OURS
        self.is_paused = False
        self.memory_bytes = 0
        self.records: dict[int, PendingRecord] = {}
        self.buffered = Buffer()
        self.newer: set[int] = set()
        """Offsets of records in a newer format: they stay unfinished."""
        self.reload_boundaries = ReloadBoundaries()
        self._end_of_adopted = 0
        self._first_offsets: dict[tuple[UniqueKey, int], int] = {}
        self._pruned_below = self.progress.base - DUPLICATES_KEPT

    @override
    def __repr__(self) -> str:
        where = f"{self.partition.topic}/{self.partition.number}"
        return f"<Tracker {where} {self.ownership.name.lower()}, {len(self.records)} pending>"

    @property
    def is_live(self) -> bool:
        return self.ownership is Ownership.OURS

    @property
    def is_writable(self) -> bool:
        """Whether deliveries may end here, or get a successor: no other owner works on them."""
        return self.ownership in (Ownership.OURS, Ownership.LEAVING)

    @property
    def is_suspended(self) -> bool:
        """Whether the owner isn't known: it was revoked, and may come straight back."""
        return self.ownership is Ownership.SUSPENDED

    @property
    def is_reassigned(self) -> bool:
        return self.ownership is Ownership.REASSIGNED

    def ends_below(self, end: int) -> bool:
        """Return whether each unfinished record below an offset will be done by itself: all of it is in flight."""
        return all(record.is_busy for offset, record in self.records.items() if offset < end)

    def required_commit_offset(self) -> int:
        """Return the offset that has to be committed before all begun records can be done; 0 if there is none.

        It concerns events with several deliveries, one of them to an ordered route that a reload has added or changed:
        that one waits until the events before the reload are committed.
        """
        if not self.reload_boundaries.highest:
            return 0
        waiting = [
            self.reload_boundaries.before(pending.delivery.route, record.offset)
            for record in self.records.values()
            if len(record.deliveries) > 1
            for pending in record.deliveries
            if pending.stage is Stage.NEW
        ]
        return max(waiting, default=0)

    @property
    def end(self) -> int:
        """The offset after the last record that was tracked, here or before an adoption; 0 if none was."""
        last = self.progress.last_received
        return self._end_of_adopted if last is None else max(self._end_of_adopted, last + 1)

    @property
    def waiting(self) -> list["PendingDelivery"]:
        """The waiting deliveries."""
        return [
            pending
            for record in self.records.values()
            for pending in record.deliveries
            if pending.stage is Stage.WAITING
        ]

    def track(self, record: Record, size: int) -> PendingRecord | None:
        """Start tracking a record. Return None if there is nothing to do: it is done, or already pending here."""
        offset = record.offset
        if not self.progress.received(offset):
            return None
        if offset in self.records:
            return None
        pending_record = PendingRecord(tracker=self, offset=offset, appended_at=record.appended_at, size=size)
        self.records[offset] = pending_record
        return pending_record

    def is_duplicate_record(self, delivery: Delivery, offset: int) -> bool:
        """Return whether another record of this window has the same delivery and successor number (after a crash).

        Two events may share an identity, and then so do their deliveries: the time of receipt and the replay tell them
        apart.
        """
        return self._first_offsets.setdefault((delivery.unique_key, delivery.successor), offset) != offset

    def mark_done(self, record: PendingRecord) -> None:
        """Mark a record as done: each of its deliveries has ended or has an acknowledged successor."""
        if self.records.pop(record.offset, None) is not None:
            self.progress.mark_done(record.offset)

    def adopt(self, old: "Tracker") -> list[PendingDelivery]:
        """Take over the pending and the completed records of `old`, of which copies may come; return what waits."""
        self.progress.merge(old.progress)
        self.reload_boundaries = old.reload_boundaries
        self._end_of_adopted = old.end
        waiting = []
        for offset, record in old.records.items():
            if self.progress.is_done(offset):
                continue  # another owner has finished it meanwhile
            record.tracker = self
            self.records[offset] = record
            self.memory_bytes += record.memory_bytes
            old.memory_bytes -= record.memory_bytes
            if offset in old.newer:
                self.newer.add(offset)
            waiting += [pending for pending in record.deliveries if pending.stage is Stage.WAITING]
        # Without those left out above: perhaps the log has deleted one, and its copy is all there is.
        self._first_offsets = {
            step: offset
            for step, offset in old._first_offsets.items()  # noqa: SLF001 - of the same class
            if offset in self.records or offset not in old.records
        }
        return waiting

    def committed(self, commit: Commit) -> None:
        """Mark this commit as stored."""
        self.progress.committed(commit)
        self.reload_boundaries.forget_below(commit.base)
        self._forget_duplicates()

    def _forget_duplicates(self) -> None:
        """Forget deliveries far below the window. Called at each commit, it does so now and then."""
        lowest = self.progress.base - DUPLICATES_KEPT
        if self._first_offsets and lowest >= self._pruned_below + DUPLICATES_KEPT:
            self._first_offsets = {which: offset for which, offset in self._first_offsets.items() if offset >= lowest}
            self._pruned_below = lowest

    def oldest_pending(self) -> float | None:
        """Return the append time (log's clock) of the lowest unfinished record, or its due time in a tier, if any."""
        offset = self.progress.lowest_unfinished()
        record = None if offset is None else self.records.get(offset)
        return None if record is None else record.appended_at + (self.delay or 0.0)

    def window_blockers(self, last: int) -> list[PendingDelivery]:
        """Return deliveries of the lowest unfinished records up to an offset: these keep the offset window from moving.

        Records of a tier that aren't due yet are left out, except for the lowest. If the leader's clock is ahead,
        writing them to a tier again would bring all of them back at once.
        """
        offsets = takewhile(lambda offset: offset <= last, self.progress.unfinished_offsets())
        records = [self.records[offset] for offset in islice(offsets, MAX_WINDOW_BLOCKERS) if offset in self.records]
        return [
            pending
            for record in records
            for pending in record.deliveries
            if self.delay is None or pending.is_tried or pending.scope is not None or record is records[0]
        ]


def to_be_moved(waiting: Iterable[PendingDelivery]) -> list[PendingDelivery]:
    """Return which of these deliveries must be written to a tier before their partitions are released.

    They are those of records of which a delivery has begun, which the next owner would repeat, and those that such
    records wait for.
    """
    deliveries = list(waiting)
    trackers = {pending.record.tracker for pending in deliveries}
    needed = {tracker: tracker.required_commit_offset() for tracker in trackers}
    return [
        pending
        for pending in deliveries
        if pending.record.has_begun or pending.record.offset < needed[pending.record.tracker]
    ]
