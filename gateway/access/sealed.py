"""Text that a browser keeps for us, and can neither read nor change: sealed by AES-256-GCM. Pure.

The key is derived from a secret by HKDF (RFC 5869), so the secret may be any long text. Each sealed text is bound to
what it is for, so that one of another kind can't be taken for it. A nonce is random: a key is good for 2³² texts (NIST
SP 800-38D, section 8.3). A thousand sessions that are sealed anew each minute need 8 years for that.
"""

import binascii
from base64 import urlsafe_b64decode, urlsafe_b64encode
from functools import cached_property
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

NONCE_BYTES = 12
MAX_TEXT = 3800
"""Characters of a sealed text: a browser keeps 4,096 bytes of a cookie, its name and attributes included."""
_TAG_BYTES = 16


class Seal:
    """Seals, and opens what was sealed with the same secret."""

    def __init__(self, secret: bytes) -> None:
        self._secret = secret

    def close(self, purpose: str, content: bytes, nonce: bytes) -> str:
        """Return the sealed text of a content; `nonce` are NONCE_BYTES random bytes, never used before.

        Raises ValueError for one that would be longer than MAX_TEXT.
        """
        sealed = nonce + self._cipher.encrypt(nonce, content, purpose.encode())
        text = _written(sealed)
        if len(text) > MAX_TEXT:
            raise ValueError(f"expected at most {MAX_TEXT} characters when sealed, got {len(text)}")
        return text

    def open(self, purpose: str, text: str) -> bytes | None:
        """Return the content of a text that was sealed for this purpose, None of any other."""
        from cryptography.exceptions import InvalidTag  # noqa: PLC0415 - only where somebody signs in

        if len(text) > MAX_TEXT or not text.isascii():
            return None
        try:
            sealed = urlsafe_b64decode(text + "=" * (-len(text) % 4))
        except (binascii.Error, ValueError):
            return None
        if len(sealed) < NONCE_BYTES + _TAG_BYTES or _written(sealed) != text:  # one spelling alone
            return None
        try:
            return self._cipher.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], purpose.encode())
        except InvalidTag:
            return None

    @cached_property
    def _cipher(self) -> "AESGCM":
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: PLC0415 - as above
        from cryptography.hazmat.primitives.hashes import SHA256  # noqa: PLC0415 - as above
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF  # noqa: PLC0415 - as above

        derived = HKDF(algorithm=SHA256(), length=32, salt=None, info=b"webhook-gateway sessions 1")
        return AESGCM(derived.derive(self._secret))


def _written(sealed: bytes) -> str:
    return urlsafe_b64encode(sealed).rstrip(b"=").decode()
