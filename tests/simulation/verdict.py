"""The result of a seed, as a worker process reports it."""

import time
import traceback
import warnings
from typing import NamedTuple

from tests.simulation.plan import plan_of
from tests.simulation.world import simulate


class Verdict(NamedTuple):
    """The result of a seed. `invariant` is empty where all hold."""

    seed: int
    invariant: str
    told: str
    seconds: float
    hours: float


def judge(seed: int) -> Verdict:
    """Run a seed; a bug of the simulation is a failed seed, too."""
    ignore_what_is_killed()
    began = time.monotonic()
    try:
        outcome = simulate(plan_of(seed))
    except Exception as error:  # noqa: BLE001 - reported like a violation
        return Verdict(seed, f"the simulation itself: {error!r}", traceback.format_exc(), 0.0, 0.0)
    violation = outcome.violation
    name = "" if violation is None else violation.invariant
    return Verdict(seed, name, str(violation), time.monotonic() - began, outcome.seconds / 3600)


def ignore_what_is_killed() -> None:
    """A process that is killed cancels tasks before their first step: what they would have awaited never is."""
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited", category=RuntimeWarning)
