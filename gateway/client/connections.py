"""Connections to destinations: one exchange at a time on each, and those that are idle kept for the next."""

import asyncio
import os
import ssl
from contextlib import suppress
from typing import NamedTuple, cast

from typing_extensions import override

from gateway.client.http1 import AnswerReader, MalformedAnswerError
from gateway.model import Result
from gateway.rules.rules import Proxy, Tls

IDLE_TIMEOUT = 15.0  # Longer than bursts are apart, shorter than most load balancers wait.
IDLE_LIMIT = 2000  # Idle connections over all destinations: file descriptors are finite.


BODY_TIMEOUT = 1.0  # How long we wait for the rest of an answer whose head is there, only to save a connection.
CLOSE_TIMEOUT = 1.0  # For connections of which nobody tells that they are lost.


class Origin(NamedTuple):
    """Where a connection leads to, as whom, and which way: those who agree in all of it share the connections to it."""

    host: str
    port: int
    is_tls: bool
    tls: Tls | None = None
    proxy: Proxy | None = None


class FailedError(Exception):
    """The attempt ended without an answer; the destination, or the way to it, is at fault."""

    def __init__(self, result: Result, detail: str) -> None:
        super().__init__(detail)
        self.result = result
        self.detail = detail


class StaleError(Exception):
    """The connection ended without a byte of an answer."""


def describe_failure(error: Exception) -> str:
    """Say in a few words, none of them the destination's, what the system had against it."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate not accepted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return (error.reason or "tls error").lower().replace("_", " ")
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno).lower()
    return "connection closed" if isinstance(error, OSError) else type(error).__name__


class Pool:
    """The connections of a client, and which of them are idle."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.connections: set[Connection] = set()
        self.generation = 0
        self.is_closed = False
        self._emptied = asyncio.Event()
        self._loop = loop
        self._idle: dict[Origin, list[Connection]] = {}
        self._idle_count = 0
        self._sweeper = loop.call_later(IDLE_TIMEOUT / 3, self._sweep)

    def take(self, origin: Origin) -> "Connection | None":
        """Return the connection that was used last: what isn't needed grows old."""
        connections = self._idle.get(origin)
        while connections:
            connection = connections.pop()
            self._idle_count -= 1
            if connection.is_open:
                return connection
        return None

    def release(self, connection: "Connection") -> None:
        if connection.generation == self.generation and self._idle_count < IDLE_LIMIT and connection.is_open:
            connection.idle_since = self._loop.time()
            self._idle.setdefault(connection.origin, []).append(connection)
            self._idle_count += 1
        else:
            connection.abort()

    def invalidate(self) -> None:
        """Let no connection of now be used again."""
        self.generation += 1
        for connections in self._idle.values():
            for connection in connections:
                connection.abort()
        self._idle.clear()
        self._idle_count = 0

    async def close(self) -> None:
        self._sweeper.cancel()
        self.is_closed = True
        self._emptied.clear()
        for connection in list(self.connections):
            connection.abort()
        if self.connections:  # each leaves when the event loop tells it that it is lost
            with suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_TIMEOUT):
                    await self._emptied.wait()

    def add(self, connection: "Connection") -> None:
        self.connections.add(connection)
        if self.is_closed:
            connection.abort()

    def discard(self, connection: "Connection") -> None:
        self.connections.discard(connection)
        if not self.connections:
            self._emptied.set()

    def _sweep(self) -> None:
        oldest = self._loop.time() - IDLE_TIMEOUT
        for origin, connections in list(self._idle.items()):
            kept = [connection for connection in connections if connection.is_open and connection.idle_since >= oldest]
            for connection in connections:
                if connection.idle_since < oldest:
                    connection.abort()
            self._idle_count -= len(connections) - len(kept)
            if kept:
                self._idle[origin] = kept
            else:
                del self._idle[origin]
        self._sweeper = self._loop.call_later(IDLE_TIMEOUT / 3, self._sweep)


class Connection(asyncio.Protocol):
    """One connection, which carries one exchange at a time."""

    __slots__ = (
        "_answered",
        "_deadline",
        "_expiry",
        "_loop",
        "_pool",
        "_reader",
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
        self._reader = AnswerReader()
        self._answered: asyncio.Future[None] | None = None
        self._deadline = 0.0
        self._expiry: asyncio.TimerHandle | None = None

    async def exchange(self, head: bytes, body: bytes, deadline: float, reader: AnswerReader) -> AnswerReader:
        """Send a request and return its answer, by `reader` and read as far as we want it.

        Raises StaleError when the connection dies before a byte of it, FailedError when it isn't there in time or
        isn't one. The connection is released or closed when this returns.
        """
        if not self.is_open:
            raise StaleError("connection closed without an answer")
        self._reader = reader
        self._answered = answered = self._loop.create_future()
        self._deadline = deadline
        self._expiry = self._loop.call_at(deadline, self._expire)
        try:
            self._transport.writelines((head, body))
            await answered
        except BaseException:
            self.abort()
            raise
        finally:
            self._answered = None
            self._expiry.cancel()
        # Bytes left to write: it answered before it had read the request, and would take the rest for the next one.
        if reader.is_reusable and not self._transport.get_write_buffer_size():
            self._pool.release(self)
        else:
            self.abort()
        return reader

    def abort(self) -> None:
        if self.is_open:
            self.is_open = False
            self._transport.abort()

    def discard(self) -> None:
        """Forget it before it is used: uvloop doesn't tell it that it is lost, if its dial was cancelled."""
        self.abort()
        self._pool.discard(self)

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self.is_open = True
        self._pool.add(self)

    @override
    def data_received(self, data: bytes) -> None:
        if self._answered is None or self._answered.done():
            self.abort()  # nobody asked: often a 408 on an idle connection
            return
        reader = self._reader
        is_head_there = bool(reader.status)
        try:
            is_over = reader.feed(data)
        except MalformedAnswerError as error:
            self._fail(FailedError(Result.TRANSPORT, f"{self.origin.host}: {error}"))
            return
        if is_over:
            self._answered.set_result(None)
        elif reader.status and not is_head_there and self._expiry is not None and reader.kept is None:
            self._expiry.cancel()
            self._expiry = self._loop.call_at(min(self._deadline, self._loop.time() + BODY_TIMEOUT), self._expire)

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        self._pool.discard(self)
        if exc is None:
            self._reader.feed_eof()
        if isinstance(exc, ssl.SSLError) and not self.idle_since:
            # In TLS 1.3 a refusal comes after our side of the handshake; one that was good before is stale.
            self._fail(FailedError(Result.TLS, f"{self.origin.host}: {describe_failure(exc)}"))
        elif not self._reader.has_started:
            self._fail(StaleError(describe_failure(exc) if exc else "connection closed without an answer"))
        else:
            self._fail(
                FailedError(Result.TRANSPORT, f"{self.origin.host}: connection closed in the middle of an answer")
            )

    def _expire(self) -> None:
        self._fail(FailedError(Result.TIMEOUT, f"{self.origin.host}: expected an answer, got none in time"))

    def _fail(self, failure: Exception) -> None:
        """End the exchange: well if the head of the answer is there, since the rest of it is nobody's concern."""
        if self._answered is None or self._answered.done():
            return
        if self._reader.status:
            self._reader.is_reusable = False
            self._answered.set_result(None)
        else:
            self._answered.set_exception(failure)
