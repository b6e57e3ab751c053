"""What the log on Kafka promises beyond the contract: a real broker that dies, hangs, rebalances and compacts."""

import asyncio
import gc
import logging
import os
import random
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from dataclasses import replace
from functools import partial
from time import monotonic
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import aiokafka.client
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.admin import AIOKafkaAdminClient, NewPartitions, NewTopic, RecordsToDelete
from aiokafka.conn import AIOKafkaConnection
from aiokafka.consumer import fetcher
from aiokafka.errors import (
    CorruptRecordException,
    KafkaConnectionError,
    KafkaError,
    KafkaTimeoutError,
    NotEnoughReplicasError,
    NotLeaderForPartitionError,
    RequestTimedOutError,
)
from aiokafka.protocol.fetch import FetchResponse_v11
from aiokafka.protocol.metadata import MetadataRequest
from typing_extensions import override

from dev.kafka import Broker, Cluster
from gateway.log.base import (
    ALL,
    FETCH_BYTES,
    NO_TOPIC,
    Assignment,
    Batch,
    Commit,
    Consumer,
    NewRecord,
    Partition,
    Record,
    TopicSpec,
    partition_of,
)
from gateway.log.kafka import append_failures, scanner
from gateway.log.kafka import consumer as kafka_consumer
from gateway.log.kafka.append_failures import MIN_FAILURE_AGE
from gateway.log.kafka.broker_clock import BrokerClock
from gateway.log.kafka.cluster import EARLIEST, QUERY_TIMEOUT, REQUEST_TIMEOUT
from gateway.log.kafka.connection import METADATA_AGE, _passed, limit_aiokafka_log
from gateway.log.kafka.consumer import MAX_PARTITION_FETCH_BYTES, PULL_RECORDS, slices_of
from gateway.log.kafka.errors import translated_errors
from gateway.log.kafka.log import KafkaLog
from gateway.log.records import decode_event, encode_event, event_key
from gateway.model import Event, EventId, LogUnavailableError, RecordTooLargeError, UsageError
from tests.conftest import start_broker, start_kafka

pytestmark = pytest.mark.rotated(share=1 / 8, group="kafka")

PATIENCE = 20.0
SHORT = 1.0  # The append timeout of logs whose broker is going to fail.


class Owner:
    """A listener that records its calls."""

    def __init__(self, commit: Commit | None = None) -> None:
        self.commit = commit
        self.owned: dict[Partition, Assignment] = {}
        self.awaited: list[set[Partition]] = []
        self.told: list[str] = []
        self.deleted: list[int] = []

    def assigned(self, assignments: Sequence[Assignment], without_position: Collection[Partition] = ()) -> None:
        self.told.append("assigned")
        self.owned.update({each.partition: each for each in assignments})
        self.awaited.append(set(without_position))

    def records_deleted(self, partition: Partition, deleted: range) -> None:  # noqa: ARG002 - there is one partition
        self.deleted += list(deleted)

    def restarted(self, assignment: Assignment) -> None:
        self.told.append("restarted")
        self.owned[assignment.partition] = assignment

    async def revoked(self, partitions: Sequence[Partition]) -> Mapping[Partition, Commit]:
        self.told.append("revoked")
        self.owned.clear()
        return {} if self.commit is None else dict.fromkeys(partitions, self.commit)


@pytest.fixture
async def log(kafka: str) -> AsyncIterator[KafkaLog]:
    log = await KafkaLog.open(kafka)
    yield log
    await log.close()


@pytest.fixture(scope="module")
def mortal() -> Iterator[Broker]:
    """Return a broker for one test, which may kill it, and which creates topics on metadata requests."""
    broker = start_broker({"auto.create.topics.enable": "true"})
    yield broker
    broker.stop()


@asynccontextmanager
async def opened(broker: Broker) -> AsyncIterator[KafkaLog]:
    log = await KafkaLog.open(broker.address, append_timeout=SHORT)
    try:
        yield log
    finally:
        await log.close()


async def make_topic(log: KafkaLog, *, partitions: int = 1, compacted: bool = False) -> str:
    name = f"t{uuid4().hex}"
    await log.create([TopicSpec(name=name, partitions=partitions, retention=3600.0, compacted=compacted)])
    return name


async def make_topic_by(kafka: str, **settings: str) -> str:
    """Make a topic as an operator would, who knows nothing of us."""
    name = f"t{uuid4().hex}"
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka)
    await admin.start()
    try:
        configs = {setting.replace("_", "."): value for setting, value in settings.items()}
        await admin.create_topics([NewTopic(name, 1, 1, topic_configs=configs)])

        async def is_known() -> bool:
            [described] = await admin.describe_topics([name])
            return not described["error_code"]

        await until(is_known)  # what the controller has made, the broker hears of a moment later
    finally:
        await admin.close()
    return name


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    end = time.monotonic() + PATIENCE
    while not await holds():
        assert time.monotonic() < end
        await asyncio.sleep(0.02)


async def append(log: KafkaLog, topic: str, *values: bytes) -> None:
    for value in values:
        await log.append(topic, key=b"k", value=value, headers=[])


async def fetch(consumer: Consumer, count: int) -> list[Record]:
    records: list[Record] = []
    async with asyncio.timeout(PATIENCE):
        while len(records) < count:
            records += [record for batch in await consumer.fetch(timeout=0.5) for record in batch.records]
    return records


async def fetch_until(consumer: Consumer, condition: Callable[[], bool]) -> list[Batch]:
    batches: list[Batch] = []
    async with asyncio.timeout(PATIENCE):
        while not condition():
            batches += await consumer.fetch(timeout=0.05)
    return batches


async def took(seconds: float, call: Any, *, raises: type[Exception] | None) -> None:
    """Check that a call ends within that time, and how."""
    started = monotonic()
    if raises is None:
        await call
    else:
        with pytest.raises(raises):
            await call
    assert monotonic() - started < seconds


# Other clients


async def test_any_client_of_kafka_reads_the_exact_bytes_and_the_headers_of_cloudevents(
    kafka: str, log: KafkaLog
) -> None:
    topic = await make_topic(log)
    body = bytes(range(256)) * 8 + b"\xff\xfe"
    event = Event(
        id=EventId("evt_1"),
        source="github",
        type="push",
        received_at=1_700_000_000.5,
        headers=((b"Content-Type", b"application/json"), (b"X-Twice", b"1"), (b"x-twice", b"\xe4")),
        body=body,
    )
    position = await log.append(topic, key=event_key(event), value=event.body, headers=encode_event(event))
    other = AIOKafkaConsumer(topic, bootstrap_servers=kafka, auto_offset_reset="earliest")
    await other.start()
    try:
        async with asyncio.timeout(PATIENCE):
            record = await other.getone()
    finally:
        await other.stop()
    headers = dict(record.headers)
    assert (record.key, record.value, record.offset) == (b"evt_1", body, position.offset)
    assert headers["ce_specversion"] == b"1.0"
    assert headers["ce_id"] == b"evt_1"
    assert headers["ce_time"] == b"2023-11-14T22:13:20.500Z"
    assert headers["content-type"] == b"application/json"
    assert record.timestamp_type == 1, "expected LogAppendTime"
    (scanned,) = [record async for batch in log.scan(Partition(topic, 0), 0, 1) for record in batch]
    assert decode_event(scanned) == event


async def test_a_record_of_another_client_may_lack_key_value_and_headers(kafka: str, log: KafkaLog) -> None:
    topic = await make_topic(log)
    other = AIOKafkaProducer(bootstrap_servers=kafka)
    await other.start()
    try:
        await other.send_and_wait(topic, None, b"key")
        await other.send_and_wait(topic, b"value")
    finally:
        await other.stop()
    consumer = await log.consume(group=None, topics=[topic], listener=Owner())
    records = await fetch(consumer, 2)
    assert [(record.key, record.value, list(record.headers)) for record in records] == [
        (b"key", b"", []),
        (b"", b"value", []),
    ]
    await consumer.close()


async def test_offsets_that_another_tool_has_set_carry_no_bits(kafka: str, log: KafkaLog) -> None:
    """Base64 that isn't ours must not look like finished records."""
    topic = await make_topic(log)
    await append(log, topic, b"0", b"1", b"2")
    for metadata in ("", "AAAA", "gw1:%%%", "gw1:A", "ünï"):
        group = f"g{uuid4().hex}"
        other = AIOKafkaConsumer(topic, bootstrap_servers=kafka, group_id=group, enable_auto_commit=False)
        await other.start()
        await other.commit({TopicPartition(topic, 0): (1, metadata)})
        await other.stop()
        assert await log.committed(group, topic) == {0: Commit(1)}


async def test_a_commit_beyond_the_end_of_the_log_starts_again_from_its_start(log: KafkaLog) -> None:
    """After an unclean leader election: what is written at offsets below the base would never be read."""
    topic = await make_topic(log)
    await append(log, topic, b"0", b"1")
    group = f"g{uuid4().hex}"
    consumer = await log.consume(group=group, topics=[topic], listener=Owner(Commit(9, b"\x01")))
    await fetch(consumer, 2)
    await consumer.close()
    owner = Owner()
    consumer = await log.consume(group=group, topics=[topic], listener=owner)
    assert [record.value for record in await fetch(consumer, 2)] == [b"0", b"1"]
    assert owner.owned[Partition(topic, 0)].commit == Commit(0)
    await consumer.close()


# Topics


async def test_a_created_topic_keeps_every_promise_that_one_broker_can_keep(log: KafkaLog) -> None:
    specs = [
        TopicSpec(name=f"t{uuid4().hex}", partitions=3, retention=3600.0),
        TopicSpec(name=f"t{uuid4().hex}", partitions=1, retention=None),
        TopicSpec(name=f"t{uuid4().hex}", partitions=1, retention=None, compacted=True),
    ]
    assert await log.create(specs) == [spec.name for spec in specs]
    assert [len(await log.bounds(spec.name)) for spec in specs] == [3, 1, 1]
    problems = await log.check(specs)
    assert [(problem.topic, problem.is_fatal) for problem in problems] == [(spec.name, False) for spec in specs]
    assert all(problem.message == "replication factor: expected at least 3, got 1" for problem in problems)


@pytest.mark.parametrize(
    ("settings", "message", "is_fatal"),
    [
        ({"message_timestamp_type": "CreateTime"}, "message.timestamp.type: expected LogAppendTime", True),
        ({"retention_ms": "3599999"}, "retention.ms: expected at least 3600000, got 3599999", True),
        ({"retention_bytes": "1000"}, "retention.bytes: expected -1 (no limit), got 1000", False),
        ({"max_message_bytes": "1000000"}, "max.message.bytes: expected at least 1048588, got 1000000", True),
        ({"min_insync_replicas": "2"}, "min.insync.replicas: expected at most the replication factor 1, got 2", True),
        ({"cleanup_policy": "compact"}, "cleanup.policy: expected delete, got compact", True),
        ({"unclean_leader_election_enable": "true"}, "unclean.leader.election.enable: expected false", False),
    ],
)
async def test_checking_names_the_setting_that_breaks_a_promise(
    kafka: str, log: KafkaLog, settings: dict[str, str], message: str, *, is_fatal: bool
) -> None:
    topic = await make_topic_by(kafka, **{"message_timestamp_type": "LogAppendTime", **settings})
    problems = await log.check([TopicSpec(name=topic, partitions=1, retention=3600.0)])
    (problem,) = [problem for problem in problems if not problem.message.startswith("replication factor")]
    assert problem.message.startswith(message)
    assert problem.is_fatal is is_fatal
    assert problem.is_tolerable


