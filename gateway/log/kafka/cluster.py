"""Queries and administration of the brokers: topics, offsets, groups and their commits."""

import asyncio
import contextlib
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import structlog
from aiokafka.client import AIOKafkaClient, CoordinationType
from aiokafka.errors import (
    KafkaError,
    LeaderNotAvailableError,
    NodeNotReadyError,
    NoError,
    SaslAuthenticationFailed,
    TopicAlreadyExistsError,
    UnknownTopicOrPartitionError,
    for_code,
)
from aiokafka.protocol.admin import (
    CreateTopicsRequest,
    DescribeConfigsRequest,
    DescribeGroupsRequest,
    ListGroupsRequest,
)
from aiokafka.protocol.api import Request
from aiokafka.protocol.commit import OffsetCommitRequest, OffsetFetchRequest
from aiokafka.protocol.group import LeaveGroupRequest
from aiokafka.protocol.metadata import MetadataRequest
from aiokafka.protocol.offset import OffsetRequest

from gateway.log.base import ALL, Commit, Partition, TopicProblem, TopicSpec, missing_problem
from gateway.log.kafka.commit_metadata import decode_commit, encode_metadata
from gateway.log.kafka.connection import RETRY_BACKOFF, Connection, stop
from gateway.log.kafka.errors import (
    FORBIDDEN,
    MISCONFIGURED,
    is_of_a_closed_connection,
    message_of,
    raise_for,
    translated_errors,
)
from gateway.log.kafka.topic_metadata import TopicMetadata, TopicMetadataRequest, topics_of
from gateway.log.kafka.topic_settings import (
    REPLICAS,
    exact_partition_problems,
    partition_problems,
    record_problems,
    replication_problems,
    retention_problems,
    settings_of,
)
from gateway.model import ForbiddenError, LogUnavailableError

QUERY_TIMEOUT = 5.0
REQUEST_TIMEOUT = 1.5  # For one broker, within a query: if it hangs there is time to ask another.
PING_TIMEOUT = 3.0

EARLIEST, LATEST = -2, -1  # Of ListOffsets.
CONSUMER = -1  # Who asks for offsets.
TOPIC = 2  # A resource type of DescribeConfigs.

T = TypeVar("T")

logger = structlog.get_logger(__name__)


