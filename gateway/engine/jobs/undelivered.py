"""What a route has delivered, and what it hasn't, by what the log knows. No record tells that a delivery succeeded.

    has an open dead letter ─────────────────────────────────▶ undelivered
    was let go as a copy, and is none by the rules in force ─▶ undelivered, unless a replay has been over it since
    routed by an edition in which the route matches it ──────▶ ended: delivered, on its way, or given up on purpose
    ... of which that isn't known ───────────────────────────▶ unknown
    a replay of the route has been over it, as it was then ──▶ ended
    else: the route was another then, or there was none ─────▶ undelivered

The first of these that holds counts.
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from enum import Enum, auto

from gateway.engine.control.records import DeadFilter, Order, Selection, partition_key
from gateway.engine.control.state import Control
from gateway.engine.jobs.dead_letters import read_letter
from gateway.engine.unavailable_partitions import Readable
from gateway.log.base import Commit, Log, Partition, Record
from gateway.log.records import SIGHTING, decode_sightings
from gateway.log.topics import ROUTER_GROUP, Topics
from gateway.model import Event, UnreadableRecordError, identity_of
from gateway.rules.event_builder import EventBuilder
from gateway.rules.event_view import EventView
from gateway.rules.route_table import RouteTable
from gateway.rules.routing_revision import PastRoute, past_route
from gateway.rules.rules import Route, Rules

SKEW = 60.0
"""Seconds by which the clocks of two partitions' leaders may differ."""
BEFORE = 3600.0
"""Seconds before a selection's time from which on sightings are read; of an event older than all of them nothing is
said."""
ROWS_AT_ONCE = 1_000
"""Sightings between which other tasks get their turn: a millisecond."""


class Fate(Enum):
    """What the log knows of one delivery."""

    UNDELIVERED = auto()
    ENDED = auto()
    """Delivered, on its way, or given up on purpose."""
    UNKNOWN = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Dead:
    """The open dead letters of a route: for each event and destination where they are, as PARTITION@OFFSET.

    `ends` is how far they were read.
    """

    letters: Mapping[tuple[str, float, str], Sequence[str]] = field(default_factory=dict)
    ends: Mapping[str, int] = field(default_factory=dict)
    unread: frozenset[str] = frozenset()
    """Partitions that couldn't be read ("topic/partition"): of their letters nothing is known."""

    def of(self, event: Event, destination: str) -> Sequence[str]:
        return self.letters.get((event.id, event.received_at, destination), ())


async def open_letters(log: Log, topics: Topics, control: Control, selection: Selection, *, readable: Readable) -> Dead:
    """Read which dead letters of a selection's route are open now, of those partitions that are `readable`."""
    letters: dict[tuple[str, float, str], list[str]] = {}
    ends: dict[str, int] = {}
    which = DeadFilter(route=selection.route, destination=selection.destination)
    # One that was written before the first event was appended isn't of any.
    bounds, unread = await readable(topics.dead)
    starts = await log.offsets_at(topics.dead, max(0.0, selection.since - SKEW), bounds.keys())
    for number, (first, end) in bounds.items():
        partition = Partition(topics.dead, number)
        ends[f"{topics.dead}/{number}"] = end
        async for records in log.scan(partition, max(first, starts.get(number, first)), end):
            for record in records:
                letter, stored = read_letter(record)
                if stored is None or not which.covers(letter) or control.settled(letter, partition, record.offset):
                    continue
                event = stored.delivery.event
                about = letters.setdefault((event.id, event.received_at, stored.delivery.destination), [])
                about.append(f"{number}@{record.offset}")
    return Dead(letters=letters, ends=ends, unread=frozenset([f"{topics.dead}/{number}" for number in unread]))


