"""Responses to senders: a 202 with the event's id, or a problem (RFC 9457)."""

import http.client
import time
from collections.abc import Iterable, Mapping, Sequence
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from typing import NamedTuple

import orjson
from aiohttp import HttpVersion10, web
from aiohttp.abc import AbstractStreamWriter
from typing_extensions import override

from gateway.bodies.codings import ACCEPT_ENCODING
from gateway.model import DestinationResponse, Event, EventId, ExpressionError, RefusedError
from gateway.rules.event_view import EventView
from gateway.rules.rules import StoredResponse
from gateway.rules.templates import Template
from gateway.text import UNSENDABLE
from gateway.verify.handshakes import HandshakeResponse

# Sent to a sender that we can't serve now; real ones wait longer by their own schedules.
RETRY_AFTER_SECONDS = 5


class Accepted(web.StreamResponse):
    """A 202, written in one piece: aiohttp's own responses spend 10 µs on headers that are the same each time."""

    _status = 202

    def __init__(  # deliberately without super(): this is all the state there is
        self, event: EventId, *, is_spooled: bool = False
    ) -> None:
        self._event = event.encode()
        self._durability = _SPOOLED_LINE if is_spooled else b""

    @override
    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter:
        self._keep_alive = request.keep_alive and self._keep_alive is None
        lines = self._durability
        if not self._keep_alive:
            lines += b"Connection: close\r\n"
        elif request.version == HttpVersion10:
            lines += b"Connection: keep-alive\r\n"
        if request.transport is None or request.transport.is_closing():
            raise ConnectionResetError("the sender went away")
        request.transport.write(ACCEPTED % (lines, _date(time.time()), self._event, self._event))
        if request.protocol.writing_paused:  # a sender that doesn't read its responses gets no more of them
            await request.writer.drain()
        return request.writer

    @override
    async def write_eof(self, data: bytes = b"") -> None:
        """Do nothing: `prepare` has written the body, too."""


SERVER = "webhook-gateway"
DURABILITY = "gateway-durability"
SPOOLED = "spooled"
"""Its only value: the event is durable on one disk, and not in the log yet."""
_SPOOLED_LINE = f"{DURABILITY}: {SPOOLED}\r\n".encode()


ACCEPTED = (
    b"HTTP/1.1 202 Accepted\r\n%bContent-Type: application/json\r\nContent-Length: 45\r\nServer: "
    + SERVER.encode()
    + b'\r\nDate: %b\r\ngateway-event-id: %b\r\n\r\n{"id":"%b"}'
)


def _date(now: float) -> bytes:
    """RFC 9110 §6.6.1."""
    return _date_of_second(int(now))


@lru_cache(maxsize=1)
def _date_of_second(second: int) -> bytes:
    return formatdate(second, usegmt=True).encode()


def make_response(status: int, content_type: str, body: bytes) -> web.Response:
    # Our own Server header reveals no versions to attack.
    return web.Response(status=status, body=body, headers={"Content-Type": content_type, "Server": SERVER})


def marked(response: web.Response, *, is_spooled: bool) -> web.Response:
    """Return a response that says how durable its event is, if that is less than in the log."""
    if is_spooled:
        response.headers[DURABILITY] = SPOOLED
    return response


def stored_response(response: StoredResponse, event: Event, view: EventView) -> tuple[web.Response, str]:
    """Return the response to the sender of an event that is stored, and why its template failed, "" if it didn't.

    The event is stored already, so that a template that fails is no reason for a failure: then the response is the
    event's id, with the headers that have no expressions.
    """
    parts = [(response.headers, response.body), (_fixed(response), None)]
    made, problem = _first_rendered(response, parts, {"id": event.id}, view)
    made.headers["gateway-event-id"] = event.id
    return made, problem


_HeaderTemplates = Sequence[tuple[str, Template]]


def _fixed(response: StoredResponse) -> _HeaderTemplates:
    """Return the headers without expressions."""
    return [(name, template) for name, template in response.headers if not template.has_expressions]


def _first_rendered(
    response: StoredResponse,
    parts: Iterable[tuple[_HeaderTemplates, Template | None]],
    default: Mapping[str, object],
    view: EventView | None,
) -> tuple[web.Response, str]:
    """Return the response with the first headers and body that can be rendered, and why the first of all can't."""
    problem = ""
    for headers, body in parts:
        try:
            return _rendered(response, headers, body, default, view), problem
        except ExpressionError as error:
            problem = problem or str(error)
    return _rendered(response, (), None, default, view), problem


