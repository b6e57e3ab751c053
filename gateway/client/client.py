"""The delivery client: one attempt of one delivery, whatever the destination does.

    attempt ─▶ idle connection? ──yes──▶ exchange ─▶ response
                    │ no                     │ closed without a byte of a response: repeated once
                    ▼                        ▼
                resolve ─▶ guard each address ─▶ connect ─▶ TLS ─▶ exchange ─▶ response
                    (of the proxy, where there is one)  └▶ CONNECT ─▶ TLS with the destination

It manages its own connections instead of using aiohttp's session, which can't send header bytes unchanged, doesn't
distinguish a stale connection from a failed one, and costs several times as much (`http1.py`).
"""

import asyncio
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import replace
from functools import lru_cache, partial
from http import HTTPStatus
from string import punctuation
from typing import NamedTuple, Self, TypeVar
from urllib.parse import quote, urlsplit

from yarl import URL

from gateway.client.connections import Connection, FailedError, Origin, Pool, StaleError, describe_failure
from gateway.client.egress import EgressGuard, EgressRefusedError
from gateway.client.http1 import RESPONSE_LIMIT, MalformedResponseError, ResponseReader, encode_head
from gateway.client.oauth import NoTokenError, Token, Tokens
from gateway.client.observation import Observation
from gateway.client.request import USER_AGENT, Outbound, Senders
from gateway.client.resolver import Resolver, UnresolvedError, is_canonical, literal_address
from gateway.client.retry_after import THROTTLING, parse_retry_after
from gateway.model import Attempt, DestinationResponse, Headers, Result, UnfetchedError
from gateway.rules.request_templates import Method
from gateway.rules.rules import Destination, DestinationAccess, Proxy, Tls

_JSON = (b"Content-Type", b"application/json")
SENDERS_RESPONSE_LIMIT = 64 * 1024  # Maximum bytes of a body that a waiting sender gets; of a longer one it gets none.
CONNECT_TIMEOUT = 1.0  # For each address but the last, so that an unreachable one leaves time for the next.


T = TypeVar("T")


