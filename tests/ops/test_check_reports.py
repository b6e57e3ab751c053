"""`gateway check --strict` and `--format`: what CI systems get, and which warnings comments allow."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import jsonschema
import pytest

from gateway.cli import main
from gateway.ops.check_reports import github, sarif
from gateway.rules.yaml_document import Problem

RULES = """\
version: 1
sources:
  open:
    verify: {scheme: none}%s
destinations:
%s  spare: {url: "https://spare.example/in", rate: 9/s}
  chat: {url: "https://chat.example/in", rate: 9/s}
routes: [{name: told, from: open, to: chat}]
"""
UNVERIFIED = "routes.yaml:4:5"

Check = Callable[..., tuple[int, str]]


@pytest.fixture
def check(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Check:
    """Return a function that checks the rules with comments at the two places, and returns code and output."""
    monkeypatch.chdir(tmp_path)

    def check(*arguments: str, at_end: str = "", above: str = "") -> tuple[int, str]:
        (tmp_path / "routes.yaml").write_text(RULES % (at_end, above))
        code = main(["check", "routes.yaml", *arguments])
        return code, "".join(capsys.readouterr())

    return check


ALLOWED = {
    "at_end": "  # allow unverified: only our own network reaches it",
    "above": "  # allow unused: of the next release\n",
}


def test_warnings_fail_only_where_that_is_asked_for(check: Check) -> None:
    code, told = check()
    assert code == 0
    assert told.count("warning: ") == 2
    assert told.endswith("ok, with 2 warnings\n")
    code, told = check("--strict")
    assert code == 1
    assert told.endswith("2 warnings, which --strict refuses\n")


def test_a_warning_ends_with_the_code_by_which_a_comment_allows_it(check: Check) -> None:
    lines = [line for line in check("--strict")[1].splitlines() if line.startswith("warning: ")]
    assert [line.rpartition(" ")[2] for line in lines] == ["[unverified]", "[unused]"]


def test_a_comment_with_a_reason_allows_a_warning(check: Check) -> None:
    code, told = check("--strict", **ALLOWED)
    assert (code, told) == (0, "routes.yaml: 1 source, 2 destinations, 1 route: ok, 2 warnings allowed\n")


@pytest.mark.parametrize(
    "at_end",
    [
        "  # allow unused: another code",
        "  # unverified: no word",
        "  # allow unverified-things: no code",
        "  #allow",
    ],
)
def test_another_comment_allows_nothing(check: Check, at_end: str) -> None:
    code, told = check("--strict", at_end=at_end, above=ALLOWED["above"])
    assert code == 1
    assert told.count("warning: ") == 1


@pytest.mark.parametrize("at_end", ["  # allow unverified", "  # allow unverified:", "  # allow unverified:   "])
def test_a_comment_without_a_reason_is_told(check: Check, at_end: str) -> None:
    code, told = check("--strict", at_end=at_end, above=ALLOWED["above"])
    assert code == 1
    assert "expected a reason, as in `# allow unverified: why`, got none" in told


def test_one_comment_may_allow_several(check: Check) -> None:
    assert check("--strict", at_end="  # allow weak, unverified: both", above=ALLOWED["above"])[0] == 0


def test_an_error_is_never_allowed(check: Check) -> None:
    code, told = check(at_end="\n    typo: 1  # allow unknown_key: I like it")
    assert code == 2
    assert "error: routes.yaml:5:5: sources.open.typo: unknown key" in told


def test_github_gets_commands_with_places(check: Check) -> None:
    code, told = check("--format", "github")
    assert code == 0
    first, second = told.splitlines()
    assert first.startswith("::warning file=routes.yaml,line=4,col=")
    assert ",title=unverified::sources.open.verify" in first
    assert (
        second
        == "::warning file=routes.yaml,line=6,col=3,title=unused::destinations.spare: no route delivers to 'spare'"
    )
    assert check("--format", "github", "--strict", **ALLOWED) == (0, "")


def test_a_file_whose_name_is_not_utf_8_is_named_by_its_bytes() -> None:
    file = os.fsdecode(b"caf\xe9 1.yaml")
    problems = [Problem(file=file, line=1, column=2, path="", message=f"got {file}", code="value")]
    assert github(problems) == "::error file=caf\\udce9 1.yaml,line=1,col=2,title=value::got caf\\udce9 1.yaml\n"
    (result,) = json.loads(sarif(problems).encode())["runs"][0]["results"]
    assert result["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == "caf%E9%201.yaml"


def test_what_a_command_of_github_means_otherwise_is_escaped() -> None:
    problem = Problem(file="a,b:c%.yaml", line=1, column=2, path="", message="50% of\r\nit: x, y", code="value")
    assert github([problem]) == "::error file=a%2Cb%3Ac%25.yaml,line=1,col=2,title=value::50%25 of%0D%0Ait: x, y\n"
    nowhere = Problem(file="", line=0, column=0, path="destinations.x", message="m", code="egress", severity="warning")
    assert github([nowhere]) == "::warning title=egress::destinations.x: m\n"
    whole = Problem(file="a.yaml", line=0, column=0, path="", message="m", code="document")
    assert github([whole]) == "::error file=a.yaml,title=document::m\n"


SARIF = {
    "type": "object",
    "required": ["version", "runs"],
    "properties": {
        "version": {"const": "2.1.0"},
        "runs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["tool", "results"],
                "properties": {
                    "results": {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "required": ["message"],
                            "properties": {"level": {"enum": ["none", "note", "warning", "error"]}},
                        },
                    }
                },
            },
        },
    },
}
"""The parts of https://docs.oasis-open.org/sarif/sarif/v2.1.0/os/schemas/sarif-schema-2.1.0.json that apply here."""


def test_sarif_has_each_problem_with_its_place(check: Check) -> None:
    code, told = check("--format", "sarif", "--strict")
    assert code == 1
    document = json.loads(told)
    jsonschema.validate(document, SARIF)
    [run] = document["runs"]
    assert [rule["id"] for rule in run["tool"]["driver"]["rules"]] == ["unused", "unverified"]
    _, unused = run["results"]
    assert (unused["ruleId"], unused["level"]) == ("unused", "warning")
    assert unused["message"]["text"] == "destinations.spare: no route delivers to 'spare'"
    assert unused["locations"] == [
        {
            "physicalLocation": {
                "artifactLocation": {"uri": "routes.yaml"},
                "region": {"startLine": 6, "startColumn": 3},
            }
        }
    ]


def test_sarif_of_nothing_is_a_document() -> None:
    document = json.loads(sarif([]))
    jsonschema.validate(document, SARIF)
    assert document["runs"][0]["results"] == []
