"""How fast this machine is: bounds of processor time are those of a usual one."""

import time

USUAL = 0.0055
"""Seconds of processor time that the loop below takes on a usual machine (Python 3.11)."""


def slowness() -> float:
    """Return how many times slower than a usual machine this one runs plain Python at the moment; at least 1."""
    return max(1.0, min(_loop() for _ in range(5)) / USUAL)


def _loop() -> float:
    began = time.thread_time()
    total = 0
    for number in range(100_000):
        total += number * number % 7
    return time.thread_time() - began
