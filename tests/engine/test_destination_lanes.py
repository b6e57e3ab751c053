"""Lanes and what they share: how many attempts each destination may have, and what is left for the others."""

import heapq
from collections import Counter
from itertools import pairwise

import pytest

from gateway.engine.delivery.destination_lanes import MAX_ATTEMPTS, MAX_LEARNED_DELAY, RETURN_BUCKET, Budget, Lane
from gateway.engine.partition_tracker import PendingDelivery, PendingRecord, Tracker
from gateway.log.base import Assignment, Commit, Partition
from gateway.model import Attempt, Result
from tests.builders import NOW, a_delivery, an_attempt

TRACKER = Tracker(Assignment(Partition("t", 0), Commit(0), 0), member=None)  # type: ignore[arg-type] # not asked
ANSWER = an_attempt(result=Result.SUCCESS, status=200, seconds=0.01)
SILENCE = an_attempt(result=Result.TIMEOUT, seconds=10.0)


def a_pending_delivery(size: int = 1000, *, is_retry: bool = False) -> PendingDelivery:
    record = PendingRecord(tracker=TRACKER, offset=0, appended_at=NOW, size=size)
    return PendingDelivery(delivery=a_delivery(), record=record, size=size, is_retry=is_retry)


def a_lane(name: str = "ci", budget: Budget | None = None, *, concurrency: int = 50, rate: float | None = None) -> Lane:
    return Lane(name, budget or Budget(), concurrency=concurrency, rate=rate)


def start(
    lane: Lane, count: int, now: float = NOW, *, ticks: float | None = None, is_retry: bool = False
) -> list[PendingDelivery]:
    """Offer deliveries and start as many as may start."""
    for _ in range(count):
        lane.offer(a_pending_delivery(is_retry=is_retry), now)
    started: list[PendingDelivery] = []
    while (pending := lane.take(now, now if ticks is None else ticks)) is not None:
        started.append(pending)
    return started


def due(lane: Lane, now: float, *, is_retry: bool = False) -> float:
    """Offer a delivery for which it isn't the time yet, and return after how long it may come."""
    lane.throttled_until = now + 1
    spill = lane.offer(a_pending_delivery(is_retry=is_retry), now)
    assert spill is not None
    return spill.due - lane.throttled_until


def answered(lane: Lane, deliveries: list[PendingDelivery], now: float, attempt: Attempt = ANSWER) -> None:
    for pending in deliveries:
        lane.finished(pending, attempt, now)


def test_a_destination_may_be_well_while_a_probe_has_just_begun() -> None:
    lane, now = a_lane(), NOW
    for _ in range(20):
        answered(lane, start(lane, 2, now), now, SILENCE)
        now += 0.1
    assert lane.breaker.is_open
    assert not lane.may_have_recovered(now)
    now = lane.breaker.retry_at(now) + 0.1
    assert len(start(lane, 1, now)) == 1
    assert lane.may_have_recovered(now + 0.5)
    assert not lane.may_have_recovered(now + 2)


def test_an_open_breaker_with_no_delivery_for_its_probe_says_since_when_it_was_not_tried() -> None:
    lane, now = a_lane(), NOW
    assert lane.untried_since(now) is None
    for _ in range(5):
        now += 0.1
        answered(lane, start(lane, 1, now), now, SILENCE)
    failed_at = now
    assert lane.breaker.is_open
    assert (lane.untried_since(now + 4.9), lane.is_probe_due(now + 4.9)) == (None, False), "its open time isn't over"
    assert (lane.untried_since(now + 5.1), lane.is_probe_due(now + 5.1)) == (failed_at, True)
    assert lane.untried_since(now + 3600) == failed_at
    now += 3600
    lane.offer(a_pending_delivery(), now)
    assert (lane.untried_since(now), lane.is_probe_due(now)) == (None, True), "a delivery waits"
    (probe,) = start(lane, 0, now)
    assert (lane.untried_since(now), lane.is_probe_due(now)) == (None, True), "it is under way"
    answered(lane, [probe], now)
    assert lane.untried_since(now + 60) == now, "one answer of three"
    busy = an_attempt(result=Result.THROTTLED, status=429, retry_after=600.0)
    answered(lane, start(lane, 1, now), now, busy)
    assert (lane.untried_since(now + 60), lane.is_probe_due(now + 60)) == (None, False)
    assert lane.untried_since(now + 601) == now
    answered(lane, start(lane, 1, now + 601), now + 601)
    assert (lane.untried_since(now + 700), lane.is_probe_due(now + 700)) == (None, False), "it is closed"


