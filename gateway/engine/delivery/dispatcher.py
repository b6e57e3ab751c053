"""Deliveries: which way each goes, one attempt after another, and what follows from its result.

                    ┌─ paused ──────────────────▶ parked, acknowledged ──▶ done
                    ├─ not due, or unknown name ─▶ tier, acknowledged ────▶ done
    Item ──admit────┤                                      ┌─ 2xx ───────▶ done
                    └─ lane: waiting ──▶ attempt ──────────┼─ retryable ─▶ tier, acknowledged ─▶ done
                          └─ can't take it ─▶ tier ─▶ done └─ ended ─────▶ dead, acknowledged ─▶ done

Here the decisions of `lanes`, `retry_decision`, `tiers` and `request` are acted on. Which records the deliveries belong
to, and what of those is committed, is for their owners to decide: a `Member` passes items in, and is notified when one
has ended. Where it keeps an order, what would go to a tier or to the parked waits in memory instead.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import replace
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, assert_never

from gateway.engine import tiers
from gateway.engine.control.records import Order
from gateway.engine.delivery import retry_decision
from gateway.engine.delivery.attempts import Attempts
from gateway.engine.delivery.holds import Holds
from gateway.engine.delivery.lanes import Lane, Spill
from gateway.engine.delivery.outcomes import Outcomes
from gateway.engine.delivery.schedule import Schedule
from gateway.engine.partition_tracker import Item, Pending, Stage
from gateway.engine.services import Client, Services
from gateway.engine.successor_writer import Successors
from gateway.log.base import Record
from gateway.log.topics import TIERS
from gateway.model import (
    NO_NOTE,
    Attempt,
    DeadLettered,
    DeadReason,
    Delivered,
    Dropped,
    ExpressionError,
    Note,
    RecordTooLargeError,
    SpillReason,
    UndecodableRecordError,
)
from gateway.rules.rules import OnGone
from gateway.telemetry.logs import raise_site, trace_of

if TYPE_CHECKING:  # an extra
    from gateway.telemetry.traces import Traces

MAX_STAY_IN_MEMORY = 5.0
"""Seconds after it was read for which a record's deliveries may wait in memory to be tried again."""
PAUSE_POLL_INTERVAL = 1.0
"""Seconds after which a delivery that can't be parked, for the sake of its order, looks whether it still is paused."""
CUT_SHORT_GRACE = 0.25
"""Seconds for which no attempt is cut short: a gap in the log fills a window in the middle of any."""
RETRIES_AT_ONCE = 4
"""Retries let in before other tasks get their turn: a new event waits for several such turns, a retry waited anyway."""
APPEND_OVERHEAD = 6144
"""Bytes of memory that the append of a successor takes while it isn't acknowledged, beside its headers: some 4,000
here, and what a log keeps of it."""
MAX_BYTES_IN_APPENDS = 64 << 20
"""Bytes of memory of all such appends, some eight thousand; while a log takes none, the others wait without any."""
UNKNOWN_RETRY_DELAY = 60.0
UNKNOWN_MAX_AGE = 3600.0
"""Seconds for which a name that the rules don't know may be a rolling deployment's."""
BREAKER_DEFER_MIN, BREAKER_DEFER_MAX = 5.0, 1200.0
"""Seconds that a delivery stays away from an open breaker; doubled each time, but no longer than it has been open."""


