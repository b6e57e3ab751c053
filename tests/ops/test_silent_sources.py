"""Which sources are reported as silent: not those that are so every night, or that rarely send."""

from collections.abc import Iterable
from dataclasses import replace
from math import inf

import pytest

from gateway.log.base import NewRecord, Partition, TopicSpec
from gateway.log.records import encode_event
from gateway.log.topics import DAY, Topics
from gateway.ops import silent_sources as module
from gateway.ops.findings import SILENT
from gateway.ops.silent_sources import GAP_FACTOR, MIN_EVENTS, QUIET, SAMPLE, Time, silence, silent_sources_in
from gateway.rules.rules import Rules
from tests.builders import an_event
from tests.engine.test_worker import rules_of
from tests.memory_log import MemoryLog

TOPICS = Topics()
TOPIC = TOPICS.events("github")
BEGAN = 1_700_000_000.0
HOUR, MINUTE = 3600.0, 60.0


def every(seconds: float, *, start: float = BEGAN, end: float) -> list[float]:
    return [start + number * seconds for number in range(int((end - start) / seconds) + 1)]


@pytest.mark.parametrize(
    ("gap", "number", "quiet", "told"),
    [
        (MINUTE, 100, QUIET - 1, 0),
        (MINUTE, 100, QUIET, 1),
        (HOUR, 100, GAP_FACTOR * HOUR - 1, 0),
        (HOUR, 100, GAP_FACTOR * HOUR, 1),
        (MINUTE, MIN_EVENTS, DAY, 0),
        (MINUTE, MIN_EVENTS + 1, DAY, 1),
        (0.0, 100, DAY, 1),
    ],
)
def test_a_silence_is_an_hour_and_much_longer_than_any_gap_before(
    gap: float, number: int, quiet: float, told: int
) -> None:
    times = [BEGAN + gap * each for each in range(number)]
    found = silence(times, times[-1] + quiet)
    assert [(each.since, each.longest) for each in (found,) if each is not None] == [(times[-1], gap)] * told
    assert silence([], BEGAN) is None


def test_a_silence_is_held_against_its_second_half_a_day_and_a_week_ago() -> None:
    times = every(5 * MINUTE, end=BEGAN + 10 * HOUR)
    now = times[-1] + 4 * HOUR
    found = silence(times, now)
    assert found is not None
    week = now - 7 * DAY
    assert found.before == (Time(now - DAY - 2 * HOUR, now - DAY), Time(week, week + 2 * HOUR))
    assert found.expected == MIN_EVENTS, "as the alert has it, though 24 came in as long a time"
    assert [found.is_usual(counts) for counts in ([10, 10], [10, None], [None, None], [9, 10], [10, 9])] == [
        *(False, False, False),
        *(True, True),
    ]
    days = silence(times, times[-1] + 2.5 * DAY)
    assert days is not None
    assert days.before[0].end <= times[-1] - DAY / 2, "before the silence began"
    rare = silence(every(HOUR, end=BEGAN + 2 * DAY), BEGAN + 2 * DAY + 4 * HOUR)
    assert rare is not None
    assert rare.expected == 1


class Past:
    """A log in memory with events at given times."""

    def __init__(self, partitions: int = 6) -> None:
        self.at = BEGAN
        self.log = MemoryLog(now=lambda: self.at)
        self.partitions = partitions
        self.rules = rules_of()

    async def appended(self, times: Iterable[float], source: str = "github", topic: str = TOPIC) -> None:
        await self.log.create([TopicSpec(name=topic, partitions=self.partitions, retention=7 * DAY)])
        event = an_event(source=source)
        for number, at in enumerate(times):
            self.at = at
            partition = Partition(topic, number % self.partitions)
            await self.log.append_in_order(partition, [NewRecord(b"", b"{}", encode_event(event))])

    async def silent(self, now: float, rules: Rules | None = None) -> list[tuple[str, float | None]]:
        self.at = now
        looked = await silent_sources_in(self.log, TOPICS, rules or self.rules)
        assert looked.incomplete == ""
        assert all((each.rank, each.needs_attention) == (SILENT, False) for each in looked.found)
        return [(each.what, each.since) for each in looked.found]


