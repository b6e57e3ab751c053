"""Publish how far a replay had come that was cancelled while no process carried it out."""

from gateway.engine.control.records import Order
from gateway.engine.jobs.scan import ScanningJob


class CancelledReplays(ScanningJob):
    """The last markers of cancelled replays."""

    async def close(self, order: Order, owner: object) -> None:
        """Tell how far a replay had come that is cancelled, and isn't under way any more."""
        run = self._run(order)
        await self._take_back(self._scan([run], lambda: self._owner() is owner), run)
