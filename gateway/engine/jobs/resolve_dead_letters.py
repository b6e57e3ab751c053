"""Resolve dead letters: put those that an order is for into the shortest tier again, or drop them."""

from dataclasses import replace

from gateway.engine.control.records import Order
from gateway.engine.jobs.dead_letters import NEWER, read_letter
from gateway.engine.jobs.scan import NOTHING, Picked, ScanningJob
from gateway.log.base import Partition, Record
from gateway.log.records import decode_delivery


class DeadLetterJobs(ScanningJob):
    """The jobs of the orders about dead letters."""

    async def settle(self, order: Order, owner: object) -> None:
        """Inject the dead letters that an order is for, with a life of their own, or give them up."""
        run = self._run(order)
        now = self._log.now()

        def pick(partition: Partition, record: Record) -> Picked:
            letter, stored = read_letter(record)
            if letter.reason == NEWER:
                decode_delivery(record)  # which raises
            if not order.is_for(letter) or self._control.settled(letter, partition, record.offset):
                return NOTHING
            if order.action == "drop" or stored is None:
                return Picked((run,))
            return Picked((run,), self._again(replace(stored.delivery, attempts=(), since=now), at_once=True))

        scan = self._scan([run], lambda: self._owner() is owner)
        await self._ends(scan, self._topics.dead)
        if await scan.go(self._topics.dead, run.told, order.marker, pick):
            await self._end(scan, run, "done")
