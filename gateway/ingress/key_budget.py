"""How many addresses of keys may be asked that requests name and from which none is known, and for whom. Pure.

Whoever names one isn't verified, and may make up as many as they like. All together are bounded for the sake of the
vendor's server, which is asked. And no network takes what others need, which is one address, or two:

    ├────────────────── RESERVE ──────────────────┼─── shared ───┤     AT_ONCE, refilled at PER_SECOND
      for OWN of each network, one more a minute    for anything

So a network that hasn't named any lately has its first ones asked for, as long as fewer than RESERVE / OWN others name
made-up ones, at whatever rate and in whatever order: they can take no more than OWN of the reserve each, and one more a
minute, which 30 of them together get refilled. If all got what is left, first come, first served, a single one that
always asks would take every token at the moment it is there.
"""

AT_ONCE, RESERVE = 80.0, 60.0
PER_SECOND = 0.5
OWN = 2
"""Of a network at once, out of the reserve: a request has up to two keys."""
OWN_INTERVAL = 60.0
"""Seconds until a network has another of its own."""
_LEEWAY = 1e-6
"""What a token may lack, as times are inexact."""


class KeyBudget:
    """The tokens for new addresses of one source. Times are seconds of a clock that isn't set."""

    __slots__ = ("_at", "_free", "_used_until")

    def __init__(self, now: float) -> None:
        self._free = AT_ONCE
        self._at = now
        self._used_until: dict[str, float] = {}
        """Network → when it has OWN again."""

    def take(self, network: str, now: float) -> bool:
        """Return whether one more address may be asked that a request from there has named; take the token for it."""
        self._free = min(AT_ONCE, self._free + max(0.0, now - self._at) * PER_SECOND)
        self._at = max(self._at, now)
        used_until = max(now, self._used_until.get(network, now))
        is_own = used_until <= now + (OWN - 1) * OWN_INTERVAL + _LEEWAY
        if self._free < (1.0 if is_own else RESERVE + 1.0) - _LEEWAY:
            return False
        self._free = max(0.0, self._free - 1.0)
        if is_own:  # at most AT_ONCE and what is refilled in OWN intervals are kept
            self._used_until = {name: until for name, until in self._used_until.items() if until > now}
            self._used_until[network] = used_until + OWN_INTERVAL
        return True