def test_deliveries_spilled_together_are_due_at_the_destinations_pace() -> None:
    lane = a_lane(rate=5.0)
    start(lane, 31)
    dues = [spill.due for spill in lane.pop_overdue(NOW + 2)]
    assert [later - earlier for earlier, later in pairwise(dues)] == pytest.approx([1 / 5] * 29)


def test_what_is_queued_waits_no_longer_where_the_clock_goes_back() -> None:
    lane = a_lane(rate=5.0)
    start(lane, 31, NOW + 3600)
    assert len(lane.pop_overdue(NOW)) == 30


def test_the_silence_that_was_asked_for_lasts_as_long_where_the_clock_goes_back() -> None:
    lane = a_lane()
    (pending,) = start(lane, 1, NOW + 3600)
    lane.finished(pending, an_attempt(result=Result.THROTTLED, status=429, retry_after=8.0), NOW + 3600)
    assert lane.current_hold(NOW + 3600) == ("retry_after", NOW + 3608)
    assert lane.current_hold(NOW) == ("retry_after", NOW + 8)
    spill = lane.offer(a_pending_delivery(), NOW + 1)
    assert spill is not None
    assert NOW + 8 <= spill.due < NOW + 10
    assert len(start(lane, 1, NOW + 8)) == 1


def test_a_destination_begins_with_few_attempts_and_each_answer_allows_another() -> None:
    lane = a_lane()
    under_way = start(lane, 60)
    rounds = [len(under_way)]
    now = NOW
    while rounds[-1] < 50:
        now += 0.01
        answered(lane, under_way, now)
        under_way = start(lane, 60 - lane.waiting, now)
        rounds.append(len(under_way))
    assert rounds[0] == MAX_ATTEMPTS // 512
    assert len(rounds) <= 5, "it doubles with each round trip"


def test_a_destinations_measured_pace_is_forgotten_when_idle() -> None:
    lane = a_lane()
    now = NOW
    under_way = start(lane, 60)
    for _ in range(6):
        now += 0.01
        answered(lane, under_way, now)
        under_way = start(lane, 60 - lane.waiting, now)
    assert len(under_way) == 50
    answered(lane, under_way, now)
    while rest := start(lane, 0, now):
        answered(lane, rest, now)
    assert len(start(lane, 60, now + 11)) == MAX_ATTEMPTS // 512


def test_concurrency_that_is_not_used_is_not_shown() -> None:
    lane = a_lane()
    for turn in range(100):
        answered(lane, start(lane, 1, NOW + turn), NOW + turn)
    assert len(start(lane, 60, NOW + 100)) == MAX_ATTEMPTS // 512


def test_a_thousand_destinations_that_die_at_once_leave_attempts_for_those_that_live() -> None:
    budget = Budget()
    dead = [a_lane(f"dead{number}", budget) for number in range(1000)]
    taken = sum(len(start(lane, 20)) for lane in dead)
    assert taken >= 2000
    alive = [a_lane(f"alive{number}", budget) for number in range(200)]
    assert [len(start(lane, 1)) for lane in alive] == [1] * 200


def test_destinations_that_do_not_answer_have_a_quarter_between_them() -> None:
    budget = Budget()
    dead = [a_lane(f"dead{number}", budget) for number in range(1500)]
    for lane in dead:
        answered(lane, start(lane, 1), NOW + 10, SILENCE)
    assert sum(len(start(lane, 5, NOW + 11)) for lane in dead) == MAX_ATTEMPTS // 4
    assert len(start(a_lane("alive", budget), 1, NOW + 11)) == 1


def test_a_lane_whose_attempts_hang_is_in_doubt_before_they_time_out() -> None:
    budget = Budget(attempts=512)
    lanes = [a_lane(f"stuck{number}", budget) for number in range(200)]
    for lane in lanes:
        assert len(start(lane, 1)) == 1
    assert sum(len(start(lane, 1, NOW + 2)) for lane in lanes) == 128, "a quarter of 512"


def test_a_lane_that_answers_is_not_in_doubt_however_long_it_takes_between_two() -> None:
    lane = a_lane("slow")
    answered(lane, start(lane, 1), NOW + 9)
    assert [pending.is_unresponsive for pending in start(lane, 2, NOW + 9)] == [False, False]


@pytest.mark.parametrize("is_retry", [False, True])
def test_retries_leave_half_of_the_attempts_to_first_ones(is_retry: bool) -> None:  # noqa: FBT001 - a case
    budget = Budget(attempts=128)
    lanes = [a_lane(f"d{number}", budget) for number in range(200)]
    assert sum(len(start(lane, 1, is_retry=is_retry)) for lane in lanes) == (64 if is_retry else 128)


def test_one_attempt_of_a_destination_may_always_start_while_there_is_one() -> None:
    budget = Budget(attempts=8)
    started = [len(start(a_lane(f"d{n}", budget), 1)) for n in range(10)]
    assert started == [1] * 8 + [0] * 2


