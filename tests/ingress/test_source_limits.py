"""What a source demands beside a signature, over real connections: addresses, a secret path, and its limits."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from ipaddress import ip_network
from typing import TYPE_CHECKING, Any, cast

import pytest
from typing_extensions import override

from gateway.ingress.ingress import Ingress
from gateway.ingress.server import Limits
from gateway.model import LogUnavailableError, RecordTooLargeError
from gateway.rules.rules import AfterDelivery, SourceLimits, StoredResponse
from gateway.verify.check import BodyCheck
from gateway.verify.credentials import Unverified
from gateway.verify.handshakes import Handshake, HandshakeResponse
from gateway.verify.request import Request
from tests.ingress.test_ingress import (
    CHUNKED,
    CRM,
    PING,
    ROOM,
    Wire,
    World,
    a_request,
    chunked,
    github,
    github_signature,
    running,
    until,
)

if TYPE_CHECKING:
    from gateway.ingress.destination_responses import DestinationResponses

ELSEWHERE, HERE = ip_network("192.0.2.0/24"), ip_network("127.0.0.0/8")
GOOD = github(f"X-Hub-Signature-256: {github_signature()}")
FORGED = github("X-Hub-Signature-256: sha256=" + "0" * 64)
HALF = FORGED.replace(f"Content-Length: {len(PING)}".encode(), b"Content-Length: 900")


GREETING = Handshake(respond=lambda _request, _keys: HandshakeResponse(body=b"hello"))
"""A handshake that any request is."""


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with running() as world:
        yield world


class Untouchable(Unverified):
    """A check that fails the test if anything asks it."""

    @override
    def check_head(self, head: Request, now: float) -> BodyCheck:
        raise AssertionError("expected nothing to be verified")


def use(world: World, name: str, *, trusted: Sequence[str] = (), is_untouchable: bool = False, **fields: Any) -> None:
    """Activate rules in which a source has other fields."""
    rules = world.rules[0]
    source = replace(rules.sources[name], **fields)
    if is_untouchable:
        source = replace(source, verifier=replace(source.verifier, checks=(Untouchable(),)))
    proxies = tuple(map(ip_network, trusted))
    world.rules[0] = replace(rules, sources={**rules.sources, name: source}, trusted_proxies=proxies)


def limits(**fields: Any) -> SourceLimits:
    return SourceLimits(**fields)


async def status_of(world: World, data: bytes) -> int:
    return (await world.exchange(data)).status


def progress(ingress: Ingress, source: str = "github") -> int:
    return ingress._admissions[source].in_progress


# --- Addresses ---


@pytest.mark.parametrize("method", ["POST", "GET", "PUT"])
async def test_a_request_from_elsewhere_is_refused_before_anything_of_it_is_looked_at(
    world: World, method: str
) -> None:
    use(world, "github", allow_from=(ELSEWHERE,), is_untouchable=True)
    async with world.wire() as wire:
        wire.send(a_request("/in/github", "Expect: 100-continue", method=method, length=5_000, body=b""))
        reply = await wire.reply()  # not 100: nobody has asked for the body
    assert reply.status == 403
    assert reply.json["detail"] == "expected a request from an address that this source allows"
    assert world.ingress._memory.free == Limits().in_flight_bytes
    assert await status_of(world, GOOD) == 403
    assert world.count("rejected_total", source="github", reason="address_refused") == 2
    assert world.log.stored == []
    for line in world.lines:
        assert (line["reason"], line["address"], "bytes" in line) == ("address_refused", "127.0.0.1", False)
    assert await status_of(world, a_request("/in/crm", CRM)) == 202, "other sources take it"


async def test_whose_request_it_is_counts_before_its_size_its_method_and_its_coding(world: World) -> None:
    """So that whoever may not send learns nothing else; and of whoever may, the size counts before the signature."""
    use(world, "github", allow_from=(ELSEWHERE,))
    use(world, "crm", is_untouchable=True)
    assert Limits().head_bytes == 32 * 1024
    large = ["X-A: " + "a" * 8_000] * 5
    for target, expected in (("/in/github", [403] * 4), ("/in/crm", [431, 405, 501, 431])):
        found = [
            await status_of(world, request)
            for request in (
                a_request(target, *large),
                a_request(target, method="PUT"),
                a_request(target, "Transfer-Encoding: gzip, chunked", body=chunked(PING)),
                a_request(target, CRM, *large),
            )
        ]
        assert found == expected


async def test_an_unverified_handshake_from_elsewhere_is_refused(world: World) -> None:
    use(world, "graph", allow_from=(ELSEWHERE,))
    use(world, "cloud", allow_from=(ELSEWHERE,))
    assert await status_of(world, a_request("/in/graph?validationToken=a", body=b"")) == 403
    asked = a_request("/in/cloud", "WebHook-Request-Origin: b.example", method="OPTIONS", body=b"")
    assert await status_of(world, asked) == 403


@pytest.mark.parametrize(
    ("trusted", "headers", "status"),
    [
        # Nobody vouches for the header.
        ([], ["X-Forwarded-For: 192.0.2.7"], 403),
        (["10.0.0.0/8"], ["X-Forwarded-For: 192.0.2.7"], 403),
        # A trusted proxy does.
        (["127.0.0.1"], ["X-Forwarded-For: 192.0.2.7"], 202),
        (["127.0.0.0/8"], ["x-forwarded-for: 192.0.2.7, 127.0.0.9"], 202),
        (["127.0.0.1"], ["X-Forwarded-For: 198.51.100.1", "X-FORWARDED-FOR: ::ffff:192.0.2.7"], 202),
        (["127.0.0.1"], ["X-Forwarded-For: 192.0.2.7, 198.51.100.1"], 403),
        (["127.0.0.1"], ["X-Forwarded-For: 192.0.2.7", "X-Forwarded-For: 198.51.100.1"], 403),
        (["127.0.0.1"], ["X-Forwarded-For: 192.0.2.7,"], 403),
        (["127.0.0.1"], ["X-Forwarded-For: 192.0.2.7, unknown"], 403),
        # What nobody reads.
        (["127.0.0.1"], ["Forwarded: for=192.0.2.7"], 403),
        (["127.0.0.1"], ["X-Real-IP: 192.0.2.7", "X_Forwarded_For: 192.0.2.7"], 403),
    ],
)
async def test_a_header_counts_from_a_trusted_proxy_alone(
    world: World, trusted: list[str], headers: list[str], status: int
) -> None:
    use(world, "github", allow_from=(ELSEWHERE,), trusted=trusted)
    signed = github(f"X-Hub-Signature-256: {github_signature()}", *headers)
    assert await status_of(world, signed) == status


async def test_an_address_that_cannot_be_told_is_in_no_line(world: World) -> None:
    use(world, "github", allow_from=(HERE,), trusted=["127.0.0.1"])
    assert await status_of(world, github("X-Forwarded-For: in the header")) == 403
    assert ("address" in world.lines[0], "in the header" in str(world.lines)) == (False, False)
    assert await status_of(world, GOOD) == 202, "without the header the proxy itself is the client"


# --- A secret path ---


class Compared(str):
    """A path that counts how often it is compared with another."""

    __slots__ = ()
    times = 0

    @override
    def __eq__(self, other: object) -> bool:
        Compared.times += 1
        return super().__eq__(other)

    __hash__ = str.__hash__


async def test_a_path_is_found_as_a_whole_or_not_at_all(world: World) -> None:
    """No comparison is begun with a path that isn't the same, so that none takes longer the more of it is right."""
    secret, Compared.times = "/in/crm/0123456789abcdef", 0
    use(world, "crm", path=Compared(secret))
    for length in range(1, len(secret)):
        for wrong in (secret[:length], secret[:length] + "x" * (len(secret) - length), secret + "x" * length):
            assert await status_of(world, a_request(wrong, CRM)) == 404
    assert Compared.times == 0
    assert await status_of(world, a_request(secret, CRM)) == 202
    assert Compared.times > 0
    assert "0123456789abcdef" not in str(world.lines)


