"""What is kept of refused requests, over real connections: it costs their senders nothing, and strangers get little."""

import asyncio
import gc
import json
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from ipaddress import ip_network
from time import perf_counter
from typing import Any

import pytest

from gateway.ingress import quarantine
from gateway.ingress.server import Limits
from gateway.log.base import Position, Record, RecordHeaders
from gateway.model import LogUnavailableError
from gateway.quarantine.quota import FairBucket
from gateway.quarantine.records import Missing, RejectedRequest, decode
from gateway.verify.schemes import build_verifier
from tests.ingress.test_freed_requests import OF_A_REQUEST
from tests.ingress.test_ingress import (
    CHUNKED,
    CRM,
    NOW,
    PING,
    SECRET,
    World,
    a_request,
    a_source,
    chunked,
    github,
    github_signature,
    running,
    signed,
    until,
)
from tests.ingress.test_tls import Pki, connected, demand, pki, serving

__all__ = ["pki"]

NEW_TOKEN = "the-new-token-of-the-crm"
FORGED = github("X-Hub-Signature-256: sha256=" + "0" * 64)
GOOD = github(f"X-Hub-Signature-256: {github_signature()}")
WRONG_TOKEN = a_request("/in/crm", f"X-Token: {NEW_TOKEN}", "Cookie: session=1")


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with running() as world, keeping(world):
        yield world


class keeping:  # noqa: N801 - used as a context manager
    """Has a world keep what it refuses, of these sources, as a process does."""

    def __init__(self, world: World, *names: str) -> None:
        self._world = world
        self._names = names or ("github", "crm", "erp", "stripe")

    async def __aenter__(self) -> None:
        keep(self._world, *self._names)
        self._task = asyncio.create_task(self._world.ingress.quarantine.run(), name="quarantine")

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])


def keep(world: World, *names: str, **more: Any) -> None:
    rules = world.rules[0]
    sources = {name: replace(rules.sources[name], quarantine=True, **more) for name in names}
    world.rules[0] = replace(rules, sources={**rules.sources, **sources})


def kept(world: World) -> Sequence[RejectedRequest]:
    found = []
    for stored in world.log.stored:
        if stored.topic == "gateway.rejected":
            request = decode(Record(0, NOW, stored.key, stored.value, stored.headers))
            assert isinstance(request, RejectedRequest)
            assert stored.key == request.source.encode()
            found.append(request)
    return found


def outcomes(world: World, source: str = "github") -> dict[str, float]:
    counts = {
        outcome: world.count("quarantined_total", source=source, outcome=outcome)
        for outcome in ("kept", "too_large", "over_rate", "over_memory", "incomplete", "log_unavailable")
    }
    return {outcome: number for outcome, number in counts.items() if number}


async def test_a_request_with_a_bad_signature_is_kept_as_it_came(world: World) -> None:
    body = bytes(range(256))
    data = a_request("/in/github?a=1", "X-Hub-Signature-256: sha256=" + "0" * 64, "X-Twice: 1", "x-twice: 2", body=body)
    reply = await world.exchange(data)
    assert (reply.status, reply.json["detail"]) == (
        401,
        "the signature in the header X-Hub-Signature-256 doesn't match this request",
    )
    await until(lambda: bool(kept(world)))
    [request] = kept(world)
    assert request == RejectedRequest(
        source="github",
        reason="bad_signature",
        at=NOW,
        address="127.0.0.1",
        method="POST",
        path="/in/github",
        query="a=1",
        headers=(
            (b"Host", b"hooks.example"),
            (b"X-Hub-Signature-256", b"sha256=" + b"0" * 64),
            (b"X-Twice", b"1"),
            (b"x-twice", b"2"),
            (b"Content-Length", b"256"),
        ),
        body=body,
        size=256,
        salt=request.salt,
    )
    assert outcomes(world) == {"kept": 1}


async def test_what_was_demanded_of_the_clients_certificate_is_kept(pki: Pki) -> None:
    async with serving(pki, clock=lambda: NOW) as world, keeping(world, "github"):
        demand(world, "github", pki.bank, dns=frozenset({"pay.bank.example"}))
        client = pki.client(own=pki.own(pki.bank, "pay.bank.example"))
        async with connected(world, client) as wire:
            wire.send(FORGED)
            assert (await wire.reply()).status == 401
        await until(lambda: bool(kept(world)))
        demanded = world.rules[0].sources["github"].client_certificate
        assert demanded is not None
        assert [request.certificate for request in kept(world)] == [demanded.digest]


