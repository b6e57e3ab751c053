"""The file as others see it: how current it says that it is, and who may read it while it is written."""

import asyncio
import math
import os
import sqlite3
import threading
from collections.abc import Collection
from contextlib import closing
from pathlib import Path

import pytest
from structlog.testing import capture_logs
from typing_extensions import override

from gateway.index import segments
from gateway.index.file import VERSION, IndexFile, IndexUnavailableError
from gateway.index.index import open_index
from gateway.index.query import parse_query
from gateway.index.reading import Currency, index_to_read
from gateway.index.results import IndexedEvent
from gateway.log.base import Partition
from gateway.model import GatewayError, LogUnavailableError, UsageError
from tests.index.company import Company
from tests.index.conftest import Calendar, Ticking
from tests.index.test_file import damaged
from tests.memory_log import MemoryLog


def size_of(path: Path) -> int | None:
    return path.stat().st_size if path.exists() else None


def overwritten(path: Path) -> None:
    """Overwrite all but what tells whose file it is."""
    path.write_bytes(path.read_bytes()[:100] + os.urandom(8000))


def executed(path: Path, statement: str) -> None:
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(statement)


async def searched(path: Path, limit: int = 1000) -> list[IndexedEvent]:
    def search() -> list[IndexedEvent]:
        with index_to_read(path) as index:
            return list(index.search(parse_query("", now=0.0), limit))

    return await asyncio.to_thread(search)


async def currency(path: Path) -> Currency:
    def look() -> Currency:
        with index_to_read(path) as index:
            return index.currency

    return await asyncio.to_thread(look)


async def complete_to(path: Path) -> float:
    return (await currency(path)).complete_to


async def test_a_file_is_read_while_it_is_written(company: Company, path: Path) -> None:
    first, *_ = await company.event()
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
        second, *_ = await company.event()
        await company.die(second)
        looking, looked = threading.Event(), threading.Event()

        def look() -> None:
            with index_to_read(path) as reading:
                assert len(list(reading.search(parse_query("", now=0.0), 10))) == 1
                looking.set()
                assert looked.wait(10)
                [newest, oldest] = reading.search(parse_query("", now=0.0), 10)
                assert [newest.id, oldest.id] == [second.id, first.id]
                [delivery] = reading.deliveries(newest)
                assert (delivery.route, delivery.status) == ("build", "dead")
                assert reading.event(second.id, newest.position) == newest
                assert reading.event(second.id, oldest.position) is None

        reader = asyncio.create_task(asyncio.to_thread(look))
        assert await asyncio.to_thread(looking.wait, 10)
        await index.refresh()
        looked.set()
        await reader
    assert [each.id for each in await searched(path)] == [second.id, first.id]  # nobody has it open


async def test_a_search_goes_on_over_pages(company: Company, path: Path) -> None:
    events = [(await company.event())[0] for _ in range(1200)]
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
    newest = [event.id for event in reversed(events)]
    assert [each.id for each in await searched(path, limit=2000)] == newest
    assert [each.id for each in await searched(path, limit=1001)] == newest[:1001]


def test_only_an_index_of_this_version_is_read(path: Path) -> None:
    def refused(error: type[GatewayError], match: str) -> None:
        with pytest.raises(error, match=match), index_to_read(path):
            pass

    refused(UsageError, r"index.db: expected an index, got no file; `gateway run --role console --index .*` keeps one")
    assert not path.exists()
    path.touch()
    refused(IndexUnavailableError, "got one that is being made")
    path.write_text("precious" * 100)
    refused(UsageError, "got another file, or a damaged one")
    assert path.read_text() == "precious" * 100
    path.unlink()
    executed(path, "CREATE TABLE precious (x)")
    refused(UsageError, "got another program's database")
    path.unlink()
    IndexFile(path).close()
    with index_to_read(path) as index:
        assert index.currency == Currency(complete_to=0.0, settled_at=0.0)
    executed(path, f"PRAGMA user_version = {VERSION + 1}")
    refused(UsageError, f"expected an index of version {VERSION}, got {VERSION + 1}")
    path.unlink()
    path.mkdir()
    refused(IndexUnavailableError, "is a directory")


async def test_it_says_to_what_time_it_is_complete(path: Path) -> None:
    clock = Calendar()
    company = await Company.found(MemoryLog(now=clock))
    await company.event()
    async with open_index(path, company.log, company.topics) as index:
        assert await complete_to(path) == 0
        began = clock.now
        await index.refresh()
        assert began < await complete_to(path) <= clock.now
        assert (await currency(path)).settled_at == await complete_to(path)
        before = await complete_to(path)
    clock.now += 60
    await company.event()
    async with open_index(path, company.log, company.topics) as index:
        assert index.complete_to == await complete_to(path) == before
        assert {each.complete_to for each in index.progress().values()} <= {before}
        await index.refresh()
        assert await complete_to(path) > before + 60


