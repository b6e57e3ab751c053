"""How far events and deliveries are, by what the log has of them: pure decisions.

The log has no record of a delivery that succeeds at once. But its event's record is done, by a commit, only after each
of its deliveries has ended or has a successor that is stored. So what was read before is settled by a commit that was
asked for *before* the ends of the topics of successors: a record that it covers, and of which no successor was read up
to these ends, has ended. Until then it is open, and nothing is guessed.

    commits ──▶ ends of tiers, parked, dead letters, ordered topics ──▶ read up to these ends ──▶ commits in force
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import orjson

from gateway.index.statuses import WORST_FIRST, Status
from gateway.log.attempt_records import Decision
from gateway.log.base import Commit

ALL_OF_IT = 1 << 62
"""An offset above all others."""


class CommitCoverage(NamedTuple):
    """Which records of a partition are done, by the commit in force.

    Of those from `doubted` on to before `doubted_until` it isn't known: the log deleted them before.
    """

    base: int = 0
    done: bytes = b""
    doubted: int = 0
    doubted_until: int = 0

    def status_of(self, offset: int) -> Status:
        """Return whether a record is PENDING, DONE, or that this is UNKNOWN."""
        if self.doubted <= offset < self.doubted_until:
            return Status.UNKNOWN
        return Status.DONE if Commit(self.base, self.done).covers(offset) else Status.PENDING


def advanced(before: CommitCoverage | None, commit: Commit | None, log_start: int) -> CommitCoverage:
    """Return what is covered in a partition by a commit, given where the log begins now.

    What the log has deleted, and wasn't known to be done by then, may be lost.
    """
    current = commit or Commit(0)
    if before is None:
        return CommitCoverage(current.base, current.done)
    doubted, until = before.doubted, before.doubted_until
    if log_start > before.base:
        doubted = min(doubted, before.base) if until else before.base
        until = max(until, log_start)
    return CommitCoverage(current.base, current.done, doubted, until)


def newly_ended(before: CommitCoverage | None, after: CommitCoverage) -> tuple[range, list[int]]:
    """Return which offsets may have ended since: a range, and single ones above it."""
    former = before or CommitCoverage()
    end = after.base + 8 * len(after.done)
    single = [
        offset
        for offset in range(after.base, end)
        if after.status_of(offset) is Status.DONE and former.status_of(offset) is not Status.DONE
    ]
    return range(former.base, after.base), single


def abandoned(before: CommitCoverage | None) -> CommitCoverage:
    """Return the coverage in a partition whose topic is gone: what isn't known to be done never will be."""
    base = before.base if before is not None else 0
    return CommitCoverage(
        base, b"", min(before.doubted, base) if before is not None and before.doubted_until else base, ALL_OF_IT
    )


class DeliveryKey(NamedTuple):
    """One life of a delivery: a replay begins another. `event` is the event's number in the index, `replayed` µs."""

    event: int
    delivery: str
    replayed: int


class DeliveryRow(NamedTuple):
    """What is known of a delivery, by the last of its records and attempts. Times are microseconds, 0 if there is none.

    Its record is at `offset` of the partition with the number `partition` in the index; of a delivery of which only
    attempts are known, that is the event's. `decided` is when what its status is by was appended, or ended. `attempts`
    is the number of the last attempt, `result` what came of it. `reason` is why it waits, is paused (by which name) or
    is a dead letter.
    """

    key: DeliveryKey
    route: str
    destination: str
    item: int
    """Which item of the event it is for; -1 if it is for all of it."""
    status: Status
    decided: int
    partition: int
    offset: int
    successor: int
    attempts: int = 0
    result: str = ""
    reason: str = ""
    detail: str = ""
    due: int = 0
    letter: str = ""
    """Why it became a dead letter, "" if its last record is none."""
    lane: int = 0
    """Which of the counted lanes it is in."""
    began: int = 0
    """When its event was received, or replayed."""


class AttemptOutcome(NamedTuple):
    """What came of an attempt, as recorded; it ended at `ended` (µs)."""

    number: int
    ended: int
    result: str
    decision: Decision | None


_ENDS = {Decision.DELIVERED: Status.DELIVERED, Decision.DROPPED: Status.DROPPED}


def after_record(before: DeliveryRow | None, record: DeliveryRow) -> DeliveryRow:
    """Return what is known of a delivery after one of its records was read.

    Records may be read in any order, and copies that a crash has left behind have the same successor number.
    """
    if before is None:
        return record
    newer, older = (before, record) if record.successor < before.successor else (record, before)
    newer = newer._replace(began=min(before.began, record.began))  # after a kick, that of the life before it
    if newer.attempts < older.attempts:
        newer = newer._replace(attempts=older.attempts, result=older.result)
    if before.status in _ENDS.values() and before.decided > record.decided:
        newer = newer._replace(status=before.status, decided=before.decided)  # an attempt after it has ended it
    return newer


def after_attempt(before: DeliveryRow | None, first: DeliveryRow, outcome: AttemptOutcome) -> DeliveryRow:
    """Return what is known of a delivery after an attempt was read; `first`: what it is if nothing else is known."""
    row = first if before is None else before
    if outcome.number >= row.attempts:
        row = row._replace(attempts=outcome.number, result=outcome.result)
    end = _ENDS.get(outcome.decision) if outcome.decision is not None else None
    if end is not None:
        if before is None or outcome.ended >= row.decided:
            row = row._replace(status=end, decided=outcome.ended)
    elif row.status is Status.PENDING:
        row = row._replace(status=Status.RETRYING)
    return row


class DeliverySummary(NamedTuple):
    """A delivery of an event and how far it is; without a route and a destination ("") the event's as a whole."""

    route: str
    destination: str
    status: Status


def summaries(
    own: Status | None, deliveries: Mapping[DeliverySummary, int], *, instead_of_done: Status = Status.DONE
) -> Mapping[DeliverySummary, int]:
    """Return how far an event is: what its deliveries are, and what else its record says.

    `own` is what its partition's commit says of its record; None if only its deliveries are known. If it is done
    and no delivery is recorded, it is `instead_of_done`.
    """
    if own is Status.DONE:
        return deliveries or {DeliverySummary("", "", instead_of_done): 1}
    return deliveries if own is None else {**deliveries, DeliverySummary("", "", own): 1}


def worst(statuses: Iterable[DeliverySummary]) -> Status:
    """Return the worst status of an event's deliveries: UNKNOWN if there are none."""
    found = {each.status for each in statuses}
    return next((status for status in WORST_FIRST if status in found), Status.UNKNOWN)


def encode_coverage(coverage: CommitCoverage) -> str:
    """Return a partition's coverage as the file has it."""
    base, done, doubted, until = coverage
    return orjson.dumps((base, done.hex(), doubted, until)).decode()


def decode_coverage(encoded: str | None) -> CommitCoverage | None:
    """Return a partition's coverage from how the file has it; None if no commit was in force yet."""
    if encoded is None:
        return None
    base, done, doubted, until = orjson.loads(encoded)
    return CommitCoverage(base, bytes.fromhex(done), doubted, until)
