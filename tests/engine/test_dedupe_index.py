"""The dedupe index and its verdicts: also against a model that keeps every entry in a list."""

import random
import tracemalloc
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.engine.dedupe.index import ENTRIES_KEPT, MIN_BUCKETS, ROWS_A_BUCKET, DedupeIndex, DedupeVerdict
from gateway.log.records import DEDUPE_ENTRY

HOUR = 3600 * 1_000_000
WINDOW = HOUR
START = 1_700_000_000 * 1_000_000
NEW, CONFLICT, DUPLICATE = DedupeVerdict.NEW, DedupeVerdict.CONFLICT, DedupeVerdict.DUPLICATE


def a_row(identity: int = 1, content: int = 1, *, offset: int = 0, at: int = START) -> bytes:
    return DEDUPE_ENTRY.pack(identity.to_bytes(16, "big"), content.to_bytes(8, "big"), offset, at)


def judged(*rows: bytes, window: int = WINDOW) -> list[DedupeVerdict]:
    index = DedupeIndex()
    return [index.add(row, window) for row in rows]


def test_only_the_first_of_several_duplicates_is_new() -> None:
    assert judged(*[a_row(offset=offset, at=START + offset) for offset in range(4)]) == [NEW, *[DUPLICATE] * 3]


def test_a_duplicates_original_is_the_newest_passed_before_it() -> None:
    index = DedupeIndex()
    for row in (a_row(offset=1), a_row(2, offset=2), a_row(1, 2, offset=3), a_row(offset=4, at=START + 2 * WINDOW)):
        index.add(row, WINDOW)
    assert index.original(a_row(offset=9, at=START + 2), WINDOW) == 4
    assert index.original(a_row(offset=2, at=START + 2), WINDOW) == 1
    assert index.original(a_row(1, 2, offset=9), WINDOW) == 3
    assert index.original(a_row(1, 2, offset=9, at=START + WINDOW + 1), WINDOW) is None
    assert index.original(a_row(5, offset=9), WINDOW) is None


def test_other_identities_are_new() -> None:
    assert judged(a_row(1), a_row(2, offset=1), a_row(1 << 64, offset=2)) == [NEW] * 3


def test_a_record_that_is_read_again_is_no_duplicate_of_itself() -> None:
    assert judged(a_row(offset=7), a_row(offset=7), a_row(offset=8), a_row(offset=7)) == [NEW, NEW, DUPLICATE, NEW]


def test_an_entry_with_a_larger_offset_only_makes_no_duplicate() -> None:
    """It was read while it wasn't known what had come before, and passed; the first one still has to be."""
    assert judged(a_row(offset=8), a_row(offset=7)) == [NEW, NEW]


def test_an_identity_is_not_found_across_the_fields_of_others() -> None:
    """Where the content and the offset of another one happen to be the same bytes, and all that follows looks near."""
    found = 1 << 64 | 5  # content 1, offset 5
    others = [a_row(number << 64 | START, content=1, offset=5) for number in range(100)]
    assert judged(*others, a_row(found, content=2)) == [NEW] * 101


def test_an_identity_with_other_content_is_delivered_each_time_that_the_content_is_new() -> None:
    contents = [1, 2, 1, 2, 3]
    rows = [a_row(content=content, offset=offset) for offset, content in enumerate(contents)]
    assert judged(*rows) == [NEW, CONFLICT, DUPLICATE, DUPLICATE, CONFLICT]


def test_an_identity_shared_by_all_events_costs_no_events_or_memory() -> None:
    index = DedupeIndex()
    for offset in range(10_000):
        assert index.add(a_row(content=offset, offset=offset), WINDOW) is (CONFLICT if offset else NEW)
    assert index.count == ENTRIES_KEPT


@pytest.mark.parametrize(("after", "verdict"), [(WINDOW, DUPLICATE), (WINDOW + 1, NEW)])
def test_a_window_ends_to_the_microsecond(after: int, verdict: DedupeVerdict) -> None:
    assert judged(a_row(), a_row(offset=1, at=START + after))[1] is verdict


