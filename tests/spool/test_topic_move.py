"""How far a topic is moved, and what may be in the log already."""

from hypothesis import given
from hypothesis import strategies as st

from gateway.log.base import Commit, Record
from gateway.spool.records import SpooledRecord, decode, spool_headers
from gateway.spool.topic_move import Doubt, PartitionMove, TopicMove, first_before


def record(offset: int, key: bytes = b"k", tried_at: float | None = None, spooled_at: float = 0.0) -> SpooledRecord:
    return SpooledRecord(offset, spooled_at, key, b"{}", [("ce_id", b"e%d" % offset)], tried_at)


@given(st.sets(st.integers(0, 300)), st.sets(st.integers(0, 300)))
def test_what_is_moved_is_known_to_the_next_process(first: set[int], second: set[int]) -> None:
    move = TopicMove("t", 0)
    move.finish(first)
    again = TopicMove.after("t", move.commit(now=1.0))
    again.finish(second - first)
    moved = first | second
    base = next(offset for offset in range(302) if offset not in moved)
    assert again.base == base
    assert again.done == {offset for offset in moved if offset > base}


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
    again.finish([0, 1, 2])
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
    assert move.by_partition([record(0)], now=3.9) == {}  # the append may not be over
    assert move.by_partition([record(0)], now=4.0)


def test_a_commit_of_a_newer_version_means_that_anything_may_be_anywhere() -> None:
    move = TopicMove.after("t", Commit(4, metadata=b"something else"))
    assert move.since([record(10_000)]) == 0.0


def test_what_is_tried_waits_until_its_append_is_over_and_so_does_what_follows() -> None:
    records = [record(0), record(1, tried_at=1.0, spooled_at=10.0), record(2)]
    assert first_before(records, tried_until=9.0) == records[:1]
    assert first_before(records, tried_until=10.0) == records


def test_a_record_is_in_the_log_as_the_ingress_made_it() -> None:
    headers = [("ce_id", b"e1"), ("gw_at", b"1.0")]
    for tried_at in (None, 12.5):
        [found] = decode([Record(0, 1.0, b"k", b"{}", spool_headers(headers, tried_at))])
        assert (found.headers, found.tried_at, found.receipt) == (headers, tried_at, b"e1 1.0")


def test_a_partition_that_failed_rests_ever_longer_and_keeps_no_other_waiting() -> None:
    move = TopicMove("t", 0)
    move.set_partitions(2, now=0.0)
    [zero] = move.by_partition([record(0, b"a")], now=0.0)
    state = move.partitions[zero]
    waits = []
    for _ in range(6):
        state.failed("away", now=100.0)
        waits.append(state.retry_at - 100.0)
    assert waits == [0.5, 1.0, 2.0, 4.0, 5.0, 5.0]
    assert move.by_partition([record(0, b"a")], now=100.0) == {}
    assert move.by_partition([record(0, b"a")], now=105.0)
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
    state.found_out(60, end=55)
    state.succeeded(56)
    assert (state.doubt, state.next_offset) == (12.0, 40)  # what comes next is looked for from there, too
    state.found_out(100, end=70)
    state.succeeded(71)
    assert (state.doubt, state.next_offset) == (None, 71)
