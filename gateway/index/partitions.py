"""Which partitions the index has read, how far, and how far their records are done. The writing thread's."""

import sqlite3
from collections import deque
from typing import NamedTuple

from gateway.index.file import rows
from gateway.index.settlement import CommitCoverage, abandoned, advanced, decode_coverage, encode_coverage
from gateway.log.base import LEADER_CLOCK_SKEW, Commit, Partition

_SKEW = round(LEADER_CLOCK_SKEW * 1000)


class Part(NamedTuple):
    """A partition that is read: its number in the index, its topic's id, the next offset, and what its commit covers.

    `last` is when the record before the next offset was appended (µs), 0 if that wasn't read.
    """

    id: int
    topic_id: str
    position: int
    coverage: CommitCoverage | None
    last: int


class Settlement(NamedTuple):
    """A partition's commit, None if its group has none, and where the log began then."""

    commit: Commit | None
    log_start: int


class _Unsettled(NamedTuple):
    """Some events that aren't known to be done: the last one's offset, and when the first was appended (ms)."""

    last: int
    at: int


class Partitions:
    """The table of partitions. `parts` are those that are read, by their names in the log."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._unsettled: dict[int, deque[_Unsettled]] = {}
        self.parts: dict[Partition, Part] = {}
        self.load()

    def load(self) -> None:
        """Read what the file has."""
        select = (
            "SELECT json_group_array(json_array(topic, number, id, topic_id, position, progress, last, unsettled))"
            " FROM partitions WHERE is_gone = 0"
        )
        parts = dict[Partition, Part]()
        self._unsettled.clear()
        for topic, number, id_, topic_id, position, coverage, last, unsettled in rows(self._connection, select):
            parts[Partition(topic, number)] = Part(id_, topic_id, position, decode_coverage(coverage), last)
            if unsettled is not None:
                self._unsettled[id_] = deque([_Unsettled(position - 1, unsettled)])
        self.parts = parts  # at once, as the event loop looks at it

    def begin(self, partition: Partition, topic_id: str, position: int) -> None:
        """Read a partition from an offset on."""
        cursor = self._connection.execute(
            "INSERT INTO partitions (topic, number, topic_id, position) VALUES (?, ?, ?, ?)",
            (*partition, topic_id, position),
        )
        assert cursor.lastrowid is not None
        self.parts[partition] = Part(cursor.lastrowid, topic_id, position, None, 0)

    def forget(self, partition: Partition) -> Part:
        """Read a partition no more, as its topic is gone; what isn't known to be done never will be."""
        part = self.parts.pop(partition)
        self._unsettled.pop(part.id, None)
        self._connection.execute(
            "UPDATE partitions SET is_gone = 1, unsettled = NULL, progress = ? WHERE id = ?",
            (encode_coverage(abandoned(part.coverage)), part.id),
        )
        return part

    def move(self, partition: Partition, position: int, last: int = 0) -> None:
        """Continue with an offset; `last` is when the record before it was appended (µs), if that was read."""
        part = self.parts[partition]
        self.parts[partition] = part._replace(position=position, last=last)
        self._connection.execute("UPDATE partitions SET position = ?, last = ? WHERE id = ?", (position, last, part.id))

    def note_topic_id(self, partition: Partition, topic_id: str) -> None:
        """Keep the id of a topic of which none was known."""
        part = self.parts[partition]
        self.parts[partition] = part._replace(topic_id=topic_id)
        self._connection.execute("UPDATE partitions SET topic_id = ? WHERE id = ?", (topic_id, part.id))

    def add_unsettled(self, partition: int, last: int, at: int) -> None:
        """Note that there are more events: up to an offset, the first one of them appended at a time (ms)."""
        waiting = self._unsettled.setdefault(partition, deque())
        waiting.append(_Unsettled(last, at - _SKEW))
        if len(waiting) == 1:
            self._write_unsettled(partition)

    def advance(self, partition: Partition, settlement: Settlement) -> CommitCoverage | None:
        """Put a commit in force; return the coverage if that has changed."""
        part = self.parts[partition]
        coverage = advanced(part.coverage, *settlement)
        self._settle_to(part.id, coverage.base)
        if coverage == part.coverage:
            return None
        self.parts[partition] = part._replace(coverage=coverage)
        self._connection.execute(
            "UPDATE partitions SET progress = ? WHERE id = ?", (encode_coverage(coverage), part.id)
        )
        return coverage

    def _settle_to(self, partition: int, base: int) -> None:
        """Forget the events that are done, also those that were read only after the commit that covers them."""
        waiting, is_changed = self._unsettled.get(partition, deque()), False
        while waiting and waiting[0].last < base:
            waiting.popleft()
            is_changed = True
        if is_changed:
            self._write_unsettled(partition)

    def _write_unsettled(self, partition: int) -> None:
        waiting = self._unsettled[partition]
        self._connection.execute(
            "UPDATE partitions SET unsettled = ? WHERE id = ?", (waiting[0].at if waiting else None, partition)
        )
