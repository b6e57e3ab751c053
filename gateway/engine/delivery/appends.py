"""Memory accounting for successor appends: failing ones can't starve the others.

What goes to one topic with one key goes to one partition, which may take no appends while all others do. Each pair of
topic and key, a *channel*,

- has a bounded share of the memory, and is served round-robin;
- begins no further append while one fails, until one succeeds, or none is left that could (all have ended or are
  suspended). One that is too large for its topic is suspended: it says nothing about the others.

An append that fails returns its memory to the pool and is retried from an overflow allowance.
"""

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

from gateway.engine.partition_tracker import PendingRecord
from gateway.model import LogUnavailableError, RecordTooLargeError

APPEND_OVERHEAD = 6144
"""Bytes of memory of an unacknowledged append of a successor, without its headers: some 4,000 here, the rest in the
log's client."""
MAX_BYTES_IN_APPENDS = 64 << 20
"""Maximum bytes of memory of all appends that haven't failed, some eight thousand; further ones wait without memory."""
SHARES = 16
"""A channel takes at most one of this many shares. A destination has a dozen channels: one a tier, and two more."""
OVERFLOW_SHARES = 8
"""Shares that failed appends may take in addition to the maximum. Those beyond that stay charged to their channel."""

Predicate = Callable[[], bool]


@dataclass(slots=True, eq=False)
class _Channel:
    """The appends of one topic and key: how many are in flight and `active`, and which wait for these or for memory.

    `taken`: bytes charged to this channel. While it `is_failing`, none is begun.
    """

    name: tuple[str, bytes]
    in_flight: int = 0
    active: int = 0
    taken: int = 0
    is_failing: bool = False
    is_queued: bool = False
    waiting: OrderedDict[object, Callable[[], None]] = field(default_factory=OrderedDict)

    @property
    def may_begin(self) -> bool:
        return not self.is_failing and self.taken < MAX_BYTES_IN_APPENDS // SHARES


@dataclass(slots=True, eq=False)
class Append:
    """An append in flight, and its memory."""

    channel: _Channel
    size: int
    is_active: bool = True
    in_overflow: bool = False


class Appends:
    """The appends in flight, and those that wait. Each that has begun has to end with `finish`."""

    def __init__(self) -> None:
        self._channels: dict[tuple[str, bytes], _Channel] = {}
        self._turns: deque[_Channel] = (
            deque()
        )  # Invariant: contains every channel that has waiting appends and may begin one.
        self._waiting: dict[object, _Channel] = {}
        self._taken = 0
        self._overflow_bytes = 0

    @property
    def memory_bytes(self) -> int:
        """Bytes of memory of the appends in flight."""
        return self._taken + self._overflow_bytes

    @property
    def waiting(self) -> int:
        """The number of appends that wait."""
        return len(self._waiting)

    def begin(
        self, topic: str, key: bytes, size: int, *, predecessor: object, when_granted: Callable[[], None]
    ) -> Append | None:
        """Take memory for an append. If it has to wait, return None, and call `when_granted` when it may begin.

        `predecessor` is what the append's record continues: one append of it may wait.
        """
        channel = self._channels.get((topic, key))
        if channel is None:
            channel = self._channels[topic, key] = _Channel((topic, key))
        if self._taken >= MAX_BYTES_IN_APPENDS or not channel.may_begin:
            channel.waiting[predecessor] = when_granted
            self._waiting[predecessor] = channel
            self._queue(channel)
            return None
        channel.in_flight += 1
        channel.active += 1
        channel.taken += size
        self._taken += size
        return Append(channel, size)

    def record_failure(self, append: Append, error: LogUnavailableError | RecordTooLargeError) -> None:
        """Let a failed append hold its channel up, unless it is its own size that is refused: others fit."""
        if isinstance(error, RecordTooLargeError):
            self.suspend(append)
        else:
            self.mark_failed(append)

    def mark_failed(self, append: Append) -> None:
        """Begin no more appends in the channel of a failed append, and move its memory to the overflow allowance."""
        channel = append.channel
        if not append.is_active:
            append.is_active = True
            channel.active += 1
        channel.is_failing = True
        self._move_to_overflow(append)

    def suspend(self, append: Append) -> None:
        """Let others begin: this one is on hold until its predecessor's owner is known, or until the log takes it."""
        if append.is_active:
            self._deactivate(append)
            self._move_to_overflow(append)

    def ownership_predicates(self, append: Append, predecessor: PendingRecord) -> tuple[Predicate, Predicate]:
        """Return two callables: whether the append is still ours, and whether that is unknown for now.

        The second one also suspends the append in that case.
        """

        def is_still_ours() -> bool:
            return not predecessor.tracker.is_reassigned

        def suspend_if_undecided() -> bool:
            if predecessor.tracker.is_suspended:
                self.suspend(append)
                return True
            return False

        return is_still_ours, suspend_if_undecided

    def finish(self, append: Append, *, is_stored: bool) -> None:
        """Release the memory of an append, and begin what waits."""
        channel = append.channel
        channel.in_flight -= 1
        if append.in_overflow:
            self._overflow_bytes -= append.size
        else:
            self._taken -= append.size
            channel.taken -= append.size
        if is_stored:
            channel.is_failing = False
        if append.is_active:
            self._deactivate(append)
        self._begin_waiting(channel)
        self._forget_if_empty(channel)

    def grant_waiting(self, predecessor: object) -> None:
        """Call `when_granted` now, if an append of this predecessor waits."""
        channel = self._waiting.pop(predecessor, None)
        if channel is not None:
            channel.waiting.pop(predecessor)()
            self._forget_if_empty(channel)

    def abandon(self) -> None:
        """Forget what waits."""
        for channel in self._waiting.values():
            channel.waiting.clear()
        self._waiting.clear()

    def _deactivate(self, append: Append) -> None:
        append.is_active = False
        append.channel.active -= 1
        if not append.channel.active:  # nobody would find out that it works again
            append.channel.is_failing = False

    def _move_to_overflow(self, append: Append) -> None:
        if not append.in_overflow and self._overflow_bytes < MAX_BYTES_IN_APPENDS * OVERFLOW_SHARES // SHARES:
            append.in_overflow = True
            append.channel.taken -= append.size
            self._taken -= append.size
            self._overflow_bytes += append.size
        self._begin_waiting(append.channel)

    def _queue(self, channel: _Channel) -> None:
        if channel.waiting and channel.may_begin and not channel.is_queued:
            channel.is_queued = True
            self._turns.append(channel)

    def _begin_waiting(self, changed: _Channel) -> None:
        """Begin what waits, one channel after the other, where there is memory and they may."""
        self._queue(changed)
        while self._turns and self._taken < MAX_BYTES_IN_APPENDS:
            channel = self._turns.popleft()
            channel.is_queued = False
            if channel.waiting and channel.may_begin:
                self.grant_waiting(next(iter(channel.waiting)))
                self._queue(channel)

    def _forget_if_empty(self, channel: _Channel) -> None:
        if not channel.in_flight and not channel.waiting:
            self._channels.pop(channel.name, None)
