"""What reading a body costs, whatever comes of it."""

import time
import tracemalloc
from collections.abc import Callable
from contextlib import suppress

from gateway.model import UnreadableBodyError
from tests.machine_speed import as_usual

MOST_SECONDS = 0.25
"""As long as the worst event may block the event loop."""


def seconds(read: Callable[[], object]) -> float:
    """Return the processor time of reading, on a usual machine."""

    def once() -> float:
        began = time.thread_time()
        with suppress(UnreadableBodyError):
            read()
        return time.thread_time() - began

    return as_usual(once, tries=3)


def peak_bytes(read: Callable[[], object]) -> int:
    """Return the most memory that is allocated at once."""
    tracemalloc.start()
    try:
        with suppress(UnreadableBodyError):
            read()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
