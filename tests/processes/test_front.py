"""The admin address of several processes: what it asks of each, and what it passes on to the first, unchanged."""

import asyncio
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import orjson
import pytest
from aiohttp import web
from yarl import URL

from gateway.access.access import Access
from gateway.access.local_request import FORWARDING_HEADERS
from gateway.access.principal import AccessError
from gateway.ops.admin import admin_runner
from gateway.processes.child import admin_of
from gateway.processes.front import Front
from gateway.processes.metrics_page import ProcessState
from gateway.processes.peer import PEER, as_from_peer

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class World:
    """Two children whose answers a test chooses, and the parent's address."""

    def __init__(self) -> None:
        self.answers: list[dict[str, Any]] = [{}, {}]
        self.statuses = [200, 200]
        self.silent: set[int] = set()
        self.handler: Handler | None = None
        self.port = 0
        self.states = [ProcessState(number=number, pid=1, is_ready=True, restarts=0) for number in range(2)]

    async def ask(self, path: str, **more: Any) -> tuple[int, Any]:
        url = f"http://127.0.0.1:{self.port}{path}"
        async with aiohttp.ClientSession() as session, session.get(url, **more) as response:
            content = await response.read()
            return response.status, orjson.loads(content) if content[:1] == b"{" else content.decode()


@asynccontextmanager
async def child(folder: Path, number: int, world: World) -> AsyncIterator[None]:
    async def answer(request: web.Request) -> web.StreamResponse:
        if request.path.startswith("/any"):
            assert world.handler is not None
            return await world.handler(request)
        if number in world.silent and request.transport is not None:
            request.transport.abort()
        return web.json_response(world.answers[number], status=world.statuses[number])

    application = web.Application(middlewares=[as_from_peer])
    application.router.add_route("*", "/{rest:.*}", answer)
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.UnixSite(runner, admin_of(folder, number)).start()
    try:
        yield
    finally:
        await runner.cleanup()


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    with tempfile.TemporaryDirectory(prefix="gw-") as name:  # short: a unix socket's path has a hundred bytes
        folder = Path(name)
        front = Front(folder, lambda: world.states)
        runner = admin_runner(front.application(), close_timeout=0.1, ends_with_client=True)
        async with AsyncExitStack() as stack:
            for number in range(2):
                await stack.enter_async_context(child(folder, number, world))
            await stack.enter_async_context(front.open())
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            world.port = runner.addresses[0][1]
            yield world


async def test_all_are_ready_or_it_says_which_is_not(world: World) -> None:
    world.answers = [{"ready": True, "reasons": [], "notes": ["index: behind"]}, {"ready": True, "reasons": []}]
    assert await world.ask("/readyz") == (200, {"ready": True, "reasons": [], "notes": ["process 0: index: behind"]})
    world.answers[1] = {"ready": False, "reasons": ["starting"], "unread": [{"topic": "t"}]}
    world.statuses[1] = 503
    assert await world.ask("/readyz") == (
        503,
        {
            "ready": False,
            "reasons": ["process 1: starting"],
            "unread": [{"topic": "t", "process": 1}],
            "notes": ["process 0: index: behind"],
        },
    )


async def test_a_process_that_has_ended_is_no_reason_to_end_the_others(world: World) -> None:
    world.statuses[1] = 503
    assert (await world.ask("/livez"))[0] == 503
    world.states[1] = ProcessState(number=1, pid=None, is_ready=False, restarts=1)
    assert await world.ask("/livez") == (200, {"alive": True, "reasons": []})


async def test_the_status_has_that_of_each_and_who_does_not_answer(world: World) -> None:
    world.answers = [{"version": "1", "role": "all", "rules": {}, "holds": []}, {}]
    world.silent.add(1)
    world.states[1] = ProcessState(number=1, pid=None, is_ready=False, restarts=3)
    status, found = await world.ask("/status")
    assert status == 200
    assert found["version"] == "1"
    assert found["processes"][0]["pid"] == 1
    assert found["processes"][1] == {
        "role": "all",
        "problem": {"reason": "not running"},
        "process": 1,
        "pid": None,
        "restarts": 3,
    }


async def test_tokens_are_those_of_all_and_for_this_machine_alone(world: World) -> None:
    world.answers = [{"tokens": {"notion": ["a"]}}, {"tokens": {"notion": ["b"], "other": ["c"]}}]
    assert await world.ask("/handshakes") == (200, {"tokens": {"notion": ["a", "b"], "other": ["c"]}})
    assert (await world.ask("/handshakes", headers={"X-Forwarded-For": "192.0.2.1"}))[0] == 403
    assert (await world.ask("/handshakes", headers={"Host": "rebound.example"}))[0] == 403


