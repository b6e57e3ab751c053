"""Publish how far a cancelled replay had come that was no longer running."""

from gateway.engine.control.records import ControlRecord
from gateway.engine.jobs.scan import ScanningJob


class CancelledReplays(ScanningJob):
    """Publishes the last checkpoints of cancelled replays."""

    async def publish_last_checkpoint(self, command: ControlRecord, owner: object) -> None:
        """Publish the last checkpoint of a cancelled replay."""
        run = self._progress_of(command)
        await self._publish_cancelled(self._new_scan([run], lambda: self._owner() is owner), run)