def test_a_window_begins_with_the_last_passed_event() -> None:
    ats = [0, WINDOW + 1, 2 * WINDOW, 2 * WINDOW + 1, 2 * WINDOW + 2]
    rows = [a_row(offset=offset, at=START + at) for offset, at in enumerate(ats)]
    assert judged(*rows) == [NEW, NEW, DUPLICATE, DUPLICATE, NEW]


def test_a_clock_that_was_set_back_passes_no_duplicate() -> None:
    assert judged(a_row(at=START + 2 * WINDOW), a_row(offset=1, at=START)) == [NEW, DUPLICATE]


def test_an_identity_that_comes_again_after_each_window_is_a_duplicate_within_each() -> None:
    index = DedupeIndex()
    for turn in range(5 * ENTRIES_KEPT):
        at = START + turn * 2 * WINDOW
        assert index.add(a_row(offset=2 * turn, at=at), WINDOW) is NEW
        assert index.add(a_row(offset=2 * turn + 1, at=at + 1), WINDOW) is DUPLICATE


def test_a_recurring_identity_takes_no_memory_for_forgotten_entries() -> None:
    index = DedupeIndex()
    for turn in range(20):
        index.forget_before(START + turn * 2 * WINDOW)
        index.add(a_row(offset=turn, at=START + turn * 2 * WINDOW), WINDOW)
        assert index.count == 1


def test_each_event_has_its_own_window() -> None:
    index = DedupeIndex()
    index.add(a_row(), HOUR)
    late = a_row(offset=1, at=START + 2 * HOUR)
    assert index.add(late, 3 * HOUR) is DUPLICATE
    assert index.add(late, HOUR) is NEW


def test_entries_are_restored_in_any_order_and_repeatedly() -> None:
    rows = [a_row(identity, offset=identity, at=START + identity) for identity in range(1000)]
    mixed = rows * 2
    random.Random(1).shuffle(mixed)
    index = DedupeIndex()
    for start in range(0, 2000, 70):
        index.restore(b"".join(mixed[start : start + 70]))
    assert index.count == 1000
    assert {index.add(row, WINDOW) for row in rows} == {NEW}  # themselves
    copies = [a_row(identity, offset=5000 + identity, at=START + 5000) for identity in range(1000)]
    assert {index.add(copy, WINDOW) for copy in copies} == {DUPLICATE}


def test_forgotten_entries_are_new_and_not_restored() -> None:
    index = DedupeIndex()
    index.add(a_row(), WINDOW)
    index.forget_before(START + 1)
    index.restore(a_row(2))
    assert index.count == 1
    assert index.add(a_row(offset=1, at=START + 1), WINDOW) is NEW
    assert index.add(a_row(2, offset=1, at=START + 1), WINDOW) is NEW


def test_sweeps_free_forgotten_entries_and_keep_the_rest() -> None:
    index = DedupeIndex()
    many = 200 * ROWS_A_BUCKET * MIN_BUCKETS
    for identity in range(many):
        index.add(a_row(identity, offset=identity, at=START + identity), WINDOW)
    kept = [a_row(identity, offset=many, at=START + many) for identity in range(many - 100, many)]
    index.forget_before(START + many - 100)
    for _ in range(1000):
        index.sweep()
    assert index.count == 100
    assert len(index._buckets) < 4 * 100 // ROWS_A_BUCKET
    assert {index.add(row, WINDOW) for row in kept} == {DUPLICATE}


def test_a_step_never_takes_in_more_than_a_few_buckets() -> None:
    """So none of them holds the event loop up, however many entries there are."""
    index = DedupeIndex()
    sizes = set()
    for identity in range(20_000):
        before = len(index._buckets)
        index.add(a_row(identity, offset=identity), WINDOW)
        sizes.add(len(index._buckets) - before)
    assert sizes == {0, 1}
    assert max(Counter(len(bucket) for bucket in index._buckets)) < 5 * ROWS_A_BUCKET * DEDUPE_ENTRY.size


