"""Attempts that can't be recorded, on real logs: deliveries go on, and what isn't recorded is counted."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiokafka.admin import AIOKafkaAdminClient

from dev.kafka import Cluster
from gateway.log.attempt_records import AttemptRecord, Decision, decode_attempt_record
from gateway.log.base import Partition, partition_of
from gateway.log.topics import Topics
from gateway.model import Result, UnreadableRecordError
from gateway.open_log import open_log
from gateway.settings import from_sources
from tests.acceptance.conftest import SOURCES, LogPlace
from tests.faults.test_partitions import make_topic
from tests.gateway_process import GatewayProcess
from tests.load import post, signed_post
from tests.sink import Answer, Sink

pytestmark = pytest.mark.rotated(share=1 / 12, group="faults")

RULES = (
    SOURCES
    + """
destinations:
  first: {{url: "{first}"}}
  second: {{url: "{second}"}}
routes:
  - {{name: all, from: github, to: [first, second], retry: {{schedule: [10m]}}}}
"""
)
WITHIN = 20.0
"""Seconds until what fails is given up, and until what is mended is used: an append takes 5, and so does the wait."""


@asynccontextmanager
async def failing(place: LogPlace, folder: Path) -> AsyncIterator[GatewayProcess]:
    """Run a gateway with a destination that refuses everything, and one that takes it."""
    async with Sink(Answer(status=404, body=b"no such hook")) as first, Sink(path="/second") as second:
        rules = RULES.format(first=first.url, second=second.url)
        async with GatewayProcess(folder, rules=rules, log=place.url, prefix=place.prefix) as gateway:
            yield gateway


async def send(gateway: GatewayProcess, name: str, count: int) -> None:
    for number in range(count):
        status, _ = await post(gateway.port, signed_post(b"{}", delivery=f"{name}-{number}"))
        assert status == 202


async def counts(gateway: GatewayProcess) -> tuple[int, int]:
    """Return how many attempts were recorded, and how many dropped."""
    metrics = await gateway.metrics()
    recorded = metrics.sum("gateway_attempt_records_total")
    return int(recorded), int(metrics.sum("gateway_attempt_records_dropped_total"))


async def counted(gateway: GatewayProcess, total: int) -> tuple[int, int]:
    """Return these numbers once they add up to so many."""
    until = time.monotonic() + WITHIN
    while sum(found := await counts(gateway)) < total:
        assert time.monotonic() < until, f"expected {total} attempts, got {found}"
        await asyncio.sleep(0.2)
    return found


async def stored(place: LogPlace) -> list[AttemptRecord]:
    log = await open_log(from_sources({"log": place.url}, {}), owner=False)
    topic, found = Topics(place.prefix).attempts, []
    try:
        readable, _ = await log.readable(topic)
        for number, (start, end) in readable.items():
            async for records in log.scan(Partition(topic, number), start, end):
                for record in records:
                    with contextlib.suppress(UnreadableRecordError):
                        found.append(decode_attempt_record(record))
    finally:
        await log.close()
    return found


@pytest.mark.timeout(120)
async def test_attempts_are_recorded_on_either_log(place: LogPlace, folder: Path) -> None:
    async with failing(place, folder) as gateway:
        await send(gateway, "a", 5)
        assert await counted(gateway, 5) == (5, 0)
        await gateway.stop()
    found = await stored(place)
    assert {(each.result, each.status, each.number, each.decision) for each in found} == {
        (Result.CLIENT_ERROR, 404, 1, Decision.RETRY)
    }
    assert len({each.event_id for each in found}) == 5
    assert all(each.response is not None and each.response.body == b"no such hook" for each in found)
    assert all(each.phases.first_byte is not None and each.seconds >= each.phases.first_byte for each in found)
    [rules] = {each.rules for each in found}
    assert rules


@pytest.mark.timeout(180)
async def test_while_the_topic_is_away_deliveries_go_on(kafka_place: LogPlace, folder: Path) -> None:
    async with failing(kafka_place, folder) as gateway:
        await send(gateway, "before", 5)
        assert await counted(gateway, 5) == (5, 0)
        topics = Topics(kafka_place.prefix)
        admin = AIOKafkaAdminClient(bootstrap_servers=kafka_place.servers)
        await admin.start()
        try:
            await admin.delete_topics([topics.attempts])
        finally:
            await admin.close()
        await send(gateway, "meanwhile", 20)
        recorded, dropped = await counted(gateway, 25)
        assert (recorded, dropped) == (5, 20)
        line = await gateway.line("attempt_records_dropped", timeout=5)
        assert line["reason"] == "append_failed"
        assert (await gateway.readiness())["ready"]
        assert not (await gateway.readiness()).get("unread"), "nothing else is affected"
        assert not gateway.lines("partitions_unavailable")
        log = await open_log(from_sources({"log": kafka_place.url}, {}), owner=False)
        try:
            await log.create([spec for spec in topics.specs([]) if spec.is_best_effort])
        finally:
            await log.close()
        await asyncio.sleep(12)
        await send(gateway, "after", 10)
        recorded, dropped = await counted(gateway, 35)
        assert recorded > 5
        metrics = await gateway.metrics()
        assert metrics.sum("gateway_deliveries_total", destination="second", outcome="delivered") == 35
        assert metrics.sum("gateway_retries_total") >= 35
    assert len(await stored(kafka_place)) == recorded - 5


@pytest.mark.full
@pytest.mark.timeout(240)
async def test_a_partition_without_a_leader_keeps_no_delivery_and_no_other_record_waiting(
    cluster: Cluster, cluster_place: LogPlace, folder: Path
) -> None:
    topics = Topics(cluster_place.prefix)
    await make_topic(cluster, topics.attempts, (1, 2, 3, 1))
    async with failing(cluster_place, folder) as gateway:
        await send(gateway, "before", 20)
        assert await counted(gateway, 20) == (20, 0)
        before = await stored(cluster_place)
        await asyncio.to_thread(cluster.nodes[3].kill)
        await send(gateway, "meanwhile", 80)
        recorded, dropped = await counted(gateway, 100)
        assert recorded + dropped == 100
        found = [each for each in await stored(cluster_place) if each not in before]
        assert {partition_of(each.event_id.encode(), 4) for each in found} <= {0, 1, 3}
        assert 0 < dropped < 60
        metrics = await gateway.metrics()
        assert metrics.sum("gateway_deliveries_total", destination="second", outcome="delivered") == 100
        await asyncio.to_thread(cluster.nodes[3].restart)
        await cluster.until_whole()
        await asyncio.sleep(12)
        await send(gateway, "after", 80)
        again, still = await counted(gateway, 180)
        assert (again, still) == (recorded + 80, dropped)


@pytest.mark.timeout(120)
async def test_foreign_records_in_the_topic_harm_nobody(place: LogPlace, folder: Path) -> None:
    async with failing(place, folder) as gateway:
        await send(gateway, "a", 3)
        await counted(gateway, 3)
        log = await open_log(from_sources({"log": place.url}, {}), owner=False)
        try:
            for headers in ([], [("gw_v", b"2")], [("gw_v", b"1"), ("gw_type", b""), ("gw_attempt", b"[]")]):
                await log.append(Topics(place.prefix).attempts, key=b"k", value=b"not ours", headers=headers)
        finally:
            await log.close()
        await send(gateway, "b", 3)
        assert await counted(gateway, 6) == (6, 0)
        await gateway.stop()
    async with failing(place, folder) as gateway:
        await send(gateway, "c", 3)
        await counted(gateway, 3)
    assert len(await stored(place)) >= 9


async def test_the_setting_decides_what_is_recorded(place: LogPlace, folder: Path) -> None:
    async with Sink(Answer(status=404)) as first, Sink(path="/second") as second:
        for index, (which, expected) in enumerate((("off", 0), ("failures", 1), ("all", 2))):
            where = folder / str(index)
            where.mkdir()
            environ = {"GATEWAY_ATTEMPTS": which}
            rules = RULES.format(first=first.url, second=second.url)
            async with GatewayProcess(
                where, rules=rules, log=place.url, prefix=place.prefix, environ=environ
            ) as gateway:
                await send(gateway, which, 1)
                await second.received(index + 1)
                await asyncio.sleep(1)
                assert await counts(gateway) == (expected, 0)
                await gateway.stop()
