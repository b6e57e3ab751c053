"""Estimates what it costs at most to evaluate an expression over an event, before it is evaluated.

CEL can't be interrupted, so an expression is only evaluated if the event's budget covers its estimated cost. The
estimate adds up the cost of each operation, given upper bounds on the sizes of its operands.

We know the total size of a list, but not of each element. So a size is symbolic, a constant plus multiples of the
enclosing comprehensions' element sizes, and it is summed when the comprehension ends.

Costs are fixed-point numbers, as in `passed_values.py`, except those that are named `cost_units`.
"""

from collections.abc import Callable, Mapping, Sequence
from operator import add, le
from typing import NamedTuple

from gateway.rules.event_view import READING, EventView, Size
from gateway.rules.functions import MAX_ITEMS, MAX_RESULT
from gateway.rules.operations import NATIVE, Kind, Operation, operations_of
from gateway.rules.passed_values import CHARACTER_COST, LARGE, SCALE, VALUE_COST, PassedValue, PathTrie
from gateway.rules.scanner import Analysis

FEW_VALUES = 64  # Up to this many values, evaluating is cheaper than estimating the cost.
LONG_STRING = 1024  # Characters from which on a string is counted among the values that an expression names.
MAX_CACHED = 32  # estimates that are kept for an expression
NODE_COST = 160
"""For each node of the syntax tree."""
ITERATION_COST = 1150
"""For each element of a comprehension."""
CONVERSION_COST = 6
"""For each character of an argument of our functions, also if the budget doesn't suffice for the call itself."""
SEARCH_COST = 12
"""For each character of both strings of `contains`."""
ESTIMATION_COST_UNITS = 40
"""For each operation whose cost is estimated."""
_MAX_ENCODED = 12
"""The most characters that a function returns for one of an argument: URL-encoded, `%F0%9F%98%80`."""
_MAX_NUMBER = 32
"""The most characters of a number in JSON, including its comma."""
_MAX_FORMATTED = 400
"""The most characters of a formatted number or time, or of a digest."""
_RESULT_LENGTH = {
    **dict.fromkeys(("date", "hmac", "money", "sha256"), (0, _MAX_FORMATTED)),
    **dict.fromkeys(("ceAttribute", "extract", "substring", "trim", "truncate"), (1, 1)),
    **dict.fromkeys(("lower", "upper"), (3, 0)),
    "string": (1, _MAX_FORMATTED),
}
"""Bounds on the characters that these functions return: so many for each character of the argument, plus a constant."""
_SCALAR_FUNCTIONS = frozenset(
    (
        *("bool", "double", "duration", "getDate", "getDayOfMonth", "getDayOfWeek", "getDayOfYear", "getFullYear"),
        *("getHours", "getMilliseconds", "getMinutes", "getMonth", "getSeconds", "has", "int", "matches", "size"),
        *("timestamp", "type", "uint"),
    )
)


class CostEstimate(NamedTuple):
    """The estimated cost of one evaluation, and the values that the expression names."""

    cost_units: int
    values: int
    longest: int
    """The length of the longest list or mapping that it names."""

    @property
    def is_for_input(self) -> bool:
        """Whether this is the cost of reading what the expression names; computing with it costs no more than that."""
        return self.cost_units <= READING * self.values


