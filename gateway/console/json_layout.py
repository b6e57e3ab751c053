"""JSON as it was sent, laid out for reading: the same characters, on lines and indented. Pure.

Nothing is parsed into values and written again: numbers, escapes and repeated names stay as they are. What is laid out
is bounded, whatever the text is: a body of brackets alone would otherwise be mostly indentation.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

Kind = Literal["name", "string", "number", "word", "mark"]
INDENT = "  "
DEEPEST = 24
"""Levels that are indented."""
_TOKEN = re.compile(
    r'(?P<string>"(?:[^"\\\x00-\x1f]|\\.)*")|(?P<number>-?\d[\d.eE+-]*)|(?P<word>true|false|null)'
    r"|(?P<open>[{\[])|(?P<close>[}\]])|(?P<comma>,)|(?P<colon>:)|(?P<blank>[ \t\r\n]+)",
    re.ASCII,
)


class Piece(NamedTuple):
    """A part of the laid out text. `mark` is punctuation, with the line breaks around it."""

    kind: Kind
    text: str


class Layout(NamedTuple):
    """The pieces, and whether that is all of the text."""

    pieces: Sequence[Piece]
    is_whole: bool


def laid_out(text: str, *, longest: int) -> Layout | None:
    """Return a text as JSON on lines, up to so many characters; None if it isn't JSON as far as that goes."""
    pieces: list[Piece] = []
    written = 0
    for piece in _pieces(text):
        if piece is None:
            return None
        if written + len(piece.text) > longest:
            if written < longest:
                pieces.append(Piece(piece.kind, piece.text[: longest - written]))
            return Layout(pieces, is_whole=False)
        pieces.append(piece)
        written += len(piece.text)
    return Layout(pieces, is_whole=True) if pieces else None


def _pieces(text: str) -> Iterator[Piece | None]:  # noqa: C901 - one scanner, a case for each kind of token
    """Yield the pieces of a text; None where it can't be JSON."""
    at, opened, is_fresh = 0, list[str](), False
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            yield None
            return
        at = found.end()
        kind, part = str(found.lastgroup), found[0]
        if kind == "blank":
            continue
        if kind == "close":
            if not opened or opened.pop() != part:
                yield None
                return
            yield Piece("mark", part if is_fresh else _line(len(opened)) + part)
            is_fresh = False
            continue
        if is_fresh:
            yield Piece("mark", _line(len(opened)))
        is_fresh = kind == "open"
        if kind == "open":
            opened.append("}" if part == "{" else "]")
            yield Piece("mark", part)
        elif kind == "comma":
            yield Piece("mark", "," + _line(len(opened)))
        elif kind == "colon":
            yield Piece("mark", ": ")
        elif kind == "string":
            yield Piece("name" if _COLON.match(text, at) else "string", part)
        else:
            yield Piece("number" if kind == "number" else "word", part)
    if opened:
        yield None


_COLON = re.compile(r"[ \t\r\n]{0,100}:")


def _line(depth: int) -> str:
    return "\n" + INDENT * min(depth, DEEPEST)
