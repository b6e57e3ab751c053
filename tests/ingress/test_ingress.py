"""The ingress over real connections: what is refused and how, what is stored, and that nothing bad stops it."""

import asyncio
import gzip
import hashlib
import hmac
import json
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from ipaddress import ip_network
from pathlib import Path
from typing import Any, NamedTuple, cast
from unittest.mock import Mock

import pytest
import structlog
from prometheus_client import CollectorRegistry

from gateway.bodies.redaction import HIDDEN
from gateway.ingress.body_memory import BodyMemory
from gateway.ingress.ingress import KEEPALIVE_GRACE, Ingress
from gateway.ingress.listener import ConnectionSetup
from gateway.ingress.server import Limits
from gateway.ingress.source_endpoint import SourceEndpoint
from gateway.ingress.tls import ServerTls
from gateway.log.base import Log, Position, Record, RecordHeaders
from gateway.log.records import decode_event
from gateway.log.topics import Topics
from gateway.model import SUCCESSOR_HEADROOM, Event, GatewayError, LogUnavailableError, RecordTooLargeError, event_id
from gateway.rules.expressions import Expression
from gateway.rules.redact_paths import parse_redact_path, redaction_of
from gateway.rules.route_table import RouteTable
from gateway.rules.rules import Egress, Rules, Source, StoredResponse
from gateway.rules.templates import Template
from gateway.telemetry.metrics import Metrics
from gateway.verify.remote_keys import Fetch
from gateway.verify.schemes import build_verifier

NOW = 1_764_075_895.25
RECEIVED = NOW + 1800.5
"""The log's clock, which this machine's is behind."""
SECRET = "It's a Secret to Everybody"
TOKEN = "t0p-secret-token"
ROOM = 20_000  # bytes of body, headers and query
PING = b'{"id":"e1","type":"ping"}'


class Stored(NamedTuple):
    topic: str
    key: bytes
    value: bytes
    headers: RecordHeaders

    @property
    def event(self) -> Event:
        return decode_event(Record(0, NOW, self.key, self.value, self.headers))


class FakeLog:
    """Keeps what is appended; fails or waits on request."""

    max_record_bytes = SUCCESSOR_HEADROOM + ROOM

    def __init__(self) -> None:
        self.stored: list[Stored] = []
        self.failure: Exception | None = None
        self.refused: set[bytes] = set()  # values
        self.may_append = asyncio.Event()
        self.may_append.set()
        self.waiting = 0

    async def append(
        self, topic: str, *, key: bytes, value: bytes, headers: RecordHeaders, partition: int | None = None
    ) -> Position:
        assert partition is None
        self.waiting += 1
        await self.may_append.wait()
        self.waiting -= 1
        if self.failure is not None:
            raise self.failure
        if value in self.refused:
            raise LogUnavailableError("no quorum")
        self.stored.append(Stored(topic, key, value, headers))
        return Position(0, len(self.stored) - 1, RECEIVED)

    def now(self) -> float:
        return RECEIVED


