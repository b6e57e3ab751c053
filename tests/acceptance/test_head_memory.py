"""Heads that don't end take little memory, however many begin one."""

import asyncio
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from gateway.ingress.server import HEAD_OVERHEAD_FACTOR, Limits
from tests.acceptance.conftest import RULES, LogPlace
from tests.gateway_process import GatewayProcess
from tests.load import report

pytestmark = pytest.mark.rotated(share=1 / 10, group="acceptance")

LIMITS = Limits()
LINE = b"X-Some: %b\r\n" % (b"a" * 500)
HEAD = b"GET /x HTTP/1.1\r\nHost: hooks.example\r\n" + LINE * (
    HEAD_OVERHEAD_FACTOR * LIMITS.head_bytes // len(LINE) - 1
)
"""As much as is kept of one that doesn't end."""
OF_A_CONNECTION = 12 * 1024
"""Bytes that one takes that says nothing."""
OVERHEAD = 3
"""How many times its bytes a head takes at most: it is parsed, and what is freed of others isn't reused at once."""
SENDERS = 2000
SECONDS = 5.0
"""For which each stays."""


@pytest.mark.full  # it takes both processors of a small machine: what others measure beside it isn't theirs
@pytest.mark.timeout(200)
async def test_heads_that_do_not_end_take_little_memory(embedded_place: LogPlace, folder: Path) -> None:
    """Without a limit that they share, they take 194 MiB."""
    rules = RULES.format(first="http://127.0.0.1:9/", second="http://127.0.0.1:9/")
    async with (
        GatewayProcess(folder, rules=rules, log=embedded_place.url, prefix=embedded_place.prefix) as gateway,
        asyncio.TaskGroup() as tasks,
    ):
        process, gate = psutil.Process(gateway.pid), asyncio.Semaphore(100)
        before = most = process.memory_info().rss
        slow = [tasks.create_task(_begin_head(gateway.port, gate)) for _ in range(SENDERS)]
        while not all(task.done() for task in slow):
            most = max(most, process.memory_info().rss)
            await asyncio.sleep(0.1)
        evicted = (await gateway.metrics()).sum("gateway_rejected_total", reason="evicted")
    report(f"{SENDERS} heads of {len(HEAD)} bytes that don't end: {(most - before) / 2**20:.0f} MiB")
    assert most - before < OVERHEAD * LIMITS.heads_bytes + SENDERS * OF_A_CONNECTION
    assert evicted > SENDERS / 10, "else too few were there at a time"


async def _begin_head(port: int, gate: asyncio.Semaphore) -> None:
    async with gate:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(HEAD)
        with suppress(ConnectionError):
            await writer.drain()
    await asyncio.sleep(SECONDS)
    writer.close()
    with suppress(ConnectionError):
        await writer.wait_closed()
