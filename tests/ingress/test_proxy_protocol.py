"""The PROXY protocol: headers as the specification has them, and over real connections, before TLS and before HTTP."""

import asyncio
import socket
import struct
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.ingress.opening_connections import OpeningConnection, OpeningConnections
from gateway.ingress.proxy_protocol import MAGIC, MAX_REST, START, ProxyHeaderError, rest_length, source_address
from gateway.ingress.server import Limits
from tests.ingress.test_ingress import CRM, Wire, World, a_request, running, until
from tests.ingress.test_source_limits import use
from tests.ingress.test_tls import Pki, connected, pki, refusals
from tests.tools import needed

__all__ = ["pki"]

GET = a_request("/healthz", method="GET", body=b"")
ELSEWHERE = (ip_network("192.0.2.0/24"), ip_network("2001:db8::/32"))


def header(source: str = "192.0.2.7", *, command: int = 0x21, more: bytes = b"", transport: int | None = None) -> bytes:
    """Make a header, by section 2.2 of the specification."""
    family, code, size = (socket.AF_INET6, 0x21, 16) if ":" in source else (socket.AF_INET, 0x11, 4)
    addresses = socket.inet_pton(family, source) + bytes(size) + struct.pack("!HH", 49152, 443)
    return head(command, code if transport is None else transport, addresses + more)


def head(command: int, transport: int, rest: bytes, length: int | None = None) -> bytes:
    return MAGIC + struct.pack("!BBH", command, transport, len(rest) if length is None else length) + rest


LOCAL = head(0x20, 0x00, b"")
UNIX = head(0x21, 0x31, bytes(216))
VERSION_1 = b"PROXY TCP4 192.0.2.7 127.0.0.1 49152 443\r\n"


def read(data: bytes) -> str | None:
    size = rest_length(data[:START])
    assert len(data) == START + size
    return source_address(data[:START], data[START:])


@pytest.mark.parametrize(
    ("data", "source"),
    [
        (header(), "192.0.2.7"),
        (header("2001:db8::7"), "2001:db8::7"),
        (header("::ffff:192.0.2.7"), "::ffff:192.0.2.7"),
        (header(more=b"\x04\x00\x05hello\x03\x00\x04abcd"), "192.0.2.7"),
        (LOCAL, None),
        (header(command=0x20), None),  # its addresses mean nothing
        (head(0x20, 0x77, b"anything"), None),
        (head(0x21, 0x00, b""), ""),
        (head(0x21, 0x00, b"more"), ""),
        (UNIX, ""),
    ],
)
def test_a_header_tells_whose_connection_it_is(data: bytes, source: str | None) -> None:
    found = read(data)
    assert (ip_address(found) if found else found) == (ip_address(source) if source else source)


