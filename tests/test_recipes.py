"""docs/recipes: each file is right, strictly, does what its tests say, and has a test of every route."""

from pathlib import Path

import pytest

from gateway.ops.check_reports import without_allowed
from gateway.ops.rule_format import formatted
from gateway.ops.rule_tests import run_test, untested_routes
from gateway.rules.load import check_rules
from gateway.rules.rule_tests import read_tests

FOLDER = Path(__file__).parents[1] / "docs/recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=[path.stem for path in RECIPES])
def test_a_recipe_is_right_and_tested(path: Path) -> None:
    rules, problems = check_rules(path, environ={}, lints=True)
    assert without_allowed(problems)[0] == []
    assert rules is not None
    tests, wrong = read_tests([path], [])
    assert wrong == []
    results = [run_test(rules, test, {}, now=1_800_000_000.0) for test in tests]
    assert [result.differences for result in results] == [()] * len(results)
    assert untested_routes(rules, results) == []
    assert formatted(path) == path.read_text()


def test_the_index_has_every_recipe() -> None:
    text = (FOLDER / "README.md").read_text()
    assert [path.name for path in RECIPES if f"[{path.name}]({path.name})" not in text] == []
    assert text.count(".yaml](") == len(RECIPES)
