"""Inputs that nearly fit, for as long as is asked. `make test` draws some hundred of each; `make fuzz` for ten minutes.

Every input is read twice: once by the clock, and once with each allocation of Python's traced, which is slower. Of all
inputs together, memory that Python doesn't allocate is bounded as well, by what the process has resident.

GATEWAY_FUZZ_SECONDS=600 .venv/bin/python -m pytest tests/fuzz -q -s -k decompression
"""

import os
import re
import resource
import sys
import time
import tracemalloc
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

SECONDS = float(os.environ.get("GATEWAY_FUZZ_SECONDS", "0"))
LEEWAY = 64 << 20
"""Bytes by which a process may grow beside what one input takes: Hypothesis, what is loaded late, and fragments."""
ENOUGH_TIME = pytest.mark.timeout(SECONDS + 120)

T = TypeVar("T")


def fuzz(
    name: str,
    inputs: st.SearchStrategy[T],
    check: Callable[[T], None],
    *,
    most_memory: int,
    examples: int = 200,
    is_slow: bool = False,
) -> None:
    """Check so many inputs; or others for SECONDS, and print how many these were.

    No input may take more than `most_memory` bytes at any moment. One that `is_slow` isn't made small if it fails, and
    only some of them are traced.
    """
    count, peak, is_exceeded = 0, 0, False
    resident = _most_resident(begins_anew=True)

    @settings(
        max_examples=(10 * examples if is_slow else 1000) if SECONDS else examples,
        database=None,
        deadline=None,
        phases=(Phase.generate,) if is_slow else (Phase.generate, Phase.shrink),
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example],
    )
    @given(inputs)
    def run(drawn: T) -> None:
        nonlocal count, peak, is_exceeded
        count += 1
        check(drawn)
        if not is_slow or count % 4 == 1 or is_exceeded:  # Hypothesis tries it again
            taken = memory_of(lambda: check(drawn))
            peak, is_exceeded = max(peak, taken), is_exceeded or taken >= most_memory
            assert taken < most_memory, f"expected at most {most_memory} bytes of memory, took {taken}"

    end = time.monotonic() + SECONDS
    run()
    while time.monotonic() < end:
        run()
    grown = _most_resident() - resident
    assert grown < most_memory + LEEWAY, f"{name}: expected at most {most_memory + LEEWAY} bytes more, got {grown}"
    if SECONDS:
        print(f"{name}: {count:,} inputs, {peak >> 10:,} KiB at most")  # noqa: T201 - what ten minutes came to


def memory_of(call: Callable[[], object]) -> int:
    """Return the most memory (bytes) that a call has had at a moment, of what Python allocates."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def took(began: float) -> float:
    """Return the processor time since then (seconds, of `thread_time`); 0 while memory is traced, which is slower."""
    return 0.0 if tracemalloc.is_tracing() else time.thread_time() - began


def _most_resident(*, begins_anew: bool = False) -> int:
    """Return the most bytes that were resident at a moment, since it last began anew: other tests may have had more."""
    if begins_anew:
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # proc_pid_clear_refs(5)
    with suppress(OSError):
        found = re.search(r"^VmHWM:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
        if found is not None:
            return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


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
