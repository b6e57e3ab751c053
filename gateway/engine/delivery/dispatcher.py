"""Deliveries: where each goes next, its attempts, and what follows from their results.

                             ┌─ paused ───────────────────▶ parked, acknowledged ──▶ finished
                             ├─ not due, or unknown name ─▶ tier, acknowledged ────▶ finished
    PendingDelivery─dispatch─┤                              ┌─ 2xx ───────▶ finished
                             └─ lane: waiting ─┬─▶ attempt ─┼─ retryable ─▶ tier, acknowledged ─────────▶ finished
                                               │            └─ exhausted ─▶ dead letter, acknowledged ──▶ finished
                                               └─ can't take it ─▶ tier, acknowledged ─▶ finished

This acts on the decisions of `destination_lanes`, `retry_decision`, `tiers` and `request`. A group's member passes
deliveries in, and is notified when one has finished. If it keeps an order, what would go elsewhere waits in memory.
"""

import asyncio
from collections.abc import Callable, Collection, Coroutine, Iterable
from dataclasses import replace
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, assert_never

from gateway.engine import tiers
from gateway.engine.delivery import retry_decision
from gateway.engine.delivery.appends import APPEND_OVERHEAD, Append, Appends
from gateway.engine.delivery.attempt_log import AttemptLog, CompletedAttempt
from gateway.engine.delivery.attempts import Attempts
from gateway.engine.delivery.destination_lanes import Lane, Spill
from gateway.engine.delivery.gone_destinations import GoneDestinations
from gateway.engine.delivery.holds import Holds
from gateway.engine.delivery.outcomes import Outcomes
from gateway.engine.delivery.queues import Queues
from gateway.engine.partition_tracker import PendingDelivery, PendingRecord, Stage, Tracker
from gateway.engine.services import Client, Services
from gateway.engine.successor_writer import SuccessorWriter, key_of
from gateway.log.base import Record
from gateway.log.topics import TIERS
from gateway.model import (
    NO_METADATA,
    Attempt,
    DeadLettered,
    DeadReason,
    Delivered,
    Dropped,
    ExpressionError,
    ItemMissingError,
    RecordMetadata,
    RecordTooLargeError,
    SpillReason,
    Superseded,
    UndecodableRecordError,
)
from gateway.rules.rules import OnGone
from gateway.telemetry.logs import raise_site, traceback_of

if TYPE_CHECKING:  # an extra
    from gateway.telemetry.traces import Traces

MAX_STAY_IN_MEMORY = 5.0
"""Seconds after a record was read during which its deliveries may wait in memory for a retry."""
PAUSE_POLL_INTERVAL = 1.0
"""Seconds between checks whether a paused delivery of an ordered route, which can't be parked, is still paused."""
CUT_SHORT_GRACE = 0.25
"""Minimum duration of an attempt that is cut short: a jump of offsets fills the window however new an attempt is."""
RETRIES_AT_ONCE, RETRIES_TURN = 4, 0.003
"""Retries dispatched, or seconds, before yielding: a new event may wait for several such rounds."""
UNKNOWN_RETRY_DELAY, UNKNOWN_MAX_AGE = 60.0, 3600.0
"""Seconds between looks for a name that the rules lack, and until it is no longer put down to a rolling deployment."""
BREAKER_DEFER_MIN, BREAKER_DEFER_MAX = 5.0, 1200.0
"""Seconds that an open breaker delays a delivery; doubled each time, but at most as long as it has been open."""


