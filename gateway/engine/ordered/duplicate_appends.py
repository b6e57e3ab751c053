"""Recognise records that routers have appended twice to a partition of an ordered topic.

                         base                            read
    ──────────────────────┼──────────────────────────────┼───▶  the ordered partition
     in the commit's      │ read again by the next owner
    metadata             │

A router appends the records that it makes from a partition of events in the order of that partition, and each only
once the previous one is acknowledged. After a crash, the next router appends some of them again. So a record is a
duplicate exactly if it isn't beyond the furthest position of its event partition so far. One other thing makes offsets
go back: a topic of events that was deleted and recreated. A record whose event was appended later than all before is no
duplicate, whatever its offset. Nor is it one of what a route debounced by another key, or not at all: what it had in
other partitions may not have been appended yet.
"""

import struct
from collections import deque
from collections.abc import Mapping
from hashlib import blake2b
from typing import NamedTuple

from gateway.log.base import Partition
from gateway.log.records import Origin

ROW = struct.Struct(">6sHIHI")
"""A row: a partition of events (a digest), and the offset and time (milliseconds) of its furthest record, 6 bytes each.
"""


class Furthest(NamedTuple):
    """The furthest position in a partition of events: the highest offset, and the latest append, in milliseconds."""

    offset: int
    at: int


class DuplicateAppends:
    """The furthest positions of the event partitions in one ordered partition, from its assignment on."""

    def __init__(self, metadata: bytes = b"") -> None:
        """Continue from the metadata of a commit, with the record at its base."""
        rows = [ROW.unpack_from(metadata, start) for start in range(0, len(metadata) - ROW.size + 1, ROW.size)]
        # Invariant: the event partition with the latest record comes last.
        self._below_base = {row[0]: Furthest(row[1] << 32 | row[2], row[3] << 32 | row[4]) for row in reversed(rows)}
        self._furthest = self._below_base.copy()
        # Per record that no commit covers yet: its offset, its event partition, and the furthest position with it.
        self._ahead: deque[tuple[int, bytes, Furthest]] = deque()
        self.omitted = 0
        """Event partitions that the last metadata had no space for."""

    def is_duplicate(self, offset_here: int, origin: Origin) -> bool:
        """Return whether the record at an offset is a duplicate. To be called for each record, in order."""
        key = _key(origin.partition, origin.debounce_key)
        offset, at = origin.offset, int(origin.appended_at * 1000)
        known = self._furthest.pop(key, None)
        if known is not None and offset <= known.offset and at <= known.at:
            self._furthest[key] = known
            return True
        is_beyond = known is not None and offset > known.offset
        furthest = Furthest(offset, max(at, known.at) if known is not None and is_beyond else at)
        self._furthest[key] = furthest
        self._ahead.append((offset_here, key, furthest))
        return False

    def metadata(self, base: int, room: int) -> bytes:
        """Return the metadata of a commit with this base, of at most `room` bytes; bases never go back.

        If there isn't enough space, the event partitions without records for the longest time are omitted.
        """
        below_base = self._below_base
        while self._ahead and self._ahead[0][0] < base:
            _, key, furthest = self._ahead.popleft()
            below_base.pop(key, None)
            below_base[key] = furthest
        rows = list(below_base.items())
        self.omitted = max(0, len(rows) - room // ROW.size)
        return b"".join([_row(key, furthest) for key, furthest in reversed(rows[self.omitted :])])

    def furthest(self, partition: Partition) -> Furthest | None:
        """Return the furthest position of a partition of events."""
        return self._furthest.get(_key(partition))


def metadata_of(furthest: Mapping[Partition, Furthest]) -> bytes:
    """Return the metadata of a commit after which only records beyond these positions are new."""
    return b"".join([_row(_key(partition), each) for partition, each in furthest.items()])


def _key(partition: Partition, by: str = "") -> bytes:
    return blake2b(f"{partition.topic}/{partition.number}{' ' if by else ''}{by}".encode(), digest_size=6).digest()


def _row(key: bytes, furthest: Furthest) -> bytes:
    offset, at = furthest
    return ROW.pack(key, offset >> 32, offset & 0xFFFFFFFF, at >> 32, at & 0xFFFFFFFF)
