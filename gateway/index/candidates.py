"""Statements that yield the candidates of a search in one segment, newest first: pure text, by what is asked.

Parameters are named: `lower` and `upper` (numbers of events: from the one on to before the other), `count`, and those
of the condition that finds them.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

import orjson

from gateway.index.conditions import Asked, DeliveryCondition
from gateway.index.event_numbers import id_key
from gateway.index.statuses import Status

OF_ROWS = frozenset({Status.DEAD, Status.PARKED, Status.RETRYING, Status.DROPPED, Status.DELIVERED})
"""Nothing is one of these without a delivery of its own."""
_WITHIN = "event >= :lower AND event < :upper"


class Candidates(NamedTuple):
    """A statement, or a part of one, and its parameters but for `lower`, `upper` and `count`."""

    statement: str
    parameters: Mapping[str, str]


def candidates_of(asked: Asked, segment: int, floor: int, are_few: Callable[[str], bool]) -> Candidates:
    """Return how a segment's candidates are found: by their ids, their deliveries or their terms, else all of them.

    `floor` is the number from which on there may be events that aren't done. `are_few` returns whether so few rows
    follow a FROM clause that the terms of each may be looked up.
    """
    events, terms = f"events_{segment}", f"terms_{segment}"
    parameters = {} if asked.expression is None else {"match": asked.expression}
    matching = f" AND EXISTS (SELECT 1 FROM {terms} WHERE {terms} MATCH :match AND rowid = event)" if parameters else ""  # noqa: S608 - our own number
    if asked.ids is not None:
        parameters |= _named(asked.ids)
        named = "id_key IN (SELECT value FROM json_each(:keys)) AND id IN (SELECT value FROM json_each(:ids))"
        found = f"SELECT event FROM {events} INDEXED BY {events}_by_id WHERE {named} AND {_WITHIN}{matching}"  # noqa: S608 - our own names
    elif (by_rows := _by_rows(asked.wanted, events, floor)) and (not parameters or all(map(are_few, by_rows))):
        newest = "ORDER BY event DESC LIMIT :count"
        each_one = [f"SELECT DISTINCT event FROM {each} AND {_WITHIN}{matching} {newest}" for each in by_rows]  # noqa: S608 - quoted
        found = " UNION ".join([f"SELECT event FROM ({each})" for each in each_one])  # noqa: S608 - as above
    elif parameters:
        matched = f"{terms} MATCH :match AND rowid >= :lower AND rowid < :upper"
        found = f"SELECT rowid AS event FROM {terms} WHERE {matched}"  # noqa: S608 - our own number
    else:
        found = f"SELECT event FROM {events} WHERE {_WITHIN}"  # noqa: S608 - our own number
    listed = f"SELECT event FROM ({found}) ORDER BY event DESC LIMIT :count"  # noqa: S608 - as above
    return Candidates(f"SELECT json_group_array(event) FROM ({listed})", parameters)  # noqa: S608 - as above


@lru_cache(maxsize=2)
def _named(ids: frozenset[str]) -> Mapping[str, str]:
    """Return the parameters for ids: the same ones for each segment."""
    ordered = sorted(ids)
    return {"keys": _as_json([id_key(each) for each in ordered]), "ids": _as_json(ordered)}


def count_up_to(clause: str, most: int) -> str:
    """Return a statement that counts the rows of a FROM clause within the limits, up to a number."""
    return f"SELECT count(*) FROM (SELECT 1 FROM {clause} AND {_WITHIN} LIMIT {most})"  # noqa: S608 - quoted


def rows_that_are(condition: DeliveryCondition, number: int) -> Candidates:
    """Return a condition on rows of deliveries, to be added to others, with parameters that no other number has."""
    named = {"route": condition.routes, "destination": condition.destinations, "status": condition.statuses}
    given = {name: sorted(values) for name, values in named.items() if values is not None}
    clauses = [f" AND {name} IN (SELECT value FROM json_each(:{name}_{number}))" for name in given]  # noqa: S608 - our own names
    return Candidates("".join(clauses), {f"{name}_{number}": _as_json(values) for name, values in given.items()})


def _by_rows(wanted: DeliveryCondition | None, events: str, floor: int) -> Sequence[str]:
    """Return where the events with wanted deliveries are found, as FROM clauses; none if all have to be looked at."""
    if wanted is None:
        return ()
    nothing = (f"{events} WHERE 0",)
    if wanted.statuses is not None and wanted.statuses <= OF_ROWS | {Status.PENDING}:
        found = [f"deliveries WHERE status = '{status}'" for status in sorted(wanted.statuses)]
        if Status.PENDING in wanted.statuses and wanted.routes is None and wanted.destinations is None:
            found.append(f"{events} WHERE event >= {floor}")
        return found or nothing
    for column, values in (("route", wanted.routes), ("destination", wanted.destinations)):
        if values is not None:
            return [f"deliveries WHERE {column} = {_quoted(value)}" for value in sorted(values)] or nothing
    return ()


def _quoted(text: str) -> str:
    """Return a text as SQL has it; without NUL, at which a statement ends."""
    return "'" + text.replace("'", "''").replace("\0", "\ufffd") + "'"


def _as_json(value: object) -> str:
    return orjson.dumps(value).decode()
