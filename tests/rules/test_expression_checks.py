"""What can never work in an expression is told when rules are loaded, and nothing else is."""

import json
import re
import tracemalloc
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.model import ExpressionError
from gateway.rules import cel_types, expression_checks
from gateway.rules.cel_types import ANY, takes
from gateway.rules.event_view import EventView
from gateway.rules.expression_checks import CONDITION, LIST, SCALAR, Wanted, check_constants
from gateway.rules.expressions import Expression, hiding, naming, parse
from gateway.rules.templates import Template
from tests.builders import an_event


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "date(body.x, '%Y', 'Europe/Berln')",
            "date: expected a time zone such as Europe/Berlin, got 'Europe/Berln' at character 20",
        ),
        (
            "date(body.x, '%Q')",
            "with %Y %m %d %H %M %S and the like, got '%Q' at character 14",
        ),
        (
            "date(body.x, 'YYYY-MM-DD')",
            "date: expected a format with %Y, %m, %d, %H, %M and the like, got 'YYYY-MM-DD' at character 14",
        ),
        ("date('soon', body.format)", "date: expected an RFC 3339 time, such as 2026-01-02T03:04:05Z, got 'soon'"),
        ("'%q'.format([body.x])", "format: expected %s, %d, %.2f or %%, got another % at character 1"),
        ("'%q'.format(body.x)", "format: expected %s, %d, %.2f or %%, got another % at character 1"),
        ("'%s %s'.format([body.x])", "format: expected a value for each %s, %d and %.2f, got fewer at character 1"),
        ("'x'.format([body.x])", "format: expected a %s, %d or %.2f for each value, got fewer at character 1"),
        ("'%d'.format([string(body.x)])", "format: expected a number at character 1"),
        ("money(5, 'euro')", "money: expected a currency of three letters, as ISO 4217 has them, got 'euro'"),
        ("money(body.x, 'euro')", "money: expected a currency of three letters, as ISO 4217 has them, got 'euro'"),
        ("money('5', body.c)", "money: expected a number, got '5' at character 7"),
        ("duration('5 minutes')", "duration: expected a duration such as '90s' or '1h30m', got '5 minutes'"),
        (
            "timestamp('today') < timestamp(body.x)",
            "timestamp: expected an RFC 3339 time, such as 2026-01-02T03:04:05Z, got 'today' at character 11",
        ),
        ("1 + 'a'", "expected values that go together beside +, got an integer and a string at character 1"),
        ("1 + 'a' == 'b' || 'w'", "beside +, got an integer and a string at character 1"),
        ("1 + 'a' == 'b' && 'w'", "expected true or false beside &&, got a string at character 19"),
        ("body.x ? 1 + 'a' : 'a' + 2", "beside +, got an integer and a string at character 10"),
        ("1 + 'a' ? body.x : body.y", "beside +, got an integer and a string at character 1"),
        ("size(body.x) ? body.x : body.y", "expected true or false before ?, got an integer at character 1"),
        ("default(body.x, 1 / 0)", "at character 17"),
        ("money(body.x, 'euro').split(',').map(i, i)", "got 'euro' at character 15"),
        ("size(body.x) + 'a'", "beside +, got an integer and a string at character 1"),
        ("9223372036854775807 + 1", "at character 1"),
        ("int('x1')", "int: expected an integer, got 'x1' at character 1"),
        ("body.x.split('')", "split: expected a separator, got an empty string at character 14"),
        ("body.x.substring(5, 3)", "substring: expected positions within the string's"),
        ("body.x.substring(-1)", "substring: expected positions within the string's"),
        ("body.x.truncate(0)", "truncate: expected at least 1 character, got fewer at character 17"),
        ("body.x.replace('', 'b')", "replace: expected a string to replace, got an empty one at character 16"),
        ("body.x.startsWith(5)", "startsWith: expected other values, got an integer at character 8"),
        ("body.a.startsWith(body.b, 'x')", "startsWith: expected 1 argument, got 2 at character 8"),
        ("body.a.endsWith()", "endsWith: expected 1 argument, got 0 at character 8"),
        (
            "body.a.contains(" + ", ".join(["body.b"] * 50) + ", 1)",
            "contains: expected 1 argument, got 51 at character 8",
        ),
        ("size(body.a, body.b)", "size: expected 1 argument, got 2 at character 1"),
        ("body.a.size('x')", "size: expected no arguments, got 1 at character 8"),
        ("size(body.x) || 'w'", "expected true or false beside ||, got a string at character 17"),
        ("!size(body.x)", "expected true or false after !, got an integer at character 2"),
        ("('%d' + '%q'.replace('q', 'd') + '%x').format(body.l)", "format: expected %s, %d, %.2f or %%, got another %"),
        ("1 / 0", "at character 1"),
        ("{'a': 1}['b']", "at character 1"),
    ],
)
def test_what_can_never_work_is_told_with_its_place(text: str, message: str) -> None:
    Expression(text)
    with pytest.raises(ExpressionError, match=re.escape(message)):
        check_constants(text)


