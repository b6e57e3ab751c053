r"""Patterns of `matches`, in RE2 (https://github.com/google/re2/wiki/Syntax), as the specification of CEL has them.

The only user of the RE2 library. What a pattern takes grows with its size times the text's length and no faster,
whatever stands in either, so that it can be charged before it is looked for. There are no backreferences and no
look-around; `\w`, `\d`, `\s` and `\b` are about ASCII.
"""

import re2

from gateway.model import ExpressionError

# Bytes for a compiled pattern, and again for the states that RE2 keeps of it, which a hostile text makes it fill.
# There is room for a pattern of some 4,000 characters, `.{0,1000}` or `\pL{1,10}`.
MAX_MEMORY = 256 * 1024
CALL = 20  # steps of 0.1 µs: what the shortest text takes
# Bytes of text times instructions that take one step at worst: by the slowest of RE2's ways, where a string leads to
# more states than it keeps. An ordinary one takes a hundredth of that.
BYTES_IN_A_STEP = 8


class Pattern:
    """A compiled pattern. Raises ExpressionError for one that isn't RE2's, or is too large."""

    __slots__ = ("_regexp", "_size")

    def __init__(self, text: str) -> None:
        options = re2.Options()
        options.max_mem = MAX_MEMORY
        options.never_capture = True
        options.log_errors = False
        try:
            self._regexp = re2.compile(text, options)
        except re2.error as error:
            reason = str(error.args[0], "utf-8", "replace") if isinstance(error.args[0], bytes) else str(error)
            raise ExpressionError(f"expected a pattern that RE2 takes: {reason}") from error
        self._size: int = self._regexp.programsize

    def cost(self, length: int) -> int:
        """Return how many steps a string of `length` bytes takes at worst."""
        return CALL + length * self._size // BYTES_IN_A_STEP

    def is_in(self, text: bytes) -> bool:
        """Return whether some part of the text, which is UTF-8, is what the pattern describes."""
        return self._regexp.search(text) is not None
