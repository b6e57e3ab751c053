"""What a signature takes from a request's body: JSON fields, form parameters, digests. Each is computed at most once.

The body isn't verified yet when it is parsed here, so only what a signing method names is looked at, and nothing is
decompressed: a signature that isn't of the bytes as they came is refused if these are compressed.
"""

import hashlib
import json
import re
import zlib
from collections import Counter
from collections.abc import Sequence
from typing import Any

import orjson

from gateway.bodies.forms import form_pairs, read_multipart
from gateway.bodies.media_types import FORM, Kind, kind_of
from gateway.model import UnreadableBodyError
from gateway.verify.remote_keys import FetchedKey, KeyCache, KeyNeededError
from gateway.verify.request import Reason, Request, refused
from gateway.verify.tokens import PARAMETER

MAX_PARAMETERS = 1000  # of a form, URL-encoded
MAX_PARTS = 64  # of a multipart form: each has a head to be read, and anybody may send it
MAX_ITEMS = 1000  # of a list, in each of which a credential has to be
_FIELD = re.compile(r"(?:[A-Za-z_$][\w$-]*|0|\*)(?:\.(?:[A-Za-z_$][\w$-]*|0|\*))*")
ALL = "*"
_UNREAD = object()


class InForm(str):
    """The first element of a field's path: the JSON is in that parameter of a form."""

    __slots__ = ()


FieldPath = tuple[str | int, ...]
"""The path of a JSON field. Its only index is 0, of a list with one item: nothing would vouch for the others.

The JSON is the body; or in a parameter of a form, which is then the first element, as InForm. ALL stands for every
item of a list, where a field of each is looked at.
"""


def parse_field_path(text: str, *, takes_all: bool = False) -> FieldPath:
    """Parse `data.items.0.id`, `json@event.id`, and with `takes_all` also `data.items.*.id`. Raises ValueError."""
    parameter, at, rest = text.partition("@")
    if at:
        if not PARAMETER.fullmatch(parameter) or "@" in rest:
            raise ValueError(text)
        return (InForm(parameter), *parse_field_path(rest, takes_all=takes_all))
    if not _FIELD.fullmatch(text) or (not takes_all and ALL in text.split(".")):
        raise ValueError(text)
    return tuple([0 if name == "0" else name for name in text.split(".")])


