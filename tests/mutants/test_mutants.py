"""The mutants fit the code as it is; `make mutants` tries them."""

import re
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest

from tests.mutants.mutant import ROOT, Mutant, all_mutants, read
from tests.mutants.trial import FAILED, copied, passes, unknown_name

MUTANTS = all_mutants()
NAMES = [mutant.name for mutant in MUTANTS]


@pytest.mark.parametrize("mutant", MUTANTS, ids=NAMES)
def test_a_mutant_applies_to_the_engine_as_it_is(mutant: Mutant) -> None:
    assert mutant.touched
    assert all(file.startswith("gateway/") for file in mutant.touched)
    assert not mutant.apply(ROOT, only_check=True)


def test_a_mutant_uses_only_names_that_there_are(tmp_path: Path) -> None:
    """Else Python notices it, and what is said to catch it may be unable to."""
    for mutant in MUTANTS:
        tree = tmp_path / mutant.name
        for file in mutant.touched:
            (tree / file).parent.mkdir(parents=True, exist_ok=True)
            (tree / file).write_bytes((ROOT / file).read_bytes())
        mutant.apply(tree)  # where that can't be done, the test above says so
    rules = "--select=F821,F823"  # names that aren't defined, and local ones that are used before
    command = ["-m", "ruff", "check", "--isolated", "--no-cache", "--output-format=concise", rules, "."]
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("mutant", MUTANTS, ids=NAMES)
def test_each_catcher_of_a_mutant_exists(mutant: Mutant) -> None:
    for test in mutant.tests:
        file, *names = test.split("::")
        text = (ROOT / file).read_text()
        assert names, test
        for name in names:
            assert re.search(rf"^\s*(?:(?:async )?def|class) {name.partition('[')[0]}\b", text, re.MULTILINE), test


@pytest.mark.parametrize("mutant", MUTANTS, ids=NAMES)
def test_a_mutants_catchers_are_named_with_its_guarantees(mutant: Mutant) -> None:
    """Else the tests that are named there don't hold the guarantee."""
    named = set().union(*[guarantees().get(number, set()) for number in mutant.invariants])
    noticing = {test.partition("[")[0] for test in mutant.tests} | ({"simulation"} if mutant.seeds else set())
    assert named & noticing, (
        f"expected one of {sorted(noticing)} with {sorted(mutant.invariants)} in docs/guarantees.md"
    )


@cache
def guarantees() -> Mapping[int, set[str]]:
    """Return the tests that docs/guarantees.md names with each of its numbers."""
    text = (ROOT / "docs/guarantees.md").read_text().partition("## Invariants")[2]
    found: dict[int, set[str]] = {}
    for item in re.split(r"^(?=\d+\. )", text, flags=re.MULTILINE)[1:]:
        names = found[int(item.partition(".")[0])] = set[str]()
        file = ""
        for name in re.findall(r"`([^`]+)`", item):
            path, is_test, test = name.partition("::")
            if is_test:
                file = path or file
                names.add(f"{file}::{test}")
            elif name.startswith("simulation: "):
                names.add("simulation")
    return found


def test_mutants_are_numbered() -> None:
    assert [mutant.number for mutant in MUTANTS] == list(range(1, len(MUTANTS) + 1))
    assert len({mutant.name[4:] for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("thought: so\nbreaks: 1: all\n", "expected a thought, what it breaks, and what catches it"),
        ("thought: so\nbreaks: all\ncaught-by: simulation 0-9\n", "expected a thought"),
        ("thought: so\nand: more\n", "expected a field, got 'and: more'"),
    ],
)
def test_a_header_says_everything(tmp_path: Path, header: str, message: str) -> None:
    path = tmp_path / "01-incomplete.patch"
    path.write_text(f"{header}diff --git a/gateway/model.py b/gateway/model.py\n")
    with pytest.raises(ValueError, match=message):
        read(path)


def test_a_trial_runs_in_a_copy_and_a_name_that_is_gone_has_noticed_nothing() -> None:
    with copied() as tree:
        module = tree / "gateway/model.py"
        original = module.read_text()
        module.write_text(original + "\n\ndef event_id(*_):\n    return EventId('evt_1')\n")
        assert passes(tree, ["tests/test_model.py"]) == FAILED
        module.write_text(original + "\n\ndef event_id(*_):\n    return EventId.of('evt_1')\n")
        assert passes(tree, ["tests/test_model.py"]).endswith("AttributeError: 'NewType' object has no attribute 'of'")


@pytest.mark.parametrize(
    ("output", "found"),
    [
        ("  File \"/tree/gateway/a.py\", line 3, in f\n    x.y\n    ^^^\nNameError: name 'x'", "NameError: name 'x'"),
        ('  | File "/tree/gateway/a.py", line 3, in f\n  |   x\n  | AttributeError: of x', "AttributeError: of x"),
        ('  File "/tree/gateway/a.py", line 3, in f\n  File "/tree/tests/a.py", line 4, in g\nNameError: name', ""),
        ('  File "/tree/gateway/a.py", line 3, in f\nValueError: AttributeError: x', ""),
    ],
)
def test_names_that_are_gone_are_found_in_tracebacks(output: str, found: str) -> None:
    assert unknown_name(output, Path("/tree/gateway")) == found
