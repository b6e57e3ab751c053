"""Lines that anybody can cause."""

from gateway.telemetry.log_quota import IN_ALL, MAX_KINDS, PER_KIND, LogQuota


def test_the_first_of_each_kind_are_logged_and_the_rest_is_counted() -> None:
    quota = LogQuota()
    assert [quota.take("", "unknown_source") for _ in range(PER_KIND + 3)] == [True] * PER_KIND + [False] * 3
    assert [quota.take("github", "bad_signature") for _ in range(PER_KIND + 2)] == [True] * PER_KIND + [False] * 2
    assert quota.take("github", "stale_timestamp")
    assert quota.take("stripe", "bad_signature")
    assert quota.next_window() == [("", "unknown_source", 3), ("github", "bad_signature", 2)]
    assert quota.take("", "unknown_source")
    assert quota.next_window() == []


def test_many_kinds_fill_no_more_lines_than_one_can_read() -> None:
    quota = LogQuota()
    logged = sum(quota.take(f"s{number}", "bad_signature") for _ in range(PER_KIND) for number in range(1_000))
    assert logged == IN_ALL
    suppressed = quota.next_window()
    assert len(suppressed) == MAX_KINDS + 1
    assert suppressed[-1][:2] == ("", "")
    assert logged + sum(count for _, _, count in suppressed) == 1_000 * PER_KIND
