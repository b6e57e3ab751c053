r"""Patterns of `matches`, in RE2 (https://github.com/google/re2/wiki/Syntax), as CEL's specification requires.

The only user of the RE2 library. A search takes time proportional at most to the pattern's size times the text's
length, so that its cost can be charged in advance. There are no backreferences and no look-around; `\w`, `\d`, `\s` and
`\b` are ASCII only.
"""

import re2

from gateway.model import ExpressionError

# Bytes for a compiled pattern, and again for RE2's cache of its states, which a hostile text can fill. Enough for a
# pattern of about 4,000 characters, `.{0,1000}` or `\pL{1,10}`.
MAX_MEMORY = 256 * 1024
CALL_COST = 20  # cost units (0.1 µs) for the shortest text
# Bytes of text, times the pattern's instructions, per cost unit in the worst case: RE2's slowest algorithm, for a
# string that leads to more states than its cache holds. An ordinary search costs a hundredth of that.
BYTES_PER_COST_UNIT = 8


class Pattern:
    """A compiled pattern. Raises ExpressionError for one that isn't RE2's, or is too large."""

    __slots__ = ("_regexp", "_size")

    def __init__(self, text: str, *, captures: bool = False) -> None:
        options = re2.Options()
        options.max_mem = MAX_MEMORY
        options.never_capture = not captures
        options.log_errors = False
        try:
            self._regexp = re2.compile(text, options)
        except re2.error as error:
            reason = str(error.args[0], "utf-8", "replace") if isinstance(error.args[0], bytes) else str(error)
            raise ExpressionError(f"expected a pattern that RE2 accepts: {reason}") from error
        self._size: int = self._regexp.programsize

    def cost(self, length: int) -> int:
        """Return the maximum cost units for a string of `length` bytes."""
        return CALL_COST + length * self._size // BYTES_PER_COST_UNIT

    def extract(self, text: bytes) -> bytes:
        """Return what the pattern's first group matches, or without groups the pattern; empty if nothing does."""
        found = self._regexp.search(text)
        if found is None:
            return b""
        content: bytes | None = found.group(1 if self._regexp.groups else 0)
        return content or b""

    def is_in(self, text: bytes) -> bool:
        """Return whether the pattern matches some part of the text, which is UTF-8."""
        return self._regexp.search(text) is not None
