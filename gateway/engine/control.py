"""What operators have ordered: pauses, kicks, replays, and what becomes of dead letters. A fold over `gateway.control`.

Each record is an order under its key, and the last one counts (the topic is compacted):

    pause/route/NAME, pause/destination/NAME    paused ──resume──▶ resuming ──marker──▶ active
    kick/route/NAME,  kick/destination/NAME     asked ──marker──▶ done
    dead/ID                                     asked ──job──▶ done
    replay/ID                                   asked ──job──▶ done, or cancelled by an operator or by the job
    marker/KEY                                  up to where the jobs of that key are, and whom they have answered
    marker/hold/KEY                             up to where the job of a kick is about to scan
    rules/EDITION, routed/ID                    by which rules events are routed, told by those who do (`history.py`)

Operators write orders, and the one owner of the jobs (`engine/jobs.py`) the markers, under keys of its own, so that
neither can undo what the other says. A marker follows the records that its job has injected: a job that is killed
repeats some, and skips none. A record without a value says that the order of its key is gone.

A newer pause, resumption or kick takes the place of an older one of its key, and one job may do for several. So the
last marker of a job answers all orders of its key up to an offset of the control topic, and that is how these end.
"""

import re
from base64 import b64decode, b64encode
from bisect import bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any, Literal, TypeVar

import orjson

from gateway.engine.history import History
from gateway.log.base import Partition
from gateway.log.fields import ID, Fields
from gateway.model import NAME_PATTERN, NewerRecordError, UndecodableRecordError, shown

