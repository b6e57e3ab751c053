"""Which certificates of clients (mutual TLS) a source accepts. Pure.

The client has proved that it has the certificate's key, to whatever terminates TLS:

    TLS at the ingress    OpenSSL has verified the chain, up to the first authority of *some* source: whether that
                          is one of this source's, or was issued by one, is decided here
    TLS at a proxy        a header has the certificate; the chain is verified here, by `cryptography`, as proxies
                          may pass on certificates that they haven't verified

Such a header has what a stranger likes: keys whose signatures take milliseconds, certificates that sign each other in
every order. So its signatures are verified from the authority's end, each by a key that is known to be good, and the
first that isn't one ends it; `cryptography` looks for a path only in a chain whose signatures are right.

`cryptography` is imported with the first certificate: without one, it costs nothing at startup.
"""

import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from functools import cache, lru_cache
from hashlib import sha256
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from gateway.model import RefusedError

if TYPE_CHECKING:
    from cryptography.x509 import Certificate, Name
    from cryptography.x509.verification import ExtensionPolicy, Store

CHAIN_SUFFIX = b"-chain"
"""Of the name of a header, for the one beside it with the rest of the chain."""
MAX_INTERMEDIATES = 8
"""Certificates in a header beside a client's."""
MAX_CERTIFICATE_BYTES, MAX_CHAIN_BYTES = 8 * 1024, 24 * 1024
"""Of one, and of all of them, in DER: what is in them is parsed before any of it is known to be good."""
REMEMBERED = 256
"""Chains from headers whose verification is remembered, as it takes 0.5 ms; and as many that were refused."""
REFUSED_FOR = 10.0
"""Seconds for which a refusal is remembered: later, the chain may be valid."""


class CertificateProblem(StrEnum):
    """Why a request is refused: a metric's label."""

    MISSING = "client_certificate_missing"
    MALFORMED = "client_certificate_malformed"
    REFUSED = "client_certificate_refused"


class Names(NamedTuple):
    """Whom a certificate is for, and when it expires (Unix seconds). The subject is as RFC 4514 writes it."""

    subject: str
    dns: frozenset[str]
    uris: frozenset[str]
    emails: frozenset[str]
    until: float


@dataclass(frozen=True, slots=True)
class VerifiedCertificate:
    """A certificate (DER) by which a client has authenticated itself to us.

    `chain` are the others of the chain that OpenSSL has verified, up to the first authority of any source.
    """

    certificate: bytes = field(repr=False)
    chain: tuple[bytes, ...] = field(default=(), repr=False)
    fingerprints: frozenset[bytes] = field(init=False, compare=False, repr=False)
    """Of all of these."""

    def __post_init__(self) -> None:
        found = frozenset(map(fingerprint, (self.certificate, *self.chain)))
        object.__setattr__(self, "fingerprints", found)


