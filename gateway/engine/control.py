"""What operators have ordered: pauses, kicks, and what becomes of dead letters. A fold over `gateway.control`.

Each record is an order under its key, and the last one counts (the topic is compacted):

    pause/route/NAME, pause/destination/NAME    paused ──resume──▶ resuming ──job──▶ active
    kick/route/NAME,  kick/destination/NAME     asked ──job──▶ done
    dead/ID                                     asked ──job──▶ done
    marker/KEY                                  up to where the jobs of the pause or kick of that key have scanned

Operators write orders, and the one owner of the jobs (`engine/jobs.py`) their ends and the markers, each under a key of
its own, so that neither can undo what the other says. A marker follows the records that its job has injected: a job
that is killed repeats some, and skips none.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import orjson

from gateway.log.base import Partition
from gateway.model import UndecodableRecordError

Kind = Literal["pause", "kick", "dead", "marker"]
State = Literal["paused", "resuming", "active", "asked", "done"]
_KINDS: Mapping[str, Kind] = {"pause": "pause", "kick": "kick", "dead": "dead", "marker": "marker"}


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Letter:
    """What a filter looks at of a dead letter. `id` is the delivery's, and empty where the record can't be read."""

    id: str
    route: str
    destination: str
    reason: str
    at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """One record of `gateway.control`.

    `marker` maps "topic/partition" to an offset: up to where a marker's jobs have scanned, or an order about dead
    letters reaches.
    """

    kind: Kind
    name: str
    state: State
    at: float
    marker: Mapping[str, int] = field(default_factory=dict)
    action: Literal["replay", "drop"] = "replay"
    filter: DeadFilter = DeadFilter()
    count: int = 0

    @property
    def key(self) -> str:
        return f"{self.kind}/{self.name}"

    def is_before_marker(self, partition: Partition, offset: int) -> bool:
        return offset < self.marker.get(f"{partition.topic}/{partition.number}", 0)

    def is_for(self, letter: "Letter") -> bool:
        """Tell whether an order about dead letters means this one; what can't be read can't be replayed."""
        return self.filter.covers(letter) and (self.action == "drop" or bool(letter.id))

    def encode(self) -> tuple[bytes, bytes]:
        """Return the record's key and value."""
        body: dict[str, Any] = {"state": self.state, "at": self.at, "marker": dict(self.marker), "count": self.count}
        if self.kind == "dead":
            body["action"] = self.action
            body["filter"] = self.filter
        return self.key.encode(), orjson.dumps(body)

    def with_state(self, state: State, **changes: Any) -> "Order":  # noqa: ANN401 - the fields of an Order
        return replace(self, state=state, **changes)


def decode(key: bytes, value: bytes) -> Order:
    """Read an order. Raises UndecodableRecordError."""
    try:
        word, _, name = key.decode().partition("/")
        kind = _KINDS.get(word)
        if kind is None:
            raise UndecodableRecordError(f"control record: expected pause/…, kick/…, dead/… or marker/…, got {key!r}")
        body = orjson.loads(value)
        asked = body.get("filter", {})
        return Order(
            kind=kind,
            name=name,
            state=body["state"],
            at=body["at"],
            marker=body["marker"],
            count=body["count"],
            action=body.get("action", "replay"),
            filter=DeadFilter(**{**asked, "ids": tuple(asked.get("ids", ()))}),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UndecodableRecordError(f"control record {key!r}: expected an order, got {error!r}") from error


class Control:
    """The orders in force."""

    def __init__(self, orders: Iterable[Order] = ()) -> None:
        self.orders: dict[str, Order] = {}
        self._paused: frozenset[str] = frozenset()
        self._markers: dict[str, Order] = {}
        for order in orders:
            self.apply(order)

    def apply(self, order: Order) -> None:
        if order.kind == "marker":
            self._markers[order.name] = order
            return
        self.orders[order.key] = order
        if order.kind == "pause":
            added = {order.name} if order.state == "paused" else set[str]()
            self._paused = (self._paused - {order.name}) | added

    def marker(self, key: str) -> Mapping[str, int]:
        """Return up to where the jobs of a pause or a kick have scanned: "topic/partition" → offset."""
        order = self._markers.get(key)
        return {} if order is None else order.marker

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

    def settled(self, letter: Letter, partition: Partition, offset: int) -> Order | None:
        """Return the finished order that replayed or dropped a dead letter, if one did."""
        for order in self.orders.values():
            if (
                order.kind == "dead"
                and order.state == "done"
                and order.is_before_marker(partition, offset)
                and order.is_for(letter)
            ):
                return order
        return None
