"""Kafka dies under load: senders are told to come again, in time, and nothing that was acknowledged is lost."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dev.kafka import Broker
from tests.acceptance.conftest import RULES
from tests.conftest import start_broker
from tests.gateway_process import GatewayProcess
from tests.load import SECRET, Ledger, Load, all_delivered, post, report, signed_post
from tests.sink import Sink

pytestmark = pytest.mark.rotated(share=1 / 10, group="acceptance")

LATEST_ANSWER = 12.0
"""Seconds: senders such as GitHub give up after 10, most after 15 or more."""


@pytest.fixture
async def broker() -> AsyncIterator[Broker]:
    """A broker of this test's own, since it is killed."""
    broker = await asyncio.to_thread(start_broker)
    yield broker
    await asyncio.to_thread(broker.stop)


@pytest.mark.timeout(300)
async def test_while_kafka_is_down_senders_get_503_in_time_and_afterwards_all_resumes(
    broker: Broker, folder: Path, *, is_full: bool
) -> None:
    rate, outage, afterwards = (300.0, 20.0, 12.0) if is_full else (150.0, 6.0, 12.0)
    async with Sink(path="/first") as first, Sink(path="/second") as second:
        rules = RULES.format(first=first.url, second=second.url)
        async with GatewayProcess(folder, rules=rules, log=f"kafka://{broker.address}") as gateway:
            load = Load(gateway.port, rate=rate, connections=4096 if is_full else 1500)
            sending = asyncio.create_task(load.send_for(2 + outage + afterwards))
            await asyncio.sleep(2)
            await asyncio.to_thread(broker.kill)
            await asyncio.sleep(outage)
            before = load.acknowledged_count
            await asyncio.to_thread(broker.restart)
            await sending
            await all_delivered(load.acknowledged, first, second, timeout=60)

            slowest = max(sent.answered_at - sent.at for sent in load.answers)
            refused = [sent for sent in load.answers if sent.status == 503]
            ledgers = [Ledger.of(sink, load.acknowledged) for sink in (first, second)]
            title = f"kafka dead for {outage:g} s under {rate:g}/s: {dict(load.statuses())}, slowest {slowest:.1f} s"
            report(title, *ledgers)
            assert gateway.is_running, gateway.story()
            assert load.statuses().keys() == {202, 503}, gateway.story()
            assert all(b"\r\nretry-after: " in sent.head.lower() for sent in refused)
            assert slowest < LATEST_ANSWER
            assert load.acknowledged_count > before
            assert [ledger.lost for ledger in ledgers] == [0, 0], gateway.story()


async def test_rules_that_change_while_kafka_is_down_apply_once_it_is_up(broker: Broker, folder: Path) -> None:
    async with Sink() as first:
        rules = RULES.format(first=first.url, second=first.url)
        async with GatewayProcess(folder, rules=rules, log=f"kafka://{broker.address}") as gateway:
            await asyncio.to_thread(broker.kill)
            more = rules.replace("sources:", f'sources:\n  new: {{verify: {{scheme: github, secrets: ["{SECRET}"]}}}}')
            gateway.rules.write_text(more + "  - {name: new, from: new, to: [first]}\n")
            await gateway.until("gateway_rules_reloads_total", 1, result="error", timeout=30)
            await asyncio.to_thread(broker.restart)
            await gateway.line("rules_reloaded", timeout=40)
            status, _ = await post(gateway.port, signed_post(b"{}", delivery="1", path="/in/new"))
            assert status == 202, gateway.story()
            await first.received(1)
