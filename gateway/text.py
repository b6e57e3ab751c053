"""Text that people write and read: durations, spelling suggestions, values in messages."""

import difflib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Self

MASK = "***"
"""What is shown instead of a secret."""
LEAST_HIDDEN = 4  # characters of a value that is hidden
MAX_SHOWN = 60  # characters of a value in a message
DURATION = re.compile(r"(?=\d)(?:(\d{1,9})d)?(?:(\d{1,9})h)?(?:(\d{1,9})m)?(?:(\d{1,9})s)?(?:(\d{1,9})ms)?", re.ASCII)
UNSENDABLE = re.compile(r"[\x00-\x08\x0a-\x1f\x7f\ud800-\udfff]")
"""What no header's value may have: RFC 9110, section 5.5."""
UNSEEN = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029"
    r"\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"
    r"\xad\u034f\u115f\u1160\u17b4\u17b5\u180e\u200b\u2060-\u2065\u206a-\u206f\u3164\ufeff\uffa0\ufff0-\ufffb"
    r"\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
"""What isn't seen, and may hide a text or change what is around it.

In order: controls but for tab and line feed, and separators of lines; all of Bidi_Control; and of
Default_Ignorable_Code_Point (Unicode's DerivedCoreProperties.txt) all but the joiners U+200C and U+200D, the variation
selectors U+FE00 to U+FE0F, which emoji and some scripts need, and Mongolian's (U+180B to U+180D, U+180F).
"""
_SECONDS = (86400.0, 3600.0, 60.0, 1.0, 0.001)


@dataclass(frozen=True, slots=True)
class Glob:
    """A pattern in which `*` matches any characters, and everything else itself."""

    text: str
    pieces: tuple[str, ...]

    @property
    def prefix(self) -> str:
        return self.pieces[0]

    def matches(self, text: str) -> bool:
        first, *middle, last = self.pieces
        if len(text) < len(first) + len(last) or not text.startswith(first) or not text.endswith(last):
            return False
        # The leftmost match is the best one for each piece, so there is no backtracking, however many stars there are.
        at, end = len(first), len(text) - len(last)
        for piece in middle:
            at = text.find(piece, at, end)
            if at < 0:
                return False
            at += len(piece)
        return True

    @classmethod
    def of(cls, text: str) -> Self:
        """Return the pattern that a text is."""
        return cls(text, tuple(text.split("*")))


def parse_duration(text: str) -> float:
    """Return the seconds of `5s`, `2m`, `1h30m`, `3d` or `500ms`. Raises ValueError."""
    found = DURATION.fullmatch(text)
    if not found:
        raise ValueError
    return sum(int(amount) * unit for amount, unit in zip(found.groups(), _SECONDS, strict=True) if amount)


_QUOTED = re.compile(r"'([^']+)'")


def hidden(text: str, values: Collection[str]) -> str:
    """Return a text without these values, but for short ones."""
    for value in sorted(values, key=len, reverse=True):
        if len(value) >= LEAST_HIDDEN:
            text = text.replace(value, MASK)
    return text


def without_parts(text: str, values: Collection[str]) -> str:
    """Return a message without these values, and without quoted parts of them, as a parser tells them."""
    return _QUOTED.sub(lambda found: f"'{MASK}'" if any(found[1] in value for value in values) else found[0], text)


def shown(value: object) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case str():
            return repr(value if len(value) <= MAX_SHOWN else value[:MAX_SHOWN] + "…")
        case int() | float():
            return repr(value)
        case _:
            return kind_of(value)


def kind_of(value: object) -> str:
    """Return a value's kind, without showing it."""
    match value:
        case None:
            return "nothing"
        case bool():
            return "a boolean"
        case str():
            return "a string" if value.strip() else "a blank string"
        case int() | float():
            return "a number"
        case Mapping():
            return "a mapping"
        case _:
            return "a list" if value else "an empty list"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `, did you mean 'x'?` with the most similar known name, in any case, or "" if none is similar."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    if not near and name != name.lower():
        by_lower = {each.lower(): each for each in names}
        near = [by_lower[each] for each in difflib.get_close_matches(name.lower(), by_lower, n=1)]
    return f", did you mean '{near[0]}'?" if near else ""
