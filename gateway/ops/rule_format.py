"""Formats rule files: indentation, spaces, blank lines and line ends. All else stays as it is written.

Tokens of YAML (https://yaml.org/spec/1.2.2) are copied verbatim: scalars with their quotes and escapes, anchors, tags,
comments. Only the whitespace between them changes. Line breaks stay, except that consecutive blank lines become one.
The lines of a multi-line scalar are shifted with its first line.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import yaml

from gateway.model import UsageError
from gateway.rules.yaml_document import Node, Problem, parse_document, text_of

try:
    from yaml import CSafeLoader as _Loader
except ImportError:  # PyYAML was built without libyaml
    from yaml import SafeLoader as _Loader  # type: ignore[assignment] # the stubs don't relate the two loaders

INDENT = 2
"""Spaces of indentation."""
_BLOCK_HEADER = re.compile(r"(?P<header>[|>][-+0-9]*)(?P<gap>[ \t]*)(?P<comment>#.*)?")
_COMMENT = re.compile(r"(?:^|(?<=\s))#.*$", re.MULTILINE)
_BREAKS = re.compile(r"[\x85\u2028\u2029]")  # which the scanner of YAML 1.1 takes for line breaks
_OPENING = (yaml.FlowSequenceStartToken, yaml.FlowMappingStartToken)
_CLOSING = (yaml.FlowSequenceEndToken, yaml.FlowMappingEndToken)
_SPACE_BEFORE_COLON = (yaml.AliasToken, yaml.AnchorToken, yaml.TagToken)


def formatted(path: Path) -> str:
    """Return a file's text as it should be: what it says is the same.

    Raises UsageError, with the location, for YAML that rule files may not have.
    """
    problems: list[Problem] = []
    text = text_of(path, problems)
    before = None if text is None else parse_document(str(path), text, problems)
    if text is None or before is None or any(problem.severity == "error" for problem in problems):
        raise UsageError("\n".join(map(str, sorted(problems))))
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    written = _Layout(text).written()
    after = parse_document(str(path), written, [])
    if after is None or _plain(after) != _plain(before) or _comments(written) != _comments(text):
        at = next((number for number, pair in enumerate(_lines_of(text, written), 1) if pair[0] != pair[1]), 1)
        raise UsageError(f"{path}:{at}: formatting would change what it means; it stays as it is")
    return written


def _lines_of(before: str, after: str) -> Iterator[tuple[str, str]]:
    """Yield the lines of both, without the space between words."""
    squeezed = [["".join(line.split()) for line in text.splitlines()] for text in (before, after)]
    return zip(*squeezed, strict=False)


def _comments(text: str) -> list[str]:
    """Return what looks like a comment, in order; in a string it may only look so, and stays as well."""
    return [found.strip() for found in _COMMENT.findall(text)]


def _plain(node: Node) -> object:
    if isinstance(node.value, dict):
        return [(key, _plain(child)) for key, child in node.value.items()]
    return [_plain(item) for item in node.value] if isinstance(node.value, list) else node.value


@dataclass(slots=True)
class _Block:
    """A block mapping or sequence.

    `old` is the column of its items in the source, None before the first of them, and `new` the one as written.
    `parsed` is the indentation that the scanner assumes in the source: that of the mapping around it for an indentless
    sequence, whose dashes are in the column of its key. Columns count from 0.
    """

    parsed: int
    is_sequence: bool
    is_indentless: bool = False
    old: int | None = None
    new: int = 0


@dataclass(frozen=True, slots=True)
class _TrailingComment:
    """A trailing comment: the index of its line, the space before it, and its column in the source."""

    line: int
    gap: int
    text: str
    column: int


class _Layout:
    """Writes the tokens of a text, one after another."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._lines: list[str] = []
        self._comments: list[_TrailingComment] = []
        self._blocks: list[_Block] = []
        self._ended: list[_Block] = []
        """Blocks that have ended since the last token was written, the inner ones first."""
        self._brackets: list[int] = []
        """For each open bracket, the indentation of its closing one on a line of its own."""
        self._indentation_in_brackets: int | None = None
        """That of the current line, if it began within brackets."""
        self._previous: yaml.Token | None = None
        self._end = 0
        """Where the source goes on after that token."""
        self._is_item = False
        """Whether the next token begins an item of a block."""
        self._protected_lines = 0
        """How many leading lines must stay, as trailing blank lines of a scalar (`|+`) may be among them."""
        self._ends_in_scalar = False
        """Whether the text ends within a scalar, to which a line break would belong."""

    def written(self) -> str:
        """Return the text as it should be."""
        for token in yaml.scan(self._text, Loader=_Loader):
            self._add(token)
        self._write_gap(self._text[self._end :], 0, 0)
        while len(self._lines) > self._protected_lines and not self._lines[-1]:
            self._lines.pop()
        for line, column, comment in list(_aligned(self._comments, self._lines)):
            self._lines[line] = self._lines[line].ljust(column) + comment
        return "\n".join(self._lines) + ("" if self._ends_in_scalar else "\n")

    def _add(self, token: yaml.Token) -> None:
        match token:
            case yaml.StreamStartToken() | yaml.StreamEndToken():
                pass
            case yaml.BlockSequenceStartToken() | yaml.BlockMappingStartToken():
                self._blocks.append(_Block(token.start_mark.column, isinstance(token, yaml.BlockSequenceStartToken)))
            case yaml.BlockEndToken():
                self._leave_indentless()
                self._ended.append(self._blocks.pop())
            case yaml.BlockEntryToken():
                if not self._blocks[-1].is_sequence:
                    self._blocks.append(_Block(self._blocks[-1].parsed, is_sequence=True, is_indentless=True))
                self._is_item = True
                self._write(token)
            case yaml.KeyToken() | yaml.ValueToken():
                if not self._brackets:
                    self._leave_indentless()
                    self._is_item = True
                if token.start_mark.index < token.end_mark.index:  # else it's a key without a question mark
                    self._write(token)
            case _:
                self._write(token)

    def _leave_indentless(self) -> None:
        if self._blocks[-1].is_indentless:
            self._ended.append(self._blocks.pop())

    def _write(self, token: yaml.Token) -> None:
        gap = _BREAKS.sub("\n", self._text[self._end : token.start_mark.index])
        old = self._column_of(token.start_mark.index)
        if self._previous is None or "\n" in gap:
            column = self._indentation(is_closing=isinstance(token, _CLOSING))
            self._write_gap(gap, column, old)
            self._lines.append(" " * column)
            self._indentation_in_brackets = column if self._brackets else None
        else:
            self._lines[-1] += _between(self._previous, token)
            column = len(self._lines[-1])
        if not self._brackets and self._blocks and self._blocks[-1].old is None:
            self._blocks[-1].old, self._blocks[-1].new = old, column
        if isinstance(token, _CLOSING):
            self._brackets.pop()
        self._write_source(token)
        if isinstance(token, _OPENING):
            own = self._indentation_in_brackets
            self._brackets.append(self._innermost() if own is None else own)
        self._previous = token
        self._ended.clear()
        self._is_item = False

    def _innermost(self) -> int:
        """Return the column of the items of the innermost block."""
        return self._blocks[-1].new if self._blocks else 0

    def _indentation(self, *, is_closing: bool = False) -> int:
        """Return where a token at the beginning of a line belongs."""
        if self._brackets:
            return self._brackets[-1] + (0 if is_closing else INDENT)
        if not self._blocks:
            return 0
        if self._blocks[-1].old is None:
            return self._blocks[-2].new + INDENT if len(self._blocks) > 1 else 0
        return self._blocks[-1].new + (0 if self._is_item else INDENT)

    def _write_gap(self, gap: str, column: int, old: int) -> None:
        """Write what is in the source before a token at the beginning of a line: comments, blank lines."""
        first, *lines = gap.split("\n") if self._previous is not None else ["", *gap.split("\n")]
        if comment := first.strip(" \t"):
            space = first[: len(first) - len(first.lstrip(" \t"))]
            self._note_trailing_comment(space, comment, self._end)
        for left, line in zip(reversed(range(len(lines))), lines, strict=True):
            if comment := line.strip(" \t"):
                self._lines.append(" " * self._column_of_comment(line, column, old) + comment)
            elif left and self._lines and self._lines[-1]:  # the last is the next token's, or the end
                self._lines.append("")

    def _note_trailing_comment(self, space: str, text: str, at: int) -> None:
        """Note a comment that ends the current line, and the space before it, which is there in the source."""
        gap = len(space.replace("\t", " " * INDENT))
        self._comments.append(_TrailingComment(len(self._lines) - 1, gap, text, self._column_of(at) + len(space)))

    def _column_of(self, at: int) -> int:
        return at - (self._text.rfind("\n", 0, at) + 1)

    def _column_of_comment(self, line: str, column: int, old: int) -> int:
        """Return where a comment on a line of its own belongs: to what follows, or to a block that ends before it."""
        if self._brackets:
            return self._brackets[-1] + INDENT
        found, indentation = (old, column), _indentation_of(line)
        for block in reversed(self._ended):
            if block.old is not None and found[0] < block.old <= indentation:
                found = (block.old, block.new)
        return found[1]

    def _write_source(self, token: yaml.Token) -> None:
        start, self._end = token.start_mark.index, token.end_mark.index
        source = self._text[start : self._end]
        if isinstance(token, yaml.ScalarToken) and token.style in ("|", ">"):
            self._write_block_scalar(source, start)
            return
        source = source.rstrip(" \t\n")
        self._end = start + len(source)
        first, *lines = source.split("\n")
        before = self._text[start - self._column_of(start) : start]
        shift = _indentation_of(self._lines[-1]) - _indentation_of(before)
        min_indent = self._brackets[-1] + INDENT if self._brackets else self._innermost() + INDENT
        self._lines[-1] += first
        for line in lines:
            content = line.lstrip(" \t")
            indentation = max(min_indent, len(line) - len(content) + shift)
            self._lines.append(" " * indentation + content if content else "")

    def _write_block_scalar(self, source: str, start: int) -> None:
        header, *lines = source.split("\n")
        found = _BLOCK_HEADER.match(header)
        assert found is not None  # the parser has read it
        self._lines[-1] += found["header"]
        if found["comment"]:
            self._note_trailing_comment(found["gap"], found["comment"].rstrip(), start + len(found["header"]))
        digits = re.sub("[^0-9]", "", found["header"])
        contents = [_indentation_of(line) for line in lines if line.strip(" ")]
        # An indentation indicator (`|2`) counts from the indentation of the enclosing block.
        has_indicator = bool(digits)
        old = self._blocks[-1].parsed + int(digits) if has_indicator and self._blocks else int(digits or 0)
        old = old if has_indicator else next(iter(contents), len(source))
        new = self._innermost() + (int(digits) if has_indicator else INDENT)
        keeps_trailing = "+" in found["header"]
        is_ended = source.endswith("\n")
        if is_ended:
            lines.pop()
        while not keeps_trailing and lines and not lines[-1][old:] and not lines[-1].strip(" "):
            lines.pop()  # a blank line after it, which isn't a part of it
            is_ended = True
        self._end = start + len("\n".join([header, *lines]))
        self._lines += [(" " * new + line[old:]) if line[old:] else "" for line in lines]
        self._ends_in_scalar = not is_ended
        if keeps_trailing:
            self._protected_lines = len(self._lines)


def _indentation_of(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


def _between(before: yaml.Token, token: yaml.Token) -> str:
    """Return the space between two tokens of a line."""
    match token:
        case yaml.FlowEntryToken() | yaml.FlowSequenceEndToken() | yaml.FlowMappingEndToken():
            return (
                " " if isinstance(before, yaml.ValueToken) else ""
            )  # without it, a colon would become part of the key
        case yaml.ValueToken():
            return " " if isinstance(before, _SPACE_BEFORE_COLON) else ""
        case _:
            return "" if isinstance(before, _OPENING) else " "


def _aligned(comments: Sequence[_TrailingComment], lines: Sequence[str]) -> Iterator[tuple[int, int, str]]:
    """Yield the line and the new column of trailing comments, at the same distance from the text as before.

    Those that were aligned on consecutive lines stay aligned.
    """
    numbered = groupby(enumerate(comments), key=lambda pair: (pair[1].line - pair[0], pair[1].column))
    for _, pairs in numbered:
        group = [comment for _, comment in pairs]
        column = max(len(lines[each.line]) for each in group) + min(each.gap for each in group)
        yield from [(each.line, column, each.text) for each in group]
