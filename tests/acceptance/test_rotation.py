"""A source's secret is rotated under load: both verify, the sender switches, the old one ends. Nobody is refused.

As docs/operations.md has it, with a file whose content changes, and an end that comes by itself.
"""

import asyncio
import hashlib
import hmac
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.acceptance.conftest import LogPlace
from tests.gateway_process import GatewayProcess
from tests.load import post, report
from tests.sink import Sink

pytestmark = pytest.mark.rotated(share=1 / 10, group="acceptance")

RATE = 100.0
ENDS_AFTER = 7.0
"""Seconds from the writing of the rules: enough for a file to be seen twice, and for the sender to switch."""
OLD, NEW = "the old secret of a sender", "the new secret of a sender"
RULES = """
version: 1
sources:
  github:
    verify:
      scheme: github
      secrets: ["${{file:secret}}", {{secret: "${{file:secret_old}}", until: {until}}}]
destinations:
  sink: {{url: "{sink}"}}
routes:
  - {{name: all, from: github, to: [sink]}}
"""


def a_post(number: int, secret: str) -> bytes:
    body = b'{"n":%d}' % number
    signature = hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()
    head = (
        "POST /in/github HTTP/1.1\r\nHost: gateway.test\r\nX-GitHub-Event: push\r\nConnection: close\r\n"
        f"X-GitHub-Delivery: d{number}\r\nX-Hub-Signature-256: sha256={signature}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


@dataclass
class Sender:
    """Signs with the secret that it has, at a steady rate, and keeps books of the answers."""

    port: int
    secret: str
    accepted: dict[str, str] = field(default_factory=dict)
    """The ids of the events that were acknowledged, with the secret that each was signed with."""
    statuses: Counter[int] = field(default_factory=Counter)
    _number: int = 0

    async def send_until(self, is_over: Callable[[], bool]) -> None:
        async with asyncio.TaskGroup() as tasks:
            while not is_over():
                tasks.create_task(self._send(self._number, self.secret))
                self._number += 1
                await asyncio.sleep(1 / RATE)

    async def _send(self, number: int, secret: str) -> None:
        status, event = await post(self.port, a_post(number, secret))
        self.statuses[status] += 1
        if status == 202:
            self.accepted[event] = secret


async def test_a_rotation_under_load_refuses_nobody(embedded_place: LogPlace, folder: Path) -> None:
    (folder / "secret").write_text(OLD)
    (folder / "secret_old").write_text(OLD)
    async with Sink(200) as sink:
        rules = RULES.format(until="2999-01-01", sink=sink.url)
        async with GatewayProcess(folder, rules=rules, log=embedded_place.url) as gateway:
            sender = Sender(gateway.port, OLD)
            is_over = asyncio.Event()
            async with asyncio.TaskGroup() as tasks:
                sending = tasks.create_task(sender.send_until(is_over.is_set))
                await asyncio.sleep(0.5)
                ends_at = time.time() + ENDS_AFTER
                gateway.rules.write_text(RULES.format(until=_rfc3339(ends_at), sink=sink.url))
                (folder / "secret.new").write_text(NEW)
                (folder / "secret.new").rename(folder / "secret")
                await gateway.line("rules_reloaded", timeout=5)
                assert time.time() < ends_at - 1
                await _counted(gateway, position="2")
                sender.secret = NEW  # what was signed before may still be under way
                await _counted(gateway, position="1")
                await asyncio.sleep(0.2)
                before = await gateway.metrics()
                assert time.time() < ends_at, "the sender has switched before the old secret ends"
                await asyncio.sleep(max(0.0, ends_at - time.time()) + 0.5)
                is_over.set()
                await sending
            # All of it was decided without a reload.
            assert [await post(gateway.port, a_post(10_000 + n, OLD)) for n in range(3)] == [(401, "")] * 3
            assert (await post(gateway.port, a_post(10_003, NEW)))[0] == 202
            after = await gateway.metrics()
            await sink.received(len(sender.accepted) + 1, timeout=10)
            counts = Counter(sender.accepted.values())
            report(f"{len(sender.accepted)} events, {counts[OLD]} with the old secret, {dict(sender.statuses)}")
            assert sender.statuses == {202: len(sender.accepted)}, "nobody is refused"
            delivered = {request.header("gateway-event-id") for request in sink.requests}
            assert sender.accepted.keys() <= delivered
            assert counts[OLD] > 0
            assert counts[NEW] > 0
            old, new = [after.sum("gateway_secret_events_total", position=place) for place in ("2", "1")]
            assert old == before.sum("gateway_secret_events_total", position="2")
            # Before the file changed, the old secret was in both places, and counted at the first.
            assert old + new == len(sender.accepted) + 1
            assert abs(after.sum("gateway_secret_expiry_timestamp_seconds") - ends_at) < 1
            assert after.sum("gateway_rejected_total", reason="bad_signature") == 3
            assert gateway.output.read_text().count("rules_reloaded") == 1


async def _counted(gateway: GatewayProcess, *, position: str) -> None:
    """Wait until more than a few events have verified with a secret."""
    until = time.monotonic() + 5
    while (await gateway.metrics()).sum("gateway_secret_events_total", position=position) < 20:
        assert time.monotonic() < until, gateway.story()
        await asyncio.sleep(0.05)


def _rfc3339(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
