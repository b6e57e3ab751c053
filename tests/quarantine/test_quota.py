"""Tokens that are shared fairly: whoever takes as much as it can leaves as much for the next."""

from hypothesis import given
from hypothesis import strategies as st

from gateway.quarantine.quota import MAX_KEYS, FairBucket


def taken(bucket: FairBucket, key: str, times: int, *, now: float, cost: float = 1.0) -> int:
    """Ask so many times; return how often there were tokens."""
    count = 0
    for _ in range(times):
        if bucket.has(key, cost, now=now):
            bucket.take(key, cost)
            count += 1
    return count


def test_one_that_takes_all_it_can_leaves_as_much_for_the_next() -> None:
    bucket = FairBucket(capacity=120, rate=0, now=0)
    assert taken(bucket, "flood", 1000, now=0) == 60
    assert taken(bucket, "vendor", 1000, now=0) == 30
    assert taken(bucket, "third", 1000, now=0) == 15


def test_a_seldom_one_is_never_refused_for_those_that_always_ask() -> None:
    bucket, now = FairBucket(capacity=200, rate=10, now=0), 0.0
    kept = 0
    for _ in range(600):  # a minute: nine that flood, and one that asks every second
        now += 0.1
        for number in range(9):
            taken(bucket, f"flood {number}", 100, now=now)
        if round(now * 10) % 10 == 0:
            kept += taken(bucket, "vendor", 1, now=now)
    assert kept == 60


def test_what_is_refilled_is_shared_by_all_that_ask() -> None:
    bucket = FairBucket(capacity=100, rate=10, now=0)
    counts = {name: taken(bucket, name, 1000, now=0) for name in ("a", "b", "c", "d")}
    counts = dict.fromkeys(counts, 0)
    for second in range(1, 101):
        for name in counts:
            counts[name] += taken(bucket, name, 1000, now=float(second))
    assert sum(counts.values()) <= 1000
    assert min(counts.values()) > 150


def test_those_beyond_the_table_share_one_debt() -> None:
    bucket = FairBucket(capacity=10.0 * MAX_KEYS, rate=0, now=0)
    for number in range(MAX_KEYS):
        assert taken(bucket, f"known {number}", 1, now=0) == 1
    beyond = sum(taken(bucket, f"stranger {number}", 1, now=0) for number in range(10 * MAX_KEYS))
    assert beyond == 9 * MAX_KEYS // 2
    assert taken(bucket, "known 1", 1, now=0) == 1


def test_what_is_given_back_may_be_taken_again() -> None:
    bucket = FairBucket(capacity=10, rate=0, now=0)
    assert bucket.has("a", 5, now=0)
    owner = bucket.take("a", 5)
    assert not bucket.has("a", 1, now=1e9)
    bucket.give_back(owner, 5)
    assert bucket.has("a", 5, now=1e9)


@given(st.lists(st.tuples(st.sampled_from("abc"), st.floats(0.1, 5), st.floats(0, 3)), max_size=200))
def test_no_more_is_ever_taken_than_capacity_and_refill(asked: list[tuple[str, float, float]]) -> None:
    bucket, now, total = FairBucket(capacity=20, rate=2, now=0), 0.0, 0.0
    for key, cost, pause in asked:
        now += pause
        if bucket.has(key, cost, now=now):
            bucket.take(key, cost)
            total += cost
        assert total <= 20 + 2 * now + 1e-6
