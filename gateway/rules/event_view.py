"""An event as expressions and conditions see it: its body parsed, its headers and query by name."""

from collections.abc import Iterable, Sequence
from copy import copy
from enum import Enum
from typing import Any, Final, NamedTuple, Self
from urllib.parse import parse_qsl

from gateway.bodies.codings import CONTENT_ENCODING, decompressed
from gateway.bodies.content import NOT_JSON, read
from gateway.bodies.json_text import read_with_all_digits
from gateway.model import Event, Headers, RefusedError, UnreadableBodyError
from gateway.rules.batches import JsonText

# The budget of one view in cost units of about 0.1 µs, for all expressions together: they block the event loop while
# they run. Including the parsing and measuring of the body, the worst event blocks it for a quarter of a second.
MAX_COST = 2_000_000
COST_UNITS_PER_MS = 10_000
# Cost units for each value that is passed to CEL, named by an expression, or converted to JSON.
PASSING, READING, CONVERTING = 15, 10, 20
ROOTS = ("body", "headers", "query", "type", "source", "id", "key")
ITEM = "item"
"""The root for the current item in a route with `split`. Only the `request` of such a route may use it."""


class Absent(Enum):
    """The type of `ABSENT`, which represents a missing field."""

    ABSENT = "absent"


ABSENT: Final = Absent.ABSENT
_UNREAD: Final = object()


NO_BODY = "there is no JSON body"


class Segment(NamedTuple):
    """One segment of a path: `key` selects a field of a mapping, `position` an element of a list.

    A `key` of None and a `position` of -1 select nothing.
    """

    key: str | None
    position: int


def entered(value: object, segment: Segment) -> object:
    """Return the field or element of a value that a segment selects, or ABSENT."""
    if type(value) is dict:
        return value.get(segment.key, ABSENT)
    return value[segment.position] if type(value) is list and 0 <= segment.position < len(value) else ABSENT


class EventView:
    """The parts of an event that expressions and conditions see, parsed lazily and once. Don't modify its values.

    `contexts` caches the CEL contexts that have parts of this event; `expressions.py` manages it.
    """

    __slots__ = (
        "_body",
        "_content_bytes",
        "_exact",
        "_headers",
        "_names",
        "_query",
        "_raw_body",
        "_raw_headers",
        "_raw_query",
        "_sizes",
        "_sizes_in",
        "_spent",
        "_text",
        "_unreadable",
        "contexts",
        "id",
        "item",
        "key",
        "received_at",
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
        received_at: float = 0.0,
    ) -> None:
        self.source = source
        self.received_at = received_at
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
        self._content_bytes = 0
        self._exact: object = _UNREAD  # the same with all digits: read only if something needs them
        self._text: JsonText | None = None  # of the body: read only if something needs it
        self._unreadable: UnreadableBodyError | None = None
        self.item: object = ABSENT
        """In a route with `split`, the item that a delivery is for. Set it before evaluating what names it."""
        self.contexts: dict[frozenset[str], Any] = {}
        self._sizes: dict[int, Size] = {}
        self._sizes_in: dict[tuple[int, Segment], Size] = {}
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
            received_at=event.received_at,
        )

    def again(self) -> Self:
        """Return a view of the same event, without an item, with what is parsed of it and a budget of its own."""
        view = copy(self)
        view.item, view.contexts = ABSENT, {}
        view._sizes, view._sizes_in, view._spent = {}, {}, 0  # noqa: SLF001 - of this class
        return view

    @property
    def content_bytes(self) -> int:
        """The bytes of the body, decompressed, if it has been parsed."""
        return self._content_bytes

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
        """The parsed body, or ABSENT if it can't be read: `unreadable` says why."""
        if self._body is _UNREAD:
            try:
                content = self._content()
                self._content_bytes = len(content)
                self._body = read(content, "", self._header("content-type") or "")
            except UnreadableBodyError as error:
                self._body = ABSENT
                # Another one, since an exception keeps all that was read when it was raised.
                self._unreadable = UnreadableBodyError(error.status, error.reason, error.detail)
        return self._body

    @property
    def has_body(self) -> bool:
        """Return whether there is a parsed body; without one, each `body` path is a missing field."""
        return self.body is not ABSENT

    @property
    def unreadable(self) -> UnreadableBodyError | None:
        """Return why the body can't be read, with the status and reason of a refusal at the ingress."""
        return None if self.has_body else self._unreadable

    @property
    def why_no_body(self) -> str:
        """Explain why there is no parsed body, if there is none. The text has nothing from the request in it."""
        unreadable = self.unreadable
        return NO_BODY if unreadable is None or unreadable.reason == NOT_JSON else unreadable.detail

    def get(self, root: str, segments: Sequence[Segment]) -> object:
        """Return the value at a path, such as `body` and the segments of `commits.0.id`; ABSENT if there is none."""
        if root == "headers" and len(segments) == 1:
            name = segments[0].key
            found = None if name is None else self._header(name)
            return ABSENT if found is None else found
        value: object = getattr(self, root)
        for key, position in segments:
            if type(value) is dict:
                value = value.get(key, ABSENT)
            elif type(value) is list and 0 <= position < len(value):
                value = value[position]
            else:
                return ABSENT
        return value

    def integer(self, root: str, segments: Sequence[Segment], value: float) -> float:
        """Return an integer beyond 64 bits at a path with all its digits, of which `get` has returned this `value`."""
        if root != "body":
            return value
        if self._exact is _UNREAD:
            try:
                self._exact = read_with_all_digits(self._content())
            except (ValueError, RecursionError, UnreadableBodyError):  # of a form or multipart body, say
                self._exact = ABSENT
        exact = self._exact
        for segment in segments:
            exact = entered(exact, segment)
        return exact if type(exact) is int else value

    def texts(self, path: Sequence[str | None]) -> Sequence[bytes] | None:
        """Return the JSON of each element of a list in the body, as it came; None if there is no such list."""
        names = [name for name in path if name is not None]
        try:
            if self._text is None:
                self._text = JsonText(self._content())
            return self._text.elements(names) if len(names) == len(path) else None
        except (RefusedError, UnreadableBodyError):
            return None

    def size(self, value: object) -> "Size":
        """Return the size of a value of this view; cached, as many routes name the same values."""
        if type(value) is not dict and type(value) is not list:
            return measured(value)
        size = self._sizes.get(id(value))
        if size is None:
            size = self._sizes[id(value)] = measured(value)
        return size

    def size_in(self, elements: object, segment: Segment) -> "Size | None":
        """Return an upper bound on the size of one field of any element of a list of this view.

        None if it isn't a list, or if the budget doesn't suffice to measure it. It is measured once, then cached.
        """
        if type(elements) is not list:
            return None
        key = id(elements), segment
        size = self._sizes_in.get(key)
        if size is None and self.spend(len(elements)):
            size = self._sizes_in[key] = _largest_in(elements, segment)
        return size

    @property
    def left(self) -> int:
        """The cost units that are left of the budget."""
        return MAX_COST - self._spent

    def spend(self, cost_units: int) -> bool:
        """Spend cost units of the budget if that many are left; return whether they were."""
        if self._spent + cost_units > MAX_COST:
            return False
        self._spent += cost_units
        return True

    def _content(self) -> bytes:
        """Return the body, decompressed. Raises UnreadableBodyError."""
        encoding = self._content_encoding()
        return decompressed(self._raw_body, encoding) if encoding else self._raw_body

    def _content_encoding(self) -> str:
        """Return the field of all its lines (RFC 9110 §5.3), "" if there is none."""
        if self._headers is not None and "content-encoding" not in self._headers:
            return ""
        names = self._lower_names()
        if CONTENT_ENCODING not in names:
            return ""
        values = [value for name, (_, value) in zip(names, self._raw_headers, strict=True) if name == CONTENT_ENCODING]
        return b",".join(values).decode("latin-1")

    def _header(self, name: str) -> str | None:
        # Usually one or two headers are needed, which costs less than a dictionary of all of them.
        if self._headers is not None:
            return self._headers.get(name)
        names = self._lower_names()
        wanted = name.encode()
        return self._raw_headers[names.index(wanted)][1].decode("utf-8", "replace") if wanted in names else None

    def _lower_names(self) -> Sequence[bytes]:
        if self._names is None:
            self._names = [each.lower() for each, _ in self._raw_headers]
        return self._names