class CostEstimator:
    """Estimates the cost of one expression."""

    __slots__ = ("_analysis", "_cache", "_parsed", "_text", "copy_factor")

    def __init__(self, text: str, analysis: Analysis) -> None:
        self._text = text
        self._analysis = analysis
        self._parsed: _Parsed | None = None  # parsed when an event first needs it, as few do
        self._cache: dict[int, _CachedCost] = {}
        longest_path = max([len(path.segments) for path in analysis.paths], default=0)
        self.copy_factor = 1 + (len(analysis.paths) ** 2 + longest_path**2) // 128
        """Rough multiplier for copying: grows with the number of paths and their depth."""

    def estimate(self, view: EventView, *, is_whole: bool = False) -> CostEstimate:
        """Estimate the cost of an evaluation. It is at least `READING` for each value that the expression names.

        `is_whole`: CEL receives the whole event, rather than what the expression names. Spends something of the view's
        budget only if that doesn't cover the estimate.
        """
        base, (operations, trie) = self._input_estimate(view), self._parse()
        estimation = ESTIMATION_COST_UNITS * len(operations)
        if max(base.cost_units, estimation) > view.left:
            return base._replace(cost_units=max(base.cost_units, estimation))
        named = trie.values(view, is_whole=is_whole)
        dimensions = [number for each in named for number in each.dimensions]
        values = sum([each.size.values for each in named])
        magnitude = values >> max(values.bit_length() - 2, 0) | values.bit_length() << 2
        cached = self._cache.get(magnitude)
        if cached is not None and cached.cost_units <= base.cost_units and all(map(le, dimensions, cached.dimensions)):
            return base  # Larger values cost no more. This check takes a fifth of the time of an estimate.
        cost_units = _estimated(operations, view, named, inspects_elements=False)
        if cost_units > base.cost_units:
            cost_units = max(base.cost_units, _estimated(operations, view, named, inspects_elements=True))
            if cost_units > view.left:
                view.spend(estimation)  # Otherwise any number of routes could make estimates for an event.
            return base._replace(cost_units=cost_units)
        if cached is None or cached.cost_units < cost_units:
            if len(self._cache) >= MAX_CACHED:
                self._cache.clear()
            self._cache[magnitude] = _CachedCost(dimensions, cost_units)
        return base

    def estimate_reevaluation(self, view: EventView, *, is_whole: bool = False) -> tuple[CostEstimate, int]:
        """Estimate what a second evaluation costs beyond what was spent on the first one.

        The first may have been charged less than it cost, and the two share what was spent. Also returns the cost units
        that are left over from the first.
        """
        base, (operations, trie) = self._input_estimate(view), self._parse()
        named = trie.values(view, is_whole=is_whole)
        cost_units = _estimated(operations, view, named, inspects_elements=False)
        if cost_units > base.cost_units // 2:  # A tighter bound is only worth its time if the first doesn't cover it.
            cost_units = _estimated(operations, view, named, inspects_elements=True)
        missing = 2 * cost_units - base.cost_units
        return base._replace(cost_units=max(missing, 0)), max(-missing, 0)

    def _input_estimate(self, view: EventView) -> CostEstimate:
        """Return the cost of the named lists, mappings and long strings alone."""
        values, longest = 0, 1
        for path in self._analysis.paths:
            value = view.get(path.root, path.segments)
            if type(value) in (dict, list) or (type(value) is str and len(value) > LONG_STRING):
                size = view.size(value)
                values += size.values
                longest = max(longest, size.longest)
        return CostEstimate(READING * values, values, longest)

    def _parse(self) -> "_Parsed":
        if self._parsed is None:
            operations, paths, separators = operations_of(self._text)
            self._parsed = _Parsed(operations, PathTrie(paths, separators))
        return self._parsed


class _Parsed(NamedTuple):
    operations: Sequence[Operation]
    trie: PathTrie


class _CachedCost(NamedTuple):
    """What an expression costs for values of these dimensions, and at most for smaller ones."""

    dimensions: Sequence[int]
    cost_units: int


_Bound = tuple[int, int, int, int, int, int, int]
"""An upper bound: a constant, and factors for the element of each enclosing comprehension, from the outermost on: for
its values and for its characters."""
_ZERO: _Bound = (0, 0, 0, 0, 0, 0, 0)
_ELEMENT_VALUES: Sequence[_Bound] = ((0, 1, 0, 0, 0, 0, 0), (0, 0, 0, 1, 0, 0, 0), (0, 0, 0, 0, 0, 1, 0))
_ELEMENT_CHARACTERS: Sequence[_Bound] = ((0, 0, 1, 0, 0, 0, 0), (0, 0, 0, 0, 1, 0, 0), (0, 0, 0, 0, 0, 0, 1))


class _Value(NamedTuple):
    """Upper bounds on the size of a value; see `Size`."""

    values: _Bound
    """The number of values and keys, itself included."""
    characters: _Bound
    """The characters of all strings in it."""
    longest_nested: int
    """The length of the longest nested list or mapping."""
    longest_string: int
    """The characters of the longest string in it."""
    length: int
    """The number of its own elements or keys."""
    is_string: bool = False
    """Whether it can only be a string."""


class _Comprehension(NamedTuple):
    """An open comprehension, and the interpreter's state when it began."""

    iter_range: _Value
    """The list or mapping that it iterates over."""
    cost: _Bound
    source: object
    """The same as a value of the event; None if it is computed."""
    constructed: int


