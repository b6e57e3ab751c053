"""Our functions as CEL calls them, for one view of an event. Each call spends something of the view's budget."""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from types import MethodType

from gateway.model import ExpressionError, MissingFieldError
from gateway.rules.event_view import ABSENT, CONVERTING, PASSING, READING, EventView, measured
from gateway.rules.functions import FUNCTIONS, Function, cost
from gateway.rules.patterns import Pattern
from gateway.rules.scanner import Analysis

HMAC_COST = 40
"""Cost units (0.1 µs) of `hmac` for the shortest text."""
CALL_COST = 20
"""Cost units of a call, apart from its arguments."""
ELEMENT_COST = 60
"""Cost units of evaluating a short condition for a single element."""
BINDING_COST = 400
"""Cost units of preparing a condition for that."""
TOLD_COST = 12
"""Cost units of `told` or `failed` for one element."""
CHARACTERS_PER_COST_UNIT = 20
"""How much text of a condition is evaluated for one cost unit."""
ELEMENTS_AT_ONCE = 32
"""Elements for which a condition is evaluated together; only if that fails, one by one."""
FAILURES = (LookupError, TypeError, RuntimeError, ArithmeticError, ValueError)
"""The exceptions that the CEL library raises."""
_CONDITION_ERROR = re.compile("Function '(exists|all|some|every)__'")
WRONG_TYPE = "an operand has the wrong type"
NO_MATCHES = "matches isn't defined for such a value"


@dataclass(slots=True)
class Condition:
    """A condition of `exists` or `all`, bound to one view and to the variables of the outer macros."""

    calls: "Calls"
    evaluate: Callable[[list[object]], object]
    """Returns the value of `exists` or `all` for these elements. Raises CEL's error if the condition fails for any."""
    explain: Callable[[Exception], ExpressionError]
    """Returns the error to report for one that was just raised. Slow."""
    finds_scalar: Callable[[], bool]
    """Returns whether a path has a field of a scalar: then a wrong type is a missing field. Slow."""
    named: int
    """How many values it names besides the elements."""
    length: int
    """The characters of its text."""
    _has_scalar: bool | None = None

    def is_met(self, elements: list[object]) -> bool:
        """Evaluate it for these elements. Raises CEL's errors, and ExpressionError if the budget doesn't suffice."""
        calls = self.calls
        # What it names is measured, and copied for each element.
        per_element = READING + 2 * self.named + self.length // CHARACTERS_PER_COST_UNIT
        if not calls.pay(ELEMENT_COST + READING * self.named + per_element * len(elements)):
            raise ExpressionError("too much to compute")
        calls.refusal = calls.failure = calls.undecided = None
        value = self.evaluate(elements)
        if isinstance(value, bool):
            return value
        calls.refusal = WRONG_TYPE
        raise ExpressionError(WRONG_TYPE)

    def is_missing(self, error: Exception) -> bool:
        """Return whether `explain` would return a missing field for an error that was just raised."""
        if isinstance(error, LookupError):
            return True
        view = self.calls.view
        if isinstance(error, TypeError) or view is None or not view.has_body:
            if self._has_scalar is None:
                self._has_scalar = self.finds_scalar()
            if self._has_scalar:
                return True
        return isinstance(self.calls.failure, MissingFieldError) and is_of_condition(error)


class _Found:
    """The results of one `exists` or `all` so far."""

    __slots__ = ("cost_units", "count", "decisive", "failed", "is_decided")

    def __init__(self, *, decisive: bool, cost_units: int) -> None:
        self.decisive = decisive
        """The value of the condition with which a single element decides the result."""
        self.cost_units = cost_units
        """For each element."""
        self.is_decided = False
        self.count = 0
        self.failed: list[int] = []
        """The positions of the elements for which the condition failed."""


