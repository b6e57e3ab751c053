"""How far a topic is moved, and what may be in the log already."""

from hypothesis import given
from hypothesis import strategies as st

from gateway.log.base import ALL, Commit, Record, partition_of
from gateway.spool.records import SpooledRecord, decode, digest_of, spool_headers
from gateway.spool.topic_move import NEAR, Doubt, PartitionMove, SeenEnds, TopicMove, before_in_flight


def record(offset: int, key: bytes = b"k", tried_at: float | None = None, spooled_at: float = 0.0) -> SpooledRecord:
    return SpooledRecord(offset, spooled_at, key, b"{}", [("ce_id", b"e%d" % offset)], tried_at)


def of(*numbers: int) -> list[bytes]:
    """Return a key for each of these partitions of two."""
    keys = {partition_of(b"%d" % number, 2): b"%d" % number for number in range(20)}
    return [keys[number] for number in numbers]


def moving(*, base: int = 0, partitions: int = 2) -> TopicMove:
    move = TopicMove("t", base)
    move.set_partitions(partitions, now=0.0)
    return move


def test_a_partition_that_fails_stays_behind_and_catches_up_by_itself() -> None:
    move = moving()
    assert move.due_partitions(now=0.0) == {ALL: [0, 1]}
    move.partitions[0].failed("no leader", now=0.0)
    assert move.due_partitions(now=0.0) == {ALL: [1]}
    assert move.due_partitions(now=1.0) == {0: [0], ALL: [1]}  # it is tried alone, so that nobody waits for it
    zero, one = of(0, 1)
    for start in range(0, 100_000, 1000):
        records = move.see([record(start + each, zero if each % 2 else one) for each in range(1000)], [1])
        assert len(records) == 500, "however far behind the other one is"
        move.finish([each.offset for each in records], since=1.0)
        move.advance(1, records, start + 1000)
        move.deleted([*move.moved], ())
    assert (move.partitions[1].position, move.base) == (100_000, 0)
    move.partitions[0].succeeded(7)
    assert move.due_partitions(now=1.0) == {0: [0], ALL: [1]}
    move.advance(0, [], 100_000 - NEAR)
    assert move.due_partitions(now=1.0) == {ALL: [0, 1]}
    move.partitions[1].is_busy = True
    assert move.due_partitions(now=1.0) == {ALL: [0]}


@given(st.lists(st.booleans(), max_size=30), st.sets(st.integers(0, 29)))
def test_a_partition_goes_on_at_its_first_record_that_waits(sides: list[bool], moved: set[int]) -> None:
    move, keys = moving(), of(0, 1)
    records = [record(offset, keys[side], spooled_at=float(offset)) for offset, side in enumerate(sides)]
    assert move.see(records, [0, 1]) == records
    move.finish([offset for offset in moved if offset < len(records)], since=1.0)
    for number, found in move.by_partition(records).items():
        move.advance(number, found, len(records))
        left = [each.offset for each in found if each.offset not in moved]
        assert move.partitions[number].position == min(left, default=len(records))
        assert move.partitions[number].oldest == min(left, default=None)
    assert [each.offset for each in move.see(records, [0, 1])] == [
        each.offset for each in records if each.offset not in moved
    ]


def test_the_next_process_goes_on_at_the_base_and_knows_what_is_gone() -> None:
    move = moving()
    move.advance(0, [], 50)
    move.advance(1, [record(10, of(1)[0])], 50)
    assert move.lose(range(20, 25)) == 5
    assert move.lose(range(23, 30)) == 5
    assert move.lose(range(20, 30)) == 0
    assert move.lose(range(40, 41)) == 1
    again = TopicMove.after("t", move.commit(now=1.0))
    assert (again.base, again.gone, again.doubt) == (10, [(20, 30), (40, 41)], None)
    assert [offset for offset in range(8, 42) if not again.waits(offset)] == [8, 9, *range(20, 30), 40]
    move.until = 50
    again = TopicMove.after("t", move.commit(now=1.0))
    assert (again.gone, again.doubt) == ([(20, 30), (40, 41)], Doubt(1.0, 50))


def test_what_is_in_the_log_and_not_deleted_yet_is_in_doubt_for_the_next_process() -> None:
    move = moving()
    move.until = 2
    move.finish([0], since=5.0)
    move.finish([1], since=4.0)
    move.advance(0, [record(3, of(0)[0])], 4)
    assert TopicMove.after("t", move.commit(now=9.0)).doubt == Doubt(4.0, 2)
    move.deleted([0], ())
    assert TopicMove.after("t", move.commit(now=9.0)).doubt == Doubt(4.0, 2)
    move.deleted([1], [1])
    assert TopicMove.after("t", move.commit(now=9.0)).doubt == Doubt(9.0, 2)
    assert not move.waits(1), "in a damaged page, from which it can't be deleted"


def test_what_is_too_large_keeps_nobody_waiting_and_is_tried_again() -> None:
    move, key = moving(), of(0)[0]
    records = [record(0, key), record(1, key)]
    move.large[0] = "too large"
    assert move.see(records, [0]) == records[1:]
    move.advance(0, records[:1], 9)
    assert (move.partitions[0].position, move.base) == (9, 0)
    move.try_large()
    assert move.partitions[0].position == 0
    assert move.see(records, [0]) == records


