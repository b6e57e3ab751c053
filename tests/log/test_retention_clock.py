"""When records are old, after a clock was set forward or back."""

from gateway.log.embedded.retention_clock import MAX_STEP, RetentionClock

DAY = 86400.0
NOW = 1_000_000_000.0


def test_a_clock_that_goes_on_is_the_one_that_counts() -> None:
    clock = RetentionClock(NOW, 0.0)
    assert clock.retention_cutoff(7 * DAY, NOW + 30 * DAY + 5.0, 30 * DAY) == NOW + 23 * DAY + 5.0
    assert not clock.stepped_by


def test_a_correction_is_followed() -> None:
    clock = RetentionClock(NOW, 0.0)
    assert clock.retention_cutoff(7 * DAY, NOW + MAX_STEP, 0.0) == NOW + MAX_STEP - 7 * DAY
    assert not clock.stepped_by


def test_what_was_stored_before_a_clock_was_set_is_as_old_as_the_time_that_has_passed() -> None:
    clock = RetentionClock(0.0, 0.0)
    assert clock.retention_cutoff(7 * DAY, NOW, 60.0) == 60.0 - 7 * DAY
    assert clock.stepped_by == NOW - 60.0
    assert clock.retention_cutoff(7 * DAY, NOW + 6.9 * DAY, 6.9 * DAY + 60) == 60 - 0.1 * DAY
    assert clock.retention_cutoff(7 * DAY, NOW + 7 * DAY, 7 * DAY + 60) == NOW
    assert clock.retention_cutoff(30 * DAY, NOW + 7 * DAY, 7 * DAY + 60) == 60 - 23 * DAY, (
        "each topic has its own retention"
    )
    assert clock.stepped_by == NOW - 60.0


def test_a_clock_that_is_set_forward_twice_is_followed_a_retention_after_the_second_time() -> None:
    clock = RetentionClock(NOW, 0.0)
    clock.retention_cutoff(7 * DAY, NOW + DAY, 0.0)
    assert clock.retention_cutoff(7 * DAY, NOW + 10 * DAY, DAY) == NOW - 6 * DAY
    assert clock.stepped_by == 9 * DAY
    assert clock.retention_cutoff(7 * DAY, NOW + 17 * DAY, 8 * DAY) == NOW + 10 * DAY


def test_a_clock_that_was_set_forward_stays_so_in_the_next_process() -> None:
    former = RetentionClock(NOW, 0.0)
    former.retention_cutoff(7 * DAY, NOW + 9 * DAY, 0.0)
    clock = RetentionClock(NOW + 10 * DAY, 500.0, stepped_at=former.stepped_at, stepped_by=former.stepped_by)
    assert clock.retention_cutoff(7 * DAY, NOW + 15.9 * DAY, 5.9 * DAY + 500.0) == NOW - 0.1 * DAY
    assert clock.stepped_by == 9 * DAY
    assert clock.retention_cutoff(7 * DAY, NOW + 16 * DAY, 6 * DAY + 500.0) == NOW + 9 * DAY


def test_a_clock_that_was_set_back_between_two_processes_is_followed() -> None:
    clock = RetentionClock(NOW + DAY, 0.0, stepped_at=NOW + 9 * DAY, stepped_by=9 * DAY)
    assert clock.retention_cutoff(7 * DAY, NOW + 2 * DAY, DAY) == NOW - 5 * DAY
    assert not clock.stepped_by


def test_a_clock_that_is_set_back_is_followed_at_once() -> None:
    clock = RetentionClock(NOW, 0.0)
    assert clock.retention_cutoff(7 * DAY, NOW - 30 * DAY, 60.0) == NOW - 37 * DAY
    assert clock.retention_cutoff(7 * DAY, NOW + 60.0, 120.0) == NOW + 60.0 - 7 * DAY
    assert not clock.stepped_by
