"""What a router has to say of the rules by which it reads: from which offset on, in each partition, by which edition.

    assigned ──▶ from where its commit stands          reloaded ──▶ from the next record that it hasn't taken in
    back again ▶ from where it was, or the commit if that is further: what is under way was routed as it was

`unsaid` is what `gateway.control` doesn't say yet. It is told within moments, and again where somebody who has lost the
partition, and doesn't know it, has said something else since.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from gateway.engine.control.records import Order
from gateway.engine.control.routing_history import History, places
from gateway.log.base import Commit, Partition
from gateway.rules.rules import RoutingRevision


@dataclass(slots=True, kw_only=True, eq=False)
class _Begun:
    """A reading of a partition, and the name of the record that told it, if one has.

    `taken` is the last record that had been taken in when the partition came back: what is up to it is under way, or
    done.
    """

    edition: RoutingRevision
    begins: Commit
    taken: int = -1
    name: str = ""


class Unsaid(NamedTuple):
    """What one record is to say."""

    edition: RoutingRevision
    readings: Mapping[Partition, _Begun]


class Readings:
    """The partitions of events that one router reads."""

    def __init__(self, history: History) -> None:
        self._history = history
        self._begun: dict[Partition, _Begun] = {}
        self._past: list[tuple[Partition, _Begun]] = []  # ended, and not told yet
        self._left: dict[Partition, _Begun] = {}

    def took_over(self, partition: Partition, commit: Commit, edition: RoutingRevision) -> None:
        """Note that a partition is read from a commit on."""
        before = self._left.pop(partition, None)
        begins, taken = commit, -1
        if before is not None:
            # What was taken in and not finished is under way still, as it was routed.
            taken = before.taken
            is_as_before = before.edition.name == edition.name
            begins = _from(commit, before.begins.base if is_as_before else taken + 1)
        self._begun[partition] = _Begun(edition=edition, begins=begins, taken=taken)

    def left(self, partition: Partition, last: int | None) -> None:
        """Note that a partition was given up; `last` is the last record that was taken in."""
        begun = self._begun.pop(partition, None)
        if begun is not None:
            self._note(partition, begun)
            self._left[partition] = replace(begun, taken=_last(begun, last))

    def forget(self, partition: Partition) -> None:
        """Forget what was taken in of a partition that was given up: its topic was made again."""
        self._left.pop(partition, None)

    def let_go(self) -> None:
        """Note that what was given up isn't coming back."""
        self._left.clear()

    def reloaded(self, edition: RoutingRevision, taken: Mapping[Partition, int | None]) -> None:
        """Note that from here on rules are in force; `taken` is the last record of each partition that was taken in."""
        for partition, begun in self._begun.items():
            if begun.edition.name == edition.name:
                continue
            self._note(partition, begun)
            last = _last(begun, taken.get(partition))
            self._begun[partition] = _Begun(edition=edition, begins=_from(begun.begins, last + 1), taken=last)

    def unsaid(self) -> Unsaid | None:
        """Return what is to be told next, to be confirmed by `said`; None if there is nothing."""
        unsaid = self._past or [each for each in self._begun.items() if self._is_unsaid(*each)]
        if not unsaid:
            return None
        edition = unsaid[0][1].edition
        readings: dict[Partition, _Begun] = {}
        for partition, begun in unsaid:
            if begun.edition.name != edition.name or partition in readings:
                break
            readings[partition] = begun
        return Unsaid(edition, readings)

    def said(self, what: Unsaid, name: str) -> None:
        """Note that a record has told it."""
        for begun in what.readings.values():
            begun.name = name
        self._past = [(partition, begun) for partition, begun in self._past if not begun.name]

    def order(self, what: Unsaid, at: float) -> Order:
        """Return the record that tells it."""
        marker, done = places({partition: begun.begins for partition, begun in what.readings.items()})
        told = repr((what.edition.name, sorted(marker.items()), sorted(done.items())))
        name = f"{int(at * 1000):x}-{hashlib.blake2b(told.encode(), digest_size=6).hexdigest()}"
        return Order(kind="routed", name=name, state="done", at=at, marker=marker, done=done, edition=what.edition.name)

    def _note(self, partition: Partition, begun: _Begun) -> None:
        # What is said now is so no more once something older has been told.
        if self._is_unsaid(partition, begun) or any(other == partition for other, _ in self._past):
            self._past.append((partition, begun))

    def _is_unsaid(self, partition: Partition, begun: _Begun) -> bool:
        if begun.name and not self._history.has(begun.name):
            return False  # told, and not heard of yet
        return not self._history.says(partition, begun.begins, begun.edition.name)


def _last(begun: _Begun, taken: int | None) -> int:
    return begun.taken if taken is None else max(begun.taken, taken)


def _from(commit: Commit, base: int) -> Commit:
    """Return what a commit says of an offset and those after it."""
    if base <= commit.base:
        return commit
    bits = int.from_bytes(commit.done, "little") >> (base - commit.base)
    return Commit(base, bits.to_bytes((bits.bit_length() + 7) // 8, "little"))
