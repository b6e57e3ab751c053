"""Finds expressions that can't work with any event, by constant folding and type checking.

Constant parts are evaluated when rules are loaded, which finds errors that every event would raise. Calls of our
functions with some constant arguments are tried with sample values for the others. The type of other parts is only
known where it is obvious, as for `size(body.x)`: a value of the event's body may have any type. CEL has compiled the
expression before; nothing is reported for syntax that this parser doesn't know.

An operand of `&&` or `||`, a branch of `?:` or a macro's body may fail, since the result may not depend on it. It is
only a problem if both operands or branches fail. In a condition, which has to be true, any failing operand of `&&` is a
problem, unless a constant operand is false and so switches the condition off.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from gateway.model import ExpressionError
from gateway.rules.cel_types import (
    ANY,
    ARGUMENTS,
    BY_TYPE,
    COMPARISONS,
    OF_TYPE,
    RESULTS,
    TAKES,
    WORDS,
    evaluated,
    failure,
    takes,
    type_of,
)
from gateway.rules.expressions import hides_values, named_texts
from gateway.rules.functions import FUNCTIONS
from gateway.rules.scanner import Token, tokens
from gateway.text import MAX_SHOWN

MAX_EVALUATIONS = 50
"""The most constant parts of one expression that are evaluated."""
MAX_NESTING = 30
"""The most nested brackets, operators and conditions. CEL accepts a few more."""


class Wanted(NamedTuple):
    """The types that an expression's value may have."""

    expected: str
    types: frozenset[str]


CONDITION = Wanted("true or false", frozenset(("bool",)))
LIST = Wanted("a list", frozenset(("list",)))
SCALAR = Wanted("a string, a number or a boolean", frozenset(WORDS) - {"list", "map"})


def check_constants(text: str, wanted: Wanted | None = None, items: Iterable[str] = ()) -> None:
    """Raise ExpressionError if a valid expression can't work, with all problems and their positions.

    `wanted` are the types that its value may have. `items` are the element variables of enclosing loops.
    """
    if _PLAIN.fullmatch(text):
        return
    named = named_texts()
    used = tuple([(name, named[name]) for name in sorted({*_NAME.findall(text)}) if name in named])
    found = _found.__wrapped__ if hides_values() else _found
    if problems := found(text, wanted, used, tuple(items)):
        raise ExpressionError("; ".join(problems))


@lru_cache(maxsize=2048)
def _found(
    text: str, wanted: Wanted | None, named: tuple[tuple[str, str], ...], items: tuple[str, ...]
) -> Sequence[str]:
    """Return the problems. They are cached, since thousands of routes may have the same text and named expressions."""
    reader = _Reader(text, dict(named), items)
    part = reader.whole()
    problems = {*reader.problems}
    if part is not None and wanted == CONDITION and not part.is_off:
        problems |= {*part.of_operands}
    told = [message for _, message in sorted(problems)]
    if wanted is not None and part is not None and part.type != ANY and part.type not in wanted.types:
        told.append(f"expected {wanted.expected}, got {WORDS[part.type]}")
    return told


@lru_cache(maxsize=2048)
def _kind_of(text: str) -> "_Part | None":
    """Return the result of parsing a named expression, see `_Reader.whole`, without its own parts: it may have many."""
    part = _Reader(text, {}).whole()
    return None if part is None else replace(part, items=None, of_operands=())


@dataclass(frozen=True, slots=True)
class _Part:
    """A part of an expression, from `start` up to `end`.

    `items` are the elements of a list literal. `of_operands` are problems in operands of `&&`, which can't be true with
    them. `is_off`: because of its constants it is false, or fails, for any event.
    """

    start: int
    end: int
    type: str = ANY
    is_constant: bool = False
    items: "tuple[_Part, ...] | None" = None
    of_operands: tuple[tuple[int, str], ...] = ()
    is_off: bool = False


