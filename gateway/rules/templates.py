"""Templates: JSON values with `${{ CEL }}` inside, for the bodies and headers that a route sends.

A mapping with `for`, `as` and `do` is a loop: it renders `do` for each item of a list, to a list, or to a string with
`join`. Each expression in it is evaluated once, by CEL's `map` over the list, instead of once for each item.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from gateway.model import ExpressionError
from gateway.rules.cel_compiler import MAX_TEXT, compiled
from gateway.rules.event_view import EventView, measured
from gateway.rules.expression_checks import LIST, Wanted, check_constants
from gateway.rules.expressions import Expression, parse
from gateway.rules.json_values import as_json, as_text, dumps, json_type
from gateway.rules.scanner import is_free_name, tokens, without_comments
from gateway.text import MAX_SHOWN, shown
from gateway.turns import give_way

MAX_RESULT = 1 << 20  # bytes; also the default limit of Kafka's brokers for a record.
_POSITION = re.compile(r"at character (\d+)")
_LOOKED_AT = MAX_TEXT + 1024  # characters that an expression and the space around it may have in a string
_KEYS = {"for": "CEL of a list", "as": "the name of an item", "do": "what there is for each"}
LOOP = _KEYS.keys()
"""The keys of a loop. A mapping that has two of them is taken for a loop."""
_NO_LOOP = "a mapping that is none is written as CEL, ${{ {'for': …} }}"
MAX_TOLD = 50
"""The most expressions in one string whose mistakes are reported."""
NOTHING = Expression("null")
"""Replaces an expression that doesn't compile, so that other mistakes are found, too."""


class Mistake(NamedTuple):
    """A mistake in a template, at a `path` of keys and indexes.

    `number` is the index of the expression within its string; None if it isn't about an expression. `is_list`: it is
    about the `for` of a loop.
    """

    path: tuple[str | int, ...]
    message: str
    number: int | None = None
    is_list: bool = False

    def told(self, written: object, message: str) -> str:
        """Return the message with the expression that it is about. `written` is the unresolved value at the path."""
        if self.is_list:
            return f"expected CEL of a list, got {shown(written)}: {message}"
        if self.number is None:
            return message
        places = _places_in(written) if isinstance(written, str) else ()
        if not isinstance(written, str) or self.number >= len(places):  # the expression came from a reference
            return f"expected CEL in ${{{{ … }}}}, got another: {message}"
        start, end = places[self.number]
        text = written[start:] if end < 0 else written[start : end + 2]
        got = "another" if "hmac(" in text else shown(text)
        where = f" (at character {start + 1})" if len(places) > 1 else ""
        return f"expected CEL in ${{{{ … }}}}, got {got}{where}: {message}"


class TemplateError(ExpressionError):
    """A template has mistakes. `mistakes` are all of them, in order."""

    def __init__(self, mistakes: Sequence[Mistake]) -> None:
        super().__init__("; ".join([mistake.message for mistake in mistakes]))
        self.mistakes = tuple(mistakes)


