"""Moves what is in the spool to the log, each record once, in the order of its key.

A record is discounted once the log has acknowledged it. Whatever ends without an acknowledgement may have been stored
all the same: then the log is read, from where it was before on, and only what it doesn't have is appended. Since when
that may be is noted in the spool before the first append, so that another process knows as well.
"""

import asyncio
from collections.abc import Collection, Mapping, Sequence
from functools import partial

from structlog.typing import FilteringBoundLogger

from gateway.log.base import Log, NewRecord, Partition
from gateway.log.embedded.unreadable_records import Unreadable
from gateway.model import LogUnavailableError, RecordTooLargeError
from gateway.spool.counting import count_topic
from gateway.spool.records import SpooledRecord, decode
from gateway.spool.store import SpoolStore
from gateway.spool.stored_events import NoLeaderError, find_stored
from gateway.spool.topic_move import REQUEST_TIMEOUT, WINDOW, PartitionMove, TopicMove, first_before
from gateway.spool.waiting import Waiting
from gateway.telemetry.metrics import Metrics

TURNS = 8
"""Topics that are moved at once."""
TURN_RECORDS = 4_000
TURN_BYTES = 4 << 20
"""Of a topic, what is moved in one turn, before others have theirs."""
INTERVAL = 0.25
"""Seconds between looks at what there is to move."""
PARTITIONS_AGE = 3.0
"""Seconds for which the number of a topic's partitions is remembered."""
APPEND_TIMEOUT = 5.0
TRIED_FOR = APPEND_TIMEOUT + REQUEST_TIMEOUT
"""Seconds after which an append of the ingress is over, with all that the client of the log does for it."""
SETTLE = 4.0
"""Seconds for which the log has to answer before it is asked what it has: what it received before comes first."""
PING_INTERVAL = 0.5
FAST = 1.0
"""Seconds of an append that is no reason for events to go through the spool."""
LOG_INTERVAL = 60.0
SWEEP_INTERVAL = 10.0


