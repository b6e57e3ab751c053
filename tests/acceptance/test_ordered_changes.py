"""Ordered routes while a topic grows, and while processes go by different rules: on a real broker, with a ledger."""

import asyncio
import time
from collections import defaultdict
from itertools import groupby
from pathlib import Path

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions

from gateway.log.topics import Topics
from tests.acceptance.conftest import LogPlace
from tests.acceptance.test_ordered import Destination, Keyed, Written, events_by_key, until_answered
from tests.gateway_process import GatewayProcess
from tests.load import SECRET, post, report, signed_post
from tests.sink import Sink

pytestmark = pytest.mark.rotated(share=1 / 10, group="acceptance")

SOURCES = f"""
version: 1
sources:
  github: {{{{verify: {{{{scheme: github, secrets: ["{SECRET}"]}}}}, key: string(body.k)}}}}
"""
ORDERED = """
destinations:
  ordered: {{url: "{url}"}}
routes:
  - {{name: in-order, from: github, to: ordered, order: key, retry: {{schedule: [200ms, 1s], max_attempts: 1000}}}}
"""


def place_of(event: Written) -> tuple[int, int]:
    return event.partition, event.offset


async def grow(place: LogPlace, topic: str, partitions: int) -> None:
    admin = AIOKafkaAdminClient(bootstrap_servers=place.servers)
    await admin.start()
    try:
        await admin.create_partitions({topic: NewPartitions(total_count=partitions)})
    finally:
        await admin.close()


@pytest.mark.timeout(300)
async def test_a_topic_of_events_grows_under_an_ordered_route(
    kafka_place: LogPlace, folder: Path, *, is_full: bool
) -> None:
    """From 6 to 12 partitions under load, and the routes are reloaded after it; one of two is killed on the way."""
    keys, count, rate = (100, 20_000, 600.0) if is_full else (30, 2_000, 200.0)
    topics = Topics(kafka_place.prefix)
    destination = Destination()
    destination.is_blocked = False
    rules = SOURCES + ORDERED
    async with Sink(destination.answer) as sink:
        first = GatewayProcess(folder, rules=rules.format(url=sink.url), log=kafka_place.url, prefix=kafka_place.prefix)
        async with first:
            second = GatewayProcess(
                folder, rules=rules.format(url=sink.url), log=kafka_place.url, prefix=kafka_place.prefix, beside=first
            )
            async with second:
                load = Keyed(first.port, rate=rate)
                load.keys = keys
                sending = asyncio.create_task(load.send(count))
                await asyncio.sleep(count / rate / 3)
                grown_at = time.time()
                await grow(kafka_place, topics.events("github"), 12)
                await grow(kafka_place, topics.ordered("in-order", "ordered"), 8)
                await asyncio.sleep(2)
                added = "  - {{name: late, from: github, match: {{type: none}}, to: ordered, order: key}}\n"
                first.rules.write_text((rules + added).format(url=sink.url))
                for process in (first, second):
                    await process.line("rules_reloaded", timeout=30)
                second.kill()
                await asyncio.sleep(0.5)
                await second.start()
                await sending
                written = await events_by_key(kafka_place)
                expected = {key: [event.id for event in events] for key, events in written.items()}
                await until_answered(destination, expected, timeout=120)
    settled = {event for event, at in load.acknowledged.items() if at > grown_at + 5.0}
    assert settled, "expected some that came once all had noticed the growth"
    repeated = 0
    for key, events in expected.items():
        assert set(destination.answered[key]) == set(events)
        once = [event for event, _ in groupby(destination.answered[key])]
        repeated += len(destination.answered[key]) - len(set(events))
        wanted = [event.id for event in sorted(written[key], key=place_of) if event.id in settled]
        assert [event for event in dict.fromkeys(once) if event in settled] == wanted, "in order again after the growth"
    assert len({event.partition for events in written.values() for event in events}) > 6
    assert not set(load.acknowledged) - {event for events in destination.answered.values() for event in events}
    report(f"growth: {len(load.acknowledged)} acknowledged, 0 lost, {repeated} answered more than once")


SHARED = """  crm: {{verify: {{scheme: none}}, key: string(body.k), topic: {prefix}events.github}}
"""
OF_CRM = """  - {{name: crm, from: crm, to: ordered, order: key}}
"""


@pytest.mark.timeout(300)
async def test_events_of_a_new_source_read_by_older_rules_reach_its_ordered_route(
    kafka_place: LogPlace, folder: Path, *, is_full: bool
) -> None:
    """The source shares a topic, and half of its events are read by a router that doesn't know it yet."""
    if not is_full:
        pytest.skip("needs --full: what waits for a source waits for 20 s at a time")
    destination = Destination()
    destination.is_blocked = False
    folders = [folder / "first", folder / "second"]
    for each in folders:
        each.mkdir()
    async with Sink(destination.answer) as sink:
        older = (SOURCES + ORDERED).format(url=sink.url)
        newer = (SOURCES + SHARED + ORDERED + OF_CRM).format(url=sink.url, prefix=kafka_place.prefix)
        first, second = [
            GatewayProcess(each, rules=older, log=kafka_place.url, prefix=kafka_place.prefix) for each in folders
        ]
        async with first, second:
            first.rules.write_text(newer)
            await first.line("rules_reloaded", timeout=30)
            acknowledged: dict[int, list[str]] = defaultdict(list)

            async def send(count: int) -> None:
                for number in range(count):
                    key = number % 30
                    body = b'{"n":%d,"k":%d}' % (number, key)
                    status, event = await post(first.port, signed_post(body, delivery=str(number), path="/in/crm"))
                    assert status == 202
                    acknowledged[key].append(event)
                    await asyncio.sleep(0.01)

            await send(300)
            second.rules.write_text(newer)
            await second.line("rules_reloaded", timeout=30)
            await send(60)
            second.kill()
            await asyncio.sleep(0.5)
            await second.start()
            await send(60)
            await until_answered(destination, acknowledged, timeout=150)
            assert sum(map(len, acknowledged.values())) == 420
            assert {key: set(events) for key, events in acknowledged.items()} == {
                key: set(events) for key, events in destination.answered.items()
            }
    report("rules of two ages: 420 acknowledged, 0 lost")
