"""The records of `gateway.control`: commands (pause, kick, replay, redeliver, dead letters), checkpoints, the history.

The last record of each key counts (the topic is compacted):

    pause/route/NAME, pause/destination/NAME    paused ──resume──▶ resuming ──checkpoint──▶ active
    kick/route/NAME,  kick/destination/NAME     requested ──checkpoint──▶ done
    dead/ID                                     requested ──job──▶ done
    replay/ID                                   requested ──job──▶ done, or cancelled by an operator or by the job
    redeliver/ID                                requested ──job──▶ done, or cancelled by an operator or by the job
    checkpoint/KEY                              how far the jobs of that key have come, and which commands they answer
    checkpoint/announcement/KEY                 announces up to where the job of a kick will scan
    checkpoint/tried/ROUTE/DESTINATION/PARTITION    outcome of the last kick on a partition of an ordered route
    rules/REVISION, routed/ID                   which rules events were routed by (`routing_history.py`)
"""

import re
from base64 import b64decode, b64encode
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, TypeVar

import orjson

from gateway.engine.control import redelivery_records
from gateway.engine.control.redelivery_records import Redelivery, RedeliveryResult, decode_redelivery, decode_results
from gateway.log.base import Partition
from gateway.log.json_fields import ID, PARTITION_NAME, JsonFields
from gateway.model import NAME_PATTERN, NewerRecordError, UndecodableRecordError, shown

Kind = Literal["pause", "kick", "dead", "replay", "redeliver", "checkpoint", "rules", "routed"]
State = Literal["paused", "resuming", "active", "requested", "done", "cancelled", "deleted"]
T = TypeVar("T")
FORMAT = 1
"""Version of a record's value (`v`, 1 if absent), but for commands to redeliver."""


ON_ITS_WAY = "on_its_way"
"""Why a delivery waits after a kick if nothing is known yet; else a SpillReason, or one of these."""
LATER, ENDED = "later", "ended"
"""It was written to a tier again; it became a dead letter without being tried again."""
BEHIND, HALTED, UNREAD = "behind", "halted", "unread"
"""On an ordered route: it waits behind another of its key; its key halted without an attempt; it isn't read yet."""


MIN_RATE = 1e-6
"""Lowest rate of a replay, in deliveries a second: with less, the time to wait would overflow."""


