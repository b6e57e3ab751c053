"""What the benchmarks take for granted: their events, that all of them arrive, and what a spread is of."""

import hashlib
import hmac
import json
import sys
import zlib
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.figures import Figure
from benchmarks.payload import BODY_BYTES, SECRET, Pushes
from benchmarks.processes import MeasuredProcess
from benchmarks.traffic import Destination


def delivery(commit: bytes, path: bytes = b"/hooks/1") -> bytes:
    body = b'{"ref":"refs/heads/main","after":"%b"}' % commit
    return b"POST %b HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (path, len(body), body)


@pytest.mark.parametrize("size", [BODY_BYTES, 900_000])
def test_each_push_has_a_commit_of_its_own_and_is_signed(size: int) -> None:
    pushes = Pushes(8080, size=size)
    commits = set()
    for _ in range(3):
        commit, request = pushes.next()
        head, _, body = request.partition(b"\r\n\r\n")
        headers = dict([line.split(b": ") for line in head.split(b"\r\n")[1:]])
        assert len(body) == size == int(headers[b"Content-Length"])
        assert json.loads(body)["after"] == commit.decode()
        signature = "sha256=" + hmac.digest(SECRET.encode(), body, hashlib.sha256).hex()
        assert headers[b"X-Hub-Signature-256"].decode() == signature
        commits.add(commit)
    assert len(commits) == 3


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")], ids=["as the gateway", "as the bare pipeline"])
def test_a_process_is_measured_once_it_has_told_its_port(separators: tuple[str, str], tmp_path: Path) -> None:
    line = json.dumps({"event": "listening", "ingress": "http://127.0.0.1:8080"}, separators=separators)
    tells = [sys.executable, "-c", f"import time; print({line!r}, flush=True); time.sleep(60)"]
    with MeasuredProcess("told", tells, tmp_path) as process:
        process.wait_until_it_listens()
        assert process.port == 8080


def test_what_is_delivered_twice_counts_once() -> None:
    commits = [b"%040d" % number for number in range(3)]
    destination = Destination()
    for commit in [*commits, commits[0]]:
        destination.note(delivery(commit), 1.0)
    destination.check(commits)
    assert (destination.received, destination.repeated) == (3, 1)
    assert set(destination.times) == set(commits)


def test_a_round_fails_without_one_of_its_events_or_with_another() -> None:
    commits = [b"%040d" % number for number in range(3)]
    destination = Destination()
    for commit in commits:
        destination.note(delivery(commit), 1.0)
        destination.note(delivery(commit, b"/hooks/2"), 1.0)
    destination.check(commits)
    with pytest.raises(RuntimeError, match=r"/hooks/1: expected 4 events, got 3 of them and 0 others"):
        destination.check([*commits, b"f" * 40])
    destination.forget()
    destination.check(commits)  # nothing has arrived anywhere, which `wait_for` would notice
    destination.note(delivery(b"e" * 40), 1.0)
    with pytest.raises(RuntimeError, match=r"expected 3 events, got 0 of them and 1 others"):
        destination.check(commits)


def test_a_spread_is_of_the_ratios_of_each_round() -> None:
    """Two that slow down together have the same ratio in each round."""
    figure = Figure.of_rounds(section="path", name="x", values=[2.0, 4.0, 9.0], references=[1.0, 2.0, 3.0], unit="µs")
    assert (figure.value, figure.reference, figure.ratio) == (4.0, 2.0, 2.0)
    assert figure.spread == (2.0, 3.0)
    assert Figure.of_rounds(section="path", name="x", values=[2.0, 4.0, 9.0], unit="µs").spread == (2.0, 9.0)


def test_goals_are_for_the_ratio_where_there_is_one() -> None:
    figure = Figure(section="x", name="x", value=90.0, reference=100.0, unit="/s", at_least=0.8)
    assert (figure.is_met, figure.goal) == (True, "≥ 0.8")
    assert replace(figure, value=79.0).is_met is False
    assert replace(figure, at_least=None, at_most=0.8).is_met is False
    assert replace(figure, reference=None, at_least=None, at_most=8000.0).goal == "≤ 8,000"


def test_bodies_of_the_same_size_share_no_more_than_their_shape() -> None:
    """Brokers store batches compressed: what is alike in all bodies would cost nothing there."""
    pushes = Pushes(8080)
    bodies = [pushes.body()[1] for _ in range(500)]
    assert len(zlib.compress(b"".join(bodies))) / len(bodies) > BODY_BYTES / 16
    assert {len(body) for body in bodies} == {BODY_BYTES}
