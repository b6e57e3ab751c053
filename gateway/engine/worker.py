"""The loop of the router: read events, match them, deliver, and commit what is done.

                              ┌────────── lane: waiting ──▶ attempt ──┬─ 2xx ───────────────────────────▶ done
    event ──match──▶ Item ────┤                                       ├─ retryable ──▶ tier, acknowledged ─▶ done
    tier record, due ─────────┤ lane can't take it ──▶ tier, acknowledged ──▶ done
                              └ paused ──▶ parked, acknowledged ──▶ done  └─ ended ──▶ dead, acknowledged ─▶ done

A record is done when each of its deliveries is; only done records are committed. If a successor can't be written, its
record stays undone, the partition backs up and `gateway_oldest_undone_seconds` rises.

Decisions are made in the pure modules beside this one; here they are acted on. Time, log and network are handed in.
"""

import asyncio
import heapq
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol, assert_never

from structlog.typing import FilteringBoundLogger

from gateway.engine import planner, retry
from gateway.engine.control import Control
from gateway.engine.lanes import Lane, Slots, Spill
from gateway.engine.request import Outbound, compose
from gateway.engine.tracker import Item, Pending, Tracker
from gateway.log.base import Assignment, Batch, Commit, Consumer, Log, Partition, Record, RecordHeaders
from gateway.log.records import Filed, decode_delivery, decode_event, encode_delivery
from gateway.log.topics import ROUTER_GROUP, TIERS, Topics
from gateway.model import (
    Attempt,
    DeadLettered,
    DeadReason,
    Delivered,
    Delivery,
    Dropped,
    Event,
    ExpressionError,
    LogUnavailableError,
    Outcome,
    RecordTooLargeError,
    Result,
    SpillReason,
    UndecodableRecordError,
    delivery_id,
)
from gateway.rules.expressions import View
from gateway.rules.rules import Rules
from gateway.telemetry.metrics import Metrics

MAX_BYTES = 256 << 20
"""Bodies in memory over all lanes; above it, nothing more is read."""
DRAIN_TIMEOUT = 25.0
"""Seconds from `stop` to the last commit: Kubernetes kills at 30."""
TICK = 0.05
"""Seconds between looks at lanes in which something waits."""
IDLE_TICK = 0.25
COMMIT_EVERY = 1.0
RECORDS_AT_ONCE = 32
"""Records routed before other tasks get their turn: about a millisecond."""
RETRIES_AT_ONCE = 4
"""The same for what comes due: an event on its way waits for several such turns, a retry has waited anyway."""
PRESSED_WAIT = 0.1
"""Seconds for which a full but fast lane may hold the reader back."""
UNKNOWN_RETRY = 60.0
UNKNOWN_LIMIT = 3600.0
"""Seconds for which a name that the rules don't know may be a rolling deployment's."""
CUT_SHORT = 0.75
"""Share of a window at which its lowest undone record is made to end."""


class Client(Protocol):
    """Makes one attempt; never raises for what a destination does."""

    async def attempt(self, outbound: Outbound, *, timeout: float, number: int) -> Attempt: ...


