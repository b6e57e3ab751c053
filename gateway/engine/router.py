"""The router: matches each event once, lets its deliveries out, and takes up again what tiers have kept.

    event ──────────▶ match ──▶ one Item per route and destination ──▶ dispatch ──▶ done ──▶ commit
                                     └─ of an ordered route ──▶ its topic ────────────▲
    tier record ──▶ held until due ──▶ its Item ─────────────────────────┘

A record is done when each of its deliveries is; only done records are committed. If a successor can't be written, its
record stays unfinished, the partition backs up and `gateway_oldest_pending_seconds` rises.
"""

import asyncio
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace

from typing_extensions import override

from gateway.engine import tiers
from gateway.engine.control.records import Order
from gateway.engine.dedupe.filter import Duplicates
from gateway.engine.delivery.dispatcher import RETRIES_AT_ONCE, Dispatcher
from gateway.engine.delivery.lanes import MAX_BYTES, Lane
from gateway.engine.delivery.outcomes import is_late
from gateway.engine.delivery.schedule import IDLE_TICK
from gateway.engine.group_member import FULL_POLL_INTERVAL, Loop, Member
from gateway.engine.ordered.appender import Sequences
from gateway.engine.partition_tracker import Item, Pending, Tracker
from gateway.engine.routing_history_updates import Readings
from gateway.engine.services import Services
from gateway.log.base import Assignment, Batch, Commit, Partition, Record
from gateway.log.records import Origin, decode_delivery, decode_event, note_of
from gateway.log.topics import ROUTER_GROUP, TIERS
from gateway.model import (
    NO_NOTE,
    DeadLettered,
    DeadReason,
    Delivery,
    Event,
    LogUnavailableError,
    NewerRecordError,
    Note,
    RecordTooLargeError,
    UndecodableRecordError,
    delivery_id,
)
from gateway.rules.event_view import EventView
from gateway.rules.routing_revision import routing_revision

GAUGES_EVERY, GAUGES_AT_ONCE = 1.0, 1000
"""Seconds between two looks at so many destinations, which cost 10 ms; where there are more, there is more time."""
RECORDS_AT_ONCE = 32
"""Records routed before other tasks get their turn: about a millisecond."""
TURN = 0.003
"""Seconds of routing after which they get it in any case: a rule's condition may take tens of milliseconds."""
PRESSED_WAIT = 0.1
"""Seconds for which a full but fast lane may hold the reader back."""
HELD_POLL_INTERVAL = 0.25
"""Seconds after which a delivery looks again whether a kick has injected it."""
RELEASE_EVERY = 0.001
"""Seconds between releases of a few records, so that lanes have answers meanwhile and learn what they can take."""
AHEAD, AHEAD_BYTES = 500, 1 << 20
"""Records of a tier that are held, at which it isn't read on although all of them are due."""
TELL_AGAIN = 1.0
TELL_AGAIN_TOO_LARGE = 60.0
"""Seconds until it is told again by which rules is read, where that couldn't be stored, or was too large to be."""
CUT_SHORT = 0.75
"""Share of a window at which its lowest unfinished record is made to end."""


