"""A gateway as operators run it: a process of its own, on real ports, ended by real signals.

    async with GatewayProcess(folder, rules=RULES, log="sqlite:///…") as gateway:
        gateway.kill()
        await gateway.start()         # on the same ports

Its log lines are in a file beside the rules; the telling ones of them stand in the error where something fails.
"""

import asyncio
import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import orjson
from prometheus_client.parser import text_string_to_metric_families

COMMAND = (sys.executable, "-m", "gateway", "run")
START_TIMEOUT = 20.0
STOP_TIMEOUT = 30.0
"""What `run` promises: a drain of 25 s, and a little more to leave."""
ROOT = Path(__file__).parent.parent
NO_AUTHORITIES = {"SSL_CERT_FILE": os.devnull}
"""Each gateway reads those of the system three times, a tenth of the processor time of its start: none is needed."""


class GatewayProcess:
    """One process, on ports that it keeps over `kill` and `start`. `beside` is another one, whose port it shares.

    `through` is a command that ends by executing the one it is followed by: it prepares what the gateway runs in.
    `command` is the gateway's own, of another version perhaps, and is run in `home`. Without `is_dev` it is as in
    production: somebody else makes the topics.
    """

    def __init__(
        self,
        folder: Path,
        *,
        rules: str,
        log: str,
        prefix: str = "gateway.",
        environ: Mapping[str, str] | None = None,
        beside: "GatewayProcess | None" = None,
        through: Sequence[str] = (),
        command: Sequence[str] = COMMAND,
        home: Path = ROOT,
        is_dev: bool = True,
    ) -> None:
        self.port, self.admin_port = free_ports(2)
        if beside is not None:
            self.port = beside.port
        self.rules = folder / "routes.yaml"
        self.rules.write_text(rules)
        self.output = folder / f"gateway-{self.admin_port}.log"
        self._command = (
            *through,
            *command,
            f"--rules={self.rules}",
            f"--log={log}",
            f"--listen=127.0.0.1:{self.port}",
            f"--admin=127.0.0.1:{self.admin_port}",
            f"--topic-prefix={prefix}",
            *(("--dev",) if is_dev else ()),
        )
        self._home = home
        self._environ = {**os.environ, **NO_AUTHORITIES, **(environ or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self._began_at = 0

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    async def start(self) -> Self:
        """Start, and return once it listens. Raises AssertionError, with its last lines, when it doesn't."""
        self.spawn()
        await self.line("listening", timeout=START_TIMEOUT)
        return self

    def spawn(self) -> None:
        """Start, and wait for nothing."""
        with self.output.open("ab") as output:
            self._began_at = output.tell()
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=self._environ,
                cwd=self._home,
            )

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """End it as a crash does, at once."""
        self.signal(signal.SIGKILL)
        assert self._process is not None
        self._process.wait()

    async def stop(self) -> int:
        """Ask it to stop, and return its exit code."""
        self.signal(signal.SIGTERM)
        return await self.ended(timeout=STOP_TIMEOUT)

    async def ended(self, *, timeout: float) -> int:
        """Wait for its end, and return its exit code."""
        assert self._process is not None
        until = time.monotonic() + timeout
        while self._process.poll() is None:
            assert time.monotonic() < until, f"expected an end within {timeout:g} s\n{self.story()}"
            await asyncio.sleep(0.02)
        return self._process.returncode

    async def ready(self, *, timeout: float = START_TIMEOUT) -> None:
        """Wait until /readyz says so, as an orchestrator does."""
        until = time.monotonic() + timeout
        while b" 200 " not in (answer := await self._get("/readyz")).partition(b"\r\n")[0]:
            assert time.monotonic() < until, f"expected to be ready within {timeout:g} s, got {answer!r}"
            await asyncio.sleep(0.05)

    async def readiness(self) -> dict[str, Any]:
        """Return what /readyz says."""
        found: dict[str, Any] = orjson.loads((await self._get("/readyz")).partition(b"\r\n\r\n")[2])
        return found

    async def status(self) -> dict[str, Any]:
        """Return what /status says."""
        found: dict[str, Any] = orjson.loads((await self._get("/status")).partition(b"\r\n\r\n")[2])
        return found

    async def __aenter__(self) -> Self:
        try:
            return await self.start()
        except BaseException:
            self._end()
            raise

    async def __aexit__(self, *_: object) -> None:
        self._end()

    async def line(self, event: str, *, timeout: float = 10.0) -> dict[str, Any]:
        """Wait for a line of this process's log, and return it."""
        until = time.monotonic() + timeout
        while True:
            found = self.lines(event)
            if found:
                return found[-1]
            assert self.is_running, f"expected a line {event}, got an end\n{self.story()}"
            assert time.monotonic() < until, f"expected a line {event} within {timeout:g} s\n{self.story()}"
            await asyncio.sleep(0.02)

    def lines(self, event: str) -> list[dict[str, Any]]:
        """Return the lines of an event since the last start."""
        mark = f'"event":"{event}"'.encode()
        return [orjson.loads(line) for line in self._output().splitlines() if mark in line and line.endswith(b"}")]

    def story(self) -> str:
        """Return what a failure is told with: what is out of the ordinary, and how it ended."""
        ordinary = (b'"request_finished"', b'"delivery_finished"')
        lines = [line for line in self._output().splitlines() if not any(mark in line for mark in ordinary)]
        state = "running" if self.is_running else f"ended with {self._process and self._process.returncode}"
        return b"\n".join(lines[-40:]).decode(errors="replace") + f"\n[{state}]"

    async def metrics(self) -> "Metrics":
        """Scrape it, and read what it says."""
        return Metrics(await self.scrape())

    async def scrape(self) -> str:
        """Return the text of its metrics: of thousands of names, which take seconds to read."""
        return (await self._get("/metrics")).partition(b"\r\n\r\n")[2].decode()

    async def _get(self, path: str) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.admin_port)
        try:
            writer.write(f"GET {path} HTTP/1.0\r\n\r\n".encode())
            return await reader.read()
        finally:
            writer.close()

    async def until(self, name: str, value: float, *, timeout: float = 15.0, **labels: str) -> None:
        """Wait until the series of a metric that have these labels add up to a value."""
        until = time.monotonic() + timeout
        while (found := (await self.metrics()).sum(name, **labels)) != value:
            assert time.monotonic() < until, f"expected {name} {labels} to become {value}, got {found}\n{self.story()}"
            await asyncio.sleep(0.05)

    def _output(self) -> bytes:
        with self.output.open("rb") as output:
            output.seek(self._began_at)
            return output.read()

    def _end(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.kill()


class Metrics:
    """What one scrape said."""

    def __init__(self, text: str) -> None:
        self._samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]

    def sum(self, name: str, **labels: str) -> float:
        """Add up the series of a name that have these labels."""
        return sum(
            sample.value for sample in self._samples if sample.name == name and labels.items() <= sample.labels.items()
        )


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on, below those that systems give to connections, and none twice."""
    found: list[int] = []
    while len(found) < count:
        port = next(_PORTS)
        with socket.socket() as one, suppress(OSError):
            one.bind(("127.0.0.1", port))
            found.append(port)
    return found


def _ports() -> Iterator[int]:
    """Yield ports of this process's share, of which each worker of pytest-xdist has one."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    share = range(20_000 + worker % 8 * 1_500, 20_000 + (worker % 8 + 1) * 1_500)
    yield from itertools.islice(itertools.cycle(share), random.SystemRandom().randrange(len(share)), None)


_PORTS = _ports()
