"""Reads a partition from one offset to another, by requests on connections that are kept for the next scan.

A consumer of its own for each scan would connect three times and ask for the metadata of all topics: 20 ms on a quiet
cluster of three brokers, 0.3 s on a busy one, and a kick looks at every partition of the tiers.
"""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from aiokafka import ConsumerRecord, TopicPartition
from aiokafka.client import AIOKafkaClient
from aiokafka.consumer.fetcher import READ_UNCOMMITTED, PartitionRecords
from aiokafka.errors import (
    CorruptRecordException,
    KafkaError,
    KafkaTimeoutError,
    NodeNotReadyError,
    OffsetOutOfRangeError,
)
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.record.memory_records import MemoryRecords

from gateway.log.base import FETCH_BYTES, FETCH_RECORDS, Partition, Record
from gateway.log.kafka.cluster import EARLIEST, LATEST, QUERY_TIMEOUT, Cluster
from gateway.log.kafka.connection import RETRY_BACKOFF, Connection, stop
from gateway.log.kafka.consumer import FETCH_MAX_WAIT, records_of, slices_of
from gateway.log.kafka.errors import (
    MISCONFIGURED,
    is_of_a_closed_connection,
    message_of,
    raise_for,
    translated_errors,
)
from gateway.model import LogUnavailableError

FETCH_TIMEOUT = 2.5
"""Seconds for one broker: if it hangs there is time to ask another, and its connection is closed."""
AT_ONCE = 4
"""Requests to one broker at a time, which answers one after the other."""
METADATA_AGE = 300_000  # milliseconds
DAMAGED_FOR = 60.0
"""Seconds for which a partition counts as unreadable once a scan has met a damaged record, before another one tries."""


