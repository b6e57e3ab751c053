"""`Retry-After` in all its forms, and in none."""

from email.utils import formatdate

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.client.retry_after import RETRY_AFTER_CAP, parse_retry_after

NOW = 1_700_000_000.0


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", 0.0),
        ("120", 120.0),
        (" 120 ", 120.0),
        ("007", 7.0),
        ("86401", RETRY_AFTER_CAP),
        ("9" * 5000, RETRY_AFTER_CAP),
        ("-5", 0.0),
        ("Tue, 14 Nov 2023 22:15:20 GMT", 120.0),
        ("Tuesday, 14-Nov-23 22:15:20 GMT", 120.0),
        ("Tue Nov 14 22:15:20 2023", 120.0),
        ("Sun, 06 Nov 1994 08:49:37 GMT", 0.0),
        ("Sun Nov  6 08:49:37 1994", 0.0),
        ("Fri, 31 Dec 9999 23:59:59 GMT", RETRY_AFTER_CAP),
        ("", None),
        ("soon", None),
        ("1.5", None),
        ("1e3", None),
        ("--5", None),
        ("²", None),
        ("٣", None),
        ("2023-11-14T22:15:20Z", None),
        ("Tue, 14 Nov 2023 22:15:20", None),
        ("Tue, 31 Nov 2023 22:15:20 GMT", None),
    ],
)
def test_retry_after_is_seconds_or_a_date(value: str, seconds: float | None) -> None:
    assert parse_retry_after(value, now=NOW) == seconds


@settings(derandomize=True, deadline=None)
@given(value=st.text() | st.text("0123456789-+:, GMTSunNov"), now=st.floats(0, 4e9))
def test_retry_after_is_never_trusted(value: str, now: float) -> None:
    seconds = parse_retry_after(value, now=now)
    assert seconds is None or 0 <= seconds <= RETRY_AFTER_CAP


@settings(derandomize=True, deadline=None)
@given(now=st.integers(0, 4_000_000_000), ahead=st.integers(-100_000, 100_000))
def test_a_date_is_read_back_as_it_was_written(now: int, ahead: int) -> None:
    value = formatdate(max(0, now + ahead), usegmt=True)
    assert parse_retry_after(value, now=now) == min(max(ahead, 0, -now), RETRY_AFTER_CAP)
