"""The generic schemes: what they accept, and every reason to refuse."""

import base64
import hashlib
import hmac
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.model import RefusedError, UsageError
from gateway.verify import algorithms, credentials
from gateway.verify.check import MAX_CANDIDATES, MAX_LINES
from gateway.verify.config_reader import ConfigPath, Path
from gateway.verify.presets import read_preset
from gateway.verify.request import MAX_PARAMETERS, Reason
from gateway.verify.verifier import Verifier
from tests.verify.both_ways import build_verifier
from tests.verify.signed_requests import BODY, NOW, SECRET, WHSEC, a_request, a_verifier, reason, refusal

GOOD = hmac.new(SECRET.encode(), BODY, hashlib.sha256).hexdigest()
BAD = "0" * 64


def stamped(**config: Any) -> Verifier:
    return a_verifier(timestamp={"header": "X-Time"}, signed="{timestamp}.{body}", **config)


def listed(**config: Any) -> Verifier:
    """Like Stripe: timestamp and signatures are elements of one header."""
    return a_verifier(separator=",", prefix="v1=", timestamp={"prefix": "t="}, signed="{timestamp}.{body}", **config)


def over(message: bytes, secret: bytes = SECRET.encode()) -> str:
    return hmac.new(secret, message, hashlib.sha256).hexdigest()


# ---- Signatures ----


@pytest.mark.parametrize("algorithm", ["sha1", "sha256", "sha512"])
@pytest.mark.parametrize("encoding", ["hex", "base64"])
def test_each_algorithm_and_encoding(algorithm: str, encoding: str) -> None:
    digest = hmac.new(SECRET.encode(), BODY, algorithm).digest()
    text = digest.hex() if encoding == "hex" else base64.b64encode(digest).decode()
    verifier = a_verifier(algorithm=algorithm, encoding=encoding)
    verifier.verify(a_request([("x-signature", text)]), now=NOW)
    assert reason(verifier, a_request([("x-signature", text)], body=b"")) == "bad_signature"


SANITY = "t=1633519811129,v1=tLa470fx7qkLLEcMOcEUFuBbRSkGujyskxrNXcoh0N0"
"""Of `{"_id":"resume"}` with the secret `test`.

https://github.com/sanity-io/webhook-toolkit/blob/v4.0.4/test/signature.test.ts
"""


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (SANITY, "accepted"),
        (SANITY.replace("129,", "128,"), "bad_signature"),
        (SANITY[:-1] + "1", "bad_signature"),
        (SANITY + "=", "malformed_signature"),
    ],
)
def test_base64url_is_as_a_vendors_library(value: str, expected: str) -> None:
    verifier = a_verifier(
        header="sanity-webhook-signature",
        encoding="base64url",
        separator=",",
        prefix="v1=",
        timestamp={"prefix": "t=", "unit": "ms"},
        signed="{timestamp}.{body}",
        secrets=["test"],
    )
    request = a_request([("sanity-webhook-signature", value)], body=b'{"_id":"resume"}')
    assert reason(verifier, request, now=1633519812.0) == expected


def test_header_names_have_no_case_and_config_neither() -> None:
    for name in ("X-SIGNATURE", "x-signature", "X-Signature"):
        a_verifier(header="x-SIGNATURE").verify(a_request([(name, GOOD)]), now=NOW)


@pytest.mark.parametrize("body", [b"", b"\0", b"\xff\xfe\0", b"a\0b" * 1000])
def test_any_bytes_are_a_body(body: bytes) -> None:
    a_verifier().verify(a_request([("X-Signature", over(body))], body=body), now=NOW)