class Dispatcher:
    """Every delivery of one process, from `dispatch` to its end or its successor, of which the member is notified."""

    def __init__(self, services: Services, client: Client, records: AttemptLog) -> None:
        self._log = services.log
        self._topics = services.topics
        self._rules = services.rules
        self._attempts = Attempts(services, client, records)
        self._outcomes = Outcomes(services)
        self._control = services.control
        self._metrics = services.metrics
        self._logger = services.logger
        self._sleep = services.sleep
        self._traces = services.traces
        self._successors = SuccessorWriter.of(services)
        self.undecodable = self._successors.undecodable
        self._queues = Queues(services.rules, services.control)
        self.holds = Holds(services, self._queues)
        self._gone = GoneDestinations(services, self._successors, self.spawn)
        self._tasks: asyncio.TaskGroup | None = None
        self._in_flight: set[asyncio.Task[None]] = set()  # attempts and appends
        self._appends = Appends()
        self._is_draining = False

    @property
    def is_draining(self) -> bool:
        """Whether a drain has begun: nothing is started any more."""
        return self._is_draining

    # Entry points.

    def dispatch(self, pending: PendingDelivery, now: float) -> Lane | None:
        """Send a delivery to where it can go now; return its lane if it was queued there."""
        delivery = pending.delivery
        if pending.outcome is not None:
            self.end(pending, pending.outcome)
            return None
        rules = self._rules()
        is_known = delivery.route in rules.routes and delivery.destination in rules.destinations
        if is_known and pending.metadata.unknown_since and not pending.metadata.detail:  # no item was missing
            pending.metadata = replace(pending.metadata, unknown_since=None)
        if is_known and self._control.paused_by(delivery.route, delivery.destination):
            self._park(pending)
            return None
        if delivery.due > now:  # also for a name that the rules lack: if it returns, a retry mustn't come early
            self.defer(pending, delivery.due, now)
            return None
        if not is_known:
            self.defer_unknown(pending)
            return None
        lane = self._queues.lane(delivery.destination)
        spill = lane.offer(pending, now)
        if spill is not None:
            self._spill(spill, now)
            return None
        self._pump(lane, now)
        if lane.waiting:
            self._queues.watch_lane(lane)
        return lane

    def defer_unknown(self, pending: PendingDelivery, missing: str = "") -> None:
        """Defer a delivery of whose names, or of whose item, the rules lack one: others may yet be rolled out."""
        now = self._log.now()
        since = now if pending.metadata.unknown_since is None else pending.metadata.unknown_since
        if now - since > UNKNOWN_MAX_AGE:
            detail = missing or "the rules no longer name it"
            self.end(pending, DeadLettered(reason=DeadReason.ROUTE_REMOVED, detail=detail))
            return
        self._metrics.count_unknown_name(pending.delivery.route, pending.delivery.destination)
        pending.metadata = RecordMetadata(unknown_since=since, spill_reason=SpillReason.UNKNOWN_NAME, detail=missing)
        pending.delivery = replace(pending.delivery, due=now + UNKNOWN_RETRY_DELAY)
        self.defer(pending, pending.delivery.due, now)

    def end(self, pending: PendingDelivery, outcome: DeadLettered | Dropped | Superseded) -> None:
        """End a delivery without success, unless its member halts the key instead."""
        if isinstance(outcome, DeadLettered):
            if not pending.record.tracker.member.try_halt(pending, outcome):
                self._write_successor(pending, self._topics.dead, outcome)
        else:
            self._outcomes.ended(pending, outcome, pending.delivery.next_number - 1, self._log.now())
            self.finish(pending)

    def dead_letter_undecodable(
        self, pending_record: PendingRecord, record: Record, error: UndecodableRecordError
    ) -> None:
        """Dead-letter a record that can't be decoded."""

        def finish() -> None:
            pending_record.unfinished = 0
            pending_record.tracker.member.done(pending_record)

        async def write(append: Append) -> None:
            topic = pending_record.tracker.partition.topic
            predicates = self._appends.ownership_predicates(append, pending_record)
            failed = partial(self._appends.record_failure, append)
            is_stored = await self._successors.dead_letter_undecodable(topic, record, error, *predicates, failed=failed)
            finish()
            self._appends.finish(append, is_stored=is_stored)

        if pending_record.tracker.is_reassigned:
            finish()
            return
        pending_record.unfinished = 1
        size = APPEND_OVERHEAD + pending_record.size // 3
        when_granted = partial(self.dead_letter_undecodable, pending_record, record, error)
        topic = self._topics.dead
        append = self._appends.begin(topic, record.key, size, predecessor=pending_record, when_granted=when_granted)
        if append is not None:
            self.spawn(partial(write, append), "worker-successor")

    def defer(self, pending: PendingDelivery, due: float, now: float) -> None:
        """Delay a delivery until it is due: in a tier, or in memory if that is soon."""
        self._outcomes.record_late(pending, max(due, now))
        tracker = pending.record.tracker
        if tracker.member.keeps_order:
            self.wait_in_memory(pending, due)
            return
        tier = tiers.plan(due, now)
        # Not repeatedly: the record would stay unfinished for as long as its delivery fails.
        is_new = now < pending.record.taken_at + MAX_STAY_IN_MEMORY
        may_wait = is_new and tracker.is_live and not self._is_draining
        if tier is None and may_wait and tracker.member.has_room_for(tracker):
            self.wait_in_memory(pending, due)
        else:
            self._write_successor(pending, self._topics.retry(tier or tiers.SHORTEST))

    def wait_in_memory(self, pending: PendingDelivery, until: float) -> None:
        """Keep a delivery in memory until a time. Its member then resumes it, if the partition is still ours."""
        tracker = pending.record.tracker
        if tracker.is_reassigned:
            self.finish(pending)
            return
        pending.stage = Stage.WAITING
        if tracker.is_live:
            self._queues.wait(pending, until)

    def move_to_tier(self, pending: PendingDelivery) -> None:
        """Write a delivery to a tier, so that its record can be done: its next owner would repeat the others, too."""
        if pending.outcome is not None:
            self.end(pending, pending.outcome)
            return
        now = self._log.now()
        pending.is_moved = True
        self._outcomes.record_late(pending, max(pending.delivery.due, now))
        self._write_successor(pending, self._topics.retry(tiers.plan(pending.delivery.due, now) or tiers.SHORTEST))

    def release_waiting_appends(self, lost: Tracker) -> None:
        """Finish what waits to be appended of a lost partition. Appends in flight detect it themselves."""
        for record in [each for each in lost.records.values() if each.tracker is lost]:
            for predecessor in (record, *record.deliveries):  # itself, if it can't be decoded
                self._appends.grant_waiting(predecessor)

    def withdraw(self, deliveries: Iterable[PendingDelivery]) -> None:
        """Remove deliveries from the queues; those that aren't in one are ignored."""
        self._queues.withdraw(deliveries)

    def cut_short(self, deliveries: Collection[PendingDelivery], now: float) -> None:
        """Have deliveries finish that keep the window from moving: attempts time out, waiting ones move to a tier."""
        waiting = [pending for pending in deliveries if pending.scope is None and pending.stage is Stage.WAITING]
        for pending in deliveries:
            if pending.scope is not None:
                left = pending.stage_began_at + CUT_SHORT_GRACE - now
                pending.scope.cut_short(min(max(0.0, left), CUT_SHORT_GRACE))  # the clock may have been set back
                pending.scope = None  # once
        self.withdraw(waiting)
        for pending in waiting:
            lane = self._queues.lanes.get(pending.delivery.destination)
            due = max(now if lane is None else lane.schedule_return(now), now + TIERS[tiers.SHORTEST])
            due = max(due, pending.delivery.delayed_until)
            self._spill(Spill(pending=pending, reason=SpillReason.WINDOW_FULL, due=due), now)

    # Attempts.

    def set_limits(self, share: float | None = None) -> None:
        """Set the lanes' limits according to the active rules and this worker's share of the fleet."""
        self._queues.set_limits(share)

    def reload(self) -> None:
        """Apply new rules: the lanes' limits, and what waits for a name that they have again is due."""
        self._queues.set_limits()
        self._queues.wake_returned(self._log.now())

    def _pump(self, lane: Lane, now: float) -> None:
        """Start the attempts that a lane allows."""
        if self._queues.is_suspended:
            return
        ticks = asyncio.get_running_loop().time()
        while (pending := lane.take(now, ticks)) is not None:
            self.spawn(partial(self._run_attempts, lane, pending), "worker-attempts")

    async def _run_attempts(self, lane: Lane, pending: PendingDelivery | None) -> None:
        """Make attempts while the lane has one to start, all in one task."""
        now = self._log.now()
        while pending is not None:
            now = await self._attempt(lane, pending, now)
            pending = None if self._queues.is_suspended else lane.take(now, asyncio.get_running_loop().time())

    async def _attempt(self, lane: Lane, pending: PendingDelivery, now: float) -> float:
        """Make one attempt, act on its result, and return the time. An unexpected error dead-letters the delivery."""
        delivery = pending.delivery
        completed: CompletedAttempt | None = None
        try:
            rules = self._rules()
            route, destination = rules.named(delivery.route, delivery.destination)
            if route is None or destination is None:
                self.defer_unknown(pending)
                return now
            if self._control.paused_by(route.name, destination.name):
                self._park(pending)
                return now
            member = pending.record.tracker.member
            is_unsplit = route.split is not None and delivery.part is None  # as former rules made it
            is_fresh = not member.keeps_order or member.is_ownership_fresh(pending)
            if is_unsplit or not is_fresh:
                if not member.keeps_order:
                    self.wait_in_memory(pending, now)
                else:  # a router splits what it reads in a tier
                    self.move_to_tier(pending) if is_fresh else member.resume(pending, now)
                return now
            completed = await self._attempts.make(pending, rules, route, destination, now)
            now = self._log.now()
            verdict = retry_decision.decide(delivery, completed.attempt, route.retry, now=now)
        except ExpressionError as error:
            is_missing, detail = isinstance(error, ItemMissingError), str(error)
            outcome = DeadLettered(reason=DeadReason.EXPRESSION_ERROR, detail=detail)
            self.defer_unknown(pending, detail) if is_missing else self.end(pending, outcome)
            return now
        except Exception as error:  # noqa: BLE001 - the edge of one delivery
            self._logger.error(
                "delivery_bug",
                delivery_id=delivery.id,
                route=delivery.route,
                destination=delivery.destination,
                exception=traceback_of(error),
            )
            if completed is not None:
                self._attempts.record(pending, completed, None)
            detail = f"{type(error).__name__} at {raise_site(error)}"
            self.end(pending, DeadLettered(reason=DeadReason.BUG, detail=detail))
            return self._log.now()
        finally:
            if completed is None:
                lane.cancelled(pending, self._log.now())
            else:
                lane.finished(pending, completed.attempt, now)
        if destination.on_gone is OnGone.PAUSE and completed.attempt.status == HTTPStatus.GONE:
            self._gone.pause(destination)
        self._attempts.record(pending, completed, verdict)
        self._act_on_verdict(pending, completed.attempt, verdict, now)
        return now

    def _act_on_verdict(
        self, pending: PendingDelivery, attempt: Attempt, verdict: retry_decision.Verdict, now: float
    ) -> None:
        """Act on the verdict on an attempt."""
        if isinstance(verdict, Delivered):
            self._outcomes.ended(pending, verdict, attempt.number, now)
            self.finish(pending)
            return
        pending.metadata = NO_METADATA
        pending.is_tried = True
        pending.delivery = replace(pending.delivery, attempts=(*pending.delivery.attempts, attempt))
        match verdict:
            case retry_decision.Retry(due=due):
                self._metrics.retries.labels(pending.delivery.route, attempt.result).inc()
                pending.delivery = replace(pending.delivery, due=due)
                self.defer(pending, due, now)
            case DeadLettered() | Dropped():
                self.end(pending, verdict)
            case _ as never:
                assert_never(never)

    # Ends and successors.

    def _spill(self, spill: Spill, now: float) -> None:
        """Defer a delivery that its lane can't take now. It isn't an attempt, and isn't counted as one."""
        pending, delivery, due = spill.pending, spill.pending.delivery, spill.due
        route = self._rules().routes.get(delivery.route)
        if route is None:  # removed while this waited
            self.defer_unknown(pending)
            return
        keeps_order = pending.record.tracker.member.keeps_order
        lane = self._queues.lanes.get(delivery.destination)
        if spill.reason is SpillReason.BREAKER_OPEN and lane is not None and not lane.may_have_recovered(now):
            down_for = lane.breaker.down_for(now)
            if delivery.attempts and now > delivery.age_began_at + route.retry.max_age and down_for > BREAKER_DEFER_MIN:
                # It was attempted and is too old, and the probes show that the destination is still down.
                self.end(pending, DeadLettered(reason=DeadReason.EXPIRED, detail="the destination's breaker is open"))
                return
            if not keeps_order:  # in memory, checking the breaker costs nothing
                times = pending.metadata.breaker_deferrals
                pending.metadata = RecordMetadata(breaker_deferrals=times + 1)
                doubled = BREAKER_DEFER_MIN * 2.0 ** min(times, 16)
                due = max(due, now + max(BREAKER_DEFER_MIN, min(BREAKER_DEFER_MAX, doubled, down_for)))
        if not keeps_order:
            self._metrics.spills.labels(delivery.destination, spill.reason).inc()
            pending.metadata = replace(pending.metadata, spill_reason=spill.reason)
        pending.delivery = replace(delivery, due=due)
        self.defer(pending, due, now)

    def _park(self, pending: PendingDelivery) -> None:
        name = self._control.paused_by(pending.delivery.route, pending.delivery.destination)
        assert name is not None
        if pending.record.tracker.member.keeps_order:
            self.wait_in_memory(pending, self._log.now() + PAUSE_POLL_INTERVAL)
            return
        self._metrics.spills.labels(pending.delivery.destination, SpillReason.PAUSED).inc()
        pending.metadata = RecordMetadata(paused_name=name, spill_reason=SpillReason.PAUSED)
        self._write_successor(pending, self._topics.parked)

    def _write_successor(self, pending: PendingDelivery, topic: str, outcome: DeadLettered | None = None) -> None:
        """Write the successor, or keep the delivery until the owner of its partition is known."""
        tracker = pending.record.tracker
        pending.outcome = outcome
        if tracker.is_reassigned:
            self.finish(pending)  # another owner reads it again; only the memory is released
        elif not tracker.is_writable:
            pending.stage = Stage.WAITING
        else:
            pending.stage = Stage.APPEND
            when_granted = partial(self._write_successor, pending, topic, outcome)
            key, size = key_of(pending.delivery), _size_of_write(pending)
            append = self._appends.begin(topic, key, size, predecessor=pending, when_granted=when_granted)
            if append is not None:
                write = self._write if self._traces is None else partial(self._write_traced, self._traces)
                self.spawn(partial(write, pending, topic, outcome, append), "worker-successor")

    async def _write(self, pending: PendingDelivery, topic: str, outcome: DeadLettered | None, append: Append) -> None:
        delivery = replace(pending.delivery, successor=pending.delivery.successor + 1)
        predicates = self._appends.ownership_predicates(append, pending.record)
        failed = partial(self._appends.record_failure, append)
        if outcome is None:
            try:
                is_stored = await self._successors.store(topic, delivery, pending.metadata, *predicates, failed=failed)
            except RecordTooLargeError:
                # As an append of its own: dead letters that can't be stored keep nobody else from this topic.
                self._appends.finish(append, is_stored=False)
                outcome = DeadLettered(reason=DeadReason.TOO_LARGE, detail=f"too large for {topic}")
                self._write_successor(pending, self._topics.dead, outcome)
                return
        else:
            is_stored = await self._successors.dead_letter(delivery, outcome, *predicates, failed=failed)
            if is_stored:
                number = delivery.attempts[-1].number if delivery.attempts else 0
                self._outcomes.ended(pending, outcome, number, self._log.now())
        self.finish(pending)
        self._appends.finish(append, is_stored=is_stored)

    async def _write_traced(
        self, traces: "Traces", pending: PendingDelivery, topic: str, outcome: DeadLettered | None, append: Append
    ) -> None:
        with traces.send(pending.delivery.event, topic, delivery=pending.delivery) as span:
            if outcome is not None:
                span.set_attributes({"gateway.reason": outcome.reason})
            await self._write(pending, topic, outcome, append)

    def finish(self, pending: PendingDelivery) -> None:
        """Finish a delivery that has ended, or that another record or owner continues, or that no rule wants."""
        pending.stage = Stage.FINISHED
        pending.record.unfinished -= 1
        pending.record.tracker.member.finished(pending)

    # Run, drain and abandon.

    async def run(self) -> None:
        """Resume due deliveries, and start or spill queued ones, until cancelled."""
        queues = self._queues
        while True:
            await self._sleep(queues.until_next_check(self._log.now()))
            queues.apply_kicks()
            now, count = self._log.now(), 0
            while not self._is_draining and (pending := queues.pop_due(now)) is not None:
                pending.record.tracker.member.resume(pending, now)
                count += 1
                if count % RETRIES_AT_ONCE == 0 or self._log.now() > now + RETRIES_TURN:
                    await self._sleep(0)
                    now = self._log.now()  # breakers may have opened meanwhile
            if queues.is_suspended and not self._is_draining:
                continue  # what waits may start in a moment, or is left to the next owner
            for lane in queues.watched_lanes():
                self._pump(lane, now)
                for spill in lane.pop_overdue(now):
                    self._spill(spill, now)

    async def let_slow_attempts_end(self, until: float) -> None:
        """Before a drain, wait for the attempts in flight, while deliveries to other destinations go on."""
        await self._queues.let_slow_attempts_end(until, self._sleep)

    async def drain(self, moved: Iterable[PendingDelivery], until: float) -> None:
        """Stop starting attempts, write the given deliveries to a tier, and wait for attempts and appends in flight.

        `until` is in the loop's time; what isn't finished then is left to the next owner.
        """
        self._is_draining = self._queues.is_suspended = True
        for pending in moved:
            self.move_to_tier(pending)
        ticks = asyncio.get_running_loop().time
        while (unfinished := len(self._in_flight) + self._appends.waiting) and ticks() < until:
            await self._sleep(0.01)
        if unfinished:
            self._logger.warning("drain_cut_short", unfinished=unfinished)

    def abandon(self) -> None:
        """Cancel the attempts and appends that are still in flight."""
        self._appends.abandon()
        for task in self._in_flight:
            task.cancel()

    def bind(self, task_group: asyncio.TaskGroup) -> None:
        """Set the TaskGroup for attempts and appends."""
        self._tasks = task_group

    def spawn(self, work: Callable[[], Coroutine[None, None, None]], name: str) -> None:
        """Run an attempt or an append in a task, which a drain waits for."""
        assert self._tasks is not None
        self._in_flight.add(self._tasks.create_task(self._tracked(work), name=name))

    async def _tracked(self, work: Callable[[], Coroutine[None, None, None]]) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            await work()
        finally:
            self._in_flight.discard(task)


def _size_of_write(pending: PendingDelivery) -> int:
    """Return about how many bytes of memory the append of a successor takes, without the body, which is shared."""
    # About two thirds of `size` are the overhead of Python's objects.
    return APPEND_OVERHEAD + (pending.size - len(pending.delivery.event.body)) // 3
