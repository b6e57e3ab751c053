"""Memory for what came of requests besides their bodies: heads, trailers, and pipelined requests. Pure.

Anybody may begin a head, and send a part of it. One connection holds 64 KiB at most, or what one read brings, 256 KiB;
as many as there may be would hold gigabytes. A complete head counts, too, if it is large: aiohttp keeps it until the
next one begins, while the body is awaited and the connection is idle. So do trailers while they come. Beyond a limit, a
connection has to let go of what it holds: of those with much, the one that has had it for the longest time; if there is
none, of all. So a head that comes at once is read, and one that comes in two packets is left alone, however many slow
or large ones there are.
"""

from collections.abc import Iterable
from typing import Protocol

SMALL = 16 * 1024
"""Bytes: as much as the heads of most senders take, with what their lines take besides."""
LINE_OVERHEAD = 350
"""Bytes that a line of a head takes besides its own, as the parser keeps names and values as several objects."""


def size_of(data: bytes, end: int) -> int:
    """Return what the first bytes of some data take once they are parsed, if they are lines of a head or trailers."""
    return end + LINE_OVERHEAD * data.count(b"\n", 0, end)


def size_of_lines(lines: Iterable[tuple[bytes, bytes]]) -> int:
    """Return what the lines of a head take, given as names and values."""
    return sum([len(name) + len(value) + LINE_OVERHEAD for name, value in lines])


class Holder(Protocol):
    """A connection that holds something."""

    def evict(self, held: int) -> None:
        """Let go of it, of that many bytes, by closing the connection if need be."""


class HeadMemory:
    """Counts the bytes that each connection holds."""

    __slots__ = ("_large", "_limit", "_small", "held")

    def __init__(self, limit: int) -> None:
        self._limit = limit
        # Who holds how much, the one who has held something, or much, for the longest time first.
        self._small: dict[Holder, int] = {}
        self._large: dict[Holder, int] = {}
        self.held = 0

    def hold(self, holder: Holder, more: int) -> None:
        """Count bytes that a connection holds in addition, which may cost it or others what they hold."""
        self.held += more
        if holder in self._large:
            self._large[holder] += more
        elif (held := self._small.get(holder, 0) + more) <= SMALL:
            self._small[holder] = held
        else:
            self._small.pop(holder, None)
            self._large[holder] = held
        while self.held > self._limit:
            oldest, its = next(iter((self._large or self._small).items()))
            self.forget(oldest)
            oldest.evict(its)

    def forget(self, holder: Holder) -> None:
        """A connection holds nothing any more."""
        self.held -= self._small.pop(holder, 0) or self._large.pop(holder, 0)