async def test_a_partition_without_a_leader_holds_back_what_it_is_complete_to(path: Path) -> None:
    clock = Calendar()
    company = await Company.found(MemoryLog(now=clock))
    bad = Partition(company.topics.events("github"), 2)
    company.log.lose_leader(bad)  # type: ignore[attr-defined] # the log in memory
    await company.event(key="a")
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
        assert await complete_to(path) == 0  # nothing is known of it
        company.log.find_leader(bad)  # type: ignore[attr-defined] # as above
        await index.refresh()
        whole = await complete_to(path)
        assert whole > 0
        company.log.lose_leader(bad)  # type: ignore[attr-defined] # as above
        clock.now += 100
        await index.refresh()
        assert await complete_to(path) == pytest.approx(whole, abs=1e-5)
        progress = index.progress()
        assert progress[bad.topic].complete_to == pytest.approx(whole, abs=1e-5)
        assert progress[company.topics.dead].complete_to > whole + 50
        company.log.find_leader(bad)  # type: ignore[attr-defined] # as above
        await index.refresh()
        assert await complete_to(path) > whole + 50


async def test_what_grows_or_is_new_takes_nothing_back(path: Path) -> None:
    clock = Calendar()
    company = await Company.found(MemoryLog(now=clock))
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
        before = await complete_to(path)
        specs = company.topics.specs([company.topics.events("github")])
        grown = next(spec for spec in specs if spec.name == company.topics.events("github"))
        company.log.grow(type(grown)(name=grown.name, partitions=20, retention=grown.retention))  # type: ignore[attr-defined] # the log in memory
        await company.event(key="a")
        scan, seen = company.log.scan, list[float]()

        def scanning(at: Partition, start: int, end: int) -> object:
            seen.append(min(each.complete_to for each in index.progress().values()))
            return scan(at, start, end)

        company.log.scan = scanning  # type: ignore[method-assign,assignment] # to look while it reads
        await index.refresh()
        assert seen
        assert min(seen) >= before > 0


async def test_what_was_read_of_partitions_that_a_recreated_topic_lacks_is_forgotten(path: Path) -> None:
    clock = Calendar()
    company = await Company.found(MemoryLog(now=clock))
    topic = company.topics.events("github")
    while (await company.event())[1].number == 0:
        pass
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
        await company.log.recreate(topic, partitions=1)  # type: ignore[attr-defined] # the log in memory
        event, *_ = await company.event()
        await index.refresh()
        before = await complete_to(path)
        clock.now += 60.0
        await index.refresh()
        assert await complete_to(path) >= before + 60.0
        assert index.progress()[topic].records == 0
    assert [each.id for each in await searched(path)] == [event.id]


async def test_a_recreated_topic_is_complete_to_nothing_until_it_is_read(path: Path) -> None:
    clock = Calendar()
    company = await Company.found(MemoryLog(now=clock))
    await company.event()
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
        before = await complete_to(path)
        topic = company.topics.events("github")
        await company.log.recreate(topic)  # type: ignore[attr-defined] # the log in memory
        event, partition, _ = await company.event()
        scan, seen = company.log.scan, list[float]()

        def scanning(at: Partition, start: int, end: int) -> object:
            if at == partition:
                seen.append(index.progress()[topic].complete_to)
            return scan(at, start, end)

        company.log.scan = scanning  # type: ignore[method-assign,assignment] # to look while it reads
        await index.refresh()
        assert seen == [0.0]
        assert await complete_to(path) > before
    assert [each.id for each in await searched(path)] == [event.id]


async def test_what_isnt_committed_is_no_progress(company: Company, path: Path) -> None:
    await company.event()
    async with open_index(path, company.log, company.topics) as index:
        commit = index._writer.commit
        index._writer.commit = _full  # type: ignore[method-assign] # a disk that is full
        with pytest.raises(IndexUnavailableError):
            await index.refresh()
        assert {each.complete_to for each in index.progress().values()} <= {0.0}
        index._writer.commit = commit  # type: ignore[method-assign] # there is room
        await index.refresh()
        assert min(each.complete_to for each in index.progress().values()) > 0
        assert (await index.statistics()).interruptions == {"file_unavailable": 1}


def _full(now: float) -> None:
    raise IndexUnavailableError(f"no room at {now}")


async def test_a_damaged_file_is_set_aside_and_said(company: Company, path: Path) -> None:
    event, *_ = await company.event()
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
    overwritten(path)
    with capture_logs() as lines:
        async with open_index(path, company.log, company.topics) as index:
            await index.refresh()
    assert [line["event"] for line in lines] == ["index_rebuilt"]
    assert [each.id for each in await searched(path)] == [event.id]
    aside = path.with_name("index.db.damaged")
    assert size_of(aside) == 8100
    damaged(path)
    async with open_index(path, company.log, company.topics) as index:
        for _ in range(3):
            try:
                await index.refresh()
                break
            except IndexUnavailableError:
                continue
    assert size_of(aside) != 8100  # one is kept


async def test_a_damaged_file_that_may_be_somebody_elses_is_refused(company: Company, path: Path) -> None:
    """What says whose it is was in its WAL alone."""
    await asyncio.to_thread(executed, path, "CREATE TABLE precious (x)")
    overwritten(path)
    with pytest.raises(UsageError, match=r"got a damaged database .*; delete it, or name another one"):
        async with open_index(path, company.log, company.topics):
            pass
    assert size_of(path) == 8100


