"""What CEL takes at most to evaluate an expression, by the sizes of what it names of an event, before it does.

CEL can't be interrupted. Each operation is charged by the sizes of its operands, which are known as far as what they
are made of: of an item of a macro, that all items together are as large as what it goes over. So a size is a sum: of a
number, and of multiples of the sizes of the items of the macros around it. At the end of a macro, those of its own item
become that of all items. Costs are in parts of a step, as in `passed_values.py`; what crosses this module is in steps.
"""

from collections.abc import Callable, Mapping, Sequence
from operator import add, le
from typing import NamedTuple

from gateway.rules.event_view import READING, EventView, Size
from gateway.rules.functions import MAX_ITEMS, MAX_RESULT
from gateway.rules.operations import NATIVE, Kind, Operation, operations_of
from gateway.rules.passed_values import CHARACTER, IN_A_STEP, LARGE, VALUE, PassedValue, Places
from gateway.rules.scanner import Analysis

FEW_VALUES = 64  # Up to this many values, evaluating is cheaper than counting the cost.
LONG_STRING = 1024  # Characters from which copying a string costs as much as a step.
MOST_KNOWN = 32  # sizes of values for which it is known what an expression takes
NODE = 160
"""For each node of the syntax tree."""
ITERATION = 1150
"""For each item of a macro."""
CONVERTED = 6
"""For each character that a function of ours gets, also if the budget doesn't suffice for the call itself."""
SCANNED = 12
"""For each character of a string in which another is looked for."""
ESTIMATING = 40
"""Steps to find out what an expression takes, for each of its operations."""
_WRITTEN = 12
"""How many characters of text functions give for one of what they take: `%F0%9F%98%80`."""
_OF_A_NUMBER = 32
"""The most characters of a number in JSON, its comma included."""
_SHORT = 400
"""The most characters of what is written of a number or a time, or as a digest."""
_GROWTH = {
    **dict.fromkeys(("date", "hmac", "money", "sha256"), (0, _SHORT)),
    **dict.fromkeys(("ceAttribute", "extract", "substring", "trim", "truncate"), (1, 1)),
    **dict.fromkeys(("lower", "upper"), (3, 0)),
    "string": (1, _SHORT),
}
"""How many characters these give for each that they take, and how many more."""
_SCALARS = frozenset(
    (
        *("bool", "double", "duration", "getDate", "getDayOfMonth", "getDayOfWeek", "getDayOfYear", "getFullYear"),
        *("getHours", "getMilliseconds", "getMinutes", "getMonth", "getSeconds", "has", "int", "matches", "size"),
        *("timestamp", "type", "uint"),
    )
)


class Charge(NamedTuple):
    """Steps for an expression over a view, and what it names there: the values, and the longest list of them."""

    steps: int
    values: int
    longest: int

    @property
    def is_of_values(self) -> bool:
        """Whether this is for what it names, rather than for what it does with that."""
        return self.steps <= READING * self.values


