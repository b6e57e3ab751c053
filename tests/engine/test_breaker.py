import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gateway.engine.delivery.breaker import Breaker, BreakerPolicy, State
from gateway.model import Result

FAILURES = (Result.SERVER_ERROR, Result.TIMEOUT, Result.CONNECT, Result.DNS, Result.TLS, Result.TRANSPORT, Result.AUTH)
ANSWERS = (
    Result.SUCCESS,
    Result.REDIRECT,
    Result.CLIENT_ERROR,
    Result.UNAUTHORIZED,
    Result.THROTTLED,
    Result.EGRESS_REFUSED,
)


def an_open_breaker(now: float = 0.0) -> Breaker:
    breaker = Breaker()
    record(breaker, *[Result.TIMEOUT] * 5, now=now)
    assert state_of(breaker) is State.OPEN
    return breaker


def state_of(breaker: Breaker) -> State:
    """Read the state as it is now: a type checker takes an attribute that it has seen once for unchanged."""
    return breaker.state


def record(breaker: Breaker, *results: Result, now: float = 0.0) -> None:
    """Make attempts one after the other."""
    for result in results:
        breaker.started(now)
        breaker.record(result, now)


def test_every_result_is_a_failure_or_an_answer() -> None:
    assert set(FAILURES) | set(ANSWERS) == set(Result)


def test_a_new_breaker_allows_everything() -> None:
    breaker = Breaker()
    assert breaker.allows(0.0, 10_000)
    assert not breaker.is_open
    assert breaker.retry_at(7.0) == 7.0


@pytest.mark.parametrize("result", FAILURES)
def test_five_failures_in_a_row_open_it(result: Result) -> None:
    breaker = Breaker()
    record(breaker, *[result] * 4)
    assert state_of(breaker) is State.CLOSED
    record(breaker, result)
    assert state_of(breaker) is State.OPEN
    assert breaker.is_open
    assert not breaker.allows(4.9, 0)
    assert breaker.retry_at(1.0) == 5.0


@pytest.mark.parametrize("result", ANSWERS)
def test_an_answer_ends_the_row_of_failures(result: Result) -> None:
    breaker = Breaker()
    record(breaker, *[Result.CONNECT] * 4, result, *[Result.CONNECT] * 4)
    assert state_of(breaker) is State.CLOSED


@pytest.mark.parametrize("result", ANSWERS)
def test_a_storm_of_answers_never_opens_it(result: Result) -> None:
    breaker = Breaker()
    for second in range(1000):
        record(breaker, result, now=second / 10)
    assert state_of(breaker) is State.CLOSED


def test_half_of_twenty_results_failing_open_it() -> None:
    breaker = Breaker()
    record(breaker, *[Result.SUCCESS, Result.TIMEOUT] * 9, Result.SUCCESS)
    assert state_of(breaker) is State.CLOSED
    record(breaker, Result.TIMEOUT)
    assert state_of(breaker) is State.OPEN


def test_less_than_half_failing_does_not() -> None:
    breaker = Breaker()
    for second in range(1000):
        record(breaker, Result.SUCCESS, Result.TIMEOUT, Result.SUCCESS, now=second / 10)
    assert state_of(breaker) is State.CLOSED


def test_failures_older_than_the_window_are_forgotten() -> None:
    breaker = Breaker()
    for start in range(0, 300, 30):
        record(breaker, *[Result.SUCCESS, Result.TIMEOUT] * 9, now=float(start))
    assert state_of(breaker) is State.CLOSED


def test_the_window_slides() -> None:
    breaker = Breaker()
    record(breaker, *[Result.SUCCESS] * 100, now=0.0)
    record(breaker, *[Result.TIMEOUT, Result.SUCCESS] * 10, now=24.0)
    assert state_of(breaker) is State.CLOSED
    record(breaker, Result.TIMEOUT, now=31.0)
    assert state_of(breaker) is State.OPEN


def test_a_probe_that_fails_doubles_the_open_time_up_to_five_minutes() -> None:
    breaker, now, waited = an_open_breaker(), 0.0, list[float]()
    for _ in range(9):
        waited.append(breaker.retry_at(now) - now)
        now = breaker.retry_at(now)
        assert breaker.allows(now, 0)
        record(breaker, Result.CONNECT, now=now)
        assert state_of(breaker) is State.OPEN
    assert waited == [5, 10, 20, 40, 80, 160, 300, 300, 300]


def test_one_probe_at_a_time_while_half_open() -> None:
    breaker = an_open_breaker()
    breaker.started(5.0)
    assert state_of(breaker) is State.HALF_OPEN
    assert breaker.is_open
    assert not breaker.allows(5.0, 1)
    assert breaker.retry_at(5.0) == 10.0
    breaker.record(Result.SUCCESS, 5.1)
    assert breaker.allows(5.1, 0)


