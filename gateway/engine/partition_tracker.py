"""What this worker holds of one partition: its unfinished records, and the deliveries that each still waits for.

A tracker lives from the assignment of its partition to the revocation; a completion that reaches a tracker which has
been given up changes nothing. When the partition comes straight back (an eager rebalance revokes everything), `adopt`
moves what is still under way into the new tracker, so that it is neither repeated nor forgotten.
"""

import asyncio
import math
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Protocol

from typing_extensions import override

from gateway.engine.commit_progress import Progress
from gateway.log.base import Assignment, Partition, Record
from gateway.model import NO_NOTE, DeadLettered, Delivery, Life, Note

ITEM_SIZE = 1024
"""Bytes of memory that a delivery takes while it waits, with an attempt or two, beside its event."""
COPIES_KEPT = 4096
"""Offsets below the window of which it is still known what they carried: a copy may come a little later."""


class Owner(Protocol):
    """The member that reads a partition, and hears what becomes of its records."""

    keeps_order: bool

    @property
    def has_room(self) -> bool: ...

    def resume(self, item: "Item", now: float) -> None: ...

    def is_proof_fresh(self, item: "Item") -> bool: ...

    def finished(self, item: "Item") -> None: ...

    def halt_instead(self, item: "Item", end: DeadLettered) -> bool: ...

    def done(self, pending: "Pending") -> None: ...

    def hold(self, pending: "Pending", size: int) -> None: ...


class AttemptScope:
    """The attempt that a task makes, which others can cut short: as asyncio.timeout, without its 3 µs an attempt."""

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
        """Return whether the task was cancelled by this alone, and count that cancellation off."""
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
    WAITING = auto()
    """In its lane's queue, until a time, behind another of its key, or until it is known whose its partition is."""
    ATTEMPT = auto()
    """A lane has let it out; an attempt of it is being made, or has just ended."""
    APPEND = auto()
    """Its successor or its dead letter is being written, or waits for memory to be."""
    ENDED = auto()
    """It has its end or its successor, or is left to another owner."""


@dataclass(slots=True, eq=False, kw_only=True)
class Pending:
    """A record that was read, at `taken_at`, and isn't done: `left` counts its unfinished deliveries.

    `size` is the memory that it takes itself, `held` that with what is under way for it. `is_made_here` tells that its
    deliveries aren't in the record, which was of an unknown source: no kick has injected them again.
    """

    tracker: "Tracker"
    offset: int
    appended_at: float
    taken_at: float = 0.0
    size: int
    held: int = 0
    left: int = 0
    is_made_here: bool = False
    items: "list[Item]" = field(default_factory=list)

    def add(self, delivery: Delivery, *, is_retry: bool = False, note: Note = NO_NOTE) -> "Item":
        """Add a delivery of this record."""
        item = Item(delivery=delivery, pending=self, size=self.size, is_retry=is_retry, note=note)
        self.items.append(item)
        self.left += 1
        self.tracker.owner.hold(self, ITEM_SIZE)
        return item

    @property
    def has_begun(self) -> bool:
        """Whether any of its deliveries was started: reading the record again would repeat that one."""
        return any(item.stage is not Stage.WAITING or item.is_tried for item in self.items)

    @property
    def is_settled(self) -> bool:
        """Whether nothing can be made of it any more here: it is done, or another owner's."""
        return self.tracker.is_lost or not (self.left or self.offset in self.tracker.newer)

    @property
    def is_busy(self) -> bool:
        """Whether an attempt or an append for it is under way."""
        return self.left > sum([item.stage is Stage.WAITING for item in self.items])


@dataclass(slots=True, eq=False, kw_only=True)
class Item:
    """A delivery in this process, from the record that it was read from to its end or its successor.

    `note` goes with it from record to record. `since` is when it came into its lane's queue, or its attempt began.
    `end` is set where its end is decided, and can't be written yet.
    `proven_at` is when (by the loop's clock) a commit was sent that proves that its partition is ours still.
    `is_tried` tells of attempts that no record knows of yet, `is_doubtful` of one that began in doubt of an answer,
    `is_late` that it has been counted as late.
    """

    delivery: Delivery
    pending: Pending
    size: int
    is_retry: bool
    note: Note = NO_NOTE
    since: float = 0.0
    stage: Stage = Stage.NEW
    is_tried: bool = False
    is_doubtful: bool = False
    is_late: bool = False
    proven_at: float = -math.inf
    scope: AttemptScope | None = None
    end: DeadLettered | None = None


