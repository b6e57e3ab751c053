"""Orphaned spools: their processes no longer exist, after a start with a smaller `--processes`.

The first process moves them, beside its own. Their files stay, empty: there may be that many processes again.
"""

import asyncio
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from structlog.typing import FilteringBoundLogger

from gateway.log.base import Log
from gateway.model import GatewayError, LogUnavailableError
from gateway.settings import Settings
from gateway.spool.counting import count
from gateway.spool.mover import Mover
from gateway.spool.store import FileStore
from gateway.spool.waiting import Waiting
from gateway.telemetry.metrics import Metrics

POLL_INTERVAL = 1.0
RETRY_INTERVAL = 60.0
"""Seconds until a file that can't be used is tried again."""


def orphaned_files(settings: Settings) -> Sequence[Path]:
    """Return the orphaned spools beside that of the first process, if it is this one. Blocks."""
    file = settings.spool.file
    if file is None or settings.process:
        return ()
    pattern = re.compile(rf"{re.escape(file.stem)}\.process-([1-9][0-9]{{0,2}}){re.escape(file.suffix)}")
    names = [found[0] for each in file.parent.glob("*") if (found := pattern.fullmatch(each.name))]
    of_processes = {settings.spool.of_process(number).file for number in range(settings.processes)}
    return sorted({file.with_name(name) for name in names} - of_processes)


class OrphanedSpools:
    """Moves what is in orphaned spools, with what `waiting` counts of them."""

    def __init__(self, paths: Sequence[Path], *, log: Log, metrics: Metrics, logger: FilteringBoundLogger) -> None:
        self.waiting = [Waiting() for _ in paths]
        self._movers: dict[int, Mover] = {}
        self._problems: dict[int, str] = {}
        self._paths = paths
        self._log = log
        self._metrics = metrics
        self._logger = logger

    def merged_reasons(self, own: Mapping[str, str]) -> Mapping[str, str]:
        """Return why topics aren't moved now, by topic, or "" for a whole file: `own` and those of the orphaned files.

        The reason of an orphaned file names it.
        """
        found = dict(own)
        for number, path in enumerate(self._paths):
            mover, problem = self._movers.get(number), self._problems.get(number)
            reasons = {"": problem} if problem else {} if mover is None else mover.reasons
            for topic, reason in reasons.items():
                text = f"{path.name}: {reason}"
                found[topic] = f"{found[topic]}; {text}" if topic in found else text
        return found

    async def run(self) -> None:
        """Move all of it; returns once that is done."""
        async with asyncio.TaskGroup() as tasks:
            for number, path in enumerate(self._paths):
                tasks.create_task(self._until_moved(number, path), name=f"spool-orphans-{path.name}")

    async def _until_moved(self, number: int, path: Path) -> None:
        while True:
            try:
                await self._move(number, path)
            except GatewayError as error:
                self._problems[number] = str(error)
                self._logger.error("spool_unusable", path=str(path), error=str(error))
            else:
                self._problems.pop(number, None)
                return
            await asyncio.sleep(RETRY_INTERVAL)

    async def _move(self, number: int, path: Path) -> None:
        """Raises UsageError or LogUnavailableError if the file can't be used, as while another process has it open."""
        store = await FileStore.open(path, owner=True)
        try:
            waiting = self.waiting[number] = Waiting()
            await count(store, waiting)
            if not waiting.records:
                return
            events, began = waiting.records, asyncio.get_running_loop().time()
            self._logger.warning("spool_found", path=str(path), events=events, bytes=waiting.bytes)
            mover = Mover(log=self._log, store=store, waiting=waiting, metrics=self._metrics, logger=self._logger)
            moving = asyncio.create_task(mover.run(), name="spool-orphans-mover")
            self._movers[number] = mover
            self._problems.pop(number, None)
            try:
                while waiting.records:  # noqa: ASYNC110 - nothing tells, as in `gateway spool move`
                    await asyncio.sleep(POLL_INTERVAL)
            finally:
                del self._movers[number]
                moving.cancel()
                await asyncio.wait({moving})
            seconds = round(asyncio.get_running_loop().time() - began, 1)
            self._logger.info("spool_drained", seconds=seconds, events=events, path=str(path))
            with suppress(LogUnavailableError):  # its space isn't given back to the disk then
                await store.give_back()
        finally:
            await store.close()
