"""How often repeated occurrences are logged."""

from gateway.telemetry.log_throttle import LogThrottle


def test_the_first_is_logged_at_once_and_the_next_line_counts_the_suppressed() -> None:
    throttle = LogThrottle()
    assert [throttle.count("a", at) for at in (10.0, 10.1, 10.9, 11.0, 11.5, 20.0)] == [1, 0, 0, 3, 0, 2]


def test_each_key_is_logged_separately() -> None:
    throttle = LogThrottle()
    assert [throttle.count(key, 10.0) for key in ("a", "b", "a", "c")] == [1, 1, 0, 1]


def test_a_clock_that_goes_back_silences_nothing() -> None:
    throttle = LogThrottle()
    assert (throttle.count("a", 3600.0), throttle.count("a", 0.0)) == (1, 1)


def test_keys_of_long_ago_are_forgotten() -> None:
    throttle = LogThrottle()
    for number in range(1000):
        throttle.count(number, 100.0 * number)
    assert len(throttle._logged) == 1
