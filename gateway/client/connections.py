"""Connections to destinations, with one exchange at a time on each, and a pool of idle ones."""

import asyncio
import os
import ssl
from collections import OrderedDict
from contextlib import suppress
from typing import NamedTuple, cast

from typing_extensions import override

from gateway.client.http1 import MalformedResponseError, ResponseReader
from gateway.model import Result
from gateway.rules.rules import Proxy, Tls
from gateway.sockets import has_unread, has_unsent

IDLE_TIMEOUT = 15.0  # Longer than the gap between bursts, shorter than most load balancers' timeouts.
IDLE_LIMIT = 2000  # Maximum idle connections of all destinations: file descriptors are finite.


BODY_TIMEOUT = 1.0  # Maximum wait for the rest of a response after its head, only to reuse the connection.
CLOSE_TIMEOUT = 1.0  # Maximum wait for closed connections to be reported as lost.
LARGE = 64 * 1024  # Bytes of a body that the kernel on either side may not take at once.


class Origin(NamedTuple):
    """The target of a connection, with our TLS identity and proxy; requests with equal origins share connections."""

    host: str
    port: int
    is_tls: bool
    tls: Tls | None = None
    proxy: Proxy | None = None


class FailedError(Exception):
    """The attempt ended without a response; the destination, or the path to it, is at fault."""

    def __init__(self, result: Result, detail: str) -> None:
        super().__init__(detail)
        self.result = result
        self.detail = detail


class StaleError(Exception):
    """The connection ended without a byte of a response."""


def describe_failure(error: Exception) -> str:
    """Describe an error briefly, with none of the destination's own words."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate not accepted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return (error.reason or "tls error").lower().replace("_", " ")
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno).lower()
    return "connection closed" if isinstance(error, OSError) else type(error).__name__


class Pool:
    """The connections of a client, including idle ones."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.connections: set[Connection] = set()
        self.generation = 0
        self.is_closed = False
        self._emptied = asyncio.Event()
        self._loop = loop
        self._idle: dict[Origin, dict[Connection, None]] = {}  # those of each, in the order of their release
        self._by_release: OrderedDict[Connection, None] = OrderedDict()  # all of them
        self._sweeper = loop.call_later(IDLE_TIMEOUT / 3, self._sweep)

    def take(self, origin: Origin) -> "Connection | None":
        """Return the connection that was used most recently, so that surplus ones time out."""
        connections = self._idle.get(origin)
        while connections:
            connection, _ = connections.popitem()
            del self._by_release[connection]
            if connection.is_reusable():
                return connection
            connection.abort()
        return None

    def release(self, connection: "Connection") -> None:
        """Keep a connection for the next request. If there are too many, the one that is idle for longest is closed."""
        if connection.generation != self.generation or not connection.is_open:
            connection.abort()
            return
        connection.idle_since = self._loop.time()
        self._idle.setdefault(connection.origin, {})[connection] = None
        self._by_release[connection] = None
        if len(self._by_release) > IDLE_LIMIT:
            self._close_longest_idle()

    def invalidate(self) -> None:
        """Close the idle connections, and don't reuse those in use."""
        self.generation += 1
        while self._by_release:
            self._close_longest_idle()

    async def close(self) -> None:
        self._sweeper.cancel()
        self.is_closed = True
        self._emptied.clear()
        for connection in list(self.connections):
            connection.abort()
        if self.connections:  # each is removed when the event loop reports it as lost
            with suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_TIMEOUT):
                    await self._emptied.wait()

    def add(self, connection: "Connection") -> None:
        self.connections.add(connection)
        if self.is_closed:
            connection.abort()

    def discard(self, connection: "Connection") -> None:
        self.connections.discard(connection)
        self._forget_idle(connection)
        if not self.connections:
            self._emptied.set()

    def _sweep(self) -> None:
        oldest = self._loop.time() - IDLE_TIMEOUT
        while self._by_release and next(iter(self._by_release)).idle_since < oldest:
            self._close_longest_idle()
        self._idle = {origin: connections for origin, connections in self._idle.items() if connections}
        self._sweeper = self._loop.call_later(IDLE_TIMEOUT / 3, self._sweep)

    def _close_longest_idle(self) -> None:
        connection = next(iter(self._by_release))
        self._forget_idle(connection)
        connection.abort()

    def _forget_idle(self, connection: "Connection") -> None:
        if connection in self._by_release:
            del self._by_release[connection]
            del self._idle[connection.origin][connection]