def _estimated(
    operations: Sequence[Operation], view: EventView, named: Sequence[PassedValue], *, inspects_elements: bool
) -> int:
    """Return the most cost units that the operations take."""
    interpreter = _Interpreter(view, named, inspects_elements=inspects_elements)
    for operation in operations:
        _METHODS[operation.kind](interpreter, operation)
    return interpreter.cost[0] // SCALE


class _Interpreter:
    """An abstract interpreter: runs the operations on bounds instead of values, and adds up what they cost."""

    def __init__(self, view: EventView, named: Sequence[PassedValue], *, inspects_elements: bool) -> None:
        """`inspects_elements`: measure the fields of elements, which gives tighter bounds but takes longer."""
        self.cost = _ZERO
        self._view = view
        self._named = named
        self._inspects_elements = inspects_elements
        self._stack: list[_Value] = []
        self._comprehensions: list[_Comprehension] = []
        self._constructed = 0  # list and mapping literals so far

    def path(self, operation: Operation) -> None:
        named = self._named[operation.number]
        value = _of_event(named)
        self._spend(_plus(_copy_cost(value), _constant(named.path_cost)))
        self._stack.append(value)

    def variable(self, operation: Operation) -> None:
        depth = operation.number - 1
        comprehension = self._comprehensions[depth]
        value = _element(comprehension.iter_range, depth)
        if operation.segment is not None:
            if self._inspects_elements:
                size = self._view.size_in(comprehension.source, operation.segment)
                value = value if size is None else self._limited(value, size)
            self._spend(_times(operation.nodes, _copy_cost(value)))  # It is copied at each segment.
        self._stack.append(value)

    def _limited(self, value: _Value, size: Size) -> _Value:
        return _Value(
            self._least([value.values, _constant(size.values)]),
            self._least([value.characters, _constant(size.characters)]),
            size.longest_nested,
            size.longest_string,
            size.longest,
        )

    def literal(self, operation: Operation) -> None:
        length = operation.number
        self._stack.append(_string(_constant(length), length) if length else _SCALAR)
        self._spend(_constant(CHARACTER_COST * length))

    def scalar(self, operation: Operation) -> None:
        self._pop(operation.number)
        self._stack.append(_SCALAR)

    def compare(self, _: Operation) -> None:
        left, right = self._pop(2)
        self._spend(self._least([_copy_cost(left), _copy_cost(right)]))
        self._stack.append(_SCALAR)

    def membership(self, _: Operation) -> None:
        value, container = self._pop(2)
        self._spend(_copy_cost(container))
        self._spend(self._least([value.characters, _constant(value.longest_string)]))
        self._stack.append(_SCALAR)

    def contains(self, _: Operation) -> None:
        for each in self._pop(2):
            self._spend(_times(SEARCH_COST, self._least([each.characters, _constant(each.longest_string)])))
        self._stack.append(_SCALAR)

    def concatenate(self, _: Operation) -> None:
        first, second = self._stack[-2:]
        if not (first.is_string or second.is_string):
            longest_nested = max(first.longest_nested, second.longest_nested)
            self._combine(2, sum, longest_nested, first.length + second.length)
            return
        self._pop(2)
        value = _string(_plus(first.characters, second.characters), first.longest_string + second.longest_string)
        self._spend(_copy_cost(value))
        self._stack.append(value)

    def construct(self, operation: Operation) -> None:
        self._constructed += 1
        parts = self._stack[len(self._stack) - operation.number :]
        longest_nested = _greatest([max(each.length, each.longest_nested) for each in parts])
        self._combine(operation.number, _greatest, longest_nested, operation.number)

    def _combine(self, count: int, longest: Callable[[Sequence[int]], int], longest_nested: int, length: int) -> None:
        """Replace the last `count` values by one that contains all of them."""
        parts = self._pop(count)
        values, characters = _constant(1), _ZERO
        for each in parts:
            values, characters = _plus(values, each.values), _plus(characters, each.characters)
        longest_string = longest([each.longest_string for each in parts])
        value = _Value(values, characters, longest_nested, longest_string, length)
        self._spend(_copy_cost(value))
        self._stack.append(value)

    def conditional(self, _: Operation) -> None:
        first, second = self._pop(3)[1:]
        self._stack.append(_either(first, second))

    def index(self, _: Operation) -> None:
        value, index = self._pop(2)
        self._spend(self._least([index.characters, _constant(index.longest_string)]))
        element = value._replace(length=value.longest_nested)
        if not value.longest_nested:  # Its elements are no lists or mappings.
            characters = self._least([value.characters, _constant(value.longest_string)])
            element = _Value(_constant(1), characters, 0, value.longest_string, 0)
        self._spend(_copy_cost(element))
        self._stack.append(element)

    def call(self, operation: Operation) -> None:
        arguments = self._pop(operation.number)
        self._spend_on_call(operation.name, arguments)
        self._stack.append(self._result(operation.name, arguments))

    def split(self, operation: Operation) -> None:
        arguments = self._pop(2)
        self._spend_on_call("split", arguments)
        self._stack.append(_split(arguments[0], self._named[operation.number].max_parts))

    def _spend_on_call(self, name: str, arguments: Sequence[_Value]) -> None:
        for each in arguments:
            if name not in NATIVE:
                self._spend(_copy_cost(each))
            if name not in NATIVE or name == "size":
                self._spend(_times(CONVERSION_COST, each.characters))

    def _result(self, name: str, arguments: Sequence[_Value]) -> _Value:
        """Return bounds on what a function returns. What our functions compute is charged when they are called."""
        if name in _SCALAR_FUNCTIONS or not arguments:
            return _SCALAR
        first = arguments[0]
        if name == "default":
            return _either(first, arguments[-1])
        if name in ("bytes", "dyn"):
            return first
        if name == "split":
            return _split(first, min(MAX_ITEMS, first.longest_string + 1))
        if name in _RESULT_LENGTH:
            factor, constant = _RESULT_LENGTH[name]
            length = _plus(_times(factor, first.characters), _constant(constant))
            return _string(length, factor * first.longest_string + constant)
        length = _constant(_MAX_FORMATTED)
        for each in arguments:
            length = _plus(length, _plus(_times(_MAX_ENCODED, each.characters), _times(_MAX_NUMBER, each.values)))
        if name == "replace" and len(arguments) > 2:  # noqa: PLR2004 - each character by the third
            length = _plus(length, _times(arguments[2].longest_string, first.characters))
        if name == "join" and len(arguments) > 1:
            length = _plus(length, _times(arguments[1].longest_string, first.values))
        return _string(self._least([length, _constant(MAX_RESULT)]), min(MAX_RESULT, self._total(length)))

    def comprehension_begin(self, operation: Operation) -> None:
        [iter_range] = self._pop(1)
        source = self._named[operation.number - 1].value if operation.number else None
        self._comprehensions.append(_Comprehension(iter_range, self.cost, source, self._constructed))
        self.cost = _ZERO

    def comprehension_end(self, operation: Operation) -> None:
        *_, result = self._pop(operation.number)
        comprehension, depth = self._comprehensions.pop(), len(self._comprehensions)
        iter_range = comprehension.iter_range
        per_element = _plus(self.cost, _constant(ITERATION_COST + NODE_COST * operation.nodes))
        per_element = _plus(per_element, _copy_cost(_element(iter_range, depth)))
        iterations = self._iterations(iter_range)
        self.cost = _plus(comprehension.cost, _over_elements(iter_range, depth, per_element, iterations))
        copies = iter_range.length
        match operation.name:
            case "map":
                values = _plus(_constant(1), _over_elements(iter_range, depth, result.values, iterations))
                characters = _over_elements(iter_range, depth, result.characters, iterations)
                longest_nested = max(result.length, result.longest_nested)
                value = _Value(values, characters, longest_nested, result.longest_string, iter_range.length)
            case "filter":
                value = iter_range
                # If the condition allocates between the copies, they are scattered in memory.
                copies *= 1 if self._constructed == comprehension.constructed else 3
            case _:
                self._stack.append(_SCALAR)
                return
        # For each element, CEL copies the result so far: half of it on average, but to newly allocated memory.
        self._spend(_times(copies, _copy_cost(value)))
        self._stack.append(value)

    def _iterations(self, iter_range: _Value) -> _Bound:
        """Return how many elements there are. Nested in another comprehension, no more than its element has values."""
        return self._least([_constant(iter_range.length), iter_range.values])

    def _least(self, bounds: Sequence[_Bound]) -> _Bound:
        """Return the bound with the least total."""
        least = bounds[0]
        for each in bounds[1:]:
            if self._total(each) < self._total(least):
                least = each
        return least

    def _total(self, bound: _Bound) -> int:
        """Return the sum of a bound over all elements of the enclosing comprehensions."""
        for depth in range(len(self._comprehensions) - 1, -1, -1):
            iter_range = self._comprehensions[depth].iter_range
            bound = _over_elements(iter_range, depth, bound, _constant(iter_range.length))
        return bound[0]

    def _spend(self, cost: _Bound) -> None:
        self.cost = _plus(self.cost, cost)

    def _pop(self, count: int) -> Sequence[_Value]:
        at = len(self._stack) - count
        values = self._stack[at:]
        del self._stack[at:]
        return values


