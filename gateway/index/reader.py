"""Reads the log for the index, in rounds: first what may tell how events ended, last when that was asked for.

    commits ──▶ ends of attempts ──▶ ends of successors ──▶ ends of events
        │          read up to these ends: control, events, successors, attempts; the furthest behind first
        └──────────────────────────────────────────────────────────────▶ in force

So whatever was stored before a commit was asked for has been read when it comes into force, and an event before its
deliveries and attempts. It joins no group: the positions are in the index, in the transaction with what was read.
"""

import asyncio
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import aclosing
from functools import partial
from operator import attrgetter
from typing import NamedTuple, TypeVar

import structlog

from gateway.engine.event_topics import topics_with_events
from gateway.index.hidden import Redactions
from gateway.index.leader_clocks import LeaderClocks
from gateway.index.notes import Note
from gateway.index.partitions import Part, Settlement
from gateway.index.writer import STATUS_OF_LAST_RECORD, Kind, Writer
from gateway.log.base import ALL, Commit, Log, Partition, Record, are_of_different_topics
from gateway.log.topics import ROUTER_GROUP, Topics
from gateway.model import LogUnavailableError

T = TypeVar("T")
_appended_at = attrgetter("appended_at")
logger = structlog.get_logger(__name__)
COMMIT_EVERY = 1.0
"""Seconds after which what was read is committed, and can be found."""
AT_ONCE = 8
"""Questions to the log at a time."""
STEP_BYTES = 2 << 20
"""Read of one partition before the one that is furthest behind then has its turn."""
RETENTION_SLACK = 3600.0
"""Seconds before what is kept from which on events are read: clocks differ."""
_GROUPED = (Kind.EVENTS, Kind.RETRY, Kind.ORDERED)
_ENDS = (*STATUS_OF_LAST_RECORD, Kind.DEDUPE)
"""The kinds whose records are done by commits; those that tell how records were done."""


class Range(NamedTuple):
    """What a partition has: its offsets from `start` on to before `end`."""

    start: int
    end: int


class ReadProgress(NamedTuple):
    """How many records of a topic aren't read yet; until when (Unix seconds) all that was appended is, 0 if unknown."""

    records: int
    complete_to: float


class Round(NamedTuple):
    """What was done: how many records were read, and which partitions couldn't be.

    `has_unread_successors`: some of these may have deliveries, so the commits of before are still in force.
    """

    records: int
    unreadable: Mapping[Partition, str]
    has_unread_successors: bool


