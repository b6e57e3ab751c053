"""Memory is bounded by what is in use, whatever the fan-out, while the log accepts no append."""

import asyncio
import subprocess
import sys
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from typing_extensions import override

from gateway.engine.delivery import appends
from gateway.engine.delivery.appends import APPEND_OVERHEAD
from gateway.engine.memory_shares import COMMON_MEMORY
from gateway.engine.worker import Worker
from gateway.log.base import Partition, Position, RecordHeaders, partition_of
from gateway.log.records import encode_event, event_key, footprint
from gateway.log.topics import ROUTER_GROUP, TIERS
from gateway.model import Event, Result
from gateway.rules.rules import Route, Source
from gateway.verify.schemes import build_verifier
from tests.builders import a_policy, a_route, an_event
from tests.engine.test_worker import EVENTS, TOPICS, ScriptedClient, World, a_world, rules_of, running, virtual
from tests.memory_log import MemoryLog
from tests.virtual_time import now, run

pytestmark = pytest.mark.rotated(share=1 / 5, group="memory bounds")

ROOT = Path(__file__).parents[2]
MIB = 1 << 20


class StalledLog(MemoryLog):
    """Takes events, but no successor before `go_on`: too few replicas are in sync."""

    def __init__(self) -> None:
        super().__init__(now=now)
        self.goes_on = asyncio.Event()

    @override
    async def append(
        self, topic: str, *, key: bytes, value: bytes, headers: RecordHeaders, partition: int | None = None
    ) -> Position:
        if topic != EVENTS:
            await self.goes_on.wait()
        return await super().append(topic, key=key, value=value, headers=headers, partition=partition)


async def a_stalled_world(fan_out: int) -> tuple[World, StalledLog]:
    log = StalledLog()
    await log.create(TOPICS.specs([EVENTS]))
    names = [f"d{number}" for number in range(fan_out)]
    client = ScriptedClient({name: [Result.CONNECT] for name in names})
    return World(log=log, rules=rules_of(a_route(to=tuple(names))), client=client), log


async def recovered(world: World, log: StalledLog) -> None:
    """Let the log and all destinations go on, and wait until every delivery has ended well."""
    world.client.scripts.clear()
    log.goes_on.set()
    topics = [EVENTS, *[TOPICS.retry(tier) for tier in TIERS]]
    async with asyncio.timeout(3600):
        while any([await world.unfinished(topic) for topic in topics]):
            await world.doze(5)
    assert not world.dead()


def large_events(count: int, *, headers: int = 15, size: int = 500) -> list[Event]:
    named = {f"X-Header-{number}": "a value of thirty characters.." for number in range(headers)}
    return [
        an_event(id=f"evt_{number}", headers=named, body=b"%06d" % number + bytes(size), received_at=now())
        for number in range(count)
    ]


def taken(worker: Worker) -> int:
    return sum(len(tracker.records) for tracker in worker._router.trackers.values())


@pytest.mark.parametrize(("count", "fan_out", "headers"), [(60, 50, 15), (1000, 1, 15), (500, 1, 100), (1000, 1, 0)])
def test_the_counted_memory_is_about_the_real(count: int, fan_out: int, headers: int) -> None:
    run(_counted(count, fan_out, headers))


async def _counted(count: int, fan_out: int, headers: int) -> None:
    world, log = await a_stalled_world(fan_out)
    await world.put(*large_events(count, headers=headers))
    async with running(world) as worker:
        tracemalloc.start()
        try:
            await asyncio.sleep(20)
            traced, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert taken(worker) == count
        assert 0.55 < traced / (worker._router._memory_bytes + worker._dispatcher._appends.memory_bytes) < 1.1
        await recovered(world, log)
        assert worker._router._memory_bytes == 0


@pytest.mark.parametrize(("fan_out", "count", "least", "most"), [(50, 300, 100, 200), (300, 30, 15, 30)])
def test_a_reader_without_memory_postpones_the_rest_and_continues_with_it_in_order(
    fan_out: int, count: int, least: int, most: int
) -> None:
    run(_postponed(fan_out, count, least, most))


