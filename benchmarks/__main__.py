"""`python -m benchmarks`: every figure of one run, as a table or with `--json`.

Compared processes take turns, A B A B, and the median of the rounds counts: other work on the machine then affects
both. The goals are for CPU time, not wall time, as the system accounts it to each process.
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace

import orjson
import uvloop
from rich.table import Table

from benchmarks.contest import FULL, QUICK
from benchmarks.figures import Figure
from benchmarks.measurements import SECTIONS, Bench
from benchmarks.run import benchmark_run, number, print_table
from benchmarks.scenarios import SCENARIOS
from dev.kafka import KafkaMissingError


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and events: under a minute")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of the table")
    parser.add_argument(
        "--only",
        metavar="NAME",
        action="append",
        choices=[*SECTIONS, *SCENARIOS],
        help=f"this section alone ({', '.join(SECTIONS)}), or a scenario that runs by its name alone: "
        f"{', '.join(SCENARIOS)}",
    )
    parser.add_argument("--backlog", metavar="EVENTS", type=int, help=f"of catching-up ({FULL.backlog:,})")
    parser.add_argument("--beside", metavar="PYTHON", default="", help="only compare with another environment's Python")
    options = parser.parse_args()
    plan = QUICK if options.quick else FULL
    if options.backlog is not None:
        plan = replace(plan, backlog=options.backlog)
    sections = ["interpreters"] if options.beside else options.only or list(SECTIONS)
    with benchmark_run() as run:
        bench = Bench(plan, run.folder, run.servers, run.progress, other=options.beside)
        figures = uvloop.run(bench.run(sections))
    if options.json:
        print(orjson.dumps({"machine": run.machine, "figures": figures}, option=orjson.OPT_INDENT_2).decode())
    else:
        _show(figures, run.machine, other=options.beside)
    return 0


def _show(figures: list[Figure], machine: Mapping[str, object], *, other: str) -> None:
    title = f"gateway, beside itself on {other}" if other else "gateway, beside the bare pipeline or itself"
    table = Table(title=title, title_justify="left")
    for heading in ("figure", "gateway", "beside", "ratio", "rounds", "goal", ""):
        table.add_column(heading, justify="left" if heading in {"figure", ""} else "right", no_wrap=True)
    section = ""
    for figure in figures:
        if section not in {"", figure.section}:
            table.add_section()
        section = figure.section
        is_met = figure.is_met
        table.add_row(
            figure.name,
            f"{number(figure.value)} {figure.unit}",
            "" if figure.reference is None else f"{number(figure.reference)} {figure.unit}",
            "" if figure.ratio is None else f"{figure.ratio:.2f}",
            "" if figure.spread is None else _spread(*figure.spread, is_ratio=figure.ratio is not None),
            figure.goal,
            "" if is_met is None else "[green]yes[/]" if is_met else "[red]no[/]",
        )
    print_table(table, machine)


def _spread(least: float, most: float, *, is_ratio: bool) -> str:
    return f"{least:.2f} to {most:.2f}" if is_ratio else f"{number(least)} to {number(most)}"


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KafkaMissingError as error:
        sys.exit(str(error))
