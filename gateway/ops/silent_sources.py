"""Find sources that have fallen silent, by comparing them with their own past in the log.

The alert GatewaySourceSilent compares an hour without events with the same hour a day and a week ago. The log has no
counts, so this uses the newest events:

    ──e─e──e───e──e─e──────────────────────────▶
                    │ the last      second half of the silence │ now
                    └── at least an hour, and twice the longest gap before

As far as the log reaches back, events must also have come in such a half a day ago and a week ago: so a night, a
weekend or the end of a burst isn't reported.
"""

import asyncio
import math
from collections import defaultdict
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from gateway.log.base import Log, Partition
from gateway.log.records import decode_event
from gateway.log.topics import DAY, Topics
from gateway.model import LogUnavailableError, UnreadableRecordError
from gateway.ops.findings import SILENT, Finding
from gateway.rules.rules import Rules
from gateway.rules.value_kinds import shown_duration

QUIET = 3600.0
"""Minimum seconds without an event, as with the alert."""
GAP_FACTOR = 2
"""A silence is at least this many times the longest gap before it."""
MIN_EVENTS = 10
"""Minimum number of gaps between events that are compared; the alert requires more events than this in an hour."""
SAMPLE = 300
"""Maximum number of events read per topic, the newest, over all of its partitions."""
MAX_SOURCES = 500
"""With more sources, none is checked."""
MAX_CONCURRENT = 8
TIMEOUT = 10.0
"""Seconds for all of them; sources that weren't checked by then aren't reported."""
WEEK = 7 * DAY


class Time(NamedTuple):
    """A time interval, without its end (Unix seconds)."""

    start: float
    end: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Silence:
    """A source that may be silent: it is reported if at least `expected` events came in each interval of `before`."""

    since: float
    longest: float
    before: tuple[Time, ...]
    expected: int

    def is_usual(self, counts: Sequence[int | None]) -> bool:
        """Return whether it was as silent before, by the number of events in each of `before`; None is unknown."""
        return any(count is not None and count < self.expected for count in counts)


def silence(times: Sequence[float], now: float) -> Silence | None:
    """Return the silence after a source's newest events, at these ascending times; None if it isn't silent."""
    if len(times) <= MIN_EVENTS:
        return None
    quiet, longest = now - times[-1], max([after - before for before, after in pairwise(times)])
    if quiet < QUIET or quiet < GAP_FACTOR * longest:
        return None
    length = min(quiet, DAY) / 2
    # During a silence of days, yesterday has nothing to compare with.
    same_time = now - DAY * math.ceil(quiet / DAY)
    # A week is the retention: the hours before that are deleted.
    before = (Time(same_time - length, same_time), Time(now - WEEK, now - WEEK + length))
    usual = MIN_EVENTS if not longest else length / (GAP_FACTOR * longest)
    return Silence(since=times[-1], longest=longest, before=before, expected=max(1, min(MIN_EVENTS, math.floor(usual))))


@dataclass(frozen=True, slots=True, kw_only=True)
class SilentSources:
    """The silent sources, and a note if not all were checked."""

    found: Sequence[Finding]
    incomplete: str


async def silent_sources_in(log: Log, topics: Topics, rules: Rules, *, timeout: float | None = None) -> SilentSources:
    """Return the sources in the rules that are silent compared with their own past, as far as the log can be read.

    After `timeout` seconds (None: `TIMEOUT`), these are those that were found by then.
    """
    seconds = TIMEOUT if timeout is None else timeout
    if len(rules.sources) > MAX_SOURCES:
        return SilentSources(
            found=(), incomplete=f"silent sources weren't checked, as there are more than {MAX_SOURCES}"
        )
    sources: dict[str, list[str]] = defaultdict(list)
    for source in rules.sources.values():
        sources[source.topic or topics.events(source.name)].append(source.name)
    names, found, looked = sorted(sources), list[Finding](), 0
    try:
        async with asyncio.timeout(seconds):
            while looked < len(names):
                some = names[looked : looked + MAX_CONCURRENT]
                for silent in await asyncio.gather(*[_silent_in_topic(log, topic, sources[topic]) for topic in some]):
                    found += silent
                looked += len(some)
    except LogUnavailableError as error:
        return SilentSources(found=found, incomplete=f"silent sources weren't checked: {error}")
    except TimeoutError:
        incomplete = f"silent sources: only {looked:,} of {len(names):,} topics of events were checked in {seconds:g} s"
        return SilentSources(found=found, incomplete=incomplete)
    return SilentSources(found=found, incomplete="")


