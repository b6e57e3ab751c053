"""A `gateway listen` beside a gateway, as developers run them."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson

from tests.gateway_process import ROOT, GatewayProcess
from tests.interruptible import interruptible

RULES = """
version: 1
sources:
  odd:
    path: /odd
    verify: {scheme: token, header: X-Token, secrets: [a-secret-of-16-bytes]}
    type: body.type
  github: {path: /github, verify: {scheme: token, header: X-Token, secrets: [a-secret-of-16-bytes]}}
  shop:
    path: /shop
    verify: {scheme: token, header: X-Token, secrets: [a-secret-of-16-bytes]}
    redact: [body.card]
destinations:
  ci: {url: "http://127.0.0.1:1/"}
routes:
  - {name: all, from: [github, shop], to: ci}
"""


class Listener:
    """A `gateway listen` that is running; what it prints is read as it comes."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.lines: list[str] = []
        self.notes = ""
        self._new = asyncio.Event()

    @property
    def events(self) -> list[dict[str, Any]]:
        return [orjson.loads(line) for line in self.lines]

    async def read(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._read_lines())
            tasks.create_task(self._read_notes())

    async def _read_lines(self) -> None:
        assert self.process.stdout is not None
        while line := await self.process.stdout.readline():
            self.lines.append(line.decode())
            self._new.set()

    async def _read_notes(self) -> None:
        assert self.process.stderr is not None
        while piece := await self.process.stderr.read(65536):
            self.notes += piece.decode()
            self._new.set()

    async def has(self, count: int) -> list[dict[str, Any]]:
        """Wait until it has printed so many events, and return them."""
        await self.has_lines(count)
        return self.events

    async def has_lines(self, count: int) -> list[str]:
        async with asyncio.timeout(90):
            while len(self.lines) < count:
                await self._wait()
        return self.lines

    async def says(self, text: str, times: int = 1) -> None:
        """Wait until it has said something so often."""
        async with asyncio.timeout(60):
            while self.notes.count(text) < times:
                await self._wait()

    async def _wait(self) -> None:
        self._new.clear()
        assert self.process.returncode is None, self.notes
        try:
            async with asyncio.timeout(5):
                await self._new.wait()
        except TimeoutError:
            pass


async def start(*words: str, **environ: str) -> asyncio.subprocess.Process:
    with interruptible():
        return await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "gateway", "listen", *words),
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "200"} | environ,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=1 << 20,
        )


@asynccontextmanager
async def listening(*words: str, **environ: str) -> AsyncIterator[Listener]:
    """Run it, once it listens, until the end."""
    listener = Listener(await start(*words, **environ))
    async with asyncio.TaskGroup() as tasks:
        reading = tasks.create_task(listener.read())
        try:
            await listener.says("listening at")
            yield listener
        finally:
            if listener.process.returncode is None:
                listener.process.kill()
            await listener.process.wait()
            await reading


async def ended(*words: str, **environ: str) -> tuple[int | None, str, str]:
    """Run it to its end; return its code, and what it printed."""
    process = await start(*words, **environ)
    out, err = await asyncio.wait_for(process.communicate(), 40)
    return process.returncode, out.decode(), err.decode()


def a_gateway(folder: Path, *, access: str = "", index: bool = True) -> GatewayProcess:
    environ = {"GATEWAY_INDEX": str(folder / "index.db")} if index else {}
    if access:
        environ["GATEWAY_ACCESS"] = str(folder / "access.conf")
        (folder / "access.conf").write_text(access)
    return GatewayProcess(folder, rules=RULES, log=f"sqlite:///{folder / 'gateway.db'}", environ=environ)


async def send(
    gateway: GatewayProcess, body: bytes, *, source: str = "github", headers: tuple[tuple[str, str], ...] = ()
) -> str:
    """Send an event, and return its id."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    head = [
        f"POST /{source} HTTP/1.1",
        "Host: hooks.example",
        "X-Token: a-secret-of-16-bytes",
        f"Content-Length: {len(body)}",
        "Connection: close",
        *[f"{name}: {value}" for name, value in headers],
    ]
    writer.write("\r\n".join([*head, "\r\n"]).encode("latin-1") + body)
    answer = await reader.read()
    writer.close()
    assert b" 202 " in answer.partition(b"\r\n")[0], answer
    return str(orjson.loads(answer.partition(b"\r\n\r\n")[2])["id"])


def api_of(gateway: GatewayProcess) -> str:
    return f"http://127.0.0.1:{gateway.admin_port}"