class Client:
    """Makes attempts. A context manager that closes all connections. Concurrency is limited by the lanes, not here.

    On exit, attempts in flight fail as `transport`. `tls` is the context for https destinations without their own; by
    default it has the system's authorities. The client closes the resolver. `clock` (Unix seconds) is for the times of
    attempts, and for dates in Retry-After. `senders` are those that may wait for a response.
    """

    def __init__(
        self,
        guard: EgressGuard,
        *,
        resolver: Resolver | None = None,
        tls: ssl.SSLContext | None = None,
        clock: Callable[[], float] = time.time,
        senders: Senders | None = None,
    ) -> None:
        self._clock = clock
        self._senders = senders
        self._guard = guard
        self._resolver = resolver or Resolver()
        self._tls = tls or ssl.create_default_context()
        self._pool: Pool
        self._tokens: Tokens
        self._loop: asyncio.AbstractEventLoop

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        self._pool = Pool(self._loop)
        self._tokens = Tokens(self.request_token, self._loop.time)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._resolver.close()
        await self._pool.close()

    @property
    def open_connections(self) -> int:
        """The number of connections, including idle ones."""
        return len(self._pool.connections)

    def set_guard(self, guard: EgressGuard) -> None:
        """Replace the guard; unless it is equal, existing connections aren't used for further requests."""
        is_new = guard.egress != self._guard.egress
        self._guard = guard
        if is_new:
            self._pool.invalidate()

    def retain_only(self, destinations: Iterable[Destination]) -> None:
        """Forget certificates, private keys and tokens of all but these destinations.

        Those still in use are freed when the attempt or connection ends, some only by the next call.
        """
        _locate_via.cache_clear()
        wanted = {
            (destination.url, destination.access)
            for destination in destinations
            if destination.access is not None and destination.access.oauth2 is not None
        }
        self._tokens.retain_only(wanted)

    async def attempt(self, outbound: Outbound, *, timeout: float, number: int) -> Attempt:
        """Send one request and return its result, within `timeout` seconds from now.

        The head of the response decides: if its body is slow, breaks off or never ends, the result is the same.
        Redirects aren't followed. Of the URL, `detail` contains the host at most. Failures of the destination aren't
        raised; cancelling closes the connection. With OAuth2, after a 401 a new token is fetched and
        the request is sent again, once per token and as part of the same attempt.
        """
        if self._senders is not None and self._senders.wait_for(outbound):
            return await self._attempt_for_sender(outbound, self._senders, timeout=timeout, number=number)
        return (await self._attempt(outbound, ResponseReader, timeout=timeout, number=number))[0]

    async def _attempt_for_sender(
        self, outbound: Outbound, senders: Senders, *, timeout: float, number: int
    ) -> Attempt:
        """Make an attempt, and give its response, body included, to the sender that waits for it."""
        response: ResponseReader | None = None
        if outbound.observation is None:  # needed to mask the tokens that were sent
            outbound = replace(outbound, observation=Observation(self._loop.time))
        try:
            reader = partial(ResponseReader, keeps_body=True, limit=SENDERS_RESPONSE_LIMIT)
            attempt, response = await self._attempt(outbound, reader, timeout=timeout, number=number)
            return attempt
        finally:
            found = None
            if response is not None and response.body is not None:
                found = DestinationResponse(
                    status=response.status,
                    content_type=response.header(b"content-type"),
                    content_encoding=response.header_list(b"content-encoding"),
                    body=response.body,
                )
            senders.take(outbound, found)

    async def _attempt(
        self, outbound: Outbound, reader: Callable[[], ResponseReader], *, timeout: float, number: int
    ) -> tuple[Attempt, ResponseReader | None]:
        at = self._clock()
        started = self._loop.time()
        status: int | None = None
        retry_after: float | None = None
        response: ResponseReader | None = None
        try:
            if outbound.access is None or outbound.access.oauth2 is None:
                response = await self._send(outbound, started + timeout, reader)
            else:
                response = await self._send_with_token(outbound, outbound.access, started + timeout, reader)
        except FailedError as failure:
            result, detail = failure.result, failure.detail
        except NoTokenError as error:
            result, detail = Result.AUTH, str(error)
        else:
            status = response.status
            result, detail = _classify(status)
            if response.retry_after is not None and status in THROTTLING:
                retry_after = parse_retry_after(response.retry_after.decode("latin-1"), now=self._clock())
        attempt = Attempt(
            number=number,
            at=at,
            seconds=self._loop.time() - started,
            result=result,
            status=status,
            detail=detail,
            retry_after=retry_after,
        )
        return attempt, response

    async def _send_with_token(
        self, outbound: Outbound, access: DestinationAccess, deadline: float, reader: Callable[[], ResponseReader]
    ) -> ResponseReader:
        token = await self._tokens.get(outbound.url, access, deadline)
        response = await self._send(_authorized(outbound, token), deadline, reader)
        if response.status == HTTPStatus.UNAUTHORIZED:
            newer = await self._tokens.renew(outbound.url, access, deadline, token)
            if newer is None:
                return response
            token = newer
            response = await self._send(_authorized(outbound, token), deadline, reader)
        if response.status != HTTPStatus.UNAUTHORIZED:
            self._tokens.accepted(token)
        return response

    async def fetch(self, url: str, *, timeout: float, limit: int, request_body: bytes = b"") -> bytes:
        """Return the document of at most `limit` bytes at an https address, within `timeout` seconds from now.

        With `request_body`, it is the response to a POST of that JSON. Redirects aren't followed. Raises
        UnfetchedError, whose text has nothing of the response but its status; ValueError unless the address is https.
        """
        address = _locate(url)
        origin = address.origin
        if not origin.is_tls:
            raise ValueError("address of a document: expected https")
        if request_body:
            head = encode_head(address.start, (USER_AGENT, _JSON), len(request_body))
        else:
            head = encode_head(address.start_of(Method.GET), (USER_AGENT,), None)
        reader = partial(ResponseReader, needs_body=True, limit=limit)
        try:
            response = await self._exchange(origin, head, request_body, self._loop.time() + timeout, reader)
        except FailedError as failure:
            raise UnfetchedError(failure.detail) from failure
        status = response.status
        if status != HTTPStatus.OK:
            is_gone = status in (HTTPStatus.NOT_FOUND, HTTPStatus.GONE)
            raise UnfetchedError(f"{origin.host}: expected a document, got {_phrase(status)}", is_gone=is_gone)
        if response.body is None:
            raise UnfetchedError(
                f"{origin.host}: expected a complete document of at most {limit} bytes, got something else"
            )
        return response.body

    async def request_token(
        self, outbound: Outbound, deadline: float, *, limit: int = RESPONSE_LIMIT
    ) -> ResponseReader:
        """Send a request for a token; of the response's body, at most `limit` bytes are read. Raises NoTokenError."""
        try:
            return await self._send(outbound, deadline, partial(ResponseReader, needs_body=True, limit=limit))
        except FailedError as failure:
            raise NoTokenError(failure.detail, timed_out=self._loop.time() >= deadline) from failure

    async def _send(
        self, outbound: Outbound, deadline: float, reader: Callable[[], ResponseReader] = ResponseReader
    ) -> ResponseReader:
        access, body = outbound.access, outbound.body
        address = _locate(outbound.url) if access is None else _locate_via(outbound.url, access.tls, access.proxy)
        start = address.start
        if outbound.method is not Method.POST or outbound.path or outbound.query:
            start = address.start_of(outbound.method, outbound.path, outbound.query)
        headers = (*outbound.headers, *address.headers) if address.headers else outbound.headers
        head = encode_head(start, headers, len(body) if body or outbound.method.has_content else None)
        return await self._exchange(address.origin, head, body, deadline, reader, seen=outbound.observation)

    async def _exchange(
        self,
        origin: Origin,
        head: bytes,
        body: bytes,
        deadline: float,
        reader: Callable[[], ResponseReader],
        *,
        seen: Observation | None = None,
    ) -> ResponseReader:
        connection = self._pool.take(origin)
        if connection is not None:
            try:
                if seen is None:
                    return await connection.exchange(head, body, deadline, reader())
                seen.on_reuse()
                return await _observed(seen, connection, head, body, deadline, reader=reader())
            except StaleError:
                pass  # RFC 9112 §9.3.1: it was closed while it was idle
        connection = await self._dial(origin, deadline, seen or Observation(self._loop.time))
        try:
            if seen is None:
                return await connection.exchange(head, body, deadline, reader())
            return await _observed(seen, connection, head, body, deadline, reader=reader())
        except StaleError as error:
            raise FailedError(Result.TRANSPORT, f"{origin.host}: {error}") from error

    async def _dial(self, origin: Origin, deadline: float, seen: Observation) -> Connection:
        if self._pool.is_closed:
            raise FailedError(Result.TRANSPORT, f"{origin.host}: not sent, the gateway is stopping")
        proxy = origin.proxy
        host, port = (origin.host, origin.port) if proxy is None else (proxy.host, proxy.port)
        shown = host if proxy is None else f"proxy {host}"
        on_timeout = Result.DNS
        seen.on_dial()
        try:
            async with asyncio.timeout_at(deadline):
                if proxy is not None and (literal := literal_address(origin.host)):
                    self._guard.check(literal)  # the proxy resolves names, and may refuse them
                found: tuple[str, ...] = (host,)
                if not is_canonical(host):
                    found = await self._resolver.resolve(host)
                    seen.on_resolved()
                on_timeout = Result.TIMEOUT
                # With the generation from before the guard is asked: a guard set meanwhile invalidates the connection.
                make = partial(Connection, self._pool, origin, self._pool.generation)
                try:
                    if not origin.is_tls:
                        connection = await _connect_first(partial(self._open, make, port), self._permitted(found))
                        seen.on_connected()
                        return connection
                    connected = await _connect_first(partial(self._connect, port), self._permitted(found))
                except OSError as error:
                    raise FailedError(Result.CONNECT, f"{shown}:{port}: {describe_failure(error)}") from error
                if proxy is not None:
                    await self._open_tunnel(connected, origin, proxy)
                seen.on_connected()
                connection = await self._secure(make, connected)
                seen.on_secured()
                return connection
        except TimeoutError as error:
            missing = "an address" if on_timeout is Result.DNS else "a connection"
            raise FailedError(on_timeout, f"{shown}: expected {missing}, got none in time") from error
        except UnresolvedError as error:
            raise FailedError(Result.DNS, str(error) if proxy is None else f"proxy {error}") from error
        except EgressRefusedError as error:
            raise FailedError(Result.EGRESS_REFUSED, str(error)) from error

    def _permitted(self, addresses: tuple[str, ...]) -> list[str]:
        """Return the addresses to which we may connect. Raises EgressRefusedError if there is none."""
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

    async def _open(self, make: Callable[[], Connection], port: int, address: str) -> Connection:
        """Return a connection without TLS. Raises OSError."""
        connection = make()
        try:
            await self._loop.create_connection(lambda: connection, address, port)
        except BaseException:
            connection.discard()
            raise
        return connection

    async def _connect(self, port: int, address: str) -> socket.socket:
        """Return a connected socket, on which a tunnel or TLS can be set up. Raises OSError."""
        connecting = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
        try:
            connecting.settimeout(0.0)
            await self._loop.sock_connect(connecting, (address, port))
        except BaseException:
            connecting.close()
            raise
        return connecting

    async def _open_tunnel(self, connected: socket.socket, origin: Origin, proxy: Proxy) -> None:
        """Open a tunnel to an origin through the proxy (RFC 9110 §9.3.6); the socket is closed if that fails."""
        try:
            status = await self._ask_proxy(connected, _connect_request(origin, proxy))
        except (OSError, MalformedResponseError) as error:
            connected.close()
            reason = describe_failure(error) if isinstance(error, OSError) else str(error)
            raise FailedError(Result.CONNECT, f"proxy {proxy.host}: {reason}") from error
        except BaseException:
            connected.close()
            raise
        if status // 100 != 2:  # noqa: PLR2004 - the class of success
            connected.close()
            raise FailedError(Result.CONNECT, f"proxy {proxy.host}: expected a tunnel, got {_phrase(status)}")

    async def _ask_proxy(self, connected: socket.socket, request: bytes) -> int:
        """Return the status of the proxy's response; bytes after its head are dropped (TLS clients speak first)."""
        reader = ResponseReader()
        await self._loop.sock_sendall(connected, request)
        while not reader.status:
            if not (data := await self._loop.sock_recv(connected, 4096)):
                raise ConnectionResetError
            reader.feed(data)
        return reader.status

    async def _secure(self, make: Callable[[], Connection], connected: socket.socket) -> Connection:
        """Return a connection over TLS; the socket is closed if that fails."""
        connection = make()
        origin = connection.origin
        try:
            await self._loop.create_connection(
                lambda: connection,
                sock=connected,
                ssl=self._tls if origin.tls is None else origin.tls.context,
                server_hostname=origin.host.rstrip("."),
            )
        except OSError as error:  # an ssl.SSLError is one
            connection.discard()
            raise FailedError(Result.TLS, f"{origin.host}: {describe_failure(error)}") from error
        except BaseException:
            connection.discard()
            raise
        finally:
            if not connection.is_open:
                connected.close()
        return connection


