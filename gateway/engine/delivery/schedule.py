"""What waits in one process: in the lanes of destinations, and in memory until a time.

                ┌─ lane: its turn ──▶ taken ──▶ an attempt
    item ───────┤     └─ overdue, or shut ──▶ a spill
                └─ until a time ──▶ due ──▶ its owner sends it on

Nothing is started or written here: that is for `dispatcher`.
"""

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping

from gateway.engine.control.state import Control
from gateway.engine.delivery.lanes import Budget, Lane
from gateway.engine.partition_tracker import Item
from gateway.rules.rules import Destination, Rules

TICK = 0.05
"""Seconds between looks at lanes in which something waits."""
IDLE_TICK = 0.25


class Schedule:
    """The lanes, made as destinations are delivered to, and a heap of what is due within seconds."""

    def __init__(self, rules: Callable[[], Rules], control: Control) -> None:
        self._rules = rules
        self._control = control
        self._budget = Budget()
        self._lanes: dict[str, Lane] = {}
        self._busy: dict[str, Lane] = {}  # those in which something waits, or did a moment ago: there may be thousands
        self._used: dict[str, Destination] = {}  # as each lane was last told of it
        self._share = 1.0
        self._kicks_heard = 0
        self._soon: list[tuple[float, int, Item]] = []  # heap of deliveries that are due within seconds
        self._soon_count = 0

    # Lanes.

    @property
    def lanes(self) -> Mapping[str, Lane]:
        """The lanes that there are, by destination."""
        return self._lanes

    def lane(self, name: str) -> Lane:
        """Return the lane of a destination in the rules."""
        if self._kicks_heard != self._control.kicks:
            self.hear_kicks()  # before anything that a kick has brought on is offered
        lane = self._lanes.get(name)
        if lane is None:
            destination = self._rules().destinations[name]
            lane = Lane(name, self._budget, concurrency=destination.concurrency, rate=destination.rate)
            self._lanes[name] = lane
            self._limit(lane, destination)
        return lane

    def limit(self, share: float | None = None) -> None:
        """Set the lanes' limits by the rules in force and this worker's share of the fleet."""
        self._share = self._share if share is None else share
        for name, lane in self._lanes.items():
            destination = self._rules().destinations.get(name)
            if destination is not None:
                self._limit(lane, destination)

    def _limit(self, lane: Lane, destination: Destination) -> None:
        lane.limit(concurrency=destination.concurrency, rate=destination.rate, share=self._share)
        if self._used.get(lane.name, destination) != destination:
            lane.start_afresh()  # it was fixed, perhaps: what failed before says nothing of it
        self._used[lane.name] = destination

    def hear_kicks(self) -> None:
        """End the holds of what was kicked."""
        if self._kicks_heard == self._control.kicks:
            return
        routes = self._rules().routes
        kicked: set[str] = set()
        for place in self._control.kicked_after(self._kicks_heard):
            kind, _, name = place.partition("/")
            if kind == "destination":
                kicked.add(name)
            elif name in routes:
                kicked.update(routes[name].destinations)
        for name in kicked & self._lanes.keys():
            self._lanes[name].kick()
        self._kicks_heard = self._control.kicks

    def is_waited_in(self, lane: Lane) -> None:
        """Note that something waits in a lane, which is looked at from here on."""
        self._busy[lane.name] = lane

    def busy(self) -> Iterator[Lane]:
        """Yield each lane in which something waits, or did; the next look leaves out those in which nothing does."""
        for name, lane in list(self._busy.items()):
            yield lane
            if not lane.waiting:
                del self._busy[name]

    def forget(self, name: str) -> None:
        """Let a lane go whose destination the rules don't name any more."""
        del self._lanes[name], self._used[name]
        self._busy.pop(name, None)

    # Until a time.

    def wait(self, item: Item, until: float) -> None:
        """Keep a delivery until a time."""
        self._soon_count += 1
        heapq.heappush(self._soon, (until, self._soon_count, item))

    def take_due(self, now: float) -> Item | None:
        """Take out the delivery that is due first, if one is."""
        return heapq.heappop(self._soon)[2] if self._soon and self._soon[0][0] <= now else None

    def waiting(self) -> Counter[str]:
        """Count what waits until a time, by destination."""
        return Counter(item.delivery.destination for _, _, item in self._soon)

    def until_next_look(self, now: float) -> float:
        """Return the seconds until something may have become due."""
        if self._busy:
            return TICK
        if not self._soon:
            return IDLE_TICK
        return max(0.001, min(IDLE_TICK, self._soon[0][0] - now))

    def withdraw(self, items: Iterable[Item]) -> None:
        """Take deliveries out of where they wait; what doesn't is ignored."""
        gone = {id(item): item.delivery.destination for item in items}
        for name in set(gone.values()) & self._lanes.keys():
            self._lanes[name].remove(gone)
        self._soon = [entry for entry in self._soon if id(entry[2]) not in gone]
        heapq.heapify(self._soon)
