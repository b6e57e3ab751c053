"""Deliveries and attempts in the index: read, merged with what was known, settled. Belongs to the writing thread."""

import sqlite3
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from gateway.engine.control.records import DeadLetterProperties, partition_key
from gateway.engine.control.state import Control
from gateway.index.file import as_json, rows
from gateway.index.lives import Lives, Row
from gateway.index.settlement import (
    AttemptOutcome,
    CommitCoverage,
    DeliveryKey,
    DeliveryRow,
    after_attempt,
    after_record,
)
from gateway.index.statuses import OPEN, Status
from gateway.log.base import Commit, Partition
from gateway.log.topics import Topics

COLUMNS = (
    "event, delivery, replayed, route, destination, item, status, decided, partition, offset, successor, attempts,"
    " result, reason, detail, due, letter, lane, began"
)
_NAMED = ", ".join([f"deliveries.{name.strip()}" for name in COLUMNS.split(",")])
_ATTEMPT_COLUMNS = "at, took, result, status, decision, detail, partition, offset, lane"
PAGE = 1000
"""Dead letters that are looked at in one statement."""


class AttemptRow(NamedTuple):
    """An attempt of a delivery; times in microseconds.

    `partition` is 0 if it is known by the delivery's record alone; else its own record is there, at `offset`.
    """

    key: DeliveryKey
    number: int
    at: int
    took: int
    result: str
    status: int
    """The response's, 0 if there was none."""
    decision: str
    detail: str
    partition: int
    offset: int
    lane: int


