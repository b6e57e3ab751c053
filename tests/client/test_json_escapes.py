"""What JSON's escapes in a text stand for, whatever is around them."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.client.json_escapes import outside, unescaped, without_cut_escape

PIECES = [b"\\", b"\\\\", b"\\n", b'\\"', b"\\/", b"\\u", b"\\u00", b"\\u002B", b"\\u005c", b"\\u005Cn", b"0041"]
PIECES += [b"\\ud83d", b"\\uDE00", b"\\ud83d\\ude00", b"u00e9", b"n", b"a", b"\n", b'"', b"\xff"]
PIECES += [bytes(range(128, 256))]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=12).map(b"".join)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_what_a_writer_of_json_escapes_is_read(text: str) -> None:
    for is_ascii in (False, True):
        assert unescaped(json.dumps(text, ensure_ascii=is_ascii)[1:-1].encode()) == text.encode()


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        (b"a\\u002Bb\\u002bc", b"a+b+c"),
        (b"\\u00E9\\uD83D\\ude00", "\u00e9\U0001f600".encode()),
        (b"\\\\u002B", b"\\u002B"),  # a backslash, and four digits
        (b"\\\\\\u002B", b"\\+"),
        (b"\\ud83d \\ude00\\ud83d\\ud83d\\ude00", b"\\ud83d \\ude00\\ud83d" + "\U0001f600".encode()),
        (b"\\x41 \\u00 \\u00g0 \\", b"\\x41 \\u00 \\u00g0 \\"),
        (b"\\u005cu0041", b"\\u0041"),  # once
    ],
)
def test_each_escape_is_read_once_and_what_is_none_stays(text: bytes, meant: bytes) -> None:
    assert unescaped(text) == meant
    every_byte = bytes(range(128, 256))
    assert unescaped(every_byte + text) == every_byte + meant


@given(TEXTS, st.data())
def test_marks_are_those_of_the_escapes_that_stand_for_it(text: bytes, data: st.DataObject) -> None:
    inner = unescaped(text)
    assert outside(text, bytes(len(inner))) == bytes(len(text))
    assert outside(text, b"\1" * len(inner)) == b"\1" * len(text)
    at = data.draw(st.integers(0, len(inner)))
    begins = outside(text, bytes(at) + b"\1" * (len(inner) - at)).find(b"\1")
    assert inner.startswith(unescaped(text[:begins]) if begins >= 0 else inner)


@given(TEXTS, st.data())
def test_a_text_that_is_cut_off_ends_between_two_escapes(text: bytes, data: st.DataObject) -> None:
    cut = text[: data.draw(st.integers(0, len(text)))]
    whole = without_cut_escape(cut)
    assert cut.startswith(whole)
    assert len(cut) - len(whole) < 12
    assert unescaped(text).startswith(unescaped(whole))
