"""The log is away, slow or flaps, and senders don't notice: their events are in the spool, and then in the log once.

what crosses                          what has to come of it
────────────────────────────────────  ──────────────────────────────────────────────────────────────
a broker that is killed, and back     only 202, in time; each event once in the log, keys in order
SIGKILL of the gateway in the outage  it starts without the log, and takes events at once
SIGKILL while it moves                nothing is moved twice
a broker that is slow                 only 202, in time; nothing twice
a broker that flaps, or is cut off    the same
a disk without space                  503, as without a spool; nothing of what was acknowledged is lost
an ingress that never comes back      another machine moves its spool
a replica that lags                   what it keeps from readers isn't stored again
a stop in the outage                  in time; the next process goes on
a start in the outage                 it reloads its rules, and stops at once
"""

import asyncio
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import aiohttp
import pytest
from aiokafka.client import AIOKafkaClient

from dev.kafka import Broker, Cluster
from gateway.log.base import Partition, Record, TopicSpec
from gateway.log.kafka import settled_ends
from gateway.log.kafka.log import KafkaLog
from gateway.log.records import decode_event
from gateway.model import EventId, LogUnavailableError
from gateway.open_log import open_log
from gateway.settings import from_sources
from tests.conftest import start_broker
from tests.faults.broker_behind_proxy import behind_a_proxy
from tests.faults.tcp_proxy import Way
from tests.gateway_process import GatewayProcess, free_ports
from tests.load import SECRET, Load, post, report, signed_post
from tests.sink import Sink

RULES = f"""
version: 1
sources:
  github:
    verify: {{{{scheme: github, secrets: ["{SECRET}"]}}}}
    key: string(int(body.n) % 20)
destinations:
  first: {{{{url: "{{url}}"}}}}
routes:
  - {{{{name: all, from: github, to: [first]}}}}
"""
TOPIC = "gateway.events.github"
LATEST_ANSWER = 2.0
"""Seconds within which every sender has its answer."""
pytestmark = [pytest.mark.timeout(300), pytest.mark.rotated(share=1 / 12, group="faults")]


@pytest.fixture
async def broker() -> AsyncIterator[Broker]:
    """A broker of this test's own, since it is killed."""
    broker = await asyncio.to_thread(start_broker)
    yield broker
    await asyncio.to_thread(broker.resume)
    await asyncio.to_thread(broker.stop)


def a_gateway(folder: Path, url: str, log: str, **environ: str) -> GatewayProcess:
    environ = {"GATEWAY_SPOOL": f"sqlite:///{folder / 'spool.db'}", **environ}
    return GatewayProcess(folder, rules=RULES.format(url=url), log=log, environ=environ)


async def check_that_it_is_told(gateway: GatewayProcess, *, events: int) -> None:
    """Check that API and console tell what is in the spool while the log is away, and soon why it isn't moved."""
    base, end = f"http://127.0.0.1:{gateway.admin_port}", time.monotonic() + 30.0
    async with aiohttp.ClientSession() as client:
        async with client.get(f"{base}/api/v1/spools") as response:
            [spool] = (await response.json())["items"]
        [topic] = spool["topics"]
        assert (spool["events"], topic["topic"], topic["events"]) == (events, TOPIC, events)
        page = ""
        while f"{events} events on its disk alone" not in page:
            assert time.monotonic() < end, page
            async with client.get(f"{base}/ui") as response:
                page = await response.text()
            assert "Not in the log yet" in page


async def until_drained(gateway: GatewayProcess, *, timeout: float = 60.0) -> None:
    end = time.monotonic() + timeout
    while (left := (await gateway.metrics()).sum("gateway_spool_events")) or not await is_up(gateway):
        assert time.monotonic() < end, f"{left} events are left in the spool: {gateway.story()}"
        await asyncio.sleep(0.2)


async def until_moved(gateway: GatewayProcess, *, timeout: float = 60.0) -> None:
    """Wait until everything that this process has spooled is moved, by counters that are never late."""
    end = time.monotonic() + timeout
    while True:
        found = await gateway.metrics()
        moved = found.sum("gateway_spool_moved_events_total") + found.sum("gateway_spool_found_events_total")
        if moved >= found.sum("gateway_spooled_events_total"):
            return
        assert time.monotonic() < end, gateway.story()
        await asyncio.sleep(0.2)


async def is_up(gateway: GatewayProcess) -> bool:
    return (await gateway.metrics()).sum("gateway_log_up") == 1


