"""Takes what paths lead to out of the value of a body. Pure."""

from collections.abc import Iterator, Sequence
from math import inf

from gateway.text import Glob
from gateway.turns import give_way

VALUES_A_TURN = 256
_ANY = ("", "")
"""The pieces of `*`."""

PathPattern = tuple[Glob, ...]
"""A path below its root: a pattern for each of its keys."""
ALL: PathPattern = ()
"""The path that ends at a value, and hides all of it."""


def is_hidden(value: object, paths: Sequence[PathPattern]) -> bool:
    """Return whether a value is hidden whole; `paths` are what is left of those that lead to it."""
    return bool(paths) and (ALL in paths or isinstance(value, str))


_Waiting = list[tuple[object, Sequence[PathPattern]]]
"""Containers to look into, each with the paths below it."""


class TooMuchError(Exception):
    """Paths lead through more of a body than may be looked at."""


def take(root: object, paths: Sequence[PathPattern], instead: str | None, most: float = inf) -> list[object]:
    """Take out of a value what is hidden, put something else there, or nothing, and return it. Changes the value.

    Raises TooMuchError before it takes more than so many steps; each is a key or an item, or what has some.
    """
    taken = list[object]()
    waiting: _Waiting = [(root, paths)]
    visited = steps = 0
    while waiting:
        visited += 1
        if visited % VALUES_A_TURN == 0:
            give_way()
        container, below = waiting.pop()
        if (steps := steps + 1 + _steps(container, below)) > most:
            raise TooMuchError
        if isinstance(container, dict):
            taken += _take_fields(container, below, instead, waiting)
        elif isinstance(container, list):
            taken += _take_items(container, below, instead, waiting)
    return taken


def _steps(container: object, paths: Sequence[PathPattern]) -> int:
    """Return how many keys or items of a container are looked at."""
    if isinstance(container, list):
        return len(container) * len(paths)
    if isinstance(container, dict):
        return sum([1 if len(path[0].pieces) == 1 else len(container) for path in paths])
    return 0


def _take_fields(
    container: dict[str, object], paths: Sequence[PathPattern], instead: str | None, waiting: _Waiting
) -> Iterator[object]:
    for number, (key, rest) in enumerate(_fields(container, paths)):
        if number % VALUES_A_TURN == 0:
            give_way()
        value = container[key]
        if not is_hidden(value, rest):
            waiting.append((value, rest))
            continue
        yield value
        if instead is None:
            del container[key]
        else:
            container[key] = instead


def _take_items(
    container: list[object], paths: Sequence[PathPattern], instead: str | None, waiting: _Waiting
) -> Iterator[object]:
    kept = list[object]()
    for number, value in enumerate(container):
        if number % VALUES_A_TURN == 0:
            give_way()
        rest = _item(paths, str(number))
        if is_hidden(value, rest):
            yield value
            kept += [] if instead is None else [instead]
            continue
        if rest:
            waiting.append((value, rest))
        kept.append(value)
    container[:] = kept


def _fields(container: dict[str, object], paths: Sequence[PathPattern]) -> list[tuple[str, list[PathPattern]]]:
    """Return the keys of a mapping that paths enter, each with what is left of them."""
    found: dict[str, list[PathPattern]] = {}
    for step, *rest in paths:
        is_one = len(step.pieces) == 1
        keys = [key for key in (step.text,) if key in container] if is_one else container
        for number, key in enumerate(keys):
            if number % VALUES_A_TURN == 0:
                give_way()
            if is_one or step.matches(key):
                found.setdefault(key, []).append(tuple(rest))
    return list(found.items())


def _item(paths: Sequence[PathPattern], number: str) -> list[PathPattern]:
    """Return what is left of paths for an item of a list: `*` and a position enter it, any other step all of them."""
    rest = list[PathPattern]()
    for path in paths:
        step = path[0]
        if step.text == number or step.pieces == _ANY:
            rest.append(path[1:])
        elif not step.text.isdecimal():
            rest.append(path)
    return rest
