"""What is asked of the index's counts, and the statements that answer it.

    lanes that are asked for, and may be seen ──▶ their counts in the steps, by name ──▶ Traffic of each name

They are added up by SQLite, which doesn't hold the interpreter's lock meanwhile.
"""

import sqlite3
from collections.abc import Callable, Mapping, Sequence
from math import ceil
from typing import Literal, NamedTuple

from gateway.index.file import as_json, rows, snapshot
from gateway.index.tallies import Sums, Traffic
from gateway.index.traffic_schema import ALL, HOUR, TOTAL, Counted
from gateway.model import Result, immutable
from gateway.turns import give_way

By = Literal["source", "route", "destination"]
MOST_STEPS = 1000
"""Of an answer; a file from which nothing was forgotten yet says of no step for how long it is kept."""
FEW_LANES = 512
"""Lanes whose counts are looked up one by one; of more, all counts of the time are gone through."""


class Lane(NamedTuple):
    """A source's deliveries by a route to a destination; without these (""), its events."""

    source: str
    route: str
    destination: str


@immutable
class TrafficQuery:
    """What is asked for: steps from `since` on to before `until` (Unix seconds).

    With `names`, of each source, route or destination (`by`) that has one of them; without, of all together, or of
    those with this source, route and destination.
    """

    step: int
    since: float
    until: float
    by: By = "route"
    names: Sequence[str] | None = None
    source: str | None = None
    route: str | None = None
    destination: str | None = None


class TrafficReader:
    """Reads counts from an open file. One thread's, which may take seconds for many lanes."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def traffic(self, query: TrafficQuery, sees: Callable[[Lane], bool] | None) -> Mapping[str, Traffic]:
        """Return the traffic of each name; of all that is asked for together under "".

        `sees` returns whether a lane may be counted; None: all may.
        """
        with snapshot(self._connection):
            return self._traffic(query, sees)

    def _traffic(self, query: TrafficQuery, sees: Callable[[Lane], bool] | None) -> Mapping[str, Traffic]:
        [floor] = rows(self._connection, "SELECT json_group_array(floor) FROM steps WHERE step = ?", query.step)
        since = int(max(floor, query.since, query.until - MOST_STEPS * query.step)) // query.step * query.step
        starts = range(since, max(since + 1, ceil(query.until)), query.step)
        lanes = self._lanes(query, sees)
        found = {name: Sums() for name in ([""] if query.names is None else query.names)}
        for what in ALL:
            for name, start, *counted in rows(self._connection, *_counts(what, query, starts, lanes)):
                give_way()
                found[name].add(what, start, counted)
        has_successes = self._has_successes(since)
        return {name: counted.traffic(starts, has_successes=has_successes) for name, counted in found.items()}

    def _has_successes(self, since: int) -> bool:
        select = (
            "SELECT json_group_array(1) FROM (SELECT 1 FROM attempt_counts WHERE step = ? AND start >= ? AND lane = ?"
            " AND result = ? AND count > 0 LIMIT 1)"
        )
        return bool(rows(self._connection, select, HOUR, since // HOUR * HOUR, TOTAL, Result.SUCCESS))

    def _lanes(self, query: TrafficQuery, sees: Callable[[Lane], bool] | None) -> Sequence[int]:
        """Return the numbers of the lanes that are asked for."""
        given = {"source": query.source, "route": query.route, "destination": query.destination}
        asked = {name: value for name, value in given.items() if value is not None}
        if sees is None and query.names is None and not asked:
            return [TOTAL]
        by = {*asked, *([] if query.names is None else [query.by])}
        is_whole = sees is None and by == {"destination"}  # of which all is counted together, too
        conditions = ["source = '' AND route = ''" if is_whole else "source <> ''"]
        conditions += [f"{name} = ?" for name in asked]
        values: list[object] = [*asked.values()]
        if query.names is not None:
            conditions.append(f"{query.by} IN (SELECT value FROM json_each(?))")  # noqa: S608 - a column's name
            values.append(as_json(list(query.names)))
        where = " AND ".join(conditions)
        select = f"SELECT json_group_array(json_array(id, source, route, destination)) FROM lanes WHERE {where}"  # noqa: S608 - our own names
        lanes = []
        for number, *lane in rows(self._connection, select, *values):
            give_way()
            if sees is None or sees(Lane(*lane)):
                lanes.append(number)
        return lanes


def _counts(what: Counted, query: TrafficQuery, starts: Sequence[int], lanes: Sequence[int]) -> tuple[str, str, str]:
    """Return the statement that adds up what a table has counted of lanes in steps, with its parameters.

    Its rows have a name, the start of a step, the table's own keys, and what was counted.
    """
    name = "''" if query.names is None else f"lanes.{query.by}"
    added = ", ".join([f"sum(counted.{each})" for each in what.sums])
    keys = [name, "counted.start", *[f"counted.{key}" for key in what.keys]]
    if len(lanes) <= FEW_LANES:
        which = (
            "json_each(?) AS starts CROSS JOIN json_each(?) AS wanted"
            f" CROSS JOIN {what.counts} AS counted ON counted.start = starts.value AND counted.lane = wanted.value"
        )
        asked = as_json(list(starts))
        limits = ""
    else:
        which = f"{what.counts} AS counted"
        asked = as_json([starts[0], starts[-1]])
        limits = (
            " AND counted.start BETWEEN ?1 ->> 0 AND ?1 ->> 1 AND counted.lane IN (SELECT value FROM json_each(?2))"
        )
    joined = "" if query.names is None else " CROSS JOIN lanes ON lanes.id = counted.lane"
    # A constant name would be compared at each row, too.
    grouped = ", ".join([str(number + 1) for number in range(int(query.names is None), len(keys))])
    columns = ", ".join([f"c{number}" for number in range(len(keys) + len(what.sums))])
    found = (
        f"SELECT {', '.join(keys)}, {added} FROM {which}{joined}"  # noqa: S608 - our own names and numbers
        f" WHERE counted.step = {query.step}{limits} GROUP BY {grouped} HAVING sum(counted.count) > 0"
    )
    select = f"WITH found ({columns}) AS ({found}) SELECT json_group_array(json_array({columns})) FROM found"  # noqa: S608 - as above
    return select, asked, as_json(list(lanes))
