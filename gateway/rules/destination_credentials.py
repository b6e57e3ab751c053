"""A destination's credentials, built from the rules: authorization headers, certificates and TLS contexts."""

import os
import re
import ssl
import tempfile
from base64 import b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from weakref import WeakValueDictionary

from gateway.rules.rules import Rules, Tls

CERTIFICATES = 1024
"""Maximum certificate texts whose expiry is cached across reloads."""

_BLOCK = re.compile(r"-----BEGIN ([A-Z0-9 ]+)-----[\s!-~]*?-----END \1-----", re.ASCII)  # RFC 7468
_in_use: WeakValueDictionary[tuple[str | None, str | None, str | None], Tls] = WeakValueDictionary()
"""The TLS settings in use, by their PEM texts.

A context with the system's authorities takes 25 ms and half a megabyte, so equal settings share one, also across a
reload. The references are weak: rotated settings, with their private keys, are freed with the last rules and
connections that use them.
"""


class TlsError(Exception):
    """A value in `tls` can't be used. `str()` says what was expected, without showing the value."""

    def __init__(self, key: str, message: str) -> None:
        super().__init__(message)
        self.key = key


def basic_authorization(username: str, password: str) -> str:
    """Return the value of an `Authorization` or `Proxy-Authorization` header (RFC 7617, in UTF-8)."""
    return "Basic " + b64encode(f"{username}:{password}".encode()).decode("ascii")


def tls_of(*, ca: str | None, certificate: str | None, key: str | None) -> Tls:
    """Build a destination's TLS from PEM texts, ignoring everything in them but the relevant blocks.

    A `ca` replaces the system's authorities. Raises TlsError. Blocks for a while, so don't call it on the event loop.
    """
    texts = (
        None if ca is None else blocks("ca", ca, "CERTIFICATE"),
        None if certificate is None else blocks("certificate", certificate, "CERTIFICATE"),
        None if key is None else blocks("key", key, "PRIVATE KEY"),
    )
    tls = _in_use.get(texts)
    if tls is None:
        tls = _in_use[texts] = _tls(*texts)
    return tls


def certificate_expiries(rules: Rules) -> dict[str, float]:
    """Return when (Unix seconds) the destinations' certificates expire, such as `ci/certificate` and `ci/ca`.

    Blocks for a while, so don't call it on the event loop.
    """
    expiries: dict[str, float] = {}
    for name, destination in rules.destinations.items():
        tls = None if destination.access is None else destination.access.tls
        if tls is not None:
            expiries |= {f"{name}/{kind}": at for kind, at in expiries_of(tls).items()}
    return expiries


def expiries_of(tls: Tls) -> dict[str, float]:
    """Return when (Unix seconds) `ca` and `certificate` expire; if a text has several, the first to expire."""
    texts = {"ca": tls.ca, "certificate": tls.certificate}
    found = {kind: _expiry_of(text) for kind, text in texts.items() if text is not None}
    return {kind: at for kind, at in found.items() if at is not None}


@lru_cache(maxsize=CERTIFICATES)
def _expiry_of(text: str) -> float | None:
    from cryptography import x509  # noqa: PLC0415 - 9 MiB that most gateways don't need

    try:
        certificates = x509.load_pem_x509_certificates(text.encode("ascii"))
    except ValueError:
        return None  # OpenSSL accepts some that a strict parser doesn't
    return min(certificate.not_valid_after_utc.timestamp() for certificate in certificates)


def _tls(ca: str | None, certificate: str | None, key: str | None) -> Tls:
    try:
        context = ssl.create_default_context(cadata=ca)
    except (ssl.SSLError, ValueError) as error:
        raise TlsError("ca", f"expected valid certificates, got others{_reason(error)}") from None
    if certificate is not None and key is not None:
        present(context, certificate, key)
    return Tls(ca=ca, certificate=certificate, key=key, context=context)


def present(context: ssl.SSLContext, certificate: str, key: str) -> None:
    """Add a certificate (PEM) to a context: a client presents it if a server requests one, a server to all clients.

    Raises TlsError.
    """
    is_encrypted = False

    def passphrase() -> str:  # without this OpenSSL would ask on the terminal
        nonlocal is_encrypted
        is_encrypted = True
        return ""

    try:
        with _file(certificate) as certificate_path, _file(key) as key_path:
            context.load_cert_chain(certificate_path, key_path, passphrase)
    except (ssl.SSLError, ValueError) as error:
        if is_encrypted:
            raise TlsError("key", "expected a private key without a passphrase, got an encrypted one") from None
        if isinstance(error, ssl.SSLError) and error.reason in {"KEY_VALUES_MISMATCH", "KEY_TYPE_MISMATCH"}:
            raise TlsError("key", "expected the private key of the certificate, got something else") from None
        message = f"expected a certificate and a private key that can be used, got others{_reason(error)}"
        raise TlsError("certificate", message) from None


@contextmanager
def _file(text: str) -> Iterator[str]:
    """Provide a string as a file, since `ssl` reads keys from files only."""
    if hasattr(os, "memfd_create"):  # a key shouldn't be written to a disk
        with open(os.memfd_create("tls"), "wb", buffering=0) as file:  # noqa: PTH123 # a descriptor, not a path
            file.write(text.encode("ascii"))
            yield f"/proc/self/fd/{file.fileno()}"
    else:  # not Linux
        with tempfile.NamedTemporaryFile() as file:
            file.write(text.encode("ascii"))
            file.flush()
            yield file.name


def blocks(key: str, text: str, label: str) -> str:
    """Return the PEM blocks with this label, without the text around them: `ssl` only accepts ASCII.

    Raises TlsError for the key of `tls` if there are none.
    """
    found = [block[0] for block in _BLOCK.finditer(text) if block[1].endswith(label)]
    if not found:
        raise TlsError(key, f"expected a {label.lower()} in PEM, such as ${{file:{key}.pem}}, got a string without one")
    return "\n".join(found) + "\n"


def _reason(error: Exception) -> str:
    reason = error.reason if isinstance(error, ssl.SSLError) else None
    return f" ({reason.lower().replace('_', ' ')})" if reason else ""
