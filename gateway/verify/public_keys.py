"""Signatures by private keys: only the sender can make them, and everybody may know the keys that verify them.

`cryptography` is imported with the first key that is read: without one, it costs nothing at startup.
"""

import binascii
from base64 import urlsafe_b64decode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from typing_extensions import override

from gateway.verify.algorithms import Message, OfSenderAloneError
from gateway.verify.content import Content, FieldPath
from gateway.verify.encodings import ENCODINGS
from gateway.verify.key_ring import KeyEntry, KeyRing
from gateway.verify.remote_keys import KeyLocations
from gateway.verify.request import Reason, refused

MAX_KEY_BYTES = 16 * 1024  # of a key as it is written; one of RSA with 8192 bits has 1.5 KiB
MIN_RSA_BITS, MAX_RSA_BITS = 2048, 8192  # fewer can be factored, and more take milliseconds for each signature
MAX_TRIED = 4  # candidates: each costs a hundred times what an HMAC costs, and anybody may send them


class _Kind(NamedTuple):
    """An algorithm: what its keys are, and how many bytes its signatures have."""

    key: str
    least: int
    most: int


_KINDS: Mapping[str, _Kind] = {
    "ed25519": _Kind("an Ed25519 public key", 64, 64),
    # A sequence of two integers below 2^256: RFC 3279, section 2.2.3.
    "ecdsa-p256-sha256": _Kind("a P-256 public key", 8, 72),
    "rsa-sha256": _Kind("an RSA public key of 2048 to 8192 bits", MIN_RSA_BITS // 8, MAX_RSA_BITS // 8),
    "rsa-sha1": _Kind("an RSA public key of 2048 to 8192 bits", MIN_RSA_BITS // 8, MAX_RSA_BITS // 8),
    "rsa-pss-sha512": _Kind("an RSA public key of 2048 to 8192 bits", MIN_RSA_BITS // 8, MAX_RSA_BITS // 8),
}
ALGORITHMS = ("ed25519", "ecdsa-p256-sha256", "rsa-sha256", "rsa-sha1")
"""Ed25519 (RFC 8032), ECDSA with DER, and RSA with PKCS #1 v1.5 (RFC 8017, section 8.2)."""


@dataclass(frozen=True, slots=True)
class PublicKey:
    """A public key: its SubjectPublicKeyInfo, and whether a signature is one of a message with its private key."""

    der: bytes
    verifies: Callable[[bytes, bytes], bool] = field(compare=False, repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class PublicKeys:
    """A signature by one of several private keys, known by their public keys. `encoding` is one of ENCODINGS.

    With `key_url`, the request names one that must be fetched.
    """

    algorithm: str
    encoding: str
    keys: KeyRing[PublicKey] = field(default_factory=KeyRing)
    key_url: "KeyUrl | None" = None

    @property
    def name(self) -> str:
        return self.algorithm

    @property
    def form(self) -> str:
        kind = _KINDS[self.algorithm]
        size = str(kind.least) if kind.least == kind.most else f"{kind.least} to {kind.most}"
        return f"{size} bytes in {self.encoding}"

    def fits(self, candidate: bytes) -> bool:
        return decode_signature(candidate, self.algorithm, self.encoding) is not None

    def match(self, candidates: Sequence[bytes], message: Message, content: Content) -> KeyEntry[PublicKey] | None:
        signed = message(b"")
        signatures = self._signatures(candidates)
        # No secrets: whoever knows the keys sees by itself which one it is.
        return next(
            (entry for entry in self._known(content) if any(entry.key.verifies(each, signed) for each in signatures)),
            None,
        )

    def sign(self, message: Message, now: float) -> bytes:  # noqa: ARG002 - of the protocol
        raise OfSenderAloneError("" if self.key_url else "; if the public one is yours, give yours as --secret, in PEM")

    def _known(self, content: Content) -> Sequence[KeyEntry[PublicKey]]:
        if self.key_url is None:
            return self.keys.at(content.now)
        return (KeyEntry(fetched_key(self.key_url.read(content), self.algorithm, content)),)

    def _signatures(self, candidates: Sequence[bytes]) -> list[bytes]:
        if len(candidates) > MAX_TRIED:
            expected = f"expected at most {MAX_TRIED} signatures of {self.algorithm}"
            raise refused(Reason.MALFORMED_SIGNATURE, f"{expected}, got {len(candidates)}")
        decoded = [decode_signature(each, self.algorithm, self.encoding) for each in candidates]
        return [each for each in decoded if each is not None]


@dataclass(frozen=True, slots=True, kw_only=True)
class SigningKey(PublicKeys):
    """Public keys, and a private key of ours with which test events are signed."""

    signs: Callable[[bytes], bytes] = field(repr=False)

    @override
    def sign(self, message: Message, now: float) -> bytes:
        return ENCODINGS[self.encoding](self.signs(message(b"")))


def with_private_key(keys: PublicKeys, pem: str) -> SigningKey:
    """Return keys of one of the ALGORITHMS with a private key in PEM, without a password.

    It need not be one of theirs: what it signs is then refused. Raises ValueError for what is none of the algorithm.
    """
    from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415 - only if a test event needs it
    from cryptography.hazmat.primitives.serialization import load_pem_private_key  # noqa: PLC0415 - the same

    algorithm = keys.algorithm
    try:
        key: Any = load_pem_private_key(pem.encode(), None)
        public_key(key.public_key(), algorithm)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        expected = f"expected the private key of {_KINDS[algorithm].key} in PEM, without a password"
        raise ValueError(f"{expected}, got something else") from error
    match algorithm:
        case "ed25519":
            how: tuple[object, ...] = ()
        case "ecdsa-p256-sha256":
            how = (_ecdsa(),)
        case _:
            how = _pkcs1(algorithm)
    signs = partial(_signed, key, how)
    return SigningKey(algorithm=algorithm, encoding=keys.encoding, keys=keys.keys, key_url=keys.key_url, signs=signs)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyUrl:
    """Where a request names the address of its key: in a header (in lower case), or in a field of the JSON body."""

    header: bytes | None = None
    path: FieldPath = ()
    locations: KeyLocations

    def read(self, content: Content) -> str:
        """Return the address, one of the vendor's. Raises RefusedError."""
        text = content.field(self.path) if self.header is None else content.header(self.header)
        if text is None:
            where = f"in the field {'.'.join(map(str, self.path))}" if self.header is None else self.header.decode()
            raise refused(Reason.BAD_KEY, f"expected the address of a key {where}, got none")
        return self.locations.url(text)


def fetched_key(url: str, algorithm: str, content: Content) -> PublicKey:
    """Return the key at an address. Raises KeyNeededError if it must be fetched, RefusedError if it isn't good."""
    try:
        return public_key(content.fetched_key(url).key, algorithm)
    except ValueError as error:
        raise refused(Reason.BAD_KEY, f"expected {_KINDS[algorithm].key} at its address, got something else") from error


def decode_signature(text: bytes, algorithm: str, encoding: str) -> bytes | None:
    """Return the bytes of a signature; None if it has no length of the algorithm's, or isn't its only spelling."""
    kind = _KINDS[algorithm]
    if len(text) > 2 * kind.most:
        return None
    try:
        signature = _DECODERS[encoding](text)
    except ValueError:  # binascii.Error is one
        return None
    # Neither upper-case digits nor bits that don't count: each string is another signature, or none.
    is_canonical = kind.least <= len(signature) <= kind.most and ENCODINGS[encoding](signature) == text
    return signature if is_canonical else None


def read_public_key(text: str, algorithm: str) -> PublicKey:
    """Return a key that is written as PEM, as base64 of its DER, or for Ed25519 as its 32 bytes in hex or base64.

    Raises ValueError with what was expected.
    """
    try:
        return public_key(_parsed(text.strip(), algorithm), algorithm)
    except ValueError as error:
        written = ", or its 32 bytes in hex or base64" if algorithm == "ed25519" else ""
        raise ValueError(f"expected {_KINDS[algorithm].key} as PEM or base64{written}") from error


def public_key(key: object, algorithm: str) -> PublicKey:
    """Return a key of `cryptography` as one of this algorithm. Raises ValueError if it is of another kind or size."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa  # noqa: PLC0415 - only if a source needs it
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat  # noqa: PLC0415 - the same

    match algorithm, key:
        case "ed25519", ed25519.Ed25519PublicKey() if not _is_of_small_order(key.public_bytes_raw()):
            verifies = _verifier(key)
        case "ecdsa-p256-sha256", ec.EllipticCurvePublicKey() if isinstance(key.curve, ec.SECP256R1):
            verifies = _verifier(key, _ecdsa())
        case (("rsa-sha256" | "rsa-sha1"), rsa.RSAPublicKey()) if MIN_RSA_BITS <= key.key_size <= MAX_RSA_BITS:
            verifies = _verifier(key, *_pkcs1(algorithm))
        case "rsa-pss-sha512", rsa.RSAPublicKey() if MIN_RSA_BITS <= key.key_size <= MAX_RSA_BITS:
            verifies = _verifier(key, *_pss())
        case _:
            raise ValueError(_KINDS[algorithm].key)
    return PublicKey(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo), verifies)


def _parsed(text: str, algorithm: str) -> object:
    from cryptography.exceptions import UnsupportedAlgorithm  # noqa: PLC0415 - only if a source needs it
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey  # noqa: PLC0415 - the same
    from cryptography.hazmat.primitives.serialization import (  # noqa: PLC0415 - the same
        load_der_public_key,
        load_pem_public_key,
    )

    if len(text) > MAX_KEY_BYTES or not text.isascii():
        raise ValueError(algorithm)
    try:
        if text.startswith("-----BEGIN "):
            return load_pem_public_key(text.encode())
        if algorithm == "ed25519" and len(text) == _RAW_HEX:
            return Ed25519PublicKey.from_public_bytes(binascii.unhexlify(text))
        # Consoles show it in lines, too.
        der = binascii.a2b_base64("".join(text.split()), strict_mode=True)
        if algorithm == "ed25519" and len(der) == _RAW:
            return Ed25519PublicKey.from_public_bytes(der)
        return load_der_public_key(der)
    except UnsupportedAlgorithm as error:
        raise ValueError(algorithm) from error


def _verifier(key: Any, *how: object) -> Callable[[bytes, bytes], bool]:  # noqa: ANN401 - three types, not related
    from cryptography.exceptions import InvalidSignature  # noqa: PLC0415 - only if a source needs it

    def verifies(signature: bytes, message: bytes) -> bool:
        try:
            key.verify(signature, message, *how)
        except InvalidSignature:
            return False
        return True

    return verifies


def _signed(key: Any, how: Sequence[object], message: bytes) -> bytes:  # noqa: ANN401 - three types, not related
    return bytes(key.sign(message, *how))


def _ecdsa() -> object:
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA  # noqa: PLC0415 - only if a source needs it
    from cryptography.hazmat.primitives.hashes import SHA256  # noqa: PLC0415 - the same

    return ECDSA(SHA256())


def _pkcs1(algorithm: str) -> tuple[object, object]:
    from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15  # noqa: PLC0415 - only if a source needs it
    from cryptography.hazmat.primitives.hashes import SHA1, SHA256  # noqa: PLC0415 - the same

    return PKCS1v15(), SHA256() if algorithm == "rsa-sha256" else SHA1()  # noqa: S303 - a vendor's, who has no other


def _pss() -> tuple[object, object]:
    from cryptography.hazmat.primitives.asymmetric.padding import MGF1, PSS  # noqa: PLC0415 - only if a source needs it
    from cryptography.hazmat.primitives.hashes import SHA512  # noqa: PLC0415 - the same

    return PSS(mgf=MGF1(SHA512()), salt_length=64), SHA512()  # RFC 9421, section 3.3.1


def _is_of_small_order(key: bytes) -> bool:
    """Return whether anybody could sign for this point of Ed25519, whose multiples are fewer than nine."""
    return int.from_bytes(key, "little") & _WITHOUT_SIGN in _SMALL_ORDER


_RAW, _RAW_HEX = 32, 64
_P = 2**255 - 19
_WITHOUT_SIGN = 2**255 - 1
_Y_OF_ORDER_8 = 0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826
_SMALL_ORDER = frozenset((0, 1, _P - 1, _P, _P + 1, _Y_OF_ORDER_8, _P - _Y_OF_ORDER_8))
"""The y of the points whose order divides 8, also as encodings that are larger than the field's."""
_DECODERS: Mapping[str, Callable[[bytes], bytes]] = {
    "hex": binascii.unhexlify,
    "hex-upper": binascii.unhexlify,
    "base64": lambda text: binascii.a2b_base64(text, strict_mode=True),
    "base64url": lambda text: urlsafe_b64decode(text + b"=" * (-len(text) % 4)),
}
