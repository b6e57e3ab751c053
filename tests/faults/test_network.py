"""A network that stalls, resets and drips: before the log, before the destinations, before the ingress, and DNS."""

import asyncio
import socket
import struct
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.acceptance.conftest import LogPlace
from tests.faults.broker_behind_proxy import behind_a_proxy
from tests.faults.nameserver import Nameserver
from tests.faults.scenario import Scenario, Table
from tests.faults.tcp_proxy import TcpProxy, Way
from tests.load import signed_post
from tests.sink import Sink

CUTS = [Way.STALL, Way.RESET, Way.DRIP]
CUT = 8.0
LATEST_ANSWER = 12.0
"""Seconds: senders such as GitHub give up after 10, most after 15 or more."""
PROMPT = 1.5
"""Seconds within which a healthy destination is served, whatever happens to another one, on a busy machine."""


@pytest.mark.full
@pytest.mark.timeout(180)
async def test_a_network_between_gateway_and_kafka_that_fails_in_every_way_loses_nothing(
    folder: Path, table: Table
) -> None:
    async with behind_a_proxy() as (broker, proxy):
        place = LogPlace(url=f"kafka://127.0.0.1:{proxy.port}", prefix="gateway.")
        async with Scenario("stall, reset, drip before kafka", place, folder, table, connections=1500) as scenario:
            [gateway] = scenario.gateways
            pid = gateway.pid
            async with scenario.load():
                for way in CUTS:
                    await scenario.acknowledged(200)
                    began = time.time()
                    proxy.do(way)
                    await asyncio.sleep(CUT)
                    proxy.do(Way.PASS)
                    await scenario.acknowledged(100)
                    # While the log doesn't answer, nothing comes that could be finished and not be committed.
                    scenario.explain(began, time.time(), uncommitted=0)
            await scenario.settle(timeout=90)
            slowest = max(sent.answered_at - sent.at for sent in scenario.sender.answers)
            assert slowest < LATEST_ANSWER, scenario.story()
            assert scenario.sender.statuses()[503]
            assert (gateway.is_running, gateway.pid) == (True, pid)
        assert broker.pid is not None


@pytest.mark.full
@pytest.mark.timeout(180)
async def test_a_network_between_gateway_and_one_destination_that_fails_in_every_way_delays_no_other(
    embedded_place: LogPlace, folder: Path, table: Table
) -> None:
    async with TcpProxy() as proxy:

        def by(first: Sink, second: Sink) -> tuple[str, str]:
            proxy.target = second.port
            return first.url, f"http://127.0.0.1:{proxy.port}/second"

        title = "stall, reset, drip before a destination"
        async with Scenario(title, embedded_place, folder, table, urls=by) as scenario:
            async with scenario.load():
                for way in CUTS:
                    await scenario.acknowledged(200)
                    began = time.time()
                    proxy.do(way)
                    await asyncio.sleep(CUT)
                    proxy.do(Way.PASS)
                    # A request on a connection that died without a byte of an answer is sent again at once.
                    scenario.explain_in_flight(began, time.time(), destination="second")
            account = await scenario.settle(timeout=90)
            assert account.latest["first"] < PROMPT, scenario.story()
            assert account.refused == 0


@pytest.mark.full
@pytest.mark.timeout(180)
async def test_a_name_that_no_server_answers_for_delays_no_other_destination(
    embedded_place: LogPlace, folder: Path, table: Table
) -> None:
    async with (
        Nameserver(folder) as nameserver,
        Scenario(
            "dns that never answers for 20 s",
            embedded_place,
            folder,
            table,
            through=nameserver.through,
            urls=lambda first, second: (first.url, f"http://hook.faults.test:{second.port}/second"),
        ) as scenario,
    ):
        async with scenario.load():
            await asyncio.sleep(20)
            assert not scenario.second.requests
            nameserver.is_silent = False
            await asyncio.sleep(10)
        assert nameserver.asked
        account = await scenario.settle(timeout=90)
        assert account.latest["first"] < PROMPT, scenario.story()
        assert account.refused == 0


@pytest.mark.rotated(share=1 / 12, group="faults")
@pytest.mark.timeout(120)
async def test_senders_that_drip_break_off_or_say_nothing_cost_the_others_nothing(
    embedded_place: LogPlace, folder: Path, table: Table, *, is_full: bool
) -> None:
    idle, dripping, breaking, seconds = (2000, 200, 200, 15.0) if is_full else (200, 20, 20, 2.0)
    title = f"{idle} idle, {dripping} dripping senders, {breaking} resets"
    async with Scenario(title, embedded_place, folder, table) as scenario:
        port = scenario.gateways[0].port
        async with scenario.load(), _idle(port, idle), asyncio.TaskGroup() as tasks:
            drips = [tasks.create_task(_drip(port, seconds)) for _ in range(dripping)]
            for number in range(breaking):
                await _break_off(port, number)
                await asyncio.sleep(seconds / 2 / breaking)
        account = await scenario.settle()
        assert (account.refused, account.duplicated) == (0, 0), account
        slowest = max(sent.answered_at - sent.at for sent in scenario.sender.answers)
        assert max(slowest, account.slowest) < (PROMPT if is_full else 3 * PROMPT), scenario.story()
        if is_full:  # a body has ten seconds
            assert {task.result() for task in drips} == {b"408"}
        metrics = await scenario.gateways[0].metrics()
        assert metrics.sum("gateway_rejected_total", reason="disconnected") >= breaking


async def _drip(port: int, seconds: float) -> bytes:
    """Send a byte of a body every 200 ms, and return the status that comes meanwhile."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        head, _, body = signed_post(bytes(1000), delivery="drip").partition(b"\r\n\r\n")
        writer.write(head + b"\r\n\r\n")
        until = time.monotonic() + seconds
        for number in range(len(body)):
            writer.write(body[number : number + 1])
            try:
                async with asyncio.timeout(0.2):
                    return (await reader.readuntil(b"\r\n"))[9:12]
            except TimeoutError:
                if time.monotonic() > until:
                    break
        return b""
    finally:
        writer.close()


async def _break_off(port: int, number: int) -> None:
    """Send half of a request, and reset the connection."""
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    request = signed_post(bytes(1000), delivery=f"broken-{number}")
    writer.write(request[:-500])
    await writer.drain()
    await asyncio.sleep(0.01)  # so that it is read as what it is, and not thrown away with the connection
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


@asynccontextmanager
async def _idle(port: int, count: int) -> AsyncIterator[None]:
    """Hold connections that say nothing."""
    writers = []
    try:
        for _ in range(count):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writers.append(writer)
        yield
    finally:
        for writer in writers:
            writer.close()