# --- Limits ---


async def test_a_body_beyond_its_sources_limit_is_refused_as_soon_as_that_is_known(world: World) -> None:
    use(world, "crm", limits=limits(body=100))
    async with world.wire() as wire:
        wire.send(a_request("/in/crm", CRM, "Expect: 100-continue", length=101, body=b""))
        assert (await wire.reply()).status == 413
    async with world.wire() as wire:
        wire.send(a_request("/in/crm", CRM, CHUNKED, body=b"%x\r\n" % 10_000 + b"x" * 101))
        assert (await wire.reply()).status == 413, "while it is read"
    assert await status_of(world, a_request("/in/crm", CRM, body=b"x" * 101)) == 413
    assert world.count("rejected_total", source="crm", reason="body_too_large") == 3
    assert await status_of(world, a_request("/in/crm", CRM, body=PING.ljust(100))) == 202
    assert await status_of(world, a_request("/in/crm", CRM, CHUNKED, body=chunked(PING.ljust(100)))) == 202
    assert await status_of(world, a_request("/in/open", body=b"x" * 101)) == 202
    assert world.ingress._memory.free == Limits().in_flight_bytes


async def test_a_sources_limit_is_no_more_than_the_logs(world: World) -> None:
    use(world, "open", limits=limits(body=10 * ROOM))
    assert await status_of(world, a_request(body=b"x" * (ROOM + 1))) == 413


