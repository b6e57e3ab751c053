"""An event as expressions and conditions see it: its body parsed, its headers and query by name."""

from collections.abc import Iterable, Sequence
from enum import Enum
from typing import Any, Final, NamedTuple, Self
from urllib.parse import parse_qsl

from gateway.bodies.codings import CONTENT_ENCODING
from gateway.bodies.content import NOT_JSON, read
from gateway.model import Event, Headers, UnreadableBodyError

# Maximum steps of about 0.1 µs of all expressions over one view: while they run, the event loop is blocked. Including
# the parsing and measuring of the body, the worst event blocks it for a quarter of a second.
MAX_COST = 2_000_000
STEPS_IN_A_MILLISECOND = 10_000
PASSING, READING, CONVERTING = 15, 10, 20  # Steps per value: passed to CEL, named by an expression, converted to JSON.
ROOTS = ("body", "headers", "query", "type", "source", "id", "key")
ITEM = "item"
"""The root of one item of a list by which a route splits its events; known to their requests alone."""


class Absent(Enum):
    """The type of `ABSENT`, which represents a missing field."""

    ABSENT = "absent"


ABSENT: Final = Absent.ABSENT
_UNREAD: Final = object()


NO_BODY = "there is no JSON body"


class Step(NamedTuple):
    """One step into a value: `key` enters a mapping, `position` a list; None and -1 enter nothing."""

    key: str | None
    position: int


def entered(value: object, step: Step) -> object:
    """Return what is in a value in one place, or ABSENT."""
    if type(value) is dict:
        return value.get(step.key, ABSENT)
    return value[step.position] if type(value) is list and 0 <= step.position < len(value) else ABSENT


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
        "_sizes_in",
        "_spent",
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
        self._unreadable: UnreadableBodyError | None = None
        self.item: object = ABSENT
        """The item of a route's `split` that a delivery is for; set before anything is evaluated that names it."""
        self.contexts: dict[frozenset[str], Any] = {}
        self._sizes: dict[int, Size] = {}
        self._sizes_in: dict[tuple[int, Step], Size] = {}
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
                self._body = read(self._raw_body, self._content_encoding(), self._header("content-type") or "")
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
        """Return why the body can't be read: by which status and reason the ingress refuses it if it has to read it."""
        return None if self.has_body else self._unreadable

    @property
    def why_no_body(self) -> str:
        """Explain why there is no parsed body, if there is none; in this are no words of the sender's."""
        unreadable = self.unreadable
        return NO_BODY if unreadable is None or unreadable.reason == NOT_JSON else unreadable.detail

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

    def size_in(self, items: object, step: Step) -> "Size | None":
        """Return the most of what any of these items of this view has in one place; None if they aren't a list.

        Cached, and charged for the first time; None also if that is too much.
        """
        if type(items) is not list:
            return None
        key = id(items), step
        size = self._sizes_in.get(key)
        if size is None and self.spend(len(items)):
            size = self._sizes_in[key] = _largest_in(items, step)
        return size

    @property
    def left(self) -> int:
        """The steps that are left."""
        return MAX_COST - self._spent

    def spend(self, steps: int) -> bool:
        """Spend steps if that many are left; return whether they were."""
        if self._spent + steps > MAX_COST:
            return False
        self._spent += steps
        return True

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
    """The total number of values, keys included (256 characters count as one more), and the longest list or mapping.

    `inner` is the longest in it, itself aside. `text` are the characters of all strings, `widest` those of the longest.
    """

    total: int
    longest: int
    inner: int
    text: int
    widest: int


def measured(value: object) -> Size:
    """Return a value's size; counting stops once it is too large for CEL."""
    total, inner, text, widest = 1, 0, 0, 0
    length = len(value) if isinstance(value, dict | list) else 0
    waiting = [value]
    while waiting and total <= MAX_COST // PASSING:
        item = waiting.pop()
        if type(item) is str:
            characters = len(item)
        elif type(item) is dict:
            total += 2 * len(item)
            if item is not value:
                inner = max(inner, len(item))
            waiting.extend(item.values())
            keys = _characters_of(item)
            total += keys >> 8
            text += keys
            if keys > widest:
                widest = max(widest, _longest_of(item))
            continue
        elif type(item) is list:
            total += len(item)
            if item is not value:
                inner = max(inner, len(item))
            waiting.extend(item)
            continue
        else:
            continue
        total += characters >> 8
        text += characters
        if characters > widest:  # noqa: PLR1730 - a third of the time of `max`, and this is the hot path
            widest = characters
    return Size(total, max(length, inner), inner, text, widest)


def _largest_in(items: Sequence[object], step: Step) -> Size:
    total, longest, inner, text, widest = 1, 0, 0, 0, 0
    for item in items:
        value = entered(item, step)
        if type(value) is str and len(value) <= widest:
            continue
        if type(value) in (str, list, dict):
            size = measured(value)
            total, longest, inner = max(total, size.total), max(longest, size.longest), max(inner, size.inner)
            text, widest = max(text, size.text), max(widest, size.widest)
    return Size(total, longest, inner, text, widest)


def _longest_of(keys: Iterable[object]) -> int:
    return max([len(key) for key in keys if isinstance(key, str)], default=0)


def _characters_of(keys: Iterable[object]) -> int:
    try:
        return len("".join(keys))  # type: ignore[arg-type] # a mapping of JSON has strings alone
    except TypeError:  # one of CEL's
        return len("".join(map(str, keys)))
