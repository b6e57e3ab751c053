"""Which events are duplicates, by the dedupe entries in the log: who reads an event that is none stores one.

An event with an identity that is done, has no delivery and no entry, though an earlier one of its partition with its
id and content has one, is a duplicate of that. Entries are stored before the commit that covers their events, so they
are read before that comes into force. Partitions are named "topic/partition" here, as in the records of entries.
"""

import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from gateway.index.event_numbers import id_key
from gateway.index.file import as_json, rows
from gateway.index.settlement import CommitCoverage, newly_ended
from gateway.index.statuses import Status
from gateway.turns import give_way

CHUNK = 4096
"""Offsets of a row, a bit each."""
PIECES = (2, 64, CHUNK)
"""Copies of one event, the first ones, that are read to find the first with an entry: so many, then so many more.

Almost always it is the first of all. Others are before it if they came when dedupe was off: to see beyond those of the
chunk in which entries begin takes as many as a chunk has.
"""
READ_AT_ONCE = 8192
"""Copies that one statement returns at most."""


class Suspect(NamedTuple):
    """An event that may be a duplicate: where it is, its partition's number, its id, the digest of its content."""

    name: str
    offset: int
    partition: int
    id: str
    content: int


class _Kind(NamedTuple):
    """What copies of each other share: their partition, by name and number, and the keys of their id and content."""

    name: str
    partition: int
    id_key: int
    content: int


class Ended(NamedTuple):
    """What has ended of a partition, by its name and number: what wasn't done before, and is by `after`."""

    name: str
    partition: int
    before: CommitCoverage | None
    after: CommitCoverage


