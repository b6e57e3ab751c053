"""What a producer sends again after an error, and what it leaves to whoever finds out whether it was stored."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import (
    KafkaConnectionError,
    KafkaError,
    KafkaStorageError,
    MessageSizeTooLargeError,
    NodeNotReadyError,
    NotEnoughReplicasAfterAppendError,
    NotEnoughReplicasError,
    NotLeaderForPartitionError,
    RequestTimedOutError,
    UnknownTopicOrPartitionError,
)
from aiokafka.producer import sender

from gateway.log.kafka.careful_producer import _Handler

WHERE = TopicPartition("t", 0)


class Exchange:
    """A batch, its producer and its broker, as far as the handler asks them. Notes what comes of the batch."""

    def __init__(self, answer: KafkaError, *, offset: int = -1, is_careful: bool = True, is_old: bool = False) -> None:
        self.looks = 0
        self.error: KafkaError | None = None
        self.is_repeated = False
        self.never_repeats = is_careful
        self._answer = answer
        self._offset = offset
        self._is_old = is_old
        self.client = self._message_accumulator = self
        self._retry_backoff = 0.0
        self._request_timeout_ms = 1
        self._acks = -1
        self._txn_manager = None
        self.tp = WHERE

    async def run(self) -> "Exchange":
        await _Handler(self, {WHERE: self}).do(1)  # type: ignore[no-untyped-call]  # as aiokafka does
        return self

    async def send(self, *_: object) -> Any:
        if not hasattr(self._answer, "errno"):
            raise self._answer
        partition = (0, self._answer.errno, self._offset, -1, 0)
        return SimpleNamespace(topics=[("t", [partition])], API_VERSION=7)

    def force_metadata_update(self) -> "asyncio.Future[None]":
        self.looks += 1
        return asyncio.get_running_loop().create_future()

    def failure(self, exception: KafkaError) -> None:
        self.error = exception

    def reenqueue(self, _: object) -> None:
        self.is_repeated = True

    def expired(self) -> bool:
        return self._is_old

    def get_data_buffer(self) -> bytes:
        return b""

    async def _maybe_wait_metadata(self) -> None:
        pass


@pytest.mark.parametrize(
    ("answer", "offset"),
    [
        (KafkaConnectionError(), -1),
        (RequestTimedOutError(), 7),
        (NotEnoughReplicasAfterAppendError(), 7),
        (NotLeaderForPartitionError(), 7),
        (UnknownTopicOrPartitionError(), 7),
        (KafkaStorageError(), -1),
    ],
    ids=lambda value: type(value).__name__,
)
async def test_what_may_have_been_stored_is_not_sent_again_and_its_leader_is_looked_for(
    answer: KafkaError, offset: int
) -> None:
    exchange = await Exchange(answer, offset=offset).run()
    assert not exchange.is_repeated
    assert type(exchange.error) is type(answer)
    assert exchange.looks
    assert (await Exchange(answer, offset=offset, is_careful=False).run()).is_repeated, "the engine's own are"


@pytest.mark.parametrize(
    "answer",
    [NodeNotReadyError(), NotEnoughReplicasError(), NotLeaderForPartitionError(), UnknownTopicOrPartitionError()],
    ids=lambda value: type(value).__name__,
)
async def test_what_was_refused_before_it_was_stored_is_sent_again_until_it_is_too_old(answer: KafkaError) -> None:
    assert (await Exchange(answer).run()).is_repeated
    assert type((await Exchange(answer, is_old=True).run()).error) is type(answer)


async def test_what_no_other_try_would_heal_is_not_sent_again() -> None:
    exchange = await Exchange(MessageSizeTooLargeError()).run()
    assert (exchange.is_repeated, exchange.looks) == (False, 0)


def test_aiokafka_asks_this_handler() -> None:
    assert sender.SendProduceReqHandler is _Handler
