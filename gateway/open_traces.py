"""Where traces are sent to, if the settings name a collector."""

import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from structlog.typing import FilteringBoundLogger

from gateway.model import DISTRIBUTION, Event, UsageError
from gateway.settings import EmbeddedTarget, Settings
from gateway.telemetry.metrics import Metrics

if TYPE_CHECKING:  # an extra
    from gateway.telemetry.traces import Traces


def open_traces(
    settings: Settings, type_of: Callable[[Event], str], version: str, metrics: Metrics, logger: FilteringBoundLogger
) -> "Traces | None":
    """Return what sends traces; None without a collector. Raises UsageError without the extra.

    `type_of` returns an event's type as people may see it.
    """
    if settings.traces is None:
        return None
    try:
        from gateway.telemetry.traces import Traces  # noqa: PLC0415 - an extra, and half a second
    except ImportError as error:
        message = f"expected the extra: pip install '{DISTRIBUTION}[otel]'"
        raise UsageError(f"--traces: {message}, got no module {error.name}") from error
    traces = Traces(
        settings.traces,
        ratio=settings.traces_ratio,
        version=version,
        instance=f"{socket.gethostname()}:{settings.instance}",
        system="gateway" if isinstance(settings.log, EmbeddedTarget) else "kafka",
        metrics=metrics,
        logger=logger,
    )
    traces.type_of = type_of
    return traces
