"""The memory of appends of successors: what fails takes none from the appends of others.

What goes to one topic with one key goes to one partition, which may take no appends while all others do. Such a pair
of topic and key

- has a part of the memory, and takes turns with the others;
- begins no further append while one fails, until one is acknowledged, or none is tried any more.

An append that fails gives its memory back, and is retried beside it.
"""

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field

APPEND_OVERHEAD = 6144
"""Bytes of memory of an unacknowledged append of a successor, without its headers: some 4,000 here, the rest in the
log's client."""
MAX_BYTES_IN_APPENDS = 64 << 20
"""Maximum bytes of memory of all appends that haven't failed, some eight thousand; further ones wait without memory."""
PARTS = 16
"""A pair takes at most one of so many parts. A destination has a dozen pairs: one for each tier, and two more."""
PARTS_THAT_FAIL = 8
"""Parts that appends that have failed may take beside the maximum. Those beyond it keep theirs."""


@dataclass(slots=True, eq=False)
class _Pair:
    """The appends of one topic and key: how many are in flight and `tried`, and which wait for these or for memory.

    `taken` is their part of the maximum. While it `is_failing`, none is begun.
    """

    name: tuple[str, bytes]
    in_flight: int = 0
    tried: int = 0
    taken: int = 0
    is_failing: bool = False
    has_turn: bool = False
    waiting: OrderedDict[object, Callable[[], None]] = field(default_factory=OrderedDict)

    @property
    def may_begin(self) -> bool:
        return not self.is_failing and self.taken < MAX_BYTES_IN_APPENDS // PARTS


@dataclass(slots=True, eq=False)
class Append:
    """An append in flight, and its memory."""

    pair: _Pair
    size: int
    is_tried: bool = True
    is_beside: bool = False


class Appends:
    """The appends in flight, and those that wait. Each that has begun is to be `ended`."""

    def __init__(self) -> None:
        self._pairs: dict[tuple[str, bytes], _Pair] = {}
        self._turns: deque[_Pair] = deque()  # Invariant: has each pair that may begin what waits.
        self._waiting: dict[object, _Pair] = {}
        self._taken = 0
        self._beside = 0

    @property
    def memory_bytes(self) -> int:
        """Bytes of memory of the appends in flight."""
        return self._taken + self._beside

    @property
    def waiting(self) -> int:
        """The number of appends that wait."""
        return len(self._waiting)

    def begin(self, topic: str, key: bytes, size: int, *, source: object, again: Callable[[], None]) -> Append | None:
        """Take memory for an append. If it has to wait, return None, and call `again` when it may begin.

        `source` is what it is the successor of: one append of it may wait.
        """
        pair = self._pairs.get((topic, key))
        if pair is None:
            pair = self._pairs[topic, key] = _Pair((topic, key))
        if self._taken >= MAX_BYTES_IN_APPENDS or not pair.may_begin:
            pair.waiting[source] = again
            self._waiting[source] = pair
            self._queue(pair)
            return None
        pair.in_flight += 1
        pair.tried += 1
        pair.taken += size
        self._taken += size
        return Append(pair, size)

    def failed(self, append: Append) -> None:
        """Begin no more of the pair of an append that has failed and is retried; its memory is for others."""
        pair = append.pair
        if not append.is_tried:
            append.is_tried = True
            pair.tried += 1
        pair.is_failing = True
        self._put_beside(append)

    def undecided(self, append: Append) -> None:
        """Let others begin: this isn't tried while it isn't known who owns its source."""
        if append.is_tried:
            self._not_tried(append)
            self._put_beside(append)

    def ended(self, append: Append, *, is_stored: bool) -> None:
        """Release the memory of an append, and begin what waits."""
        pair = append.pair
        pair.in_flight -= 1
        if append.is_beside:
            self._beside -= append.size
        else:
            self._taken -= append.size
            pair.taken -= append.size
        if is_stored:
            pair.is_failing = False
        if append.is_tried:
            self._not_tried(append)
        self._begin_waiting(pair)
        self._forget_if_empty(pair)

    def look_again(self, source: object) -> None:
        """Call `again` now, if an append of this source waits."""
        pair = self._waiting.pop(source, None)
        if pair is not None:
            pair.waiting.pop(source)()
            self._forget_if_empty(pair)

    def abandon(self) -> None:
        """Forget what waits."""
        for pair in self._waiting.values():
            pair.waiting.clear()
        self._waiting.clear()

    def _not_tried(self, append: Append) -> None:
        append.is_tried = False
        append.pair.tried -= 1
        if not append.pair.tried:  # nobody would find out that it works again
            append.pair.is_failing = False

    def _put_beside(self, append: Append) -> None:
        if not append.is_beside and self._beside < MAX_BYTES_IN_APPENDS * PARTS_THAT_FAIL // PARTS:
            append.is_beside = True
            append.pair.taken -= append.size
            self._taken -= append.size
            self._beside += append.size
        self._begin_waiting(append.pair)

    def _queue(self, pair: _Pair) -> None:
        if pair.waiting and pair.may_begin and not pair.has_turn:
            pair.has_turn = True
            self._turns.append(pair)

    def _begin_waiting(self, changed: _Pair) -> None:
        """Begin what waits, a pair after the other, where there is memory and they may."""
        self._queue(changed)
        while self._turns and self._taken < MAX_BYTES_IN_APPENDS:
            pair = self._turns.popleft()
            pair.has_turn = False
            if pair.waiting and pair.may_begin:
                self.look_again(next(iter(pair.waiting)))
                self._queue(pair)

    def _forget_if_empty(self, pair: _Pair) -> None:
        if not pair.in_flight and not pair.waiting:
            self._pairs.pop(pair.name, None)
