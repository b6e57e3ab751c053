"""Throttles repeated log lines to one a second, each with a count."""

from collections.abc import Hashable

INTERVAL = 1.0


class LogThrottle:
    """Decides which of many similar occurrences are logged, by a key that they share."""

    def __init__(self, interval: float = INTERVAL) -> None:
        self._interval = interval
        self._logged: dict[Hashable, tuple[float, int]] = {}

    def count(self, key: Hashable, now: float, number: int = 1) -> int:
        """Count occurrences; return how many to log now, or 0 if the last line is less than `interval` seconds old.

        The others are counted in the key's next line, or forgotten if there is none for a minute.
        """
        at, count = self._logged.get(key, (-self._interval, 0))
        count += number
        if at <= now < at + self._interval:
            self._logged[key] = at, count
            return 0
        self._logged[key] = now, 0
        if len(self._logged) > 1:
            self._logged = {each: entry for each, entry in self._logged.items() if entry[0] + 60 * self._interval > now}
        return count
