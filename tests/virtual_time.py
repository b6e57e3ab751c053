"""An event loop whose time jumps: whatever sleeps or times out does so at once, in order, deterministically.

    run(scenario())        # a scenario that sleeps for three days takes milliseconds

When nothing is ready the loop moves its clock to the next timer instead of waiting. There is no network in it.
"""

import asyncio
import selectors
from collections.abc import Coroutine
from typing import TypeVar

from typing_extensions import override

T = TypeVar("T")

EPOCH = 1_750_000_000.0
"""Unix time when a loop begins."""


class _Selector(selectors.SelectSelector):
    def __init__(self) -> None:
        super().__init__()
        self.jumped = 0.0

    @override
    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready and timeout is None:
            raise AssertionError("deadlock: every task waits, and no timer is set")
        if not ready and timeout:
            self.jumped += timeout
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """A selector loop on virtual time."""

    def __init__(self) -> None:
        self._jumping = _Selector()
        super().__init__(self._jumping)

    @override
    def time(self) -> float:
        return self._jumping.jumped


def now() -> float:
    """Return the virtual Unix time of the running loop."""
    return EPOCH + asyncio.get_running_loop().time()


def run(scenario: Coroutine[None, None, T]) -> T:
    """Run a scenario on virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(scenario)
