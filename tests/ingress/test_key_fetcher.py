"""Keys that are fetched while a request waits: over TLS from a server of ours, and from one that fails in every way."""

import asyncio
import base64
import hashlib
import itertools
import random
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from ipaddress import ip_network
from pathlib import Path
from typing import Any

import jwt
import orjson
import pytest
import structlog
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding

from gateway.client.client import Client
from gateway.client.egress import EgressGuard
from gateway.client.resolver import Resolver
from gateway.ingress import key_fetcher
from gateway.ingress.body_memory import BodyMemory
from gateway.ingress.fetch_turns import FetchTurns
from gateway.ingress.key_budget import AT_ONCE, OWN, PER_SECOND, RESERVE
from gateway.ingress.key_fetcher import KeyFetcher
from gateway.ingress.server import Limits
from gateway.model import RefusedError, UnfetchedError
from gateway.rules.rules import Egress, Source
from gateway.telemetry.log_quota import PER_KIND
from gateway.verify.remote_keys import FRESH, MAX_DOCUMENT_BYTES, Fetch
from gateway.verify.schemes import build_verifier
from tests.certificates import Authority
from tests.ingress.test_ingress import NOW, PING, Wire, World, a_request, chunked, running, some_rules
from tests.verify.test_remote_keys import a_certificate, the_key
from tests.virtual_time import run

HOST = "keys.example.com"
URL = f"https://{HOST}/v1/a.pem"


def a_source(name: str = "bank", *hosts: str) -> Source:
    verify = {
        "scheme": "public-key",
        "algorithm": "rsa-sha256",
        "header": "X-S",
        "encoding": "base64",
        "key_url": {"header": "X-Key-Url", "hosts": list(hosts or [HOST]), "path": "/v1/"},
    }
    return Source(name=name, path=f"/in/{name}", verifier=build_verifier(verify))


RULES = some_rules(a_source(), a_source("shop"))
PLAID = build_verifier({"scheme": "plaid", "client_id": "5f1b", "api_secret": "hush-hush-hush-hush"})
PLAIDS_KEY = ec.derive_private_key(11, ec.SECP256R1())
KID = "bfbd5111-8e33-4643-8ced-b2e642a72f3c"
CERTIFICATE = a_certificate(the_key(), since=NOW - 86400, until=NOW + 86400)


def signed(url: str = URL, *, body: bytes = PING, source: str = "bank", is_chunked: bool = False) -> bytes:
    signature = base64.b64encode(the_key().sign(body, padding.PKCS1v15(), hashes.SHA256())).decode()
    headers = [f"X-S: {signature}", f"X-Key-Url: {url}"]
    if is_chunked:
        return a_request(f"/in/{source}", "Transfer-Encoding: chunked", *headers, body=chunked(body))
    return a_request(f"/in/{source}", *headers, body=body)


@dataclass
class Vendor:
    """A server of keys, reached as `keys.example.com`. `response` is what it sends; None: nothing, ever."""

    port: int = 0
    response: bytes | None = b""
    asked: list[bytes] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    may_respond: asyncio.Event = field(default_factory=asyncio.Event)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                self.asked.append(head)
                if head.startswith(b"POST "):
                    self.bodies.append(await reader.readuntil(b"}"))
                await self.may_respond.wait()
                writer.write(self.response or b"")
                await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


