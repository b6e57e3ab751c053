"""Conditions on the fields of an event (`match:`): parsing and evaluation."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any, Final, NamedTuple, assert_never

from gateway.model import ExpressionError, RulesError
from gateway.rules.event_view import ABSENT, EventView, Segment
from gateway.text import Glob, did_you_mean

Scalar = str | int | float | bool | None
Seen = Callable[[str], str]
"""Returns a text of an event as people may see it. It takes whole texts: of a part it doesn't know what it is of."""
FREE = 1024  # characters; searching a string up to this length for globs isn't charged
MOST_SHOWN = 5
"""Values of a list that are told; the others are counted."""
CHARACTERS_PER_COST_UNIT = 25
"""How many characters are searched for the pieces of a glob in 0.1 µs, in the worst case: near-matches everywhere."""


class UndecidedMatchError(ExpressionError):
    """The event's budget for expressions and globs doesn't suffice."""


@dataclass(frozen=True, slots=True)
class Path:
    """A path to a value: `type`, `source`, `headers.<name>`, `query.<name>`, `body`, `body.<key or index>.…`."""

    root: str
    segments: tuple[Segment, ...]
    text: str = field(compare=False)

    def of(self, view: EventView) -> object:
        """Return the value, or ABSENT."""
        return view.get(self.root, self.segments)


