"""Keeps requests that verification refused, of sources with `quarantine`, in `gateway.rejected`.

    refused ─▶ would another secret do? ─▶ quotas, memory ─▶ queue ─▶ append
                                              │ no             │ log unavailable
                                              ▼                ▼
                                          counted          counted

Anybody may send such requests. So nothing waits for the quarantine, least of all a response. Each source has a quota,
shared fairly between the networks of its senders (`quota.py`); a process has a quota and a memory limit, both shared
fairly between sources, and separate from the memory for other bodies. A request that isn't kept is counted.

If a request's head alone has refused it, its body is read only after the response, for at most READ_SECONDS, and only
if another secret could have verified the request. If its sender stops sending then, it isn't kept.
"""

import asyncio
import os
from collections import deque
from collections.abc import Collection
from itertools import chain
from time import perf_counter
from typing import NamedTuple

from aiohttp import web
from structlog.typing import FilteringBoundLogger

from gateway.ingress.body import forget_frames
from gateway.ingress.client_address import network_of
from gateway.log.base import Log
from gateway.log.topics import DAY, Topics
from gateway.model import LogUnavailableError, RecordTooLargeError, RefusedError
from gateway.quarantine.quota import FairBucket
from gateway.quarantine.records import MAX_STORE_DELAY, Missing, RejectedRequest, encode_rejected, key_of
from gateway.rules.rules import Source
from gateway.telemetry.log_throttle import LogThrottle
from gateway.telemetry.metrics import Metrics
from gateway.verify.kept_proof import SALT_BYTES, conceal, is_body_secret
from gateway.verify.request import Reason, Request

REASONS = frozenset({Reason.BAD_SIGNATURE, Reason.BAD_CREDENTIALS, Reason.BAD_KEY, Reason.WRONG_RECIPIENT})
"""Refusals that another secret, key or recipient in the rules might have prevented. A request without a signature, or
with a stale timestamp, is refused with any secret, and most of those are scans: they aren't kept."""
UNAUTHORIZED = 401
MAX_BODY = 256 * 1024
"""Bytes of the largest body that is kept whole; of a larger one only the beginning is."""
BEGINNING = 4 * 1024
OVERHEAD = 1024
"""Bytes that a record costs beside its head and body."""
REQUESTS_PER_SECOND, BURST = 100.0, 2000.0
"""Per source; at most half of the burst for one network."""
BYTES_PER_DAY = 512.0 * 1024 * 1024
"""Per source, even all at once; at most half of it for one network."""
ALL_PER_SECOND, ALL_BURST = 200.0, 4000.0
"""Per process: a few percent of a core."""
ALL_BYTES_PER_DAY = 2 * BYTES_PER_DAY
"""Per process: with a retention of 7 days, at most 8 GiB of the topic."""
MEMORY = 8.0 * 1024 * 1024
"""Bytes per process that aren't stored yet."""
READING = 32.0
"""Bodies being read after their responses, of up to MAX_BODY each."""
READ_SECONDS = 2.0
AT_ONCE, OF_ONE_SOURCE = 32, 8
"""Appends in flight, which share the log's batches: in all, and of one source, whose partition may take none."""
MAX_WAIT = MAX_STORE_DELAY - 30.0
"""Seconds in the queue after which a request isn't stored. A stored one is read only if that was within
MAX_STORE_DELAY of its receipt, and its body may have taken 10 s of that, and its append some."""
WARNING_INTERVAL = 60.0


class HeadRefusedError(RefusedError):
    """The head alone has refused a request that may be kept; its body wasn't read."""

    def __init__(self, refusal: RefusedError, source: Source, head: Request, *, at: float, sender: str) -> None:
        super().__init__(refusal.status, refusal.reason, refusal.detail)
        self.unread = Unread(source, refusal.reason, head, at, sender)


class Unread(NamedTuple):
    """A request that was refused by its head: `at` is when (Unix seconds), `sender` its client's address."""

    source: Source
    reason: str
    head: Request
    at: float
    sender: str


