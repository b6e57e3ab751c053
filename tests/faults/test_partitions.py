"""Topics of a cluster that lose a leader, are deleted, grow, or have partitions that they must not have."""

import asyncio
import contextlib
import hashlib
import random
import sys
import time
from asyncio.subprocess import PIPE, STDOUT
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import uuid4

import pytest
from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions, NewTopic, RecordsToDelete

from dev.kafka import Cluster
from gateway.log.base import Assignment, Commit, Consumer, Partition, partition_of
from gateway.log.kafka.log import KafkaLog
from gateway.log.records import decode_event
from gateway.log.topics import Topics
from gateway.model import LogUnavailableError
from tests.acceptance.conftest import RULES, SOURCES, LogPlace
from tests.faults.accounts import Written, settle_ordered
from tests.faults.scenario import RULES as OF_SCENE
from tests.faults.scenario import Scenario, Table
from tests.gateway_process import ROOT
from tests.load import report
from tests.sink import Request, Sink

PATIENCE = 30.0
KEYS = 60
"""Enough for each of 12 partitions to have some, and so few that a key's next event waits while one is retried."""
REFUSED = 31
"""One request in so many is answered with 503 by the ordered route's destination."""

pytestmark = [pytest.mark.full, pytest.mark.timeout(240)]


class Owner:
    """A listener that notes what it owns."""

    def __init__(self) -> None:
        self.owned: set[Partition] = set()

    def assigned(self, assignments: Sequence[Assignment], without_position: Collection[Partition] = ()) -> None:  # noqa: ARG002 - the listener's signature
        self.owned.update(each.partition for each in assignments)

    def records_deleted(self, partition: Partition, deleted: range) -> None:
        pass

    def restarted(self, assignment: Assignment) -> None:
        pass

    async def revoked(self, partitions: Sequence[Partition]) -> Mapping[Partition, Commit]:
        self.owned.difference_update(partitions)
        return {}


@asynccontextmanager
async def administering(cluster: Cluster) -> AsyncIterator[AIOKafkaAdminClient]:
    admin = AIOKafkaAdminClient(bootstrap_servers=cluster.address, request_timeout_ms=10_000)
    await admin.start()
    try:
        yield admin
    finally:
        await admin.close()


async def make_topic(cluster: Cluster, name: str, nodes: Sequence[int], *, retention: float = 7 * 86400) -> None:
    """Make a topic of a partition for each of these nodes, which alone has it."""
    settings = {
        "message.timestamp.type": "LogAppendTime",
        "min.insync.replicas": "1",
        "retention.ms": str(int(1000 * retention)),
    }
    places = {number: [node] for number, node in enumerate(nodes)}
    async with administering(cluster) as admin:
        await admin.create_topics([NewTopic(name, -1, -1, replica_assignments=places, topic_configs=settings)])
    await cluster.until_whole()


def key_of(partition: int, partitions: int) -> bytes:
    return next(key for key in (b"%d" % number for number in range(1000)) if partition_of(key, partitions) == partition)


async def read_until(consumers: Sequence[Consumer], holds: Callable[[], bool]) -> list[bytes]:
    values: list[bytes] = []
    until = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < until, values
        for consumer in consumers:
            for batch in await consumer.fetch(timeout=0.05):
                values += [record.value for record in batch.records]
    return values


