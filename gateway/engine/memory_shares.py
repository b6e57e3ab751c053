"""How a member's memory for records is shared by its partitions.

    0 ─────────────────────── 3/4 ──── 7/8 ──── 1
    │ pending, of any partition │ own, of │ fetched │
    │                           │  each   │         │

A *pending* record is counted with what is decoded from it and its deliveries. One that was fetched may have to wait
before it is pending: for memory, for the offset window or, in a tier, until it is due.
"""

COMMON_MEMORY = 0.75
"""Share of the memory that pending records of any partition may take."""
OWN_MEMORY = 0.125
"""Share of which each partition has an equal part for pending records of its own: a few whose records can't end don't
stop the others."""
FETCHED_MEMORY = 0.125
"""Share for records that were fetched and aren't pending yet: half of it for those of tiers, in equal parts, and half
for those of all partitions. A partition isn't fetched further while its records wait, unless a tier's are due."""


class MemoryShares:
    """The shares of `limit` bytes. They are read for each record, and so computed once.

    There is room for a record of any partition up to `common` bytes of pending records, and up to `pending` bytes for
    one of a partition that holds less than its own.
    """

    __slots__ = ("common", "limit", "pending")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.common = COMMON_MEMORY * limit
        self.pending = self.common + OWN_MEMORY * limit

    def own(self, partitions: int) -> float:
        """Return the bytes of pending records up to which one of so many partitions has room in any case."""
        return OWN_MEMORY * self.limit / max(1, partitions)

    def fetch(self, partitions: int, tiers: int) -> int:
        """Return how many bytes a fetch may return of each of so many partitions, of which some are of tiers."""
        half = FETCHED_MEMORY / 2 * self.limit
        return int(min(half / max(1, partitions), half / 2 / tiers if tiers else half))

    def due(self, tiers: int) -> float:
        """Return up to how many bytes of due records a partition of a tier is fetched further, of so many."""
        return FETCHED_MEMORY / 4 * self.limit / max(1, tiers)
