"""Compiles the text of CEL expressions: what the CEL library's parser can't take never reaches it.

The parser counts nested brackets, but what frees the tree of `a.b.c…` calls itself for each of its parts:
16,000 of them overflow the C stack, which ends the process without a message.
"""

import re
from collections.abc import Iterable

import cel

from gateway.model import ExpressionError
from gateway.rules.cel_errors import shortened
from gateway.rules.event_view import ROOTS
from gateway.rules.scanner import syntax_hint
from gateway.text import did_you_mean

MAX_TEXT = 4096  # characters, and so at most 2,048 parts; parsing them takes milliseconds, in which no thread runs
MAX_EDIT = 40_000  # characters of such a text with all that we add to it: up to 0.2 s
MAX_DEPTH = 96  # levels of brackets and of conditionals, by the library


def compiled(text: str) -> cel.Program:
    """Compile a text that somebody wrote.

    Raises ExpressionError, with the character's position, for more than 4,096 characters, text that isn't CEL, and a
    name that begins with a dot. Other names aren't checked.
    """
    if len(text) > MAX_TEXT:
        raise ExpressionError(f"expected at most {MAX_TEXT} characters, got {len(text)}")
    return _program(text)


def compiled_edit(text: str) -> cel.Program:
    """Compile what an edit has made of a text that `compiled` took. Raises ExpressionError, without a position.

    Edits add some 70 characters for each macro or `size`, but no parts to a path or to a sum.
    """
    return _program(text, is_edit=True)


def check_edits(texts: Iterable[str]) -> None:
    """Raise ExpressionError for edits that are too long, before any of them is compiled, if ever."""
    if (longest := max(map(len, texts))) > MAX_EDIT:
        expected = f"expected at most {MAX_EDIT:,} characters with what default, size and macros stand for"
        raise ExpressionError(f"{expected}, got {longest:,}")


def _program(text: str, *, is_edit: bool = False) -> cel.Program:
    try:
        program = cel.compile(text)
    except ValueError as error:
        raise _syntax_error(text, str(error)[len(text) :], is_edit=is_edit) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # which no module has, and which is no Exception
            raise
        raise ExpressionError("syntax error: expected CEL, got text at which its parser fails") from error
    if rooted := [name for name in program.variables() if name.startswith(".")]:
        raise ExpressionError(f"unknown name '{rooted[0]}'{did_you_mean(rooted[0], ROOTS)}")
    return program


def _syntax_error(text: str, message: str, *, is_edit: bool) -> ExpressionError:
    found = re.search(r"ERROR: <input>:(\d+):(\d+): (?:Syntax error: )?([^\n]*)", message)
    if found is None:
        return ExpressionError(f"syntax error: {shortened(message)}")
    line, column, reason = found.groups()
    location = "" if is_edit else f" at character {column}" if line == "1" else f" at line {line}, character {column}"
    if "Recursion limit" in reason:  # by the text, or by brackets that an edit adds
        reason = f"nested too deeply: expected at most {MAX_DEPTH} levels, got more"
    reason = reason.partition(" expecting ")[0] if len(reason) > 80 else reason  # noqa: PLR2004 - one line
    return ExpressionError(f"syntax error{location}: {reason}{syntax_hint(text)}")
