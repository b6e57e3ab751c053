"""Probes the log, so that a mover knows since when it answers."""

import asyncio
from collections.abc import Awaitable, Callable

from structlog.typing import FilteringBoundLogger

from gateway.log.base import Log
from gateway.model import LogUnavailableError

PING_INTERVAL = 0.5
STABLE_AFTER = 4.0
"""Seconds for which the log has to answer before it is searched: by then, it has stored what it received earlier."""


class LogProbe:
    """Pings the log while `is_needed`. Before each ping, `before_ping` gets the time by the event loop's clock."""

    def __init__(
        self,
        log: Log,
        *,
        is_needed: Callable[[], bool],
        before_ping: Callable[[float], Awaitable[None]],
        logger: FilteringBoundLogger,
    ) -> None:
        self._log = log
        self._is_needed = is_needed
        self._before_ping = before_ping
        self._logger = logger
        self._loop = asyncio.get_running_loop()
        self._since: float | None = None

    @property
    def is_stable(self) -> bool:
        """Whether the log has answered for long enough to be searched."""
        return self._since is not None and self._loop.time() - self._since >= STABLE_AFTER

    async def watch(self) -> None:
        """Ping until cancelled."""
        while True:
            began = self._loop.time()
            if not self._is_needed():
                self._since = None
            else:
                try:
                    await self._before_ping(began)
                    await self._log.ping()
                except Exception as error:
                    if not isinstance(error, LogUnavailableError):
                        self._logger.exception("spool_move_failed", topic=None, partition=None)
                    self._since = None
                else:
                    if self._since is None:
                        self._since = began
            await asyncio.sleep(PING_INTERVAL)
