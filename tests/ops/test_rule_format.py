"""`gateway fmt`: another form, the same content, every comment."""

import re
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from gateway.cli import main
from gateway.model import UsageError
from gateway.ops.rule_format import formatted
from gateway.rules.load import load_rules
from gateway.rules.yaml_document import parse_document

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
  github:   # the big one
    verify: {scheme: github, secrets: ['${A}', "${B}"]}  # both while rotating
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


# ---- What is written stays as it is written ----


def sources_of(text: str) -> list[str]:
    """Return the scalars, anchors, aliases and tags of a text as it has them, but for the indentation of lines."""
    kinds = (yaml.ScalarToken, yaml.AnchorToken, yaml.AliasToken, yaml.TagToken, yaml.DirectiveToken)
    found = [
        text[token.start_mark.index : token.end_mark.index]
        for token in yaml.scan(text, Loader=yaml.CSafeLoader)
        if isinstance(token, kinds)
    ]
    return ["\n".join([re.sub(r"\s+#.*", "", line).strip() for line in each.rstrip().split("\n")]) for each in found]


def checked(text: str, file: Path) -> str:
    """Return a text as it is formatted: what is written is the same, and another time nothing changes."""
    file.write_bytes(text.encode())
    once = formatted(file)  # raises if the content isn't the same, or the comments
    assert sources_of(once) == sources_of(text)
    file.write_bytes(once.encode())
    assert formatted(file) == once
    return once


@pytest.mark.parametrize(
    "text",
    [
        r"""when: "body.x.replace('\u200b', '') == '\u202e\u00a0\u2066\u00ad'" """.rstrip() + "\n",
        '"\\x85": "a"\n"x\\N": "\\L\\P\\_\\e\\/"\n',
        "tests:\nk:\n",
        "a: null\nb: {c: ~, d: , e: }\n",
        "a: &d {b: 1}\nc: &unused 2\n",
        "---\nversion: 1\n",
        "%YAML 1.2\n---\nversion: 1\n",
        "# head\n---\n# second\nversion: 1\n",
        "a: !!str 1\nb: !!seq []\n",
        "a: &x {b: 1}\nc: [*x, *x , &y , &z 1]\nd: {&k e : 1}\n*y : &w\n",
        "? a\n: 1\n? |\n  b\n: - 1\n  - 2\n",
        "x:\n- a\n- - b\n  - c\n- - - d\n",
        "a: |\n  x\n\n\n\nb: |+\n  y\n\n\n\nc: >-\n  z\n    more\n  z\n",
        "a:\n- k: |2\n     two more\n    two\n",
        "a: |2-   # header\n    x\nb: |\n  # no comment\n",
        "a: |\n  no line break at the end",
        "a: 'one\n\n  two'\nb: \"one \\\n  two\"\nc: [plain\n  text, 'x\n  y']\n",
        "a: {\n}\nb: [\n\n\n  1,\n\n\n]\n",
        'a: caf\u00e9 \U0001f600   # \u6ce8\u6587\nb: "\U0001f600"   # x\n',
        "'a' : 1\n\"b\" :   2\nc   :\n  d\n",
    ],
)
def test_scalars_anchors_and_markers_stay_as_they_are_written(text: str, tmp_path: Path) -> None:
    checked(text, tmp_path / "routes.yaml")


def test_an_escape_never_becomes_a_character_that_nobody_sees(tmp_path: Path) -> None:
    text = "when: \"body.x == '\\u202e\\u2066\\u200b\\u00ad\\u00a0\\x85'\"\n"
    assert checked(text, tmp_path / "routes.yaml") == text


@pytest.mark.parametrize(
    ("text", "once"),
    [
        (
            "tests: [ # why\n # one\n    {name: r},  # two\n\n\n  # three\n]\n",
            "tests: [ # why\n  # one\n  {name: r},  # two\n\n  # three\n]\n",
        ),
        (
            "a:\n- match: {\n  x: 1, # one\n    y: [\n 2 # two\n ]}\n",
            "a:\n  - match: {\n      x: 1, # one\n      y: [\n        2 # two\n      ]}\n",
        ),
        ("a: b\t# c\nd:\t  e\n", "a: b  # c\nd: e\n"),
        ("a:   1    # x\nbbb: 2    # y\n", "a: 1      # x\nbbb: 2    # y\n"),
        ("a:\n- b   # x\n- ccc # y\n", "a:\n  - b   # x\n  - ccc # y\n"),
        (
            "r:\n- a: 1\n  # of it\n# of the list\n- b: 2\n# of what follows\ns: 3\n   # end\n",
            "r:\n  - a: 1\n    # of it\n  # of the list\n  - b: 2\n# of what follows\ns: 3\n# end\n",
        ),
        ("a:\n#- x\n    - y\n", "a:\n  #- x\n  - y\n"),
        ("a: |   # header\n     x\n", "a: |   # header\n  x\n"),
    ],
)
def test_comments_stand_where_what_they_are_about_does(text: str, once: str, tmp_path: Path) -> None:
    assert checked(text, tmp_path / "routes.yaml") == once


