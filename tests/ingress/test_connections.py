"""What a client can hold of the gateway by sending without reading, or by heads that it doesn't end."""

import asyncio
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any
from unittest.mock import Mock, call

import pytest

from gateway.ingress import listener
from gateway.ingress.server import END_OF_HEAD, HEAD_OVERHEAD_FACTOR, Connection, Limits
from tests.ingress.test_ingress import PING, World, a_request, running, until

SHORT = Limits(head_seconds=0.3, write_seconds=0.3)
GET = b"GET /x HTTP/1.1\r\nHost: hooks.example\r\n\r\n"
LARGE_HEAD = b"GET /x HTTP/1.1\r\nHost: hooks.example\r\n" + b"".join(
    [b"X-%d: %b\r\n" % (number, b"a" * 16_000) for number in range(120)]
)
ONE_READ = 256 * 1024
"""Bytes that asyncio reads at most before it hands them on."""


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list of the bytes that each read has brought."""
    sizes: list[int] = []
    received = Connection.data_received

    def counted(connection: Connection, data: bytes) -> None:
        sizes.append(len(data))
        received(connection, data)

    monkeypatch.setattr(Connection, "data_received", counted)
    return sizes


@asynccontextmanager
async def deaf_client(world: World) -> AsyncIterator[Callable[[bytes], Awaitable[None]]]:
    """Connect a client that reads nothing; return what sends for it, as far as anybody takes it."""
    loop = asyncio.get_running_loop()
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.setblocking(False)  # noqa: FBT003 - the standard library's signature
        await loop.sock_connect(deaf, ("127.0.0.1", world.port))

        async def send(data: bytes) -> None:
            await loop.sock_sendall(deaf, data)

        yield send


def connections(world: World) -> list[Connection]:
    assert world.ingress._web is not None
    return [each for each in world.ingress._web.connections if isinstance(each, Connection)]


async def test_a_client_that_reads_nothing_is_let_go_in_time_and_holds_little(taken: list[int]) -> None:
    async with running(limits=SHORT) as world, deaf_client(world) as send:
        connection = await narrowed(world)
        responses = asyncio.ensure_future(send(GET * 30_000))
        await until(lambda: connection.writing_paused)
        held_before = sum(taken)
        responses.cancel()
        heads = asyncio.ensure_future(send((LARGE_HEAD + b"\r\n") * 32))
        async with world.wire() as good:
            while connection in connections(world):
                good.send(a_request())
                assert (await good.reply()).status == 202
                await asyncio.sleep(0.01)
        assert sum(taken) - held_before <= 2 * ONE_READ + 10 * len(PING) + 1_000 * 300
        assert connection.transport is None
        assert world.count("connections_refused_total", reason="unread") == 1
        [line] = [line for line in world.lines if line["event"] == "connection_refused"]
        assert line["detail"] == "expected the responses to be read within 0.3 s"
        with pytest.raises(OSError):  # noqa: PT011 - reset or a broken pipe
            await heads


async def narrowed(world: World) -> Connection:
    """Return the only connection, of whose responses the kernel takes little from now on."""
    await until(lambda: bool(connections(world)))
    [connection] = connections(world)
    assert connection.transport is not None
    connection.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    return connection


async def test_a_response_that_nobody_reads_does_not_keep_a_connection_that_is_closed() -> None:
    """Closing waits for what is still to be written."""
    async with running(limits=SHORT) as world, deaf_client(world) as send:
        await narrowed(world)
        sending = asyncio.ensure_future(send(GET * 10 + b"nonsense\r\n\r\n" + GET * 50_000))
        await until(lambda: not connections(world))
        sending.cancel()
        await asyncio.wait([sending])


async def test_a_client_that_begins_to_read_again_is_kept() -> None:
    async with running(limits=SHORT) as world:
        connection, transport = a_connection(world)
        connection.pause_writing()
        connection.resume_writing()
        await asyncio.sleep(2 * SHORT.write_seconds)
        assert not transport.abort.called
        connection.pause_writing()
        await until(lambda: transport.abort.called)
        connection.connection_lost(None)


def a_connection(world: World) -> tuple[Connection, Any]:
    assert world.ingress._web is not None
    connection = world.ingress._web()
    assert isinstance(connection, Connection)
    no, nothing = Mock(return_value=False), Mock(return_value=None)
    transport = Mock(spec=asyncio.Transport, get_extra_info=nothing, is_closing=no)
    connection.connection_made(transport)
    return connection, transport


async def test_no_more_is_read_while_a_request_waits_behind_another() -> None:
    async with running() as world:
        world.log.may_append.clear()
        connection, transport = a_connection(world)
        connection.data_received(a_request())
        await until(lambda: world.log.waiting == 1)
        assert not transport.pause_reading.called, "nothing waits behind it"
        connection.data_received(a_request())
        assert transport.mock_calls[-1] == call.pause_reading()
        world.log.may_append.set()
        await until(lambda: len(world.log.stored) == 2)
        await until(lambda: connection.idle_since is not None)
        assert call.resume_reading() in transport.mock_calls[transport.mock_calls.index(call.pause_reading()) :]
        connection.connection_lost(None)


async def test_of_what_follows_a_malformed_body_nothing_is_kept() -> None:
    """The request waits for the rest of its body; each read behind it would be another error, with all of it."""
    async with running() as world:
        connection, _ = a_connection(world)
        connection.data_received(a_request("/x", "Transfer-Encoding: chunked", body=b""))
        await asyncio.sleep(0)
        connection.data_received(b"no size\r\n")
        waiting = len(connection._messages)
        for _ in range(100):
            connection.data_received(b"no size either\r\n" * 10_000)
        assert len(connection._messages) == waiting <= 1
        connection.connection_lost(None)


async def test_the_kernel_lets_a_client_go_that_reads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of TLS, what waits in buffers before the kernel's begins no deadline of ours."""
    monkeypatch.setattr(listener, "UNACKNOWLEDGED_MS", 500)
    async with running(limits=Limits(write_seconds=600.0)) as world, deaf_client(world) as send:
        connection = await narrowed(world)
        sending = asyncio.ensure_future(send(GET * 50_000))
        async with asyncio.timeout(20):
            while connection.transport is not None:  # noqa: ASYNC110 - it is up to the kernel
                await asyncio.sleep(0.01)
        sending.cancel()
        await asyncio.wait([sending])


