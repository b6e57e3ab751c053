"""Which partitions can't be read, since when, and why: in a metric at once, and in a log line if it lasts."""

import asyncio
import math
from collections import defaultdict
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple

from structlog.typing import FilteringBoundLogger

from gateway.log.base import ALL, NO_TOPIC, Log, Partition
from gateway.model import LogUnavailableError
from gateway.telemetry.metrics import Metrics

UNAVAILABLE_AFTER = 5.0
"""Seconds after which it is logged, and jobs continue without: the election of a leader, or a rebalance, takes less."""
FORGET_AFTER = 60.0
"""Seconds without a look at a topic after which a job that finds a partition unreadable waits for it anew: more than
those between two looks of a job that goes on without it."""
MISSING_FOR = 60.0
"""Seconds for which a topic is missing before it counts as deleted: it may be recreated."""

Readable = Callable[[str], Awaitable[tuple[Mapping[int, tuple[int, int]], Mapping[int, str]]]]
"""`Log.readable`, or something with its signature."""


class Unread(NamedTuple):
    """Since when (by the caller's clock) a partition can't be read, and why."""

    since: float
    reason: str


def still_unread(
    before: Mapping[Partition, Unread], found: Mapping[Partition, str], now: float
) -> dict[Partition, Unread]:
    """Return the partitions found unreadable now, each with the time since when it is."""
    return {
        partition: Unread(before[partition].since if partition in before else now, reason)
        for partition, reason in found.items()
    }


def deleted_topics(unread: Mapping[Partition, Unread], now: float) -> set[str]:
    """Return the topics that have been missing for a while."""
    return {which.topic for which, (since, why) in unread.items() if why == NO_TOPIC and now >= since + MISSING_FOR}


def name_of(partition: Partition) -> str:
    """Return a partition's number as operators see it."""
    return "all" if partition.number == ALL else str(partition.number)


class PatientReader:
    """Returns the readable partitions of a topic, for jobs."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._unread: Mapping[Partition, Unread] = {}
        self._looked_at: dict[str, float] = {}  # by topic

    async def readable(self, topic: str) -> tuple[Mapping[int, tuple[int, int]], Mapping[int, str]]:
        """Return what `Log.readable` does. Until UNAVAILABLE_AFTER has passed, raises LogUnavailableError instead."""
        bounds, unreadable = await self._log.readable(topic)
        found = {Partition(topic, number): reason for number, reason in unreadable.items()}
        others = {partition: one for partition, one in self._unread.items() if partition.topic != topic}
        now = asyncio.get_running_loop().time()
        is_known = now < self._looked_at.get(topic, -math.inf) + FORGET_AFTER
        self._looked_at[topic] = now
        mine = still_unread(self._unread if is_known else {}, found, now)
        self._unread = {**others, **mine}
        for partition, (since, reason) in mine.items():
            if now < since + UNAVAILABLE_AFTER:
                raise LogUnavailableError(f"{partition.topic}/{partition.number}: {reason}")
        return bounds, unreadable


class UnreadPartitions:
    """The partitions that a process can't read, as of the last `update`, which is called about every second."""

    def __init__(self, metrics: Metrics, logger: FilteringBoundLogger) -> None:
        self.partitions: Mapping[Partition, Unread] = {}
        self._logged: dict[Partition, Unread] = {}
        self._metrics = metrics
        self._logger = logger

    def update(self, found: Mapping[Partition, Unread], now: float) -> None:
        """Update the metric, and log what has changed."""
        family = self._metrics.partition_unread
        for partition in self.partitions.keys() - found.keys():
            family.pop((partition.topic, name_of(partition)), None)
        for partition, unread in found.items():
            family.labels(partition.topic, name_of(partition)).set(max(0.0, now - unread.since))
        self.partitions = found
        begun = {
            partition: unread
            for partition, unread in found.items()
            if partition not in self._logged and now >= unread.since + UNAVAILABLE_AFTER
        }
        for topic, those in _by_topic(begun).items():
            reason = begun[those[0]].reason
            self._logger.warning(
                "partitions_unavailable", topic=topic, partitions=[name_of(each) for each in those], reason=reason
            )
        ended = {partition: unread for partition, unread in self._logged.items() if partition not in found}
        for topic, those in _by_topic(ended).items():
            seconds = round(now - min(ended[each].since for each in those), 1)
            self._logger.info(
                "partitions_available", topic=topic, partitions=[name_of(each) for each in those], seconds=seconds
            )
        self._logged = {partition: unread for partition, unread in (self._logged | begun).items() if partition in found}


def _by_topic(partitions: Mapping[Partition, Unread]) -> Mapping[str, Sequence[Partition]]:
    topics: dict[str, list[Partition]] = defaultdict(list)
    for partition in sorted(partitions):
        topics[partition.topic].append(partition)
    return topics
