"""The records of `gateway.control`: pauses, kicks, replays, what becomes of dead letters, and by which rules is routed.

Each record is an order under its key, and the last one counts (the topic is compacted):

    pause/route/NAME, pause/destination/NAME    paused ──resume──▶ resuming ──marker──▶ active
    kick/route/NAME,  kick/destination/NAME     asked ──marker──▶ done
    dead/ID                                     asked ──job──▶ done
    replay/ID                                   asked ──job──▶ done, or cancelled by an operator or by the job
    marker/KEY                                  up to where the jobs of that key are, and whom they have answered
    marker/hold/KEY                             up to where the job of a kick is about to scan
    rules/EDITION, routed/ID                    by which rules events are routed (`routing_history.py`)
"""

import re
from base64 import b64decode, b64encode
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, TypeVar

import orjson

from gateway.log.base import Partition
from gateway.log.json_fields import ID, JsonFields
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
    """Which dead letters an order is for; what is None or empty doesn't narrow. Times are when they were written.

    `ids` are of deliveries, which events of one identity share; `records` are the letters themselves, as
    PARTITION@OFFSET. The latter are looked at by those who know where a letter stands, and not by `covers`.
    """

    route: str | None = None
    destination: str | None = None
    reason: str | None = None
    ids: tuple[str, ...] = ()
    records: tuple[str, ...] = ()
    since: float | None = None
    until: float | None = None

    def told(self) -> dict[str, Any]:
        """Return it as JSON has it; `records` only where there are some, as an older version doesn't know them."""
        told = asdict(self)
        if not self.records:
            del told["records"]
        return told

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
        """Return whether a dead letter may be covered by both: one that is, is only settled by the first of them."""
        return not (
            _differ(self.route, other.route)
            or _differ(self.destination, other.destination)
            or _differ(self.reason, other.reason)
            or (self.ids and other.ids and not set(self.ids).intersection(other.ids))
            or (self.records and other.records and not set(self.records).intersection(other.records))
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
    expedited: Mapping[str, int] = field(default_factory=dict)
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
        return offset < self.marker.get(partition_key(partition), 0)

    def is_for(self, letter: "Letter") -> bool:
        """Return whether an order about dead letters means this one; what can't be read can't be replayed."""
        return self.filter.covers(letter) and (self.action == "drop" or bool(letter.id))

    def encode(self) -> tuple[bytes, bytes]:
        """Return the record's key and value."""
        if self.state == "gone":
            return self.key.encode(), b""
        body: dict[str, Any] = {"v": FORMAT, "state": self.state, "at": self.at}
        body |= {"marker": dict(self.marker), "count": self.count}
        if self.kind == "dead":
            body["action"] = self.action
            body["filter"] = self.filter.told()
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
        if self.expedited:
            body["hurried"] = dict(self.expedited)
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
    kind, name = kind_and_name(key)
    if not value and kind is not None:
        return Order(kind=kind, name=name, state="gone", at=0.0)
    body = JsonFields.parse(f"order {shown(key)}", value)
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
        expedited=_places(body, "hurried") if body.has("hurried") else {},
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


def kind_and_name(key: bytes) -> tuple[Kind | None, str]:
    """Return the kind of an order and its name; no kind where the key isn't one of ours."""
    word, _, name = key.decode(errors="surrogateescape").partition("/")
    return next((kind for kind, names in _NAMES.items() if kind == word and names.fullmatch(name)), None), name


def _one_of(fields: JsonFields, name: str, values: Collection[T]) -> T:
    text = fields.text(name)
    for value in values:
        if value == text:
            return value
    raise fields.error(name, f"one of {', '.join(map(str, values))}")


def _places(fields: JsonFields, name: str) -> Mapping[str, int]:
    """Return offsets by "topic/partition"."""
    places = fields.inside(name)
    for place in places.names():
        if not _PLACE.fullmatch(place):
            raise UndecodableRecordError(places.where, "topic/partition", place)
    return {place: places.integer(place) for place in places.names()}


def _bits(fields: JsonFields) -> Mapping[str, bytes]:
    try:
        return {place: b64decode(fields.text(place), validate=True) for place in fields.names()}
    except ValueError:
        raise UndecodableRecordError(fields.where, "bits in base64", "something else") from None


def _counts(fields: JsonFields, name: str) -> Mapping[str, int]:
    counts = fields.inside(name)
    return {reason: counts.integer(reason) for reason in counts.names()}


def _filter(fields: JsonFields) -> DeadFilter:
    fields.allow("route", "destination", "reason", "ids", "records", "since", "until")
    return DeadFilter(
        route=_text(fields, "route"),
        destination=_text(fields, "destination"),
        reason=_text(fields, "reason"),
        ids=fields.texts("ids") if fields.has("ids") else (),
        records=fields.texts("records") if fields.has("records") else (),
        since=_time(fields, "since"),
        until=_time(fields, "until"),
    )


def _selection(fields: JsonFields) -> Selection:
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


def _text(fields: JsonFields, name: str) -> str | None:
    return fields.text(name) if fields.has(name) else None


def _time(fields: JsonFields, name: str) -> float | None:
    return fields.number(name) if fields.has(name) else None


def partition_key(partition: Partition) -> str:
    """Return a partition's name in markers."""
    return f"{partition.topic}/{partition.number}"


def _differ(one: str | None, other: str | None) -> bool:
    return one is not None and other is not None and one != other
