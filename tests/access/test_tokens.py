"""The form of tokens, and what is kept of them."""

import hashlib
import re
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.access.tokens import RANDOM_BYTES, digest_of, is_equal, is_token, token_of

RANDOM = st.binary(min_size=RANDOM_BYTES, max_size=RANDOM_BYTES)


@given(RANDOM)
def test_a_token_has_the_form_that_scanners_look_for_and_its_checksum(random: bytes) -> None:
    token = token_of(random)
    assert re.fullmatch(r"gwt_[0-9A-Za-z]{43}[0-9A-Za-z]{6}", token)
    assert is_token(token)


@given(RANDOM, RANDOM)
def test_no_randomness_is_lost(one: bytes, other: bytes) -> None:
    assert (token_of(one) == token_of(other)) is (one == other)


def test_the_largest_number_fits() -> None:
    assert is_token(token_of(b"\xff" * RANDOM_BYTES))
    assert 62**43 > 2**256


@given(RANDOM, st.integers(4, 52), st.sampled_from("0Az9"))
def test_a_token_with_another_character_is_none(random: bytes, at: int, character: str) -> None:
    token = token_of(random)
    changed = token[:at] + character + token[at + 1 :]
    assert is_token(changed) is (changed == token)


@pytest.mark.parametrize(
    "text", ["", "gwt_", "gwt_" + "0" * 48, "gwt_" + "0" * 50, "ghp_" + "0" * 49, "gwt_" + "é" * 49]
)
def test_what_has_another_form_is_none(text: str) -> None:
    assert not is_token(text)


def test_the_checksum_is_as_documented() -> None:
    text = token_of(bytes(RANDOM_BYTES))
    number, digits = zlib.crc32(text[4:47].encode()), []
    for _ in range(6):
        number, digit = divmod(number, 62)
        digits.append("0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"[digit])
    assert text[47:] == "".join(reversed(digits))


def test_of_a_token_its_digest_is_kept() -> None:
    token = token_of(bytes(range(32)))
    assert digest_of(token) == hashlib.sha256(token.encode()).digest()
    assert is_equal(digest_of(token), digest_of(token))
    assert not is_equal(digest_of(token), digest_of(token + "x"))