def test_a_place_is_given_back_by_an_end_and_by_a_cancellation() -> None:
    budget = Budget(attempts=2)
    one, other = a_lane("one", budget), a_lane("other", budget)
    (pending,) = start(one, 1)
    (second,) = start(other, 1)
    third = a_lane("third", budget)
    assert start(third, 1) == []
    one.cancelled(pending, NOW)
    assert len(start(third, 0)) == 1
    answered(other, [second], NOW)
    assert other.in_flight == 0


@pytest.mark.parametrize("end", [ANSWER, SILENCE])
def test_every_end_gives_the_place_of_all_back(end: Attempt) -> None:
    """More ends than there are places in all."""
    budget = Budget(attempts=64)
    lane = a_lane(budget=budget)
    now = NOW
    for _ in range(100):
        now += 1000.0  # whatever the breaker and the doubt say, it is over by then
        answered(lane, start(lane, 1, now), now, end)
    assert [lane.in_flight, budget.initial_concurrency] == [
        0,
        a_lane(budget=Budget(attempts=64))._budget.initial_concurrency,
    ]
    assert len(start(a_lane("other", budget), 1, now)) == 1


def test_a_worker_has_its_share_of_the_fleets_limits() -> None:
    lane = a_lane(concurrency=4, rate=100.0)
    lane.set_limits(concurrency=4, rate=100.0, share=0.5)
    assert len(start(lane, 10)) == 2
    answered(lane, start(lane, 0), NOW)
    fast = a_lane(concurrency=100, rate=100.0)
    fast.set_limits(concurrency=100, rate=100.0, share=0.25)
    seconds, made = 20, 0
    for turn in range(1000 * seconds):
        under_way = start(fast, 1, NOW + turn / 1000)
        made += len(under_way)
        answered(fast, under_way, NOW + turn / 1000)
        fast.remove({id(pending) for pending in fast._waiting})
    assert made == pytest.approx(25 * seconds, rel=0.02)


@pytest.mark.parametrize("leap", [5.0, 0.0], ids=["leaps", "stands still"])
def test_a_rate_is_kept_whatever_the_logs_clock_does(leap: float) -> None:
    """It leaps as often as a process reads what was stored before it was set back, and then it is slow."""
    lane, made = a_lane(concurrency=100, rate=20.0), 0
    for turn in range(1000):
        now = NOW + turn * leap
        under_way = start(lane, 1, now, ticks=turn / 100)
        made += len(under_way)
        answered(lane, under_way, now)
        lane.remove({id(pending) for pending in lane._waiting})
    assert made == pytest.approx(10 * 20, abs=2)


def test_a_backlog_comes_back_at_the_pace_of_its_destination() -> None:
    lane = a_lane(rate=10.0)
    assert [due(lane, NOW) for _ in range(100)] == pytest.approx([index / 10 for index in range(100)])


def test_a_delivery_spilled_again_takes_one_place() -> None:
    """Else an outage of a day would put its backlog off for weeks."""
    lane = a_lane(rate=10.0)
    backlog = [NOW + due(lane, NOW) for _ in range(100)]
    longest = 0.0
    for _ in range(10_000):
        now = heapq.heappop(backlog) + 1
        after = due(lane, now, is_retry=True)
        longest = max(longest, after)
        heapq.heappush(backlog, now + after)
    assert longest <= 2 * (100 / 10 + RETURN_BUCKET)


@pytest.mark.parametrize("is_retry", [True, False], ids=["to this worker", "to another, or in memory"])
def test_places_are_over_when_their_time_is(*, is_retry: bool) -> None:
    """Who was promised one may come back to another worker, or end meanwhile."""
    lane = a_lane(rate=10.0)
    for second in range(5000):
        due(lane, NOW + second, is_retry=is_retry)
    assert due(lane, NOW + 5000 + RETURN_BUCKET) < 1


def test_deliveries_spilled_during_slow_responses_return_in_minutes() -> None:
    """By then the destination may be itself again; if it isn't, the lane is full, and they are spilled again."""
    lane = a_lane(concurrency=1)
    for index in range(100):
        answered(
            lane, start(lane, 1, NOW + index), NOW + index, an_attempt(result=Result.SUCCESS, seconds=10.0, status=200)
        )
    after = [due(lane, NOW + 100) for _ in range(10_000)]
    assert max(after) <= MAX_LEARNED_DELAY
    most = max(Counter(map(int, after)).values())
    assert most < 200, "not all at once"


def test_a_rate_is_kept_however_long_it_takes() -> None:
    lane = a_lane(rate=1.0)
    assert max(due(lane, NOW) for _ in range(10_000)) == pytest.approx(9999)
