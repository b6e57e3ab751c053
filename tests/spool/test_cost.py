"""What a spool costs an event that doesn't need it."""

import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from statistics import median

import pytest
import structlog
from prometheus_client import CollectorRegistry

from gateway.log.base import Position, TopicSpec
from gateway.log.records import encode_event
from gateway.settings import SpoolSettings
from gateway.spool.spool import open_spool
from gateway.telemetry.metrics import Metrics
from tests.builders import an_event
from tests.load import report
from tests.memory_log import MemoryLog

TOPIC = "gateway.events.github"
EVENTS = 20_000


@pytest.mark.full
async def test_an_event_that_the_log_takes_costs_microseconds_more(tmp_path: Path) -> None:
    log, headers = MemoryLog(), encode_event(an_event())
    await log.create([TopicSpec(name=TOPIC, partitions=6, retention=None)])
    settings = SpoolSettings(file=tmp_path / "spool.db", bytes=1 << 30, days=1.0)
    metrics = Metrics(CollectorRegistry())
    spool = await open_spool(settings, log=log, topics=list, metrics=metrics, logger=structlog.get_logger())

    async def seconds(append: Callable[..., Awaitable[Position | None]]) -> float:
        began = time.process_time()
        for _ in range(EVENTS):
            await append(TOPIC, key=b"k", value=b"{}", headers=headers)
        return (time.process_time() - began) / EVENTS

    pairs = [(await seconds(log.append), await seconds(spool.append)) for _ in range(7)]
    cost = median([spooled - direct for direct, spooled in pairs])
    report(f"a spool that isn't needed: {cost * 1e6:.1f} µs of CPU an event")
    assert cost < 50e-6
    await spool.close()
