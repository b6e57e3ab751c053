"""The log's contract on a Kafka cluster, composed of an appender, consumers and queries."""

import asyncio
import contextlib
import itertools
import math
from collections.abc import AsyncIterator, Collection, Iterator, Mapping, Sequence

from aiokafka.errors import KafkaError

from gateway.log.base import (
    CLOCK,
    Commit,
    Listener,
    NewRecord,
    Partition,
    Position,
    Record,
    RecordHeaders,
    TopicProblem,
    TopicSpec,
    are_of_different_topics,
)
from gateway.log.kafka.appender import MAX_RECORD_BYTES, Appender
from gateway.log.kafka.broker_clock import BrokerClock
from gateway.log.kafka.cluster import EARLIEST, LATEST, QUERY_TIMEOUT, Cluster
from gateway.log.kafka.connection import PLAIN, Connection, Security, aiokafka_silenced, limit_aiokafka_log
from gateway.log.kafka.consumer import KafkaConsumer
from gateway.log.kafka.errors import message_of
from gateway.log.kafka.scanner import Scanner
from gateway.log.kafka.settled_ends import settled_ends
from gateway.log.kafka.topic_settings import retention_of
from gateway.model import ForbiddenError, LogUnavailableError, UsageError

APPEND_TIMEOUT = 5.0
CLIENT_ID = "gateway"  # The default, such as for the command line.


