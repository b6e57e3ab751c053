"""How far one topic of the spool has been moved, and what is known of its partitions in the log: no I/O.

What is in the log is deleted from the spool, so that all that is left in the file waits. Each partition has a position:
below it, nothing of it waits. One that fails lags, and then catches up by itself: the others go on without it.

An append without an answer may have stored its records: they are *in doubt*, until they have been searched for in the
log. What is known of that, and is stored for the next process (`commit`):

    about          field                    is set by                          until
    a record       `tried_at` (a header)    an append of the ingress without   all partitions were searched for it
                                            an answer                          (`searched_below`)
    a topic        `TopicMove.doubt`        an earlier process's commit, or a  all were searched for its records, or
                                            partition's doubt, once there are  these are moved
                                            more partitions
    a partition    `PartitionMove.began`    an append that begins              the append ends
                   `PartitionMove.doubt`    an append that fails               it was searched for those records
    moved records  `moved_since`            the log's acknowledgement          they are deleted from the file
"""

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from gateway.log.base import ALL, Commit, are_of_different_topics, partition_of
from gateway.spool.records import SpooledRecord

NEAR = 16_000
"""Offsets by which a partition may lag behind the leading one and still be moved together with it."""
MAX_RETRY_INTERVAL = 5.0
REQUEST_TIMEOUT = 4.0
"""Seconds that the log's client waits for a response, and so until a request without one is over."""


@dataclass(slots=True)
class PartitionMove:
    """A partition of the log. Times are in seconds.

    `doubt` is the time, by the log's clock, since which an append of the first records may have stored some of them
    without an acknowledgement; None if there was none. `next_offset` is the offset in the log after the last record
    that is known to be there; -1 if it isn't known. `retry_at` is when, by the event loop's clock, it is tried again,
    after `failures` in a row.
    """

    position: int = 0
    """The offset in the spool below which none of its records waits, but for those that are too large."""
    searched_below: int = 0
    """The offset in the spool below which records have been searched for, in all partitions of the log."""
    doubt: float | None = None
    doubt_until: int = 0
    """The offset in the spool after the last record in doubt: a later turn may have fewer than the failed one."""
    next_offset: int = -1
    retry_at: float = -math.inf
    failures: int = 0
    reason: str = ""
    began: float | None = None
    """When, by the log's clock, the append in progress began; None if there is none."""
    is_busy: bool = False
    """Whether it has a turn."""
    oldest: float | None = None
    """When the first of its records that are known to wait was spooled."""

    def failed(self, reason: str, *, now: float, after: float = 0.0) -> None:
        """Count a failure: the next try is at least `after` seconds later."""
        self.reason = reason
        self.failures += 1
        self.retry_at = now + max(after, min(MAX_RETRY_INTERVAL, 0.25 * 2 ** min(self.failures, 10)))

    def wait_until(self, until: float, reason: str = "") -> None:
        """Let it wait until a time, for something that is no failure of the partition."""
        self.reason = reason
        self.retry_at = max(self.retry_at, until)

    def begin_doubt(self, until: int) -> None:
        """Note that the append that began at `began` may have stored records below an offset of the spool."""
        self.doubt = self.began if self.doubt is None else self.doubt
        self.doubt_until = max(self.doubt_until, until)

    def resolve_doubt(self, until: int, end: int) -> None:
        """Note that the partition was searched, up to its end, for the records below an offset of the spool."""
        if until >= self.doubt_until:
            self.doubt, self.doubt_until, self.next_offset = None, 0, end

    def succeeded(self, next_offset: int) -> None:
        """Note an acknowledgement, and the next offset in the log."""
        self.failures, self.reason = 0, ""
        if self.doubt is None:
            self.next_offset = next_offset


class Doubt(NamedTuple):
    """Records below an offset may have been stored in the log since a time, by the log's clock (seconds)."""

    since: float
    until: int


