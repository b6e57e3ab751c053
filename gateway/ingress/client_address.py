"""Whose request it is: the connection's peer, or whoever trusted proxies say is behind them. Pure.

    client ──▶ proxy B ──▶ proxy A ──▶ gateway       peer: A
                                                     X-Forwarded-For: (whatever the client sent), client, B

Each proxy appends its own peer's address to the list. So it is read from its end, for as long as the addresses are
those of trusted proxies; the first other one is the client's. What stands before that, the client may have written, and
isn't looked at. An untrusted peer is the client, whatever its headers say. `Forwarded` (RFC 7239) isn't read: a proxy
that appends to one of the two headers passes the other on as its client wrote it.
"""

import re
from collections.abc import Iterable, Sequence
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

MAX_PROXIES = 32
"""Trusted addresses at the end of the list after which it is malformed: no chain is that long."""
_FORWARDED = re.compile(
    rb"\[([0-9A-Fa-f:.]{2,45})\](?::[0-9]{1,5})?"  # IPv6, as some write it, with a port or without
    rb"|([0-9.]{7,15})(?::[0-9]{1,5})?"  # IPv4; Azure's proxies add the port
    rb"|([0-9A-Fa-f:.]{2,45})"
)


class Networks:
    """A set of networks. A look-up takes a step for each different prefix length, not for each network."""

    __slots__ = ("_by_version",)

    def __init__(self, networks: Iterable[Network]) -> None:
        found: dict[int, dict[int, set[int]]] = {4: {}, 6: {}}
        for network in networks:
            found[network.version].setdefault(int(network.netmask), set()).add(int(network.network_address))
        self._by_version = {version: tuple(masks.items()) for version, masks in found.items()}

    def __contains__(self, address: Address) -> bool:
        number = int(address)
        return any(number & mask in bases for mask, bases in self._by_version[address.version])


def client_address(peer: str, forwarded_for: Sequence[bytes], trusted: Networks) -> Address | None:
    """Return the client's address, an IPv4-mapped one as IPv4; None if that can't be told.

    `peer` is the address of the connection's other end, `forwarded_for` the value of each `X-Forwarded-For` line. None
    is for a peer without an IP address (a Unix socket), and for a list of a trusted peer that is malformed where it
    counts: the peer isn't taken instead, as then everybody behind it would have the proxy's address. Without such a
    header, a trusted peer is the client itself.
    """
    address = parse_address(peer)
    if address is None or address not in trusted:
        return address
    proxies = 0
    for line in reversed(forwarded_for):
        rest, comma = line, b","
        while comma:
            rest, comma, last = rest.rpartition(b",")
            address = _forwarded(last.strip(b" \t"))
            if address is None or address not in trusted:
                return address
            proxies += 1
            if proxies > MAX_PROXIES:
                return None
    return address


def parse_address(peer: str) -> Address | None:
    """Return the address of a connection's other end, an IPv4-mapped one as IPv4; None if it has none."""
    return _parsed(IPv6Address if ":" in peer else IPv4Address, peer.partition("%")[0])


def network_of(address: str) -> str:
    """Return the network that counts as one client: an IPv4 address, or the first 48 bits of an IPv6 one.

    Limits per client apply to its network: having more addresses gives nobody a larger share. An end site gets up to 48
    bits of its own (RFC 6177), which are 65,536 networks of 64: by those, one site would be as many clients. Customers
    of a carrier or a cloud who share 48 bits share a share. They notice only while one of them floods, as those who
    share an IPv4 address do.
    """
    found = parse_address(address)
    return f"{int(found) >> 80:x}::" if isinstance(found, IPv6Address) else str(found)


def _forwarded(element: bytes) -> Address | None:
    found = _FORWARDED.fullmatch(element)
    if found is None:
        return None
    bracketed, v4, v6 = found.groups()
    if v4 is not None:
        return _parsed(IPv4Address, v4.decode())
    return _parsed(IPv6Address, (bracketed or v6).decode())


def _parsed(kind: type[Address], text: str) -> Address | None:
    try:
        address = kind(text)
    except ValueError:
        return None
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address