@dataclass
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Wire:
    """A raw connection to the ingress."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    def send(self, data: bytes) -> None:
        self._writer.write(data)

    async def reply(self, *, has_body: bool = True) -> Reply:
        async with asyncio.timeout(5):
            head = (await self._reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            headers = {name.lower(): value for name, _, value in [line.partition(": ") for line in head[1:] if line]}
            length = int(headers.get("content-length", "0")) if has_body else 0
            body = await self._reader.readexactly(length)
            return Reply(int(head[0].split(" ")[1]), headers, body)

    async def is_closed(self) -> bool:
        async with asyncio.timeout(5):
            return await self._reader.read(1) == b""

    def close(self) -> None:
        self._writer.close()


@dataclass
class World:
    ingress: Ingress
    log: FakeLog
    registry: CollectorRegistry
    port: int
    lines: list[Any] = field(default_factory=list)
    rules: list[Rules] = field(default_factory=list)
    tls: ServerTls | None = None

    @asynccontextmanager
    async def wire(self) -> AsyncIterator[Wire]:
        wire = Wire(*await asyncio.open_connection("127.0.0.1", self.port))
        try:
            yield wire
        finally:
            wire.close()

    async def exchange(self, data: bytes) -> Reply:
        async with self.wire() as wire:
            wire.send(data)
            return await wire.reply(has_body=not data.startswith(b"HEAD"))

    def count(self, name: str, **labels: str) -> float:
        return self.registry.get_sample_value(f"gateway_{name}", labels) or 0.0


def a_source(name: str, verify: Mapping[str, object], **expressions: str) -> Source:
    made: dict[str, Any] = {key: Expression(text) for key, text in expressions.items()}
    return Source(name=name, path=f"/in/{name}", verifier=build_verifier(verify), **made)


def some_rules(*more: Source) -> Rules:
    sources = [
        a_source("github", {"scheme": "github", "secrets": ["another", SECRET]}),
        a_source("stripe", {"scheme": "stripe", "secrets": [SECRET]}),
        a_source("slack", {"scheme": "slack", "secrets": [SECRET]}),
        a_source("graph", {"scheme": "bearer", "handshake": "microsoft-graph", "secrets": [SECRET]}),
        a_source("cloud", {"scheme": "bearer", "handshake": "cloudevents", "secrets": [SECRET]}),
        a_source("standard", {"scheme": "standard-webhooks", "secrets": ["whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw"]}),
        a_source("crm", {"scheme": "token", "header": "X-Token", "secrets": [TOKEN]}, id="body.id", type="body.type"),
        a_source("erp", {"scheme": "token", "query": "token", "secrets": [TOKEN]}, key="body.account"),
        a_source("open", {"scheme": "none"}),
        *more,
    ]
    return Rules(
        sources={source.name: source for source in sources},
        destinations={},
        routes={},
        egress=Egress(),
        table=RouteTable([]),
        files=(),
    )


@asynccontextmanager
async def running(
    *,
    limits: Limits | None = None,
    fetch: Fetch | None = None,
    certificates: Sequence[Path] = (),
    proxies: Sequence[str] = (),
    clock: Callable[[], float] = lambda: NOW,
) -> AsyncIterator[World]:
    """Run an ingress; with `certificates`, files that have their keys as well, it speaks TLS."""
    log, registry, current = FakeLog(), CollectorRegistry(), [some_rules()]
    metrics = Metrics(registry)
    metrics.prepare(current[0])
    with structlog.testing.capture_logs() as lines:
        tls = None
        if certificates:
            tls = ServerTls([(file, file) for file in certificates], metrics=metrics, logger=structlog.get_logger())
            await tls.load()
        ingress = Ingress(
            rules=lambda: current[0],
            log=cast("Log", log),
            topics=Topics(),
            metrics=metrics,
            logger=structlog.get_logger().bind(),
            clock=clock,
            limits=limits,
            fetch=fetch,
        )
        async with asyncio.TaskGroup() as tasks:
            wire = ConnectionSetup(tls=tls, proxies=tuple(map(ip_network, proxies)), tasks=tasks)
            _, port = await ingress.start("127.0.0.1", 0, setup=wire)
            try:
                yield World(ingress, log, registry, port, lines, current, tls)
            finally:
                await ingress.stop(timeout=0.1)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with running() as world:
        yield world


def a_request(
    target: str = "/in/open",
    *headers: str,
    body: bytes = PING,
    method: str = "POST",
    length: int | None = None,
) -> bytes:
    lines = [f"{method} {target} HTTP/1.1", "Host: hooks.example", *headers]
    if not any(header.lower().startswith("transfer-encoding") for header in headers):
        lines.append(f"Content-Length: {len(body) if length is None else length}")
    return "\r\n".join([*lines, "", ""]).encode("utf-8", "surrogateescape") + body


def chunked(*chunks: bytes) -> bytes:
    return b"".join([b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in (*chunks, b"")])


def signed(source: str, body: bytes = PING, *, at: float = NOW, **given: str) -> bytes:
    """What the provider would send; given headers (`_` for `-`) win, so that a forged one stays forged."""
    verifier = some_rules().sources[source].verifier
    headers = {name.replace("_", "-"): value for name, value in given.items()}
    pairs = verifier.sign(body, now=at, id="e1", type="ping", headers=headers)
    return a_request(f"/in/{source}", *[f"{name}: {value}" for name, value in pairs], body=body)


def github_signature(body: bytes = PING) -> str:
    return "sha256=" + hmac.new(SECRET.encode(), body, hashlib.sha256).hexdigest()


def github(*headers: str, body: bytes = PING) -> bytes:
    return a_request("/in/github", "X-GitHub-Event: ping", "X-GitHub-Delivery: d1", *headers, body=body)


CRM = f"X-Token: {TOKEN}"
CHUNKED = "Transfer-Encoding: chunked"

BAD_REQUESTS: dict[str, tuple[bytes, int, str]] = {
    # Not for us.
    "unknown source": (a_request("/in/nobody"), 404, "unknown_source"),
    "no source": (a_request("/"), 404, "unknown_source"),
    "a source's path and more": (a_request("/in/open/"), 404, "unknown_source"),
    "a percent-encoded path": (a_request("/in/%6fpen"), 404, "unknown_source"),
    "GET": (a_request(method="GET", body=b""), 405, "method_not_allowed"),
    "PUT": (a_request(method="PUT"), 405, "method_not_allowed"),
    "OPTIONS": (a_request(method="OPTIONS", body=b""), 405, "method_not_allowed"),
    "HEAD": (a_request(method="HEAD", body=b""), 405, "method_not_allowed"),
    "an unknown method": (a_request(method="BREW"), 400, "malformed_request"),
    # Not HTTP.
    "not HTTP": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 400, "malformed_request"),
    "an unknown version": (b"POST /in/open HTTP/9.9\r\n\r\n", 400, "malformed_request"),
    "HTTP/0.9": (a_request("/in/open").replace(b"HTTP/1.1", b"HTTP/0.9"), 400, "malformed_request"),
    "no version": (a_request("/in/open").replace(b" HTTP/1.1", b""), 400, "malformed_request"),
    "HTTP/2.0": (a_request("/in/open").replace(b"HTTP/1.1", b"HTTP/2.0"), 400, "malformed_request"),
    "a space in the target": (a_request("/in/open ?x"), 400, "malformed_request"),
    "a header without a name": (a_request("/in/open", ": x"), 400, "malformed_request"),
    "a space before the colon": (a_request("/in/open", "X-A : x"), 400, "malformed_request"),
    "a folded header": (a_request("/in/open", "X-A: x", " y"), 400, "malformed_request"),
    "a line feed in a header": (a_request("/in/open", "X-A: x\ny"), 400, "malformed_request"),
    "a NUL in a header": (a_request("/in/open", "X-A: x\0y"), 400, "malformed_request"),
    "two lengths": (a_request("/in/open", "Content-Length: 3"), 400, "malformed_request"),
    "a negative length": (a_request(length=-1), 400, "malformed_request"),
    "length and chunks": (
        a_request("/in/open", CHUNKED, "Content-Length: 5", body=chunked(PING)),
        400,
        "malformed_request",
    ),
    "chunks twice encoded": (a_request("/in/open", "Transfer-Encoding: chunked, chunked"), 400, "malformed_request"),
    "chunks in HTTP/1.0": (
        a_request("/in/open", CHUNKED, body=chunked(PING)).replace(b"HTTP/1.1", b"HTTP/1.0"),
        400,
        "malformed_request",
    ),
    "an unknown transfer coding": (a_request("/in/open", "Transfer-Encoding: br"), 400, "malformed_request"),
    "chunks of another coding": (
        a_request("/in/open", "Transfer-Encoding: gzip, chunked", body=chunked(gzip.compress(PING))),
        501,
        "transfer_coding",
    ),
    "chunks of another coding, in two lines": (
        a_request("/in/open", "Transfer-Encoding: gzip", CHUNKED, body=chunked(gzip.compress(PING))),
        400,
        "malformed_request",
    ),
    "a chunk without a size": (a_request("/in/open", CHUNKED, body=b"zz\r\n"), 400, "malformed"),
    "a negative chunk": (a_request("/in/open", CHUNKED, body=b"-1\r\nx\r\n0\r\n\r\n"), 400, "malformed"),
    "a chunk of another size": (a_request("/in/open", CHUNKED, body=b"2\r\nabc\r\n0\r\n\r\n"), 400, "malformed"),
    # Too much.
    "a header too large": (a_request("/in/open", "X-A: " + "a" * 20_000), 400, "malformed_request"),
    "headers too large": (a_request("/in/open", *["X-A: " + "a" * 8_000] * 5), 431, "head_too_large"),
    "too many headers": (a_request("/in/open", *["X-A: a"] * 200), 400, "malformed_request"),
    "a target too large": (a_request("/in/open?" + "a" * 20_000), 400, "malformed_request"),
    "headers and query too large": (
        a_request("/in/open?" + "q" * 10_000, *["X-A: " + "a" * 8_000] * 3),
        431,
        "head_too_large",
    ),
    "a body too large": (a_request(body=b"x" * (ROOM + 1)), 413, "body_too_large"),
    "a length too large, nothing sent": (a_request(length=ROOM + 1, body=b""), 413, "body_too_large"),
    "a length of terabytes": (a_request(length=10**13, body=b"x"), 413, "body_too_large"),
    "chunks too large": (a_request("/in/open", CHUNKED, body=chunked(*[b"x" * 1000] * 30)), 413, "body_too_large"),
    "chunks too large, without an end": (
        a_request("/in/open", CHUNKED, body=b"%x\r\n" % 10**9 + b"x" * (ROOM + 1)),
        413,
        "body_too_large",
    ),
    # Too slow.
    "a body that doesn't come": (a_request(length=5, body=b""), 408, "body_slow"),
    "a body that stops": (a_request(length=500, body=b"x"), 408, "body_slow"),
    "chunks that stop": (a_request("/in/open", CHUNKED, body=b"5\r\nab"), 408, "body_slow"),
    # Not verified.
    "no signature": (github(), 401, "missing_signature"),
    "an empty signature": (github("X-Hub-Signature-256: "), 401, "malformed_signature"),
    "a forged signature": (github("X-Hub-Signature-256: sha256=" + "0" * 64), 401, "bad_signature"),
    "a signature without its prefix": (github(f"X-Hub-Signature-256: {'0' * 64}"), 401, "malformed_signature"),
    "a signature of another body": (github(f"X-Hub-Signature-256: {github_signature(b'x')}"), 401, "bad_signature"),
    "a signature by SHA-1 only": (github("X-Hub-Signature: sha1=" + "0" * 40), 401, "missing_signature"),
    "a signed body without a body": (
        github(f"X-Hub-Signature-256: {github_signature()}", body=b""),
        401,
        "bad_signature",
    ),
    "many signatures": (github(*["X-Hub-Signature-256: sha256=" + "0" * 64] * 20), 401, "malformed_signature"),
    "a stale timestamp": (signed("stripe", at=NOW - 301), 401, "stale_timestamp"),
    "a timestamp to come": (signed("slack", at=NOW + 301), 401, "stale_timestamp"),
    "a timestamp that isn't signed": (
        signed("slack", X_Slack_Request_Timestamp=str(int(NOW)), X_Slack_Signature="v0=" + "0" * 64),
        401,
        "bad_signature",
    ),
    "no timestamp": (a_request("/in/slack", "X-Slack-Signature: v0=" + "0" * 64), 401, "missing_timestamp"),
    "another event's id": (
        signed("standard").replace(b"e1\r\n", b"e2\r\n", 1),
        401,
        "bad_signature",
    ),
    "no token": (a_request("/in/crm"), 401, "missing_credentials"),
    "a wrong token": (a_request("/in/crm", f"X-Token: {TOKEN}x"), 401, "bad_credentials"),
    "a wrong token in the query": (a_request("/in/erp?token=x"), 401, "bad_credentials"),
    "unverified and not JSON": (a_request("/in/crm", body=b"{"), 401, "missing_credentials"),
    # Verified, and no event.
    "no JSON": (a_request("/in/crm", CRM, body=b'{"id":'), 400, "body_not_json"),
    "no body": (a_request("/in/crm", CRM, body=b""), 400, "body_not_json"),
    "not UTF-8": (a_request("/in/crm", CRM, body=b'{"id":"\xff"}'), 400, "body_not_json"),
    "an id that is a mapping": (a_request("/in/crm", CRM, body=b'{"id":{}}'), 400, "expression_error"),
    "an id of a kilobyte": (a_request("/in/crm", CRM, body=b'{"id":"%b"}' % (b"x" * 1025)), 400, "expression_error"),
    "a key that is a list": (a_request(f"/in/erp?token={TOKEN}", body=b'{"account":[1]}'), 400, "expression_error"),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
async def test_a_bad_request_is_refused_and_harms_nobody(case: str) -> None:
    data, status, reason = BAD_REQUESTS[case]
    async with running(limits=Limits(body_seconds=0.05)) as world:
        reply = await world.exchange(data)
        assert reply.status == status
        assert reply.headers["content-type"] == "application/problem+json"
        if not data.startswith(b"HEAD"):
            assert reply.json["status"] == status
            assert reply.json["type"] == "about:blank"
            assert reply.json["detail"]
        assert SECRET.encode() not in reply.body
        assert TOKEN.encode() not in reply.body
        if status == 405:
            assert reply.headers["allow"] == "POST"
        rejections = [
            (sample.labels["reason"], sample.value)
            for metric in world.registry.collect()
            for sample in metric.samples
            if sample.name == "gateway_rejected_total" and sample.value
        ]
        assert [count for _, count in rejections] == [1.0]
        assert rejections[0][0].startswith(reason)
        assert world.log.stored == []

        good = await world.exchange(github(f"X-Hub-Signature-256: {github_signature()}"))
        assert good.status == 202
        assert [stored.event.id for stored in world.log.stored] == [good.json["id"]]


async def test_an_acknowledged_event_is_stored_byte_for_byte(world: World) -> None:
    headers = [
        "X-GitHub-Event: push",
        "X-GitHub-Delivery: d1",
        "X-Twice: 1",
        "x-twice: 2",
        "X-Odd: \udcff\udcfe",
        "X-No:",
    ]
    body = bytes(range(256)) * 10
    data = a_request("/in/github?a=1&b=%20&&c", f"X-Hub-Signature-256: {github_signature(body)}", *headers, body=body)
    reply = await world.exchange(data)
    assert reply.status == 202
    assert reply.headers["content-type"] == "application/json"
    assert reply.json == {"id": event_id("github", "d1")}
    assert reply.headers["gateway-event-id"] == event_id("github", "d1")
    (stored,) = world.log.stored
    assert stored.topic == "gateway.events.github"
    assert stored.key == event_id("github", "d1").encode()
    assert stored.event == Event(
        id=event_id("github", "d1"),
        source="github",
        type="push",
        received_at=RECEIVED,
        headers=(
            (b"Host", b"hooks.example"),
            (b"X-Hub-Signature-256", github_signature(body).encode()),
            (b"X-GitHub-Event", b"push"),
            (b"X-GitHub-Delivery", b"d1"),
            (b"X-Twice", b"1"),
            (b"x-twice", b"2"),
            (b"X-Odd", b"\xff\xfe"),
            (b"X-No", b""),
            (b"Content-Length", b"2560"),
        ),
        query="a=1&b=%20&&c",
        body=body,
    )


async def test_a_compressed_body_is_kept_as_it_came(world: World) -> None:
    body = gzip.compress(PING, mtime=0)
    reply = await world.exchange(a_request("/in/crm", CRM, "Content-Encoding: gzip", body=body))
    assert reply.json["id"] == event_id("crm", "e1")
    (stored,) = world.log.stored
    assert stored.value == body
    assert (b"Content-Encoding", b"gzip") in stored.event.headers


async def test_nothing_is_read_after_chunks_in_http_1_0(world: World) -> None:
    """RFC 9112, section 6.1: a proxy may have framed it otherwise."""
    first = a_request("/in/open", CHUNKED, "Connection: keep-alive", body=chunked(PING))
    async with world.wire() as wire:
        wire.send(first.replace(b"HTTP/1.1", b"HTTP/1.0"))
        assert (await wire.reply()).status == 400
        assert await wire.is_closed()
    assert world.log.stored == []


async def test_chunks_are_joined(world: World) -> None:
    body = chunked(b'{"id":', b'"e1"', b"}")
    async with world.wire() as wire:
        for byte in a_request("/in/crm", CRM, CHUNKED, body=body):
            wire.send(bytes([byte]))
            await asyncio.sleep(0)
        assert (await wire.reply()).status == 202
    assert world.log.stored[0].value == b'{"id":"e1"}'


@pytest.mark.parametrize("name", ["github", "stripe", "slack", "standard"])
async def test_a_provider_signature_is_accepted(world: World, name: str) -> None:
    reply = await world.exchange(signed(name))
    assert reply.status == 202
    assert world.log.stored[0].event.type == "ping"


@pytest.mark.parametrize("framing", ["length", "chunks"])
async def test_the_largest_body_leaves_no_byte_of_the_room(world: World, framing: str) -> None:
    def request_of(size: int) -> bytes:
        if framing == "chunks":
            return a_request("/in/open?q=1", CHUNKED, body=chunked(b"x" * size))
        return a_request("/in/open?q=1", body=b"x" * size)

    own = ["Host", "hooks.example", "q=1"]
    own += ["Transfer-Encoding", "chunked"] if framing == "chunks" else ["Content-Length", "19999"]
    largest = ROOM - len("".join(own))
    assert (await world.exchange(request_of(largest))).status == 202
    assert (await world.exchange(request_of(largest + 1))).status == 413
    assert [len(stored.value) for stored in world.log.stored] == [largest]


async def test_credentials_go_no_further_than_the_ingress(world: World) -> None:
    await world.exchange(a_request("/in/crm", CRM, "Authorization: Basic eDp5", "Cookie: a=b", "X-Kept: yes"))
    await world.exchange(a_request(f"/in/erp?a=%41&token={TOKEN}&b"))
    crm, erp = [stored.event for stored in world.log.stored]
    assert [name for name, _ in crm.headers] == [b"Host", b"X-Kept", b"Content-Length"]
    assert erp.query == "a=%41&b"
    assert TOKEN not in repr(world.log.stored)
    assert TOKEN not in repr(world.lines)


async def test_identity_falls_back_to_the_idempotency_key_and_then_to_none(world: World) -> None:
    by_key = [await world.exchange(a_request("/in/open", "idempotency-key: k1")) for _ in range(2)]
    by_none = [await world.exchange(a_request("/in/open", "Idempotency-Key: ")) for _ in range(2)]
    null = [await world.exchange(a_request("/in/crm", CRM, body=b'{"id":null}')) for _ in range(2)]
    assert {reply.json["id"] for reply in by_key} == {event_id("open", "k1")}
    assert len({reply.json["id"] for reply in by_none + null}) == 4


async def test_a_duplicate_gets_the_same_answer(world: World) -> None:
    first, second = [await world.exchange(signed("stripe")) for _ in range(2)]
    assert first.json == second.json == {"id": event_id("stripe", "e1")}


async def test_the_order_key_is_the_records_key(world: World) -> None:
    await world.exchange(a_request(f"/in/erp?token={TOKEN}", body=b'{"account":7}'))
    (stored,) = world.log.stored
    assert stored.key == b"7"
    assert stored.event.key == "7"


async def test_a_schemes_default_type_is_no_reason_to_refuse(world: World) -> None:
    assert (await world.exchange(signed("standard", b"no JSON"))).status == 202
    assert world.log.stored[0].event.type == "webhook"


@pytest.mark.parametrize("body", [b"", b"{", b'{"id":{"a":1}}', b'{"id":"%b"}' % (b"x" * 2000)])
async def test_a_schemes_default_identity_is_no_reason_to_refuse(world: World, body: bytes) -> None:
    replies = [await world.exchange(signed("stripe", body)) for _ in range(2)]
    assert [reply.status for reply in replies] == [202, 202]
    assert len({stored.event.id for stored in world.log.stored}) == 2
    assert {stored.value for stored in world.log.stored} == {body}


SVIX, STANDARD_WEBHOOKS = (
    build_verifier({"scheme": scheme, "secrets": ["whsec_c2VjcmV0LXNlY3JldC1zZWNyZXQ="]})
    for scheme in ("svix", "standard-webhooks")
)


async def test_only_verified_data_identifies_an_event(world: World) -> None:
    """Svix signs one of two sets of headers; whoever adds the other one must not choose the event's id."""
    source = replace(world.rules[0].sources["stripe"], name="clerk", path="/in/clerk", verifier=SVIX)
    world.rules[0] = replace(world.rules[0], sources={"clerk": source})
    headers = STANDARD_WEBHOOKS.sign(b"{}", now=NOW, id="msg_1", type="x", headers={})
    lines = [f"{name}: {value}" for name, value in headers]
    ids = set()
    for more in ([], ["svix-id: one"], ["svix-id: two", "svix-signature: v1,x"]):
        reply = await world.exchange(a_request("/in/clerk", *lines, *more, body=b"{}"))
        ids.add(reply.json["id"])
    assert len(ids) == 1


