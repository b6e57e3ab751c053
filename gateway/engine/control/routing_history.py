"""Which rules each event was routed by: a fold over two kinds of records of `gateway.control`.

    rules/EDITION     what the routes of an edition match (`rules/routing_revision.py`)
    routed/ID         from these offsets on, their reader goes by this edition

A router says so when it takes a partition over, and at each reload, unless it has been said already. So the
last record that begins at or below an offset tells the edition by which that event was matched; what was done already
when its reader came was matched by the one before.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from gateway.engine.control.records import Order
from gateway.log.base import Commit, Partition
from gateway.rules.routing_revision import decode, encode
from gateway.rules.rules import RoutingRevision

KEPT = 200
"""Records about one partition, the newest; what was read before the first of them isn't known."""
UNUSED = 3600.0
"""Seconds for which an edition is kept that no record names: the process that has written it is about to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """From an offset on a partition is read by an edition, but for what was done by then."""

    edition: str
    begins: Commit
    at: float = 0.0
    name: str = ""

    def covers(self, offset: int) -> bool:
        return offset >= self.begins.base and not self.begins.covers(offset)


def places(readings: Mapping[Partition, Commit]) -> tuple[dict[str, int], dict[str, bytes]]:
    """Return where readings begin as an order has it: the offsets, and the bits of what was done beyond them."""
    offsets = {_place(partition): begins.base for partition, begins in readings.items()}
    return offsets, {_place(partition): begins.done for partition, begins in readings.items() if any(begins.done)}


class History:
    """What has been said of editions and readings."""

    def __init__(self) -> None:
        self._readings: dict[str, list[Reading]] = {}
        self._editions: dict[str, Order] = {}
        self._routed: dict[str, Order] = {}
        self._decoded: dict[str, RoutingRevision] = {}

    def apply(self, order: Order) -> None:
        """Take account of a record of one of the two kinds."""
        if order.kind == "rules":
            if order.state == "gone":
                self._editions.pop(order.name, None)
            else:
                self._editions[order.name] = order
            return
        if order.state == "gone":
            self._forget(order.name)
        elif order.name not in self._routed:
            self._routed[order.name] = order
            for place, offset in order.marker.items():
                begins = Commit(offset, order.done.get(place, b""))
                reading = Reading(edition=order.edition, begins=begins, at=order.at, name=order.name)
                self._readings.setdefault(place, []).append(reading)

    def _forget(self, name: str) -> None:
        order = self._routed.pop(name, None)
        for place in order.marker if order is not None else ():
            left = [reading for reading in self._readings[place] if reading.name != name]
            if left:
                self._readings[place] = left
            else:
                del self._readings[place]

    def orders(self) -> list[Order]:
        """Return all records that are in force, in their order."""
        return [*self._editions.values(), *self._routed.values()]

    def places(self) -> dict[str, dict[str, int]]:
        """Return the partitions that something is known of: topic → "topic/partition" → number."""
        found: dict[str, dict[str, int]] = {}
        for place in self._readings:
            topic, _, number = place.rpartition("/")
            found.setdefault(topic, {})[place] = int(number)
        return found

    def knows(self, edition: str) -> bool:
        return edition in self._editions

    def has(self, name: str) -> bool:
        """Return whether a record of this name has been heard of."""
        return name in self._routed

    def says(self, partition: Partition, begins: Commit, edition: str) -> bool:
        """Return whether it is known that a partition is read by an edition from there on."""
        readings = self._readings.get(_place(partition), [])
        return any(each.edition == edition and each.begins.base <= begins.base for each in readings[-1:])

    def told(self, edition: RoutingRevision) -> tuple[str, str]:
        """Return an edition as its record has it, and the one from which that tells the differences; "" for none."""
        base = next((name for name, order in reversed(self._editions.items()) if not order.edition), "")
        before = self.edition(base) if base else None
        if before is not None:
            text = encode(edition, before)
            if len(text) < len(self._editions[base].routes) // 4:
                return text, base
        return encode(edition, None), ""

    def edition(self, name: str) -> RoutingRevision | None:
        """Return an edition, None if it isn't known, or was told in a way that this version can't read."""
        if name in self._decoded:
            return self._decoded[name]
        order = self._editions.get(name)
        if order is None:
            return None
        base = self.edition(order.edition) if order.edition else None
        if order.edition and base is None:
            return None
        try:
            self._decoded[name] = decode(name, order.routes, base)
        except ValueError:
            return None
        return self._decoded[name]

    def edition_at(self, partition: Partition, offset: int) -> RoutingRevision | None:
        """Return by which edition an event was routed, or will be by what is known; None if that isn't known."""
        for reading in reversed(self._readings.get(_place(partition), ())):
            if reading.covers(offset):
                return self.edition(reading.edition)
        return None

    def since(self, route: str, text: str, places: Mapping[str, int]) -> float | None:
        """Return when the last of these partitions came to be read by a route as it is; None where it always was.

        `text` is the route's in an edition. A partition of which nothing is known doesn't count.
        """
        began = [at for place in places if (at := self._since(route, text, self._readings.get(place, [])))]
        return max(began, default=None)

    def _since(self, route: str, text: str, readings: list[Reading]) -> float | None:
        at: float | None = None
        for reading in reversed(readings):
            edition = self.edition(reading.edition)
            if edition is None or edition.routes.get(route) != text:
                return at
            at = reading.at
        return None

    def obsolete(self, now: float, log_starts: Mapping[str, int]) -> Iterator[Order]:
        """Yield the records that tell nothing of what the log still has.

        `log_starts` are "topic/partition" → first offset; where a partition isn't among them, its records stay.
        """
        needed: set[str] = set()
        for place, readings in self._readings.items():
            start = log_starts.get(place, 0)
            for number, reading in enumerate(reversed(readings)):
                if number >= KEPT:
                    break
                needed.add(reading.name)
                if reading.begins.base <= start and not any(reading.begins.done):
                    break
        used: set[str] = set()
        for name, order in self._routed.items():
            if name in needed:
                used.add(order.edition)
            else:
                yield order
        used |= {self._editions[name].edition for name in used if name in self._editions}
        for name, order in self._editions.items():
            if name not in used and order.at < now - UNUSED:
                yield order


def _place(partition: Partition) -> str:
    return f"{partition.topic}/{partition.number}"
