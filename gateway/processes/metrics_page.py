"""The metrics of several processes on one page: each series with its process, each family once. Pure.

    # HELP gateway_events_total …            # HELP gateway_events_total …
    gateway_events_total{source="a"} 1   ─▶  gateway_events_total{process="0",source="a"} 1
                                             gateway_events_total{process="1",source="a"} 3

What a process exposes is our own text, or the client library's: each family begins with its HELP.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

_HELP = b"# HELP "
_END = b"# EOF\n"
_LABELLED = re.compile(rb"^([a-zA-Z_:][a-zA-Z0-9_:]*)\{", re.MULTILINE)
_BARE = re.compile(rb"^([a-zA-Z_:][a-zA-Z0-9_:]*) ", re.MULTILINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessState:
    """One of several processes, as its parent sees it: without `pid` it isn't running."""

    number: int
    pid: int | None
    is_ready: bool
    restarts: int


def metrics_page(pages: Mapping[int, bytes], states: Sequence[ProcessState], *, is_open: bool) -> bytes:
    """Return one page of those of the processes that have answered, in their format; `is_open` is OpenMetrics."""
    heads: dict[bytes, bytes] = {}
    series: dict[bytes, list[bytes]] = {}
    for number, page in sorted(pages.items()):
        for name, head, lines in _families(page):
            heads.setdefault(name, head)
            series.setdefault(name, []).append(_of_process(lines, number))
    parts = [part for name, head in heads.items() for part in (head, *series[name])]
    return b"".join([*parts, _of_parent(pages, states, is_open=is_open), _END if is_open else b""])


def _families(page: bytes) -> list[tuple[bytes, bytes, bytes]]:
    """Return each family: its name, its HELP and TYPE (and UNIT), and its series."""
    found = []
    for text in (b"\n" + page.removesuffix(_END)).split(b"\n" + _HELP)[1:]:
        start = 0
        block = _HELP + text.rstrip(b"\n") + b"\n"
        while block.startswith(b"# ", start):
            start = block.index(b"\n", start) + 1
        found.append((text.partition(b" ")[0], block[:start], block[start:]))
    return found


def _of_process(lines: bytes, number: int) -> bytes:
    """Return series with the number of their process."""
    label = b'process="%d"' % number
    return _BARE.sub(rb"\1{" + label + b"} ", _LABELLED.sub(rb"\1{" + label + b",", lines))


def _of_parent(pages: Mapping[int, bytes], states: Sequence[ProcessState], *, is_open: bool) -> bytes:
    """Return the parent's own metrics."""
    restarts = "gateway_process_restarts" if is_open else "gateway_process_restarts_total"
    lines = [
        "# HELP gateway_process_up Whether this process has answered its parent: its series are on this page.",
        "# TYPE gateway_process_up gauge",
        *[f'gateway_process_up{{process="{each.number}"}} {int(each.number in pages)}' for each in states],
        f"# HELP {restarts} Times that this process has ended by itself, and was started again.",
        f"# TYPE {restarts} counter",
        *[f'gateway_process_restarts_total{{process="{each.number}"}} {each.restarts}' for each in states],
    ]
    return "".join([f"{line}\n" for line in lines]).encode()
