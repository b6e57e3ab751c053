"""A log that is opened while its process is already there."""

import asyncio

import pytest

from gateway.log.deferred import OPEN_INTERVAL, tried_until_open
from gateway.model import LogUnavailableError, UsageError
from tests.virtual_time import run


class Opening:
    """Fails some times, then opens after `seconds`."""

    def __init__(self, *failures: Exception, seconds: float = 0.0) -> None:
        self._failures = list(failures)
        self._seconds = seconds
        self.tries = 0
        self.was_cancelled = False

    async def __call__(self) -> None:
        self.tries += 1
        try:
            await asyncio.sleep(self._seconds)
        except asyncio.CancelledError:
            self.was_cancelled = True
            raise
        if self._failures:
            raise self._failures.pop(0)


def test_it_is_tried_until_it_is_open() -> None:
    async def scenario() -> float:
        opening = Opening(LogUnavailableError("away"), LogUnavailableError("away"))
        await tried_until_open(opening, asyncio.Event())
        assert opening.tries == 3
        return asyncio.get_running_loop().time()

    assert run(scenario()) == 2 * OPEN_INTERVAL


def test_a_stop_waits_for_no_try() -> None:
    async def scenario() -> None:
        opening, stopping = Opening(seconds=30.0), asyncio.Event()
        trying = asyncio.create_task(tried_until_open(opening, stopping))
        await asyncio.sleep(1.0)
        stopping.set()
        await trying
        assert asyncio.get_running_loop().time() == 1.0
        assert opening.was_cancelled
        await tried_until_open(opening, stopping)
        assert opening.tries == 1

    run(scenario())


def test_what_no_other_try_would_heal_ends_the_process() -> None:
    with pytest.raises(UsageError):
        run(tried_until_open(Opening(UsageError("retention")), asyncio.Event()))
