"""Where a listener goes on: nothing twice, nothing missing, and no memory that grows."""

from hypothesis import given
from hypothesis import strategies as st

from gateway.index.event_numbers import SLOTS
from gateway.listen.cursor import MOST, REWIND, Cursor

BEGAN = 1_764_532_800_000 * SLOTS


def heard(cursor: Cursor, number: int, name: str) -> bool:
    return cursor.hear(number, position=name, identity=f"id of {name}")


def test_before_anything_was_told_it_begins_now() -> None:
    cursor = Cursor()
    assert cursor.resume is None
    cursor.reach(BEGAN - 1)
    assert cursor.resume == BEGAN - 1


def test_it_goes_on_a_little_earlier_but_never_before_its_beginning() -> None:
    cursor = Cursor()
    cursor.reach(BEGAN - 1)
    cursor.reach(BEGAN + REWIND // 2 * SLOTS)
    assert cursor.resume == BEGAN - 1
    cursor.reach(BEGAN + 5000 * SLOTS + 7)
    assert cursor.resume == BEGAN + (5000 - REWIND) * SLOTS - 1


def test_what_was_told_twice_is_new_once_whatever_number_it_has() -> None:
    cursor = Cursor()
    cursor.reach(BEGAN - 1)
    assert heard(cursor, BEGAN + 1, "a")
    assert heard(cursor, BEGAN + 2, "b")
    assert not heard(cursor, BEGAN + 2, "a")
    assert not heard(cursor, BEGAN + 1, "b")
    assert cursor.last == BEGAN + 2


def test_an_event_that_gets_its_position_later_is_the_same() -> None:
    cursor = Cursor()
    assert cursor.hear(BEGAN, position=None, identity="evt_1 of noon")
    assert not cursor.hear(BEGAN, position=None, identity="evt_1 of noon")
    assert not cursor.hear(BEGAN, position="events/0@1", identity="evt_1 of noon")


def test_two_records_of_one_event_are_two() -> None:
    cursor = Cursor()
    assert cursor.hear(BEGAN, position="events/0@1", identity="evt_1 of noon")
    assert cursor.hear(BEGAN + 1, position="events/0@2", identity="evt_1 of noon")


def test_what_is_remembered_is_bounded_in_time_and_number() -> None:
    cursor = Cursor()
    cursor.reach(BEGAN - 1)
    for at in range(100_000):
        assert heard(cursor, BEGAN + at * SLOTS, f"events/0@{at}")
        assert cursor.remembered <= 2 * REWIND + 1
    burst = BEGAN + 200_000 * SLOTS
    for slot in range(MOST + 50):
        assert heard(cursor, burst, f"events/1@{slot}")
    assert cursor.remembered == MOST
    assert cursor.resume == burst, "after what is forgotten"


@given(st.data())
def test_over_any_cuts_and_between_indexes_each_event_is_heard_once(data: st.DataObject) -> None:
    """Two indexes number the events of a millisecond in orders of their own."""
    times = sorted(data.draw(st.lists(st.integers(0, 30), max_size=40)))
    indexes = [
        sorted((BEGAN + at * SLOTS + turn, f"events/0@{number}") for number, (at, turn) in enumerate(numbered))
        for _ in range(2)
        for numbered in [_numbered(times, data.draw(st.randoms(use_true_random=False)))]
    ]
    cursor = Cursor()
    cursor.reach(BEGAN - 1)
    told: list[str] = []
    for _ in range(30):
        resume = cursor.resume
        assert resume is not None
        rest = [each for each in indexes[data.draw(st.integers(0, 1))] if each[0] > resume]
        for number, position in rest[: data.draw(st.integers(0, len(rest)))]:
            told += [position] if heard(cursor, number, position) else []
    resume = cursor.resume
    assert resume is not None
    told += [position for number, position in indexes[0] if number > resume and heard(cursor, number, position)]
    assert sorted(told) == sorted(position for _, position in indexes[0])


def _numbered(times: list[int], chance: object) -> list[tuple[int, int]]:
    """Return the time and the turn of each event, the turns of one time in any order."""
    turns = {at: list(range(times.count(at))) for at in times}
    for its in turns.values():
        chance.shuffle(its)  # type: ignore[attr-defined]
    return [(at, turns[at].pop()) for at in times]
