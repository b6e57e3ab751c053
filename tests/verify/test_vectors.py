"""What others have signed is accepted, and nothing else: vectors of vendors and of their libraries."""

import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cache
from urllib.parse import parse_qsl

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.verify.boundaries import Part
from gateway.verify.config_keys import Secret
from gateway.verify.json_web_tokens import JsonWebToken
from gateway.verify.presets import PRESETS, SchemeError
from gateway.verify.request import Request
from gateway.verify.signatures import SignatureCheck
from gateway.verify.signed_string import SignedString
from gateway.verify.sns import SnsSignature
from gateway.verify.verifier import Verifier
from tests.verify.places import Place, accepting, of_part, places, places_of, whole
from tests.verify.shifts import shifts, shifts_of, signed_by_us
from tests.verify.signed_requests import reason
from tests.verify.vectors import Vector, vectors

VECTORS = list(vectors())
FORM = b"application/x-www-form-urlencoded"
MUTATIONS = int(os.environ.get("GATEWAY_MUTATIONS", "20"))
ONE_CHECK_OF_SEVERAL = {("twilio", 3)}
"""The signing methods that no vector is accepted by: the digest of a body, signed as the form of another vector is."""


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
def test_no_part_of_what_is_verified_is_left_out_of_the_changes(vector: Vector) -> None:
    """So that no provider is silently without any, nor a new kind of part."""
    found = list(accepting(vector))
    assert found
    if isinstance(found[0][1], SignatureCheck):  # of several headers with signatures, each is changed
        there = [name for name, _ in vector.request.headers if name.lower() in found[0][1].names]
        assert len(found) >= len(there)
    changed = {place.name for place in places(vector)}
    for _, check, request in found:
        own = [place for place in places_of(check, request, vector) if place.value]
        assert own
        signed = [check.signed] if isinstance(check, SignatureCheck) else []
        if isinstance(check, JsonWebToken):
            signed += [template for _, template in check.claims if isinstance(template, SignedString)]
        for part in [part for template in signed for part in template.parts if isinstance(part, Part)]:
            where = {
                place.name
                for place in of_part(part, request, vector, check if isinstance(check, SignatureCheck) else None)
            }
            is_absent = part.is_optional or part.kind == "url"  # whose query may be empty
            assert where & changed or is_absent or part.kind in {"secret", "given"}, part
        assert covers(vector) == vector.covers
    kinds = {place.name.partition(" ")[0] for place in places(vector)}
    match vector.covers:
        case "body":
            assert kinds & {"body"}
        case "fields":
            assert kinds & {"field", "form"}
        case _:
            assert kinds & {"header", "query", "field"}


def covers(vector: Vector) -> str:
    """Return what of the body the checks vouch for."""
    is_body = is_fields = False
    for _, check, _ in accepting(vector):
        match check:
            case SignatureCheck():
                is_body |= check.signed.covers_body or check.body_digest is not None
                is_fields |= check.signed.has("field") or check.signed.has("form_field")
            case JsonWebToken():
                is_body |= check.covers_body
            case SnsSignature():
                is_fields = True
            case _:
                pass
    return "body" if is_body else "fields" if is_fields else "nothing"


@pytest.mark.parametrize("vector", [each for each in VECTORS if each.covers != "body"], ids=name_of)
def test_what_is_not_covered_may_be_anything(vector: Vector) -> None:
    """The threat model names these providers: a change of the rest is accepted, or `covers` isn't true."""
    sent = vector.request
    if FORM in dict(sent.headers).get(b"Content-Type", b""):
        changed = sent._replace(body=sent.body + b"&another=1")
    else:
        changed = sent._replace(body=re.sub(rb"\}(?=[^}]*$)", b',"another":1}', sent.body))
    assert changed != sent or not sent.body
    assert reason(vector.verifier(), changed, now=vector.now, keys=vector.keys) == "accepted"


def test_every_signing_method_of_a_preset_accepts_a_vector() -> None:
    used = {(vector.scheme, ways_in_use(vector)[index]) for vector in VECTORS for index, _, _ in accepting(vector)}
    methods = {(name, index) for name, preset in PRESETS.items() for index in range(len(preset.methods))}
    assert methods - used == ONE_CHECK_OF_SEVERAL


