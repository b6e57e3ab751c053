"""Finds names, paths and macros in a CEL expression. It works on tokens, since the library provides no syntax tree."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

from gateway.model import ExpressionError
from gateway.rules.event_view import ABSENT, ITEM, ROOTS, EventView, Segment
from gateway.rules.functions import FUNCTIONS, Function, NamedSecret
from gateway.rules.patterns import Pattern
from gateway.text import did_you_mean

MAX_NESTING = 3  # nested macros
MAX_PROBLEMS = 20  # that are reported for one expression
MAX_SEGMENTS = 8  # of a path in an element, as the first argument of `default`: each is looked up from the beginning


# A tree of mapping keys. An empty one means everything below the key.
Parts = dict[str, "Parts"]
_TOKEN = re.compile(
    r"""
    (?P<space>  \s+ | //[^\n]* )
  | (?P<text>   [bB]? (?: [rR] (?: \"{3}.*?\"{3} | '{3}.*?'{3} )
                        | \"{3}(?:[^"\\]++|\\.|"(?!""))*+\"{3} | '{3}(?:[^'\\]++|\\.|'(?!''))*+'{3} ) )
  | (?P<raw>    [bB]? [rR] (?! \"{3} | '{3} ) (?: "[^"\n]*" | '[^'\n]*' ) )
  | (?P<line>   [bB]? (?! \"{3} | '{3} ) (?: "(?:[^"\\\n]++|\\.)*+" | '(?:[^'\\\n]++|\\.)*+' ) )
  | (?P<open>   [bB]? [rR]? (?: (?: \"{3} | '{3} ).* | "(?:[^"\\\n]++|\\.)*+ | '(?:[^'\\\n]++|\\.)*+ ) )
  | (?P<name>   [A-Za-z_][A-Za-z0-9_]* )
  | (?P<number> [0-9]+ (?:\.[0-9]+)? [A-Za-z0-9]* )
  | (?P<sign>   . )
    """,
    re.VERBOSE | re.DOTALL,
)
"""`open` is a string that doesn't end, to where it was looked for: each character is looked at a few times."""
_PLAIN_TEXT = re.compile(r"""(['"])([^\\'"]*)\1""")
_WORDS = frozenset(
    ("true", "false", "null", "in", "bool", "bytes", "double", "int", "list", "map", "null_type", "string", "uint")
)
_FUNCTIONS = frozenset(
    (
        *("bytes", "default", "double", "duration", "dyn", "has", "hmac", "int", "size", "string", "type", "uint"),
        *[name for name, function in FUNCTIONS.items() if not function.is_method],
    )
)
_MACROS = frozenset(("all", "exists", "exists_one", "existsOne", "filter", "map"))
_METHODS = frozenset(
    (
        *("contains", "endsWith", "extract", "matches", "size", "startsWith"),
        *[name for name, function in FUNCTIONS.items() if function.is_method],
        *("getDate", "getDayOfMonth", "getDayOfWeek", "getDayOfYear", "getFullYear", "getHours"),
        *("getMilliseconds", "getMinutes", "getMonth", "getSeconds"),
    )
)


_RESERVED = frozenset(
    (
        *("as", "break", "const", "continue", "else", "for", "function", "if", "import", "let", "loop", "namespace"),
        *("package", "return", "var", "void", "while"),
    )
)
"""https://github.com/google/cel-spec/blob/master/doc/langdef.md#syntax."""
_TAKEN = frozenset((*ROOTS, *_WORDS, *_FUNCTIONS, *_MACROS, *_METHODS, *_RESERVED))


class Token(NamedTuple):
    kind: str
    text: str
    start: int


class FieldPath(NamedTuple):
    """The literal part of a path, and the index of the token after it."""

    root: str
    segments: tuple[Segment, ...]
    end: int

    @property
    def text(self) -> str:
        return self.root + "".join(
            f"[{position}]" if key is None else f".{key}" if key.isidentifier() else f"['{key}']"
            for key, position in self.segments
        )

    def up_to(self, depth: int) -> "FieldPath":
        return self._replace(segments=self.segments[:depth])


class Gap(NamedTuple):
    """The first missing field of a path: `segment`, the one at `depth`, counted from 1. `parent` has no such field."""

    depth: int
    parent: object
    segment: Segment

    @property
    def key(self) -> str:
        return str(self.segment.position) if self.segment.key is None else self.segment.key

    @property
    def is_between_fields(self) -> bool:
        """Return whether the parent has fields or elements, as the segment requires, but not this one."""
        return isinstance(self.parent, list if self.segment.key is None else dict)


def gap_in(path: FieldPath, view: EventView) -> Gap:
    """Find the first missing field of a path; a depth of 0 means that its root is missing."""
    depth = 0
    while view.get(path.root, path.segments[:depth]) is not ABSENT:
        depth += 1
    if depth == 0:
        return Gap(0, ABSENT, Segment(None, -1))
    return Gap(depth, view.get(path.root, path.segments[: depth - 1]), path.segments[depth - 1])


class Edit(NamedTuple):
    """A replacement for a part of the text, before CEL compiles it: a call of one of our functions."""

    start: int
    end: int
    text: str


class Analysis(NamedTuple):
    """The analysis of an expression.

    `is_path`: it is just a plain path. `is_match`: it is just a plain path followed by `matches`. `calls` are our
    functions that it calls, by their names after the `edits`.
    """

    paths: tuple[FieldPath, ...]
    is_path: bool
    edits: tuple[Edit, ...]
    calls: frozenset[str]
    patterns: tuple[Pattern, ...]
    secrets: tuple[NamedSecret, ...]
    is_match: bool
    has_macros: bool
    parts: dict[str, Parts]
    key: frozenset[str]


def segments_at(words: Sequence["Token"], at: int) -> tuple[list[Segment], int]:
    """Return the literal segments of a path, starting at a token, and the index of the token after them."""
    segments: list[Segment] = []
    while True:
        sign, inner, end = words[at : at + 3]
        if sign.text == "." and inner.kind == "name" and end.text != "(":
            segments.append(Segment(inner.text, -1))
            at += 2
        elif sign.text == "[" and end.text == "]" and (literal := _PLAIN_TEXT.fullmatch(inner.text)):
            segments.append(Segment(literal[2], -1))
            at += 3
        elif sign.text == "[" and end.text == "]" and inner.text.isdigit():
            segments.append(Segment(None, int(inner.text)))
            at += 3
        else:
            return segments, at


def tokens(text: str, start: int = 0, end: int | None = None) -> Iterator[Token]:
    for found in _TOKEN.finditer(text, start, len(text) if end is None else end):
        if found.lastgroup != "space":
            yield Token(found.lastgroup or "", found.group(), found.start())


def without_comments(text: str) -> str:
    """Replace each comment of an expression by a space."""
    return "".join([" " if found.group().startswith("//") else found.group() for found in _TOKEN.finditer(text)])


_ELSEWHERE = {
    ITEM: ", which only `request` has, in a route with `split`",
    "each": ": `foreach` replaces exactly '${{ each }}' and '${{ each.NAME }}', in quotes here, nothing longer",
    **dict.fromkeys(
        ("event", "payload", "data", "request", "msg"), ", expected body, headers, query, source, type, id or key"
    ),
    **dict.fromkeys(("secrets", "env", "vars"), ": a value from elsewhere is ${NAME}"),
}
_SYNONYMS = {
    **dict.fromkeys(("len", "length", "count"), "size(x)"),
    **dict.fromkeys(("lowercase", "tolower", "toLower", "lowerAscii", "downcase"), "x.lower()"),
    **dict.fromkeys(("uppercase", "toupper", "toUpper", "upperAscii", "upcase"), "x.upper()"),
    **dict.fromkeys(("concat", "append"), "x + y"),
    **dict.fromkeys(("strip", "trimSpace"), "x.trim()"),
    **dict.fromkeys(("str", "tostring", "toString", "to_s"), "string(x)"),
    **dict.fromkeys(("number", "float", "parseInt", "to_i"), "int(x) or double(x)"),
    **dict.fromkeys(("slice", "substr", "left"), "x.substring(start, end)"),
    **dict.fromkeys(("includes", "include", "contain"), "x.contains(y)"),
    **dict.fromkeys(("defined", "present", "isset"), "has(x)"),
}
"""Functions of other languages, and what to write in CEL."""


_STRINGS = re.compile(r"'(?:[^'\\\n]|\\.)*'?|\"(?:[^\"\\\n]|\\.)*\"?")
_OTHER_LANGUAGES = (
    (re.compile(r"=~|~="), ", expected x.matches('…')"),
    (re.compile(r"==="), ", expected =="),
    (re.compile(r"\bnot\s+in\b"), ", expected !(x in y)"),
    (re.compile(r"^\s*\$\{\{|^\s*\{\{"), ", expected CEL as it is, without ${{ }}"),
    (re.compile(r"=>|=<"), ", expected >= or <= to compare"),
    (re.compile(r"(?<![=!<>])=(?!=)"), ", expected == to compare"),
    (re.compile(r"(?<!\.)\band\b"), ", expected && for and"),
    (re.compile(r"(?<!\.)\bor\b"), ", expected || for or"),
    (re.compile(r"(?<!\.)\bnot\b"), ", expected ! for not"),
)
"""Syntax of other languages in expressions that CEL can't parse, and a hint for each."""


def syntax_hint(text: str) -> str:
    """Return a hint for an expression that CEL can't parse; "" if there is none."""
    plain = _STRINGS.sub("''", without_comments(text))
    return next((hint for written, hint in _OTHER_LANGUAGES if written.search(plain)), "")


class Scan:
    """Finds the names, paths and macros in a valid expression. Raises ExpressionError for unknown names."""

    def __init__(
        self,
        text: str,
        read_literal: Callable[[str], str],
        named: Mapping[str, str] | None = None,
        secrets: Mapping[str, NamedSecret] | None = None,
    ) -> None:
        """`read_literal` returns the value of a CEL string literal. `named` are the texts of named expressions.

        Without `named`, only `item` is known besides the roots, and no hint suggests it. `secrets` are those that
        `hmac` may use; None where `hmac` isn't allowed.
        """
        self._read_literal = read_literal
        self._named = {ITEM: ITEM} if named is None else named
        self._roots = (*ROOTS, ITEM) if self._named.get(ITEM) == ITEM else ROOTS
        self._hinted = (*ROOTS, *(named or ()))
        self.named_edits: list[Edit] = []
        """The replacements of names of named expressions."""
        self._tokens = [*tokens(text), *[Token("end", "", len(text))] * 4]
        self._at = 0
        self._brackets: list[str | None] = []  # open brackets: a macro's variable, None for others
        self._paths: list[FieldPath] = []
        self._has_macros = False
        self._edits: list[Edit] = []
        self._calls: set[str] = set()
        self._patterns: list[Pattern] = []
        self._known_secrets = secrets
        self._secrets: list[NamedSecret] = []
        self._defaulted: Token | None = None
        """The root of the path that is the first argument of `default`."""
        self._told: set[str] = set()
        """Unknown names. Each is reported once."""

    def analysis(self) -> Analysis:
        before = ""
        problems: list[str] = []
        while (token := self._tokens[self._at]).kind != "end" and len(problems) < MAX_PROBLEMS:
            self._at += 1
            if token.text in ("(", "[", "{"):
                self._brackets.append(None)
            elif token.text in (")", "]", "}"):
                self._brackets.pop()
            elif token.kind == "name":
                try:
                    self._name(token, is_member=before == ".", is_call=self._tokens[self._at].text == "(")
                except ExpressionError as error:
                    problems.append(str(error))
            before = self._tokens[self._at - 1].text
        if problems:
            raise ExpressionError("; ".join(problems))
        parts: dict[str, Parts] = {}
        for path in self._paths:
            add_part(parts, path)
        first = self._paths[0] if self._paths else None
        end = first.end if first is not None and self._tokens[0].text == first.root else -1
        return Analysis(
            paths=tuple(self._paths),
            is_path=end == self._at,
            edits=tuple(self._edits),
            calls=frozenset(self._calls),
            patterns=tuple(self._patterns),
            secrets=tuple(self._secrets),
            # `.`, `matches`, `(`, the pattern, `)`
            is_match=self._calls == {own_name("matches")} and end + 5 == self._at and self._tokens[end].text == ".",
            has_macros=self._has_macros,
            parts=parts,
            key=frozenset(path.text for path in self._paths),
        )

    @property
    def _loops(self) -> int:
        return sum(variable is not None for variable in self._brackets)

    def _name(self, token: Token, *, is_member: bool, is_call: bool) -> None:
        if is_member and token.text in _MACROS and self._tokens[self._at + 2].text == ",":
            self._macro(token)
        elif is_call:
            known = _METHODS if is_member else _FUNCTIONS
            if token.text not in known:
                as_method = f", expected the method x.{token.text}(…)" if token.text in _METHODS else ""
                as_function = f", expected {token.text}(…)" if is_member and token.text in _FUNCTIONS else ""
                other = f", expected {_SYNONYMS[token.text]}" if token.text in _SYNONYMS else as_function
                near = as_method or other or did_you_mean(token.text, known | _MACROS)
                raise _at(token, f"unknown function '{token.text}'", near)
            self._call(token)
        elif self._tokens[self._at].text == "{" and token.text != "in":
            raise _at(token, f"expected a mapping such as {{'a': 1}}, got a '{token.text}' of protocol buffers")
        elif is_member or token.text in _WORDS or token.text in self._brackets:
            return
        elif token.text in self._roots:
            self._path(token)
        elif token.text in self._named:
            self.named_edits.append(Edit(token.start, token.start + len(token.text), self._named[token.text]))
        elif token.text not in self._told:
            self._told.add(token.text)
            near = _ELSEWHERE.get(token.text) or did_you_mean(token.text, self._hinted)
            hint = near or f", expected {', '.join(ROOTS)}"
            raise _at(token, f"unknown name '{token.text}'", hint)

    def _macro(self, token: Token) -> None:
        """Skip `(x,`, after which the macro's variable is defined."""
        variable = self._tokens[self._at + 1]
        if variable.text in ROOTS or variable.text.endswith(own_name("")):
            self._told.add(variable.text)
            raise _at(variable, f"expected a new name, got '{variable.text}'")
        if self._loops == MAX_NESTING:
            raise _at(token, f"expected at most {MAX_NESTING} macros inside each other, got more")
        self._brackets.append(variable.text)
        self._has_macros = True
        self._at += 3

    def _call(self, name: Token) -> None:
        """Edit the call of one of our functions: use its own name."""
        function = FUNCTIONS.get(name.text)
        if name.text in ("matches", "extract"):
            self._pattern(name)
        elif name.text == "default":
            self._default(name)
        elif name.text == "hmac":
            self._hmac(name)
        elif function is not None:
            count = self._count_arguments() + function.is_method
            if not function.least <= count <= function.most:
                raise _at(name, f"{name.text}: expected {_arguments(function)}, got {count - function.is_method}")
            self._edits.append(Edit(name.start, name.start + len(name.text), own_name(name.text)))
            self._calls.add(own_name(name.text))

    def _count_arguments(self) -> int:
        """Return the number of arguments in the brackets that open next."""
        commas = sum([token.text == "," and depth == 1 for token, depth in self._in_brackets()])
        return 0 if self._tokens[self._at + 1].text == ")" else commas + 1

    def _in_brackets(self) -> Iterator[tuple[Token, int]]:
        """Yield the tokens of the brackets that open next, each with its depth of nesting."""
        depth = 0
        for token in self._tokens[self._at :]:
            depth += (token.text in ("(", "[", "{")) - (token.text in (")", "]", "}"))
            if not depth:
                break
            yield token, depth

    def _hmac(self, name: Token) -> None:
        """Edit a call of `hmac` to pass the secret's index. The name must be a literal, so no event can choose it."""
        inner = [token for token, _ in self._in_brackets()]
        if self._count_arguments() != 2:  # noqa: PLR2004 - the text and the secret
            message = f"hmac: expected 2 arguments, a value and the name of a secret, got {self._count_arguments()}"
            raise _at(name, message)
        comma, literal = inner[-2:]
        if comma.text != "," or literal.kind not in ("raw", "text", "line") or literal.text[0] in "bB":
            self._told.add(literal.text)
            message = "hmac: expected the name of a secret as one string literal, such as 'pepper', got something else"
            raise _at(literal, message)
        if self._known_secrets is None:
            raise _at(name, "hmac: expected it in `request`, the only place where secrets may be used")
        which = self._read_literal(literal.text)
        if which not in self._known_secrets:
            known = ", ".join(sorted(self._known_secrets)) or "none"
            near = did_you_mean(which, self._known_secrets)  # which may be a secret itself: it isn't shown
            raise _at(literal, f"hmac: expected a name of the file's `secrets` ({known}), got another string", near)
        self._edits.append(Edit(name.start, name.start + len(name.text), own_name(name.text)))
        self._edits.append(Edit(literal.start, literal.start + len(literal.text), str(len(self._secrets))))
        self._calls.add(own_name(name.text))
        self._secrets.append(self._known_secrets[which])

    def _default(self, name: Token) -> None:
        """Edit a call of `default` to pass the path's index, since CEL fails if the path is missing."""
        root = self._tokens[self._at + 1]
        is_item = root.text in self._brackets
        is_path = is_item or root.text in self._roots or root.text in self._named  # a named expression may be a path
        if not is_path or self._count_arguments() != 2:  # noqa: PLR2004 - the path and what replaces it
            raise _at(name, "default: expected a path such as body.a.b and a value, got something else")
        if is_item:
            self._default_in_item(name, root)
            return
        self._defaulted = root
        self._edits.append(Edit(name.start, name.start + len(name.text), own_name(name.text)))
        self._calls.add(own_name(name.text))

    def _default_in_item(self, name: Token, root: Token) -> None:
        """Edit a call of `default` for a macro's element to a condition in CEL, since only CEL knows the element."""
        segments, end = segments_at(self._tokens, self._at + 2)
        comma = self._tokens[end]
        if comma.text != ",":
            raise _at(root, f"default: expected a path such as {root.text}.a.b, got an expression")
        if len(segments) > MAX_SEGMENTS:
            raise _at(root, f"default: expected a path of at most {MAX_SEGMENTS} segments, got {len(segments)}")
        path, conditions = root.text, []
        for key, position in segments:  # `type([])`, since an element may be named `list`
            if key is None:
                conditions += [f"type({path}) == type([])", f"size({path}) > {position}"]
                path += f"[{position}]"
            else:
                conditions += [f"type({path}) == type({{}})", f"'{key}' in {path}"]
                path += f"['{key}']"
        conditions.append(f"{path} != null")
        self._edits.append(Edit(name.start, comma.start + 1, f"({' && '.join(conditions)} ? {path} :"))

    def _pattern(self, name: Token) -> None:
        """Compile the pattern once. One from the event would be the sender's choice, and compiled at each call."""
        _, literal, end = self._tokens[self._at : self._at + 3]
        if literal.kind not in ("raw", "text", "line") or literal.text[0] in "bB" or end.text != ")":
            raise _at(literal, f"expected the pattern of {name.text}() as one string literal, got something else")
        try:
            pattern = Pattern(self._read_literal(literal.text), captures=name.text == "extract")
        except ExpressionError as error:
            raise _at(literal, str(error)) from error
        self._edits.append(Edit(name.start, end.start + 1, f"{own_name(name.text)}({len(self._patterns)})"))
        self._calls.add(own_name(name.text))
        self._patterns.append(pattern)

    def _path(self, root: Token) -> None:
        """Read the literal segments, such as `.a['b'][0]`."""
        segments, self._at = segments_at(self._tokens, self._at)
        if root.text in ("headers", "query") and len(segments) == 1 and self._tokens[self._at - 1].kind == "name":
            self._refuse_hyphens(root)
        if root.text == "headers" and segments and (name := segments[0].key or "") != name.lower():
            raise _at(root, f"expected a header's name in lower case, got '{name}'")
        if root is self._defaulted:
            last = self._tokens[self._at - 1]
            if self._tokens[self._at].text != ",":
                raise _at(root, "default: expected a path such as body.a.b, got an expression")
            self._edits.append(Edit(root.start, last.start + len(last.text), str(len(self._paths))))
        self._paths.append(FieldPath(root.text, tuple(segments), self._at))

    def _refuse_hyphens(self, root: Token) -> None:
        """Report how to write `headers.x-id`, which CEL parses as a subtraction."""
        at, written = self._at, self._tokens[self._at - 1]
        name = written.text
        while (token := self._tokens[at]).start == written.start + len(written.text) and (
            token.text == "-" or token.kind in ("name", "number")
        ):
            name, written, at = name + token.text, token, at + 1
        if written.kind != "sign" and "-" in name:
            self._at = at
            plain = name.lower() if root.text == "headers" else name
            raise _at(root, f"expected {root.text}['{plain}'], got {root.text}.{name}")


def is_free_name(name: str) -> bool:
    """Return whether an expression may be given this name."""
    return name.isascii() and name.isidentifier() and name not in _TAKEN and not name.endswith("__")


def own_name(function: str) -> str:
    """Return the name of one of our functions in edited texts. It isn't one of CEL's, and rules may not use it."""
    return f"{function}__"


def _arguments(function: Function) -> str:
    least, most = function.least - function.is_method, function.most - function.is_method
    count = f"{least}" if least == most else f"{least} to {most}"
    return f"{count} argument{'' if most == 1 else 's'}"


def add_part(parts: dict[str, Parts], path: FieldPath) -> None:
    """Add the parts that a path needs. Lists are always included as a whole."""
    *names, last = [path.root, *[segment.key for segment in path.segments if segment.key is not None]]
    below = parts
    for name in names:
        if name in below and not below[name]:
            return
        below = below.setdefault(name, {})
    below[last] = {}


def _at(token: Token, message: str, hint: str = "") -> ExpressionError:
    return ExpressionError(f"{message} at character {token.start + 1}{hint}")