class Work:
    """What evaluating an expression takes."""

    __slots__ = ("_analysis", "_known", "_reading", "_text", "mentions")

    def __init__(self, text: str, analysis: Analysis) -> None:
        self._text = text
        self._analysis = analysis
        self._reading: _Read | None = None  # when the first event needs it, as few do
        self._known: dict[int, _Known] = {}
        steps = max([len(path.steps) for path in analysis.paths], default=0)
        self.mentions = 1 + (len(analysis.paths) ** 2 + steps**2) // 128
        """How many times what it names is copied, where it is joined or far inside: as a multiple of a few times."""

    def charge(self, view: EventView, *, is_whole: bool = False) -> Charge:
        """Return what an expression is charged over a view, before it is evaluated: what its operations take.

        Of each list, mapping or long string that it names, at least `READING` steps for each value. `is_whole`: CEL
        gets the whole event, rather than what the expression names.
        """
        charge, (operations, places) = self._charge_of_values(view), self._read()
        estimating = ESTIMATING * len(operations)
        if max(charge.steps, estimating) > view.left:
            return charge._replace(steps=max(charge.steps, estimating))
        named = places.values(view, is_whole=is_whole)
        sizes = [number for each in named for number in each.numbers]
        total = sum([each.size.total for each in named])
        kind = total >> max(total.bit_length() - 2, 0) | total.bit_length() << 2
        known = self._known.get(kind)
        if known is not None and known.work <= charge.steps and all(map(le, sizes, known.sizes)):
            return charge  # Larger values took no more. To know that takes a fifth of the time of an estimate.
        work = _estimated(operations, view, named, looks=False)
        if work > charge.steps:
            work = max(charge.steps, _estimated(operations, view, named, looks=True))
            if work > view.left:
                view.spend(estimating)  # Else any number of routes could find that out of an event.
            return charge._replace(steps=work)
        if known is None or known.work < work:
            if len(self._known) >= MOST_KNOWN:
                self._known.clear()
            self._known[kind] = _Known(sizes, work)
        return charge

    def charge_again(self, view: EventView, *, is_whole: bool = False) -> tuple[Charge, int]:
        """Return what another evaluation is charged, for which the first was charged too little.

        And the steps of the first that neither of the two takes.
        """
        charge, (operations, places) = self._charge_of_values(view), self._read()
        named = places.values(view, is_whole=is_whole)
        work = _estimated(operations, view, named, looks=False)
        if work > charge.steps // 2:  # What is in items is only looked at if that is more than is paid anyway.
            work = _estimated(operations, view, named, looks=True)
        return charge._replace(steps=max(2 * work - charge.steps, 0)), max(charge.steps - 2 * work, 0)

    def _charge_of_values(self, view: EventView) -> Charge:
        total, longest = 0, 1
        for path in self._analysis.paths:
            value = view.get(path.root, path.steps)
            if type(value) in (dict, list) or (type(value) is str and len(value) > LONG_STRING):
                size = view.size(value)
                total += size.total
                longest = max(longest, size.longest)
        return Charge(READING * total, total, longest)

    def _read(self) -> "_Read":
        if self._reading is None:
            operations, paths, separators = operations_of(self._text)
            self._reading = _Read(operations, Places(paths, separators))
        return self._reading


class _Read(NamedTuple):
    operations: Sequence[Operation]
    places: Places


class _Known(NamedTuple):
    """The sizes of values of an event, and the steps that the operations of an expression took with these."""

    sizes: Sequence[int]
    work: int


_Sum = tuple[int, int, int, int, int, int, int]
"""A number; then, for the items of the macros from the outermost on, how many times its values and its characters."""
_NOTHING: _Sum = (0, 0, 0, 0, 0, 0, 0)
_ITEM_VALUES: Sequence[_Sum] = ((0, 1, 0, 0, 0, 0, 0), (0, 0, 0, 1, 0, 0, 0), (0, 0, 0, 0, 0, 1, 0))
_ITEM_CHARACTERS: Sequence[_Sum] = ((0, 0, 1, 0, 0, 0, 0), (0, 0, 0, 0, 1, 0, 0), (0, 0, 0, 0, 0, 0, 1))


class _Value(NamedTuple):
    """What is known of a value, at most."""

    values: _Sum
    """In it, itself and keys included."""
    characters: _Sum
    """Of all strings in it."""
    longest: int
    """List or mapping in it, itself aside."""
    widest: int
    """String in it: characters."""
    length: int
    """As a list or a mapping itself."""
    is_text: bool = False
    """Whether it can only be a string."""


class _Loop(NamedTuple):
    """A macro of which the items are gone over: these, and what it took and how many it made until then."""

    items: _Value
    before: _Sum
    source: object
    """The value of the event, or None."""
    collected: int


