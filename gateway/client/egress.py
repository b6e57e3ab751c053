"""Checks which addresses deliveries may connect to: after DNS, and for literal addresses, too.

The lists are explicit, since `ipaddress.is_global` accepts NAT64, 6to4 and multicast, and the addresses from which
clouds serve credentials aren't in any registry. An IPv6 address that embeds an IPv4 one is refused for either.

Copies of `NAMED_ONLY` are in `deploy/kubernetes/webhook-gateway/values.yaml` (network policies),
`deploy/kubernetes/examples/production.yaml` (IPv4 alone) and `deploy/systemd/gateway.service`;
`tests/deploy/test_chart.py` and `tests/deploy/test_systemd.py` compare them.
"""

from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from gateway.model import GatewayError
from gateway.rules.rules import Egress

_Refused = tuple[tuple[str, tuple[IPv4Network | IPv6Network, ...]], ...]
"""Networks by kind."""


def is_of_this_machine(host: str) -> bool:
    """Return whether a host is an address of this machine, or a name that is kept for it (RFC 6761, section 6.3)."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


class EgressRefusedError(GatewayError):
    """The rules (or DNS, which a stranger may control) name an address that deliveries mustn't reach."""


class EgressGuard:
    """The egress policy of one version of the rules."""

    def __init__(self, egress: Egress) -> None:
        self.egress = egress
        self._allowed = egress.allow
        self._named = frozenset([network[0] for network in egress.allow if network.num_addresses == 1])
        self._refused = _ALWAYS if egress.is_private_allowed else _ALWAYS + _PRIVATE

    def check(self, address: str) -> None:
        """Raise EgressRefusedError unless we may connect to an IP address (canonical; an IPv6 scope is ignored)."""
        dialled = ip_address(address.partition("%")[0])
        if dialled in self._named:
            return
        every = (dialled, *_embedded(dialled))
        _refuse(NAMED_ONLY, [reached for reached in every if reached not in self._named], dialled)
        if not self._is_allowed(dialled):
            _refuse(self._refused, [reached for reached in every if not self._is_allowed(reached)], dialled)

    def _is_allowed(self, address: IPv4Address | IPv6Address) -> bool:
        return any(address in network for network in self._allowed)


def _refuse(refused: _Refused, every: Iterable[IPv4Address | IPv6Address], dialled: IPv4Address | IPv6Address) -> None:
    for kind, networks in refused:
        for reached in every:
            if any(reached in network for network in networks):
                via = "" if reached is dialled else f" (as {reached})"
                raise EgressRefusedError(f"refused by egress policy: {dialled} is {kind}{via}")


def _embedded(address: IPv4Address | IPv6Address) -> Iterator[IPv4Address]:
    """Return the IPv4 addresses that a packet to this IPv6 address may reach."""
    if isinstance(address, IPv4Address) or address == _LOOPBACK:  # would look like an embedded 0.0.0.1
        return
    number = int(address)
    for network, shift, mask in _IPV4_EMBEDDINGS:
        if address in network:
            yield IPv4Address((number >> shift & 0xFFFFFFFF) ^ mask)
    if number >> 32 & 0xFCFFFFFF == 0x00005EFE:  # noqa: PLR2004 - ISATAP, RFC 5214 §6.1: any prefix, ::0:5efe:a.b.c.d
        yield IPv4Address(number & 0xFFFFFFFF)


def _networks(*texts: str) -> tuple[IPv4Network | IPv6Network, ...]:
    return tuple([ip_network(text) for text in texts])


NAMED_ONLY: _Refused = (
    ("link-local", _networks("169.254.0.0/16", "fe80::/10")),
    (
        "cloud metadata",
        _networks(
            "100.100.100.200",  # Alibaba Cloud
            "168.63.129.16",  # Azure's WireServer
            "192.0.0.192",  # Oracle Cloud, classic
            "fd00:100::100:200",  # Alibaba Cloud
            "fd00:42::42",  # Scaleway
            "fd00:a9fe:a9fe::1",  # Akamai (Linode)
            "fd00:c1::a9fe:a9fe",  # Oracle Cloud
            "fd00:ec2::/32",  # Amazon EC2: ::254 metadata, ::23 EKS pod identity
            "fd20:ce::254",  # Google Cloud
        ),
    ),
)
"""Addresses that serve credentials, by kind: not allowed by a network that contains them, only by the exact address."""
_ALWAYS: _Refused = (
    ("unspecified", _networks("0.0.0.0/8", "::")),  # Linux takes them for the host itself
    ("multicast", _networks("224.0.0.0/4", "ff00::/8")),
    ("reserved or broadcast", _networks("240.0.0.0/4")),
)
_PRIVATE: _Refused = (
    ("loopback", _networks("127.0.0.0/8", "::1")),
    ("private", _networks("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7", "fec0::/10")),
    ("shared by a carrier (RFC 6598)", _networks("100.64.0.0/10")),
    ("special-purpose (RFC 6890)", _networks("192.0.0.0/24", "198.18.0.0/15", "64:ff9b:1::/48")),
)
_LOOPBACK = IPv6Address("::1")
# Network, how far the IPv4 address is from the right, and what it is XORed with.
_IPV4_EMBEDDINGS = (
    (IPv6Network("::ffff:0:0/96"), 0, 0),  # IPv4-mapped: the kernel dials IPv4
    (IPv6Network("::/96"), 0, 0),  # IPv4-compatible, deprecated
    (IPv6Network("::ffff:0:0:0/96"), 0, 0),  # IPv4-translated, RFC 7915
    (IPv6Network("64:ff9b::/96"), 0, 0),  # NAT64, RFC 6052
    (IPv6Network("64:ff9b:1::/48"), 0, 0),  # NAT64 of a site, RFC 8215, with the usual /96
    (IPv6Network("2002::/16"), 80, 0),  # 6to4, RFC 3056
    (IPv6Network("2001::/32"), 64, 0),  # Teredo, RFC 4380: the server
    (IPv6Network("2001::/32"), 0, 0xFFFFFFFF),  # and the client, inverted
)
