"""Signatures in forms, and of what is in them: Braintree's and Dropbox Sign's, and the parts of signed strings."""

import hashlib
import hmac
import re
import string
import time
from typing import Any
from urllib.parse import parse_qsl, urlencode

import orjson
import pytest

from gateway.model import RefusedError
from gateway.verify.content import MAX_PARTS, Content, parse_field_path
from gateway.verify.handshakes import HandshakeResponse
from gateway.verify.presets import SchemeError
from gateway.verify.request import Request
from gateway.verify.verifier import Verifier
from tests.machine_speed import as_usual
from tests.verify.signed_requests import NOW, SECRET, a_request, a_verifier, reason
from tests.verify.test_vectors import flip
from tests.verify.vectors import Vector, vectors

FORM = ("Content-Type", "application/x-www-form-urlencoded")
BRAINTREES = [vector for vector in vectors() if vector.scheme == "braintree"]
[SIGNS] = [vector for vector in vectors() if vector.scheme == "dropbox-sign"]


# ---- Braintree ----


@pytest.mark.parametrize("vector", BRAINTREES)
def test_each_changed_byte_of_braintrees_payload_and_signature_is_refused(vector: Vector) -> None:
    fields = dict(parse_qsl(vector.request.body.decode()))
    own = fields["bt_signature"].index("integration_public_key")
    for name, text in fields.items():
        value = text.encode()
        for at in range(own if name == "bt_signature" else 0, len(value)):
            body = urlencode({**fields, name: flip(value, at)}).encode()
            assert reason(vector.verifier(), vector.request._replace(body=body)) != "accepted", (name, at)


def test_a_signature_of_another_public_key_is_not_looked_at() -> None:
    [vector, _] = BRAINTREES
    other = vector.verifier(public_key="other_public_key")
    assert reason(other, vector.request) == "bad_signature"
    assert reason(vector.verifier(public_key="a_third"), vector.request) == "malformed_signature"


def braintree() -> Verifier:
    return a_verifier("braintree", public_key="integration_public_key", secrets=["integration_private_key"])


def challenged(query: str) -> HandshakeResponse | None:
    return braintree().unverified_handshake(a_request(query=query)._replace(method="GET"), now=NOW)


def test_braintrees_challenge_is_answered_as_its_library_does() -> None:
    """Braintree 4.48.0 (PyPI): `gateway.webhook_notification.verify("20f9f8ed05f77439fe955c977e4c8a53")`."""
    expected = b"integration_public_key|d9b899556c966b3f06945ec21311865d35df3ce4"
    answer = challenged("bt_challenge=20f9f8ed05f77439fe955c977e4c8a53")
    assert answer is not None
    assert (answer.status, answer.content_type, answer.body) == (200, "text/plain", expected)
    assert challenged("other=20f9f8ed05f77439fe955c977e4c8a53") is None


@pytest.mark.parametrize(
    "challenge", ["", "a" * 19, "a" * 33, "A" * 20, "g" * 20, "20f9f8ed05f77439fe95%0A", "PHhtbC8%2B"]
)
def test_braintree_gets_no_signature_of_what_could_be_an_event(challenge: str) -> None:
    with pytest.raises(RefusedError, match="bad_handshake"):
        challenged(f"bt_challenge={challenge}")


