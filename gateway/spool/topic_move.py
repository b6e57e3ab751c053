"""How far one topic of the spool has been moved, and what is known of its partitions in the log: no I/O."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from gateway.log.base import Commit, partition_of
from gateway.spool.records import SpooledRecord

WINDOW = 16_000
"""Offsets beyond the first record that isn't moved within which others are: a commit has 16,384 bits."""
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

    doubt: float | None = None
    doubt_until: int = 0
    """The offset in the spool after the last record that is in doubt: a turn may have fewer than the failed one."""
    next_offset: int = -1
    retry_at: float = -math.inf
    failures: int = 0
    reason: str = ""
    began: float | None = None
    """When, by the log's clock, the append began that is under way."""

    def failed(self, reason: str, *, now: float, after: float = 0.0) -> None:
        """Note a failure: the next try is at least `after` seconds later."""
        self.reason = reason
        self.failures += 1
        self.retry_at = now + max(after, min(MAX_RETRY_INTERVAL, 0.25 * 2 ** min(self.failures, 10)))

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


@dataclass(slots=True)
class TopicMove:
    """What of a topic has been moved: all below `base`, and the offsets in `done`.

    `doubt` is about records that an earlier process, or this one before the topic got more partitions, may have moved
    without noting it. `until` is the offset after the last record that was ever about to be moved.
    """

    topic: str
    base: int
    done: set[int] = field(default_factory=set)
    doubt: Doubt | None = None
    until: int = 0
    partitions: dict[int, PartitionMove] = field(default_factory=dict)
    is_noted: bool = True
    """Whether the spool says how far it is."""

    @classmethod
    def after(cls, topic: str, moved: Commit) -> "TopicMove":
        """Go on after a commit, of this process or an earlier one."""
        done = {moved.base + index for index in range(8 * len(moved.done)) if moved.covers(moved.base + index)}
        doubt = _decode_doubt(moved.metadata) if moved.metadata else None
        return cls(topic, moved.base, done, doubt, moved.base if doubt is None else doubt.until)

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
        self.partitions = {number: PartitionMove(retry_at=retry_at) for number in range(count)}

    def since(self, records: Iterable[SpooledRecord]) -> float | None:
        """Return since when some of these records may have been stored in any partition; None if none may be."""
        doubt, times = self.doubt, list[float]()
        for record in records:
            if record.tried_at is not None:
                times.append(record.tried_at)
            if doubt is not None and record.offset < doubt.until:
                times.append(doubt.since)
        return min(times, default=None)

    def by_partition(self, records: Iterable[SpooledRecord], *, now: float) -> dict[int, list[SpooledRecord]]:
        """Return what may be moved now, in order, by the partition that it belongs to."""
        found: dict[int, list[SpooledRecord]] = {}
        for record in records:
            number = partition_of(record.key, len(self.partitions))
            if record.offset not in self.done and now >= self.partitions[number].retry_at:
                found.setdefault(number, []).append(record)
        return found

    def finish(self, offsets: Iterable[int]) -> None:
        """Note that records are in the log, or are lost."""
        self.done.update(offsets)
        while self.base in self.done:
            self.done.remove(self.base)
            self.base += 1

    def skip_gap(self, offset: int) -> None:
        """Note that there is no record from the base up to an offset."""
        self.base = max(self.base, offset)
        self.done = {each for each in self.done if each >= self.base}
        self.finish(())

    def commit(self, *, now: float) -> Commit:
        """Return what to store: what has been moved, and what may be in the log from now on; `now` is its time."""
        if self.doubt is not None and self.base >= self.doubt.until:
            self.doubt = None
        bits = 0
        for offset in self.done:
            bits |= 1 << (offset - self.base)
        done = bits.to_bytes((bits.bit_length() + 7) // 8, "little")
        if self.base >= self.until:
            return Commit(self.base, done)
        doubts = [each.doubt for each in self.partitions.values() if each.doubt is not None]
        since = min([now, *doubts, *([] if self.doubt is None else [self.doubt.since])])
        return Commit(self.base, done, b"%.6f %d" % (since, self.until))


def _decode_doubt(metadata: bytes) -> Doubt:
    try:
        since, until = metadata.split()
        return Doubt(float(since), int(until))
    except ValueError:  # of a newer version: look for everything everywhere
        return Doubt(0.0, 1 << 62)


def first_before(records: Sequence[SpooledRecord], *, tried_until: float) -> Sequence[SpooledRecord]:
    """Return those before the first one whose append to the log may still be under way.

    `tried_until` is when the latest were spooled, by this machine's clock, whose append is surely over.
    """
    for index, record in enumerate(records):
        if record.tried_at is not None and record.spooled_at > tried_until:
            return records[:index]
    return records
