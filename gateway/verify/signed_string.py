"""The string that a signature covers, written as a template such as `{timestamp}.{body}`.

A provider's file may have `{given:NAME}` in one: a key that it asks of its user.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from string import Formatter
from typing import NamedTuple
from urllib.parse import parse_qsl, quote, unquote_to_bytes, urlsplit

from gateway.verify.boundaries import Guard, Part, guards, is_form
from gateway.verify.content import Content, FieldPath, parse_field_path, require_form
from gateway.verify.request import Reason, Request, only, refused, to_bytes
from gateway.verify.tokens import PARAMETER, TOKEN

BODY, TIMESTAMP, ID, URL, SECRET = Part("body"), Part("timestamp"), Part("id"), Part("url"), Part("secret")
_BARE = {part.kind: part for part in (BODY, TIMESTAMP, ID, URL, SECRET, Part("method"), Part("path"), Part("form"))}
_OF_BODY = ("sha256", "crc32", "json")
_OF_ADDRESS = {("url", "sha256"), ("url", "decoded"), ("path", "encoded")}
MAX_LISTED = 64  # headers that a request lists as signed
EXPECTED = (
    "a string with {body} and, in braces, only timestamp, id, method, path, url, secret, form, body:sha256, "
    "body:crc32, body:json, url:sha256, url:decoded, path:encoded, header:NAME, query:NAME, field:PATH (these three "
    "also with a form: header:NAME:s, ms, iso, date, any or a length), form:NAME, listed:NAME,NAME, "
    "element:NAME:PREFIX"
)


_ELEMENT = re.compile(rf"({TOKEN.pattern}):([a-z]+=)")


def parse_signed_string(text: str) -> "SignedString":
    """Parse a template. Raises ValueError if it isn't one, or vouches for nothing that is delivered.

    A query may have a digest of the body: then it is `body_digest` that makes it vouch for the body.
    """
    signed = parse_template(text)
    if not any(signed.has(kind) for kind in ("body", "form", "parameter", "field", "url", "query")):
        raise ValueError(text)
    return signed


def parse_template(text: str) -> "SignedString":
    """Parse a template, whatever it covers. Raises ValueError."""
    parts: list[bytes | Part] = []
    for literal, kind, argument, conversion in Formatter().parse(text):
        if literal:
            parts.append(literal.encode())
        if kind is None:
            continue
        if conversion:
            raise ValueError(text)
        parts.append(_part(kind, argument or ""))
    return SignedString(tuple(parts), text)


def _part(kind: str, argument: str) -> Part:  # noqa: PLR0911 - one for each kind
    if not argument:
        if kind in _BARE:
            return _BARE[kind]
    elif (kind == "body" and argument in _OF_BODY) or (kind, argument) in _OF_ADDRESS:
        return Part(kind, argument.encode())
    elif kind in {"header", "query", "field"}:
        return _formed(kind, argument)
    elif kind == "given" and PARAMETER.fullmatch(argument):
        return Part(kind, argument.encode())
    elif kind == "form" and PARAMETER.fullmatch(argument):
        return Part("parameter", argument.encode())
    elif kind == "listed" and all(TOKEN.fullmatch(name) for name in argument.split(",")):
        return Part(kind, argument.lower().encode())
    elif kind == "element" and (found := _ELEMENT.fullmatch(argument)):
        return Part(kind, found[1].lower().encode(), (found[2],))
    raise ValueError(kind)


def _formed(kind: str, argument: str) -> Part:
    """Return a part that may have a form, which follows its name."""
    name, colon, form = argument.partition(":")
    if not colon or is_form(form):
        if kind == "header" and TOKEN.fullmatch(name):
            return Part(kind, name.lower().encode(), form=form)
        if kind == "query" and PARAMETER.fullmatch(name):
            return Part(kind, name.encode(), form=form)
        if kind == "field":
            bare = name.removesuffix("?")
            return Part(kind, bare.encode(), parse_field_path(bare), is_optional=bare != name, form=form)
    raise ValueError(kind)


@dataclass(frozen=True, slots=True)
class SignedString:
    """A parsed template. A body alone, as most schemes sign it, is recognised once and passed on as it is."""

    parts: tuple[bytes | Part, ...]
    text: str = field(default="{body}", compare=False)
    """The template as it is written."""
    guards: tuple[Guard, ...] = ()
    """What keeps the string from being that of another request, too. `bounded` finds them."""
    is_body_alone: bool = field(init=False)
    _headers: tuple[bytes, ...] = field(init=False)
    _has_form: bool = field(init=False)
    is_simple: bool = field(init=False)
    """Whether `join` is enough: nothing but the timestamp and the body."""
    needs_head: bool = field(init=False)
    """Whether `check_head` checks anything."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_body_alone", self.parts == (BODY,))
        named = [part.name for part in self.parts if isinstance(part, Part) and part.kind == "header"]
        object.__setattr__(self, "_headers", tuple(named))
        object.__setattr__(self, "_has_form", self.has("form") or self.has("parameter"))
        is_simple = all(isinstance(part, bytes) or part in {TIMESTAMP, BODY} for part in self.parts)
        object.__setattr__(self, "is_simple", is_simple)
        object.__setattr__(self, "needs_head", bool(named) or self._has_form)

    @property
    def covers_body(self) -> bool:
        return any(part.kind in {"body", "form"} for part in self.parts if isinstance(part, Part))

    @property
    def covers_checksum_alone(self) -> bool:
        """Whether it has nothing of the body but its CRC-32, with which anybody can make another body."""
        return {part.name for part in self.parts if isinstance(part, Part) and part.kind == "body"} == {b"crc32"}

    @property
    def header_names(self) -> Sequence[bytes]:
        """Return the headers that are signed, in lower case."""
        return self._headers

    @property
    def field_paths(self) -> Sequence[FieldPath]:
        """Return where the fields of the JSON body are that are signed."""
        return [part.path for part in self.parts if isinstance(part, Part) and part.kind == "field"]

    def has(self, kind: str) -> bool:
        return any(part.kind == kind for part in self.parts if isinstance(part, Part))

    def covers_parameter(self, name: str) -> bool:
        return self.has("url") or self._names("query", name.encode())

    def covers_header(self, name: str) -> bool:
        return self._names("header", name.lower().encode())

    def _names(self, kind: str, name: bytes) -> bool:
        return any((part.kind, part.name) == (kind, name) for part in self.parts if isinstance(part, Part))

    def with_id_header(self, name: str | None) -> "SignedString":
        """Return the string with the header for `{id}`."""
        header = Part("header", (name or "").lower().encode())
        return SignedString(tuple([header if part == ID else part for part in self.parts]), self.text)

    def with_given(self, values: Mapping[str, str]) -> "SignedString":
        """Return the string with what the user gave for each `{given:NAME}`."""
        parts = [
            values.get(part.name.decode(), "").encode() if isinstance(part, Part) and part.kind == "given" else part
            for part in self.parts
        ]
        return SignedString(tuple(parts), self.text)

    def bounded(self, unit: str | None) -> "SignedString":
        """Return the string with its guards; `unit` is that of its timestamp. Raises AmbiguousError."""
        return SignedString(self.parts, self.text, guards(self.parts, unit))

    def check_head(self, head: Request) -> None:
        """Raise RefusedError unless each header that is signed is there once, and a form is one."""
        for name in self._headers:
            only(head, name)
        if self._has_form:
            require_form(head)

    def join(self, stamp: bytes, body: bytes) -> bytes:
        """Return the string that `is_simple`."""
        return b"".join(
            [part if isinstance(part, bytes) else body if part.kind == "body" else stamp for part in self.parts]
        )

    def render(self, given: "SigningInput") -> bytes:
        """Return the string for a request.

        Raises RefusedError if a part of it is missing, or if it could be the string of another request, too.
        """
        pieces: list[bytes] = []
        for part in self.parts:
            if isinstance(part, bytes):
                pieces.append(part)
            elif part is TIMESTAMP:
                pieces.append(given.stamp)
            elif part is BODY:
                pieces.append(given.request.body)
            else:
                pieces.append(_FIELDS[part.kind](part, given))
        whole = b"".join(pieces)
        for guard in self.guards:
            guard.check(pieces, whole, given.request, given.url)
        return whole


