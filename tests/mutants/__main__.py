"""Try every mutant, two at a time: `python -m tests.mutants [NUMBER…]`. Exits with 1 if one isn't noticed."""

import argparse
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tests.mutants.mutant import Mutant, all_mutants
from tests.mutants.trial import Verdict, judge, judge_the_original

WIDTH = 150
"""Columns of the table where nobody looks on at a terminal."""


def main() -> int:
    """Return 0 if everything that is said to notice a mutant does."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=(__doc__ or "").partition(":")[0])
    parser.add_argument("numbers", nargs="*", type=int, metavar="NUMBER", help="these alone")
    parser.add_argument("--at-once", type=int, default=2, help="how many at a time")
    arguments = parser.parse_args()
    console = Console() if sys.stdout.isatty() else Console(width=WIDTH)
    mutants = [each for each in all_mutants() if not arguments.numbers or each.number in arguments.numbers]
    if unknown := sorted(set(arguments.numbers) - {each.number for each in mutants}):
        parser.error(f"expected numbers of mutants, got {', '.join(map(str, unknown))}")
    began = time.monotonic()
    verdicts = _judge_all(console, mutants, arguments.at_once)
    console.print(_table(verdicts))
    tests = sorted({test for verdict in verdicts for test in verdict.mutant.tests})
    seeds = sorted({verdict.seed for verdict in verdicts if verdict.seed is not None})
    with console.status("trying the same without a mutant"):
        noise = judge_the_original(tests, seeds)
    by_simulation = sum(verdict.seed is not None for verdict in verdicts)
    bad = [verdict for verdict in verdicts if verdict.missed]
    for verdict in bad:
        for what in verdict.missed:
            console.print(f"[red]{verdict.mutant.name}[/]: {what}", highlight=False)
    if noise:
        console.print(f"[red]without a mutant[/]: {noise}", highlight=False)
    console.print(
        f"{len(mutants)} mutants, {len(mutants) - len(bad)} noticed, {by_simulation} of them by the simulation, "
        f"in {time.monotonic() - began:.0f} s",
        highlight=False,
    )
    return 1 if bad or noise else 0


def _judge_all(console: Console, mutants: Sequence[Mutant], at_once: int) -> Sequence[Verdict]:
    columns = TextColumn("mutants"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    verdicts: list[Verdict] = []
    with Progress(*columns, console=console) as progress, ThreadPoolExecutor(at_once) as pool:
        bar = progress.add_task("mutants", total=len(mutants))
        for future in as_completed([pool.submit(judge, mutant) for mutant in mutants]):
            verdicts.append(future.result())
            progress.advance(bar)
    return sorted(verdicts, key=lambda verdict: verdict.mutant.path)


def _table(verdicts: Sequence[Verdict]) -> Table:
    table = Table("mutant", "breaks", "noticed by", "s", box=None, pad_edge=False)
    for verdict in verdicts:
        mutant = verdict.mutant
        told = [_short(what) for what in verdict.caught] + [f"[red]{_short(what)}[/]" for what in verdict.missed]
        numbers = ", ".join(map(str, sorted(mutant.invariants)))
        table.add_row(mutant.name, numbers, "\n".join(told), f"{verdict.seconds:.0f}")
    return table


def _short(what: str) -> str:
    return what.rpartition("/")[2].replace("[", r"\[")


if __name__ == "__main__":
    sys.exit(main())
