"""Plaid's tokens: their keys are asked for by id, with the credentials of Plaid's API."""

import hashlib
from typing import Any

import jwt
import orjson
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from gateway.verify.content import Content
from gateway.verify.presets import SchemeError
from gateway.verify.remote_keys import FRESH, PAUSE, KeyCache, KeyNeededError
from gateway.verify.request import Request
from gateway.verify.verifier import Verifier
from tests.verify.signed_requests import BODY, NOW, a_request, a_verifier, reason

KEY = ec.derive_private_key(11, ec.SECP256R1())
KID = "bfbd5111-8e33-4643-8ced-b2e642a72f3c"
URL = f"https://production.plaid.com/webhook_verification_key/get#{KID}"


def plaid(**config: Any) -> Verifier:
    given = {"client_id": "5f1b", "api_secret": "hush-of-30-characters-01234567", "secrets": None, **config}
    return a_verifier("plaid", **given)


def signed(*, key: Any = KEY, kid: str = KID, algorithm: str = "ES256", **claims: Any) -> Request:
    known = {"iat": int(NOW), "request_body_sha256": hashlib.sha256(BODY).hexdigest(), **claims}
    token = jwt.encode(known, key, algorithm=algorithm, headers={"kid": kid})
    return a_request([("Plaid-Verification", token)])


def a_document(key: Any = KEY, *, kid: str = KID, expired_at: object = None) -> bytes:
    entry = orjson.loads(jwt.algorithms.ECAlgorithm.to_jwk(key.public_key()))
    return orjson.dumps({"key": {**entry, "alg": "ES256", "use": "sig", "kid": kid, "expired_at": expired_at}})


def knowing(document: bytes, at: float = NOW) -> KeyCache:
    keys = KeyCache()
    keys.keep(URL, document, at)
    return keys


def test_a_key_is_asked_for_by_its_id_and_with_the_credentials() -> None:
    with pytest.raises(KeyNeededError) as caught:
        plaid().verify(signed(), now=NOW, keys=KeyCache())
    assert caught.value.url == URL
    expected = {"client_id": "5f1b", "secret": "hush-of-30-characters-01234567", "key_id": KID}
    assert orjson.loads(caught.value.request_body) == expected
    assert "hush" not in str(caught.value)
    assert "hush" not in repr(plaid().checks)
    with pytest.raises(KeyNeededError) as caught:
        plaid(environment="sandbox").verify(signed(), now=NOW, keys=KeyCache())
    assert caught.value.url == URL.replace("production", "sandbox")


def test_a_body_that_came_later_asks_for_the_same_key() -> None:
    with pytest.raises(KeyNeededError) as caught:
        plaid().check_head(signed(), now=NOW).verify(signed(), KeyCache())
    assert (caught.value.url, orjson.loads(caught.value.request_body)["key_id"]) == (URL, KID)


def test_a_token_of_the_body_is_accepted() -> None:
    assert reason(plaid(), signed(), keys=knowing(a_document())) == "accepted"


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (signed()._replace(body=b"{}"), "bad_signature"),
        (signed(request_body_sha256="0" * 64), "bad_signature"),
        (signed(request_body_sha256=None), "bad_signature"),
        (signed(key=ec.derive_private_key(12, ec.SECP256R1())), "bad_signature"),
        (signed(algorithm="HS256", key="x" * 32), "malformed_signature"),
        (signed(iat=int(NOW) - 300), "accepted"),
        (signed(iat=int(NOW) - 301), "stale_timestamp"),
        (signed(iat=int(NOW) + 61), "stale_timestamp"),
        (signed(iat=str(int(NOW))), "malformed_timestamp"),
        (signed(kid="../other"), "malformed_signature"),
        (signed(kid="x" * 65), "malformed_signature"),
        (signed(kid='","key_id":"'), "malformed_signature"),
        (a_request(), "missing_signature"),
        (a_request([("Plaid-Verification", "x")]), "malformed_signature"),
    ],
)
def test_nothing_else_is(request_: Request, expected: str) -> None:
    assert reason(plaid(), request_, keys=knowing(a_document())) == expected


def test_a_token_without_its_time_is_refused() -> None:
    token = jwt.encode({"request_body_sha256": hashlib.sha256(BODY).hexdigest()}, KEY, "ES256", headers={"kid": KID})
    assert (
        reason(plaid(), a_request([("Plaid-Verification", token)]), keys=knowing(a_document())) == "missing_timestamp"
    )


def test_an_expired_key_verifies_nothing() -> None:
    for expired_at, expected in ((NOW - 1, "bad_key"), (NOW, "accepted"), (None, "accepted")):
        assert reason(plaid(), signed(), keys=knowing(a_document(expired_at=expired_at))) == expected


def test_that_a_key_has_expired_is_learned_within_an_hour() -> None:
    keys = knowing(a_document())
    later = NOW + FRESH
    assert reason(plaid(), signed(iat=int(later)), now=later, keys=keys) == URL
    keys.keep(URL, a_document(expired_at=NOW + 5), later)
    assert reason(plaid(), signed(iat=int(later)), now=later, keys=keys) == "bad_key"


def test_a_response_with_another_key_is_no_key_of_that_id() -> None:
    assert reason(plaid(), signed(), keys=knowing(a_document(kid="another"))) == "bad_key"


@pytest.mark.parametrize(
    "document",
    [
        *(b'{"key":7}', b'{"key":{}}', b'{"key":{"kid":"a"}}', b'{"error_code":"INVALID"}'),
        a_document(expired_at="soon"),
        a_document().replace(f'"{KID}"'.encode(), b"[" * 990 + b"]" * 990),
    ],
)
def test_a_response_without_a_key_is_refused(document: bytes) -> None:
    keys = KeyCache()
    with pytest.raises(ValueError, match="expected a JSON Web Key"):
        keys.keep(URL, document, NOW)
    assert keys.urls == []


def test_a_made_up_id_takes_no_known_key() -> None:
    keys = knowing(a_document())
    for n in range(100):
        keys.fail(f"{URL}{n}", NOW)
    assert reason(plaid(), signed(), now=NOW + PAUSE, keys=keys) == "accepted"


def test_nothing_is_asked_where_no_keys_are_kept() -> None:
    with pytest.raises(KeyNeededError):
        Content(signed()).fetched_key(URL, request_body=b"{}")


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"client_id": None}, "expected the key 'client_id', got none"),
        ({"api_secret": None}, "expected the key 'api_secret', got none"),
        ({"api_secret": 12345}, "api_secret: expected a non-empty string, got a number"),
        ({"environment": "development"}, "environment: expected one of production, sandbox, got 'development'"),
        ({"secrets": ["s"]}, "unknown key 'secrets'"),
    ],
)
def test_the_rules_say_what_is_wrong(config: dict[str, Any], expected: str) -> None:
    with pytest.raises(SchemeError) as caught:
        plaid(**config)
    assert expected in str(caught.value)
    assert "12345" not in str(caught.value)
