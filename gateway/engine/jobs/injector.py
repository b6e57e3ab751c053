"""Put deliveries into the shortest tier again: what resuming, kicking and replaying end in.

What doesn't fit into the log any more is dead-lettered.
"""

import asyncio
from collections.abc import Callable, Iterable

from gateway.engine.successor_writer import SuccessorWriter, always
from gateway.model import (
    DeadLettered,
    DeadReason,
    Delivery,
    Note,
    RecordTooLargeError,
)

APPENDS_AT_ONCE = 100


class Injector:
    """Appends deliveries to one topic, all of a call at once."""

    def __init__(self, successors: SuccessorWriter, topic: str) -> None:
        self._successors = successors
        self._topic = topic

    async def inject(self, deliveries: Iterable[tuple[Delivery, Note]], is_wanted: Callable[[], bool] = always) -> bool:
        """Append deliveries, each with its note.

        Return True once each is acknowledged, False where one was given up because it isn't wanted any more.

        An append that fails is made again by itself: a job that began anew would repeat all the others.
        """
        async with asyncio.TaskGroup() as tasks:
            appends = [
                tasks.create_task(self._inject(delivery, note, is_wanted), name="job-append")
                for delivery, note in deliveries
            ]
        return all(append.result() for append in appends)

    async def _inject(self, delivery: Delivery, note: Note, is_wanted: Callable[[], bool]) -> bool:
        try:
            return await self._successors.store(self._topic, delivery, note, is_wanted)
        except RecordTooLargeError:
            end = DeadLettered(reason=DeadReason.TOO_LARGE, detail=f"too large for {self._topic}")
            return await self._successors.dead_letter(delivery, end, is_wanted)
