"""How long one turn of the event loop holds up the others: in processor time, so that what else runs doesn't count."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

EVERY = 0.005


class Stalls:
    """What was seen while it was looked at."""

    longest = 0.0
    """Seconds of processor time that this thread took between two turns of the one who looks, at most."""

    async def watch(self) -> None:
        before = time.thread_time()
        while True:
            await asyncio.sleep(EVERY)
            now = time.thread_time()
            self.longest, before = max(self.longest, now - before), now


@asynccontextmanager
async def stalls() -> AsyncIterator[Stalls]:
    """Look for how long the event loop is held up, from the beginning of a block to its end."""
    found = Stalls()
    watching = asyncio.create_task(found.watch())
    await asyncio.sleep(0)
    try:
        yield found
        await asyncio.sleep(2 * EVERY)  # what has held it up until now counts, too
    finally:
        watching.cancel()
