"""Memory for the bodies of requests that aren't answered yet: who has room, and who has to make some.

A body is *loose* while it is read and not verified, when anybody may have sent it, and *settled* while it waits for its
append. One that came whole, with its head, is verified at once and never loose. Loose ones have half of the room. Where
that isn't enough, the oldest loose body of the source with the most of them is given up. So what comes at once is read
however many bodies are held open beside it, and who holds them open to one source takes nothing from another.

What is settled nobody gives up. Of that a source has its share of what all of them leave, so that one whose topic
takes nothing doesn't fill the room. A large body's is smaller, which keeps room for small ones.
"""

SMALL = 64 * 1024  # bytes: most events are far below
SHARE_OF_SMALL, SHARE_OF_LARGE = 3, 1  # times what is left: 3/4 and 1/2 of all, if no other source has any
# Seconds for which a body does not give way to a large one of its source: else many large ones would end each
# other. Small ones take little, and are soon done.
PATIENCE = 1.0


class Room:
    """Bytes for bodies, over all requests.

    While one is read it takes room for what comes of it, until it is closed. Once it is verified its bytes are kept,
    until they are given back.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._loose = 0
        self._settled = 0
        self._shares: dict[str, Share] = {}
        self._crowd: dict[Share, None] = {}  # those with loose bodies

    @property
    def free(self) -> int:
        return self._total - self._loose - self._settled

    def share(self, source: str) -> "Share":
        """Return what a source holds: the same one each time."""
        return self._shares.setdefault(source, Share())

    def take(self, held: "Held", more: int, *, now: float) -> bool:
        """Return whether a body may grow by that many bytes, and take them if so; others may be given up for them."""
        share, size = held.share, held.size + more
        if held.is_given_up or not self._is_within(share, size):
            return False
        if not self._make_room(share, more, size, most_loose=self._total // 2, now=now, asking=held):
            return False
        if more:
            if not held.size:
                held.began = now
                if not share.loose:
                    self._crowd[share] = None
                share.loose[held] = None
            held.size = size
            share.loose_bytes += more
            self._loose += more
        return True

    def close(self, held: "Held") -> None:
        """Free what a body has taken while it was read."""
        share = held.share
        if held.size:
            del share.loose[held]
            if not share.loose:
                del self._crowd[share]
            share.loose_bytes -= held.size
            self._loose -= held.size
            held.size = 0

    def keep(self, share: "Share", size: int, *, now: float) -> bool:
        """Return whether there is room for a body that is whole and verified, and settle it if so."""
        if not self._is_within(share, size):
            return False
        if size > self.free and not self._make_room(share, size, size, most_loose=self._total, now=now):
            return False
        share.settled += size
        self._settled += size
        return True

    def give_back(self, share: "Share", size: int) -> None:
        """Free the bytes of a settled body."""
        share.settled -= size
        self._settled -= size

    def _is_within(self, share: "Share", size: int) -> bool:
        times = SHARE_OF_LARGE if size > SMALL else SHARE_OF_SMALL
        return share.settled + size <= times * (self._total - self._settled - size)

    def _make_room(
        self, share: "Share", more: int, size: int, *, most_loose: int, now: float, asking: "Held | None" = None
    ) -> bool:
        """Give up loose bodies until there is room for so many bytes more of a body that then has that size."""
        while self._loose + more > most_loose or self._loose + self._settled + more > self._total:
            oldest = self._oldest()
            if oldest is None or oldest is asking:
                return False
            if oldest.share is share and size > SMALL and now < oldest.began + PATIENCE:
                return False
            self.close(oldest)
            oldest.is_given_up = True
            oldest.give_up()
        return True

    def _oldest(self) -> "Held | None":
        most = max(self._crowd, key=lambda share: share.loose_bytes, default=None)
        return None if most is None else next(iter(most.loose))


class Share:
    """What a source holds: its loose bodies by age, with their bytes, and the bytes of the settled ones."""

    __slots__ = ("loose", "loose_bytes", "settled")

    def __init__(self) -> None:
        self.loose: dict[Held, None] = {}
        self.loose_bytes = 0
        self.settled = 0


class Held:
    """The room of a body that is being read, from which its reader derives."""

    __slots__ = ("began", "is_given_up", "share", "size")

    def __init__(self, share: Share) -> None:
        self.share = share
        self.size = 0
        self.began = 0.0
        self.is_given_up = False

    def give_up(self) -> None:
        """Hear, once, that the room is another's by now: no more of the body is to be kept."""
