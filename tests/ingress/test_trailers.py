"""A trailer of one request is no header of the next one on its connection, which may be somebody else's."""

import asyncio
import random
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from ipaddress import ip_network
from pathlib import Path
from unittest.mock import Mock

import pytest
from aiohttp import web

from gateway.ingress.server import Connection, Limits, Server
from tests.ingress.test_certificate_headers import HAPROXY, LEAF, RFC9440, behind, sequence
from tests.ingress.test_ingress import (
    NOW,
    PING,
    SECRET,
    World,
    a_request,
    a_source,
    github,
    github_signature,
    running,
)
from tests.ingress.test_proxy_protocol import until_listening
from tests.ingress.test_tls import Pki, connected, pki
from tests.run_seeds import drawn
from tests.tools import needed

__all__ = ["pki"]

CHUNKED = "Transfer-Encoding: chunked"
CHAT = a_source("chat", {"scheme": "front", "secrets": [SECRET]})
NEXT = b"POST /next HTTP/1.1\r\nHost: hooks.example\r\nContent-Length: 2\r\n\r\nok"


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with running() as world:
        yield world


def chunked(trailers: bytes = b"", path: str = "/in/nobody") -> bytes:
    """Return a request of anybody; by default to no source at all."""
    return a_request(path, CHUNKED, body=b"2\r\nhi\r\n0\r\n" + trailers + b"\r\n")


async def test_a_trailer_is_no_type_and_no_identity_of_the_next_event(world: World) -> None:
    async with world.wire() as wire:  # a proxy's connection, on which it forwards the requests of several clients
        for trailer in (b"X-GitHub-Event: nothing\r\n", b"X-GitHub-Delivery: d0\r\n"):
            wire.send(chunked(trailer))
            assert (await wire.reply()).status == 404
            wire.send(github(f"X-Hub-Signature-256: {github_signature()}"))
            assert (await wire.reply()).status == 202
    first, second = [each.event for each in world.log.stored]
    assert (first.type, second.id) == ("ping", first.id)
    assert first.headers == second.headers


async def test_a_trailer_has_no_other_request_refused(world: World) -> None:
    async with world.wire() as wire:
        wire.send(chunked(b"Host: elsewhere\r\n"))
        assert (await wire.reply()).status == 404
        wire.send(github(f"X-Hub-Signature-256: {github_signature()}"))
        assert (await wire.reply()).status == 202


async def test_a_trailer_is_no_client_certificate_of_the_next_request() -> None:
    """A proxy sets the header where its client has a certificate, and passes trailers on as they came."""
    async with behind(RFC9440) as world, world.wire() as wire:
        wire.send(chunked(f"Client-Cert: {sequence(LEAF)}\r\n".encode()))  # certificates are no secrets
        assert (await wire.reply()).status == 404
        wire.send(a_request("/in/open"))
        assert (await wire.reply()).status == 403
    assert world.log.stored == []


async def test_a_trailer_is_no_address_of_the_next_request(world: World) -> None:
    """The proxy adds no X-Forwarded-For for those on its own machine, for instance."""
    rules = world.rules[0]
    source = replace(rules.sources["open"], allow_from=(ip_network("192.0.2.1"),))
    world.rules[0] = replace(
        rules, sources={**rules.sources, "open": source}, trusted_proxies=(ip_network("127.0.0.1"),)
    )
    async with world.wire() as wire:
        wire.send(chunked(b"X-Forwarded-For: 192.0.2.1\r\n"))
        assert (await wire.reply()).status == 404
        wire.send(a_request("/in/open"))
        assert (await wire.reply()).status == 403


async def test_a_trailer_has_no_event_taken_for_a_handshake(world: World) -> None:
    world.rules[0] = replace(world.rules[0], sources={**world.rules[0].sources, "chat": CHAT})
    pairs = CHAT.verifier.sign(PING, now=NOW, id="e1", type="ping", headers={})
    async with world.wire() as wire:
        wire.send(chunked(b"X-Front-Challenge: c\r\n"))
        assert (await wire.reply()).status == 404
        wire.send(a_request("/in/chat", *[f"{name}: {value}" for name, value in pairs], body=PING))
        assert (await wire.reply()).status == 202
    assert len(world.log.stored) == 1


@asynccontextmanager
async def haproxy(config: str, path: Path, world: World, **places: object) -> AsyncIterator[World]:
    """Run HAProxy before the ingress of a world; yield the same world through it."""
    program = needed("haproxy")
    with socket.create_server(("127.0.0.1", 0)) as free:
        front = free.getsockname()[1]
    (path / "config").write_text(config.format(front=front, back=world.port, **places))
    process = await asyncio.create_subprocess_exec(program, "-f", str(path / "config"), "-db")
    try:
        await until_listening(front)
        yield replace(world, port=front)
    finally:
        process.terminate()
        await process.wait()


async def test_behind_haproxy_a_trailer_is_no_client_certificate(pki: Pki, tmp_path: Path) -> None:
    (tmp_path / "tls.pem").write_text("".join(pki.servers.issue("hooks.example")))
    (tmp_path / "ca.pem").write_text(pki.bank.pem)
    claimed = sequence(pki.own(pki.bank, "hooks.bank.example").read_text())
    async with (
        behind(RFC9440, ca=pki.bank.pem) as world,
        haproxy(HAPROXY, tmp_path, world, folder=tmp_path) as front,
        connected(front, pki.client(own=None)) as wire,
    ):
        wire.send(chunked(f"Client-Cert: {claimed}\r\n".encode(), "/in/open"))
        assert (await wire.reply()).status == 403
        wire.send(a_request("/in/open"))
        assert (await wire.reply()).status == 403
    assert world.log.stored == []


