"""Spools of processes that no longer exist: the first one moves them, and says how far it is."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import structlog
from prometheus_client import CollectorRegistry
from structlog.testing import capture_logs

from gateway.log.base import TopicSpec
from gateway.model import LogUnavailableError
from gateway.settings import SpoolSettings
from gateway.spool import orphans as orphans_module
from gateway.spool.orphans import OrphanedSpools
from gateway.spool.spool import open_spool
from gateway.spool.store import FileStore
from gateway.telemetry.metrics import Metrics
from tests.memory_log import MemoryLog
from tests.spool.test_store import TOPIC, fill

NAME = "spool.process-1.db"


@pytest.fixture
async def log() -> MemoryLog:
    log = MemoryLog()
    await log.create([TopicSpec(name=TOPIC, partitions=1, retention=None)])
    return log


@pytest.fixture
async def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(orphans_module, "POLL_INTERVAL", 0.05)
    store = await FileStore.open(tmp_path / NAME, owner=True)
    await fill(store, 3)
    await store.close()
    return tmp_path / NAME


@asynccontextmanager
async def moving(path: Path, log: MemoryLog) -> AsyncIterator[OrphanedSpools]:
    orphans = OrphanedSpools([path], log=log, metrics=Metrics(CollectorRegistry()), logger=structlog.get_logger())
    running = asyncio.create_task(orphans.run())
    try:
        yield orphans
    finally:
        running.cancel()
        await asyncio.wait({running})


async def test_what_is_moved_is_told_also_if_its_space_cannot_be_given_back(
    path: Path, log: MemoryLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(_: FileStore) -> None:
        raise LogUnavailableError("expected a response within 3 s, got none")

    monkeypatch.setattr(FileStore, "give_back", fail)
    with capture_logs() as lines:
        async with moving(path, log), asyncio.timeout(20):
            while not (drained := [line for line in lines if line["event"] == "spool_drained"]):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
    assert [(line["events"], line["path"]) for line in drained] == [(3, str(path))]
    assert "spool_unusable" not in {line["event"] for line in lines}
    assert len(log.records(TOPIC)) == 3


async def test_a_file_that_another_process_has_is_told_and_left_to_it(path: Path, log: MemoryLog) -> None:
    store = await FileStore.open(path, owner=True)
    with capture_logs() as lines:
        async with moving(path, log), asyncio.timeout(20):
            while not lines:  # noqa: ASYNC110 - as above
                await asyncio.sleep(0.05)
    assert [(line["event"], line["path"]) for line in lines] == [("spool_unusable", str(path))]
    await store.close()


async def test_what_keeps_an_orphaned_spool_is_told_with_its_file_and_its_topics(path: Path, log: MemoryLog) -> None:
    """One event that is too large for its topic by now; another topic that isn't there any more."""
    store = await FileStore.open(path, owner=True)
    await fill(store, 2, topic="gateway.events.gone")
    await fill(store, 1, size=1_000_000)
    await store.close()
    own = await FileStore.open(path.with_name("spool.db"), owner=True)
    await fill(own, 1, topic="gateway.events.gone")
    await own.close()
    log.max_record_bytes = 500_000
    settings = SpoolSettings(file=path.with_name("spool.db"))
    metrics, logger = Metrics(CollectorRegistry()), structlog.get_logger()
    spool = await open_spool(settings, log=log, topics=list, metrics=metrics, logger=logger, orphans=[path])
    running = asyncio.create_task(spool.run())
    async with asyncio.timeout(10):
        while metrics.spool_too_large.value < 1 or "; " not in str(spool.status()["waits"]):  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.05)
    told = spool.status_by_topic()
    running.cancel()
    await asyncio.wait({running})
    await spool.close()
    missing = "expected a topic of the log, got none of this name (or one that we may not Describe)"
    assert told["waits"]["gateway.events.gone"] == f"{missing}; {NAME}: {missing}"
    assert told["waits"][TOPIC].startswith(f"{NAME}: 1 too large for the topic, and tried again every 5 min")
    assert {each["topic"]: each["events"] for each in told["topics"]} == {TOPIC: 1, "gateway.events.gone": 3}
    assert told["events"] == 4
    assert "spool: 1 events are too large for their topics" in spool.notes()
