"""One line a second for what happens thousands of times, with how often it did."""

from collections.abc import Hashable

EVERY = 1.0


class LogThrottle:
    """Decides which of many like things is told, by a key of what they have in common."""

    def __init__(self, every: float = EVERY) -> None:
        self._every = every
        self._told: dict[Hashable, tuple[float, int]] = {}

    def count(self, key: Hashable, now: float) -> int:
        """Return of how many, this one included, a line is to tell; 0 if there was one less than `every` seconds ago.

        What is left over counts for the next line of the key, or is forgotten when there is none for a minute.
        """
        at, count = self._told.get(key, (-self._every, 0))
        count += 1
        if at <= now < at + self._every:
            self._told[key] = at, count
            return 0
        self._told[key] = now, 0
        if len(self._told) > 1:
            self._told = {each: told for each, told in self._told.items() if told[0] + 60 * self._every > now}
        return count