def ways_in_use(vector: Vector) -> list[int]:
    """Return which of the preset's signing methods the checks of a vector's verifier are: those that have a key."""
    secrets = tuple([Secret(place, text) for place, text in enumerate(vector.config.get("secrets", ()))])
    methods = PRESETS[vector.scheme].with_given({**vector.config, "secrets": secrets})
    proofs = ("secrets", "public_keys", "key_url", "key_set", "topics", "api_secret")
    return [index for index, method in enumerate(methods) if any(method.values.get(name) for name in proofs)]


@pytest.mark.parametrize("vector", VECTORS, ids=name_of)
def test_no_other_key_accepts_it(vector: Vector) -> None:
    for name in ("secrets", "public_keys", "topics"):
        if name in vector.config:
            others = [another(each) for each in vector.config[name]]
            check_config(vector, {name: others})
    for name, _ in PRESETS[vector.scheme].asks:
        check_config(vector, {name: another(vector.config[name])})
    for document in vector.documents:
        elsewhere = replace(vector, documents={document: another_document(vector.documents[document])})
        assert reason(vector.verifier(), vector.request, now=vector.now, keys=elsewhere.keys) != "accepted"


def check_config(vector: Vector, config: dict[str, object]) -> None:
    try:
        verifier = vector.verifier(**config)
    except SchemeError:
        return  # no key of that form any more
    assert reason(verifier, vector.request, now=vector.now, keys=vector.keys) != "accepted"


@pytest.mark.parametrize("vector", [each for each in VECTORS if PRESETS[each.scheme].needs_url], ids=name_of)
def test_no_other_address_accepts_it(vector: Vector) -> None:
    url = vector.public_url
    assert url is not None
    for at in range(url.index("://") + 3, len(url)):
        changed = flip(url.encode(), at).decode()
        try:
            verifier = replace(vector, public_url=changed).verifier()
        except SchemeError:
            continue
        assert reason(verifier, vector.request, now=vector.now, keys=vector.keys) != "accepted"


@pytest.mark.parametrize("vector", VECTORS, ids=name_of)
def test_unsigned_it_is_refused(vector: Vector) -> None:
    bare = vector.request._replace(headers=(), query="", body=b"{}")
    assert reason(vector.verifier(), bare, now=vector.now) != "accepted"


def is_timed(vector: Vector) -> bool:
    return any(check.signing_spec().tolerance is not None for _, check, _ in accepting(vector))


@pytest.mark.parametrize("vector", [each for each in VECTORS if is_timed(each)], ids=name_of)
def test_it_is_stale_later(vector: Vector) -> None:
    """Also by a provider's preset that takes any time, where a source says how old it may be."""
    takes_any = any(math.isinf(check.signing_spec().tolerance or 0) for _, check, _ in accepting(vector))
    verifier = vector.verifier(**({"tolerance": "5m"} if takes_any else {}))
    found = reason(verifier, vector.request, now=vector.now + 86400, keys=vector.keys)
    assert found == "stale_timestamp"


@pytest.mark.parametrize("vector", VECTORS, ids=name_of)
@settings(max_examples=MUTATIONS, deadline=None)
@given(data=st.data())
def test_no_change_that_is_drawn_passes(vector: Vector, data: st.DataObject) -> None:
    """Of a byte of what is signed or compared: replaced, left out or doubled; `make oracles` draws 10,000."""
    verifier, found = known(VECTORS.index(vector))
    place = data.draw(st.sampled_from(found), label="place")
    at = data.draw(st.integers(0, len(place.value) - 1))
    other = data.draw(
        st.sampled_from([b"", place.value[at : at + 1] * 2, *[bytes([place.value[at] ^ 1 << bit]) for bit in range(8)]])
    )
    changed = place.value[:at] + other + place.value[at + 1 :]
    if not means_the_same(vector, place, changed):
        assert reason(verifier, place.put(changed), now=vector.now, keys=vector.keys) != "accepted"


@cache
def known(index: int) -> tuple[Verifier, list[Place]]:
    """Return the verifier of a vector, and its places: once, for thousands of changes."""
    return VECTORS[index].verifier(), places(VECTORS[index])


MOVABLE = {
    ("lark", "header x-lark-request-timestamp", "header x-lark-request-nonce"): "these two headers",
    ("twilio", "query", "body"): "move characters between neighbours",
    ("mandrill", "query", "body"): "Nothing separates names and values",
}
"""Neighbours between which nothing tells where one ends, by the vendor's own scheme, and the note that says so."""


