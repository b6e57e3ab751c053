"""What is read for all who ask for the same, and then kept for a while, so that many viewers cost one reading."""

import asyncio
from collections.abc import Awaitable, Callable, Hashable
from time import monotonic
from typing import Generic, TypeVar

T = TypeVar("T")
SHARE = 9
"""How many times as long as the reading took it is kept, at least."""


class Kept(Generic[T]):
    """Something that is read when it is asked for, for all who ask within some seconds.

    It is kept for `rest` seconds, and for longer if reading it took longer than `quick` seconds.
    """

    def __init__(self, rest: float, clock: Callable[[], float] = monotonic, *, quick: float = 0.0) -> None:
        self._rest = rest
        self._quick = quick
        self._clock = clock
        self._kept: list[T] = []
        self._until = 0.0
        self._lock = asyncio.Lock()

    async def get(self, read: Callable[[], Awaitable[T]]) -> T:
        """Return what is kept, or read it; requests that come meanwhile wait for that."""
        asked_at = self._clock()
        async with self._lock:
            if not self._kept or asked_at >= self._until:
                began = self._clock()
                self._kept = [await read()]
                ended = self._clock()
                took = ended - began
                self._until = ended + (self._rest if took < self._quick else max(self._rest, SHARE * took))
            return self._kept[0]

    @property
    def is_over(self) -> bool:
        """Whether it is of no use any more, and nobody waits for it."""
        return not self._lock.locked() and self._clock() >= self._until


class KeptBy(Generic[T]):
    """Several of them, each by what it is of."""

    def __init__(self, rest: float, clock: Callable[[], float] = monotonic, *, quick: float = 0.0) -> None:
        self._make: Callable[[], Kept[T]] = lambda: Kept(rest, clock, quick=quick)
        self._known: dict[Hashable, Kept[T]] = {}

    async def get(self, key: Hashable, read: Callable[[], Awaitable[T]]) -> T:
        """Return what is kept by a key, or read it; requests for the same wait for that meanwhile."""
        for each in [each for each, kept in self._known.items() if kept.is_over]:
            del self._known[each]
        return await self._known.setdefault(key, self._make()).get(read)
