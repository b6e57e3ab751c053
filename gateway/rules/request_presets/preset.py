"""The parts of message presets: fields, how their values are rendered, and the resulting request."""

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
"""Maximum characters: Slack accepts 3,000, Discord, Teams and browsers about 2,000."""
MAX_LINE = 10_000
"""Maximum characters from an event in a field without a limit."""
MAX_ITEMS = 100
Fact = tuple[str, str]
"""A name and its value."""
_SURROGATES = re.compile("[\ud800-\udfff]")
_IN_URL = "%/:?#[]@!$&'()*+,;=~"
_ENTITY = re.compile(r"&[#a-z0-9]{0,8}$")


class Kind(Enum):
    """The kind of a field's value."""

    LINE = auto()
    """A string; line breaks become spaces."""
    TEXT = auto()
    """A string, of any number of lines."""
    URL = auto()
    """An http or https URL."""
    PATH = auto()
    """Segments of a path. The value of an expression is at most one segment."""
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
    """A field of a preset. `limit` is the number of characters to which strings are truncated."""

    name: str
    kind: Kind
    about: str
    is_required: bool = False
    choices: tuple[str, ...] = ()
    limit: int | None = None
    may_be_one: bool = False
    """For a path of two segments: one value may be both, with a slash in it."""
    is_exact: bool = False
    """It names something, so a value that is too long, or too many of them, are refused instead of truncated."""

    @property
    def most(self) -> int:
        """The most characters that a value may have, or to which it is truncated."""
        return MAX_LINE if self.limit is None else self.limit


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestPreset:
    """A kind of message. `url` is the form of the destination's URL, `source` is the service's documentation.

    `escape` applies the service's rules to values from events in text fields. `build` gets the values of the fields in
    the rules by name; for FACTS, a list of pairs. `max_bytes` is the limit of the body.
    """

    name: str
    about: str
    url: str
    source: str
    fields: tuple[Field, ...]
    build: Callable[[Mapping[str, Any]], Message]
    escape: Callable[[str], str] = str
    link_after: re.Pattern[str] | None = None
    """The markup before a URL in literal text. A value from an event after it must be a web address, or it fails."""
    max_bytes: int = MAX_RESULT

    @property
    def by_name(self) -> Mapping[str, Field]:
        return {each.name: each for each in self.fields}


@dataclass(frozen=True, slots=True)
class PresetRequest:
    """A message with a preset, with the templates for its fields by name."""

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

        Raises ExpressionError, with the field's name, for a value of the wrong kind, or if the body is larger than
        the preset's `max_bytes`; MissingFieldError for a missing field.
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
        # Don't process what is cut off later anyway.
        return self.preset.escape(visible(text[: limit + 1]))


def visible(text: str) -> str:
    """Remove control characters, and invisible characters that hide or reverse the text around them."""
    return UNSEEN.sub("", _SURROGATES.sub("\ufffd", text.replace("\r\n", "\n").replace("\r", "\n")))


def line(text: str) -> str:
    """Join a text to one line."""
    return " ".join([part for each in text.split("\n") if (part := each.strip())])


def cut(text: str, limit: int | None) -> str:
    """Truncate a text to a limit, with `…` at the end. Entities (`&amp;`) and backslash escapes aren't cut in half."""
    if limit is None or len(text) <= limit:
        return text
    kept = _ENTITY.sub("", text[: limit - 1])
    backslashes = len(kept) - len(kept.rstrip("\\"))
    return (kept[:-1] if backslashes % 2 else kept) + "…"


def fitted(text: str, limit: int, build: Callable[[str], bytes]) -> bytes:
    """Call `build` with as much of a text as keeps the result within `limit` bytes."""
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
    """Return the facts that fit into a limit in units of `size`, without those that are too large."""
    kept = []
    for fact in facts:
        if size(fact) <= limit:
            kept.append(fact)
            limit -= size(fact)
    return kept


def url(text: str) -> str:
    """Percent-encode all characters of a URL that aren't valid in URLs, so that it can't end an attribute or link.

    Raises ExpressionError for a URL that isn't http or https, or is too long.
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
    """Escape the characters that begin an entity or a tag, or end an attribute."""
    return html.escape(text)


def as_message(body: object, **more: Any) -> Message:  # noqa: ANN401 - the fields of Message
    """Return a message with a body in JSON."""
    return Message(dumps(body), **more)


def segment(text: str) -> str:
    """Percent-encode a text as one path segment. Raises ExpressionError if it can't be one."""
    if text in {"", ".", ".."}:
        raise ExpressionError(f"expected a segment of a path, got {text!r}")
    return quote(text, safe="", errors="replace")


def form(pairs: Sequence[tuple[str, str]]) -> bytes:
    """Return a form's parameters as its body."""
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
    if known.is_exact and len(items) > MAX_ITEMS:
        raise ExpressionError(f"expected at most {MAX_ITEMS} of them, got {len(items)}")
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
