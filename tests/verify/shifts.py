"""Requests whose signed string is that of another one: bytes of a part moved to its neighbour.

Of `{header:X-Time}.{body}`, the string is split anew wherever a `.` is in it; without anything in between, anywhere.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import NamedTuple
from urllib.parse import urlencode

from hypothesis import strategies as st

from gateway.model import UsageError
from gateway.verify.boundaries import Part
from gateway.verify.content import Content
from gateway.verify.request import Request
from gateway.verify.signatures import SignatureCheck
from gateway.verify.signed_string import SigningInput
from tests.verify.places import Place, accepting, of_part
from tests.verify.vectors import Vector

MOVES = 6  # of the places at which two neighbours are split anew, that many are drawn


class Shift(NamedTuple):
    """A request, and the places of the two parts between which bytes were moved."""

    left: str
    right: str
    request: Request


def shifts(vector: Vector, data: st.DataObject) -> list[Shift]:
    """Return requests with the signed string of a vector's, or of one that is drawn and signed by us."""
    found: list[Shift] = []
    for index, check, request in accepting(vector):
        if isinstance(check, SignatureCheck) and not check.signed.is_body_alone:
            sent = _full_of_marks(vector, index, check, request, data)
            found += shifts_of(check, sent, vector, partial(_drawn, data))
    return found


def _drawn(data: st.DataObject, cuts: list[int]) -> list[int]:
    return data.draw(st.lists(st.sampled_from(cuts), max_size=MOVES), label="cuts")


def _full_of_marks(vector: Vector, index: int, check: SignatureCheck, request: Request, data: st.DataObject) -> Request:
    """Return a request with a body full of separators and of the other parts; the vector's if we can't sign."""
    text = check.signed
    if text.has("form") or text.has("form_field") or text.has("field") or check.body_digest or index:
        return request
    if text.has("url"):
        request = request._replace(query=data.draw(st.sampled_from(["", "a=1"]), label="query"))
    words = [each for each in text.parts if isinstance(each, bytes)] + [b"1700000000", b"1", b"2024-01-01T00:00:00Z"]
    words += [value for _, value in request.headers] + [b'{"a":"b"}', b" ", b"?", b"=", request.query.encode()]
    body = b'{"' + b"".join(data.draw(st.lists(st.sampled_from(words), max_size=8), label="body"))
    return signed_by_us(vector, request, body) or request


def signed_by_us(vector: Vector, request: Request, body: bytes) -> Request | None:
    """Return the request with this body, signed by its first signing method; None if only its vendor can."""
    check = vector.verifier().checks[0]
    assert isinstance(check, SignatureCheck)
    location = {*check.names, check.timestamp.name if check.timestamp else b""}
    beside = {name.decode(): value.decode() for name, value in request.headers if name.lower() not in location}
    try:
        pairs = vector.verifier().sign(
            body, now=vector.now, id="id-1", type="push", headers=beside, path=request.path, query=request.query
        )
    except UsageError:
        return None
    return request._replace(headers=tuple([(n.encode(), v.encode()) for n, v in pairs]), body=body)


def shifts_of(
    check: SignatureCheck, sent: Request, vector: Vector, choose: Callable[[list[int]], list[int]]
) -> list[Shift]:
    """Return the requests with the same signed string, at the chosen ones of all places of a split."""
    parts, stamp = check.signed.parts, b""
    if check.timestamp is not None:
        candidates = check._split(check._lines(sent)[0])[1] if check.timestamp.is_element else []
        if check.timestamp.path:
            stamp = Content(sent).field(check.timestamp.path) or b""
        else:
            stamp = candidates[0] if candidates else sent.values(check.timestamp.name)[0]
    given = SigningInput(sent, Content(sent), stamp, check.public_url or "", b"")
    named = [index for index, part in enumerate(parts) if isinstance(part, Part) and part.kind != "secret"]
    pieces = {index: _piece(check, parts[index], given) for index in named}
    found: list[Shift] = []
    for left, right in pairwise(named):
        between = parts[left + 1 : right]
        literal = b"".join([each for each in between if isinstance(each, bytes)])
        if len(between) != sum(isinstance(each, bytes) for each in between):
            continue  # the secret is between them
        whole = pieces[left] + literal + pieces[right]
        cuts = [at for at in range(len(whole) - len(literal) + 1) if whole[at : at + len(literal)] == literal]
        others = [at for at in cuts if at != len(pieces[left])]
        for at in choose(others) if others else []:
            moved = _put(check, sent, vector, (parts[left], whole[:at]), (parts[right], whole[at + len(literal) :]))
            if moved is not None:
                found.append(moved)
    return found


def _piece(check: SignatureCheck, part: bytes | Part, given: SigningInput) -> bytes:
    alone = type(check.signed)((part,))
    return alone.render(given)


def _put(
    check: SignatureCheck,
    sent: Request,
    vector: Vector,
    left: tuple[bytes | Part, bytes],
    right: tuple[bytes | Part, bytes],
) -> Shift | None:
    """Return the request with these parts; None if no request can have them."""
    names = []
    for part, value in (left, right):
        assert isinstance(part, Part)
        place = _place(part, sent, vector, check)
        written = _written(part, value, place, check, sent)
        if place is None or written is None:
            return None
        names.append(place.name)
        sent = place.put(written)
    return Shift(names[0], names[1], sent)


def _place(part: Part, sent: Request, vector: Vector, check: SignatureCheck) -> Place | None:
    found = list(of_part(part, sent, vector, check))
    return found[0] if found else None


def _written(  # noqa: PLR0911 - one for each kind
    part: Part, value: bytes, place: Place | None, check: SignatureCheck, sent: Request
) -> bytes | None:
    """Return what is at a place, so that a part has a value; None if nothing is."""
    if place is None or part.name in {b"sha256", b"crc32", b"json"} or part.kind in {"element", "listed", "method"}:
        return None  # a digest, a string of JSON, or what a source takes nothing else of
    if part.kind == "form":
        return urlencode([(value, b"")]).encode()  # a name without a value: that is the string
    if part.kind == "url":
        address = (check.public_url or "").encode()
        rest = value.removeprefix(address)
        is_address = value.startswith(address) and (not rest or rest.startswith(b"?"))
        return rest[1:] if (is_address and part.name != b"decoded") or (is_address and b"%" not in rest) else None
    if part.kind == "path":
        return None  # a source has one
    if part.kind == "timestamp" and check.timestamp is not None and check.timestamp.is_element:
        stamp = check._split(check._lines(sent)[0])[1][0]
        return place.value.replace(stamp, value, 1)
    if place.name.startswith("header ") and any(byte < 0x20 for byte in value):
        return None
    return value
