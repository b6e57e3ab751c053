"""The aiohttp application that senders see: limit → look at the head → read → verify → handshake? → identify → append.

Built on `web.Server` with a dispatch of its own, which costs a third less than an application's router, and without
automatic decompression, since a signature covers the bytes as they came.

What is absent on purpose: nothing here reads a body whose head can't be let in with any, looks at one before its
signature has been verified, retries an append, or answers 2xx before the append has returned.
"""

import asyncio
import http.client
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson
from aiohttp import HttpVersion10, StreamReader, web
from aiohttp.abc import AbstractStreamWriter
from structlog.typing import FilteringBoundLogger
from typing_extensions import override

from gateway.log.base import Log
from gateway.log.records import encode_event, event_key
from gateway.log.topics import Topics
from gateway.model import (
    Event,
    EventId,
    LogUnavailableError,
    RecordTooLargeError,
    RefusedError,
)
from gateway.room import Held, Room, Share
from gateway.rules.identify import Identifier
from gateway.rules.rules import Rules, Source
from gateway.telemetry.logs import trace_of
from gateway.telemetry.metrics import NO_NAME, Metrics
from gateway.telemetry.quota import Quota
from gateway.verify.request import Request

if TYPE_CHECKING:  # an extra
    from gateway.telemetry.traces import Span, Traces

# A successor (a retry or dead record) carries more headers than the event, and has to fit as well.
SUCCESSOR_ROOM = 64 * 1024
# What we ask of a sender that we can't serve now; real ones wait longer by their own schedules.
RETRY_AFTER = 5
# Kept open for longer than the 60 s for which load balancers reuse an idle connection, so that they close first.
KEEP_ALIVE = 75.0
# How long a refused body is read and thrown away, so that its sender sees the answer instead of a reset.
LINGER = 5.0
# aiohttp's own limits on a request line and on a header, of which it takes 128.
MAX_LINE = 16 * 1024
# So much of a head is kept that hasn't ended, times `Limits.head_bytes`, which don't count what frames them.
HEAD_FRAMING = 2
# Sockets that wait to be accepted: a burst of new connections, while the loop is busy for some milliseconds.
BACKLOG = 1024
# Seconds for which a process that ends still answers what comes on open connections.
LAST_CALL = 0.5
# Seconds of a window in which only so many refusals of one kind are told each in a line (`telemetry/quota.py`).
QUOTA_WINDOW = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one request, and all of them together, may take."""

    head_bytes: int = 32 * 1024
    """Header names, values and the query together."""
    head_seconds: float = 10.0
    """From the first bytes of a request to the end of its headers."""
    body_seconds: float = 10.0
    """From the end of the headers to the end of the body."""
    in_flight_bytes: int = 64 * 1024 * 1024
    """Bodies in memory that aren't acknowledged yet, over all requests."""


