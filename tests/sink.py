"""A destination for tests: answers by script, and keeps every request exactly as it came.

    async with Sink(503, 503, 200) as sink:         # the last answer repeats
        ...
        assert [request.body for request in sink.requests] == [b"{}"] * 3

It speaks just enough HTTP/1.1 (requests with Content-Length, keep-alive) to be cheap: it answers some ten thousand
requests a second, so that it isn't what a test of load measures.
"""

import asyncio
import socket
import ssl
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Self, cast

from typing_extensions import override

HeaderPairs = tuple[tuple[bytes, bytes], ...]


class Fault(Enum):
    """What a destination may do instead of answering."""

    HANG = "read the request and never answer"
    DRIP = "send a promising head, then a byte of the body every `Sink.drip_interval` seconds"
    DRIP_HEAD = "send the head itself a byte every `Sink.drip_interval` seconds"
    ENDLESS = "send a head, then a body without an end, as fast as it is read"
    CLOSE = "close the connection without a byte"
    RESET = "reset the connection without a byte"
    GARBAGE = "answer what isn't HTTP"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """A scripted answer. `delay` is in seconds; `raw` replaces the whole response; `closes` ends the connection."""

    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""
    delay: float = 0.0
    closes: bool = False
    raw: bytes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request as it came. `at` is `time.time()` when its last byte was there; connections are counted from 1."""

    at: float
    connection: int
    method: str
    target: str
    headers: HeaderPairs
    body: bytes

    def header(self, name: str) -> str | None:
        """Return the first value of a header; names compare without case."""
        wanted = name.lower().encode()
        for key, value in self.headers:
            if key.lower() == wanted:
                return value.decode("utf-8", "surrogateescape")
        return None


Scripted = int | Answer | Fault
Script = Scripted | Callable[[Request], Scripted]


class Sink:
    """A local destination. A context manager; `url` is known inside of it.

    Each scripted item answers one request, in the order of arrival over all connections, and the last one repeats.
    A callable decides by the request.
    """

    drip_interval = 0.02

    def __init__(
        self, *script: Script, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1", path: str = "/hook"
    ) -> None:
        self.requests: list[Request] = []
        self.connections = 0
        self.port = 0
        self._script: list[Script] = list(script) or [200]
        self._tls = tls
        self._host = host
        self._path = path
        self._server: asyncio.Server | None = None
        self._open: set[_Connection] = set()
        self._emptied = asyncio.Event()
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []

    @property
    def url(self) -> str:
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{'http' if self._tls is None else 'https'}://{host}:{self.port}{self._path}"

    @property
    def open_connections(self) -> int:
        return len(self._open)

    def answer(self, *script: Script) -> None:
        """Replace what is left of the script."""
        self._script = list(script)

    async def received(self, count: int, *, timeout: float = 10.0) -> list[Request]:
        """Wait until so many requests have come in all, and return them."""
        if len(self.requests) < count:
            future = asyncio.get_running_loop().create_future()
            self._waiting.append((count, future))
            async with asyncio.timeout(timeout):
                await future
        return self.requests

    async def listen(self) -> None:
        """Listen, on the port of the last time if there was one."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Connection(self), self._host, self.port, ssl=self._tls)
        self.port = self._server.sockets[0].getsockname()[1]

    async def refuse(self) -> None:
        """Close every connection and refuse new ones, until `listen` is called again."""
        if self._server is not None:
            self._emptied.clear()
            for listener in self._server.sockets:
                asyncio.get_running_loop().remove_reader(listener.fileno())
            for _ in range(3):  # what was just accepted becomes a connection first: a closed server forgets it, open
                await asyncio.sleep(0)
            self._server.close()
            self.disconnect()
            await self._server.wait_closed()
            self._server = None

    def disconnect(self) -> None:
        """Close every connection that is open now."""
        for connection in list(self._open):
            connection.abort()

    async def __aenter__(self) -> Self:
        await self.listen()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.refuse()
        if self._open:  # each leaves when the event loop tells it that it is lost
            await self._emptied.wait()

    def left(self, connection: "_Connection") -> None:
        self._open.discard(connection)
        if not self._open:
            self._emptied.set()

    def _next(self, request: Request) -> Scripted:
        script = self._script.pop(0) if len(self._script) > 1 else self._script[0]
        self.requests.append(request)
        for count, future in self._waiting:
            if count <= len(self.requests) and not future.done():
                future.set_result(None)
        return script(request) if callable(script) else script