@dataclass(frozen=True, slots=True)
class OneOf:
    """The value is one of these, or a string that matches one of the globs.

    Searching a long string for globs is charged to the view's budget. Raises UndecidedMatchError if it doesn't suffice.
    """

    values: tuple[Scalar, ...]
    globs: tuple[Glob, ...] = ()
    keys: frozenset[object] = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "keys", frozenset(map(key_of, self.values)))

    def passes(self, value: object, view: EventView) -> bool:
        if key_of(value) in self.keys:
            return True
        if not self.globs or type(value) is not str:
            return False
        if len(value) <= FREE:
            return any(glob.matches(value) for glob in self.globs)
        return any(self._is_matched(value, glob, view) for glob in self.globs)

    def _is_matched(self, text: str, glob: Glob, view: EventView) -> bool:
        is_searched = len(glob.pieces) > 2 and text.startswith(glob.prefix)  # noqa: PLR2004 - more than both ends
        if is_searched and not view.spend(len(text) // CHARACTERS_PER_COST_UNIT):
            raise UndecidedMatchError(f"match: too much to compute: '{glob.text}' in {len(text):,} characters")
        return glob.matches(text)

    def words(self, seen: Seen) -> str:
        every = [*self.values, *self.globs]
        shown = [each.text if isinstance(each, Glob) else _shown(each, seen) for each in every[:MOST_SHOWN]]
        return " or ".join([*shown, f"{len(every) - MOST_SHOWN} more"] if len(every) > MOST_SHOWN else shown)


@dataclass(frozen=True, slots=True)
class Compare:
    """The value is a number on this side of the bound."""

    operator: str
    bound: float

    def passes(self, value: object, _: EventView) -> bool:
        return (type(value) is int or type(value) is float) and _COMPARISONS[self.operator].holds(value, self.bound)

    def words(self, seen: Seen) -> str:
        return f"{_COMPARISONS[self.operator].words} {_shown(self.bound, seen)}"


@dataclass(frozen=True, slots=True)
class Exists:
    """The field exists (perhaps as null), or it doesn't."""

    expected: bool

    def passes(self, value: object, _: EventView) -> bool:
        return (value is not ABSENT) is self.expected

    def words(self, _: Seen) -> str:
        return "any value" if self.expected else "no such field"


@dataclass(frozen=True, slots=True)
class Unless:
    """The value fails a test; so does a missing one, unless the test is about absence."""

    test: "Test"

    def passes(self, value: object, view: EventView) -> bool:
        return not self.test.passes(value, view)

    def words(self, seen: Seen) -> str:
        return f"not ({self.test.words(seen)})"


@dataclass(frozen=True, slots=True)
class Every:
    """The value passes all of these."""

    tests: tuple["Test", ...]

    def passes(self, value: object, view: EventView) -> bool:
        return all(test.passes(value, view) for test in self.tests)

    def words(self, seen: Seen) -> str:
        return " and ".join(test.words(seen) for test in self.tests)


Test = OneOf | Compare | Exists | Unless | Every


@dataclass(frozen=True, slots=True)
class Field:
    """The value at a path passes a test."""

    path: Path
    test: Test

    def holds(self, view: EventView) -> bool:
        return self.test.passes(self.path.of(view), view)

    def why_not(self, view: EventView, seen: Seen) -> str | None:
        value = self.path.of(view)
        if self.test.passes(value, view):
            return None
        if value is ABSENT:
            return f"{self.path.text}: not there"
        return f"{self.path.text}: expected {self.test.words(seen)}, got {_shown(value, seen)}"

    def words(self, seen: Seen) -> str:
        return f"{self.path.text}: {self.test.words(seen)}"


@dataclass(frozen=True, slots=True)
class AllOf:
    """Every condition holds."""

    conditions: tuple["Condition", ...]

    def holds(self, view: EventView) -> bool:
        for condition in self.conditions:  # noqa: SIM110 - the loop is half as expensive, and this is the hot path
            if not condition.holds(view):
                return False
        return True

    def why_not(self, view: EventView, seen: Seen) -> str | None:
        return next(filter(None, (condition.why_not(view, seen) for condition in self.conditions)), None)

    def words(self, seen: Seen) -> str:
        return " and ".join(condition.words(seen) for condition in self.conditions)


@dataclass(frozen=True, slots=True)
class AnyOf:
    """At least one condition holds."""

    conditions: tuple["Condition", ...]

    def holds(self, view: EventView) -> bool:
        return any(condition.holds(view) for condition in self.conditions)

    def why_not(self, view: EventView, seen: Seen) -> str | None:
        reasons = [condition.why_not(view, seen) for condition in self.conditions]
        return f"any_of: {'; '.join(map(str, reasons))}" if all(reasons) else None

    def words(self, seen: Seen) -> str:
        return "(" + " or ".join(condition.words(seen) for condition in self.conditions) + ")"


@dataclass(frozen=True, slots=True)
class Not:
    """The condition doesn't hold."""

    condition: "Condition"

    def holds(self, view: EventView) -> bool:
        return not self.condition.holds(view)

    def why_not(self, view: EventView, seen: Seen) -> str | None:
        return None if self.holds(view) else f"not: {self.condition.words(seen)}"

    def words(self, seen: Seen) -> str:
        return f"not ({self.condition.words(seen)})"


Condition = Field | AllOf | AnyOf | Not


class _Comparison(NamedTuple):
    words: str
    holds: Callable[[float, float], bool]


_COMPARISONS = {
    "gt": _Comparison("more than", lambda value, bound: value > bound),
    "gte": _Comparison("at least", lambda value, bound: value >= bound),
    "lt": _Comparison("less than", lambda value, bound: value < bound),
    "lte": _Comparison("at most", lambda value, bound: value <= bound),
}


class _Boolean:
    """Represents true or false in sets and mappings of values, where Python's True equals 1."""


_TRUE: Final = _Boolean()
_FALSE: Final = _Boolean()
_NO_SCALAR: Final = _Boolean()


def key_of(value: object) -> object:
    """Return a hashable key that is equal exactly for scalars that are equal in JSON; other values match no key."""
    kind = type(value)
    if kind is str or kind is int or kind is float or value is None:
        return value
    return (_TRUE if value else _FALSE) if kind is bool else _NO_SCALAR


def _shown(value: object, seen: Seen = str) -> str:
    if isinstance(value, Mapping):
        return "a mapping" if value else "{}"
    if isinstance(value, list):
        return "a list" if value else "[]"
    if isinstance(value, str):
        value = seen(value)
        text = value if value and value.isprintable() else repr(value)
    elif value is None:
        text = "null"
    else:
        text = str(value).lower() if isinstance(value, bool) else seen(str(value))
    return text if len(text) <= 60 else text[:59] + "…"  # noqa: PLR2004 - half a line of a terminal


class ConditionError(RulesError):
    """A `match:` isn't a valid condition. `problems` are paths, each with a message."""

    def __init__(self, problems: Sequence[tuple[tuple[str | int, ...], str]]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(f"{_place(path)}: {message}" for path, message in self.problems))


def parse_condition(match: Mapping[str, object]) -> Condition:
    """Parse the value of `match:`. Raises ConditionError with all problems."""
    reader = _Reader()
    condition = reader.conditions(match, ())
    if reader.problems:
        raise ConditionError(reader.problems)
    return condition


def written(condition: Condition) -> dict[str, Any]:
    """Return a condition in the form of `match:`, the inverse of `parse_condition`."""
    match condition:
        case Field():
            return {condition.path.text: _written_test(condition.test)}
        case AllOf():
            return {"all_of": [written(each) for each in condition.conditions]}
        case AnyOf():
            return {"any_of": [written(each) for each in condition.conditions]}
        case Not():
            return {"not": written(condition.condition)}
        case _ as never:
            assert_never(never)


def _written_test(test: Test) -> Any:  # noqa: ANN401 - what JSON has
    match test:
        case OneOf() if len(test.values) == 1 and not test.globs:
            return {"is": test.values[0]}  # also a string with a star, which would be a pattern in a list
        case OneOf():
            return [*test.values, *[glob.text for glob in test.globs]]
        case Compare():
            return {test.operator: test.bound}
        case Exists():
            return {"exists": test.expected}
        case Unless():
            return {"not": _written_test(test.test)}
        case Every():
            return {name: operand for each in test.tests for name, operand in _written_test(each).items()}
        case _ as never:
            assert_never(never)


_GROUPS = ("any_of", "all_of", "not")
_TESTS = ("is", *_COMPARISONS, "exists", "not")
_NOTHING = OneOf(())


class _Reader:
    """Parses conditions and collects problems; its results are valid only if there are none."""

    def __init__(self) -> None:
        self.problems: list[tuple[tuple[str | int, ...], str]] = []

    def conditions(self, match: object, at: tuple[str | int, ...]) -> Condition:
        if not isinstance(match, Mapping) or not match:
            self.problems.append((at, f"expected a mapping of paths to values, got {_named(match)}"))
            return AllOf(())
        conditions = tuple([self._entry(key, value, (*at, key)) for key, value in match.items()])
        return conditions[0] if len(conditions) == 1 else AllOf(conditions)

    def _entry(self, key: str, value: object, at: tuple[str | int, ...]) -> Condition:
        if key == "not":
            return Not(self.conditions(value, at))
        if key in ("any_of", "all_of"):
            if not isinstance(value, list) or not value:
                self.problems.append((at, f"expected a list of mappings, got {_named(value)}"))
                return AllOf(())
            conditions = tuple([self.conditions(item, (*at, index)) for index, item in enumerate(value)])
            return AnyOf(conditions) if key == "any_of" else AllOf(conditions)
        path = _parsed_path(key)
        if isinstance(path, str):
            self.problems.append((at, path))
            return AllOf(())
        return Field(path, self._test(value, at))

    def _test(self, value: object, at: tuple[str | int, ...]) -> Test:
        if isinstance(value, Mapping):
            if not value:
                self.problems.append((at, f"expected a value, a list or tests ({', '.join(_TESTS)}), got {{}}"))
                return _NOTHING
            tests = tuple([self._named_test(name, operand, (*at, name)) for name, operand in value.items()])
            return tests[0] if len(tests) == 1 else Every(tests)
        if isinstance(value, list):
            if not value:
                self.problems.append((at, "expected at least one value, got []"))
            items = [self._scalar(item, (*at, index)) for index, item in enumerate(value)]
        else:
            items = [self._scalar(value, at)]
        globs = tuple([Glob.of(item) for item in items if isinstance(item, str) and "*" in item])
        return OneOf(tuple([item for item in items if not (isinstance(item, str) and "*" in item)]), globs)

    def _named_test(self, name: str, operand: object, at: tuple[str | int, ...]) -> Test:
        if name == "is":
            return OneOf((self._scalar(operand, at),))
        if name == "not":
            return Unless(self._test(operand, at))
        if name == "exists":
            if not isinstance(operand, bool):
                self.problems.append((at, f"expected true or false, got {_named(operand)}"))
            return Exists(operand is True)
        if name in _COMPARISONS:
            if isinstance(operand, int | float) and not isinstance(operand, bool) and isfinite(operand):
                return Compare(name, operand)
            self.problems.append((at, f"expected a number, got {_named(operand)}"))
            return _NOTHING
        hint = (
            did_you_mean(name, _TESTS)
            or f", expected one of {', '.join(_TESTS)}; a field in it is one key with it, as body.a.b"
        )
        self.problems.append((at, f"unknown test '{name}'{hint}"))
        return _NOTHING

    def _scalar(self, value: object, at: tuple[str | int, ...]) -> Scalar:
        if value is None or isinstance(value, str | int) or (isinstance(value, float) and isfinite(value)):
            return value
        self.problems.append((at, f"expected a string, a number, true, false or null, got {_named(value)}"))
        return None


_ROOTS = ("type", "source", "headers", "query", "body")
SEGMENT = re.compile(r'\.(?:"([^"]+)"|([^."\[\]]+))')
"""A step of a path in a body: a quoted key, or a plain one or an item's position."""
NAME = re.compile(r'\.(?:"([^"]+)"|([^"]+))')
"""A header's or parameter's name in a path, quoted or plain."""


_BRANCHES = {"or": "any_of", "any": "any_of", "anyOf": "any_of", "and": "all_of", "all": "all_of", "allOf": "all_of"}


def _parsed_path(text: str) -> Path | str:
    """Parse a path, or return what is wrong with it. A key with dots or brackets is quoted: `body."a.b".c`."""
    root, dot, rest = text.partition(".")
    if root not in _ROOTS:
        hint = did_you_mean(text, (*_ROOTS, *_GROUPS)) or did_you_mean(root, _ROOTS)
        hint = f", expected {_BRANCHES[text]}" if text in _BRANCHES else hint
        expected = ", expected type, source, headers.…, query.…, body.…, any_of, all_of or not"
        return f"unknown path '{text}'{hint or expected}"
    rest = dot + rest
    if root in ("type", "source") and not rest:
        return Path(root, (), text)
    if root in ("headers", "query"):
        found = NAME.fullmatch(rest)
        if found is None:
            return f"expected {root}.<name>, got '{text}'"
        name = found[1] or found[2]
        return Path(root, (Segment(name.lower() if root == "headers" else name, -1),), text)
    if root == "body" and "".join(found[0] for found in SEGMENT.finditer(rest)) == rest:
        return Path(root, tuple([_segment(found) for found in SEGMENT.finditer(rest)]), text)
    example = '; a list\'s items are body.a.0, other keys are quoted: body."a[b].c"' if root == "body" else ""
    return f"expected {'body.a.b' if root == 'body' else root}, got '{text}'{example}"


def _segment(found: re.Match[str]) -> Segment:
    quoted, plain = found.groups()
    if plain is None:
        return Segment(quoted, -1)
    is_position = plain.isascii() and plain.isdigit() and len(plain) < 10  # noqa: PLR2004 - no list has more items
    return Segment(plain, int(plain) if is_position else -1)


def _named(value: object) -> str:
    return f"'{value}'" if isinstance(value, str) else _shown(value)


def _place(path: Sequence[str | int]) -> str:
    return "match" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