class Content:
    """A request's body, with what was computed of it so far, and the keys that were fetched for its source until `now`.

    `now` is when the request is verified, in Unix seconds.

    `digests` has key, algorithm, message and HMAC of those that were computed, so that none is computed twice.
    """

    __slots__ = ("_form", "_in_forms", "_json", "_keys", "_request", "digests", "now")

    def __init__(self, request: Request, keys: KeyCache | None = None, now: float = 0.0) -> None:
        self.digests: list[tuple[bytes, str, bytes, bytes]] = []
        self._request = request
        self._keys = keys
        self.now = now
        self._json: object = _UNREAD
        self._form: list[tuple[bytes, bytes]] | None = None
        self._in_forms: dict[str, object] | None = None

    def field(self, path: FieldPath) -> bytes | None:
        """Return a string, whole number or boolean of the JSON body as text; None if it is absent or null.

        Raises RefusedError if the body isn't JSON, or the field is of another type.
        """
        return _text(_value(self._parsed(path), _below_form(path), path), path)

    def fields(self, path: FieldPath) -> list[bytes | None]:
        """Return the same of each item of a list, where the path has ALL; empty if there is no list, or nothing in it.

        Raises RefusedError as `field` does, and for more than MAX_ITEMS.
        """
        if ALL not in path:
            return [self.field(path)]
        at = path.index(ALL)
        items = _value(self._parsed(path), _below_form(path[:at]), path)
        if not isinstance(items, list):
            return []
        if len(items) > MAX_ITEMS:
            raise refused(Reason.UNREADABLE_BODY, f"expected at most {MAX_ITEMS} items in {shown_path(path)}, got more")
        return [_text(_value(item, path[at + 1 :], path), path) for item in items]

    def require_single(self, paths: Sequence[FieldPath]) -> None:
        """Raise RefusedError if a field that is signed, or one on the way to it, is there twice.

        A JSON object may have a key twice (RFC 8259, section 4), and a signature of its fields fits both: readers take
        the last or the first. To be called once the signature has been found good, since it parses the body again.
        """
        documents: dict[FieldPath, object] = {}
        for path in paths:
            begin = path[:1] if path and isinstance(path[0], InForm) else ()
            if begin not in documents:
                documents[begin] = self._with_repetitions(begin, paths)
            value = documents[begin]
            for name in _below_form(path):
                if isinstance(value, _Repeating) and name in value.repeated:
                    expected = f"expected {shown_path(path)}, which is signed, once"
                    raise refused(Reason.UNREADABLE_BODY, f"{expected}, got the key {name} twice")
                value = _value(value, (name,), path)

    def _with_repetitions(self, begin: FieldPath, paths: Sequence[FieldPath]) -> object:
        """Return the JSON of the body, or of a form's parameter, with objects that know what they have twice.

        None if its text can't have any name in the paths twice, in which case it isn't parsed: most haven't.
        """
        text = self._request.body if not begin else self._text_in_form(str(begin[0]), self._content_type())
        whole = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
        names = {name.encode() for path in paths for name in _below_form(path) if isinstance(name, str)}
        if b"\\u" not in whole and all(whole.count(b'"' + name + b'"') <= 1 for name in names):
            return None
        try:
            # Numbers are left as they are: none of them is looked at, and long ones take long.
            return json.loads(
                whole.decode(), object_pairs_hook=_object, parse_int=str, parse_float=str, parse_constant=str
            )
        except (ValueError, RecursionError) as error:
            expected = "expected a JSON body that isn't nested too deeply, as fields of it are signed"
            raise refused(Reason.UNREADABLE_BODY, f"{expected}, got something else") from error

    def json(self) -> object:
        """Return the JSON body. Raises RefusedError if it is none."""
        return self._parsed(())

    def header(self, name: bytes) -> bytes | None:
        """Return the value of a header that is there once, None if it isn't."""
        values = self._request.values(name)
        return values[0] if len(values) == 1 else None

    def fetched_key(self, url: str, key_id: str | None = None, request_body: bytes = b"") -> FetchedKey:
        """Return the key at an address, good now, or the set of keys that has one of that id, if there is one.

        Raises KeyNeededError if it must be fetched, or RefusedError.
        """
        if self._keys is None:
            raise KeyNeededError(url, request_body)
        key = self._keys.get(url, self.now, key_id, request_body)
        key.check(self.now)
        return key

    def parameter(self, name: str) -> bytes | None:
        """Return a parameter of a form, None unless it is there once. Raises RefusedError if the body isn't one."""
        found = [value for key, value in self.form() if key == name.encode()]
        return found[0] if len(found) == 1 else None

    def form(self) -> list[tuple[bytes, bytes]]:
        """Return the decoded parameters of a form, in order. Raises RefusedError if the body isn't one."""
        if self._form is None:
            require_form(self._request)
            self._require_no_coding()
            try:
                self._form = form_pairs(self._request.body, MAX_PARAMETERS)
            except UnreadableBodyError as error:
                raise refused(Reason.UNREADABLE_BODY, error.detail) from error
        return self._form

    def sorted_form(self) -> bytes:
        """Return names and values of a form, sorted and without repetitions, as Twilio signs them.

        An empty form is refused: a signature of the rest alone, made for another body, would fit it.
        """
        if not self.form():
            raise refused(Reason.UNREADABLE_BODY, "expected a form with parameters, which are signed, got none")
        return b"".join([name + value for name, value in sorted(set(self.form()))])

    def digest(self, algorithm: str) -> bytes:
        """Return the body's digest; of `crc32` the decimal digits."""
        if algorithm == "crc32":
            return str(zlib.crc32(self._request.body)).encode()
        return hashlib.new(algorithm, self._request.body, usedforsecurity=False).digest()

    def _parsed(self, path: FieldPath) -> object:
        if path and isinstance(path[0], InForm):
            return self._in_form(path[0])
        if self._json is _UNREAD:
            self._require_no_coding()
            try:
                self._json = orjson.loads(self._request.body)
            except orjson.JSONDecodeError as error:
                expected = f"expected a JSON body{' with ' if path else ''}{shown_path(path)}, got something else"
                raise refused(Reason.UNREADABLE_BODY, expected) from error
        return self._json

    def _in_form(self, name: InForm) -> object:
        if self._in_forms is None:  # not made for every request: few have forms
            self._in_forms = {}
        documents = self._in_forms
        if name not in documents:
            self._require_no_coding()
            content_type = self._content_type()
            expected = f"expected a form with JSON in its parameter {name}, got another body"
            try:
                documents[name] = orjson.loads(self._text_in_form(name, content_type))
            except (UnreadableBodyError, orjson.JSONDecodeError) as error:
                raise refused(Reason.UNREADABLE_BODY, expected) from error
        return documents[name]

    def _content_type(self) -> str:
        return b"".join(self._request.values(b"content-type")[:1]).decode("latin-1")

    def _text_in_form(self, name: str, content_type: str) -> str | bytes:
        """Return the text of a parameter that is there once, else nothing. Raises as reading a form does."""
        if kind_of(content_type) is not Kind.MULTIPART:
            return self.parameter(name) or b""
        part = read_multipart(self._request.body, content_type, most=MAX_PARTS, as_text=True).get(name)
        return part if isinstance(part, str) else ""

    def _require_no_coding(self) -> None:
        if self._request.content_codings():
            expected = "expected no Content-Encoding, as the signature is in the body or of its fields, got one"
            raise refused(Reason.UNREADABLE_BODY, expected)


