"""An ordered route to one destination: one delivery of a key at a time, in the order of the log.

    record ──▶ new? ──▶ queue of its key ──as head──▶ ready ──commit accepted──▶ dispatch ──▶ done ──▶ next of the key
                                                       ▲                           │
                                                       └── due again (in memory) ◀─┘ failed, throttled, breaker open

The router has matched the events, and appended their deliveries to a topic of this route and destination, which one
group reads. The backlog is what isn't committed: no delivery goes to a tier, and its only successor is a dead letter.
Before each attempt a commit is sent that records the previous delivery's completion: once it is accepted, neither this
process after a restart nor a new owner resumes before that point. So a delivery may be repeated right after itself, but
never after a later one of its key.
"""

import asyncio
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import replace
from functools import partial
from itertools import islice

from typing_extensions import override

from gateway.engine.delivery.dispatcher import UNKNOWN_MAX_AGE, Dispatcher
from gateway.engine.delivery.queues import IDLE_TICK
from gateway.engine.group_member import Loop
from gateway.engine.ordered.batching import in_batches
from gateway.engine.ordered.blocked_keys import Blocked, HaltedKeys, RouteState, has_failed
from gateway.engine.ordered.conditions import UNMATCHED, AbsentSources, can_match_again, condition_failed, match_again
from gateway.engine.ordered.gauges import Gauges
from gateway.engine.ordered.key_state import ByPartition, FirstAttempts, KeyState
from gateway.engine.ordered.kick_tally import Kicks, KickTally, Standing
from gateway.engine.ordered.quiet_periods import QuietKeys, Relation, add_to_burst
from gateway.engine.ordered.reader import OrderedReader
from gateway.engine.partition_tracker import PendingDelivery, PendingRecord, Stage, Tracker
from gateway.engine.services import Services
from gateway.log.base import Assignment, Partition
from gateway.log.records import Origin, StoredDelivery, order_key_of
from gateway.model import (
    NO_METADATA,
    DeadLettered,
    DeadReason,
    EventId,
    RecordMetadata,
    SpillReason,
    Superseded,
)
from gateway.rules.rules import Route
from gateway.telemetry.log_throttle import LogThrottle

ORDERED_REVOKE_GRACE = 10.0
"""Seconds that attempts have to end when partitions are revoked; then they are aborted, and have a second to end. The
next owner must not start the next delivery of a key while we still send this one."""
OWNERSHIP_CHECK_AGE = 10.0
"""Seconds after a commit was sent during which its acceptance proves that the partition is ours: more than a commit
takes, and less than the silence after which a group evicts a member. A process that was frozen for longer commits again
before it starts an attempt."""
RETRY_DELAY = 0.1
"""Seconds until a rejected commit is sent again."""
READY_AT_ONCE = 1_000
"""Maximum of deliveries that one ownership check covers."""
KEYS_PER_TICK = 1_000
"""Keys that are looked at in each tick (IDLE_TICK): if there are more, each is looked at less often."""


