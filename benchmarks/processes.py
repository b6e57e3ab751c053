"""The measured processes: the gateway with its rules, the bare pipeline, and others (`benchmarks/peers/`)."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Protocol, Self

import psutil

from benchmarks.payload import REPOSITORY, SECRET

ROOT = Path(__file__).resolve().parent.parent
START_TIMEOUT = 300.0  # With 100,000 routes it takes 40 s of processor time.
STOP_TIMEOUT = 35.0  # The gateway drains for 25 s at most.


class Measured(Protocol):
    """What takes events at a port: one process or several. A context manager that ends it."""

    name: str

    @property
    def port(self) -> int: ...
    def __enter__(self) -> Self: ...
    def __exit__(self, *_: object) -> None: ...
    def wait_until_it_listens(self) -> None: ...
    def cpu_seconds(self) -> float: ...
    def resident_bytes(self) -> int: ...


class MeasuredProcess:
    """A process with an HTTP port; its output goes to a file.

    It tells its port in a line of JSON, `{"event": "listening", "ingress": URL}`, unless the port is given; it may take
    a line with the event `serves` until it is complete. Its children count as parts of it.
    """

    def __init__(
        self, name: str, command: Sequence[str], folder: Path, *, port: int = 0, serves: str = "listening"
    ) -> None:
        self._serves = serves
        self._output = folder / f"{name}.out"
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=ROOT,
                env=os.environ | {"PYTHONWARNINGS": "ignore"},
            )
        self.name = name
        self._seen = psutil.Process(self._process.pid)
        self.port = port

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def wait_until_it_listens(self) -> None:
        """Raise RuntimeError with its last output if it ends, or doesn't listen in time."""
        until = time.monotonic() + START_TIMEOUT
        while time.monotonic() < until and self._process.poll() is None:
            if self.port:
                with suppress(OSError):
                    socket.create_connection(("127.0.0.1", self.port), timeout=1.0).close()
                    return
            for line in self._output.read_bytes().splitlines():
                if line.startswith(b"{") and b'"listening"' in line and line.endswith(b"}"):
                    fields = json.loads(line)
                    if self.has_written(self._serves):
                        self.port = int((fields["ingress"] or ":0").rpartition(":")[2])
                        return
            time.sleep(0.02)
        last = self._output.read_text(errors="replace")[-2000:]
        raise RuntimeError(f"{self.name}: expected it to listen, got {last or 'no output'}")

    def has_written(self, event: str) -> bool:
        """Return whether there is a line of this event in its output."""
        return re.search(rf'"event": ?"{event}"'.encode(), self._output.read_bytes()) is not None

    def cpu_seconds(self) -> float:
        """Return the CPU time of all its threads so far, user and system."""
        times = [each.cpu_times() for each in (self._seen, *self._seen.children())]
        return sum([each.user + each.system for each in times])

    def resident_bytes(self) -> int:
        resident: int = self._seen.memory_info().rss
        return resident

    def descriptors(self) -> int:
        """Return how many files and connections it has open."""
        count: int = self._seen.num_fds()
        return count


class Together:
    """Processes that do one thing together. Events are sent to the first."""

    def __init__(self, name: str, processes: Sequence[MeasuredProcess]) -> None:
        self.name = name
        self._processes = processes
        self._stack = ExitStack()
        for process in reversed(processes):  # the first is ended first
            self._stack.enter_context(process)

    @property
    def port(self) -> int:
        return self._processes[0].port

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def wait_until_it_listens(self) -> None:
        for process in self._processes:
            process.wait_until_it_listens()

    def cpu_seconds(self) -> float:
        return sum([process.cpu_seconds() for process in self._processes])

    def resident_bytes(self) -> int:
        return sum([process.resident_bytes() for process in self._processes])


def gateway(
    name: str,
    folder: Path,
    *,
    log: str,
    destination: int,
    role: str = "all",
    routes: int = 10,
    fan_out: int = 1,
    ordered: int = 0,
    attempts: str = "failures",
    prefix: str | None = None,
    processes: int = 1,
    python: str = sys.executable,
    rules: str = "",
) -> MeasuredProcess:
    """Start a gateway. Each event has `fan_out` deliveries; gateways with the same `prefix` share topics and groups.

    `ordered` routes have `order: key`, beginning with the one that matches; each event has its own key. `rules` of the
    caller's own replace all that.
    """
    file = folder / f"{name}.yaml"
    file.write_text(rules or _rules(destination, routes, fan_out, ordered))
    options = {
        "--rules": str(file),
        "--log": log,
        "--listen": "127.0.0.1:0",
        "--admin": "127.0.0.1:0",
        "--role": role,
        "--attempts": attempts,
        "--topic-prefix": f"{prefix or name}.",
        "--processes": str(processes),
    }
    command = [python, "-m", "gateway", "run", "--dev", *[f"{flag}={value}" for flag, value in options.items()]]
    serves = "listening" if processes == 1 else "processes_started"
    return MeasuredProcess(name, command, folder, serves=serves)


def bare_pipeline(
    name: str, folder: Path, *, servers: str, topic: str, destination: str | None = None
) -> MeasuredProcess:
    command = [sys.executable, "-m", "benchmarks.bare_pipeline", "--kafka", servers, "--topic", topic]
    if destination is not None:
        command += ["--destination", destination]
    return MeasuredProcess(name, command, folder)


def _rules(destination: int, routes: int, fan_out: int, ordered: int) -> str:
    """Return rules with one matching route: those of a company with ten repositories per team."""
    lines = ["version: 1", "sources:", "  github:", f'    verify: {{scheme: github, secrets: ["{SECRET}"]}}']
    if ordered:
        lines.append("    key: headers['x-github-delivery']")
    lines.append("destinations:")
    lines += [
        f"  team-{team}: {{url: 'http://127.0.0.1:{destination}/hooks/{team}'}}" for team in range((routes + 9) // 10)
    ]
    copies = [f"copy-{copy}" for copy in range(1, fan_out)]
    lines += [f"  {copy}: {{url: 'http://127.0.0.1:{destination}/hooks/{copy}'}}" for copy in copies]
    lines.append("routes:")
    for number in range(routes):
        repository = REPOSITORY if number == routes // 2 else f"acme/service-{number}"
        match = f"{{type: push, body.repository.full_name: {repository}}}"
        to = ", ".join([f"team-{number // 10}", *copies])
        order = ", order: key" if (number - routes // 2) % routes < ordered else ""
        lines.append(f"  - {{name: build-{number}, from: github, match: {match}, to: [{to}]{order}}}")
    return "\n".join(lines) + "\n"
