"""Corrects where the CEL library deviates from CEL's specification, by editing an expression's text.

- The library iterates over a mapping in a random order. We iterate in the order of its keys.
- Its `exists` and `all` fail at the first element for which the condition fails. By the specification, an error is
  ignored if another element decides the result, as with `||` and `&&`.
- Its `size` counts the bytes of a string. By the specification, it counts characters.

The edits call the functions in `function_calls.py`. Slow edits are only used for events that need them: see
`Semantics`.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from gateway.rules.event_view import Absent, EventView
from gateway.rules.scanner import Analysis, Edit, FieldPath, Parts, Token, add_part, own_name, tokens

ITEMS = "x__"
EXPLAINING = {"exists": "some", "all": "every"}
"""The functions that replace these macros to find out why there is no value."""
_MACROS = frozenset(("all", "exists", "exists_one", "existsOne", "filter", "map"))
_OPENING, _CLOSING = frozenset("([{"), frozenset(")]}")
_STRINGS = frozenset(("raw", "text", "line"))
_ORDERED, _CHARACTERS = own_name("ordered"), own_name("characters")
# Both evaluate their operand once. The variable is only visible inside.
_IN_ORDER = f"].map(x__, type(x__) == type({{}}) ? {_ORDERED}(x__) : x__)[0]"
_SIZE = f"].map(x__, type(x__) == type('') ? {_CHARACTERS}(x__) : size(x__))[0]"


class Condition(NamedTuple):
    """The condition of `exists` or `all` as an expression over some of the elements, which are the variable `ITEMS`."""

    text: str
    source: FieldPath | None
    """The path of the list or mapping; None if it isn't a plain path, or if another macro encloses this one."""
    outer: tuple[str, ...]
    """The variables of enclosing macros that it names."""
    parts: dict[str, Parts]
    paths: tuple[FieldPath, ...]


class Semantics(NamedTuple):
    """An expression's edited texts, from the fastest to the slowest.

    `text` has the specified value, unless an event `needs_care`: then `careful` has it. Both may fail where `exists` or
    `all` should have a value: then `decided` has it, or `carefully_decided`.
    """

    text: str
    careful: str
    decided: str
    """Replaces `exists` and `all` by a macro that continues after an element for which the condition fails."""
    carefully_decided: str
    explained: str
    """Replaces `exists` and `all` by functions that evaluate their `conditions` for a few elements at a time.

    This is the slowest text, but it finds out why there is no value.
    """
    conditions: tuple[Condition, ...]
    iterated: tuple[FieldPath, ...]
    """The paths that a macro iterates over."""
    measured: tuple[FieldPath, ...]
    """The paths that are arguments of `size`."""

    @property
    def texts(self) -> Sequence[str]:
        return self.text, self.careful, self.decided, self.carefully_decided, self.explained

    def needs_care(self, view: EventView) -> bool:
        """Return whether it iterates over a mapping, or asks for the size of a string that isn't ASCII."""
        for path in self.iterated:
            if type(view.get(path.root, path.segments)) is dict:
                return True
        for path in self.measured:
            value = view.get(path.root, path.segments)
            if type(value) is str and not value.isascii():
                return True
        return False

    def deciding(self, view: EventView, *, needs_care: bool) -> str:
        """Return the text for an event with which the condition may have failed for an element.

        If a macro iterates over a scalar, only `explained` gives the right error.
        """
        for path in self.iterated:
            if type(view.get(path.root, path.segments)) not in (list, dict, Absent):
                return self.explained
        return self.carefully_decided if needs_care else self.decided


def semantics(text: str, analysis: Analysis) -> Semantics:
    return _Reader(text, analysis).semantics()


class _Macro(NamedTuple):
    name: int
    variable: str


