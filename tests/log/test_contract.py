"""Every log keeps the contract of `gateway/log/base.py`, whose sentences these tests follow."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from time import time

import pytest
from typing_extensions import override

from gateway.log.base import (
    CLOCK,
    Assignment,
    Batch,
    Commit,
    Consumer,
    Log,
    NewRecord,
    Partition,
    Position,
    Record,
    TopicSpec,
)
from gateway.model import LogUnavailableError, RecordTooLargeError, UsageError
from tests.log.conftest import Subject

PATIENCE = 20.0  # Seconds; a broker's group takes a few until it has settled.
MIB = 1 << 20

# The embedded log has no leaders, and on Kafka it takes a cluster to lose one: tests/log/test_kafka.py.
WITH_LEADERS = pytest.mark.parametrize("subject", ["memory"], indirect=True)

# The embedded log is one process's, and a group of it has one member.
WITH_REBALANCES = pytest.mark.parametrize("subject", ["memory", "kafka"], indirect=True)


class Owner:
    """A listener that records its calls, without the ids of topics, and returns prepared commits on revocation."""

    def __init__(self, commits: Mapping[Partition, Commit] | None = None) -> None:
        self.commits = dict(commits or {})
        self.assignments: dict[Partition, Assignment] = {}
        self.told: list[str] = []
        self.deleted: list[int] = []
        self.revocations: list[set[Partition]] = []

    def assigned(self, assignments: Sequence[Assignment], without_position: Collection[Partition] = ()) -> None:  # noqa: ARG002 - the listener's signature
        self.told.append("assigned")
        self.assignments.update({each.partition: each._replace(topic_id="") for each in assignments})

    def records_deleted(self, partition: Partition, deleted: range) -> None:  # noqa: ARG002 - there is one partition
        self.deleted += list(deleted)

    def restarted(self, assignment: Assignment) -> None:
        self.told.append("restarted")
        self.assignments[assignment.partition] = assignment._replace(topic_id="")

    async def revoked(self, partitions: Sequence[Partition]) -> Mapping[Partition, Commit]:
        self.told.append("revoked")
        self.revocations.append(set(partitions))
        for partition in partitions:
            del self.assignments[partition]
        return {partition: commit for partition, commit in self.commits.items() if partition in partitions}


async def make_topic(
    log: Log,
    subject: Subject,
    name: str = "events",
    *,
    partitions: int = 1,
    retention: float | None = 86400.0,
    compacted: bool = False,
) -> str:
    spec = TopicSpec(name=subject.prefix + name, partitions=partitions, retention=retention, compacted=compacted)
    assert await log.create([spec]) == [spec.name]
    return spec.name


async def append(log: Log, topic: str, *values: bytes, key: bytes = b"k") -> list[Position]:
    return [await log.append(topic, key=key, value=value, headers=[("n", b"1")]) for value in values]


@asynccontextmanager
async def consuming(
    log: Log, *topics: str, group: str | None, owner: Owner | None = None
) -> AsyncIterator[tuple[Consumer, Owner]]:
    """Consume, and wait until all partitions of the topics are assigned."""
    owner = owner or Owner()
    consumer = await log.consume(group=group, topics=topics, listener=owner)
    try:
        expected = {Partition(topic, number) for topic in topics for number in await log.bounds(topic)}
        await wait_for_assignment(consumer, owner, expected)
        yield consumer, owner
    finally:
        await consumer.close()


async def wait_for_assignment(consumer: Consumer, owner: Owner, expected: set[Partition]) -> None:
    async with asyncio.timeout(PATIENCE):
        while set(owner.assignments) != expected:
            for partition in owner.assignments:
                consumer.pause(partition)
            assert not await consumer.fetch(timeout=0.05)
    for partition in expected:
        consumer.resume(partition)


async def fetch(consumer: Consumer, count: int) -> list[Batch]:
    """Fetch until `count` records have come."""
    batches: list[Batch] = []
    async with asyncio.timeout(PATIENCE):
        while sum(len(batch.records) for batch in batches) < count:
            batches += await consumer.fetch(timeout=1.0)
    assert sum(len(batch.records) for batch in batches) == count
    return batches


async def values(consumer: Consumer, count: int) -> list[bytes]:
    return [record.value for batch in await fetch(consumer, count) for record in batch.records]


async def fetch_until(consumer: Consumer, value: bytes) -> None:
    """Fetch until a record with this value is the last one."""
    last: bytes | None = None
    async with asyncio.timeout(PATIENCE):
        while last != value:
            for batch in await consumer.fetch(timeout=1.0):
                last = batch.records[-1].value


async def scan(log: Log, partition: Partition, start: int, end: int) -> list[Record]:
    return [record async for batch in log.scan(partition, start, end) for record in batch]


# Records


@pytest.mark.parametrize(
    ("key", "value", "headers"),
    [
        (b"key", b'{"a": 1}', [("ce_id", b"evt_1"), ("content-type", b"application/json")]),
        (b"\x00\xff", b"", []),
        (b"k", bytes(range(256)) * 40, [("h", b""), ("h", b"\x00\xff\r\n"), ("a", b"second"), ("h", b"third")]),
        (b"k", b"\xc3\x28\x00", [("ünï", bytes(range(256)))]),
    ],
    ids=["usual", "empty", "binary", "not utf-8"],
)
async def test_a_record_is_read_as_it_was_appended(
    subject: Subject, key: bytes, value: bytes, headers: list[tuple[str, bytes]]
) -> None:
    """From memory or from the disk, by a consumer or a scan."""
    async with subject.open() as log:
        topic = await make_topic(log, subject)
        async with consuming(log, topic, group=None) as (consumer, _):
            position = await log.append(topic, key=key, value=value, headers=headers)
            ((_, fetched),) = await fetch(consumer, 1)
        async with consuming(log, topic, group=None) as (consumer, _):
            ((_, fetched_later),) = await fetch(consumer, 1)
        scanned = await scan(log, Partition(topic, 0), 0, 1)
        for (record,) in (fetched, fetched_later, scanned):
            assert record.offset == position.offset
            assert record.appended_at == position.appended_at
            assert (record.key, record.value) == (key, value)
            assert list(record.headers) == headers


async def test_offsets_of_a_partition_ascend(subject: Subject) -> None:
    async with subject.open() as log:
        topic = await make_topic(log, subject)
        positions = await append(log, topic, b"a", b"b", b"c")
        together = await asyncio.gather(*[append(log, topic, b"%d" % n) for n in range(50)])
        offsets = [position.offset for position in positions]
        assert offsets == sorted(set(offsets))
        assert len({position.offset for (position,) in together}) == 50
        scanned = [record.offset for record in await scan(log, Partition(topic, 0), 0, 1000)]
        assert scanned == sorted({*offsets, *[position.offset for (position,) in together]})


async def test_the_same_key_has_the_same_partition(subject: Subject) -> None:
    async with subject.open() as log:
        topic = await make_topic(log, subject, partitions=3)
        keys = [b"%d" % n for n in range(12)]
        first = {key: (await append(log, topic, b"1", key=key))[0].partition for key in keys}
        second = {key: (await append(log, topic, b"2", key=key))[0].partition for key in keys}
        assert first == second
        for key, number in first.items():
            assert key in [record.key for record in await scan(log, Partition(topic, number), 0, 1000)]


async def test_a_record_exists_for_every_process_once_append_has_returned(subject: Subject) -> None:
    async with subject.open() as log, subject.open() as other:
        topic = await make_topic(log, subject)
        await append(log, topic, b"mine")
        await append(other, topic, b"theirs")
        for reader in (log, other):
            assert [r.value for r in await scan(reader, Partition(topic, 0), 0, 10)] == [b"mine", b"theirs"]
    async with subject.open() as log:
        assert [r.value for r in await scan(log, Partition(topic, 0), 0, 10)] == [b"mine", b"theirs"]


async def test_a_record_is_stamped_by_the_clock_of_the_log(subject: Subject) -> None:
    async with subject.open() as log:
        topic = await make_topic(log, subject)
        first, second = await append(log, topic, b"a", b"b")
        assert first.appended_at <= second.appended_at
        assert second.appended_at == pytest.approx(log.now(), abs=2.0)
        assert log.now() == pytest.approx(time(), abs=5.0)
        assert log.now() <= log.now()


async def test_a_synchronized_log_stamps_by_its_own_clock(subject: Subject) -> None:
    async with subject.open() as log:
        topic = await make_topic(log, subject, partitions=3)
        await log.synchronize(topic)
        before = log.now()
        (position,) = await append(log, topic, b"a")
        assert before - 2.0 <= position.appended_at <= log.now() + 2.0
        records = [
            each for number in await log.bounds(topic) for each in await scan(log, Partition(topic, number), 0, 9)
        ]
        assert [each.value for each in records if not each.key.startswith(CLOCK)] == [b"a"]


# append


async def test_a_record_that_is_too_large_is_refused_at_once(subject: Subject) -> None:
    async with subject.open() as log:
        topic = await make_topic(log, subject)
        headers = [("name", b"value")]
        room = log.max_record_bytes - len(b"key" + b"name" + b"value")
        with pytest.raises(RecordTooLargeError, match=r"expected .* got"):
            await log.append(topic, key=b"key", value=bytes(room + 1), headers=headers)
        await log.append(topic, key=b"key", value=bytes(room), headers=headers)
        assert [len(record.value) for record in await scan(log, Partition(topic, 0), 0, 10)] == [room]


async def test_cancelling_the_wait_does_not_undo_an_append(subject: Subject) -> None:
    async with subject.open() as log:
        topic = await make_topic(log, subject)
        cancelled = asyncio.create_task(append(log, topic, b"cancelled"))
        others = [asyncio.create_task(append(log, topic, b"%d" % n)) for n in range(5)]
        await asyncio.sleep(0)
        cancelled.cancel()
        await asyncio.wait([cancelled, *others])
        await append(log, topic, b"last")
        stored = {record.value for record in await scan(log, Partition(topic, 0), 0, 10)}
        assert stored == {b"cancelled", b"0", b"1", b"2", b"3", b"4", b"last"}


async def test_an_append_to_a_topic_that_is_not_there_fails(subject: Subject) -> None:
    async with subject.open() as log:
        topic = await make_topic(log, subject)
        missing, stored = await asyncio.gather(
            append(log, f"{subject.prefix}none", b"a"), append(log, topic, b"b"), return_exceptions=True
        )
        assert isinstance(missing, LogUnavailableError)
        assert isinstance(stored, list)
        assert await log.bounds(f"{subject.prefix}none") == {}


async def test_records_are_appended_to_one_partition_in_their_order(subject: Subject) -> None:
    """Whatever others append meanwhile, and however many batches they are."""
    async with subject.open() as log, subject.open() as other:
        topic = await make_topic(log, subject, partitions=3)
        partition = Partition(topic, len(await log.bounds(topic)) - 1)
        records = [NewRecord(b"k%d" % (n % 7), b"%d " % n + bytes(n % 11 * 10_000), [("n", b"1")]) for n in range(200)]
        beside = [asyncio.create_task(append(other, topic, b"x" * n, key=b"%d" % n)) for n in range(100)]
        positions = await log.append_in_order(partition, records)
        await asyncio.gather(*beside)
        assert {position.partition for position in positions} == {partition.number}
        offsets = [position.offset for position in positions]
        assert offsets == sorted(set(offsets))
        stored = {record.offset: record for record in await scan(log, partition, 0, 1000)}
        assert [(stored[offset].key, stored[offset].value) for offset in offsets] == [each[:2] for each in records]
        assert all(stored[each.offset].appended_at == each.appended_at for each in positions)


@pytest.mark.parametrize("subject", ["memory", "kafka"], indirect=True)
async def test_an_append_to_a_given_partition_is_stored_there_whatever_its_key(subject: Subject) -> None:
    async with subject.open() as log:
        topic = await make_topic(log, subject, partitions=3)
        for number in (0, 2):
            found = [
                await log.append(topic, key=b"%d" % key, value=b"", headers=[], partition=number) for key in range(8)
            ]
            assert [(each.partition, each.offset) for each in found] == [(number, key) for key in range(8)]


async def test_an_append_to_a_partition_that_is_not_there_fails(subject: Subject) -> None:
    async with subject.open() as log:
        topic = await make_topic(log, subject)
        with pytest.raises(LogUnavailableError):
            await log.append(topic, key=b"", value=b"", headers=[], partition=1)
        assert (await log.append(topic, key=b"", value=b"", headers=[], partition=0)).offset == 0


async def test_an_ordered_append_that_is_too_large_or_nowhere_fails(subject: Subject) -> None:
    async with subject.open() as log:
        topic = await make_topic(log, subject)
        large = NewRecord(b"key", bytes(log.max_record_bytes), [])
        with pytest.raises(RecordTooLargeError, match=r"expected .* got"):
            await log.append_in_order(Partition(topic, 0), [NewRecord(b"key", b"small", []), large])
        for nowhere in (Partition(topic, 7), Partition(f"{subject.prefix}none", 0)):
            with pytest.raises(LogUnavailableError):
                await log.append_in_order(nowhere, [NewRecord(b"key", b"small", [])])
        largest = NewRecord(b"key", bytes(log.max_record_bytes - 3), [])
        await log.append_in_order(Partition(topic, 0), [largest, NewRecord(b"key", b"last", [])])
        assert (await scan(log, Partition(topic, 0), 0, 10))[-1].value == b"last"


async def test_closing_finishes_the_appends_under_way(subject: Subject) -> None:
    async with subject.open() as log:
        topic = await make_topic(log, subject)
        appends = [asyncio.create_task(append(log, topic, b"%d" % n)) for n in range(100)]
        await asyncio.sleep(0)
    acknowledged = {position.offset for (position,) in await asyncio.gather(*appends)}
    async with subject.open() as log:
        stored = {record.offset for record in await scan(log, Partition(topic, 0), 0, 1000)}
        assert stored == acknowledged
        assert len(stored) == 100


# fetch


async def test_a_consumer_gets_every_record_once_in_order(subject: Subject) -> None:
    """Those that were there, those appended while it reads, and those that come once it has read all."""
    async with subject.open() as log, asyncio.TaskGroup() as tasks:
        topic = await make_topic(log, subject)
        await append(log, topic, *[b"%d" % n for n in range(30)])
        async with consuming(log, topic, group=f"{subject.prefix}g") as (consumer, _):
            tasks.create_task(append(log, topic, *[b"%d" % n for n in range(30, 60)]))
            assert await values(consumer, 60) == [b"%d" % n for n in range(60)]
            await append(log, topic, *[b"%d" % n for n in range(60, 90)])
            assert await values(consumer, 30) == [b"%d" % n for n in range(60, 90)]


async def test_a_consumer_gets_another_processs_appends(subject: Subject) -> None:
    async with subject.open() as log, subject.open() as other:
        topic = await make_topic(log, subject)
        async with consuming(log, topic, group=f"{subject.prefix}g") as (consumer, _):
            await append(log, topic, b"mine")
            assert await values(consumer, 1) == [b"mine"]
            await append(other, topic, b"theirs")
            await append(log, topic, b"mine again")
            assert await values(consumer, 2) == [b"theirs", b"mine again"]
            await append(other, topic, b"theirs again")
            assert await values(consumer, 1) == [b"theirs again"]


async def test_a_fetch_waits_for_a_record_and_no_longer_than_its_timeout(subject: Subject) -> None:
    async with subject.open() as log, asyncio.TaskGroup() as tasks:
        topic = await make_topic(log, subject)
        async with consuming(log, topic, group=None) as (consumer, _):
            started = time()
            assert not await consumer.fetch(timeout=0.1)
            assert 0.05 < time() - started < 2.0
            started = time()
            waiting = tasks.create_task(fetch(consumer, 1))
            await asyncio.sleep(0)
            await append(log, topic, b"a")
            await waiting
            assert time() - started < 5.0


async def test_a_fetch_that_is_cancelled_loses_nothing(subject: Subject) -> None:
    async with subject.open() as log:
        topic = await make_topic(log, subject)
        await append(log, topic, *[b"%d" % n for n in range(5)])
        async with consuming(log, topic, group=None) as (consumer, _):
            for _ in range(3):
                waiting = asyncio.create_task(consumer.fetch(timeout=1.0))
                await asyncio.sleep(0)
                waiting.cancel()
                # A fetch may have been done before it was cancelled; what it returned is not lost then.
                if not (await asyncio.wait([waiting]))[0].pop().cancelled():
                    assert await values_left(consumer, waiting.result(), 5) == [b"%d" % n for n in range(5)]
                    return
            assert await values(consumer, 5) == [b"%d" % n for n in range(5)]


async def values_left(consumer: Consumer, had: Sequence[Batch], count: int) -> list[bytes]:
    first = [record.value for batch in had for record in batch.records]
    return first + (await values(consumer, count - len(first)) if len(first) < count else [])


async def test_a_fetch_returns_at_most_500_records_of_a_partition(subject: Subject) -> None:
    async with subject.open() as log:
        topic = await make_topic(log, subject)
        async with consuming(log, topic, group=None) as (tail, _):
            await asyncio.gather(*[append(log, topic, b"%d" % n) for n in range(1200)])
            async with consuming(log, topic, group=None) as (consumer, _):
                for reader in (tail, consumer):
                    batches = await fetch(reader, 1200)
                    assert max(len(batch.records) for batch in batches) <= 500
                    offsets = [record.offset for batch in batches for record in batch.records]
                    assert offsets == sorted(set(offsets))


async def test_a_fetch_returns_at_most_a_mebibyte_of_a_partition(subject: Subject) -> None:
    async with subject.open() as log:
        topic = await make_topic(log, subject)
        async with consuming(log, topic, group=None) as (tail, _):
            await asyncio.gather(*[append(log, topic, bytes(400_000)) for _ in range(6)])
            async with consuming(log, topic, group=None) as (consumer, _):
                for reader in (tail, consumer):
                    for batch in await fetch(reader, 6):
                        assert sum(len(record.value) for record in batch.records) <= MIB


async def test_a_fetch_returns_at_most_as_many_bytes_as_it_is_asked_for_or_one_larger_record(subject: Subject) -> None:
    """From memory or from the disk; none is skipped where a fetch ends, and a later fetch may ask for more."""
    sizes = [300, 300, 300, 5_000, 300, 300, 2_000, 300]
    async with subject.open() as log:
        topic, other = await make_topic(log, subject), await make_topic(log, subject, "other")
        async with consuming(log, topic, other, group=None) as (tail, _):
            await log.append_in_order(Partition(topic, 0), [NewRecord(b"k", bytes(size), []) for size in sizes])
            await log.append_in_order(Partition(other, 0), [NewRecord(b"k", bytes(size), []) for size in sizes])
            async with consuming(log, topic, other, group=None) as (consumer, _):
                for reader in (tail, consumer):
                    read: dict[str, list[int]] = {topic: [], other: []}
                    async with asyncio.timeout(PATIENCE):
                        while min(map(len, read.values())) < 6:
                            for batch in await reader.fetch(timeout=1.0, max_bytes=1_000):
                                got = [len(record.value) for record in batch.records]
                                assert sum(got) <= 1_000 or len(got) == 1
                                read[batch.partition.topic] += got
                    for batch in await fetch(reader, 16 - sum(map(len, read.values()))):
                        read[batch.partition.topic] += [len(record.value) for record in batch.records]
                    assert read == {topic: sizes, other: sizes}


async def test_a_paused_partition_is_not_fetched_until_it_is_resumed(subject: Subject) -> None:
    async with subject.open() as log:
        paused = await make_topic(log, subject, "paused")
        other = await make_topic(log, subject, "other")
        async with consuming(log, paused, other, group=None) as (consumer, _):
            await append(log, paused, b"1")
            assert await values(consumer, 1) == [b"1"]
            consumer.pause(Partition(paused, 0))
            await append(log, paused, b"2", b"3")
            await append(log, other, b"x")
            assert await values(consumer, 1) == [b"x"]
            assert not await consumer.fetch(timeout=0.3)
            consumer.resume(Partition(paused, 0))
            assert await values(consumer, 2) == [b"2", b"3"]


async def test_pausing_an_unassigned_partition_is_ignored(subject: Subject) -> None:
    async with subject.open() as log:
        topic = await make_topic(log, subject)
        async with consuming(log, topic, group=None) as (consumer, _):
            for unknown in (Partition("nothing", 0), Partition(topic, 99)):
                consumer.pause(unknown)
                consumer.resume(unknown)
            await append(log, topic, b"1")
            assert await values(consumer, 1) == [b"1"]


async def test_a_new_assignment_starts_unpaused(subject: Subject) -> None:
    async with subject.open() as log:
        topic = await make_topic(log, subject)
        await append(log, topic, b"1")
        async with consuming(log, topic, group=f"{subject.prefix}g") as (consumer, _):
            consumer.pause(Partition(topic, 0))
        async with consuming(log, topic, group=f"{subject.prefix}g") as (consumer, _):
            assert await values(consumer, 1) == [b"1"]


async def test_the_lag_counts_the_records_after_the_last_fetched_one(subject: Subject) -> None:
    async with subject.open() as log:
        topic = await make_topic(log, subject)
        await append(log, topic, *[b"%d" % n for n in range(7)])
        async with consuming(log, topic, group=None) as (consumer, _):
            partition = Partition(topic, 0)
            await fetch(consumer, 7)
            assert consumer.lag() == {partition: 0}
            consumer.pause(partition)
            await append(log, topic, b"8", b"9")
            consumer.resume(partition)
            await fetch(consumer, 2)
            assert consumer.lag() == {partition: 0}


# Groups


async def test_a_group_without_a_commit_starts_at_the_start_of_the_log(subject: Subject) -> None:
    async with subject.open() as log:
        topic = await make_topic(log, subject)
        await append(log, topic, b"0", b"1")
        async with consuming(log, topic, group=f"{subject.prefix}g") as (consumer, owner):
            partition = Partition(topic, 0)
            assert owner.assignments == {partition: Assignment(partition, Commit(0), 0, is_committed=False)}
            assert await values(consumer, 2) == [b"0", b"1"]
        assert await log.committed(f"{subject.prefix}g", topic) == {}


@pytest.mark.parametrize("done", [b"", b"\x05", b"\x00\xff" * 1024], ids=["no bits", "two bits", "2,048 bytes"])
@pytest.mark.parametrize("note", [b"", b"\x00:\xff", bytes(range(248)) * 4], ids=["no note", "a note", "992 bytes"])
async def test_a_commit_comes_back_bit_by_bit(subject: Subject, done: bytes, note: bytes) -> None:
    async with subject.open() as log, subject.open() as other:
        topic = await make_topic(log, subject)
        group, partition = f"{subject.prefix}g", Partition(topic, 0)
        await append(log, topic, b"0", b"1", b"2", b"3")
        async with consuming(log, topic, group=group) as (consumer, _):
            await consumer.commit({partition: Commit(1)})
            await consumer.commit({partition: Commit(2, done, note)})
            await consumer.commit({partition: Commit(2, done, note)})
            assert await log.committed(group, topic) == {0: Commit(2, done, note)}
            assert await other.committed(group, topic) == {0: Commit(2, done, note)}
            assert await log.committed(f"{subject.prefix}other", topic) == {}
        async with consuming(log, topic, group=group) as (consumer, owner):
            assert owner.assignments == {partition: Assignment(partition, Commit(2, done, note), 0)}
            assert await values(consumer, 2) == [b"2", b"3"]


async def test_a_commit_of_an_unassigned_partition_is_skipped(subject: Subject) -> None:
    async with subject.open() as log:
        topic = await make_topic(log, subject)
        foreign = await make_topic(log, subject, "foreign")
        group = f"{subject.prefix}g"
        await append(log, topic, b"0")
        async with consuming(log, topic, group=group) as (consumer, _):
            await consumer.commit({Partition(foreign, 0): Commit(5), Partition(topic, 0): Commit(1)})
            await consumer.commit({Partition(foreign, 0): Commit(6)})
        await consumer.commit({Partition(topic, 0): Commit(0)})
        assert await log.committed(group, foreign) == {}
        assert await log.committed(group, topic) == {0: Commit(1)}


async def test_closing_revokes_commits_and_leaves_the_group(subject: Subject) -> None:
    async with subject.open() as log:
        topic = await make_topic(log, subject)
        group, partition = f"{subject.prefix}g", Partition(topic, 0)
        await append(log, topic, b"0", b"1", b"2")
        leaving = Owner({partition: Commit(1, b"\x02"), Partition("foreign", 0): Commit(9)})
        async with consuming(log, topic, group=group, owner=leaving) as (consumer, _):
            await fetch(consumer, 3)
        assert leaving.told[-2:] == ["assigned", "revoked"]
        assert leaving.revocations[-1] == {partition}
        assert await log.committed(group, topic) == {0: Commit(1, b"\x02")}
        async with consuming(log, topic, group=group) as (consumer, owner):
            assert owner.assignments[partition].commit == Commit(1, b"\x02")
            assert await values(consumer, 2) == [b"1", b"2"]


async def test_groups_do_not_know_each_other(subject: Subject) -> None:
    async with subject.open() as log:
        topic = await make_topic(log, subject)
        await append(log, topic, b"0")
        async with (
            consuming(log, topic, group=f"{subject.prefix}a") as (one, _),
            consuming(log, topic, group=f"{subject.prefix}b") as (other, _),
        ):
            assert await values(one, 1) == await values(other, 1) == [b"0"]
            await one.commit({Partition(topic, 0): Commit(1)})
        assert await log.committed(f"{subject.prefix}b", topic) == {}


async def test_records_deleted_unread_show_as_a_base_below_the_start_of_the_log(subject: Subject) -> None:
    if subject.delete_below is None:
        pytest.skip("needs a log whose retention the suite can bring about")
    async with subject.open() as log:
        topic = await make_topic(log, subject)
        group, partition = f"{subject.prefix}g", Partition(topic, 0)
        await append(log, topic, b"0", b"1", b"2", b"3")
        async with consuming(log, topic, group=group) as (consumer, _):
            await consumer.commit({partition: Commit(1)})
        await subject.delete_below(partition, 3)
        assert await log.bounds(topic) == {0: (3, 4)}
        async with consuming(log, topic, group=group) as (consumer, owner):
            assert owner.assignments == {partition: Assignment(partition, Commit(1), 3)}
            assert await values(consumer, 1) == [b"3"]


async def test_records_deleted_unread_are_reported_to_their_reader(subject: Subject) -> None:
    if subject.delete_below is None:
        pytest.skip("needs a log whose retention the suite can bring about")
    async with subject.open() as log:
        topic = await make_topic(log, subject)
        partition = Partition(topic, 0)
        async with consuming(log, topic, group=f"{subject.prefix}g") as (consumer, owner):
            await append(log, topic, b"0", b"1")
            assert await values(consumer, 2) == [b"0", b"1"]
            await append(log, topic, b"2")
            assert await values(consumer, 1) == [b"2"]
            consumer.pause(partition)
            await consumer.fetch(timeout=0.2)
            await append(log, topic, *[b"%d" % number for number in range(3, 9)])
            await subject.delete_below(partition, 6)
            consumer.resume(partition)
            assert await values(consumer, 3) == [b"6", b"7", b"8"]
            assert owner.deleted == [3, 4, 5]
            consumer.pause(partition)
            await consumer.fetch(timeout=0.2)
            await append(log, topic, b"9", b"10")
            await subject.delete_below(partition, 10)
            async with asyncio.timeout(PATIENCE):
                while owner.deleted != [3, 4, 5, 9]:  # although nothing is read
                    assert not await consumer.fetch(timeout=0.1)
            consumer.resume(partition)
            assert await values(consumer, 1) == [b"10"]
            assert owner.deleted == [3, 4, 5, 9]
            assert "restarted" not in owner.told


async def test_a_seed_sets_a_groups_start_but_replaces_no_commit(subject: Subject) -> None:
    async with subject.open() as log:
        topic = await make_topic(log, subject)
        group, partition = f"{subject.prefix}g", Partition(topic, 0)
        await append(log, topic, b"0", b"1", b"2", b"3")
        await log.seed(group, {partition: Commit(1, b"\x02")})
        assert await log.committed(group, topic) == {0: Commit(1, b"\x02")}
        await log.seed(group, {partition: Commit(3)})
        async with consuming(log, topic, group=group) as (consumer, owner):
            assert owner.assignments == {partition: Assignment(partition, Commit(1, b"\x02"), 0)}
            assert await values(consumer, 3) == [b"1", b"2", b"3"]
            await log.seed(group, {partition: Commit(0)})
        assert await log.committed(group, topic) == {0: Commit(1, b"\x02")}


async def test_groups_are_found_with_the_number_of_their_members(subject: Subject) -> None:
    async with subject.open() as log:
        topic = await make_topic(log, subject)
        group, *others = [f"{subject.prefix}ordered/{name}" for name in ("g", "h", "i")]
        partition = Partition(topic, 0)
        assert await log.groups(f"{subject.prefix}ordered/") == {}
        for name in (group, *others, f"{subject.prefix}other"):
            await log.seed(name, {partition: Commit(1)})
        without = dict.fromkeys(others, 0)
        async with consuming(log, topic, group=group):
            assert await log.groups(f"{subject.prefix}ordered/") == {group: 1, **without}
        assert await log.groups(f"{subject.prefix}ordered/") == {group: 0, **without}


async def test_the_members_of_a_group_are_counted_without_a_commit_or_a_partition_for_each(subject: Subject) -> None:
    async with subject.open() as log:
        topic = await make_topic(log, subject)
        group = f"{subject.prefix}g"
        assert await log.members(group) == 0
        async with consuming(log, topic, group=group), consuming(log, topic, group=f"{subject.prefix}other"):
            assert await log.members(group) == 1
            try:
                second = await log.consume(group=group, topics=[topic], listener=Owner())
            except UsageError:
                return  # here a group has one member at most
            async with asyncio.timeout(PATIENCE):
                while await log.members(group) < 2:
                    await second.fetch(timeout=0.05)
            await second.close()
            assert await log.members(group) == 1
        assert await log.members(group) == 0


async def test_work_that_ends_during_a_revocation_is_committed(subject: Subject) -> None:
    class Patient(Owner):
        @override
        async def revoked(self, partitions: Sequence[Partition]) -> Mapping[Partition, Commit]:
            await asyncio.sleep(0.1)
            return dict.fromkeys(await super().revoked(partitions), Commit(2))

    async with subject.open() as log:
        topic = await make_topic(log, subject)
        group, partition = f"{subject.prefix}g", Partition(topic, 0)
        await append(log, topic, b"0", b"1")
        async with consuming(log, topic, group=group, owner=Patient({partition: Commit(1)})) as (consumer, _):
            assert await values(consumer, 2) == [b"0", b"1"]
        assert await log.committed(group, topic) == {0: Commit(2)}


class Committing(Owner):
    """A listener that commits while it gives partitions up."""

    consumer: Consumer
    accepted = 0

    @override
    async def revoked(self, partitions: Sequence[Partition]) -> Mapping[Partition, Commit]:
        if partitions:
            await self.consumer.commit(dict.fromkeys(partitions, Commit(1)))
            self.accepted += len(partitions)
        return await super().revoked(partitions)


async def test_a_commit_while_a_member_leaves_is_stored(subject: Subject) -> None:
    async with subject.open() as log:
        topic = await make_topic(log, subject)
        group = f"{subject.prefix}g"
        await append(log, topic, b"0", b"1")
        async with consuming(log, topic, group=group, owner=(owner := Committing())) as (consumer, _):
            owner.consumer = consumer
        assert owner.accepted == 1
        assert await log.committed(group, topic) == {0: Commit(1)}


@WITH_REBALANCES
async def test_a_commit_during_a_revocation_is_stored(subject: Subject) -> None:
    async with subject.open() as log, subject.open() as other, asyncio.TaskGroup() as tasks:
        topic = await make_topic(log, subject, partitions=2)
        group, coming = f"{subject.prefix}g", Owner()
        await asyncio.gather(*[append(log, topic, b"", key=b"%d" % n) for n in range(50)])
        async with consuming(log, topic, group=group, owner=(staying := Committing())) as (consumer, _):
            staying.consumer = consumer
            joining = tasks.create_task(other.consume(group=group, topics=[topic], listener=coming))
            async with asyncio.timeout(PATIENCE):
                while not (joining.done() and coming.assignments):
                    await consumer.fetch(timeout=0.05)
                    if joining.done():
                        await joining.result().fetch(timeout=0.05)
            assert staying.accepted == 2
            assert [assignment.commit for assignment in coming.assignments.values()] == [Commit(1)]
            await joining.result().close()


@WITH_REBALANCES
async def test_a_new_member_starts_at_the_revoked_ones_commit(subject: Subject) -> None:
    async with subject.open() as log, subject.open() as other, asyncio.TaskGroup() as tasks:
        topic = await make_topic(log, subject, partitions=4)
        # Nobody has finished records that aren't there: 7 is below the end of each partition.
        await asyncio.gather(*[append(log, topic, b"", key=b"%d" % n) for n in range(100)])
        group = f"{subject.prefix}g"
        everything = {Partition(topic, number) for number in range(4)}
        staying = Owner({partition: Commit(7, b"\x01") for partition in everything})
        coming = Owner()
        async with consuming(log, topic, group=group, owner=staying) as (consumer, _):
            assert staying.told[-1] == "assigned"
            joining = tasks.create_task(other.consume(group=group, topics=[topic], listener=coming))
            async with asyncio.timeout(PATIENCE):
                while not (joining.done() and coming.assignments and len(staying.assignments) == 2):
                    await consumer.fetch(timeout=0.05)
                    if joining.done():
                        await joining.result().fetch(timeout=0.05)
            assert staying.revocations[0] == everything
            assert staying.told[-1] == "assigned"
            assert set(staying.assignments) | set(coming.assignments) == everything
            assert not set(staying.assignments) & set(coming.assignments)
            assert {assignment.commit for assignment in coming.assignments.values()} == {Commit(7, b"\x01")}
            await joining.result().close()
            await wait_for_assignment(consumer, staying, everything)


@WITH_REBALANCES
async def test_a_member_cannot_commit_another_members_partition(subject: Subject) -> None:
    async with subject.open() as log, subject.open() as other, asyncio.TaskGroup() as tasks:
        topic = await make_topic(log, subject, partitions=2)
        group = f"{subject.prefix}g"
        staying, coming = Owner(), Owner()
        async with consuming(log, topic, group=group, owner=staying) as (consumer, _):
            joining = tasks.create_task(other.consume(group=group, topics=[topic], listener=coming))
            async with asyncio.timeout(PATIENCE):
                while not (joining.done() and coming.assignments and len(staying.assignments) == 1):
                    await consumer.fetch(timeout=0.05)
                    if joining.done():
                        await joining.result().fetch(timeout=0.05)
            await consumer.commit({Partition(topic, number): Commit(3) for number in range(2)})
            (kept,) = staying.assignments
            assert await log.committed(group, topic) == {kept.number: Commit(3)}
            await joining.result().close()


async def test_without_a_group_every_reader_gets_every_partition_from_its_start(subject: Subject) -> None:
    async with subject.open() as log, subject.open() as other:
        topic = await make_topic(log, subject, partitions=3)
        for n in range(9):
            await append(log, topic, b"%d" % n, key=b"%d" % n)
        expected = Counter(b"%d" % n for n in range(9))
        async with (
            consuming(log, topic, group=None) as (one, owner),
            consuming(other, topic, group=None) as (two, _),
        ):
            assert set(owner.assignments) == {Partition(topic, number) for number in await log.bounds(topic)}
            assert Counter(await values(one, 9)) == Counter(await values(two, 9)) == expected
            await one.commit({partition: Commit(1) for partition in owner.assignments})
        async with consuming(log, topic, group=None) as (again, _):
            assert Counter(await values(again, 9)) == expected


# scan, bounds, create, check


async def test_a_scan_reads_from_its_start_up_to_its_end(subject: Subject) -> None:
    async with subject.open() as log, subject.open() as other:
        topic = await make_topic(log, subject)
        await asyncio.gather(*[append(log, topic, b"%d" % n) for n in range(1100)])
        partition = Partition(topic, 0)
        for reader in (log, other):
            for start, end in ((0, 1100), (3, 5), (1098, 9999), (5, 5), (7, 3), (2000, 3000)):
                offsets = [record.offset for record in await scan(reader, partition, start, end)]
                assert offsets == list(range(start, min(end, 1100)))


async def test_topics_are_listed_and_those_a_group_has_committed(subject: Subject) -> None:
    async with subject.open() as log:
        one, other = [f"{subject.prefix}{name}" for name in ("one", "other")]
        await log.create([TopicSpec(name=name, partitions=1, retention=3600.0) for name in (one, other)])
        assert {one, other} <= set(await log.topics())
        assert set(await log.topics_of(f"{subject.prefix}group")) == set()
        await log.append(one, key=b"k", value=b"v", headers=[])
        async with consuming(log, one, other, group=f"{subject.prefix}group") as (consumer, _):
            (batch,) = await fetch(consumer, 1)
            await consumer.commit({batch.partition: Commit(1)})
        assert set(await log.topics_of(f"{subject.prefix}group")) == {one}


async def test_the_bounds_are_the_first_offset_and_the_one_after_the_last(subject: Subject) -> None:
    async with subject.open() as log:
        assert await log.bounds(f"{subject.prefix}none") == {}
        topic = await make_topic(log, subject)
        assert await log.bounds(topic) == {0: (0, 0)}
        await append(log, topic, b"0", b"1")
        assert await log.bounds(topic) == {0: (0, 2)}


async def test_a_time_is_where_the_first_record_at_or_after_it_is(subject: Subject) -> None:
    async with subject.open() as log:
        assert await log.offsets_at(f"{subject.prefix}none", 0.0) == {}
        topic = await make_topic(log, subject)
        assert await log.offsets_at(topic, log.now()) == {0: 0}
        positions = await append(log, topic, b"0")
        async with asyncio.timeout(PATIENCE):
            # Apart by more than a broker's millisecond, several with the same one.
            while positions[-1].appended_at < positions[0].appended_at + 0.01:
                positions += await append(log, topic, b"more")
        end = positions[-1].offset + 1
        first: dict[float, int] = {}
        for position in positions:
            first.setdefault(position.appended_at, position.offset)
        moments = sorted(first)
        for earlier, later in (moments[:2], moments[-2:]):
            for at in (later, (earlier + later) / 2):
                assert await log.offsets_at(topic, at) == {0: first[later]}
        assert await log.offsets_at(topic, 0.0) == {0: 0}
        assert await log.offsets_at(topic, moments[-1] + 0.001) == {0: end}
        if subject.delete_below is not None:
            await subject.delete_below(Partition(topic, 0), end - 1)
            assert await log.offsets_at(topic, 0.0) == {0: end - 1}


async def test_a_reader_without_a_group_begins_at_a_time(subject: Subject) -> None:
    async with subject.open() as log:
        topic = await make_topic(log, subject, partitions=3)
        for number in range(30):
            await append(log, topic, b"%d" % number, key=b"%d" % number)
        consumer = await log.consume(group=None, topics=[topic], listener=Owner(), since=0.0)
        assert sum(len(batch.records) for batch in await fetch(consumer, 30)) == 30
        await consumer.close()
        consumer = await log.consume(group=None, topics=[topic], listener=Owner(), since=log.now() + 60)
        await append(log, topic, b"new")
        assert [record.value for batch in await fetch(consumer, 1) for record in batch.records] == [b"new"]
        await consumer.close()


async def test_a_time_is_looked_up_in_every_partition(subject: Subject) -> None:
    async with subject.open() as log:
        topic = await make_topic(log, subject, partitions=3)
        for number in range(30):
            await append(log, topic, b"", key=b"%d" % number)
        bounds = await log.bounds(topic)
        assert await log.offsets_at(topic, 0.0) == {number: first for number, (first, _) in bounds.items()}
        assert await log.offsets_at(topic, log.now() + 60) == {number: end for number, (_, end) in bounds.items()}


async def test_a_time_is_looked_up_in_those_partitions_that_are_asked_for(subject: Subject) -> None:
    async with subject.open() as log:
        topic = await make_topic(log, subject, partitions=3)
        for number in range(30):
            await append(log, topic, b"", key=b"%d" % number)
        whole = await log.offsets_at(topic, log.now() + 60)
        assert await log.offsets_at(topic, log.now() + 60, whole.keys()) == whole
        for number, end in whole.items():
            assert await log.offsets_at(topic, log.now() + 60, [number]) == {number: end}
        assert await log.offsets_at(topic, 0.0, [7]) == {}
        assert await log.offsets_at(topic, 0.0, []) == {}
        assert await log.offsets_at(f"{subject.prefix}none", 0.0, [0]) == {}


async def test_readable_partitions_are_reported_with_their_bounds(subject: Subject) -> None:
    async with subject.open() as log:
        assert await log.readable(f"{subject.prefix}none") == ({}, {})
        topic = await make_topic(log, subject, partitions=3)
        bounds, unread = await log.readable(topic)
        async with asyncio.timeout(PATIENCE):
            while unread:  # a broker hears a moment later that it leads what was just made
                await asyncio.sleep(0.05)
                bounds, unread = await log.readable(topic)
        assert bounds == dict.fromkeys(range((await log.partitions([topic]))[topic]), (0, 0))
        for number in range(30):
            await append(log, topic, b"", key=b"%d" % number)
        assert await log.readable(topic) == (await log.bounds(topic), {})
        if subject.delete_below is not None:
            await subject.delete_below(Partition(topic, 0), 2)
            bounds, unread = await log.readable(topic)
            assert (bounds, unread) == (await log.bounds(topic), {})
            assert bounds[0][0] == 2


@WITH_LEADERS
async def test_a_partition_without_a_leader_is_reported_and_the_others_are_answered(subject: Subject) -> None:
    assert subject.lose_leader is not None
    async with subject.open() as log:
        topic = await make_topic(log, subject, partitions=3)
        for number in range(30):
            await append(log, topic, b"", key=b"%d" % number)
        whole = await log.bounds(topic)
        subject.lose_leader(Partition(topic, 1))
        bounds, unread = await log.readable(topic)
        assert bounds == {number: its for number, its in whole.items() if number != 1}
        assert unread.keys() == {1}
        assert unread[1]
        for question in (log.bounds(topic), log.offsets_at(topic, 0.0), log.offsets_at(topic, 0.0, [1])):
            with pytest.raises(LogUnavailableError):
                await question
        assert await log.offsets_at(topic, 0.0, bounds.keys()) == {
            number: first for number, (first, _) in bounds.items()
        }


async def test_creating_adds_missing_topics_and_leaves_the_rest(subject: Subject) -> None:
    async with subject.open() as log:
        topic = await make_topic(log, subject, retention=3600.0)
        await append(log, topic, b"0")
        there = TopicSpec(name=topic, partitions=1, retention=7200.0)
        missing = TopicSpec(name=f"{subject.prefix}new", partitions=1, retention=3600.0)
        assert await log.create([there, missing]) == [missing.name]
        assert await log.create([there, missing]) == []
        assert await log.bounds(topic) == {0: (0, 1)}
        assert [p.topic for p in await log.check([there, missing]) if "retention" in p.message] == [topic]


async def test_checking_reports_unsafe_settings(subject: Subject) -> None:
    async with subject.open() as log:
        topic = await make_topic(log, subject, retention=3600.0)
        kept = await make_topic(log, subject, "kept", retention=None, compacted=True)

        async def problems(name: str, retention: float | None, *, compacted: bool = False) -> list[str]:
            spec = TopicSpec(name=name, partitions=1, retention=retention, compacted=compacted)
            # A single broker has one replica, which is reported, too.
            found = [p for p in await log.check([spec]) if "replica" not in p.message]
            assert all(p.is_fatal and p.topic == name for p in found)
            return [p.message for p in found]

        assert await problems(topic, 3600.0) == []
        assert await problems(topic, 60.0) == []
        assert await problems(kept, None, compacted=True) == []
        assert len(await problems(topic, 3601.0)) == 1
        assert len(await problems(f"{subject.prefix}none", 3600.0)) == 1


async def test_a_compacted_topic_keeps_the_last_record_of_each_key(subject: Subject) -> None:
    async with subject.open() as log:
        topic = await make_topic(log, subject, retention=None, compacted=True)
        group = f"{subject.prefix}g"
        async with consuming(log, topic, group=group) as (consumer, _):
            for n in range(6):
                await append(log, topic, b"%d" % n, key=b"%d" % (n % 2))
            await fetch_until(consumer, b"5")
            await consumer.commit({Partition(topic, 0): Commit(2)})
        last = {record.key: record.value for record in await scan(log, Partition(topic, 0), 0, 100)}
        assert last == {b"0": b"4", b"1": b"5"}
        async with consuming(log, topic, group=group) as (consumer, owner):
            # What compaction has deleted is a gap, not a loss.
            assert owner.assignments[Partition(topic, 0)].log_start == 0
            await fetch_until(consumer, b"5")


async def test_a_log_answers_a_ping(subject: Subject) -> None:
    async with subject.open() as log:
        await log.ping()