BEGUN = a_request("/in/open", "X-A: " + "a" * 300)[:-60]
BEFORE = {
    "with a body": a_request(),
    "without one": GET,
    "in chunks": a_request("/in/open", "Transfer-Encoding: chunked", body=b"3\r\nabc\r\n0\r\n\r\n"),
    "two of them": a_request() + GET,
    "two of them, the other way round": GET + a_request(),
    "a body that looks like a head": a_request(body=GET),
}


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("is_one_piece", [True, False])
async def test_a_head_that_begins_with_the_request_before_it_has_its_deadline(
    before: str, *, is_one_piece: bool
) -> None:
    async with running(limits=Limits(head_seconds=0.1)) as world, world.wire() as wire:
        number = 2 if "two" in before else 1
        if is_one_piece:
            wire.send(BEFORE[before] + BEGUN)
        else:  # while the one before it is in progress
            world.log.may_append.clear()
            wire.send(BEFORE[before])
            await asyncio.sleep(0.01)
            wire.send(BEGUN)
            await asyncio.sleep(0.01)
            world.log.may_append.set()
        for _ in range(number):
            assert (await wire.reply()).status in {202, 404}
        is_unread = is_one_piece and before == "in chunks"  # `trailers.py`
        if not is_unread:
            assert (await wire.reply()).status == 408
        assert await wire.is_closed()
        assert world.count("rejected_total", source="", reason="head_slow") == (0 if is_unread else 1)


@pytest.mark.parametrize("before", BEFORE)
async def test_a_connection_whose_last_request_was_complete_waits_for_another(before: str) -> None:
    async with running() as world, world.wire() as wire:
        for piece in (len(BEFORE[before]), 7, 1):
            for at in range(0, len(BEFORE[before]), piece):
                wire.send(BEFORE[before][at : at + piece])
                await asyncio.sleep(0)
            for _ in range(2 if "two" in before else 1):
                assert (await wire.reply()).status in {202, 404}
            [connection] = connections(world)
            connection._end_late_head()  # as it is called once the time of a head is over
            assert connection.idle_since is not None
        assert world.count("rejected_total", source="", reason="head_slow") == 0


async def test_a_head_that_begins_while_a_request_is_in_progress_is_not_kept_beyond_its_size(taken: list[int]) -> None:
    async with running(limits=Limits(head_seconds=0.3)) as world, world.wire() as wire:
        world.log.may_append.clear()
        wire.send(a_request())
        await until(lambda: world.log.waiting == 1)
        before = sum(taken)
        wire.send(LARGE_HEAD)
        await asyncio.sleep(0.5)
        limit = HEAD_OVERHEAD_FACTOR * Limits().head_bytes
        assert sum(taken) - before <= limit + ONE_READ
        world.log.may_append.set()
        assert (await wire.reply()).status == 202, "the response to the request comes first"
        assert (await wire.reply()).status == 431
        with suppress(ConnectionResetError):  # what wasn't read is lost
            assert await wire.is_closed()


async def test_a_request_that_comes_while_a_slow_one_is_in_progress_is_answered_after_it() -> None:
    async with running(limits=Limits(head_seconds=0.1)) as world, world.wire() as wire:
        world.log.may_append.clear()
        request = a_request()
        end = request.index(END_OF_HEAD)
        wire.send(request + request[:9])
        await until(lambda: world.log.waiting == 1)
        await asyncio.sleep(0.25)  # longer than a head may take
        wire.send(request[9:end])
        await asyncio.sleep(0.01)
        wire.send(request[end:] + request * 40)
        await asyncio.sleep(0.25)
        world.log.may_append.set()
        assert [(await wire.reply()).status for _ in range(42)] == [202] * 42
        assert len(world.log.stored) == 42
