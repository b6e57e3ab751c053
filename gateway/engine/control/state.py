"""What holds at the moment of what operators have ordered: a fold over `gateway.control` (see `records.py`).

Operators write orders, and the one owner of the jobs (`jobs/runner.py`) the markers, under keys of its own, so that
neither can undo what the other says. A marker follows the records that its job has injected: a job that is killed
repeats some, and skips none. A record without a value says that the order of its key is gone.

A newer pause, resumption or kick takes the place of an older one of its key, and one job may do for several. So the
last marker of a job answers all orders of its key up to an offset of the control topic, and that is how these end.
"""

from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice

from gateway.engine.control.records import DeadFilter, Kind, Letter, Order, State, decode, kind_and_name, partition_key
from gateway.engine.control.routing_history import History
from gateway.log.base import Partition
from gateway.model import NewerRecordError


class Control:
    """The orders in force."""

    def __init__(self, orders: Iterable[Order] = ()) -> None:
        self.orders: dict[str, Order] = {}
        self.settlements = 0
        """How often it has been told that dead letters were settled: when it rises, fewer may be open."""
        self.kicks = 0
        """How many kicks have been announced."""
        self.newer: set[str] = set()
        """The keys whose last record a newer version wrote: nobody here acts on what it is about."""
        self._asked: dict[str, Order] = {}
        self._offsets: dict[str, int] = {}  # key → where its order stands in the control topic
        self._unclosed: dict[str, Order] = {}
        self.history = History()
        self._paused: frozenset[str] = frozenset()
        self._markers: dict[str, Order] = {}
        self._last_kicks: dict[str, int] = {}  # name → the number of its last kick
        self._settled = _Settled()
        self._settling: dict[str, Order] = {}  # key → the order as far as it is carried out
        self._last_settlements: dict[str, int] = {}
        for order in orders:
            self.apply(order)

    def take(self, key: bytes, value: bytes, offset: int = 0) -> None:
        """Apply the record of the control topic at an offset. Raises UndecodableRecordError, and has changed nothing.

        Raises NewerRecordError for one of a newer version: what stood under its key counts no more, and what may have
        been paused by it is, since a pause that isn't obeyed can't be made good.
        """
        name = key.decode(errors="surrogateescape")
        self.newer.discard(name)
        kind, called = kind_and_name(key)
        if not value and kind is None:
            return  # of an order that was a newer version's
        try:
            order = decode(key, value)
        except NewerRecordError:
            self.newer.add(name)
            if kind is not None and kind != "marker":
                self.apply(Order(kind=kind, name=called, state="paused" if kind == "pause" else "gone", at=0.0), offset)
            raise
        self.apply(order, offset)

    def waits(self, key: str) -> bool:
        """Return whether an order is to be left to a newer version, which has written it or how far it has come."""
        return not self.newer.isdisjoint((key, f"marker/{key}", f"marker/hold/{key}"))

    def apply(self, order: Order, offset: int = 0) -> None:
        """Take in the next record of the control topic, and where it stands there."""
        if order.kind in ("rules", "routed"):
            self.history.apply(order)
            return
        if order.kind == "marker":
            self._apply_marker(order)
            return
        key = order.key
        self._asked.pop(key, None)
        if order.state == "gone":
            self.orders.pop(key, None)
        else:
            self.orders[key] = order
            if order.is_asked:
                self._asked[key] = order
        self._offsets[key] = offset
        if order.kind == "replay":
            self._close(key)
        if order.kind == "pause":
            added = {order.name} if order.state == "paused" else set[str]()
            self._paused = (self._paused - {order.name}) | added
        if order.kind == "dead":
            self._settle(key)

    def _apply_marker(self, marker: Order) -> None:
        name = marker.name
        if marker.state == "gone":
            self._markers.pop(name, None)
            return
        self._markers[name] = marker
        if marker.state == "done" and name in self._asked and self._offsets[name] < marker.answers:
            order = self._asked.pop(name)
            ended: State = "active" if order.kind == "pause" else "done"
            self.orders[name] = order.with_state(
                ended,
                count=marker.count,
                detail=marker.detail,
                tried=marker.tried,
                delivered=marker.delivered,
                waits=marker.waits,
                got=marker.got,
                again=marker.again,
                rate=marker.rate,
                unread=marker.unread,
            )
        if name.startswith("hold/kick/"):
            self.kicks += 1
            self._last_kicks[name.removeprefix("hold/kick/")] = self.kicks
        if name.startswith("dead/"):
            self._settle(name)
        if name.startswith("replay/"):
            self._close(name)

    def _close(self, key: str) -> None:
        """See whether it is told how far a replay that was cancelled had come."""
        order, marker = self.orders.get(key), self._markers.get(key)
        is_closed = marker is not None and marker.state == "cancelled"
        if order is not None and order.state == "cancelled" and not is_closed:
            self._unclosed[key] = order
        else:
            self._unclosed.pop(key, None)

    def _settle(self, key: str) -> None:
        """File an order about dead letters as far as it is carried out: up to its marker until it is done."""
        before = self._settling.pop(key, None)
        if before is not None:
            self._settled.remove(before)
        order, marker = self.orders.get(key), self._markers.get(key)
        if order is None or (order.state != "done" and marker is None):
            self._last_settlements.pop(key, None)
            return
        reached = order if order.state == "done" or marker is None else replace(order, marker=marker.marker)
        self._settling[key] = reached
        self._settled.add(reached)
        self.settlements += 1
        self._last_settlements[key] = self.settlements

    def settled_after(self, number: int) -> list[Order]:
        """Return the orders about dead letters that have come further since `settlements` was that number."""
        return [
            self._settling[key]
            for key, last in self._last_settlements.items()
            if last > number and key in self._settling
        ]

    def asked(self, kind: Kind) -> list[Order]:
        """Return the orders of a kind that a job has to carry out, the first first."""
        return [order for order in self._asked.values() if order.kind == kind and not self.waits(order.key)]

    def is_open(self, key: str) -> bool:
        """Return whether an order of a key is still to be carried out."""
        return key in self._asked

    def is_asked(self, order: Order) -> bool:
        """Return whether an order is in force and still to be carried out."""
        return self._asked.get(order.key) == order

    def answered(self, key: str) -> int:
        """Return the offset below which the orders of a key are answered."""
        marker = self._markers.get(key)
        return 0 if marker is None else marker.answers

    def unclosed(self) -> list[Order]:
        """Return the replays that were cancelled, and of which nobody has told how far they had come."""
        return [order for key, order in self._unclosed.items() if not self.waits(key)]

    def marker(self, key: str) -> Mapping[str, int]:
        """Return up to where the jobs of an order have scanned: "topic/partition" → offset."""
        order = self._markers.get(key)
        return {} if order is None else order.marker

    def injected(self, key: str) -> int:
        """Return how many deliveries the job of an order has injected up to its marker."""
        order = self._markers.get(key)
        return 0 if order is None else order.count

    def is_begun(self, key: str) -> bool:
        """Return whether a marker of an order was left by a job on its way."""
        order = self._markers.get(key)
        return order is not None and order.is_asked

    def unread(self, key: str) -> int:
        """Return how many partitions the job of an order can't read as of its marker."""
        order = self._markers.get(key)
        return 0 if order is None else order.unread

    def missed(self, key: str) -> frozenset[str]:
        """Return without which partitions of what tells the undelivered a replay has come to its marker."""
        order = self._markers.get(key)
        return frozenset() if order is None or not order.detail else frozenset(order.detail.split(", "))

    def replayed_as(self, key: str) -> str:
        """Return the route of a replay as an edition has it; "" where that has changed on the way, or isn't known."""
        order = self._markers.get(key)
        return "" if order is None else order.routes

    def kicked_at(self, route: str, destination: str) -> float:
        """Return when the last kick of either was announced, by the log's clock; 0.0 if none was."""
        keys = (f"hold/kick/destination/{destination}", f"hold/kick/route/{route}")
        return max([self._markers[key].at for key in keys if key in self._markers], default=0.0)

    def kicked_after(self, count: int) -> list[str]:
        """Return the names ("route/…" or "destination/…") whose kick was announced after that many others."""
        return [name for name, number in self._last_kicks.items() if number > count]

    def has_scanned(self, key: str, partition: Partition, offset: int) -> bool:
        """Return whether a job of a pause or a kick has had its look at a record."""
        order = self._markers.get(key)
        return order is not None and order.is_before_marker(partition, offset)

    def paused_by(self, route: str, destination: str) -> str | None:
        """Return the paused name that stops a delivery ("route/…" or "destination/…"), if one does."""
        if not self._paused:
            return None
        for name in (f"destination/{destination}", f"route/{route}"):
            if name in self._paused:
                return name
        return None

    def is_kicked(self, route: str, destination: str, partition: Partition, offset: int) -> bool:
        """Return whether a kick has injected this record again, so that it's to be skipped when it comes due."""
        if not self._markers:
            return False
        return self.has_scanned(f"kick/destination/{destination}", partition, offset) or self.has_scanned(
            f"kick/route/{route}", partition, offset
        )

    def is_held(self, route: str, destination: str, partition: Partition, offset: int) -> bool:
        """Return whether a kick is about to inject this record again, so that it's to wait for that.

        Not by one that has been answered: its job, or another that took itself for the owner, has said that it is over.
        """
        for key in (f"kick/destination/{destination}", f"kick/route/{route}"):
            if key in self._asked and self.has_scanned(f"hold/{key}", partition, offset):
                return True
        return False

    def is_expedited(self, route: str, destination: str, partition: Partition, offset: int) -> bool:
        """Return whether a kick has found this record in the shortest tier, so that it's due whenever it comes out."""
        place = partition_key(partition)
        for name in (f"hold/kick/destination/{destination}", f"hold/kick/route/{route}"):
            announced = self._markers.get(name)
            if announced is not None and offset < announced.expedited.get(place, 0):
                return True
        return False

    def next_replay(self, waiting: Collection[str] = ()) -> Order | None:
        """Return the replay whose turn it is: of those that are asked for, haven't ended and don't wait, the first."""
        return next((order for order in self.asked("replay") if order.key not in waiting), None)

    def settled(self, letter: Letter, partition: Partition, offset: int) -> Order | None:
        """Return the order that replayed or dropped a dead letter, if one did; of several the first."""
        found = self._settled.of(letter, partition, offset)
        return min(found, key=lambda order: order.at, default=None)

    def obsolete(self, before: float, log_starts: Mapping[str, int]) -> list[Order]:
        """Return the orders of a name of their own that ended, were given before a time, and can't be about anything.

        `log_starts` are the first offsets that the dead-letter topic still has, as "topic/partition" → offset: an order
        about dead letters is kept while one is there that it covers, or that one would be open again. A pause or a kick
        is kept: there are no more of them than names, and one that is given just now must not be taken for the old one.
        """
        return [
            order
            for order in self.orders.values()
            if order.at < before
            and order.kind in ("replay", "dead")
            and order.state in ("done", "cancelled")
            and (order.kind != "dead" or all(log_starts.get(key, end) >= end for key, end in order.marker.items()))
        ]


