"""Connections that say nothing: as many as there is room for, and no sender is kept out by them."""

import asyncio
import resource
import select
import socket
import ssl
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import structlog
import uvloop

from gateway.ingress.idle_connections import longest_idle
from gateway.ingress.listener import (
    RESERVED,
    ConnectionSetup,
    Listener,
    Sockets,
    bind,
    room_for_connections,
)
from gateway.ingress.server import Connection, Limits
from tests.ingress.test_ingress import Wire, World, a_request, running, until
from tests.ingress.test_tls import Pki, pki, refusals

__all__ = ["pki"]

LOOPS = {"asyncio": asyncio.run, "uvloop": uvloop.run}
Run = Callable[[Coroutine[Any, Any, None]], None]


# --- Which ones ---


def closed(*connections: tuple[str, float | None], until: float = 100.0, most: int = 99) -> list[int]:
    """Return the numbers of those that would be closed, in that order."""
    found = [(number, network, since) for number, (network, since) in enumerate(connections)]
    return [number for number, _ in longest_idle(found, until=until, limit=most)]


def test_of_one_network_the_longest_silent_go_first() -> None:
    assert closed(("a", 3.0), ("a", 1.0), ("a", 2.0)) == [1, 2, 0]


def test_what_is_in_use_or_has_just_come_is_not_closed() -> None:
    assert closed(("a", None), ("a", 100.1), ("a", 100.0), ("b", None)) == [2]
    assert closed() == []


def test_the_network_with_the_most_goes_first_until_another_has_as_many() -> None:
    assert closed(("b", 1.0), ("a", 4.0), ("a", 5.0), ("a", 6.0), ("b", 2.0)) == [1, 0, 2, 4, 3]


def test_connections_in_use_count_as_their_networks() -> None:
    assert closed(("a", 9.0), ("a", None), ("a", None), ("b", 1.0), ("b", 2.0)) == [0, 3, 4]


def test_no_more_than_so_many_are_chosen() -> None:
    assert closed(*[("a", float(n)) for n in range(50)], most=3) == [0, 1, 2]


def test_since_when_each_is_silent_is_told() -> None:
    assert longest_idle([("x", "a", 7.0)], until=8.0, limit=1) == [("x", 7.0)]


# --- On the wire ---


@asynccontextmanager
async def connected(world: World, address: str, client: ssl.SSLContext | None) -> AsyncIterator[Wire]:
    to: dict[str, Any] = {} if client is None else {"ssl": client, "server_hostname": "hooks.example"}
    wire = Wire(*await asyncio.open_connection("127.0.0.1", world.port, local_addr=(address, 0), **to))
    try:
        yield wire
    finally:
        wire.close()


def connections(world: World) -> list[Connection]:
    assert world.ingress._web is not None
    return [each for each in world.ingress._web.connections if isinstance(each, Connection)]


@pytest.fixture(params=[False, True], ids=["plain", "tls"])
def files(request: pytest.FixtureRequest, pki: Pki) -> tuple[list[Path], ssl.SSLContext | None]:
    """The certificates of an ingress, and what its clients trust."""
    return ([pki.servers.file(pki.folder, "hooks.example")], pki.client()) if request.param else ([], None)


Files = tuple[list[Path], ssl.SSLContext | None]


