"""Connections: aiohttp's own, with deadlines and limits that it lacks, and our error responses.

A request head has a deadline and a size limit, even one that begins while the previous request is in progress. What is
written has a deadline, too: a client may never read. Reading a connection pauses while it has a pipelined request: one
that has come before the response to the previous one. The memory that all connections take for such heads and requests
is limited, too (`head_memory.py`).
"""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus
from ssl import SSLObject
from typing import cast

from aiohttp import StreamReader, web
from structlog.typing import FilteringBoundLogger
from typing_extensions import override

from gateway.ingress.body import forget_frames
from gateway.ingress.head_memory import LINE_OVERHEAD, SMALL, HeadMemory, size_of, size_of_lines
from gateway.ingress.responses import EVICTED, TOO_LARGE, TOO_SLOW, RawResponse, problem_response
from gateway.ingress.trailers import WithoutTrailers, is_in_head
from gateway.model import RefusedError
from gateway.sockets import has_unread
from gateway.telemetry.logs import traceback_of
from gateway.telemetry.metrics import NO_SOURCE, Metrics
from gateway.verify.client_certificates import VerifiedCertificate

# Longer than the 60 s for which load balancers reuse an idle connection, so that they close first.
KEEP_ALIVE = 75.0
# How long a refused body is read and thrown away, so that its sender sees the response instead of a reset.
LINGER = 5.0
# aiohttp's own limits on a request line and on a header; it accepts 128 headers.
MAX_LINE = 16 * 1024
# How many times `Limits.head_bytes` an incomplete head may have: these don't count line ends and separators.
HEAD_OVERHEAD_FACTOR = 2
END_OF_HEAD = b"\r\n\r\n"
# Bytes that TLS reads on while nothing is read of a connection; by default it is 256 KiB.
TLS_READ_AHEAD = 16 * 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of one request or connection, and of all of them together."""

    head_bytes: int = 32 * 1024
    """Header names, values and the query together."""
    heads_bytes: int = 32 * 1024 * 1024
    """Heads that are incomplete or large, trailers, and pipelined requests; of all connections."""
    head_seconds: float = 10.0
    """From the first bytes of a request to the end of its headers."""
    body_seconds: float = 10.0
    """From the end of the headers to the end of the body."""
    write_seconds: float = 10.0
    """From when the kernel takes no more of a response, as its client doesn't read, until it has taken all of it."""
    connections: int | None = None
    """Open connections: at the limit, idle ones are closed to let others in. None for what the descriptors allow."""
    opening: int = 512
    """Connections whose PROXY header or TLS handshake isn't complete."""
    opening_seconds: float = 5.0
    """From the start of a connection to the end of its PROXY header, and from there to the end of its handshake."""
    in_flight_bytes: int = 64 * 1024 * 1024
    """Bodies in memory that aren't acknowledged yet, over all requests."""


class Server(web.Server):
    """Creates connections that don't log bad requests as errors.

    `may_log_traceback(event)` limits the lines of that log event: a client that can trigger a bug can repeat it.
    `refuse(reason, address, detail)` counts and logs a connection that is closed early.
    """

    def __init__(
        self,
        handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
        limits: Limits,
        *,
        logger: FilteringBoundLogger,
        metrics: Metrics,
        may_log_traceback: Callable[[str], bool],
        refuse: Callable[[str, str, str], None],
    ) -> None:
        super().__init__(handler)
        self.limits = limits
        self.logger = logger
        self.metrics = metrics
        self.may_log_traceback = may_log_traceback
        self.refuse = refuse
        self.head_memory = HeadMemory(limits.heads_bytes)

    @property
    def count(self) -> int:
        """How many connections are open."""
        return len(self._connections)

    @override
    def __call__(self) -> web.RequestHandler:
        return Connection(self, loop=asyncio.get_running_loop())


