"""Access tokens: fetched when needed, shared, renewed on a 401, and what a token endpoint may do instead."""

import asyncio
import itertools
import json
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from ipaddress import ip_network
from pathlib import Path
from urllib.parse import parse_qsl

import pytest

from gateway.client import oauth as module
from gateway.client.client import Client
from gateway.client.egress import EgressGuard
from gateway.client.http1 import ResponseReader
from gateway.client.oauth import NoTokenError, Token, Tokens
from gateway.client.request import Outbound
from gateway.model import Attempt, Result
from gateway.rules.destination_credentials import tls_of
from gateway.rules.rules import Destination, DestinationAccess, Egress, OAuth2, Proxy, TokenEndpointAuthMethod
from tests.certificates import Authority
from tests.proxy import HttpProxy
from tests.sink import Answer, Fault, Request, Script, Sink

OPEN = EgressGuard(Egress())


@pytest.fixture
async def client() -> AsyncIterator[Client]:
    async with Client(OPEN, tls=ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)) as client:  # reading the system's is slow
        yield client


def token(value: str = "t1", **fields: object) -> Answer:
    return Answer(
        body=json.dumps({"access_token": value, "token_type": "Bearer", "expires_in": 3600} | fields).encode()
    )


def counted() -> Callable[[Request], Answer]:
    """Give out t1, then t2, and so on."""
    count = 0

    def answer(_: Request) -> Answer:
        nonlocal count
        count += 1
        return token(f"t{count}")

    return answer


def wanting(*good: str) -> Callable[[Request], int]:
    return lambda request: 200 if request.header("authorization") in {f"Bearer {each}" for each in good} else 401


def credentials(url: str, **fields: object) -> DestinationAccess:
    oauth2 = OAuth2(token_url=url, client_id="gateway", client_secret="s3cret")
    return DestinationAccess(oauth2=replace(oauth2, **fields))  # type: ignore[arg-type] # whatever a test is about


async def attempt(client: Client, sink: Sink, access: DestinationAccess, *, timeout: float = 5.0) -> Attempt:
    outbound = Outbound(url=sink.url, headers=((b"X-A", b"1"),), body=b"{}", access=access)
    return await client.attempt(outbound, timeout=timeout, number=1)


def sent(sink: Sink) -> list[str | None]:
    return [request.header("authorization") for request in sink.requests]


# The usual.


async def test_a_token_is_fetched_once_and_sent_each_time(client: Client) -> None:
    async with Sink(counted()) as endpoint, Sink(wanting("t1")) as sink:
        access = credentials(endpoint.url)
        done = [await attempt(client, sink, access) for _ in range(3)]
    assert [one.result for one in done] == [Result.SUCCESS] * 3
    assert sent(sink) == ["Bearer t1"] * 3
    assert len(endpoint.requests) == 1
    assert sink.requests[0].header("x-a") == "1"


async def test_a_token_is_asked_for_as_rfc_6749_says(client: Client) -> None:
    async with Sink(token()) as endpoint, Sink() as sink:
        await attempt(client, sink, credentials(endpoint.url, client_id="a b:c", client_secret="ü&%"))
    (request,) = endpoint.requests
    assert request.body == b"grant_type=client_credentials"
    assert request.header("content-type") == "application/x-www-form-urlencoded"
    assert request.header("accept") == "application/json"
    assert request.header("authorization") == "Basic YStiJTNBYzolQzMlQkMlMjYlMjU="  # a+b%3Ac:%C3%BC%26%25
    assert request.header("x-a") is None


async def test_scope_audience_and_style_are_the_operators(client: Client) -> None:
    fields = {"scope": ("read", "write:all"), "audience": "https://api.test/", "style": TokenEndpointAuthMethod.BODY}
    async with Sink(token()) as endpoint, Sink() as sink:
        await attempt(client, sink, credentials(endpoint.url, **fields))
    (request,) = endpoint.requests
    assert request.header("authorization") is None
    assert dict(parse_qsl(request.body.decode())) == {
        "grant_type": "client_credentials",
        "scope": "read write:all",
        "audience": "https://api.test/",
        "client_id": "gateway",
        "client_secret": "s3cret",
    }


async def test_attempts_at_once_wait_for_one_token(client: Client) -> None:
    async with Sink(replace(token(), delay=0.05)) as endpoint, Sink() as sink:
        access = credentials(endpoint.url)
        done = await asyncio.gather(*[attempt(client, sink, access) for _ in range(20)])
        assert {one.result for one in done} == {Result.SUCCESS}
        assert (len(endpoint.requests), len(sink.requests)) == (1, 20)


