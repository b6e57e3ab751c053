"""Shapes: frozen dataclasses that are written as JSON, read from it, and described by JSON Schema. Pure.

One declaration is all three, so that what is documented can't differ from what is sent. A field's type is one of

    str, int, float, bool, X | None, a StrEnum, a Literal of strings, tuple[X, ...], Mapping[str, X], a shape
    Annotated[X, Limits(…)]        with bounds and a description

A field with a default may be missing where a shape is read; in what is written, all are there. orjson writes them.
"""

import re
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from datetime import datetime
from enum import StrEnum
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from gateway.log.json_fields import LATEST
from gateway.model import NAME_PATTERN, GatewayError, shown

S = TypeVar("S")
MOST_PROBLEMS = 50
"""Told of one document: of a million mistakes, the first ones are enough."""
SCHEMAS = "#/components/schemas/"
"""Where the document of the API has the schemas of shapes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a value has to be beyond its type, and what it is. Lengths are in characters, or items of a list."""

    about: str = ""
    form: str = ""
    """`format` of JSON Schema: date-time, byte."""
    pattern: str = ""
    """A regular expression of ASCII that all of it has to match, with its anchors."""
    longest: int | None = None
    minimum: float | None = None
    maximum: float | None = None


Time = Annotated[str, Limits(form="date-time")]
"""RFC 3339, in UTC, with milliseconds."""

NAME = Limits(
    about="a name as rules have it, of lower-case letters, digits, '.', '_' and '-'",
    pattern=f"^{NAME_PATTERN.pattern}$",
    longest=63,
)


class ShapeError(GatewayError):
    """The document is at fault. `problems` has a line for each of the first things that are wrong, with where."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems


class Problems:
    """What is wrong with a document, up to so many problems; the one beyond them ends the reading."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def __len__(self) -> int:
        return len(self._lines)

    def add(self, *lines: str) -> None:
        """Note problems. Raises ShapeError with all of them if these are too many."""
        for line in lines:
            if len(self._lines) == MOST_PROBLEMS:
                raise ShapeError([*self._lines, "and more"])
            self._lines.append(line)

    def end(self) -> None:
        """Raise ShapeError if there are any."""
        if self._lines:
            raise ShapeError(self._lines)


def schema_of(kind: Any) -> dict[str, Any]:  # noqa: ANN401, PLR0911 - any type, each with an end
    """Return the JSON Schema of a type: of a shape, a reference to it."""
    if isinstance(kind, type) and is_dataclass(kind):
        return {"$ref": f"{SCHEMAS}{_name(kind)}"}
    if kind in _PLAIN:
        return {"type": _PLAIN[kind]}
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return {"type": "string", "enum": list(map(str, kind))}
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return schema_of(arguments[0]) | _bounds(arguments[1], arguments[0])
    if origin in (Union, types.UnionType):
        return _or_null([schema_of(each) for each in arguments if each is not types.NoneType])
    if origin is Literal:
        return {"type": "string", "enum": list(arguments)}
    if origin is tuple:
        return {"type": "array", "items": schema_of(arguments[0])}
    if kind is Any:
        return {}
    return {"type": "object", "additionalProperties": schema_of(arguments[1])}


_PLAIN: Mapping[Any, str] = {str: "string", int: "integer", float: "number", bool: "boolean"}


def _name(shape: Any) -> str:  # noqa: ANN401 - a dataclass
    name: str = shape.__name__
    return name


def _bounds(limits: Limits, kind: Any) -> dict[str, Any]:  # noqa: ANN401 - any type
    is_list = get_origin(kind) is tuple
    found = {
        "description": limits.about or None,
        "format": limits.form or None,
        "pattern": limits.pattern or None,
        "maxItems" if is_list else "maxLength": limits.longest,
        "minimum": limits.minimum,
        "maximum": limits.maximum,
    }
    return {name: value for name, value in found.items() if value is not None}


def _or_null(schemas: list[dict[str, Any]]) -> dict[str, Any]:
    only = schemas[0]
    if len(schemas) == 1 and "type" in only and "enum" not in only:
        return {**only, "type": [only["type"], "null"]}
    return {"anyOf": [*schemas, {"type": "null"}]}


def object_schema(shape: Any, *, is_read: bool) -> dict[str, Any]:  # noqa: ANN401 - a dataclass
    """Return the JSON Schema of a shape itself; of one that `is_read`, other fields are refused."""
    hints = _hints(shape)
    schema: dict[str, Any] = {"type": "object", "description": " ".join((shape.__doc__ or "").split())}
    schema["properties"] = {field.name: schema_of(hints[field.name]) for field in fields(shape)}
    required = [field.name for field in fields(shape) if not (is_read and _has_default(field))]
    if required:
        schema["required"] = required
    if is_read:
        schema["additionalProperties"] = False
    return schema


def shapes_in(kind: Any) -> Iterator[Any]:  # noqa: ANN401 - any type
    """Yield the shapes that a type is made of, itself included, each perhaps several times."""
    parts: Iterable[Any] = get_args(kind)
    if isinstance(kind, type) and is_dataclass(kind):
        yield kind
        parts = get_type_hints(kind, include_extras=True).values()
    for each in parts:
        yield from shapes_in(each)


@cache
def _hints(shape: Any) -> Mapping[str, Any]:  # noqa: ANN401 - a dataclass
    return get_type_hints(shape, include_extras=True)


def _has_default(field: Field[Any]) -> bool:
    return field.default is not MISSING or field.default_factory is not MISSING


