"""Expressions say the same each time, and what CEL's specification says, where its library doesn't."""

import contextlib
import itertools
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from decimal import Decimal
from pathlib import Path

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.model import ExpressionError, MissingFieldError
from gateway.rules.event_view import MAX_COST, EventView
from gateway.rules.expressions import Expression
from gateway.rules.functions import FUNCTIONS
from gateway.rules.json_values import as_json
from gateway.rules.templates import Template
from tests.machine_speed import as_usual


def a_view(body: object) -> EventView:
    return EventView(source="s", headers=(), query="", body=orjson.dumps(body))


def value_of(text: str, body: object = None) -> object:
    return Expression(text).evaluate(a_view(body))


def outcome(text: str, body: object) -> object:
    """A value, or how there is none."""
    try:
        return value_of(text, body)
    except MissingFieldError:
        return "missing"
    except ExpressionError:
        return "error"


# The same each time

MAPPING = {name: {"n": number, name: "x"} for number, name in enumerate("qwertyuiopasdf")}
OVER_A_MAPPING = (
    "json(body.m)",
    "json([body.m])",
    "body.list.map(i, json(i))",
    "'%s'.format([body.m])",
    "[body.m].join()",
    "url(body.m)",
    "sha256(json(body.m)) + base64(json(body.m))",
    "body.m.map(k, k)",
    "body.m.map(k, body.m[k].n > 3, body.m[k].n)",
    "body.m.filter(k, k > 'd')",
    "body.list.map(i, i.map(k, k))",
    "default(body.m, {}).map(k, k)",
    "(true ? body.m : body.list).filter(k, true)",
    "{'z': 1, 'b': 2, 'k': 3, 'a': 4, 'q': 5, 'c': 6}.map(k, k)",
    "body.list.map(i, {'z': i, 'y': i, 'x': 0, 'w': 0, 'v': 0, 'u': 0})",
    "body.m.map(k, k).join().upper().lower().trim().substring(1).truncate(9).replace('a', 'b').split('e')",
    "body.m.map(k, k)[0].extract('(.)')",
    "[body.m.exists(k, k == 'q'), body.m.all(k, k != ''), body.m.exists_one(k, k > 'y')]",
    "body.m.map(k, size(k)).size() + size(body.m)",
    "[string(body.m.q.n), string(type(body.m) == map)]",
    "[int('1'), int(2.5)]",
    "[bool('true')]",
    "[ceAttribute('%41')]",
    "[money(1, 'eur'), date(0)]",
    "[timestamp(0) + duration('1s')]",
    "[timestamp(0).getFullYear('Asia/Tokyo'), timestamp(0).getMonth(), timestamp(0).getDate()]",
    "[timestamp(0).getDayOfMonth(), timestamp(0).getDayOfWeek(), timestamp(0).getDayOfYear()]",
    "[timestamp(0).getHours(), timestamp(0).getMinutes(), timestamp(0).getSeconds(), timestamp(0).getMilliseconds()]",
)
_PRINT = "from tests.rules.test_cel_semantics import printed; printed()"


def printed() -> None:
    """What `test_another_process_...` compares."""
    values = [value_of(text, {"m": MAPPING, "list": [MAPPING, MAPPING]}) for text in OVER_A_MAPPING]
    sys.stdout.write(orjson.dumps(values).decode())


def test_every_function_and_macro_is_among_those_compared() -> None:
    called = {name for text in OVER_A_MAPPING for name in re.findall(r"(\w+)\(", text)}
    assert called >= {*FUNCTIONS, "default", "extract", "all", "exists", "exists_one", "filter", "map", "size", "type"}


def test_another_process_has_the_same_values_and_so_has_each_evaluation() -> None:
    root = Path(__file__).parents[2]
    seeds = [{**os.environ, "PYTHONPATH": str(root), "PYTHONHASHSEED": str(seed)} for seed in (1, 2)]
    command = [sys.executable, "-c", _PRINT]
    first, second = [
        subprocess.run(command, env=env, cwd=root, capture_output=True, check=True, timeout=60).stdout for env in seeds
    ]
    assert first == second
    body = {"m": MAPPING, "list": [MAPPING, MAPPING]}
    for text, value in zip(OVER_A_MAPPING, orjson.loads(first), strict=True):
        assert [value_of(text, body) for _ in range(5)] == [value] * 5, text