async def test_each_destination_has_a_token_of_its_own(client: Client) -> None:
    """What one of them refuses isn't taken from the other."""
    async with Sink(counted()) as endpoint, Sink(wanting("t1")) as sink, Sink(wanting("t3")) as other:
        access = credentials(endpoint.url)
        done = [await attempt(client, each, access) for each in (sink, other, sink, other)]
    assert [one.status for one in done] == [200] * 4
    assert sent(sink) == ["Bearer t1"] * 2
    assert sent(other) == ["Bearer t2", "Bearer t3", "Bearer t3"]


@pytest.mark.parametrize(
    "answer",
    [
        Answer(
            raw=b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
            b'9\r\n{"access_\r\n9\r\ntoken":"a\r\n2\r\n"}\r\n0\r\n\r\n'
        ),
        Answer(raw=b'HTTP/1.1 200 OK\r\n\r\n{"access_token":"a"}', closes=True),
        Answer(raw=b'HTTP/1.0 200 OK\r\nContent-Length: 20\r\n\r\n{"access_token":"a"}', closes=True),
        Answer(body=b'{"access_token":"a", "token_type":"bearer", "expires_in":"3600", "scope": "x"}'),
        Answer(body=b'{"access_token":"a", "expires_in": null}' + b" " * 16_000),
    ],
)
async def test_a_token_comes_in_any_framing(client: Client, answer: Answer) -> None:
    async with Sink(answer) as endpoint, Sink() as sink:
        assert (await attempt(client, sink, credentials(endpoint.url))).result is Result.SUCCESS
    assert sent(sink) == ["Bearer a"]


async def test_proxy_and_tls_of_the_destination_hold_for_the_token_endpoint(client: Client, tmp_path: Path) -> None:
    ours = Authority()
    certificate, key = ours.issue("gateway")
    names = {"idp.test": "127.0.0.1", "a.test": "127.0.0.1"}
    async with (
        HttpProxy(names=names) as proxy,
        Sink(token(), tls=ours.server(tmp_path, "idp.test", clients=ours)) as endpoint,
        Sink(tls=ours.server(tmp_path, "a.test", clients=ours)) as sink,
    ):
        access = replace(
            credentials(f"https://idp.test:{endpoint.port}/token"),
            tls=tls_of(ca=ours.pem, certificate=certificate, key=key),
            proxy=Proxy(host="127.0.0.1", port=proxy.port),
        )
        outbound = Outbound(url=f"https://a.test:{sink.port}/", headers=(), body=b"{}", access=access)
        done = await client.attempt(outbound, timeout=5, number=1)
        assert done.result is Result.SUCCESS, done
        await client.__aexit__()
    assert [line.split()[1].split(":")[0] for line in proxy.lines] == ["idp.test", "a.test"]


# Refused tokens.


async def test_a_refused_token_is_renewed_and_the_request_sent_again(client: Client) -> None:
    async with Sink(counted()) as endpoint, Sink(wanting("t1")) as sink:
        access = credentials(endpoint.url)
        await attempt(client, sink, access)
        sink.answer(wanting("t2"))  # t1 was revoked
        done = await attempt(client, sink, access)
    assert (done.result, done.number) == (Result.SUCCESS, 1)
    assert sent(sink) == ["Bearer t1", "Bearer t1", "Bearer t2"]
    assert [request.body for request in sink.requests] == [b"{}"] * 3


async def test_a_destination_that_refuses_every_token_costs_one_renewal(client: Client) -> None:
    async with Sink(counted()) as endpoint, Sink(401) as sink:
        access = credentials(endpoint.url)
        done = [await attempt(client, sink, access) for _ in range(4)]
    assert [(one.result, one.status) for one in done] == [(Result.UNAUTHORIZED, 401)] * 4
    assert sent(sink) == ["Bearer t1", *["Bearer t2"] * 4]
    assert len(endpoint.requests) == 2


async def test_a_destination_that_rejects_some_requests_whatever_their_token_gets_few_new_tokens(
    client: Client,
) -> None:
    """As one does behind whose balancer a replica has old keys."""
    turns = itertools.cycle((401, 200))
    async with Sink(counted()) as endpoint, Sink(lambda _: next(turns)) as sink:
        access = credentials(endpoint.url)
        for _ in range(100):
            await attempt(client, sink, access)
    assert len(endpoint.requests) == 1 + module.MAX_RENEWALS


