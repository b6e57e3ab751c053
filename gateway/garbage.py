"""When Python's garbage collector runs, and on which objects.

Reference counting frees most objects; the collector finds reference cycles, and blocks the event loop meanwhile. By
default it runs when many more objects were allocated than freed since its last run. Here about as many are freed as are
allocated, so it runs rarely, and then over everything that is open: with 5,000 slow connections that took 40 to 90 ms,
every few seconds. So it runs on a timer instead, over few objects each time: 6 ms at most, but once some 40 ms where
5,000 connections open within a second or two. Most times there is nothing to find, and a look at what 64 requests hold
takes 0.5 ms: without new objects that stay, it looks once a second.
"""

import asyncio
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

YOUNG_INTERVAL = 0.05
"""Seconds between collections of the young generation, if it has grown by `YOUNG_OBJECTS`."""
YOUNG_OBJECTS = 8_000
YOUNG_EVERY = 20
"""Otherwise it is collected once in this many intervals."""
MIDDLE_EVERY = 3
"""One in this many of these collections is of the middle generation as well."""
FULL_INTERVAL = 60.0
"""Minimum seconds between full collections, which leave out only frozen objects."""
THAW_INTERVAL = 3600.0
"""Minimum seconds between full collections with the frozen objects: with 5,000 routes one takes 0.14 s."""
FULL_SHARE = 1000
"""The time between full collections is at least this many times the duration of the last one."""
_keeping = 0
"""How many are creating something large that stays."""
_has_frozen = False
"""Whether something was frozen without a collection since the last one of all objects."""


def prepare() -> None:
    """Freeze what the modules have created, and raise the thresholds: the collector rarely starts by itself then."""
    # By default it traverses the events in flight after each 700 more objects, and the modules again and again: a
    # tenth of an event's CPU time.
    gc.freeze()
    gc.set_threshold(10_000, 20, 10)


def freeze() -> None:
    """Collect once, and then freeze what there is, such as the rules and their metrics: it isn't traversed again."""
    global _has_frozen  # noqa: PLW0603 - as the collector itself, one of a process
    _has_frozen = False
    gc.unfreeze()
    gc.collect()
    gc.freeze()


@contextmanager
def kept() -> Iterator[None]:
    """Collect nothing while a thread creates much that stays, such as rules; then freeze that. It has no cycles.

    What else there is at that moment is frozen as well, and may become part of a cycle later: `collect` looks for that.
    """
    global _keeping, _has_frozen  # noqa: PLW0603 - as the collector itself, one of a process
    _keeping += 1
    try:
        yield
    finally:
        gc.freeze()
        _has_frozen = True
        _keeping -= 1


async def collect() -> None:
    """Collect garbage, until cancelled."""
    full_at = perf_counter() + FULL_INTERVAL
    thaw_at = perf_counter() + THAW_INTERVAL
    young = 0  # collections since the last of the middle generation
    while True:
        for _ in range(YOUNG_EVERY):
            await asyncio.sleep(YOUNG_INTERVAL)
            if gc.get_count()[0] >= YOUNG_OBJECTS:
                break
        if _keeping:
            continue
        if (began := perf_counter()) < full_at:
            young = (young + 1) % MIDDLE_EVERY
            gc.collect(0 if young else 1)
            continue
        if _has_frozen and began >= thaw_at:
            freeze()
            thaw_at = perf_counter() + THAW_INTERVAL
        else:
            gc.collect()
        ended = perf_counter()
        full_at = ended + max(FULL_INTERVAL, FULL_SHARE * (ended - began))
