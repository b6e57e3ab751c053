"""What a process does while part of the log can't be used, and what it tells of that."""

import asyncio
import sys
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import structlog
from aiohttp import ClientSession
from structlog.testing import capture_logs
from typing_extensions import override

from gateway.engine.unavailable_partitions import UNAVAILABLE_AFTER
from gateway.log.base import ALL, NO_APPENDS, NO_TOPIC, Partition
from gateway.log.topics import Topics
from gateway.required_topics import specs_of
from gateway.rules.load import load_rules
from gateway.run import Gateway
from gateway.settings import Address, Role, Settings
from tests.memory_log import MemoryLog
from tests.sink import Sink

LOST = Partition("gateway.events.github", 3)
CONTROL = Topics().control_partition
RULES = """
version: 1
sources: {{crm: {{verify: {{scheme: none}}}}}}
destinations: {{erp: {{url: "{url}"}}}}
routes: [{{name: all, from: crm, to: erp}}]
"""


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


@pytest.fixture(params=[Role.ALL])
def waiting(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> tuple[Gateway, MemoryLog, Path]:
    """A gateway whose control records can't be read, its log, and the file of its rules."""
    log, file = MemoryLog(), tmp_path / "routes.yaml"
    log.lose_leader(CONTROL)

    async def open_log(*_: object, **__: object) -> MemoryLog:
        return log

    monkeypatch.setattr("gateway.run.open_log", open_log)
    monkeypatch.setattr("gateway.log_watch.POLL_INTERVAL", 0.001)
    # What it does to its process is not for this one.
    monkeypatch.setattr("gateway.run.SWITCH_INTERVAL", sys.getswitchinterval())
    monkeypatch.setattr("gateway.run.raise_file_limit", lambda: None)
    monkeypatch.setattr("gateway.garbage.freeze", lambda: None)
    anywhere = Address("127.0.0.1", 0)
    settings = Settings(rules=file, role=request.param, listen=anywhere, admin=anywhere)
    file.write_text(RULES.format(url="http://127.0.0.1:9/"))
    return Gateway(settings, structlog.get_logger()), log, file


async def test_events_are_taken_while_the_control_records_cannot_be_read(
    waiting: tuple[Gateway, MemoryLog, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A worker waits for these, as it would call what is paused; senders don't wait for the worker."""
    gateway, log, file = waiting
    monkeypatch.setattr("gateway.run.OPEN_TIMEOUT", 0.05)
    async with Sink() as sink, ClientSession() as client:
        await asyncio.to_thread(file.write_text, RULES.format(url=sink.url))
        with capture_logs() as lines:
            running = asyncio.create_task(gateway.run())
            listening = await line_of("listening", lines)
            async with client.post(f"{listening['ingress']}/in/crm", data=b"{}") as posted:
                assert posted.status == 202
            await until(gateway._unread)
            async with client.get(f"{listening['admin']}/readyz") as answer:
                found = await answer.json()
            assert (answer.status, found["ready"], found["reasons"]) == (200, True, [])
            assert [(each["topic"], each["partition"], each["reason"]) for each in found["unread"]] == [
                (CONTROL.topic, "0", "gateway.control/0: expected a leader, got none")
            ]
            assert gateway._worker is None
            assert not sink.requests
            log.find_leader(CONTROL)
            await until(lambda: sink.requests)
            await until(lambda: not gateway._unread())
            gateway.stop()
            await running


@pytest.mark.parametrize("waiting", [Role.ALL, Role.ROUTER], indirect=True)
async def test_a_process_that_waits_for_the_control_records_says_so_and_stops_at_once(
    waiting: tuple[Gateway, MemoryLog, Path],
) -> None:
    gateway, _, _ = waiting
    running = asyncio.create_task(gateway.run())
    expected = "starting; gateway.control/0: gateway.control/0: expected a leader, got none"
    await until(lambda: gateway._unready() == expected)
    gateway.stop()
    await asyncio.wait_for(running, 5)
    assert gateway._worker is None


async def line_of(event: str, lines: Sequence[MutableMapping[str, Any]]) -> MutableMapping[str, Any]:
    await until(lambda: any(line["event"] == event for line in lines))
    return next(line for line in lines if line["event"] == event)


async def until(holds: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not holds():  # noqa: ASYNC110 - what it waits for is up to another task
            await asyncio.sleep(0.001)
