"""What the log shows of all processes: what waits and why, what nobody finishes, which sources have fallen silent.

It is read for all who ask, and then kept for some seconds, so that many viewers cost one reading; after one that took
long, for nine times as long. What of a large log can't be looked at in a few seconds is told as such, and looked at by
the next readings first.
"""

import asyncio
from collections import deque
from collections.abc import Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from time import monotonic
from typing import NamedTuple

from gateway.api.cache import Cached
from gateway.engine.control.state import Control
from gateway.log.base import NO_TOPIC, Log, Partition
from gateway.log.topics import Topics
from gateway.model import ForbiddenError
from gateway.ops.backlog_trend import Look, trend_of, with_trend
from gateway.ops.findings import Finding, pause_steps, ranked
from gateway.ops.redaction import Redactions
from gateway.ops.rejected import RejectedFilter, RejectedGroups, read_rejected
from gateway.ops.secret_expiry import expiry_findings
from gateway.ops.silent_sources import silent_sources_in
from gateway.ops.status import unpaused_findings, unread_findings, waiting_findings
from gateway.ops.status_report import without_detail
from gateway.ops.unfinished import Reading, findings_of, readings_of, unfinished_in
from gateway.ops.waiting_deliveries import Backlogs
from gateway.ops.waiting_records import RECORDS_PER_STEP, waiting_deliveries
from gateway.rules.rules import Rules

REST, SILENT_REST = 10.0, 60.0
"""Seconds for which what was read is kept, at least: of deliveries, and of sources."""
WAITING_SECONDS, UNFINISHED_SECONDS, SILENT_SECONDS, QUARANTINE_SECONDS = 2.0, 2.0, 3.0, 2.0
"""For which each part is read; what was read by then is the answer."""
AT_A_TIME = 8
"""Topics that are looked at together: each look is some requests to the log."""
SOURCES_PER_STEP = 200
"""Sources that are looked at before other tasks run: less than a millisecond."""
PART = 500
"""Findings that are ranked at once: a millisecond or two."""
MOST_GROUPS = 50
"""Groups whose members are asked for."""
REMEMBERED = 900.0
"""Seconds for which looks at a topic are remembered, to tell whether what isn't finished grows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogFindings:
    """What was found, as of a time (Unix seconds), and notes of what wasn't looked at.

    It is in parts, each with the worst first: all of ten thousand sorted at once would keep the event loop waiting.
    """

    at: float
    found: tuple[Sequence[Finding], ...]
    notes: tuple[str, ...]


class Quarantined(NamedTuple):
    """Refused requests that are kept, as of a time (Unix seconds); `is_whole`: these are all."""

    groups: RejectedGroups
    is_whole: bool
    at: float


class LogReader:
    """Reads what the log shows, for all who ask."""

    def __init__(self) -> None:
        self._deliveries = Cached[LogFindings](REST)
        self._sources = Cached[LogFindings](SILENT_REST)
        self._quarantine = Cached[Quarantined](REST)
        self._looks: dict[str, deque[Look]] = {}

    async def of_deliveries(self, scene: "Scene") -> LogFindings:
        """Return what waits and what isn't finished. Raises LogUnavailableError."""
        return await self._deliveries.get(lambda: self._read(scene))

    async def of_sources(self, scene: "Scene") -> LogFindings:
        """Return which sources are silent, as far as the log can be read, and whose secrets expire."""
        return await self._sources.get(lambda: _of_sources(scene))

    async def of_quarantine(self, scene: "Scene") -> Quarantined:
        """Return which refused requests are kept, and nothing was done about. Raises LogUnavailableError."""
        return await self._quarantine.get(lambda: _quarantined(scene))

    async def _read(self, scene: "Scene") -> LogFindings:
        unread: dict[Partition, str] = {}
        read_at, notes = scene.log.now(), list[str]()
        backlogs, is_whole = await _waiting(scene, unread)
        now = scene.log.now()
        found = unpaused_findings(backlogs.parked, scene.control, read_at, scene.rules)
        for backlog in backlogs:
            found += waiting_findings([backlog], now, scene.rules, scene.control)
            await asyncio.sleep(0)
        if not is_whole:
            notes.append(
                f"more waits than could be read in {WAITING_SECONDS:g} s: its numbers are the least that there are"
            )
        found += await self._unfinished(scene, unread, notes)
        found += unread_findings(unread)
        return LogFindings(at=now, found=await _parts(found), notes=tuple(notes))

    async def _unfinished(self, scene: "Scene", unread: dict[Partition, str], notes: list[str]) -> list[Finding]:
        """Look at the topics that weren't looked at for longest, and return what all of them show."""
        readings = readings_of(await scene.log.topics(), scene.topics, scene.rules)
        self._looks = {each.topic: self._looks.get(each.topic) or deque() for each in readings}
        waiting = sorted(readings, key=self._last_look)
        stop_at = monotonic() + UNFINISHED_SECONDS
        while waiting and monotonic() < stop_at:
            some, waiting = waiting[:AT_A_TIME], waiting[AT_A_TIME:]
            await asyncio.gather(*[self._look(scene, each, unread) for each in some])
        if waiting:
            notes.append(f"{len(waiting):,} of {len(readings):,} topics weren't looked at anew: there was no time")
        late: list[tuple[Reading, Finding]] = []
        for reading in readings:
            for last in list(self._looks[reading.topic])[-1:]:
                its = findings_of(reading, last.unfinished, last.at, rules=scene.rules)
                late += [(reading, each) for each in its]
            await asyncio.sleep(0)
        idle = await _idle_groups(scene, [reading.group for reading, _ in late])
        return [self._with_trend(scene, reading, each, is_idle=reading.group in idle) for reading, each in late]

    def _with_trend(self, scene: "Scene", reading: Reading, finding: Finding, *, is_idle: bool) -> Finding:
        pauses = () if reading.target is None else pause_steps(scene.control, *reading.target, scene.rules)
        trend = trend_of(self._looks[reading.topic])
        return with_trend(finding, reading, trend, is_idle=is_idle, pauses=pauses)

    def _last_look(self, reading: Reading) -> tuple[float, str]:
        looks = self._looks[reading.topic]
        return (looks[-1].at if looks else 0.0), reading.topic

    async def _look(self, scene: "Scene", reading: Reading, unread: dict[Partition, str]) -> None:
        unfinished = await unfinished_in(scene.log, reading, unread)
        now, looks = scene.log.now(), self._looks[reading.topic]
        looks.append(Look(now, unfinished))
        while looks[0].at < now - REMEMBERED:
            looks.popleft()