async def test_a_certificate_in_a_proxys_header_goes_no_further(world: World) -> None:
    keep(world, "github", proxy_headers=frozenset({b"x-client-cert"}))
    await world.exchange(github("X-Hub-Signature-256: sha256=" + "0" * 64, "X-Client-Cert: PEM", "X-A: 1"))
    await until(lambda: bool(kept(world)))
    [request] = kept(world)
    names = [name for name, _ in request.headers]
    assert b"X-A" in names
    assert b"X-Client-Cert" not in names


async def test_the_addresses_of_one_network_share(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quarantine, "BURST", 20.0)
    monkeypatch.setattr(quarantine, "REQUESTS_PER_SECOND", 0.0)
    world.rules[0] = replace(world.rules[0], trusted_proxies=(ip_network("127.0.0.0/8"),))
    for address in [*[f"2001:db8:0:{n:x}::1" for n in range(30)], "2001:db8:1::1"]:
        forged = github("X-Hub-Signature-256: sha256=" + "0" * 64, f"X-Forwarded-For: {address}")
        assert (await world.exchange(forged)).status == 401
    await until(lambda: sum(outcomes(world).values()) == 31)
    assert outcomes(world) == {"kept": 11, "over_rate": 20}
    assert kept(world)[-1].address == "2001:db8:1::1"


async def test_a_body_that_arrives_in_parts_is_kept_too(world: World) -> None:
    async with world.wire() as wire:
        data = FORGED
        wire.send(data[: -len(PING)])
        await asyncio.sleep(0.02)
        wire.send(data[-len(PING) :])
        assert (await wire.reply()).status == 401
    await until(lambda: bool(kept(world)))
    assert [request.body for request in kept(world)] == [PING]


@pytest.mark.parametrize(
    "data",
    [
        github(),
        github("X-Hub-Signature-256: "),
        signed("stripe", at=NOW - 301),
        a_request("/in/crm"),
        a_request("/in/github", method="GET", body=b""),
        a_request("/in/github", method="HEAD", body=b""),
        a_request("/in/github", method="OPTIONS", body=b""),
        a_request("/in/crm", CRM, body=b'{"id":'),
        GOOD,
    ],
    ids=["unsigned", "malformed", "stale", "no token", "GET", "HEAD", "OPTIONS", "verified, no event", "an event"],
)
async def test_what_no_other_secret_would_have_admitted_is_not_kept(world: World, data: bytes) -> None:
    await world.exchange(data)
    await asyncio.sleep(0.02)
    assert kept(world) == []
    assert outcomes(world) == outcomes(world, "crm") == outcomes(world, "stripe") == {}


async def test_sources_without_quarantine_keep_nothing() -> None:
    async with running() as world, keeping(world, "crm"):
        await world.exchange(FORGED)
        await asyncio.sleep(0.02)
        assert kept(world) == []


async def test_a_credential_that_was_refused_is_kept_as_a_digest(world: World) -> None:
    assert (await world.exchange(WRONG_TOKEN)).status == 401
    assert (await world.exchange(a_request(f"/in/erp?token={NEW_TOKEN}&a=1"))).status == 401
    await until(lambda: len(kept(world)) == 2)
    crm, erp = kept(world)
    assert [name for name, _ in crm.headers] == [b"Host", b"Content-Length"]
    assert [each.name for each in crm.credentials] == ["x-token"]
    assert erp.query == "a=1"
    assert [each.name for each in erp.credentials] == ["token"]
    everything = b"".join([repr(stored).encode() for stored in world.log.stored])
    assert NEW_TOKEN.encode() not in everything
    assert b"session" not in everything


async def test_a_short_credential_is_not_kept_at_all(world: World) -> None:
    await world.exchange(a_request("/in/crm", "X-Token: hunter2"))
    await until(lambda: bool(kept(world)))
    [request] = kept(world)
    assert (request.missing, request.credentials) == (Missing.CREDENTIAL, ())


async def test_a_secret_path_is_masked(world: World) -> None:
    keep(world, "github", path="/in/s3cret", masked_path="/in/***")
    await world.exchange(FORGED.replace(b"/in/github", b"/in/s3cret"))
    await until(lambda: bool(kept(world)))
    assert kept(world)[0].path == "/in/***"
    assert b"s3cret" not in b"".join([repr(stored).encode() for stored in world.log.stored])