async def test_beyond_its_rate_a_source_is_told_when_to_come_again(world: World) -> None:
    use(world, "github", limits=limits(rate=1 / 3600))
    assert await status_of(world, GOOD) == 202
    reply = await world.exchange(GOOD)
    assert (reply.status, reply.headers["retry-after"]) == (429, "3600")
    async with world.wire() as wire:
        wire.send(a_request("/in/crm", CRM))
        assert (await wire.reply()).status == 202, "others have their own"
        head = GOOD.partition(b"\r\n\r\n")[0] + b"\r\nExpect: 100-continue\r\n\r\n"
        wire.send(head)
        assert (await wire.reply()).status == 429, "no body is read for nothing"
    assert world.count("requests_total", source="github", status="429") == 2
    assert world.count("rejected_total", source="github", reason="rate_limited") == 2
    assert len(world.log.stored) == 2


async def test_of_several_ingresses_each_takes_its_part_of_a_rate(world: World) -> None:
    use(world, "github", limits=limits(rate=1 / 3600))
    assert await status_of(world, GOOD) == 202
    world.ingress.share_rates(3)
    assert (await world.exchange(GOOD)).headers["retry-after"] == "10800", "at once"
    use(world, "github", limits=limits(rate=1 / 1800))
    assert (await world.exchange(GOOD)).headers["retry-after"] == "5400", "and after a reload"
    world.ingress.share_rates(1)
    assert (await world.exchange(GOOD)).headers["retry-after"] == "1800"


async def test_unverified_requests_take_neither_tokens_nor_places() -> None:
    """One token an hour and one place: forged requests, whole and half, leave both to the real sender."""
    async with running() as world, AsyncExitStack() as stack:
        use(world, "github", limits=limits(rate=1 / 3600, concurrent=1))
        for _ in range(20):
            assert await status_of(world, FORGED) == 401
        halves: list[Wire] = [await stack.enter_async_context(world.wire()) for _ in range(10)]
        for wire in halves:
            wire.send(HALF)
        await until(lambda: world.ingress._memory.free <= Limits().in_flight_bytes - 10 * len(PING))
        assert progress(world.ingress) == 0
        assert await status_of(world, GOOD) == 202
        assert world.count("requests_total", source="github", status="401") == 20


async def test_beyond_its_requests_in_progress_a_source_waits_and_no_other(world: World) -> None:
    use(world, "github", limits=limits(concurrent=2))
    world.log.may_append.clear()
    async with world.wire() as first, world.wire() as second, world.wire() as other:
        first.send(GOOD)
        second.send(GOOD)
        await until(lambda: world.log.waiting == 2)
        reply = await world.exchange(GOOD)
        assert (reply.status, reply.headers["retry-after"]) == (503, "5")
        assert await status_of(world, FORGED) == 401
        other.send(a_request("/in/crm", CRM))
        await until(lambda: world.log.waiting == 3)
        world.log.may_append.set()
        assert [(await wire.reply()).status for wire in (first, second, other)] == [202, 202, 202]
    assert await status_of(world, GOOD) == 202
    assert world.count("rejected_total", source="github", reason="concurrency_limited") == 1


class HeldResponses:
    """A destination that responds once it may."""

    def __init__(self) -> None:
        self.may_respond = asyncio.Event()
        self.waiting = 0

    def expect(self, *_: object, **__: object) -> "HeldResponses":
        self.waiting += 1
        return self

    async def response(self, _: float) -> tuple[None, str]:
        await self.may_respond.wait()
        return None, "timeout"

    def leave(self) -> None:
        self.may_respond.set()

    def stop(self) -> None: ...

    def close(self) -> None: ...