class _ThrottledError(KafkaError):
    """A quota is used up: the answer is empty, and the next one comes after some seconds."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"a quota is used up for {seconds:g} s")
        self.seconds = max(seconds, RETRY_BACKOFF)


class EmptyAnswerError(KafkaTimeoutError):
    """A broker has answered with nothing, though its partition doesn't end there: the next record's size is damaged."""


class _Damage(NamedTuple):
    """Where a partition can't be read on, until when nobody tries again (by the loop's clock), and why."""

    offset: int
    until: float
    error: KafkaError

    @property
    def reason(self) -> str:
        return f"its records from {self.offset} on: {message_of(self.error)}"


class Scanner:
    """Scans of one process; any number may run at once."""

    def __init__(self, connection: Connection, cluster: Cluster) -> None:
        # Nobody needs its metadata afresh by itself: who has failed is asked again.
        options = {**connection.options, "metadata_max_age_ms": METADATA_AGE}
        self._client = AIOKafkaClient(**options, request_timeout_ms=int(1000 * FETCH_TIMEOUT))
        self._loop = asyncio.get_running_loop()
        self._cluster = cluster
        self._leaders: dict[Partition, int] = {}
        self._slots: dict[int, asyncio.Semaphore] = defaultdict(lambda: asyncio.Semaphore(AT_ONCE))
        self._connecting = asyncio.Lock()
        self._has_failed = False
        self._is_closed = False
        self._damages: dict[Partition, _Damage] = {}

    async def close(self) -> None:
        self._is_closed = True
        await stop(self._client)

    async def scan(self, partition: Partition, start: int, end: int) -> AsyncIterator[Sequence[Record]]:
        """Yield what there is of the records from `start` to before `end`, up to 1 MiB at a time.

        Raises LogUnavailableError if it finds nothing new for 5 s, or behind the last record before a damaged one, and
        ForbiddenError.
        """
        self._expect_open()
        if start >= end:  # five requests less, of which a job has one for each empty partition of the tiers
            return
        if partition.number not in (await self._cluster.describe([partition.topic])).get(partition.topic, {}):
            return
        first, after_last = await asyncio.gather(
            self._cluster.offsets([partition], EARLIEST), self._cluster.offsets([partition], LATEST)
        )
        start, end = max(start, first[partition]), min(end, after_last[partition])
        if self._leaders.get(partition) != self._cluster.leaders.get(partition):
            self._leaders.pop(partition, None)  # It has a new one since the last scan.
        try:
            with translated_errors(f"scan {partition.topic}/{partition.number}"):
                while start < end and (fetched := await self._fetch(partition, start, end)) is not None:
                    unread = self._undamaged(partition, fetched)
                    while some := records_of(islice(unread, FETCH_RECORDS)):
                        for records in slices_of(some):
                            if within := [record for record in records if record.offset < end]:
                                yield within
                        await asyncio.sleep(0)  # What is left is decoded without waiting for anything.
                    self._expect_progress(partition, start, fetched.next_fetch_offset, end)
                    start = fetched.next_fetch_offset  # The last record doesn't show the end: gaps may follow it.
        finally:
            if self._is_closed:  # A request that was in flight may have connected again.
                await stop(self._client)

    def _undamaged(self, partition: Partition, fetched: PartitionRecords) -> Iterator[ConsumerRecord[Any, Any]]:
        """Yield records up to one whose checksum is wrong, and note that; or that it isn't any more."""
        try:
            yield from fetched
        except CorruptRecordException as error:
            self._note_damage(partition, fetched.next_fetch_offset, error)
        else:
            if (damage := self._damages.get(partition)) is not None and damage.offset < fetched.next_fetch_offset:
                del self._damages[partition]

    def _note_damage(self, partition: Partition, offset: int, error: KafkaError) -> None:
        self._damages[partition] = _Damage(offset, self._loop.time() + DAMAGED_FOR, error)

    def _expect_progress(self, partition: Partition, start: int, reached: int, end: int) -> None:
        """Raise a KafkaError if a scan can't go on where it is."""
        if (damage := self._damages.get(partition)) is not None and damage.offset == reached < end:
            raise damage.error
        if reached <= start:
            raise KafkaTimeoutError(f"no record from offset {start} on")

    def damaged(self, starts: Mapping[Partition, int]) -> Mapping[Partition, str]:
        """Return which of these partitions have a damaged record that was met a moment ago, and where.

        Not what is before their starts: that is deleted.
        """
        now, found = self._loop.time(), {}
        for partition, start in starts.items():
            if (damage := self._damages.get(partition)) is not None and start <= damage.offset and now < damage.until:
                found[partition] = damage.reason
        return found

    def _expect_open(self) -> None:
        """Raise LogUnavailableError after `close`: a request would connect again."""
        if self._is_closed:
            raise LogUnavailableError("expected a log that is open, got one that was closed")

    async def _fetch(self, partition: Partition, offset: int, end: int) -> PartitionRecords | None:
        """Return what follows an offset: maybe no record, but where to go on. None if all of it is deleted."""
        last: Exception = KafkaTimeoutError(f"no record from offset {offset} on")
        left = QUERY_TIMEOUT
        while left > 0:
            began, waited = self._loop.time(), 0.0
            try:
                leader = await self._leader(partition)
                asked_at = self._loop.time()
                async with self._slots[leader]:
                    waited = self._loop.time() - asked_at
                    is_led = self._leaders.get(partition) == leader  # or another scan has found out that it hangs
                    if is_led and (found := await self._fetch_once(leader, partition, offset)):
                        return found
            except _ThrottledError as error:
                await asyncio.sleep(error.seconds)
                continue
            except OffsetOutOfRangeError as error:
                last = error
                first = await self._cluster.offsets([partition], EARLIEST)
                offset = max(offset, first[partition])  # What was the first may be deleted meanwhile.
                if offset >= end:
                    return None
            except MISCONFIGURED:
                raise
            except (KafkaError, RuntimeError) as error:
                if not isinstance(error, KafkaError) and not is_of_a_closed_connection(error):
                    raise
                last = error
            # Also without an error: to a replica that lags, this is the end.
            self._leaders.pop(partition, None)
            await asyncio.sleep(RETRY_BACKOFF)
            left -= self._loop.time() - began - waited
        if isinstance(last, EmptyAnswerError | CorruptRecordException):
            self._note_damage(partition, offset, last)
        raise last

    async def _leader(self, partition: Partition) -> int:
        """Return the broker to ask, as the last scan found it; if that failed, where it is now."""
        if (known := self._leaders.get(partition)) is not None:
            return known
        leader = await self._cluster.leader(partition)
        async with self._connecting:
            self._expect_open()
            if self._has_failed or self._client.cluster.broker_metadata(leader) is None:
                self._has_failed = False
                await self._client.bootstrap()
        self._leaders[partition] = leader
        return leader

    async def _fetch_once(self, leader: int, partition: Partition, offset: int) -> PartitionRecords | None:
        """Return None if the broker has nothing from there on."""
        self._expect_open()
        request = FetchRequest(
            int(1000 * FETCH_MAX_WAIT),
            1,
            FETCH_BYTES,
            READ_UNCOMMITTED,
            [(partition.topic, [(partition.number, offset, FETCH_BYTES)])],
        )
        is_answered = False
        try:
            response = await self._client.send(leader, request)
            is_answered = True
        except KeyError as error:
            # Raised by client.send when the connection that it waited for is already replaced.
            raise NodeNotReadyError(f"node {leader}") from error
        finally:
            if not is_answered:  # also if the caller has waited for long enough
                self._leaders = {each: its for each, its in self._leaders.items() if its != leader}
                self._has_failed = True
        if not response.topics:
            raise _ThrottledError(response.throttle_time_ms / 1000)
        ((_, ((_, code, highwater, *_, found),)),) = response.topics
        raise_for(code, f"{partition.topic}/{partition.number}")
        records = MemoryRecords(found)
        if not records.has_next():
            if highwater > offset:
                raise EmptyAnswerError(f"expected some up to {highwater - 1}, got none")
            return None
        return PartitionRecords(TopicPartition(*partition), records, None, offset, None, None, True, READ_UNCOMMITTED)  # noqa: FBT003 - of aiokafka
