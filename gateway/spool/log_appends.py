"""Appends a partition's records to the log. An append may store them without an acknowledgement."""

import asyncio
from collections.abc import Collection, Sequence

from structlog.typing import FilteringBoundLogger

from gateway.log.base import Log, NewRecord, Partition
from gateway.model import LogUnavailableError, RecordTooLargeError
from gateway.spool.records import SpooledRecord
from gateway.spool.stored_events import find_stored, split_stored
from gateway.spool.topic_move import REQUEST_TIMEOUT, TopicMove
from gateway.spool.waiting import Waiting
from gateway.telemetry.metrics import Metrics

FAST = 1.0
"""Seconds: after an append that took less, new events of its partition go to the log directly again."""


class LogAppends:
    """Removes from the counts what the log has. `has_finished` tells the mover that there is space to give back."""

    def __init__(self, *, log: Log, waiting: Waiting, metrics: Metrics, logger: FilteringBoundLogger) -> None:
        self._log = log
        self._waiting = waiting
        self._metrics = metrics
        self._logger = logger
        self._loop = asyncio.get_running_loop()
        self.has_finished = False

    async def move(self, partition: Partition, move: TopicMove, records: Sequence[SpooledRecord]) -> None:
        """Move records of a partition, in order, but for those that one of its failed appends has stored."""
        state = move.partitions[partition.number]
        last = records[-1].offset
        try:
            if (since := state.doubt) is not None:
                digests = {record.digest for record in records}
                stored, end = await find_stored(
                    self._log, partition, digests, since=since, from_offset=state.next_offset
                )
                state.resolve_doubt(last + 1, end)
                there, records = split_stored(records, stored)
                self._metrics.spool_found.inc(len(there))
                self.finish(move, there, since)
            state.began, started = self._log.now(), self._loop.time()
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
            if records and self._loop.time() - started < FAST:
                self._waiting.open(partition)
        finally:
            state.began = None

    async def _append(self, partition: Partition, move: TopicMove, records: Sequence[SpooledRecord]) -> None:
        """Append records in order; set those aside that are too large for the log."""
        state = move.partitions[partition.number]
        assert state.began is not None
        try:
            positions = await self._log.append_in_order(partition, [_new(record) for record in records])
        except RecordTooLargeError as error:
            if len(records) == 1:
                self._set_aside(move, records[0], str(error))
                return
        else:
            state.succeeded(positions[-1].offset + 1 if positions else state.next_offset)
            self._metrics.spool_moved.inc(len(records))
            self.finish(move, records, state.began)
            return
        # One of them is too large. Those before it may have been stored.
        stored, _ = await find_stored(self._log, partition, {record.digest for record in records}, since=state.began)
        there, missing = split_stored(records, stored)
        self._metrics.spool_moved.inc(len(there))
        self.finish(move, there, state.began)
        middle = (len(missing) + 1) // 2
        for half in (missing[:middle], missing[middle:]):
            if half:
                await self._append(partition, move, half)

    def _set_aside(self, move: TopicMove, record: SpooledRecord, reason: str) -> None:
        """Set a record aside that is too large for the log: it is logged once, and tried again after LARGE_INTERVAL."""
        if record.offset not in move.aside:
            move.aside.add(record.offset)
            move.is_progress_stored = False
            self._waiting.set_aside(move.topic, record.key)
            self._logger.error(
                "spool_record_too_large", topic=move.topic, offset=record.offset, bytes=record.size, error=reason
            )
        if not move.large:
            move.large_at = self._loop.time()
        move.large[record.offset] = reason

    def finish(self, move: TopicMove, records: Collection[SpooledRecord], since: float) -> None:
        """Note that the log has these records, by appends since a time of its clock."""
        for record in records:
            if record.offset in move.aside:
                move.aside.remove(record.offset)
                move.is_progress_stored = False
                self._waiting.remove_large(move.topic, record.size)
            else:
                self._waiting.remove(move.topic, record.key, record.size)
        if records:
            move.finish([record.offset for record in records], since=since)
            self.has_finished = True


def _new(record: SpooledRecord) -> NewRecord:
    return NewRecord(record.key, record.value, list(record.headers))  # aiokafka takes no other sequence
