"""The router: matches each event once, dispatches its deliveries, and resumes retries from the tiers.

                        ┌─ of an ordered route ──▶ its topic ─── append acknowledged ────────────▼
    event ──────────▶ match ──▶ one PendingDelivery per route and destination ──▶ dispatch ──▶ done ──▶ commit
    tier record ──▶ kept until due ──▶ its PendingDelivery ──────────────────────────▲

A record is done when each of its deliveries is; only done records are committed. If a successor can't be written, its
record stays unfinished, the partition backs up and `gateway_oldest_pending_seconds` rises.
"""

import asyncio
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from dataclasses import replace

from typing_extensions import override

from gateway.engine import tiers
from gateway.engine.control.append import append_control_record
from gateway.engine.control.records import ControlRecord
from gateway.engine.dedupe.filter import DuplicateFilter
from gateway.engine.deliveries_of_event import Planned, is_to_be_planned, plan, plan_rest
from gateway.engine.delivery.destination_lanes import MAX_BYTES, Lane
from gateway.engine.delivery.dispatcher import RETRIES_AT_ONCE, Dispatcher
from gateway.engine.delivery.outcomes import is_late
from gateway.engine.delivery.queues import IDLE_TICK
from gateway.engine.event_topics import wanted_topics
from gateway.engine.group_member import FULL_POLL_INTERVAL, GroupMember, Loop
from gateway.engine.ordered.appender import OrderedAppender, ordered_rules
from gateway.engine.partition_tracker import PendingDelivery, PendingRecord, Tracker
from gateway.engine.routing_history_updates import RoutingHistoryUpdates
from gateway.engine.services import Services
from gateway.log.base import Assignment, Batch, Commit, Partition, Record
from gateway.log.records import Origin, decode_delivery, decode_event
from gateway.log.topics import ROUTER_GROUP, TIERS
from gateway.model import (
    NO_METADATA,
    Delivery,
    Event,
    LogUnavailableError,
    NewerRecordError,
    RecordMetadata,
    RecordTooLargeError,
    SpillReason,
    UndecodableRecordError,
    delivery_id,
)
from gateway.rules.event_view import EventView
from gateway.rules.routing_revision import routing_revision

GAUGE_INTERVAL, DESTINATIONS_PER_UPDATE = 1.0, 1000
"""Gauges of destinations are updated each second (10 ms for 1,000 of them), from n x 1,000 on every n-th second."""
RECORDS_PER_STEP = 32
"""Records routed between yields to the event loop: about a millisecond."""
TURN = 0.003
"""Seconds of routing after which other tasks run even sooner: a rule's condition may take tens of milliseconds."""
BACKPRESSURE_WAIT = 0.1
"""Maximum number of seconds that the reader waits for a full but fast lane."""
KICK_POLL_INTERVAL = 0.25
"""Seconds between checks whether a kick has injected a delivery that it announced."""
RELEASE_EVERY = 0.001
"""Seconds between releases of a few records: between them, responses arrive that show lanes their capacity."""
MAX_BUFFERED = 500
"""Due records buffered of a tier's partition at which reading pauses; it resumes below half of that."""
REPUBLISH_INTERVAL = 1.0
REPUBLISH_INTERVAL_TOO_LARGE = 60.0
"""Seconds until the routing history is published again after the append failed, or was rejected as too large."""
TOPIC_CHECK_INTERVAL = 60.0
"""Seconds between checks for deleted topics, and for topics that only another process's rules have, or had."""
CUT_SHORT = 0.75
"""Deliveries of an unfinished record are cut short once it lags by this share of its offset window."""


