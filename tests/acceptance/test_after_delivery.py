"""A sender gets what the destination responds: in time, of its own event, and nothing depends on it."""

import asyncio
import gzip
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from statistics import quantiles
from typing import Any

import aiohttp
import orjson
import pytest

from tests.acceptance.conftest import LogPlace
from tests.gateway_process import GatewayProcess
from tests.load import report
from tests.sink import Answer, Fault, Request, Scripted, Sink

pytestmark = pytest.mark.rotated(share=1 / 10, group="acceptance")

AT_ONCE = 200
DELAY = 0.1
TOKEN = "a token of the sender"
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
RULES = """
version: 1
sources:
  commands:
    verify: {{scheme: bearer, secrets: ["{token}"]}}
    id: string(body.n)
    respond:
      status: 200
      body: {{text: "working on ${{{{ body.n }}}}"}}
      after_delivery: {{destination: chat, timeout: {timeout}}}
destinations:
  chat: {{url: "{chat}", timeout: 20s, concurrency: 500}}
  audit: {{url: "{audit}"}}
routes:
  - {{name: audit, from: commands, to: [audit]}}
  - {{name: chat, from: commands, to: [chat]}}
"""


def echo(request: Request) -> Scripted:
    """Respond with the number of the event, after a moment; every fifth is a client error."""
    number = orjson.loads(request.body)["n"]
    status = 422 if number % 5 == 4 else 200
    return Answer(status=status, headers=(("Content-Type", "text/x-echo"),), body=b"number %d" % number, delay=DELAY)


@asynccontextmanager
async def destinations(chat: Any) -> AsyncIterator[tuple[Sink, Sink]]:
    async with Sink(chat, path="/chat") as one, Sink(204, path="/audit") as other:
        yield one, other


def rules(chat: Sink, audit: Sink, timeout: str = "5s") -> str:
    return RULES.format(chat=chat.url, audit=audit.url, timeout=timeout, token=TOKEN)


async def ask(session: aiohttp.ClientSession, url: str, number: int) -> tuple[float, int, str, bytes]:
    """Return how long a request took, its status, its content type and its body."""
    began = time.perf_counter()
    async with session.post(url, data=b'{"n":%d}' % number, headers=HEADERS) as response:
        body = await response.read()
        return time.perf_counter() - began, response.status, response.content_type, body


async def ask_all(url: str, first: int = 0) -> list[tuple[float, int, str, bytes]]:
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        return await asyncio.gather(*[ask(session, url, first + number) for number in range(AT_ONCE)])


def percentile(answers: list[tuple[float, int, str, bytes]]) -> float:
    return quantiles([seconds for seconds, *_ in answers], n=100)[98]


def check_echoes(answers: list[tuple[float, int, str, bytes]], first: int = 0) -> None:
    found = [answer[1:] for answer in answers]
    numbers = range(first, first + AT_ONCE)
    assert found == [(422 if n % 5 == 4 else 200, "text/x-echo", b"number %d" % n) for n in numbers]


