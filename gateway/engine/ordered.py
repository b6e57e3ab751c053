"""An ordered route from one topic to one destination: one delivery of a key at a time, in the order of the log.

    event ──▶ matches? ──▶ queue of its key ──first──▶ ready ──commit accepted──▶ dispatch ──▶ done ──▶ next of the key
                                                         ▲                           │
                                                         └── due again (in memory) ◀─┘ failed, throttled, breaker open

It is a group of its own, so the backlog is what isn't committed, and nothing is written but dead letters. Before each
attempt a commit is sent that tells the end of the delivery before: once it is accepted, neither a crash nor a new
owner begins earlier. So a delivery may be repeated, right after itself, and never after a later one of its key.
"""

import asyncio
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from typing_extensions import override

from gateway.engine.dispatch import IDLE_TICK, Dispatcher, Surroundings
from gateway.engine.duplicates import Duplicates
from gateway.engine.member import Loop, Member
from gateway.engine.tracker import Item, Tracker
from gateway.log.base import Assignment, Batch, Commit, Partition, Record
from gateway.log.records import decode_event
from gateway.log.topics import ROUTER_GROUP, Topics
from gateway.model import (
    Attempt,
    DeadLettered,
    DeadReason,
    Delivery,
    DeliveryId,
    Event,
    NewerRecordError,
    UndecodableRecordError,
    delivery_id,
)
from gateway.rules.expressions import View
from gateway.rules.rules import Route, Rules

ALL_MEMORY = 128 << 20
"""Bytes of records in memory over all ordered routes of a process; each has its part, so that none stops another."""
LEAST_MEMORY = 4 << 20
LET_GO = 10.0
"""Seconds for which attempts may end when partitions are given up; then their connections are cut. The next owner must
not begin the next of a key while we still send this one."""
PROOF = 10.0
"""Seconds after a commit was sent for which its acceptance proves that the partition is ours: more than a commit may
take, and less than the silence after which a group throws a member out. A process that was frozen meanwhile asks again
before it begins anything."""
REPEAT = 0.1
"""Seconds until a commit that wasn't accepted is sent again."""


@dataclass(frozen=True, slots=True)
class Memory:
    """What is known of the first delivery of a key beside the log: kept over a rebalance that brings it back."""

    partition: Partition
    attempts: tuple[Attempt, ...]
    due: float
    end: DeadLettered | None


