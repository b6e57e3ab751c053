"""A clock that never goes back, made of one that may."""

import math


class SteadyClock:
    """Told times. Where the last one was ahead it goes on at half speed until it isn't, so that waiting still ends."""

    def __init__(self) -> None:
        self._told = -math.inf
        self._told_at = 0.0

    def tell(self, estimate: float, ticks: float) -> float:
        """Return the time, of which this is the best estimate; `ticks` is the monotonic clock."""
        told = self._told
        if ticks > self._told_at:
            told += (ticks - self._told_at) / 2
            self._told_at = ticks
        if estimate > told:  # noqa: PLR1730 - a call of max takes as long as all of this
            told = estimate
        self._told = told
        return told

    def begin_anew(self) -> None:
        """Go by the next estimate, also if that is a step back."""
        self._told = -math.inf
