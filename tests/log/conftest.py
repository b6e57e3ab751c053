"""The logs that the contract's suite runs against."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager, closing
from dataclasses import dataclass, field
from pathlib import Path
from uuid import uuid4

import pytest
from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, RecordsToDelete

from gateway.log.base import Log, Partition
from gateway.log.embedded.log import EmbeddedLog
from gateway.log.kafka.log import KafkaLog
from tests.memory_log import MemoryLog

IMPLEMENTATIONS = ["memory", "embedded", "kafka"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """One log under test. Each `open()` is what another process would open; all of them see the same records.

    `delete_below` does what retention does, and `lose_leader` takes a partition's leader away, where the suite can make
    it happen. Names begin with `prefix`, so that
    tests on one broker don't meet.
    """

    open: Callable[[], AbstractAsyncContextManager[Log]]
    delete_below: Callable[[Partition, int], Awaitable[None]] | None = None
    lose_leader: Callable[[Partition], None] | None = None
    prefix: str = field(default_factory=lambda: f"t{uuid4().hex[:12]}.")


@pytest.fixture(params=IMPLEMENTATIONS)
def subject(request: pytest.FixtureRequest) -> Subject:
    """Return the log under test: the fixture `<implementation>_subject`."""
    subject: Subject = request.getfixturevalue(f"{request.param}_subject")
    return subject


@pytest.fixture
def memory_subject() -> Subject:
    first = MemoryLog()

    @asynccontextmanager
    async def open_log() -> AsyncIterator[Log]:
        log = first.another()
        yield log
        await log.close()

    async def delete_below(partition: Partition, offset: int) -> None:
        first.delete_below(partition, offset)

    return Subject(open=open_log, delete_below=delete_below, lose_leader=first.lose_leader)


@pytest.fixture
def embedded_subject(tmp_path: Path) -> Subject:
    """The first that opens the file is its owner, the others are what the command line would be."""
    path = tmp_path / "gateway.db"
    owners: list[EmbeddedLog] = []

    @asynccontextmanager
    async def open_log() -> AsyncIterator[Log]:
        log = await EmbeddedLog.open(path, owner=not owners)
        if not owners:
            owners.append(log)
        try:
            yield log
        finally:
            await log.close()
            if log in owners:
                owners.remove(log)

    def delete(partition: Partition, offset: int) -> None:
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("UPDATE topics SET start = ? WHERE name = ?", (offset, partition.topic))
            connection.execute(
                "DELETE FROM records WHERE id & 0xffffffffffff < ?"
                " AND id >> 48 = (SELECT id FROM topics WHERE name = ?)",
                (offset, partition.topic),
            )

    async def delete_below(partition: Partition, offset: int) -> None:
        await asyncio.to_thread(delete, partition, offset)

    return Subject(open=open_log, delete_below=delete_below)


@pytest.fixture
def kafka_subject(kafka: str) -> Subject:
    @asynccontextmanager
    async def open_log() -> AsyncIterator[Log]:
        log = await KafkaLog.open(kafka)
        try:
            yield log
        finally:
            await log.close()

    async def delete_below(partition: Partition, offset: int) -> None:
        admin = AIOKafkaAdminClient(bootstrap_servers=kafka)
        await admin.start()
        try:
            await admin.delete_records({TopicPartition(*partition): RecordsToDelete(before_offset=offset)})
        finally:
            await admin.close()

    return Subject(open=open_log, delete_below=delete_below)