Kind = Literal["pause", "kick", "dead", "replay", "marker", "rules", "routed"]
State = Literal["paused", "resuming", "active", "asked", "done", "cancelled", "gone"]
T = TypeVar("T")
FORMAT = 1
"""Of an order's value (`v`, 1 where it isn't told)."""
LEAST_RATE = 1e-6
"""Deliveries a second: with fewer, what is to be waited for is no number any more."""
_STATES: Mapping[Kind, tuple[State, ...]] = {
    "pause": ("paused", "resuming", "active"),
    "kick": ("asked", "done"),
    "dead": ("asked", "done"),
    "replay": ("asked", "done", "cancelled"),
    "marker": ("asked", "done", "cancelled"),
    "rules": ("done",),
    "routed": ("done",),
}
_ACTIONS: tuple[Literal["replay", "drop"], ...] = ("replay", "drop")
_NAME = re.compile(f"(route|destination)/{NAME_PATTERN.pattern}")
_NAMES: Mapping[Kind, re.Pattern[str]] = {
    "pause": _NAME,
    "kick": _NAME,
    "dead": ID,
    "replay": ID,
    "marker": ID,
    "rules": ID,
    "routed": ID,
}
_PLACE = re.compile(r"[a-zA-Z0-9._-]{1,249}/[0-9]{1,9}")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadFilter:
    """Which dead letters an order is for; what is None or empty doesn't narrow. Times are when they were written."""

    route: str | None = None
    destination: str | None = None
    reason: str | None = None
    ids: tuple[str, ...] = ()
    since: float | None = None
    until: float | None = None

    def covers(self, letter: "Letter") -> bool:
        return (
            (self.route is None or self.route == letter.route)
            and (self.destination is None or self.destination == letter.destination)
            and (self.reason is None or self.reason == letter.reason)
            and (not self.ids or letter.id in self.ids)
            and (self.since is None or letter.at >= self.since)
            and (self.until is None or letter.at < self.until)
        )

    def may_share(self, other: "DeadFilter") -> bool:
        """Tell whether a dead letter may be covered by both: one that is, is only settled by the first of them."""
        return not (
            _differ(self.route, other.route)
            or _differ(self.destination, other.destination)
            or _differ(self.reason, other.reason)
            or (self.ids and other.ids and not set(self.ids).intersection(other.ids))
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Letter:
    """What a filter looks at of a dead letter. `id` is the delivery's, and empty where the record can't be read."""

    id: str
    route: str
    destination: str
    reason: str
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which events are replayed, and to where: of a route, to all of its destinations or to one.

    Events count that were appended at `since` or later and before `until`, by the log's clock; `source` None is every
    source of the route. `starts` maps "topic/partition" to the first offset of that time. `rate` is deliveries a
    second, over the whole fleet; None is as fast as the retry tier takes them. `undelivered` leaves out what the route
    has delivered by what the log knows.
    """

    route: str
    destination: str | None = None
    source: str | None = None
    since: float
    until: float | None = None
    rate: float | None = None
    starts: Mapping[str, int] = field(default_factory=dict)
    undelivered: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One record of `gateway.control`.

    `marker` maps "topic/partition" to an offset: up to where a marker's jobs have scanned, or an order about dead
    letters or a replay reaches. `count` is how many deliveries its job has injected or dropped. `selection` is a
    replay's, and `detail` says why a job has cancelled it, what isn't counted, or without which partitions a replay
    has told the undelivered. A marker `answers` the orders of its key below that offset of the control topic.
    `hurried` is of a kick's announcement: up to where what is found in the shortest tier is due at once. Of a kick's
    last marker are `tried` and `delivered`, how many of the `count` were by then (None where that isn't known),
    `waits`, for each reason how many weren't tried, `got`, for each answer how many failed by it, `again`, how many
    of those had got the same before, and `rate`, if the destination has one. `by` is who has paused something,
    `unread` how many partitions a job couldn't read, and went without; a replay's marker tells those that it waits
    for.

    `edition` is by which rules a reader goes; of an edition it is the one of which `routes` tells the differences. A
    replay's marker has its route there, if that has been the same from its beginning on. `done` are the bits of what
    was done beyond the offsets of a reader's `marker`.
    """

    kind: Kind
    name: str
    state: State
    at: float
    marker: Mapping[str, int] = field(default_factory=dict)
    action: Literal["replay", "drop"] = "replay"
    filter: DeadFilter = DeadFilter()
    selection: Selection | None = None
    count: int = 0
    detail: str = ""
    answers: int = 0
    hurried: Mapping[str, int] = field(default_factory=dict)
    edition: str = ""
    routes: str = ""
    done: Mapping[str, bytes] = field(default_factory=dict)
    tried: int | None = None
    delivered: int | None = None
    waits: Mapping[str, int] = field(default_factory=dict)
    got: Mapping[str, int] = field(default_factory=dict)
    again: Mapping[str, int] = field(default_factory=dict)
    rate: float | None = None
    by: str = ""
    unread: int = 0

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.name}"

    @property
    def is_asked(self) -> bool:
        """Whether a job has to carry it out."""
        return self.state in ("asked", "resuming")

    def is_before_marker(self, partition: Partition, offset: int) -> bool:
        return offset < self.marker.get(place_of(partition), 0)

    def is_for(self, letter: "Letter") -> bool:
        """Tell whether an order about dead letters means this one; what can't be read can't be replayed."""
        return self.filter.covers(letter) and (self.action == "drop" or bool(letter.id))

    def encode(self) -> tuple[bytes, bytes]:
        """Return the record's key and value."""
        if self.state == "gone":
            return self.key.encode(), b""
        body: dict[str, Any] = {"v": FORMAT, "state": self.state, "at": self.at}
        body |= {"marker": dict(self.marker), "count": self.count}
        if self.kind == "dead":
            body["action"] = self.action
            body["filter"] = self.filter
        if self.selection is not None:
            # What isn't asked for isn't told: a process of before it was there can carry out the rest.
            asked = asdict(self.selection)
            if not self.selection.undelivered:
                del asked["undelivered"]
            body["selection"] = asked
        texts = {"detail": self.detail, "edition": self.edition, "routes": self.routes}
        body |= {name: text for name, text in texts.items() if text}
        numbers = {"answered": self.answers, "unread": self.unread}
        body |= {name: number for name, number in numbers.items() if number}
        if self.hurried:
            body["hurried"] = dict(self.hurried)
        if self.done:
            body["done"] = {place: b64encode(bits).decode() for place, bits in self.done.items()}
        if self.tried is not None:
            body |= {"tried": self.tried, "waits": dict(self.waits), "rate": self.rate}
        if self.delivered is not None:
            body["delivered"] = self.delivered
        body |= {name: dict(counts) for name, counts in (("got", self.got), ("again", self.again)) if counts}
        if self.by:
            body["by"] = self.by
        return self.key.encode(), orjson.dumps(body)

    def with_state(self, state: State, **changes: Any) -> "Order":  # noqa: ANN401 - the fields of an Order
        return replace(self, state=state, **changes)