class Ownership(Enum):
    """Whose a partition is: ours; still ours, but not for long; revoked, and perhaps coming back; or another's."""

    OURS = auto()
    LEAVING = auto()
    SUSPENDED = auto()
    LOST = auto()


class Tracker:
    """The records of one partition, from assignment to revocation.

    `delay` is a tier's (its records are due that long after their append), None for events.
    """

    def __init__(self, assignment: Assignment, owner: Owner, delay: float | None = None) -> None:
        self.partition: Partition = assignment.partition
        self.owner = owner
        self.delay = delay
        self.progress = Progress(assignment.commit, assignment.log_start, is_committed=assignment.is_committed)
        self.ownership = Ownership.OURS
        self.is_paused = False
        self.pendings: dict[int, Pending] = {}
        self.buffered: deque[Record] = deque()
        self.newer: set[int] = set()
        """Offsets of records that are left to a newer version: they stay unfinished."""
        self._copies: dict[tuple[Life, int], int] = {}
        self._copies_from = self.progress.base - COPIES_KEPT

    @override
    def __repr__(self) -> str:
        where = f"{self.partition.topic}/{self.partition.number}"
        return f"<Tracker {where} {self.ownership.name.lower()}, {len(self.pendings)} pending>"

    @property
    def is_live(self) -> bool:
        return self.ownership is Ownership.OURS

    @property
    def is_writable(self) -> bool:
        """Whether a record of it may be ended, or carried on by a successor: nobody else is doing that."""
        return self.ownership in (Ownership.OURS, Ownership.LEAVING)

    @property
    def is_suspended(self) -> bool:
        """Whether it isn't known whose it is: it was given up, and may come straight back."""
        return self.ownership is Ownership.SUSPENDED

    @property
    def is_lost(self) -> bool:
        return self.ownership is Ownership.LOST

    @property
    def waiting(self) -> list["Item"]:
        """Its deliveries that wait for their turn."""
        return [item for pending in self.pendings.values() for item in pending.items if item.stage is Stage.WAITING]

    def begin(self, record: Record, size: int) -> Pending | None:
        """Take a record in. None when there's nothing to do for it: it is done already, or still under way here."""
        offset = record.offset
        if not self.progress.received(offset):
            return None
        if offset in self.pendings:
            return None
        pending = Pending(tracker=self, offset=offset, appended_at=record.appended_at, size=size)
        self.pendings[offset] = pending
        return pending

    def is_copy(self, delivery: Delivery, offset: int) -> bool:
        """Return whether another record of this window carries the same delivery at the same step (a crash made it).

        Two events may share an identity, and so may their deliveries; copies are of one event, down to its receipt, and
        of one replay of it.
        """
        return self._copies.setdefault((delivery.life, delivery.successor), offset) != offset

    def finish(self, pending: Pending) -> None:
        """Note that every delivery of a record has an end or an acknowledged successor."""
        if self.pendings.pop(pending.offset, None) is not None:
            self.progress.finished(pending.offset)

    def adopt(self, old: "Tracker") -> list[Item]:
        """Take over what `old` has under way and what it finished; return its deliveries that wait to be started."""
        self.progress.merge(old.progress)
        waiting = []
        for offset, pending in old.pendings.items():
            if self.progress.is_done(offset):
                continue  # another owner has finished it meanwhile
            pending.tracker = self
            self.pendings[offset] = pending
            if offset in old.newer:
                self.newer.add(offset)
            waiting += [item for item in pending.items if item.stage is Stage.WAITING]
        return waiting

    def forget_copies(self) -> None:
        """Drop what is known of copies far below the window; called at each commit, and does it now and then."""
        lowest = self.progress.base - COPIES_KEPT
        if self._copies and lowest >= self._copies_from + COPIES_KEPT:
            self._copies = {step: offset for step, offset in self._copies.items() if offset >= lowest}
            self._copies_from = lowest

    def oldest_pending(self) -> float | None:
        """Return since when (log's clock) the lowest unfinished record waits: its append, or of a tier its due time."""
        offset = self.progress.lowest_unfinished()
        pending = None if offset is None else self.pendings.get(offset)
        return None if pending is None else pending.appended_at + (self.delay or 0.0)

    def holding_back(self) -> Iterator[Item]:
        """Yield the deliveries of the lowest unfinished record, which keep the window from moving."""
        offset = self.progress.lowest_unfinished()
        pending = None if offset is None else self.pendings.get(offset)
        if pending is not None:
            yield from pending.items