class KafkaLog:
    """A Kafka cluster as the log. Topics exist before they are used; see `create`."""

    max_record_bytes = MAX_RECORD_BYTES

    def __init__(self, connection: Connection, *, append_timeout: float, repeats: bool) -> None:
        """Used by `open`, which also connects."""
        self._loop = asyncio.get_running_loop()
        self._connection = connection
        self._clock = BrokerClock()
        self._cluster = Cluster(connection)
        self._scanner = Scanner(connection, self._cluster)
        self._appender = Appender(
            connection, cluster=self._cluster, clock=self._clock, append_timeout=append_timeout, repeats=repeats
        )
        self._clock_attempts = itertools.count()
        self._evicted_groups: set[str] = set()
        self._consumers: set[KafkaConsumer] = set()

    @classmethod
    async def open(
        cls,
        servers: str,
        *,
        client_id: str = CLIENT_ID,
        append_timeout: float = APPEND_TIMEOUT,
        security: Security = PLAIN,
        repeats: bool = True,
    ) -> "KafkaLog":
        """Connect to `host:port,host:port`. Raises LogUnavailableError, with the reason, if no broker accepts us.

        A `client_id` other than the default is unique to this process's slot: a group member with the same one is a
        dead predecessor, and is removed from the group when this one joins. If it `repeats`, an append whose result
        isn't known is sent again within its timeout, and may be stored twice; else it fails.
        """
        limit_aiokafka_log()
        connection = Connection(servers=servers, client_id=client_id, security=security)
        opened = cls(connection, append_timeout=append_timeout, repeats=repeats)
        try:
            with aiokafka_silenced():
                async with asyncio.timeout(QUERY_TIMEOUT):
                    await opened._cluster.start()
                    await opened._cluster.ping()  # by the name and port that the broker advertises
                    await opened._appender.start()
        except ForbiddenError:
            await opened.close()
            raise
        except (KafkaError, OSError, TimeoutError, ValueError, LogUnavailableError) as error:
            brokers = opened._cluster.brokers
            await opened.close()
            with aiokafka_silenced():
                problem = await connection.problem(brokers)
            reason = problem or f"expected a broker that answers, got {message_of(error)}"
            raise LogUnavailableError(f"kafka://{servers}: {reason}") from error
        except BaseException:
            await opened.close()
            raise
        return opened

    async def append(
        self, topic: str, *, key: bytes, value: bytes, headers: RecordHeaders, partition: int | None = None
    ) -> Position:
        return await self._appender.append(topic, key=key, value=value, headers=headers, partition=partition)

    async def append_in_order(self, partition: Partition, records: Sequence[NewRecord]) -> Sequence[Position]:
        return await self._appender.append_in_order(partition, records)

    async def consume(
        self, *, group: str | None, topics: Sequence[str], listener: Listener, since: float | None = None
    ) -> "KafkaConsumer":
        """Join a group, or read everything.

        A member waits for topics that it may not see. Without a group, ForbiddenError is raised for one of these, and
        LogUnavailableError for one that doesn't exist.
        """
        described = await self._cluster.describe(topics) if group is None else {}
        for topic in topics if group is None else ():
            if topic not in described:
                raise LogUnavailableError(f"{topic}: expected a topic of the cluster, got none of this name")
        if group is not None and self._connection.client_id != CLIENT_ID and group not in self._evicted_groups:
            await self._cluster.evict(group, self._connection.client_id)
            # Once it has succeeded: later members with our client id are this process's own.
            self._evicted_groups.add(group)
        starts: dict[Partition, int] = {}
        if group is None and since is not None:
            for topic in topics:
                found = await self.offsets_at(topic, since)
                starts |= {Partition(topic, number): offset for number, offset in found.items()}
        consumer = KafkaConsumer(
            cluster=self._cluster,
            clock=self._clock,
            connection=self._connection,
            group=group,
            topics=topics,
            listener=listener,
            starts=starts,
            open_consumers=self._consumers,
        )
        self._consumers.add(consumer)
        try:
            await consumer.start()
        except BaseException:
            await consumer.close()
            raise
        return consumer

    def scan(self, partition: Partition, start: int, end: int) -> AsyncIterator[Sequence[Record]]:
        return self._scanner.scan(partition, start, end)

    async def partitions(self, topics: Collection[str]) -> Mapping[str, int]:
        described = await self._cluster.describe(topics, skip_forbidden=True)
        return {topic: len(partitions) for topic, partitions in described.items()}

    async def bounds(self, topic: str) -> Mapping[int, tuple[int, int]]:
        described = await self._cluster.describe([topic])
        partitions = [Partition(topic, number) for number in described.get(topic, {})]
        first = await self._cluster.offsets(partitions, EARLIEST)
        after_last = await self._cluster.offsets(partitions, LATEST)
        return {partition.number: (first[partition], after_last[partition]) for partition in partitions}

    async def readable(self, topic: str) -> tuple[Mapping[int, tuple[int, int]], Mapping[int, str]]:
        described = await self._cluster.describe([topic])
        partitions = [Partition(topic, number) for number in described.get(topic, {})]
        first, silent = await self._cluster.offsets_with_leader(partitions, EARLIEST)
        after_last, fallen = await self._cluster.offsets_with_leader(list(first), LATEST)
        unreadable = {**silent, **fallen, **self._scanner.damaged(first)}
        found = {each.number: (first[each], end) for each, end in after_last.items() if each not in unreadable}
        return found, {partition.number: reason for partition, reason in unreadable.items()}

    async def settled(
        self, topic: str, numbers: Collection[int]
    ) -> tuple[Mapping[int, tuple[int, int]], Mapping[int, str]]:
        described = await self._cluster.describe([topic])
        partitions = [Partition(topic, number) for number in described.get(topic, {}) if number in numbers]
        first, silent = await self._cluster.offsets_with_leader(partitions, EARLIEST)
        found, problems = await settled_ends(self._cluster, list(first))
        return (
            {partition.number: (first[partition], end) for partition, end in found.items()},
            {partition.number: reason for partition, reason in (*silent.items(), *problems.items())},
        )

    def topic_id(self, topic: str) -> str:
        return self._cluster.topic_ids.get(topic, "")

    async def offsets_at(self, topic: str, at: float, numbers: Collection[int] | None = None) -> Mapping[int, int]:
        described = await self._cluster.describe([topic])
        partitions = [
            Partition(topic, number) for number in described.get(topic, {}) if numbers is None or number in numbers
        ]
        # The ends first: records appended after they were queried are at or above them.
        after_last = await self._cluster.offsets(partitions, LATEST)
        # To the microsecond, so that the millisecond of a record's own `appended_at` isn't rounded up to the next one.
        found = await self._cluster.offsets(partitions, max(0, math.ceil(round(at * 1000, 3))))
        return {
            partition.number: after_last[partition] if found[partition] < 0 else found[partition]
            for partition in partitions
        }

    async def topics(self) -> Collection[str]:
        return await self._cluster.topics()

    async def topics_of(self, group: str) -> Collection[str]:
        return {partition.topic for partition in await self._cluster.commits(group)}

    async def committed(self, group: str, topic: str) -> Mapping[int, Commit]:
        described = await self._cluster.describe([topic])
        commits = await self._cluster.commits(group, [Partition(topic, number) for number in described.get(topic, {})])
        topic_id = self._cluster.topic_ids.get(topic, "")
        return {
            partition.number: commit._replace(topic_id="")
            for partition, commit in commits.items()
            if not are_of_different_topics(commit.topic_id, topic_id)
        }

    async def seed(self, group: str, commits: Mapping[Partition, Commit]) -> None:
        await self._cluster.seed(group, commits)

    async def groups(self, prefix: str) -> Mapping[str, int]:
        return await self._cluster.groups(prefix)

    async def members(self, group: str) -> int:
        return await self._cluster.members(group)

    async def create(self, specs: Sequence[TopicSpec]) -> Sequence[str]:
        """Create the missing topics, with three replicas if there are three brokers, and wait until they have leaders.

        Raises UsageError if the cluster forbids it.
        """
        with _required():
            created = await self._cluster.create(specs)
            await self._appender.load_metadata([spec.name for spec in specs])
            return created

    async def check(self, specs: Sequence[TopicSpec]) -> Sequence[TopicProblem]:
        """Compare the topics with their specifications. On a cluster of one broker, missing replicas aren't fatal.

        Raises UsageError if the cluster forbids it.
        """
        with _required():
            await self._appender.load_metadata((await self._cluster.describe([spec.name for spec in specs])).keys())
            return await self._cluster.check(specs)

    async def retentions(self, topics: Collection[str]) -> Mapping[str, float]:
        there = await self._cluster.describe(topics, skip_forbidden=True)
        return {name: retention_of(found) for name, found in (await self._cluster.settings(there.keys())).items()}

    def now(self) -> float:
        """Return the brokers' time, estimated from acknowledgements and records; before the first, this machine's."""
        return self._clock.now()

    async def synchronize(self, topic: str) -> None:
        """If nothing was acknowledged yet, append a record, each time to another partition: one may be unavailable."""
        if not self._clock.is_known:
            await self.append(topic, key=CLOCK + b"%d" % next(self._clock_attempts), value=b"", headers=[])

    async def ping(self) -> None:
        """Return if a broker responds and appends aren't all refused. Raises LogUnavailableError within 6 s."""
        await self._cluster.ping()
        await self._appender.check_appends()

    async def refusing(self) -> Mapping[Partition, str]:
        return await self._appender.refusing()

    async def close(self) -> None:
        """Finish the appends in flight, and close the consumers that are still open and the connections, within 5 s."""
        closing = [consumer.close() for consumer in self._consumers]
        results = await asyncio.gather(*closing, self._appender.close(), self._scanner.close(), return_exceptions=True)
        await self._cluster.close()
        for result in results:
            if isinstance(result, BaseException):
                raise result


@contextlib.contextmanager
def _required() -> Iterator[None]:
    """Translate what a process that runs can wait for, but what one that starts has to have, as rules have to."""
    try:
        yield
    except ForbiddenError as error:
        raise UsageError(str(error)) from error
