"""Which addresses deliveries may reach."""

from ipaddress import ip_address, ip_network

import pytest

from gateway.client.egress import EgressGuard, EgressRefusedError
from gateway.rules.rules import Egress

ALWAYS_REFUSED = [
    ("169.254.169.254", "169.254.169.254 is link-local"),
    ("169.254.170.2", "169.254.170.2 is link-local"),
    ("fe80::1", "fe80::1 is link-local"),
    ("fe80::1%eth0", "fe80::1 is link-local"),
    ("100.100.100.200", "100.100.100.200 is cloud metadata"),
    ("168.63.129.16", "168.63.129.16 is cloud metadata"),
    ("fd00:ec2::254", "fd00:ec2::254 is cloud metadata"),
    ("fd00:ec2::23", "fd00:ec2::23 is cloud metadata"),
    ("fd20:ce::254", "fd20:ce::254 is cloud metadata"),
    ("192.0.0.192", "192.0.0.192 is cloud metadata"),
    ("fd00:c1::a9fe:a9fe", "fd00:c1::a9fe:a9fe is cloud metadata"),
    ("fd00:100::100:200", "fd00:100::100:200 is cloud metadata"),
    ("fd00:a9fe:a9fe::1", "fd00:a9fe:a9fe::1 is cloud metadata"),
    ("fd00:42::42", "fd00:42::42 is cloud metadata"),
    ("0.0.0.0", "0.0.0.0 is unspecified"),
    ("::", ":: is unspecified"),
    ("224.0.0.1", "224.0.0.1 is multicast"),
    ("ff02::1", "ff02::1 is multicast"),
    ("255.255.255.255", "255.255.255.255 is reserved or broadcast"),
    ("::ffff:169.254.169.254", f"{ip_address('::ffff:a9fe:a9fe')} is link-local (as 169.254.169.254)"),
    ("::169.254.169.254", "::a9fe:a9fe is link-local (as 169.254.169.254)"),
    ("::ffff:0:169.254.169.254", "::ffff:0:a9fe:a9fe is link-local (as 169.254.169.254)"),
    ("64:ff9b::a9fe:a9fe", "64:ff9b::a9fe:a9fe is link-local (as 169.254.169.254)"),
    ("64:ff9b:1::a9fe:a9fe", "64:ff9b:1::a9fe:a9fe is link-local (as 169.254.169.254)"),
    ("2002:a9fe:a9fe::1", "2002:a9fe:a9fe::1 is link-local (as 169.254.169.254)"),
    ("2001:0:a9fe:a9fe::", "2001:0:a9fe:a9fe:: is link-local (as 169.254.169.254)"),
    ("2001:0:808:808::5601:5601", "2001:0:808:808::5601:5601 is link-local (as 169.254.169.254)"),
    ("2a00::5efe:a9fe:a9fe", "2a00::5efe:a9fe:a9fe is link-local (as 169.254.169.254)"),
    ("::ffff:0.0.0.0", f"{ip_address('::ffff:0:0')} is unspecified (as 0.0.0.0)"),
]
PRIVATE = [
    "127.0.0.1",
    "127.8.8.8",
    "::1",
    "10.1.2.3",
    "172.16.0.1",
    "172.31.255.255",
    "192.168.1.1",
    "100.64.0.1",
    "fd12:3456::1",
    "fec0::1",
    "198.18.0.1",
    "::ffff:10.0.0.1",
    "64:ff9b::7f00:1",
    "2002:c0a8:101::1",
]
PUBLIC = [
    "8.8.8.8",
    "172.32.0.1",
    "100.128.0.1",
    "2606:4700::1111",
    "::ffff:8.8.8.8",
    "64:ff9b::808:808",
    "2002:808:808::1",
]


def guard(*allow: str, private: bool = True) -> EgressGuard:
    return EgressGuard(Egress(is_private_allowed=private, allow=tuple([ip_network(text) for text in allow])))


@pytest.mark.parametrize(("address", "reason"), ALWAYS_REFUSED)
@pytest.mark.parametrize("private", [True, False])
def test_some_addresses_are_refused_whatever_the_setting(address: str, reason: str, *, private: bool) -> None:
    with pytest.raises(EgressRefusedError) as refusal:
        guard(private=private).check(address)
    assert str(refusal.value) == f"refused by egress policy: {reason}"


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses_are_refused_by_setting_only(address: str) -> None:
    guard().check(address)
    with pytest.raises(EgressRefusedError):
        guard(private=False).check(address)


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses_are_allowed(address: str) -> None:
    guard().check(address)
    guard(private=False).check(address)


def test_an_exact_allowance_overrides_each_refusal() -> None:
    guard("169.254.169.254/32").check("169.254.169.254")
    guard("169.254.169.254/32").check("::ffff:169.254.169.254")
    guard("::ffff:169.254.169.254/128").check("::ffff:169.254.169.254")
    guard("fd00:ec2::254/128").check("fd00:ec2::254")
    guard("10.0.0.0/8", private=False).check("10.9.9.9")
    guard("64:ff9b::/96", private=False).check("64:ff9b::a00:1")


@pytest.mark.parametrize("allowed", ["0.0.0.0/0", "169.254.0.0/16", "169.254.169.254/31", "::/0", "fd00::/8"])
@pytest.mark.parametrize("private", [True, False])
def test_no_wide_allowance_includes_credential_endpoints(allowed: str, *, private: bool) -> None:
    for address, reason in ALWAYS_REFUSED:
        if "link-local" in reason or "metadata" in reason:
            with pytest.raises(EgressRefusedError):
                guard(allowed, private=private).check(address)


def test_an_allowance_reaches_no_further_than_it_says() -> None:
    with pytest.raises(EgressRefusedError):
        guard("169.254.169.254/32").check("169.254.169.253")
    with pytest.raises(EgressRefusedError):
        guard("10.0.0.0/8", private=False).check("192.168.0.1")


def test_an_invalid_address_is_refused() -> None:
    with pytest.raises(ValueError, match="does not appear to be"):
        guard().check("0x7f.1")