def test_a_cancelled_probe_frees_its_place() -> None:
    breaker = an_open_breaker()
    breaker.started(5.0)
    assert breaker.allows(5.5, 0)
    assert breaker.is_open


def test_attempts_from_before_it_opened_are_waited_for_and_change_nothing() -> None:
    breaker = Breaker()
    for _ in range(8):
        breaker.started(0.0)
    for _ in range(5):
        breaker.record(Result.TIMEOUT, 10.0)
    assert not breaker.allows(15.0, 3)
    assert breaker.retry_at(15.0) > 15.0
    breaker.record(Result.TIMEOUT, 15.0)
    breaker.record(Result.TIMEOUT, 15.0)
    breaker.record(Result.SUCCESS, 15.0)
    assert state_of(breaker) is State.OPEN
    assert breaker.allows(15.0, 0)


@pytest.mark.parametrize("result", ANSWERS)
def test_three_answers_close_it_with_a_slow_start(result: Result) -> None:
    breaker = an_open_breaker()
    record(breaker, result, result, now=5.0)
    assert state_of(breaker) is State.HALF_OPEN
    record(breaker, result, now=5.0)
    assert state_of(breaker) is State.RECOVERING
    assert not breaker.is_open
    assert breaker.allows(5.0, 0)
    assert not breaker.allows(5.0, 1)


def test_the_three_answers_are_in_a_row() -> None:
    breaker = an_open_breaker()
    record(breaker, Result.SUCCESS, Result.SUCCESS, Result.TIMEOUT, now=5.0)
    record(breaker, Result.SUCCESS, Result.SUCCESS, now=15.0)
    assert state_of(breaker) is State.HALF_OPEN


def test_the_slow_start_doubles_the_concurrency_with_each_round_trip() -> None:
    breaker = an_open_breaker()
    record(breaker, *[Result.SUCCESS] * 3, now=5.0)
    rounds = []
    while state_of(breaker) is State.RECOVERING:
        in_flight = 0
        while breaker.allows(5.0, in_flight):
            breaker.started(5.0)
            in_flight += 1
        rounds.append(in_flight)
        for _ in range(in_flight):
            breaker.record(Result.SUCCESS, 5.0)
    assert rounds == [1, 2, 4, 8, 16, 32]
    assert breaker.allows(5.0, 10_000)


def test_a_relapse_in_the_slow_start_keeps_doubling_the_open_time() -> None:
    breaker = an_open_breaker()
    record(breaker, *[Result.SUCCESS] * 3, *[Result.TIMEOUT] * 4, now=5.0)
    assert state_of(breaker) is State.RECOVERING
    record(breaker, Result.TIMEOUT, now=5.0)
    assert state_of(breaker) is State.OPEN
    assert breaker.retry_at(5.0) == 15.0


def test_a_recovery_forgets_the_open_time() -> None:
    breaker = an_open_breaker()
    record(breaker, Result.TIMEOUT, now=5.0)
    record(breaker, *[Result.SUCCESS] * 70, now=15.0)
    assert state_of(breaker) is State.CLOSED
    record(breaker, *[Result.TIMEOUT] * 5, now=20.0)
    assert breaker.retry_at(20.0) == 25.0


def test_a_kick_allows_a_probe_at_once() -> None:
    breaker = an_open_breaker()
    record(breaker, Result.CONNECT, now=5.0)
    breaker.kick()
    assert not breaker.holds_back(5.1)
    assert not breaker.allows(5.1, 1), "what is under way is waited for"
    assert breaker.allows(5.1, 0)
    breaker.started(5.1)
    assert not breaker.allows(5.1, 1)
    assert breaker.is_open


def test_a_kick_resets_the_open_time() -> None:
    breaker, now = an_open_breaker(), 0.0
    for _ in range(9):
        now = breaker.retry_at(now)
        record(breaker, Result.CONNECT, now=now)
    breaker.kick()
    waited = list[float]()
    for _ in range(3):
        record(breaker, Result.CONNECT, now=now)
        waited.append(breaker.retry_at(now) - now)
        now = breaker.retry_at(now)
    assert waited == [5, 10, 20]


def test_a_kick_during_a_probe_shortens_the_next_open_time() -> None:
    breaker = an_open_breaker()
    breaker.started(5.0)
    breaker.kick()
    breaker.record(Result.TIMEOUT, 35.0)
    assert breaker.retry_at(35.0) == 40.0


def test_a_kick_of_a_closed_breaker_changes_nothing() -> None:
    breaker = Breaker()
    record(breaker, *[Result.CONNECT] * 4)
    breaker.kick()
    assert state_of(breaker) is State.CLOSED
    record(breaker, Result.CONNECT)
    assert breaker.retry_at(0.0) == 5.0


