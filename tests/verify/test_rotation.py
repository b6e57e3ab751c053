"""Secrets that end, and which of a source's secrets has verified a request: for operators, and nobody else."""

import base64
import hashlib
import hmac
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from gateway.model import UsageError
from gateway.verify import algorithms, credentials, json_web_tokens, message_signatures
from gateway.verify.key_ring import SecretLifetime, expired_lists, expiring_secrets, parse_until
from gateway.verify.presets import SchemeError
from gateway.verify.request import Request
from gateway.verify.verifier import Verifier
from tests.verify.both_ways import build_verifier
from tests.verify.signed_requests import BODY, NOW, WHSEC, a_request, a_verifier, reason, refusal
from tests.verify.vectors import Vector, vectors

OLD, NEW = "the old secret, which is of 40 bytes, five eights", "the new secret, which is of 40 bytes, five eights"
THIRD = "a third secret, which is of 40 bytes or more"
UNTIL = "2023-11-14T22:13:20Z"
"""NOW, as it stands in the rules."""
DAY = 86400.0


def until(secret: str, at: str = UNTIL) -> dict[str, str]:
    return {"secret": secret, "until": at}


def signature(secret: str) -> Request:
    return a_request([("X-Signature", hmac.new(secret.encode(), BODY, hashlib.sha256).hexdigest())])


def hashed(secret: str) -> Request:
    return a_request([("X-Signature", hashlib.sha256(secret.encode() + BODY).hexdigest())])


def a_token(secret: str) -> Request:
    return a_request([("Authorization", jwt.api_jws.encode(b'{"iss":"acme"}', secret, algorithm="HS256"))])


KEYS = {name: Ed25519PrivateKey.from_private_bytes(name.encode().ljust(32)) for name in ("old", "new", "other")}
PUBLIC = {name: key.public_key().public_bytes_raw().hex() for name, key in KEYS.items()}


def signed_by(name: str) -> Request:
    return a_request([("X-Signature", KEYS[name].sign(BODY).hex())])


URL = "https://hooks.example.com/in/it"


def a_message(secret: str) -> Request:
    """Return a request without a body, of which there would be a digest to be compared as well."""
    described = f'("@method" "@target-uri");created={NOW:.0f}'
    base = "\n".join(['"@method": POST', f'"@target-uri": {URL}', f'"@signature-params": {described}'])
    signed = base64.b64encode(hmac.digest(secret.encode(), base.encode(), "sha256")).decode()
    return a_request([("Signature-Input", f"s={described}"), ("Signature", f"s=:{signed}:")], body=b"")


_TOKEN_CLAIMS = {"claims": {"iss": "acme"}}
SCHEMES: Mapping[str, tuple[dict[str, Any], Callable[[str], Request]]] = {
    "hmac": ({"scheme": "hmac", "header": "X-Signature"}, signature),
    "hash": ({"scheme": "hash", "header": "X-Signature", "signed": "{secret}{body}"}, hashed),
    "token": ({"scheme": "token", "header": "X-Token"}, lambda secret: a_request([("X-Token", secret)])),
    "token in the body": (
        {"scheme": "token", "field": "token"},
        lambda secret: a_request(body=b'{"token":"%b"}' % secret.encode()),
    ),
    "basic": (
        {"scheme": "basic", "username": "u"},
        lambda secret: a_request([("Authorization", _basic(f"u:{secret}"))]),
    ),
    "bearer": ({"scheme": "bearer"}, lambda secret: a_request([("Authorization", f"Bearer {secret}")])),
    "jwt": ({"scheme": "jwt", "algorithms": "HS256"}, a_token),
    "jwt with claims": ({"scheme": "jwt", "algorithms": "HS256", **_TOKEN_CLAIMS}, a_token),
    "message signature": (
        {"scheme": "http-message-signature", "algorithm": "hmac-sha256", "tolerance": "none"},
        a_message,
    ),
}


def _basic(pair: str) -> str:
    return "Basic " + base64.b64encode(pair.encode()).decode()


def of_scheme(name: str, *secrets: object) -> Verifier:
    return build_verifier({**SCHEMES[name][0], "secrets": list(secrets)}, public_url=URL)


# ---- Until when ----


@pytest.mark.parametrize("name", SCHEMES)
def test_a_secret_verifies_until_its_end_and_not_from_then_on(name: str) -> None:
    verifier, sent = of_scheme(name, NEW, until(OLD)), SCHEMES[name][1]
    assert verifier.verify(sent(OLD), now=NOW - 0.001).secret == 1
    assert reason(verifier, sent(OLD), now=NOW).startswith("bad_")
    assert reason(verifier, sent(OLD), now=NOW + DAY).startswith("bad_")
    for now in (NOW - DAY, NOW, NOW + DAY):
        assert verifier.verify(sent(NEW), now=now).secret == 0