class Worker:
    """One member of the router's group. `run` until `stop`."""

    def __init__(
        self,
        *,
        log: Log,
        topics: Topics,
        rules: Callable[[], Rules],
        client: Client,
        control: Control,
        metrics: Metrics,
        logger: FilteringBoundLogger,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._log = log
        self._topics = topics
        self._rules = rules
        self._client = client
        self._control = control
        self._metrics = metrics
        self._logger = logger
        self._sleep = sleep
        self._slots = Slots()
        self._lanes: dict[str, Lane] = {}
        self._trackers: dict[Partition, Tracker] = {}
        self._given_up: dict[Partition, Tracker] = {}
        self._tiers = {topics.retry(name): delay for name, delay in TIERS.items()}
        self._soon: list[tuple[float, int, Item]] = []  # heap of deliveries that are due within seconds
        self._soon_count = 0
        self._bytes = 0
        self._share = 1.0
        self._partitions = 0
        self._consumer: Consumer | None = None
        self._subscribed: frozenset[str] = frozenset()
        self._tasks: asyncio.TaskGroup | None = None
        self._deliveries: set[asyncio.Task[None]] = set()  # attempts and appends under way
        self._is_draining = False
        self._stopped = asyncio.Event()
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """Route and deliver until `stop`, then drain and commit. Raises what a broken log or a bug makes it raise."""
        async with asyncio.TaskGroup() as self._tasks:
            await self._subscribe()
            loops = [
                self._tasks.create_task(self._read(), name="worker-read"),
                self._tasks.create_task(self._keep_releasing(), name="worker-release"),
                self._tasks.create_task(self._keep_house(), name="worker-house"),
                self._tasks.create_task(self._keep_committing(), name="worker-commit"),
            ]
            await self._stopped.wait()
            await self._drain(loops)

    def stop(self) -> None:
        """Take nothing in any more and let `run` end."""
        self._is_draining = True
        self._stopped.set()
        self._changed.set()

    def reload(self) -> None:
        """Act on new rules: limits at once, topics with the next fetch."""
        self._limit()
        self._changed.set()

    # The listener of the consumer: both return at once, and nothing is fetched meanwhile.

    def assigned(self, assignments: Sequence[Assignment]) -> None:
        """Start, or go on, with these partitions."""
        returning: list[Item] = []
        for assignment in assignments:
            partition = assignment.partition
            tracker = Tracker(assignment, self._tiers.get(partition.topic))
            old = self._given_up.pop(partition, None)
            if old is not None:
                returning += tracker.adopt(old)
                self._forget(old)
            elif tracker.progress.lost:
                self._logger.error(
                    "records_lost", topic=partition.topic, partition=partition.number, count=tracker.progress.lost
                )
            self._trackers[partition] = tracker
        for old in self._given_up.values():
            self._forget(old)
        self._given_up.clear()
        self._limit_to_share()
        for item in returning:
            item.is_waiting = False
            self._admit(item)

    def revoked(self, partitions: Sequence[Partition]) -> Mapping[Partition, Commit]:
        """Give these partitions up; what is under way for them may end, but changes no other owner's progress."""
        commits: dict[Partition, Commit] = {}
        for partition in partitions:
            tracker = self._trackers.pop(partition, None)
            if tracker is None:
                continue
            commit = tracker.progress.committable()
            if commit is not None:
                commits[partition] = commit
            tracker.is_live = False
            tracker.buffered.clear()
            self._given_up[partition] = tracker
        held = [item for item in self._waiting_items() if not item.pending.tracker.is_live]
        for lane in self._lanes.values():
            lane.remove(held)
        self._soon = [entry for entry in self._soon if entry[2].pending.tracker.is_live]
        heapq.heapify(self._soon)
        return commits

    # Reading.

    async def _subscribe(self) -> None:
        topics = frozenset(
            source.topic or self._topics.events(source.name) for source in self._rules().sources.values()
        )
        wanted = topics | self._subscribed | self._tiers.keys()  # a deleted source's topic is read on
        if self._consumer is not None:
            if wanted == self._subscribed:
                return
            consumer, self._consumer = self._consumer, None
            await consumer.close()
        self._partitions = 0
        for topic in wanted:
            self._partitions += len(await self._log.bounds(topic))
        self._subscribed = wanted
        self._consumer = await self._log.consume(
            group=self._topics.group(ROUTER_GROUP), topics=sorted(wanted), listener=self
        )

    async def _read(self) -> None:
        while not self._is_draining:
            if self._changed.is_set():
                self._changed.clear()
                try:
                    await self._subscribe()
                except LogUnavailableError as error:
                    self._logger.warning("subscription_repeated", error=str(error))
                    self._changed.set()
                    await self._sleep(1.0)
                    continue
            if self._bytes >= MAX_BYTES:
                await self._sleep(TICK / 10)
                continue
            assert self._consumer is not None
            batches = await self._consumer.fetch(timeout=0.25)
            # Held against the trackers of this very moment: a batch that waits for the one before it may outlive its
            # assignment, and a tracker takes what it isn't given in order for gaps in the log.
            for tracker, batch in [(self._trackers.get(batch.partition), batch) for batch in batches]:
                if tracker is not None and tracker.is_live:
                    await self._take(tracker, batch)

    async def _take(self, tracker: Tracker, batch: Batch) -> None:
        if tracker.delay is not None:
            # A tier's head is always the one due first: hold this batch, and read on when it is through.
            self._pause(tracker)
            tracker.buffered.extend(batch.records)
            self._release(tracker)
            return
        for count, record in enumerate(batch.records, 1):
            if not tracker.is_live or self._is_draining:
                return
            pressed = self._route(tracker, record)
            if pressed is not None:
                await self._wait_for(pressed)
            elif count % RECORDS_AT_ONCE == 0:
                await self._sleep(0)
        if not tracker.progress.has_room():
            self._pause(tracker)

    async def _wait_for(self, lane: Lane) -> None:
        until = self._log.now() + PRESSED_WAIT
        while lane.is_pressed and not self._is_draining:
            if self._log.now() > until:
                lane.was_slow(self._log.now())
                return
            await self._sleep(0.001)

    def _route(self, tracker: Tracker, record: Record) -> Lane | None:
        """Match an event and let its deliveries into their lanes; return a lane that is worth waiting for."""
        pending = tracker.begin(record, len(record.value))
        if pending is None:
            return None
        self._bytes += pending.size
        try:
            event = decode_event(record)
        except UndecodableRecordError as error:
            self._bury(pending, record, error)
            return None
        return self._fan_out(pending, event)

    def _fan_out(self, pending: Pending, event: Event, unknown_since: float = 0.0) -> Lane | None:
        rules = self._rules()
        if event.source not in rules.sources:
            self._keep_unknown(self._item(pending, _unrouted(event)), unknown_since)
            return None
        matches = rules.table.match(View.of(event))
        if not matches:
            self._metrics.unrouted.labels(event.source).inc()
            self._done(pending)
            return None
        items: list[Item] = []
        failed: list[tuple[Item, ExpressionError]] = []
        for route, error in matches:
            for name in route.destinations:
                delivery = Delivery(
                    id=delivery_id(event.id, route.name, name), event=event, route=route.name, destination=name
                )
                item = self._item(pending, delivery)
                if error is None:
                    items.append(item)
                else:
                    failed.append((item, error))
        pressed: Lane | None = None
        for item, error in failed:
            self._end(item, DeadLettered(reason=DeadReason.EXPRESSION_ERROR, detail=str(error)))
        for item in items:
            lane = self._admit(item)
            if lane is not None and lane.is_pressed:
                pressed = lane
        return pressed

    def _release(self, tracker: Tracker) -> bool:
        """Take some records of a tier whose delay is over, and tell whether there are more of them.

        Once all that was held is taken, the tier is read on.
        """
        assert tracker.delay is not None
        now = self._log.now()
        buffered = tracker.buffered
        for _ in range(RETRIES_AT_ONCE):
            if not buffered:
                self._unpause(tracker)
                return False
            if buffered[0].appended_at + tracker.delay > now or self._bytes >= MAX_BYTES:
                return False
            self._resume(tracker, buffered.popleft(), now)
        return True

    async def _keep_releasing(self) -> None:
        """Release what is due, in turn with everything else: a backlog that comes due at once delays nobody."""
        while not self._is_draining:
            has_more = False
            for tracker in list(self._trackers.values()):
                if tracker.buffered and tracker.is_live and self._release(tracker):
                    has_more = True
                    await self._sleep(0)
            await self._sleep(0 if has_more else TICK)

    def _pause(self, tracker: Tracker) -> None:
        if self._consumer is not None and not tracker.is_paused:
            tracker.is_paused = True
            self._consumer.pause(tracker.partition)

    def _unpause(self, tracker: Tracker) -> None:
        if self._consumer is not None and tracker.is_paused and tracker.progress.has_room():
            tracker.is_paused = False
            self._consumer.resume(tracker.partition)

    def _resume(self, tracker: Tracker, record: Record, now: float) -> None:
        pending = tracker.begin(record, len(record.value))
        if pending is None:
            return
        self._bytes += pending.size
        try:
            filed = decode_delivery(record)
        except UndecodableRecordError as error:
            self._bury(pending, record, error)
            return
        delivery = filed.delivery
        if tracker.is_copy(delivery, record.offset) or self._control.is_kicked(
            delivery.route, delivery.destination, tracker.partition, record.offset
        ):
            self._done(pending)
        elif not delivery.route:
            self._fan_out(pending, delivery.event, _unknown_since(filed))
        else:
            self._admit(self._item(pending, delivery, is_retry=True), now, _unknown_since(filed))

    def _item(self, pending: Pending, delivery: Delivery, *, is_retry: bool = False) -> Item:
        item = Item(delivery=delivery, pending=pending, size=pending.size, is_retry=is_retry)
        pending.items.append(item)
        pending.left += 1
        return item

    # Lanes.

    def _admit(self, item: Item, now: float | None = None, unknown_since: float = 0.0) -> Lane | None:
        """Send a delivery the way that is open to it now; return its lane if it went there."""
        now = self._log.now() if now is None else now
        delivery = item.delivery
        if item.end is not None:
            self._end(item, item.end)
            return None
        rules = self._rules()
        if delivery.route not in rules.routes or delivery.destination not in rules.destinations:
            self._keep_unknown(item, unknown_since)
            return None
        if self._control.paused_by(delivery.route, delivery.destination):
            self._park(item)
            return None
        if delivery.due > now:
            self._defer(item, delivery.due, now, {})
            return None
        lane = self._lane(delivery.destination)
        spill = lane.offer(item, now)
        if spill is not None:
            self._spill(spill, now)
            return None
        self._pump(lane, now)
        return lane

    def _lane(self, name: str) -> Lane:
        lane = self._lanes.get(name)
        if lane is None:
            destination = self._rules().destinations[name]
            lane = Lane(name, self._slots, concurrency=destination.concurrency, rate=destination.rate)
            lane.limit(concurrency=destination.concurrency, rate=destination.rate, share=self._share)
            self._lanes[name] = lane
        return lane

    def _pump(self, lane: Lane, now: float) -> None:
        """Start the attempts that the lane may start."""
        if self._is_draining:
            return
        while (item := lane.take(now)) is not None:
            self._spawn(self._attempts(lane, item), "worker-attempts")

    async def _attempts(self, lane: Lane, item: Item | None) -> None:
        """Make one attempt after another, as long as the lane has one that may start: a task serves many deliveries."""
        while item is not None:
            await self._deliver(lane, item)
            item = None if self._is_draining else lane.take(self._log.now())

    async def _deliver(self, lane: Lane, item: Item) -> None:
        """Make one attempt and act on its result. The edge of a delivery: what goes wrong here dead-letters it."""
        now = self._log.now()
        delivery = item.delivery
        attempt: Attempt | None = None
        try:
            rules = self._rules()
            route = rules.routes.get(delivery.route)
            destination = rules.destinations.get(delivery.destination)
            if route is None or destination is None:
                self._keep_unknown(item, 0.0)
                return
            if self._control.paused_by(route.name, destination.name):
                self._park(item)
                return
            number = delivery.attempts[-1].number + 1 if delivery.attempts else 1
            outbound = compose(delivery, destination, route.request, now=now)
            try:
                async with asyncio.timeout(None) as item.scope:
                    attempt = await self._client.attempt(outbound, timeout=destination.timeout, number=number)
            except TimeoutError:
                attempt = Attempt(
                    number=number,
                    at=now,
                    seconds=self._log.now() - now,
                    result=Result.TIMEOUT,
                    detail="cut short: the partition's window is full",
                )
            verdict = retry.decide(delivery, attempt, route.retry, now=self._log.now())
        except ExpressionError as error:
            self._end(item, DeadLettered(reason=DeadReason.EXPRESSION_ERROR, detail=str(error)))
            return
        except Exception as error:  # the edge of one delivery
            self._logger.exception(
                "delivery_failed", delivery_id=delivery.id, route=delivery.route, destination=delivery.destination
            )
            self._end(item, DeadLettered(reason=DeadReason.BUG, detail=repr(error)))
            return
        finally:
            item.scope = None
            if attempt is None:
                lane.cancelled(item, self._log.now())
            else:
                lane.finished(item, attempt, self._log.now())
        self._metrics.attempts.labels(lane.name, attempt.result).inc()
        self._metrics.attempt_duration.labels(lane.name).observe(attempt.seconds)
        match verdict:
            case Delivered():
                self._log_end(item, verdict, attempt.number)
                self._finish(item)
            case retry.Retry(due=due):
                self._metrics.retries.labels(route.name, attempt.result).inc()
                item.delivery = replace(delivery, attempts=(*delivery.attempts, attempt), due=due)
                self._defer(item, due, self._log.now(), {})
            case DeadLettered() | Dropped():
                item.delivery = replace(delivery, attempts=(*delivery.attempts, attempt))
                self._end(item, verdict)
            case _ as never:
                assert_never(never)

    # Ends and successors.

    def _spill(self, spill: Spill, now: float) -> None:
        """Write what its lane can't take to the retry store. It isn't an attempt, and isn't counted as one."""
        item = spill.item
        self._metrics.spills.labels(item.delivery.destination, spill.reason).inc()
        item.delivery = replace(item.delivery, due=spill.due)
        self._defer(item, spill.due, now, {})

    def _defer(self, item: Item, due: float, now: float, note: Mapping[str, str]) -> None:
        """Have a delivery come back when it is due: by a tier, or from memory if that is in a moment."""
        tier = planner.plan(due, now)
        if tier is None and item.pending.tracker.is_live and self._bytes < MAX_BYTES and not self._is_draining:
            self._soon_count += 1
            item.is_waiting = True
            heapq.heappush(self._soon, (due, self._soon_count, item))
        else:
            self._succeed(item, self._topics.retry(tier or planner.SHORTEST), note)

    def _park(self, item: Item) -> None:
        delivery = item.delivery
        name = self._control.paused_by(delivery.route, delivery.destination)
        assert name is not None
        self._metrics.spills.labels(delivery.destination, SpillReason.PAUSED).inc()
        self._succeed(item, self._topics.parked, {"by": name})

    def _keep_unknown(self, item: Item, since: float) -> None:
        """Keep what names an unknown source, route or destination for a while: the rules may be on their way."""
        now = self._log.now()
        if since and now - since > UNKNOWN_LIMIT:
            self._end(item, DeadLettered(reason=DeadReason.ROUTE_REMOVED, detail="the rules no longer name it"))
            return
        self._metrics.spills.labels(item.delivery.destination, SpillReason.UNKNOWN_NAME).inc()
        item.delivery = replace(item.delivery, due=now + UNKNOWN_RETRY)
        self._defer(item, item.delivery.due, now, {"unknown_since": f"{since or now:.3f}"})

    def _end(self, item: Item, outcome: DeadLettered | Dropped) -> None:
        if isinstance(outcome, Dropped):
            self._log_end(item, outcome, len(item.delivery.attempts))
            self._finish(item)
        else:
            self._succeed(item, self._topics.dead, {"reason": outcome.reason, "detail": outcome.detail}, outcome)

    def _succeed(self, item: Item, topic: str, note: Mapping[str, str], end: DeadLettered | None = None) -> None:
        tracker = item.pending.tracker
        if not tracker.is_live:
            if self._given_up.get(tracker.partition) is tracker:
                item.is_waiting = True  # until it is known whose the partition is now
                item.end = end
            else:
                self._finish(item)  # another owner reads it again; only the memory is given back
            return
        item.is_waiting = False
        item.delivery = replace(item.delivery, successor=item.delivery.successor + 1)
        self._spawn(self._write_successor(item, topic, note, end), "worker-successor")

    async def _write_successor(self, item: Item, topic: str, note: Mapping[str, str], end: DeadLettered | None) -> None:
        delivery = item.delivery
        headers = encode_delivery(delivery, note)
        key = (delivery.destination or delivery.event.source).encode()
        try:
            await self._append(item.pending, topic, key, delivery.event.body, headers)
        except RecordTooLargeError:
            # Only the log's limit having been lowered leads here; the attempts' texts are what can be spared.
            end = end or DeadLettered(reason=DeadReason.TOO_LARGE, detail="too large for the retry topic")
            slim = replace(delivery, attempts=delivery.attempts[-1:])
            headers = encode_delivery(slim, {"reason": end.reason, "detail": end.detail[:200]})
            await self._append(item.pending, self._topics.dead, key, delivery.event.body, headers)
        if end is not None:
            self._metrics.dead_letters.labels(delivery.route, delivery.destination, end.reason).inc()
            self._log_end(item, end, delivery.attempts[-1].number if delivery.attempts else 0)
        self._finish(item)

    def _bury(self, pending: Pending, record: Record, error: UndecodableRecordError) -> None:
        """Keep a record that can't be read among the dead letters, as it is."""
        pending.left = 1
        self._logger.error(
            "record_undecodable",
            topic=pending.tracker.partition.topic,
            partition=pending.tracker.partition.number,
            offset=record.offset,
            error=str(error),
        )
        self._spawn(self._write_undecodable(pending, record, error), "worker-successor")

    async def _write_undecodable(self, pending: Pending, record: Record, error: UndecodableRecordError) -> None:
        headers = [*record.headers, ("gw_undecodable", str(error).encode())]
        await self._append(pending, self._topics.dead, record.key, record.value, headers)
        self._metrics.dead_letters.labels("", "", DeadReason.UNDECODABLE).inc()
        self._done(pending)

    async def _append(self, pending: Pending, topic: str, key: bytes, value: bytes, headers: RecordHeaders) -> None:
        """Append until it is acknowledged, or until another owner has the record to take care of."""
        delay = 0.1
        while True:
            try:
                await self._log.append(topic, key=key, value=value, headers=headers)
            except LogUnavailableError as error:
                tracker = pending.tracker
                if not tracker.is_live and self._given_up.get(tracker.partition) is not tracker:
                    return
                self._logger.warning("append_repeated", topic=topic, error=str(error))
                await self._sleep(delay)
                delay = min(5.0, delay * 2)
            else:
                return

    def _finish(self, item: Item) -> None:
        pending = item.pending
        pending.left -= 1
        if pending.left == 0:
            self._done(pending)

    def _done(self, pending: Pending) -> None:
        self._bytes -= pending.size
        pending.tracker.finish(pending)
        pending.items.clear()  # They know it, too: its body would stay in memory until the garbage collector comes.

    def _log_end(self, item: Item, outcome: Outcome, attempts: int) -> None:
        delivery = item.delivery
        event = delivery.event
        seconds = self._log.now() - event.received_at
        detail: dict[str, str] = {}
        if isinstance(outcome, Delivered):
            name = "delivered"
            self._metrics.delivery_duration.labels(delivery.route).observe(seconds)
        elif isinstance(outcome, DeadLettered):
            name = "dead_lettered"
            detail = {"reason": outcome.reason}
            if outcome.reason is not DeadReason.EXPRESSION_ERROR:
                detail["detail"] = outcome.detail  # what failed in an expression may be a piece of the body
        else:
            name = "dropped"
            detail = {"detail": outcome.detail}
        self._metrics.deliveries.labels(delivery.route, delivery.destination, name).inc()
        self._logger.info(
            "delivery_finished",
            outcome=name,
            event_id=event.id,
            delivery_id=delivery.id,
            source=event.source,
            route=delivery.route,
            destination=delivery.destination,
            attempts=attempts,
            seconds=round(seconds, 4),
            **detail,
        )

    # House-keeping.

    async def _keep_house(self) -> None:
        next_gauges = 0.0
        while True:
            await self._sleep(self._until_next_look())
            now = self._log.now()
            count = 0
            while self._soon and self._soon[0][0] <= now and not self._is_draining:
                item = heapq.heappop(self._soon)[2]
                item.is_waiting = False
                self._admit(item, now)
                count += 1
                if count % RETRIES_AT_ONCE == 0:
                    await self._sleep(0)
            for lane in self._lanes.values():
                if lane.waiting:
                    self._pump(lane, now)
                    for spill in lane.overdue(now):
                        self._spill(spill, now)
            if self._is_draining:
                continue
            for tracker in list(self._trackers.values()):
                self._watch(tracker, now)
            if now >= next_gauges:
                next_gauges = now + 1.0
                self._set_gauges(now)

    def _until_next_look(self) -> float:
        if any(lane.waiting for lane in self._lanes.values()):
            return TICK
        due = [entry[0] for entry in self._soon[:1]]
        due += [
            tracker.buffered[0].appended_at + tracker.delay
            for tracker in self._trackers.values()
            if tracker.delay is not None and tracker.buffered
        ]
        return max(0.001, min(IDLE_TICK, min(due) - self._log.now())) if due else IDLE_TICK

    def _watch(self, tracker: Tracker, now: float) -> None:
        progress = tracker.progress
        if not tracker.buffered:
            self._unpause(tracker)
        if progress.fullness() < CUT_SHORT:
            return
        for item in list(tracker.holding_back()):
            if item.scope is not None:
                item.scope.reschedule(asyncio.get_running_loop().time())
                item.scope = None  # once: a deadline that is expiring can't be moved any more
            elif item.is_waiting and (lane := self._lanes.get(item.delivery.destination)) is not None:
                lane.remove([item])
                self._soon = [entry for entry in self._soon if entry[2] is not item]
                heapq.heapify(self._soon)
                item.is_waiting = False
                due = max(lane.place(now), now + TIERS[planner.SHORTEST])
                self._spill(Spill(item=item, reason=SpillReason.WINDOW_FULL, due=due), now)

    def _set_gauges(self, now: float) -> None:
        metrics = self._metrics
        rules = self._rules()
        soon = Counter(item.delivery.destination for _, _, item in self._soon)
        for name in rules.destinations:
            lane = self._lanes.get(name)
            metrics.deliveries_in_flight.labels(name).set(lane.in_flight if lane else 0)
            metrics.deliveries_waiting.labels(name).set((lane.waiting if lane else 0) + soon[name])
            metrics.breaker_open.labels(name).set(lane is not None and lane.breaker.is_open)
            metrics.destination_paused.labels(name).set(self._control.paused_by("", name) is not None)
        lag: dict[str, int] = dict.fromkeys(self._subscribed, 0)
        oldest: dict[str, float] = dict.fromkeys(self._subscribed, 0.0)
        known = self._consumer.lag() if self._consumer is not None else {}
        for partition, tracker in self._trackers.items():
            topic = partition.topic
            lag[topic] = lag.get(topic, 0) + known.get(partition, 0) + len(tracker.buffered)
            since = tracker.oldest_undone()
            if since is not None:
                oldest[topic] = max(oldest.get(topic, 0.0), now - since)
        for topic, count in lag.items():
            metrics.log_lag.labels(topic).set(count)
            metrics.oldest_undone.labels(topic).set(oldest[topic])
        for tier in TIERS:
            metrics.retry_backlog.labels(tier).set(lag.get(self._topics.retry(tier), 0))
        for name in [name for name, lane in self._lanes.items() if name not in rules.destinations]:
            if not self._lanes[name].waiting and not self._lanes[name].in_flight:
                del self._lanes[name]

    async def _keep_committing(self) -> None:
        while True:
            await self._sleep(COMMIT_EVERY)
            await self._commit()

    async def _commit(self) -> None:
        commits = {
            partition: commit
            for partition, tracker in self._trackers.items()
            if (commit := tracker.progress.committable()) is not None
        }
        if not commits or self._consumer is None:
            return
        trackers = {partition: self._trackers[partition] for partition in commits}
        try:
            await self._consumer.commit(commits)
        except LogUnavailableError as error:
            self._logger.warning("commit_repeated", error=str(error))
            return
        for partition, tracker in trackers.items():
            tracker.progress.committed(commits[partition])
            tracker.forget_copies()

    async def _drain(self, loops: Iterable[asyncio.Task[None]]) -> None:
        """Let what is under way end, leave the rest to the next owner, commit, and leave the group."""
        until = asyncio.get_running_loop().time() + DRAIN_TIMEOUT * 0.8
        self._soon.clear()
        waiting = self._waiting_items()
        for lane in self._lanes.values():
            lane.remove(waiting)
        # A record of which something was delivered or tried ends here, or the next owner would do that again.
        begun = [item for item in waiting if item.pending.has_begun]
        now = self._log.now()
        for item in begun:
            self._defer(item, item.delivery.due, now, {})
        while self._deliveries and asyncio.get_running_loop().time() < until:
            await self._sleep(0.01)
        for task in loops:
            task.cancel()
        if self._deliveries:
            self._logger.warning("drain_cut_short", unfinished=len(self._deliveries))
        if self._consumer is not None:
            await self._consumer.close()
        for task in self._deliveries:
            task.cancel()

    def _spawn(self, work: Coroutine[None, None, None], name: str) -> None:
        assert self._tasks is not None
        task = self._tasks.create_task(self._tracked(work), name=name)
        self._deliveries.add(task)

    async def _tracked(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.current_task()
        assert task is not None
        try:
            await work
        finally:
            self._deliveries.discard(task)

    def _waiting_items(self) -> list[Item]:
        return [
            item
            for tracker in (*self._trackers.values(), *self._given_up.values())
            for pending in tracker.pendings.values()
            for item in pending.items
            if item.is_waiting
        ]

    def _forget(self, tracker: Tracker) -> None:
        """Let go of what another owner reads again; what is under way ends without effect."""
        for pending in tracker.pendings.values():
            if pending.tracker is not tracker:
                continue  # adopted
            pending.left -= sum(item.is_waiting for item in pending.items)
            if pending.left == 0:
                self._bytes -= pending.size

    def _limit_to_share(self) -> None:
        self._share = min(1.0, len(self._trackers) / self._partitions) if self._partitions and self._trackers else 1.0
        self._limit()

    def _limit(self) -> None:
        for name, lane in self._lanes.items():
            destination = self._rules().destinations.get(name)
            if destination is not None:
                lane.limit(concurrency=destination.concurrency, rate=destination.rate, share=self._share)


def _unrouted(event: Event) -> Delivery:
    """Return what carries an event whose source isn't known here: no route and no destination yet."""
    return Delivery(id=delivery_id(event.id, "", ""), event=event, route="", destination="")


def _unknown_since(filed: Filed) -> float:
    return float(filed.note.get("unknown_since", 0))
