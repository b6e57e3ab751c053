"""How much of a header is looked at for signatures, whatever is in it."""

import hashlib
import hmac

import pytest

from gateway.verify.signatures import MAX_ELEMENTS, MAX_LINE_BYTES
from tests.verify.signed_requests import BODY, SECRET, a_request, a_verifier, reason

GOOD = hmac.new(SECRET.encode(), BODY, hashlib.sha256).hexdigest()


@pytest.mark.parametrize(
    ("before", "expected"), [(MAX_ELEMENTS, "accepted"), (MAX_ELEMENTS + 1, "malformed_signature")]
)
def test_elements_beyond_the_64th_are_one_together(before: int, expected: str) -> None:
    """Those that are no signatures count as well: a line of short ones has room for 2,000."""
    assert MAX_ELEMENTS == 64
    line = "a," * before + GOOD
    assert len(line) < MAX_LINE_BYTES
    assert reason(a_verifier(separator=","), a_request([("X-Signature", line)])) == expected


@pytest.mark.parametrize(
    ("length", "expected"), [(MAX_LINE_BYTES, "accepted"), (MAX_LINE_BYTES + 1, "malformed_signature")]
)
def test_a_long_line_of_several_signatures_is_not_divided(length: int, expected: str) -> None:
    assert MAX_LINE_BYTES == 4096
    line = f"{GOOD},".ljust(length, "a")
    assert len(line) == length
    assert reason(a_verifier(separator=","), a_request([("X-Signature", line)])) == expected