class Router(Member):
    """A member of the group that reads every event and every tier."""

    def __init__(self, services: Services, dispatch: Dispatcher, duplicates: Duplicates) -> None:
        super().__init__(services, dispatch, duplicates, services.topics.group(ROUTER_GROUP), memory=MAX_BYTES)
        self._tiers = {services.topics.retry(name): delay for name, delay in TIERS.items()}
        self._partitions = 0
        self._is_counted = True
        self._readings = Readings(services.control.history)
        self._has_to_tell = asyncio.Event()
        self._told: set[str] = set()
        self._sequences = Sequences(services, dispatch)
        self._ordered = services.rules().ordered
        self._unsettled: dict[Partition, list[Pending]] = {}
        """Of each partition of events the records that would be put in order if they were read again, and weren't."""

    @override
    def loops(self) -> Iterable[tuple[str, Loop]]:
        return (
            *super().loops(),
            ("release", self._keep_releasing),
            ("gauges", self._keep_gauges),
            ("tell", self._keep_telling),
        )

    @override
    async def wanted(self) -> frozenset[str]:
        """Return the topics of the rules, of sources that are there no more, and the tiers."""
        topics = self._services.topics
        sources = self._services.rules().sources.values()
        needed = {source.topic or topics.events(source.name) for source in sources}.union(self._tiers)
        if needed <= self.subscribed:
            return self.subscribed
        present = set(await self._log.topics())
        events = {name for name in present if name.startswith(topics.events(""))}
        begun = present.intersection(self.subscribed.union(await self._log.topics_of(self._group)))
        wanted = frozenset(needed.union(events, begun))
        await self._count_partitions(wanted)
        return wanted

    async def _count_partitions(self, topics: Collection[str]) -> None:
        """Count all that there are, of which this member's are a share; a topic may have got more."""
        self._partitions = sum((await self._log.partitions(topics)).values())
        self._is_counted = True

    @override
    def delay_of(self, topic: str) -> float | None:
        return self._tiers.get(topic)

    @override
    def prune_lost(self) -> None:
        self._is_counted = False
        self._dispatch.limit(self.share)

    @property
    def share(self) -> float:
        """What this process may use of a limit of the whole fleet."""
        return min(1.0, len(self.trackers) / self._partitions) if self._partitions and self.trackers else 1.0

    # By which rules events are routed: no delivery waits for that to be told.

    @override
    def assigned(self, assignments: Sequence[Assignment]) -> None:
        edition = routing_revision(self._services.rules())
        for assignment in assignments:
            if self.delay_of(assignment.partition.topic) is None:
                if self.is_of_another_log(assignment):
                    self._readings.forget(assignment.partition)
                self._readings.took_over(assignment.partition, assignment.commit, edition)
        super().assigned(assignments)
        self._has_to_tell.set()

    @override
    async def revoked(self, partitions: Sequence[Partition]) -> Mapping[Partition, Commit]:
        leaving = [self.trackers[partition] for partition in partitions if partition in self.trackers]
        commits = await super().revoked(partitions)
        for tracker in leaving:
            self._readings.left(tracker.partition, tracker.progress.last_received)
        return commits

    @override
    def let_go(self) -> None:
        super().let_go()
        self._readings.let_go()

    @override
    def reload(self) -> None:
        super().reload()
        taken = {partition: tracker.progress.last_received for partition, tracker in self.trackers.items()}
        self._readings.reloaded(routing_revision(self._services.rules()), taken)
        self._has_to_tell.set()
        before, self._ordered = self._ordered, self._services.rules().ordered
        self._unsettle(self._ordered - before)

    def _unsettle(self, added: frozenset[tuple[str, str]]) -> None:
        """Note which deliveries under way would be put in order if their events were read again."""
        for tracker in [*self.trackers.values(), *self._leaving, *self._suspended.values()] if added else ():
            unsettled = [
                pending
                for pending in tracker.pendings.values()
                if any((item.delivery.route, item.delivery.destination) in added for item in pending.items)
            ]
            if unsettled and tracker.delay is None:
                self._unsettled[tracker.partition] = [*self._unsettled.get(tracker.partition, ()), *unsettled]

    @override
    def tick(self) -> None:
        super().tick()
        if self._readings.unsaid() is not None:
            self._has_to_tell.set()

    async def _keep_telling(self) -> None:
        while not self._is_draining:
            await self._has_to_tell.wait()
            self._has_to_tell.clear()
            try:
                await self._tell()
            except LogUnavailableError as error:
                self._services.logger.warning("append_retried", topic=self._services.topics.control, error=str(error))
                await self._services.sleep(TELL_AGAIN)
            except RecordTooLargeError as error:  # since the log's limit was lowered, say
                self._services.logger.warning("rules_history_not_stored", error=str(error))
                await self._services.sleep(TELL_AGAIN_TOO_LARGE)

    async def _tell(self) -> None:
        history = self._services.control.history
        while (what := self._readings.unsaid()) is not None:
            now, edition = self._log.now(), what.edition
            if not history.knows(edition.name) and edition.name not in self._told:
                text, base = history.told(edition)
                order = Order(kind="rules", name=edition.name, state="done", at=now, edition=base, routes=text)
                await self._append(order)
                self._told.add(edition.name)
            order = self._readings.order(what, now)
            await self._append(order)
            self._readings.said(what, order.name)

    async def _append(self, order: Order) -> None:
        key, value = order.encode()
        await self._log.append(self._services.topics.control, key=key, value=value, headers=[])

    @override
    def resume(self, item: Item, now: float) -> None:
        delivery, pending = item.delivery, item.pending
        control, tracker = self._services.control, pending.tracker
        if tracker.delay is not None and not pending.is_made_here:
            place = (delivery.route, delivery.destination, tracker.partition, pending.offset)
            if control.is_kicked(*place):
                self._dispatch.drop(item)
                return
            if control.is_held(*place):
                self._dispatch.wait(item, now + HELD_POLL_INTERVAL)
                return
        if delivery.route:
            self._dispatch.admit(item, now)
            return
        # Its source was unknown when it was read; it goes on from there, or it would pass for a copy of what it was.
        pending.items.clear()
        pending.left = 0
        pending.is_made_here = True
        self._fan_out(pending, delivery.event, item.note, delivery.successor, now=now, origin=None)

    @override
    async def take(self, tracker: Tracker, batch: Batch) -> None:
        if tracker.delay is not None:
            # A tier's head is always the one due first: hold what was read, and read on when it is through.
            tracker.buffered.extend(batch.records)
            if not self._reads_on(tracker):
                self.pause(tracker)
            self._release(tracker)
            return
        now = self._log.now()
        until = now + TURN
        for count, record in enumerate(batch.records, 1):
            if not tracker.is_live or self._is_draining:
                return
            if not self.has_room:  # each may have been for a thousand destinations
                self.set_aside(tracker, batch.records[count - 1 :])
                return
            pressed = self._route(tracker, record, now)
            now = self._log.now()
            if pressed is not None:
                await self._wait_for(pressed)
            elif count % RECORDS_AT_ONCE == 0 or now > until:
                await self._services.sleep(0)
            else:
                continue
            now = self._log.now()
            until = now + TURN
        if not tracker.progress.has_room():
            self.pause(tracker)

    async def _wait_for(self, lane: Lane) -> None:
        until = self._log.now() + PRESSED_WAIT
        while lane.is_pressed and not self._is_draining:
            if self._log.now() > until:
                lane.was_slow(self._log.now())
                return
            await self._services.sleep(0.001)

    def _route(self, tracker: Tracker, record: Record, now: float) -> Lane | None:
        """Match an event and let its deliveries out; return a lane that is worth waiting for."""
        pending = self.begin(tracker, record, now)
        if pending is None:
            return None
        try:
            event = decode_event(record)
        except UndecodableRecordError as error:
            self._dispatch.dead_letter_unreadable(pending, record, error)
            return None
        except NewerRecordError as error:
            self.leave(pending, error)
            self._unsettled.setdefault(tracker.partition, []).append(pending)
            return None
        if self.is_duplicate(tracker, record, event):
            self.done(pending)
            return None
        traces = self._services.traces
        origin = Origin(tracker.partition, record.offset, record.appended_at)
        if traces is None:
            return self._fan_out(pending, event, NO_NOTE, 0, now=now, origin=origin)
        topic, partition = tracker.partition
        with traces.process(event, group=self._group, topic=topic, partition=partition, offset=record.offset) as span:
            pressed = self._fan_out(pending, replace(event, trace=span.context), NO_NOTE, 0, now=now, origin=origin)
            span.set_attributes({"gateway.routes": sorted({item.delivery.route for item in pending.items})})
        return pressed

    def _fan_out(
        self,
        pending: Pending,
        event: Event,
        note: Note,
        successor: int,
        *,
        now: float,
        origin: Origin | None,
    ) -> Lane | None:
        """Make an event's deliveries, and send each on. One without an origin has lost its place in the order."""
        rules = self._services.rules()
        if event.source not in rules.sources:
            nowhere = Delivery(
                id=delivery_id(event.id, "", ""), event=event, route="", destination="", successor=successor
            )
            if origin is not None:
                self._unsettled[origin.partition] = [*self._still_unsettled(origin), pending]
            self._dispatch.defer_unknown(pending.add(nowhere, note=note))
            return None
        matches = rules.table.match(EventView.of(event))
        if not matches:
            self._services.metrics.unrouted.labels(event.source).inc()
            self._services.metrics.unrouted_events.add(event)
        items: list[tuple[Item, DeadLettered | None, bool]] = []
        for route, error in matches:
            end = None if error is None else DeadLettered(reason=DeadReason.EXPRESSION_ERROR, detail=str(error))
            for name in route.destinations:
                delivery = Delivery(
                    id=delivery_id(event.id, route.name, name),
                    event=event,
                    route=route.name,
                    destination=name,
                    successor=successor,
                )
                items.append((pending.add(delivery), end, route.order is not None))
        if not items:
            self.done(pending)
            return None
        # Invariant: every item is there before the first can end, or the record would be done too early.
        pressed: Lane | None = None
        for item, end, is_ordered in items:
            if is_ordered:
                self._put_in_order(item, end, origin)
            elif end is not None:
                self._dispatch.end(item, end)
            else:
                lane = self._dispatch.admit(item, now)
                pressed = lane if lane is not None and lane.is_pressed else pressed
        return pressed

    def _put_in_order(self, item: Item, end: DeadLettered | None, origin: Origin | None) -> None:
        """Send a delivery of an ordered route to its topic, where it ends in its turn if it has to."""
        if end is not None:
            item.note = Note(reason=end.reason, detail=end.detail)
        self._sequences.put(item, origin, self._still_unsettled(origin))

    def _still_unsettled(self, origin: Origin | None) -> list[Pending]:
        """Return the unsettled records before this one of its partition.

        An ordered delivery waits for them: read once more, after a crash, they would be taken for copies behind it.
        """
        if origin is None:
            return []
        before = self._unsettled.pop(origin.partition, ())
        left = [pending for pending in before if not pending.is_settled]
        if left:
            self._unsettled[origin.partition] = left
        return left

    # Tiers.

    async def _keep_releasing(self) -> None:
        """Release what is due, in turn with everything else: a backlog that comes due at once delays nobody."""
        while not self._is_draining:
            has_more = False
            for tracker in list(self.trackers.values()):
                if tracker.delay is not None and tracker.buffered and tracker.is_live and self._release(tracker):
                    has_more = True
                    await self._services.sleep(0)
            if not self.has_room:
                await self._services.sleep(FULL_POLL_INTERVAL)
            else:
                await self._services.sleep(RELEASE_EVERY if has_more else self._until_next_release())

    def _until_next_release(self) -> float:
        now = self._log.now()
        waits = [self._waits_until(tracker, now) for tracker in self.trackers.values() if tracker.buffered]
        return max(RELEASE_EVERY, min([IDLE_TICK, *(until - now for until in waits)]))

    def _waits_until(self, tracker: Tracker, now: float) -> float:
        """Return when the first of the records that are held of a tier is due: never while no commit reaches it."""
        first = tracker.buffered[0]
        if tracker.delay is None or not tracker.progress.reaches(first.offset):
            return math.inf
        return _due_at(tracker, first, now)

    def _release(self, tracker: Tracker) -> bool:
        """Take some records of a tier whose delay is over, and tell whether there are more of them.

        Once what was held is nearly all taken, the tier is read on.
        """
        assert tracker.delay is not None
        now = self._log.now()
        buffered = tracker.buffered
        for _ in range(RETRIES_AT_ONCE):
            if not buffered or self._waits_until(tracker, now) > now or not self.has_room:
                break
            self._take_up(tracker, buffered.popleft(), tracker.delay, now)
        if tracker.is_paused and len(buffered) < AHEAD // 2 and self._reads_on(tracker):
            self.unpause(tracker)
        return bool(buffered) and self._waits_until(tracker, now) <= now and self.has_room

    def _reads_on(self, tracker: Tracker) -> bool:
        """Return whether a tier is read on: when nothing of it is held, or little, all of which is due.

        A partition that was paused waits for the fetch under way: a backlog would come back at 100 records a fetch.
        """
        buffered = tracker.buffered
        if not buffered:
            return True
        now = self._log.now()
        is_due = _due_at(tracker, buffered[-1], now) <= now
        return is_due and len(buffered) < AHEAD and sum([len(record.value) for record in buffered]) < AHEAD_BYTES

    def _take_up(self, tracker: Tracker, record: Record, delay: float, now: float) -> None:
        pending = self.begin(tracker, record, now)
        if pending is None:
            return
        try:
            stored = decode_delivery(record)
        except UndecodableRecordError as error:
            self._dispatch.dead_letter_unreadable(pending, record, error)
            return
        except NewerRecordError as error:
            self.leave(pending, error)
            return
        delivery = stored.delivery
        if tracker.is_copy(delivery, record.offset):
            self.done(pending)
            return
        is_hurried = stored.note.is_hurried
        note = replace(stored.note, is_hurried=False) if is_hurried else stored.note
        if self._services.control.is_hurried(delivery.route, delivery.destination, tracker.partition, record.offset):
            delivery = replace(delivery, due=min(delivery.due, now))
        item = pending.add(delivery, is_retry=True, note=note)
        item.is_late = is_late(delivery, max(delivery.due, stored.at))  # and was counted by who stored it
        if now < min(delivery.due, stored.at + delay) and not is_hurried:
            # The clock of this partition's leader is behind ours: not yet, or it would go round and round.
            self._dispatch.wait(item, stored.at + delay)
        else:
            self.resume(item, now)

    @override
    def check_progress(self, tracker: Tracker) -> None:
        super().check_progress(tracker)
        progress, buffered = tracker.progress, tracker.buffered
        if progress.fullness() >= CUT_SHORT or (buffered and not progress.reaches(buffered[0].offset)):
            now = self._log.now()
            for item in list(tracker.holding_back()):
                self._dispatch.cut_short(item, now)

    # Gauges.

    async def _keep_gauges(self) -> None:
        turn = 0
        while not self._is_draining:
            self._dispatch.holds.update()
            if turn % max(1, len(self._services.rules().destinations) // GAUGES_AT_ONCE) == 0:
                await self._dispatch.holds.set_gauges()
            turn += 1
            if not self._is_counted:
                with suppress(LogUnavailableError):  # the next time, then
                    await self._count_partitions(self.subscribed)
                    self._dispatch.limit(self.share)
            metrics = self._services.metrics
            lag = self.lag()
            oldest = self.oldest_pending(self._log.now())
            for topic, count in lag.items():
                metrics.log_lag.labels(topic).set(count)
                metrics.oldest_pending.labels(topic).set(oldest[topic])
            left = Counter(events=0, retry=0)
            for partition, tracker in self.trackers.items():
                left[self._services.topics.kind_of(partition.topic)] += len(tracker.newer)
            for kind, count in left.items():
                self._dispatch.unreadable.left(kind, count)
            for tier in TIERS:
                metrics.retry_backlog.labels(tier).set(lag.get(self._services.topics.retry(tier), 0))
            await self._services.sleep(GAUGES_EVERY)


def _due_at(tracker: Tracker, record: Record, now: float) -> float:
    """Return when a record that is held of a tier comes out: after the tier's delay, at once where a kick wants it."""
    assert tracker.delay is not None
    due = record.appended_at + tracker.delay
    is_hurried = due > now and tracker.delay == TIERS[tiers.SHORTEST] and note_of(record).is_hurried
    return record.appended_at if is_hurried else due