class SigningInput(NamedTuple):
    """What the parts of a signed string are taken from. `url` is the source's public one, without a query."""

    request: Request
    content: Content
    stamp: bytes
    url: str
    secret: bytes


def _of_body(part: Part, given: SigningInput) -> bytes:
    if part.name == b"json":
        try:
            return json.dumps(given.request.body.decode(), ensure_ascii=False).encode()
        except UnicodeDecodeError as error:
            raise refused(Reason.UNREADABLE_BODY, "expected a body of UTF-8, which is signed, got another") from error
    digest = given.content.digest(part.name.decode())
    return digest if part.name == b"crc32" else digest.hex().encode()


def _url(part: Part, given: SigningInput) -> bytes:
    request, url = given.request, given.url
    if not urlsplit(url).path:
        url += request.path
    whole = to_bytes(f"{url}?{request.query}" if request.query else url)
    if part.name == b"decoded":
        return _HUBSPOTS.sub(lambda found: unquote_to_bytes(found[0]), whole)
    return hashlib.sha256(whole).hexdigest().encode() if part.name else whole


def only_parameter(request: Request, name: str) -> bytes:
    found = [value for key, value in parse_qsl(request.query, keep_blank_values=True) if key == name]
    if len(found) != 1:
        expected = f"expected the query parameter {name}, which is signed, once"
        raise refused(Reason.MISSING_HEADER, f"{expected}, got {len(found) or 'none'}")
    return to_bytes(found[0])


