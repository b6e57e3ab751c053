"""The gauges of an ordered route and destination."""

from collections.abc import Collection

from gateway.engine.partition_tracker import PendingDelivery, Stage
from gateway.telemetry.metrics import Metrics


class Gauges:
    """Sets them, and deletes them once the rules no longer have the route."""

    def __init__(self, metrics: Metrics, route: str, destination: str) -> None:
        self._metrics = metrics
        self._where = (route, destination)

    def set(
        self, failed_heads: Collection[PendingDelivery], *, quiet: int | None, lag: float, oldest_pending: float
    ) -> None:
        """Set all of them: keys that wait for a retry or a kick, those that are quiet, records, and seconds.

        `quiet` is None for a route that isn't debounced.
        """
        metrics, where = self._metrics, self._where
        # A head that isn't waiting is being dead-lettered.
        halted = [head for head in failed_heads if head.outcome is not None and head.stage is Stage.WAITING]
        metrics.ordered_blocked_keys.labels(*where).set(len(failed_heads))
        metrics.ordered_halted_keys.labels(*where).set(len(halted))
        if quiet is not None or where in metrics.ordered_quiet_keys:
            metrics.ordered_quiet_keys.labels(*where).set(quiet or 0)
        metrics.ordered_lag.labels(*where).set(lag)
        metrics.ordered_oldest_pending.labels(*where).set(oldest_pending)

    def clear(self, *, are_deleted: bool) -> None:
        """Set those to 0 that were set, or delete them."""
        metrics, where = self._metrics, self._where
        for gauge in (
            metrics.ordered_blocked_keys,
            metrics.ordered_halted_keys,
            metrics.ordered_quiet_keys,
            metrics.ordered_lag,
            metrics.ordered_oldest_pending,
        ):
            if where in gauge:
                gauge.labels(*where).set(0)
                if are_deleted:
                    del gauge[where]
