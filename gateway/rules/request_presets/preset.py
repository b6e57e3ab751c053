"""What presets of messages are made of: fields, how their values are read, and the request that comes out."""

import html
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from functools import partial
from typing import Any
from urllib.parse import quote, unquote, urlencode, urlsplit

from gateway.model import ExpressionError
from gateway.rules.event_view import EventView
from gateway.rules.expressions import Expression
from gateway.rules.json_values import as_text, dumps, json_type
from gateway.rules.request_templates import Message, PathTemplate
from gateway.rules.templates import MAX_RESULT, Template
from gateway.text import UNSEEN

MAX_URL = 2000
"""Characters: Slack takes 3,000, Discord, Teams and browsers some 2,000."""
MAX_LINE = 10_000
"""Characters that an event may have in a field without a limit."""
MAX_ITEMS = 100
Fact = tuple[str, str]
"""A name and its value."""
_SURROGATES = re.compile("[\ud800-\udfff]")
_LINES = re.compile(r"\s*\n\s*")
_IN_URL = "%/:?#[]@!$&'()*+,;=~"
_ENTITY = re.compile(r"&[#a-z0-9]{0,8}$")


class Kind(Enum):
    """How the value of a field is written, and read."""

    LINE = auto()
    """A string; line breaks become spaces."""
    TEXT = auto()
    """A string, of any number of lines."""
    URL = auto()
    """An http or https URL."""
    PATH = auto()
    """Segments of a path: what expressions give is one of them, or a part of one."""
    CHOICE = auto()
    """One of `choices`."""
    NUMBER = auto()
    """An integer."""
    LINES = auto()
    """A string or a list of them."""
    FACTS = auto()
    """A mapping of names to strings."""
    JSON = auto()
    """A mapping with anything in it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """A field of a preset. `limit` is in characters of what it is cut to, for the kinds that are strings."""

    name: str
    kind: Kind
    about: str
    is_required: bool = False
    choices: tuple[str, ...] = ()
    limit: int | None = None
    may_be_one: bool = False
    """Of a path: one value may be both of its two segments, with the slash in it."""
    is_exact: bool = False
    """It names something: what is too long is refused, and not cut."""

    @property
    def most(self) -> int:
        """The most characters that a value may have, or be cut to."""
        return MAX_LINE if self.limit is None else self.limit


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestPreset:
    """A kind of message. `url` is what the destination's is, and `source` where the service documents all this.

    `escape` is for what events have in a field of text, by the rules of the service. `build` gets the values of the
    fields that are written, by name: a list of pairs of those that are FACTS. `max_bytes` is of the body.
    """

    name: str
    about: str
    url: str
    source: str
    fields: tuple[Field, ...]
    build: Callable[[Mapping[str, Any]], Message]
    escape: Callable[[str], str] = str
    link_after: re.Pattern[str] | None = None
    """What is written before an address in a text's own markup: what an event has there is a web address, or fails."""
    max_bytes: int = MAX_RESULT

    @property
    def by_name(self) -> Mapping[str, Field]:
        return {each.name: each for each in self.fields}


@dataclass(frozen=True, slots=True)
class PresetRequest:
    """A message of a preset, with the templates of its fields by name."""

    preset: RequestPreset
    templates: Mapping[str, Template | PathTemplate]
    _fields: Mapping[str, Field] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_fields", self.preset.by_name)

    @property
    def expressions(self) -> Iterator[Expression]:
        """Yield its expressions."""
        for template in self.templates.values():
            yield from template.expressions

    def render(self, view: EventView) -> Message:
        """Return the request for an event.

        Raises ExpressionError, with the field's name, for a value that isn't of its kind, and for more than the
        preset's `max_bytes`; MissingFieldError for a missing field.
        """
        values: dict[str, Any] = {}
        for name, template in self.templates.items():
            try:
                value = self._value(self._fields[name], template, view)
            except ExpressionError as error:
                error.args = (f"{name}: {error}",)
                raise
            if value is not None:
                values[name] = value
        message = self.preset.build(values)
        if len(message.content) > self.preset.max_bytes:
            limit = self.preset.max_bytes
            raise ExpressionError(f"expected a body of at most {limit} bytes, got {len(message.content)}")
        return message

    def _value(self, known: Field, template: Template | PathTemplate, view: EventView) -> object:
        if isinstance(template, PathTemplate):
            path = template.render(view)
            if known.may_be_one and path.count("/") + path.count("%2F") == 2:  # noqa: PLR2004 - of two segments
                path = "".join(["/" + segment(unquote(each)) for each in path[1:].replace("%2F", "/").split("/")])
            if "%2F" in path:
                raise ExpressionError("expected a value without /, got one with it: it would be another path")
            return path
        escape = partial(self._escaped, limit=known.most) if known.kind in _ESCAPED else None
        return _READ[known.kind](template.render(view, escape), known)

    def _escaped(self, text: str, before: str, *, limit: int) -> str:
        link_after = self.preset.link_after
        if link_after is not None and link_after.search(before):
            return self.preset.escape(url(text))
        # What is cut off later anyway isn't looked at.
        return self.preset.escape(visible(text[: limit + 1]))


