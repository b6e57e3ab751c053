"""What a route has delivered, and what it hasn't, by what the log knows. No record tells that a delivery succeeded.

has an open dead letter ─────────────────────────────────▶ undelivered
routed by an edition in which the route matches it ──────▶ ended: delivered, on its way, or given up on purpose
... of which that isn't known ───────────────────────────▶ unknown
a replay of the route has been over it, as it was then ──▶ ended
else: the route was another then, or there was none ─────▶ undelivered
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from gateway.engine.control import Control, DeadFilter, Order, Selection
from gateway.engine.letters import read_letter
from gateway.log.base import Log, Partition, Record
from gateway.log.topics import Topics
from gateway.model import DeliveryId, Event
from gateway.rules.edition import RouteThen, route_then
from gateway.rules.expressions import View
from gateway.rules.table import RouteTable

SKEW = 60.0
"""Seconds by which the clocks of two partitions' leaders may differ."""


class Fate(Enum):
    """What the log knows of one delivery."""

    UNDELIVERED = auto()
    ENDED = auto()
    """Delivered, on its way, or given up on purpose."""
    UNKNOWN = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Dead:
    """The open dead letters of a route: for each event and destination the id of the delivery; `ends` is how far."""

    letters: Mapping[tuple[str, float, str], DeliveryId] = field(default_factory=dict)
    ends: Mapping[str, int] = field(default_factory=dict)

    def of(self, event: Event, destination: str) -> DeliveryId | None:
        return self.letters.get((event.id, event.received_at, destination))


async def open_letters(log: Log, topics: Topics, control: Control, selection: Selection) -> Dead:
    """Read which dead letters of a selection's route are open now."""
    letters: dict[tuple[str, float, str], DeliveryId] = {}
    ends: dict[str, int] = {}
    which = DeadFilter(route=selection.route, destination=selection.destination)
    # One that was written before the first event was appended isn't of any.
    starts = await log.offsets_at(topics.dead, max(0.0, selection.since - SKEW))
    for number, (first, end) in (await log.bounds(topics.dead)).items():
        partition = Partition(topics.dead, number)
        ends[f"{topics.dead}/{number}"] = end
        async for records in log.scan(partition, max(first, starts.get(number, first)), end):
            for record in records:
                letter, filed = read_letter(record)
                if filed is None or not which.covers(letter) or control.settled(letter, partition, record.offset):
                    continue
                delivery = filed.delivery
                letters[delivery.event.id, delivery.event.received_at, delivery.destination] = delivery.id
    return Dead(letters=letters, ends=ends)


class Undelivered:
    """Tells of the deliveries of one route what has become of them, at the beginning of the replay with the `key`.

    Without one, it tells what will have become of them once the replays that are asked for have ended.
    """

    def __init__(self, control: Control, route: str, dead: Dead, *, key: str = "") -> None:
        self._history = control.history
        self._route = route
        self._dead = dead
        self._replays = [_Replay(order, control) for order in _replays_of(control, route, key)]
        self._known: dict[str, tuple[RouteThen, RouteTable | None]] = {}

    def fate(self, partition: Partition, record: Record, event: Event, destination: str) -> Fate:
        """Tell what is known of an event's delivery by the route to a destination."""
        if self._dead.of(event, destination) is not None:
            return Fate.UNDELIVERED
        view = View.of(event)
        edition = self._history.edition_at(partition, record.offset)
        known = Fate.UNKNOWN if edition is None else self._by(edition.routes.get(self._route), view, destination)
        fate = known
        if fate is Fate.ENDED:
            return fate
        for replay in self._replays:
            if not replay.covers(partition, record, event, destination):
                continue
            replayed = self._by(replay.text, view, destination) if replay.text else Fate.UNKNOWN
            if replayed is Fate.ENDED and (known is Fate.UNDELIVERED or not replay.is_of_undelivered):
                return Fate.ENDED
            if replayed is Fate.UNKNOWN:
                fate = Fate.UNKNOWN
        return fate

    def _by(self, text: str | None, view: View, destination: str) -> Fate:
        """Tell what has become of an event that was matched by the route as an edition has it; None if it hadn't it."""
        if text is None:
            return Fate.UNDELIVERED
        if text not in self._known:
            then = route_then(self._route, text)
            self._known[text] = then, None if then.route is None else RouteTable((then.route,))
        then, table = self._known[text]
        if view.source not in then.sources or destination not in then.destinations:
            return Fate.UNDELIVERED
        if table is None:
            return Fate.UNKNOWN
        # What a condition failed for is among the dead, or has been taken out of there on purpose.
        return Fate.ENDED if table.match(view) else Fate.UNDELIVERED


class _Replay:
    """A replay of before: what it was over, and the route as an edition has it; "" if that has changed meanwhile."""

    def __init__(self, order: Order, control: Control) -> None:
        assert order.selection is not None, order
        self._selection = order.selection
        self._reach = control.marker(order.key) if order.state == "cancelled" else order.marker
        self.text = control.replayed_as(order.key)
        self.is_of_undelivered = order.selection.undelivered

    def covers(self, partition: Partition, record: Record, event: Event, destination: str) -> bool:
        which, place = self._selection, f"{partition.topic}/{partition.number}"
        return (
            which.starts.get(place, record.offset + 1) <= record.offset < self._reach.get(place, 0)
            and which.since <= record.appended_at
            and (which.until is None or record.appended_at < which.until)
            and which.source in (None, event.source)
            and which.destination in (None, destination)
        )


def _replays_of(control: Control, route: str, key: str) -> Sequence[Order]:
    return [
        order
        for order in control.orders.values()
        if order.selection is not None and order.selection.route == route and order.key != key
        if not (key and order.state == "asked")  # its turn comes after this one's
    ]
