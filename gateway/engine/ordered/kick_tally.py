"""The outcome of a kick on an ordered route: which of its deliveries were tried, and why the others wait.

    tracked ───▶ ended, without an outcome of its own ────▶ tried: delivered
        │        another attempt than before the kick ────▶ tried: it failed; dead, if it ended with that
        │        ended without one ───────────────────────▶ ended
        ├──────▶ behind an unfinished one of its key ─────▶ waits for that one
        └──────▶ first of its key ────────────────────────▶ waits, or on its way

Pure: nothing here reads a clock or writes a record.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

from gateway.engine.control.records import BEHIND, ENDED, HALTED, LATER, ON_ITS_WAY, UNREAD, ControlRecord, tried_name
from gateway.engine.control.state import Control
from gateway.engine.partition_tracker import PendingDelivery, Stage, Tracker
from gateway.model import Delivery, SpillReason, result_label

OUTCOME_AFTER = 2.0
"""Seconds after a kick arrived in which its outcome is published: less than its job takes, which answers it."""


@dataclass(frozen=True, slots=True)
class _Tracked:
    pending: PendingDelivery
    attempts: int
    previous_result: str
    """Result of the last attempt before the kick; "" without one."""


class Kicks:
    """Which kicks of an ordered route or its destination have arrived."""

    def __init__(self, control: Control, route: str, destination: str) -> None:
        self._control = control
        self._route, self._destination = route, destination
        self.last_at = control.kicked_at(route, destination)
        """When the last of either was announced."""
        self._route_at = control.kicked_at(route, "")

    def arrived(self) -> tuple[bool, bool]:
        """Return whether one has arrived since the last time, and whether one of the route has."""
        before = self.last_at, self._route_at
        self.last_at = self._control.kicked_at(self._route, self._destination)
        self._route_at = self._control.kicked_at(self._route, "")
        return self.last_at != before[0], self._route_at != before[1]


class KickTally:
    """The deliveries of an ordered route that wait in one process as a kick arrives, until its outcome is published.

    On plain routes, the job of the kick has `jobs/kick_outcomes.py` instead.
    """

    def __init__(self, route: str, destination: str) -> None:
        self._target = (route, destination)
        self._kicked_at = 0.0
        self._until = 0.0
        self._partitions: dict[Tracker, _OfPartition] = {}

    def begin(
        self,
        kicked_at: float,
        now: float,
        unread: Mapping[Tracker, int],
        queues: Iterable[Iterable[PendingDelivery]],
        results: Mapping[PendingDelivery, str],
    ) -> None:
        """Track the deliveries in these queues from a kick on, after it reset the attempts of what had halted.

        `unread` is how many others of each partition aren't in memory, `results` are those of the last attempts.
        """
        self._kicked_at, self._until = kicked_at, now + OUTCOME_AFTER
        self._partitions = {tracker: _OfPartition(number, []) for tracker, number in unread.items()}
        for pending in chain.from_iterable(queues):
            if (of := self._partitions.get(pending.record.tracker)) is not None:
                of.tracked.append(_Tracked(pending, len(pending.delivery.attempts), results.get(pending, "")))

    def forget(self, pending: PendingDelivery) -> None:
        """Track a delivery no longer: a newer one has superseded it, or its route isn't for it any more."""
        if (of := self._partitions.get(pending.record.tracker)) is not None:
            of.tracked[:] = [each for each in of.tracked if each.pending is not pending]

    @property
    def is_open(self) -> bool:
        """Whether an outcome is still to be published."""
        return bool(self._partitions)

    def take_outcomes(
        self, now: float, heads: Collection[PendingDelivery], hold_reason: str, rate: float | None
    ) -> Sequence[ControlRecord]:
        """Return the outcome on each partition with a backlog that is still ours, once; () before it is settled.

        That is when each delivery was tried, has ended, or waits for one that was tried; else after some time. `heads`
        are the first unfinished deliveries of their keys, `hold_reason` is why none of them is sent now, if so.
        """
        found = [(tracker, of) for tracker, of in self._partitions.items() if tracker.is_live and of.count]
        is_settled = all(of.is_settled(heads, hold_reason) for _, of in found)
        if not is_settled and now < self._until:
            return ()
        self._partitions = {}
        outcomes = [(of.outcome(heads, hold_reason), tracker.partition.number) for tracker, of in found]
        return [
            replace(outcome, name=tried_name(*self._target, number), at=self._kicked_at, rate=rate)
            for outcome, number in outcomes
        ]


@dataclass(frozen=True, slots=True)
class _OfPartition:
    unread: int
    tracked: list[_Tracked]

    @property
    def count(self) -> int:
        return self.unread + len(self.tracked)

    def is_settled(self, heads: Collection[PendingDelivery], hold_reason: str) -> bool:
        return all(
            _wait_reason(each, heads, hold_reason) in _SETTLED and not _is_dying(each.pending) for each in self.tracked
        )

    def outcome(self, heads: Collection[PendingDelivery], hold_reason: str) -> ControlRecord:
        waiting_by_reason = Counter[str]({UNREAD: self.unread} if self.unread else {})
        failed_by_result, repeated_failures = Counter[str](), Counter[str]()
        delivered = dead = 0
        for each in self.tracked:
            if reason := _wait_reason(each, heads, hold_reason):
                waiting_by_reason[reason] += 1
            elif len(each.pending.delivery.attempts) == each.attempts:
                delivered += 1
            else:
                result = last_result(each.pending.delivery)
                failed_by_result[result] += 1
                repeated_failures[result] += result == each.previous_result
                dead += each.pending.stage is Stage.FINISHED and each.pending.outcome is not None
        tried = delivered + failed_by_result.total()
        return ControlRecord(
            kind="checkpoint",
            name="",
            state="done",
            at=0.0,
            count=self.count,
            tried=tried,
            delivered=delivered,
            waiting_by_reason=dict(waiting_by_reason),
            failed_by_result=dict(failed_by_result),
            repeated_failures=dict(+repeated_failures),
            dead=dead,
        )


_SETTLED = frozenset({"", BEHIND, ENDED, HALTED, LATER, SpillReason.DELAYED.value})


def _is_dying(pending: PendingDelivery) -> bool:
    """Return whether it is to become a dead letter, but that isn't stored yet."""
    return pending.outcome is not None and pending.stage is Stage.APPEND


def _wait_reason(tracked: _Tracked, heads: Collection[PendingDelivery], hold_reason: str) -> str:
    """Return why a delivery wasn't tried; "" if it was."""
    pending = tracked.pending
    if len(pending.delivery.attempts) > tracked.attempts:
        return ""
    if pending.stage is Stage.FINISHED:
        return LATER if pending.is_moved else "" if pending.outcome is None else ENDED
    if pending.stage is not Stage.WAITING:
        return ON_ITS_WAY
    if pending.outcome is not None:
        return HALTED
    is_head = pending in heads
    if hold_reason == SpillReason.PAUSED or (is_head and not pending.delivery.is_delayed):
        return hold_reason or ON_ITS_WAY
    return SpillReason.DELAYED.value if is_head else BEHIND


def last_result(delivery: Delivery) -> str:
    """Return the status of the last attempt, or the kind of its failure; "" without one."""
    return result_label(delivery.attempts[-1]) if delivery.attempts else ""
