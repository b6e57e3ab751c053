"""Ordered routes: the order of each key holds at the destination, through crashes, a rebalance and retries."""

import asyncio
import hashlib
import time
from collections import defaultdict
from collections.abc import Collection
from contextlib import AsyncExitStack
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import orjson
import pytest
from typing_extensions import override

from gateway.engine.commit_progress import WINDOW
from gateway.log.base import Partition
from gateway.log.topics import Topics
from gateway.open_log import open_log
from gateway.settings import from_sources
from tests.acceptance.conftest import LogPlace
from tests.acceptance.test_destination_isolation import percentile
from tests.gateway_process import GatewayProcess
from tests.load import SECRET, Load, report
from tests.sink import Request, Sink

pytestmark = pytest.mark.rotated(share=1 / 10, group="acceptance")

RULES = f"""
version: 1
sources:
  github: {{{{verify: {{{{scheme: github, secrets: ["{SECRET}"]}}}}, key: string(body.k)}}}}
destinations:
  ordered: {{{{url: "{{ordered}}"}}}}
routes:
  - name: in-order
    from: github
    to: ordered
    order: key
    retry: {{{{schedule: [200ms, 1s], max_attempts: 1000}}}}
"""
BLOCKED = 0
"""The key whose first event is refused until the others are far beyond it."""
RETRIED = 31
"""One request in so many is answered with 503, whichever attempt of its delivery it is."""


class Keyed(Load):
    keys = 1

    @override
    def body(self, number: int) -> bytes:
        return b'{"n":%d,"k":%d}' % (number, number % self.keys)


class Destination:
    """Remembers what it was sent for each key, whatever it answered."""

    def __init__(self) -> None:
        self.is_blocked = True
        self.tried: dict[int, list[str]] = defaultdict(list)
        self.answered: dict[int, list[str]] = defaultdict(list)
        self.at: dict[str, float] = {}

    def answer(self, request: Request) -> int:
        key, event = orjson.loads(request.body)["k"], request.header("gateway-event-id") or ""
        self.tried[key].append(event)
        attempt = request.header("gateway-attempt") or ""
        chance = hashlib.blake2b(f"{event}{attempt}".encode(), digest_size=4).digest()
        if (key == BLOCKED and self.is_blocked) or int.from_bytes(chance, "big") % RETRIED == 0:
            return 503
        self.answered[key].append(event)
        self.at.setdefault(event, request.at)
        return 200


@pytest.mark.timeout(600)
@pytest.mark.rotated(share=1 / 2)
async def test_the_order_of_each_key_holds_through_crashes_rebalances_and_retries(
    place: LogPlace, folder: Path, *, is_full: bool
) -> None:
    keys, each, rate = (200, 500, 1200.0) if is_full else (20, 50, 250.0)
    destination = Destination()
    async with AsyncExitStack() as stack:
        sink = await stack.enter_async_context(Sink(destination.answer))
        processes: list[GatewayProcess] = []
        for _ in range(3 if place.is_kafka else 1):
            beside = processes[0] if processes else None
            rules = RULES.format(ordered=sink.url)
            gateway = GatewayProcess(folder, rules=rules, log=place.url, prefix=place.prefix, beside=beside)
            processes.append(await stack.enter_async_context(gateway))
        load = Keyed(processes[0].port, rate=rate)
        load.keys = keys
        sending = asyncio.create_task(load.send(keys * each))
        seconds = keys * each / rate
        began = time.time()
        # The embedded log's one partition stands still a window behind the blocked key: what goes wrong, goes wrong
        # before that.
        pause = min(seconds / 5, WINDOW / rate / 5)
        before_the_first = max(2.0, pause)
        await asyncio.sleep(before_the_first - 0.25)
        early = {
            sent.event_id: sent.answered_at
            for sent in load.answers
            if sent.status == 202
            and sent.number % keys != BLOCKED
            and sent.answered_at < began + before_the_first - 0.8
        }
        await until_at(destination, early)
        for process, wait in ((processes[0], 0.0), (processes[-1], pause - 0.25)):
            await asyncio.sleep(wait)
            await until_it_delivers(sink)
            process.kill()
            await asyncio.sleep(0.5)
            await process.start()
        await asyncio.sleep(pause)
        assert await processes[-1].stop() == 0
        await processes[-1].start()
        await sending
        written = await events_by_key(place)
        expected = {key: [event.id for event in events] for key, events in written.items()}
        first = written[BLOCKED][0]
        others = {key: [event.id for event in events if not event.is_beyond(first)] for key, events in written.items()}
        del others[BLOCKED]
        await until_answered(destination, others, timeout=200)
        assert set(destination.tried[BLOCKED]) == {expected[BLOCKED][0]}, "the blocked key waits at its first event"
        destination.is_blocked = False
        await until_answered(destination, expected, timeout=200)
        delays = [destination.at[event] - at for event, at in early.items()]
        repeated = 0
        for key, events in expected.items():
            assert [event for event, _ in groupby(destination.answered[key])] == events
            assert [event for event, _ in groupby(destination.tried[key])] == events
            repeated += len(destination.answered[key]) - len(events)
        report(
            f"ordered, {place.kind}: {keys} keys, {sum(map(len, expected.values()))} events, {len(sink.requests)} "
            f"requests; each key in order, {repeated} answered twice, right after themselves; "
            f"before the first crash, p99 from the 202 to the answer {1000 * percentile(delays, 0.99):.0f} ms"
        )
        assert percentile(delays, 0.99) < 2.5  # two retries of an event before it
        lost = set(load.acknowledged) - {event for events in destination.answered.values() for event in events}
        assert lost == set()


class Written(NamedTuple):
    """An event in the log."""

    id: str
    partition: int
    offset: int

    def is_beyond(self, unfinished: "Written") -> bool:
        """Whether its partition is not read as far as this while the other is unfinished."""
        return self.partition == unfinished.partition and self.offset >= unfinished.offset + WINDOW


async def events_by_key(place: LogPlace, source: str = "github") -> dict[int, list[Written]]:
    """Return the events of each key in a source's own topic, as the log has them."""
    topic = Topics(place.prefix).events(source)
    log = await open_log(from_sources({"log": place.url}, {}), owner=False)
    found: dict[int, list[Written]] = defaultdict(list)
    try:
        for number, (start, end) in (await log.bounds(topic)).items():
            async for records in log.scan(Partition(topic, number), start, end):
                for record in records:
                    event = Written(dict(record.headers)["ce_id"].decode(), number, record.offset)
                    found[orjson.loads(record.value)["k"]].append(event)
    finally:
        await log.close()
    return found


async def until_it_delivers(sink: Sink) -> None:
    """Wait for the end of a rebalance: the crash is to come amid deliveries."""
    for _ in range(40):
        before = len(sink.requests)
        await asyncio.sleep(0.25)
        if len(sink.requests) > before:
            return
    pytest.fail("expected a crash amid deliveries, got one at a standstill")


async def until_at(destination: Destination, events: Collection[str]) -> None:
    """Wait for what a crash would delay, and not for longer than that takes: how long it took is for the caller."""
    for _ in range(200):
        if destination.at.keys() >= set(events):
            return
        await asyncio.sleep(0.05)


async def until_answered(destination: Destination, expected: dict[int, list[str]], *, timeout: float) -> None:
    until = time.monotonic() + timeout
    while missing := sum(len(set(events).difference(destination.answered[key])) for key, events in expected.items()):
        assert time.monotonic() < until, f"expected every event, got none of {missing} in time"
        await asyncio.sleep(0.5)