SCALARS = st.sampled_from(
    (
        *("a", "1", "0x1F", "1.10", "~", "null", "yes", "12:30", "2099-02-30", "https://x.example/a#b", "a b", "-1"),
        *('"\\u200b\\u202e"', '"\\x85"', "'it''s'", '"# no comment"', '""', "' '", "*x", "'\U0001f600'"),
    )
)
SPACES = st.integers(1, 4).map(lambda number: " " * number)


class Writer:
    """Writes YAML as somebody may who knows no rules of form: `draw` decides each step."""

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.comments = 0

    def flag(self) -> bool:
        return self.draw(st.booleans())

    def space(self) -> str:
        return self.draw(SPACES)

    def end(self) -> str:
        """Return the end of a line, and lines of their own after it."""
        text = f"{self.space()}# {self.comment()}" if self.draw(st.integers(0, 3)) == 0 else ""
        text += self.draw(st.sampled_from(("", "", " "))) + "\n"
        for _ in range(self.draw(st.sampled_from((0, 0, 0, 1, 2, 3)))):
            text += self.draw(
                st.sampled_from(("\n", " \n", f"{' ' * self.draw(st.integers(0, 9))}# {self.comment()}\n"))
            )
        return text

    def comment(self) -> int:
        self.comments += 1
        return self.comments

    def flow(self, depth: int) -> str:
        kind = self.draw(st.integers(0, 2 if depth else 0))
        if kind == 0:
            return self.draw(SCALARS)
        items = [self.flow(depth - 1) for _ in range(self.draw(st.integers(0, 3)))]
        if kind == 2:
            items = [f"k{number}:{self.space()}{item}" for number, item in enumerate(items)]
        opening, closing = ("[", "]") if kind == 1 else ("{", "}")
        text = opening
        for number, item in enumerate(items):
            text += self.gap() + item + self.gap() + ("," if number < len(items) - 1 or self.flag() else "")
        return text + self.gap() + closing

    def gap(self) -> str:
        choice = self.draw(st.integers(0, 3))
        return {0: "", 1: " "}.get(choice, self.end() + self.space() if choice == 2 else "")

    def value(self, indent: int, depth: int) -> str:
        """Return what follows a colon or a dash, with the end of its line."""
        kind = self.draw(st.integers(0, 5 if depth else 3))
        anchor = self.draw(st.sampled_from(("", "", f" &a{self.comment()}", " !!str")))
        if kind == 0:
            return self.space() + self.draw(SCALARS) + self.end()
        if kind == 1:
            return self.space() + self.flow(2) + self.end()
        if kind == 2:
            header = self.draw(st.sampled_from(("|", ">", "|-", ">-", "|2", "|+")))
            inner = indent + (2 if "2" in header else self.draw(st.integers(1, 4)))
            lines = self.draw(st.lists(st.sampled_from(("x", "  y", "# z", "")), min_size=1, max_size=4))
            lines = ["first", *lines, "last"]
            return f" {header}\n" + "".join([f"{' ' * inner}{each}\n" if each else "\n" for each in lines])
        if kind == 3:
            return self.end()
        anchor = "" if "!" in anchor else anchor
        ahead = anchor + self.end()
        return ahead + (self.mapping if kind == 4 else self.sequence)(indent + self.draw(st.integers(1, 4)), depth - 1)

    def mapping(self, indent: int, depth: int) -> str:
        number = self.draw(st.integers(1, 3))
        keys = [self.draw(st.sampled_from((f"k{at}", f"'k{at}'", f'"k\\u0061{at}"'))) for at in range(number)]
        return "".join([f"{' ' * indent}{key}:{self.value(indent, depth)}" for key in keys])

    def sequence(self, indent: int, depth: int) -> str:
        return "".join([f"{' ' * indent}-{self.value(indent, depth)}" for _ in range(self.draw(st.integers(1, 3)))])


@st.composite
def documents(draw: st.DrawFn) -> str:
    writer = Writer(draw)
    return "x: &x 1\n" + writer.mapping(0, 3)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(text=documents())
def test_any_document_keeps_what_is_written_and_changes_once(
    text: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_text(text)
    assume(parse_document(str(file), text, []) is not None)
    checked(text, file)


def test_null_stays_written(tmp_path: Path) -> None:
    (file := tmp_path / "routes.yaml").write_text("a: null\nb: {c: ~}\nd:\n")
    assert formatted(file) == "a: null\nb: {c: ~}\nd:\n"


def test_a_date_that_there_is_not_is_a_string(tmp_path: Path) -> None:
    """It is one for us, and `gateway check` refuses it where it should be a date."""
    (file := tmp_path / "routes.yaml").write_text("a: 2099-02-30\n")
    assert formatted(file) == "a: 2099-02-30\n"


def test_files_are_formatted_that_can_be_and_each_other_one_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in {"a": "a: [1", "b": "x:   1\n", "c": "a: 1\na: 2\n"}.items():
        (tmp_path / name).write_text(text)
    assert main(["fmt", *[str(tmp_path / name) for name in "abc"]]) == 2
    assert (tmp_path / "b").read_text() == "x: 1\n"
    printed = capsys.readouterr()
    assert f"error: {tmp_path}/a:2:1: expected YAML" in printed.err
    assert f"error: {tmp_path}/c:2:1: expected each key once" in printed.err
    assert "3 files: 1 changed, 2 not readable" in printed.out
