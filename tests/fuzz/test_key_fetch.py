"""Keys fetched from a server that sends anything, over TLS, by the fetcher that a process has: a key or a refusal.

Nothing takes longer than its limit, nothing keeps more than a document, and the next key is fetched all the same.
"""

import asyncio
import itertools
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import pytest
import structlog
from hypothesis import strategies as st

from gateway.client.client import Client
from gateway.client.egress import EgressGuard
from gateway.client.resolver import Resolver
from gateway.ingress import key_fetcher
from gateway.ingress.body_memory import BodyMemory
from gateway.ingress.fetch_turns import FetchTurns
from gateway.ingress.key_fetcher import KeyFetcher
from gateway.model import RefusedError, UnfetchedError
from gateway.rules.rules import Egress
from gateway.verify.remote_keys import MAX_DOCUMENT_BYTES, Fetch, FetchedKey
from tests.certificates import Authority
from tests.fuzz.inputs import ENOUGH_TIME, damaged, fuzz, memory_of
from tests.verify.signed_requests import NOW
from tests.verify.test_remote_keys import a_certificate, the_key

pytestmark = ENOUGH_TIME
HOST = "keys.example.com"
AT_ONCE = 6
SECONDS = 0.25  # for a fetch
LATE = 3.0  # by which its end may be later, where others want the processor
MOST_MEMORY = 8 << 20
"""Bytes for as many fetches as are at once, of which each has 64 KiB of a head and of a document; and for the server
and both ends of TLS, whose buffers are larger than that."""
CERTIFICATE = a_certificate(the_key())
GOOD = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(CERTIFICATE) + CERTIFICATE
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n\r\n" % (
    len(CERTIFICATE),
    CERTIFICATE,
)
SEEDS = [
    GOOD,
    CHUNKED,
    b"HTTP/1.1 200 OK\r\n\r\n" + CERTIFICATE,
    b"HTTP/1.1 200 OK\r\nContent-Length: 999999999999\r\n\r\n" + CERTIFICATE,
    b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\nContent-Length: 20\r\n\r\n" + CERTIFICATE,
    b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 5\r\n\r\n\x1f\x8b\x08\0\0",
    b"HTTP/1.1 302 Found\r\nLocation: https://169.254.169.254/latest\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\n" * 40 + GOOD,
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n",
    b"HTTP/1.1 204 No Content\r\n\r\n",
    GOOD * 2,
    b"SSH-2.0-OpenSSH\r\n",
    b"",
]
PIECES = [
    *[
        b"\r\n",
        b"\n",
        b"\r\n\r\n",
        b":",
        b" ",
        b"\0",
        b"\xff",
        b"HTTP/1.1 200 OK\r\n",
        b"Transfer-Encoding: chunked\r\n",
    ],
    *[
        b"Content-Length: -1\r\n",
        b"Content-Length: 5\r\n",
        b"ffffffffffffffff\r\n",
        b"0\r\n\r\n",
        b"-5\r\n",
        b"5;a=b\r\n",
    ],
    *[b"Connection: close\r\n", b"X: y\r\n" * 200, b"X: " + b"x" * 70_000 + b"\r\n", b"-----BEGIN CERTIFICATE-----\n"],
]
ENDLESS = [
    b"x" * 16384,
    b"X: y\r\n" * 2000,
    b"4000\r\n" + b"x" * 16384 + b"\r\n",
    b"HTTP/1.1 100 Continue\r\n\r\n" * 600,
]
AFTER = ("close", "wait", "drip", "endless")


class Script(NamedTuple):
    """What the server sends to whoever asks, and then: closes, waits, or sends bytes for ever, slowly or fast."""

    sent: bytes
    after: str
    more: bytes


