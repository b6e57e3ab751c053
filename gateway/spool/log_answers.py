"""Since when the log answers, as far as a mover has to know."""

import asyncio
from collections.abc import Awaitable, Callable

from structlog.typing import FilteringBoundLogger

from gateway.log.base import Log
from gateway.model import LogUnavailableError

PING_INTERVAL = 0.5
SETTLE = 4.0
"""Seconds for which the log has to answer before it is asked what it has: what it received before comes first."""


class LogAnswers:
    """Asks the log while something waits for it. `look` is called before, with the time by the event loop's clock."""

    def __init__(
        self,
        log: Log,
        *,
        is_needed: Callable[[], bool],
        look: Callable[[float], Awaitable[None]],
        logger: FilteringBoundLogger,
    ) -> None:
        self._log = log
        self._is_needed = is_needed
        self._look = look
        self._logger = logger
        self._loop = asyncio.get_running_loop()
        self._since: float | None = None

    @property
    def is_settled(self) -> bool:
        """Whether the log can be asked what it has."""
        return self._since is not None and self._loop.time() - self._since >= SETTLE

    async def watch(self) -> None:
        """Ask until cancelled."""
        while True:
            began = self._loop.time()
            if not self._is_needed():
                self._since = None
            else:
                try:
                    await self._look(began)
                    await self._log.ping()
                except Exception as error:
                    if not isinstance(error, LogUnavailableError):
                        self._logger.exception("spool_move_failed", topic=None, partition=None)
                    self._since = None
                else:
                    if self._since is None:
                        self._since = began
            await asyncio.sleep(PING_INTERVAL)
