"""How far events and deliveries are, by commits and by what was read before."""

from itertools import permutations
from typing import Any

from gateway.index.settlement import (
    AttemptOutcome,
    CommitCoverage,
    DeliveryKey,
    DeliveryRow,
    DeliverySummary,
    abandoned,
    advanced,
    after_attempt,
    after_record,
    decode_coverage,
    encode_coverage,
    summaries,
    worst,
)
from gateway.index.statuses import Status
from gateway.log.attempt_records import Decision
from gateway.log.base import Commit

KEY = DeliveryKey(1, "dlv_1", 0)


def a_row(status: Status = Status.RETRYING, successor: int = 1, decided: int = 1_000, **fields: int) -> DeliveryRow:
    given: dict[str, Any] = {"partition": 1, "offset": 0, "attempts": 1} | fields
    return DeliveryRow(
        key=KEY, route="build", destination="ci", item=-1, status=status, decided=decided, successor=successor, **given
    )


def test_a_record_is_done_by_the_commit_in_force() -> None:
    coverage = advanced(None, Commit(10, b"\x02"), 0)
    assert [coverage.status_of(offset) for offset in (9, 10, 11, 12)] == [
        Status.DONE,
        Status.PENDING,
        Status.DONE,
        Status.PENDING,
    ]


def test_nothing_is_done_without_a_commit() -> None:
    assert advanced(None, None, 0).status_of(0) is Status.PENDING


def test_what_the_log_deleted_before_it_was_done_is_unknown() -> None:
    before = advanced(None, Commit(10), 0)
    now = advanced(before, Commit(30), 20)
    assert [now.status_of(offset) for offset in (9, 10, 19, 20)] == [
        Status.DONE,
        Status.UNKNOWN,
        Status.UNKNOWN,
        Status.DONE,
    ]
    later = advanced(now, Commit(60), 50)
    assert later.status_of(10) is later.status_of(40) is Status.UNKNOWN


def test_retention_of_what_is_done_makes_nothing_unknown() -> None:
    coverage = advanced(advanced(None, Commit(10), 0), Commit(10), 10)
    assert coverage == CommitCoverage(10, b"")


def test_what_was_open_in_a_deleted_topic_is_unknown() -> None:
    coverage = abandoned(CommitCoverage(10, b"\x01"))
    assert coverage.status_of(9) is Status.DONE
    assert coverage.status_of(11) is Status.UNKNOWN
    assert abandoned(None).status_of(0) is Status.UNKNOWN


def test_progress_survives_the_file() -> None:
    coverage = CommitCoverage(10, b"\x01\xff", 3, 7)
    assert decode_coverage(encode_coverage(coverage)) == coverage
    assert decode_coverage(None) is None


def test_the_last_successor_counts_in_whatever_order_they_are_read() -> None:
    chain = [
        a_row(successor=1, decided=1_000, offset=5),
        a_row(successor=2, decided=2_000, offset=6, attempts=2),
        a_row(Status.DEAD, successor=3, decided=3_000, offset=7, attempts=3),
    ]
    for order in permutations(chain):
        row: DeliveryRow | None = None
        for record in order:
            row = after_record(row, record)
        assert row is not None
        assert (row.status, row.offset, row.attempts) == (Status.DEAD, 7, 3)


def test_an_attempt_after_the_last_record_ends_a_delivery() -> None:
    outcome = AttemptOutcome(2, 5_000, "200", Decision.DELIVERED)
    row = after_attempt(a_row(decided=1_000), a_row(), outcome)
    assert (row.status, row.attempts, row.result) == (Status.DELIVERED, 2, "200")
    assert after_record(row, a_row(successor=2, decided=2_000)).status is Status.DELIVERED


def test_a_record_after_a_success_is_open_all_the_same() -> None:
    """A copy that a crash left behind has been tried again."""
    row = after_attempt(a_row(decided=1_000), a_row(), AttemptOutcome(2, 5_000, "200", Decision.DELIVERED))
    assert after_record(row, a_row(Status.DEAD, successor=2, decided=9_000)).status is Status.DEAD


def test_an_attempt_alone_makes_a_delivery_that_is_retried() -> None:
    first = a_row(successor=-1)
    assert after_attempt(None, first, AttemptOutcome(1, 5_000, "503", Decision.RETRY)).status is Status.RETRYING
    assert after_attempt(None, first, AttemptOutcome(1, 5_000, "200", Decision.DELIVERED)).status is Status.DELIVERED
    assert after_attempt(None, first, AttemptOutcome(1, 5_000, "400", Decision.DROPPED)).status is Status.DROPPED


def test_an_earlier_attempt_changes_no_result() -> None:
    row = after_attempt(a_row(attempts=3), a_row(), AttemptOutcome(2, 500, "503", Decision.RETRY))
    assert (row.attempts, row.status) == (3, Status.RETRYING)


def test_what_is_pending_is_retried_once_it_was_tried() -> None:
    row = after_attempt(a_row(Status.PENDING, attempts=0), a_row(), AttemptOutcome(1, 500, "503", Decision.RETRY))
    assert row.status is Status.RETRYING


def test_an_event_is_what_its_deliveries_are_and_what_its_record_is() -> None:
    delivery = DeliverySummary("build", "ci", Status.DELIVERED)
    assert summaries(Status.DONE, {delivery: 2}) == {delivery: 2}
    assert summaries(Status.DONE, {}) == {DeliverySummary("", "", Status.DONE): 1}
    assert summaries(Status.PENDING, {delivery: 2}) == {delivery: 2, DeliverySummary("", "", Status.PENDING): 1}
    assert summaries(None, {delivery: 2}) == {delivery: 2}


def test_the_worst_counts() -> None:
    its = [
        DeliverySummary("a", "x", Status.DELIVERED),
        DeliverySummary("b", "y", Status.DEAD),
        DeliverySummary("", "", Status.PENDING),
    ]
    assert worst(its) is Status.DEAD
    assert worst([]) is Status.UNKNOWN