_NOT_JSON = "expected a JSON value"
_PLAIN = re.compile(r"body(?:\.\w+)*", re.ASCII)
"""Plain paths into the body. Most expressions are such paths, and may have any type."""
_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)


class _UnknownError(Exception):
    """The expression has syntax that this parser doesn't know."""


_PRECEDENCE = {
    "||": 1,
    "&&": 2,
    **dict.fromkeys(COMPARISONS, 3),
    **dict.fromkeys(("+", "-"), 4),
    **dict.fromkeys(("*", "/", "%"), 5),
}
_MACROS = frozenset(("all", "exists", "exists_one", "existsOne", "filter", "map"))
_ROOTS = {"source": "string", "id": "string", "type": "string", "headers": "map", "query": "map"}  # a key may be null
_TYPES = frozenset(("bool", "bytes", "double", "int", "list", "map", "null_type", "string", "uint"))


class _Reader:
    """Parses an expression by CEL's grammar, and collects problems with their positions."""

    def __init__(self, text: str, named: Mapping[str, str], items: Iterable[str] = ()) -> None:
        self.problems: list[tuple[int, str]] = []
        self._text = text
        self._named = named
        self._edits: list[tuple[int, int, str]] = []
        """The replacements of names of named expressions."""
        self._tokens = [*tokens(text), *[Token("end", "", len(text))] * 4]
        self._at = 0
        self._depth = 0
        self._bound = list(items)
        self._left = MAX_EVALUATIONS

    def whole(self) -> _Part | None:
        """Parse the whole expression. None if it has syntax that this parser doesn't know."""
        try:
            part = self._conditional()
            return part if self._tokens[self._at].kind == "end" else None
        except _UnknownError:
            self.problems.clear()
            return None

    # --- Grammar: https://github.com/google/cel-spec/blob/master/doc/langdef.md#syntax ---

    def _conditional(self) -> _Part:
        self._depth += 1
        if self._depth > MAX_NESTING:
            raise _UnknownError
        condition = self._binary(1)
        if self._is("?"):
            self._expect("?")
            self._want_boolean(condition, "before ?")
            known = len(self.problems)
            first = self._conditional()
            self._expect(":")
            between = len(self.problems)
            second = self._conditional()
            self._ignore_one(known, between)
            same = first.type if first.type == second.type else ANY
            is_off = first.is_off and second.is_off
            whole = _Part(condition.start, second.end, same, is_off=is_off)
            condition = self._operation(whole, (condition, first, second))
        self._depth -= 1
        return condition

    def _binary(self, least: int) -> _Part:
        known = len(self.problems)
        left = self._unary()
        while (sign := self._operator()) and _PRECEDENCE[sign] >= least:
            self._at += 1 if sign == "in" else len(sign)
            if sign in ("&&", "||"):
                left = self._either(sign, known, left)
            else:
                left = self._combined(sign, left, self._binary(_PRECEDENCE[sign] + 1))
        return left

    def _either(self, sign: str, known: int, left: _Part) -> _Part:
        """Parse the right operand of `&&` or `||`. The problems from `known` on are those of the left operand."""
        self._want_boolean(left, f"beside {sign}")
        between = len(self.problems)
        right = self._binary(_PRECEDENCE[sign] + 1)
        self._want_boolean(right, f"beside {sign}")
        told = (*left.of_operands, *right.of_operands, *self.problems[known:]) if sign == "&&" else ()
        self._ignore_one(known, between)
        both = (left.is_off, right.is_off)
        is_off = any(both) if sign == "&&" else all(both)
        part = _Part(left.start, right.end, "bool", of_operands=told, is_off=is_off)
        if {left.type, right.type} - {ANY, "bool"}:
            return part
        return self._operation(part, (left, right))

    def _ignore_one(self, known: int, between: int) -> None:
        """Forget the problems from `known` on, unless there are some both before and after `between`.

        If only one of two operands or branches fails, the result may still have a value.
        """
        if not known < between < len(self.problems):
            del self.problems[known:]

    def _operator(self) -> str:
        first, second = self._tokens[self._at : self._at + 2]
        both = first.text + second.text
        if first.kind == second.kind == "sign" and second.start == first.start + 1 and both in _PRECEDENCE:
            return both
        is_one = first.kind == "sign" or first.text == "in"
        return first.text if is_one and first.text in _PRECEDENCE else ""

    def _unary(self) -> _Part:
        sign = self._tokens[self._at]
        if sign.text not in ("!", "-") or sign.kind != "sign":
            return self._member()
        self._at += 1
        self._depth += 1
        if self._depth > MAX_NESTING:
            raise _UnknownError
        is_number = self._tokens[self._at].kind == "number"
        operand = self._unary()
        self._depth -= 1
        if sign.text == "!":
            self._want_boolean(operand, "after !")
            return self._operation(_Part(sign.start, operand.end, "bool"), (operand,))
        if is_number:
            return _Part(sign.start, operand.end, operand.type, operand.is_constant)
        return self._operation(_Part(sign.start, operand.end, operand.type), (operand,))

    def _member(self) -> _Part:
        part = self._primary()
        while True:
            token, name, after = self._tokens[self._at : self._at + 3]
            if token.text == "." and name.kind == "name" and after.text == "(":
                self._at += 2
                part = self._call(name, part)
            elif token.text == "." and name.kind == "name":
                self._at += 2
                part = self._selected(part, name.start + len(name.text), ())
            elif token.text == "[":
                self._at += 1
                index = self._conditional()
                part = self._selected(part, self._expect("]"), (index,))
            else:
                return part

    def _selected(self, whole: _Part, end: int, index: tuple[_Part, ...]) -> _Part:
        is_of_request = self._text[whole.start : whole.end] in ("headers", "query")
        return self._operation(_Part(whole.start, end, "string" if is_of_request else ANY), (whole, *index))

    def _primary(self) -> _Part:
        token = self._tokens[self._at]
        self._at += 1
        match token.kind:
            case "raw" | "text" | "line":
                is_bytes = "b" in token.text.partition(token.text[-1])[0].lower()
                # The value of a reference isn't known yet.
                is_known = "${" not in token.text
                return _Part(token.start, token.start + len(token.text), "bytes" if is_bytes else "string", is_known)
            case "number":
                return self._number(token)
            case "name":
                return self._name(token)
            case _:
                return self._bracket(token)

    def _bracket(self, token: Token) -> _Part:
        match token.text:
            case "(":
                inner = self._conditional()
                return replace(inner, start=token.start, end=self._expect(")"))
            case "[":
                items = self._until("]")
                return _Part(token.start, self._last_end, "list", all(each.is_constant for each in items), items)
            case "{":
                return self._mapping(token)
            case _:
                raise _UnknownError

    def _number(self, token: Token) -> _Part:
        text, end = token.text.lower(), token.start + len(token.text)
        is_hex = text.startswith("0x")
        sign, digits = self._tokens[self._at : self._at + 2]
        if text.endswith("e") and not is_hex and sign.text in ("+", "-") and digits.kind == "number":
            self._at += 2
            end = digits.start + len(digits.text)
        is_double = not is_hex and ("." in text or "e" in text)
        return _Part(token.start, end, "uint" if text.endswith("u") else "double" if is_double else "int", True)  # noqa: FBT003 - constant

    def _name(self, token: Token) -> _Part:
        name, end = token.text, token.start + len(token.text)
        if self._is("("):
            return self._call(token, None)
        if name in ("true", "false", "null"):
            type_ = "null" if name == "null" else "bool"
            return _Part(token.start, end, type_, is_constant=True, is_off=name == "false")
        if name in self._bound:
            return _Part(token.start, end)
        if name in self._named:
            return self._of_named(token, self._named[name])
        if name in _ROOTS:
            return _Part(token.start, end, _ROOTS[name])
        return _Part(token.start, end, "type" if name in _TYPES else ANY)

    def _of_named(self, token: Token, text: str) -> _Part:
        """Return the part for a named expression. Its own problems are reported where it is defined."""
        end = token.start + len(token.text)
        self._edits.append((token.start, end, text))
        # `null` replaces a named expression that has a problem.
        part = None if text == "null" else (_kind_of.__wrapped__ if hides_values() else _kind_of)(text)
        if part is None:
            return _Part(token.start, end)
        return _Part(token.start, end, part.type, part.is_constant, is_off=part.is_off)

    def _mapping(self, token: Token) -> _Part:
        parts: list[_Part] = []
        while not self._is("}"):
            parts.append(self._conditional())
            self._expect(":")
            parts.append(self._conditional())
            if not self._is(","):
                break
            self._expect(",")
        return _Part(token.start, self._expect("}"), "map", all(part.is_constant for part in parts))

    def _until(self, end: str) -> tuple[_Part, ...]:
        """Parse expressions separated by commas, and the closing bracket."""
        parts: list[_Part] = []
        while not self._is(end):
            parts.append(self._conditional())
            if not self._is(","):
                break
            self._expect(",")
        self._expect(end)
        return tuple(parts)

    def _is(self, text: str) -> bool:
        token = self._tokens[self._at]
        return token.kind == "sign" and token.text == text

    def _expect(self, text: str) -> int:
        """Consume a sign, and return its end."""
        if not self._is(text):
            raise _UnknownError
        self._at += 1
        return self._last_end

    @property
    def _last_end(self) -> int:
        last = self._tokens[self._at - 1]
        return last.start + len(last.text)

    def _call(self, name: Token, receiver: _Part | None) -> _Part:
        self._expect("(")
        variable, comma = self._tokens[self._at : self._at + 2]
        start = name.start if receiver is None else receiver.start
        result = RESULTS.get(name.text, ANY)
        if receiver is not None and name.text in _MACROS and comma.text == ",":
            self._at += 2
            self._bound.append(variable.text)
            known = len(self.problems)
            self._until(")")
            self._bound.pop()
            del self.problems[known:]  # the list may be empty
            return _Part(start, self._last_end, result)
        known = len(self.problems)
        arguments = self._until(")")
        part = _Part(start, self._last_end, result)
        if name.text in ("has", "default", "hmac", "dyn"):  # whose arguments may fail, may be missing, or aren't values
            del self.problems[known if name.text == "has" else len(self.problems) :]
            return part
        parts = arguments if receiver is None else (receiver, *arguments)
        if self._refuses(name, parts):
            return part
        return self._operation(part, parts, name.text)

    # --- What can't work ---

    def _want_boolean(self, part: _Part, where: str) -> None:
        if part.type not in (ANY, "bool"):
            self._tell(part.start, f"expected true or false {where}, got {WORDS[part.type]}")

    def _combined(self, sign: str, left: _Part, right: _Part) -> _Part:
        start, end = left.start, right.end
        if ANY in (left.type, right.type):
            part = _Part(start, end, "bool" if sign in COMPARISONS else ANY, is_off=sign == "in" and right.items == ())
            return self._operation(part, (left, right))
        result = type_of(sign, left.type, right.type)
        if result is None:
            got = f"{WORDS[left.type]} and {WORDS[right.type]}"
            self._tell(start, f"expected values that go together beside {sign}, got {got}")
            return _Part(start, end)
        return self._operation(_Part(start, end, result), (left, right))

    def _operation(self, part: _Part, operands: Sequence[_Part], function: str = "") -> _Part:
        """Return the result of an operation. If all operands are constants, it is evaluated and a constant too."""
        if not operands or not all(each.is_constant for each in operands):
            return part
        self._left -= 1
        if self._left < 0:
            return part
        try:
            value = self._value(part)
        except ExpressionError as error:
            if _NOT_JSON in str(error):  # such as a type, which may be an operand
                return part
            if function in TAKES and len(operands) == 1:
                got = f", got {self._shown(operands[0])}"
                self._tell(part.start, f"{function}: expected {TAKES[function]}{got}")
            else:
                self._tell(part.start, str(error))
            return _Part(part.start, part.end)
        return replace(part, is_constant=True, is_off=value is False)

    def _refuses(self, name: Token, arguments: Sequence[_Part]) -> bool:
        """Report constant arguments that a function doesn't accept. Return whether there are any."""
        function, known = name.text, len(self.problems)
        if function == "format":
            self._try_format(arguments)
        elif function in ARGUMENTS:
            self._try_each(function, arguments)
        elif function == "timestamp" and len(arguments) == 1 and arguments[0].is_constant:
            self._try(function, (self._value(arguments[0]),), arguments[0])
        elif function in BY_TYPE and len(arguments) != BY_TYPE[function]:
            within = len([each for each in arguments if each.start > name.start])
            most = within + BY_TYPE[function] - len(arguments)
            self._tell(name.start, f"{function}: expected {most or 'no'} argument{'s' * (not most)}, got {within}")
        elif function in BY_TYPE and not all(each.is_constant for each in arguments):
            types = tuple([each.type for each in arguments])
            if types.count(ANY) < len(types) and not takes(function, types):
                got = " and ".join([WORDS[each] for each in types if each != ANY])
                self._tell(name.start, f"{function}: expected other values, got {got}")
        return len(self.problems) > known

    def _try_each(self, function: str, arguments: Sequence[_Part]) -> None:
        samples, least = ARGUMENTS[function], FUNCTIONS[function].least
        values = {number: self._value(each) for number, each in enumerate(arguments) if each.is_constant}
        known = len(self.problems)
        for number, value in values.items():
            beside = [*samples[: max(number + 1, least)]]
            beside[number] = value
            self._try(function, beside, arguments[number])
        is_whole = len(arguments) > 2 and values.keys() == {*range(1, len(arguments))}  # noqa: PLR2004 - several, of any text
        if is_whole and len(self.problems) == known:
            self._try(function, [samples[0], *[values[number] for number in sorted(values)]], arguments[1])
        pattern = values.get(1)
        if function == "date" and isinstance(pattern, str) and "%" not in pattern and len(self.problems) == known:
            expected = "date: expected a format with %Y, %m, %d, %H, %M and the like"
            self._tell(arguments[1].start, f"{expected}, got {self._shown(arguments[1])}")

    def _try_format(self, arguments: Sequence[_Part]) -> None:
        if len(arguments) != 2 or not arguments[0].is_constant:  # noqa: PLR2004 - the text and its values
            return
        pattern, values = self._value(arguments[0]), arguments[1].items
        tried: list[object]
        if values is None:
            # A list from the event may have as many values as the text has placeholders.
            tried = [1] * pattern.replace("%%", "").count("%") if isinstance(pattern, str) else []
        else:
            tried = [self._value(each) if each.is_constant else OF_TYPE.get(each.type, 1) for each in values]
        if found := failure("format", (pattern, tried)):
            self._tell(arguments[0].start, f"format: {found}")

    def _try(self, function: str, values: Sequence[object], at: _Part) -> None:
        found = failure(function, values)
        if found:
            got = "" if ", got " in found else f", got {self._shown(at)}"
            self._tell(at.start, f"{function}: {found}{got}")

    def _value(self, part: _Part) -> object:
        """Return a constant part's value. Raises ExpressionError."""
        return evaluated(self._written(part))

    def _written(self, part: _Part) -> str:
        """Return a part's text, with named expressions in place of their names."""
        pieces, at = [], part.start
        for start, end, text in self._edits:
            if part.start <= start and end <= part.end:
                pieces += [self._text[at:start], text]
                at = end
        return "".join([*pieces, self._text[at : part.end]])

    def _shown(self, part: _Part) -> str:
        # Not just a part of it: a secret in it is only hidden if the message has all of it.
        text = self._written(part)
        return text if len(text) <= MAX_SHOWN else "another"

    def _tell(self, at: int, message: str) -> None:
        self.problems.append((at, f"{message} at character {at + 1}"))