class Router(GroupMember):
    """The member of the group that reads all events and all tiers."""

    def __init__(self, services: Services, dispatcher: Dispatcher, duplicates: DuplicateFilter) -> None:
        super().__init__(services, dispatcher, duplicates, services.topics.group(ROUTER_GROUP), memory=MAX_BYTES)
        self._tiers = {services.topics.retry(name): delay for name, delay in TIERS.items()}
        self._tier_trackers: list[Tracker] = []  # may include reassigned ones, whose buffers are empty
        self._partitions = 0
        self._is_counted = True
        self._history_updates = RoutingHistoryUpdates(services.control.history)
        self._publish_requested = asyncio.Event()
        self._appender = OrderedAppender(services, dispatcher)
        self._ordered = ordered_rules(services.rules())

    @override
    def loops(self) -> Iterable[tuple[str, Loop]]:
        return (
            *super().loops(),
            ("release", self._keep_releasing),
            ("gauges", self._keep_gauges),
            ("publish", self._keep_publishing),
            ("topics", self._keep_looking_for_topics),
        )

    @override
    async def wanted(self) -> frozenset[str]:
        """Return the topics of the active rules, those of removed sources, and the tiers."""
        topics = self._services.topics
        sources = self._services.rules().sources.values()
        needed = {source.topic or topics.events(source.name) for source in sources}.union(self._tiers)
        wanted = await wanted_topics(self._log, topics, needed, self.subscribed, self.deleted_topics())
        if wanted != self.subscribed:
            await self._count_partitions(wanted)
        return wanted

    async def _keep_looking_for_topics(self) -> None:
        while not self._is_draining:
            await self._services.sleep(TOPIC_CHECK_INTERVAL)
            with suppress(LogUnavailableError):
                if await self.wanted() != self.subscribed:
                    self._changed.set()

    async def _count_partitions(self, topics: Collection[str]) -> None:
        """Count all partitions, to compute this member's share; a topic may have grown."""
        self._partitions = sum((await self._log.partitions(topics)).values())
        self._is_counted = True

    @override
    def delay_of(self, topic: str) -> float | None:
        return self._tiers.get(topic)

    @property
    @override
    def tiers(self) -> int:
        return len(self._tier_trackers)

    @override
    def assignment_changed(self) -> None:
        self._is_counted = False
        self._tier_trackers = [tracker for tracker in self.trackers.values() if tracker.delay is not None]
        self._dispatcher.set_limits(self.share)

    @property
    def share(self) -> float:
        """The fraction of a limit for the whole fleet that this process may use."""
        return min(1.0, len(self.trackers) / self._partitions) if self._partitions and self.trackers else 1.0

    # Routing history. Deliveries don't wait for it to be published.

    @override
    def assigned(self, assignments: Sequence[Assignment], without_position: Collection[Partition] = ()) -> None:
        revision = routing_revision(self._services.rules())
        for assignment in assignments:
            if self.delay_of(assignment.partition.topic) is None:
                if self.is_of_another_log(assignment):
                    self._history_updates.forget(assignment.partition)
                self._history_updates.took_over(assignment.partition, assignment.commit, revision, self._log.now())
        super().assigned(assignments, without_position)
        self._publish_requested.set()

    @override
    async def revoked(self, partitions: Sequence[Partition]) -> Mapping[Partition, Commit]:
        leaving = [self.trackers[partition] for partition in partitions if partition in self.trackers]
        commits = await super().revoked(partitions)
        for tracker in leaving:
            self._history_updates.revoked(tracker.partition, tracker.progress.last_received)
        return commits

    @override
    def forget_partitions(self, excluding: Collection[Partition] = ()) -> None:
        super().forget_partitions(excluding)
        self._history_updates.forget_revoked(excluding)

    @override
    def reload(self) -> None:
        super().reload()
        reading = [*self.trackers.values(), *self._leaving]
        taken = {tracker.partition: tracker.progress.last_received for tracker in reading}
        self._history_updates.reloaded(routing_revision(self._services.rules()), taken)
        self._publish_requested.set()
        before, self._ordered = self._ordered, ordered_rules(self._services.rules())
        self._defer_ordered({route.name for route in self._ordered - before})

    def _defer_ordered(self, routes: Collection[str]) -> None:
        """Let deliveries of these ordered routes wait until what was read by the former rules is committed.

        For every partition of events: a source may have moved, so any of them may still have its earlier events.
        """
        for tracker in [*self.trackers.values(), *self._leaving, *self._suspended.values()]:
            if routes and tracker.delay is None and tracker.end:
                tracker.reload_boundaries.add(routes, tracker.end)
                self._committer.hasten()

    @override
    def tick(self) -> None:
        super().tick()
        if self._history_updates.unpublished() is not None:
            self._publish_requested.set()

    async def _keep_publishing(self) -> None:
        while not self._is_draining:
            await self._publish_requested.wait()
            self._publish_requested.clear()
            try:
                await self._publish_history()
            except LogUnavailableError as error:
                self._services.logger.warning("append_retried", topic=self._services.topics.control, error=str(error))
                await self._services.sleep(REPUBLISH_INTERVAL)
            except RecordTooLargeError as error:  # for example because the log's limit was lowered
                self._services.logger.warning("rules_history_not_stored", error=str(error))
                await self._services.sleep(REPUBLISH_INTERVAL_TOO_LARGE)

    async def _publish_history(self) -> None:
        history = self._services.control.history
        while (update := self._history_updates.unpublished()) is not None:
            now, name = self._log.now(), update.revision.name
            if self._history_updates.lacks(name):
                text, base = history.encode_revision(update.revision)
                record = ControlRecord(kind="rules", name=name, state="done", at=now, revision=base, routes=text)
                await self._append(record)
                self._history_updates.mark_revision_published(name)
            record = self._history_updates.record(update, now)
            await self._append(record)
            self._history_updates.mark_published(update, record.name)

    async def _append(self, record: ControlRecord) -> None:
        await append_control_record(self._log, self._services.topics, record)

    @override
    def resume(self, pending: PendingDelivery, now: float) -> None:
        delivery, record = pending.delivery, pending.record
        control, tracker = self._services.control, record.tracker
        if tracker.delay is not None:
            args = (*record.kick_target, tracker.partition, record.offset)
            if control.was_injected_by_kick(*args, record.appended_at):
                self._dispatcher.finish(pending)
                return
            if control.is_kick_pending(*args):
                self._dispatcher.wait_in_memory(pending, now + KICK_POLL_INTERVAL)
                return
        if not is_to_be_planned(delivery, self._services.rules(), now):
            self._dispatcher.dispatch(pending, now)
            return
        # The deliveries made below keep its successor number: otherwise their retries would look like duplicates of it.
        record.deliveries.remove(pending)
        record.unfinished -= 1
        self._fan_out(record, delivery.event, pending, now=now, origin=None)

    @override
    async def on_batch(self, tracker: Tracker, batch: Batch) -> None:
        if tracker.delay is not None:
            # Usually a tier's first record is due first. Buffer what was read, and read on only while all of it is due.
            tracker.buffered.extend(batch.records, self._log.now())
            if not self._may_read_ahead(tracker):
                self.pause(tracker)
            self._release(tracker)
            return
        now = self._log.now()
        until = now + TURN
        for count, record in enumerate(batch.records, 1):
            if not tracker.is_live or self._is_draining:
                return
            if not self.has_room_for(tracker):  # each record may go to a thousand destinations
                self.postpone(tracker, batch.records[count - 1 :])
                return
            congested = self._route(tracker, record, now)
            now = self._log.now()
            if congested is not None:
                await self._wait_for_lane(congested)
            elif count % RECORDS_PER_STEP == 0 or now > until:
                await self._services.sleep(0)
            else:
                continue
            now = self._log.now()
            until = now + TURN
        if not tracker.progress.has_room():
            self.pause(tracker)

    async def _wait_for_lane(self, lane: Lane) -> None:
        until = self._log.now() + BACKPRESSURE_WAIT
        while lane.needs_backpressure and not self._is_draining:
            if self._log.now() > until:
                lane.record_slow_drain(self._log.now())
                return
            await self._services.sleep(0.001)

    def _route(self, tracker: Tracker, record: Record, now: float) -> Lane | None:
        """Match an event and dispatch its deliveries; return a lane to wait for, if one needs that."""
        pending_record = self.track(tracker, record, now)
        if pending_record is None:
            return None
        try:
            event = decode_event(record)
        except UndecodableRecordError as error:
            self._dispatcher.dead_letter_undecodable(pending_record, record, error)
            return None
        except NewerRecordError as error:
            self.leave_to_newer_version(pending_record, error)
            return None
        if self.is_duplicate(tracker, record, event):
            self.done(pending_record)
            return None
        origin = Origin(tracker.partition, record.offset, record.appended_at)
        if (traces := self._services.traces) is None:
            return self._fan_out(pending_record, event, None, now=now, origin=origin)
        topic, partition = tracker.partition
        with traces.process(event, group=self._group, topic=topic, partition=partition, offset=record.offset) as span:
            congested = self._fan_out(pending_record, replace(event, trace=span.context), None, now=now, origin=origin)
            span.set_attributes(
                {"gateway.routes": sorted({pending.delivery.route for pending in pending_record.deliveries})}
            )
        return congested

    def _fan_out(
        self,
        record: PendingRecord,
        event: Event,
        predecessor: PendingDelivery | None,
        *,
        now: float,
        origin: Origin | None,
    ) -> Lane | None:
        """Create an event's deliveries, and let each begin. Those for an ordered topic are from the `origin`, if any.

        `predecessor` is what they replace: a delivery without route or destination, or that of a whole event to split.
        """
        rules = self._services.rules()
        original = None if predecessor is None else predecessor.delivery
        is_routed = original is not None and bool(original.route)
        metadata = NO_METADATA if predecessor is None else predecessor.metadata
        if event.source not in rules.sources and not is_routed:
            unrouted = original or Delivery(id=delivery_id(event.id, "", ""), event=event, route="", destination="")
            self._dispatcher.defer_unknown(record.add(unrouted, metadata=metadata))
            return None
        if original is not None and is_routed:
            planned = plan_rest(event, rules.routes[original.route], original)
            metadata = replace(metadata, unknown_since=None)  # it has its route
        else:
            if original is not None and self._duplicates is not None:
                self._duplicates.count_undecided(event)
            matches = rules.table.match(view := EventView.of(event))
            self._services.metrics.count_routed(event, [route.name for route, _ in matches])
            planned, metadata = plan(event, view, matches, original), NO_METADATA
        deliveries: list[tuple[PendingDelivery, Planned]] = []
        for each in planned:
            if each.end is None and each.delivery.due > now:
                self._services.metrics.spills.labels(each.delivery.destination, SpillReason.DELAYED).inc()
            pending = record.add(each.delivery, is_retry=is_routed, metadata=metadata)
            pending.is_late = predecessor is not None and predecessor.is_late
            deliveries.append((pending, each))
        if not record.unfinished:
            self.done(record)
            return None
        # Invariant: all deliveries exist before the first can end, or the record would be done too early.
        congested: Lane | None = None
        for pending, each in deliveries:
            lane = self._begin(pending, each, origin, now)
            congested = lane if lane is not None and lane.needs_backpressure else congested
        return congested

    def _begin(self, pending: PendingDelivery, planned: Planned, origin: Origin | None, now: float) -> Lane | None:
        """Let a delivery go where it is planned to; return its lane if it was queued there."""
        if planned.is_ordered:
            if planned.end is not None:  # at the head of its key it is matched again, and ends so or halts the key
                pending.metadata = RecordMetadata(dead_reason=planned.end.reason, detail=planned.end.detail)
            self._appender.enqueue(pending, origin)
        elif planned.end is not None:
            self._dispatcher.end(pending, planned.end)
        elif planned.is_unsplit:
            self._dispatcher.wait_in_memory(pending, now)
        else:
            return self._dispatcher.dispatch(pending, now)
        return None

    # Tiers.

    async def _keep_releasing(self) -> None:
        """Release due records a few at a time: a backlog that becomes due in one moment delays nothing else."""
        while not self._is_draining:
            has_more = False
            for tracker in self._tier_trackers:
                if tracker.buffered and tracker.is_live and self._release(tracker):
                    has_more = True
                    await self._services.sleep(0)
            await self._services.sleep(RELEASE_EVERY if has_more else self._until_next_release())

    def _until_next_release(self) -> float:
        now = self._log.now()
        waits = [self._release_time(tracker, now) for tracker in self._tier_trackers if tracker.buffered]
        return max(RELEASE_EVERY, min([IDLE_TICK, *(until - now for until in waits)]))

    def _release_time(self, tracker: Tracker, now: float) -> float:
        """Return when a tier's first buffered record can be released: once it is due, and there is memory for it.

        Infinity while it is beyond the offset window.
        """
        first = tracker.buffered.first
        if tracker.delay is None or not tracker.progress.reaches(first.offset):
            return math.inf
        due = tiers.due_at(first, tracker.buffered.first_since, tracker.delay, now)
        return due if self.has_room_for(tracker) else max(due, now + FULL_POLL_INTERVAL)

    def _release(self, tracker: Tracker) -> bool:
        """Release some of a tier's due records; return whether there are more.

        Reading continues once few are buffered, and all of these are due.
        """
        assert tracker.delay is not None
        now = self._log.now()
        buffered = tracker.buffered
        for _ in range(RETRIES_AT_ONCE):
            if not buffered or self._release_time(tracker, now) > now:
                break
            self._release_record(tracker, buffered.pop(), tracker.delay, now)
        if tracker.is_paused and len(buffered) < MAX_BUFFERED // 2 and self._may_read_ahead(tracker):
            self.unpause(tracker)
        return bool(buffered) and self._release_time(tracker, now) <= now

    def _may_read_ahead(self, tracker: Tracker) -> bool:
        """Return whether reading of a tier may continue: nothing is buffered, or little, and all of that is due.

        A partition that is resumed waits for the fetch in flight. If it were paused after each batch, of 100 records, a
        backlog would be read at one batch per fetch.
        """
        buffered = tracker.buffered
        if not buffered:
            return True
        assert tracker.delay is not None
        now = self._log.now()
        is_due = tiers.due_at(buffered.last, buffered.last_since, tracker.delay, now) <= now
        return is_due and len(buffered) < MAX_BUFFERED and tracker.buffered.memory_bytes < self._memory.due(self.tiers)

    def _release_record(self, tracker: Tracker, record: Record, delay: float, now: float) -> None:
        pending_record = self.track(tracker, record, now)
        if pending_record is None:
            return
        try:
            stored = decode_delivery(record)
        except UndecodableRecordError as error:
            self._dispatcher.dead_letter_undecodable(pending_record, record, error)
            return
        except NewerRecordError as error:
            self.leave_to_newer_version(pending_record, error)
            return
        delivery = stored.delivery
        if tracker.is_duplicate_record(delivery, record.offset):
            self.done(pending_record)
            return
        pending_record.kick_target = delivery.kick_target
        is_expedited = stored.metadata.is_expedited
        metadata = replace(stored.metadata, is_expedited=False) if is_expedited else stored.metadata
        args = (*pending_record.kick_target, tracker.partition, record.offset, record.appended_at)
        if self._services.control.is_expedited(*args):
            delivery = replace(delivery, due=min(delivery.due, now))
        pending = pending_record.add(delivery, is_retry=True, metadata=metadata)
        # A late one was counted as such by the process that stored it.
        pending.is_late = is_late(delivery, max(delivery.due, stored.at))
        if now < min(delivery.due, stored.at + delay) and not is_expedited:
            # The clock of this partition's leader is behind: released now, the delivery would loop through the tier.
            # If instead the clock of the process that stored it was ahead, say by an hour, it waits no longer for that.
            self._dispatcher.wait_in_memory(pending, min(stored.at, now) + delay)
        else:
            self.resume(pending, now)

    @override
    def check_progress(self, tracker: Tracker) -> None:
        super().check_progress(tracker)
        next_offset = tracker.buffered.first.offset if tracker.buffered else None
        if deliveries := tracker.window_blockers(tracker.progress.last_behind(CUT_SHORT, next_offset)):
            self._dispatcher.cut_short(deliveries, self._log.now())

    # Gauges.

    async def _keep_gauges(self) -> None:
        turn = 0
        with_gauges: AbstractSet[str] = frozenset()
        while not self._is_draining:
            self._dispatcher.holds.update()
            if turn % max(1, len(self._services.rules().destinations) // DESTINATIONS_PER_UPDATE) == 0:
                await self._dispatcher.holds.set_gauges()
            turn += 1
            if not self._is_counted:
                with suppress(LogUnavailableError):  # retried next time
                    await self._count_partitions(self.subscribed)
                    self._dispatcher.set_limits(self.share)
            metrics = self._services.metrics
            lag = self.lag()
            oldest = self.oldest_pending(self._log.now())
            for topic, count in lag.items():
                metrics.log_lag.labels(topic).set(count)
                metrics.oldest_pending.labels(topic).set(oldest[topic])
            for topic in with_gauges - lag.keys():
                metrics.log_lag.pop((topic,), None)
                metrics.oldest_pending.pop((topic,), None)
            with_gauges = lag.keys()
            newer_counts = Counter(events=0, retry=0)
            for partition, tracker in self.trackers.items():
                newer_counts[self._services.topics.kind_of(partition.topic)] += len(tracker.newer)
            for kind, count in newer_counts.items():
                self._dispatcher.undecodable.set_newer_count(kind, count)
            for tier in TIERS:
                metrics.retry_backlog.labels(tier).set(lag.get(self._services.topics.retry(tier), 0))
            await self._services.sleep(GAUGE_INTERVAL)