@dataclass(frozen=True, slots=True)
class ForwardedCertificate:
    """A certificate (DER) of which a trusted proxy says that its client has the key; the chain isn't verified yet."""

    certificate: bytes = field(repr=False)
    intermediates: tuple[bytes, ...] = field(default=(), repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientCertificates:
    """The certificates that a source accepts: those of the `authorities` (DER), for one of the names if there are any.

    A chain may end at each authority, also one that isn't self-signed.
    """

    authorities: tuple[bytes, ...] = field(repr=False)
    subjects: frozenset[str] = frozenset()
    dns: frozenset[str] = frozenset()
    uris: frozenset[str] = frozenset()
    emails: frozenset[str] = frozenset()
    digest: str = field(init=False, compare=False, repr=False)
    """Of all of them: that of another demand is another."""
    _fingerprints: frozenset[bytes] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        fingerprints = frozenset(map(fingerprint, self.authorities))
        object.__setattr__(self, "_fingerprints", fingerprints)
        names = [sorted(each) for each in (self.subjects, self.dns, self.uris, self.emails)]
        demanded = repr([sorted(fingerprints), *names]).encode("utf-8", "surrogateescape")
        object.__setattr__(self, "digest", sha256(demanded).hexdigest())

    def check(self, presented: VerifiedCertificate | ForwardedCertificate | None, *, now: float) -> str | None:
        """Return the subject of a certificate that is another's; None if it is accepted. `now` is in Unix seconds.

        Raises RefusedError (403) if it is missing, or isn't one of the authorities': then nothing in it is known.
        """
        if presented is None:
            raise _refused(CertificateProblem.MISSING, "expected a client certificate, got none")
        until: float | None = None
        if isinstance(presented, ForwardedCertificate):
            until = _chains.until(self.authorities, presented, now)
        elif not self._fingerprints.isdisjoint(presented.fingerprints):
            until = min([names_of(presented.certificate).until, *map(_expiry, presented.chain)])
        else:  # OpenSSL has ended the chain at another source's authority, which one of ours may have issued
            forwarded = ForwardedCertificate(presented.certificate, presented.chain)
            until = _chains.until(self.authorities, forwarded, now)
        if until is None:
            message = "expected a client certificate that this source's authorities have issued, got something else"
            raise _refused(CertificateProblem.REFUSED, message)
        if until <= now:  # the connection is older than that
            raise _refused(
                CertificateProblem.REFUSED, "expected a client certificate that is valid, got an expired one"
            )
        names = names_of(presented.certificate)
        return None if self._names(names) else names.subject

    def _names(self, names: Names) -> bool:
        if not (self.subjects or self.dns or self.uris or self.emails):
            return True
        return (
            names.subject in self.subjects
            or not self.dns.isdisjoint(names.dns)
            or not self.uris.isdisjoint(names.uris)
            or not self.emails.isdisjoint(names.emails)
        )


def fingerprint(certificate: bytes) -> bytes:
    return sha256(certificate).digest()


def refused_name() -> RefusedError:
    """Return the refusal of a certificate of the right authority, for somebody else."""
    return _refused(
        CertificateProblem.REFUSED, "expected a client certificate for a name that may send, got something else's"
    )


def malformed_certificate() -> RefusedError:
    """Return the refusal of a header that should have a certificate."""
    message = "expected one client certificate in the header that the proxy sets, got something else"
    return _refused(CertificateProblem.MALFORMED, message)


@lru_cache(maxsize=REMEMBERED)
def names_of(certificate: bytes) -> Names:
    """Return the names in a certificate (DER). Raises RefusedError (403) if it can't be read."""
    from cryptography import x509  # noqa: PLC0415 - only if a source needs it

    try:
        read = x509.load_der_x509_certificate(certificate)
        subject = read.subject.rfc4514_string()
        until = read.not_valid_after_utc.timestamp()
        try:
            alternatives = read.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except x509.ExtensionNotFound:
            return Names(subject, frozenset(), frozenset(), frozenset(), until)
        return Names(
            subject,
            frozenset([name.lower() for name in alternatives.get_values_for_type(x509.DNSName)]),
            frozenset(alternatives.get_values_for_type(x509.UniformResourceIdentifier)),
            frozenset(map(normal_email, alternatives.get_values_for_type(x509.RFC822Name))),
            until,
        )
    except (ValueError, x509.InvalidVersion, x509.DuplicateExtension, x509.UnsupportedGeneralNameType):
        raise malformed_certificate() from None


@lru_cache(maxsize=REMEMBERED)
def _expiry(certificate: bytes) -> float:
    """Return when an authority's certificate (DER), which OpenSSL has verified, expires. Raises RefusedError (403)."""
    from cryptography import x509  # noqa: PLC0415 - only if a source needs it

    try:
        return x509.load_der_x509_certificate(certificate).not_valid_after_utc.timestamp()
    except (ValueError, x509.InvalidVersion):
        raise malformed_certificate() from None


def normal_email(text: str) -> str:
    """Return an address as it is compared: the case of its host doesn't count (RFC 5280, section 4.2.1.6)."""
    local, at, host = text.rpartition("@")
    return f"{local}{at}{host.lower()}"


def normal_subject(text: str) -> str:
    """Return a subject (RFC 4514) as `names_of` writes it. Raises ValueError."""
    from cryptography.x509 import Name  # noqa: PLC0415 - only if a source needs it

    found = Name.from_rfc4514_string(text)
    if not [*found]:
        raise ValueError("expected a name, got an empty one")
    return found.rfc4514_string()


def read_authorities(text: str) -> tuple[bytes, ...]:
    """Return the certificates (DER) of a text with PEM. Raises ValueError, with what was expected."""
    from cryptography import x509  # noqa: PLC0415 - only if a source needs it
    from cryptography.hazmat.primitives.serialization import Encoding  # noqa: PLC0415 - the same

    try:
        found = x509.load_pem_x509_certificates(text.encode("utf-8", "replace"))
        ders = tuple(dict.fromkeys([certificate.public_bytes(Encoding.DER) for certificate in found]))
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_verify_locations(cadata=b"".join(ders))  # OpenSSL takes them, too
    except (ValueError, x509.InvalidVersion, ssl.SSLError):
        expected = "expected certificates in PEM, such as ${file:ca.pem}, got a string without one, or a broken one"
        raise ValueError(expected) from None
    return ders


Validity = tuple[float, float]
"""From when and until when a chain is valid, in Unix seconds."""
_K = TypeVar("_K")
_V = TypeVar("_V")


class Chains:
    """Until when forwarded certificates are verified by `verify`: each request has the same ones again.

    Those that were refused have places of their own, since there may be any number of them.
    """

    def __init__(self, verify: Callable[[tuple[bytes, ...], ForwardedCertificate, float], Validity | None]) -> None:
        self._verify = verify
        self._valid: dict[tuple[tuple[bytes, ...], bytes], Validity] = {}
        self._refused: dict[tuple[tuple[bytes, ...], bytes], float] = {}

    def until(self, authorities: tuple[bytes, ...], presented: ForwardedCertificate, now: float) -> float | None:
        """Return when the first certificate of the chain expires; None without a chain to one of the authorities.

        Raises RefusedError (403) for one that is too large, or can't be read.
        """
        ders = (presented.certificate, *presented.intermediates)
        sizes = list(map(len, ders))
        if len(ders) > 1 + MAX_INTERMEDIATES or max(sizes) > MAX_CERTIFICATE_BYTES or sum(sizes) > MAX_CHAIN_BYTES:
            raise malformed_certificate()
        key = authorities, fingerprint(b"".join(map(fingerprint, ders)))
        begins, expires = self._valid.get(key, (0.0, 0.0))
        if begins <= now < expires:
            return expires
        if key in self._refused and abs(now - self._refused[key]) < REFUSED_FOR:
            return None
        found = self._verify(authorities, presented, now)
        if found is None:
            _remember(self._refused, key, now)
            return None
        _remember(self._valid, key, found)
        return found[1]


def _remember(known: dict[_K, _V], key: _K, value: _V) -> None:
    known.pop(key, None)
    if len(known) >= REMEMBERED:
        del known[next(iter(known))]
    known[key] = value


def verified(authorities: tuple[bytes, ...], presented: ForwardedCertificate, now: float) -> Validity | None:
    """Return when a chain of certificates is valid; None if there is none to one of the authorities.

    Raises RefusedError (403) for one that can't be read.
    """
    from cryptography import x509  # noqa: PLC0415 - only if a source needs it
    from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415 - the same
    from cryptography.x509 import verification  # noqa: PLC0415 - the same

    moment = datetime.fromtimestamp(now, UTC)
    authority, client = _extensions()
    try:
        trusted = _trusted(authorities)
        leaf, *others = map(x509.load_der_x509_certificate, (presented.certificate, *presented.intermediates))
        path = _path(leaf, [each for each in others if _may_sign(each, moment)], trusted)
        if path is None:
            return None
        verifier = (
            verification.PolicyBuilder()
            .store(trusted.store)
            .time(moment)
            .extension_policies(ca_policy=authority, ee_policy=client)
            .build_client_verifier()
        )
        chain = verifier.verify(leaf, path[1:]).chain
    except (verification.VerificationError, UnsupportedAlgorithm):
        return None
    except (ValueError, x509.InvalidVersion, x509.DuplicateExtension, x509.UnsupportedGeneralNameType):
        raise malformed_certificate() from None
    return (
        max(each.not_valid_before_utc.timestamp() for each in chain),
        min(each.not_valid_after_utc.timestamp() for each in chain),
    )


_chains = Chains(verified)


class _Trusted(NamedTuple):
    """A source's authorities, by their names too."""

    store: "Store"
    by_name: Mapping["Name", Sequence["Certificate"]]


@lru_cache(maxsize=REMEMBERED)
def _trusted(authorities: tuple[bytes, ...]) -> _Trusted:
    from cryptography.x509 import load_der_x509_certificate  # noqa: PLC0415 - only if a source needs it
    from cryptography.x509.verification import Store  # noqa: PLC0415 - the same

    certificates = list(map(load_der_x509_certificate, authorities))
    by_name: dict[Name, list[Certificate]] = {}
    for each in certificates:
        by_name.setdefault(each.subject, []).append(each)
    return _Trusted(Store(certificates), by_name)


def _path(leaf: "Certificate", intermediates: Sequence["Certificate"], trusted: _Trusted) -> list["Certificate"] | None:
    """Return the certificates from a client's up to one that an authority has signed; None if there are none.

    By names and key ids, the shortest way: where these are ambiguous, no other one is tried. A client's that is an
    authority itself has no need of any other.
    """
    if leaf in trusted.by_name.get(leaf.subject, ()):
        return [leaf]
    for fits in (_fits, _fits_by_name):
        paths, reached = [[leaf]], {leaf}
        for path in paths:
            issuers = [each for each in trusted.by_name.get(path[-1].issuer, ()) if fits(each, path[-1])]
            if issuers:
                return path if _is_signed(path, issuers) else None
            further = [each for each in intermediates if each not in reached and fits(each, path[-1])]
            reached.update(further)
            paths += [[*path, each] for each in further]
    return None


def _is_signed(path: Sequence["Certificate"], issuers: Sequence["Certificate"]) -> bool:
    """Return whether each certificate of a path has signed the one before it, and one of `issuers` the last.

    From the last one on: so nothing is verified by a key that no authority vouches for.
    """
    for certificate in reversed(path):
        if not any(_has_signed(each, certificate) for each in issuers):
            return False
        issuers = [certificate]
    return True


def _has_signed(issuer: "Certificate", certificate: "Certificate") -> bool:
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm  # noqa: PLC0415 - only if needed

    try:
        certificate.verify_directly_issued_by(issuer)
    except (InvalidSignature, UnsupportedAlgorithm, TypeError, ValueError):
        return False
    return True


def _may_sign(certificate: "Certificate", moment: datetime) -> bool:
    """Return whether a certificate is one of an authority, and valid now."""
    from cryptography import x509  # noqa: PLC0415 - only if a source needs it

    try:
        is_authority = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        return False
    return is_authority and certificate.not_valid_before_utc <= moment <= certificate.not_valid_after_utc


def _fits_by_name(issuer: "Certificate", certificate: "Certificate") -> bool:
    return issuer.subject == certificate.issuer


def _fits(issuer: "Certificate", certificate: "Certificate") -> bool:
    """Return whether a certificate may be that of another's issuer: names are equal, and key ids if both are there."""
    from cryptography import x509  # noqa: PLC0415 - only if a source needs it

    if not _fits_by_name(issuer, certificate):
        return False
    try:
        wanted = certificate.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
        own = issuer.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.key_identifier
    except x509.ExtensionNotFound:
        return True
    return wanted is None or wanted == own


@cache
def _extensions() -> "tuple[ExtensionPolicy, ExtensionPolicy]":
    """Return what extensions authorities and clients must have.

    Less than `cryptography` demands of certificates of the web: private authorities issue some without a key usage or
    alternative names. What is there counts (RFC 5280, sections 4.2.1.3, 4.2.1.9 and 4.2.1.12).
    """
    from cryptography import x509  # noqa: PLC0415 - only if a source needs it
    from cryptography.x509.oid import ExtendedKeyUsageOID  # noqa: PLC0415 - the same
    from cryptography.x509.verification import Criticality, ExtensionPolicy  # noqa: PLC0415 - the same

    def signs_certificates(_policy: object, _certificate: object, usage: x509.KeyUsage | None) -> None:
        if usage is not None and not usage.key_cert_sign:
            raise ValueError("expected a certificate that signs others")

    def is_for_clients(_policy: object, _certificate: object, usage: x509.ExtendedKeyUsage | None) -> None:
        known = {ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE}
        if usage is not None and known.isdisjoint(usage):
            raise ValueError("expected a certificate for clients")

    everyone = Criticality.AGNOSTIC
    authority = ExtensionPolicy.permit_all().require_present(x509.BasicConstraints, everyone, None)
    authority = authority.may_be_present(x509.KeyUsage, everyone, signs_certificates)
    return authority, ExtensionPolicy.permit_all().may_be_present(x509.ExtendedKeyUsage, everyone, is_for_clients)


def _refused(problem: CertificateProblem, detail: str) -> RefusedError:
    return RefusedError(403, problem.value, detail)
