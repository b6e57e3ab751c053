"""How commands print."""

import json
import re
import sys

import pytest

from gateway.ops.output import Output, body_fields, body_text, hex_dump, json_line, rfc3339
from gateway.telemetry.logs import printable
from tests.telemetry.test_logs import CONTROLS


def test_foreign_control_characters_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output(json=False)
    output.print("a\x1b[31mb", ("c\rd", "bold"))
    output.block("one\n\x1b]0;title\x07two\x9b")
    output.table(["x"], [["\x1b[2J"]])
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "a\\x1b[31mbc\\rd" in out
    assert "one\n\\x1b]0;title\\x07two\\x9b" in out
    assert "\\x1b[2J" in out


def test_each_control_of_a_terminal_or_of_direction_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output(json=False)
    for char in CONTROLS:
        text = f"a{char}b"
        output.print(text, (text, "bold"))
        output.note(text)
        output.fail(text)
        output.table([], [[text]])
        output.block(text)
    captured = capsys.readouterr()
    kept = {"\n", "\t"}  # a block's own
    assert not set(captured.out + captured.err) & (set(CONTROLS) - kept)
    for char in set(CONTROLS) - kept:
        assert f"a{char.encode('unicode_escape').decode()}b" in captured.out


def test_markup_in_a_name_is_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output(json=False)
    output.print("[red]route[/red] :smile:")
    output.table(["name"], [["[bold]x"]])
    out = capsys.readouterr().out
    assert "[red]route[/red] :smile:" in out
    assert "[bold]x" in out


def test_with_json_only_lines_reach_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    output = Output(json=True)
    output.print("for people")
    output.block("for people")
    output.table(["for"], [["people"]])
    output.note("beside")
    output.fail("first\nsecond")
    output.line({"a": "ü", "b": None})
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"a": "ü", "b": None}
    assert captured.err == "beside\nerror: first\nerror: second\n"


def test_a_long_line_is_not_folded_in_a_pipe(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    output = Output(json=False)
    output.print("word " * 100)
    output.fail("word " * 100)
    captured = capsys.readouterr()
    assert captured.out.count("\n") == captured.err.count("\n") == 1


def test_text_is_kept_and_the_rest_escaped() -> None:
    assert printable("plain ü") == "plain ü"
    assert printable("a\tb\n", keep="\n") == "a\\tb\n"
    assert printable("\udcff\u202e") == "\\udcff\\u202e"


def test_a_body_is_shown_as_text_or_as_bytes() -> None:
    assert body_text("ü\n".encode()) == "ü\n"
    assert body_text(b"\xff\x00AB") == "00000000  ff00 4142                                ..AB"
    assert body_text(b"a\0").startswith("00000000  6100")
    assert hex_dump(bytes(17)).splitlines()[1].startswith("00000010  00 ")
    assert body_text(b"") == ""


def test_a_body_in_json_is_text_or_base64() -> None:
    assert body_fields(b"{}") == {"body": "{}"}
    assert body_fields(b"\xff") == {"body_base64": "/w=="}


def test_times_for_scripts_are_in_utc() -> None:
    assert rfc3339(0.25) == "1970-01-01T00:00:00.250Z"


def test_invalid_utf8_in_a_name_is_escaped_in_json() -> None:
    assert json_line({"key": "a\udcff"}) == '{"key": "a\\udcff"}'
    assert json.loads(json_line({"key": "ü"})) == {"key": "ü"}


def test_json_has_nothing_in_it_that_a_terminal_takes_for_an_order() -> None:
    for char in CONTROLS:
        for fields in ({"key": f"a{char}b"}, {"key": f"a{char}b", "lone": "\udcff"}):
            text = json_line(fields)
            assert text.isprintable(), text
            assert json.loads(text) == fields


def test_a_gauge_shows_progress_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with Output(json=False).gauge("reading", 40, begun=10) as show:
        show(20, "7 events, [red]")
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", capsys.readouterr().err)
    assert "20/40 7 events, [red]" in shown


def test_a_gauge_is_silent_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    with Output(json=False).gauge("reading", 40) as show:
        show(40, "7 events")
    assert capsys.readouterr() == ("", "")
