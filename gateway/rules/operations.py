"""Reads an expression as the operations by which CEL evaluates it: each takes its operands from a stack.

Of a valid expression, whose names are known (`scanner.py`). A field of a value is no operation of its own: what is
known of a value holds for all that is in it.
"""

import re
from collections.abc import Mapping, Sequence
from enum import Enum, auto
from typing import NamedTuple

from gateway.model import ExpressionError
from gateway.rules.event_view import ITEM, ROOTS, Step
from gateway.rules.scanner import Token, steps_at, tokens

MACROS = frozenset(("all", "exists", "exists_one", "existsOne", "filter", "map"))
NATIVE = frozenset(("bytes", "double", "dyn", "has", "size", "type", "uint"))
"""The functions that are CEL's own."""
_SHORT = 64  # characters of a literal with which comparing takes no longer than with a number
_NODES_OF_DEFAULT = 6
"""For each token of a path in an item of which `default` is asked: each step is looked for from the beginning."""
_NODES_OF_A_CALL = 10
"""Of a function of ours, also if the budget doesn't suffice for the call: CEL may go on after the error."""
_NODES_OF_AN_EDIT = 32
"""Of what `cel_semantics.py` puts in the place of `size`, and of what a macro goes over."""
_ROOTS = frozenset((*ROOTS, ITEM))
_PRECEDENCE = {
    "||": 1,
    "&&": 2,
    **dict.fromkeys(("==", "!=", "<", "<=", ">", ">=", "in"), 3),
    **dict.fromkeys(("+", "-"), 4),
    **dict.fromkeys(("*", "/", "%"), 5),
}
_COMPARING = 3
_PLAIN_TEXT = re.compile(r"""(['"])((?:[^\\'"]|\\[nrt])*)\1""")


class Kind(Enum):
    """What an operation does with the values on the stack, of which it puts one there."""

    PATH = auto()
    """Names a value of the event, by its number."""
    VARIABLE = auto()
    """Names the item of a macro, by how many are around it; or what is in it, by the first step of so many `nodes`."""
    LITERAL = auto()
    """Has so many characters."""
    SCALAR = auto()
    """Makes a number or a boolean of so many values, whose size doesn't matter."""
    COMPARED = auto()
    """Compares two values from their beginning, or their end."""
    FOUND = auto()
    """Looks for a value in a list or a mapping."""
    SCANNED = auto()
    """Looks for a string in another."""
    JOINED = auto()
    """Adds two values: numbers, strings or lists."""
    COLLECTED = auto()
    """Makes a list or a mapping of so many values."""
    CHOSEN = auto()
    """Takes the second or the third value."""
    INDEXED = auto()
    """Takes what is at a computed place."""
    CALLED = auto()
    """Calls a function by its name, with so many values."""
    SPLIT = auto()
    """Calls `split` for a path to a string, by one of the literals that `Reading.separators` has for it."""
    BEGUN = auto()
    """Begins to loop over a value by a macro: over that of a path, by its number and 1, or over any other, by 0."""
    ENDED = auto()
    """Ends what is done for each item by a macro with that name, which has made so many values of it."""


class Operation(NamedTuple):
    """One operation; `nodes` of a macro's end are those of CEL's syntax tree that are evaluated for each item."""

    kind: Kind
    number: int = 0
    name: str = ""
    nodes: int = 0
    step: Step | None = None


class Reading(NamedTuple):
    """The operations of an expression, and the paths in the event that they name by their numbers."""

    operations: tuple[Operation, ...]
    paths: tuple[tuple[str, tuple[Step, ...]], ...]
    separators: Mapping[int, Sequence[str]]
    """By what the string of a path is split, if by a literal."""


def operations_of(text: str) -> Reading:
    """Read a valid expression. Raises ExpressionError for what isn't known here, so that nothing is left out."""
    return _Reader(text).reading()


