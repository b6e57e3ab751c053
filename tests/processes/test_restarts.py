"""When a process that has ended by itself is started again, and when all is given up."""

from gateway.processes.restarts import MAX_FAILURES, MAX_WAIT, STEADY, Restarts


def test_each_end_in_a_row_doubles_the_wait_up_to_half_a_minute() -> None:
    restarts, waits = Restarts(), []
    for _ in range(9):
        restarts = restarts.after(1.0)
        waits.append(restarts.wait)
    assert waits == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, MAX_WAIT, MAX_WAIT, MAX_WAIT]


def test_one_that_has_run_for_a_minute_is_started_again_at_once() -> None:
    assert Restarts(7).after(STEADY).wait == 0.5
    assert Restarts(7).after(STEADY - 0.1).in_a_row == 8


def test_all_is_given_up_only_if_none_serves() -> None:
    few, many = Restarts(MAX_FAILURES - 1), Restarts(MAX_FAILURES)
    assert many.is_useless(others_serve=False)
    assert not many.is_useless(others_serve=True)
    assert not few.is_useless(others_serve=False)
    assert not Restarts(1000).is_useless(others_serve=True)
