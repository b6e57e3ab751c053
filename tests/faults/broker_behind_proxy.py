"""A broker whose clients come through a proxy, which can stall, reset or slow down what they say."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from dev.kafka import Broker
from tests.conftest import start_broker
from tests.faults.tcp_proxy import TcpProxy
from tests.gateway_process import free_ports


@asynccontextmanager
async def behind_a_proxy() -> AsyncIterator[tuple[Broker, TcpProxy]]:
    """Start a broker that tells its clients to come through a proxy."""
    [port] = free_ports(1)
    async with TcpProxy(port) as proxy:
        settings = {"advertised.listeners": f"PLAINTEXT://127.0.0.1:{proxy.port}"}
        broker = await asyncio.to_thread(start_broker, settings, port)
        try:
            yield broker, proxy
        finally:
            await asyncio.to_thread(broker.stop)
