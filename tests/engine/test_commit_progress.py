import random
import time
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from gateway.engine.commit_progress import WINDOW, CommitProgress
from gateway.log.base import Assignment, Commit, Partition


def a_progress(base: int = 0, done: bytes = b"", log_start: int = 0, *, window: int = WINDOW) -> CommitProgress:
    return CommitProgress(Commit(base, done), log_start, window=window)


def received(progress: CommitProgress, *offsets: int) -> list[int]:
    """Receive these offsets and return those that are still to do."""
    return [offset for offset in offsets if progress.received(offset)]


def done_in(commit: Commit, up_to: int) -> set[int]:
    """Return the offsets below `up_to` that a commit calls done."""
    bits = int.from_bytes(commit.done, "little")
    return {offset for offset in range(up_to) if offset < commit.base or bits >> (offset - commit.base) & 1}


def test_nothing_is_to_be_committed_before_something_finishes() -> None:
    progress = a_progress(base=10, log_start=3)
    received(progress, 10, 11, 12)
    assert progress.base == 10
    assert progress.committable() is None


def test_an_unfinished_record_holds_the_base_back_but_not_the_bits() -> None:
    progress = a_progress(base=10)
    received(progress, 10, 11, 12, 13)
    progress.mark_done(11)
    progress.mark_done(13)
    assert progress.committable() == Commit(10, bytes([0b1010]))
    progress.mark_done(10)
    assert progress.committable() == Commit(12, bytes([0b10]))
    progress.mark_done(12)
    assert progress.committable() == Commit(14)


def test_a_stored_commit_is_not_committable_again() -> None:
    progress = a_progress()
    received(progress, 0)
    progress.mark_done(0)
    commit = progress.committable()
    assert commit == Commit(1)
    progress.committed(commit)
    assert progress.committable() is None


def test_a_commit_of_records_that_are_gone_is_replaced_before_anything_is_done() -> None:
    progress = CommitProgress(Commit(0), 0, is_committed=False, is_stale=True)
    commit = progress.committable()
    assert commit == Commit(0)
    progress.committed(commit)
    assert progress.committable() is None


@pytest.mark.parametrize(
    ("known", "assigned", "is_another"), [("a", "b", True), ("a", "a", False), ("a", "", False), ("", "b", False)]
)
def test_a_topic_of_another_id_is_another_though_its_commit_is_the_same(
    known: str, assigned: str, *, is_another: bool
) -> None:
    progress = CommitProgress(Commit(0), 0, topic_id=known)
    received(progress, 0, 1)
    assignment = Assignment(Partition("retry", 0), Commit(0), 0, topic_id=assigned)
    assert progress.is_of_another_log(assignment) is is_another


def test_an_older_commit_that_was_stored_late_is_replaced() -> None:
    progress = a_progress()
    received(progress, 0, 1)
    progress.mark_done(0)
    first = progress.committable()
    assert first is not None
    progress.mark_done(1)
    progress.committed(first)
    assert progress.committable() == Commit(2)


def test_gaps_count_as_done_before_between_and_however_wide() -> None:
    progress = a_progress(base=5)
    assert received(progress, 8, 9, 10**12) == [8, 9, 10**12]
    assert progress.base == 8
    progress.mark_done(9)
    assert progress.committable() == Commit(8, b"\xfe" + b"\xff" * 2047)
    progress.mark_done(8)
    assert progress.committable() == Commit(10**12)


def test_records_done_by_a_commit_are_skipped_and_stay_so() -> None:
    progress = a_progress(base=10, done=bytes([0b1010]))
    assert received(progress, 10) == [10]
    assert progress.committable() is None
    progress.mark_done(10)
    assert progress.committable() == Commit(12, bytes([0b10]))
    assert received(progress, 11, 12, 13, 14) == [12, 14]
    assert progress.lowest_unfinished() == 12


def test_done_records_are_skipped_even_when_all_before_them_is_compacted_away() -> None:
    progress = a_progress(base=10, done=bytes([0b100]))
    assert received(progress, 12, 14) == [14]
    assert progress.base == 14


def test_a_commit_of_trailing_zeros_is_the_same_commit() -> None:
    assert a_progress(base=10, done=b"\x02\x00\x00").committable() is None


def test_records_deleted_unread_are_lost_and_done() -> None:
    progress = a_progress(base=10, done=bytes([0b1010]), log_start=13)  # 10 and 12 are gone, 11 and 13 were done
    assert progress.lost == 2
    assert progress.base == 14
    assert progress.committable() == Commit(14)


def test_a_log_start_below_the_base_is_no_loss() -> None:
    assert a_progress(base=10, log_start=2).lost == 0