async def test_a_token_that_was_good_before_is_renewed_again(client: Client) -> None:
    async with Sink(counted()) as endpoint, Sink() as sink:
        access = credentials(endpoint.url)
        for good in ("t1", "t2", "t3"):  # each of them revoked in its turn
            sink.answer(wanting(good))
            assert (await attempt(client, sink, access)).result is Result.SUCCESS
    assert len(endpoint.requests) == 3


async def test_many_that_are_refused_at_once_renew_once(client: Client) -> None:
    async with Sink(counted()) as endpoint, Sink(wanting("t1")) as sink:
        access = credentials(endpoint.url)
        await attempt(client, sink, access)
        sink.answer(lambda request: Answer(status=wanting("t2")(request), delay=0.02))
        done = await asyncio.gather(*[attempt(client, sink, access) for _ in range(20)])
        assert {one.result for one in done} == {Result.SUCCESS}
        assert len(endpoint.requests) == 2


async def test_a_403_is_no_matter_of_the_token(client: Client) -> None:
    async with Sink(counted()) as endpoint, Sink(403) as sink:
        done = await attempt(client, sink, credentials(endpoint.url))
    assert (done.status, len(endpoint.requests), len(sink.requests)) == (403, 1, 1)


# Token endpoints that give none.

HOST = "token endpoint: 127.0.0.1: "


@pytest.mark.parametrize(
    ("script", "detail"),
    [
        (
            Answer(status=401, body=b'{"error":"invalid_client"}'),
            "expected a token, got 401 Unauthorized (invalid_client)",
        ),
        (Answer(status=400, body=b'{"error":"s3cret"}'), "expected a token, got 400 Bad Request"),
        (Answer(status=503, body=b"s3cret"), "expected a token, got 503 Service Unavailable"),
        (Answer(status=499), "expected a token, got 499"),
        (Answer(body=b"s3cret"), "expected a JSON object, got something else"),
        (Answer(body=b"[" * 16_000), "expected a JSON object, got something else"),
        (Answer(body=b'["s3cret"]'), "expected a JSON object, got something else"),
        (Answer(body=b"{}"), "expected an access_token of visible ASCII characters, got none or an invalid one"),
        (token("a\r\nX-Evil: 1"), "expected an access_token of visible ASCII characters, got none or an invalid one"),
        (token("é"), "expected an access_token of visible ASCII characters, got none or an invalid one"),
        (token(token_type="mac"), "expected a token of the type bearer, got one of another type"),
        (token(expires_in="soon"), "expected expires_in to be a number of seconds, got something else"),
        (token(expires_in=True), "expected expires_in to be a number of seconds, got something else"),
        (token(expires_in=-1), "expected expires_in to be a number of seconds, got something else"),
        (token(expires_in=[1]), "expected expires_in to be a number of seconds, got something else"),
        (token("x" * 16_400), "expected a complete response of at most 16384 bytes, got a truncated or larger one"),
        (Fault.ENDLESS, "expected a complete response of at most 16384 bytes, got a truncated or larger one"),
        (
            Answer(raw=b'HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"access_token":"a"}', closes=True),
            "expected a complete response of at most 16384 bytes, got a truncated or larger one",
        ),
        (Fault.CLOSE, "connection closed without a response"),
        (Fault.GARBAGE, "malformed response: expected the head of an HTTP/1.1 response"),
    ],
)
async def test_each_failure_of_a_token_endpoint_is_one_of_its_own(client: Client, script: Script, detail: str) -> None:
    async with Sink(script) as endpoint, Sink() as sink:
        done = await attempt(client, sink, credentials(endpoint.url))
    assert (done.result, done.status, done.detail) == (Result.AUTH, None, HOST + detail)
    assert sink.connections == 0


@pytest.mark.parametrize("fault", [Fault.HANG, Fault.DRIP_HEAD])
async def test_a_token_endpoint_that_takes_too_long_takes_the_attempts_time(client: Client, fault: Fault) -> None:
    async with Sink(fault) as endpoint, Sink() as sink:
        done = await attempt(client, sink, credentials(endpoint.url), timeout=0.1)
        assert (done.result, done.detail) == (Result.AUTH, HOST + "expected a response, got none in time")
        assert done.seconds < 0.5


async def test_a_redirect_of_the_token_endpoint_is_not_followed(client: Client) -> None:
    async with Sink(token()) as other, Sink(Answer(status=307, headers=(("Location", other.url),))) as endpoint:
        done = await attempt(client, other, credentials(endpoint.url))
    assert (done.result, done.detail) == (Result.AUTH, HOST + "expected a token, got 307 Temporary Redirect")
    assert other.connections == 0