async def _silent_in_topic(log: Log, topic: str, sources: Sequence[str]) -> list[Finding]:
    bounds, unread = await log.readable(topic)
    now = log.now()
    if unread or not any(start < end for start, end in bounds.values()):
        return []
    if len(sources) == 1:
        recent = await log.offsets_at(topic, now - QUIET)
        if any(recent.get(number, end) < end for number, (_, end) in bounds.items()):
            return []
    found = []
    for source, times in (await _newest_times(log, topic, bounds, sources)).items():
        silent = silence(times, now)
        if silent is None:
            continue
        counts = [await _count(log, topic, bounds, time, now) for time in silent.before]
        if not silent.is_usual(counts):
            found.append(_finding(source, silent))
    return found


def _finding(source: str, silent: Silence) -> Finding:
    return Finding(
        rank=SILENT,
        what=f"source {source}",
        why=f"silent: its last events were at most {_rounded_up(silent.longest)} apart",
        needs_attention=False,  # A guess from the past: a holiday looks the same.
        since=silent.since,
        next=(
            "# a holiday? if not, check the sender's list of deliveries, and test the path from outside:",
            f"gateway send {source} --url https://…",
        ),
        source=source,
    )


def _rounded_up(seconds: float) -> str:
    unit = next((unit for unit in (3600, 60) if seconds >= 2 * unit), 1)
    return shown_duration(unit * max(1, math.ceil(seconds / unit)))


async def _newest_times(
    log: Log, topic: str, bounds: Mapping[int, tuple[int, int]], sources: Sequence[str]
) -> Mapping[str, Sequence[float]]:
    """Return the times of each source's newest events, ascending: all those in the topic since some time."""
    share = max(1, SAMPLE // len(bounds))
    came: list[tuple[float, str]] = []
    complete_from = -math.inf
    for number, (start, end) in bounds.items():
        first = max(start, end - share)
        async with aclosing(_times(log, Partition(topic, number), first, end, sources)) as times:
            read = [each async for each in times]
        came += read
        if first > start and read:
            complete_from = max(complete_from, read[0][0])
    found: dict[str, list[float]] = defaultdict(list)
    for at, source in sorted(came):
        if at >= complete_from:
            found[source].append(at)
    return found


async def _times(
    log: Log, partition: Partition, start: int, end: int, sources: Sequence[str]
) -> AsyncGenerator[tuple[float, str], None]:
    async for records in log.scan(partition, start, end):
        for record in records:
            if len(sources) == 1:
                yield record.appended_at, sources[0]
                continue
            try:
                source = decode_event(record).source
            except UnreadableRecordError:
                continue
            if source in sources:
                yield record.appended_at, source


async def _count(log: Log, topic: str, bounds: Mapping[int, tuple[int, int]], time: Time, now: float) -> int | None:
    """Return how many events of a topic came in an interval; None if the log doesn't reach back that far."""
    if time.start < now - (await log.retentions([topic])).get(topic, 0.0):
        return None
    first, after = await log.offsets_at(topic, time.start), await log.offsets_at(topic, time.end)
    count = sum([max(0, after.get(number, at) - at) for number, at in first.items()])
    is_older = any(start > 0 or first.get(number, start) > start for number, (start, _) in bounds.items())
    return count if is_older else None
