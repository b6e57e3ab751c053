"""Retries, dead letters, replays, pauses and kicks, end to end: each event is delivered once, whatever its way."""

import asyncio
import time
from collections import Counter
from pathlib import Path

import pytest
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions

from gateway.engine.control.records import DeadFilter
from gateway.log.base import Commit, Log
from gateway.log.topics import ROUTER_GROUP, Topics
from gateway.open_log import open_log
from gateway.ops.control_client import ControlClient, StoredCommand
from gateway.settings import from_sources
from tests.acceptance.conftest import SOURCES, LogPlace, operators
from tests.gateway_process import GatewayProcess
from tests.load import Ledger, Load, all_delivered, deliveries, report
from tests.sink import Answer, Request, Sink

pytestmark = pytest.mark.rotated(share=1 / 10, group="acceptance")

RETRIED = (
    SOURCES
    + """
destinations:
  ci: {{url: "{ci}"}}
routes:
  - name: build
    from: github
    to: [ci]
    retry: {{schedule: [100ms, 200ms], max_attempts: 3, jitter: 0}}
"""
)
PATIENT = (
    SOURCES
    + """
destinations:
  ci: {{url: "{ci}"}}
  other: {{url: "{other}"}}
routes:
  - {{name: build, from: github, to: [ci, other], retry: {{schedule: [1h]}}}}
"""
)
TOO_EARLY = 425
"""Is retried, and says nothing of the destination's health: the breaker stays closed."""
COMMIT_WINDOW = 1.5
"""Seconds before a crash of which the progress may not be committed."""
CLOCKS = 0.01
"""Seconds by which Kafka's clock, read from stamps in milliseconds, may differ from the sink's."""
GROWN_AFTER = 8.0
"""Seconds within which producers and consumers know of new partitions."""
DUE_MARGIN = 6.5
"""Seconds after a command is carried out until its deliveries have come: the shortest tier, and a moment."""


async def test_a_delivery_is_retried_then_dead_lettered_and_a_replay_makes_all_its_attempts(
    long_place: LogPlace, folder: Path
) -> None:
    is_down = True

    def script(request: Request) -> int:
        attempt = int(request.header("gateway-attempt") or 0)
        if is_down or b'"n":1,' not in request.body:
            return TOO_EARLY if is_down else 200
        return 200 if attempt == 3 else TOO_EARLY

    async with Sink(script) as ci, _gateway(folder, long_place, RETRIED.format(ci=ci.url)) as gateway:
        load = Load(gateway.port, rate=500)
        await load.send(3)
        await ci.received(9)
        await gateway.until("gateway_deliveries_total", 3, outcome="dead_lettered")
        ids = [request.header("gateway-delivery-id") for request in ci.requests]
        assert sorted(Counter(ids).values()) == [3, 3, 3]
        assert Counter(request.header("gateway-attempt") for request in ci.requests) == {"1": 3, "2": 3, "3": 3}

        is_down = False
        before = len(ci.requests)
        async with operators(long_place) as commands:
            await _carried_out(commands, await commands.resolve("replay", DeadFilter(route="build")))
            await ci.received(before + 5, timeout=DUE_MARGIN)
            await _carried_out(commands, await commands.resolve("replay", DeadFilter(route="build")))
            again = await commands.resolve("replay", DeadFilter())
            finished = await commands.finished(again, timeout=10)
        await gateway.until("gateway_deliveries_total", 3, outcome="delivered")
        replayed = ci.requests[before:]
        assert finished is not None
        assert finished.count == 0  # what was replayed isn't a dead letter any more
        assert Counter(request.header("gateway-delivery-id") for request in replayed).keys() == set(ids)
        assert Counter(request.header("gateway-attempt") for request in replayed) == {"1": 3, "2": 1, "3": 1}
        report(f"retry, dead letter, replay, {long_place.kind}: 3 acknowledged, 3 dead, 3 delivered by the replay")


async def test_deliveries_to_a_paused_destination_are_parked_and_made_once_on_resume(
    long_place: LogPlace, folder: Path, *, is_full: bool
) -> None:
    count = 2000 if is_full else 200
    async with Sink(path="/ci") as ci, Sink(path="/other") as other:
        rules = PATIENT.format(ci=ci.url, other=other.url)
        async with _gateway(folder, long_place, rules) as gateway, operators(long_place) as commands:
            load = Load(gateway.port, rate=500)
            await load.send(count)
            await all_delivered(load.acknowledged, ci, other, timeout=10)
            await commands.pause("destination/ci")
            await gateway.until("gateway_destination_paused", 1, destination="ci")
            await load.send(count)
            await all_delivered(load.acknowledged, other, timeout=10)
            assert len(ci.requests) == count
            # Whoever is killed and comes back has not forgotten the pause.
            killed_at = time.time()
            exposed = {
                request.header("gateway-event-id")
                for request in other.requests
                if request.at > killed_at - COMMIT_WINDOW
            }
            await asyncio.to_thread(gateway.kill)
            await gateway.start()
            await load.send(count)
            await all_delivered(load.acknowledged, other, timeout=10)
            assert len(ci.requests) == count, gateway.story()
            placed = await commands.resume("destination/ci")
            assert placed is not None
            await load.send(count)
            await _carried_out(commands, placed)
            await all_delivered(load.acknowledged, ci, timeout=3 * DUE_MARGIN)
            await _until_nothing_is_left(long_place)
            if is_full:
                await asyncio.sleep(DUE_MARGIN)
            ledger = Ledger.of(ci, load.acknowledged)
            report(f"paused, parked, resumed, {long_place.kind}: {len(exposed)} exposed to the kill", ledger)
            assert ledger.lost == 0, gateway.story()
            # The kill may repeat what wasn't committed, of which each is parked once more; the resume nothing.
            repeated = {event: times for event, times in deliveries(ci).items() if times > 1}
            assert repeated.keys() <= exposed, gateway.story()
            assert set(repeated.values()) <= {2}, gateway.story()


