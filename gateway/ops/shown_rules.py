"""A rule file as people may see it: its text, line by line, without what is or may be a secret. Pure.

Secrets belong into references (`${NAME}`, `${file:…}`), which are shown; whatever is written literally where the schema
has a secret is hidden, and so is what the schema doesn't know, and what comments say of secrets. Its tests, which may
have bodies of real events, aren't shown. Line numbers stay those of the file.
"""

import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, assert_never

import yaml
from typing_extensions import override

from gateway.client.masking import Mask
from gateway.ops.verification import masked_secret
from gateway.rules.schema import ROOT
from gateway.rules.value_kinds import URL, ByKey, Kind, MappingKind, NameOr, Scalar, Several, Table, Tree
from gateway.rules.yaml_document import take_apart
from gateway.text import MASK
from gateway.turns import give_way

try:
    from yaml import CSafeLoader as _Base
except ImportError:  # PyYAML was built without libyaml
    from yaml import SafeLoader as _Base  # type: ignore[assignment] # the stubs don't relate the two loaders

MAX_DEPTH = 64
_SECTIONS = {"sources": "source", "destinations": "destination"}
_SHOWN_OF_VERIFY = frozenset(
    (
        *("scheme", "header", "headers", "algorithm", "algorithms", "encoding", "secret_encoding", "signed", "prefix"),
        *("timestamp", "tolerance", "until", "id_header", "field", "form", "query", "position", "covered", "pending"),
    )
)
"""Keys below `verify` that say how a sender signs: none of their values is a secret."""
_SUSPECT = re.compile(r"auth|cookie|credential|passw|secret|session|signature|token|api[-_]?key", re.IGNORECASE)
_COMMENT = re.compile(r"(?:^|(?<=\s))#[^\r\n]*", re.MULTILINE)
_LIKE_TOKEN = re.compile(r"(?=[A-Za-z0-9+/=_.~-]*[0-9])(?=[A-Za-z0-9+/=_.~-]*[A-Za-z])[A-Za-z0-9+/=_.~-]{16,}")
"""What may be a token: a long word of letters and digits."""
_HOST = re.compile(r"https?://[A-Za-z0-9._:\[\]-]+(?=[/?]|$)")
_UNKNOWN = Scalar("", str, {}, is_secret=True)
"""Of what the schema doesn't know: it may be anything."""
_KEPT, _OF_VERIFY, _HIDDEN, _HIDDEN_URL = range(4)
"""Ways to look at a node, beside as one of a kind."""
MOST_LITERALS = 100
"""Secrets that are looked for in comments: with more of them, none is shown."""


class Entry(NamedTuple):
    """A source, destination or route, by its kind and name as written, and its first and last line, from 1 on."""

    kind: str
    name: str
    first: int
    last: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownFile:
    """A file's lines as people may see them, what is in them, by its first line, and the keys of the whole.

    `tests` are the first and last line of its tests, whose lines are empty here. `problem` is why nothing is shown.
    """

    lines: tuple[str, ...] = ()
    entries: tuple[Entry, ...] = ()
    keys: frozenset[str] = frozenset()
    tests: tuple[int, int] | None = None
    problem: str = ""


def shown_file(text: str) -> ShownFile:
    """Return a file as people may see it. In a thread, it gives way to the event loop."""
    try:
        root = _Loader(text).get_single_node()
    except yaml.YAMLError:
        return ShownFile(problem="it isn't YAML, so that it can't be told what of it is a secret")
    try:
        return _shown(root, text)
    finally:
        take_apart(root)


def _shown(root: yaml.Node | None, text: str) -> ShownFile:
    if not isinstance(root, yaml.MappingNode):
        return ShownFile(problem="it isn't a mapping, so that it can't be told what of it is a secret")
    walk = _Walk()
    try:
        walk.mapping(root, ROOT, 0)
    except _TooDeepError:
        return ShownFile(problem="it has too many levels")
    lines = tuple(walk.shown(text).replace("\r\n", "\n").replace("\r", "\n").split("\n"))
    lines = lines[:-1] if lines[-1] == "" else lines
    tests, keys = None, frozenset([str(key.value) for key, _ in root.value])
    for key, value in root.value:
        if isinstance(key, yaml.ScalarNode) and key.value == "tests":
            tests = key.start_mark.line + 1, max(key.start_mark.line + 1, _last_line(value))
    if tests is not None:
        lines = (*lines[: tests[0] - 1], *[""] * (tests[1] - tests[0] + 1), *lines[tests[1] :])
    walk.forget()
    entries = tuple(sorted(_entries(root), key=lambda each: each.first))
    return ShownFile(lines=lines, entries=entries, keys=keys, tests=tests)


