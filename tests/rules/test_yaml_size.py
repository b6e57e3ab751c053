"""The size of a text with copies for its aliases, compared with the copies that are made when it is read."""

from collections.abc import Iterator

import pytest

from gateway.rules.yaml_document import Node, Problem, parse_document
from gateway.rules.yaml_size import expanded_size

TEXTS = (
    "a: 1",
    "[]",
    "- 1\n- [2, 3, {b: [4]}]",
    "a: &a [1, 2]\nb: &b {x: *a, y: *a}\nc: [*b, *b, {z: *b}]",
    "a: &key name\nb: &b {*key : [1, *key]}\nc: {d: *b, e: *b}",
    "{a: {}, b: [], c: ~, 'd e': &s text, f: [*s, *s]}",
    f"{'k' * 500}: [1, 2, {{{'l' * 300}: [3, 4]}}]",
)


def nodes(node: Node) -> Iterator[Node]:
    yield node
    children = node.value.values() if isinstance(node.value, dict) else node.value if type(node.value) is list else ()
    for each in children:
        yield from nodes(each)


@pytest.mark.parametrize("text", TEXTS)
def test_a_size_is_that_of_the_copies(text: str) -> None:
    problems: list[Problem] = []
    root = parse_document("routes.yaml", text, problems)
    assert root is not None
    assert problems == []
    paths = [each.path for each in nodes(root)]
    found = expanded_size(text)
    assert found.values == len(paths)
    assert sum(map(len, paths)) <= found.path_characters <= sum(map(len, paths)) + 20 * len(paths)


@pytest.mark.parametrize("text", ["a: &a [*a]", "a: &a {b: [1, *a]}"])
def test_what_has_an_alias_to_itself_has_no_end(text: str) -> None:
    assert min(expanded_size(text)) > 1 << 50


def test_many_nested_aliases_are_counted_at_once() -> None:
    text = "".join([f"{at}: &n{at} [{', '.join([f'*n{at - 1}' if at else '0'] * 9)}]\n" for at in range(3000)])
    assert min(expanded_size(text)) > 1 << 50


@pytest.mark.parametrize("text", ["", "{", "a: [1, 2", "a: *nobody", "\t", "a: 1\n---\nb: 2"])
def test_what_isnt_yaml_has_the_size_of_what_comes_before(text: str) -> None:
    assert expanded_size(text).values < 10
