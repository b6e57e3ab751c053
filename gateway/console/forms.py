"""What a form of a page sends, and whether it is a form of ours.

A form has a token that belongs to a cookie and to who was shown the page. A page of another site sees neither, and its
requests come without the cookie. Nothing of it is kept here: any process of the gateway can tell.
"""

import asyncio
import hmac
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, TypeVar
from urllib.parse import unquote_to_bytes

from aiohttp import web

from gateway.access.principal import Principal
from gateway.api.acts import Sent
from gateway.api.json_shapes import ShapeError, read_shape
from gateway.api.problems import ApiError, Code
from gateway.turns import give_way

Fields = Mapping[str, Sequence[str]]
Aside = Callable[[Callable[[], Fields]], Coroutine[Any, Any, Fields]]
"""Does something in a thread that gives way to the event loop."""
S = TypeVar("S")
SESSION = "session"
"""The cookie that tokens belong to: random, and of no use by itself."""
MOST_BYTES = 64 << 10
"""Of a form: the ids of 400 dead letters, and a reason."""
MOST_FIELDS = 400
PIECE = 8 << 10
"""Bytes of a field that are decoded before the event loop has its turn: a millisecond, if each is an escape."""
SECONDS = 10.0
FORM = "application/x-www-form-urlencoded"


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """The fields of a form, and how it came."""

    fields: Fields
    origin: str = ""

    def text(self, name: str) -> str:
        return next(iter(self.fields.get(name, ())), "")

    def all(self, name: str) -> tuple[str, ...]:
        return tuple(self.fields.get(name, ()))

    @property
    def reason(self) -> str | None:
        """The reason that a person gave for an act; None if they gave none."""
        return self.text("reason").strip()[:500] or None

    @property
    def sent(self) -> Sent:
        """How a command came: a form that is sent twice is one command."""
        key = self.text("key")
        return Sent(key if 0 < len(key) <= 64 and key.isascii() and key.isalnum() else None, self.origin)  # noqa: PLR2004 - ours has 32


async def form_of(
    request: web.Request, *, most: int | None = None, seconds: float | None = None, aside: Aside | None = None
) -> Form:
    """Read a form, so much of it and for so long; one that may be large is decoded `aside`. Raises ApiError."""
    most, seconds = most or MOST_BYTES, seconds or SECONDS
    if request.content_type != FORM:
        raise ApiError(Code.UNSUPPORTED_MEDIA_TYPE, f"expected a form ({FORM})")
    if "Content-Encoding" in request.headers:
        raise ApiError(Code.UNSUPPORTED_MEDIA_TYPE, "expected a form without a Content-Encoding, got one with it")
    read = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for piece in request.content.iter_any():
                read += piece
                if len(read) > most:
                    raise ApiError(Code.TOO_LARGE, f"expected a form of at most {most} bytes")
    except TimeoutError:
        raise ApiError(Code.INVALID_REQUEST, f"expected the form within {seconds:g} s") from None
    encoded = bytes(read)
    if encoded.count(b"&") >= MOST_FIELDS or not encoded.isascii():
        raise ApiError(Code.INVALID_REQUEST, f"expected a form of at most {MOST_FIELDS} fields")
    fields = _decoded(encoded) if aside is None else await aside(lambda: _decoded(encoded))
    return Form(fields=fields, origin=request.remote or "")


def _decoded(form: bytes) -> Fields:
    """Return the fields of a form by name (WHATWG URL Standard, application/x-www-form-urlencoded)."""
    fields: dict[str, list[str]] = {}
    for field in form.split(b"&"):
        name, _, value = field.partition(b"=")
        if field:
            fields.setdefault(_text(name), []).append(_text(value))
    return fields


def _text(encoded: bytes) -> str:
    begin, pieces = 0, list[bytes]()
    while begin < len(encoded):
        give_way()
        end = begin + PIECE
        if (escape := encoded.rfind(b"%", end - 2, end)) >= 0:  # it ends in the next piece
            end = escape
        pieces.append(unquote_to_bytes(encoded[begin:end].replace(b"+", b" ")))
        begin = end
    return b"".join(pieces).decode("utf-8", "replace")


def asked(shape: type[S], document: Mapping[str, object]) -> S:
    """Return what a form asks of the API, within the limits that the API has. Raises ApiError."""
    try:
        return read_shape(shape, document)
    except ShapeError as error:
        problems = [line.removeprefix("body.") for line in error.problems]
        raise ApiError(Code.INVALID_REQUEST, "\n".join(problems)) from error


def token_of(session: str, principal: Principal) -> str:
    """Return the token of forms that are shown to somebody."""
    who = f"{principal.via}\0{principal.name}\0{principal.role}".encode("utf-8", "surrogatepass")
    return hmac.new(session.encode("utf-8", "surrogatepass"), who, sha256).hexdigest()


def require_own_form(form: Form, session: str, principal: Principal) -> None:
    """Raise ApiError for a form that no page of ours has shown to this principal."""
    if not session or not hmac.compare_digest(form.text("token").encode(), token_of(session, principal).encode()):
        raise ApiError(Code.FORBIDDEN, "this form isn't of a page that you were shown: load the page again")
