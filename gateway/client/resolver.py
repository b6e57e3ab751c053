"""Resolves names, without letting one unresponsive DNS zone delay the others.

The system's resolver blocks a thread, for half a minute if a zone's servers don't respond. So there is one lookup at a
time per name; the names of one zone use at most a third of the threads; names whose last lookup failed have separate
threads; and a known address is still used (RFC 8767) if it can't be refreshed in time.
"""

import asyncio
import queue
import socket
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from contextlib import suppress

from gateway.model import GatewayError

TTL = 15.0  # The system's resolver doesn't return the record's own.
NEGATIVE_TTL = 2.0
STALE_TTL = 3600.0  # How long a known address is used while its zone doesn't respond.
REFRESH_TIMEOUT = 0.5  # How long an attempt waits for a refresh if there is a known address.
LOOKUP_TIMEOUT = 5.0  # How long it waits if there is none: resolv.conf's default for one server.
THREADS = 24
SUSPECT_THREADS = 6
NAMES_LIMIT = 10_000  # Maximum names that are known, besides those that are being looked up.

Addresses = tuple[str, ...]


class UnresolvedError(GatewayError):
    """DNS (or the name in the rules) is at fault: there is no address for it."""


class Resolver:
    """Resolves names by a blocking `lookup` in its own daemon threads: a stuck one doesn't prevent us from exiting.

    `lookup(name)` returns addresses, the preferred ones first, or raises OSError or UnicodeError. Used from one event
    loop; `close` must be called.
    """

    def __init__(
        self, lookup: Callable[[str], Addresses] | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._lookup = lookup or look_up
        self._clock = clock
        self._names: OrderedDict[str, _Name] = OrderedDict()  # that was asked for last, at the end
        self._threads = _Threads(THREADS)
        self._suspect_threads = _Threads(SUSPECT_THREADS)

    async def resolve(self, host: str) -> Addresses:
        """Return at least one address. Raises UnresolvedError, within 5 seconds at the latest."""
        name = self._names.get(host)
        if name is None:
            self._make_room()
            name = self._names[host] = _Name()
        else:
            self._names.move_to_end(host)
        now = self._clock()
        if now >= name.fresh_until:
            pending = name.pending or self._start_lookup(host, name)
            has_known = bool(name.addresses) and now < name.stale_until
            await asyncio.wait([pending], timeout=REFRESH_TIMEOUT if has_known else LOOKUP_TIMEOUT)
            if not pending.done() and not has_known:
                raise UnresolvedError(f"{host}: expected an address, got no response within {LOOKUP_TIMEOUT:g} s")
        if not name.addresses:
            raise UnresolvedError(f"{host}: expected an address, got {name.failure}")
        return name.addresses

    def close(self) -> None:
        """Let the threads end; lookups in progress aren't awaited."""
        self._threads.close()
        self._suspect_threads.close()

    def _start_lookup(self, host: str, name: "_Name") -> asyncio.Future[None]:
        loop = asyncio.get_running_loop()
        name.pending = pending = loop.create_future()

        def work() -> None:
            try:
                found: Addresses | Exception = self._lookup(host)
            except (OSError, UnicodeError) as error:
                found = error
            with suppress(RuntimeError):  # the event loop may be closed by now
                loop.call_soon_threadsafe(self._store_result, name, found)

        (self._suspect_threads if name.failure else self._threads).run(_zone(host), work)
        return pending

    def _store_result(self, name: "_Name", found: Addresses | Exception) -> None:
        now = self._clock()
        if isinstance(found, tuple) and found:
            name.addresses, name.failure = found, ""
            name.fresh_until, name.stale_until = now + TTL, now + STALE_TTL
        else:
            name.failure = _reason(found)
            name.fresh_until = now + NEGATIVE_TTL
            if _is_definite(found) or now >= name.stale_until:
                name.addresses = ()
        if name.pending is not None:
            name.pending.set_result(None)
            name.pending = None

    def _make_room(self) -> None:
        """Drop the name that nobody has asked for the longest, unless it is being looked up.

        Some are left over from reloads; one in use is looked up again.
        """
        for _ in range(len(self._names) - NAMES_LIMIT + 1):  # more than once only after some that couldn't be dropped
            host = next(iter(self._names))
            if self._names[host].pending is None:
                del self._names[host]
            else:
                self._names.move_to_end(host)


def look_up(host: str) -> Addresses:
    """Query the system's resolver: hosts file, DNS, and IPv4 notations that only C supports (`0x7f.1`)."""
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return tuple(dict.fromkeys([str(address[0]) for *_, address in found]))


class _Name:
    __slots__ = ("addresses", "failure", "fresh_until", "pending", "stale_until")

    def __init__(self) -> None:
        self.addresses: Addresses = ()
        self.failure = ""
        self.fresh_until = self.stale_until = float("-inf")
        self.pending: asyncio.Future[None] | None = None


Work = Callable[[], None]


class _Threads:
    """A limited number of daemon threads, started as needed; at most a third of them work for one zone."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._zone_limit = limit // 3
        self._queue: queue.SimpleQueue[tuple[str, Work] | None] = queue.SimpleQueue()  # work within its zone's limit
        self._admitted = 0  # running or queued
        self._running: Counter[str] = Counter()  # running or queued, by zone
        self._waiting: dict[str, deque[Work]] = {}
        self._started = 0
        self._lock = threading.Lock()

    def run(self, zone: str, work: Work) -> None:
        with self._lock:
            if self._running[zone] >= self._zone_limit:
                self._waiting.setdefault(zone, deque()).append(work)
                return
            self._running[zone] += 1
            self._admitted += 1
            is_new_needed = self._started < min(self._admitted, self._limit)
            self._started += is_new_needed
        self._queue.put((zone, work))
        if is_new_needed:
            threading.Thread(target=self._serve, name=f"dns-{self._started}", daemon=True).start()

    def close(self) -> None:
        for _ in range(self._started):
            self._queue.put(None)

    def _serve(self) -> None:
        while (taken := self._queue.get()) is not None:
            zone, work = taken
            try:
                work()
            finally:
                if following := self._finish(zone):
                    self._queue.put((zone, following))

    def _finish(self, zone: str) -> Work | None:
        """Return the next work that waits for a zone's place, or free the place."""
        with self._lock:
            if waiting := self._waiting.get(zone):
                return waiting.popleft()
            self._waiting.pop(zone, None)
            self._admitted -= 1
            self._running[zone] -= 1
            if not self._running[zone]:
                del self._running[zone]
            return None


def _zone(host: str) -> str:
    """Return the last two labels of a name, which names that fail together have in common; "" for a single label."""
    labels = host.rstrip(".").rsplit(".", 2)[-2:]
    return ".".join(labels) if len(labels) > 1 else ""


def _is_definite(found: Sequence[str] | Exception) -> bool:
    return isinstance(found, UnicodeError) or (
        isinstance(found, socket.gaierror) and found.errno in (socket.EAI_NONAME, socket.EAI_NODATA)
    )


def _reason(found: Sequence[str] | Exception) -> str:
    if isinstance(found, UnicodeError):
        return "a name that isn't one"
    if isinstance(found, OSError):
        return (found.strerror or type(found).__name__).lower()
    return "none"


def is_canonical(host: str) -> bool:
    """Return whether a host is an IP address in its usual notation."""
    for family in (socket.AF_INET, socket.AF_INET6):
        try:
            socket.inet_pton(family, host)
        except OSError:
            continue
        return True
    return False


def literal_address(host: str) -> str | None:
    """Return the address of a host in any notation (`0x7f.1`), without a DNS query; None for a name."""
    host = host.rstrip(".")
    if is_canonical(host):
        return host
    if host == "localhost" or host.endswith(".localhost"):  # RFC 6761 §6.3
        return "127.0.0.1"
    try:
        return socket.inet_ntoa(socket.inet_aton(host))
    except OSError:
        return None
