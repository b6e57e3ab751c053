"""What a route sends instead of the event's own request: method, path, query, and a body or a form.

Bodies for chat and incident services (`preset: slack`) are in `request_presets/`.

Values from the event are percent-encoded in paths and queries (RFC 3986), so they can't add a segment or a parameter,
or change the host. A segment that becomes empty, `.` or `..` is an error: it would lead to another resource.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple, Protocol
from urllib.parse import quote, unquote, urlencode

from gateway.model import ExpressionError
from gateway.rules.event_view import EventView
from gateway.rules.expressions import Expression
from gateway.rules.json_values import as_text, json_type
from gateway.rules.templates import Mistake, Template, TemplateError, pieces_of

MAX_TARGET = 8000  # bytes of a path and query: RFC 9110 §4.1 recommends that everybody supports that many
_LITERAL = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,;=:@/-]|%[0-9A-Fa-f]{2})*")
_NOT_A_NAME = frozenset(("", ".", ".."))
_Segment = tuple[str | Expression, ...]


class Method(StrEnum):
    """A request's method. GET and DELETE have no body unless the route has a template for one."""

    POST = "POST"
    PUT = "PUT"
    PATCH = "PATCH"
    DELETE = "DELETE"
    GET = "GET"

    @property
    def has_content(self) -> bool:
        """Return whether a request without a body template has the event's bytes as its body."""
        return self is not Method.GET and self is not Method.DELETE