def decode(key: bytes, value: bytes) -> Order:
    """Read an order. Raises UndecodableRecordError or NewerRecordError."""
    kind, name = _split(key)
    if not value and kind is not None:
        return Order(kind=kind, name=name, state="gone", at=0.0)
    body = Fields.parse(f"order {shown(key)}", value)
    version = body.integer("v", least=1) if body.has("v") else FORMAT
    if version > FORMAT:
        raise NewerRecordError(body.where, version, FORMAT)
    if kind is None:
        raise UndecodableRecordError(body.where, f"one of {', '.join(f'{known}/…' for known in _STATES)}", key)
    return Order(
        kind=kind,
        name=name,
        state=_one_of(body, "state", _STATES[kind]),
        at=body.number("at"),
        marker=_places(body, "marker"),
        count=body.integer("count"),
        action=_one_of(body, "action", _ACTIONS) if body.has("action") else "replay",
        filter=_filter(body.inside("filter")) if body.has("filter") else DeadFilter(),
        selection=_selection(body.inside("selection")) if kind == "replay" else None,
        detail=body.text("detail") if body.has("detail") else "",
        answers=body.integer("answered") if body.has("answered") else 0,
        hurried=_places(body, "hurried") if body.has("hurried") else {},
        edition=body.text("edition") if body.has("edition") else "",
        routes=body.text("routes") if body.has("routes") else "",
        done=_bits(body.inside("done")) if body.has("done") else {},
        tried=body.integer("tried") if body.has("tried") else None,
        delivered=body.integer("delivered") if body.has("delivered") else None,
        waits=_counts(body, "waits") if body.has("waits") else {},
        got=_counts(body, "got") if body.has("got") else {},
        again=_counts(body, "again") if body.has("again") else {},
        rate=_time(body, "rate"),
        by=body.text("by") if body.has("by") else "",
        unread=body.integer("unread") if body.has("unread") else 0,
    )


def _split(key: bytes) -> tuple[Kind | None, str]:
    """Return the kind of an order and its name; no kind where the key isn't one of ours."""
    word, _, name = key.decode(errors="surrogateescape").partition("/")
    return next((kind for kind, names in _NAMES.items() if kind == word and names.fullmatch(name)), None), name


def _one_of(fields: Fields, name: str, values: Collection[T]) -> T:
    text = fields.text(name)
    for value in values:
        if value == text:
            return value
    raise fields.error(name, f"one of {', '.join(map(str, values))}")


def _places(fields: Fields, name: str) -> Mapping[str, int]:
    """Return offsets by "topic/partition"."""
    places = fields.inside(name)
    for place in places.names():
        if not _PLACE.fullmatch(place):
            raise UndecodableRecordError(places.where, "topic/partition", place)
    return {place: places.integer(place) for place in places.names()}


def _bits(fields: Fields) -> Mapping[str, bytes]:
    try:
        return {place: b64decode(fields.text(place), validate=True) for place in fields.names()}
    except ValueError:
        raise UndecodableRecordError(fields.where, "bits in base64", "something else") from None


def _counts(fields: Fields, name: str) -> Mapping[str, int]:
    counts = fields.inside(name)
    return {reason: counts.integer(reason) for reason in counts.names()}


