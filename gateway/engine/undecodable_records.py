"""Count and log records that can't be decoded: one line a second and topic, with the number of records.

garbage, which no version wrote     dead-lettered or skipped, and everything continues
in a newer format                   left unfinished, for a process that can decode it
"""

from collections.abc import Callable

from structlog.typing import FilteringBoundLogger

from gateway.log.base import Partition
from gateway.log.topics import Topics
from gateway.model import NewerRecordError, UndecodableRecordError
from gateway.telemetry.log_throttle import LogThrottle
from gateway.telemetry.metrics import Metrics


def newer_record_notices(metrics: Metrics) -> list[str]:
    """Return a sentence for each kind of topic with records in a newer format."""
    return [
        f"{kind}: {count:.0f} {'record' if count == 1 else 'records'} that a newer version of the gateway wrote "
        f"{'waits' if count == 1 else 'wait'} for it: roll forward"
        for (kind,), gauge in metrics.records_newer.items()
        if (count := gauge.value)
    ]


class UndecodableRecords:
    """Counts and logs. `now` is the log's clock."""

    def __init__(
        self, *, topics: Topics, metrics: Metrics, logger: FilteringBoundLogger, now: Callable[[], float]
    ) -> None:
        self._topics = topics
        self._metrics = metrics
        self._logger = logger
        self._now = now
        self._throttle = LogThrottle()
        self._reported_to: dict[Partition, int] = {}

    def count_undecodable(self, topic: str, offset: int, error: UndecodableRecordError) -> None:
        """Count and log a record that is dead-lettered or skipped. Called once for each, by whoever does that."""
        self._metrics.records_undecodable.labels(self._topics.kind_of(topic)).inc()
        if count := self._throttle.count(topic, self._now()):
            self._logger.error("record_undecodable", topic=topic, offset=offset, count=count, error=str(error))

    def report_newer(self, partition: Partition, offset: int, error: NewerRecordError) -> None:
        """Log a record that is left to a newer version; it may be reported repeatedly."""
        if offset <= self._reported_to.get(partition, -1):
            return
        self._reported_to[partition] = offset
        if count := self._throttle.count(("newer", partition.topic), self._now()):
            self._logger.error(
                "record_version_unsupported",
                topic=partition.topic,
                partition=partition.number,
                offset=offset,
                count=count,
                error=str(error),
            )

    def set_newer_count(self, kind: str, count: int) -> None:
        """Set the gauge of records of a kind of topic that are left to a newer version."""
        self._metrics.records_newer.labels(kind).set(count)
