"""The string that a signature covers, written as a template such as `{timestamp}.{body}`.

A provider's file may have `{given:NAME}` in one: a key that it asks of its user. `{listed:NAME,…}` are the headers that
the first one lists, as Contentful signs them; `{element:NAME:PREFIX}` is an element of a header's list.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from string import Formatter
from typing import NamedTuple
from urllib.parse import quote, unquote_to_bytes, urlsplit

from gateway.verify.boundaries import Guard, Part, guards, is_format
from gateway.verify.content import Content, FieldPath, parse_field_path, require_form
from gateway.verify.request import Reason, Request, refused, single_value, to_bytes
from gateway.verify.tokens import PARAMETER, TOKEN

BODY, TIMESTAMP, ID, URL, SECRET = Part("body"), Part("timestamp"), Part("id"), Part("url"), Part("secret")
_BARE = {part.kind: part for part in (BODY, TIMESTAMP, ID, URL, SECRET, Part("method"), Part("path"), Part("form"))}
_BODY_MODIFIERS = ("sha256", "crc32", "json")
_URL_MODIFIERS = {("url", "sha256"), ("url", "decoded"), ("path", "encoded")}
MAX_LISTED = 64  # headers that a request lists as signed
EXPECTED = (
    "a string with {body} and, in braces, only timestamp, id, method, path, url, secret, form, body:sha256, "
    "body:crc32, body:json, url:sha256, url:decoded, path:encoded, header:NAME, query:NAME, field:PATH (these three "
    "also with a format: header:NAME:s, ms, iso, date, any or a length), form:NAME, listed:NAME,NAME, "
    "element:NAME:PREFIX"
)


_ELEMENT = re.compile(rf"({TOKEN.pattern}):([a-z]+=)")


def parse_signed_string(text: str) -> "SignedString":
    """Parse a template. Raises ValueError if it isn't one, or covers no part of what is delivered.

    A query may have a digest of the body: then it is `body_digest` that makes it cover the body.
    """
    signed = parse_template(text)
    if not any(signed.has(kind) for kind in ("body", "form", "form_field", "field", "url", "query")):
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
    elif (kind == "body" and argument in _BODY_MODIFIERS) or (kind, argument) in _URL_MODIFIERS:
        return Part(kind, argument.encode())
    elif kind in {"header", "query", "field"}:
        return _part_with_format(kind, argument)
    elif kind == "given" and PARAMETER.fullmatch(argument):
        return Part(kind, argument.encode())
    elif kind == "form" and PARAMETER.fullmatch(argument):
        return Part("form_field", argument.encode())
    elif kind == "listed" and all(TOKEN.fullmatch(name) for name in argument.split(",")):
        return Part(kind, argument.lower().encode())
    elif kind == "element" and (found := _ELEMENT.fullmatch(argument)):
        return Part(kind, found[1].lower().encode(), (found[2],))
    raise ValueError(kind)


def _part_with_format(kind: str, argument: str) -> Part:
    """Return a part that may have a format, which follows its name."""
    name, colon, format_ = argument.partition(":")
    if not colon or is_format(format_):
        if kind == "header" and TOKEN.fullmatch(name):
            return Part(kind, name.lower().encode(), format=format_)
        if kind == "query" and PARAMETER.fullmatch(name):
            return Part(kind, name.encode(), format=format_)
        if kind == "field":
            bare = name.removesuffix("?")
            return Part(kind, bare.encode(), parse_field_path(bare), is_optional=bare != name, format=format_)
    raise ValueError(kind)


@dataclass(frozen=True, slots=True)
class SignedString:
    """A parsed template. A body alone, as most schemes sign it, is recognised once and passed on as it is."""

    parts: tuple[bytes | Part, ...]
    text: str = field(default="{body}", compare=False)
    """The template as it is written."""
    guards: tuple[Guard, ...] = ()
    """Checks against ambiguous concatenation: no two requests have the same string. `with_guards` finds them."""
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
        object.__setattr__(self, "_has_form", self.has("form") or self.has("form_field"))
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
    def list_headers(self) -> Sequence[bytes]:
        """Return the headers, in lower case, that list others which are signed."""
        return [part.name.partition(b",")[0] for part in self.parts if isinstance(part, Part) and part.kind == "listed"]

    @property
    def field_paths(self) -> Sequence[FieldPath]:
        """Return where the fields of the JSON body are that are signed."""
        return [part.path for part in self.parts if isinstance(part, Part) and part.kind == "field"]

    @property
    def given_names(self) -> Sequence[str]:
        """Return the names in `{given:NAME}`."""
        return [part.name.decode() for part in self.parts if isinstance(part, Part) and part.kind == "given"]

    def has(self, kind: str) -> bool:
        return any(part.kind == kind for part in self.parts if isinstance(part, Part))

    def covers_parameter(self, name: str) -> bool:
        return self.has("url") or self._names("query", name.encode())

    def covers_header(self, name: str) -> bool:
        wanted = name.lower().encode()
        listed = [part.name.split(b",") for part in self.parts if isinstance(part, Part) and part.kind == "listed"]
        return self._names("header", wanted) or any(wanted in names for names in listed)

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

    def with_guards(self, unit: str | None) -> "SignedString":
        """Return the string with its guards; `unit` is that of its timestamp. Raises AmbiguousError."""
        return SignedString(self.parts, self.text, guards(self.parts, unit))

    def check_head(self, head: Request) -> None:
        """Raise RefusedError unless each header that is signed is there once, and a form is one."""
        for name in self._headers:
            single_value(head, name)
        if self._has_form:
            require_form(head)

    def join(self, stamp: bytes, body: bytes) -> bytes:
        """Return the string that `is_simple`."""
        return b"".join(
            [part if isinstance(part, bytes) else body if part.kind == "body" else stamp for part in self.parts]
        )

    def render(self, inputs: "SigningInput") -> bytes:
        """Return the string for a request.

        Raises RefusedError if a part of it is missing, or if it could be the string of another request, too.
        """
        pieces: list[bytes] = []
        for part in self.parts:
            if isinstance(part, bytes):
                pieces.append(part)
            elif part is TIMESTAMP:
                pieces.append(inputs.stamp)
            elif part is BODY:
                pieces.append(inputs.request.body)
            else:
                pieces.append(_FIELDS[part.kind](part, inputs))
        whole = b"".join(pieces)
        for guard in self.guards:
            guard.check(pieces, whole, inputs.request, inputs.url)
        return whole


class SigningInput(NamedTuple):
    """What the parts of a signed string are taken from. `url` is the source's public one, without a query."""

    request: Request
    content: Content
    stamp: bytes
    url: str
    secret: bytes


