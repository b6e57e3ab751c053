"""Paths, queries and forms that a route fills in: what an event has can't reach beyond its own place in them."""

import time
from functools import partial
from urllib.parse import parse_qsl, unquote

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.model import ExpressionError, MissingFieldError
from gateway.rules.event_view import EventView
from gateway.rules.request_templates import Parameters, PathTemplate, parameter
from gateway.rules.templates import MAX_RESULT, Template

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=30) | st.sampled_from(
    ["", ".", "..", "../..", "a/b", "a?b=1", "a#b", "a&b=1", "%2e%2e", "\\..\\", "a\r\nHost: b", "\0", "é☕", "//evil"]
)


def a_view(body: object) -> EventView:
    return EventView(source="crm", headers=(), query="", body=orjson.dumps(body))


@given(TEXTS)
def test_a_value_is_one_segment_of_a_path_whatever_it_has(value: str) -> None:
    template = PathTemplate("/customers/${{ body }}/notes")
    if value in ("", ".", ".."):
        with pytest.raises(ExpressionError, match="expected a segment of a path"):
            template.render(a_view(value))
        return
    path = template.render(a_view(value))
    assert path.isascii()
    assert path.isprintable()
    assert [unquote(each) for each in path.split("/")] == ["", "customers", value, "notes"]


@given(st.lists(TEXTS | st.integers(-(2**63), 2**63 - 1) | st.booleans() | st.none(), min_size=1, max_size=4))
def test_a_value_is_one_parameter_whatever_it_has(values: list[object]) -> None:
    names = [f"a&{number}=" for number in range(len(values))]
    templates = {name: Template(f"${{{{ body[{number}] }}}}") for number, name in enumerate(names)}
    rendered = Parameters(tuple(templates.items())).render(a_view(values), MAX_RESULT)
    texts = [value if isinstance(value, str) else orjson.dumps(value).decode() for value in values]
    expected = [pair for pair, value in zip(zip(names, texts, strict=True), values, strict=True) if value is not None]
    assert parse_qsl(rendered, keep_blank_values=True) == expected
    assert rendered.isascii()


def test_what_is_too_long_is_refused_before_it_is_encoded() -> None:
    many = a_view({"tags": [1] * 400_000, "long": "é" * 400_000})
    took = 0.0
    for _ in range(3):  # the body is parsed once
        began = time.process_time()
        for render in (
            partial(Parameters((("tag", Template("${{ body.tags }}")),)).render, many, 8_000),
            partial(Parameters((("tag", Template("${{ body.long }}")),)).render, many, 8_000),
            partial(PathTemplate("/${{ body.long }}").render, many),
        ):
            with pytest.raises(ExpressionError, match="expected at most 8,000 "):
                render()
        took = time.process_time() - began
    assert took < 0.02


def test_a_list_repeats_its_parameter() -> None:
    tags = Parameters((("tag", Template("${{ body.tags }}")), ("fixed", Template(["a b", 2]))))
    assert tags.render(a_view({"tags": ["x&y", 1, True]}), MAX_RESULT) == "tag=x%26y&tag=1&tag=true&fixed=a%20b&fixed=2"
    assert tags.render(a_view({"tags": []}), MAX_RESULT) == "fixed=a%20b&fixed=2"


@pytest.mark.parametrize(
    ("body", "got"),
    [({"a": {}}, "a mapping"), ({"a": [[]]}, "a list"), ({"a": [None]}, "null"), ({"a": [{}]}, "a mapping")],
)
def test_what_is_no_text_is_no_parameter(body: object, got: str) -> None:
    template = Parameters((("tag", Template("${{ body.a }}")),))
    with pytest.raises(ExpressionError, match=f"^tag: expected a string, a number or a boolean, got {got}$"):
        template.render(a_view(body), MAX_RESULT)


@pytest.mark.parametrize(("value", "got"), [([1], "a list"), ({}, "a mapping"), (None, "null")])
def test_what_is_no_text_is_no_segment(value: object, got: str) -> None:
    with pytest.raises(ExpressionError, match=f"got {got}$"):
        PathTemplate("/${{ body.a }}").render(a_view({"a": value}))


def test_a_missing_field_is_no_segment() -> None:
    with pytest.raises(MissingFieldError):
        PathTemplate("/${{ body.a }}").render(a_view({}))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/", "/"),
        ("/a/", "/a/"),
        ("/a%20b/c;d=1/@x", "/a%20b/c;d=1/@x"),
        ("/v${{ body.n }}.json", "/v1.5.json"),
        ("/${{ body.a }}-${{ body.a }}/x", "/a%2Fb-a%2Fb/x"),
        ("/a${{ '.' }}", "/a."),
    ],
)
def test_literal_parts_are_as_they_are_written(text: str, expected: str) -> None:
    assert PathTemplate(text).render(a_view({"a": "a/b", "n": 1.5})) == expected


@pytest.mark.parametrize("text", ["/${{ body }}${{ body }}", "/.${{ body }}", "/%2e${{ body }}"])
def test_no_segment_becomes_a_way_up_by_its_parts(text: str) -> None:
    with pytest.raises(ExpressionError, match=r"expected a segment of a path, got '\.\.'"):
        PathTemplate(text).render(a_view("."))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a path that begins with /"),
        ("a/b", "a path that begins with /"),
        ("${{ body }}/b", "a path that begins with /"),
        ("/a?b=1", "what RFC 3986 allows"),
        ("/a#b", "what RFC 3986 allows"),
        ("/a b", "what RFC 3986 allows"),
        ("/é", "what RFC 3986 allows"),
        ("/%zz", "what RFC 3986 allows"),
        ("/a/../b", r"without the segments \. and \.\., got one with \.\."),
        ("/%2E/b", "without the segments"),
    ],
)
def test_a_path_that_is_none_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PathTemplate(text)


@pytest.mark.parametrize("value", [["a", None], [[1]], [{}]])
def test_a_list_in_a_list_is_no_parameter(value: object) -> None:
    with pytest.raises(ValueError, match="expected a list of strings, numbers and booleans"):
        parameter(value)


def test_an_escape_is_no_expression() -> None:
    assert Template("$${{ body }} and ${{ body }}").render(a_view("a")) == "${{ body }} and a"
    assert Template("a $${{ b }}").render(a_view("a")) == "a ${{ b }}"
    assert PathTemplate("/${{ '$${{' }}").render(a_view("a")) == "/%24%24%7B%7B"
