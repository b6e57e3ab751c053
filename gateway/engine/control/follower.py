"""Follow `gateway.control`: every process applies each of its records, and so knows what is in force."""

import asyncio
from collections.abc import Collection, Mapping, Sequence

from structlog.typing import FilteringBoundLogger

from gateway.engine.control.state import Control
from gateway.engine.undecodable_records import UndecodableRecords
from gateway.log.base import Assignment, Commit, Consumer, Log, Partition, Record
from gateway.log.topics import Topics
from gateway.model import LogUnavailableError, NewerRecordError, UndecodableRecordError
from gateway.telemetry.metrics import Metrics

CLOCK_TRIES = 3
"""Failed appends after which a process continues with its own machine's clock: a log that takes none must not stop
deliveries."""


class Follower:
    """Keeps a `Control` up to date with `gateway.control`."""

    def __init__(self, log: Log, topics: Topics, metrics: Metrics, logger: FilteringBoundLogger) -> None:
        self.control = Control()
        self.position = 0
        self._log = log
        self._topic = topics.control
        self._partition = topics.control_partition
        self._clock_topic = topics.dedupe
        self._logger = logger
        self._undecodable = UndecodableRecords(topics=topics, metrics=metrics, logger=logger, now=log.now)
        self._consumer: Consumer | None = None
        self._problem: str | None = None  # why there is no consumer yet

    def unreadable(self) -> Mapping[Partition, str]:
        """Return why the topic can't be read, if so: control records aren't received meanwhile."""
        if self._consumer is not None:
            return self._consumer.unreadable()
        return {} if self._problem is None else {self._partition: self._problem}

    async def _begin(self) -> tuple[Consumer, int, int]:
        """Start reading, retrying for as long as the topic is unavailable; return also its bounds."""
        while True:
            try:
                start, end = (await self._log.bounds(self._topic)).get(self._partition.number, (0, 0))
                return await self._log.consume(group=None, topics=[self._topic], listener=self), start, end
            except LogUnavailableError as error:
                self._problem = str(error)
                self._logger.warning("subscription_retried", topic=self._topic, error=str(error))
                await asyncio.sleep(1.0)

    async def follow(self, caught_up: asyncio.Event) -> None:
        """Apply every record until cancelled; set `caught_up` once all that existed at the start were applied.

        By then the log's time is known as well, if the log takes an append: everything afterwards uses it.
        """
        await self._learn_the_time()
        consumer, start, end = await self._begin()
        self._consumer = consumer
        try:
            if start == end:
                caught_up.set()
            while True:
                batches = await consumer.fetch(timeout=1.0)
                self.control.read_at = asyncio.get_running_loop().time()
                for batch in batches:
                    for record in batch.records if batch.partition == self._partition else ():
                        self._apply(record)
                # A compacted topic may end in a gap, so what counts is that nothing is left to read.
                lag = consumer.lag().get(self._partition)  # None while it is unknown
                if not caught_up.is_set() and (self.position >= end or lag == 0):
                    caught_up.set()
        finally:
            await consumer.close()

    async def _learn_the_time(self) -> None:
        for _ in range(CLOCK_TRIES):
            try:
                await self._log.synchronize(self._clock_topic)
            except LogUnavailableError as error:
                self._logger.warning("clock_unsynchronized", error=str(error))
            else:
                return

    def assigned(self, assignments: Sequence[Assignment], without_position: Collection[Partition] = ()) -> None:
        """Nothing to take over: a reader without a group starts at the topic's beginning."""

    async def revoked(self, partitions: Sequence[Partition]) -> Mapping[Partition, Commit]:  # noqa: ARG002 - the listener's signature
        return {}

    def records_deleted(self, partition: Partition, deleted: range) -> None:
        """Ignored: compaction deletes only what newer records replace."""

    def restarted(self, assignment: Assignment) -> None:
        """Ignored: that the topic was recreated shows in the offsets of its records."""

    def _apply(self, record: Record) -> None:
        if record.offset < self.position:  # only a recreated topic is read again from its start
            self.control.forget_offsets()
        self.position = record.offset + 1
        try:
            self.control.decode_and_apply(record.key, record.value, record.offset, record.appended_at)
        except UndecodableRecordError as error:
            self._undecodable.count_undecodable(self._topic, record.offset, error)
        except NewerRecordError as error:
            self._undecodable.report_newer(self._partition, record.offset, error)
        self._undecodable.set_newer_count("control", len(self.control.newer))