@dataclass(frozen=True, slots=True)
class Template:
    """A JSON-like value with `${{ CEL }}` inside its strings (not in mapping keys).

    A string that consists of one expression becomes the expression's value, of any type. In other strings, strings are
    inserted unchanged, and other values as JSON. A loop has `for: CEL`, which is a list, `as: NAME`, the variable for
    its items, and `do`, the template for each item. Raises TemplateError for expressions that don't compile or can
    never work.
    """

    value: object
    _compiled: object = field(init=False, repr=False)

    def __post_init__(self) -> None:
        compiler = _Compiler()
        object.__setattr__(self, "_compiled", compiler.of(self.value, (), ()))
        if compiler.mistakes:
            raise TemplateError(compiler.mistakes)

    @property
    def has_expressions(self) -> bool:
        return self._compiled is not self.value

    @property
    def expressions(self) -> Iterator[Expression]:
        """Yield its expressions."""
        yield from _expressions_in(self._compiled)

    @property
    def pieces(self) -> Sequence[str | Expression]:
        """Return the literal texts and expressions of a string."""
        match self._compiled:
            case _Interpolated(pieces):
                return pieces
            case str() | Expression():
                return (self._compiled,)
            case _:
                raise TypeError("expected a template that is a string")

    def render(self, view: EventView | None, escape: Callable[[str, str], str] | None = None) -> object:
        """Return the value with its expressions evaluated. The view may be None if there are none.

        `escape` is applied to each string from an expression, with the literal text right before it.

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
    """A string with expressions."""

    pieces: tuple[str | Expression, ...]


class _Loop(NamedTuple):
    """A loop: renders `do` for each item, with `join` to a string. `size` is the length of `do` as JSON."""

    items: Expression
    do: object
    join: str | None
    size: int


class _Scope(NamedTuple):
    """A loop around an expression: the text of its list, and its variable."""

    items: str
    name: str


_Scopes = tuple[_Scope, ...] | None
"""The enclosing loops, outermost first. None if one has no valid variable: then any name may be valid."""


class _Compiler:
    """Replaces strings by compiled expressions, and collects mistakes. Values without expressions stay the same."""

    def __init__(self) -> None:
        self.mistakes: list[Mistake] = []

    def of(self, value: object, path: tuple[str | int, ...], scopes: _Scopes) -> object:
        match value:
            case str():
                pieces = pieces_of(value, self.mistakes, path, scopes)
                return value if not pieces else pieces[0] if len(pieces) == 1 else _Interpolated(pieces)
            case dict() if len(value.keys() & LOOP) > 1:
                return self._loop(value, path, scopes)
            case dict():
                values = {key: self.of(item, (*path, key), scopes) for key, item in value.items()}
                return value if all(values[key] is value[key] for key in value) else values
            case list():
                items = [self.of(item, (*path, index), scopes) for index, item in enumerate(value)]
                return value if all(new is old for new, old in zip(items, value, strict=True)) else items
            case _:
                self._size(value, path)
                return value

    def _loop(self, value: dict[str, object], path: tuple[str | int, ...], scopes: _Scopes) -> _Loop:
        if others := value.keys() - LOOP - {"join"}:
            names = ", ".join([name[:MAX_SHOWN] for name in sorted(map(str, others))])
            message = f"expected for, as, do and join in a loop, got {names}, too ({_NO_LOOP})"
            self.mistakes.append(Mistake(path, message))
        hint = "" if "${{" in str(value.get("do")) else f" ({_NO_LOOP})"
        for key, what in _KEYS.items():
            if key not in value:
                message = f"expected for, as and do in a loop, got no `{key}`: {what}{hint}"
                self.mistakes.append(Mistake(path, message))
        name, join = value.get("as"), value.get("join")
        items, text = self._items(value["for"], path, scopes) if "for" in value else (NOTHING, "[]")
        inner = None if scopes is None else (*scopes, _Scope(text, str(name)))
        if not isinstance(name, str) or not is_free_name(name):
            inner = None
            if "as" in value:
                expected = "expected a name of letters, digits and _, which isn't one of CEL's or of the event's"
                self.mistakes.append(Mistake((*path, "as"), expected))
        if join is not None and not isinstance(join, str):
            self.mistakes.append(Mistake((*path, "join"), "expected a string to join strings with"))
            join = None
        do = value.get("do")
        return _Loop(items, self.of(do, (*path, "do"), inner), join, self._size(do, path))

    def _items(self, written: object, path: tuple[str | int, ...], scopes: _Scopes) -> tuple[Expression, str]:
        """Compile the list of a loop. Also return its text, for the expressions inside the loop."""
        path = (*path, "for")
        try:
            if not isinstance(written, str):
                raise ExpressionError("expected a CEL expression of a list")  # noqa: TRY301 - as all of them
            return _scoped(written, scopes, LIST), without_comments(written)
        except ExpressionError as error:
            self.mistakes.append(Mistake(path, str(error), is_list=isinstance(written, str)))
            return NOTHING, "[]"

    def _size(self, value: object, path: tuple[str | int, ...]) -> int:
        """Return the length of a value as JSON, which it has to be."""
        try:
            return len(dumps(as_json(value)))
        except (ExpressionError, ValueError) as error:
            self.mistakes.append(Mistake(path, str(error)))
            return 0


def _scoped(text: str, scopes: _Scopes, wanted: Wanted | None = None) -> Expression:
    """Compile an expression inside loops. Its value is a list of its values for all items, nested for nested loops.

    The expression alone is checked for syntax first, so that messages have positions in the original text.
    """
    if scopes is None:
        compiled(text)
        return NOTHING
    expression = _parsed(text, scopes)
    check_constants(text, wanted, [scope.name for scope in scopes])
    return expression


def _parsed(text: str, scopes: Sequence[_Scope]) -> Expression:
    if not scopes:
        return parse(text)
    compiled(text)
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


def pieces_of(
    text: str, mistakes: list[Mistake], path: tuple[str | int, ...] = (), scopes: _Scopes = ()
) -> tuple[str | Expression, ...]:
    """Split a string at its expressions; empty if it has none. `$${{` is a literal `${{`.

    Expressions that don't compile or can never work are replaced, and added to the mistakes.
    """
    if "${{" not in text:
        return ()
    pieces: list[str | Expression] = []
    at, known = 0, len(mistakes)
    for number, (start, end) in enumerate(places_of_expressions(text)):
        give_way()
        if number and len(mistakes) - known >= MAX_TOLD:
            break
        if literal := text[at:start].replace("$${{", "${{"):
            pieces.append(literal)
        at = len(text) if end < 0 else end + 2
        try:
            if end < 0:
                got = "got the end of the text"
                raise ExpressionError(f"expected }}}} after ${{{{ at character {start + 1}, {got}")  # noqa: TRY301 - as all of them
            pieces.append(_scoped(text[start + 3 : end].strip(), scopes))
        except ExpressionError as error:
            mistakes.append(Mistake(path, str(error), number))
            pieces.append(NOTHING)
    if literal := text[at:].replace("$${{", "${{"):
        pieces.append(literal)
    return tuple(pieces)


def places_of_expressions(text: str) -> Iterator[tuple[int, int]]:
    """Yield the positions of `${{` and `}}` of each expression in a string; -1 if the last one has no end."""
    at = 0
    while (start := text.find("${{", at)) >= 0:
        if text.startswith("$", start - 1) and start > at:
            at = start + 3
            continue
        end = _end(text, start + 3)
        yield start, end
        if end < 0:
            return
        at = end + 2


@lru_cache(maxsize=1)  # for all mistakes of a string
def _places_in(text: str) -> Sequence[tuple[int, int]]:
    return tuple(places_of_expressions(text))


def _end(text: str, start: int) -> int:
    """Find the `}}` that ends an expression, skipping strings and the expression's own braces; -1 if there is none.

    In an expression that is too long, or with a string that doesn't end, it is the next `}}`.
    """
    depth, limit = 0, start + _LOOKED_AT
    for token in tokens(text, start, limit):
        if token.kind == "open":
            return text.find("}}", token.start)
        if token.text == "{":
            depth += 1
        elif token.text == "}" and depth:
            depth -= 1
        elif token.text == "}" and text.startswith("}}", token.start):
            return token.start
    return text.find("}}", limit)


class _Rendering:
    """One rendering of a template. Expressions inside loops are evaluated for all items at once, at the first item."""

    def __init__(self, view: EventView, escape: Callable[[str, str], str] | None) -> None:
        self._view = view
        self._escape = escape
        self._values: dict[int, object] = {}
        self._indexes: list[int] = []
        self._left = MAX_RESULT
        self._room = MAX_RESULT

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
            value = value[index]  # type: ignore[index] # lists, as the results of `map`
        return value

    def _texts(self, pieces: Sequence[str | Expression]) -> Iterator[str]:
        before = ""
        for piece in pieces:
            if isinstance(piece, str):
                before = piece
                yield piece
            else:
                text = as_text(self._value(piece))
                self._count(text)
                yield text if self._escape is None else self._escape(text, before)
                before = ""

    def _count(self, value: object) -> None:
        """Refuse values that are too large to send, before they are serialized. `escape` shortens its own."""
        if self._escape is not None:
            return
        if isinstance(value, str):
            self._room -= len(value)
        elif isinstance(value, list | dict):
            size = measured(value)
            self._room -= size.values + size.characters - (size.characters >> 8)  # JSON has at least as many characters
        if self._room < 0:
            raise ExpressionError(f"expected values of at most {MAX_RESULT} characters, got more")

    def _escaped(self, value: object) -> object:
        self._count(value)
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
