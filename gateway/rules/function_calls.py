"""Calls of our functions by CEL: over one view of an event, whose budget each is charged to."""

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

HMAC_STEPS = 40
"""Steps of 0.1 µs for the shortest text."""
CALL_STEPS = 20
"""Steps of 0.1 µs for a call."""
ITEM_STEPS = 60
"""Steps of 0.1 µs to evaluate a short condition for one item by itself."""
BINDING_STEPS = 400
"""Steps of 0.1 µs to have a condition ready for that."""
TOLD_STEPS = 12
"""Steps of 0.1 µs for what is told of one item."""
CHARACTERS_IN_A_STEP = 20
"""How much of a condition is evaluated in 0.1 µs."""
ITEMS_AT_ONCE = 32
"""Few have an item for which the condition fails."""
FAILURES = (LookupError, TypeError, RuntimeError, ArithmeticError, ValueError)
"""What CEL raises."""
_OF_A_CONDITION = re.compile("Function '(exists|all|some|every)__'")
WRONG_TYPE = "an operand has the wrong type"
NO_MATCHES = "matches isn't defined for such a value"


@dataclass(slots=True)
class Condition:
    """A condition of `exists` or `all`, over one view, with the variables of the macros around it."""

    calls: "Calls"
    evaluate: Callable[[list[object]], object]
    """Returns what `exists` or `all` is of the items; raises what CEL does if the condition fails for one of them."""
    explain: Callable[[Exception], ExpressionError]
    """Returns what is to be told of an error that was just raised; takes long."""
    finds_scalar: Callable[[], bool]
    """Whether a path steps into a scalar, which makes a wrong type a missing field; takes long."""
    named: int
    """How many values it names beside the items."""
    length: int
    """Characters."""
    _has_scalar: bool | None = None

    def is_met(self, items: list[object]) -> bool:
        """Evaluate it, charged to the view. Raises ExpressionError beside what CEL does."""
        calls = self.calls
        # What is named is measured, too, and copied for each item.
        of_item = READING + 2 * self.named + self.length // CHARACTERS_IN_A_STEP
        if not calls.pay(ITEM_STEPS + READING * self.named + of_item * len(items)):
            raise ExpressionError("too much to compute")
        calls.refusal = calls.failure = calls.undecided = None
        value = self.evaluate(items)
        if isinstance(value, bool):
            return value
        calls.refusal = WRONG_TYPE
        raise ExpressionError(WRONG_TYPE)

    def is_missing(self, error: Exception) -> bool:
        """Return whether an error that was just raised is a missing field, as `explain` has it."""
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
    """What is known of the items of one `exists` or `all`."""

    __slots__ = ("count", "decisive", "failed", "is_decided", "steps")

    def __init__(self, *, decisive: bool, steps: int) -> None:
        self.decisive = decisive
        """What the condition has to be for one item to decide it."""
        self.steps = steps
        self.is_decided = False
        self.count = 0
        self.failed: list[int] = []
        """The positions of those for which the condition fails."""