def _filter(fields: Fields) -> DeadFilter:
    fields.allow("route", "destination", "reason", "ids", "since", "until")
    return DeadFilter(
        route=_text(fields, "route"),
        destination=_text(fields, "destination"),
        reason=_text(fields, "reason"),
        ids=fields.texts("ids") if fields.has("ids") else (),
        since=_time(fields, "since"),
        until=_time(fields, "until"),
    )


def _selection(fields: Fields) -> Selection:
    fields.allow("route", "destination", "source", "since", "until", "rate", "starts", "undelivered")
    rate = _time(fields, "rate")
    if rate is not None and rate < LEAST_RATE:
        raise fields.error("rate", "a rate of deliveries a second")
    return Selection(
        route=fields.text("route"),
        destination=_text(fields, "destination"),
        source=_text(fields, "source"),
        since=fields.number("since"),
        until=_time(fields, "until"),
        rate=rate,
        starts=_places(fields, "starts") if fields.has("starts") else {},
        undelivered=fields.has("undelivered"),
    )


def _text(fields: Fields, name: str) -> str | None:
    return fields.text(name) if fields.has(name) else None


def _time(fields: Fields, name: str) -> float | None:
    return fields.number(name) if fields.has(name) else None


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
        kind, called = _split(key)
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
        """Tell whether an order is to be left to a newer version, which has written it or how far it has come."""
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

    def is_asked(self, order: Order) -> bool:
        """Tell whether an order is in force and still to be carried out."""
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
        """Tell whether a marker of an order was left by a job on its way."""
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
        """Tell whether a job of a pause or a kick has had its look at a record."""
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
        """Tell whether a kick has injected this record again, so that it's to be skipped when it comes due."""
        if not self._markers:
            return False
        return self.has_scanned(f"kick/destination/{destination}", partition, offset) or self.has_scanned(
            f"kick/route/{route}", partition, offset
        )

    def is_held(self, route: str, destination: str, partition: Partition, offset: int) -> bool:
        """Tell whether a kick is about to inject this record again, so that it's to wait for that."""
        if not self._markers:
            return False
        return self.has_scanned(f"hold/kick/destination/{destination}", partition, offset) or self.has_scanned(
            f"hold/kick/route/{route}", partition, offset
        )

    def is_hurried(self, route: str, destination: str, partition: Partition, offset: int) -> bool:
        """Tell whether a kick has found this record in the shortest tier, so that it's due whenever it comes out."""
        place = place_of(partition)
        for name in (f"hold/kick/destination/{destination}", f"hold/kick/route/{route}"):
            announced = self._markers.get(name)
            if announced is not None and offset < announced.hurried.get(place, 0):
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

    By the deliveries that they name; else by what they filter, and then in a row, in which the first order that reaches
    a record is found by bisection: whoever replays a destination's letters every hour gives hundreds of orders alike.
    """

    def __init__(self) -> None:
        self._by_id: dict[str, list[Order]] = {}
        self._by_filter: dict[tuple[str | None, str | None, str | None], _Row] = {}

    def add(self, order: Order) -> None:
        if order.filter.ids:
            for identity in order.filter.ids:
                self._by_id.setdefault(identity, []).append(order)
        else:
            self._by_filter.setdefault(_kind_of(order.filter), _Row()).add(order)

    def remove(self, order: Order) -> None:
        if order.filter.ids:
            for identity in order.filter.ids:
                self._by_id[identity].remove(order)
                if not self._by_id[identity]:
                    del self._by_id[identity]
        else:
            self._by_filter[_kind_of(order.filter)].remove(order)

    def of(self, letter: Letter, partition: Partition, offset: int) -> Iterator[Order]:
        """Yield the orders that settled a letter; of a row only the first."""
        for order in self._by_id.get(letter.id, ()):
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
        reach = self._reach.get(place_of(partition))
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


def place_of(partition: Partition) -> str:
    """Return a partition's name in markers."""
    return f"{partition.topic}/{partition.number}"


def _differ(one: str | None, other: str | None) -> bool:
    return one is not None and other is not None and one != other
