"""An event loop that is nothing but a clock and a queue: one callback at a time, in an order that a seed repeats.

Three things make a run repeatable that asyncio leaves open. Time jumps to the next timer. Tasks hash by their serial
number, so that a set of tasks (`asyncio.wait`, `TaskGroup`) is walked in the same order in every run. And a process can
be killed between any two of its callbacks, which is at any `await`: `kill_after` counts them.
"""

import asyncio
import contextvars
import heapq
from collections import deque
from collections.abc import Callable, Coroutine
from itertools import count
from typing import Any, TypeVar

from typing_extensions import TypeVarTuple, override

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

EPOCH = 1_750_000_000.0
"""Unix time when a loop begins."""
MAX_CALLBACKS_PER_INSTANT = 50_000
"""Callbacks without the clock moving after which the code is taken to be in an endless loop."""

OWNER: contextvars.ContextVar[object] = contextvars.ContextVar("OWNER", default=None)
"""The process that a task belongs to: every task inherits it from the one that made it."""


UNCOUNTED: contextvars.ContextVar[bool] = contextvars.ContextVar("UNCOUNTED", default=False)
"""Whether a task and its callbacks don't count, neither for serial numbers nor for `kill_after`: so a run is the same,
whether attempts are recorded or not."""
UNCOUNTED_COROUTINES = "AttemptLog."


class LivelockError(AssertionError):
    """Callbacks follow callbacks and the clock stands still."""


class SimulatedTask(asyncio.Task[Any]):
    """A task with a serial number for a hash, and an owner."""

    _serials, _uncounted = count(), count(1 << 40)

    def __init__(self, coro: Coroutine[Any, Any, Any], **options: Any) -> None:
        context: contextvars.Context | None = options.get("context")
        is_uncounted = context is not None and context.get(UNCOUNTED, False)
        self._serial = next(SimulatedTask._uncounted if is_uncounted else SimulatedTask._serials)
        super().__init__(coro, **options)
        self.owner = OWNER.get() if context is None else context.get(OWNER)

    @override
    def __hash__(self) -> int:
        return self._serial

    @override
    def __eq__(self, other: object) -> bool:
        return self is other


def _be_uncounted() -> None:
    UNCOUNTED.set(True)


def _make_task(loop: asyncio.AbstractEventLoop, coro: Coroutine[Any, Any, Any], **options: Any) -> SimulatedTask:
    if getattr(coro, "__qualname__", "").startswith(UNCOUNTED_COROUTINES):
        context = options["context"] = options.get("context") or contextvars.copy_context()
        context.run(_be_uncounted)
    return SimulatedTask(coro, loop=loop, **options)


class _Timer(asyncio.TimerHandle):
    """A timer that is compared with nothing but others of its kind."""

    _when: float
    _scheduled: bool

    @override
    def __lt__(self, other: Any) -> bool:
        due: float = other._when
        return self._when < due


class SimulatedLoop(asyncio.BaseEventLoop):
    """No selector, no sockets, no threads."""

    _ready: deque[asyncio.Handle]
    _stopping: bool
    _scheduled: list[Any]  # TimerHandles, whose ends asyncio keeps in private attributes
    _timer_cancelled_count: int

    def __init__(self) -> None:
        super().__init__()
        SimulatedTask._serials, SimulatedTask._uncounted = count(), count(1 << 40)
        self._now = 0.0
        self._doomed: dict[object, tuple[int, Callable[[], None]]] = {}
        self._callbacks_at_instant = 0
        self.set_task_factory(lambda loop, coro, **options: _make_task(loop, coro, **options))  # noqa: PLW0108 - its type

    @override
    def time(self) -> float:
        return self._now

    def kill_after(self, steps: int, victim: object, kill: Callable[[], None]) -> None:
        """Call `kill` once so many callbacks of a process have run."""
        self._doomed[victim] = (steps, kill)

    def _run_once(self) -> None:
        """Run until told to stop: `run_forever` looks after each call, and this loop after each turn."""
        ready, doomed = self._ready, self._doomed
        while True:
            self._advance()
            for _ in range(len(ready)):
                handle: Any = ready.popleft()
                if handle._cancelled:
                    continue
                handle._run()
                context = handle._context
                if doomed and (owner := context.get(OWNER)) in doomed and not context.get(UNCOUNTED):
                    steps, kill = doomed.pop(owner)
                    if steps > 1:
                        doomed[owner] = (steps - 1, kill)
                    else:
                        kill()
            if self._stopping:
                return

    def _advance(self) -> None:
        """Make what is due ready; where nothing is, move the clock to the next timer."""
        scheduled, ready = self._scheduled, self._ready
        if self._timer_cancelled_count > 200 and 2 * self._timer_cancelled_count > len(scheduled):
            kept = [handle for handle in scheduled if not handle._cancelled]
            heapq.heapify(kept)
            scheduled[:] = kept
            self._timer_cancelled_count = 0
        while scheduled and scheduled[0]._cancelled:
            self._timer_cancelled_count -= 1
            heapq.heappop(scheduled)._scheduled = False
        if ready:
            self._callbacks_at_instant += len(ready)
            if self._callbacks_at_instant > MAX_CALLBACKS_PER_INSTANT:
                raise LivelockError(f"the clock stands still at {self._now:.3f} s: {ready[0]!r}")
        elif not scheduled:
            raise AssertionError("deadlock: every task waits, and no timer is set")
        elif scheduled[0]._when > self._now:
            self._now = scheduled[0]._when
            self._callbacks_at_instant = 0
        now = self._now
        while scheduled and scheduled[0]._when <= now:
            handle = heapq.heappop(scheduled)
            handle._scheduled = False
            ready.append(handle)

    @override
    def call_soon(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        """As asyncio's, without what only its debug mode looks at: most of a run goes through here."""
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    @override
    def call_at(
        self,
        when: float,
        callback: Callable[[*Ts], object],
        *args: *Ts,
        context: contextvars.Context | None = None,
    ) -> asyncio.TimerHandle:
        """As asyncio's, likewise."""
        timer = _Timer(when, callback, args, self, context)
        heapq.heappush(self._scheduled, timer)
        timer._scheduled = True
        return timer

    def _process_events(self, event_list: object) -> None:
        """Nothing comes from outside."""

    def _write_to_self(self) -> None:
        """Nobody sleeps in a selector."""


def run(scenario: Coroutine[None, None, T]) -> T:
    """Run a scenario in a world of its own."""
    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        return runner.run(scenario)
