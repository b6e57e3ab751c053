"""JSON values with `${{ CEL }}` inside: the bodies and headers that a route sends instead of the event's own.

A mapping with `for`, `as` and `do` is a list, or with `join` a string, with what is under `do` for each item. Each of
the expressions in there is evaluated once, by CEL's `map` over the list, and not once for each item.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from gateway.model import ExpressionError
from gateway.rules.event_view import EventView
from gateway.rules.expressions import Expression, check_syntax, parse
from gateway.rules.json_values import as_json, as_text, dumps, json_type
from gateway.rules.scanner import is_free_name, tokens, without_comments

MAX_RESULT = 1 << 20  # bytes; also the default limit of Kafka's brokers for a record.
_POSITION = re.compile(r"at character (\d+)")
LOOP = frozenset(("for", "as", "do"))
"""The keys of a mapping that stands for a list; with `join` for a string."""


class TemplateError(ExpressionError):
    """An expression inside a template can't be compiled; `path` (keys and indexes) leads to its text."""

    def __init__(self, path: tuple[str | int, ...], message: str) -> None:
        super().__init__(message)
        self.path = path


@dataclass(frozen=True, slots=True)
class Template:
    """A JSON-like value with `${{ CEL }}` inside its strings (not in mapping keys).

    A string that consists of one expression becomes the expression's value, of any type; in others, strings are
    inserted as they are, and other values as JSON. A list over the event's values is `for: CEL`, `as: NAME` of an item
    in the expressions under `do`, and what is under `do` for each. Raises TemplateError for the first one that doesn't
    compile.
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

    @property
    def pieces(self) -> Sequence[str | Expression]:
        """Return what a string consists of."""
        match self._compiled:
            case _Interpolated(pieces):
                return pieces
            case str() | Expression():
                return (self._compiled,)
            case _:
                raise TypeError("expected a template that is a string")

    def render(self, view: EventView | None, escape: Callable[[str, str], str] | None = None) -> object:
        """Return the value with its expressions evaluated; a view of None will do for one that has none.

        `escape` is for the strings that they give, wherever they are, with the literal text right before.

        Raises ExpressionError, and MissingFieldError for a missing field: an incomplete body isn't sent.
        """
        if not self.has_expressions:
            return self.value
        assert view is not None
        return _Rendering(view, escape).of(self._compiled)

    def render_bytes(self, view: EventView | None) -> tuple[bytes, str | None]:
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


class _Loop(NamedTuple):
    """A list of `do` for each item, or with `join` a string of them; `size` is the length of `do` as it is written."""

    items: Expression
    do: object
    join: str | None
    size: int


class _Scope(NamedTuple):
    """A loop around an expression: the text of its list, and the name of an item."""

    items: str
    name: str


def _compiled(value: object, path: tuple[str | int, ...], scopes: tuple[_Scope, ...] = ()) -> object:
    """Replace strings by compiled expressions; a value without any is returned itself. Raises TemplateError."""
    try:
        match value:
            case str():
                pieces = pieces_of(value, scopes)
                return value if not pieces else pieces[0] if len(pieces) == 1 else _Interpolated(pieces)
            case dict() if value.keys() >= LOOP:
                return _loop(value, path, scopes)
            case dict():
                _refuse_nameless(value, path)
                values = {key: _compiled(item, (*path, key), scopes) for key, item in value.items()}
                return value if all(values[key] is value[key] for key in value) else values
            case list():
                items = [_compiled(item, (*path, index), scopes) for index, item in enumerate(value)]
                return value if all(new is old for new, old in zip(items, value, strict=True)) else items
            case _:
                dumps(as_json(value))
                return value
    except TemplateError:
        raise
    except (ExpressionError, ValueError) as error:
        raise TemplateError(path, str(error)) from error


def _refuse_nameless(value: dict[str, object], path: tuple[str | int, ...]) -> None:
    is_meant = "${{" in str(value.get("do"))
    if is_meant and {"for", "do"} <= value.keys() <= LOOP | {"join"}:
        raise TemplateError(path, "expected for, as and do in a loop, got no `as`: the name of an item")


def _loop(value: dict[str, object], path: tuple[str | int, ...], scopes: tuple[_Scope, ...]) -> _Loop:
    if others := value.keys() - LOOP - {"join"}:
        raise TemplateError(path, f"expected for, as, do and join in a loop, got {', '.join(sorted(others))}, too")
    items, name, join = value["for"], value["as"], value.get("join")
    if not isinstance(items, str):
        raise TemplateError((*path, "for"), "expected a CEL expression of a list")
    if not isinstance(name, str) or not is_free_name(name):
        expected = "expected a name of letters, digits and _, which isn't one of CEL's or of the event's"
        raise TemplateError((*path, "as"), expected)
    if join is not None and not isinstance(join, str):
        raise TemplateError((*path, "join"), "expected a string to join strings with")
    try:
        compiled = _scoped(items, scopes)
    except ExpressionError as error:
        raise TemplateError((*path, "for"), str(error)) from error
    do = _compiled(value["do"], (*path, "do"), (*scopes, _Scope(without_comments(items), name)))
    return _Loop(compiled, do, join, len(dumps(as_json(value["do"]))))


def _scoped(text: str, scopes: Sequence[_Scope]) -> Expression:
    """Compile an expression inside loops: its value is a list of its values, within one of these for each outer loop.

    By itself it is only checked for its own syntax first, so that a message has the positions of what is written.
    """
    if not scopes:
        return parse(text)
    check_syntax(text)
    before, whole = 1, f"({without_comments(text)})"
    for items, name in reversed(scopes):
        around = f"({items}).map({name}, "
        before, whole = before + len(around), f"{around}{whole})"
    try:
        return parse(whole)
    except ExpressionError as error:
        own = _POSITION.sub(lambda found: f"at character {int(found[1]) - before}", str(error))
        raise ExpressionError(own) from error


def _expressions_in(compiled: object) -> Iterator[Expression]:
    match compiled:
        case Expression():
            yield compiled
        case _Interpolated():
            yield from [piece for piece in compiled.pieces if isinstance(piece, Expression)]
        case _Loop():
            yield compiled.items
            yield from _expressions_in(compiled.do)
        case dict() | list():
            for item in compiled.values() if isinstance(compiled, dict) else compiled:
                yield from _expressions_in(item)
        case _:
            pass


def pieces_of(text: str, scopes: Sequence[_Scope] = ()) -> tuple[str | Expression, ...]:
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
        pieces.append(_scoped(text[start + 3 : end].strip(), scopes))
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


class _Rendering:
    """One evaluation of a template. What is inside loops is evaluated for all of their items at the first of them."""

    def __init__(self, view: EventView, escape: Callable[[str, str], str] | None) -> None:
        self._view = view
        self._escape = escape
        self._values: dict[int, object] = {}
        self._indexes: list[int] = []
        self._left = MAX_RESULT

    def of(self, compiled: object) -> object:
        match compiled:
            case Expression():
                return self._escaped(self._value(compiled))
            case _Interpolated():
                texts = list(self._texts(compiled.pieces))
                if sum(map(len, texts)) > MAX_RESULT:
                    raise ExpressionError(f"expected a string of at most {MAX_RESULT} characters, got more")
                return "".join(texts)
            case _Loop():
                return self._each(compiled)
            case dict():
                return {key: self.of(item) for key, item in compiled.items()}
            case list():
                return [self.of(item) for item in compiled]
            case _:
                return compiled

    def _value(self, expression: Expression) -> object:
        if not self._indexes:
            return expression.evaluate(self._view)
        if id(expression) not in self._values:
            self._values[id(expression)] = expression.evaluate(self._view)
        value = self._values[id(expression)]
        for index in self._indexes:
            value = value[index]  # type: ignore[index] # lists, since it is what `map` has made of each
        return value

    def _texts(self, pieces: Sequence[str | Expression]) -> Iterator[str]:
        before = ""
        for piece in pieces:
            if isinstance(piece, str):
                before = piece
                yield piece
            else:
                text = as_text(self._value(piece))
                yield text if self._escape is None else self._escape(text, before)
                before = ""

    def _escaped(self, value: object) -> object:
        if self._escape is None:
            return value
        match value:
            case str():
                return self._escape(value, "")
            case dict():
                return {self._escape(key, ""): self._escaped(item) for key, item in value.items()}
            case list():
                return [self._escaped(item) for item in value]
            case _:
                return value

    def _each(self, loop: _Loop) -> object:
        items = self._value(loop.items)
        if not isinstance(items, list):
            raise ExpressionError(f"for: expected a list, got {json_type(items)}")
        self._left -= len(items) * loop.size
        if self._left < 0:
            raise ExpressionError(f"for: expected at most {MAX_RESULT} characters, got more")
        self._indexes.append(0)
        try:
            made: list[object] = []
            for index in range(len(items)):
                self._indexes[-1] = index
                made.append(self.of(loop.do))
        finally:
            self._indexes.pop()
        return made if loop.join is None else loop.join.join(map(as_text, made))
