"""Appends of a partition's records to the log, each of which may have stored them without an acknowledgement."""

import asyncio
from collections.abc import Collection, Sequence

from structlog.typing import FilteringBoundLogger

from gateway.log.base import Log, NewRecord, Partition
from gateway.model import LogUnavailableError, RecordTooLargeError
from gateway.spool.records import SpooledRecord
from gateway.spool.stored_events import divided, find_stored
from gateway.spool.topic_move import REQUEST_TIMEOUT, TopicMove
from gateway.spool.waiting import Waiting
from gateway.telemetry.metrics import Metrics

FAST = 1.0
"""Seconds of an append that is no reason for events to go through the spool."""


class LogAppends:
    """What it finishes is removed from the counts. `has_finished` is for the task that gives its space back."""

    def __init__(self, *, log: Log, waiting: Waiting, metrics: Metrics, logger: FilteringBoundLogger) -> None:
        self._log = log
        self._waiting = waiting
        self._metrics = metrics
        self._logger = logger
        self._loop = asyncio.get_running_loop()
        self.has_finished = False

    async def move(self, partition: Partition, move: TopicMove, records: Sequence[SpooledRecord]) -> None:
        """Move records of a partition, in order, but for those that one of its last appends has stored."""
        state = move.partitions[partition.number]
        last = records[-1].offset
        try:
            if (since := state.doubt) is not None:
                receipts = {record.receipt for record in records}
                stored, end = await find_stored(
                    self._log, partition, receipts, since=since, from_offset=state.next_offset
                )
                state.found_out(last + 1, end)
                has, records = divided(records, stored)
                self._metrics.spool_found.inc(len(has))
                self.finish(move, has, since)
            state.began, began = self._log.now(), self._loop.time()
            await self._append(partition, move, records)
        except BaseException as error:
            if state.began is not None:
                state.begin_doubt(last + 1)
            if not isinstance(error, Exception):
                raise
            if not isinstance(error, LogUnavailableError):  # the other partitions go on
                self._logger.exception("spool_move_failed", topic=partition.topic, partition=partition.number)
            after = 0.0 if state.began is None else REQUEST_TIMEOUT
            state.failed(str(error), now=self._loop.time(), after=after)
        else:
            if records and self._loop.time() - began < FAST:
                self._waiting.open(partition)
        finally:
            state.began = None

    async def _append(self, partition: Partition, move: TopicMove, records: Sequence[SpooledRecord]) -> None:
        """Append records in order, but for those that the log doesn't take because of their size."""
        state = move.partitions[partition.number]
        assert state.began is not None
        try:
            positions = await self._log.append_in_order(partition, [_new(record) for record in records])
        except RecordTooLargeError as error:
            if len(records) == 1:
                self._note_large(move, records[0], str(error))
                return
        else:
            state.succeeded(positions[-1].offset + 1 if positions else state.next_offset)
            self._metrics.spool_moved.inc(len(records))
            self.finish(move, records, state.began)
            return
        # One is too large. Those before it may have been stored.
        stored, _ = await find_stored(self._log, partition, {record.receipt for record in records}, since=state.began)
        has, rest = divided(records, stored)
        self._metrics.spool_moved.inc(len(has))
        self.finish(move, has, state.began)
        middle = (len(rest) + 1) // 2
        for half in (rest[:middle], rest[middle:]):
            if half:
                await self._append(partition, move, half)

    def _note_large(self, move: TopicMove, record: SpooledRecord, reason: str) -> None:
        """Note that the log doesn't take a record: it is told once, and for a while nobody tries again."""
        if record.offset not in move.aside:
            move.aside.add(record.offset)
            move.is_noted = False
            self._waiting.set_aside(move.topic, record.key)
            self._logger.error(
                "spool_record_too_large", topic=move.topic, offset=record.offset, bytes=record.size, error=reason
            )
        if not move.large:
            move.large_at = self._loop.time()
        move.large[record.offset] = reason

    def finish(self, move: TopicMove, records: Collection[SpooledRecord], since: float) -> None:
        """Note that the log has records, by appends since a time of its clock."""
        for record in records:
            if record.offset in move.aside:
                move.aside.remove(record.offset)
                move.is_noted = False
                self._waiting.remove_large(move.topic, record.size)
            else:
                self._waiting.remove(move.topic, record.key, record.size)
        if records:
            move.finish([record.offset for record in records], since=since)
            self.has_finished = True


def _new(record: SpooledRecord) -> NewRecord:
    return NewRecord(record.key, record.value, list(record.headers))  # aiokafka takes no other sequence
