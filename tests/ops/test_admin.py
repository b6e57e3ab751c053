"""The admin address: ready only while events can be accepted, and alive as long as it responds."""

import asyncio
import logging
import zlib
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import orjson
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer
from prometheus_client import CollectorRegistry
from typing_extensions import override

from gateway.engine.unavailable_partitions import Unread
from gateway.log.base import ALL, Partition
from gateway.model import LogNearlyFullError, LogUnavailableError
from gateway.ops import admin
from gateway.ops.admin import admin_application, admin_runner
from gateway.telemetry.metrics import Metrics
from tests.stalls import stalls

if TYPE_CHECKING:
    from gateway.log.base import Log

Client = TestClient[web.Request, web.Application]


class PingedLog:
    def __init__(self) -> None:
        self.failure: LogUnavailableError | None = None
        self.hangs = False

    async def ping(self) -> None:
        if self.hangs:
            await asyncio.Event().wait()
        if self.failure is not None:
            raise self.failure


@dataclass
class World:
    client: Client
    log: PingedLog
    registry: CollectorRegistry
    unready: str | None = None
    unread: Mapping[Partition, Unread] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    async def get(self, path: str) -> tuple[int, str]:
        async with self.client.get(path) as response:
            return response.status, await response.text()


@pytest.fixture
async def world() -> AsyncIterator[World]:
    log, registry = PingedLog(), CollectorRegistry()
    application = admin_application(
        registry=registry,
        metrics=Metrics(registry),
        log=cast("Log", log),
        unready=lambda: made.unready,
        unread=lambda: made.unread,
        notes=lambda: made.notes,
        tokens=lambda: {"notion": ["secret_1", "secret_2"]},
        ping_timeout=0.05,
    )
    async with TestClient(TestServer(application)) as client:
        made = World(client, log, registry)
        yield made


async def test_notes_are_reported_beside_ready(world: World) -> None:
    world.notes.append("events: 1 record waits")
    assert await world.get("/readyz") == (200, '{"ready":true,"reasons":[],"notes":["events: 1 record waits"]}')


async def test_ready_while_events_can_be_taken_in(world: World) -> None:
    assert await world.get("/readyz") == (200, '{"ready":true,"reasons":[]}')
    assert world.registry.get_sample_value("gateway_log_up") == 1


async def test_unread_partitions_are_reported_and_leave_it_ready(world: World) -> None:
    world.unread = {
        Partition("gateway.events.github", 3): Unread(1_700_000_000.0, "no leader"),
        Partition("gateway.dead", ALL): Unread(1_700_000_060.0, "no such topic"),
    }
    status, text = await world.get("/readyz")
    assert status == 200
    assert orjson.loads(text)["unread"] == [
        {"topic": "gateway.dead", "partition": "all", "since": "2023-11-14T22:14:20+00:00", "reason": "no such topic"},
        {
            "topic": "gateway.events.github",
            "partition": "3",
            "since": "2023-11-14T22:13:20+00:00",
            "reason": "no leader",
        },
    ]


def away(world: World) -> None:
    world.log.failure = LogUnavailableError("no broker answers")


def hanging(world: World) -> None:
    world.log.hangs = True


def draining(world: World) -> None:
    world.unready = "draining"


@pytest.mark.parametrize(
    ("change", "reason", "log_up"),
    [
        (away, "log: no broker answers", 0),
        (hanging, "log: no answer within 0.05 s", 0),
        (draining, "draining", 1),
    ],
)
async def test_not_ready_says_why_and_stays_alive(
    world: World, change: Callable[[World], None], reason: str, log_up: int
) -> None:
    change(world)
    assert await world.get("/readyz") == (503, f'{{"ready":false,"reasons":["{reason}"]}}')
    assert world.registry.get_sample_value("gateway_log_up") == log_up
    assert (await world.get("/livez"))[0] == 200


async def test_a_log_that_refuses_only_large_events_is_reported_and_leaves_it_ready(
    world: World,
) -> None:
    """No other process has the file: where this one isn't ready, small events would be refused, too."""
    world.notes.append("events: 1 record waits")
    world.log.failure = LogNearlyFullError("no room")
    told = '{"ready":true,"reasons":[],"notes":["events: 1 record waits","log: no room"]}'
    for _ in range(2):
        assert await world.get("/readyz") == (200, told)
    assert world.registry.get_sample_value("gateway_log_up") == 0
    world.notes.clear()
    world.log.failure = None
    assert await world.get("/readyz") == (200, '{"ready":true,"reasons":[]}')
    assert world.registry.get_sample_value("gateway_log_up") == 1


async def test_metrics_are_exposed_for_prometheus(world: World) -> None:
    async with world.client.get("/metrics") as response:
        assert response.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
        assert "# TYPE gateway_requests_total counter" in await response.text()


async def test_a_head_request_is_refused_as_it_would_get_the_body(world: World) -> None:
    async with world.client.head("/metrics") as response:
        assert response.status == 405


