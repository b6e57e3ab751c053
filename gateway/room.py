"""Memory for the bodies of requests that aren't answered yet: who has room, and who has to make some.

A body is *loose* while it is read and not verified, when anybody may have sent it, and *settled* while it waits for its
append. Loose ones have half of the room. Where that isn't enough, the oldest loose body of the source with the most of
them is given up. So what comes at once is read however many bodies are held open beside it, and who holds them open to
one source takes nothing from another.

What is settled nobody gives up. Of that a source has its share of what all of them leave, so that one whose topic
takes nothing doesn't fill the room. A large body's is smaller, which keeps room for small ones.
"""

from dataclasses import dataclass, field

SMALL = 64 * 1024  # bytes: most events are far below
SHARE_OF_SMALL, SHARE_OF_LARGE = 3, 1  # times what is left: 3/4 and 1/2 of all, if no other source has any
# Seconds for which a body does not give way to a large one of its source: else many large ones would end each
# other. Small ones take little, and are soon done.
PATIENCE = 1.0


class Room:
    """Bytes for bodies, over all requests."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._loose = 0
        self._settled = 0
        self._shares: dict[str, _Share] = {}  # of the sources that hold something

    @property
    def free(self) -> int:
        return self._total - self._loose - self._settled

    def take(self, held: "Held", more: int, *, now: float) -> bool:
        """Tell whether a body may grow by that many bytes, and take them if so; others may be given up for them."""
        size = held.size + more
        if held.is_given_up or not self._may_settle(held.source, size):
            return False
        while more > min(self.free, self._total // 2 - self._loose):
            oldest = self._oldest()
            if oldest is None or oldest is held:
                return False
            if oldest.source == held.source and size > SMALL and now < oldest.began + PATIENCE:
                return False
            self._give_up(oldest)
        if more:
            share = self._shares.setdefault(held.source, _Share())
            if not held.size:
                held.began = now
                share.loose[held] = None
            held.size = size
            share.loose_bytes += more
            self._loose += more
        return True

    def settle(self, held: "Held") -> None:
        """Keep a body until it is closed: it is whole and verified."""
        if held.size:
            share = self._set_loose_free(held)
            share.settled += held.size
            self._settled += held.size
            held.is_settled = True

    def close(self, held: "Held") -> None:
        """Give back what a body has taken, wherever it got to."""
        if not held.size:
            return
        if held.is_settled:
            share = self._shares[held.source]
            share.settled -= held.size
            self._settled -= held.size
        else:
            share = self._set_loose_free(held)
        held.size = 0
        if not share.loose and not share.settled:
            del self._shares[held.source]

    def _may_settle(self, source: str, size: int) -> bool:
        share = self._shares.get(source)
        times = SHARE_OF_LARGE if size > SMALL else SHARE_OF_SMALL
        return (share.settled if share else 0) + size <= times * (self._total - self._settled - size)

    def _oldest(self) -> "Held | None":
        most = max(self._shares.values(), key=lambda share: share.loose_bytes, default=None)
        return None if most is None else next(iter(most.loose), None)

    def _give_up(self, held: "Held") -> None:
        self.close(held)
        held.is_given_up = True
        held.give_up()

    def _set_loose_free(self, held: "Held") -> "_Share":
        share = self._shares[held.source]
        del share.loose[held]
        share.loose_bytes -= held.size
        self._loose -= held.size
        return share


class Held:
    """A body's room, which whoever reads the body derives from."""

    __slots__ = ("began", "is_given_up", "is_settled", "size", "source")

    def __init__(self, source: str) -> None:
        self.source = source
        self.size = 0
        self.began = 0.0
        self.is_settled = False
        self.is_given_up = False

    def give_up(self) -> None:
        """Hear, once, that the room is another's by now: no more of the body is to be kept."""


@dataclass(slots=True)
class _Share:
    """What a source holds: its loose bodies by age, with their bytes, and the bytes of the settled ones."""

    loose: dict[Held, None] = field(default_factory=dict)
    loose_bytes: int = 0
    settled: int = 0
