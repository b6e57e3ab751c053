"""Run the simulation: many seeds, or one of them to look at.

python -m tests.simulation --seeds 10000 [--first 0] [--keep-going]     two processes, a progress bar
python -m tests.simulation --seed 17 [--trace]                          one seed, and its trace
python -m tests.simulation --seed 17 --minimal [--out FILE]             the smallest plan that fails the same way
python -m tests.simulation --plan FILE [--trace] [--minimal]            a plan that was written
"""

import argparse
import multiprocessing
import sys
import time
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from tests.simulation.plan import Plan, decode, plan_of
from tests.simulation.shrink import shrink
from tests.simulation.verdict import Verdict, ignore_what_is_killed, judge
from tests.simulation.world import simulate

SLOW = 10.0
"""Seconds of a run that are worth a word."""


def main() -> int:
    """Return 0 if every invariant held, else 1."""
    arguments = _arguments().parse_args()
    ignore_what_is_killed()
    console = Console()
    if arguments.plan is not None:
        return _one(console, decode(arguments.plan.read_bytes()), arguments)
    if arguments.seed is not None:
        return _one(console, plan_of(arguments.seed), arguments)
    return _many(console, arguments)


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=1000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    parser.add_argument("--keep-going", action="store_true", help="don't stop at the first seed that fails")
    parser.add_argument("--seed", type=int, help="run this one alone")
    parser.add_argument("--plan", type=Path, help="run the plan in a file")
    parser.add_argument("--minimal", action="store_true", help="minimise the plan while it still fails")
    parser.add_argument("--trace", action="store_true", help="tell everything that happened")
    parser.add_argument("--out", type=Path, help="where to write the plan that was run")
    return parser


def _many(console: Console, arguments: argparse.Namespace) -> int:
    seeds = range(arguments.first, arguments.first + arguments.seeds)
    failures: list[Verdict] = []
    hours, began = 0.0, time.monotonic()
    columns = (
        TextColumn("seeds"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:.1f}/s, {task.fields[bad]} failed"),
        TimeRemainingColumn(),
    )
    # Each seed in a process that stays: spawned, so that nothing of this one is in it.
    with (
        multiprocessing.get_context("spawn").Pool(arguments.workers) as pool,
        Progress(*columns, console=console) as progress,
    ):
        bar = progress.add_task("seeds", total=len(seeds), rate=0.0, bad=0)
        for number, verdict in enumerate(pool.imap_unordered(judge, seeds, chunksize=4), 1):
            hours += verdict.hours
            if verdict.invariant:
                failures.append(verdict)
                progress.console.print(f"[red]seed {verdict.seed}[/]: {verdict.invariant}", highlight=False)
            elif verdict.seconds > SLOW:
                progress.console.print(f"seed {verdict.seed} took {verdict.seconds:.1f} s", highlight=False)
            progress.update(bar, completed=number, rate=number / (time.monotonic() - began), bad=len(failures))
            if failures and not arguments.keep_going:
                pool.terminate()
                break
    seconds = time.monotonic() - began
    console.print(f"{seeds.start}…{seeds.stop - 1}: {hours:,.0f} simulated hours in {seconds:,.0f} s", highlight=False)
    for invariant, count in Counter(verdict.invariant for verdict in failures).most_common():
        console.print(f"[red]{count:5}[/] of {invariant}", highlight=False)
    if not failures:
        return 0
    first = min(failures)
    console.print(f"\n[bold]seed {first.seed}[/], minimised:", highlight=False)
    arguments.minimal, arguments.trace = True, True
    return _one(console, plan_of(first.seed), arguments)


def _one(console: Console, plan: Plan, arguments: argparse.Namespace) -> int:
    if arguments.minimal and simulate(plan).violation is not None:
        with console.status("leaving out what it doesn't take") as status:
            plan = shrink(plan, tell=lambda smaller: status.update(f"{len(smaller.steps)} steps are left"))
    outcome = simulate(plan, traced=True)
    path = arguments.out
    if path is None and arguments.minimal:
        path = Path(f"simulation-{plan.seed}.json")
    if path is not None:
        path.write_bytes(plan.encode())
        console.print(
            f"plan: {path}  (again: python -m tests.simulation --plan {path} --trace)", highlight=False, soft_wrap=True
        )
    if arguments.trace:
        sys.stdout.write("\n".join([*outcome.trace, ""]))
    console.print(f"seed {plan.seed}, faults: {', '.join(plan.faults) or 'none'}", highlight=False)
    console.print(f"{outcome.seconds:,.1f} s, {outcome.attempts} attempts, digest {outcome.digest}", highlight=False)
    if outcome.violation is None:
        console.print("[green]every invariant holds[/]")
        return 0
    console.print(f"[red]{outcome.violation.invariant}[/]", highlight=False)
    sys.stdout.write(f"{outcome.violation}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
