"""Signatures by private keys: how keys and signatures are written, and that nothing else passes or crashes."""

import base64
import subprocess
import sys
from contextlib import suppress
from functools import cache
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from hypothesis import given
from hypothesis import strategies as st

from gateway.model import UsageError
from gateway.verify.encodings import ENCODINGS
from gateway.verify.presets import SchemeError
from gateway.verify.public_keys import ALGORITHMS, decode_signature, read_public_key, with_private_key
from gateway.verify.request import Request
from gateway.verify.verifier import Verifier
from tests.verify.both_ways import build_verifier
from tests.verify.signed_requests import BODY, NOW, a_request, reason, refusal

# RFC 8032, section 7.1, TEST 2
RFC8032_KEY = "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c"
RFC8032_SIGNATURE = (
    "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
    "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
)
# RFC 6979, appendix A.2.5, SHA-256 of "sample"
RFC6979_POINT = (
    0x60FED4BA255A9D31C961EB74C6356D68C049B8923B61FA6CE669622E60F29FB6,
    0x7903FE1008B8BC99A41AE9E95628BC64F2F1B20C2D7E9F5177A3C294D4462299,
)
RFC6979_SIGNATURE = (
    0xEFD48B2AACB6A8FD1140DD9CD45E81D69D2C877B56AAF991C34D0EA84EAF3716,
    0xF7CB1C942D657C41D436C7A1B6E29F65F3E900DBB9AFF4064DC4AB2F843ACDA8,
)
KEY_SIZES = "expected an RSA public key of 2048 to 8192 bits as PEM or base64, got something else"


def pem(key: Any) -> str:
    return str(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode())


def der(key: Any) -> bytes:
    return bytes(key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))


@cache
def a_key(algorithm: str) -> Any:
    """Return the private key of the tests."""
    if algorithm == "ed25519":
        return ed25519.Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
    if algorithm == "ecdsa-p256-sha256":
        return ec.derive_private_key(0xC0FFEE, ec.SECP256R1())
    return rsa.generate_private_key(65537, 2048)


def signed_by(key: Any, algorithm: str, message: bytes) -> bytes:
    how: dict[str, tuple[Any, ...]] = {
        "ed25519": (),
        "ecdsa-p256-sha256": (ec.ECDSA(hashes.SHA256()),),
        "rsa-sha256": (padding.PKCS1v15(), hashes.SHA256()),
        "rsa-sha1": (padding.PKCS1v15(), hashes.SHA1()),
    }
    return bytes(key.sign(message, *how[algorithm]))


def a_public_key_verifier(algorithm: str = "ed25519", **config: Any) -> Verifier:
    keys = {"public_keys": [pem(a_key(algorithm).public_key())]}
    return build_verifier({"scheme": "public-key", "algorithm": algorithm, "header": "X-S", **keys, **config})


def a_signed_request(value: str | bytes, body: bytes = BODY) -> Request:
    return a_request([("X-S", value)], body=body)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_signature_is_accepted_and_no_change_of_it(algorithm: str, encoding: str) -> None:
    verifier = a_public_key_verifier(algorithm, encoding=encoding)
    value = ENCODINGS[encoding](signed_by(a_key(algorithm), algorithm, BODY))
    assert reason(verifier, a_signed_request(value)) == "accepted"
    assert reason(verifier, a_signed_request(value, BODY + b" ")) == "bad_signature"
    for at in range(0, len(value), 7):
        changed = value[:at] + bytes([value[at] ^ 1]) + value[at + 1 :]
        assert reason(verifier, a_signed_request(changed)) in {"bad_signature", "malformed_signature"}


def test_published_vectors_are_accepted() -> None:
    ours = a_public_key_verifier("ed25519", public_keys=[RFC8032_KEY])
    assert reason(ours, a_signed_request(RFC8032_SIGNATURE, b"\x72")) == "accepted"
    point = ec.EllipticCurvePublicNumbers(*RFC6979_POINT, ec.SECP256R1()).public_key()
    verifier = a_public_key_verifier("ecdsa-p256-sha256", public_keys=[pem(point)])
    signature = encode_dss_signature(*RFC6979_SIGNATURE).hex()
    assert reason(verifier, a_signed_request(signature, b"sample")) == "accepted"
    assert reason(verifier, a_signed_request(signature, b"simple")) == "bad_signature"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_key_may_be_written_in_several_ways(algorithm: str) -> None:
    key = a_key(algorithm).public_key()
    spellings = [pem(key), f"\n{pem(key)}\n", base64.b64encode(der(key)).decode()]
    spellings.append("\n".join(pem(key).splitlines()[1:-1]))
    if algorithm == "ed25519":
        raw = key.public_bytes_raw()
        spellings += [raw.hex(), raw.hex().upper(), base64.b64encode(raw).decode()]
    for spelling in spellings:
        assert read_public_key(spelling, algorithm) == read_public_key(pem(key), algorithm)