async def test_a_kick_retries_waiting_deliveries_at_once(long_place: LogPlace, folder: Path) -> None:
    async with Sink(500, path="/ci") as ci, Sink(path="/other") as other:
        rules = PATIENT.format(ci=ci.url, other=other.url)
        async with _gateway(folder, long_place, rules) as gateway, operators(long_place) as commands:
            load = Load(gateway.port, rate=500)
            await load.send(4)
            await ci.received(4)
            await gateway.until("gateway_retry_backlog", 4)
            ci.answer(200)
            await _carried_out(commands, await commands.kick("destination/ci"))
            await ci.received(8, timeout=DUE_MARGIN)
            await gateway.until("gateway_deliveries_total", 4, destination="ci", outcome="delivered")
            assert sorted(deliveries(ci).values()) == [2, 2, 2, 2]
            assert len(other.requests) == 4


async def test_retry_after_holds_the_whole_destination_back(place: LogPlace, folder: Path) -> None:
    busy = Answer(status=429, headers=(("Retry-After", "2"),))
    async with Sink(busy, 200) as ci, _gateway(folder, place, RETRIED.format(ci=ci.url)) as gateway:
        load = Load(gateway.port, rate=500)
        await load.send(1)
        await ci.received(1)
        await load.send(20)
        await ci.received(22, timeout=15)
        first, *others = ci.requests
        assert min(request.at for request in others) - first.at >= 2.0 - CLOCKS
        assert Ledger.of(ci, load.acknowledged).lost == 0, gateway.story()
        assert (await gateway.metrics()).sum("gateway_breaker_open") == 0


def _gateway(folder: Path, place: LogPlace, rules: str) -> GatewayProcess:
    return GatewayProcess(folder, rules=rules, log=place.url, prefix=place.prefix)


async def _until_nothing_is_left(place: LogPlace) -> None:
    """Wait until all that is in the log, and isn't for later, is done and committed."""
    topics = Topics(place.prefix)
    log = await open_log(from_sources({"log": place.url}, {}), owner=False)
    try:
        async with asyncio.timeout(3 * DUE_MARGIN):
            for topic in (topics.events("github"), topics.retry("5s")):  # in the order that a delivery takes
                while await _unfinished(log, topic, topics):  # noqa: ASYNC110 - another process's progress sets no event
                    await asyncio.sleep(0.1)
    finally:
        await log.close()


async def _unfinished(log: Log, topic: str, topics: Topics) -> int:
    commits = await log.committed(topics.group(ROUTER_GROUP), topic)
    unfinished = 0
    for number, (start, end) in (await log.bounds(topic)).items():
        base, done, *_ = commits.get(number, Commit(start))
        unfinished += end - max(base, start) - int.from_bytes(done, "little").bit_count()
    return unfinished


async def test_a_resume_while_the_control_topic_grows_delivers_once(
    kafka_place: LogPlace, folder: Path, *, is_full: bool
) -> None:
    place, count = kafka_place, 2000 if is_full else 800
    async with Sink(path="/ci") as ci, Sink(path="/other") as other:
        rules = PATIENT.format(ci=ci.url, other=other.url)
        async with _gateway(folder, place, rules) as gateway, operators(place) as commands:
            await commands.pause("destination/ci")
            await gateway.until("gateway_destination_paused", 1, destination="ci")
            load = Load(gateway.port, rate=500)
            await load.send(count)
            await all_delivered(load.acknowledged, other, timeout=10)
            await gateway.until("gateway_parked_backlog", count)
            admin = AIOKafkaAdminClient(bootstrap_servers=place.servers)
            await admin.start()
            try:
                await admin.create_partitions({Topics(place.prefix).control: NewPartitions(total_count=3)})
            finally:
                await admin.close()
            await asyncio.sleep(GROWN_AFTER)
            placed = await commands.resume("destination/ci")
            assert placed is not None
            await _carried_out(commands, placed)
            await all_delivered(load.acknowledged, ci, timeout=3 * DUE_MARGIN)
            for name in ("ci", "other"):
                await commands.pause(f"destination/{name}")
                await gateway.until("gateway_destination_paused", 1, destination=name)
            await commands.pause("route/build")
            await gateway.until("gateway_route_paused", 1, route="build")
            ledger = Ledger.of(ci, load.acknowledged)
            report("resumed in a control topic that has grown", ledger)
            assert ledger.lost == 0, gateway.story()
            assert set(deliveries(ci).values()) == {1}, gateway.story()


async def _carried_out(commands: ControlClient, placed: StoredCommand) -> None:
    assert await commands.finished(placed, timeout=20) is not None