class Server:
    """Plays a script for each path; sends a key for any other."""

    def __init__(self) -> None:
        self.scripts: dict[bytes, Script] = {}
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                script = self.scripts.get(head.split(b" ")[1])
                writer.write(GOOD if script is None else script.sent)
                await writer.drain()
                if script is not None and script.after == "close":
                    return
                while script is not None and script.after != "wait":
                    writer.write(script.more if script.after == "endless" else script.more[:1])
                    await writer.drain()
                    await asyncio.sleep(0.0 if script.after == "endless" else 0.01)
        except (ConnectionError, asyncio.IncompleteReadError, ssl.SSLError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def a_server(folder: Path) -> AsyncIterator[tuple[Server, Fetch]]:
    authority, server = Authority(), Server()
    listening = await asyncio.start_server(server.serve, "127.0.0.1", 0, ssl=authority.server(folder, HOST))
    server.port = listening.sockets[0].getsockname()[1]
    trusted = ssl.create_default_context(cadata=authority.pem)
    async with Client(EgressGuard(Egress()), resolver=Resolver(lambda _: ("127.0.0.1",)), tls=trusted) as client:

        async def fetch(url: str, *, timeout: float, limit: int, request_body: bytes = b"") -> bytes:
            path = url.removeprefix(f"https://{HOST}")
            there = f"https://{HOST}:{server.port}{path}"
            return await client.fetch(there, timeout=timeout, limit=limit, request_body=request_body)

        try:
            yield server, fetch
        finally:
            listening.close()


def scripts() -> st.SearchStrategy[list[Script]]:
    sent = st.sampled_from(SEEDS) | damaged(st.sampled_from(SEEDS), PIECES)
    script = st.builds(Script, sent, st.sampled_from(AFTER), st.sampled_from(ENDLESS))
    return st.lists(script, min_size=AT_ONCE, max_size=AT_ONCE)


class World(NamedTuple):
    server: Server
    fetch: Fetch
    numbers: "itertools.count[int]"
    seen: set[str]


async def check(world: World, drawn: Sequence[Script]) -> None:
    """Let requests need a key that comes so, all at once, and then one that comes as it should."""
    memory = BodyMemory(1 << 20)
    keys = KeyFetcher(
        FetchTurns(world.fetch),
        memory=memory,
        clock=lambda: NOW,
        logger=structlog.get_logger(),
        may_log=lambda _: False,
    )

    async def outcome(url: str) -> str:
        def verify() -> FetchedKey:
            return keys.cache("bank").get(url, NOW)

        try:
            async with asyncio.timeout(key_fetcher.FETCH_TIMEOUT + LATE):
                await keys.verify("bank", memory.share("bank"), 100, verify, network="192.0.2.1")
        except RefusedError as error:
            assert (error.status, error.reason) in {(503, "key_unavailable"), (401, "bad_key")}
            return error.reason
        return "a key"

    paths = [f"/v1/{next(world.numbers)}" for _ in drawn]
    world.server.scripts = {path.encode(): script for path, script in zip(paths, drawn, strict=True)}
    world.seen.update(await asyncio.gather(*[outcome(f"https://{HOST}{path}") for path in paths]))
    # The first of these may be on a connection on which another byte, that nobody asked for, is on its way.
    good = [await outcome(f"https://{HOST}/good/{next(world.numbers)}") for _ in range(2)]
    assert good[-1] == "a key"
    assert (keys._pending, keys._room._debts, memory.free) == ({}, {}, 1 << 20)


@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisWarning")  # of a large representation
def test_whatever_a_server_sends_ends_in_time_and_takes_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(key_fetcher, "FETCH_TIMEOUT", SECONDS)
    with asyncio.Runner() as runner, structlog.testing.capture_logs():
        context = a_server(tmp_path)
        world = World(*runner.run(context.__aenter__()), itertools.count(), set())
        try:
            fuzz(
                "key fetches",
                scripts(),
                lambda drawn: runner.run(check(world, drawn)),
                most_memory=MOST_MEMORY,
                examples=20,
                is_slow=True,
            )
        finally:
            runner.run(context.__aexit__(None, None, None))
    assert world.seen == {"a key", "key_unavailable"}


def test_a_fetch_that_keeps_all_that_comes_is_found(tmp_path: Path) -> None:
    """So that the bound above means something: an endless document, without a limit, for two seconds."""

    async def main() -> None:
        async with a_server(tmp_path) as (server, fetch):
            server.scripts = {b"/v1/x": Script(b"HTTP/1.1 200 OK\r\n\r\n", "endless", ENDLESS[0] * 16)}
            with pytest.raises(UnfetchedError):
                await fetch(f"https://{HOST}/v1/x", timeout=2.0, limit=1 << 40)

    assert memory_of(lambda: asyncio.run(main())) > MOST_MEMORY


def test_a_document_is_small() -> None:
    assert AT_ONCE * 2 * MAX_DOCUMENT_BYTES < MOST_MEMORY / 8
