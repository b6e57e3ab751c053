"""Which types CEL's operators, CEL's functions and our functions accept.

It is found out by evaluating them with a sample value of each type.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import product

from gateway.model import ExpressionError
from gateway.rules.event_view import EventView
from gateway.rules.expressions import Expression, hides_values
from gateway.rules.functions import FUNCTIONS, MAX_RESULT

ANY = "any"
"""The type of a value that depends on the event."""
WORDS = {
    "bool": "a boolean",
    "int": "an integer",
    "uint": "an integer",
    "double": "a number",
    "string": "a string",
    "bytes": "bytes",
    "list": "a list",
    "map": "a mapping",
    "null": "null",
    "timestamp": "a timestamp",
    "duration": "a duration",
    "type": "a type",
}
"""The types' names in messages."""
_SAMPLES = {
    "bool": "true",
    "int": "1",
    "uint": "1u",
    "double": "1.5",
    "string": "'a'",
    "bytes": "b'a'",
    "list": "[1]",
    "map": "{'a': 1}",
    "null": "null",
    "timestamp": "timestamp(0)",
    "duration": "duration('1s')",
    "type": "type(1)",
}
"""A sample value of each type, in CEL."""


RESULTS = {
    **dict.fromkeys(("size", "int", "getDate", "getDayOfMonth", "getDayOfWeek", "getDayOfYear", "getFullYear"), "int"),
    **dict.fromkeys(("getHours", "getMilliseconds", "getMinutes", "getMonth", "getSeconds"), "int"),
    **dict.fromkeys(("bool", "has", "contains", "startsWith", "endsWith", "matches"), "bool"),
    **dict.fromkeys(("all", "exists", "exists_one", "existsOne"), "bool"),
    **dict.fromkeys(("map", "filter", "split"), "list"),
    **dict.fromkeys(("string", "extract", "hmac", "base64", "date", "format", "join", "json", "lower"), "string"),
    **dict.fromkeys(("ceAttribute", "money", "replace", "sha256", "substring", "trim", "truncate"), "string"),
    **dict.fromkeys(("upper", "url"), "string"),
    **{name: name for name in ("uint", "double", "bytes", "duration", "timestamp", "type")},
}
"""The result types of functions and macros."""
BY_TYPE = {"contains": 2, "endsWith": 2, "size": 1, "startsWith": 2}
"""Functions that only fail because of their arguments' types, with the number of arguments, receiver included."""
COMPARISONS = frozenset(("==", "!=", "<", "<=", ">", ">=", "in"))
TAKES = {
    "duration": "a duration such as '90s' or '1h30m'",
    "int": "an integer",
    "uint": "an integer from 0",
    "double": "a number",
}
ARGUMENTS: Mapping[str, tuple[object, ...]] = {
    "date": ("2026-01-02T03:04:05Z", "%Y", "UTC"),
    "join": (["a"], ","),
    "money": (1, "EUR"),
    "replace": ("a", "a", "a"),
    "split": ("a", "a"),
    "substring": ("a" * MAX_RESULT, 0, MAX_RESULT),
    "truncate": ("a", 1),
}
"""Arguments that our functions accept, to be tried together with a constant one."""
OF_TYPE: Mapping[str, object] = {"string": "a", "bool": True, "list": [], "map": {}, "null": None}
"""Sample arguments of `format` by type. For other and unknown types, it is a number."""


def evaluated(text: str) -> object:
    """Evaluate a constant expression. The result must not be modified. Raises ExpressionError."""
    return (_evaluated.__wrapped__ if hides_values() else _evaluated)(text)


@lru_cache(maxsize=8)  # for the operations around it: results are up to 1 MiB each, and may be of strangers' rules
def _evaluated(text: str) -> object:
    return Expression(text).evaluate(EventView(source="", headers=(), query="", body=b""))


def failure(function: str, values: Sequence[object]) -> str:
    """Return why one of our functions refuses these values; "" if it accepts them."""
    try:
        FUNCTIONS[function].call(*values)
    except ExpressionError as error:
        return str(error)
    except (ArithmeticError, LookupError, TypeError, ValueError):
        return "expected another value"
    return ""


_OF_TIMES = {
    ("+", "timestamp", "duration"): "timestamp",
    ("+", "duration", "timestamp"): "timestamp",
    ("-", "timestamp", "duration"): "timestamp",
    ("-", "timestamp", "timestamp"): "duration",
    ("+", "duration", "duration"): "duration",
    ("-", "duration", "duration"): "duration",
    ("+", "bytes", "bytes"): "bytes",
}


@lru_cache(maxsize=2048)
def type_of(sign: str, left: str, right: str) -> str | None:
    """Return the result type of an operator; ANY if it isn't known, None if it doesn't accept these operands."""
    try:
        value = evaluated(f"{_SAMPLES[left]} {sign} {_SAMPLES[right]}")
    except ExpressionError:
        return None
    if sign in COMPARISONS:
        return "bool"
    if left == right and left in ("int", "uint", "double", "string", "list"):
        return left
    return _OF_TIMES.get((sign, left, right), "double" if isinstance(value, float) else ANY)


@lru_cache(maxsize=2048)
def takes(function: str, types: tuple[str, ...]) -> bool:
    """Return whether a function of CEL accepts arguments of these types, where ANY stands for each of them.

    There are as many arguments as `BY_TYPE` says. Trying more would take exponentially longer.
    """
    return len(types) == BY_TYPE[function] and any(_accepts(function, each) for each in product(*map(_samples, types)))


def _samples(kind: str) -> Iterator[str]:
    yield from _SAMPLES.values() if kind == ANY else (_SAMPLES[kind],)


def _accepts(function: str, arguments: Sequence[str]) -> bool:
    texts = [f"{function}({', '.join(arguments)})"]
    if len(arguments) > 1 or function == "size":
        texts.append(f"{arguments[0]}.{function}({', '.join(arguments[1:])})")
    for text in texts:
        try:
            evaluated(text)
        except ExpressionError:
            continue
        return True
    return False