class Ordered(Member):
    """A member of the group of one ordered route, destination and topic."""

    keeps_order = True

    def __init__(
        self,
        around: Surroundings,
        dispatch: Dispatcher,
        duplicates: Duplicates,
        place: tuple[str, str, str],
        *,
        memory: int,
    ) -> None:
        super().__init__(around, dispatch, duplicates, around.topics.ordered_group(*place), memory=memory)
        route, destination, topic = place
        self.route = route
        self.destination = destination
        self.topic = topic
        # Invariant: each key's first item is ready, in the dispatcher, under way or halted, and none of the others is.
        self._queues: dict[tuple[Partition, str], deque[Item]] = {}
        self._ready: list[Item] = []
        self._woken = asyncio.Event()
        self._remembered: dict[DeliveryId, Memory] = {}
        self._kicked_at = around.control.kicked_at(route, destination)
        self._changed.set()  # subscribe at once

    @override
    def loops(self) -> Iterable[tuple[str, Loop]]:
        return (*super().loops(), ("admit", self._keep_admitting))

    @override
    async def wanted(self) -> frozenset[str]:
        return frozenset((self.topic,))

    # Reading.

    @override
    async def take(self, tracker: Tracker, batch: Batch) -> None:
        for index, record in enumerate(batch.records):
            if not tracker.is_live or self._is_draining or self._stands(tracker):
                break
            if not self.has_room:
                self.set_aside(tracker, batch.records[index:])
                break
            self._take_in(tracker, record)
        if self._stands(tracker) or not tracker.progress.has_room():
            self.pause(tracker)

    def _take_in(self, tracker: Tracker, record: Record) -> None:
        pending = self.begin(tracker, record, self._log.now())
        if pending is None:
            return
        try:
            event = decode_event(record)
        except UndecodableRecordError:
            self.done(pending)  # the router keeps it among the dead
            return
        except NewerRecordError as error:
            self.leave(pending, error)
            return
        if self.is_duplicate(tracker, record, event):
            self.done(pending)
            return
        is_matched, end = self._match(event)
        if not is_matched:
            self.done(pending)
            return
        traces = self._around.traces
        if traces is not None:
            with traces.process(
                event, group=self._group, topic=self.topic, partition=tracker.partition.number, offset=record.offset
            ) as span:
                span.tell({"gateway.routes": [self.route]})
            event = replace(event, trace=span.context)
        delivery = Delivery(
            id=delivery_id(event.id, self.route, self.destination),
            event=event,
            route=self.route,
            destination=self.destination,
        )
        item = pending.add(delivery)
        item.is_waiting = True
        item.end = end
        queue = self._queues.setdefault(self._key(item), deque())
        queue.append(item)
        if len(queue) == 1:
            self._begin_first(item)

    def _match(self, event: Event) -> tuple[bool, DeadLettered | None]:
        """Tell whether the route takes an event, and if that couldn't be decided, how its delivery ends."""
        for route, error in self._around.rules().table.match(View.of(event)):
            if route.name == self.route:
                end = None if error is None else DeadLettered(reason=DeadReason.EXPRESSION_ERROR, detail=str(error))
                return True, end
        return False, None

    def _begin_first(self, item: Item) -> None:
        known = self._remembered.pop(item.delivery.id, None)
        if known is not None:
            item.delivery = replace(item.delivery, attempts=known.attempts, due=known.due)
            item.end = known.end or item.end
        self._make_ready(item)

    def _make_ready(self, item: Item) -> None:
        item.is_waiting = True
        self._ready.append(item)
        self._woken.set()

    # Order.

    async def _keep_admitting(self) -> None:
        """Let out what is ready, once a commit has been accepted since."""
        while True:
            await self._woken.wait()
            self._woken.clear()
            while self._ready and not self._is_draining:
                if self._around.control.paused_by(self.route, self.destination):
                    await self._around.sleep(IDLE_TICK)
                    continue
                asked_at = asyncio.get_running_loop().time()
                ready = list(self._ready)  # where they stay until then: what is ready is nobody else's to send on
                if not await self.commit({item.pending.tracker.partition for item in ready}, is_proof=True):
                    await self._around.sleep(REPEAT)
                    continue
                now = self._log.now()
                proven = {id(item) for item in ready}
                # Of those that are there still: a kick may have ended one meanwhile.
                ready = [item for item in self._ready if id(item) in proven]
                self._ready = [item for item in self._ready if id(item) not in proven]
                for item in ready:
                    item.proven_at = asked_at
                    if item.pending.tracker.is_live:
                        self._dispatch.admit(item, now)

    @override
    def resume(self, item: Item, now: float) -> None:
        self._make_ready(item)

    @override
    def may_begin(self, item: Item) -> bool:
        return asyncio.get_running_loop().time() < item.proven_at + PROOF

    @override
    def finished(self, item: Item) -> None:
        super().finished(item)
        key = self._key(item)
        queue = self._queues.get(key)
        if queue is None or queue[0] is not item:
            return  # it was given up
        queue.popleft()
        if queue:
            self._begin_first(queue[0])
        else:
            del self._queues[key]

    @override
    def halts(self, item: Item, end: DeadLettered) -> bool:
        route = self._route()
        if end.reason is DeadReason.ROUTE_REMOVED or (route is not None and route.on_exhausted != "halt"):
            return False
        if item.pending.tracker.is_lost:
            return False  # its memory is to be given back
        item.end = end
        item.is_waiting = True
        if route is None:
            return True  # its last attempt outlived its route: if that comes back, the key goes on here, in its order
        self._around.logger.error(
            "key_halted",
            route=self.route,
            destination=self.destination,
            event_id=item.delivery.event.id,
            delivery_id=item.delivery.id,
            reason=end.reason,
        )
        return True

    def _route(self) -> Route | None:
        return self._around.rules().routes.get(self.route)

    def _key(self, item: Item) -> tuple[Partition, str]:
        return item.pending.tracker.partition, order_key(item.delivery.event)

    # Kicks, and gauges.

    @override
    def look(self) -> None:
        super().look()
        self._obey()
        self._set_gauges()

    def _obey(self) -> None:
        """Try again at once what has been kicked, and end what halted once the rules let it."""
        kicked_at = self._around.control.kicked_at(self.route, self.destination)
        is_kicked, self._kicked_at = kicked_at != self._kicked_at, kicked_at
        route = self._route()
        ready = {id(item) for item in self._ready}
        firsts = [first for first, *_ in self._queues.values() if first.is_waiting]
        if is_kicked:
            self._remembered.clear()  # also those whose records are read after a rebalance
            self._dispatch.withdraw(firsts)
            for item in firsts:
                if self._try_anew(item) and id(item) not in ready:
                    self._make_ready(item)
        elif route is not None and route.on_exhausted != "halt":
            for item in firsts:
                if item.end is not None and id(item) not in ready:
                    self._make_ready(item)

    def _try_anew(self, item: Item) -> bool:
        """Give a delivery all its attempts again, if it had ended. False if the route no longer takes its event."""
        item.delivery = replace(item.delivery, due=0.0)
        if item.end is None:
            return True
        is_matched = True
        if item.end.reason is DeadReason.EXPRESSION_ERROR:
            is_matched, item.end = self._match(item.delivery.event)
        else:
            item.end = None
        item.delivery = replace(item.delivery, attempts=(), since=self._log.now())
        if not is_matched:
            self._ready = [other for other in self._ready if other is not item]
            self._dispatch.drop(item)
        return is_matched

    def _set_gauges(self) -> None:
        metrics = self._around.metrics
        blocked = halted = 0
        for queue in self._queues.values():
            first = queue[0]
            halted += first.end is not None
            blocked += first.end is not None or bool(first.delivery.attempts)
        where = (self.route, self.destination, self.topic)
        metrics.ordered_blocked_keys.labels(*where).set(blocked)
        metrics.ordered_halted_keys.labels(*where).set(halted)
        metrics.ordered_lag.labels(*where).set(sum(self.lag().values()))
        metrics.ordered_oldest_undone.labels(*where).set(max(self.oldest_undone(self._log.now()).values(), default=0.0))

    @override
    def let_go(self) -> None:
        super().let_go()
        metrics, where = self._around.metrics, (self.route, self.destination, self.topic)
        for gauge in (
            metrics.ordered_blocked_keys,
            metrics.ordered_halted_keys,
            metrics.ordered_lag,
            metrics.ordered_oldest_undone,
        ):
            if where in gauge:  # else its names are gone from the rules
                gauge.labels(*where).set(0)

    # Giving partitions up.

    @override
    async def _let_end(self, leaving: Collection[Tracker], waiting: Iterable[Item]) -> None:
        busy = await self._wait_for_busy(leaving, LET_GO)
        now = self._log.now()
        for pending in busy:
            for item in pending.items:
                self._dispatch.cut_short(item, now)
        await self._wait_for_busy(leaving, 1.0)
        partitions = {tracker.partition for tracker in leaving}
        for key, queue in list(self._queues.items()):
            if key[0] in partitions:
                first = queue[0]
                if first.delivery.attempts or first.end is not None:
                    known = Memory(key[0], first.delivery.attempts, first.delivery.due, first.end)
                    self._remembered[first.delivery.id] = known
                del self._queues[key]
        self._ready = [item for item in self._ready if item.pending.tracker.is_live]

    @override
    def replaced(self, assignment: Assignment) -> None:
        partition = assignment.partition
        self._queues = {key: queue for key, queue in self._queues.items() if key[0] != partition}
        self._ready = [item for item in self._ready if item.pending.tracker.partition != partition]
        super().replaced(assignment)

    @override
    def take_over(self) -> None:
        """Forget what is known of partitions that are another's now."""
        self._remembered = {name: known for name, known in self._remembered.items() if known.partition in self.trackers}


