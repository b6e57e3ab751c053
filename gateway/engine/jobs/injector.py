"""Put deliveries into the shortest tier: the last step of resume, kick, replay and redelivery.

Those that don't fit into the log any more are dead-lettered.
"""

import asyncio
from collections.abc import Callable, Iterable, Sequence

from gateway.engine.commit_progress import WINDOW
from gateway.engine.successor_writer import SuccessorWriter, always_true
from gateway.log.base import Commit, Log
from gateway.model import (
    DeadLettered,
    DeadReason,
    Delivery,
    RecordMetadata,
    RecordTooLargeError,
)

APPENDS_AT_ONCE = 100
BACKLOG = WINDOW // 2
"""Unfinished records of one partition of the shortest tier above which a replay waits. A window that is three quarters
full cuts deliveries short, so a replay may use half of it; with the tier's 5 s, that is 1,300 deliveries a second."""


async def most_unfinished(log: Log, group: str, tier: str) -> int:
    """Count the unfinished records of the fullest partition of a tier. Raises LogUnavailableError."""
    commits = await log.committed(group, tier)
    unfinished = 0
    bounds, _ = await log.readable(tier)
    for number, (start, end) in bounds.items():
        base, done, *_ = commits.get(number, Commit(start))
        unfinished = max(unfinished, end - max(base, start) - int.from_bytes(done, "little").bit_count())
    return unfinished


class Injector:
    """Appends deliveries to one topic, all those of a call concurrently."""

    def __init__(self, successors: SuccessorWriter, topic: str) -> None:
        self._successors = successors
        self._topic = topic

    async def inject(
        self, deliveries: Iterable[tuple[Delivery, RecordMetadata]], is_wanted: Callable[[], bool] = always_true
    ) -> Sequence[bool]:
        """Append deliveries, each with its record metadata.

        Return for each whether it was acknowledged; it was given up otherwise, as it isn't wanted any more.

        A failed append is retried by itself: a job that started over would repeat all the others. It goes to another
        partition if that of its key refuses it: this job, and those behind it, would wait for that one.
        """
        async with asyncio.TaskGroup() as tasks:
            appends = [
                tasks.create_task(self._inject(delivery, metadata, is_wanted), name="job-append")
                for delivery, metadata in deliveries
            ]
        return [append.result() for append in appends]

    async def _inject(self, delivery: Delivery, metadata: RecordMetadata, is_wanted: Callable[[], bool]) -> bool:
        try:
            return await self._successors.store(self._topic, delivery, metadata, is_wanted, may_move=True)
        except RecordTooLargeError:
            end = DeadLettered(reason=DeadReason.TOO_LARGE, detail=f"too large for {self._topic}")
            return await self._successors.dead_letter(delivery, end, is_wanted, may_move=True)
