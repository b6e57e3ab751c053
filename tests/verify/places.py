"""Where a request can be changed that somebody has signed: what its verification looks at, by the checks themselves.

A place is a header, the query, the path, the method, the body, a field of it or a parameter of a form. What no check
looks at is no place: the vector says by `covers` what of the body that is.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple
from urllib.parse import parse_qsl, urlencode, urlsplit

import orjson

from gateway.model import RefusedError
from gateway.verify.boundaries import Part
from gateway.verify.check import Check
from gateway.verify.content import ALL, Content, FieldPath, InForm, shown_path
from gateway.verify.credentials import Credential
from gateway.verify.json_web_tokens import JsonWebToken
from gateway.verify.message_signatures import MessageSignature
from gateway.verify.public_keys import PublicKeys
from gateway.verify.remote_keys import KeyNeededError
from gateway.verify.request import Request
from gateway.verify.signatures import SignatureCheck
from gateway.verify.signed_string import SignedString
from gateway.verify.sns import SnsSignature
from tests.verify.vectors import Vector

SNS_FIELDS = (
    *("Message", "MessageId", "Subject", "Timestamp", "TopicArn", "Type"),
    *("Signature", "SignatureVersion", "SigningCertURL"),
)
_MARK = "gateway-place-mark"


def whole(value: bytes) -> object:
    return value


class Place(NamedTuple):
    """What a request has at a place, and that request with something else there.

    `read` is what of a value counts: the signatures among other elements, a credential without its scheme's name.
    """

    name: str
    value: bytes
    put: Callable[[bytes], Request]
    read: Callable[[bytes], object] = whole


def accepting(vector: Vector) -> Iterator[tuple[int, Check, Request]]:
    """Return the checks that accept a vector by themselves, with their places among all, and its request.

    Of several headers with signatures, of which any will do, the request is returned with each alone.
    """
    for index, check in enumerate(vector.verifier().checks):
        for request in _with_one_signature(vector.request, check):
            if accepts(check, vector, request):
                yield index, check, request


def accepts(check: Check, vector: Vector, request: Request) -> bool:
    try:
        check.check_head(request, vector.now)(request, Content(request, vector.keys, vector.now))
    except (RefusedError, KeyNeededError):
        return False
    return True


def _with_one_signature(request: Request, check: Check) -> Iterator[Request]:
    names = {*check.names} if isinstance(check, SignatureCheck) else set()
    there = [name for name, _ in request.headers if name.lower() in names]
    if len(there) <= 1:
        yield request
        return
    for kept in there:
        headers = [pair for pair in request.headers if pair[0] == kept or pair[0].lower() not in names]
        yield request._replace(headers=tuple(headers))


def places(vector: Vector) -> list[Place]:
    """Return the places of a vector's request that are not empty."""
    found: dict[tuple[str, Request], Place] = {}
    for _, check, request in accepting(vector):
        for place in places_of(check, request, vector):
            if place.value:
                found.setdefault((place.name, request), place)
    return list(found.values())


def places_of(  # noqa: C901, PLR0912 - one case for each kind of check
    check: Check, request: Request, vector: Vector
) -> Iterator[Place]:
    """Return what a check looks at."""
    match check:
        case SignatureCheck():
            yield from _of_signature(check, request, vector)
        case JsonWebToken():
            place = _header(request, check.header.lower().encode())
            yield place._replace(read=lambda value: value[7:] if value[:7].lower() == b"bearer " else value)
            for _, template in check.claims:
                if isinstance(template, SignedString):
                    for part in template.parts:
                        if isinstance(part, Part):
                            yield from of_part(part, request, vector)
        case MessageSignature():
            # Of a header with parameters beside its name, only a part may be covered.
            covered = re.findall(rb'"([^"]+)"(?!;)', b"".join(request.values(b"signature-input")))
            location = (check.signing_spec().header or "").lower().encode()
            for name in dict.fromkeys([location, b"content-digest", *covered]):
                if request.values(name):
                    yield _header(request, name)
            yield from (_body(request), _query(request))
        case Credential():
            if check.path:
                yield from _fields(request, check.path)
            else:
                place = _header(request, check.header.lower().encode()) if check.header else _query(request)
                yield place._replace(read=lambda value: check.given(place.put(value)))
        case SnsSignature():
            message = orjson.loads(request.body)
            for name in (*SNS_FIELDS, "SubscribeURL", "Token"):
                is_signed = name not in {"SubscribeURL", "Token"} or message["Type"] != "Notification"
                if name in message and is_signed:
                    yield from _fields(request, (name,))
        case _:
            raise AssertionError(check)  # a kind of check that nobody has thought of here


