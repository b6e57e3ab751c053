"""CEL expressions over an event (https://github.com/google/cel-spec).

Only this module and `cel_compiler.py` use the CEL library. An expression has these variables, whose values are JSON:

    body      the parsed body; docs/rules.md shows how forms and XML are parsed. Missing if it can't be read
    headers   name, in lower case → the first value
    query     name → the first value
    source    the source's name
    id, type, key   the event's id, type and order key; empty or null before they are known

A *missing field* is one that the event doesn't have, including a field of null or another scalar. Null is a value.

`cel_semantics.py` corrects where the library deviates from CEL. The library's `matches` compiles the pattern at each
call, so ours replaces it (`patterns.py`): its pattern must be a string literal, and is compiled once. The functions in
`functions.py` replace the library's in the same way.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple, TypeVar

import cel

from gateway.model import ExpressionError, MissingFieldError
from gateway.rules.absent_fields import AbsentFieldError
from gateway.rules.cel_compiler import check_edits, compiled, compiled_edit
from gateway.rules.cel_errors import reason_of, shortened
from gateway.rules.cel_semantics import ITEMS, Semantics, edited, semantics
from gateway.rules.cost import FEW_VALUES, CostEstimate, CostEstimator
from gateway.rules.event_view import (
    ABSENT,
    CONVERTING,
    COST_UNITS_PER_MS,
    ITEM,
    PASSING,
    ROOTS,
    EventView,
    measured,
)
from gateway.rules.function_calls import FAILURES, NO_MATCHES, Calls, Condition, is_found_in, is_of_condition
from gateway.rules.functions import NamedSecret
from gateway.rules.json_values import as_json, as_text, json_type
from gateway.rules.patterns import Pattern
from gateway.rules.scanner import Analysis, FieldPath, Parts, Scan, gap_in, own_name, without_comments
from gateway.text import hidden

_Value = TypeVar("_Value")
MAX_CONTEXTS = 8  # that are cached for an event; further expressions that name much share one with the whole event
BEYOND_INTEGERS = 2.0**63
"""Integers that are read as floats are at least so large."""


class TooMuchError(ExpressionError):
    """The event's budget doesn't suffice."""


@dataclass(frozen=True, slots=True)
class Expression:
    """A compiled CEL expression.

    Raises ExpressionError, in one line with the character's position, for a syntax error, an unknown name or function,
    a header name that isn't in lower case, macros nested deeper than 3, a text longer than 4,096 characters, or 40,000
    with our edits, and a pattern for `matches` that isn't a string literal, isn't valid RE2, or is too large.

    A plain path (`body.a[0].b`, `headers['x-event']`, `type`), alone or followed by `matches`, is evaluated without
    CEL, with the same result. For others, the parts of the event that they name are passed to CEL, which costs most.
    """

    text: str
    _shown: str = field(init=False, compare=False, repr=False)
    secrets: tuple[NamedSecret, ...] = field(init=False, repr=False)
    """Those that it passes to `hmac`."""
    _variants: dict[str, "_Variant"] = field(init=False, compare=False, repr=False)
    _semantics: Semantics = field(init=False, compare=False, repr=False)
    _analysis: Analysis = field(init=False, compare=False, repr=False)
    _cost_estimator: CostEstimator = field(init=False, compare=False, repr=False)
    _path: FieldPath | None = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        program = compiled(self.text)
        analysis = Scan(self.text, _read_literal, secrets=_SECRETS.get()).analysis()
        found = semantics(self.text, analysis)
        check_edits(found.texts)
        object.__setattr__(self, "_shown", hidden(self.text, _HIDDEN.get()))
        object.__setattr__(self, "secrets", analysis.secrets)
        variant = _Variant.of(program if found.text == self.text else compiled_edit(found.text))
        object.__setattr__(self, "_variants", {found.text: variant})
        object.__setattr__(self, "_semantics", found)
        object.__setattr__(self, "_analysis", analysis)
        object.__setattr__(self, "_path", analysis.paths[0] if analysis.is_path else None)
        object.__setattr__(self, "_cost_estimator", CostEstimator(self.text, analysis))

    @property
    def as_part(self) -> str:
        """The text as it can be inserted into another expression."""
        text = without_comments(self.text)
        return f"({text})" if self._path is None else text

    @property
    def fields(self) -> Sequence[FieldPath]:
        """The paths in it."""
        return self._analysis.paths

    @property
    def is_field(self) -> bool:
        """Whether it is a plain path."""
        return self._path is not None

    @property
    def patterns(self) -> Sequence[Pattern]:
        """The patterns of its calls of `matches` and `extract`."""
        return self._analysis.patterns

    @property
    def reads_body(self) -> bool:
        return any(path.root == "body" for path in self._analysis.paths)

    @property
    def reads_item(self) -> bool:
        """Whether it uses `item`, the current item of a `split`."""
        return any(path.root == ITEM for path in self._analysis.paths)

    def evaluate(self, view: EventView) -> object:
        """Return the value as JSON: a time is an RFC 3339 string, a duration `1.5s`, bytes are base64.

        Raises MissingFieldError for a missing field, ExpressionError for any other failure: incompatible operands, an
        overflow, or a cost over the view's budget, which all expressions over it share. It suffices for about 80,000
        values and keys, and for fewer if they are named, copied or iterated over repeatedly. Plain paths are free.
        """
        path = self._path
        if path is None:
            return self._execute(view)
        value = view.get(path.root, path.segments)
        if value is ABSENT:
            raise AbsentFieldError(path, view)
        return value

    @property
    def header(self) -> str | None:
        """The header, in lower case, if this is a plain path to one; it can then be read without a view."""
        path = self._path
        return path.segments[0].key if path is not None and path.root == "headers" and len(path.segments) == 1 else None

    def is_true(self, view: EventView) -> bool:
        """Return whether a condition holds; with a missing field it doesn't. Raises ExpressionError."""
        try:
            value = self.evaluate(view)
        except MissingFieldError:
            return False
        if isinstance(value, bool):
            return value
        raise ExpressionError(f"{shortened(self._shown)}: expected true or false, got {json_type(value)}")

    def as_text(self, view: EventView) -> str | None:
        """Return the value as an id, a type or a key: a string as it is, a number or boolean as JSON.

        Return None for null, an empty string and a missing field. Raises ExpressionError for a list or mapping.
        """
        path = self._path
        if path is not None:  # the hot path: neither an extra call nor an exception
            value = view.get(path.root, path.segments)
        else:
            try:
                value = self._execute(view)
            except MissingFieldError:
                return None
        if isinstance(value, str):
            return value or None
        if value is ABSENT:
            return None
        if isinstance(value, dict | list):
            raise ExpressionError(f"{shortened(self._shown)}: expected a string or number, got {json_type(value)}")
        if type(value) is float and path is not None and abs(value) >= BEYOND_INTEGERS:
            value = view.integer(path.root, path.segments, value)
            return str(value) if type(value) is int else as_text(value)
        return None if value is None else as_text(value)

    def _execute(self, view: EventView) -> object:
        if self._analysis.is_match:
            return self._is_matched(view)
        found = self._semantics
        needs_care = found.needs_care(view)
        plain = self._variant(found.careful if needs_care else found.text)
        matched: _Matched | None = {} if found.conditions and self._analysis.patterns else None
        try:
            return self._run(plain, view, matched=matched)
        except TooMuchError:
            raise
        except ExpressionError:
            if not found.conditions:
                raise
        # `exists` and `all` may have a value in spite of the error.
        paid = self._spend_on_reevaluation(view)
        decided = self._with_conditions(found.deciding(view, needs_care=needs_care))
        with suppress(_UnexplainedError):
            return self._run(decided, view, paid, matched)
        self._spend_on_reevaluation(view)
        return self._run(self._with_conditions(found.explained), view, 0, matched)

    def _with_conditions(self, text: str) -> "_Variant":
        """Return a compiled text of `_semantics`, with the functions that its conditions call as well."""
        program, calls = self._variant(text)
        return _Variant(program, calls.union(*[self._variant(each.text).calls for each in self._semantics.conditions]))

    def _variant(self, text: str) -> "_Variant":
        """Return a compiled text of `_semantics`, compiled when first needed: few events need any but the first."""
        variant = self._variants.get(text)
        if variant is None:
            variant = self._variants[text] = _Variant.of(compiled_edit(text))
        return variant

    def _run(
        self, variant: "_Variant", view: EventView, paid: int | None = None, matched: "_Matched | None" = None
    ) -> object:
        """Evaluate it. `paid` are cost units already spent on its functions; None if nothing has been spent yet."""
        passed = self._context(view)
        estimator = self._cost_estimator
        if paid is None and (passed.size * estimator.copy_factor > FEW_VALUES or self._analysis.has_macros):
            self._spend(view, estimator.estimate(view, is_whole=passed.is_whole))
        if not variant.calls:
            return self._result(variant.program, passed.context, view)
        calls = Calls(self._analysis, view, variant.calls, self._bound, paid or 0, matched=matched)
        for name, function in calls.functions():
            passed.context.add_function(name, function)
        try:
            return self._result(variant.program, passed.context, view)
        except ExpressionError as error:
            raise self._explained(error, calls, error.__cause__) from error
        finally:
            calls.view = calls.failure = None  # breaks a reference cycle that the garbage collector doesn't see
            if calls.is_spent:  # also if CEL continued without a result, which doesn't mean "no match"
                raise self._too_expensive(_LONG_MATCH if self._analysis.patterns else _LONG_CALLS)

    def _result(self, program: cel.Program, context: cel.Context, view: EventView) -> object:
        try:
            result = program.execute(context)
            if type(result) in (dict, list) and not view.spend(CONVERTING * measured(result).values):
                raise self._too_expensive("the result has too many values")
            return as_json(result)
        except FAILURES as error:
            raise self._translated(error, view) from error

    def _explained(self, error: ExpressionError, calls: Calls, cause: BaseException | None) -> ExpressionError:
        """Return a better error if one of our functions failed, which `cause` shows."""
        if isinstance(error, MissingFieldError | TooMuchError):
            return error
        if (calls.failure or calls.undecided is not None) and is_of_condition(cause):
            return calls.failure or self._unexplained(calls)
        if calls.refusal is None:
            return error
        return ExpressionError(f"{shortened(self._shown)}: {calls.refusal}")

    def _unexplained(self, calls: Calls) -> ExpressionError:
        """Return why the last `exists` or `all` had no value, if that is known without evaluating all elements."""
        view, number = calls.view, calls.undecided
        source = None if number is None else self._semantics.conditions[number].source
        if view is None or number is None or source is None:
            return _UnexplainedError("an item's condition fails")
        return calls.why(number, view.get(source.root, source.segments)) or self._too_expensive(_LONG_CALLS)

    def _bound(self, calls: Calls, number: int, outer: tuple[object, ...]) -> Condition | None:
        """Bind a condition of `exists` or `all` to the outer macros' variables. None if the budget doesn't suffice."""
        view, condition = calls.view, self._semantics.conditions[number]
        if view is None:
            return None
        values, size = _passed(view, condition.parts)
        if not view.spend(PASSING * size):
            return None
        context = cel.Context({**values, **dict(zip(condition.outer, outer, strict=True))})
        for name, function in calls.functions():
            context.add_function(name, function)
        program = self._variant(condition.text).program

        def evaluate(items: list[object]) -> object:
            context.add_variable(ITEMS, items)
            return program.execute(context)

        return Condition(
            calls,
            evaluate,
            explain=lambda error: self._explained(self._translated(error, view), calls, error),
            finds_scalar=lambda: self._missing(view) is not None,
            named=size + sum([measured(value).values for value in outer]),
            length=len(condition.text),
        )

    def _is_matched(self, view: EventView) -> bool:
        """Match a plain path against a pattern, the most common expression, in a sixth of the time that CEL takes."""
        path = self._analysis.paths[0]
        text = view.get(path.root, path.segments)
        if text is ABSENT:
            raise AbsentFieldError(path, view)
        if type(text) is not str:
            raise ExpressionError(f"{shortened(self._shown)}: {NO_MATCHES}")
        is_found = is_found_in(self._analysis.patterns[0], text, view)
        if is_found is None:
            raise self._too_expensive(_LONG_MATCH)
        return is_found

    def _context(self, view: EventView) -> "_PassedContext":
        """Return the CEL context with the parts of the event that this expression names (about 25 µs per kB)."""
        passed: _PassedContext | None = view.contexts.get(self._analysis.key)
        if passed is None:
            passed = _build_context(view, self._analysis.key, self._analysis.parts)
        if passed is None:
            raise self._too_expensive("it names too many values")
        return passed

    def _spend_on_reevaluation(self, view: EventView) -> int:
        """Spend what a second evaluation costs; return the cost units left over from what was spent on the first."""
        is_whole = self._context(view).is_whole
        estimate, spare = self._cost_estimator.estimate_reevaluation(view, is_whole=is_whole)
        self._spend(view, estimate)
        return spare

    def _spend(self, view: EventView, estimate: CostEstimate) -> None:
        if not view.spend(estimate.cost_units):
            if estimate.is_for_input:
                raise self._too_expensive(
                    f"it names {estimate.values:,} values, the longest list or mapping has {estimate.longest:,}"
                )
            milliseconds, left = estimate.cost_units / COST_UNITS_PER_MS, view.left / COST_UNITS_PER_MS
            raise self._too_expensive(f"it may take {milliseconds:,.0f} ms, and {left:,.0f} ms are left for this event")

    def _too_expensive(self, why: str) -> ExpressionError:
        return TooMuchError(f"{shortened(self._shown)}: too much to compute: {why}")

    def _translated(self, error: Exception, view: EventView) -> ExpressionError:
        """Distinguish a missing field from other failures. CEL reports a field of a scalar as a missing overload."""
        missing: FieldPath | None = None
        if isinstance(error, LookupError):
            key = str(error.args[0])
            missing = self._missing(view, key.rpartition(" ")[2] if isinstance(error, IndexError) else key)
            if missing is None:
                # A key that isn't in the expression comes from the event, and isn't shown.
                name = shortened(key if key in self._shown else f"a key of {self._shown}")
                return MissingFieldError(f"{name} isn't there")
        elif isinstance(error, TypeError) or not view.has_body:
            missing = self._missing(view)
        if missing is not None:
            return AbsentFieldError(missing, view)
        return ExpressionError(f"{shortened(self._shown)}: {reason_of(error)}")

    def _missing(self, view: EventView, key: str | None = None) -> FieldPath | None:
        """Return the first path that is missing at that key; without a key, the first with a field of a scalar.

        Paths in `has` may be missing without having failed.
        """
        for path in self._analysis.paths:
            if view.get(path.root, path.segments) is not ABSENT:
                continue
            gap = gap_in(path, view)
            if gap.key == key if key is not None else not gap.is_between_fields:
                return path
        return None


