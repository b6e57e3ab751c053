"""Accepts connections and opens them: reads a PROXY header, does a TLS handshake, or both, as configured.

    accept ──▶ a known proxy? ──▶ PROXY header ──▶ TLS handshake ──▶ Connection
    one at a     no: closed       5 s, 1 KiB       5 s
    time                          └─ at most 512 here: the newest is let in ─┘

One connection is accepted per iteration of the event loop, so that requests are served between two of them. asyncio's
own server accepts all that wait at once: 500 forged requests that come together would delay a good one by 50 ms instead
of 15. And a flood of handshakes, each of which costs a signature, only gets the time that requests leave.

At the limit that descriptors set, an idle connection is closed for each one that is accepted. Only then are all
connections scanned, and one scan serves for many.

A header is read from the socket before the loop has it, to the byte: what follows belongs to TLS.

Of several processes with one parent each has a socket of its own at the port, so that the kernel spreads connections
evenly, whatever each does; and it has those of the others. Every half second it accepts what waits there: connections
of a process that hangs, or has ended, wait no longer, and none is reset.
"""

import asyncio
import errno
import resource
import socket
import ssl
import sys
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from ipaddress import IPv4Network, IPv6Network
from itertools import chain
from time import perf_counter, thread_time

from structlog.typing import FilteringBoundLogger

from gateway.ingress.client_address import Networks, parse_address
from gateway.ingress.idle_connections import longest_idle
from gateway.ingress.opening_connections import OpeningConnection, OpeningConnections
from gateway.ingress.proxy_protocol import START, ProxyHeaderError, rest_length, source_address
from gateway.ingress.server import Connection, Server, TlsConnection
from gateway.ingress.tls import ServerTls
from gateway.telemetry.log_throttle import LogThrottle
from gateway.telemetry.logs import traceback_of

SHUTDOWN_TIMEOUT = 5.0
"""Seconds to wait for the peer's close_notify after ours."""
ACCEPT_PAUSE = 1.0
"""Seconds without accepting, after the system has no descriptor or memory for another connection."""
FULL_PAUSE = 0.1
"""Seconds without accepting, when there are too many connections and none of them is idle."""
WARNING_INTERVAL = 60.0
"""Seconds between warnings that none is accepted."""
MIN_IDLE = 1.0
"""Seconds that a connection stays open after it was accepted, or after its last response."""
RESERVED = 5120
"""Descriptors kept for 4,096 attempts (`PoolLimits`), 128 fetches (`fetch_turns.py`), the log and files; at most a
quarter of all."""
NO_LIMIT = 1 << 20
"""Connections, where descriptors are unlimited."""
UNACKNOWLEDGED_MS = 10_000
"""Milliseconds after which the kernel closes a connection whose client takes nothing of a response, as `write_seconds`:
of TLS, what waits in the kernel and before it isn't seen there."""
TAKE_OVER_INTERVAL = 0.5
"""Seconds between looks at what waits for other processes."""
AT_ONCE = 16
"""Idle connections that are closed when no descriptor is left: others than connections need some, too."""
SCAN_SHARE = 0.05
"""Maximum share of a processor's time that is spent on scanning for idle connections."""
MAX_SCAN_PAUSE = 1.0
"""Seconds between scans at most, however long one took: meanwhile, senders may be kept out."""
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


@dataclass(frozen=True, slots=True, kw_only=True)
class Sockets:
    """Bound sockets, one for each address: a process's own, and those of the other processes with its parent."""

    own: Sequence[socket.socket]
    others: Sequence[socket.socket] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectionSetup:
    """How connections are opened: a PROXY header with networks of `proxies`, then a handshake with `tls`.

    The tasks that do so belong to `tasks`. `sockets` are those that the process's parent has bound, if it has one.
    """

    tls: ServerTls | None = None
    proxies: Sequence[IPv4Network | IPv6Network] = ()
    sockets: Sockets | None = None
    tasks: asyncio.TaskGroup


