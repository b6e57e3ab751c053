"""A TCP proxy that cuts connections: each after a random number of bytes of what comes back."""

import asyncio
import random
from contextlib import suppress
from typing import Self


class CuttingProxy:
    """A context manager; `port` is known inside of it. It cuts once it is told to, and counts how often."""

    def __init__(self, upstream: int, *, seed: int) -> None:
        self.port = 0
        self.cuts = 0
        self.is_down = False
        self._upstream = upstream
        self._chance = random.Random(seed)
        self._bytes: tuple[int, int] | None = None
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def cut_after(self, least: int, most: int) -> None:
        """Cut every connection, those that are open as well, after so many bytes."""
        self._bytes = (least, most)

    def cut_all(self) -> None:
        """Cut what is open now."""
        for writer in list(self._writers):
            writer.transport.abort()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self.cut_all()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.is_down:
            writer.transport.abort()
            return
        self._writers.add(writer)
        with suppress(OSError):
            upstream, upstream_writer = await asyncio.open_connection("127.0.0.1", self._upstream)
            self._writers.add(upstream_writer)
            await asyncio.wait(
                [
                    asyncio.ensure_future(self._pump(reader, upstream_writer)),
                    asyncio.ensure_future(self._pump_back(upstream, writer)),
                ],
                return_when=asyncio.FIRST_COMPLETED,
            )
            upstream_writer.transport.abort()
            self._writers.discard(upstream_writer)
        writer.transport.abort()
        self._writers.discard(writer)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()

    async def _pump_back(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        left: int | None = None
        with suppress(OSError):
            while data := await reader.read(65536):
                if left is None and self._bytes is not None:
                    left = self._chance.randint(*self._bytes)
                if left is not None and len(data) >= left:
                    self.cuts += 1
                    writer.write(data[:left])
                    await writer.drain()
                    await asyncio.sleep(0)  # what came before the cut arrives
                    return
                left = None if left is None else left - len(data)
                writer.write(data)
                await writer.drain()
