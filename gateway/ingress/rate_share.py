"""Counts the ingresses of a log, since each takes an equal share of a source's `rate`.

An ingress reads nothing, so it belongs to no group by itself. While a source has a rate, it joins one just to be
counted, in which no record is ever fetched. Without a count (before the first one, or where the group may not be
joined) it takes the whole rate: too much is better than refusing what its sender may send.
"""

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence

from structlog.typing import FilteringBoundLogger

from gateway.log.base import Assignment, Commit, Consumer, Log, Partition
from gateway.log.topics import INGRESS_GROUP, Topics
from gateway.model import LogUnavailableError
from gateway.telemetry.log_throttle import LogThrottle

INTERVAL = 5.0
"""Seconds between counts, and until the group is joined or left after a reload."""
WARNING_INTERVAL = 60.0


class RateShare:
    """One ingress's membership. `is_needed` returns whether a source has a rate; `use` gets each new count."""

    def __init__(
        self,
        *,
        log: Log,
        topics: Topics,
        is_needed: Callable[[], bool],
        use: Callable[[int], None],
        logger: FilteringBoundLogger,
    ) -> None:
        self._log = log
        self._topic = topics.control
        self._group = topics.group(INGRESS_GROUP)
        self._is_needed = is_needed
        self._use = use
        self._logger = logger
        self._seldom = LogThrottle(WARNING_INTERVAL)
        self._consumer: Consumer | None = None
        self._to_pause: list[Partition] = []
        self._count = 1

    async def run(self) -> None:
        """Count until cancelled."""
        try:
            while True:
                try:
                    await self._turn()
                except LogUnavailableError as error:  # the last count is used
                    if self._seldom.count(self._group, asyncio.get_running_loop().time()):
                        self._logger.warning("rate_not_shared", group=self._group, error=str(error))
                    await asyncio.sleep(INTERVAL)
        finally:
            await self._leave()

    async def _turn(self) -> None:
        if not self._is_needed():
            await self._leave()
            await asyncio.sleep(INTERVAL)
            return
        if self._consumer is None:
            self._consumer = await self._log.consume(group=self._group, topics=[self._topic], listener=self)
        while self._to_pause:
            self._consumer.pause(self._to_pause.pop())
        await self._consumer.fetch(timeout=INTERVAL)  # nothing, but sooner after a rebalance
        count = max(1, await self._log.members(self._group))
        if count != self._count:
            self._count = count
            self._use(count)
            self._logger.info("rate_shared", processes=count)

    async def _leave(self) -> None:
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            self._to_pause.clear()
            self._count = 1
            self._use(1)
            await consumer.close()

    def assigned(self, assignments: Sequence[Assignment], without_position: Collection[Partition] = ()) -> None:  # noqa: ARG002 - the listener's signature
        self._to_pause += [assignment.partition for assignment in assignments]

    async def revoked(self, partitions: Sequence[Partition]) -> Mapping[Partition, Commit]:  # noqa: ARG002 - the listener's signature
        return {}

    def records_deleted(self, partition: Partition, deleted: range) -> None:
        """Ignored: none is read."""

    def restarted(self, assignment: Assignment) -> None:
        """Ignored: none is read."""
