"""Resume: put parked deliveries into the shortest tier, late arrivals included."""

from collections.abc import Callable, Mapping

from gateway.engine.control.records import ControlRecord
from gateway.engine.jobs.dead_letters import delivery_in
from gateway.engine.jobs.job_progress import NOTHING, JobProgress, Picked
from gateway.engine.jobs.scan import STUCK_AFTER, JobServices, ScanningJob
from gateway.log.base import Partition, Record
from gateway.log.records import decode_delivery
from gateway.model import (
    UndecodableRecordError,
)

RESCANNED = ControlRecord(kind="pause", name="*", state="active", at=0.0)
"""Stands for all names in the checkpoint of the rescans; nobody commands it."""


class ResumeJobs(ScanningJob):
    """The job of each resume, and the rescan for what was parked after it."""

    def __init__(self, services: JobServices) -> None:
        super().__init__(services)
        self.unread_parked: set[str] = set()
        """Partitions of the parked topic that a resume couldn't read; they are to be rescanned from the beginning."""

    async def resume(self, command: ControlRecord, owner: object) -> None:
        """Inject the deliveries that a resumed name had parked, until it is paused again."""
        topic = self._topics.parked
        firsts = await self._first_records([topic], [command])
        run = self._progress_of(command, firsts, detail=self._ordered_routes_of(command))

        def pick(partition: Partition, record: Record) -> Picked:
            stored = delivery_in(record)
            if stored is None or stored.metadata.paused_name != command.name or run.is_covered(partition, record):
                return NOTHING
            return Picked((run,), self._successor_of(stored.delivery, immediately=False))

        def is_wanted() -> bool:
            present = self._control.commands.get(command.key)
            return self._owner() is owner and (present is None or present.state != "paused")

        scan = self._new_scan([run], is_wanted)
        ends = await self._end_offsets(scan, topic)
        if await scan.scan_topic(topic, dict(run.positions), ends, pick):
            self.unread_parked |= scan.unreadable
            await self._finish_job(scan, run, "active")
        elif self._owner() is owner:  # paused again
            await self._publish_cancelled(scan, run)

    async def rescan(self, starts: Mapping[str, int], ends: Mapping[str, int], owner: object) -> Mapping[str, int]:
        """Inject deliveries parked after the scan of their resume, by a worker that hadn't read the command yet.

        What can't be decoded is dead-lettered; where that can't be stored either, the rest of its partition is left to
        the next rescan. Return up to where it has come in each partition, as it may stop early; those that aren't
        readable are left out.
        """
        runs = await self._active_runs()
        found = {RESCANNED.name: runs[RESCANNED.name]}

        def pick(partition: Partition, record: Record) -> Picked:
            stored = delivery_in(record)
            if stored is None:
                is_rescanned = runs[RESCANNED.name].is_covered(partition, record)
                return NOTHING if is_rescanned else Picked(is_undecodable=True)
            run = runs.get(stored.metadata.paused_name)
            if run is None or run.is_covered(partition, record):
                return NOTHING
            found[run.command.name] = run
            return Picked((run,), self._successor_of(stored.delivery, immediately=False))

        def is_wanted() -> bool:
            return self._owner() is owner

        def is_preempted() -> bool:
            return bool(self._control.pending("pause"))  # a resume doesn't wait for all that is parked

        def gives_up() -> bool:
            return is_preempted() and self._log.now() > scan.flush_began + STUCK_AFTER

        async def dead_letter(partition: Partition, record: Record) -> bool:
            until = self._log.now() + STUCK_AFTER
            return await self._dead_letter(
                partition, record, lambda: is_wanted() and not is_preempted() and self._log.now() < until
            )

        scan = self._new_scan(
            found.values(),
            is_wanted,
            state="done",
            is_preempted=is_preempted,
            gives_up=gives_up,
            dead_letter=dead_letter,
        )
        if await scan.scan_topic(self._topics.parked, starts, ends, pick):
            await scan.publish_checkpoints()  # or the next owner of the jobs would inject it again
        return scan.flushed

    async def _dead_letter(self, partition: Partition, record: Record, is_wanted: Callable[[], bool]) -> bool:
        """Dead-letter a record that can't be decoded. Return False if it isn't wanted any more."""
        try:
            decode_delivery(record)
        except UndecodableRecordError as error:
            return await self._successors.dead_letter_undecodable(
                partition.topic, record, error, is_wanted, may_move=True
            )
        return True

    async def rescanned(self) -> Mapping[str, int]:
        """Return how far all resumes, and the rescans, have scanned each partition of the parked topic."""
        runs = [run.positions for run in (await self._active_runs()).values()]
        return {
            partition_name: min([positions.get(partition_name, 0) for positions in runs])
            for partition_name in set().union(*runs)
        }

    async def _active_runs(self) -> dict[str, JobProgress]:
        active = [each for each in self._control.commands.values() if each.kind == "pause" and each.state == "active"]
        firsts = await self._first_records([self._topics.parked], [*active, RESCANNED])
        return {command.name: self._progress_of(command, firsts) for command in (*active, RESCANNED)}
