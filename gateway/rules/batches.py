"""Splits a request with several events into their bodies, without changing their bytes.

The standard library's JSON scanner tells where a value ends. Parsing and serializing the values again would change
numbers and spelling.
"""

import json
import re
from collections.abc import Sequence
from json.decoder import scanstring  # type: ignore[attr-defined] # part of the library's own decoder, in C

from gateway.bodies.json_text import BYTE_ORDER_MARK
from gateway.model import RefusedError

MAX_EVENTS = 1000  # in one request; each is a separate record
_SPACE = re.compile(r"[ \t\n\r]*")
_decode = json.JSONDecoder().raw_decode


def split(body: bytes, path: Sequence[str]) -> list[bytes] | None:
    """Return the elements of the list at a path of the JSON body; None if there is no list: then it is one event.

    Raises RefusedError for a body that isn't one JSON value (400), and for more than MAX_EVENTS (413).
    """
    try:
        text = body.removeprefix(BYTE_ORDER_MARK).decode("utf-8")
        value = json.loads(text)  # all of it: what comes after a list would be lost
    except (ValueError, RecursionError) as error:
        raise RefusedError(
            400, "malformed_batch", "expected a JSON body, which is to be split, got something else"
        ) from error
    at = _skip(text, 0)
    for name in path:
        if not isinstance(value, dict) or name not in value:
            return None
        value = value[name]
        at = _member(text, at, name)
    if not isinstance(value, list):
        return None
    if len(value) > MAX_EVENTS:
        raise RefusedError(413, "batch_too_large", f"expected at most {MAX_EVENTS} events, got more")
    return _items(text, at, len(value))


def _member(text: str, at: int, name: str) -> int:
    """Return where the value of a member of an object begins; of several with this name, the last one's."""
    found, at = at, _skip(text, at + 1)
    while text[at] != "}":
        key, at = scanstring(text, at + 1, True)  # noqa: FBT003 - positional in C
        at = _skip(text, _skip(text, at) + 1)  # a colon
        if key == name:
            found = at
        at = _next(text, _decode(text, at)[1])
    return found


def _items(text: str, at: int, count: int) -> list[bytes]:
    items: list[bytes] = []
    at = _skip(text, at + 1)
    for _ in range(count):
        _, end = _decode(text, at)
        items.append(text[at:end].encode())
        at = _next(text, end)
    return items


def _next(text: str, end: int) -> int:
    """Return the position of the next member or element, or of the closing bracket."""
    at = _skip(text, end)
    return _skip(text, at + 1) if text[at] == "," else at


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return at if found is None else found.end()
