"""Chains of certificates in headers: what strangers send costs little, and what an honest client may send is taken.

Proxies pass on certificates that they haven't verified, so that anybody may be the author of a chain.
"""

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import cache

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from gateway.model import RefusedError
from gateway.verify.client_certificates import (
    MAX_CERTIFICATE_BYTES,
    MAX_CHAIN_BYTES,
    MAX_INTERMEDIATES,
    REFUSED_FOR,
    REMEMBERED,
    Chains,
    ClientCertificates,
    ForwardedCertificate,
    Validity,
)
from tests.machine_speed import as_usual

Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
NOW = time.time()
REFUSED, MALFORMED = "client_certificate_refused", "client_certificate_malformed"


def a_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def certificate(
    subject: str,
    key: Key,
    issuer: str,
    signer: Key,
    *,
    is_authority: bool = True,
    ids: tuple[bytes, bytes] | None = None,
    ends: float = 3600.0,
    more: Sequence[x509.ExtensionType] = (),
) -> bytes:
    """Return a certificate (DER) by which `signer`, who calls itself `issuer`, vouches for a key.

    `ids` are those of its issuer's key and of its own; without them it has none.
    """
    at = datetime.fromtimestamp(NOW, UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(name(subject))
        .issuer_name(name(issuer))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(at - timedelta(days=2))
        .not_valid_after(at + timedelta(seconds=ends))
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
    )
    if ids is not None:
        builder = builder.add_extension(x509.AuthorityKeyIdentifier(ids[0], None, None), critical=False)
        builder = builder.add_extension(x509.SubjectKeyIdentifier(ids[1]), critical=False)
    for each in more:
        builder = builder.add_extension(each, critical=False)
    return builder.sign(signer, hashes.SHA256()).public_bytes(Encoding.DER)


def name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def names(*found: str) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName(list(map(x509.DNSName, found)))


ROOT_KEY, MIDDLE_KEY, LEAF_KEY, OTHER_KEY = a_key(), a_key(), a_key(), a_key()
ROOT = certificate("root", ROOT_KEY, "root", ROOT_KEY)
MIDDLE = certificate("middle", MIDDLE_KEY, "root", ROOT_KEY)
LEAF = certificate("leaf", LEAF_KEY, "middle", MIDDLE_KEY, is_authority=False)


def result(leaf: bytes, *intermediates: bytes, authorities: tuple[bytes, ...] = (ROOT,), now: float = NOW) -> str:
    """Return why a chain is refused; `accepted` if it isn't."""
    try:
        ClientCertificates(authorities=authorities).check(ForwardedCertificate(leaf, intermediates), now=now)
    except RefusedError as error:
        return error.reason
    return "accepted"


# ---- Those of honest clients ----


def test_the_others_may_come_in_any_order_with_any_beside_them() -> None:
    lowest = certificate("lowest", OTHER_KEY, "middle", MIDDLE_KEY)
    leaf = certificate("leaf", LEAF_KEY, "lowest", OTHER_KEY, is_authority=False)
    stranger = certificate("stranger", LEAF_KEY, "elsewhere", LEAF_KEY)
    for others in ((lowest, MIDDLE), (MIDDLE, lowest), (ROOT, stranger, MIDDLE, leaf, lowest, lowest)):
        assert result(leaf, *others) == "accepted"
    assert result(leaf, lowest) == REFUSED
    assert result(leaf, MIDDLE) == REFUSED


def test_of_two_authorities_with_one_name_the_one_that_has_signed_counts() -> None:
    """Authorities change their keys and keep their names. By their ids they are told apart."""
    old, new = certificate("middle", OTHER_KEY, "root", ROOT_KEY, ids=(b"r", b"old")), a_key()
    renewed = certificate("middle", new, "root", ROOT_KEY, ids=(b"r", b"new"))
    leaf = certificate("leaf", LEAF_KEY, "middle", new, is_authority=False, ids=(b"new", b"leaf"))
    for others in ((old, renewed), (renewed, old)):
        assert result(leaf, *others) == "accepted"
    roots = certificate("root", OTHER_KEY, "root", OTHER_KEY), ROOT
    for authorities in (roots, roots[::-1]):
        assert result(LEAF, MIDDLE, authorities=authorities) == "accepted"


