"""The loop of the router: read records, let their deliveries out, and commit what is done.

    event ──────────▶ match ──▶ one Item per route and destination ──▶ dispatch ──▶ done ──▶ commit
    tier record ──▶ held until due ──▶ its Item ─────────────────────────┘

A record is done when each of its deliveries is; only done records are committed. If a successor can't be written, its
record stays undone, the partition backs up and `gateway_oldest_undone_seconds` rises.

What becomes of a delivery is `dispatch`'s affair. Time, log and network are handed in.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence

from structlog.typing import FilteringBoundLogger

from gateway.engine.control import Control
from gateway.engine.dispatch import IDLE_TICK, RETRIES_AT_ONCE, Client, Dispatcher
from gateway.engine.lanes import Lane
from gateway.engine.tracker import Item, Ownership, Pending, Tracker
from gateway.log.base import Assignment, Batch, Commit, Consumer, Log, Partition, Record
from gateway.log.records import decode_delivery, decode_event
from gateway.log.topics import ROUTER_GROUP, TIERS, Topics
from gateway.model import (
    DeadLettered,
    DeadReason,
    Delivery,
    Event,
    ExpressionError,
    LogUnavailableError,
    UndecodableRecordError,
    delivery_id,
)
from gateway.rules.expressions import View
from gateway.rules.rules import Rules
from gateway.telemetry.metrics import Metrics

DRAIN_TIMEOUT = 20.0
"""Seconds after which what is under way is left to the next owner."""
COMMIT_EVERY = 1.0
GAUGES_EVERY = 1.0
RECORDS_AT_ONCE = 32
"""Records routed before other tasks get their turn: about a millisecond."""
PRESSED_WAIT = 0.1
"""Seconds for which a full but fast lane may hold the reader back."""
CUT_SHORT = 0.75
"""Share of a window at which its lowest undone record is made to end."""
RECORD_OVERHEAD = 1024
"""Bytes that a record takes in memory beside its value and headers, about."""


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
        self._control = control
        self._metrics = metrics
        self._logger = logger
        self._sleep = sleep
        self._dispatch = Dispatcher(
            log=log,
            topics=topics,
            rules=rules,
            client=client,
            control=control,
            metrics=metrics,
            logger=logger,
            sleep=sleep,
            on_done=self._done,
        )
        self._budget = self._dispatch.budget
        self._trackers: dict[Partition, Tracker] = {}
        self._suspended: dict[Partition, Tracker] = {}
        self._tiers = {topics.retry(name): delay for name, delay in TIERS.items()}
        self._partitions = 0
        self._consumer: Consumer | None = None
        self._subscribed: frozenset[str] = frozenset()
        self._is_draining = False
        self._drain_timeout = DRAIN_TIMEOUT
        self._stopped = asyncio.Event()
        self._changed = asyncio.Event()

    async def run(self) -> None:
        """Route and deliver until `stop`, then drain and commit. Raises what a broken log or a bug makes it raise."""
        async with asyncio.TaskGroup() as tasks:
            self._dispatch.start(tasks)
            await self._subscribe()
            loops = [
                tasks.create_task(self._read(), name="worker-read"),
                tasks.create_task(self._keep_releasing(), name="worker-release"),
                tasks.create_task(self._keep_watch(), name="worker-watch"),
                tasks.create_task(self._keep_committing(), name="worker-commit"),
                tasks.create_task(self._dispatch.run(), name="worker-dispatch"),
            ]
            await self._stopped.wait()
            await self._drain(loops)

    def stop(self, drain_timeout: float = DRAIN_TIMEOUT) -> None:
        """Take nothing in any more and let `run` end; attempts under way have so many seconds to end, too."""
        self._drain_timeout = drain_timeout
        self._is_draining = True
        self._stopped.set()
        self._changed.set()

    def reload(self) -> None:
        """Act on new rules: limits at once, topics with the next fetch."""
        self._dispatch.limit()
        self._changed.set()

    # The listener of the consumer: both return at once, and nothing is fetched meanwhile.

    def assigned(self, assignments: Sequence[Assignment]) -> None:
        """Start, or go on, with these partitions."""
        returning: list[Item] = []
        for assignment in assignments:
            partition = assignment.partition
            tracker = Tracker(assignment, self._tiers.get(partition.topic))
            if tracker.progress.lost:
                self._logger.error(
                    "records_lost", topic=partition.topic, partition=partition.number, count=tracker.progress.lost
                )
            old = self._suspended.pop(partition, None)
            if old is not None:
                returning += tracker.adopt(old)
                self._lose(old)
            self._trackers[partition] = tracker
        for old in self._suspended.values():
            self._lose(old)
        self._suspended.clear()
        share = len(self._trackers) / self._partitions if self._partitions and self._trackers else 1.0
        self._dispatch.limit(min(1.0, share))
        for item in returning:
            self._dispatch.admit(item)

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
            tracker.ownership = Ownership.SUSPENDED
            tracker.buffered.clear()
            self._suspended[partition] = tracker
        self._dispatch.withdraw(_waiting_in(self._suspended.values()))
        return commits

    def _lose(self, tracker: Tracker) -> None:
        """Let go of what another owner reads again; what is under way ends without effect."""
        tracker.ownership = Ownership.LOST
        for pending in tracker.pendings.values():
            if pending.tracker is not tracker:
                continue  # adopted
            pending.left -= sum(item.is_waiting for item in pending.items)
            if pending.left == 0:
                self._budget.held -= pending.size

    # Reading.

    async def _subscribe(self) -> None:
        """Read the topics of the rules, and those of sources that are there no more."""
        topics = {source.topic or self._topics.events(source.name) for source in self._rules().sources.values()}
        wanted = self._subscribed.union(topics, self._tiers)
        if self._consumer is not None:
            if wanted == self._subscribed:
                return
            consumer, self._consumer = self._consumer, None
            await consumer.close()
        group = self._topics.group(ROUTER_GROUP)
        present = set(await self._log.topics())
        events = {name for name in present if name.startswith(self._topics.events(""))}
        wanted = wanted.union(events, present.intersection(await self._log.topics_of(group)))
        self._partitions = 0
        for topic in wanted:
            self._partitions += len(await self._log.bounds(topic))
        self._subscribed = wanted
        self._consumer = await self._log.consume(group=group, topics=sorted(wanted), listener=self)

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
            if self._budget.is_full:
                await self._sleep(0.005)
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
        """Match an event and let its deliveries out; return a lane that is worth waiting for."""
        pending = self._begin(tracker, record)
        if pending is None:
            return None
        try:
            event = decode_event(record)
        except UndecodableRecordError as error:
            self._dispatch.bury(pending, record, error)
            return None
        return self._fan_out(pending, event, {})

    def _begin(self, tracker: Tracker, record: Record) -> Pending | None:
        size = len(record.value) + RECORD_OVERHEAD
        for _, value in record.headers:
            size += len(value)
        pending = tracker.begin(record, size)
        if pending is not None:
            self._budget.held += size
        return pending

    def _fan_out(self, pending: Pending, event: Event, note: Mapping[str, str]) -> Lane | None:
        rules = self._rules()
        if event.source not in rules.sources:
            nowhere = Delivery(id=delivery_id(event.id, "", ""), event=event, route="", destination="")
            self._dispatch.keep_unknown(pending.add(nowhere, note=note))
            return None
        matches = rules.table.match(View.of(event))
        if not matches:
            self._metrics.unrouted.labels(event.source).inc()
            self._done(pending)
            return None
        items: list[tuple[Item, ExpressionError | None]] = []
        for route, error in matches:
            for name in route.destinations:
                delivery = Delivery(
                    id=delivery_id(event.id, route.name, name), event=event, route=route.name, destination=name
                )
                items.append((pending.add(delivery), error))
        # Invariant: every item is there before the first can end, or the record would be done too early.
        pressed: Lane | None = None
        for item, error in items:
            if error is not None:
                self._dispatch.end(item, DeadLettered(reason=DeadReason.EXPRESSION_ERROR, detail=str(error)))
                continue
            lane = self._dispatch.admit(item)
            if lane is not None and lane.is_pressed:
                pressed = lane
        return pressed

    # Tiers.

    async def _keep_releasing(self) -> None:
        """Release what is due, in turn with everything else: a backlog that comes due at once delays nobody."""
        while not self._is_draining:
            has_more = False
            for tracker in list(self._trackers.values()):
                if tracker.buffered and tracker.is_live and self._release(tracker):
                    has_more = True
                    await self._sleep(0)
            await self._sleep(0 if has_more else self._until_next_release())

    def _until_next_release(self) -> float:
        due = [
            tracker.buffered[0].appended_at + tracker.delay
            for tracker in self._trackers.values()
            if tracker.delay is not None and tracker.buffered
        ]
        return max(0.001, min(IDLE_TICK, min(due) - self._log.now())) if due else IDLE_TICK

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
            if buffered[0].appended_at + tracker.delay > now or self._budget.is_full:
                return False
            self._resume(tracker, buffered.popleft(), tracker.delay, now)
        return True

    def _resume(self, tracker: Tracker, record: Record, delay: float, now: float) -> None:
        pending = self._begin(tracker, record)
        if pending is None:
            return
        try:
            filed = decode_delivery(record)
        except UndecodableRecordError as error:
            self._dispatch.bury(pending, record, error)
            return
        delivery = filed.delivery
        if tracker.is_copy(delivery, record.offset) or self._control.is_kicked(
            delivery.route, delivery.destination, tracker.partition, record.offset
        ):
            self._done(pending)
        elif not delivery.route:
            self._fan_out(pending, delivery.event, filed.note)
        else:
            item = pending.add(delivery, is_retry=True, note=filed.note)
            if now < min(delivery.due, filed.at + delay):
                # The clock of this partition's leader is behind ours: not yet, or it would go round and round.
                self._dispatch.wait(item, filed.at + delay)
            else:
                self._dispatch.admit(item, now)

    def _pause(self, tracker: Tracker) -> None:
        if self._consumer is not None and tracker.is_live and not tracker.is_paused:
            tracker.is_paused = True
            self._consumer.pause(tracker.partition)

    def _unpause(self, tracker: Tracker) -> None:
        if self._consumer is not None and tracker.is_paused and tracker.progress.has_room():
            tracker.is_paused = False
            self._consumer.resume(tracker.partition)

    # Progress.

    def _done(self, pending: Pending) -> None:
        self._budget.held -= pending.size
        pending.tracker.finish(pending)
        pending.items.clear()  # They know it, too: its body would stay in memory until the garbage collector comes.

    async def _keep_watch(self) -> None:
        next_gauges = 0.0
        while not self._is_draining:
            now = self._log.now()
            for tracker in list(self._trackers.values()):
                if not tracker.buffered:
                    self._unpause(tracker)
                if tracker.progress.fullness() >= CUT_SHORT:
                    for item in list(tracker.holding_back()):
                        self._dispatch.cut_short(item, now)
            if now >= next_gauges:
                next_gauges = now + GAUGES_EVERY
                self._set_gauges(now)
            await self._sleep(IDLE_TICK)

    def _set_gauges(self, now: float) -> None:
        self._dispatch.set_gauges()
        metrics = self._metrics
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
        until = asyncio.get_running_loop().time() + self._drain_timeout
        waiting = _waiting_in([*self._trackers.values(), *self._suspended.values()])
        self._dispatch.withdraw(waiting)
        # A record of which something was delivered or tried ends here, or the next owner would do that again.
        await self._dispatch.drain([item for item in waiting if item.pending.has_begun], until)
        for task in loops:
            task.cancel()
        if self._consumer is not None:
            await self._consumer.close()
        self._dispatch.abandon()


def _waiting_in(trackers: Iterable[Tracker]) -> list[Item]:
    """Return the deliveries that wait for their turn."""
    return [
        item
        for tracker in trackers
        for pending in tracker.pendings.values()
        for item in pending.items
        if item.is_waiting
    ]
