"""Resolve dead letters: put those that a command covers into the shortest tier, or drop them."""

from dataclasses import replace

from gateway.engine.control.records import ControlRecord
from gateway.engine.jobs.dead_letters import NEWER_VERSION, read_dead_letter
from gateway.engine.jobs.job_progress import LEFT, NOTHING, Picked
from gateway.engine.jobs.log_reader import last_append_time
from gateway.engine.jobs.scan import ScanningJob
from gateway.log.base import LEADER_CLOCK_SKEW, Partition, Record
from gateway.log.records import decode_delivery


class DeadLetterResolutions(ScanningJob):
    """The jobs of commands about dead letters."""

    async def resolve(self, command: ControlRecord, owner: object) -> None:
        """Inject the dead letters that a command covers as new deliveries, or drop them."""
        run = self._progress_of(command)
        ends = await self._ends_of_then(command)
        now = self._log.now()

        def pick(partition: Partition, record: Record) -> Picked:
            letter, stored = read_dead_letter(record)
            if letter.reason == NEWER_VERSION:
                decode_delivery(record)  # which raises
            if not command.is_for(letter) or self._control.resolved_by(letter, partition, record.offset):
                return NOTHING
            may_be_dropped = record.appended_at <= self._control.newer_until(["dead"]) + LEADER_CLOCK_SKEW
            if command.action != "drop" and may_be_dropped:
                return LEFT
            if command.action == "drop" or stored is None:
                return Picked((run,))
            return Picked(
                (run,), self._successor_of(replace(stored.delivery, attempts=(), replayed_at=now), immediately=True)
            )

        scan = self._new_scan([run], lambda: self._owner() is owner)
        await self._end_offsets(scan, self._topics.dead)
        if await scan.scan_topic(self._topics.dead, run.last_checkpoint, ends, pick):
            await self._finish_job(scan, run, "done")

    async def _ends_of_then(self, command: ControlRecord) -> dict[str, int]:
        """Return where the letters of a command end in each partition; left out are those that were recreated since.

        The command is about the letters that there were then. Raises LogUnavailableError.
        """
        ends = dict(command.checkpoint)
        for partition_name, (_, first_at) in (await self._first_records([self._topics.dead], [command])).items():
            below = {partition_name: ends.get(partition_name, 0)}
            last_at = None if command.latest is None else await last_append_time(self._log, below)
            # The last one was looked at when the command was placed. An earlier one may have a later time: brokers'
            # clocks are set back.
            if (first_at if last_at is None else last_at) > command.covered_until:
                ends.pop(partition_name, None)
        return ends