@dataclass
class Model:
    """Every dedupe entry, in a list."""

    rows: list[tuple[int, int, int, int]]
    horizon: int = 0

    def add(self, identity: int, content: int, offset: int, at: int, window: int) -> DedupeVerdict:
        alive = [row for row in self.rows if row[0] == identity and row[3] >= self.horizon]
        if any(row[1] == content and row[2] < offset and at - row[3] <= window for row in alive):
            return DUPLICATE
        verdict = CONFLICT if any(row[1] != content and abs(at - row[3]) <= window for row in alive) else NEW
        self.rows.append((identity, content, offset, at))
        return verdict


SEEN = st.tuples(st.integers(0, 20), st.integers(0, 2))  # identity, content
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("read"), SEEN, st.integers(0, 40)),
        st.tuples(st.just("read again"), st.integers(0, 300), st.just(0)),
        st.tuples(st.just("crash"), st.just(0), st.just(0)),
        st.tuples(st.just("forget"), st.just(0), st.integers(20, 200)),
        st.tuples(st.just("sweep"), st.just(0), st.just(0)),
    ),
    max_size=300,
)


@settings(max_examples=300, deadline=None)
@given(steps=STEPS, window=st.integers(1, 100))
def test_verdicts_are_those_of_a_model(steps: list[tuple[str, object, int]], window: int) -> None:
    """Through crashes, after which the passed events are restored in another order."""
    index, model = DedupeIndex(), Model([])
    log: list[tuple[int, int, int, int]] = []
    at = 1000
    for step, what, number in steps:
        match step, what:
            case "read", (int(identity), int(content)):
                at += number % 7
                log.append((identity, content, len(log), at))
                assert index.add(a_row(*log[-1][:2], offset=log[-1][2], at=at), window) is model.add(*log[-1], window)
            case "read again", int(again) if again < len(log):
                identity, content, offset, before = log[again]
                verdict = index.add(a_row(identity, content, offset=offset, at=before), window)
                assert verdict is model.add(*log[again], window)
            case "crash", _:
                index = DedupeIndex()
                index.forget_before(model.horizon)
                rows = [a_row(*row[:2], offset=row[2], at=row[3]) for row in model.rows]
                index.restore(b"".join(reversed(rows)))
            case "forget", _:
                model.horizon = at - number
                index.forget_before(at - number)
            case "sweep", _:
                index.sweep()
            case _:
                pass


@settings(max_examples=100, deadline=None)
@given(copies=st.lists(SEEN, min_size=1, max_size=80), crashes=st.lists(st.integers(0, 80), max_size=3))
def test_each_content_of_each_identity_is_passed_whatever_crashes(
    copies: list[tuple[int, int]], crashes: list[int]
) -> None:
    """A crash reads from the commit on, and the owner that follows knows what was stored before that commit."""
    rows = [a_row(*seen, offset=offset, at=START + offset) for offset, seen in enumerate(copies)]
    through: Counter[int] = Counter()
    stored = b""
    committed = 0
    for end in [*sorted(min(crash, len(rows)) for crash in crashes), len(rows)]:
        index = DedupeIndex()
        index.restore(stored)
        for offset in range(committed, end):
            if index.add(rows[offset], WINDOW) is not DUPLICATE:
                through[offset] += 1
                stored += rows[offset]
        committed = max(committed, end - 5)
    first = {seen: offset for offset, seen in reversed(list(enumerate(copies)))}
    assert set(through) == set(first.values())


def test_a_million_identities_take_at_most_64_mib() -> None:
    """While the table grows, too. A larger one has the same steps: `benchmarks/dedupe.py` measures millions."""
    most, count, chance = 0.0, 40_000, random.Random(1)
    tracemalloc.start()
    try:
        index = DedupeIndex()
        for offset in range(count):
            index.add(a_row(chance.getrandbits(128), offset=offset), WINDOW)
            if offset % 1000 == 999 and offset >= count // 4:
                most = max(most, tracemalloc.get_traced_memory()[0] / index.count)
    finally:
        tracemalloc.stop()
    assert 40 < most < 64 * 1.048576
