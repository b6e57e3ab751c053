"""Moves what is in the spool to the event log, in the order of its key.

A record is removed from the counts and the file once the log has acknowledged it. An append without an acknowledgement
may have stored its records all the same. Then the log is searched for them, from where it ended before that append, and
only what it lacks is appended. Before the first append, the spool records the time from which appends may be in doubt,
so that another process knows as well. (While its file can't be written, a kill has records moved twice.)
"""

import asyncio
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress

from structlog.typing import FilteringBoundLogger

from gateway.log.base import ALL, Log, Partition
from gateway.model import LogUnavailableError
from gateway.spool.counting import count_topic
from gateway.spool.fair_turns import FairTurns
from gateway.spool.log_appends import LogAppends
from gateway.spool.log_probe import LogProbe
from gateway.spool.records import SpooledRecord, decode
from gateway.spool.store import SpoolStore
from gateway.spool.stored_events import PartitionUnreadableError, find_stored, split_stored
from gateway.spool.topic_move import REQUEST_TIMEOUT, PartitionMove, TopicMove, before_in_doubt, before_in_flight
from gateway.spool.waiting import Waiting
from gateway.telemetry.metrics import Metrics

TURNS = 8
"""Maximum number of topics that are moved concurrently, and likewise of lagging partitions."""
TURN_RECORDS = 4_000
TURN_BYTES = 4 << 20
"""What is moved in one turn of a topic, or of a lagging partition, before others have theirs."""
READ_FACTOR = 8
"""Up to this many records are read per record that a turn may move: those of other partitions lie in between."""
TRIAL_RECORDS = 200
"""Records in a turn of a partition whose last append failed."""
INTERVAL = 0.25
"""Seconds between looks at all topics."""
MAX_IDLE = 1.0
"""Seconds for which a topic is skipped at most, if none of its partitions may be tried: it may get more partitions."""
TOPICS_PER_STEP = 200
"""Topics that are looked at before other tasks run: about a millisecond."""
PARTITIONS_AGE = 3.0
"""Seconds for which the number of a topic's partitions is remembered."""
APPEND_TIMEOUT = 5.0
"""Seconds after which the log's client gives up an append (that of `log/kafka/log.py`)."""
TRIED_FOR = APPEND_TIMEOUT + REQUEST_TIMEOUT
"""Seconds after which nothing of an append of the ingress can still reach the log: its client has given it up, and the
last request is over. (The ingress itself waits less, see `LOG_TIMEOUT` in `spool.py`.)"""
BUG_WAIT = 5.0
"""Seconds until the next try after a bug."""
FAILURE_WAIT = 1.0
"""Seconds until the next try of a partition, if the log or the spool couldn't be read."""
MOVING_FOR = 1.0
"""Seconds for which a topic counts as being moved, after a turn that has moved something."""
WARN_INTERVAL = 60.0
SWEEP_INTERVAL = 10.0
LARGE_INTERVAL = 300.0
"""Seconds until what was too large is tried again."""
STOP_TIMEOUT = 2.0
"""Seconds at a stop to store what has been moved: without that, the next process has to search the log."""


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
        self._partitions: dict[str, int] = {}  # of the topics that were asked about: 0 if there is none
        self._partitions_at = -PARTITIONS_AGE
        self._in_step = FairTurns[Partition](TURNS)
        self._lagging = FairTurns[Partition](TURNS)
        self._appends = LogAppends(log=log, waiting=waiting, metrics=metrics, logger=logger)
        self._tasks: set[asyncio.Task[None]] = set()
        self._progress_locks: dict[str, asyncio.Lock] = {}
        self._idle_until: dict[str, float] = {}
        self._moved_at: dict[str, float] = {}
        self._counted: dict[str, int] = {}
        self._reasons: dict[str, str] = {}
        self._logged_at = -WARN_INTERVAL
        self._sweeping: asyncio.Task[None] | None = None
        self._swept_at = self._loop.time()
        self._probe = LogProbe(log, is_needed=lambda: waiting.has_any, before_ping=self._see_ends, logger=logger)
        self._woken: dict[str, None] = {}
        self._is_woken = asyncio.Event()
        self._looked_at = -INTERVAL
        """When all topics were last looked at, not only those that were woken."""

    @property
    def reasons(self) -> Mapping[str, str]:
        """Why topics aren't moved now, by topic."""
        return self._reasons

    def is_moving(self, topic: str) -> bool:
        """Return whether something of a topic was moved a moment ago."""
        return self._loop.time() - self._moved_at.get(topic, -MOVING_FOR) < MOVING_FOR

    def wake(self, topic: str) -> None:
        """Look at a topic immediately: it has another record, or its turn has ended and it may get another."""
        self._woken[topic] = None
        self._is_woken.set()

    async def run(self) -> None:
        """Move whatever is there, until cancelled; then another process can go on with what is left."""
        watch = self._loop.create_task(self._probe.watch(), name="spool-log-watch")
        try:
            while True:
                try:
                    await self._look()
                except LogUnavailableError as error:
                    self._report("", str(error))
                except Exception:
                    self._logger.exception("spool_move_failed", topic=None, partition=None)
                    await asyncio.sleep(BUG_WAIT)
                if not self._woken:
                    self._is_woken.clear()
                    with suppress(TimeoutError):
                        async with asyncio.timeout(max(0.0, self._looked_at + INTERVAL - self._loop.time())):
                            await self._is_woken.wait()
        finally:
            tasks = [watch, *self._tasks, *([] if self._sweeping is None else [self._sweeping])]
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            with suppress(LogUnavailableError, TimeoutError):
                async with asyncio.timeout(STOP_TIMEOUT):
                    await asyncio.gather(*[self._delete_moved(move) for move in self._moves.values() if move.moved])
                    await self._store_progress_of([*self._moves.values()])

    async def _see_ends(self, now: float) -> None:
        for topic, end in (await self._store.ends()).items():
            if topic in self._moves:
                self._moves[topic].ends.add(end, now=now)

    # Whose turn it is.

    async def _look(self) -> None:
        """Give turns to the topics that were woken, and every INTERVAL to all; and to their lagging partitions.

        With thousands of topics, a look at all of them for each event would use the whole processor.
        """
        woken, self._woken = self._woken, {}
        is_of_all = self._loop.time() >= self._looked_at + INTERVAL
        if is_of_all:
            self._looked_at = self._loop.time()
        topics = [topic for topic in (self._all_topics() if is_of_all else woken) if self._has_work(topic)]
        if topics:
            await self._learn_partitions(topics)
        for start in range(0, len(topics), TOPICS_PER_STEP):
            for topic in topics[start : start + TOPICS_PER_STEP]:
                await self._ask_for_turns(topic)
            self._start_turns()
            await asyncio.sleep(0)  # the ingress goes on meanwhile
        self._start_turns()
        self._sweep_if_due(is_empty=is_of_all and not topics)

    def _start_turns(self) -> None:
        while (partition := self._in_step.begin()) is not None:
            self._start_turn(partition, self._in_step)
        while (partition := self._lagging.begin()) is not None:
            self._start_turn(partition, self._lagging)

    def _all_topics(self) -> Collection[str]:
        return dict.fromkeys([*self._waiting.topics(), *self._moves])

    def _has_work(self, topic: str) -> bool:
        return self._waiting.has(topic) or self._has_unstored_progress(topic)

    def _has_unstored_progress(self, topic: str) -> bool:
        """Return whether more of a topic has been moved than its file says."""
        move = self._moves.get(topic)
        return move is not None and bool(move.moved or not move.is_progress_stored)

    async def _learn_partitions(self, topics: Collection[str]) -> None:
        now = self._loop.time()
        are_known = all(topic in self._partitions for topic in topics)
        if now < self._partitions_at + (PARTITIONS_AGE if are_known else INTERVAL):
            return
        self._partitions_at = now
        asked = [topic for topic in self._all_topics() if self._has_work(topic)]
        found = await self._log.partitions(asked)
        self._partitions = dict.fromkeys(asked, 0) | dict(found)
        for topic, count in found.items():
            self._waiting.set_partitions(topic, count)

    async def _ask_for_turns(self, topic: str) -> None:
        now = self._loop.time()
        if now < self._idle_until.get(topic, now):
            return
        move = self._moves.get(topic)
        if move is None:
            move = TopicMove.after(topic, await self._store.moved(topic))
            await self._store.delete_below(topic, move.start)
            self._moves[topic] = move
        if (count := self._partitions.get(topic)) is None:
            return  # the log was asked about the others a moment ago; the next look asks about this one
        if not count:
            self._idle_until[topic] = now + PARTITIONS_AGE
            await self._wait_for_topic(move)
            return
        if len(move.partitions) != count:
            if move.is_busy:
                return
            move.set_partitions(count, now=now)
        if move.large and now >= move.large_at + LARGE_INTERVAL and not move.is_busy:
            move.try_large()
        due_partitions = move.due_partitions(now=now)
        for number in due_partitions:
            (self._in_step if number == ALL else self._lagging).ask(Partition(topic, number))
        if not due_partitions:
            self._idle_until[topic] = min(now + MAX_IDLE, move.idle_until)

    async def _wait_for_topic(self, move: TopicMove) -> None:
        """Report that a topic is missing; or forget it, if somebody has dropped what waited (`gateway spool drop`)."""
        topic, mark = move.topic, self._waiting.mark(move.topic)
        if await self._store.has_records(topic) and await self._store.end(topic) > await self._store.dropped(topic):
            self._report(topic, "expected a topic of the log, got none of this name (or one that we may not Describe)")
            return
        await self._clear(move, mark)
        self._reasons.pop(topic, None)
        if not move.is_busy:
            del self._moves[topic]  # what was dropped and can't be deleted is ignored

    async def _clear(self, move: TopicMove, mark: int | None) -> None:
        """Forget a topic of which nothing is in the file any more; report what was counted for it and wasn't moved."""
        topic = move.topic
        dropped = await self._store.dropped(topic) if self._waiting.records_of(topic) else 0
        if not (count := self._waiting.clear(topic, mark)):
            return
        if self._waiting.set_dropped(topic, dropped):
            self._metrics.spool_dropped.inc(count)
            self._logger.warning("spool_dropped", topic=topic, events=count)
        else:
            self._report_lost(
                topic, move.start, count, "expected the records that were counted, got none: they aren't in the file"
            )

    def _start_turn(self, partition: Partition, turns: FairTurns[Partition]) -> None:
        task = self._loop.create_task(self._turn(partition, turns), name=f"spool-move-{partition.topic}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _turn(self, partition: Partition, turns: FairTurns[Partition]) -> None:
        """Move some records of a topic, or of a lagging partition."""
        move = self._moves.get(partition.topic)
        if move is None:  # while it waited for its turn, all records of its topic were dropped
            turns.end(partition)
            return
        states = [
            move.partitions[number] for number in move.due_partitions(now=self._loop.time()).get(partition.number, ())
        ]
        for state in states:
            state.is_busy = True
        move.turns += 1
        has_moved = False
        try:
            if states:
                has_moved = await self._move_some(move, states)
        except LogUnavailableError as error:
            for state in states:
                state.wait_until(self._loop.time() + FAILURE_WAIT, str(error))
        except Exception:
            self._logger.exception("spool_move_failed", topic=partition.topic, partition=None)
            for state in states:
                state.wait_until(self._loop.time() + BUG_WAIT)
        finally:
            for state in states:
                state.is_busy = False
                if not has_moved:
                    state.wait_until(self._loop.time() + INTERVAL, state.reason)
            turns.end(partition)
            self._idle_until.pop(partition.topic, None)
            self._update_reason(move)
            self.wake(partition.topic)

    def _update_reason(self, move: TopicMove) -> None:
        problems = [each.reason for each in move.partitions.values() if each.reason]
        if problems:
            self._report(move.topic, problems[0])
        elif move.large:  # each has been logged
            last = list(move.large.values())[-1]
            self._reasons[move.topic] = (
                f"{len(move.large)} too large for the topic, and tried again every 5 min: {last}"
            )
        else:
            self._reasons.pop(move.topic, None)
            self._reasons.pop("", None)

    # A turn.

    async def _move_some(self, move: TopicMove, states: Sequence[PartitionMove]) -> bool:
        """Move records of some partitions, up to what a turn may; return whether something was moved."""
        mark = self._waiting.mark(move.topic)
        await self._delete_moved(move)
        end = await self._store.end(move.topic)
        if move.base >= end:
            await self._clear(move, mark)
        numbers = [number for number, state in move.partitions.items() if state in states]
        records, read_until = await self._read(move, numbers, end)
        found = move.by_partition(records)
        if (oldest := move.oldest) is not None:
            self._waiting.set_oldest(move.topic, oldest)
        due = self._due(move, found)
        has_moved = bool(due) and await self._move_due(move, due)
        for number in numbers:
            move.advance(number, found.get(number, ()), read_until)
        await self._delete_moved(move)
        if not move.is_progress_stored and (not due or move.base >= end):
            await self._store_progress(move)
        if has_moved:
            self._moved_at[move.topic] = self._loop.time()
        return has_moved or (not records and read_until < end)

    async def _read(self, move: TopicMove, numbers: Collection[int], end: int) -> tuple[list[SpooledRecord], int]:
        """Return the first records of these partitions, as many as a turn moves, and up to which offset that is all."""
        found: list[SpooledRecord] = []
        states = [move.partitions[number] for number in numbers]
        limit = min(TURN_RECORDS, TRIAL_RECORDS if any(state.failures for state in states) else TURN_RECORDS)
        size, read, start = 0, 0, min([state.position for state in states])
        while start < end and len(found) < limit and size < TURN_BYTES and read < READ_FACTOR * limit:
            records, start, unreadable = await self._store.read(move.topic, start, end)
            for lost in unreadable:
                self._lose(move, range(lost.start, lost.end), lost.reason)
            read += len(records)
            seen = move.see(decode(records), numbers)
            found += seen
            size += sum([record.size for record in seen])
        return found, start

    def _lose(self, move: TopicMove, lost: range, reason: str) -> None:
        """Give up records that nobody can read any more, and report them."""
        large = move.aside.intersection(lost)
        if count := move.lose(lost):
            self._waiting.lose(move.topic, count, large=len(large))
            self._report_lost(move.topic, lost.start, count, reason)

    def _report_lost(self, topic: str, offset: int, count: int, reason: str) -> None:
        self._metrics.spool_lost.inc(count)
        self._logger.error("spool_records_lost", topic=topic, offset=offset, count=count, error=reason)

    def _due(self, move: TopicMove, found: Mapping[int, Sequence[SpooledRecord]]) -> dict[int, Sequence[SpooledRecord]]:
        """Return the records that may be moved now, in order, by their partitions.

        Left out are records that an append of the ingress in progress may still store and, unless the log can be
        searched now, those that it may have stored already.
        """
        now, due = self._loop.time(), dict[int, Sequence[SpooledRecord]]()
        settled_below = move.ends.below(now - TRIED_FOR)
        for number, records in found.items():
            state, first = move.partitions[number], before_in_flight(records, settled_below=settled_below)
            if first and not self._probe.is_stable:
                first = () if state.doubt is not None else before_in_doubt(move, first)
            if first:
                due[number] = first
            else:
                state.wait_until(now + INTERVAL, state.reason)
        return due

    async def _move_due(self, move: TopicMove, due: dict[int, Sequence[SpooledRecord]]) -> bool:
        """Move these records, but for those that the log has; return whether some of them are there now."""
        offsets = {record.offset for records in due.values() for record in records}
        move.until = max(move.until, *[records[-1].offset + 1 for records in due.values()])
        await self._store_progress(move)
        move.set_topic_id(self._log.topic_id(move.topic))
        since = move.since([record for records in due.values() for record in records])
        if since is not None:
            due = await self._without_stored(move, due, since)
        moves = [self._appends.move(Partition(move.topic, number), move, found) for number, found in due.items()]
        await asyncio.gather(*moves)
        return not offsets.isdisjoint(move.moved)

    async def _without_stored(
        self, move: TopicMove, due: dict[int, Sequence[SpooledRecord]], since: float
    ) -> dict[int, Sequence[SpooledRecord]]:
        """Return what the log doesn't have, in any partition: a topic that has grown has events in others.

        If a partition can't be read, its own records are left for later. The others' are moved all the same: one of
        these is duplicated only if partitions were added since its first append, and that copy is in this partition.
        """
        digests = {record.digest for records in due.values() for record in records}
        numbers = list(move.partitions)
        found = await asyncio.gather(
            *[find_stored(self._log, Partition(move.topic, each), digests, since=since) for each in numbers],
            return_exceptions=True,
        )
        stored: set[bytes] = set()
        problem: LogUnavailableError | None = None
        for number, result in zip(numbers, found, strict=True):
            if isinstance(result, PartitionUnreadableError):
                if due.pop(number, None):
                    move.partitions[number].failed(str(result), now=self._loop.time())
            elif isinstance(result, LogUnavailableError):
                problem = result
            elif isinstance(result, BaseException):
                raise result
            else:
                stored.update(result[0])
        left: dict[int, Sequence[SpooledRecord]] = {}
        for number, records in due.items():
            there, missing = split_stored(records, stored)
            self._metrics.spool_found.inc(len(there))
            self._appends.finish(move, there, since)
            state = move.partitions[number]
            if problem is None:
                state.searched_below = records[-1].offset + 1
            elif not (missing := before_in_doubt(move, missing)):
                state.wait_until(self._loop.time() + FAILURE_WAIT, str(problem))
            if missing:
                left[number] = missing
        return left

    async def _store_progress(self, move: TopicMove) -> None:
        """Store which records are about to be moved, and since when they may be in the log.

        If that fails, moving goes on all the same, since it frees the disk. If the process is killed after that, what
        it has moved since the last success is moved twice.
        """
        async with self._progress_locks.setdefault(move.topic, asyncio.Lock()):  # the latest is stored last
            await self._store_progress_of([move])

    async def _store_progress_of(self, moves: Sequence[TopicMove]) -> None:
        """Do the same for several topics, in one write. Not to be called concurrently for the same topic."""
        commits = {move.topic: move.commit(now=self._log.now()) for move in moves}
        for move in moves:
            move.is_progress_stored = True  # what changes while it is stored is stored next
        try:
            await self._store.commit(commits)
        except LogUnavailableError as error:
            for move in moves:
                move.is_progress_stored = False
                self._report(move.topic, str(error))

    async def _delete_moved(self, move: TopicMove) -> None:
        """Delete from the file what is in the log. If that fails, the next turn does it."""
        offsets = sorted(move.moved)
        try:
            kept = await self._store.delete(move.topic, offsets) if offsets else ()
        except LogUnavailableError as error:
            self._report(move.topic, str(error))
        else:
            move.deleted(offsets, kept)

    # Every few seconds.

    def _sweep_if_due(self, *, is_empty: bool) -> None:
        now = self._loop.time()
        is_due = now >= self._swept_at + SWEEP_INTERVAL
        if (is_due or (is_empty and self._appends.has_finished)) and (self._sweeping is None or self._sweeping.done()):
            self._swept_at = now
            self._sweeping = self._loop.create_task(self._sweep(), name="spool-sweep")

    async def _sweep(self) -> None:
        """Give the space of what was deleted back to the disk; count what was missed."""
        try:
            if self._appends.has_finished:
                self._appends.has_finished = False
                await self._store.give_back()
            await self._count_missed()
        except LogUnavailableError as error:
            self._report("", str(error))
        except Exception:
            self._logger.exception("spool_move_failed", topic=None, partition=None)

    async def _count_missed(self) -> None:
        """Count what was stored although its append failed, on a slow disk; after a kill, delete what was moved."""
        for topic, end in (await self._store.left()).items():
            move = self._moves.get(topic)
            is_known = self._counted.get(topic) == end or (move is not None and (move.is_busy or move.base >= end))
            if is_known or self._waiting.has(topic) or self._has_unstored_progress(topic):
                continue
            if move is None:  # of what was moved, or is dropped by a command that was killed
                await self._store.delete_below(topic, (await self._store.moved(topic)).base)
                self._appends.has_finished = True
            before, found = self._version_of(topic), Waiting()
            await count_topic(self._store, found, topic, end, move)
            if before == self._version_of(topic):  # else some of it may be in the log by now: the next sweep counts it
                self._counted[topic] = end
                self._waiting.merge(topic, found)

    def _version_of(self, topic: str) -> tuple[int | None, TopicMove | None, int]:
        """Return a token that changes whenever a record of a topic is stored, or a turn of it begins."""
        move = self._moves.get(topic)
        return self._waiting.mark(topic), move, 0 if move is None else move.turns

    def _report(self, topic: str, reason: str) -> None:
        """Note why something isn't moved, and log it, at most once in WARN_INTERVAL."""
        self._reasons[topic] = reason
        now = self._loop.time()
        if now >= self._logged_at + WARN_INTERVAL:
            self._logged_at = now
            self._logger.warning("spool_waits", topic=topic or None, error=reason, events=self._waiting.records)
