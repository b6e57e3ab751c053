"""Tokens that vouch for a request, against RFC 7515's examples and PyJWT's own signatures."""

import base64
import hashlib
from typing import Any

import jwt
import orjson
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from gateway.model import UsageError
from gateway.verify.json_web_tokens import MAX_TOKEN_BYTES
from gateway.verify.presets import SchemeError
from gateway.verify.remote_keys import PAUSE, KeyCache
from gateway.verify.verifier import Verifier
from tests.verify.signed_requests import BODY, NOW, a_request, a_verifier, reason, refusal

KEY = "hush-hush-hush-hush-hush-hush-hush-hush-hush-hush-hush-hush-hush-hush"
DIGEST = hashlib.sha256(BODY).hexdigest()
URL = "https://hooks.example.com/in/it"


def a_token_verifier(**config: Any) -> Verifier:
    return a_verifier("jwt", public_url=URL, **{"algorithms": "HS256", "secrets": [KEY], **config})


def a_token(key: Any = KEY, algorithm: str = "HS256", **claims: Any) -> str:
    return jwt.api_jws.encode(orjson.dumps({"exp": int(NOW) + 60, **claims}), key, algorithm=algorithm)


def with_token(token: str | bytes, header: str = "Authorization", **more: Any) -> Any:
    return a_request([(header, token)], **more)


RFC_KEY = "AyM1SysPpbyDfgZld3umj1qzKObwVMkoqQ-EstJQLr_T-1qS0gZH75aKtMN3Yj0iPS4hcgUuTwjAzZr1Z9CAow"
RFC_TOKEN = (
    "eyJ0eXAiOiJKV1QiLA0KICJhbGciOiJIUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvb"
    "S9pc19yb290Ijp0cnVlfQ.dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk"
)


def test_the_example_of_rfc_7515_is_accepted() -> None:
    """Appendix A.1; its key is 64 bytes that aren't text, so it is handed over as PyJWT decodes it."""
    key = jwt.utils.base64url_decode(RFC_KEY).decode("utf-8", "surrogateescape")
    verifier = a_token_verifier(secrets=[key], claims={"iss": "joe"})
    assert reason(verifier, with_token(RFC_TOKEN), now=1300819380) == "accepted"
    assert reason(verifier, with_token(f"Bearer {RFC_TOKEN}"), now=1300819380 + 60) == "accepted"
    assert reason(verifier, with_token(RFC_TOKEN), now=1300819380 + 61) == "stale_timestamp"
    assert reason(verifier, with_token(RFC_TOKEN.replace("dBjf", "dBjg")), now=1300819380) == "bad_signature"
    jim = a_token_verifier(secrets=[key], claims={"iss": "jim"})
    assert reason(jim, with_token(RFC_TOKEN), now=1300819380) == "bad_signature"


def test_a_short_secret_is_its_vendors_decision_and_a_short_rsa_key_none() -> None:
    """NIST SP 800-131A has RSA from 2048 bits on; PyJWT takes others, with a warning on stderr."""
    verifier = a_token_verifier(secrets=["a-short-one"])
    [(name, token)] = verifier.sign(BODY, now=NOW, id="i", type="t", headers={})
    assert reason(verifier, a_request([(name, token)])) == "accepted"
    for bits, found in ((1024, "malformed_signature"), (2048, "accepted")):
        key = rsa.generate_private_key(65537, bits)
        keys = KeyCache()
        published = {**jwt.algorithms.RSAAlgorithm.to_jwk(key.public_key(), as_dict=True), "kid": "k"}
        keys.keep("https://keys.example.com/set", orjson.dumps({"keys": [published]}), NOW)
        verifier = a_token_verifier(algorithms="RS256", secrets=None, key_set="https://keys.example.com/set")
        signer = jwt.algorithms.RSAAlgorithm(jwt.algorithms.RSAAlgorithm.SHA256)
        signed = b".".join([jwt.utils.base64url_encode(each) for each in (b'{"alg":"RS256","kid":"k"}', b"{}")])
        signed += b"." + jwt.utils.base64url_encode(signer.sign(signed, key))
        assert reason(verifier, with_token(signed), keys=keys) == found