def test_every_secret_is_good_while_they_rotate() -> None:
    verifier = a_verifier(secrets=["new", SECRET])
    for secret in (b"new", SECRET.encode()):
        verifier.verify(a_request([("X-Signature", over(BODY, secret))]), now=NOW)
    assert reason(verifier, a_request([("X-Signature", over(BODY, b"older"))])) == "bad_signature"
    assert verifier.sign(BODY, now=NOW, id="", type="", headers={}) == [("X-Signature", over(BODY, b"new"))]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("", "malformed_signature"),
        ("deadbeef", "malformed_signature"),
        (GOOD + "0", "malformed_signature"),
        (f"sha256={GOOD}", "malformed_signature"),
        (f"{GOOD},{GOOD}", "malformed_signature"),  # no separator: one signature
        ("x" * 100_000, "malformed_signature"),
        (b"\xe9" * 64, "bad_signature"),
        ("é" * 32, "bad_signature"),
        (b"\0" * 64, "bad_signature"),
        (GOOD.upper(), "bad_signature"),  # one spelling, so that no changed byte passes
        (BAD, "bad_signature"),
    ],
)
def test_a_signature_that_isnt_the_one(value: str | bytes, expected: str) -> None:
    assert reason(a_verifier(), a_request([("X-Signature", value)])) == expected


def test_an_unsigned_request() -> None:
    error = refusal(a_verifier(), a_request([("X-Signatures", GOOD)]))
    assert (error.reason, error.detail) == (
        "missing_signature",
        "expected a signature in the header X-Signature, got none",
    )


def test_a_good_signature_among_others_is_enough() -> None:
    listed_ = a_verifier(separator=" ", prefix="v1,")
    values = ["v1a,AAAA", f"v1,{BAD}", "v1,short", "", "garbage", f"v1,{GOOD}"]
    listed_.verify(a_request([("X-Signature", " ".join(values))]), now=NOW)
    assert reason(listed_, a_request([("X-Signature", " ".join(values[:-1]))])) == "bad_signature"
    for nothing in (f"v2,{GOOD} {GOOD}", "v1,short v1,", f"v1,{GOOD}0"):
        assert reason(listed_, a_request([("X-Signature", nothing)])) == "malformed_signature"


def test_repeated_headers_are_all_considered() -> None:
    good, bad, malformed = ("X-Signature", GOOD), ("x-signature", BAD), ("X-Signature", "?")
    for pairs in ([good, bad], [bad, good], [malformed, good], [good, good]):
        a_verifier().verify(a_request(pairs), now=NOW)
    assert reason(a_verifier(), a_request([bad, malformed])) == "bad_signature"
    assert reason(a_verifier(), a_request([malformed, bad, malformed])) == "bad_signature"
    assert reason(a_verifier(), a_request([malformed, malformed])) == "malformed_signature"


def test_a_flood_of_signatures_is_refused_without_looking() -> None:
    assert reason(a_verifier(), a_request([("X-Signature", GOOD)] * (MAX_LINES + 1))) == "malformed_signature"
    several = a_verifier(separator=",")
    most = ",".join([BAD] * (MAX_CANDIDATES - 1) + [GOOD])
    several.verify(a_request([("X-Signature", most)]), now=NOW)
    assert reason(several, a_request([("X-Signature", f"{BAD},{most}")])) == "malformed_signature"
    assert reason(several, a_request([("X-Signature", GOOD + "," * 100_000)])) == "malformed_signature"


def test_signatures_are_compared_in_constant_time_and_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []

    def compare_digest(left: bytes, right: bytes) -> bool:
        compared.append((left, right))
        return hmac.compare_digest(left, right)

    # Time can't be measured reliably, so this asks which comparison is used.
    for module in (algorithms, credentials):
        monkeypatch.setattr(module, "hmac", Hmac(compare_digest))
    several = a_verifier(separator=",", secrets=["other", SECRET])
    several.verify(a_request([("X-Signature", f"{GOOD},{BAD}")]), now=NOW)
    expected = [over(BODY, b"other"), GOOD]
    assert compared == [(s.encode(), e.encode()) for e in expected for s in (GOOD, BAD)]

    compared.clear()
    tokens = a_verifier("token", header="X-Token", secrets=["a", "b"])
    tokens.verify(a_request([("X-Token", "a"), ("X-Token", "c")]), now=NOW)
    assert compared == [(b"a", b"a"), (b"a", b"b"), (b"c", b"a"), (b"c", b"b")]


class Hmac:
    """The module `hmac` with functions that are watched."""

    def __init__(self, compare_digest: object, digest: object = hmac.digest) -> None:
        self.compare_digest = compare_digest
        self.digest = digest