async def test_a_request_that_waits_for_its_destination_is_in_progress(world: World) -> None:
    responses = HeldResponses()
    world.ingress._writer._responses = cast("DestinationResponses", responses)
    response = StoredResponse(after_delivery=AfterDelivery(destination="chat", timeout=5.0))
    use(world, "github", limits=limits(concurrent=1), response=response)
    async with world.wire() as first:
        first.send(GOOD)
        await until(lambda: responses.waiting == 1)
        assert await status_of(world, GOOD) == 503
        assert world.ingress._memory.free == Limits().in_flight_bytes, "its event is stored"
        responses.may_respond.set()
        assert (await first.reply()).status == 202
    assert await status_of(world, GOOD) == 202
    assert progress(world.ingress) == 0


async def test_a_sender_that_is_gone_gives_its_place_back_before_its_destination_responds(world: World) -> None:
    responses = HeldResponses()
    world.ingress._writer._responses = cast("DestinationResponses", responses)
    response = StoredResponse(after_delivery=AfterDelivery(destination="chat", timeout=5.0))
    use(world, "github", limits=limits(concurrent=1), response=response)
    async with world.wire() as first:
        first.send(GOOD)
        await until(lambda: responses.waiting == 1)
        assert progress(world.ingress) == 1
        first.close()
        await until(lambda: progress(world.ingress) == 0)


async def test_requests_that_were_let_through_to_their_bodies_share_what_is_left(world: World) -> None:
    use(world, "github", limits=limits(rate=1 / 3600))
    head, _, body = GOOD.partition(b"\r\n\r\n")
    async with world.wire() as first, world.wire() as second:
        for wire in (first, second):
            wire.send(head + b"\r\n\r\n" + body[:3])
        await until(lambda: world.ingress._memory.free == Limits().in_flight_bytes - 6)
        for wire in (first, second):
            wire.send(body[3:])
        assert sorted([(await wire.reply()).status for wire in (first, second)]) == [202, 429]


@pytest.mark.parametrize(
    "case", ["stored", "the log is unavailable", "the record is too large", "a bug", "no room", "a handshake", "no id"]
)
async def test_a_place_is_given_back_however_a_request_ends(world: World, case: str) -> None:
    failures = {
        "the log is unavailable": (LogUnavailableError("no quorum"), 503),
        "the record is too large": (RecordTooLargeError("1 MiB"), 413),
        "a bug": (ZeroDivisionError(), 500),
    }
    name, request, status = "github", GOOD, 202
    if case in failures:
        world.log.failure, status = failures[case]
    elif case == "no room":
        world.ingress._memory._total, status = 10, 503
    elif case == "a handshake":
        name, status = "hooked", 200
        source = replace(world.rules[0].sources["crm"], name=name, path="/in/hooked")
        source = replace(source, verifier=replace(source.verifier, respond_to_handshake=GREETING))
        world.rules[0] = replace(world.rules[0], sources={**world.rules[0].sources, name: source})
        request = a_request("/in/hooked", CRM)
    elif case == "no id":
        name, request, status = "crm", a_request("/in/crm", CRM, body=b"no JSON"), 400
    use(world, name, limits=limits(concurrent=1))
    for _ in range(3):
        assert await status_of(world, request) == status
        assert progress(world.ingress, name) == 0


async def test_a_reload_gives_no_token_back(world: World) -> None:
    use(world, "github", limits=limits(rate=1 / 3600, concurrent=1))
    assert await status_of(world, GOOD) == 202
    use(world, "github", limits=limits(rate=1 / 3600, concurrent=1, body=9_000))
    assert await status_of(world, GOOD) == 429
    use(world, "github", limits=limits())
    assert await status_of(world, GOOD) == 202


async def test_a_source_that_moves_under_a_request_takes_its_places_along(world: World) -> None:
    use(world, "github", limits=limits(concurrent=1))
    world.log.may_append.clear()
    async with world.wire() as wire:
        wire.send(GOOD)
        await until(lambda: world.log.waiting == 1)
        use(world, "github", limits=limits(concurrent=1), path="/in/moved")
        assert await status_of(world, GOOD.replace(b"/in/github", b"/in/moved")) == 503
        world.log.may_append.set()
        assert (await wire.reply()).status == 202
    assert progress(world.ingress) == 0