def _of_signature(  # noqa: C901 - one branch for each place
    check: SignatureCheck, request: Request, vector: Vector
) -> Iterator[Place]:
    named = [part for part in check.signed.parts if isinstance(part, Part)]
    marks = tuple([str(part.path[0]).encode() for part in named if part.kind == "element"])

    def read(value: bytes) -> object:
        elements = [each.strip(b" ") for each in value.split(check.separator or b"\0")]
        return check._split(value), [each for each in elements if each.startswith(marks)]

    for name in check.names:
        if request.values(name):
            yield _header(request, name)._replace(read=read)
    if check.parameter or check.body_digest:
        yield _query(request)
    if check.body_digest:
        yield _body(request)
    for path in (check.path, check.recipient[0] if check.recipient else ()):
        if path:
            yield from _fields(request, path)
    if check.form:
        yield _form(request, check.form)._replace(read=read)
    if isinstance(check.algorithm, PublicKeys) and check.algorithm.key_url:
        address = check.algorithm.key_url
        yield from [_header(request, address.header)] if address.header else _fields(request, address.path)
    for part in check.signed.parts:
        if isinstance(part, Part):
            yield from of_part(part, request, vector, check)


def of_part(  # noqa: C901, PLR0912 - one case for each kind of part
    part: Part, request: Request, vector: Vector, check: SignatureCheck | None = None
) -> Iterator[Place]:
    """Return where a part of a signed string is taken from; nothing for those that the rules have."""
    match part.kind:
        case "header" | "element":
            yield _header(request, part.name)
        case "listed":
            always = part.name.split(b",")
            listed = b"".join(request.values(always[0])).lower().split(b",")
            yield from [_header(request, name) for name in dict.fromkeys([*always, *[each.strip() for each in listed]])]
        case "timestamp":
            stamp = check.timestamp if check else None
            if stamp is not None:
                names = check.names if check else ()
                yield from (_fields(request, stamp.path) if stamp.path else [_header(request, stamp.name or names[0])])
        case "body" | "form":
            yield _body(request)
        case "form_field":
            yield _form(request, part.name.decode())
        case "query":
            yield _query(request)
        case "url":
            yield _query(request)
            if not urlsplit(vector.public_url or "").path:
                yield _path(request)
        case "path":
            yield from [_path(request), _query(request)] if part.name else [_path(request)]
        case "method":
            put = lambda value: request._replace(method=value.decode("latin-1"))  # noqa: E731 - as the others
            yield Place("method", request.method.encode(), put)
        case "field":
            yield from _fields(request, part.path)
        case "secret" | "given":
            pass
        case _:
            raise AssertionError(part)


def _header(request: Request, name: bytes) -> Place:
    index = next((index for index, (found, _) in enumerate(request.headers) if found.lower() == name), None)
    if index is None:
        return Place(f"header {name.decode()}", b"", lambda _: request)

    def put(value: bytes) -> Request:
        before, (written, _), after = request.headers[:index], request.headers[index], request.headers[index + 1 :]
        return request._replace(headers=(*before, (written, value), *after))

    return Place(f"header {name.decode()}", request.headers[index][1], put)


def _body(request: Request) -> Place:
    return Place("body", request.body, lambda value: request._replace(body=value))


def _query(request: Request) -> Place:
    return Place(
        "query", request.query.encode("utf-8", "surrogateescape"),
        lambda value: request._replace(query=value.decode("utf-8", "surrogateescape")),
    )  # fmt: skip


def _path(request: Request) -> Place:
    return Place("path", request.path.encode(), lambda value: request._replace(path=value.decode("latin-1")))


def _form(request: Request, name: str) -> Place:
    pairs = parse_qsl(request.body.decode("latin-1"), keep_blank_values=True, encoding="latin-1")

    def put(value: bytes) -> Request:
        others = [(key, each.encode("latin-1")) for key, each in pairs if key != name]
        return request._replace(body=urlencode([*others, (name, value)]).encode())

    return Place(f"form {name}", dict(pairs).get(name, "").encode("latin-1"), put)


def _fields(request: Request, path: FieldPath) -> Iterator[Place]:
    """Return the field of a JSON body at a path, or of each item of a list; in a form, too."""
    values = Content(request).fields(path)
    for index, value in enumerate(values):
        each = tuple([index if name == ALL else name for name in path])
        name = f"field {shown_path(each)}" if len(values) > 1 else f"field {shown_path(path)}"
        yield Place(name, value or b"", _field_setter(request, each))


def document_of(request: Request, path: FieldPath) -> object:
    """Return the JSON that a path is in."""
    return orjson.loads(_json_text(request.body) if path and isinstance(path[0], InForm) else request.body)


def _json_text(body: bytes) -> bytes:
    """Return the JSON in a multipart form of one part, as the vectors have it."""
    [text] = re.findall(rb'name="json"[^{]*(\{.*\})\r\n--', body, re.DOTALL)
    assert isinstance(text, bytes)
    return text


def _field_setter(request: Request, path: FieldPath) -> Callable[[bytes], Request]:
    in_form = bool(path) and isinstance(path[0], InForm)
    names: Sequence[str | int] = path[1:] if in_form else path

    def put(value: bytes) -> Request:
        document = document_of(request, path)
        at: object = document
        for name in names[:-1]:
            at = at[name]  # type: ignore[index]
        at[names[-1]] = _MARK  # type: ignore[index]
        # As bytes, since a changed one may be no UTF-8 any more.
        written = re.sub(rb'[\x00-\x1f"\\]', lambda found: b"\\u%04x" % found[0][0], value)
        text = json.dumps(document, ensure_ascii=False).encode().replace(_MARK.encode(), written)
        body = request.body.replace(_json_text(request.body), text) if in_form else text
        return request._replace(body=body)

    return put
