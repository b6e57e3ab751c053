"""Replays of events as operators see them: their records, what they would deliver, and their progress."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping
from types import MappingProxyType
from typing import NamedTuple

from gateway.engine.control.records import ControlRecord, Selection
from gateway.engine.control.state import Control
from gateway.engine.jobs.replay_matcher import Matched, Matcher
from gateway.engine.jobs.undelivered import Undelivered
from gateway.engine.unavailable_partitions import UNAVAILABLE_AFTER, name_of
from gateway.log.base import Log, Partition
from gateway.log.topics import Topics
from gateway.model import NewerRecordError, UsageError
from gateway.ops.control_client import CANCEL_GRACE, catch_up
from gateway.rules.rules import Rules

POLL_INTERVAL = 0.25
"""Seconds between polls of a replay's progress; it is published once a second."""


class Window(NamedTuple):
    """The records appended in a time interval: "topic/partition" → the first offset, and the one after the last.

    `unread` are the unreadable partitions, with the reason.
    """

    starts: Mapping[str, int]
    ends: Mapping[str, int]
    unread: Mapping[str, str] = MappingProxyType({})

    @property
    def total(self) -> int:
        """Return the maximum number of records: some offsets may be gaps."""
        return sum([end - self.starts[partition_name] for partition_name, end in self.ends.items()])


async def until_elected(
    log: Log, topics: Collection[str], *, sleep: Callable[[float], Awaitable[object]] = asyncio.sleep
) -> None:
    """Wait until all of these topics can be read, but no longer than a leader election takes."""
    waited = 0.0
    for topic in sorted(topics):
        _, unread = await log.readable(topic)
        while unread and waited < UNAVAILABLE_AFTER:
            await sleep(POLL_INTERVAL)
            waited += POLL_INTERVAL
            _, unread = await log.readable(topic)


async def window_of(log: Log, topics: Collection[str], since: float, until: float | None) -> Window:
    """Return the records appended at `since` or later, and before `until` or now; times are the log's."""
    starts: dict[str, int] = {}
    ends: dict[str, int] = {}
    unread: dict[str, str] = {}
    for topic in sorted(topics):
        bounds, missing = await log.readable(topic)
        unread |= {f"{topic}/{name_of(Partition(topic, number))}": reason for number, reason in missing.items()}
        first = await log.offsets_at(topic, since, bounds.keys())
        last = (
            {number: end for number, (_, end) in bounds.items()}
            if until is None
            else await log.offsets_at(topic, until, bounds.keys())
        )
        for number, start in first.items():
            starts[f"{topic}/{number}"] = start
            ends[f"{topic}/{number}"] = max(start, last.get(number, start))
    return Window(starts, ends, unread)


async def would_replay(
    log: Log, rules: Rules, selection: Selection, window: Window, known: Undelivered | None = None
) -> AsyncGenerator[tuple[int, Matched | None], None]:
    """Yield for each record of a window how many were read so far, and the event if these rules match it.

    With `known`, each event says whether it was delivered; none is excluded for it. Raises UsageError if the rules have
    no such route or destination.
    """
    matcher = Matcher(selection, known)
    if (problem := matcher.use(rules)) is not None:
        raise UsageError(problem)
    before = 0
    for partition_name, end in window.ends.items():
        topic, _, number = partition_name.rpartition("/")
        start = window.starts[partition_name]
        partition = Partition(topic, int(number))
        async for records in log.scan(partition, start, end):
            for record in records:
                try:
                    matched = matcher.match(partition, record)
                except NewerRecordError as error:
                    raise UsageError(f"{partition_name}@{record.offset}: {error}; replay with that one") from error
                yield before + record.offset + 1 - start, matched
        before += end - start
    yield before, None


class ReplayStatus(NamedTuple):
    """A replay's progress: records read, their total, and deliveries injected.

    `unread` is the number of partitions that it waits for or, once it is done, that weren't included.
    """

    command: ControlRecord
    scanned: int
    total: int
    injected: int
    unread: int = 0

    @property
    def has_ended(self) -> bool:
        return self.command.state != "requested"


async def follow(
    log: Log,
    topics: Topics,
    name: str,
    *,
    timeout: float,
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
) -> AsyncGenerator[ReplayStatus, None]:
    """Yield a replay's progress, now and at each change, until it has ended; nothing if there is no such replay.

    Ends early if the control topic has no new records for `timeout` seconds: no gateway carries it out, or it waits for
    unreadable partitions.
    """
    control = Control()
    position = 0
    waited = 0.0
    last: ReplayStatus | None = None
    while True:
        before = position
        position = await catch_up(log, topics, control, before)
        if position > before:
            waited = 0.0
        progress = progress_of(control, name)
        if progress is None:
            return
        if progress != last:
            last = progress
            yield progress
        is_final = progress.has_ended and progress.command not in control.unacknowledged_cancellations()
        if is_final or (progress.has_ended and waited >= CANCEL_GRACE) or waited >= timeout:
            return
        await sleep(POLL_INTERVAL)
        waited += POLL_INTERVAL


def progress_of(control: Control, name: str) -> ReplayStatus | None:
    """Return how far a replay is; None if there is none of that name."""
    command = control.commands.get(f"replay/{name}")
    if command is None or command.selection is None:
        return None
    window = Window(command.selection.starts, command.checkpoint)
    if command.state == "done":
        return ReplayStatus(command, window.total, window.total, command.count, command.unread)
    positions = control.checkpoint(command.key)
    scanned = sum(
        [max(0, positions.get(partition_name, start) - start) for partition_name, start in window.starts.items()]
    )
    injected = max(command.count, control.injected(command.key))
    return ReplayStatus(command, scanned, window.total, injected, control.unread(command.key))
