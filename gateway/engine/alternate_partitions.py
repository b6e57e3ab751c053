"""Choose the partition for an append that may go to any: that of its key, unless that has just refused one."""

import math
from collections.abc import Collection

from gateway.log.base import partition_of

AVOIDED_FOR = 30.0
"""Seconds for which a partition that has refused an append gets no other, unless all have."""


class AlternatePartitions:
    """Which partitions have refused appends, by topic, until they accept one."""

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._refused_at: dict[str, dict[int, float]] = {}

    def refused(
        self, topic: str, key: bytes, number: int | None, *, count: int, unreadable: Collection[int], now: float
    ) -> None:
        """Avoid the partition that has refused an append, None for that of its key, and the unreadable ones.

        `count` is how many partitions the topic has.
        """
        self._counts[topic] = count
        refusing = {*unreadable, partition_of(key, count) if number is None else number}
        self._refused_at.setdefault(topic, {}).update(dict.fromkeys(refusing, now))

    def accepted(self, topic: str, number: int) -> None:
        """Avoid a partition no longer."""
        self._refused_at.get(topic, {}).pop(number, None)

    def choose(self, topic: str, key: bytes, now: float) -> int | None:
        """Return the partition for an append, None for that of its key.

        If that is avoided, it is the one that has refused none for the longest time.
        """
        refused_at = self._refused_at.get(topic)
        if not refused_at:
            return None
        count = self._counts[topic]
        own = partition_of(key, count)
        if now >= refused_at.get(own, -math.inf) + AVOIDED_FOR:
            return None
        return min(range(count), key=lambda number: (refused_at.get(number, -math.inf), (number - own) % count))
