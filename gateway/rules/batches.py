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
    return JsonText(body).elements(path)


class JsonText:
    """A JSON body, in which lists are found: each object on their paths is looked through once.

    Raises RefusedError for a body that isn't one JSON value (400).
    """

    def __init__(self, body: bytes) -> None:
        try:
            self._text = body.removeprefix(BYTE_ORDER_MARK).decode("utf-8")
            json.loads(self._text)  # all of it: what comes after a list would be lost
        except (ValueError, RecursionError) as error:
            raise RefusedError(
                400, "malformed_batch", "expected a JSON body, which is to be split, got something else"
            ) from error
        self._members: dict[int, dict[str, int]] = {}

    def elements(self, path: Sequence[str]) -> list[bytes] | None:
        """Return the elements of the list at a path; None if there is no list.

        Raises RefusedError for more than MAX_EVENTS (413).
        """
        text = self._text
        at = _skip(text, 0)
        for name in path:
            at = self._members_at(at).get(name, -1) if text[at] == "{" else -1
            if at < 0:
                return None
        return _items(text, at) if text[at] == "[" else None

    def _members_at(self, at: int) -> dict[str, int]:
        """Return where the values of an object's members begin; of several with one name, the last one's."""
        found = self._members.get(at)
        if found is None:
            found = self._members[at] = _members(self._text, at)
        return found


def _members(text: str, at: int) -> dict[str, int]:
    found: dict[str, int] = {}
    at = _skip(text, at + 1)
    while text[at] != "}":
        key, at = scanstring(text, at + 1, True)  # noqa: FBT003 - positional in C
        found[key] = at = _skip(text, _skip(text, at) + 1)  # behind the colon
        at = _next(text, _decode(text, at)[1])
    return found


def _items(text: str, at: int) -> list[bytes]:
    items: list[bytes] = []
    at = _skip(text, at + 1)
    while text[at] != "]":
        if len(items) == MAX_EVENTS:
            raise RefusedError(413, "batch_too_large", f"expected at most {MAX_EVENTS} events, got more")
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