def test_a_look_at_the_clock_from_before_the_failure_is_no_reason_for_a_probe() -> None:
    """Whoever works through what has become due asks by the time at which that began."""
    breaker = an_open_breaker(now=100.0)
    assert not breaker.allows(99.99, 0)
    assert breaker.holds_back(99.99)
    breaker.started(99.99)
    breaker.record(Result.CONNECT, 100.01)
    assert breaker.retry_at(100.02) == 105.0, "the first open time still"


def test_a_clock_that_steps_back_does_not_prolong_the_wait() -> None:
    breaker = an_open_breaker(now=10_000.0)
    assert breaker.allows(6_400.0, 0)


def test_a_clock_that_steps_back_leaves_the_window_working() -> None:
    breaker = Breaker()
    record(breaker, *[Result.SUCCESS] * 1000, now=10_000.0)
    record(breaker, *[Result.SUCCESS, Result.TIMEOUT] * 10, now=6_400.0)
    assert state_of(breaker) is State.OPEN


def test_a_policy_can_be_stricter() -> None:
    breaker = Breaker(BreakerPolicy(consecutive_failures=1, open_time=1.0, probes=1, slow_start=1))
    record(breaker, Result.TIMEOUT, now=0.0)
    assert breaker.retry_at(0.0) == 1.0
    record(breaker, Result.SUCCESS, Result.SUCCESS, now=1.0)
    assert state_of(breaker) is State.CLOSED


class DestinationBehindABreaker(RuleBasedStateMachine):
    """A lane that starts what the breaker allows, before a destination that does what it likes."""

    def __init__(self) -> None:
        super().__init__()
        self.breaker = Breaker()
        self.now = 0.0
        self.in_flight = 0
        self.failures_in_a_row = 0
        self.opened_at = 0.0
        self.interval = 0.0
        self.probes_failed: list[float] = []

    @rule(seconds=st.sampled_from([0.001, 0.1, 1.0, 4.9, 5.0, 30.0, 300.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(wanted=st.integers(1, 80))
    def start(self, wanted: int) -> None:
        was_open, before = self.breaker.is_open, self.in_flight
        for _ in range(wanted):
            if not self.breaker.allows(self.now, self.in_flight):
                break
            self.breaker.started(self.now)
            self.in_flight += 1
        if was_open:
            assert self.in_flight <= max(before, 1), "one probe at most"
        if was_open and self.in_flight > before:
            assert self.breaker.state is State.HALF_OPEN
            assert self.now >= self.opened_at + self.interval, "one probe per interval"

    @precondition(lambda self: self.in_flight)
    @rule(result=st.sampled_from(Result), times=st.integers(1, 25))
    def end(self, result: Result, times: int) -> None:
        for _ in range(min(times, self.in_flight)):
            before = self.breaker.state
            self.in_flight -= 1
            self.breaker.record(result, self.now)
            if before is not State.OPEN and self.breaker.state is State.OPEN:
                assert result in FAILURES, "only a failure opens it"
                self.interval = self.breaker.retry_at(self.now) - self.now
                self.opened_at = self.now
            if before is State.HALF_OPEN and result in FAILURES:
                assert self.breaker.state is State.OPEN

    @rule()
    def kick(self) -> None:
        before = self.breaker.state
        self.breaker.kick()
        assert self.breaker.state is before
        self.interval = 0.0

    @precondition(lambda self: self.in_flight)
    @rule()
    def cancel(self) -> None:
        before = self.breaker.state
        self.in_flight -= 1
        assert self.breaker.state is before

    @precondition(lambda self: self.breaker.state is not State.CLOSED)
    @rule()
    def recover(self) -> None:
        """From any state, a destination that answers is closed again after its open time and the slow start."""
        while self.in_flight:
            self.in_flight -= 1
        if self.breaker.state is State.OPEN and not self.breaker.allows(self.now, 0):
            assert self.breaker.retry_at(self.now) - self.now <= self.breaker.policy.max_open_time
            self.now = self.breaker.retry_at(self.now)
        answers = 0
        while self.breaker.state is not State.CLOSED:
            assert self.breaker.allows(self.now, 0)
            self.breaker.started(self.now)
            self.breaker.record(Result.SUCCESS, self.now)
            answers += 1
        assert answers <= self.breaker.policy.probes + self.breaker.policy.slow_start

    @invariant()
    def open_time_is_within_bounds(self) -> None:
        if self.breaker.state is State.OPEN:
            assert self.breaker.retry_at(self.opened_at) - self.opened_at <= self.breaker.policy.max_open_time

    @invariant()
    def an_idle_destination_is_always_tried_again(self) -> None:
        assert self.breaker.allows(self.breaker.retry_at(self.now), 0)


TestDestinationBehindABreaker = DestinationBehindABreaker.TestCase
TestDestinationBehindABreaker.settings = settings(derandomize=True, deadline=None, max_examples=60)
