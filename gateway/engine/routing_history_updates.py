"""The entries that a router adds to the routing history: from which offset on it reads a partition by which revision.

    assigned ──▶ from its commit on         reloaded ──▶ from the next record that it hasn't tracked
    back again ▶ from where it was, or from its commit if that is further: what is pending was routed by the old rules

`unpublished` are those that `gateway.control` doesn't have yet, with their revision. They are published within moments,
and again if a member that had lost the partition without knowing it has published something else since, if their
revision has been forgotten (one that comes back after a while, just as the owner of the jobs deletes it), or if the
topic was recreated before they were read.
"""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from gateway.engine.control.records import ControlRecord
from gateway.engine.control.routing_history import History, begins_by_partition
from gateway.log.base import Commit, Partition
from gateway.rules.rules import RoutingRevision


@dataclass(slots=True, kw_only=True, eq=False)
class _Epoch:
    """A routing epoch of a partition, and the name of the record that published it, if one has.

    `taken` is the last record that was tracked when the partition came back: up to it, records are pending or done.
    `taken_over_at` is when another owner's partition was taken over, which may have been further; None if none was.
    """

    revision: RoutingRevision
    begins: Commit
    taken: int = -1
    taken_over_at: float | None = None
    name: str = ""


class Unpublished(NamedTuple):
    """The content of one record."""

    revision: RoutingRevision
    epochs: Mapping[Partition, _Epoch]


class RoutingHistoryUpdates:
    """The routing epochs of the event partitions that one router reads."""

    def __init__(self, history: History) -> None:
        self._history = history
        self._recreations = history.recreations
        self._number = 0  # of the last record
        self._epochs: dict[Partition, _Epoch] = {}
        self._past: list[tuple[Partition, _Epoch]] = []  # ended, and not published yet
        self._revoked: dict[Partition, _Epoch] = {}
        self._revisions_published: set[str] = set()  # and not read back yet

    def took_over(self, partition: Partition, commit: Commit, revision: RoutingRevision, at: float) -> None:
        """Begin an epoch: a partition is read from a commit on."""
        before = self._revoked.pop(partition, None)
        begins, taken = commit, -1
        taken_over_at: float | None = at
        if before is not None:
            # What was tracked and not finished is still pending, as it was routed then.
            taken, taken_over_at = before.taken, before.taken_over_at
            is_as_before = before.revision.name == revision.name
            begins = _from(commit, before.begins.base if is_as_before else taken + 1)
        self._epochs[partition] = _Epoch(revision=revision, begins=begins, taken=taken, taken_over_at=taken_over_at)

    def revoked(self, partition: Partition, last: int | None) -> None:
        """Handle the revocation of a partition; `last` is the last record that was tracked."""
        self._forget_lost()
        epoch = self._epochs.pop(partition, None)
        if epoch is not None:
            self._note(partition, epoch)
            self._revoked[partition] = replace(epoch, taken=_last(epoch, last))

    def forget(self, partition: Partition) -> None:
        """Forget what was tracked of a revoked partition: its topic was recreated."""
        self._revoked.pop(partition, None)

    def forget_revoked(self, excluding: Collection[Partition] = ()) -> None:
        """Forget the revoked partitions, `excluding` these: they aren't coming back."""
        self._revoked = {partition: epoch for partition, epoch in self._revoked.items() if partition in excluding}

    def reloaded(self, revision: RoutingRevision, taken: Mapping[Partition, int | None]) -> None:
        """Begin an epoch of each partition, if needed; `taken` is the last record of each that was tracked."""
        self._forget_lost()
        for partition, epoch in self._epochs.items():
            if epoch.revision.name == revision.name:
                continue
            self._note(partition, epoch)
            last = _last(epoch, taken.get(partition))
            # The former owner may have read beyond what this one has.
            begins, taken_over_at = _from(epoch.begins, last + 1), epoch.taken_over_at
            self._epochs[partition] = _Epoch(revision=revision, begins=begins, taken=last, taken_over_at=taken_over_at)

    def unpublished(self) -> Unpublished | None:
        """Return what to publish next, to be confirmed by `mark_published`; None if there is nothing."""
        self._forget_lost()
        if self._revisions_published:
            # From here on the history says whether it has them: in a week, they may be forgotten.
            self._revisions_published = {name for name in self._revisions_published if not self._history.knows(name)}
        unpublished = self._past or [each for each in self._epochs.items() if self._is_unpublished(*each)]
        if not unpublished:
            return None
        revision = unpublished[0][1].revision
        epochs: dict[Partition, _Epoch] = {}
        for partition, epoch in unpublished:
            is_alike = (epoch.revision.name, epoch.taken_over_at) == (revision.name, unpublished[0][1].taken_over_at)
            if not is_alike or partition in epochs:
                break
            epochs[partition] = epoch
        return Unpublished(revision, epochs)

    def lacks(self, revision: str) -> bool:
        """Return whether a revision has to be published, before its epochs: the history has none, nor is about to."""
        return revision not in self._revisions_published and not self._history.knows(revision)

    def mark_revision_published(self, name: str) -> None:
        """Confirm that a revision was published."""
        self._revisions_published.add(name)

    def mark_published(self, what: Unpublished, name: str) -> None:
        """Confirm that a record with this name was published."""
        for epoch in what.epochs.values():
            epoch.name = name
        self._past = [(partition, epoch) for partition, epoch in self._past if not epoch.name]

    def record(self, what: Unpublished, at: float) -> ControlRecord:
        """Return the record to publish."""
        self._number = max(self._number, self._history.last_number) + 1
        checkpoint, done = begins_by_partition({partition: epoch.begins for partition, epoch in what.epochs.items()})
        content = repr((what.revision.name, sorted(checkpoint.items()), sorted(done.items())))
        name = f"{int(at * 1000):x}-{hashlib.blake2b(content.encode(), digest_size=6).hexdigest()}"
        return ControlRecord(
            kind="routed",
            name=name,
            state="done",
            at=at,
            checkpoint=checkpoint,
            done=done,
            revision=what.revision.name,
            latest=next(iter(what.epochs.values())).taken_over_at,
            number=self._number,
        )

    def _forget_lost(self) -> None:
        """Forget what was published and isn't read back, if the control topic has been recreated: it may be lost."""
        if self._recreations == self._history.recreations:
            return
        self._recreations = self._history.recreations
        self._revisions_published.clear()
        for epoch in self._epochs.values():
            if not self._history.has_record(epoch.name):
                epoch.name = ""

    def _note(self, partition: Partition, epoch: _Epoch) -> None:
        # Publishing an older epoch afterwards would hide this one, even if it is in the history.
        if self._is_unpublished(partition, epoch) or any(other == partition for other, _ in self._past):
            self._past.append((partition, epoch))

    def _is_unpublished(self, partition: Partition, epoch: _Epoch) -> bool:
        if epoch.name and not self._history.has_record(epoch.name):
            return False  # published, and not read back yet
        name = epoch.revision.name
        return self.lacks(name) or not self._history.knows_epoch(partition, epoch.begins, name)


def _last(epoch: _Epoch, taken: int | None) -> int:
    return epoch.taken if taken is None else max(epoch.taken, taken)


def _from(commit: Commit, base: int) -> Commit:
    """Return a commit cut to an offset and those after it."""
    if base <= commit.base:
        return commit
    bits = int.from_bytes(commit.done, "little") >> (base - commit.base)
    return Commit(base, bits.to_bytes((bits.bit_length() + 7) // 8, "little"))
