"""What others have signed is accepted, and nothing else: vectors of vendors and of their libraries."""

import os
import re
from collections.abc import Iterator
from urllib.parse import parse_qsl

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.verify.presets import SchemeError
from gateway.verify.request import Request
from tests.verify.signed_requests import reason
from tests.verify.vectors import Vector, vectors

VECTORS = list(vectors())
FORM = b"application/x-www-form-urlencoded"
MUTATIONS = int(os.environ.get("GATEWAY_MUTATIONS", "20"))


def signed_values(vector: Vector) -> list[bytes]:
    """Return the values of the headers that are signed or compared, else empty, then the query's and the body's."""
    sent, specs = vector.request, vector.verifier().signing_specs
    named = {
        name.lower().encode() for spec in specs for name in (spec.header, spec.timestamp_header, spec.id_header) if name
    }
    headers = [value if name.lower() in named else b"" for name, value in sent.headers]
    query = sent.query.encode() if any(spec.query for spec in specs) else b""
    return [*headers, query, sent.body if vector.covers == "body" else b""]


def name_of(vector: Vector) -> str:
    return vector.scheme


@pytest.mark.parametrize("vector", VECTORS, ids=name_of)
def test_what_the_vendor_has_signed_is_accepted(vector: Vector) -> None:
    vector.verifier().verify(vector.request, now=vector.now, keys=vector.keys)


@pytest.mark.parametrize("vector", VECTORS, ids=name_of)
def test_a_changed_byte_is_refused(vector: Vector) -> None:
    """Of the signature or credential, of what is signed beside the body, and of the body."""
    verifier = vector.verifier()
    for changed in changes(vector):
        assert reason(verifier, changed, now=vector.now, keys=vector.keys) != "accepted"


@pytest.mark.parametrize("vector", VECTORS, ids=name_of)
def test_no_other_key_accepts_it(vector: Vector) -> None:
    for name in ("secrets", "public_keys"):
        if name in vector.config:
            others = [another(each) for each in vector.config[name]]
            try:
                verifier = vector.verifier(**{name: others})
            except SchemeError:
                continue  # no key of that form any more
            assert reason(verifier, vector.request, now=vector.now, keys=vector.keys) != "accepted"


@pytest.mark.parametrize("vector", VECTORS, ids=name_of)
def test_unsigned_it_is_refused(vector: Vector) -> None:
    bare = vector.request._replace(headers=(), query="", body=b"{}")
    assert reason(vector.verifier(), bare, now=vector.now) != "accepted"


def is_timed(vector: Vector) -> bool:
    return any(spec.tolerance is not None for spec in vector.verifier().signing_specs)


@pytest.mark.parametrize("vector", [each for each in VECTORS if is_timed(each)], ids=name_of)
def test_it_is_stale_later(vector: Vector) -> None:
    assert reason(vector.verifier(), vector.request, now=vector.now + 86400) == "stale_timestamp"


@pytest.mark.parametrize("vector", [each for each in VECTORS if any(signed_values(each))], ids=name_of)
@settings(max_examples=MUTATIONS, deadline=None)
@given(data=st.data())
def test_no_change_that_is_drawn_passes(vector: Vector, data: st.DataObject) -> None:
    """Of a byte of what is signed or compared: replaced, left out or doubled; `make oracles` draws 10,000."""
    sent, verifier = vector.request, vector.verifier()
    parts = [(index, value) for index, value in enumerate(signed_values(vector)) if value]
    index, value = data.draw(st.sampled_from(parts))
    at = data.draw(st.integers(0, len(value) - 1))
    other = data.draw(
        st.sampled_from([b"", value[at : at + 1] * 2, *[bytes([value[at] ^ 1 << bit]) for bit in range(8)]])
    )
    changed = value[:at] + other + value[at + 1 :]
    if not means_the_same(vector, value, changed):
        assert reason(verifier, with_value(sent, index, changed), now=vector.now, keys=vector.keys) != "accepted"


def with_value(sent: Request, index: int, value: bytes) -> Request:
    count = len(sent.headers)
    if index == count:
        return sent._replace(query=value.decode("utf-8", "surrogateescape"))
    if index > count:
        return sent._replace(body=value)
    return sent._replace(headers=(*sent.headers[:index], (sent.headers[index][0], value), *sent.headers[index + 1 :]))


def means_the_same(vector: Vector, value: bytes, changed: bytes) -> bool:
    """Return whether a change is one of spelling alone: of spaces, an empty element, a scheme's name, a form."""
    if value in {vector.request.body, vector.request.query.encode()}:
        is_form = FORM in dict(vector.request.headers).get(b"Content-Type", b"")
        return is_form and joined(value) == joined(changed)
    if re.sub(rb"([,;])\1", rb"\1", changed) == value:  # an element that is empty
        return True
    bare, others = value.replace(b" ", b"").lower(), changed.replace(b" ", b"").lower()
    return bare == others and b" " in value + changed and value.partition(b" ")[2] in changed


def joined(form: bytes) -> str:
    """Return what is signed of a form: nothing separates its names and values, so that a `=` may move unnoticed."""
    return "".join(
        map("".join, sorted(set(parse_qsl(form.decode("latin-1"), keep_blank_values=True, encoding="latin-1"))))
    )


def changes(vector: Vector) -> Iterator[Request]:
    """Return the request with one byte changed: each of the signed headers' and of the query's, some of the body's."""
    sent = vector.request
    specs = vector.verifier().signing_specs
    named = {
        name.lower().encode() for spec in specs for name in (spec.header, spec.timestamp_header, spec.id_header) if name
    }
    for index, (name, value) in enumerate(sent.headers):
        if name.lower() in named and value:
            for at in range(0, len(value), max(1, len(value) // 40)):
                forged = flip(value, at)
                yield sent._replace(headers=(*sent.headers[:index], (name, forged), *sent.headers[index + 1 :]))
    if any(spec.query for spec in specs) or vector.public_url:  # which is signed with the query
        for at, byte in enumerate(sent.query):
            if re.match(r"\w", byte):
                yield sent._replace(query=sent.query[:at] + chr(ord(byte) ^ 1) + sent.query[at + 1 :])
    if vector.covers == "body":
        for at in range(0, len(sent.body), max(1, len(sent.body) // 100)):
            yield sent._replace(body=flip(sent.body, at))


def flip(value: bytes, at: int) -> bytes:
    return value[:at] + bytes([value[at] ^ 1]) + value[at + 1 :]


def another(secret: str) -> str:
    """Return a secret that differs in one character that stands for all its bits."""
    at = len(secret.rstrip("=")) // 2
    return secret[:at] + ("B" if secret[at] != "B" else "C") + secret[at + 1 :]
