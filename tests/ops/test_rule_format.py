"""`gateway fmt`: another form, the same content, every comment."""

import re
from pathlib import Path

import pytest

from gateway.model import UsageError
from gateway.ops.rule_format import formatted
from gateway.rules.load import load_rules

UGLY = """\
# who\r
version: 1   # the format


sources:
    github:   # the big one
        verify: {scheme: github,  secrets: ['${A}', "${B}"]}  # both while rotating
        key:  string(body.k)


destinations:
  ci: { url: "https://ci.example/" }
# what goes where
routes:
- name:   build
  from: github
  match: {type: push, body.ref: refs/heads/*}
  to:
  - ci
  request:
    body: |
      a   b

      c
      ${{ body.x }}
    headers: {X-N: '01', X-M: "yes"}
  retry: {schedule: [1s, 2m], results: {404: drop}}
"""
NICE = """\
# who
version: 1   # the format

sources:
  github:     # the big one
    verify: {scheme: github, secrets: ['${A}', "${B}"]}       # both while rotating
    key: string(body.k)

destinations:
  ci: {url: "https://ci.example/"}
# what goes where
routes:
  - name: build
    from: github
    match: {type: push, body.ref: refs/heads/*}
    to:
      - ci
    request:
      body: |
        a   b

        c
        ${{ body.x }}
      headers: {X-N: '01', X-M: "yes"}
    retry: {schedule: [1s, 2m], results: {404: drop}}
"""


def test_a_file_is_brought_into_form(tmp_path: Path) -> None:
    (file := tmp_path / "routes.yaml").write_bytes(UGLY.encode())
    assert formatted(file) == NICE
    before = load_rules(file, environ={"A": "a" * 20, "B": "b" * 20}).routes
    file.write_text(NICE)
    assert formatted(file) == NICE
    assert load_rules(file, environ={"A": "a" * 20, "B": "b" * 20}).routes == before


@pytest.mark.parametrize("path", sorted(Path(__file__).parents[2].glob("**/routes*.yaml")), ids=str)
def test_formatting_twice_changes_nothing_and_keeps_each_comment(path: Path, tmp_path: Path) -> None:
    (file := tmp_path / "routes.yaml").write_bytes(path.read_bytes())
    once = formatted(file)
    file.write_text(once)
    assert formatted(file) == once
    comment = re.compile(r"(?:^|\s)#.*$", re.MULTILINE)
    assert [found.strip() for found in comment.findall(once)] == [
        found.strip() for found in comment.findall(path.read_text())
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "routes.yaml:2:1: expected YAML, got a syntax error"),
        ("a: 1\na: 2\n", "routes.yaml:2:1: expected each key once, got 'a' again"),
        ("a: 1\n---\nb: 2\n", "routes.yaml:2:1: expected one document"),
        ("", "routes.yaml:1:1: expected a mapping, got an empty file"),
        ("a: !x 1\n", "routes.yaml:1:4: a: expected no tag but YAML's own"),
    ],
)
def test_what_is_not_rules_is_not_formatted(text: str, message: str, tmp_path: Path) -> None:
    (file := tmp_path / "routes.yaml").write_text(text)
    with pytest.raises(UsageError, match=re.escape(message)):
        formatted(file)
    assert file.read_text() == text


@pytest.mark.parametrize(
    "text",
    [
        "a: yes\nb: 0o17\nc: 0x1F\nd: 1e3\ne: ~\nf: 1.10\ng: 007\nh: +1\ni: .5\n",
        "a: &x {b: 1}\nc: *x\n",
        "---\na: 1\n",
        "a: >\n  folded\n  text\n\n\n  more\n",
        "a: \"x\\u00e9\\n\"\nb: 'it''s'\n",
        "a:\n  # only a comment\n  b: 1   # and one\n# last\n",
        "a: plain text\n  on two lines\n",
        "a: 2027-01-31\nb: 12:30:00\n",
        "? a\n: 1\n",
    ],
)
def test_what_it_says_stays(text: str, tmp_path: Path) -> None:
    (file := tmp_path / "routes.yaml").write_text(text)
    once = formatted(file)  # raises if the content isn't the same
    file.write_text(once)
    assert formatted(file) == once
    assert text.count("#") == once.count("#")


@pytest.mark.parametrize(
    "text",
    [
        "version: 1\nroutes: [\n  # one\n  {name: r},  # two\n  # three\n]\n",
        "# head\n---\nversion: 1\n",
    ],
)
def test_a_comment_that_would_be_lost_is_not(text: str, tmp_path: Path) -> None:
    (file := tmp_path / "routes.yaml").write_text(text)
    once = tried(file)
    is_refused = "expected the same content and comments after formatting" in once
    assert is_refused or re.findall("#.*", once) == re.findall("#.*", text)


def test_a_tab_before_a_comment_is_no_traceback(tmp_path: Path) -> None:
    (file := tmp_path / "routes.yaml").write_text("a: b\t# c\n")
    once = tried(file)
    assert "# c" in once or once.startswith(f"{file}: expected YAML that can be formatted")


def tried(file: Path) -> str:
    """Return a file's text when it is formatted, or why it isn't."""
    try:
        return formatted(file)
    except UsageError as error:
        return str(error)


def test_null_stays_written(tmp_path: Path) -> None:
    (file := tmp_path / "routes.yaml").write_text("a: null\nb: {c: ~}\n")
    assert formatted(file) == "a: null\nb: {c: null}\n"


def test_a_date_that_there_is_not_is_no_traceback(tmp_path: Path) -> None:
    """It is a string for us, and one that `gateway check` refuses where it should be a date."""
    (file := tmp_path / "routes.yaml").write_text("a: 2099-02-30\n")
    assert tried(file).startswith(f"{file}: expected YAML that can be formatted, got: day ")