async def test_the_guard_looks_at_the_token_endpoint_too() -> None:
    guard = EgressGuard(Egress(is_private_allowed=False, allow=(ip_network("127.0.0.1/32"),)))
    async with Sink(token(), host="127.0.0.9") as endpoint, Sink() as sink, Client(guard) as client:
        done = await attempt(client, sink, credentials(endpoint.url))
        assert (done.result, done.detail) == (
            Result.AUTH,
            "token endpoint: refused by egress policy: 127.0.0.9 is loopback",
        )
    assert (endpoint.connections, sink.connections) == (0, 0)


async def test_a_failure_fails_all_waiters_and_no_later_caller(client: Client) -> None:
    async with Sink(Answer(status=500, delay=0.05), token()) as endpoint, Sink() as sink:
        access = credentials(endpoint.url)
        done = await asyncio.gather(*[attempt(client, sink, access) for _ in range(5)])
        assert {one.detail for one in done} == {HOST + "expected a token, got 500 Internal Server Error"}
        assert (await attempt(client, sink, access)).result is Result.SUCCESS
        assert len(endpoint.requests) == 2


async def test_when_no_new_token_is_to_be_had_the_refused_one_is_not_tried_again(client: Client) -> None:
    async with Sink(token(), 500) as endpoint, Sink(200, 401) as sink:
        access = credentials(endpoint.url)
        done = [await attempt(client, sink, access) for _ in range(3)]
    assert [one.result for one in done] == [Result.SUCCESS, Result.AUTH, Result.AUTH]
    assert len(sink.requests) == 2


async def test_each_waits_within_its_own_deadline(client: Client) -> None:
    async with Sink(replace(token(), delay=0.3)) as endpoint, Sink() as sink:
        access = credentials(endpoint.url)
        patient = asyncio.ensure_future(attempt(client, sink, access))
        await endpoint.received(1)
        hasty = await attempt(client, sink, access, timeout=0.05)
        assert (hasty.result, hasty.detail) == (Result.AUTH, "token endpoint: expected a token, got none in time")
        assert hasty.seconds < 0.2
        assert (await patient).result is Result.SUCCESS


async def test_a_waiter_asks_for_itself_when_the_first_times_out(client: Client) -> None:
    async with Sink(Fault.HANG, token()) as endpoint, Sink() as sink:
        access = credentials(endpoint.url)
        hasty = asyncio.ensure_future(attempt(client, sink, access, timeout=0.05))
        await endpoint.received(1)
        patient = await attempt(client, sink, access)
        assert ((await hasty).result, patient.result) == (Result.AUTH, Result.SUCCESS)


async def test_a_waiter_asks_for_itself_when_the_first_is_cancelled(client: Client) -> None:
    async with Sink(Fault.HANG, token()) as endpoint, Sink() as sink:
        access = credentials(endpoint.url)
        first = asyncio.ensure_future(attempt(client, sink, access))
        await endpoint.received(1)
        second = asyncio.ensure_future(attempt(client, sink, access))
        await asyncio.sleep(0)
        first.cancel()
        assert (await second).result is Result.SUCCESS
        with pytest.raises(asyncio.CancelledError):
            await first


async def test_secrets_are_in_no_detail_and_no_representation(client: Client) -> None:
    async with Sink() as endpoint, Sink() as sink:
        access = credentials(f"{endpoint.url}?key=s3cret")
        await endpoint.refuse()
        done = await attempt(client, sink, access)
    assert done.result is Result.AUTH
    assert "s3cret" not in repr((done, access, Outbound(url=sink.url, headers=(), body=b"", access=access)))


# Time.


class Endpoint:
    """Returns tokens without a network, and has a clock."""

    def __init__(self, **fields: object) -> None:
        self.now = 1000.0
        self.count = 0
        self.is_away = False
        self.fields = fields
        self.tokens = Tokens(self._fetch, lambda: self.now)

    async def get(self) -> bytes:
        return (await self._get()).value

    async def _get(self) -> Token:
        return await self.tokens.get("https://a.test/", credentials("https://idp.test/"), self.now + 5)

    async def recent(self) -> bytes:
        access = credentials("https://idp.test/")
        return (await self.tokens.recent("https://a.test/", access, self.now + 5, max_age=60.0)).value

    async def renewed(self) -> Token | None:
        held = await self._get()
        return await self.tokens.renew("https://a.test/", credentials("https://idp.test/"), self.now + 5, held)

    async def _fetch(self, _: Outbound, deadline: float) -> ResponseReader:
        assert deadline == self.now + 5
        self.count += 1
        await asyncio.sleep(0)
        if self.is_away:
            raise NoTokenError("away")
        reader = ResponseReader(keeps_body=True)
        body = json.dumps({"access_token": f"t{self.count}"} | self.fields).encode()
        reader.feed(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))
        return reader


