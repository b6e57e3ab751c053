"""Functions of expressions: the examples of docs/rules.md, what each refuses, and that none takes long."""

import hashlib
import re
import time
from pathlib import Path
from urllib.parse import quote
from zoneinfo import available_timezones

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.model import ExpressionError
from gateway.rules.event_view import EventView
from gateway.rules.expressions import Expression, using
from gateway.rules.functions import FUNCTIONS, NamedSecret
from tests.machine_speed import as_usual

DOCUMENT = Path(__file__).parents[2] / "docs" / "rules.md"
SECTION = DOCUMENT.read_text().partition("### Functions\n")[2].partition("\n## ")[0]
EVENT = re.findall(r"```json\n(.*?)```", SECTION, re.DOTALL)[0].encode()
EXAMPLES = re.findall(r"^\| `(.*)` \| `(.*)` \|$", SECTION, re.MULTILINE)


def value_of(text: str, body: object = None) -> object:
    content = EVENT if body is None else orjson.dumps(body)
    with using({"pepper": NamedSecret("pepper", b"only-an-example-0123")}):
        expression = Expression(text)
    return expression.evaluate(EventView(source="s", headers=(), query="", body=content))


@pytest.mark.parametrize(("text", "expected"), EXAMPLES, ids=[text for text, _ in EXAMPLES])
def test_each_example_of_the_documentation_is_true(text: str, expected: str) -> None:
    assert value_of(text) == orjson.loads(expected)


