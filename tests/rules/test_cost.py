"""The cost of an expression is estimated before it is evaluated: no event, however made, blocks the event loop."""

import itertools
import re
import time
from collections.abc import Mapping

import cel
import orjson
import pytest
from hypothesis import given, seed
from hypothesis import strategies as st

from gateway.model import ExpressionError
from gateway.rules.cost import CostEstimator
from gateway.rules.event_view import READING, EventView
from gateway.rules.expressions import Expression
from gateway.rules.operations import Kind, operations_of
from gateway.rules.scanner import Scan
from gateway.rules.templates import Template
from tests.machine_speed import as_usual
from tests.rules.test_cel_semantics import OVER_A_MAPPING
from tests.rules.test_functions import EXAMPLES
from tests.rules.test_hostile_events import FUNCTIONS
from tests.run_seeds import drawn

MANY = 26_000
"""As many items as are passed to CEL, each with one field."""
LONG = "x" * 3_900


def a_view(content: bytes) -> EventView:
    return EventView(source="s", headers=(), query="", body=content)


def filled(text: str) -> str:
    """Return an expression in which `…` stands for as many repetitions as it may have, and `LONG` for a long string.

    `A (B …) C` is `A B B B C`.
    """
    text = text.replace("LONG", LONG)
    found = re.fullmatch(r"(.*?)<(.*) …>(.*)", text)
    if found is None:
        return text
    before, repeated, after = found.groups()
    return before + repeated * ((4_090 - len(before) - len(after)) // len(repeated)) + after


def nested(depth: int, value: object) -> object:
    for _ in range(depth):
        value = {"a": value}
    return value


BODIES: Mapping[str, object] = {
    "items": [{"t": "x"}] * MANY,
    "others": [{"t": "x" * 40}] * 8_000,
    "l": [0] * 1_400,
    "many": [0] * 40_000,
    "texts": ["x" * 900] * 700,
    "nested": [[0] * 1_400],
    "some": [0] * 3_000,
    "few": [0] * 300,
    "big": "x" * 1_900_000,
    "wide": "é" * 900_000,
    "medium": "x" * 16_000,
    "short": "x" * 1_000,
    "parts": ",".join(["x"] * 120),
    "m": {"x" * 900_000: 0},
    "keys": {f"{'k' * 200}{number}": 0 for number in range(4_000)},
    "n": 1,
    "order": {"lines": [{"sku": "x", "count": 1}] * 1_000, "sku": "y"},
    "deep": {"b": {"c": {"d": [0] * 20_000, "n": 0}}},
    "chain": nested(200, [0] * 10_000),
}
CONDITIONS = (
    # The condition is long.
    "body.items.exists(i, false< || i.t == 'y' …>)",
    "body.items.exists(i, i.t.startsWith('LONG'))",
    "body.items.exists(i, i.t.endsWith('LONG') || i.t.contains(i.t + i.t))",
    "body.items.exists(i, i.t == 'LONG')",
    "body.items.exists(i, i.t > 'LONG')",
    "body.items.exists(i, i.t in ['a'<, 'a' …>])",
    "body.items.exists(i, i.t in {'a': 1<, 'b': 1 …>})",
    "body.items.all(i, size(i) == 1< && size(i.t) == 1 …>)",
    "body.items.exists(i, i.t< + i.t …> == 'y')",
    "body.items.exists(i, i == {}< || i == {} …>)",
    "body.items.all(i, has(i.t)< && has(i.t) …>)",
    "body.items.exists(i, body.n< + 1 …> == 0)",
    "body.items.exists(i, body.n< - -1 …> == 0)",
    "body.items.exists(i, !<! …>has(i.t))",
    "body.items.exists(i, [i] == [i] ? false : [i] == [i] ? false : [i] == [i] ? false : [i] == [i])",
    "body.items.exists(i, size([i.t<, i.t …>]) == 0)",
    "body.items.exists(i, size([[i]<, [i] …>]) == 0)",
    "body.items.exists(i, false< || type(i.t) == int …>)",
    "body.items.exists(i, false< || int(body.n) == 0 …>)",
    "body.items.exists(i, false< || dyn(i.t) == bytes('y') …>)",
    "body.items.exists(i, false< || i['t'] == i.t + 'y' …>)",
    "body.others.exists(i, false< || i.t.contains('yy') …>)",
    "body.items.exists_one(i, false< || i.t == 'y' …>)",
    "body.items.exists(i, false< || default(body.none, 1) == 2 …>)",
    "body.items.exists(i, false< || default(body.none, i) == 2 …>)",
    "[body.many].exists(m, [1< ,1 …>].exists(i, m.matches('a')))",
    "[body.many].exists(m, [1< ,1 …>].exists(i, m.lower() == 'a'))",
    "body.items.all(i, true< || default(body.none, 1) == 2 …>)",
    "body.items.all(i, false< || i.t.matches('y') …> || true)",
    "body.items.all(i, false< || size(i.t + 'x') == 0 …> || true)",
    # Something long is looked at many times.
    "[body.big].exists(x, false< || x.contains('xy') …>)",
    "[body.big].exists(x, false< || x.contains('xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxy') …>)",
    "[body.wide].exists(x, false< || x.contains('éa') …>)",
    "[body.big].exists(x, [x].exists(y, false< || y + 'a' == x …>))",
    "[body.big].exists(x, false< || x < x …>)",
    "[body.many].exists(x, false< || 1 in x …>)",
    "[body.many].exists(x, false< || x != x …>)",
    "[body.many].exists(x, false< || x + x == [] …>)",
    "[body.wide].exists(x, false< || size(x) == 1 …>)",
    "[body.wide].exists(x, false< || x.trim() == 'y' …>)",
    "[body.wide].exists(x, false< || x.matches('y') …>)",
    "body.texts.exists(t, body.texts.exists(u, t.contains(u + 'a') || u.contains(t + 'a')))",
    "body.texts.exists(t, body.texts.exists(u, t + u == '' || u + t == ''))",
    "body.l.exists(i, false< || body.short.contains('xy') …>)",
    "body.l.exists(i, body.l.exists(j, false< || body.short == 'y' …>))",
    "body.medium< + body.medium …> == ''",
    "false< || body.medium.contains('xy') …>",
    "body.m.exists(k, false< || k.contains('xy') …>)",
    "body.l.map(x, body.m) == []",
    "body.keys.map(k, k + k) == []",
    "body.keys.exists(k, body.keys.exists(j, j == k + 'a'))",
    "[body.short.replace('x', body.short)].exists(t, false< || t.contains('xxxxxxxxxxxxxxxxxxxxxxxxxxxxxy') …>)",
    "[body.few.join(body.short)].exists(t, false< || t.contains('xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxy') …>)",
    # Each segment of a path copies the value there.
    "body.order.lines.exists(l, l.sku == body.order.sku)",
    "false< || body.deep.b.c.d[0] == 1 …>",
    "body.deep == {}< || body.deep.b.c.n == 1 …>",
    f"body.chain{'.a' * 200} == []",
    f"(body.chain){'.a' * 200} == []",
    f"[body.chain].exists(o, o{'.a' * 200} == [])",
    "[body.deep].exists(o, false< || o.b.c.d[0] == 1 …>)",
    "[body.deep].exists(o, false< || (o.b).c.d[body.n] == 1 …>)",
    # A macro iterates over the same elements again.
    "[body.some].exists(l, l.exists(a, l.exists(b, a + b == 1)))",
    "body.nested.exists(l, l.exists(a, l.exists(b, a + b == 1)))",
    "[[body.l]].exists(k, k.exists(l, l.exists(a, a in l && l != [])))",
    "[default(body.some, [])].exists(l, l.exists(a, l.exists(b, a + b == 1)))",
    "[body.l.filter(i, true)].exists(l, l.exists(a, l.exists(b, a + b == 1)))",
    "(body.l + body.l + body.l + body.l).exists(a, (body.l + body.l).exists(b, a + b == 1))",
    "[1<, 1 …>].exists(a, body.l.exists(b, a + b == 0))",
    "[1,1,1,1,1,1,1,1,1,1].exists(a, [body.n, 1, 1].exists(b, [1<, 1 …>].exists(c, a + b + c == 0)))",
    "{0}.exists(a, {0}.exists(b, {0}.exists(c, a + c == body.n)))".format("[1" + ",1" * 200 + "]"),
    "body.parts.split(',').exists(a, body.few.exists(b, false< || a == 'y' …>))",
    "[body.parts.split(',')].exists(l, l.exists(a, l.exists(b, false< || a + b == 'y' …>)))",
    "[body.parts.split(',' + '')].exists(l, l.exists(a, l.exists(b, false< || a + b == 'y' …>)))",
    "[body.short.replace('x', ',').split(',')].exists(l, l.exists(a, l.exists(b, a + b == 'y')))",
)
GROWING = (
    "[body.short].map(x, x + x)<.map(x, x + x) …>.size() == 0",
    "[[body.n]].map(x, x + x)<.map(x, x + x) …>.size() == 0",
    "[body.n].map(x, [x, x])<.map(x, [x, x]) …>.size() == 0",
    "[body.l].map(x, {'a': x, 'b': x})<.map(x, {'a': x, 'b': x}) …>.size() == 0",
    "body.l.map(x, [body.n, body.n, body.n, body.n, body.n, body.n, body.n, body.n]).map(x, x.map(y, y)).size() == 0",
)
"""The results of these grow with each macro."""


@pytest.mark.rotated
@pytest.mark.parametrize("text", CONDITIONS, ids=lambda text: text[:60])
def test_no_operation_takes_time_that_anybody_notices(text: str) -> None:
    """The figure of the threat model: a quarter of a second of an event's expressions together."""
    assert seconds_of(text) < 0.25


@pytest.mark.rotated
@pytest.mark.parametrize("text", GROWING, ids=lambda text: text[:60])
def test_nothing_grows_beyond_all_bounds(text: str) -> None:
    assert seconds_of(text) < 0.25


def seconds_of(text: str) -> float:
    expression = Expression(filled(text))
    content = orjson.dumps({name: value for name, value in BODIES.items() if re.search(rf"body\.{name}\b", text)})

    def seconds() -> float:
        view = a_view(content)
        assert view.has_body
        began = time.process_time()
        for _ in range(100):  # as many routes
            if time.process_time() - began > 1:
                break
            try:
                expression.evaluate(view)
            except ExpressionError:
                break
        return time.process_time() - began

    return as_usual(seconds, tries=3)


def test_what_is_refused_takes_no_time_either() -> None:
    """Else as many routes as there are could find that out of one event."""
    routes = [
        Expression(filled(f"body.items.exists(i, i.t == '{number}'< || i.t + i.t == 'y' …>)")) for number in range(99)
    ]
    content = orjson.dumps({"items": [{"t": "x"}] * 500})
    for route in routes:  # A text is read when the first event needs that.
        route.evaluate(a_view(b'{"items": [{"t": "1"}]}'))

    def seconds() -> float:
        view, refused, began = a_view(content), 0, time.process_time()
        for route in routes:
            try:
                route.evaluate(view)
            except ExpressionError:
                refused += 1
        assert refused > len(routes) // 2
        return time.process_time() - began

    assert as_usual(seconds, tries=3) < 0.25


def test_what_is_beside_a_field_costs_those_nothing_that_name_others() -> None:
    """However many fields the expressions over an event name."""
    content = orjson.dumps({"o": {"l": [0] * 30_000, **{f"f{number}": number for number in range(400)}}})
    routes = [Expression(f"body.o.f{number} < {number}") for number in range(400)]

    def seconds() -> float:
        view = a_view(content)
        assert view.has_body
        assert not Expression("size(body.o.l) == 0").is_true(view)
        began = time.process_time()
        assert not any(route.is_true(view) for route in routes)
        return time.process_time() - began

    assert as_usual(seconds, tries=3) < 0.1


def test_where_much_is_named_in_many_ways_it_is_passed_once_and_copies_are_charged() -> None:
    body = {"l": [0] * 1_000, **{f"f{number}": {"n": 0, "l": [0] * 6_000} for number in range(12)}}
    content = orjson.dumps(body)
    routes = [Expression(filled(f"size(body.l) == 0< || body.f{number}.n == 1 …>")) for number in range(12)]

    def seconds() -> float:
        view = a_view(content)
        began = time.process_time()
        for route in routes * 8:
            try:
                assert route.is_true(view) is False
            except ExpressionError:
                break
        return time.process_time() - began

    assert as_usual(seconds, tries=3) < 0.25


# Ordinary expressions cost no more than reading what they name

ORDER = {"sku": "AB-1234", "count": 2, "price": 19.99, "tags": ["a", "b"], "note": "leave it at the door, please"}
ORDINARY = (
    "body.items.exists(i, i.sku == 'AB-1234')",
    "body.items.exists(i, i.sku.startsWith('AB-') && i.count > 1)",
    "body.items.all(i, has(i.price) && i.price < 100.0)",
    "body.items.exists(i, i.note.contains('door') || i.note.contains('gate'))",
    "body.items.exists(i, i.sku in ['AB-1', 'AB-2', 'AB-3'])",
    "body.items.exists(i, 'a' in i.tags)",
    "body.items.exists(i, i.tags.exists(t, t == 'b'))",
    "body.items.exists(i, i.sku == body.sku)",
    "size(body.items) > 3 && body.items[0].sku == 'AB-1'",
)


@pytest.mark.parametrize("count", [1, 30, 300, 3_000])
@pytest.mark.parametrize("text", ORDINARY)
def test_an_ordinary_expression_costs_no_more_than_reading_what_it_names(text: str, count: int) -> None:
    view = a_view(orjson.dumps({"items": [ORDER] * count, "sku": "AB-1235"}))
    estimate = CostEstimator(text, Scan(text, str).analysis()).estimate(view)
    assert estimate.cost_units == READING * estimate.values


def test_what_is_known_of_an_event_says_nothing_of_one_that_is_larger_somewhere() -> None:
    text = "body.a.exists(i, body.b.exists(j, i == j))"
    estimator = CostEstimator(text, Scan(text, str).analysis())
    few, many = [a_view(orjson.dumps({"a": [0] * count, "b": [1] * (1_001 - count)})) for count in (1, 500)]
    assert estimator.estimate(few).cost_units == READING * 1_003
    assert estimator.estimate(many).cost_units > 100 * estimator.estimate(few).cost_units


def test_nested_elements_are_counted_once() -> None:
    """Orders with lines, and not as many lines for each order as there are in all of them."""
    view = a_view(orjson.dumps({"orders": [{"id": "o", "lines": [{"sku": "a"}] * 3}] * 2_000}))
    assert Expression("body.orders.exists(o, o.lines.exists(l, l.sku == 'b'))").is_true(view) is False
    assert Expression("body.orders.exists(o, o.lines.exists(l, l.sku == o.id))").is_true(view) is False


COMMIT = {
    "id": "c0ffee",
    "author": {"name": "Jo", "email": "jo@x.example"},
    "added": ["a/b.py"] * 5,
    "removed": ["c"] * 25,
}


@pytest.mark.parametrize(
    "text",
    [
        "size(body.commits.map(c, {'id': c.id, 'by': c.author.name})) > 0",
        "body.commits.map(c, c.author.email).exists(e, e.endsWith('@x.example'))",
        "body.text.split(', ').map(t, t.trim()).exists(t, t == 'tag 7')",
        "body.text.split('\\n').filter(line, line.startsWith('tag')).size() == 1",
        "body.text.lower().replace(' ', '').split(',').filter(t, t != '').exists(t, t == 'tag7')",
        "body.tags.replace('; ', ', ').split(', ').filter(t, t != '').size() == 3",
        "body.order.lines.exists(l, l.sku == body.order.sku)",
        "body.order.lines[0].sku == body.order.sku && body.order.lines.filter(l, l.sku != '').size() > 1",
    ],
)
def test_what_takes_little_is_not_refused(text: str) -> None:
    order = {"lines": [{"sku": "a", "count": 1}] * 300 + [{"sku": "x", "count": 2}], "sku": "x"}
    order["lines"][0] = {"sku": "x", "count": 3}  # type: ignore[index]
    text_of_tags = ", ".join([f"tag {number}" for number in range(400)])
    body = {"commits": [COMMIT] * 250, "text": text_of_tags, "tags": "a, b; c", "order": order}
    assert Expression(text).is_true(a_view(orjson.dumps(body)))


# Whatever CEL takes is read


@pytest.mark.parametrize(
    "text", [*[text for text, _ in EXAMPLES], *OVER_A_MAPPING, *FUNCTIONS, *ORDINARY, *CONDITIONS, *GROWING]
)
def test_the_operations_of_an_expression_leave_one_value(text: str) -> None:
    assert balance(filled(text)) == 1


def balance(text: str) -> int:
    """Return how many values the operations leave on the stack; none pops one that isn't there."""
    left, open_comprehensions = 0, 0
    for operation in operations_of(text).operations:
        kind, number = operation.kind, operation.number
        is_begin, is_end = kind is Kind.COMPREHENSION_BEGIN, kind is Kind.COMPREHENSION_END
        popped = {"PATH": 0, "VARIABLE": 0, "LITERAL": 0, "CONDITIONAL": 3, "COMPREHENSION_BEGIN": 1}.get(kind.name, 2)
        popped = number if is_end or kind.name in ("SCALAR", "CONSTRUCT", "CALL") else popped
        open_comprehensions += is_begin - is_end
        assert left >= popped
        assert open_comprehensions >= 0
        left += 1 - popped - is_begin
    assert open_comprehensions == 0
    return left


operands = st.sampled_from(
    [
        *(
            "1",
            "-1",
            "1.5",
            ".5",
            "1e3",
            "1e+3",
            "2u",
            "0x1F",
            "'a'",
            '"b"',
            "r'\\d'",
            "b'x'",
            "true",
            "null",
            "int",
            "body",
        ),
        *("body.a", "body['b'].c[0]", "body.l[body.n]", "headers['x-a']", "key", "x", "x.y", "[]", "{}", "'''a\nb'''"),
    ]
)


def larger(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    operators = st.sampled_from(["||", "&&", "==", "!=", "<", ">=", " in ", "+", "-", "*", "/", "%"])
    macros = st.sampled_from(["all", "exists", "exists_one", "filter", "map"])
    return st.one_of(
        st.builds(lambda a, b, c: f"{a}{b}{c}", inner, operators, inner),
        st.builds(lambda a, b, c: f"{a} ? {b} : {c}", inner, inner, inner),
        st.builds(lambda a, b: f"({a}).{b}", inner, st.sampled_from(["size()", "z", "contains('a')", "join(',')"])),
        st.builds(lambda a, b, c: f"({a}).{b}(x, {c})", inner, macros, inner),
        st.builds(lambda a, b, c: f"({a}).map(x, {b}, {c})", inner, inner, inner),
        st.builds(lambda a, b: f"({a})[{b}]", inner, inner),
        st.builds(lambda a: f"!({a})", inner),
        st.builds(lambda a: f"size({a}) // so it is\n", inner),
        st.lists(inner, max_size=3).map(lambda items: f"[{', '.join(items)}]"),
        st.lists(st.tuples(inner, inner), max_size=2).map(
            lambda items: "{" + ", ".join(f"{key}: {value}" for key, value in items) + "}"
        ),
    )


@seed(drawn())
@given(st.recursive(operands, larger, max_leaves=12))
def test_whatever_cel_takes_is_read(text: str) -> None:
    """Otherwise its estimated cost would be too low."""
    try:
        cel.compile(text)
    except ValueError:
        return
    assert balance(text) == 1


def test_thousands_of_operators_are_read_and_so_are_as_many_brackets_as_cel_takes() -> None:
    for text in (
        "+".join(["1"] * 2_000),
        "!" * 4_000 + "true",
        "true ? 1 : " * 300 + "2",
        "body" + ".a" * 2_000,
        "body" + ".a()" * 1_000,
        "[1]" + ".map(x, x)" * 400,
    ):
        assert balance(text) == 1
    for depth in itertools.count(1):
        text = "(" * depth + "1" + ")" * depth
        try:
            cel.compile(text)
        except ValueError:
            break
        assert balance(text) == 1
        if depth > 500:
            break


@pytest.mark.parametrize("value", ["x" * 1_000_000, [[]] * 400_000, {"k" * 500_000: "x"}, ["x" * 10] * 100_000])
@pytest.mark.parametrize("template", [{"x": ["${{ body.v }}"] * 500}, "${{ body.v }} " * 500])
def test_no_template_writes_more_than_is_sent(value: object, template: object) -> None:
    """A path costs nothing, however often it is inserted."""
    rendered, content = Template(template), orjson.dumps({"v": value})

    def seconds() -> float:
        view = a_view(content)
        assert view.has_body
        began = time.process_time()
        with pytest.raises(ExpressionError, match=r"expected .* at most 1048576"):
            rendered.render_bytes(view)
        return time.process_time() - began

    assert as_usual(seconds, tries=3) < 0.25
