"""An ordered route to one destination: one delivery of a key at a time, in the order of the log.

    record ──▶ new? ──▶ queue of its key ──as head──▶ ready ──commit accepted──▶ dispatch ──▶ done ──▶ next of the key
                                                       ▲                           │
                                                       └── due again (in memory) ◀─┘ failed, throttled, breaker open

The router has matched the events, and appended their deliveries to a topic of this route and destination, which one
group reads: the backlog is what isn't committed, and only dead letters are written. Before each attempt a commit is
sent that records the previous delivery's completion: once it is accepted, neither a crash nor a new owner starts before
that point. So a delivery may be repeated right after itself, but never after a later one of its key.
"""

import asyncio
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from typing_extensions import override

from gateway.engine.delivery.dispatcher import UNKNOWN_MAX_AGE, Dispatcher
from gateway.engine.delivery.queues import IDLE_TICK
from gateway.engine.group_member import GroupMember, Loop
from gateway.engine.ordered.conditions import AbsentSources, can_match_again, condition_failed, match_again
from gateway.engine.ordered.duplicate_appends import DuplicateAppends
from gateway.engine.ordered.gauges import Gauges
from gateway.engine.ordered.key_state import Blocked, FirstAttempts, HaltedKeys, KeyState, RouteState
from gateway.engine.ordered.kick_tally import Kicks, KickTally, last_result
from gateway.engine.ordered.quiet_periods import QuietKeys, Relation, add_to_burst
from gateway.engine.partition_tracker import PendingDelivery, PendingRecord, Stage, Tracker
from gateway.engine.services import Services
from gateway.log.base import COMMIT_BYTES, Assignment, Batch, Commit, Partition, Record
from gateway.log.records import Origin, StoredDelivery, decoded_delivery, order_key_of, origin_of
from gateway.model import (
    NO_METADATA,
    DeadLettered,
    DeadReason,
    EventId,
    NewerRecordError,
    Occurrence,
    RecordMetadata,
    SpillReason,
    Superseded,
    UndecodableRecordError,
)
from gateway.rules.rules import Route
from gateway.telemetry.log_throttle import LogThrottle

ORDERED_REVOKE_GRACE = 10.0
"""Seconds that attempts have to end when partitions are revoked; then their connections are cut. The next owner must
not start the next delivery of a key while we still send this one."""
OWNERSHIP_CHECK_AGE = 10.0
"""Seconds after a commit was sent during which its acceptance proves that the partition is ours: more than a commit
takes, and less than the silence after which a group evicts a member. A process that was frozen for longer commits again
before it starts an attempt."""
RETRY_DELAY = 0.1  # Seconds until a rejected commit is sent again.


