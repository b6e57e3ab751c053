"""The rate of a source is that of all ingresses together, whoever comes, goes and is killed."""

import asyncio
import time
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tests.acceptance.conftest import LogPlace
from tests.gateway_process import GatewayProcess
from tests.load import post, report

pytestmark = pytest.mark.rotated(share=1 / 10, group="acceptance")

RATE, OFFERED, SECONDS = 30.0, 150.0, 4.0
RULES = """
version: 1
sources:
  open: {verify: {scheme: none}, limits: {rate: 30/s}}
destinations: {}
routes: []
"""
REQUEST = b"POST /in/open HTTP/1.1\r\nHost: gateway.test\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}"


async def accepted_of(gateways: list[GatewayProcess]) -> int:
    """Send five times as much as is allowed, in turn to each; return how many a second were accepted."""
    statuses = Counter[int]()
    began = time.monotonic()

    async def send(number: int) -> None:
        statuses[(await post(gateways[number % len(gateways)].port, REQUEST))[0]] += 1

    async with asyncio.TaskGroup() as tasks:
        number = 0
        while time.monotonic() < began + SECONDS:
            tasks.create_task(send(number))
            number += 1
            await asyncio.sleep(max(0.0, began + number / OFFERED - time.monotonic()))
    assert statuses.keys() == {202, 429}
    return statuses[202]


async def shared_by(gateways: list[GatewayProcess], *, timeout: float = 20.0) -> None:
    until = time.monotonic() + timeout
    for gateway in gateways:
        while not (lines := gateway.lines("rate_shared")) or lines[-1]["processes"] != len(gateways):
            assert time.monotonic() < until, gateway.story()
            await asyncio.sleep(0.05)


async def test_ingresses_share_a_sources_rate(kafka_place: LogPlace, tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        gateways = []
        for number in range(3):
            folder = tmp_path / str(number)
            folder.mkdir()
            gateway = GatewayProcess(
                folder,
                rules=RULES,
                log=kafka_place.url,
                prefix=kafka_place.prefix,
                environ={"GATEWAY_ROLE": "ingress"},
            )
            gateways.append(await stack.enter_async_context(gateway))
        await shared_by(gateways)
        of_three = await accepted_of(gateways)
        assert await gateways.pop().stop() == 0
        await shared_by(gateways)
        of_two = await accepted_of(gateways)
        report(f"of {RATE:g}/s for {SECONDS:g} s, three ingresses accepted {of_three}, two {of_two}")
        for accepted in (of_three, of_two):
            assert 0.8 * RATE * SECONDS <= accepted <= RATE * (SECONDS + 1.5)