async def test_tokens_are_for_this_machine_alone(world: World) -> None:
    assert await world.get("/handshakes") == (200, '{"tokens":{"notion":["secret_1","secret_2"]}}')
    port = world.client.port
    for headers, status in (
        ({"Host": f"localhost:{port}"}, 200),
        ({"Host": f"[::1]:{port}"}, 200),
        ({"Host": f"0.0.0.0:{port}"}, 200),
        ({"Host": "gateway.example.com"}, 403),  # a page in a browser here, by a name of its own
        ({"X-Forwarded-For": "192.0.2.1"}, 403),
        ({"Forwarded": "for=192.0.2.1"}, 403),
        ({"Via": "1.1 proxy"}, 403),
    ):
        async with world.client.get("/handshakes", headers=headers) as response:
            assert response.status == status, headers
            assert ("secret" in await response.text()) == (status == 200)


async def test_tokens_are_not_shown_to_another_machine(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admin, "_LOOPBACK", ("192.0.2.1",))
    assert (await world.get("/handshakes"))[0] == 403


async def test_no_request_changes_anything_and_no_page_of_another_origin_reads_a_response(world: World) -> None:
    """A page in a browser on this machine may send requests here, and reads what a server lets its origin read."""
    assert world.client.app is not None
    paths = [resource.canonical for resource in world.client.app.router.resources()]
    assert sorted(paths) == ["/handshakes", "/livez", "/metrics", "/readyz", "/status"]
    for path in paths:
        for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
            async with world.client.request(method, path, headers={"Origin": "https://evil.example"}) as response:
                assert response.status == 405, (method, path)
        async with world.client.get(path, headers={"Origin": "https://evil.example"}) as response:
            assert not [name for name in response.headers if name.lower().startswith("access-control-")]


class AsServed(TestServer):
    """Serves an application as processes do."""

    @override
    async def _make_runner(self, **_: Any) -> web.AppRunner:
        return admin_runner(self.app, close_timeout=1.0)


@pytest.mark.parametrize("path", ["/readyz", "/nowhere"])
async def test_a_trailer_is_no_header_of_the_next_request(world: World, path: str) -> None:
    """Of a proxy's connection, that may be somebody else's: the trailer could be a cookie."""
    reader, writer = await asyncio.open_connection("127.0.0.1", world.client.port)
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    writer.write(head.encode() + b"2\r\nhi\r\n0\r\nCookie: session=a-strangers\r\n\r\n")
    response = await reader.readuntil(b"\r\n\r\n")
    assert b"Connection: close" in response
    async with asyncio.timeout(5):
        await reader.read()  # to the end
    writer.close()


@pytest.mark.parametrize(("method", "path"), [("GET", "/livez"), ("POST", "/metrics"), ("POST", "/nothing")])
async def test_a_body_that_nobody_reads_is_not_inflated(world: World, method: str, path: str) -> None:
    """A request of 1 MB would keep the event loop from everything else for seconds, while a GiB is made of it."""
    packing = zlib.compressobj(wbits=31)
    first, block = [packing.compress(bytes(1 << 20)) + packing.flush(zlib.Z_FULL_FLUSH) for _ in range(2)]
    body = first + block * 1000
    assert world.client.app is not None
    async with TestClient(AsServed(world.client.app)) as client, stalls() as seen:
        async with client.request(method, path, data=body, headers={"Content-Encoding": "gzip"}) as response:
            await response.read()
        async with client.get("/livez") as response:
            assert response.status == 200
    assert seen.longest < 0.3


MALFORMED = (
    b"nonsense\r\n\r\n",
    b"GET /livez HTTP/1.1\r\nHost: x\r\n" + b"".join([b"X-%d: a\r\n" % number for number in range(200)]) + b"\r\n",
    b"GET /livez HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 20_000 + b"\r\n\r\n",
    b"GET /livez HTTP/1.1\r\nHost: x\r\nContent-Length: x\r\n\r\n",
    b"GET /livez HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nnonsense\r\n",
    b"GET /livez HTTP/1.1\r\nHost: x\r\nContent-Encoding: gzip\r\nContent-Length: 8\r\n\r\nnonsense",
    b"GET /livez HTTP/9.9\r\nHost: x\r\n\r\n",
    b"GET http://[x/ HTTP/1.1\r\nHost: x\r\n\r\n",
)


async def test_no_stranger_writes_into_the_log(world: World, caplog: pytest.LogCaptureFixture) -> None:
    """Each malformed request would be a line with a stack trace; what is our fault still is one."""
    assert world.client.app is not None
    async with TestClient(AsServed(world.client.app)) as client:
        for request in MALFORMED:
            reader, writer = await asyncio.open_connection(client.host, client.port)
            writer.write(request)
            assert (await reader.read(4096)).startswith(b"HTTP/1."), request
            writer.write(b"GET /livez HTTP/1.1\r\nConnection: close\r\nHost: x\r\n\r\n")
            with suppress(ConnectionError):
                await reader.read()
            writer.close()
        assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
        world.log.failure = cast("LogUnavailableError", RuntimeError("ours"))
        async with client.get("/readyz") as response:
            assert response.status == 500
    assert "ours" in caplog.text
