"""Attempts: the request of a delivery, made, measured, traced and recorded. `dispatcher` acts on the result."""

import asyncio
from dataclasses import replace

from gateway.client.request import Outbound, compose
from gateway.engine.delivery.attempt_log import AttemptLog, CompletedAttempt, decision_of
from gateway.engine.delivery.retry_decision import Verdict
from gateway.engine.partition_tracker import AttemptScope, PendingDelivery
from gateway.engine.services import Client, Services
from gateway.model import Attempt, Delivered, Event, Result
from gateway.rules.request_templates import Method
from gateway.rules.rules import Destination, Route, Rules
from gateway.telemetry.metrics import Histogram


class Attempts:
    """Makes attempts with the client. Their start times are by the log's clock."""

    def __init__(self, services: Services, client: Client, records: AttemptLog) -> None:
        self._log = services.log
        self._rules = services.rules
        self._records = records
        self._metrics = services.metrics
        self._traces = services.traces
        self._client = client

    async def make(
        self, pending: PendingDelivery, rules: Rules, route: Route, destination: Destination, now: float
    ) -> CompletedAttempt:
        """Make a delivery's next attempt, which `pending.scope` can cut short meanwhile.

        The caller, which decides what follows, has to `record` it.
        Raises ExpressionError if the request can't be rendered.
        """
        delivery = pending.delivery
        method = Method.POST if route.request is None else route.request.method
        span = None if self._traces is None else self._traces.attempt(delivery, method, destination.url)
        attempt: Attempt | None = None
        try:
            trace = None if span is None else span.context
            seen = self._records.observation()
            outbound = compose(
                delivery, destination, route.request, now=now, split=route.split, trace=trace, observation=seen
            )
            attempt = await self._attempt(pending, outbound, timeout=destination.timeout, now=now)
        finally:
            pending.scope = None
            if span is not None:
                span.end_attempt(attempt)
        self._metrics.attempts.labels(destination.name, attempt.result).inc()
        observe(self._metrics.attempt_duration.labels(destination.name), attempt.seconds, delivery.event)
        return CompletedAttempt(attempt, now, rules, route, destination, outbound)

    def record(self, pending: PendingDelivery, completed: CompletedAttempt, verdict: Verdict | None) -> None:
        """Record an attempt, if it is to be, with what follows; a verdict of None is one that a bug has prevented."""
        if not self._records.wants(completed.attempt):
            return
        decision = None
        tracker = pending.record.tracker
        is_ours = isinstance(verdict, Delivered) or not tracker.is_reassigned  # else its owner decides what follows
        if verdict is not None and is_ours:
            route = self._rules().routes.get(pending.delivery.route)
            halts = tracker.member.keeps_order and (route is None or route.on_exhausted == "halt")
            decision = decision_of(verdict, halts=halts)
        self._records.record(pending.delivery, completed, decision)

    async def _attempt(self, pending: PendingDelivery, outbound: Outbound, *, timeout: float, now: float) -> Attempt:
        """Make an attempt. Its start time is by the log's clock, whatever the client's is."""
        number = pending.delivery.next_number
        scope = pending.scope = AttemptScope()
        loop = asyncio.get_running_loop()
        began = loop.time()  # the log's clock may be corrected meanwhile
        try:
            attempt = await self._client.attempt(outbound, timeout=timeout, number=number)
        except asyncio.CancelledError:
            if not scope.was_cut_short():
                raise
            return Attempt(
                number=number,
                at=now,
                seconds=loop.time() - began,
                result=Result.TIMEOUT,
                detail="cut short: the partition's window is full",
            )
        finally:
            scope.close()
        return attempt if attempt.result is Result.SUCCESS else replace(attempt, at=now)  # a success isn't stored


def observe(histogram: Histogram, seconds: float, event: Event) -> None:
    """Count a duration; the event's trace, if it is recorded, is its exemplar."""
    trace_id = None if event.trace is None else event.trace.recorded_id
    if trace_id is None:
        histogram.observe(seconds)
    else:
        histogram.observe_traced(seconds, trace_id)
