"""Statements that find the few events with an id in one segment, newest first: pure text.

However many share the id: a sender may give each of its events the same one. What they read doesn't grow with these.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

from gateway.index.event_numbers import id_key
from gateway.log.base import Partition

LAST_RECEIVED = 200
"""Events of a segment with one id among which the newest are looked for: those that were received last."""


class Lookup(NamedTuple):
    """How events with an id are found: a statement by the number of a segment, and its parameters."""

    statement: Callable[[int], str]
    parameters: Mapping[str, str | int]


def of_id(id: str, limit: int) -> Lookup:  # noqa: A002 - what it is
    """Find so many of the events with an id, at most `LAST_RECEIVED`."""

    def statement(segment: int) -> str:
        its = f"SELECT event FROM {_by_id(segment)} ORDER BY received DESC, event DESC LIMIT {LAST_RECEIVED}"  # noqa: S608 - our own numbers
        return _array(f"SELECT event FROM ({its}) ORDER BY event DESC LIMIT :limit")  # noqa: S608 - as above

    return Lookup(statement, _named(id) | {"limit": limit})


def of_request(id: str, received: int, limit: int) -> Lookup:  # noqa: A002 - what it is
    """Find so many of the events with an id that were received at one time (µs)."""

    def statement(segment: int) -> str:
        its = f"SELECT event FROM {_by_id(segment)} AND received = :received"  # noqa: S608 - our own number
        return _array(f"{its} ORDER BY event DESC LIMIT :limit")

    return Lookup(statement, _named(id) | {"received": received, "limit": limit})


def at_place(id: str, partition: Partition, offset: int) -> Lookup:  # noqa: A002 - what it is
    """Find the event with an id that is stored at an offset of a partition."""
    numbers = "SELECT id FROM partitions WHERE topic = :topic AND number = :number"

    def statement(segment: int) -> str:
        events = f"events_{segment} INDEXED BY events_{segment}_by_offset"
        its = f"SELECT event FROM {events} WHERE partition IN ({numbers}) AND offset = :offset AND id = :id"  # noqa: S608 - our own numbers
        return _array(f"{its} ORDER BY event DESC")

    return Lookup(statement, {"id": id, "topic": partition.topic, "number": partition.number, "offset": offset})


def _by_id(segment: int) -> str:
    return f"events_{segment} INDEXED BY events_{segment}_by_id WHERE id_key = :key AND id = :id"


def _array(select: str) -> str:
    return f"SELECT json_group_array(event) FROM ({select})"  # noqa: S608 - our own statement


def _named(id: str) -> dict[str, str | int]:  # noqa: A002 - what it is
    return {"key": id_key(id), "id": id}
