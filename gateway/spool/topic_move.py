"""How far one topic of the spool has been moved, and what is known of its partitions in the log: no I/O.

What is in the log is deleted from the spool, so that what it has is what waits. Each partition has a position: below
it, nothing of it waits. One that fails stays behind, and then catches up by itself: the others go on without it.

What may be in the log although nobody knows, since when, and what is noted of it for the next process (`commit`):

    of            as                              begins with                        ends when
    a record      `tried_at`, in the spool        an append of the ingress without   it was looked for in all partitions
                                                  an answer                          (`looked_until`)
    a topic       `TopicMove.doubt`               what an earlier process noted, or  each was looked for; all is moved
                                                  a partition's, once there are more
    a partition   `began`, `PartitionMove.doubt`  an append; one that failed         an answer; it was looked for
    moved records `moved_since`                   an acknowledgement                 they are deleted
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
"""Offsets by which a partition may be behind the first one and still be moved together with it."""
MAX_RETRY_INTERVAL = 5.0
REQUEST_TIMEOUT = 4.0
"""Seconds that the log's client waits for a response, and so until a request without one is over."""


@dataclass(slots=True)
class PartitionMove:
    """A partition of the log. Times are in seconds.

    `doubt` is since when, by the log's clock, an append of the first records may have stored some of them without an
    acknowledgement; None if there was none. `next_offset` is that after the last record that is known to be there; -1
    if it isn't known. `retry_at` is when, by the event loop's clock, it is tried again, after so many `failures`.
    """

    position: int = 0
    """The offset in the spool below which nothing of it waits, but for what is too large."""
    looked_until: int = 0
    """The offset in the spool below which it was looked for what earlier appends may have stored."""
    doubt: float | None = None
    doubt_until: int = 0
    """The offset in the spool after the last record that is in doubt: a turn may have fewer than the failed one."""
    next_offset: int = -1
    retry_at: float = -math.inf
    failures: int = 0
    reason: str = ""
    began: float | None = None
    """When, by the log's clock, the append began that is under way."""
    is_busy: bool = False
    """Whether it has a turn."""
    oldest: float | None = None
    """When its first record was spooled that is known to wait."""

    def failed(self, reason: str, *, now: float, after: float = 0.0) -> None:
        """Note a failure: the next try is at least `after` seconds later."""
        self.reason = reason
        self.failures += 1
        self.retry_at = now + max(after, min(MAX_RETRY_INTERVAL, 0.25 * 2 ** min(self.failures, 10)))

    def rest(self, until: float, reason: str = "") -> None:
        """Wait for something that is no failure of the partition."""
        self.reason = reason
        self.retry_at = max(self.retry_at, until)

    def begin_doubt(self, until: int) -> None:
        """Note that an append, which began at `began`, may have stored records below an offset of the spool."""
        self.doubt = self.began if self.doubt is None else self.doubt
        self.doubt_until = max(self.doubt_until, until)

    def found_out(self, until: int, end: int) -> None:
        """Note that it is known of the records below an offset whether the log has them, up to its end."""
        if until >= self.doubt_until:
            self.doubt, self.doubt_until, self.next_offset = None, 0, end

    def succeeded(self, next_offset: int) -> None:
        """Note an acknowledgement, and the offset in the log after it."""
        self.failures, self.reason = 0, ""
        if self.doubt is None:
            self.next_offset = next_offset


class Doubt(NamedTuple):
    """Records below an offset may have been stored in the log since a time, by the log's clock (seconds)."""

    since: float
    until: int


class SeenEnds:
    """When the end of what is spooled was seen, by the event loop's clock: one that is set makes no record younger."""

    def __init__(self) -> None:
        self._ends: deque[tuple[float, int]] = deque()
        self._over = 0

    def note(self, end: int, *, now: float) -> None:
        if not self._ends or end > self._ends[-1][1]:
            self._ends.append((now, end))

    def below(self, at: float) -> int:
        """Return below which offset all was there at a time. Times ascend."""
        while self._ends and self._ends[0][0] <= at:
            self._over = self._ends.popleft()[1]
        return self._over