async def test_a_leaderless_partition_is_reported_others_are_read(cluster: Cluster) -> None:
    topic, group = f"t{uuid4().hex}", f"g{uuid4().hex}"
    await make_topic(cluster, topic, (1, 2, 3))
    lost = Partition(topic, 2)
    keys = [key_of(number, 3) for number in range(3)]
    log, other = await KafkaLog.open(cluster.address), await KafkaLog.open(cluster.address)
    try:
        first, second = Owner(), Owner()
        consumer = await log.consume(group=group, topics=[topic], listener=first)
        for key in keys:
            await log.append(topic, key=key, value=key, headers=[])
        seen: list[bytes] = []
        while len(seen) < 3:
            seen += await read_until([consumer], lambda: True) or [
                record.value for batch in await consumer.fetch(timeout=0.1) for record in batch.records
            ]
        assert consumer.unreadable() == {}
        await asyncio.to_thread(cluster.nodes[3].kill)
        await read_until([consumer], lambda: consumer.unreadable() == {lost: "no leader"})
        assert consumer.lag().keys() == {Partition(topic, 0), Partition(topic, 1)}

        # A member more: everything is shared out anew, and what can be read has an owner that reads it.
        another = await other.consume(group=group, topics=[topic], listener=second)
        both = (consumer, another)
        began = time.monotonic()
        await read_until(both, lambda: first.owned | second.owned == {Partition(topic, 0), Partition(topic, 1)})
        assert first.owned
        assert second.owned or another.unreadable()
        assert time.monotonic() - began < 10
        assert consumer.unreadable().keys() | another.unreadable().keys() == {lost}
        for key in keys[:2]:
            await log.append(topic, key=key, value=b"meanwhile", headers=[])
        got: list[bytes] = []
        while got.count(b"meanwhile") < 2:
            for each in both:
                got += [record.value for batch in await each.fetch(timeout=0.1) for record in batch.records]

        await asyncio.to_thread(cluster.heal)
        began = time.monotonic()
        got = await read_until(both, lambda: lost in first.owned | second.owned)
        await log.append(topic, key=keys[2], value=b"again", headers=[])
        while b"again" not in got:
            assert time.monotonic() - began < PATIENCE
            for each in both:
                got += [record.value for batch in await each.fetch(timeout=0.1) for record in batch.records]
        assert consumer.unreadable() == another.unreadable() == {}
        assert keys[2] in got  # what was in it before is read from its start, for nothing was committed
    finally:
        await log.close()
        await other.close()


@pytest.mark.parametrize("damage", ["content", "size"])
async def test_a_damaged_record_is_reported_what_is_before_it_and_elsewhere_is_read(
    cluster: Cluster, damage: str
) -> None:
    """No broker looks at the checksums of what it sends; where a size is wrong, it sends nothing, without an error."""
    topic = f"t{uuid4().hex}"
    await make_topic(cluster, topic, (1, 1))
    keys, count = [key_of(number, 2) for number in range(2)], random.randrange(2, 30)
    log = await KafkaLog.open(cluster.address)
    try:
        before = 0
        for number in range(count):
            before = cluster.nodes[1].segment_of(topic, 0).stat().st_size
            for key in keys:
                await log.append(topic, key=key, value=b"%d" % number, headers=[])
        segment = cluster.nodes[1].segment_of(topic, 0)
        place = segment.stat().st_size - 1 if damage == "content" else before + 11  # the last byte of its length
        flip(segment, place)
        consumer = await log.consume(group=f"g{uuid4().hex}", topics=[topic], listener=Owner())
        damaged = Partition(topic, 0)
        found = await read_until([consumer], lambda: "its records" in consumer.unreadable().get(damaged, ""))
        assert sorted(map(int, found)) == sorted([*range(count - 1), *range(count)])
        assert consumer.unreadable().keys() == {damaged}
        assert consumer.unreadable()[damaged].startswith(f"its records from {count - 1} on: ")
        with pytest.raises(LogUnavailableError):
            assert [records async for records in log.scan(damaged, count - 1, count)] == []
        bounds, unreadable = await log.readable(topic)
        assert (set(bounds), set(unreadable)) == ({1}, {0})
        flip(segment, place)
        assert await read_until([consumer], lambda: not consumer.unreadable()) == [b"%d" % (count - 1)]

        if damage == "size":
            return
        # There may be no sound copy: what is behind it is read once it is deleted.
        consumer.pause(damaged)
        await log.append(topic, key=keys[0], value=b"lost", headers=[])
        flip(segment, segment.stat().st_size - 1)
        await log.append(topic, key=keys[0], value=b"behind", headers=[])
        consumer.resume(damaged)
        assert await read_until([consumer], lambda: damaged in consumer.unreadable()) == []
        async with administering(cluster) as admin:
            where = TopicPartition(*damaged)
            await admin.delete_records({where: RecordsToDelete(before_offset=count + 1)})
        assert await read_until([consumer], lambda: consumer.lag().get(damaged) == 0) == [b"behind"]
        await consumer.close()
    finally:
        await log.close()