@pytest.mark.parametrize(
    ("start", "problem"),
    [
        (VERSION_1, "proxy_header_version_1"),
        (b"PROXY UNKNOWN\r\n\r\n", "proxy_header_version_1"),
        (GET, "proxy_header_missing"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03abcdef", "proxy_header_missing"),
        (MAGIC[:-1] + b"\r" + header()[12:], "proxy_header_missing"),
        (header(command=0x11), "proxy_header_malformed"),  # version 1 in binary
        (header(command=0x31), "proxy_header_malformed"),
        (header(command=0x22), "proxy_header_malformed"),
        (header(transport=0x12), "proxy_header_malformed"),  # UDP
        (header(transport=0x41), "proxy_header_malformed"),
        (head(0x21, 0x11, b"", length=11), "proxy_header_malformed"),
        (head(0x21, 0x21, b"", length=35), "proxy_header_malformed"),
        (head(0x21, 0x31, b"", length=215), "proxy_header_malformed"),
        (head(0x20, 0x00, b"", length=MAX_REST + 1), "proxy_header_malformed"),
        (head(0x21, 0x11, b"", length=65535), "proxy_header_malformed"),
    ],
)
def test_anything_else_is_refused(start: bytes, problem: str) -> None:
    with pytest.raises(ProxyHeaderError) as caught:
        rest_length(start[:START])
    assert caught.value.problem == problem


@given(st.binary(min_size=4, max_size=4), st.binary(max_size=200))
def test_no_header_crashes_and_each_has_its_length(fields: bytes, rest: bytes) -> None:
    start = MAGIC + fields
    try:
        size = rest_length(start)
    except ProxyHeaderError:
        return
    assert size == int.from_bytes(fields[2:], "big") <= MAX_REST
    source_address(start, (rest + bytes(size))[:size])


# --- Which connection is evicted ---


def test_the_oldest_of_the_network_with_the_most_is_evicted() -> None:
    evicted: list[str] = []
    connections = OpeningConnections(4)

    def add(name: str, address: str) -> OpeningConnection:
        connection = OpeningConnection(lambda: evicted.append(name))
        connections.add(connection, address)
        return connection

    add("real", "192.0.2.1")
    for number in range(6):
        add(f"flood {number}", "198.51.100.1")
    assert evicted == ["flood 0", "flood 1", "flood 2"]
    moved = add("moved", "198.51.100.1")
    connections.move(moved, "192.0.2.1")  # behind a proxy: now each has two
    add("other", "203.0.113.1")
    assert evicted[3:] == ["flood 3", "real"], "the older of the two networks' oldest"
    connections.remove(moved)
    assert len(connections) == 3


def test_where_each_network_has_one_the_oldest_of_all_is_evicted() -> None:
    evicted: list[int] = []
    connections = OpeningConnections(3)
    for number in range(6):
        connections.add(OpeningConnection(lambda number=number: evicted.append(number)), f"192.0.2.{number}")  # type: ignore[misc]
    assert evicted == [0, 1, 2]


def test_what_is_evicted_can_be_moved_and_removed_without_effect() -> None:
    connections = OpeningConnections(1)
    first, second = OpeningConnection(lambda: None), OpeningConnection(lambda: None)
    connections.add(first, "192.0.2.1")
    connections.add(second, "192.0.2.1")
    connections.move(first, "192.0.2.2")
    connections.remove(first)
    assert (first.is_evicted, second.is_evicted, len(connections)) == (True, False, 1)
    connections.remove(second)
    assert len(connections) == 0


# --- Over real connections ---


@asynccontextmanager
async def behind(*proxies: str, limits: Limits | None = None, pki: Pki | None = None) -> AsyncIterator[World]:
    certificates = [] if pki is None else [pki.servers.file(pki.folder, "hooks.example")]
    async with running(proxies=proxies, limits=limits, certificates=certificates, clock=time.time) as world:
        yield world


async def status_of(world: World, data: bytes) -> int:
    async with world.wire() as wire:
        wire.send(data)
        return (await wire.reply()).status


@pytest.mark.parametrize(
    ("first", "forwarded_for", "status"),
    [
        (header("192.0.2.7"), None, 202),
        (header("2001:db8::7"), None, 202),
        (header("::ffff:192.0.2.7"), None, 202),
        (header("192.0.2.7", more=b"\x04" * 100), None, 202),
        (header("198.51.100.1"), None, 403),
        (header("198.51.100.1"), "192.0.2.7", 403),  # a client's own claim
        (LOCAL, None, 403),  # the proxy itself, which isn't allowed
        (LOCAL, "192.0.2.7", 202),  # but is a trusted proxy
        (UNIX, None, 403),
        (UNIX, "192.0.2.7", 403),
        # The connection of a trusted HTTP proxy, by way of a load balancer.
        (header("127.0.0.9"), "192.0.2.7", 202),
        (header("127.0.0.9"), "198.51.100.1", 403),
    ],
)
async def test_the_address_of_the_header_is_the_clients(first: bytes, forwarded_for: str | None, status: int) -> None:
    async with behind("127.0.0.0/8") as world:
        use(world, "crm", allow_from=ELSEWHERE, trusted=["127.0.0.0/8"])
        headers = [CRM] if forwarded_for is None else [CRM, f"X-Forwarded-For: {forwarded_for}"]
        assert await status_of(world, first + a_request("/in/crm", *headers)) == status
        assert await status_of(world, first + GET) == 200


async def test_a_header_and_requests_may_come_in_any_pieces() -> None:
    data = header(more=bytes(40)) + a_request("/in/crm", CRM) + GET
    async with behind("127.0.0.1") as world, world.wire() as wire:
        for byte in data:
            wire.send(bytes([byte]))
            await asyncio.sleep(0)
        assert [(await wire.reply()).status for _ in range(2)] == [202, 200]


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        (GET, "proxy_header_missing"),
        (VERSION_1 + GET, "proxy_header_version_1"),
        (header(transport=0x12) + GET, "proxy_header_malformed"),
        (head(0x21, 0x11, b"", length=MAX_REST + 1), "proxy_header_malformed"),
    ],
)
async def test_a_connection_without_a_good_header_is_closed(first: bytes, reason: str) -> None:
    async with behind("127.0.0.1") as world, world.wire() as wire:
        wire.send(first)
        with pytest.raises((ConnectionError, AssertionError)):
            assert not await wire.is_closed()
        await until(lambda: refusals(world, reason) == 1)
        [line] = world.lines
        assert (line["event"], line["reason"], line["address"]) == ("connection_refused", reason, "127.0.0.1")


async def test_nobody_else_may_send_a_header() -> None:
    async with behind("192.0.2.0/24") as world, world.wire() as wire:
        wire.send(header() + GET)
        with pytest.raises((ConnectionError, AssertionError)):
            assert not await wire.is_closed()
        await until(lambda: refusals(world, "proxy_untrusted") == 1)


