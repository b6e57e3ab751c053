"""What waits in the spool, so that it is known whether the next event must be spooled: no I/O, no clock.

An event must be spooled if an earlier one with its key may still be in there, or its partition of the log accepts no
appends. Keys are counted in slots, so that millions of them take less than a megabyte a topic: now and then a key
shares a slot with another one, and then is spooled as well, which costs a moment and loses nothing.

`records` and `bytes` are approximate: a record that was stored although its append failed isn't counted, and of a
damaged range each offset is removed from the counts. They are exact again once a topic has none. The slots err only on
the side of spooling an event.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from zlib import crc32

from gateway.log.base import Partition, partition_of

SLOTS = 1 << 13
"""How many slots the keys of a topic share."""
NEARLY_FREE = 1_000
"""How many records of a key can be moved in a moment."""


@dataclass(slots=True)
class _Topic:
    slots: dict[int, int] = field(default_factory=dict)
    """Slot → how many records of its keys may be in the spool, including those whose append has failed."""
    records: int = 0
    large: int = 0
    """How many of the records are too large for the log: no event waits for them."""
    bytes: int = 0
    oldest: float | None = None
    """When the oldest record was stored, but for those that are too large."""
    storing: int = 0
    """Records that are being stored."""
    added: int = 0
    dropped: int = 0
    """The offset below which an operator has dropped everything, as far as is known."""
    partitions: int = 1
    closed: set[int] = field(default_factory=set)
    """The numbers of the partitions that take no appends, or take too long."""


class Waiting:
    """Counts of the records in the spool by topic and key, and the partitions that are closed."""

    def __init__(self) -> None:
        self._topics: dict[str, _Topic] = {}
        self._calls: dict[tuple[str, int], list[Callable[[], None]]] = {}
        self.records = 0
        self.bytes = 0

    def begin(self, topic: str, key: bytes, size: int, *, at: float) -> None:
        """Count a record that is about to be stored at a time; later events of its key must be spooled from now on."""
        self.add(topic, key, size, at=at)
        self._topics[topic].storing += 1

    def end(self, topic: str, size: int, *, is_stored: bool) -> None:
        """Note that a record was stored or seemingly wasn't: even then, events of its key must be spooled."""
        self._topics[topic].storing -= 1
        if not is_stored:
            self._subtract(topic, 1, size)

    def add(self, topic: str, key: bytes, size: int, *, at: float) -> None:
        """Count a record that is there."""
        state = self._topics.get(topic)
        if state is None:
            state = self._topics[topic] = _Topic()
        slot = crc32(key) % SLOTS
        state.slots[slot] = state.slots.get(slot, 0) + 1
        if state.oldest is None:
            state.oldest = at
        state.added += 1
        state.records += 1
        state.bytes += size
        self.records += 1
        self.bytes += size

    def add_large(self, topic: str, size: int) -> None:
        """Count a record that is there and was set aside by an earlier process."""
        state = self._topics.setdefault(topic, _Topic())
        state.added += 1
        state.large += 1
        state.records += 1
        state.bytes += size
        self.records += 1
        self.bytes += size

    def merge(self, topic: str, found: "Waiting") -> None:
        """Add the counts of a topic that was counted separately."""
        state, more = self._topics.setdefault(topic, _Topic()), found._topics[topic]  # noqa: SLF001 - it is one of these
        for slot, count in more.slots.items():
            state.slots[slot] = state.slots.get(slot, 0) + count
        state.dropped = more.dropped
        state.oldest = more.oldest if state.oldest is None else state.oldest
        state.added += more.added
        state.large += more.large
        state.records += more.records
        state.bytes += more.bytes
        self.records += more.records
        self.bytes += more.bytes

    def remove(self, topic: str, key: bytes, size: int) -> None:
        """Remove a record that is in the log from the counts."""
        self._subtract(topic, 1, size)
        self._free(topic, key)

    def set_aside(self, topic: str, key: bytes) -> None:
        """Note that a record is too large for the log: events of its key no longer wait for it."""
        state = self._topics[topic]
        state.large += 1
        missed = max(0, state.large - state.records)
        state.records += missed
        self.records += missed
        if state.records <= state.large:
            state.oldest = None
        self._free(topic, key)

    def remove_large(self, topic: str, size: int) -> None:
        """Remove a record that was set aside from the counts."""
        state = self._topics[topic]
        state.large = max(0, state.large - 1)
        self._subtract(topic, 1, size)

    def lose(self, topic: str, count: int, *, large: int = 0) -> None:
        """Remove records that can't be read from the counts; `large` of them were set aside.

        Events with the keys of the others must be spooled until the topic is empty.
        """
        state = self._topics[topic]
        state.large = max(0, state.large - large)
        self._subtract(topic, count, 0)

    def _free(self, topic: str, key: bytes) -> None:
        slots, slot = self._topics[topic].slots, crc32(key) % SLOTS
        if slots.get(slot, 0) > 1:
            slots[slot] -= 1
        else:
            slots.pop(slot, None)
            self._freed(topic, slot)

    def _subtract(self, topic: str, records: int, size: int) -> None:
        state = self._topics[topic]
        records, size = min(records, state.records - state.large), min(size, state.bytes)
        state.records -= records
        state.bytes -= size
        self.records -= records
        self.bytes -= size
        if state.records <= state.large:
            state.oldest = None

    def mark(self, topic: str) -> int | None:
        """Return a token for `clear`, to take before checking that a topic is empty; None while a record is stored."""
        state = self._topics.get(topic)
        if state is None:
            return 0
        return None if state.storing else state.added

    def clear(self, topic: str, mark: int | None) -> int:
        """Forget a topic that has turned out to be empty, unless a record was added since the mark was taken.

        Return how many records it was counted to have all the same.
        """
        state = self._topics.get(topic)
        if state is None or state.storing or state.added != mark:
            return 0
        count, state.large = state.records, 0
        self._subtract(topic, count, state.bytes)
        # No partition is closed now: with nothing left to be moved, none would ever be opened.
        self._topics[topic] = _Topic(partitions=state.partitions, added=state.added, dropped=state.dropped)
        for slot in state.slots:
            self._freed(topic, slot)
        return count

    def set_dropped(self, topic: str, below: int) -> bool:
        """Note that everything below an offset was dropped; return whether that is new."""
        state = self._topics.setdefault(topic, _Topic())
        is_new = below > state.dropped
        state.dropped = below
        return is_new

    def records_of(self, topic: str) -> int:
        """Return how many records a topic has."""
        state = self._topics.get(topic)
        return 0 if state is None else state.records

    def has(self, topic: str) -> bool:
        """Return whether a topic may have records in the spool."""
        state = self._topics.get(topic)
        return state is not None and bool(state.slots or state.storing or state.large)

    @property
    def has_any(self) -> bool:
        """Whether any topic may have records in the spool."""
        return any(self.has(topic) for topic in self._topics)

    def topics(self) -> list[str]:
        """Return the topics that may have records in the spool."""
        return [topic for topic in self._topics if self.has(topic)]

    def must_spool(self, topic: str, key: bytes) -> bool:
        """Return whether an event has to go through the spool."""
        state = self._topics.get(topic)
        if state is None or not state.slots:
            return False
        return crc32(key) % SLOTS in state.slots or partition_of(key, state.partitions) in state.closed

    def is_nearly_free(self, topic: str, key: bytes) -> bool:
        """Return whether so few records of a key wait that the next turn may move all of them."""
        state = self._topics.get(topic)
        if state is None or partition_of(key, state.partitions) in state.closed:
            return False
        return 0 < state.slots.get(crc32(key) % SLOTS, 0) <= NEARLY_FREE

    def when_free(self, topic: str, key: bytes, call: Callable[[], None]) -> None:
        """Call `call` as soon as no record of a key waits any more; in the order of these requests."""
        self._calls.setdefault((topic, crc32(key) % SLOTS), []).append(call)

    def forget(self, topic: str, key: bytes, call: Callable[[], None]) -> None:
        """Cancel a request of `when_free`."""
        slot = topic, crc32(key) % SLOTS
        calls = self._calls.get(slot, [])
        if call in calls:
            calls.remove(call)
            if not calls:
                del self._calls[slot]

    def _freed(self, topic: str, slot: int) -> None:
        for call in self._calls.pop((topic, slot), ()):
            call()

    def close(self, topic: str, key: bytes) -> bool:
        """Note that the partition of a key takes no appends; return whether that is new.

        It isn't closed unless something of its topic waits: otherwise nothing would ever open it again.
        """
        state = self._topics.get(topic)
        number = 0 if state is None else partition_of(key, state.partitions)
        if state is None or not state.slots or number in state.closed:
            return False
        state.closed.add(number)
        return True

    def open(self, partition: Partition) -> None:
        """Note that a partition takes appends."""
        if (state := self._topics.get(partition.topic)) is not None:
            state.closed.discard(partition.number)

    def set_partitions(self, topic: str, count: int) -> None:
        """Note how many partitions a topic has in the log."""
        state = self._topics.get(topic)
        if state is not None and state.partitions != count:
            state.partitions = count
            state.closed.clear()

    def set_oldest(self, topic: str, at: float) -> None:
        """Note when the oldest record of a topic was stored, of those that aren't set aside."""
        if (state := self._topics.get(topic)) is not None and state.records > state.large:
            state.oldest = at

    @property
    def large(self) -> int:
        """How many records are set aside."""
        return sum([state.large for state in self._topics.values()])

    @property
    def oldest(self) -> float | None:
        """When the oldest record was stored, of those that aren't set aside; None if there is none."""
        return min([state.oldest for state in self._topics.values() if state.oldest is not None], default=None)

    def oldest_of(self, topic: str) -> float | None:
        """Return when the oldest record of a topic was stored, as `oldest` does."""
        state = self._topics.get(topic)
        return None if state is None else state.oldest

    def by_topic(self) -> Iterator[tuple[str, int, int, float | None]]:
        """Yield (topic, records, bytes, when the oldest one was stored)."""
        for topic, state in self._topics.items():
            yield topic, state.records, state.bytes, state.oldest