def test_what_may_be_moved_is_told_in_the_notes() -> None:
    for (name, left, right), note in MOVABLE.items():
        assert note in " ".join(PRESETS[name].about["notes"].split())
        vector = next(each for each in VECTORS if each.scheme == name)
        vector = replace(vector, request=vector.request._replace(query="a=1"))
        check = next(each for each in vector.verifier().checks if isinstance(each, SignatureCheck))
        sent = signed_by_us(vector, vector.request, vector.request.body)
        assert sent is not None
        moved = [each for each in shifts_of(check, sent, vector, list) if each[:2] == (left, right)]
        assert any(reason(vector.verifier(), each.request, now=vector.now) == "accepted" for each in moved)


def is_signed_string(vector: Vector) -> bool:
    return any(
        isinstance(check, SignatureCheck) and not check.signed.is_body_alone for _, check, _ in accepting(vector)
    )


@pytest.mark.parametrize("vector", [each for each in VECTORS if is_signed_string(each)], ids=name_of)
@settings(max_examples=max(20, MUTATIONS // 10), deadline=None)
@given(data=st.data())
def test_no_bytes_that_are_moved_between_neighbours_pass(vector: Vector, data: st.DataObject) -> None:
    """The signed string stays the same: some bytes of a part of it are another part's in some ten other requests.

    Its own request is drawn, too, where we can sign: with a body, say, that is full of what separates the parts.
    """
    verifier, _ = known(VECTORS.index(vector))
    for shift in shifts(vector, data):
        verdict = reason(verifier, shift.request, now=vector.now, keys=vector.keys)
        assert verdict != "accepted" or (vector.scheme, shift.left, shift.right) in MOVABLE


SPELLINGS: Mapping[tuple[str, str], Callable[[bytes], bytes]] = {
    # Its libraries verify a payload as it is, and with a line feed after it, which base64 may end with.
    ("braintree", "form bt_payload"): lambda value: value.removesuffix(b"\n"),
}
"""What a vendor's own library takes for the same."""


def means_the_same(vector: Vector, place: Place, changed: bytes) -> bool:
    """Return whether a change is one of spelling alone: of a form, or of what isn't looked at beside a signature."""
    value, spelling = place.value, SPELLINGS.get((vector.scheme, place.name))
    if spelling is not None:
        return spelling(value) == spelling(changed)
    if place.name in {"body", "query"} and place.read is whole:
        is_form = FORM in dict(vector.request.headers).get(b"Content-Type", b"")
        return is_form and joined(value) == joined(changed)
    return place.read(value) == place.read(changed)


def joined(form: bytes) -> str:
    """Return what is signed of a form: nothing separates its names and values, so that a `=` may move unnoticed."""
    return "".join(
        map("".join, sorted(set(parse_qsl(form.decode("latin-1"), keep_blank_values=True, encoding="latin-1"))))
    )


def changes(vector: Vector) -> Iterator[Request]:
    """Return the request with one byte changed, at each place that is verified: some forty bytes of each."""
    for place in places(vector):
        for at in range(0, len(place.value), max(1, len(place.value) // 40)):
            changed = flip(place.value, at)
            if not means_the_same(vector, place, changed):
                yield place.put(changed)


def flip(value: bytes, at: int) -> bytes:
    return value[:at] + bytes([value[at] ^ 1]) + value[at + 1 :]


def another(secret: str) -> str:
    """Return a secret that differs in one character that stands for all its bits."""
    at = len(secret.rstrip("=")) // 2
    return secret[:at] + ("B" if secret[at] != "B" else "C") + secret[at + 1 :]


@cache
def another_document(document: str) -> str:
    """Return a document with a key of the same kind that somebody else has, under the same ids."""
    from cryptography.hazmat.primitives.asymmetric import ec, rsa  # noqa: PLC0415 - only for few vectors
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat  # noqa: PLC0415 - the same
    from jwt.algorithms import ECAlgorithm, RSAAlgorithm  # noqa: PLC0415 - the same

    other = rsa.generate_private_key(public_exponent=65537, key_size=2048).public_key()
    if not document.lstrip().startswith("{"):
        return other.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
    parsed = orjson.loads(document)
    keys = {
        "RSA": RSAAlgorithm.to_jwk(other, as_dict=True),
        "EC": ECAlgorithm.to_jwk(ec.generate_private_key(ec.SECP256R1()).public_key(), as_dict=True),
    }
    for entry in [parsed["key"]] if "key" in parsed else parsed["keys"]:
        entry |= {name: value for name, value in keys[entry["kty"]].items() if name in {"n", "e", "x", "y"}}
    return orjson.dumps(parsed).decode()