def test_an_authority_that_is_known_by_its_former_key_leads_to_its_new_one() -> None:
    """RFC 4210, section 4.4: the new key, signed with the old one, under the same name."""
    old = certificate("root", ROOT_KEY, "root", ROOT_KEY, ids=(b"old", b"old"))
    new_with_old = certificate("root", OTHER_KEY, "root", ROOT_KEY, ids=(b"old", b"new"))
    leaf = certificate("leaf", LEAF_KEY, "root", OTHER_KEY, is_authority=False, ids=(b"new", b"leaf"))
    assert result(leaf, new_with_old, authorities=(old,)) == "accepted"
    assert result(leaf, authorities=(old,)) == REFUSED


def test_one_of_two_that_have_signed_the_same_authority_is_enough() -> None:
    """Of a chain that is meant for several roots, the way to one that this source trusts is found."""
    crossed = certificate("middle", MIDDLE_KEY, "another root", OTHER_KEY)
    for others in ((crossed, MIDDLE), (MIDDLE, crossed)):
        assert result(LEAF, *others) == "accepted"


def test_key_ids_that_are_wrong_everywhere_are_no_obstacle() -> None:
    """Some private authorities write them as they like, and the signature is what counts."""
    middle = certificate("middle", MIDDLE_KEY, "root", ROOT_KEY, ids=(b"a", b"b"))
    leaf = certificate("leaf", LEAF_KEY, "middle", MIDDLE_KEY, is_authority=False, ids=(b"c", b"d"))
    assert result(leaf, middle) == "accepted"


def test_an_expired_one_is_left_out_for_its_successor() -> None:
    expired = certificate("middle", MIDDLE_KEY, "root", ROOT_KEY, ends=-1)
    assert result(LEAF, expired) == REFUSED
    for others in ((expired, MIDDLE), (MIDDLE, expired)):
        assert result(LEAF, *others) == "accepted"


def test_a_certificate_may_be_its_own_authority() -> None:
    """As where a source names the one certificate that it takes."""
    own = certificate("leaf", LEAF_KEY, "leaf", LEAF_KEY, is_authority=False)
    for pinned in (own, LEAF):
        assert result(pinned, authorities=(pinned,)) == "accepted"
        assert result(pinned) == REFUSED


def test_a_certificate_for_servers_is_refused_with_a_chain_too() -> None:
    for_servers = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    leaf = certificate("leaf", LEAF_KEY, "middle", MIDDLE_KEY, is_authority=False, more=[for_servers])
    assert result(leaf, MIDDLE) == REFUSED


def test_what_is_no_authority_signs_nothing() -> None:
    """Whoever has a client's certificate could issue others."""
    own = certificate("middle", MIDDLE_KEY, "root", ROOT_KEY, is_authority=False)
    assert result(LEAF, own) == REFUSED


# ---- Those of strangers ----


OTHERS = MAX_INTERMEDIATES - 1
"""Certificates of a hostile chain beside the first, and one that differs each time."""


@cache
def slow_key(first: int, second: int, *, least: int = 65537) -> rsa.RSAPrivateKey:
    """Return a key whose signatures take long to verify: of two Mersenne primes, with an exponent of at least that."""
    p, q = ((1 << each) - 1 for each in (first, second))
    order = math.lcm(p - 1, q - 1)
    public = next(each for each in itertools.count(least, 2) if math.gcd(each, order) == 1)
    secret = pow(public, -1, order)
    numbers = rsa.RSAPrivateNumbers(
        p, q, secret, secret % (p - 1), secret % (q - 1), pow(q, -1, p), rsa.RSAPublicNumbers(public, p * q)
    )
    return numbers.private_key(unsafe_skip_rsa_key_validation=True)