def test_what_is_too_large_is_known_to_the_next_process() -> None:
    move = moving()
    move.until, move.aside = 9, {1, 3, 4, 7}
    move.large = dict.fromkeys((3, 4, 7), "too large")
    for number in (0, 1):
        move.advance(number, [], 9)
    commit = move.commit(now=5.0)
    assert commit == Commit(3, metadata=b"5.000000 9  3-5,7-8")
    again = TopicMove.after("t", commit)
    assert (again.aside, again.large, again.doubt) == ({3, 4, 7}, {}, Doubt(5.0, 9))
    assert TopicMove.after("t", commit._replace(base=4)).aside == {4, 7}, "the others were dropped"
    again.set_partitions(1, now=0.0)
    assert again.see([record(3), record(4)], [0]) == [record(3), record(4)]
    assert again.oldest is None
    again.large = dict.fromkeys((3, 4, 7), "still too large")
    again.advance(0, [], 8)
    assert again.commit(now=70.0).metadata.startswith(b"5.0")
    again.advance(0, [], 9)
    assert again.commit(now=80.0).metadata.startswith(b"80.0"), "what is left was looked for before it was tried"


def test_what_was_looked_for_is_not_looked_for_again() -> None:
    move = TopicMove.after("t", Commit(0, metadata=b"40.0 5 "))
    move.set_partitions(1, now=0.0)
    tried = [record(0), record(7, tried_at=30.0)]
    assert move.since(tried) == 30.0
    move.partitions[0].searched_below = 5
    assert move.since(tried[:1]) is None
    assert move.since(tried) == 30.0
    move.partitions[0].searched_below = 8
    assert move.since(tried) is None


def test_offsets_of_a_topic_that_was_recreated_say_nothing() -> None:
    move = moving()
    move.partitions[0].next_offset = 70
    move.set_topic_id("")
    move.set_topic_id("a")
    move.set_topic_id("")
    assert move.partitions[0].next_offset == 70
    move.set_topic_id("b")
    assert move.partitions[0].next_offset == -1


def test_what_was_about_to_be_moved_may_be_in_the_log() -> None:
    move = TopicMove("t", 0)
    move.set_partitions(2, now=0.0)
    assert move.commit(now=50.0).metadata == b""
    move.until = 3
    commit = move.commit(now=50.0)
    again = TopicMove.after("t", commit)
    assert again.doubt == Doubt(50.0, 3)
    again.set_partitions(2, now=0.0)
    assert again.since([record(2)]) == 50.0
    assert again.since([record(3)]) is None
    assert again.since([record(3, tried_at=40.0), record(2)]) == 40.0
    for number in (0, 1):
        again.advance(number, [], 3)
    assert again.commit(now=60.0) == Commit(3)
    assert again.doubt is None


def test_what_failed_here_is_in_doubt_until_it_is_moved_also_with_more_partitions() -> None:
    move = TopicMove("t", 0)
    move.set_partitions(1, now=0.0)
    move.until = 5
    move.partitions[0].doubt = 30.0
    assert TopicMove.after("t", move.commit(now=70.0)).doubt == Doubt(30.0, 5)
    move.set_partitions(3, now=0.0)
    assert move.doubt == Doubt(30.0, 5)
    assert all(each.doubt is None for each in move.partitions.values())
    assert move.due_partitions(now=3.9) == {}  # the append may not be over
    assert move.due_partitions(now=4.0) == {ALL: [0, 1, 2]}


def test_a_commit_of_a_newer_version_means_that_anything_may_be_anywhere() -> None:
    for metadata in (b"something else", b"1.0 7"):
        move = TopicMove.after("t", Commit(4, metadata=metadata))
        move.set_partitions(1, now=0.0)
        assert move.since([record(10_000)]) == 0.0


def test_what_is_tried_waits_until_its_append_is_over_and_so_does_what_follows() -> None:
    """However the clock is set: what was there before the wait began is over."""
    records, ends = [record(0), record(1, tried_at=1.0, spooled_at=1e9), record(2)], SeenEnds()
    ends.add(1, now=20.0)
    ends.add(3, now=21.0)
    ends.add(3, now=25.0)
    assert ends.below(19.0) == 0
    assert before_in_flight(records, settled_below=ends.below(20.0)) == records[:1]
    assert before_in_flight(records, settled_below=ends.below(21.0)) == records
    assert ends.below(30.0) == 3


def test_a_record_is_in_the_log_as_the_ingress_made_it() -> None:
    headers = [("ce_id", b"e1"), ("gw_at", b"1.0")]
    for tried_at in (None, 12.5):
        [found] = decode([Record(0, 1.0, b"k", b"{}", spool_headers(headers, tried_at))])
        assert (found.headers, found.tried_at, found.digest) == (headers, tried_at, digest_of(b"k", b"{}", headers))


def test_a_partition_that_failed_rests_ever_longer_and_keeps_no_other_waiting() -> None:
    move = moving()
    state = move.partitions[0]
    waits = []
    for _ in range(6):
        state.failed("away", now=100.0)
        waits.append(state.retry_at - 100.0)
    assert waits == [0.5, 1.0, 2.0, 4.0, 5.0, 5.0]
    assert move.due_partitions(now=100.0) == {ALL: [1]}
    assert move.due_partitions(now=105.0) == {0: [0], ALL: [1]}
    state.succeeded(7)
    assert state.next_offset == 7
    assert (state.failures, state.reason) == (0, "")


def test_what_a_failed_append_had_stays_in_doubt_until_all_of_it_was_looked_for() -> None:
    """A turn may have fewer records of the partition than the one that failed."""
    state = PartitionMove(next_offset=40, began=12.0)
    state.begin_doubt(100)
    state.began = 20.0
    state.begin_doubt(30)
    assert (state.doubt, state.doubt_until) == (12.0, 100)
    state.resolve_doubt(60, end=55)
    state.succeeded(56)
    assert (state.doubt, state.next_offset) == (12.0, 40)  # what comes next is looked for from there, too
    state.resolve_doubt(100, end=70)
    state.succeeded(71)
    assert (state.doubt, state.next_offset) == (None, 71)