@pytest.mark.parametrize("loop", LOOPS)
def test_silent_connections_of_one_network_make_room_for_senders(
    files: Files, loop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.ingress.listener.MIN_IDLE", 0.0)
    certificates, client = files

    async def main() -> None:
        limits = Limits(connections=40, opening=4)
        async with running(certificates=certificates, limits=limits) as world, AsyncExitStack() as stack:
            sender = await stack.enter_async_context(connected(world, "127.0.0.1", client))
            sender.send(a_request())
            assert (await sender.reply()).status == 202
            silent = [await stack.enter_async_context(connected(world, "127.0.0.2", client)) for _ in range(100)]
            for _ in range(30):
                async with connected(world, "127.0.0.1", client) as wire:
                    wire.send(a_request())
                    assert (await wire.reply()).status == 202
            assert len(connections(world)) <= 40
            assert refusals(world, "idle") >= 60
            assert await silent[0].is_closed()
            sender.send(a_request())  # silent for longer, but its network has few
            assert (await sender.reply()).status == 202
            lines = [line for line in world.lines if line.get("reason") == "idle"]
            assert len(lines) == 10
            assert {(line["event"], line["address"]) for line in lines} == {("connection_refused", "127.0.0.2")}

    LOOPS[loop](main())


@pytest.mark.parametrize("loop", LOOPS)
def test_no_connection_is_closed_that_has_anything_of_a_request(
    files: Files, loop: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.ingress.listener.MIN_IDLE", 0.0)
    certificates, client = files
    data = a_request()

    async def main() -> None:
        limits = Limits(connections=12, opening=1)
        async with running(certificates=certificates, limits=limits) as world, AsyncExitStack() as stack:
            busy: list[Wire] = []
            while len(busy) < 11:
                busy.append(await stack.enter_async_context(connected(world, "127.0.0.2", client)))
                await until(lambda: len(connections(world)) == len(busy))
            world.log.may_append.clear()
            for number, wire in enumerate(busy):  # a part of a head, a part of a body, a whole request, two
                wire.send((data[:9], data[:-3], data, data + data)[number % 4])
            await until(lambda: world.log.waiting == 5)
            await until(lambda: all(each.idle_since is None for each in connections(world)))
            late = asyncio.create_task(exchange(world, client))
            await asyncio.sleep(0.3)
            assert not late.done()
            assert len(connections(world)) == 11
            assert refusals(world, "idle") == 0
            world.log.may_append.set()
            for number, wire in enumerate(busy):
                wire.send((data[9:], data[-3:], b"", b"")[number % 4])
                for _ in range(2 if number % 4 == 3 else 1):
                    assert (await wire.reply()).status == 202
            assert await late == 202
            assert [line["error"] for line in world.lines if line["event"] == "accept_failed"] == [
                "too many connections, none of which has been idle for a second"
            ]

    LOOPS[loop](main())


async def test_a_process_without_room_leaves_what_waits_for_others_and_closes_nothing_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Perhaps nothing waits there; what does is taken once there is room."""
    monkeypatch.setattr("gateway.ingress.listener.MIN_IDLE", 0.0)
    monkeypatch.setattr("gateway.ingress.listener.TAKE_OVER_INTERVAL", 0.05)
    limits = Limits(connections=4, opening=1)
    async with running(limits=limits) as world, AsyncExitStack() as stack, asyncio.TaskGroup() as tasks:
        silent = [await stack.enter_async_context(connected(world, "127.0.0.1", None)) for _ in range(3)]
        for wire in silent:
            wire.send(a_request())
            assert (await wire.reply()).status == 202
        web = world.ingress._web
        assert web is not None
        ((own, others),) = await bind("127.0.0.1", 0, is_shared=True, processes=2)
        others.listen(10)
        setup = ConnectionSetup(tasks=tasks, sockets=Sockets(own=[own], others=[others]))
        full = Listener(web, setup, logger=structlog.get_logger())
        await full.start("127.0.0.1", 0, is_shared=True, backlog=10)
        await asyncio.sleep(0.3)
        assert refusals(world, "idle") == 0
        assert len(connections(world)) == 3
        silent[0].close()
        await until(lambda: len(connections(world)) == 2)
        host, port = others.getsockname()
        _, writer = await asyncio.open_connection(host, port)
        await until(lambda: len(connections(world)) == 3)
        writer.close()
        full.close()


async def exchange(world: World, client: ssl.SSLContext | None) -> int:
    async with connected(world, "127.0.0.1", client) as wire:
        wire.send(a_request())
        return (await wire.reply()).status


@pytest.mark.parametrize("loop", LOOPS)
def test_a_request_that_is_there_and_not_read_yet_is_answered(files: Files, loop: str) -> None:
    certificates, trusted = files

    def opened(port: int) -> socket.socket:
        raw = socket.create_connection(("127.0.0.1", port), timeout=5)
        client = raw if trusted is None else trusted.wrap_socket(raw, server_hostname="hooks.example")
        client.sendall(a_request())
        assert client.recv(4096).startswith(b"HTTP/1.1 202 ")
        return client

    async def main() -> None:
        async with running(certificates=certificates) as world:
            client = await asyncio.to_thread(opened, world.port)
            [connection] = connections(world)
            await until(lambda: connection.idle_since is not None)
            client.sendall(a_request())  # nothing of the loop runs meanwhile
            assert connection.idle_since is not None
            assert not connection.close_idle()
            assert (await asyncio.to_thread(client.recv, 4096)).startswith(b"HTTP/1.1 202 ")
            await until(lambda: connection.idle_since is not None)
            assert connection.close_idle()
            assert await asyncio.to_thread(client.recv, 4096) == b""
            client.close()

    LOOPS[loop](main())


async def test_a_connection_that_has_just_come_or_got_its_response_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.ingress.listener.MIN_IDLE", 60.0)
    async with running(limits=Limits(connections=12, opening=1)) as world, AsyncExitStack() as stack:
        wires = [await stack.enter_async_context(connected(world, "127.0.0.2", None)) for _ in range(11)]
        wires[0].send(a_request())
        assert (await wires[0].reply()).status == 202
        late = asyncio.create_task(exchange(world, None))
        await asyncio.sleep(0.25)
        assert not late.done()
        assert refusals(world, "idle") == 0
        wires.pop().close()
        assert await late == 202


async def test_all_connections_are_looked_at_once_for_many_that_are_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []

    def counted(found: Any, **how: Any) -> Any:
        looks.append(1)
        return longest_idle(found, **how)

    monkeypatch.setattr("gateway.ingress.listener.MIN_IDLE", 0.0)
    monkeypatch.setattr("gateway.ingress.listener.longest_idle", counted)
    async with running(limits=Limits(connections=330, opening=8)) as world, AsyncExitStack() as stack:
        for _ in range(620):
            await stack.enter_async_context(connected(world, "127.0.0.2", None))
        await until(lambda: refusals(world, "idle") >= 620 - 322)
        assert len(looks) <= (620 - 322) / 40 + 4


def burn(seconds: float) -> None:
    began = time.thread_time()
    while time.thread_time() < began + seconds:
        pass


@pytest.mark.parametrize(
    ("take", "bounds"),
    [(lambda: select.select([], [], [], 0.1), (0.01, 60.0)), (lambda: burn(0.4), (0.05, 1.0))],
    ids=["a busy machine", "much garbage"],
)
async def test_a_scan_that_took_long_keeps_nobody_out_for_long(
    take: Callable[[], object], bounds: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten and eight seconds, if all of that was time of its own, and the next one waited until its share is kept."""
    scans = 0

    def slow(found: Any, **how: Any) -> Any:
        nonlocal scans
        scans += 1
        if scans == 1:
            take()
        return longest_idle(found, **how)

    for name, value in zip(("SCAN_SHARE", "MAX_SCAN_PAUSE"), bounds, strict=True):
        monkeypatch.setattr(f"gateway.ingress.listener.{name}", value)
    monkeypatch.setattr("gateway.ingress.listener.MIN_IDLE", 0.0)
    monkeypatch.setattr("gateway.ingress.listener.longest_idle", slow)
    async with running(limits=Limits(connections=12, opening=1)) as world, AsyncExitStack() as stack:
        for _ in range(60):
            await stack.enter_async_context(connected(world, "127.0.0.2", None))
        await until(lambda: scans > 1)


CLIENTS = """
import socket, sys
port, data = int(sys.argv[1]), bytes.fromhex(sys.argv[2])
silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(120)]
print(len(silent), flush=True)
for line in sys.stdin:
    good = socket.create_connection(("127.0.0.1", port))
    good.settimeout(5)
    good.sendall(data)
    print(good.recv(12).decode(), flush=True)
"""


async def test_without_a_descriptor_silent_connections_make_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the limit of connections is: something else has taken the descriptors."""
    monkeypatch.setattr("gateway.ingress.listener.MIN_IDLE", 0.1)
    monkeypatch.setattr("gateway.ingress.listener.ACCEPT_PAUSE", 0.1)
    async with running(limits=Limits(connections=10_000)) as world:
        clients = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", CLIENTS, str(world.port), a_request().hex()),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        with socket.socket() as last:
            resource.setrlimit(resource.RLIMIT_NOFILE, (last.fileno() + 60, before[1]))
        try:
            assert clients.stdin is not None
            assert clients.stdout is not None
            assert await clients.stdout.readline() == b"120\n"
            for _ in range(5):
                clients.stdin.write(b"\n")
                assert await clients.stdout.readline() == b"HTTP/1.1 202\n"
            assert refusals(world, "idle") >= 60
            failed = [line for line in world.lines if line["event"] == "accept_failed"]
            assert [line["error"] for line in failed] == ["Too many open files"]
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
            clients.kill()
            await clients.wait()


def test_there_are_descriptors_left_for_what_is_no_sender() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        for soft, room in ((200, 150), (1024, 768), (20_000, 20_000 - 5000)):
            resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, before[1]), before[1]))
            if before[1] >= soft:
                assert room_for_connections() == room
        assert RESERVED > 4096
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
