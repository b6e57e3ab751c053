"""The beginning of a response that is no success, for the record of its attempt: without credentials, and bounded.

Our own credentials are masked wherever they are (`masking.py`), the destination's by the names of its headers. A body
is decoded first, since a credential can't be seen in a compressed one; where that isn't possible, none is kept.
"""

import re
import zlib
from collections.abc import Sequence

from gateway.client.http1 import RESPONSE_LIMIT, ResponseReader
from gateway.client.masking import MASK, Mask
from gateway.model import BODY_EXCERPT, HEADERS_EXCERPT, Headers, ResponseExcerpt

_CREDENTIALS = re.compile(rb"auth|cookie|credential|passw|secret|session|signature|token|api-?key")
"""Found in the lower-case name of a header whose value may be a credential, or says how to get one."""
_NAME = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110 §5.6.2: a token
_CONTROL = bytes((*range(9), *range(10, 32), 127))  # RFC 9110 §5.5
_WITHOUT_CONTROL = bytes.maketrans(_CONTROL, b" " * len(_CONTROL))
_GZIP_OR_ZLIB = 32 + zlib.MAX_WBITS


def excerpt_of(response: ResponseReader, mask: Mask) -> ResponseExcerpt:
    """Return the beginning of a response, as it may be kept."""
    headers, are_headers_cut = _headers(response.header_lines, mask)
    body, is_whole = _decoded(response)
    reach = BODY_EXCERPT + mask.longest  # of what follows nothing can begin in the excerpt
    if len(body) > reach:
        body, is_whole = body[:reach], False
    body = mask.masked(body) if is_whole else mask.masked_beginning(body)
    return ResponseExcerpt(
        headers=headers,
        are_headers_cut=are_headers_cut,
        body=body[:BODY_EXCERPT],
        is_body_cut=not is_whole or len(body) > BODY_EXCERPT,
    )


def _headers(lines: Sequence[bytes], mask: Mask) -> tuple[Headers, bool]:
    """Return the header pairs, and whether any were omitted: what is malformed, and what exceeds the limit."""
    pairs: list[tuple[bytes, bytes]] = []
    left = HEADERS_EXCERPT
    for line in lines:
        name, _, value = line.partition(b":")
        if not _NAME.fullmatch(name):
            continue
        value = value.strip().translate(_WITHOUT_CONTROL)
        lower = name.lower()
        if _CREDENTIALS.search(lower):
            value = MASK
        elif lower == b"location":  # a query may have a token that the destination made
            address, question_mark, _ = value.partition(b"?")
            value = address + question_mark + (MASK if question_mark else b"")
        value = mask.masked(value)
        left -= len(name) + len(value) + len(b": \r\n")
        if left < 0:
            break
        pairs.append((name, value))
    return tuple(pairs), len(pairs) < len(lines)


def _decoded(response: ResponseReader) -> tuple[bytes, bool]:
    """Return what was read of a body, without its coding, and whether that is all of it."""
    body, is_whole = response.body, True
    if body is None:
        body, is_whole = bytes(response.kept or b"")[:RESPONSE_LIMIT], False
    match (response.header_list(b"content-encoding") or b"").lower():
        case _ if not body:
            return b"", is_whole
        case b"" | b"identity":
            return body[:RESPONSE_LIMIT], is_whole and len(body) <= RESPONSE_LIMIT
        case b"gzip" | b"x-gzip" | b"deflate":
            return _inflated(body)
        case _:
            return b"", False


def _inflated(body: bytes) -> tuple[bytes, bool]:
    inflater = zlib.decompressobj(_GZIP_OR_ZLIB)
    try:
        inflated = inflater.decompress(body, RESPONSE_LIMIT)
    except zlib.error:
        return b"", False
    return inflated, inflater.eof
