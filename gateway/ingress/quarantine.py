"""Keeps requests that verification refused, of sources with `quarantine`, in `gateway.rejected`.

    refused ─▶ would another secret do? ─▶ quotas, memory ─▶ queue ─▶ append
                                              │ no             │ log unavailable
                                              ▼                ▼
                                          counted          counted

Anybody may send such requests. So nothing waits for what happens here, least of all the sender's response; each source
has its tokens, of which each network of its senders gets a fair share (`quota.py`); a process has tokens for all
sources together, of which each gets a fair share; and so has the memory for what isn't stored yet, none of which is
memory for other bodies. What isn't kept is counted.

The body of a request that its head alone has refused isn't read before the response: it is read after it, for a moment,
and only where another secret could have made the request good. Senders that don't go on sending then aren't kept.
"""

import asyncio
import os
from collections import deque
from collections.abc import Collection
from time import perf_counter
from typing import NamedTuple

from aiohttp import web
from structlog.typing import FilteringBoundLogger

from gateway.ingress.client_address import network_of
from gateway.ingress.server import forget_frames
from gateway.log.base import Log
from gateway.log.topics import DAY, Topics
from gateway.model import LogUnavailableError, RecordTooLargeError, RefusedError
from gateway.quarantine.quota import FairBucket
from gateway.quarantine.records import Missing, RejectedRequest, encode_rejected, key_of
from gateway.rules.rules import Source
from gateway.telemetry.log_throttle import LogThrottle
from gateway.telemetry.metrics import Metrics
from gateway.verify.kept_proof import SALT_BYTES, conceal, is_body_secret
from gateway.verify.request import Reason, Request

REASONS = frozenset({Reason.BAD_SIGNATURE, Reason.BAD_CREDENTIALS, Reason.BAD_KEY, Reason.WRONG_RECIPIENT})
"""Refusals that another secret, key or recipient in the rules would have prevented. What has no signature, or a stale
timestamp, is refused by whatever secret, and most of it comes from strangers: it isn't kept."""
UNAUTHORIZED = 401
MAX_BODY = 256 * 1024
"""Bytes of a body that is kept whole; of a larger one its beginning is kept."""
BEGINNING = 4 * 1024
OVERHEAD = 1024
"""Bytes that a record costs beside its head and body."""
REQUESTS_PER_SECOND, BURST = 100.0, 2000.0
"""Of one source; half of the burst for one network."""
BYTES_PER_DAY = 512.0 * 1024 * 1024
"""Of one source, all of which may come at once; half of it from one network."""
ALL_PER_SECOND, ALL_BURST = 200.0, 4000.0
"""Of all sources of a process: a few percent of a core."""
ALL_BYTES_PER_DAY = 2 * BYTES_PER_DAY
"""Of all sources of a process: with a retention of 7 days, a process has at most 8 GiB in the topic."""
MEMORY = 8.0 * 1024 * 1024
"""Bytes of a process that aren't stored yet."""
READING = 32.0
"""Bodies that are read after the response, of MAX_BODY each."""
READ_SECONDS = 2.0
AT_ONCE = 32
"""Appends in flight: they share the log's batches."""
WARNING_INTERVAL = 60.0


class HeadRefusedError(RefusedError):
    """A refusal by the head alone, of a request that may be kept; its body wasn't read."""

    def __init__(self, refusal: RefusedError, source: Source, head: Request, *, at: float, sender: str) -> None:
        super().__init__(refusal.status, refusal.reason, refusal.detail)
        self.unread = Unread(source, refusal.reason, head, at, sender)


class Unread(NamedTuple):
    """A request that its head has refused at a time (Unix seconds), from an address."""

    source: Source
    reason: str
    head: Request
    at: float
    sender: str


