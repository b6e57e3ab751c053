"""Lets a thread that computes for long give way to the event loop.

Python runs one thread at a time. One that computes gets the interpreter at each system call of the event loop, of which
a request takes about ten, and keeps it for the switch interval: a request would take ten of these. So the work is done
in slices, and after each the thread waits until the event loop has nothing to do, or has had a multiple of that time.
"""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import Context, ContextVar
from math import inf
from time import perf_counter, thread_time

SLICE = 0.001
"""Seconds of work, at least, after which the event loop has its turn."""
REST = 0.004
"""Seconds that a busy event loop has after each slice."""
BUSY = 0.0001
"""Seconds from which on an iteration of the event loop is a busy one: an empty one takes some 20 µs."""
PATIENCE, LATER_SLICE = 1.0, 0.005
"""Seconds after which a slice is longer, and followed by one iteration alone: otherwise a busy loop would put off the
end of much work by several times as long as it takes."""
MAX_TURN = 0.1
"""Maximum seconds for which the thread waits for a turn to end: the loop may be closed, or busy with one callback."""

_turns: ContextVar["_Turns | None"] = ContextVar("turns", default=None)


class TooLongError(Exception):
    """The thread has computed for as long as it may."""


class _Turns:
    """The slices of one thread, and the event loop that it gives way to."""

    __slots__ = ("_began", "_context", "_ends", "_is_over", "_iterated", "_loop", "_patient_until", "until")

    def __init__(self, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        self._loop = loop
        self._ends = thread_time() + seconds
        self._context = Context()  # without this object: what the loop starts takes no turns with it
        self._is_over = threading.Event()
        self._began = self._iterated = 0.0
        self._patient_until = perf_counter() + PATIENCE
        self.until = perf_counter() + SLICE
        """When the current slice ends, by `perf_counter`."""

    def give_way(self) -> None:
        if thread_time() > self._ends:
            self._ends = inf  # once: who cleans up after it gives way, too
            raise TooLongError
        began = perf_counter()
        self._is_over.clear()
        try:
            self._loop.call_soon_threadsafe(self._begin, context=self._context)
        except RuntimeError:  # it is closed
            return
        self._is_over.wait(MAX_TURN)
        now = perf_counter()
        # An iteration of a loop that is overloaded may take long: the thread has its share then, too.
        self.until = now + (max(SLICE, (now - began) * SLICE / REST) if now < self._patient_until else LATER_SLICE)

    def _begin(self) -> None:
        self._began = self._iterated = perf_counter()
        self._loop.call_soon(self._iterate)

    def _iterate(self) -> None:
        now = perf_counter()
        rest = REST if now < self._patient_until else 0.0
        if now < self._began + rest and now > self._iterated + BUSY:
            self._iterated = now
            self._loop.call_soon(self._iterate)
        else:
            self._is_over.set()


def give_way() -> None:
    """Let the event loop have its turn if this thread has worked for a slice; do nothing outside `taking_turns`.

    To be called at least every millisecond. Cheap enough for each of 100,000 values. Raises TooLongError, once, in a
    thread that may take only so long.
    """
    turns = _turns.get()
    if turns is not None and perf_counter() > turns.until:
        turns.give_way()


@contextmanager
def taking_turns(loop: asyncio.AbstractEventLoop, seconds: float = inf) -> Iterator[None]:
    """Have the calls of `give_way` in this thread, which isn't the loop's, wait for that event loop.

    The thread may take so many seconds of processor time: what else runs on the machine doesn't count.
    """
    token = _turns.set(_Turns(loop, seconds))
    try:
        yield
    finally:
        _turns.reset(token)