def test_any_of_several_keys_will_do() -> None:
    other = ed25519.Ed25519PrivateKey.from_private_bytes(bytes(32))
    verifier = a_public_key_verifier(public_keys=[pem(other.public_key()), pem(a_key("ed25519").public_key())])
    for key in (other, a_key("ed25519")):
        assert reason(verifier, a_signed_request(signed_by(key, "ed25519", BODY).hex())) == "accepted"
    third = ed25519.Ed25519PrivateKey.from_private_bytes(b"3" * 32)
    assert reason(verifier, a_signed_request(signed_by(third, "ed25519", BODY).hex())) == "bad_signature"


def test_a_signature_has_one_spelling() -> None:
    signature = signed_by(a_key("ed25519"), "ed25519", BODY)
    assert refusal(a_public_key_verifier(), a_signed_request(signature.hex().upper())).detail == (
        "expected 1 to 16 signatures in the header X-S, each 64 bytes in hex, got none like that"
    )
    for text in (base64.b64encode(signature).rstrip(b"="), base64.b64encode(signature) + b"\n", b" " * 90):
        assert decode_signature(text, "ed25519", "base64") is None
    # The last digit of 64 bytes in base64 has four bits that don't count.
    url = base64.urlsafe_b64encode(signature).rstrip(b"=")
    assert decode_signature(url, "ed25519", "base64url") == signature
    digits = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    others = [url[:-1] + bytes([digit]) for digit in digits if digit != url[-1]]
    assert all(decode_signature(other, "ed25519", "base64url") != signature for other in others)


def test_several_signatures_are_tried_but_not_many() -> None:
    verifier = a_public_key_verifier(separator=",", prefix="v1=")
    good, bad = signed_by(a_key("ed25519"), "ed25519", BODY).hex(), "00" * 64
    assert reason(verifier, a_signed_request(f"v1={bad}, v1={bad},v1={good}")) == "accepted"
    crowd = ",".join([f"v1={bad}"] * 4 + [f"v1={good}"])
    assert refusal(verifier, a_signed_request(crowd)).detail == "expected at most 4 signatures of ed25519, got 5"


def test_timestamp_and_identity_are_signed_with_it() -> None:
    verifier = a_public_key_verifier(
        timestamp={"header": "X-T"}, id_header="X-I", signed="{timestamp}|{id}|{body}", encoding="base64"
    )
    value = base64.b64encode(signed_by(a_key("ed25519"), "ed25519", b"%d|e1|" % NOW + BODY))
    good = a_request([("X-S", value), ("X-T", f"{NOW:.0f}"), ("X-I", "e1")])
    assert reason(verifier, good) == "accepted"
    assert reason(verifier, good, now=NOW + 301) == "stale_timestamp"
    assert reason(verifier, a_request([("X-S", value), ("X-T", f"{NOW:.0f}"), ("X-I", "e2")])) == "bad_signature"


def test_only_the_sender_signs_test_events() -> None:
    with pytest.raises(UsageError, match="only the sender has the private key"):
        a_public_key_verifier().sign(BODY, now=NOW, id="e1", type="t", headers={})


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_private_key_signs_what_its_public_key_verifies(algorithm: str, encoding: str) -> None:
    verifier = a_public_key_verifier(algorithm, encoding=encoding)
    keys = verifier.checks[0].algorithm  # type: ignore[attr-defined] # a Signature's
    key = a_key(algorithm).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    signing = with_private_key(keys, key)
    assert reason(verifier, a_signed_request(signing.sign(lambda _: BODY, NOW))) == "accepted"
    assert "object" not in repr(signing)
    others = {"ed25519": "ecdsa-p256-sha256", "ecdsa-p256-sha256": "rsa-sha256"}
    other = a_key(others.get(algorithm, "ed25519"))
    for wrong in (
        other.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode(),
        a_key(algorithm).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"hush")).decode(),
        pem(a_key(algorithm).public_key()),
        "",
    ):
        with pytest.raises(ValueError, match=r"^expected the private key of an? .* in PEM, without a password, got"):
            with_private_key(keys, wrong)


def test_verifiers_with_other_keys_differ() -> None:
    assert a_public_key_verifier() == a_public_key_verifier()
    assert a_public_key_verifier() != a_public_key_verifier(public_keys=[RFC8032_KEY])
    assert "public_key" not in repr(a_public_key_verifier())


# ---- Keys that are refused ----


def problem(algorithm: str, *keys: object) -> str:
    with pytest.raises(SchemeError) as caught:
        a_public_key_verifier(algorithm, public_keys=list(keys))
    return str(caught.value)


def test_keys_of_another_kind_or_size_are_refused() -> None:
    small, huge = rsa.generate_private_key(65537, 1024).public_key(), rsa.RSAPublicNumbers(65537, 2**8193 + 1)
    p384 = ec.derive_private_key(7, ec.SECP384R1()).public_key()
    k256 = ec.derive_private_key(7, ec.SECP256K1()).public_key()
    for key in (small, huge.public_key(), p384):
        assert problem("rsa-sha256", pem(key)) == f"verify.public_keys.0: {KEY_SIZES}"
    for key in (p384, k256, a_key("ed25519").public_key()):
        expected = "expected a P-256 public key as PEM or base64, got something else"
        assert problem("ecdsa-p256-sha256", pem(key)) == f"verify.public_keys.0: {expected}"
    written = "expected an Ed25519 public key as PEM or base64, or its 32 bytes in hex or base64, got something else"
    assert problem("ed25519", RFC8032_KEY, pem(k256), RFC8032_KEY[:-2]) == (
        f"verify.public_keys.1: {written}\nverify.public_keys.2: {written}"
    )