class _TooDeepError(Exception):
    """A node is below more levels than rules have."""


class _Loader(_Base):
    """PyYAML's composer, which gives way: it composes the whole document in one call."""

    @override
    def resolve(self, *arguments: Any) -> Any:
        """Resolve a node's tag, as PyYAML does for each node."""
        give_way()
        return super().resolve(*arguments)  # type: ignore[no-untyped-call]


class _Walk:
    """Finds what to hide: which parts of the text, and by what they are replaced."""

    def __init__(self) -> None:
        self._hidden: dict[tuple[int, int], str] = {}
        self._scalars: list[tuple[int, int]] = []
        self._literals: set[str] = set()
        self._seen: set[tuple[int, int]] = set()
        """Nodes with the kinds as which they were visited: aliases share one, and may be many."""

    def shown(self, text: str) -> str:
        """Return the text without what is hidden."""
        parts, at = list[str](), 0
        starts = sorted(self._scalars)
        is_shown = len(self._literals) <= MOST_LITERALS
        mask = Mask([each.encode("utf-8", "surrogatepass") for each in self._literals] if is_shown else ())
        comments = [
            (found.start(), found.end(), _comment(found[0], mask) if is_shown else f"# {MASK}")
            for found in _COMMENT.finditer(text)
            if not _is_within(found.start(), starts)
        ]
        for begin, end, shown in sorted([*[(*span, shown) for span, shown in self._hidden.items()], *comments]):
            give_way()
            if begin >= at:
                parts += (text[at:begin], shown, "\n" * text.count("\n", begin, end))
                at = end
        return "".join([*parts, text[at:]])

    def forget(self) -> None:
        """Let go of what was seen, a part at a time: all of it at once would keep the event loop waiting."""
        while self._seen:
            give_way()
            self._seen.pop()
        while self._scalars:
            give_way()
            self._scalars.pop()

    def _is_new(self, node: yaml.Node, way: int, depth: int) -> bool:
        """Return whether a node wasn't looked at in this way before. Raises _TooDeepError."""
        give_way()
        if depth > MAX_DEPTH:
            raise _TooDeepError
        if (id(node), way) in self._seen:
            return False
        self._seen.add((id(node), way))
        return True

    def visit(self, node: yaml.Node, kind: Kind, depth: int) -> None:  # noqa: C901 - a case for each kind
        """Look at a node that has to be of a kind."""
        if not self._is_new(node, id(kind), depth):
            return
        match kind:
            case Scalar() | Tree() if not kind.is_secret:
                self._keep(node, depth)
            case Scalar():
                self._hide_path(node, depth) if kind.expected == URL.expected else self._hide(node, depth)
            case Tree():
                self._verify(node, depth)
            case Several():
                for item in node.value if isinstance(node, yaml.SequenceNode) else [node]:
                    self.visit(item, kind.item, depth + 1)
            case Table():
                self._entries(node, kind.value, depth)
            case NameOr():
                self.visit(node, kind.record, depth) if isinstance(node, yaml.MappingNode) else self._keep(node, depth)
            case ByKey():
                self.visit(node, kind.kinds.get(_value_of(node, kind.key), kind.otherwise), depth)
            case MappingKind():
                self.mapping(node, kind, depth)
            case _:
                assert_never(kind)

    def mapping(self, node: yaml.Node, kind: MappingKind, depth: int) -> None:
        """Look at a mapping with known keys."""
        if not isinstance(node, yaml.MappingNode):
            self._hide(node, depth)
            return
        for key, value in node.value:
            known = kind.by_name.get(key.value) if isinstance(key, yaml.ScalarNode) else None
            if known is None:
                self._hide(key, depth)
            else:
                self._keep(key, depth)
            if known is None or not known.is_of_tests:  # their lines are left out
                self.visit(value, _UNKNOWN if known is None else known.kind, depth + 1)

    def _entries(self, node: yaml.Node, kind: Kind, depth: int) -> None:
        if not isinstance(node, yaml.MappingNode):
            self._hide(node, depth)
            return
        for key, value in node.value:
            self._keep(key, depth)
            is_suspect = isinstance(value, yaml.ScalarNode) and _SUSPECT.search(str(key.value))
            self._hide(value, depth + 1) if is_suspect else self.visit(value, kind, depth + 1)

    def _keep(self, node: yaml.Node, depth: int) -> None:
        """Keep a value as it is, but for what a credential's name has below it."""
        if not self._is_new(node, _KEPT, depth):
            return
        match node:
            case yaml.ScalarNode():
                self._scalars.append(_span(node))
            case yaml.SequenceNode():
                for item in node.value:
                    self._keep(item, depth + 1)
            case yaml.MappingNode():
                for key, value in node.value:
                    self._keep(key, depth + 1)
                    is_suspect = isinstance(key, yaml.ScalarNode) and _SUSPECT.search(key.value)
                    self._hide(value, depth + 1) if is_suspect else self._keep(value, depth + 1)
            case _:  # there is no other
                self._hide(node, depth)

    def _verify(self, node: yaml.Node, depth: int) -> None:
        """Look at what is below `verify`: what isn't known to be none is a secret."""
        if not self._is_new(node, _OF_VERIFY, depth):
            return
        match node:
            case yaml.SequenceNode():
                for item in node.value:
                    self._verify(item, depth + 1)
            case yaml.MappingNode():
                for key, value in node.value:
                    self._keep(key, depth + 1)
                    is_shown = isinstance(key, yaml.ScalarNode) and key.value in _SHOWN_OF_VERIFY
                    self._keep(value, depth + 1) if is_shown else self._verify(value, depth + 1)
            case _:
                self._hide(node, depth)

    def _hide(self, node: yaml.Node, depth: int) -> None:
        """Hide a value, but for references."""
        if not self._is_new(node, _HIDDEN, depth):
            return
        match node:
            case yaml.ScalarNode():
                self._scalars.append(_span(node))
                self._replace(node, masked_secret(node.value))
            case yaml.SequenceNode():
                for item in node.value:
                    self._hide(item, depth + 1)
            case yaml.MappingNode():
                for pair in node.value:
                    for each in pair:
                        self._hide(each, depth + 1)
            case _:  # there is no other
                raise _TooDeepError

    def _hide_path(self, node: yaml.Node, depth: int) -> None:
        """Hide a URL, but for references, and its host if no user is named before that."""
        host = _HOST.match(node.value) if isinstance(node, yaml.ScalarNode) else None
        if host is None or not isinstance(node, yaml.ScalarNode):
            self._hide(node, depth)
        elif self._is_new(node, _HIDDEN_URL, depth):
            self._scalars.append(_span(node))
            rest = node.value[host.end() :]
            if rest not in ("", "/") and _span(node) not in self._hidden:  # as another kind, all of it is
                self._replace(node, f"{host[0]}/{masked_secret(rest.removeprefix('/'))}")

    def _replace(self, node: yaml.ScalarNode, shown: str) -> None:
        if node.value and shown != node.value:
            self._hidden[_span(node)] = f'"{shown}"' if node.style in ('"', "'") else shown
            self._literals.add(node.value)


