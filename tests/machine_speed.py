"""How fast this machine is: bounds of processor time are those of a usual one."""

import math
import time
from collections.abc import Callable

USUAL = 0.0055
"""Seconds of processor time that the loop below takes on a usual machine (Python 3.11).

There the bare pipeline of the benchmark takes 228 µs an event; it took 290 to 331 µs where this took 7.3 ms.
"""


def as_usual(seconds: Callable[[], float], tries: int = 5, *, enough: float = 0.0) -> float:
    """Return the least processor time of something, as on a usual machine; each try is between two of plain Python.

    So what else runs at that moment slows both down. On a faster machine it is what it is. No more is tried after one
    that took less than `enough`.
    """
    least = math.inf
    for _ in range(tries):
        before = slowness()
        took = seconds()
        least = min(least, took * 2 / (before + slowness()))
        if least < enough:
            break
    return least


def slowness() -> float:
    """Return how many times as long as usual this machine takes at the moment; 1 if it is as fast or faster."""
    return max(1.0, _loop() / USUAL)


def _loop() -> float:
    began = time.thread_time()
    total = 0
    for number in range(100_000):
        total += number * number % 7
    return time.thread_time() - began