async def test_an_impossible_topic_is_the_fault_of_the_configuration(log: KafkaLog) -> None:
    with pytest.raises(UsageError, match="not a name"):
        await log.create([TopicSpec(name="not a name", partitions=1, retention=3600.0)])


async def test_two_that_create_at_once_both_succeed(kafka: str, log: KafkaLog) -> None:
    spec = TopicSpec(name=f"t{uuid4().hex}", partitions=1, retention=3600.0)
    other = await KafkaLog.open(kafka)
    created = await asyncio.gather(log.create([spec]), other.create([spec]))
    assert sorted([list(names) for names in created]) == [[], [spec.name]]
    await other.append(spec.name, key=b"", value=b"", headers=[])
    await other.close()


async def test_no_question_makes_a_topic_even_where_the_broker_would(mortal: Broker) -> None:
    missing = f"t{uuid4().hex}"
    async with opened(mortal) as log:
        with pytest.raises(LogUnavailableError, match=missing):
            await log.append(missing, key=b"k", value=b"v", headers=[])
        with pytest.raises(LogUnavailableError, match=missing):
            await log.consume(group=None, topics=[missing], listener=Owner())
        consumer = await log.consume(group="g", topics=[missing], listener=(owner := Owner()))
        await fetch_until(consumer, lambda: "assigned" in owner.told)
        await consumer.close()
        assert [batch async for batch in log.scan(Partition(missing, 0), 0, 10)] == []
        assert await log.bounds(missing) == {}
        assert await log.committed("g", missing) == {}
        (problem,) = await log.check([TopicSpec(name=missing, partitions=1, retention=3600.0)])
        assert (problem.is_fatal, problem.is_missing) == (True, True)
    admin = AIOKafkaAdminClient(bootstrap_servers=mortal.address)
    await admin.start()
    assert missing not in await admin.list_topics()
    await admin.close()


# Gaps


async def test_a_scan_ends_where_only_gaps_follow(kafka: str, log: KafkaLog) -> None:
    """A transaction's marker has an offset and no record."""
    topic = await make_topic(log)
    other = AIOKafkaProducer(bootstrap_servers=kafka, transactional_id=uuid4().hex)
    await other.start()
    for value in (b"0", b"2"):
        async with other.transaction():
            await other.send_and_wait(topic, value)
    await other.stop()

    async def is_complete() -> bool:
        return await log.bounds(topic) == {0: (0, 4)}

    await until(is_complete)  # the last marker is written after its transaction's end was promised
    for start, end, expected in ((0, 4, [0, 2]), (0, 9, [0, 2]), (3, 4, []), (1, 2, []), (1, 3, [2])):
        async with asyncio.timeout(3):
            records = [record async for batch in log.scan(Partition(topic, 0), start, end) for record in batch]
        assert [record.offset for record in records] == expected
    consumer = await log.consume(group=None, topics=[topic], listener=Owner())
    assert [record.offset for record in await fetch(consumer, 2)] == [0, 2]
    await consumer.close()


async def test_a_scan_reads_a_compacted_topic(kafka: str, log: KafkaLog) -> None:
    topic = await make_topic_by(
        kafka, cleanup_policy="compact", segment_ms="50", min_cleanable_dirty_ratio="0.001", min_compaction_lag_ms="0"
    )
    partition = Partition(topic, 0)
    offsets: list[int] = []
    async with asyncio.timeout(PATIENCE):
        # Each append may begin a segment, and only those before the last are compacted.
        while 1 not in offsets or 2 in offsets:
            for key in (b"a", b"b", b"b"):
                position = await log.append(topic, key=key, value=b"", headers=[])
                if position.offset == 1:
                    await log.append(topic, key=b"only", value=b"", headers=[])
                    await log.append(topic, key=b"b", value=b"", headers=[])
            await asyncio.sleep(0.2)
            end = (await log.bounds(topic))[0][1]
            offsets = [record.offset async for batch in log.scan(partition, 0, end) for record in batch]
            if 0 not in offsets and 2 in offsets:
                break
    assert 2 in offsets, "expected the only record of its key to be kept"
    assert [record.offset async for batch in log.scan(partition, 0, 2) for record in batch] == []
    assert [record.offset async for batch in log.scan(partition, 1, 3) for record in batch] == [2]


# Scans


async def scanned(log: KafkaLog, partition: Partition, start: int = 0, end: int = 1 << 40) -> list[Record]:
    return [record async for batch in log.scan(partition, start, end) for record in batch]