class _Settled:
    """The orders about dead letters as far as they are carried out, filed so that a letter is held against few of them.

    By the records or the deliveries that they name; else by what they filter, and then in a row, in which the first
    order that reaches a record is found by bisection: an operator who replays a destination's letters every hour gives
    hundreds of orders alike.
    """

    def __init__(self) -> None:
        self._by_name: dict[str, list[Order]] = {}
        self._by_filter: dict[tuple[str | None, str | None, str | None], _Row] = {}

    def add(self, order: Order) -> None:
        if names := order.filter.records or order.filter.ids:
            for name in names:
                self._by_name.setdefault(name, []).append(order)
        else:
            self._by_filter.setdefault(_kind_of(order.filter), _Row()).add(order)

    def remove(self, order: Order) -> None:
        if names := order.filter.records or order.filter.ids:
            for name in names:
                self._by_name[name].remove(order)
                if not self._by_name[name]:
                    del self._by_name[name]
        else:
            self._by_filter[_kind_of(order.filter)].remove(order)

    def of(self, letter: Letter, partition: Partition, offset: int) -> Iterator[Order]:
        """Yield the orders that settled a letter; of a row only the first."""
        for order in (*self._by_name.get(letter.id, ()), *self._by_name.get(f"{partition.number}@{offset}", ())):
            if order.is_before_marker(partition, offset) and order.is_for(letter):
                yield order
        if not self._by_filter:
            return
        for route in (letter.route, None):
            for destination in (letter.destination, None):
                for reason in (letter.reason, None):
                    row = self._by_filter.get((route, destination, reason))
                    if row is not None:
                        yield from row.first(letter, partition, offset)