class Quarantine:
    """What a process keeps. `run` stores it."""

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
        self._waiting: deque[_Waiting] = deque()
        self._has_work, self._is_idle = asyncio.Event(), asyncio.Event()
        self._is_idle.set()
        self._throttle = LogThrottle(WARNING_INTERVAL)

    def retain(self, sources: Collection[str]) -> None:
        """Forget the quotas of sources that are gone. Those that stay keep theirs: a reload is no reason for more."""
        self._quotas = {name: quotas for name, quotas in self._quotas.items() if name in sources}

    @staticmethod
    def wants(source: Source, refusal: RefusedError) -> bool:
        """Return whether a request refused so is one to keep."""
        return source.quarantine and refusal.status == UNAUTHORIZED and refusal.reason in REASONS

    def keep(
        self, source: Source, reason: str, sent: Request, *, at: float, sender: str, size: int | None = None
    ) -> None:
        """Keep a request that was refused at a time (Unix seconds, by the clock of signatures), if there is room.

        It is stored later; if it can't be, it is counted. `sender` is the client's address, "" if that can't be told;
        `size` that of a body that wasn't read.
        """
        size = len(sent.body) if size is None else size
        is_too_large = size > MAX_BODY
        body = sent.body[:BEGINNING] if is_too_large else sent.body
        head_bytes = len(sent.query) + sum([len(name) + len(value) for name, value in sent.headers])
        cost = OVERHEAD + head_bytes + len(body)
        network = network_of(sender)
        if not self._has_room(source.name, network, cost):
            return
        self._all.take(source.name, cost)
        self._quotas[source.name].take(network, cost)
        salt = os.urandom(SALT_BYTES)
        kept = conceal(source.verifier, sent, salt)
        request = RejectedRequest(
            source=source.name,
            reason=reason,
            at=at,
            address=sender,
            method=sent.method,
            path=source.shown_path,
            query=kept.query,
            headers=kept.headers,
            body=body,
            size=size,
            missing=Missing.BODY if is_too_large else Missing.NOTHING if kept.is_whole else Missing.CREDENTIAL,
            salt=salt,
            credentials=kept.credentials,
            is_body_secret=is_body_secret(source.verifier),
            # Its client has met it, or the request would have been refused for that.
            certificate="" if source.client_certificate is None else source.client_certificate.digest,
        )
        owner = self._memory.take(source.name, cost)
        outcome = "too_large" if is_too_large else "kept"
        self._waiting.append(_Waiting(source.name, outcome, encode_rejected(request), body, cost, owner))
        self._is_idle.clear()
        self._has_work.set()

    async def read_on(self, request: web.BaseRequest, response: web.StreamResponse, unread: Unread) -> None:
        """Send the response to a request that its head has refused, and keep it if its body comes within a moment."""
        (source, reason, head, at, sender), stream = unread, request.content
        length = request.content_length or 0
        if length > MAX_BODY:
            self.keep(source, reason, head, at=at, sender=sender, size=length)
            return
        if not self._has_room(source.name, network_of(sender), length):
            return
        if "Expect" in request.headers:  # it waits for a response before it sends its body
            self._count(source.name, "incomplete")
            return
        if not self._reading.has(source.name, 1, now=perf_counter()):
            self._count(source.name, "over_memory")
            return
        slot = self._reading.take(source.name, 1)
        body = bytearray()
        try:
            await response.prepare(request)
            await response.write_eof()
            async with asyncio.timeout(READ_SECONDS):
                while len(body) <= MAX_BODY and (chunk := await stream.readany()):
                    body += chunk
        except (TimeoutError, web.RequestPayloadError, ConnectionError, RuntimeError) as error:
            forget_frames(error)
            self._count(source.name, "incomplete")
            return
        finally:
            self._reading.give_back(slot, 1)
        self.keep(source, reason, head._replace(body=bytes(body)), at=at, sender=sender)

    async def run(self) -> None:
        """Store what is kept, until cancelled."""
        while True:
            await self._has_work.wait()
            some = [self._waiting.popleft() for _ in range(min(AT_ONCE, len(self._waiting)))]
            async with asyncio.TaskGroup() as tasks:
                for each in some:
                    tasks.create_task(self._append(each), name="quarantine-append")
            if not self._waiting:
                self._has_work.clear()
                self._is_idle.set()

    async def flush(self, timeout: float) -> None:
        """Return once everything is stored, or given up, or after a time (seconds)."""
        try:
            async with asyncio.timeout(timeout):
                await self._is_idle.wait()
        except TimeoutError:
            for each in self._waiting:
                self._count(each.source, "log_unavailable")

    def _has_room(self, source: str, network: str, size: int) -> bool:
        """Return whether quotas and memory allow so many bytes; count it if they don't."""
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
            await self._log.append(self._topic, key=key_of(each.source), value=each.body, headers=each.headers)
        except RecordTooLargeError:
            outcome = "too_large"
        except LogUnavailableError as error:
            outcome = "log_unavailable"
            if count := self._throttle.count(each.source, perf_counter()):
                self._logger.warning("quarantine_failed", source=each.source, count=count, error=str(error))
        finally:
            self._memory.give_back(each.owner, each.cost)
        self._count(each.source, outcome)

    def _count(self, source: str, outcome: str) -> None:
        self._metrics.quarantined.labels(source, outcome).inc()


class Quotas:
    """Tokens for requests and for bytes, of which each debtor gets a fair share: a source, or a network of its clients.

    A day's worth of bytes may come at once. Times are seconds of a clock that isn't set.
    """

    __slots__ = ("bytes", "requests")

    def __init__(self, *, rate: float, burst: float, bytes_per_day: float, now: float) -> None:
        self.requests = FairBucket(capacity=burst, rate=rate, now=now)
        self.bytes = FairBucket(capacity=bytes_per_day, rate=bytes_per_day / DAY, now=now)

    def have(self, debtor: str, size: int, now: float) -> bool:
        return self.requests.has(debtor, 1, now=now) and self.bytes.has(debtor, size, now=now)

    def take(self, debtor: str, size: int) -> None:
        self.requests.take(debtor, 1)
        self.bytes.take(debtor, size)


class _Waiting(NamedTuple):
    """A request that waits to be stored. `owner` is whose memory its `cost` (bytes) is."""

    source: str
    outcome: str
    headers: list[tuple[str, bytes]]
    body: bytes
    cost: int
    owner: object