class Dispatcher:
    """Every delivery of one process, from `admit` to its end or its successor, of which the record's owner hears."""

    def __init__(self, services: Services, client: Client) -> None:
        self._log = log = services.log
        self._topics = topics = services.topics
        self._rules = services.rules
        self._attempts = Attempts(services, client)
        self._outcomes = Outcomes(services)
        self._control = services.control
        self._metrics = metrics = services.metrics
        self._logger = logger = services.logger
        self._sleep = sleep = services.sleep
        self._traces = services.traces
        self._successors = Successors(log=log, topics=topics, metrics=metrics, logger=logger, sleep=sleep)
        self.unreadable = self._successors.unreadable
        self._schedule = Schedule(services.rules, services.control)
        self._holds = Holds(services, self._schedule)
        self._pausing: set[str] = set()
        self._tasks: asyncio.TaskGroup | None = None
        self._under_way: set[asyncio.Task[None]] = set()  # attempts and appends
        self._bytes_in_appends = 0  # bytes of memory of the appends under way
        self._unwritten: deque[Callable[[], None]] = deque()  # appends that wait for some of it
        self._is_draining = False

    @property
    def is_draining(self) -> bool:
        """Whether nothing is started any more."""
        return self._is_draining

    # Ways in.

    def admit(self, item: Item, now: float) -> Lane | None:
        """Send a delivery the way that is open to it now; return its lane if it went there."""
        delivery = item.delivery
        if item.end is not None:
            self.end(item, item.end)
            return None
        rules = self._rules()
        if delivery.route not in rules.routes or delivery.destination not in rules.destinations:
            self.defer_unknown(item)
            return None
        if self._control.paused_by(delivery.route, delivery.destination):
            self._park(item)
            return None
        if delivery.due > now:
            self.defer(item, delivery.due, now)
            return None
        lane = self._schedule.lane(delivery.destination)
        spill = lane.offer(item, now)
        if spill is not None:
            self._spill(spill, now)
            return None
        self._pump(lane, now)
        if lane.waiting:
            self._schedule.is_waited_in(lane)
        return lane

    def defer_unknown(self, item: Item) -> None:
        """Keep what names an unknown source, route or destination for a while: the rules may be on their way."""
        now = self._log.now()
        since = now if item.note.unknown_since is None else item.note.unknown_since
        if now - since > UNKNOWN_MAX_AGE:
            self.end(item, DeadLettered(reason=DeadReason.ROUTE_REMOVED, detail="the rules no longer name it"))
            return
        self._metrics.spills.labels(item.delivery.destination, SpillReason.UNKNOWN_NAME).inc()
        item.note = Note(unknown_since=since, why=SpillReason.UNKNOWN_NAME)
        item.delivery = replace(item.delivery, due=now + UNKNOWN_RETRY_DELAY)
        self.defer(item, item.delivery.due, now)

    def end(self, item: Item, outcome: DeadLettered | Dropped) -> None:
        """End a delivery without success, unless its owner has it halt there."""
        if isinstance(outcome, DeadLettered):
            if item.pending.tracker.owner.halt_instead(item, outcome):
                return
            self._write_successor(item, self._topics.dead, outcome)
        else:
            self._outcomes.ended(item, outcome, item.delivery.attempts[-1].number, self._log.now())
            self._finish(item)

    def dead_letter_unreadable(self, pending: Pending, record: Record, error: UndecodableRecordError) -> None:
        """Keep a record that can't be read among the dead letters."""

        async def write() -> None:
            tracker = pending.tracker
            await self._successors.dead_letter_unreadable(
                tracker.partition.topic,
                record,
                error,
                lambda: not pending.tracker.is_lost,
                lambda: pending.tracker.is_suspended,
            )
            pending.left = 0
            pending.tracker.owner.done(pending)

            self._release_append(size)

        pending.left = 1
        size = APPEND_OVERHEAD + pending.size // 3
        if self._bytes_in_appends < MAX_BYTES_IN_APPENDS:
            self._bytes_in_appends += size
            self.spawn(write, "worker-successor")
        else:
            self._unwritten.append(partial(self.dead_letter_unreadable, pending, record, error))

    def defer(self, item: Item, due: float, now: float) -> None:
        """Have a delivery come back when it is due: by a tier, or from memory if that is in a moment."""
        self._outcomes.note_late(item, max(due, now))
        tracker = item.pending.tracker
        if tracker.owner.keeps_order:
            self.wait(item, due)
            return
        tier = tiers.plan(due, now)
        # Not again and again: the record would stay unfinished for as long as its delivery fails.
        is_fresh = now < item.pending.taken_at + MAX_STAY_IN_MEMORY
        if tier is None and is_fresh and tracker.is_live and tracker.owner.has_room and not self._is_draining:
            self.wait(item, due)
        else:
            self._write_successor(item, self._topics.retry(tier or tiers.SHORTEST))

    def wait(self, item: Item, until: float) -> None:
        """Keep a delivery in memory until a time. Its owner then sends it on, if the partition still is ours."""
        tracker = item.pending.tracker
        if tracker.is_lost:
            self._finish(item)
            return
        item.stage = Stage.WAITING
        if tracker.is_live:
            self._schedule.wait(item, until)

    def drop(self, item: Item) -> None:
        """Forget a delivery that another record carries on."""
        self._finish(item)

    def carry_on(self, item: Item) -> None:
        """Let a tier carry a delivery to its next owner, which else would repeat what was done of its record."""
        if item.end is not None:
            self.end(item, item.end)
            return
        now = self._log.now()
        self._outcomes.note_late(item, max(item.delivery.due, now))
        self._write_successor(item, self._topics.retry(tiers.plan(item.delivery.due, now) or tiers.SHORTEST))

    def withdraw(self, items: Iterable[Item]) -> None:
        """Take deliveries out of their queues; what isn't in one is ignored."""
        self._schedule.withdraw(items)

    def cut_short(self, item: Item, now: float) -> None:
        """Make a delivery that holds a window back end now: an attempt as a timeout, one that waits by a tier.

        An attempt that has just begun has a moment: most are answered within it, and wouldn't be made again.
        """
        if item.scope is not None:
            item.scope.cut_short(max(0.0, item.since + CUT_SHORT_GRACE - now))
            item.scope = None  # once
        elif item.stage is Stage.WAITING:
            self.withdraw([item])
            lane = self._schedule.lanes.get(item.delivery.destination)
            due = max(now if lane is None else lane.next_slot(now), now + TIERS[tiers.SHORTEST])
            self._spill(Spill(item=item, reason=SpillReason.WINDOW_FULL, due=due), now)

    # Attempts.

    def limit(self, share: float | None = None) -> None:
        """Set the lanes' limits by the rules in force and this worker's share of the fleet."""
        self._schedule.limit(share)

    def _pump(self, lane: Lane, now: float) -> None:
        """Start the attempts that the lane may start."""
        if self._is_draining:
            return
        while (item := lane.take(now)) is not None:
            self.spawn(partial(self._serve, lane, item), "worker-attempts")

    async def _serve(self, lane: Lane, item: Item | None) -> None:
        """Make one attempt after another, as long as the lane has one that may start: a task serves many deliveries."""
        now = self._log.now()
        while item is not None:
            now = await self._deliver(lane, item, now)
            item = None if self._is_draining else lane.take(now)

    async def _deliver(self, lane: Lane, item: Item, now: float) -> float:
        """Make one attempt and act on its result; return when. What goes wrong with a delivery here dead-letters it."""
        delivery = item.delivery
        attempt: Attempt | None = None
        try:
            rules = self._rules()
            route = rules.routes.get(delivery.route)
            destination = rules.destinations.get(delivery.destination)
            if route is None or destination is None:
                self.defer_unknown(item)
                return now
            if self._control.paused_by(route.name, destination.name):
                self._park(item)
                return now
            owner = item.pending.tracker.owner
            if owner.keeps_order and not owner.is_proof_fresh(item):
                owner.resume(item, now)
                return now
            attempt = await self._attempts.make(item, route, destination, now)
            now = self._log.now()
            verdict = retry_decision.decide(delivery, attempt, route.retry, now=now)
        except ExpressionError as error:
            self.end(item, DeadLettered(reason=DeadReason.EXPRESSION_ERROR, detail=str(error)))
            return now
        except Exception as error:  # noqa: BLE001 - the edge of one delivery
            self._logger.error(
                "delivery_failed",
                delivery_id=delivery.id,
                route=delivery.route,
                destination=delivery.destination,
                exception=trace_of(error),
            )
            told = f"{type(error).__name__} at {raise_site(error)}"
            self.end(item, DeadLettered(reason=DeadReason.BUG, detail=told))
            return self._log.now()
        finally:
            if attempt is None:
                lane.cancelled(item, self._log.now())
            else:
                lane.finished(item, attempt, now)
        if destination.on_gone is OnGone.PAUSE and attempt.status == HTTPStatus.GONE:
            self._pause(destination.name)
        self._follow(item, attempt, verdict, now)
        return now

    def _follow(self, item: Item, attempt: Attempt, verdict: retry_decision.Verdict, now: float) -> None:
        """Act on what follows from an attempt."""
        if isinstance(verdict, Delivered):
            self._outcomes.ended(item, verdict, attempt.number, now)
            self._finish(item)
            return
        item.note = NO_NOTE
        item.is_tried = True
        item.delivery = replace(item.delivery, attempts=(*item.delivery.attempts, attempt))
        match verdict:
            case retry_decision.Retry(due=due):
                self._metrics.retries.labels(item.delivery.route, attempt.result).inc()
                item.delivery = replace(item.delivery, due=due)
                self.defer(item, due, now)
            case DeadLettered() | Dropped():
                self.end(item, verdict)
            case _ as never:
                assert_never(never)

    def _pause(self, destination: str) -> None:
        """Order what an operator would, once."""

        async def write() -> None:
            order = Order(kind="pause", name=name, state="paused", at=self._log.now(), by="its answer 410")
            self._logger.error("destination_paused", destination=destination, status=int(HTTPStatus.GONE))
            await self._successors.order(order)
            self._pausing.discard(name)

        name = f"destination/{destination}"
        if name not in self._pausing and self._control.paused_by("", destination) is None:
            self._pausing.add(name)
            self.spawn(write, "worker-pause")

    # Ends and successors.

    def _spill(self, spill: Spill, now: float) -> None:
        """Write what its lane can't take to the retry store. It isn't an attempt, and isn't counted as one."""
        item, due = spill.item, spill.due
        delivery = item.delivery
        route = self._rules().routes.get(delivery.route)
        if route is None:  # removed while this waited
            self.defer_unknown(item)
            return
        keeps_order = item.pending.tracker.owner.keeps_order
        lane = self._schedule.lanes.get(delivery.destination)
        if spill.reason is SpillReason.BREAKER_OPEN and lane is not None and not lane.may_be_well(now):
            down_for = lane.breaker.down_for(now)
            if delivery.attempts and now > delivery.age_began_at + route.retry.max_age and down_for > BREAKER_DEFER_MIN:
                # It has been tried, and its time is over: the probes tell that the destination is still down.
                self.end(item, DeadLettered(reason=DeadReason.EXPIRED, detail="the destination's breaker is open"))
                return
            if not keeps_order:  # in memory a look at the breaker costs nothing
                times = item.note.breaks
                item.note = Note(breaks=times + 1)
                doubled = BREAKER_DEFER_MIN * 2.0 ** min(times, 16)
                due = max(due, now + max(BREAKER_DEFER_MIN, min(BREAKER_DEFER_MAX, doubled, down_for)))
        if not keeps_order:
            self._metrics.spills.labels(delivery.destination, spill.reason).inc()
            item.note = replace(item.note, why=spill.reason)
        item.delivery = replace(delivery, due=due)
        self.defer(item, due, now)

    def _park(self, item: Item) -> None:
        name = self._control.paused_by(item.delivery.route, item.delivery.destination)
        assert name is not None
        if item.pending.tracker.owner.keeps_order:
            self.wait(item, self._log.now() + PAUSE_POLL_INTERVAL)
            return
        self._metrics.spills.labels(item.delivery.destination, SpillReason.PAUSED).inc()
        item.note = Note(by=name, why=SpillReason.PAUSED)
        self._write_successor(item, self._topics.parked)

    def _write_successor(self, item: Item, topic: str, end: DeadLettered | None = None) -> None:
        """Write the successor, or hold the item until it is known whose its partition is."""
        tracker = item.pending.tracker
        item.end = end
        if tracker.is_lost:
            self._finish(item)  # another owner reads it again; only the memory is given back
        elif not tracker.is_writable:
            item.stage = Stage.WAITING
        elif self._bytes_in_appends >= MAX_BYTES_IN_APPENDS:
            item.stage = Stage.APPEND
            self._unwritten.append(partial(self._write_successor, item, topic, end))
        else:
            item.stage = Stage.APPEND
            item.delivery = replace(item.delivery, successor=item.delivery.successor + 1)
            self._bytes_in_appends += _size_of_write(item)
            write = self._write if self._traces is None else partial(self._write_traced, self._traces)
            self.spawn(partial(write, item, topic, end), "worker-successor")

    async def _write(self, item: Item, topic: str, end: DeadLettered | None) -> None:
        def is_wanted() -> bool:
            return not item.pending.tracker.is_lost

        def is_undecided() -> bool:
            return item.pending.tracker.is_suspended

        delivery = item.delivery
        is_stored = False
        if end is None:
            try:
                is_stored = await self._successors.carry_on(topic, delivery, item.note, is_wanted, is_undecided)
            except RecordTooLargeError:
                end = DeadLettered(reason=DeadReason.TOO_LARGE, detail=f"too large for {topic}")
        if end is not None:
            is_stored = await self._successors.dead_letter(delivery, end, is_wanted, is_undecided)
            if is_stored:
                made = delivery.attempts[-1].number if delivery.attempts else 0
                self._outcomes.ended(item, end, made, self._log.now())
        self._finish(item)
        self._release_append(_size_of_write(item))

    async def _write_traced(self, traces: "Traces", item: Item, topic: str, end: DeadLettered | None) -> None:
        with traces.send(item.delivery.event, topic, delivery=item.delivery) as span:
            if end is not None:
                span.set_attributes({"gateway.reason": end.reason})
            await self._write(item, topic, end)

    def _release_append(self, size: int) -> None:
        """Give back the memory of an append, and begin those that waited for it."""
        self._bytes_in_appends -= size
        while self._unwritten and self._bytes_in_appends < MAX_BYTES_IN_APPENDS:
            self._unwritten.popleft()()

    def _finish(self, item: Item) -> None:
        item.stage = Stage.ENDED
        item.pending.left -= 1
        item.pending.tracker.owner.finished(item)

    # The loop, and the end of it.

    async def run(self) -> None:
        """Let in what has become due and start or spill what waits, for ever."""
        schedule = self._schedule
        while True:
            await self._sleep(schedule.until_next_look(self._log.now()))
            schedule.hear_kicks()
            now = self._log.now()
            count = 0
            while not self._is_draining and (item := schedule.take_due(now)) is not None:
                item.pending.tracker.owner.resume(item, now)
                count += 1
                if count % RETRIES_AT_ONCE == 0:
                    await self._sleep(0)
                    now = self._log.now()  # breakers may have opened meanwhile
            for lane in schedule.busy():
                self._pump(lane, now)
                for spill in lane.overdue(now):
                    self._spill(spill, now)

    async def drain(self, begun: Iterable[Item], until: float) -> None:
        """Start nothing any more, carry the given deliveries on by a tier, and wait for what is under way.

        `until` is by the loop's time; what isn't finished then is left to the next owner.
        """
        self._is_draining = True
        for item in begun:
            self.carry_on(item)
        while (unfinished := len(self._under_way) + len(self._unwritten)) and asyncio.get_running_loop().time() < until:
            await self._sleep(0.01)
        if unfinished:
            self._logger.warning("drain_cut_short", unfinished=unfinished)

    def abandon(self) -> None:
        """Cancel what is still under way."""
        self._unwritten.clear()
        for task in self._under_way:
            task.cancel()

    def start(self, tasks: asyncio.TaskGroup) -> None:
        """Name the group that owns every attempt and append."""
        self._tasks = tasks

    @property
    def holds(self) -> Holds:
        """What keeps which destinations from being sent anything."""
        return self._holds

    def spawn(self, work: Callable[[], Coroutine[None, None, None]], name: str) -> None:
        """Run an attempt or an append, which a drain waits for."""
        assert self._tasks is not None
        self._under_way.add(self._tasks.create_task(self._tracked(work), name=name))

    async def _tracked(self, work: Callable[[], Coroutine[None, None, None]]) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            await work()
        finally:
            self._under_way.discard(task)


def _size_of_write(item: Item) -> int:
    """Return about how many bytes of memory the append of a successor takes: not the body, of which there is one."""
    return APPEND_OVERHEAD + (item.size - len(item.delivery.event.body)) // 3  # the rest are objects
