"""Whoever isn't verified takes nothing from those who are."""

import asyncio
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from time import monotonic
from typing import NamedTuple

import pytest

from tests.acceptance.conftest import RULES, LogPlace
from tests.gateway_process import GatewayProcess
from tests.load import Load, report
from tests.sink import Sink

SIZE = 4_000
WARM_UP = 0.25
"""The share of the time that isn't measured: processes that have just started are slow, and 500 senders connect."""
PAIRS = 3
"""Pairs of runs, of which one has to hold: what else goes on on a machine is only a reason to fail."""
FORGED = (
    b"POST /in/github HTTP/1.1\r\nHost: gateway.test\r\nX-GitHub-Event: push\r\nX-GitHub-Delivery: d\r\n"
    b"X-Hub-Signature-256: sha256=" + b"0" * 64 + b"\r\nContent-Length: 900000\r\n\r\n"
)
PIECES = (420_000, 420_000, 420_000, 20_000, 500)
"""Bytes after which senders leave off, by turns: 160 large ones fill a room of 64 MiB, the others what is left."""


@pytest.mark.timeout(400)
async def test_bodies_that_are_held_open_delay_and_refuse_nobody(
    embedded_place: LogPlace, folder: Path, *, is_full: bool
) -> None:
    """500 senders each forge a signature, send half a body, say nothing more, and come again when they are refused."""
    rate, seconds = (300.0, 20.0) if is_full else (150.0, 4.0)
    pairs = []
    for number in range(PAIRS):
        places = [embedded_place.another(f"{name}{number}") for name in ("alone", "beside")]
        alone, beside = [
            await _answers(place, folder, rate, seconds, stalled=count)
            for place, count in zip(places, (0, 500), strict=True)
        ]
        pairs.append(
            f"p99 of the answers {1000 * alone.p99:.1f} ms alone, {1000 * beside.p99:.1f} ms beside 500 held open"
            f" ({alone.rate:.0f} and {beside.rate:.0f} answers a second)"
        )
        report(f"senders under {rate:g}/s of {SIZE} bytes: {pairs[-1]}")
        is_level = beside.p99 <= 2 * alone.p99 or (not is_full and beside.p99 < alone.p99 + 0.05)
        if is_level and min(alone.rate, beside.rate) > 0.9 * rate:
            return
    pytest.fail("; ".join(pairs))


class Answers(NamedTuple):
    """What good senders got, each a 202: the 99th percentile of the seconds to an answer, and the answers a second."""

    p99: float
    rate: float


async def _answers(place: LogPlace, folder: Path, rate: float, seconds: float, *, stalled: int) -> Answers:
    async with AsyncExitStack() as stack:
        sinks = [await stack.enter_async_context(Sink(200)) for _ in range(2)]
        rules = RULES.format(first=sinks[0].url, second=sinks[1].url)
        gateway = GatewayProcess(folder, rules=rules, log=place.url, prefix=place.prefix)
        await stack.enter_async_context(gateway)
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        senders = [tasks.create_task(_hold_open(gateway.port, PIECES[n % len(PIECES)])) for n in range(stalled)]
        load = Load(gateway.port, rate=rate, size=SIZE)
        await load.send_for(WARM_UP * seconds)
        begun = len(load.answers)
        await load.send_for((1 - WARM_UP) * seconds)
        metrics = await gateway.metrics()
        for sender in senders:
            sender.cancel()
    assert load.statuses().keys() == {202}, gateway.story()
    if stalled:  # they were there, and had to make room
        reasons = ("crowded_out", "bodies_held_open")
        assert sum(metrics.sum("gateway_rejected_total", source="github", reason=reason) for reason in reasons) > 100
    times = sorted([sent.answered_at - sent.at for sent in load.answers[begun:]])
    return Answers(times[int(0.99 * (len(times) - 1))], len(times) / ((1 - WARM_UP) * seconds))


async def _hold_open(port: int, size: int) -> None:
    while True:
        began = monotonic()
        with suppress(OSError, asyncio.IncompleteReadError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(FORGED + b"x" * size)
                await reader.readuntil(b"\r\n\r\n")
            finally:
                writer.close()
        await asyncio.sleep(max(0.0, began + 5.0 - monotonic()))
