"""Tokens by which programs ask: 256 bits of randomness each, of which the gateway keeps only a digest. Pure.

    gwt_ 4fRk…(43 characters)… 0kXb2Q
    │    │                     └ CRC-32 of these 43, in 6 characters
    │    └ 256 bits, in base 62
    └ by which scanners of source code find one that was committed

The form is that of GitHub's tokens
(https://github.blog/engineering/behind-githubs-new-authentication-token-formats/): with the checksum, a scanner that
finds one knows that it is one. The digest is a plain SHA-256: there are too many tokens to try, so nothing is gained by
a slow hash, which protects what people choose.
"""

import hashlib
import hmac
import re
import zlib

PREFIX = "gwt_"
RANDOM_BYTES = 32
_RANDOM_CHARACTERS, _CHECKSUM_CHARACTERS = 43, 6
_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_TOKEN = re.compile(rf"{PREFIX}([0-9A-Za-z]{{{_RANDOM_CHARACTERS}}})([0-9A-Za-z]{{{_CHECKSUM_CHARACTERS}}})")


def token_of(random: bytes) -> str:
    """Return the token of 32 random bytes."""
    text = _in_base_62(int.from_bytes(random, "big"), _RANDOM_CHARACTERS)
    return f"{PREFIX}{text}{_checksum(text)}"


def is_token(text: str) -> bool:
    """Return whether a text has the form of a token, and the checksum of one."""
    found = _TOKEN.fullmatch(text)
    return found is not None and found[2] == _checksum(found[1])


def digest_of(token: str) -> bytes:
    """Return what is kept of a token (32 bytes)."""
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


def is_equal(digest: bytes, other: bytes) -> bool:
    """Compare two digests, in a time that tells nothing of them."""
    return hmac.compare_digest(digest, other)


def _checksum(text: str) -> str:
    return _in_base_62(zlib.crc32(text.encode()), _CHECKSUM_CHARACTERS)


def _in_base_62(number: int, characters: int) -> str:
    digits = []
    for _ in range(characters):
        number, digit = divmod(number, len(_ALPHABET))
        digits.append(_ALPHABET[digit])
    return "".join(reversed(digits))