def ok(document: bytes = CERTIFICATE) -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(document) + document


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture
def contexts(authority: Authority, tmp_path: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """The server's TLS context and the client's."""
    return authority.server(tmp_path, HOST), ssl.create_default_context(cadata=authority.pem)


@asynccontextmanager
async def a_vendor(
    contexts: tuple[ssl.SSLContext, ssl.SSLContext], response: bytes | None = None, *, egress: Egress | None = None
) -> AsyncIterator[tuple[Vendor, Fetch]]:
    """Serve keys; the other value fetches them as a process does, but from another port."""
    vendor = Vendor(response=response)
    vendor.may_respond.set()
    server = await asyncio.start_server(vendor.serve, "127.0.0.1", 0, ssl=contexts[0])
    vendor.port = server.sockets[0].getsockname()[1]
    guard = EgressGuard(egress or Egress())
    async with Client(guard, resolver=Resolver(lambda _: ("127.0.0.1",)), tls=contexts[1]) as client:

        async def fetch(url: str, *, timeout: float, limit: int, request_body: bytes = b"") -> bytes:
            assert url.startswith("https://")
            host, _, path = url.removeprefix("https://").partition("/")
            return await client.fetch(
                f"https://{host}:{vendor.port}/{path}", timeout=timeout, limit=limit, request_body=request_body
            )

        try:
            yield vendor, fetch
        finally:
            server.close()


@asynccontextmanager
async def receiving(fetch: Fetch | None, *, limits: Limits | None = None) -> AsyncIterator[World]:
    async with running(fetch=fetch, limits=limits) as world:
        world.rules[0] = RULES
        yield world


async def until(is_true: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not is_true():  # noqa: ASYNC110 - what it waits for has no event
            await asyncio.sleep(0)


def waiting(world: World) -> int:
    return int(sum(world.ingress._keys._room._debts.values()))


async def outcome(world: World, data: bytes) -> tuple[int, str]:
    """Return the status of the response to a request, and why it was refused; the log says that alone."""
    reply = await world.exchange(data)
    await until(lambda: bool(lines(world, "request_finished")))
    return reply.status, lines(world, "request_finished")[-1].get("reason", "")


def lines(world: World, event: str) -> list[dict[str, Any]]:
    return [line for line in world.lines if line["event"] == event]


Contexts = tuple[ssl.SSLContext, ssl.SSLContext]


@pytest.mark.parametrize("is_chunked", [False, True])
async def test_the_first_request_fetches_the_key_and_the_next_ones_use_it(
    contexts: Contexts, *, is_chunked: bool
) -> None:
    async with a_vendor(contexts, ok()) as (vendor, fetch), receiving(fetch) as world:
        for _ in range(3):
            assert (await world.exchange(signed(is_chunked=is_chunked))).status == 202
        assert len(vendor.asked) == 1
        assert vendor.asked[0].startswith(b"GET /v1/a.pem HTTP/1.1\r\nHost: keys.example.com")
        assert [stored.value for stored in world.log.stored] == [PING] * 3
        assert [(line["source"], line["url"]) for line in lines(world, "key_fetched")] == [("bank", URL)]
        forged = signed().replace(b'"ping"', b'"pong"')
        assert await outcome(world, forged) == (401, "bad_signature")
        assert waiting(world) == 0
        assert world.ingress._memory.free == world.ingress._memory._total


async def test_a_forged_request_is_refused_once_the_key_is_there(contexts: Contexts) -> None:
    async with a_vendor(contexts, ok()) as (vendor, fetch), receiving(fetch) as world:
        assert await outcome(world, signed().replace(b'"ping"', b'"pong"')) == (401, "bad_signature")
        assert len(vendor.asked) == 1
        assert not world.log.stored


async def test_many_requests_wait_for_one_fetch(contexts: Contexts) -> None:
    async with a_vendor(contexts, ok()) as (vendor, fetch), receiving(fetch) as world:
        vendor.may_respond.clear()
        async with asyncio.TaskGroup() as tasks:
            replies = [tasks.create_task(world.exchange(signed())) for _ in range(20)]
            replies += [tasks.create_task(world.exchange(signed(source="shop")))]
            await until(lambda: waiting(world) == 21)
            vendor.may_respond.set()
        assert {reply.result().status for reply in replies} == {202}
        assert len(vendor.asked) == 2  # each source has keys of its own


FAILURES: dict[str, tuple[bytes | None, str]] = {
    "an error": (
        b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 0\r\n\r\n",
        f"{HOST}: expected a document, got 500 Internal Server Error",
    ),
    "no such key": (
        b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
        f"{HOST}: expected a document, got 404 Not Found",
    ),
    "a redirect": (
        b"HTTP/1.1 302 Found\r\nLocation: https://keys.example.com/v1/b.pem\r\nContent-Length: 0\r\n\r\n",
        f"{HOST}: expected a document, got 302 Found",
    ),
    "no key": (ok(b"<html>busy</html>"), "expected a key in PEM"),
    "what is nested deeply": (ok(b'{"keys":' + b"[" * 30_000), "expected a key in PEM"),
    "too much": (
        ok(b"#" * (MAX_DOCUMENT_BYTES + 1) + CERTIFICATE),
        f"{HOST}: expected a complete document of at most 65536 bytes, got something else",
    ),
    "too little": (
        ok()[:-300],
        f"{HOST}: expected a complete document of at most 65536 bytes, got something else",
    ),
    "no HTTP": (b"SSH-2.0-OpenSSH\r\n", f"{HOST}: malformed response: expected the head of an HTTP/1.1 response"),
    "nothing": (None, f"{HOST}: expected a response, got none in time"),
}


@pytest.mark.parametrize("case", FAILURES)
async def test_a_failed_fetch_is_a_503_and_isnt_repeated_at_once(
    contexts: Contexts, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    response, why = FAILURES[case]
    if case in {"nothing", "too little"}:
        monkeypatch.setattr(key_fetcher, "FETCH_TIMEOUT", 0.1)
    async with a_vendor(contexts, response) as (vendor, fetch), receiving(fetch) as world:
        for _ in range(2):
            assert await outcome(world, signed()) == (503, "key_unavailable")
        assert len(vendor.asked) == 1
        assert [line["reason"] for line in lines(world, "key_not_fetched")] == [why]
        assert world.count("rejected_total", source="bank", reason="key_unavailable") == 2
        assert not world.log.stored
        assert world.ingress._memory.free == world.ingress._memory._total


async def test_the_largest_document_is_read(contexts: Contexts) -> None:
    document = CERTIFICATE.rjust(MAX_DOCUMENT_BYTES, b"\n")
    async with a_vendor(contexts, ok(document)) as (_, fetch), receiving(fetch) as world:
        assert (await world.exchange(signed())).status == 202


async def test_the_servers_certificate_is_checked(contexts: Contexts, authority: Authority, tmp_path: Path) -> None:
    strangers = ssl.create_default_context(cadata=Authority("Another").pem)
    other_name = authority.server(tmp_path, "evil.example.com")
    for pair in ((contexts[0], strangers), (other_name, contexts[1])):
        async with a_vendor(pair, ok()) as (vendor, fetch), receiving(fetch) as world:
            assert await outcome(world, signed()) == (503, "key_unavailable")
            assert not vendor.asked
            assert "certificate not accepted" in lines(world, "key_not_fetched")[0]["reason"]


async def test_the_egress_guard_is_asked(contexts: Contexts) -> None:
    egress = Egress(is_private_allowed=False)
    async with a_vendor(contexts, ok(), egress=egress) as (vendor, fetch), receiving(fetch) as world:
        assert await outcome(world, signed()) == (503, "key_unavailable")
        assert not vendor.asked
        why = "refused by egress policy: 127.0.0.1 is loopback"
        assert [line["reason"] for line in lines(world, "key_not_fetched")] == [why]


async def test_an_address_elsewhere_is_never_asked(contexts: Contexts) -> None:
    async with a_vendor(contexts, ok()) as (vendor, fetch), receiving(fetch) as world:
        for url in (
            "https://evil.com/v1/a.pem",
            f"http://{HOST}/v1/a.pem",
            f"https://{HOST}/v2/a.pem",
            "https://127.0.0.1/v1/a",
        ):
            assert await outcome(world, signed(url)) == (401, "bad_key")
        assert not vendor.asked


async def exchange(world: World, data: bytes, address: str) -> int:
    """Send a request from another address of this machine; return the status of the response."""
    wire = Wire(*await asyncio.open_connection("127.0.0.1", world.port, local_addr=(address, 0)))
    try:
        wire.send(data)
        return (await wire.reply()).status
    finally:
        wire.close()


async def test_a_flood_of_addresses_fetches_few_and_takes_no_known_key(contexts: Contexts) -> None:
    async with a_vendor(contexts, ok()) as (vendor, fetch), receiving(fetch) as world:
        assert (await world.exchange(signed())).status == 202
        vendor.response = FAILURES["no such key"][0]
        replies = [await world.exchange(signed(f"{URL}{n}")) for n in range(60)]
        assert {reply.status for reply in replies} == {503}
        shared = AT_ONCE - RESERVE
        assert shared <= len(vendor.asked) <= shared + OWN
        reasons = [line["reason"] for line in lines(world, "key_not_fetched")]
        assert (len(reasons), reasons[-1]) == (PER_KIND + 1, "too many new addresses")
        assert (await world.exchange(signed())).status == 202


async def test_a_flood_from_another_network_keeps_no_new_key_out(contexts: Contexts) -> None:
    """It began before, goes on, and takes all that it can get; no key is known yet."""
    async with a_vendor(contexts, FAILURES["no such key"][0]) as (vendor, fetch), receiving(fetch) as world:
        numbers, is_over = itertools.count(), False

        async def flood(address: str) -> None:
            while not is_over:
                await exchange(world, signed(f"{URL}{next(numbers)}"), address)

        async with asyncio.TaskGroup() as tasks:
            for address in ("127.0.0.2", "127.0.0.3", "127.0.0.4"):
                tasks.create_task(flood(address))
            await until(lambda: len(lines(world, "key_not_fetched")) > PER_KIND)  # there are more than are asked for
            asked = len(vendor.asked)
            vendor.response = ok()
            assert (await world.exchange(signed())).status == 202
            is_over = True
        assert asked >= AT_ONCE - RESERVE - 3  # one of each may be on its way
        assert len(vendor.asked) <= AT_ONCE - RESERVE + 3 * OWN + 3
        assert len(world.log.stored) >= 1


async def test_whoever_trusted_proxies_name_is_told_apart(contexts: Contexts) -> None:
    async with a_vendor(contexts, FAILURES["no such key"][0]) as (vendor, fetch), receiving(fetch) as world:
        world.rules[0] = replace(RULES, trusted_proxies=(ip_network("127.0.0.0/8"),))

        def forwarded(client: str, url: str) -> bytes:
            return signed(url).replace(b"X-Key-Url", f"X-Forwarded-For: {client}\r\nX-Key-Url".encode())

        for n in range(60):
            await world.exchange(forwarded("203.0.113.66", f"{URL}{n}"))
        vendor.response = ok()
        assert (await world.exchange(forwarded("203.0.113.66", f"{URL}x"))).status == 503
        assert (await world.exchange(forwarded("198.51.100.7", URL))).status == 202


def test_each_new_key_is_fetched_beside_a_flood_of_hours() -> None:
    """In virtual time: 29 networks name made-up addresses, at times 20 a second, and the vendor a new one a minute."""
    attackers = [f"203.0.113.{n}" for n in range(int(RESERVE) // OWN - 1)]
    draw = random.Random(16)
    asked: list[str] = []

    async def fetch(url: str, **_: Any) -> bytes:
        asked.append(url)
        if "forged" in url:
            raise UnfetchedError("none", is_gone=True)
        return CERTIFICATE

    async def main() -> tuple[int, float]:
        clock = asyncio.get_running_loop().time
        memory = BodyMemory(1 << 20)
        keys = KeyFetcher(
            FetchTurns(fetch),
            memory=memory,
            clock=lambda: NOW + clock(),
            logger=structlog.get_logger(),
            may_log=lambda _: False,
        )

        async def verify(url: str, network: str) -> bool:
            def verify() -> bool:
                return keys.cache("bank").get(url, NOW + clock()) is not None

            try:
                return await keys.verify("bank", memory.share("bank"), 1, verify, network=network)
            except RefusedError:
                return False

        verified, minutes = 0, 6 * 60
        for minute in range(minutes):
            mine = draw.random()
            for at in sorted([mine, *[draw.random() for _ in range(20 if minute % 60 else 1200)]]):
                await asyncio.sleep(max(0.0, 60 * (minute + at) - clock()))
                if at == mine:
                    verified += await verify(f"{URL}/{minute}", "198.51.100.7")
                else:
                    await verify(f"{URL}/forged/{draw.random()}", draw.choice(attackers))
        assert verified == minutes
        return len(asked), clock()

    with structlog.testing.capture_logs():
        number, seconds = run(main())
    assert number <= AT_ONCE + PER_SECOND * seconds


async def test_a_certificate_that_has_expired_is_no_key(contexts: Contexts) -> None:
    old = a_certificate(the_key(), since=NOW - 2, until=NOW - 1)
    async with a_vendor(contexts, ok(old)) as (_, fetch), receiving(fetch) as world:
        assert await outcome(world, signed()) == (401, "bad_key")


async def test_a_waiting_body_makes_room_for_others(contexts: Contexts) -> None:
    """It is unverified: anybody may have sent it."""
    body = b"x" * 9000
    async with (
        a_vendor(contexts, ok()) as (vendor, fetch),
        receiving(fetch, limits=Limits(in_flight_bytes=20_000)) as world,
    ):
        vendor.may_respond.clear()
        async with asyncio.TaskGroup() as tasks:
            oldest = tasks.create_task(world.exchange(signed(body=body)))
            await until(lambda: waiting(world) == 1)
            newer = tasks.create_task(world.exchange(signed(body=body, source="shop")))
            assert (await oldest).status == 408
            vendor.may_respond.set()
            assert (await newer).status == 202
        assert world.ingress._memory.free == 20_000


async def test_requests_that_wait_are_bounded_by_their_number_and_none_of_their_networks_has_all_the_room(
    contexts: Contexts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_fetcher, "MAX_WAITING", 7)
    async with a_vendor(contexts, ok()) as (vendor, fetch), receiving(fetch) as world:
        vendor.may_respond.clear()
        async with asyncio.TaskGroup() as tasks:
            first = [tasks.create_task(world.exchange(signed())) for _ in range(3)]
            await until(lambda: waiting(world) == 3)
            assert (await world.exchange(signed())).status == 503
            elsewhere = tasks.create_task(exchange(world, signed(), "127.0.0.2"))
            await until(lambda: waiting(world) == 4)
            vendor.may_respond.set()
        assert [reply.result().status for reply in first] == [202] * 3
        assert elsewhere.result() == 202


def test_those_that_wait_for_a_key_go_on_a_few_at_a_time() -> None:
    """Each computes a signature: a thousand in one iteration of the loop would hold everything up for 100 ms and more.

    Some are gone meanwhile.
    """
    number, computed, most = key_fetcher.MAX_WAITING // 2 - 1, 0, 0

    async def main() -> None:
        loop = asyncio.get_running_loop()
        memory = BodyMemory(1 << 20)
        is_there: asyncio.Future[bytes] = loop.create_future()
        keys = KeyFetcher(
            FetchTurns(lambda *_, **__: is_there),
            memory=memory,
            clock=lambda: NOW,
            logger=structlog.get_logger(),
            may_log=lambda _: False,
        )

        def verify() -> None:
            nonlocal computed
            keys.cache("bank").get(URL, NOW)
            computed += 1

        async def count() -> None:
            nonlocal most
            before = computed
            while computed < number - 10:
                await asyncio.sleep(0)
                most, before = max(most, computed - before), computed

        async with asyncio.TaskGroup() as tasks:
            waiting = [
                tasks.create_task(keys.verify("bank", memory.share("bank"), 1, verify, network="192.0.2.1"))
                for _ in range(number)
            ]
            await asyncio.sleep(0.1)
            for task in waiting[20:30]:
                task.cancel()
            is_there.set_result(CERTIFICATE)
            await count()
        assert (keys._pending, keys._room._debts, memory.free) == ({}, {}, 1 << 20)

    with structlog.testing.capture_logs():
        run(main())
    assert computed == number - 10
    assert 1 <= most <= key_fetcher.GO_ON_AT_ONCE + 1  # and the one that has fetched it


async def test_if_the_one_that_fetches_is_evicted_another_does(contexts: Contexts) -> None:
    body = b"x" * 9000
    async with (
        a_vendor(contexts, ok()) as (vendor, fetch),
        receiving(fetch, limits=Limits(in_flight_bytes=20_000)) as world,
    ):
        vendor.may_respond.clear()
        async with asyncio.TaskGroup() as tasks:
            fetching = tasks.create_task(world.exchange(signed(body=body)))
            await until(lambda: waiting(world) == 1)
            small = tasks.create_task(world.exchange(signed()))
            await until(lambda: waiting(world) == 2)
            other = tasks.create_task(world.exchange(signed(body=body)))
            assert (await fetching).status == 408
            await until(lambda: len(vendor.asked) == 2)
            vendor.may_respond.set()
            assert {(await small).status, (await other).status} == {202}


async def test_nothing_waits_beyond_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even for a fetch that doesn't keep its own."""
    monkeypatch.setattr(key_fetcher, "DEADLINE", 0.05)
    async with receiving(lambda *_, **__: asyncio.Future()) as world:
        assert await outcome(world, signed()) == (503, "key_unavailable")
        assert (waiting(world), world.ingress._keys._pending) == (0, {})


async def test_a_known_key_verifies_though_it_is_not_fetched_again_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """So it does where too many are fetched at a time for this one to have its turn."""
    monkeypatch.setattr(key_fetcher, "DEADLINE", 0.05)
    async with receiving(lambda *_, **__: asyncio.Future()) as world:
        keys = world.ingress._keys.cache("bank")
        keys.keep(URL, CERTIFICATE, world.ingress._clock() - 2 * FRESH)
        for _ in range(2):
            assert (await world.exchange(signed())).status == 202
        assert await outcome(world, signed().replace(b'"ping"', b'"pong"')) == (401, "bad_signature")


async def test_whoever_is_evicted_while_a_known_key_is_fetched_postpones_no_other_fetch() -> None:
    """Or a withdrawn key would go on verifying, as long as somebody does so every ten seconds."""
    body, limits, may_end = b"x" * 9000, Limits(in_flight_bytes=20_000), asyncio.Event()

    async def fetch(url: str, **_: Any) -> bytes:
        assert url == URL
        await may_end.wait()
        return CERTIFICATE

    async with receiving(fetch, limits=limits) as world:
        keys = world.ingress._keys.cache("bank")
        keys.keep(URL, CERTIFICATE, world.ingress._clock() - 2 * FRESH)
        fetching = asyncio.ensure_future(world.exchange(signed(body=body)))
        await until(lambda: waiting(world) == 1)
        others = [asyncio.ensure_future(world.exchange(signed(body=each))) for each in (PING, body)]
        assert (await fetching).status == 408
        await until(lambda: waiting(world) == 2)
        assert not keys._failures
        may_end.set()
        assert [(await other).status for other in others] == [202, 202]


async def test_a_request_that_needs_ever_more_keys_gets_two() -> None:
    asked: list[str] = []

    async def fetch(url: str, **_: Any) -> bytes:
        asked.append(url)
        raise UnfetchedError("none")

    checks = [a_source().verifier.checks[0]]
    for n in range(3):
        key_url = {"header": f"X-Key-{n}", "hosts": [HOST]}
        config = {"scheme": "public-key", "algorithm": "rsa-sha256", "header": "X-S", "encoding": "base64"}
        checks.append(build_verifier({**config, "key_url": key_url}).checks[0])
    source = a_source()
    source = replace(source, verifier=replace(source.verifier, checks=tuple(checks), ids=(None,) * 4))
    async with receiving(fetch) as world:
        world.rules[0] = some_rules(source)
        more = "".join([f"X-Key-{n}: {URL}{n}\r\n" for n in range(3)])
        assert await outcome(world, signed().replace(b"X-Key-Url", more.encode() + b"X-Key-Url")) == (
            503,
            "key_unavailable",
        )
        assert asked == [URL, f"{URL}0"]


async def test_without_a_client_nothing_is_fetched() -> None:
    async with receiving(None) as world:
        assert await outcome(world, signed()) == (503, "key_unavailable")


async def test_a_reload_keeps_the_keys_of_sources_that_stay(contexts: Contexts) -> None:
    async with a_vendor(contexts, ok()) as (vendor, fetch), receiving(fetch) as world:
        for source in ("bank", "shop"):
            assert (await world.exchange(signed(source=source))).status == 202
        world.rules[0] = ONLY_BANK
        assert (await world.exchange(signed())).status == 202
        world.rules[0] = RULES
        assert (await world.exchange(signed(source="shop"))).status == 202
        assert len(vendor.asked) == 3


async def test_a_document_is_fetched_over_tls_alone(contexts: Contexts) -> None:
    async with Client(EgressGuard(Egress()), tls=contexts[1]) as client:
        with pytest.raises(ValueError, match="expected https"):
            await client.fetch("http://keys.example.com/x", timeout=1, limit=1)


ONLY_BANK = some_rules(a_source())


async def test_plaids_key_is_asked_for_once_by_a_post_and_no_secret_is_logged(
    contexts: Contexts, authority: Authority, tmp_path: Path
) -> None:
    claims = {"iat": int(NOW), "request_body_sha256": hashlib.sha256(PING).hexdigest()}
    token = jwt.encode(claims, PLAIDS_KEY, algorithm="ES256", headers={"kid": KID})
    entry = orjson.loads(jwt.algorithms.ECAlgorithm.to_jwk(PLAIDS_KEY.public_key()))
    document = orjson.dumps({"key": {**entry, "kid": KID, "expired_at": None}})
    plaid = (authority.server(tmp_path, "production.plaid.com"), contexts[1])
    async with a_vendor(plaid, ok(document)) as (vendor, fetch), receiving(fetch) as world:
        world.rules[0] = some_rules(Source(name="bank", path="/in/bank", verifier=PLAID))
        for _ in range(2):
            sent = a_request("/in/bank", f"Plaid-Verification: {token}", body=PING)
            assert (await world.exchange(sent)).status == 202
        assert [head.partition(b"\r\n")[0] for head in vendor.asked] == [b"POST /webhook_verification_key/get HTTP/1.1"]
        assert b"\r\ncontent-type: application/json\r\n" in vendor.asked[0].lower()
        assert [orjson.loads(body) for body in vendor.bodies] == [
            {"client_id": "5f1b", "secret": "hush-hush-hush-hush", "key_id": KID}
        ]
        [line] = lines(world, "key_fetched")
        assert line["url"] == f"https://production.plaid.com/webhook_verification_key/get#{KID}"
        assert "hush" not in str(world.lines)