class Calls:
    """Our functions for one evaluation of an expression over a view. `refusal` is why the last call failed, if it did.

    A function that fails returns ABSENT: CEL can't convert it, so that is an error. CEL would print an exception.
    """

    __slots__ = (
        "_analysis",
        "_bind",
        "_found",
        "_matched",
        "_names",
        "_paid",
        "failure",
        "is_spent",
        "refusal",
        "undecided",
        "view",
    )

    def __init__(
        self,
        analysis: Analysis,
        view: EventView,
        names: Collection[str],
        bind: Callable[["Calls", int, tuple[object, ...]], Condition | None],
        paid: int = 0,
        *,
        matched: dict[tuple[int, str], bool] | None = None,
    ) -> None:
        """`names` are the functions that the expression calls.

        `bind` returns a condition of `exists` or `all` by its index, or None if the budget doesn't suffice. `paid` is
        how many cost units the view has already spent for elements. `matched` keeps the results of `matches` for a
        second evaluation, by the pattern's index and the string.
        """
        self._analysis = analysis
        self._names = names
        self._bind = bind
        self.view: EventView | None = view
        self.is_spent = False
        """Whether the budget didn't suffice for a call."""
        self.refusal: str | None = None
        self.failure: ExpressionError | None = None
        """Why the last `exists` or `all` had no value."""
        self.undecided: int | None = None
        """The index of the last `exists` or `all` that had no value for an unknown reason."""
        self._found: dict[int, _Found] = {}
        self._paid = paid
        self._matched = matched

    def functions(self) -> Iterator[tuple[str, Callable[..., object]]]:
        """Yield the functions with their names in the compiled text."""
        for name in self._names:
            function = name.removesuffix("__")
            of_view = _OF_VIEW.get(function)
            yield name, partial(self._call, function) if of_view is None else MethodType(of_view, self)

    def matches(self, text: object, number: int) -> object:
        if type(text) is not str or self.view is None or self.is_spent:
            self.refusal = NO_MATCHES
            return ABSENT
        matched = self._matched
        if matched is not None and (known := matched.get((number, text))) is not None:
            return known
        is_found = is_found_in(self._analysis.patterns[number], text, self.view)
        if is_found is None:
            self.is_spent = True
            return ABSENT
        if matched is not None:
            matched[number, text] = is_found
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
        if not view.spend(HMAC_COST + cost(value)):
            self.is_spent = True
            return ABSENT
        return self._analysis.secrets[number].digest(value)

    def default(self, number: int, otherwise: object) -> object:
        """Return the value at a path, by its index; the other argument if it is missing or null."""
        path = self._analysis.paths[number]
        view = self.view
        if view is None or self.is_spent:
            return ABSENT
        value = view.get(path.root, path.segments)
        if value is ABSENT or value is None:
            return self._spent_on(otherwise, CALL_COST + (CONVERTING + PASSING) * measured(otherwise).values)
        return self._spent_on(value, CALL_COST + PASSING * view.size(value).values)

    def characters(self, text: object) -> object:
        """Return the length of a string in characters; the CEL library counts bytes."""
        return (
            self._spent_on(len(text), CALL_COST + len(text) // CHARACTERS_PER_COST_UNIT)
            if type(text) is str
            else ABSENT
        )

    def ordered(self, mapping: object) -> object:
        """Return the sorted keys of a mapping."""
        if not isinstance(mapping, dict):
            return ABSENT
        keys = _in_order(mapping)
        return self._spent_on(keys, CALL_COST + CONVERTING * measured(mapping).values)

    def _spent_on(self, result: object, cost_units: int) -> object:
        if self.view is None or self.is_spent:
            return ABSENT
        if self.view.spend(cost_units):
            return result
        self.is_spent = True
        return ABSENT

    def begin(self, number: int, decisive: bool, length: int) -> object:  # noqa: FBT001 - CEL has no keywords
        """Begin an `exists` or `all` whose condition has `length` characters."""
        self._found[number] = _Found(decisive=decisive, cost_units=TOLD_COST + length // CHARACTERS_PER_COST_UNIT)
        return True if self.pay(2 * CALL_COST) else ABSENT

    def told(self, number: int, value: object) -> object:
        """Take the value of the condition for the next element; return whether to continue with the others."""
        found = self._found[number]
        if type(value) is not bool:
            return self._spent_on(ABSENT, CONVERTING * measured(value).values)
        if not self.pay(found.cost_units):
            return ABSENT
        found.is_decided = value is found.decisive
        found.count += 1
        return not found.is_decided

    def failed(self, number: int) -> object:
        """Note that the condition fails for the next element, unless `told` just decided; return the same as `told`."""
        found = self._found[number]
        if self.is_spent or found.is_decided:
            return ABSENT if self.is_spent else False
        if not self.pay(found.cost_units):
            return ABSENT
        found.failed.append(found.count)
        found.count += 1
        return True

    def decided(self, number: int, _: object) -> object:
        """Return the result of `exists` or `all`; ABSENT if an element for which it failed could have decided it."""
        found = self._found[number]
        if self.is_spent:
            return ABSENT
        if found.failed and not found.is_decided:
            self.undecided = number
            return ABSENT
        return found.decisive if found.is_decided else not found.decisive

    def why(self, number: int, elements: object) -> ExpressionError | None:
        """Return why `exists` or `all` had no value, given its elements; None if the budget doesn't suffice."""
        if isinstance(elements, dict):
            elements = _in_order(elements)
        condition = self._bind(self, number, ()) if self.pay(BINDING_COST) else None
        if condition is None or not isinstance(elements, list):
            return None
        failures = _Failures(condition)
        for position in self._found[number].failed:
            element = elements[position]
            if not self.pay(PASSING * measured(element).values):
                return None
            try:
                condition.is_met([element])
            except (*FAILURES, ExpressionError) as error:
                failures.add(error)
            if self.is_spent or failures.has_error:
                break
        return None if self.is_spent else failures.first

    def some(self, elements: object, number: int, *outer: object) -> object:
        return self._explained(elements, number, outer, decisive=True)

    def every(self, elements: object, number: int, *outer: object) -> object:
        return self._explained(elements, number, outer, decisive=False)

    def _explained(self, elements: object, number: int, outer: tuple[object, ...], *, decisive: bool) -> object:
        """Return `decisive` if the condition has that value for any element, even if it fails for others.

        If it fails for some and is decisive for none, there is no value, and `failure` says why. An error takes
        precedence over a missing field, whatever the order of the elements.
        """
        if isinstance(elements, dict):
            elements = _in_order(elements)
        if not isinstance(elements, list):
            self.refusal, self.failure = WRONG_TYPE, None
            return ABSENT
        passed = sum([measured(each).values for each in (elements, *outer)])
        if not self.pay(BINDING_COST + (CONVERTING + 2 * PASSING) * passed):
            return ABSENT
        condition = self._bind(self, number, outer)
        if condition is None:
            self.is_spent = True
            return ABSENT
        before = self.refusal, self.failure  # of another call, whose error CEL may still report
        failures = _Failures(condition)
        parts = [elements[first : first + ELEMENTS_AT_ONCE] for first in range(0, len(elements), ELEMENTS_AT_ONCE)]
        while parts:
            part = parts.pop()
            try:
                if condition.is_met(part) is decisive:
                    self.refusal, self.failure = before
                    return decisive
            except (*FAILURES, ExpressionError) as error:
                if len(part) > 1:
                    parts += [[element] for element in part]
                else:
                    failures.add(error)
            if self.is_spent:
                return ABSENT
        self.refusal, self.failure = before if failures.first is None else (None, failures.first)
        return not decisive if failures.first is None else ABSENT

    def pay(self, cost_units: int) -> bool:
        """Spend cost units, first of those that are already paid."""
        if cost_units <= self._paid:
            self._paid -= cost_units
            return True
        if self.view is not None and not self.is_spent and self.view.spend(cost_units - self._paid):
            self._paid = 0
            return True
        self.is_spent = True
        return False

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
        if view.spend(function.base_cost + function.weight * sum(map(cost, arguments))):
            result = function.call(*arguments)
            if view.spend(cost(result)):
                return result
        self.is_spent = True
        return ABSENT


_OF_VIEW: Mapping[str, Callable[..., object]] = {
    "matches": Calls.matches,
    "extract": Calls.extract,
    "default": Calls.default,
    "hmac": Calls.hmac,
    "begin": Calls.begin,
    "told": Calls.told,
    "failed": Calls.failed,
    "exists": Calls.decided,
    "all": Calls.decided,
    "some": Calls.some,
    "every": Calls.every,
    "ordered": Calls.ordered,
    "characters": Calls.characters,
}
"""The functions that need the view or the analysis, and those that replace CEL's own."""


class _Failures:
    """Which failure of a condition to report: the first error, otherwise the first missing field."""

    __slots__ = ("_condition", "first", "has_error")

    def __init__(self, condition: Condition) -> None:
        self._condition = condition
        self.first: ExpressionError | None = None
        self.has_error = False

    def add(self, error: Exception) -> None:
        if self.has_error:
            return
        is_missing = self._condition.is_missing(error)
        if is_missing and self.first is not None:
            return
        self.has_error = not is_missing
        told = self._condition.explain(error)
        told.__cause__ = told.__context__ = None  # These and the traceback hold what was evaluated.
        self.first = told.with_traceback(None)


def _in_order(mapping: Mapping[object, object]) -> list[object]:
    """Return the sorted keys of a mapping. Those that aren't strings, which only CEL has, come first."""
    return sorted(mapping, key=lambda key: (isinstance(key, str), isinstance(key, str) or key, str(key)))


def is_found_in(pattern: Pattern, text: str, view: EventView) -> bool | None:
    """Return whether a pattern is found; None if the view's budget doesn't suffice for the search."""
    data = text.encode("utf-8", "surrogatepass")
    return pattern.is_in(data) if view.spend(pattern.cost(len(data))) else None


def is_of_condition(error: BaseException | None) -> bool:
    """Return whether CEL raised an error because `exists` or `all` had no value."""
    return _CONDITION_ERROR.search(str(error)) is not None