def test_each_function_has_an_example() -> None:
    named = {name for text, _ in EXAMPLES for name in re.findall(r"(\w+)\(", text)}
    assert named >= {*FUNCTIONS, "default", "extract", "hmac"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("body.amount.lower()", "lower: expected a string"),
        ("body.repo.split('')", "split: expected a separator, got an empty string"),
        ("('a' + body.big).split('a')", "split: expected at most 10,000 parts, got more"),
        ("body.repo.substring(5, 4)", "substring: expected positions within the string's 8 characters, got others"),
        ("body.repo.substring(-1)", "substring: expected positions within the string's 8 characters, got others"),
        ("body.repo.substring(9)", "substring: expected positions within the string's 8 characters, got others"),
        ("body.repo.substring(1.5)", "substring: expected an integer"),
        ("body.repo.replace('', 'a')", "replace: expected a string to replace, got an empty one"),
        (
            "body.big.replace('a', body.repo)",
            "replace: expected a result of at most 1,048,576 characters",
        ),
        ("body.repo.join(',')", "join: expected a list"),
        ("[body.big, body.big].join(body.big)", "join: expected a result of at most 1,048,576 characters"),
        ("url(body.wide)", "url: expected a result of at most 1,048,576 characters"),
        ("body.repo.truncate(0)", "truncate: expected at least 1 character, got fewer"),
        ("'%s'.format([])", "format: expected a value for each %s, %d and %.2f, got fewer"),
        ("'%s'.format([1, 2])", "format: expected a %s, %d or %.2f for each value, got fewer"),
        ("'%x'.format([1])", "format: expected %s, %d, %.2f or %%, got another %"),
        ("'%d'.format(['a'])", "format: expected a number"),
        ("'%s'.format('a')", "format: expected the values as a list"),
        (
            "'%s%s%s'.format([body.big, body.big, body.big])",
            "format: expected a result of at most 1,048,576 characters",
        ),
        ("money('1999', 'eur')", "money: expected a number"),
        ("money(19.99, 'eur')", "money: expected an integer"),
        ("money(1999, 'euro')", "money: expected a currency of three letters, as ISO 4217 has them"),
        ("date('yesterday')", "date: expected an RFC 3339 time, such as 2026-01-02T03:04:05Z"),
        ("date(body.at, '%Q')", "date: expected a format of at most 100 characters"),
        ("date(body.at, '%Y', 'Berlin')", "date: expected a time zone such as Europe/Berlin"),
        ("date(body.at, '%Y', '../../etc/passwd')", "date: expected a time zone such as Europe/Berlin"),
        (
            "date(1767323045000)",
            "date: expected Unix seconds of the years 1 to 9999, got others",
        ),
        ("timestamp('2026-01-02')", "timestamp: expected an RFC 3339 time"),
        ("timestamp(true)", "timestamp: expected a number"),
        ("timestamp('0001-01-01T00:00:00+01:00')", "timestamp: expected another value"),
        ("date('9999-12-31T23:59:59Z', '%Y', 'Asia/Tokyo')", "date: expected another value"),
        ("json(1.0 / 0.0) + base64(body.tags)", "base64: expected a string"),
        ("default(body.repo, '').foo.lower()", None),
    ],
)
def test_what_a_function_cannot_take_is_told(capfd: pytest.CaptureFixture[str], text: str, message: str | None) -> None:
    body = {**orjson.loads(EVENT), "big": "a" * 400_000, "wide": "☕" * 200_000}
    with pytest.raises(ExpressionError) as raised:
        value_of(text, body)
    assert capfd.readouterr() == ("", "")
    if message is not None:
        shown = text if len(text) <= 80 else text[:79] + "…"
        assert str(raised.value).startswith(f"{shown}: {message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lower(body.a)", r"unknown function 'lower' at character 1, expected the method x\.lower\(…\)"),
        ("body.a.lower(1)", "lower: expected 0 arguments, got 1 at character 8"),
        ("body.a.replace('a')", "replace: expected 2 arguments, got 1"),
        ("body.a.substring()", "substring: expected 1 to 2 arguments, got 0"),
        ("url()", "url: expected 1 argument, got 0"),
        ("date([1, 2], '', '', '')", "date: expected 1 to 3 arguments, got 4"),
        ("default('a', 1)", "default: expected a path such as body.a.b and a value, got something else"),
        ("default(body.a)", "default: expected a path such as body.a.b and a value, got something else"),
        ("default(body.a + 1, 1)", "default: expected a path such as body.a.b, got an expression"),
        ("body.l.map(c, default(c.x + 1, 1))", "default: expected a path such as c.a.b, got an expression"),
        ("body.l.map(c, default(d.x, 1))", "default: expected a path such as body.a.b and a value"),
        (f"body.l.map(c, default(c{'.a' * 9}, 1))", "default: expected a path of at most 8 segments, got 9"),
        ("body.a.extract(body.b)", r"expected the pattern of extract\(\) as one string literal, got something else"),
        ("body.a.extract('(')", "expected a pattern that RE2 accepts"),
        ("body.a.lower__()", "unknown function 'lower__'"),
    ],
)
def test_a_call_that_cannot_be_right_is_refused(text: str, message: str) -> None:
    with pytest.raises(ExpressionError, match=message):
        Expression(text)


def test_many_zones_are_read_once_each() -> None:
    zones = sorted(available_timezones())
    view = EventView(source="s", headers=(), query="", body=orjson.dumps({"z": zones * 6}))
    began = time.process_time()
    assert Expression("body.z.exists(z, date(0, '%H', z) == '77')").is_true(view) is False
    assert time.process_time() - began < 0.5


def test_a_missing_field_stays_a_missing_field() -> None:
    view = EventView(source="s", headers=(), query="", body=EVENT)
    assert Expression("body.nothing.lower() == 'x'").is_true(view) is False
    assert Expression("body.amount.lower() == 'x' || true").is_true(view) is True  # as CEL has it


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("default(body.by, {}).name", "Ann O'Neill"),
        ("default(headers['x-a'], 'none')", "none"),
        ("default(body.tags[1], '') + default(body.tags[2], '!')", "b!"),
        ("default(body.repo.name, 'no mapping')", "no mapping"),
        ("default(body.none, 'null')", "null"),
        ("default(body.tags, []).map(t, t.upper())", ["A", "B"]),
        ("[default(body['repo'], 1), default(body.x, default(body.y, 2))]", ["acme/app", 2]),
        ("default(body.repo, '(') + ')'", "acme/app)"),
    ],
)
def test_default_replaces_what_is_missing_or_null(text: str, expected: object) -> None:
    assert value_of(text, {**orjson.loads(EVENT), "none": None}) == expected