def test_no_signature_is_computed_twice_for_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ways to sign, four header lines each and three secrets cost 24 of them over the whole body."""
    made: list[tuple[bytes, bytes]] = []

    def digest(key: bytes, message: bytes, algorithm: str) -> bytes:
        made.append((key, message))
        return hmac.digest(key, message, algorithm)

    # What is computed can't be seen from outside but by the time that it takes.
    monkeypatch.setattr(algorithms, "hmac", Hmac(hmac.compare_digest, digest))
    secrets = ["whsec_" + base64.b64encode(bytes([byte]) * 24).decode() for byte in b"abc"]
    forged = "v1," + base64.b64encode(b"0" * 32).decode()
    pairs = [
        (f"{brand}-{name}", value)
        for brand in ("svix", "webhook")
        for name, value in [("id", "msg_1"), ("timestamp", str(int(NOW))), *[("signature", forged)] * 4]
    ]
    verifier = a_verifier("svix", secrets=secrets)
    assert reason(verifier, a_request(pairs)) == "bad_signature"
    assert len(made) == len(set(made)) == 3
    made.clear()
    # Another content is another signature.
    other = [(name, "msg_2" if name == "webhook-id" else value) for name, value in pairs]
    assert reason(verifier, a_request(other)) == "bad_signature"
    assert len(made) == len(set(made)) == 6


HEAD_REFUSALS: dict[str, tuple[Any, list[tuple[str, str]], str]] = {
    "no signature": (a_verifier, [], "missing_signature"),
    "a malformed one": (a_verifier, [("X-Signature", "?")], "malformed_signature"),
    "no timestamp": (
        lambda: a_verifier("slack", secrets=[SECRET]),
        [("X-Slack-Signature", f"v0={BAD}")],
        "missing_timestamp",
    ),
    "a stale timestamp": (
        lambda: a_verifier("stripe", secrets=[SECRET]),
        [("Stripe-Signature", f"t={int(NOW) - 301},v1={BAD}")],
        "stale_timestamp",
    ),
    "no id, which is signed": (
        lambda: a_verifier("standard-webhooks", secrets=["whsec_c2VjcmV0LXNlY3JldC1zZWNyZXQ="]),
        [("webhook-timestamp", str(int(NOW))), ("webhook-signature", "v1," + "A" * 44)],
        "missing_header",
    ),
    "a wrong token": (
        lambda: a_verifier("token", header="X-Token", secrets=["a"]),
        [("X-Token", "b")],
        "bad_credentials",
    ),
    "no token": (lambda: a_verifier("bearer", secrets=["a"]), [], "missing_credentials"),
}


@pytest.mark.parametrize("case", HEAD_REFUSALS)
def test_a_refusal_by_headers_needs_no_body(case: str) -> None:
    make, pairs, expected = HEAD_REFUSALS[case]
    with pytest.raises(RefusedError) as caught:
        make().check_head(a_request(pairs, body=b""), now=NOW)
    assert caught.value.reason == expected


def test_a_slow_bodys_timestamp_is_judged_when_its_headers_arrive() -> None:
    verifier = a_verifier("stripe", secrets=[SECRET])
    sent = a_request(verifier.sign(BODY, now=NOW, id="", type="", headers={}))
    assert verifier.check_head(sent._replace(body=b""), now=NOW + 299).verify(sent).identity == verifier.id
    with pytest.raises(RefusedError, match="doesn't match this request"):
        verifier.check_head(sent, now=NOW + 299).verify(sent._replace(body=BODY + b" "))


# ---- Timestamps and other signed parts ----


@pytest.mark.parametrize(
    ("stamp", "expected"),
    [
        (str(int(NOW)), "accepted"),
        (f"0{int(NOW)}", "malformed_timestamp"),
        ("", "malformed_timestamp"),
        ("now", "malformed_timestamp"),
        (f"{NOW}", "malformed_timestamp"),
        (f"-{int(NOW)}", "malformed_timestamp"),
        (f"+{int(NOW)}", "malformed_timestamp"),
        ("1_700_000_000", "malformed_timestamp"),
        ("\u0661\u0667\u0660", "malformed_timestamp"),
        ("9" * 10, "stale_timestamp"),
        ("9" * 11, "malformed_timestamp"),
        ("0", "malformed_timestamp"),
        ("0000000000", "stale_timestamp"),
    ],
)
def test_timestamps_are_digits(stamp: str, expected: str) -> None:
    signature = over(stamp.encode() + b"." + BODY)
    assert reason(stamped(), a_request([("X-Time", stamp), ("X-Signature", signature)])) == expected
    assert reason(listed(), a_request([("X-Signature", f"t={stamp},v1={signature}")])) == expected


@pytest.mark.parametrize(
    ("unit", "stamp", "expected"),
    [
        ("ms", str(int(NOW * 1000)), "accepted"),
        ("ms", str(int(NOW)), "malformed_timestamp"),
        ("s", str(int(NOW * 1000)), "malformed_timestamp"),
        ("ms", "0" * 13, "stale_timestamp"),
        ("iso", "2023-11-14T22:13:20Z", "accepted"),
        ("iso", "2023-11-14T23:13:20.5+01:00", "accepted"),
        ("iso", "2023-11-14T22:13:20", "malformed_timestamp"),
        ("iso", "2023-11-14 22:13:20Z", "malformed_timestamp"),
        ("iso", "20231114T221320Z", "malformed_timestamp"),
        ("iso", "2023-11-31T22:13:20Z", "malformed_timestamp"),
        ("iso", "2023-11-14T22:13:20é", "malformed_timestamp"),
        ("iso", "9999-12-31T23:59:59-23:59", "stale_timestamp"),
        ("iso", str(int(NOW)), "malformed_timestamp"),
    ],
)
def test_units_of_timestamps(unit: str, stamp: str, expected: str) -> None:
    verifier = a_verifier(timestamp={"header": "X-Time", "unit": unit}, signed="{timestamp}{body}")
    request = a_request([("X-Time", stamp), ("X-Signature", over(stamp.encode() + BODY))])
    assert reason(verifier, request) == expected


def test_a_timestamp_is_there_once() -> None:
    signature = over(b"1700000000." + BODY)
    assert reason(stamped(), a_request([("X-Signature", signature)])) == "missing_timestamp"
    twice = [("X-Time", "1700000000"), ("X-Time", "1700000000"), ("X-Signature", signature)]
    assert reason(stamped(), a_request(twice)) == "malformed_timestamp"
    assert reason(listed(), a_request([("X-Signature", f"v1={signature}")])) == "missing_timestamp"
    assert reason(listed(), a_request([("X-Signature", f"t=1,t=2,v1={signature}")])) == "malformed_timestamp"


def test_each_header_line_has_its_own_timestamp() -> None:
    old, new = b"1600000000", b"1700000000"
    lines = [("X-Signature", f"t={t.decode()},v1={over(t + b'.' + BODY)}") for t in (old, new)]
    listed().verify(a_request(lines), now=NOW)
    mixed = f"t={new.decode()},v1={over(old + b'.' + BODY)}"
    assert reason(listed(), a_request([lines[0], ("X-Signature", mixed)])) != "accepted"


def test_the_tolerance_is_five_minutes_by_default_any_duration_or_none() -> None:
    request = a_request([("X-Time", "1700000000"), ("X-Signature", over(b"1700000000." + BODY))])
    assert reason(stamped(), request, now=NOW + 300) == "accepted"
    assert reason(stamped(), request, now=NOW + 301) == "stale_timestamp"
    assert reason(stamped(tolerance="1h30m"), request, now=NOW - 5400) == "accepted"
    assert reason(stamped(tolerance="500ms"), request, now=NOW - 0.6) == "stale_timestamp"
    assert reason(stamped(tolerance="none"), request, now=NOW + 1e9) == "accepted"


def test_a_stale_timestamp_says_how_stale() -> None:
    request = a_request([("X-Time", "1700000000"), ("X-Signature", over(b"1700000000." + BODY))])
    assert refusal(stamped(), request, now=NOW + 412).detail == (
        "expected a timestamp at most 300 s from now, got one 412 s ago"
    )
    assert refusal(stamped(), request, now=NOW - 412).detail.endswith("412 s ahead")


def test_the_signed_string_is_made_of_its_parts() -> None:
    verifier = a_verifier(
        signed="{{{method}}}|{path}|{url}|{header:X-Account}|{id}|{timestamp}|{body}",
        id_header="X-Id",
        timestamp={"header": "X-Time"},
        public_url="https://hooks.example.com/base",
    )
    message = b"{POST}|/in/it|https://hooks.example.com/base?a=%20|acme|7|1700000000|" + BODY
    headers = [("X-Account", "acme"), ("X-Id", "7"), ("X-Time", "1700000000")]
    verifier.verify(a_request([*headers, ("X-Signature", over(message))], query="a=%20"), now=NOW)
    assert verifier.id == 'headers["x-id"]'

    missing = a_request([*headers[1:], ("X-Signature", over(message))])
    assert refusal(verifier, missing).detail == "expected the header x-account, which is signed, got none"
    assert reason(verifier, missing) == "missing_header"
    assert reason(verifier, a_request([*headers, ("x-id", "7"), ("X-Signature", GOOD)])) == "repeated_header"


@pytest.mark.parametrize(
    ("encoding", "secret", "key"),
    [
        ("raw", "whsec_AAAA", b"whsec_AAAA"),
        ("hex", "00fF10", b"\x00\xff\x10"),
        ("base64", "AP8Q", b"\x00\xff\x10"),
        ("base64", "AP8=", b"\x00\xff"),
        ("base64", "AP8", b"\x00\xff"),
        ("whsec", WHSEC, b"0123456789abcdef0123456789abcdef"),
        ("whsec", WHSEC.removeprefix("whsec_").rstrip("="), b"0123456789abcdef0123456789abcdef"),
        ("raw", "pässwörd\udcff", b"p\xc3\xa4ssw\xc3\xb6rd\xff"),
    ],
)
def test_secrets_are_decoded_as_the_scheme_says(encoding: str, secret: str, key: bytes) -> None:
    verifier = a_verifier(secret_encoding=encoding, secrets=[secret])
    verifier.verify(a_request([("X-Signature", over(BODY, key))]), now=NOW)


# ---- Credentials ----


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([("x-token", SECRET)], "accepted"),
        ([("X-Token", "wrong"), ("X-Token", SECRET)], "accepted"),
        ([("X-Token", "wrong")], "bad_credentials"),
        ([("X-Token", "")], "bad_credentials"),
        ([("X-Token", SECRET + "\0")], "bad_credentials"),
        ([("X-Token", b"\xff")], "bad_credentials"),
        ([("X-Token", "x" * 100_000)], "bad_credentials"),
        ([("X-Token", SECRET)] * (MAX_CANDIDATES + 1), "bad_credentials"),
        ([], "missing_credentials"),
    ],
)
def test_token_in_a_header(headers: list[tuple[str, str | bytes]], expected: str) -> None:
    verifier = a_verifier("token", header="X-Token")
    assert reason(verifier, a_request(headers)) == expected
    assert b"x-token" in verifier.credential_headers


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("token=h%C3%BCsh+1", "accepted"),
        ("a=b&token=h%c3%bcsh%2b1&c", "accepted"),
        ("token=wrong&token=h%C3%BCsh+1", "accepted"),
        ("token=h%C3%BCsh", "bad_credentials"),
        ("token=\udcff", "bad_credentials"),
        ("token", "bad_credentials"),
        ("Token=h%C3%BCsh+1", "missing_credentials"),
        ("%74oken=h%C3%BCsh+1", "missing_credentials"),  # the ingress couldn't take it out
        ("", "missing_credentials"),
        ("token=h%C3%BCsh+1" + "&a" * (MAX_PARAMETERS - 1), "accepted"),
        ("token=h%C3%BCsh+1" + "&a" * MAX_PARAMETERS, "missing_credentials"),
    ],
)
def test_token_in_the_query(query: str, expected: str) -> None:
    verifier = a_verifier("token", query="token", secrets=["hüsh+1"])
    assert reason(verifier, a_request(query=query)) == expected
    assert verifier.credential_query == {"token"}
    assert verifier.signed_query(now=NOW) == "token=h%C3%BCsh%2B1"
    verifier.verify(a_request(query=verifier.signed_query(now=NOW)), now=NOW)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("Bearer hush", "accepted"),
        ("bEARER   hush", "accepted"),
        ("Bearer wrong", "bad_credentials"),
        ("Bearer ", "bad_credentials"),
        ("Bearer", "missing_credentials"),
        ("hush", "missing_credentials"),
        ("Basic hush", "missing_credentials"),
    ],
)
def test_bearer(value: str, expected: str) -> None:
    assert reason(a_verifier("bearer"), a_request([("Authorization", value)])) == expected


@pytest.mark.parametrize(
    ("credentials", "expected"),
    [
        ("ann:hüsh:1", "accepted"),
        ("ann:hush", "accepted"),
        ("ann:", "bad_credentials"),
        ("bob:hush", "bad_credentials"),
        ("annhush", "bad_credentials"),
    ],
)
def test_basic(credentials: str, expected: str) -> None:
    verifier = a_verifier("basic", username="ann", secrets=["hush", "hüsh:1"])
    value = "Basic " + base64.b64encode(credentials.encode()).decode()
    assert reason(verifier, a_request([("authorization", value)])) == expected
    assert reason(verifier, a_request([("Authorization", "Basic ***")])) == "bad_credentials"


def test_none_accepts_everyone_and_says_so() -> None:
    verifier = a_verifier("none")
    verifier.verify(a_request(), now=NOW)
    assert verifier.scheme == "none"
    assert verifier.sign(BODY, now=NOW, id="i", type="t", headers={"A": "b"}) == [("A", "b")]


def test_what_lets_everyone_in_says_so_whatever_its_name() -> None:
    problems: dict[tuple[Path, str], None] = {}
    where = ConfigPath((), problems)
    own = read_preset({"verify": {"scheme": "none"}}, where)
    assert own is not None
    verifier = build_verifier({"scheme": "own"}, providers={"own": own})
    assert verifier.is_open
    assert not problems
    read_preset({"verify": [{"header": "X-Signature"}, {"scheme": "none"}]}, where)
    [(path, message)] = problems
    assert path == ("verify", 1, "scheme")
    assert message.startswith("expected none alone, ")


@pytest.mark.parametrize(
    ("claims", "is_weak"),
    [
        ({"aud": "us"}, False),
        ({"sub": "repo:us/app"}, False),
        ({"iss": "https://id.example.com"}, True),
        (None, True),
    ],
)
def test_a_token_for_anybody_is_a_weakness(*, claims: dict[str, str] | None, is_weak: bool) -> None:
    keys = "https://id.example.com/keys"
    verifier = a_verifier("jwt", secrets=None, algorithms=["RS256"], key_set=keys, claims=claims)
    assert any(message.startswith("expected claims of the token") for _, message in verifier.warnings) == is_weak


@pytest.mark.parametrize(
    ("signed", "is_weak"), [("{secret}{body}", True), ("{secret}.{body}.", True), ("{body}{secret}", False)]
)
def test_a_hash_that_can_be_extended_is_a_weakness(*, signed: str, is_weak: bool) -> None:
    """https://en.wikipedia.org/wiki/Length_extension_attack."""
    verifier = a_verifier("hash", header="X-Signature", signed=signed, secrets=["0123456789abcdef"])
    assert any("length extension" in message for _, message in verifier.warnings) == is_weak


