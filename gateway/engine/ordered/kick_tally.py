"""The outcome of a kick on an ordered route: which of its deliveries were tried, and why the others wait.

    tracked ───▶ ended, without an outcome of its own ────▶ tried: delivered
        │        another attempt than before the kick ────▶ tried: it failed; dead, if it ended with that
        │        ended without one ───────────────────────▶ ended
        ├──────▶ behind an unfinished one of its key ─────▶ waits for that one
        └──────▶ first of its key ────────────────────────▶ waits, or on its way

Its deliveries are as they were when the kick arrived: those that end while it goes through its keys are counted.

Pure: nothing here reads a clock or writes a record.
"""

from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import chain

from gateway.engine.control.records import BEHIND, ENDED, HALTED, LATER, ON_ITS_WAY, UNREAD, ControlRecord, tried_name
from gateway.engine.control.state import Control
from gateway.engine.ordered.batching import in_batches
from gateway.engine.partition_tracker import PendingDelivery, Stage, Tracker
from gateway.model import Attempt, SpillReason, result_label

OUTCOME_AFTER = 2.0
"""Seconds after a kick's arrival within which its outcome is published: its job, which reports that, takes longer."""


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
        self._unread: Mapping[Tracker, int] = {}
        self._before: dict[PendingDelivery, Sequence[Attempt]] = {}
        """What is tracked, each with the attempts that it had when the kick arrived."""
        self._reset: set[PendingDelivery] = set()
        self._is_counting = False

    def begin(
        self,
        kicked_at: float,
        now: float,
        unread: Mapping[Tracker, int],
        queues: Iterable[Iterable[PendingDelivery]],
    ) -> None:
        """Track the deliveries in these queues from a kick's arrival on, before it changes any of them.

        `unread` is how many others of each partition aren't in memory.
        """
        self._kicked_at, self._until = kicked_at, now + OUTCOME_AFTER
        self._unread = unread
        # All in one turn, or some of them would end untracked; so nothing more than this is done with each.
        self._before = {pending: pending.delivery.attempts for pending in chain.from_iterable(queues)}
        self._reset = set()

    def reset(self, pending: PendingDelivery) -> None:
        """Note that the kick has reset a delivery's attempts."""
        if pending in self._before:
            self._reset.add(pending)

    def forget(self, pending: PendingDelivery) -> None:
        """Track a delivery no longer: a newer one has superseded it, or its route isn't for it any more."""
        self._before.pop(pending, None)

    @property
    def is_open(self) -> bool:
        """Whether an outcome is still to be published, and nobody is counting it."""
        return bool(self._unread) and not self._is_counting

    async def publish_outcomes(
        self,
        now: float,
        standing: "Standing",
        rate: float | None,
        publish: Callable[[ControlRecord], None],
        sleep: Callable[[float], Awaitable[None]],
    ) -> None:
        """Publish the outcome on each partition with a backlog that is still ours, once it is settled.

        That is when each delivery was tried, has ended, or waits for one that was tried; else after some time. Each is
        counted as it is at its turn. `rate` is the destination's.
        """
        is_due = now >= self._until
        if not self.is_open or (standing.unreached and not is_due):
            return
        before, self._is_counting = self._before, True
        try:
            counts = await self._counts(before, standing, sleep, is_due=is_due)
        finally:
            self._is_counting = False
        if counts is None or self._before is not before:
            return
        self._unread, self._before, self._reset = {}, {}, set()
        for tracker, count in counts.items():
            if tracker.is_live and count.total:
                publish(count.outcome(tried_name(*self._target, tracker.partition.number), self._kicked_at, rate))
        async for _ in in_batches(range(len(before)), sleep):
            before.popitem()  # in turns, too: it takes as long

    async def _counts(
        self,
        before: Mapping[PendingDelivery, Sequence[Attempt]],
        standing: "Standing",
        sleep: Callable[[float], Awaitable[None]],
        *,
        is_due: bool,
    ) -> "Mapping[Tracker, _Count] | None":
        """Count what has become of each; None if that isn't settled yet, or once another kick has arrived."""
        counts = {tracker: _Count(unread) for tracker, unread in self._unread.items() if tracker.is_live}
        async with aclosing(in_batches(list(before), sleep)) as turns:
            async for pending in turns:
                if self._before is not before:
                    return None
                count = counts.get(pending.record.tracker)
                if count is None or pending not in before:
                    continue
                number = 0 if pending in self._reset else len(before[pending])
                reason = standing.wait_reason(pending, number)
                if not is_due and (reason not in _SETTLED or _is_dying(pending)):
                    return None
                count.add(pending, before[pending], number, reason)
        return counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What keeps the deliveries of an ordered route waiting."""

    is_head: Callable[[PendingDelivery], bool]
    """Whether one is the first unfinished delivery of its key."""
    unreached: Collection[PendingDelivery]
    """Those that the kick hasn't come to yet."""
    hold_reason: str
    """Why none of them is sent now; "" if nothing holds them."""

    def wait_reason(self, pending: PendingDelivery, attempts: int) -> str:
        """Return why a delivery wasn't tried that had so many attempts; "" if it was."""
        if len(pending.delivery.attempts) > attempts:
            return ""
        if pending.stage is Stage.FINISHED:
            return LATER if pending.is_moved else "" if pending.outcome is None else ENDED
        if pending.stage is not Stage.WAITING:
            return ON_ITS_WAY
        is_unreached, is_head = pending in self.unreached, self.is_head(pending)
        if pending.outcome is not None and not is_unreached:
            return HALTED
        is_kicked = is_unreached or (is_head and not pending.delivery.is_delayed)
        if is_kicked or self.hold_reason == SpillReason.PAUSED:
            return self.hold_reason or ON_ITS_WAY
        return SpillReason.DELAYED.value if is_head else BEHIND