class _Reader:
    """Reads by CEL's grammar (https://github.com/google/cel-spec/blob/master/doc/langdef.md#syntax).

    Only brackets are read by recursion: CEL takes some hundred of them inside each other, but thousands of operators.
    """

    def __init__(self, text: str) -> None:
        self._tokens = [*tokens(text), *[Token("end", "", len(text))] * 4]
        self._at = 0
        self._operations: list[Operation] = []
        self._paths: dict[tuple[str, tuple[Step, ...]], int] = {}
        self._separators: dict[int, list[str]] = {}
        self._variables: list[str] = []
        self._nodes = [0]
        """Of the whole, and of each macro around what is read."""

    def reading(self) -> Reading:
        self._expression()
        if self._tokens[self._at].kind != "end":
            raise self._unexpected()
        return Reading(tuple(self._operations), tuple(self._paths), self._separators)

    def _expression(self) -> None:
        self._binary()
        branches = 0
        while self._passes("?"):
            self._expression()
            self._expect(":")
            self._binary()
            branches += 1
        for _ in range(branches):
            self._add(Kind.CHOSEN)

    def _binary(self) -> None:
        waiting: list[str] = []
        self._operand()
        while sign := self._operator():
            while waiting and _PRECEDENCE[waiting[-1]] >= _PRECEDENCE[sign]:
                self._combine(waiting.pop())
            waiting.append(sign)
            self._operand()
        while waiting:
            self._combine(waiting.pop())

    def _combine(self, sign: str) -> None:
        last = self._operations[-1]
        is_with_literal = last.kind is Kind.LITERAL and last.number <= _SHORT
        if sign == "in":
            self._add(Kind.FOUND)
        elif sign == "+":
            self._add(Kind.JOINED)
        elif _PRECEDENCE[sign] == _COMPARING and not is_with_literal:
            self._add(Kind.COMPARED)
        else:
            self._add(Kind.SCALAR, 2)

    def _operator(self) -> str:
        first, second = self._tokens[self._at : self._at + 2]
        both = first.text + second.text
        if first.kind == second.kind == "sign" and second.start == first.start + 1 and both in _PRECEDENCE:
            self._at += 2
            return both
        if first.text in _PRECEDENCE and (first.kind == "sign" or first.text == "in"):
            self._at += 1
            return first.text
        return ""

    def _operand(self) -> None:
        signs = 0
        while self._passes("!") or self._passes("-"):
            signs += 1
        self._primary()
        self._members()
        if signs:
            self._nodes[-1] += signs
            self._add(Kind.SCALAR, 1)

    def _primary(self) -> None:
        token = self._tokens[self._at]
        self._at += 1
        if token.kind in ("raw", "text", "line"):
            self._add(Kind.LITERAL, len(token.text), token.text)
        elif token.kind == "number":
            self._add(Kind.LITERAL)
        elif token.kind == "name":
            self._name(token.text)
        elif token.text == "." and self._tokens[self._at].kind == "number":  # `.5`
            self._at += 1
            self._add(Kind.LITERAL)
        elif token.text == "(":
            self._expression()
            self._expect(")")
            self._add(Kind.CALLED, 1, "dyn")
        elif token.text == "[":
            self._add(Kind.COLLECTED, self._until("]"))
        elif token.text == "{":
            self._add(Kind.COLLECTED, self._until("}"))
        else:
            self._at -= 1
            raise self._unexpected()

    def _name(self, name: str) -> None:
        if self._tokens[self._at].text == "(":
            self._call(name, is_method=False)
        elif name in self._variables:
            innermost = self._variables[::-1].index(name)
            steps, self._at = steps_at(self._tokens, self._at)
            self._nodes[-1] += len(steps)
            first = steps[0] if steps else None
            self._add(Kind.VARIABLE, len(self._variables) - innermost, nodes=len(steps), step=first)
        elif name in _ROOTS:
            steps, self._at = steps_at(self._tokens, self._at)
            self._nodes[-1] += len(steps)
            path = (name, tuple(steps))
            self._add(Kind.PATH, self._paths.setdefault(path, len(self._paths)))
        else:
            self._add(Kind.LITERAL)

    def _members(self) -> None:
        while True:
            sign, name, after = self._tokens[self._at : self._at + 3]
            if sign.text == "." and name.kind == "name":
                self._at += 2
                if after.text == "(":
                    self._call(name.text, is_method=True)
                else:  # as `['name']`
                    self._add(Kind.LITERAL, len(name.text))
                    self._add(Kind.INDEXED)
            elif sign.text == "[":
                self._at += 1
                self._expression()
                self._expect("]")
                self._add(Kind.INDEXED)
            else:
                return

    def _call(self, name: str, *, is_method: bool) -> None:
        self._expect("(")
        variable, comma = self._tokens[self._at : self._at + 2]
        if is_method and name in MACROS and comma.text == ",":
            self._at += 2
            self._macro(name, variable.text)
            return
        first, before = self._tokens[self._at], self._at
        count = self._until(")") + is_method
        if name == "default" and first.text in self._variables:
            self._nodes[-1] += _NODES_OF_DEFAULT * (self._at - before)
        if name == "size" and count == 1 and self._operations[-1].kind is not Kind.PATH:
            self._nodes[-1] += _NODES_OF_AN_EDIT
        if name == "contains" and count == 2:  # noqa: PLR2004 - the string and what is looked for
            self._add(Kind.SCANNED)
        elif name in ("startsWith", "endsWith") and count == 2:  # noqa: PLR2004
            self._add(Kind.COMPARED)
        else:
            self._nodes[-1] += 0 if name in NATIVE else _NODES_OF_A_CALL
            path = self._path_that_is_split() if name == "split" and count == 2 else None  # noqa: PLR2004
            if path is None:
                self._add(Kind.CALLED, count, name)
            else:
                self._add(Kind.SPLIT, path)

    def _path_that_is_split(self) -> int | None:
        """Return the path of which a string is split by a literal, which is kept: the first of the last two values.

        Also if the string was changed before, by what adds none of these separators to it.
        """
        separator, at = _plain_text(self._operations[-1]), len(self._operations) - 2
        if not separator:
            return None
        is_mark = len(separator) == 1 and separator.isascii() and not separator.isalpha()
        while is_mark and self._operations[at].kind is Kind.CALLED:
            match self._operations[at].name:
                case "lower" | "trim" | "upper":
                    at -= 1
                case "replace":
                    new = _plain_text(self._operations[at - 1])
                    if new is None or separator in new or self._operations[at - 2].kind is not Kind.LITERAL:
                        return None
                    at -= 3
                case _:
                    return None
        if self._operations[at].kind is not Kind.PATH:
            return None
        path = self._operations[at].number
        self._separators.setdefault(path, []).append(separator)
        return path

    def _macro(self, name: str, variable: str) -> None:
        source = self._operations[-1]
        if source.kind not in (Kind.PATH, Kind.COLLECTED, Kind.ENDED):
            self._nodes[-1] += _NODES_OF_AN_EDIT
        self._add(Kind.BEGUN, source.number + 1 if source.kind is Kind.PATH else 0)
        self._variables.append(variable)
        self._nodes.append(0)
        count = self._until(")")
        self._variables.pop()
        self._operations.append(Operation(Kind.ENDED, count, name, self._nodes.pop()))

    def _until(self, end: str) -> int:
        """Read what commas and colons separate, and the bracket after it; return how many there are."""
        count = 0
        while not self._passes(end):
            self._expression()
            count += 1
            if not (self._passes(",") or self._passes(":")):
                self._expect(end)
                break
        return count

    def _add(self, kind: Kind, number: int = 0, name: str = "", nodes: int = 0, step: Step | None = None) -> None:
        self._nodes[-1] += 1
        self._operations.append(Operation(kind, number, name, nodes, step))

    def _passes(self, text: str) -> bool:
        token = self._tokens[self._at]
        is_there = token.kind == "sign" and token.text == text
        self._at += is_there
        return is_there

    def _expect(self, text: str) -> None:
        if not self._passes(text):
            raise self._unexpected()

    def _unexpected(self) -> ExpressionError:
        token = self._tokens[self._at]
        return ExpressionError(f"expected an operand or an operator at character {token.start + 1}, got another sign")


def _plain_text(literal: Operation) -> str | None:
    """Return the string that is a literal; None if it's none, or written otherwise than most are."""
    found = _PLAIN_TEXT.fullmatch(literal.name) if literal.kind is Kind.LITERAL else None
    return None if found is None else found[2].replace("\\n", "\n").replace("\\r", "\r").replace("\\t", "\t")