def flip(file: Path, place: int) -> None:
    """Change a byte, or change it back."""
    with file.open("r+b") as opened:
        opened.seek(place)
        [byte] = opened.read(1)
        opened.seek(place)
        opened.write(bytes([byte ^ 0xFF]))


async def test_a_partition_without_enough_replicas_is_reported_others_take_events(cluster: Cluster) -> None:
    """It has a leader, so that it can be read: no consumer misses it."""
    topic = f"t{uuid4().hex}"
    settings = {"message.timestamp.type": "LogAppendTime", "min.insync.replicas": "2"}
    places = {0: [1, 2], 1: [2, 1], 2: [1, 3]}
    async with administering(cluster) as admin:
        await admin.create_topics([NewTopic(topic, -1, -1, replica_assignments=places, topic_configs=settings)])
    await cluster.until_whole()
    lost, keys = Partition(topic, 2), [key_of(number, 3) for number in range(3)]
    log = await KafkaLog.open(cluster.address)
    try:
        consumer = await log.consume(group=None, topics=[topic], listener=Owner())
        for key in keys:
            await log.append(topic, key=key, value=key, headers=[])
        await asyncio.to_thread(cluster.nodes[3].end)
        until = time.monotonic() + PATIENCE
        while not (found := await log.refusing()):
            assert time.monotonic() < until
            for key in keys[:2]:
                await log.append(topic, key=key, value=b"meanwhile", headers=[])
            with contextlib.suppress(LogUnavailableError):
                await log.append(topic, key=keys[2], value=b"refused", headers=[])
            for key in keys[:2]:
                await log.append(topic, key=key, value=b"meanwhile", headers=[])
        assert found.keys() == {lost}
        assert "NotEnoughReplicas" in found[lost]
        await log.ping()
        assert consumer.unreadable() == {}
        await asyncio.to_thread(cluster.heal)
        while await log.refusing():
            assert time.monotonic() < until + PATIENCE
            await asyncio.sleep(0.2)
        await log.append(topic, key=keys[2], value=b"again", headers=[])
    finally:
        await log.close()


# Gateways under load


async def test_partitions_without_a_leader_for_a_minute_stop_no_other(
    cluster: Cluster, cluster_place: LogPlace, folder: Path, table: Table
) -> None:
    """Those of events and of a retry topic that one node alone has. Who starts meanwhile serves the rest."""
    events = f"{cluster_place.prefix}events.github"
    await make_topic(cluster, events, (1, 2, 3, 1, 2, 3))
    await make_topic(cluster, f"{cluster_place.prefix}retry.20h", (3, 3, 3, 3), retention=8 * 86400)
    async with Scenario(
        "a minute without leaders", cluster_place, folder, table, count=2, connections=1500
    ) as scenario:
        async with scenario.load():
            await scenario.acknowledged(200)
            began, node = time.time(), cluster.nodes[3]
            async with scenario.without_commits(node, cluster):
                await asyncio.to_thread(node.kill)
                await asyncio.sleep(12)  # until the cluster has missed it
                await scenario.restart(scenario.gateways[1])
                ready = await scenario.gateways[0].readiness()
                assert ready["ready"]
                unread = {(each["topic"], each["partition"]) for each in ready["unread"]}
                assert unread <= {(events, "2"), (events, "5")} | {
                    (f"{cluster_place.prefix}retry.20h", str(number)) for number in range(4)
                }
                assert unread
                await scenario.acknowledged(500, timeout=60)
                await asyncio.sleep(max(0.0, began + 60 - time.time()))
                await asyncio.to_thread(cluster.heal)
                await cluster.until_whole()
                await scenario.acknowledged(300, timeout=60)
        await scenario.settle(timeout=120)
        assert (await scenario.gateways[0].readiness()).get("unread") is None


