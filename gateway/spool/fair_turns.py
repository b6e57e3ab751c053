"""Whose turn it is: some have one at once, the others wait in the order in which they asked. No I/O."""

from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class FairTurns(Generic[T]):
    """One that has a turn and asks for the next comes after all that wait."""

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        self._waiting: dict[T, None] = {}
        self.running: set[T] = set()

    def ask(self, who: T) -> None:
        if who not in self.running:
            self._waiting.setdefault(who)

    def begin(self) -> T | None:
        """Return who has a turn now; None if nobody waits, or as many as may have one."""
        if not self._waiting or len(self.running) >= self._at_once:
            return None
        who = next(iter(self._waiting))
        del self._waiting[who]
        self.running.add(who)
        return who

    def end(self, who: T) -> None:
        self.running.discard(who)
