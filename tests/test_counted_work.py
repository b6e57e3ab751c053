"""What an event costs, in work that can be counted: no machine is too busy to tell, and 5 % more are noticed.

A change that is worth its cost renews the tables: `python -m tests.counted_work sqlite:///FILE` prints the numbers, and
`python -m tests.counted_work kafka://HOST:PORT`.
"""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import orjson
import pytest

ROOT = Path(__file__).parent.parent
GROWTH = 1.05
"""A number may be so much larger than the table's: it varies by half a percent."""
IS_NEWER = sys.version_info >= (3, 12)
"""aiohttp begins a connection's task at once there, so the event loop has one task and one callback less."""

EMBEDDED: dict[str, float] = {
    "calls of ours": 285,
    "callbacks": 8 if IS_NEWER else 9,
    "futures": 4,
    "statements": 1,
    "system calls": 4,
    "tasks": 1 if IS_NEWER else 2,
    "timers": 3,
}
KAFKA: dict[str, float] = {
    "calls of ours": 291,
    "callbacks": 30 if IS_NEWER else 31,
    "futures": 20,
    "system calls": 8,
    "tasks": 4 if IS_NEWER else 5,
    "timers": 7,
}
CALLS: Mapping[tuple[int, int], tuple[int, int]] = {
    (3, 11): (797, 6170),
    (3, 12): (771, 6120),
    (3, 13): (770, 6100),
}
"""Of all functions, the libraries' too: on the embedded log (with what is done meanwhile) and on Kafka.

Each Python has its own numbers, and those that nobody has counted on aren't here.
"""
KEPT = 1.0
"""Objects of an event that stay: less than one."""


def counted(log: str, prefix: str = "gateway.") -> Mapping[str, float]:
    """Count in a process of its own: this one has what pytest and other tests have brought."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.counted_work", log, prefix],
        capture_output=True,
        check=False,
        cwd=ROOT,
        env=os.environ | {"PYTHONHASHSEED": "0"},
    )
    assert done.returncode == 0, done.stderr.decode()
    found: Mapping[str, float] = orjson.loads(done.stdout)
    return found


def check(found: Mapping[str, float], table: Mapping[str, float]) -> None:
    grown = {name: (found[name], value) for name, value in table.items() if found[name] > GROWTH * value}
    assert not grown, f"expected at most 5 % more than the table has, got (now, table) {grown}, of {found}"


@pytest.mark.timeout(240)
def test_an_event_costs_no_more_work_on_the_embedded_log(tmp_path: Path) -> None:
    found = counted(f"sqlite:///{tmp_path / 'gateway.db'}")
    check(found, EMBEDDED | _calls("calls, mean", 0))
    assert found["objects kept"] < KEPT


@pytest.mark.timeout(240)
def test_an_event_costs_no_more_work_on_kafka(kafka: str) -> None:
    check(counted(f"kafka://{kafka}", "counted."), KAFKA | _calls("calls", 1))


def _calls(name: str, log: int) -> dict[str, float]:
    return {name: found[log]} if (found := CALLS.get(sys.version_info[:2])) else {}