async def test_topics_grow_under_load(cluster: Cluster, cluster_place: LogPlace, folder: Path, table: Table) -> None:
    """Under an ordered route, too, which keeps the order of each key in a partition, and in all after the growth."""
    topics = Topics(cluster_place.prefix)
    grown = (
        topics.events("github"),
        topics.ordered("in-order", "third"),
        topics.retry("5s"),
        topics.dead,
        topics.parked,
    )
    async with (
        Sink(answer_of_third, path="/third") as third,
        Scenario(
            "topics grow from 6 and 4 to 12",
            cluster_place,
            folder,
            table,
            count=2,
            rules=with_ordered(third.url),
            is_dev=False,
        ) as scenario,
    ):
        async with scenario.load():
            await scenario.acknowledged(200)
            began = time.time()
            async with administering(cluster) as admin:
                for name in grown:
                    await admin.create_partitions({name: NewPartitions(total_count=12)})
            await asyncio.sleep(12)
            settled_at = time.time()
            await scenario.acknowledged(1500, timeout=60)
            scenario.explain(began, time.time(), uncommitted=0)
            ends = await bounds_of(cluster, cluster_place, "events.github")
        assert len(ends) == 12
        assert all(ends.values()), ends
        await scenario.settle(timeout=90)
        acknowledged = scenario.sender.acknowledged
        await until_answered(third, acknowledged.keys())
        order = settle_ordered(
            acknowledged=acknowledged.keys(),
            answered=answered_by(third),
            written=await written_in(cluster, grown[0]),
            settled={event for event, at in acknowledged.items() if at > settled_at},
        )
    report(f"an ordered route: {len(acknowledged)} acknowledged, {order}")
    assert (order.lost, order.apart, order.misplaced) == (0, 0, 0), order
    assert order.repeated <= KEYS, order


def with_ordered(url: str) -> str:
    """Return the rules of a scenario with keys, and an ordered route to a destination of its own."""
    keyed = OF_SCENE.replace(SOURCES, SOURCES.replace("]}}}}", f"]}}}}, key: string(body.n % {KEYS})}}}}"))
    assert keyed != OF_SCENE
    destination = f'  third: {{{{url: "{url}", timeout: 2s}}}}\nroutes:'
    retry = "{{schedule: [200ms, 1s], max_attempts: 99}}"
    route = f"  - {{{{name: in-order, from: github, to: third, order: key, retry: {retry}}}}}\n"
    return keyed.replace("routes:", destination) + route


def answer_of_third(request: Request) -> int:
    """Refuse some attempts, whichever they are of their deliveries, and each of them always."""
    attempt = f"{request.header('gateway-event-id')} {request.header('gateway-attempt')}"
    chance = hashlib.blake2b(attempt.encode(), digest_size=4).digest()
    return 503 if int.from_bytes(chance, "big") % REFUSED == 0 else 200


def answered_by(third: Sink) -> list[str]:
    """Return the events that the ordered route's destination took, in the order in which they came."""
    return [request.header("gateway-event-id") or "" for request in third.requests if answer_of_third(request) == 200]


async def until_answered(third: Sink, events: Collection[str]) -> None:
    until = time.monotonic() + PATIENCE
    while not set(events) <= set(answered_by(third)) and time.monotonic() < until:  # noqa: ASYNC110 - a sink sets no event
        await asyncio.sleep(0.5)


