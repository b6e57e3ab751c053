"""What each benchmark that compares begins and ends with: a folder, a broker, progress, a table."""

import os
import platform
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from dev.kafka import Broker

WIDTH = 180
"""Columns of a table that is written to a file."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What it has."""

    folder: Path
    servers: str
    progress: Progress
    machine: Mapping[str, object]


@contextmanager
def benchmark_run() -> Iterator[Run]:
    """Have a broker meanwhile: that of GATEWAY_TEST_KAFKA, or one of its own.

    Raises KafkaMissingError if there is none and none can be started.
    """
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    machine = {
        "date": datetime.now(UTC).date().isoformat(),
        "cores": os.cpu_count(),
        "processor": _processor(),
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
    }
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gateway-bench-")))
        servers = os.environ.get("GATEWAY_TEST_KAFKA")
        if servers is None:
            broker = Broker.start()
            stack.callback(broker.stop)
            servers = broker.address
        console = Console(stderr=True)
        progress = stack.enter_context(Progress(*columns, console=console, transient=True, refresh_per_second=4))
        yield Run(folder=folder, servers=servers, progress=progress, machine=machine)


def print_table(table: Table, machine: Mapping[str, object]) -> None:
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    console.print(table)
    console.print(", ".join([f"{name.replace('_', ' ')} {value}" for name, value in machine.items()]), style="dim")


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}"


def _processor() -> str:
    """Return its name, as Linux knows it."""
    file = Path("/proc/cpuinfo")
    for line in file.read_text().splitlines() if file.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