def _estimated(operations: Sequence[Operation], view: EventView, named: Sequence[PassedValue], *, looks: bool) -> int:
    """Return the steps that operations take at most; `looks` if what is in items is looked at."""
    estimate = _Estimate(view, named, looks=looks)
    for operation in operations:
        _DOES[operation.kind](estimate, operation)
    return estimate.work[0] // IN_A_STEP


class _Estimate:
    """Goes through the operations of an expression, as CEL would with its values."""

    def __init__(self, view: EventView, named: Sequence[PassedValue], *, looks: bool) -> None:
        self.work = _NOTHING
        self._view = view
        self._named = named
        self._looks = looks
        """Whether at what is in items."""
        self._stack: list[_Value] = []
        self._loops: list[_Loop] = []
        self._collected = 0
        """How many lists and mappings were made."""

    def path(self, operation: Operation) -> None:
        named = self._named[operation.number]
        value = _of_event(named)
        self._spend(_plus(_cost(value), _number(named.copied)))
        self._stack.append(value)

    def variable(self, operation: Operation) -> None:
        at = operation.number - 1
        items = self._loops[at].items
        value = self._item(items, at)
        if operation.step is not None:
            if self._looks and (size := self._view.size_in(self._loops[at].source, operation.step)) is not None:
                value = self._limited(value, size)
            self._spend(_times(operation.nodes, _cost(value)))  # It is copied at each step.
        self._stack.append(value)

    def _item(self, items: _Value, at: int) -> _Value:
        """Return what is known of one item of a macro at this place among those around it."""
        return _Value(_ITEM_VALUES[at], _ITEM_CHARACTERS[at], items.longest, items.widest, items.longest)

    def _limited(self, value: _Value, size: Size) -> _Value:
        return _Value(
            self._least([value.values, _number(size.total)]),
            self._least([value.characters, _number(size.text)]),
            size.inner,
            size.widest,
            size.longest,
        )

    def literal(self, operation: Operation) -> None:
        length = operation.number
        self._stack.append(_text(_number(length), length) if length else _SCALAR)
        self._spend(_number(CHARACTER * length))

    def scalar(self, operation: Operation) -> None:
        self._take(operation.number)
        self._stack.append(_SCALAR)

    def compared(self, _: Operation) -> None:
        left, right = self._take(2)
        self._spend(self._least([_cost(left), _cost(right)]))
        self._stack.append(_SCALAR)

    def found(self, _: Operation) -> None:
        value, container = self._take(2)
        self._spend(_cost(container))
        self._spend(self._least([value.characters, _number(value.widest)]))
        self._stack.append(_SCALAR)

    def scanned(self, _: Operation) -> None:
        for each in self._take(2):
            self._spend(_times(SCANNED, self._least([each.characters, _number(each.widest)])))
        self._stack.append(_SCALAR)

    def joined(self, _: Operation) -> None:
        first, second = self._stack[-2:]
        if not (first.is_text or second.is_text):
            self._collect(2, sum, max(first.longest, second.longest), first.length + second.length)
            return
        self._take(2)
        value = _text(_plus(first.characters, second.characters), first.widest + second.widest)
        self._spend(_cost(value))
        self._stack.append(value)

    def collected(self, operation: Operation) -> None:
        self._collected += 1
        parts = self._stack[len(self._stack) - operation.number :]
        longest = _most([max(each.length, each.longest) for each in parts])
        self._collect(operation.number, _most, longest, operation.number)

    def _collect(self, count: int, widest: Callable[[Sequence[int]], int], longest: int, length: int) -> None:
        parts = self._take(count)
        values, characters = _number(1), _NOTHING
        for each in parts:
            values, characters = _plus(values, each.values), _plus(characters, each.characters)
        value = _Value(values, characters, longest, widest([each.widest for each in parts]), length)
        self._spend(_cost(value))
        self._stack.append(value)

    def chosen(self, _: Operation) -> None:
        first, second = self._take(3)[1:]
        self._stack.append(_either(first, second))

    def indexed(self, _: Operation) -> None:
        value, index = self._take(2)
        self._spend(self._least([index.characters, _number(index.widest)]))
        item = value._replace(length=value.longest)
        if not value.longest:  # It has no lists or mappings in it.
            item = _Value(_number(1), self._least([value.characters, _number(value.widest)]), 0, value.widest, 0)
        self._spend(_cost(item))
        self._stack.append(item)

    def called(self, operation: Operation) -> None:
        taken = self._take(operation.number)
        self._spend_on_call(operation.name, taken)
        self._stack.append(self._result(operation.name, taken))

    def split(self, operation: Operation) -> None:
        taken = self._take(2)
        self._spend_on_call("split", taken)
        self._stack.append(_split(taken[0], self._named[operation.number].parts))

    def _spend_on_call(self, name: str, taken: Sequence[_Value]) -> None:
        for each in taken:
            if name not in NATIVE:
                self._spend(_cost(each))
            if name not in NATIVE or name == "size":
                self._spend(_times(CONVERTED, each.characters))

    def _result(self, name: str, taken: Sequence[_Value]) -> _Value:
        """Return what a function gives; functions of ours are charged for that when they are called."""
        if name in _SCALARS or not taken:
            return _SCALAR
        first = taken[0]
        if name == "default":
            return _either(first, taken[-1])
        if name in ("bytes", "dyn"):
            return first
        if name == "split":
            return _split(first, min(MAX_ITEMS, first.widest + 1))
        if name in _GROWTH:
            growth, more = _GROWTH[name]
            written = _plus(_times(growth, first.characters), _number(more))
            return _text(written, growth * first.widest + more)
        written = _number(_SHORT)
        for each in taken:
            written = _plus(written, _plus(_times(_WRITTEN, each.characters), _times(_OF_A_NUMBER, each.values)))
        if name == "replace" and len(taken) > 2:  # noqa: PLR2004 - each character by the third
            written = _plus(written, _times(taken[2].widest, first.characters))
        if name == "join" and len(taken) > 1:
            written = _plus(written, _times(taken[1].widest, first.values))
        return _text(self._least([written, _number(MAX_RESULT)]), min(MAX_RESULT, self._summed(written)))

    def begun(self, operation: Operation) -> None:
        [items] = self._take(1)
        source = self._named[operation.number - 1].value if operation.number else None
        self._loops.append(_Loop(items, self.work, source, self._collected))
        self.work = _NOTHING

    def ended(self, operation: Operation) -> None:
        *_, made = self._take(operation.number)
        loop, at = self._loops.pop(), len(self._loops)
        of_item = _plus(self.work, _number(ITERATION + NODE * operation.nodes))
        of_item = _plus(of_item, _cost(self._item(loop.items, at)))
        iterations = self._iterations(loop.items)
        self.work = _plus(loop.before, _over(loop.items, at, of_item, iterations))
        items, copies = loop.items, loop.items.length
        match operation.name:
            case "map":
                values = _plus(_number(1), _over(items, at, made.values, iterations))
                characters = _over(items, at, made.characters, iterations)
                longest = max(made.length, made.longest)
                value = _Value(values, characters, longest, made.widest, items.length)
            case "filter":
                value = items
                copies *= 1 if self._collected == loop.collected else 3  # What is made between them divides them.
            case _:
                self._stack.append(_SCALAR)
                return
        # What there is of the result is copied for each item: half of it, but into new memory.
        self._spend(_times(copies, _cost(value)))
        self._stack.append(value)

    def _iterations(self, items: _Value) -> _Sum:
        """Return how many items there are: all items of the items of a macro are no more than its values."""
        return self._least([_number(items.length), items.values])

    def _least(self, bounds: Sequence[_Sum]) -> _Sum:
        """Return the least of several bounds, when all items of the macros around it are gone over."""
        least = bounds[0]
        for each in bounds[1:]:
            if self._summed(each) < self._summed(least):
                least = each
        return least

    def _summed(self, bound: _Sum) -> int:
        for at in range(len(self._loops) - 1, -1, -1):
            items = self._loops[at].items
            bound = _over(items, at, bound, _number(items.length))
        return bound[0]

    def _spend(self, cost: _Sum) -> None:
        self.work = _plus(self.work, cost)

    def _take(self, count: int) -> Sequence[_Value]:
        at = len(self._stack) - count
        taken = self._stack[at:]
        del self._stack[at:]
        return taken


