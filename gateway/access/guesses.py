"""How many wrong tokens an address may try, in bounded memory. Pure.

No number of guesses finds a token: it has 256 bits. This keeps somebody who tries all the same from costing more than a
look-up, and from filling the metrics: after BURST wrong ones, one each SECONDS, and until then right ones are refused
as well, or a guess would tell.
"""

from collections import OrderedDict
from ipaddress import IPv6Address, ip_address

BURST = 10
SECONDS = 6.0
"""After how long another wrong token may be tried."""
MAX_NETWORKS = 4096
"""Networks that are known; beyond that the one is forgotten that has been silent for the longest time."""
_SITE_BITS = 80
"""Bits of an IPv6 address below those of its site (RFC 6177), which counts as one: a site has all of its addresses."""


class Guesses:
    """Wrong tokens by network: a debt that time pays back."""

    __slots__ = ("_debts",)

    def __init__(self) -> None:
        self._debts: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def seconds_to_wait(self, address: str | None, now: float) -> float:
        """Return how long an address has to wait before it may try another token; 0 if it needn't."""
        debt = self._debt(_network_of(address), now)
        return max(0.0, (debt - BURST + 1) * SECONDS) if debt > BURST - 1 else 0.0

    def add(self, address: str | None, now: float) -> None:
        """Count a wrong token."""
        network = _network_of(address)
        self._debts[network] = self._debt(network, now) + 1, now
        self._debts.move_to_end(network)
        if len(self._debts) > MAX_NETWORKS:
            self._debts.popitem(last=False)

    def __len__(self) -> int:
        return len(self._debts)

    def _debt(self, network: str, now: float) -> float:
        debt, since = self._debts.get(network, (0.0, now))
        return max(0.0, debt - max(0.0, now - since) / SECONDS)


def _network_of(address: str | None) -> str:
    try:
        found = ip_address((address or "").partition("%")[0])
    except ValueError:
        return ""
    found = getattr(found, "ipv4_mapped", None) or found
    return f"{int(found) >> _SITE_BITS:x}::" if isinstance(found, IPv6Address) else str(found)
