"""The measured processes: the gateway with its rules, and the bare pipeline."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import psutil

from benchmarks.payload import REPOSITORY, SECRET

ROOT = Path(__file__).resolve().parent.parent
START_TIMEOUT = 60.0
STOP_TIMEOUT = 35.0  # The gateway drains for 25 s at most.


class MeasuredProcess:
    """A process with an HTTP port; its output goes to a file. A context manager that ends it."""

    def __init__(self, name: str, command: Sequence[str], folder: Path, *, python: str = sys.executable) -> None:
        self._output = folder / f"{name}.out"
        with self._output.open("wb") as output:
            self._process = subprocess.Popen(
                [python, "-m", *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd=ROOT,
                env=os.environ | {"PYTHONWARNINGS": "ignore"},
            )
        self.name = name
        self._seen = psutil.Process(self._process.pid)
        self.port = 0

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
        """Raise RuntimeError with its last output if it ends, or doesn't listen within a minute."""
        until = time.monotonic() + START_TIMEOUT
        while time.monotonic() < until and self._process.poll() is None:
            for line in self._output.read_bytes().splitlines():
                if line.startswith(b"{") and b'"listening"' in line and line.endswith(b"}"):
                    fields = json.loads(line)
                    self.port = int((fields["ingress"] or ":0").rpartition(":")[2])
                    return
            time.sleep(0.02)
        last = self._output.read_text(errors="replace")[-2000:]
        raise RuntimeError(f"{self.name}: expected it to listen, got {last or 'no output'}")

    def has_written(self, event: str) -> bool:
        """Return whether there is a line of this event in its output."""
        return f'"event":"{event}"'.encode() in self._output.read_bytes()

    def cpu_seconds(self) -> float:
        """Return the CPU time of all its threads so far, user and system."""
        times = self._seen.cpu_times()
        return times.user + times.system

    def resident_bytes(self) -> int:
        resident: int = self._seen.memory_info().rss
        return resident


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
    python: str = sys.executable,
) -> MeasuredProcess:
    """Start a gateway. Each event has `fan_out` deliveries; gateways with the same `prefix` share topics and groups.

    `ordered` routes have `order: key`, beginning with the one that matches; each event has its own key.
    """
    rules = folder / f"{name}.yaml"
    rules.write_text(_rules(destination, routes, fan_out, ordered))
    options = {
        "--rules": str(rules),
        "--log": log,
        "--listen": "127.0.0.1:0",
        "--admin": "127.0.0.1:0",
        "--role": role,
        "--attempts": attempts,
        "--topic-prefix": f"{prefix or name}.",
    }
    command = ["gateway", "run", "--dev", *[f"{flag}={value}" for flag, value in options.items()]]
    return MeasuredProcess(name, command, folder, python=python)


def bare_pipeline(
    name: str, folder: Path, *, servers: str, topic: str, destination: int | None = None
) -> MeasuredProcess:
    command = ["benchmarks.bare_pipeline", "--kafka", servers, "--topic", topic]
    if destination is not None:
        command += ["--destination", f"http://127.0.0.1:{destination}/hooks/github"]
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
