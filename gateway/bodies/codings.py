"""Content codings (RFC 9110 §8.4): what a body is without its compression, never more than a limit of it."""

import zlib
from contextlib import suppress

from gateway.model import UnreadableBodyError

MAX_CONTENT = 2 << 20
"""Bytes to which a body may decompress: twice the limit of one that isn't compressed, and at worst 0.1 s to parse."""
MAX_CODINGS = 3
CONTENT_ENCODING = b"content-encoding"
ACCEPT_ENCODING = "gzip, deflate"
"""What a sender may use: its field in a response (RFC 9110 §12.5.3)."""
_KNOWN = frozenset(("gzip", "x-gzip", "deflate"))  # RFC 9110 §8.4.1
MAX_MEMBERS = 100
"""Of gzip (RFC 1952 §2.2), for each of which what follows it is copied."""


def codings(field: str) -> list[str]:
    """Return the codings of a Content-Encoding in lower case, in the order in which they were applied."""
    names = [name.strip().lower() for name in field.split(",")]
    return [name for name in names if name not in ("", "identity")]


def decompressed(body: bytes, field: str, limit: int = MAX_CONTENT) -> bytes:
    """Undo the codings that a Content-Encoding names, the last one first.

    Neither the result nor what all codings together are given to read is ever more than `limit` bytes, which bounds the
    time: 2 MiB of the worst data (the headers of empty blocks) take 0.15 s, of usual ones a tenth of that. Raises
    UnreadableBodyError: 415 for another coding, 413 for more than the limit, 400 for data that are none or are cut off.
    """
    names = codings(field)
    if len(names) > MAX_CODINGS:
        raise malformed(f"expected at most {MAX_CODINGS} content codings, got more")
    if any(name not in _KNOWN for name in names):
        # The name isn't shown: whoever sent it chose it.
        raise UnreadableBodyError(
            415, "content_coding", "expected gzip, deflate or no content coding, got something else"
        )
    left = limit
    for undone, name in enumerate(reversed(names), start=1):
        left -= len(body)
        body = _inflated(body, name, limit if undone == len(names) else max(left, 0), limit)
    return body


def malformed(detail: str) -> UnreadableBodyError:
    """Return the error of content that isn't what it says; `detail` fits into a line."""
    return UnreadableBodyError(400, "malformed_content", detail)


def excessive(detail: str) -> UnreadableBodyError:
    """Return the error of content of which there is more than is read."""
    return UnreadableBodyError(413, "content_too_large", detail)


def _inflated(body: bytes, name: str, most: int, limit: int) -> bytes:
    inflated = bytearray()
    rest = body
    with suppress(zlib.error):
        for _ in range(MAX_MEMBERS):
            if not rest:
                return bytes(inflated)
            inflater = zlib.decompressobj(_window(name, rest))
            inflated += inflater.decompress(rest, most + 1 - len(inflated))
            if len(inflated) > most:
                raise excessive(f"expected a body that decompresses to at most {limit} bytes, got more")
            rest = inflater.unused_data
            if not inflater.eof or (rest and name == "deflate"):
                break
    raise malformed(f"expected a whole body in {name}, got another, or only part of it")


def _window(name: str, body: bytes) -> int:
    """Return how zlib has to read it.

    By `deflate` some senders mean it without the header of RFC 1950, as RFC 9110 notes. No encoder begins that with
    bytes that could be such a header.
    """
    if name != "deflate":
        return 31
    return 15 if body[0] & 15 == zlib.DEFLATED and int.from_bytes(body[:2], "big") % 31 == 0 else -15