async def _observed(
    seen: Observation, connection: Connection, head: bytes, body: bytes, deadline: float, *, reader: ResponseReader
) -> ResponseReader:
    """Do an exchange, and record its phases in the observation."""
    seen.on_send()
    response = await connection.exchange(head, body, deadline, reader)
    seen.on_response(response)
    return response


async def _connect_first(connect: Callable[[str], Awaitable[T]], addresses: list[str]) -> T:
    """Return the connection to the first reachable address. Raises the last address's OSError."""
    *others, last = addresses
    for address in others:
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT):
                return await connect(address)
        except OSError:  # a TimeoutError is one
            continue
    return await connect(last)


class _Address(NamedTuple):
    """A URL as the client needs it: its origin, the parts of a request line, and headers for a proxy.

    `start` is how a POST to the URL itself begins.
    """

    origin: Origin
    scheme_and_host: str
    """Of a request that goes to a proxy (RFC 9112 §3.2.2), else empty."""
    path: str
    query: str
    host: str
    headers: Headers
    start: bytes

    def start_of(self, method: Method, path: str = "", query: str = "") -> bytes:
        """Return the request line and `Host`, for the URL with this path and query appended, percent-encoded."""
        path = (self.path.removesuffix("/") if path else self.path) + path
        query = "&".join(filter(None, (self.query, query)))
        target = quote((path or "/") + (f"?{query}" if query else ""), safe=punctuation)
        return f"{method} {self.scheme_and_host}{target} HTTP/1.1\r\nHost: {self.host}\r\n".encode("ascii")


