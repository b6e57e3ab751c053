"""What of an event people may not see (`redact:` of its source), in its headers, its query and its body. Pure.

    body.card.number      that field; of a list, that field of each item:  {"card": [{"number": …}, {"number": …}]}
    body.items.0  .*      an item by its position; each item, or each field
    body.*_token          each field whose key matches
    body                  all of it
    headers.x-api-key     headers.x-*      query.token

A body is shown as rules read it, written anew, and never as the bytes that came: these may have a key twice, of which a
parser takes one. What can't be read as what it should be is hidden whole, and so is a text where a path goes on: it may
be JSON once more.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import NamedTuple
from urllib.parse import unquote_plus

import orjson

from gateway.bodies.codings import CONTENT_ENCODING, MAX_CONTENT, decompressed
from gateway.bodies.content import read
from gateway.bodies.hidden_paths import PathPattern, TooMuchError, is_hidden, take
from gateway.bodies.media_types import Kind, kind_of
from gateway.model import Event, Headers, UnreadableBodyError
from gateway.text import Glob
from gateway.turns import give_way

HIDDEN = "[redacted]"
"""What is shown instead of a value."""
MAX_VALUES = 1000
"""Hidden values of an event that are known one by one, to be hidden in other texts as well."""
MAX_QUICK_BODY = 64 << 10
"""Bytes of a body in which a type is looked for on the event loop, for a count or a log line."""
MAX_QUICK_FORM, MAX_QUICK_TEXT = 2 << 10, 1 << 10
"""The same where it takes longer: of a form or XML; and of a query, of headers, or for a type that is a number."""
MAX_QUICK_COMPRESSED = 8 << 10
"""Bytes of a compressed body that are decompressed for that: 1 MiB may decompress to nothing, in 0.1 s."""
MAX_QUICK_CONTAINERS, MAX_QUICK_STEPS = 8 << 10, 512
"""Mappings and lists of a body that is parsed for that; and keys, items, mappings and lists that paths lead through."""
MIN_WORD = 8
"""Bytes of a word in a hidden header from which it is hidden by itself: the token after `Bearer`."""
VALUES_A_TURN = 256

_CONTENT_TYPE = b"content-type"
_OF_BYTES = frozenset((CONTENT_ENCODING, b"content-length"))
"""Headers that say how the bytes of a body are written."""
_NUMBER = re.compile(rb"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?")
_BOOLEANS = frozenset(("true", "false"))
_AFTER_TEXT = frozenset(",:]}")
"""What JSON has between the quotes of two texts: a type that begins so may be found there by mistake."""

TYPE_AND_KEY = frozenset(("type", "key"))
"""What of an event may repeat a hidden value."""


class Redacted(NamedTuple):
    """What people may see. `values` were taken out; with `has_more`, there were others besides."""

    headers: Headers
    query: str
    body: bytes
    values: tuple[bytes, ...]
    has_more: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Redaction:
    """The paths that a source hides. Those of headers are in lower case; the body's empty path is all of it.

    `of_body` has which of TYPE_AND_KEY may be a key in the body, since rules read them from there: GitHub's `release`
    is one by chance alone.
    """

    body: tuple[PathPattern, ...] = ()
    headers: tuple[Glob, ...] = ()
    query: tuple[Glob, ...] = ()
    of_body: frozenset[str] = TYPE_AND_KEY

    def of(self, headers: Headers, query: str, body: bytes) -> Redacted:
        """Return what people may see of a request's parts. Takes some 10 ms for a large body."""
        return self._redacted(headers, query, body, _Values())

    def event(self, event: Event) -> Event:
        """Return an event as people may see it.

        A type or a key that is a hidden value is hidden, too, and so are both if nobody knows what is in the body.
        """
        given = {"type": event.type, "key": event.key}
        values = _Values(
            [text for text in given.values() if text is not None],
            [text for name, text in given.items() if text is not None and name in self.of_body],
        )
        parts = self._redacted(event.headers, event.query, event.body, values)
        return replace(
            event,
            type=values.seen(event.type),
            key=None if event.key is None else values.seen(event.key),
            headers=parts.headers,
            query=parts.query,
            body=parts.body,
        )

    def quick_type(self, event: Event) -> str:
        """Return an event's type as people may see it, in less than 1 ms; HIDDEN if it takes longer to tell."""
        is_shown = self._is_quickly_shown_by_head(event) and (
            not self.body or not event.body or self._is_quickly_shown_by_body(event)
        )
        return event.type if is_shown else HIDDEN

    def _is_quickly_shown_by_head(self, event: Event) -> bool:
        """Return whether a type is none of the hidden values of headers and query."""
        text, query = _encoded(event.type), ""
        headers: Headers = ()
        if self.headers:
            is_replaced = "\ufffd" in event.type  # as rules read other bytes
            named = [pair for pair in event.headers if is_replaced or text in pair[1]]
            headers = tuple([pair for pair in named if _is_named(_header_name(pair[0]), self.headers)])
        if self.query and (event.type in event.query or event.type in unquote_plus(event.query)):
            query = event.query
        if len(query) + sum([len(name) + len(value) for name, value in headers]) > MAX_QUICK_TEXT:
            return False
        values = _Values([event.type])
        self._redacted(headers, query, b"", values)
        return values.seen(event.type) == event.type

    def _is_quickly_shown_by_body(self, event: Event) -> bool:
        """Return whether a type is none of the hidden values of the body.

        Where JSON has a text, it is in quotes. In a text these are escaped, so that one that ends in a quote and the
        type may be taken for it: the type is hidden then, though it need not be.
        """
        is_json = kind_of(_content_type(event.headers)) is Kind.JSON
        if len(event.body) > MAX_QUICK_COMPRESSED and _coding(event.headers):
            return False
        try:
            text, headers = text_of(event.headers, event.body, MAX_QUICK_BODY), uncoded(event.headers)
            if len(text) > (MAX_QUICK_BODY if is_json else MAX_QUICK_FORM) or _containers(text) > MAX_QUICK_CONTAINERS:
                return False
            if event.type in _BOOLEANS or _NUMBER.fullmatch(_encoded(event.type)):
                return len(text) <= MAX_QUICK_TEXT and self._is_shown_by_body(event.type, headers, text)
            # What isn't JSON at once isn't looked at again for what else it may be.
            content = orjson.loads(text) if len(text) > MAX_QUICK_FORM else _read(headers, text)
            quoted = orjson.dumps(event.type)
            if quoted not in orjson.dumps(content):
                return True
            is_whole = is_hidden(content, self.body)
            hidden = orjson.dumps(content if is_whole else take(content, self.body, HIDDEN, MAX_QUICK_STEPS))
        except (UnreadableBodyError, ValueError, TypeError, TooMuchError):
            return False
        count = hidden.count(quoted)
        if "type" not in self.of_body and event.type[:1] not in _AFTER_TEXT:
            count -= hidden.count(quoted + b":")
        return count == 0

    def _is_shown_by_body(self, type_: str, headers: Headers, body: bytes) -> bool:
        """Return whether a type is none of all the values that are hidden of a body."""
        values = _Values([type_], [type_] if "type" in self.of_body else [])
        self._body(headers, body, values)
        return values.seen(type_) == type_

    def rewritten(self, event: Event) -> Event:
        """Return an event as people may see it, with headers of the body that it has now, so that it can be sent.

        What isn't JSON as it came is called JSON then, and a body that is hidden whole a text.
        """
        seen = self.event(event)
        if seen.body == event.body:
            return seen
        if seen.body == HIDDEN.encode():
            return hidden_whole(seen)
        seen = replace(seen, headers=uncoded(seen.headers))
        if kind_of(_content_type(event.headers)) is Kind.JSON:
            return seen
        return replace(seen, headers=(*_without_type(seen.headers), (b"Content-Type", b"application/json")))

    def content(self, headers: Headers, body: bytes) -> object:
        """Return the value of a body without what is hidden, whose keys and items aren't in it.

        Raises UnreadableBodyError for a body that isn't what it should be, or is hidden whole.
        """
        content = _read(headers, body)
        if is_hidden(content, self.body):
            raise UnreadableBodyError(400, "body_hidden", "expected a body of which some may be seen")
        take(content, self.body, None)
        return content

    def below(self, steps: Sequence[str]) -> "Redaction":
        """Return one that also hides the same paths below another, of a list of events that are requests together."""
        prefix = tuple([Glob(step, (step,)) for step in steps])
        return replace(self, body=(*self.body, *[(*prefix, *path) for path in self.body]))

    def joined(self, other: "Redaction | None") -> "Redaction":
        """Return one that hides what either hides."""
        if other is None:
            return self
        return Redaction(
            body=(*self.body, *other.body),
            headers=(*self.headers, *other.headers),
            query=(*self.query, *other.query),
            of_body=self.of_body | other.of_body,
        )

    def touches(self, root: str, keys: Sequence[str]) -> bool:
        """Return whether some of a field is hidden, or all of what it is in; of a list's items, by their keys alone."""
        paths = {"body": self.body, "headers": _each(self.headers), "query": _each(self.query)}.get(root, [])
        return any(all(_is_named(key, [step]) for step, key in zip(path, keys, strict=False)) for path in paths)

    @property
    def texts(self) -> frozenset[str]:
        """Return a text for each path, by which two redactions are compared, and what may be a key in the body."""
        roots = (("body", self.body), ("headers", _each(self.headers)), ("query", _each(self.query)))
        written = [[root, *[step.pieces for step in steps]] for root, paths in roots for steps in paths]
        written += [["of_body", name] for name in self.of_body if self.body]
        return frozenset([orjson.dumps(path).decode() for path in written])

    def _redacted(self, headers: Headers, query: str, body: bytes, values: "_Values") -> Redacted:
        shown = tuple([(name, self._header(name, value, values)) for name, value in headers])
        return Redacted(
            headers=shown,
            query=self._query(query, values),
            body=self._body(headers, body, values) if self.body and body else body,
            values=tuple(values.found),
            has_more=values.has_more,
        )

    def _header(self, name: bytes, value: bytes, values: "_Values") -> bytes:
        if not self.headers:
            return value
        if not _is_named(_header_name(name), self.headers):
            return value
        values.add(value)
        values.look_at(value.decode("utf-8", "replace").encode())  # as rules read it
        for word in value.split():
            if len(word) >= MIN_WORD:
                values.add(word)
        return HIDDEN.encode()

    def _query(self, query: str, values: "_Values") -> str:
        if not self.query:
            return query
        shown = []
        for pair in query.split("&"):
            name, sign, value = pair.partition("=")
            if not _is_named(unquote_plus(name), self.query):
                shown.append(pair)
                continue
            values.add(_encoded(value))
            values.add(_encoded(unquote_plus(value)))
            shown.append(f"{name}{sign}{HIDDEN if sign else ''}")
        return "&".join(shown)

    def _body(self, headers: Headers, body: bytes, values: "_Values") -> bytes:
        try:
            content = _read(headers, body)
        except UnreadableBodyError:
            values.are_unknown = True
            return HIDDEN.encode()
        is_whole = is_hidden(content, self.body)
        values.add_all(content if is_whole else take(content, self.body, HIDDEN))
        if values.floats:
            values.add_spellings(text_of(headers, body))
        if is_whole:
            return HIDDEN.encode()
        try:
            return orjson.dumps(content)
        except TypeError:  # orjson reads what is nested more deeply than it writes
            values.are_unknown = True
            return HIDDEN.encode()