def answered(world: World, source: str, response: StoredResponse) -> None:
    """Let a source respond so from now on."""
    sources = world.rules[0].sources
    world.rules[0] = replace(world.rules[0], sources={**sources, source: replace(sources[source], response=response)})


async def test_a_source_may_have_a_response_of_its_own(world: World) -> None:
    body = Template({"text": "got ${{ body.zen }}", "id": "${{ id }}"})
    answered(world, "open", StoredResponse(status=200, headers=(("X-Kind", Template("${{ type }}")),), body=body))
    reply = await world.exchange(a_request(body=b'{"zen":"keep it"}'))
    [stored] = world.log.stored
    assert (reply.status, reply.headers["content-type"]) == (200, "application/json")
    assert reply.json == {"text": "got keep it", "id": stored.event.id}
    assert (reply.headers["x-kind"], reply.headers["gateway-event-id"]) == ("webhook", stored.event.id)
    assert world.count("requests_total", source="open", status="200") == 1
    assert world.count("events_total", source="open") == 1

    answered(world, "open", StoredResponse(status=200, body=Template("ok")))
    reply = await world.exchange(a_request())
    assert (reply.body, reply.headers["content-type"]) == (b"ok", "text/plain; charset=utf-8")

    odd = "a\tb\u00a0c\u202e"
    answered(world, "open", StoredResponse(headers=(("X-Odd", Template(odd)),)))
    reply = await world.exchange(a_request())
    assert (reply.status, reply.headers["x-odd"].encode("latin-1").decode()) == (202, odd)

    answered(world, "open", StoredResponse(status=201))
    reply = await world.exchange(a_request())
    assert (reply.status, reply.json) == (201, {"id": world.log.stored[-1].event.id})

    answered(world, "open", StoredResponse(status=204, body=Template("no")))
    reply = await world.exchange(a_request())
    assert (reply.status, reply.body) == (204, b"")
    assert "content-type" not in reply.headers