async def test_scans_after_the_first_open_no_connection(log: KafkaLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """A job scans dozens of partitions, one after another, and a console is full of them."""
    topic, opened = await make_topic(log, partitions=3), list[str]()
    for number in range(3):
        await log.append_in_order(Partition(topic, number), [NewRecord(b"", b"%d" % number, [])])
    module: Any = aiokafka.client
    create_conn = module.create_conn

    async def counted(host: str, *rest: Any, **more: Any) -> Any:
        opened.append(host)
        return await create_conn(host, *rest, **more)

    monkeypatch.setattr(module, "create_conn", counted)
    assert [record.value for record in await scanned(log, Partition(topic, 0))] == [b"0"]
    assert opened
    opened.clear()
    at_once = await asyncio.gather(*[scanned(log, Partition(topic, number)) for number in (0, 1, 2, 1)])
    assert [record.value for records in at_once for record in records] == [b"0", b"1", b"2", b"1"]
    assert not opened


async def test_a_scan_goes_on_behind_records_that_are_deleted_under_it(kafka: str, log: KafkaLog) -> None:
    partition = Partition(await make_topic(log), 0)
    for _ in range(6):
        await log.append_in_order(partition, [NewRecord(b"", random.randbytes(900_000), [])])  # a fetch of its own
    found: list[int] = []
    async for batch in log.scan(partition, 0, 6):
        found += [record.offset for record in batch]
        if found == [0]:
            async with administering(kafka) as admin:
                await admin.delete_records({TopicPartition(*partition): RecordsToDelete(before_offset=4)})
    assert found == [0, 4, 5]


async def test_a_scan_that_finds_nothing_new_fails_in_time(log: KafkaLog, monkeypatch: pytest.MonkeyPatch) -> None:
    partition = Partition(await make_topic(log), 0)
    await append(log, partition.topic, b"0")

    async def beyond(partitions: Sequence[Partition], at: int) -> Mapping[Partition, int]:
        return dict.fromkeys(partitions, 0 if at == EARLIEST else 9)  # as of a log that has lost its end since

    monkeypatch.setattr(log._cluster, "offsets", beyond)
    await took(QUERY_TIMEOUT + 1, scanned(log, partition, 5), raises=LogUnavailableError)
    assert [record.value for record in await scanned(log, partition, 0, 1)] == [b"0"]


async def test_a_scan_ends_where_all_that_is_left_is_deleted(kafka: str, log: KafkaLog) -> None:
    partition = Partition(await make_topic(log), 0)
    for _ in range(4):
        await log.append_in_order(partition, [NewRecord(b"", random.randbytes(900_000), [])])
    found: list[int] = []
    async with asyncio.timeout(QUERY_TIMEOUT / 2):
        async for batch in log.scan(partition, 0, 4):
            found += [record.offset for record in batch]
            if found == [0]:
                async with administering(kafka) as admin:
                    await admin.delete_records({TopicPartition(*partition): RecordsToDelete(before_offset=4)})
    assert found == [0]


async def test_a_scan_waits_while_a_quota_is_used_up(log: KafkaLog, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broker then answers without any topic: KIP-219."""
    partition, waits = Partition(await make_topic(log), 0), list[float]()
    await append(log, partition.topic, b"0")
    await scanned(log, partition)
    client: Any = log._scanner._client
    send, answers = client.send, [FetchResponse_v11(150, 0, 0, []), FetchResponse_v11(0, 0, 0, [])]

    async def throttled(*request: Any) -> Any:
        waits.append(monotonic())
        return answers.pop(0) if answers else await send(*request)

    monkeypatch.setattr(client, "send", throttled)
    assert [record.value for record in await scanned(log, partition)] == [b"0"]
    assert waits[1] - waits[0] > 0.14
    assert len(waits) == 3


async def test_a_scan_asks_anew_who_leads_where_a_replica_has_nothing(
    log: KafkaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A former leader that has fallen behind answers as if it were the end: followers serve consumers, too."""
    partition, asked = Partition(await make_topic(log), 0), list[Partition]()
    await append(log, partition.topic, b"0")
    await scanned(log, partition)
    client: Any = log._scanner._client
    send, lags = client.send, [True, True]
    leader = log._cluster.leader

    async def lagging(*request: Any) -> Any:
        if not lags:
            return await send(*request)
        lags.pop()
        return FetchResponse_v11(0, 0, 0, [(partition.topic, [(0, 0, 0, 0, 0, [], -1, b"")])])

    async def counted(which: Partition) -> int:
        asked.append(which)
        return await leader(which)

    monkeypatch.setattr(client, "send", lagging)
    monkeypatch.setattr(log._cluster, "leader", counted)
    assert [record.value for record in await scanned(log, partition)] == [b"0"]
    assert asked == [partition] * 2


@pytest.mark.parametrize("fails", [True, False])
async def test_a_log_that_is_closed_amid_a_scan_leaves_nothing(
    kafka: str, monkeypatch: pytest.MonkeyPatch, *, fails: bool
) -> None:
    log = await KafkaLog.open(kafka)
    partition = Partition(await make_topic(log), 0)
    await append(log, partition.topic, b"0")
    await scanned(log, partition)
    client: Any = log._scanner._client
    send, is_asked = client.send, asyncio.Event()

    async def hanging(node: int, request: Any) -> Any:
        is_asked.set()
        await asyncio.sleep(0.3)
        if fails:
            raise KafkaConnectionError
        return await send(node, request)  # which connects again

    monkeypatch.setattr(client, "send", hanging)
    scan = asyncio.create_task(scanned(log, partition))
    await is_asked.wait()
    await log.close()
    with pytest.raises(LogUnavailableError) if fails else nullcontext():
        await scan
    assert not [each for each in client._conns.values() if each.connected()]
    assert client._sync_task is None


async def test_a_closed_log_scans_nothing(kafka: str) -> None:
    log = await KafkaLog.open(kafka)
    partition = Partition(await make_topic(log), 0)
    await append(log, partition.topic, b"0")
    await scanned(log, partition)
    await log.close()
    with pytest.raises(LogUnavailableError):
        await scanned(log, partition)


# Rebalances


async def test_a_commit_under_way_ends_before_its_partition_has_another_owner(kafka: str, log: KafkaLog) -> None:
    """A commit that failed is repeated by aiokafka, in the generation of then: it would undo the next owner's."""
    topic, group = await make_topic(log), f"g{uuid4().hex}"
    owner, next_owner = Owner(), Owner()
    consumer = await log.consume(group=group, topics=[topic], listener=owner)
    await fetch_until(consumer, lambda: bool(owner.owned))
    # A broker can't be asked for an error of our choice, at the moment of our choice.
    coordinator: Any = consumer._kafka._coordinator
    send = coordinator._do_commit_offsets
    generations = []

    async def refused_until_revoked(*arguments: Any) -> None:
        generations.append(coordinator.generation)
        if "revoked" not in owner.told:
            raise RequestTimedOutError
        await send(*arguments)

    coordinator._do_commit_offsets = refused_until_revoked
    committing = asyncio.create_task(consumer.commit({Partition(topic, 0): Commit(0)}))
    async with asyncio.timeout(PATIENCE):
        async with asyncio.TaskGroup() as tasks:
            other = await KafkaLog.open(kafka)
            joined = await other.consume(group=group, topics=[topic], listener=next_owner)
            tasks.create_task(fetch_until(consumer, lambda: committing.done() and len(owner.told) > 2))
            tasks.create_task(fetch_until(joined, lambda: "assigned" in next_owner.told))
    await other.close()
    assert len(generations) > 1
    assert len(set(generations)) == 1


async def test_revoked_partitions_are_committed_before_the_next_owner_has_them(kafka: str, log: KafkaLog) -> None:
    topic = await make_topic(log, partitions=2)
    await asyncio.gather(*[log.append(topic, key=b"%d" % n, value=b"", headers=[]) for n in range(20)])
    group = f"g{uuid4().hex}"
    staying, coming = Owner(Commit(2, b"\x05")), Owner()
    first = await log.consume(group=group, topics=[topic], listener=staying)
    await fetch(first, 20)
    first.pause(Partition(topic, 0))
    first.pause(Partition(topic, 1))
    other = await KafkaLog.open(kafka)
    second = await other.consume(group=group, topics=[topic], listener=coming)
    slowest, after = 0.0, list[Record]()
    async with asyncio.timeout(PATIENCE):
        while not (coming.owned and len(staying.owned) == 1):
            started = monotonic()
            found, _ = await asyncio.gather(first.fetch(timeout=0.05), second.fetch(timeout=0.05))
            slowest = max(slowest, monotonic() - started)
            if len(staying.told) > len(["assigned", "revoked"]):  # perhaps before the other one has its own
                after += [record for batch in found for record in batch.records]
    assert staying.told == ["assigned", "revoked", "assigned"]
    assert coming.told == ["assigned"]
    assert {each.commit for each in (*staying.owned.values(), *coming.owned.values())} == {Commit(2, b"\x05")}
    assert slowest < 0.5, "expected a fetch to keep its timeout during a rebalance"
    # Neither a pause nor a record of the old assignment outlives it.
    assert {record.offset for record in after or await fetch(first, 1)} >= {2}
    await other.close()
    await first.close()


async def test_a_predecessor_is_evicted_by_the_next_try_if_the_first_fails(
    kafka: str, log: KafkaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic, group, client = await make_topic(log), f"g{uuid4().hex}", f"gateway-{uuid4().hex}"
    killed = AIOKafkaConsumer(topic, bootstrap_servers=kafka, group_id=group, client_id=client)
    await killed.start()
    await until(lambda: is_member_of(log, group))
    successor = await KafkaLog.open(kafka, client_id=client)
    evict, tried = successor._cluster.evict, 0

    async def evict_the_second_time(*of: str) -> None:
        nonlocal tried
        tried += 1
        if tried == 1:
            raise LogUnavailableError("expected a response, got none")
        await evict(*of)

    monkeypatch.setattr(successor._cluster, "evict", evict_the_second_time)
    with pytest.raises(LogUnavailableError, match="got none"):
        await successor.consume(group=group, topics=[topic], listener=Owner())
    for _ in range(2):
        consumer = await successor.consume(group=group, topics=[topic], listener=Owner())
        await consumer.close()
    assert tried == 2, "expected a try until one succeeds, and none after it"
    await killed.stop()
    await successor.close()


async def is_member_of(log: KafkaLog, group: str) -> bool:
    return await log.members(group) == 1


async def test_a_listeners_failure_is_raised_by_the_fetch(log: KafkaLog) -> None:
    class Failing(Owner):
        @override
        def assigned(self, assignments: Sequence[Assignment], without_position: Collection[Partition] = ()) -> None:
            raise ZeroDivisionError(len(assignments))

    topic = await make_topic(log)
    consumer = await log.consume(group=f"g{uuid4().hex}", topics=[topic], listener=Failing())
    with pytest.raises(ZeroDivisionError):
        await fetch(consumer, 1)
    await consumer.close()


async def test_records_wait_until_the_owner_has_seen_a_new_assignment(log: KafkaLog) -> None:
    topic = await make_topic(log)
    await append(log, topic, b"0")
    owner = Owner()
    consumer = await log.consume(group=f"g{uuid4().hex}", topics=[topic], listener=owner)
    assert await fetch_until(consumer, lambda: bool(owner.owned)) == []
    consumer.pause(Partition(topic, 0))
    assert list(await consumer.fetch(timeout=0.3)) == []
    consumer.resume(Partition(topic, 0))
    assert [record.value for record in await fetch(consumer, 1)] == [b"0"]
    await consumer.close()


# aiokafka's failures


async def test_records_that_were_dropped_on_the_way_to_an_error_are_read_again(
    log: KafkaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library forgets what it has read of other partitions when one has a bad checksum."""
    topic = await make_topic(log)
    await append(log, topic, b"0", b"1")
    consumer = await log.consume(group=None, topics=[topic], listener=Owner())
    getmany = consumer._kafka.getmany
    dropped: list[object] = []

    async def getmany_that_fails_once(*partitions: TopicPartition, **options: Any) -> Any:
        found = await getmany(*partitions, **options)
        if found and not dropped:
            dropped.append(found)
            raise KafkaError("bad checksum")
        return found

    # No broker hands out a bad checksum when asked to.
    monkeypatch.setattr(consumer._kafka, "getmany", getmany_that_fails_once)
    assert [record.value for record in await fetch(consumer, 2)] == [b"0", b"1"]
    assert dropped
    await consumer.close()


@pytest.mark.parametrize("damaged", [1, 1_000], ids=["a record", "a backlog"])
async def test_a_partition_that_keeps_failing_keeps_no_other_from_being_read(
    log: KafkaLog, monkeypatch: pytest.MonkeyPatch, damaged: int
) -> None:
    backlog, bad, live = await make_topic(log), await make_topic(log), await make_topic(log)
    numbers, body = range(6_000), os.urandom(1_000)
    await asyncio.gather(
        *[log.append(backlog, key=b"%d" % each, value=body, headers=[]) for each in numbers],
        *[log.append(bad, key=b"%d" % each, value=body, headers=[]) for each in numbers[:damaged]],
        *[log.append(live, key=b"%d" % each, value=b"", headers=[]) for each in numbers[:10]],
    )
    unpack: Any = fetcher.PartitionRecords._unpack_records
    failures = 0

    def unpack_bad(records: Any) -> Iterator[Any]:
        nonlocal failures
        if records._tp.topic == bad:
            failures += 1
            raise CorruptRecordException("Invalid CRC")
        yield from unpack(records)

    # No broker hands out a bad checksum when asked to.
    monkeypatch.setattr(fetcher.PartitionRecords, "_unpack_records", unpack_bad)
    consumer = await log.consume(group=f"g{uuid4().hex}", topics=[backlog, bad, live], listener=Owner())
    records = await asyncio.wait_for(fetch(consumer, len(numbers) + 10), 20)
    assert failures
    assert sorted(int(record.key) for record in records) == sorted([*numbers, *numbers[:10]])
    monkeypatch.undo()
    mended = await fetch(consumer, damaged)
    assert [int(record.key) for record in mended] == list(numbers[:damaged])
    await consumer.close()


@pytest.mark.parametrize("group", [None, "g"], ids=["a reader", "a member"])
@pytest.mark.parametrize("others", [0, 1], ids=["alone", "beside another"])
async def test_a_partition_whose_records_fail_is_reported_and_read_up_to_them(
    log: KafkaLog, monkeypatch: pytest.MonkeyPatch, group: str | None, others: int
) -> None:
    """Until its records can be read again; a reader beside it is as quick as without it."""
    bad, other = await make_topic(log), await make_topic(log)
    good = random.randrange(1, 300)
    for each in range(good + 1):  # a batch each
        await append(log, bad, b"%d" % each)
    unpack: Any = fetcher.PartitionRecords._unpack_records

    def unpack_bad(records: Any) -> Iterator[Any]:
        for record in unpack(records):
            if record.topic == bad and record.offset == good:
                raise CorruptRecordException("Invalid CRC")
            yield record

    # No broker hands out a bad checksum when asked to.
    monkeypatch.setattr(fetcher.PartitionRecords, "_unpack_records", unpack_bad)
    topics = [bad, other][: 1 + others]
    consumer = await log.consume(group=group and f"g{uuid4().hex}", topics=topics, listener=Owner())
    before = await asyncio.wait_for(fetch(consumer, good), 15)
    assert [record.value for record in before] == [b"%d" % each for each in range(good)]
    assert not consumer.unreadable()
    async with asyncio.timeout(3 * kafka_consumer.ISOLATE_FOR):
        await fetch_until(consumer, lambda: bool(consumer.unreadable()))
    reason = f"its records from {good} on: [Error 2] CorruptRecordException: Invalid CRC"
    for _ in range(5):
        assert consumer.unreadable() == {Partition(bad, 0): reason}
        assert consumer.lag().keys() <= {Partition(other, 0)}
        assert not await consumer.fetch(timeout=0.5)
    if others:
        began = monotonic()
        await append(log, other, b"at once")
        assert [record.value for record in await fetch(consumer, 1)] == [b"at once"]
        assert monotonic() - began < 0.5
    monkeypatch.undo()
    assert [record.value for record in await fetch(consumer, 1)] == [b"%d" % good]
    assert not consumer.unreadable()
    await consumer.close()


async def test_a_scan_that_meets_a_damaged_record_tells_those_after_it_to_go_on_without_that_partition(
    kafka: str, log: KafkaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until it is time to try again, or the record is deleted."""
    topic = await make_topic(log, partitions=2)
    bad, other = Partition(topic, 0), Partition(topic, 1)
    good = random.randrange(1, 1_500)
    await log.append_in_order(bad, [NewRecord(b"", b"good", [])] * good)
    for partition, value in ((bad, b"damaged"), (bad, b"behind"), (other, b"elsewhere")):
        await log.append_in_order(partition, [NewRecord(b"", value, [])])
    unpack: Any = fetcher.PartitionRecords._unpack_records

    def unpack_bad(records: Any) -> Iterator[Any]:
        for record in unpack(records):
            if record.value == b"damaged":
                records.next_fetch_offset = record.offset  # its batch is looked at before it is decoded
                raise CorruptRecordException("Invalid CRC")
            yield record

    # No broker hands out a bad checksum when asked to.
    monkeypatch.setattr(fetcher.PartitionRecords, "_unpack_records", unpack_bad)
    monkeypatch.setattr(scanner, "DAMAGED_FOR", 1.0)
    assert (await log.readable(topic))[1] == {}
    found: list[Record] = []

    async def scan_all() -> None:
        async for records in log.scan(bad, 0, good + 2):
            found.extend(records)

    with pytest.raises(LogUnavailableError, match="Invalid CRC"):
        await scan_all()
    assert [record.value for record in found] == [b"good"] * good
    reason = f"its records from {good} on: [Error 2] CorruptRecordException: Invalid CRC"
    assert await log.readable(topic) == ({1: (0, 1)}, {0: reason})
    assert [record.value for record in await scanned(log, other)] == [b"elsewhere"]
    assert [record.value for record in await scanned(log, bad, 0, 1)] == [b"good"]
    await asyncio.sleep(1.1)
    assert (await log.readable(topic))[1] == {}
    with pytest.raises(LogUnavailableError, match="Invalid CRC"):
        await scanned(log, bad, good)
    assert (await log.readable(topic))[1] == {0: reason}
    async with administering(kafka) as admin:
        await admin.delete_records({TopicPartition(*bad): RecordsToDelete(before_offset=good + 1)})
    assert (await log.readable(topic))[1] == {}
    assert [record.value for record in await scanned(log, bad)] == [b"behind"]


async def test_a_broker_that_answers_for_a_partition_with_an_error_or_with_nothing_is_reported(
    log: KafkaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kafka_consumer, "ISOLATE_FOR", 0.0)
    partition = Partition(await make_topic(log), 0)
    consumer = await log.consume(group=None, topics=[partition.topic], listener=Owner())
    request = SimpleNamespace(topics=[(partition.topic, [(0, 7, 1 << 20)])])

    def answered(code: int, highwater: int, records: bytes, of_others: bytes = b"") -> str:
        found: list[Any] = [("another", [(1, 0, 1, 1, [], of_others)])] if of_others else []
        found.append((partition.topic, [(0, code, highwater, highwater, [], records)]))
        response = SimpleNamespace(topics=found)
        consumer._on_fetch_response(request, response)
        return consumer.unreadable().get(partition, "")

    assert answered(0, 7, b"") == "", "its end"
    assert answered(0, 9, b"") == "its records from 7 on: expected some up to 8, got none"
    assert answered(0, 9, b"records") == ""
    assert answered(0, 9, b"", of_others=bytes(16 << 20)) == "", "the answer is full"
    assert answered(2, -1, b"") == "its records from 7 on: CorruptRecordException"
    assert consumer.lag() == {}
    assert answered(0, 7, b"") == ""
    assert answered(1, -1, b"") == "", "another offset is asked for next"
    await consumer.close()


@pytest.mark.parametrize(
    ("group", "task"),
    [
        ("g", "_fetcher._fetch_task"),
        ("g", "_client._sync_task"),
        ("g", "_coordinator._coordination_task"),
        ("g", "_coordinator._heartbeat_task"),
        ("g", "_coordinator._commit_refresh_task"),
        (None, "_fetcher._fetch_task"),
        (None, "_client._sync_task"),
    ],
)
async def test_a_consumer_survives_the_death_of_an_aiokafka_task(log: KafkaLog, group: str | None, task: str) -> None:
    topic = await make_topic(log)
    await append(log, topic, b"0")
    owner = Owner(Commit(1))
    consumer = await log.consume(group=group and f"g{uuid4().hex}", topics=[topic], listener=owner)
    await fetch(consumer, 1)
    dead = consumer._kafka
    await end_task(dead, task)
    await fetch_until(consumer, lambda: consumer._kafka is not dead)
    await append(log, topic, b"1")
    assert [record.value for record in await fetch(consumer, 1)] == [b"1"]
    await consumer.close()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("unable to perform operation on <TCPTransport closed=True>; the handler is closed"),
        KeyError((1, 1)),
        KafkaError("Unexpected exception in heartbeat task: UnknownError()"),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_a_consumer_survives_a_heartbeat_that_fails(
    log: KafkaLog, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic = await make_topic(log)
    owner = Owner(Commit(0))
    consumer = await log.consume(group=f"g{uuid4().hex}", topics=[topic], listener=owner)
    await fetch_until(consumer, lambda: bool(owner.owned))
    dead = consumer._kafka

    async def fail() -> bool:
        raise error

    monkeypatch.setattr(dead._coordinator, "_do_heartbeat", fail)
    await fetch_until(consumer, lambda: consumer._kafka is not dead)
    await append(log, topic, b"0")
    assert [record.value for record in await fetch(consumer, 1)] == [b"0"]
    await consumer.close()


async def test_a_dead_task_of_aiokafka_is_noticed_while_records_keep_coming(log: KafkaLog) -> None:
    topic = await make_topic(log)
    consumer = await log.consume(group=f"g{uuid4().hex}", topics=[topic], listener=Owner(Commit(0)))

    async def keep_appending() -> None:
        while True:
            await append(log, topic, b"0")

    appending = asyncio.create_task(keep_appending())
    await fetch(consumer, 1)
    dead = consumer._kafka
    await end_task(dead, "_client._sync_task")
    await fetch_until(consumer, lambda: consumer._kafka is not dead)
    await fetch(consumer, 1)
    appending.cancel()
    await asyncio.wait({appending})
    await consumer.close()


async def test_a_reader_that_is_being_replaced_has_no_lag_and_says_so(
    log: KafkaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic = await make_topic(log)
    await append(log, topic, b"0")
    consumer = await log.consume(group=None, topics=[topic], listener=Owner())
    await fetch(consumer, 1)
    start, may_start = consumer._start_client, asyncio.Event()

    async def start_later() -> None:
        await may_start.wait()
        await start()

    monkeypatch.setattr(consumer, "_start_client", start_later)
    dead, partition = consumer._kafka, Partition(topic, 0)
    await end_task(dead, "_fetcher._fetch_task")
    await fetch_until(consumer, lambda: consumer._kafka is not dead)
    assert consumer.unreadable() == {partition: "reconnecting after its consumer failed"}
    assert consumer.lag() == {}
    consumer.pause(partition)
    consumer.resume(partition)
    may_start.set()
    await append(log, topic, b"1")
    assert [record.value for record in await fetch(consumer, 1)] == [b"1"]
    assert consumer.unreadable() == {}
    assert consumer.lag() == {partition: 0}
    await consumer.close()


@pytest.mark.parametrize("task", ["_sender._sender_task", "client._sync_task"])
async def test_a_producer_is_replaced_when_a_task_of_aiokafka_has_died(kafka: str, task: str) -> None:
    log = await KafkaLog.open(kafka, append_timeout=SHORT)
    topic, unknown = await make_topic(log), await make_topic_by(kafka)
    await end_task(log._appender._producer, task)
    async with asyncio.timeout(PATIENCE):
        while True:
            try:
                # The first append to a topic needs metadata, the second one the sender.
                await append(log, unknown, b"0")
                await append(log, topic, b"0")
                break
            except LogUnavailableError:
                await asyncio.sleep(0.05)
    await log.close()


async def end_task(user: Any, path: str) -> None:
    """Leave a task of aiokafka as an error leaves it that it didn't expect."""
    *parents, name = path.split(".")
    for parent in parents:
        user = getattr(user, parent)
    getattr(user, name).cancel()
    await asyncio.wait({getattr(user, name)})
    failed = asyncio.get_running_loop().create_future()
    failed.set_exception(KafkaError("unexpected"))
    failed.exception()
    setattr(user, name, failed)


async def test_records_held_by_a_pause_precede_later_appends(log: KafkaLog) -> None:
    topic = await make_topic(log)
    partition = Partition(topic, 0)
    bodies = [bytes([number]) * (FETCH_BYTES * 2 // 5) for number in range(5)]
    await append(log, topic, *bodies[:4])
    consumer = await log.consume(group=None, topics=[topic], listener=Owner())
    first = await fetch(consumer, 2)
    consumer.pause(partition)
    assert list(await consumer.fetch(timeout=0.1)) == []
    await append(log, topic, bodies[4])
    consumer.resume(partition)
    await asyncio.sleep(0.3)  # The wait for records that the last fetch has begun ends with the new one.
    rest = await fetch(consumer, 5 - len(first))
    assert [record.value for record in [*first, *rest]] == bodies
    await consumer.close()


async def test_batches_larger_than_a_fetch_come_from_every_partition(log: KafkaLog) -> None:
    """The broker sends one that is larger than was asked for whole, but only of the first partition that has any."""
    topic = await make_topic(log, partitions=6)
    bodies = {b"%d" % number: os.urandom(3 * MAX_PARTITION_FETCH_BYTES) for number in range(60)}
    await asyncio.gather(*[log.append(topic, key=key, value=body, headers=[]) for key, body in bodies.items()])
    consumer = await log.consume(group=f"g{uuid4().hex}", topics=[topic], listener=Owner())
    began = monotonic()
    records = await fetch(consumer, len(bodies))
    assert {record.key: record.value for record in records} == bodies
    assert {partition.number for partition in consumer.lag()} == set(range(6))
    assert monotonic() - began < 10
    await consumer.close()


async def test_new_records_of_a_topic_do_not_wait_for_what_was_fetched_of_a_backlog(log: KafkaLog) -> None:
    backlog, live = await make_topic(log, partitions=6), await make_topic(log)
    count, body = 6_000, os.urandom(1_000)
    await asyncio.gather(*[log.append(backlog, key=b"%d" % each, value=body, headers=[]) for each in range(count)])
    consumer = await log.consume(group=f"g{uuid4().hex}", topics=[backlog, live], listener=Owner())
    read = 0
    read_at_append: list[int] = []
    waited: list[int] = []

    async def append_live() -> None:
        while read < count - 1_000:
            read_at_append.append(read)
            await log.append(live, key=b"k", value=b"", headers=[])
            await asyncio.sleep(0.03)

    appending: asyncio.Task[None] | None = None
    async with asyncio.timeout(3 * PATIENCE):
        while appending is None or not appending.done() or len(waited) < len(read_at_append):
            for batch in await consumer.fetch(timeout=0.5):
                await asyncio.sleep(2e-4 * len(batch.records))  # what it takes to route them
                if batch.partition.topic == live:
                    waited += [read - read_at_append[record.offset] for record in batch.records]
                else:
                    read += len(batch.records)
            if appending is None and read:
                appending = asyncio.create_task(append_live())
    await appending
    await consumer.close()
    assert len(waited) >= 10
    assert sorted(waited)[len(waited) // 2] <= 2 * PULL_RECORDS, waited


async def test_a_fetch_ends_when_another_task_closes_its_consumer(log: KafkaLog) -> None:
    topic = await make_topic(log)
    for group in (None, f"g{uuid4().hex}"):
        consumer = await log.consume(group=group, topics=[topic], listener=Owner())
        fetching = asyncio.create_task(consumer.fetch(timeout=PATIENCE))
        await asyncio.sleep(0.2)
        await consumer.close()
        assert not await fetching


def test_aiokafka_logs_a_failure_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    _passed.clear()
    limit_aiokafka_log()
    for port in (1, 2, 3):
        logging.getLogger("aiokafka").error("Unable connect to 127.0.0.1:%d", port)
    assert [line.getMessage() for line in caplog.records] == ["Unable connect to 127.0.0.1:1"]


def test_a_log_that_cannot_be_opened_logs_no_passing_warning(caplog: pytest.LogCaptureFixture) -> None:
    _passed.clear()

    async def fail_to_open() -> None:
        with pytest.raises(LogUnavailableError):
            await KafkaLog.open("127.0.0.1:1")

    asyncio.run(fail_to_open())
    assert not caplog.records


# Outages


async def test_a_log_outlives_its_broker(mortal: Broker) -> None:
    """Killed and started again: the same objects go on, and what was acknowledged is there."""
    async with opened(mortal) as log:
        topic = await make_topic(log, partitions=3)
        owner = Owner()
        consumer = await log.consume(group=f"g{uuid4().hex}", topics=[topic], listener=owner)
        acknowledged: set[bytes] = set()
        read: set[bytes] = set()
        number = 0

        async def append_some() -> None:
            nonlocal number
            values = [b"%d" % n for n in range(number, number + 30)]
            number += 30
            await asyncio.gather(*[log.append(topic, key=value, value=value, headers=[]) for value in values])
            acknowledged.update(values)

        async def read_all() -> None:
            async with asyncio.timeout(PATIENCE):
                while not read >= acknowledged:
                    read.update([r.value for batch in await consumer.fetch(timeout=0.5) for r in batch.records])

        await append_some()
        await read_all()
        await consumer.commit({Partition(topic, 0): Commit(1)})
        mortal.kill()

        committing = asyncio.create_task(consumer.commit({Partition(topic, 0): Commit(2)}))
        for _ in range(2):
            await took(SHORT + 0.3, append_some(), raises=LogUnavailableError)
        await took(0.3, consumer.fetch(timeout=0.1), raises=None)
        await took(3.5, log.ping(), raises=LogUnavailableError)
        await took(5.5, committing, raises=LogUnavailableError)

        await asyncio.to_thread(mortal.restart)
        started = monotonic()
        async with asyncio.timeout(PATIENCE):
            while True:
                try:
                    await append_some()
                    break
                except LogUnavailableError:
                    await asyncio.sleep(0)
        await read_all()
        assert monotonic() - started < 5.0
        await log.ping()
        await consumer.commit({partition: Commit(1) for partition in owner.owned})


async def test_a_broker_that_hangs_fails_appends_in_time_and_closing_too(mortal: Broker) -> None:
    async with opened(mortal) as log:
        topic = await make_topic(log)
        consumer = await log.consume(group=f"g{uuid4().hex}", topics=[topic], listener=Owner(Commit(0)))
        await append(log, topic, b"0")
        await fetch(consumer, 1)
        mortal.pause()
        try:
            await took(SHORT + 0.3, append(log, topic, b"1"), raises=LogUnavailableError)
            await took(SHORT + 0.3, append(log, topic, b"2"), raises=LogUnavailableError)
            await took(0.4, consumer.fetch(timeout=0.2), raises=None)
            await took(5.5, log.close(), raises=None)
        finally:
            mortal.resume()


async def test_a_question_on_a_connection_that_is_closed_is_asked_again(
    log: KafkaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Uvloop refuses the write by a RuntimeError, of which aiokafka makes nothing: it would end the process."""
    topic = await make_topic(log)
    client: Any = log._cluster._client
    send, closed = client.send, ["unable to perform operation on <TCPTransport closed=True>; the handler is closed"]

    async def broken(*arguments: Any) -> Any:
        if closed:
            raise RuntimeError(closed.pop())
        return await send(*arguments)

    monkeypatch.setattr(client, "send", broken)
    assert set((await log.bounds(topic)).values()) == {(0, 0)}
    assert not closed
    closed.append("a bug")
    with pytest.raises(RuntimeError, match="a bug"):
        await log.bounds(topic)


async def test_a_write_to_a_connection_that_is_closed_ends_it_like_any_that_is_broken(
    kafka: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, _, port = kafka.rpartition(":")
    connection = AIOKafkaConnection(host, int(port))
    await connection.connect()

    def refuse(_: bytes) -> None:
        raise RuntimeError(
            "unable to perform operation on <TCPTransport closed=True reading=False>; the handler is closed"
        )

    monkeypatch.setattr(connection._writer, "write", refuse)
    with pytest.raises(KafkaConnectionError, match="the handler is closed"):
        connection.send(MetadataRequest([]))
    assert not connection.connected()
    await asyncio.sleep(0)

    def fail(_: bytes) -> None:
        raise RuntimeError("a bug")

    await connection.connect()
    monkeypatch.setattr(connection._writer, "write", fail)
    with pytest.raises(RuntimeError, match="a bug"):
        connection.send(MetadataRequest([]))
    await asyncio.wait({connection.close()})


def test_a_closed_connection_is_a_log_that_is_away_and_a_bug_is_a_bug() -> None:
    with pytest.raises(LogUnavailableError), translated_errors("commit"):
        raise RuntimeError("unable to perform operation on <TCPTransport closed=True>; the handler is closed")
    with pytest.raises(LogUnavailableError), translated_errors("commit"):
        raise RequestTimedOutError
    with pytest.raises(RuntimeError, match="a bug"), translated_errors("commit"):
        raise RuntimeError("a bug")


async def test_opening_without_a_broker_fails_in_time(mortal: Broker) -> None:
    mortal.pause()
    try:
        await took(6.0, KafkaLog.open(mortal.address), raises=LogUnavailableError)
    finally:
        mortal.resume()
    await took(1.0, KafkaLog.open("127.0.0.1:1"), raises=LogUnavailableError)


async def test_a_closed_log_refuses_appends(log: KafkaLog) -> None:
    topic = await make_topic(log)
    await log.close()
    with pytest.raises(LogUnavailableError, match="closed"):
        await append(log, topic, b"0")
    await log.close()


# The clock


class Clocks:
    """Our two clocks, which only these tests move, and what a broker's would show."""

    def __init__(self) -> None:
        self.ticks = 100.0
        self.skew = 0.0
        self.broker = BrokerClock(local=lambda: 1_000_000.0, monotonic=lambda: self.ticks)

    def acknowledge(self, *, latency: float = 0.0) -> None:
        self.broker.on_acknowledgement(999_900.0 + self.ticks + self.skew - latency)

    def wait(self, seconds: float) -> None:
        self.ticks += seconds


def test_the_clock_is_this_machines_until_a_broker_is_heard() -> None:
    clocks = Clocks()
    assert clocks.broker.now() == 1_000_000.0
    clocks.wait(5)
    assert clocks.broker.now() == 1_000_005.0


def test_the_clock_follows_the_brokers_by_the_fastest_acknowledgement() -> None:
    clocks = Clocks()
    clocks.skew = 30.0
    for latency in (0.5, 0.002, 3.0):
        clocks.acknowledge(latency=latency)
    assert clocks.broker.now() == pytest.approx(1_000_030.0, abs=0.003)
    clocks.wait(10)
    assert clocks.broker.now() == pytest.approx(1_000_040.0, abs=0.003)


@pytest.mark.parametrize("skew", [-3600.0, 3600.0])
def test_the_first_acknowledgement_sets_a_clock_right_that_began_wrong(skew: float) -> None:
    clocks = Clocks()
    clocks.skew = skew
    clocks.wait(20)
    clocks.broker.on_record(1_000_000.0 + min(skew, 0.0) - 60)
    assert clocks.broker.now() == 1_000_020.0
    clocks.acknowledge(latency=0.01)
    assert clocks.broker.now() == pytest.approx(1_000_020.0 + skew - 0.01)
    clocks.wait(5)
    assert clocks.broker.now() == pytest.approx(1_000_025.0 + skew - 0.01)


def test_a_record_seen_before_any_acknowledgement_is_only_a_lower_bound() -> None:
    clocks = Clocks()
    clocks.broker.on_record(1_000_090.0)
    assert clocks.broker.now() == 1_000_090.0
    assert not clocks.broker.is_known
    clocks.skew = 30.0
    clocks.acknowledge()
    assert clocks.broker.now() == 1_000_030.0


def test_a_machine_whose_clock_drifts_keeps_to_the_brokers_time() -> None:
    clocks = Clocks()
    clocks.acknowledge()
    for _ in range(3600):
        clocks.wait(1)
        clocks.skew -= 0.001  # ours is fast by as much
        clocks.acknowledge()
        assert clocks.broker.now() == pytest.approx(999_900.0 + clocks.ticks + clocks.skew, abs=0.07)


@pytest.mark.parametrize("wrong_by", [-3600.0, 3600.0])
async def test_a_synchronized_log_has_the_brokers_time_whatever_the_machines(
    kafka: str, wrong_by: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.log.kafka.log.BrokerClock", partial(BrokerClock, local=lambda: time.time() + wrong_by))
    log = await KafkaLog.open(kafka)
    topic = await make_topic(log)
    assert log.now() == pytest.approx(time.time() + wrong_by, abs=10)
    await log.synchronize(topic)
    assert log.now() == pytest.approx(time.time(), abs=10)
    await log.synchronize(topic)
    assert await log.bounds(topic) == {0: (0, 1)}, "once is enough"
    await log.close()


def test_the_clock_never_goes_back_or_stops() -> None:
    clocks = Clocks()
    clocks.acknowledge()
    clocks.skew = -3600.0
    clocks.wait(31)
    clocks.acknowledge()
    clocks.wait(31)
    before = clocks.broker.now()
    clocks.acknowledge()
    assert clocks.broker.now() == before == 1_000_062.0
    clocks.wait(100)
    assert clocks.broker.now() == before + 50
    clocks.wait(2 * 3600)
    assert clocks.broker.now() == pytest.approx(1_000_000.0 - 3600 + 162 + 2 * 3600)


def test_a_step_of_the_brokers_clock_is_forgotten_after_a_minute() -> None:
    clocks = Clocks()
    clocks.skew = 3600.0
    clocks.acknowledge()
    clocks.skew = 0.0
    for _ in range(70):
        clocks.wait(1)
        clocks.acknowledge()
    clocks.wait(4 * 3600)
    assert clocks.broker.now() == pytest.approx(999_900.0 + clocks.ticks)


@pytest.mark.parametrize("interval", [10, 29, 31, 45, 59, 61, 100, 600])
@pytest.mark.parametrize("before", [1, 2, 5])
def test_a_step_of_the_brokers_clock_is_forgotten_after_a_minute_however_rare_its_acknowledgements_are(
    interval: int, before: int
) -> None:
    clocks = Clocks()
    clocks.skew = 3600.0
    for _ in range(before):
        clocks.wait(interval)
        clocks.acknowledge()
    clocks.skew, last = 0.0, clocks.ticks
    while clocks.ticks <= last + 60:
        clocks.wait(interval)
        clocks.acknowledge()
    clocks.wait(4 * 3600)
    assert clocks.broker.now() == pytest.approx(999_900.0 + clocks.ticks)


def test_an_old_record_does_not_set_the_clock_back_and_a_new_one_sets_it_forward() -> None:
    clocks = Clocks()
    clocks.acknowledge()
    clocks.broker.on_record(500_000.0)
    assert clocks.broker.now() == 1_000_000.0
    clocks.broker.on_record(1_000_007.0)
    assert clocks.broker.now() == 1_000_007.0


# Slices


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([], []),
        ([10, 10], [2]),
        ([FETCH_BYTES // 2, FETCH_BYTES // 2, 1], [2, 1]),
        ([2 * FETCH_BYTES, 1, 1], [1, 2]),
        ([1, 2 * FETCH_BYTES, 1], [1, 1, 1]),
    ],
)
def test_records_are_cut_at_a_mebibyte_but_for_a_single_larger_one(sizes: list[int], expected: list[int]) -> None:
    records = [Record(offset, 0.0, b"", bytes(size), ()) for offset, size in enumerate(sizes)]
    slices = list(slices_of(records))
    assert [len(each) for each in slices] == expected
    assert [record for each in slices for record in each] == records


# Topics that change


@asynccontextmanager
async def administering(kafka: str) -> AsyncIterator[AIOKafkaAdminClient]:
    admin = AIOKafkaAdminClient(bootstrap_servers=kafka)
    await admin.start()
    try:
        yield admin
    finally:
        await admin.close()


async def test_more_partitions_are_no_problem_but_where_the_records_keep_one_order(log: KafkaLog) -> None:
    topic = await make_topic(log, partitions=3, compacted=True)
    grown = TopicSpec(name=topic, partitions=1, retention=None, compacted=True)
    whole = replace(grown, total_order=True)
    assert not [problem for problem in await log.check([grown]) if "replication" not in problem.message]
    (problem,) = [problem for problem in await log.check([whole]) if "replication" not in problem.message]
    assert (problem.is_fatal, problem.is_tolerable) == (True, False)
    assert problem.message.startswith("partitions: expected exactly 1, got 3")


async def test_new_partitions_are_read_within_seconds_from_their_first_record(kafka: str, log: KafkaLog) -> None:
    topic = await make_topic(log, partitions=1)
    owner = Owner()
    consumer = await log.consume(group=f"g{uuid4().hex}", topics=[topic], listener=owner)
    await append(log, topic, b"before")
    await fetch(consumer, 1)
    began = monotonic()
    async with administering(kafka) as admin:
        await admin.create_partitions({topic: NewPartitions(total_count=12)})
    read: set[bytes] = set()
    sent = {b"before": 0}
    while len(owner.owned) < 12 or read != sent.keys():
        assert monotonic() - began < 15, (len(owner.owned), sent.keys() - read)
        if set(sent.values()) != set(range(12)):
            value = b"%d" % len(sent)
            sent[value] = (await log.append(topic, key=value, value=value, headers=[])).partition
        for batch in await consumer.fetch(timeout=0.01):
            read.update(record.value for record in batch.records)
    assert {partition.number for partition in owner.owned} == set(range(12))
    await consumer.close()


async def test_a_recreated_topic_is_read_within_seconds(kafka: str, log: KafkaLog) -> None:
    topic, kept = await make_topic(log), await make_topic(log)
    owner = Owner()
    consumer = await log.consume(group=f"g{uuid4().hex}", topics=[topic, kept], listener=owner)
    await append(log, topic, b"0", b"1")
    await fetch(consumer, 2)
    async with administering(kafka) as admin:
        await admin.delete_topics([topic])
        await fetch_until(consumer, lambda: owner.owned.keys() == {Partition(kept, 0)})
        assert topic not in await log.topics()
        await append(log, kept, b"kept")
        assert [record.value for record in await fetch(consumer, 1)] == [b"kept"]
        with pytest.raises(LogUnavailableError):
            await log.append(topic, key=b"", value=b"", headers=[])
        await asyncio.sleep(2 * METADATA_AGE)  # nobody makes it again by asking for it
        assert topic not in await log.topics()
        await log.create([TopicSpec(name=topic, partitions=1, retention=3600.0)])
        began = monotonic()
        await append(log, topic, b"2")
        # What isn't committed is read again by who gets it again.
        assert {record.value for record in await fetch(consumer, 2)} == {b"2", b"kept"}
        assert monotonic() - began < 2 * METADATA_AGE
    await consumer.close()


async def test_a_member_reads_missing_topics_once_they_exist(log: KafkaLog) -> None:
    there, missing, group = await make_topic(log), f"t{uuid4().hex}", f"g{uuid4().hex}"
    await append(log, there, b"0")
    consumer = await log.consume(group=group, topics=[missing, there], listener=Owner())
    alone = await log.consume(group=f"{group}-alone", topics=[missing], listener=(owner := Owner()))
    assert [record.value for record in await fetch(consumer, 1)] == [b"0"]
    await fetch_until(alone, lambda: "assigned" in owner.told)
    assert consumer.unreadable() == alone.unreadable() == {Partition(missing, ALL): NO_TOPIC}
    assert missing not in await log.topics()
    await log.create([TopicSpec(name=missing, partitions=1, retention=3600.0)])
    began = monotonic()
    await append(log, missing, b"1")
    for each in (consumer, alone):
        while b"1" not in [record.value for record in await fetch(each, 1)]:
            assert monotonic() - began < 2 * METADATA_AGE
        assert each.unreadable() == {}
        await each.close()


async def test_a_groupless_reader_reports_a_missing_topic_as_a_whole(kafka: str, log: KafkaLog) -> None:
    topic = await make_topic(log)
    await append(log, topic, b"0", b"1")
    consumer = await log.consume(group=None, topics=[topic], listener=Owner())
    await fetch(consumer, 2)
    async with administering(kafka) as admin:
        await admin.delete_topics([topic])
    await fetch_until(consumer, lambda: consumer.unreadable() == {Partition(topic, ALL): NO_TOPIC})
    await log.create([TopicSpec(name=topic, partitions=1, retention=3600.0)])
    await append(log, topic, b"2")
    assert [record.value for record in await fetch(consumer, 1)] == [b"2"]
    assert consumer.unreadable() == {}
    await consumer.close()


async def test_a_groupless_reader_of_a_missing_topic_finds_the_log_unavailable(log: KafkaLog) -> None:
    with pytest.raises(LogUnavailableError, match="expected a topic of the cluster, got none of this name"):
        await log.consume(group=None, topics=[f"t{uuid4().hex}"], listener=Owner())


async def test_a_topic_recreated_at_once_is_read_from_its_start(kafka: str, log: KafkaLog) -> None:
    """Before anybody has noticed that it was away: what is new has the offsets of what was done."""
    topic, group = await make_topic(log), f"g{uuid4().hex}"
    owner = Owner()
    consumer = await log.consume(group=group, topics=[topic], listener=owner)
    await append(log, topic, *[b"old"] * 10)
    await fetch(consumer, 10)
    await consumer.commit({Partition(topic, 0): Commit(10)})
    async with administering(kafka) as admin:
        await admin.delete_topics([topic])

        async def is_made() -> bool:
            return bool(await log.create([TopicSpec(name=topic, partitions=1, retention=3600.0)]))

        await until(is_made)
    await append(log, topic, b"0", b"1", b"2")
    assert [record.value for record in await fetch(consumer, 3)] == [b"0", b"1", b"2"]
    await consumer.close()
    assert await log.committed(group, topic) in ({}, {0: Commit(0)})


@pytest.mark.parametrize(("is_running", "patience"), [(True, 30), (False, 5)], ids=["running-member", "later-member"])
async def test_a_recreated_topic_that_has_grown_beyond_the_old_one_is_read_from_its_start(
    kafka: str, log: KafkaLog, *, is_running: bool, patience: float
) -> None:
    """Its offsets alone look as if it were the same: its id tells."""
    topic, group = await make_topic(log), f"g{uuid4().hex}"
    consumer = await log.consume(group=group, topics=[topic], listener=(owner := Owner()))
    await append(log, topic, *[b"old"] * 3)
    await fetch(consumer, 3)
    await consumer.commit({Partition(topic, 0): Commit(3)})
    former = owner.owned[Partition(topic, 0)].topic_id
    assert len(former) == 32
    async with administering(kafka) as admin:
        await admin.delete_topics([topic])
        await until(partial(is_created, log, topic))
    if not is_running:
        await consumer.close()

        async def is_deleted() -> bool:
            return not await log._cluster.commits(group)

        await until(is_deleted)  # Kafka deletes a group's commits with the topic; one that was on its way comes later
        await log._cluster.seed(group, {Partition(topic, 0): Commit(3, topic_id=former)})
    await append(log, topic, *[b"%d" % number for number in range(5)])
    assert await log.committed(group, topic) == {}  # what there is, is of the former topic
    if not is_running:
        consumer = await log.consume(group=group, topics=[topic], listener=(owner := Owner()))
    read = list[bytes]()
    async with asyncio.timeout(patience):
        while len({*read}) < 5:
            read += [record.value for record in await fetch(consumer, 1)]
    assert read[-5:] == [b"0", b"1", b"2", b"3", b"4"]
    assert owner.owned[Partition(topic, 0)].topic_id not in ("", former)
    await consumer.close()


async def is_created(log: KafkaLog, topic: str) -> bool:
    return bool(await log.create([TopicSpec(name=topic, partitions=1, retention=3600.0)]))


async def test_partitions_whose_positions_are_found_late_are_assigned(
    log: KafkaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a rebalance nobody responds at first, and then not for all: what is under way may wait for them."""
    topic, group, owner = await make_topic(log, partitions=2), f"g{uuid4().hex}", Owner()
    first, second = Partition(topic, 0), Partition(topic, 1)
    consumer = await log.consume(group=group, topics=[topic], listener=owner)
    await fetch_until(consumer, lambda: owner.owned.keys() == {first, second})
    asked = log._cluster.offsets_with_leader
    calls = 0

    async def failing(partitions: Sequence[Partition], when: int) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise LogUnavailableError("told to fail")
        found, missing = await asked(partitions, when)
        if calls < 4:
            return {first: found[first]}, {**missing, second: "no leader"}
        return found, missing

    owner.awaited.clear()
    monkeypatch.setattr(log._cluster, "offsets_with_leader", failing)
    await consumer._revoke()
    await consumer.on_partitions_assigned([TopicPartition(*first), TopicPartition(*second)])
    await fetch_until(consumer, lambda: len(owner.awaited) == 3)
    assert owner.awaited == [{first, second}, {second}, set()]
    await consumer.close()


async def test_a_recreated_partition_is_read_though_its_start_is_unknown_at_first(
    log: KafkaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after its topic was recreated, a position is beyond the end."""
    topic, failures = await make_topic(log), list[str]()
    consumer = await log.consume(group=f"g{uuid4().hex}", topics=[topic], listener=Owner())
    await append(log, topic, b"0", b"1", b"2")
    await fetch(consumer, 3)
    offsets_with_leader = consumer._cluster.offsets_with_leader

    async def failing(*asked: Any) -> Any:
        if consumer._revoke_lock.locked() and not failures:
            failures.append("of who begins anew")
            raise LogUnavailableError("expected a response, got none")
        return await offsets_with_leader(*asked)

    monkeypatch.setattr(consumer._cluster, "offsets_with_leader", failing)
    consumer._positions[Partition(topic, 0)] = 10
    consumer._kafka.seek(TopicPartition(topic, 0), 10)
    assert [record.value for record in await fetch(consumer, 3)] == [b"0", b"1", b"2"]
    assert failures
    await consumer.close()


async def test_fetched_records_stay_where_a_partitions_new_start_is_unknown(
    log: KafkaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    topic = await make_topic(log)
    partition = Partition(topic, 0)
    consumer = await log.consume(group=f"g{uuid4().hex}", topics=[topic], listener=Owner())
    await append(log, topic, b"0")
    await fetch(consumer, 1)
    await append(log, topic, b"1", b"2")
    while consumer._positions[partition] < 3:
        await consumer._pull(0.1)

    async def failing(*_: Any) -> Any:
        raise LogUnavailableError("expected a response, got none")

    with monkeypatch.context() as patch:
        patch.setattr(consumer._cluster, "offsets_with_leader", failing)
        await consumer._reset([partition])
    await append(log, topic, b"3")
    assert [record.value for record in await fetch(consumer, 3)] == [b"1", b"2", b"3"]
    await consumer.close()


async def test_a_commit_while_a_partition_begins_again_is_not_taken_for_stored(
    log: KafkaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody says where it begins, so it goes on where it was: what is done there has to be committed again."""
    topic, group = await make_topic(log), f"g{uuid4().hex}"
    partition = Partition(topic, 0)
    consumer = await log.consume(group=group, topics=[topic], listener=Owner())
    await append(log, topic, b"0")
    await fetch(consumer, 1)
    is_asked, may_answer = asyncio.Event(), asyncio.Event()

    async def failing(*_: Any) -> Any:
        is_asked.set()
        await may_answer.wait()
        raise LogUnavailableError("expected a response, got none")

    with monkeypatch.context() as patch:
        patch.setattr(consumer._cluster, "offsets_with_leader", failing)
        resetting = asyncio.create_task(consumer._reset([partition]))
        await is_asked.wait()
        with pytest.raises(LogUnavailableError, match=f"{topic}/0 is being reset"):
            await consumer.commit({partition: Commit(1)})
        may_answer.set()
        await resetting
    await consumer.commit({partition: Commit(1)})
    assert (await log.committed(group, topic))[0].base == 1
    await consumer.close()


async def test_a_partition_takes_no_commit_before_its_restart_is_committed(
    log: KafkaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its owner doesn't know yet that its records are others, and an ordered route would begin an attempt."""
    topic, group, owner = await make_topic(log), f"g{uuid4().hex}", Owner()
    partition = Partition(topic, 0)
    consumer = await log.consume(group=group, topics=[topic], listener=owner)
    await append(log, topic, b"0")
    await fetch(consumer, 1)
    is_asked, may_be_stored = asyncio.Event(), asyncio.Event()
    commit: Any = consumer._kafka.commit

    async def slow(offsets: Any) -> None:
        is_asked.set()
        await may_be_stored.wait()
        await commit(offsets)

    with monkeypatch.context() as patch:
        patch.setattr(consumer._kafka, "commit", slow)
        resetting = asyncio.create_task(consumer._reset([partition]))
        await is_asked.wait()
        with pytest.raises(LogUnavailableError, match=f"{topic}/0 is being reset"):
            await consumer.commit({partition: Commit(1)})
        assert owner.told == ["assigned"]
        may_be_stored.set()
        await resetting
    assert owner.told == ["assigned", "restarted"]
    assert (await log.committed(group, topic))[0].base == 0
    await consumer.close()


async def test_a_partition_that_begins_again_may_be_revoked_in_that_moment(log: KafkaLog) -> None:
    topic = await make_topic(log)
    consumer = await log.consume(group=f"g{uuid4().hex}", topics=[topic], listener=Owner())
    await append(log, topic, b"0")
    await fetch(consumer, 1)
    async with consumer._revoke_lock:  # as who begins anew with another one has it
        revocation = asyncio.create_task(consumer._revoke())
        await asyncio.sleep(0)
    await consumer._reset([Partition(topic, 0)])
    await revocation
    assert not consumer._positions
    await consumer.close()


async def test_records_skipped_during_a_fetch_are_not_another_log(
    kafka: str, log: KafkaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The look sends the consumer back to the first of the records that are fetched already."""
    topic, owner, looked = await make_topic(log), Owner(), list[str]()
    partition = Partition(topic, 0)
    consumer = await log.consume(group=f"g{uuid4().hex}", topics=[topic], listener=owner)
    await append(log, topic, b"0")
    await fetch(consumer, 1)
    consumer.pause(partition)
    await consumer.fetch(timeout=0.2)
    await append(log, topic, b"1", b"2", b"3")
    async with administering(kafka) as admin:
        await admin.delete_records({TopicPartition(*partition): RecordsToDelete(before_offset=2)})
    offsets_with_leader = consumer._cluster.offsets_with_leader

    async def meanwhile(partitions: Sequence[Partition], when: int) -> Any:
        answer = await offsets_with_leader(partitions, when)
        if when == EARLIEST and not looked:
            looked.append("while its records are held against their start")
            await consumer._check_bounds()
        return answer

    monkeypatch.setattr(consumer._cluster, "offsets_with_leader", meanwhile)
    consumer.resume(partition)
    assert [record.value for record in await fetch(consumer, 2)] == [b"2", b"3"]
    await append(log, topic, b"4")
    assert [record.value for record in await fetch(consumer, 1)] == [b"4"]
    assert looked
    assert owner.deleted == [1]
    assert "restarted" not in owner.told
    await consumer.close()


# Topics that can't be read


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Return three nodes, of which these tests may take some away."""
    cluster = start_kafka(Cluster.start)
    yield cluster
    cluster.stop()


@pytest.mark.timeout(180)
# aiokafka drops a connection whose bootstrap is cancelled (as by a query's timeout) without closing it.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_of_a_topic_whose_nodes_go_the_rest_can_be_read_and_is_reported(cluster: Cluster) -> None:
    """A leader that hangs, one that is gone, and one that is back: each answer in time, whatever the others do."""
    topic, lost = f"t{uuid4().hex}", cluster.nodes[3]
    async with administering(cluster.address) as admin:
        settings = {"message.timestamp.type": "LogAppendTime", "min.insync.replicas": "1"}
        places = {number: [node] for number, node in enumerate(cluster.nodes)}
        await admin.create_topics([NewTopic(topic, -1, -1, replica_assignments=places, topic_configs=settings)])
    await cluster.until_whole()
    log = await KafkaLog.open(cluster.address)
    try:
        for number in range(3):
            for _ in range(number + 1):
                await log.append_in_order(Partition(topic, number), [NewRecord(b"", b"", [])])
        whole = {number: (0, number + 1) for number in range(3)}
        assert await log.readable(topic) == (whole, {})
        del whole[2]
        hangs = "no response in time"
        in_time = 3 * QUERY_TIMEOUT  # each is three questions, and any node may be asked first

        async def is_told(reason: str) -> bool:
            began = monotonic()
            bounds, unread = await log.readable(topic)
            assert monotonic() - began < in_time
            assert bounds.keys() | unread.keys() == {0, 1, 2}
            if unread.keys() != {2}:
                return False
            assert bounds == whole
            return reason in unread[2] or reason == hangs

        for take_away, reason in ((lost.pause, hangs), (lost.kill, "no leader")):
            await asyncio.to_thread(take_away)
            await until(partial(is_told, reason))
            await took(in_time, log.offsets_at(topic, 0.0, whole), raises=None)
            assert await log.offsets_at(topic, 0.0, whole) == dict.fromkeys(whole, 0)
            assert await log.offsets_at(topic, log.now() + 60, [1]) == {1: 2}
            of_all = (log.bounds(topic), log.offsets_at(topic, 0.0), log.offsets_at(topic, 0.0, [2]))
            await asyncio.gather(*[took(in_time, each, raises=LogUnavailableError) for each in of_all])
        await asyncio.to_thread(cluster.heal)

        async def is_whole() -> bool:
            return await log.readable(topic) == ({**whole, 2: (0, 3)}, {})

        await until(is_whole)
        assert await log.offsets_at(topic, log.now() + 60) == {0: 1, 1: 2, 2: 3}
    finally:
        await log.close()
        gc.collect()


@pytest.mark.timeout(180)
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
async def test_a_scan_asks_a_partitions_new_leader(cluster: Cluster) -> None:
    """The one before is known from the last scan; one hangs, one is gone, and they are back as followers."""
    partition = Partition(f"t{uuid4().hex}", 0)
    async with administering(cluster.address) as admin:
        settings = {"message.timestamp.type": "LogAppendTime", "min.insync.replicas": "1"}
        places = NewTopic(partition.topic, -1, -1, replica_assignments={0: [2, 3]}, topic_configs=settings)
        await admin.create_topics([places])
    await cluster.until_whole()
    log = await KafkaLog.open(cluster.address)

    async def is_read() -> bool:
        try:
            return [record.value for record in await scanned(log, partition)] == [b"0"]
        except LogUnavailableError:
            return False

    try:
        await log.append_in_order(partition, [NewRecord(b"", b"0", [])])
        assert await is_read()
        for take_away in (cluster.nodes[2].pause, cluster.nodes[3].kill):
            await asyncio.to_thread(take_away)
            await until(is_read)
            await asyncio.to_thread(cluster.heal)
            await cluster.until_whole()
            assert await is_read()
    finally:
        await asyncio.to_thread(cluster.heal)
        await log.close()
        gc.collect()


async def test_a_node_that_hangs_is_not_asked_again_and_again(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    await cluster.until_whole()
    log = await KafkaLog.open(cluster.address)
    monkeypatch.setattr(log._cluster._client, "get_random_node", lambda: 2)  # as chance may have it
    try:
        await asyncio.to_thread(cluster.nodes[2].pause)
        # It is asked by the first question, and once more by the bootstrap that follows.
        async with asyncio.timeout(3 * REQUEST_TIMEOUT):
            for _ in range(40):
                await log.topics()
    finally:
        await asyncio.to_thread(cluster.heal)
        await log.close()
        gc.collect()


async def test_queries_of_a_broker_that_hangs_leave_connecting_to_the_others(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each partition is led by another broker; nothing of this log has connected to one yet."""
    topic = f"t{uuid4().hex}"
    async with administering(cluster.address) as admin:
        leaders = {number: [number + 1] for number in range(3)}
        await admin.create_topics([NewTopic(topic, -1, -1, replica_assignments=leaders)])
    await cluster.until_whole()
    log = await KafkaLog.open(cluster.address)
    try:
        await asyncio.to_thread(cluster.nodes[2].pause)
        lost = Partition(topic, 1)
        many = [log._cluster._offsets_at(2, [lost], EARLIEST) for _ in range(20)]
        monkeypatch.setattr(log._cluster._client, "get_random_node", lambda: 1)
        # aiokafka itself may be trying it, to update its metadata; then we do, once.
        async with asyncio.timeout(2.5 * REQUEST_TIMEOUT):
            hung, found = await asyncio.gather(asyncio.gather(*many), log.offsets_at(topic, 0.0, [0, 2]))
        assert found == {0: 0, 2: 0}
        assert all(isinstance(each[lost], KafkaError) for each in hung)
    finally:
        await asyncio.to_thread(cluster.heal)
        await log.close()
        gc.collect()


async def test_of_a_topic_that_is_deleted_nothing_is_reported(kafka: str, log: KafkaLog) -> None:
    topic = await make_topic(log, partitions=2)
    await append(log, topic, b"a")
    async with administering(kafka) as admin:
        await admin.delete_topics([topic])

    async def is_gone() -> bool:
        bounds, unread = await log.readable(topic)
        return not bounds and not unread

    await until(is_gone)
    assert await log.bounds(topic) == {}
    assert await log.offsets_at(topic, 0.0) == await log.offsets_at(topic, 0.0, [0, 1]) == {}
    assert topic not in await log.topics()
    assert await log._cluster.settings([topic]) == {}


# Appends in order


async def test_appends_in_order_to_one_partition_share_batches(log: KafkaLog, monkeypatch: pytest.MonkeyPatch) -> None:
    partition = Partition(await make_topic(log, partitions=1), 0)
    callers, times = 30, 20
    sent: list[int] = []
    send_batch: Any = log._appender._producer.send_batch

    async def count(batch: Any, *args: Any, **kwargs: Any) -> Any:
        sent.append(batch.record_count())
        return await send_batch(batch, *args, **kwargs)

    async def call(caller: int) -> None:
        for number in range(times):
            records = [NewRecord(b"", b"%d.%d.%d" % (caller, number, part), []) for part in range(2)]
            first, second = await log.append_in_order(partition, records)
            assert (first.partition, second.offset) == (0, first.offset + 1), "together, as they were given"

    monkeypatch.setattr(log._appender._producer, "send_batch", count)
    await asyncio.gather(*map(call, range(callers)))
    assert sum(sent) == 2 * callers * times
    assert len(sent) < 2 * times
    stored = [record.value for record in await scanned(log, partition)]
    for caller in range(callers):
        own = [b"%d.%d.%d" % (caller, number, part) for number in range(times) for part in range(2)]
        assert [value for value in stored if value.startswith(b"%d." % caller)] == own


async def test_each_batch_of_an_append_in_order_has_the_append_timeout(
    log: KafkaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    partition = Partition(await make_topic(log, partitions=1), 0)
    appender = log._appender
    send_batch: Any = appender._producer.send_batch

    async def slowly(*args: Any, **kwargs: Any) -> Any:
        await asyncio.sleep(0.4)
        return await send_batch(*args, **kwargs)

    await log.append_in_order(partition, [NewRecord(b"", b"first", [])])
    monkeypatch.setattr(appender, "_append_timeout", 1.0)
    monkeypatch.setattr(appender._producer, "send_batch", slowly)
    records = [NewRecord(b"", random.randbytes(200_000), []) for _ in range(5)]  # a batch of each
    began = asyncio.get_running_loop().time()
    positions = await log.append_in_order(partition, records)
    assert asyncio.get_running_loop().time() > began + 2.0
    assert [position.offset for position in positions] == [1, 2, 3, 4, 5]


async def test_a_batch_that_fails_fails_for_all_that_are_in_it_alone(
    log: KafkaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    partition = Partition(await make_topic(log, partitions=1), 0)
    send_batch: Any = log._appender._producer.send_batch
    refused = asyncio.Event()

    async def refuse_once(*args: Any, **kwargs: Any) -> Any:
        if not refused.is_set():
            await asyncio.sleep(0.05)
            refused.set()
            raise KafkaError("refused")
        return await send_batch(*args, **kwargs)

    monkeypatch.setattr(log._appender._producer, "send_batch", refuse_once)
    first = [asyncio.create_task(log.append_in_order(partition, [NewRecord(b"", b"first", [])])) for _ in range(3)]
    await asyncio.sleep(0.02)
    second = [asyncio.create_task(log.append_in_order(partition, [NewRecord(b"", b"second", [])])) for _ in range(3)]
    failed = await asyncio.gather(*first, return_exceptions=True)
    assert {type(each) for each in failed} == {LogUnavailableError}
    assert sorted([position.offset for each in second for position in await each]) == [0, 1, 2]
    assert [record.value for record in await scanned(log, partition)] == [b"second"] * 3


async def test_of_a_batch_that_a_topic_is_too_small_for_the_records_that_fit_are_stored(
    kafka: str, log: KafkaLog
) -> None:
    """A topic's limit was lowered below what a batch may have."""
    partition = Partition(f"t{uuid4().hex}", 0)
    async with administering(kafka) as admin:
        settings = {"message.timestamp.type": "LogAppendTime", "max.message.bytes": "10000"}
        await admin.create_topics([NewTopic(partition.topic, 1, 1, topic_configs=settings)])
    fitting = [b"%d" % number + random.randbytes(6_000) for number in range(4)]
    large = random.randbytes(20_000)
    in_order = [log.append_in_order(partition, [NewRecord(b"", each, [])]) for each in (*fitting, large)]
    *stored, refused = await asyncio.gather(*in_order, return_exceptions=True)
    assert isinstance(refused, RecordTooLargeError)
    assert [each for each in stored if isinstance(each, BaseException)] == []
    appends = [log.append(partition.topic, key=b"", value=each, headers=[]) for each in (*fitting, large)]
    *found, refused_alone = await asyncio.gather(*appends, return_exceptions=True)
    assert isinstance(refused_alone, RecordTooLargeError)
    assert [each for each in found if isinstance(each, BaseException)] == []
    assert sorted([record.value for record in await scanned(log, partition)]) == sorted([*fitting, *fitting])


# Appends that are refused


async def test_a_ping_reports_appends_that_lack_replicas_until_there_are_enough(
    log: KafkaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody appends meanwhile: where the gateway isn't ready, its senders are sent elsewhere."""
    # One broker never lacks replicas. `tests/faults/test_brokers.py` takes two of three away.
    accepting: dict[Partition, bool] = {}

    async def asked(topics: Iterable[str]) -> Mapping[Partition, bool]:
        assert set(topics) == {partition.topic for partition in accepting}
        return accepting

    monkeypatch.setattr(log._cluster, "accepting", asked)
    topic, other = await make_topic(log, partitions=2), await make_topic(log)
    for each in (topic, other):
        await append(log, each, b"a")
    accepting |= {Partition(topic, 0): False, Partition(topic, 1): False, Partition(other, 0): False}
    log._appender._failed_append(topic, NotEnoughReplicasError())
    await asyncio.sleep(MIN_FAILURE_AGE)
    for _ in range(2):
        with pytest.raises(LogUnavailableError, match=rf"append to {topic}: .*NotEnoughReplicas"):
            await log.ping()
    accepting[Partition(topic, 1)] = True
    await log.ping()  # what one partition lacks stops no other
    accepting[Partition(topic, 1)] = False
    with pytest.raises(LogUnavailableError):
        await log.ping()
    accepting |= dict.fromkeys(accepting, True)
    await log.ping()
    accepting |= dict.fromkeys(accepting, False)
    await log.ping()  # nothing was refused since


async def test_a_refusing_partition_is_reported_however_many_accept(
    log: KafkaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    accepting: dict[Partition, bool] = {}

    async def asked(_: Iterable[str]) -> Mapping[Partition, bool]:
        if not accepting:
            raise LogUnavailableError("no response")
        return accepting

    monkeypatch.setattr(log._cluster, "accepting", asked)
    monkeypatch.setattr(append_failures, "PARTITION_MAX_AGE", 0.5)
    topic = await make_topic(log, partitions=2)
    first, lost = Partition(topic, 0), Partition(topic, 1)
    key = next(key for key in (b"%d" % number for number in range(100)) if partition_of(key, 2) == 0)
    assert await log.refusing() == {}
    accepting |= {first: True, lost: False}
    log._appender._failed_append(topic, NotEnoughReplicasError(), 1)
    for _ in range(3):
        await log.append(topic, key=key, value=b"", headers=[])
        found = await log.refusing()
        assert found.keys() == {lost}
        assert re.match("takes no appends: .*NotEnoughReplicas", found[lost])
        await log.ping()  # the others take what comes
        await asyncio.sleep(0.3)
    accepting.clear()
    log._appender._failed_append(topic, NotEnoughReplicasError(), 1)
    await log.append(topic, key=key, value=b"", headers=[])
    assert (await log.refusing()).keys() == {lost}, "nobody says that it takes appends by now"
    accepting |= {first: True, lost: True}
    assert await log.refusing() == {}, "the brokers say so, who had said why"
    log._appender._failed_append(topic, RequestTimedOutError(), 1)
    await log.append(topic, key=key, value=b"", headers=[])
    assert (await log.refusing()).keys() == {lost}, "they don't know why"
    await asyncio.sleep(0.5)
    assert await log.refusing() == {}


async def test_a_successful_append_ends_its_partitions_refusal(log: KafkaLog) -> None:
    topic = await make_topic(log)
    log._appender._failed_append(topic, RequestTimedOutError(), 0)
    await append(log, topic, b"a")
    assert await log.refusing() == {}
    assert not log._appender._failures.are_of_partitions


async def test_where_all_is_refused_no_partition_is_reported(log: KafkaLog, monkeypatch: pytest.MonkeyPatch) -> None:
    topic = await make_topic(log, partitions=2)
    await append(log, topic, b"a")
    refused = dict.fromkeys((Partition(topic, 0), Partition(topic, 1)), False)

    async def asked(_: Iterable[str]) -> Mapping[Partition, bool]:
        return refused

    monkeypatch.setattr(log._cluster, "accepting", asked)
    for number in (0, 1):
        log._appender._failed_append(topic, NotEnoughReplicasError(), number)
    await asyncio.sleep(MIN_FAILURE_AGE)
    assert await log.refusing() == {}
    with pytest.raises(LogUnavailableError):
        await log.ping()


@pytest.mark.parametrize("is_alone", [True, False])
async def test_a_deleted_topics_refusal_is_not_the_logs(kafka: str, log: KafkaLog, *, is_alone: bool) -> None:
    """Before a producer knows of it, it says that the topic's partitions have no leader, or that time is up."""
    topic = await make_topic(log)
    await append(log, topic, b"0")
    other = await make_topic(log)
    if not is_alone:
        await append(log, other, b"0")
    async with administering(kafka) as admin:
        await admin.delete_topics([topic])

    async def is_gone() -> bool:
        return topic not in await log.topics()

    await until(is_gone)
    for error in (NotLeaderForPartitionError(), KafkaTimeoutError()):
        log._appender._failed_append(topic, error, 0)
        await asyncio.sleep(MIN_FAILURE_AGE)
        await log.ping()
        assert await log.refusing() == {}
    if not is_alone:
        log._appender._failed_append(other, RequestTimedOutError())
        log._appender._failed_append(topic, NotLeaderForPartitionError(), 0)
        await asyncio.sleep(MIN_FAILURE_AGE)
        with pytest.raises(LogUnavailableError, match=rf"append to {other}: .*RequestTimedOut"):
            await log.ping()
    await log.create([TopicSpec(name=topic, partitions=1, retention=3600.0)])
    await append(log, topic, b"1")
    await log.ping()


async def test_whether_partitions_take_appends_is_asked_of_the_brokers(log: KafkaLog, kafka: str) -> None:
    topic, strict = await make_topic(log, partitions=2), await make_topic_by(kafka, min_insync_replicas="2")
    assert await log._cluster.accepting([topic, strict, "nowhere"]) == {
        Partition(topic, 0): True,
        Partition(topic, 1): True,
        Partition(strict, 0): True,  # of the one replica that it has
        Partition("nowhere", ALL): False,
    }


async def test_a_refusal_that_brokers_know_nothing_of_is_forgotten_after_a_while(
    log: KafkaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No setting of a broker refuses appends for another reason than these, and doesn't answer a question.
    topic = await make_topic(log)
    await append(log, topic, b"a")
    appender = log._appender
    monkeypatch.setattr(append_failures, "UNEXPLAINED_MAX_AGE", 1.0)
    appender._failed_append(topic, RequestTimedOutError())
    await log.ping()
    await asyncio.sleep(MIN_FAILURE_AGE)
    with pytest.raises(LogUnavailableError, match=r"got .*RequestTimedOut"):
        await log.ping()
    await asyncio.sleep(1.0)
    await log.ping()
    appender._failed_append(topic, RequestTimedOutError())
    await append(log, topic, b"b")
    await asyncio.sleep(MIN_FAILURE_AGE)
    await log.ping()


async def test_a_slow_read_is_not_reported_as_unread(log: KafkaLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gateway.log.kafka.consumer.JOIN_GRACE", 0.0)
    topic = await make_topic(log, partitions=2)
    for group in (None, f"g{uuid4().hex}"):
        owner = Owner()
        consumer = await log.consume(group=group, topics=[topic], listener=owner)
        while len(owner.owned) < 2:
            await consumer.fetch(timeout=0.05)
        assert consumer.unreadable() == {}
        await consumer.close()
