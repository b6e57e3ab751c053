"""`Retry-After`: how long a destination asks us to wait.

What a delivery does with it is decided in `engine/delivery/retry_decision.py`; for how long its destination gets
nothing, in `engine/delivery/destination_lanes.py`.
"""

from datetime import UTC, datetime
from http import HTTPStatus

THROTTLING = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
"""Statuses with which it counts."""
RETRY_AFTER_CAP = 86400.0
"""Maximum seconds of a Retry-After: a day."""
# RFC 9110 §5.6.7: IMF-fixdate, then the obsolete forms of RFC 850 and asctime.
_HTTP_DATES = ("%a, %d %b %Y %H:%M:%S GMT", "%A, %d-%b-%y %H:%M:%S GMT", "%a %b %d %H:%M:%S %Y")


def parse_retry_after(value: str, *, now: float) -> float | None:
    """Parse a `Retry-After` header (RFC 9110 §10.2.3) as seconds from `now`, 0 to a day; None if it is malformed.

    A past date or a negative number is 0.
    """
    text = value.strip()
    digits = text.removeprefix("-")
    if digits.isascii() and digits.isdigit():
        return 0.0 if digits != text else min(float(digits), RETRY_AFTER_CAP)  # `int` refuses thousands of digits.
    for form in _HTTP_DATES:
        try:
            at = datetime.strptime(text, form).replace(tzinfo=UTC).timestamp()
        except ValueError:
            continue
        return min(max(at - now, 0.0), RETRY_AFTER_CAP)
    return None
