"""Bytes are sacred: the body and the provider's headers are the same at the sink and in the topic as they were sent."""

import random
import sqlite3
from collections import defaultdict
from contextlib import AsyncExitStack, closing
from pathlib import Path

import orjson
import pytest
from aiokafka import AIOKafkaConsumer

from gateway.engine.control.records import DeadFilter
from gateway.log.embedded.log import MAX_RECORD_BYTES
from gateway.model import SUCCESSOR_HEADROOM
from tests.acceptance.conftest import SOURCES, LogPlace, operators
from tests.gateway_process import GatewayProcess
from tests.load import post, signed_post
from tests.sink import Request, Sink

pytestmark = pytest.mark.rotated(share=1 / 10, group="acceptance")

RULES = (
    SOURCES
    + """
destinations:
  first: {{url: "{first}"}}
  second: {{url: "{second}"}}
  replayed: {{url: "{replayed}"}}
routes:
  - {{name: all, from: github, to: [first, second, replayed], retry: {{schedule: [100ms]}}}}
"""
)
HEADERS = (
    ("User-Agent", "GitHub-Hookshot/044aadd"),
    ("X-Empty", ""),
    ("X-Odd-CASE", "inner  spaces\tand tabs"),
    ("x-repeated", "one"),
    ("X-Latin", "caf\xe9 \xff"),
    ("X-Repeated", "two"),
    ("X-Utf8", "naïve ✓".encode().decode("latin-1")),
)


@pytest.mark.rotated(share=1 / 2)
async def test_bodies_and_headers_are_identical_at_first_after_a_retry_after_a_replay_and_in_the_topic(
    place: LogPlace, folder: Path
) -> None:
    bodies = {
        "empty": b"",
        "one": b"\0",
        "binary": bytes(range(256)) * 40,
        "invalid": b'{"name":"\xff\xfe\xc3(\xed\xa0\x80"}\r\n',
        "limit": random.Random(1).randbytes(_limit("limit")),
    }
    tries: defaultdict[str, int] = defaultdict(int)

    def retried(request: Request) -> int:
        event = request.header("gateway-event-id") or ""
        tries[event] += 1
        return 425 if tries[event] == 1 else 200

    async with AsyncExitStack() as stack:
        first, second, replayed = [await stack.enter_async_context(Sink(each)) for each in (200, retried, 410)]
        rules = RULES.format(first=first.url, second=second.url, replayed=replayed.url)
        gateway = await stack.enter_async_context(
            GatewayProcess(folder, rules=rules, log=place.url, prefix=place.prefix)
        )
        ids: dict[str, str] = {}
        for name, body in bodies.items():
            status, ids[name] = await post(gateway.port, signed_post(body, delivery=name, headers=HEADERS))
            assert status == 202, name
        over = signed_post(bytes(len(bodies["limit"]) + 1), delivery="limit", headers=HEADERS)
        assert await post(gateway.port, over) == (413, "")

        await first.received(len(bodies))
        await second.received(2 * len(bodies))
        await gateway.until("gateway_dead_letters_total", len(bodies), reason="gone")
        replayed.answer(200)
        commands = await stack.enter_async_context(operators(place))
        placed = await commands.resolve("replay", DeadFilter(destination="replayed"))
        assert await commands.finished(placed, timeout=20) is not None
        await replayed.received(2 * len(bodies))

        for sink, times in ((first, 1), (second, 2), (replayed, 2)):
            for name, body in bodies.items():
                got = [request for request in sink.requests if request.header("gateway-event-id") == ids[name]]
                assert len(got) == times
                for request in got:
                    assert request.body == body, name
                    assert _own(request) == [(key.encode(), value.encode("latin-1")) for key, value in HEADERS]
        await gateway.stop()
        assert await _topic(place) == {ids[name]: body for name, body in bodies.items()}


def _limit(delivery: str) -> int:
    """Return how large a body may be beside the headers that it is sent with."""
    sent = signed_post(bytes(900_000), delivery=delivery, headers=HEADERS)  # its length has as many digits
    head = sent.partition(b"\r\n\r\n")[0].split(b"\r\n")[1:]
    return MAX_RECORD_BYTES - SUCCESSOR_HEADROOM - sum([len(line) - len(b": ") for line in head])


def _own(request: Request) -> list[tuple[bytes, bytes]]:
    """Return the headers that are the sender's beside those that `signed_post` always has."""
    names = {key.lower().encode() for key, _ in HEADERS}
    return [(key, value) for key, value in request.headers if key.lower() in names]


async def _topic(place: LogPlace) -> dict[str, bytes]:
    """Read the events' topic with another client: event's id → value."""
    topic = f"{place.prefix}events.github"
    if not place.is_kafka:
        with closing(sqlite3.connect(place.path)) as connection:
            rows = connection.execute(
                "SELECT headers, value FROM records JOIN topics ON topics.id = records.id >> 48 WHERE name = ?",
                (topic,),
            ).fetchall()
        return {dict(orjson.loads(headers))["ce_id"]: value for headers, value in rows}
    consumer = AIOKafkaConsumer(topic, bootstrap_servers=place.servers, auto_offset_reset="earliest")
    await consumer.start()
    try:
        found: dict[str, bytes] = {}
        ends = await consumer.end_offsets(consumer.assignment())
        while len(found) < sum(ends.values()):
            for records in (await consumer.getmany(timeout_ms=1000)).values():
                found |= {dict(record.headers)["ce_id"].decode(): record.value or b"" for record in records}
        return found
    finally:
        await consumer.stop()
