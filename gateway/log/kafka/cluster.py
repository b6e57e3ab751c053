"""What can be asked of the brokers, and ordered: topics, offsets, groups and what they have committed."""

import asyncio
import contextlib
from base64 import b64decode, b64encode
from collections import defaultdict
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

from gateway.log.base import Commit, Partition, TopicProblem, TopicSpec
from gateway.log.kafka.connection import RETRY_BACKOFF, Connection, stop
from gateway.log.kafka.errors import (
    FORBIDDEN,
    MISCONFIGURED,
    is_of_a_closed_connection,
    raise_for,
    say,
    translated,
)
from gateway.log.kafka.topic_settings import (
    REPLICAS,
    order_problems,
    partition_problems,
    record_problems,
    replication_problems,
    retention_problems,
    settings_of,
)
from gateway.model import LogUnavailableError, UsageError

QUESTION_TIMEOUT = 5.0
REQUEST_TIMEOUT = 1.5  # Of a question, for one broker: if it hangs there is time to ask another.
PING_TIMEOUT = 3.0

COMMIT_MARK = "gw1:"  # Offsets that another tool has set carry other metadata, or none: no bits.

EARLIEST, LATEST = -2, -1  # Of ListOffsets.
TOPIC = 2  # A resource type of DescribeConfigs.

T = TypeVar("T")

log = structlog.get_logger(__name__)


