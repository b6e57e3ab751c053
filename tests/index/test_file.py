"""The file: killed, deleted, damaged, somebody else's, beyond its bounds. The log has everything."""

import asyncio
import os
import sqlite3
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from gateway.index import segments
from gateway.index.file import VERSION, IndexUnavailableError
from gateway.index.index import Index, open_index
from gateway.index.results import IndexedDelivery, IndexedEvent
from gateway.log.base import Log
from gateway.log.embedded.log import EmbeddedLog
from gateway.log.topics import Topics
from gateway.model import Event, UsageError
from tests.index.company import Company
from tests.index.conftest import Calendar, Ticking
from tests.index.test_search import a_history, all_found
from tests.index.test_traffic import counted, recounted
from tests.memory_log import MemoryLog

ROOT = Path(__file__).parent.parent.parent


async def answers(log: Log, topics: Topics, path: Path) -> list[tuple[IndexedEvent, list[IndexedDelivery]]]:
    """Return all that an index of a log has, once it has read everything."""
    async with open_index(path, log, topics) as index:
        await index.refresh()
        return await told(index)


async def told(index: Index) -> list[tuple[IndexedEvent, list[IndexedDelivery]]]:
    return [(event, await index.deliveries(event)) for event in await all_found(index, "", 100)]


def in_one_order(
    answers: list[tuple[IndexedEvent, list[IndexedDelivery]]],
) -> list[tuple[IndexedEvent, list[IndexedDelivery]]]:
    """Return answers in an order by what the log has: those of one millisecond come as they were read."""
    told = [(replace(event, number=0), deliveries) for event, deliveries in answers]
    return sorted(told, key=lambda each: (each[0].appended_at, each[0].id, each[0].offset))


def deleted(path: Path) -> None:
    path.unlink()


def written(path: Path, text: str) -> None:
    path.write_text(text)


def modes_beside(path: Path) -> set[int]:
    return {each.stat().st_mode & 0o777 for each in path.parent.glob(f"{path.name}*")}


def damaged(path: Path) -> None:
    """Overwrite all but the first page."""
    content = bytearray(path.read_bytes())
    content[4096:] = os.urandom(len(content) - 4096)
    path.write_bytes(content)


@pytest.mark.rotated(share=1 / 2)
@pytest.mark.parametrize("seed", range(2))
async def test_an_index_whose_processes_were_killed_has_the_same_answers(tmp_path: Path, seed: int) -> None:
    log = await EmbeddedLog.open(tmp_path / "log.db", owner=True, clock=Ticking())
    try:
        company = await Company.found(log)
        await a_history(company, Random(seed), 80)
        command = [sys.executable, "-m", "tests.index.kills"]
        arguments = [str(tmp_path / "log.db"), str(tmp_path / "killed.db"), "gateway.", str(seed)]
        process = await asyncio.create_subprocess_exec(
            *command, *arguments, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=asyncio.subprocess.PIPE
        )
        output, _ = await process.communicate()
        assert process.returncode == 0
        assert int(output) >= 3
        killed = await answers(log, company.topics, tmp_path / "killed.db")
        assert len(killed) == 80
        whole = await answers(log, company.topics, tmp_path / "whole.db")
        assert in_one_order(killed) == in_one_order(whole)
        assert [event.appended_at for event, _ in killed] == [event.appended_at for event, _ in whole]
        assert counted(tmp_path / "killed.db") == counted(tmp_path / "whole.db") == recounted(tmp_path / "whole.db")
        await company.close()
    finally:
        await log.close()


async def test_an_index_goes_on_where_it_was(path: Path) -> None:
    company = await Company.found(MemoryLog(now=Ticking()))
    await a_history(company, Random(1), 30)
    before = await answers(company.log, company.topics, path)
    event, *_ = await company.event()
    async with open_index(path, company.log, company.topics) as index:
        done = await index.refresh()
        assert done.records == 1
        assert [each for each in await told(index) if each[0].id != event.id] == before


async def test_a_deleted_file_is_made_anew(path: Path) -> None:
    company = await Company.found(MemoryLog(now=Ticking()))
    await a_history(company, Random(1), 30)
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
        before = await told(index)
        deleted(path)
        with pytest.raises(IndexUnavailableError, match="was deleted or replaced while it was open"):
            await index.refresh()
        await index.refresh()
        assert await told(index) == before


