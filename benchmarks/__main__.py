"""`python -m benchmarks`: every figure of one run, as a table or with `--json`.

Compared processes take turns, A B A B, and the median of the rounds counts: other work on the machine then affects
both. The goals are for CPU time, not wall time, as the system accounts it to each process.
"""

import argparse
import os
import platform
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import orjson
import uvloop
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.figures import Figure
from benchmarks.measurements import FULL, QUICK, SECTIONS, Bench
from dev.kafka import Broker, KafkaMissingError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and events: under a minute")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument("--only", metavar="NAME", action="append", choices=list(SECTIONS), help="this section alone")
    parser.add_argument("--beside", metavar="PYTHON", default="", help="only compare with another environment's Python")
    options = parser.parse_args()
    plan = QUICK if options.quick else FULL
    sections = ["interpreters"] if options.beside else options.only or list(SECTIONS)
    console = Console(stderr=True)
    load = os.getloadavg()[0]
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="gateway-bench-")))
        servers = os.environ.get("GATEWAY_TEST_KAFKA")
        if servers is None:
            try:
                broker = Broker.start()
            except KafkaMissingError as error:
                print(error, file=sys.stderr)
                return 1
            stack.callback(broker.stop)
            servers = broker.address
        progress = stack.enter_context(Progress(*columns, console=console, transient=True, refresh_per_second=4))
        bench = Bench(plan, folder, servers, progress, other=options.beside)
        figures = uvloop.run(bench.run(sections))
    machine: dict[str, object] = {
        "cores": os.cpu_count(),
        "load_before": round(load, 2),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
    }
    if options.json:
        print(orjson.dumps({"machine": machine, "figures": figures}, option=orjson.OPT_INDENT_2).decode())
    else:
        _show(figures, machine, other=options.beside)
    return 0


def _show(figures: list[Figure], machine: dict[str, object], *, other: str) -> None:
    title = f"gateway compared with itself on {other}" if other else "gateway compared with bare aiohttp + aiokafka"
    table = Table(title=title, title_justify="left")
    for heading in ("figure", "gateway", "other" if other else "bare", "ratio", "goal", ""):
        table.add_column(heading, justify="left" if heading in {"figure", ""} else "right", no_wrap=True)
    section = ""
    for figure in figures:
        if section not in {"", figure.section}:
            table.add_section()
        section = figure.section
        is_met = figure.is_met
        table.add_row(
            figure.name,
            f"{_number(figure.value)} {figure.unit}",
            "" if figure.reference is None else f"{_number(figure.reference)} {figure.unit}",
            "" if figure.ratio is None else f"{figure.ratio:.2f}",
            figure.goal,
            "" if is_met is None else "[green]yes[/]" if is_met else "[red]no[/]",
        )
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(table)
    console.print(", ".join(f"{name.replace('_', ' ')} {value}" for name, value in machine.items()), style="dim")


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}"


if __name__ == "__main__":
    sys.exit(main())