@dataclass(slots=True)
class _Count:
    """What has become of the deliveries of one partition."""

    unread: int
    total: int = field(init=False)
    delivered: int = 0
    dead: int = 0
    untried_by_reason: Counter[str] = field(default_factory=Counter)
    failed_by_result: Counter[str] = field(default_factory=Counter)
    repeated_failures: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.total = self.untried_by_reason[UNREAD] = self.unread

    def add(self, pending: PendingDelivery, before: Sequence[Attempt], number: int, wait_reason: str) -> None:
        """Count a delivery.

        `before` are its attempts when the kick arrived, `number` how many of them are left (none, once the kick has
        reset it), and `wait_reason` is "" if it was tried.
        """
        self.total += 1
        if wait_reason:
            self.untried_by_reason[wait_reason] += 1
        elif len(pending.delivery.attempts) == number:
            self.delivered += 1
        else:
            result = _last_result(pending.delivery.attempts)
            self.failed_by_result[result] += 1
            self.repeated_failures[result] += result == _last_result(before)
            self.dead += pending.stage is Stage.FINISHED and pending.outcome is not None

    def outcome(self, name: str, kicked_at: float, rate: float | None) -> ControlRecord:
        return ControlRecord(
            kind="checkpoint",
            name=name,
            state="done",
            at=kicked_at,
            count=self.total,
            tried=self.delivered + self.failed_by_result.total(),
            delivered=self.delivered,
            untried_by_reason=dict(+self.untried_by_reason),
            failed_by_result=dict(self.failed_by_result),
            repeated_failures=dict(+self.repeated_failures),
            dead=self.dead,
            rate=rate,
        )


_SETTLED = frozenset({"", BEHIND, ENDED, HALTED, LATER, SpillReason.DELAYED.value})


def _is_dying(pending: PendingDelivery) -> bool:
    """Return whether it is to become a dead letter, but that isn't stored yet."""
    return pending.outcome is not None and pending.stage is Stage.APPEND


def _last_result(attempts: Sequence[Attempt]) -> str:
    """Return the status of the last attempt, or the kind of its failure; "" without one."""
    return result_label(attempts[-1]) if attempts else ""
