"""Duplicates in an ordered partition are recognised, whichever commit it is read from."""

from hypothesis import given
from hypothesis import strategies as st

from gateway.engine.ordered.duplicate_appends import ROW, DuplicateAppends, Furthest, metadata_of
from gateway.log.base import COMMIT_BYTES, Partition
from gateway.log.records import Origin

EVENTS = [Partition("gateway.events.github", number) for number in range(3)]


def origin(offset: int, partition: Partition = EVENTS[0], at: float | None = None) -> Origin:
    return Origin(partition, offset, 1_700_000_000.0 + offset if at is None else at)


@st.composite
def appended(draw: st.DrawFn) -> list[Origin]:
    """Return what routers append: each partition of events in its order, some of it again from an earlier one on."""
    queues: list[list[Origin]] = []
    for partition in EVENTS:
        offsets = sorted(draw(st.sets(st.integers(0, 40), max_size=12)))
        sent: list[int] = []
        reached = 0  # of the offsets, how many are there at least
        for _ in range(draw(st.integers(1, 3)) if offsets else 0):
            begin = draw(st.integers(0, reached))
            reached = draw(st.integers(reached, len(offsets)))
            sent += offsets[begin:reached]
        queues.append([origin(offset, partition) for offset in sent])
    log = []
    while any(queues):
        log.append(draw(st.sampled_from([queue for queue in queues if queue])).pop(0))
    return log


@given(log=appended(), data=st.data())
def test_each_event_counts_once_from_whichever_commit_the_partition_is_read(
    log: list[Origin], data: st.DataObject
) -> None:
    expected = [each in log[:place] for place, each in enumerate(log)]
    first = DuplicateAppends()
    assert [first.is_duplicate(place, each) for place, each in enumerate(log)] == expected
    note, base = b"", 0
    for begin in sorted(data.draw(st.sets(st.integers(0, len(log)), max_size=4))):
        note = first.metadata(begin, COMMIT_BYTES)
        base = begin
        second = DuplicateAppends(note)
        assert [second.is_duplicate(place, each) for place, each in enumerate(log) if place >= base] == expected[base:]
        assert second.metadata(base, COMMIT_BYTES) == DuplicateAppends(note).metadata(base, COMMIT_BYTES) == note


def test_offsets_that_restart_later_are_of_a_recreated_topic() -> None:
    seen = DuplicateAppends()
    assert [seen.is_duplicate(place, origin(offset, at=100.0 + place)) for place, offset in enumerate((7, 8))] == [
        False
    ] * 2
    assert not seen.is_duplicate(2, origin(3, at=500.0))
    assert seen.is_duplicate(3, origin(3, at=500.0))
    assert not seen.is_duplicate(4, origin(4, at=501.0))


def test_a_duplicate_is_found_whatever_the_leaders_clocks() -> None:
    """The first was stamped by a leader whose clock was ahead, the next one by another."""
    seen = DuplicateAppends()
    for place, (offset, at) in enumerate([(5, 130.0), (6, 100.0), (7, 101.0)]):
        assert not seen.is_duplicate(place, origin(offset, at=at))
    assert seen.is_duplicate(3, origin(5, at=130.0))
    assert seen.is_duplicate(4, origin(6, at=100.0))


def test_where_there_is_no_room_those_are_left_out_that_had_nothing_for_longest() -> None:
    seen = DuplicateAppends()
    many = [Partition("gateway.events.many", number) for number in range(100)]
    for place, partition in enumerate(many):
        seen.is_duplicate(place, origin(place, partition))
    note = seen.metadata(100, 10 * ROW.size + 5)
    assert (len(note), seen.omitted) == (10 * ROW.size, 90)
    known = DuplicateAppends(note)
    assert [known.is_duplicate(0, origin(place, partition)) for place, partition in enumerate(many)] == [False] * 90 + [
        True
    ] * 10


def test_large_numbers_fit() -> None:
    furthest = Furthest((1 << 48) - 1, 4_102_444_800_000)
    assert DuplicateAppends(metadata_of({EVENTS[1]: furthest})).furthest(EVENTS[1]) == furthest
