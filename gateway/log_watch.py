"""Watches the log for a process: whether it takes appends, which partitions don't, and which topics are missing."""

import asyncio
import time
from collections.abc import Callable, Mapping
from contextlib import suppress

from structlog.typing import FilteringBoundLogger

from gateway.engine.unavailable_partitions import Unread, UnreadPartitions, still_unread
from gateway.log.base import Log, Partition
from gateway.log.topics import Topics
from gateway.model import LogLostError, LogUnavailableError, UsageError
from gateway.ops.admin import log_problem
from gateway.required_topics import missing_topics, specs_of
from gateway.rules.rules import Rules
from gateway.telemetry.metrics import Metrics

PING_INTERVAL = 0.5
"""Seconds between checks of the log, and so the maximum delay until its refusals are reported."""
PING_TIMEOUT = 5.0
LOG_INTERVAL = 60.0
"""Seconds between log lines while the log is unavailable."""
POLL_INTERVAL = 1.0
"""Seconds between looks at partitions that refuse appends."""
TOPICS_INTERVAL = 5.0
"""Seconds between checks for missing topics."""


class LogWatch:
    """`problem` is since when (by its clock) the log doesn't respond or refuses appends, and why; None if it is well.

    `refusing` and `missing` are the partitions that take no appends, and those of topics that don't exist. `on_lost` is
    called if the log was moved, replaced or damaged: the process has to stop. `found` are the partitions that can't be
    read or appended to; none as soon as there is a worker, which knows better.
    """

    def __init__(
        self,
        log: Log,
        *,
        topics: Topics,
        rules: Callable[[], Rules],
        metrics: Metrics,
        logger: FilteringBoundLogger,
        on_lost: Callable[[LogLostError], None],
        found: Callable[[], Mapping[Partition, str]],
    ) -> None:
        self._log = log
        self._topics = topics
        self._rules = rules
        self._metrics = metrics
        self._logger = logger
        self._on_lost = on_lost
        self._found = found
        self._unread = UnreadPartitions(metrics, logger)
        self.problem: tuple[float, str] | None = None
        self.refusing: Mapping[Partition, str] = {}
        self.missing: Mapping[Partition, str] = {}

    @property
    def unread(self) -> Mapping[Partition, Unread]:
        """What was found that can't be read or appended to, and since when."""
        return self._unread.partitions

    async def watch_log(self) -> None:
        """Log that the log doesn't respond or refuses appends, at first and every minute, and that it is back."""
        since: float | None = None
        logged_at = 0.0
        while True:
            await asyncio.sleep(PING_INTERVAL)
            problem = await log_problem(self._log, PING_TIMEOUT)
            now = time.monotonic()
            self._metrics.log_up.set(0 if problem else 1)
            if isinstance(problem, LogLostError):
                self._logger.error("log_lost", error=str(problem))
                self._on_lost(problem)
                return
            began = self._log.now() if self.problem is None else self.problem[0]
            self.problem = None if problem is None else (began, str(problem))
            if problem is None:
                if since is not None:
                    self._logger.info("log_available", seconds=round(now - since, 1))
                since = None
            elif since is None or now >= logged_at + LOG_INTERVAL:
                since = now if since is None else since
                logged_at = now
                self._logger.warning("log_unavailable", error=str(problem))

    async def watch_partitions(self) -> None:
        """Watch which partitions refuse appends while others accept them."""
        while True:
            await asyncio.sleep(POLL_INTERVAL)
            with suppress(LogUnavailableError):
                refusing = await self._log.refusing()
                # What attempts aren't recorded for has a metric and an alert of its own, and wakes nobody.
                self.refusing = {each: why for each, why in refusing.items() if each.topic != self._topics.attempts}
            now = self._log.now()
            self._unread.update(still_unread(self._unread.partitions, self._found(), now), now)

    async def watch_topics(self) -> None:
        """See which topics are missing that the rules need, also those that nobody reads or appends to just now."""
        while True:
            with suppress(LogUnavailableError, UsageError):
                specs = specs_of(self._rules(), self._topics)
                self.missing = await missing_topics(self._log, [spec for spec in specs if not spec.is_best_effort])
            await asyncio.sleep(TOPICS_INTERVAL)