class SeenEnds:
    """Ends of the spool, with the time at which each was seen: they tell how long records have been there at least.

    Times are the event loop's: when the machine's clock is set, no record becomes younger.
    """

    def __init__(self) -> None:
        self._ends: deque[tuple[float, int]] = deque()
        self._below = 0

    def add(self, end: int, *, now: float) -> None:
        if not self._ends or end > self._ends[-1][1]:
            self._ends.append((now, end))

    def below(self, at: float) -> int:
        """Return the end as it was at a time; each call's is at least the previous one's."""
        while self._ends and self._ends[0][0] <= at:
            self._below = self._ends.popleft()[1]
        return self._below


@dataclass(slots=True)
class TopicMove:
    """What of a topic has been moved, and what may be.

    `doubt` is about records that an earlier process, or this one before the topic got more partitions, may have moved
    without knowing it. `until` is the offset after the last record that a turn has ever begun to move.
    """

    topic: str
    start: int
    """The first offset that may still wait, as an earlier process has stored it."""
    doubt: Doubt | None = None
    until: int = 0
    gone: list[tuple[int, int]] = field(default_factory=list)
    """Ranges, in order, of records that can't be read or deleted, as their pages are damaged: none of them waits."""
    moved: set[int] = field(default_factory=set)
    """Offsets of records that are in the log and not deleted here yet."""
    moved_since: float | None = None
    """When, by the log's clock, the append of the first of these began at the earliest."""
    large: dict[int, str] = field(default_factory=dict)
    """Offsets of records that are too large for the log, and its reason: no other record waits for them.

    They are those of `aside` that aren't being tried again at present.
    """
    large_at: float = -math.inf
    """When, by the event loop's clock, the first of these was refused."""
    aside: set[int] = field(default_factory=set)
    """Offsets of all records that were too large for the log, until it takes them."""
    partitions: dict[int, PartitionMove] = field(default_factory=dict)
    ends: SeenEnds = field(default_factory=SeenEnds)
    topic_id: str = ""
    turns: int = 0
    """How many turns have begun."""
    is_progress_stored: bool = True
    """Whether the file has `gone` and `aside` as they are."""

    @classmethod
    def after(cls, topic: str, commit: Commit) -> "TopicMove":
        """Continue from a commit, of this process or an earlier one."""
        doubt, gone, aside = _decode(commit.metadata)
        if doubt is not None and doubt.until <= commit.base:  # all of it was dropped
            doubt = None
        aside = {offset for offset in aside if offset >= commit.base}
        return cls(topic, commit.base, doubt, commit.base if doubt is None else doubt.until, gone, aside=aside)

    @property
    def base(self) -> int:
        """The offset below which nothing waits."""
        return min([*[each.position for each in self.partitions.values()], *self.large], default=self.start)

    @property
    def is_busy(self) -> bool:
        """Whether a partition has a turn."""
        return any(each.is_busy for each in self.partitions.values())

    def waits(self, offset: int) -> bool:
        """Return whether the record at an offset, if there is one, has still to be moved."""
        index = bisect_right(self.gone, (offset, math.inf)) - 1
        is_gone = index >= 0 and offset < self.gone[index][1]
        return offset >= self.start and offset not in self.moved and not is_gone

    def set_partitions(self, count: int, *, now: float) -> None:
        """Note how many partitions the topic has in the log. If their number changes, keys are in other ones.

        Records in doubt are searched for once the appends that they were in are over.
        """
        if len(self.partitions) == count:
            return
        doubts = [each.doubt for each in self.partitions.values() if each.doubt is not None]
        if doubts:
            since = min([*doubts, *([] if self.doubt is None else [self.doubt.since])])
            self.doubt = Doubt(since, self.until)
        retry_at = -math.inf if self.doubt is None else now + REQUEST_TIMEOUT
        base = self.base
        self.partitions = {number: PartitionMove(base, retry_at=retry_at) for number in range(count)}

    def set_topic_id(self, topic_id: str) -> None:
        """Note the topic's id: offsets in a topic that was recreated say nothing."""
        if are_of_different_topics(self.topic_id, topic_id):
            for each in self.partitions.values():
                each.next_offset = -1
        self.topic_id = topic_id or self.topic_id

    def due_partitions(self, *, now: float) -> Mapping[int, Sequence[int]]:
        """Return the partitions that may have a turn: those in step under ALL, to be moved together, others alone."""
        due = {number: each for number, each in self.partitions.items() if not each.is_busy and now >= each.retry_at}
        lead = max([each.position for each in self.partitions.values()], default=0)
        in_step = [number for number, each in due.items() if not each.failures and lead - each.position <= NEAR]
        alone = {number: [number] for number in due if number not in in_step}
        return {ALL: in_step, **alone} if in_step else alone

    @property
    def idle_until(self) -> float:
        """When, by the event loop's clock, the first of the partitions without a turn may have one."""
        return min([each.retry_at for each in self.partitions.values() if not each.is_busy], default=math.inf)

    def since(self, records: Iterable[SpooledRecord]) -> float | None:
        """Return the earliest time at which one of these may have been stored, in any partition; None if none may."""
        doubt, times = self.doubt, list[float]()
        for record in records:
            if record.offset < self.partitions[self.number_of(record)].searched_below:
                continue
            if record.tried_at is not None:
                times.append(record.tried_at)
            if doubt is not None and record.offset < doubt.until:
                times.append(doubt.since)
        return min(times, default=None)

    def number_of(self, record: SpooledRecord) -> int:
        """Return the partition of a record."""
        return partition_of(record.key, len(self.partitions))

    def see(self, records: Iterable[SpooledRecord], numbers: Collection[int]) -> list[SpooledRecord]:
        """Return which records wait for these partitions; note the oldest record of every partition."""
        found = []
        for record in records:
            number = self.number_of(record)
            state = self.partitions[number]
            if record.offset < state.position or record.offset in self.large or not self.waits(record.offset):
                continue
            if state.oldest is None and record.offset not in self.aside:
                state.oldest = record.spooled_at
            if number in numbers:
                found.append(record)
        return found

    def by_partition(self, records: Iterable[SpooledRecord]) -> dict[int, list[SpooledRecord]]:
        """Return records, in order, by the partition that they belong to."""
        found: dict[int, list[SpooledRecord]] = {}
        for record in records:
            found.setdefault(self.number_of(record), []).append(record)
        return found

    @property
    def oldest(self) -> float | None:
        """When the first of the records that are known to wait was spooled."""
        return min([each.oldest for each in self.partitions.values() if each.oldest is not None], default=None)

    def finish(self, offsets: Collection[int], *, since: float) -> None:
        """Note that records are in the log, by appends since a time of its clock."""
        if offsets:
            self.moved.update(offsets)
            self.moved_since = since if self.moved_since is None else min(self.moved_since, since)

    def advance(self, number: int, records: Iterable[SpooledRecord], until: int) -> None:
        """Move a partition's position to the first of these records, all of it below `until`, that still waits."""
        state = self.partitions[number]
        left = [each for each in records if each.offset not in self.large and self.waits(each.offset)]
        state.position = left[0].offset if left else max(state.position, until)
        state.oldest = next((each.spooled_at for each in left if each.offset not in self.aside), None)
        doubt = self.doubt
        if doubt is not None and all(each.position >= doubt.until for each in self.partitions.values()):
            self.doubt = None  # those that are too large were searched for before they were tried

    def deleted(self, offsets: Collection[int], kept: Iterable[int]) -> None:
        """Note that moved records are deleted, but for those that can't be."""
        self.moved.difference_update(offsets)
        for offset in kept:
            self.lose(range(offset, offset + 1))
        if not self.moved:
            self.moved_since = None

    def lose(self, lost: range) -> int:
        """Note that no record of a range waits any more; return how many did until now, at most."""
        count = len([offset for offset in lost if self.waits(offset)])
        for offset in self.aside.intersection(lost):
            self.aside.remove(offset)
            self.large.pop(offset, None)
        if count:
            self.is_progress_stored = False
            ranges = sorted([*self.gone, (lost.start, lost.stop)])
            self.gone = ranges[:1]
            for start, stop in ranges[1:]:
                if start <= self.gone[-1][1]:
                    self.gone[-1] = self.gone[-1][0], max(stop, self.gone[-1][1])
                else:
                    self.gone.append((start, stop))
        return count

    def try_large(self) -> None:
        """Let the records that were too large be tried again: somebody may have raised the topic's limit."""
        for state in self.partitions.values():
            state.position = min([state.position, *self.large])
        self.large.clear()

    def commit(self, *, now: float) -> Commit:
        """Return what to store: what has been moved, and what may be in the log from `now` on, by the log's clock."""
        base = self.base
        self.gone = [each for each in self.gone if each[1] > base]
        gone, aside = _encode(self.gone), _encode(_ranges([each for each in self.aside if each >= base]))
        if base >= self.until:
            return Commit(base, metadata=b"0 0 " + gone if gone else b"")
        times = [now, *([] if self.doubt is None else [self.doubt.since])]
        times += [at for each in self.partitions.values() for at in (each.doubt, each.began) if at is not None]
        times += [] if self.moved_since is None else [self.moved_since]
        parts = [b"%.6f" % min(times), b"%d" % self.until, gone, *([aside] if aside else [])]
        return Commit(base, metadata=b" ".join(parts))