@pytest.mark.parametrize("length", [20, 32])
def test_what_was_signed_as_a_challenge_is_no_event(length: int) -> None:
    """Anybody can have one signed."""
    challenge = "ab" * (length // 2)
    answer = challenged(f"bt_challenge={challenge}")
    assert answer is not None
    for payload in (challenge, f"{challenge}\n"):
        body = urlencode({"bt_signature": answer.body.decode(), "bt_payload": payload}).encode()
        assert reason(braintree(), a_request([FORM], body=body)) in {"unreadable_body", "bad_signature"}


def test_a_parameter_that_comes_twice_is_none() -> None:
    [vector, _] = BRAINTREES
    doubled = vector.request.body + b"&" + vector.request.body
    assert reason(vector.verifier(), vector.request._replace(body=doubled)) == "missing_signature"
    more = vector.request.body + b"&bt_payload=x"
    assert reason(vector.verifier(), vector.request._replace(body=more)) == "unreadable_body"


def test_a_form_that_is_none_is_refused() -> None:
    [vector, _] = BRAINTREES
    for kind in ("application/json", "multipart/form-data; boundary=x"):
        request = a_request([("Content-Type", kind)], body=vector.request.body)
        assert reason(vector.verifier(), request) == "unreadable_body"


# ---- Dropbox Sign ----


def sign_event(**event: object) -> bytes:
    return orjson.dumps({"event": event})


def in_parts(*parts: tuple[str, bytes], boundary: str = "xYz", end: bytes = b"--\r\n") -> Request:
    lines = [
        b'--%b\r\nContent-Disposition: form-data; name="%b"\r\n\r\n%b\r\n' % (boundary.encode(), name.encode(), value)
        for name, value in parts
    ]
    body = b"".join(lines) + b"--" + boundary.encode() + end
    return a_request([("Content-Type", f'multipart/form-data; boundary="{boundary}"')], body=body)


def hashed(time_: str, kind: str) -> str:
    return hmac.new(SECRET.encode(), f"{time_}{kind}".encode(), hashlib.sha256).hexdigest()


GOOD = sign_event(
    event_time="1669926463", event_type="account_created", event_hash=hashed("1669926463", "account_created")
)


def signs() -> Verifier:
    return a_verifier("dropbox-sign")


def test_each_changed_byte_of_what_dropbox_sign_signs_is_refused() -> None:
    body = SIGNS.request.body
    for name in ("event_time", "event_type", "event_hash"):
        found = re.search(rf'"{name}": "([^"]+)"'.encode(), body)
        assert found is not None
        for at in range(*found.span(1)):
            changed = SIGNS.request._replace(body=flip(body, at))
            assert reason(SIGNS.verifier(), changed) != "accepted", (name, at)


def test_the_response_has_what_dropbox_sign_looks_for() -> None:
    response = signs().response
    assert response is not None
    assert (response.status, response.body) == (200, "Hello API Event Received")


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (in_parts(("json", GOOD)), "accepted"),
        (in_parts(("a", b"1"), ("json", GOOD), ("b", b"\r\n--xY\r\n")), "accepted"),
        (a_request([FORM], body=urlencode({"json": GOOD}).encode()), "accepted"),
        (in_parts(("json", GOOD), ("json", GOOD)), "unreadable_body"),
        (in_parts(("jsom", GOOD)), "unreadable_body"),
        (in_parts(("json", b"{")), "unreadable_body"),
        (in_parts(("json", b"[]")), "missing_signature"),
        (in_parts(("json", GOOD), end=b""), "unreadable_body"),
        (in_parts(*[("x", b"")] * (MAX_PARTS - 1), ("json", GOOD)), "accepted"),
        (in_parts(*[("x", b"")] * MAX_PARTS, ("json", GOOD)), "unreadable_body"),
        (in_parts(("json", GOOD))._replace(headers=((b"Content-Type", b"multipart/form-data"),)), "unreadable_body"),
        (a_request(body=GOOD), "unreadable_body"),
        (in_parts(("json", sign_event(event_hash="x", event_time="1", event_type="a"))), "malformed_signature"),
        (in_parts(("json", sign_event(event_hash=hashed("1", "a"), event_time="1"))), "unreadable_body"),
    ],
)
def test_the_event_is_read_from_one_part_of_the_form(request_: Request, expected: str) -> None:
    assert reason(signs(), request_) == expected


def test_a_form_of_many_parts_costs_little() -> None:
    many = a_request([("Content-Type", "multipart/form-data; boundary=x")], body=b"--x\r\n" * 2_000_000)
    wrong = sign_event(event_hash="0" * 64, event_time="1669926463", event_type="a")
    most = in_parts(*[("x", b"")] * (MAX_PARTS - 1), ("json", wrong))
    for request, expected, within in ((many, "unreadable_body", 0.1), (most, "bad_signature", 0.005)):

        def refusing(request: Request = request, expected: str = expected) -> float:
            began = time.thread_time()
            assert reason(signs(), request) == expected
            return time.thread_time() - began

        assert as_usual(refusing) < within


# ---- Other parts of signed strings ----


def test_a_field_may_be_in_a_parameter_of_a_form() -> None:
    content = Content(a_request([FORM], body=b"a=%7B%22b%22%3A%7B%22c%22%3A7%7D%7D&d=1"))
    assert content.field(parse_field_path("a@b.c")) == b"7"
    assert content.field(parse_field_path("a@b.d")) is None
    with pytest.raises(RefusedError, match="unreadable_body"):
        content.field(parse_field_path("e@b"))
    for text in ("@b", "a b@c", "a@", "a@b@c"):
        with pytest.raises(ValueError, match=r"@|^$"):
            parse_field_path(text)


def test_contentfuls_path_is_encoded_as_its_library_does_it() -> None:
    """Node's encodeURI of the path with the query, which querystring.escape has encoded before."""
    verifier = a_verifier(header="X-S", signed="{path:encoded}{body}")
    for path, query, expected in (
        ("/in/a%20b", "", "/in/a%2520b"),
        ("/in/it", "a=1&b=x%20y*", "/in/it?a%253D1%2526b%253Dx%252520y*"),
    ):
        signature = hmac.new(SECRET.encode(), expected.encode() + b"{}", hashlib.sha256).hexdigest()
        request = a_request([("X-S", signature)], body=b"{}", path=path, query=query)
        assert reason(verifier, request) == "accepted"