@pytest.mark.parametrize("algorithm", ["HS256", "HS384", "HS512"])
def test_a_claim_may_be_the_bodys_digest_and_the_urls(algorithm: str) -> None:
    claims = {"payload_hash": "{body:sha256}", "url_hash": "{url:sha256}", "iss": "Acme"}
    verifier = a_token_verifier(algorithms=[algorithm], claims=claims, header="X-Token")
    good = {"payload_hash": DIGEST, "url_hash": hashlib.sha256(URL.encode()).hexdigest(), "iss": "Acme"}
    token = a_token(algorithm=algorithm, **good)
    assert reason(verifier, with_token(token, "X-Token")) == "accepted"
    assert reason(verifier, with_token(token, "X-Token", body=BODY + b" ")) == "bad_signature"
    assert reason(verifier, with_token(token, "X-Token", query="a=1")) == "bad_signature"
    for name in good:
        for value in ("other", None, 7, ["Acme"]):
            assert reason(verifier, with_token(a_token(algorithm=algorithm, **{**good, name: value}), "X-Token")) == (
                "bad_signature"
            )


def test_what_we_sign_is_accepted_by_us_and_by_pyjwt() -> None:
    verifier = a_token_verifier(claims={"sha256": "{body:sha256}", "iss": "netlify"}, header="X-Webhook-Signature")
    ((_, token),) = verifier.sign(BODY, now=NOW, id="id-1", type="t", headers={})
    assert reason(verifier, with_token(token, "X-Webhook-Signature")) == "accepted"
    claims = jwt.decode(token, KEY, algorithms=["HS256"], options={"verify_exp": False, "verify_iat": False})
    assert (claims["sha256"], claims["iss"], claims["jti"]) == (DIGEST, "netlify", "id-1")


def test_an_audience_may_be_one_of_several() -> None:
    verifier = a_token_verifier(claims={"aud": "hooks"})
    assert reason(verifier, with_token(a_token(aud=["other", "hooks"]))) == "accepted"
    assert reason(verifier, with_token(a_token(aud="hooks"))) == "accepted"
    assert reason(verifier, with_token(a_token(aud=["other"]))) == "bad_signature"
    assert reason(verifier, with_token(a_token())) == "bad_signature"


@pytest.mark.parametrize("expected", [True, False])
def test_a_claim_may_be_a_boolean_and_nothing_like_one(expected: bool) -> None:  # noqa: FBT001 - a test's
    verifier = a_token_verifier(claims={"email_verified": expected})
    assert reason(verifier, with_token(a_token(email_verified=expected))) == "accepted"
    others: list[Any] = [not expected, int(expected), str(expected).lower(), None, [expected], {}]
    for other in others:
        assert reason(verifier, with_token(a_token(email_verified=other))) == "bad_signature"
    assert reason(verifier, with_token(a_token())) == "bad_signature"
    pairs = verifier.sign(BODY, now=NOW, id="1", type="t", headers={})
    assert reason(verifier, a_request(pairs)) == "accepted"


@pytest.mark.parametrize(
    ("claims", "expected"),
    [
        ({"exp": NOW - 60}, "accepted"),
        ({"exp": NOW - 61}, "stale_timestamp"),
        ({"nbf": NOW + 60}, "accepted"),
        ({"nbf": NOW + 61}, "stale_timestamp"),
        ({"iat": NOW + 61}, "stale_timestamp"),
        ({"exp": "soon"}, "malformed_timestamp"),
        ({"exp": True}, "malformed_timestamp"),
        ({"exp": None}, "accepted"),
    ],
)
def test_the_times_of_a_token_are_of_our_clock(claims: dict[str, Any], expected: str) -> None:
    assert reason(a_token_verifier(), with_token(a_token(**claims))) == expected


def test_a_tolerance_counts_from_when_it_was_issued() -> None:
    verifier = a_token_verifier(tolerance="5m")
    assert reason(verifier, with_token(a_token(iat=NOW - 300))) == "accepted"
    assert reason(verifier, with_token(a_token(iat=NOW - 301))) == "stale_timestamp"
    assert reason(verifier, with_token(a_token())) == "missing_timestamp"