ITEMS = [{"a": {"b": 1}}, {"a": {"b": None}}, {"a": "s"}, {"a": [5]}, {}, {"x-y": 7}, "s", None, 3]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("default(c.a.b, 0)", [1, 0, 0, 0, 0, 0, 0, 0, 0]),
        ("default(c.a[0], 0)", [0, 0, 0, 5, 0, 0, 0, 0, 0]),
        ("default(c['x-y'], 0)", [0, 0, 0, 0, 0, 7, 0, 0, 0]),
        ("default(c, 'null')", [*ITEMS[:7], "null", 3]),
        ("default(c.a.b, default(c['x-y'], default(body.none, '-')))", [1, "-", "-", "-", "-", 7, "-", "-", "-"]),
        ("[c].map(d, default(d.a.b, default(c['x-y'], 0)))[0]", [1, 0, 0, 0, 0, 7, 0, 0, 0]),
        ("[c].map(map, default(map.a.b, 0))[0]", [1, 0, 0, 0, 0, 0, 0, 0, 0]),
        ("[c].map(list, default(list.a[0], 0))[0]", [0, 0, 0, 5, 0, 0, 0, 0, 0]),
    ],
)
def test_default_replaces_what_an_item_does_not_have(text: str, expected: object) -> None:
    assert value_of(f"body.items.map(c, {text})", {"items": ITEMS, "none": None}) == expected


# As CloudEvents has headers decoded, and its SDK for C# does (HttpUtilitiesTest.cs)


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("simple", "simple"),
        ("Euro%20%E2%82%AC%20%F0%9F%98%80", "Euro € 😀"),
        ("Euro%20%e2%82%ac%20%f0%9F%98%80", "Euro € 😀"),
        ("percent%25encoded", "percent%encoded"),
        ("percent%2525encoded", "percent%25encoded"),
        ("quote%22encoded", 'quote"encoded'),
        ("line1%0D%0Aline2", "line1\r\nline2"),
        ("lenient decoding %30%31", "lenient decoding 01"),
        ('"  quoted  text  "unquoted', "  quoted  text  unquoted"),
        (r'"escaped quote\"end"', 'escaped quote"end'),
        (r'"escaped backslash\\end"', r"escaped backslash\end"),
        (r"non-escaping backslash\end", r"non-escaping backslash\end"),
        ('"%22quoted, then%20decoded%22"', '"quoted, then decoded"'),
        ('""', ""),
        ("café", "café"),
    ],
)
def test_an_attribute_of_a_cloudevent_is_decoded(header: str, expected: str) -> None:
    assert value_of("ceAttribute(body.h)", {"h": header}) == expected


@pytest.mark.parametrize(
    "header",
    [
        "unterminated percent %",
        "unterminated percent %0",
        "non hex percent %g0",
        "non hex percent %0g",
        "non hex percent %0$",
        "non hex percent %+1",
        "low surrogate %ED%B0%80",
        "high surrogate %ED%A0%80",
        "surrogate pair via two UTF-16 %ED%A0%80%ED%B0%80",
        "overlong UTF-8 %C0%A0",
        "incomplete end UTF-8 %E2",
        "incomplete end UTF-8 %E2%",
        "incomplete non-percent UTF-8 %E2x",
        "incomplete non-percent UTF-8 %C3é",
        "invalid UTF-8 first byte %82",
        "invalid UTF-8 second byte %E2%E2",
        '"unterminated quote',
        '"unterminated escape \\',
        'one quote " too many',
        "a byte that was none of UTF-8: \ufffd",
        pytest.param('"' + r"\"" * 200_000, id="an unterminated string of quotes"),
    ],
)
def test_what_the_binding_of_cloudevents_rejects_is_an_error(header: str) -> None:
    with pytest.raises(ExpressionError, match=r"ceAttribute\(body\.h\): ceAttribute: expected "):
        value_of("ceAttribute(body.h)", {"h": header})


