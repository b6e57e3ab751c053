"""Which of the rotated tests a run takes."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest

from tests.conftest import out_of_turn
from tests.run_seeds import VARIABLE, drawn


@dataclass(eq=False)
class Item:
    """A collected test, as far as the draw sees one."""

    module: str
    name: str
    rotated: pytest.Mark | None = None
    originalname: str = "test_it"

    @property
    def path(self) -> Path:
        return Path(self.module)

    def get_closest_marker(self, name: str) -> pytest.Mark | None:
        return self.rotated if name == "rotated" else None


@pytest.fixture
def draws(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return what the runs of a hundred commits take of some items."""

    def take(items: list[Item]) -> list[set[Item]]:
        taken = []
        for commit in range(100):
            monkeypatch.setenv(VARIABLE, str(1000 * commit))
            drawn.cache_clear()
            taken.append(set(items) - cast("set[Item]", out_of_turn(cast("list[pytest.Item]", items))))
        return taken

    yield take
    drawn.cache_clear()


def mark(**given: Any) -> pytest.Mark:
    made: pytest.Mark = pytest.mark.rotated(**given).mark
    return made


def test_a_run_takes_a_share_of_a_function_in_each_module_and_other_runs_the_others(draws: Any) -> None:
    items = [Item(module, f"test_it[{n}]", mark()) for module in ("a.py", "b.py") for n in range(6)]
    taken = draws(items)
    assert {sum(item.module == module for item in run) for run in taken for module in ("a.py", "b.py")} == {2}
    assert set.union(*taken) == set(items)
    assert taken == draws(items), "the same commits, the same draws"


def test_a_group_is_shared_by_modules(draws: Any) -> None:
    items = [Item(f"{n}.py", "test_it", mark(share=1 / 4, group="slow")) for n in range(8)]
    taken = draws(items)
    assert {len(run) for run in taken} == {2}
    assert set.union(*taken) == set(items)


def test_of_one_there_is_always_one_and_what_is_not_rotated_is_always_taken(draws: Any) -> None:
    items = [Item("a.py", "test_it", mark(share=1 / 8)), Item("a.py", "test_that", originalname="test_that")]
    assert all(run == set(items) for run in draws(items))