@pytest.mark.parametrize(
    "response",
    [
        StoredResponse(status=200, body=Template("${{ body.none }}")),
        StoredResponse(status=200, headers=(("X-A", Template("${{ body.zen }}")),)),
        StoredResponse(status=200, headers=(("X-A", Template("${{ body.zen }}")),), body=Template("${{ id }}")),
        StoredResponse(status=200, headers=(("X-A", Template("${{ id }}")),), body=Template("${{ body.none }}")),
    ],
)
async def test_a_response_that_cannot_be_rendered_is_the_default_one(world: World, response: StoredResponse) -> None:
    """The event is stored: any other status would have it sent again."""
    fixed = ("X-Fixed", Template("f"))
    answered(world, "open", replace(response, headers=(*response.headers, fixed)))
    reply = await world.exchange(a_request(body=b'{"zen":"a\\r\\nSet-Cookie: b"}'))
    [stored] = world.log.stored
    assert (reply.status, reply.json, reply.headers["x-fixed"]) == (200, {"id": stored.event.id}, "f")
    assert "set-cookie" not in reply.headers
    assert "x-a" not in reply.headers
    [line] = [each for each in world.lines if each["event"] == "request_finished"]
    assert line["response_error"]


async def test_a_handshake_is_answered_and_not_stored(world: World) -> None:
    body = b'{"type":"url_verification","challenge":"3eZbrw1aBm"}'
    reply = await world.exchange(signed("slack", body))
    assert (reply.status, reply.body) == (200, b"3eZbrw1aBm")
    assert reply.headers["content-type"].startswith("text/plain")
    forged = signed("slack", body, X_Slack_Signature="v0=" + "0" * 64)
    assert (await world.exchange(forged)).status == 401
    assert world.log.stored == []


async def test_a_handshake_of_the_head_alone_is_answered_unverified(world: World) -> None:
    reply = await world.exchange(a_request("/in/graph?validationToken=a%20b", body=b""))
    assert (reply.status, reply.body, reply.headers["content-type"]) == (200, b"a b", "text/plain")
    assert (await world.exchange(a_request("/in/graph", body=b"{}"))).status == 401
    assert world.log.stored == []


