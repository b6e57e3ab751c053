"""How far a scan of records comes, and what its checkpoint says of that."""

import asyncio
from collections.abc import Sequence
from typing import Any, cast

import pytest
import structlog

from gateway.engine.control.records import ControlRecord
from gateway.engine.control.state import Control
from gateway.engine.jobs.job_progress import NOTHING, JobProgress
from gateway.engine.jobs.scan import Scan, skip_unreadable
from gateway.engine.successor_writer import always_false, always_true
from gateway.log.base import TopicSpec
from tests.memory_log import MemoryLog

TOPIC = "gateway.retry.20s"


class _Injector:
    async def inject(self, deliveries: Sequence[object], _is_wanted: object) -> list[bool]:
        return [True] * len(deliveries)


@pytest.mark.parametrize(("announced", "reached"), [(2, 2), (3, 3), (100, 3)])
async def test_a_scan_reaches_no_further_than_the_topic(announced: int, reached: int) -> None:
    """It was recreated since its end was looked up: what comes there below that end isn't scanned yet."""
    log = MemoryLog()
    await log.create([TopicSpec(name=TOPIC, partitions=1, retention=None)])
    for _ in range(3):
        await log.append(TOPIC, key=b"", value=b"", headers=[])
    published: list[ControlRecord] = []

    async def publish(record: ControlRecord) -> None:
        published.append(record)

    run = JobProgress(
        command=ControlRecord(kind="kick", name="route/build", state="requested", at=0.0),
        covers_commands_below=0,
        recreations=0,
        detail="",
        positions={},
        latest={},
        covered={},
        covered_until={},
        count=0,
        last_checkpoint={},
        previous_checkpoint={},
        last_heartbeat_at=0.0,
    )
    scan = Scan(
        log=log,
        control=Control(),
        injector=cast("Any", _Injector()),
        publish=publish,
        is_wanted=always_true,
        logger=structlog.get_logger(),
        sleep=asyncio.sleep,
        report_newer=lambda *_: None,
        runs=[run],
        is_expedited=True,
        state="requested",
        is_preempted=always_false,
        gives_up=always_false,
        stored=set(),
        dead_letter=skip_unreadable,
    )
    assert await scan.scan_topic(TOPIC, {}, {f"{TOPIC}/0": announced}, lambda *_: NOTHING)
    await scan.publish_checkpoint(run, "done", is_last=True)
    assert [record.checkpoint for record in published] == [{f"{TOPIC}/0": reached}]
