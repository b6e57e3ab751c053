"""Reads JSON as rules see it, and half surrogate pairs, which are JSON but no text."""

import json
import re

import orjson

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SURROGATES = re.compile(
    rb"(?<!\\)((?:\\\\)*)"
    rb"(\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|\\u[dD][89a-fA-F][0-9a-fA-F]{2})"
)
"""An escaped surrogate pair, or half of one, after escaped backslashes."""
_HALF = len(rb"\ud83d")


def read_json(content: bytes | str) -> object:
    r"""Return a value. Half a surrogate pair is read as its escape, `\ud83d`; integers beyond 64 bits as floats.

    Languages whose strings are UTF-16 write such a half when they cut a string (RFC 8259 §8.2). Its escape, unlike
    U+FFFD, differs from that of another half. Raises ValueError.
    """
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    data = data.removeprefix(BYTE_ORDER_MARK)
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        escaped = _SURROGATES.sub(_with_half_escaped, data)
        if escaped == data:
            raise
        return orjson.loads(escaped)


def _with_half_escaped(found: re.Match[bytes]) -> bytes:
    return found[0] if len(found[2]) > _HALF else found[1] + b"\\" + found[2]


def read_with_all_digits(content: bytes) -> object:
    """Return a value with integers beyond 64 bits as they are, which takes ten times as long.

    Raises ValueError, and RecursionError for what is nested too deep.
    """
    return json.loads(content.removeprefix(BYTE_ORDER_MARK))