async def in_the_log(servers: str) -> Mapping[int, Sequence[Record]]:
    """Return the events' records by partition, in order."""
    log = await open_log(from_sources({"log": servers}, {}), owner=False)
    try:
        bounds, _ = await log.readable(TOPIC)
        found: dict[int, list[Record]] = {number: [] for number in bounds}
        for number, (start, end) in bounds.items():
            async for records in log.scan(Partition(TOPIC, number), start, end):
                found[number] += [record for record in records if record.headers]
        return found
    finally:
        await log.close()


def problems_of(load: Load, log: Mapping[int, Sequence[Record]]) -> list[str]:
    """Return what isn't as promised: each acknowledged event once, and in the order of its key."""
    sent = {EventId(each.event_id): each for each in load.answers if each.status == 202}
    ids = {number: [decode_event(record).id for record in records] for number, records in log.items()}
    times = Counter([id_ for each in ids.values() for id_ in each])
    problems = [f"lost: {each.number}" for id_, each in sent.items() if not times[id_]]
    problems += [f"{count} times: {id_}" for id_, count in times.items() if count > 1]
    for each in ids.values():
        answered: dict[int, float] = {}
        """Key → when the sender of the earliest answered of those that come later had its answer."""
        for event in reversed([sent[id_] for id_ in each if id_ in sent]):
            key = event.number % 20
            if answered.get(key, float("inf")) < event.at:
                problems.append(f"order: {event.number} comes before what was acknowledged before it was sent")
            answered[key] = min(answered.get(key, float("inf")), event.answered_at)
    return problems


def check_answers(load: Load, title: str, *, may_be_cut: bool = False) -> None:
    """Assert that senders saw only 202, in time (and, where the gateway is killed, connections that end)."""
    slowest = max(sent.answered_at - sent.at for sent in load.answers if sent.status == 202)
    report(f"{title}: {dict(load.statuses())}, slowest {slowest:.2f} s")
    assert load.statuses().keys() <= {202, *([0] if may_be_cut else [])}
    assert slowest <= LATEST_ANSWER


@pytest.mark.timeout(1200)
@pytest.mark.timeout(1500)  # ten minutes of it, with --full
async def test_a_broker_that_is_away_is_noticed_by_nobody(broker: Broker, folder: Path, *, is_full: bool) -> None:
    outage = 600.0 if is_full else 8.0
    log = f"kafka://{broker.address}"
    async with Sink() as sink, a_gateway(folder, sink.url, log) as gateway:
        load = Load(gateway.port, rate=300.0, connections=1000)
        sending = asyncio.create_task(load.send_for(outage + 6.0))
        await asyncio.sleep(2.0)
        await asyncio.to_thread(broker.kill)
        await asyncio.sleep(outage / 2)
        ready = await gateway.readiness()
        assert ready["ready"], gateway.story()
        assert any("events wait for the log" in note for note in ready["notes"])
        await asyncio.sleep(outage / 2)
        began, waiting = time.monotonic(), (await gateway.metrics()).sum("gateway_spool_events")
        await asyncio.to_thread(broker.restart)
        await sending
        await until_drained(gateway, timeout=60 + waiting / 1000)
        report(f"{waiting:.0f} events moved within {time.monotonic() - began:.1f} s")
        await sink.received(load.acknowledged_count, timeout=60 + waiting / 1000)
        check_answers(load, f"kafka away for {outage:g} s")
        assert problems_of(load, await in_the_log(log)) == [], gateway.story()
        assert gateway.lines("spool_began")
        assert gateway.lines("spool_drained")


async def test_kills_in_the_outage_and_while_it_is_moved_lose_and_repeat_nothing(
    broker: Broker, folder: Path, *, is_full: bool
) -> None:
    log = f"kafka://{broker.address}"
    async with Sink() as sink, a_gateway(folder, sink.url, log, GATEWAY_ROLE="ingress") as gateway:
        load = Load(gateway.port, rate=400.0, connections=400)
        before = Load(gateway.port, rate=400.0, connections=100, first=1_000_000)
        await before.send(100)
        await until_moved(gateway)  # a machine that is busy may take more than a second for the first ones
        await asyncio.to_thread(broker.kill)
        await load.send(800)
        gateway.kill()
        await gateway.start()  # without the log
        assert gateway.lines("spool_found")[0]["events"] == 800
        await load.send(4000 if is_full else 1200)
        await asyncio.to_thread(broker.restart)
        amid = 0
        for _ in range(6 if is_full else 3):
            moved = (await gateway.metrics()).sum("gateway_spool_moved_events_total")
            end = time.monotonic() + 30
            while (await gateway.metrics()).sum("gateway_spool_moved_events_total") == moved:
                if time.monotonic() > end or not (await gateway.metrics()).sum("gateway_spool_events"):
                    break
                await asyncio.sleep(0.01)
            found = await gateway.metrics()
            gateway.kill()
            moved = found.sum("gateway_spool_moved_events_total")
            amid += moved > 0 and found.sum("gateway_spool_events") > 0
            await gateway.start()
        assert amid, "expected to kill it while some of what it has was moved, and some not"
        await until_drained(gateway)
        assert problems_of(load, await in_the_log(log)) == [], gateway.story()
        check_answers(load, "killed in the outage, and while it moved", may_be_cut=True)


