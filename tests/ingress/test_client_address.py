"""Whose request it is: no header that anyone but a trusted proxy sends changes that."""

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.ingress.client_address import MAX_PROXIES, Address, Networks, client_address, network_of

PROXIES = Networks([ip_network("10.0.0.0/8"), ip_network("fd00::/8"), ip_network("127.0.0.1")])
NOBODY = Networks([])
CLIENT = ip_address("192.0.2.7")

addresses = st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)).map(
    lambda address: getattr(address, "ipv4_mapped", None) or address
)
clients = addresses.filter(lambda address: address not in PROXIES)
proxies = st.one_of(st.ip_addresses(network="10.0.0.0/8"), st.ip_addresses(network="fd00::/8"))
plausible = st.lists(addresses.map(str), max_size=4).map(lambda found: ", ".join(found).encode())
anything = st.lists(
    st.one_of(
        plausible,
        st.binary(max_size=40).filter(lambda value: not {*value} & {0, 10, 13}),
        st.text(alphabet=', .:[]"0123456789abcdef\t', max_size=40).map(str.encode),
    ),
    max_size=4,
)
"""The lines of a header as somebody may send them who means no good."""


def written(address: Address, form: int) -> bytes:
    """Write an address as one proxy or another does."""
    if isinstance(address, IPv4Address):
        return [f"{address}", f"{address}:41234", f"::ffff:{address}", f"[::ffff:{address}]:5"][form].encode()
    return [f"{address}", f"[{address}]", f"[{address}]:41234", address.exploded][form].encode()


@given(peer=clients, lines=anything, trusted=st.sampled_from([PROXIES, NOBODY]))
def test_no_header_of_an_untrusted_peer_changes_its_address(
    peer: Address, lines: list[bytes], trusted: Networks
) -> None:
    assert client_address(str(peer), lines, trusted) == peer


@given(
    client=clients,
    lines=anything,
    chain=st.lists(proxies, min_size=1, max_size=4),
    forms=st.lists(st.integers(0, 3), min_size=5, max_size=5),
    appends_line=st.lists(st.booleans(), min_size=5, max_size=5),
)
def test_no_header_of_a_client_changes_what_proxies_say_of_it(
    client: Address, lines: list[bytes], chain: list[Address], forms: list[int], appends_line: list[bool]
) -> None:
    """Each proxy appends whom it got the request from: to the last line, or in a line of its own."""
    sent, peer = list(lines), client
    for proxy, form, is_own_line in zip(chain, forms, appends_line, strict=False):
        if sent and not is_own_line:
            sent[-1] = b"%b, %b" % (sent[-1], written(peer, form))
        else:
            sent.append(written(peer, form))
        peer = proxy
    assert client_address(str(peer), sent, PROXIES) == client


@pytest.mark.parametrize(
    "value",
    [
        *(b"", b" ", b"unknown", b"_hidden", b"10.0.0.256", b"192.0.2", b"192.0.2.7.8", b"010.0.0.1", b"0x0a.0.0.1"),
        *(
            b"192.0.2.7:",
            b"192.0.2.7:port",
            b"192.0.2.7:123456",
            b"[192.0.2.7]",
            b"[::1",
            b"::1]",
            b"[::1]:",
            b"1::2::3",
        ),
        *(b"fe80::1%eth0", b"192.0.2.7/32", b'"192.0.2.7"', b"for=192.0.2.7", b"192.0.2.7;", b"\xd9\xa1.0.0.1"),
        *(b"192.0.2.7,", b"192.0.2.7, ,", b"192.0.2.7 10.0.0.1", b"192.0.2.7, x", b"192.0.2.7\x0b"),
    ],
)
def test_what_is_malformed_where_it_counts_is_nobodys_address(value: bytes) -> None:
    """It isn't the proxy's: everybody behind it would have that."""
    assert client_address("10.0.0.1", [value], PROXIES) is None
    assert client_address("10.0.0.1", [b"192.0.2.7", value], PROXIES) is None
    assert client_address("10.0.0.1", [value + b", 10.0.0.2"], PROXIES) is None
    assert client_address("10.0.0.1", [value, b"192.0.2.7"], PROXIES) == CLIENT  # where it doesn't count
    assert client_address("192.0.2.7", [value], PROXIES) == CLIENT


