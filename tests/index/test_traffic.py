"""Traffic by time: what is counted is what the log has, however it was read, and exactly once."""

import sqlite3
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest

from gateway.engine.control.records import ControlRecord
from gateway.index import segments, traffic_counts
from gateway.index.index import Index, open_index
from gateway.index.statuses import Status
from gateway.index.tallies import Tally, Traffic, quantile
from gateway.index.traffic import Lane, TrafficQuery
from gateway.index.traffic_schema import DAY, HOUR, KEPT, MINUTES, SPANS, STEPS
from gateway.log.attempt_records import Decision
from gateway.log.base import Partition
from gateway.log.records import DEDUPE_ENTRY, dedupe_entries_key, encode_dedupe_entries, fingerprint
from gateway.model import Attempt, Event, Result, identity_of
from tests.builders import an_attempt
from tests.index.company import Company, repeated
from tests.index.conftest import Calendar, Ticking
from tests.index.test_search import a_history
from tests.memory_log import MemoryLog

TABLES = ("event_counts", "delivery_counts", "attempt_counts")
Counts = Counter[tuple[object, ...]]


def figures(table: str, columns: Sequence[Any]) -> list[tuple[str, Sequence[object], int]]:
    """Return what a row of a table has counted: of what, by which keys, how many."""
    if table == "event_counts":
        return [(name, (), count) for name, count in zip((table, "bytes", "duplicates"), columns, strict=True)]
    return [(table, columns[:-1], columns[-1])]


def counted(path: Path) -> Counts:
    """Return what a file has counted, by names instead of numbers; without the total."""
    found = Counts()
    with closing(sqlite3.connect(path)) as file:
        for table in TABLES:
            lanes = "SELECT lanes.source, lanes.route, lanes.destination, counted.*"
            for row in file.execute(f"{lanes} FROM {table} AS counted JOIN lanes ON id = lane WHERE source <> ''"):
                *lane, step, start, _ = row[:6]
                for name, keys, count in figures(table, row[6:]):
                    found[name, *lane, step, start, *keys] += count
    return +found


def totals(path: Path) -> tuple[Counts, Counts]:
    """Return what a file has counted of all lanes together, and of all to each destination."""
    found, by_destination = Counts(), Counts()
    with closing(sqlite3.connect(path)) as file:
        whole = dict(file.execute("SELECT id, destination FROM lanes WHERE source = '' AND route = ''"))
        for table in TABLES:
            for step, start, lane, *keys in file.execute(f"SELECT * FROM {table}"):
                for name, own, count in figures(table, keys):
                    if lane == 0:
                        found[name, step, start, *own] += count
                    elif lane in whole:
                        by_destination[name, whole[lane], step, start, *own] += count
    return +found, +by_destination


def recounted(path: Path) -> Counts:
    """Return what there is to count in a file, row by row."""
    found = Counts()
    with closing(sqlite3.connect(path)) as file:
        floors = dict(file.execute("SELECT step, floor FROM steps"))

        def add(table: str, lane: tuple[str, str, str], at: int, count: int, *keys: object) -> None:
            for step, floor in floors.items():
                start = at // 1_000_000 // step * step
                if start >= floor:
                    found[table, *lane, step, start, *keys] += count

        for (number,) in file.execute("SELECT id FROM segments").fetchall():
            events = f"SELECT source, received, size FROM events_{number} WHERE partition <> 0"
            for source, received, size in file.execute(events):
                add("event_counts", (source, "", ""), received, 1)
                add("bytes", (source, "", ""), received, size)
        lanes = {number: lane for number, *lane in file.execute("SELECT id, source, route, destination FROM lanes")}
        for lane, at in file.execute("SELECT lane, at FROM duplicates"):
            add("duplicates", tuple(lanes[lane]), at, 1)
        deliveries = "SELECT lane, route, destination, began, status, letter FROM deliveries"
        for lane, route, destination, began, status, letter in file.execute(deliveries):
            assert lanes[lane][1:] == [route, destination]
            add("delivery_counts", tuple(lanes[lane]), began, 1, status, letter)
        for lane, at, took, result, number in file.execute("SELECT lane, at, took, result, number FROM attempts"):
            span = next((each for each, most in enumerate(SPANS) if took <= most), len(SPANS) - 1)
            add("attempt_counts", tuple(lanes[lane]), at, 1, result, int(number > 1), span)
    return +found