def test_a_long_constant_is_not_told_in_part() -> None:
    """It may have the value of a reference in it, which is hidden where it is whole."""
    with pytest.raises(ExpressionError, match=r"^date: expected a time zone .*, got another at character 20$"):
        check_constants(f"date(body.x, '%Y', '{'s3cret' * 12}')")


def test_all_of_it_is_told() -> None:
    with pytest.raises(ExpressionError) as raised:
        check_constants("date(body.x, '%Q', 'Berlin') + money(body.y, 'euro') == duration('soon')")
    told = str(raised.value).split("; ")
    assert [re.findall(r"got ('[^']*') at character (\d+)", each) for each in told] == [
        [("'%Q'", "14")],
        [("'Berlin'", "20")],
        [("'euro'", "46")],
        [("'soon'", "57")],
    ]


@pytest.mark.parametrize(
    ("text", "wanted", "got"),
    [
        ("'text'", CONDITION, "expected true or false, got a string"),
        ("size(type)", CONDITION, "expected true or false, got an integer"),
        ("type", CONDITION, "expected true or false, got a string"),
        ("headers['x-y']", CONDITION, "expected true or false, got a string"),
        ("body.x ? 'a' : 'b'", CONDITION, "expected true or false, got a string"),
        ("body.l.map(i, i.x)", CONDITION, "expected true or false, got a list"),
        ("size(body.l)", LIST, "expected a list, got an integer"),
        ("body.l.filter(i, i.x)", SCALAR, "expected a string, a number or a boolean, got a list"),
        ("{'a': body.x}", SCALAR, "expected a string, a number or a boolean, got a mapping"),
        (
            "body.k == 'a' && date(body.x, '%Y', 'Berln') == '2026' && (body.n > 1 && 'w')",
            CONDITION,
            (
                "date: expected a time zone such as Europe/Berlin, got 'Berln' at character 37; "
                "expected true or false beside &&, got a string at character 74"
            ),
        ),
        (
            "(1 / 0 == 1 || 'a' == 1 + 'a') && body.x",
            CONDITION,
            (
                "1 / 0: division by zero in CEL expression at character 2; "
                "expected values that go together beside +, got an integer and a string at character 23"
            ),
        ),
    ],
)
def test_a_value_of_another_type_is_told(text: str, wanted: Wanted, got: str) -> None:
    Expression(text)
    with pytest.raises(ExpressionError) as raised:
        check_constants(text, wanted)
    assert str(raised.value) == got


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("true", CONDITION),
        ("body.x", CONDITION),
        ("body.l", LIST),
        ("key", SCALAR),
        ("key != null", CONDITION),
        ("has(body.x) && body.x", CONDITION),
        ("body.x ? body.y : false", CONDITION),
        ("body.x in ['a', 'b']", CONDITION),
        ("'x-id' in headers", CONDITION),
        ("type == 'push' && size(body.l) > 0 && body.l[0] != -1", CONDITION),
        ("body.x == 1 || body.x == 'a'", CONDITION),
        ("body.x * 1.5 >= 10.0", CONDITION),
        ("body.l.exists(i, i.x)", CONDITION),
        ("date(timestamp(body.x) + duration('36h'), '%d %b, %H:%M %Z', 'Europe/Berlin')", SCALAR),
        ("date(body.x, body.f, body.z)", SCALAR),
        ("'%s: %d of %.2f%%'.format([body.a, size(body.l), 19.5])", SCALAR),
        ("'%s %s'.format(body.l)", SCALAR),
        ("'100%%'.format([])", SCALAR),
        ("body.f.format([body.x])", SCALAR),
        ("body.x.substring(2, 5) + 'abc'.substring(1)", SCALAR),
        ("'abc'.substring(body.a, body.b)", SCALAR),
        ("body.x.split('/')[0]", SCALAR),
        ("default(body.x, default(body.y, 'z'))", SCALAR),
        ("body.l.join()", SCALAR),
        ("money(500, 'jpy')", SCALAR),
        ("money(body.x, body.c)", SCALAR),
        ("timestamp(0)", SCALAR),
        ("date('${TIME:-}', '${FORMAT}', '${ZONE}')", SCALAR),
        ("body.x.contains('a') || body.l.size() > 2", CONDITION),
        ('r\'\\d\' + """a""" + b\'x\'.map(i, i)[0]', None),
        ("-1 - -1.5e-3 - .5", None),
        ("[1, 2,] + [3u]", None),
        ("type(body.x) == list", CONDITION),
        ("body.x == int('5') && duration('90s') < duration('2m')", CONDITION),
        ("(" * 200 + "1" + ")" * 200, None),
        ("body.x == 2 || 1 + 'a' == 'b'", CONDITION),
        ("1 / 0 == 1 || body.x == 2", CONDITION),
        ("query.force || body.a == 2", CONDITION),
        ("body.tenant == 'q' || 'w'", CONDITION),
        ("body.x == 1 && date(body.x, '%Q') == '1'", SCALAR),
        ("!(body.x == 1 && date(body.x, '%Q') == '1')", CONDITION),
        ("body.y || body.x == 1 && date(body.x, '%Q') == '1'", CONDITION),
        ("(body.x == 1 && 1 / 0 == 1) == body.y", CONDITION),
        ("0 > 0 && 100 / 0 > body.n", CONDITION),
        ("body.k == 'a' && 0 > 0 && 100 / 0 > body.n", CONDITION),
        ("100 / 0 > body.n && (body.k == 'a' && 0 > 0)", CONDITION),
        ("100 / 0 > body.n && (false && body.x || 0 > 0)", CONDITION),
        ("body.x in [] && 1 / size([]) > body.y", CONDITION),
        ("0 > 0 ? 100 / 0 : 5", SCALAR),
        ("has(body.x) ? money(body.x, 'euro') : 'none'", SCALAR),
        ("'' == '' || int('') > 3", CONDITION),
        ("'' != '' && duration('') > duration('1h')", CONDITION),
        ("body.a == 2 || 1 / 0 == 1", CONDITION),
        ("[].map(x, 1 / 0)", LIST),
        ("body.l.map(i, date(i, '%Q'))", LIST),
        ("body.l.filter(i, 'x')", LIST),
        ("body.l.all(i, 'x')", CONDITION),
        ("'" + "%s, %d %% " * 150 + "'.format(body.l)", SCALAR),
    ],
)
def test_what_may_work_is_left_alone(text: str, wanted: Wanted | None) -> None:
    check_constants(text, wanted)