class Reader:
    """Follows the log, on the event loop. Only `round` writes, by the writer's thread."""

    def __init__(
        self,
        log: Log,
        topics: Topics,
        writer: Writer,
        executor: Executor,
        *,
        days: float,
        redactions: Callable[[], Redactions],
        event_topics: Callable[[], Collection[str]],
    ) -> None:
        """`redactions` are asked, before anything is read or committed, for what isn't to be found, by source.

        `event_topics` are those that the rules name: nothing else may tell yet that they have events.
        """
        self._log = log
        self._topics = topics
        self._writer = writer
        self._executor = executor
        self._days = days
        self._redactions = redactions
        self._named_topics = event_topics
        self._loop = asyncio.get_running_loop()
        self._event_topics: frozenset[str] = frozenset()
        self._control_position = 0
        self._control_id = ""
        self._complete: dict[Partition, float] = {}
        self._clocks = LeaderClocks()
        self._unreadable: Mapping[Partition, str] = {}
        self._committed_at = self._loop.time()
        self.lag: dict[Partition, int] = {}
        """How many offsets each partition had that weren't read, as of the last look."""
        self.unsettled: dict[str, str] = {}
        """The topics whose commits couldn't be asked for in the last round, and why."""
        self._present: frozenset[str] = frozenset()

    async def round(self) -> Round:
        """Read everything that there is now, and put the commits of its beginning in force.

        These stay as they were while some successors can't be read. Raises LogUnavailableError and
        IndexUnavailableError, after which the next round continues from what was committed.
        """
        await self._hide()
        began = self._log.now()  # before topics are looked for: one that is created meanwhile is read by the next round
        kinds = await self._kinds()
        self._unreadable = unreadable = dict[Partition, str]()
        commits = await self._commits({topic for topic, kind in kinds.items() if kind in _GROUPED}, kinds)
        ids = {topic: self._log.topic_id(topic) for topic in kinds}
        attempts = await self._ranges([topic for topic, kind in kinds.items() if kind is Kind.ATTEMPTS], unreadable)
        successors = await self._ranges([topic for topic, kind in kinds.items() if kind in _ENDS], unreadable)
        events = await self._ranges([topic for topic, kind in kinds.items() if kind is Kind.EVENTS], unreadable)
        await self._forget_gone({**attempts, **successors, **events}, kinds, unreadable)
        count = await self._follow_control(unreadable)
        for ranges in (events, successors):
            count += await self._read(ranges, kinds, unreadable, began)
        if not any(kinds.get(partition.topic) is Kind.EVENTS for partition in unreadable):
            count += await self._read(attempts, kinds, unreadable, began)  # else they wait for their events
        has_unread = any(kinds.get(each.topic) in _ENDS or each.topic == self._topics.control for each in unreadable)
        if not has_unread:
            known = {**successors, **events}
            settlements = {
                partition: Settlement(commit, known[partition].start)
                for partition, commit in commits.items()
                if partition in known
                and partition not in unreadable  # it may be done beyond what was read of it
                and not self._is_recreated(partition, ids[partition.topic])
            }
            by_partition = {partition: kinds[partition.topic] for partition in known}
            await self._run(self._writer.settle, settlements, by_partition, began)
            await self._run(self._writer.note, Note.SETTLED_AT, began)
        await self._commit()
        return Round(count, unreadable, has_unread)

    async def roll_back(self) -> None:
        """Take back what isn't committed, after an error."""
        await self._run(self._writer.roll_back)
        self._complete.clear()
        self._clocks.forget_ends()

    def progress(self) -> Mapping[str, ReadProgress]:
        """Return how far each topic is read, as of the last look; to be asked on the event loop."""
        found: dict[str, ReadProgress] = {}
        for partition in self._present_partitions():
            records, complete_to = found.get(partition.topic, ReadProgress(0, math.inf))
            records += self.lag.get(partition, 0)
            found[partition.topic] = ReadProgress(records, min(complete_to, self._complete_to(partition)))
        return found

    # What there is.

    async def _kinds(self) -> Mapping[str, Kind]:
        """Return the topics to read, each with what its records are."""
        topics = self._topics
        present = set(await self._log.topics())
        self._event_topics = frozenset(
            await topics_with_events(self._log, topics, self._event_topics.union(self._named_topics()))
        )
        kinds = dict.fromkeys(sorted(self._event_topics & present), Kind.EVENTS)
        kinds |= {name: Kind.RETRY for name in sorted(present) if name.startswith(topics.retry(""))}
        kinds |= {name: Kind.ORDERED for name in sorted(present) if topics.ordered_target(name) is not None}
        own = {topics.parked: Kind.PARKED, topics.dead: Kind.DEAD, topics.dedupe: Kind.DEDUPE}
        own |= {f"{topics.prefix}attempts": Kind.ATTEMPTS}
        kinds |= {name: kind for name, kind in own.items() if name in present}
        self._present = frozenset(kinds)
        return kinds

    async def _commits(self, names: set[str], kinds: Mapping[str, Kind]) -> dict[Partition, Commit | None]:
        """Return the commits of partitions that may have made progress; None where there is none.

        Those of topics whose commits can't be asked for are left out, and noted in `unsettled`.
        """

        async def commits_of(topic: str) -> Mapping[int, Commit] | None:
            try:
                return await self._log.committed(self._group_of(topic, kinds[topic]), topic)
            except LogUnavailableError as error:
                self.unsettled[topic] = str(error)
                return None

        self.unsettled.clear()
        wanted = {partition.topic for partition in self._writer.parts if self._is_open(partition)}
        wanted |= names - {partition.topic for partition in self._writer.parts}
        found = await self._ask(commits_of, sorted(names & wanted))
        numbers = await self._log.partitions(list(found))
        return {
            Partition(topic, number): commits.get(number)
            for topic, commits in found.items()
            if commits is not None
            for number in range(numbers.get(topic, 0))
        }

    def _is_open(self, partition: Partition) -> bool:
        """Return whether a commit may change something: not all that was read is done."""
        part = self._writer.parts[partition]
        return part.coverage is None or part.coverage.base < part.position or self.lag.get(partition, 1) > 0

    def _is_recreated(self, partition: Partition, topic_id: str) -> bool:
        """Return whether a partition's topic isn't the one that had an id, when commits were asked for."""
        return are_of_different_topics(self._writer.parts[partition].topic_id, topic_id)

    def _group_of(self, topic: str, kind: Kind) -> str:
        target = self._topics.ordered_target(topic) if kind is Kind.ORDERED else None
        return self._topics.group(ROUTER_GROUP) if target is None else self._topics.ordered_group(*target)

    async def _ranges(self, names: Sequence[str], unreadable: dict[Partition, str]) -> dict[Partition, Range]:
        """Return what the readable partitions of these topics have; note the others."""

        async def readable(topic: str) -> tuple[Mapping[int, tuple[int, int]], Mapping[int, str]]:
            try:
                return await self._log.readable(topic)
            except LogUnavailableError as error:
                return {}, {ALL: str(error)}

        ranges: dict[Partition, Range] = {}
        for topic, (bounds, others) in (await self._ask(readable, names)).items():
            unreadable |= {Partition(topic, number): reason for number, reason in others.items()}
            ranges |= {Partition(topic, number): Range(*found) for number, found in bounds.items()}
        return ranges

    async def _ask(self, ask: Callable[[str], Awaitable[T]], names: Sequence[str]) -> dict[str, T]:
        """Ask the log something about each topic, about some at a time."""
        found: dict[str, T] = {}
        for begin in range(0, len(names), AT_ONCE):
            some = names[begin : begin + AT_ONCE]
            found |= dict(zip(some, await asyncio.gather(*[ask(name) for name in some]), strict=True))
        return found

    # Reading.

    async def _read(
        self,
        ranges: Mapping[Partition, Range],
        kinds: Mapping[str, Kind],
        unreadable: dict[Partition, str],
        began: float,
    ) -> int:
        """Read partitions up to their ends, in turn the one that is furthest behind in time; note what can't be.

        Their ends were asked for after the round `began`.
        """
        left = set[Partition]()
        for partition, found in ranges.items():
            try:
                await self._take_up(partition, found, kinds[partition.topic])
            except LogUnavailableError as error:
                unreadable[partition] = str(error)
                continue
            self.lag[partition] = max(0, found.end - self._position(partition))
            # What is new to it, or to this process, has been read as far as all had been: before, it had no records.
            self._complete.setdefault(partition, self._writer.complete_to)
            if self.lag[partition]:
                left.add(partition)
            else:
                self._note_end(partition, began)
        count = 0
        while left:
            partition = min(left, key=lambda each: self._complete[each])
            end = ranges[partition].end
            try:
                count += await self._read_some(partition, end, kinds[partition.topic])
            except LogUnavailableError as error:
                unreadable[partition] = str(error)
                left.discard(partition)
            self.lag[partition] = max(0, end - self._position(partition))
            if self._position(partition) >= end:
                left.discard(partition)
                self._note_end(partition, began)
            if self._loop.time() > self._committed_at + COMMIT_EVERY:
                await self._commit()
        return count

    async def _forget_gone(
        self, ranges: Mapping[Partition, Range], kinds: Mapping[str, Kind], unreadable: Collection[Partition]
    ) -> None:
        """Forget partitions that their topics don't have any more: these were recreated with fewer."""
        for partition in [each for each in self._writer.parts if each.topic in kinds]:
            topic, number = partition
            is_there = partition in ranges or partition in unreadable or Partition(topic, ALL) in unreadable
            if not is_there and self._is_recreated(partition, self._log.topic_id(topic)):
                reason = "the topic was recreated with fewer partitions"
                logger.warning("index_partition_anew", topic=topic, partition=number, reason=reason)
                await self._run(self._writer.forget_partition, partition, kinds[topic])
                self._complete.pop(partition, None)
                self.lag.pop(partition, None)

    async def _take_up(self, partition: Partition, found: Range, kind: Kind) -> None:
        """Continue with a partition: one that is new, whose topic was recreated, or whose records were deleted."""
        part, topic_id = self._writer.parts.get(partition), self._log.topic_id(partition.topic)
        if part is not None and (why := await self._why_anew(partition, part, found, topic_id)):
            logger.warning("index_partition_anew", topic=partition.topic, partition=partition.number, reason=why)
            await self._run(self._writer.forget_partition, partition, kind)
            self._complete[partition], part = 0.0, None
            self._clocks.forget_end(partition)
        if part is None:
            await self._run(
                self._writer.begin_partition, partition, topic_id, await self._first(partition, found, kind)
            )
        elif part.position < found.start:
            await self._run(partial(self._writer.skip, partition, found.start, is_deleted=True))
        elif topic_id and not part.topic_id:
            await self._run(self._writer.note_topic_id, partition, topic_id)

    async def _why_anew(self, partition: Partition, part: Part, found: Range, topic_id: str) -> str:
        """Return why what was read of a partition isn't there any more, "" if it is."""
        if are_of_different_topics(part.topic_id, topic_id):
            return "the topic was recreated"
        if found.end < part.position:
            return f"expected at least {part.position} records, got {found.end}"
        is_of_another = await self._is_of_another_log(partition, part, found)
        return f"expected another record at {part.position - 1}: the log is another one" if is_of_another else ""

    async def _is_of_another_log(self, partition: Partition, part: Part, found: Range) -> bool:
        """Return whether the record that was read last is another one now: a copy of the log was put in its place.

        That happens while nobody reads it, so each process looks once.
        """
        offset = part.position - 1
        if partition in self._complete or not part.last or not found.start <= offset < found.end:
            return False
        async with aclosing(_batches(self._log, partition, offset, part.position)) as batches:
            async for records in batches:
                for record in records:
                    return round(record.appended_at * 1e6) != part.last
        return False

    async def _first(self, partition: Partition, found: Range, kind: Kind) -> int:
        """Return where to begin with a partition: what is older than what is kept isn't read."""
        if kind in STATUS_OF_LAST_RECORD:
            return found.start
        since = self._log.now() - self._days * 86400.0 - RETENTION_SLACK
        if since <= 0:
            return found.start
        at = await self._log.offsets_at(partition.topic, since, [partition.number])
        return max(found.start, min(found.end, at.get(partition.number, found.start)))

    async def _read_some(self, partition: Partition, end: int, kind: Kind) -> int:
        """Read some of a partition's next records."""
        count = size = 0
        async with aclosing(_batches(self._log, partition, self._position(partition), end)) as batches:
            async for records in batches:
                if not records:
                    continue
                position = records[-1].offset + 1
                now = self._log.now()
                self._clocks.saw(partition, min(map(_appended_at, records)), records[-1].appended_at, now)
                await self._run(self._writer.index, partition, kind, records, position, now)
                self._complete[partition] = max(self._complete[partition], records[-1].appended_at)
                count += len(records)
                size += sum([len(record.value) for record in records])
                if size >= STEP_BYTES:
                    return count
        if self._position(partition) < end:
            await self._skip_rest(partition, end)
        return count

    def _note_end(self, partition: Partition, began: float) -> None:
        """Note that a partition is read up to an end that was asked for after the round `began`."""
        # Not before its last record, and what was promised once stays true.
        self._complete[partition] = max(self._complete[partition], self._clocks.complete_to(partition, began))

    async def _skip_rest(self, partition: Partition, end: int) -> None:
        """Continue at the end of a range that has no more records: gaps, or what was deleted meanwhile."""
        found = (await self._ranges([partition.topic], {})).get(partition)
        if found is None:
            raise LogUnavailableError(f"{partition.topic}/{partition.number}: expected records, got none")
        if (start := min(found.start, end)) > self._position(partition):
            await self._run(partial(self._writer.skip, partition, start, is_deleted=True))
        await self._run(partial(self._writer.skip, partition, end, is_deleted=False))

    async def _follow_control(self, unreadable: dict[Partition, str]) -> int:
        """Read the control topic's next records: all of them in the first round."""
        partition = self._topics.control_partition
        found = (await self._ranges([partition.topic], unreadable)).get(partition)
        if found is None:
            return 0
        topic_id = self._log.topic_id(partition.topic)
        if are_of_different_topics(self._control_id, topic_id) or found.end < self._control_position:
            await self._run(self._writer.forget_control)
            self._control_position = 0
        self._control_id, count = topic_id or self._control_id, 0
        start = max(self._control_position, found.start)
        try:
            async with aclosing(_batches(self._log, partition, start, found.end)) as batches:
                async for records in batches:
                    await self._run(self._writer.follow_control, records)
                    self._control_position = records[-1].offset + 1 if records else self._control_position
                    count += len(records)
        except LogUnavailableError as error:
            unreadable[partition] = str(error)
        else:
            self._control_position = found.end
        return count

    def _present_partitions(self) -> list[Partition]:
        # In one step, as the writer's thread adds and forgets partitions meanwhile.
        known = dict.fromkeys(tuple(self._writer.parts)) | dict.fromkeys(self._unreadable)
        return [each for each in known if each.topic in self._present]

    def _complete_to(self, partition: Partition) -> float:
        return self._complete.get(partition, self._writer.complete_to)

    def _position(self, partition: Partition) -> int:
        return self._writer.parts[partition].position

    async def _hide(self) -> None:
        await self._run(self._writer.hide, self._redactions())

    async def _commit(self) -> None:
        await self._hide()  # what was read meanwhile may have what is hidden by now: then nothing of it is committed
        its = [self._complete_to(each) for each in self._present_partitions() if each.topic in self._event_topics]
        if its:
            await self._run(self._writer.note, Note.COMPLETE_TO, min(its))
        await self._run(self._writer.commit, self._log.now())
        self._committed_at = self._loop.time()

    async def _run(self, work: Callable[..., T], *arguments: object) -> T:
        """Do something in the writer's thread."""
        return await self._loop.run_in_executor(self._executor, work, *arguments)


async def _batches(log: Log, partition: Partition, start: int, end: int) -> AsyncGenerator[Sequence[Record], None]:
    """Yield the batches of a range. Closing it closes the scan, whose reader would otherwise leak."""
    batches = log.scan(partition, start, end)
    try:
        async for batch in batches:
            yield batch
    finally:
        if isinstance(batches, AsyncGenerator):
            await batches.aclose()
