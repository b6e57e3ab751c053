"""Calls of our functions by CEL: over one view of an event, whose budget each is charged to."""

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from types import MethodType

from gateway.model import ExpressionError, MissingFieldError
from gateway.rules.event_view import ABSENT, CONVERTING, PASSING, READING, EventView, measured
from gateway.rules.functions import FUNCTIONS, Function, cost
from gateway.rules.patterns import Pattern
from gateway.rules.scanner import Analysis

HMAC_STEPS = 40
"""Steps of 0.1 µs for the shortest text."""
CALL_STEPS = 20
"""Steps of 0.1 µs for a call."""
ITEM_STEPS = 60
"""Steps of 0.1 µs to evaluate a condition for one item by itself."""
ITEMS_AT_ONCE = 32
"""Few have an item for which the condition fails."""
NO_MATCHES = "matches isn't defined for such a value"


class Calls:
    """The calls of our functions of one expression over one view. `refusal` is why the last one failed, if it did.

    CEL prints an exception that a function raises: a result that it can't convert, such as ABSENT, is an error as well.
    """

    __slots__ = ("_analysis", "_bind", "_names", "failure", "is_spent", "refusal", "view")

    def __init__(
        self,
        analysis: Analysis,
        view: EventView,
        names: Collection[str],
        bind: Callable[["Calls", int, tuple[object, ...]], Callable[[list[object]], bool] | None],
    ) -> None:
        """`names` are those that the expression calls; `bind` returns a condition of `exists` and `all` by its number.

        A condition takes items and returns what `exists` or `all` is of them. It raises ExpressionError where it fails
        for one of them. None if that takes too long.
        """
        self._analysis = analysis
        self._names = names
        self._bind = bind
        self.view: EventView | None = view
        self.is_spent = False
        self.refusal: str | None = None
        self.failure: ExpressionError | None = None
        """Why the last `exists` or `all` had no value."""

    def functions(self) -> Iterator[tuple[str, Callable[..., object]]]:
        """Yield them with the names that the expression has for them."""
        for name in self._names:
            function = name.removesuffix("__")
            of_view = _OF_VIEW.get(function)
            yield name, partial(self._call, function) if of_view is None else MethodType(of_view, self)

    def matches(self, text: object, number: int) -> object:
        if type(text) is not str or self.view is None or self.is_spent:
            self.refusal = NO_MATCHES
            return ABSENT
        is_found = is_found_in(self._analysis.patterns[number], text, self.view)
        if is_found is None:
            self.is_spent = True
            return ABSENT
        return is_found

    def extract(self, text: object, number: int) -> object:
        if type(text) is not str or self.view is None or self.is_spent:
            self.refusal = "extract isn't defined for such a value"
            return ABSENT
        pattern, data = self._analysis.patterns[number], text.encode("utf-8", "surrogatepass")
        if not self.view.spend(pattern.cost(len(data))):
            self.is_spent = True
            return ABSENT
        return pattern.extract(data).decode("utf-8", "replace")

    def hmac(self, value: object, number: int) -> object:
        view = self.view
        if not isinstance(value, str | bytes) or view is None or self.is_spent:
            self.refusal = "hmac: expected a string or bytes"
            return ABSENT
        if not view.spend(HMAC_STEPS + cost(value)):
            self.is_spent = True
            return ABSENT
        return self._analysis.secrets[number].digest(value)

    def default(self, number: int, otherwise: object) -> object:
        """Return the value of a path by its number, or else the other argument, where it is missing or null."""
        path = self._analysis.paths[number]
        view = self.view
        if view is None or self.is_spent:
            return ABSENT
        value = view.get(path.root, path.steps)
        if value is ABSENT or value is None:
            return otherwise
        if view.spend(PASSING * view.size(value).total):
            return value
        self.is_spent = True
        return ABSENT

    def characters(self, text: object) -> object:
        """Return the length of a string, which CEL's library counts in bytes."""
        return self._spent_on(len(text), CALL_STEPS + len(text) // 64) if type(text) is str else ABSENT

    def ordered(self, mapping: object) -> object:
        """Return the keys of a mapping in order, as the strings that JSON has for them."""
        if not isinstance(mapping, dict):
            return ABSENT
        keys = _in_order(mapping)
        return self._spent_on(keys, CALL_STEPS + CONVERTING * measured(mapping).total + self._cost_of_loops(keys))

    def _spent_on(self, result: object, steps: int) -> object:
        if self.view is None or self.is_spent:
            return ABSENT
        if self.view.spend(steps):
            return result
        self.is_spent = True
        return ABSENT

    def exists(self, items: object, number: int, *outer: object) -> object:
        return self._decided(items, number, outer, decisive=True)

    def all(self, items: object, number: int, *outer: object) -> object:
        return self._decided(items, number, outer, decisive=False)

    def _decided(self, items: object, number: int, outer: tuple[object, ...], *, decisive: bool) -> object:
        """Return `decisive` if the condition is that for some item, in spite of those for which it fails.

        If it fails for some and is decisive for none, there is no value, and `failure` is why: an error rather than a
        missing field, whatever the order of the items.
        """
        if isinstance(items, dict):
            items = _in_order(items)
        if not isinstance(items, list):
            self.refusal, self.failure = "an operand has the wrong type", None
            return ABSENT
        passed = sum([measured(each).total for each in (items, *outer)])
        if self._spent_on(items, (CONVERTING + 2 * PASSING) * passed) is ABSENT:
            return ABSENT
        condition = self._bind(self, number, outer)
        if condition is None:
            self.is_spent = True
            return ABSENT
        failures: list[ExpressionError] = []
        parts = [items[first : first + ITEMS_AT_ONCE] for first in range(0, len(items), ITEMS_AT_ONCE)]
        while parts:
            part = parts.pop()
            try:
                if condition(part) is decisive:
                    return decisive
            except ExpressionError as error:
                self.refusal = None
                if len(part) > 1:
                    parts += [[item] for item in part]
                else:
                    error.__cause__ = error.__context__ = None  # which, as the traceback, hold what was evaluated
                    failures.append(error.with_traceback(None))
            if self.is_spent:
                return ABSENT
        self.failure = min(failures, key=lambda error: isinstance(error, MissingFieldError), default=None)
        return ABSENT if failures else not decisive

    def _call(self, function: str, *arguments: object) -> object:
        if self.view is None or self.is_spent:
            return ABSENT
        try:
            return self._charged(FUNCTIONS[function], self.view, arguments)
        except ExpressionError as error:
            self.refusal = f"{function}: {error}"
        except RecursionError:
            self.refusal = f"{function}: nested too deeply"
        except (ArithmeticError, LookupError, TypeError, ValueError):
            self.refusal = f"{function}: expected another value"
        return ABSENT

    def _charged(self, function: Function, view: EventView, arguments: tuple[object, ...]) -> object:
        if view.spend(function.steps + sum(map(cost, arguments))):
            result = function.call(*arguments)
            if view.spend(cost(result) + self._cost_of_loops(result)):
                return result
        self.is_spent = True
        return ABSENT

    def _cost_of_loops(self, result: object) -> int:
        """Return the steps that macros may take over a list of ours, as `Expression._charge` has it for those named."""
        if not isinstance(result, list) or not self._analysis.has_macros:
            return 0
        length = len(result)
        in_loops: int = length**self._analysis.depth
        return length * max(max(self._analysis.copies, 1) * in_loops, READING)


_OF_VIEW: Mapping[str, Callable[..., object]] = {
    "matches": Calls.matches,
    "extract": Calls.extract,
    "default": Calls.default,
    "hmac": Calls.hmac,
    "exists": Calls.exists,
    "all": Calls.all,
    "ordered": Calls.ordered,
    "characters": Calls.characters,
}
"""The functions that need more than their arguments, and those that stand for CEL's own."""


def _in_order(mapping: Mapping[object, object]) -> list[object]:
    """Return the keys of a mapping; those that aren't strings, which only CEL has, come first."""
    return sorted(mapping, key=lambda key: (isinstance(key, str), isinstance(key, str) or key, str(key)))


def is_found_in(pattern: Pattern, text: str, view: EventView) -> bool | None:
    """Search for a pattern, charged to the view; None if that has too few steps left."""
    data = text.encode("utf-8", "surrogatepass")
    return pattern.is_in(data) if view.spend(pattern.cost(len(data))) else None
