"""Metadata of topics with their ids, which aiokafka's own requests don't ask for.

A topic's id (KIP-516, brokers since 2.8) tells it from a deleted one of the same name.
"""

from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from typing import Any, NamedTuple
from uuid import UUID

from aiokafka.protocol.abstract import AbstractType
from aiokafka.protocol.api import Request, RequestStruct, Response
from aiokafka.protocol.metadata import MetadataRequest_v5
from aiokafka.protocol.types import (
    Boolean,
    CompactArray,
    CompactString,
    Int16,
    Int32,
    Schema,
    TaggedFields,
)
from typing_extensions import override

NO_ID = UUID(int=0)


class _Uuid(AbstractType[UUID]):
    @classmethod
    @override
    def encode(cls, value: UUID) -> bytes:
        return value.bytes

    @classmethod
    @override
    def decode(cls, data: BytesIO) -> UUID:
        return UUID(bytes=data.read(16))


class _MetadataResponse_v11(Response):  # noqa: N801 - as aiokafka names them
    API_KEY = 3
    API_VERSION = 11
    FLEXIBLE_VERSION = True
    SCHEMA = Schema(
        ("throttle_time_ms", Int32),
        (
            "brokers",
            CompactArray(
                ("node_id", Int32),
                ("host", CompactString("utf-8")),
                ("port", Int32),
                ("rack", CompactString("utf-8")),
                ("tags", TaggedFields),
            ),
        ),
        ("cluster_id", CompactString("utf-8")),
        ("controller_id", Int32),
        (
            "topics",
            CompactArray(
                ("error_code", Int16),
                ("topic", CompactString("utf-8")),
                ("topic_id", _Uuid),
                ("is_internal", Boolean),
                (
                    "partitions",
                    CompactArray(
                        ("error_code", Int16),
                        ("partition", Int32),
                        ("leader", Int32),
                        ("leader_epoch", Int32),
                        ("replicas", CompactArray(Int32)),
                        ("isr", CompactArray(Int32)),
                        ("offline_replicas", CompactArray(Int32)),
                        ("tags", TaggedFields),
                    ),
                ),
                ("authorized_operations", Int32),
                ("tags", TaggedFields),
            ),
        ),
        ("tags", TaggedFields),
    )


class _MetadataRequest_v11(RequestStruct):  # noqa: N801 - as aiokafka names them
    API_KEY = 3
    API_VERSION = 11
    FLEXIBLE_VERSION = True
    RESPONSE_TYPE = _MetadataResponse_v11
    SCHEMA = Schema(
        (
            "topics",
            CompactArray(("topic_id", _Uuid), ("topic", CompactString("utf-8")), ("tags", TaggedFields)),
        ),
        ("allow_auto_topic_creation", Boolean),
        ("include_topic_authorized_operations", Boolean),
        ("tags", TaggedFields),
    )


class TopicMetadataRequest(Request[MetadataRequest_v5 | _MetadataRequest_v11]):
    """A request for the metadata of topics; by brokers before 2.8 it is answered without ids."""

    API_KEY = 3

    def __init__(self, topics: Sequence[str]) -> None:
        self._topics = topics

    @override
    def build(
        self, request_struct_class: type[MetadataRequest_v5 | _MetadataRequest_v11]
    ) -> MetadataRequest_v5 | _MetadataRequest_v11:
        if request_struct_class is MetadataRequest_v5:
            return MetadataRequest_v5(list(self._topics), False)  # noqa: FBT003 - positional in aiokafka
        return _MetadataRequest_v11([(NO_ID, topic, {}) for topic in self._topics], False, False, {})  # noqa: FBT003


class TopicMetadata(NamedTuple):
    """A topic, its id ("" from brokers before 2.8), and each partition's leader, negative without one, and replicas."""

    error_code: int
    name: str
    id: str
    leaders: Mapping[int, int]
    replicas: Mapping[int, Sequence[int]]


def topics_of(response: Any) -> Iterator[TopicMetadata]:  # noqa: ANN401 - built by version
    """Yield the topics of a response to `TopicMetadataRequest`; those that aren't there have no partitions."""
    for code, name, *rest in response.topics:
        identity = rest.pop(0) if isinstance(rest[0], UUID) else NO_ID
        _, partitions, *_ = rest
        yield TopicMetadata(
            code,
            name,
            "" if identity == NO_ID else identity.hex,
            {number: leader for _, number, leader, *_ in partitions},
            # Before the replicas, newer brokers tell the leader's epoch.
            {number: next(each for each in rest if isinstance(each, list)) for _, number, _, *rest in partitions},
        )