@given(st.text(st.characters(codec="utf-8")))
def test_an_attribute_that_is_encoded_as_the_binding_says_is_decoded(text: str) -> None:
    encoded = "".join([each if "!" <= each <= "~" and each not in '"%' else quote(each, safe="") for each in text])
    if "\ufffd" not in encoded:
        assert value_of("ceAttribute(body.h)", {"h": encoded}) == text


@given(st.text(max_size=50), st.text(min_size=1, max_size=5), st.text(max_size=5))
def test_texts_of_any_kind_are_taken_as_python_takes_them(text: str, old: str, new: str) -> None:
    body = {"text": text, "old": old, "new": new}
    if any("\ud800" <= each <= "\udfff" for each in text + old + new):
        return  # JSON has none
    assert value_of("body.text.replace(body.old, body.new)", body) == text.replace(old, new)
    assert value_of("body.text.split(body.old).join(body.old)", body) == text
    assert value_of("sha256(body.text)", body) == hashlib.sha256(text.encode()).hexdigest()
    assert value_of("json(body.text)", body) == orjson.dumps(text).decode()


@pytest.mark.parametrize(
    "text",
    [
        "body.l.map(x, body.big.upper()).size() > 0",
        "body.l.map(x, body.big.replace('a', 'bb')).size() > 0",
        "body.l.exists(x, body.l.exists(y, url(y).lower() == sha256(body.big)))",
        "body.l.map(x, body.l.join(body.small)).size() > 0",
        "body.l.map(x, json(body.l)).size() > 0",
        "body.l.exists(x, body.big.extract('(a|b)*a(a|b){100}c') == 'x')",
        "body.l.exists(x, body.l.exists(y, date(body.at, '%Y%m%d%H%M%S%f%B%A', 'Europe/Berlin') == ''))",
        "body.l.exists(x, default(body.l, []) == [])",
        "body.l.exists(x, '%s%s%s'.format([body.big, body.big, x]) == '')",
        "body.l.exists(x, body.big.split('a') == [])",
        "body.long.all(x, body.hundred.all(y, sha256(x) != ''))",
        "body.parts.split(',').map(x, x).size() > 0",
        "body.parts.split(',').map(x, '> ' + x).join(', ') == ''",
        "[body.parts.split(',')].exists(l, l.exists(a, l.exists(b, a + b == 'c')))",
        "body.long.all(x, body.hundred.all(y, (x + 'c').upper().lower() != ''))",
        "body.l.map(x, ceAttribute(body.escapes)).size() > 0",
        "body.l.map(x, ceAttribute(body.quotes)).size() > 0",
        "[body.wide].exists(x, false" + " || url(x) == ''" * 180 + ")",
    ],
)
def test_no_function_takes_time_that_anybody_notices(text: str) -> None:
    """The figure of the threat model: a quarter of a second of an event's expressions together."""
    expression = Expression(text)
    body = {"l": ["a"] * 3_000, "big": "ab" * 150_000, "small": "b" * 300, "at": 1767323045}
    body |= {"parts": ",".join(["a"] * 5_000), "long": ["ab" * 50_000] * 8, "hundred": [1] * 100}
    body |= {"wide": "é" * 50_000}
    body |= {"escapes": "%41" * 100_000, "quotes": r'"\""' * 75_000}
    content = orjson.dumps(body)

    def seconds() -> float:
        view = EventView(source="s", headers=(), query="", body=content)
        began = time.process_time()
        with pytest.raises(ExpressionError, match=r"too much to compute|characters|at most 10,000"):
            expression.evaluate(view)
        return time.process_time() - began

    assert as_usual(seconds) < 0.25