def test_a_signature_is_of_what_is_sent() -> None:
    """Each expression of a request is evaluated by itself."""
    view = a_view({"data": MAPPING})
    signed, sent = [
        Template(text).render_bytes(view)[0] for text in ("${{ sha256(json(body.data)) }}", "${{ json(body.data) }}")
    ]
    assert signed.decode() == value_of("sha256(body.text)", {"text": sent.decode()})


def test_json_has_the_keys_in_order_whatever_theirs_was() -> None:
    assert value_of("json(body)", {"b": {"é": 1, "z": 2}, "B": [], "a": None}) == '{"B":[],"a":null,"b":{"z":2,"é":1}}'
    assert value_of("json({2: 1, true: {'b': 1u, 'a': b'x'}})") == '{"2":1,"true":{"a":"eA==","b":1}}'


@pytest.mark.parametrize("text", ["{1: 1, '1': 2}", "json({1: 1, '1': 2})"])
def test_keys_that_are_one_in_json_are_refused(text: str) -> None:
    with pytest.raises(ExpressionError, match=r"expected keys that differ in JSON|expected another value"):
        value_of(text)


# `exists` and `all`

ITEMS = [{"a": 1}, {"a": 0}, {}, {"a": "text"}]


def _or(results: Sequence[object]) -> object:
    for result in (True, "error", "missing"):
        if result in results:
            return result
    return False


def _and(results: Sequence[object]) -> object:
    return {True: False, False: True}.get(found := _or([{True: False, False: True}.get(x, x) for x in results]), found)  # type: ignore[call-overload]


def _result(item: object) -> object:
    return outcome("body.a > 0", item)


@given(st.lists(st.sampled_from(ITEMS), max_size=5))
def test_exists_and_all_are_what_or_and_and_are(items: list[object]) -> None:
    results = [_result(item) for item in items]
    for text in (
        "body.exists(i, i.a > 0)",
        "default(body, []).exists(i, i.a > 0)",
        "[body].exists(l, l.exists(i, i.a > 0))",
    ):
        assert outcome(text, items) == _or(results)
    assert outcome("body.all(i, i.a > 0)", items) == _and(results)
    if True in results or not set(results) & {"missing", "error"}:  # of two errors, CEL's own || gives either
        written_out = " || ".join([f"body[{number}].a > 0" for number in range(len(items))]) or "false"
        assert outcome(written_out, items) == _or(results)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("body.l.exists(a, a.labels.severity == 'critical')", True),
        ("body.l.exists(a, a.labels.severity == 'none')", "missing"),
        ("body.l.exists(a, a.labels.severity == 'none') || body.n == 1", True),
        ("!body.l.all(a, a.labels.severity == 'none')", True),
        ("body.l.exists(a, body.l.exists(b, b.labels.severity == a.labels.severity))", True),
        ("body.l.all(a, body.l.exists(b, b.labels.severity == 'critical' && a.labels != {}))", True),
        ("body.l.filter(a, body.l.exists(b, b.labels.severity == 'critical')).size() == 3", True),
        ("body.l.exists(a, a.labels.exists(k, a.labels[k] == body.s && size(body.s) == 8))", True),
        ("body.l.map(a, size(a.labels) > 0).exists(b, b)", True),
        ("body.l.exists(a, a.labels.severity.matches('^crit') && a.labels.severity.upper() != '')", True),
        ("body.l.exists(a, hidden.a == 1)", "missing"),
        ("body.l.exists(item, item.labels.severity == 'critical')", True),
        ("body.l.exists(a, a.labels.severity.lower() == 'critical' || a.labels.x < 'a')", True),
        # Of these, an error is an error wherever it is.
        ("body.l.exists_one(a, a.labels.severity == 'critical')", "missing"),
        ("body.l.filter(a, a.labels.severity == 'critical').size() > 0", "missing"),
        ("body.l.map(a, a.labels.severity).size() > 0", "missing"),
    ],
)
def test_an_items_missing_field_does_not_hide_another_item(text: str, expected: object) -> None:
    items = [{"labels": {"severity": "critical"}}, {"labels": {"x": "y"}}, {"labels": {"x": 1}}]
    for order in itertools.permutations(items):
        body = {"l": order, "s": "critical", "n": 1}
        assert outcome(text.replace("hidden", "body.none"), body) == expected