class Quarantine:
    """The quarantine of one process. `run` appends what `keep` has queued."""

    def __init__(self, *, log: Log, topics: Topics, metrics: Metrics, logger: FilteringBoundLogger) -> None:
        self._log = log
        self._topic = topics.rejected
        self._metrics = metrics
        self._logger = logger
        now = perf_counter()
        self._quotas: dict[str, Quotas] = {}
        self._all = Quotas(rate=ALL_PER_SECOND, burst=ALL_BURST, bytes_per_day=ALL_BYTES_PER_DAY, now=now)
        self._memory = FairBucket(capacity=MEMORY, rate=0.0, now=now)
        self._reading = FairBucket(capacity=READING, rate=0.0, now=now)
        # By source, the one that had its turn longest ago first. Invariant: none is empty.
        self._waiting: dict[str, deque[_Waiting]] = {}
        self._in_flight: dict[str, int] = {}
        self._appends = 0
        self._has_work, self._is_idle = asyncio.Event(), asyncio.Event()
        self._is_idle.set()
        self._throttle = LogThrottle(WARNING_INTERVAL)

    def retain(self, sources: Collection[str]) -> None:
        """Forget the quotas of removed sources. The others keep theirs, so that a reload refills none."""
        self._quotas = {name: quotas for name, quotas in self._quotas.items() if name in sources}

    @staticmethod
    def wants(source: Source, refusal: RefusedError) -> bool:
        """Return whether a request with this refusal is to be kept."""
        return source.quarantine and refusal.status == UNAUTHORIZED and refusal.reason in REASONS

    def keep(
        self, source: Source, reason: str, received: Request, *, at: float, sender: str, size: int | None = None
    ) -> None:
        """Keep a refused request, if quotas and memory allow; `at` is when (Unix seconds, by the clock of signatures).

        It is stored later, or counted if that fails. `sender` is the client's address, "" if it is unknown; `size` is
        that of a body that wasn't read.
        """
        size = len(received.body) if size is None else size
        is_too_large = size > MAX_BODY
        body = received.body[:BEGINNING] if is_too_large else received.body
        head_bytes = len(received.query) + sum([len(name) + len(value) for name, value in received.headers])
        cost = OVERHEAD + head_bytes + len(body)
        network = network_of(sender)
        if not self._has_room(source.name, network, cost):
            return
        self._all.take(source.name, cost)
        self._quotas[source.name].take(network, cost)
        salt = os.urandom(SALT_BYTES)
        kept = conceal(source.verifier, received, salt)
        headers = [pair for pair in kept.headers if pair[0].lower() not in source.proxy_headers]
        request = RejectedRequest(
            source=source.name,
            reason=reason,
            at=at,
            address=sender,
            method=received.method,
            path=source.shown_path,
            query=kept.query,
            headers=tuple(headers),
            body=body,
            size=size,
            missing=Missing.BODY if is_too_large else Missing.NOTHING if kept.is_whole else Missing.CREDENTIAL,
            salt=salt,
            credentials=kept.credentials,
            is_body_secret=is_body_secret(source.verifier),
            # It was the right one, or the refusal would have another reason.
            certificate="" if source.client_certificate is None else source.client_certificate.digest,
        )
        owner = self._memory.take(source.name, cost)
        outcome = "too_large" if is_too_large else "kept"
        self._waiting.setdefault(source.name, deque()).append(
            _Waiting(source.name, outcome, encode_rejected(request), body, cost, owner, since=perf_counter())
        )
        self._is_idle.clear()
        self._has_work.set()

    async def respond_and_keep(self, request: web.BaseRequest, response: web.StreamResponse, unread: Unread) -> None:
        """Send the response to a request that its head has refused; keep it if its body comes within READ_SECONDS."""
        (source, reason, head, at, sender), stream = unread, request.content
        length = request.content_length or 0
        if length > MAX_BODY:
            self.keep(source, reason, head, at=at, sender=sender, size=length)
            return
        if not self._has_room(source.name, network_of(sender), length):
            return
        if "Expect" in request.headers:  # the client sends no body after this response
            self._count(source.name, "incomplete")
            return
        if not self._reading.has(source.name, 1, now=perf_counter()):
            self._count(source.name, "over_memory")
            return
        slot = self._reading.take(source.name, 1)
        body, is_sent = bytearray(), False
        try:
            async with asyncio.timeout(READ_SECONDS):  # of both: the client may read as slowly as it sends
                await response.prepare(request)
                await response.write_eof()
                is_sent = True
                while len(body) <= MAX_BODY and (chunk := await stream.readany()):
                    body += chunk
        except (TimeoutError, web.RequestPayloadError, ConnectionError, RuntimeError) as error:
            forget_frames(error)
            if not is_sent:  # a second `write_eof` would send the body again
                response.force_close()
                if request.transport is not None:
                    request.transport.abort()
            self._count(source.name, "incomplete")
            return
        finally:
            self._reading.give_back(slot, 1)
        self.keep(source, reason, head._replace(body=bytes(body)), at=at, sender=sender)

    async def run(self) -> None:
        """Append what is queued, until cancelled: AT_ONCE at a time, each as soon as another one has ended."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                self._has_work.clear()
                while (each := self._next()) is not None:
                    self._in_flight[each.source] = self._in_flight.get(each.source, 0) + 1
                    self._appends += 1
                    tasks.create_task(self._append_in_turn(each), name="quarantine-append")
                await self._has_work.wait()

    def _next(self) -> "_Waiting | None":
        """Return the next request to append, of the sources in turn; None if no more appends may be in flight."""
        if self._appends < AT_ONCE:
            for source, queue in self._waiting.items():
                if self._in_flight.get(source, 0) < OF_ONE_SOURCE:
                    del self._waiting[source]
                    each = queue.popleft()
                    if queue:
                        self._waiting[source] = queue
                    return each
        return None

    async def _append_in_turn(self, each: "_Waiting") -> None:
        try:
            await self._append(each)
        finally:
            self._appends -= 1
            self._in_flight[each.source] -= 1
            if not self._in_flight[each.source]:
                del self._in_flight[each.source]
            self._has_work.set()
            if not self._appends and not self._waiting:
                self._is_idle.set()

    async def flush(self, timeout: float) -> None:
        """Wait until everything is stored or given up, for `timeout` seconds at most."""
        try:
            async with asyncio.timeout(timeout):
                await self._is_idle.wait()
        except TimeoutError:
            for each in chain.from_iterable(self._waiting.values()):
                self._count(each.source, "log_unavailable")

    def _has_room(self, source: str, network: str, size: int) -> bool:
        """Return whether quotas and memory allow `size` bytes; count the request if they don't."""
        now = perf_counter()
        quotas = self._quotas.get(source)
        if quotas is None:
            quotas = Quotas(rate=REQUESTS_PER_SECOND, burst=BURST, bytes_per_day=BYTES_PER_DAY, now=now)
            self._quotas[source] = quotas
        if not (self._all.have(source, size, now) and quotas.have(network, size, now)):
            self._count(source, "over_rate")
            return False
        if not self._memory.has(source, size, now=now):
            self._count(source, "over_memory")
            return False
        return True

    async def _append(self, each: "_Waiting") -> None:
        outcome = each.outcome
        try:
            if perf_counter() > each.since + MAX_WAIT:
                outcome = self._given_up(each.source, f"expected a turn within {MAX_WAIT:g} s, got none")
            else:
                await self._log.append(self._topic, key=key_of(each.source), value=each.body, headers=each.headers)
        except RecordTooLargeError:
            outcome = "too_large"
        except LogUnavailableError as error:
            outcome = self._given_up(each.source, str(error))
        finally:
            self._memory.give_back(each.owner, each.cost)
        self._count(each.source, outcome)

    def _given_up(self, source: str, error: str) -> str:
        """Log that a request couldn't be stored, unless that was logged lately; return the outcome."""
        if count := self._throttle.count(source, perf_counter()):
            self._logger.warning("quarantine_failed", source=source, count=count, error=error)
        return "log_unavailable"

    def _count(self, source: str, outcome: str) -> None:
        self._metrics.quarantined.labels(source, outcome).inc()


class Quotas:
    """Tokens for requests and for bytes, shared fairly between keys: sources, or the networks of one's clients.

    A day's worth of bytes may come at once. Times are seconds of a monotonic clock.
    """

    __slots__ = ("bytes", "requests")

    def __init__(self, *, rate: float, burst: float, bytes_per_day: float, now: float) -> None:
        self.requests = FairBucket(capacity=burst, rate=rate, now=now)
        self.bytes = FairBucket(capacity=bytes_per_day, rate=bytes_per_day / DAY, now=now)

    def have(self, key: str, size: int, now: float) -> bool:
        return self.requests.has(key, 1, now=now) and self.bytes.has(key, size, now=now)

    def take(self, key: str, size: int) -> None:
        self.requests.take(key, 1)
        self.bytes.take(key, size)


class _Waiting(NamedTuple):
    """A queued request, `since` when (by `perf_counter`). Its `cost` (bytes) of the memory belongs to `owner`."""

    source: str
    outcome: str
    headers: list[tuple[str, bytes]]
    body: bytes
    cost: int
    owner: object
    since: float