@lru_cache(maxsize=16384)
def _locate(url: str) -> _Address:
    parsed = URL(url)
    if parsed.raw_host is None or parsed.port is None:
        raise ValueError("destination url: expected http or https with a host")
    # As the operators wrote it: yarl would unquote unreserved characters, and a token may be compared as text.
    parts = urlsplit(url)
    origin = Origin(parsed.raw_host, parsed.port, parsed.scheme == "https")
    address = _Address(origin, "", parts.path, parts.query, str(parsed.host_port_subcomponent), (), b"")
    return address._replace(start=address.start_of(Method.POST))


@lru_cache(maxsize=16384)
def _locate_via(url: str, tls: Tls | None, proxy: Proxy | None) -> _Address:
    """Like `_locate`, with TLS settings of its own or a proxy. Without TLS, the proxy gets the request itself."""
    address = _locate(url)
    origin = address.origin
    address = address._replace(origin=origin._replace(tls=tls if origin.is_tls else None, proxy=proxy))
    if proxy is None or origin.is_tls:
        return address
    address = address._replace(scheme_and_host=f"http://{address.host}", headers=_proxy_headers(proxy))
    return address._replace(start=address.start_of(Method.POST))


def _connect_request(origin: Origin, proxy: Proxy) -> bytes:
    host = f"[{origin.host}]" if ":" in origin.host else origin.host
    fields = [f"CONNECT {host}:{origin.port} HTTP/1.1", f"Host: {host}:{origin.port}"]
    lines = [field.encode("ascii") for field in fields]
    lines += [name + b": " + value for name, value in _proxy_headers(proxy)]
    return b"\r\n".join([*lines, b"\r\n"])


