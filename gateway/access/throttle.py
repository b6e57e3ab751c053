"""How many wrong tokens, and failed sign-ins, a client may try, in bounded memory. Pure.

No number of guesses finds a token: it has 256 bits. So a right one is good however many wrong ones came before, as all
who come through one proxy have its address; who tries wrong ones all the same is told to wait: after BURST of them, one
each SECONDS. Anybody can make sign-ins through the identity provider fail, each at the cost of a request to it:
they are refused before that, by the client that the proxy has seen.
"""

from collections import OrderedDict
from collections.abc import Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address

BURST = 10
SECONDS = 6.0
"""After how long another wrong token may be tried."""
MAX_NETWORKS = 4096
"""Networks that are known; beyond that the one is forgotten that has been silent for the longest time."""
_SITE_BITS = 80
"""Bits of an IPv6 address below those of its site (RFC 6177), which counts as one: a site has all of its addresses."""


class Throttle:
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


def client_of(peer: str | None, forwarded: Sequence[str]) -> str | None:
    """Return the address that the last proxy has seen, of its `X-Forwarded-For` headers; without one, the peer's.

    It's only to tell clients apart: a client that needs no proxy can have as many as it likes.
    """
    last = ",".join(forwarded).rpartition(",")[2].strip()
    return last if _address(last) is not None else peer


def _network_of(address: str | None) -> str:
    found = _address(address)
    if found is None:
        return ""
    return f"{int(found) >> _SITE_BITS:x}::" if isinstance(found, IPv6Address) else str(found)


def _address(text: str | None) -> IPv4Address | IPv6Address | None:
    try:
        found = ip_address((text or "").partition("%")[0])
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found