def hidden_whole(event: Event) -> Event:
    """Return an event whose body is hidden whole, with headers that say so."""
    headers = (*_without_type(uncoded(event.headers)), (b"Content-Type", b"text/plain"))
    return replace(event, headers=headers, body=HIDDEN.encode())


def uncoded(headers: Headers) -> Headers:
    """Return headers of a body that is written anew, without a content coding."""
    return tuple([(name, value) for name, value in headers if name.lower() not in _OF_BYTES])


def text_of(headers: Headers, body: bytes, limit: int = MAX_CONTENT) -> bytes:
    """Return a body without its content coding. Raises UnreadableBodyError, also for more than a limit then."""
    coding = _coding(headers)
    return decompressed(body, coding, limit) if coding else body


def _containers(text: bytes) -> int:
    """Return how many mappings and lists are in a text of JSON, at most."""
    return text.count(b"[") + text.count(b"{")


def _without_type(headers: Headers) -> Headers:
    return tuple([(name, value) for name, value in headers if name.lower() != _CONTENT_TYPE])


class _Values:
    """What was taken out of an event: MAX_VALUES of its values, and which of the `sought` texts is any of them.

    A key counts as one for `sought_keys` alone. `are_unknown`: something was hidden of which nobody knows what is
    in it.
    """

    def __init__(self, sought: Iterable[str] = (), sought_keys: Iterable[str] = ()) -> None:
        self.found: dict[bytes, None] = {}
        self.are_unknown = False
        self.floats: set[float] = set()
        """The numbers that may be written otherwise than they came, as 1E3, 1.10, and integers beyond 64 bits."""
        self._is_full = False
        self._sought = {_encoded(text) for text in sought}
        self._sought_keys = {_encoded(text) for text in sought_keys}
        self._met: set[bytes] = set()

    @property
    def has_more(self) -> bool:
        return self._is_full or self.are_unknown

    def add(self, value: bytes) -> None:
        self.look_at(value)
        self._keep(value)

    def _keep(self, value: bytes) -> None:
        if len(self.found) < MAX_VALUES:
            self.found[value] = None
        else:
            self._is_full |= value not in self.found

    def look_at(self, value: bytes) -> None:
        """Note whether a value is sought."""
        if value in self._sought:
            self._met.add(value)

    def add_all(self, root: object) -> None:
        """Add the keys, texts and numbers in a value; beyond MAX_VALUES, only look for what is sought."""
        for leaf in _leaves(root):
            if self._is_full and self._met == self._sought:
                return
            if isinstance(leaf, dict):
                self._add_keys(leaf)
            elif isinstance(leaf, str):
                self.add(_encoded(leaf))
            elif isinstance(leaf, bool):
                self.look_at(orjson.dumps(leaf))  # too common to be hidden in other texts
            elif isinstance(leaf, int | float):
                self.add(orjson.dumps(leaf))
                if isinstance(leaf, float):
                    self.floats.add(leaf)
                    for form in _forms(leaf):
                        self.add(form)

    def _add_keys(self, mapping: Iterable[str]) -> None:
        for number, key in enumerate(mapping):
            if number % VALUES_A_TURN == 0:
                give_way()
                if self._is_full and self._met == self._sought:
                    return
            encoded = _encoded(key)
            self._keep(encoded)
            if encoded in self._sought_keys:
                self._met.add(encoded)

    def add_spellings(self, text: bytes) -> None:
        """Add each of `floats` as it is written in the text that it was read from."""
        looked_at = set[bytes]()
        for number, found in enumerate(_NUMBER.finditer(text)):
            if number % VALUES_A_TURN == 0:
                give_way()
            if (spelled := found[0]) not in looked_at:
                looked_at.add(spelled)
                if float(spelled) in self.floats:
                    self.add(spelled)

    def seen(self, text: str) -> str:
        """Return a sought text, or HIDDEN if it is one of the values, or may be."""
        return HIDDEN if self.are_unknown or _encoded(text) in self._met else text


