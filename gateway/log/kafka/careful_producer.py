"""A producer that never sends again what may have been stored: whoever appends finds out first.

aiokafka repeats a batch after each error that another try may heal, so that the batch may be stored twice. It can be
made idempotent instead, but then it may stay stuck on OUT_OF_ORDER_SEQUENCE_NUMBER (aiokafka issue 1017).
"""

from typing import Any

from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.errors import (
    KafkaError,
    NodeNotReadyError,
    NotEnoughReplicasError,
    NotLeaderForPartitionError,
    UnknownTopicOrPartitionError,
)
from aiokafka.producer import sender as aiokafka_sender
from aiokafka.producer.message_accumulator import MessageBatch
from typing_extensions import override

_REFUSED = (NodeNotReadyError, NotEnoughReplicasError)
"""Without a connection nothing was sent, and a leader counts its replicas in sync before it appends."""
_PERHAPS_REFUSED = (NotLeaderForPartitionError, UnknownTopicOrPartitionError)
"""These may also come after the append, while the leader waits for its replicas: it isn't the leader any more, or the
partition was taken from it. Then the response has the offset (Kafka's `ReplicaManager.appendRecords` and
`DelayedProduce.tryComplete`).
"""


class _Handler(aiokafka_sender.SendProduceReqHandler):
    """What comes of a request with batches."""

    @override
    def handle_response(self, response: Any) -> None:
        self._offsets = {
            TopicPartition(topic, number): offset
            for topic, partitions in response.topics
            for number, _, offset, *_ in partitions
        }
        super().handle_response(response)  # type: ignore[no-untyped-call]

    @override
    def _can_retry(self, error: KafkaError, batch: MessageBatch) -> bool:
        can_retry = bool(super()._can_retry(error, batch))  # type: ignore[no-untyped-call]
        if not getattr(self._sender, "never_repeats", False) or self._is_refused(error, batch):
            return can_retry
        if error.retriable:  # where it would send the batch again, aiokafka looks for its leader
            self._client.force_metadata_update()
        return False

    def _is_refused(self, error: KafkaError, batch: MessageBatch) -> bool:
        """Return whether a batch surely isn't stored."""
        offsets: dict[TopicPartition, int] = getattr(self, "_offsets", {})
        return isinstance(error, _REFUSED) or (isinstance(error, _PERHAPS_REFUSED) and offsets.get(batch.tp) == -1)


aiokafka_sender.SendProduceReqHandler = _Handler  # type: ignore[misc]


def never_repeat(producer: AIOKafkaProducer) -> None:
    """Let a producer fail a batch whose result isn't known, where aiokafka would send it again."""
    producer._sender.never_repeats = True  # type: ignore[attr-defined]  # noqa: SLF001 - aiokafka has no option for it
