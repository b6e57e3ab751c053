"""The gauges of an ordered route and destination."""

from gateway.telemetry.metrics import Metrics


class Gauges:
    """Sets them, and deletes them once the rules no longer have the route."""

    def __init__(self, metrics: Metrics, route: str, destination: str) -> None:
        self._metrics = metrics
        self._where = (route, destination)

    def set(self, *, blocked: int, halted: int, lag: float, oldest_pending: float) -> None:
        """Set all of them: keys that wait for a retry or a kick, those halted, records, and seconds."""
        metrics, where = self._metrics, self._where
        metrics.ordered_blocked_keys.labels(*where).set(blocked)
        metrics.ordered_halted_keys.labels(*where).set(halted)
        metrics.ordered_lag.labels(*where).set(lag)
        metrics.ordered_oldest_pending.labels(*where).set(oldest_pending)

    def clear(self, *, are_deleted: bool) -> None:
        """Set those to 0 that were set, or delete them."""
        metrics, where = self._metrics, self._where
        for gauge in (
            metrics.ordered_blocked_keys,
            metrics.ordered_halted_keys,
            metrics.ordered_lag,
            metrics.ordered_oldest_pending,
        ):
            if where in gauge:
                gauge.labels(*where).set(0)
                if are_deleted:
                    del gauge[where]
