"""Moves what is in the spool to the log, each record once, in the order of its key.

A record is removed from the counts and the file once the log has acknowledged it. What ends without an acknowledgement
may have been stored all the same: then the log is read, from where it was before on, and only what it doesn't have is
appended. Before the first append, the spool records the time from which appends may be in doubt, so that another
process knows as well.
"""

import asyncio
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress

from structlog.typing import FilteringBoundLogger

from gateway.log.base import ALL, Log, Partition
from gateway.model import LogUnavailableError
from gateway.spool.counting import count_topic
from gateway.spool.fair_turns import FairTurns
from gateway.spool.log_answers import LogAnswers
from gateway.spool.log_appends import LogAppends
from gateway.spool.records import SpooledRecord, decode
from gateway.spool.store import SpoolStore
from gateway.spool.stored_events import NoLeaderError, divided, find_stored
from gateway.spool.topic_move import REQUEST_TIMEOUT, PartitionMove, TopicMove, first_before, first_without_doubt
from gateway.spool.waiting import Waiting
from gateway.telemetry.metrics import Metrics

TURNS = 8
"""Topics that are moved at once; and beside them, partitions that are behind the others of their topic."""
TURN_RECORDS = 4_000
TURN_BYTES = 4 << 20
"""Of a topic, or a partition that is behind, what is moved in one turn, before others have theirs."""
READ_RECORDS = 8
"""Records that are read in a turn, for each that it may move: between those of a partition are those of others."""
TRIAL_RECORDS = 200
"""What is tried of a partition that has failed."""
INTERVAL = 0.25
"""Seconds between looks at what there is to move."""
MAX_REST = 1.0
"""Seconds for which a topic isn't looked at whose partitions all rest: by then, it may have others."""
LOOKED_AT_ONCE = 200
"""Topics, which takes a millisecond."""
PARTITIONS_AGE = 3.0
"""Seconds for which the number of a topic's partitions is remembered."""
APPEND_TIMEOUT = 5.0
TRIED_FOR = APPEND_TIMEOUT + REQUEST_TIMEOUT
"""Seconds after which an append of the ingress is over, with all that the client of the log does for it."""
FLUENT = 1.0
"""Seconds for which a topic counts as moving after a turn that has moved something."""
LOG_INTERVAL = 60.0
SWEEP_INTERVAL = 10.0
LARGE_INTERVAL = 300.0
"""Seconds until what was too large is tried again."""
STOP_TIMEOUT = 2.0
"""Seconds to note at a stop what was moved: without it, the next process has to ask the log."""


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
        self._level = FairTurns[Partition](TURNS)
        self._behind = FairTurns[Partition](TURNS)
        self._appends = LogAppends(log=log, waiting=waiting, metrics=metrics, logger=logger)
        self._tasks: set[asyncio.Task[None]] = set()
        self._noting: dict[str, asyncio.Lock] = {}
        self._resting: dict[str, float] = {}
        self._moved_at: dict[str, float] = {}
        self._counted: dict[str, int] = {}
        self._reasons: dict[str, str] = {}
        self._logged_at = -LOG_INTERVAL
        self._sweeping: asyncio.Task[None] | None = None
        self._swept_at = self._loop.time()
        self._answers = LogAnswers(log, is_needed=lambda: waiting.has_any, look=self._see_ends, logger=logger)
        self._woken: dict[str, None] = {}
        self._is_woken = asyncio.Event()
        self._looked_at = -INTERVAL
        """When all topics were looked at, rather than those that were woken."""

    @property
    def reasons(self) -> Mapping[str, str]:
        """Why topics aren't moved now, by topic."""
        return self._reasons

    def is_moving(self, topic: str) -> bool:
        """Return whether something of a topic was moved a moment ago."""
        return self._loop.time() - self._moved_at.get(topic, -FLUENT) < FLUENT

    def wake(self, topic: str) -> None:
        """Look at a topic at once: there is more of it, or others have their turn."""
        self._woken[topic] = None
        self._is_woken.set()

    async def run(self) -> None:
        """Move whatever is there, until cancelled. Cancelled, it leaves everything as another process can take it."""
        watch = self._loop.create_task(self._answers.watch(), name="spool-log-watch")
        try:
            while True:
                try:
                    await self._look()
                except LogUnavailableError as error:
                    self._note("", str(error))
                except Exception:
                    self._logger.exception("spool_move_failed", topic=None, partition=None)
                    await asyncio.sleep(APPEND_TIMEOUT)
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
                    await self._note_all([*self._moves.values()])

    async def _see_ends(self, now: float) -> None:
        for topic, end in (await self._store.ends()).items():
            if topic in self._moves:
                self._moves[topic].ends.note(end, now=now)

    # Whose turn it is.

    async def _look(self) -> None:
        """Give topics their turns, and the partitions that are behind theirs: those that were woken, now and then all.

        With thousands of topics, a look at all of them for each event would take all there is.
        """
        woken, self._woken = self._woken, {}
        is_of_all = self._loop.time() >= self._looked_at + INTERVAL
        if is_of_all:
            self._looked_at = self._loop.time()
        topics = [topic for topic in (self._all_topics() if is_of_all else woken) if self._has_work(topic)]
        if topics:
            await self._learn_partitions(topics)
        for start in range(0, len(topics), LOOKED_AT_ONCE):
            for topic in topics[start : start + LOOKED_AT_ONCE]:
                await self._ask_for_turns(topic)
            self._begin_turns()
            await asyncio.sleep(0)  # the ingress goes on between them
        self._begin_turns()
        self._sweep_if_due(is_empty=is_of_all and not topics)

    def _begin_turns(self) -> None:
        while (who := self._level.begin()) is not None:
            self._begin(who, self._level)
        while (who := self._behind.begin()) is not None:
            self._begin(who, self._behind)

    def _all_topics(self) -> Collection[str]:
        return dict.fromkeys([*self._waiting.topics(), *self._moves])

    def _has_work(self, topic: str) -> bool:
        return self._waiting.has(topic) or self._is_unnoted(topic)

    def _is_unnoted(self, topic: str) -> bool:
        """Return whether more of a topic has been moved than the spool says."""
        move = self._moves.get(topic)
        return move is not None and bool(move.moved or not move.is_noted)

    async def _learn_partitions(self, topics: Collection[str]) -> None:
        now = self._loop.time()
        if now < self._partitions_at + PARTITIONS_AGE and all(topic in self._partitions for topic in topics):
            return
        if now < self._partitions_at + INTERVAL:
            return
        self._partitions_at = now
        found = await self._log.partitions([topic for topic in self._all_topics() if self._has_work(topic)])
        self._partitions = dict(found)
        for topic, count in found.items():
            self._waiting.set_partitions(topic, count)

    async def _ask_for_turns(self, topic: str) -> None:
        now = self._loop.time()
        if now < self._resting.get(topic, now):
            return
        move = self._moves.get(topic)
        if move is None:
            move = TopicMove.after(topic, await self._store.moved(topic))
            await self._store.delete_below(topic, move.start)
            self._moves[topic] = move
        count = self._partitions.get(topic, 0)
        if not count:
            self._resting[topic] = now + PARTITIONS_AGE
            await self._wait_for_topic(move)
            return
        if len(move.partitions) != count:
            if move.is_busy:
                return
            move.set_partitions(count, now=now)
        if move.large and now >= move.large_at + LARGE_INTERVAL and not move.is_busy:
            move.try_large()
        lanes = move.lanes(now=now)
        for number in lanes:
            (self._level if number == ALL else self._behind).ask(Partition(topic, number))
        if not lanes:
            self._resting[topic] = min(now + MAX_REST, move.rests_until)

    async def _wait_for_topic(self, move: TopicMove) -> None:
        """Say that a topic is missing, or that somebody has dropped what waited for it (`gateway spool drop`)."""
        topic, mark = move.topic, self._waiting.mark(move.topic)
        if await self._store.has_records(topic) and await self._store.end(topic) > await self._store.dropped(topic):
            self._note(topic, "expected a topic of the log, got none of this name")
            return
        await self._clear(move, mark)
        self._reasons.pop(topic, None)
        if not move.is_busy:
            del self._moves[topic]  # what was dropped and can't be deleted isn't looked at again

    async def _clear(self, move: TopicMove, mark: int | None) -> None:
        """Forget a topic of which nothing is in the file any more; tell what of it was counted and wasn't moved."""
        topic = move.topic
        dropped = await self._store.dropped(topic) if self._waiting.records_of(topic) else 0
        if not (count := self._waiting.clear(topic, mark)):
            return
        if self._waiting.note_dropped(topic, dropped):
            self._metrics.spool_dropped.inc(count)
            self._logger.warning("spool_dropped", topic=topic, events=count)
        else:
            self._tell_lost(topic, move.start, count, "expected what was counted, got none of it")

    def _begin(self, who: Partition, turns: FairTurns[Partition]) -> None:
        task = self._loop.create_task(self._turn(who, turns), name=f"spool-move-{who.topic}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _turn(self, who: Partition, turns: FairTurns[Partition]) -> None:
        """Move some of a topic's records, or of a partition that is behind the others."""
        move = self._moves.get(who.topic)
        if move is None:  # while it waited for its turn, all of its topic was dropped
            turns.end(who)
            return
        states = [move.partitions[number] for number in move.lanes(now=self._loop.time()).get(who.number, ())]
        for state in states:
            state.is_busy = True
        move.turns += 1
        has_moved = False
        try:
            if states:
                has_moved = await self._move_some(move, states)
        except LogUnavailableError as error:
            for state in states:
                state.rest(self._loop.time() + FLUENT, str(error))
        except Exception:
            self._logger.exception("spool_move_failed", topic=who.topic, partition=None)
            for state in states:
                state.rest(self._loop.time() + APPEND_TIMEOUT)
        finally:
            for state in states:
                state.is_busy = False
                if not has_moved:
                    state.rest(self._loop.time() + INTERVAL, state.reason)
            turns.end(who)
            self._resting.pop(who.topic, None)
            self._tell(move)
            self.wake(who.topic)

    def _tell(self, move: TopicMove) -> None:
        problems = [each.reason for each in move.partitions.values() if each.reason]
        if problems:
            self._note(move.topic, problems[0])
        elif move.large:  # it has a line of its own
            last = list(move.large.values())[-1]
            self._reasons[move.topic] = f"{len(move.large)} too large for it, and tried again every 5 min: {last}"
        else:
            self._reasons.pop(move.topic, None)
            self._reasons.pop("", None)

    # A turn.

    async def _move_some(self, move: TopicMove, states: Sequence[PartitionMove]) -> bool:
        """Move what is there of some partitions, as much as a turn has; return whether something was moved."""
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
        has_moved = False
        if due:
            has_moved = await self._move_due(move, due)
        for number in numbers:
            move.advance(number, found.get(number, ()), read_until)
        await self._delete_moved(move)
        if not move.is_noted and (not due or move.base >= end):
            await self._note_progress(move)
        if has_moved:
            self._moved_at[move.topic] = self._loop.time()
        return has_moved or (not records and read_until < end)

    async def _read(self, move: TopicMove, numbers: Collection[int], end: int) -> tuple[list[SpooledRecord], int]:
        """Read the first records of some partitions, as many as a turn has; return also up to where these are all."""
        found: list[SpooledRecord] = []
        states = [move.partitions[number] for number in numbers]
        limit = min(TURN_RECORDS, TRIAL_RECORDS if any(state.failures for state in states) else TURN_RECORDS)
        size, read, start = 0, 0, min([state.position for state in states])
        while start < end and len(found) < limit and size < TURN_BYTES and read < READ_RECORDS * limit:
            records, start, unreadable = await self._store.read(move.topic, start, end)
            for lost in unreadable:
                self._lose(move, range(lost.start, lost.end), lost.reason)
            read += len(records)
            seen = move.see(decode(records), numbers)
            found += seen
            size += sum([record.size for record in seen])
        return found, start

    def _lose(self, move: TopicMove, lost: range, reason: str) -> None:
        """Note records that nobody can read any more."""
        large = move.aside.intersection(lost)
        if count := move.lose(lost):
            self._waiting.lose(move.topic, count, large=len(large))
            self._tell_lost(move.topic, lost.start, count, reason)

    def _tell_lost(self, topic: str, offset: int, count: int, reason: str) -> None:
        self._metrics.spool_lost.inc(count)
        self._logger.error("spool_records_lost", topic=topic, offset=offset, count=count, error=reason)

    def _due(self, move: TopicMove, found: Mapping[int, Sequence[SpooledRecord]]) -> dict[int, Sequence[SpooledRecord]]:
        """Return the records that may be moved now, in order, by their partitions.

        The appends of the ingress are over; and where some may be in the log already, that can be asked.
        """
        now, due = self._loop.time(), dict[int, Sequence[SpooledRecord]]()
        over_below = move.ends.below(now - TRIED_FOR)
        for number, records in found.items():
            state, first = move.partitions[number], first_before(records, over_below=over_below)
            if first and not self._answers.is_settled:
                first = () if state.doubt is not None else first_without_doubt(move, first)
            if first:
                due[number] = first
            else:
                state.rest(now + INTERVAL, state.reason)
        return due

    async def _move_due(self, move: TopicMove, due: dict[int, Sequence[SpooledRecord]]) -> bool:
        """Move these records, but for those that the log has; return whether something was moved."""
        move.until = max(move.until, *[records[-1].offset + 1 for records in due.values()])
        await self._note_progress(move)
        move.note_topic(self._log.topic_id(move.topic))
        since = move.since([record for records in due.values() for record in records])
        if since is not None:
            due = await self._without_stored(move, due, since)
        moves = [self._appends.move(Partition(move.topic, number), move, found) for number, found in due.items()]
        await asyncio.gather(*moves)
        return bool(move.moved)

    async def _without_stored(
        self, move: TopicMove, due: dict[int, Sequence[SpooledRecord]], since: float
    ) -> dict[int, Sequence[SpooledRecord]]:
        """Return what the log doesn't have, in any partition: a topic that has grown has events in others.

        What can't be found out about its partition is left for later. Another partition that can't be read now, while
        the topic has grown since, would be the only way to a repeated event.
        """
        receipts = {record.receipt for records in due.values() for record in records}
        numbers = list(move.partitions)
        found = await asyncio.gather(
            *[find_stored(self._log, Partition(move.topic, each), receipts, since=since) for each in numbers],
            return_exceptions=True,
        )
        stored: set[bytes] = set()
        problem: LogUnavailableError | None = None
        for number, result in zip(numbers, found, strict=True):
            if isinstance(result, NoLeaderError):
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
            has, rest = divided(records, stored)
            self._metrics.spool_found.inc(len(has))
            self._appends.finish(move, has, since)
            state = move.partitions[number]
            if problem is None:
                state.looked_until = records[-1].offset + 1
            elif not (rest := first_without_doubt(move, rest)):
                state.rest(self._loop.time() + FLUENT, str(problem))
            if rest:
                left[number] = rest
        return left

    async def _note_progress(self, move: TopicMove) -> None:
        """Store what is about to be moved, and from where on.

        If that fails, moving goes on all the same, since it frees the disk: should this process be killed then, what
        it has moved since is moved again.
        """
        async with self._noting.setdefault(move.topic, asyncio.Lock()):  # the latest is stored last
            await self._note_all([move])

    async def _note_all(self, moves: Sequence[TopicMove]) -> None:
        """Do the same for topics of which no more is noted meanwhile, in one write for all of them."""
        commits = {move.topic: move.commit(now=self._log.now()) for move in moves}
        for move in moves:
            move.is_noted = True  # what changes while it is stored is noted next
        try:
            await self._store.commit(commits)
        except LogUnavailableError as error:
            for move in moves:
                move.is_noted = False
                self._note(move.topic, str(error))

    async def _delete_moved(self, move: TopicMove) -> None:
        """Delete what is in the log. If that fails, it is done with the next turn."""
        offsets = sorted(move.moved)
        try:
            kept = await self._store.delete(move.topic, offsets) if offsets else ()
        except LogUnavailableError as error:
            self._note(move.topic, str(error))
        else:
            move.deleted(offsets, kept)

    # What is done now and then.

    def _sweep_if_due(self, *, is_empty: bool) -> None:
        now = self._loop.time()
        is_due = now >= self._swept_at + SWEEP_INTERVAL
        if (is_due or (is_empty and self._appends.has_finished)) and (self._sweeping is None or self._sweeping.done()):
            self._swept_at = now
            self._sweeping = self._loop.create_task(self._sweep(), name="spool-sweep")

    async def _sweep(self) -> None:
        """Give back the space of what was deleted; find what isn't counted."""
        try:
            if self._appends.has_finished:
                self._appends.has_finished = False
                await self._store.give_back()
            await self._count_missed()
        except LogUnavailableError as error:
            self._note("", str(error))
        except Exception:
            self._logger.exception("spool_move_failed", topic=None, partition=None)

    async def _count_missed(self) -> None:
        """Count what was stored although its append failed: a disk took longer than a sender waits.

        Where more is stored or moved meanwhile, what was read may be in the log by now: then the next sweep counts.
        """
        for topic, end in (await self._store.left()).items():
            move = self._moves.get(topic)
            is_known = self._counted.get(topic) == end or (move is not None and (move.is_busy or move.base >= end))
            if is_known or self._waiting.has(topic) or self._is_unnoted(topic):
                continue
            before, found = self._state_of(topic), Waiting()
            await count_topic(self._store, found, topic, end, move)
            if before == self._state_of(topic):
                self._counted[topic] = end
                self._waiting.merge(topic, found)

    def _state_of(self, topic: str) -> tuple[int | None, TopicMove | None, int]:
        """Return what is another one once an event of a topic is stored, or a turn of it has begun."""
        move = self._moves.get(topic)
        return self._waiting.mark(topic), move, 0 if move is None else move.turns

    def _note(self, topic: str, reason: str) -> None:
        """Say why something isn't moved, now and then."""
        self._reasons[topic] = reason
        now = self._loop.time()
        if now >= self._logged_at + LOG_INTERVAL:
            self._logged_at = now
            self._logger.warning("spool_waits", topic=topic or None, error=reason, events=self._waiting.records)
