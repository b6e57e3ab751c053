"""Measures how late the event loop runs timers."""

import asyncio

from gateway.telemetry.metrics import Metrics

INTERVAL = 0.25


async def watch_loop(metrics: Metrics) -> None:
    """Measure it, until cancelled."""
    clock = asyncio.get_running_loop().time
    while True:
        due = clock() + INTERVAL
        await asyncio.sleep(INTERVAL)
        metrics.event_loop_lag.observe(max(0.0, clock() - due))