async def test_a_stop_in_the_outage_is_in_time_and_the_next_process_goes_on(broker: Broker, folder: Path) -> None:
    log = f"kafka://{broker.address}"
    async with Sink() as sink, a_gateway(folder, sink.url, log) as gateway:
        load = Load(gateway.port, rate=200.0, connections=400)
        await load.send(20)
        await asyncio.to_thread(broker.kill)
        await load.send(200)
        began = time.monotonic()
        assert await gateway.stop() == 0
        assert time.monotonic() - began < 27.0
        await asyncio.to_thread(broker.restart)
        await gateway.start()
        await until_drained(gateway)
        await sink.received(220, timeout=30)
        assert problems_of(load, await in_the_log(log)) == [], gateway.story()


async def test_a_process_without_the_log_reloads_its_rules_and_stops_at_once(folder: Path) -> None:
    [port] = free_ports(1)
    async with Sink() as sink, a_gateway(folder, sink.url, f"kafka://127.0.0.1:{port}") as gateway:
        load = Load(gateway.port, rate=50.0, connections=20)
        await load.send(10)
        gateway.rules.write_text(gateway.rules.read_text().replace("name: all", "name: renamed"))
        assert (await gateway.line("rules_reloaded"))["added"] == ["route renamed"]
        began = time.monotonic()
        assert await gateway.stop() == 0
        assert time.monotonic() - began < 15.0
        assert load.statuses() == {202: 10}


async def test_a_broker_that_flaps_repeats_nothing(broker: Broker, folder: Path, *, is_full: bool) -> None:
    log, rounds = f"kafka://{broker.address}", 6 if is_full else 2
    async with Sink() as sink, a_gateway(folder, sink.url, log, GATEWAY_ROLE="ingress") as gateway:
        load = Load(gateway.port, rate=300.0, connections=1000)
        sending = asyncio.create_task(load.send_for(rounds * 10.0 + 2.0))
        for _ in range(rounds):
            await asyncio.sleep(5.0)
            await asyncio.to_thread(broker.pause)
            await asyncio.sleep(5.0)
            await asyncio.to_thread(broker.resume)
        await sending
        await until_drained(gateway)
        check_answers(load, f"kafka frozen {rounds} times for 5 s")
        assert problems_of(load, await in_the_log(log)) == [], gateway.story()


async def test_a_connection_that_is_cut_again_and_again_repeats_nothing(folder: Path, *, is_full: bool) -> None:
    rounds = 6 if is_full else 2
    async with (
        behind_a_proxy() as (_, proxy),
        Sink() as sink,
        a_gateway(folder, sink.url, f"kafka://127.0.0.1:{proxy.port}", GATEWAY_ROLE="ingress") as gateway,
    ):
        load = Load(gateway.port, rate=300.0, connections=1000)
        sending = asyncio.create_task(load.send_for(rounds * 10.0 + 2.0))
        for _ in range(rounds):
            await asyncio.sleep(5.0)
            proxy.do(Way.RESET)
            await asyncio.sleep(5.0)
            proxy.do(Way.PASS)
        await sending
        await until_drained(gateway)
        check_answers(load, f"connections to kafka cut {rounds} times for 5 s")
        assert problems_of(load, await in_the_log(f"kafka://127.0.0.1:{proxy.port}")) == [], gateway.story()


async def test_a_slow_broker_makes_nobody_wait_and_repeats_nothing(folder: Path, *, is_full: bool) -> None:
    slow = 60.0 if is_full else 12.0
    async with (
        behind_a_proxy() as (_, proxy),
        Sink() as sink,
        a_gateway(folder, sink.url, f"kafka://127.0.0.1:{proxy.port}", GATEWAY_ROLE="ingress") as gateway,
    ):
        load = Load(gateway.port, rate=300.0, connections=1000)
        sending = asyncio.create_task(load.send_for(slow + 4.0))
        await asyncio.sleep(2.0)
        proxy.do(Way.SLOW)
        await asyncio.sleep(slow)
        proxy.do(Way.PASS)
        await sending
        await until_drained(gateway)
        check_answers(load, f"appends of 3 s for {slow:g} s")
        assert problems_of(load, await in_the_log(f"kafka://127.0.0.1:{proxy.port}")) == [], gateway.story()


