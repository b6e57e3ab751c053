"""What is read for all who ask for the same, and then kept for a while, so that many viewers cost one reading."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Hashable
from contextlib import asynccontextmanager
from time import monotonic
from typing import Generic, TypeVar

from gateway.api.problems import ApiError, Code

T = TypeVar("T")
PATIENCE = 10.0
"""Seconds for which a request waits for what another one reads."""
QUICK = 0.1
"""Seconds up to which something is read anew for each who asks."""
SHARE = 9
"""How many times as long as it took it is kept otherwise: reading it takes a tenth of the time at most."""


def cached_for(took: float) -> float:
    """Return for how many seconds something is kept that took so many to read."""
    return 0.0 if took <= QUICK else SHARE * took


class Cached(Generic[T]):
    """Something that is read when it is asked for, for all who ask meanwhile, and kept for `rest` seconds at least."""

    def __init__(self, rest: float = 0.0, clock: Callable[[], float] = monotonic) -> None:
        self._rest = rest
        self._clock = clock
        self._kept: list[T] = []
        self._error: Exception | None = None
        self._until = 0.0
        self._lock = asyncio.Lock()

    async def get(self, read: Callable[[], Awaitable[T]]) -> T:
        """Return what is kept, or read it; requests that come meanwhile wait for that, and fail if it does.

        Raises ApiError for one that waits too long.
        """
        asked_at = self._clock()
        async with self._turn():
            if asked_at >= self._until or not (self._kept or self._error):
                await self._read(read)
            elif self._error is not None:
                raise self._error
            return self._kept[0]

    async def _read(self, read: Callable[[], Awaitable[T]]) -> None:
        began = self._clock()
        self._kept, self._error = [], None
        try:
            self._kept.append(await read())
        except Exception as error:
            self._error, self._until = error, self._clock()
            raise
        ended = self._clock()
        self._until = ended + max(self._rest, cached_for(ended - began))

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(PATIENCE):
                await self._lock.acquire()
        except TimeoutError:
            raise ApiError(
                Code.BUSY, f"what another request reads took longer than {PATIENCE:g} s: try again"
            ) from None
        try:
            yield
        finally:
            self._lock.release()

    @property
    def is_over(self) -> bool:
        """Whether it is of no use any more, and nobody waits for it."""
        return not self._lock.locked() and self._clock() >= self._until


class CacheByKey(Generic[T]):
    """Several of them, each by what it is of."""

    def __init__(self, clock: Callable[[], float] = monotonic) -> None:
        self._make: Callable[[], Cached[T]] = lambda: Cached(clock=clock)
        self._known: dict[Hashable, Cached[T]] = {}

    async def get(self, key: Hashable, read: Callable[[], Awaitable[T]]) -> T:
        """Return what is kept by a key, or read it; requests for the same wait for that meanwhile."""
        for each in [each for each, kept in self._known.items() if kept.is_over]:
            del self._known[each]
        return await self._known.setdefault(key, self._make()).get(read)