class _Reader:
    """Finds where a valid expression has to be edited. Positions are indexes of tokens."""

    def __init__(self, text: str, analysis: Analysis) -> None:
        self._text = text
        self._analysis = analysis
        self._tokens = [*tokens(text), *[Token("end", "", len(text))] * 4]
        self._opening: dict[int, int] = {}  # closing bracket → its opening one
        self._closing: dict[int, int] = {}
        self._lists: set[int] = set()  # closing brackets after which there is certainly a list
        self._paths = {path.end: path for path in analysis.paths}
        self._edits = list(analysis.edits)
        self._careful: list[Edit] = []
        self._iterated: list[FieldPath] = []
        self._measured: list[FieldPath] = []
        self._macros: list[
            tuple[int, int, tuple[str, ...]]
        ] = []  # name, closing bracket, variables of enclosing macros

    def semantics(self) -> Semantics:
        if self._analysis.is_path or self._analysis.is_match:
            text = edited(self._text, self._edits)
            return Semantics(text, text, text, text, text, (), (), ())
        self._match_brackets()
        around: list[_Macro | None] = []
        for at, token in enumerate(self._tokens):
            if token.text in _OPENING:
                is_of_macro = token.text == "(" and self._is_macro(at - 1)
                around.append(_Macro(at - 1, self._tokens[at + 1].text) if is_of_macro else None)
            elif token.text in _CLOSING:
                macro = around.pop()
                if macro is not None:
                    outer = tuple(dict.fromkeys([each.variable for each in around if each is not None]))
                    self._macro(macro, at, outer)
            elif token.text == "size" and self._tokens[at + 1].text == "(":
                self._size(at)
        careful = [*self._edits, *self._careful]
        quantifiers = [each for each in self._macros if self._tokens[each[0]].text in ("exists", "all")]
        calls = [self._call(number, *each) for number, each in enumerate(quantifiers)]
        explained = edited(self._text, [*careful, *calls])
        # The boolean result has no members or elements, except by mistake.
        deciding = self._deciding(quantifiers)
        is_plain = all(self._tokens[closing + 1].text not in (".", "[") for _, closing, _ in quantifiers)
        return Semantics(
            edited(self._text, self._edits),
            edited(self._text, careful),
            edited(self._text, [*deciding, *self._edits]) if is_plain else explained,
            edited(self._text, [*deciding, *careful]) if is_plain else explained,
            explained,
            tuple([self._condition([*careful, *calls], *each) for each in quantifiers]),
            tuple(self._iterated),
            tuple(self._measured),
        )

    def _match_brackets(self) -> None:
        opened: list[int] = []
        for at, token in enumerate(self._tokens):
            if token.text in _OPENING:
                opened.append(at)
            elif token.text in _CLOSING:
                opening = opened.pop()
                self._opening[at], self._closing[opening] = opening, at
                is_literal = token.text == "]" and not self._is_operand(opening - 1)
                is_call = token.text == ")" and self._tokens[max(opening - 1, 0)].text == "split"
                if is_literal or is_call or (token.text == ")" and self._is_macro(opening - 1)):
                    self._lists.add(at)

    def _is_macro(self, at: int) -> bool:
        if at < 1 or self._tokens[at].text not in _MACROS or self._tokens[at - 1].text != ".":
            return False
        return self._tokens[at + 1].text == "(" and self._tokens[at + 3].text == ","

    def _is_operand(self, at: int) -> bool:
        """Return whether an operand ends at this token, so that `[` after it is an index and `(` a call."""
        if at < 0:
            return False
        token = self._tokens[at]
        return token.text in _CLOSING or token.kind in _STRINGS or (token.kind == "name" and token.text != "in")

    def _begin_of(self, end: int) -> int:
        """Return the beginning of the operand that ends before a token, such as `a.b(c)[0]`."""
        at = end - 1
        while True:
            while at in self._opening:
                opening = self._opening[at]
                if not self._is_operand(opening - 1):
                    at = opening
                    break
                at = opening - 1
            if at < 1 or self._tokens[at - 1].text != ".":
                return at
            at -= 2

    def _macro(self, macro: _Macro, closing: int, outer: tuple[str, ...]) -> None:
        dot = macro.name - 1
        self._macros.append((macro.name, closing, outer))
        if dot - 1 in self._lists:
            return
        if dot in self._paths:
            self._iterated.append(self._paths[dot])
            self._wrap(self._careful, self._begin_of(dot), self._tokens[dot].start, self._tokens[dot].start, _IN_ORDER)
        else:
            self._wrap(self._edits, self._begin_of(dot), self._tokens[dot].start, self._tokens[dot].start, _IN_ORDER)

    def _size(self, at: int) -> None:
        """Edit `size(x)` or `x.size()` to count the characters of a string."""
        token, opening, closing = self._tokens[at], at + 1, self._closing[at + 1]
        is_method = at > 0 and self._tokens[at - 1].text == "."
        if is_method != (closing == opening + 1) or self._has_comma(opening, closing):
            return  # a wrong number of arguments, which CEL reports
        end = at - 1 if is_method else closing  # the token after what is measured
        begin = self._begin_of(end)
        is_whole = is_method or begin == opening + 1
        if is_whole and end - 1 in self._lists:
            return
        edits = self._edits
        if is_whole and end in self._paths:
            self._measured.append(self._paths[end])
            edits = self._careful
        if is_method:
            after = self._tokens[closing].start + 1
            self._wrap(edits, begin, self._tokens[at - 1].start, after, _SIZE)
        else:
            edits.append(Edit(token.start, self._tokens[opening].start + 1, "["))
            edits.append(Edit(self._tokens[closing].start, self._tokens[closing].start + 1, _SIZE))

    def _has_comma(self, opening: int, closing: int) -> bool:
        """Return whether there is a comma in these brackets, outside of nested ones."""
        at = opening + 1
        while at < closing:
            if self._tokens[at].text == ",":
                return True
            at = self._closing.get(at, at) + 1
        return False

    def _wrap(self, edits: list[Edit], begin: int, start: int, end: int, text: str) -> None:
        edits.append(Edit(self._tokens[begin].start, self._tokens[begin].start, "["))
        edits.append(Edit(start, end, text))

    def _named(self, name: int, closing: int, outer: Sequence[str]) -> tuple[str, ...]:
        words = {token.text for token in self._tokens[name + 4 : closing] if token.kind == "name"}
        variable = self._tokens[name + 2].text
        return tuple([each for each in outer if each in words and each != variable])

    def _call(self, number: int, name: int, closing: int, outer: Sequence[str]) -> Edit:
        token = self._tokens[name]
        arguments = ", ".join([str(number), *self._named(name, closing, outer)])
        return Edit(token.start, self._tokens[closing].start + 1, f"{own_name(EXPLAINING[token.text])}({arguments})")

    def _deciding(self, quantifiers: Sequence[tuple[int, int, tuple[str, ...]]]) -> list[Edit]:
        """Pass the condition's value for each element to our functions, or that it failed.

        `l.exists(i, c)` becomes `exists__(0, begin__(0, true, 2) && l.all(i, told__(0, c) || failed__(0)))`. CEL
        evaluates the right operand of `||` if the left one is false or fails; if it is true, so is the result.
        """
        before: list[Edit] = []
        after: list[Edit] = []
        for number, (name, closing, _) in enumerate(quantifiers):
            token, begin = self._tokens[name], self._tokens[self._begin_of(name - 1)].start
            condition, end = self._tokens[name + 3].start + 1, self._tokens[closing].start
            decisive = "true" if token.text == "exists" else "false"
            opened = (
                f"{own_name(token.text)}({number}, {own_name('begin')}({number}, {decisive}, {end - condition}) && "
            )
            after += [
                Edit(token.start, token.start + len(token.text), "all"),
                Edit(end, end + 1, f") || {own_name('failed')}({number})))"),
            ]
            # Among edits at the same position, those of inner macros come later.
            before = [Edit(begin, begin, opened), Edit(condition, condition, f"{own_name('told')}({number}, "), *before]
        return [*before, *after]

    def _condition(self, edits: Sequence[Edit], name: int, closing: int, outer: Sequence[str]) -> Condition:
        paths = [path for path in self._analysis.paths if name + 4 < path.end <= closing]
        parts: dict[str, Parts] = {}
        for path in paths:
            add_part(parts, path)
        macro, variable = self._tokens[name].text, self._tokens[name + 2].text
        source = None if outer else self._paths.get(name - 1)
        condition = edited(self._text, edits, self._tokens[name + 3].start + 1, self._tokens[closing].start)
        return Condition(
            f"{ITEMS}.{macro}({variable}, {condition})",
            source,
            self._named(name, closing, outer),
            parts,
            tuple(paths),
        )


def edited(text: str, edits: Sequence[Edit], begin: int = 0, end: int | None = None) -> str:
    """Apply edits to a part of a text. An edit inside another one is dropped."""
    return "".join(_pieces(text, edits, begin, len(text) if end is None else end))


def _pieces(text: str, edits: Sequence[Edit], at: int, end: int) -> Iterator[str]:
    for edit in sorted(edits, key=lambda edit: (edit.start, edit.end > edit.start, -edit.end)):
        if at <= edit.start and edit.end <= end and edit.start < end:
            yield text[at : edit.start]
            yield edit.text
            at = edit.end
    yield text[at:end]
