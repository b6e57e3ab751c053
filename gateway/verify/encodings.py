"""How signatures and secrets are written: hexadecimal digits, base64 and its variants."""

import binascii
import functools
import hashlib
import unicodedata
from base64 import urlsafe_b64encode
from collections.abc import Callable, Mapping

ENCODINGS: Mapping[str, Callable[[bytes], bytes]] = {
    "hex": binascii.hexlify,
    "hex-upper": lambda digest: binascii.hexlify(digest).upper(),
    "base64": functools.partial(binascii.b2a_base64, newline=False),
    "base64url": lambda digest: urlsafe_b64encode(digest).rstrip(b"="),  # as JWS has it, RFC 7515, section 2
}
"""How a signature is written."""

SECRET_ENCODINGS: Mapping[str, str] = {
    "raw": "a string",
    "hex": "hexadecimal digits",
    "base64": "base64",
    "whsec": "base64 after whsec_",
    "nfkd": "a string",
    "sha1": "a string",
}
"""How a secret is written, in words. Of `nfkd` the key is the string in Unicode's form NFKD, of `sha1` its SHA-1."""


def base64_key(text: str) -> bytes:
    """Return the key that a base64 secret encodes. Raises ValueError for any other string, and for an empty key."""
    bare = text.rstrip("=")
    key = binascii.a2b_base64(bare + "=" * (-len(bare) % 4), strict_mode=True)  # Some issuers leave the padding out.
    if not key:  # anyone could make its signatures
        raise ValueError
    return key


def signing_key(text: str) -> bytes:
    """Return the key of a Standard Webhooks secret: base64, after `whsec_` or without it. Raises ValueError."""
    return base64_key(text.removeprefix("whsec_"))


def decode_secret(text: str, encoding: str) -> bytes:
    """Return the key that a secret stands for; empty if it isn't in that encoding."""
    try:
        return _SECRET_DECODERS[encoding](text)
    except ValueError:
        return b""


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


_SECRET_DECODERS: Mapping[str, Callable[[str], bytes]] = {
    "raw": _utf8,
    "hex": binascii.unhexlify,
    "base64": base64_key,
    "whsec": signing_key,
    "nfkd": lambda text: _utf8(unicodedata.normalize("NFKD", text)),
    "sha1": lambda text: hashlib.sha1(_utf8(text), usedforsecurity=False).digest(),
}
