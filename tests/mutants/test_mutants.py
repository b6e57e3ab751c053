"""The mutants fit the code as it is; `make mutants` tries them."""

import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pytest

from tests.mutants.mutant import ROOT, Mutant, all_mutants, read
from tests.mutants.trial import FAILED, copied, passes

MUTANTS = all_mutants()
NAMES = [mutant.name for mutant in MUTANTS]


@pytest.mark.parametrize("mutant", MUTANTS, ids=NAMES)
def test_a_mutant_applies_to_the_engine_as_it_is(mutant: Mutant) -> None:
    assert mutant.touched
    assert all(file.startswith("gateway/") for file in mutant.touched)
    assert not mutant.apply(ROOT, only_check=True)


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


def test_a_trial_runs_in_a_copy() -> None:
    with copied() as tree:
        module = tree / "gateway/model.py"
        module.write_text(module.read_text() + "\n\ndef event_id(*_):\n    return EventId('evt_1')\n")
        assert passes(tree, ["tests/test_model.py"]) == FAILED
