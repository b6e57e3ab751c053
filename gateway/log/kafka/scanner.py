"""Reads a partition from one offset to another, by requests on connections that are kept for the next scan.

A consumer of its own for each scan would connect three times and ask for the metadata of all topics: 20 ms on a quiet
cluster of three brokers, 0.3 s on a busy one, and a kick looks at every partition of the tiers.
"""

import asyncio
from collections.abc import AsyncIterator, Sequence
from itertools import islice

from aiokafka import TopicPartition
from aiokafka.client import AIOKafkaClient
from aiokafka.consumer.fetcher import READ_UNCOMMITTED, PartitionRecords
from aiokafka.errors import KafkaError, KafkaTimeoutError, NodeNotReadyError, OffsetOutOfRangeError
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.record.memory_records import MemoryRecords

from gateway.log.base import Partition, Record
from gateway.log.kafka.cluster import EARLIEST, LATEST, QUERY_TIMEOUT, Cluster
from gateway.log.kafka.connection import RETRY_BACKOFF, Connection, stop
from gateway.log.kafka.consumer import FETCH_BYTES, FETCH_RECORDS, FETCH_TIMEOUT, FETCH_WAIT, records_of, slices_of
from gateway.log.kafka.errors import MISCONFIGURED, is_of_a_closed_connection, raise_for, translated_errors
from gateway.model import LogUnavailableError


class Scanner:
    """Scans of one process. Any number may run at once; aiokafka closes a connection that idles for 9 minutes."""

    def __init__(self, connection: Connection, cluster: Cluster) -> None:
        self._client = AIOKafkaClient(**connection.options, request_timeout_ms=int(1000 * FETCH_TIMEOUT))
        self._cluster = cluster
        self._leaders: dict[Partition, int] = {}
        self._connecting = asyncio.Lock()
        self._has_failed = False
        self._is_closed = False

    async def close(self) -> None:
        self._is_closed = True
        await stop(self._client)

    async def scan(self, partition: Partition, start: int, end: int) -> AsyncIterator[Sequence[Record]]:
        """Yield what there is of the records from `start` to before `end`, up to 1 MiB at a time.

        Raises LogUnavailableError if it finds nothing new for 5 s, and ForbiddenError.
        """
        self._expect_open()
        if partition.number not in (await self._cluster.describe([partition.topic])).get(partition.topic, {}):
            return
        first, after_last = await asyncio.gather(
            self._cluster.offsets([partition], EARLIEST), self._cluster.offsets([partition], LATEST)
        )
        start, end = max(start, first[partition]), min(end, after_last[partition])
        with translated_errors(f"scan {partition.topic}/{partition.number}"):
            while start < end:
                fetched = await self._fetch(partition, start)
                unread = (record for record in fetched)
                while some := records_of(islice(unread, FETCH_RECORDS)):
                    for records in slices_of(some):
                        if within := [record for record in records if record.offset < end]:
                            yield within
                    await asyncio.sleep(0)  # What is left is decoded without waiting for anything.
                start = fetched.next_fetch_offset  # The last record doesn't show the end: gaps may follow it.

    def _expect_open(self) -> None:
        """Raise LogUnavailableError after `close`: a request would connect again."""
        if self._is_closed:
            raise LogUnavailableError("expected a log that is open, got one that was closed")

    async def _fetch(self, partition: Partition, offset: int) -> PartitionRecords:
        """Return what follows an offset: maybe no record, but always where to go on."""
        last: Exception = KafkaTimeoutError(f"no record from offset {offset} on")
        try:
            async with asyncio.timeout(QUERY_TIMEOUT):
                while True:
                    try:
                        if found := await self._fetch_once(partition, offset):
                            return found
                        continue
                    except MISCONFIGURED:
                        raise
                    except OffsetOutOfRangeError as error:
                        last = error
                        first = await self._cluster.offsets([partition], EARLIEST)
                        offset = max(offset, first[partition])  # What was the first may be deleted meanwhile.
                    except KafkaError as error:
                        last = error
                    except RuntimeError as error:
                        if not is_of_a_closed_connection(error):
                            raise
                        last = error
                    self._leaders.pop(partition, None)
                    self._has_failed = True
                    await asyncio.sleep(RETRY_BACKOFF)
        except TimeoutError as error:
            raise last from error

    async def _leader(self, partition: Partition) -> int:
        """Return the broker to ask, as the last scan found it; if that failed, where it is now."""
        if (known := self._leaders.get(partition)) is not None:
            return known
        leader = await self._cluster.leader(partition)
        async with self._connecting:
            if self._has_failed or self._client.cluster.broker_metadata(leader) is None:
                await self._client.bootstrap()
                self._has_failed = False
        self._leaders[partition] = leader
        return leader

    async def _fetch_once(self, partition: Partition, offset: int) -> PartitionRecords | None:
        leader = await self._leader(partition)
        self._expect_open()
        request = FetchRequest(
            int(1000 * FETCH_WAIT),
            1,
            FETCH_BYTES,
            READ_UNCOMMITTED,
            [(partition.topic, [(partition.number, offset, FETCH_BYTES)])],
        )
        try:
            response = await self._client.send(leader, request)
        except KeyError as error:
            # Raised by client.send when the connection that it waited for is already replaced.
            raise NodeNotReadyError(f"node {leader}") from error
        ((_, ((_, code, *_, found),)),) = response.topics
        raise_for(code, f"{partition.topic}/{partition.number}")
        records = MemoryRecords(found)
        if not records.has_next():
            return None
        return PartitionRecords(TopicPartition(*partition), records, None, offset, None, None, True, READ_UNCOMMITTED)  # noqa: FBT003