def _forms(number: float) -> tuple[bytes, ...]:
    """Return how texts of ours have a number, beside JSON: as Python writes it (1.5e-05), and as `string()` does."""
    written = repr(number)
    return written.encode(), f"{Decimal(written):f}".removesuffix(".0").encode()


def _encoded(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _each(globs: Iterable[Glob]) -> list[PathPattern]:
    return [(glob,) for glob in globs]


def _is_named(name: str, globs: Iterable[Glob]) -> bool:
    return any(name == glob.text if len(glob.pieces) == 1 else glob.matches(name) for glob in globs)


def _read(headers: Headers, body: bytes) -> object:
    """Return a body's value as rules read it. Raises UnreadableBodyError, also for what others would read as JSON."""
    kind = _content_type(headers)
    content = read(body, _coding(headers), kind)
    if kind_of(kind) in (Kind.FORM, Kind.MULTIPART):
        text = text_of(headers, body)
        if text.lstrip()[:1] in (b"{", b"[", b"<"):  # sent by a client that calls everything a form
            raise UnreadableBodyError(400, "body_not_form", "expected a form, got something else")
    return content


def _header_name(name: bytes) -> str:
    return name.lower().decode("utf-8", "replace")


def _coding(headers: Headers) -> str:
    return b",".join([value for name, value in headers if name.lower() == CONTENT_ENCODING]).decode("latin-1")


def _content_type(headers: Headers) -> str:
    return next((value for name, value in headers if name.lower() == _CONTENT_TYPE), b"").decode("utf-8", "replace")


def _leaves(root: object) -> Iterator[object]:
    """Yield what has nothing in it, and each mapping for its keys, by which a sender may name people."""
    waiting, visited = [root], 0
    while waiting:
        visited += 1
        if visited % VALUES_A_TURN == 0:
            give_way()
        value = waiting.pop()
        if isinstance(value, dict):
            yield value
            waiting.extend(value.values())
        elif isinstance(value, list):
            waiting.extend(value)
        else:
            yield value
