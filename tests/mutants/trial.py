"""Try a mutant: apply it to a copy of the tree, and see what notices it there."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.mutants.mutant import ROOT, Mutant

PATIENCE = 300.0
"""Seconds for one test, or for all the seeds of a mutant: a thousand take 90 s where nothing else runs."""
TEST_TIMEOUT = 20
"""Seconds after which a test counts as one that hangs."""
AT_ONCE = 30
"""Tests that are run together without a mutant; by themselves, as with one, where they don't all pass."""
FUNCTION_ONLY = ("-o", "timeout_func_only=true")
"""Three brokers take as long to start as a test may take."""

_TESTS_FAILED = 1  # pytest's; whatever else it exits with (no such test, an import that fails) says nothing of a mutant

_UNKNOWN = ("NameError: ", "UnboundLocalError: ", "AttributeError: ")
"""What Python says of a name that a patch still uses although it is gone: that notices any patch of this place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What came of a mutant: what noticed it, and what didn't as it should have. `seed` is where the simulation did."""

    mutant: Mutant
    caught: tuple[str, ...]
    missed: tuple[str, ...]
    seed: int | None
    seconds: float


def judge(mutant: Mutant) -> Verdict:
    """Try everything that is said to catch a mutant; each has to."""
    began = time.monotonic()
    caught: list[str] = []
    missed: list[str] = []
    seed: int | None = None
    with copied() as tree:
        problem = mutant.apply(tree)
        if problem:
            missed.append(f"doesn't apply: {problem}")
        else:
            for test in mutant.tests:
                why = passes(tree, [test])
                (missed if why != FAILED else caught).append(test if why == FAILED else f"{test} {why}")
            if mutant.seeds:
                found = hunt(tree, mutant.seeds, mutant.invariants)
                if match := re.fullmatch(r"seed (\d+): .+", found):
                    seed = int(match[1])
                (missed if seed is None else caught).append(f"simulation {found}")
    seconds = time.monotonic() - began
    return Verdict(mutant=mutant, caught=tuple(caught), missed=tuple(missed), seed=seed, seconds=seconds)


def judge_the_original(tests: Sequence[str], seeds: Iterable[int]) -> str:
    """Try in a copy without a mutant what noticed one; return what fails there, too, and so has noticed nothing."""
    with copied() as tree:
        suspects = [
            test
            for first in range(0, len(tests), AT_ONCE)
            if passes(tree, batch := tests[first : first + AT_ONCE]) != PASSED
            for test in batch
        ]
        bad = [f"{test} {why}" for test in suspects if (why := passes(tree, [test])) != PASSED]
        broken = hunt(tree, seeds, ())
    return ", ".join([*bad, *([broken] if broken != PASSED else [])])


FAILED, PASSED, HUNG = "fails", "passes", "takes too long"


def passes(tree: Path, tests: Sequence[str]) -> str:
    """Return what becomes of tests in a tree; something else than `FAILED` or `PASSED` where that says nothing of it.

    They can't be run, or fail because the gateway uses a name that it doesn't have.
    """
    command = (
        "-m",
        "pytest",
        "-q",
        "-x",
        "--no-header",
        "-p",
        "no:cacheprovider",
        "--tb=native",
        f"--timeout={TEST_TIMEOUT}",
        *FUNCTION_ONLY,
        *tests,
    )
    code, output = _run(tree, command)
    if code is None or "Timeout (>" in output:
        return HUNG
    if code not in (0, _TESTS_FAILED):
        return f"can't be run: {output[-300:]}"
    if code and (unknown := unknown_name(output, tree / "gateway")):
        return f"fails of a patch that doesn't fit: {unknown}"
    return FAILED if code else PASSED


def unknown_name(output: str, folder: Path) -> str:
    """Return which name code of a folder has used in vain, by the tracebacks in an output; nothing if none did."""
    place = ""
    for line in output.splitlines():
        text = line.strip(" |")  # the margin of an exception group
        if text.startswith('File "'):
            place = text
        elif text.startswith(_UNKNOWN) and place.startswith(f'File "{folder}/'):
            return text
    return ""


def hunt(tree: Path, seeds: Iterable[int], invariants: Iterable[int]) -> str:
    """Return the first of the seeds in which the simulation breaks one of the invariants, with its name."""
    wanted = ",".join(map(str, seeds))
    if not wanted:
        return PASSED
    code, output = _run(tree, ("-m", "tests.mutants.hunt", wanted, *map(str, sorted(invariants))))
    if code is None:
        return HUNG
    return PASSED if code == 0 else output.strip()[-300:]


@contextmanager
def copied() -> Iterator[Path]:
    """Make a copy of the tree, from which Python imports instead of from ours."""
    with TemporaryDirectory(prefix="mutant-") as directory:
        tree = Path(directory) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".*"))
        code, output = _run(tree, ("-c", "import gateway; print(gateway.__file__)"))
        if code != 0 or not Path(output.strip()).is_relative_to(tree):
            raise RuntimeError(f"gateway: expected to be imported from {tree}, got {output.strip()}")
        yield tree


def _run(tree: Path, arguments: Sequence[str]) -> tuple[int | None, str]:
    """Run Python in a tree; return its exit code, None if it took too long, and what it said."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that what a test has started ends with it
    )
    try:
        output, _ = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return None, ""
    return process.returncode, output