async def test_other_methods_are_allowed_for_a_handshake_only(world: World) -> None:
    reply = await world.exchange(
        a_request("/in/cloud", "WebHook-Request-Origin: b.example", method="OPTIONS", body=b"")
    )
    assert (reply.status, reply.body) == (200, b"")
    assert reply.headers["webhook-allowed-origin"] == "b.example"
    for method, path in (("OPTIONS", "/in/cloud"), ("GET", "/in/cloud"), ("OPTIONS", "/in/slack")):
        reply = await world.exchange(a_request(path, method=method, body=b""))
        assert reply.status == 405
        assert reply.headers["allow"] == ("POST, OPTIONS" if path == "/in/cloud" else "POST")
    assert world.log.stored == []


@pytest.mark.parametrize(
    ("failure", "status"),
    [(LogUnavailableError("no quorum"), 503), (RecordTooLargeError("1 MiB"), 413)],
)
async def test_a_refused_append_is_not_acknowledged(world: World, failure: GatewayError, status: int) -> None:
    world.log.failure = failure
    reply = await world.exchange(a_request())
    assert reply.status == status
    assert reply.headers.get("retry-after") == ("5" if status == 503 else None)
    assert str(failure) not in reply.body.decode()
    world.log.failure = None
    assert (await world.exchange(a_request())).status == 202
    assert len(world.log.stored) == 1


async def test_nothing_is_acknowledged_before_the_append_has_returned(world: World) -> None:
    world.log.may_append.clear()
    async with world.wire() as wire:
        wire.send(a_request())
        answer = asyncio.ensure_future(wire.reply())
        await until(lambda: world.log.waiting == 1)
        for _ in range(10):
            await asyncio.sleep(0)
        assert not answer.done()
        world.log.may_append.set()
        assert (await answer).status == 202


async def test_bodies_in_flight_are_bounded() -> None:
    async with running(limits=Limits(in_flight_bytes=60_000)) as world:
        world.log.may_append.clear()
        body = b"x" * 15_000
        async with AsyncExitStack() as stack:
            wires = [await stack.enter_async_context(world.wire()) for _ in range(4)]
            for wire in wires[:3]:
                wire.send(a_request(body=body))
            await until(lambda: world.log.waiting == 3)
            refused = await world.exchange(a_request(body=body))
            assert (refused.status, refused.headers["retry-after"]) == (503, "5")
            wires[3].send(a_request("/in/crm", CRM, body=PING))  # what one source has of it leaves room for another
            await until(lambda: world.log.waiting == 4)
            world.log.may_append.set()
            assert [(await wire.reply()).status for wire in wires] == [202] * 4
        for _ in range(5):  # memory is released, refused or not
            assert (await world.exchange(a_request(body=body))).status == 202
        assert world.count("rejected_total", source="open", reason="overloaded") == 1


async def test_bodies_that_are_held_open_are_not_taken_for_a_lack_of_capacity() -> None:
    async with running(limits=Limits(in_flight_bytes=30_000)) as world, world.wire() as slow:
        slow.send(a_request(length=19_000, body=b"x" * 16_000))  # and the rest never comes
        refused = await slow.reply()
        assert (refused.status, refused.headers["retry-after"]) == (503, "5")
        assert world.count("rejected_total", source="open", reason="slow_bodies") == 1
        assert world.count("rejected_total", source="open", reason="overloaded") == 0


async def test_a_refused_or_slow_body_gives_its_bytes_back() -> None:
    async with running(limits=Limits(in_flight_bytes=40_000, body_seconds=0.05)) as world:
        for _ in range(3):
            assert (await world.exchange(a_request(length=19_000, body=b"x" * 18_000))).status == 408
            forged = github("X-Hub-Signature-256: sha256=" + "0" * 64, body=b"x" * 18_000)
            assert (await world.exchange(forged)).status == 401
        assert (await world.exchange(a_request(body=b"x" * 18_000))).status == 202


@pytest.mark.parametrize("before", [0, 1])
async def test_a_head_that_does_not_end_closes_its_connection(before: int) -> None:
    async with running(limits=Limits(head_seconds=0.1)) as world:
        async with world.wire() as half, world.wire() as dripping, world.wire() as idle:
            for wire in (half, dripping) * before:
                wire.send(a_request())
                assert (await wire.reply()).status == 202
            head = a_request("/in/open", "X-A: " + "a" * 300, body=b"")[:-4]
            began = asyncio.get_running_loop().time()
            half.send(head)
            drip_on = asyncio.ensure_future(drip(dripping, head, every=0.005))  # some 2 s for all of it
            reply = await half.reply()
            assert (reply.status, reply.headers["connection"]) == (408, "close")
            assert await half.is_closed()
            await until(lambda: world.count("rejected_total", source="", reason="head_slow") == 2)
            assert 0.05 < asyncio.get_running_loop().time() - began < 1.5
            drip_on.cancel()
            idle.send(b"\r\n")  # one that has only been opened isn't late with anything
            await asyncio.sleep(0.2)
            idle.send(a_request())
            assert (await idle.reply()).status == 202
        assert world.count("requests_total", source="", status="408") == 2


async def test_a_head_whose_first_bytes_come_before_they_are_waited_for_has_its_deadline_too() -> None:
    """As on a busy loop, which hears of the connection and of its bytes in one turn."""
    async with running(limits=Limits(head_seconds=0.1)) as world:
        assert world.ingress._web is not None
        connection = world.ingress._web()
        transport = Mock(spec=asyncio.Transport, get_extra_info=Mock(return_value=None))
        connection.connection_made(transport)
        connection.data_received(b"POST /in/open HTTP/1.1\r\nX-A: a")
        await until(lambda: world.count("rejected_total", source="", reason="head_slow") == 1)
        assert transport.write.call_args.args[0].startswith(b"HTTP/1.1 408 ")
        connection.connection_lost(None)


@pytest.mark.parametrize("piece", [1_000, 100_000])
async def test_a_head_that_does_not_end_is_not_kept_beyond_its_size(piece: int) -> None:
    """The parser takes 2 MB of it, and a few hundred of those are all the memory that a process has."""
    async with running() as world, world.wire() as wire:
        head = a_request("/in/open", *[f"X-{number}: " + "a" * 8_000 for number in range(12)], body=b"")[:-4]
        await drip_in(wire, head, piece)
        await until(lambda: world.count("rejected_total", source="", reason="head_too_large") == 1)
        assert world.count("requests_total", source="", status="431") == 1
        async with world.wire() as other:
            for _ in range(5):  # each head counts for itself
                await drip_in(other, a_request("/in/open", *["X-A: " + "a" * 8_000] * 2), 7_000)
                assert (await other.reply()).status == 202


async def drip_in(wire: Wire, data: bytes, piece: int) -> None:
    for at in range(0, len(data), piece):
        wire.send(data[at : at + piece])
        await asyncio.sleep(0.001)


async def test_a_head_in_pieces_is_read_and_its_body_has_time_of_its_own() -> None:
    async with running(limits=Limits(head_seconds=1.0)) as world, world.wire() as wire:
        request = a_request("/in/open", body=b"xy")
        await drip(wire, request[:-2], every=0.0005)
        for byte in request[-2:]:
            await asyncio.sleep(0.6)
            wire.send(bytes([byte]))
        assert (await wire.reply()).status == 202


