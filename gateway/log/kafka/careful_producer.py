"""A producer that never sends again what may have been stored: whoever appends finds out first.

aiokafka repeats a batch whose connection was lost before the response, so that the batch may be stored twice. It can be
made idempotent instead, but then it may stay stuck on OUT_OF_ORDER_SEQUENCE_NUMBER (aiokafka issue 1017).
"""

from aiokafka import AIOKafkaProducer
from aiokafka.errors import (
    KafkaConnectionError,
    KafkaError,
    KafkaTimeoutError,
    NotEnoughReplicasAfterAppendError,
    RequestTimedOutError,
)
from aiokafka.producer import sender as aiokafka_sender
from typing_extensions import override

_MAYBE_STORED = (KafkaConnectionError, KafkaTimeoutError, RequestTimedOutError, NotEnoughReplicasAfterAppendError)


class _Handler(aiokafka_sender.SendProduceReqHandler):
    """What comes of a request with batches."""

    @override
    def _can_retry(self, error: KafkaError, batch: object) -> bool:
        is_repeat = getattr(self._sender, "never_repeats", False) and isinstance(error, _MAYBE_STORED)
        return not is_repeat and bool(super()._can_retry(error, batch))  # type: ignore[no-untyped-call]


aiokafka_sender.SendProduceReqHandler = _Handler  # type: ignore[misc]


def never_repeat(producer: AIOKafkaProducer) -> None:
    """Let a producer fail a batch whose result isn't known, where aiokafka would send it again."""
    producer._sender.never_repeats = True  # type: ignore[attr-defined]  # noqa: SLF001 - aiokafka has no option for it