def _of_body(part: Part, inputs: SigningInput) -> bytes:
    if part.name == b"json":
        try:
            return json.dumps(inputs.request.body.decode(), ensure_ascii=False).encode()
        except UnicodeDecodeError as error:
            raise refused(Reason.UNREADABLE_BODY, "expected a signed body in UTF-8, got another encoding") from error
    digest = inputs.content.digest(part.name.decode())
    return digest if part.name == b"crc32" else digest.hex().encode()


def _url(part: Part, inputs: SigningInput) -> bytes:
    request, url = inputs.request, inputs.url
    if not urlsplit(url).path:
        url += request.path
    whole = to_bytes(f"{url}?{request.query}" if request.query else url)
    if part.name == b"decoded":
        return _HUBSPOT_DECODED_ESCAPES.sub(lambda found: unquote_to_bytes(found[0]), whole)
    return hashlib.sha256(whole).hexdigest().encode() if part.name else whole


def only_parameter(request: Request, name: str) -> bytes:
    found = request.parameters(name)[name]
    if len(found) != 1:
        expected = f"expected the query parameter {name}, which is signed, once"
        raise refused(Reason.MISSING_HEADER, f"{expected}, got {len(found) or 'none'}")
    return to_bytes(found[0])


def _path(part: Part, inputs: SigningInput) -> bytes:
    path, query = inputs.request.path, inputs.request.query
    if not part.name:
        return to_bytes(path)
    # As encodeURI and Node's querystring.escape do it, the latter first, and only to the query.
    whole = f"{path}?{_quoted(query, _UNESCAPED)}" if query else path
    return _quoted(whole, _UNESCAPED + ";,/?:@&=+$#").encode()


