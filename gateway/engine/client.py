"""The delivery client: one attempt of one delivery, whatever the destination does.

    attempt ─▶ idle connection? ──yes──▶ exchange ─▶ answer
                    │ no                     │ dies without a byte of an answer: not charged, once
                    ▼                        ▼
                resolve ─▶ guard each address ─▶ connect ─▶ TLS ─▶ exchange ─▶ answer

It keeps its own connections instead of using aiohttp's session, which cannot send header bytes as they came, is blind
to the difference between a stale connection and a failed one, and costs several times as much (`wire.py`).
"""

import asyncio
import os
import socket
import ssl
import time
from functools import lru_cache
from http import HTTPStatus
from string import punctuation
from typing import NamedTuple, Self, cast
from urllib.parse import quote, urlsplit

from typing_extensions import override
from yarl import URL

from gateway.engine.egress import EgressGuard, EgressRefusedError
from gateway.engine.request import Outbound
from gateway.engine.resolver import Resolver, UnresolvedError
from gateway.engine.retry import parse_retry_after
from gateway.engine.wire import AnswerReader, MalformedAnswerError, encode_head
from gateway.model import Attempt, Result

IDLE_TIMEOUT = 15.0  # Longer than bursts are apart, shorter than most load balancers wait.
IDLE_LIMIT = 2000  # Idle connections over all destinations: file descriptors are finite.
BODY_PATIENCE = 1.0  # How long we wait for the rest of an answer whose head is there, only to save a connection.
CONNECT_PATIENCE = 1.0  # For each address but the last, so that a black hole leaves time for the next.


class Client:
    """Makes attempts. A context manager; afterwards nothing is open. Bounds nothing: the lanes do.

    Whoever leaves it has ended the attempts; those still under way fail as `transport`.
    `tls` is the context of destinations with https, the system's trust by default. The client closes the resolver.
    """

    def __init__(
        self, guard: EgressGuard, *, resolver: Resolver | None = None, tls: ssl.SSLContext | None = None
    ) -> None:
        self._guard = guard
        self._resolver = resolver or Resolver()
        self._tls = tls or ssl.create_default_context()
        self._pool: _Pool
        self._loop: asyncio.AbstractEventLoop

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._pool = _Pool(self._loop)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._resolver.close()
        await self._pool.close()

    @property
    def open_connections(self) -> int:
        """How many connections there are, the idle ones included."""
        return len(self._pool.connections)

    def use_guard(self, guard: EgressGuard) -> None:
        """Replace the guard: unless both say the same, no connection that there is now carries another request."""
        is_new = guard.egress != self._guard.egress
        self._guard = guard
        if is_new:
            self._pool.renew()

    async def attempt(self, outbound: Outbound, *, timeout: float, number: int) -> Attempt:
        """Send one request and return what came of it, within `timeout` seconds from now.

        The head of the answer decides: what then happens to its body (a drip, a break, no end) changes nothing.
        Redirects aren't followed. `detail` names the host at most, never the rest of the URL. Raises nothing for what
        a destination does; cancelling it closes the connection.
        """
        at = time.time()
        started = self._loop.time()
        status: int | None = None
        retry_after: float | None = None
        try:
            answer = await self._post(outbound, started + timeout)
        except _FailedError as failure:
            result, detail = failure.result, failure.detail
        else:
            status = answer.status
            result, detail = _judge(status)
            if answer.retry_after is not None and status in _THROTTLING:
                retry_after = parse_retry_after(answer.retry_after.decode("latin-1"), now=at)
        return Attempt(
            number=number,
            at=at,
            seconds=self._loop.time() - started,
            result=result,
            status=status,
            detail=detail,
            retry_after=retry_after,
        )

    async def _post(self, outbound: Outbound, deadline: float) -> AnswerReader:
        place, start = _locate(outbound.url)
        body = outbound.body
        head = encode_head(start, outbound.headers, len(body))
        connection = self._pool.take(place)
        if connection is not None:
            try:
                return await connection.exchange(head, body, deadline)
            except _StaleError:
                pass  # RFC 9112 §9.3.1: it was closed while we weren't looking
        connection = await self._dial(place, deadline)
        try:
            return await connection.exchange(head, body, deadline)
        except _StaleError as error:
            raise _FailedError(Result.TRANSPORT, f"{place.host}: {error}") from error

    async def _dial(self, place: "_Place", deadline: float) -> "_Connection":
        if self._pool.is_closed:
            raise _FailedError(Result.TRANSPORT, f"{place.host}: not sent, the gateway is stopping")
        stage = Result.DNS
        try:
            async with asyncio.timeout_at(deadline):
                found = await self._addresses(place)
                stage = Result.TIMEOUT
                connection = _Connection(self._pool, place)  # before the guard is asked, so that a new one renews it
                return await self._establish(connection, await self._connect(place, self._permitted(found)))
        except TimeoutError as error:
            missing = "an address" if stage is Result.DNS else "a connection"
            raise _FailedError(stage, f"{place.host}: expected {missing}, got none in time") from error
        except UnresolvedError as error:
            raise _FailedError(Result.DNS, str(error)) from error
        except EgressRefusedError as error:
            raise _FailedError(Result.EGRESS_REFUSED, str(error)) from error

    async def _addresses(self, place: "_Place") -> tuple[str, ...]:
        for family in (socket.AF_INET, socket.AF_INET6):
            try:
                socket.inet_pton(family, place.host)
            except OSError:
                continue
            return (place.host,)
        return await self._resolver.resolve(place.host)

    def _permitted(self, addresses: tuple[str, ...]) -> list[str]:
        """Return the addresses that may be dialled. Raises EgressRefusedError if there is none."""
        permitted: list[str] = []
        refusal: EgressRefusedError | None = None
        for address in addresses:
            try:
                self._guard.check(address)
            except EgressRefusedError as error:
                refusal = refusal or error
            else:
                permitted.append(address)
        if refusal is not None and not permitted:
            raise refusal
        return permitted

    async def _connect(self, place: "_Place", addresses: list[str]) -> socket.socket:
        """Return a connected socket, to the first address that takes it."""
        *others, last = addresses
        for address in others:
            try:
                async with asyncio.timeout(CONNECT_PATIENCE):
                    return await self._connect_to(address, place.port)
            except OSError:  # a TimeoutError is one
                continue
        try:
            return await self._connect_to(last, place.port)
        except OSError as error:
            raise _FailedError(Result.CONNECT, f"{place.host}:{place.port}: {_reason(error)}") from error

    async def _connect_to(self, address: str, port: int) -> socket.socket:
        connecting = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
        try:
            connecting.settimeout(0.0)
            await self._loop.sock_connect(connecting, (address, port))
        except BaseException:
            connecting.close()
            raise
        return connecting

    async def _establish(self, connection: "_Connection", connected: socket.socket) -> "_Connection":
        place = connection.place
        try:
            await self._loop.create_connection(
                lambda: connection,
                sock=connected,
                ssl=self._tls if place.is_tls else None,
                server_hostname=place.host.rstrip(".") if place.is_tls else None,
            )
        except OSError as error:  # an ssl.SSLError is one
            result = Result.TLS if place.is_tls else Result.CONNECT
            raise _FailedError(result, f"{place.host}: {_reason(error)}") from error
        finally:
            if not connection.is_open:
                connected.close()
        return connection


