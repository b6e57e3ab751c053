"""When Python's garbage collector runs, and over what.

Python frees an object with its last reference; the collector finds those that refer to each other. It runs when many
more objects have been created than freed, over all that have come since the last time, and nothing else goes on
meanwhile. At work about as many are freed as are created, so it hardly runs; if it does, it looks at all that is open.
With 5,000 slow connections that took 40 to 90 ms every few seconds. So it runs by the clock here, over little: 5 ms.
"""

import asyncio
import gc
from time import perf_counter

YOUNG_INTERVAL = 0.05
"""Seconds between collections of what has come since the last one."""
MIDDLE_EVERY = 10
"""Each so many of these collections is of all that has come since the last such."""
FULL_INTERVAL = 60.0
"""Seconds at least between collections of everything but the rules, which is what is left of those before."""
FULL_SHARE = 1000
"""The time between these is at least so many times what the last one took."""


def prepare() -> None:
    """Leave the modules out, and let the collector run by itself only if much comes between two that the clock has."""
    # By default it looks at the events in flight each time that there are 700 objects more, and at the modules again
    # and again: a tenth of an event's CPU time.
    gc.freeze()
    gc.set_threshold(10_000, 20, 10)


def leave_out() -> None:
    """Have what there is now looked at once, and not again: the rules, and their metrics."""
    gc.unfreeze()
    gc.collect()
    gc.freeze()


async def collect() -> None:
    """Collect garbage, until cancelled."""
    full_at = perf_counter() + FULL_INTERVAL
    while True:
        for number in range(MIDDLE_EVERY):
            await asyncio.sleep(YOUNG_INTERVAL)
            gc.collect(0 if number else 1)
        if (began := perf_counter()) >= full_at:
            gc.collect()
            ended = perf_counter()
            full_at = ended + max(FULL_INTERVAL, FULL_SHARE * (ended - began))