@pytest.mark.parametrize(
    ("peer", "lines", "expected"),
    [
        ("192.0.2.7", [], "192.0.2.7"),
        ("10.0.0.1", [], "10.0.0.1"),  # the proxy itself, such as by its own health check
        ("10.0.0.1", [b"192.0.2.7"], "192.0.2.7"),
        ("10.0.0.1", [b"198.51.100.1, 192.0.2.7,10.0.0.2\t,\t10.0.0.3 "], "192.0.2.7"),
        ("10.0.0.1", [b"198.51.100.1", b"192.0.2.7", b"10.0.0.2"], "192.0.2.7"),
        ("10.0.0.1", [b"10.0.0.9, 10.0.0.2"], "10.0.0.9"),  # a client inside
        ("fd00::1", [b"2001:db8::7"], "2001:db8::7"),
        ("127.0.0.1", [b"[2001:db8::7]:443, 10.0.0.2:80"], "2001:db8::7"),
        ("::ffff:10.0.0.1", [b"::ffff:192.0.2.7"], "192.0.2.7"),
        ("fe80::1%eth0", [b"192.0.2.7"], "fe80::1"),
    ],
)
def test_the_client_is_the_last_one_that_is_no_trusted_proxy(peer: str, lines: list[bytes], expected: str) -> None:
    assert client_address(peer, lines, PROXIES) == ip_address(expected)


@pytest.mark.parametrize("peer", ["", "/run/gateway.sock", "localhost", "10.0.0.1:80"])
def test_a_peer_without_an_address_is_nobody(peer: str) -> None:
    assert client_address(peer, [b"192.0.2.7"], PROXIES) is None


def test_a_chain_of_proxies_has_an_end() -> None:
    for number, expected in ((MAX_PROXIES, CLIENT), (MAX_PROXIES + 1, None)):
        assert client_address("10.0.0.1", [b"192.0.2.7" + b", 10.0.0.2" * number], PROXIES) == expected


@given(st.ip_addresses(v=4))
def test_an_address_has_one_form(address: IPv4Address) -> None:
    """Else a list of IPv4 networks admits nobody who comes to a socket of both versions."""
    mapped = IPv6Address(f"::ffff:{address}")
    assert client_address(str(mapped), [], NOBODY) == client_address(str(address), [], NOBODY) == address


@given(
    networks=st.lists(
        st.one_of(
            st.tuples(st.ip_addresses(v=4), st.integers(0, 32)).map(lambda pair: IPv4Network(pair, strict=False)),
            st.tuples(st.ip_addresses(v=6), st.integers(0, 128)).map(lambda pair: IPv6Network(pair, strict=False)),
        ),
        max_size=6,
    ),
    address=addresses,
    near=st.integers(0, 255),
)
def test_a_set_of_networks_has_what_any_of_them_has(
    networks: list[IPv4Network | IPv6Network], address: Address, near: int
) -> None:
    tried = [address, *[network[min(near, network.num_addresses - 1)] for network in networks]]
    for each in tried:
        assert (each in Networks(networks)) == any(each in network for network in networks)


sites = st.integers(1, 2**48 - 1)  # not 0, in which IPv4 ones are mapped
hosts = st.integers(0, 2**80 - 1)


@given(site=sites, other=sites, host=hosts, neighbour=hosts)
def test_a_network_is_all_that_one_end_site_has(site: int, other: int, host: int, neighbour: int) -> None:
    """It may have a /48: if each of its /64 were a network, it would have 65,536 shares."""
    client = network_of(str(IPv6Address(site << 80 | host)))
    assert client == network_of(str(IPv6Address(site << 80 | neighbour)))
    assert (client == network_of(str(IPv6Address(other << 80 | host)))) == (other == site)


def test_a_network_of_an_ipv4_address_is_that_address_alone() -> None:
    assert network_of("192.0.2.1") == network_of("::ffff:192.0.2.1") != network_of("192.0.2.2")
    assert network_of("") == network_of("unix")
