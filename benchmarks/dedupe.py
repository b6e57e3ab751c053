"""The cost of dedupe: memory and CPU time of a million identities, and how fast they are read back from the log.

python -m benchmarks.dedupe [count]
"""

import asyncio
import os
import sys
import tempfile
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import psutil
import structlog
from prometheus_client import CollectorRegistry

from gateway.engine.dedupe.filter import DuplicateFilter, PartitionDedupe
from gateway.engine.dedupe.index import DedupeIndex
from gateway.log.base import Assignment, Commit, Partition, Record
from gateway.log.embedded.log import EmbeddedLog
from gateway.log.records import DEDUPE_ENTRY
from gateway.log.topics import Topics
from gateway.model import Event, event_id
from gateway.rules.route_table import RouteTable
from gateway.rules.rules import Egress, Rules, Source
from gateway.telemetry.metrics import Metrics
from gateway.verify.schemes import build_verifier

MIB = 1 << 20
STEP = 5000
TOPICS = Topics()
PARTITION = Partition(TOPICS.events("stripe"), 0)
SOURCE = Source(name="stripe", path="/in/stripe", verifier=build_verifier({"scheme": "none"}), dedupe=3600.0)
RULES = Rules(sources={"stripe": SOURCE}, destinations={}, routes={}, egress=Egress(), table=RouteTable(()), files=())
EVENT = Event(id=event_id("stripe", "1"), source="stripe", type="charge", received_at=0.0, headers=(), body=bytes(1000))


def rows(start: int, count: int) -> list[bytes]:
    at = int(time.time() * 1e6)
    return [
        DEDUPE_ENTRY.pack(os.urandom(16), os.urandom(8), offset, at + offset) for offset in range(start, start + count)
    ]


def judged(count: int, *, traced: bool) -> str:
    """Decide on new identities, and measure the memory of each, at the peak of the second half."""
    process = psutil.Process()
    given = rows(0, STEP)
    index = DedupeIndex()
    if traced:
        tracemalloc.start()
    before, worst, seconds = process.memory_info().rss, 0.0, 0.0
    for start in range(0, count, STEP):
        del given
        given = rows(start, STEP)
        began = time.process_time()
        for row in given:
            index.add(row, 3600_000_000)
        seconds += time.process_time() - began
        if start >= count // 4:
            used = tracemalloc.get_traced_memory()[0] if traced else process.memory_info().rss - before
            worst = max(worst, used / index.count)
    tracemalloc.stop()
    return f"{worst * 1e6 / MIB:5.1f} MiB a million, {seconds / count * 1e6:5.2f} µs each"


def restored(count: int) -> str:
    """Restore identities from packed rows."""
    index = DedupeIndex()
    seconds = 0.0
    for start in range(0, count, STEP):
        packed = b"".join(rows(start, STEP))
        began = time.process_time()
        index.restore(packed)
        seconds += time.process_time() - began
    return f"{count / seconds:,.0f}/s"


async def through_the_log(count: int) -> str:
    """Decide on events, store their dedupe entries in an embedded log, and let a new owner read them back."""
    with tempfile.TemporaryDirectory() as folder:
        log = await EmbeddedLog.open(Path(folder) / "log.db", owner=True)
        try:
            await log.create(TOPICS.specs([PARTITION.topic]))
            reader, _ = _owner(log, 0)
            at, judging = log.now(), 0.0
            for start in range(0, count, STEP):
                events = [replace(EVENT, id=event_id("stripe", str(number))) for number in range(start, start + STEP)]
                records = [Record(start + index, at, b"", EVENT.body, ()) for index in range(STEP)]
                began = time.process_time()
                for record, event in zip(records, events, strict=True):
                    reader.is_duplicate(record, event)
                judging += time.process_time() - began
                await reader.flush()
            again, duplicates = _owner(log, count)
            async with asyncio.TaskGroup() as tasks:
                running = tasks.create_task(duplicates.run())
                began = time.perf_counter()
                assert await again.ready(Record(count, at, b"", b"", ())), "expected it to take less than 2 s"
                seconds = time.perf_counter() - began
                running.cancel()
            return f"{judging / count * 1e6:.2f} µs an event of 1 kB; read back at {count / seconds:,.0f}/s"
        finally:
            await log.close()


def _owner(log: EmbeddedLog, base: int) -> tuple[PartitionDedupe, DuplicateFilter]:
    duplicates = DuplicateFilter(
        log=log,
        topics=TOPICS,
        rules=lambda: RULES,
        metrics=Metrics(CollectorRegistry()),
        logger=structlog.get_logger(),
    )
    return duplicates.acquire(Assignment(PARTITION, Commit(base), 0)), duplicates


def main() -> None:
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    print(f"judged, by RSS:         {judged(count, traced=False)}")
    print(f"judged, by tracemalloc: {judged(count // 4, traced=True)}")
    print(f"restored from rows:     {restored(count)}")
    print(f"through the log:        {asyncio.run(through_the_log(count // 2))}")


if __name__ == "__main__":
    main()
