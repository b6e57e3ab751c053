"""Which destinations are sent nothing for a while, and how each stands: told in lines and gauges."""

from collections.abc import Mapping
from dataclasses import dataclass

from gateway.engine.delivery.schedule import Schedule
from gateway.engine.services import Services

HOLD_TOLD = 10.0
"""Seconds from which on a hold has a line: a destination that asks for a moment now and then would fill the log."""
GAUGES_AT_ONCE = 100


@dataclass(slots=True, kw_only=True)
class Hold:
    """Why a destination is sent nothing, since and until when, and whether that has been told.

    `after` is what the last attempt got that has opened its breaker, or kept it open; "" where it is no breaker.
    """

    why: str
    after: str = ""
    since: float
    until: float
    is_told: bool = False


class Holds:
    """What keeps which destinations from being sent anything, as this process has learned."""

    def __init__(self, services: Services, schedule: Schedule) -> None:
        self._services = services
        self._schedule = schedule
        self._holds: dict[str, Hold] = {}

    @property
    def known(self) -> Mapping[str, Hold]:
        """The holds that there are, by destination."""
        return self._holds

    def update(self) -> None:
        """See which destinations are sent nothing for a while, and tell when that begins and ends."""
        logger, now = self._services.logger, self._services.log.now()
        for name, lane in self._schedule.lanes.items():
            held, known = lane.held(now), self._holds.get(name)
            if known is not None and (held is None or held[0] != known.why):
                del self._holds[name]
                if known.is_told:
                    logger.info(
                        "destination_released", destination=name, why=known.why, seconds=round(now - known.since, 1)
                    )
                known = None
            if held is None:
                continue
            if known is None:
                known = self._holds[name] = Hold(why=held[0], since=now, until=held[1])
            known.until = held[1]
            known.after = lane.failed_by if known.why == "breaker_open" else ""
            if not known.is_told and max(known.until, now) - known.since >= HOLD_TOLD:
                known.is_told = True
                after = {"after": known.after} if known.after else {}
                seconds = round(known.until - now, 1)
                logger.warning("destination_held", destination=name, why=known.why, **after, seconds=seconds)

    async def set_gauges(self) -> None:
        """Tell of each destination how it stands, and forget the lanes of those that are gone."""
        metrics, control, rules = self._services.metrics, self._services.control, self._services.rules
        lanes = self._schedule.lanes
        destinations = rules().destinations
        soon = self._schedule.waiting()
        for count, name in enumerate(destinations, 1):
            if count % GAUGES_AT_ONCE == 0:
                await self._services.sleep(0)  # thousands of destinations would take the loop for tens of milliseconds
                if rules().destinations is not destinations:
                    return  # or series of names that are gone would come back
            lane = lanes.get(name)
            metrics.deliveries_in_flight.labels(name).set(lane.in_flight if lane else 0)
            metrics.deliveries_waiting.labels(name).set((lane.waiting if lane else 0) + soon[name])
            metrics.breaker_open.labels(name).set(lane is not None and lane.breaker.is_open)
            metrics.destination_paused.labels(name).set(control.paused_by("", name) is not None)
            hold = self._holds.get(name)
            lasts = hold.until - hold.since if hold is not None and hold.why == "retry_after" else 0.0
            metrics.destination_held.labels(name).set(lasts)
        routes = rules().routes
        for count, name in enumerate(routes, 1):
            if count % (10 * GAUGES_AT_ONCE) == 0:
                await self._services.sleep(0)
                if rules().routes is not routes:
                    return
            metrics.route_paused.labels(name).set(control.paused_by(name, "") is not None)
        for name, lane in list(lanes.items()):
            if name not in destinations and not lane.waiting and not lane.in_flight:
                self._schedule.forget(name)
                self._holds.pop(name, None)
