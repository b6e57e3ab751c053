"""The checks that readers get of whatever fuzzes them: that they can fail."""

import pytest
from hypothesis import strategies as st

from tests.fuzz.inputs import fuzz

BOUND = 1 << 20


@pytest.mark.parametrize("is_slow", [False, True])
def test_a_reader_that_takes_too_much_memory_is_found(*, is_slow: bool) -> None:
    def check(size: int) -> None:
        list(range(size * BOUND // 1000))

    fuzz("little", st.integers(0, 20), check, most_memory=BOUND, examples=20, is_slow=is_slow)
    with pytest.raises(AssertionError, match="expected at most 1048576 bytes of memory, took"):
        fuzz("much", st.integers(0, 200), check, most_memory=BOUND, examples=50, is_slow=is_slow)


def test_memory_that_python_does_not_trace_is_found() -> None:
    """Such as what a library in C keeps for itself; whatever was resident before."""
    bytes(400 << 20).replace(b"\0", b"x")
    kept: list[bytes] = []

    def check(_: int) -> None:
        if not kept:
            kept.append(bytes(200 << 20).replace(b"\0", b"x"))  # before anything is traced

    with pytest.raises(AssertionError, match=r"untraced: expected at most \d+ bytes more, got \d+"):
        fuzz("untraced", st.integers(0, 200), check, most_memory=BOUND, examples=5)