@pytest.mark.parametrize(
    "token",
    ["", "x", "a.b.c", "Bearer ", "é" * 20, b"\xff.\xff.\xff", "." * 1000, "e30.e30.", "x" * (MAX_TOKEN_BYTES + 1),
     jwt.encode({}, "", algorithm="none"), a_token(algorithm="HS512"),
     jwt.api_jws.encode(b"[]", KEY, algorithm="HS256"), jwt.api_jws.encode(b"{", KEY, algorithm="HS256")],
)  # fmt: skip
def test_what_is_no_token_of_the_algorithms_is_malformed(token: str | bytes) -> None:
    assert reason(a_token_verifier(), with_token(token)) == "malformed_signature"


def test_a_token_is_there_once() -> None:
    assert reason(a_token_verifier(), a_request()) == "missing_signature"
    twice = a_request([("Authorization", a_token()), ("Authorization", a_token())])
    assert reason(a_token_verifier(), twice) == "malformed_signature"


def test_any_secret_will_do_and_none_is_told() -> None:
    verifier = a_token_verifier(secrets=["another" * 10, KEY])
    assert reason(verifier, with_token(a_token())) == "accepted"
    error = refusal(a_token_verifier(secrets=["another" * 10]), with_token(a_token()))
    assert error.reason == "bad_signature"
    assert "another" not in str(error)
    assert KEY not in repr(verifier)


def test_tokens_by_private_keys() -> None:
    keys: dict[str, Any] = {
        "ES256": ec.generate_private_key(ec.SECP256R1()),
        "RS256": rsa.generate_private_key(public_exponent=65537, key_size=2048),
    }
    for algorithm, key in keys.items():
        pem = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
        verifier = a_verifier("jwt", algorithms=[algorithm], public_keys=[pem], secrets=None)
        assert reason(verifier, with_token(a_token(key, algorithm))) == "accepted"
        other = "RS256" if algorithm == "ES256" else "ES256"
        assert reason(verifier, with_token(a_token(keys[other], other))) == "malformed_signature"
        # The public key as a secret: the confusion of CVE-2015-9235.
        forged = jwt.api_jws.encode(b"{}", KEY, algorithm="HS256")
        assert reason(verifier, with_token(forged)) == "malformed_signature"
        with pytest.raises(UsageError, match="private key"):
            verifier.sign(BODY, now=NOW, id="", type="", headers={})


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"algorithms": "none", "secrets": [KEY]}, "algorithms: expected one or several of HS256, HS384, HS512, or of"),
        ({"algorithms": [], "secrets": [KEY]}, "algorithms: expected one or several of"),
        ({"algorithms": ["HS256", "RS256"], "secrets": [KEY]}, "algorithms: expected one or several of"),
        ({"algorithms": "RS256", "secrets": [KEY]}, "expected the key 'public_keys' or 'key_set' with RS256, got none"),
        ({"algorithms": "HS256", "public_keys": ["x"]}, "expected the key 'secrets' with HS256, got none"),
        (
            {"algorithms": "HS256", "secrets": [KEY], "public_keys": ["x"]},
            "public_keys: expected no 'public_keys' with HS256",
        ),
        ({"algorithms": "HS256", "secrets": [KEY], "claims": ["a"]}, "claims: expected a mapping of claims to"),
        ({"algorithms": "HS256", "secrets": [KEY], "claims": {"a": "{no}"}}, "claims.a: expected a string, a temp"),
        ({"algorithms": "HS256", "secrets": [KEY], "claims": {"a": 1}}, "claims.a: expected a string, a temp"),
        (
            {"algorithms": "HS256", "secrets": [KEY], "claims": {"a": "{header:X-A}{body:sha256}{body}"}},
            "claims.a: expected a character between {header:x-a} and {body:sha256}",
        ),
        ({"algorithms": "HS256", "secrets": [KEY], "claims": {"u": "{url}"}}, "expected the source's public_url"),
        ({"secrets": [KEY]}, "expected the key 'algorithms', got none"),
    ],
)
def test_the_keys_of_a_token_are_checked(config: dict[str, Any], expected: str) -> None:
    with pytest.raises(SchemeError) as caught:
        a_verifier("jwt", **{"secrets": None, **config})
    assert expected in str(caught.value)


# ---- Keys of a set that is published ----


SET = "https://keys.example.com/certs"