async def drip(wire: Wire, data: bytes, *, every: float) -> None:
    for byte in data:
        wire.send(bytes([byte]))
        await asyncio.sleep(every)


async def test_a_sender_that_hangs_up_leaves_no_noise(world: World) -> None:
    async with world.wire() as wire:
        wire.send(a_request(length=500, body=b"x"))
        await asyncio.sleep(0.01)
    await until(lambda: world.count("requests_total", source="open", status="499") == 1)
    world.log.may_append.clear()
    async with world.wire() as wire:
        wire.send(a_request())
        await until(lambda: world.log.waiting == 1)
    await asyncio.sleep(0.01)
    world.log.may_append.set()
    await until(lambda: len(world.log.stored) == 1)
    await until(lambda: world.count("requests_total", source="open", status="202") == 1)
    assert {line["log_level"] for line in world.lines} == {"info"}


@pytest.mark.parametrize("case", ["no signature", "a stale timestamp", "a wrong token", "a wrong token in the query"])
async def test_a_body_is_not_read_where_the_head_alone_decides(case: str) -> None:
    head, _, _ = BAD_REQUESTS[case][0].partition(b"\r\n\r\n")
    lines = [line for line in head.decode().split("\r\n")[1:] if not line.startswith(("Host", "Content-Length"))]
    target = head.split(b" ")[1].decode()
    async with running() as world, world.wire() as wire:
        for expected in (BAD_REQUESTS[case][1:], BAD_REQUESTS[case][1:]):
            wire.send(a_request(target, *lines, "Expect: 100-continue", length=5_000, body=b""))
            assert (await wire.reply()).status == expected[0]  # not 100: nobody has asked for the body
            wire.send(b"x" * 5_000)
        assert world.ingress._memory.free == Limits().in_flight_bytes


async def test_open_bodies_make_room_for_new_ones() -> None:
    """Each is signed as well as a forger can. Without the rule, 3 of them refuse everybody else for 10 s."""
    forged = ["X-Hub-Signature-256: sha256=" + "0" * 64, "X-GitHub-Event: x"]
    async with running(limits=Limits(in_flight_bytes=60_000)) as world, AsyncExitStack() as stack:

        def held() -> int:
            return 60_000 - world.ingress._memory.free

        stalled = [await stack.enter_async_context(world.wire()) for _ in range(40)]
        for wire in stalled:
            wire.send(a_request("/in/github", *forged, length=15_000, body=b"x" * 14_000))
            await until(lambda: held() in (14_000, 28_000))
        good = a_request("/in/github", f"X-Hub-Signature-256: {github_signature(b'y' * 4_000)}", body=b"y" * 4_000)
        for _ in range(50):
            assert (await world.exchange(good)).status == 202
            assert (await world.exchange(signed("stripe"))).status == 202
        # Those that had to make room have their answer, and still hold nothing.
        answers = [await wire.reply() for wire in stalled[:38]]
        assert {answer.status for answer in answers} == {408}
        assert held() == 28_000
        for wire in stalled[38:]:
            wire.send(b"x" * 1_000)
            assert (await wire.reply()).status == 401
    assert world.count("rejected_total", source="github", reason="evicted") == 38


async def test_expect_100_continue_is_answered_or_refused_at_once(world: World) -> None:
    async with world.wire() as wire:
        wire.send(a_request("/in/open", "Expect: 100-continue", length=len(PING), body=b""))
        assert (await wire.reply()).status == 100
        wire.send(PING)
        assert (await wire.reply()).status == 202
    async with world.wire() as wire:
        wire.send(a_request("/in/open", "Expect: 100-continue", length=ROOM, body=b""))
        assert (await wire.reply()).status == 413
    assert [stored.value for stored in world.log.stored] == [PING]


async def test_pipelined_requests_are_answered_in_order(world: World) -> None:
    async with world.wire() as wire:
        wire.send(a_request() + a_request("/in/nobody") + a_request("/in/crm", CRM))
        assert [(await wire.reply()).status for _ in range(3)] == [202, 404, 202]


@pytest.mark.parametrize("protocol", ["h2c", "websocket", "tcp"])
@pytest.mark.parametrize("framing", ["length", "chunks"])
async def test_an_offer_to_upgrade_costs_no_byte_of_the_body(world: World, protocol: str, framing: str) -> None:
    offer = ["Connection: Upgrade, HTTP2-Settings", f"Upgrade: {protocol}", "HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABk"]
    data = (
        a_request("/in/open", *offer)
        if framing == "length"
        else a_request("/in/open", *offer, CHUNKED, body=chunked(PING))
    )
    assert (await world.exchange(data)).status == 202
    assert [stored.value for stored in world.log.stored] == [PING]


async def test_an_absolute_target_is_its_path(world: World) -> None:
    assert (await world.exchange(a_request("http://hooks.example/in/open?a=1"))).status == 202
    assert world.log.stored[0].event.query == "a=1"


async def test_a_stopping_ingress_responds_closes_and_takes_nothing_new(world: World) -> None:
    world.log.may_append.clear()
    async with world.wire() as under_way, world.wire() as idle, world.wire() as busy, world.wire() as asking:
        idle.send(a_request())
        busy.send(a_request())
        under_way.send(a_request())
        await until(lambda: world.log.waiting == 3)
        world.log.may_append.set()
        assert (await idle.reply()).status == (await busy.reply()).status == (await under_way.reply()).status == 202
        world.log.may_append.clear()
        under_way.send(a_request())
        await until(lambda: world.log.waiting == 1)
        stopping = asyncio.ensure_future(world.ingress.stop(timeout=5))
        await asyncio.sleep(0)
        with pytest.raises(ConnectionError):
            await asyncio.open_connection("127.0.0.1", world.port)
        asking.send(a_request("/healthz", method="GET", body=b""))
        answer = await asking.reply()
        assert (answer.status, answer.headers["retry-after"], answer.headers["connection"]) == (503, "5", "close")
        busy.send(a_request())
        await until(lambda: world.log.waiting == 2)
        world.log.may_append.set()
        for wire in (under_way, busy):
            answer = await wire.reply()
            assert (answer.status, answer.headers["connection"]) == (202, "close")
            assert await wire.is_closed()
        assert await idle.is_closed()
        await stopping
    assert len(world.log.stored) == 5


async def test_connections_that_come_together_leave_requests_their_turn(world: World) -> None:
    """The kernel has accepted all of them before the loop comes to any."""
    forged = a_request("/in/github", f"X-Hub-Signature-256: sha256={'0' * 64}", "X-GitHub-Event: ping")
    async with world.wire() as good:
        good.send(a_request("/in/crm", CRM))
        assert (await good.reply()).status == 202
        before = len(world.ingress._web.connections) if world.ingress._web else 0
        flood = [socket.create_connection(("127.0.0.1", world.port)) for _ in range(200)]
        try:
            for each in flood:
                each.sendall(forged)
            good.send(a_request("/in/crm", CRM))
            assert (await good.reply()).status == 202
            assert world.ingress._web is not None
            assert len(world.ingress._web.connections) - before < 40
            await until(lambda: world.count("rejected_total", source="github", reason="bad_signature") == 200)
        finally:
            for each in flood:
                each.close()


