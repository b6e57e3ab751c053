"""Expressions over an event, in CEL (https://github.com/google/cel-spec): identity, conditions, bodies.

The only user of the CEL library. An expression sees these variables, whose values are JSON's:

    body      the parsed body; form fields for a form; nothing for an empty body or one that can't be parsed
    headers   name, in lower case → the first value
    query     name → the first value
    source    the source's name
    id, type, key   what identifies, classifies and orders the event; empty or null before they are known

A *missing field* is one that the event doesn't have, a step into null or another scalar included. Null is a value.
The library's `size` of a text counts UTF-8 bytes, where the specification says code points. Its `matches` compiles its
pattern at each call, so ours takes its place (`patterns.py`): the pattern is a text written out, compiled once.
"""

import base64
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import Enum
from typing import Final, NamedTuple, Self
from urllib.parse import parse_qsl

import cel
import orjson

from gateway.model import Event, ExpressionError, Headers, MissingFieldError
from gateway.rules.patterns import Pattern
from gateway.text import did_you_mean

MAX_TEXT = 4096  # characters; at 40,000 the parser overflows the C stack and takes the process with it.
MAX_NESTING = 3  # macros inside macros
# Steps of about 0.1 µs that all expressions over one view may take: while they run, nothing else of the process does.
# With the parsing of the body before and the look at its size, the worst event stops it for a quarter of a second.
MAX_COST = 2_000_000
HANDING, READING, CONVERTING = 15, 10, 20  # Steps for each value: into CEL, named by an expression, and out as JSON.
FEW_NAMES = 20  # of an event's fields that are told
FEW = 64  # Values that take less to name than to count.
LONG_TEXT = 1024  # characters from which a copy costs as much as a step
MAX_INFLATED = 2 << 20  # bytes: twice a body that comes as it is, and 0.1 s to parse at worst.
MAX_FORM_FIELDS = 10_000
MAX_RESULT = 1 << 20  # bytes; also the default limit of Kafka's brokers for a record.
MAX_CONTEXTS = 8  # An event whose expressions see more different parts of it gets one context with everything.

ROOTS = ("body", "headers", "query", "type", "source", "id", "key")


class Absent(Enum):
    """The type of `ABSENT`, which stands for a field that isn't there."""

    ABSENT = "absent"


ABSENT: Final = Absent.ABSENT
_UNREAD: Final = object()


class Step(NamedTuple):
    """One step into a value: `key` enters a mapping, `position` a list; None and -1 enter nothing."""

    key: str | None
    position: int