def explosion(key: Key) -> list[bytes]:
    """Return a chain in which each certificate has signed each other one, and whose last issuer seems to be ours."""
    ids = (b"one", b"one")
    leaf = certificate("leaf", LEAF_KEY, "root", key, is_authority=False, ids=ids)
    return [leaf, *[certificate("root", key, "root", key, ids=ids) for _ in range(OTHERS)]]


def ladder(key: Key, last: str) -> list[bytes]:
    """Return a chain as long as it may be, whose last issuer is `last`."""
    steps = [*[f"step {number}" for number in range(OTHERS)], last]
    leaf = certificate("leaf", LEAF_KEY, steps[0], key, is_authority=False)
    return [leaf, *[certificate(one, key, other, key) for one, other in itertools.pairwise(steps)]]


def constrained(count: int) -> list[bytes]:
    """Return a chain with names in its first certificate, and as many constraints in the next."""
    subtrees = [x509.DNSName(f"{number:x}.a") for number in range(count)]
    limits = x509.NameConstraints(permitted_subtrees=None, excluded_subtrees=subtrees)
    many = names(*[f"{number:x}.b" for number in range(count)])
    leaf = certificate("leaf", LEAF_KEY, "middle", OTHER_KEY, is_authority=False, more=[many])
    return [leaf, certificate("middle", OTHER_KEY, "root", OTHER_KEY, more=[limits])]


def vouching() -> list[bytes]:
    """Return a chain of a client to whom an authority has given a certificate, with which it issues another."""
    key = slow_key(2281, 607, least=EXPONENT)
    own = certificate("client", key, "root", ROOT_KEY, is_authority=False)
    return [certificate("leaf", LEAF_KEY, "client", key, is_authority=False), own]


def many_parts() -> list[bytes]:
    """Return a certificate whose subject, like its issuer's, is as long as it may be."""
    common = NameOID.COMMON_NAME
    long = x509.Name([x509.NameAttribute(common, "a")] * 310)
    began = datetime(2020, 1, 1, tzinfo=UTC)
    made = x509.CertificateBuilder(long, long, LEAF_KEY.public_key(), 1, began, began + timedelta(days=30_000))
    return [made.sign(LEAF_KEY, hashes.SHA256()).public_bytes(Encoding.DER)]