@pytest.mark.parametrize("name", SCHEMES)
def test_where_all_have_ended_nothing_verifies(name: str) -> None:
    verifier = of_scheme(name, until(NEW), until(OLD))
    for secret in (OLD, NEW, THIRD):
        assert reason(verifier, SCHEMES[name][1](secret), now=NOW).startswith("bad_")


def test_a_public_key_ends_as_well() -> None:
    config = {"scheme": "public-key", "header": "X-Signature", "algorithm": "ed25519", "encoding": "hex"}
    verifier = build_verifier({**config, "public_keys": [PUBLIC["new"], until(PUBLIC["old"])]})
    assert [verifier.verify(signed_by(name), now=NOW - 1).secret for name in ("new", "old")] == [0, 1]
    assert verifier.verify(signed_by("new"), now=NOW).secret == 0
    assert reason(verifier, signed_by("old"), now=NOW) == "bad_signature"
    assert reason(verifier, signed_by("other"), now=NOW - 1) == "bad_signature"


def test_a_key_of_another_kind_may_replace_one_of_a_token() -> None:
    new = Ed25519PrivateKey.generate()
    listed = [_pem(new.public_key()), _pem(_rsa().public_key())]
    for keys in (listed, listed[::-1]):
        verifier = build_verifier({"scheme": "jwt", "algorithms": ["EdDSA", "RS256"], "public_keys": keys})
        for key, algorithm in ((new, "EdDSA"), (_rsa(), "RS256")):
            token = jwt.api_jws.encode(b"{}", key, algorithm=algorithm)
            verified = verifier.verify(a_request([("Authorization", token)]), now=NOW)
            assert verified.secret == keys.index(_pem(key.public_key()))
        assert reason(verifier, a_request([("Authorization", "not.a.token")])) == "malformed_signature"


def _rsa() -> Any:
    from tests.verify.test_remote_keys import the_key  # noqa: PLC0415 - it takes a while to make one

    return the_key()


def _pem(key: Any) -> str:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat  # noqa: PLC0415 - here alone

    text: str = key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    return text


DATED = [vector for vector in vectors() if {"secrets", "public_keys"} & vector.config.keys()]


@pytest.mark.parametrize("vector", DATED, ids=lambda vector: vector.scheme)
def test_each_provider_takes_secrets_that_end(vector: Vector) -> None:
    def ending(at: str) -> Verifier:
        lists = {
            name: [until(each, at) for each in vector.config[name]]
            for name in ("secrets", "public_keys")
            if name in vector.config
        }
        return vector.verifier(**lists)

    verified = ending("9999-12-30").verify(vector.request, now=vector.now, keys=vector.keys)
    assert verified.secret in range(len(vector.verifier().lifetimes))
    assert verified.identity == vector.verifier().verify(vector.request, now=vector.now, keys=vector.keys).identity
    assert reason(ending("2001-01-01"), vector.request, now=vector.now, keys=vector.keys) != "accepted"


def test_the_head_decides_with_the_time_at_which_it_came() -> None:
    """The body of a slow sender may come after the end."""
    pending = of_scheme("hmac", until(OLD)).check_head(signature(OLD), now=NOW - 1)
    assert pending.verify(signature(OLD)).secret == 0


# ---- Which one ----


def test_the_first_of_two_equal_secrets_counts() -> None:
    assert of_scheme("hmac", OLD, OLD).verify(signature(OLD), now=NOW).secret == 0


def test_a_position_is_that_of_the_sources_list_whatever_the_method_takes_of_it() -> None:
    """GitLab signs with what starts with whsec_, and sends any other as it is."""
    token = a_request([("X-Gitlab-Token", NEW)])
    signed = a_request(a_verifier("gitlab", secrets=[WHSEC]).sign(BODY, now=NOW, id="m", type="t", headers={}))
    for secrets in ([NEW, WHSEC], [WHSEC, NEW], [OLD, WHSEC, NEW]):
        verifier = a_verifier("gitlab", secrets=secrets)
        indexes = [verifier.verify(sent, now=NOW).secret for sent in (token, signed)]
        assert indexes == [secrets.index(NEW), secrets.index(WHSEC)]


def test_a_request_without_a_listed_secret_has_none() -> None:
    assert a_verifier("none").verify(a_request(), now=NOW) == (None, None)
    assert a_verifier("none").lifetimes == ()