_DOES: Mapping[Kind, Callable[[_Estimate, Operation], None]] = {
    Kind.PATH: _Estimate.path,
    Kind.VARIABLE: _Estimate.variable,
    Kind.LITERAL: _Estimate.literal,
    Kind.SCALAR: _Estimate.scalar,
    Kind.COMPARED: _Estimate.compared,
    Kind.FOUND: _Estimate.found,
    Kind.SCANNED: _Estimate.scanned,
    Kind.JOINED: _Estimate.joined,
    Kind.COLLECTED: _Estimate.collected,
    Kind.CHOSEN: _Estimate.chosen,
    Kind.INDEXED: _Estimate.indexed,
    Kind.CALLED: _Estimate.called,
    Kind.SPLIT: _Estimate.split,
    Kind.BEGUN: _Estimate.begun,
    Kind.ENDED: _Estimate.ended,
}


def _number(number: int) -> _Sum:
    return (number, 0, 0, 0, 0, 0, 0)


def _plus(first: _Sum, second: _Sum) -> _Sum:
    return tuple(map(add, first, second))


def _times(factor: int, each: _Sum) -> _Sum:
    return tuple([factor * part for part in each])  # type: ignore[return-value] # as many as it has


def _over(items: _Value, at: int, of_item: _Sum, iterations: _Sum) -> _Sum:
    """Return what a sum is for all items together, of a macro at this place among those around it."""
    number, *parts = of_item
    values, characters = parts[2 * at : 2 * at + 2]
    parts[2 * at : 2 * at + 2] = (0, 0)
    whole = _times(number, iterations)
    if any(parts):  # of the items of macros around it
        whole = _plus(whole, _times(items.length, (0, *parts)))  # type: ignore[arg-type] # as many as it had
    if values:
        whole = _plus(whole, _times(values, items.values))
    return _plus(whole, _times(characters, items.characters)) if characters else whole


