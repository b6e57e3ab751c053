"""Reads a rule file and its includes, each once, and tells which files a reload has to watch."""

import glob
import hashlib
import os
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path

from gateway.rules.defaults import inherit
from gateway.rules.foreach import expand
from gateway.rules.policy import confines_secrets
from gateway.rules.schema import INCLUDED, ROOT
from gateway.rules.schema_reader import ABSENT, NameRef, ParsedMapping, SchemaReader
from gateway.rules.value_kinds import MappingKind
from gateway.rules.yaml_document import Node, Problem, Severity, is_of_tests, parse_document, text_of


class RuleFiles:
    """The files of one set of rules. The reader collects the problems."""

    def __init__(self, reader: SchemaReader) -> None:
        self._reader = reader
        self._seen: set[str] = set()
        self._version = hashlib.blake2b(digest_size=4)

    @property
    def version(self) -> str:
        """A digest (8 hexadecimal digits) of the names and texts of the files."""
        return self._version.hexdigest()

    def read(self, root: Path) -> list[ParsedMapping]:
        """Return the contents of a file and then of its includes, completed by what each inherits."""
        self._reader.whole = ROOT
        return list(self._read(root, ROOT, (), None))

    def _read(
        self, path: Path, kind: MappingKind, above: tuple[Path, ...], parent: ParsedMapping | None
    ) -> Iterator[ParsedMapping]:
        reader = self._reader
        self._seen.add(_identity(path))
        reader.watch(path)
        text = text_of(path, reader.problems)
        self._version.update(f"{path.name}\0{text}\0".encode("utf-8", "surrogatepass"))
        found: list[Problem] = []
        root = None if text is None else parse_document(str(path), text, found)
        reader.problems += [problem for problem in found if not is_of_tests(problem)]
        if root is not None:
            expand(root, reader.problems)
        outer = reader.secrets
        read = ABSENT if root is None else reader.read(root, kind)
        if read is ABSENT:
            reader.has_gaps, reader.secrets = True, outer
            return
        if _includes_unknown(read.node, reader):
            reader.has_gaps = reader.is_incomplete = True
        inherit(read, parent)
        if confines_secrets(read):
            reader.secrets = {}
        yield read
        above = (*above, path)
        enclosing = set(map(_identity, above))
        for use in read.values.get("include", ()):
            for file in self._found(use, path.parent):
                if _identity(file) in enclosing:
                    cycle = " → ".join(map(str, (*above, file)))
                    message = f"include cycle: {cycle}"
                    reader.report(use.node, "include", message)
                elif _identity(file) not in self._seen:
                    yield from self._read(file, INCLUDED, above, read)
        reader.secrets = outer

    def _found(self, use: NameRef, folder: Path) -> list[Path]:
        """Return the files that match an include, and watch the folders where more of them could appear."""
        reader, name = self._reader, use.name
        if "\0" in name:
            reader.has_gaps = True
            reader.report(use.node, "include", "expected a file's name, got one with a NUL")
            return []
        is_pattern = glob.has_magic(name)
        for each in _folders(name, folder) if is_pattern else [folder / name]:
            reader.watch(each)
        found = _matches(name, folder)
        if not found:
            severity: Severity = "warning" if is_pattern else "error"
            reader.has_gaps |= not is_pattern  # a pattern without matches defines nothing
            reader.report(use.node, "include", f"expected a file at {name!r}, got none", severity=severity)
        return [folder / each for each in found]


def _identity(path: Path) -> str:
    """Return a file's canonical path, even if it is missing, or in a loop of links, where `Path.resolve` raises."""
    return os.path.realpath(path)


def _includes_unknown(root: Node, reader: SchemaReader) -> bool:
    """Return whether a file has includes with unresolved names."""
    include = root.child("include")
    if include is None:
        return False
    return any(each in reader.unresolved for each in (include.value if isinstance(include.value, list) else [include]))


def _folders(pattern: str, folder: Path) -> Iterator[Path]:
    """Yield the folders that change when a file that matches the pattern is added; the first even if it is missing.

    Each is yielded before its subfolders are listed, so that a file added in between isn't missed.
    """
    parts = Path(pattern).parts[:-1]
    known = list(takewhile(lambda part: not glob.has_magic(part), parts))
    yield folder.joinpath(*known)
    for depth in range(len(known) + 1, len(parts) + 1):
        yield from [folder / each for each in _matches(f"{Path(*parts[:depth])}/", folder)]


def _matches(pattern: str, folder: Path) -> list[str]:
    # Path.glob takes no absolute pattern.
    return sorted(glob.glob(pattern, root_dir=folder, recursive=True))  # noqa: PTH207