def test_a_private_key_isnt_repeated() -> None:
    secret = "-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIBerTz\n-----END PRIVATE KEY-----"
    assert "MC4C" not in problem("ed25519", secret)


def test_the_scheme_says_what_it_expects() -> None:
    with pytest.raises(SchemeError) as caught:
        build_verifier({"scheme": "public-key", "header": "X-S", "algorithm": "rsa-md5", "secrets": ["s"]})
    assert str(caught.value).splitlines() == [
        "verify.secrets: unknown key 'secrets'",
        f"verify.algorithm: expected one of {', '.join(ALGORITHMS)}, got 'rsa-md5'",
        "verify: expected one of public_keys, key_url, got none",
    ]
    assert problem("ed25519") == "verify.public_keys: expected a list of public keys, got an empty list"


_P = 2**255 - 19
_D = -121665 * pow(121666, -1, _P) % _P


def _x_of(y: int) -> int | None:
    """Return an x of a point of Ed25519, RFC 8032, section 5.1.3; None if there is none."""
    square = (y * y - 1) * pow(_D * y * y + 1, -1, _P) % _P
    root = pow(square, (_P + 3) // 8, _P)
    for x in (root, root * pow(2, (_P - 1) // 4, _P) % _P):
        if x * x % _P == square:
            return x
    return None


def _times_8(point: tuple[int, int]) -> tuple[int, int]:
    for _ in range(3):
        x, y = point
        both = _D * x * x * y * y % _P
        point = (2 * x * y * pow(1 + both, -1, _P) % _P, (y * y + x * x) * pow(1 - both, -1, _P) % _P)
    return point


@pytest.mark.parametrize("sign", [0, 2**255])
@pytest.mark.parametrize("y", [
    0, 1, _P - 1, _P, _P + 1,
    0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826,
    _P - 0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826,
])  # fmt: skip
def test_a_point_for_which_anybody_could_sign_is_no_key(y: int, sign: int) -> None:
    x = _x_of(y % _P)
    assert x is not None
    assert _times_8((x, y % _P)) == (0, 1)
    assert "expected an Ed25519 public key" in problem("ed25519", (y + sign).to_bytes(32, "little").hex())


PEM = "-----BEGIN PUBLIC KEY-----\n{}\n-----END PUBLIC KEY-----"
TEXTS = st.one_of(
    st.text(),
    st.binary().map(lambda data: base64.b64encode(data).decode()),
    st.binary().map(lambda data: PEM.format(base64.b64encode(data).decode())),
    st.binary(min_size=32, max_size=32).map(bytes.hex),
)  # fmt: skip


@given(text=TEXTS, algorithm=st.sampled_from(ALGORITHMS))
def test_no_text_crashes_the_parser_of_keys(text: str, algorithm: str) -> None:
    with suppress(ValueError):
        read_public_key(text, algorithm)


@given(algorithm=st.sampled_from(ALGORITHMS), data=st.data())
def test_a_damaged_key_is_refused_or_another_key(algorithm: str, data: st.DataObject) -> None:
    whole = der(a_key(algorithm).public_key())
    at = data.draw(st.integers(0, len(whole) - 1))
    damaged = bytearray(whole)
    damaged[at] ^= data.draw(st.integers(1, 255))
    for changed in (bytes(damaged), whole[:at], whole + b"\0"):
        try:
            key = read_public_key(base64.b64encode(changed).decode(), algorithm)
        except ValueError:
            continue
        assert not key.verifies(signed_by(a_key(algorithm), algorithm, BODY), BODY)


@given(
    value=st.one_of(st.binary(max_size=200), st.binary(max_size=300).map(lambda data: data.hex().encode())),
    algorithm=st.sampled_from(ALGORITHMS),
)
def test_no_signature_crashes_or_passes(value: bytes, algorithm: str) -> None:
    assert reason(a_public_key_verifier(algorithm), a_signed_request(value)) in {"bad_signature", "malformed_signature"}


@given(data=st.binary(max_size=1100), algorithm=st.sampled_from(ALGORITHMS), encoding=st.sampled_from([*ENCODINGS]))
def test_what_is_decoded_is_what_was_encoded(data: bytes, algorithm: str, encoding: str) -> None:
    assert decode_signature(ENCODINGS[encoding](data), algorithm, encoding) in {data, None}


def test_the_library_isnt_imported_without_a_key() -> None:
    code = (
        "import sys; from gateway.verify.schemes import build_verifier; "
        "build_verifier({'scheme': 'github', 'secrets': ['s']}); sys.exit('cryptography' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
