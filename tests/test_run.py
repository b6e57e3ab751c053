"""What a process tells of the log while it runs."""

import asyncio
from collections.abc import Callable, Mapping
from pathlib import Path
from unittest.mock import Mock

import pytest
import structlog
from structlog.testing import capture_logs
from typing_extensions import override

from gateway.engine.unavailable_partitions import UNAVAILABLE_AFTER
from gateway.log.base import ALL, NO_APPENDS, NO_TOPIC, Partition
from gateway.log.topics import Topics
from gateway.required_topics import specs_of
from gateway.rules.load import load_rules
from gateway.run import Gateway
from gateway.settings import Role, Settings
from tests.memory_log import MemoryLog

LOST = Partition("gateway.events.github", 3)


class Refusing(MemoryLog):
    """A log of which some partitions take no appends."""

    def __init__(self) -> None:
        super().__init__(now=lambda: self.time)
        self.time = 100.0
        self.found: Mapping[Partition, str] = {LOST: f"{NO_APPENDS}: too few replicas"}

    @override
    async def refusing(self) -> Mapping[Partition, str]:
        return self.found


@pytest.fixture
def ingress(monkeypatch: pytest.MonkeyPatch) -> Gateway:
    monkeypatch.setattr("gateway.log_watch.POLL_INTERVAL", 0.001)
    monkeypatch.setattr("gateway.log_watch.TOPICS_INTERVAL", 0.001)
    return Gateway(Settings(role=Role.INGRESS), structlog.get_logger())


def watching(gateway: Gateway, log: MemoryLog) -> list[asyncio.Task[None]]:
    """Start what a gateway does to watch its log."""
    group = Mock()
    group.create_task = lambda coroutine, name: asyncio.create_task(coroutine, name=name)
    return gateway._start_watching(log, group)


async def test_an_ingress_alone_reports_partitions_that_refuse_appends(ingress: Gateway) -> None:
    log = Refusing()
    with capture_logs() as lines:
        tasks = watching(ingress, log)
        await until(lambda: ingress._unread() == {LOST: (100.0, "takes no appends: too few replicas")})
        assert lines == []
        log.time += UNAVAILABLE_AFTER
        await until(lambda: lines)
        assert (lines[0]["event"], lines[0]["topic"], lines[0]["partitions"]) == (
            "partitions_unavailable",
            LOST.topic,
            ["3"],
        )
        assert UNAVAILABLE_AFTER in [gauge.value for _, gauge in ingress._metrics.partition_unread.items()]
        log.found = {}
        await until(lambda: len(lines) > 1)
        assert (lines[1]["event"], lines[1]["seconds"]) == ("partitions_available", UNAVAILABLE_AFTER)
        assert ingress._unread() == {}
        for task in tasks:
            task.cancel()


async def test_a_missing_topic_of_the_rules_is_reported_by_each_process(ingress: Gateway, tmp_path: Path) -> None:
    """Also one that this process doesn't append to yet, or never reads."""
    file, log = tmp_path / "routes.yaml", MemoryLog(now=lambda: 100.0)
    file.write_text("version: 1\nsources: {crm: {verify: {scheme: none}}}\n")
    ingress.reloader.activate(rules := await asyncio.to_thread(load_rules, file), {})
    specs = specs_of(rules, Topics())
    gone = {"gateway.events.crm", "gateway.dead"}
    await log.create([spec for spec in specs if spec.name not in gone])
    tasks = watching(ingress, log)
    await until(lambda: ingress._unread() == {Partition(name, ALL): (100.0, NO_TOPIC) for name in gone})
    assert set(ingress._metrics.partition_unread) == {(name, "all") for name in gone}
    await log.create(specs)
    await until(lambda: ingress._unread() == {})
    for task in tasks:
        task.cancel()


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not holds():  # noqa: ASYNC110 - what it waits for is up to another task
            await asyncio.sleep(0.001)
