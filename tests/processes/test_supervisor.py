"""The parent: what it does when a child doesn't start, ends, hangs, or when it is told to stop."""

import asyncio
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import structlog
from structlog.testing import capture_logs

from gateway.processes import supervisor
from gateway.processes.supervisor import Supervisor
from gateway.settings import from_sources

CHILD = """
import json, os, signal, sys, time
child = json.loads(os.environ["GATEWAY_CHILD"])
number, folder = child["number"], child["folder"]
starts = len([name for name in os.listdir(folder) if name.startswith(f"start-{number}-")])
open(f"{folder}/start-{number}-{starts}", "w").close()
def end(*_): sys.exit(0)
signal.signal(signal.SIGTERM, end)
def serve():
    os.write(0, b"ready")
    time.sleep(60)
"""
"""What each child below begins with: it notes that it was started, and `serve` says that it serves."""
Lines = list[Any]


@asynccontextmanager
async def running(
    monkeypatch: pytest.MonkeyPatch, program: str, *, processes: int = 2
) -> AsyncIterator[tuple["asyncio.Task[int]", Lines, Path]]:
    """Run a parent whose children run a program."""
    monkeypatch.setattr(supervisor, "_command", lambda: [sys.executable, "-c", CHILD + program])
    settings = from_sources(
        {
            "log": "kafka://127.0.0.1:9",
            "processes": str(processes),
            "listen": "127.0.0.1:0",
            "admin": "127.0.0.1:0",
        },
        {},
    )
    with tempfile.TemporaryDirectory(prefix="gw-") as name, capture_logs() as lines:
        parent = Supervisor(settings, structlog.get_logger(), folder=Path(name))
        task = asyncio.create_task(parent.run())
        try:
            yield task, lines, Path(name)
        finally:
            parent.stop()
            await asyncio.wait({task})


async def line(lines: Lines, event: str, **fields: object) -> Mapping[str, Any]:
    async with asyncio.timeout(20):
        while True:
            for each in lines:
                if each["event"] == event and fields.items() <= each.items():
                    found: Mapping[str, Any] = each
                    return found
            await asyncio.sleep(0.01)


def starts(folder: Path, number: int) -> int:
    return len([*folder.glob(f"start-{number}-*")])


async def until_started(folder: Path, number: int, *, times: int) -> None:
    async with asyncio.timeout(20):
        while starts(folder, number) < times:  # noqa: ASYNC110 - files of other processes
            await asyncio.sleep(0.01)


async def test_a_signal_ends_all_and_the_exit_code_is_0(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(monkeypatch, "serve()") as (task, lines, folder):
        await line(lines, "processes_started", processes=2)
        assert [starts(folder, number) for number in range(2)] == [1, 1]
        os.kill(os.getpid(), signal.SIGTERM)
        assert await asyncio.wait_for(task, 10) == 0


async def test_the_others_are_not_started_if_the_first_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(monkeypatch, "time.sleep(0.5); sys.exit(2)") as (task, lines, folder):
        assert await asyncio.wait_for(task, 10) == 2
        assert [starts(folder, number) for number in range(2)] == [1, 0]
        assert not any(each["event"] == "process_ended" for each in lines)


async def test_all_end_if_another_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(monkeypatch, "sys.exit(7) if number else serve()") as (task, _, folder):
        assert await asyncio.wait_for(task, 10) == 7
        assert [starts(folder, number) for number in range(2)] == [1, 1]


async def test_one_that_ends_is_started_again_and_again_while_another_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.processes.restarts.FIRST_WAIT", 0.001)
    program = """
if number and starts: sys.exit(3)
if number: os.write(0, b"ready"); time.sleep(0.5); sys.exit(3)
serve()
"""
    async with running(monkeypatch, program) as (task, lines, folder):
        await line(lines, "process_ended", process=1, code=3)
        await until_started(folder, 1, times=7)
        assert starts(folder, 0) == 1
        assert not task.done()


async def test_all_is_given_up_if_none_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.processes.restarts.FIRST_WAIT", 0.001)
    program = """
if starts: sys.exit(5)
os.write(0, b"ready"); time.sleep(1); sys.exit(5)
"""
    async with running(monkeypatch, program) as (task, lines, _):
        await line(lines, "processes_started")
        assert await asyncio.wait_for(task, 15) == 5


async def test_one_that_does_not_end_is_killed_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "STOP_TIMEOUT", 0.3)
    program = "signal.signal(signal.SIGTERM, signal.SIG_IGN) if number else None\nserve()"
    async with running(monkeypatch, program) as (task, lines, _):
        await line(lines, "processes_started")
        os.kill(os.getpid(), signal.SIGTERM)
        assert await asyncio.wait_for(task, 10) == 128 + signal.SIGKILL
        await line(lines, "processes_killed", processes=1)


async def test_a_system_that_starts_no_process_is_told_and_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.processes.restarts.FIRST_WAIT", 0.001)
    program = "if number and not starts: os.write(0, b'ready'); time.sleep(0.5); sys.exit(3)\nserve()"
    async with running(monkeypatch, program) as (_, lines, folder):
        await line(lines, "processes_started")
        usual = supervisor._command

        def refused() -> Sequence[str]:
            raise BlockingIOError(11, "Resource temporarily unavailable")

        monkeypatch.setattr(supervisor, "_command", refused)
        await line(lines, "process_not_started", process=1)
        monkeypatch.setattr(supervisor, "_command", usual)
        await until_started(folder, 1, times=2)