class Deliveries:
    """The tables of deliveries and of attempts."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def add(self, records: Sequence[DeliveryRow], attempts: Sequence[AttemptRow], *, is_ordered: bool) -> None:
        """Store deliveries as their records have them, with the attempts that these tell.

        `is_ordered`: the records are of an ordered topic.
        """
        if not records:
            return
        keys = {row.key for row in records}
        known = self._known(keys)
        lives = self._lives(keys - known.keys())
        for row in records:
            if (its := lives.get(row.key[:2])) is not None:
                its.add_record(row, is_ordered=is_ordered)
            else:
                known[row.key] = after_record(known.get(row.key), row)
        self._write_lives(known, lives)
        self._write_attempts(attempts, "NOTHING")

    def add_attempts(self, attempts: Sequence[tuple[AttemptRow, DeliveryRow, AttemptOutcome]]) -> None:
        """Store attempts, each with what there is of its delivery if nothing is known of that."""
        if not attempts:
            return
        keys = {row.key for row, _, _ in attempts}
        known = self._known(keys)
        lives = self._lives(keys - known.keys())
        for row, first, outcome in attempts:
            if (its := lives.get(row.key[:2])) is not None:
                its.add_attempt(first, outcome)
            else:
                known[row.key] = after_attempt(known.get(row.key), first, outcome)
        self._write_lives(known, lives)
        self._write_attempts([row for row, _, _ in attempts], _replacing(_ATTEMPT_COLUMNS))

    def settle(self, partition: int, coverage: CommitCoverage, unsure_before: int) -> None:
        """Close the deliveries whose records are done by the commit of their partition.

        Of those appended before a time (µs) it isn't known: the log may have deleted them before they were done.
        """
        update = f"UPDATE deliveries SET status = ?, is_open = 0 WHERE partition = ? AND is_open = 1 AND {_UNSETTLED}"  # noqa: S608 - our own names and numbers
        if coverage.doubted_until:
            doubted = (Status.UNKNOWN, partition, coverage.doubted, coverage.doubted_until)
            self._connection.execute(f"{update} AND offset >= ? AND offset < ?", doubted)
        below = f"{update} AND offset < ?"
        self._connection.execute(f"{below} AND decided < ?", (Status.UNKNOWN, partition, coverage.base, unsure_before))
        self._connection.execute(below, (Status.DONE, partition, coverage.base))
        if coverage.done:
            commit = Commit(coverage.base, coverage.done)
            select = (
                "SELECT json_group_array(offset) FROM deliveries"  # noqa: S608 - our own names and numbers
                f" WHERE partition = ? AND is_open = 1 AND {_UNSETTLED} AND offset BETWEEN ? AND ?"
            )
            last = coverage.base + 8 * len(coverage.done)
            done = [
                offset
                for offset in rows(self._connection, select, partition, coverage.base, last)
                if commit.covers(offset)
            ]
            if done:
                chosen = f"{update} AND offset IN (SELECT value FROM json_each(?))"  # noqa: S608 - our own names and numbers
                self._connection.execute(chosen, (Status.DONE, partition, as_json(done)))

    def forget_partition(self, partition: int) -> None:
        """Give up what is open in a partition whose topic is gone: how it ends isn't known."""
        self._connection.execute(
            "UPDATE deliveries SET status = ?, is_open = 0 WHERE partition = ? AND is_open = 1",
            (Status.UNKNOWN, partition),
        )
        self._connection.execute("UPDATE attempts SET partition = 0 WHERE partition = ?", (partition,))

    def resume(self, control: Control, parked: Mapping[int, Partition]) -> None:
        """Close what was parked and is resumed: `parked` are the partitions of its topic, by number in the index."""
        select = (
            "SELECT json_group_array(json_array(partition, reason)) FROM"
            " (SELECT DISTINCT partition, reason FROM deliveries WHERE status = 'parked')"
        )
        for number, name in rows(self._connection, select):
            if (partition := parked.get(number)) is None:
                continue
            key, partition_name = f"pause/{name}", partition_key(partition)
            below = control.checkpoint(key).get(partition_name, 0)
            until = round(control.covered_until(key, partition_name) * 1e6)
            self._connection.execute(
                "UPDATE deliveries SET status = ?, is_open = 0"
                " WHERE status = 'parked' AND partition = ? AND reason = ? AND offset < ? AND decided <= ?",
                (Status.DONE, number, name, below, until),
            )

    def resolve(self, control: Control, since: int, dead: Mapping[int, Partition]) -> None:
        """Close dead letters that commands have resolved since `control.resolutions` had that value."""
        for command in control.resolved_after(since):
            which = command.filter
            named = {"route": which.route, "destination": which.destination, "reason": which.reason}
            wanted = {name: value for name, value in named.items() if value is not None}
            narrowed = "".join([f" AND {name} = ?" for name in wanted])
            select = (
                "SELECT json_group_array(json_array(event, delivery, replayed, route, destination, reason, decided,"  # noqa: S608 - our own names and numbers
                " partition, offset)) FROM (SELECT * FROM deliveries WHERE status = 'dead'"
                f" AND (event, delivery, replayed) > (?, ?, ?){narrowed}"
                f" ORDER BY event, delivery, replayed LIMIT {PAGE})"
            )
            after: Sequence[object] = (-1, "", -1)
            while page := rows(self._connection, select, *after, *wanted.values()):
                self._close_resolved(control, dead, page)
                after = page[-1][:3]

    def _close_resolved(
        self, control: Control, dead: Mapping[int, Partition], page: Iterable[Sequence[object]]
    ) -> None:
        closed = []
        for event, delivery, replayed, route, destination, reason, decided, number, offset in page:
            assert isinstance(number, int)
            assert isinstance(offset, int)
            assert isinstance(decided, int)
            letter = DeadLetterProperties(
                id=str(delivery), route=str(route), destination=str(destination), reason=str(reason), at=decided / 1e6
            )
            if number in dead and (status := resolution(control, letter, dead[number], offset)) is not None:
                closed.append((status, event, delivery, replayed))
        if closed:
            self._connection.execute(
                "UPDATE deliveries SET status = resolved.value ->> 0, is_open = 0 FROM json_each(?) AS resolved"
                " WHERE event = resolved.value ->> 1 AND delivery = resolved.value ->> 2"
                " AND replayed = resolved.value ->> 3",
                (as_json(closed),),
            )

    def _known(self, keys: Iterable[DeliveryKey]) -> dict[DeliveryKey, DeliveryRow]:
        select = (
            f"SELECT json_group_array(json_array({_NAMED})) FROM json_each(?) AS asked CROSS JOIN deliveries"  # noqa: S608 - our own names and numbers
            " ON deliveries.event = asked.value ->> 0 AND deliveries.delivery = asked.value ->> 1"
            " AND deliveries.replayed = asked.value ->> 2"
        )
        found = [row_of(fields) for fields in rows(self._connection, select, as_json([tuple(key) for key in keys]))]
        return {row.key: row for row in found}

    def _lives(self, unknown: Collection[DeliveryKey]) -> dict[tuple[int, str], Lives]:
        """Return the lives of the deliveries of which something is known, but none of these."""
        if not unknown:
            return {}
        select = (
            f"SELECT json_group_array(json_array(topic, {_NAMED})) FROM json_each(?) AS asked CROSS JOIN deliveries"  # noqa: S608 - our own names and numbers
            " ON deliveries.event = asked.value ->> 0 AND deliveries.delivery = asked.value ->> 1"
            " LEFT JOIN partitions ON partitions.id = deliveries.partition"
        )
        found = defaultdict[tuple[int, str], list[Row]](list)
        for topic, *fields in rows(self._connection, select, as_json(list({key[:2] for key in unknown}))):
            row = row_of(fields)
            is_ordered = topic is not None and topic.endswith(Topics("").ordered(row.route, row.destination))
            found[row.key[:2]].append(Row(row, is_ordered=is_ordered, stored=row.key))
        return {whose: Lives(its) for whose, its in found.items()}

    def _write_lives(self, known: Mapping[DeliveryKey, DeliveryRow], lives: Mapping[tuple[int, str], Lives]) -> None:
        """Store what is known by now; a delivery's row goes on with its latest life."""
        its = [each for of_one in lives.values() for each in of_one.rows]
        moved = [(*each.stored, each.now.key.replayed) for each in its if each.stored not in (None, each.now.key)]
        if moved:
            self._connection.execute(
                "UPDATE deliveries SET replayed = moved.value ->> 3 FROM json_each(?) AS moved"
                " WHERE event = moved.value ->> 0 AND delivery = moved.value ->> 1 AND replayed = moved.value ->> 2",
                (as_json(moved),),
            )
        self._write([*[row for row in known.values() if row.key[:2] not in lives], *[each.now for each in its]])

    def _write(self, changed: Iterable[DeliveryRow]) -> None:
        values = [(*row.key, *row[1:], int(row.status in OPEN)) for row in changed]
        columns = ", ".join([f"value ->> {index}" for index in range(20)])
        self._connection.execute(
            f"INSERT INTO deliveries ({COLUMNS}, is_open) SELECT {columns} FROM json_each(?) WHERE true"  # noqa: S608 - our own names and numbers
            f" ON CONFLICT DO {_replacing(f'{COLUMNS}, is_open')}",
            (as_json(values),),
        )

    def _write_attempts(self, attempts: Sequence[AttemptRow], conflict: str) -> None:
        if attempts:
            columns = ", ".join([f"value ->> {index}" for index in range(13)])
            self._connection.execute(
                f"INSERT INTO attempts SELECT {columns} FROM json_each(?) WHERE true ON CONFLICT DO {conflict}",  # noqa: S608 - our own names and numbers
                (as_json([(*row.key, *row[1:]) for row in attempts]),),
            )


_UNSETTLED = "status IN ('retrying', 'pending')"


def _replacing(columns: str) -> str:
    """Return what is done with a row that there is: `REPLACE` would delete it, and it would be counted again."""
    names = [name for name in columns.split(", ") if name not in DeliveryKey._fields]
    return "UPDATE SET " + ", ".join([f"{name} = excluded.{name}" for name in names])


def resolution(control: Control, letter: DeadLetterProperties, partition: Partition, offset: int) -> Status | None:
    """Return what a dead letter is by the command that resolved it, None while it is open."""
    command = control.resolved_by(letter, partition, offset)
    if command is None:
        return None
    return Status.DROPPED if command.action == "drop" else Status.DONE


def row_of(fields: Sequence[object]) -> DeliveryRow:
    """Return a delivery from the columns of its row."""
    event, delivery, replayed, route, destination, item, status, *rest = fields
    key = DeliveryKey(event, delivery, replayed)  # type: ignore[arg-type] # as the file's columns are declared
    return DeliveryRow(key, route, destination, item, Status(status), *rest)  # type: ignore[arg-type] # as above
