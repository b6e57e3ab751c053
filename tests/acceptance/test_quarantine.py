"""A vendor rotates its secret first: what was refused meanwhile is delivered once, beside a flood, with retries killed.

As docs/runbooks.md has it: the new secret goes into the rules, and `gateway rejected retry` does the rest.
"""

import asyncio
import hashlib
import hmac
import json
import sys
from asyncio.subprocess import PIPE
from collections import Counter
from pathlib import Path

import pytest

from gateway.quarantine.claims import LEASE
from tests.acceptance.conftest import LogPlace
from tests.gateway_process import ROOT, GatewayProcess
from tests.load import post, report
from tests.sink import Sink

OLD, NEW = "the old secret of a sender", "the new secret of a sender"
RULES = """
version: 1
ingress: {{trusted_proxies: [127.0.0.0/8]}}
sources:
  github:
    quarantine: true
    verify: {{scheme: github, secrets: ["${{file:secret}}"]}}
destinations:
  sink: {{url: "{sink}"}}
routes:
  - {{name: all, from: github, to: [sink]}}
"""
VENDOR, FLOOD = "203.0.113.7", "198.51.100.1"


def a_post(number: int, secret: str, address: str) -> bytes:
    body = b'{"n":%d}' % number
    signature = hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()
    head = (
        "POST /in/github HTTP/1.1\r\nHost: gateway.test\r\nX-GitHub-Event: push\r\nConnection: close\r\n"
        f"X-GitHub-Delivery: d{number}\r\nX-Hub-Signature-256: sha256={signature}\r\n"
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


async def rotate(folder: Path, gateway: GatewayProcess) -> None:
    (folder / "secret.new").write_text(NEW)
    (folder / "secret.new").rename(folder / "secret")
    await gateway.line("rules_reloaded", timeout=5)


def ledger(sink: Sink) -> Counter[int]:
    return Counter([json.loads(request.body)["n"] for request in sink.requests])


async def test_each_event_of_a_vendor_that_rotated_first_is_delivered_once(place: LogPlace, folder: Path) -> None:
    count = 60
    (folder / "secret").write_text(OLD)
    async with Sink(200) as sink:
        async with GatewayProcess(
            folder, rules=RULES.format(sink=sink.url), log=place.url, prefix=place.prefix
        ) as gateway:
            await refuse(gateway, range(count))
            async with asyncio.timeout(10):
                while (await gateway.metrics()).sum("gateway_quarantined_total", outcome="kept") != 4 * count:  # noqa: ASYNC110 - another process's
                    await asyncio.sleep(0.05)
            [group, *_] = await answer(await run(place, gateway, "list", "github"))
            assert (group["source"], group["reason"], group["count"]) == ("github", "bad_signature", 4 * count)
            await rotate(folder, gateway)
            again = range(10, 20)  # the vendor sends some of them again by itself
            for number in again:
                assert (await post(gateway.port, a_post(number, NEW, VENDOR)))[0] == 202
            reports = await asyncio.gather(
                *[answer(await run(place, gateway, "retry", "github", "--since", "2h")) for _ in range(2)]
            )
            [first], [second] = reports
            report(f"{place.kind}: {first}, {second}")
            for each in (first, second):
                assert each["refused"] == {"bad_signature": 3 * count}
                assert each["left"] == 0
            outcomes = [sum(int(str(each[what])) for each in (first, second)) for what in ("admitted", "present")]
            assert outcomes[0] == count - len(again)
            await sink.received(count, timeout=15)
            [third] = await answer(await run(place, gateway, "retry", "github"))
            assert (third["admitted"], third["present"]) == (0, 0)
            [dropped] = await answer(await run(place, gateway, "drop", "--source", "github", "--yes"))
            assert dropped["dropped"] == 3 * count
            assert await answer(await run(place, gateway, "list")) == []
            await gateway.stop()
        assert ledger(sink) == Counter(range(count))


@pytest.mark.full
async def test_retries_that_are_killed_lose_and_repeat_nothing(long_place: LogPlace, folder: Path) -> None:
    place, count = long_place, 400
    (folder / "secret").write_text(OLD)
    async with Sink(200) as sink:
        async with GatewayProcess(
            folder, rules=RULES.format(sink=sink.url), log=place.url, prefix=place.prefix
        ) as gateway:
            await refuse(gateway, range(count))
            await rotate(folder, gateway)
            for delay in (0.9, 1.0, 1.1):
                process = await run(place, gateway, "retry", "github")
                await asyncio.sleep(delay)
                if process.returncode is None:
                    process.kill()
                await process.wait()
                [last] = await answer(await run(place, gateway, "retry", "github"))
                assert last["left"] == 0
            await sink.received(count, timeout=30)
            await gateway.stop()
        assert ledger(sink) == Counter(range(count))