class Calls:
    """The calls of our functions of one expression over one view. `refusal` is why the last one failed, if it did.

    CEL prints an exception that a function raises: a result that it can't convert, such as ABSENT, is an error as well.
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
        """`names` are those that the expression calls; `bind` returns a condition of `exists` and `all` by its number.

        None if that takes too long. `paid` are the steps for items that the view was charged before. `matched` keeps
        which strings each pattern is found in, by its number, for a second evaluation.
        """
        self._analysis = analysis
        self._names = names
        self._bind = bind
        self.view: EventView | None = view
        self.is_spent = False
        self.refusal: str | None = None
        self.failure: ExpressionError | None = None
        """Why the last `exists` or `all` had no value."""
        self.undecided: int | None = None
        """The number of the last `exists` or `all` that had no value, while nobody knows why."""
        self._found: dict[int, _Found] = {}
        self._paid = paid
        self._matched = matched

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
            return self._spent_on(otherwise, CALL_STEPS + (CONVERTING + PASSING) * measured(otherwise).total)
        return self._spent_on(value, CALL_STEPS + PASSING * view.size(value).total)

    def characters(self, text: object) -> object:
        """Return the length of a string, which CEL's library counts in bytes."""
        return (
            self._spent_on(len(text), CALL_STEPS + len(text) // CHARACTERS_IN_A_STEP) if type(text) is str else ABSENT
        )

    def ordered(self, mapping: object) -> object:
        """Return the keys of a mapping in order, as the strings that JSON has for them."""
        if not isinstance(mapping, dict):
            return ABSENT
        keys = _in_order(mapping)
        return self._spent_on(keys, CALL_STEPS + CONVERTING * measured(mapping).total)

    def _spent_on(self, result: object, steps: int) -> object:
        if self.view is None or self.is_spent:
            return ABSENT
        if self.view.spend(steps):
            return result
        self.is_spent = True
        return ABSENT

    def begin(self, number: int, decisive: bool, length: int) -> object:  # noqa: FBT001 - CEL has no keywords
        """Begin an `exists` or `all` with a condition of this many characters."""
        self._found[number] = _Found(decisive=decisive, steps=TOLD_STEPS + length // CHARACTERS_IN_A_STEP)
        return True if self.pay(2 * CALL_STEPS) else ABSENT

    def told(self, number: int, value: object) -> object:
        """Take what the condition is for an item; return whether the others are still to be looked at."""
        found = self._found[number]
        if type(value) is not bool:
            return self._spent_on(ABSENT, CONVERTING * measured(value).total)
        if not self.pay(found.steps):
            return ABSENT
        found.is_decided = value is found.decisive
        found.count += 1
        return not found.is_decided

    def failed(self, number: int) -> object:
        """Take that the condition fails for an item, unless that has just decided; return what `told` does."""
        found = self._found[number]
        if self.is_spent or found.is_decided:
            return ABSENT if self.is_spent else False
        if not self.pay(found.steps):
            return ABSENT
        found.failed.append(found.count)
        found.count += 1
        return True

    def decided(self, number: int, _: object) -> object:
        """Return what `exists` or `all` is, given what was told; no value if it isn't known what an item would be."""
        found = self._found[number]
        if self.is_spent:
            return ABSENT
        if found.failed and not found.is_decided:
            self.undecided = number
            return ABSENT
        return found.decisive if found.is_decided else not found.decisive

    def why(self, number: int, items: object) -> ExpressionError | None:
        """Return why `exists` or `all` had no value, given its items; None if that takes too long."""
        if isinstance(items, dict):
            items = _in_order(items)
        condition = self._bind(self, number, ()) if self.pay(BINDING_STEPS) else None
        if condition is None or not isinstance(items, list):
            return None
        failures = _Failures(condition)
        for position in self._found[number].failed:
            item = items[position]
            if not self.pay(PASSING * measured(item).total):
                return None
            try:
                condition.is_met([item])
            except (*FAILURES, ExpressionError) as error:
                failures.add(error)
            if self.is_spent or failures.has_error:
                break
        return None if self.is_spent else failures.first

    def some(self, items: object, number: int, *outer: object) -> object:
        return self._explained(items, number, outer, decisive=True)

    def every(self, items: object, number: int, *outer: object) -> object:
        return self._explained(items, number, outer, decisive=False)

    def _explained(self, items: object, number: int, outer: tuple[object, ...], *, decisive: bool) -> object:
        """Return `decisive` if the condition is that for some item, in spite of those for which it fails.

        If it fails for some and is decisive for none, there is no value, and `failure` is why: an error rather than a
        missing field, whatever the order of the items.
        """
        if isinstance(items, dict):
            items = _in_order(items)
        if not isinstance(items, list):
            self.refusal, self.failure = WRONG_TYPE, None
            return ABSENT
        passed = sum([measured(each).total for each in (items, *outer)])
        if not self.pay(BINDING_STEPS + (CONVERTING + 2 * PASSING) * passed):
            return ABSENT
        condition = self._bind(self, number, outer)
        if condition is None:
            self.is_spent = True
            return ABSENT
        before = self.refusal, self.failure  # of another one, of which CEL may have something to say yet
        failures = _Failures(condition)
        parts = [items[first : first + ITEMS_AT_ONCE] for first in range(0, len(items), ITEMS_AT_ONCE)]
        while parts:
            part = parts.pop()
            try:
                if condition.is_met(part) is decisive:
                    self.refusal, self.failure = before
                    return decisive
            except (*FAILURES, ExpressionError) as error:
                if len(part) > 1:
                    parts += [[item] for item in part]
                else:
                    failures.add(error)
            if self.is_spent:
                return ABSENT
        self.refusal, self.failure = before if failures.first is None else (None, failures.first)
        return not decisive if failures.first is None else ABSENT

    def pay(self, steps: int) -> bool:
        """Spend steps, of those that are paid first."""
        if steps <= self._paid:
            self._paid -= steps
            return True
        if self.view is not None and not self.is_spent and self.view.spend(steps - self._paid):
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
        if view.spend(function.steps + function.weight * sum(map(cost, arguments))):
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
"""The functions that need more than their arguments, and those that stand for CEL's own."""


class _Failures:
    """Of the items for which a condition fails, what is told: the first error, or else the first missing field."""

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
        told.__cause__ = told.__context__ = None  # which, as the traceback, hold what was evaluated
        self.first = told.with_traceback(None)


def _in_order(mapping: Mapping[object, object]) -> list[object]:
    """Return the keys of a mapping; those that aren't strings, which only CEL has, come first."""
    return sorted(mapping, key=lambda key: (isinstance(key, str), isinstance(key, str) or key, str(key)))


def is_found_in(pattern: Pattern, text: str, view: EventView) -> bool | None:
    """Search for a pattern, charged to the view; None if that has too few steps left."""
    data = text.encode("utf-8", "surrogatepass")
    return pattern.is_in(data) if view.spend(pattern.cost(len(data))) else None


def is_of_condition(error: BaseException | None) -> bool:
    """Return whether CEL raised an error because `exists` or `all` had no value."""
    return _OF_A_CONDITION.search(str(error)) is not None