def test_public_keys_are_counted_after_the_secrets() -> None:
    verifier = build_verifier({"scheme": "hmac", "header": "X", "secrets": [OLD, until(NEW, "2027-01-31")]})
    end = 1801440000.0  # 2027-02-01T00:00:00Z
    assert verifier.lifetimes == (SecretLifetime("secrets", 0), SecretLifetime("secrets", 1, end))
    assert [lifetime.shown for lifetime in verifier.lifetimes] == ["secret 1", "secret 2"]
    assert SecretLifetime("public_keys", 0).shown == "public key 1"


# ---- Nobody outside learns it ----


class Watched:
    """`hmac`, with its comparisons and digests counted."""

    def __init__(self) -> None:
        self.count = 0

    def compare_digest(self, left: bytes, right: bytes) -> bool:
        self.count += 1
        return hmac.compare_digest(left, right)

    def digest(self, key: bytes, message: bytes, algorithm: str) -> bytes:
        self.count += 1
        return hmac.digest(key, message, algorithm)


class Counted:
    """A function, with its calls counted."""

    def __init__(self) -> None:
        self.count = 0

    def calls(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            self.count += 1
            return function(*arguments, **named)

        return call


@pytest.mark.parametrize("name", SCHEMES)
def test_as_much_is_computed_whichever_secret_matches(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counts, sent = [], SCHEMES[name][1]
    for secret in (NEW, OLD, THIRD):
        request, watched = sent(secret), Watched()
        for module in (algorithms, credentials, message_signatures):
            monkeypatch.setattr(module, "hmac", watched)
        real, decoded = json_web_tokens._jws(), Counted()
        watching = SimpleNamespace(decode_complete=decoded.calls(real.decode_complete))
        monkeypatch.setattr(json_web_tokens, "_jws", lambda watching=watching, **_: watching)
        reason(of_scheme(name, NEW, OLD), request)
        counts.append((watched.count, decoded.count))
        monkeypatch.undo()
    assert counts[0] == counts[1]
    assert counts[0] == counts[2]
    assert sum(counts[0]) >= 2


@pytest.mark.parametrize("name", SCHEMES)
def test_a_refusal_is_the_same_for_a_secret_that_has_ended_and_for_one_that_never_was(name: str) -> None:
    verifier, sent = of_scheme(name, NEW, until(OLD)), SCHEMES[name][1]
    ended, unknown = (
        refusal(verifier, sent(OLD), now=NOW),
        refusal(verifier, sent(THIRD), now=NOW),
    )
    assert (ended.status, ended.reason, ended.detail) == (unknown.status, unknown.reason, unknown.detail)
    assert OLD not in ended.detail


def test_no_representation_shows_one() -> None:
    for name in SCHEMES:
        verifier = of_scheme(name, NEW, until(OLD))
        for check in verifier.checks:
            assert "secret, which" not in f"{check!r} {verifier!r} {check.signing_spec()!r}"


# ---- Signing ----


@pytest.mark.parametrize("name", ["hmac", "hash", "token", "basic", "bearer", "jwt", "message signature"])
def test_the_first_secret_that_has_not_ended_signs(name: str) -> None:
    verifier = of_scheme(name, until(OLD), NEW)
    for now, index in ((NOW - 1, 0), (NOW, 1)):
        sent = a_request(verifier.sign(BODY, now=now, id="1", type="t", headers={}))
        assert verifier.verify(sent, now=now).secret == index
    with pytest.raises(UsageError, match="expected a secret that hasn't expired, got none"):
        of_scheme(name, until(OLD)).sign(BODY, now=NOW, id="1", type="t", headers={})


def test_the_query_has_the_first_secret_that_has_not_ended() -> None:
    verifier = build_verifier({"scheme": "token", "query": "key", "secrets": [until("old"), "new"]})
    assert [verifier.signed_query(now=now) for now in (NOW - 1, NOW)] == ["key=old", "key=new"]


def test_a_handshake_is_not_signed_with_a_secret_that_has_ended() -> None:
    verifier = a_verifier("x", secrets=[until(OLD), NEW])
    head = Request("GET", "/in/it", "crc_token=abc", (), b"")
    signed = [verifier.unverified_handshake(head, now=now) for now in (NOW - 1, NOW)]
    digests = [hmac.digest(secret.encode(), b"abc", "sha256") for secret in (OLD, NEW)]
    for response, digest in zip(signed, digests, strict=True):
        assert response is not None
        assert base64.b64encode(digest) in response.body
    assert a_verifier("x", secrets=[until(OLD)]).unverified_handshake(head, now=NOW) is None


# ---- As it is written ----


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2023-11-14", NOW + 6400),  # the end of that day
        (UNTIL, NOW),
        ("2023-11-14t22:13:20z", NOW),
        ("2023-11-14T23:13:20+01:00", NOW),
        ("2023-11-14T22:13:20.5Z", NOW + 0.5),
        ("2024-02-29", 1709251200.0),
    ],
)
def test_an_end_is_a_date_or_a_time(text: str, expected: float) -> None:
    assert parse_until(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("", "soon", "2023-11-31", "2023-13-01", "2023-11-14T22:13:20", "2023-11-14 22:13:20Z", "2023-11-14T22:13Z"),
        *("20231114", "2023-W46-2", "2023-11-14T25:00:00Z", "1700000000", "9999-12-31", "2023-11-14T22:13:20+0100"),
        *("\u0662\u0660\u0662\u0663-11-14", "2023-11-14\n"),
    ],
)
def test_anything_else_is_none(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - the key's message says what was expected
        parse_until(text)


@given(st.text(max_size=30))
def test_no_text_does_more_than_be_refused(text: str) -> None:
    with suppress(ValueError):
        assert math.isfinite(parse_until(text))


EXPECTED = "expected a date such as 2027-01-31 or a time such as 2027-01-31T12:00:00Z"


@pytest.mark.parametrize(
    ("item", "path", "message"),
    [
        ({"secret": OLD, "until": "2027-01-32"}, ("until",), f"{EXPECTED}, got another string"),
        ({"secret": "2027-01-31", "until": OLD}, ("until",), f"{EXPECTED}, got another string"),
        ({"secret": OLD, "until": 2027}, ("until",), f"{EXPECTED}, got a number"),
        ({"secret": OLD}, (), "expected the key 'until', got none"),
        ({"until": "2027-01-31"}, (), "expected the key 'secret', got none"),
        ({"secret": 5, "until": "2027-01-31"}, ("secret",), "expected a non-empty string, got a number"),
        ({"secret": " ", "until": "2027-01-31"}, ("secret",), "expected a non-empty string, got a blank string"),
        ({OLD: None, "secret": NEW, "until": "2027-01-31"}, (), "expected the keys secret and until alone, got others"),
        ([OLD], (), "expected a non-empty string, got a list"),
    ],
)
@pytest.mark.parametrize(("key", "config"), [("secrets", {"scheme": "github"}), ("public_keys", {"scheme": "jwt"})])
def test_a_bad_item_is_reported_with_its_place_and_not_shown(
    key: str, config: Mapping[str, Any], item: object, path: tuple[str, ...], message: str
) -> None:
    more = {"algorithms": "EdDSA"} if config["scheme"] == "jwt" else {}
    with pytest.raises(SchemeError) as caught:
        build_verifier({**config, **more, key: [PUBLIC["new"], item]})
    assert ((key, 1, *path), message) in caught.value.problems
    assert OLD not in str(caught.value)


def test_a_token_of_a_handshake_has_no_end() -> None:
    with pytest.raises(SchemeError, match=r"verify_tokens.0: expected a non-empty string, got a mapping"):
        a_verifier("meta", secrets=[NEW], verify_tokens=[until(OLD)])


def test_a_weak_secret_is_weak_with_an_end_too() -> None:
    assert [path for path, _ in a_verifier(secrets=[NEW, until("short")]).warnings] == [("secrets", 1)]


def test_what_ends_soon_is_told_14_days_before() -> None:
    lifetimes = (SecretLifetime("secrets", 0), SecretLifetime("secrets", 1, NOW))
    assert list(expiring_secrets(lifetimes, NOW - 14 * DAY)) == []
    path = ("secrets", 1, "until")
    expected = "expected a secret for more than 14 days, got one that"
    assert list(expiring_secrets(lifetimes, NOW - 14 * DAY + 1)) == [(path, f"{expected} expires within 14 days")]
    assert list(expiring_secrets(lifetimes, NOW - 5)) == [(path, f"{expected} expires within a day")]
    assert list(expiring_secrets(lifetimes, NOW)) == [(path, f"{expected} has expired, and verifies nothing any more")]


def test_a_list_has_ended_with_the_last_of_its_secrets() -> None:
    lifetimes = (
        SecretLifetime("secrets", 0, NOW - 5),
        SecretLifetime("secrets", 1, NOW),
        SecretLifetime("public_keys", 0),
    )
    assert expired_lists(lifetimes, NOW - 1) == []
    assert expired_lists(lifetimes, NOW) == ["secrets"]
    assert list(expiring_secrets(lifetimes, NOW)) == []
    assert expired_lists((), NOW) == []
