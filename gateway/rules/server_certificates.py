"""The certificates that the ingress presents to senders: reads their files, and builds TLS contexts.

They are settings of the process, not rules. They are here because they use `destination_credentials.py`.
"""

import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gateway.model import UsageError
from gateway.rules.destination_credentials import TlsError, blocks, present
from gateway.rules.yaml_document import reason_of

CIPHERS = (
    *("ECDHE-ECDSA-AES128-GCM-SHA256", "ECDHE-RSA-AES128-GCM-SHA256"),
    *("ECDHE-ECDSA-AES256-GCM-SHA384", "ECDHE-RSA-AES256-GCM-SHA384"),
    *("ECDHE-ECDSA-CHACHA20-POLY1305", "ECDHE-RSA-CHACHA20-POLY1305"),
)
"""Cipher suites for TLS 1.2: Mozilla's intermediate configuration (https://wiki.mozilla.org/Security/Server_Side_TLS,
version 5.7) without DHE. All are AEAD with forward secrecy. Those of TLS 1.3 aren't configurable and needn't be."""
ALPN = ("http/1.1",)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerCertificate:
    """A certificate with its chain and its key, as PEM. `names` are its hosts in lower case, also `*.example.com`.

    `until` is when the first certificate of the chain expires, in Unix seconds.
    """

    file: Path
    names: tuple[str, ...]
    until: float
    certificate: str = field(repr=False)
    key: str = field(repr=False)

    @property
    def name(self) -> str:
        """Return its name for display and metrics."""
        return self.names[0] if self.names else self.file.name


def read_certificates(files: Sequence[tuple[Path, Path]]) -> tuple[ServerCertificate, ...]:
    """Read pairs of a certificate file and a key file, which may be the same. All that are returned are usable.

    Raises UsageError with every problem, one per line; it shows nothing of a key. Blocks for a while.
    """
    found: list[ServerCertificate] = []
    problems: list[str] = []
    for certificate, key in files:
        try:
            read = _read(certificate, key)
            server_context(read)
            found.append(read)
        except TlsError as error:
            where, path = ("--tls-key", key) if error.key == "key" else ("--tls-certificate", certificate)
            problems.append(f"{where}: {path}: {error}")
    if problems:
        raise UsageError("\n".join(problems))
    return tuple(found)


def server_context(certificate: ServerCertificate, authorities: Sequence[bytes] = ()) -> ssl.SSLContext:
    """Build the context of connections to a certificate's names.

    With `authorities` (DER), clients are asked for a certificate. They needn't have one, but it must be issued by one
    of these. There are no session tickets: a resumed session has no certificate chain to check, and all tickets would
    share one key for as long as the process runs. Raises TlsError.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(":".join(CIPHERS))
    # The client knows which cipher its hardware supports.
    context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_RENEGOTIATION
    context.num_tickets = 0
    context.set_alpn_protocols(list(ALPN))
    present(context, certificate.certificate, certificate.key)
    if authorities:
        context.load_verify_locations(cadata=b"".join(authorities))
        context.verify_mode = ssl.CERT_OPTIONAL
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


class ServerNames:
    """Chooses the context by the name that a client asks for (SNI, RFC 6066); the first one for unknown names.

    `default` is the context with which connections begin.
    """

    def __init__(self, certificates: Sequence[ServerCertificate], authorities: Sequence[bytes] = ()) -> None:
        contexts = [server_context(each, authorities) for each in certificates]
        self._contexts: Mapping[str, ssl.SSLContext] = {
            name: context
            for each, context in reversed([*zip(certificates, contexts, strict=True)])  # the first one wins
            for name in each.names
        }
        self.default = contexts[0]
        if len(contexts) > 1:
            self.default.sni_callback = self._choose

    def _choose(self, connection: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
        if name is not None:
            connection.context = self.context_for(name)

    def context_for(self, name: str) -> ssl.SSLContext:
        """Return the context for a name. A `*` matches one label (RFC 9525, section 6.3)."""
        name = name.lower().rstrip(".")
        exact = self._contexts.get(name)
        if exact is not None:
            return exact
        return self._contexts.get(f"*.{name.partition('.')[2]}", self.default)


def _read(certificate_path: Path, key_path: Path) -> ServerCertificate:
    from cryptography import x509  # noqa: PLC0415 - 9 MiB, unless TLS is terminated elsewhere

    certificate = blocks("certificate", _text("certificate", certificate_path), "CERTIFICATE")
    key = blocks("key", _text("key", key_path), "PRIVATE KEY")
    try:
        chain = x509.load_pem_x509_certificates(certificate.encode("ascii"))
        try:
            found = chain[0].extensions.get_extension_for_class(x509.SubjectAlternativeName).value
            names = found.get_values_for_type(x509.DNSName)
        except x509.ExtensionNotFound:
            names = []
    except (ValueError, x509.InvalidVersion, x509.DuplicateExtension, x509.UnsupportedGeneralNameType):
        raise TlsError("certificate", "expected certificates that can be read, got others") from None
    return ServerCertificate(
        file=certificate_path,
        names=tuple(dict.fromkeys([name.lower() for name in names])),
        until=min(each.not_valid_after_utc.timestamp() for each in chain),
        certificate=certificate,
        key=key,
    )


def _text(key: str, path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise TlsError(key, f"expected a file, got: {reason_of(error)}") from None
