"""An HTTP proxy for tests: CONNECT and absolute-form, every request kept as it came.

async with HttpProxy(names={"a.test": "127.0.0.1"}) as proxy:
    ...
    assert proxy.lines == ["CONNECT a.test:8443 HTTP/1.1"]
"""

import asyncio
from collections.abc import Mapping
from contextlib import suppress
from typing import Self
from urllib.parse import urlsplit


class HttpProxy:
    """A context manager; `port` is known inside of it. `refusal` is an answer in bytes, in place of a connection.

    An empty one closes the connection without a byte. With `hangs` it never answers.
    """

    def __init__(
        self,
        *,
        names: Mapping[str, str] | None = None,
        refusal: bytes | None = None,
        hangs: bool = False,
        host: str = "127.0.0.1",
    ) -> None:
        self.open_connections = 0
        self.heads: list[list[str]] = []
        self.connections = 0
        self.port = 0
        self.refusal = refusal
        self._names = names or {}
        self._hangs = hangs
        self._host = host
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    @property
    def lines(self) -> list[str]:
        return [head[0] for head in self.heads]

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, self._host, 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        for writer in list(self._writers):
            with suppress(OSError):
                await writer.wait_closed()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open_connections += 1
        self._writers.add(writer)
        with suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").strip().split("\r\n")
                self.heads.append(head)
                if self._hangs:
                    await reader.read()
                elif self.refusal is not None:
                    writer.write(self.refusal)
                    break
                elif head[0].startswith("CONNECT "):
                    await self._tunnel(head, reader, writer)
                    break
                else:
                    await self._pass_on(head, reader, writer)
        writer.close()
        self.open_connections -= 1

    async def _tunnel(self, head: list[str], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        host, _, port = head[0].split()[1].rpartition(":")
        upstream, upstream_writer = await self._connect(host.strip("[]"), int(port))
        writer.write(b"HTTP/1.1 200 Connection established\r\nVia: 1.1 test\r\n\r\n")
        await asyncio.gather(_pump(reader, upstream_writer), _pump(upstream, writer))

    async def _pass_on(self, head: list[str], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Send a request on in origin-form, without what concerns the proxy, and its answer back."""
        method, target, version = head[0].split()
        url = urlsplit(target)
        upstream, upstream_writer = await self._connect(url.hostname or "", url.port or 80)
        path = (url.path or "/") + (f"?{url.query}" if url.query else "")
        fields = [field for field in head[1:] if not field.lower().startswith("proxy-")]
        start = [f"{method} {path} {version}", *fields, "\r\n"]
        upstream_writer.write("\r\n".join(start).encode("latin-1") + await reader.readexactly(_length(fields)))
        answer = await upstream.readuntil(b"\r\n\r\n")
        writer.write(answer + await upstream.readexactly(_length(answer.decode("latin-1").split("\r\n"))))
        upstream_writer.close()

    async def _connect(self, host: str, port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(self._names.get(host, host), port)
        self._writers.add(writer)
        return reader, writer


def _length(fields: list[str]) -> int:
    return next(int(field.split(":")[1]) for field in fields if field.lower().startswith("content-length:"))


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()