_STATES: Mapping[Kind, tuple[State, ...]] = {
    "pause": ("paused", "resuming", "active"),
    "kick": ("requested", "done"),
    "dead": ("requested", "done"),
    "replay": ("requested", "done", "cancelled"),
    "redeliver": ("requested", "done", "cancelled"),
    "checkpoint": ("requested", "done", "cancelled"),
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
    "redeliver": ID,
    "checkpoint": ID,
    "rules": ID,
    "routed": ID,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadFilter:
    """Which dead letters a command applies to; None or empty fields match all. Times are when they were written.

    `ids` are delivery IDs, which events with the same identity share; `records` are dead letters as PARTITION@OFFSET.
    `covers` ignores `records`: callers that know the position of a dead letter check those.
    """

    route: str | None = None
    destination: str | None = None
    reason: str | None = None
    ids: tuple[str, ...] = ()
    records: tuple[str, ...] = ()
    since: float | None = None
    until: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the filter as JSON; with `records` only if there are some, as older versions don't know them."""
        fields = asdict(self)
        if not self.records:
            del fields["records"]
        return fields

    def covers(self, letter: "DeadLetterProperties") -> bool:
        return (
            (self.route is None or self.route == letter.route)
            and (self.destination is None or self.destination == letter.destination)
            and (self.reason is None or self.reason == letter.reason)
            and (not self.ids or letter.id in self.ids)
            and (self.since is None or letter.at >= self.since)
            and (self.until is None or letter.at < self.until)
        )

    def may_overlap(self, other: "DeadFilter") -> bool:
        """Return whether both may cover the same dead letter: then only the first of them resolves it."""
        return not (
            _differ(self.route, other.route)
            or _differ(self.destination, other.destination)
            or _differ(self.reason, other.reason)
            or (self.ids and other.ids and not set(self.ids).intersection(other.ids))
            or (self.records and other.records and not set(self.records).intersection(other.records))
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetterProperties:
    """The properties of a dead letter that filters check. `id` is the delivery's, empty if that can't be decoded."""

    id: str
    route: str
    destination: str
    reason: str
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """Which events are replayed, and to which destinations of a route: all, or one.

    The events are those appended from `since` until before `until`, by the log's clock; if `source` is None, of all
    sources of the route. `starts` maps "topic/partition" to the first offset of that time. `rate` is deliveries a
    second, over the whole fleet; with None, they are as fast as the retry tier takes them. With `undelivered`, events
    that the route has delivered, as far as the log shows, are left out.
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
class ControlRecord:
    """One record of `gateway.control`.

    `checkpoint` maps "topic/partition" to an offset: up to where the jobs of the key have scanned, or, in a command,
    where its dead letters or its replay end. `count` is the number of deliveries that the job has injected or dropped.
    `selection` is that of a replay, `redelivery` what a redelivery asks for, and `results` what it has made of which
    deliveries: so far in its checkpoint, in all once it has ended. `detail` is why a job has cancelled either, which
    ordered routes aren't counted, or which partitions a replay of the undelivered couldn't consider. A checkpoint
    `covers_commands_below` an offset of the control topic: it ends the earlier commands of its key.

    `expedited` in a kick's announcement: up to where deliveries in the shortest tier are due at once. In a kick's last
    checkpoint, `tried` and `delivered` are how many of the `count` were, by then (None if unknown), `untried_by_reason`
    is the number of those that weren't tried by reason, `failed_by_result` the number of failures by result,
    `repeated_failures` how many of these had the same result before, `dead` how many of these became dead letters, and
    `rate` the destination's rate, if any.
    `by` is who has paused something, wants a redelivery, or ordered something about dead letters, and `via` how that is
    known of the latter two ("" if an older version has written it). `unread` is the number of partitions that a job
    couldn't read and skipped; in a replay's checkpoint, that it still waits for.

    `latest` is when the last record below the offsets was appended, if the writer knew this field: what was appended
    later isn't covered, whatever its offset, since its topic has been recreated. `latest_by_partition` is the same for
    each partition ("topic/partition"), as one of a recreated topic may be unreadable while others are scanned.

    `last_records` are checksums of the last records of a replay, by partition: another one there means that its topic
    has been recreated since.

    `revision` is the routing revision of an epoch; in a `rules` record, the one that `routes` is a difference to. A
    replay's checkpoint has its route in `routes`, if that hasn't changed since its start. In that of a replay of the
    undelivered, `known_below` is up to which offsets of the control topic it knew the routing, at its start and now,
    and `identities` how its sources identified events, if that hasn't changed since its start; "unread" if it couldn't
    tell which were dropped as duplicates.
    `done` are the completion bitmaps beyond the offsets of an epoch's `checkpoint`, `latest` is when it began with an
    owner that another one had been before, and `number` is one more than its router knew of.
    """

    kind: Kind
    name: str
    state: State
    at: float
    checkpoint: Mapping[str, int] = field(default_factory=dict)
    action: Literal["replay", "drop"] = "replay"
    filter: DeadFilter = DeadFilter()
    selection: Selection | None = None
    count: int = 0
    detail: str = ""
    covers_commands_below: int = 0
    expedited: Mapping[str, int] = field(default_factory=dict)
    revision: str = ""
    routes: str = ""
    done: Mapping[str, bytes] = field(default_factory=dict)
    tried: int | None = None
    delivered: int | None = None
    untried_by_reason: Mapping[str, int] = field(default_factory=dict)
    failed_by_result: Mapping[str, int] = field(default_factory=dict)
    repeated_failures: Mapping[str, int] = field(default_factory=dict)
    dead: int = 0
    rate: float | None = None
    by: str = ""
    via: str = ""
    unread: int = 0
    latest: float | None = None
    latest_by_partition: Mapping[str, float] = field(default_factory=dict)
    last_records: Mapping[str, int] = field(default_factory=dict)
    known_below: tuple[int, int] | None = None
    identities: str = ""
    number: int = 0
    redelivery: Redelivery | None = None
    results: tuple[RedeliveryResult, ...] = ()

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.name}"

    @property
    def is_pending(self) -> bool:
        """Whether a job has to carry it out."""
        return self.state in ("requested", "resuming")

    @property
    def extent(self) -> tuple[int, bool]:
        """How far a redelivery's checkpoint is, to compare it with others of it."""
        return len(self.results), not self.is_pending

    @property
    def covered_until(self) -> float:
        """The time after which no record that it covers was appended."""
        return self.at if self.latest is None else self.latest

    def covered_until_in(self, partition_name: str) -> float:
        """Return the time after which no record of a partition that it covers was appended."""
        return self.latest_by_partition.get(partition_name, self.covered_until)

    def is_before_checkpoint(self, partition: Partition, offset: int, appended_at: float) -> bool:
        """Return whether a record is below the offsets, in the topic as it was when they were written."""
        partition_name = partition_key(partition)
        return offset < self.checkpoint.get(partition_name, 0) and appended_at <= self.covered_until_in(partition_name)

    def is_for(self, letter: "DeadLetterProperties") -> bool:
        """Return whether a command applies to a dead letter; one that can't be decoded can't be replayed."""
        return self.filter.covers(letter) and (self.action == "drop" or bool(letter.id))

    @property
    def reach(self) -> Mapping[str, int]:
        """Up to which offsets ("topic/partition") a command that has ended is about records of the log."""
        asked = self.redelivery
        return self.checkpoint if asked is None else {asked.partition: asked.offset + 1}

    def is_gone(self, log_starts: Mapping[str, int]) -> bool:
        """Return whether the log has none of the records left that a command which has ended is about.

        `log_starts` maps "topic/partition" to its first offset.
        """
        return all(log_starts.get(partition_name, 0) >= end for partition_name, end in self.reach.items())

    def encode(self) -> tuple[bytes, bytes]:
        """Return the record's key and value."""
        if self.state == "deleted":
            return self.key.encode(), b""
        body: dict[str, Any] = {"v": FORMAT, "state": self.state, "at": self.at}
        body |= {"checkpoint": dict(self.checkpoint), "count": self.count}
        if self.kind == "dead":
            body["action"] = self.action
            body["filter"] = self.filter.as_json()
        if self.selection is not None:
            # Left out unless it is set: so a process of a version without it can carry out other replays.
            asked = asdict(self.selection)
            if not self.selection.undelivered:
                del asked["undelivered"]
            body["selection"] = asked
        body |= redelivery_records.as_json(self.redelivery, self.results)
        texts = {
            "detail": self.detail,
            "revision": self.revision,
            "routes": self.routes,
            "identities": self.identities,
            "by": self.by,
            "via": self.via,
        }
        body |= {name: text for name, text in texts.items() if text}
        numbers = {
            "covers_commands_below": self.covers_commands_below,
            "unread": self.unread,
            "dead": self.dead,
            "number": self.number,
        }
        body |= {name: number for name, number in numbers.items() if number}
        mappings: dict[str, Mapping[str, object]] = {
            "expedited": self.expedited,
            "latest_by_partition": self.latest_by_partition,
            "last_records": self.last_records,
            "failed_by_result": self.failed_by_result,
            "repeated_failures": self.repeated_failures,
        }
        body |= {name: dict(values) for name, values in mappings.items() if values}
        if self.done:
            body["done"] = {partition_name: b64encode(bits).decode() for partition_name, bits in self.done.items()}
        if self.tried is not None:
            body |= {"tried": self.tried, "waiting_by_reason": dict(self.untried_by_reason), "rate": self.rate}
        if self.delivered is not None:
            body["delivered"] = self.delivered
        if self.latest is not None:
            body["latest"] = self.latest
        if self.known_below is not None:
            body["known_below"] = {"first": self.known_below[0], "last": self.known_below[1]}
        return self.key.encode(), orjson.dumps(body)

    def with_state(self, state: State, **changes: Any) -> "ControlRecord":  # noqa: ANN401 - the fields of a ControlRecord
        return replace(self, state=state, **changes)


def decode(key: bytes, value: bytes) -> ControlRecord:
    """Decode a record. Raises UndecodableRecordError or NewerRecordError."""
    kind, name = kind_and_name(key)
    if not value and kind is not None:
        return ControlRecord(kind=kind, name=name, state="deleted", at=0.0)
    body = JsonFields.parse(f"control record {shown(key.decode('utf-8', 'replace'))}", value)
    version = body.integer("v", minimum=1) if body.has("v") else FORMAT
    known = max(FORMAT, redelivery_records.FORMAT) if kind == "redeliver" else FORMAT
    if version > known:
        raise NewerRecordError(body.where, version, known)
    if kind is None:
        raise UndecodableRecordError(body.where, f"one of {', '.join(f'{known}/…' for known in _STATES)}", key)
    return ControlRecord(
        kind=kind,
        name=name,
        state=_one_of(body, "state", _STATES[kind]),
        at=body.number("at"),
        checkpoint=_offsets(body, "checkpoint"),
        count=body.integer("count"),
        action=_one_of(body, "action", _ACTIONS) if body.has("action") else "replay",
        filter=_filter(body.inside("filter")) if body.has("filter") else DeadFilter(),
        selection=_selection(body.inside("selection")) if kind == "replay" else None,
        detail=body.text("detail") if body.has("detail") else "",
        covers_commands_below=body.integer("covers_commands_below") if body.has("covers_commands_below") else 0,
        expedited=_offsets(body, "expedited") if body.has("expedited") else {},
        revision=body.text("revision") if body.has("revision") else "",
        routes=body.text("routes") if body.has("routes") else "",
        done=_bits(body.inside("done")) if body.has("done") else {},
        tried=body.integer("tried") if body.has("tried") else None,
        delivered=body.integer("delivered") if body.has("delivered") else None,
        untried_by_reason=_counts(body, "waiting_by_reason") if body.has("waiting_by_reason") else {},
        failed_by_result=_counts(body, "failed_by_result") if body.has("failed_by_result") else {},
        repeated_failures=_counts(body, "repeated_failures") if body.has("repeated_failures") else {},
        dead=body.integer("dead") if body.has("dead") else 0,
        rate=_time(body, "rate"),
        by=body.text("by") if body.has("by") else "",
        via=body.text("via") if body.has("via") else "",
        unread=body.integer("unread") if body.has("unread") else 0,
        latest=_time(body, "latest"),
        latest_by_partition=_times(body, "latest_by_partition") if body.has("latest_by_partition") else {},
        last_records=_offsets(body, "last_records") if body.has("last_records") else {},
        identities=body.text("identities") if body.has("identities") else "",
        known_below=_first_and_last(body.inside("known_below")) if body.has("known_below") else None,
        number=body.integer("number") if body.has("number") else 0,
        redelivery=decode_redelivery(body.inside("redelivery")) if kind == "redeliver" else None,
        results=decode_results(body),
    )


def kind_and_name(key: bytes) -> tuple[Kind | None, str]:
    """Return the kind and the name of a record; None as the kind if the key isn't one of ours."""
    word, _, name = key.decode(errors="surrogateescape").partition("/")
    return next((kind for kind, names in _NAMES.items() if kind == word and names.fullmatch(name)), None), name


def _one_of(fields: JsonFields, name: str, values: Collection[T]) -> T:
    text = fields.text(name)
    for value in values:
        if value == text:
            return value
    raise fields.error(name, f"one of {', '.join(map(str, values))}")


def _offsets(fields: JsonFields, name: str) -> Mapping[str, int]:
    """Return the offsets (or checksums) of a field, by "topic/partition"."""
    offsets = fields.inside(name)
    for partition_name in offsets.names():
        if not PARTITION_NAME.fullmatch(partition_name):
            raise UndecodableRecordError(offsets.where, "topic/partition", partition_name)
    return {partition_name: offsets.integer(partition_name) for partition_name in offsets.names()}


def _times(fields: JsonFields, name: str) -> Mapping[str, float]:
    times = fields.inside(name)
    return {partition_name: times.number(partition_name) for partition_name in times.names()}


def _bits(fields: JsonFields) -> Mapping[str, bytes]:
    try:
        return {
            partition_name: b64decode(fields.text(partition_name), validate=True) for partition_name in fields.names()
        }
    except ValueError:
        raise UndecodableRecordError(fields.where, "bits in base64", "something else") from None


def _first_and_last(fields: JsonFields) -> tuple[int, int]:
    return fields.integer("first"), fields.integer("last")


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
    if rate is not None and rate < MIN_RATE:
        raise fields.error("rate", "a rate of deliveries a second")
    return Selection(
        route=fields.text("route"),
        destination=_text(fields, "destination"),
        source=_text(fields, "source"),
        since=fields.number("since"),
        until=_time(fields, "until"),
        rate=rate,
        starts=_offsets(fields, "starts") if fields.has("starts") else {},
        undelivered=fields.has("undelivered"),
    )


def _text(fields: JsonFields, name: str) -> str | None:
    return fields.text(name) if fields.has(name) else None


def _time(fields: JsonFields, name: str) -> float | None:
    return fields.number(name) if fields.has(name) else None


def tried_name(route: str, destination: str, partition: int) -> str:
    """Return the name of the checkpoint with a kick's outcome on a partition of an ordered route."""
    return f"tried/{route}/{destination}/{partition}"


def announcement_key(key: str) -> str:
    """Return the key of a kick's announcement among the checkpoints (`checkpoint/announcement/kick/…`)."""
    return f"announcement/{key}"


def partition_key(partition: Partition) -> str:
    """Return a partition's name in checkpoints: "topic/partition"."""
    return f"{partition.topic}/{partition.number}"


def by_topic(partition_names: Iterable[str]) -> dict[str, dict[str, int]]:
    """Return the numbers of partitions ("topic/partition"): topic → name → number."""
    found: dict[str, dict[str, int]] = {}
    for partition_name in partition_names:
        topic, _, number = partition_name.rpartition("/")
        found.setdefault(topic, {})[partition_name] = int(number)
    return found


def _differ(one: str | None, other: str | None) -> bool:
    return one is not None and other is not None and one != other
