"""Hides what an event's source hides (`redact:`) in texts that may repeat it. Pure."""

from dataclasses import replace

from gateway.bodies.redaction import HIDDEN, Redacted
from gateway.client.masking import MIN_SECRET, Mask
from gateway.model import ResponseExcerpt

MOST_OF_A_CHARACTER = 4
"""Bytes of UTF-8 that a character has, at most."""
SPARE = 8
"""Bytes beyond a text in which the beginning of a longer value may be written otherwise than the whole value."""


class Echoes:
    """Hides an event's hidden values in other texts: what a destination responded, why an expression failed.

    A value of four bytes and more is hidden in any form in which a text may have it, a shorter one where it stands by
    itself. If not all values are known, because the body couldn't be read or has too many, the whole text is hidden.
    Of several events, what any of them hides is.

    A value's forms are made for texts that have room for it: none is shorter than the value, whose size its sender
    chooses. Of longer ones only the beginnings matter, in which a text that is cut off may end.
    """

    def __init__(self, *redacted: Redacted) -> None:
        self._values = tuple(dict.fromkeys([value for each in redacted for value in each.values]))
        self._longest = max(map(len, self._values), default=0)
        self._is_all = any(each.has_more for each in redacted)
        self._most = 0
        self._mask = Mask()

    def _mask_of(self, size: int) -> Mask:
        """Return what masks texts of so many bytes; it is made anew for longer ones than before alone."""
        if self._most < min(size + SPARE, self._longest):
            self._most = 1 << (size + SPARE).bit_length()
            self._mask = Mask(
                {value[: self._most] for value in self._values if len(value) >= MIN_SECRET},
                words=[value for value in self._values if len(value) < MIN_SECRET],
            )
        return self._mask

    def bytes(self, text: bytes, *, is_cut: bool = False) -> bytes:
        """Return a text without them; `is_cut`: it may end in the middle of one."""
        if self._is_all:
            return HIDDEN.encode() if text else text
        mask = self._mask_of(len(text))
        return mask.masked_beginning(text) if is_cut else mask.masked(text)

    def text(self, text: str) -> str:
        """Return a text without them."""
        if self._is_all:
            return HIDDEN if text else text
        return self._mask_of(MOST_OF_A_CHARACTER * len(text)).masked_text(text)

    def excerpt(self, excerpt: ResponseExcerpt) -> ResponseExcerpt:
        """Return what was kept of a response without them."""
        return replace(
            excerpt,
            headers=tuple([(self.bytes(name), self.bytes(value)) for name, value in excerpt.headers]),
            body=self.bytes(excerpt.body, is_cut=excerpt.is_body_cut),
        )