def test_records_that_end_before_a_reread_are_committed() -> None:
    """It was received in an earlier epoch, and another owner may come before we read as far as that again."""
    progress = a_progress(base=10)
    progress.mark_done(12)
    progress.mark_done(10)
    assert progress.committable() == Commit(11, b"\x02")
    assert not progress.received(12)
    progress.mark_done(11)
    assert progress.base == 13


def test_finishing_twice_or_without_receipt_changes_nothing() -> None:
    progress = a_progress(base=10)
    received(progress, 10, 13)
    progress.mark_done(10)
    for foreign in (10, 3, 11, 10**15):
        progress.mark_done(foreign)
    assert len(list(progress.unfinished_offsets())) == 1
    assert progress.base == 13


def test_a_record_that_is_read_twice_is_still_to_do() -> None:
    progress = a_progress()
    assert progress.received(0)
    assert progress.received(0)
    assert len(list(progress.unfinished_offsets())) == 1


def test_the_window_is_the_span_from_the_base_to_the_last_received() -> None:
    progress = a_progress(window=4)
    received(progress, 0, 1)
    assert progress.has_room()
    assert (progress.last_behind(0.5), progress.last_behind(0.75)) == (0, -1)
    progress.mark_done(1)
    received(progress, 2, 3)
    assert not progress.has_room()
    received(progress, 4)
    assert (progress.last_behind(0.75), progress.last_behind(0.75, WINDOW + 3)) == (2, 3)
    assert list(progress.unfinished_offsets()) == [0, 2, 3, 4]
    progress.mark_done(0)
    assert progress.base == 2
    assert progress.has_room()


def test_a_commit_fits_into_2048_bytes() -> None:
    progress = a_progress()
    received(progress, *range(WINDOW + 600))
    for offset in range(1, WINDOW + 600):
        progress.mark_done(offset)
    commit = progress.committable()
    assert commit is not None
    assert commit == Commit(0, b"\xfe" + b"\xff" * 2047)


def test_last_received_counts_records_done_before() -> None:
    progress = a_progress(done=b"\x01")
    assert progress.last_received is None
    received(progress, 0)
    assert progress.last_received == 0


def test_a_returning_partition_keeps_interim_results() -> None:
    before = a_progress()
    received(before, 0, 1, 2, 4, 5)
    for offset in (0, 2, 5):
        before.mark_done(offset)
    progress = a_progress()
    progress.merge(before)
    assert progress.committable() == Commit(1, bytes([0b10110]))  # 2, the gap 3, and 5
    assert received(progress, 0, 1, 2, 4, 5, 6) == [1, 4, 6]


def test_a_partition_that_came_back_keeps_more_than_a_window_of_finished_records() -> None:
    before = a_progress()
    for offset in range(WINDOW + 1000):
        before.received(offset)
        before.mark_done(offset)
    progress = a_progress()
    progress.merge(before)
    assert progress.base == WINDOW + 1000


def test_records_received_before_a_merge_are_finished_by_it() -> None:
    before = a_progress()
    received(before, 0, 1, 2)
    before.mark_done(1)
    progress = a_progress()
    received(progress, 0, 1)
    progress.merge(before)
    assert len(list(progress.unfinished_offsets())) == 1
    assert progress.committable() == Commit(0, b"\x02")


def test_merging_does_not_touch_the_earlier_tracker() -> None:
    before = a_progress()
    received(before, 0, 1)
    before.mark_done(1)
    progress = a_progress()
    progress.merge(before)
    received(progress, 0, 1)
    progress.mark_done(0)
    assert before.base == 0
    assert before.committable() == Commit(0, b"\x02")


def test_another_owners_interim_commit_survives_a_merge() -> None:
    before = a_progress()
    received(before, 0, 1, 2)
    before.mark_done(2)
    progress = a_progress(base=1, done=bytes([0b1000]))
    progress.merge(before)
    assert received(progress, 1, 2, 3, 4, 5) == [1, 3, 5]


@settings(derandomize=True, deadline=None)
@given(offset=st.integers(0, 2000), finished=st.sets(st.integers(0, 600)), log_start=st.integers(0, 700))
def test_a_new_owner_finds_committed_records_done(offset: int, finished: set[int], log_start: int) -> None:
    progress = a_progress(base=offset)
    received(progress, *range(offset, offset + 601))
    for number in finished:
        progress.mark_done(offset + number)
    commit = progress.committable() or Commit(offset)
    heir = CommitProgress(commit, offset)
    expected = [number for number in range(offset, offset + 601) if number - offset not in finished]
    assert received(heir, *range(offset, offset + 601)) == expected
    late = CommitProgress(commit, offset + log_start)
    assert late.lost == sum(number < offset + log_start for number in expected) + max(0, log_start - 601)


