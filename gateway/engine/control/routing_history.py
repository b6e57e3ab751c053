"""Which rules each event was routed by: a fold over two kinds of records of `gateway.control`.

    rules/REVISION    what the routes of a routing revision match (`rules/routing_revision.py`)
    routed/ID         an epoch: from these offsets on, events are routed by this revision

A router publishes an epoch when it takes a partition over, and at each reload, unless it is in the history. So the
revision that an event was matched by is that of the last epoch that begins at or below its offset, or of the one before
if the event was already done when the epoch began. It is unknown if a newer version has published an epoch between
these two: of which partitions can't be read.
"""

from bisect import insort_right
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from math import inf

from gateway.engine.control.records import ControlRecord, by_topic, partition_key
from gateway.log.base import LEADER_CLOCK_SKEW, Commit, Partition, Record
from gateway.rules.routing_revision import decode, encode
from gateway.rules.rules import RoutingRevision

MAX_EPOCHS = 200
"""The newest epochs of each partition that are kept; what was routed before the first of them is unknown."""
UNUSED_RETENTION = 3600.0
"""Seconds for which a revision without an epoch is kept: the process that has written it is about to write one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingEpoch:
    """From an offset on a partition is routed by a revision, except for what was done by then.

    With `taken_over_at`, the former owner may have read further: what was appended by then may have been routed twice.
    """

    revision: str
    begins: Commit
    at: float = 0.0
    taken_over_at: float | None = None
    name: str = ""
    number: int = 0
    """One more than its router knew of. By this they are ordered: a try without an answer may be appended late."""
    stored_at: int = -1
    """The offset of its record in the control topic; -1 if that has been recreated since."""

    def covers(self, offset: int) -> bool:
        return offset >= self.begins.base and not self.begins.covers(offset)


def begins_by_partition(epochs: Mapping[Partition, Commit]) -> tuple[dict[str, int], dict[str, bytes]]:
    """Return where epochs begin as in a record: the offsets, and the completion bitmaps beyond them."""
    offsets = {partition_key(partition): begins.base for partition, begins in epochs.items()}
    return offsets, {partition_key(partition): begins.done for partition, begins in epochs.items() if any(begins.done)}


class History:
    """The revisions and epochs that were published."""

    def __init__(self) -> None:
        self._epochs: dict[str, list[RoutingEpoch]] = {}
        self._revisions: dict[str, ControlRecord] = {}
        self._routed: dict[str, ControlRecord] = {}
        self._newer: dict[str, int] = {}  # epochs of a newer version, by name: their offsets in the control topic
        self.last_number = 0
        """The highest number of an epoch."""
        self.recreations = 0
        """How often the control topic was recreated: what was appended and isn't read yet may be lost."""
        self._decoded: dict[str, RoutingRevision | None] = {}

    def apply(self, record: ControlRecord, offset: int = 0) -> None:
        """Apply a `rules` or `routed` record, with its offset in the control topic."""
        if record.kind == "rules":
            self._decoded.pop(record.name, None)
            if record.state == "deleted":
                self._revisions.pop(record.name, None)
            else:
                self._revisions[record.name] = record
            return
        self._newer.pop(record.name, None)
        if record.state == "deleted":
            self._forget(record.name)
        elif record.name not in self._routed:
            self._routed[record.name] = record
            self.last_number = max(self.last_number, record.number)
            for partition_name, base in record.checkpoint.items():
                begins = Commit(base, record.done.get(partition_name, b""))
                epoch = RoutingEpoch(
                    revision=record.revision,
                    begins=begins,
                    at=record.at,
                    taken_over_at=record.latest,
                    name=record.name,
                    number=record.number or self.last_number,
                    stored_at=offset,
                )
                insort_right(self._epochs.setdefault(partition_name, []), epoch, key=lambda each: each.number)

    def apply_newer(self, name: str, offset: int) -> None:
        """Apply a `routed` record of a newer version, with its offset in the control topic."""
        self._forget(name)
        self._newer[name] = offset

    def _has_newer(self, first: float, last: float) -> bool:
        """Return whether a newer version has published an epoch between two offsets of the control topic."""
        return any(first <= offset <= last for offset in self._newer.values())

    def _forget(self, name: str) -> None:
        record = self._routed.pop(name, None)
        for partition_name in record.checkpoint if record is not None else ():
            left = [epoch for epoch in self._epochs[partition_name] if epoch.name != name]
            if left:
                self._epochs[partition_name] = left
            else:
                del self._epochs[partition_name]

    def records(self) -> list[ControlRecord]:
        """Return all records in force, oldest first."""
        return [*self._revisions.values(), *self._routed.values()]

    def forget_offsets(self) -> None:
        """Begin again with a recreated topic: what is known remains so, as if it preceded the new records."""
        self.recreations += 1
        self.last_number = 0
        self._newer = dict.fromkeys(self._newer, -1)
        self._epochs = {
            partition_name: [replace(epoch, number=0, stored_at=-1) for epoch in epochs]
            for partition_name, epochs in self._epochs.items()
        }

    def partitions(self) -> dict[str, dict[str, int]]:
        """Return the partitions with a history: topic → "topic/partition" → number."""
        return by_topic(self._epochs)

    def knows(self, revision: str) -> bool:
        return revision in self._revisions

    def has_record(self, name: str) -> bool:
        """Return whether a record of this name was read."""
        return name in self._routed

    def knows_epoch(self, partition: Partition, begins: Commit, revision: str) -> bool:
        """Return whether the history has it that a partition is routed by a revision from there on."""
        return any(
            each.revision == revision and each.begins.base <= begins.base and not self._has_newer(each.stored_at, inf)
            for each in self._epochs.get(partition_key(partition), [])[-1:]
        )

    def encode_revision(self, revision: RoutingRevision) -> tuple[str, str]:
        """Return a revision as in its record, and the one that this is a difference to, "" if it is complete."""
        base = next((name for name, record in reversed(self._revisions.items()) if not record.revision), "")
        before = self.revision(base) if base else None
        if before is not None:
            difference = encode(revision, before)
            if len(difference) < len(self._revisions[base].routes) // 4:
                return difference, base
        return encode(revision, None), ""

    def revision(self, name: str) -> RoutingRevision | None:
        """Return a revision, None if it is unknown or this version can't decode it."""
        if name in self._decoded:
            return self._decoded[name]
        record = self._revisions.get(name)
        if record is None:
            return None
        base: RoutingRevision | None = None
        if record.revision:
            whole = self._revisions.get(record.revision)
            # A revision is a difference to a complete one: otherwise records could refer to each other endlessly.
            base = None if whole is None or whole.revision else self.revision(whole.name)
            if base is None:
                return None
        try:
            self._decoded[name] = decode(name, record.routes, base)
        except ValueError:
            self._decoded[name] = None
        return self._decoded[name]

    def revision_at(self, partition: Partition, offset: int) -> RoutingRevision | None:
        """Return the revision that an event was or, as far as known, will be routed by; None if unknown."""
        done_by = inf
        for epoch in reversed(self._epochs.get(partition_key(partition), ())):
            if epoch.covers(offset):
                return None if self._has_newer(epoch.stored_at, done_by) else self.revision(epoch.revision)
            done_by = epoch.stored_at
        return None

    def revisions_between(
        self, partition: Partition, offset: int, first: int, last: float
    ) -> Iterator[RoutingRevision | None]:
        """Yield what `revision_at` returned while the control topic was read up to offsets from `first` to `last`."""
        for epoch in reversed(self._epochs.get(partition_key(partition), ())):
            if epoch.stored_at < last and epoch.covers(offset):
                if self._has_newer(epoch.stored_at, last):
                    yield None
                yield self.revision(epoch.revision)
                if epoch.stored_at < first:
                    return
        yield None

    def may_have_been_routed_before(self, partition: Partition, record: Record) -> Iterator[RoutingRevision | None]:
        """Yield the other revisions by which an event may have been routed before, by owners that didn't finish it."""
        may_be, stored_at = False, -1
        for epoch in reversed(self._epochs.get(partition_key(partition), ())):
            if not epoch.covers(record.offset):
                continue
            if may_be:
                if self._has_newer(epoch.stored_at, stored_at):
                    yield None
                yield self.revision(epoch.revision)
            may_be = epoch.taken_over_at is not None and record.appended_at <= epoch.taken_over_at + LEADER_CLOCK_SKEW
            if not may_be:
                return
            stored_at = epoch.stored_at
        if self._has_newer(-1, stored_at):
            yield None

    def since(self, route: str, definition: str, partition_names: Mapping[str, int]) -> float | None:
        """Return since when all of these partitions are routed by a route as it is now; None if they always were.

        `definition` is the route as in a revision. Partitions without a history are ignored.
        """
        began = [
            at
            for partition_name in partition_names
            if (at := self._since(route, definition, self._epochs.get(partition_name, [])))
        ]
        return max(began, default=None)

    def _since(self, route: str, definition: str, epochs: list[RoutingEpoch]) -> float | None:
        at: float | None = None
        for epoch in reversed(epochs):
            revision = self.revision(epoch.revision)
            if revision is None or revision.routes.get(route) != definition:
                return at
            at = epoch.at
        return None

    def obsolete(
        self, now: float, log_starts: Mapping[str, int], gone: Collection[str] = ()
    ) -> Iterator[ControlRecord]:
        """Yield the records that say nothing about events that the log still has, or that anybody reads.

        `log_starts` maps "topic/partition" to its first offset; the records of a partition that isn't in it are kept.
        The partitions that are `gone` need none; of others, the last epoch is kept in any case.
        """
        needed: set[str] = set()
        for partition_name, epochs in self._epochs.items():
            if partition_name in gone:
                continue
            start = log_starts.get(partition_name, 0)
            for number, epoch in enumerate(reversed(epochs)):
                if number >= MAX_EPOCHS:
                    break
                needed.add(epoch.name)
                if epoch.begins.base <= start and not any(epoch.begins.done):
                    break
        used: set[str] = set()
        for name, record in self._routed.items():
            if name in needed:
                used.add(record.revision)
            else:
                yield record
        used |= {self._revisions[name].revision for name in used if name in self._revisions}
        for name, record in self._revisions.items():
            if name not in used and record.at < now - UNUSED_RETENTION:
                yield record
