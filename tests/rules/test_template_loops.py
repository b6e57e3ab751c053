"""`for`, `as`, `do` and `join` in bodies: a list for a list of the event's."""

import re
import time
from pathlib import Path

import orjson
import pytest
import yaml

from gateway.model import ExpressionError, MissingFieldError
from gateway.rules.event_view import EventView
from gateway.rules.expressions import naming
from gateway.rules.templates import Template, TemplateError
from tests.builders import an_event

BODY = {
    "repo": "acme/app",
    "commits": [
        {"id": "a1", "message": 'say "hi"', "n": 1, "added": ["x.py", "y.py"]},
        {"id": "b2", "message": "line\nbreak", "n": 2.5, "added": [], "by": {"name": "Jo"}},
    ],
    "none": [],
    "pairs": [[1, 2], [3]],
}


def rendered(body: object, event: object = None) -> object:
    return Template(body).render(EventView.of(an_event(body=BODY if event is None else event)))


def loop(items: str, do: object, name: str = "c", **more: object) -> dict[str, object]:
    return {"for": items, "as": name, "do": do, **more}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (loop("body.commits", "${{ c.id }}"), ["a1", "b2"]),
        (loop("body.commits", "${{ c.n }}"), [1, 2.5]),
        (loop("body.commits", "${{ c }}")["do"], "no loop"),
        (
            {"l": loop("body.commits", {"a": "${{ c.id }} of ${{ body.repo }}", "b": True})},
            {"l": [{"a": "a1 of acme/app", "b": True}, {"a": "b2 of acme/app", "b": True}]},
        ),
        (loop("body.commits", "${{ c.id }}: ${{ c.message }}", join="; "), 'a1: say "hi"; b2: line\nbreak'),
        (loop("body.commits", "${{ c.n }}", join="+"), "1+2.5"),
        (loop("body.commits", {"id": "${{ c.id }}"}, join=","), '{"id":"a1"},{"id":"b2"}'),
        (loop("body.none", "${{ c.no.such.field }}"), []),
        (loop("body.none", "x", join=","), ""),
        (loop("body.commits", "x"), ["x", "x"]),
        (loop("body.commits", loop("c.added", "${{ c.id }}/${{ f }}", "f")), [["a1/x.py", "a1/y.py"], []]),
        (loop("body.commits", {"f": loop("c.added", "${{ f }}", "f", join=",")}), [{"f": "x.py,y.py"}, {"f": ""}]),
        (
            loop("body.pairs", loop("p", loop("[p, [q]]", "${{ r }}", "r"), "q"), "p"),
            [[[[1, 2], [1]], [[1, 2], [2]]], [[[3], [3]]]],
        ),
        (loop("body.commits.filter(c, c.n > 2.0)", "${{ c.id }}"), ["b2"]),
        (loop("body.commits.map(c, c.id) // all", "${{ c + '!' }}"), ["a1!", "b2!"]),
        (loop("body.commits", "${{ default(c.by.name, 'somebody') }}"), ["somebody", "Jo"]),
        (loop("body.commits", "${{ c.added.join('|') }}"), ["x.py|y.py", ""]),
        ({"for": "body.commits", "at": "c"}, {"for": "body.commits", "at": "c"}),
        ("${{ {'for': 'body.commits', 'as': 'c'} }}", {"for": "body.commits", "as": "c"}),
    ],
)
def test_what_a_loop_makes(body: object, expected: object) -> None:
    if expected == "no loop":
        with pytest.raises(TemplateError, match="unknown name 'c'"):
            Template(body)
    else:
        assert rendered(body) == expected


def test_the_documented_example() -> None:
    document = (Path(__file__).parent.parent.parent / "docs/rules.md").read_text()
    text, _ = re.findall(r"^```yaml\n(request:\n.*?)^```", document, re.MULTILINE | re.DOTALL)
    commit = {"id": "a1", "message": "Add <tea>", "distinct": True, "author": {"username": "jo"}, "added": ["tea.py"]}
    other = {"id": "b2", "message": "Merge", "distinct": False, "author": {}, "added": []}
    assert rendered(yaml.safe_load(text)["request"]["body"], {"repo": "acme/app", "commits": [commit, other]}) == {
        "title": "acme/app: 2 commits",
        "lines": "a1 Add <tea>\nb2 Merge",
        "blocks": [{"type": "section", "text": "Add <tea>", "by": "jo", "files": [{"name": "tea.py"}]}],
    }


def test_a_name_under_let_may_be_looped_over_and_is_hidden_by_an_item_of_its_name() -> None:
    with naming({"all": "body.commits", "c": "body.repo"}):
        template = Template({"l": loop("all", "${{ c.id }}"), "c": "${{ c }}"})
    assert template.render(EventView.of(an_event(body=BODY))) == {"l": ["a1", "b2"], "c": "acme/app"}


