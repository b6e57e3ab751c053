"""Which certificates of clients (mutual TLS) a source accepts. Pure.

The client has proved that it has the certificate's key, to whatever terminates TLS:

    TLS at the ingress    OpenSSL has verified the chain, up to an authority of *some* source: whether that is one
                          of this source's is decided here
    TLS at a proxy        a header has the certificate; the chain is verified here, by `cryptography`, as proxies
                          may pass on certificates that they haven't verified

`cryptography` is imported with the first certificate: without one, it costs nothing at startup.
"""

import ssl
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from functools import cache, lru_cache
from hashlib import sha256
from typing import TYPE_CHECKING, NamedTuple

from gateway.model import RefusedError

if TYPE_CHECKING:
    from cryptography.x509.verification import ExtensionPolicy

CHAIN_SUFFIX = b"-chain"
"""Of the name of a header, for the one beside it with the rest of the chain."""
MAX_INTERMEDIATES = 8
"""Certificates between a client's and its authority: each may cost a signature's verification."""
REMEMBERED = 256
"""Chains from headers whose verification is remembered, as it takes 0.3 ms."""


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
    """A certificate (DER) by which a client has authenticated itself to us; `chain` are its chain's fingerprints."""

    certificate: bytes = field(repr=False)
    chain: frozenset[bytes] = field(repr=False)


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
        elif not self._fingerprints.isdisjoint(presented.chain):
            until = names_of(presented.certificate).until
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


class _Chains:
    """Until when forwarded certificates are verified: verifying one takes 0.3 ms, and each request has it again."""

    def __init__(self) -> None:
        self._known: dict[tuple[tuple[bytes, ...], ForwardedCertificate], tuple[float, float]] = {}

    def until(self, authorities: tuple[bytes, ...], presented: ForwardedCertificate, now: float) -> float | None:
        """Return when the first certificate of the chain expires; None without a chain to one of the authorities."""
        key = authorities, presented
        begins, expires = self._known.get(key, (0.0, 0.0))
        if not begins <= now < expires:
            found = _verified(authorities, presented, now)
            if found is None:
                return None
            begins, expires = found
            if len(self._known) >= REMEMBERED:
                del self._known[next(iter(self._known))]
            self._known[key] = found
        return expires


_chains = _Chains()


def _verified(
    authorities: tuple[bytes, ...], presented: ForwardedCertificate, now: float
) -> tuple[float, float] | None:
    """Return from when and until when a chain of certificates is valid; None if there is none."""
    from cryptography import x509  # noqa: PLC0415 - only if a source needs it
    from cryptography.x509 import verification  # noqa: PLC0415 - the same

    if len(presented.intermediates) > MAX_INTERMEDIATES:
        raise malformed_certificate()
    try:
        leaf = x509.load_der_x509_certificate(presented.certificate)
        intermediates = list(map(x509.load_der_x509_certificate, presented.intermediates))
    except (ValueError, x509.InvalidVersion):
        raise malformed_certificate() from None
    authority, client = _extensions()
    verifier = (
        verification.PolicyBuilder()
        .store(verification.Store(list(map(x509.load_der_x509_certificate, authorities))))
        .time(datetime.fromtimestamp(now, UTC))
        .extension_policies(ca_policy=authority, ee_policy=client)
        .build_client_verifier()
    )
    try:
        chain = verifier.verify(leaf, intermediates).chain
    except verification.VerificationError:
        return None
    except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType):  # in what it names
        raise malformed_certificate() from None
    return (
        max(each.not_valid_before_utc.timestamp() for each in chain),
        min(each.not_valid_after_utc.timestamp() for each in chain),
    )


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
