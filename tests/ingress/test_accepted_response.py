"""`Accepted` stands for aiohttp's own response in what its server does with one: whatever that is, in this version.

It is written in one piece and skips aiohttp's constructor: it may use, and be asked for, no more than is held here. The
bound on aiohttp in pyproject.toml is moved when this has been seen to hold with the next version.
"""

import asyncio
import re
import tomllib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from pathlib import Path

import pytest
from aiohttp import web

from gateway.ingress.responses import Accepted
from gateway.model import EventId

EVENT = EventId("evt_0123456789abcdef0123456789abcdef")
BODY = b'{"id":"evt_0123456789abcdef0123456789abcdef"}'


def test_the_bound_on_aiohttp_is_the_version_after_the_one_that_is_tested() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    [bounds] = [each for each in project["dependencies"] if each.startswith("aiohttp>")]
    found = re.fullmatch(r"aiohttp>=3\.(\d+),<3\.(\d+)", bounds)
    assert found is not None
    assert int(found[2]) - 1 == int(version("aiohttp").split(".")[1])


@asynccontextmanager
async def serving() -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """Yield a connection to a server whose every answer is an `Accepted`."""

    async def handle(_: web.BaseRequest) -> web.StreamResponse:
        return Accepted(EVENT)

    server = web.Server(handle, access_log=None)
    listener = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*listener.sockets[0].getsockname())
    try:
        yield reader, writer
    finally:
        writer.close()
        listener.close()
        await server.shutdown(1.0)


async def head_of(reader: asyncio.StreamReader) -> list[bytes]:
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    assert await asyncio.wait_for(reader.readexactly(len(BODY)), 5) == BODY
    return head.split(b"\r\n")[:-2]


@pytest.mark.parametrize(
    ("request_line", "header", "connection"),
    [
        (b"POST / HTTP/1.1", b"", None),
        (b"POST / HTTP/1.1", b"Connection: close\r\n", b"Connection: close"),
        (b"POST / HTTP/1.0", b"", b"Connection: close"),
        (b"POST / HTTP/1.0", b"Connection: keep-alive\r\n", b"Connection: keep-alive"),
    ],
)
async def test_the_server_sends_it_once_and_keeps_or_closes_the_connection_as_it_says(
    request_line: bytes, header: bytes, connection: bytes | None
) -> None:
    async with serving() as (reader, writer):
        for _ in range(2):
            writer.write(request_line + b"\r\nHost: x\r\n" + header + b"Content-Length: 2\r\n\r\n{}")
            status, *lines = await head_of(reader)
            assert status == b"HTTP/1.1 202 Accepted"
            assert b"gateway-event-id: " + EVENT.encode() in lines
            assert [line for line in lines if line.startswith(b"Connection:")] == ([connection] if connection else [])
            if connection == b"Connection: close":
                assert await asyncio.wait_for(reader.read(), 5) == b""
                return


async def test_requests_in_one_piece_are_answered_one_after_the_other() -> None:
    async with serving() as (reader, writer):
        writer.write(3 * b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
        for _ in range(3):
            assert (await head_of(reader))[0] == b"HTTP/1.1 202 Accepted"


async def test_a_connection_is_closed_with_it_where_the_gateway_ends() -> None:
    async def handle(_: web.BaseRequest) -> web.StreamResponse:
        answer = Accepted(EVENT)
        answer.force_close()
        return answer

    server = web.Server(handle, access_log=None)
    listener = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*listener.sockets[0].getsockname())
    writer.write(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n\r\n{}")
    assert b"Connection: close" in await head_of(reader)
    assert await asyncio.wait_for(reader.read(), 5) == b""
    writer.close()
    listener.close()
    await server.shutdown(1.0)