def _ranges(offsets: Collection[int]) -> list[tuple[int, int]]:
    """Return the ranges, in order, that have these offsets and no others."""
    found: list[tuple[int, int]] = []
    for offset in sorted(offsets):
        if found and found[-1][1] == offset:
            found[-1] = found[-1][0], offset + 1
        else:
            found.append((offset, offset + 1))
    return found


def _encode(ranges: Iterable[tuple[int, int]]) -> bytes:
    return b",".join([b"%d-%d" % each for each in ranges])


def _decode_ranges(text: bytes) -> list[tuple[int, int]]:
    ranges = [each.split(b"-") for each in text.split(b",") if each]
    return [(int(start), int(stop)) for start, stop in ranges]


def _decode(metadata: bytes) -> tuple[Doubt | None, list[tuple[int, int]], Iterable[int]]:
    """Return the doubt of a commit, what is gone, and the offsets of what is too large."""
    if not metadata:
        return None, [], ()
    try:
        since, until, gone, *others = metadata.split(b" ")
        doubt, [aside] = Doubt(float(since), int(until)), others or [b""]
        offsets = [offset for start, stop in _decode_ranges(aside) for offset in range(start, stop)]
        return (doubt if doubt.until else None), _decode_ranges(gone), offsets
    except ValueError:  # of another version, or damaged (`FileStore.moved`): search all partitions for every record
        return Doubt(0.0, 1 << 62), [], ()


def progress_from(commit: Commit | None, first: int) -> Commit:
    """Return a topic's stored progress, from the first offset that is left on; what is in doubt may be beyond that."""
    return Commit(first) if commit is None else commit._replace(base=max(first, commit.base))


def before_in_flight(records: Sequence[SpooledRecord], *, settled_below: int) -> Sequence[SpooledRecord]:
    """Return those before the first one that an append of the ingress may still be bringing to the log.

    No append of a record below the offset `settled_below` of the spool is in progress.
    """
    for index, record in enumerate(records):
        if record.tried_at is not None and record.offset >= settled_below:
            return records[:index]
    return records


def before_in_doubt(move: TopicMove, records: Sequence[SpooledRecord]) -> Sequence[SpooledRecord]:
    """Return those before the first one that the log may have already."""
    for index, record in enumerate(records):
        if move.since([record]) is not None:
            return records[:index]
    return records
