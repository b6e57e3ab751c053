"""Write successors: the records that continue a delivery in a tier, in the parked topic or as a dead letter.

An append is retried until it is acknowledged, and its predecessor stays unfinished until then. It is given up only if
another owner has the partition.
"""

from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Self

from structlog.typing import FilteringBoundLogger

from gateway.engine.alternate_partitions import AlternatePartitions
from gateway.engine.control.records import ControlRecord
from gateway.engine.services import Services
from gateway.engine.undecodable_records import UndecodableRecords
from gateway.log.base import Log, Record, RecordHeaders
from gateway.log.records import encode_delivery
from gateway.log.topics import Topics
from gateway.model import (
    DeadLettered,
    DeadReason,
    Delivery,
    LogUnavailableError,
    RecordMetadata,
    RecordTooLargeError,
    UndecodableRecordError,
)
from gateway.rules.rules import Rules
from gateway.telemetry.log_throttle import LogThrottle
from gateway.telemetry.metrics import Metrics

FIRST_POLL, LONGEST_POLL = 0.05, 1.0
"""Seconds between checks who owns a record's partition; doubled each time, as thousands of appends may wait."""
FIRST_PAUSE = 0.1
LONGEST_PAUSE = 5.0
LONGEST_PAUSE_IF_TOO_LARGE = 60.0
"""Seconds: each try sends a large record for nothing until an operator raises the limit. A job isn't that patient."""
KEPT_OF_OVERSIZED = 64 * 1024
"""Bytes that are kept of a record that can't be read and is too large for the dead-letter topic."""


Failed = Callable[[LogUnavailableError | RecordTooLargeError], None]


def always_true() -> bool:
    """Want a successor whatever happens."""
    return True


def always_false() -> bool:
    """Know that there is no other owner."""
    return False


def do_nothing(_error: LogUnavailableError | RecordTooLargeError) -> None:
    """Do nothing about a failure: it is retried."""


