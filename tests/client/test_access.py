"""The way to a destination: certificates, authorities and proxies, and connections that are never mixed up."""

import asyncio
import os
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from ipaddress import ip_network
from pathlib import Path
from weakref import ref

import pytest
import uvloop

from gateway.client.client import Client
from gateway.client.egress import EgressGuard
from gateway.client.request import Outbound
from gateway.client.resolver import Resolver
from gateway.model import Attempt, Result
from gateway.rules.destination_credentials import basic_authorization, tls_of
from gateway.rules.rules import Destination, DestinationAccess, Egress, Proxy, Tls
from tests.certificates import Authority
from tests.proxy import HttpProxy
from tests.sink import Fault, Sink

OPEN = EgressGuard(Egress())
CLOSED = EgressGuard(Egress(is_private_allowed=False))


def never(host: str) -> tuple[str, ...]:
    raise AssertionError(f"nobody should ask for {host}")


Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def serving(serve: Serve, context: ssl.SSLContext) -> AsyncIterator[int]:
    """Serve each connection by a coroutine that ends with it; the context is the port."""
    async with await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context) as server:
        yield server.sockets[0].getsockname()[1]


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    nobody = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # trusts nobody; reading the system's authorities is slow
    async with Client(OPEN, resolver=Resolver(never), tls=nobody) as client:
        yield client


@pytest.fixture(scope="module")
def ours() -> Authority:
    return Authority("Ours")


@pytest.fixture(scope="module")
def other() -> Authority:
    return Authority("Other")


async def attempt(
    client: Client, url: str, *, tls: Tls | None = None, proxy: Proxy | None = None, timeout: float = 5.0
) -> Attempt:
    access = DestinationAccess(tls=tls, proxy=proxy) if tls or proxy else None
    outbound = Outbound(url=url, headers=((b"X-A", b"1"),), body=b"{}", access=access)
    return await client.attempt(outbound, timeout=timeout, number=1)


def trusting(authority: Authority, identity: tuple[str, str] | None = None) -> Tls:
    certificate, key = identity or (None, None)
    return tls_of(ca=authority.pem, certificate=certificate, key=key)


# Certificates.


async def test_a_rotated_certificate_and_its_key_are_freed(client: Client, ours: Authority) -> None:
    async with Sink() as sink:
        await sink.refuse()
        url = f"https://127.0.0.1:{sink.port}/"
        tls = trusting(ours, ours.issue("gateway"))
        destination = Destination(name="ci", url=url, access=DestinationAccess(tls=tls))
        freed = ref(tls.context)
        assert (await attempt(client, url, tls=tls)).result is Result.CONNECT
        client.retain_only([destination])
        assert (await attempt(client, url, tls=tls)).result is Result.CONNECT
        del tls
        destination = replace(destination, access=DestinationAccess(tls=trusting(ours, ours.issue("gateway"))))
        assert (await attempt(client, url, tls=trusting(ours))).result is Result.CONNECT
        client.retain_only([destination])
        assert freed() is None


async def test_a_destinations_own_authority_is_trusted_and_no_other(
    client: Client, ours: Authority, other: Authority, tmp_path: Path
) -> None:
    async with Sink(tls=ours.server(tmp_path, "127.0.0.1")) as sink:
        assert (await attempt(client, sink.url, tls=trusting(ours))).result is Result.SUCCESS
        for tls in (None, trusting(other)):
            done = await attempt(client, sink.url, tls=tls)
            assert done.result is Result.TLS
            assert done.detail.startswith("127.0.0.1: certificate not accepted: ")
    assert len(sink.requests) == 1


async def test_an_authority_of_ones_own_still_checks_the_name(client: Client, ours: Authority, tmp_path: Path) -> None:
    async with Sink(tls=ours.server(tmp_path, "a.test")) as sink:
        done = await attempt(client, sink.url, tls=trusting(ours))
    assert (done.result, sink.requests) == (Result.TLS, [])
    assert "mismatch" in done.detail.lower()


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_a_destination_that_wants_a_certificate_gets_it(
    client: Client, ours: Authority, other: Authority, tmp_path: Path, version: ssl.TLSVersion
) -> None:
    async with Sink(tls=ours.server(tmp_path, "127.0.0.1", clients=ours, least=version)) as sink:
        done = await attempt(client, sink.url, tls=trusting(ours, ours.issue("gateway")))
        assert done.result is Result.SUCCESS
        for identity in (None, other.issue("gateway")):
            done = await attempt(client, sink.url, tls=trusting(ours, identity))
            assert done.result in {Result.TLS, Result.TRANSPORT}, done  # some servers just hang up
    assert len(sink.requests) == 1