@pytest.mark.parametrize(
    ("fields", "life"),
    [
        ({"expires_in": 3600}, 3540.0),
        ({"expires_in": "3600"}, 3540.0),
        ({"expires_in": 100}, 90.0),
        ({"expires_in": 0.5}, 0.45),
        ({}, 270.0),
        ({"expires_in": 1e300}, 86340.0),
    ],
)
async def test_a_token_is_used_until_shortly_before_its_end(fields: dict[str, object], life: float) -> None:
    endpoint = Endpoint(**fields)
    assert await endpoint.get() == b"Bearer t1"
    endpoint.now = 1000.0 + life - 0.01
    assert await endpoint.get() == b"Bearer t1"
    endpoint.now = 1000.0 + life
    assert await endpoint.get() == b"Bearer t2"


async def test_a_token_that_is_too_old_for_the_caller_is_refetched() -> None:
    endpoint = Endpoint(expires_in=86400)
    assert await endpoint.recent() == b"Bearer t1"
    endpoint.now += 59.0
    assert await endpoint.recent() == b"Bearer t1"
    endpoint.now += 2.0
    assert set(await asyncio.gather(*[endpoint.recent() for _ in range(9)])) == {b"Bearer t2"}
    assert endpoint.count == 2
    assert await endpoint.get() == b"Bearer t2"


async def test_where_no_other_token_is_to_be_had_the_older_one_is_used_while_it_is_good() -> None:
    endpoint = Endpoint(expires_in=3600)
    await endpoint.recent()
    endpoint.now += 61.0
    endpoint.is_away = True
    assert set(await asyncio.gather(*[endpoint.recent() for _ in range(9)])) == {b"Bearer t1"}
    endpoint.now += 59.0
    assert await endpoint.recent() == b"Bearer t1"
    assert endpoint.count == 2, "expected the endpoint to be asked once a minute"
    endpoint.now += 2.0
    endpoint.is_away = False
    assert await endpoint.recent() == b"Bearer t3"
    endpoint.now += 3540.0
    endpoint.is_away = True
    with pytest.raises(NoTokenError):
        await endpoint.recent()


async def test_a_token_that_is_over_at_once_is_good_for_one_request() -> None:
    endpoint = Endpoint(expires_in=0)
    assert [await endpoint.get() for _ in range(3)] == [b"Bearer t1", b"Bearer t2", b"Bearer t3"]


async def test_a_new_token_that_is_refused_as_well_is_renewed_after_a_while() -> None:
    """Roles that were granted meanwhile are in new tokens only."""
    endpoint = Endpoint(expires_in=3600)
    assert await endpoint.renewed()
    assert await endpoint.renewed() is None
    endpoint.now += module.REFUSED_TOKEN_MIN_AGE
    renewed = await endpoint.renewed()
    assert renewed is not None
    assert renewed.value == b"Bearer t3"


async def test_a_token_is_kept_across_reloads_until_its_destination_is_gone_or_has_other_credentials(
    client: Client,
) -> None:
    async with Sink(counted()) as endpoint, Sink() as sink:
        access, rotated = credentials(endpoint.url), credentials(endpoint.url, client_secret="n3w")
        destination = Destination(name="ci", url=sink.url, access=access)
        await attempt(client, sink, access)
        for kept in ([destination], [replace(destination, access=credentials(endpoint.url))], [], [destination]):
            client.retain_only(kept)
            await attempt(client, sink, access)
        client.retain_only([replace(destination, access=rotated)])
        await attempt(client, sink, access)
    assert sent(sink) == ["Bearer t1"] * 3 + ["Bearer t2"] * 2 + ["Bearer t3"]


async def test_tokens_unused_after_reloads_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SLOTS_LIMIT", 3)
    endpoint = Endpoint(expires_in=100)
    for number in range(10):
        await endpoint.tokens.get(f"https://{number}.test/", credentials("https://idp.test/"), endpoint.now + 5)
        endpoint.now += 60
    assert len(endpoint.tokens._slots) <= 3
