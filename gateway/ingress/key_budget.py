"""How many new key addresses are fetched, and for which networks: a token bucket with a reserve. Pure.

The request that names a key isn't verified, and its sender may make up any number of addresses. Their total rate is
bounded for the sake of the vendor's server, and a reserve keeps one network from taking the tokens of the others, which
need one or two each:

    ├────────────────── RESERVE ──────────────────┼─── shared ───┤     AT_ONCE, refilled at PER_SECOND
      OWN per network, and one more a minute        for any network

So a network that hasn't named an address lately gets its first ones fetched, as long as fewer than RESERVE / OWN other
networks name made-up ones, at any rate and in any order: each of those takes at most OWN tokens of the reserve and one
more a minute, and the refill covers 30 networks that do. Without the reserve, first come, first served, one network
that never stops asking would take each token as it is refilled.
"""

from gateway.ingress.admission import ROUNDING_ERROR

AT_ONCE, RESERVE = 80.0, 60.0
PER_SECOND = 0.5
OWN = 2
"""Tokens of the reserve that a network may take at once: a request has up to two keys."""
OWN_INTERVAL = 60.0
"""Seconds until a network may take one more of the reserve."""


class KeyBudget:
    """The tokens for new addresses of one source. Times are seconds of a monotonic clock."""

    __slots__ = ("_at", "_free", "_used_until")

    def __init__(self, now: float) -> None:
        self._free = AT_ONCE
        self._at = now
        self._used_until: dict[str, float] = {}
        """Network → when it may take OWN again."""

    def take(self, network: str, now: float) -> bool:
        """Return whether a new address that a request from this network names may be fetched; if so, take a token."""
        self._free = min(AT_ONCE, self._free + max(0.0, now - self._at) * PER_SECOND)
        self._at = max(self._at, now)
        used_until = max(now, self._used_until.get(network, now))
        is_own = used_until <= now + (OWN - 1) * OWN_INTERVAL + ROUNDING_ERROR
        if self._free < (1.0 if is_own else RESERVE + 1.0) - ROUNDING_ERROR:
            return False
        self._free = max(0.0, self._free - 1.0)
        if is_own:  # at most AT_ONCE and what is refilled in OWN intervals are kept
            self._used_until = {name: until for name, until in self._used_until.items() if until > now}
            self._used_until[network] = used_until + OWN_INTERVAL
        return True