async def _postponed(fan_out: int, count: int, least: int, most: int) -> None:
    world, log = await a_stalled_world(fan_out)
    await world.put(*large_events(count))
    worker = world.worker()
    worker._router.set_memory_limit(8 * MIB)
    async with running(world, worker):
        await asyncio.sleep(20)
        assert COMMON_MEMORY * 8 * MIB <= worker._router._memory_bytes < 8 * MIB
        assert least < taken(worker) < most
        await recovered(world, log)
        assert worker._router._memory_bytes == 0
    delivered = {(name, event) for name, event, _ in world.client.made}
    assert len(delivered) == count * fan_out
    assert len(world.client.made) == len(set(world.client.made))


@virtual
async def test_appends_that_the_log_does_not_take_wait_without_headers_of_their_own() -> None:
    world, log = await a_stalled_world(50)
    await world.put(*large_events(100))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(appends, "MAX_BYTES_IN_APPENDS", MIB)
        async with running(world) as worker:
            await asyncio.sleep(20)
            assert taken(worker) == 100
            assert MIB <= worker._dispatcher._appends.memory_bytes < MIB + 2 * APPEND_OVERHEAD
            assert len(worker._dispatcher._in_flight) < MIB / APPEND_OVERHEAD
            await recovered(world, log)
            assert (worker._router._memory_bytes, worker._dispatcher._appends.memory_bytes) == (0, 0)


@virtual
async def test_a_drain_ends_appends_that_wait_for_others() -> None:
    world, log = await a_stalled_world(50)
    await world.put(*large_events(20))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(appends, "MAX_BYTES_IN_APPENDS", 20_000)
        async with running(world):
            await asyncio.sleep(5)
            log.goes_on.set()
        assert await world.unfinished() == 0
    assert sum([await world.unfinished(TOPICS.retry(tier)) for tier in TIERS]) == 20 * 50


@virtual
async def test_deferred_records_are_read_by_their_partitions_next_owner() -> None:
    world, log = await a_stalled_world(50)
    await world.put(*large_events(100))
    worker = world.worker()
    worker._router.set_memory_limit(4 * MIB)
    async with running(world, worker):
        await asyncio.sleep(5)
        async with running(world):
            await recovered(world, log)
    assert len({(name, event) for name, event, _ in world.client.made}) == 100 * 50


@pytest.mark.parametrize(("destinations", "count"), [(1, 300), (60, 10)])
def test_appends_to_partitions_without_a_leader_leave_memory_to_those_of_others(destinations: int, count: int) -> None:
    run(_beside_partitions_without_a_leader(destinations, count))


async def _beside_partitions_without_a_leader(destinations: int, count: int) -> None:
    bad, good = [f"bad{number}" for number in range(destinations)], "good"
    patient = a_policy(schedule=(60.0,), max_attempts=50, max_age=86400.0)
    world = await a_world(
        a_route("bad", to=tuple(bad), match={"type": "bad"}, retry=patient),
        a_route("good", to=(good,), match={"type": "good"}, retry=patient),
        good=[503, 200],
    )
    world.client.scripts.update({name: [503] for name in bad})
    lost = [
        Partition(topic, partition_of(name.encode(), width))
        for topic, width in (await world.log.partitions([TOPICS.retry(tier) for tier in TIERS])).items()
        for name in bad
        if partition_of(name.encode(), width) != partition_of(good.encode(), width)
    ]
    for partition in lost:
        world.log.lose_leader(partition)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(appends, "MAX_BYTES_IN_APPENDS", MIB)
        async with running(world) as worker:
            for number in range(count):
                await world.put(an_event(id=f"evt_{number}", received_at=now(), type="bad", key=f"k{number}"))
                await asyncio.sleep(0.1)
            await world.put(an_event(id="evt_good", received_at=now(), type="good"))
            await asyncio.sleep(600)
            assert len([name for name, *_ in world.client.made if name == good]) == 2, "due again after 60 s"
            world.client.scripts.clear()
            for partition in lost:
                world.log.find_leader(partition)
            await world.doze(600)
            assert worker._router._memory_bytes == 0
    assert {event for name, event, _ in world.client.made if name == bad[0]} == {f"evt_{n}" for n in range(count)}
    assert not world.dead()