def test_credentials_of_every_scheme_stay_at_the_ingress() -> None:
    always = {b"authorization", b"cookie", b"proxy-authorization"}
    for verifier in (a_verifier(), a_verifier("bearer"), a_verifier("none"), a_verifier("github")):
        assert verifier.credential_headers == always
        assert verifier.credential_query == frozenset()


def test_a_verifier_without_checks_refuses() -> None:
    verifier = Verifier(
        scheme="none",
        id=None,
        type=None,
        credential_headers=frozenset(),
        credential_query=frozenset(),
        checks=(),
    )
    assert reason(verifier, a_request()) == "missing_signature"


# ---- Signing, and secrets that are never shown ----


SIGNERS = {
    "hmac": a_verifier(),
    "stamped": stamped(),
    "listed": listed(),
    "identified": a_verifier(id_header="X-Id", signed="{id}.{body}"),
    "token": a_verifier("token", header="X-Token"),
    "basic": a_verifier("basic", username="ann"),
    "bearer": a_verifier("bearer"),
    "none": a_verifier("none"),
}


@pytest.mark.parametrize("name", SIGNERS)
@given(body=st.binary(max_size=200), now=st.floats(1e9, 9e9))
def test_its_own_signature_is_accepted(name: str, body: bytes, now: float) -> None:
    pairs = SIGNERS[name].sign(body, now=now, id="i", type="t", headers={"X-Other": "o"})
    assert pairs[0] == ("X-Other", "o")
    SIGNERS[name].verify(a_request(pairs, body=body), now=now)