def test_what_no_commit_could_cover_yet_is_out_of_reach() -> None:
    progress = CommitProgress(Commit(7), 0)
    assert progress.reaches(10**9), "alone"
    assert not progress.reaches(7 + WINDOW, first=7), "beside a first one that is about to be received"
    progress.received(7)
    assert progress.reaches(7 + WINDOW - 1)
    assert not progress.reaches(7 + WINDOW)


class OffsetsOfOnePartition(RuleBasedStateMachine):
    """A plain set of unfinished offsets beside the tracker, over epochs: read, finish, commit, be revoked, return."""

    progress: CommitProgress
    stored: Commit
    log: list[int]
    """Every offset that the log has, ascending; the others are gaps."""
    position: int
    done: set[int]
    under_way: set[int]

    @initialize(start=st.integers(0, 1100))
    def begin(self, start: int) -> None:
        self.stored = Commit(start)
        self.progress = CommitProgress(self.stored, start)
        self.log = []
        self.end = start
        self.position = 0
        self.done = set()
        self.under_way = set()

    @rule(steps=st.lists(st.sampled_from([1, 1, 1, 2, 3, 700]), min_size=1, max_size=30))
    def append(self, steps: list[int]) -> None:
        for step in steps:
            self.end += step
            self.log.append(self.end - 1)

    @precondition(lambda self: self.position < len(self.log))
    @rule(records=st.integers(1, 40))
    def read(self, records: int) -> None:
        for offset in self.log[self.position : self.position + records]:
            is_to_do = self.progress.received(offset)
            assert is_to_do == (offset not in self.done)
            if is_to_do:
                self.under_way.add(offset)
        self.position = min(len(self.log), self.position + records)

    @precondition(lambda self: self.under_way)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        for offset in data.draw(st.lists(st.sampled_from(sorted(self.under_way)), unique=True)):
            self.progress.mark_done(offset)
            self.under_way.discard(offset)
            self.done.add(offset)

    @rule(is_stored=st.booleans())
    def commit(self, is_stored: bool) -> None:  # noqa: FBT001 - hypothesis passes it by name
        commit = self.progress.committable()
        if commit is not None and is_stored:
            self.stored = commit
            self.progress.committed(commit)
            assert self.progress.committable() is None

    @rule()
    def come_back(self) -> None:
        """Revoked and assigned again: the new tracker starts from what is stored, joined with what was finished."""
        before = self.progress
        self.progress = CommitProgress(self.stored, 0)
        self.progress.merge(before)
        self._read_again()

    @rule()
    def crash(self) -> None:
        """Another process goes on from what is stored; what was done after it is done again."""
        self.progress = CommitProgress(self.stored, 0)
        self.done &= done_in(self.stored, self.end)
        self._read_again()

    def _read_again(self) -> None:
        self.under_way = set()
        self.position = next((i for i, offset in enumerate(self.log) if offset >= self.stored.base), len(self.log))

    @invariant()
    def no_commit_covers_an_unfinished_record(self) -> None:
        commit = self.progress.committable() or self.stored
        assert done_in(commit, self.end).isdisjoint(self.under_way)
        assert done_in(commit, self.end).isdisjoint(set(self.log[self.position :]) - self.done)
        assert len(commit.done) <= 2048
        assert not commit.done.endswith(b"\0")

    @invariant()
    def all_that_is_done_can_be_committed(self) -> None:
        commit = self.progress.committable() or self.stored
        assert {offset for offset in self.done if offset < commit.base + WINDOW} <= done_in(commit, self.end)

    @invariant()
    def what_is_unfinished_is_a_set(self) -> None:
        assert set(self.progress.unfinished_offsets()) == set(self.under_way)
        assert self.progress.lowest_unfinished() == min(self.under_way, default=None)


TestOffsetsOfOnePartition = OffsetsOfOnePartition.TestCase
TestOffsetsOfOnePartition.settings = settings(derandomize=True, deadline=None, max_examples=25)


@pytest.mark.parametrize("lag", [0, WINDOW - 1])
def test_the_cost_of_a_record_does_not_grow_with_the_window(lag: int) -> None:
    """Ten times what it takes, so that a busy machine passes and a scan of the window per record doesn't."""
    progress = a_progress()
    received(progress, *range(lag))
    started = time.process_time()
    for offset, oldest in zip(range(lag, lag + 20_000), count(), strict=False):
        progress.received(offset)
        progress.mark_done(oldest)
    assert (time.process_time() - started) / 20_000 < 10e-6


def test_a_full_window_is_committable_in_an_instant() -> None:
    progress = a_progress()
    received(progress, *range(WINDOW))
    for offset in random.Random(1).sample(range(1, WINDOW), WINDOW // 2):
        progress.mark_done(offset)
    started = time.process_time()
    for _ in range(100):
        progress.committable()
    assert (time.process_time() - started) / 100 < 500e-6