def read_shape(shape: type[S], document: object) -> S:
    """Return a shape with the values of a JSON document. Raises ShapeError with all that is wrong."""
    problems = Problems()
    found = _read(shape, document, "body", problems)
    problems.end()
    assert isinstance(found, shape)
    return found


def read_value(kind: Any, value: object, where: str) -> Any:  # noqa: ANN401 - any type
    """Return a value of a type as JSON has it. Raises ShapeError."""
    problems = Problems()
    found = _read(kind, value, where, problems)
    problems.end()
    return found


def _read(kind: Any, value: object, where: str, problems: Problems) -> Any:  # noqa: ANN401, PLR0911 - any type, each with an end
    if isinstance(kind, type) and is_dataclass(kind):
        return _read_object(kind, value, where, problems)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _read_limited(arguments[0], arguments[1], value, where, problems)
    if origin in (Union, types.UnionType):
        if value is None:
            return None
        return _read(next(each for each in arguments if each is not types.NoneType), value, where, problems)
    if origin is tuple:
        if not isinstance(value, list):
            problems.add(f"{where}: expected a list, got {shown(value)}")
            return ()
        return tuple([_read(arguments[0], each, f"{where}[{index}]", problems) for index, each in enumerate(value)])
    if origin is Mapping:
        if not isinstance(value, dict):
            problems.add(f"{where}: expected an object, got {shown(value)}")
            return {}
        return {name: _read(arguments[1], each, f"{where}.{name[:60]}", problems) for name, each in value.items()}
    return _read_scalar(kind, value, where, problems)


def _read_limited(kind: Any, limits: Limits, value: object, where: str, problems: Problems) -> Any:  # noqa: ANN401 - any type
    if expected := _too_long(limits, kind, value):  # before anything else of it is looked at
        problems.add(f"{where}: expected {expected}")
        return None
    before = len(problems)
    found = _read(kind, value, where, problems)
    if len(problems) == before and (expected := _beyond(limits, found)):
        problems.add(f"{where}: expected {expected}")
    return found


def _read_scalar(kind: Any, value: Any, where: str, problems: Problems) -> Any:  # noqa: ANN401 - any type
    choices = list(get_args(kind)) if get_origin(kind) is Literal else None
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        choices = list(map(str, kind))
    if choices is not None:
        if isinstance(value, str) and value in choices:
            return kind(value) if isinstance(kind, type) else value
        problems.add(f"{where}: expected one of {', '.join(choices)}, got {shown(value)}")
        return None
    if kind is float and type(value) in (int, float) and abs(value) <= _SAFE:
        return float(value)
    if kind is int and type(value) is float and value.is_integer():
        value = int(value)  # JSON has no integers of its own: 1.0 is one
    if kind is not float and type(value) is kind and not (kind is int and abs(value) > _SAFE):
        return value
    problems.add(f"{where}: expected {_TOLD[kind]}, got {shown(value)}")
    return None


_SAFE = 1 << 53
"""Up to which any JSON parser has each integer exactly."""
_TOLD: Mapping[Any, str] = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}


def _read_object(shape: Any, value: object, where: str, problems: Problems) -> Any:  # noqa: ANN401 - a dataclass
    if not isinstance(value, dict):
        problems.add(f"{where}: expected an object, got {shown(value)}")
        return None
    known = {field.name: field for field in fields(shape)}
    for name in value:
        if name not in known:
            problems.add(f"{where}.{name[:60]}: unknown name; expected one of {', '.join(known)}")
    before, hints = len(problems), _hints(shape)
    given: dict[str, Any] = {}
    for name, field in known.items():
        if name in value:
            given[name] = _read(hints[name], value[name], f"{where}.{name}", problems)
        elif not _has_default(field):
            problems.add(f"{where}.{name}: expected a value, got none")
    return shape(**given) if len(problems) == before and not given.keys() - known.keys() else None


def _too_long(limits: Limits, kind: Any, value: object) -> str:  # noqa: ANN401 - any type
    """Return what was expected of a list or text that is too long, "" if it isn't, or isn't what it should be."""
    is_list = get_origin(kind) is tuple
    if limits.longest is None or not isinstance(value, list if is_list else str) or len(value) <= limits.longest:
        return ""
    return f"at most {limits.longest} {'items' if is_list else 'characters'}, got {len(value)}"


def _beyond(limits: Limits, value: Any) -> str:  # noqa: ANN401 - any type
    """Return what was expected of a value that is beyond its limits, "" if it isn't."""
    if value is None:
        return ""
    # Not `search`: there `$` fits before a newline at the end, too, which JSON Schema doesn't have.
    if limits.pattern and not re.fullmatch(limits.pattern, value, re.ASCII):
        return f"{limits.about or 'what is as ' + limits.pattern}, got {shown(value)}"
    if limits.form == "date-time" and time_of(value) is None:
        return f"a time as 2026-11-30T20:00:00Z, got {shown(value)}"
    if (limits.minimum is not None and value < limits.minimum) or (
        limits.maximum is not None and value > limits.maximum
    ):
        top = "" if limits.maximum is None else f" to {limits.maximum:g}"
        return f"a number from {limits.minimum or 0:g}{top}, got {value:g}"
    return ""


def time_of(text: str) -> float | None:
    """Return a time of RFC 3339 in Unix seconds, None if it is none, or before 1970 or after 9999."""
    if not _TIME.fullmatch(text):
        return None
    try:
        at = datetime.fromisoformat(text.upper()).timestamp()
    except ValueError:
        return None
    return at if 0 <= at < LATEST else None


_TIME = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?([Zz]|[+-][0-9]{2}:[0-9]{2})"
)