def _path(part: Part, given: SigningInput) -> bytes:
    path, query = given.request.path, given.request.query
    if not part.name:
        return to_bytes(path)
    # As encodeURI and Node's querystring.escape do it, the latter first, and only to the query.
    whole = f"{path}?{_quoted(query, _UNESCAPED)}" if query else path
    return _quoted(whole, _UNESCAPED + ";,/?:@&=+$#").encode()


def _quoted(text: str, safe: str) -> str:
    return quote(text, safe=safe, encoding="utf-8", errors="surrogateescape")


def _parameter(part: Part, given: SigningInput) -> bytes:
    name = part.name.decode()
    value = given.content.parameter(name)
    if value is None:
        raise refused(Reason.UNREADABLE_BODY, f"expected the form's parameter {name}, which is signed, got none")
    return value


def _listed(part: Part, given: SigningInput) -> bytes:
    """Return the headers that a header lists, and those that are always signed, by name and value."""
    always = part.name.split(b",")
    listed = only(given.request, always[0]).lower().split(b",")
    names = sorted({*always, *[name.strip(b" ") for name in listed]})
    if len(names) > MAX_LISTED:
        raise refused(Reason.MALFORMED_SIGNATURE, f"expected at most {MAX_LISTED} headers that are signed, got more")
    if not all(TOKEN.fullmatch(name.decode("latin-1")) for name in names):
        expected = f"expected a list of headers' names in {always[0].decode()}, which are signed"
        raise refused(Reason.MALFORMED_SIGNATURE, f"{expected}, got another")
    text = b";" + b";".join([name + b":" + only(given.request, name).strip() for name in names])
    if any(text.count(b";" + name + b":") > 1 for name in names):  # so that it is read in one way alone
        expected = "expected headers without the name of another signed one in them"
        raise refused(Reason.MALFORMED_SIGNATURE, f"{expected}, got such a value")
    return text[1:]


def _element(part: Part, given: SigningInput) -> bytes:
    mark = str(part.path[0]).encode()
    elements = [element.strip(b" ") for element in only(given.request, part.name).split(b",", MAX_LISTED)]
    found = [element.removeprefix(mark) for element in elements if element.startswith(mark)]
    if len(found) != 1 or not found[0].isascii():
        expected = f"expected one {mark.decode()} in the header {part.name.decode()}, which is signed"
        raise refused(Reason.MALFORMED_SIGNATURE, f"{expected}, got {len(found) or 'none'}")
    return json.dumps(found[0].decode()).encode()


def _json_field(part: Part, given: SigningInput) -> bytes:
    value = given.content.field(part.path)
    if value is None and not part.is_optional:
        raise refused(Reason.UNREADABLE_BODY, f"expected {part.name.decode()}, which is signed, got none")
    return value or b""


_UNESCAPED = "-_.!~*'()"
_HUBSPOTS = re.compile(rb"%(?:3A|2F|3F|40|21|24|27|28|29|2A|2C|3B)")
"""What HubSpot decodes in an address before it signs it: `: / ? @ ! $ ' ( ) * , ;`.

https://developers.hubspot.com/docs/apps/developer-platform/build-apps/authentication/request-validation
"""
_FIELDS: Mapping[str, Callable[[Part, SigningInput], bytes]] = {
    "body": _of_body,
    "method": lambda _, given: to_bytes(given.request.method),
    "path": _path,
    "url": _url,
    "secret": lambda _, given: given.secret,
    "form": lambda _, given: given.content.sorted_form(),
    "query": lambda part, given: only_parameter(given.request, part.name.decode()),
    "field": _json_field,
    "parameter": _parameter,
    "listed": _listed,
    "element": _element,
    "header": lambda part, given: only(given.request, part.name),  # it was there once when the head was checked
}
