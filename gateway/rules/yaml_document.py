"""Reads a YAML file as values with their locations.

Scalars are resolved by YAML's 1.2 core schema (https://yaml.org/spec/1.2.2/#103-core-schema), not by PyYAML's 1.1
resolver: `on`, `no` and `12:30` are strings, `1e3` and `0o17` are numbers, and `<<` doesn't merge.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml
from typing_extensions import override

from gateway.turns import give_way

try:
    from yaml import CSafeLoader as _Base
except ImportError:  # PyYAML was built without libyaml: the same, ten times slower
    from yaml import SafeLoader as _Base  # type: ignore[assignment] # the stubs don't relate the two loaders

MAX_VALUES = 1_000_000  # Per file, with aliases expanded; 10,000 routes have about 300,000.
MAX_DEPTH = 64  # Also ends cycles of aliases.
TESTS = "tests"
"""The key of a file whose value isn't part of the rules."""
INTEGERS = range(-(2**63), 2**64)  # Those that JSON and CEL can represent.

_TAG = "tag:yaml.org,2002:"


def _integer(text: str) -> int:
    digits = len(str(INTEGERS.stop)) + 1
    number = int(text, {"0o": 8, "0x": 16}.get(text[:2], 10)) if len(text) <= digits else INTEGERS.stop
    if number not in INTEGERS:
        raise ValueError("expected an integer of at most 64 bits, got a larger one (in quotes it is a string)")
    return number


def _float(text: str) -> float:
    number = float(text) if text[-1] in "0123456789." else math.inf  # the rest is .inf and .nan
    if not math.isfinite(number):
        raise ValueError("expected a finite number, got another (in quotes it is a string)")
    return number


