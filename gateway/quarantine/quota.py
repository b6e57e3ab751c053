"""A token bucket that is shared fairly between keys, such as sources or networks. Pure.

The tokens that a key has taken are its debt until they are refilled, and a key's debt may not exceed the tokens that
stay free. So one greedy key gets half of the capacity, and leaves the other half; of n greedy keys each gets 1/(n + 1).
The refill reduces all debts equally: n greedy keys get 1/n of the rate each, and a key that rarely asks isn't refused
because of them.
"""

from collections.abc import Hashable

MAX_KEYS = 1024
"""Keys with a debt of their own; all others share one."""
REFILL_INTERVAL = 0.1
"""Seconds between refills, each of which goes through all debts."""
_OTHERS = ("others",)


class FairBucket:
    """Tokens of a `capacity`, refilled at a `rate` per second. Times are seconds of a monotonic clock."""

    __slots__ = ("_at", "_capacity", "_debts", "_rate", "_taken")

    def __init__(self, *, capacity: float, rate: float, now: float) -> None:
        self._capacity = capacity
        self._rate = rate
        self._debts: dict[Hashable, float] = {}
        self._taken = 0.0
        self._at = now

    def has(self, key: Hashable, cost: float, *, now: float) -> bool:
        """Return whether a key may take `cost` tokens now; takes none."""
        if now >= self._at + REFILL_INTERVAL:
            self._refill(now)
        debt = self._debts.get(self._known(key), 0.0)
        return debt + cost <= self._capacity - self._taken - cost

    def take(self, key: Hashable, cost: float) -> Hashable:
        """Take tokens that `has` has just allowed; return the key to give them back with, perhaps a shared one."""
        key = self._known(key)
        self._debts[key] = self._debts.get(key, 0.0) + cost
        self._taken += cost
        return key

    def give_back(self, key: Hashable, cost: float) -> None:
        """Give back tokens that `take` returned this key for, as far as they aren't refilled already."""
        left = self._debts.get(key, 0.0) - cost
        if left > 0:
            self._debts[key] = left
        else:
            self._debts.pop(key, None)
        self._taken = sum(self._debts.values())

    def _known(self, key: Hashable) -> Hashable:
        return key if key in self._debts or len(self._debts) < MAX_KEYS else _OTHERS

    def _refill(self, now: float) -> None:
        tokens = (now - self._at) * self._rate
        self._at = now
        debts = sorted(self._debts.items(), key=lambda item: item[1])
        for index, (key, debt) in enumerate(debts):
            paid = min(debt, tokens / (len(debts) - index))
            tokens -= paid
            if paid < debt:
                self._debts[key] = debt - paid
            else:
                del self._debts[key]
        self._taken = sum(self._debts.values())
