"""Which records of a partition are done, when they finish out of order: received, finished, committable.

             base                        next
    ──────────┼───────────────────────────┼──────────────────▶ offsets
     all done │ ■ unfinished · □ done or gap  │ not read yet; `ahead` says which of it was done before
              │ ■ □ □ ■ □ □ □ □ ■ □       │ ? □ ? ? □

Only unfinished offsets are remembered, so a gap costs nothing however wide it is. Invariant: an offset below `next` is
done exactly if it isn't in `unfinished`, and an offset from `next` on exactly if its bit is set in `ahead`, or if it is
in `gone`: deleted by the log behind records that were fetched, and not received yet.
"""

import math
from collections.abc import Iterator

from gateway.log.base import Assignment, Commit, are_of_different_topics

WINDOW = 16_384  # One bit each in a commit of 2,048 bytes: in base64 they fit the 4,096 characters that Kafka keeps.

_CHUNK = 512  # Offsets per integer: small enough to copy per record, large enough that a window has few.


class CommitProgress:
    """The progress of one partition in one epoch. Every offset that it calls done has finished, or never existed."""

    __slots__ = (
        "_ahead",
        "_gone",
        "_is_settled",
        "_next",
        "_stored",
        "_unfinished",
        "is_committed",
        "is_stale",
        "last_received",
        "lost",
        "topic_id",
        "window",
    )

    def __init__(
        self,
        commit: Commit,
        log_start: int,
        *,
        is_committed: bool = True,
        is_stale: bool = False,
        topic_id: str = "",
        window: int = WINDOW,
    ) -> None:
        """Continue from a commit. Offsets below `log_start` that it doesn't call done are counted in `lost`."""
        bits = int.from_bytes(commit.done, "little")
        deleted = max(0, log_start - commit.base)
        self.window = window
        self.is_committed = is_committed
        """Whether the group has a commit of this partition, or has been sent one."""
        self.topic_id = topic_id
        self.is_stale = is_stale
        """Whether the stored commit is of records that are gone: there is one to store, even if nothing is done."""
        self.lost = deleted - (bits & ((1 << min(deleted, bits.bit_length())) - 1)).bit_count()
        """Number of records that the log deleted before they were done; they count as done from here on."""
        self.last_received: int | None = None
        """The highest offset received in this epoch, done before or not."""
        # Chunk number → a bit for each unfinished offset in it. Invariant: keys ascend and no value is 0, because
        # offsets are received in ascending order; so the first key holds the lowest unfinished offset.
        self._unfinished: dict[int, int] = {}
        self._next = commit.base
        self._ahead = bits  # Bit i stands for `_next + i`. Invariant: bit 0 is clear, for `_move_to` runs over it.
        self._gone: list[range] = []  # Ascending, each after `_next`.
        self._stored = Commit(commit.base, commit.done.rstrip(b"\0"))
        # Whether nothing has changed since there was no commit to send: most partitions are idle at each commit.
        self._is_settled = False
        self._move_to(commit.base + deleted)

    def received(self, offset: int) -> bool:
        """Mark a record as received; return whether it is still to be processed.

        Offsets ascend, and those skipped are gaps in the log. False means that the record was done before: skip it.
        """
        self.last_received = offset
        self._is_settled = False
        if offset < self._next:
            return self._is_unfinished(offset)
        if self._ahead or self._gone:
            was_done = self._ahead >> (offset - self._next) & 1
            self._move_to(offset + 1)
            if was_done:
                return False
        else:
            self._next = offset + 1
        chunk, bit = divmod(offset, _CHUNK)
        self._unfinished[chunk] = self._unfinished.get(chunk, 0) | 1 << bit
        return True

    def records_deleted(self, deleted: range) -> int:
        """Mark offsets as deleted by the log; return how many of those not received weren't done.

        They are done from here on, as any gap is, whether a record comes after them or not.
        """
        self._is_settled = False
        start = max(deleted.start, self._next)
        if start >= deleted.stop:
            return 0
        ahead = self._ahead >> (start - self._next)
        count = deleted.stop - start
        lost = count - (ahead & ((1 << min(count, ahead.bit_length())) - 1)).bit_count()
        self.lost += lost
        if start == self._next:
            self._move_to(deleted.stop)
        elif self._gone and self._gone[-1].stop == start:
            self._gone[-1] = range(self._gone[-1].start, deleted.stop)
        else:
            self._gone.append(range(start, deleted.stop))
        return lost

    def mark_done(self, offset: int) -> None:
        """Mark a record as done. An offset that isn't unfinished (finished twice, or a gap) is ignored.

        A record that an earlier epoch received may finish before it is received in this one, and is done all the same.
        """
        self._is_settled = False
        if offset >= self._next:
            if offset < self._next + WINDOW:  # or it would be nobody's
                self._ahead |= 1 << (offset - self._next)
                self._move_to(self._next)
            return
        chunk, bit = divmod(offset, _CHUNK)
        bits = self._unfinished.get(chunk, 0)
        mask = 1 << bit
        if not bits & mask:
            return
        if bits == mask:
            del self._unfinished[chunk]
        else:
            self._unfinished[chunk] = bits ^ mask

    @property
    def base(self) -> int:
        """The lowest offset that isn't done: all below it are."""
        lowest = self.lowest_unfinished()
        return self._next if lowest is None else lowest

    def lowest_unfinished(self) -> int | None:
        """Return the lowest offset that was received and isn't finished, None if there is none."""
        return next(self.unfinished_offsets(), None)

    def reaches(self, offset: int, first: int | None = None) -> bool:
        """Return whether a commit could cover a record that is received now, after those from `first` on."""
        lowest = self.lowest_unfinished()
        if lowest is None:
            lowest = offset if first is None else first
        return offset < lowest + WINDOW

    def has_room(self) -> bool:
        """Return whether the span from the base to the last received offset is below the window."""
        return self._next - self.base < self.window

    def last_behind(self, share: float, following: int | None = None) -> int:
        """Return the highest offset at which an unfinished record is such a share of the window behind.

        Or one that keeps a commit from covering the record that is to be received next, if `following` is its offset.
        """
        last = self._next - math.ceil(share * self.window)
        return last if following is None else max(last, following - WINDOW)

    def committable(self, *, is_known: bool = False) -> Commit | None:
        """Return the current commit, None if it equals the last one stored, unless `is_known` asks for it anyway.

        Records done beyond 16,384 offsets after the base aren't included: a new owner would process them again. Once a
        record was received there is a commit, even if nothing is done: if it is missing later, the topic was deleted.
        There is one, too, where a stale one has to be replaced.
        """
        if self._is_settled and not is_known:
            return None
        base = self.base
        bits = self._done_from(base)
        commit = Commit(base, bits.to_bytes((bits.bit_length() + 7) // 8, "little"))
        is_first = not self.is_committed and self.last_received is not None
        self._is_settled = commit == self._stored and not (is_first or self.is_stale)
        return None if self._is_settled and not is_known else commit

    def has_committed(self, end: int) -> bool:
        """Return whether everything below an offset is done by the commit stored last."""
        return self._stored.base >= end

    def committed(self, commit: Commit) -> None:
        """Mark this commit as stored."""
        self.is_committed, self.is_stale, self._is_settled = True, False, False
        self._stored = commit._replace(metadata=b"")

    def merge(self, other: "CommitProgress") -> None:
        """Adopt what `other`, the progress of an earlier epoch of the same partition, knows to be done.

        `other` isn't changed; what it received and didn't finish has to be received again here.
        """
        self._is_settled = False
        for offset in list(self.unfinished_offsets()):
            if other.is_done(offset):
                self.mark_done(offset)
        self._move_to(max(self._next, other.base))
        self._ahead |= other._done_from(self._next)  # noqa: SLF001 - of the same class
        self._move_to(self._next)

    def is_of_another_log(self, assignment: Assignment) -> bool:
        """Return whether a reassigned partition lacks what was committed before: its topic was recreated."""
        if are_of_different_topics(assignment.topic_id, self.topic_id):
            return True
        if not assignment.is_committed:
            return self.is_committed
        commit, stored = assignment.commit, self._stored
        if commit.base < stored.base:
            return True  # on the same log no commit goes back
        missing = int.from_bytes(stored.done, "little") >> (commit.base - stored.base)
        return bool(missing & ~int.from_bytes(commit.done, "little"))

    def _move_to(self, offset: int) -> None:
        """Set `next` to an offset, or to the first one after it that isn't done already."""
        while True:
            ahead = self._ahead >> (offset - self._next)
            done_in_a_row = (~ahead & (ahead + 1)).bit_length() - 1
            self._next = offset + done_in_a_row
            self._ahead = ahead >> done_in_a_row
            if not self._gone or self._gone[0].start > self._next:
                return
            offset = max(self._next, self._gone.pop(0).stop)

    def _done_from(self, start: int) -> int:
        """Return a bit for each of the `WINDOW` offsets from `start` (at least the base), set if it is done."""
        gone = self._gone_from(start)
        if start >= self._next and not self._ahead:
            return gone
        span = min(max(self._next - start, 0), WINDOW)
        first, skip = divmod(start, _CHUNK)
        chunks = range(first, (start + span) // _CHUNK + 1)
        unfinished = int.from_bytes(
            b"".join([self._unfinished.get(chunk, 0).to_bytes(_CHUNK // 8, "little") for chunk in chunks]), "little"
        )
        done = ((1 << span) - 1) & ~(unfinished >> skip)
        distance = self._next - start
        if distance >= WINDOW:
            return done
        ahead = self._ahead << distance if distance >= 0 else self._ahead >> -distance
        return done | gone | ahead & ((1 << WINDOW) - 1)

    def _gone_from(self, start: int) -> int:
        """Return such bits for offsets that were deleted and not passed yet."""
        bits = 0
        for gone in self._gone:
            low, high = max(gone.start - start, 0), min(gone.stop - start, WINDOW)
            if low < high:
                bits |= ((1 << (high - low)) - 1) << low
        return bits

    def _is_unfinished(self, offset: int) -> bool:
        chunk, bit = divmod(offset, _CHUNK)
        return bool(self._unfinished.get(chunk, 0) >> bit & 1)

    def is_done(self, offset: int) -> bool:
        """Return whether a record is done, received in this epoch or not."""
        if offset < self._next:
            return not self._is_unfinished(offset)
        return bool(self._ahead >> (offset - self._next) & 1) or any(offset in gone for gone in self._gone)

    def unfinished_offsets(self) -> Iterator[int]:
        """Yield the offsets that were received and aren't finished, in ascending order; none may finish meanwhile."""
        for chunk, bits in self._unfinished.items():
            rest = bits
            while rest:
                yield chunk * _CHUNK + (rest & -rest).bit_length() - 1
                rest &= rest - 1
