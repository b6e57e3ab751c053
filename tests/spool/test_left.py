"""Spools of processes that there aren't any more: the first one moves them, and says how far it is."""

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
from gateway.spool import left as left_module
from gateway.spool.left import LeftSpools
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
    monkeypatch.setattr(left_module, "LOOK_INTERVAL", 0.05)
    store = await FileStore.open(tmp_path / NAME, owner=True)
    await fill(store, 3)
    await store.close()
    return tmp_path / NAME


@asynccontextmanager
async def moving(path: Path, log: MemoryLog) -> AsyncIterator[LeftSpools]:
    left = LeftSpools([path], log=log, metrics=Metrics(CollectorRegistry()), logger=structlog.get_logger())
    running = asyncio.create_task(left.run())
    try:
        yield left
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
