"""Minimise a failing plan: drop everything that isn't needed to fail the same way.

Delta debugging (Zeller and Hildebrandt, 2002) over the plan's steps, then routes, destinations, sources and processes;
again, until nothing can be left out.
"""

from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import replace
from typing import TypeVar

from tests.simulation.plan import Plan, Step
from tests.simulation.world import simulate

T = TypeVar("T")
MAX_RUNS = 600
"""Runs that a shrinking may take: some minutes."""


def shrink(plan: Plan, *, tell: Callable[[Plan], None] = lambda _: None, max_runs: int = MAX_RUNS) -> Plan:
    """Return the smallest plan found that breaks the same invariant. `tell` hears of each smaller one."""
    first = simulate(plan).violation
    if first is None:
        raise ValueError(f"seed {plan.seed}: expected a run that fails, got one that doesn't")
    runs = 0

    def fails(candidate: Plan) -> bool:
        nonlocal runs
        runs += 1
        violation = simulate(candidate).violation
        return violation is not None and violation.invariant == first.invariant

    is_smaller = True
    while is_smaller and runs < max_runs:
        size = _size(plan)
        plan = _with_fewer_steps(plan, lambda candidate: runs < max_runs and fails(candidate))
        tell(plan)
        for simpler in _simpler(plan):
            if runs < max_runs and _size(simpler) < _size(plan) and fails(simpler):
                plan = simpler
                tell(plan)
        is_smaller = _size(plan) < size
    return plan


def _with_fewer_steps(plan: Plan, fails: Callable[[Plan], bool]) -> Plan:
    steps = _minimal(plan.steps, lambda kept: fails(replace(plan, steps=tuple(kept))))
    return replace(plan, steps=tuple(steps))


def _minimal(items: Sequence[T], fails: Callable[[Sequence[T]], bool]) -> Sequence[T]:
    """Return a part of the items that fails still, and from which no chunk can be left out."""
    chunk = max(1, len(items) // 2)
    while items:
        start, is_smaller = 0, False
        while start < len(items):
            rest = [*items[:start], *items[start + chunk :]]
            if fails(rest):
                items, is_smaller = rest, True
            else:
                start += chunk
        if chunk == 1 and not is_smaller:
            break
        chunk = max(1, chunk // 2)
    return items


def _simpler(plan: Plan) -> Iterator[Plan]:
    """Yield plans in which something that isn't a step is missing or as simple as can be."""
    for name in [route.name for route in plan.routes]:
        yield replace(plan, routes=tuple(route for route in plan.routes if route.name != name))
    for route in plan.routes:
        for to in route.to if len(route.to) > 1 else ():
            one = replace(route, to=tuple(name for name in route.to if name != to))
            yield replace(plan, routes=tuple(one if each.name == route.name else each for each in plan.routes))
    used = {name for route in plan.routes for name in route.to}
    kept = {name: limits for name, limits in plan.destinations.items() if name in used}
    yield replace(plan, destinations=kept, steps=tuple(step for step in plan.steps if _is_for(step, kept)))
    if plan.processes > 1:
        yield replace(plan, processes=plan.processes - 1)
    yield replace(plan, partitions=1)
    yield replace(plan, tier_partitions=1)
    yield replace(plan, nodes=1)
    yield replace(plan, horizon=max([step.at for step in plan.steps], default=0.0) + 1.0)


def _is_for(step: Step, destinations: Container[str]) -> bool:
    return step.do != "behave" or step.what["destination"] in destinations


def _size(plan: Plan) -> tuple[int, ...]:
    return (
        len(plan.steps),
        len(plan.routes),
        sum(len(route.to) for route in plan.routes),
        len(plan.destinations),
        plan.processes,
        plan.partitions + plan.tier_partitions + plan.nodes,
        round(plan.horizon),
    )
