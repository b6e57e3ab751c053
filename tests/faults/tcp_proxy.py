"""A network that fails: a TCP proxy that stalls, resets or drips all connections through it, and recovers.

async with TcpProxy(port) as proxy:
proxy.do(Way.STALL)         # at once, to what is under way, too
"""

import asyncio
import socket
import struct
from enum import Enum
from typing import Self

CHUNK = 65536
DRIP_INTERVAL = 1.0


class Way(Enum):
    """What becomes of the bytes of every connection, in both directions."""

    PASS = "forward them"
    STALL = "hold them back, and let nobody know"
    RESET = "forward half of what comes, then reset the connection"
    DRIP = "forward one byte a second"
    SLOW = "forward what comes back `delay` seconds later"


class TcpProxy:
    """Forwards to a port of this machine. A context manager; `port` is known inside of it."""

    def __init__(self, target: int = 0, *, delay: float = 3.0) -> None:
        self.target = target
        self.delay = delay
        self.port = 0
        self._way = Way.PASS
        self._changed = asyncio.Event()
        self._server: asyncio.Server
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    def do(self, way: Way) -> None:
        """Treat everything in this way from now on. A reset takes every connection that there is."""
        self._way = way
        self._changed.set()
        self._changed = asyncio.Event()
        if way is Way.RESET:
            self._reset()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self._reset()
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        beyond: asyncio.StreamWriter | None = None
        try:
            back, beyond = await asyncio.open_connection("127.0.0.1", self.target)
            self._writers.add(beyond)
            there = asyncio.create_task(self._pump(reader, beyond), name="proxy-there")
            here = asyncio.create_task(self._pump(back, writer, is_back=True), name="proxy-back")
            try:
                await asyncio.wait({there, here}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                there.cancel()
                here.cancel()
                await asyncio.wait({there, here})
        except OSError:
            pass  # the target is down, and so is this connection
        except asyncio.CancelledError:
            pass  # `__aexit__` waits for the end; asyncio's streams would log one that was cancelled
        finally:
            self._tasks.discard(task)
            for each in (writer, beyond):
                if each is not None:
                    self._writers.discard(each)
                    each.transport.abort()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_back: bool = False) -> None:
        """Forward what comes from one side, until it ends."""
        loop, due = asyncio.get_running_loop(), 0.0
        try:
            while chunk := await reader.read(CHUNK):
                if is_back and (self._way is Way.SLOW or loop.time() < due):
                    due = max(due, loop.time() + (self.delay if self._way is Way.SLOW else 0.0))
                    loop.call_at(due, writer.write, chunk)
                    continue
                while chunk:
                    chunk = await self._forward(chunk, writer)
        except OSError:
            pass  # reset, by us or by a side

    async def _forward(self, chunk: bytes, writer: asyncio.StreamWriter) -> bytes:
        """Forward some of the bytes and return the rest."""
        match self._way:
            case Way.PASS | Way.SLOW:
                writer.write(chunk)
                await writer.drain()
                return b""
            case Way.STALL:
                await self._changed.wait()
                return chunk
            case Way.DRIP:
                writer.write(chunk[:1])
                try:
                    async with asyncio.timeout(DRIP_INTERVAL):
                        await self._changed.wait()
                except TimeoutError:
                    pass
                return chunk[1:]
            case Way.RESET:
                writer.write(chunk[: len(chunk) // 2])
                raise ConnectionResetError

    def _reset(self) -> None:
        for writer in self._writers:
            linger = struct.pack("ii", 1, 0)  # closing sends RST
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            writer.transport.abort()
