"""What one principal may take of what all share: so many places, and turns in which nobody waits behind one's many."""

import asyncio
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager

from gateway.access.principal import Principal
from gateway.api.problems import ApiError, Code


def whose_turn(principal: Principal) -> str:
    """Return who has the turns of a principal: "" for everybody on this machine."""
    return "" if principal.is_everybody else principal.identity


class Shares:
    """How many places each principal has taken; in memory for as long as they have some."""

    def __init__(self) -> None:
        self._taken = Counter[str]()

    @contextmanager
    def place(self, principal: Principal, most: int, what: str) -> Iterator[None]:
        """Take a place for something. Raises ApiError if somebody has `most` already who isn't everybody."""
        who = principal.identity
        if self._taken[who] >= most and not principal.is_everybody:
            raise ApiError(Code.BUSY, f"at most {most} {what} of one principal at a time")
        self._taken[who] += 1
        try:
            yield
        finally:
            self._taken[who] -= 1
            if not self._taken[who]:
                del self._taken[who]


class FairTurns:
    """So many turns at a time. The next one is of who holds fewest, and of several, whose last one is longest ago.

    So nobody waits behind the many of another. One who asks alone may have them all, or `each`: then turns that take
    long leave some for others, too. "" are all who see the same, and may always have them all.
    """

    def __init__(self, most: int, each: int | None = None) -> None:
        self._free = most
        self._each = each
        self._number = 0
        self._held = Counter[str]()
        self._last: dict[str, int] = {}
        """Which turn was the last one of those who hold one, or wait."""
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}

    async def acquire(self, who: str) -> None:
        """Wait for a turn; if this is cancelled, there is none to release."""
        if self._free and self._may_have_one(who):  # as may nobody who waits: else it would be theirs
            self._take(who)
            return
        granted = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(who, deque()).append(granted)
        try:
            await granted
        except asyncio.CancelledError:
            if granted.cancelled():
                self._forget(who, granted)
            else:  # it was its turn in the same moment
                self.release(who)
            raise

    def release(self, who: str) -> None:
        """End a turn, and give it to who is next."""
        self._free += 1
        self._held[who] -= 1
        while self._free and (able := [each for each in self._waiting if self._may_have_one(each)]):
            following = min(able, key=lambda each: (self._held[each], self._last.get(each, 0)))
            granted = self._waiting[following][0]
            self._forget(following, granted)
            if not granted.cancelled():
                self._take(following)
                granted.set_result(None)
        if not self._held[who]:
            del self._held[who]
            if who not in self._waiting:
                self._last.pop(who, None)

    def _may_have_one(self, who: str) -> bool:
        return self._each is None or not who or self._held[who] < self._each

    def _take(self, who: str) -> None:
        self._free -= 1
        self._number += 1
        self._held[who] += 1
        self._last[who] = self._number

    def _forget(self, who: str, granted: asyncio.Future[None]) -> None:
        queue = self._waiting.get(who, deque())
        if granted in queue:
            queue.remove(granted)
        if not queue and self._waiting.pop(who, None) is not None and not self._held[who]:
            self._last.pop(who, None)