async def test_each_identity_has_connections_of_its_own(client: Client, ours: Authority, tmp_path: Path) -> None:
    """Whoever is asked for by one certificate never gets a request made in the name of another."""
    seen: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while await reader.read(65536):
            peer = writer.get_extra_info("peercert") or {"subject": [[("commonName", "nobody")]]}
            seen.append(peer["subject"][0][0][1])
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    context = ours.server(tmp_path, "127.0.0.1", clients=ours)
    context.verify_mode = ssl.CERT_OPTIONAL
    first, second = ours.issue("first"), ours.issue("second")
    identities = [trusting(ours, first), trusting(ours, second), trusting(ours), trusting(ours, first)]
    async with serving(serve, context) as port:
        for _ in range(2):
            for tls in identities:
                done = await attempt(client, f"https://127.0.0.1:{port}/", tls=tls)
                assert done.result is Result.SUCCESS
        assert client.open_connections == 3
        await client.__aexit__()
    assert seen == ["first", "second", "nobody", "first"] * 2


async def test_a_rotated_certificate_is_used_at_once(client: Client, ours: Authority, tmp_path: Path) -> None:
    async with Sink(tls=ours.server(tmp_path, "127.0.0.1", clients=ours)) as sink:
        for _ in range(2):
            await attempt(client, sink.url, tls=trusting(ours, ours.issue("gateway")))
    assert [request.connection for request in sink.requests] == [1, 2]


async def test_a_tls_connection_that_breaks_when_it_is_used_again_is_stale(
    client: Client, ours: Authority, tmp_path: Path
) -> None:
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        requests = 0
        while await reader.read(65536):
            requests += 1
            if requests == 2:
                os.write(writer.get_extra_info("socket").fileno(), b"no TLS at all")
                break
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    async with serving(serve, ours.server(tmp_path, "127.0.0.1")) as port:
        done = [await attempt(client, f"https://127.0.0.1:{port}/", tls=trusting(ours)) for _ in range(2)]
        await client.__aexit__()
    assert [one.result for one in done] == [Result.SUCCESS] * 2
    assert connections == 2


# Proxies.


async def test_a_request_without_tls_goes_to_the_proxy_in_absolute_form(client: Client) -> None:
    async with Sink() as sink, HttpProxy(names={"a.test": "127.0.0.1"}) as proxy:
        way = Proxy(host="127.0.0.1", port=proxy.port, authorization=basic_authorization("us", "s3cret"))
        for _ in range(2):
            done = await attempt(client, f"http://a.test:{sink.port}/x?y=%2F", proxy=way)
            assert done.result is Result.SUCCESS, done
    assert proxy.lines == [f"POST http://a.test:{sink.port}/x?y=%2F HTTP/1.1"] * 2
    assert "Proxy-Authorization: Basic dXM6czNjcmV0" in proxy.heads[1]
    assert proxy.connections == 1
    assert (sink.requests[1].target, sink.requests[1].body) == ("/x?y=%2F", b"{}")
    assert sink.requests[1].header("host") == f"a.test:{sink.port}"


async def test_a_tunnel_is_opened_for_tls_and_used_again(client: Client, ours: Authority, tmp_path: Path) -> None:
    async with (
        HttpProxy(names={"a.test": "127.0.0.1"}) as proxy,
        Sink(tls=ours.server(tmp_path, "a.test")) as sink,
    ):
        way = Proxy(host="127.0.0.1", port=proxy.port, authorization=basic_authorization("us", "s3cret"))
        for _ in range(3):
            done = await attempt(client, f"https://a.test:{sink.port}/x", tls=trusting(ours), proxy=way)
            assert done.result is Result.SUCCESS, done
        await client.__aexit__()
    assert proxy.heads == [
        [
            f"CONNECT a.test:{sink.port} HTTP/1.1",
            f"Host: a.test:{sink.port}",
            "Proxy-Authorization: Basic dXM6czNjcmV0",
        ]
    ]
    assert (sink.requests[2].target, sink.requests[2].header("proxy-authorization")) == ("/x", None)


