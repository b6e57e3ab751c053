"""Resolve dead letters: put those that a command covers into the shortest tier, or drop them."""

from dataclasses import replace

from gateway.engine.control.records import ControlRecord
from gateway.engine.jobs.dead_letters import NEWER, read_letter
from gateway.engine.jobs.scan import NOTHING, Picked, ScanningJob
from gateway.log.base import Partition, Record
from gateway.log.records import decode_delivery


class DeadLetterResolutions(ScanningJob):
    """The jobs of commands about dead letters."""

    async def resolve(self, command: ControlRecord, owner: object) -> None:
        """Inject the dead letters that a command covers as new deliveries, or drop them."""
        run = self._run(command)
        firsts = await self._first_records([self._topics.dead], [command])
        # The command is about the letters that there were: of a topic that was recreated since, it takes none.
        ends = {
            place: end
            for place, end in command.checkpoint.items()
            if place not in firsts or firsts[place][1] <= command.covered_until
        }
        now = self._log.now()

        def pick(partition: Partition, record: Record) -> Picked:
            letter, stored = read_letter(record)
            if letter.reason == NEWER:
                decode_delivery(record)  # which raises
            if not command.is_for(letter) or self._control.resolved_by(letter, partition, record.offset):
                return NOTHING
            if command.action == "drop" or stored is None:
                return Picked((run,))
            return Picked((run,), self._successor_of(replace(stored.delivery, attempts=(), since=now), at_once=True))

        scan = self._scan([run], lambda: self._owner() is owner)
        await self._ends(scan, self._topics.dead)
        if await scan.scan_topic(self._topics.dead, run.last_checkpoint, ends, pick):
            await self._end(scan, run, "done")
