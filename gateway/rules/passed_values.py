"""What CEL receives of the values that an expression names, and what it copies to reach them.

CEL receives only the named parts of the event's mappings, but lists as a whole (`expressions.py`). It copies the value
at each segment of a path below the root: `body.a.b.c` costs as much as copying `a`, `b` and `c`.

Costs are fixed-point numbers here: `SCALE` of them are one cost unit, which is 0.1 µs.
"""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from itertools import takewhile
from typing import NamedTuple

from gateway.rules.event_view import EventView, Segment, Size, entered
from gateway.rules.functions import MAX_ITEMS

SCALE = 256
VALUE_COST = 220
"""For each value or key that is copied or compared; twice that if there is a `LARGE` list or mapping."""
LARGE = 4_000
"""Elements or keys of one list or mapping from which on they don't fit into the processor's caches."""
CHARACTER_COST = 2
"""For each character that is copied or compared. It is up to four bytes of UTF-8."""
_MEASURED_SEGMENTS = 8  # of a longer path, not every list or mapping on it is measured
_MAX_COUNTED = 16_384  # characters; in a longer string, separators aren't counted before it is split

Path = tuple[str, tuple[Segment, ...]]
"""A root, and the segments after it."""


class PassedValue(NamedTuple):
    """A value of the event that an expression names."""

    value: object
    size: Size
    path_cost: int
    """What copying the lists and mappings on the path to it costs."""
    max_parts: int
    """The most parts that `split` makes of the string, with any of the literal separators that are used for it."""

    @property
    def length(self) -> int:
        """The number of elements or keys; 0 if the value is no list or mapping."""
        return len(self.value) if isinstance(self.value, list | dict) else 0

    @property
    def dimensions(self) -> Sequence[int]:
        """All numbers that the cost of an expression depends on. If one is larger, the cost isn't lower."""
        return (*self.size, self.length, self.path_cost, self.max_parts)


class PathTrie:
    """The paths of an expression as a trie: one node for each distinct prefix."""

    __slots__ = ("_inner_nodes", "_passed_at", "_paths", "_separators")

    def __init__(self, paths: Sequence[Path], separators: Mapping[int, Sequence[str]]) -> None:
        """`separators` has the literals by which the string at a path is split, by the path's index."""
        self._paths = paths
        self._separators = separators
        node_of: dict[tuple[int, object], int] = {}  # (parent node, root or segment) → node
        passed_at: list[set[int]] = []
        nodes_on: list[list[int]] = []  # path → its nodes, from the root on
        first_with: dict[Path, int] = {}  # what is passed → the first path for which it is
        passed_whole: dict[int, int] = {}  # node → the path for which it is passed as a whole
        for index, (root, segments) in enumerate(paths):
            prefix = _passed_prefix(segments)
            path = first_with.setdefault((root, prefix), index)
            nodes: list[int] = []
            for key in (root, *segments):
                node = node_of.setdefault((nodes[-1] if nodes else -1, key), len(node_of))
                if node == len(passed_at):
                    passed_at.append(set())
                passed_at[node].add(path)
                nodes.append(node)
            passed_whole[nodes[len(prefix)]] = path
            nodes_on.append(nodes)
        for nodes in nodes_on:
            enclosing: set[int] = set()
            for node in nodes:
                passed_at[node] |= enclosing
                if node in passed_whole:
                    enclosing.add(passed_whole[node])
        self._passed_at: Sequence[AbstractSet[int]] = passed_at
        """For each node, the paths for which CEL receives something there. Paths to the same value count once."""
        self._inner_nodes = [nodes[1:-1] for nodes in nodes_on]
        """For each path, its nodes without the root and the last one."""

    def values(self, view: EventView, *, is_whole: bool) -> Sequence[PassedValue]:
        """Return the value at each path. `is_whole`: CEL receives the whole event instead of the named parts."""
        node_costs: Sequence[int] = ()
        if any(self._inner_nodes):
            passed_costs = [_passed_cost(view, root, segments) for root, segments in self._paths]
            node_costs = [sum([passed_costs[path] for path in paths]) for paths in self._passed_at]
        values = []
        for index, (root, segments) in enumerate(self._paths):
            value = view.get(root, segments)
            inner_costs = [node_costs[node] for node in self._inner_nodes[index]]
            path_cost = _path_cost(view, root, segments, inner_costs, is_whole=is_whole) if inner_costs else 0
            separators = self._separators.get(index, ())
            values.append(PassedValue(value, view.size(value), path_cost, _max_parts(value, separators)))
        return values


def _passed_prefix(segments: Sequence[Segment]) -> tuple[Segment, ...]:
    """Return the segments up to the first list index, since a list is passed as a whole."""
    return tuple(takewhile(lambda segment: segment.key is not None, segments))


def _passed_cost(view: EventView, root: str, segments: Sequence[Segment]) -> int:
    """Return the cost of copying what CEL receives for a path, including the mappings around it."""
    value: object = getattr(view, root)
    for segment in _passed_prefix(segments):
        if type(value) is list:
            break
        value = entered(value, segment)
    return _copy_cost(view.size(value)) + 2 * VALUE_COST * len(segments)


def _path_cost(
    view: EventView, root: str, segments: Sequence[Segment], inner_costs: Sequence[int], *, is_whole: bool
) -> int:
    """Return the cost of all copies on the way to a value.

    `inner_costs` is, for each mapping on the path, the cost of copying the part of it that is passed. Inside a list, or
    with `is_whole`, everything is passed. Then of a long path only the first value is measured: the largest.
    """
    total, cost = 0, -1
    value: object = getattr(view, root)
    is_whole = is_whole or type(value) is list
    for segment, inner_cost in zip(segments, inner_costs, strict=False):  # The last segment leads to the value itself.
        value = entered(value, segment)
        if type(value) is not dict and type(value) is not list:
            break
        is_whole = is_whole or type(value) is list
        if is_whole and (cost < 0 or len(segments) <= _MEASURED_SEGMENTS):
            cost = _copy_cost(view.size(value))
        total += cost if is_whole else inner_cost
    return total


def _copy_cost(size: Size) -> int:
    return (VALUE_COST if size.longest < LARGE else 2 * VALUE_COST) * size.values + CHARACTER_COST * size.characters


def _max_parts(value: object, separators: Sequence[str]) -> int:
    if type(value) is not str or not separators:
        return 0
    if len(value) > _MAX_COUNTED:
        return MAX_ITEMS
    return min(MAX_ITEMS, 1 + max([value.count(separator) for separator in separators]))
