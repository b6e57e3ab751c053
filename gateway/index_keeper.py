"""Keeps the index in a process, beside what else that does and never in its way.

What fails there (a full disk, a log that is away, a bug) is told in log lines and metrics, and tried again; nothing of
it ends the process. A process that is there for the index alone doesn't start if that is a mistake: another process has
the file, or it is no index.
"""

import asyncio
import shutil
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from structlog.typing import FilteringBoundLogger

from gateway.index.file import IndexUnavailableError
from gateway.index.hidden import Redactions
from gateway.index.index import LONGEST_RETRY, RETRY, Index, Interruption, Statistics, open_index
from gateway.index.writer import LeftOut
from gateway.log.base import Log
from gateway.log.topics import Topics
from gateway.model import UsageError
from gateway.settings import IndexSettings
from gateway.telemetry.logs import traceback_of
from gateway.telemetry.metrics import Metrics

MEASURE_INTERVAL = 1.0
"""Seconds between looks at how far the index is."""
COUNT_EVERY = 5
"""One in this many looks also asks the file how much it has."""
CLOSE_TIMEOUT = 5.0
"""Seconds for closing the file, which the process's drain leaves for it."""
BUG = "bug"
WHOLE = ""
"""The topic of what is told before any topic is known."""


class IndexKeeper:
    """The index of one process: `open` it, then `run` until cancelled. It is read from the process's own log.

    `is_needed`: the process is there for nothing else. `redactions` are what the active rules hide, by source,
    `event_topics` those to which their sources append.
    """

    def __init__(
        self,
        settings: IndexSettings,
        *,
        log: Log,
        topics: Topics,
        metrics: Metrics,
        logger: FilteringBoundLogger,
        is_needed: bool,
        redactions: Callable[[], Redactions],
        event_topics: Callable[[], Collection[str]],
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._settings = settings
        self._log = log
        self._topics = topics
        self._metrics = metrics
        self._logger = logger
        self._is_needed = is_needed
        self._redactions = redactions
        self._event_topics = event_topics
        self._sleep = sleep
        self._stack = AsyncExitStack()
        self._closing: asyncio.Task[None] | None = None
        self._index: Index | None = None
        self._problem = ""
        self._held_up_since: float | None = None
        self._found: Statistics | None = None
        self._room: int | None = None
        self._began = log.now()
        self._counted: Counter[Interruption] = Counter()
        self._left_out: Counter[LeftOut] = Counter()
        for reason in (*Interruption, BUG):
            metrics.index_interruptions.labels(reason)
        for why in LeftOut:
            metrics.index_left_out.labels(why)

    @property
    def index(self) -> Index | None:
        """The index, None while its file isn't open."""
        return self._index

    @property
    def problem(self) -> str:
        """What holds it up at the moment, "" if nothing does."""
        return self._problem or ("" if self._index is None else self._index.problem)

    def notes(self) -> Sequence[str]:
        """Return what holds the index up, for `/readyz`: nothing that makes the process less ready."""
        return [f"index: {self.problem}"] if self.problem else []

    def status(self, now: float) -> Mapping[str, Any]:
        """Return how the index is doing, for `/status`, at a time of the log's clock.

        The names are an interface: commands of another version read them. What its file has is as of some seconds ago,
        and None before it was first asked; `room` is what its disk has left, None if that can't be known.
        """
        found, oldest = self._found, None if self._found is None else self._found.oldest
        return {
            "file": str(self._settings.file),
            "days": self._settings.days,
            "max_bytes": self._settings.bytes,
            "held_up": {"since": self._held_up_since, "reason": self.problem} if self.problem else None,
            "behind": self._furthest_behind(now),
            "events": None if found is None else found.events,
            "bytes": None if found is None else found.bytes,
            "oldest": oldest,
            "oldest_age": None if oldest is None else max(0.0, now - oldest),
            "room": self._room,
        }

    def _furthest_behind(self, now: float) -> Mapping[str, Any] | None:
        progress = {} if self._index is None else self._index.progress()
        if not progress:
            return None
        topic, each = min(progress.items(), key=lambda item: item[1].complete_to or self._began)
        unreadable = {} if self._found is None else self._found.unreadable
        since = each.complete_to or self._began
        return {
            "topic": topic,
            "since": since,
            "seconds": max(0.0, now - since),
            "records": each.records,
            "reason": next((why for where, why in sorted(unreadable.items()) if where.topic == topic), ""),
        }

    async def open(self) -> None:
        """Open the file, or leave that to `run` while that can't be done. Raises UsageError if the index is needed."""
        settings = self._settings
        try:
            self._index = await self._stack.enter_async_context(
                open_index(
                    settings.file,
                    self._log,
                    self._topics,
                    days=settings.days,
                    max_bytes=settings.bytes,
                    redactions=self._redactions,
                    event_topics=self._event_topics,
                    sleep=self._sleep,
                )
            )
            self._problem = ""
            self._counted.clear()
            self._left_out.clear()
            at = self._index.complete_to
            complete_to = datetime.fromtimestamp(at, UTC).isoformat(timespec="seconds") if at else None
            self._logger.info("index_opened", path=str(settings.file), complete_to=complete_to)
        except IndexUnavailableError as error:
            self._failed(Interruption.FILE, str(error))
        except UsageError as error:
            if self._is_needed:
                raise
            self._failed(Interruption.FILE, str(error))

    async def run(self) -> None:
        """Keep the index until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            measuring = tasks.create_task(self._measure(), name="index-measure")
            try:
                await self._follow(tasks)
            finally:
                measuring.cancel()
                self._problem = "this process is stopping"
                await self._close(tasks)
                if self._closing is not None:
                    self._closing.cancel()
                self._logger.info("index_stopped", path=str(self._settings.file))

    async def _follow(self, tasks: asyncio.TaskGroup) -> None:
        clock = asyncio.get_running_loop().time
        wait = RETRY
        while True:
            began = clock()
            try:
                if self._index is None:
                    await self._sleep(wait)
                    wait = min(2 * wait, LONGEST_RETRY)
                    if self._closing is not None:  # till then, it has the file's lock
                        await self._closing
                    await self.open()
                else:
                    await self._index.run()
            except UsageError as error:  # somebody has taken the file meanwhile
                self._failed(Interruption.FILE, str(error))
            except Exception as error:  # noqa: BLE001 - whatever it is, deliveries go on beside it
                wait = RETRY if clock() > began + LONGEST_RETRY else wait
                self._metrics.index_interruptions.labels(BUG).inc()
                self._problem = f"{type(error).__name__}, a bug of the gateway"
                self._say_bug(error)
                await self._close(tasks)

    def _say_bug(self, error: Exception) -> None:
        self._logger.error("index_failed", path=str(self._settings.file), exception=traceback_of(error))

    def _failed(self, reason: Interruption, problem: str) -> None:
        """Count a failure to open the file, and say it once."""
        self._metrics.index_interruptions.labels(reason).inc()
        if problem != self._problem:
            self._logger.warning("index_interrupted", path=str(self._settings.file), error=problem)
        self._problem = problem

    async def _close(self, tasks: asyncio.TaskGroup) -> None:
        """Close the file, and wait for it for some seconds; if it takes longer (it is being read), it goes on."""
        self._index = None
        stack, self._stack = self._stack, AsyncExitStack()
        before = self._closing

        async def close() -> None:
            if before is not None:
                await before
            try:
                await stack.aclose()
            except IndexUnavailableError:  # what isn't committed is read again
                pass
            except Exception as error:  # noqa: BLE001 - as in `_follow`
                self._say_bug(error)

        self._closing = tasks.create_task(close(), name="index-close")
        await asyncio.wait([self._closing], timeout=CLOSE_TIMEOUT)

    # Metrics.

    async def _measure(self) -> None:
        look, is_failing = 0, False
        while True:
            try:
                self._measure_progress()
                if look % COUNT_EVERY == 0:
                    await self._measure_file()
            except Exception as error:  # noqa: BLE001 - as in `_follow`; the index itself goes on
                self._metrics.index_interruptions.labels(BUG).inc()
                if not is_failing:
                    self._say_bug(error)
                is_failing = True
            else:
                is_failing = False
            look += 1
            await self._sleep(MEASURE_INTERVAL)

    def _measure_progress(self) -> None:
        """Tell how far each topic is; of one of which nothing was read yet, since when it could have been."""
        now = self._log.now()
        self._held_up_since = (self._held_up_since or now) if self.problem else None
        progress = {} if self._index is None else self._index.progress()
        behind = {topic: now - (each.complete_to or self._began) for topic, each in progress.items()}
        if not behind:
            behind = {WHOLE: now - self._began}
        for topic, seconds in behind.items():
            self._metrics.index_behind.labels(topic).set(max(0.0, seconds))
        for topic, each in progress.items():
            self._metrics.index_lag.labels(topic).set(each.records)
        for family, kept in ((self._metrics.index_behind, behind), (self._metrics.index_lag, progress)):
            for labels in [labels for labels in family if labels[0] not in kept]:
                del family[labels]

    async def _measure_file(self) -> None:
        if self._index is None:
            return
        try:
            found = await self._index.statistics()
        except (IndexUnavailableError, RuntimeError):  # which the rounds say; or its threads have just ended
            return
        self._found, self._room = found, await asyncio.to_thread(_room, self._settings.file.parent)
        metrics = self._metrics
        metrics.index_events.labels().set(found.events)
        metrics.index_bytes.labels().set(found.bytes)
        metrics.index_oldest_event.labels().set(found.oldest or 0.0)
        for reason, count in found.interruptions.items():
            metrics.index_interruptions.labels(reason).inc(max(0, count - self._counted[reason]))
        self._counted = Counter(found.interruptions)
        for why, count in found.left_out.items():
            before = self._left_out[why]  # a file that is made anew begins again
            metrics.index_left_out.labels(why).inc(count - before if count >= before else count)
        self._left_out = Counter(found.left_out)


def _room(folder: Path) -> int | None:
    """Return how many bytes a folder's disk has left; None if that can't be asked."""
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None
