"""Splits a request with several events into their bodies, each the bytes that came.

JSON is scanned by the standard library, which tells where a value ends: parsing and writing it anew would change
numbers and spelling.
"""

import json
import re
from collections.abc import Sequence
from json.decoder import scanstring  # type: ignore[attr-defined] # part of the library's own decoder, in C

from gateway.model import RefusedError

MAX_EVENTS = 1000  # of one request; each is a record of its own
_SPACE = re.compile(r"[ \t\n\r]*")
_decode = json.JSONDecoder().raw_decode


def split(body: bytes, path: Sequence[str]) -> list[bytes] | None:
    """Return the items of the list at a path of the JSON body; None if there is no list, so that it is one event.

    Raises RefusedError (400) for a body that isn't JSON, an empty list, and for more than MAX_EVENTS.
    """
    try:
        text = body.decode("utf-8")
        at = _SPACE.match(text, 0).end()  # type: ignore[union-attr] # it matches nothing, too
        for name in path:
            found = _member(text, at, name)
            if found is None:
                return None
            at = found
        if text[at : at + 1] != "[":
            _decode(text, at)
            return None
        items = _items(text, at)
    except (ValueError, RecursionError, IndexError) as error:
        raise RefusedError(400, "malformed_batch", "expected a JSON body, which is to be split, got another") from error
    if not items:
        raise RefusedError(400, "malformed_batch", "expected a list with an event, got an empty one")
    return items


def _member(text: str, at: int, name: str) -> int | None:
    """Return where the value of an object's last member of that name begins; None if there is no such member."""
    if text[at : at + 1] != "{":
        return None
    found, at = None, _skip(text, at + 1)
    while text[at] != "}":
        if text[at] != '"':
            raise ValueError("expected a member's name")
        key, at = scanstring(text, at + 1, True)  # noqa: FBT003 - positional in C
        at = _skip(text, at)
        if text[at] != ":":
            raise ValueError("expected a colon")
        at = _skip(text, at + 1)
        if key == name:
            found = at
        at = _after(text, at, "}")
    return found


def _items(text: str, at: int) -> list[bytes]:
    items: list[bytes] = []
    at = _skip(text, at + 1)
    while text[at] != "]":
        if len(items) == MAX_EVENTS:
            raise RefusedError(413, "batch_too_large", f"expected at most {MAX_EVENTS} events, got more")
        _, end = _decode(text, at)
        items.append(text[at:end].encode())
        at = _after(text, at, "]", end)
    return items


def _after(text: str, at: int, closing: str, end: int | None = None) -> int:
    """Return where the next member or item begins, or where the closing bracket is."""
    if end is None:
        _, end = _decode(text, at)
    at = _skip(text, end)
    if text[at] == ",":
        at = _skip(text, at + 1)
        if text[at] == closing:
            raise ValueError("expected another after a comma")
        return at
    if text[at] != closing:
        raise ValueError("expected a comma or the end")
    return at


def _skip(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return at if found is None else found.end()