async def test_what_waits_to_be_accepted_at_a_stop_is_still_served(world: World) -> None:
    waiting = [socket.create_connection(("127.0.0.1", world.port)) for _ in range(20)]
    for each in waiting:
        each.sendall(a_request("/in/crm", CRM))
    stopping = asyncio.ensure_future(world.ingress.stop(timeout=5))
    await until(lambda: len(world.log.stored) == 20)
    await stopping
    for each in waiting:
        assert each.recv(1000).startswith(b"HTTP/1.1 202 ")
        each.close()


async def test_an_ingress_with_no_connection_ends_at_once(world: World) -> None:
    began = asyncio.get_running_loop().time()
    await world.ingress.stop(timeout=5)
    assert asyncio.get_running_loop().time() < began + KEEPALIVE_GRACE / 2


async def test_an_event_not_stored_in_time_on_a_stop_is_not_acknowledged(world: World) -> None:
    world.log.may_append.clear()
    async with world.wire() as wire:
        wire.send(a_request())
        await until(lambda: world.log.waiting == 1)
        await world.ingress.stop(timeout=0.05)
        assert await wire.is_closed()
    assert world.log.stored == []
    assert [(line["status"], line["reason"]) for line in world.lines] == [(503, "draining")]


@pytest.mark.parametrize(
    ("version", "header", "connection"),
    [
        ("1.1", "Connection: close", "close"),
        ("1.0", "Connection: close", "close"),
        ("1.0", "Connection: keep-alive", None),
    ],
)
async def test_a_connection_is_kept_as_the_sender_asks(
    world: World, version: str, header: str, connection: str | None
) -> None:
    async with world.wire() as wire:
        wire.send(a_request("/in/open", header).replace(b"HTTP/1.1", f"HTTP/{version}".encode()))
        reply = await wire.reply()
        assert (reply.status, reply.headers["connection"]) == (202, connection or "keep-alive")
        if connection == "close":
            assert await wire.is_closed()
        else:
            wire.send(a_request())
            assert (await wire.reply()).status == 202


async def test_a_refused_sender_that_keeps_sending_sees_the_answer(world: World) -> None:
    async with world.wire() as wire:
        wire.send(a_request(body=b"x" * 3_000_000))
        assert (await wire.reply()).status == 413
        wire.send(a_request())
        assert (await wire.reply()).status == 202


async def test_a_sender_that_reads_no_answers_gets_no_more_of_them(world: World) -> None:
    requests = 30_000  # more answers than the kernel's buffers take
    loop = asyncio.get_running_loop()
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.setblocking(False)  # noqa: FBT003 - the standard library's signature
        await loop.sock_connect(deaf, ("127.0.0.1", world.port))
        sending = asyncio.ensure_future(loop.sock_sendall(deaf, a_request() * requests))
        stored = -1
        while stored != len(world.log.stored):
            stored = len(world.log.stored)
            await asyncio.sleep(0.05)
        assert 0 < stored < requests
        sending.cancel()
        await asyncio.wait([sending])


async def test_health_is_for_load_balancers_and_not_logged(world: World) -> None:
    for method in ("GET", "HEAD"):
        assert (await world.exchange(a_request("/healthz", method=method, body=b""))).status == 200
    refused = await world.exchange(a_request("/healthz"))
    assert (refused.status, refused.headers["allow"]) == (405, "GET, HEAD")
    assert world.lines == []
    assert world.count("requests_total", source="", status="200") == 2


async def test_a_reload_takes_effect_with_the_next_request(world: World) -> None:
    assert (await world.exchange(a_request("/in/late"))).status == 404
    late = a_source("late", {"scheme": "none"}, type="headers['x-kind']")
    world.rules[0] = some_rules(late)
    assert (await world.exchange(a_request("/in/late", "X-Kind: late"))).status == 202
    assert world.log.stored[0].event.type == "late"


