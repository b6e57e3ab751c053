"""The log on Kafka: the only user of aiokafka, whose habits stop here.

What aiokafka does not promise, this module adds: a deadline for every append, fetch and commit; listeners whose errors
are heard; commits on revocation and on close; reading on where a background task of aiokafka has died; topics that are
never created by a metadata request. Read with aiokafka 0.14 at hand; protocol: https://kafka.apache.org/protocol
"""

import asyncio
import contextlib
import logging
import math
import time
from base64 import b64decode, b64encode
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Coroutine, Iterable, Mapping, Sequence
from typing import Any, TypeVar
from zlib import crc32

import structlog
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, ConsumerRebalanceListener, TopicPartition
from aiokafka.client import AIOKafkaClient, CoordinationType
from aiokafka.errors import (
    AuthorizationError,
    KafkaError,
    KafkaTimeoutError,
    MessageSizeTooLargeError,
    RecordListTooLargeError,
    StaleMetadata,
    UnknownTopicOrPartitionError,
    for_code,
)
from aiokafka.protocol.admin import CreateTopicsRequest, DescribeConfigsRequest
from aiokafka.protocol.commit import OffsetFetchRequest
from aiokafka.protocol.metadata import MetadataRequest
from aiokafka.protocol.offset import OffsetRequest

from gateway.log.base import (
    Assignment,
    Batch,
    Commit,
    Listener,
    Partition,
    Position,
    Record,
    RecordHeaders,
    TopicProblem,
    TopicSpec,
)
from gateway.model import LogUnavailableError, RecordTooLargeError, UsageError
