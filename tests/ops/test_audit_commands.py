"""`gateway audit list`, and the commands that it is about, on an embedded log without a gateway."""

import asyncio
import json
import logging
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import structlog

from gateway.cli import main
from gateway.log.embedded.log import EmbeddedLog
from gateway.log.topics import Topics
from gateway.ops.audit import who

TOPICS = Topics()
RULES = """
version: 1
sources:
  github: {verify: {scheme: none}}
destinations:
  ci: {url: "http://127.0.0.1:1/"}
routes:
  - {name: build, from: github, to: ci}
"""
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "220")
    Path("routes.yaml").write_text(RULES)
    handlers, level = logging.root.handlers[:], logging.root.level
    asyncio.run(_create())
    yield tmp_path
    logging.root.handlers[:], logging.root.level = handlers, level
    structlog.reset_defaults()


async def _create(*, without: str = "") -> None:
    log = await EmbeddedLog.open(Path("gateway.db"), owner=True)
    specs = TOPICS.specs([TOPICS.events("github")], has_quarantine=True)
    await log.create([spec for spec in specs if spec.name != without])
    await log.close()


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(list(words))
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_each_act_of_a_command_is_listed_with_who_from_where_and_why(run: Run) -> None:
    assert run("audit", "list")[1] == "nothing\n"
    assert run("destination", "pause", "ci", "--no-wait", "--why", "deploying ci")[0] == 0
    assert run("destination", "kick", "ci", "--no-wait")[0] == 0
    assert run("destination", "resume", "ci", "--no-wait")[0] == 0
    assert run("dead", "drop", "--route", "build", "--reason", "exhausted", "--no-wait", "--yes")[0] == 0
    assert run("dead", "replay", "--all", "--no-wait")[0] == 0
    code, out, _ = run("audit", "list", "--json")
    acts = [json.loads(line) for line in reversed(out.splitlines())]
    assert code == 0
    assert [(act["what"], act["on"], act["outcome"]) for act in acts] == [
        ("pause", "destination/ci", "accepted"),
        ("kick", "destination/ci", "accepted"),
        ("resume", "destination/ci", "accepted"),
        ("dead drop", "--route build --reason exhausted", "accepted"),
        ("dead replay", "--all", "accepted"),
    ]
    assert {(act["who"], act["from"], act["via"], act["proven"]) for act in acts} == {
        (who(), socket.gethostname(), "command", False)
    }
    assert [act["why"] for act in acts] == ["deploying ci", None, None, None, None]
    code, out, _ = run("audit", "list", "--who", who().rpartition("@")[0], "--since", "1h", "--limit", "4")
    assert "(claimed)" in out
    assert "deploying ci" not in out  # the fifth
    assert run("audit", "list", "--who", "somebody else")[1] == "nothing\n"


def test_what_is_only_looked_at_is_no_act(run: Run) -> None:
    run("dead", "drop", "--all", "--dry-run")
    run("dead", "list")
    run("status")
    run("rejected", "list")
    run("rejected", "drop", "--all", "--yes")  # there are none
    run("destination", "resume", "ci", "--no-wait")  # it isn't paused
    assert run("audit", "list")[1] == "nothing\n"


def test_nothing_is_commanded_where_it_cant_be_recorded(run: Run) -> None:
    for name in ("gateway.db", "gateway.db.lock"):
        Path(name).unlink()
    asyncio.run(_create(without=TOPICS.audit))
    code, _, err = run("destination", "pause", "ci", "--no-wait")
    assert code == 1
    assert "error: pause destination/ci: not done, as it can't be recorded who does it: " in err
    assert "`gateway topics create` creates it" in err
    assert "pause" not in run("status")[1]
    assert run("audit", "list")[1] == "nothing\n"


def test_a_reason_cannot_control_a_terminal(run: Run) -> None:
    run("destination", "pause", "ci", "--no-wait", "--why", "\x1b[31mred\u202e")
    _, out, _ = run("audit", "list")
    assert "\x1b" not in out
    assert "\u202e" not in out