async def test_a_trailer_is_no_header_of_the_next_request(world: World) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
    writer.write(b"POST /livez HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
    writer.write(b"2\r\nhi\r\n0\r\nCookie: session=a-strangers\r\n\r\n")
    async with asyncio.timeout(5):
        assert (await reader.read()).startswith(b"HTTP/1.1 200 "), "the connection is closed after it"
    writer.close()


async def test_a_request_reaches_the_first_as_it_came(world: World) -> None:
    seen: list[tuple[str, str, str | None, bytes, str | None]] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        body = await request.read()
        seen.append((request.method, request.raw_path, request.remote, body, request.headers.get("X-Mine")))
        response = web.Response(status=418, body=b"teapot", headers={"X-Theirs": "yes"})
        response.headers.add("Set-Cookie", "a=1")
        response.headers.add("Set-Cookie", "b=2")
        return response

    world.handler = handler
    url = f"http://127.0.0.1:{world.port}/any%2Fthing?q=a%20b&q=c"
    async with aiohttp.ClientSession() as session:
        headers = {"X-Mine": "1", PEER: "203.0.113.9"}
        async with session.put(URL(url, encoded=True), data=b"body", headers=headers) as response:
            assert (response.status, await response.read()) == (418, b"teapot")
            assert response.headers.getall("Set-Cookie") == ["a=1", "b=2"]
            assert response.headers["X-Theirs"] == "yes"
        async with session.head(url) as response:
            assert (response.status, response.headers["Content-Length"], await response.read()) == (418, "6", b"")
    assert seen[0] == ("PUT", "/any%2Fthing?q=a%20b&q=c", "127.0.0.1", b"body", "1")


async def _who_asks(world: World, *heads: str) -> list[str]:
    """Return who the first child takes the senders of requests for, each with a connection of its own."""
    found: list[str] = []

    async def handler(request: web.Request) -> web.StreamResponse:
        try:
            found.append(Access().principal_of(request).name)
        except AccessError as error:
            found.append(str(error.reason))
        return web.Response()

    world.handler = handler
    for head in heads:
        reader, writer = await asyncio.open_connection("127.0.0.1", world.port)
        writer.write(f"{head}\r\n\r\n".encode())
        await reader.read()
        writer.close()
    return found


async def test_who_asks_through_nginx_is_not_local_to_a_child_either(world: World) -> None:
    heads = [f"GET /any HTTP/{version}\r\nHost: 127.0.0.1:9090\r\nConnection: close" for version in ("1.1", "1.0")]
    assert await _who_asks(world, *heads) == ["local", "not_local"]


@pytest.mark.parametrize("name", FORWARDING_HEADERS)
async def test_a_sender_takes_no_header_away_by_which_a_proxy_is_known(world: World, name: str) -> None:
    """Some proxies pass on what a sender has in `Connection`, and what that names belongs to one connection."""
    head = f"GET /any HTTP/1.1\r\nHost: localhost\r\n{name}: 203.0.113.9\r\nConnection: close, {name.lower()}"
    assert await _who_asks(world, head) == ["not_local"]


async def test_a_sender_takes_no_other_header_away_that_decides_who_asks(world: World) -> None:
    proxied = "GET /any HTTP/1.1\r\nHost: console.example.com\r\nConnection: close, Host"
    none = "GET /any HTTP/1.1\r\nHost:\r\nConnection: close, Host"
    foreign = "GET /any HTTP/1.1\r\nHost: localhost\r\nOrigin: https://a.example\r\nConnection: close, Origin"
    unknown = "GET /any HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer gwt_x\r\nConnection: close, Authorization"
    found = await _who_asks(world, proxied, none, foreign, unknown)
    assert found == ["not_local", "not_local", "foreign_page", "bad_token"]


async def test_a_stream_is_passed_on_as_it_comes_and_ends_with_its_listener(world: World) -> None:
    ended = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        try:
            while True:
                await response.write(b"data: 1\n\n")
                await asyncio.sleep(0.01)
        except ConnectionError:
            ended.set()
        return response

    world.handler = handler
    async with aiohttp.ClientSession() as session:
        async with session.get(f"http://127.0.0.1:{world.port}/any") as response:
            assert await response.content.readexactly(18) == b"data: 1\n\n" * 2
        await asyncio.wait_for(ended.wait(), 5)


async def test_an_answer_that_breaks_off_is_not_taken_for_a_whole_one(world: World) -> None:
    async def handler(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        await response.write(b"half")
        assert request.transport is not None
        request.transport.abort()
        return response

    world.handler = handler
    async with aiohttp.ClientSession() as session:
        with pytest.raises(aiohttp.ClientError):
            async with session.get(f"http://127.0.0.1:{world.port}/any") as response:
                await response.read()


async def test_without_the_first_process_the_api_is_unavailable_and_says_why() -> None:
    with tempfile.TemporaryDirectory(prefix="gw-") as name:
        front = Front(Path(name), lambda: [ProcessState(number=0, pid=None, is_ready=False, restarts=0)])
        runner = admin_runner(front.application(), close_timeout=0.1)
        async with front.open():
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            world = World()
            world.port = runner.addresses[0][1]
            status, text = await world.ask("/api/v1/events")
            assert (status, text.partition(" (")[0]) == (503, "process 0 doesn't respond")
            assert (await world.ask("/readyz"))[1]["reasons"] == ["process 0: not running"]
            assert 'gateway_process_up{process="0"} 0' in (await world.ask("/metrics"))[1]
            await runner.cleanup()
