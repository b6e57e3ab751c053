"""Forms, URL-encoded (https://url.spec.whatwg.org/#urlencoded-parsing) and multipart (RFC 7578), as JSON has them."""

import re
from collections.abc import Iterable
from typing import Any
from urllib.parse import unquote, unquote_to_bytes

from gateway.bodies.codings import excessive, malformed
from gateway.bodies.json_text import read_json
from gateway.bodies.media_types import media_type, parameters

MAX_FIELDS = 10_000  # of a URL-encoded form
MAX_PARTS = 1000  # of a multipart form, each with a head of its own
MAX_PART_HEAD = 8 * 1024  # bytes
MAX_PART_LINES = 20  # of its head
PIECE = 1 << 16
"""Bytes of a value that are decoded at a time: for each escape, Python keeps a hundred."""
MAX_BOUNDARY = 70  # characters, RFC 2046 §5.1.1
JSON_FIELDS = frozenset(
    (
        "payload",  # GitHub, Slack's interactions
        "mandrill_events",  # Mailchimp Transactional
        *("envelope", "charsets", "attachment-info"),  # SendGrid Inbound Parse
        "message-headers",  # Mailgun's routes
    )
)
"""Fields that hold JSON by their vendors' documents. Of any other, whoever wrote its text would choose its type."""
_CHARSETS = {
    "utf-8": "utf-8",
    "utf8": "utf-8",
    "us-ascii": "ascii",
    "iso-8859-1": "latin-1",
    "windows-1252": "cp1252",
}


def read_form(content: bytes) -> dict[str, Any]:
    """Return the fields of a URL-encoded form, as `gathered`. Bytes that aren't UTF-8 are replaced.

    Raises UnreadableBodyError (413) for more than MAX_FIELDS.
    """
    pairs = form_pairs(content, MAX_FIELDS)
    texts = [(name.decode("utf-8", "replace"), value.decode("utf-8", "replace")) for name, value in pairs]
    return gathered([(name, _valued(name, text)) for name, text in texts])


def form_pairs(content: bytes, most: int) -> list[tuple[bytes, bytes]]:
    """Return the names and values of a URL-encoded form, decoded, in order.

    Raises UnreadableBodyError (413) for more than `most`.
    """
    if content.count(b"&") >= most:
        raise excessive(f"expected a form of at most {most} fields, got more")
    pairs = [pair.partition(b"=") for pair in content.split(b"&") if pair]
    return [(_unquoted(name), _unquoted(value)) for name, _, value in pairs]


def read_multipart(
    content: bytes, content_type: str, *, most: int = MAX_PARTS, as_text: bool = False
) -> dict[str, Any]:
    """Return the fields of a multipart form, as `gathered`; what comes before and after them is ignored.

    A part is its text, one of type `application/json` its value, and a file a mapping with its `filename`,
    `content_type` (in lower case, without parameters) and `size` in bytes; with `as_text`, JSON is text, too. Raises
    UnreadableBodyError: 413 for more than `most` parts, 400 for a form that is cut off, for lines that end in no CRLF,
    and a part without a name.
    """
    if media_type(content_type) != "multipart/form-data":
        raise malformed("expected multipart/form-data, as no other multipart type is read, got something else")
    delimiter = b"\r\n--" + _boundary(content_type)
    _, *pieces = (b"\r\n" + content).split(delimiter, most + 2)
    if len(pieces) > most + 1:
        raise excessive(f"expected a form of at most {most} parts, got more")
    if not pieces or re.match(rb"--[ \t]*(?:\r\n|\Z)", pieces[-1]) is None:
        raise malformed("expected a multipart form up to its last boundary, got only part of one")
    return gathered([_part(piece.lstrip(b" \t"), as_text) for piece in pieces[:-1]])


