"""Fetches the keys that requests name, so that they can be verified.

    verify ─▶ KeyNeededError ─▶ room, and memory for the body? ─▶ being fetched? ──yes──▶ wait for it ─┐
      ▲                            │ no: 503                          │ no                             │
      │                                 known, or a token of this network? ──no──▶ 503                 │
      │                                                               │ yes                            │
      └──────────────────────── cache ◀─────────────────────────────fetch ◀────────────────────────────┘

The sender of such a request isn't verified. So waiting bodies count as unverified ones, and may be evicted; an address
is only fetched once at a time; and no request waits longer than DEADLINE. Those that wait for a key go on a few at a
time once it is there, as each of them computes a signature.

Anybody may make up addresses on the vendor's server, and after a start no key is known. So the rate of new addresses is
limited, with a reserve for each network of clients (`key_budget.py`), and so are the number of fetches at a time
(`fetch_turns.py`) and that of waiting requests.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Collection
from contextlib import suppress
from time import perf_counter
from typing import TypeVar

from structlog.typing import FilteringBoundLogger
from typing_extensions import override

from gateway.ingress.body import evicted, no_room
from gateway.ingress.body_memory import BodyMemory, BodyReservation, Share
from gateway.ingress.fetch_turns import FetchTurns
from gateway.ingress.key_budget import KeyBudget
from gateway.model import UnfetchedError
from gateway.quarantine.quota import FairBucket
from gateway.verify.remote_keys import (
    MAX_DOCUMENT_BYTES,
    MAX_KEYS_OF_REQUEST,
    KeyCache,
    KeyNeededError,
    key_unavailable,
)

FETCH_TIMEOUT = 3.0
DEADLINE = MAX_KEYS_OF_REQUEST * FETCH_TIMEOUT + 1.0
FLOOD_INTERVAL = 60.0  # Seconds between warnings that more keys are named than may be fetched.
MAX_WAITING = 1000  # Requests, half of them of one network: those without a body take no memory that is counted.
GO_ON_AT_ONCE = 4  # Requests that go on in one iteration of the event loop, each for some tenths of a millisecond.

T = TypeVar("T")


class KeyFetcher:
    """The keys of all sources. `clock` is in Unix seconds. Without `fetches` there are none.

    `may_log` returns whether there may be another line about a source's keys: strangers cause them.
    """

    def __init__(
        self,
        fetches: FetchTurns | None,
        *,
        memory: BodyMemory,
        clock: Callable[[], float],
        logger: FilteringBoundLogger,
        may_log: Callable[[str], bool],
    ) -> None:
        self._fetches = fetches
        self._memory = memory
        self._clock = clock
        self._logger = logger
        self._may_log = may_log
        self._caches: dict[str, KeyCache] = {}
        self._budgets: dict[str, KeyBudget] = {}
        self._pending: dict[tuple[str, str], _Arrival] = {}
        self._room = FairBucket(capacity=MAX_WAITING, rate=0.0, now=0.0)
        self._warned: dict[str, float] = {}

    def cache(self, source: str) -> KeyCache:
        """Return a source's keys, always the same object while the rules have the source."""
        return self._caches.setdefault(source, KeyCache())

    def retain(self, sources: Collection[str]) -> None:
        """Forget the keys of all other sources. A reload gives those that stay no new tokens."""
        self._caches = {name: cache for name, cache in self._caches.items() if name in sources}
        self._budgets = {name: budget for name, budget in self._budgets.items() if name in sources}
        self._warned = {name: at for name, at in self._warned.items() if name in sources}

    async def verify(self, source: str, share: Share, size: int, verify: Callable[[], T], *, network: str) -> T:
        """Call `verify` again once the key is there that it needs; return what it returns.

        The body has `size` bytes, and is of a client in that network (`network_of`). Raises what `verify` raises but
        for KeyNeededError, and RefusedError: 503 if the key can't be had, 408 if others need the body's memory.
        """
        body = _WaitingBody(share)
        has_room = self._room.has(network, 1, now=asyncio.get_running_loop().time())
        if not has_room or not self._memory.grow(body, size, now=perf_counter()):
            raise no_room(self._memory)
        holder, url = self._room.take(network, 1), ""
        try:
            async with asyncio.timeout(DEADLINE) as body.deadline:
                for _ in range(MAX_KEYS_OF_REQUEST):
                    try:
                        return verify()
                    except KeyNeededError as needed:
                        url = needed.url
                        await self._get(source, network, needed.url, needed.request_body)
                return verify()
        except KeyNeededError as error:
            raise key_unavailable("it would be one too many") from error
        except TimeoutError as error:
            if body.is_evicted:
                raise evicted() from error
            # An eviction isn't a failed fetch, or a sender could keep a known key from being fetched again.
            if self.cache(source).knows(url):
                self.cache(source).fail(url, self._clock())
                with suppress(KeyNeededError):
                    return verify()
            raise key_unavailable("it didn't come in time") from error
        finally:
            self._room.give_back(holder, 1)
            self._memory.close(body)

    async def _get(self, source: str, network: str, url: str, request_body: bytes) -> None:
        """Fetch a key into the source's cache, or note there that it can't be had; or wait for whoever does so."""
        pending = self._pending.get((source, url))
        if pending is not None:
            await pending.wait()
            return
        keys = self.cache(source)
        if self._fetches is None:
            raise key_unavailable("nothing is fetched here")
        if not (keys.knows(url) or self._may_ask(source, network)):
            self._warn_of_flood(source, url)
            raise key_unavailable("too many new ones are asked for")
        pending = self._pending[source, url] = _Arrival()
        try:
            document = await self._fetches.fetch(
                source, url, timeout=FETCH_TIMEOUT, limit=MAX_DOCUMENT_BYTES, request_body=request_body
            )
            keys.keep(url, document, self._clock())
        except UnfetchedError as error:
            keys.fail(url, self._clock(), is_gone=error.is_gone)
            self._warn(source, url, str(error))
        except ValueError:
            keys.fail(url, self._clock())
            self._warn(source, url, "expected a key in PEM")
        else:
            self._logger.info("key_fetched", source=source, url=url)
        finally:  # if cancelled, those that wait fetch it themselves
            del self._pending[source, url]
            pending.let_go_on()

    def _may_ask(self, source: str, network: str) -> bool:
        """Return whether one more address may be asked from which no key is known; take the token for it."""
        now = asyncio.get_running_loop().time()
        budget = self._budgets.get(source)
        if budget is None:
            budget = self._budgets[source] = KeyBudget(now)
        return budget.take(network, now)

    def _warn(self, source: str, url: str, reason: str) -> None:
        if self._may_log(source):
            self._logger.warning("key_not_fetched", source=source, url=url, reason=reason)

    def _warn_of_flood(self, source: str, url: str) -> None:
        now = perf_counter()
        if now >= self._warned.get(source, -FLOOD_INTERVAL) + FLOOD_INTERVAL:
            self._warned[source] = now
            self._logger.warning("key_not_fetched", source=source, url=url, reason="too many new addresses")


class _Arrival:
    """Of a key, or of the news that it can't be had. Requests wait for it."""

    __slots__ = ("_waiting",)

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def wait(self) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        await turn

    def let_go_on(self) -> None:
        """Let those that wait go on, some in each iteration of the event loop."""
        for _ in range(min(GO_ON_AT_ONCE, len(self._waiting))):
            turn = self._waiting.popleft()
            if not turn.done():  # cancelled
                turn.set_result(None)
        if self._waiting:
            asyncio.get_running_loop().call_soon(self.let_go_on)


class _WaitingBody(BodyReservation):
    """The memory of a body that waits for a key."""

    __slots__ = ("deadline",)

    def __init__(self, share: Share) -> None:
        super().__init__(share)
        self.deadline: asyncio.Timeout | None = None

    @override
    def evict(self) -> None:
        if self.deadline is not None and not self.deadline.expired():
            self.deadline.reschedule(0.0)
