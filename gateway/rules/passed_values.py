"""What CEL gets of the values that an expression names, and what it copies on the way to them.

CEL gets the mappings in which these are, with nothing else in them, and lists as a whole (`expressions.py`). At each
step of a path below its root, it copies what is there: `body.a.b.c` takes as long as copying `a`, `b` and `c`. Costs
are in parts of a step, of which `IN_A_STEP` are 0.1 µs.
"""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from itertools import takewhile
from typing import NamedTuple

from gateway.rules.event_view import EventView, Size, Step, entered
from gateway.rules.functions import MAX_ITEMS

IN_A_STEP = 256
VALUE = 220
"""For each value, or key, that is copied or compared; twice that in something large."""
LARGE = 4_000
"""Items or keys side by side, from which on they don't fit into the processor's caches."""
CHARACTER = 2
"""For each character that is copied or compared: of UTF-8, up to four bytes."""
_MEASURED_STEPS = 8  # of a path, up to which each list or mapping on the way is measured
_MOST_COUNTED = 16_384  # characters of a string of which the parts are counted before it is split

Path = tuple[str, tuple[Step, ...]]
"""A root and the steps from there."""


class PassedValue(NamedTuple):
    """A value of the event that is named."""

    value: object
    size: Size
    copied: int
    """What it costs to copy what is on the way to it."""
    parts: int
    """Into how many a string is split at most, by one of the literals by which it is."""

    @property
    def length(self) -> int:
        """Of a list or a mapping, how many items or keys it has."""
        return len(self.value) if isinstance(self.value, list | dict) else 0

    @property
    def numbers(self) -> Sequence[int]:
        """All that decides what an expression takes: none makes it cheaper by being larger. The first is the total."""
        return (*self.size, self.length, self.copied, self.parts)


class Places:
    """The places in an event that the paths of an expression go through."""

    __slots__ = ("_contents", "_paths", "_separators", "_ways")

    def __init__(self, paths: Sequence[Path], separators: Mapping[int, Sequence[str]]) -> None:
        """`separators` are literals by which the string of a path is split, by the path's number."""
        self._paths = paths
        self._separators = separators
        numbers: dict[tuple[int, object], int] = {}  # of a place, by the number of the one around it and the step
        contents: list[set[int]] = []
        ways: list[list[int]] = []
        firsts: dict[Path, int] = {}  # of the paths to the same
        ends: dict[int, int] = {}
        for number, (root, steps) in enumerate(paths):
            passed = _passed_part(steps)
            path = firsts.setdefault((root, passed), number)
            way: list[int] = []
            for step in (root, *steps):
                place = numbers.setdefault((way[-1] if way else -1, step), len(numbers))
                if place == len(contents):
                    contents.append(set())
                contents[place].add(path)
                way.append(place)
            ends[way[len(passed)]] = path
            ways.append(way)
        for way in ways:
            around: set[int] = set()
            for place in way:
                contents[place] |= around
                if place in ends:
                    around.add(ends[place])
        self._contents: Sequence[AbstractSet[int]] = contents
        """Of each place, the paths to what CEL gets there: in it or around it. Of those to the same, the first."""
        self._ways = [way[1:-1] for way in ways]
        """Of each path, the places between its root and its end."""

    def values(self, view: EventView, *, is_whole: bool) -> Sequence[PassedValue]:
        """Return what each path names; `is_whole` if CEL gets the whole event, rather than what is named."""
        costs: Sequence[int] = ()
        if any(self._ways):
            of_paths = [_cost_of_passed(view, root, steps) for root, steps in self._paths]
            costs = [sum([of_paths[path] for path in paths]) for paths in self._contents]
        found = []
        for number, (root, steps) in enumerate(self._paths):
            value = view.get(root, steps)
            way = [costs[place] for place in self._ways[number]]
            copied = _cost_of_way(view, root, steps, way, is_whole=is_whole) if way else 0
            separators = self._separators.get(number, ())
            found.append(PassedValue(value, view.size(value), copied, _most_parts(value, separators)))
        return found


def _passed_part(steps: Sequence[Step]) -> tuple[Step, ...]:
    """Return the steps to what is passed as a whole: a list that a path steps into."""
    return tuple(takewhile(lambda step: step.key is not None, steps))


def _cost_of_passed(view: EventView, root: str, steps: Sequence[Step]) -> int:
    """Return what it costs to copy what CEL gets of a path, with the mappings around it."""
    value: object = getattr(view, root)
    for step in _passed_part(steps):
        if type(value) is list:
            break
        value = entered(value, step)
    return _cost_of(view.size(value)) + 2 * VALUE * len(steps)


def _cost_of_way(view: EventView, root: str, steps: Sequence[Step], passed: Sequence[int], *, is_whole: bool) -> int:
    """Return what all copies on the way to a value cost, given that of what is passed in each mapping on the way.

    What is in a list is passed as a whole; of a long way in it only the first part is measured.
    """
    copied, cost = 0, -1
    value: object = getattr(view, root)
    is_whole = is_whole or type(value) is list
    for step, of_passed in zip(steps, passed, strict=False):  # The last step is to the value itself.
        value = entered(value, step)
        if type(value) is not dict and type(value) is not list:
            break
        is_whole = is_whole or type(value) is list
        if is_whole and (cost < 0 or len(steps) <= _MEASURED_STEPS):
            cost = _cost_of(view.size(value))
        copied += cost if is_whole else of_passed
    return copied


def _cost_of(size: Size) -> int:
    return (VALUE if size.longest < LARGE else 2 * VALUE) * size.total + CHARACTER * size.text


def _most_parts(value: object, separators: Sequence[str]) -> int:
    if type(value) is not str or not separators:
        return 0
    if len(value) > _MOST_COUNTED:
        return MAX_ITEMS
    return min(MAX_ITEMS, 1 + max([value.count(separator) for separator in separators]))