async def test_a_retry_topic_that_is_deleted_stops_nothing_else_and_is_used_again_when_it_is_there(
    cluster: Cluster, cluster_place: LogPlace, folder: Path, table: Table
) -> None:
    """Without `--dev`. What is to wait there waits in memory meanwhile, and then in the recreated topic.

    There it has offsets of which a kick had taken all that they held before.
    """
    tier, rules = "retry.20s", OF_SCENE.replace("[100ms, 5s]", "[100ms, 20s]")
    assert rules != OF_SCENE
    async with Scenario(
        "a retry topic deleted", cluster_place, folder, table, count=2, rules=rules, is_dev=False
    ) as scenario:
        async with scenario.load():
            await scenario.acknowledged(300)
        await scenario.run_command("destination", "kick", "second")
        await scenario.until_all_came(timeout=60)
        kicked = await bounds_of(cluster, cluster_place, tier)
        assert any(kicked.values()), kicked
        began = time.time()
        async with administering(cluster) as admin:  # while nothing waits there, which would be lost
            await admin.delete_topics([f"{cluster_place.prefix}{tier}"])
        while await bounds_of(cluster, cluster_place, tier):
            assert time.time() < began + PATIENCE
        async with scenario.load():
            await scenario.add().start()
            for gateway in scenario.gateways:
                assert (await gateway.line("partitions_unavailable", timeout=30))["partitions"] == ["all"]
            await scenario.acknowledged(300)
            for gateway in scenario.gateways:
                assert (await gateway.readiness())["ready"]
            retried = [line["topic"] for gateway in scenario.gateways for line in gateway.lines("append_retried")]
            assert set(retried) == {f"{cluster_place.prefix}{tier}"}
            await scenario.run_command("topics", "create")
            for gateway in scenario.gateways:
                await gateway.line("partitions_available", timeout=30)
            await scenario.acknowledged(200)
            scenario.explain(began, time.time(), uncommitted=0)
        await scenario.settle(timeout=120)
        assert any((await bounds_of(cluster, cluster_place, tier)).values())


async def test_a_control_topic_of_three_partitions_is_refused_at_every_start(
    cluster: Cluster, cluster_place: LogPlace, folder: Path
) -> None:
    topics = Topics(cluster_place.prefix)
    log = await KafkaLog.open(cluster.address)
    try:
        await log.create(topics.specs([topics.events("github")]))
    finally:
        await log.close()
    async with administering(cluster) as admin:
        await admin.create_partitions({topics.control: NewPartitions(total_count=3)})
    rules = folder / "routes.yaml"
    rules.write_text(RULES.format(first="http://127.0.0.1:1/", second="http://127.0.0.1:1/"))
    where = (f"--rules={rules}", f"--log={cluster_place.url}", f"--topic-prefix={cluster_place.prefix}")
    for command in (
        ("topics", "check"),
        ("run", "--role=ingress", "--admin=127.0.0.1:0"),
        ("run", "--admin=127.0.0.1:0"),
        ("run", "--admin=127.0.0.1:0", "--dev"),
    ):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "gateway", *command, *where, cwd=ROOT, stdout=PIPE, stderr=STDOUT
        )
        async with asyncio.timeout(PATIENCE):
            output, _ = await process.communicate()
        assert process.returncode, output.decode()
        assert b"exactly 1, got 3" in output, output.decode()


async def bounds_of(cluster: Cluster, place: LogPlace, name: str) -> Mapping[int, int]:
    log = await KafkaLog.open(cluster.address)
    try:
        return {number: end for number, (_, end) in (await log.bounds(f"{place.prefix}{name}")).items()}
    finally:
        await log.close()


async def written_in(cluster: Cluster, topic: str) -> Mapping[str, Sequence[Written]]:
    """Return where each event is in a topic."""
    found: defaultdict[str, list[Written]] = defaultdict(list)
    log = await KafkaLog.open(cluster.address)
    try:
        for number, (start, end) in (await log.bounds(topic)).items():
            async for records in log.scan(Partition(topic, number), start, end):
                for record in records:
                    event = decode_event(record)
                    found[event.id].append(Written(event.key or "", number, record.offset))
    finally:
        await log.close()
    return found