class _Place(NamedTuple):
    """Where a connection leads to; the destinations at one place share those to it, as a browser's pages do."""

    host: str
    port: int
    is_tls: bool


@lru_cache(maxsize=16384)
def _locate(url: str) -> tuple[_Place, bytes]:
    """Return where a URL leads, and the start of each request that goes there."""
    parsed = URL(url)
    if parsed.raw_host is None or parsed.port is None:
        raise ValueError("destination url: expected http or https with a host")
    place = _Place(parsed.raw_host, parsed.port, parsed.scheme == "https")
    # As the operators wrote it: yarl would unquote what need not be quoted, and a token may be compared as text.
    parts = urlsplit(url)
    target = quote((parts.path or "/") + (f"?{parts.query}" if parts.query else ""), safe=punctuation)
    start = f"POST {target} HTTP/1.1\r\nHost: {parsed.host_port_subcomponent}\r\n"
    return place, start.encode("ascii")


class _FailedError(Exception):
    """The attempt ended without an answer; the destination, or the way to it, is at fault."""

    def __init__(self, result: Result, detail: str) -> None:
        super().__init__(detail)
        self.result = result
        self.detail = detail


class _StaleError(Exception):
    """The connection ended without a byte of an answer."""


class _Pool:
    """The connections of a client, and which of them are idle."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.connections: set[_Connection] = set()
        self.generation = 0
        self.is_closed = False
        self._emptied = asyncio.Event()
        self._loop = loop
        self._idle: dict[_Place, list[_Connection]] = {}
        self._idle_count = 0
        self._sweeper = loop.call_later(IDLE_TIMEOUT / 3, self._sweep)

    def take(self, place: _Place) -> "_Connection | None":
        """Return the connection that was used last: what isn't needed grows old."""
        connections = self._idle.get(place)
        while connections:
            connection = connections.pop()
            self._idle_count -= 1
            if connection.is_open:
                return connection
        return None

    def give_back(self, connection: "_Connection") -> None:
        if connection.generation == self.generation and self._idle_count < IDLE_LIMIT and connection.is_open:
            connection.idle_since = self._loop.time()
            self._idle.setdefault(connection.place, []).append(connection)
            self._idle_count += 1
        else:
            connection.abort()

    def renew(self) -> None:
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
            await self._emptied.wait()

    def add(self, connection: "_Connection") -> None:
        self.connections.add(connection)
        if self.is_closed:
            connection.abort()

    def discard(self, connection: "_Connection") -> None:
        self.connections.discard(connection)
        if not self.connections:
            self._emptied.set()

    def _sweep(self) -> None:
        oldest = self._loop.time() - IDLE_TIMEOUT
        for place, connections in list(self._idle.items()):
            kept = [connection for connection in connections if connection.is_open and connection.idle_since >= oldest]
            for connection in connections:
                if connection.idle_since < oldest:
                    connection.abort()
            self._idle_count -= len(connections) - len(kept)
            if kept:
                self._idle[place] = kept
            else:
                del self._idle[place]
        self._sweeper = self._loop.call_later(IDLE_TIMEOUT / 3, self._sweep)


