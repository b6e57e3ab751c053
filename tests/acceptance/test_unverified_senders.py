"""Whoever isn't verified takes nothing from those who are."""

import asyncio
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from time import monotonic
from typing import NamedTuple

import pytest

from gateway.ingress.quarantine import BURST, REQUESTS_PER_SECOND
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


@pytest.mark.timeout(200)
async def test_a_flood_beside_a_real_sender_at_its_rate_loses_nothing_of_it(
    embedded_place: LogPlace, folder: Path, *, is_full: bool
) -> None:
    """Forged requests come several times as often as the source may send, and as many as it may have are held open."""
    rate, seconds, connections = (200, 30.0, 32) if is_full else (100, 4.0, 32)
    limits = f"limits: {{{{rate: {rate}/s, concurrent: {connections}, body: 8KiB}}}}"
    async with AsyncExitStack() as stack:
        sink = await stack.enter_async_context(Sink(200))
        rules = RULES.replace("github: {{verify", f"github: {{{{{limits}, quarantine: true, verify").format(
            first=sink.url, second=sink.url
        )
        gateway = GatewayProcess(folder, rules=rules, log=embedded_place.url, prefix=embedded_place.prefix)
        await stack.enter_async_context(gateway)
        tasks = await stack.enter_async_context(asyncio.TaskGroup())
        flood = [
            *[tasks.create_task(_hold_open(gateway.port, 500, length=8_000)) for _ in range(2 * connections)],
            *[tasks.create_task(_forge(gateway.port)) for _ in range(16)],
        ]
        load = Load(gateway.port, rate=rate, size=SIZE, connections=connections)
        await load.send_for(seconds)
        metrics = await gateway.metrics()
        for task in flood:
            task.cancel()
        beyond = Load(gateway.port, rate=4 * rate, size=SIZE, connections=connections, first=1_000_000)
        await beyond.send_for(3.0)
    forged = metrics.sum("gateway_rejected_total", source="github", reason="bad_signature")
    kept = metrics.sum("gateway_quarantined_total", outcome="kept")
    assert 0 < kept <= BURST / 2 + REQUESTS_PER_SECOND * (seconds + 5.0)
    report(
        f"{load.acknowledged_count} of {len(load.answers)} acknowledged at {rate}/s, beside {forged:g} forged, "
        f"{kept:g} of them kept"
    )
    assert load.statuses().keys() == {202}, gateway.story()
    assert load.acknowledged_count > 0.5 * rate * seconds
    assert forged > 2 * load.acknowledged_count
    assert 429 in beyond.statuses(), "the limit is in force, for a sender that does send more"
    assert beyond.acknowledged_count < rate * (3.0 + 2.0)


async def _forge(port: int) -> None:
    """Send complete requests with a forged signature, one after another."""
    while True:
        with suppress(OSError, asyncio.IncompleteReadError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                while True:
                    writer.write(FORGED.replace(b"900000", b"2") + b"{}")
                    head = await reader.readuntil(b"\r\n\r\n")
                    length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
                    await reader.readexactly(int(length))
                    await asyncio.sleep(0.01)
            finally:
                writer.close()


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


async def _hold_open(port: int, size: int, *, length: int = 900_000) -> None:
    while True:
        began = monotonic()
        with suppress(OSError, asyncio.IncompleteReadError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(FORGED.replace(b"900000", b"%d" % length) + b"x" * size)
                await reader.readuntil(b"\r\n\r\n")
            finally:
                writer.close()
        await asyncio.sleep(max(0.0, began + 5.0 - monotonic()))
