"""An event as expressions and conditions see it: its body parsed, its headers and query by name."""

import zlib
from collections import Counter
from collections.abc import Sequence
from enum import Enum
from typing import Any, Final, NamedTuple, Self
from urllib.parse import parse_qsl

import orjson

from gateway.model import Event, Headers

# Maximum steps of about 0.1 µs of all expressions over one view: while they run, the event loop is blocked. Including
# the parsing and measuring of the body, the worst event blocks it for a quarter of a second.
MAX_COST = 2_000_000
HANDING, READING, CONVERTING = 15, 10, 20  # Steps per value: passed to CEL, named by an expression, converted to JSON.
MAX_INFLATED = 2 << 20  # bytes: twice the limit of an uncompressed body, and at worst 0.1 s to parse
MAX_FORM_FIELDS = 10_000
ROOTS = ("body", "headers", "query", "type", "source", "id", "key")


class Absent(Enum):
    """The type of `ABSENT`, which represents a missing field."""

    ABSENT = "absent"


ABSENT: Final = Absent.ABSENT
_UNREAD: Final = object()


FORM = "application/x-www-form-urlencoded"
NO_BODY = "there is no JSON body"
PLAIN = ("", "identity")
"""Values of Content-Encoding for an uncompressed body."""


class Step(NamedTuple):
    """One step into a value: `key` enters a mapping, `position` a list; None and -1 enter nothing."""

    key: str | None
    position: int


class EventView:
    """The parts of an event that expressions and conditions see, parsed lazily and once. Don't modify its values.

    `contexts` caches the parts that were passed to CEL, for as long as the view; `expressions.py` manages it.
    """

    __slots__ = (
        "_body",
        "_headers",
        "_names",
        "_query",
        "_raw_body",
        "_raw_headers",
        "_raw_query",
        "_sizes",
        "_spent",
        "contexts",
        "id",
        "key",
        "source",
        "type",
    )

    def __init__(
        self,
        *,
        source: str,
        headers: Headers,
        query: str,
        body: bytes,
        id: str = "",  # noqa: A002 - the expressions' own word
        type: str = "",  # noqa: A002 - the expressions' own word
        key: str | None = None,
        names: Sequence[bytes] | None = None,
    ) -> None:
        self.source = source
        self.id = _readable(id)
        self.type = _readable(type)
        self.key = None if key is None else _readable(key)
        self._raw_headers = headers
        self._raw_query = query
        self._raw_body = body
        self._headers: dict[str, str] | None = None
        self._names = names  # of the headers, in lower case
        self._query: dict[str, str] | None = None
        self._body: object = _UNREAD
        self.contexts: dict[frozenset[str], Any] = {}
        self._sizes: dict[int, Size] = {}
        self._spent = 0

    @classmethod
    def of(cls, event: Event) -> Self:
        return cls(
            source=event.source,
            headers=event.headers,
            query=event.query,
            body=event.body,
            id=event.id,
            type=event.type,
            key=event.key,
        )

    @property
    def headers(self) -> dict[str, str]:
        """Lower-case name → first value; bytes that aren't UTF-8 are replaced."""
        if self._headers is None:
            self._headers = {
                name.lower().decode("utf-8", "replace"): value.decode("utf-8", "replace")
                for name, value in reversed(self._raw_headers)
            }
        return self._headers

    @property
    def query(self) -> dict[str, str]:
        """Name → first value, blank ones included, percent-decoded."""
        if self._query is None:
            self._query = _first_values(_readable(self._raw_query))
        return self._query

    @property
    def body(self) -> object:
        """The parsed body, or ABSENT when it is empty, neither JSON nor a form, or inflates to more than 2 MiB."""
        if self._body is _UNREAD:
            self._body = _parse(
                self._raw_body, self._header("content-encoding") or "", self._header("content-type") or ""
            )
        return self._body

    @property
    def has_body(self) -> bool:
        """Return whether there is a parsed body; without one, each `body` path is a missing field."""
        return self.body is not ABSENT

    @property
    def why_no_body(self) -> str:
        """Explain why there is no parsed body, if there is none."""
        media_type = _media_type(self._header("content-type") or "")
        return "the body is multipart, which isn't read" if media_type.startswith("multipart/") else NO_BODY

    @property
    def repeated(self) -> list[str]:
        """The names that a form has more than once: only the first value of each is used."""
        if _media_type(self._header("content-type") or "") != FORM or not isinstance(self.body, dict):
            return []
        encoding = (self._header("content-encoding") or "").strip().lower()
        body = self._raw_body if encoding in PLAIN else _inflated(self._raw_body, encoding)
        counts = Counter([name for name, _ in parse_qsl(body.decode("utf-8", "replace"), keep_blank_values=True)])
        return [name for name, count in counts.items() if count > 1]

    def get(self, root: str, steps: Sequence[Step]) -> object:
        """Follow a path, such as `body` and the steps to `commits.0.id`; ABSENT if it doesn't exist."""
        if root == "headers" and len(steps) == 1:
            name = steps[0].key
            found = None if name is None else self._header(name)
            return ABSENT if found is None else found
        value: object = getattr(self, root)
        for key, position in steps:
            if type(value) is dict:
                value = value.get(key, ABSENT)
            elif type(value) is list and 0 <= position < len(value):
                value = value[position]
            else:
                return ABSENT
        return value

    def size(self, value: object) -> "Size":
        """Return the size of a value of this view; cached, as many routes name the same values."""
        if type(value) is not dict and type(value) is not list:
            return measured(value)
        size = self._sizes.get(id(value))
        if size is None:
            size = self._sizes[id(value)] = measured(value)
        return size

    def spend(self, steps: int) -> bool:
        """Spend steps if that many are left; return whether they were."""
        if self._spent + steps > MAX_COST:
            return False
        self._spent += steps
        return True

    def _header(self, name: str) -> str | None:
        # Usually one or two headers are needed, which costs less than a dictionary of all of them.
        if self._headers is not None:
            return self._headers.get(name)
        names = self._names
        if names is None:
            names = self._names = [each.lower() for each, _ in self._raw_headers]
        wanted = name.encode()
        return self._raw_headers[names.index(wanted)][1].decode("utf-8", "replace") if wanted in names else None