class _Connection(asyncio.Protocol):
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
        "place",
    )

    def __init__(self, pool: _Pool, place: _Place) -> None:
        self.place = place
        self.generation = pool.generation
        self.idle_since = 0.0
        self.is_open = False
        self._pool = pool
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._reader = AnswerReader()
        self._answered: asyncio.Future[None] | None = None
        self._deadline = 0.0
        self._expiry: asyncio.TimerHandle | None = None

    async def exchange(self, head: bytes, body: bytes, deadline: float) -> AnswerReader:
        """Send a request and return its answer, read as far as we want it.

        Raises _StaleError when the connection dies before a byte of it, _FailedError when it isn't there in time or
        isn't one. The connection is released or closed when this returns.
        """
        if not self.is_open:
            raise _StaleError("connection closed without an answer")
        self._reader = reader = AnswerReader()
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
            self._pool.give_back(self)
        else:
            self.abort()
        return reader

    def abort(self) -> None:
        if self.is_open:
            self.is_open = False
            self._transport.abort()

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
            self._fail(_FailedError(Result.TRANSPORT, f"{self.place.host}: {error}"))
            return
        if is_over:
            self._answered.set_result(None)
        elif reader.status and not is_head_there and self._expiry is not None:
            self._expiry.cancel()
            self._expiry = self._loop.call_at(min(self._deadline, self._loop.time() + BODY_PATIENCE), self._expire)

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self.is_open = False
        self._pool.discard(self)
        if isinstance(exc, ssl.SSLError):  # in TLS 1.3 a refusal comes after our side of the handshake
            self._fail(_FailedError(Result.TLS, f"{self.place.host}: {_reason(exc)}"))
        elif not self._reader.has_started:
            self._fail(_StaleError(_reason(exc) if exc else "connection closed without an answer"))
        else:
            self._fail(
                _FailedError(Result.TRANSPORT, f"{self.place.host}: connection closed in the middle of an answer")
            )

    def _expire(self) -> None:
        self._fail(_FailedError(Result.TIMEOUT, f"{self.place.host}: expected an answer, got none in time"))

    def _fail(self, failure: Exception) -> None:
        """End the exchange: well if the head of the answer is there, since the rest of it is nobody's concern."""
        if self._answered is None or self._answered.done():
            return
        if self._reader.status:
            self._reader.is_reusable = False
            self._answered.set_result(None)
        else:
            self._answered.set_exception(failure)


def _judge(status: int) -> tuple[Result, str]:
    """Return what a status means, and the words for it: ours, for the destination's could hold anything."""
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        result = Result.THROTTLED
    else:
        result = _CLASSES.get(status // 100, Result.TRANSPORT)
    if result is Result.SUCCESS:
        return result, ""
    try:
        return result, f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        return result, str(status)


def _reason(error: Exception) -> str:
    """Say in a few words, none of them the destination's, what the system had against it."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate not accepted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return (error.reason or "tls error").lower().replace("_", " ")
    if isinstance(error, OSError) and error.errno is not None:
        return os.strerror(error.errno).lower()
    return "connection closed" if isinstance(error, OSError) else type(error).__name__


_THROTTLING = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
_CLASSES = {2: Result.SUCCESS, 3: Result.REDIRECT, 4: Result.CLIENT_ERROR, 5: Result.SERVER_ERROR}