async def test_a_reload_of_many_sources_delays_no_request_by_those_of_the_others(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    make = SourceEndpoint.__init__

    def noted(endpoint: SourceEndpoint, source: Source, *given: Any, **named: Any) -> None:
        made.append(source.name)
        make(endpoint, source, *given, **named)

    monkeypatch.setattr(SourceEndpoint, "__init__", noted)
    for _ in range(2):
        world.rules[0] = some_rules()
        for _ in range(2):
            assert (await world.exchange(a_request())).status == 202
        assert (await world.exchange(a_request("/in/nobody"))).status == 404
    assert made == ["open", "open"]


async def test_each_request_is_one_line_and_is_counted(world: World) -> None:
    await world.exchange(a_request("/in/crm?secret=q", CRM))
    await world.exchange(a_request("/in/crm?secret=q"))
    accepted, refused = world.lines
    seconds = [line.pop("seconds") for line in world.lines]
    assert all(0 < each < 5 for each in seconds)
    assert accepted == {
        "event": "request_finished",
        "log_level": "info",
        "source": "crm",
        "status": 202,
        "bytes": len(PING),
        "event_id": event_id("crm", "e1"),
        "type": "ping",
    }
    assert refused == {
        "event": "request_finished",
        "log_level": "info",
        "source": "crm",
        "status": 401,
        "bytes": len(PING),
        "reason": "missing_credentials",
    }
    assert world.count("requests_total", source="crm", status="202") == 1
    assert world.count("requests_total", source="crm", status="401") == 1
    assert world.count("rejected_total", source="crm", reason="missing_credentials") == 1
    assert world.count("events_total", source="crm") == 1
    assert world.count("request_duration_seconds_count", source="crm") == 2
    assert world.count("append_duration_seconds_count") == 1


async def test_many_refusals_that_are_alike_are_logged_by_their_number(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.ingress.ingress.QUOTA_WINDOW", 0.5)
    async with world.wire() as wire:
        for number in range(60):
            wire.send(a_request(f"/wp-admin/{number}.php") + a_request("/in/crm") + a_request("/in/crm", CRM))
            for expected in (404, 401, 202):
                assert (await wire.reply()).status == expected
        await until(lambda: any(line["event"] == "lines_suppressed" for line in world.lines))
    statuses = Counter(line["status"] for line in world.lines if line["event"] == "request_finished")
    assert statuses[202] == 60  # nothing crowds these out
    await world.ingress.stop(timeout=0.1)
    left_out = Counter[int]()
    for line in world.lines:
        if line["event"] == "lines_suppressed":
            left_out[401 if line["source"] == "crm" else 404] += line["count"]
            assert (line["source"], line["reason"]) in {("", "unknown_source"), ("crm", "missing_credentials")}
    assert statuses + left_out == Counter({202: 60, 404: 60, 401: 60})
    assert statuses[404] < 60
    assert world.count("rejected_total", source="", reason="unknown_source") == 60


async def test_handshakes_that_anybody_may_send_are_logged_by_their_number(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.ingress.ingress.QUOTA_WINDOW", 60.0)
    for _ in range(30):
        assert (await world.exchange(a_request("/in/graph?validationToken=abc"))).status == 200
    await world.ingress.stop(timeout=0.1)
    finished = [line for line in world.lines if line["event"] == "request_finished"]
    assert [(line["source"], line["handshake"]) for line in finished] == [("graph", True)] * 10
    [suppressed] = [line for line in world.lines if line["event"] == "lines_suppressed"]
    assert (suppressed["source"], suppressed["reason"], suppressed["count"]) == ("graph", "handshake", 20)
    assert world.count("requests_total", source="graph", status="200") == 30


async def test_the_gateways_own_faults_are_logged_whatever_strangers_send_and_counted(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.ingress.ingress.QUOTA_WINDOW", 60.0)
    monkeypatch.setattr("gateway.telemetry.log_quota.IN_ALL", 15)
    for _ in range(30):
        assert (await world.exchange(a_request("/in/crm"))).status == 401
        assert (await world.exchange(a_request("/wp-login"))).status == 404
    world.lines.clear()
    world.log.failure = LogUnavailableError("no space left on device")
    for _ in range(30):
        assert (await world.exchange(a_request())).status == 503
    assert [(line["status"], line["reason"]) for line in world.lines] == [(503, "log_unavailable")] * 10
    await world.ingress.stop(timeout=0.1)
    left_out = {line["reason"]: line["count"] for line in world.lines if line["event"] == "lines_suppressed"}
    assert left_out == {"log_unavailable": 20, "missing_credentials": 22, "unknown_source": 23}
    assert world.count("rejected_total", source="open", reason="log_unavailable") == 30


async def test_requests_that_anybody_may_send_have_a_log_quota(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """No request of these was verified: a coding that we would lose, and bodies for which there is no room."""
    monkeypatch.setattr("gateway.ingress.ingress.QUOTA_WINDOW", 60.0)

    def grow(memory: BodyMemory, *_: object, **__: object) -> bool:
        memory.is_full_of_slow_bodies = True
        return False

    monkeypatch.setattr(BodyMemory, "grow", grow)
    coded = a_request("/in/crm", "Transfer-Encoding: gzip, chunked", body=chunked(b"{}"))
    forged = github(f"X-Hub-Signature-256: sha256={64 * '0'}")
    for _ in range(30):
        assert (await world.exchange(coded)).status == 501
        async with world.wire() as wire:
            wire.send(forged[:-1])
            assert (await wire.reply()).status == 503
    await world.ingress.stop(timeout=0.1)
    told = Counter(line["reason"] for line in world.lines if line["event"] == "request_finished")
    assert told == {"transfer_coding": 10, "slow_bodies": 10}
    left_out = {line["reason"]: line["count"] for line in world.lines if line["event"] == "lines_suppressed"}
    assert left_out == {"transfer_coding": 20, "slow_bodies": 20}


async def test_a_verified_sender_for_whom_there_is_no_room_is_logged(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.ingress.body_memory.BodyMemory.reserve", lambda *_, **__: False)
    for _ in range(30):
        assert (await world.exchange(a_request())).status == 503
    assert [(line["status"], line["reason"]) for line in world.lines] == [(503, "overloaded")] * 10
    assert not any("is_verified" in line for line in world.lines)


async def test_a_bug_is_a_500_with_its_trace_in_the_log(world: World) -> None:
    world.log.failure = ZeroDivisionError("a bug")
    reply = await world.exchange(a_request())
    assert reply.status == 500
    assert reply.headers["content-type"] == "application/problem+json"
    assert "a bug" not in reply.body.decode()
    finished, failed = world.lines
    assert (finished["event"], finished["status"]) == ("request_finished", 500)
    assert failed["event"] == "request_failed"
    assert failed["exception"].startswith("Traceback")
    assert failed["exception"].endswith("ZeroDivisionError")  # its text may be of a body
    assert world.count("requests_total", source="open", status="500") == 1


async def test_a_bug_that_anybody_may_repeat_has_few_traces_whatever_else_is_refused(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.ingress.ingress.QUOTA_WINDOW", 60.0)
    monkeypatch.setattr("gateway.telemetry.log_quota.IN_ALL", 20)
    for n in range(30):
        assert (await world.exchange(a_request("/in/crm"))).status == 401
        assert (await world.exchange(a_request(f"/wp-login/{n}"))).status == 404
    world.lines.clear()
    with monkeypatch.context() as patch:
        patch.setattr("gateway.ingress.ingress.check_head", lambda *_: 1 / 0)
        for _ in range(30):
            assert (await world.exchange(a_request("/in/crm"))).status == 500
    world.log.failure = ZeroDivisionError("a bug")
    assert (await world.exchange(a_request())).status == 500
    told = [(line["event"], line.get("source")) for line in world.lines]
    assert told == [("request_failed", None)] * 10 + [("request_finished", "open")]
    await world.ingress.stop(timeout=0.1)
    left_out = {line["reason"]: line["count"] for line in world.lines if line["event"] == "lines_suppressed"}
    assert (left_out["request_failed"], left_out["bug"]) == (21, 30)
    assert world.count("requests_total", source="crm", status="500") == 30


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not is_so():  # noqa: ASYNC110 - what it waits for is up to other tasks and the kernel
            await asyncio.sleep(0.001)


async def test_events_are_counted_by_the_secret_that_verified_them_for_operators_alone(world: World) -> None:
    ending = {"secret": "a secret that has ended", "until": "2001-01-01"}
    source = a_source("rotating", {"scheme": "token", "header": "X-Token", "secrets": ["new", "old", ending]})
    world.rules[:] = [some_rules(source)]
    replies = {
        token: await world.exchange(a_request("/in/rotating", f"X-Token: {token}"))
        for token in ("new", "old", "a secret that has ended", "unknown")
    }
    await world.exchange(a_request("/in/rotating", "X-Token: old"))
    counts = [world.count("secret_events_total", source="rotating", position=place) for place in ("1", "2", "3")]
    assert counts == [1, 2, 0]
    assert [world.ingress._metrics.secret_uses.of("rotating", place, RECEIVED) for place in (0, 1)] == [1, 2]
    assert world.count("secret_events_total", source="crm", position="1") == 0
    assert [reply.status for reply in replies.values()] == [202, 202, 401, 401]
    new, old, ended, unknown = [(reply.headers.keys(), _without_ids(reply)) for reply in replies.values()]
    assert new == old
    assert ended == unknown
    assert "secret" not in str(world.lines)


def _without_ids(reply: Reply) -> Any:
    return {name: value for name, value in reply.json.items() if name != "id"}


async def test_an_event_whose_body_comes_later_is_counted_by_its_secret(world: World) -> None:
    assert (await world.exchange(github(f"X-Hub-Signature-256: {github_signature()}"))).status == 202
    async with world.wire() as wire:
        head, _, body = github(f"X-Hub-Signature-256: {github_signature()}").partition(b"\r\n\r\n")
        wire.send(head + b"\r\n\r\n")
        await asyncio.sleep(0.05)
        wire.send(body)
        assert (await wire.reply()).status == 202
    counts = [world.count("secret_events_total", source="github", position=place) for place in ("1", "2")]
    assert counts == [0, 2]


@pytest.mark.parametrize(
    ("path", "body", "shown"),
    [
        ("body.kind", b'{"kind": "ping"}', HIDDEN),
        ("body.kind", b'{"kind": "other"}', "ping"),
        ("headers.x-github-event", b"{}", HIDDEN),
        ("body.kind", b"no json", HIDDEN),
    ],
)
async def test_a_line_has_the_type_that_people_may_see(world: World, path: str, body: bytes, shown: str) -> None:
    source = replace(world.rules[0].sources["github"], redaction=redaction_of([parse_redact_path(path)]))
    world.rules[0] = replace(world.rules[0], sources={"github": source})
    reply = await world.exchange(github(f"X-Hub-Signature-256: {github_signature(body)}", body=body))
    assert reply.status == 202
    [line] = [each for each in world.lines if each["event"] == "request_finished"]
    assert line["type"] == shown
    assert world.log.stored[0].event.type == "ping"