class LetThrough:
    """The events that have dedupe entries. One connection's: of the writing thread, or of the reading one."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def add(self, name: str, offsets: Iterable[int]) -> None:
        """Note that the events of a partition at these offsets have entries."""
        added: defaultdict[int, int] = defaultdict(int)
        for offset in offsets:
            chunk, bit = divmod(offset, CHUNK)
            added[chunk] |= 1 << bit
        known = self._bits([(name, chunk) for chunk in added])
        changed = [(name, chunk, f"{bits | known.get((name, chunk), 0):x}") for chunk, bits in added.items()]
        self._connection.execute(
            "INSERT OR REPLACE INTO let_through SELECT value ->> 0, value ->> 1, value ->> 2 FROM json_each(?)",
            (as_json(changed),),
        )

    def forget(self, name: str, below: int | None = None) -> None:
        """Forget the entries of a partition, those of the events below an offset, or all."""
        chunk = 1 << 62 if below is None else below // CHUNK
        self._connection.execute("DELETE FROM let_through WHERE partition = ? AND chunk < ?", (name, chunk))

    def duplicates(self, suspects: Sequence[Suspect], segments: Iterable[int]) -> set[Suspect]:
        """Return those that are duplicates; `segments` are the numbers of all segments.

        That takes as long for the copies of one event, however many there are, as for another event. An original that
        has more copies before it than `PIECES` that were let through without an entry, in chunks with entries of other
        events, isn't found: its copies then aren't duplicates.
        """
        spans = self._spans({each.name for each in suspects})
        bits = self._bits({(each.name, each.offset // CHUNK) for each in suspects if each.name in spans})
        left: defaultdict[_Kind, list[Suspect]] = defaultdict(list)
        for each in suspects:
            if each.name in spans and not _has_entry(bits, each.name, each.offset):
                left[_Kind(each.name, each.partition, id_key(each.id), each.content)].append(each)
        asked = dict[_Kind, tuple[int, int]]()
        for kind, its in left.items():
            span, last = spans[kind.name], max([each.offset for each in its])
            asked[kind] = span.start, min(span.stop, last)
        found: dict[_Kind, int] = {}
        for segment in segments if asked else ():
            for kind, offset in self._originals(segment, asked):
                found[kind] = offset
                asked[kind] = asked[kind][0], offset  # in the others, those before it are looked for
        return {each for kind, offset in found.items() for each in left[kind] if offset < each.offset}

    def _spans(self, names: Iterable[str]) -> Mapping[str, range]:
        """Return between which offsets the entries of partitions are; those without any are left out."""
        chunks = "SELECT {}(chunk) FROM let_through WHERE partition = value"
        select = f"SELECT json_group_array(json_array(value, ({chunks.format('min')}), ({chunks.format('max')})))"
        found = rows(self._connection, f"{select} FROM json_each(?)", as_json(list(names)))
        return {name: range(first * CHUNK, (last + 1) * CHUNK) for name, first, last in found if first is not None}

    def _originals(self, segment: int, asked: Mapping[_Kind, tuple[int, int]]) -> list[tuple[_Kind, int]]:
        """Return the first offset of each kind in a segment that has an entry, between the two that are asked for."""
        found = list[tuple[_Kind, int]]()
        left = [(kind, *span) for kind, span in asked.items()]
        for count in PIECES:
            unknown = list[tuple[_Kind, int, int]]()
            at_once = READ_AT_ONCE // count
            for begin in range(0, len(left), at_once):
                give_way()
                some = left[begin : begin + at_once]
                read = self._offsets(segment, some, count)
                chunks = {(kind.name, at // CHUNK) for (kind, *_), its in zip(some, read, strict=True) for at in its}
                bits = self._bits(chunks)
                for (kind, _, end), its in zip(some, read, strict=True):
                    first = next((at for at in its if _has_entry(bits, kind.name, at)), None)
                    if first is not None:
                        found.append((kind, first))
                    elif len(its) == count:
                        unknown.append((kind, its[-1] + 1, end))
            left = unknown
        return found

    def _offsets(self, segment: int, asked: Sequence[tuple[_Kind, int, int]], count: int) -> list[list[int]]:
        """Return so many offsets of each kind, the first ones from an offset on to before another."""
        its = (
            f"SELECT offset FROM events_{segment} INDEXED BY events_{segment}_by_content"  # noqa: S608 - our own number
            " WHERE id_key - content = value ->> 0 AND content <> 0 AND partition = value ->> 1"
            " AND offset >= value ->> 2 AND offset < value ->> 3"
            f" AND id_key = value ->> 4 AND content = value ->> 5 ORDER BY offset LIMIT {count}"
        )
        select = f"SELECT json_group_array(json((SELECT json_group_array(offset) FROM ({its})))) FROM json_each(?)"  # noqa: S608 - as above
        keys = [
            (kind.id_key - kind.content, kind.partition, first, end, kind.id_key, kind.content)
            for kind, first, end in asked
        ]
        found: list[list[int]] = rows(self._connection, select, as_json(keys))
        return found

    def has_any(self, name: str) -> bool:
        """Return whether an event of a partition has an entry: where dedupe is off, none has."""
        select = "SELECT json_group_array(1) FROM (SELECT 1 FROM let_through WHERE partition = ? LIMIT 1)"
        return bool(rows(self._connection, select, name))

    def _bits(self, chunks: Iterable[tuple[str, int]]) -> Mapping[tuple[str, int], int]:
        select = (
            "SELECT json_group_array(json_array(partition, chunk, bits)) FROM json_each(?) AS asked"
            " CROSS JOIN let_through ON partition = asked.value ->> 0 AND chunk = asked.value ->> 1"
        )
        found = rows(self._connection, select, as_json(list(chunks)))
        return {(name, chunk): int(bits, 16) for name, chunk, bits in found}


def _has_entry(bits: Mapping[tuple[str, int], int], name: str, offset: int) -> bool:
    return bool(bits.get((name, offset // CHUNK), 0) >> offset % CHUNK & 1)


class NewDuplicates:
    """Finds the duplicates among the events that have just ended. The writing thread's."""

    def __init__(self, connection: sqlite3.Connection, let_through: LetThrough) -> None:
        self._connection = connection
        self._let_through = let_through

    def found(self, of: Ended, segments: Sequence[int]) -> list[tuple[int, str, int]]:
        """Return those of a partition that has made progress: their numbers, sources, and times of receipt (µs)."""
        if not self._let_through.has_any(of.name):
            return []
        found = list[tuple[int, str, int]]()
        for first, last in self._spans(of, segments):
            give_way()
            suspects = self._suspects(of, segments, first, last)
            found += [suspects[each] for each in self._let_through.duplicates(list(suspects), segments)]
        return found

    def _spans(self, of: Ended, segments: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Yield the first and last offsets of what is looked at in one step."""
        select = "SELECT json_group_array(at) FROM (SELECT min(offset) AS at FROM events_{} WHERE partition = ?)"
        firsts = [rows(self._connection, select.format(segment), of.partition)[0] for segment in segments]
        ended, single = newly_ended(of.before, of.after)
        least = min([first for first in firsts if first is not None], default=ended.stop)
        for first in range(max(ended.start, least), ended.stop, CHUNK):
            yield first, min(first + CHUNK, ended.stop) - 1
        if single:
            yield single[0], single[-1]

    def _suspects(
        self, of: Ended, segments: Sequence[int], first: int, last: int
    ) -> Mapping[Suspect, tuple[int, str, int]]:
        """Return what of these offsets has ended since, and may be a duplicate, with what is returned of it."""
        former = of.before or CommitCoverage()
        suspects: dict[Suspect, tuple[int, str, int]] = {}
        for segment in segments:
            select = (
                "SELECT json_group_array(json_array(event, source, received, offset, id, content))"  # noqa: S608 - our own number
                f" FROM events_{segment} AS events INDEXED BY events_{segment}_by_offset"
                " WHERE partition = ? AND offset BETWEEN ? AND ? AND content <> 0"
                " AND NOT EXISTS (SELECT 1 FROM deliveries WHERE deliveries.event = events.event)"
            )
            for event, source, received, offset, id_, content in rows(
                self._connection, select, of.partition, first, last
            ):
                if of.after.status_of(offset) is Status.DONE and former.status_of(offset) is not Status.DONE:
                    suspects[Suspect(of.name, offset, of.partition, id_, content)] = event, source, received
        return suspects