def visible(text: str) -> str:
    """Return a text without control characters, and without what isn't seen and hides or turns what is around it."""
    return UNSEEN.sub("", _SURROGATES.sub("\ufffd", text.replace("\r\n", "\n").replace("\r", "\n")))


def line(text: str) -> str:
    """Return a text in one line."""
    return _LINES.sub(" ", text).strip()


def cut(text: str, limit: int | None) -> str:
    """Return what fits of a text, ended by `…`; an entity (`&amp;`) and a backslash with its character stay whole."""
    if limit is None or len(text) <= limit:
        return text
    kept = _ENTITY.sub("", text[: limit - 1])
    backslashes = len(kept) - len(kept.rstrip("\\"))
    return (kept[:-1] if backslashes % 2 else kept) + "…"


def fitted(text: str, limit: int, build: Callable[[str], bytes]) -> bytes:
    """Return what `build` makes of as much of a text as keeps it within `limit` bytes."""
    content = build(text)
    if len(content) <= limit:
        return content
    fits, least, most = build(""), 0, len(text)
    while least < most:
        middle = (least + most + 1) // 2
        content = build(cut(text, middle))
        if len(content) <= limit:
            fits, least = content, middle
        else:
            most = middle - 1
    return fits


def facts_within(facts: Iterable[Fact], limit: int, size: Callable[[Fact], int]) -> list[Fact]:
    """Return those facts that still fit into a limit, in the unit of `size`: what is too large is left out."""
    kept = []
    for fact in facts:
        if size(fact) <= limit:
            kept.append(fact)
            limit -= size(fact)
    return kept


def url(text: str) -> str:
    """Return a URL that can end no attribute or link: what isn't of a URL's characters is percent-encoded.

    Raises ExpressionError for one that isn't http or https, or is too long.
    """
    try:
        parts = urlsplit(text.strip())
        is_web = bool(parts.hostname) and parts.scheme in {"http", "https"}
    except ValueError:
        is_web = False
    if not is_web:
        raise ExpressionError("expected an http or https URL, got something else")
    encoded = quote(visible(text.strip()), safe=_IN_URL, errors="replace")
    if len(encoded) > MAX_URL:
        raise ExpressionError(f"expected a URL of at most {MAX_URL:,} characters, got {len(encoded):,}")
    return encoded


def escaped_html(text: str) -> str:
    """Escape what begins an entity or a tag, or ends an attribute."""
    return html.escape(text)


def as_message(body: object, **more: Any) -> Message:  # noqa: ANN401 - the fields of Message
    """Return a message with a body in JSON."""
    return Message(dumps(body), **more)


def segment(text: str) -> str:
    """Return a text as one segment of a path, percent-encoded. Raises ExpressionError for what is none."""
    if text in {"", ".", ".."}:
        raise ExpressionError(f"expected a segment of a path, got {text!r}")
    return quote(text, safe="", errors="replace")


def form(pairs: Sequence[tuple[str, str]]) -> bytes:
    """Return the parameters of a form."""
    return urlencode(pairs, errors="replace", quote_via=quote, safe="").encode()


def _shortened(text: str, known: Field) -> str:
    if known.is_exact and len(text) > known.most:
        raise ExpressionError(f"expected at most {known.most:,} characters, got more")
    return cut(text, known.limit)


def _string(value: object) -> str:
    if isinstance(value, list | dict) or value is None:
        raise ExpressionError(f"expected a string, got {json_type(value)}")
    return visible(as_text(value))


def _read_choice(value: object, known: Field) -> object:
    if value not in known.choices:
        raise ExpressionError(f"expected one of {', '.join(known.choices)}, got another value")
    return value


def _read_number(value: object, _: Field) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ExpressionError(f"expected an integer, got {json_type(value)}")
    return value


def _read_line(value: object, known: Field) -> str:
    return _shortened(line(_string(value)), known)


def _read_lines(value: object, known: Field) -> list[str]:
    items = value if isinstance(value, list) else [value]
    return [_read_line(item, known) for item in items[:MAX_ITEMS]]


def _read_mapping(value: object, _: Field) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise ExpressionError(f"expected a mapping, got {json_type(value)}")
    return value


def _read_facts(value: object, known: Field) -> list[Fact]:
    facts = list(_read_mapping(value, known).items())
    if known.is_exact and len(facts) > MAX_ITEMS:
        raise ExpressionError(f"expected at most {MAX_ITEMS} keys, got {len(facts)}")
    return [(name, _shortened(_string(item), known)) for name, item in facts[:MAX_ITEMS] if item is not None]


_READ: Mapping[Kind, Callable[[object, Field], object]] = {
    Kind.LINE: _read_line,
    Kind.TEXT: lambda value, known: _shortened(_string(value), known),
    Kind.URL: lambda value, _: url(_string(value)),
    Kind.CHOICE: _read_choice,
    Kind.NUMBER: _read_number,
    Kind.LINES: _read_lines,
    Kind.FACTS: _read_facts,
    Kind.JSON: _read_mapping,
}
_ESCAPED = frozenset((Kind.LINE, Kind.TEXT, Kind.LINES, Kind.FACTS))
