"""A signed string can be read in one way alone: no byte of a request moves to another part under its signature."""

import hashlib
import hmac
import re
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.verify.presets import SchemeError
from gateway.verify.request import Request
from gateway.verify.timestamps import FORMATS
from gateway.verify.verifier import Verifier
from tests.verify.both_ways import build_verifier
from tests.verify.signed_requests import NOW, SECRET, a_request, a_verifier, reason, refusal

STAMP = str(int(NOW))
URL = "https://hooks.example.com/in/it"


def over(message: bytes) -> str:
    return hmac.new(SECRET.encode(), message, hashlib.sha256).hexdigest()


def sent(message: bytes, body: bytes, query: str = "", **headers: str | bytes) -> Request:
    """Return a request whose signature is that of a message, whatever it has."""
    pairs = [(name.replace("_", "-"), value) for name, value in headers.items()]
    return a_request([("X-Signature", over(message)), *pairs], body=body, query=query)


def problem(signed: str, **config: Any) -> str:
    with pytest.raises(SchemeError) as caught:
        a_verifier(signed=signed, public_url=URL, **config)
    return str(caught.value)


@pytest.mark.parametrize(
    ("signed", "between"),
    [
        ("{header:X-A}{body}", "{header:x-a} and {body}, or a format as in {header:x-a:s}"),
        ("{body}{header:X-A}", "{body} and {header:x-a}, or a format as in {header:x-a:s}"),
        ("{header:X-A}{header:X-B}.{body}", "{header:x-a} and {header:x-b}, or a format as in {header:x-a:s}"),
        ("{header:X-A}{header:X-B:36}.{body}", "{header:x-a} and {header:x-b}, or a format as in {header:x-a:s}"),
        ("{field:a}{field:b}", "{field:a} and {field:b}, or a format as in {field:a:s}"),
        ("{query:a}{body}", "{query:a} and {body}, or a format as in {query:a:s}"),
        ("{body:crc32}{body}", "{body:crc32} and {body}"),
        ("{url}{header:X-A}.{body}", "{url} and {header:x-a}, or a format as in {header:x-a:s}"),
        ("{secret}{header:X-A}{body}", "{header:x-a} and {body}, or a format as in {header:x-a:s}"),
    ],
)
def test_parts_that_nothing_divides_are_refused(signed: str, between: str) -> None:
    scheme = "hash" if "secret" in signed else "hmac"
    with pytest.raises(SchemeError) as caught:
        a_verifier(scheme, header="X-Signature", signed=signed, public_url=URL)
    expected = f"verify.signed: expected a character between {between}, got neither: bytes could be moved from one"
    assert str(caught.value).startswith(expected)


def test_one_part_alone_may_be_anything() -> None:
    expected = "verify.signed: expected one part that may be anything, got {body} and {header:x-a}"
    assert problem("{body}.{header:X-A:any}").startswith(expected)
    assert problem("{body}.{body}").startswith(expected.replace("{header:x-a}", "{body}"))
    a_verifier(signed="{field:a:any}")
    a_verifier("hash", header="X-S", signed="{header:X-A:any}{header:X-B:any}{secret}{body}")


def test_an_identity_before_a_time_needs_something_that_divides_them() -> None:
    config: dict[str, Any] = {"id_header": "X-Id", "timestamp": {"header": "X-T"}}
    assert "between {id} and {timestamp}" in problem("{id}{timestamp}{body}", **config).replace("{header:x-id}", "{id}")
    a_verifier(signed="{id}{timestamp}{body}", **{**config, "timestamp": {"header": "X-T", "unit": "iso"}})
    a_verifier(signed="{id}.{timestamp}.{body}", **config)


@pytest.mark.parametrize("form", ["", "x", "0", "-1", "1000", "1.5", "٣", "s:s", "ANY"])
def test_only_known_forms_are_taken(form: str) -> None:
    assert "verify.signed: expected a string with {body}" in problem(f"{{header:X-A:{form}}}.{{body}}")


