"""Which life of a delivery a record or an attempt is of."""

from itertools import permutations
from typing import Any

from gateway.index.lives import Lives, Row
from gateway.index.settlement import AttemptOutcome, DeliveryKey, DeliveryRow
from gateway.index.statuses import Status
from gateway.log.attempt_records import Decision

Step = DeliveryRow | tuple[DeliveryRow, AttemptOutcome]
RECEIVED, KICK, REPLAY = 1_000, 5_000, 7_000
FAILED = "500"


def a_row(status: Status, *, replayed: int = 0, successor: int = 0, **fields: Any) -> DeliveryRow:
    given: dict[str, Any] = {"partition": 1, "offset": 5, "decided": RECEIVED, "began": replayed or RECEIVED} | fields
    key = DeliveryKey(1, "dlv_1", replayed)
    return DeliveryRow(key, "ship", "warehouse", -1, status, successor=successor, **given)


def an_attempt(number: int, replayed: int = 0, result: str = FAILED) -> tuple[DeliveryRow, AttemptOutcome]:
    first = a_row(Status.RETRYING, replayed=replayed, successor=-1, partition=9, offset=0)
    return first, AttemptOutcome(number, 2_000 + replayed + number, result, Decision.HALTED)


def added(*steps: Step) -> list[DeliveryRow]:
    """Return the rows of a delivery in an ordered topic after records and attempts; partition 1 is of it."""
    lives = Lives([])
    for step in steps:
        if isinstance(step, DeliveryRow):
            lives.add_record(step, is_ordered=step.partition == 1)
        else:
            lives.add_attempt(*step)
    return [each.now for each in lives.rows]


def test_a_kick_goes_on_with_the_row_of_the_record_in_the_ordered_topic() -> None:
    [row] = added(a_row(Status.PENDING), an_attempt(1), an_attempt(2), an_attempt(1, KICK, "503"))
    assert (row.key.replayed, row.status, row.partition, row.offset) == (KICK, Status.RETRYING, 1, 5)
    assert (row.attempts, row.result, row.began) == (1, "503", RECEIVED)


def test_an_earlier_life_that_goes_on_after_a_crash_is_the_same_delivery() -> None:
    [row] = added(a_row(Status.PENDING), an_attempt(2), an_attempt(1, KICK), an_attempt(3, result="502"))
    assert (row.key.replayed, row.attempts, row.result) == (KICK, 3, "502")


def test_a_dead_letter_after_a_kick_is_the_same_delivery_in_whichever_order_it_is_read() -> None:
    records = [a_row(Status.PENDING), a_row(Status.DEAD, replayed=KICK, successor=1, partition=3, offset=8, attempts=1)]
    attempts = [an_attempt(1), an_attempt(2), an_attempt(1, KICK)]
    told = set()
    for order in permutations(records):
        for others in permutations(attempts):
            told |= {(row.key, row.status, row.partition, row.offset, row.began) for row in added(*order, *others)}
    for others in permutations(attempts):  # read as they were written
        told |= {
            (row.key, row.status, row.partition, row.offset, row.began)
            for row in added(*records[:1], *others, records[1])
        }
    assert told == {(DeliveryKey(1, "dlv_1", KICK), Status.DEAD, 3, 8, RECEIVED)}


def test_a_replay_beside_a_halted_delivery_has_a_row_of_its_own() -> None:
    """A kick is of the one that halts, which is the first in its order, however often it was kicked before."""
    replayed = a_row(Status.PENDING, replayed=REPLAY, successor=7_001, offset=9)
    kicked = an_attempt(1, REPLAY + 1_000)
    for steps in ([a_row(Status.PENDING), an_attempt(1, KICK), replayed], [replayed, a_row(Status.PENDING)]):
        told = {each.offset: each.key.replayed for each in added(*steps, kicked)}
        assert told == {5: REPLAY + 1_000, 9: REPLAY}


def test_a_dead_letter_that_is_replayed_is_another_life() -> None:
    steps = [
        a_row(Status.DEAD, successor=1, partition=3, offset=8),
        a_row(Status.RETRYING, replayed=REPLAY, successor=2, partition=4, offset=0),
    ]
    assert [each.key.replayed for each in added(*steps)] == [0, REPLAY]


def test_an_attempt_without_a_record_of_a_delivery_that_has_no_place_in_an_order_is_a_life_of_its_own() -> None:
    """Of an item of an event that was replayed whole: only the event's record says so."""
    steps: list[Step] = [a_row(Status.DEAD, successor=1, partition=3, offset=8), an_attempt(1, REPLAY)]
    assert [(each.key.replayed, each.partition) for each in added(*steps)] == [(0, 3), (REPLAY, 9)]


def test_a_row_keeps_the_key_that_it_has_in_the_file() -> None:
    stored = a_row(Status.PENDING)
    lives = Lives([Row(stored, is_ordered=True, stored=stored.key)])
    lives.add_attempt(*an_attempt(1, KICK))
    [row] = lives.rows
    assert (row.stored, row.now.key.replayed) == (stored.key, KICK)