def order_key(event: Event) -> str:
    """Return what an event shares with those it must keep its order with: its source and key, or nothing but itself."""
    return f"{event.source}\0{event.key}" if event.key is not None else event.id


async def seed(around: Surroundings, rules: Rules) -> None:
    """Let the groups of new ordered routes begin where the router stands, before it passes over their events.

    Raises LogUnavailableError.
    """
    router = around.topics.group(ROUTER_GROUP)
    for route, destination, topic in sorted(ordered_in(rules, around.topics)):
        group = around.topics.ordered_group(route, destination, topic)
        # Where the router stands is read before it is known that nobody was faster: whoever was, began no later.
        stands = await around.log.committed(router, topic)
        bounds = await around.log.bounds(topic)
        missing = bounds.keys() - (await around.log.committed(group, topic)).keys()
        if missing:
            seeds = {Partition(topic, number): stands.get(number, Commit(bounds[number][0])) for number in missing}
            await around.log.seed(group, seeds)


def ordered_in(rules: Rules, topics: Topics) -> frozenset[tuple[str, str, str]]:
    """Return each ordered route, destination and topic of the rules: a group is one of them."""
    return frozenset(
        (route.name, destination, rules.sources[source].topic or topics.events(source))
        for route in rules.routes.values()
        if route.order is not None
        for destination in route.destinations
        for source in route.sources
    )