def _quoted(text: str, safe: str) -> str:
    return quote(text, safe=safe, encoding="utf-8", errors="surrogateescape")


def _form_field(part: Part, inputs: SigningInput) -> bytes:
    name = part.name.decode()
    value = inputs.content.parameter(name)
    if value is None:
        raise refused(Reason.UNREADABLE_BODY, f"expected the signed form field {name}, got none")
    return value


def _listed(part: Part, inputs: SigningInput) -> bytes:
    """Return the headers that a header lists, and those that are always signed, by name and value."""
    always = part.name.split(b",")
    listed = single_value(inputs.request, always[0]).lower().split(b",")
    names = sorted({*always, *[name.strip(b" ") for name in listed]})
    if len(names) > MAX_LISTED:
        raise refused(Reason.MALFORMED_SIGNATURE, f"expected at most {MAX_LISTED} headers that are signed, got more")
    if not all(TOKEN.fullmatch(name.decode("latin-1")) for name in names):
        expected = f"expected a list of headers' names in {always[0].decode()}, which are signed"
        raise refused(Reason.MALFORMED_SIGNATURE, f"{expected}, got something else")
    text = b";" + b";".join([name + b":" + single_value(inputs.request, name).strip() for name in names])
    if any(text.count(b";" + name + b":") > 1 for name in names):  # so that it is read in one way alone
        expected = "expected signed headers whose values don't contain another one's name"
        raise refused(Reason.MALFORMED_SIGNATURE, f"{expected}, got one that does")
    return text[1:]


def _element(part: Part, inputs: SigningInput) -> bytes:
    mark = str(part.path[0]).encode()
    elements = [element.strip(b" ") for element in single_value(inputs.request, part.name).split(b",", MAX_LISTED)]
    found = [element.removeprefix(mark) for element in elements if element.startswith(mark)]
    if len(found) != 1 or not found[0].isascii():
        expected = f"expected one {mark.decode()} in the header {part.name.decode()}, which is signed"
        raise refused(Reason.MALFORMED_SIGNATURE, f"{expected}, got {len(found) or 'none'}")
    return json.dumps(found[0].decode()).encode()


def _json_field(part: Part, inputs: SigningInput) -> bytes:
    value = inputs.content.field(part.path)
    if value is None and not part.is_optional:
        raise refused(Reason.UNREADABLE_BODY, f"expected {part.name.decode()}, which is signed, got none")
    return value or b""


_UNESCAPED = "-_.!~*'()"
_HUBSPOT_DECODED_ESCAPES = re.compile(rb"%(?:3A|2F|3F|40|21|24|27|28|29|2A|2C|3B)")
"""What HubSpot decodes in an address before it signs it: `: / ? @ ! $ ' ( ) * , ;`.

https://developers.hubspot.com/docs/apps/developer-platform/build-apps/authentication/request-validation
"""
_FIELDS: Mapping[str, Callable[[Part, SigningInput], bytes]] = {
    "body": _of_body,
    "method": lambda _, inputs: to_bytes(inputs.request.method),
    "path": _path,
    "url": _url,
    "secret": lambda _, inputs: inputs.secret,
    "form": lambda _, inputs: inputs.content.sorted_form(),
    "query": lambda part, inputs: only_parameter(inputs.request, part.name.decode()),
    "field": _json_field,
    "form_field": _form_field,
    "listed": _listed,
    "element": _element,
    "header": lambda part, inputs: single_value(
        inputs.request, part.name
    ),  # it was there once when the head was checked
}