async def test_in_a_tunnel_the_destinations_certificate_counts(client: Client, ours: Authority, tmp_path: Path) -> None:
    names = {"a.test": "127.0.0.1", "b.test": "127.0.0.1"}
    async with HttpProxy(names=names) as proxy, Sink(tls=ours.server(tmp_path, "a.test")) as sink:
        way = Proxy(host="127.0.0.1", port=proxy.port)
        done = await attempt(client, f"https://b.test:{sink.port}/", tls=trusting(ours), proxy=way)
        assert (done.result, done.detail.split(":")[0]) == (Result.TLS, "b.test")
        assert sink.requests == []


async def test_an_ipv6_literal_has_its_brackets_in_the_tunnels_request(
    client: Client, ours: Authority, tmp_path: Path
) -> None:
    async with HttpProxy() as proxy, Sink(tls=ours.server(tmp_path, "::1"), host="::1") as sink:
        done = await attempt(client, sink.url, tls=trusting(ours), proxy=Proxy(host="127.0.0.1", port=proxy.port))
        assert done.result is Result.SUCCESS, done
        await client.__aexit__()
    assert proxy.lines == [f"CONNECT [::1]:{sink.port} HTTP/1.1"]


@pytest.mark.parametrize(
    ("refusal", "detail"),
    [
        (
            b"HTTP/1.1 407 Whatever\r\nContent-Length: 6\r\n\r\nsecret",
            "expected a tunnel, got 407 Proxy Authentication Required",
        ),
        (b"HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1/\r\n\r\n", "expected a tunnel, got 302 Found"),
        (b"SSH-2.0-OpenSSH\r\n", "malformed response: expected the head of an HTTP/1.1 response"),
        (b"HTTP/1.1 100\n\n" * 10_000, "malformed response: expected the head of an HTTP/1.1 response"),
        (b"", "connection closed"),
    ],
)
async def test_a_proxy_that_opens_no_tunnel_is_reported_as_such(client: Client, refusal: bytes, detail: str) -> None:
    async with HttpProxy(refusal=refusal) as proxy:
        done = await attempt(client, "https://a.test/", proxy=Proxy(host="127.0.0.1", port=proxy.port))
    assert (done.result, done.status, done.detail) == (Result.CONNECT, None, f"proxy 127.0.0.1: {detail}")
    assert client.open_connections == 0


async def test_a_proxy_that_hangs_takes_no_longer_than_the_attempt_may(client: Client) -> None:
    async with HttpProxy(hangs=True) as proxy:
        done = await attempt(client, "https://a.test/", proxy=Proxy(host="127.0.0.1", port=proxy.port), timeout=0.1)
        assert (done.result, done.detail) == (
            Result.TIMEOUT,
            "proxy 127.0.0.1: expected a connection, got none in time",
        )
        assert done.seconds < 0.5


async def test_a_proxy_that_is_not_there_is_reported_with_its_port(client: Client) -> None:
    async with Sink() as sink:
        await sink.refuse()
        done = await attempt(client, "http://a.test/secret", proxy=Proxy(host="127.0.0.1", port=sink.port))
    assert (done.result, done.detail) == (Result.CONNECT, f"proxy 127.0.0.1:{sink.port}: connection refused")


async def test_a_proxy_is_looked_up_and_the_destination_is_not() -> None:
    asked: list[str] = []

    def look_up(host: str) -> tuple[str, ...]:
        asked.append(host)
        return ("127.0.0.1",)

    async with (
        Sink() as sink,
        HttpProxy(names={"a.test": "127.0.0.1"}) as proxy,
        Client(OPEN, resolver=Resolver(look_up)) as client,
    ):
        way = Proxy(host="proxy.test", port=proxy.port)
        done = await attempt(client, f"http://a.test:{sink.port}/", proxy=way)
    assert (done.result, asked) == (Result.SUCCESS, ["proxy.test"])


async def test_each_proxy_and_each_of_its_users_has_connections_of_its_own(client: Client) -> None:
    async with Sink() as sink, HttpProxy() as one, HttpProxy() as two:
        ways = [Proxy(host="127.0.0.1", port=proxy.port) for proxy in (one, two)]
        ways.append(Proxy(host="127.0.0.1", port=one.port, authorization=basic_authorization("us", "s3cret")))
        for way in (None, *ways, None, *ways):
            assert (await attempt(client, sink.url, proxy=way)).result is Result.SUCCESS
        assert (one.connections, two.connections, client.open_connections) == (2, 1, 4)


