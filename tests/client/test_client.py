"""One attempt: what every kind of destination makes of it, and what it leaves behind."""

import asyncio
import gc
import gzip
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from pathlib import Path

import pytest
import uvloop
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from gateway.client import client as module
from gateway.client import connections
from gateway.client.client import Client
from gateway.client.egress import EgressGuard
from gateway.client.request import Outbound
from gateway.client.resolver import Resolver
from gateway.model import Attempt, DestinationResponse, Headers, Result
from gateway.rules.request_templates import Method
from gateway.rules.rules import Egress
from tests.sink import Answer, Fault, Sink

OPEN = EgressGuard(Egress())
CLOSED = EgressGuard(Egress(is_private_allowed=False))


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    async with Client(OPEN) as client:
        yield client


def outbound(url: str, *, headers: Headers = (), body: bytes = b"{}") -> Outbound:
    return Outbound(url=url, headers=headers, body=body)


async def attempt(client: Client, url: str, *, timeout: float = 5.0, body: bytes = b"{}") -> Attempt:
    return await client.attempt(outbound(url, body=body), timeout=timeout, number=1)


FLOOD = Answer(raw=b"HTTP/1.1 102 Processing\r\n\r\n" * 40_000)
"""Interim responses, and no end of them."""
BROKEN = Answer(raw=b"HTTP/1.1 2", closes=True)

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def serving(serve: Serve, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """Serve each connection by a coroutine; the context is `host:port`, and nothing is open after it."""
    writers: list[asyncio.StreamWriter] = []

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        await serve(reader, writer)

    async with await asyncio.start_server(accept, "127.0.0.1", 0, ssl=tls) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        # Before the server is: since Python 3.12 it waits for its connections.
        for writer in writers:
            writer.transport.abort()
            with suppress(OSError):
                await writer.wait_closed()


async def test_bytes_reach_the_wire_as_they_came(client: Client) -> None:
    received = bytearray()

    async def record(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while not received.endswith(b"\xff" * 2):
            received.extend(await reader.read(65536))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    headers = (
        (b"X-Twice", b"1"),
        (b"user-AGENT", b"GitHub-Hookshot/1"),
        (b"X-Latin", b"caf\xe9"),
        (b"X-Utf8", "café ☕".encode()),
        (b"X-Broken", b"\xff\xfe\x80"),
        (b"X-Empty", b""),
        (b"X-Twice", b"2"),
    )
    body = bytes(range(256)) + b"\xff"
    async with serving(record) as address:
        url = f"http://{address}/a%20b;c?x=1&y=%2F&z=é#part"
        done = await client.attempt(outbound(url, headers=headers, body=body), timeout=5, number=3)
    assert (done.result, done.status, done.number, done.detail) == (Result.SUCCESS, 200, 3, "")
    expected = [
        b"POST /a%20b;c?x=1&y=%2F&z=%C3%A9 HTTP/1.1",
        b"Host: " + address.encode(),
        *[name + b": " + value for name, value in headers],
        b"Content-Length: 257",
        b"",
        body,
    ]
    assert bytes(received) == b"\r\n".join(expected)


@pytest.mark.parametrize(
    ("parts", "target"),
    [
        (("/", "", ""), b"/"),
        (("/", "/a%20b", ""), b"/a%20b"),
        (("/api/", "/a", "b=%26"), b"/api/a?b=%26"),
        (("/api?key=x", "/a/", "b=1"), b"/api/a/?key=x&b=1"),
        (("/api?key=x", "", "b=1"), b"/api?key=x&b=1"),
        (("/api/", "", ""), b"/api/"),
    ],
)
@pytest.mark.parametrize("method", Method)
@pytest.mark.parametrize("body", [b"", b"{}"])
async def test_each_method_and_target_reaches_the_wire(
    client: Client, method: Method, body: bytes, parts: tuple[str, str, str], target: bytes
) -> None:
    url, path, query = parts
    received = bytearray()

    async def record(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while b"\r\n\r\n" not in received or not received.endswith(body):
            received.extend(await reader.read(65536))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    async with serving(record) as address:
        request = Outbound(url=f"http://{address}{url}", headers=(), body=body, method=method, path=path, query=query)
        done = await client.attempt(request, timeout=5, number=1)
    assert done.result is Result.SUCCESS
    has_length = bool(body) or method in ("POST", "PUT", "PATCH")
    lines = [
        method.encode() + b" " + target + b" HTTP/1.1",
        b"Host: " + address.encode(),
        *([b"Content-Length: %d" % len(body)] if has_length else []),
    ]
    assert bytes(received) == b"\r\n".join([*lines, b"", body])


@pytest.mark.parametrize("size", [0, 1, 70_000, 5_000_000])
async def test_bodies_of_any_size_arrive_whole(client: Client, size: int) -> None:
    body = bytes([number % 251 for number in range(1000)]) * (size // 1000) + b"x" * (size % 1000)
    async with Sink() as sink:
        done = [await attempt(client, sink.url, body=body) for _ in range(2)]
    assert [one.result for one in done] == [Result.SUCCESS] * 2
    assert [request.body == body for request in sink.requests] == [True] * 2
    assert sink.connections == 1


@pytest.mark.parametrize(
    ("status", "result", "detail"),
    [
        (204, Result.SUCCESS, ""),
        (299, Result.SUCCESS, ""),
        (302, Result.REDIRECT, "302 Found"),
        (400, Result.CLIENT_ERROR, "400 Bad Request"),
        (401, Result.UNAUTHORIZED, "401 Unauthorized"),
        (403, Result.UNAUTHORIZED, "403 Forbidden"),
        (410, Result.CLIENT_ERROR, "410 Gone"),
        (429, Result.THROTTLED, "429 Too Many Requests"),
        (499, Result.CLIENT_ERROR, "499"),
        (503, Result.SERVER_ERROR, "503 Service Unavailable"),
        (600, Result.TRANSPORT, "600"),
    ],
)
async def test_each_status_has_its_result(client: Client, status: int, result: Result, detail: str) -> None:
    async with Sink(status) as sink:
        done = await attempt(client, sink.url)
    assert (done.result, done.status, done.detail, done.retry_after) == (result, status, detail, None)


async def test_a_redirect_is_not_followed(client: Client) -> None:
    async with Sink() as other, Sink(Answer(status=307, headers=(("Location", other.url),))) as sink:
        done = await attempt(client, sink.url)
    assert done.result is Result.REDIRECT
    assert other.connections == 0


async def test_cookies_are_neither_kept_nor_sent(client: Client) -> None:
    async with Sink(Answer(headers=(("Set-Cookie", "session=1; Path=/"),))) as sink:
        for _ in range(2):
            await attempt(client, sink.url)
    assert sink.requests[1].header("cookie") is None


async def test_proxy_variables_change_nothing(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Sink() as proxy, Sink() as sink:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        assert (await attempt(client, sink.url)).result is Result.SUCCESS
    assert proxy.connections == 0


@pytest.mark.parametrize(("status", "expected"), [(429, 120.0), (503, 120.0), (200, None), (404, None), (500, None)])
async def test_retry_after_counts_where_it_throttles(client: Client, status: int, expected: float | None) -> None:
    async with Sink(Answer(status=status, headers=(("Retry-After", "120"),))) as sink:
        assert (await attempt(client, sink.url)).retry_after == expected


@pytest.mark.parametrize(("ahead", "expected"), [(40, 10.0), (30, 0.0), (10, 0.0), (200_000, 86400.0)])
async def test_a_date_in_retry_after_counts_from_when_the_response_is_there(ahead: int, expected: float) -> None:
    """Of a destination that takes half a minute to say when it may be asked again; that may have passed meanwhile."""
    began = 1_700_000_000.0
    now = began

    async def busy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal now
        await reader.readuntil(b"{}")
        now = began + 30
        date = formatdate(began + ahead, usegmt=True)
        writer.write(f"HTTP/1.1 503 Busy\r\nRetry-After: {date}\r\nContent-Length: 0\r\n\r\n".encode())

    async with serving(busy) as address, Client(OPEN, clock=lambda: now) as client:
        done = await attempt(client, f"http://{address}/")
    assert (done.at, done.retry_after) == (began, expected)


async def test_connections_are_used_again(client: Client) -> None:
    async with Sink() as sink:
        for _ in range(5):
            await attempt(client, sink.url)
        await asyncio.gather(*[attempt(client, sink.url) for _ in range(10)])
        await asyncio.gather(*[attempt(client, sink.url) for _ in range(10)])
        assert (sink.connections, client.open_connections) == (10, 10)


async def test_idle_connections_are_closed_after_a_while(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    async with Sink() as sink:
        await attempt(client, sink.url)
        client._pool._sweep()
        assert client.open_connections == 1
        monkeypatch.setattr(connections, "IDLE_TIMEOUT", -1.0)
        client._pool._sweep()
        await until(lambda: client.open_connections == 0)


async def test_a_stale_connection_is_replaced_at_once_and_not_charged(client: Client) -> None:
    async with Sink(200, Fault.CLOSE, 200) as sink:
        done = [await attempt(client, sink.url) for _ in range(2)]
    assert [(one.result, one.number) for one in done] == [(Result.SUCCESS, 1)] * 2
    assert sink.connections == 2


async def test_a_connection_that_the_destination_closed_is_not_taken(client: Client) -> None:
    async with Sink() as sink:
        await attempt(client, sink.url)
        sink.disconnect()
        await until(lambda: client.open_connections == 0)
        assert (await attempt(client, sink.url)).result is Result.SUCCESS
    assert len(sink.requests) == 2


async def test_a_stale_connection_is_replaced_once(client: Client) -> None:
    async with Sink(200, Fault.CLOSE) as sink:
        await attempt(client, sink.url)
        done = await attempt(client, sink.url)
    assert done.result is Result.TRANSPORT
    assert len(sink.requests) == 3


async def test_a_reused_connection_that_breaks_inside_an_answer_is_a_failure(client: Client) -> None:
    async with Sink(200, Answer(raw=b"HTTP/1.1 20", closes=True), 200) as sink:
        done = [await attempt(client, sink.url) for _ in range(2)]
    assert done[1].result is Result.TRANSPORT
    assert len(sink.requests) == 2


@pytest.mark.parametrize(
    ("fault", "result", "detail"),
    [
        (Fault.HANG, Result.TIMEOUT, "127.0.0.1: expected a response, got none in time"),
        (Fault.DRIP_HEAD, Result.TIMEOUT, "127.0.0.1: expected a response, got none in time"),
        (Fault.CLOSE, Result.TRANSPORT, "127.0.0.1: connection closed without a response"),
        (Fault.RESET, Result.TRANSPORT, "127.0.0.1: connection reset by peer"),
        (Fault.GARBAGE, Result.TRANSPORT, "127.0.0.1: malformed response: expected the head of an HTTP/1.1 response"),
        (BROKEN, Result.TRANSPORT, "127.0.0.1: connection closed in the middle of a response"),
        (FLOOD, Result.TRANSPORT, "127.0.0.1: malformed response: expected the head of an HTTP/1.1 response"),
    ],
)
async def test_each_fault_has_its_result(client: Client, fault: Fault | Answer, result: Result, detail: str) -> None:
    async with Sink(fault) as sink:
        done = await attempt(client, sink.url, timeout=0.1)
        assert (done.result, done.status, done.detail) == (result, None, detail)
        assert done.seconds < 0.3
        await until(lambda: client.open_connections == 0)


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("used", [False, True])
@pytest.mark.parametrize("fault", [*Fault, BROKEN])
@pytest.mark.parametrize("loop", [asyncio.new_event_loop, uvloop.new_event_loop], ids=["asyncio", "uvloop"])
def test_nothing_of_a_failed_attempt_outlives_it(
    loop: Callable[[], asyncio.AbstractEventLoop], fault: Fault | Answer, *, used: bool
) -> None:
    """What the collector has to find it searches for among all that is there, and meanwhile nothing goes on."""

    async def run() -> list[object]:
        async with Sink(*[200] * used, fault) as sink:
            async with Client(OPEN) as client:
                for _ in range(1 + used):
                    await attempt(client, sink.url, timeout=0.1)
            await until(lambda: client.open_connections == 0)
            await asyncio.sleep(0.01)
            return [each for each in gc.get_objects() if isinstance(each, connections.Connection)]

    with asyncio.Runner(loop_factory=loop) as runner:
        assert runner.run(run()) == []


async def test_a_head_decides_whatever_becomes_of_its_body(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "BODY_TIMEOUT", 0.05)
    truncated = Answer(raw=b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf", closes=True)
    until_closed = Answer(raw=b"HTTP/1.1 200 OK\r\n\r\nall", closes=True)
    bad_chunk = Answer(raw=b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n")
    for script in (Fault.DRIP, Fault.ENDLESS, truncated, until_closed, bad_chunk):
        async with Sink(script) as sink:
            done = await attempt(client, sink.url)
            assert (done.result, done.status) == (Result.SUCCESS, 200)
            assert done.seconds < 0.5
            await until(lambda: client.open_connections == 0)


@dataclass
class Sender:
    """Waits for every response."""

    taken: list[DestinationResponse | None] = field(default_factory=list)

    def wait_for(self, outbound: Outbound) -> bool:
        return outbound.url.endswith("/hook")

    def take(self, outbound: Outbound, response: DestinationResponse | None) -> None:
        assert self.wait_for(outbound)
        self.taken.append(response)


@asynccontextmanager
async def client_for(sender: Sender) -> AsyncIterator[Client]:
    async with Client(OPEN, senders=sender) as client:
        yield client


async def test_a_sender_that_waits_gets_the_response_and_its_body() -> None:
    chunks = b"HTTP/1.1 201 Created\r\ncontent-type:  a/b \r\nTransfer-Encoding: chunked\r\n\r\n3\r\nall\r\n0\r\n\r\n"
    until_closed = Answer(raw=b"HTTP/1.1 200 OK\r\n\r\nall", closes=True)
    typed = (("Content-Type", "text/plain"), ("Content-Encoding", "br"))
    length = Answer(status=404, headers=typed, body=b"x" * 65_536)
    sender = Sender()
    async with Sink(Answer(raw=chunks), until_closed, length, 204) as sink, client_for(sender) as client:
        for _ in range(4):
            await attempt(client, sink.url)
        await attempt(client, sink.url.replace("/hook", "/other"))
    assert sender.taken == [
        DestinationResponse(status=201, content_type=b"a/b", body=b"all"),
        DestinationResponse(status=200, body=b"all"),
        DestinationResponse(status=404, content_type=b"text/plain", content_encoding=b"br", body=b"x" * 65_536),
        DestinationResponse(status=204),
    ]


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (("gzip", "gzip"), b"gzip, gzip"),
        (("gzip, deflate", "br"), b"gzip, deflate, br"),
        (("", "gzip"), b"gzip"),
        (("", ""), b""),
        ((), None),
    ],
)
async def test_a_sender_is_told_all_codings_of_a_body_in_their_order(
    lines: tuple[str, ...], expected: bytes | None
) -> None:
    """They may be in several lines (RFC 9110, sections 5.3 and 8.4)."""
    sender = Sender()
    headers = (("Content-Type", "text/plain"), *[("content-encoding", each) for each in lines])
    async with Sink(Answer(headers=headers, body=b"all")) as sink, client_for(sender) as client:
        await attempt(client, sink.url)
    assert sender.taken == [
        DestinationResponse(status=200, content_type=b"text/plain", content_encoding=expected, body=b"all")
    ]


@pytest.mark.parametrize("lines", [("gzip, chunked",), ("gzip", "chunked"), ("gzip",)])
async def test_a_sender_gets_no_body_in_another_transfer_coding(lines: tuple[str, ...]) -> None:
    """Neither sizes of chunks nor compressed bytes that nothing calls so: the attempt is a success all the same."""
    coded = gzip.compress(b"all")
    if lines[-1].endswith("chunked"):
        coded = b"%x\r\n%b\r\n0\r\n\r\n" % (len(coded), coded)
    head = "".join([f"Transfer-Encoding: {each}\r\n" for each in lines]).encode()
    sender = Sender()
    answer = Answer(raw=b"HTTP/1.1 200 OK\r\nConnection: keep-alive\r\n" + head + b"\r\n" + coded, closes=True)
    async with Sink(answer) as sink, client_for(sender) as client:
        for expected in (1, 2):  # the connection isn't used again
            done = await attempt(client, sink.url)
            assert (done.result, done.status, sink.connections) == (Result.SUCCESS, 200, expected)
    assert sender.taken[0] is None


async def test_a_response_for_a_sender_whose_body_is_slow_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is one that is too long, or broken off: the attempt is a success all the same, and takes no longer."""
    monkeypatch.setattr(connections, "BODY_TIMEOUT", 0.05)
    truncated = Answer(raw=b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf", closes=True)
    for script in (Fault.DRIP, Fault.ENDLESS, truncated, Answer(body=b"x" * 65_537)):
        sender = Sender()
        async with Sink(script) as sink, client_for(sender) as client:
            done = await attempt(client, sink.url)
            assert (done.result, done.status) == (Result.SUCCESS, 200)
            assert done.seconds < 0.5
            assert sender.taken == [None]


@pytest.mark.parametrize("fault", [Fault.RESET, Fault.HANG, Fault.GARBAGE])
async def test_a_sender_that_waits_learns_of_a_failure(fault: Fault) -> None:
    sender = Sender()
    async with Sink(fault) as sink, client_for(sender) as client:
        done = await attempt(client, sink.url, timeout=0.3)
        assert done.result is not Result.SUCCESS
        assert sender.taken == [None]


async def test_a_large_answer_is_read_to_the_limit_only(client: Client) -> None:
    async with Sink(Answer(status=500, body=b"x" * 16_384), Answer(status=500, body=b"x" * 16_385), 200) as sink:
        for _ in range(3):
            await attempt(client, sink.url)
    assert [request.connection for request in sink.requests] == [1, 1, 2]


async def test_an_answer_before_the_request_was_read_counts(client: Client) -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")

    async with serving(refuse) as address:
        done = await attempt(client, f"http://{address}/", body=b"x" * 20_000_000)
        assert done.status == 413
        await until(lambda: client.open_connections == 0)


async def test_an_unasked_answer_is_never_taken_for_the_next_one(client: Client) -> None:
    twice = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\nHTTP/1.1 500 Unasked\r\nContent-Length: 0\r\n\r\n"
    async with Sink(Answer(raw=twice), 204) as sink:
        done = [await attempt(client, sink.url) for _ in range(2)]
    assert [one.status for one in done] == [200, 204]
    assert sink.connections == 2


def _answers_once_too_often(listening: socket.socket) -> None:
    """Answer the first connection's request twice, the second time a moment later; that of the second with a 503."""
    for answers in ((b"200 OK", b"200 Unasked"), (b"503 Down",)):
        connection, _ = listening.accept()
        with connection:
            asked = b""
            while not asked.endswith(b"{}"):
                asked += connection.recv(4096)
            for answer in answers:
                connection.sendall(b"HTTP/1.1 " + answer + b"\r\nContent-Length: 0\r\n\r\n")
                time.sleep(0.03)


async def test_an_unasked_answer_that_is_still_unread_is_never_taken_for_the_next_one(client: Client) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=_answers_once_too_often, args=(listening,), daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/"
        assert (await attempt(client, url)).status == 200
        time.sleep(0.1)  # noqa: ASYNC251 - the event loop is busy with something else, and reads nothing meanwhile
        assert (await attempt(client, url)).status == 503
        await asyncio.to_thread(thread.join)


async def test_an_answer_that_comes_unasked_later_ends_its_connection(client: Client) -> None:
    count = 0

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        count += 1
        await reader.readuntil(b"\r\n\r\n{}")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        await asyncio.sleep(0.05)
        writer.write(b"HTTP/1.1 500 Unasked\r\nContent-Length: 0\r\n\r\n")

    async with serving(answer) as address:
        for _ in range(2):
            assert (await attempt(client, f"http://{address}/")).status == 200
            assert client.open_connections == 1
            await until(lambda: client.open_connections == 0)
    assert count == 2


async def test_a_refused_connection_is_reported_with_host_and_port_only(client: Client) -> None:
    async with Sink() as sink:
        await sink.refuse()
        done = await attempt(client, f"{sink.url}?token=secret")
        assert (done.result, done.detail) == (Result.CONNECT, f"127.0.0.1:{sink.port}: connection refused")


async def test_the_deadline_is_one_for_the_whole_attempt(client: Client) -> None:
    with socket.socket() as full:  # its queue takes one connection and forgets the others
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        url = f"https://127.0.0.1:{full.getsockname()[1]}/"
        done = await asyncio.gather(*[attempt(client, url, timeout=0.15) for _ in range(4)])
    assert {one.result for one in done} == {Result.TIMEOUT}
    assert all(0.14 <= one.seconds < 0.5 for one in done)
    assert {one.detail for one in done} == {"127.0.0.1: expected a connection, got none in time"}


async def test_slow_steps_of_an_attempt_share_its_deadline() -> None:
    """A name that is resolved late leaves less for the response: each alone would be in time."""

    def look_up(_: str) -> tuple[str, ...]:
        time.sleep(0.4)
        return ("127.0.0.1",)

    async with Sink(Answer(delay=0.4)) as sink, Client(OPEN, resolver=Resolver(look_up)) as client:
        done = await attempt(client, f"http://a.test:{sink.port}/", timeout=0.6)
        assert (done.result, done.detail) == (Result.TIMEOUT, "a.test: expected a response, got none in time")
        assert len(sink.requests) == 1, "the request was there"


async def test_a_cancelled_attempt_leaves_no_connection(client: Client) -> None:
    async with Sink(Fault.HANG) as sink:
        task = asyncio.ensure_future(attempt(client, sink.url))
        await sink.received(1)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await until(lambda: sink.open_connections == 0)
        assert client.open_connections == 0


async def test_an_attempt_cancelled_in_its_handshake_leaves_no_connection(client: Client) -> None:
    greeted, ended = asyncio.Event(), asyncio.Event()

    async def mute(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        await reader.read(1)
        greeted.set()
        await reader.read()
        ended.set()

    async with serving(mute) as address:
        task = asyncio.ensure_future(attempt(client, f"https://{address}/"))
        await greeted.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(2):
            await ended.wait()


def test_a_dial_that_is_cancelled_at_any_moment_leaves_no_connection_on_uvloop() -> None:
    """Uvloop closes a transport without a word to its protocol, if the task is cancelled in between."""

    async def main() -> int:
        async with Sink(200) as sink, Client(OPEN) as client:

            async def one(turns: int) -> None:
                task = asyncio.ensure_future(attempt(client, sink.url))
                for _ in range(turns):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait([task])

            for _ in range(20):
                await asyncio.gather(*[one(turns) for turns in range(12)])
            async with asyncio.timeout(5):
                await client.__aexit__(None, None, None)
            return client.open_connections

    assert uvloop.run(main()) == 0


async def test_closing_the_client_closes_every_connection() -> None:
    async with Sink(200, Fault.HANG) as sink:
        async with Client(OPEN) as client:
            await attempt(client, sink.url)
            hanging = asyncio.ensure_future(attempt(client, sink.url))
            await sink.received(2)
        assert client.open_connections == 0
        assert (await hanging).result is Result.TRANSPORT
        await until(lambda: sink.open_connections == 0)


# Names and addresses.


def resolving(**zone: tuple[str, ...]) -> Resolver:
    """A resolver that knows only these names (`a_test` is `a.test`)."""

    def look_up(host: str) -> tuple[str, ...]:
        try:
            return zone[host.replace(".", "_")]
        except KeyError:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known") from None

    return Resolver(look_up)


async def test_a_name_is_resolved_and_sent_as_the_host() -> None:
    async with Sink() as sink, Client(OPEN, resolver=resolving(a_test=("127.0.0.1",))) as client:
        done = await attempt(client, f"http://a.test:{sink.port}/hook")
    assert done.result is Result.SUCCESS
    assert sink.requests[0].header("host") == f"a.test:{sink.port}"


async def test_an_ipv6_literal_is_dialled_as_it_is(client: Client) -> None:
    async with Sink(host="::1") as sink:
        assert (await attempt(client, sink.url)).result is Result.SUCCESS
    assert sink.requests[0].header("host") == f"[::1]:{sink.port}"


async def test_an_unknown_name_is_a_dns_failure() -> None:
    async with Client(OPEN, resolver=resolving()) as client:
        done = await attempt(client, "http://nowhere.test/hook?token=secret")
    assert (done.result, done.detail) == (
        Result.DNS,
        "nowhere.test: expected an address, got name or service not known",
    )


async def test_the_next_address_is_tried_when_one_refuses() -> None:
    async with Sink() as sink, Client(OPEN, resolver=resolving(a_test=("127.0.0.9", "127.0.0.1"))) as client:
        assert (await attempt(client, f"http://a.test:{sink.port}/")).result is Result.SUCCESS


async def test_a_black_hole_leaves_time_for_the_next_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CONNECT_TIMEOUT", 0.05)
    async with Sink() as sink, Client(OPEN, resolver=resolving(a_test=("127.0.0.9", "127.0.0.1"))) as client:
        with socket.socket() as full, socket.socket() as first:
            full.bind(("127.0.0.9", sink.port))
            full.listen(0)
            first.connect(("127.0.0.9", sink.port))
            assert (await attempt(client, f"http://a.test:{sink.port}/")).result is Result.SUCCESS


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "2130706433",
        "0x7f.1",
        "0177.0.0.1",
        "127.1",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "localhost",
    ],
)
async def test_no_notation_gets_past_the_guard(host: str) -> None:
    async with Sink() as sink, Sink(host="::1") as six, Client(CLOSED) as client:
        for port in (sink.port, six.port):
            done = await attempt(client, f"http://{host}:{port}/")
            assert done.result is Result.EGRESS_REFUSED
            assert done.detail.startswith("refused by egress policy: ")
    assert (sink.connections, six.connections) == (0, 0)


async def test_metadata_is_refused_by_default(client: Client) -> None:
    done = await attempt(client, "http://169.254.169.254/latest/meta-data/")
    assert (done.result, done.detail) == (
        Result.EGRESS_REFUSED,
        "refused by egress policy: 169.254.169.254 is link-local",
    )


async def test_each_dial_has_the_guard_check_the_current_address() -> None:
    """Rebinding: the name was fine when it was looked up before."""
    guard = EgressGuard(Egress(is_private_allowed=False, allow=(ipaddress.ip_network("127.0.0.1/32"),)))
    now = [0.0]
    addresses = ["127.0.0.1"]
    resolver = Resolver(lambda _: tuple(addresses), clock=lambda: now[0])
    async with Sink(Answer(closes=True)) as sink, Client(guard, resolver=resolver) as client:
        url = f"http://a.test:{sink.port}/"
        assert (await attempt(client, url)).result is Result.SUCCESS
        now[0], addresses[0] = 60.0, "169.254.169.254"
        done = await attempt(client, url)
    assert (done.result, len(sink.requests)) == (Result.EGRESS_REFUSED, 1)


async def test_a_refused_address_among_permitted_ones_is_passed_over() -> None:
    guard = EgressGuard(Egress(is_private_allowed=False, allow=(ipaddress.ip_network("127.0.0.1/32"),)))
    async with Sink() as sink, Client(guard, resolver=resolving(a_test=("127.0.0.9", "127.0.0.1"))) as client:
        assert (await attempt(client, f"http://a.test:{sink.port}/")).result is Result.SUCCESS


async def test_a_new_guard_rules_over_the_connections_of_the_old_one(client: Client) -> None:
    async with Sink(200, Answer(delay=0.05), 200) as sink:
        await attempt(client, sink.url)
        slow = asyncio.ensure_future(attempt(client, sink.url))
        await sink.received(2)
        client.set_guard(CLOSED)
        assert (await slow).result is Result.SUCCESS
        assert (await attempt(client, sink.url)).result is Result.EGRESS_REFUSED
        await until(lambda: sink.open_connections == 0)
        client.set_guard(OPEN)
        assert (await attempt(client, sink.url)).result is Result.SUCCESS
    assert len(sink.requests) == 3


async def test_a_guard_that_says_the_same_keeps_the_connections(client: Client) -> None:
    async with Sink() as sink:
        await attempt(client, sink.url)
        client.set_guard(EgressGuard(Egress()))
        await attempt(client, sink.url)
    assert sink.connections == 1


# TLS.


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with a key and its self-signed certificate for 127.0.0.1 and a.test."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a.test")])
    alternatives = [x509.DNSName("a.test"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    path.write_bytes(private + certificate.public_bytes(pem))
    return path


@pytest.fixture
def server_tls(certificate: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    return context


@pytest.fixture
def client_tls(certificate: Path) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(certificate))


async def test_tls_connections_are_verified_and_used_again(
    server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    resolver = resolving(a_test=("127.0.0.1",), a_test_=("127.0.0.1",))
    async with Sink(tls=server_tls) as sink, Client(OPEN, tls=client_tls, resolver=resolver) as client:
        for url in (sink.url, sink.url, f"https://a.test:{sink.port}/", f"https://a.test.:{sink.port}/"):
            done = await attempt(client, url, body=b"x" * 300_000)
            assert done.result is Result.SUCCESS, done
    assert sink.connections == 3
    assert sink.requests[0].body == b"x" * 300_000


async def test_an_unknown_certificate_is_a_tls_failure(client: Client, server_tls: ssl.SSLContext) -> None:
    async with Sink(tls=server_tls) as sink:
        done = await attempt(client, sink.url)
    assert done.result is Result.TLS
    assert done.detail.startswith("127.0.0.1: certificate not accepted: self")
    assert sink.requests == []


async def test_a_certificate_for_another_name_is_a_tls_failure(
    server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    resolver = resolving(b_test=("127.0.0.1",))
    async with Sink(tls=server_tls) as sink, Client(OPEN, tls=client_tls, resolver=resolver) as client:
        done = await attempt(client, f"https://b.test:{sink.port}/")
    assert done.result is Result.TLS
    assert "hostname mismatch" in done.detail.lower()


async def test_no_tls_at_the_other_end_is_a_tls_failure(client: Client) -> None:
    async def greet(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async with serving(greet) as address:
        done = await attempt(client, f"https://{address}/")
    assert (done.result, done.detail) == (Result.TLS, "127.0.0.1: wrong version number")


async def test_a_handshake_that_ends_is_a_tls_failure(client: Client) -> None:
    async def slam(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.transport.abort()

    async with serving(slam) as address:
        done = await attempt(client, f"https://{address}/")
    assert done.result is Result.TLS


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def test_over_tls_no_request_follows_one_that_was_answered_before_it_was_read(
    run: Callable[..., object], server_tls: ssl.SSLContext, client_tls: ssl.SSLContext
) -> None:
    """It would wait behind the rest of the former, in a transport that says that nothing waits."""

    async def main() -> None:
        count, is_over = 0, asyncio.Event()

        async def refuse_first(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal count
            count += 1
            status = b"413 Too Large" if count == 1 else b"200 OK"
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 " + status + b"\r\nContent-Length: 0\r\n\r\n")
            await is_over.wait()

        async with serving(refuse_first, server_tls) as address, Client(OPEN, tls=client_tls) as client:
            url = f"https://{address}/"
            done = [(await attempt(client, url, timeout=2.0, body=body)).status for body in (b"x" * 20_000_000, b"{}")]
            is_over.set()
        assert (done, count) == ([413, 200], 2)

    run(main())


def test_all_of_it_works_on_uvloop_too(server_tls: ssl.SSLContext, client_tls: ssl.SSLContext) -> None:
    async def main() -> list[Result]:
        script = (200, Fault.CLOSE, 200, Fault.ENDLESS, Fault.RESET, Fault.HANG)
        found = []
        for server, scheme in ((None, "http"), (server_tls, "https")):
            async with Sink(*script, tls=server) as sink, Client(OPEN, tls=client_tls) as client:
                for _ in range(5):
                    done = await attempt(client, f"{scheme}://127.0.0.1:{sink.port}/", timeout=0.3, body=b"x" * 99_999)
                    found.append(done.result)
                assert {len(request.body) for request in sink.requests} == {99_999}
        return found

    good = [Result.SUCCESS] * 3
    assert uvloop.run(main()) == [*good, Result.TRANSPORT, Result.TIMEOUT] * 2


async def until(is_so: Callable[[], bool]) -> None:
    """Let the event loop turn until something that others do is done."""
    async with asyncio.timeout(2):
        while not is_so():  # noqa: ASYNC110 - the others are sockets, which set no event
            await asyncio.sleep(0.001)