async def test_the_address_is_the_client_s_behind_a_proxy_that_is_trusted(world: World) -> None:
    world.rules[0] = replace(world.rules[0], trusted_proxies=(ip_network("127.0.0.0/8"),))
    await world.exchange(FORGED.replace(b"\r\n\r\n", b"\r\nX-Forwarded-For: 203.0.113.7\r\n\r\n"))
    await until(lambda: bool(kept(world)))
    assert kept(world)[0].address == "203.0.113.7"


async def test_a_refusal_by_the_head_is_answered_before_the_body_is_there(world: World) -> None:
    async with world.wire() as wire:
        wire.send(WRONG_TOKEN[: -len(PING)])
        assert (await wire.reply()).status == 401
        assert kept(world) == []
        wire.send(WRONG_TOKEN[-len(PING) :] + a_request("/in/crm", CRM))  # the next one on the connection
        assert (await wire.reply()).status == 202
    await until(lambda: bool(kept(world)))
    assert [request.body for request in kept(world)] == [PING]


async def test_a_sender_that_goes_after_its_refusal_is_only_counted(world: World) -> None:
    async with world.wire() as wire:
        wire.send(WRONG_TOKEN[: -len(PING)])
        assert (await wire.reply()).status == 401
    await until(lambda: outcomes(world, "crm") == {"incomplete": 1})
    async with world.wire() as wire:
        wire.send(a_request("/in/crm", f"X-Token: {NEW_TOKEN}", "Expect: 100-continue", body=b"", length=5))
        assert (await wire.reply()).status == 401
    await until(lambda: outcomes(world, "crm") == {"incomplete": 2})
    assert kept(world) == []


async def test_bodies_that_never_come_are_not_waited_for(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quarantine, "READ_SECONDS", 0.1)
    async with world.wire() as wire:
        wire.send(a_request("/in/crm", f"X-Token: {NEW_TOKEN}", body=b"{", length=50))
        assert (await wire.reply()).status == 401
        await until(lambda: outcomes(world, "crm") == {"incomplete": 1})
    assert kept(world) == []


async def test_only_some_bodies_are_read_after_their_refusal(world: World) -> None:
    world.ingress.quarantine._reading = FairBucket(capacity=4, rate=0, now=0)
    async with AsyncExitStack() as stack:
        for _ in range(3):
            wire = await stack.enter_async_context(world.wire())
            wire.send(WRONG_TOKEN[: -len(PING)])
            assert (await wire.reply()).status == 401
        await until(lambda: outcomes(world, "crm") == {"over_memory": 1})


@pytest.mark.parametrize("headers", [(), (CHUNKED,)], ids=["length", "chunks"])
async def test_of_a_large_body_the_beginning_is_kept(
    world: World, headers: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quarantine, "MAX_BODY", 5000)
    body = b"x" * 6000
    sent = chunked(body) if headers else body
    assert (await world.exchange(github("X-Hub-Signature-256: sha256=" + "0" * 64, *headers, body=sent))).status == 401
    await until(lambda: bool(kept(world)))
    [request] = kept(world)
    assert (request.missing, request.size, request.body) == (Missing.BODY, 6000, b"x" * 4096)
    assert outcomes(world) == {"too_large": 1}
    # One that the head alone has refused isn't read for this.
    async with world.wire() as wire:
        wire.send(a_request("/in/crm", f"X-Token: {NEW_TOKEN}", body=b"", length=6000))
        assert (await wire.reply()).status == 401
        await until(lambda: outcomes(world, "crm") == {"too_large": 1})
    assert kept(world)[-1].size == 6000
    assert kept(world)[-1].body == b""


async def test_a_log_that_does_not_respond_delays_no_answer(world: World) -> None:
    world.log.may_append.clear()
    try:
        began = time.perf_counter()
        for _ in range(5):
            assert (await world.exchange(FORGED)).status == 401
        assert time.perf_counter() - began < 4
    finally:
        world.log.may_append.set()
    await until(lambda: outcomes(world) == {"kept": 5})


async def test_a_log_that_refuses_changes_no_answer_and_writes_one_line(world: World) -> None:
    world.log.failure = LogUnavailableError("no leader")
    for _ in range(5):
        assert (await world.exchange(FORGED)).status == 401
    await until(lambda: outcomes(world) == {"log_unavailable": 5})
    lines = [line for line in world.lines if line["event"] == "quarantine_failed"]
    assert [(line["source"], line["error"]) for line in lines] == [("github", "no leader")]
    world.log.failure = None
    await world.exchange(FORGED)
    await until(lambda: outcomes(world) == {"log_unavailable": 5, "kept": 1})


