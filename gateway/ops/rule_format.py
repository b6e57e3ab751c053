"""Formats rule files: indentation, blank lines and line ends. Comments, quotes and order stay."""

import io
import re
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from gateway.model import UsageError
from gateway.rules.yaml_document import Node, Problem, parse_document, text_of

NEVER = 1 << 20
"""A line's maximum width: none is broken, since people break them better."""
_BLANK_LINES = re.compile(r"\n{3,}")
_COMMENT = re.compile(r"(?:^|(?<=\s))#.*$", re.MULTILINE)
_START = re.compile(r"^---(\s|$)", re.MULTILINE)


def formatted(path: Path) -> str:
    """Return a file's text as it should be: what it says is the same.

    Raises UsageError, with the location, for what isn't YAML as rules have it.
    """
    problems: list[Problem] = []
    text = text_of(path, problems)
    before = None if text is None else parse_document(str(path), text, problems)
    if text is None or before is None or problems:
        raise UsageError("\n".join(map(str, sorted(problems))))
    try:
        written = _dumped(text.replace("\r\n", "\n"))
    except (YAMLError, ValueError) as error:  # ValueError: a date that there is none, which is a string for us
        raise UsageError(f"{path}: expected YAML that can be formatted, got: {' '.join(str(error).split())}") from error
    # A string of several lines may have blank lines of its own.
    for candidate in (_BLANK_LINES.sub("\n\n", written), written):
        after = parse_document(str(path), candidate, [])
        if after is not None and _plain(after) == _plain(before) and _comments(candidate) == _comments(text):
            return candidate
    # The library that writes it loses comments in lists and mappings of several lines in brackets.
    raise UsageError(f"{path}: expected the same content and comments after formatting, got others; it stays as it is")


def _represent_null(representer: Any, _: None) -> Any:  # noqa: ANN401 - ruamel has no types
    return representer.represent_scalar("tag:yaml.org,2002:null", "null")


def _dumped(text: str) -> str:
    yaml = YAML(typ="rt")
    yaml.version = (1, 2)
    yaml.preserve_quotes = True
    yaml.representer.add_representer(type(None), _represent_null)
    yaml.width = NEVER
    yaml.indent(mapping=2, sequence=4, offset=2)
    out = io.StringIO()
    yaml.dump(yaml.load(text), out)
    written = out.getvalue().removeprefix("%YAML 1.2\n")  # for the parser: no file has to say it
    if not _START.search(text):
        written = written.removeprefix("---\n")
    return written.strip("\n") + "\n"


def _comments(text: str) -> list[str]:
    """Return what looks like a comment, in order; in a string it may only look so, and stays as well."""
    return [found.strip() for found in _COMMENT.findall(text)]


def _plain(node: Node) -> object:
    if isinstance(node.value, dict):
        return [(key, _plain(child)) for key, child in node.value.items()]
    return [_plain(item) for item in node.value] if isinstance(node.value, list) else node.value
