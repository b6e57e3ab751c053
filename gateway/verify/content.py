"""What a signature takes from a request's body: JSON fields, form parameters, digests. Each is computed at most once.

The body isn't verified yet when it is parsed here, so only what a signing method names is looked at, and nothing is
decompressed: a signature that isn't of the bytes as they came is refused if these are compressed.
"""

import hashlib
import re
import zlib
from typing import Any

import orjson

from gateway.bodies.forms import form_pairs, read_multipart
from gateway.bodies.media_types import FORM, Kind, kind_of
from gateway.model import UnreadableBodyError
from gateway.verify.remote_keys import FetchedKey, KeyCache, KeyNeededError
from gateway.verify.request import Reason, Request, refused
from gateway.verify.tokens import PARAMETER

MAX_PARAMETERS = 1000  # of a form
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

    def json(self) -> object:
        """Return the JSON body. Raises RefusedError if it is none."""
        return self._parsed(())

    def header(self, name: bytes) -> bytes | None:
        """Return the value of a header that is there once, None if it isn't."""
        values = self._request.values(name)
        return values[0] if len(values) == 1 else None

    def fetched_key(self, url: str, key_id: str | None = None, asking: bytes = b"") -> FetchedKey:
        """Return the key at an address, good now, or the set of keys that has one of that id, if there is one.

        Raises KeyNeededError if it must be fetched, or RefusedError.
        """
        if self._keys is None:
            raise KeyNeededError(url, asking)
        key = self._keys.get(url, self.now, key_id, asking)
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
                expected = f"expected a JSON body{' with ' if path else ''}{shown_path(path)}, got another"
                raise refused(Reason.UNREADABLE_BODY, expected) from error
        return self._json

    def _in_form(self, name: InForm) -> object:
        if self._in_forms is None:  # not made for every request: few have forms
            self._in_forms = {}
        documents = self._in_forms
        if name not in documents:
            self._require_no_coding()
            content_type = b"".join(self._request.values(b"content-type")[:1]).decode("latin-1")
            expected = f"expected a form with JSON in its parameter {name}, got another body"
            try:
                if kind_of(content_type) is Kind.MULTIPART:
                    documents[name] = _document(read_multipart(self._request.body, content_type).get(name))
                else:
                    documents[name] = orjson.loads(self.parameter(name) or b"")
            except (UnreadableBodyError, orjson.JSONDecodeError) as error:
                raise refused(Reason.UNREADABLE_BODY, expected) from error
        return documents[name]

    def _require_no_coding(self) -> None:
        if self._request.content_codings():
            expected = "expected no Content-Encoding, as the signature is in the body or of its fields, got one"
            raise refused(Reason.UNREADABLE_BODY, expected)


def _document(part: object) -> object:
    """Return the JSON of a part of a multipart form; one that is a mapping has been parsed."""
    return part if isinstance(part, dict) else orjson.loads(part if isinstance(part, str) else "")


def _below_form(path: FieldPath) -> FieldPath:
    return path[1:] if path and isinstance(path[0], InForm) else path


def require_form(request: Request) -> None:
    """Raise RefusedError unless the head says that the body is a form."""
    content_type = b"".join(request.values(b"content-type")[:1]).decode("latin-1")
    if kind_of(content_type) is not Kind.FORM:
        raise refused(Reason.UNREADABLE_BODY, f"expected a body of {FORM}, which is signed, got another")


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
