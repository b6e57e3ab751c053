"""A vendor rotates its secret first: what was refused meanwhile is delivered once, beside a flood, with retries killed.

As docs/runbooks.md has it: the new secret goes into the rules, and `gateway rejected retry` does the rest.
"""

import asyncio
import hashlib
import hmac
import json
import signal
import sys
import time
from asyncio.subprocess import PIPE
from collections import Counter
from pathlib import Path

import pytest

from gateway.ingress.quarantine import BURST, REQUESTS_PER_SECOND
from gateway.quarantine.claims import LEASE
from tests.acceptance.conftest import LogPlace
from tests.gateway_process import ROOT, GatewayProcess
from tests.load import post, report
from tests.sink import Sink

pytestmark = pytest.mark.rotated(share=1 / 10, group="acceptance")

OLD, NEW = "the old secret of a sender", "the new secret of a sender"
RULES = """
version: 1
ingress: {{trusted_proxies: [127.0.0.0/8]}}
sources:
  stripe:
    quarantine: true
    verify: {{scheme: stripe, secrets: ["${{file:secret}}"]}}
destinations:
  sink: {{url: "{sink}"}}
routes:
  - {{name: all, from: stripe, to: [sink]}}
"""
VENDOR, FLOOD = "203.0.113.7", "198.51.100.1"
TOLERANCE = 300.0
AGE = 285.0
"""Seconds by which a timestamp is older than its request: soon after that, only as of the receipt is it fresh."""
FLOODERS = 8
BEYOND = 2.0
"""How many times as many forgeries there are as one network may have kept at once."""


def a_post(number: int, secret: str, address: str, *, age: float = AGE, connection: str = "close") -> bytes:
    body = b'{"id":"evt_%d","type":"charge","n":%d}' % (number, number)
    at = int(time.time() - age)
    signature = hmac.new(secret.encode(), b"%d.%b" % (at, body), hashlib.sha256).hexdigest()
    head = (
        f"POST /in/stripe HTTP/1.1\r\nHost: gateway.test\r\nConnection: {connection}\r\n"
        f"Stripe-Signature: t={at},v1={signature}\r\n"
        f"X-Forwarded-For: {address}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


async def run(place: LogPlace, gateway: GatewayProcess, *arguments: str) -> asyncio.subprocess.Process:
    own = (f"--log={place.url}", f"--topic-prefix={place.prefix}", "--json")
    rules = (f"--rules={gateway.rules}",) if arguments[0] == "retry" else ()
    return await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway", "rejected", *arguments, *rules, *own, cwd=ROOT, stdout=PIPE
    )


async def answer(process: asyncio.subprocess.Process) -> list[dict[str, object]]:
    output, _ = await asyncio.wait_for(process.communicate(), 2 * LEASE)
    return [json.loads(line) for line in output.splitlines()]


async def refuse(gateway: GatewayProcess, numbers: range) -> None:
    """Send events that are signed with the new secret, each beside forgeries from elsewhere."""
    for number in numbers:
        sent = [post(gateway.port, a_post(number, NEW, VENDOR))]
        sent += [post(gateway.port, a_post(100_000 + number, "nobody's", FLOOD)) for _ in range(3)]
        assert {status for status, _ in await asyncio.gather(*sent)} == {401}


async def flood(gateway: GatewayProcess, count: int) -> None:
    """Send so many forgeries from one network, as fast as they are refused."""

    async def some(numbers: range) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
        for number in numbers:
            writer.write(a_post(200_000 + number, "nobody's", FLOOD, connection="keep-alive"))
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 401 ")
            await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]))
        writer.close()

    await asyncio.gather(*[some(range(first, count, FLOODERS)) for first in range(FLOODERS)])


async def rotate(folder: Path, gateway: GatewayProcess) -> None:
    (folder / "secret.new").write_text(NEW)
    (folder / "secret.new").rename(folder / "secret")
    await gateway.line("rules_reloaded", timeout=5)


def ledger(sink: Sink) -> Counter[int]:
    return Counter([json.loads(request.body)["n"] for request in sink.requests])


