"""`gateway token`, as an operator calls it."""

import fcntl
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from gateway.access.access_file import Grant, read_access
from gateway.access.principal import AccessRole
from gateway.access.tokens import digest_of, is_token
from gateway.cli import main
from gateway.ops.access_tokens import add_token

Run = Callable[..., tuple[int, str, str]]
FILE = Path("access.conf")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GATEWAY_ACCESS", "access.conf")
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["token", *words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def test_a_token_is_shown_once_and_its_digest_is_kept(run: Run) -> None:
    code, out, err = run("new", "deploys", "--role", "operator", "--source", "github", "--owner", "team b")
    token = out.strip()
    assert (code, is_token(token)) == (0, True)
    assert "it isn't shown again" in err
    assert token not in FILE.read_text()
    assert stat.S_IMODE(FILE.stat().st_mode) == 0o600
    (grant,) = read_access(FILE.read_text(), "").tokens
    assert grant == Grant(
        name="deploys",
        role=AccessRole.OPERATOR,
        sources=frozenset({"github"}),
        owners=frozenset({"team b"}),
        digest=digest_of(token),
    )
    for out in (run("list")[1], run("list", "--json")[1], FILE.read_text()):
        assert "deploys" in out
        assert token not in out


def test_json_has_the_token_with_what_it_may(run: Run) -> None:
    found = json.loads(run("new", "ci", "--role", "viewer", "--expires", "90d", "--json")[1])
    assert is_token(found.pop("token"))
    expires = found.pop("expires")
    assert found == {"name": "ci", "role": "viewer", "sources": None, "owners": None}
    (listed,) = [json.loads(line) for line in run("list", "--json")[1].splitlines()]
    assert listed == {**found, "expires": expires}


def test_a_revoked_token_is_gone_and_the_rest_stays_as_it_was_written(run: Run) -> None:
    FILE.write_text("# people\nperson ada@example.com operator   # on call")
    FILE.chmod(0o640)
    run("new", "one", "--role", "viewer")
    run("new", "two", "--role", "viewer")
    assert run("revoke", "one")[0] == 0
    assert [json.loads(line)["name"] for line in run("list", "--json")[1].splitlines()] == ["two"]
    assert run("revoke", "two")[0] == 0
    assert FILE.read_text() == "# people\nperson ada@example.com operator   # on call\n"
    assert stat.S_IMODE(FILE.stat().st_mode) == 0o640
    assert run("list")[1] == "no tokens\n"


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("new", "one", "--role", "viewer"), "expected another name, got 'one', which a token has"),
        (("new", "Ada", "--role", "viewer"), "expected at most 63 lower-case letters"),
        (("new", "ada", "--role", "root"), "invalid choice: 'root'"),
        (("new", "ada"), "--role"),
        (("new", "ada", "--role", "viewer", "--source", "Git Hub"), "expected the name of a source"),
        (("new", "ada", "--role", "viewer", "--owner", " "), "expected a name of printable characters"),
        (("revoke", "two"), "expected the name of a token, got 'two'; its tokens: one"),
    ],
)
def test_what_cant_be_done_is_bad_usage_and_changes_nothing(run: Run, words: tuple[str, ...], problem: str) -> None:
    run("new", "one", "--role", "viewer")
    before = FILE.read_text()
    code, _, err = run(*words)
    assert code == 2
    assert problem in err
    assert FILE.read_text() == before
    assert list(Path().iterdir()) == [FILE]


def test_without_a_file_named_or_readable_it_says_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = run("list")
    assert (code, "access.conf: expected an access file, got: no such file or directory" in err) == (2, True)
    FILE.write_text("nonsense")
    code, _, err = run("new", "one", "--role", "viewer")
    assert (code, "access.conf:1: unknown kind of line; expected token, person" in err) == (2, True)
    assert FILE.read_text() == "nonsense"
    code, _, err = run("new", "one", "--role", "viewer", "--access", "nowhere/access.conf")
    assert (code, "expected a folder that it can be in" in err) == (2, True)
    monkeypatch.delenv("GATEWAY_ACCESS")
    assert "--access: expected the access file, got none" in run("list")[2]


def test_what_a_link_points_to_is_changed(run: Run) -> None:
    Path("real").mkdir()
    FILE.symlink_to("real/tokens.conf")
    assert run("new", "one", "--role", "viewer")[0] == 0
    assert FILE.is_symlink()
    assert "token one viewer" in Path("real/tokens.conf").read_text()


def test_a_file_is_replaced_as_a_whole_or_not_at_all(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    run("new", "one", "--role", "viewer")
    before = FILE.read_text()

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    code, _, err = run("new", "two", "--role", "viewer")
    assert (code, "no space left on device" in err) == (2, True)
    assert FILE.read_text() == before
    assert list(Path().iterdir()) == [FILE]


def test_two_commands_at_once_lose_no_token(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another command's token, written while this one waits for its turn, is in the file that this one changes."""
    flock = fcntl.flock
    grants = [Grant(name=name, role=AccessRole.VIEWER, digest=digest_of(name)) for name in ("one", "two")]

    def late(descriptor: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", flock)
        add_token(folder / FILE, grants[1])
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    add_token(folder / FILE, grants[0])
    assert [each.name for each in read_access(FILE.read_text(), "").tokens] == ["two", "one"]
