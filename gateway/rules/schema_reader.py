"""Parses a YAML document by the schema: returns values, or every problem with its location. Resolves references."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, assert_never

from gateway.model import ExpressionError
from gateway.rules import hints
from gateway.rules.conditions import ConditionError
from gateway.rules.expressions import hiding, naming, using
from gateway.rules.file_stamps import Stamp, stamp_of
from gateway.rules.functions import NamedSecret
from gateway.rules.references import REFERENCE, content_of
from gateway.rules.templates import Template, TemplateError
from gateway.rules.value_kinds import ByKey, Kind, MappingKind, NameOr, Scalar, Several, Table, Tree, has_secrets
from gateway.rules.yaml_document import Code, Node, Problem, Severity, scalar, take_apart
from gateway.text import did_you_mean, hidden, without_parts
from gateway.turns import give_way
from gateway.verify.presets import SchemeError

MAX_HINTS = 100  # Unknown keys for which a suggestion is looked up.
SHOWN = 60  # Maximum characters of a value in a message.

_TEMPLATE = re.compile(r"(?<!\$)\$\{\{")
_NAMED = re.compile(r"\$\{[A-Za-z0-9_.]{1,60}\}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)

# The value of a key with a problem or an unresolved reference: it is treated as missing.
ABSENT: Any = object()


@dataclass(slots=True)
class ParsedMapping:
    """A parsed mapping: its values by key, and its location."""

    node: Node
    values: dict[str, Any]


def free_gradually(files: Iterable[ParsedMapping]) -> None:
    """Free the contents of files gradually; see `take_apart`."""
    waiting: list[object] = list(files)
    while waiting:
        give_way()
        item = waiting.pop()
        if isinstance(item, ParsedMapping):
            take_apart(item.node)
            waiting.extend(item.values.values())
            item.values.clear()
        elif isinstance(item, dict):
            waiting.extend(item.values())
        elif isinstance(item, list | tuple):
            waiting.extend(item)


@dataclass(frozen=True, slots=True)
class NameRef:
    """A use of a name, with its location."""

    name: str
    node: Node


@dataclass(frozen=True, slots=True)
class TemplateRef:
    """A use of a name that is a template, with its location."""

    template: Template
    node: Node


class SchemaReader:
    """Parses files by the schema. Collects problems instead of stopping at the first one."""

    def __init__(self, environ: Mapping[str, str], *, is_strict: bool, reads_secrets: bool = True) -> None:
        """Without `reads_secrets`, each `${file:…}` counts as unresolved, and isn't read."""
        self.environ = environ
        self._reads_secrets = reads_secrets
        self.is_strict = is_strict
        self._hints: dict[tuple[str, int, str], str] = {}
        self.whole = MappingKind(name="", about="", keys=())
        """What the main file may have."""
        self.problems: list[Problem] = []
        self.files: dict[Path, Stamp | None] = {}
        """The files and folders that a reload watches, with their stamps from right before each was read."""
        self.has_gaps = False
        """A file can't be read, so an unknown name may be defined there."""
        self.is_incomplete = False
        """Something essential to the rules is missing: it has a problem, or an unresolved reference."""
        self.unresolved: set[Node] = set()
        self.secret_values: set[str] = set()
        """The values of references, except defaults, which are literally in the file."""
        self.secrets: Mapping[str, NamedSecret] = {}
        """The secrets that expressions in the current file may use, by name."""
        self.named_secrets: list[tuple[NamedSecret, Node]] = []
        """All named secrets that were read, with their locations."""
        self.secret_lengths: dict[Node, int] = {}
        """For each node, the total characters of the secret values in its text."""

    @property
    def has_errors(self) -> bool:
        return any(problem.severity == "error" for problem in self.problems)

    def watch(self, path: Path) -> None:
        """Watch a file or folder for reloads. Call it before reading it: the first stamp counts."""
        if path not in self.files:
            self.files[path] = stamp_of(path)

    def report(
        self, node: Node, code: Code, message: str, *, severity: Severity = "error", at_key: bool = False
    ) -> None:
        problem = node.problem(code, message, severity=severity, at_key=at_key)
        if code == "unknown_key" and node.value is None:  # it may be a secret in braces
            problem = replace(problem, path=node.path.rpartition(".")[0])
        self.problems.append(problem)

    # --- References ---

    def text(self, node: Node, kind: Scalar | Tree) -> str | None:
        """Return a string with its references resolved; None if one can't be. That is reported."""
        is_template = isinstance(kind, Tree) and kind.is_template
        written: str = node.value
        if "${" not in written:
            return written
        is_whole = True

        def replace(found: re.Match[str]) -> str:
            nonlocal is_whole
            if found[0] == "$${":
                # A template's escape is left to the template.
                return "$${" if is_template and written.startswith("{", found.end()) else "${"
            if found[0] == "${{":
                if not is_template:
                    self.report(node, "value", f"expected no ${{{{ … }}}} here{hints.of_template(node.path, kind)}")
                    is_whole = False
                return found[0]
            value = self._reference(node, found[0], found[1])
            if value is None:
                is_whole = False
                return found[0]
            _, has_default, default = found[1].partition(":-")
            if not has_default or value != default:
                self.secret_lengths[node] = self.secret_lengths.get(node, 0) + len(value)
                if value:
                    self.secret_values.add(value)
            return value

        resolved = REFERENCE.sub(replace, written)
        if is_whole:
            return resolved
        self.unresolved.add(node)
        return None

    def _reference(self, node: Node, written: str, inner: str) -> str | None:
        name, has_default, default = inner.partition(":-")
        if not written.endswith("}") or not (inner.startswith("file:") or _VARIABLE.fullmatch(name)):
            expected = "${NAME}, ${NAME:-default}, ${file:/path} or $${"
            got = repr(written) if _NAMED.fullmatch(written) else "another form"
            hint = hints.of_reference(inner, node.path)
            self.report(node, "value", f"expected {expected}, got {got}{hint}")
            return None
        if inner.startswith("file: "):
            self.report(node, "value", "expected a path right after `file:`, got a space")
            return None
        if inner.startswith("file:"):
            return self._secret(node, Path(node.file).parent / inner.removeprefix("file:"))
        value = self.environ.get(name)
        if has_default:
            return value or default
        if value is None:
            self._unresolved(node, f"the environment variable {name} isn't set{hints.of_variable(name, node.path)}")
        return value

    def _secret(self, node: Node, path: Path) -> str | None:
        self.watch(path)  # also if missing: it may appear later
        if not self._reads_secrets:
            self._unresolved(node, f"{path} isn't read here")
            return None
        try:
            return content_of(path)
        except ValueError as error:
            self._unresolved(node, str(error))
            return None

    def _unresolved(self, node: Node, message: str) -> None:
        self.report(node, "unresolved", message, severity="error" if self.is_strict else "warning")

    # --- Kinds ---

    def read(self, node: Node, kind: Kind) -> Any:  # noqa: ANN401 # what the kind says
        """Return a parsed value; ABSENT if there is a problem. That is reported."""
        give_way()
        return ABSENT if node.is_broken else self._read(node, kind)

    def _read(self, node: Node, kind: Kind) -> Any:  # noqa: ANN401, PLR0911 # what the kind says
        match kind:
            case Scalar():
                return self._scalar(node, kind)
            case Tree():
                return self._tree(node, kind)
            case Several():
                return self._several(node, kind)
            case Table():
                return self._table(node, kind)
            case NameOr():
                return self._name_or(node, kind)
            case ByKey():
                return self._by_key(node, kind)
            case MappingKind():
                return self._record(node, kind)
        assert_never(kind)

    def _scalar(self, node: Node, kind: Scalar) -> Any:  # noqa: ANN401 # what the kind says
        value = node.value
        if kind.is_secret and hints.is_reference_elsewhere(value):
            self.report(node, "literal", hints.NO_REFERENCE, severity="warning")
        if isinstance(value, str) and "${" in value:
            known = len(self.problems)
            text = self.text(node, kind)
            if text is None:
                return self._unresolved_scalar(node, kind, self.problems[known:])
            value = text
        try:
            value = scalar(value) if value is not node.value and not kind.is_text else value
            with hiding(self.secret_values) if node in self.secret_lengths else nullcontext():
                parsed = kind.parse(value)
        except ExpressionError as error:
            told = without_parts(hidden(str(error), self.secret_values), self._values_in(node))
            self.report(node, "expression", f"expected {kind.expected}, got {_shown(node)}: {told}")
            return ABSENT
        except ValueError as error:
            guess = did_you_mean(value, kind.choices) if isinstance(value, str) else ""
            guess = guess or hints.of_quotes(value, kind)
            got = _shown(node, is_secret=kind.is_secret)
            told = hidden(str(error), self._values_in(node))
            self.report(node, "value", told or f"expected {kind.expected}, got {got}{guess}")
            return ABSENT
        return NameRef(str(parsed), node) if kind.is_name_ref else parsed

    def _values_in(self, node: Node) -> Collection[str]:
        """Return the values of references that a string may contain."""
        return self.secret_values if node in self.secret_lengths else ()

    def _unresolved_scalar(self, node: Node, kind: Scalar, problems: Sequence[Problem]) -> Any:  # noqa: ANN401 # what the kind says
        """Return the placeholder for a string with unresolved references, which have these problems."""
        try:
            return ABSENT if kind.unresolved is None else kind.unresolved(node.value)
        except ExpressionError as error:
            self.is_incomplete = True
            if all(problem.severity == "warning" for problem in problems):
                message = f"expected {kind.expected} that can be read without their values, got {_shown(node)}: {error}"
                self.report(node, "unresolved", message, severity="warning")
        except ValueError as error:
            if all(problem.code == "unresolved" for problem in problems):
                got = _shown(node, is_secret=kind.is_secret)
                self.report(node, "value", str(error) or f"expected {kind.expected}, got {got}")
        return ABSENT

    def _tree(self, node: Node, kind: Tree) -> Any:  # noqa: ANN401 # what the kind says
        if not isinstance(node.value, kind.shape):
            return self._mismatch(node, kind)
        known, unresolved = len(self.secret_lengths), len(self.unresolved)
        tree = self._plain(node, kind)
        try:
            with hiding(self.secret_values) if len(self.secret_lengths) > known else nullcontext():
                return kind.parse(tree)
        except (ConditionError, SchemeError) as error:
            self.locate(node, [(path, hidden(told, self.secret_values)) for path, told in error.problems])
        except TemplateError as error:
            for mistake in error.mistakes:
                location = _descend(node, mistake.path)
                told = without_parts(hidden(mistake.message, self.secret_values), self._values_in(location))
                if location not in self.unresolved:
                    self.report(location, "expression", mistake.told(location.value, told))
        except ValueError as error:
            if len(self.unresolved) == unresolved:
                self.report(node, "value", hidden(str(error), self.secret_values))
        # What is written in place of the values may be at fault: which rules they are isn't known.
        self.is_incomplete |= len(self.unresolved) > unresolved
        return ABSENT

    def _plain(self, node: Node, kind: Tree) -> Any:  # noqa: ANN401 # any JSON
        """Return a value of any shape, with references resolved and without locations."""
        value = None if node.is_broken else node.value
        if isinstance(value, str) and not kind.is_raw:
            if kind.is_template and hints.is_template_elsewhere(value):
                self.report(node, "literal", hints.NO_TEMPLATE, severity="warning")
            elif kind.is_secret and hints.is_reference_elsewhere(value):
                self.report(node, "literal", hints.NO_REFERENCE, severity="warning")
            text = self.text(node, kind)
            return text if text is not None else kind.unresolved or value
        if isinstance(value, list):
            return [self._plain(item, kind) for item in value]
        if isinstance(value, dict):
            return {key: self._plain(item, kind) for key, item in self._entries(node)}
        return value

    def _several(self, node: Node, kind: Several) -> Any:  # noqa: ANN401 # a tuple
        if not isinstance(node.value, list) and not kind.may_be_one:
            return self._mismatch(node, kind)
        items = node.value if isinstance(node.value, list) else [node]
        if not items and not kind.may_be_empty:
            return self._expected(node, f"{kind.expected}, with at least one item", "an empty list")
        return tuple([read for item in items if (read := self.read(item, kind.item)) is not ABSENT])

    def _table(self, node: Node, kind: Table) -> Any:  # noqa: ANN401 # a dict
        if not isinstance(node.value, dict):
            return self._mismatch(node, kind)
        table: dict[Any, Any] = {}
        for name, child in self._entries(node, has_number_keys=kind.has_number_keys):
            key, value = self._table_entry(name, child, kind)
            if key is not ABSENT and value is not ABSENT:
                table[key] = value
        return table

    def _table_entry(self, name: str, child: Node, kind: Table) -> tuple[Any, Any]:
        key: Any = ABSENT
        try:
            key = kind.key.parse(name)
        except ValueError as error:
            guess = did_you_mean(name, kind.key.choices)
            is_shown = child.value is not None or not has_secrets(kind)  # otherwise it may be a secret in braces
            got = repr(name[:SHOWN]) if is_shown else "another"
            message = (is_shown and str(error)) or f"expected {kind.key.expected}, got {got}{guess}"
            self.report(child, "value" if is_shown else "unknown_key", message, at_key=True)
        return key, self.read(child, kind.value)

    def _name_or(self, node: Node, kind: NameOr) -> Any:  # noqa: ANN401 # a NameRef, a TemplateRef, a ParsedMapping
        if not isinstance(node.value, str) or "{{" not in node.value:
            return self.read(node, kind.record if isinstance(node.value, dict) else kind.name)
        if not _TEMPLATE.search(node.value):
            return self._mismatch(node, kind.template)
        template = self.read(node, kind.template)
        return template if template is ABSENT else TemplateRef(template, node)

    def _by_key(self, node: Node, kind: ByKey) -> Any:  # noqa: ANN401 # a ParsedMapping
        chosen = node.child(kind.key) if isinstance(node.value, dict) else None
        if chosen is None:
            return self._record(node, kind.otherwise)
        if isinstance(chosen.value, str) and chosen.value in kind.kinds:
            return self._record(node, kind.kinds[chosen.value])
        guess = did_you_mean(chosen.value, kind.kinds) if isinstance(chosen.value, str) else ""
        return self._expected(chosen, f"one of {', '.join(kind.kinds)}", f"{_shown(chosen)}{guess}")

    def _record(self, node: Node, record: MappingKind) -> Any:  # noqa: ANN401 # a ParsedMapping
        if not isinstance(node.value, dict):
            return self._mismatch(node, record)
        self._read_secrets(node, record)
        named = self._named_expressions(node, record)
        with naming(named) if named else nullcontext():
            values = self._values(node, record, named)
        if record.is_choice and (len(node.value) > 1 or not node.value):
            got = ", ".join([name for name, child in node.value.items() if child.value is not None])[:SHOWN]
            self.report(node, "value", f"expected exactly one of {', '.join(record.by_name)}, got {got or 'none'}")
        for key in record.keys:
            if key.is_required and key.name not in node.value:
                self.report(node, "missing_key", f"expected the key {key.name!r}, got none")
        return ParsedMapping(node, values)

    def _read_secrets(self, node: Node, record: MappingKind) -> None:
        """Read a file's named secrets, in addition to those of the including file."""
        for key in record.keys:
            if key.gives_secrets and (child := node.value.get(key.name)) is not None:
                read = self.read(child, key.kind)
                if read is ABSENT:
                    read = {}
                own = child.value if isinstance(child.value, dict) else {}
                # A secret with a problem has been reported. Its name is still known.
                unknown = {name for name, node in own.items() if node in self.unresolved or name not in read}
                given = {name: NamedSecret(name, None if name in unknown else read[name]) for name in own}
                self.secrets = {**self.secrets, **given}
                self.named_secrets += [(secret, own[name]) for name, secret in given.items()]

    def _named_expressions(self, node: Node, record: MappingKind) -> dict[str, str]:
        """Parse the named expressions of a mapping. Each may use those before it."""
        named = {key.gives: key.gives for key in record.keys if key.gives and key.name in node.value}
        for key in record.keys:
            child = node.value.get(key.name)
            if not key.names_expressions or child is None or not isinstance(key.kind, Table):
                continue
            if not isinstance(child.value, dict):
                self._mismatch(child, key.kind)
                continue
            for name, written in self._entries(child):
                if named.get(name) == name:
                    self.report(
                        written, "value", f"expected another name, got {name!r}, the item of `split`", at_key=True
                    )
                with naming(named), using(self.secrets):
                    known, value = self._table_entry(name, written, key.kind)
                if known is not ABSENT:  # a problem has been reported; the name is still known
                    named = {**named, known: "null" if value is ABSENT else value.as_part}
        return named

    def _values(self, node: Node, record: MappingKind, named: Mapping[str, str]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        given = {key.gives for key in record.keys if key.gives in named}
        general = {name: text for name, text in named.items() if name not in given}
        for name, child in self._entries(node):
            key = record.by_name.get(name)
            if key and (key.is_of_tests or key.names_expressions or key.gives_secrets):
                continue
            if key:
                with (
                    using(self.secrets) if key.takes_secrets else nullcontext(),
                    naming(general) if given and not key.takes_given else nullcontext(),
                ):
                    value = self.read(child, key.kind)
                if value is not ABSENT:
                    values[name] = value
            elif not (record.is_choice and len(node.value) > 1):  # which is reported for the mapping
                hint = self._hint_of(name, record, hints.place_of(node.path))
                shown = "without a value" if child.value is None and has_secrets(record) else repr(name[:SHOWN])
                self.report(child, "unknown_key", f"unknown key {shown}{hint}", at_key=True)
        return values

    def _hint_of(self, name: str, record: MappingKind, place: str) -> str:
        """Return a suggestion for an unknown key. It takes a millisecond, so each name is looked up once."""
        give_way()
        which = name, id(record), place
        if which not in self._hints and len(self._hints) < MAX_HINTS:
            self._hints[which] = hints.of_unknown_key(name, record, place, self.whole)
        return self._hints.get(which, "")

    def _entries(self, node: Node, *, has_number_keys: bool = False) -> Iterator[tuple[str, Node]]:
        for name, child in node.value.items():
            if child.has_text_key or has_number_keys:
                yield name, child
            else:
                got = "another" if child.value is None else name[:SHOWN]  # which may be a secret in braces
                message = f"expected a string as a key, got {got} (in quotes it is one)"
                self.report(child, "value" if child.value is not None else "unknown_key", message, at_key=True)

    def _mismatch(self, node: Node, kind: Tree | Several | Table | MappingKind) -> Any:  # noqa: ANN401 # ABSENT, always
        """Report a value of the wrong shape. It isn't shown where secrets are expected."""
        is_hidden = isinstance(node.value, str) and has_secrets(kind)
        return self._expected(node, kind.expected, "a string" if is_hidden else _shown(node))

    def _expected(self, node: Node, expected: str, got: str) -> Any:  # noqa: ANN401 # ABSENT, always
        self.report(node, "value", f"expected {expected}, got {got}")
        return ABSENT

    def are_unresolved(self, node: Node, paths: Iterable[Sequence[str | int]]) -> bool:
        """Return whether all values at these paths are unresolved references, which are allowed here."""
        return not self.is_strict and all(self._is_unresolved(_descend(node, steps)) for steps in paths)

    def _is_unresolved(self, node: Node) -> bool:
        is_entry = node.path.endswith("]")  # in a list of secrets, such as {secret: …, until: …}
        return node in self.unresolved or (is_entry and node.child("secret") in self.unresolved)

    def locate(
        self,
        node: Node,
        problems: Sequence[tuple[Sequence[str | int], str]],
        *,
        code: Code = "value",
        severity: Severity = "error",
    ) -> None:
        """Report problems that another module found in a value, each with its path."""
        for steps, message in problems:
            location = _descend(node, steps)
            is_key = message.startswith(("unknown key", "unknown path", "unknown test"))
            is_shape = message.startswith(("expected a list", "expected a mapping"))
            if not (is_key or is_shape) and self._is_unresolved(location):
                continue  # the placeholder is at fault
            self.report(location, "unknown_key" if is_key else code, message, severity=severity, at_key=is_key)


def _descend(node: Node, steps: Sequence[str | int]) -> Node:
    """Follow a path as far as it exists."""
    for step in steps:
        child = node.child(step)
        if child is None:
            break
        node = child
    return node


def _shown(node: Node, *, is_secret: bool = False) -> str:
    """Format a value for a message, without resolving its references."""
    value = node.value
    if isinstance(value, list | dict):
        return "a list" if isinstance(value, list) else "a mapping"
    if is_secret and value is not None:
        return "another string" if isinstance(value, str) else "something else"
    if isinstance(value, str):
        return repr(value if len(value) <= SHOWN else value[: SHOWN - 3] + "...")
    return "null" if value is None else str(value).lower()  # `true`, `1e+16`