async def test_a_steady_source_that_stops_is_reported_with_its_time() -> None:
    past = Past()
    end = BEGAN + 3 * HOUR
    await past.appended(every(20.0, end=end))
    assert await past.silent(end + HOUR - 1) == []
    assert await past.silent(end + HOUR + 1) == [("source github", end)]
    (found,) = (await silent_sources_in(past.log, TOPICS, past.rules)).found
    assert found.why == "silent: its last events were at most 20s apart"
    assert found.next[-1] == "gateway send github --url https://…"


async def test_a_source_silent_each_night_is_reported_in_the_morning() -> None:
    past = Past()
    end = BEGAN + 3 * DAY + 9 * HOUR
    await past.appended(
        [at for day in range(4) for at in every(MINUTE, start=BEGAN + day * DAY, end=BEGAN + day * DAY + 9 * HOUR)]
    )
    assert [await past.silent(end + hours * HOUR) for hours in (1.5, 3, 8, 14.5)] == [[]] * 4
    assert await past.silent(BEGAN + 4 * DAY + HOUR) == [("source github", end)]


async def test_a_nightly_burst_is_not_missed_by_day() -> None:
    past = Past()
    await past.appended(
        [at for day in range(3) for at in every(0.5, start=BEGAN + day * DAY, end=BEGAN + day * DAY + 400)]
    )
    assert [await past.silent(BEGAN + 2 * DAY + hours * HOUR) for hours in (1.2, 3, 12, 23)] == [[]] * 4
    assert len(await past.silent(BEGAN + 3 * DAY + HOUR)) == 1


async def test_a_weekend_is_no_silence_where_the_log_has_the_one_before() -> None:
    past = Past()
    days = [day for day in range(12) if day % 7 < 5]
    await past.appended(
        [at for day in days for at in every(5 * MINUTE, start=BEGAN + day * DAY, end=BEGAN + (day + 1) * DAY - 1)]
    )
    friday = BEGAN + 12 * DAY
    assert [await past.silent(friday + hours * HOUR) for hours in (2, 12, 30)] == [[]] * 3
    assert len(await past.silent(friday + 2 * DAY + 3 * HOUR)) == 1, "on Monday it is one"


async def test_the_gaps_of_partitions_that_were_not_read_as_far_back_are_not_counted() -> None:
    """Else a partition with few events would make gaps of what stands in the others."""
    past = Past(partitions=2)
    end = BEGAN + 12 * HOUR
    times = every(30.0, end=end)
    await past.log.create([TopicSpec(name=TOPIC, partitions=2, retention=7 * DAY)])
    for number, at in enumerate(times):
        past.at = at
        record = NewRecord(b"", b"{}", encode_event(an_event()))
        await past.log.append_in_order(Partition(TOPIC, number % 100 == 0), [record])
    assert len(times) > SAMPLE
    assert await past.silent(end + 1.2 * HOUR) == [("source github", end)]


async def test_the_silent_one_of_sources_in_a_topic_is_reported() -> None:
    past = Past()
    end = BEGAN + 3 * HOUR
    await past.appended(every(120.0, end=end - 2 * HOUR), "shop", "shared")
    await past.appended(every(120.0, start=end - 2 * HOUR + 1, end=end), "crm", "shared")
    (github,) = past.rules.sources.values()
    sources = {name: replace(github, name=name, path=name, topic="shared") for name in ("shop", "crm")}
    assert await past.silent(end, replace(past.rules, sources=sources)) == [("source shop", end - 2 * HOUR)]


async def test_unreadable_history_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    past = Past()
    await past.appended(every(20.0, end=BEGAN + 2 * HOUR))
    past.at += 2 * HOUR
    past.log.lose_leader(Partition(TOPIC, 3))
    assert await past.silent(past.at) == [], "a partition that can't be read may have what is missing"
    past.log.find_leader(Partition(TOPIC, 3))
    assert len(await past.silent(past.at)) == 1
    monkeypatch.setattr(module, "TIMEOUT", 0.0)
    found = await silent_sources_in(past.log, TOPICS, past.rules)
    assert "only 0 of 1 topics of events were checked" in found.incomplete
    monkeypatch.setattr(module, "TIMEOUT", inf)
    monkeypatch.setattr(module, "MAX_SOURCES", 0)
    assert "weren't checked" in (await silent_sources_in(past.log, TOPICS, past.rules)).incomplete