def _readable(text: str) -> str:
    """Replace bytes that weren't UTF-8 (lone surrogates by PEP 383), which CEL can't represent."""
    if text.isascii():
        return text
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _first_values(form: str, *, limit: int | None = None) -> dict[str, str]:
    """Read `a=1&b=2`. Raises ValueError for more fields than the limit."""
    return dict(reversed(parse_qsl(form, keep_blank_values=True, max_num_fields=limit)))


def _parse(body: bytes, encoding: str, content_type: str) -> object:
    coding = encoding.strip().lower()
    if coding not in PLAIN:
        body = _inflated(body, coding)
    try:
        if _media_type(content_type) == FORM and body:
            return _first_values(body.decode("utf-8", "replace"), limit=MAX_FORM_FIELDS)
        return orjson.loads(body.removeprefix(b"\xef\xbb\xbf"))
    except ValueError:
        return ABSENT


def _media_type(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()


def _inflated(body: bytes, coding: str) -> bytes:
    """Decompress gzip or deflate (RFC 9110, 8.4.1); return b"" for an unknown coding, and broken or too large data."""
    # Some senders mean raw deflate by "deflate", as RFC 9110 notes.
    for wbits in {"gzip": (31,), "x-gzip": (31,), "deflate": (15, -15)}.get(coding, ()):
        inflater = zlib.decompressobj(wbits)
        try:
            inflated = inflater.decompress(body, MAX_INFLATED + 1)
        except zlib.error:
            continue
        if inflater.eof and not inflater.unused_data and len(inflated) <= MAX_INFLATED:
            return inflated
    return b""


class Size(NamedTuple):
    """The total number of values, keys included (256 characters count as one more), and the longest list or mapping."""

    total: int
    longest: int


def measured(value: object) -> Size:
    """Return a value's size; counting stops once it is too large for CEL."""
    total, longest = 1, 0
    waiting = [value]
    while waiting and total <= MAX_COST // HANDING:
        item = waiting.pop()
        if type(item) is dict:
            total += 2 * len(item)
            longest = max(longest, len(item))
            waiting.extend(item.values())
        elif type(item) is list:
            total += len(item)
            longest = max(longest, len(item))
            waiting.extend(item)
        elif type(item) is str:
            total += len(item) >> 8
    return Size(total, longest)
