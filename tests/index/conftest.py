"""Logs to index, filled with what a gateway would store."""

from collections.abc import AsyncIterator
from pathlib import Path
from time import time
from uuid import uuid4

import pytest

from gateway.log.embedded.log import EmbeddedLog
from gateway.log.kafka.log import KafkaLog
from tests.index.company import Company
from tests.memory_log import MemoryLog


class Ticking:
    """A clock by which no two records are appended in the same millisecond, and that is never ahead of the real one."""

    def __init__(self) -> None:
        self._now = time() - 3600

    def __call__(self) -> float:
        self._now += 0.002
        return self._now


class Calendar:
    """A clock that is set."""

    def __init__(self) -> None:
        self.now = 1_764_532_800.0

    def __call__(self) -> float:
        self.now += 0.002
        return self.now


@pytest.fixture
async def company() -> Company:
    """Return a gateway's log in memory."""
    return await Company.found(MemoryLog(now=Ticking()), ordered=[("ship", "warehouse")])


@pytest.fixture(params=["memory", "embedded", "kafka"])
async def any_company(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Company]:
    """A gateway's log of each kind."""
    log: MemoryLog | EmbeddedLog | KafkaLog
    if request.param == "memory":
        log = MemoryLog()
    elif request.param == "embedded":
        log = await EmbeddedLog.open(tmp_path / "log.db", owner=True)
    else:
        log = await KafkaLog.open(request.getfixturevalue("kafka"))
    try:
        company = await Company.found(log, prefix=f"t{uuid4().hex[:12]}.")
        await company.wait_until_readable()
        yield company
        await company.close()
    finally:
        await log.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "index.db"
