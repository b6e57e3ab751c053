"""JSON values with `${{ CEL }}` inside: the bodies and headers that a route sends instead of the event's own."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from gateway.model import ExpressionError
from gateway.rules.event_view import EventView
from gateway.rules.expressions import Expression, as_json, as_text, dumps, parse
from gateway.rules.scanner import tokens

MAX_RESULT = 1 << 20  # bytes; also the default limit of Kafka's brokers for a record.


class TemplateError(ExpressionError):
    """An expression inside a template can't be compiled; `path` (keys and indexes) leads to its text."""

    def __init__(self, path: tuple[str | int, ...], message: str) -> None:
        super().__init__(message)
        self.path = path


@dataclass(frozen=True, slots=True)
class Template:
    """A JSON-like value with `${{ CEL }}` inside its strings (not in mapping keys).

    A string that consists of one expression becomes the expression's value, of any type; in others, strings are
    inserted as they are, and other values as JSON. Raises TemplateError for the first one that doesn't compile.
    """

    value: object
    _compiled: object = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_compiled", _compiled(self.value, ()))

    @property
    def has_expressions(self) -> bool:
        return self._compiled is not self.value

    @property
    def expressions(self) -> Iterator[Expression]:
        """Yield its expressions."""
        yield from _expressions_in(self._compiled)

    def render(self, view: EventView) -> object:
        """Return the value with its expressions evaluated.

        Raises ExpressionError, and MissingFieldError for a missing field: an incomplete body isn't sent.
        """
        return _rendered(self._compiled, view) if self.has_expressions else self.value

    def render_bytes(self, view: EventView) -> tuple[bytes, str | None]:
        """Return the body to send and its content type: a string as UTF-8 and None, anything else as JSON.

        The template's type decides: `"${{ body.text }}"` is a string, whatever its value.
        Raises ExpressionError, also for more than 1 MiB.
        """
        rendered = self.render(view)
        if isinstance(self.value, str):
            content, content_type = as_text(rendered).encode("utf-8", "replace"), None
        else:
            content, content_type = dumps(rendered), "application/json"
        if len(content) > MAX_RESULT:
            raise ExpressionError(f"expected a body of at most {MAX_RESULT} bytes, got {len(content)}")
        return content, content_type


class _Interpolated(NamedTuple):
    """A string with expressions in it."""

    pieces: tuple[str | Expression, ...]


def _compiled(value: object, path: tuple[str | int, ...]) -> object:
    """Replace strings by compiled expressions; a value without any is returned itself. Raises TemplateError."""
    try:
        match value:
            case str():
                pieces = pieces_of(value)
                return value if not pieces else pieces[0] if len(pieces) == 1 else _Interpolated(pieces)
            case dict():
                values = {key: _compiled(item, (*path, key)) for key, item in value.items()}
                return value if all(values[key] is value[key] for key in value) else values
            case list():
                items = [_compiled(item, (*path, index)) for index, item in enumerate(value)]
                return value if all(new is old for new, old in zip(items, value, strict=True)) else items
            case _:
                dumps(as_json(value))
                return value
    except TemplateError:
        raise
    except (ExpressionError, ValueError) as error:
        raise TemplateError(path, str(error)) from error


def _expressions_in(compiled: object) -> Iterator[Expression]:
    match compiled:
        case Expression():
            yield compiled
        case _Interpolated():
            yield from [piece for piece in compiled.pieces if isinstance(piece, Expression)]
        case dict() | list():
            for item in compiled.values() if isinstance(compiled, dict) else compiled:
                yield from _expressions_in(item)
        case _:
            pass


def pieces_of(text: str) -> tuple[str | Expression, ...]:
    """Split a string at its expressions; empty if it has none. `$${{` is a literal `${{`.

    Raises ExpressionError for one that doesn't compile.
    """
    pieces: list[str | Expression] = []
    literal, at = "", 0
    while (start := text.find("${{", at)) >= 0:
        if text.startswith("$", start - 1) and start > at:
            literal += text[at:start] + "{{"
            at = start + 3
            continue
        end = _end(text, start + 3)
        if literal := literal + text[at:start]:
            pieces.append(literal)
        pieces.append(parse(text[start + 3 : end].strip()))
        literal, at = "", end + 2
    if at and (literal := literal + text[at:]):
        pieces.append(literal)
    return tuple(pieces)


def _end(text: str, start: int) -> int:
    """Find the `}}` that ends an expression, skipping strings and the expression's own braces."""
    depth = 0
    for token in tokens(text, start):
        if token.text == "{":
            depth += 1
        elif token.text == "}" and depth:
            depth -= 1
        elif token.text == "}" and text.startswith("}}", token.start):
            return token.start
    raise ExpressionError(f"expected }}}} after ${{{{ at character {start - 2}, got the end of the text")


def _rendered(compiled: object, view: EventView) -> object:
    match compiled:
        case Expression():
            return compiled.evaluate(view)
        case _Interpolated():
            texts = [piece if isinstance(piece, str) else as_text(piece.evaluate(view)) for piece in compiled.pieces]
            if sum(map(len, texts)) > MAX_RESULT:
                raise ExpressionError(f"expected a string of at most {MAX_RESULT} characters, got more")
            return "".join(texts)
        case dict():
            return {key: _rendered(item, view) for key, item in compiled.items()}
        case list():
            return [_rendered(item, view) for item in compiled]
        case _:
            return compiled
