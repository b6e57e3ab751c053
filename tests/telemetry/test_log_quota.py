"""Lines that anybody can cause."""

from gateway.telemetry.log_quota import EACH, KINDS, TOGETHER, LogQuota


def test_the_first_of_each_kind_are_told_and_the_rest_is_counted() -> None:
    quota = LogQuota()
    assert [quota.takes("", "unknown_source") for _ in range(EACH + 3)] == [True] * EACH + [False] * 3
    assert [quota.takes("github", "bad_signature") for _ in range(EACH + 2)] == [True] * EACH + [False] * 2
    assert quota.takes("github", "stale_timestamp")
    assert quota.takes("stripe", "bad_signature")
    assert quota.end() == [("", "unknown_source", 3), ("github", "bad_signature", 2)]
    assert quota.takes("", "unknown_source")
    assert quota.end() == []


def test_many_kinds_fill_no_more_lines_than_one_can_read() -> None:
    quota = LogQuota()
    told = sum(quota.takes(f"s{number}", "bad_signature") for _ in range(EACH) for number in range(1_000))
    assert told == TOGETHER
    left_out = quota.end()
    assert len(left_out) == KINDS + 1
    assert left_out[-1][:2] == ("", "")
    assert told + sum(count for _, _, count in left_out) == 1_000 * EACH
