"""What is seen of an attempt: how long its parts took, and the response."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from itertools import count
from pathlib import Path

import pytest

from gateway.client.client import Client
from gateway.client.egress import EgressGuard
from gateway.client.http1 import ResponseReader
from gateway.client.observation import Observation
from gateway.client.request import Outbound
from gateway.client.resolver import Resolver
from gateway.model import Attempt, AttemptPhases, Result
from gateway.rules.destination_credentials import tls_of
from gateway.rules.rules import DestinationAccess, Egress, OAuth2, Proxy
from tests.certificates import Authority
from tests.proxy import HttpProxy
from tests.sink import Answer, Fault, Sink

OPEN = EgressGuard(Egress())


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    resolver = Resolver(lambda _: ("127.0.0.1",))
    async with Client(OPEN, resolver=resolver, tls=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)) as client:
        yield client


async def observed(
    client: Client, url: str, *, access: DestinationAccess | None = None, timeout: float = 5.0
) -> tuple[Attempt, Observation]:
    seen = Observation(asyncio.get_running_loop().time)
    outbound = Outbound(url=url, headers=(), body=b"{}", access=access, observation=seen)
    return await client.attempt(outbound, timeout=timeout, number=1), seen


def known(phases: AttemptPhases) -> list[str]:
    """Return which parts there were, each of which took a moment."""
    assert all(seconds is None or 0 <= seconds < 5 for seconds in phases)
    return [name for name, seconds in phases._asdict().items() if seconds is not None]


async def test_a_new_connection_is_dialled_and_one_that_is_open_is_not(client: Client) -> None:
    async with Sink() as sink:
        _, first = await observed(client, sink.url)
        _, second = await observed(client, sink.url)
    assert known(first.phases) == ["connect", "first_byte"]
    assert known(second.phases) == ["first_byte"]


async def test_a_name_is_resolved(client: Client) -> None:
    async with Sink() as sink:
        _, seen = await observed(client, f"http://ci.test:{sink.port}/")
    assert known(seen.phases) == ["dns", "connect", "first_byte"]


async def test_a_destination_with_tls_has_a_handshake(client: Client, tmp_path: Path) -> None:
    authority = Authority("Ours")
    access = DestinationAccess(tls=tls_of(ca=authority.pem, certificate=None, key=None))
    async with Sink(tls=authority.server(tmp_path, "ci.test")) as sink:
        attempt, seen = await observed(client, f"https://ci.test:{sink.port}/", access=access)
    assert attempt.result is Result.SUCCESS
    assert known(seen.phases) == ["dns", "connect", "tls", "first_byte"]


async def test_the_wait_for_the_first_byte_is_that_of_the_destination(client: Client) -> None:
    async with Sink(Answer(delay=0.2)) as sink:
        attempt, seen = await observed(client, sink.url)
    assert seen.phases.first_byte == pytest.approx(0.2, abs=0.15)
    assert attempt.seconds >= (seen.phases.first_byte or 0.0)


async def test_of_a_stale_connection_nothing_is_left(client: Client) -> None:
    async with Sink() as sink:
        await observed(client, sink.url)
        sink.answer(Fault.CLOSE, 200)
        attempt, seen = await observed(client, sink.url)
    assert attempt.result is Result.SUCCESS
    assert known(seen.phases) == ["connect", "first_byte"]


@pytest.mark.parametrize("fault", [Fault.HANG, Fault.GARBAGE, Fault.RESET, Fault.DRIP_HEAD])
async def test_without_a_response_there_is_none(client: Client, fault: Fault) -> None:
    async with Sink(fault) as sink:
        attempt, seen = await observed(client, sink.url, timeout=0.3)
    assert attempt.status is None
    assert seen.response is None
    assert known(seen.phases) == ["connect"]


async def test_of_what_never_connected_nothing_is_known(client: Client) -> None:
    async with Sink() as sink:
        await sink.refuse()
        attempt, seen = await observed(client, sink.url)
    assert (attempt.result, known(seen.phases)) == (Result.CONNECT, [])


async def test_an_attempt_that_is_cut_short_shows_how_far_it_came(client: Client) -> None:
    seen = Observation(asyncio.get_running_loop().time)
    async with Sink(Fault.HANG) as sink:
        outbound = Outbound(url=sink.url, headers=(), body=b"{}", observation=seen)
        attempt = asyncio.create_task(client.attempt(outbound, timeout=5, number=1))
        await sink.received(1)
        attempt.cancel()
        await asyncio.wait({attempt})
    assert known(seen.phases) == ["connect"]


async def test_a_response_that_is_no_success_is_there_with_its_body(client: Client) -> None:
    async with Sink(Answer(status=404, body=b"no such hook", headers=(("X-Why", "gone"),)), 200) as sink:
        _, failed = await observed(client, sink.url)
        _, succeeded = await observed(client, sink.url)
    assert failed.response is not None
    assert (failed.response.status, failed.response.body) == (404, b"no such hook")
    assert b"X-Why: gone\r" in failed.response.header_lines
    assert succeeded.response is not None
    assert succeeded.response.kept is None


async def test_a_body_that_never_ends_is_there_as_far_as_it_was_read(client: Client) -> None:
    async with Sink(Answer(raw=b"HTTP/1.1 500 X\r\nContent-Length: 99\r\n\r\nhalf")) as sink:
        attempt, seen = await observed(client, sink.url, timeout=3)
    assert attempt.status == 500
    assert seen.response is not None
    assert seen.response.body is None
    assert bytes(seen.response.kept or b"") == b"half"


async def test_of_a_renewed_token_both_are_known_and_the_second_response(client: Client) -> None:
    tokens = count(1)

    def token(_: object) -> Answer:
        return Answer(body=b'{"access_token": "t%d", "expires_in": 3600}' % next(tokens))

    async with Sink(token) as endpoint, Sink(401, 503) as sink:
        oauth2 = OAuth2(token_url=endpoint.url, client_id="gateway", client_secret="s3cret")
        attempt, seen = await observed(client, sink.url, access=DestinationAccess(oauth2=oauth2))
    assert attempt.status == 503
    assert seen.authorizations == (b"Bearer t1", b"Bearer t2")
    assert seen.response is not None
    assert seen.response.status == 503
    assert known(seen.phases) == ["first_byte"]  # the second one went through the first one's connection


async def test_what_a_token_endpoint_responds_is_not_seen(client: Client) -> None:
    async with Sink(Answer(status=400, body=b'{"error": "invalid_client"}')) as endpoint, Sink() as sink:
        oauth2 = OAuth2(token_url=endpoint.url, client_id="gateway", client_secret="s3cret")
        attempt, seen = await observed(client, sink.url, access=DestinationAccess(oauth2=oauth2))
    assert attempt.result is Result.AUTH
    assert seen.response is None
    assert known(seen.phases) == []


async def test_a_proxys_tunnel_is_part_of_connecting(client: Client, tmp_path: Path) -> None:
    authority = Authority("Ours")
    names = {"ci.test": "127.0.0.1"}
    async with Sink(tls=authority.server(tmp_path, "ci.test")) as sink, HttpProxy(names=names) as proxy:
        access = DestinationAccess(
            tls=tls_of(ca=authority.pem, certificate=None, key=None), proxy=Proxy(host="127.0.0.1", port=proxy.port)
        )
        attempt, seen = await observed(client, f"https://ci.test:{sink.port}/", access=access)
    assert attempt.result is Result.SUCCESS
    assert known(seen.phases) == ["connect", "tls", "first_byte"]


def test_laps_follow_one_another() -> None:
    times = iter([10.0, 11.0, 13.0, 16.0, 20.0])
    seen = Observation(lambda: next(times))
    seen.on_dial()
    seen.on_resolved()
    seen.on_connected()
    seen.on_secured()
    seen.on_send()
    response = ResponseReader()
    response.started_at = 25.0
    seen.on_response(response)
    assert seen.phases == AttemptPhases(1.0, 2.0, 3.0, 5.0)