def _readable(text: str) -> str:
    """Replace bytes that weren't UTF-8 (lone surrogates by PEP 383), which CEL can't represent."""
    if text.isascii():
        return text
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _first_values(query: str) -> dict[str, str]:
    """Read `a=1&b=2`."""
    return dict(reversed(parse_qsl(query, keep_blank_values=True)))


class Size(NamedTuple):
    """The size of a value. All counts include what is nested in it."""

    values: int
    """The number of values and keys. A string counts as one more for every 256 characters."""
    longest: int
    """The length of the longest list or mapping."""
    longest_nested: int
    """The same without the value itself."""
    characters: int
    """The characters of all strings and keys."""
    longest_string: int
    """The characters of the longest string or key."""


def measured(value: object) -> Size:
    """Return a value's size; counting stops once it is too large for CEL."""
    values, longest_nested, characters, longest_string = 1, 0, 0, 0
    length = len(value) if isinstance(value, dict | list) else 0
    waiting = [value]
    while waiting and values <= MAX_COST // PASSING:
        item = waiting.pop()
        if type(item) is str:
            added = len(item)
        elif type(item) is dict:
            values += 2 * len(item)
            if item is not value:
                longest_nested = max(longest_nested, len(item))
            waiting.extend(item.values())
            of_keys = _characters_of(item)
            values += of_keys >> 8
            characters += of_keys
            if of_keys > longest_string:
                longest_string = max(longest_string, _longest_of(item))
            continue
        elif type(item) is list:
            values += len(item)
            if item is not value:
                longest_nested = max(longest_nested, len(item))
            waiting.extend(item)
            continue
        else:
            continue
        values += added >> 8
        characters += added
        if added > longest_string:  # noqa: PLR1730 - a third of the time of `max`, and this is the hot path
            longest_string = added
    return Size(values, max(length, longest_nested), longest_nested, characters, longest_string)


def _largest_in(elements: Sequence[object], segment: Segment) -> Size:
    largest = Size(1, 0, 0, 0, 0)
    for element in elements:
        value = entered(element, segment)
        if type(value) is str and len(value) <= largest.longest_string:
            continue
        if type(value) in (str, list, dict):
            largest = Size(*map(max, largest, measured(value)))
    return largest


def _longest_of(keys: Iterable[object]) -> int:
    return max([len(key) for key in keys if isinstance(key, str)], default=0)


def _characters_of(keys: Iterable[object]) -> int:
    try:
        return len("".join(keys))  # type: ignore[arg-type] # a mapping of JSON has strings alone
    except TypeError:  # one of CEL's
        return len("".join(map(str, keys)))