def test_a_name_that_is_false_by_constants_switches_a_condition_off() -> None:
    with naming({"on": "(body.k == 'a' && 0 > 0)", "limit": "0"}):
        check_constants("on && 100 / limit > body.n", CONDITION)
        with pytest.raises(ExpressionError, match="division by zero"):
            check_constants("body.on && 100 / limit > body.n", CONDITION)


def test_no_more_arguments_are_tried_than_a_function_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those of any type, each further one would take twelve times as long."""
    tried: list[object] = []
    monkeypatch.setattr(cel_types, "_accepts", lambda *call: tried.append(call))
    assert not takes.__wrapped__("startsWith", (ANY, "string", ANY))
    assert not takes.__wrapped__("size", ("string", ANY))
    assert tried == []


def test_a_text_is_read_once_whatever_names_others_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    class Reader(expression_checks._Reader):
        def __init__(self, text: str, named: Mapping[str, str], items: Iterable[str] = ()) -> None:
            read.append(text)
            super().__init__(text, named, items)

    monkeypatch.setattr(expression_checks, "_Reader", Reader)
    for number in range(100):
        with naming({"first": "(size(body.once))", f"other{number}": "true"}):
            check_constants("first > 40 + 2")
    assert read == ["first > 40 + 2", "(size(body.once))"]
    with naming({"first": "'text'"}), pytest.raises(ExpressionError, match="a string and an integer"):
        check_constants("first > 40 + 2")
    for wanted in (CONDITION, CONDITION, SCALAR):
        check_constants("body.once == 40 + 2", wanted)
    assert read[4:] == ["body.once == 40 + 2"] * 2
    for items in ([], ["headers"]):
        with nullcontext() if items else pytest.raises(ExpressionError, match="a mapping and an integer"):
            check_constants("headers + 1", items=items)


def test_a_text_that_may_have_a_secret_in_it_is_not_kept() -> None:
    caches = (expression_checks._found, expression_checks._kind_of, cel_types._evaluated)
    before = [each.cache_info().currsize for each in caches]
    with hiding({"s3cret"}), naming({"by_secret": "('s3' + 'cret')"}):
        check_constants("by_secret == body.x || 's3cret' + 'a' == body.y")
        with pytest.raises(ExpressionError, match="beside -"):
            check_constants("by_secret - 's3cret'")
    assert [each.cache_info().currsize for each in caches] == before


def test_what_is_kept_of_texts_is_little_however_much_is_in_them() -> None:
    """Rules that are posted to be explained stay in no cache of megabytes."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for number in range(60):
            check_constants(f"size('{'a' * 1000}'.replace('a', '{'b' * 1000}') + '{number}' + body.x)")
            with naming({"many": f"[{number},{'1,' * 2000}1]"}):
                check_constants("many == body.x")
        assert tracemalloc.get_traced_memory()[0] - before < 12 << 20  # 9 MB; with all constants and lists, 80 MB
    finally:
        tracemalloc.stop()


