"""Where an expression reads fields of the event: which of them it may do without, and which it reads together."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from gateway.rules.event_view import ABSENT, ROOTS, EventView
from gateway.rules.scanner import FieldPath, Token, segments_at, tokens

_OPENING, _CLOSING = ("(", "[", "{"), (")", "]", "}")
_OPTIONAL = ("has", "default")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadPath:
    """A path that an expression reads.

    `is_optional`: it is what `has` or `default` asks for. `part` is the number of the part that it is in: those between
    which `&&` stands for the whole of the expression have numbers of their own.
    """

    path: FieldPath
    is_optional: bool
    part: int

    def is_absent(self, view: EventView) -> bool:
        """Return whether an event hasn't the field."""
        return view.get(self.path.root, self.path.segments) is ABSENT


@lru_cache(10_000)
def read_paths(text: str) -> Sequence[ReadPath]:
    """Return the paths in a valid expression, in their order."""
    return list(_found([*tokens(text), *[Token("end", "", len(text))] * 4]))


def _found(words: Sequence[Token]) -> Iterator[ReadPath]:
    depth = part = 0
    has_parts = not _has_choice(words)
    optional: int | None = None  # the depth of the brackets of `has` or `default`
    at = 0
    while (word := words[at]).kind != "end":
        before, after = words[at - 1].text if at else "", words[at + 1].text
        at += 1
        if word.kind == "sign" and word.text in _OPENING:
            depth += 1
            is_asked = word.text == "(" and before in _OPTIONAL and words[max(0, at - 3)].text != "."
            optional = depth if is_asked and optional is None else optional
        elif word.kind == "sign" and word.text in _CLOSING:
            optional = None if optional == depth else optional
            depth -= 1
        elif word.text == "," and optional == depth:
            optional = None  # what stands instead of the field is read like any other
        elif word.text == "&" and before == "&" and not depth and has_parts:
            part += 1
        elif word.kind == "name" and word.text in ROOTS and before != "." and after != "(":
            segments, at = segments_at(words, at)
            path = FieldPath(word.text, tuple(segments), at)
            yield ReadPath(path=path, is_optional=optional is not None, part=part)


def _has_choice(words: Sequence[Token]) -> bool:
    """Return whether `||` or `?` stands for the whole of an expression, outside of any brackets."""
    depth = 0
    for word in words:
        if word.kind == "sign":
            depth += (word.text in _OPENING) - (word.text in _CLOSING)
            if not depth and word.text in ("|", "?"):
                return True
    return False
