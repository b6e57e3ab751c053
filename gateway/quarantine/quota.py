"""How much is kept, and whose: a token bucket whose tokens are shared fairly among those who take them. Pure.

Whoever takes tokens has a debt until they are refilled. The debt of one may be at most what stays free. So if one takes
as much as it can, that is half of all, and there is as much for the next; of n that do, each has an (n + 1)th. What is
refilled pays off all debts alike, so that each of n that always ask gets an nth of the rate, and one that asks seldom
is never refused for those that ask often.
"""

from collections.abc import Hashable

MAX_KEYS = 1024
"""Debtors that are told apart; all others share one debt."""
REFILL_INTERVAL = 0.1
"""Seconds between refills: each looks at all debts."""
_OTHERS = ("others",)


class FairBucket:
    """Tokens of a `capacity`, refilled at a `rate` per second. Times are seconds of a clock that isn't set."""

    __slots__ = ("_at", "_capacity", "_debts", "_rate", "_taken")

    def __init__(self, *, capacity: float, rate: float, now: float) -> None:
        self._capacity = capacity
        self._rate = rate
        self._debts: dict[Hashable, float] = {}
        self._taken = 0.0
        self._at = now

    def has(self, key: Hashable, cost: float, *, now: float) -> bool:
        """Return whether this debtor may take so many tokens now; takes none."""
        if now >= self._at + REFILL_INTERVAL:
            self._refill(now)
        debt = self._debts.get(self._known(key), 0.0)
        return debt + cost <= self._capacity - self._taken - cost

    def take(self, key: Hashable, cost: float) -> Hashable:
        """Take tokens that `has` has just allowed; return whose debt they are."""
        key = self._known(key)
        self._debts[key] = self._debts.get(key, 0.0) + cost
        self._taken += cost
        return key

    def give_back(self, key: Hashable, cost: float) -> None:
        """Give back what was taken, which is this one's debt, as far as it isn't refilled already."""
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