class OrderedRoute(GroupMember):
    """A member of the group of one ordered route and destination, for as long as its topic has unfinished records."""

    keeps_order = True

    def __init__(self, services: Services, dispatcher: Dispatcher, target: tuple[str, str], *, memory: int) -> None:
        super().__init__(services, dispatcher, None, services.topics.ordered_group(*target), memory=memory)
        self.route, self.destination = target
        self.topic = services.topics.ordered(*target)
        self._appended: dict[Tracker, DuplicateAppends] = {}
        self.unknown_since: float | None = None  # since when the rules lack the route or its destination
        self._update_unknown_since()
        # Invariant: each key's head is ready, in the dispatcher, under way, halted or in `_quiet`, and none of the
        # others is. For a key in `_former`, none is ready: an attempt from before the topic was recreated is in flight.
        self._queues: dict[tuple[Partition, str], deque[PendingDelivery]] = {}
        self._ready: dict[PendingDelivery, None] = {}
        self._former: dict[tuple[Partition, str], PendingDelivery] = {}
        self._woken = asyncio.Event()
        self._key_states: dict[Occurrence, KeyState] = {}
        self._halted = HaltedKeys(services)
        self._absent_sources = AbsentSources()
        self._quiet = QuietKeys()
        self._first_attempts = FirstAttempts()
        self._kicks = Kicks(services.control, self.route, self.destination)
        self._kick_tally = KickTally(self.route, self.destination)
        self._early_throttle = LogThrottle()
        self._gauges = Gauges(services.metrics, self.route, self.destination)
        self._changed.set()  # subscribe at once

    @override
    def loops(self) -> Iterable[tuple[str, Loop]]:
        return (*super().loops(), ("dispatch", self._dispatch_loop))

    @override
    async def wanted(self) -> frozenset[str]:
        return frozenset((self.topic,))

    @override
    def reload(self) -> None:
        super().reload()
        self._update_unknown_since()
        route = self._route()
        for head in self._halted_heads():
            if condition_failed(head):
                self._make_ready(head)  # to be matched by the new rules
            elif route is not None and route.on_exhausted != "halt":
                self._halted.release(head.delivery, "rules")
                self._make_ready(head)
        if route is not None:
            for head in self._quiet.reschedule(route.debounce):
                self._end_quiet_period(head, self._log.now())

    def _halted_heads(self) -> list[PendingDelivery]:
        heads = [queue[0] for queue in self._queues.values()]
        return [head for head in heads if head.stage is Stage.WAITING and head.outcome and head not in self._ready]

    def _update_unknown_since(self) -> None:
        """Track since when the rules lack the route or its destination."""
        rules = self._services.rules()
        if self.route in rules.routes and self.destination in rules.destinations:
            self.unknown_since = None
        elif self.unknown_since is None:
            self.unknown_since = self._log.now()

    # Partitions.

    @override
    def assigned(self, assignments: Sequence[Assignment], without_position: Collection[Partition] = ()) -> None:
        super().assigned(assignments, without_position)
        for assignment in assignments:
            self._appended[self.trackers[assignment.partition]] = DuplicateAppends(assignment.commit.metadata)

    @override
    def _lose(self, tracker: Tracker) -> None:
        super()._lose(tracker)
        self._appended.pop(tracker, None)

    @override
    def commit_metadata(self, tracker: Tracker, commit: Commit) -> bytes:
        appended = self._appended[tracker]
        before = appended.omitted
        metadata = appended.metadata(commit.base, COMMIT_BYTES - len(commit.done))
        if appended.omitted and not before:
            self._services.logger.warning(
                "ordered_commit_metadata_full",
                topic=self.topic,
                partition=tracker.partition.number,
                count=appended.omitted,
            )
        return metadata

    # Reading.

    @override
    async def on_batch(self, tracker: Tracker, batch: Batch) -> None:
        for index, record in enumerate(batch.records):
            if not tracker.is_live or self._is_draining or self._is_stopped_by_newer_record(tracker):
                break
            if not self.has_room_for(tracker):
                self.postpone(tracker, batch.records[index:])
                break
            self._accept_record(tracker, record)
        if self._is_stopped_by_newer_record(tracker) or not tracker.progress.has_room():
            self.pause(tracker)

    def _accept_record(self, tracker: Tracker, record: Record) -> None:
        content = decoded_delivery(record)
        # The position in a foreign record says nothing about what a router has appended.
        origin = None if isinstance(content, UndecodableRecordError) else origin_of(record)
        # Checked for completed records, too: their positions must go into the metadata of later commits, for the
        # next owner.
        is_duplicate = origin is not None and self._appended[tracker].is_duplicate(record.offset, origin)
        pending_record = self.track(tracker, record, self._log.now())
        if pending_record is None:
            return
        if is_duplicate:
            self.done(pending_record)
        elif isinstance(content, UndecodableRecordError):
            self._dispatcher.dead_letter_undecodable(pending_record, record, content)
        elif isinstance(content, NewerRecordError):
            self.leave_to_newer_version(pending_record, content)
        elif origin is None and tracker.is_duplicate_record(content.delivery, record.offset):
            self.done(pending_record)
        else:
            self._enqueue(pending_record, content, origin)

    def _enqueue(self, record: PendingRecord, stored: StoredDelivery, origin: Origin | None) -> None:
        pending = record.add(stored.delivery)
        pending.stage = Stage.WAITING
        if stored.metadata.dead_reason:
            pending.outcome = DeadLettered(reason=DeadReason.EXPRESSION_ERROR, detail=stored.metadata.detail)
        key = self._key(pending)
        queue = self._queues.setdefault(key, deque())
        last = queue[-1] if queue else None
        debounce = None if (route := self._route()) is None or pending.outcome is not None else route.debounce
        is_waiting = last is not None and (last is not queue[0] or last in self._ready or self._quiet.has(key, last))
        relation = Relation.FOLLOWS
        if debounce is not None:
            relation = add_to_burst(pending, origin, last if is_waiting else None, debounce)
        if last is not None and relation is Relation.IS_SUPERSEDED:
            self._dispatcher.end(pending, Superseded(by=last.delivery.event.id))
            return
        queue.append(pending)
        if last is not None and relation is Relation.SUPERSEDES:
            self._supersede(last, queue, pending.delivery.event.id)
        elif last is None:
            self._begin_head(pending)

    def _supersede(self, pending: PendingDelivery, queue: deque[PendingDelivery], by: EventId) -> None:
        """End the delivery before the last one of a queue."""
        if queue[0] is not pending:
            del queue[-2]
        self._quiet.remove(self._key(pending), pending)
        self._ready.pop(pending, None)  # it is due, by what this process had read
        self._kick_tally.forget(pending)
        self._dispatcher.end(pending, Superseded(by=by))

    def _is_still_matched(self, pending: PendingDelivery) -> bool:
        """Match an event again whose condition couldn't be evaluated; return False if the route isn't for it."""
        if not condition_failed(pending) or not can_match_again(pending, self._services.rules()):
            return True
        is_matched, pending.outcome = match_again(self._route(), pending.delivery.event)
        if pending.outcome is None:
            self._halted.release(pending.delivery, "rules")
        return is_matched

    def _begin_head(self, pending: PendingDelivery) -> None:
        known = self._key_states.pop(pending.delivery.occurrence, None)
        if known is not None:
            pending.delivery = replace(pending.delivery, attempts=known.attempts, due=known.due)
            pending.outcome = known.outcome or pending.outcome
        key = self._key(pending)
        if pending.burst is None or pending.outcome is not None or pending.delivery.attempts:
            self._make_ready(pending)
        elif pending.delivery.due <= (now := self._log.now()):
            self._end_quiet_period(pending, now)
        else:
            pending.stage = Stage.WAITING
            self._quiet.add(key, pending)

    def _make_ready(self, pending: PendingDelivery) -> None:
        pending.stage = Stage.WAITING
        if self._key(pending) not in self._former:
            self._ready[pending] = None
            self._woken.set()

    # Attempts, in order.

    async def _dispatch_loop(self) -> None:
        """Dispatch ready deliveries once a commit sent after they became ready has been accepted."""
        while True:
            await self._woken.wait()
            self._woken.clear()
            while self._ready and not self._is_draining:
                is_known = self.unknown_since is None
                if is_known and self._services.control.paused_by(self.route, self.destination):
                    await self._services.sleep(IDLE_TICK)
                    continue
                commit_sent_at = asyncio.get_running_loop().time()
                checked = list(self._ready)  # they stay in `_ready`, so nothing else dispatches them
                partitions = {pending.record.tracker.partition for pending in checked}
                if not await self._committer.commit(partitions, is_ownership_check=True):
                    await self._services.sleep(RETRY_DELAY)
                    continue
                now = self._log.now()
                for pending in [each for each in checked if each in self._ready]:  # a kick may have ended one meanwhile
                    del self._ready[pending]
                    pending.ownership_checked_at = commit_sent_at
                    if pending.record.tracker.is_live:
                        pending.metadata = NO_METADATA
                        if self.unknown_since is not None:
                            since = max(self.unknown_since, pending.record.appended_at)
                            pending.metadata = RecordMetadata(unknown_since=since)
                        if self._is_still_matched(pending):
                            self._dispatcher.dispatch(pending, now)
                        else:
                            self._kick_tally.forget(pending)
                            self._dispatcher.finish(pending)

    @override
    def resume(self, pending: PendingDelivery, now: float) -> None:
        if pending.record.tracker.is_reassigned:
            self._dispatcher.finish(pending)
        else:
            self._make_ready(pending)

    @override
    def is_ownership_fresh(self, pending: PendingDelivery) -> bool:
        return asyncio.get_running_loop().time() < pending.ownership_checked_at + OWNERSHIP_CHECK_AGE

    @override
    def finished(self, pending: PendingDelivery) -> None:
        super().finished(pending)
        self._halted.forget(pending.delivery.occurrence)
        self._first_attempts.forget(pending.delivery.occurrence)
        key = self._key(pending)
        queue = self._queues.get(key)
        if self._former.get(key) is pending:
            del self._former[key]
            if queue:
                self._begin_head(queue[0])
            return
        if queue is None or queue[0] is not pending:
            return  # its partition was revoked
        queue.popleft()
        if queue:
            self._begin_head(queue[0])
        else:
            del self._queues[key]

    @override
    def halt_instead(self, pending: PendingDelivery, outcome: DeadLettered) -> bool:
        route = self._route()
        if outcome.reason is DeadReason.ROUTE_REMOVED or (route is not None and route.on_exhausted != "halt"):
            return False
        if pending.record.tracker.is_reassigned:
            return False  # its memory has to be released
        pending.outcome = outcome
        pending.stage = Stage.WAITING
        if route is None:
            return True  # its last attempt outlived its route; if that comes back, the key continues here, in order
        self._halted.halt(pending.delivery, outcome)
        return True

    def _route(self) -> Route | None:
        return self._services.rules().routes.get(self.route)

    def _key(self, pending: PendingDelivery) -> tuple[Partition, str]:
        return pending.record.tracker.partition, order_key_of(pending.delivery)

    # Kicks, and gauges.

    @override
    def tick(self) -> None:
        super().tick()
        self._end_quiet_periods()
        self._apply_kicks_and_rules()
        self._end_halted_of_removed_route()
        if self._kick_tally.is_open:
            self._publish_kick_outcome()
        self._set_gauges()

    def _end_quiet_periods(self) -> None:
        """Make ready what has waited for long enough; and what comes next to that, while no more records are read."""
        now = self._log.now()
        full = [each.partition for each in self.trackers.values() if each.buffered or not each.progress.has_room()]
        early = self._quiet.pop_early(self.trackers if not self.has_room else full)
        for pending in (*self._quiet.pop_due(now), *early):
            self._end_quiet_period(pending, now)
        if count := sum([self._early_throttle.count("", now) for _ in early]):
            self._services.logger.warning(
                "quiet_periods_cut_short", route=self.route, destination=self.destination, count=count
            )

    def _end_quiet_period(self, pending: PendingDelivery, now: float) -> None:
        self._quiet.remove(self._key(pending), pending)
        pending.delivery = replace(pending.delivery, due=0.0, delayed_until=min(pending.delivery.delayed_until, now))
        self._make_ready(pending)

    def _apply_kicks_and_rules(self) -> None:
        """Retry what was kicked at once, and end halted deliveries once the rules no longer say `halt`."""
        is_kicked, is_route_kicked = self._kicks.arrived()
        if is_kicked:
            heads = [head for head, *_ in self._queues.values() if head.stage is Stage.WAITING]
            if not is_route_kicked:  # what its route lets wait, no destination's kick does
                heads = [head for head in heads if not self._quiet.has(self._key(head), head)]
            results = {head: last_result(head.delivery) for head, *_ in self._queues.values()}
            for occurrence, state in self._key_states.items():  # those of records that are read after a rebalance
                self._first_attempts.keep(state.partition, occurrence, state.attempts)
            self._key_states.clear()
            self._prune_halt_times()
            self._dispatcher.withdraw(heads)
            for pending in heads:
                self._quiet.remove(self._key(pending), pending)
                pending.burst = None  # so that nothing supersedes it any more
                if self._reset_for_retry(pending):
                    self._make_ready(pending)
            self._track_kick(results)

    def _track_kick(self, results: Mapping[PendingDelivery, str]) -> None:
        lag = {} if self._consumer is None else self._consumer.lag()
        unread = {each: lag.get(each.partition, 0) + len(each.buffered) for each in self.trackers.values()}
        self._kick_tally.begin(self._kicks.last_at, self._log.now(), unread, self._queues.values(), results)

    def _publish_kick_outcome(self) -> None:
        """Publish the outcome of the last kick, once that is known."""
        destination = self._services.rules().destinations.get(self.destination)
        rate = None if destination is None else destination.rate
        heads = {head for head, *_ in self._queues.values()}
        for outcome in self._kick_tally.take_outcomes(self._log.now(), heads, self._hold_reason(), rate):
            self._dispatcher.spawn(partial(self._services.publish, outcome), "ordered-kick")

    def _hold_reason(self) -> str:
        """Return why nothing of this route is sent to the destination now; "" if nothing holds it."""
        if self._services.control.paused_by(self.route, self.destination):
            return SpillReason.PAUSED.value
        if self.unknown_since is not None:
            return SpillReason.UNKNOWN_NAME.value
        return self._dispatcher.holds.spill_reason(self.destination)

    def _end_halted_of_removed_route(self) -> None:
        """Dead-letter what has halted and can't continue by the rules for longer than a rolling deployment takes."""
        now = self._log.now()
        self._absent_sources.update([queue[0] for queue in self._queues.values()], self._services.rules(), now)
        for head in self._halted_heads():
            missing_since = [at for at in (self.unknown_since, self._absent_sources.since(head)) if at is not None]
            if missing_since and max(min(missing_since), head.record.appended_at) < now - UNKNOWN_MAX_AGE:
                head.outcome = DeadLettered(reason=DeadReason.ROUTE_REMOVED, detail="the rules no longer name it")
                self._halted.release(head.delivery, "route_removed")
                self._make_ready(head)

    def _reset_for_retry(self, pending: PendingDelivery) -> bool:
        """Make a delivery due now, and reset a halted one's attempts. False if its route no longer matches it."""
        delayed_until = min(pending.delivery.delayed_until, self._log.now())
        pending.delivery = replace(pending.delivery, due=0.0, delayed_until=delayed_until)
        is_unmatchable = condition_failed(pending) and not can_match_again(pending, self._services.rules())
        if pending.outcome is None or is_unmatchable:
            return True
        self._halted.release(pending.delivery, "kick")
        partition, delivery = pending.record.tracker.partition, pending.delivery
        self._first_attempts.keep(partition, delivery.occurrence, delivery.attempts)
        is_matched = True
        if condition_failed(pending):
            is_matched, pending.outcome = match_again(self._route(), pending.delivery.event)
        else:
            pending.outcome = None
        pending.delivery = replace(pending.delivery, attempts=(), replayed_at=self._log.now())
        if not is_matched:
            self._ready.pop(pending, None)
            self._dispatcher.finish(pending)
        return is_matched

    @property
    def state(self) -> RouteState:
        """What others are told of it."""
        return RouteState(
            blocked=[Blocked.by(head, self._halted, self._first_attempts) for head in self._failed_heads()],
            partitions=len(self.trackers),
            unknown_since=self.unknown_since,
            quiet_keys=len(self._quiet),
            quiet_until=self._quiet.last_until,
        )

    def _failed_heads(self) -> list[PendingDelivery]:
        return [head for head, *_ in self._queues.values() if head.outcome is not None or head.delivery.attempts]

    def _set_gauges(self) -> None:
        route = self._route()
        self._gauges.set(
            self._failed_heads(),
            quiet=len(self._quiet) if self._quiet or (route is not None and route.debounce) else None,
            lag=sum(self.lag().values()),
            oldest_pending=max(self.oldest_pending(self._log.now()).values(), default=0.0),
        )

    @override
    def forget_partitions(self, excluding: Collection[Partition] = ()) -> None:
        super().forget_partitions(excluding)
        self._gauges.clear(are_deleted=(self.route, self.destination) not in self._services.rules().ordered)

    # Revocation.

    @override
    async def _let_attempts_end(self, leaving: Collection[Tracker], waiting: Iterable[PendingDelivery]) -> None:
        partitions = {tracker.partition for tracker in leaving}
        former = {pending.record.tracker for (partition, _), pending in self._former.items() if partition in partitions}
        busy = await self._wait_for_busy([*leaving, *former], ORDERED_REVOKE_GRACE)
        now = self._log.now()
        self._dispatcher.cut_short([pending for record in busy for pending in record.deliveries], now)
        await self._wait_for_busy([*leaving, *former], 1.0)
        for key, queue in list(self._queues.items()):
            if key[0] in partitions:
                head = queue[0]
                if head.delivery.attempts or head.outcome is not None:
                    self._key_states[head.delivery.occurrence] = KeyState.of(head)
                del self._queues[key]
        self._quiet.forget(partitions)
        self._ready = {pending: None for pending in self._ready if pending.record.tracker.is_live}

    @override
    def restarted(self, assignment: Assignment) -> None:
        partition = assignment.partition
        for key, (head, *_) in self._queues.items():
            if key[0] == partition and head.stage is Stage.ATTEMPT:
                self._former[key] = head
        self._queues = {key: queue for key, queue in self._queues.items() if key[0] != partition}
        self._quiet.forget({partition})
        self._ready = {pending: None for pending in self._ready if pending.record.tracker.partition != partition}
        super().restarted(assignment)

    @override
    def assignment_changed(self) -> None:
        """Forget the state of partitions that have another owner now."""
        ours = self.trackers.keys() | self._suspended.keys()  # or to be found yet
        self._key_states = {key: state for key, state in self._key_states.items() if state.partition in ours}
        self._first_attempts.keep_only(ours)
        self._prune_halt_times()

    def _prune_halt_times(self) -> None:
        """Drop the halt times of keys that are no longer tracked."""
        queued = {head.delivery.occurrence for head, *_ in self._queues.values()}
        self._halted.keep_only(queued | self._key_states.keys())
