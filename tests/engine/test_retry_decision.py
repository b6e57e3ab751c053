import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.client.retry_after import RETRY_AFTER_CAP
from gateway.engine.delivery.retry_decision import (
    SHORT_AGE,
    SHORT_ATTEMPTS,
    Retry,
    Verdict,
    classify,
    decide,
    jitter_of,
)
from gateway.model import (
    Attempt,
    DeadLettered,
    DeadReason,
    Delivered,
    Delivery,
    DeliveryId,
    Disposition,
    Dropped,
    Event,
    EventId,
    Result,
)
from gateway.rules.retry_policy import RetryPolicy

NOW = 1_700_000_000.0
STEADY = RetryPolicy(jitter=0.0)


def an_attempt(status: int | Result = 503, *, number: int = 1, at: float = NOW, asked: float | None = None) -> Attempt:
    """An attempt answered with a status, or failed without one."""
    if isinstance(status, Result):
        return Attempt(number=number, at=at, seconds=0.1, result=status, retry_after=asked)
    result = Result.THROTTLED if status == 429 else Result(f"{status // 100}xx")
    return Attempt(number=number, at=at, seconds=0.1, result=result, status=status, retry_after=asked)


def a_delivery(*attempts: Attempt, received_at: float = NOW, since: float = 0.0, name: str = "dlv_1") -> Delivery:
    event = Event(id=EventId("evt_1"), source="s", type="t", received_at=received_at, headers=(), body=b"")
    return Delivery(id=DeliveryId(name), event=event, route="r", destination="d", attempts=attempts, replayed_at=since)


def dead(reason: DeadReason, detail: str) -> DeadLettered:
    return DeadLettered(reason=reason, detail=detail)


def run(policy: RetryPolicy, *statuses: int | Result, asked: float | None = None) -> list[Verdict]:
    """Make attempts, each when it is due and answered at once, the last status repeating, until the delivery ends."""
    delivery, now, verdicts = a_delivery(), NOW, list[Verdict]()
    while True:
        number = len(delivery.attempts) + 1
        attempt = an_attempt(statuses[min(number, len(statuses)) - 1], number=number, at=now, asked=asked)
        verdicts.append(decide(delivery, attempt, policy, now=now))
        if not isinstance(verdicts[-1], Retry):
            return verdicts
        delivery, now = a_delivery(*delivery.attempts, attempt), verdicts[-1].due


@pytest.mark.parametrize(
    ("disposition", "results"),
    [
        (None, [200, 201, 204, 299]),
        (
            Disposition.RETRY,
            [
                *(408, 425, 429, 500, 503, 599),
                *(Result.TIMEOUT, Result.CONNECT, Result.DNS, Result.TLS, Result.TRANSPORT, Result.AUTH),
            ],
        ),
        (Disposition.RETRY_SHORT, [301, 304, 400, 401, 403, 404, 413, 422, 499, Result.EGRESS_REFUSED]),
        (Disposition.DEAD_LETTER, [410]),
    ],
)
def test_every_result_has_a_default(disposition: Disposition | None, results: list[int | Result]) -> None:
    assert {result: classify(an_attempt(result), RetryPolicy()) for result in results} == dict.fromkeys(
        results, disposition
    )


@pytest.mark.parametrize("result", Result)
def test_no_result_is_without_a_disposition(result: Result) -> None:
    """A client that gives no status is in the wrong, but a delivery must end all the same."""
    attempt = Attempt(number=1, at=NOW, seconds=0.1, result=result)
    assert (classify(attempt, RetryPolicy()) is None) == (result is Result.SUCCESS)


def test_a_policy_overrides_by_status_then_class_then_kind() -> None:
    policy = RetryPolicy(
        results=(
            ("4xx", Disposition.DEAD_LETTER),
            ("404", Disposition.DROP),
            ("5xx", Disposition.RETRY_SHORT),
            ("timeout", Disposition.DROP),
            ("410", Disposition.RETRY),
        )
    )
    results: list[int | Result] = [403, 404, 500, Result.TIMEOUT, 410, 302, Result.DNS]
    assert [classify(an_attempt(result), policy) for result in results] == [
        Disposition.DEAD_LETTER,
        Disposition.DROP,
        Disposition.RETRY_SHORT,
        Disposition.DROP,
        Disposition.RETRY,
        Disposition.RETRY_SHORT,
        Disposition.RETRY,
    ]


