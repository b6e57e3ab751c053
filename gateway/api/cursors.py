"""Cursors: where a list goes on, as text that means something to nobody else. Pure.

A cursor belongs to the list that it came with: with another query, it would skip what that one has.
"""

import hashlib
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Mapping
from typing import Any

import orjson

from gateway.api.problems import ApiError, Code

LONGEST = 32_000
"""Characters of a cursor: one says of each of 1,000 partitions where it goes on. A request's line may have 64 KiB."""


def encode_cursor(at: Mapping[str, Any], *, listing: tuple[object, ...]) -> str:
    """Return a cursor; `listing` is which list, with what was asked."""
    return urlsafe_b64encode(orjson.dumps([_digest(listing), at])).decode().rstrip("=")


def decode_cursor(text: str, *, listing: tuple[object, ...]) -> Mapping[str, Any]:
    """Return where a list goes on. Raises ApiError for a cursor that isn't of what is asked."""
    try:
        digest, at = orjson.loads(urlsafe_b64decode(text + "=" * (-len(text) % 4)))
    except (ValueError, TypeError):
        digest, at = "", None
    if digest != _digest(listing) or not isinstance(at, dict):
        raise ApiError(Code.INVALID_CURSOR, "cursor: expected the next_cursor of the same list")
    return at


def _digest(listing: tuple[object, ...]) -> str:
    return hashlib.blake2b(repr(listing).encode(errors="surrogatepass"), digest_size=6).hexdigest()


def whole(at: Mapping[str, Any], name: str) -> int:
    """Return a whole number of a cursor. Raises ApiError for anything else: anybody can make a cursor."""
    value = at.get(name)
    if type(value) is not int or not 0 <= value < 1 << 62:
        raise ApiError(Code.INVALID_CURSOR, "cursor: expected the next_cursor of the same list")
    return value
