"""How many documents a process fetches for senders at a time, and whose turn it is.

A fetch has a connection of its own, for seconds if the other end doesn't respond, and whoever sends a request may cause
one. So there are at most AT_ONCE, far fewer than the descriptors that senders leave. A source has at most half of what
the others leave. So one whose fetches all hang doesn't delay those of another: they needn't wait for its own to end.
Those of a source that has its share wait; next is the source with the fewest in progress, and of these each in turn.
"""

import asyncio
from collections import Counter, deque

from gateway.verify.remote_keys import Fetch

AT_ONCE = 128
"""Twice what a source whose keys are asked for without end begins (`key_budget.py`), but for a few."""


class FetchTurns:
    """Fetches documents for sources, each in its turn."""

    def __init__(self, fetch: Fetch) -> None:
        self._fetch = fetch
        self._fetching: Counter[str] = Counter()
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}

    async def fetch(self, source: str, url: str, *, timeout: float, limit: int, request_body: bytes = b"") -> bytes:
        """Return the document at an address, as `Fetch` does; `timeout` is from the source's turn on."""
        await self._take_turn(source)
        try:
            return await self._fetch(url, timeout=timeout, limit=limit, request_body=request_body)
        finally:
            self._end(source)

    async def _take_turn(self, source: str) -> None:
        if self._may_fetch(source):  # then none of its own waits
            self._fetching[source] += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(source, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it was its turn at the same moment
                self._end(source)
            raise

    def _may_fetch(self, source: str) -> bool:
        return self._fetching[source] < AT_ONCE - self._fetching.total()

    def _end(self, source: str) -> None:
        """End a fetch, and begin those that may now."""
        self._fetching[source] -= 1
        if not self._fetching[source]:
            del self._fetching[source]
        while self._waiting:
            following = min(self._waiting, key=lambda each: self._fetching[each])
            if not self._may_fetch(following):
                return
            waiting = self._waiting.pop(following)
            turn = waiting.popleft()
            if waiting:
                self._waiting[following] = waiting  # behind the others with as many
            if not turn.cancelled():
                self._fetching[following] += 1
                turn.set_result(None)
