"""`foreach:` expands a route to one route for each item of a list, before anything else in the route is parsed.

`${{ each }}`, or `${{ each.name }}` if the item is a mapping, is replaced everywhere in the route. A string that
consists of nothing else becomes the value, of any type. The replaced text may be inside an expression, so no value may
end a CEL string.
"""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from gateway.rules.yaml_document import MAX_VALUES, Node, Problem
from gateway.text import did_you_mean
from gateway.turns import give_way

MAX_CHARACTERS = 32 << 20
"""Of all texts in which an item is inserted: 3,000 for each of 10,000 routes."""
KEY = "foreach"
_EACH = re.compile(r"(?<!\$)\$\{\{\s*each(?:\.([A-Za-z_][A-Za-z0-9_]*))?\s*\}\}", re.ASCII)
_UNSAFE = re.compile(r"[\x00-\x1f\x7f'\"\\`]")
_Values = Mapping[str | None, object]
"""The values of one item by name; under None if the item itself is the value."""


class Growth(NamedTuple):
    """So many values that `foreach` writes, and characters of the texts in which it inserts an item."""

    values: int
    characters: int


def growth(root: Node) -> Growth:
    """Return what `expand` would make of a document, without making any of it."""
    each = [_growth_of(route) for route in _written(root) if _has_foreach(route)]
    return Growth(sum([one.values for one in each]), sum([one.characters for one in each]))


def expand(root: Node, problems: list[Problem]) -> None:
    """Expand the routes of a document that have `foreach`. A route whose `foreach` has a problem is left out."""
    written = _written(root)
    if any(map(_has_foreach, written)):
        expansion = _Expansion(problems)
        root.value["routes"].value = [each for route in written for each in expansion.of(route)]


def _written(root: Node) -> list[Node]:
    routes = root.child("routes")
    found: list[Node] = routes.value if routes is not None and isinstance(routes.value, list) else []
    return found


def _has_foreach(route: Node) -> bool:
    return isinstance(route.value, dict) and KEY in route.value


def _growth_of(route: Node) -> Growth:
    """Return how much all copies of a route are."""
    items = route.value[KEY].value if isinstance(route.value[KEY].value, list) else []
    lengths = dict[str | None, int]()  # of a name's values in all items
    for item in items:
        give_way()
        for name, node in item.value.items() if isinstance(item.value, dict) else [(None, item)]:
            lengths[name] = lengths.get(name, 0) + (
                0 if isinstance(node.value, list | dict) else len(_text(node.value))
            )
    values, characters = 1, 0
    waiting = [child for key, child in route.value.items() if key != KEY]
    while waiting:
        give_way()
        value = waiting.pop().value
        values += 1
        match value:
            case dict():
                waiting += value.values()
            case list():
                waiting += value
            case str() if "each" in value:
                inserted = [lengths.get(found[1], 0) for found in _EACH.finditer(value)]
                characters += len(value) * len(items) + sum(inserted)
            case _:
                pass
    return Growth(values * len(items), characters)


class _Expansion:
    def __init__(self, problems: list[Problem]) -> None:
        self._problems = problems
        self._left = MAX_VALUES
        self._room = MAX_CHARACTERS

    def of(self, route: Node) -> Iterator[Node]:
        if not _has_foreach(route):
            yield route
            return
        written, name = route.value[KEY], route.child("name")
        items = self._items(written)
        if len(items) > 1 and name is not None and not (isinstance(name.value, str) and _EACH.search(name.value)):
            each = next((f"each.{key}" for key in items[0] if key), "each")
            self._report(name, f"expected a name with ${{{{ {each} }}}} in it, got the same one for each route")
            return
        if items and not self._has_room(route, written):
            return
        before = len(self._problems)
        for values in items:
            give_way()
            # Also the first one with a problem, so that its other problems are reported.
            yield self._copy(route, values, without=KEY)
            if len(self._problems) > before:
                return

    def _has_room(self, route: Node, written: Node) -> bool:
        """Return whether there is room for all copies of a route, which then take it: before one of them is made."""
        grown = _growth_of(route)
        self._left -= grown.values
        self._room -= grown.characters
        if self._left < 0:
            self._report(written, f"expected at most {MAX_VALUES} values in all routes together, got more")
        elif self._room < 0:
            self._report(written, f"expected at most {MAX_CHARACTERS:,} characters with items, got more")
        return self._left >= 0 and self._room >= 0

    def _items(self, written: Node) -> list[_Values]:
        if not isinstance(written.value, list) or not written.value:
            self._report(written, "expected a list of values, or of mappings with values, with at least one item")
            return []
        items: list[_Values] = []
        before = len(self._problems)
        for item in written.value:
            named: dict[str | None, Node] = {**item.value} if isinstance(item.value, dict) else {None: item}
            for node in named.values():
                if isinstance(node.value, list | dict) or node.value is None:
                    self._report(node, "expected a string, a number, true or false")
                elif isinstance(node.value, str) and _UNSAFE.search(node.value):
                    self._report(node, "expected a string without quotes, backslashes and control characters")
            items.append({key: node.value for key, node in named.items()})
        return items if len(self._problems) == before else []

    def _copy(self, node: Node, values: _Values, *, without: str = "") -> Node:
        copy = Node(file=node.file, path=node.path, line=node.line, column=node.column)
        copy.key_location, copy.has_text_key, copy.is_broken = node.key_location, node.has_text_key, node.is_broken
        match node.value:
            case dict():
                for key, child in node.value.items():
                    if _EACH.search(key):
                        self._report(child, "expected a key without ${{ each }}, which is replaced in values alone")
                copy.value = {key: self._copy(child, values) for key, child in node.value.items() if key != without}
            case list():
                copy.value = [self._copy(child, values) for child in node.value]
            case str() if "each" in node.value:
                copy.value = self._replaced(copy, node.value, values)
            case _:
                copy.value = node.value
        return copy

    def _replaced(self, node: Node, text: str, values: _Values) -> object:
        for found in _EACH.finditer(text):
            if found[1] not in values:
                names = [f"each.{name}" if name else "each" for name in values]
                hint = did_you_mean(f"each.{found[1]}", names) or f", expected {' or '.join(names)}"
                self._report(node, f"unknown name '{'each' if found[1] is None else f'each.{found[1]}'}'{hint}")
                return text
        if whole := _EACH.fullmatch(text):
            return values[whole[1]]
        return _EACH.sub(lambda found: _text(values[found[1]]), text)

    def _report(self, node: Node, message: str) -> None:
        node.is_broken = True
        self._problems.append(node.problem("value", message))


def _text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