def added_up(counts: Counts) -> tuple[Counts, Counts]:
    """Return counts of all lanes together, and of all to each destination."""
    found, by_destination = Counts(), Counts()
    for (table, _, route, destination, *keys), count in counts.items():
        found[table, *keys] += count
        if route:
            by_destination[table, destination, *keys] += count
    return found, by_destination


async def traffic(index: Index, since: float = 0.0, step: int = HOUR, **asked: Any) -> Traffic:
    until = index._log.now() + 1
    found = await index.traffic(TrafficQuery(step=step, since=since or until - DAY, until=until, **asked))
    return found[""]


@pytest.fixture
async def clock() -> Calendar:
    return Calendar()


@pytest.fixture
async def company(clock: Calendar) -> Company:
    return await Company.found(MemoryLog(now=clock), ordered=[("ship", "warehouse")])


def attempts(company: Company, *results: tuple[Result, float]) -> tuple[Attempt, ...]:
    """Return the attempts that a delivery has had just now, each with its result and how long it took."""
    return tuple(
        [
            an_attempt(number, result=result, at=round(company.log.now(), 6), seconds=seconds)
            for number, (result, seconds) in enumerate(results, 1)
        ]
    )


async def test_events_are_counted_by_source_when_they_were_received(
    company: Company, clock: Calendar, path: Path
) -> None:
    clock.now += 1800
    now = company.log.now()
    for ago in (0, 10, 4000, 4010, 90_000):
        await company.event(received_at=round(now - ago, 6), body=b"12345")
    await company.event(source="stripe", received_at=round(now, 6), body=b"123")
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
        day = await traffic(index)
        assert (day.total.events, day.total.bytes) == (5, 23)
        assert [(start, tally.events) for start, tally in day.steps if tally.events] == [
            ((now - 4000) // HOUR * HOUR, 2),
            (now // HOUR * HOUR, 3),
        ]
        assert (await traffic(index, source="stripe")).total.events == 1
        assert (await traffic(index, source="github", step=DAY, since=now - 6 * DAY)).total.events == 5
        assert (await traffic(index, source="nobody")).total == Tally(deliveries={}, attempts={}, spans={})


async def test_a_delivery_is_counted_as_what_it_is_by_now_where_its_event_was_received(
    company: Company, clock: Calendar, path: Path
) -> None:
    event, partition, offset = await company.event()
    began = event.received_at // HOUR * HOUR
    async with open_index(path, company.log, company.topics) as index:
        await company.retry(event, attempts=attempts(company, (Result.TIMEOUT, 10.0)))
        await company.commit(partition, offset + 1)
        await index.refresh()
        assert (await traffic(index)).total.deliveries == {(Status.RETRYING, ""): 1}
        clock.now += 3 * HOUR
        failures = attempts(company, (Result.TIMEOUT, 10.0), (Result.SERVER_ERROR, 0.2))
        await company.die(event, attempts=failures, successor=2)
        await index.refresh()
        found = await traffic(index, route="build", destination="ci")
        assert [(start, tally.deliveries) for start, tally in found.steps if tally.deliveries] == [
            (began, {(Status.DEAD, "exhausted"): 1})
        ]
        assert (found.total.died, found.total.dead, found.total.waiting) == ({"exhausted": 1}, 1, 0)
        assert (await traffic(index, destination="other")).total.begun == 0


async def test_a_dead_letter_stays_one_that_died_when_it_is_resolved(company: Company, path: Path) -> None:
    event, *_ = await company.event()
    await company.die(event)
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
        ends = await company.end_of(company.topics.dead)
        now = company.log.now()
        command = ControlRecord(kind="dead", name="1", state="done", at=now, action="replay", checkpoint=ends)
        await company.command(command)
        await company.retry(event, successor=4, replayed_at=round(now + 5, 6), attempts=())
        await index.refresh()
        found = (await traffic(index)).total
        assert (found.died, found.dead, found.waiting, found.begun) == ({"exhausted": 1}, 0, 1, 2)
    assert counted(path) == recounted(path)


async def test_a_replay_is_a_delivery_where_it_was_replayed(company: Company, clock: Calendar, path: Path) -> None:
    event, *_ = await company.event()
    await company.die(event)
    clock.now += 5 * HOUR
    await company.retry(event, successor=4, replayed_at=round(company.log.now(), 6), attempts=())
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
        found = await traffic(index, route="build")
        assert [tally.begun for _, tally in found.steps if tally.begun] == [1, 1]
        assert found.steps[-1][1].waiting == 1


async def test_an_attempt_that_two_records_tell_is_counted_once(company: Company, path: Path) -> None:
    event, *_ = await company.event()
    failure = await company.attempt(event, result=Result.SERVER_ERROR, status=503, decision=Decision.RETRY)
    told = an_attempt(1, result=Result.SERVER_ERROR, status=503, at=failure.at, seconds=failure.seconds)
    await company.retry(event, attempts=(told,))
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
        first = (await traffic(index)).total
        assert (first.attempted, first.failed, first.retried) == (1, 1, 0)
        assert first.results == {"5xx": 1}
        await company.attempt(event, number=2)
        await index.refresh()
        found = await traffic(index, destination="ci")
        assert (found.total.attempted, found.total.failed, found.total.retried) == (2, 1, 1)
        assert (found.total.delivered, found.has_successes) == (1, True)
    assert counted(path) == recounted(path)


async def test_without_recorded_successes_it_says_so(company: Company, path: Path) -> None:
    event, *_ = await company.event()
    await company.attempt(event, result=Result.TIMEOUT, status=None, decision=Decision.RETRY)
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
        assert not (await traffic(index)).has_successes
        other, *_ = await company.event()
        await company.attempt(other, destination="another")
        await index.refresh()
        assert (await traffic(index, destination="ci")).has_successes  # they are recorded: it has none


def test_times_of_attempts_are_told_from_their_spans() -> None:
    assert quantile({}, 0.5) is None
    assert quantile({6: 100}, 0.5) == pytest.approx(0.075)  # of 0.05 to 0.1 s
    assert quantile({0: 50, 6: 50}, 0.5) == pytest.approx(0.001)
    assert quantile({0: 50, 6: 50}, 0.95) == pytest.approx(0.095)
    assert quantile({len(SPANS) - 1: 1}, 1.0) == pytest.approx(500.0)


async def test_what_is_counted_is_what_there_is_whatever_the_order(path: Path, tmp_path: Path) -> None:
    """Read as it comes, or all at once: the numbers are the same, and those of the rows."""
    company = await Company.found(MemoryLog(now=Ticking()))
    chosen = Random(3)
    async with open_index(path, company.log, company.topics) as index:
        for _ in range(6):
            await a_history(company, chosen, 15)
            await index.refresh()
            assert counted(path) == recounted(path)
            assert totals(path) == added_up(counted(path))
    async with open_index(tmp_path / "another.db", company.log, company.topics) as index:
        await index.refresh()
    assert counted(tmp_path / "another.db") == counted(path)
    assert len(counted(path)) > 50


async def test_events_whose_topic_is_recreated_are_taken_back(company: Company, path: Path) -> None:
    events = [(await company.event(body=b"12345"))[0] for _ in range(3)]
    await company.attempt(events[0])
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
        await company.log.recreate(company.topics.events("github"))  # type: ignore[attr-defined] # the log in memory
        await company.event(body=b"1")
        await company.event(source="stripe")
        await index.refresh()
        found = (await traffic(index, source="github")).total
        assert (found.events, found.bytes, found.begun, found.attempted) == (1, 1, 0, 0)
    assert counted(path) == recounted(path)


async def test_an_event_whose_record_is_read_late_is_counted_once(company: Company, path: Path) -> None:
    event, partition, _ = await company.event(key="k")
    await company.die(event)
    company.log.lose_leader(partition)  # type: ignore[attr-defined] # the log in memory
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
        found = (await traffic(index)).total
        assert (found.events, found.dead) == (0, 1)
        company.log.find_leader(partition)  # type: ignore[attr-defined] # as above
        await index.refresh()
        found = (await traffic(index)).total
        assert (found.events, found.dead) == (1, 1)


async def test_what_is_dropped_with_its_segment_stays_counted(
    company: Company, clock: Calendar, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file has no room for the events; what was open in them won't be known any more."""
    monkeypatch.setattr(segments, "SEGMENT_EVENTS", 20)
    async with open_index(path, company.log, company.topics, days=30) as index:
        dying, *_ = await company.event()
        waiting, *_ = await company.event()
        await company.die(dying)
        await company.retry(waiting)
        for _ in range(6):
            for _ in range(10):
                await company.event()
                clock.now += 1
            await index.refresh()
        before = (await traffic(index)).total
        assert (before.events, before.dead, before.waiting) == (62, 1, 1)
        monkeypatch.setattr(index._writer._segments, "_max_bytes", 1)
        await company.die(waiting, successor=2)
        await index.refresh()  # its record is read, and then it is dropped
        assert (await index.statistics()).events < 30
        after = (await traffic(index)).total
        assert (after.events, after.died, after.dead) == (62, {"exhausted": 2}, 0)
        assert after.deliveries == {(Status.UNKNOWN, "exhausted"): 2}
        assert totals(path) == added_up(counted(path))


async def test_each_step_is_kept_for_its_time(company: Company, clock: Calendar, path: Path) -> None:
    def starts(step: int) -> set[float]:
        return {float(str(key[5])) for key in counted(path) if key[0] == "event_counts" and key[4] == step}

    async with open_index(path, company.log, company.topics, days=4) as index:
        for _ in range(6 * 24):
            await company.event()
            clock.now += HOUR
            await index.refresh()
        now = clock.now
        assert max(now - KEPT[MINUTES] - MINUTES, 0) <= min(starts(MINUTES))
        assert now - KEPT[HOUR] - HOUR <= min(starts(HOUR)) <= now - 48 * HOUR
        assert now - 5 * DAY <= min(starts(DAY)) <= now - 4 * DAY
        assert len(starts(HOUR)) <= 51
        found = await traffic(index, step=MINUTES, since=now - DAY)
        assert now - KEPT[MINUTES] - MINUTES <= found.since
        assert found.steps[0][0] == found.since


async def test_what_ends_when_its_step_is_forgotten_is_counted_in_the_longer_ones(
    company: Company, clock: Calendar, path: Path
) -> None:
    event, *_ = await company.event()
    await company.retry(event)
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
        clock.now += 2 * DAY
        await company.die(event, successor=2)
        await company.event()
        await index.refresh()
        assert counted(path) == recounted(path)
        steps = {key[4] for key in counted(path) if key[0] == "delivery_counts"}
        assert MINUTES not in steps
        found = await traffic(index, step=DAY, since=event.received_at)
        assert found.total.deliveries == {(Status.DEAD, "exhausted"): 1}


async def test_lanes_that_have_no_traffic_any_more_are_forgotten(company: Company, clock: Calendar, path: Path) -> None:
    event, *_ = await company.event()
    await company.die(event, route="former")
    async with open_index(path, company.log, company.topics, days=2) as index:
        await index.refresh()
        for _ in range(5):
            clock.now += DAY
            await company.die((await company.event())[0])
            await index.refresh()
    with closing(sqlite3.connect(path)) as file:
        assert file.execute("SELECT DISTINCT route FROM lanes ORDER BY route").fetchall() == [("",), ("build",)]
    assert counted(path) == recounted(path)


async def test_counts_take_a_part_of_the_file_at_most(
    company: Company, clock: Calendar, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(traffic_counts, "ROW_BYTES", (64 << 20) // traffic_counts.SHARE // 200)
    async with open_index(path, company.log, company.topics, max_bytes=64 << 20) as index:
        for number in range(300):
            event, *_ = await company.event()
            await company.die(event, route=f"route-{number}")
            if number % 20 == 19:
                clock.now += 20 * MINUTES
                await index.refresh()
        with closing(sqlite3.connect(path)) as file:
            rows = sum([file.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in TABLES])
        assert rows <= 200 + 20 * 3 * 2 * len(STEPS)  # and what came since it was last looked at
        assert (await traffic(index, step=HOUR)).total.died["exhausted"] >= 20


async def test_a_renamed_route_has_the_traffic_of_each_of_its_names(company: Company, path: Path) -> None:
    for name in ("build", "build", "build-on-push"):
        await company.die((await company.event())[0], route=name)
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
        until = company.log.now() + 1
        query = TrafficQuery(step=HOUR, since=until - HOUR, until=until, by="route", names=["build", "build-on-push"])
        found = await index.traffic(query)
        assert {name: each.total.dead for name, each in found.items()} == {"build": 2, "build-on-push": 1}
        assert (await traffic(index, destination="ci")).total.dead == 3


@pytest.mark.parametrize("few", [512, 0])
async def test_only_lanes_that_may_be_seen_are_added_up(
    company: Company, path: Path, monkeypatch: pytest.MonkeyPatch, few: int
) -> None:
    monkeypatch.setattr("gateway.index.traffic.FEW_LANES", few)
    for source in ("github", "stripe", "stripe"):
        await company.die((await company.event(source=source))[0], route="audit", destination="ledger")
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
        until = company.log.now() + 1
        query = TrafficQuery(step=HOUR, since=until - HOUR, until=until)

        def sees(lane: Lane) -> bool:
            return lane.source == "stripe"

        found = (await index.traffic(query, sees))[""]
        assert (found.total.events, found.total.dead) == (2, 2)
        by_name = replace(query, by="destination", names=["ledger", "ci"])
        found_by_name = await index.traffic(by_name, sees)
        assert {name: each.total.dead for name, each in found_by_name.items()} == {"ledger": 2, "ci": 0}
        by_source = await index.traffic(replace(query, by="source", names=["github", "stripe"]))
        assert {name: each.total.events for name, each in by_source.items()} == {"github": 1, "stripe": 2}


async def test_a_topic_that_grows_is_counted_as_a_whole(company: Company, path: Path) -> None:
    async with open_index(path, company.log, company.topics) as index:
        await company.event()
        await index.refresh()
        specs = company.topics.specs([company.topics.events("github")])
        grown = next(spec for spec in specs if spec.name == company.topics.events("github"))
        company.log.grow(replace(grown, partitions=20))  # type: ignore[attr-defined] # the log in memory
        for _ in range(40):
            await company.event()
        await index.refresh()
        assert (await traffic(index)).total.events == 41


async def let_through(company: Company, partition: Partition, event: Event, offset: int) -> None:
    """Store the dedupe entry of an event."""
    identity = identity_of(event.id)
    assert identity is not None
    row = DEDUPE_ENTRY.pack(identity, fingerprint(event), offset, round(company.log.now() * 1e6))
    headers = encode_dedupe_entries(event.source, 0)
    await company.log.append(company.topics.dedupe, key=dedupe_entries_key(partition), value=row, headers=headers)


async def test_duplicates_are_counted_once_they_have_ended(company: Company, path: Path) -> None:
    original, partition, offset = await company.event(key="k")
    repeat, _, last = await company.store(repeated(original, received_at=round(company.log.now(), 6)))
    third, *_ = await company.event(key="k")
    async with open_index(path, company.log, company.topics) as index:
        await let_through(company, partition, original, offset)
        await let_through(company, partition, third, last + 1)
        await index.refresh()
        assert ((await traffic(index)).total.events, (await traffic(index)).total.duplicates) == (3, 0)
        await company.commit(partition, offset, bytes([1 << 1]))  # the original isn't done
        await index.refresh()
        assert (await traffic(index)).total.duplicates == 1
        await company.commit(partition, last + 1)
        await index.refresh()
        await company.commit(partition, last + 2)
        await index.refresh()
        assert (await traffic(index, source="github")).total.duplicates == 1
        assert len((await index.search("status:duplicate")).events) == 1
        assert counted(path) == recounted(path)
        await company.die(repeat)  # it was delivered all the same, by rules without dedupe
        await index.refresh()
        found = (await traffic(index)).total
        assert (found.events, found.duplicates, found.dead) == (3, 0, 1)


async def test_a_duplicate_among_many_is_counted_when_all_are_read_at_once(company: Company, path: Path) -> None:
    events = [await company.event(key="k") for _ in range(30)]
    partition = events[0][1]
    for event, _, offset in events:
        await let_through(company, partition, event, offset)
    for event, *_ in events[::3]:
        await company.store(repeated(event, received_at=round(company.log.now(), 6)))
    await company.commit(partition, 40)
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
        assert (await traffic(index, source="github")).total.duplicates == 10
        assert (await traffic(index, source="stripe")).total.duplicates == 0
        await company.log.recreate(partition.topic)  # type: ignore[attr-defined] # the log in memory
        await index.refresh()
        assert (await traffic(index)).total == Tally(deliveries={}, attempts={}, spans={})
