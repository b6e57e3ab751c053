"""The rule files among those that rules were read from, as documents: the others hold secrets and certificates."""

from collections.abc import Iterable, Iterator
from pathlib import Path

from gateway.rules.schema import ROOT
from gateway.rules.yaml_document import Node, read_document

_KEYS = frozenset([key.name for key in ROOT.keys])


def rule_documents(files: Iterable[Path]) -> Iterator[tuple[Path, Node]]:
    """Yield the files that are rule files, whatever their names, each with its document as it is now.

    It is one if it is a mapping with keys of one alone.
    """
    for file in files:
        root = read_document(file, [])
        if root is not None and isinstance(root.value, dict) and root.value.keys() <= _KEYS:
            yield file, root