def _comment(text: str, mask: Mask) -> str:
    """Return a comment without what may be a secret."""
    if _SUSPECT.search(text):
        return f"# {MASK}"
    return _LIKE_TOKEN.sub(MASK, mask.masked(text.encode("utf-8", "surrogatepass")).decode("utf-8", "replace"))


def _span(node: yaml.Node) -> tuple[int, int]:
    return node.start_mark.index, node.end_mark.index


def _is_within(at: int, spans: list[tuple[int, int]]) -> bool:
    """Return whether a place is within one of these spans, in their order."""
    index = bisect_right(spans, (at, 1 << 62)) - 1
    return index >= 0 and spans[index][0] <= at < spans[index][1]


def _value_of(node: yaml.Node, name: str) -> str:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.value == name and isinstance(value, yaml.ScalarNode):
                return str(value.value)
    return ""


def _entries(root: yaml.MappingNode) -> Iterator[Entry]:
    for key, section in root.value:
        give_way()
        if not isinstance(key, yaml.ScalarNode):
            continue
        if key.value in _SECTIONS and isinstance(section, yaml.MappingNode):
            for name, value in section.value:
                yield Entry(_SECTIONS[key.value], str(name.value), name.start_mark.line + 1, _last_line(value))
        elif key.value == "routes" and isinstance(section, yaml.SequenceNode):
            for item in section.value:
                give_way()
                if name := _value_of(item, "name"):
                    yield Entry("route", name, item.start_mark.line + 1, _last_line(item))


def _last_line(node: yaml.Node) -> int:
    """Return the last line of a node, from 1 on: what is between it and the next is not its own."""
    last = node
    for _ in range(MAX_DEPTH):  # a node may be below itself
        if not isinstance(last, yaml.CollectionNode) or last.flow_style or not last.value:
            break
        last = last.value[-1][1] if isinstance(last, yaml.MappingNode) else last.value[-1]
    if isinstance(last, yaml.ScalarNode) and last.style in ("|", ">"):
        return max(last.start_mark.line + 1, last.end_mark.line)
    return last.end_mark.line + 1