@virtual
async def test_appends_to_a_leaderless_partition_are_freed_with_their_own_partition() -> None:
    world = await a_world(a_route(retry=a_policy(schedule=(60.0,), max_age=86400.0)), ci=[503])
    for topic, count in (await world.log.partitions([TOPICS.retry(tier) for tier in TIERS])).items():
        world.log.lose_leader(Partition(topic, partition_of(b"ci", count)))
    await world.put(*[an_event(id=f"evt_{n}", received_at=now(), key=f"k{n}") for n in range(300)])
    async with running(world) as worker:
        await asyncio.sleep(60)
        assert worker._dispatcher._appends.waiting > 200
        before = taken(worker)
        async with running(world):
            await asyncio.sleep(60)
            assert taken(worker) < before
            trackers = worker._router.trackers.values()
            theirs = [record.memory_bytes for tracker in trackers for record in tracker.records.values()]
            assert worker._router._memory_bytes == sum(theirs)


@pytest.mark.parametrize("sources", [1, 4])
def test_a_destination_whose_retries_cannot_be_stored_does_not_stop_sources_that_have_no_route_to_it(
    sources: int,
) -> None:
    run(_beside_retries_that_cannot_be_stored([f"busy{number}" for number in range(sources)]))


async def _beside_retries_that_cannot_be_stored(busy: list[str]) -> None:
    """The busy sources come one after the other; what they fill is never free before the other one comes."""
    patient = a_policy(max_age=1e6, max_attempts=100)
    routes = a_route(sources=tuple(busy), retry=patient), a_route("other", sources=("shop",), to=("audit",))
    world, lost = await a_world_of_sources([*busy, "shop"], *routes)
    worker = world.worker()
    worker._router.set_memory_limit(4 * MIB)
    async with running(world, worker):
        for name in busy:
            await put_into(world, name, 600, size=10_000)
            await asyncio.sleep(60)
        assert worker._router._memory_bytes >= COMMON_MEMORY * 4 * MIB
        await put_into(world, "shop", 200, size=10_000)
        await asyncio.sleep(10)
        assert len([name for name, *_ in world.client.made if name == "audit"]) == 200
        assert worker._router._memory_bytes < 4 * MIB
        world.client.scripts.clear()
        for partition in lost:
            world.log.find_leader(partition)
        await world.doze(3600)
        assert worker._router._memory_bytes == 0
    assert len({event for name, event, _ in world.client.made if name == "ci"}) == 600 * len(busy)
    assert not world.dead()


@virtual
async def test_what_is_fetched_of_many_partitions_fits_into_the_memory_beside_what_is_pending() -> None:
    limit, names = 8 * MIB, [f"source{number}" for number in range(20)]
    world, lost = await a_world_of_sources(names, a_route(sources=tuple(names), retry=a_policy(max_age=1e6)))
    for name in names:
        await put_into(world, name, 300, size=2_000)
    worker = world.worker()
    worker._router.set_memory_limit(limit)
    async with running(world, worker):
        trackers, most = worker._router.trackers.values(), 0
        for _ in range(200):
            await asyncio.sleep(0.1)
            fetched = [footprint(record) for tracker in trackers for record in tracker.buffered._records]
            assert sum(fetched) == sum([tracker.buffered.memory_bytes for tracker in trackers])
            most = max(most, worker._router._memory_bytes + sum(fetched))
        assert COMMON_MEMORY * limit < most <= limit
        assert all(tracker.records for tracker in trackers if tracker.delay is None), "each has room of its own"
        world.client.scripts.clear()
        for partition in lost:
            world.log.find_leader(partition)
        await world.doze(3600)
        assert worker._router._memory_bytes == sum([tracker.buffered.memory_bytes for tracker in trackers]) == 0
    assert len({event for _, event, _ in world.client.made}) == 300 * len(names)


