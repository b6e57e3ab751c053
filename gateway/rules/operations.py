"""Compiles an expression to operations on a stack, in the order in which CEL evaluates them.

Each operation pops its operands and pushes one value; the beginning of a comprehension pushes none. `cost.py` runs the
operations on the sizes of values. The expression must be valid, with known names only (`scanner.py`).

A literal field of a path or variable is no operation of its own: a bound on a value's size also bounds its fields.
"""

import re
from collections.abc import Mapping, Sequence
from enum import Enum, auto
from typing import NamedTuple

from gateway.model import ExpressionError
from gateway.rules.event_view import ITEM, ROOTS, Segment
from gateway.rules.scanner import Token, segments_at, tokens

MACROS = frozenset(("all", "exists", "exists_one", "existsOne", "filter", "map"))
NATIVE = frozenset(("bytes", "double", "dyn", "has", "size", "type", "uint"))
"""The functions that the CEL library implements."""
_SHORT_LITERAL = 64  # characters up to which comparing with a string literal is as fast as with a number
_DEFAULT_NODES = 6
"""For each token in the arguments of `default(element.path, …)`, which is looked up anew for each segment."""
_CALL_NODES = 10
"""For a call of our functions, also if the budget doesn't suffice for it: CEL may continue after the error."""
_EDIT_NODES = 32
"""For the text by which `cel_semantics.py` replaces `size` or the list of a comprehension."""
_ROOTS = frozenset((*ROOTS, ITEM))
_PRECEDENCE = {
    "||": 1,
    "&&": 2,
    **dict.fromkeys(("==", "!=", "<", "<=", ">", ">=", "in"), 3),
    **dict.fromkeys(("+", "-"), 4),
    **dict.fromkeys(("*", "/", "%"), 5),
}
_COMPARISON_PRECEDENCE = 3
_PLAIN_TEXT = re.compile(r"""(['"])((?:[^\\'"]|\\[nrt])*)\1""")


class Kind(Enum):
    """What an operation does. The comments say what `number` and the other fields of the operation are."""

    PATH = auto()
    """The value at a path of the event. `number`: the path's index."""
    VARIABLE = auto()
    """The element of a comprehension, or something in it. `number`: the comprehension's depth, 1 for the outermost.
    `nodes`: how many segments follow the variable; `segment`: the first of them."""
    LITERAL = auto()
    """`number`: the characters of a string, otherwise 0. `name`: a string as it is written."""
    SCALAR = auto()
    """A number or boolean computed from `number` values, in a time that doesn't depend on their size."""
    COMPARE = auto()
    """A comparison of two values, from the beginning or the end."""
    MEMBERSHIP = auto()
    """`x in y` for a list or mapping."""
    CONTAINS = auto()
    """`x.contains(y)` for strings."""
    CONCATENATE = auto()
    """`x + y` for strings or lists, or the sum of numbers."""
    CONSTRUCT = auto()
    """A list or mapping literal with `number` elements, or keys and values."""
    CONDITIONAL = auto()
    """`x ? y : z`."""
    INDEX = auto()
    """`x[y]` with a computed index, or a field of a computed value."""
    CALL = auto()
    """The function `name` with `number` arguments, its receiver included."""
    SPLIT = auto()
    """`split` of the string at a path, by a literal. `number`: the path's index in `ParsedOperations.separators`."""
    COMPREHENSION_BEGIN = auto()
    """Pops the list or mapping to iterate over. `number`: 1 + the path's index if it is at a path, otherwise 0."""
    COMPREHENSION_END = auto()
    """The macro `name`, which has computed `number` values for each element, by evaluating `nodes` syntax nodes."""


class Operation(NamedTuple):
    """One operation; see `Kind`."""

    kind: Kind
    number: int = 0
    name: str = ""
    nodes: int = 0
    segment: Segment | None = None


class ParsedOperations(NamedTuple):
    """The operations of an expression, and the distinct paths to which their indexes refer."""

    operations: tuple[Operation, ...]
    paths: tuple[tuple[str, tuple[Segment, ...]], ...]
    separators: Mapping[int, Sequence[str]]
    """The literals by which the string at a path is split, by the path's index."""


def operations_of(text: str) -> ParsedOperations:
    """Compile a valid expression. Raises ExpressionError for unknown syntax, so that nothing goes uncounted."""
    return _Parser(text).parse()