@pytest.mark.parametrize(
    ("form", "good", "bad"),
    [
        ("s", [STAMP, "0000000000"], ["", "1", STAMP + "0", STAMP + "a", "+" + STAMP[1:], "٣" * 10, " " + STAMP]),
        ("ms", [STAMP + "000"], [STAMP, STAMP + "00", STAMP + "0000"]),
        (
            "iso",
            ["2024-01-01T00:00:00Z", "2024-01-01T00:00:00.123456789Z", "2024-01-01T00:00:00-08:00"],
            ["2024-01-01T00:00:00", "2024-01-01 00:00:00Z", "20240101T000000Z", "2024-01-01T00:00:00+0000",
             "2024-W01-1T00:00:00Z", "2024-01-01T00:00:00.Z", "2024-01-01T00:00:00ZZ", "12024-01-01T00:00:00Z"],
        ),
        (
            "date", ["Tue, 14 Apr 2026 03:50:12 GMT", "2026-04-14T03:50:12+00:00"],
            ["Tue, 14 Apr 2026 03:50:12 UTC", "tue, 14 Apr 2026 03:50:12 GMT", "Tuesday, 14-Apr-26 03:50:12 GMT"],
        ),
        ("36", ["x" * 36, "é" * 18], ["x" * 35, "x" * 37]),
    ],
)  # fmt: skip
def test_a_header_has_its_form_or_is_refused(form: str, good: list[str], bad: list[str]) -> None:
    verifier = a_verifier(signed=f"{{header:X-A:{form}}}{{body}}")
    expected = "malformed_signature" if form.isdecimal() else "malformed_timestamp"
    for value in good:
        assert reason(verifier, sent(value.encode() + b"body", b"body", X_A=value.encode())) == "accepted"
    for value in bad:
        assert reason(verifier, sent(value.encode() + b"body", b"body", X_A=value.encode())) == expected


def test_what_divides_two_parts_must_not_be_in_the_first() -> None:
    verifier = a_verifier(signed="{header:X-Time}.{body}")
    assert reason(verifier, sent(b"1.a.b", b"a.b", X_Time="1")) == "accepted"
    refused = refusal(verifier, sent(b"1.a.b", b"b", X_Time="1.a"))
    assert (refused.reason, refused.detail) == (
        "malformed_signature", "expected {header:x-time}, which is signed, without '.' in it, got something else",
    )  # fmt: skip


def test_what_divides_two_parts_must_not_be_in_the_second_after_the_body() -> None:
    verifier = a_verifier(signed="{body}.{header:X-Nonce}.{header:X-Time:s}")
    assert reason(verifier, sent(b"a.b.n.1700000000", b"a.b", X_Nonce="n", X_Time=STAMP)) == "accepted"
    moved = sent(b"a.b.n.1700000000", b"a", X_Nonce="b.n", X_Time=STAMP)
    assert reason(verifier, moved) == "malformed_signature"


def test_one_field_of_several_may_have_what_divides_them() -> None:
    """As Adyen's fields are signed, of which the merchant's own reference may have a colon."""
    verifier = a_verifier(signed="{field:a}:{field:b?:any}:{field:c}:{field:d}")

    def of(message: bytes, **values: str) -> str:
        return reason(verifier, sent(message, orjson.dumps(values)))

    assert of(b"1:x:y:3:4", a="1", b="x:y", c="3", d="4") == "accepted"
    assert of(b"1::3:4", a="1", c="3", d="4") == "accepted"
    assert of(b"1:x:y:3:4", a="1:x", b="y", c="3", d="4") == "malformed_signature"
    assert of(b"1:x:y:3:4", a="1", b="x", c="y:3", d="4") == "malformed_signature"
    assert of(b"1:x:y:3:4", a="1", b="x", c="y", d="3:4") == "malformed_signature"


def test_an_identity_may_have_a_full_stop_but_nothing_like_a_time() -> None:
    """The identity of a CloudEvent, which another gateway passes on, has an address in it."""
    verifier = a_verifier(id_header="X-Id", timestamp={"header": "X-T"}, signed="{id}.{timestamp}.{body}")
    assert reason(verifier, sent(b"a.b 1.%b.{}" % STAMP.encode(), b"{}", X_Id="a.b 1", X_T=STAMP)) == "accepted"
    message = b"a.%b.b.%b.{}" % (STAMP.encode(), STAMP.encode())
    assert reason(verifier, sent(message, b"b.%b.{}" % STAMP.encode(), X_Id="a", X_T=STAMP)) == "accepted"
    assert reason(verifier, sent(message, b"{}", X_Id=f"a.{STAMP}.b", X_T=STAMP)) == "malformed_signature"