@dataclass(slots=True)
class TopicMove:
    """What of a topic has been moved, and what may be.

    `doubt` is about records that an earlier process, or this one before the topic got more partitions, may have moved
    without noting it. `until` is the offset after the last record that was ever about to be moved.
    """

    topic: str
    start: int
    """The first offset that may wait, as an earlier process has noted it."""
    doubt: Doubt | None = None
    until: int = 0
    gone: list[tuple[int, int]] = field(default_factory=list)
    """Ranges, in order, of what can't be read or be deleted, since its pages are damaged: nothing of it waits."""
    moved: set[int] = field(default_factory=set)
    """Offsets of what is in the log and wasn't deleted yet."""
    moved_since: float | None = None
    """When, by the log's clock, the append of the first of these began at the earliest."""
    large: dict[int, str] = field(default_factory=dict)
    """Offsets of what the log doesn't take because of its size, and what it said: nothing waits for it."""
    large_at: float = -math.inf
    """When, by the event loop's clock, the first of these was refused."""
    aside: set[int] = field(default_factory=set)
    """Offsets of what the log hasn't taken because of its size, until it does: also while it is tried again."""
    partitions: dict[int, PartitionMove] = field(default_factory=dict)
    ends: SeenEnds = field(default_factory=SeenEnds)
    topic_id: str = ""
    turns: int = 0
    """How many have begun."""
    is_noted: bool = True
    """Whether the spool says all that is gone."""

    @classmethod
    def after(cls, topic: str, commit: Commit) -> "TopicMove":
        """Go on after a commit, of this process or an earlier one."""
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
        """Note how many partitions the topic has in the log. With others, keys are in other ones.

        Nothing that is in doubt is looked for before the appends that it was in are over.
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

    def note_topic(self, topic_id: str) -> None:
        """Note the topic's id: offsets in a topic that was recreated say nothing."""
        if are_of_different_topics(self.topic_id, topic_id):
            for each in self.partitions.values():
                each.next_offset = -1
        self.topic_id = topic_id or self.topic_id

    def lanes(self, *, now: float) -> Mapping[int, Sequence[int]]:
        """Return which partitions are moved together next: those side by side under ALL, others by themselves."""
        due = {number: each for number, each in self.partitions.items() if not each.is_busy and now >= each.retry_at}
        front = max([each.position for each in self.partitions.values()], default=0)
        level = [number for number, each in due.items() if not each.failures and front - each.position <= NEAR]
        lanes = {number: [number] for number in due if number not in level}
        return {ALL: level, **lanes} if level else lanes

    @property
    def rests_until(self) -> float:
        """When, by the event loop's clock, the first partition may have a turn that has none."""
        return min([each.retry_at for each in self.partitions.values() if not each.is_busy], default=math.inf)

    def since(self, records: Iterable[SpooledRecord]) -> float | None:
        """Return since when some of these records may have been stored in any partition; None if none may be."""
        doubt, times = self.doubt, list[float]()
        for record in records:
            if record.offset < self.partitions[self.number_of(record)].looked_until:
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
        """Return which records wait for some partitions; note of all partitions what is the oldest."""
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
        """When the first record was spooled that is known to wait."""
        return min([each.oldest for each in self.partitions.values() if each.oldest is not None], default=None)

    def finish(self, offsets: Collection[int], *, since: float) -> None:
        """Note that records are in the log, by appends since a time of its clock."""
        if offsets:
            self.moved.update(offsets)
            self.moved_since = since if self.moved_since is None else min(self.moved_since, since)

    def advance(self, number: int, records: Iterable[SpooledRecord], until: int) -> None:
        """Note that these were all the records of a partition up to an offset: it goes on at the first that waits."""
        state = self.partitions[number]
        left = [each for each in records if each.offset not in self.large and self.waits(each.offset)]
        state.position = left[0].offset if left else max(state.position, until)
        state.oldest = next((each.spooled_at for each in left if each.offset not in self.aside), None)
        doubt = self.doubt
        if doubt is not None and all(each.position >= doubt.until for each in self.partitions.values()):
            self.doubt = None  # what is too large was looked for before it was tried

    def deleted(self, offsets: Collection[int], kept: Iterable[int]) -> None:
        """Note that what was moved is deleted, but for what can't be."""
        self.moved.difference_update(offsets)
        for offset in kept:
            self.lose(range(offset, offset + 1))
        if not self.moved:
            self.moved_since = None

    def lose(self, lost: range) -> int:
        """Note that nothing of a range waits any more; return how many records may have until now."""
        count = len([offset for offset in lost if self.waits(offset)])
        for offset in self.aside.intersection(lost):
            self.aside.remove(offset)
            self.large.pop(offset, None)
        if count:
            self.is_noted = False
            ranges = sorted([*self.gone, (lost.start, lost.stop)])
            self.gone = ranges[:1]
            for start, stop in ranges[1:]:
                if start <= self.gone[-1][1]:
                    self.gone[-1] = self.gone[-1][0], max(stop, self.gone[-1][1])
                else:
                    self.gone.append((start, stop))
        return count

    def try_large(self) -> None:
        """Let what was too large be tried again: somebody may have raised the topic's limit."""
        for state in self.partitions.values():
            state.position = min([state.position, *self.large])
        self.large.clear()

    def commit(self, *, now: float) -> Commit:
        """Return what to store: what has been moved, and what may be in the log from now on; `now` is its time."""
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
    except ValueError:  # of another version: look for everything everywhere
        return Doubt(0.0, 1 << 62), [], ()


def noted_from(commit: Commit | None, first: int) -> Commit:
    """Return what is noted of a topic that has nothing below an offset: what is in doubt may be beyond it."""
    return Commit(first) if commit is None else commit._replace(base=max(first, commit.base))


def first_before(records: Sequence[SpooledRecord], *, over_below: int) -> Sequence[SpooledRecord]:
    """Return those before the first one whose append to the log may still be under way.

    That is over of all below an offset of the spool.
    """
    for index, record in enumerate(records):
        if record.tried_at is not None and record.offset >= over_below:
            return records[:index]
    return records


def first_without_doubt(move: TopicMove, records: Sequence[SpooledRecord]) -> Sequence[SpooledRecord]:
    """Return those before the first one that the log may have already."""
    for index, record in enumerate(records):
        if move.since([record]) is not None:
            return records[:index]
    return records