def _of_event(named: PassedValue) -> _Value:
    size, is_text = named.size, isinstance(named.value, str)
    return _Value(_number(size.total), _number(size.text), size.inner, size.widest, named.length, is_text)


def _text(characters: _Sum, widest: int) -> _Value:
    return _Value(_number(1), characters, 0, widest, 0, is_text=True)


def _split(text: _Value, count: int) -> _Value:
    """Return what is known of a string's parts, of which there are so many at most."""
    values = _number(1 + count) if text.characters[0] else _plus(_number(2), text.characters)
    return _Value(values, text.characters, 0, text.widest, count)


def _cost(value: _Value) -> _Sum:
    """Return what it takes to copy a value, or to compare it with another."""
    of_one = VALUE if max(value.length, value.longest) < LARGE else 2 * VALUE
    return _plus(_times(of_one, value.values), _times(CHARACTER, value.characters))


def _either(first: _Value, second: _Value) -> _Value:
    return _Value(
        tuple(map(max, first.values, second.values)),  # type: ignore[arg-type] # as many as these have
        tuple(map(max, first.characters, second.characters)),  # type: ignore[arg-type]
        max(first.longest, second.longest),
        max(first.widest, second.widest),
        max(first.length, second.length),
        first.is_text and second.is_text,
    )


def _most(numbers: Sequence[int]) -> int:
    return max(numbers, default=0)


_SCALAR = _Value(_number(1), _NOTHING, 0, 0, 0)