class Ingress:
    """Serves `POST /in/<source>`, and `GET /healthz` for load balancers.

    `rules` returns the rules in force; a reload swaps them between two requests.
    """

    def __init__(
        self,
        *,
        rules: Callable[[], Rules],
        log: Log,
        topics: Topics,
        metrics: Metrics,
        logger: FilteringBoundLogger,
        clock: Callable[[], float] = time.time,
        limits: Limits | None = None,
        traces: "Traces | None" = None,
    ) -> None:
        self._is_leaving = False
        self._rules = rules
        self._log = log
        self._topics = topics
        self._metrics = metrics
        self._logger = logger
        self._clock = clock
        self._limits = limits or Limits()
        self._traces = traces
        self._body_limit = log.max_record_bytes - SUCCESSOR_ROOM
        self._room = Room(self._limits.in_flight_bytes)
        self._quota = Quota()
        self._quota_ends: asyncio.TimerHandle | None = None
        self._known: Rules | None = None
        self._endpoints: dict[str, _Endpoint] = {}
        self._web: _Server | None = None
        self._listener: asyncio.Server | None = None

    async def start(self, host: str, port: int, *, is_shared: bool = True) -> tuple[str, int]:
        """Listen, and return the address, which tells the port where 0 was asked for. Raises OSError for one in use.

        Several processes may share a port (SO_REUSEPORT), and the kernel spreads the connections over them.
        """
        self._web = _Server(self.handle, self._limits, logger=self._logger, metrics=self._metrics)
        loop = asyncio.get_running_loop()
        self._listener = await loop.create_server(self._web, host, port, reuse_port=is_shared, backlog=BACKLOG)
        name = self._listener.sockets[0].getsockname()
        return name[0], name[1]

    async def stop(self, timeout: float) -> None:
        """Stop listening, and give requests under way `timeout` seconds to be answered.

        For a moment what comes on open connections is still answered, and each is closed with that: a sender learns
        from the answer to connect anew, and from a connection that is closed under its request nothing.
        """
        self._is_leaving = True
        if self._listener is not None:
            self._listener.close()
        if self._web is not None:
            for _ in range(50):
                if self._web.connections:
                    await asyncio.sleep(min(LAST_CALL, timeout / 2) / 50)
            self._web.pre_shutdown()
            # aiohttp waits that long for the answer, and then once more for the connection.
            await self._web.shutdown(timeout / 2)
        if self._quota_ends is not None:
            self._quota_ends.cancel()
            self._tell_left_out()

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request, count it, and log it in one line; of many refusals that are alike, only the first."""
        began = perf_counter()
        path, _, query = request.raw_path.partition("?")
        if not path.startswith("/"):  # the absolute form, RFC 9112 §3.2.2
            path, query = request.rel_url.raw_path, request.rel_url.raw_query_string
        endpoint = self._endpoint(path)
        if endpoint is None and path == "/healthz":
            return self._health(request)
        line: dict[str, Any] = {"source": endpoint.name if endpoint else NO_NAME, "status": 500}  # 500 if we have a bug
        try:
            response = await self._receive(request, endpoint, path, query, line, began=began)
            line["status"] = response.status
        except RefusedError as refusal:
            line["status"], line["reason"] = refusal.status, refusal.reason
            response = _problem(refusal)
            if isinstance(request.protocol, _Connection):
                request.protocol.unread = request.content
        except asyncio.CancelledError:
            line["status"], line["reason"] = 503, "draining"  # `stop` has given up on it; there is no answer
            raise
        finally:
            self._finished(endpoint, line, perf_counter() - began)
        if self._is_leaving:
            response.force_close()
        return response

    async def _receive(
        self,
        request: web.BaseRequest,
        endpoint: "_Endpoint | None",
        path: str,
        query: str,
        line: dict[str, Any],
        *,
        began: float,
    ) -> web.StreamResponse:
        if endpoint is None:
            raise RefusedError(404, "unknown_source", "no source has this path")
        headers = request.raw_headers
        names = [name.lower() for name, _ in headers]
        head_bytes = self._take_head(request, query, names)
        verifier, stream, limit = endpoint.source.verifier, request.content, self._body_limit - head_bytes
        if stream.is_eof() and stream.exception() is None:
            sent = Request("POST", path, query, headers, stream.read_nowait(), names)
            line["bytes"] = len(sent.body)
            if len(sent.body) > limit:
                raise _too_large(limit)
            identity_at = verifier.verify(sent, now=self._clock())
        else:
            head = Request("POST", path, query, headers, b"", names)
            sent, identity_at = await self._read_and_verify(request, endpoint, head, limit, line)
        body = sent.body
        if not self._room.keep(endpoint.share, len(body), now=perf_counter()):
            raise _overloaded()
        try:
            if self._traces is not None:  # nothing of a request is traced before it is verified
                at = time.time() - (perf_counter() - began)
                line["span"] = self._traces.receive(
                    source=endpoint.name, path=endpoint.source.path, headers=headers, began=at, size=len(body)
                )
            if (answer := verifier.handshake(sent)) is not None:
                line["handshake"] = True
                return _response(answer.status, answer.content_type, answer.body)
            event = endpoint.event(sent, received_at=self._log.now(), identity_at=identity_at)
            line["event_id"], line["type"] = event.id, event.type
            if self._traces is None:
                began = perf_counter()
                await self._log.append(endpoint.topic, key=event_key(event), value=body, headers=encode_event(event))
                self._metrics.append_duration.observe(perf_counter() - began)
            else:
                await self._append_traced(self._traces, replace(event, trace=line["span"].context), endpoint.topic)
            endpoint.events.inc()
            endpoint.last.set(event.received_at)
        except LogUnavailableError as error:
            raise RefusedError(503, "log_unavailable", "the event can't be stored at the moment") from error
        except RecordTooLargeError as error:
            raise RefusedError(413, "body_too_large", "the event is larger than the log takes") from error
        finally:
            self._room.give_back(endpoint.share, len(body))
        return _Accepted(event.id)

    def _take_head(self, request: web.BaseRequest, query: str, names: Sequence[bytes]) -> int:
        """Return the bytes of a head that may be one of an event. Raises RefusedError."""
        if request.method != "POST":
            raise RefusedError(405, "method_not_allowed", f"expected POST, got {request.method[:20]}")
        head_bytes = len(query) + sum([len(name) + len(value) for name, value in request.raw_headers])
        if head_bytes > self._limits.head_bytes:
            limit = self._limits.head_bytes
            raise RefusedError(431, "head_too_large", f"expected at most {limit} bytes of headers and query")
        if TRANSFER_ENCODING in names:
            headers = zip(names, request.raw_headers, strict=True)
            _refuse_codings([value for name, (_, value) in headers if name == TRANSFER_ENCODING])
        return head_bytes

    async def _read_and_verify(
        self, request: web.BaseRequest, endpoint: "_Endpoint", head: Request, limit: int, line: dict[str, Any]
    ) -> tuple[Request, str | None]:
        """Read the rest of a request, if its head may be one of an event; return it, and where its identity is."""
        claim = endpoint.source.verifier.look(head, now=self._clock())
        reader = _Reader(request, self._room, endpoint.share, limit)
        try:
            sent = head._replace(body=await reader.read(self._limits.body_seconds))
            line["bytes"] = len(sent.body)
            return sent, claim.prove(sent)
        finally:
            self._room.close(reader)

    async def _append_traced(self, traces: "Traces", event: Event, topic: str) -> None:
        began = perf_counter()
        with traces.send(event, topic) as span:
            event = replace(event, trace=span.context)
            headers = encode_event(event)
            position = await self._log.append(topic, key=event_key(event), value=event.body, headers=headers)
            span.tell(
                {
                    "messaging.destination.partition.id": str(position.partition),
                    "messaging.kafka.offset": position.offset,
                }
            )
        seconds, trace_id = perf_counter() - began, span.context.recorded_id
        if trace_id is None:
            self._metrics.append_duration.observe(seconds)
        else:
            self._metrics.append_duration.observe_traced(seconds, trace_id)

    def _endpoint(self, path: str) -> "_Endpoint | None":
        rules = self._rules()
        if rules is not self._known:
            sources = rules.sources.values()
            self._endpoints = {
                source.path: _Endpoint(source, self._topics, self._metrics, self._room.share(source.name))
                for source in sources
            }
            self._known = rules
        return self._endpoints.get(path)

    def _health(self, request: web.BaseRequest) -> web.Response:
        # Not logged: a load balancer asks every few seconds.
        if request.method not in {"GET", "HEAD"}:
            refusal = RefusedError(405, "method_not_allowed", f"expected GET, got {request.method[:20]}")
            response = _problem(refusal, allow="GET, HEAD")
        elif self._is_leaving:
            response = _problem(RefusedError(503, "draining", "this process is about to stop"))
            response.force_close()
        else:
            response = _response(200, "text/plain", b"ok\n")
        self._metrics.requests.labels(NO_NAME, str(response.status)).inc()
        return response

    def _finished(self, endpoint: "_Endpoint | None", line: dict[str, Any], seconds: float) -> None:
        source = line["source"]
        trace_id = None if self._traces is None else _ended(line)
        if endpoint is not None and line["status"] == _STORED:
            endpoint.accepted.inc()
            if trace_id is None:
                endpoint.seconds.observe(seconds)
            else:
                endpoint.seconds.observe_traced(seconds, trace_id)
        else:
            self._metrics.requests.labels(source, str(line["status"])).inc()
            self._metrics.request_duration.labels(source).observe(seconds)
            if "reason" in line:
                self._metrics.rejected.labels(source, line["reason"]).inc()
                if endpoint is not None:
                    taken = self._metrics.events.labels(source).value
                    self._metrics.refused_requests.add(source, line["reason"], at=self._log.now(), events=taken)
        line["seconds"] = round(seconds, 6)
        # A 5xx is ours, or the log's, and is always told.
        if line["status"] in _SENDERS_FAULT and not self._has_quota(source, line["reason"]):
            return
        self._logger.info("request_finished", **line)

    def _has_quota(self, source: str, reason: str) -> bool:
        if self._quota_ends is None:
            self._quota_ends = asyncio.get_running_loop().call_later(QUOTA_WINDOW, self._tell_left_out)
        return self._quota.takes(source, reason)

    def _tell_left_out(self) -> None:
        self._quota_ends = None
        for source, reason, count in self._quota.end():
            self._logger.info("refusals_left_out", source=source, reason=reason, count=count)


def _ended(line: dict[str, Any]) -> str | None:
    """End the span of a request, if it has one, and put its trace into the line."""
    span: Span | None = line.pop("span", None)
    if span is None:
        return None
    span.tell({name: line[key] for name, key in _TOLD if key in line})
    span.answered(line["status"], line.get("reason"))
    trace_id = span.context.recorded_id
    if trace_id is not None:
        line["trace_id"] = trace_id
    return trace_id


_STORED = int(HTTPStatus.ACCEPTED)
_SENDERS_FAULT = range(400, 500)
_TOLD = (("gateway.event.id", "event_id"), ("gateway.event.type", "type"), ("gateway.handshake", "handshake"))


class _Reader(Held):
    """Reads one body, as far as there is room for it."""

    __slots__ = ("_deadline", "_limit", "_request", "_room")

    def __init__(self, request: web.BaseRequest, room: Room, share: Share, limit: int) -> None:
        super().__init__(share)
        self._request = request
        self._room = room
        self._limit = limit
        self._deadline: asyncio.Timeout | None = None

    async def read(self, seconds: float) -> bytes:
        """Return the body, for which there is room until this is closed. Raises RefusedError."""
        request, stream = self._request, self._request.content
        try:
            if (request.content_length or 0) > self._limit:
                raise _too_large(self._limit)
            if "Expect" in request.headers:
                await _ask_to_continue(request)
            body = bytearray()  # not a list of what came, which may be single bytes
            async with asyncio.timeout(seconds) as self._deadline:
                while chunk := await stream.readany():
                    self._take(len(chunk))
                    body += chunk
            return bytes(body)
        except TimeoutError:
            if self.is_given_up:
                raise _crowded_out() from None
            raise RefusedError(408, "body_slow", f"expected the whole body within {seconds:g} s") from None
        except web.RequestPayloadError as error:
            raise RefusedError(400, "malformed_body", "the body isn't framed as HTTP has it") from error
        except (ConnectionError, RuntimeError) as error:
            # aiohttp says "Connection closed." by a RuntimeError. Nobody will read the answer.
            raise RefusedError(499, "disconnected", "the sender went away") from error

    def _take(self, more: int) -> None:
        if self.size + more > self._limit:
            raise _too_large(self._limit)
        if not self._room.take(self, more, now=perf_counter()):
            raise _crowded_out() if self.is_given_up else _overloaded()

    @override
    def give_up(self) -> None:
        if self._deadline is not None and not self._deadline.expired():
            self._deadline.reschedule(0.0)


def _too_large(limit: int) -> RefusedError:
    return RefusedError(413, "body_too_large", f"expected at most {limit} bytes of body beside these headers")


def _overloaded() -> RefusedError:
    return RefusedError(503, "overloaded", "too much is under way")


def _crowded_out() -> RefusedError:
    # No 503, which says that we can't serve: it was the sender that kept us waiting.
    return RefusedError(408, "crowded_out", "expected the body at once, as others need the room for it")


class _Endpoint:
    """A source with what is worked out once per version of the rules."""

    __slots__ = ("accepted", "event", "events", "last", "name", "seconds", "share", "source", "topic")

    def __init__(self, source: Source, topics: Topics, metrics: Metrics, share: Share) -> None:
        self.name = source.name
        self.source = source
        self.topic = source.topic or topics.events(source.name)
        self.accepted = metrics.requests.labels(source.name, "202")
        self.events = metrics.events.labels(source.name)
        self.last = metrics.last_event_timestamp.labels(source.name)
        self.seconds = metrics.request_duration.labels(source.name)
        self.share = share
        self.event = Identifier(source).event


class _Server(web.Server):
    """Makes connections that are quiet about bad requests."""

    def __init__(
        self,
        handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
        limits: Limits,
        *,
        logger: FilteringBoundLogger,
        metrics: Metrics,
    ) -> None:
        super().__init__(handler)
        self.limits = limits
        self.logger = logger
        self.metrics = metrics

    @override
    def __call__(self) -> web.RequestHandler:
        return _Connection(self, loop=asyncio.get_running_loop())


class _Connection(web.RequestHandler):
    """A connection whose errors are problems (RFC 9457), and lines of our log."""

    __slots__ = ("_has_begun", "_head_ends", "_head_size", "_limits", "_log", "_metrics", "unread")

    def __init__(self, server: _Server, *, loop: asyncio.AbstractEventLoop) -> None:
        super().__init__(
            server,
            loop=loop,
            access_log=None,  # type: ignore[arg-type]  # None turns it off; the annotation forgets that
            auto_decompress=False,
            keepalive_timeout=KEEP_ALIVE,
            lingering_time=LINGER,
            max_field_size=MAX_LINE,
            max_line_size=MAX_LINE,
        )
        self._log = server.logger
        self._metrics = server.metrics
        self._limits = server.limits
        self._has_begun = False
        self._head_size = 0
        self._head_ends: asyncio.TimerHandle | None = None
        self.unread: StreamReader | None = None

    @override
    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # aiohttp waits for a head with this future; what has come without ending that is a piece of one. On a busy loop
        # the first bytes are there before it begins to wait: unless they are a request, they are a piece, too.
        waiter = self._waiter
        if waiter.done() if waiter is not None else self._has_begun or self._messages:
            self._has_begun = True
            if self._head_ends is not None:
                self._head_ends.cancel()
                self._head_ends = None
                self._head_size = 0
            return
        if self._head_ends is None:
            if not data.strip():  # an empty line is no request yet, RFC 9112 §2.2
                return
            self._head_ends = self._loop.call_later(self._limits.head_seconds, self._end_head, TOO_SLOW)
        self._head_size += len(data)
        if self._head_size > HEAD_FRAMING * self._limits.head_bytes:
            self._end_head(TOO_LARGE)

    def _end_head(self, answer: "_Answer") -> None:
        """Close a connection whose request has begun and doesn't come: it isn't idle, so KEEP_ALIVE isn't for it."""
        if self._head_ends is not None:
            self._head_ends.cancel()
        if self.transport is not None:
            self._log.debug("request_malformed", error="a head that doesn't end")
            self._metrics.requests.labels(NO_NAME, str(answer.status)).inc()
            self._metrics.rejected.labels(NO_NAME, answer.reason).inc()
            self.transport.write(answer.data)
            self.force_close()

    @override
    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        if self._head_ends is not None:
            self._head_ends.cancel()
        # Who reads on to throw a refused body away (LINGER) isn't told by aiohttp that no more of it comes.
        if self.unread is not None:
            self.unread.feed_eof()

    @override
    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Answer what never became a request (400), and what a bug of ours has stopped (500)."""
        if status < HTTPStatus.INTERNAL_SERVER_ERROR:
            # Anybody on the internet can cause these: a counter is enough.
            self._log.debug("request_malformed", error=type(exc).__name__)
            self._metrics.requests.labels(NO_NAME, str(status)).inc()
            self._metrics.rejected.labels(NO_NAME, "malformed_request").inc()
            refusal = RefusedError(status, "malformed_request", "the request isn't HTTP as we read it")
        else:
            # Counted and logged as a request already.
            self._log.error("request_failed", exception="none" if exc is None else trace_of(exc))
            refusal = RefusedError(status, "bug", "the gateway failed")
        response = _problem(refusal)
        response.force_close()
        return response


class _Accepted(web.StreamResponse):
    """A 202, written in one piece: aiohttp's own responses spend 10 µs on headers that are the same each time."""

    _status = 202

    def __init__(self, event: EventId) -> None:  # deliberately without super(): this is all the state there is
        self._event = event.encode()

    @override
    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter:
        self._keep_alive = request.keep_alive and self._keep_alive is None
        connection = b""
        if not self._keep_alive:
            connection = b"Connection: close\r\n"
        elif request.version == HttpVersion10:
            connection = b"Connection: keep-alive\r\n"
        if request.transport is None or request.transport.is_closing():
            raise ConnectionResetError("the sender went away")
        request.transport.write(ACCEPTED % (connection, _date(time.time()), self._event, self._event))
        if request.protocol.writing_paused:  # a sender that doesn't read its answers gets no more of them
            await request.writer.drain()
        return request.writer

    @override
    async def write_eof(self, data: bytes = b"") -> None:
        """Do nothing: `prepare` has written the body, too."""