_CORE: Mapping[str, tuple[re.Pattern[str], list[str], Callable[[str], Any]]] = {
    "null": (re.compile(r"(?:~|null|Null|NULL|)\Z"), ["~", "n", "N", ""], lambda _: None),
    "bool": (re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"), list("tTfF"), lambda text: text[0] in "tT"),
    "int": (re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z"), list("-+0123456789"), _integer),
    "float": (
        re.compile(
            r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
        ),
        list("-+.0123456789"),
        _float,
    ),
}
"""The scalars of the core schema except strings: pattern, possible first characters, parser."""


Severity = Literal["error", "warning"]
Code = Literal[
    "document",  # the file can't be read, or isn't YAML as supported here
    "value",  # expected …, got …
    "unknown_key",
    "missing_key",
    "unknown_name",  # no such source or destination
    "duplicate",
    "expression",  # CEL
    "include",
    "unresolved",  # a missing environment variable or file
    "unverified",  # warning: scheme none
    "unused",  # warning: no route uses it
    "weak",  # warning: it protects less than it appears to
    "expiring",  # warning: a secret that has expired, or will soon, or a route that has
    "literal",  # warning: a reference or a template in another form, which is taken as it is written
    "plain",  # warning of --strict: http without a credential
    "unlimited",  # the same: a destination without a rate
    "unreachable",  # the same: a route whose conditions exclude each other
    "matchable",  # the same: a `when` that `match` can say
    "slow",  # the same: a pattern that takes long
    "lossy",  # the same: retries by which events are lost
    "certificate",  # of the ingress
    "egress",  # warning: an address that no delivery may reach
    "identity",  # of the events in the log
    "unseen",  # warning of --strict and --since: a field that no event had
    "policy",  # an included file does what the root file's policy forbids
    "expired",  # every secret has expired: an error of `gateway check`, and a warning where rules become active
]


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Problem:
    """A problem in a rule file. Line and column start at 1; a line of 0 means the whole file."""

    file: str
    line: int
    column: int
    path: str
    message: str
    code: Code = field(compare=False)
    severity: Severity = field(compare=False, default="error")

    @override
    def __str__(self) -> str:
        where = f"{self.file}:{self.line}:{self.column}" if self.line else self.file
        return ": ".join(filter(None, (where, self.path, self.message)))


class Node:
    """A value and its location: `line` and `column` start at 1, `key_location` is that of its key, if it has one.

    `value` is None, a bool, int, float or str, or a list or a dict of nodes. `path` is, for example, `routes[2].retry`.
    An alias's value has the path of the alias and the location of the anchor. `is_broken`: its problem is reported.
    """

    __slots__ = ("column", "file", "has_text_key", "is_broken", "key_location", "line", "path", "value")

    def __init__(self, *, file: str, path: str, line: int, column: int) -> None:
        self.file = file
        self.path = path
        self.line = line
        self.column = column
        self.key_location = (line, column)
        self.has_text_key = True
        self.is_broken = False
        self.value: Any = None

    def child(self, step: str | int) -> "Node | None":
        """Return the node under a key or at an index, if there is one."""
        found: Node | None = None
        if isinstance(self.value, dict):
            found = self.value.get(str(step))
        elif isinstance(self.value, list) and isinstance(step, int) and 0 <= step < len(self.value):
            found = self.value[step]
        return found

    def problem(self, code: Code, message: str, *, severity: Severity = "error", at_key: bool = False) -> Problem:
        """Return a problem at this location."""
        line, column = self.key_location if at_key else (self.line, self.column)
        return Problem(
            file=self.file, line=line, column=column, path=self.path, message=message, code=code, severity=severity
        )


def is_of_tests(problem: Problem) -> bool:
    """Return whether a problem is below a document's `tests`, which only `gateway test` reads."""
    return re.match(r"tests(?![^.\[])", problem.path) is not None


def read_document(path: Path, problems: list[Problem]) -> Node | None:
    """Parse a file, which has to be a single document. Adds to the problems; None if it can't be parsed."""
    text = text_of(path, problems)
    return None if text is None else parse_document(str(path), text, problems)


def text_of(path: Path, problems: list[Problem]) -> str | None:
    """Read a file's text. Adds to the problems; None if it can't be read, or isn't text."""
    try:
        return _decode(path)
    except _UnreadableError as error:
        problems.append(_problem_of(str(path), error))
        return None


def parse_document(file: str, text: str, problems: list[Problem]) -> Node | None:
    """Parse a text, which has to be a single document. Adds to the problems; None if it can't be parsed."""
    try:
        root = _compose(text)
        try:
            return _Builder(file, problems, text).build(root, "", 0)
        finally:
            take_apart(root)
    except _UnreadableError as error:
        problems.append(_problem_of(file, error))
        return None


def events_of(text: str) -> Iterator[yaml.Event]:
    """Yield what a text is made of, one after the other, without copies for aliases. Raises yaml.YAMLError."""
    yield from yaml.parse(text, Loader=_Base)


def take_apart(*roots: object) -> None:
    """Free trees of nodes one node at a time. Freed at once, they would block other threads for 50 ms.

    Lists, tuples and dicts of other values are traversed, but not changed.
    """
    waiting = list(roots)
    while waiting:
        give_way()
        item = waiting.pop()
        if isinstance(item, (Node, yaml.Node)):
            value, item.value = item.value, None
            if type(value) in (list, dict):
                waiting.append(value)
        elif type(item) is dict:
            waiting.extend(item.values())
        elif type(item) in (list, tuple):
            waiting.extend(item)  # type: ignore[arg-type] # it is one of these


def _problem_of(file: str, error: "_UnreadableError") -> Problem:
    return Node(file=file, path="", line=error.line, column=error.column).problem("document", error.message)


def scalar(text: str) -> Any:  # noqa: ANN401 # any scalar of YAML
    """Parse an unquoted scalar. Raises ValueError for a number that JSON can't represent."""
    for pattern, _, read in _CORE.values():
        if pattern.match(text):
            return read(text)
    return text


class _Loader(_Base):
    """PyYAML's composer with the core schema's resolver. It composes nodes without constructing objects."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 # as in PyYAML; empty, so that none is inherited

    @override
    def resolve(self, *arguments: Any) -> Any:
        """Resolve a node's tag, as PyYAML does for each node; it composes the whole document in one call."""
        give_way()
        return super().resolve(*arguments)  # type: ignore[no-untyped-call]


for _name, (_pattern, _first, _) in _CORE.items():
    _Loader.add_implicit_resolver(_TAG + _name, _pattern, _first)


class _UnreadableError(Exception):
    def __init__(self, line: int, column: int, message: str) -> None:
        super().__init__(message)
        self.line = line
        self.column = column
        self.message = message


def _decode(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _UnreadableError(0, 0, f"expected a file that can be read, got {reason_of(error)}") from error
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = content[: error.start].decode()
        raise _unreadable_after(before, f"expected UTF-8, got the byte 0x{content[error.start]:02x}") from error
    if forbidden := yaml.reader.Reader.NON_PRINTABLE.search(text):
        raise _unreadable_after(text[: forbidden.start()], f"expected text, got the character {forbidden[0]!a}")
    return text


def _unreadable_after(before: str, message: str) -> _UnreadableError:
    return _UnreadableError(before.count("\n") + 1, len(before) - before.rfind("\n"), message)


def _compose(text: str) -> yaml.Node:
    try:
        root = _Loader(text).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        if error.problem == "but found another document":
            raise _UnreadableError(line, column, "expected one document, got another after it") from error
        if (error.context or "").startswith("found duplicate anchor"):
            raise _UnreadableError(line, column, _of_anchor(text, error)) from error
        reason = ", ".join(filter(None, (error.context, error.problem)))
        hint = _hint(text, error)
        raise _UnreadableError(line, column, f"expected YAML, got a syntax error: {reason}{hint}") from error
    if root is None:
        raise _UnreadableError(1, 1, "expected a mapping, got an empty file")
    return root


def _of_anchor(text: str, error: yaml.MarkedYAMLError) -> str:
    """Return the message for a duplicate anchor."""
    again, first = error.problem_mark, error.context_mark
    line = text.splitlines()[again.line][again.column :] if again else ""
    name = re.search(r"&[^\s,\[\]{}]{1,60}", line)
    place = f", first in line {first.line + 1}, column {first.column + 1}" if first else ""
    return f"expected each anchor once, got {name[0] if name else 'one'} again{place}"


def _hint(text: str, error: yaml.MarkedYAMLError) -> str:
    """Guess what is wrong with a document, since YAML's parser only says where it stopped."""
    mark, began = error.problem_mark or yaml.Mark("", 0, 0, 0, None, 0), error.context_mark
    line = dict(enumerate(text.splitlines())).get(mark.line, "")
    problem, context = error.problem or "", error.context or ""
    place = "" if began is None else f"in line {began.line + 1}, column {began.column + 1}"
    hint = ""
    if "cannot start any token" in problem:
        is_tab = line[mark.column : mark.column + 1] == "\t"
        hint = "it is a tab, and YAML is indented by spaces" if is_tab else "a value that begins with it needs quotes"
    elif "mapping values are not allowed" in problem:
        is_key = re.fullmatch(r"\s*[\w.-]+", line[: mark.column])
        hint = "this line is indented more than its neighbours" if is_key else "a value with ': ' in it needs quotes"
    elif context.startswith(("while scanning an anchor", "while scanning an alias", "while scanning a tag")):
        hint = "a value that begins with &, * or ! needs quotes"
    elif context == "while scanning a quoted scalar":
        hint = f"the quote {place} isn't closed"
    elif "expected ','" in problem:
        is_template = "{{" in line[max(0, mark.column - 4) : mark.column + 2]
        unclosed = f"a comma or a quote is missing, or what begins {place} isn't closed"
        hint = "${{ … }} within {…} or […] needs quotes" if is_template else unclosed
    elif context == "while parsing a block mapping" and re.search(r":\s+(['\"]).*\1\s*\S", line[: mark.column + 1]):
        hint = "a value that begins with a quote ends at the next one: put other quotes around all of it"
    elif "parsing a block" in context:
        hint = f"this line is indented differently from the one {place}"
    return hint and f": {hint}"


def _has_swallowed(line: str) -> bool:
    """Return whether a line may have an unquoted string with ' #' in it, followed by an expression."""
    at = line.find("#")
    return at >= 0 and "${{" in line[at:]


class _Builder:
    """Converts PyYAML's nodes to ours. Aliases become copies, so that each use has its own path."""

    def __init__(self, file: str, problems: list[Problem], text: str) -> None:
        self.file = file
        self.problems = problems
        self.commented = {number: line for number, line in enumerate(text.splitlines()) if _has_swallowed(line)}
        self.count = 0

    def build(self, source: yaml.Node, path: str, depth: int) -> Node:
        give_way()
        line, column = _place(source)
        node = Node(file=self.file, path=path, line=line, column=column)
        self.count += 1
        if self.count > MAX_VALUES:
            raise _UnreadableError(line, column, f"expected at most {MAX_VALUES} values, aliases included, got more")
        if depth > MAX_DEPTH:
            raise _UnreadableError(line, column, f"expected at most {MAX_DEPTH} levels, got more")
        tag = source.tag.removeprefix(_TAG)
        if isinstance(source, yaml.SequenceNode) and tag == "seq":
            node.value = [self.build(item, f"{path}[{index}]", depth + 1) for index, item in enumerate(source.value)]
        elif isinstance(source, yaml.MappingNode) and tag == "map":
            node.value = self.mapping(source, path, depth)
        elif isinstance(source, yaml.ScalarNode) and tag == "str":
            node.value = source.value
            if self.commented and not source.style:
                self.warn_of_comment(node, source.end_mark)
        elif isinstance(source, yaml.ScalarNode) and tag in _CORE:
            self.scalar(node, source.value, tag)
        else:
            self.refuse(node, "expected no tag but YAML's own, got another: a value that begins with ! needs quotes")
        return node

    def mapping(self, source: yaml.MappingNode, path: str, depth: int) -> dict[str, Node]:
        children: dict[str, Node] = {}
        for key, item in source.value:
            line, column = _place(key)
            location = Node(file=self.file, path=path, line=line, column=column)
            if not isinstance(key, yaml.ScalarNode):
                of_event = " (values of an event are written ${{ … }}, in quotes)"
                hint = of_event if isinstance(key, yaml.MappingNode) else ""
                self.refuse(location, f"expected a string as a key, got a list or a mapping{hint}")
                continue
            name = key.value
            if name == "<<" and not key.style:
                self.refuse(location, "expected a key, got a merge (<<), which YAML 1.2 doesn't have: see `defaults`")
            elif first := children.get(name):
                self.refuse(
                    location, f"expected each key once, got {name!r} again, first on line {first.key_location[0]}"
                )
            else:
                build = self.build if path or name != TESTS else self.tests
                child = children[name] = build(item, f"{path}.{name}" if path else name, depth + 1)
                child.key_location = (line, column)
                child.has_text_key = key.tag == _TAG + "str"
        return children

    def tests(self, source: yaml.Node, path: str, depth: int) -> Node:
        """Convert the `tests`, with a limit and a problem of their own."""
        count = self.count
        try:
            return self.build(source, path, depth)
        except _UnreadableError as error:
            node = Node(file=self.file, path=path, line=error.line, column=error.column)
            self.refuse(node, error.message)
            return node
        finally:
            self.count = count

    def scalar(self, node: Node, text: str, tag: str) -> None:
        pattern, _, read = _CORE[tag]
        if not pattern.match(text):
            return self.refuse(node, f"expected a value of the tag !!{tag}, got {text[:60]!r}")
        try:
            node.value = read(text)
        except ValueError as error:
            return self.refuse(node, str(error))

    def warn_of_comment(self, node: Node, end: yaml.Mark) -> None:
        comment = self.commented.get(end.line, "")[end.column :].lstrip()
        # After words, it is a comment. A number or name right after the # is part of the string.
        if comment.startswith("#") and not comment.startswith("# "):
            message = "expected quotes around a string with ' #' in it, got a comment with ${{ … }} in it"
            self.problems.append(node.problem("literal", message, severity="warning"))

    def refuse(self, node: Node, message: str) -> None:
        node.is_broken = True
        self.problems.append(node.problem("document", message))


def reason_of(error: OSError) -> str:
    """Return why a file can't be read."""
    return (error.strerror or str(error)).lower()


def _place(source: yaml.Node) -> tuple[int, int]:
    mark = source.start_mark
    return mark.line + 1, mark.column + 1
