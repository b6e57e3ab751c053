"""Inputs that nearly fit, for as long as is asked. `make test` draws some hundred of each; `make fuzz` for ten minutes.

GATEWAY_FUZZ_SECONDS=600 .venv/bin/python -m pytest tests/fuzz -q -s -k decompression
"""

import os
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

SECONDS = float(os.environ.get("GATEWAY_FUZZ_SECONDS", "0"))
ENOUGH_TIME = pytest.mark.timeout(SECONDS + 120)

T = TypeVar("T")


def fuzz(
    name: str,
    inputs: st.SearchStrategy[T],
    check: Callable[[T], None],
    *,
    examples: int = 200,
    is_slow: bool = False,
) -> None:
    """Check so many inputs; or others for SECONDS, and print how many these were.

    One that `is_slow` isn't made small if it fails.
    """
    count = 0

    @settings(
        max_examples=1000 if SECONDS else examples,
        database=None,
        deadline=None,
        phases=(Phase.generate,) if is_slow else (Phase.generate, Phase.shrink),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    )
    @given(inputs)
    def run(drawn: T) -> None:
        nonlocal count
        count += 1
        check(drawn)

    end = time.monotonic() + SECONDS
    run()
    while time.monotonic() < end:
        run()
    if SECONDS:
        print(f"{name}: {count:,} inputs")  # noqa: T201 - what ten minutes came to


@st.composite
def damaged(draw: st.DrawFn, whole: st.SearchStrategy[bytes], pieces: Sequence[bytes]) -> bytes:
    """Draw an input that is changed in a few places: bytes, pieces put in, parts left out, repeated or moved."""
    data = bytearray(draw(whole))
    for _ in range(draw(st.integers(0, 6))):
        at = draw(st.integers(0, len(data)))
        end = min(len(data), at + draw(st.integers(0, 40)))
        match draw(st.sampled_from(["byte", "piece", "cut", "repeat", "move", "end"])):
            case "byte" if at < len(data):
                data[at] = draw(st.integers(0, 255))
            case "piece":
                data[at:at] = draw(st.sampled_from(pieces))
            case "cut":
                del data[at:end]
            case "repeat":
                data[at:at] = data[at:end] * draw(st.integers(1, 9))
            case "move":
                to = draw(st.integers(0, len(data)))
                data[to:to] = data[at:end]
            case _:
                del data[at:]
    return bytes(data)


def made_of(seeds: Sequence[bytes], pieces: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """Draw one of the seeds, several pieces, or any bytes, damaged."""
    return damaged(
        st.sampled_from(seeds) | st.lists(st.sampled_from(pieces), max_size=12).map(b"".join) | st.binary(max_size=60),
        pieces,
    )