async def test_many_senders_at_once_get_the_responses_to_their_events(place: LogPlace, folder: Path) -> None:
    async with destinations(echo) as (chat, audit):
        async with GatewayProcess(folder, rules=rules(chat, audit), log=place.url, prefix=place.prefix) as gateway:
            url = f"http://127.0.0.1:{gateway.port}/in/commands"
            await ask_all(url)  # connections, and code that is loaded
            ratios = []
            for n in range(1, 4):
                bare = percentile(await ask_all(chat.url))
                answers = await ask_all(url, n * AT_ONCE)
                check_echoes(answers, n * AT_ONCE)
                ratios.append(percentile(answers) / bare)
            metrics = await gateway.metrics()
            counts = {
                outcome: metrics.sum("gateway_destination_responses_total", source="commands", outcome=outcome)
                for outcome in ("sent", "timeout", "failed", "overloaded")
            }
            assert counts == {"sent": 4 * AT_ONCE, "timeout": 0, "failed": 0, "overloaded": 0}
            await audit.received(4 * AT_ONCE)
        report(f"p99 of {AT_ONCE} at once, beside the destination's: {', '.join(f'{ratio:.2f}' for ratio in ratios)}")
        assert min(ratios) < 1.5
        accepted = [each for each in chat.requests if orjson.loads(each.body)["n"] % 5 != 4]  # others are tried again
        events = Counter(event for each in accepted if (event := each.header("gateway-event-id")))
        assert Counter(events.values()) == {1: 4 * AT_ONCE * 4 // 5}


async def test_a_response_comes_back_from_another_process(kafka_place: LogPlace, folder: Path) -> None:
    async with destinations(echo) as (chat, audit):
        processes = []
        for role in ("router", "ingress"):
            (folder / role).mkdir()
            processes.append(
                GatewayProcess(
                    folder / role,
                    rules=rules(chat, audit),
                    log=kafka_place.url,
                    prefix=kafka_place.prefix,
                    environ={"GATEWAY_ROLE": role},
                )
            )
        async with processes[0], processes[1] as ingress:
            url = f"http://127.0.0.1:{ingress.port}/in/commands"
            async with aiohttp.ClientSession() as session, asyncio.timeout(30):
                while (await ask(session, url, 10_000))[2] != "text/x-echo":  # until the router's group has formed
                    pass
            check_echoes(await ask_all(url))


FAILURES: dict[int, Scripted] = {
    1: Answer(body=b"too late", delay=3),
    2: 503,
    3: Fault.RESET,
    4: 401,  # of the gateway's credentials
    5: Answer(body=b"x" * (65 * 1024)),
    6: Answer(status=302, headers=(("Location", "http://192.0.2.1/"),)),
    7: Fault.DRIP,
    8: Answer(status=204),
    9: Answer(body=b"fine"),
}


def fails(request: Request) -> Scripted:
    return FAILURES[orjson.loads(request.body)["n"]]


@pytest.mark.parametrize(
    ("number", "outcome"),
    [(1, "timeout"), (2, "failed"), (3, "failed"), (4, "failed"), (5, "failed"), (6, "failed"), (7, "timeout")],
)
async def test_what_is_no_response_for_a_sender_is_the_default_one(
    embedded_place: LogPlace, folder: Path, number: int, outcome: str
) -> None:
    async with (
        destinations(fails) as (chat, audit),
        GatewayProcess(folder, rules=rules(chat, audit, "500ms"), log=embedded_place.url) as gateway,
    ):
        url = f"http://127.0.0.1:{gateway.port}/in/commands"
        async with aiohttp.ClientSession() as session:
            seconds, *answer = await ask(session, url, number)
            assert answer == [200, "application/json", b'{"text":"working on %d"}' % number]
            assert seconds < 2
            assert (await ask(session, url, 9))[1:] == (200, "application/octet-stream", b"fine")
            assert (await ask(session, url, 8))[1:] == (204, "application/octet-stream", b"")
        async with asyncio.timeout(5):
            while len(lines := gateway.lines("request_finished")) < 3:  # noqa: ASYNC110 - a file
                await asyncio.sleep(0.05)
        assert [line["destination_response"] for line in lines] == [outcome, "sent", "sent"]
        await chat.received(3)


async def test_a_crash_while_a_sender_waits_loses_no_event(embedded_place: LogPlace, folder: Path) -> None:
    async with (
        destinations(Answer(delay=30.0)) as (chat, audit),
        GatewayProcess(folder, rules=rules(chat, audit, "10s"), log=embedded_place.url) as gateway,
    ):
        url = f"http://127.0.0.1:{gateway.port}/in/commands"
        async with aiohttp.ClientSession() as session:
            asking = asyncio.gather(*[ask(session, url, number) for number in range(20)], return_exceptions=True)
            await chat.received(5)
            async with asyncio.timeout(10):
                while (await gateway.metrics()).sum("gateway_events_total") < 20:  # noqa: ASYNC110 - it has no event
                    await asyncio.sleep(0.02)
            gateway.kill()
            chat.answer(Answer(body=b"done"))
            assert all(isinstance(answer, aiohttp.ClientError) for answer in await asking)
            before = len(chat.requests)
            await gateway.start()
            await chat.received(before + 20, timeout=30)
            assert len({request.header("gateway-event-id") for request in chat.requests[before:]}) == 20
            # Who sends again gets the response, or the default one if the event is known already.
            assert (await ask(session, url, 20))[3] == b"done"


async def test_a_stop_lets_nobody_wait_for_long(embedded_place: LogPlace, folder: Path) -> None:
    async with (
        destinations(lambda _: Answer(body=b"done", delay=4.0)) as (chat, audit),
        GatewayProcess(folder, rules=rules(chat, audit, "20s"), log=embedded_place.url) as gateway,
    ):
        url = f"http://127.0.0.1:{gateway.port}/in/commands"
        async with aiohttp.ClientSession() as session:
            asking = asyncio.create_task(ask(session, url, 1))
            await chat.received(1)
            stopping = asyncio.create_task(gateway.stop())
            seconds, *answer = await asking
            assert answer == [200, "application/json", b'{"text":"working on 1"}']
            assert seconds < 3
            assert await stopping == 0


OURS = "the-gateways-own-token-0123456789"
TEXT = b'{"text":"' + b"a long reply " * 100 + b'"}'


def compressing(request: Request) -> Scripted:
    """Respond as a server does that compresses for whoever accepts it."""
    if "gzip" not in (request.header("accept-encoding") or ""):
        return Answer(headers=(("Content-Type", "application/json"),), body=TEXT)
    headers = (("Content-Type", "application/json"), ("Content-Encoding", "gzip"), ("Vary", "Accept-Encoding"))
    return Answer(headers=headers, body=gzip.compress(TEXT))


async def test_a_compressed_response_says_so_to_its_sender(embedded_place: LogPlace, folder: Path) -> None:
    async with (
        destinations(compressing) as (chat, audit),
        GatewayProcess(folder, rules=rules(chat, audit), log=embedded_place.url) as gateway,
        aiohttp.ClientSession() as session,  # accepts gzip, and decompresses by Content-Encoding
        session.post(f"http://127.0.0.1:{gateway.port}/in/commands", data=b'{"n":1}', headers=HEADERS) as response,
    ):
        assert (response.headers["Content-Encoding"], await response.read()) == ("gzip", TEXT)


@pytest.mark.parametrize("codings", [0, 1, 2])
async def test_a_response_that_repeats_our_credential_reaches_no_sender(
    embedded_place: LogPlace,
    folder: Path,
    codings: int,
) -> None:
    def repeating(request: Request) -> Scripted:
        """Respond with what was sent, as error pages for debugging do."""
        lines = b"\n".join(b"%b: %b" % pair for pair in request.headers)
        headers = [("Content-Type", "text/plain")] + [("Content-Encoding", "gzip")] * codings
        for _ in range(codings):
            lines = gzip.compress(lines)
        return Answer(status=422, headers=tuple(headers), body=lines)

    async with destinations(repeating) as (chat, audit):
        text = rules(chat, audit).replace("concurrency: 500", f"concurrency: 500, auth: {{bearer: {{token: {OURS}}}}}")
        async with GatewayProcess(folder, rules=text, log=embedded_place.url) as gateway:
            async with aiohttp.ClientSession() as session:
                _, status, _, body = await ask(session, f"http://127.0.0.1:{gateway.port}/in/commands", 1)
            assert (status, orjson.loads(body)["text"]) == (200, "working on 1")
            line = await gateway.line("response_withheld")
            assert (line["destination"], line["route"]) == ("chat", "chat")
            assert OURS not in str(line)
        assert dict(chat.requests[0].headers)[b"authorization"] == b"Bearer " + OURS.encode()


async def test_a_sender_that_is_gone_waits_no_longer(embedded_place: LogPlace, folder: Path) -> None:
    async with destinations(Answer(body=b"late", delay=8.0)) as (chat, audit):
        text = rules(chat, audit, timeout="20s")
        text = text.replace("    id: string(body.n)\n", "    id: string(body.n)\n    limits: {concurrent: 2}\n")
        async with GatewayProcess(folder, rules=text, log=embedded_place.url) as gateway:
            for number in range(2):  # as a sender does that has a timeout of its own
                body = b'{"n":%d}' % number
                _, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
                writer.write(
                    b"POST /in/commands HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer %b\r\nContent-Length: %d\r\n\r\n%b"
                    % (TOKEN.encode(), len(body), body)
                )
                await gateway.until("gateway_events_total", number + 1, source="commands")
                writer.transport.abort()
            await gateway.until("gateway_destination_responses_total", 2, source="commands", outcome="gone")
            async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(1.0)) as session:
                with pytest.raises(TimeoutError):  # it waits for its own, instead of a 503
                    await ask(session, f"http://127.0.0.1:{gateway.port}/in/commands", 2)