async def test_a_log_that_is_another_one_is_read_anew(path: Path) -> None:
    """A copy was restored, and has got more since than it lacked."""
    clock = Calendar()
    one, other = [await Company.found(MemoryLog(now=clock)) for _ in range(2)]
    same, *_ = await one.event(key="k")
    await other.store(same)
    former = [(await one.event(key="k"))[0] for _ in range(3)]
    async with open_index(path, one.log, one.topics) as index:
        await index.refresh()
    new = [(await other.event(key="k"))[0] for _ in range(5)]
    async with open_index(path, other.log, other.topics) as index:
        await index.refresh()
        received = [each.received_at for each in await searched(path)]
        assert received == pytest.approx([each.received_at for each in reversed([same, *new])], abs=1e-5)
        assert min(abs(at - each.received_at) for at in received for each in former) > 1e-4
        await other.event(key="k")
        assert (await index.refresh()).records == 1
    async with open_index(path, other.log, other.topics) as index:  # the same one
        assert (await index.refresh()).records == 0


async def test_a_file_of_another_version_is_made_anew_and_said(company: Company, path: Path) -> None:
    event, *_ = await company.event()
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
    await asyncio.to_thread(executed, path, f"PRAGMA user_version = {VERSION - 1}")
    with capture_logs() as lines:
        async with open_index(path, company.log, company.topics) as index:
            await index.refresh()
    [line] = [line for line in lines if line["event"] == "index_rebuilt"]
    assert line["reason"] == f"expected an index of version {VERSION}, got {VERSION - 1}"
    assert [each.id for each in await searched(path)] == [event.id]
    assert size_of(path.with_name("index.db.damaged")) is None


async def test_attempts_of_a_life_without_a_row_are_shown_with_the_next_one(company: Company, path: Path) -> None:
    event, *_ = await company.event()
    for replayed_at, number in ((0.0, 1), (0.0, 2), (100.0, 1), (200.0, 1)):
        await company.attempt(event, replayed_at=replayed_at, number=number)
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
        await asyncio.to_thread(executed, path, "DELETE FROM deliveries WHERE replayed = 0")
        [known] = await index.events(event.id)
        found = await index.deliveries(known)
        assert [[each.number for each in delivery.attempts] for delivery in found] == [[1, 2, 1], [1]]
        last = await index.deliveries(known, after=found[0].place, attempts=2, limit=1)
        assert [[each.number for each in delivery.attempts] for delivery in last] == [[1]]
        first = await index.deliveries(known, attempts=2, limit=1)
        assert [[each.number for each in delivery.attempts] for delivery in first] == [[2, 1]]


async def test_a_problem_is_said_once_and_so_is_its_end(company: Company, path: Path) -> None:
    waits: list[float] = []
    topics, gone = company.log.topics, True

    async def failing() -> Collection[str]:
        if gone:
            raise LogUnavailableError("the log is down")
        return await topics()

    async def sleep(seconds: float) -> None:
        nonlocal gone
        waits.append(seconds)
        gone = len(waits) < 7
        if len(waits) == 8:
            raise asyncio.CancelledError

    company.log.topics = failing  # type: ignore[method-assign] # it is away
    with capture_logs() as lines:
        async with open_index(path, company.log, company.topics, sleep=sleep) as index:
            with pytest.raises(asyncio.CancelledError):
                await index.run()
            assert (await index.statistics()).interruptions == {"log_unavailable": 7}
    assert waits[:7] == [5.0, 10.0, 20.0, 30.0, 30.0, 30.0, 30.0]
    assert waits[7] < 5
    assert [line["event"] for line in lines] == ["index_interrupted", "index_resumed"]


async def test_what_is_dropped_is_said(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "SEGMENT_EVENTS", 10)
    company = await Company.found(MemoryLog(now=Ticking()))
    with capture_logs() as lines:
        async with open_index(path, company.log, company.topics, max_bytes=1 << 19) as index:
            for _ in range(3):  # what isn't committed yet has no size
                for number in range(100):
                    words = " ".join([f"w{number}x{each}" for each in range(200)])
                    await company.event(body={"text": words})
                await index.refresh()
    dropped = [line for line in lines if line["event"] == "index_events_dropped"]
    assert 0 < sum(line["count"] for line in dropped) == 300 - len(await searched(path))
    assert math.isfinite(await complete_to(path))


async def test_how_far_it_is_can_be_asked_while_partitions_are_added(company: Company, path: Path) -> None:
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
        topic, numbers = company.topics.events("github"), iter(range(100, 1000))

        parts = index._writer._partitions.parts

        class Meanwhile(frozenset[str]):
            """Has a partition added, as by the writer's thread, in the middle of what the event loop looks at."""

            @override
            def __contains__(self, name: object) -> bool:
                parts[Partition(topic, next(numbers))] = parts[Partition(topic, 0)]
                return super().__contains__(name)

        reader = index._reader
        reader._present = Meanwhile(reader._present)
        assert topic in index.progress()
