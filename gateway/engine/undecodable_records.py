"""What is told of records that can't be read: each is counted, and a line a second says how many of a topic there were.

garbage: no version wrote it     set aside (among the dead, or skipped), and everything goes on
of a newer version               left where it is, unfinished, for a process that can read it
"""

from collections.abc import Callable

from structlog.typing import FilteringBoundLogger

from gateway.log.base import Partition
from gateway.log.topics import Topics
from gateway.model import NewerRecordError, UndecodableRecordError
from gateway.telemetry.log_throttle import LogThrottle
from gateway.telemetry.metrics import Metrics


def notes_of(metrics: Metrics) -> list[str]:
    """Tell of what is left to a newer version, a sentence for each kind of topic."""
    return [
        f"{kind}: {count:.0f} {'record' if count == 1 else 'records'} that a newer version of the gateway wrote "
        f"{'waits' if count == 1 else 'wait'} for it: roll forward"
        for (kind,), gauge in metrics.records_newer.items()
        if (count := gauge.value)
    ]


class Unreadable:
    """Counts and tells. `now` is the log's clock."""

    def __init__(
        self, *, topics: Topics, metrics: Metrics, logger: FilteringBoundLogger, now: Callable[[], float]
    ) -> None:
        self._topics = topics
        self._metrics = metrics
        self._logger = logger
        self._now = now
        self._seldom = LogThrottle()
        self._told: dict[Partition, int] = {}

    def set_aside(self, topic: str, offset: int, error: UndecodableRecordError) -> None:
        """Tell of a record that is set aside. To be called once for each, by the one that does it."""
        self._metrics.records_undecodable.labels(self._topics.kind_of(topic)).inc()
        if count := self._seldom.count(topic, self._now()):
            self._logger.error("record_undecodable", topic=topic, offset=offset, count=count, error=str(error))

    def leave(self, partition: Partition, offset: int, error: NewerRecordError) -> None:
        """Tell of a record that is left to a newer version, however often it is met."""
        if offset <= self._told.get(partition, -1):
            return
        self._told[partition] = offset
        if count := self._seldom.count(("newer", partition.topic), self._now()):
            self._logger.error(
                "record_version_unsupported",
                topic=partition.topic,
                partition=partition.number,
                offset=offset,
                count=count,
                error=str(error),
            )

    def left(self, kind: str, count: int) -> None:
        """Tell how many records of a kind of topic are left to a newer version now."""
        self._metrics.records_newer.labels(kind).set(count)