async def test_the_guard_looks_at_the_proxys_address() -> None:
    async with HttpProxy() as proxy, Client(CLOSED, resolver=Resolver(lambda _: ("127.0.0.1",))) as client:
        for host in ("127.0.0.1", "proxy.test"):
            done = await attempt(client, "https://a.test/", proxy=Proxy(host=host, port=proxy.port))
            assert (done.result, done.detail) == (
                Result.EGRESS_REFUSED,
                "refused by egress policy: 127.0.0.1 is loopback",
            )
    assert proxy.connections == 0


@pytest.mark.parametrize(
    "host",
    [
        "169.254.169.254",
        "169.254.169.254.",
        "2852039166",
        "0xa9.0xfe.43518",
        "0251.0376.0251.0376",
        "[::ffff:169.254.169.254]",
        "[fd00:ec2::254]",
        "[64:ff9b::a9fe:a9fe]",
        "127.0.0.2",
        "127.2",
        "localhost",
        "LOCALHOST.",
        "a.localhost",
    ],
)
@pytest.mark.parametrize("scheme", ["http", "https"])
async def test_no_address_gets_past_the_guard_by_a_proxy(scheme: str, host: str) -> None:
    guard = EgressGuard(Egress(is_private_allowed=False, allow=(ip_network("127.0.0.9/32"),)))
    async with HttpProxy(host="127.0.0.9") as proxy, Client(guard, resolver=Resolver(never)) as client:
        done = await attempt(client, f"{scheme}://{host}/", proxy=Proxy(host="127.0.0.9", port=proxy.port))
    assert done.result is Result.EGRESS_REFUSED
    assert proxy.heads == []


async def test_proxy_variables_change_nothing_for_tls_either(
    client: Client, ours: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with HttpProxy() as proxy, Sink(tls=ours.server(tmp_path, "127.0.0.1")) as sink:
        for name in ("https_proxy", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        assert (await attempt(client, sink.url, tls=trusting(ours))).result is Result.SUCCESS
    assert proxy.connections == 0


async def test_a_new_guard_closes_tunnels_too(client: Client, ours: Authority, tmp_path: Path) -> None:
    async with HttpProxy() as proxy, Sink(tls=ours.server(tmp_path, "127.0.0.1")) as sink:
        way = Proxy(host="127.0.0.1", port=proxy.port)
        assert (await attempt(client, sink.url, tls=trusting(ours), proxy=way)).result is Result.SUCCESS
        client.set_guard(CLOSED)
        done = await attempt(client, sink.url, tls=trusting(ours), proxy=way)
        assert done.result is Result.EGRESS_REFUSED
        assert (len(sink.requests), proxy.connections) == (1, 1)


async def test_an_attempt_cancelled_while_its_tunnel_opens_leaves_no_connection(client: Client) -> None:
    async with HttpProxy(hangs=True) as proxy:
        way = Proxy(host="127.0.0.1", port=proxy.port)
        task = asyncio.ensure_future(attempt(client, "https://a.test/", proxy=way))
        async with asyncio.timeout(2):
            while not proxy.heads:  # noqa: ASYNC110 - what is waited for is a socket's, which sets no event
                await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        async with asyncio.timeout(2):
            while proxy.open_connections:  # noqa: ASYNC110 - the same
                await asyncio.sleep(0.001)


def test_all_of_it_works_on_uvloop_too(ours: Authority, tmp_path: Path) -> None:
    async def main() -> list[Result]:
        found = []
        async with (
            HttpProxy() as proxy,
            Sink(200, Fault.CLOSE, 200, tls=ours.server(tmp_path, "127.0.0.1", clients=ours)) as sink,
            Client(OPEN) as client,
        ):
            tls = trusting(ours, ours.issue("gateway"))
            for way in (None, Proxy(host="127.0.0.1", port=proxy.port)):
                for _ in range(3):
                    found.append((await attempt(client, sink.url, tls=tls, proxy=way)).result)  # noqa: PERF401
            await client.__aexit__()
        return found

    assert uvloop.run(main()) == [Result.SUCCESS] * 6
