"""Listening over connections that are cut at any byte: nothing is told twice, and nothing is missing."""

import asyncio
import os
import random

import pytest

from tests.gateway_process import GatewayProcess
from tests.listen.cutting_proxy import CuttingProxy
from tests.listen.listener import listening, send
from tests.sink import Sink

pytestmark = [pytest.mark.timeout(240), pytest.mark.rotated(share=1 / 5, group="listen")]


async def test_over_cut_connections_nothing_is_told_twice_and_nothing_is_missing(gateway: GatewayProcess) -> None:
    seed = int(os.environ.get("GATEWAY_TEST_SEED", "0")) or random.SystemRandom().getrandbits(32)
    async with Sink() as sink, CuttingProxy(gateway.admin_port, seed=seed) as proxy:
        async with listening("--json", "--api", proxy.url, "--forward", sink.url) as listener:
            proxy.cut_after(1, 8000)
            stored = []
            for number in range(120):
                stored.append(await send(gateway, b'{"number": %d}' % number))
                if number % 30 == 7:
                    await asyncio.sleep(1.1)
            events = await listener.has(len(stored))
            await asyncio.sleep(2.5)  # whatever would be told twice
            events = listener.events
            assert proxy.cuts > 20, (seed, proxy.cuts)
            assert "reconnecting in" in listener.notes
        positions = [event["position"] for event in events]
        assert len(set(positions)) == len(positions), f"seed {seed}"
        assert sorted(event["id"] for event in events) == sorted(stored), f"seed {seed}"
        assert [event["stored_at"] for event in events] == sorted(event["stored_at"] for event in events)
        assert [request.header("gateway-event-id") for request in sink.requests] == [event["id"] for event in events]
        assert {event["forward"]["status"] for event in events} == {200}
