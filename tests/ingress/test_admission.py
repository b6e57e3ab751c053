"""A source's rate and places: what is never exceeded, and who never pays for it."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from gateway.ingress.admission import BURST, Admission
from gateway.model import RefusedError

RATES = (1 / 3600, 1 / 6, 1.0, 3.0, 7.3, 100.0, 10_000.0)


def limited(*, rate: float | None = None, concurrent: int | None = None, now: float = 1000.0) -> Admission:
    admission = Admission()
    admission.set_limits(rate=rate, concurrent=concurrent, now=now)
    return admission


def refused(admission: Admission, now: float) -> RefusedError:
    with pytest.raises(RefusedError) as found:
        admission.enter(now)
    return found.value


@given(
    rate=st.sampled_from(RATES),
    pauses=st.lists(st.floats(0, 30), min_size=1, max_size=80),
    crowd=st.integers(1, 20),
)
def test_a_rate_and_a_burst_are_never_exceeded(rate: float, pauses: list[float], crowd: int) -> None:
    admission, now, taken = limited(rate=rate), 1000.0, list[float]()
    burst = max(1.0, rate * BURST)
    for pause in pauses:
        now += pause / rate / 10
        for _ in range(crowd):
            if admission.refusal(now) is None:
                admission.enter(now)
                taken.append(now)
            else:
                assert refused(admission, now).reason == "rate_limited"
    # Of each two that were taken: not more between them than the burst, and the rate times the time between them.
    least = math.inf
    for number, at in enumerate(taken):
        least = min(least, number - at * rate)
        assert number - at * rate - least + 1 <= burst + 1e-3


@given(rate=st.sampled_from(RATES[:-1]), now=st.floats(0, 1e7), pauses=st.lists(st.floats(0, 0.9), max_size=5))
def test_a_request_that_comes_after_its_retry_after_is_taken(rate: float, now: float, pauses: list[float]) -> None:
    admission = limited(rate=rate, now=now)
    for pause in [0.0, *pauses]:
        now += pause / rate
        while admission.refusal(now) is None:
            admission.enter(now)
        refusal = refused(admission, now)
        assert (refusal.status, refusal.reason) == (429, "rate_limited")
        assert refusal.retry_after is not None
        if refusal.retry_after > 1:  # and not sooner
            assert refused(admission, now + refusal.retry_after - 1.01).reason == "rate_limited"
        now += refusal.retry_after
        admission.enter(now)


def test_a_slow_rate_says_when_to_the_second() -> None:
    admission = limited(rate=10 / 60)  # 10/m
    admission.enter(1000.0)
    assert refused(admission, 1000.0).retry_after == 6
    assert refused(admission, 1003.5).retry_after == 3
    admission.enter(1006.0)


def test_places_are_those_of_requests_in_progress() -> None:
    admission = limited(concurrent=2)
    admission.enter(1000.0)
    admission.enter(1000.0)
    refusal = refused(admission, 1000.0)
    assert (refusal.status, refusal.reason, refusal.retry_after) == (503, "concurrency_limited", None)
    assert admission.in_progress == 2
    admission.leave()
    admission.enter(1000.0)


def test_a_request_without_a_place_takes_no_token() -> None:
    admission = limited(rate=2.0, concurrent=1)
    admission.enter(1000.0)
    assert {refused(admission, 1000.0).reason for _ in range(10)} == {"concurrency_limited"}
    admission.leave()
    admission.enter(1000.0)


def test_a_reload_gives_nothing_back() -> None:
    admission = limited(rate=5.0, concurrent=9)
    for _ in range(5):
        admission.enter(1000.0)
    admission.set_limits(rate=5.0, concurrent=9, now=1000.0)
    assert refused(admission, 1000.0).reason == "rate_limited"
    admission.set_limits(rate=50.0, concurrent=9, now=1000.0)
    assert refused(admission, 1000.0).reason == "rate_limited"
    admission.set_limits(rate=None, concurrent=5, now=1000.0)
    assert refused(admission, 1000.0).reason == "concurrency_limited"
    admission.set_limits(rate=None, concurrent=None, now=1000.0)
    admission.enter(1000.0)
    admission.set_limits(rate=2.0, concurrent=None, now=2000.0)
    admission.enter(2000.0)
    admission.enter(2000.0)
    assert refused(admission, 2000.0).retry_after == 1


class Beside(RuleBasedStateMachine):
    """Two of the same, of which one is asked by requests that are never verified: they fare alike."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 1000.0
        self.alone, self.beside = [limited(rate=3.0, concurrent=4) for _ in range(2)]

    @rule(seconds=st.sampled_from([0.0, 0.1, 1 / 3, 1.0, 60.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(count=st.integers(1, 50))
    def unverified(self, count: int) -> None:
        for _ in range(count):
            self.beside.refusal(self.now)

    @rule()
    def verified(self) -> None:
        results = []
        for admission in (self.alone, self.beside):
            try:
                admission.enter(self.now)
            except RefusedError as error:
                results.append((error.reason, error.retry_after))
            else:
                results.append(("", 0))
        assert results[0] == results[1]

    @precondition(lambda self: self.alone.in_progress)
    @rule()
    def end(self) -> None:
        self.alone.leave()
        self.beside.leave()

    @invariant()
    def places_are_as_many_as_there_are(self) -> None:
        assert 0 <= self.alone.in_progress == self.beside.in_progress <= 4


TestBeside = Beside.TestCase
TestBeside.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
