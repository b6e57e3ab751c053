"""The holds of destinations, which are logged as they begin and end; and the gauges of each destination."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from gateway.engine.delivery.queues import Queues
from gateway.engine.services import Services
from gateway.model import SpillReason

LOG_HOLDS_FROM = 10.0
"""Minimum seconds of a hold that is logged: a destination that often asks for short pauses would fill the log."""
GAUGES_PER_TURN = 100
_SPILL_REASONS = {"retry_after": SpillReason.THROTTLED, "breaker_open": SpillReason.BREAKER_OPEN}


@dataclass(slots=True, kw_only=True)
class Hold:
    """Why a destination is sent nothing, since and until when, and whether that was logged.

    `last_failure` is the result of the attempt that opened its breaker, or kept it open; "" if it isn't the breaker.
    Once a probe is due, `until` is when a delivery that comes now would be retried, not an end of the hold.
    `untried_since` is the end of the last attempt if only a delivery is missing for that probe: none waits in this
    process.
    """

    reason: str
    last_failure: str = ""
    since: float
    until: float
    is_probe_due: bool = False
    untried_since: float | None = None
    is_logged: bool = False


class Holds:
    """The holds of all destinations, as far as this process knows."""

    def __init__(self, services: Services, queues: Queues) -> None:
        self._services = services
        self._queues = queues
        self._holds: dict[str, Hold] = {}

    @property
    def active(self) -> Mapping[str, Hold]:
        """The holds in force, by destination."""
        return self._holds

    def spill_reason(self, destination: str) -> str:
        """Return why deliveries to a destination aren't sent now; "" if they are."""
        hold = self._holds.get(destination)
        return "" if hold is None else _SPILL_REASONS[hold.reason].value

    def update(self) -> None:
        """Update the holds, and log when one begins and ends."""
        logger, now = self._services.logger, self._services.log.now()
        untried = self._untried(now)
        for name, lane in self._queues.lanes.items():
            current, known = lane.current_hold(now), self._holds.get(name)
            if known is not None and (current is None or current[0] != known.reason):
                del self._holds[name]
                if known.is_logged:
                    logger.info(
                        "destination_released", destination=name, why=known.reason, seconds=round(now - known.since, 1)
                    )
                known = None
            if current is None:
                continue
            if known is None:
                known = self._holds[name] = Hold(reason=current[0], since=now, until=current[1])
            known.until = current[1]
            known.is_probe_due = known.reason == "breaker_open" and lane.is_probe_due(now)
            known.untried_since = untried.get(name)
            known.last_failure = lane.failed_by if known.reason == "breaker_open" else ""
            if not known.is_logged and max(known.until, now) - known.since >= LOG_HOLDS_FROM:
                known.is_logged = True
                after = {"after": known.last_failure} if known.last_failure else {}
                seconds = round(known.until - now, 1)
                logger.warning("destination_held", destination=name, why=known.reason, **after, seconds=seconds)

    def _untried(self, now: float) -> Mapping[str, float]:
        """Return the destinations with a due probe and no waiting delivery, each with the end of its last attempt."""
        found = {name: at for name, lane in self._queues.lanes.items() if (at := lane.untried_since(now)) is not None}
        soon = self._queues.waiting() if found else Counter[str]()
        return {name: at for name, at in found.items() if not soon[name]}

    async def set_gauges(self) -> None:
        """Set the gauges of each destination, and forget the lanes of those that the rules no longer name."""
        metrics, control, rules = self._services.metrics, self._services.control, self._services.rules
        lanes = self._queues.lanes
        destinations = rules().destinations
        soon = self._queues.waiting()
        for count, name in enumerate(destinations, 1):
            if count % GAUGES_PER_TURN == 0:
                await self._services.sleep(0)  # thousands of destinations would block the loop for tens of milliseconds
                if rules().destinations is not destinations:
                    return  # or series of removed names would come back
            lane = lanes.get(name)
            metrics.deliveries_in_flight.labels(name).set(lane.in_flight if lane else 0)
            metrics.deliveries_waiting.labels(name).set((lane.waiting if lane else 0) + soon[name])
            metrics.breaker_open.labels(name).set(lane is not None and lane.breaker.is_open)
            metrics.destination_paused.labels(name).set(control.paused_by("", name) is not None)
            hold = self._holds.get(name)
            lasts = hold.until - hold.since if hold is not None and hold.reason == "retry_after" else 0.0
            metrics.destination_held.labels(name).set(lasts)
        routes = rules().routes
        for count, name in enumerate(routes, 1):
            if count % (10 * GAUGES_PER_TURN) == 0:
                await self._services.sleep(0)
                if rules().routes is not routes:
                    return
            metrics.route_paused.labels(name).set(control.paused_by(name, "") is not None)
        for name, lane in list(lanes.items()):
            if name not in destinations and not lane.waiting and not lane.in_flight:
                self._queues.forget(name)
                self._holds.pop(name, None)