class _Parser:
    """Parses CEL's grammar (https://github.com/google/cel-spec/blob/master/doc/langdef.md#syntax).

    Only brackets are parsed by recursion. CEL takes some hundred nested ones, but thousands of operators.
    """

    def __init__(self, text: str) -> None:
        self._tokens = [*tokens(text), *[Token("end", "", len(text))] * 4]
        self._at = 0
        self._operations: list[Operation] = []
        self._paths: dict[tuple[str, tuple[Segment, ...]], int] = {}
        self._separators: dict[int, list[str]] = {}
        self._variables: list[str] = []
        self._nodes = [0]
        """Syntax nodes so far: of the whole expression, then of each open comprehension."""

    def parse(self) -> ParsedOperations:
        self._expression()
        if self._tokens[self._at].kind != "end":
            raise self._unexpected()
        return ParsedOperations(tuple(self._operations), tuple(self._paths), self._separators)

    def _expression(self) -> None:
        self._binary()
        branches = 0
        while self._accept("?"):
            self._expression()
            self._expect(":")
            self._binary()
            branches += 1
        for _ in range(branches):
            self._add(Kind.CONDITIONAL)

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
        is_with_literal = last.kind is Kind.LITERAL and last.number <= _SHORT_LITERAL
        if sign == "in":
            self._add(Kind.MEMBERSHIP)
        elif sign == "+":
            self._add(Kind.CONCATENATE)
        elif _PRECEDENCE[sign] == _COMPARISON_PRECEDENCE and not is_with_literal:
            self._add(Kind.COMPARE)
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
        while self._accept("!") or self._accept("-"):
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
            self._add(Kind.CALL, 1, "dyn")
        elif token.text == "[":
            self._add(Kind.CONSTRUCT, self._list_until("]"))
        elif token.text == "{":
            self._add(Kind.CONSTRUCT, self._list_until("}"))
        else:
            self._at -= 1
            raise self._unexpected()

    def _name(self, name: str) -> None:
        if self._tokens[self._at].text == "(":
            self._call(name, is_method=False)
        elif name in self._variables:
            innermost = self._variables[::-1].index(name)
            segments, self._at = segments_at(self._tokens, self._at)
            self._nodes[-1] += len(segments)
            first = segments[0] if segments else None
            self._add(Kind.VARIABLE, len(self._variables) - innermost, nodes=len(segments), segment=first)
        elif name in _ROOTS:
            segments, self._at = segments_at(self._tokens, self._at)
            self._nodes[-1] += len(segments)
            path = (name, tuple(segments))
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
                else:  # `.name` costs as much as `['name']`
                    self._add(Kind.LITERAL, len(name.text))
                    self._add(Kind.INDEX)
            elif sign.text == "[":
                self._at += 1
                self._expression()
                self._expect("]")
                self._add(Kind.INDEX)
            else:
                return

    def _call(self, name: str, *, is_method: bool) -> None:
        self._expect("(")
        variable, comma = self._tokens[self._at : self._at + 2]
        if is_method and name in MACROS and comma.text == ",":
            self._at += 2
            self._comprehension(name, variable.text)
            return
        first, before = self._tokens[self._at], self._at
        count = self._list_until(")") + is_method
        if name == "default" and first.text in self._variables:
            self._nodes[-1] += _DEFAULT_NODES * (self._at - before)
        if name == "size" and count == 1 and self._operations[-1].kind is not Kind.PATH:
            self._nodes[-1] += _EDIT_NODES
        if name == "contains" and count == 2:  # noqa: PLR2004 - two strings
            self._add(Kind.CONTAINS)
        elif name in ("startsWith", "endsWith") and count == 2:  # noqa: PLR2004
            self._add(Kind.COMPARE)
        else:
            self._nodes[-1] += 0 if name in NATIVE else _CALL_NODES
            path = self._split_path() if name == "split" and count == 2 else None  # noqa: PLR2004
            if path is None:
                self._add(Kind.CALL, count, name)
            else:
                self._add(Kind.SPLIT, path)

    def _split_path(self) -> int | None:
        """Record the separator if the operands are a path and a literal; return the path's index, otherwise None.

        The string may have been changed before, by functions that can't add this separator to it.
        """
        separator, at = _literal_value(self._operations[-1]), len(self._operations) - 2
        if not separator:
            return None
        is_mark = len(separator) == 1 and separator.isascii() and not separator.isalpha()
        while is_mark and self._operations[at].kind is Kind.CALL:
            match self._operations[at].name:
                case "lower" | "trim" | "upper":
                    at -= 1
                case "replace":
                    new = _literal_value(self._operations[at - 1])
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

    def _comprehension(self, macro: str, variable: str) -> None:
        source = self._operations[-1]
        if source.kind not in (Kind.PATH, Kind.CONSTRUCT, Kind.COMPREHENSION_END):
            self._nodes[-1] += _EDIT_NODES
        self._add(Kind.COMPREHENSION_BEGIN, source.number + 1 if source.kind is Kind.PATH else 0)
        self._variables.append(variable)
        self._nodes.append(0)
        count = self._list_until(")")
        self._variables.pop()
        self._operations.append(Operation(Kind.COMPREHENSION_END, count, macro, self._nodes.pop()))

    def _list_until(self, end: str) -> int:
        """Parse expressions separated by commas or colons, and the closing bracket; return how many there are."""
        count = 0
        while not self._accept(end):
            self._expression()
            count += 1
            if not (self._accept(",") or self._accept(":")):
                self._expect(end)
                break
        return count

    def _add(self, kind: Kind, number: int = 0, name: str = "", nodes: int = 0, segment: Segment | None = None) -> None:
        self._nodes[-1] += 1
        self._operations.append(Operation(kind, number, name, nodes, segment))

    def _accept(self, text: str) -> bool:
        token = self._tokens[self._at]
        is_there = token.kind == "sign" and token.text == text
        self._at += is_there
        return is_there

    def _expect(self, text: str) -> None:
        if not self._accept(text):
            raise self._unexpected()

    def _unexpected(self) -> ExpressionError:
        token = self._tokens[self._at]
        return ExpressionError(f"expected an operand or an operator at character {token.start + 1}, got another sign")


def _literal_value(literal: Operation) -> str | None:
    """Return the value of a string literal; None if it isn't one, or has a prefix or unusual escapes."""
    found = _PLAIN_TEXT.fullmatch(literal.name) if literal.kind is Kind.LITERAL else None
    return None if found is None else found[2].replace("\\n", "\n").replace("\\r", "\r").replace("\\t", "\t")
