"""Memory for what came of requests before their turn: incomplete heads, and what waits behind a request. Pure.

Anybody may begin a head, and send a part of it. One connection holds 64 KiB at most, or what one read brings, 256 KiB;
as many as there may be would hold gigabytes. Beyond a limit, the connection that has held something for the longest
time has to let go of it: so a head that comes at once is read, however many slow ones there are.
"""

from typing import Protocol


class Holder(Protocol):
    """A connection that holds something."""

    def let_go(self) -> None:
        """Let go of it, by closing the connection if need be."""


class HeadMemory:
    """Counts the bytes that each connection holds."""

    __slots__ = ("_held", "_limit", "held")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held: dict[Holder, int] = {}  # who has held something for the longest time first
        self.held = 0

    def hold(self, holder: Holder, more: int) -> None:
        """Count bytes that a connection holds in addition, which may cost it or others what they hold."""
        self._held[holder] = self._held.get(holder, 0) + more
        self.held += more
        while self.held > self._limit:
            oldest = next(iter(self._held))
            self.forget(oldest)
            oldest.let_go()

    def forget(self, holder: Holder) -> None:
        """A connection holds nothing any more."""
        self.held -= self._held.pop(holder, 0)