def test_a_signed_digest_covers_the_body() -> None:
    verifier = a_verifier(header="X-S", signed="{query:d}", body_digest={"query": "d"})
    digest = hashlib.sha256(BODY).hexdigest()
    pairs = verifier.sign(BODY, now=NOW, id="1", type="t", headers={}, query=f"d={digest}")
    assert reason(verifier, a_request(pairs, query=f"d={digest}"), now=NOW) == "accepted"
    assert reason(verifier, a_request(pairs, query=f"d={digest}", body=b"{}"), now=NOW) == "bad_signature"
    other = f"d={hashlib.sha256(b'{}').hexdigest()}"
    assert reason(verifier, a_request(pairs, query=other, body=b"{}"), now=NOW) == "bad_signature"
    assert reason(verifier, a_request(pairs, query=f"d={digest.upper()}"), now=NOW) == "bad_signature"
    for query in ("", f"d={digest}&d={digest}"):
        assert reason(verifier, a_request(pairs, query=query), now=NOW) == "missing_header"
    with pytest.raises(UsageError, match="expected the query parameter d, which is signed, once, got none"):
        verifier.sign(BODY, now=NOW, id="1", type="t", headers={})


def test_an_empty_form_is_no_form() -> None:
    verifier = a_verifier(header="X-S", signed="{method}{form}")
    form = ("Content-Type", "application/x-www-form-urlencoded")
    assert reason(verifier, a_request([form, ("X-S", over(b"POSTa1b\xc3\xa4"))], body=b"b=%C3%A4&a=1")) == "accepted"
    for body in (b"", b"&&"):
        assert reason(verifier, a_request([form, ("X-S", over(b"POST"))], body=body)) == "unreadable_body"
    assert reason(verifier, a_request([("X-S", over(b"POSTa1"))], body=b"a=1")) == "unreadable_body"