def using(secrets: Mapping[str, NamedSecret]) -> AbstractContextManager[None]:
    """Let expressions that are parsed in this context use these secrets by name."""
    return _set(_SECRETS, secrets)


def hiding(values: Collection[str]) -> AbstractContextManager[None]:
    """Keep these values out of the errors of expressions that are parsed in this context."""
    return _set(_HIDDEN, values)


def naming(named: Mapping[str, str]) -> AbstractContextManager[None]:
    """Let expressions that are parsed in this context use these named expressions; see `parse`."""
    return _set(_NAMED, named)


@contextmanager
def _set(variable: ContextVar[_Value], value: _Value) -> Iterator[None]:
    before = variable.set(value)
    try:
        yield
    finally:
        variable.reset(before)


def parse(text: str) -> Expression:
    """Parse an expression of the rules, after replacing the names of named expressions (`let`) by their texts.

    Raises ExpressionError as Expression does, with positions in the original text.
    """
    named = _NAMED.get()
    if not named and ITEM not in text:
        return Expression(text)
    compiled(text)
    scan = Scan(text, _read_literal, named, _SECRETS.get())
    scan.analysis()
    return Expression(edited(text, scan.named_edits))


def named_texts() -> Mapping[str, str]:
    """Return the named expressions of this context; see `naming`."""
    return _NAMED.get()