@pytest.mark.parametrize(
    ("body", "path", "message"),
    [
        (loop("body.commits", "${{ d.id }}"), ("do",), "unknown name 'd' at character 1"),
        (loop("body.commits", "a ${{ c.id + no(c) }}"), ("do",), "unknown function 'no' at character 8"),
        (loop("body.commits", "x", sep=1), (), "expected for, as, do and join in a loop, got sep, too"),
        ({"a": [loop("body.commits", "${{ c. }}")]}, ("a", 0, "do"), "syntax error at character"),
        (loop("body.", "x"), ("for",), "syntax error"),
        (loop("commits", "x"), ("for",), "unknown name 'commits'"),
        ({"for": ["a"], "as": "c", "do": "x"}, ("for",), "expected a CEL expression of a list"),
        (loop("body.commits", "x", "body"), ("as",), "expected a name of letters"),
        ({"for": "body.commits", "as": 1, "do": "x"}, ("as",), "expected a name of letters"),
        ({"for": "body.commits", "as": "c"}, (), "expected for, as and do in a loop, got no `do`"),
        ({"for": "body.commits", "as": "c", "d0": "x"}, (), "expected for, as, do and join in a loop, got d0, too"),
        ({"for": "body.commits", "do": "x"}, (), "expected for, as and do in a loop, got no `as`"),
        ({"as": "c", "do": "x"}, (), "expected for, as and do in a loop, got no `for`"),
        (loop("size(body.commits)", "x"), ("for",), "expected a list, got an integer"),
        (loop("body.commits", "x", join=1), ("join",), "expected a string to join strings with"),
        (
            loop("body.a", loop("c", loop("d", loop("e", "${{ f }}", "f"), "e"), "d")),
            ("do", "do", "do", "do"),
            "expected at most 3 macros inside each other",
        ),
    ],
)
def test_mistakes(body: object, path: tuple[str | int, ...], message: str) -> None:
    with pytest.raises(TemplateError, match=message) as raised:
        Template(body)
    assert raised.value.mistakes[0].path == path


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        (loop("body.repo", "x"), ExpressionError, "for: expected a list, got a string"),
        (loop("body.commits[0]", "x"), ExpressionError, "for: expected a list, got a mapping"),
        (loop("body.nothing", "x"), MissingFieldError, "body.nothing isn't there"),
        (loop("body.commits", "${{ c.by.name }}"), MissingFieldError, "by isn't there"),
    ],
)
def test_what_fails_a_request(body: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rendered(body)


@pytest.mark.parametrize("count", [300, 3000, 30_000])
def test_many_items_take_a_bounded_time(count: int) -> None:
    body = {"blocks": loop("body.items", {"t": "${{ c.t }}", "u": "${{ c.u }}: ${{ c.t }}", "more": "x" * 2000})}
    event = orjson.dumps({"items": [{"t": f"t{number}", "u": "u"} for number in range(count)]})
    view = EventView.of(an_event(body=event))
    template = Template(body)
    began = time.perf_counter()
    if count == 300:
        assert isinstance(template.render(view), dict)
    else:
        with pytest.raises(ExpressionError, match=r"too much to compute|expected at most"):
            template.render(view)
    assert time.perf_counter() - began < 1


def test_what_is_too_long_is_not_made_first() -> None:
    view = EventView.of(an_event(body={"items": [0] * 30_000}))
    with pytest.raises(ExpressionError, match="for: expected at most 1048576 characters, got more"):
        Template(loop("body.items", {"text": "x" * 2000})).render(view)


def test_each_expression_is_evaluated_once_for_all_items() -> None:
    template = Template(loop("body.items", {"n": "${{ c.n * 2 }}"}))
    view = EventView.of(an_event(body={"items": [{"n": number} for number in range(400)]}))
    assert template.render(view) == [{"n": 2 * number} for number in range(400)]
    assert len(list(template.expressions)) == 2


def test_all_mistakes_of_a_body_are_told_each_with_its_place() -> None:
    body = {
        "a": "${{ nope1 }} and ${{ body.x }} ${{ nope2 + nope3 }}",
        "b": ["${{ x. }}", {"c": "${{ date(body.x, '%Q') }}"}],
        "l": loop("nope4", {"d": "${{ c.id }} ${{ nope5 }}", "e": loop("c.x", "${{ nope6 }} ${{ i }}", "i")}),
        "n": {"for": "body.commits", "do": "${{ c.id }} ${{ x. }}"},
        "e": "${{ body.x",
    }
    with pytest.raises(TemplateError) as raised:
        Template(body)
    found = [
        (mistake.path, mistake.number, re.findall(r"nope\d|%Q|syntax|`as`|\}\}", mistake.message))
        for mistake in raised.value.mistakes
    ]
    assert found == [
        (("a",), 0, ["nope1"]),
        (("a",), 2, ["nope2", "nope3"]),
        (("b", 0), 0, ["syntax"]),
        (("b", 1, "c"), 0, ["%Q"]),
        (("l", "for"), None, ["nope4"]),
        (("l", "do", "d"), 1, ["nope5"]),
        (("l", "do", "e", "do"), 0, ["nope6"]),
        (("n",), None, ["`as`"]),
        (("n", "do"), 1, ["syntax"]),
        (("e",), 0, ["}}"]),
    ]