class Cluster:
    """What can be asked of the brokers, over a connection of its own: appends that wait for replicas don't delay it."""

    def __init__(self, connection: Connection) -> None:
        self._client = AIOKafkaClient(**connection.options, request_timeout_ms=int(1000 * REQUEST_TIMEOUT))
        self._silent_until: dict[int | None, float] = {}  # broker → until when others are asked

    async def start(self) -> None:
        await self._client.bootstrap()

    async def close(self) -> None:
        await stop(self._client)

    @property
    def brokers(self) -> Collection[tuple[str, int]]:
        """Where the brokers are, by what they said of themselves."""
        return [(broker.host, broker.port) for broker in self._client.cluster.brokers()]

    async def ping(self) -> None:
        with translated("ping"):
            async with asyncio.timeout(PING_TIMEOUT):
                await self._send(MetadataRequest([], allow_auto_topic_creation=False))

    async def accepting(self, topics: Iterable[str]) -> Mapping[Partition, bool]:
        """Tell of each partition of these topics whether appends can succeed: it has a leader, and enough replicas.

        Raises LogUnavailableError within 3 s.
        """
        names = sorted(set(topics))
        with translated("replicas"):
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
        return {
            # No more replicas are asked for than there are.
            Partition(topic, number): leader >= 0 and len(in_sync) >= min(needed.get(topic, 1), len(replicas))
            for _, topic, _, partitions in metadata.topics
            for _, number, leader, replicas, in_sync, *_ in partitions
        }

    async def describe(
        self, topics: Iterable[str], *, are_led: bool = False
    ) -> Mapping[str, Mapping[int, Sequence[int]]]:
        """Return the replicas of each partition of the topics that are there; once all are led, with `are_led`."""
        names = sorted(set(topics))

        async def ask() -> Mapping[str, Mapping[int, Sequence[int]]]:
            response = await self._send(MetadataRequest(names, allow_auto_topic_creation=False))
            described = {}
            for code, topic, _, partitions in response.topics:
                error = for_code(code)
                if error is UnknownTopicOrPartitionError:
                    continue
                if error is not NoError:
                    raise error(topic)
                if are_led and any(leader < 0 for _, _, leader, *_ in partitions):
                    raise LeaderNotAvailableError(topic)
                described[topic] = {number: replicas for _, number, _, replicas, *_ in partitions}
            return described

        return await self._ask(f"metadata of {', '.join(names)}", ask) if names else {}

    async def topics(self) -> Collection[str]:
        """Return the names of all topics."""

        async def ask() -> Collection[str]:
            response = await self._send(MetadataRequest(None, allow_auto_topic_creation=False))
            return [topic for _, topic, *_ in response.topics]

        return await self._ask("topics", ask)

    async def offsets(self, partitions: Collection[Partition], at: int) -> Mapping[Partition, int]:
        """Return each partition's first offset (EARLIEST), the one after its last (LATEST), or the first at a time.

        A time is in milliseconds since the epoch; -1 stands for no record at or after it.
        """

        async def ask() -> Mapping[Partition, int]:
            found, missing = await self._offsets(partitions, at)
            for error in missing.values():
                raise error
            return found

        return await self._ask("offsets", ask) if partitions else {}

    async def offsets_with_leader(
        self, partitions: Collection[Partition], at: int
    ) -> tuple[Mapping[Partition, int], Mapping[Partition, str]]:
        """Return the same of those partitions that answer now, and why the others don't."""

        async def ask() -> tuple[Mapping[Partition, int], Mapping[Partition, KafkaError]]:
            return await self._offsets(partitions, at)

        found, missing = await self._ask("offsets", ask) if partitions else ({}, {})
        return found, {partition: say(error) for partition, error in missing.items()}

    async def _offsets(
        self, partitions: Collection[Partition], at: int
    ) -> tuple[Mapping[Partition, int], Mapping[Partition, KafkaError]]:
        """Ask each leader once, all at the same time: one that hangs holds up nothing but its own."""
        names = sorted({partition.topic for partition in partitions})
        metadata = await self._send(MetadataRequest(names, allow_auto_topic_creation=False))
        leaders = {
            Partition(topic, number): leader
            for _, topic, _, described in metadata.topics
            for _, number, leader, *_ in described
        }
        found: dict[Partition, int] = {}
        missing: dict[Partition, KafkaError] = {}
        by_leader: dict[int, list[Partition]] = defaultdict(list)
        for partition in partitions:
            leader = leaders.get(partition)
            if leader is None:
                missing[partition] = UnknownTopicOrPartitionError(f"{partition.topic}/{partition.number}: not there")
            elif leader < 0:
                missing[partition] = LeaderNotAvailableError(f"{partition.topic}/{partition.number}: no leader")
            else:
                by_leader[leader].append(partition)

        for some in await asyncio.gather(*[self._offsets_at(leader, its, at) for leader, its in by_leader.items()]):
            for partition, answer in some.items():
                if isinstance(answer, int):
                    found[partition] = answer
                else:
                    missing[partition] = answer
        return found, missing

    async def _offsets_at(self, leader: int, its: Sequence[Partition], at: int) -> Mapping[Partition, int | KafkaError]:
        topics: dict[str, list[tuple[int, int]]] = defaultdict(list)
        for topic, number in its:
            topics[topic].append((number, at))
        try:
            response = await self._send(OffsetRequest(-1, 0, list(topics.items())), leader)
        except MISCONFIGURED:
            raise
        except KafkaError as error:
            return dict.fromkeys(its, error)
        answers: dict[Partition, int | KafkaError] = {}
        for topic, found in response.topics:
            for number, code, _, offset in found:
                kind = for_code(code)
                if kind in MISCONFIGURED:
                    raise kind(topic)
                answers[Partition(topic, number)] = offset if kind is NoError else kind(f"{topic}/{number}")
        return answers

    async def commits(self, group: str, partitions: Collection[Partition] | None = None) -> Mapping[Partition, Commit]:
        """Return what a group has committed, where it has: of these partitions, or of all."""
        by_topic: dict[str, list[int]] = defaultdict(list)
        for topic, number in partitions or ():
            by_topic[topic].append(number)
        wanted = None if partitions is None else list(by_topic.items())

        async def ask() -> Mapping[Partition, Commit]:
            coordinator = await self._client.coordinator_lookup(CoordinationType.GROUP, group)
            response = await self._send(OffsetFetchRequest(group, wanted), coordinator)
            raise_for(getattr(response, "error_code", 0), group)
            commits = {}
            for topic, answers in response.topics:
                for number, offset, metadata, code in answers:
                    raise_for(code, f"{topic}/{number}")
                    if offset >= 0:
                        commits[Partition(topic, number)] = Commit(offset, *decode_metadata(metadata or ""))
            return commits

        return await self._ask(f"commits of {group}", ask) if wanted != [] else {}

    async def seed(self, group: str, commits: Mapping[Partition, Commit]) -> None:
        """Commit as nobody's member, which Kafka takes as long as there is none."""

        async def ask() -> None:
            known = await self.commits(group, list(commits))
            topics: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
            for partition, commit in commits.items():
                if partition not in known:
                    topics[partition.topic].append((partition.number, commit.base, encode_metadata(commit)))
            if not topics:
                return
            coordinator = await self._client.coordinator_lookup(CoordinationType.GROUP, group)
            response = await self._send(OffsetCommitRequest(group, -1, "", -1, list(topics.items())), coordinator)
            for topic, answers in response.topics:
                for number, code in answers:
                    raise_for(code, f"{topic}/{number}")

        await self._ask(f"first commits of {group}", ask)

    async def groups(self, prefix: str) -> Mapping[str, int]:
        async def ask() -> Mapping[str, int]:
            metadata = await self._send(MetadataRequest([], allow_auto_topic_creation=False))
            found: dict[str, int] = {}
            for broker in metadata.brokers:
                node = broker[0]
                listed = await self._send(ListGroupsRequest(), node)
                raise_for(listed.error_code, "groups")
                for name in [name for name, *_ in listed.groups if name.startswith(prefix)]:
                    # One by one: aiokafka doesn't know the last field of a group, and takes it for the next group's.
                    described = await self._send(DescribeGroupsRequest([name]), node)
                    for code, _, _, _, _, members, *_ in described.groups:
                        raise_for(code, name)
                        found[name] = len(members)
            return found

        return await self._ask(f"groups of {prefix}", ask)

    async def evict(self, group: str, client_id: str) -> None:
        """Take a client's members out of a group.

        One that was killed would hold its partitions for a session, and a rebalance that it was joining for longer.
        """

        async def ask() -> None:
            coordinator = await self._client.coordinator_lookup(CoordinationType.GROUP, group)
            response = await self._send(DescribeGroupsRequest([group]), coordinator)
            for code, _, _, _, _, members, *_ in response.groups:
                raise_for(code, group)
                for member in [identity for identity, client, *_ in members if client == client_id]:
                    await self._send(LeaveGroupRequest(group, member), coordinator)
                    log.info("log_predecessor_evicted", group=group, member=member)

        await self._ask(f"members of {group}", ask)

    async def create(self, specs: Sequence[TopicSpec]) -> Sequence[str]:
        present = await self.describe([spec.name for spec in specs])
        missing = {spec.name: spec for spec in specs if spec.name not in present}
        if not missing:
            return []
        missing_before = list(missing)
        created = []

        async def ask() -> None:
            metadata = await self._send(MetadataRequest([], allow_auto_topic_creation=False))
            replicas = min(REPLICAS, len(metadata.brokers))
            wanted: list[Any] = [
                (spec.name, spec.partitions, replicas, [], list(settings_of(spec, replicas).items()))
                for spec in missing.values()
            ]
            request = CreateTopicsRequest(wanted, int(1000 * QUESTION_TIMEOUT), validate_only=False)
            response = await self._send(request, metadata.controller_id)
            for topic, code, *message in response.topic_errors:
                error = for_code(code)
                if error is NoError:
                    created.append(topic)
                elif error is not TopicAlreadyExistsError:
                    raise error(f"{topic}: {message[0] if message else ''}")
                missing.pop(topic, None)

        await self._ask("create topics", ask)

        async def wait_for_leaders() -> None:
            described = await self.describe(missing_before, are_led=True)
            for name in missing_before:
                if name not in described:
                    raise UnknownTopicOrPartitionError(name)

        await self._ask("leaders of new topics", wait_for_leaders)
        return created

    async def check(self, specs: Sequence[TopicSpec]) -> Sequence[TopicProblem]:
        described = await self.describe([spec.name for spec in specs])
        names = [spec.name for spec in specs if spec.name in described]
        problems = []

        async def ask() -> int:
            return len((await self._send(MetadataRequest([], allow_auto_topic_creation=False))).brokers)

        brokers = await self._ask("brokers", ask)
        settings = await self.settings(names)
        for spec in specs:
            if spec.name not in described:
                problems.append(TopicProblem(topic=spec.name, message="expected a topic, got none", is_fatal=True))
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
                TopicProblem(topic=spec.name, message=message, is_fatal=True, is_borne=False)
                for message in order_problems(spec, len(described[spec.name]))
            ]
            problems += [
                TopicProblem(topic=spec.name, message=message, is_fatal=is_fatal) for is_fatal, message in wrong
            ]
        return problems

    async def settings(self, topics: Collection[str]) -> Mapping[str, Mapping[str, str]]:
        """Return the configuration of topics that are there; those that we may not ask about are left out."""

        async def ask() -> Mapping[str, Mapping[str, str]]:
            settings = {}
            response = await self._send(DescribeConfigsRequest([(TOPIC, name, None) for name in sorted(topics)]))
            for code, _, _, name, entries in response.resources:
                if for_code(code) not in FORBIDDEN:
                    raise_for(code, name)
                    settings[name] = {entry[0]: entry[1] for entry in entries}
            return settings

        return await self._ask("configuration of topics", ask) if topics else {}

    async def _send(self, request: Request[Any], node: int | None = None) -> Any:  # noqa: ANN401 - built by version
        asked = self._any_node() if node is None else node
        try:
            answer = await self._client.send(asked, request)
        except KeyError as error:
            # client.send, when the connection it waited on is already replaced.
            raise NodeNotReadyError(f"node {asked}") from error
        except KafkaError:
            self._silent_until[asked] = asyncio.get_running_loop().time() + QUESTION_TIMEOUT
            raise
        if isinstance(request, MetadataRequest) and not answer.brokers:
            # The first half of a refusal (RFC 7628, section 3.2.3) is passed over by aiokafka, and the second one read
            # as an answer.
            raise SaslAuthenticationFailed("the token was refused")
        return answer

    def _any_node(self) -> int | None:
        """Return a broker: one that hasn't left a question unanswered in the last 5 s, if there is one."""
        node: int | None = self._client.get_random_node()
        if self._silent_until.get(node, 0.0) <= asyncio.get_running_loop().time():
            return node
        nodes = [broker.nodeId for broker in self._client.cluster.brokers()]
        return min(nodes, key=lambda each: self._silent_until.get(each, 0.0), default=None)

    async def _ask(self, what: str, ask: Callable[[], Awaitable[T]]) -> T:
        """Ask until there is an answer, for at most 5 s."""
        last: Exception | None = None
        try:
            async with asyncio.timeout(QUESTION_TIMEOUT):
                while True:
                    try:
                        return await ask()
                    except MISCONFIGURED as error:
                        raise UsageError(f"{what}: {say(error)}") from error
                    except KafkaError as error:
                        last = error
                    except RuntimeError as error:
                        if not is_of_a_closed_connection(error):
                            raise
                        last = error
                    await asyncio.sleep(RETRY_BACKOFF)
                    with contextlib.suppress(KafkaError):
                        # From the configured servers: brokers may have moved meanwhile, all of them.
                        await self._client.bootstrap()
        except TimeoutError as error:
            raise LogUnavailableError(f"{what}: expected an answer, got {say(last or error)}") from (last or error)


def encode_metadata(commit: Commit) -> str:
    """Return what is done, and behind a colon the note, as the metadata of a committed offset."""
    if not (commit.done or commit.note):
        return ""
    note = b":" + b64encode(commit.note) if commit.note else b""
    return COMMIT_MARK + (b64encode(commit.done) + note).decode()


def decode_metadata(metadata: str) -> tuple[bytes, bytes]:
    if not metadata.startswith(COMMIT_MARK):
        return b"", b""
    done, _, note = metadata.removeprefix(COMMIT_MARK).partition(":")
    try:
        return b64decode(done, validate=True), b64decode(note, validate=True)
    except ValueError:
        return b"", b""