async def test_without_space_it_refuses_as_without_a_spool(broker: Broker, folder: Path) -> None:
    log = f"kafka://{broker.address}"
    async with Sink() as sink, a_gateway(folder, sink.url, log) as gateway:
        load = Load(gateway.port, rate=200.0, connections=400)
        await load.send(20)
        await asyncio.to_thread(broker.kill)
        await load.send(100)
        await check_that_it_is_told(gateway, events=100)
        largest = largest_file(folder)
        before = resource.prlimit(gateway.pid, resource.RLIMIT_FSIZE, (largest + 4096, resource.RLIM_INFINITY))
        large = b'{"n":1,"filler":"%b"}' % (b"x" * 200_000)
        status, _ = await post(gateway.port, signed_post(large, delivery="large"))
        assert status == 503
        assert (await gateway.metrics()).sum("gateway_spool_refused_events_total", reason="unavailable") >= 1
        assert not (await gateway.readiness())["ready"]
        resource.prlimit(gateway.pid, resource.RLIMIT_FSIZE, before)
        assert (await post(gateway.port, signed_post(large, delivery="large")))[0] == 202
        assert (await gateway.readiness())["ready"]
        await asyncio.to_thread(broker.restart)
        await until_drained(gateway)
        await sink.received(121, timeout=30)
        assert problems_of(load, await in_the_log(log)) == [], gateway.story()


async def test_a_machine_that_never_comes_back_leaves_a_spool_that_another_moves(
    broker: Broker, folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    log = f"kafka://{broker.address}"
    lost = tmp_path_factory.mktemp("lost")
    async with (
        Sink() as sink,
        a_gateway(folder, sink.url, log, GATEWAY_ROLE="ingress") as gateway,
        a_gateway(lost, sink.url, log, GATEWAY_ROLE="ingress") as gone,
    ):
        loads = [
            Load(each.port, rate=200.0, connections=300, first=i * 1_000_000) for i, each in enumerate((gateway, gone))
        ]
        await asyncio.gather(*[load.send(20) for load in loads])
        await asyncio.to_thread(broker.kill)
        await asyncio.gather(*[load.send(300) for load in loads])
        gone.signal(signal.SIGKILL)
        await asyncio.to_thread(broker.restart)
        await until_drained(gateway)
        code, out, err = await run_command("spool", "move", f"--spool=sqlite:///{lost / 'spool.db'}", f"--log={log}")
        assert code == 0, err
        assert "300" in out
        for load in loads:
            found = await in_the_log(log)
            assert [each for each in problems_of(load, found) if not each.startswith("order")] == []


@pytest.mark.full
async def test_what_a_lagging_replica_keeps_from_readers_is_known_to_be_stored_perhaps(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or it would be looked for in vain, and stored again."""
    monkeypatch.setattr(settled_ends, "TIMEOUT", 0.5)
    log = await KafkaLog.open(cluster.address, repeats=False)
    try:
        partition = Partition(f"t{uuid4().hex[:12]}.lag", 0)
        await log.create([TopicSpec(name=partition.topic, partitions=1, retention=None)])
        await log.append(partition.topic, key=b"k", value=b"1", headers=[])
        leader = await cluster.leader(*partition)
        lagging = next(node for node in cluster.nodes.values() if node is not leader)
        [asked] = [number for number, node in cluster.nodes.items() if node is leader]
        monkeypatch.setattr(AIOKafkaClient, "get_random_node", lambda _: asked)  # the paused one would answer too late
        await asyncio.to_thread(lagging.pause)
        append = asyncio.create_task(log.append(partition.topic, key=b"k", value=b"2", headers=[]))
        await asyncio.sleep(0.2)  # the paused one is taken for in sync for 3 s
        assert await log.bounds(partition.topic) == {0: (0, 1)}
        with pytest.raises(LogUnavailableError, match="expected its replicas in sync to have all up to 2, got all up"):
            await log.settled(partition.topic, [0])
        await asyncio.to_thread(lagging.resume)
        async with asyncio.timeout(30):
            while True:
                with suppress(LogUnavailableError):
                    assert await log.settled(partition.topic, [0]) == ({0: (0, 2)}, {})
                    break
        await asyncio.wait({append})
    finally:
        await log.close()


def largest_file(folder: Path) -> int:
    return max(file.stat().st_size for file in folder.glob("spool.db*"))


async def run_command(*words: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "gateway",
        *words,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()
