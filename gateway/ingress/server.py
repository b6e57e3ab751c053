"""Connections: aiohttp's own, with a deadline and a size limit for each request head, and our error responses."""

import asyncio
import fcntl
import http.client
import socket
import termios
from array import array
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus
from ssl import SSLObject
from typing import NamedTuple

from aiohttp import StreamReader, web
from structlog.typing import FilteringBoundLogger
from typing_extensions import override

from gateway.ingress.responses import SERVER, problem_response
from gateway.model import RefusedError
from gateway.telemetry.logs import trace_of
from gateway.telemetry.metrics import NO_SOURCE, Metrics
from gateway.verify.client_certificates import VerifiedCertificate

# Longer than the 60 s for which load balancers reuse an idle connection, so that they close first.
KEEP_ALIVE = 75.0
# How long a refused body is read and thrown away, so that its sender sees the response instead of a reset.
LINGER = 5.0
# aiohttp's own limits on a request line and on a header; it accepts 128 headers.
MAX_LINE = 16 * 1024
# Limit of an incomplete head, as a multiple of `Limits.head_bytes`, which doesn't count line ends and separators.
HEAD_FRAMING = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of one request or connection, and of all of them together."""

    head_bytes: int = 32 * 1024
    """Header names, values and the query together."""
    head_seconds: float = 10.0
    """From the first bytes of a request to the end of its headers."""
    body_seconds: float = 10.0
    """From the end of the headers to the end of the body."""
    connections: int | None = None
    """Open ones, whose silent ones are closed to let others in; None for what the descriptors allow."""
    opening: int = 512
    """Connections whose PROXY header or TLS handshake isn't complete."""
    opening_seconds: float = 5.0
    """From the start of a connection to the end of its PROXY header, and from there to the end of its handshake."""
    in_flight_bytes: int = 64 * 1024 * 1024
    """Bodies in memory that aren't acknowledged yet, over all requests."""


class Server(web.Server):
    """Creates connections that don't log bad requests as errors."""

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

    @property
    def count(self) -> int:
        """How many connections are open."""
        return len(self._connections)

    @override
    def __call__(self) -> web.RequestHandler:
        return Connection(self, loop=asyncio.get_running_loop())


class Connection(web.RequestHandler):
    """A connection whose error responses are problems (RFC 9457), and whose errors go to our log."""

    __slots__ = ("_has_begun", "_head_ends", "_head_size", "_limits", "_log", "_metrics", "network", "peer", "unread")

    def __init__(
        self, server: Server, *, loop: asyncio.AbstractEventLoop, peer: str | None = None, network: str = ""
    ) -> None:
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
        self.peer = peer
        """The address of the other end, if a PROXY header tells it; "" if nobody does."""
        self.network = network
        """The network of the other end (`network_of`)."""

    @property
    def silent_since(self) -> float | None:
        """Since when it waits for a request, its first or another, by the loop's clock; None while there is any of one.

        aiohttp notes the time anyway, for `keepalive_timeout`.
        """
        waiter = self._waiter
        if waiter is None or waiter.done() or self._messages or self._head_ends is not None:
            return None
        return self._next_keepalive_close_time - KEEP_ALIVE

    def close_silent(self) -> bool:
        """Close it at once, if nothing has come that isn't read yet; return whether it is closed.

        A request that its client sends at the same moment is lost, as it would be at the end of any idle connection. Of
        TLS, the first part of a record that was read is nothing yet: no event loop tells of it.
        """
        transport = self.transport
        if transport is None or _has_unread(transport.get_extra_info("socket")):
            return False
        self.force_close()
        transport.abort()  # TLS would wait for the other end to say that it has got everything
        return True

    @override
    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        # aiohttp waits for a head with this future; bytes that leave it pending are part of a head. On a busy loop the
        # first bytes arrive before it begins to wait: unless they are a whole request, they are part of a head, too.
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

    def _end_head(self, response: "_RawResponse") -> None:
        """Close a connection with an incomplete request head: it isn't idle, so KEEP_ALIVE doesn't apply."""
        if self._head_ends is not None:
            self._head_ends.cancel()
        if self.transport is not None:
            self._log.debug("request_malformed", error="a head that doesn't end")
            self._metrics.requests.labels(NO_SOURCE, str(response.status)).inc()
            self._metrics.rejected.labels(NO_SOURCE, response.reason).inc()
            self.transport.write(response.data)
            self.force_close()

    @override
    def connection_lost(self, exc: BaseException | None) -> None:
        super().connection_lost(exc)
        if self._head_ends is not None:
            self._head_ends.cancel()
        # aiohttp doesn't tell the reader that discards a refused body (LINGER) that no more of it comes.
        if self.unread is not None:
            self.unread.feed_eof()
            self.unread = None  # it refers to us
        for message, _ in self._messages:  # that nobody came to: a malformed rest of a body is one
            forget_frames(getattr(message, "exc", None))

    @override
    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """Respond to malformed requests (400), and to requests that failed by a bug of ours (500)."""
        if status < HTTPStatus.INTERNAL_SERVER_ERROR:
            # Anybody on the internet can cause these: a counter is enough.
            self._log.debug("request_malformed", error=type(exc).__name__)
            self._metrics.requests.labels(NO_SOURCE, str(status)).inc()
            self._metrics.rejected.labels(NO_SOURCE, "malformed_request").inc()
            refusal = RefusedError(status, "malformed_request", "the request isn't HTTP as we read it")
            forget_frames(exc)
        else:
            # Counted and logged as a request already.
            self._log.error("request_failed", exception="none" if exc is None else trace_of(exc))
            refusal = RefusedError(status, "bug", "the gateway failed")
        response = problem_response(refusal)
        response.force_close()
        return response


class TlsConnection(Connection):
    """A connection whose TLS ends here."""

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


def peer_of(request: web.BaseRequest) -> str:
    """Return the address of the other end of a request's connection; "" if it has none."""
    connection = request.protocol
    if isinstance(connection, Connection) and connection.peer is not None:
        return connection.peer
    return request.remote or ""


def _has_unread(connection: socket.socket) -> bool:
    """Return whether the kernel has bytes for us."""
    waiting = array("i", [0])
    fcntl.ioctl(connection.fileno(), termios.FIONREAD, waiting)
    return waiting[0] > 0


def forget_frames(error: BaseException | None) -> None:
    """Let go of where the error of a request was raised.

    The request keeps the error, and the frames refer to the request: only the garbage collector would free them. What
    it finds of a thousand refused connections holds all others up for 30 ms.
    """
    if error is not None:
        error.__traceback__ = None


class _RawResponse(NamedTuple):
    """The response to a request head that is too slow or too large."""

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


TOO_SLOW = _RawResponse(408, "head_slow")


TOO_LARGE = _RawResponse(431, "head_too_large")
