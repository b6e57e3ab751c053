"""A paced sender that keeps books: what it sent, what was answered, and when.

    load = Load(port, rate=600)
    await load.send(6000)
    ledger = Ledger.of(sink, load.acknowledged)

Raw keep-alive connections, one request at a time on each: about 40 µs of this process's time an event. The pace is the
clock's, not the answers': what the gateway doesn't take in time waits for a free connection.
"""

import asyncio
import hashlib
import hmac
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import cast

from typing_extensions import override

from tests.sink import Sink

SECRET = "It's a Secret to Everybody"
"""Of the source `github`, as every rule file here has it."""
NO_ANSWER = 0
"""The status of a request whose connection was refused or lost."""
PACE = 0.002
NO_LIMIT = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """One request and its answer. `at` and `answered_at` are `time.time()`."""

    number: int
    at: float
    answered_at: float
    status: int
    event_id: str = ""
    head: bytes = b""


class Load:
    """Sends events to a gateway's source `github`. `answers` has one entry for each request, in the order answered.

    `first` is the number of its first event: several loads on one source need numbers of their own.
    """

    def __init__(
        self,
        port: int,
        *,
        rate: float,
        connections: int = 32,
        size: int = 1000,
        path: str = "/in/github",
        first: int = 0,
    ) -> None:
        self.answers: list[Sent] = []
        self._port = port
        self._rate = rate
        self._path = path
        self._filler = b"x" * size
        self._idle: deque[_Connection] = deque()
        self._connections = [_Connection(self) for _ in range(connections)]
        self._next = first
        self._acknowledged = 0
        self._in_flight = 0
        self._all_answered = asyncio.Event()

    @property
    def acknowledged(self) -> dict[str, float]:
        """The ids of the events that were acknowledged, and when."""
        return {sent.event_id: sent.answered_at for sent in self.answers if sent.status == 202}

    @property
    def acknowledged_count(self) -> int:
        return self._acknowledged

    @property
    def numbers(self) -> dict[str, int]:
        """The ids of the events that were acknowledged, and the number of the request that each came in."""
        return {sent.event_id: sent.number for sent in self.answers if sent.status == 202}

    def body(self, number: int) -> bytes:
        """Return what the request of this number had in it."""
        return b'{"n":%d,"filler":"%b"}' % (number, self._filler)

    def statuses(self) -> Counter[int]:
        return Counter(sent.status for sent in self.answers)

    async def send(self, count: int) -> None:
        """Send at the rate until so many more events are acknowledged, and every request has its answer."""
        count += self._acknowledged
        await self._run(lambda: count - self._acknowledged)

    async def send_for(self, seconds: float) -> None:
        """Send at the rate for so long; returns when every request has its answer."""
        until = time.monotonic() + seconds
        await self._run(lambda: NO_LIMIT if time.monotonic() < until else 0)

    async def send_until(self, stopped: asyncio.Event) -> None:
        """Send at the rate until the event is set; returns when every request has its answer."""
        await self._run(lambda: 0 if stopped.is_set() else NO_LIMIT)

    async def _run(self, wanted: Callable[[], int]) -> None:
        """Send while more acknowledgements are wanted than those that may come of what is under way."""
        for connection in self._connections:
            await connection.connect()
        began = time.monotonic()
        first = self._next
        try:
            while (room := wanted()) > 0:
                room -= self._in_flight
                due = int((time.monotonic() - began) * self._rate) - (self._next - first)
                for _ in range(min(due, room, len(self._idle))):
                    self._idle.popleft().post(self._request())
                await asyncio.sleep(PACE)
            await self._all_answered.wait()
        finally:
            for connection in self._connections:
                connection.close()
            self._idle.clear()

    def _request(self) -> tuple[int, bytes]:
        number = self._next
        self._next += 1
        self._in_flight += 1
        self._all_answered.clear()
        return number, signed_post(self.body(number), delivery=str(number), path=self._path)

    def _answered(self, sent: Sent) -> None:
        self._in_flight -= 1
        if not self._in_flight:
            self._all_answered.set()
        self._acknowledged += sent.status == 202
        self.answers.append(sent)


def signed_post(
    body: bytes, *, delivery: str, path: str = "/in/github", headers: Iterable[tuple[str, str]] = ()
) -> bytes:
    """Return a request as GitHub makes them; `delivery` is its id for the event.

    https://docs.github.com/en/webhooks/using-webhooks/validating-webhook-deliveries
    """
    signature = hmac.new(SECRET.encode(), body, hashlib.sha256).hexdigest()
    more = "".join([f"{name}: {value}\r\n" for name, value in headers])
    return (
        f"POST {path} HTTP/1.1\r\nHost: gateway.test\r\nContent-Type: application/json\r\n"
        f"X-GitHub-Delivery: {delivery}\r\nX-GitHub-Event: push\r\nX-Hub-Signature-256: sha256={signature}\r\n"
        f"{more}Content-Length: {len(body)}\r\n\r\n"
    ).encode("latin-1") + body


