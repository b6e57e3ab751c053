from gateway.log.monotonic import MonotonicClock


def test_a_step_back_is_caught_up_with_at_half_speed() -> None:
    clock = MonotonicClock()
    assert clock.advance(1000.0, 0.0) == 1000.0
    assert clock.advance(1000.0 - 3600 + 10, 10.0) == 1005.0
    assert clock.advance(1000.0 - 3600 + 7000, 7000.0) == 4500.0
    assert clock.advance(1000.0 - 3600 + 7300, 7300.0) == 4700.0


def test_a_step_forward_is_followed_at_once() -> None:
    clock = MonotonicClock()
    clock.advance(1000.0, 0.0)
    assert clock.advance(4600.0, 1.0) == 4600.0


def test_threads_that_ask_with_older_ticks_get_no_earlier_time() -> None:
    clock = MonotonicClock()
    assert clock.advance(1000.0, 50.0) == 1000.0
    assert clock.advance(990.0, 40.0) == 1000.0
    assert clock.advance(1010.0, 60.0) == 1010.0
