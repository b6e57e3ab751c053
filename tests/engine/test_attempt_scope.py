"""How an attempt is cut short: only by its scope, and no other cancellation is taken for that."""

import asyncio

import pytest

from gateway.engine.partition_tracker import AttemptScope
from tests.virtual_time import run


async def attempt(scopes: list[AttemptScope]) -> str:
    scope = AttemptScope()
    scopes.append(scope)
    try:
        await asyncio.sleep(10)
    except asyncio.CancelledError:
        if not scope.was_cut_short():
            raise
        return "cut short"
    finally:
        scope.close()
    return "answered"


@pytest.mark.parametrize(("after", "expected"), [(0.0, "cut short"), (9.9, "cut short"), (10.1, "answered")])
def test_an_attempt_ends_then_or_before(after: float, expected: str) -> None:
    async def scenario() -> None:
        scopes: list[AttemptScope] = []
        task = asyncio.create_task(attempt(scopes))
        await asyncio.sleep(0)
        scopes[0].cut_short(after)
        assert await task == expected
        await asyncio.sleep(5)  # what was still to come does nothing
        assert not task.cancelling()

    run(scenario())


@pytest.mark.parametrize("cuts", [0, 1])
def test_a_task_that_is_cancelled_is_not_cut_short(cuts: int) -> None:
    """Also where both come in one turn of the loop: the task has to end."""

    async def scenario() -> None:
        scopes: list[AttemptScope] = []
        task = asyncio.create_task(attempt(scopes))
        await asyncio.sleep(0)
        for _ in range(cuts):
            scopes[0].cut_short(0.0)
        asyncio.get_running_loop().call_soon(task.cancel)
        with pytest.raises(asyncio.CancelledError):
            await task

    run(scenario())


def test_the_next_attempt_of_the_same_task_is_made() -> None:
    async def both(scopes: list[AttemptScope]) -> list[str]:
        return [await attempt(scopes), await attempt(scopes)]

    async def scenario() -> None:
        scopes: list[AttemptScope] = []
        task = asyncio.create_task(both(scopes))
        await asyncio.sleep(0)
        scopes[0].cut_short(1.0)
        assert await task == ["cut short", "answered"]

    run(scenario())