class OrderedRoute(OrderedReader):
    """A member of the group of one ordered route and destination, for as long as its topic has unfinished records."""

    def __init__(self, services: Services, dispatcher: Dispatcher, target: tuple[str, str], *, memory: int) -> None:
        super().__init__(services, dispatcher, target, memory=memory)
        self.unknown_since: float | None = None  # since when the rules lack the route or its destination
        self._update_unknown_since()
        # Invariant: of each key's deliveries, only its head is ready, in the dispatcher (also while it is attempted),
        # halted, in `_quiet` or in `_kicked`. For a key in `_old_attempts`, none is ready: an attempt from before the
        # topic was recreated is in flight.
        self._queues: dict[tuple[Partition, str], deque[PendingDelivery]] = {}
        self._ready: dict[PendingDelivery, None] = {}
        self._old_attempts: dict[tuple[Partition, str], PendingDelivery] = {}
        self._kicked: set[PendingDelivery] = set()  # those that a kick has yet to reach
        self._woken = asyncio.Event()
        self._is_reloaded = False
        self._key_states = ByPartition[KeyState]()
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
        return (
            *super().loops(),
            ("dispatch", self._dispatch_loop),
            ("release", self._keep_releasing),
            ("heads", self._keep_looking_at_heads),
        )

    @override
    def reload(self) -> None:
        super().reload()
        self._update_unknown_since()
        self._is_reloaded = True
        route = self._route()
        if route is not None:
            for head in self._quiet.reschedule(route.debounce):
                self._end_quiet_period(head, self._log.now())

    async def _release_halted(self) -> None:
        """Release the halted keys that the new rules don't halt."""
        async for head in in_batches(self._failed_heads(), self._services.sleep):
            route = self._route()
            if not self._is_halted(head):
                continue
            if condition_failed(head):
                self._make_ready(head)  # to be matched by the new rules
            elif route is not None and route.on_exhausted != "halt":
                self._halted.release(head, "rules")
                self._make_ready(head)

    def _is_head(self, pending: PendingDelivery) -> bool:
        """Return whether a delivery is still the first of its key here."""
        queue = self._queues.get(self._key(pending))
        return queue is not None and queue[0] is pending

    def _is_waiting_head(self, pending: PendingDelivery) -> bool:
        """Return whether a delivery is still the first of its key here, and isn't being attempted."""
        return pending.stage is Stage.WAITING and self._is_head(pending)

    def _is_halted(self, head: PendingDelivery) -> bool:
        return bool(head.outcome) and head not in self._ready and self._is_waiting_head(head)

    def _update_unknown_since(self) -> None:
        """Track since when the rules lack the route or its destination."""
        rules = self._services.rules()
        if self.route in rules.routes and self.destination in rules.destinations:
            self.unknown_since = None
        elif self.unknown_since is None:
            self.unknown_since = self._log.now()

    # Keys.

    @override
    def _enqueue(self, record: PendingRecord, stored: StoredDelivery, origin: Origin | None) -> None:
        pending = record.add(stored.delivery)
        pending.stage = Stage.WAITING
        if stored.metadata.dead_reason:
            pending.outcome = DeadLettered(reason=DeadReason.EXPRESSION_ERROR, detail=stored.metadata.detail)
        key = self._key(pending)
        queue = self._queues.setdefault(key, deque())
        last = queue[-1] if queue else None
        debounce = None if (route := self._route()) is None or pending.outcome is not None else route.debounce
        # Whether the last one may still be superseded: it follows another one, is ready, or in its quiet period.
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
        self._ready.pop(pending, None)  # its quiet period had ended before this record was read
        self._kick_tally.forget(pending)
        self._dispatcher.end(pending, Superseded(by=by))

    def _is_still_matched(self, pending: PendingDelivery) -> bool:
        """Match an event again whose condition couldn't be evaluated; return False if the route isn't for it."""
        if not condition_failed(pending) or not can_match_again(pending, self._services.rules()):
            return True
        is_matched, pending.outcome = match_again(self._route(), pending.delivery.event)
        if pending.outcome is None:
            self._halted.release(pending, "rules")
        return is_matched

    def _begin_head(self, pending: PendingDelivery) -> None:
        known = self._key_states[pending.record.tracker.partition].pop(pending.delivery.occurrence, None)
        if known is not None:
            pending.delivery = known.restored(pending.delivery)
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
        if self._key(pending) not in self._old_attempts and pending not in self._kicked:
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
                checked = list(islice(self._ready, READY_AT_ONCE))  # in `_ready`, so nothing else dispatches them
                partitions = {pending.record.tracker.partition for pending in checked}
                if not await self._committer.commit(partitions, is_ownership_check=True):
                    await self._services.sleep(RETRY_DELAY)
                    continue
                async for pending in in_batches(checked, self._services.sleep):
                    if self.is_stopped or pending not in self._ready:  # a kick may have ended it meanwhile
                        continue
                    del self._ready[pending]
                    pending.ownership_checked_at = commit_sent_at
                    if pending.record.tracker.is_live:
                        pending.metadata = NO_METADATA
                        if self.unknown_since is not None:
                            since = max(self.unknown_since, pending.record.appended_at)
                            pending.metadata = RecordMetadata(unknown_since=since)
                        if self._is_still_matched(pending):
                            self._dispatcher.dispatch(pending, self._log.now())
                        else:
                            self._kick_tally.forget(pending)
                            self._dispatcher.end(pending, UNMATCHED)

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
        self._halted.forget(pending.record.tracker.partition, pending.delivery.occurrence)
        self._first_attempts.forget(pending)
        key = self._key(pending)
        queue = self._queues.get(key)
        if self._old_attempts.get(key) is pending:
            del self._old_attempts[key]
            if queue:
                self._begin_head(queue[0])
            return
        if queue is None or queue[0] is not pending:
            return  # it was superseded, or its partition was revoked
        queue.popleft()
        if queue:
            self._begin_head(queue[0])
        else:
            del self._queues[key]

    @override
    def try_halt(self, pending: PendingDelivery, outcome: DeadLettered) -> bool:
        rules = self._services.rules()
        route = rules.routes.get(self.route)
        if outcome.reason is DeadReason.EXPRESSION_ERROR and self.destination not in rules.destinations:
            route = None  # until the destination is back, it waits as it does without its route
        if outcome.reason is DeadReason.ROUTE_REMOVED or (route is not None and route.on_exhausted != "halt"):
            return False
        if pending.record.tracker.is_reassigned:
            return False  # its memory has to be released
        pending.outcome = outcome
        pending.stage = Stage.WAITING
        if route is None:
            return True  # it has outlived a name; once that is back, the key continues here, in order
        self._halted.halt(pending, outcome)
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
        if self._kick_tally.is_open:
            self._dispatcher.spawn(self._publish_kick_outcome, "ordered-kick")

    def _end_quiet_periods(self) -> None:
        """Make ready whose quiet period is over; and, while memory or a window is full, some of those that are next."""
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

    async def _keep_releasing(self) -> None:
        while not self._is_draining:
            is_kicked, is_route_kicked = self._kicks.arrived()
            if is_kicked:
                await self._kick(is_route_kicked=is_route_kicked)
            if self._is_reloaded:
                self._is_reloaded = False
                await self._release_halted()
            await self._services.sleep(IDLE_TICK)

    async def _kick(self, *, is_route_kicked: bool) -> None:
        """Retry immediately what was kicked."""
        self._track_kick()
        heads = [
            head
            for key, queue in self._queues.items()
            # A kick of the route ends quiet periods, one of the destination doesn't.
            if (head := queue[0]).stage is Stage.WAITING and (is_route_kicked or not self._quiet.has(key, head))
        ]
        for partition, states in self._key_states.items():  # of records that aren't read again yet after a rebalance
            for occurrence, state in states.items():
                self._first_attempts.keep(partition, occurrence, state.attempts)
                self._halted.forget(partition, occurrence)
        self._key_states.clear()
        self._dispatcher.withdraw([head for head in heads if head.outcome is None])  # which has no halted ones
        self._kicked.update(heads)
        self._ready = {pending: None for pending in self._ready if pending not in self._kicked}
        async for head in in_batches(heads, self._services.sleep):
            self._retry_kicked(head)

    def _retry_kicked(self, head: PendingDelivery) -> None:
        """Retry a head immediately if a kick has yet to reach it, unless it has ended or left meanwhile."""
        if head in self._kicked:
            self._kicked.remove(head)
            if self._is_waiting_head(head):
                self._quiet.remove(self._key(head), head)
                head.burst = None  # so that nothing supersedes it any more
                if self._reset_for_retry(head):
                    self._make_ready(head)

    def _track_kick(self) -> None:
        lag = {} if self._consumer is None else self._consumer.lag()
        unread = {each: lag.get(each.partition, 0) + len(each.buffered) for each in self.trackers.values()}
        self._kick_tally.begin(self._kicks.last_at, self._log.now(), unread, self._queues.values())

    async def _publish_kick_outcome(self) -> None:
        """Publish the outcome of the last kick, once that is known."""
        destination = self._services.rules().destinations.get(self.destination)
        rate = None if destination is None else destination.rate
        standing = Standing(is_head=self._is_head, unreached=self._kicked, hold_reason=self._hold_reason())
        publish, spawn, sleep = self._services.publish, self._dispatcher.spawn, self._services.sleep
        await self._kick_tally.publish_outcomes(
            self._log.now(), standing, rate, lambda outcome: spawn(partial(publish, outcome), "ordered-kick"), sleep
        )

    def _hold_reason(self) -> str:
        """Return why nothing of this route is sent to the destination now; "" if nothing holds it."""
        if self._services.control.paused_by(self.route, self.destination):
            return SpillReason.PAUSED.value
        if self.unknown_since is not None:
            return SpillReason.UNKNOWN_NAME.value
        return self._dispatcher.holds.spill_reason(self.destination)

    async def _keep_looking_at_heads(self) -> None:
        """Set the gauges, and end halted deliveries that can't continue; less often if many keys wait."""
        while not self._is_draining:
            heads = [queue[0] for queue in self._queues.values()]
            looked_at = in_batches(heads, self._services.sleep, each=KEYS_PER_TICK)
            failed = [head async for head in looked_at if has_failed(head)]
            self._absent_sources.update(failed, self._services.rules(), self._log.now())
            self._set_gauges(failed)
            if self.unknown_since is not None or self._absent_sources:
                async for head in in_batches(failed, self._services.sleep):
                    self._end_halted_of_removed_route(head)
            await self._services.sleep(IDLE_TICK * max(1, len(self._queues) // KEYS_PER_TICK))

    def _end_halted_of_removed_route(self, head: PendingDelivery) -> None:
        """Dead-letter a halted head whose route, destination or source the rules have lacked for UNKNOWN_MAX_AGE."""
        if not self._is_halted(head):
            return
        missing_since = [at for at in (self.unknown_since, self._absent_sources.since(head)) if at is not None]
        if missing_since and max(min(missing_since), head.record.appended_at) < self._log.now() - UNKNOWN_MAX_AGE:
            head.outcome = DeadLettered(reason=DeadReason.ROUTE_REMOVED, detail="the rules no longer name it")
            self._halted.release(head, "route_removed")
            self._make_ready(head)

    def _reset_for_retry(self, pending: PendingDelivery) -> bool:
        """Make a delivery due now, and reset a halted one's attempts; end it if its route no longer matches: False."""
        delayed_until = min(pending.delivery.delayed_until, self._log.now())
        pending.delivery = replace(pending.delivery, due=0.0, delayed_until=delayed_until)
        cannot_match_now = condition_failed(pending) and not can_match_again(pending, self._services.rules())
        if pending.outcome is None or cannot_match_now:
            return True
        self._halted.release(pending, "kick")
        partition, delivery = pending.record.tracker.partition, pending.delivery
        self._first_attempts.keep(partition, delivery.occurrence, delivery.attempts)
        self._kick_tally.reset(pending)
        is_matched = True
        if condition_failed(pending):
            is_matched, pending.outcome = match_again(self._route(), pending.delivery.event)
        else:
            pending.outcome = None
        pending.delivery = replace(pending.delivery, attempts=(), replayed_at=self._log.now())
        if not is_matched:
            self._ready.pop(pending, None)
            self._dispatcher.end(pending, UNMATCHED)
        return is_matched

    @property
    def state(self) -> RouteState:
        """Its state, for `/status` and metrics."""
        return RouteState(
            blocked=[Blocked.by(head, self._halted, self._first_attempts) for head in self._failed_heads()],
            partitions=len(self.trackers),
            unknown_since=self.unknown_since,
            quiet_keys=len(self._quiet),
            quiet_until=self._quiet.last_until,
        )

    def _failed_heads(self) -> list[PendingDelivery]:
        return [head for queue in self._queues.values() if has_failed(head := queue[0])]

    def _set_gauges(self, failed: Collection[PendingDelivery]) -> None:
        route = self._route()
        self._gauges.set(
            failed,
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
        former = {each.record.tracker for key, each in self._old_attempts.items() if key[0] in partitions}
        busy = await self._wait_until_idle([*leaving, *former], ORDERED_REVOKE_GRACE)
        now = self._log.now()
        self._dispatcher.cut_short([pending for record in busy for pending in record.deliveries], now)
        await self._wait_until_idle([*leaving, *former], 1.0)
        async for key in in_batches([key for key in self._queues if key[0] in partitions], self._services.sleep):
            self._keep_state(key)
        self._quiet.forget(partitions)
        self._ready = {pending: None for pending in self._ready if pending.record.tracker.is_live}

    def _keep_state(self, key: tuple[Partition, str]) -> None:
        """Forget a key of a revoked partition, but keep what the log doesn't have, in case the partition comes back."""
        if (queue := self._queues.get(key)) is not None:
            self._retry_kicked(queue[0])  # a kick that is under way is for its next owner, too
        if (queue := self._queues.pop(key, None)) is not None and has_failed(head := queue[0]):
            self._key_states[key[0]][head.delivery.occurrence] = KeyState.of(head)

    @override
    def restarted(self, assignment: Assignment) -> None:
        """Begin a partition anew, as its topic was recreated."""
        partition = assignment.partition
        for key, (head, *_) in self._queues.items():
            if key[0] == partition and head.stage is Stage.ATTEMPT:
                self._old_attempts[key] = head
        self._queues = {key: queue for key, queue in self._queues.items() if key[0] != partition}
        self._quiet.forget({partition})
        self._ready = {pending: None for pending in self._ready if pending.record.tracker.partition != partition}
        self._halted.keep_only(self._partitions() - {partition})
        super().restarted(assignment)

    def _partitions(self) -> set[Partition]:
        """Return those that are ours, or may be again."""
        return self.trackers.keys() | self._suspended.keys() | {tracker.partition for tracker in self._leaving}

    @override
    def assignment_changed(self) -> None:
        """Forget the state of partitions that have another owner now."""
        for kept in (self._key_states, self._first_attempts, self._halted):
            kept.keep_only(self._partitions())