class _Row:
    """Orders of one kind of filter, in the order of their ends, with how far all up to each of them reach."""

    def __init__(self) -> None:
        self._orders: list[Order] = []
        self._reach: dict[str, list[int]] = {}  # place → for each order the furthest offset of all up to it
        self._counted = 0  # orders whose reach is known

    def add(self, order: Order) -> None:
        self._orders.append(order)

    def remove(self, order: Order) -> None:
        self._orders.remove(order)
        self._reach, self._counted = {}, 0

    def first(self, letter: Letter, partition: Partition, offset: int) -> Iterator[Order]:
        self._count()
        reach = self._reach.get(partition_key(partition))
        if reach is None:
            return
        for order in islice(self._orders, bisect_right(reach, offset), None):
            if order.is_before_marker(partition, offset) and order.is_for(letter):
                yield order
                return

    def _count(self) -> None:
        for index in range(self._counted, len(self._orders)):
            marker = self._orders[index].marker
            for place in marker.keys() - self._reach.keys():
                self._reach[place] = [0] * index
            for place, reach in self._reach.items():
                reach.append(max(reach[-1] if reach else 0, marker.get(place, 0)))
        self._counted = len(self._orders)


def _kind_of(which: DeadFilter) -> tuple[str | None, str | None, str | None]:
    return which.route, which.destination, which.reason