SERVER = "webhook-gateway"
ACCEPTED = (
    b"HTTP/1.1 202 Accepted\r\n%bContent-Type: application/json\r\nContent-Length: 45\r\nServer: "
    + SERVER.encode()
    + b'\r\nDate: %b\r\ngateway-event-id: %b\r\n\r\n{"id":"%b"}'
)


class _Answer(NamedTuple):
    """What is said to a sender whose request we have given up before there was one."""

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


TOO_SLOW = _Answer(408, "head_slow")
TOO_LARGE = _Answer(431, "head_too_large")
TRANSFER_ENCODING = b"transfer-encoding"


def _date(now: float) -> bytes:
    """RFC 9110 §6.6.1."""
    return _date_of_second(int(now))


@lru_cache(maxsize=1)
def _date_of_second(second: int) -> bytes:
    return formatdate(second, usegmt=True).encode()


def _response(status: int, content_type: str, body: bytes) -> web.Response:
    # A server of its own name tells nobody which versions to attack.
    return web.Response(status=status, body=body, headers={"Content-Type": content_type, "Server": SERVER})


def _problem(refusal: RefusedError, *, allow: str = "POST") -> web.Response:
    """Render a refusal by RFC 9457, with the headers that its status asks for."""
    problem = {
        "type": "about:blank",
        "title": http.client.responses.get(refusal.status, "Client Closed Request"),
        "status": refusal.status,
        "detail": refusal.detail,
    }
    response = _response(refusal.status, "application/problem+json", orjson.dumps(problem))
    if refusal.status == HTTPStatus.METHOD_NOT_ALLOWED:
        response.headers["Allow"] = allow
    elif refusal.status == HTTPStatus.SERVICE_UNAVAILABLE:
        response.headers["Retry-After"] = str(RETRY_AFTER)
    if refusal.status == HTTPStatus.REQUEST_TIMEOUT:
        response.force_close()
    return response


def _refuse_codings(values: Sequence[bytes]) -> None:
    """Refuse what RFC 9112 §6.1 has us refuse: a transfer coding that we would pass on without its header."""
    if b",".join(values).strip().lower() != b"chunked":
        raise RefusedError(501, "transfer_coding", "expected a body as it is or in chunks, got another transfer coding")


async def _ask_to_continue(request: web.BaseRequest) -> None:
    """Let a sender go on that waits for it (RFC 9110 §10.1.1): curl does with a large body, and so do some SDKs."""
    if request.headers["Expect"].lower() == "100-continue" and request.version >= (1, 1):
        await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        # As aiohttp's own applications do: what follows is still the start of the answer.
        request.writer.output_size = 0