class Cluster:
    """Queries over a connection of its own, so that appends that wait for replicas don't delay them."""

    def __init__(self, connection: Connection) -> None:
        self._client = AIOKafkaClient(**connection.options, request_timeout_ms=int(1000 * REQUEST_TIMEOUT))
        self.topic_ids: dict[str, str] = {}
        """The id of each topic, as of the last query of its offsets; those that brokers don't tell are missing."""
        self.leaders: dict[Partition, int] = {}
        """The broker that leads each partition, as of the last query of its offsets."""
        self._former_topic_ids: set[str] = set()
        self._is_closed = False
        self._connecting: dict[int | None, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._failures: Counter[int | None] = Counter()  # to connect to each broker
        self._avoided_until: dict[int | None, float] = {}  # broker → until when others are preferred

    async def start(self) -> None:
        await self._client.bootstrap()

    async def close(self) -> None:
        self._is_closed = True
        await stop(self._client)

    @property
    def brokers(self) -> Collection[tuple[str, int]]:
        """The brokers' addresses, as they advertise them."""
        return [(broker.host, broker.port) for broker in self._client.cluster.brokers()]

    async def ping(self) -> None:
        with translated_errors("ping"):
            async with asyncio.timeout(PING_TIMEOUT):
                await self._send(MetadataRequest([], allow_auto_topic_creation=False))

    async def accepting(self, topics: Iterable[str]) -> Mapping[Partition, bool]:
        """Return for each partition of these topics whether appends can succeed: it has a leader, and enough replicas.

        A topic that doesn't exist has one entry, of the number `ALL`. Raises LogUnavailableError within 3 s.
        """
        names = sorted(set(topics))
        with translated_errors("replicas"):
            async with asyncio.timeout(PING_TIMEOUT):
                metadata = await self._send(MetadataRequest(names, allow_auto_topic_creation=False))
                configured = await self._send(DescribeConfigsRequest([(TOPIC, name, None) for name in names]))
        needed = {
            name: int(entry[1])
            for code, _, _, name, entries in configured.resources
            if for_code(code) is NoError
            for entry in entries
            if entry[0] == "min.insync.replicas"
        }
        missing = {
            Partition(topic, ALL): False
            for code, topic, *_ in metadata.topics
            if for_code(code) is UnknownTopicOrPartitionError
        }
        return missing | {
            # No more replicas are required than there are.
            Partition(topic, number): leader >= 0 and len(in_sync) >= min(needed.get(topic, 1), len(replicas))
            for _, topic, _, partitions in metadata.topics
            for _, number, leader, replicas, in_sync, *_ in partitions
        }

    async def describe(
        self, topics: Iterable[str], *, are_led: bool = False, skip_forbidden: bool = False
    ) -> Mapping[str, Mapping[int, Sequence[int]]]:
        """Return the replicas of each partition of the topics that exist; with `are_led`, once all have a leader.

        Raises ForbiddenError for a topic that we may not see, or omits it, with `skip_forbidden`.
        """
        names = sorted(set(topics))

        async def query() -> Mapping[str, Mapping[int, Sequence[int]]]:
            topics = list(topics_of(await self._send(TopicMetadataRequest(names))))
            self._learn_ids(topics)
            described = {}
            for topic in topics:
                error = for_code(topic.error_code)
                if error is UnknownTopicOrPartitionError or (skip_forbidden and error in MISCONFIGURED):
                    continue
                if error is not NoError:
                    raise error(topic.name)
                if are_led and any(leader < 0 for leader in topic.leaders.values()):
                    raise LeaderNotAvailableError(topic.name)
                described[topic.name] = topic.replicas
            return described

        return await self._query(f"metadata of {', '.join(names)}", query) if names else {}

    async def topics(self) -> Collection[str]:
        """Return the names of all topics."""

        async def query() -> Collection[str]:
            response = await self._send(MetadataRequest(None, allow_auto_topic_creation=False))
            return [topic for _, topic, *_ in response.topics]

        return await self._query("topics", query)

    async def leader(self, partition: Partition) -> int:
        """Return the broker that leads a partition. Raises KafkaError: the caller tries again."""
        for topic in topics_of(await self._send(TopicMetadataRequest([partition.topic]))):
            raise_for(topic.error_code, topic.name)
            if (leader := topic.leaders.get(partition.number, -1)) >= 0:
                return leader
        raise LeaderNotAvailableError(f"{partition.topic}/{partition.number}: no leader")

    async def offsets(self, partitions: Collection[Partition], at: int) -> Mapping[Partition, int]:
        """Return each partition's first offset (EARLIEST), the one after its last (LATEST), or the first at a time.

        A time is in milliseconds since the epoch; -1 means no record at or after it.
        """

        async def query() -> Mapping[Partition, int]:
            found, missing = await self._offsets(partitions, at, CONSUMER)
            for error in missing.values():
                raise error
            return found

        return await self._query("offsets", query) if partitions else {}

    async def offsets_with_leader(
        self, partitions: Collection[Partition], at: int, *, replica: int = CONSUMER
    ) -> tuple[Mapping[Partition, int], Mapping[Partition, str]]:
        """Return the same for the partitions whose leader responds, as to a replica; and the reason for the others."""

        async def query() -> tuple[Mapping[Partition, int], Mapping[Partition, KafkaError]]:
            return await self._offsets(partitions, at, replica)

        found, missing = await self._query("offsets", query) if partitions else ({}, {})
        return found, {partition: message_of(error) for partition, error in missing.items()}

    async def _offsets(
        self, partitions: Collection[Partition], at: int, replica: int = CONSUMER
    ) -> tuple[Mapping[Partition, int], Mapping[Partition, KafkaError]]:
        """Query all leaders once, concurrently: one that hangs delays only its own partitions."""
        names = sorted({partition.topic for partition in partitions})
        topics = list(topics_of(await self._send(TopicMetadataRequest(names))))
        self._learn_ids(topics)
        leaders = {
            Partition(topic.name, number): leader for topic in topics for number, leader in topic.leaders.items()
        }
        self.leaders |= leaders
        forbidden = {topic.name: error for topic in topics if (error := for_code(topic.error_code)) in MISCONFIGURED}
        found: dict[Partition, int] = {}
        missing: dict[Partition, KafkaError] = {}
        by_leader: dict[int, list[Partition]] = defaultdict(list)
        for partition in partitions:
            leader = leaders.get(partition)
            if partition.topic in forbidden:
                missing[partition] = forbidden[partition.topic](partition.topic)
            elif leader is None:
                missing[partition] = UnknownTopicOrPartitionError(f"{partition.topic}/{partition.number}: not there")
            elif leader < 0:
                missing[partition] = LeaderNotAvailableError(f"{partition.topic}/{partition.number}: no leader")
            else:
                by_leader[leader].append(partition)

        asked = [self._offsets_at(leader, its, at, replica) for leader, its in by_leader.items()]
        for some in await asyncio.gather(*asked):
            for partition, response in some.items():
                if isinstance(response, int):
                    found[partition] = response
                else:
                    missing[partition] = response
        return found, missing

    def _learn_ids(self, topics: Iterable[TopicMetadata]) -> None:
        """Note the ids of topics. A broker that hasn't heard yet that one was recreated changes nothing."""
        for topic in topics:
            known = self.topic_ids.get(topic.name, topic.id)
            if topic.id and topic.id not in self._former_topic_ids:
                self.topic_ids[topic.name] = topic.id
                if known != topic.id:
                    self._former_topic_ids.add(known)

    async def _offsets_at(
        self, leader: int, its: Sequence[Partition], at: int, replica: int = CONSUMER
    ) -> Mapping[Partition, int | KafkaError]:
        topics: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for topic, number in its:
            topics[topic].append((number, at))
        try:
            response = await self._send(OffsetRequest(replica, 0, list(topics.items())), leader)
        except MISCONFIGURED:
            raise
        except KafkaError as error:
            return dict.fromkeys(its, error)
        results: dict[Partition, int | KafkaError] = {}
        for topic, found in response.topics:
            for number, code, _, offset in found:
                kind = for_code(code)
                results[Partition(topic, number)] = offset if kind is NoError else kind(f"{topic}/{number}")
        return results

    async def commits(self, group: str, partitions: Collection[Partition] | None = None) -> Mapping[Partition, Commit]:
        """Return a group's commits of these partitions, or of all; partitions without one are omitted."""
        by_topic: dict[str, list[int]] = defaultdict(list)
        for topic, number in partitions or ():
            by_topic[topic].append(number)
        wanted = None if partitions is None else list(by_topic.items())

        async def query() -> Mapping[Partition, Commit]:
            coordinator = await self._client.coordinator_lookup(CoordinationType.GROUP, group)
            response = await self._send(OffsetFetchRequest(group, wanted), coordinator)
            raise_for(getattr(response, "error_code", 0), group)
            commits = {}
            for topic, results in response.topics:
                for number, offset, metadata, code in results:
                    raise_for(code, f"{topic}/{number}")
                    if offset >= 0:
                        commits[Partition(topic, number)] = decode_commit(offset, metadata or "")
            return commits

        return await self._query(f"commits of {group}", query) if wanted != [] else {}

    async def seed(self, group: str, commits: Mapping[Partition, Commit]) -> None:
        """Commit without being a member, which Kafka allows as long as the group has none."""

        async def query() -> None:
            known = await self.commits(group, list(commits))
            topics: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
            for partition, commit in commits.items():
                if partition not in known:
                    topics[partition.topic].append((partition.number, commit.base, encode_metadata(commit)))
            if not topics:
                return
            coordinator = await self._client.coordinator_lookup(CoordinationType.GROUP, group)
            response = await self._send(OffsetCommitRequest(group, -1, "", -1, list(topics.items())), coordinator)
            for topic, results in response.topics:
                for number, code in results:
                    raise_for(code, f"{topic}/{number}")

        await self._query(f"first commits of {group}", query)

    async def groups(self, prefix: str) -> Mapping[str, int]:
        async def query() -> Mapping[str, int]:
            metadata = await self._send(MetadataRequest([], allow_auto_topic_creation=False))
            found: dict[str, int] = {}
            for broker in metadata.brokers:
                node = broker[0]
                listed = await self._send(ListGroupsRequest(), node)
                raise_for(listed.error_code, "groups")
                for name in [name for name, *_ in listed.groups if name.startswith(prefix)]:
                    # One by one: aiokafka doesn't know a group's last field, and parses it as the next group's.
                    described = await self._send(DescribeGroupsRequest([name]), node)
                    for code, _, _, _, _, members, *_ in described.groups:
                        raise_for(code, name)
                        found[name] = len(members)
            return found

        return await self._query(f"groups of {prefix}", query)

    async def members(self, group: str) -> int:
        async def query() -> int:
            coordinator = await self._client.coordinator_lookup(CoordinationType.GROUP, group)
            described = await self._send(DescribeGroupsRequest([group]), coordinator)
            count = 0
            for code, _, _, _, _, members, *_ in described.groups:
                raise_for(code, group)
                count += len(members)
            return count

        return await self._query(f"members of {group}", query)

    async def evict(self, group: str, client_id: str) -> None:
        """Remove a client's members from a group.

        A killed one would keep its partitions until its session times out, and a rebalance that it was joining for
        longer.
        """

        async def query() -> None:
            coordinator = await self._client.coordinator_lookup(CoordinationType.GROUP, group)
            response = await self._send(DescribeGroupsRequest([group]), coordinator)
            for code, _, _, _, _, members, *_ in response.groups:
                raise_for(code, group)
                for member in [identity for identity, client, *_ in members if client == client_id]:
                    await self._send(LeaveGroupRequest(group, member), coordinator)
                    logger.info("log_predecessor_evicted", group=group, member=member)

        await self._query(f"members of {group}", query)

    async def create(self, specs: Sequence[TopicSpec]) -> Sequence[str]:
        present = await self.describe([spec.name for spec in specs])
        missing = {spec.name: spec for spec in specs if spec.name not in present}
        if not missing:
            return []
        missing_before = list(missing)
        created = []

        async def query() -> None:
            metadata = await self._send(MetadataRequest([], allow_auto_topic_creation=False))
            replicas = min(REPLICAS, len(metadata.brokers))
            wanted: list[Any] = [
                (spec.name, spec.partitions, replicas, [], list(settings_of(spec, replicas).items()))
                for spec in missing.values()
            ]
            request = CreateTopicsRequest(wanted, int(1000 * QUERY_TIMEOUT), validate_only=False)
            response = await self._send(request, metadata.controller_id)
            for topic, code, *message in response.topic_errors:
                error = for_code(code)
                if error is NoError:
                    created.append(topic)
                elif error is not TopicAlreadyExistsError:
                    raise error(f"{topic}: {message[0] if message else ''}")
                missing.pop(topic, None)

        await self._query("create topics", query)

        async def wait_for_leaders() -> None:
            described = await self.describe(missing_before, are_led=True)
            for name in missing_before:
                if name not in described:
                    raise UnknownTopicOrPartitionError(name)

        await self._query("leaders of new topics", wait_for_leaders)
        return created

    async def check(self, specs: Sequence[TopicSpec]) -> Sequence[TopicProblem]:
        described = await self.describe([spec.name for spec in specs])
        names = [spec.name for spec in specs if spec.name in described]
        problems = []

        async def query() -> int:
            return len((await self._send(MetadataRequest([], allow_auto_topic_creation=False))).brokers)

        brokers = await self._query("brokers", query)
        settings = await self.settings(names)
        for spec in specs:
            if spec.name not in described:
                problems.append(missing_problem(spec))
                continue
            replicas = min([len(nodes) for nodes in described[spec.name].values()], default=0)
            found = settings.get(spec.name)
            wrong = [
                *partition_problems(spec, len(described[spec.name])),
                *replication_problems(replicas, found or {}, is_single_broker=brokers == 1),
            ]
            if found is None:
                wrong.append(
                    (False, "configuration: expected to be allowed to read it (DescribeConfigs), got a refusal")
                )
            else:
                wrong += [*record_problems(found), *retention_problems(spec, found)]
            problems += [
                TopicProblem(topic=spec.name, message=message, is_fatal=True, is_tolerable=False)
                for message in exact_partition_problems(spec, len(described[spec.name]))
            ]
            problems += [
                TopicProblem(topic=spec.name, message=message, is_fatal=is_fatal and not spec.is_best_effort)
                for is_fatal, message in wrong
            ]
        return problems

    async def settings(self, topics: Collection[str]) -> Mapping[str, Mapping[str, str]]:
        """Return the configuration of topics; those that don't exist, or that we may not describe, are omitted."""

        async def query() -> Mapping[str, Mapping[str, str]]:
            settings = {}
            response = await self._send(DescribeConfigsRequest([(TOPIC, name, None) for name in sorted(topics)]))
            for code, _, _, name, entries in response.resources:
                if for_code(code) not in (*FORBIDDEN, UnknownTopicOrPartitionError):
                    raise_for(code, name)
                    settings[name] = {entry[0]: entry[1] for entry in entries}
            return settings

        return await self._query("configuration of topics", query) if topics else {}

    async def _send(self, request: Request[Any], node: int | None = None) -> Any:  # noqa: ANN401 - built by version
        if self._is_closed:  # a request would connect again
            raise LogUnavailableError("expected a log that is open, got one that was closed")
        asked = self._any_node() if node is None else node
        try:
            await self._connect(asked)
            response = await self._client.send(asked, request)
        except KeyError as error:
            # Raised by client.send when the connection that it waited for is already replaced.
            raise NodeNotReadyError(f"node {asked}") from error
        except KafkaError:
            self._avoided_until[asked] = asyncio.get_running_loop().time() + QUERY_TIMEOUT
            raise
        if isinstance(request, MetadataRequest | TopicMetadataRequest) and not response.brokers:
            # aiokafka skips the first half of a refusal (RFC 7628, section 3.2.3), and parses the second one as a
            # response.
            raise SaslAuthenticationFailed("the token was refused")
        return response

    async def _connect(self, node: int | None) -> None:
        """Connect to a broker, unless that is done. Raises NodeNotReadyError, also for those that waited meanwhile.

        aiokafka connects to one broker at a time: if each query tried one that hangs, none would reach the others.
        """
        failures = self._failures[node]
        async with self._connecting[node]:
            if self._failures[node] == failures and await self._client.ready(node):
                return
            self._failures[node] += 1
        raise NodeNotReadyError(f"node {node}")

    def _any_node(self) -> int | None:
        """Return a broker: if possible one that hasn't failed to respond in the last 5 s."""
        node: int | None = self._client.get_random_node()
        if self._avoided_until.get(node, 0.0) <= asyncio.get_running_loop().time():
            return node
        nodes = [broker.nodeId for broker in self._client.cluster.brokers()]
        return min(nodes, key=lambda each: self._avoided_until.get(each, 0.0), default=None)

    async def _query(self, what: str, query: Callable[[], Awaitable[T]]) -> T:
        """Retry a query until it succeeds, for at most 5 s."""
        last: Exception | None = None
        try:
            async with asyncio.timeout(QUERY_TIMEOUT):
                while True:
                    try:
                        return await query()
                    except MISCONFIGURED as error:
                        raise ForbiddenError(f"{what}: {message_of(error)}") from error
                    except KafkaError as error:
                        last = error
                    except RuntimeError as error:
                        if not is_of_a_closed_connection(error):
                            raise
                        last = error
                    await asyncio.sleep(RETRY_BACKOFF)
                    with contextlib.suppress(KafkaError):
                        # From the configured servers: all brokers may have moved meanwhile.
                        await self._client.bootstrap()
        except TimeoutError as error:
            raise LogUnavailableError(f"{what}: expected a response, got {message_of(last or error)}") from (
                last or error
            )
