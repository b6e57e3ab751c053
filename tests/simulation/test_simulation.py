"""Forty seeds in every `make test`, others with each commit; `make simulate` runs thousands."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.run_seeds import drawn
from tests.simulation.plan import decode, plan_of
from tests.simulation.world import simulate

pytestmark = pytest.mark.filterwarnings(
    # A process that is killed cancels tasks before their first step: what they would have awaited never is.
    "ignore:coroutine .* was never awaited:RuntimeWarning"
)

SEEDS = 40
CHUNK = 20


@pytest.mark.parametrize("chunk", range(SEEDS // CHUNK))
def test_every_invariant_holds(chunk: int) -> None:
    first = drawn() + chunk * CHUNK
    for seed in range(first, first + CHUNK):
        outcome = simulate(plan_of(seed))
        assert outcome.violation is None, f"seed {seed}: {outcome.violation}"


@pytest.mark.parametrize("seed", [3, 19, 56])
def test_a_seed_says_everything(seed: int) -> None:
    assert simulate(plan_of(seed), traced=True).trace == simulate(plan_of(seed), traced=True).trace


def test_the_order_of_sets_changes_nothing() -> None:
    traces = {
        subprocess.run(
            [sys.executable, "-m", "tests.simulation", "--seed", "19", "--trace"],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            cwd=Path(__file__).parents[2],
            capture_output=True,
            check=False,
            timeout=50,
        ).stdout
        for hash_seed in ("1", "2")
    }
    assert len(traces) == 1
    assert len(traces.pop()) > 1000


def test_a_plan_survives_its_encoding() -> None:
    for seed in range(20):
        plan = plan_of(seed)
        assert decode(plan.encode()) == plan
