"""Count open dead letters and parked deliveries incrementally.

    new records ──read──▶ open?  ──▶ remembered: 24 bytes each
    a command has progressed (its checkpoint moved) ──▶ what it covers is forgotten

The owner of the jobs counts, a few records at a time, concurrently with everything else.
"""

import math
from array import array
from bisect import bisect_left
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field

from structlog.typing import FilteringBoundLogger

from gateway.engine.control.records import ControlRecord, DeadLetterProperties
from gateway.engine.control.state import Control
from gateway.engine.jobs.dead_letters import NEWER_VERSION, read_dead_letter
from gateway.engine.jobs.log_reader import records_in_turns
from gateway.log.base import ALL, Log, Partition, Record, are_of_different_topics
from gateway.log.records import is_newer, record_metadata_of
from gateway.log.topics import JOBS_GROUP, Topics
from gateway.model import ForbiddenError, LogUnavailableError
from gateway.telemetry.metrics import Metrics

ROWS_AT_ONCE = 2048
"""Dead letters checked against a command before other tasks run: about a millisecond."""

Bounds = Mapping[int, tuple[int, int]]
"""By partition number: the first offset, and the one after the last."""


@dataclass(slots=True)
class _Rows:
    """The open dead letters of one partition, route, destination and reason, by offset."""

    offsets: "array[int]" = field(default_factory=lambda: array("q"))
    times: "array[float]" = field(default_factory=lambda: array("d"))
    id_hashes: "array[int]" = field(default_factory=lambda: array("q"))  # a hash of the delivery's id; 0 if it has none


@dataclass(slots=True)
class _Parked:
    """What is parked in one partition because one route or destination is paused: offsets, and times of append."""

    offsets: "array[int]" = field(default_factory=lambda: array("q"))
    times: "array[float]" = field(default_factory=lambda: array("d"))


class OpenDeadLetterIndex:
    """The dead letters that no command has resolved yet."""

    def __init__(self, topic: str) -> None:
        self._topic = topic
        self._rows: dict[tuple[int, str, str, str], _Rows] = {}

    @property
    def count(self) -> int:
        return sum([len(rows.offsets) for rows in self._rows.values()])

    def count_of(self, reason: str) -> int:
        return sum([len(rows.offsets) for key, rows in self._rows.items() if key[3] == reason])

    def add(self, number: int, offset: int, letter: DeadLetterProperties) -> None:
        """Add an open dead letter of a partition, in ascending order of offsets."""
        rows = self._rows.setdefault((number, letter.route, letter.destination, letter.reason), _Rows())
        rows.offsets.append(offset)
        rows.times.append(letter.at)
        rows.id_hashes.append(hash(letter.id) if letter.id else 0)

    def remove_resolved(self, command: ControlRecord, starts: Mapping[str, int]) -> Iterator[None]:
        """Forget what a command covers, from these offsets up to its checkpoint; yield regularly, for other tasks."""
        which = command.filter
        id_hashes, positions = {hash(each) for each in which.ids}, frozenset(which.records)
        for (number, route, destination, reason), rows in list(self._rows.items()):
            if not _matches(which.route, route) or not _matches(which.destination, destination):
                continue
            if not _matches(which.reason, reason):
                continue
            partition_name = f"{self._topic}/{number}"
            low = bisect_left(rows.offsets, starts.get(partition_name, 0))
            high = bisect_left(rows.offsets, command.checkpoint.get(partition_name, 0))
            kept: list[int] = []
            for count, index in enumerate(range(low, high), 1):
                at, id_hash = rows.times[index], rows.id_hashes[index]
                is_covered = (
                    (not id_hashes or id_hash in id_hashes)
                    and (not positions or f"{number}@{rows.offsets[index]}" in positions)
                    and (which.since is None or at >= which.since)
                    and (which.until is None or at < which.until)
                    and (command.action == "drop" or id_hash != 0)
                    and at <= command.covered_until
                )
                if not is_covered:
                    kept.append(index)
                if count % ROWS_AT_ONCE == 0:
                    yield
            if len(kept) < high - low:
                rows.offsets[low:high] = array("q", [rows.offsets[index] for index in kept])
                rows.times[low:high] = array("d", [rows.times[index] for index in kept])
                rows.id_hashes[low:high] = array("q", [rows.id_hashes[index] for index in kept])
            yield

    def forget(self, number: int) -> None:
        """Forget the dead letters of a partition."""
        for key in [key for key in self._rows if key[0] == number]:
            del self._rows[key]

    def trim(self, number: int, start: int) -> None:
        """Forget the dead letters of a partition that retention has deleted."""
        for key, rows in list(self._rows.items()):
            if key[0] == number:
                gone = bisect_left(rows.offsets, start)
                del rows.offsets[:gone], rows.times[:gone], rows.id_hashes[:gone]
                if not rows.offsets:
                    del self._rows[key]


