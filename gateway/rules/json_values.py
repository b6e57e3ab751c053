"""Converts CEL's values to JSON: for templates, for the function `json`, and their types for messages."""

import base64
import math
from datetime import datetime, timedelta

import orjson

from gateway.model import ExpressionError


def as_json(value: object) -> object:
    """Convert a CEL result to JSON's types by CEL's JSON mapping, with sorted keys.

    Raises ValueError for a value that JSON can't represent, and for two keys that are the same in JSON, such as 1 and
    '1'.
    """
    if value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    match value:
        case list():
            return [as_json(item) for item in value]
        case dict():
            # CEL's mappings are unordered, and two attempts should send the same bytes.
            items = {key if isinstance(key, str) else as_text(key): item for key, item in value.items()}
            if len(items) < len(value):
                raise ValueError("expected keys that differ in JSON")
            return {key: as_json(items[key]) for key in sorted(items)}
        case datetime():
            return value.isoformat().replace("+00:00", "Z")
        case timedelta():
            return _seconds(value)
        case bytes():
            return base64.b64encode(value).decode()
        case _:
            raise ValueError(f"expected a JSON value, got {value}")


def _seconds(duration: timedelta) -> str:
    """Return decimal seconds, exactly: `1.5s`, `-0.000001s`."""
    sign = "-" if duration < timedelta() else ""
    whole, micros = divmod(abs(duration) // timedelta(microseconds=1), 1_000_000)
    fraction = f".{micros:06}".rstrip("0") if micros else ""
    return f"{sign}{whole}{fraction}s"


def as_text(value: object) -> str:
    return value if isinstance(value, str) else dumps(value).decode()


def dumps(value: object) -> bytes:
    try:
        return orjson.dumps(value)
    except TypeError as error:
        raise ExpressionError(f"expected a JSON value: {error}") from error


def json_type(value: object) -> str:
    """Return a value's type for a message, since an event's values mustn't be logged."""
    names = {str: "a string", bool: "a boolean", list: "a list", dict: "a mapping", type(None): "null"}
    return names.get(type(value), "a number")
