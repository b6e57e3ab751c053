"""Memory for the bodies of requests in progress: how much each source may use, and which body is evicted.

A body is *unverified* while it is read: anybody may have sent it. It is *verified* while it waits for its append. One
that arrives complete with its head is verified at once. Unverified bodies may use half of the memory. Beyond that, the
oldest unverified body of the source with the most unverified bytes is evicted. So a body that arrives at once is read,
however many slow ones there are, and the slow bodies of one source don't evict those of another.

Verified bodies are never evicted. A source may use a share of what all of them leave free, so that one whose topic
accepts no appends doesn't fill the memory. For a large body the share is smaller, which leaves memory for small ones.
"""

SMALL = 64 * 1024  # bytes: most events are far below
SHARE_OF_SMALL, SHARE_OF_LARGE = 3, 1  # times what stays free: 3/4 and 1/2 of all, if no other source has any
# Seconds for which a body isn't evicted for a large one of its source: otherwise many large ones would evict each
# other. Small ones need little, and are soon done.
MIN_AGE = 1.0


class BodyMemory:
    """Counts the bytes of all bodies.

    While a body is read, its reservation grows, until it is closed. A verified body's bytes are reserved until they are
    released.
    """

    def __init__(self, total: int) -> None:
        self._total = total
        self._unverified = 0
        self._verified = 0
        self._shares: dict[str, Share] = {}
        self._reading: dict[Share, None] = {}  # sources with unverified bodies
        self.is_full_of_slow_bodies = False
        """Whether the last body that got no memory was refused while unverified bodies used more than verified ones."""

    @property
    def free(self) -> int:
        return self._total - self._unverified - self._verified

    def share(self, source: str) -> "Share":
        """Return what a source uses, always the same object."""
        return self._shares.setdefault(source, Share())

    def grow(self, reservation: "BodyReservation", more: int, *, now: float) -> bool:
        """Reserve that many bytes more for a body that is read, evicting others if needed; return whether it may."""
        share, size = reservation.share, reservation.size + more
        if reservation.is_evicted or not self._is_within(share, size):
            return False
        if not self._evict_for(share, more, size, max_unverified=self._total // 2, now=now, growing=reservation):
            return False
        if more:
            if not reservation.size:
                reservation.began = now
                if not share.unverified:
                    self._reading[share] = None
                share.unverified[reservation] = None
            reservation.size = size
            share.unverified_bytes += more
            self._unverified += more
        return True

    def close(self, reservation: "BodyReservation") -> None:
        """Free what a body has reserved while it was read."""
        share = reservation.share
        if reservation.size:
            del share.unverified[reservation]
            if not share.unverified:
                del self._reading[share]
            share.unverified_bytes -= reservation.size
            self._unverified -= reservation.size
            reservation.size = 0

    def reserve(self, share: "Share", size: int, *, now: float) -> bool:
        """Reserve the bytes of a complete, verified body; return whether there was memory for it."""
        if not self._is_within(share, size):
            return False
        if size > self.free and not self._evict_for(share, size, size, max_unverified=self._total, now=now):
            return False
        share.verified_bytes += size
        self._verified += size
        return True

    def release(self, share: "Share", size: int) -> None:
        """Free the bytes of a verified body."""
        share.verified_bytes -= size
        self._verified -= size

    def _is_within(self, share: "Share", size: int) -> bool:
        times = SHARE_OF_LARGE if size > SMALL else SHARE_OF_SMALL
        if share.verified_bytes + size <= times * (self._total - self._verified - size):
            return True
        self.is_full_of_slow_bodies = False  # unverified bodies play no part in this limit
        return False

    def _evict_for(
        self,
        share: "Share",
        more: int,
        size: int,
        *,
        max_unverified: int,
        now: float,
        growing: "BodyReservation | None" = None,
    ) -> bool:
        """Evict unverified bodies until `more` bytes are free for a body that then has that size."""
        unverified = self._unverified if growing is None else self._unverified + more  # before any is evicted
        while self._unverified + more > max_unverified or self._unverified + self._verified + more > self._total:
            oldest = self._oldest()
            if (
                oldest is None
                or oldest is growing
                or (oldest.share is share and size > SMALL and now < oldest.began + MIN_AGE)
            ):
                self.is_full_of_slow_bodies = unverified > self._verified
                return False
            self.close(oldest)
            oldest.is_evicted = True
            oldest.evict()
        return True

    def _oldest(self) -> "BodyReservation | None":
        most = max(self._reading, key=lambda share: share.unverified_bytes, default=None)
        return None if most is None else next(iter(most.unverified))


class Share:
    """What a source uses: its unverified bodies by age, with their bytes, and the bytes of its verified ones."""

    __slots__ = ("unverified", "unverified_bytes", "verified_bytes")

    def __init__(self) -> None:
        self.unverified: dict[BodyReservation, None] = {}
        self.unverified_bytes = 0
        self.verified_bytes = 0


class BodyReservation:
    """The memory of a body that is being read; the base class of its reader."""

    __slots__ = ("began", "is_evicted", "share", "size")

    def __init__(self, share: Share) -> None:
        self.share = share
        self.size = 0
        self.began = 0.0
        self.is_evicted = False

    def evict(self) -> None:
        """Called once, when the memory goes to another body: drop what was read of this one."""