def test_an_error_of_an_item_is_told_in_the_expressions_words() -> None:
    with pytest.raises(ExpressionError) as raised:
        value_of("body.exists(i, i.lower() == 'a')", ["b", 1, "c"])
    assert str(raised.value) == "body.exists(i, i.lower() == 'a'): lower: expected a string"
    with pytest.raises(ExpressionError, match=r"an operand has the wrong type$"):
        value_of("body.exists(i, i == 1)", "text")


# Each item lacks the field, as the event lacks 60 others.
LACKING = " || ".join(["x.k == 1", *[f"(has(body.o{number}) && x.k == body.o{number})" for number in range(60)]])


@pytest.mark.parametrize(
    "text",
    [
        "body.l.exists(x, x.a == 1)",
        f"body.mappings.exists(x, {LACKING})",
        f"default(body.mappings, []).exists(x, {LACKING})",
        "body.mappings.exists(x, x.a == 1)",
        "body.mappings.all(x, [x].exists(y, y.a == 1))",
        "body.mappings.filter(x, true).exists(x, x.a == 1)",
        "body.l.exists(x, body.l.exists(y, y.a == x.a))",
        "body.l.all(x, body.l.exists(y, body.l.exists(z, z.a == y.a)))",
        "body.l.exists(x, x.a == 1 || size(body.big) == 1)",
        "body.l.exists(x, body.m.exists(k, x.a == k))",
        "body.l.exists(x, x.a == size(body.m))",
        "body.one.exists(x, x.l.exists(y, y.a == x.n))",
        "body.deep.exists(x, x.exists(y, y.exists(z, z.a == 1)))",
        "default(body.l, []).map(x, size(x) > 0).exists(x, body.m.all(k, x.a == k))",
        "body.l.exists(x, (x.a + body.big).matches('(a|b)*c'))",
        "body.m.map(k, body.m.map(l, l)).size() > 0",
        "body.wide.all(x, size(x) > 0 && x.size() > 0 && size(x + 'é') > 0)",
        "body.empty.all(x, x.all(y, true))",
        "body.empty.all(x, x.all(y, true) && size(x) >= 0 && x.all(z, true))",
        "body.mappings.all(x, x.all(y, true))",
    ],
)
@pytest.mark.parametrize("count", [3_000, 12_000])
def test_what_an_item_is_decided_by_takes_no_time_that_anybody_notices(text: str, count: int) -> None:
    """The figure of the threat model: a quarter of a second of an event's expressions together."""
    expression = Expression(text)
    lists = {
        "l": [{"b": "x"}] * count,
        "one": [{"l": [{}] * count, "n": 1}],
        "deep": [[[{}] * 20] * 20] * (count // 40),
    }
    lists |= {"wide": ["é" * 300] * count, "empty": [[]] * 4 * count, "mappings": [{}] * 3 * count}
    body = {**lists, "big": "é" * 10 * count, "m": {str(number): 0 for number in range(count)}}
    content = orjson.dumps({name: value for name, value in body.items() if f"body.{name}" in text})

    def seconds() -> float:
        view = EventView(source="s", headers=(), query="", body=content)
        assert view.has_body
        began = time.process_time()
        try:
            expression.evaluate(view)
        except ExpressionError as error:
            assert re.search("isn't there|too much to compute", str(error))  # noqa: PT017 - either may be so
        return time.process_time() - began

    assert as_usual(seconds, tries=3) < 0.25


def test_an_item_without_the_field_is_charged_for_being_evaluated_alone() -> None:
    def spent(items: list[dict[str, str]]) -> int:
        view = EventView(source="s", headers=(), query="", body=orjson.dumps({"l": items}))
        assert view.has_body
        with contextlib.suppress(ExpressionError):
            Expression("body.l.exists(x, x.a == 1)").evaluate(view)
        return MAX_COST - view.left

    assert spent([{"b": "x"}] * 1000) > 2 * spent([{"a": "x"}] * 1000)


def order_lines(number: int, fields: int, *, incomplete: bool) -> list[dict[str, str]]:
    lines = [{"sku": "a", **{f"f{field}": "x" for field in range(1, fields)}} for _ in range(number)]
    if incomplete:
        del lines[number // 2]["sku"]
    return lines


@pytest.mark.parametrize(("number", "fields"), [(100, 16), (1_000, 3)])
def test_one_incomplete_item_costs_no_route_its_decision(number: int, fields: int) -> None:
    """As many routes decide an event of which one item lacks the field as decide a complete one."""

    def decided(*, incomplete: bool) -> int:
        view = a_view({"items": order_lines(number, fields, incomplete=incomplete)})
        for route in itertools.count():
            try:
                assert Expression(f"body.items.exists(i, i.sku == 'z{route}')").is_true(view) is False
            except ExpressionError as error:
                assert "too much to compute" in str(error)  # noqa: PT017 - the one after those counted
                return route
        raise AssertionError

    assert decided(incomplete=True) >= decided(incomplete=False) - 1 > 20


@pytest.mark.parametrize("number", [4_000, 9_000])
@pytest.mark.parametrize("text", ["body.items.exists(i, i.sku == 'z')", "!body.items.all(i, i.sku != 'z')"])
def test_a_large_event_of_which_one_item_is_incomplete_is_decided(text: str, number: int) -> None:
    body = {"items": order_lines(number, 3, incomplete=True)}
    assert Expression(text).is_true(a_view(body)) is False
    body["items"][-1]["sku"] = "z"
    assert Expression(text).is_true(a_view(body)) is True


@pytest.mark.parametrize("items", ["body.l", "default(body.l, [])", "body.l.filter(i, true)", "[body.l][0]"])
def test_what_fails_is_told_whatever_comes_after_it(items: str) -> None:
    body = {"l": [{}, {"a": 0}]}
    assert outcome(f"{items}.exists(i, i.a == 1) || {items}.all(i, has(i.a))", body) == "missing"
    assert outcome(f"{items}.exists(i, i.a == 1) || {items}.exists(i, has(i.a) && i.a < 0)", body) == "missing"
    assert outcome(f"{items}.exists(i, i.a == 1) || {items}.exists(i, i == {{}})", body) is True


def test_a_scalar_has_no_items() -> None:
    """A wrong type isn't taken for the other scalar, that makes a field missing."""
    assert outcome("body.s.exists(i, body.s.x == i)", {"s": "text"}) == "error"
    assert outcome("body.l.exists(i, i.a == 1) && body.s.all(i, i == 1)", {"s": 1, "l": [{}, {"a": 1}]}) == "error"


def test_the_items_of_a_mapping_are_its_keys_in_order() -> None:
    body = {"m": {"b": 1, "a": "text", "c": {}}}
    assert outcome("body.m.exists(k, body.m[k] > 0)", body) is True
    assert outcome("body.m.exists(k, body.m[k] > 1)", body) == "error"
    assert outcome("body.m.exists(k, body.m[k].none > 1)", {"m": {"b": {}, "a": {}}}) == "missing"


@pytest.mark.parametrize(
    "text",
    [
        "body.a.exists(i,body.b.exists(j,j.n==i.n))",
        "body.a.exists(i, (body.b.exists(j, j.n == i.n)))",
        "(body.a).exists(i, i.n == 2)",
        "body['a'].exists(i, i.n == 2 // the second\n)",
        "[body.a.exists(i, i.n == 2), true][0]",
        "body.a.filter(i, true).exists(i, i.n == 2)",
        "[body.a, body.b].exists(l, l.exists(i, i.n == 2)) && !body.a.all(i, i.n == 1)",
        "body.none.n == 1 || body.a.exists(i, i.n == 2)",
        "size(body.a.filter(i, body.b.exists(j, j.n == 2))) == 3",
    ],
)
def test_an_item_decides_wherever_the_macro_is(text: str) -> None:
    assert value_of(text, {"a": [{"n": 1}, {}, {"n": 2}], "b": [{}, {"n": 2}]}) is True


def test_as_many_items_with_a_missing_field_as_providers_send_are_decided() -> None:
    alert = {"labels": {"alertname": "x" * 30, "job": "y", "instance": "z"}, "annotations": {"summary": "s" * 200}}
    body = {"alerts": [alert] * 1_000 + [{"labels": {"severity": "critical"}}]}
    assert value_of("body.alerts.exists(a, a.labels.severity == 'critical')", body) is True


# Sizes and strings

SAMPLES = ("", "abc", "Grüße", "日本語", "😀😀", "e\u0301", "a\U0001f468\u200d\U0001f469")


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("size(body.s)", len),
        ("body.s.size()", len),
        ("size(body.s + 'é')", lambda s: len(s) + 1),
        ("(body.s + '😀').size()", lambda s: len(s) + 1),
        ("[body.s].map(s, size(s))[0]", len),
        ("[body.s].map(s, s.size())[0]", len),
        ("size(string(size(body.s) + 10))", lambda _: 2),
        ("size(bytes(body.s))", lambda s: len(s.encode())),
        ("size([body.s, body.s])", lambda _: 2),
        ("{'s': body.s}.size()", lambda _: 1),
        ("body.s.substring(0, size(body.s))", str),
        ("body.s.substring(size(body.s))", lambda _: ""),
        ("(body.s + 'xy').truncate(size(body.s) + 1)", lambda s: s + "…"),
        ("body.s.upper()", str.upper),
        ("body.s.lower()", str.lower),
        ("(' ' + body.s + '\u00a0').trim()", str),
        ("('<' + body.s + '>').replace('<', '«')", lambda s: f"«{s}>"),
        ("(body.s + '☕' + body.s).split('☕')", lambda s: [s, s]),
        ("[body.s, body.s].join('☕')", lambda s: f"{s}☕{s}"),
        ("'%s %%'.format([body.s])", lambda s: f"{s} %"),
        ("(body.s + '☕').extract('^(.*).$')", str),
        ("('x' + body.s).matches('^x.*$')", lambda _: True),
        ("body.s.contains(body.s) && body.s.startsWith('') && (body.s + '☕').endsWith('☕')", lambda _: True),
        ("json(body.s)", lambda s: orjson.dumps(s).decode()),
        ("string(bytes(body.s)) == body.s", lambda _: True),
    ],
)
def test_strings_are_of_characters(text: str, expected: object, sample: str) -> None:
    assert callable(expected)
    assert value_of(text, {"s": sample}) == expected(sample)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("size(body.n)", "size isn't defined"),
        ("size(body.n, 1)", "size"),
        ("size()", "size"),
        ("body.n.size(1)", "size"),
    ],
)
def test_a_size_that_nothing_has_is_an_error(text: str, message: str) -> None:
    with pytest.raises(ExpressionError, match=message):
        value_of(text, {"n": 1})