def test_twitchs_identity_has_no_time_in_it() -> None:
    verifier = a_verifier(
        id_header="X-Id", timestamp={"header": "X-T", "unit": "iso"}, signed="{id}{timestamp}{body}", tolerance="none"
    )
    first, second = b"2023-11-14T22:13:20Z", b"2023-11-14T22:13:21.5Z"
    message = b"id-1" + first + b'{"at":"' + second + b'"}'
    assert reason(verifier, sent(message, b'{"at":"' + second + b'"}', X_Id="id-1", X_T=first)) == "accepted"
    moved = sent(message, b'"}', X_Id=b"id-1" + first + b'{"at":"', X_T=second)
    assert reason(verifier, moved) == "malformed_signature"


def test_a_body_is_no_end_of_an_address() -> None:
    verifier = a_verifier(signed="{url}{body}", public_url=URL)
    url = URL.encode()
    assert reason(verifier, sent(url + b'?a=1{"b":2}', b'{"b":2}', "a=1")) == "accepted"
    assert reason(verifier, sent(url + b'?a=1{"b":2}', b"2}", 'a=1{"b":')) == "malformed_signature"
    assert reason(verifier, sent(url + b"?a=1b=2", b"b=2", "a=1")) == "unreadable_body"
    assert reason(verifier, sent(url + b"?a=1b=2", b"2", "a=1b=")) == "unreadable_body"
    assert reason(verifier, sent(url + b"b=2", b"b=2")) == "accepted"
    assert reason(verifier, sent(url + b"?b=2", b"?b=2")) == "unreadable_body"
    assert reason(verifier, sent(url + b"?b=2", b"", "b=2")) == "accepted"


def test_an_address_is_no_end_of_a_body() -> None:
    verifier = a_verifier(signed="{body}{url}", public_url=URL)
    body = f'{{"at":"{URL}?a"}}'.encode()
    assert reason(verifier, sent(body + URL.encode(), body)) == "accepted"
    assert reason(verifier, sent(body + URL.encode(), b'{"at":"', f'a"}}{URL}')) == "malformed_signature"


def test_a_signed_header_has_no_other_ones_name_in_it() -> None:
    verifier = a_verifier(signed="{listed:X-Names}\n{body}")
    names = "x-a,x-b"
    good = sent(b"x-a:1;x-b:2;x-names:x-a,x-b\n{}", b"{}", X_Names=names, X_A="1", X_B="2")
    assert reason(verifier, good) == "accepted"
    bad = sent(b"x-a:1;x-b:2;x-b:3;x-names:x-a,x-b\n{}", b"{}", X_Names=names, X_A="1;x-b:2", X_B="3")
    assert reason(verifier, bad) == "malformed_signature"


@pytest.mark.parametrize("names", [b"x-a,\xe3", b"x-a,,x-b", b"x-a x-b", b'"x-a"', b"\xff" * 9000])
def test_a_list_of_signed_headers_has_names_alone(names: bytes) -> None:
    verifier = a_verifier(signed="{listed:X-Names}\n{body}")
    assert reason(verifier, sent(b"x-names:" + names + b"\n{}", b"{}", X_Names=names)) == "malformed_signature"


def test_a_query_that_is_no_text_is_encoded_as_its_bytes() -> None:
    verifier = a_verifier(signed="{path:encoded}\n{body}")
    query = b"a=\xe1".decode("utf-8", "surrogateescape")
    assert reason(verifier, sent(b"/in/it?a%253D%25E1\n{}", b"{}", query)) == "accepted"


def test_an_address_is_decoded_as_hubspot_does() -> None:
    """https://developers.hubspot.com/docs/apps/developer-platform/build-apps/authentication/request-validation."""
    verifier = a_verifier(signed="{url:decoded}{body}", public_url=URL)
    query = "a=%3A%2F%3F%40%21%24%27%28%29%2A%2C%3B&b=%26%20%25%3a+"
    message = f"{URL}?a=:/?@!$'()*,;&b=%26%20%25%3a+{{}}".encode()
    assert reason(verifier, sent(message, b"{}", query)) == "accepted"


def test_a_checksum_of_the_body_is_warned_of() -> None:
    """Whoever has seen one request can make another body with it."""
    told = "expected a signature of the body, got one of its CRC-32: whoever has seen a request can make another body"
    assert (("scheme",), told) in a_verifier(signed="{header:X-A}|{body:crc32}").warnings
    assert (("scheme",), told) in build_verifier({"scheme": "paypal", "webhook_id": "1"}).warnings
    for signed in ("{body}", "{body:sha256}", "{body:crc32}|{body}"):
        assert not [text for _, text in a_verifier(signed=signed).warnings if "CRC" in text]