def test_an_override_of_a_class_leaves_the_default_of_a_status_alone() -> None:
    policy = RetryPolicy(results=(("4xx", Disposition.DROP),))
    assert [classify(an_attempt(status), policy) for status in (429, 408, 425, 410)] == [
        Disposition.RETRY,
        Disposition.RETRY,
        Disposition.RETRY,
        Disposition.DEAD_LETTER,
    ]


def test_a_throttled_status_can_be_overridden_itself() -> None:
    assert classify(an_attempt(429), RetryPolicy(results=(("429", Disposition.DROP),))) is Disposition.DROP


def test_a_2xx_is_delivered_whatever_the_policy_says() -> None:
    policy = RetryPolicy(max_attempts=1, max_age=0, results=(("2xx", Disposition.DROP), ("200", Disposition.RETRY)))
    assert decide(a_delivery(), an_attempt(200), policy, now=NOW + 1e6) == Delivered()


def test_a_body_that_times_out_after_a_200_is_a_timeout() -> None:
    attempt = Attempt(number=1, at=NOW, seconds=10, result=Result.TIMEOUT, status=200)
    verdict = decide(a_delivery(), attempt, RetryPolicy(max_attempts=1), now=NOW)
    assert verdict == dead(DeadReason.EXHAUSTED, "timeout after 1 attempt")


def test_the_schedule_is_followed_and_its_last_step_repeats() -> None:
    *retries, end = run(RetryPolicy(schedule=(5, 30, 120), max_attempts=6, jitter=0.0), 503)
    dues = [retry.due - NOW for retry in retries if isinstance(retry, Retry)]
    assert dues == [5, 35, 155, 275, 395]
    assert end == dead(DeadReason.EXHAUSTED, "503 after 6 attempts")


def test_max_attempts_counts_the_first() -> None:
    assert run(RetryPolicy(max_attempts=1), Result.CONNECT) == [dead(DeadReason.EXHAUSTED, "connect after 1 attempt")]


def test_no_retry_is_scheduled_past_the_age_and_the_failed_attempt_counts() -> None:
    policy = RetryPolicy(schedule=(60,), max_age=100, jitter=0.0)
    assert run(policy, 500)[1:] == [dead(DeadReason.EXPIRED, "500 after 2 attempts")]


def test_a_retry_exactly_at_the_age_is_scheduled() -> None:
    policy = RetryPolicy(schedule=(60,), max_age=60, jitter=0.0)
    assert decide(a_delivery(), an_attempt(), policy, now=NOW) == Retry(due=NOW + 60)


def test_a_replay_begins_a_new_age() -> None:
    delivery = a_delivery(received_at=NOW - 30 * 86400, since=NOW)
    assert decide(delivery, an_attempt(), STEADY, now=NOW) == Retry(due=NOW + 5)


def test_the_default_policy_lasts_three_days() -> None:
    *retries, end = run(STEADY, 503)
    assert end == dead(DeadReason.EXPIRED, "503 after 11 attempts")
    last = retries[-1]
    assert isinstance(last, Retry)
    assert 1.8 * 86400 < last.due - NOW <= 3 * 86400


def test_a_refusal_is_retried_as_long_as_a_bad_deployment_lasts() -> None:
    *retries, end = run(STEADY, 404)
    assert len(retries) == SHORT_ATTEMPTS - 1
    assert end == dead(DeadReason.PERMANENT, "404 after 5 attempts")


def test_a_refusal_is_not_retried_past_the_short_age() -> None:
    policy = RetryPolicy(schedule=(SHORT_AGE / 2 + 1,), jitter=0.0)
    assert run(policy, 404)[1:] == [dead(DeadReason.PERMANENT, "404 after 2 attempts")]


def test_a_refusal_is_bounded_by_the_policy_too() -> None:
    assert run(RetryPolicy(max_attempts=2), 404)[-1] == dead(DeadReason.EXHAUSTED, "404 after 2 attempts")
    policy = RetryPolicy(schedule=(60,), max_age=30, jitter=0.0)
    assert run(policy, 404) == [dead(DeadReason.EXPIRED, "404 after 1 attempt")]