@dataclass(frozen=True, slots=True)
class PathTemplate:
    """A path such as `/customers/${{ body.id }}`, to append to a destination's path.

    Raises ValueError if it doesn't begin with `/`, has an invalid character, or a segment `.` or `..`. Raises
    TemplateError for expressions that don't compile, together with all other problems.
    """

    text: str
    _segments: tuple[_Segment, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        mistakes: list[Mistake] = []
        pieces = pieces_of(self.text, mistakes) or (self.text,)
        try:
            object.__setattr__(self, "_segments", tuple(_checked_segments(pieces)))
        except ValueError as error:
            if not mistakes:
                raise
            mistakes.append(Mistake((), str(error)))
        if mistakes:
            raise TemplateError(mistakes)

    @property
    def expressions(self) -> Iterator[Expression]:
        """Yield its expressions."""
        yield from [piece for segment in self._segments for piece in segment if isinstance(piece, Expression)]

    def render(self, view: EventView) -> str:
        """Return the path, percent-encoded.

        Raises ExpressionError for a value that isn't a string, a number or a boolean, and for a segment that would be
        empty, `.` or `..`; MissingFieldError for a missing field.
        """
        return "".join(["/" + _rendered_segment(segment, view) for segment in self._segments])


@dataclass(frozen=True, slots=True)
class Parameters:
    """The parameters of a query or a form, by name. Their values are templates."""

    templates: tuple[tuple[str, Template], ...]

    @property
    def expressions(self) -> Iterator[Expression]:
        """Yield their expressions."""
        for _, template in self.templates:
            yield from template.expressions

    def render(self, view: EventView, limit: int) -> str:
        """Return `a=1&b=2`. A list becomes one parameter for each element; null is left out.

        Raises ExpressionError for a mapping, for a list of anything but strings, numbers and booleans, and for more
        than `limit` bytes; MissingFieldError for a missing field.
        """
        pairs: list[tuple[str, str]] = []
        length = 0
        for name, template in self.templates:
            value = template.render(view)
            if value is None:
                continue
            for item in value if isinstance(value, list) else [value]:
                try:
                    text = _scalar_text(item)
                except ExpressionError as error:
                    raise ExpressionError(f"{name}: {error}") from error
                length += len(name) + len(text) + 2  # checked before encoding, which takes longer
                if length > limit:
                    raise ExpressionError(f"expected at most {limit:,} bytes, got more")
                pairs.append((name, text))
        return urlencode(pairs, errors="replace", quote_via=quote, safe="")


class Message(NamedTuple):
    """The request for a message. `path` and `query` are percent-encoded; `content_type` is the type of `content`."""

    content: bytes
    content_type: str = "application/json"
    path: str = ""
    query: str = ""
    headers: tuple[tuple[str, str], ...] = ()


class MessageTemplate(Protocol):
    """A template for a request in a service's format; see `request_presets/`."""

    @property
    def expressions(self) -> Iterator[Expression]:
        """Yield its expressions."""

    def render(self, view: EventView) -> Message:
        """Return the request for an event. Raises ExpressionError, and MissingFieldError for a missing field."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTemplate:
    """What a route sends instead of the event's bytes. At most one of `body` and `form`; see `Method` for neither.

    A `message` replaces everything but `headers`.
    """

    method: Method = Method.POST
    path: PathTemplate | None = None
    query: Parameters | None = None
    headers: tuple[tuple[str, Template], ...] = ()
    body: Template | None = None
    form: Parameters | None = None
    message: MessageTemplate | None = None

    @property
    def expressions(self) -> Iterator[Expression]:
        """Yield all of its expressions."""
        parts = (self.path, self.query, *[value for _, value in self.headers], self.body, self.form, self.message)
        for part in parts:
            if part is not None:
                yield from part.expressions

    @property
    def sends_event(self) -> bool:
        """Return whether the event's own bytes are the body, so that the sender's headers belong to it."""
        return self.body is None and self.form is None and self.message is None and self.method.has_content


def parameter(value: object) -> Template:
    """Parse a parameter's template. Raises ValueError, and TemplateError as `Template` does."""
    if any(isinstance(item, list | dict | None) for item in (value if isinstance(value, list) else ())):
        raise ValueError("expected a list of strings, numbers and booleans, got something else in it")
    return Template(value)


def parameters(templates: Mapping[str, Template]) -> Parameters:
    return Parameters(tuple(templates.items()))


def _checked_segments(pieces: tuple[str | Expression, ...]) -> list[_Segment]:
    segments = _segments(pieces)
    if segments[0] or len(segments) == 1:
        raise ValueError("expected a path that begins with /, got one that doesn't")
    for segment in segments:
        match segment:
            case [str(literal)] if unquote(literal) in _NOT_A_NAME:
                raise ValueError(f"expected a path without the segments . and .., got one with {literal}")
            case _:
                pass
    return segments[1:]


def _segments(pieces: tuple[str | Expression, ...]) -> list[_Segment]:
    """Split a path at the slashes of its literal parts. The first segment, before the first slash, is empty."""
    segments: list[list[str | Expression]] = [[]]
    for piece in pieces:
        if isinstance(piece, Expression):
            segments[-1].append(piece)
            continue
        found = _LITERAL.match(piece)
        if found is not None and found.end() < len(piece):
            allowed = "what RFC 3986 allows in it (a space is %20, parameters are under `query`)"
            raise ValueError(f"expected a path with {allowed}, got one with {piece[found.end()]!r}")
        first, *others = piece.split("/")
        if first:
            segments[-1].append(first)
        segments += [[each] if each else [] for each in others]
    return [tuple(segment) for segment in segments]


def _rendered_segment(segment: _Segment, view: EventView) -> str:
    if not segment or (len(segment) == 1 and isinstance(segment[0], str)):
        return "".join(map(str, segment))
    text = "".join([piece if isinstance(piece, str) else _encoded(piece.evaluate(view)) for piece in segment])
    if unquote(text) in _NOT_A_NAME:
        got = f"'{unquote(text)}'" if text else "an empty one"
        raise ExpressionError(f"expected a segment of a path, got {got}")
    return text


def _encoded(value: object) -> str:
    text = _scalar_text(value)
    if len(text) > MAX_TARGET:
        raise ExpressionError(f"expected at most {MAX_TARGET:,} characters, got {len(text):,}")
    return quote(text, safe="", errors="replace")


def _scalar_text(value: object) -> str:
    if isinstance(value, list | dict) or value is None:
        raise ExpressionError(f"expected a string, a number or a boolean, got {json_type(value)}")
    return as_text(value)