SHARING = """
defaults
  mode http
  timeout client 5s
  timeout server 5s
  timeout connect 5s
listen front
  bind 127.0.0.1:{front}
  http-reuse always
  server gateway 127.0.0.1:{back}
"""


async def test_behind_haproxy_a_trailer_changes_no_event_of_another_client(world: World, tmp_path: Path) -> None:
    async with haproxy(SHARING, tmp_path, world) as front:
        async with front.wire() as stranger:
            stranger.send(chunked(b"X-GitHub-Event: nothing\r\n"))
            assert (await stranger.reply()).status == 404
        async with front.wire() as sender:
            sender.send(github(f"X-Hub-Signature-256: {github_signature()}"))
            assert (await sender.reply()).status == 202
    assert [stored.event.type for stored in world.log.stored] == ["ping"]


async def test_chunked_requests_share_a_connection_with_others(world: World) -> None:
    async with world.wire() as wire:
        for _ in range(3):
            for request in (chunked(path="/in/open"), chunked(b"X-Sum: 1\r\n", "/in/open"), a_request("/in/open")):
                wire.send(request)
                assert (await wire.reply()).status == 202
    assert [stored.event.body for stored in world.log.stored] == [b"hi", b"hi", PING] * 3
    assert {name for stored in world.log.stored for name, _ in stored.event.headers} == {
        *(b"Host", b"Transfer-Encoding", b"Content-Length")
    }


async def test_what_is_sent_right_behind_a_chunked_request_is_not_read_and_the_connection_is_closed(
    world: World,
) -> None:
    async with world.wire() as wire:
        wire.send(a_request("/in/open") + chunked(b"X-GitHub-Event: nothing\r\n", "/in/open") + a_request("/in/open"))
        assert (await wire.reply()).status == 202
        assert await wire.is_closed()
    assert len(world.log.stored) == 1


class Served:
    """What one connection's requests were, by path and headers, if the data comes in these pieces."""

    def __init__(self, steps: int = 5) -> None:
        self._steps = steps
        self.requests: list[tuple[str, tuple[tuple[bytes, bytes], ...]]] = []
        self.is_closed = False

    async def _handle(self, request: web.BaseRequest) -> web.Response:
        await request.read()
        self.requests.append((request.path, request.raw_headers))
        return web.Response(status=202)

    async def serve(self, pieces: Sequence[bytes]) -> None:
        server = Server(
            self._handle,
            Limits(),
            logger=Mock(),
            metrics=Mock(),
            may_log_traceback=Mock(return_value=False),
            refuse=Mock(),
        )
        connection = Connection(server, loop=asyncio.get_running_loop())
        transport = Mock(spec=asyncio.Transport, get_extra_info=Mock(return_value=None))
        transport.is_closing.side_effect = lambda: transport.close.called
        connection.connection_made(transport)
        for piece in pieces:
            connection.data_received(piece)
            for _ in range(self._steps):
                await asyncio.sleep(0)
        for _ in range(400):
            await asyncio.sleep(0)
        self.is_closed = transport.close.called
        connection.connection_lost(None)
        await asyncio.sleep(0)


@pytest.mark.parametrize("trailers", [b"", b"X-Sum: 1\r\n", b"X-Sum: 1\r\nX-Api-Key: k\r\n"])
async def test_wherever_the_data_is_cut_the_next_request_is_as_it_was_sent_or_its_connection_closed(
    trailers: bytes,
) -> None:
    first = chunked(trailers)
    data = first + NEXT
    for cut in range(len(data)):
        served = Served()
        await served.serve([data[:cut], data[cut:]])
        paths = [path for path, _ in served.requests]
        assert paths[:1] == ["/in/nobody"]
        assert (len(paths), served.is_closed) == ((2, False) if cut == len(first) else (1, True))
        assert all(
            headers == ((b"Host", b"hooks.example"), (b"Content-Length", b"2")) for _, headers in served.requests[1:]
        )


@pytest.mark.parametrize("number", range(100))
async def test_of_many_requests_in_any_pieces_each_has_its_own_headers(number: int) -> None:
    chance = random.Random(drawn() + number)
    plain = [chance.random() < 0.5 for _ in range(chance.randint(1, 40))]
    pieces: list[bytes] = []
    for at, is_plain in enumerate(plain):
        part = NEXT if is_plain else chunked(b"X-Sum: 1\r\n" * (at % 3))
        if pieces and chance.random() < 0.3:
            pieces[-1] += part
        else:
            cut = chance.randint(0, len(part))
            pieces += [part[:cut], part[cut:]]
    served = Served(steps=chance.choice((0, 3, 10)))
    await served.serve([piece for piece in pieces if piece])
    assert served.requests
    assert len(served.requests) == len(plain) or served.is_closed
    for is_plain, (path, headers) in zip(plain, served.requests, strict=False):
        assert path == ("/next" if is_plain else "/in/nobody")
        assert b"X-Sum" not in [name for name, _ in headers]