class Sighted:
    """Which events of some partitions were let through, by what `gateway.dedupe` has: copies aren't sighted."""

    def __init__(
        self,
        starts: Mapping[str, int],
        ends: Mapping[str, int],
        done: Mapping[str, Commit],
        unread: frozenset[str] = frozenset(),
    ) -> None:
        self.unread = unread
        """Partitions of sightings that couldn't be read: any may be in them, so nothing is taken for let go."""
        self._starts = starts
        self._done = done
        self._lowest: dict[str, int] = {}
        self._bits = {place: bytearray((end - starts[place]) // 8 + 1) for place, end in ends.items()}

    def add(self, place: str, rows: bytes) -> None:
        bits = self._bits[place]
        start = self._starts[place]
        for _, _, offset, _ in SIGHTING.iter_unpack(rows):
            self._lowest[place] = min(offset, self._lowest.get(place, offset))
            if 0 <= offset - start < 8 * len(bits):
                bits[(offset - start) // 8] |= 1 << (offset - start) % 8

    def was_let_go(self, partition: Partition, offset: int) -> bool:
        """Return whether an event, whose source had `dedupe` when it was read, surely wasn't let through."""
        place = partition_key(partition)
        if self.unread or place not in self._bits or place not in self._done or not self._done[place].covers(offset):
            return False  # what was seen is stored before the commit that covers it
        index = offset - self._starts[place]
        return self._lowest.get(place, offset) < offset and not self._bits[place][index // 8] >> index % 8 & 1


async def sighted_of(
    log: Log,
    topics: Topics,
    selection: Selection,
    ends: Mapping[str, int],
    *,
    readable: Readable,
    sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
) -> Sighted:
    """Read what was sighted of the events of a selection, in those partitions that are `readable`."""
    done: dict[str, Commit] = {}
    for topic in {place.rpartition("/")[0] for place in ends}:
        commits = await log.committed(topics.group(ROUTER_GROUP), topic)
        done |= {f"{topic}/{number}": commit for number, commit in commits.items()}
    bounds, unread = await readable(topics.dedupe)
    sighted = Sighted(selection.starts, ends, done, frozenset([f"{topics.dedupe}/{number}" for number in unread]))
    starts = await log.offsets_at(topics.dedupe, max(0.0, selection.since - BEFORE), bounds.keys())
    for number, (first, end) in bounds.items():
        partition = Partition(topics.dedupe, number)
        async for records in log.scan(partition, max(first, starts.get(number, first)), end):
            for record in records:
                place = record.key.decode(errors="replace")
                if place not in ends:
                    continue
                with suppress(UnreadableRecordError):
                    rows = decode_sightings(record).rows
                    for begin in range(0, len(rows), ROWS_AT_ONCE * SIGHTING.size):
                        sighted.add(place, rows[begin : begin + ROWS_AT_ONCE * SIGHTING.size])
                        await sleep(0)
    return sighted


class Undelivered:
    """Tells of the deliveries of one route what has become of them, at the beginning of the replay with the `key`.

    Without one, it tells what will have become of them once the replays that are asked for have ended.
    """

    def __init__(
        self,
        control: Control,
        route: str,
        dead: Dead,
        *,
        sighted: Sighted | None = None,
        rules: Callable[[], Rules],
        key: str = "",
    ) -> None:
        self._history = control.history
        self._route = route
        self._dead = dead
        self._sighted = sighted
        self._rules = rules
        replays = _replays_of(control, route, key)
        self._replays = [_Replay(order, control, is_foretold=not key) for order in replays]
        self._known: dict[str, tuple[PastRoute, RouteTable[Route] | None]] = {}

    def fate(self, partition: Partition, record: Record, event: Event, destination: str) -> Fate:
        """Tell what is known of an event's delivery by the route to a destination."""
        if self._dead.of(event, destination):
            return Fate.UNDELIVERED
        view = EventView.of(event)
        edition = self._history.edition_at(partition, record.offset)
        text = None if edition is None else edition.routes.get(self._route)
        known = Fate.UNKNOWN if edition is None else self._by(text, view, destination)
        if known is Fate.ENDED and text is not None and self._was_let_go(text, partition, record, event):
            known = Fate.UNDELIVERED
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

    def _was_let_go(self, text: str, partition: Partition, record: Record, event: Event) -> bool:
        """Return whether an event went nowhere as a copy, and is to go somewhere by the rules in force."""
        if self._sighted is None or event.source not in self._known[text][0].deduped or identity_of(event.id) is None:
            return False
        if not self._sighted.was_let_go(partition, record.offset):
            return False
        source = self._rules().sources.get(event.source)
        return source is None or source.dedupe is None or not EventBuilder(source).knows(event)

    def _by(self, text: str | None, view: EventView, destination: str) -> Fate:
        """Tell what has become of an event that was matched by the route as an edition has it; None if it hadn't it."""
        if text is None:
            return Fate.UNDELIVERED
        if text not in self._known:
            then = past_route(self._route, text)
            self._known[text] = then, None if then.route is None else RouteTable((then.route,))
        then, table = self._known[text]
        if view.source not in then.sources or destination not in then.destinations:
            return Fate.UNDELIVERED
        if table is None:
            return Fate.UNKNOWN
        # What a condition failed for is among the dead, or has been taken out of there on purpose.
        return Fate.ENDED if table.match(view) else Fate.UNDELIVERED


class _Replay:
    """What a replay was over, or is going to be where that is foretold, and the route as an edition has it.

    That is "" if it has changed meanwhile. One that waits for its turn, or for partitions, was over what it has marked.
    """

    def __init__(self, order: Order, control: Control, *, is_foretold: bool) -> None:
        assert order.selection is not None, order
        self._selection = order.selection
        is_through = order.state == "done" or (order.state == "asked" and is_foretold)
        self._reach = order.marker if is_through else control.marker(order.key)
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
    ]