@pytest.mark.parametrize("part", [b"", header()[:1], header()[:15], header()[:20]])
async def test_a_header_that_does_not_end_closes_its_connection(part: bytes) -> None:
    async with behind("127.0.0.1", limits=Limits(opening_seconds=0.2)) as world:
        async with world.wire() as wire:
            wire.send(part)
            assert await wire.is_closed()
            await until(lambda: refusals(world, "proxy_header_slow") == 1)
        async with world.wire() as wire:
            wire.send(part)
        await until(lambda: refusals(world, "disconnected") == 1)


async def test_headers_that_do_not_end_keep_nobody_out() -> None:
    async with behind("127.0.0.1", limits=Limits(opening=4, opening_seconds=60)) as world:
        halves = [await asyncio.open_connection("127.0.0.1", world.port) for _ in range(20)]
        await until(lambda: refusals(world, "evicted") == 16)
        assert await status_of(world, header() + GET) == 200
        for _, writer in halves:
            writer.close()


async def test_a_flood_behind_a_proxy_evicts_its_own(pki: Pki) -> None:
    """All connections are the proxy's; its headers tell them apart."""
    async with behind("127.0.0.1", limits=Limits(opening=6, opening_seconds=60), pki=pki) as world:
        real = await asyncio.open_connection("127.0.0.1", world.port)
        real[1].write(header("192.0.2.7"))
        flood = [await asyncio.open_connection("127.0.0.1", world.port) for _ in range(20)]
        for _, writer in flood:
            writer.write(header("198.51.100.1"))
            await asyncio.sleep(0.01)
        await until(lambda: refusals(world, "evicted") == 15)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(real[0].read(1), 0.05)  # it is still there
        for _, writer in (real, *flood):
            writer.close()


async def test_the_header_comes_before_tls(pki: Pki) -> None:
    async with behind("127.0.0.1", pki=pki) as world:
        use(world, "crm", allow_from=ELSEWHERE)
        for source, status in (("192.0.2.7", 202), ("198.51.100.1", 403)):
            plain = socket.create_connection(("127.0.0.1", world.port))
            plain.sendall(header(source))
            plain.settimeout(0)
            wire = Wire(*await asyncio.open_connection(sock=plain, ssl=pki.client(), server_hostname="hooks.example"))
            wire.send(a_request("/in/crm", CRM))
            assert (await wire.reply()).status == status
            wire.close()
        with pytest.raises((OSError, asyncio.IncompleteReadError)):
            async with connected(world, pki.client()):
                pass
        await until(lambda: refusals(world, "proxy_header_missing") == 1)


@pytest.mark.full
async def test_haproxy_is_understood(pki: Pki, tmp_path: Path) -> None:
    """HAProxy wrote the specification: version 2, with all that it can add, before plain HTTP and before TLS."""
    haproxy = needed("haproxy")
    fronts = {}
    async with behind("127.0.0.1") as plain, behind("127.0.0.1", pki=pki) as secured:
        text = ["global", "  maxconn 100", "defaults", "  mode tcp", "  timeout client 5s", "  timeout server 5s"]
        text += ["  timeout connect 5s"]
        for name, port, options in (
            ("v2", plain.port, "send-proxy-v2 proxy-v2-options crc32c,unique-id"),
            ("v1", plain.port, "send-proxy"),
            ("tls", secured.port, "send-proxy-v2"),
        ):
            with socket.create_server(("127.0.0.1", 0)) as free:
                fronts[name] = free.getsockname()[1]
            text += [f"listen {name}", f"  bind 127.0.0.1:{fronts[name]}", "  unique-id-format %[uuid()]"]
            text += [f"  server gateway 127.0.0.1:{port} {options}"]
        (tmp_path / "haproxy.cfg").write_text("\n".join([*text, ""]))
        process = await asyncio.create_subprocess_exec(haproxy, "-f", str(tmp_path / "haproxy.cfg"), "-db")
        try:
            for world in (plain, secured):
                use(world, "crm", allow_from=(ip_network("127.0.0.1"),))
            event = a_request("/in/crm", CRM)
            await until_listening(fronts["v2"])
            assert await status_of(replace(plain, port=fronts["v2"]), event) == 202
            async with connected(replace(secured, port=fronts["tls"]), pki.client()) as wire:
                wire.send(event)
                assert (await wire.reply()).status == 202
            with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
                await status_of(replace(plain, port=fronts["v1"]), event)
            assert refusals(plain, "proxy_header_version_1") == 1
        finally:
            process.terminate()
            await process.wait()


async def until_listening(port: int) -> None:
    async with asyncio.timeout(10):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.05)
            else:
                writer.close()
                return
