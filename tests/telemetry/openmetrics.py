"""Parse metrics pages as OpenMetrics, with prometheus_client's strict parser."""

from collections.abc import Iterator

from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families


def families_of(page: str) -> Iterator[Metric]:
    """Read OpenMetrics as strictly as its specification has it. Raises ValueError."""
    found: Iterator[Metric] = text_string_to_metric_families(page)  # type: ignore[no-untyped-call]
    return found