async def test_what_waits_for_the_log_is_bounded_and_shared_by_sources(world: World) -> None:
    keeper = world.ingress.quarantine
    keeper._memory = FairBucket(capacity=20 * 1500, rate=0, now=0)
    world.log.may_append.clear()
    for _ in range(50):
        assert (await world.exchange(FORGED)).status == 401
    assert (await world.exchange(WRONG_TOKEN)).status == 401
    await until(lambda: outcomes(world).get("over_memory", 0) > 30)
    world.log.may_append.set()
    await until(lambda: sum(outcomes(world).values()) == 50)
    await until(lambda: outcomes(world, "crm") == {"kept": 1})
    assert keeper._memory.has("github", 14_000, now=0), "all of it was given back"


async def test_a_flood_of_forgeries_takes_nothing_of_a_real_sender_s_share(world: World) -> None:
    """A vendor whose secret was rotated is refused beside a flood: each of its requests is kept."""
    world.rules[0] = replace(world.rules[0], trusted_proxies=(ip_network("127.0.0.0/8"),))
    keeper = world.ingress.quarantine

    async def send(address: str, number: int) -> None:
        body = b'{"n":%d}' % number
        headers = ("X-Hub-Signature-256: sha256=" + "0" * 64, f"X-Forwarded-For: {address}")
        assert (await world.exchange(github(*headers, body=body))).status == 401

    now = time.perf_counter()
    keeper._quotas["github"] = quarantine.Quotas(rate=1, burst=40, bytes_per_day=1e9, now=now)
    for number in range(200):
        await send("198.51.100.1", number)
        if number % 20 == 0:
            await send("203.0.113.7", 1000 + number)
            assert (await world.exchange(GOOD)).status == 202
    await until(lambda: len(kept(world)) == outcomes(world)["kept"])
    assert sum(outcomes(world).values()) == 210
    assert outcomes(world)["over_rate"] > 150
    real = [json.loads(request.body)["n"] for request in kept(world) if request.address == "203.0.113.7"]
    assert real == [1000 + number for number in range(0, 200, 20)]
    lines = [line for line in world.lines if line["event"] == "request_finished" and line["status"] == 401]
    assert len(lines) <= 20


@pytest.mark.parametrize("limit", [(10.0, 1e9), (1e9, 12_200.0)], ids=["requests", "bytes"])
async def test_all_sources_together_are_bounded(world: World, limit: tuple[float, float]) -> None:
    now = time.perf_counter()
    world.ingress.quarantine._all = quarantine.Quotas(rate=0, burst=limit[0], bytes_per_day=limit[1], now=now)
    for _ in range(10):
        await world.exchange(FORGED)
    assert (await world.exchange(WRONG_TOKEN)).status == 401
    await until(lambda: outcomes(world) == {"kept": 5, "over_rate": 5})
    await until(lambda: outcomes(world, "crm") == {"kept": 1})


async def test_a_reload_gives_no_source_new_tokens(world: World) -> None:
    keeper = world.ingress.quarantine
    keeper._quotas["github"] = quarantine.Quotas(rate=0, burst=2, bytes_per_day=1e9, now=time.perf_counter())
    for _ in range(2):
        await world.exchange(FORGED)
        keep(world, "github")
    await until(lambda: outcomes(world) == {"kept": 1, "over_rate": 1})


async def test_an_append_that_hangs_holds_up_none_that_come_after_it(world: World) -> None:
    """As where one partition of the topic has no leader."""
    append = world.log.append
    hanging = asyncio.Event()

    async def append_but_of_github(topic: str, *, key: bytes, value: bytes, headers: RecordHeaders) -> Position:
        if key == b"github":
            await hanging.wait()
        return await append(topic, key=key, value=value, headers=headers)

    world.log.append = append_but_of_github  # type: ignore[method-assign,assignment] # one partition of it hangs
    hung = quarantine.AT_ONCE + 8  # more than all appends that may be in flight
    for _ in range(hung):
        assert (await world.exchange(FORGED)).status == 401
    for _ in range(2 * quarantine.AT_ONCE):
        assert (await world.exchange(WRONG_TOKEN)).status == 401
    await until(lambda: outcomes(world, "crm") == {"kept": 2 * quarantine.AT_ONCE})
    assert outcomes(world) == {}
    hanging.set()
    await until(lambda: outcomes(world) == {"kept": hung})
    await world.ingress.quarantine.flush(1.0)


