"""How far the clocks of partitions' leaders are seen to be behind that of the log. Pure.

The log's clock is that of the leader furthest ahead. What another one appends has an earlier time than that:

    … read to its end ──── appended, at a time before that ────▶ read
            └── so its clock is behind by that much at least ──┘

So a partition that was read to its end just now is complete only up to what the clock of its leader shows.
"""

from gateway.log.base import LEADER_CLOCK_SKEW, Partition


class LeaderClocks:
    """What is known of each partition's leader. Times are Unix seconds, by the log's clock unless said otherwise."""

    def __init__(self) -> None:
        self._behind: dict[Partition, float] = {}
        self._ended: dict[Partition, float] = {}

    def saw(self, partition: Partition, oldest: float, newest: float, now: float) -> None:
        """Learn from records that were read now, the oldest and the newest of which have these times by their leader.

        Only from those behind an end that was read before: they were appended since. A leader is behind by no more than
        the newest is old, so another one that isn't behind is noticed as well.
        """
        if (ended := self._ended.get(partition)) is not None:
            behind = max(self._behind.get(partition, 0.0), ended - oldest)
            self._behind[partition] = max(0.0, min(behind, now - newest, LEADER_CLOCK_SKEW))

    def complete_to(self, partition: Partition, asked: float) -> float:
        """Return until when a partition is complete by its leader's clock: its end, asked for at a time, was read."""
        self._ended[partition] = asked
        return asked - self._behind.get(partition, 0.0)

    def forget_end(self, partition: Partition) -> None:
        """Learn nothing from a partition's next records, which may be old ones."""
        self._ended.pop(partition, None)

    def forget_ends(self) -> None:
        """Learn nothing from any partition's next records, which may be old ones."""
        self._ended.clear()