def hides_values() -> bool:
    """Return whether expressions that are parsed in this context may contain a secret; see `hiding`."""
    return bool(_HIDDEN.get())


_NAMED: ContextVar[Mapping[str, str]] = ContextVar("named", default=MappingProxyType({}))
_SECRETS: ContextVar[Mapping[str, NamedSecret] | None] = ContextVar("secrets", default=None)
_HIDDEN: ContextVar[Collection[str]] = ContextVar("hidden", default=())
_LONG_CALLS = "its functions would take too long with such values"
_LONG_MATCH = "its patterns would take too long with such strings"
_EVERYTHING: Parts = {}
_Matched = dict[tuple[int, str], bool]
_WHOLE = frozenset((*ROOTS, ITEM))


class _UnexplainedError(ExpressionError):
    """It isn't known yet why `exists` or `all` has no value."""


class _Variant(NamedTuple):
    """A compiled text, and the names of our functions that it calls."""

    program: cel.Program
    calls: frozenset[str]

    @classmethod
    def of(cls, program: cel.Program) -> "_Variant":
        return cls(program, frozenset([name for name in program.functions() if name.endswith(own_name(""))]))


class _PassedContext(NamedTuple):
    """A CEL context with parts of a view, and how many values it has."""

    context: cel.Context
    size: int
    is_whole: bool = False
    """Whether it has the whole event. CEL copies all of a mapping to reach a field in it, so paths cost more."""