_METHODS: Mapping[Kind, Callable[[_Interpreter, Operation], None]] = {
    Kind.PATH: _Interpreter.path,
    Kind.VARIABLE: _Interpreter.variable,
    Kind.LITERAL: _Interpreter.literal,
    Kind.SCALAR: _Interpreter.scalar,
    Kind.COMPARE: _Interpreter.compare,
    Kind.MEMBERSHIP: _Interpreter.membership,
    Kind.CONTAINS: _Interpreter.contains,
    Kind.CONCATENATE: _Interpreter.concatenate,
    Kind.CONSTRUCT: _Interpreter.construct,
    Kind.CONDITIONAL: _Interpreter.conditional,
    Kind.INDEX: _Interpreter.index,
    Kind.CALL: _Interpreter.call,
    Kind.SPLIT: _Interpreter.split,
    Kind.COMPREHENSION_BEGIN: _Interpreter.comprehension_begin,
    Kind.COMPREHENSION_END: _Interpreter.comprehension_end,
}


def _constant(number: int) -> _Bound:
    return (number, 0, 0, 0, 0, 0, 0)


def _plus(first: _Bound, second: _Bound) -> _Bound:
    return tuple(map(add, first, second))


def _times(factor: int, bound: _Bound) -> _Bound:
    return tuple([factor * part for part in bound])  # type: ignore[return-value] # as many as it has


