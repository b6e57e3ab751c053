"""Traffic by time, as the index counts it: of everything, of a source, route or destination, and beside lists."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from gateway.access.principal import Principal
from gateway.api import shapes
from gateway.api.backend import Backend, must_be_available
from gateway.api.events import currency_of
from gateway.api.json_shapes import time_of
from gateway.api.problems import ApiError
from gateway.api.traffic_readings import PATIENCE, Limits, limits_of
from gateway.api.traffic_shapes import AttemptTraffic, DeliveryTraffic, Share, Traffic, TrafficStep
from gateway.api.visibility import sees_delivery, sees_source
from gateway.index import traffic as counted
from gateway.index.index import Index
from gateway.index.statuses import Status
from gateway.index.tallies import Traffic as CountedTraffic
from gateway.index.traffic_schema import DAY, HOUR, KEPT, MINUTES
from gateway.ops.output import rfc3339
from gateway.rules.rules import Rules
from gateway.turns import give_way

StepName = Literal["5m", "1h", "1d"]
STEPS: Mapping[StepName, int] = {"5m": MINUTES, "1h": HOUR, "1d": DAY}
LONG = 2 * PATIENCE
"""Seconds, more than counts are waited for, which says so by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficAnswer:
    """Traffic, and how current the index is that has counted it."""

    traffic: Traffic
    index: shapes.Currency


async def get_traffic(
    backend: Backend,
    principal: Principal,
    *,
    source: str | None = None,
    route: str | None = None,
    destination: str | None = None,
    since: str | None = None,
    step: StepName | None = None,
) -> TrafficAnswer:
    """Return how much traffic there was: in all, or of a source, by a route, to a destination."""
    index, rules = backend.open_index(), backend.rules()
    until = _until(backend, index)
    begin = until - DAY if since is None else (time_of(since) or 0.0)
    query = counted.TrafficQuery(
        step=_step(until - begin) if step is None else STEPS[step],
        since=begin,
        until=until,
        source=source,
        route=route,
        destination=destination,
    )
    async with must_be_available(LONG):
        found, currency = await backend.traffic.get(
            index,
            query,
            currency_of(index),
            _limits(principal, rules),
            _made(query, has_events=not (route or destination)),
        )
    return TrafficAnswer(traffic=found[""], index=currency)


async def traffic_of(
    backend: Backend, principal: Principal, by: counted.By, names: Sequence[str]
) -> Mapping[str, Traffic]:
    """Return the traffic of the last day of sources, routes or destinations, by the hour; nothing without an index."""
    index = backend.index()
    if index is None or not names:
        return {}
    until = _until(backend, index)
    query = counted.TrafficQuery(step=HOUR, since=until - DAY, until=until, by=by, names=names)
    try:
        async with must_be_available(LONG):
            limits = _limits(principal, backend.rules())
            made = _made(query, has_events=by == "source")
            found, _ = await backend.traffic.get(index, query, currency_of(index), limits, made)
    except ApiError:
        return {}
    return found


def _until(backend: Backend, index: Index) -> float:
    """Return to when counts are complete: now, unless the index is behind."""
    now = backend.log.now()
    return min(now, index.complete_to or now)


def _step(seconds: float) -> int:
    """Return the shortest step that is kept for so long."""
    return next((step for step in (MINUTES, HOUR) if seconds <= KEPT[step]), DAY)


def _limits(principal: Principal, rules: Rules) -> Limits:
    """Return which lanes' counts somebody sees."""

    def sees(lane: counted.Lane) -> bool:
        return sees_delivery(principal, rules, *lane) if lane.route else sees_source(principal, rules, lane.source)

    return limits_of(principal, rules, sees)


def _made(
    query: counted.TrafficQuery, *, has_events: bool
) -> Callable[[Mapping[str, CountedTraffic]], Mapping[str, Traffic]]:
    """Return what makes answers of counts: two hundred names in 25 steps take some 50 ms, so not on the event loop."""

    def made(found: Mapping[str, CountedTraffic]) -> Mapping[str, Traffic]:
        return {name: _shown(each, query, has_events=has_events) for name, each in found.items()}

    return made


def _shown(traffic: CountedTraffic, query: counted.TrafficQuery, *, has_events: bool) -> Traffic:
    give_way()
    total = traffic.total
    return Traffic(
        since=rfc3339(traffic.since),
        until=rfc3339(query.until),
        step_seconds=query.step,
        attempts_recorded="all" if traffic.has_successes else "failures",
        received=total.events if has_events else None,
        bytes=total.bytes if has_events else None,
        duplicates=total.duplicates if has_events else None,
        deliveries=DeliveryTraffic(
            begun=total.begun,
            delivered=total.delivered,
            done=total.having(Status.DONE),
            dropped=total.having(Status.DROPPED),
            waiting=total.waiting,
            unknown=total.having(Status.UNKNOWN),
            died=sum(total.died.values()),
            dead=total.dead,
            reasons=_shares(total.died),
        ),
        attempts=AttemptTraffic(
            made=total.attempted,
            failed=total.failed,
            retries=total.retried,
            results=_shares(total.results),
            p50_seconds=total.quantile(0.5),
            p95_seconds=total.quantile(0.95),
        ),
        steps=tuple(
            [
                TrafficStep(
                    at=rfc3339(start),
                    received=tally.events if has_events else None,
                    deliveries=tally.begun,
                    delivered=tally.delivered,
                    died=sum(tally.died.values()),
                    attempts=tally.attempted,
                    failed=tally.failed,
                )
                for start, tally in traffic.steps
            ]
        ),
    )


def _shares(counts: Mapping[str, int]) -> tuple[Share, ...]:
    """Return counts by name, the most first."""
    return tuple([Share(name=name, count=count) for name, count in sorted(counts.items(), key=lambda each: -each[1])])
