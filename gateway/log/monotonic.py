"""A clock that never goes back, derived from one that may."""

import math


class MonotonicClock:
    """Returns times that never decrease. When it is ahead of the estimate it runs at half speed, so waits still end."""

    def __init__(self) -> None:
        self._last = -math.inf
        self._last_ticks = 0.0

    def advance(self, estimate: float, ticks: float) -> float:
        """Return the time, given its best estimate; `ticks` is the system's monotonic clock."""
        time = self._last
        if ticks > self._last_ticks:
            time += (ticks - self._last_ticks) / 2
            self._last_ticks = ticks
        if estimate > time:  # noqa: PLR1730 - a call of max takes as long as all of this
            time = estimate
        self._last = time
        return time

    def reset(self) -> None:
        """Accept the next estimate, even if it is a step back."""
        self._last = -math.inf