def test_the_documented_examples_are_left_alone() -> None:
    document = (Path(__file__).parents[2] / "docs/rules.md").read_text("utf-8")
    examples = re.findall(r"^\| `([^`]+)` \| `[^`]+` \|$", document, re.MULTILINE)
    assert len(examples) > 20
    for text in examples:
        check_constants(text)


def test_a_name_under_let_counts_as_what_it_stands_for() -> None:
    with naming({"zone": "('Europe/Berln')", "n": "(size(body.x))", "broken": "null", "p": "body.p"}):
        parse("date(body.x, '%Y', zone)")
        with pytest.raises(
            ExpressionError, match=r"date: expected a time zone .*, got \('Europe/Berln'\) at character 20"
        ):
            check_constants("date(body.x, '%Y', zone)")
        with pytest.raises(ExpressionError, match="expected true or false, got an integer"):
            check_constants("n", CONDITION)
        check_constants("broken", CONDITION)
        check_constants("p", CONDITION)


def test_an_item_of_a_loop_is_of_any_type_whatever_its_name() -> None:
    with naming({"n": "(size(body.x))"}):
        Template({"for": "body.l", "as": "n", "do": "${{ n ? 1 : 2 }}"})


_LITERALS = [
    "'%Y'",
    "'%Q'",
    "'UTC'",
    "'%s'",
    "'a'",
    "''",
    "'eur'",
    "5",
    "-1",
    "0",
    "1.5",
    "true",
    "null",
    "[1, 'a']",
    "[]",
]
_PATHS = ["body.s", "body.n", "body.f", "body.t", "body.l", "body.m", "type", "headers['x-a']"]
_values = st.sampled_from([*_LITERALS, *_PATHS])
_CALLS = [
    "date({0}, {1}, {2})",
    "money({0}, {1})",
    "{0}.format([{1}, {2}])",
    "{0}.format({1})",
    "{0}.split({1})",
    "{0}.substring({1}, {2})",
    "{0}.truncate({1})",
    "{0}.replace({1}, {2})",
    "{0}.join({1})",
    "{0}.startsWith({1})",
    "{0}.contains({1})",
    "size({0})",
    "timestamp({0})",
    "duration({0})",
    "int({0})",
    "string({0})",
    "{0} + {1}",
    "{0} - {1}",
    "{0} * {1}",
    "{0} / {1}",
    "{0} < {1}",
    "{0} == {1}",
    "{0} in {1}",
    "!({0})",
    "({0} ? {1} : {2})",
    "(has(body.q) ? {0} : {1})",
    "({0} && {1})",
    "({0} || {1})",
    "({0} == {1} || {2} == 1)",
    "{0}.map(i, {1})",
    "{0}.map(i, {1}, {2})",
    "{0}.filter(i, {1})",
    "{0}.exists(i, {1})",
    "{0}.all(i, {1})",
    "default(body.q, {0})",
    "[{0}].exists_one(i, i == {1})",
    "{0}[{1}]",
    "[{0}, {1}]",
]