class Mover:
    """Runs beside the ingress, or in a command; `run` never ends by itself."""

    def __init__(
        self, *, log: Log, store: SpoolStore, waiting: Waiting, metrics: Metrics, logger: FilteringBoundLogger
    ) -> None:
        self._log = log
        self._store = store
        self._waiting = waiting
        self._metrics = metrics
        self._logger = logger
        self._loop = asyncio.get_running_loop()
        self._moves: dict[str, TopicMove] = {}
        self._partitions: dict[str, int] = {}
        self._partitions_at = -PARTITIONS_AGE
        self._turns: dict[str, None] = {}
        self._resting: dict[str, float] = {}
        self._running: dict[str, asyncio.Task[None]] = {}
        self._reasons: dict[str, str] = {}
        self._logged_at = -LOG_INTERVAL
        self._swept_at = self._loop.time()
        self._moved_since_sweep = False
        self._answers_since: float | None = None
        self.woken = asyncio.Event()

    @property
    def reasons(self) -> Mapping[str, str]:
        """Why topics aren't moved now, by topic."""
        return self._reasons

    async def run(self) -> None:
        """Move whatever is there, until cancelled. Cancelled, it leaves everything as another process can take it."""
        watch = self._loop.create_task(self._watch_log(), name="spool-log-watch")
        try:
            while True:
                try:
                    await self._look()
                except LogUnavailableError as error:
                    self._note("", str(error))
                except Exception:
                    self._logger.exception("spool_move_failed", topic=None, partition=None)
                    await asyncio.sleep(APPEND_TIMEOUT)
                self.woken.clear()
                try:
                    async with asyncio.timeout(INTERVAL):
                        await self.woken.wait()
                except TimeoutError:
                    continue
        finally:
            tasks = [watch, *self._running.values()]
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _watch_log(self) -> None:
        """See since when the log answers, while something waits for it."""
        while True:
            if not self._waiting.topics():
                self._answers_since = None
            else:
                began = self._loop.time()
                try:
                    await self._log.ping()
                except Exception as error:
                    if not isinstance(error, LogUnavailableError):
                        self._logger.exception("spool_move_failed", topic=None, partition=None)
                    self._answers_since = None
                else:
                    if self._answers_since is None:
                        self._answers_since = began
            await asyncio.sleep(PING_INTERVAL)

    @property
    def _is_settled(self) -> bool:
        """Whether the log can be asked what it has."""
        return self._answers_since is not None and self._loop.time() - self._answers_since >= SETTLE

    async def _look(self) -> None:
        """Give topics their turns."""
        topics = self._waiting.topics()
        topics += [topic for topic in self._moves if self._is_behind(topic) and not self._waiting.has(topic)]
        if not topics:
            await self._sweep(is_empty=True)
            return
        await self._learn_partitions(topics)
        now = self._loop.time()
        for topic in topics:
            if topic not in self._running and topic not in self._turns and now >= self._resting.get(topic, now):
                self._turns[topic] = None
        while self._turns and len(self._running) < TURNS:
            topic = next(iter(self._turns))
            del self._turns[topic]
            task = self._loop.create_task(self._turn(topic), name=f"spool-move-{topic}")
            self._running[topic] = task
            task.add_done_callback(partial(self._turn_ended, topic))
        await self._sweep(is_empty=False)

    def _is_behind(self, topic: str) -> bool:
        """Return whether more of a topic has been moved than the spool says."""
        move = self._moves.get(topic)
        return move is not None and not move.is_noted

    async def _learn_partitions(self, topics: Collection[str]) -> None:
        now = self._loop.time()
        if now < self._partitions_at + PARTITIONS_AGE and all(topic in self._partitions for topic in topics):
            return
        if now < self._partitions_at + INTERVAL:
            return
        self._partitions_at = now
        found = await self._log.partitions(topics)
        self._partitions = dict(found)
        for topic, count in found.items():
            self._waiting.set_partitions(topic, count)

    def _turn_ended(self, topic: str, _: asyncio.Task[None]) -> None:
        del self._running[topic]
        self.woken.set()

    async def _turn(self, topic: str) -> None:
        """Move some of a topic's records."""
        try:
            count = self._partitions.get(topic, 0)
            if not count:
                self._rest(topic, PARTITIONS_AGE, "expected a topic of the log, got none of this name")
                return
            if topic not in self._moves:
                self._moves[topic] = TopicMove.after(topic, await self._store.moved(topic))
            move = self._moves[topic]
            move.set_partitions(count, now=self._loop.time())
            has_moved = await self._move_some(move)
        except LogUnavailableError as error:
            self._rest(topic, 1.0, str(error))
        except Exception:
            self._logger.exception("spool_move_failed", topic=topic, partition=None)
            self._resting[topic] = self._loop.time() + APPEND_TIMEOUT
        else:
            problems = [each.reason for each in move.partitions.values() if each.reason]
            if not problems:
                self._reasons.pop(topic, None)
                self._reasons.pop("", None)
            else:
                self._note(topic, problems[0])
            if not has_moved:
                self._resting[topic] = self._loop.time() + INTERVAL

    async def _move_some(self, move: TopicMove) -> bool:
        """Move what is there of a topic, as much as a turn has; return whether something was moved."""
        mark = self._waiting.mark(move.topic)
        end = await self._store.end(move.topic)
        if move.base >= end:
            self._waiting.clear(move.topic, mark)
        records = await self._read(move, end)
        by_partition = self._due(move, records)
        if not by_partition:
            if not move.is_noted:
                await self._note_progress(move)
            return False
        move.until = max(move.until, *[found[-1].offset + 1 for found in by_partition.values()])
        await self._note_progress(move)
        stored: Collection[bytes] = ()
        since = move.since([record for found in by_partition.values() for record in found])
        if since is not None:
            stored = await self._find(move, by_partition, since)
        moves = [
            self._move_partition(Partition(move.topic, number), move.partitions[number], found, stored)
            for number, found in by_partition.items()
        ]
        has_moved = False
        for moved in await asyncio.gather(*moves):
            for record in moved:
                self._waiting.remove(move.topic, record.key, record.size)
            move.finish([record.offset for record in moved])
            has_moved = has_moved or bool(moved)
        move.is_noted = False
        self._moved_since_sweep = True
        return has_moved

    def _due(self, move: TopicMove, records: Sequence[SpooledRecord]) -> dict[int, Sequence[SpooledRecord]]:
        """Return the records that may be moved now, in order, by their partitions.

        The appends of the ingress are over; and where some may be in the log already, that can be asked.
        """
        now, due = self._store.now(), dict[int, Sequence[SpooledRecord]]()
        for number, found in move.by_partition(records, now=self._loop.time()).items():
            state, first, wait = move.partitions[number], first_before(found, tried_until=now - TRIED_FOR), INTERVAL
            if not first:
                wait = min(TRIED_FOR, max(0.0, found[0].spooled_at + TRIED_FOR - now))
            elif self._is_settled or (state.doubt is None and move.since(first) is None):
                due[number] = first
                continue
            state.retry_at = self._loop.time() + wait
        return due

    async def _find(
        self, move: TopicMove, by_partition: dict[int, Sequence[SpooledRecord]], since: float
    ) -> Collection[bytes]:
        """Return which of the events the log has, in any partition: a topic that has grown has them in others.

        What can't be found out about its partition is left for later. Another partition that can't be read now, while
        the topic has grown since, would be the only way to a repeated event.
        """
        receipts = {record.receipt for found in by_partition.values() for record in found}
        found = await asyncio.gather(
            *[find_stored(self._log, Partition(move.topic, each), receipts, since=since) for each in move.partitions],
            return_exceptions=True,
        )
        stored: set[bytes] = set()
        for number, result in zip(move.partitions, found, strict=True):
            if isinstance(result, NoLeaderError):
                if by_partition.pop(number, None):
                    move.partitions[number].failed(str(result), now=self._loop.time())
            elif isinstance(result, BaseException):
                raise result
            else:
                stored.update(result[0])
        return stored

    async def _note_progress(self, move: TopicMove) -> None:
        """Store what has been moved, and what is about to be.

        If that fails, moving goes on all the same, since it frees the disk: should this process be killed then, what
        it has moved since is moved again.
        """
        try:
            await self._store.commit({move.topic: move.commit(now=self._log.now())})
            move.is_noted = True
        except LogUnavailableError as error:
            self._note(move.topic, str(error))

    async def _read(self, move: TopicMove, end: int) -> list[SpooledRecord]:
        """Read the first records that may be moved, as many as a turn has."""
        found: list[SpooledRecord] = []
        size, start, now = 0, move.base, self._loop.time()
        end = min(end, move.base + WINDOW)
        is_gap = True
        while start < end and len(found) < TURN_RECORDS and size < TURN_BYTES:
            is_first = start == move.base
            records, start, unreadable = await self._store.read(move.topic, start, end)
            if records and is_first:  # also if its partition rests
                self._waiting.set_oldest(move.topic, records[0].appended_at)
            is_gap = is_gap and not records and not unreadable
            for lost in unreadable:
                self._lose(move, lost)
            for group in move.by_partition(decode(records), now=now).values():
                found += group
                size += sum([record.size for record in group])
        if is_gap and start >= end:
            move.skip_gap(end)
        found.sort()
        return found

    def _lose(self, move: TopicMove, lost: Unreadable) -> None:
        """Note records that nobody can read any more."""
        count = len(
            [offset for offset in range(lost.start, lost.end) if offset >= move.base and offset not in move.done]
        )
        if count:
            move.finish([offset for offset in range(lost.start, lost.end) if offset >= move.base])
            self._waiting.lose(move.topic, count)
            self._metrics.spool_lost.inc(count)
            self._logger.error(
                "spool_records_lost", topic=move.topic, offset=lost.start, count=count, error=lost.reason
            )

    async def _move_partition(
        self,
        partition: Partition,
        state: PartitionMove,
        records: Sequence[SpooledRecord],
        stored: Collection[bytes],
    ) -> Sequence[SpooledRecord]:
        """Move records of a partition, in order, but for those that are `stored`; return those that the log has now."""
        has: list[SpooledRecord] = []
        try:
            if state.doubt is not None:
                receipts = {record.receipt for record in records}
                found, end = await find_stored(
                    self._log, partition, receipts, since=state.doubt, from_offset=state.next_offset
                )
                stored = {*stored, *found}
                state.found_out(records[-1].offset + 1, end)
            has = [record for record in records if record.receipt in stored]
            self._metrics.spool_found.inc(len(has))
            rest = [record for record in records if record.receipt not in stored]
            state.began, began = self._log.now(), self._loop.time()
            appended = await self._append(partition, state, rest)
        except Exception as error:
            if not isinstance(error, LogUnavailableError):  # the other partitions go on
                self._logger.exception("spool_move_failed", topic=partition.topic, partition=partition.number)
            if state.began is None:
                state.failed(str(error), now=self._loop.time())
            else:
                state.begin_doubt(records[-1].offset + 1)
                state.failed(str(error), now=self._loop.time(), after=REQUEST_TIMEOUT)
            return has
        finally:
            state.began = None
        if appended and self._loop.time() - began < FAST:
            self._waiting.open(partition)
        self._metrics.spool_moved.inc(len(appended))
        return [*has, *appended]

    async def _append(
        self, partition: Partition, state: PartitionMove, records: Sequence[SpooledRecord]
    ) -> Sequence[SpooledRecord]:
        """Append records in order; return them, without those that the log doesn't take because of their size."""
        try:
            positions = await self._log.append_in_order(partition, [_new(record) for record in records])
        except RecordTooLargeError:
            pass
        else:
            state.succeeded(positions[-1].offset + 1 if positions else state.next_offset)
            return records
        appended = []
        for record in records:  # one is too large; those before it may have been stored
            stored, _ = await find_stored(self._log, partition, {record.receipt}, since=state.began or 0.0)
            if not stored:
                try:
                    await self._log.append_in_order(partition, [_new(record)])
                except RecordTooLargeError as error:
                    state.failed(str(error), now=self._loop.time())
                    continue
            appended.append(record)
        return appended

    async def _sweep(self, *, is_empty: bool) -> None:
        """Give back the space of what has been moved, now and then and at the end; find what isn't counted."""
        now = self._loop.time()
        is_due = now >= self._swept_at + SWEEP_INTERVAL
        if self._moved_since_sweep and not self._running and (is_empty or is_due):
            self._moved_since_sweep = False
            await self._store.delete_moved()
        if is_due:
            self._swept_at = now
            await self._count_missed()

    async def _count_missed(self) -> None:
        """Count what was stored although its append failed: a disk took longer than a sender waits."""
        for topic in await self._store.topics():
            move = self._moves.get(topic)
            if not self._waiting.has(topic) and topic not in self._running and not self._is_behind(topic):
                base = (await self._store.moved(topic)).base if move is None else move.base
                if base < await self._store.end(topic) and not self._waiting.has(topic):
                    await count_topic(self._store, self._waiting, topic)

    def _rest(self, topic: str, seconds: float, reason: str) -> None:
        self._resting[topic] = self._loop.time() + seconds
        self._note(topic, reason)

    def _note(self, topic: str, reason: str) -> None:
        """Say why something isn't moved, now and then."""
        self._reasons[topic] = reason
        now = self._loop.time()
        if now >= self._logged_at + LOG_INTERVAL:
            self._logged_at = now
            self._logger.warning("spool_waits", topic=topic or None, error=reason, events=self._waiting.records)


def _new(record: SpooledRecord) -> NewRecord:
    return NewRecord(record.key, record.value, list(record.headers))  # aiokafka takes no other sequence
