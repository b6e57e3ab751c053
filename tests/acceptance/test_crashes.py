"""The promise that counts: an acknowledged event is never lost, whatever is killed."""

import asyncio
import random
from pathlib import Path

import pytest

from tests.acceptance.conftest import RULES, LogPlace
from tests.gateway_process import GatewayProcess
from tests.load import Ledger, Load, all_delivered, report
from tests.sink import Sink


@pytest.mark.timeout(300)
async def test_no_acknowledged_event_is_lost_when_the_gateway_is_killed(
    place: LogPlace, folder: Path, *, is_full: bool
) -> None:
    events, rate, kills = (20_000, 1500, 5) if is_full else (1500, 750, 2)
    chance = random.Random(1)
    async with Sink(path="/first") as first, Sink(path="/second") as second:
        rules = RULES.format(first=first.url, second=second.url)
        async with GatewayProcess(folder, rules=rules, log=place.url, prefix=place.prefix) as gateway:
            load = Load(gateway.port, rate=rate)
            sending = asyncio.create_task(load.send(events))
            for number in range(1, kills + 1):
                while load.acknowledged_count < events * number / (kills + 1) + chance.randrange(100):
                    assert gateway.is_running, gateway.story()
                    await asyncio.sleep(0.005)
                gateway.kill()
                await gateway.start()
            await sending
            await all_delivered(load.acknowledged, first, second, timeout=60)
            ledgers = [Ledger.of(sink, load.acknowledged) for sink in (first, second)]
            title = f"killed {kills} times under {rate}/s, {place.kind}: {dict(load.statuses())}"
            report(title, *ledgers)
            assert [ledger.lost for ledger in ledgers] == [0, 0], gateway.story()