def a_key_set(**keys: Any) -> bytes:
    """Return the set of these private keys' public ones, by their ids."""
    entries = [
        {**jwt.algorithms.RSAAlgorithm.to_jwk(key.public_key(), as_dict=True), "kid": name, "alg": "RS256"}
        for name, key in keys.items()
    ]
    return orjson.dumps({"keys": entries})


def an_rsa_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


ONE, OTHER = an_rsa_key(), an_rsa_key()


def by_set(**config: Any) -> Verifier:
    return a_verifier("jwt", algorithms=["RS256"], key_set=SET, secrets=None, **config)


def of_set(key: rsa.RSAPrivateKey, kid: object, **claims: Any) -> Any:
    headers = {} if kid is None else {"kid": kid}
    payload = orjson.dumps({"exp": int(NOW) + 60, **claims})
    return with_token("Bearer " + jwt.api_jws.encode(payload, key, algorithm="RS256", headers=headers))


def test_a_token_is_verified_by_the_key_of_its_id() -> None:
    keys = KeyCache()
    keys.keep(SET, a_key_set(one=ONE, other=OTHER), NOW)
    verifier = by_set(claims={"aud": "hooks"})
    assert reason(verifier, of_set(ONE, "one", aud="hooks"), keys=keys) == "accepted"
    assert reason(verifier, of_set(OTHER, "other", aud="hooks"), keys=keys) == "accepted"
    assert reason(verifier, of_set(OTHER, "one", aud="hooks"), keys=keys) == "bad_signature"
    assert reason(verifier, of_set(ONE, "one", aud="else"), keys=keys) == "bad_signature"
    assert reason(verifier, of_set(ONE, "one", aud="hooks", exp=0), keys=keys) == "stale_timestamp"
    for kid in (None, "x" * 257):
        assert reason(verifier, of_set(ONE, kid, aud="hooks"), keys=keys) == "malformed_signature"
    assert reason(verifier, with_token("x.y.z"), keys=keys) == "malformed_signature"


@pytest.mark.parametrize(
    "odd",
    [
        *({"kty": "oct", "kid": "odd"}, {"kty": "oct", "k": 1}, {"kty": "RSA", "n": "AQ"}, {"kty": {}}, {}),
        *({"kty": "EC", "crv": 1, "x": "", "y": ""}, {"kty": "OKP", "crv": "Ed25519", "x": "AQ"}, "text", [1], None, 1),
        {"kty": "RSA", "n": "\ud800".encode("utf-16", "surrogatepass").hex(), "e": {"e": []}},
    ],
)
def test_a_key_that_cannot_be_used_takes_no_other_of_its_set_with_it(odd: Any) -> None:
    entries = orjson.loads(a_key_set(one=ONE, other=OTHER))["keys"]
    keys = KeyCache()
    keys.keep(SET, orjson.dumps({"keys": [odd, entries[0], odd, entries[1], odd]}), NOW)
    assert reason(by_set(), of_set(ONE, "one"), keys=keys) == "accepted"
    assert reason(by_set(), of_set(OTHER, "other"), keys=keys) == "accepted"
    with pytest.raises(ValueError, match="expected a JSON Web Key Set, got another document"):
        keys.keep(SET, orjson.dumps({"keys": [odd]}), NOW)


def test_a_set_is_fetched_again_for_an_id_that_it_lacks_and_not_too_often() -> None:
    """Its sender rotates keys; and anybody can make ids up."""
    keys, verifier = KeyCache(), by_set()
    request = of_set(OTHER, "other")
    assert reason(verifier, request, keys=keys) == SET
    keys.keep(SET, a_key_set(one=ONE), NOW)
    assert reason(verifier, request, keys=keys) == "bad_key"
    assert reason(verifier, request, now=NOW + PAUSE - 1, keys=keys) == "bad_key"
    assert reason(verifier, request, now=NOW + PAUSE, keys=keys) == SET
    assert reason(verifier, of_set(ONE, "one"), now=NOW + PAUSE, keys=keys) == "accepted"
    keys.keep(SET, a_key_set(one=ONE, other=OTHER), NOW + PAUSE)
    assert reason(verifier, request, now=NOW + PAUSE, keys=keys) == "accepted"


DEEP = b"[" * 3000 + b"]" * 3000
READABLE = b"[" * 990 + b"]" * 990  # by some libraries, and then not to be shown