class SuccessorWriter:
    """Retries appends until they are acknowledged, or until they aren't wanted, as another owner has the record.

    While the owner `is_undecided`, none is started: another owner may start the same one. `failed` is called with the
    error whenever one has failed, before the pause. One that `may_move` goes to another partition than that of its key
    while that one refuses appends; should it have been stored there all the same, there are two of it.
    """

    def __init__(
        self,
        *,
        log: Log,
        topics: Topics,
        rules: Callable[[], Rules],
        metrics: Metrics,
        logger: FilteringBoundLogger,
        sleep: Callable[[float], Awaitable[None]],
    ) -> None:
        self._log = log
        self._topics = topics
        self._rules = rules
        self._metrics = metrics
        self._logger = logger
        self._sleep = sleep
        self._repeated = LogThrottle()
        self._alternatives = AlternatePartitions()
        self.undecodable = UndecodableRecords(topics=topics, metrics=metrics, logger=logger, now=log.now)

    @classmethod
    def of(cls, services: Services) -> Self:
        """Make one of an engine's services."""
        return cls(
            log=services.log,
            topics=services.topics,
            rules=services.rules,
            metrics=services.metrics,
            logger=services.logger,
            sleep=services.sleep,
        )

    async def store(
        self,
        topic: str,
        delivery: Delivery,
        metadata: RecordMetadata,
        is_wanted: Callable[[], bool] = always_true,
        is_undecided: Callable[[], bool] = always_false,
        *,
        failed: Failed = do_nothing,
        may_move: bool = False,
    ) -> bool:
        """Store a delivery in a tier or in the parked topic. Return False if it isn't wanted any more.

        Raises RecordTooLargeError if it doesn't fit, which only happens after the log's limit was lowered.
        """
        headers = encode_delivery(delivery, metadata, at=self._log.now())
        return await self._append(
            topic,
            key_of(delivery),
            delivery.event.body,
            headers,
            is_wanted=is_wanted,
            is_undecided=is_undecided,
            failed=failed,
            may_move=may_move,
        )

    async def dead_letter(
        self,
        delivery: Delivery,
        outcome: DeadLettered,
        is_wanted: Callable[[], bool] = always_true,
        is_undecided: Callable[[], bool] = always_false,
        *,
        failed: Failed = do_nothing,
        may_move: bool = False,
    ) -> bool:
        """Store a delivery as a dead letter, with its reason. Return False if it isn't wanted any more."""
        rules = self._rules()
        owner, runbook = rules.contact_of(delivery.route, delivery.destination)
        metadata = RecordMetadata(
            dead_reason=outcome.reason, detail=outcome.detail, rules=rules.version, owner=owner, runbook=runbook
        )
        key, body = key_of(delivery), delivery.event.body
        try:
            headers = encode_delivery(delivery, metadata, at=self._log.now())
            is_stored = await self._append(
                self._topics.dead,
                key,
                body,
                headers,
                is_wanted=is_wanted,
                is_undecided=is_undecided,
                failed=failed,
                may_move=may_move,
            )
        except RecordTooLargeError:
            slim = replace(delivery, attempts=delivery.attempts[-1:])  # the attempts' texts are what can be spared
            headers = encode_delivery(slim, replace(metadata, detail=outcome.detail[:200]), at=self._log.now())
            is_stored = await self._append(
                self._topics.dead,
                key,
                body,
                headers,
                is_wanted=is_wanted,
                is_undecided=is_undecided,
                failed=failed,
                is_last=True,
                may_move=may_move,
            )
        if is_stored:
            self._metrics.dead_letters.labels(delivery.route, delivery.destination, outcome.reason).inc()
        return is_stored

    async def store_command(self, command: ControlRecord, *, is_wanted: Callable[[], bool]) -> bool:
        """Append a control record, as an operator's command does. Return False if it isn't wanted any more."""
        key, value = command.encode()
        topic, partition = self._topics.control_partition
        return await self._append(
            topic, key, value, [], partition=partition, is_wanted=is_wanted, is_undecided=always_false
        )

    async def dead_letter_undecodable(
        self,
        topic: str,
        record: Record,
        error: UndecodableRecordError,
        is_wanted: Callable[[], bool] = always_true,
        is_undecided: Callable[[], bool] = always_false,
        *,
        failed: Failed = do_nothing,
        may_move: bool = False,
    ) -> bool:
        """Dead-letter a record that can't be decoded, truncated if it doesn't fit."""
        headers = [*record.headers, ("gw_undecodable", str(error).encode(errors="backslashreplace"))]
        try:
            is_stored = await self._append(
                self._topics.dead,
                record.key,
                record.value,
                headers,
                is_wanted=is_wanted,
                is_undecided=is_undecided,
                failed=failed,
                may_move=may_move,
            )
        except RecordTooLargeError:
            kept = record.value[:KEPT_OF_OVERSIZED]
            short = [headers[-1], ("gw_truncated", b"%d" % len(record.value))]
            is_stored = await self._append(
                self._topics.dead,
                record.key[:1024],
                kept,
                short,
                is_wanted=is_wanted,
                is_undecided=is_undecided,
                failed=failed,
                is_last=True,
                may_move=may_move,
            )
        if is_stored:
            self.undecodable.count_undecodable(topic, record.offset, error)
            self._metrics.dead_letters.labels("", "", DeadReason.UNDECODABLE).inc()
        return is_stored

    async def _append(
        self,
        topic: str,
        key: bytes,
        value: bytes,
        headers: RecordHeaders,
        *,
        partition: int | None = None,
        is_wanted: Callable[[], bool],
        is_undecided: Callable[[], bool],
        failed: Failed = do_nothing,
        is_last: bool = False,
        may_move: bool = False,
    ) -> bool:
        """Append until it is stored. With `is_last`, a record that is too large waits for a higher limit as well."""
        pause = FIRST_PAUSE
        while True:
            await self._wait_for_decision(is_undecided)
            if not is_wanted():
                return False
            if may_move:
                partition = self._alternatives.choose(topic, key, self._log.now())
            try:
                position = await self._log.append(topic, key=key, value=value, headers=headers, partition=partition)
            except (LogUnavailableError, RecordTooLargeError) as error:
                is_too_large = isinstance(error, RecordTooLargeError)
                if is_too_large and not is_last:
                    raise
                if not is_wanted():
                    return False
                failed(error)
                self._log_failure(topic, value, headers, error)
                await self._sleep(pause)
                pause = min(LONGEST_PAUSE_IF_TOO_LARGE if is_too_large and not may_move else LONGEST_PAUSE, 2 * pause)
                if may_move and not is_too_large:
                    await self._avoid(topic, key, partition)
            else:
                self._alternatives.accepted(topic, position.partition)
                return True

    def _log_failure(self, topic: str, value: bytes, headers: RecordHeaders, error: Exception) -> None:
        is_too_large = isinstance(error, RecordTooLargeError)
        count = self._repeated.count((topic, is_too_large), self._log.now())
        if count and is_too_large:
            size = len(value) + sum([len(name) + len(text) for name, text in headers])
            self._logger.error("dead_letter_too_large", topic=topic, bytes=size, count=count, error=str(error))
        elif count:
            self._logger.warning("append_retried", topic=topic, count=count, error=str(error))

    async def _wait_for_decision(self, is_undecided: Callable[[], bool]) -> None:
        look = FIRST_POLL
        while is_undecided():
            await self._sleep(look)
            look = min(LONGEST_POLL, 2 * look)

    async def _avoid(self, topic: str, key: bytes, number: int | None) -> None:
        """Let appends that may move avoid a partition that has refused one, and those without a leader."""
        try:
            bounds, unreadable = await self._log.readable(topic)
        except LogUnavailableError:
            return
        if count := len(bounds) + len(unreadable):
            self._alternatives.refused(
                topic, key, number, count=count, unreadable=unreadable.keys(), now=self._log.now()
            )


def key_of(delivery: Delivery) -> bytes:
    """Return the key of the successors of a delivery, in each topic."""
    return (delivery.destination or delivery.event.source).encode()