# Times


@given(st.timedeltas())
def test_durations_are_exact_decimal_seconds(duration: timedelta) -> None:
    text = as_json(duration)
    assert isinstance(text, str)
    assert re.fullmatch(r"-?\d+(\.\d*[1-9])?s", text)
    assert int(Decimal(text[:-1]).scaleb(6)) == duration // timedelta(microseconds=1)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("timestamp('2026-01-15T06:56:08Z') - timestamp('2026-01-01T00:00:00Z')", "1234568s"),
        ("duration('-1.25s')", "-1.25s"),
        ("duration('0.000001s')", "0.000001s"),
        ("duration('100ns')", "0s"),  # as docs/rules.md has it
        ("[duration('0'), duration('+0'), duration('-0')]", ["0s", "0s", "0s"]),
        ("[duration('.5s'), duration('-.5s'), duration('1.s')]", ["0.5s", "-0.5s", "1s"]),
        ("[duration('+1h'), duration('+1h.5m')]", ["3600s", "3630s"]),
        ("string(true) + string(2) + string(2.50) + string(1e21) + string(3u)", "true22.510000000000000000000003"),
        ("string(duration('90m')) + string(timestamp(0)) + string(b'\\xc3\\xbc')", "5400s1970-01-01T00:00:00Zü"),
        ("int(timestamp('2009-02-13T23:31:30Z'))", 1234567890),
        ("int(timestamp('1969-12-31T23:59:59.5Z'))", -1),
        ("[int('-12'), int(-7.9), int(42u)]", [-12, -7, 42]),
        ("[bool('true'), bool('f'), bool(true)]", [True, False, True]),
        ("timestamp('2009-02-13T23:31:30Z').getDate('Australia/Sydney')", 14),
        ("timestamp('2009-02-13T02:00:00Z').getDayOfMonth('-02:30')", 11),
        ("timestamp('2009-02-13T23:31:30Z').getHours('02:00')", 1),
        ("timestamp('2009-02-13T23:31:30Z').getMinutes('Asia/Kathmandu')", 16),
        ("timestamp('2009-02-13T23:31:30Z').getDayOfYear('US/Central')", 43),
        ("timestamp('2009-02-15T23:31:30Z').getDayOfWeek()", 0),
        ("timestamp('2026-01-02T03:04:05Z').getHours('Europe/Berlin')", 4),
        (
            "[duration('-90m').getHours(), duration('3730s').getMinutes(), duration('3730s').getSeconds()]",
            [-1, 62, 3730],
        ),
        ("duration('123.321s').getMilliseconds()", 321),
    ],
)
def test_conversions_and_times_are_those_of_the_specification(text: str, expected: object) -> None:
    assert value_of(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("string(b'\\xff')", "string: expected UTF-8"),
        ("string(null)", "string: expected a string, number"),
        ("string([1])", "string: expected a string, number"),
        ("int(true)", "int: expected an integer as a string, a number or a time"),
        ("int(' 1')", "int: expected an integer as a string"),
        ("int(1.0 / 0.0)", "int: expected an integer as a string"),
        ("int('9223372036854775808')", "int: expected an integer of 64 bits"),
        ("int(18446744073709551615u)", "int: expected an integer of 64 bits"),
        ("bool('yes')", "bool: expected 'true' or 'false'"),
        ("bool(1)", "bool: expected a string"),
        ("timestamp(0).getHours('Nowhere')", "getHours: expected a time zone"),
        ("timestamp(0).getHours('+24:00')", "getHours: expected a time zone"),
        ("duration('1h').getFullYear()", "getFullYear: expected a time, such as timestamp"),
        ("duration('1h').getHours('UTC')", "getHours: expected a time, such as timestamp"),
        *[
            (f"duration('{text}')", "duration: expected a string such as '90s' or '1h30m'")
            for text in (
                "",
                "1h 30m",
                "1",
                "00",
                "0.0",
                "+",
                ".s",
                "s",
                "1..5s",
                "--1s",
                "1h-1m",
                "5 minutes",
                "1d",
                "0s0",
            )
        ],
        ("'2026-01-01T00:00:00Z'.getHours()", "getHours: expected a time, such as timestamp"),
    ],
)
def test_a_conversion_that_the_specification_refuses_is_an_error(text: str, message: str) -> None:
    with pytest.raises(ExpressionError, match=f": {re.escape(message)}"):
        value_of(text)


@pytest.mark.parametrize(
    "value",
    [
        "timestamp('2026-01-02T03:04:05.25Z')",
        "duration('90.5s')",
        "b'\\xff'",
        "1.5",
        "true",
        "null",
        "[duration('1s')]",
    ],
)
def test_functions_insert_a_value_as_a_template_does(value: str) -> None:
    shown, _ = Template(f"-${{{{ {value} }}}}").render_bytes(a_view({}))
    inserted = shown.decode()[1:]
    assert value_of(f"'%s'.format([{value}])") == inserted
    assert value_of(f"[{value}, 'x'].join('')") == f"{inserted}x"
    assert value_of(f"url({value}) == url(body.shown)", {"shown": inserted}) is True
