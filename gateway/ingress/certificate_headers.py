"""Client certificates in headers, as proxies that terminate TLS set them. Pure.

xfcc      Hash=…;Cert="-----BEGIN%20CERTIFICATE…";Chain="…"   Envoy, Istio: one element for each proxy, the last one
          is the nearest proxy's (https://www.envoyproxy.io/docs/envoy/latest/configuration/http/http_conn_man/headers,
          x-forwarded-client-cert). It must be told to add `cert`, and can add `chain`
pem       -----BEGIN%20CERTIFICATE…   a PEM text, percent-encoded: nginx's $ssl_client_escaped_cert, AWS's
          X-Amzn-Mtls-Clientcert (there with +, = and / as they are), Traefik's X-Forwarded-Tls-Client-Cert (base64
          alone, and a comma between several). The first is the client's, others are its chain
rfc9440   :MIIB…:   a byte sequence with DER, in Client-Cert; its chain is a list in Client-Cert-Chain (RFC 9440,
          sections 2.2 and 2.3). HAProxy and Caddy can be told to set it
"""

import binascii
import re
from collections.abc import Sequence
from typing import assert_never
from urllib.parse import unquote_to_bytes

from gateway.rules.rules import CertificateFormat
from gateway.verify.client_certificates import (
    MAX_INTERMEDIATES,
    ForwardedCertificate,
    malformed_certificate,
)

_BLOCK = re.compile(rb"\s*-----BEGIN CERTIFICATE-----([A-Za-z0-9+/=\s]+)-----END CERTIFICATE-----\s*")
_SEQUENCE = re.compile(rb":([A-Za-z0-9+/]+={0,2}):")
_PAIR = re.compile(rb'([A-Za-z]+)=("(?:[^"\\]|\\.)*"|[^",;]*)')


def certificate_in(
    format_: CertificateFormat, values: Sequence[bytes], chain: Sequence[bytes] = ()
) -> ForwardedCertificate | None:
    """Return the certificate in the values of a header, and of its `…-Chain` header; None if there is none.

    Raises RefusedError (403) for values that aren't as this format has them, also for more than one line: then the
    proxy passes on what its client has sent.
    """
    if len(values) > 1:
        raise malformed_certificate()
    value = values[0].strip(b" \t") if values else b""
    if not value:
        return None
    match format_:
        case CertificateFormat.XFCC:
            certificates = _of_envoy(value)
        case CertificateFormat.PEM:
            certificates = _of_text(unquote_to_bytes(value))
        case CertificateFormat.RFC9440:
            certificates = [_of_sequence(value), *map(_of_sequence, _items(chain))]
        case _:
            assert_never(format_)
    if len(certificates) > 1 + MAX_INTERMEDIATES:
        raise malformed_certificate()
    return ForwardedCertificate(certificates[0], tuple(certificates[1:]))


def _of_envoy(value: bytes) -> list[bytes]:
    pairs: dict[bytes, list[bytes]] = {}
    at = 0
    while True:
        found = _PAIR.match(value, at)
        if found is None:
            raise malformed_certificate()
        text = found[2]
        if text.startswith(b'"'):
            text = re.sub(rb"\\(.)", rb"\1", text[1:-1])
        pairs.setdefault(found[1].lower(), []).append(text)
        at = found.end()
        if at == len(value):
            break
        if value[at : at + 1] == b",":  # of a proxy further away
            pairs = {}
            at += 1
            while value[at : at + 1] == b" ":
                at += 1
        elif value[at : at + 1] == b";":
            at += 1
        else:
            raise malformed_certificate()
    leaf = pairs.get(b"cert", [])
    if len(leaf) != 1:  # without `cert` there is nothing to verify
        raise malformed_certificate()
    chain = [each for text in pairs.get(b"chain", []) for each in _of_text(unquote_to_bytes(text))]
    own = _of_text(unquote_to_bytes(leaf[0]))
    return [*own, *[each for each in chain if each not in own]]


def _of_text(text: bytes) -> list[bytes]:
    """Return the certificates in a PEM text; of base64 alone, those between commas."""
    if not text.lstrip().startswith(b"-----"):
        return [_decoded(each) for each in text.split(b",")]
    found: list[bytes] = []
    at = 0
    while at < len(text):
        block = _BLOCK.match(text, at)
        if block is None:
            raise malformed_certificate()
        found.append(_decoded(b"".join(block[1].split())))
        at = block.end()
    return found


def _items(lines: Sequence[bytes]) -> list[bytes]:
    return [item.strip(b" \t") for line in lines for item in line.split(b",")]


def _of_sequence(item: bytes) -> bytes:
    found = _SEQUENCE.fullmatch(item)
    if found is None:
        raise malformed_certificate()
    return _decoded(found[1])


def _decoded(text: bytes) -> bytes:
    try:
        found = binascii.a2b_base64(text, strict_mode=True)
    except ValueError:
        raise malformed_certificate() from None
    if not found:
        raise malformed_certificate()
    return found