def _proxy_headers(proxy: Proxy) -> Headers:
    return () if proxy.authorization is None else ((b"Proxy-Authorization", proxy.authorization.encode("ascii")),)


def _authorized(outbound: Outbound, token: Token) -> Outbound:
    if outbound.observation is not None:
        outbound.observation.authorizations += (token.value,)
    return replace(outbound, headers=(*outbound.headers, (b"authorization", token.value)))


def _classify(status: int) -> tuple[Result, str]:
    """Return a status's result, and our phrase for it, as the destination's could contain anything."""
    result = _RESULTS.get(status) or _CLASSES.get(status // 100, Result.TRANSPORT)
    return result, "" if result is Result.SUCCESS else _phrase(status)


def _phrase(status: int) -> str:
    try:
        return f"{status} {HTTPStatus(status).phrase}"
    except ValueError:
        return str(status)


_RESULTS: Mapping[int, Result] = {
    HTTPStatus.TOO_MANY_REQUESTS: Result.THROTTLED,
    HTTPStatus.UNAUTHORIZED: Result.UNAUTHORIZED,
    HTTPStatus.FORBIDDEN: Result.UNAUTHORIZED,
}


_CLASSES = {2: Result.SUCCESS, 3: Result.REDIRECT, 4: Result.CLIENT_ERROR, 5: Result.SERVER_ERROR}