def gathered(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Return pairs as a mapping: a name that is there once has its value, another the list of its values, in order."""
    values: dict[str, Any] = {}
    repeated = set()
    for name, value in pairs:
        if name not in values:
            values[name] = value
        elif name in repeated:
            values[name].append(value)
        else:
            values[name] = [values[name], value]
            repeated.add(name)
    return values


def charset_of(name: str) -> str | None:
    """Return Python's name of an encoding that is read, None for any other. None of them takes long, or fails oddly."""
    return _CHARSETS.get(name.strip().lower())


def _unquoted(text: bytes) -> bytes:
    text = text.replace(b"+", b" ")
    if len(text) <= PIECE:
        return unquote_to_bytes(text)
    pieces, at = [], 0
    while at < len(text):
        end = at + PIECE
        if end < len(text) and (cut := text.rfind(b"%", end - 2, end)) >= 0:  # not within an escape
            end = cut
        pieces.append(unquote_to_bytes(text[at:end]))
        at = end
    return b"".join(pieces)


def _boundary(content_type: str) -> bytes:
    try:
        boundary = parameters(content_type).get("boundary", "")
    except ValueError:
        boundary = ""
    if not 0 < len(boundary) <= MAX_BOUNDARY or not boundary.isascii() or not boundary.isprintable():
        raise malformed("expected a multipart form with its boundary in Content-Type, got one without")
    return boundary.encode("ascii")


def _part(piece: bytes, as_text: bool) -> tuple[str, Any]:  # noqa: FBT001 - of `read_multipart`
    """Read a part, which begins with the end of its boundary's line. Raises UnreadableBodyError (400)."""
    head, blank, value = piece.partition(b"\r\n\r\n")
    if not blank or not piece.startswith(b"\r\n") or len(head) > MAX_PART_HEAD or head.count(b"\r\n") > MAX_PART_LINES:
        raise malformed("expected parts with a head of their own, got something else")
    fields: dict[str, str] = {}
    for line in re.sub(r"\r\n[ \t]+", " ", head.decode("utf-8", "replace")).split("\r\n"):
        field, _, text = line.partition(":")
        fields.setdefault(field.strip().lower(), text.strip())
    content_type = fields.get("content-type", "")
    try:
        disposition = parameters(fields.get("content-disposition", ""))
        charset = charset_of(parameters(content_type).get("charset", "utf-8")) if content_type else "utf-8"
    except ValueError as error:
        raise malformed("expected parts with their parameters in their heads, got others") from error
    if media_type(fields.get("content-disposition", "")) != "form-data" or "name" not in disposition:
        raise malformed("expected parts that are fields of a form, each with a name, got something else")
    name = _unescaped(disposition["name"])
    filename = disposition.get("filename", disposition.get("filename*"))
    if filename is not None:
        if "filename" not in disposition:  # RFC 7578 forbids it, and libraries send it: UTF-8''na%C3%AFve.txt
            filename = unquote(filename.rpartition("'")[2])
        kind = media_type(content_type) or "text/plain"  # RFC 7578 §4.4
        return name, {"filename": _unescaped(filename), "content_type": kind, "size": len(value)}
    text = value.decode(charset or "utf-8", "replace")
    if as_text:
        return name, text
    if media_type(content_type) == "application/json":
        return name, _loaded(value, text)
    return name, _valued(name, text)


def _valued(name: str, text: str) -> Any:  # noqa: ANN401 - any JSON
    """Return the JSON object or list that a field holds by its vendor's document, and any other text itself."""
    return _loaded(text, text) if name in JSON_FIELDS and text.lstrip()[:1] in ("{", "[") else text


def _loaded(value: str | bytes, text: str) -> Any:  # noqa: ANN401 - any JSON
    try:
        return read_json(value)
    except ValueError:
        return text


def _unescaped(name: str) -> str:
    """Undo what browsers do to a name: https://html.spec.whatwg.org/#multipart-form-data."""
    return name.replace("%0D", "\r").replace("%0A", "\n").replace("%22", '"')
