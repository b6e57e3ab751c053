"""Reads JSON as rules see it, and half surrogate pairs, which are JSON but no text."""

import json
import re

import orjson

from gateway.bodies.codings import MAX_CONTENT

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SURROGATES = re.compile(
    rb"\\(?<!\\\\)(?:\\\\)*+u(?:[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|([dD][89a-fA-F][0-9a-fA-F]{2}))"
)
"""An escaped surrogate pair, or half of one (1), with all backslashes before it: 80 ms of 1 MB, at most."""


def read_json(content: bytes | str) -> object:
    r"""Return a value. Half a surrogate pair is read as its escape, `\ud83d`; integers beyond 64 bits as floats.

    Languages whose strings are UTF-16 write such a half when they cut a string (RFC 8259 §8.2). Its escape, unlike
    U+FFFD, differs from that of another half. Raises ValueError, also for a half in more than MAX_CONTENT.
    """
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    data = data.removeprefix(BYTE_ORDER_MARK)
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError:
        if len(data) > MAX_CONTENT:
            raise
        escaped = _SURROGATES.sub(_with_half_escaped, data)
        if escaped == data:
            raise
        return orjson.loads(escaped)


def _with_half_escaped(found: re.Match[bytes]) -> bytes:
    return found[0] if found[1] is None else b"\\" + found[0]


def read_with_all_digits(content: bytes) -> object:
    """Return a value with integers beyond 64 bits as they are, which takes ten times as long.

    Raises ValueError, and RecursionError for what is nested too deep.
    """
    return json.loads(content.removeprefix(BYTE_ORDER_MARK))
