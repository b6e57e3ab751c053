"""Which events a partition of an ordered topic holds already, so that what a router has appended twice is told.

                         base                            read
    ──────────────────────┼──────────────────────────────┼───▶  the ordered partition
     in the commit's note │ read again by the next owner

A router appends what it makes of a partition of events in the order of that partition, and what comes after only once
it is acknowledged. After a crash the next one appends some of it again. So an event is a copy exactly if it isn't
beyond the furthest of its partition that came. One thing else makes offsets small: a topic of events that was deleted
and made again. What was appended later than all that came is no copy, whatever its offset.
"""

import struct
from collections import deque
from collections.abc import Mapping
from hashlib import blake2b
from typing import NamedTuple

from gateway.log.base import Partition
from gateway.log.records import Origin

ROW = struct.Struct(">6sHIHI")
"""A partition of events (a digest), and of the furthest record its offset and its time (milliseconds), 6 bytes each."""


class Furthest(NamedTuple):
    """Of a partition of events: the highest offset that came, and the latest append, in milliseconds."""

    offset: int
    at: int


class DuplicateAppends:
    """What came of each partition of events into one ordered partition, from its assignment on."""

    def __init__(self, note: bytes = b"") -> None:
        """Go on from the note of a commit, with the record at its base."""
        rows = [ROW.unpack_from(note, start) for start in range(0, len(note) - ROW.size + 1, ROW.size)]
        # Invariant: who had something last stands last.
        self._settled = {row[0]: Furthest(row[1] << 32 | row[2], row[3] << 32 | row[4]) for row in reversed(rows)}
        self._furthest = self._settled.copy()
        self._ahead: deque[tuple[int, bytes, Furthest]] = deque()  # (where it is, whose it is, what it made of it)
        self.omitted = 0
        """Partitions of events that the last note had no room for."""

    def is_duplicate(self, place: int, origin: Origin) -> bool:
        """Return whether the record at a place holds what came before. To be asked of each record, in order."""
        key = _key(origin.partition)
        offset, at = origin.offset, int(origin.appended_at * 1000)
        known = self._furthest.pop(key, None)
        if known is not None and offset <= known.offset and at <= known.at:
            self._furthest[key] = known
            return True
        is_beyond = known is not None and offset > known.offset
        furthest = Furthest(offset, max(at, known.at) if known is not None and is_beyond else at)
        self._furthest[key] = furthest
        self._ahead.append((place, key, furthest))
        return False

    def metadata(self, base: int, room: int) -> bytes:
        """Return what a commit of this base has to tell the next owner, in so many bytes; bases never go back.

        Where there is no room, the partitions of events are left out that had nothing for longest.
        """
        settled = self._settled
        while self._ahead and self._ahead[0][0] < base:
            _, key, furthest = self._ahead.popleft()
            settled.pop(key, None)
            settled[key] = furthest
        rows = list(settled.items())
        self.omitted = max(0, len(rows) - room // ROW.size)
        return b"".join([_row(key, furthest) for key, furthest in reversed(rows[self.omitted :])])

    def furthest(self, partition: Partition) -> Furthest | None:
        """Return what came last of a partition of events."""
        return self._furthest.get(_key(partition))


def metadata_of(furthest: Mapping[Partition, Furthest]) -> bytes:
    """Return the note of a commit to which nothing is to come that isn't beyond these."""
    return b"".join([_row(_key(partition), each) for partition, each in furthest.items()])


def _key(partition: Partition) -> bytes:
    return blake2b(f"{partition.topic}/{partition.number}".encode(), digest_size=6).digest()


def _row(key: bytes, furthest: Furthest) -> bytes:
    offset, at = furthest
    return ROW.pack(key, offset >> 32, offset & 0xFFFFFFFF, at >> 32, at & 0xFFFFFFFF)
