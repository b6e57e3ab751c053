"""`gateway access check`, as an operator calls it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway.cli import main

Run = Callable[..., tuple[int, str, str]]
FILE = """
sign-in https://gateway.example.com key=${file:session.key}
oidc https://id.example.com client=gateway secret=${OIDC_SECRET} groups=groups
person *@example.com viewer
group sre operator source=github
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GATEWAY_ACCESS", "access.conf")
    monkeypatch.setenv("OIDC_SECRET", "s3cret")
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "session.key").write_text("k" * 32)
    (tmp_path / "access.conf").write_text(FILE)

    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["access", "check", *words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_a_good_file_is_shown_in_the_order_in_which_lines_count(run: Run) -> None:
    code, out, _ = run()
    assert code == 0
    assert "people sign in at https://gateway.example.com, with sessions sealed by a key in a file" in out
    assert "by https://id.example.com, as client gateway" in out
    assert out.index("*@example.com") < out.index("sre")
    assert "github" in out
    assert "s3cret" not in out
    found = [json.loads(line) for line in run("--json")[1].splitlines()]
    assert found[0]["sign_in"] == {
        "address": "https://gateway.example.com",
        "shared_key": True,
        "issuer": "https://id.example.com",
        "client": "gateway",
    }
    assert [(each["kind"], each["name"]) for each in found[1:]] == [("person", "*@example.com"), ("group", "sre")]


def test_all_that_is_wrong_is_told_with_its_line_and_no_secret(run: Run, tmp_path: Path) -> None:
    (tmp_path / "session.key").write_text("short")
    (tmp_path / "access.conf").write_text(FILE.replace("OIDC_SECRET", "OTHER"))
    code, _, err = run()
    assert code == 2
    assert "access.conf:2: key: expected at least 32 characters, got 5" in err
    assert "access.conf:3: secret: expected the environment variable OTHER, got none" in err
    (tmp_path / "access.conf").write_text("sign-in http://gateway.example.com\nuser ada\n")
    code, _, err = run()
    assert code == 2
    assert "access.conf:1: expected an https address" in err
    assert "access.conf:2: unknown kind of line; expected token, person" in err


def test_an_empty_file_gives_nobody_access(run: Run, tmp_path: Path) -> None:
    (tmp_path / "access.conf").write_text("")
    code, out, _ = run()
    assert code == 0
    assert "people sign in on this machine alone" in out
    assert "nobody is given access" in out


def test_without_a_file_there_is_nothing_to_check(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GATEWAY_ACCESS")
    code, _, err = run()
    assert code == 2
    assert "--access: expected the access file, got none" in err