async def a_world_of_sources(names: Sequence[str], *routes: Route) -> tuple[World, Sequence[Partition]]:
    """Return a world whose destination `ci` fails, and the partitions of its retries: without a leader."""
    verifier = build_verifier({"scheme": "none"})
    named = {name: Source(name=name, path=f"/in/{name}", verifier=verifier) for name in names}
    log = MemoryLog(now=now)
    await log.create(TOPICS.specs([TOPICS.events(name) for name in named]))
    world = World(log=log, rules=replace(rules_of(*routes), sources=named), client=ScriptedClient({"ci": [503]}))
    tiers = await log.partitions([TOPICS.retry(tier) for tier in TIERS])
    lost = [Partition(topic, partition_of(b"ci", count)) for topic, count in tiers.items()]
    for partition in lost:
        log.lose_leader(partition)
    return world, lost


async def put_into(world: World, source: str, count: int, *, size: int) -> None:
    for number in range(count):
        event = an_event(id=f"{source}_{number}", source=source, received_at=now(), body=bytes(size))
        await world.log.append(
            TOPICS.events(source), key=event_key(event), value=event.body, headers=encode_event(event)
        )


@virtual
async def test_a_returning_partition_accounts_for_its_adopted_records() -> None:
    world = await a_world(a_route(retry=a_policy(schedule=(60.0,), max_age=86400.0)), ci=[503])
    for topic, count in (await world.log.partitions([TOPICS.retry(tier) for tier in TIERS])).items():
        world.log.lose_leader(Partition(topic, partition_of(b"ci", count)))
    await world.put(*[an_event(id=f"evt_{n}", received_at=now(), key=f"k{n}") for n in range(100)])
    async with running(world) as worker:
        await asyncio.sleep(60)
        for _ in range(2):
            assert taken(worker) == 100
            for tracker in worker._router.trackers.values():
                assert tracker.memory_bytes == sum([record.memory_bytes for record in tracker.records.values()])
            await world.log.rebalance(TOPICS.group(ROUTER_GROUP))
            await asyncio.sleep(60)


@virtual
async def test_a_lost_partition_leaves_no_memory_with_records_that_cannot_be_decoded() -> None:
    world = await a_world(a_route())
    world.log.lose_leader(
        letters := Partition(TOPICS.dead, partition_of(b"k", len(await world.log.bounds(TOPICS.dead))))
    )
    tier = TOPICS.retry("5s")
    async with running(world, world.worker()) as first:
        for partition in await world.log.bounds(tier):
            for _ in range(100):
                await world.log.append(tier, key=b"k", value=bytes(10_000), headers=[], partition=partition)
        await asyncio.sleep(20)
        appends = first._dispatcher._appends
        before = appends.waiting
        assert before > 200
        async with running(world):
            await asyncio.sleep(60)
            theirs = [tracker.memory_bytes for tracker in first._router.trackers.values()]
            assert sum(theirs) <= first._router._memory_bytes < sum(theirs) + 20 * 12_000, "of appends in flight"
            assert appends.waiting < before
            world.log.find_leader(letters)
            await asyncio.sleep(60)
            assert first._router._memory_bytes == 0
    assert len(world.log.records(TOPICS.dead)) == len(await world.log.bounds(tier)) * 100


STALLED = """
import asyncio, os, resource
from tests.engine.test_memory_bounds import a_stalled_world, large_events, taken
from tests.engine.test_worker import Worker
from tests.virtual_time import run

resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))

def rss():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")

async def main():
    world, log = await a_stalled_world(50)
    for _ in range(70):
        await world.put(*large_events(1000, headers=1, size=0))
    events = rss()
    worker = world.worker()
    task = asyncio.create_task(worker.run())
    for _ in range(60):
        await asyncio.sleep(1)
    print(taken(worker), rss() - events, flush=True)
    os._exit(0)

run(main())
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_a_stalled_log_beside_fifty_failing_destinations_takes_bounded_memory() -> None:
    """70,000 events, each for 50 destinations that refuse: some 35 GB, were all of them taken."""
    child = subprocess.run([sys.executable, "-c", STALLED], cwd=ROOT, capture_output=True, check=True, timeout=100)
    records, grown = map(int, child.stdout.split())
    assert 1000 < records < 10_000
    assert grown < 360 * MIB  # the program, its buffers, ordered routes and the ingress have the rest of 512 MiB