class View:
    """What expressions and conditions see of an event, read lazily and once. Values are shared: don't change them."""

    __slots__ = (
        "_body",
        "_contexts",
        "_headers",
        "_names",
        "_query",
        "_raw_body",
        "_raw_headers",
        "_raw_query",
        "_sizes",
        "_spent",
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
        self._contexts: dict[frozenset[str], _Handed | None] = {}
        self._sizes: dict[int, _Size] = {}
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
        """Tell whether there is a parsed body; without one each `body` path is a missing field."""
        return self.body is not ABSENT

    def get(self, root: str, steps: Sequence[Step]) -> object:
        """Follow a path, such as `body` and the steps to `commits.0.id`; ABSENT when it isn't there."""
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

    def size(self, value: object) -> "_Size":
        """Return how large a value in here is; looked at once, as many routes name the same ones."""
        if type(value) is not dict and type(value) is not list:
            return _measured(value)
        size = self._sizes.get(id(value))
        if size is None:
            size = self._sizes[id(value)] = _measured(value)
        return size

    def spend(self, steps: int) -> bool:
        """Tell whether that many steps are left, and take them if so."""
        if self._spent + steps > MAX_COST:
            return False
        self._spent += steps
        return True

    def _header(self, name: str) -> str | None:
        # Most events are asked for one or two headers, which costs less than a dictionary of all of them.
        if self._headers is not None:
            return self._headers.get(name)
        names = self._names
        if names is None:
            names = self._names = [each.lower() for each, _ in self._raw_headers]
        wanted = name.encode()
        return self._raw_headers[names.index(wanted)][1].decode("utf-8", "replace") if wanted in names else None


@dataclass(frozen=True, slots=True)
class Expression:
    """A compiled CEL expression.

    Raises ExpressionError, in one line with the character it is about, for a syntax error, an unknown name or function,
    a header name that isn't in lower case, macros nested deeper than 3, a text longer than 4,096 characters, and a
    pattern of `matches` that isn't a text written out, that isn't RE2's, or is too large.

    A plain path (`body.a[0].b`, `headers['x-event']`, `type`) is followed without CEL, to the same end, and so is one
    with `matches` and nothing else. For the rest the event's data is handed to CEL, which is what costs: only those
    parts of it that the expression names.
    """

    text: str
    _program: cel.Program = field(init=False, compare=False, repr=False)
    _analysis: "_Analysis" = field(init=False, compare=False, repr=False)
    _path: "_Path | None" = field(init=False, compare=False, repr=False)
    _patterns: tuple[Pattern, ...] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if len(self.text) > MAX_TEXT:
            raise ExpressionError(f"expected at most {MAX_TEXT} characters, got {len(self.text)}")
        program = _compile(self.text)
        analysis = _Scan(self.text).analysis()
        if analysis.matches:
            program = _compile(_with_ours(self.text, analysis.matches))
        object.__setattr__(self, "_program", program)
        object.__setattr__(self, "_analysis", analysis)
        object.__setattr__(self, "_path", analysis.paths[0] if analysis.is_path else None)
        object.__setattr__(self, "_patterns", tuple([match.pattern for match in analysis.matches]))

    @property
    def reads_body(self) -> bool:
        return any(path.root == "body" for path in self._analysis.paths)

    def evaluate(self, view: View) -> object:
        """Return the value, as JSON has it: a time is an RFC 3339 text, a duration `1.5s`, bytes are base64.

        Raises MissingFieldError for a field that isn't there, ExpressionError for any other failure: operands that
        don't go together, an overflow, more data than CEL may be given: about 80,000 values and keys for all the
        expressions over one view together, fewer the more often they are named, copied or looped over. A plain path
        takes nothing of that.
        """
        path = self._path
        if path is None:
            return self._execute(view)
        value = view.get(path.root, path.steps)
        if value is ABSENT:
            raise AbsentFieldError(path, view)
        return value

    @property
    def header(self) -> str | None:
        """The header that this is a plain path to, in lower case: whoever has the headers at hand needs no view."""
        path = self._path
        return path.steps[0].key if path is not None and path.root == "headers" and len(path.steps) == 1 else None

    def is_true(self, view: View) -> bool:
        """Tell whether a condition holds; it doesn't where a field is missing. Raises ExpressionError."""
        try:
            value = self.evaluate(view)
        except MissingFieldError:
            return False
        if isinstance(value, bool):
            return value
        raise ExpressionError(f"{_shortened(self.text)}: expected true or false, got {_kind(value)}")

    def as_text(self, view: View) -> str | None:
        """Return the value as an id, a type or a key: a text as it is, a number or boolean as JSON, nothing as None.

        Nothing is null, an empty text, and a missing field. Raises ExpressionError for a list or mapping.
        """
        path = self._path
        if path is not None:  # An identity or a type is one, for each event: neither a call nor an exception more.
            value = view.get(path.root, path.steps)
        else:
            try:
                value = self._execute(view)
            except MissingFieldError:
                return None
        if isinstance(value, str):
            return value or None
        if value is ABSENT:
            return None
        if isinstance(value, dict | list):
            raise ExpressionError(f"{_shortened(self.text)}: expected a text or number, got {_kind(value)}")
        return None if value is None else _as_text(value)

    def _execute(self, view: View) -> object:
        if self._analysis.is_match:
            return self._is_matched(view)
        handed = self._handed(view)
        if handed.size > FEW or self._analysis.has_macros:
            self._charge(view)
        if not self._patterns:
            return self._run(handed.context, view)
        matcher = _Matcher(self._patterns, view)
        handed.context.add_function(_OURS, matcher)
        try:
            return self._run(handed.context, view)
        finally:
            matcher.view = None  # else they hold each other, where the collector doesn't see it
            if matcher.is_spent:  # also where CEL went on without an answer: that isn't "no match"
                raise self._too_much(_LONG_MATCH)

    def _run(self, context: cel.Context, view: View) -> object:
        try:
            result = self._program.execute(context)
            if type(result) in (dict, list) and not view.spend(CONVERTING * _measured(result).total):
                raise self._too_much("the result has too many values")
            return _as_json(result)
        except (LookupError, TypeError, RuntimeError, ArithmeticError, ValueError) as error:
            raise self._translated(error, view) from error

    def _is_matched(self, view: View) -> bool:
        """Match a plain path against a pattern: a sixth of what it takes with CEL, and most are such."""
        path = self._analysis.paths[0]
        text = view.get(path.root, path.steps)
        if text is ABSENT:
            raise AbsentFieldError(path, view)
        if type(text) is not str:
            raise ExpressionError(f"{_shortened(self.text)}: {_NO_MATCHES}")
        is_found = _found(self._patterns[0], text, view)
        if is_found is None:
            raise self._too_much(_LONG_MATCH)
        return is_found

    def _handed(self, view: View) -> "_Handed":
        """Return what CEL sees: the parts of the event that this expression names (about 25 µs per kB of them)."""
        contexts = view._contexts  # noqa: SLF001 - the cache lives as long as the view; what is in it is decided here
        handed = contexts.get(self._analysis.key)
        if handed is None and len(contexts) >= MAX_CONTEXTS:
            handed = _hand(view, _WHOLE, dict.fromkeys(ROOTS, _EVERYTHING))
        if handed is None:
            handed = _hand(view, self._analysis.key, self._analysis.parts)
        if handed is None:
            raise self._too_much("it names too many values")
        return handed

    def _charge(self, view: View) -> None:
        """Refuse what would keep the process standing still; CEL can't be interrupted.

        `map` and `filter` copy their result for each element, and naming a list, a mapping or a long text copies it. So
        with n values in all that are named, at most m of them side by side, and k such copies inside each other, it
        takes n * m^k steps for each such macro, thrice that if lists or mappings are made, which cost more to copy;
        without any copies about ten for each value.
        """
        copies = int(self._analysis.copies > 0)
        exponent = copies
        total, longest = 0, 1
        for path in self._analysis.paths:
            value = view.get(path.root, path.steps)
            if type(value) in (dict, list) or (type(value) is str and len(value) > LONG_TEXT):
                exponent = max(exponent, path.loops + copies)
                size = view.size(value)
                total += size.total
                longest = max(longest, size.longest)
        if total and not view.spend(total * max(max(self._analysis.copies, 1) * longest**exponent, READING)):
            raise self._too_much(f"it names {total} values, {longest} side by side")

    def _too_much(self, why: str) -> ExpressionError:
        return ExpressionError(f"{_shortened(self.text)}: too much to compute: {why}")

    def _translated(self, error: Exception, view: View) -> ExpressionError:
        """Tell a missing field from other failures; CEL calls a step into null or a scalar a missing overload."""
        missing: _Path | None = None
        if isinstance(error, LookupError):
            key = str(error.args[0])
            missing = self._missing(view, key.rpartition(" ")[2] if isinstance(error, IndexError) else key)
            if missing is None:
                # A key that doesn't stand in the expression is the event's.
                name = _shortened(key if key in self.text else f"a key of {self.text}")
                return MissingFieldError(f"{name} isn't there")
        elif isinstance(error, TypeError) or not view.has_body:
            missing = self._missing(view)
        if missing is not None:
            return AbsentFieldError(missing, view)
        return ExpressionError(f"{_shortened(self.text)}: {_reason(error)}")

    def _missing(self, view: View, key: str | None = None) -> "_Path | None":
        """Return the first path that breaks off at that key; without one, the first that steps into what has no fields.

        Others may not be there, either: those that `has` has asked for.
        """
        for path in self._analysis.paths:
            if view.get(path.root, path.steps) is not ABSENT:
                continue
            gap = _gap(path, view)
            if gap.key == key if key is not None else not gap.is_between_fields:
                return path
        return None


class AbsentFieldError(MissingFieldError):
    """A path that is written out leads to a field that the event doesn't have."""

    def __init__(self, path: "_Path", view: View) -> None:
        super().__init__(f"{path.text} isn't there")
        self._path = path
        self._view = view

    @property
    def hint(self) -> str:
        """Say by which expression to ask for the field first, or which value of the event has no fields; "" at length.

        It holds nothing of the event but a value's type.
        """
        path, gap = self._path, _gap(self._path, self._view)
        parent = path.up_to(gap.depth - 1).text
        if gap.depth == 0:
            told = "there is no JSON body"
        elif not gap.is_between_fields:
            told = f"{parent} is {_kind(gap.parent)}"
        elif isinstance(gap.parent, list):
            told = f"size({parent}) tells"
        elif gap.key.isidentifier():
            told = f"has({path.up_to(gap.depth).text}) tells"
        else:
            told = f"'{gap.key}' in {parent} tells"
        return told if len(told) <= 80 else ""  # noqa: PLR2004 - a line of a terminal

    @property
    def beside(self) -> str:
        """Say what is there instead, with the names of the event's fields: nothing for a line of the log."""
        gap = _gap(self._path, self._view)
        if gap.depth == 0:
            return "the event has no JSON body"
        parent = self._path.up_to(gap.depth - 1).text
        if isinstance(gap.parent, list):
            return f"{parent} has {len(gap.parent):,} {'element' if len(gap.parent) == 1 else 'elements'}"
        if not isinstance(gap.parent, dict):
            return f"{parent} is {_kind(gap.parent)}"
        names = [_shortened(name) for name in list(gap.parent)[:FEW_NAMES]]
        rest = len(gap.parent) - len(names)
        return f"{parent} has: {', '.join(names) or 'nothing'}{f' and {rest:,} more' if rest else ''}"


class TemplateError(ExpressionError):
    """An expression inside a template can't be compiled; `path` leads to its text: keys and indexes."""

    def __init__(self, path: tuple[str | int, ...], message: str) -> None:
        super().__init__(message)
        self.path = path


@dataclass(frozen=True, slots=True)
class Template:
    """A JSON-like value with `${{ CEL }}` inside its texts (mapping keys are taken as they are).

    A text that is nothing but one expression becomes the expression's value, of whatever type; in any other, texts are
    inserted as they are and other values as JSON. Raises TemplateError for the first expression that doesn't compile.
    """

    value: object
    _compiled: object = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_compiled", _compiled(self.value, ()))

    @property
    def has_expressions(self) -> bool:
        return self._compiled is not self.value

    def render(self, view: View) -> object:
        """Return the value with its expressions evaluated.

        Raises ExpressionError, as MissingFieldError where a field isn't there: half a body is no body.
        """
        return _rendered(self._compiled, view) if self.has_expressions else self.value

    def render_bytes(self, view: View) -> tuple[bytes, str | None]:
        """Return the body to send and its content type: a text as UTF-8 and None, anything else as JSON.

        What decides is the template: `"${{ body.text }}"` is a text, whatever it becomes.
        Raises ExpressionError, also for more than 1 MiB.
        """
        rendered = self.render(view)
        if isinstance(self.value, str):
            content, content_type = _as_text(rendered).encode("utf-8", "replace"), None
        else:
            content, content_type = _dumps(rendered), "application/json"
        if len(content) > MAX_RESULT:
            raise ExpressionError(f"expected a body of at most {MAX_RESULT} bytes, got {len(content)}")
        return content, content_type


# Reading an event


def _readable(text: str) -> str:
    """Replace the bytes that weren't UTF-8 (PEP 383 keeps them as lone surrogates), which CEL can't take."""
    if text.isascii():
        return text
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _first_values(form: str, *, limit: int | None = None) -> dict[str, str]:
    """Read `a=1&b=2`. Raises ValueError for more fields than the limit."""
    return dict(reversed(parse_qsl(form, keep_blank_values=True, max_num_fields=limit)))


def _parse(body: bytes, encoding: str, content_type: str) -> object:
    coding = encoding.strip().lower()
    if coding not in ("", "identity"):
        body = _inflated(body, coding)
    media_type = content_type.partition(";")[0].strip().lower()
    try:
        if media_type == "application/x-www-form-urlencoded" and body:
            return _first_values(body.decode("utf-8", "replace"), limit=MAX_FORM_FIELDS)
        return orjson.loads(body.removeprefix(b"\xef\xbb\xbf"))
    except ValueError:
        return ABSENT


def _inflated(body: bytes, coding: str) -> bytes:
    """Undo gzip or deflate (RFC 9110, 8.4.1), or return nothing: unknown, broken, cut short or too large."""
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


# Templates


class _Interpolated(NamedTuple):
    """A text with expressions in it."""

    pieces: tuple[str | Expression, ...]


def _compiled(value: object, path: tuple[str | int, ...]) -> object:
    """Put compiled expressions in place of texts; what has none is returned itself. Raises TemplateError."""
    try:
        match value:
            case str():
                pieces = _pieces(value)
                return value if not pieces else pieces[0] if len(pieces) == 1 else _Interpolated(pieces)
            case dict():
                values = {key: _compiled(item, (*path, key)) for key, item in value.items()}
                return value if all(values[key] is value[key] for key in value) else values
            case list():
                items = [_compiled(item, (*path, index)) for index, item in enumerate(value)]
                return value if all(new is old for new, old in zip(items, value, strict=True)) else items
            case _:
                _dumps(_as_json(value))
                return value
    except TemplateError:
        raise
    except (ExpressionError, ValueError) as error:
        raise TemplateError(path, str(error)) from error


def _pieces(text: str) -> tuple[str | Expression, ...]:
    """Split a text at its expressions; empty when it has none."""
    pieces: list[str | Expression] = []
    at = 0
    while (start := text.find("${{", at)) >= 0:
        end = _end(text, start + 3)
        if start > at:
            pieces.append(text[at:start])
        pieces.append(Expression(text[start + 3 : end].strip()))
        at = end + 2
    if at and at < len(text):
        pieces.append(text[at:])
    return tuple(pieces)


def _end(text: str, start: int) -> int:
    """Find the `}}` that ends an expression: none inside a text, and no brace that closes one of its own."""
    depth = 0
    for token in _tokens(text, start):
        if token.text == "{":
            depth += 1
        elif token.text == "}" and depth:
            depth -= 1
        elif token.text == "}" and text.startswith("}}", token.start):
            return token.start
    raise ExpressionError(f"expected }}}} after ${{{{ at character {start - 2}, got the end of the text")


def _rendered(compiled: object, view: View) -> object:
    match compiled:
        case Expression():
            return compiled.evaluate(view)
        case _Interpolated():
            texts = [piece if isinstance(piece, str) else _as_text(piece.evaluate(view)) for piece in compiled.pieces]
            if sum(map(len, texts)) > MAX_RESULT:
                raise ExpressionError(f"expected a text of at most {MAX_RESULT} characters, got more")
            return "".join(texts)
        case dict():
            return {key: _rendered(item, view) for key, item in compiled.items()}
        case list():
            return [_rendered(item, view) for item in compiled]
        case _:
            return compiled


# Values


def _as_json(value: object) -> object:
    """Turn what CEL returns into JSON's types, as CEL's own mapping to JSON does."""
    if value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    match value:
        case list():
            return [_as_json(item) for item in value]
        case dict():
            # CEL's mappings have no order, and two attempts should send the same bytes.
            items = {key if isinstance(key, str) else _as_text(key): item for key, item in value.items()}
            return {key: _as_json(items[key]) for key in sorted(items)}
        case datetime():
            return value.isoformat().replace("+00:00", "Z")
        case timedelta():
            return f"{value.total_seconds():g}s"
        case bytes():
            return base64.b64encode(value).decode()
        case _:
            raise ValueError(f"expected a JSON value, got {value}")


def _as_text(value: object) -> str:
    return value if isinstance(value, str) else _dumps(value).decode()


def _dumps(value: object) -> bytes:
    try:
        return orjson.dumps(value)
    except TypeError as error:
        raise ExpressionError(f"expected a JSON value: {error}") from error


def _kind(value: object) -> str:
    """Name a value's type: what stands in an event is nobody's to read in a log."""
    names = {str: "a text", bool: "a boolean", list: "a list", dict: "a mapping", type(None): "null"}
    return names.get(type(value), "a number")


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 80 else text[:79] + "…"  # noqa: PLR2004 - a line of a terminal


class _Matcher:
    """`matches` of one expression, as CEL calls it with a text and a pattern's number, while it looks at one view."""

    __slots__ = ("_patterns", "is_spent", "view")

    def __init__(self, patterns: Sequence[Pattern], view: View) -> None:
        self._patterns = patterns
        self.view: View | None = view
        self.is_spent = False

    def __call__(self, text: object, number: int) -> object:
        """Tell whether it matches; what CEL can't take is an error of it (an exception would be told on stderr)."""
        if type(text) is not str or self.view is None or self.is_spent:
            return ABSENT
        is_found = _found(self._patterns[number], text, self.view)
        if is_found is None:
            self.is_spent = True
            return ABSENT
        return is_found


def _found(pattern: Pattern, text: str, view: View) -> bool | None:
    """Look for a pattern, at the view's expense; None where that is spent."""
    data = text.encode("utf-8", "surrogatepass")
    return pattern.is_in(data) if view.spend(pattern.cost(len(data))) else None


class _Size(NamedTuple):
    """How many values there are in all, keys included (256 characters count as one more), and the most side by side."""

    total: int
    longest: int


def _measured(value: object) -> _Size:
    """Return a value's size; of one that is too large for CEL at any rate only that it is."""
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
    return _Size(total, longest)


# A tree of mapping keys; an empty one stands for everything below.
_Parts = dict[str, "_Parts"]
_EVERYTHING: _Parts = {}


_WHOLE = frozenset(ROOTS)


class _Handed(NamedTuple):
    """What CEL has of a view, and how many values that is."""

    context: cel.Context
    size: int


def _hand(view: View, key: frozenset[str], parts: _Parts) -> _Handed | None:
    """Hand parts of the view, which keeps them so, to CEL; None if that would cost too much."""
    contexts = view._contexts  # noqa: SLF001 - as above
    if key not in contexts:
        whole: list[object] = []
        named = {root: _picked(getattr(view, root), wanted, whole) for root, wanted in parts.items()}
        size = sum([view.size(value).total for value in whole])
        if view.spend(HANDING * size):
            context = cel.Context({root: value for root, value in named.items() if value is not ABSENT})
            contexts[key] = _Handed(context, size)
        else:
            contexts[key] = None
    return contexts[key]


def _picked(value: object, parts: _Parts, whole: list[object]) -> object:
    """Return a value with nothing but the parts, and add those of it that are in there whole."""
    if not parts or type(value) is not dict:
        whole.append(value)
        return value
    return {key: _picked(value[key], below, whole) for key, below in parts.items() if key in value}


# Compiling


def _with_ours(text: str, matches: Sequence["_Match"]) -> str:
    """Have each `matches('…')` call ours, with the number of its pattern."""
    pieces, at = [], 0
    for number, match in enumerate(matches):
        pieces += [text[at : match.start], f"{_OURS}({number})"]
        at = match.end
    return "".join([*pieces, text[at:]])


def _compile(text: str) -> cel.Program:
    try:
        program = cel.compile(text)
    except ValueError as error:
        found = re.search(r"ERROR: <input>:(\d+):(\d+): (?:Syntax error: )?([^\n]*)", str(error)[len(text) :])
        if found is None:
            raise ExpressionError(f"syntax error: {_shortened(str(error))}") from error
        line, column, reason = found.groups()
        place = f"character {column}" if line == "1" else f"line {line}, character {column}"
        reason = reason.partition(" expecting ")[0] if len(reason) > 80 else reason  # noqa: PLR2004 - one line
        raise ExpressionError(f"syntax error at {place}: {reason}") from error
    if rooted := [name for name in program.variables() if name.startswith(".")]:
        raise ExpressionError(f"unknown name '{rooted[0]}'{did_you_mean(rooted[0], ROOTS)}")
    return program


def _reason(error: Exception) -> str:
    """Cut the library's message to its first sentence, and to what holds nothing of an event."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    message = str(error)
    # Names were checked when the expression was compiled, so this is about the types of the arguments.
    if undefined := re.match("Undefined variable or function: '([^']*)'", message):
        return f"{undefined[1]} isn't defined for such a value"
    if message.startswith("No such overload"):
        return "an operand has the wrong type"
    if message.startswith(f"Function '{_OURS}'"):
        return _NO_MATCHES
    if refused := re.match("(Function '[^']*' error: )(.*)", message, re.DOTALL):
        why = _REFUSAL.match(refused[2])
        message = refused[1] + (why[0] if why else "an argument that it doesn't take")
    message = re.split(r"\. |\.$|(?<=') on (?=[-0-9])|: the operation is| CEL does not", message, maxsplit=1)[0]
    return _shortened(message[:1].lower() + message[1:])


_OURS = "matches__"  # no name of CEL's, and none that `_Scan` lets through
_NO_MATCHES = "matches isn't defined for such a value"
_LONG_MATCH = "its patterns would take too long with such texts"
_REFUSAL = re.compile(
    "string parse error: [a-z ]+|(unsigned )?integer overflow|premature end of input|input [a-z ]+|trailing input"
)
_TOKEN = re.compile(
    r"""
    (?P<space>  \s+ | //[^\n]* )
  | (?P<raw>    [bB]?[rR] (?: \"{3}.*?\"{3} | '{3}.*?'{3} | "[^"\n]*" | '[^'\n]*' ) )
  | (?P<text>   [bB]? (?: \"{3}(?:\\.|[^\\])*?\"{3} | '{3}(?:\\.|[^\\])*?'{3} ) )
  | (?P<line>   [bB]? (?: "(?:\\.|[^"\\\n])*" | '(?:\\.|[^'\\\n])*' ) )
  | (?P<name>   [A-Za-z_][A-Za-z0-9_]* )
  | (?P<number> [0-9]+ (?:\.[0-9]+)? [A-Za-z0-9]* )
  | (?P<sign>   . )
    """,
    re.VERBOSE | re.DOTALL,
)
_BEFORE_AN_INDEX = re.compile(r"[\w\])}'\"]$")  # Before any other token, `[` begins a list.
_PLAIN_TEXT = re.compile(r"""(['"])([^\\'"]*)\1""")

_WORDS = frozenset(
    ("true", "false", "null", "in", "bool", "bytes", "double", "int", "list", "map", "null_type", "string", "uint")
)
_FUNCTIONS = frozenset(
    ("bytes", "double", "duration", "dyn", "has", "int", "size", "string", "timestamp", "type", "uint")
)
_MACROS = frozenset(("all", "exists", "exists_one", "existsOne", "filter", "map"))
_COPYING_MACROS = frozenset(("exists_one", "existsOne", "filter", "map"))
_METHODS = frozenset(
    (
        *("contains", "endsWith", "matches", "size", "startsWith"),
        *("getDate", "getDayOfMonth", "getDayOfWeek", "getDayOfYear", "getFullYear", "getHours"),
        *("getMilliseconds", "getMinutes", "getMonth", "getSeconds"),
    )
)


class _Token(NamedTuple):
    kind: str
    text: str
    start: int


class _Path(NamedTuple):
    """A path as far as it is written out, inside how many macros it stands, and the token after it."""

    root: str
    steps: tuple[Step, ...]
    loops: int
    end: int

    @property
    def text(self) -> str:
        return self.root + "".join(
            f"[{position}]" if key is None else f".{key}" if key.isidentifier() else f"['{key}']"
            for key, position in self.steps
        )

    def up_to(self, depth: int) -> "_Path":
        return self._replace(steps=self.steps[:depth])


class _Gap(NamedTuple):
    """Where a path breaks off: after how many steps, the last of them into nothing; `parent` is what is before that."""

    depth: int
    parent: object
    step: Step

    @property
    def key(self) -> str:
        return str(self.step.position) if self.step.key is None else self.step.key

    @property
    def is_between_fields(self) -> bool:
        """Tell whether the parent has fields, or elements, as the step wants, though not this one."""
        return isinstance(self.parent, list if self.step.key is None else dict)


def _gap(path: _Path, view: View) -> _Gap:
    """Find where a path that isn't there breaks off; at 0 where not even its root is."""
    depth = 0
    while view.get(path.root, path.steps[:depth]) is not ABSENT:
        depth += 1
    if depth == 0:
        return _Gap(0, ABSENT, Step(None, -1))
    return _Gap(depth, view.get(path.root, path.steps[: depth - 1]), path.steps[depth - 1])


class _Match(NamedTuple):
    """A call of `matches`, from its name to its closing bracket."""

    start: int
    end: int
    pattern: Pattern


class _Analysis(NamedTuple):
    """What can be told of an expression without its syntax tree, which the library doesn't give.

    It is nothing but a plain path (`is_path`), or nothing but one with `matches` behind it (`is_match`), or neither.
    """

    paths: tuple[_Path, ...]
    is_path: bool
    matches: tuple[_Match, ...]
    is_match: bool
    has_macros: bool
    copies: int
    parts: dict[str, _Parts]
    key: frozenset[str]


def _tokens(text: str, start: int = 0) -> Iterator[_Token]:
    for found in _TOKEN.finditer(text, start):
        if found.lastgroup != "space":
            yield _Token(found.lastgroup or "", found.group(), found.start())


class _Scan:
    """Reads the names, paths and macros off an expression that parses. Raises ExpressionError for unknown names."""

    def __init__(self, text: str) -> None:
        self._tokens = [*_tokens(text), *[_Token("end", "", len(text))] * 4]
        self._at = 0
        self._brackets: list[str | None] = []  # those that are open, a macro's with its variable
        self._paths: list[_Path] = []
        self._macros: list[str] = []
        self._matches: list[_Match] = []
        self._makes_values = False

    def analysis(self) -> "_Analysis":
        before = ""
        while (token := self._tokens[self._at]).kind != "end":
            self._at += 1
            if token.text in ("(", "[", "{"):
                self._brackets.append(None)
                is_index = token.text == "[" and before != "in" and _BEFORE_AN_INDEX.search(before)
                self._makes_values |= token.text != "(" and not is_index
            elif token.text in (")", "]", "}"):
                self._brackets.pop()
            elif token.kind == "name":
                self._name(token, is_member=before == ".", is_call=self._tokens[self._at].text == "(")
            before = self._tokens[self._at - 1].text
        parts: dict[str, _Parts] = {}
        for path in self._paths:
            _add_part(parts, path)
        first = self._paths[0] if self._paths else None
        end = first.end if first is not None and self._tokens[0].text == first.root else -1
        return _Analysis(
            paths=tuple(self._paths),
            is_path=end == self._at,
            matches=tuple(self._matches),
            # `.`, `matches`, `(`, the pattern, `)`
            is_match=len(self._matches) == 1 and end + 5 == self._at and self._tokens[end].text == ".",
            has_macros=bool(self._macros),
            copies=sum([macro in _COPYING_MACROS for macro in self._macros]) * (3 if self._makes_values else 1),
            parts=parts,
            key=frozenset(path.text for path in self._paths),
        )

    @property
    def _loops(self) -> int:
        return sum(variable is not None for variable in self._brackets)

    def _name(self, token: _Token, *, is_member: bool, is_call: bool) -> None:
        if is_member and token.text in _MACROS and self._tokens[self._at + 2].text == ",":
            self._macro(token)
        elif is_call:
            known = _METHODS if is_member else _FUNCTIONS
            if token.text not in known:
                raise _at(token, f"unknown function '{token.text}'", did_you_mean(token.text, known | _MACROS))
            if token.text == "matches":
                self._match(token)
        elif self._tokens[self._at].text == "{" and token.text != "in":
            raise _at(token, f"expected a mapping such as {{'a': 1}}, got a '{token.text}' of protocol buffers")
        elif is_member or token.text in _WORDS or token.text in self._brackets:
            return
        elif token.text in ROOTS:
            self._path(token)
        else:
            raise _at(token, f"unknown name '{token.text}'", did_you_mean(token.text, ROOTS))

    def _macro(self, token: _Token) -> None:
        """Go behind `(x,`, where the macro's variable is known."""
        variable = self._tokens[self._at + 1]
        if variable.text in ROOTS:
            raise _at(variable, f"expected a new name, got '{variable.text}'")
        self._brackets.append(variable.text)
        if self._loops > MAX_NESTING:
            raise _at(token, f"expected at most {MAX_NESTING} macros inside each other, got more")
        self._macros.append(token.text)
        self._at += 3

    def _match(self, name: _Token) -> None:
        """Compile the pattern once. One that came from the event would be the sender's, and compiled at each call."""
        _, literal, end = self._tokens[self._at : self._at + 3]
        if literal.kind not in ("raw", "text", "line") or literal.text[0] in "bB" or end.text != ")":
            raise _at(literal, "expected the pattern of matches() as one text written out, got something else")
        try:
            pattern = Pattern(str(_compile(literal.text).execute(cel.Context())))
        except ExpressionError as error:
            raise _at(literal, str(error)) from error
        self._matches.append(_Match(name.start, end.start + 1, pattern))

    def _path(self, root: _Token) -> None:
        """Read the steps `.a['b'][0]`, as far as they are written out."""
        steps: list[Step] = []
        while True:
            sign, inner, end = self._tokens[self._at : self._at + 3]
            if sign.text == "." and inner.kind == "name" and end.text != "(":
                steps.append(Step(inner.text, -1))
                self._at += 2
            elif sign.text == "[" and end.text == "]" and (literal := _PLAIN_TEXT.fullmatch(inner.text)):
                steps.append(Step(literal[2], -1))
                self._at += 3
            elif sign.text == "[" and end.text == "]" and inner.text.isdigit():
                steps.append(Step(None, int(inner.text)))
                self._at += 3
            else:
                break
        if root.text in ("headers", "query") and len(steps) == 1 and self._tokens[self._at - 1].kind == "name":
            self._refuse_hyphens(root)
        if root.text == "headers" and steps and (name := steps[0].key or "") != name.lower():
            raise _at(root, f"expected a header's name in lower case, got '{name}'")
        self._paths.append(_Path(root.text, tuple(steps), self._loops, self._at))

    def _refuse_hyphens(self, root: _Token) -> None:
        """Tell how to write `headers.x-id`, which CEL reads as a difference: of two texts, which have none."""
        at, written = self._at, self._tokens[self._at - 1]
        name = written.text
        while (token := self._tokens[at]).start == written.start + len(written.text) and (
            token.text == "-" or token.kind in ("name", "number")
        ):
            name, written, at = name + token.text, token, at + 1
        if written.kind != "sign" and "-" in name:
            plain = name.lower() if root.text == "headers" else name
            raise _at(root, f"expected {root.text}['{plain}'], got {root.text}.{name}")


def _add_part(parts: dict[str, _Parts], path: _Path) -> None:
    """Note what a path needs; a list on its way is handed over whole."""
    *names, last = [path.root, *[step.key for step in path.steps if step.key is not None]]
    below = parts
    for name in names:
        if name in below and not below[name]:
            return
        below = below.setdefault(name, {})
    below[last] = {}


def _at(token: _Token, message: str, hint: str = "") -> ExpressionError:
    return ExpressionError(f"{message} at character {token.start + 1}{hint}")