async def post(port: int, request: bytes) -> tuple[int, str]:
    """Send one request on a connection of its own; return the status and the event's id."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
    finally:
        writer.close()
    return int(head[9:12]), _event_id(head)


class _Connection(asyncio.Protocol):
    """One request at a time; connects again when it is lost."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._transport: asyncio.Transport | None = None
        self._request: tuple[int, float] | None = None
        self._buffer = b""
        self._is_closed = False
        self._connecting: asyncio.Task[None] | None = None

    async def connect(self) -> None:
        self._is_closed = False
        loop = asyncio.get_running_loop()
        while not self._is_closed:
            try:
                await loop.create_connection(lambda: self, "127.0.0.1", self._load._port)
            except OSError:
                await asyncio.sleep(0.02)
            else:
                return

    def close(self) -> None:
        self._is_closed = True
        if self._connecting is not None:
            self._connecting.cancel()
            self._connecting = None
        if self._transport is not None:
            self._transport.abort()
            self._lose()

    def post(self, request: tuple[int, bytes]) -> None:
        number, encoded = request
        assert self._transport is not None
        self._request = (number, time.time())
        self._transport.write(encoded)

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._buffer = b""
        self._load._idle.append(self)

    @override
    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, found, rest = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return
        length = int(_header(head, b"content-length") or b"0")
        if len(rest) < length or self._request is None:
            return
        self._buffer = rest[length:]
        self._finish(int(head[9:12]), head)
        if _header(head, b"connection") == b"close":
            assert self._transport is not None
            self._transport.close()
        else:
            self._load._idle.append(self)

    @override
    def connection_lost(self, _: Exception | None) -> None:
        if self._transport is None:
            return  # `close` has aborted it, and perhaps it is connecting again already
        self._lose()
        if not self._is_closed:
            self._connecting = asyncio.get_running_loop().create_task(self.connect())

    def _lose(self) -> None:
        self._transport = None
        if self in self._load._idle:
            self._load._idle.remove(self)
        if self._request is not None:
            self._finish(NO_ANSWER, b"")

    def _finish(self, status: int, head: bytes) -> None:
        assert self._request is not None
        number, at = self._request
        self._request = None
        kept = b"" if status == 202 else head
        event_id = _event_id(head) if status == 202 else ""
        self._load._answered(
            Sent(number=number, at=at, answered_at=time.time(), status=status, event_id=event_id, head=kept)
        )


def _header(head: bytes, name: bytes) -> bytes | None:
    for line in head.split(b"\r\n"):
        key, _, value = line.partition(b": ")
        if key.lower() == name:
            return value.lower()
    return None


def _event_id(head: bytes) -> str:
    return (_header(head, b"gateway-event-id") or b"").decode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Ledger:
    """What became of the acknowledged events at one destination."""

    destination: str
    acknowledged: int
    delivered: int
    dead: int
    lost: int
    duplicated: int

    @classmethod
    def of(cls, sink: Sink, acknowledged: Collection[str], dead: Collection[str] = ()) -> "Ledger":
        """Hold the acknowledged ids against those that a sink has answered 2xx, and against its dead letters."""
        counts = deliveries(sink)
        ids = set(acknowledged)
        return cls(
            destination=sink.url,
            acknowledged=len(ids),
            delivered=len(ids & counts.keys()),
            dead=len(ids & set(dead)),
            lost=len(ids - counts.keys() - set(dead)),
            duplicated=sum(counts.values()) - len(counts),
        )

    @override
    def __str__(self) -> str:
        return (
            f"{self.destination}: {self.acknowledged} acknowledged, {self.delivered} delivered, {self.dead} dead, "
            f"{self.lost} lost, {self.duplicated} duplicated"
        )


def deliveries(sink: Sink) -> Counter[str]:
    """Count the requests of each event at a sink that always answers 2xx."""
    return Counter(request.header("gateway-event-id") or "" for request in sink.requests)


async def all_delivered(acknowledged: Collection[str], *sinks: Sink, timeout: float) -> None:
    """Wait until each sink has had every event, or for so long; the ledger tells which."""
    until = time.monotonic() + timeout
    missing = {sink: set(acknowledged) for sink in sinks}
    seen = dict.fromkeys(sinks, 0)
    while any(missing.values()) and time.monotonic() < until:
        for sink in sinks:
            fresh = sink.requests[seen[sink] :]
            seen[sink] += len(fresh)
            missing[sink] -= {request.header("gateway-event-id") or "" for request in fresh}
        await asyncio.sleep(0.05)


def report(*lines: object) -> None:
    """Print what was measured (`pytest -s` shows it)."""
    sys.stdout.write("\n" + "\n  ".join([str(line) for line in lines]) + "\n")