class Listener:
    """Listens at one address."""

    def __init__(self, web: Server, setup: ConnectionSetup, *, logger: FilteringBoundLogger) -> None:
        self._web = web
        self._tls = setup.tls
        self._proxies = Networks(setup.proxies) if setup.proxies else None
        self._tasks = setup.tasks
        self._seconds = web.limits.opening_seconds
        self._refuse = web.refuse
        self._logger = logger
        limit = room_for_connections() if web.limits.connections is None else web.limits.connections
        opening = max(1, min(web.limits.opening, limit // 8))
        self._opening = OpeningConnections(opening)
        self._limit = max(1, limit - opening)
        self._idle: deque[tuple[Connection, float]] = deque()
        self._next_scan = 0.0
        self._throttle = LogThrottle(WARNING_INTERVAL)
        self._bound = setup.sockets
        self._sockets: list[socket.socket] = []
        self._others: list[socket.socket] = []
        self._backlog = 0
        self._openings: set[asyncio.Task[None]] = set()

    @property
    def opening(self) -> int:
        """How many connections aren't open yet."""
        return len(self._openings)

    async def start(self, host: str, port: int, *, is_shared: bool, backlog: int) -> tuple[str, int]:
        """Listen; return the bound address. Raises OSError.

        At most `backlog` connections wait in the kernel to be accepted: a burst while the loop is busy.
        """
        found = self._bound or Sockets(own=[each for (each,) in await bind(host, port, is_shared=is_shared)])
        self._sockets, self._others = [*found.own], [*found.others]
        try:
            for each in self._sockets:
                each.listen(backlog)
        except OSError:
            self._close_sockets()
            raise
        self._backlog = backlog
        for each in self._sockets:
            self._watch(each)
        if self._others:
            self._take_over()
        name = self._sockets[0].getsockname()
        return name[0], name[1]

    def close(self) -> None:
        """Stop listening; connections that are opening, or wait to be accepted, may still open."""
        loop = asyncio.get_running_loop()
        for each in (*self._sockets, *self._others):
            loop.remove_reader(each)
            with suppress(OSError):  # nothing waits any more
                for _ in range(self._backlog):
                    self._begin(*each.accept())
        self._close_sockets()

    async def abort(self) -> None:
        """Close the connections that aren't open yet."""
        await asyncio.sleep(0)  # one that is cancelled before it has begun wouldn't close its socket
        for task in self._openings:
            task.cancel()

    def _close_sockets(self) -> None:
        for each in (*self._sockets, *self._others):
            each.close()
        self._sockets, self._others = [], []

    def _watch(self, listening: socket.socket) -> None:
        if listening in self._sockets:  # not closed meanwhile
            asyncio.get_running_loop().add_reader(listening, self._accept, listening)

    def _take_over(self) -> None:
        """Accept one connection that waits for another process; once none does, look again in half a second.

        Not while this process has no room: it would close connections of its own for them.
        """
        loop = asyncio.get_running_loop()
        if self._web.count < self._limit and any(self._accept(each) for each in self._others):
            loop.call_soon(self._take_over)
        elif self._others:  # not closed meanwhile
            loop.call_later(TAKE_OVER_INTERVAL, self._take_over)

    def _accept(self, listening: socket.socket) -> bool:
        """Accept one connection, and return whether one waited.

        If others wait, the loop calls this again in its next iteration.
        """
        if (excess := self._web.count - self._limit) >= 0 and not self._close_idle(1 if excess == 0 else 2):
            self._warn(0, "too many connections, none of which has been idle for a second")
            self._pause(listening, FULL_PAUSE)
            return False
        try:
            connection, address = listening.accept()
        except OSError as error:
            if error.errno in _EXHAUSTED:
                self._warn(error.errno, str(error.strerror))
                if not self._close_idle(AT_ONCE):
                    self._pause(listening, ACCEPT_PAUSE)
            return False  # or the client was gone already
        self._begin(connection, address)
        return True

    def _pause(self, listening: socket.socket, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        loop.remove_reader(listening)
        loop.call_later(seconds, self._watch, listening)

    def _warn(self, kind: int, error: str) -> None:
        if count := self._throttle.count(kind, perf_counter()):
            self._logger.warning("accept_failed", count=count, error=error)

    def _close_idle(self, number: int) -> int:
        """Close up to `number` idle connections; return how many."""
        closed = 0
        while closed < number and (self._idle or self._look_for_idle()):
            connection, since = self._idle.popleft()
            if connection.idle_since == since:
                address = connection.address
                if connection.close_idle():
                    closed += 1
                    self._refuse("idle", address, "expected a request before many others connected")
        return closed

    def _look_for_idle(self) -> bool:
        """Scan all connections, which takes milliseconds; return whether some are idle."""
        now, began = asyncio.get_running_loop().time(), thread_time()
        if now < self._next_scan:
            return False
        found = [
            (each, each.network, each.idle_since) for each in self._web.connections if isinstance(each, Connection)
        ]
        self._idle.extend(longest_idle(found, until=now - MIN_IDLE, limit=max(AT_ONCE, self._limit // 8)))
        # Its own time: that of other processes, which may be long on a busy machine, is no reason to wait.
        pause = max(FULL_PAUSE / 2, (thread_time() - began) / SCAN_SHARE)
        self._next_scan = asyncio.get_running_loop().time() + min(pause, MAX_SCAN_PAUSE)
        return bool(self._idle)

    def _begin(self, connection: socket.socket, address: tuple[str, int]) -> None:
        connection.setblocking(False)  # noqa: FBT003 - positional in C
        self._openings.add(self._tasks.create_task(self._open(connection, address[0]), name="ingress-open"))

    async def _open(self, connection: socket.socket, address: str) -> None:
        """Open a connection, or close it and say why."""
        task = asyncio.current_task()
        assert task is not None
        opening = OpeningConnection(task.cancel)
        self._opening.add(opening, address)
        try:
            await self._open_within(connection, address, opening)
        except asyncio.CancelledError:
            if not opening.is_evicted:
                raise
            self._refuse("evicted", opening.address, "expected its handshake to end before many others began")
        except ProxyHeaderError as error:
            self._refuse(error.problem, opening.address, str(error))
        except _RefusedError as error:
            self._refuse(error.reason, opening.address, error.detail)
        except ssl.SSLCertVerificationError as error:
            self._refuse("client_certificate_refused", opening.address, error.verify_message)
        except (ssl.SSLEOFError, ssl.SSLZeroReturnError):
            self._refuse("disconnected", opening.address, "")
        except ssl.SSLError as error:
            self._refuse("tls_failed", opening.address, (error.reason or "unknown").lower().replace("_", " "))
        except (OSError, EOFError):
            self._refuse("disconnected", opening.address, "")
        except Exception as error:  # noqa: BLE001 - the edge of one connection: a bug ends it, and no other
            self._log_bug(error)
            self._refuse("bug", opening.address, "")
        finally:
            self._opening.remove(opening)
            self._openings.discard(task)

    def _log_bug(self, error: Exception) -> None:
        if self._web.may_log_traceback("connection_failed"):
            self._logger.error("connection_failed", exception=traceback_of(error))

    async def _open_within(self, connection: socket.socket, address: str, opening: OpeningConnection) -> None:
        loop = asyncio.get_running_loop()
        peer: str | None = None
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNACKNOWLEDGED_MS)
            if self._proxies is not None:
                peer = await self._read_proxy_header(connection, address, self._proxies)
                self._opening.move(opening, address if peer is None else peer)
        except BaseException:
            connection.close()
            raise
        network = opening.network
        if self._tls is None:
            await loop.connect_accepted_socket(
                partial(Connection, self._web, loop=loop, peer=peer, network=network), connection
            )
            return
        try:
            await loop.connect_accepted_socket(
                partial(TlsConnection, self._web, self._tls.presented, loop=loop, peer=peer, network=network),
                connection,
                ssl=self._tls.context,
                ssl_handshake_timeout=self._seconds,
                ssl_shutdown_timeout=SHUTDOWN_TIMEOUT,
            )
        except ConnectionAbortedError:
            raise _RefusedError("tls_slow", f"expected a TLS handshake within {self._seconds:g} s") from None

    async def _read_proxy_header(self, connection: socket.socket, address: str, proxies: Networks) -> str | None:
        """Return the client's address: "" if the header doesn't say, None if the connection is the proxy's own."""
        found = parse_address(address)
        if found is None or found not in proxies:
            raise _RefusedError("proxy_untrusted", "expected a connection from the networks of --proxy-protocol")
        try:
            async with asyncio.timeout(self._seconds):
                start = await _read_exactly(connection, START)
                rest = await _read_exactly(connection, rest_length(start))
        except TimeoutError:
            raise _RefusedError("proxy_header_slow", f"expected a header within {self._seconds:g} s") from None
        return source_address(start, rest)


class _RefusedError(Exception):
    """A connection isn't opened."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


async def _read_exactly(connection: socket.socket, size: int) -> bytes:
    """Return that many bytes. Raises EOFError if there aren't as many."""
    loop = asyncio.get_running_loop()
    data = b""
    while len(data) < size:
        more = await loop.sock_recv(connection, size - len(data))
        if not more:
            raise EOFError
        data += more
    return data


def room_for_connections() -> int:
    """Return for how many connections this process has descriptors, besides RESERVED."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return NO_LIMIT if soft == resource.RLIM_INFINITY else max(1, soft - min(RESERVED, soft // 4))


async def bind(host: str, port: int, *, is_shared: bool, processes: int = 1) -> list[list[socket.socket]]:
    """Return bound sockets, for each address one for each process. Raises OSError.

    Of a system that doesn't spread connections over sockets, all processes have the same one.
    """
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets: list[list[socket.socket]] = []
    try:
        for family, _, _, _, address in dict.fromkeys(found):
            sockets.append([_bound(family, address, is_shared=is_shared)])
            name = sockets[-1][0].getsockname()  # its port may be of the system's choice
            for _ in range(1, processes if sys.platform == "linux" else 1):
                sockets[-1].append(_bound(family, name, is_shared=is_shared))
    except OSError:
        for each in chain(*sockets):
            each.close()
        raise
    return sockets


def _bound(family: int, address: tuple[object, ...], *, is_shared: bool) -> socket.socket:
    """Return a bound socket, with the options of asyncio's own server."""
    found = socket.socket(family, socket.SOCK_STREAM)
    try:
        found.setblocking(False)  # noqa: FBT003 - positional in C
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if is_shared:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if family == socket.AF_INET6:
            found.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        found.bind(address)
    except OSError:
        found.close()
        raise
    return found