class Scene(NamedTuple):
    """What is read, and by which rules and control records.

    `sees_members`: whether the log tells how many members groups have. The embedded one knows those of its own process.
    """

    log: Log
    topics: Topics
    rules: Rules
    control: Control
    sees_members: bool


async def _waiting(scene: Scene, unread: dict[Partition, str]) -> tuple[Backlogs, bool]:
    """Return what waits, as far as it could be read, and whether that is all."""
    backlogs, hidden = Backlogs(), Redactions(scene.rules)
    try:
        async with asyncio.timeout(WAITING_SECONDS):
            async for stored in waiting_deliveries(scene.log, scene.topics, scene.control, unread):
                is_hidden = hidden.of(stored.delivery.event.source) is not None
                backlogs.add(without_detail(stored) if is_hidden else stored)
    except TimeoutError:
        return backlogs, False
    return backlogs, True


async def _idle_groups(scene: Scene, groups: Iterable[str]) -> set[str]:
    """Return which groups have no member, and so nobody who reads for them; none that we may not ask about."""
    asked = list(dict.fromkeys(groups))[:MOST_GROUPS] if scene.sees_members else []
    try:
        members = await asyncio.gather(*[scene.log.members(group) for group in asked])
    except ForbiddenError:
        return set()
    return {group for group, number in zip(asked, members, strict=True) if not number}


async def _quarantined(scene: Scene) -> Quarantined:
    groups, number = RejectedGroups(), 0
    unread: dict[Partition, str] = {}
    try:
        async with asyncio.timeout(QUARANTINE_SECONDS):
            async with aclosing(read_rejected(scene.log, scene.topics, RejectedFilter(), unread=unread)) as found:
                async for rejected in found:
                    groups.add(rejected)
                    number += 1
                    if number % RECORDS_PER_STEP == 0:
                        await asyncio.sleep(0)
    except TimeoutError:
        return Quarantined(groups, is_whole=False, at=scene.log.now())
    return Quarantined(groups, is_whole=all(each == NO_TOPIC for each in unread.values()), at=scene.log.now())


async def _parts(found: Sequence[Finding]) -> tuple[Sequence[Finding], ...]:
    parts: list[Sequence[Finding]] = []
    for first in range(0, len(found), PART):
        parts.append(ranked(found[first : first + PART]))
        await asyncio.sleep(0)
    return tuple(parts)


async def _of_sources(scene: Scene) -> LogFindings:
    silent = await silent_sources_in(scene.log, scene.topics, scene.rules, timeout=SILENT_SECONDS)
    notes = (silent.incomplete,) if silent.incomplete else ()
    now, found = scene.log.now(), list(silent.found)
    for number, source in enumerate(scene.rules.sources.values()):
        if number % SOURCES_PER_STEP == 0:
            await asyncio.sleep(0)
        found += expiry_findings(source.name, source.verifier.lifetimes, now)
    return LogFindings(at=now, found=await _parts(found), notes=notes)
