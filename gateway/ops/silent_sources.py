"""Which sources have fallen silent, by what the log has of their own past.

The alert GatewaySourceSilent holds an hour without events against the same hour a day and a week ago. The log has no
counts, so this goes by the newest events:

    ──e─e──e───e──e─e──────────────────────────▶
                    │ the last      second half of the silence │ now
                    └── longer than an hour, and than twice the longest gap before

and where the log reaches back that far, something has to have come in such a half a day ago and a week ago, too: or a
night, a weekend or the end of a burst is no silence.
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
"""Seconds without an event below which nothing is told, as with the alert."""
TIMES = 2
"""How often the longest gap before has to fit into a silence."""
MIN_EVENTS = 10
"""Events whose gaps tell how often they come; in the alert, too, more than that have to have come in an hour."""
SAMPLE = 300
"""Events of a topic that are looked at, the newest, over all of its partitions."""
MOST_SOURCES = 500
"""With more of them none is looked at."""
AT_ONCE = 8
PATIENCE = 10.0
"""Seconds for all of them; what wasn't looked at by then isn't told."""
WEEK = 7 * DAY


class Time(NamedTuple):
    """A time from a moment to before another (Unix seconds)."""

    start: float
    end: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Silence:
    """A source that may have fallen silent: it is told where `expected` events or more came in each of `before`."""

    since: float
    longest: float
    before: tuple[Time, ...]
    expected: int

    def is_usual(self, counts: Sequence[int | None]) -> bool:
        """Return whether it was as silent before, by how many events came in each of `before`; None isn't known."""
        return any(count is not None and count < self.expected for count in counts)


def silence(times: Sequence[float], now: float) -> Silence | None:
    """Return what a source's newest events say, ascending and without a gap of our own: None if it isn't silent."""
    if len(times) <= MIN_EVENTS:
        return None
    quiet, longest = now - times[-1], max([after - before for before, after in pairwise(times)])
    if quiet < QUIET or quiet < TIMES * longest:
        return None
    length = min(quiet, DAY) / 2
    # In a silence of days there is nothing to hold it against.
    same_time = now - DAY * math.ceil(quiet / DAY)
    # Of the hours before that time the retention of a week has left nothing.
    before = (Time(same_time - length, same_time), Time(now - WEEK, now - WEEK + length))
    usual = MIN_EVENTS if not longest else length / (TIMES * longest)
    return Silence(since=times[-1], longest=longest, before=before, expected=max(1, min(MIN_EVENTS, math.floor(usual))))


@dataclass(frozen=True, slots=True, kw_only=True)
class Looked:
    """The sources that are silent, and what to say where not all were looked at."""

    found: Sequence[Finding]
    left_out: str


async def silent_in(log: Log, topics: Topics, rules: Rules) -> Looked:
    """Return the sources of the rules that are silent against their own past, as far as the log can be read."""
    if len(rules.sources) > MOST_SOURCES:
        return Looked(found=(), left_out=f"silent sources aren't looked for among more than {MOST_SOURCES}")
    sources: dict[str, list[str]] = defaultdict(list)
    for source in rules.sources.values():
        sources[source.topic or topics.events(source.name)].append(source.name)
    names, found, looked = sorted(sources), list[Finding](), 0
    try:
        async with asyncio.timeout(PATIENCE):
            while looked < len(names):
                some = names[looked : looked + AT_ONCE]
                for told in await asyncio.gather(*[_of_topic(log, topic, sources[topic]) for topic in some]):
                    found += told
                looked += len(some)
    except LogUnavailableError as error:
        return Looked(found=found, left_out=f"silent sources weren't looked for: {error}")
    except TimeoutError:
        left_out = f"of {len(names):,} topics of events {looked:,} were looked at for silent sources in {PATIENCE:g} s"
        return Looked(found=found, left_out=left_out)
    return Looked(found=found, left_out="")


async def _of_topic(log: Log, topic: str, sources: Sequence[str]) -> list[Finding]:
    bounds, unread = await log.readable(topic)
    now = log.now()
    if unread or not any(start < end for start, end in bounds.values()):
        return []
    if len(sources) == 1:
        recent = await log.offsets_at(topic, now - QUIET)
        if any(recent.get(number, end) < end for number, (_, end) in bounds.items()):
            return []
    found = []
    for source, times in (await _newest(log, topic, bounds, sources)).items():
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
        why=f"silent: the last ones came at most {_about(silent.longest)} apart",
        is_wrong=False,  # It is guessed from the past, and a holiday looks the same.
        since=silent.since,
        next=(
            "# a holiday? else its sender's list of deliveries tells what it sees; the way from outside:",
            f"gateway send {source} --url https://…",
        ),
    )


def _about(seconds: float) -> str:
    unit = next((unit for unit in (3600, 60) if seconds >= 2 * unit), 1)
    return shown_duration(unit * max(1, math.ceil(seconds / unit)))


async def _newest(
    log: Log, topic: str, bounds: Mapping[int, tuple[int, int]], sources: Sequence[str]
) -> Mapping[str, Sequence[float]]:
    """Return when the newest events of each source came, ascending: from a time on, all that are in the topic."""
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
    """Return how many events of a topic came in a time; None where the log doesn't reach back to it."""
    if time.start < now - (await log.retentions([topic])).get(topic, 0.0):
        return None
    first, after = await log.offsets_at(topic, time.start), await log.offsets_at(topic, time.end)
    count = sum([max(0, after.get(number, at) - at) for number, at in first.items()])
    is_older = any(start > 0 or first.get(number, start) > start for number, (start, _) in bounds.items())
    return count if is_older else None