class Connection(WithoutTrailers):
    """A connection whose error responses are problems (RFC 9457), and whose errors go to our log."""

    __slots__ = (
        "_body",
        "_head_memory",
        "_head_size",
        "_head_timer",
        "_heads",
        "_held",
        "_is_head_certain",
        "_kept",
        "_limits",
        "_logger",
        "_may_log_traceback",
        "_metrics",
        "_refuse",
        "_trailing",
        "_write_timer",
        "discarded_body",
        "network",
        "on_lost",
        "peer",
    )

    def __init__(
        self, server: Server, *, loop: asyncio.AbstractEventLoop, peer: str | None = None, network: str = ""
    ) -> None:
        super().__init__(
            server,
            loop=loop,
            keepalive_timeout=KEEP_ALIVE,
            lingering_time=LINGER,
            max_line_size=MAX_LINE,
        )
        self._logger = server.logger
        self._metrics = server.metrics
        self._may_log_traceback = server.may_log_traceback
        self._refuse = server.refuse
        self._limits = server.limits
        self._head_memory = server.head_memory
        self._msg_queue_resume_size = 0  # read on once no pipelined request waits
        self._heads = 0
        self._body: StreamReader | None = None  # of the last head, while it isn't complete
        self._head_size = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._is_head_certain = False
        self._held = 0  # bytes that the memory of heads counts of it
        self._kept = 0  # of them, those of the last complete head, if it is large: aiohttp keeps it until the next one
        self._trailing = 0  # of them, those of a chunked body that aren't its content (framing, trailers)
        self._write_timer: asyncio.TimerHandle | None = None
        self.discarded_body: StreamReader | None = None
        """The rest of a refused request's body, while it is read and thrown away (LINGER)."""
        self.on_lost: Callable[[], None] | None = None
        """Called if the connection is lost."""
        self.peer = peer
        """The address of the other end by a PROXY header, "" if that has none; None without such a header."""
        self.network = network
        """The network of the other end (`network_of`)."""

    @property
    def address(self) -> str:
        """The address of the other end; "" if it is unknown."""
        if self.peer is not None:
            return self.peer
        name = self.peername
        return name[0] if isinstance(name, tuple) else ""

    @property
    def idle_since(self) -> float | None:
        """Since when it waits for its first or next request, by the loop's clock; None while it has any part of one.

        aiohttp notes the time anyway, for `keepalive_timeout`.
        """
        waiter = self._waiter
        if waiter is None or waiter.done() or self._messages or self._head_timer is not None:
            return None
        return self._next_keepalive_close_time - KEEP_ALIVE

    def close_idle(self) -> bool:
        """Close it immediately, unless the socket has bytes that aren't read yet; return whether it is closed.

        A request that its client sends at the same moment is lost, as it would be at the end of any idle connection. So
        is one of which a part of its first TLS record has been read: asyncio doesn't say that there is any.
        """
        transport = self.transport
        if transport is None or has_unread(transport.get_extra_info("socket").fileno()):
            return False
        self.force_close()
        transport.abort()  # TLS would wait for the other end to say that it has got everything
        return True

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        # Wait until the kernel has taken everything: by default, aiohttp keeps 64 KiB of it, and goes on.
        cast("asyncio.Transport", transport).set_write_buffer_limits(1, 0)

    @override
    def pause_writing(self) -> None:
        super().pause_writing()
        if self.transport is not None:
            self._write_timer = self._loop.call_later(self._limits.write_seconds, self._end_unread, self.transport)

    @override
    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel_write_timer()

    def _end_unread(self, transport: asyncio.Transport) -> None:
        """Close a connection whose client has read too little of our responses."""
        self._refuse(
            "unread", self.address, f"expected the responses to be read within {self._limits.write_seconds:g} s"
        )
        transport.abort()

    def _cancel_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    @override
    def data_received(self, data: bytes) -> None:
        if self._messages and _is_error(self._messages[-1][0]):
            return  # nothing after it can be read; aiohttp would queue an error with all of it again
        body = self._body
        begun = 0 if body is None else body.total_bytes
        super().data_received(data)
        if self._force_close or self._close:
            return
        if self._upgraded:  # an upgrade or CONNECT: that request gets its response, and is the last one
            self.read_no_more()
            return
        if body is None and not self._held and self._is_one_request(data):
            self._heads = self._request_count
            return
        if not self._separate(self._request_count - self._heads):
            return
        has_pipelined_request = self._has_pipelined_request()
        if not self._buffer_paused and has_pipelined_request:
            self._pause_reading_for_buffer()
        self._follow_heads(data, body, begun)
        if has_pipelined_request or self._head_timer is not None:
            self._hold(size_of(data, len(data)))
        elif (kept := self._kept + self._trailing) > self._held:
            self._hold(kept - self._held)
        elif kept < self._held:
            self._release()
            self._hold(kept)

    @override
    def read_no_more(self) -> None:
        self._forget_head()
        super().read_no_more()

    def _is_one_request(self, data: bytes) -> bool:
        """Return whether `data` is one whole request, as mostly, or is empty, as when aiohttp only continues to parse.

        Its head is small, so that it isn't counted.
        """
        if self._request_count == self._heads:
            return not data
        if len(self._messages) != 1 or self._request_in_progress or self._request_count != self._heads + 1:
            return False
        body, head = self._messages[0][1], data.find(END_OF_HEAD) + len(END_OF_HEAD)
        if not body.is_eof() or head + body.total_bytes != len(data):  # what comes in chunks is more than its content
            return False
        return head + LINE_OVERHEAD * data.count(b"\n", 0, head) <= SMALL

    def _follow_heads(self, data: bytes, body: StreamReader | None, begun: int) -> None:
        """Note whether the last head, or the body after it, is complete; `begun` is what had come of that `body`."""
        if self._request_count != self._heads:  # heads have ended in it
            self._heads = self._request_count
            self._forget_head()
            self._kept = self._size_of_last_head()
            body = self._last_body()
            begun = -(data.find(END_OF_HEAD) + len(END_OF_HEAD))
        elif body is None:
            self._take_head(data)
            return
        if body is not None and not body.is_eof():
            self._body = body
            framing = len(data) - (body.total_bytes - begun)
            if framing < len(data):
                self._trailing = framing if framing > MAX_LINE else 0
            else:  # trailers, or the line with a chunk's size, which hasn't ended
                self._trailing += size_of(data, len(data))
            return
        self._body = None
        self._trailing = 0
        # `data` has complete requests only if it ends as a head does, or is just the body, with at most one head before
        # it. Otherwise, its end may be the beginning of the next head: only the parser knows.
        if not data.endswith(END_OF_HEAD) and (0 if body is None else body.total_bytes) - begun != len(data):
            self._wait_for_head(is_certain=False)

    def _has_pipelined_request(self) -> bool:
        """Return whether a request waits for the one in progress.

        A parse error that aiohttp has queued is none: reading must go on, so that the request in progress, which may
        wait for a body that never comes, notices that its client is gone.
        """
        waiting = self._messages
        return len(waiting) > (not self._request_in_progress) and not _is_error(waiting[-1][0])

    def _is_body_awaited(self) -> bool:
        return self._body is not None and not self._body.is_eof()

    def _last_body(self) -> StreamReader | None:
        if self._messages:
            return self._messages[-1][1]
        return None if self._current_request is None else self._current_request.content

    def _size_of_last_head(self) -> int:
        """Return what the last complete head takes; 0 if it is small."""
        if self._messages:
            lines = getattr(self._messages[-1][0], "raw_headers", ())  # an error has none
        else:
            lines = () if self._current_request is None else self._current_request.raw_headers
        size = size_of_lines(lines)
        return size if size > SMALL else 0

    def _take_head(self, data: bytes) -> None:
        """Count bytes of an incomplete head; the first ones start its deadline."""
        if self._head_timer is None and not data.strip():  # an empty line is no request yet, RFC 9112 §2.2
            return
        if data and not self._is_head_certain:
            self._wait_for_head(is_certain=True)
        self._head_size += len(data)
        if self._head_size > HEAD_OVERHEAD_FACTOR * self._limits.head_bytes:
            if self._is_in_use:
                self._pause_reading_for_buffer()  # until `_end_late_head`: the response comes first
            else:
                self._end_head(TOO_LARGE)

    @property
    def _is_in_use(self) -> bool:
        """Whether a request is in progress or waits, so that a response is to come."""
        waiter = self._waiter
        return bool(self._messages) or (waiter.done() if waiter is not None else self._heads > 0)

    def _wait_for_head(self, *, is_certain: bool) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
        self._head_timer = self._loop.call_later(self._limits.head_seconds, self._end_late_head)
        self._is_head_certain = is_certain

    def _forget_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None
        self._release()
        self._kept = self._trailing = 0
        self._head_size = 0
        self._is_head_certain = False

    def _hold(self, more: int) -> None:
        if more:
            self._held += more
            self._head_memory.hold(self, more)

    def _release(self) -> None:
        if self._held:
            self._held = 0
            self._head_memory.forget(self)

    def _end_late_head(self) -> None:
        """End the connection if the parser has a part of a head; wait again if a response is still to come."""
        if self._is_in_use:
            self._wait_for_head(is_certain=self._is_head_certain)
        else:
            is_large = self._head_size > HEAD_OVERHEAD_FACTOR * self._limits.head_bytes
            self._end_head_if_any(TOO_LARGE if is_large else TOO_SLOW)

    def evict(self, held: int) -> None:
        """Let go of what is held of a head or of pipelined requests: others need the memory (`head_memory.py`).

        If a request is in progress, and perhaps no part of a head is held, it is only closed if it holds much (bytes).
        """
        transport = self.transport
        if self._force_close or transport is None:
            return
        if not self._is_in_use:
            address = self.address  # it has none any more once it is closed
            if self._head_timer is not None:
                self._end_head_if_any(EVICTED)
            elif self.close_idle():
                self._refuse("evicted", address, "expected another request before others needed the memory")
            return
        may_end = self._is_body_awaited() or self._is_head_certain or self._has_pipelined_request()
        if may_end or held > HEAD_OVERHEAD_FACTOR * self._limits.head_bytes:
            what = "expected a body without delay, and no request before the response to the previous one"
            self._refuse("evicted", self.address, what)
            self.force_close()
            transport.abort()

    def _end_head_if_any(self, response: RawResponse) -> None:
        """End the connection, on which no response is to come, if the parser has a part of a head."""
        if self._parser is not None and is_in_head(self._parser):
            self._end_head(response)
            return
        self._forget_head()
        if self._buffer_paused:  # by empty lines alone
            self._resume_reading_for_buffer()

    @override
    def _resume_reading_for_buffer(self) -> None:
        super()._resume_reading_for_buffer()
        if self._head_timer is not None:  # the time in which we didn't read doesn't count
            self._wait_for_head(is_certain=self._is_head_certain)

    def _end_head(self, response: RawResponse) -> None:
        """Close a connection with an incomplete head: it was too slow, is too large, or others need the memory."""
        self._forget_head()
        if self.transport is not None:
            self._logger.debug("request_malformed", error=response.reason)
            self._metrics.requests.labels(NO_SOURCE, str(response.status)).inc()
            self._metrics.rejected.labels(NO_SOURCE, response.reason).inc()
            self.transport.write(response.data)
            self.force_close()
            self._parser = None  # with what it has of the head: TLS may take its time to close

    @override
    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        self._forget_head()
        self._cancel_write_timer()
        self._body = None  # a reference cycle
        if self.on_lost is not None:
            self.on_lost()
        # aiohttp doesn't tell the reader that discards a refused body (LINGER) that no more of it comes.
        if self.discarded_body is not None:
            self.discarded_body.feed_eof()
            self.discarded_body = None  # a reference cycle
        for message, _ in self._messages:  # that were never handled, such as an error in the rest of a body
            forget_frames(getattr(message, "exc", None))

    @override
    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Respond to malformed requests (400), and to requests that failed because of a bug of ours (500)."""
        if status < HTTPStatus.INTERNAL_SERVER_ERROR:
            # Anybody on the internet can cause these: a counter is enough.
            self._logger.debug("request_malformed", error=type(exc).__name__)
            self._metrics.requests.labels(NO_SOURCE, str(status)).inc()
            self._metrics.rejected.labels(NO_SOURCE, "malformed_request").inc()
            refusal = RefusedError(status, "malformed_request", "the request isn't well-formed HTTP")
            forget_frames(exc)
        else:
            # Counted and logged as a request already.
            if self._may_log_traceback("request_failed"):
                self._logger.error("request_failed", exception="none" if exc is None else traceback_of(exc))
            refusal = RefusedError(status, "bug", "the gateway failed")
        response = problem_response(refusal)
        response.force_close()
        return response


class TlsConnection(Connection):
    """A connection whose TLS is terminated here."""

    __slots__ = ("_read_certificate", "certificate")

    def __init__(
        self,
        server: Server,
        read_certificate: Callable[[SSLObject], VerifiedCertificate | None],
        *,
        loop: asyncio.AbstractEventLoop,
        peer: str | None,
        network: str,
    ) -> None:
        super().__init__(server, loop=loop, peer=peer, network=network)
        self._read_certificate = read_certificate
        self.certificate: VerifiedCertificate | None = None
        """The client's, if it was asked for one and has one."""

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.certificate = self._read_certificate(transport.get_extra_info("ssl_object"))
        super().connection_made(transport)
        transport.set_read_buffer_limits(high=TLS_READ_AHEAD)  # type: ignore[attr-defined] # TLS transports have it


def peer_of(request: web.BaseRequest) -> str:
    """Return the address of the other end of a request's connection; "" if it has none."""
    connection = request.protocol
    if isinstance(connection, Connection) and connection.peer is not None:
        return connection.peer
    return request.remote or ""  # still known after the connection is lost


def _is_error(message: object) -> bool:
    """Return whether what aiohttp has queued is a parse error instead of a request."""
    return getattr(message, "exc", None) is not None