def _over_elements(iter_range: _Value, depth: int, per_element: _Bound, iterations: _Bound) -> _Bound:
    """Return the sum of a bound over the elements of a comprehension, at this depth of nesting (0 is the outermost)."""
    constant, *factors = per_element
    values, characters = factors[2 * depth : 2 * depth + 2]
    factors[2 * depth : 2 * depth + 2] = (0, 0)
    total = _times(constant, iterations)
    if any(factors):  # for the elements of enclosing comprehensions
        total = _plus(total, _times(iter_range.length, (0, *factors)))  # type: ignore[arg-type] # as many as it had
    if values:
        total = _plus(total, _times(values, iter_range.values))
    return _plus(total, _times(characters, iter_range.characters)) if characters else total


def _element(iter_range: _Value, depth: int) -> _Value:
    """Return bounds on one element of a comprehension at this depth."""
    longest, string = iter_range.longest_nested, iter_range.longest_string
    return _Value(_ELEMENT_VALUES[depth], _ELEMENT_CHARACTERS[depth], longest, string, longest)


def _of_event(named: PassedValue) -> _Value:
    size, is_string = named.size, isinstance(named.value, str)
    values, characters = _constant(size.values), _constant(size.characters)
    return _Value(values, characters, size.longest_nested, size.longest_string, named.length, is_string)


def _string(characters: _Bound, longest_string: int) -> _Value:
    return _Value(_constant(1), characters, 0, longest_string, 0, is_string=True)


def _split(string: _Value, max_parts: int) -> _Value:
    """Return bounds on the list of a string's parts."""
    values = _constant(1 + max_parts) if string.characters[0] else _plus(_constant(2), string.characters)
    return _Value(values, string.characters, 0, string.longest_string, max_parts)


def _copy_cost(value: _Value) -> _Bound:
    """Return the cost of copying a value, or of comparing it with another."""
    per_value = VALUE_COST if max(value.length, value.longest_nested) < LARGE else 2 * VALUE_COST
    return _plus(_times(per_value, value.values), _times(CHARACTER_COST, value.characters))


def _either(first: _Value, second: _Value) -> _Value:
    """Return bounds that hold for both values."""
    return _Value(
        tuple(map(max, first.values, second.values)),  # type: ignore[arg-type] # as many as these have
        tuple(map(max, first.characters, second.characters)),  # type: ignore[arg-type]
        max(first.longest_nested, second.longest_nested),
        max(first.longest_string, second.longest_string),
        max(first.length, second.length),
        first.is_string and second.is_string,
    )


def _greatest(numbers: Sequence[int]) -> int:
    return max(numbers, default=0)


_SCALAR = _Value(_constant(1), _ZERO, 0, 0, 0)
