"""A mutant: a patch of `gateway/` that a tired engineer could write, and what has to notice it.

A patch file begins with a header, of which lines that begin with a blank go on with the field above:

    thought: why it looked right
    breaks: 2, 1: numbers of the invariants that it breaks, and in words what happens
    caught-by: tests/engine/test_commit_progress.py::test_nothing_is_lost
    caught-by: simulation 0-300

Each `caught-by` alone has to notice it: a test by failing, the simulation by breaking one of those invariants in one of
its seeds. The numbers are those of the simulation's ledger (`tests/simulation/ledger.py`).
"""

import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent

_FIELD = re.compile(r"(thought|breaks|caught-by): (.+)")
_BREAKS = re.compile(r"(\d+(?:, \d+)*): (.+)")
_SEEDS = re.compile(r"simulation (\d+)-(\d+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """One patch. `seeds` is empty where the simulation isn't said to notice it."""

    path: Path
    thought: str
    breaks: str
    invariants: frozenset[int]
    tests: tuple[str, ...]
    seeds: range

    @property
    def name(self) -> str:
        return self.path.stem

    @property
    def number(self) -> int:
        return int(self.name.partition("-")[0])

    @property
    def touched(self) -> frozenset[str]:
        """The files that it changes, from the root on."""
        sides = re.findall(r"^(?:---|\+\+\+) (?:[ab]/)?(\S+)", self.path.read_text(), re.MULTILINE)
        return frozenset(sides)

    def apply(self, root: Path, *, only_check: bool = False) -> str:
        """Change the tree at `root`; return why that can't be done, or nothing. A context that differs is a reason."""
        command = ["git", "apply", *(["--check"] if only_check else []), str(self.path)]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, timeout=10)
        return done.stderr.strip() if done.returncode else ""


def read(path: Path) -> Mutant:
    """Read a patch. Raises ValueError for a header that isn't one."""
    header, found, _ = path.read_text().partition("\ndiff ")
    fields = list(_fields(header)) if found else []
    values = {name: [value for field, value in fields if field == name] for name in ("thought", "breaks", "caught-by")}
    breaks = _BREAKS.fullmatch(values["breaks"][0]) if values["breaks"] else None
    if not values["thought"] or breaks is None or not values["caught-by"]:
        raise ValueError(f"{path.name}: expected a thought, what it breaks, and what catches it, got {header!r}")
    ranges = [seeds for value in values["caught-by"] if (seeds := _SEEDS.fullmatch(value))]
    return Mutant(
        path=path,
        thought=values["thought"][0],
        breaks=breaks[2],
        invariants=frozenset(map(int, breaks[1].split(", "))),
        tests=tuple(value for value in values["caught-by"] if not _SEEDS.fullmatch(value)),
        seeds=range(int(ranges[0][1]), int(ranges[0][2]) + 1) if ranges else range(0),
    )


def all_mutants() -> Sequence[Mutant]:
    """Return all there are, by their numbers."""
    return [read(path) for path in sorted(HERE.glob("*.patch"))]


def _fields(header: str) -> Iterator[tuple[str, str]]:
    lines = re.sub(r"\n +", " ", header).splitlines()
    for line in lines:
        field = _FIELD.fullmatch(line)
        if field is None:
            raise ValueError(f"mutant: expected a field, got {line!r}")
        yield field[1], field[2]
