"""No text that somebody writes reaches the CEL library's parser unless it can take it, wherever it is written.

Some of them would end this process, so another one compiles them.
"""

import os
import subprocess
import sys
from pathlib import Path

import orjson
import pytest

from gateway.model import ExpressionError
from gateway.rules.cel_compiler import MAX_DEPTH, MAX_EDIT, MAX_TEXT, compiled, compiled_edit
from gateway.rules.expressions import Expression

ROOT = Path(__file__).parents[2]
LONG = "body" + ".a" * 20_000
"""A text with which the library overflows the C stack."""
WIDE = "(" * 70_000
"""A text with which the library panics: it can't print a position that far."""
TOLD = f"expected at most {MAX_TEXT} characters, got "

COMPILES = """
import sys
import orjson
from gateway.rules.templates import Template, TemplateError

for value in orjson.loads(sys.stdin.buffer.read()):
    try:
        Template(value)
    except TemplateError as error:
        print(orjson.dumps([[*each.path, each.message] for each in error.mistakes]).decode())
"""


def child(*words: str, given: bytes = b"") -> tuple[int, str, str]:
    """Run Python with these words; return its exit status, output and errors."""
    done = subprocess.run(
        [sys.executable, *words],
        input=given,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        check=False,
        timeout=60,
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@pytest.mark.parametrize("text", [LONG, WIDE, f"[{'1,' * 20_000}]"], ids=["long", "wide", "list"])
def test_a_template_refuses_what_is_too_long_wherever_it_is(text: str) -> None:
    written = f"${{{{ {text} }}}}"
    within = {"for": "body.l", "as": "i"}
    templates = [
        written,
        {"a": [written]},
        {**within, "do": written},
        {**within, "do": {"b": written}},
        {**within, "do": {"for": text, "as": "j", "do": "x"}},
        {"for": text, "as": "i", "do": "x"},
        {"for": "body.l", "as": "2i", "do": written},
        {"for": "body.l", "as": "2i", "do": {"for": text, "as": "j", "do": "x"}},
    ]
    code, out, _ = child("-c", COMPILES, given=orjson.dumps(templates))
    assert code == 0, out
    told = [orjson.loads(line) for line in out.splitlines()]
    places = [(), ("a", 0), ("do",), ("do", "b"), ("do", "for"), ("for",), ("do",), ("do", "for")]
    for mistakes, place in zip(told, places, strict=True):
        assert [*place, f"{TOLD}{len(text)}"] in mistakes, mistakes


RULES = f"""version: 1
sources:
  s: {{verify: {{scheme: none}}}}
destinations:
  d: {{url: 'http://127.0.0.1:1/'}}
routes:
  - name: r
    from: s
    to: d
    request:
      body: {{for: body.l, as: i, do: "${{{{ {LONG} }}}}"}}
"""


def test_check_says_where_an_expression_is_too_long(tmp_path: Path) -> None:
    (tmp_path / "routes.yaml").write_text(RULES)
    code, out, _ = child("-m", "gateway", "check", str(tmp_path / "routes.yaml"))
    assert code == 2
    place, _, message = out.partition(": expected CEL")
    assert place.endswith("routes.yaml:11:38: routes[0].request.body.do")
    assert message.splitlines()[0].endswith(f"{TOLD}{len(LONG)}")


def test_posted_rules_are_refused_with_an_expression_that_is_too_long() -> None:
    asked = """
import sys
from gateway.api.explaining import _posted
from gateway.api.problems import ApiError

try:
    _posted(sys.stdin.read())
except ApiError as error:
    print(error)
"""
    code, out, _ = child("-c", asked, given=RULES.encode())
    assert code == 0
    assert f"{TOLD}{len(LONG)}" in out


def test_the_longest_texts_compile_and_so_do_all_their_edits() -> None:
    """An edit adds much to a text, but not to the parts by which the library's calls nest."""
    for unit in ("size(body.a)+", "body.items.map(i,i)+", "1+", "body.a.exists(i,i.b.all(j,j.c))||"):
        text = unit * (MAX_TEXT // len(unit))
        text = text[:-1] if unit[-1] == "+" else text[:-2]
        edited = Expression(text)._semantics
        for each in edited.texts:
            compiled_edit(each)


def test_what_becomes_too_long_by_edits_is_refused_before_it_is_compiled() -> None:
    """Nothing else runs in the process while the library compiles: half a second for the first of these."""
    for unit in ("default(i.a.b.c.d.e.f.g.h, 1),", "i.exists(j,j.all(k,k)),"):
        items = unit * (4000 // len(unit))
        with pytest.raises(ExpressionError, match=rf"^expected at most {MAX_EDIT:,} characters with what default"):
            Expression(f"body.items.map(i, [{items}1])")


def test_a_panic_of_the_library_is_an_error_of_the_text() -> None:
    with pytest.raises(ExpressionError, match=r"^syntax error: expected CEL, got text at which its parser fails$"):
        compiled_edit(WIDE)


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("(" * 200 + "1" + ")" * 200, " at character 97"),
        ("true?1:" * 200 + "1", " at character 673"),
        ("body" + ".size()" * 300, ""),  # nested by an edit, whose positions would say nothing
    ],
)
def test_what_is_nested_too_deeply_is_told_without_the_librarys_words(text: str, where: str) -> None:
    with pytest.raises(ExpressionError) as caught:
        Expression(text)
    assert str(caught.value) == f"syntax error{where}: nested too deeply: expected at most {MAX_DEPTH} levels, got more"


@pytest.mark.parametrize("name", [KeyboardInterrupt, SystemExit])
def test_what_isnt_the_librarys_passes(name: type[BaseException], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: str) -> None:
        raise name

    monkeypatch.setattr("cel.compile", interrupted)  # a signal that comes while the library parses
    with pytest.raises(name):
        compiled("1")
