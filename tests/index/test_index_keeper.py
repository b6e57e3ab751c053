"""The index in a process: what fails in it is told and tried again, and ends nothing but a start that is a mistake."""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import structlog
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from gateway import index_keeper
from gateway.index.index import Index, open_index
from gateway.index.writer import Writer
from gateway.index_keeper import IndexKeeper
from gateway.log.base import Partition
from gateway.model import UsageError
from gateway.settings import IndexSettings
from gateway.telemetry.metrics import Metrics
from tests.index.company import Company


class Clock:
    """Sleeps that end at once, and are kept."""

    def __init__(self) -> None:
        self.slept: list[float] = []

    async def __call__(self, seconds: float) -> None:
        self.slept.append(seconds)
        await asyncio.sleep(0.01)


class Kept:
    """A keeper of an index, and what it tells."""

    def __init__(self, company: Company, path: Path, *, is_needed: bool = True) -> None:
        self.registry = CollectorRegistry()
        self.clock = Clock()
        self.keeper = IndexKeeper(
            IndexSettings(file=path),
            log=company.log,
            topics=company.topics,
            metrics=Metrics(self.registry),
            logger=structlog.get_logger(),
            is_needed=is_needed,
            redactions=dict,
            event_topics=frozenset,
            sleep=self.clock,
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        if self.keeper.index is None:
            await self.keeper.open()
        task = asyncio.create_task(self.keeper.run())
        try:
            yield
        finally:
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()

    def value(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"gateway_index_{name}", labels)

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not holds():  # noqa: ASYNC110 - nothing tells
                await asyncio.sleep(0.01)


async def test_what_it_does_is_measured(company: Company, path: Path) -> None:
    event, *_ = await company.event()
    await company.log.append(company.topics.dead, key=b"k", value=b"not ours", headers=[])
    kept, topic = Kept(company, path), company.topics.events("github")
    assert kept.value("interruptions_total", reason="bug") == 0
    assert kept.value("records_left_out_total", reason="undecodable") == 0
    with capture_logs() as lines:
        async with kept.running():
            await kept.until(lambda: kept.value("events") == 1)
            await kept.until(lambda: kept.value("lag_records", topic=topic) == 0)
            await kept.until(lambda: kept.value("records_left_out_total", reason="undecodable") == 1)
            assert (kept.value("behind_seconds", topic=topic) or 0.0) >= 0
            assert kept.value("oldest_event_timestamp_seconds") == pytest.approx(event.received_at, abs=1)
            assert (kept.value("bytes") or 0) > 4096
            assert kept.keeper.notes() == []
            status = kept.keeper.status(company.log.now())
            assert (status["held_up"], status["events"], status["file"]) == (None, 1, str(path))
            assert status["bytes"] == kept.value("bytes")
            assert status["oldest"] == kept.value("oldest_event_timestamp_seconds")
            assert 0 <= status["oldest_age"] < 60
            assert status["room"] > 0
            assert 0 <= status["behind"]["seconds"] < 5
            assert kept.value("behind_seconds", topic="") is None
            await kept.until(lambda: len(kept.clock.slept) > 30)
            assert kept.value("records_left_out_total", reason="undecodable") == 1
    assert (kept.keeper.index, kept.keeper.problem) == (None, "this process is stopping")
    assert [line["event"] for line in lines] == ["index_opened", "index_stopped"]


async def test_a_file_that_cant_be_opened_is_waited_for(company: Company, path: Path) -> None:
    await company.event()
    kept = Kept(company, path)
    path.mkdir()  # noqa: ASYNC240 - in a test
    with capture_logs() as lines:
        async with kept.running():
            await kept.until(lambda: (kept.value("interruptions_total", reason="file_unavailable") or 0) >= 3)
            assert "directory" in kept.keeper.notes()[0]
            status = kept.keeper.status(company.log.now())
            assert kept.keeper.notes() == [f"index: {status['held_up']['reason']}"]
            assert status["held_up"]["since"] <= company.log.now()
            assert (status["behind"], status["bytes"], status["oldest"]) == (None, None, None)
            assert kept.value("behind_seconds", topic="") is not None
            path.rmdir()  # noqa: ASYNC240 - as above
            await kept.until(lambda: kept.value("events") == 1)
            assert kept.keeper.notes() == []
            await kept.until(lambda: kept.value("behind_seconds", topic="") is None)
            assert kept.keeper.status(company.log.now())["held_up"] is None
    assert [line["event"] for line in lines] == ["index_interrupted", "index_opened", "index_stopped"]
    assert [wait for wait in kept.clock.slept if wait > 1][:3] == [5.0, 10.0, 20.0]


async def test_a_file_of_another_process_or_program_is_a_mistake(company: Company, path: Path) -> None:
    async with open_index(path, company.log, company.topics):
        with pytest.raises(UsageError, match="got one that another has open"):
            await Kept(company, path).keeper.open()
    other = path.with_name("other")
    other.write_text("precious" * 100)
    with pytest.raises(UsageError, match="expected an index, got another file"):
        await Kept(company, other).keeper.open()
    kept = Kept(company, other, is_needed=False)
    async with kept.running():
        await kept.until(lambda: (kept.value("interruptions_total", reason="file_unavailable") or 0) >= 2)
        assert "expected an index, got another file" in kept.keeper.notes()[0]
        other.unlink()
        await kept.until(lambda: kept.value("events") == 0)


async def test_a_bug_ends_nothing_and_is_told(company: Company, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    await company.event()
    index, calls, secret = Writer.index, 0, "a piece of the body"

    def fails_twice(self: Writer, *arguments: object) -> None:
        nonlocal calls
        calls += 1
        if calls <= 2:
            raise KeyError(secret)
        index(self, *arguments)  # type: ignore[arg-type] # as it was called

    monkeypatch.setattr(Writer, "index", fails_twice)
    kept = Kept(company, path)
    with capture_logs() as lines:
        async with kept.running():
            await kept.until(lambda: kept.value("events") == 1)
            assert kept.value("interruptions_total", reason="bug") == 2
            assert kept.keeper.notes() == []
    told = [line for line in lines if line["event"] == "index_failed"]
    assert len(told) == 2
    assert all("fails_twice" in line["exception"] and secret not in line["exception"] for line in told)
    assert [wait for wait in kept.clock.slept if wait > 1][:2] == [5.0, 10.0]


async def test_a_bug_in_measuring_ends_nothing_and_is_told_once(
    company: Company, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, progress, asked = Kept(company, path), Index.progress, 0

    def fails_twice(self: Index) -> object:
        nonlocal asked
        asked += 1
        if asked <= 2:
            raise RuntimeError("dictionary changed size during iteration")
        return progress(self)

    monkeypatch.setattr(Index, "progress", fails_twice)
    with capture_logs() as lines:
        async with kept.running():
            await company.event()
            await kept.until(lambda: kept.value("events") == 1)
            assert kept.value("interruptions_total", reason="bug") == 2
    assert [line["event"] for line in lines] == ["index_opened", "index_failed", "index_stopped"]


async def test_a_file_that_takes_long_to_close_is_opened_again(
    company: Company, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_keeper, "CLOSE_TIMEOUT", 0.05)
    read, is_read = Writer.index, threading.Event()

    def fails_once(*_: object) -> None:
        monkeypatch.setattr(Writer, "index", read)
        raise KeyError

    monkeypatch.setattr(Writer, "index", fails_once)
    await company.event()
    kept = Kept(company, path)
    await kept.keeper.open()
    assert kept.keeper.index is not None
    reading = kept.keeper.index._counting.submit(is_read.wait)  # the traffic of ten thousand routes
    async with kept.running():
        await kept.until(lambda: kept.value("interruptions_total", reason="bug") == 1)
        await asyncio.sleep(0.3)
        assert not reading.done()
        assert kept.keeper.notes() == ["index: KeyError, a bug of the gateway"]
        is_read.set()
        await kept.until(lambda: kept.value("events") == 1)
        assert kept.value("interruptions_total", reason="file_unavailable") == 0
        assert kept.keeper.notes() == []


async def test_a_topic_that_cant_be_read_falls_behind_alone(company: Company, path: Path) -> None:
    kept, bad = Kept(company, path), Partition(company.topics.dead, 0)
    async with kept.running():
        await kept.until(lambda: kept.value("behind_seconds", topic=bad.topic) is not None)
        company.log.lose_leader(bad)  # type: ignore[attr-defined] # the log in memory
        await kept.until(lambda: (kept.value("behind_seconds", topic=bad.topic) or 0.0) > 0.3)
        behind = kept.keeper.status(company.log.now())["behind"]
        assert (behind["topic"], bool(behind["reason"])) == (bad.topic, True)
        assert behind["seconds"] > 0.3
        assert (kept.value("behind_seconds", topic=company.topics.events("github")) or 0.0) < 0.3