@pytest.mark.timeout(150)
async def test_each_event_of_a_vendor_that_rotated_first_is_delivered_once_beside_a_flood(
    place: LogPlace, folder: Path
) -> None:
    """Its timestamps are too old by the clock of the retry, and more is forged than is kept of one network."""
    count, forged = 60, int(BEYOND * BURST / 2)
    (folder / "secret").write_text(OLD)
    async with Sink(200) as sink:
        async with GatewayProcess(
            folder, rules=RULES.format(sink=sink.url), log=place.url, prefix=place.prefix
        ) as gateway:
            began = time.monotonic()
            await flood(gateway, forged // 2)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(flood(gateway, forged - forged // 2))
                tasks.create_task(refuse(gateway, range(count)))
            last = time.time()
            sent = count + forged + 3 * count
            async with asyncio.timeout(30):
                while (metrics := await gateway.metrics()).sum("gateway_quarantined_total") != sent:  # noqa: ASYNC110 - another process's
                    await asyncio.sleep(0.05)
            kept = int(metrics.sum("gateway_quarantined_total", outcome="kept"))
            left_out = int(metrics.sum("gateway_quarantined_total", outcome="over_rate"))
            assert kept + left_out == sent
            seconds = time.monotonic() - began
            assert BURST / 4 < kept - count <= BURST / 2 + REQUESTS_PER_SECOND * seconds
            [group, *_] = await answer(await run(place, gateway, "list", "stripe"))
            assert (group["source"], group["reason"], group["count"]) == ("stripe", "bad_signature", kept)
            await rotate(folder, gateway)
            again = range(10, 20)  # the vendor sends some of them again by itself
            for number in again:
                assert (await post(gateway.port, a_post(number, NEW, VENDOR, age=0.0)))[0] == 202
            await asyncio.sleep(max(0.0, last + TOLERANCE - AGE + 2.0 - time.time()))
            assert (await post(gateway.port, a_post(0, NEW, VENDOR, age=TOLERANCE + 1.0)))[0] == 401, "too old by now"
            reports = await asyncio.gather(
                *[answer(await run(place, gateway, "retry", "stripe", "--since", "2h")) for _ in range(2)]
            )
            [first], [second] = reports
            report(f"{place.kind}: {left_out} of {forged + 3 * count} forgeries left out; {first}, {second}")
            for each in (first, second):
                assert each["refused"] == {"bad_signature": kept - count}
                assert each["left"] == 0
            outcomes = [sum(int(str(each[what])) for each in (first, second)) for what in ("admitted", "present")]
            assert outcomes[0] == count - len(again), "all of the vendor's were kept"
            await sink.received(count, timeout=15)
            [third] = await answer(await run(place, gateway, "retry", "stripe"))
            assert (third["admitted"], third["present"]) == (0, 0)
            [dropped] = await answer(await run(place, gateway, "drop", "--source", "stripe", "--yes"))
            assert dropped["dropped"] == kept - count
            assert await answer(await run(place, gateway, "list")) == []
            await gateway.stop()
        assert ledger(sink) == Counter(range(count))


@pytest.mark.full
@pytest.mark.timeout(150)
async def test_a_retry_that_is_killed_loses_and_repeats_nothing(long_place: LogPlace, folder: Path) -> None:
    place, count = long_place, 800
    (folder / "secret").write_text(OLD)
    async with Sink(200) as sink:
        async with GatewayProcess(
            folder, rules=RULES.format(sink=sink.url), log=place.url, prefix=place.prefix
        ) as gateway:
            await refuse(gateway, range(count))
            await rotate(folder, gateway)
            process = await run(place, gateway, "retry", "stripe")
            await sink.received(1, timeout=30)
            process.kill()
            assert await process.wait() == -signal.SIGKILL, "expected it to be amid"
            assert len(ledger(sink)) < count
            [last] = await answer(await run(place, gateway, "retry", "stripe"))  # which waits for that one's lease
            assert last["left"] == 0
            assert int(str(last["admitted"])) > 0
            await sink.received(count, timeout=30)
            await gateway.stop()
        assert ledger(sink) == Counter(range(count))