async def test_what_waited_too_long_to_be_read_is_not_stored(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.log.may_append.clear()
    for _ in range(quarantine.OF_ONE_SOURCE + 2):
        assert (await world.exchange(FORGED)).status == 401
    await until(lambda: world.log.waiting == quarantine.OF_ONE_SOURCE)
    began = perf_counter()
    monkeypatch.setattr(quarantine, "perf_counter", lambda: began + quarantine.MAX_WAIT + 5.0)
    world.log.may_append.set()
    await until(lambda: outcomes(world) == {"kept": quarantine.OF_ONE_SOURCE, "log_unavailable": 2})
    assert len(world.log.stored) == quarantine.OF_ONE_SOURCE


async def test_a_stop_stores_what_is_kept() -> None:
    async with running() as world, keeping(world):
        world.log.may_append.clear()
        assert (await world.exchange(FORGED)).status == 401
        stopping = asyncio.create_task(world.ingress.stop(timeout=2))
        await asyncio.sleep(0.05)
        world.log.may_append.set()
        await stopping
        assert len(kept(world)) == 1


async def test_a_stop_does_not_wait_for_a_log_that_hangs() -> None:
    async with running() as world, keeping(world):
        world.log.may_append.clear()
        assert (await world.exchange(FORGED)).status == 401
        began = time.perf_counter()
        await world.ingress.stop(timeout=0.2)
        assert time.perf_counter() - began < 4
        world.log.may_append.set()


async def test_several_refused_requests_on_one_connection_are_all_kept(world: World) -> None:
    async with world.wire() as wire:
        wire.send(FORGED + WRONG_TOKEN + GOOD + FORGED)
        assert [(await wire.reply()).status for _ in range(4)] == [401, 401, 202, 401]
    await until(lambda: len(kept(world)) == 3)
    assert [request.source for request in kept(world)] == ["github", "crm", "github"]


async def test_a_batch_that_is_refused_is_kept_as_one_request() -> None:
    source = replace(a_source("many", {"scheme": "github", "secrets": [SECRET]}), split=())
    async with running() as world:
        world.rules[0] = replace(world.rules[0], sources={**world.rules[0].sources, "many": source})
        async with keeping(world, "many"):
            data = a_request("/in/many", "X-Hub-Signature-256: sha256=" + "0" * 64, body=b"[1,2]")
            assert (await world.exchange(data)).status == 401
            await until(lambda: bool(kept(world)))
            assert [request.body for request in kept(world)] == [b"[1,2]"]


async def test_a_token_that_covers_the_body_is_kept_whole() -> None:
    scheme = {"scheme": "jwt", "algorithms": ["HS256"], "claims": {"sha": "{body:sha256}"}}
    secret = "a secret that is long enough for HS256"
    source = a_source("jwt", {**scheme, "secrets": [secret]})
    async with running(limits=Limits()) as world:
        world.rules[0] = replace(world.rules[0], sources={**world.rules[0].sources, "jwt": source})
        async with keeping(world, "jwt"):
            other = build_verifier({**scheme, "secrets": [secret[::-1]]})
            [(name, token)] = other.sign(PING, now=NOW, id="e1", type="", headers={})
            assert (await world.exchange(a_request("/in/jwt", f"{name}: {token}"))).status == 401
            await until(lambda: bool(kept(world)))
            assert (b"Authorization", token.encode()) in kept(world)[0].headers


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("data", [FORGED, WRONG_TOKEN], ids=["forged", "a wrong token"])
@pytest.mark.parametrize("is_in_parts", [False, True])
async def test_nothing_of_a_request_that_is_kept_outlives_it(*, data: bytes, is_in_parts: bool) -> None:
    async with running() as world, keeping(world):
        async with world.wire() as wire:
            wire.send(data[: -len(PING)])
            if is_in_parts:
                await asyncio.sleep(0.02)
            wire.send(data[-len(PING) :])
            assert (await wire.reply()).status == 401
            await until(lambda: len(world.log.stored) == 1)
        server = world.ingress._web
        assert server is not None
        await until(lambda: not server.connections)
        world.log.stored.clear()
        await asyncio.sleep(0.01)
        assert not [each for each in gc.get_objects() if isinstance(each, (*OF_A_REQUEST, RejectedRequest))]