def test_an_outage_does_not_use_up_the_budget_of_refusals() -> None:
    outage = [503] * 8
    policy = RetryPolicy(schedule=(60,), jitter=0.0)
    assert run(policy, *outage, 404)[-1] == dead(DeadReason.PERMANENT, "404 after 13 attempts")
    assert run(policy, *outage, 404, 404, 404, 404, 200)[-1] == Delivered()


def test_a_refusal_long_after_the_event_has_the_whole_budget() -> None:
    delivery = a_delivery(received_at=NOW - 86400)
    assert decide(delivery, an_attempt(404), STEADY, now=NOW) == Retry(due=NOW + 5)


def test_the_attempt_just_made_is_not_counted_twice() -> None:
    attempts = [an_attempt(404, number=number) for number in range(1, SHORT_ATTEMPTS)]
    before, after = a_delivery(*attempts[:-1]), a_delivery(*attempts)
    verdict = decide(before, attempts[-1], STEADY, now=NOW)
    assert isinstance(verdict, Retry)
    assert decide(after, attempts[-1], STEADY, now=NOW) == verdict


def test_a_410_dead_letters_at_once() -> None:
    assert run(STEADY, 410) == [dead(DeadReason.GONE, "410 after 1 attempt")]


def test_an_override_decides_the_end() -> None:
    policy = RetryPolicy(results=(("400", Disposition.DEAD_LETTER), ("409", Disposition.DROP)))
    assert run(policy, 400) == [dead(DeadReason.PERMANENT, "400 after 1 attempt")]
    assert run(policy, 503, 409)[-1] == Dropped(detail="409 after 2 attempts")


@pytest.mark.parametrize(
    ("status", "asked", "delay"),
    [
        (503, 60.0, 60.0),
        (429, 60.0, 60.0),
        (429, 1.0, 5.0),
        (429, 0.0, 5.0),
        (503, -60.0, 5.0),
        (503, 30 * 86400.0, RETRY_AFTER_CAP),
    ],
)
def test_retry_after_lengthens_the_backoff_and_never_shortens_it(status: int, asked: float, delay: float) -> None:
    verdict = decide(a_delivery(), an_attempt(status, asked=asked), STEADY, now=NOW)
    assert verdict == Retry(due=NOW + delay)


def test_a_retry_after_past_the_age_is_the_end() -> None:
    verdict = decide(a_delivery(), an_attempt(503, asked=7200), RetryPolicy(max_age=3600), now=NOW)
    assert verdict == dead(DeadReason.EXPIRED, "503 after 1 attempt")


def test_the_jitter_is_the_same_in_every_process() -> None:
    assert jitter_of(DeliveryId("dlv_1"), 1) == jitter_of(DeliveryId("dlv_1"), 1)
    assert [round(jitter_of(DeliveryId("dlv_1"), number), 6) for number in (1, 2)] == [0.88577, 0.761159]


def test_the_jitter_is_spread_evenly() -> None:
    values = [jitter_of(DeliveryId(f"dlv_{number}"), 1) for number in range(10_000)]
    assert -1 <= min(values) < -0.99
    assert 0.99 < max(values) < 1
    tenths = [sum(low <= 5 * (value + 1) < low + 1 for value in values) for low in range(10)]
    assert all(900 < count < 1100 for count in tenths)


@settings(derandomize=True, deadline=None)
@given(
    number=st.integers(1, 30),
    name=st.text(),
    status=st.sampled_from([302, 404, 408, 410, 429, 500, 503]),
    asked=st.none() | st.floats(-1e9, 1e9),
    late=st.floats(0, 1e6),
)
def test_a_retry_keeps_the_promises(number: int, name: str, status: int, asked: float | None, late: float) -> None:
    policy, now = RetryPolicy(), NOW + late
    verdict = decide(a_delivery(name=name), an_attempt(status, number=number, at=now, asked=asked), policy, now=now)
    if isinstance(verdict, Retry):
        step = policy.schedule[min(number, len(policy.schedule)) - 1]
        longest = max(step * 1.2, asked or 0) if status in {429, 503} else step * 1.2
        assert now + step * 0.8 <= verdict.due <= now + longest
        assert verdict.due <= NOW + policy.max_age
        assert number + 1 <= policy.max_attempts
    else:
        assert isinstance(verdict, DeadLettered)
