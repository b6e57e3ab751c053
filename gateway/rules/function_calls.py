"""Calls of our functions by CEL: over one view of an event, whose budget each is charged to."""

from collections.abc import Callable, Iterator
from functools import partial
from types import MethodType

from gateway.model import ExpressionError
from gateway.rules.event_view import ABSENT, PASSING, READING, EventView
from gateway.rules.functions import FUNCTIONS, Function, cost
from gateway.rules.patterns import Pattern
from gateway.rules.scanner import Analysis

HMAC_STEPS = 40
"""Steps of 0.1 µs for the shortest text."""
NO_MATCHES = "matches isn't defined for such a value"


class Calls:
    """The calls of our functions of one expression over one view. `refusal` is why the last one failed, if it did.

    CEL prints an exception that a function raises: a result that it can't convert, such as ABSENT, is an error as well.
    """

    __slots__ = ("_analysis", "is_spent", "refusal", "view")

    def __init__(self, analysis: Analysis, view: EventView) -> None:
        self._analysis = analysis
        self.view: EventView | None = view
        self.is_spent = False
        self.refusal: str | None = None

    def functions(self) -> Iterator[tuple[str, Callable[..., object]]]:
        """Yield them with the names that the expression has for them."""
        for name in self._analysis.calls:
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


_OF_VIEW = {"matches": Calls.matches, "extract": Calls.extract, "default": Calls.default, "hmac": Calls.hmac}
"""The functions that need more than their arguments."""


def is_found_in(pattern: Pattern, text: str, view: EventView) -> bool | None:
    """Search for a pattern, charged to the view; None if that has too few steps left."""
    data = text.encode("utf-8", "surrogatepass")
    return pattern.is_in(data) if view.spend(pattern.cost(len(data))) else None