class _Connection(asyncio.Protocol):
    def __init__(self, sink: Sink) -> None:
        self._sink = sink
        self._number = 0
        self._buffer = b""
        self._timer: asyncio.TimerHandle | None = None
        self._is_flooding = False
        self._transport: asyncio.Transport

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._sink.connections += 1
        self._number = self._sink.connections
        self._sink._open.add(self)

    @override
    def connection_lost(self, _: Exception | None) -> None:
        self._sink.left(self)
        self._is_flooding = False
        if self._timer is not None:
            self._timer.cancel()

    def abort(self) -> None:
        self._transport.abort()

    @override
    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (request := self._read()) is not None:
            self._answer(self._sink._next(request))

    def _read(self) -> Request | None:
        head, found, rest = self._buffer.partition(b"\r\n\r\n")
        if not found:
            return None
        line, *fields = head.split(b"\r\n")
        headers = tuple([(name, value) for name, _, value in [field.partition(b": ") for field in fields]])
        length = 0
        for name, value in headers:
            if name.lower() == b"content-length":
                length = int(value)
        if len(rest) < length:
            return None
        self._buffer = rest[length:]
        method, target, _ = line.split(b" ")
        return Request(
            at=time.time(),
            connection=self._number,
            method=method.decode(),
            target=target.decode(),
            headers=headers,
            body=rest[:length],
        )

    def _answer(self, answer: Scripted) -> None:
        match answer:
            case int():
                self._write(Answer(status=answer))
            case Answer(delay=0.0):
                self._write(answer)
            case Answer():
                self._timer = asyncio.get_running_loop().call_later(answer.delay, self._write, answer)
            case Fault():
                self._misbehave(answer)

    def _misbehave(self, fault: Fault) -> None:
        match fault:
            case Fault.HANG:
                pass
            case Fault.CLOSE:
                self._transport.close()
            case Fault.RESET:
                linger = struct.pack("ii", 1, 0)  # closing sends RST
                self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self._transport.abort()
            case Fault.GARBAGE:
                self._transport.write(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")
            case Fault.ENDLESS:
                self._transport.write(b"HTTP/1.1 200 OK\r\n\r\n")
                self._is_flooding = True
                self._flood()
            case Fault.DRIP:
                self._transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
                self._drip(b"x" * 1000)
            case Fault.DRIP_HEAD:
                self._drip(b"HTTP/1.1 200 OK\r\nX-Filler: " + b"x" * 1000)

    def _write(self, answer: Answer) -> None:
        if answer.raw is not None:
            self._transport.write(answer.raw)
        else:
            headers = "".join([f"{name}: {value}\r\n" for name, value in answer.headers])
            if answer.closes:
                headers += "Connection: close\r\n"
            head = f"HTTP/1.1 {answer.status} Scripted\r\n{headers}Content-Length: {len(answer.body)}\r\n\r\n"
            self._transport.write(head.encode() + answer.body)
        if answer.closes:
            self._transport.close()

    def _drip(self, left: bytes) -> None:
        if left and not self._transport.is_closing():
            self._transport.write(left[:1])
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(self._sink.drip_interval, self._drip, left[1:])

    def _flood(self) -> None:
        """Write a piece, and the next one in the loop's next turn: other connections are measured meanwhile."""
        if self._is_flooding and not self._transport.is_closing():
            self._transport.write(b"x" * 16384)
            asyncio.get_running_loop().call_soon(self._flood)

    @override
    def pause_writing(self) -> None:
        self._is_flooding = False

    @override
    def resume_writing(self) -> None:
        if not self._is_flooding:
            self._is_flooding = True
            self._flood()
