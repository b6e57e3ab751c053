"""When a process that has ended by itself is started again, and when that is no use. Pure."""

from dataclasses import dataclass

FIRST_WAIT = 0.5
MAX_WAIT = 30.0
"""Seconds until a process is started again: the first, doubled each time, up to the second."""
STEADY = 60.0
"""Seconds that a process has to run so that its end counts as the first one."""
MAX_FAILURES = 5
"""Ends in a row after which all is given up, if no other process serves."""


@dataclass(frozen=True, slots=True)
class Restarts:
    """How often a process has ended in a row."""

    in_a_row: int = 0

    def after(self, ran_for: float) -> "Restarts":
        """Return what it is after another end, so many seconds after its start."""
        return Restarts(1 if ran_for >= STEADY else self.in_a_row + 1)

    @property
    def wait(self) -> float:
        """Seconds until it is started again."""
        return min(MAX_WAIT, FIRST_WAIT * 2.0 ** (self.in_a_row - 1))

    def is_useless(self, *, others_serve: bool) -> bool:
        """Return whether to give up: what started all of them sees an end, and may know what to do.

        As long as another process serves, it isn't ended: what keeps one from starting (rules that were damaged since,
        a full disk) may be none of its business.
        """
        return self.in_a_row >= MAX_FAILURES and not others_serve
