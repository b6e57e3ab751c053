"""Names to addresses, without letting one dead zone hold up the others.

The system's resolver blocks a thread, for half a minute where a zone's servers don't answer. So there is one lookup
at a time for a name; a name whose last lookup failed waits for a thread of its own kind; and an address once known is
used on (RFC 8767) when it can't be refreshed in time.
"""

import asyncio
import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from gateway.model import GatewayError

TTL = 15.0  # The system's resolver doesn't tell the record's own.
NEGATIVE_TTL = 2.0
STALE_TTL = 3600.0  # How long a known address serves while its zone can't be asked.
REFRESH_PATIENCE = 0.5  # How long an attempt waits for a refresh where it has a known address to go on with.
LOOKUP_PATIENCE = 5.0  # How long it waits where it hasn't: resolv.conf's default for one server.
THREADS = 12
SUSPECT_THREADS = 4
NAMES_LIMIT = 10_000

Addresses = tuple[str, ...]


class UnresolvedError(GatewayError):
    """DNS (or the name in the rules) is at fault: there is no address for it."""


class Resolver:
    """Resolves names by a blocking `lookup` in daemon threads of its own: a stuck one doesn't keep us from exiting.

    `lookup(name)` returns addresses, the preferred ones first, or raises OSError or UnicodeError. Used from one event
    loop; `close` must be called.
    """

    def __init__(
        self, lookup: Callable[[str], Addresses] | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._lookup = lookup or look_up
        self._clock = clock
        self._names: dict[str, _Name] = {}
        self._threads = _Threads(THREADS)
        self._suspect_threads = _Threads(SUSPECT_THREADS)

    async def resolve(self, host: str) -> Addresses:
        """Return at least one address. Raises UnresolvedError, within 5 seconds at the latest."""
        name = self._names.get(host)
        if name is None:
            name = self._names[host] = _Name()
            self._forget()
        now = self._clock()
        if now >= name.fresh_until:
            pending = name.pending or self._ask(host, name)
            has_known = bool(name.addresses) and now < name.stale_until
            await asyncio.wait([pending], timeout=REFRESH_PATIENCE if has_known else LOOKUP_PATIENCE)
            if not pending.done() and not has_known:
                raise UnresolvedError(f"{host}: expected an address, got no answer within {LOOKUP_PATIENCE:g} s")
        if not name.addresses:
            raise UnresolvedError(f"{host}: expected an address, got {name.failure}")
        return name.addresses

    def close(self) -> None:
        """Let the threads end; lookups under way are left to themselves."""
        self._threads.close()
        self._suspect_threads.close()

    def _ask(self, host: str, name: "_Name") -> asyncio.Future[None]:
        loop = asyncio.get_running_loop()
        name.pending = pending = loop.create_future()

        def work() -> None:
            try:
                found: Addresses | Exception = self._lookup(host)
            except (OSError, UnicodeError) as error:
                found = error
            with suppress(RuntimeError):  # the loop may be closed by now, and nobody is waiting
                loop.call_soon_threadsafe(self._learn, name, found)

        (self._suspect_threads if name.failure else self._threads).run(work)
        return pending

    def _learn(self, name: "_Name", found: Addresses | Exception) -> None:
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

    def _forget(self) -> None:
        """Drop what reloads left behind; a name in use comes back by itself."""
        if len(self._names) > NAMES_LIMIT:
            now = self._clock()
            self._names = {
                host: name for host, name in self._names.items() if name.pending is not None or now < name.stale_until
            }


def look_up(host: str) -> Addresses:
    """Ask the system: hosts file, DNS, and the notations of IPv4 literals that only C knows (`0x7f.1`)."""
    found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    return tuple(dict.fromkeys([str(address[0]) for *_, address in found]))


class _Name:
    __slots__ = ("addresses", "failure", "fresh_until", "pending", "stale_until")

    def __init__(self) -> None:
        self.addresses: Addresses = ()
        self.failure = ""
        self.fresh_until = self.stale_until = float("-inf")
        self.pending: asyncio.Future[None] | None = None


class _Threads:
    """At most so many daemon threads, started as they are needed."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._started = 0
        self._busy = 0
        self._lock = threading.Lock()

    def run(self, work: Callable[[], None]) -> None:
        with self._lock:
            self._busy += 1
            is_new_needed = self._started < min(self._busy, self._limit)
            self._started += is_new_needed
        self._queue.put(work)
        if is_new_needed:
            threading.Thread(target=self._serve, name=f"dns-{self._started}", daemon=True).start()

    def close(self) -> None:
        for _ in range(self._started):
            self._queue.put(None)

    def _serve(self) -> None:
        while (work := self._queue.get()) is not None:
            try:
                work()
            finally:
                with self._lock:
                    self._busy -= 1


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