def test_a_time_has_as_many_digits_as_its_unit() -> None:
    """Else digits of a body that begins with some would be the time's, whatever the tolerance."""
    verifier = a_verifier(timestamp={"header": "X-T"}, signed="{timestamp}{body}", tolerance="none")
    message = STAMP.encode() + b"12"
    assert reason(verifier, sent(message, b"12", X_T=STAMP)) == "accepted"
    assert reason(verifier, sent(message, b"2", X_T=STAMP + "1")) == "malformed_timestamp"
    assert reason(verifier, sent(message, b"012", X_T=STAMP[:-1])) == "malformed_timestamp"


# ---- Fields that are there twice ----


def fields(signed: str, **config: Any) -> Verifier:
    return a_verifier(header="X-Signature", signed=signed, **config)


@pytest.mark.parametrize(
    "body",
    [
        b'{"id":"666","id":"1"}', b'{"id":"1","id":"1"}', b'{"id":"666","i\\u0064":"1"}',
        b'{"a":[{"id":1}],"id":"666","b":1,"id":"1"}', b'{"id":NaN,"id":"1"}',
        b'{"id":%b,"id":"1"}' % (b"9" * 10_000),
    ],
)  # fmt: skip
def test_a_signed_field_that_is_there_twice_is_refused(body: bytes) -> None:
    assert reason(fields("{field:id}"), sent(b"1", body)) == "unreadable_body"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("event.id", b'{"event":{"id":"666"},"event":{"id":"1"}}'),
        ("event.id", b'{"event":{"id":"666","id":"1"}}'),
        ("items.0.id", b'{"items":[{"id":"666","id":"1"}]}'),
        ("items.0.id", b'{"items":[{"id":"666"}],"items":[{"id":"1"}]}'),
    ],
)
def test_neither_may_what_it_is_in(path: str, body: bytes) -> None:
    verifier = fields(f"{{field:{path}}}")
    expected = f"expected {path}, which is signed, once, got the key "
    assert refusal(verifier, sent(b"1", body)).detail.startswith(expected)


def test_what_is_not_signed_may_be_there_twice() -> None:
    verifier = fields("{field:event.id}")
    body = b'{"id":1,"id":2,"event":{"a":1,"id":"1","a":2},"other":{"id":1,"id":"\\u00e4"}}'
    assert reason(verifier, sent(b"1", body)) == "accepted"


def test_a_body_that_is_signed_as_a_whole_may_have_anything_twice() -> None:
    body = orjson.dumps({"at": int(NOW)})[:-1] + b',"at":%b}' % STAMP.encode()
    verifier = a_verifier(timestamp={"field": "at"}, signed="{body}")
    assert reason(verifier, sent(body, body)) == "accepted"


@pytest.mark.parametrize("head", [b"", b"Content-Type: application/json\r\n"])
def test_json_in_a_form_has_its_signed_fields_once(head: bytes) -> None:
    verifier = fields("{field:json@event.id}")

    def in_form(document: bytes) -> Request:
        body = b'--B\r\n%bContent-Disposition: form-data; name="json"\r\n\r\n%b\r\n--B--\r\n' % (head, document)
        pairs = [("X-Signature", over(b"1")), ("Content-Type", "multipart/form-data; boundary=B")]
        return a_request(pairs, body=body)

    assert reason(verifier, in_form(b'{"event":{"id":"1"}}')) == "accepted"
    assert reason(verifier, in_form(b'{"event":{"id":"2","id":"1"}}')) == "unreadable_body"


def test_a_deep_body_whose_fields_are_signed_ends_in_a_refusal() -> None:
    deep = b'{"id":"1","x":' + b'{"id":' * 1000 + b"1" + b"}" * 1000 + b"}"
    assert reason(fields("{field:id}"), sent(b"1", deep)) in {"accepted", "unreadable_body"}


# ---- The forms ----


@given(st.sampled_from(sorted(FORMATS)), st.data())
def test_a_form_ends_where_its_beginning_says_and_begins_where_its_end_says(form: str, data: st.DataObject) -> None:
    """Neither the beginning nor the end of a time is a time: this is what a string is read by."""
    pattern = FORMATS[form]
    text = data.draw(st.from_regex(pattern, fullmatch=True))
    for cut in range(1, len(text)):
        assert not pattern.fullmatch(text[:cut])
        assert not pattern.fullmatch(text[cut:])
    assert re.fullmatch(pattern, text)
