"""When a log, or one of its partitions, counts as refusing appends, by what fails and by what the brokers say."""

from collections.abc import Collection, Mapping

import pytest

from gateway.log.base import Partition
from gateway.log.kafka.append_failures import MIN_FAILURE_AGE, PARTITION_MAX_AGE, UNEXPLAINED_MAX_AGE, AppendFailures

ONE, OTHER = Partition("t", 0), Partition("t", 1)
WELL, ILL, PARTLY = {ONE: True, OTHER: True}, {ONE: False, OTHER: False}, {ONE: False, OTHER: True}
NOTHING: Mapping[Partition, bool] = {}
LATER = UNEXPLAINED_MAX_AGE + 1


def problem(failures: AppendFailures, accepting: Mapping[Partition, bool], now: float, *missing: str) -> str | None:
    failure = failures.lasting(now)
    return None if failure is None else failures.reason(failure, accepting, missing, now)


@pytest.mark.parametrize(
    ("accepting", "missing", "now", "is_refusing", "is_forgotten"),
    [
        pytest.param(ILL, [], MIN_FAILURE_AGE / 2, False, False, id="another partition may accept appends"),
        pytest.param(ILL, [], 1.0, True, False, id="the brokers confirm it"),
        pytest.param(ILL, [], LATER, True, False, id="and do so for as long as it lasts"),
        pytest.param(PARTLY, [], 1.0, False, False, id="one partition stops no other"),
        pytest.param(WELL, [], 1.0, True, False, id="the reason is none that brokers know"),
        pytest.param(WELL, [], LATER, False, True, id="which is forgotten"),
        pytest.param(NOTHING, [], 1.0, True, False, id="brokers were asked of nothing"),
        pytest.param(NOTHING, [], LATER, False, True, id="and of nothing they confirm nothing"),
        pytest.param(ILL, ["t"], 1.0, False, True, id="a missing topic is no fault of the log"),
    ],
)
def test_a_log_refuses_appends_while_brokers_confirm_it_or_for_a_while(
    accepting: Mapping[Partition, bool], missing: Collection[str], now: float, *, is_refusing: bool, is_forgotten: bool
) -> None:
    failures = AppendFailures()
    failures.failed("t", "no response", 0.0)
    assert problem(failures, accepting, now, *missing) == ("no response" if is_refusing else None)
    assert (failures.lasting(now + 1) is None) == is_forgotten


def test_what_brokers_have_confirmed_ends_as_soon_as_they_say_so() -> None:
    failures = AppendFailures()
    failures.failed("t", "too few replicas", 0.0)
    assert problem(failures, ILL, 1.0) == "too few replicas"
    assert problem(failures, WELL, 2.0) is None
    assert failures.lasting(3.0) is None


def test_an_append_that_succeeds_while_brokers_are_asked_ends_it() -> None:
    failures = AppendFailures()
    failures.failed("t", "no response", 0.0)
    failure = failures.lasting(1.0)
    assert failure is not None
    failures.stored(*ONE)
    assert failures.reason(failure, ILL, (), 1.0) is None


@pytest.mark.parametrize(
    ("accepting", "missing", "now", "is_refusing"),
    [
        pytest.param(PARTLY, [], LATER, True, id="the brokers confirm it"),
        pytest.param(WELL, [], 1.0, True, id="the reason is none that brokers know"),
        pytest.param(WELL, [], PARTITION_MAX_AGE, False, id="which is forgotten"),
        pytest.param(NOTHING, [], 1.0, True, id="nobody answered"),
        pytest.param(PARTLY, ["t"], 1.0, False, id="its topic is missing"),
    ],
)
def test_a_partition_refuses_appends_while_brokers_confirm_it_or_for_a_while(
    accepting: Mapping[Partition, bool], missing: Collection[str], now: float, *, is_refusing: bool
) -> None:
    failures = AppendFailures()
    failures.refused(ONE, "NotEnoughReplicas", 0.0)
    expected = {ONE: "takes no appends: NotEnoughReplicas"} if is_refusing else {}
    assert failures.refusing(accepting, missing, now) == expected
    assert failures.are_of_partitions == is_refusing


def test_where_all_is_refused_no_partition_is_named() -> None:
    failures = AppendFailures()
    failures.failed("t", "too few replicas", 0.0)
    failures.refused(ONE, "too few replicas", 0.0)
    assert failures.refusing(ILL, (), 1.0) == {}


def test_a_partition_that_was_confirmed_accepts_appends_as_soon_as_brokers_say_so() -> None:
    failures = AppendFailures()
    failures.refused(ONE, "NotEnoughReplicas", 0.0)
    assert failures.refusing(PARTLY, (), 1.0)
    assert failures.refusing(NOTHING, (), LATER), "nobody has said so"
    assert not failures.refusing(WELL, (), 2.0)