async def test_a_damaged_file_is_made_anew(path: Path) -> None:
    company = await Company.found(MemoryLog(now=Ticking()))
    await a_history(company, Random(1), 30)
    before = await answers(company.log, company.topics, path)
    damaged(path)
    async with open_index(path, company.log, company.topics) as index:
        for _ in range(3):
            try:
                await index.refresh()
                break
            except IndexUnavailableError:
                continue
        assert await told(index) == before


async def test_a_file_of_another_version_is_made_anew(path: Path) -> None:
    company = await Company.found(MemoryLog(now=Ticking()))
    await a_history(company, Random(1), 10)
    before = await answers(company.log, company.topics, path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute(f"PRAGMA user_version = {VERSION - 1}")
        connection.execute("DROP TABLE sources")
    assert await answers(company.log, company.topics, path) == before


async def test_somebody_elses_file_is_refused(path: Path) -> None:
    company = await Company.found(MemoryLog())
    written(path, "precious")
    with pytest.raises(UsageError, match="expected an index, got another file"):
        async with open_index(path, company.log, company.topics):
            pass
    deleted(path)
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE precious (x)")
    with pytest.raises(UsageError, match="expected an index, got another program's database"):
        async with open_index(path, company.log, company.topics):
            pass


async def test_a_file_that_is_open_is_refused(path: Path) -> None:
    company = await Company.found(MemoryLog())
    async with open_index(path, company.log, company.topics):
        with pytest.raises(UsageError, match="got one that another has open"):
            async with open_index(path, company.log, company.topics):
                pass


async def test_nobody_else_may_read_the_file(path: Path) -> None:
    company = await Company.found(MemoryLog())
    async with open_index(path, company.log, company.topics) as index:
        await index.refresh()
        assert modes_beside(path) == {0o600}


async def test_a_disk_that_is_full_is_told_and_waited_for(path: Path) -> None:
    company = await Company.found(MemoryLog(now=Ticking()))
    event, *_ = await company.event(body={"text": "x" * 60_000})
    async with open_index(path, company.log, company.topics) as index:
        pages = index._file.writer.execute("PRAGMA page_count").fetchone()[0]
        index._file.writer.execute(f"PRAGMA max_page_count = {pages + 1}")
        with pytest.raises(IndexUnavailableError, match="full"):
            await index.refresh()
        assert "full" in (await index.statistics()).problem
        assert await all_found(index, "", 10) == []
        index._file.writer.execute("PRAGMA max_page_count = 1000000")
        await index.refresh()
        assert [each.id for each in await all_found(index, "", 10)] == [event.id]
        assert (await index.statistics()).problem == ""


async def test_what_is_older_than_the_days_is_dropped(path: Path) -> None:
    clock = Calendar()
    company = await Company.found(MemoryLog(now=clock))
    old, *_ = await company.event()
    await company.die(old)
    async with open_index(path, company.log, company.topics, days=3) as index:
        await index.refresh()
        clock.now += 5 * 86400.0
        new, *_ = await company.event()
        await index.refresh()
        assert [each.id for each in await all_found(index, "", 10)] == [new.id]
        assert index._file.writer.execute("SELECT count(*) FROM deliveries").fetchone() == (0,)
    deleted(path)
    async with open_index(path, company.log, company.topics, days=3) as index:
        await index.refresh()
        assert [each.id for each in await all_found(index, "", 10)] == [new.id]


async def test_the_oldest_segments_are_dropped_beyond_the_bytes(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "SEGMENT_EVENTS", 100)
    company = await Company.found(MemoryLog(now=Ticking()))
    events = list[Event]()
    bound = 3 << 20
    async with open_index(path, company.log, company.topics, max_bytes=bound) as index:
        for _ in range(12):
            for number in range(100):
                words = " ".join([f"w{number}x{each}" for each in range(200)])
                events.append((await company.event(body={"text": words, "n": len(events)}))[0])
            await index.refresh()
            statistics = await index.statistics()
            assert statistics.bytes <= bound + (1 << 20)
        found = [each.id for each in await all_found(index, "", 500)]
        assert 100 <= len(found) < 1200
        assert found == [event.id for event in reversed(events)][: len(found)]
        dropped = events[0]
        assert await index.event(dropped.id) is None
        await company.die(dropped)
        await index.refresh()
        assert (await index.statistics()).left_out == {"too_old": 1}