@pytest.mark.parametrize(
    "document",
    [
        *(b"{}", b'{"keys": []}', b'{"keys": 7}', b'{"keys": [7]}', b'{"keys": [{}]}', b"{"),
        *(b'{"keys":%b}' % DEEP, b'{"keys":[{"kty":"RSA","kid":%b}]}' % DEEP, b'{"key":%b}' % DEEP),
        *(b'{"keys":[{"kty":"x","a":%b}]}' % READABLE, b'{"keys":[{"kty":"RSA","alg":"x","a":%b}]}' % READABLE),
    ],
)
def test_a_document_that_is_no_set_is_refused(document: bytes) -> None:
    keys = KeyCache()
    with pytest.raises(ValueError, match="expected a JSON Web Key Set"):
        keys.keep(SET, document, NOW)
    assert keys.urls == []


def test_a_symmetric_key_in_a_set_verifies_nothing() -> None:
    """Who publishes a set can't make us take a string for a key."""
    pem = ONE.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    for secret in (b"secret", pem):
        keys = KeyCache()
        text = base64.urlsafe_b64encode(secret).rstrip(b"=").decode()
        keys.keep(SET, orjson.dumps({"keys": [{"kty": "oct", "kid": "one", "k": text, "alg": "HS256"}]}), NOW)
        assert reason(by_set(), of_set(ONE, "one"), keys=keys) == "malformed_signature"


def test_keys_of_several_types_may_have_one_id() -> None:
    """RFC 7517, section 4.5. Each verifies the algorithms of its own type, whichever comes first in the set."""
    curve = ec.generate_private_key(ec.SECP256R1())
    secret = {"kty": "oct", "kid": "one", "k": "c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0c2VjcmV0c2U", "alg": "HS256"}
    entries = [
        *orjson.loads(a_key_set(one=ONE))["keys"],
        {**jwt.algorithms.ECAlgorithm.to_jwk(curve.public_key(), as_dict=True), "kid": "one"},
        secret,
    ]
    tokens: list[tuple[Any, str, str]] = [
        (ONE, "RS256", "accepted"),
        (curve, "ES256", "accepted"),
        (OTHER, "RS256", "bad_signature"),
        (ec.generate_private_key(ec.SECP256R1()), "ES256", "bad_signature"),
        (ed25519.Ed25519PrivateKey.generate(), "EdDSA", "malformed_signature"),  # the set has no such key
        (ONE, "PS256", "malformed_signature"),  # the rules have no such algorithm
        (b"secretsecretsecretsecretsecretse", "HS256", "malformed_signature"),
    ]
    verifier = a_verifier("jwt", algorithms=["RS256", "ES256", "EdDSA"], key_set=SET, secrets=None)
    for order in (entries, entries[::-1]):
        keys = KeyCache()
        keys.keep(SET, orjson.dumps({"keys": order}), NOW)
        for key, algorithm, expected in tokens:
            token = jwt.encode({"exp": int(NOW) + 60}, key, algorithm, headers={"kid": "one"})
            assert reason(verifier, with_token(token), keys=keys) == expected, algorithm


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"key_set": "http://keys.example.com/certs"}, "key_set: expected an https address"),
        ({"key_set": "https://keys.example.com:8443/certs"}, "key_set: expected an https address"),
        ({"key_set": "https://keys.example.com/certs?a"}, "key_set: expected an https address"),
        ({"key_set": "https://*.example.com/certs"}, "key_set: expected an https address"),
        (
            {"key_set": SET, "public_keys": ["x"]},
            "expected the key 'public_keys' or 'key_set' with RS256, got public_keys and",
        ),
        ({"key_set": SET, "secrets": ["x"]}, "secrets: expected no 'secrets' with RS256, got some"),
        (
            {"key_set": SET, "algorithms": "HS256", "secrets": ["x"]},
            "key_set: expected no 'key_set' with HS256, got one",
        ),
    ],
)
def test_where_a_set_is_belongs_to_the_rules(config: dict[str, Any], expected: str) -> None:
    with pytest.raises(SchemeError) as caught:
        a_verifier("jwt", **{"algorithms": "RS256", "secrets": None, **config})
    assert expected in str(caught.value)
