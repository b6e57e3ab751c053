"""How fast this machine is: bounds of processor time are those of a usual one."""

import time
from collections.abc import Callable

USUAL = 0.0055
"""Seconds of processor time that the loop below takes on a usual machine (Python 3.11).

There the bare pipeline of the benchmark takes 228 µs an event; it took 290 to 331 µs where this took 7.3 ms.
"""


def as_usual(seconds: Callable[[], float], tries: int = 5) -> float:
    """Return the least processor time of something, as on a usual machine; each try is beside one of plain Python.

    So what else runs at that moment slows both down. On a faster machine it is what it is.
    """
    return min(seconds() / slowness() for _ in range(tries))


def slowness() -> float:
    """Return how many times as long as usual this machine takes at the moment; 1 if it is as fast or faster."""
    return max(1.0, _loop() / USUAL)


def _loop() -> float:
    began = time.thread_time()
    total = 0
    for number in range(100_000):
        total += number * number % 7
    return time.thread_time() - began