def contentful(headers: dict[str, str], signed: str) -> str:
    [vector, _] = [each for each in vectors() if each.scheme == "contentful"]
    secret = vector.config["secrets"][0]
    digest = hmac.new(secret.encode(), signed.encode(), hashlib.sha256).hexdigest()
    pairs = {"X-Contentful-Timestamp": str(int(NOW) * 1000), **headers, "X-Contentful-Signature": digest}
    return reason(vector.verifier(), a_request(pairs.items(), body=b"{}"))


def test_contentfuls_timestamp_and_list_are_signed_though_they_are_not_listed() -> None:
    stamp = f"x-contentful-timestamp:{int(NOW) * 1000}"
    listed = {"X-Contentful-Signed-Headers": "x-a", "X-A": " 1 "}
    good = f"POST\n/in/it\nx-a:1;x-contentful-signed-headers:x-a;{stamp}\n{{}}"
    assert contentful(listed, good) == "accepted"
    assert contentful(listed, "POST\n/in/it\nx-a:1\n{}") == "bad_signature"
    assert contentful({"X-Contentful-Signed-Headers": "x-a"}, good) == "missing_header"
    assert contentful({"X-A": "1"}, good) == "missing_header"
    many = {f"x-{n}": "" for n in range(70)}
    assert contentful({"X-Contentful-Signed-Headers": ",".join(many), **many}, good) == "malformed_signature"


def test_hygraphs_environment_is_signed_and_there_once() -> None:
    [vector, _] = [each for each in vectors() if each.scheme == "hygraph"]
    written = dict(vector.request.headers)[b"gcms-signature"].decode()
    for other in ("env=dev", "env=master, env=master", "", 'env=a","x":"'):
        pairs = [("gcms-signature", written.replace("env=master", other))]
        request = a_request(pairs, body=vector.request.body)
        assert reason(vector.verifier(), request, now=vector.now) in {"bad_signature", "malformed_signature"}
    stale = reason(vector.verifier(), vector.request, now=vector.now + 301)
    assert stale == "stale_timestamp"
    assert reason(vector.verifier(), vector.request._replace(body=b"\xff"), now=vector.now) == "unreadable_body"


def test_each_digit_of_authorize_nets_signature_counts() -> None:
    [vector] = [each for each in vectors() if each.scheme == "authorize-net"]
    written = dict(vector.request.headers)[b"X-ANET-Signature"].decode()
    for other in (written.lower(), written.removeprefix("sha512="), written[:-1], written + "0"):
        assert (
            reason(vector.verifier(), a_request([("X-ANET-Signature", other)], body=vector.request.body)) != "accepted"
        )
    assert set(written.removeprefix("sha512=")) <= set(string.digits + "ABCDEF")


# ---- Adobe ----


def test_either_of_adobes_signatures_is_enough_and_the_recipient_counts() -> None:
    vector = next(each for each in vectors() if each.scheme == "adobe-io-events")
    signature = dict(vector.request.headers)[b"x-adobe-digital-signature-1"]
    first: list[tuple[str, str | bytes]] = [
        ("x-adobe-digital-signature-1", signature),
        ("x-adobe-public-key1-path", "/prod/keys/pub-key-1.pem"),
    ]
    second: list[tuple[str, str | bytes]] = [
        ("x-adobe-digital-signature-2", signature),
        ("x-adobe-public-key2-path", "/prod/keys/pub-key-1.pem"),
    ]
    bad: list[tuple[str, str | bytes]] = [("x-adobe-digital-signature-1", flip(signature, 9)), first[1]]
    verifier = vector.verifier()
    for pairs, expected in (
        (first, "accepted"),
        (second, "accepted"),
        (bad + second, "accepted"),
        (bad, "bad_signature"),
    ):
        assert reason(verifier, a_request(pairs, body=vector.request.body), keys=vector.keys) == expected
    other = vector.verifier(client_id="client_id2")
    assert reason(other, vector.request, keys=vector.keys) == "wrong_recipient"
    assert reason(other, vector.request) == "wrong_recipient"  # before a key is fetched
    for path in (
        "https://evil.example/k.pem",
        "https://static.adobeioevents.com.evil.example/k.pem",
        "/a/../b",
        "/a?b",
    ):
        pairs = [("x-adobe-digital-signature-1", signature), ("x-adobe-public-key1-path", path)]
        assert reason(verifier, a_request(pairs, body=vector.request.body)) == "bad_key"


def test_the_rules_say_what_is_wrong_with_a_recipient() -> None:
    config: dict[str, Any] = {"algorithm": "ed25519", "header": "X-S", "public_keys": ["00" * 31 + "07"]}
    for recipient, expected in (
        (7, "recipient: expected a mapping with field and is, got 7"),
        ({"field": "a"}, "recipient: expected the key 'is', got none"),
        ({"field": "a b", "is": "c"}, "recipient.field: expected the path of a JSON field"),
    ):
        with pytest.raises(SchemeError) as caught:
            a_verifier("public-key", secrets=None, recipient=recipient, **config)
        assert expected in str(caught.value)