class BacklogCounts:
    """Sets the gauges of dead letters and of parked deliveries, whenever `count` is called."""

    def __init__(
        self,
        *,
        log: Log,
        topics: Topics,
        control: Control,
        metrics: Metrics,
        logger: FilteringBoundLogger,
        is_ours: Callable[[], bool],
        sleep: Callable[[float], Awaitable[None]],
    ) -> None:
        self._log = log
        self._topics = topics
        self._control = control
        self._metrics = metrics
        self._logger = logger
        self._is_ours = is_ours
        self._sleep = sleep
        self.unreadable: Mapping[Partition, str] = {}
        self.begin()

    def begin(self) -> None:
        """Start counting from scratch: this process has become the owner of the jobs."""
        self._topic_ids: dict[str, str] = {}
        self._counted: set[str] = set()  # topics that were read to their end
        self._resolutions = 0
        self._reset_dead()
        self._reset_parked()

    def _reset_dead(self) -> None:
        self._letters = OpenDeadLetterIndex(self._topics.dead)
        self._read: dict[str, int] = {}  # up to which offset dead letters were read
        # The checkpoint of each command up to which what it covers was forgotten.
        self._resolved_to: dict[str, Mapping[str, int]] = {}

    def _reset_parked(self) -> None:
        self._parked_to: dict[str, int] = {}  # up to where the parked topic was read
        self._parked: dict[tuple[str, int], _Parked] = {}  # what isn't resumed, by name and partition
        self._parked_at: dict[tuple[int, int], float] = {}  # when the first of these were parked

    def end(self) -> None:
        """Reset the gauges: another process becomes the owner of the jobs."""
        self.unreadable = {}
        for backlog in (self._metrics.dead_letter_backlog, self._metrics.parked_backlog):
            backlog.set(0)
        for kind in ("dead", "parked"):
            self._metrics.records_newer.labels(kind).set(0)
        self._metrics.retention_left.pop((self._topics.parked,), None)

    async def count(self) -> None:
        """Read and count what has changed since the last call: each topic, though another can't be read.

        A partition that can't be read counts as it was last known; if nothing is known of one, the total is unknown
        (NaN). Raises LogUnavailableError.
        """
        counted, unreadable = self._counted, dict[Partition, str]()
        failed: LogUnavailableError | None = None
        for topic, begin, count, backlog in (
            (self._topics.dead, self._reset_dead, self._count_dead, self._metrics.dead_letter_backlog),
            (self._topics.parked, self._reset_parked, self._count_parked, self._metrics.parked_backlog),
        ):
            if self._is_recreated(topic):
                begin()
            try:
                bounds, unread = await self._log.readable(topic)
                unreadable |= {Partition(topic, number): reason for number, reason in unread.items()}
                await count(bounds, unread)
            except ForbiddenError as error:
                unreadable[Partition(topic, ALL)] = str(error)
            except LogUnavailableError as error:
                failed = error
            else:
                counted.add(topic)
            if topic not in counted and self._is_ours():
                backlog.set(math.nan)
        if self._is_ours():
            self.unreadable = unreadable
        if failed is not None:
            raise failed

    def _is_recreated(self, topic: str) -> bool:
        """Return whether a topic is another than at the last call, as far as is known."""
        before, now = self._topic_ids.get(topic, ""), self._log.topic_id(topic)
        self._topic_ids[topic] = now or before
        return are_of_different_topics(before, now)

    async def _count_dead(self, bounds: Bounds, unreadable: Collection[int]) -> None:
        control, topic, letters, read = self._control, self._topics.dead, self._letters, self._read
        for number, (_, end) in bounds.items():
            if read.get(f"{topic}/{number}", 0) > end:  # the topic has been recreated
                letters.forget(number)
                del read[f"{topic}/{number}"]
        async with aclosing(self._records(topic, read, bounds)) as records:
            async for partition, record in records:
                letter, _ = read_dead_letter(record)
                if not control.resolved_by(letter, partition, record.offset):
                    letters.add(partition.number, record.offset, letter)
                read[f"{topic}/{partition.number}"] = record.offset + 1
        # What was read before a command had progressed was checked against the state then.
        resolutions = control.resolutions
        for command in control.resolved_after(self._resolutions):
            for _ in letters.remove_resolved(command, self._resolved_to.get(command.key, {})):
                await self._sleep(0)
            self._resolved_to[command.key] = command.checkpoint
        self._resolved_to = {key: to for key, to in self._resolved_to.items() if key in control.commands}
        self._resolutions = resolutions
        for number, (start, end) in bounds.items():
            letters.trim(number, start)
            read.setdefault(f"{topic}/{number}", end)
        if self._is_ours():
            self._metrics.dead_letter_backlog.set(_count_or_nan(letters.count, topic, unreadable, read))
            self._metrics.records_newer.labels("dead").set(letters.count_of(NEWER_VERSION))

    async def _count_parked(self, bounds: Bounds, unreadable: Collection[int]) -> None:
        """Count parked deliveries: those that no resume has scanned yet."""
        control, topic = self._control, self._topics.parked
        seen, parked = self._parked_to, self._parked  # `begin` may replace these meanwhile
        for number, (_, end) in bounds.items():
            partition_name = f"{topic}/{number}"
            if seen.setdefault(partition_name, 0) > end:  # the topic has been recreated
                seen[partition_name] = 0
                for key in [key for key in parked if key[1] == number]:
                    del parked[key]
        async with aclosing(self._records(topic, seen, bounds)) as records:
            async for partition, record in records:
                by = NEWER_VERSION if is_newer(record) else record_metadata_of(record).paused_name
                if by:  # the others can't be decoded: no resume covers them, and the rescan dead-letters them
                    rows = parked.setdefault((by, partition.number), _Parked())
                    rows.offsets.append(record.offset)
                    rows.times.append(record.appended_at)
                seen[f"{topic}/{partition.number}"] = record.offset + 1
        for (name, number), rows in parked.items():
            pause_key, partition_name = f"pause/{name}", f"{topic}/{number}"
            resumed = bisect_left(rows.offsets, control.checkpoint(pause_key).get(partition_name, 0))
            if resumed and rows.times[0] > control.covered_until(pause_key, partition_name):
                resumed = 0  # the topic has been recreated since
            start = bounds[number][0] if number in bounds else 0
            gone = max(resumed, bisect_left(rows.offsets, start))
            # A name without a command (the control topic was recreated) may have been resumed: nobody knows.
            if gone > resumed and (name == NEWER_VERSION or pause_key in control.commands):
                self._count_lost(Partition(topic, number), gone - resumed)
            del rows.offsets[:gone], rows.times[:gone]
        if self._is_ours():
            count = sum([len(rows.offsets) for rows in parked.values()])
            self._metrics.parked_backlog.set(_count_or_nan(count, topic, unreadable, seen))
            left = [len(rows.offsets) for (name, _), rows in parked.items() if name == NEWER_VERSION]
            self._metrics.records_newer.labels("parked").set(sum(left))
            firsts = {(number, rows.offsets[0]) for (_, number), rows in parked.items() if rows.offsets}
            await self._set_retention_gauges(
                {first for first in firsts if first[0] in bounds or first in self._parked_at}
            )

    def _count_lost(self, partition: Partition, count: int) -> None:
        """Count parked deliveries that were deleted before they were resumed."""
        self._metrics.records_lost.labels(partition.topic).inc(count)
        group = self._topics.group(JOBS_GROUP)
        self._logger.error("records_lost", topic=partition.topic, partition=partition.number, group=group, count=count)

    async def _set_retention_gauges(self, firsts: Collection[tuple[int, int]]) -> None:
        """Set the gauge of the time until the log deletes the first parked delivery, by partition and offset."""
        topic, ages = self._topics.parked, [0.0]
        for number, offset in set(firsts).difference(self._parked_at):
            async for records in self._log.scan(Partition(topic, number), offset, offset + 1):
                self._parked_at |= {(number, record.offset): record.appended_at for record in records}
        self._parked_at = {first: at for first, at in self._parked_at.items() if first in firsts}
        ages += [self._log.now() - at for at in self._parked_at.values()]
        for name, kept in (await self._log.retentions([topic])).items():
            if self._is_ours():
                self._metrics.retention_left.labels(name).set(kept - max(ages))

    def _records(
        self, topic: str, starts: Mapping[str, int], bounds: Bounds
    ) -> AsyncGenerator[tuple[Partition, Record], None]:
        ranges = {
            number: (max(first, starts.get(f"{topic}/{number}", 0)), end) for number, (first, end) in bounds.items()
        }
        return records_in_turns(self._log, topic, ranges, sleep=self._sleep, is_wanted=self._is_ours)


def _count_or_nan(count: int, topic: str, unreadable: Collection[int], read: Mapping[str, int]) -> float:
    """Return a count, or NaN if nothing was counted of some partition that can't be read."""
    return math.nan if any(f"{topic}/{number}" not in read for number in unreadable) else count


def _matches(wanted: str | None, name: str) -> bool:
    return wanted is None or wanted == name