EXPONENT = (1 << 2880) + 1  # at least; one that is usual has 17 bits
HOSTILE: Mapping[str, Callable[[], list[bytes]]] = {
    "a long one": lambda: ladder(OTHER_KEY, "root"),
    "a long one to nobody": lambda: ladder(OTHER_KEY, "nobody"),
    "a loop": lambda: ladder(OTHER_KEY, "step 0"),
    "each has signed each": lambda: explosion(OTHER_KEY),
    "each has signed each, with P-384": lambda: explosion(ec.generate_private_key(ec.SECP384R1())),
    "RSA with 8,676 bits": lambda: explosion(slow_key(4423, 4253)),
    "RSA with a large exponent": lambda: explosion(slow_key(2281, 607, least=EXPONENT)),
    "a long one of RSA with a large exponent": lambda: ladder(slow_key(2281, 607, least=EXPONENT), "root"),
    "a client's own, of RSA with a large exponent": vouching,
    "names and constraints": lambda: constrained(400),
    "a subject of many parts": many_parts,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_strangers_chain_costs_little(kind: str) -> None:
    """A signature's verification is of the authority's key, which is known, or isn't done."""
    chain = HOSTILE[kind]()
    assert sum(map(len, chain)) <= MAX_CHAIN_BYTES
    assert max(map(len, chain)) <= MAX_CERTIFICATE_BYTES

    def refusing() -> float:
        # Another each time, so that nothing of it is remembered.
        last = certificate("beside it", OTHER_KEY, "x", OTHER_KEY)
        began = time.thread_time()
        assert result(*chain, last) == REFUSED
        return time.thread_time() - began

    assert as_usual(refusing) < 0.005


def test_what_is_more_or_larger_is_not_looked_at() -> None:
    assert result(LEAF, *[MIDDLE] * MAX_INTERMEDIATES) == "accepted"
    assert result(LEAF, *[MIDDLE] * (MAX_INTERMEDIATES + 1)) == MALFORMED
    many = names(*[f"host-{number:05}.example" for number in range(400)])
    large = certificate("leaf", LEAF_KEY, "root", ROOT_KEY, is_authority=False, more=[many])
    assert len(large) > MAX_CERTIFICATE_BYTES
    assert result(large) == MALFORMED
    assert result(LEAF, large) == MALFORMED
    much = certificate("middle", OTHER_KEY, "root", ROOT_KEY, more=[names(*[f"{number:05}" for number in range(900)])])
    assert len(much) < MAX_CERTIFICATE_BYTES < MAX_CHAIN_BYTES < 4 * len(much)
    assert result(LEAF, *[much] * 4) == MALFORMED


# ---- What is remembered ----


class Counting:
    """Verifies as it is told to, and counts."""

    def __init__(self) -> None:
        self.count = 0
        self.validity: Validity | None = None

    def verify(self, _authorities: tuple[bytes, ...], _presented: ForwardedCertificate, _now: float) -> Validity | None:
        self.count += 1
        return self.validity


def numbered(number: int) -> ForwardedCertificate:
    return ForwardedCertificate(f"certificate {number}".encode())


def test_a_good_chain_is_verified_once_and_its_end_counts_each_time() -> None:
    counting = Counting()
    counting.validity = (NOW, NOW + 60)
    chains = Chains(counting.verify)
    assert [chains.until((ROOT,), numbered(1), NOW + each) for each in (0, 1, 59)] == [NOW + 60] * 3
    assert counting.count == 1
    counting.validity = None
    assert chains.until((ROOT,), numbered(1), NOW + 60) is None
    assert chains.until((ROOT,), numbered(1), NOW - 1) is None
    assert chains.until((MIDDLE,), numbered(1), NOW + 1) is None
    assert counting.count == 4
    split = ForwardedCertificate(b"certificate ", (b"1",))
    assert chains.until((ROOT,), split, NOW + 1) is None, "another chain, of the same bytes"


def test_a_refused_chain_is_not_verified_again_for_a_while() -> None:
    counting = Counting()
    chains = Chains(counting.verify)
    for ahead, count in ((0.0, 1), (REFUSED_FOR - 1, 1), (REFUSED_FOR, 2), (0.0, 3)):
        assert chains.until((ROOT,), numbered(1), NOW + ahead) is None
        assert counting.count == count
    counting.validity = (NOW, NOW + 60)
    assert chains.until((ROOT,), numbered(1), NOW + REFUSED_FOR) == NOW + 60, "it has become valid"


def test_what_is_remembered_is_bounded_and_no_refused_chain_displaces_a_good_one() -> None:
    counting = Counting()
    chains = Chains(counting.verify)
    counting.validity = (NOW, NOW + 60)
    assert chains.until((ROOT,), numbered(-1), NOW) == NOW + 60
    counting.validity = None
    for number in range(REMEMBERED + 1):
        assert chains.until((ROOT,), numbered(number), NOW) is None
    assert counting.count == REMEMBERED + 2
    assert chains.until((ROOT,), numbered(-1), NOW) == NOW + 60
    assert chains.until((ROOT,), numbered(REMEMBERED), NOW) is None
    assert counting.count == REMEMBERED + 2
    assert chains.until((ROOT,), numbered(0), NOW) is None, "the first was displaced"
    assert counting.count == REMEMBERED + 3