def _calls(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.builds(lambda call, *values: call.format(*values), st.sampled_from(_CALLS), inner, inner, inner)


_BODIES: list[dict[str, Any]] = [
    {"s": "a", "n": 1, "f": 1.5, "t": True, "l": [1, "a"], "m": {"a": 1}},
    {"s": 1767323045, "n": "2026-01-02T03:04:05Z", "f": "UTC", "t": "eur", "l": "%s", "m": "a"},
    {"s": "%s %s", "n": 0, "f": [1, 2], "t": ["a"], "l": [], "m": False},
    {"s": False, "n": True, "q": 5, "t": False, "l": {}},
]


def refusal_of(text: str, wanted: Wanted | None = None) -> str:
    """Return what is said of an expression that CEL compiles; "" if nothing is, or it doesn't compile."""
    try:
        Expression(text)
    except ExpressionError:
        return ""
    try:
        check_constants(text, wanted)
    except ExpressionError as error:
        return str(error)
    return ""


def views() -> Iterator[EventView]:
    for body in _BODIES:
        yield EventView.of(an_event(body=json.dumps(body).encode(), type="push", headers={"X-A": "a"}))


def assert_that_it_has_no_value(text: str) -> None:
    told = refusal_of(text)
    if not told or "expected a format with" in told:
        return  # a format without % works, and is never meant
    for view in views():
        with pytest.raises(ExpressionError):
            Expression(text).evaluate(view)


@given(text=st.recursive(_values, _calls, max_leaves=6))
def test_what_has_a_value_for_some_event_is_not_refused(text: str) -> None:
    """The law: of no expression that works for an event is said that it can never work."""
    assert_that_it_has_no_value(text)


@given(operands=st.lists(st.recursive(_values, _calls, max_leaves=3), min_size=1, max_size=4))
def test_a_condition_that_is_true_for_some_event_is_not_refused(operands: list[str]) -> None:
    text = " && ".join(operands)
    told = refusal_of(text, CONDITION)
    if told and "expected a format with" not in told:
        assert not any(is_true(text, view) for view in views())


def is_true(text: str, view: EventView) -> bool:
    try:
        return Expression(text).is_true(view)
    except ExpressionError:
        return False


@given(text=st.recursive(_values, _calls, max_leaves=4))
def test_what_a_constant_switches_off_is_not_refused(text: str) -> None:
    """Rules with constants of a template or of the environment, such as `'${URL}' != '' && …`, work with any."""
    for off in ("0 > 0", "'' != ''", "(body.s == 'a' && 0 > 0)"):
        assert refusal_of(f"{off} && {text}", CONDITION) == ""
        assert refusal_of(f"{text} && {off}", CONDITION) == ""
    assert refusal_of(f"0 > 0 ? {text} : 5") == ""
    assert refusal_of(f"'' == '' || {text}", CONDITION) == ""
    assert refusal_of(f"[].map(i, {text})") == ""


@pytest.mark.parametrize("call", _CALLS)
def test_no_call_is_refused_that_has_a_value_for_some_event(call: str) -> None:
    values = ["'%Y'", "'UTC'", "'eur'", "'a'", "5", "body.s", "body.n", "body.f", "body.t"]
    numbers = sum(f"{{{number}}}" in call for number in range(3))
    for arguments in product(values, repeat=numbers):
        assert_that_it_has_no_value(call.format(*arguments, *["1"] * 3))
