"""Which events are duplicates, by the dedupe entries in the log: who reads an event that is none stores one.

An event with an identity that is done, has no delivery and no entry, though an earlier one of its partition with its
id and content has one, is a duplicate of that. Entries are stored before the commit that covers their events, so they
are read before that comes into force. Partitions are named "topic/partition" here, as in the records of entries.
"""

import sqlite3
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from gateway.index.event_numbers import id_key
from gateway.index.file import as_json, rows

CHUNK = 4096
"""Offsets of a row, a bit each."""


class Suspect(NamedTuple):
    """An event that may be a duplicate: where it is, its partition's number, its id, the digest of its content."""

    name: str
    offset: int
    partition: int
    id: str
    content: int


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
        """Return those that are duplicates; `segments` are the numbers of all segments."""
        if not suspects:
            return set()
        # Where dedupe is off, no event has an entry.
        names = set(rows(self._connection, "SELECT json_group_array(DISTINCT partition) FROM let_through"))
        bits = self._bits({(each.name, each.offset // CHUNK) for each in suspects})
        left = [each for each in suspects if each.name in names and not _has_entry(bits, each.name, each.offset)]
        found = set[Suspect]()
        for segment in segments if left else ():
            keys = [(index, id_key(each.id), *each[1:]) for index, each in enumerate(left)]
            select = (
                "SELECT json_group_array(json_array(asked.value ->> 0, events.offset)) FROM json_each(?) AS asked"  # noqa: S608 - our own number
                f" CROSS JOIN events_{segment} AS events ON events.id_key = asked.value ->> 1"
                " WHERE events.offset < asked.value ->> 2 AND events.partition = asked.value ->> 3"
                " AND events.id = asked.value ->> 4 AND events.content = asked.value ->> 5"
            )
            earlier = [(left[index], offset) for index, offset in rows(self._connection, select, as_json(keys))]
            its = self._bits({(each.name, offset // CHUNK) for each, offset in earlier})
            found |= {each for each, offset in earlier if _has_entry(its, each.name, offset)}
        return found

    def _bits(self, chunks: Iterable[tuple[str, int]]) -> Mapping[tuple[str, int], int]:
        select = (
            "SELECT json_group_array(json_array(partition, chunk, bits)) FROM json_each(?) AS asked"
            " CROSS JOIN let_through ON partition = asked.value ->> 0 AND chunk = asked.value ->> 1"
        )
        found = rows(self._connection, select, as_json(list(chunks)))
        return {(name, chunk): int(bits, 16) for name, chunk, bits in found}


def _has_entry(bits: Mapping[tuple[str, int], int], name: str, offset: int) -> bool:
    return bool(bits.get((name, offset // CHUNK), 0) >> offset % CHUNK & 1)
