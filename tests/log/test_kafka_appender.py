"""The appender of Kafka without a broker: when appends are given up, and what one that fails says of its topic."""

import asyncio
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, cast

import pytest
from aiokafka.protocol.metadata import MetadataResponse_v1
from aiokafka.structs import RecordMetadata

from gateway.log.base import NewRecord, Partition, Position
from gateway.log.kafka import append_failures
from gateway.log.kafka import appender as appender_module
from gateway.log.kafka.appender import Appender
from gateway.log.kafka.broker_clock import BrokerClock
from gateway.log.kafka.connection import Connection
from gateway.model import LogUnavailableError

if TYPE_CHECKING:
    from aiokafka import AIOKafkaProducer, TopicPartition

    from gateway.log.kafka.cluster import Cluster

TIMEOUT = 0.5


class FakeCluster:
    """Knows which topics exist, and counts how often it is asked."""

    def __init__(self, *topics: str) -> None:
        self.topics = topics
        self.asked: list[Collection[str]] = []

    async def describe(
        self,
        topics: Iterable[str],
        *,
        skip_forbidden: bool = False,  # noqa: ARG002 - the cluster's signature
    ) -> Mapping[str, Mapping[int, Sequence[int]]]:
        self.asked.append(list(topics))
        await asyncio.sleep(0)
        return {topic: {0: [1]} for topic in self.asked[-1] if topic in self.topics}

    async def accepting(self, topics: Collection[str]) -> Mapping[Partition, bool]:
        return {Partition(topic, 0): True for topic in topics}


class FakeProducer:
    """A producer that connects at once, and notes whose metadata it has."""

    def __init__(self) -> None:
        self.loaded: list[str] = []

    async def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass

    async def partitions_for(self, topic: str) -> set[int]:
        self.loaded.append(topic)
        return {0}


def an_appender(*topics: str) -> tuple[Appender, FakeCluster]:
    cluster = FakeCluster(*topics)
    return (
        Appender(
            Connection(servers="127.0.0.1:1", client_id="test"),
            cluster=cast("Cluster", cluster),
            clock=BrokerClock(),
            append_timeout=TIMEOUT,
            repeats=True,
        ),
        cluster,
    )


async def test_an_old_append_is_given_up_though_a_younger_one_was_sent_before_it() -> None:
    appender, _ = an_appender()
    loop = asyncio.get_running_loop()
    young, old = loop.create_future(), loop.create_future()
    appender._pending.extend([(loop.time(), young), (loop.time() - TIMEOUT, old)])
    appender._sweep()
    assert (young.done(), old.done()) == (False, True)
    with pytest.raises(Exception, match=r"no acknowledgement in 0\.5 s"):
        old.result()
    await appender.close()


async def test_a_topic_that_does_not_exist_is_asked_for_once_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    appender, cluster = an_appender()

    async def append() -> None:
        with pytest.raises(LogUnavailableError, match="append to missing"):
            await appender.append("missing", key=b"", value=b"", headers=[])

    await asyncio.gather(*[append() for _ in range(20)])
    await append()
    assert cluster.asked == [["missing"]]
    monkeypatch.setattr(appender_module, "MISSING_MAX_AGE", 0.0)
    await append()
    assert cluster.asked == [["missing"]] * 2
    await appender.close()


async def test_a_new_producer_knows_the_topics_in_use_before_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    appender, _ = an_appender("a", "b")
    old, new = appender._producer, FakeProducer()
    monkeypatch.setattr(appender, "_new_producer", lambda: new)
    appender._appended_to.update(["a", "b", "deleted"])
    loading = new.partitions_for

    async def partitions_for(topic: str) -> set[int]:
        assert appender._producer is old
        return await loading(topic)

    monkeypatch.setattr(new, "partitions_for", partitions_for)
    await appender._replace_producer()
    assert appender._producer is cast("AIOKafkaProducer", new)
    assert sorted(new.loaded) == ["a", "b"]


def metadata(topic: str, partitions: int) -> MetadataResponse_v1:
    """Return what a broker that leads all partitions of a topic says of them."""
    led = [(0, number, 1, [1], [1]) for number in range(partitions)]
    return MetadataResponse_v1(brokers=[(1, "127.0.0.1", 1, None)], controller_id=1, topics=[(0, topic, False, led)])


def acknowledging(appender: Appender, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let brokers acknowledge each batch of the appender's producer at once."""

    async def add_batch(_builder: object, where: "TopicPartition", _timeout: float) -> asyncio.Future[RecordMetadata]:
        stored = asyncio.get_running_loop().create_future()
        stored.set_result(RecordMetadata(where.topic, where.partition, where, 0, 1000, 1, 0))
        return stored

    monkeypatch.setattr(appender._producer._message_accumulator, "add_batch", add_batch)


async def test_appends_in_order_know_how_many_partitions_a_topic_has_by_now(monkeypatch: pytest.MonkeyPatch) -> None:
    appender, _ = an_appender("t")
    acknowledging(appender, monkeypatch)

    async def append(number: int) -> Sequence[Position]:
        return await appender.append_in_order(Partition("t", number), [NewRecord(b"k", b"v", [])])

    known = appender._producer.client.cluster
    known.update_metadata(metadata("t", 4))
    assert [stored.partition for stored in await append(3)] == [3]
    known.update_metadata(metadata("t", 8))
    assert [stored.partition for stored in await append(5)] == [5]
    known.update_metadata(metadata("t", 4))  # recreated
    with pytest.raises(LogUnavailableError, match="append to t"):
        await append(5)
    await appender.close()


async def test_an_append_that_did_not_even_learn_its_topic_is_forgotten_after_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    appender, cluster = an_appender("t")

    async def describe(*_: object, **__: object) -> Mapping[str, Mapping[int, Sequence[int]]]:
        await asyncio.sleep(TIMEOUT + 1)
        return {}

    with monkeypatch.context() as hanging:
        hanging.setattr(cluster, "describe", describe)
        with pytest.raises(LogUnavailableError, match="no metadata in time"):
            await appender.append("t", key=b"", value=b"", headers=[])
    monkeypatch.setattr(append_failures, "MIN_FAILURE_AGE", 0.0)
    with pytest.raises(LogUnavailableError, match="no metadata in time"):
        await appender.check_appends()
    monkeypatch.setattr(append_failures, "UNEXPLAINED_MAX_AGE", 0.0)
    await appender.check_appends()
    await appender.close()
