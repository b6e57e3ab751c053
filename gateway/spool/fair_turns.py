"""Whose turn it is: some have one at a time, the others wait in the order in which they asked. No I/O."""

from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class FairTurns(Generic[T]):
    """At most `limit` have a turn at a time. Who asks again, after its turn has ended, comes after all that wait."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: dict[T, None] = {}
        self.running: set[T] = set()

    def ask(self, who: T) -> None:
        """Ask for a turn; without effect for one that has a turn or waits for one."""
        if who not in self.running:
            self._waiting.setdefault(who)

    def begin(self) -> T | None:
        """Return who has a turn now; None if nobody waits, or as many as may have one."""
        if not self._waiting or len(self.running) >= self._limit:
            return None
        who = next(iter(self._waiting))
        del self._waiting[who]
        self.running.add(who)
        return who

    def end(self, who: T) -> None:
        self.running.discard(who)
