"""The sender and the destination, both in the benchmark's own process and as lean as Python allows.

Together they take about 30 µs per event, a small part of the measured processes' cost, so on two cores the pace is that
of the measured process.
"""

import asyncio
import re
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import cast

from typing_extensions import override

from benchmarks.payload import BODY_BYTES, Pushes

LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")
COMMIT = re.compile(rb'"after":"([0-9a-f]{40})"')
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"
PATIENCE = 60.0
TICK = 0.01
"""Seconds between the small bursts of a steady rate."""


class _Messages(asyncio.Protocol, ABC):
    """Splits the input into HTTP messages with a Content-Length, as both sides here send them."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport
        self._data = b""
        self._missing = 0
        self.began = 0.0

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    @override
    def data_received(self, data: bytes) -> None:
        if not self._data:
            self.began = time.monotonic()
        elif len(data) < self._missing:
            self._missing -= len(data)
            self._data += data
            return
        self._data += data
        end = self._data.find(b"\r\n\r\n")
        if end < 0:
            return
        length = LENGTH.search(self._data, 0, end)
        self._missing = end + 4 + (int(length[1]) if length else 0) - len(self._data)
        if self._missing <= 0:
            message, self._data = self._data, b""
            self.complete(message)

    @abstractmethod
    def complete(self, message: bytes) -> None:
        """Handle a complete message."""


class Destination:
    """Responds with 200 at once, and counts what is new. `times` are those of each event's first byte."""

    def __init__(self) -> None:
        self.received = 0
        """Deliveries, each counted once."""
        self.repeated = 0
        self.times: dict[bytes, float] = {}
        self._arrived: dict[bytes, set[bytes]] = {}
        self._wanted = 0
        self._reached = asyncio.Event()
        self._server: asyncio.Server

    async def start(self, port: int = 0) -> int:
        """Listen on loopback; return the port."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Receiver(self), "127.0.0.1", port, backlog=1024)
        listening: int = self._server.sockets[0].getsockname()[1]
        return listening

    async def wait_for(self, count: int) -> None:
        """Wait until it has received that many in total. Raises TimeoutError if nothing arrives for a minute."""
        while self.received < count:
            self._wanted = count
            self._reached.clear()
            before = self.received
            try:
                async with asyncio.timeout(PATIENCE):
                    await self._reached.wait()
            except TimeoutError:
                if self.received == before:
                    raise TimeoutError(f"destination: expected {count} requests, got {before}") from None

    def forget(self) -> None:
        """Begin anew with what has arrived."""
        self._arrived.clear()
        self.times.clear()

    def check(self, commits: Sequence[bytes]) -> None:
        """Raise RuntimeError unless exactly these have arrived since `forget`, at each path where any has."""
        for path, arrived in self._arrived.items():
            if arrived != set(commits):
                raise RuntimeError(
                    f"{path.decode()}: expected {len(commits)} events, got {len(arrived & set(commits))} of them and "
                    f"{len(arrived - set(commits))} others"
                )

    def check_once(self, commits: Iterable[bytes]) -> None:
        """Raise RuntimeError unless each of these has arrived since `forget`, at one path or another, and no other."""
        expected, arrived = set(commits), set[bytes]().union(*self._arrived.values())
        if arrived != expected:
            raise RuntimeError(
                f"expected {len(expected)} events, got {len(arrived & expected)} of them and "
                f"{len(arrived - expected)} others"
            )

    def close(self) -> None:
        self._server.close()

    def note(self, message: bytes, began: float) -> None:
        """Count a request."""
        found = COMMIT.search(message)
        if found is None:
            raise RuntimeError(f"destination: expected a push, got {message[:200]!r}")
        arrived = self._arrived.setdefault(message[: message.index(b" HTTP/")], set())
        if found[1] in arrived:
            self.repeated += 1
            return
        arrived.add(found[1])
        self.times.setdefault(found[1], began)
        self.received += 1
        if self.received == self._wanted:
            self._reached.set()


class _Receiver(_Messages):
    def __init__(self, destination: Destination) -> None:
        super().__init__()
        self._destination = destination

    @override
    def complete(self, message: bytes) -> None:
        self._transport.write(OK)
        self._destination.note(message, self.began)


class Sender:
    """Keep-alive connections to one server, each with one request in flight."""

    def __init__(
        self, port: int, path: str = "/in/github", *, size: int = BODY_BYTES, types: Sequence[str] = ("push",)
    ) -> None:
        self._port = port
        self._pushes = Pushes(port, path, size=size, types=types)
        self.sent: list[bytes] = []
        """The commits of all events since `forget`."""
        self._connections: list[_Sending] = []
        self._left = 0
        self._unanswered = 0
        self._answered: asyncio.Future[None]
        self.times: dict[bytes, float] = {}
        """When the response to each of them arrived, by `time.monotonic()`."""

    async def connect(self, connections: int) -> None:
        loop = asyncio.get_running_loop()
        while len(self._connections) < connections:
            _, connection = await loop.create_connection(lambda: _Sending(self), "127.0.0.1", self._port)
            self._connections.append(connection)

    async def burst(self, count: int) -> float:
        """Send as fast as responses arrive; return the seconds from the first request to the last response.

        Raises RuntimeError for a response that isn't a 2xx, TimeoutError if none comes for a minute.
        """
        began = time.monotonic()
        self._answered = asyncio.get_running_loop().create_future()
        self._left = self._unanswered = count
        for connection in self._connections:
            self.refill(connection)
        while not self._answered.done():
            before = self._unanswered
            await asyncio.wait({self._answered}, timeout=PATIENCE)
            if self._unanswered == before:
                break
        if not self._answered.done():
            raise TimeoutError(
                f"sender: expected responses, got none for {PATIENCE:g} s to {self._unanswered} requests"
            )
        await self._answered
        return time.monotonic() - began

    async def drip(self, count: int, interval: float) -> None:
        """Send one at a time, `interval` seconds apart."""
        for number in range(count):
            connection = self._connections[number % len(self._connections)]
            self._answered = asyncio.get_running_loop().create_future()
            self._left = self._unanswered = 1
            self.refill(connection)
            async with asyncio.timeout(PATIENCE):
                await self._answered
            await asyncio.sleep(interval)

    def forget(self) -> None:
        """Begin anew with what was sent."""
        self.sent.clear()
        self.times.clear()

    def close(self) -> None:
        for connection in self._connections:
            connection.close()

    def refill(self, connection: "_Sending") -> None:
        """Send the next request on a connection, if there is one."""
        if self._left:
            self._left -= 1
            connection.commit, request = self._pushes.next()
            self.sent.append(connection.commit)
            connection.send(request)

    def answered(self, connection: "_Sending", answer: bytes) -> None:
        """Handle a response."""
        if self._answered.done():
            return
        if not answer.startswith(b"HTTP/1.1 2"):
            self.fail(answer[:300].decode("latin-1"))
            return
        self.times[connection.commit] = connection.began
        self._unanswered -= 1
        if not self._unanswered:
            self._answered.set_result(None)
        self.refill(connection)

    def fail(self, what: str) -> None:
        """End the burst."""
        if self._unanswered and not self._answered.done():
            self._answered.set_exception(RuntimeError(f"sender: expected a 2xx, got {what}"))


async def pace(senders: Sequence[Sender], *, rate: float, count: int) -> None:
    """Send at a rate, to each in turn; slow responses reduce it."""
    began, sent, turn = time.monotonic(), 0, 0
    while sent < count:
        due = min(count, int((time.monotonic() - began) * rate)) - sent
        if due > 0:
            await senders[turn % len(senders)].burst(due)
            sent, turn = sent + due, turn + 1
        await asyncio.sleep(TICK)


class _Sending(_Messages):
    def __init__(self, sender: Sender) -> None:
        super().__init__()
        self._sender = sender
        self.commit = b""

    def send(self, request: bytes) -> None:
        self._transport.write(request)

    def close(self) -> None:
        self._transport.close()

    @override
    def complete(self, message: bytes) -> None:
        self._sender.answered(self, message)

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._sender.fail("a connection that was closed")