def _build_context(view: EventView, key: frozenset[str], parts: Parts) -> _PassedContext | None:
    """Pass parts of the view to CEL. None if the budget doesn't suffice. The first contexts are cached in the view.

    After that, expressions that name much share one context with the whole event, unless that is too large.
    """
    values, size = _passed(view, parts)
    contexts = view.contexts
    if len(contexts) >= MAX_CONTEXTS and size > FEW_VALUES:
        if _WHOLE not in contexts:
            everything, total = _passed(view, dict.fromkeys((*ROOTS, ITEM), _EVERYTHING))
            is_paid = view.spend(PASSING * total)
            contexts[_WHOLE] = _PassedContext(cel.Context(everything), total, is_whole=True) if is_paid else None
        if contexts[_WHOLE] is not None:
            whole: _PassedContext = contexts[_WHOLE]
            return whole
    passed = _PassedContext(cel.Context(values), size) if view.spend(PASSING * size) else None
    if passed is not None and len(contexts) < MAX_CONTEXTS:
        contexts[key] = passed
    return passed


def _passed(view: EventView, parts: Parts) -> tuple[dict[str, object], int]:
    """Return the parts of the view that exist, by root, and how many values they have."""
    whole: list[object] = []
    named = {root: _selected(getattr(view, root), wanted, whole) for root, wanted in parts.items()}
    size = sum([view.size(value).values for value in whole])
    return {root: value for root, value in named.items() if value is not ABSENT}, size


def _selected(value: object, parts: Parts, whole: list[object]) -> object:
    """Return a value reduced to the parts; append the values that are included as a whole to `whole`."""
    if not parts or type(value) is not dict:
        whole.append(value)
        return value
    return {key: _selected(value[key], below, whole) for key, below in parts.items() if key in value}


def _read_literal(text: str) -> str:
    return str(compiled(text).execute(cel.Context()))