def _rendered(
    response: StoredResponse,
    headers: _HeaderTemplates,
    body: Template | None,
    default: Mapping[str, object],
    view: EventView | None,
) -> web.Response:
    """Return a response with these headers and this body, or by default with this JSON.

    A view of None is for templates without expressions. Raises ExpressionError.
    """
    content, content_type = orjson.dumps(default), "application/json"
    if not response.has_body:
        content = b""
    elif body is not None:
        content, found = body.render_bytes(view)
        content_type = found or "text/plain; charset=utf-8"
    values = {name: _header_value(name, template, view) for name, template in headers}
    made = make_response(response.status, content_type, content)
    if not response.has_body:
        del made.headers["Content-Type"]
    made.headers.update(values)
    return made


def passed_on_response(found: DestinationResponse, event: EventId) -> web.Response:
    """Return a destination's response for the sender of an event: status, Content-Type, Content-Encoding, body."""
    has_body = found.status not in (HTTPStatus.NO_CONTENT, HTTPStatus.RESET_CONTENT)
    content_type = _field(found.content_type) or "application/octet-stream"
    response = make_response(found.status, content_type, found.body if has_body else b"")
    if not has_body:
        del response.headers["Content-Type"]
    elif coding := _field(found.content_encoding):
        response.headers["Content-Encoding"] = coding
    response.headers["gateway-event-id"] = event
    return response


def _field(value: bytes | None) -> str:
    """Return a field's value that a destination has sent; "" if there is none that can be passed on."""
    text = (value or b"").decode("latin-1")
    return text if text.isascii() and text.isprintable() else ""


def batch_response(response: StoredResponse, events: Sequence[EventId]) -> web.Response:
    """Return the response to the sender of several events that are stored: expressions would be about one of them."""
    body = None if response.body is None or response.body.has_expressions else response.body
    return _first_rendered(response, [(_fixed(response), body)], {"ids": events}, None)[0]


def _header_value(name: str, template: Template, view: EventView | None) -> str:
    value = template.render_bytes(view)[0].decode("utf-8", "replace")
    if UNSENDABLE.search(value):
        raise ExpressionError(f"{name}: expected a value without control characters, got one with them")
    return value


def handshake_response(handshake: HandshakeResponse) -> web.Response:
    response = make_response(handshake.status, handshake.content_type, handshake.body)
    response.headers.extend(handshake.headers)
    return response


def problem_response(refusal: RefusedError, *, allow: str = "POST") -> web.Response:
    """Render a refusal by RFC 9457, with the headers that its status requires."""
    problem = {
        "type": "about:blank",
        "title": http.client.responses.get(refusal.status, "Client Closed Request"),
        "status": refusal.status,
        "detail": refusal.detail,
    }
    response = make_response(refusal.status, "application/problem+json", orjson.dumps(problem))
    if refusal.status == HTTPStatus.METHOD_NOT_ALLOWED:
        response.headers["Allow"] = allow
    elif refusal.status == HTTPStatus.UNSUPPORTED_MEDIA_TYPE:
        response.headers["Accept-Encoding"] = ACCEPT_ENCODING  # RFC 9110 §15.5.16
    elif refusal.retry_after is not None:
        response.headers["Retry-After"] = str(refusal.retry_after)
    elif refusal.status == HTTPStatus.SERVICE_UNAVAILABLE:
        response.headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
    if refusal.status == HTTPStatus.REQUEST_TIMEOUT:
        response.force_close()
    return response


class RawResponse(NamedTuple):
    """The response to a request head that never becomes a request: it is too slow, too large, or in others' way."""

    status: int
    reason: str

    @property
    def data(self) -> bytes:
        title = http.client.responses[self.status]
        lines = (
            f"HTTP/1.1 {self.status} {title}",
            f"Server: {SERVER}",
            "Connection: close",
            "Content-Length: 0",
            "",
            "",
        )
        return "\r\n".join(lines).encode()


TOO_SLOW = RawResponse(408, "head_slow")
TOO_LARGE = RawResponse(431, "head_too_large")
EVICTED = RawResponse(408, "evicted")
