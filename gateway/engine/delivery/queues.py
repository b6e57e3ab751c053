"""The waiting deliveries of one process: in the lanes of destinations, or in memory until a time.

                ┌─ lane: its turn ──▶ taken ──▶ an attempt
    delivery ───┤     └─ too long, or a hold ──▶ a spill
                └─ until a time ──▶ due ──▶ its member resumes it

Nothing is started or written here; `dispatcher` does that.
"""

import asyncio
import heapq
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from gateway.engine.control.state import Control
from gateway.engine.delivery.breaker import MIN_CLOCK_STEP
from gateway.engine.delivery.destination_lanes import Budget, Lane
from gateway.engine.partition_tracker import PendingDelivery
from gateway.model import SpillReason
from gateway.rules.rules import Destination, Rules

TICK = 0.05
"""Seconds between checks of lanes with queued deliveries."""
IDLE_TICK = 0.25
QUICK = 0.5
"""Seconds in which most attempts end: before a drain, nothing is started for as long."""


class Queues:
    """The lanes, created on first use, and a heap of deliveries that are due within seconds."""

    def __init__(self, rules: Callable[[], Rules], control: Control) -> None:
        self._rules = rules
        self._control = control
        self._budget = Budget()
        self.is_suspended = False
        """Whether no attempt may start."""
        self._lanes: dict[str, Lane] = {}
        self._busy: dict[str, Lane] = {}  # those with queued deliveries, now or at the last check
        self._used: dict[str, Destination] = {}  # the definition that each lane was last set up with
        self._share = 1.0
        self._kicks_applied = 0
        self._soon: list[tuple[float, int, PendingDelivery]] = []  # heap of deliveries that are due within seconds
        self._soon_count = 0
        self._now = 0.0

    # Lanes.

    @property
    def lanes(self) -> Mapping[str, Lane]:
        """The lanes, by destination."""
        return self._lanes

    def lane(self, name: str) -> Lane:
        """Return the lane of a destination in the rules."""
        if self._kicks_applied != self._control.kicks:
            self.apply_kicks()  # before a delivery that the kick has expedited is offered
        lane = self._lanes.get(name)
        if lane is None:
            destination = self._rules().destinations[name]
            lane = Lane(name, self._budget, concurrency=destination.concurrency, rate=destination.rate)
            self._lanes[name] = lane
            self._limit(lane, destination)
        return lane

    def set_limits(self, share: float | None = None) -> None:
        """Set the lanes' limits according to the active rules and this worker's share of the fleet."""
        self._share = self._share if share is None else share
        for name, lane in self._lanes.items():
            destination = self._rules().destinations.get(name)
            if destination is not None:
                self._limit(lane, destination)

    def _limit(self, lane: Lane, destination: Destination) -> None:
        lane.set_limits(concurrency=destination.concurrency, rate=destination.rate, share=self._share)
        if self._used.get(lane.name, destination) != destination:
            lane.reset()  # it was fixed, perhaps: earlier failures say nothing about it
        self._used[lane.name] = destination

    def apply_kicks(self) -> None:
        """End the holds of kicked destinations."""
        if self._kicks_applied == self._control.kicks:
            return
        routes = self._rules().routes
        kicked: set[str] = set()
        for kicked_name in self._control.kicked_after(self._kicks_applied):
            kind, _, name = kicked_name.partition("/")
            if kind == "destination":
                kicked.add(name)
            elif name in routes:
                kicked.update(routes[name].destinations)
        for name in kicked & self._lanes.keys():
            self._lanes[name].kick()
        self._kicks_applied = self._control.kicks

    def watch_lane(self, lane: Lane) -> None:
        """Check a lane regularly from now on, as long as it has queued deliveries."""
        self._busy[lane.name] = lane

    def watched_lanes(self) -> Iterator[Lane]:
        """Yield each watched lane; stop watching it if nothing is queued in it."""
        for name, lane in list(self._busy.items()):
            yield lane
            if not lane.waiting:
                del self._busy[name]

    def forget(self, name: str) -> None:
        """Remove the lane of a destination that the rules no longer name."""
        del self._lanes[name], self._used[name]
        self._busy.pop(name, None)

    async def let_slow_attempts_end(self, until: float, sleep: Callable[[float], Awaitable[None]]) -> None:
        """Wait for the attempts in flight, up to a time of the loop's clock, before a drain.

        A destination whose attempts take long gets no others. All others do: until this process has left its group,
        nobody else reads their events.
        """
        quick_until = min(until, asyncio.get_running_loop().time() + QUICK)
        self.is_suspended = True
        slow = await _wait_until_idle(self._lanes.values(), quick_until, sleep)
        self.is_suspended = False
        for lane in slow:
            lane.is_closed = True
        await _wait_until_idle(slow, until, sleep)

    # Until a time.

    def wait(self, pending: PendingDelivery, until: float) -> None:
        """Keep a delivery until a time."""
        self._soon_count += 1
        heapq.heappush(self._soon, (until, self._soon_count, pending))

    def pop_due(self, now: float) -> PendingDelivery | None:
        """Remove and return the delivery that is due first, if one is due."""
        return heapq.heappop(self._soon)[2] if self._soon and self._soon[0][0] <= now else None

    def wake_returned(self, now: float) -> None:
        """Make due what waits because the rules lacked a name that they have again."""
        rules = self._rules()
        for index, (until, count, pending) in enumerate(self._soon):
            delivery = pending.delivery
            is_declared = not delivery.destination or delivery.destination in rules.destinations
            is_known = delivery.route in rules.routes and is_declared
            if pending.metadata.spill_reason == SpillReason.UNKNOWN_NAME and is_known:
                pending.delivery = replace(delivery, due=min(delivery.due, now))
                self._soon[index] = (min(until, now), count, pending)
        heapq.heapify(self._soon)

    def waiting(self) -> Counter[str]:
        """Count the deliveries that wait until a time, by destination."""
        return Counter(pending.delivery.destination for _, _, pending in self._soon)

    def until_next_check(self, now: float) -> float:
        """Return the seconds until something may have become due."""
        self._follow_clock(now)
        if self._busy:
            return TICK
        if not self._soon:
            return IDLE_TICK
        return max(0.001, min(IDLE_TICK, self._soon[0][0] - now))

    def _follow_clock(self, now: float) -> None:
        """Wait no longer if the log's time goes back: this machine's was wrong, and the brokers' has become known."""
        back, self._now = self._now - now, now
        if back <= MIN_CLOCK_STEP:
            return
        self._soon = [(until - back, count, pending) for until, count, pending in self._soon]
        for _, _, pending in self._soon:
            if pending.delivery.due > now:
                pending.delivery = replace(pending.delivery, due=pending.delivery.due - back)

    def withdraw(self, deliveries: Iterable[PendingDelivery]) -> None:
        """Remove deliveries from where they wait; others are ignored."""
        withdrawn = {id(pending): pending.delivery.destination for pending in deliveries}
        if not withdrawn:
            return
        for name in set(withdrawn.values()) & self._lanes.keys():
            self._lanes[name].remove(withdrawn)
        self._soon = [entry for entry in self._soon if id(entry[2]) not in withdrawn]
        heapq.heapify(self._soon)


async def _wait_until_idle(
    lanes: Iterable[Lane], until: float, sleep: Callable[[float], Awaitable[None]]
) -> Sequence[Lane]:
    """Wait until no lane has attempts in flight, or until a time of the loop's clock; return those that still have."""
    loop = asyncio.get_running_loop()
    busy = [lane for lane in lanes if lane.in_flight]
    while busy and loop.time() < until:
        await sleep(0.01)
        busy = [lane for lane in busy if lane.in_flight]
    return busy