class _Repeating(dict[str, object]):
    """An object that has keys twice."""

    __slots__ = ("repeated",)

    def __init__(self, pairs: Sequence[tuple[str, object]]) -> None:
        super().__init__(pairs)
        self.repeated = {name for name, count in Counter([name for name, _ in pairs]).items() if count > 1}


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    return found if len(found) == len(pairs) else _Repeating(pairs)


def _below_form(path: FieldPath) -> FieldPath:
    return path[1:] if path and isinstance(path[0], InForm) else path


def require_form(request: Request) -> None:
    """Raise RefusedError unless the head says that the body is a form."""
    content_type = b"".join(request.values(b"content-type")[:1]).decode("latin-1")
    if kind_of(content_type) is not Kind.FORM:
        raise refused(Reason.UNREADABLE_BODY, f"expected a body of {FORM}, which is signed, got something else")


def with_field(request: Request, path: FieldPath, value: str) -> Request:
    """Return a request whose JSON body has a value at this path, a number where one was; as it is if a form has it.

    Raises RefusedError if the body has no object for it.
    """
    if isinstance(path[0], InForm):
        return request
    document = Content(request).json()
    place, name = _value(document, path[:-1], path), path[-1]
    if not isinstance(place, dict) or not isinstance(name, str):
        raise refused(Reason.UNREADABLE_BODY, f"expected a place for {shown_path(path)} in the body, got none")
    is_number = value.isdecimal() and not isinstance(place.get(name), str)
    place[name] = int(value) if is_number else value
    return request._replace(body=orjson.dumps(document))


def shown_path(path: FieldPath) -> str:
    """Return a path as it is written."""
    return ".".join([f"{each}@" if isinstance(each, InForm) else str(each) for each in path]).replace("@.", "@")


def _value(value: Any, path: FieldPath, whole: FieldPath) -> Any:  # noqa: ANN401 - any JSON
    for name in path:
        if isinstance(name, str):
            value = value.get(name) if isinstance(value, dict) else None
        elif isinstance(value, list) and len(value) > 1:
            raise refused(Reason.UNREADABLE_BODY, f"expected one item in {shown_path(whole)}, got {len(value)}")
        else:
            value = value[0] if isinstance(value, list) and value else None
    return value


def _text(value: object, path: FieldPath) -> bytes | None:
    match value:
        case None:
            return None
        case bool():
            return b"true" if value else b"false"
        case str() | int():
            return str(value).encode("utf-8", "surrogatepass")
        case _:
            expected = f"expected a string, a whole number or a boolean at {shown_path(path)}"
            raise refused(Reason.UNREADABLE_BODY, f"{expected}, got another type")
