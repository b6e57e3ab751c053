"""Whoever isn't verified takes nothing from those who are."""

import asyncio
import sys
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest

from gateway.ingress.quarantine import BURST, REQUESTS_PER_SECOND
from tests.acceptance.conftest import RULES, LogPlace
from tests.gateway_process import ROOT, GatewayProcess
from tests.load import Load, report
from tests.sink import Sink
from tests.slow_senders import FORGED, hold_open

SIZE = 4_000
WARM_UP = 5.0
"""Seconds that aren't measured: processes that have just started are slow."""
PAIRS = 3
"""Pairs of runs, of which one has to hold: what else goes on on a machine is only a reason to fail."""
MAX_MEMORY = {"held": 300 << 20, "large": 300 << 20, "slow": 200 << 20}
"""Bytes that a process may have resident beside senders of each kind: the first two fill the room for bodies."""
REASONS = {"held": ("evicted",), "large": ("body_too_large",), "slow": ("head_slow", "body_too_large")}
"""Why those of each kind are refused."""
ATTACKS = 100
"""More than so many are refused for each of these reasons, or nothing was tried."""

pytestmark = pytest.mark.rotated(share=1 / 10, group="acceptance")


@pytest.mark.timeout(400)
async def test_bodies_that_are_held_open_delay_and_refuse_nobody(
    embedded_place: LogPlace, folder: Path, *, is_full: bool
) -> None:
    """500 senders each forge a signature, send half a body, say nothing more, and come again when they are refused."""
    rate, seconds, spare = (300.0, 15.0, 0.0) if is_full else (150.0, 3.0, 0.05)
    await _delay_nobody(embedded_place, folder, Attack("held", 500), rate=rate, seconds=seconds, spare=spare)


@pytest.mark.alone
@pytest.mark.timeout(400)
async def test_bodies_that_are_too_large_delay_and_refuse_nobody(
    embedded_place: LogPlace, folder: Path, *, is_full: bool
) -> None:
    """Some come in chunks until they are refused, some with a length just above the limit, and are sent in full."""
    rate, seconds, spare, senders = (300.0, 15.0, 0.0, 120) if is_full else (150.0, 3.0, 0.05, 12)
    await _delay_nobody(embedded_place, folder, Attack("large", senders), rate=rate, seconds=seconds, spare=spare)


@pytest.mark.full
@pytest.mark.timeout(400)
async def test_five_thousand_slow_connections_delay_and_refuse_nobody(embedded_place: LogPlace, folder: Path) -> None:
    """Heads a byte a second, bodies held open, bodies that are too large; all come again when they are refused.

    They have the lowest priority of a processor: why, `tests/slow_senders.py` says.
    """
    await _delay_nobody(embedded_place, folder, Attack("slow", 5000), rate=300.0, seconds=20.0, spare=0.0)


async def _delay_nobody(
    place: LogPlace, folder: Path, attack: "Attack", *, rate: float, seconds: float, spare: float
) -> None:
    """Hold that good senders' answers take at most twice as long beside such senders as alone, and so much longer."""
    pairs = []
    for number in range(PAIRS):
        alone, beside = [
            await _answers(place.another(f"{name}{number}"), folder, load, rate=rate, seconds=seconds)
            for name, load in (("alone", None), ("beside", attack))
        ]
        first, second = [f"{answers.rate:.0f}/s, {answers.memory / 2**20:.0f} MiB" for answers in (alone, beside)]
        pairs.append(
            f"p99 of the answers {1000 * alone.p99:.1f} ms alone ({first}), "
            f"{1000 * beside.p99:.1f} ms beside {attack.senders} that are {attack.kind} ({second})"
        )
        report(f"senders under {rate:g}/s of {SIZE} bytes: {pairs[-1]}")
        assert beside.memory < MAX_MEMORY[attack.kind]
        if beside.p99 <= max(2 * alone.p99, alone.p99 + spare) and min(alone.rate, beside.rate) > 0.9 * rate:
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
            *[tasks.create_task(hold_open(gateway.port, 500, length=8_000)) for _ in range(2 * connections)],
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
                    writer.write(FORGED % 2 + b"{}")
                    head = await reader.readuntil(b"\r\n\r\n")
                    length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
                    await reader.readexactly(int(length))
                    await asyncio.sleep(0.01)
            finally:
                writer.close()


class Attack(NamedTuple):
    """Senders of `tests.slow_senders`, in a process of their own."""

    kind: str
    senders: int

    async def begin(self, port: int, stack: AsyncExitStack) -> None:
        command = (sys.executable, "-m", "tests.slow_senders", str(port), str(self.senders), self.kind)
        process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE, cwd=ROOT)
        stack.push_async_callback(process.wait)
        stack.callback(process.kill)
        assert process.stdout is not None
        async with asyncio.timeout(60):
            assert await process.stdout.readline() == b"connected\n"


class Answers(NamedTuple):
    """What good senders got, each a 202: the 99th percentile of the seconds to an answer, and the answers a second."""

    p99: float
    rate: float
    memory: int
    """The most that the process had resident, in bytes."""


async def _answers(place: LogPlace, folder: Path, attack: "Attack | None", *, rate: float, seconds: float) -> Answers:
    async with AsyncExitStack() as stack:
        sinks = [await stack.enter_async_context(Sink(200)) for _ in range(2)]
        rules = RULES.format(first=sinks[0].url, second=sinks[1].url)
        gateway = GatewayProcess(folder, rules=rules, log=place.url, prefix=place.prefix)
        await stack.enter_async_context(gateway)
        if attack is not None:
            await attack.begin(gateway.port, stack)
        load = Load(gateway.port, rate=rate, size=SIZE)
        await load.send_for(WARM_UP)
        begun, memory, process = len(load.answers), 0, psutil.Process(gateway.pid)
        sending = asyncio.create_task(load.send_for(seconds))
        while not sending.done():
            memory = max(memory, process.memory_info().rss)
            await asyncio.wait([sending], timeout=0.5)
        sent_for = seconds
        # They have to be there, and to make room: where much else runs, that takes them longer.
        while attack is not None and min((refused := await _refused(gateway, attack)).values()) <= ATTACKS:
            assert sent_for < 10 * seconds, refused
            await load.send_for(1.0)
            sent_for += 1.0
    assert load.statuses().keys() == {202}, gateway.story()
    times = sorted([sent.answered_at - sent.at for sent in load.answers[begun:]])
    return Answers(times[int(0.99 * (len(times) - 1))], len(times) / sent_for, memory)


async def _refused(gateway: GatewayProcess, attack: "Attack") -> dict[str, float]:
    metrics = await gateway.metrics()
    return {reason: metrics.sum("gateway_rejected_total", reason=reason) for reason in REASONS[attack.kind]}
