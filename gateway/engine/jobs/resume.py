"""Resume what is paused: put what was parked into the shortest tier again, late arrivals included."""

from collections.abc import Mapping

from gateway.engine.control.records import Order
from gateway.engine.jobs.dead_letters import filed_in
from gateway.engine.jobs.scan import NOTHING, JobServices, Picked, Run, ScanningJob
from gateway.log.base import Partition, Record
from gateway.log.records import decode_delivery
from gateway.model import (
    UndecodableRecordError,
)


class Resumptions(ScanningJob):
    """The scan of each resumption, and the sweep of what it couldn't know."""

    def __init__(self, services: JobServices) -> None:
        super().__init__(services)
        self.owed: set[str] = set()
        """Partitions of what is parked that a resumption couldn't read: they are swept from their beginning."""

    async def resume(self, order: Order, owner: object) -> None:
        """Inject what was parked by a name that is resumed, until it is paused again."""
        topic = self._topics.parked
        run = self._run(order)

        def pick(partition: Partition, record: Record) -> Picked:
            stored = filed_in(record)
            if stored is None or stored.note.by != order.name or run.is_beyond(partition, record.offset):
                return NOTHING
            return Picked((run,), self._again(stored.delivery, at_once=False))

        def is_wanted() -> bool:
            present = self._control.orders.get(order.key)
            return self._owner() is owner and (present is None or present.state != "paused")

        scan = self._scan([run], is_wanted)
        ends = await self._ends(scan, topic)
        if await scan.go(topic, run.told, ends, pick):
            self.owed |= scan.unread
            await self._end(scan, run, "active")
        elif self._owner() is owner:  # paused again
            await self._take_back(scan, run)

    async def sweep(self, starts: Mapping[str, int], ends: dict[str, int], owner: object) -> bool:
        """Inject what a worker parked after the scan of a resumption, since it hadn't read of it yet.

        Return False where it has not come to its end. The `ends` become those that it has come to.
        """
        runs = {
            order.name: self._run(order)
            for order in self._control.orders.values()
            if order.kind == "pause" and order.state == "active"
        }
        found: dict[str, Run] = {}
        unreadable: list[Record] = []

        def pick(partition: Partition, record: Record) -> Picked:
            stored = filed_in(record)
            if stored is None:
                unreadable.append(record)
                found.update(runs)  # whose markers pass it, so that the next owner doesn't bury it again
                return NOTHING
            run = runs.get(stored.note.by)
            if run is None or run.is_beyond(partition, record.offset):
                return NOTHING
            found[run.order.name] = run
            return Picked((run,), self._again(stored.delivery, at_once=False))

        scan = self._scan(found.values(), lambda: self._owner() is owner, state="done")
        is_through = await scan.go(self._topics.parked, starts, ends, pick)
        for record in unreadable:
            await self._dead_letter_undecodable(self._topics.parked, record)
        if is_through:
            await scan.mark()  # or the next owner of the jobs would inject it again
        ends.update(scan.left)
        ends.update({place: starts.get(place, 0) for place in scan.unread})
        return is_through

    async def _dead_letter_undecodable(self, topic: str, record: Record) -> None:
        try:
            decode_delivery(record)
        except UndecodableRecordError as error:
            await self._successors.dead_letter_undecodable(topic, record, error)