def test_given_headers_win_and_are_signed() -> None:
    stale = stamped().sign(BODY, now=NOW, id="", type="", headers={"x-time": "1600000000"})
    assert stale == [("x-time", "1600000000"), ("X-Signature", over(b"1600000000." + BODY))]
    assert reason(stamped(), a_request(stale)) == "stale_timestamp"
    forged = a_verifier().sign(BODY, now=NOW, id="", type="", headers={"x-signature": BAD})
    assert forged == [("x-signature", BAD)]


def test_a_signed_header_that_only_the_caller_knows_must_be_given() -> None:
    verifier = a_verifier(signed="{header:X-Account}.{body}")
    with pytest.raises(UsageError, match="expected the header x-account"):
        verifier.sign(BODY, now=NOW, id="", type="", headers={})
    pairs = verifier.sign(BODY, now=NOW, id="", type="", headers={"X-Account": "acme"})
    verifier.verify(a_request(pairs), now=NOW)


def test_a_secret_is_never_shown() -> None:
    for verifier in [*SIGNERS.values(), a_verifier("github"), a_verifier("gitlab")]:
        assert SECRET not in repr(verifier)
        assert SECRET not in repr(verifier.checks)
    verifier = a_verifier(secrets=["first", "second"])
    error = refusal(verifier, a_request([("X-Signature", BAD)]))
    for hidden in ("first", "second", over(BODY, b"first"), over(BODY, b"second"), BAD):
        assert hidden not in str(error)


def test_reasons_are_a_closed_set() -> None:
    assert {str(member) for member in Reason} == {
        "missing_signature",
        "malformed_signature",
        "bad_signature",
        "missing_timestamp",
        "malformed_timestamp",
        "stale_timestamp",
        "missing_header",
        "repeated_header",
        "missing_credentials",
        "bad_credentials",
        "unreadable_body",
        "bad_key",
        "key_unavailable",
        "wrong_recipient",
        "unconfirmed_subscription",
    }
