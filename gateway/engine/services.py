"""What a process provides to the parts of its engine."""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from structlog.typing import FilteringBoundLogger

from gateway.client.request import Outbound
from gateway.engine.control.append import append_control_record
from gateway.engine.control.records import ControlRecord
from gateway.engine.control.state import Control
from gateway.log.base import Log
from gateway.log.topics import Topics
from gateway.model import Attempt, LogUnavailableError
from gateway.rules.rules import Rules
from gateway.telemetry.metrics import Metrics

if TYPE_CHECKING:  # an extra
    from gateway.telemetry.traces import Traces


@dataclass(frozen=True, slots=True, kw_only=True)
class Services:
    """What a process provides to the parts of its engine."""

    log: Log
    topics: Topics
    rules: Callable[[], Rules]
    control: Control
    metrics: Metrics
    logger: FilteringBoundLogger
    sleep: Callable[[float], Awaitable[None]]
    traces: "Traces | None" = None

    async def publish(self, command: ControlRecord) -> None:
        """Append a control record; while the log is unavailable, do without it."""
        with suppress(LogUnavailableError):
            await append_control_record(self.log, self.topics, command)


class Client(Protocol):
    """Makes one attempt; never raises because of a destination."""

    async def attempt(self, outbound: Outbound, *, timeout: float, number: int) -> Attempt: ...
