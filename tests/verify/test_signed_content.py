"""What signatures take from a body, a form or a query, and where else than in one header they are."""

import hashlib
import hmac
import time
import zlib
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.verify.presets import SchemeError
from gateway.verify.verifier import Verifier
from tests.machine_speed import as_usual
from tests.verify.signed_requests import BODY, NOW, SECRET, a_request, a_verifier, reason, refusal

FORM = "application/x-www-form-urlencoded"
STAMP = str(int(NOW))


def over(message: bytes, secret: bytes = SECRET.encode()) -> str:
    return hmac.new(secret, message, hashlib.sha256).hexdigest()


def as_json(**fields: object) -> bytes:
    return orjson.dumps(fields)


def signed_fields(signed: str, **config: Any) -> Verifier:
    return a_verifier(header=None, field="signature", signed=signed, **config)


# ---- JSON fields ----


MEBIBYTE = 1 << 20


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"token":"x","y":[' + b"{}," * (MEBIBYTE // 3) + b"1]}", "bad_credentials"),
        (b'{"token":"x","y":{' + b",".join([b'"%x":0' % n for n in range(MEBIBYTE // 12)]) + b"}}", "bad_credentials"),
        (b'{"token":"' + b"x" * MEBIBYTE + b'"}', "bad_credentials"),
        (b'{"token":' + b"[" * MEBIBYTE, "unreadable_body"),
        (b'{"token":' + b"9" * MEBIBYTE + b"}", "unreadable_body"),
    ],
)
def test_a_strangers_body_with_a_token_costs_little_and_is_refused(body: bytes, expected: str) -> None:
    """It is parsed to find the token, before anything is verified."""
    verifier, request = a_verifier("token", field="token"), a_request(body=body)

    def refusing() -> float:
        began = time.thread_time()
        assert reason(verifier, request) == expected
        return time.thread_time() - began

    assert as_usual(refusing) < 0.1


def test_a_signature_may_be_in_the_body_and_cover_fields_of_it() -> None:
    verifier = signed_fields("{field:event.at}|{field:event.kind}")
    body = as_json(event={"at": 17, "kind": "sold"}, signature=over(b"17|sold"))
    assert reason(verifier, a_request(body=body)) == "accepted"
    assert reason(verifier, a_request(body=body.replace(b"sold", b"gone"))) == "bad_signature"
    assert reason(verifier, a_request(body=as_json(event={}))) == "missing_signature"
    assert reason(verifier, a_request(body=as_json(signature="x"))) == "malformed_signature"
    assert reason(verifier, a_request(body=as_json(signature=7))) == "malformed_signature"


@pytest.mark.parametrize(
    ("value", "text"),
    [("a", b"a"), ("", b""), ("é", "é".encode()), (7, b"7"), (-7, b"-7"), (2**63, b"9223372036854775808"),
     (True, b"true"), (False, b"false")],
)  # fmt: skip
def test_fields_are_text_as_the_vendors_write_it(value: object, text: bytes) -> None:
    body = as_json(x=value, signature=over(b"<" + text + b">"))
    assert reason(signed_fields("<{field:x}>"), a_request(body=body)) == "accepted"


@pytest.mark.parametrize("value", [1.5, [], {}, [1]])
def test_a_field_whose_text_depends_on_who_writes_it_is_refused(value: object) -> None:
    body = as_json(x=value, signature=over(b"<" + orjson.dumps(value) + b">"))
    assert reason(signed_fields("<{field:x}>"), a_request(body=body)) == "unreadable_body"


@pytest.mark.parametrize("body", [as_json(signature=over(b"<>")), as_json(x=None, signature=over(b"<>"))])
def test_a_field_is_required_unless_it_is_marked(body: bytes) -> None:
    assert refusal(signed_fields("<{field:x}>"), a_request(body=body)).detail == "expected x, which is signed, got none"
    assert reason(signed_fields("<{field:x?}>"), a_request(body=body)) == "accepted"


def test_an_index_is_of_a_list_with_one_item() -> None:
    """Nothing would vouch for the others."""
    verifier = signed_fields("{field:items.0.id}")
    good = as_json(items=[{"id": "a"}], signature=over(b"a"))
    assert reason(verifier, a_request(body=good)) == "accepted"
    more = as_json(items=[{"id": "a"}, {"id": "forged"}], signature=over(b"a"))
    assert refusal(verifier, a_request(body=more)).detail == "expected one item in items.0.id, got 2"
    others: list[object] = [[], {}, "a", None]
    for items in others:
        body = as_json(items=items, signature=over(b""))
        assert reason(verifier, a_request(body=body)) == "unreadable_body"


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"7", b"\xff", b"[" * 100_000])
def test_a_body_that_is_not_json_is_refused(body: bytes) -> None:
    assert reason(signed_fields("{field:x}"), a_request(body=body)) in {"unreadable_body", "missing_signature"}


@given(st.binary(max_size=100))
def test_no_body_does_more_than_be_refused(body: bytes) -> None:
    assert reason(signed_fields("{field:x}.{body}"), a_request(body=body)) != "accepted"


def test_a_timestamp_may_be_in_the_signed_body() -> None:
    verifier = a_verifier(timestamp={"field": "sent", "unit": "ms"}, tolerance="1m")

    def reason_of(**fields: object) -> str:
        body = as_json(**fields)
        return reason(verifier, a_request([("X-Signature", over(body))], body=body))

    assert reason_of(sent=int(NOW * 1000)) == "accepted"
    assert reason_of(sent=int(NOW * 1000) - 60_001) == "stale_timestamp"
    assert reason_of(sent="soon") == "malformed_timestamp"
    assert reason_of() == "missing_timestamp"
    unsigned = a_request(body=as_json(sent=int(NOW * 1000)))
    assert reason(verifier, unsigned) == "missing_signature"


def test_a_token_may_be_in_the_body() -> None:
    verifier = a_verifier("token", field="passcode")
    assert reason(verifier, a_request(body=as_json(passcode=SECRET))) == "accepted"
    assert reason(verifier, a_request(body=as_json(passcode="guess"))) == "bad_credentials"
    assert reason(verifier, a_request(body=as_json())) == "missing_credentials"
    assert reason(verifier, a_request(body=b"hush")) == "unreadable_body"


def test_a_token_may_have_to_be_in_each_item_of_a_list() -> None:
    """Else what is added to the list would be accepted beside one that has it."""
    verifier = a_verifier("token", field="value.*.state")
    assert reason(verifier, a_request(body=as_json(value=[{"state": SECRET}]))) == "accepted"
    assert reason(verifier, a_request(body=as_json(value=[{"state": SECRET}] * 3))) == "accepted"
    assert reason(verifier, a_request(body=as_json(value=[{"state": SECRET}, {"state": "guess"}]))) == "bad_credentials"
    nothing: list[object] = [[], None, {}, {"state": SECRET}, "x", [{"state": SECRET}, {}], [SECRET]]
    for value in nothing:
        assert reason(verifier, a_request(body=as_json(value=value))) == "missing_credentials"
    many = as_json(value=[{"state": SECRET}] * 1001)
    assert reason(verifier, a_request(body=many)) == "unreadable_body"
    with pytest.raises(SchemeError, match="expected the path of a JSON field such as data"):
        signed_fields("{body}", timestamp={"field": "items.*.at"})


# ---- Forms, digests, queries ----


def a_form(body: bytes, signature: str, kind: str = FORM) -> Any:
    return a_request([("Content-Type", kind), ("X-Signature", signature)], body=body)


def test_a_form_is_signed_sorted_and_decoded() -> None:
    verifier = a_verifier(signed="{path}{form}")
    signature = over(b"/in/it" + "a1a2bé c".encode())
    assert reason(verifier, a_form(b"b=%C3%A9+c&a=2&a=1&a=2", signature)) == "accepted"
    assert reason(verifier, a_form(b"b=%C3%A9+c&a=2&a=1", signature, f"{FORM}; charset=utf-8")) == "accepted"
    assert reason(verifier, a_form(b"b=%C3%A9+c&a=2&a=3", signature)) == "bad_signature"
    assert reason(verifier, a_form(b"&".join([b"a=1"] * 1001), signature)) == "unreadable_body"


def test_a_signed_form_must_be_one() -> None:
    """Else a body of another kind, which has no parameters, would be covered by nothing but the address."""
    verifier = a_verifier(signed="{path}{form}")
    assert reason(verifier, a_form(b'{"a":1}', over(b"/in/it"), "application/json")) == "unreadable_body"
    assert reason(verifier, a_request([("X-Signature", over(b"/in/it"))], body=b'{"a":1}')) == "unreadable_body"
    assert reason(verifier, a_form(b"", over(b"/in/it"))) == "unreadable_body"


def test_a_digest_stands_for_the_body() -> None:
    for part, digest in (
        ("{body:sha256}", hashlib.sha256(BODY).hexdigest().encode()),
        ("{body:crc32}", str(zlib.crc32(BODY)).encode()),
    ):
        verifier = a_verifier(signed="id|" + part)
        assert reason(verifier, a_request([("X-Signature", over(b"id|" + digest))])) == "accepted"
        assert reason(verifier, a_request([("X-Signature", over(b"id|" + digest))], body=b"x")) == "bad_signature"


def test_a_signature_may_be_in_the_query() -> None:
    verifier = a_verifier(header=None, query="signature")
    assert reason(verifier, a_request(query=f"a=1&signature={over(BODY)}")) == "accepted"
    assert reason(verifier, a_request(query=f"signature={over(b'x')}")) == "bad_signature"
    assert reason(verifier, a_request(query="signature")) == "malformed_signature"
    assert reason(verifier, a_request(query="sig=1")) == "missing_signature"


def test_a_query_parameter_may_be_signed() -> None:
    verifier = a_verifier(signed="{query:n}.{body}")
    signature = [("X-Signature", over(b"a b." + BODY))]
    assert reason(verifier, a_request(signature, query="n=a%20b")) == "accepted"
    assert reason(verifier, a_request(signature, query="n=a%20c")) == "bad_signature"
    for query in ("", "n=a%20b&n=a%20b"):
        assert reason(verifier, a_request(signature, query=query)) == "missing_header"


# ---- Several headers, positions, hashes ----


def test_a_signature_may_be_in_any_of_several_headers() -> None:
    for header in (["X-Primary", "X-Secondary"], "X-Signature-{n}"):
        names = header if isinstance(header, list) else ["X-Signature-1", "x-signature-10"]
        verifier = a_verifier(header=header)
        for name in names:
            assert reason(verifier, a_request([(name, over(BODY))])) == "accepted"
        both = [(names[0], over(b"x")), (names[1], over(BODY))]
        assert reason(verifier, a_request(both)) == "accepted"
        assert reason(verifier, a_request(both[:1])) == "bad_signature"
        assert reason(verifier, a_request([("X-Signature-11", over(BODY))])) == "missing_signature"


def test_numbered_headers_are_ten_at_most() -> None:
    verifier = a_verifier(header="X-Signature-{n}")
    many = [(f"X-Signature-{n}", over(BODY)) for n in range(1, 11)]
    assert reason(verifier, a_request(many)) == "accepted"
    assert reason(verifier, a_request([*many, many[0]])) == "malformed_signature"


def test_a_timestamp_may_be_the_first_element() -> None:
    verifier = a_verifier(separator=",", timestamp={"position": 1}, signed="{timestamp}.{body}")
    signature = over(f"{STAMP}.".encode() + BODY)
    for value in (f"{STAMP},{signature}", f"{STAMP},{over(b'x')},{signature}"):
        assert reason(verifier, a_request([("X-Signature", value)])) == "accepted"
    assert reason(verifier, a_request([("X-Signature", f"{signature},{STAMP}")])) == "malformed_signature"
    assert reason(verifier, a_request([("X-Signature", f"{int(NOW) + 1},{signature}")])) == "bad_signature"
    ((_, sent),) = verifier.sign(BODY, now=NOW, id="", type="", headers={})
    assert sent == f"{STAMP},{signature}"


def test_a_hash_has_the_secret_in_its_string() -> None:
    verifier = a_verifier("hash", header="X-Signature", signed="{secret}.{body}", secrets=["other", SECRET])
    signature = hashlib.sha256(SECRET.encode() + b"." + BODY).hexdigest()
    assert reason(verifier, a_request([("X-Signature", signature)])) == "accepted"
    assert reason(verifier, a_request([("X-Signature", signature)], body=b"x")) == "bad_signature"
    assert reason(verifier, a_request([("X-Signature", hashlib.sha256(b"." + BODY).hexdigest())])) == "bad_signature"


@pytest.mark.parametrize(
    ("encoding", "key"),
    [("nfkd", "e\u0301".encode()), ("sha1", hashlib.sha1("\u00e9".encode(), usedforsecurity=False).digest())],
)
def test_a_key_may_be_made_of_the_secret(encoding: str, key: bytes) -> None:
    verifier = a_verifier(secret_encoding=encoding, secrets=["\u00e9"])
    assert reason(verifier, a_request([("X-Signature", over(BODY, key))])) == "accepted"