class Connection(asyncio.Protocol):
    """A connection, with one exchange at a time."""

    __slots__ = (
        "_deadline",
        "_descriptor",
        "_expiry",
        "_loop",
        "_pool",
        "_reader",
        "_response_done",
        "_transport",
        "generation",
        "idle_since",
        "is_open",
        "origin",
    )

    def __init__(self, pool: Pool, origin: Origin, generation: int) -> None:
        self.origin = origin
        self.generation = generation
        self.idle_since = 0.0
        self.is_open = False
        self._pool = pool
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._reader = ResponseReader()
        self._response_done: asyncio.Future[None] | None = None
        self._deadline = 0.0
        self._expiry: asyncio.TimerHandle | None = None

    async def exchange(self, head: bytes, body: bytes, deadline: float, reader: ResponseReader) -> ResponseReader:
        """Send a request and return its response, as far as `reader` reads it.

        Raises StaleError if the connection is closed before the response's first byte, FailedError if there is no
        valid response in time. The connection is released or closed when this returns.
        """
        if not self.is_open:
            raise StaleError("connection closed without a response")
        self._reader = reader
        self._response_done = response_done = self._loop.create_future()
        self._deadline = deadline
        self._expiry = self._loop.call_at(deadline, self._expire)
        try:
            self._transport.writelines((head, body))
            await response_done
        except BaseException:
            self.abort()
            raise
        finally:
            self._response_done = None
            self._expiry.cancel()
            del response_done  # breaks a reference cycle with an error's traceback
        if reader.is_reusable and self._is_written(body):
            self._pool.release(self)
        else:
            self.abort()
        return reader

    def _is_written(self, body: bytes) -> bool:
        """Return whether nothing of the request is left to write.

        Otherwise the destination has responded before it has read it, and would parse the rest as the next request.
        TLS encrypts all of it at once, and doesn't tell what waits after that: the kernel then has some of it, too.
        """
        try:
            is_in_kernel = len(body) >= LARGE and has_unsent(self._descriptor)
        except OSError:  # closed meanwhile
            return False
        return not is_in_kernel and not self._transport.get_write_buffer_size()

    def is_reusable(self) -> bool:
        """Return whether an idle connection is open, and nothing of it is unread.

        What nobody has asked for, and the event loop has had no time to read yet, would be taken for the response to
        the next request.
        """
        try:
            return self.is_open and not has_unread(self._descriptor)
        except OSError:  # closed: of TLS, we are told one iteration of the loop later
            return False

    def abort(self) -> None:
        if self.is_open:
            self.is_open = False
            self._transport.abort()

    def discard(self) -> None:
        """Remove it from the pool before it is used: uvloop doesn't report it as lost if connecting was cancelled."""
        self.abort()
        self._pool.discard(self)

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._descriptor: int = transport.get_extra_info("socket").fileno()
        self.is_open = True
        self._pool.add(self)

    @override
    def data_received(self, data: bytes) -> None:
        if self._response_done is None or self._response_done.done():
            self.abort()  # an unrequested response, often a 408 on an idle connection
            return
        reader = self._reader
        if not reader.has_started:
            reader.started_at = self._loop.time()
        is_head_there = bool(reader.status)
        try:
            is_over = reader.feed(data)
        except MalformedResponseError as error:
            self._fail(FailedError(Result.TRANSPORT, f"{self.origin.host}: {error}"))
            return
        if is_over:
            self._response_done.set_result(None)
        elif reader.status and not is_head_there and self._expiry is not None and not reader.needs_body:
            self._expiry.cancel()
            self._expiry = self._loop.call_at(min(self._deadline, self._loop.time() + BODY_TIMEOUT), self._expire)

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        self._pool.discard(self)
        if exc is None:
            self._reader.feed_eof()
        if isinstance(exc, ssl.SSLError) and not self.idle_since:
            # In TLS 1.3 a refusal arrives after our side of the handshake; a connection that was used before is stale.
            self._fail(FailedError(Result.TLS, f"{self.origin.host}: {describe_failure(exc)}"))
        elif not self._reader.has_started:
            self._fail(StaleError(describe_failure(exc) if exc else "connection closed without a response"))
        else:
            self._fail(
                FailedError(Result.TRANSPORT, f"{self.origin.host}: connection closed in the middle of a response")
            )

    def _expire(self) -> None:
        self._fail(FailedError(Result.TIMEOUT, f"{self.origin.host}: expected a response, got none in time"))

    def _fail(self, failure: Exception) -> None:
        """End the exchange: with success if the head of the response is there, since the body doesn't matter."""
        if self._response_done is None or self._response_done.done():
            return
        if self._reader.status:
            self._reader.is_reusable = False
            self._response_done.set_result(None)
        else:
            self._response_done.set_exception(failure)
